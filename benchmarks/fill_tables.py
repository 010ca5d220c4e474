"""Write the tables of README.md and docs/results.md, and the figures in docs/figures, from the JSON
files in benchmarks/results.

Tables stand between two markers in each. No number there is typed: run
`python benchmarks/fill_tables.py` after a result has changed, and `--check` to see whether they
agree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import mixture_tables
import oracle_tables
import pareto
import peers_tables
import quality_figure
import quality_tables
import recovery_tables
import routing_tables
import screen_tables
import speed_tables
import sweep_tables
import task_tables
from places import RESULTS, ROOT, read

from router_tuning.report.figures import growth_figure

MODELS = ("smollm2-135m", "gemma3-270m")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def main() -> int:
    filled = {
        ROOT / "README.md": _filled("README.md", readme),
        ROOT / "docs/results.md": _filled("docs/results.md", results),
    }
    stale = [path for path, text in filled.items() if path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.name} does not agree with benchmarks/results: run {sys.argv[0]}")
        return int(bool(stale))
    for path in stale:
        path.write_text(filled[path])
    for model in MODELS:
        figure = ROOT / f"docs/figures/quality-{model}.png"
        quality_figure.draw(RESULTS / f"quality-{model}.json", figure)
        if pareto.files(model):
            pareto.draw(model, ROOT / f"docs/figures/pareto-{model}.png")
    for path in _growth():
        growth_figure(read(path), ROOT / f"docs/figures/{path.stem}.png")
    for path in _routing():
        routing_tables.draw(path, ROOT / "docs/figures")
    return 0


def readme() -> list[str]:
    """What a reader should see first: the demo, recipes, speed, peers, a training step."""
    parts = [speed_tables.demo(RESULTS / "demo-smollm2-135m.json", "")]
    for model in MODELS:
        name = f"quality-{model}"
        parts.append(f"![{model}: loss against kept fraction](docs/figures/{name}.png)")
        parts.append(quality_tables.newest(RESULTS / f"{name}.json", ""))
    calibration, evaluation = (
        RESULTS / f"{verb}-smollm2-135m-kept.json" for verb in ("calibrate", "eval-calibrated")
    )
    parts.append(quality_tables.calibrated(calibration, evaluation, ""))
    parts += [speed_tables.speed(m, "") for m in MODELS if any(RESULTS.glob(f"bench-{m}-*.json"))]
    for model in MODELS:
        paths = sorted(RESULTS.glob(f"speed-peers-{model}*.json"))
        parts += [speed_tables.peers(path, "") for path in paths]
    steps = [RESULTS / f"training-step-{model}.json" for model in MODELS]
    parts += [speed_tables.training_step(path, "") for path in steps if path.exists()]
    return parts


def results() -> list[str]:
    """All units, every recipe that was run, and which layers and tokens skip."""
    parts = [quality_tables.granularities(model, "../") for model in MODELS]
    for model in MODELS:
        paths = (RESULTS / f"quality-{model}.json", RESULTS / f"quality-lm-{model}.json")
        parts += [quality_tables.everything(path, "../") for path in paths if path.exists()]
    sweeps = [RESULTS / f"quality-{model}.json" for model in MODELS]
    tables = [sweep_tables.swept(path, "../") for path in sweeps if path.exists()]
    parts += [table for table in tables if table]
    screens = [RESULTS / f"screen-{model}.json" for model in MODELS]
    parts += [screen_tables.screened(path, "../") for path in screens if path.exists()]
    parts += [task_tables.tasks(path, "../") for path in sorted(RESULTS.glob("tasks-*.json"))]
    parts += [pareto.table(model, "../") for model in MODELS if pareto.files(model)]
    parts += [speed_tables.growth(path, "../") for path in _growth()]
    halves = [RESULTS / f"fewer-tokens-{model}.json" for model in MODELS]
    parts += [speed_tables.fewer_tokens(path, "../") for path in halves if path.exists()]
    parts += [speed_tables.paying(path, "../") for path in sorted(RESULTS.glob("paying*.json"))]
    for path in _routing():
        parts += routing_tables.routing(path, "../")
    recovery = [RESULTS / f"recovery-{model}.json" for model in MODELS]
    parts += [recovery_tables.recovery(path, "../") for path in recovery if path.exists()]
    others = [RESULTS / f"peers-{model}.json" for model in MODELS]
    parts += [peers_tables.trained(path, "../") for path in others if path.exists()]
    oracles = [RESULTS / f"sequence-oracle-{model}.json" for model in MODELS]
    parts += [oracle_tables.oracle(path, "../") for path in oracles if path.exists()]
    mixture = RESULTS / "mixture.json"  # whose figures mixture.py draws
    return [*parts, *(mixture_tables.mixture(mixture, "../") if mixture.exists() else [])]


def _growth() -> list[Path]:
    """The benchmarks over many lengths and rows that were run."""
    return sorted(RESULTS.glob("growth-*.json"))


def _routing() -> list[Path]:
    """The analyses of routing that were run."""
    paths = [RESULTS / f"routing-analysis-{model}.json" for model in MODELS]
    return [path for path in paths if path.exists()]


def _filled(name: str, tables: Callable[[], list[str]]) -> str:
    before, rest = (ROOT / name).read_text().split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n" + "\n\n".join(tables()) + f"\n\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
