"""The table of routers and LoRA, apart, together and in turn, from what `recovery.py` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from places import link, read

from router_tuning.report.tables import fixed

COLUMNS = ("tuned", "seed", "kept", "all tokens", "answers", "better static drop", "seconds")


def recovery(path: Path, root: str) -> str:
    """Loss over the untouched model, and whether a resumed run was the same."""
    document = read(path)
    run, resumed = document["run"], document["resumed"]
    lines = [
        f"**What LoRA wins back** ({link(path, root)}): {run['model']}, attention routed token by "
        f'token with `kv="{run["kv"]}"` to {run["budget"]:g}, LoRA of rank {run["lora_r"]} on '
        f"{', '.join(run['lora_targets'])}, by TRL on the text of {run['train_tokens']:,} tokens "
        f"({run['steps']} steps); extra loss in nats a token over the untouched model, on other "
        "conversations. Static drop is chosen and measured under the same weights, over all "
        f"tokens. Resumed after {resumed['from_step']} steps, {resumed['equal_to_the_bit']} of the "
        f"{resumed['tensors']} trained tensors are equal to the uninterrupted run's to the bit.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    return "\n".join([*lines, *(_row(one) for one in document["runs"])])


def _row(one: dict[str, Any]) -> str:
    dense = one["dense"]
    routed = one["routed"][0] if "routed" in one else {"kept_fraction": 1.0, **one["tuned"]}
    statics = [one[name][0]["loss"] for name in ("static_cosine", "static_greedy") if name in one]
    static = min(statics) - dense["loss"] if statics else None
    losses = [routed[name] - dense[name] for name in ("loss", "answer_loss")]
    cells = [
        one["variant"],
        str(one["seed"]),
        fixed(routed["kept_fraction"], 3),
        *(fixed(x, 3, sign=True) for x in (*losses, static)),
        fixed(one["seconds"], 0),
    ]
    return f"| {' | '.join(cells)} |"
