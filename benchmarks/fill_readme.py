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
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
KEPT = (0.9, 0.85, 0.8, 0.75, 0.7)
MEASURES = {"loss": "all tokens", "answer_loss": "answers"}
NAMES = {
    "kept": '`attn_token`, `kv="kept"`',
    "kept_window": '`attn_token`, `kv="kept"`, sink 4, window 16',
    "all": '`attn_token`, `kv="all"`',
    "sequence": "`attn_sequence`",
    "learned_static": "learned static",
}


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    parts = [_demo(path) for path in sorted((ROOT / "benchmarks/results").glob("demo*.json"))]
    parts += [
        _quality(path) for path in sorted((ROOT / "benchmarks/results").glob("quality*.json"))
    ]
    filled = f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}"
    if "--check" in sys.argv:
        if filled != text:
            print("README.md does not agree with benchmarks/results; run benchmarks/fill_readme.py")
        return int(filled != text)
    readme.write_text(filled)
    return 0


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
        f"[{path.name}](benchmarks/results/{path.name})). Extra loss in nats a token:",
        "",
        "| kept (learning rates) | "
        + " | ".join(f"{k:.2f}" for k in KEPT)
        + " | tuned on | seeds |",
        "|---|" + "---|" * (len(KEPT) + 2),
    ]
    for runs in _groups(document["runs"]):
        curves = [_curve(one["routed"][text], measure, base) for one in runs]
        tokens = runs[0]["tuning"]["train_tokens"]
        lines.append(f"| {_name(runs[0])} | {_cells(curves)} | {tokens:,} | {len(curves)} |")
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
    """The setting, and the learning rates of weights and biases."""
    tuning = run["tuning"]
    rates = f"{tuning['learning_rate']:g} / {tuning['bias_learning_rate']:g}"
    return f"{NAMES[run['setting']]}; {rates}"


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
