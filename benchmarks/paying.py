"""The measurement that sets where an attention runs whole (src/router_tuning/execution/paying.py).

Times prefills under random masks: dense, skipping always, and as chosen. Their ratios say from
which part of skipped tokens on leaving them out is faster, and what the choice costs:

    python benchmarks/paying.py --model smollm2-135m --threads 2 \\
        --json benchmarks/results/paying.json
    python benchmarks/paying.py --kv kept --kv-sink 4 --kv-window 16 --lengths 128,256,512,768 \\
        --kept 0.95,0.9,0.8,0.7 --json benchmarks/results/paying-kept-window.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from runs import run_record
from torch import Tensor
from transformers import DynamicCache

from router_tuning import (
    RoutingConfig,
    always_skipping,
    attach,
    dense,
    record,
    replay,
    routing_of,
)
from router_tuning.cli.adapters import load_base
from router_tuning.cli.records import write_json
from router_tuning.memory import blocks_kept
from router_tuning.units import cache_argument, decoder_of, last_columns

WAYS = ("dense", "skipping", "chosen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv", choices=("all", "kept"), default="all")
    parser.add_argument("--kv-sink", type=int, default=0)
    parser.add_argument("--kv-window", type=int, default=0)
    parser.add_argument("--rows", default="1")
    parser.add_argument("--lengths", default="256,512,1024,2048,4096")
    parser.add_argument("--kept", default="0.9,0.8,0.7,0.6,0.5")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_base(options.model, dtype=options.dtype, device=options.device).model
    policy = {"kv": options.kv, "kv_sink": options.kv_sink, "kv_window": options.kv_window}
    attach(model, RoutingConfig(granularity="attn_token", **policy))
    cells = [
        (int(rows), int(length), float(kept))
        for rows in options.rows.split(",")
        for length in options.lengths.split(",")
        for kept in options.kept.split(",")
    ]
    with torch.no_grad(), blocks_kept():
        found = [_cell(model, *cell, options) for cell in track(cells, "Measuring")]
    result = {
        "model": options.model,
        **policy,
        "found": found,
        "run": run_record(options, next(model.parameters()).device, [options.seed]),
    }
    write_json(Path(options.json), result)


def _cell(
    model: Any, rows: int, length: int, kept: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Median seconds of each way, and over dense; and how many attentions ran whole."""
    generator = torch.Generator().manual_seed(options.seed)
    device = next(model.parameters()).device
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=generator).to(device)
    drawn = {
        unit.name: (torch.rand((rows, length), generator=generator) < kept).to(device)
        for unit in routing_of(model).units
    }
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.repeats + 1):
        for way in WAYS:
            took[way].append(_seconds(model, ids, drawn, way))
    with replay(model, drawn), record(model) as trace:
        _prefill(model, ids)
    whole = sum(unit.whole_BT is not None for unit in trace.forwards[0].units.values())
    seconds = {way: statistics.median(times[1:]) for way, times in took.items()}
    over = {way: seconds[way] / seconds["dense"] for way in WAYS[1:]}
    return {
        "rows": rows,
        "tokens": length,
        "kept": kept,
        "seconds": seconds,
        "over_dense": over,
        "ran_whole": whole / len(drawn),
    }


def _seconds(model: Any, ids: Tensor, drawn: dict[str, Tensor], way: str) -> float:
    with ExitStack() as stack:
        if way == "dense":
            stack.enter_context(dense(model))
        else:
            stack.enter_context(replay(model, drawn))
        if way == "skipping":
            stack.enter_context(always_skipping(model))
        start = _now(ids)
        _prefill(model, ids)
        return _now(ids) - start


def _prefill(model: Any, ids: Tensor) -> None:
    decoder: Any = decoder_of(model)
    cache = {cache_argument(decoder): DynamicCache(config=decoder.config)}
    model(input_ids=ids, use_cache=True, logits_to_keep=last_columns(1, ids.device), **cache)


def _now(ids: Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
