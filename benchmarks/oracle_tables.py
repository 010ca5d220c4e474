"""The table of subsets chosen for each sequence, from the file that `sequence_oracle.py` writes."""

from __future__ import annotations

import statistics
from pathlib import Path

from places import link, read

LABELS = {
    "elsewhere": "other text (static dropping)",
    "overall": "all these windows together",
    "before": "the first half of each window",
    "own": "each window itself",
}
PARTS = {"loss": "whole", "later_loss": "later half"}


def oracle(path: Path, root: str) -> str:
    """Mean extra loss over the dense model without subsets of each origin, with standard errors."""
    document = read(path)
    run = document["run"]
    texts, dropped = document["texts"], run["dropped"]
    columns = [f"{part}, {number} dropped" for part in PARTS.values() for number in dropped]
    lines = [
        f"**What a choice for each sequence could give** ({link(path, root)}): {run['model']}, "
        f"`{run['units'].partition('_')[0]}` of whole windows dropped, the subset chosen greedily "
        "by the loss of what the second column names; mean extra loss in nats a token over the "
        "dense model, and its standard error over windows. A subset chosen on the very text that "
        "it is measured on fits that text's chance too; the later halves of the first and third "
        "rows are free of that.",
        "",
        f"| text | chosen on | {' | '.join(columns)} |",
        "|---|---|" + "---|" * len(columns),
    ]
    for text, windows in texts.items():
        for chosen, label in LABELS.items():
            cells = [
                _cell([one[chosen][i][part] - one["dense"][part] for one in windows])
                for part in PARTS
                for i in range(len(dropped))
            ]
            lines.append(f"| {text}, {len(windows)} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(extra: list[float]) -> str:
    error = statistics.stdev(extra) / len(extra) ** 0.5 if len(extra) > 1 else 0.0
    return f"{statistics.mean(extra):+.3f} ± {error:.3f}"
