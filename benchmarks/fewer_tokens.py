"""What a model's own MLPs and attentions take for half as many tokens: the saving that calls on
fewer tokens can have, whoever makes them. Writes one JSON:

    python benchmarks/fewer_tokens.py --threads 2 \\
        --json benchmarks/results/fewer-tokens-smollm2-135m.json

Nothing of the library runs here. `possible_saving` is what half of the tokens save, over what half
of the FLOPs would be; `bench` calls the same of a whole routed model its realised saving.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import run_record

from router_tuning.cli.records import write_json
from router_tuning.embedded import load_model
from router_tuning.layer_cost import LayerCost, layer_costs
from router_tuning.memory import blocks_kept
from router_tuning.units import decoder_layers, decoder_of

TOKENS = (256, 512, 1024, 2048, 4096)
Run = Callable[[torch.Tensor], None]
"""Takes hidden states (1, T, D)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="of the Llama family")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = load_model(options.model, dtype=getattr(torch, options.dtype)).to(options.device).eval()
    decoder = decoder_of(model)
    price = layer_costs(decoder)[0]
    units = {"mlp": _mlps(decoder), "attn": _attentions(decoder)}
    seconds = _times(units, decoder, options.repeats)
    found = [
        {"unit": unit, "tokens": tokens, **_halved(took, tokens, _flops(price, unit))}
        for unit, took in seconds.items()
        for tokens in TOKENS
    ]
    result = {
        "model": options.model,
        "found": found,
        "run": run_record(options, next(model.parameters()).device, [0]),
    }
    write_json(Path(options.json), result)


def _mlps(decoder: Any) -> Run:
    """All of them, one after the other: their weights are as cold as in a model that runs."""
    layers: list[Any] = decoder_layers(decoder)

    def run(x_1TD: torch.Tensor) -> None:
        for layer in layers:
            layer.mlp(x_1TD)

    return run


def _attentions(decoder: Any) -> Run:
    layers: list[Any] = decoder_layers(decoder)

    def run(x_1TD: torch.Tensor) -> None:
        rotary = decoder.rotary_emb(x_1TD, torch.arange(x_1TD.shape[1], device=x_1TD.device)[None])
        for layer in layers:
            layer.self_attn(x_1TD, position_embeddings=rotary, attention_mask=None)

    return run


def _flops(price: LayerCost, unit: str) -> Callable[[int], float]:
    """FLOPs of a layer's unit on so many tokens of one causal sequence."""
    if unit == "mlp":
        return lambda tokens: tokens * price.mlp
    linear = price.query + price.key
    return lambda tokens: tokens * linear + tokens * (tokens + 1) / 2 * price.pair


@torch.no_grad()
def _times(units: dict[str, Run], decoder: Any, repeats: int) -> dict[str, dict[int, float]]:
    """Median seconds of all layers, by unit and number of tokens; they take turns."""
    lengths = sorted({*TOKENS, *(tokens // 2 for tokens in TOKENS)})
    weight, size = next(decoder.parameters()), decoder.config.hidden_size
    inputs = {n: torch.randn(1, n, size, dtype=weight.dtype, device=weight.device) for n in lengths}
    took: dict[str, dict[int, list[float]]] = {u: {n: [] for n in lengths} for u in units}
    with blocks_kept():  # as `bench` does
        for _ in range(repeats + 1):
            for unit, run in units.items():
                for tokens in lengths:
                    start = _now()
                    run(inputs[tokens])
                    took[unit][tokens].append(_now() - start)
    return {u: {n: statistics.median(t[1:]) for n, t in of.items()} for u, of in took.items()}


def _halved(took: dict[int, float], tokens: int, flops: Callable[[int], float]) -> dict[str, float]:
    whole, half = took[tokens], took[tokens // 2]
    share = flops(tokens // 2) / flops(tokens)
    return {
        "seconds": whole,
        "seconds_of_half": half,
        "flops_of_half": share,
        "possible_saving": (1 - half / whole) / (1 - share),
    }


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
