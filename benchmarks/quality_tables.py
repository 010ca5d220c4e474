"""Tables of loss against kept fraction, from the files that `quality.py` writes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from places import RESULTS, link, read

KEPT = (0.9, 0.85, 0.8, 0.75, 0.7)
MEASURES = {"loss": "all tokens", "answer_loss": "answers"}
NAMES = {
    "all": '`attn_token`, `kv="all"`',
    "kept_window": '`attn_token`, `kv="kept"`, sink 4, window 16',
    "kept": '`attn_token`, `kv="kept"`',
    "sequence": "`attn_sequence`",
    "sequence_early": "`attn_sequence`, decided after 8 tokens",
    "learned_static": "learned static",
    "mlp_token": "`mlp_token`",
    "mlp_sequence": "`mlp_sequence`",
    "block_token": '`block_token`, `kv="kept"`, sink 4, window 16',
    "block_sequence": "`block_sequence`",
    "both": "`attn_token` and `mlp_token`, budget in FLOPs",
}
UNITS = {"attention": "", "MLP": "-mlp", "block": "-block", "attention and MLP": "-both"}
"""What is routed, and the end of its result file's name."""
UNITS_KEPT = (0.9, 0.75)
SHARES_AT = (0.9, 0.8)
STATICS = ("cosine", "greedy")
ROUNDING = 1e-9
"""Of a kept fraction: 0.9000000000000001 is 0.9."""
EARLIER_ROWS = 2
"""The default of `warm_start` while it measured the harm of each unit's absence (decision 0005)."""

LATER = {"own_text": 0.0, "adam_beta2": 0.999, "sequence_step": 1.0, "whole_unit_step": 1.0}
"""What older tunings do not name, since it was not there."""

Run = dict[str, Any]
Curve = list[tuple[float, float]]
"""Points (kept fraction, extra loss) in order, the dense model's included."""


def newest(path: Path, root: str) -> str:
    """A table for each text: one recipe of each setting, beside its controls."""
    document = read(path)
    found = newest_of(document["runs"])
    order = sorted(found, key=lambda kind: (list(NAMES).index(kind[0]), *kind[1:]))
    groups = [found[kind] for kind in order]
    return _tables(path, root, document, groups)


def newest_of(runs: list[Run]) -> dict[tuple[str, bool, bool], list[Run]]:
    """The runs of one recipe of each setting, one a seed, without and with text of the model's own,
    and as the mean of several adapters: of the recipes with most seeds, the newest.
    """
    found: dict[tuple[str, bool, bool], list[Run]] = {}
    for group in _groups(runs):
        tuning = group[0]["tuning"]
        if tuning.get("sequence_step", 1) != 1:  # tried, and taken out again
            continue
        which = group[0]["setting"], bool(tuning.get("own_text")), "averaged" in tuning
        if which not in found or _seeds(group) >= _seeds(found[which]):
            found[which] = group
    return found


def _seeds(runs: list[Run]) -> int:
    """How many trainings are behind the runs of a recipe."""
    averaged: int = runs[0]["tuning"].get("averaged", len(runs))
    return averaged


def calibrated(calibration: Path, evaluation: Path, root: str) -> str:
    """What budgets keep of the text they were calibrated on, and of fresh text of its kind."""
    on_held_back = {entry["budget"]: entry for entry in read(calibration)["budgets"]}
    fresh = {row["budget"]: row for row in read(evaluation)["routed"]}
    lines = [
        f"**Budgets on fresh text** ({link(calibration, root)}, {link(evaluation, root)}): the "
        "kept fraction on the rows of calibration, and on others of the same kind:",
        "",
        f"| budget | {' | '.join(f'{budget:.2f}' for budget in fresh)} |",
        "|---|" + "---|" * len(fresh),
    ]
    for name, found in (("calibrated on", on_held_back), ("fresh", fresh)):
        cells = [f"{found[budget]['kept_fraction']:.3f}" for budget in fresh]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def everything(path: Path, root: str) -> str:
    """The same of every recipe that was run."""
    document = read(path)
    return _tables(path, root, document, _groups(document["runs"]))


def granularities(model: str, root: str) -> str:
    """Attentions, MLPs and blocks of a model beside the controls of their kind, one seed."""
    paths = {kind: RESULTS / f"quality-{model}{end}.json" for kind, end in UNITS.items()}
    found = {kind: read(path) for kind, path in paths.items() if path.exists()}
    texts = list(next(iter(found.values()))["dense"])
    columns = [f"{text}, {kept:.2f}" for text in texts for kept in UNITS_KEPT]
    links = ", ".join(link(paths[kind], root) for kind in found)
    lines = [
        f"**{model}, all granularities** (one seed; {links}). Extra loss over all tokens in nats "
        "a token, at the kept fraction of the kind of unit:",
        "",
        f"| unit | what decides | {' | '.join(columns)} | tuned on |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]
    for kind, document in found.items():
        for label, tuned_on, curves in deciders(document, texts):
            cells = [cell([at(curves[text], kept)]) for text in texts for kept in UNITS_KEPT]
            lines.append(f"| {kind} | {label} | {' | '.join(cells)} | {tuned_on} |")
    return "\n".join(lines)


def _tables(path: Path, root: str, document: Run, groups: Sequence[list[Run]]) -> str:
    return "\n\n".join(
        _table(path, root, document, groups, text, measure)
        for text, base in document["dense"].items()
        for measure in MEASURES
        if base[measure] is not None
    )


def _table(
    path: Path, root: str, document: Run, groups: Sequence[list[Run]], text: str, measure: str
) -> str:
    run, base = document["run"], document["dense"][text]
    dropped = statics(document, text, measure)
    shares = " | ".join(f"of static's, {kept:.2f}" for kept in SHARES_AT)
    lines = [
        f"**{run['model']}, {text}, {MEASURES[measure]}** ({base['tokens']} tokens, dense loss "
        f"{base[measure]:.3f}; {run['device']}, {run['dtype']}; {link(path, root)}). Extra loss in "
        "nats a token; the share of the better static control's that it is; tuned on steps x "
        "windows, to a budget:",
        "",
        f"| kept | {' | '.join(f'{k:.2f}' for k in KEPT)} | {shares} | tuned on | seeds |",
        "|---|" + "---|" * (len(KEPT) + len(SHARES_AT) + 2),
    ]
    for runs in groups:
        curves = [curve(one["routed"][text], base, measure) for one in runs]
        cells = [*_cells(curves), *(_share(curves, dropped, kept) for kept in SHARES_AT)]
        lines.append(
            f"| {_name(runs[0])} | {' | '.join(cells)} | {_tuned_on(runs[0])} | {_seeds(runs)} |"
        )
    for kind, points in dropped.items():
        empty = " | -" * (len(SHARES_AT) + 2)
        lines.append(f"| static, {kind} | {' | '.join(_cells([points]))}{empty} |")
    return "\n".join(lines)


def statics(document: Run, text: str, measure: str) -> dict[str, Curve]:
    """The curves of the static controls on a text."""
    dropped = document.get("static", {}).get(text, {})
    base = document["dense"][text]
    return {kind: curve(dropped[kind], base, measure) for kind in STATICS if kind in dropped}


def _groups(runs: list[Run]) -> list[list[Run]]:
    """Runs that differ by their seed alone, the group that was run last at the end."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run["setting"], {**LATER, **run["tuning"]}], sort_keys=True)
        found[key] = [*found.pop(key, []), run]
    return list(found.values())


def deciders(document: Run, texts: list[str]) -> list[tuple[str, str, dict[str, Curve]]]:
    """Label, tuning, and a curve for each text: the last run of each setting, and the controls."""
    dense = document["dense"]
    found = []
    for setting in (n for n in NAMES if n not in ("kept", "learned_static")):
        runs = [
            run
            for run in document["runs"]
            if run["setting"] == setting and not {"averaged", "sequence_step"} & set(run["tuning"])
        ]
        if runs:
            curves = {text: curve(runs[-1]["routed"][text], dense[text]) for text in texts}
            found.append((_name(runs[-1]), _tuned_on(runs[-1]), curves))
    dropped = {text: statics(document, text, "loss") for text in texts}
    for kind in dropped[texts[0]]:
        found.append((f"static, {kind}", "-", {text: dropped[text][kind] for text in texts}))
    if "random" in document:
        # Chance keeps what it is told to, to a thousandth.
        rows = {
            text: [{**row, "kept_fraction": row["rate"]} for row in document["random"][text]]
            for text in texts
        }
        found.append(("random", "-", {text: curve(rows[text], dense[text]) for text in texts}))
    return found


def _name(run: Run) -> str:
    """The setting, the learning rates of weights and biases, and what else is not as usual."""
    tuning = run["tuning"]
    start = "; old start" if tuning.get("warm_start") == EARLIER_ROWS else ""
    rates = f"{tuning['learning_rate']:g} / {tuning['bias_learning_rate']:g}"
    text = tuning.get("lm_weight", 0)
    share = tuning.get("own_text", 0)
    own = f"; own text {share:.0%}" if share else ""
    usual = f"{NAMES[run['setting']]}; {rates}" + (f"; text {text:g}" if text else "")
    if tuning.get("sequence_step", 1) != 1:
        usual += f"; steps x {tuning['sequence_step']:g}"
    if tuning.get("whole_unit_step", 1) != 1:
        usual += f"; greedy start, steps x {tuning['whole_unit_step']:g}"
    mean = f"; mean of {tuning['averaged']} seeds" if "averaged" in tuning else ""
    return usual + own + _unusual(tuning) + mean + start


def _unusual(tuning: dict[str, Any]) -> str:
    """What few recipes differ in."""
    told = (
        ("cooldown_fraction", 0.25, "cooldown"),
        ("adam_beta2", 0.999, "beta2"),
        ("anneal_fraction", 0.3, "anneal"),
    )
    return "".join(
        f"; {label} {tuning[name]:g}"
        for name, usual, label in told
        if tuning.get(name, usual) != usual and tuning.get("warm_start") != EARLIER_ROWS
    )


def _tuned_on(run: Run) -> str:
    """Steps and windows a step, and the budget."""
    tuning = run["tuning"]
    return f"{tuning['steps']} x {tuning['batch_size']}, to {tuning['budget']:g}"


def curve(rows: list[dict[str, Any]], base: dict[str, Any], measure: str = "loss") -> Curve:
    """The curve of a sweep's rows."""
    return sorted([*((r["kept_fraction"], r[measure] - base[measure]) for r in rows), (1.0, 0.0)])


def _cells(curves: list[Curve]) -> list[str]:
    return [cell([at(curve, kept) for curve in curves]) for kept in KEPT]


def cell(values: list[float | None]) -> str:
    """Mean and standard deviation; a dash where a sweep did not reach."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return "-"
    spread = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):+.3f}{spread}"


def _share(curves: list[Curve], dropped: dict[str, Curve], kept: float) -> str:
    """The mean's part of the better static control's extra loss; below nothing is nothing."""
    routed = [v for curve in curves if (v := at(curve, kept)) is not None]
    static = [v for curve in dropped.values() if (v := at(curve, kept)) is not None]
    if len(routed) < len(curves) or not static or min(static) <= 0:
        return "-"
    return f"{max(statistics.mean(routed), 0) / min(static):.0%}"


def at(curve: Curve, kept: float) -> float | None:
    """The extra loss at exactly `kept`, between the two nearest points; None outside them."""
    for (k0, v0), (k1, v1) in pairwise(curve):
        if k0 - ROUNDING <= kept <= k1 + ROUNDING:
            return v0 if k0 == k1 else v0 + (v1 - v0) * (kept - k0) / (k1 - k0)
    return None
