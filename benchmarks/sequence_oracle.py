"""What choosing attentions for each sequence could give: the best subset of each window beside the
best one of all windows.

Subsets are found greedily (baselines.greedy_order), each time dropping what the loss grows least
without. "elsewhere" is chosen on other text, as static dropping is; "overall" on all windows of the
report together; "own" on each window alone, which no router could know; "before" on the first half
of each window, with its losses, of which a router sees less. The losses of "overall" and "own" are
of the text that they were chosen on. Those of later halves are fair to "elsewhere" and "before".

Rewrites its JSON after every window; `--continue` goes on where it stopped. Example:

    python benchmarks/sequence_oracle.py --model smollm2-135m --train alpaca_train.jsonl \\
        --report alpaca=alpaca_report.jsonl --report wikitext=wikitext2_valid.txt \\
        --report-windows 8 --static 2,4,5 --json sequence-oracle-smollm2-135m.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from places import shown
from quality import add_options, parsed, read_windows, say, update

from router_tuning import RouterTuningConfig
from router_tuning.baselines import StaticDrop, greedy_order
from router_tuning.cli.records import device_name, versions
from router_tuning.data import Windows
from router_tuning.embedded import load_model, load_tokenizer
from router_tuning.evaluation.perplexity import token_losses
from router_tuning.execution.context import decided_by

CHOSEN = ("elsewhere", "overall", "own", "before")
"""On which text a subset was chosen."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the arguments ask for; None takes those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--static-of", default="attn_token", help="granularity of what is dropped")
    options = parsed(parser, arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    path = Path(options.json)
    if not options.resume:
        path.unlink(missing_ok=True)
    _, held, report = read_windows(options, load_tokenizer(options.model), needed=1)
    base = load_model(options.model, dtype=torch.float32).requires_grad_(False)
    model = get_peft_model(base, RouterTuningConfig(granularity=options.static_of)).eval()
    update(path, lambda document: _describe(document, options, model))
    most = max(options.static)
    few = held.take(range(min(options.greedy_windows, len(held))))
    for name, windows in report.items():
        orders = {"elsewhere": greedy_order(model, few, most)}
        orders["overall"] = greedy_order(model, windows, most)
        document = update(path, partial(_begin, text=name, orders=orders))
        for index in range(len(document["texts"][name]), len(windows)):
            row = _window(model, windows.take([index]), orders, options.static)
            say(f"{name} {index}", row)
            update(path, partial(_add, text=name, row=row))


def _describe(document: dict[str, Any], options: argparse.Namespace, model: Any) -> None:
    """Who runs what on what."""
    before = document.get("run", {})
    command = shlex.join(["python", *map(shown, sys.argv)])
    document["run"] = {
        "commands": [*before.get("commands", []), command],
        "model": shown(options.model),
        "units": options.static_of,
        "dropped": options.static,
        "greedy_windows": options.greedy_windows,
        "dtype": "float32",
        "device": device_name(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    document.pop("runs", None)
    document.setdefault("texts", {})


def _begin(document: dict[str, Any], text: str, orders: dict[str, list[str]]) -> None:
    document.setdefault("orders", {})[text] = orders
    document["texts"].setdefault(text, [])


def _add(document: dict[str, Any], text: str, row: dict[str, Any]) -> None:
    document["texts"][text].append(row)


def _window(
    model: Any, window: Windows, orders: dict[str, list[str]], numbers: list[int]
) -> dict[str, Any]:
    """Losses of one window, whole and of its later half, without each subset."""
    length = window.ids.shape[1]
    first = Windows(window.ids[:, : length // 2], window.answer[:, : length // 2])
    orders = {
        **orders,
        "own": greedy_order(model, window, max(numbers)),
        "before": greedy_order(model, first, max(numbers)),
    }
    return {
        "dense": _losses(model, window, []),
        "orders": {name: orders[name] for name in ("own", "before")},
        **{
            chosen: [_losses(model, window, orders[chosen][:number]) for number in numbers]
            for chosen in CHOSEN
        },
    }


def _losses(model: Any, window: Windows, dropped: list[str]) -> dict[str, float]:
    """In nats a token."""
    with torch.no_grad(), decided_by(model, StaticDrop(dropped)):
        loss_L = token_losses(model, window.ids, {})[0]
    later = window.ids.shape[1] // 2
    return {"loss": float(loss_L.mean()), "later_loss": float(loss_L[later - 1 :].mean())}


if __name__ == "__main__":
    main()
