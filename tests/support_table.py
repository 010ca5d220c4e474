"""Runs the laws over family x granularity x keys x batch x way to generate, and writes the outcome
to docs/families.md. `scripts/support-table` calls it; with names of families only their rows are
run again.

A cell holds what a refusal says, or what holds. A disagreement is no cell: it ends the run.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from laws import LOGIT_TOLERANCE, Batch, Case, batch, difference, randomize, run
from router_tuning import attach, detach, routing_of
from router_tuning.config import GRANULARITIES
from router_tuning.errors import RouterTuningError
from router_tuning.units import decoder_layers, decoder_of, is_found, kind_of
from tiny import FAMILIES, FOUND, PARTLY, tiny_model, token_ids

DOCS = Path(__file__).parents[1] / "docs" / "families.md"
ROWS = (*FAMILIES, *PARTLY, *FOUND)
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "left-padded batch": {},
    "sampling, 2 answers": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static"},
}
"""Ways to generate; each must give what it gives without a cache, or what greedy search does."""
OF_ITS_OWN = ("beams", "sampling, 2 answers", "left-padded batch")
"""Ways that give something else than greedy search on one prompt."""
COLUMNS = ("family", "known by", *GRANULARITIES, *MODES)
KEYS = {"all": ("all", 0, 0), "kept": ("kept", 0, 0), "window": ("kept", 5, 3)}
BATCHES = {"1": batch(rows=1, padded=False), "3, padded": batch()}
CHUNKS = ([20], [7, 1, 6, 6], [12] + [1] * 8)
# Linear attention sums in another order over a cache, so dense models differ by 3e-5 there.
TOLERANCE = {family: 2e-4 for family in (*PARTLY, "olmo_hybrid")}

HEAD = """# Families

Written by `scripts/support-table` from running the laws; do not edit by hand.

A row is a family, at its tiny random model with random routers. A granularity's cell names the keys
(`all`; `kept`; `window`: kept with a sink and a window) under which the laws hold, for one row and
for three padded ones: fresh routers change no bit, skipping equals masking, cached equals uncached
(whole, in chunks, token by token), a row alone equals the row in its batch, and `detach` gives the
model back to the bit. The last columns are ways to generate, with a window of keys where attention
is routed: each gives what it gives without a cache, under every granularity that is served. A
footnote is what the refusal says. A family that is known by its structure stands in no table of
ours, and is tried when routers are attached.
"""


class DisagreementError(AssertionError):
    """Two ways that must agree do not."""


def row_of(family: str) -> dict[str, str]:
    """The cells of a family by column; refusals stand in braces."""
    model = tiny_model(family)
    cells = {"family": family}
    cells["known by"] = "structure" if is_found(decoder_of(model)) else "table"
    for granularity in GRANULARITIES:
        cells[granularity] = _granularity(model, family, granularity)
    served = [g for g in GRANULARITIES if cells[g].startswith("all")]
    for mode in MODES:
        said = {_generation(model, family, g, mode) for g in served}
        cells[mode] = " ".join(sorted(said)) if said else "{no granularity is served}"
    return cells


def _granularity(model: Any, family: str, granularity: str) -> str:
    keys = ("all",) if kind_of(granularity) == "mlp" else tuple(KEYS)
    for key in keys:
        case = Case(family, granularity, *KEYS[key])
        try:
            left_out = _laws(model, case)
        except RouterTuningError as error:
            return _brace(error)
    return ", ".join(keys) + (f" {left_out}" if left_out else "")


def _laws(model: Any, case: Case) -> str:
    """Hold the laws against a case; which layers are left out, and why."""
    before = {name: _bare(model, given) for name, given in BATCHES.items()}
    attach(model, case.config)
    try:
        for name, given in BATCHES.items():
            _agree(f"{case}: fresh", run(model, given).logits, before[name], given, 0.0)
        randomize(model)
        for given in BATCHES.values():
            _laws_of_a_batch(model, case, given)
        units, layers = len(routing_of(model).units), len(decoder_layers(decoder_of(model)))
    finally:
        detach(model)
    for name, given in BATCHES.items():
        _agree(f"{case}: detached", _bare(model, given), before[name], given, 0.0)
    return "" if units == layers else f"in {units} of {layers} layers {_why_not_all(model, case)}"


def _laws_of_a_batch(model: Any, case: Case, given: Batch) -> None:
    whole = run(model, given)
    tolerance = TOLERANCE.get(case.family, LOGIT_TOLERANCE[torch.float32])
    decisions = whole.trace.decisions()
    masked = run(model, given, path="masked", decisions=decisions)
    _agree(f"{case}: masked", masked.logits, whole.logits, given, tolerance)
    for chunks in CHUNKS:
        cached = run(model, given, chunks, decisions=decisions)
        _agree(f"{case}: in {chunks}", cached.logits, whole.logits, given, tolerance)
    for row in range(len(given.ids)):
        alone, real = given.row(row, left=2), given.real[row]
        padded = {
            k: torch.nn.functional.pad(d[row][real], (2, 0))[None] for k, d in decisions.items()
        }
        logits = run(model, alone, decisions=padded).logits[:, 2:]
        apart = float((logits[0] - whole.logits[row][real]).abs().max())
        if not apart <= tolerance:
            raise DisagreementError(f"{case}: row {row} alone is {apart:.1e} apart")


def _why_not_all(model: Any, case: Case) -> str:
    config = case.config
    config.layers = list(range(len(decoder_layers(decoder_of(model)))))
    try:
        attach(model, config)
    except RouterTuningError as error:
        return _brace(error)
    raise DisagreementError(f"{case}: layers are left out that can be routed")


def _agree(what: str, a: Tensor, b: Tensor, given: Batch, tolerance: float) -> None:
    apart = difference(a, b, given.real)
    if not apart <= tolerance:
        raise DisagreementError(f"{what}: {apart:.1e} apart")


def _bare(model: Any, given: Batch) -> Tensor:
    with torch.no_grad():
        return model(
            given.ids, attention_mask=given.mask, position_ids=given.positions, use_cache=False
        ).logits


def _generation(model: Any, family: str, granularity: str, mode: str) -> str:
    """ "yes", or what the refusal says."""
    keys = KEYS["all" if kind_of(granularity) == "mlp" else "window"]
    attach(model, Case(family, granularity, *keys).config)
    randomize(model)
    try:
        got = _text(model, mode, use_cache=True)
        wanted = _text(model, mode if mode in OF_ITS_OWN else "greedy", use_cache=False)
    except (RouterTuningError, ValueError, NotImplementedError) as error:
        return _brace(error)  # some of them are transformers' own
    finally:
        detach(model)
    if not torch.equal(got, wanted):
        raise DisagreementError(f"{family} {granularity}: {mode} gives another text over a cache")
    return "yes"


def _text(model: Any, mode: str, *, use_cache: bool) -> Tensor:
    ids = token_ids(3 if mode == "left-padded batch" else 1, 9, seed=3)
    mask = torch.ones_like(ids)
    for row in range(1, len(ids)):
        mask[row, : 3 * row] = 0
    torch.manual_seed(0)
    length = {"min_new_tokens": 7, "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    text: Tensor = model.generate(
        ids * mask, attention_mask=mask, use_cache=use_cache, **{**length, **MODES[mode]}
    )
    return text


def _brace(error: Exception) -> str:
    """The first sentence of a refusal, without what belongs to one layer or model."""
    said = re.sub(r"layers\.\d+\.\w+ cannot be routed: ", "", str(error))
    said = re.sub(r" \(nor can [^)]*\)| \(layer \d+\)|model_type '\w+' ", "", said)
    return "{" + re.split(r"; |\. |\n", said)[0].rstrip(".") + "}"


def table(rows: dict[str, dict[str, str]]) -> str:
    """The document, with a footnote for each refusal."""
    notes: dict[str, str] = {}

    def cell(text: str) -> str:
        return re.sub(
            r"\{([^{}]*)\}", lambda m: f"[^{notes.setdefault(m[1], str(len(notes) + 1))}]", text
        )

    lines = ["| " + " | ".join(cell(rows[f][c]) for c in COLUMNS) + " |" for f in rows]
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    ends = [f"[^{number}]: {text}." for text, number in notes.items()]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}."
    return "\n".join([HEAD, *head, *lines, "", *ends, "", versions, ""])


def read(text: str) -> dict[str, dict[str, str]]:
    """The rows of a document that `table` wrote."""
    notes = dict(re.findall(r"^\[\^(\d+)\]: (.*)\.$", text, re.MULTILINE))
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    named = (dict(zip(rows[0], row, strict=True)) for row in rows[1:])
    return {
        row["family"]: {
            column: re.sub(r"\[\^(\d+)\]", lambda m: "{" + notes[m[1]] + "}", text)
            for column, text in row.items()
        }
        for row in named
    }


def _rows(wanted: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    before = read(DOCS.read_text(encoding="utf-8")) if wanted else {}
    for family in ROWS:
        if wanted and family not in wanted:
            yield family, before[family]
        else:
            print(family, file=sys.stderr, flush=True)
            yield family, row_of(family)


if __name__ == "__main__":
    unknown = sorted(set(sys.argv[1:]) - set(ROWS))
    if unknown:
        sys.exit(f"no such family: {', '.join(unknown)}; wanted some of {', '.join(ROWS)}")
    new = DOCS.with_suffix(".new")
    new.write_text(table(dict(_rows(sys.argv[1:]))), encoding="utf-8")
    new.replace(DOCS)
