"""The measurements that set how a row attends (src/router_tuning/execution/rows.py).

Times ways to compute the same attention against each other, on one device, and writes one JSON:

    python benchmarks/attention_choices.py --threads 1 \\
        --json benchmarks/results/attention-choices.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from runs import run_record
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from router_tuning.cli.records import write_json
from router_tuning.execution import rows
from router_tuning.execution.window import tells_sums

HEADS, KEY_HEADS, WIDTH = 9, 3, 64
"""Of SmolLM2-135M."""
Ways = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    made = {"device": torch.device(options.device), "dtype": getattr(torch, options.dtype)}
    found = []
    for tokens in (512, 2048, 4096):
        for name, ways in (
            ("every second token asks, all are keys", _some_of(tokens, 0.5, made)),
            ("four tokens of five ask, all are keys", _some_of(tokens, 0.8, made)),
            (
                "three tokens of four ask, of kv_sink=4 and kv_window=16",
                _windowed(tokens, 0.75, made),
            ),
            ("nine tokens of ten ask, of kv_sink=4 and kv_window=16", _windowed(tokens, 0.9, made)),
            ("one query of one row", _one_query(1, tokens, made)),
            ("one query of four rows out of eight", _one_query(8, tokens, made)),
        ):
            found.append({"what": name, "keys": tokens, "seconds": _times(ways, options.repeats)})
            print(found[-1], flush=True)
    result = {
        "heads": HEADS,
        "key_heads": KEY_HEADS,
        "width": WIDTH,
        "found": found,
        "run": run_record(options, made["device"], [0]),
    }
    write_json(Path(options.json), result)


def _some_of(tokens: int, share: float, made: dict[str, Any]) -> Ways:
    """kv="all": queries of the kept tokens over all keys, beside dense and the compacted form."""
    query, key, value = (torch.randn(1, h, tokens, WIDTH, **made) for h in _HEADS)
    column_L = (torch.arange(0, tokens * share) / share).long()
    kept = query[:, :, column_L].contiguous()
    short = key[:, :, : len(column_L)], value[:, :, : len(column_L)]
    column_K = torch.arange(tokens)

    def blocks(size: int) -> Tensor:
        parts, begin = [], 0
        for some in column_L.split(size):
            end = int(some[-1]) + 1
            mask = (some[:, None] >= column_K[:end])[None, None].to(key.device)
            asking = kept[:, :, begin : begin + len(some)]
            begin += len(some)
            parts.append(sdpa(asking, key[:, :, :end], value[:, :, :end], mask, enable_gqa=True))
        return torch.cat(parts, dim=2)

    whole = (column_L[:, None] >= column_K)[None, None].to(key.device)
    return {
        "dense, causal": lambda: sdpa(query, key, value, is_causal=True, enable_gqa=True),
        "kept keys only, causal": lambda: sdpa(kept, *short, is_causal=True, enable_gqa=True),
        "one masked call": lambda: sdpa(kept, key, value, whole, enable_gqa=True),
        **{f"blocks of {n}": partial(blocks, n) for n in (16, 32, 64, 128, 256)},
    }


def _windowed(tokens: int, share: float, made: dict[str, Any]) -> Ways:
    """kv="kept" with a window: in blocks under masks, or apart; beside dense and the kept keys."""
    query, key, value = (torch.randn(1, h, tokens, WIDTH, **made) for h in _HEADS)
    keep_T = torch.rand(tokens) < share
    column_L = keep_T.nonzero()[:, 0]
    kept, *some = (x[:, :, keep_T.to(x.device)] for x in (query, key, value))
    lasting_T = keep_T | (torch.arange(tokens) < 4)
    keys, reach = rows.RowKeys(key, value, torch.arange(tokens), lasting_T), rows.Reach(16, None)

    def read(many: int) -> Tensor:
        with mock.patch.object(rows, "MANY", many):
            return rows.attend(rows.Kernel(None, None, {}), kept, column_L, keys, reach)

    ways = {
        "dense, causal": lambda: sdpa(query, key, value, is_causal=True, enable_gqa=True),
        "kept keys only, causal": lambda: sdpa(
            kept, some[0], some[1], is_causal=True, enable_gqa=True
        ),
        "blocks under masks": lambda: read(tokens),
    }
    if tells_sums(kept, key, value):
        ways["lasting keys and the window's apart"] = lambda: read(1)
    return ways


def _one_query(number: int, tokens: int, made: dict[str, Any]) -> Ways:
    """Decoding: every second row asks."""
    query, key, value = (torch.randn(number, h, tokens, WIDTH, **made) for h in _HEADS)
    query = query[:, :, :1].contiguous()
    asking = list(range(0, number, 2))
    index = torch.tensor(asking, device=key.device)
    mask = torch.ones(number, 1, 1, tokens, dtype=torch.bool, device=key.device)

    def grouped(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None = None) -> Tensor:
        return sdpa(q.view(len(q), KEY_HEADS, HEADS // KEY_HEADS, WIDTH), k, v, m)

    def loop(of: Callable[..., Tensor]) -> list[Tensor]:
        return [of(query[r : r + 1], key[r : r + 1], value[r : r + 1]) for r in asking]

    return {
        "loop on views, groups as rows": lambda: loop(grouped),
        "loop on views, enable_gqa": lambda: loop(partial(sdpa, enable_gqa=True)),
        "gathered rows, groups as rows": lambda: grouped(query[index], key[index], value[index]),
        "all rows under a mask, groups as rows": lambda: grouped(query, key, value, mask),
        "all rows, enable_gqa": lambda: sdpa(query, key, value, enable_gqa=True),
    }


_HEADS = (HEADS, KEY_HEADS, KEY_HEADS)


def _times(ways: Ways, repeats: int) -> dict[str, float]:
    """Median seconds of each way; they take turns."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = _now()
            way()
            took[name].append(_now() - start)
    return {name: statistics.median(times[1:]) for name, times in took.items()}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
