"""What the law tests share: routed tiny models with random routers, batches, ways to run them,
comparisons.

A comparison has two parts. Outputs are compared under replayed decisions, to LOGIT_TOLERANCE of the
dtype. Decisions are compared apart: they may differ only where a logit lies within DELTA of its
threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from router_tuning import RoutingConfig, attach, execute, record, replay, routing_of
from router_tuning.execution.context import routers_of
from router_tuning.record import Trace, same_decisions
from router_tuning.units import decoder_layers, decoder_of, family_of
from tiny import CACHE_KEY, FAMILIES, tiny_model, token_ids

LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.25}
"""Largest difference of two correct logits of the tiny models (of size about 3) in a dtype."""
DELTA = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.1}
"""Router logits (of size about 1) this near to their threshold may fall either way."""
EFFECT = 0.5
"""Skipping moves the tiny models' logits by at least this, so that the comparisons prove
something.
"""

SLIDING = 6
DECIDE_AFTER = 3
CHUNKS: dict[str, list[int]] = {
    "prefill": [20],
    "chunked": [7, 1, 6, 6],
    "decode": [12] + [1] * 8,
}
"""Phases, by the lengths of the forwards that a batch of 20 columns is fed in."""


def over(cache: Any) -> dict[str, Any]:
    """The argument that gives a call its cache."""
    return {CACHE_KEY: cache}


@dataclass(frozen=True)
class Case:
    """A cell of the matrix family x granularity x key/value policy."""

    family: str = "llama"
    granularity: str = "attn_token"
    """One name, or several with a plus between them."""
    kv: str = "kept"
    sink: int = 0
    window: int = 0

    def __str__(self) -> str:
        policy = self.kv + (f"-sink{self.sink}-window{self.window}" if self.window else "")
        return f"{self.family}-{self.granularity}-{policy}"

    @property
    def config(self) -> RoutingConfig:
        return RoutingConfig(
            granularity=self.granularity.split("+"),
            kv=self.kv,
            kv_sink=self.sink,
            kv_window=self.window,
            decide_after=DECIDE_AFTER,
        )


# The sink is longer than the always-run prefix, else sequence granularities would not notice it.
POLICIES = ({"kv": "all"}, {"kv": "kept"}, {"kv": "kept", "sink": 5, "window": 3})
SEVERAL = ("attn_token+mlp_token", "attn_sequence+mlp_token", "attn_token+mlp_sequence")
REPRESENTATIVES = ("llama", "gemma3", "gpt_neox", "olmo2", "deepseek_v3", "mixtral", "falcon")
"""One family of each build: known parts, sandwich, parallel, post-norm, latent, experts, tuples."""
FIRST_FIVE = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
"""The families that most people run: they are in every law."""


def _cases(family: str) -> Iterator[Case]:
    for granularity in ("attn_token", "attn_sequence", "block_token", "block_sequence"):
        for policy in POLICIES:
            yield Case(family, granularity, **policy)  # type: ignore[arg-type]
    yield Case(family, "mlp_token", "all")
    yield Case(family, "mlp_sequence", "all")
    if family in REPRESENTATIVES:
        yield from (Case(family, granularity, "kept", 5, 3) for granularity in SEVERAL)


CASES = [case for family in FAMILIES for case in _cases(family)]
"""The whole matrix, for the central laws."""
SOME_CASES = [case for case in CASES if case.family in REPRESENTATIVES]
"""For what is special or slow."""
MORE_CASES = [case for case in CASES if case.family in {*REPRESENTATIVES, *FIRST_FIVE}]
"""For what is special, and a law by itself."""


def bare_model(family: str, **options: Any) -> PreTrainedModel:
    """A tiny model of the family, sliding where the family can slide."""
    sliding = {"sliding_window": SLIDING} if family in ("mistral", "gemma3") else {}
    return tiny_model(family, **{**sliding, **options})


def routed_model(case: Case = Case(), *, router_seed: int = 1, **options: Any) -> PreTrainedModel:
    """A tiny model with random routers that keep about half, each row differently."""
    model = bare_model(case.family, **options)
    attach(model, case.config)
    randomize(model, router_seed)
    return model


def randomize(model: nn.Module, seed: int = 1, scale: float = 1.0) -> None:
    """Give the linear routers random weights; logits are then about normal, with a mean near
    zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for unit in routing_of(model).units:
        score: Any = routers_of(model)[unit.name].score
        width = score.in_features
        score.weight.data = torch.randn((1, width), generator=generator) * scale * width**-0.5
        score.bias.data.fill_(0.0)


def calibrate_by_hand(model: nn.Module) -> None:
    """Let budget 0.1 stand for the threshold 1 and 0.9 for -1, so that budgets between them can be
    asked.
    """
    routing_of(model).config.calibration = [
        {"budget": 0.1, "threshold": 1.0},
        {"budget": 0.9, "threshold": -1.0},
    ]


@dataclass(frozen=True)
class Batch:
    """Token ids with their padding and the positions that the padding gives."""

    ids: Tensor
    mask: Tensor

    @property
    def positions(self) -> Tensor:
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    @property
    def real(self) -> Tensor:
        return self.mask.bool()

    def row(self, index: int, left: int = 0, right: int = 0) -> Batch:
        """One row alone, its padding replaced by this much on either side."""
        ids = self.ids[index][self.real[index]]
        pad = torch.nn.functional.pad
        return Batch(pad(ids, (left, right))[None], pad(torch.ones_like(ids), (left, right))[None])

    def take(self, rows: Sequence[int]) -> Batch:
        return Batch(self.ids[rows], self.mask[rows])


def batch(rows: int = 3, length: int = 20, *, padded: bool = True, seed: int = 0) -> Batch:
    """Random tokens; the first row is padded on the left, the second on the right."""
    ids = token_ids(rows, length, seed=seed)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
        mask[1, -5:] = 0
    return Batch(ids * mask, mask)


@dataclass(frozen=True)
class Run:
    """What came of running a batch."""

    logits: Tensor
    trace: Trace
    cache: Any = None


def run(
    model: nn.Module,
    given: Batch,
    chunks: Sequence[int] | None = None,
    *,
    decisions: dict[str, Tensor] | None = None,
    path: str | None = None,
    cache: Any = None,
    **options: Any,
) -> Run:
    """Logits and trace of a batch: in one forward without a cache, or chunk by chunk over one
    cache.
    """
    replayed = nullcontext() if decisions is None else replay(model, decisions)
    forced: Any = nullcontext() if path is None else execute(model, path)  # type: ignore[arg-type]
    with torch.no_grad(), replayed, forced, record(model) as trace:
        if chunks is None:
            logits = forward(model, given, 0, given.ids.shape[1], use_cache=False, **options)
            return Run(logits, trace)
        config: Any = model.config
        cache = DynamicCache(config=config) if cache is None else cache
        parts, start = [], cache.get_seq_length()
        for length in chunks:
            parts.append(
                forward(
                    model, given, start, start + length, **over(cache), use_cache=True, **options
                )
            )
            start += length
        assert start == given.ids.shape[1]
        return Run(torch.cat(parts, dim=1), trace, cache)


def forward(model: nn.Module, given: Batch, start: int, end: int, **options: Any) -> Tensor:
    """Logits of some columns of a batch."""
    logits: Tensor = model(
        input_ids=given.ids[:, start:end],
        attention_mask=given.mask[:, :end],
        position_ids=given.positions[:, start:end],
        **options,
    ).logits
    return logits


def difference(a: Tensor, b: Tensor, real: Tensor) -> float:
    """Largest difference of two runs' logits at real tokens."""
    return float((a - b)[real].abs().max())


def assert_close(a: Run, b: Run, real: Tensor) -> None:
    """Same logits at real tokens, to the tolerance of the dtype."""
    tolerance = LOGIT_TOLERANCE[a.logits.dtype]
    assert not a.logits[real].isnan().any()
    assert difference(a.logits, b.logits, real) < tolerance


def assert_same_decisions(a: Run, b: Run) -> None:
    """Same decisions, but for logits within DELTA of their threshold; the flips are named when it
    fails.
    """
    same, flips = same_decisions(a.trace, b.trace, DELTA[a.logits.dtype])
    assert same, f"decisions differ beyond delta; {flips} more lie within it"
    # A flip in an early layer moves later logits by more than rounding, so it would fail above.
    # There is none.
    assert flips == 0, f"{flips} decisions lie within delta of their threshold: take another seed"


def assert_mixed(trace: Trace) -> None:
    """Routers keep some and skip some, and no two rows decide alike."""
    decisions = torch.stack(list(trace.decisions().values()))
    assert 0.25 < trace.kept_fraction() < 0.85
    rows = decisions.unbind(1)
    assert all(not torch.equal(rows[0], other) for other in rows[1:])


OUTPUTS = ("o_proj", "dense", "c_proj")
"""Names of output projections."""
EXPANDING = "kv_b_proj"
"""What makes keys and values of latent ones."""


class Counter:
    """Counts the token rows that enter each linear layer of the decoder layers (and its experts),
    and the FLOPs that they make, while it is in force.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rows: dict[tuple[int, str], int] = {}
        self.flops: dict[tuple[int, str], int] = {}
        self._hooks = []
        for index, layer in enumerate(decoder_layers(decoder_of(model))):
            for name, module in layer.named_modules():
                weights = [p for p in module.parameters(recurse=False) if p.ndim > 1]
                if weights and "skip_router" not in name:
                    self.rows[index, name] = self.flops[index, name] = 0
                    hook = module.register_forward_pre_hook(self._counting(index, name, weights))
                    self._hooks.append(hook)

    def _counting(self, index: int, name: str, weights: list[Tensor]) -> Any:
        experts = [weight for weight in weights if weight.ndim == 3]

        def count(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0][..., 0].numel()
            self.rows[index, name] += rows
            if experts:  # called with the tokens, and with the experts that each goes through
                through = args[1].numel()
                each = sum(weight.numel() // weight.shape[0] for weight in experts)
                self.flops[index, name] += 2 * through * each
            else:
                self.flops[index, name] += 2 * rows * sum(w.numel() for w in weights)

        return count

    def entered(self, index: int, role: str) -> list[int]:
        """The rows that entered each linear layer of a role: "key" (what makes keys), "query" (what
        only an attending token needs), "expand" (what runs on all keys), "mlp".
        """
        return [n for (i, name), n in self.rows.items() if i == index and self.role(name) == role]

    def role(self, name: str) -> str:
        """The role of a linear layer by its name in the decoder layer."""
        family = family_of(decoder_of(self.model))
        last = name.rpartition(".")[2]
        if not name.startswith(family.modules["attn"] + "."):
            return "mlp"
        if last == EXPANDING:
            return "expand"
        made = last in ("k_proj", "v_proj") if family.parts else last not in OUTPUTS
        return "key" if made else "query"

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()


def held_columns(case: Case, keep: Tensor, real: Tensor, sliding: int | None) -> list[set[int]]:
    """The columns whose keys the policy names after all columns have gone by, row by row, the
    obvious way.
    """
    rows = []
    for keep_C, real_C in zip(keep.tolist(), real.tolist(), strict=True):
        seen, position, columns = len(real_C), -1, set()
        for column in range(seen):
            if not real_C[column]:
                continue
            position += 1
            named = keep_C[column] or position < case.sink or column > seen - case.window
            if named and (sliding is None or column > seen - sliding):
                columns.add(column)
        rows.append(columns)
    return rows


def pairs_by_hand(case: Case, keep: Tensor, real: Tensor, sliding: int | None) -> int:
    """Pairs of an asking query and a key it sees, one by one."""
    total = 0
    for keep_C, real_C in zip(keep.tolist(), real.tolist(), strict=True):
        position = [sum(real_C[: c + 1]) - 1 for c in range(len(real_C))]
        for query in range(len(keep_C)):
            if not keep_C[query]:
                continue
            for key in range(query + 1):
                near = query - key < max(case.window, 1)
                sink = position[key] < case.sink
                seen = case.kv == "all" or keep_C[key] or sink or near
                if real_C[key] and seen and (sliding is None or key > query - sliding):
                    total += 1
    return total


def bytes_in(layer: Any) -> int:
    """Bytes of the keys and values that a cache layer holds for the policy."""
    store = getattr(layer, "store", None)
    if store is None:
        return layer.keys.nbytes + layer.values.nbytes
    key, value, _ = store.view()
    return store.held() * sum(x[:1, :, :1].nbytes for x in (key, value))


def with_family(family: str) -> Case:
    """Kept keys with sink and window, token by token: the case that exercises most."""
    return replace(Case(sink=5, window=3), family=family)
