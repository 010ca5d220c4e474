"""Write the README's results from the JSON files in benchmarks/results, between its two markers.

No number in the README is typed: run `python benchmarks/fill_readme.py` after a result has changed,
and `--check` to see whether they agree.
"""

from __future__ import annotations

import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
MODELS = ("smollm2-135m", "gemma3-270m")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
KEPT = (0.9, 0.85, 0.8, 0.75, 0.7)
MEASURES = {"loss": "all tokens", "answer_loss": "answers"}
NAMES = {
    "kept": '`attn_token`, `kv="kept"`',
    "kept_window": '`attn_token`, `kv="kept"`, sink 4, window 16',
    "all": '`attn_token`, `kv="all"`',
    "sequence": "`attn_sequence`",
    "learned_static": "learned static",
    "mlp_token": "`mlp_token`",
    "mlp_sequence": "`mlp_sequence`",
    "block_token": '`block_token`, `kv="kept"`, sink 4, window 16',
    "block_sequence": "`block_sequence`",
}
UNITS = {
    "attention": ("", ("all", "kept_window", "sequence")),
    "MLP": ("-mlp", ("mlp_token", "mlp_sequence")),
    "block": ("-block", ("block_token", "block_sequence")),
}
"""What is routed: the end of its result file's name, and its settings."""
UNITS_KEPT = (0.9, 0.75)
EARLIER_ROWS = 2
"""The default of `warm_start` while it measured the harm of each unit's absence (decision 0005)."""


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    parts = [_demo(path) for path in sorted(RESULTS.glob("demo*.json"))]
    parts += [_speed(model) for model in MODELS if list(RESULTS.glob(f"bench-{model}-*.json"))]
    parts += [_step(model) for model in MODELS if _result(f"training-step-{model}")]
    parts += [_units(model) for model in MODELS if _result(f"quality-{model}")]
    parts += [
        _quality(path)
        for model in MODELS
        for path in (RESULTS / f"quality-{model}.json", RESULTS / f"quality-lm-{model}.json")
        if path.exists()
    ]
    filled = f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}"
    if "--check" in sys.argv:
        if filled != text:
            print("README.md does not agree with benchmarks/results; run benchmarks/fill_readme.py")
        return int(filled != text)
    readme.write_text(filled)
    return 0


def _result(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def _units(model: str) -> str:
    """All granularities of a model beside the controls of their kind of unit, one seed."""
    files = {kind: f"quality-{model}{end}" for kind, (end, _) in UNITS.items()}
    found = {kind: document for kind, name in files.items() if (document := _result(name))}
    texts = list(next(iter(found.values()))["dense"])
    links = ", ".join(f"[{files[k]}.json](benchmarks/results/{files[k]}.json)" for k in found)
    columns = [f"{text}, {kept:.2f}" for text in texts for kept in UNITS_KEPT]
    lines = [
        f"**{model}, all granularities** (one seed; {links}). Extra loss over all tokens in nats a "
        "token, at the kept fraction of the kind of unit. Tuned on steps x windows:",
        "",
        f"| unit | what decides | {' | '.join(columns)} | tuned on |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]
    for kind, document in found.items():
        for label, tokens, curves in _deciders(document, UNITS[kind][1], texts):
            cells = [
                _cell([_at(sorted([*curves[text], (1.0, 0.0)]), kept)])
                for text in texts
                for kept in UNITS_KEPT
            ]
            lines.append(f"| {kind} | {label} | {' | '.join(cells)} | {tokens} |")
    return "\n".join(lines)


def _deciders(
    document: dict[str, Any], settings: tuple[str, ...], texts: list[str]
) -> list[tuple[str, str, dict[str, list[tuple[float, float]]]]]:
    """Label, tokens of tuning, and points (kept fraction, extra loss) for each text."""

    def points(rows: dict[str, list[dict[str, Any]]]) -> dict[str, list[tuple[float, float]]]:
        return {
            text: [
                (row["kept_fraction"], row["loss"] - document["dense"][text]["loss"])
                for row in rows[text]
            ]
            for text in texts
        }

    found = []
    for setting in settings:
        runs = [r for r in document["runs"] if r["setting"] == setting and r["seed"] == 0]
        if runs:
            last = runs[-1]
            found.append((_name(last), _tuned_on(last), points(last["routed"])))
    for kind in ("cosine", "greedy"):
        if kind in document.get("static", {}).get(texts[0], {}):
            rows = {text: document["static"][text][kind] for text in texts}
            found.append((f"static, {kind}", "-", points(rows)))
    if "random" in document:
        # Chance keeps what it is told to, to a thousandth.
        rows = {
            text: [{**row, "kept_fraction": row["rate"]} for row in document["random"][text]]
            for text in texts
        }
        found.append(("random", "-", points(rows)))
    return found


def _speed(model: str) -> str:
    """Times over dense, and the share of the possible saving, of each adapter that was timed."""
    paths = sorted(RESULTS.glob(f"bench-{model}-*.json"))
    found = {path: json.loads(path.read_text()) for path in paths}
    run = found[paths[0]]["run"]
    lines = [
        f"**Speed of {model}** ({run['device']}, {run['dtype']}, {run['threads']} threads; medians "
        "of few repeats on a shared machine). Time over dense in the same run; in brackets the "
        "share of the possible saving that was realised, with a star where the saving is too small "
        "to tell:",
        "",
        "| adapter | rows x prompt + new | kept | prefill | decode | all kept | floor | masked | "
        "end to end | cache |",
        "|---|" + "---|" * 9,
    ]
    for path, document in found.items():
        name = f"[{_adapter(document['adapter'])}](benchmarks/results/{path.name})"
        lines += [f"| {name} | {_speed_cells(cell)} |" for cell in document["cells"]]
    return "\n".join(lines)


def _step(model: str) -> str:
    """What a training step costs beside full fine-tuning."""
    document = _result(f"training-step-{model}")
    assert document is not None
    run = document["run"]
    name = f"training-step-{model}.json"
    lines = [
        f"**A training step of {model}** (batch {run['batch_size']} x {run['length']}, "
        f"{run['device']}, {run['dtype']}, {run['threads']} threads; "
        f"[{name}](benchmarks/results/{name})), over full fine-tuning:",
        "",
        "| what trains | time | peak memory | tokens/s | trained numbers |",
        "|---|---|---|---|---|",
    ]
    for variant, one in document["variants"].items():
        over = document["over_full"][variant]
        lines.append(
            f"| {variant} | {over['time']:.2f} | {over['memory']:.2f} | "
            f"{one['tokens_per_second']:.0f} | {one['trainable']:,} |"
        )
    return "\n".join(lines)


def _speed_cells(cell: dict[str, Any]) -> str:
    prefill, decode = cell["prefill"]["over_dense"], (cell["decode"] or {}).get("over_dense", {})
    cache, whole = cell["kv_bytes_counted"], cell["end_to_end"]
    pairs = [
        f"{prefill[name]:.2f}, {decode[name]:.2f}" if name in decode else f"{prefill[name]:.2f}"
        for name in ("all_kept", "floor")
    ]
    cells = [
        f"{cell['batch_size']} x {cell['prompt_tokens']} + {cell['new_tokens']}",
        f"{cell['kept_of_routed']:.2f}",
        _saving(cell["prefill"]),
        _saving(cell["decode"]),
        *pairs,
        f"{prefill['masked']:.2f}" if "masked" in prefill else "-",
        f"{whole['routed'] / whole['dense']:.2f}" if whole else "-",
        f"{cache['routed'] / cache['dense']:.2f}",
    ]
    return " | ".join(cells)


def _adapter(adapter: dict[str, Any]) -> str:
    granularity = adapter["granularity"]
    names = granularity if isinstance(granularity, str) else ", ".join(granularity)
    if names.startswith("mlp"):
        return f"`{names}`"
    window = f", sink {adapter['kv_sink']}, window {adapter['kv_window']}"
    return f'`{names}`, `kv="{adapter["kv"]}"`' + (window if adapter["kv_window"] else "")


def _saving(phase: dict[str, Any] | None) -> str:
    if phase is None:
        return "-"
    saved = phase["realised_saving"].get("routed")
    mark = "" if phase["conclusive"] else "*"
    return f"{phase['over_dense']['routed']:.2f}" + (
        "" if saved is None else f" ({saved:.2f}{mark})"
    )


def _quality(path: Path) -> str:
    document = json.loads(path.read_text())
    return "\n\n".join(
        _quality_table(path, document, text, measure)
        for text, base in document["dense"].items()
        for measure in MEASURES
        if base[measure] is not None
    )


def _quality_table(path: Path, document: dict[str, Any], text: str, measure: str) -> str:
    run, base = document["run"], document["dense"][text]
    lines = [
        f"**{run['model']}, {text}, {MEASURES[measure]}** ({base['tokens']} tokens, dense loss "
        f"{base[measure]:.3f}; {run['device']}, {run['dtype']}; "
        f"[{path.name}](benchmarks/results/{path.name})). Extra loss in nats a token; "
        "tuned on steps x windows of 256 tokens:",
        "",
        "| kept (learning rates) | "
        + " | ".join(f"{k:.2f}" for k in KEPT)
        + " | tuned on | seeds |",
        "|---|" + "---|" * (len(KEPT) + 2),
    ]
    for runs in _groups(document["runs"]):
        curves = [_curve(one["routed"][text], measure, base) for one in runs]
        lines.append(
            f"| {_name(runs[0])} | {_cells(curves)} | {_tuned_on(runs[0])} | {len(curves)} |"
        )
    for kind in ("cosine", "greedy"):
        rows = document.get("static", {}).get(text, {}).get(kind)
        if rows:
            curve = _curve(rows, measure, base)
            lines.append(f"| static, {kind} | {_cells([curve])} | - | - |")
    return "\n".join(lines)


def _groups(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs that differ by their seed alone."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        key = json.dumps([run["setting"], run["tuning"]], sort_keys=True)
        found.setdefault(key, []).append(run)
    return list(found.values())


def _name(run: dict[str, Any]) -> str:
    """The setting, the learning rates of weights and biases, and what else is not as by default."""
    tuning = run["tuning"]
    start = "; old start" if tuning.get("warm_start") == EARLIER_ROWS else ""
    rates = f"{tuning['learning_rate']:g} / {tuning['bias_learning_rate']:g}"
    text = tuning.get("lm_weight", 0)
    return f"{NAMES[run['setting']]}; {rates}" + (f"; text {text:g}" if text else "") + start


def _tuned_on(run: dict[str, Any]) -> str:
    """Steps and windows a step."""
    tuning = run["tuning"]
    return f"{tuning['steps']} x {tuning['batch_size']}"


def _demo(path: Path) -> str:
    document = json.loads(path.read_text())
    run, evaluation = document["run"], document
    base = evaluation["dense"]["loss"]
    budgets = [row["budget"] for row in evaluation["routed"]]
    lines = [
        f"**The demo** ({run['seconds'] / 60:.1f} minutes, {run['peak_rss_mb'] / 1000:.1f} GB, "
        f"{run['threads']} threads, {run['device']}; {evaluation['dense']['tokens']} tokens of "
        "held-out text, "
        f"dense loss {base:.3f}; [{path.name}](benchmarks/results/{path.name})). Extra loss in "
        "nats a token, "
        f"in brackets the kept fraction:",
        "",
        "| budget | " + " | ".join(f"{b:.2f}" for b in budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    names = {
        "routed": "routed",
        "random": "random, same rate in each layer",
        "static_cosine": "static, cosine",
    }
    for key, name in names.items():
        cells = [
            f"{row['loss'] - base:+.3f} ({row['kept_fraction']:.3f})" for row in evaluation[key]
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _curve(
    rows: list[dict[str, Any]], measure: str, base: dict[str, Any]
) -> list[tuple[float, float]]:
    """Points (kept fraction, extra loss) in order, the dense model included."""
    points = [(row["kept_fraction"], row[measure] - base[measure]) for row in rows]
    return sorted([*points, (1.0, 0.0)])


def _cells(curves: list[list[tuple[float, float]]]) -> str:
    return " | ".join(_cell([_at(curve, kept) for curve in curves]) for kept in KEPT)


def _cell(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return "-"
    spread = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):+.3f}{spread}"


def _at(curve: list[tuple[float, float]], kept: float) -> float | None:
    """The extra loss at exactly `kept`, between the two nearest points; None outside them."""
    for (k0, v0), (k1, v1) in pairwise(curve):
        if k0 <= kept <= k1:
            return v0 if k0 == k1 else v0 + (v1 - v0) * (kept - k0) / (k1 - k0)
    return None


if __name__ == "__main__":
    sys.exit(main())
