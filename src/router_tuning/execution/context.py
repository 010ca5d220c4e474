"""One object a forward, and the options of a call.

A `ForwardContext` is made at the model's door (door.py) and travels to every attention as a
keyword argument, which hands it to the MLP behind it, so it survives activation checkpointing.
Options of a call (`record`, `replay`, `dense`, ...) live in a context variable while a `with` block
runs. Nothing of either is kept on a module.

Shapes: B batch, T tokens of this forward, C columns (all tokens so far, pads included), D hidden.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from router_tuning.config import RoutingConfig
from router_tuning.errors import BudgetError, ConfigError, UnsupportedCallError
from router_tuning.record import ForwardRecord, Trace
from router_tuning.units import (
    Family,
    Unit,
    decoder_layers,
    decoder_of,
    family_of,
    is_found,
    post_norm_of,
    router_child,
    sequence_kinds,
)

Path = Literal["masked", "skipping"]

RMS_EPSILON = 1e-6

CONTEXT_KEY = "routing_context"
"""The keyword under which a forward's context travels to its attentions."""


@dataclass
class Routing:
    """What is attached to a decoder: the settings of the active adapter and the units they
    route.
    """

    config: RoutingConfig
    units: tuple[Unit, ...]
    num_units_of_kind: int
    input_norms: tuple[str | None, ...]
    """Name of the norm that each layer begins with; None in post-norm families."""
    prices: Mapping[str, float]
    """What an execution of each routed unit weighs in a kept fraction (prices.py)."""
    enabled: bool = True
    adapter: str = ""
    """Name of the active adapter, by which a cache is told from another adapter's."""

    def cached_layers(self, num_layers: int) -> dict[int, bool]:
        """The layers, of those that run, whose keys or decisions a cache has to hold for the units,
        and whether it holds the keys of skipped tokens too.
        """
        config = self.config
        attending = {unit.layer_idx for unit in self.units if unit.kind != "mlp"}
        once = sequence_kinds(config)
        deciding = {unit.memory for unit in self.units if unit.kind in once}
        every = config.kv == "all"
        layers = sorted(index for index in attending | deciding if index < num_layers)
        return {index: every or index not in attending for index in layers}

    def remembers_for_mlps(self) -> bool:
        """Whether a decision of an MLP has to last from one forward to the next."""
        return "mlp" in sequence_kinds(self.config)


@dataclass
class ForwardContext:
    """What one forward's units need to know."""

    routing: Routing
    decoder: nn.Module
    cache: Any
    masked: bool
    """True for the differentiable path, False for the skipping one."""
    start: int
    """Columns in the cache before this forward."""
    real_BT: Tensor
    """False at padding."""
    position_BT: Tensor
    """Index of each token among the real tokens of its sequence."""
    column_T: Tensor
    real_BC: Tensor | None
    """Padding over all columns; None where there is none."""
    sequence_BT: Tensor | None
    """Index of the packed sequence of each token; None where a row is one sequence."""
    host_threshold_B1: Tensor
    """The logit that each row's units need; (B, T) where the texts of a packed row need others."""
    decider: Decider | None
    record: ForwardRecord
    is_read: bool
    """Whether anything asks for the record, which holds tensors of every unit."""
    prompt_BT: Tensor | None = None
    """With pooling="prompt": True at the tokens that decide; None where earlier ones did."""
    weighed_keys: bool = False
    """As in CallOptions."""
    may_run_whole: bool = False
    """Whether units may run for skipped tokens too where that is faster (paying.py)."""
    stand_ins: dict[nn.Module, Any] = field(default_factory=dict)
    """What attends for the attentions inside routed blocks (standing_in.py)."""
    shown: dict[Any, tuple[Any, Tensor, Tensor]] = field(default_factory=dict)
    """Masks that attentions share which run whole (whole.py)."""

    @functools.cached_property
    def config(self) -> RoutingConfig:
        """Of the active adapter."""
        return self.routing.config

    @functools.cached_property
    def family(self) -> Family:
        """Of the decoder."""
        return family_of(self.decoder)

    @functools.cached_property
    def is_found(self) -> bool:
        """Whether the family was found by the decoder's structure, so that nobody has tested it."""
        return is_found(self.decoder)

    @functools.cached_property
    def layers(self) -> list[nn.Module]:
        """The decoder layers that run."""
        return decoder_layers(self.decoder)

    @property
    def rows(self) -> int:
        """B."""
        return self.real_BT.shape[0]

    @functools.cached_property
    def num_real(self) -> int:
        """Real tokens of this forward."""
        return self.real_BT.numel() if self.real_BC is None else int(self.host_real_BT.sum())

    @functools.cached_property
    def threshold_B1(self) -> Tensor:
        """host_threshold_B1 where the units are."""
        return self.host_threshold_B1.to(self.real_BT.device)

    @functools.cached_property
    def thresholds(self) -> list[float]:
        """threshold_B1 as numbers."""
        thresholds: list[float] = self.host_threshold_B1.flatten().tolist()
        return thresholds

    @functools.cached_property
    def nothing_BT(self) -> Tensor:
        """The decision to run no token."""
        return torch.zeros_like(self.real_BT)

    # What units plan with lies on the host: it is brought there once a forward.

    @functools.cached_property
    def host_nothing_BT(self) -> Tensor:
        """nothing_BT on the host."""
        return self.nothing_BT.cpu()

    @functools.cached_property
    def host_real_BC(self) -> Tensor | None:
        """real_BC on the host."""
        return None if self.real_BC is None else self.real_BC.cpu()

    @functools.cached_property
    def host_real_BT(self) -> Tensor:
        """real_BT on the host."""
        real_BC = self.host_real_BC
        if real_BC is not None:
            return real_BC[:, self.start :]
        return torch.ones(self.real_BT.shape, dtype=torch.bool)

    @functools.cached_property
    def host_column_T(self) -> Tensor:
        """column_T on the host."""
        return torch.arange(self.start, self.start + self.real_BT.shape[1])

    @functools.cached_property
    def host_position_BT(self) -> Tensor:
        """position_BT on the host."""
        return self.position_BT.cpu()

    @functools.cached_property
    def host_sequence_BT(self) -> Tensor | None:
        """sequence_BT on the host."""
        return None if self.sequence_BT is None else self.sequence_BT.cpu()

    @functools.cached_property
    def sequence_kinds(self) -> frozenset[str]:
        """The kinds of units that are decided for once a sequence."""
        return sequence_kinds(self.config)

    def post_norm(self, unit: Unit) -> nn.Module | None:
        """The norm after a unit in sandwich families."""
        return post_norm_of(self.decoder, self.layers[unit.layer_idx], unit.kind)

    def read(self, unit: Unit, x_BTD: Tensor) -> Tensor:
        """What a unit's router reads of its input: a block's through the layer's first norm, and a
        raw residual (post-norm families) under an RMS norm without parameters.
        """
        norm = self.routing.input_norms[unit.layer_idx]
        if norm is None:
            scale = x_BTD.float().square().mean(-1, keepdim=True).add(RMS_EPSILON).rsqrt()
            return (x_BTD * scale).to(x_BTD.dtype)
        if unit.kind != "block":
            return x_BTD
        normed: Tensor = getattr(self.layers[unit.layer_idx], norm)(x_BTD)
        return normed

    def router(self, unit: Unit) -> nn.Module:
        """The router beside a unit."""
        return router_beside(self.layers, unit)


class Decider(Protocol):
    """Decides in the routers' place: a replay, a random mask, a static list."""

    def __call__(self, unit: Unit, x_BTD: Tensor, forward: ForwardContext) -> Tensor:
        """True where the unit runs: bool (B, T)."""
        ...


@dataclass(frozen=True)
class CallOptions:
    """What a `with` block asks of the forwards inside it."""

    dense: bool = False
    path: Path | None = None
    decider: Decider | None = None
    trace: Trace | None = None
    lowered: Tensor | None = None
    """By how many logits each row's threshold is lowered (B,), or each token's (B, T)."""
    weighed_keys: bool = False
    """Whether gradients reach a decision through its token's key too (masked path, kv="kept")."""
    may_run_whole: bool = True
    """As in ForwardContext."""
    prompt_end: int | Tensor | None = None
    """The column that the prompts end before, or one a row (B,); None where it is not known."""
    keywords: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of ours that the causal LM was called with."""


_options: contextvars.ContextVar[Mapping[int, CallOptions]] = contextvars.ContextVar(
    "router_tuning_options"
)


def original_method(module: nn.Module, name: str) -> Callable[..., Any]:
    """A method that a module had before routing was installed."""
    before = module.__dict__.get(f"dense_{name}")
    method: Callable[..., Any] = getattr(type(module), name).__get__(module)
    return method if before is None else before


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """The same of `forward`, which every unit asks for in every forward."""
    before: Callable[..., Any] | None = module.__dict__.get("dense_forward")
    return type(module).forward.__get__(module) if before is None else before


def options_for(decoder: nn.Module) -> CallOptions:
    """The options in force for a decoder."""
    return _options.get({}).get(id(decoder), CallOptions())


def routing_of(model: nn.Module) -> Routing:
    """What is attached to a model (PEFT model, causal LM or decoder).

    Raises:
        UnsupportedCallError: nothing is attached.
    """
    decoder = decoder_of(model)
    routing = decoder.__dict__.get("routing")
    if routing is None:
        raise UnsupportedCallError(
            "this model has no routers; attach them with get_peft_model(model, "
            "RouterTuningConfig(...)) "
            "or load an adapter"
        )
    assert isinstance(routing, Routing)
    return routing


def routers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The router beside each routed unit, by the unit's name, in the order of the units."""
    layers = decoder_layers(decoder_of(model))
    return {unit.name: router_beside(layers, unit) for unit in routing_of(model).units}


def router_beside(layers: Sequence[nn.Module], unit: Unit) -> nn.Module:
    """The router beside a unit."""
    router: nn.Module = getattr(layers[unit.layer_idx], router_child(unit.kind))
    return router


@contextmanager
def _with_options(model: nn.Module, **changes: object) -> Iterator[None]:
    key = id(decoder_of(model))
    current = _options.get({})
    changed = replace(current.get(key, CallOptions()), **changes)  # type: ignore[arg-type]
    token = _options.set({**current, key: changed})
    try:
        yield
    finally:
        _options.reset(token)


@contextmanager
def record(model: nn.Module) -> Iterator[Trace]:
    """Collect what the forwards inside the block ran.

    >>> with record(model) as trace:
    ...     model.generate(**inputs)
    >>> trace.kept_fraction()
    """
    routing = routing_of(model)
    names = tuple(unit.name for unit in routing.units)
    trace = Trace(routing.num_units_of_kind, names, prices=routing.prices)
    with _with_options(model, trace=trace):
        yield trace


@contextmanager
def decided_by(model: nn.Module, decider: Decider) -> Iterator[None]:
    """Let something else than the routers decide inside the block.

    A decider may have a method `check(units)`, which is called first and raises if it does not go
    with the model's units.

    Raises:
        ConfigError: the decider does not go with the model, or (from the forward) gives no bool.
    """
    check = getattr(decider, "check", None)
    units = routing_of(model).units
    if check is not None:
        check(units)

    def checked(unit: Unit, x_BTD: Tensor, forward: ForwardContext) -> Tensor:
        keep_BT = decider(unit, x_BTD, forward)
        _check_bool(f"the decision for {unit.name}", keep_BT, tuple(x_BTD.shape[:2]))
        return keep_BT

    with _with_options(model, decider=checked):
        yield


def check_names(what: str, given: Collection[str], units: Sequence[Unit], *, all_of: bool) -> None:
    """Refuse names that are no routed units and, where all of them are wanted, a lack of any."""
    names = [unit.name for unit in units]
    unknown = [name for name in given if name not in names]
    missing = [name for name in names if name not in given] if all_of else []
    if unknown or missing:
        wrong = f"names {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
        raise ConfigError(
            f"{what} {wrong}; wanted {'each' if all_of else 'some'} of the routed units "
            f"{', '.join(names)}"
        )


def _check_bool(what: str, keep: object, shape: tuple[int, ...] | None) -> None:
    """Refuse what is no bool tensor of a shape; None for any of (rows, columns)."""
    if (
        isinstance(keep, Tensor)
        and keep.dtype == torch.bool
        and (keep.ndim == 2 if shape is None else keep.shape == shape)
    ):
        return
    came = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
    raise ConfigError(
        f"{what} must be a torch.bool tensor of shape {shape or '(rows, columns)'}, True where "
        f"the unit runs; got {came}"
    )


@contextmanager
def replay(model: nn.Module, decisions: Mapping[str, Tensor]) -> Iterator[None]:
    """Give recorded decisions (unit name -> bool (B, C), see Trace.decisions) instead of the
    routers'.

    Raises:
        ConfigError: units without decisions, decisions for units that are not routed, or no bools.
    """
    check_names("decisions", decisions, routing_of(model).units, all_of=True)
    for name, keep in decisions.items():
        _check_bool(f"decisions[{name!r}]", keep, None)

    def decider(unit: Unit, x_BTD: Tensor, forward: ForwardContext) -> Tensor:
        end = forward.start + x_BTD.shape[1]
        keep_BC = decisions[unit.name]
        if keep_BC.shape[0] != x_BTD.shape[0] or keep_BC.shape[1] < end:
            raise UnsupportedCallError(
                f"the replayed decisions cover {keep_BC.shape[0]} rows and {keep_BC.shape[1]} "
                "columns, "
                f"but this forward has {x_BTD.shape[0]} rows up to column {end}"
            )
        return keep_BC[:, forward.start : end]

    with decided_by(model, decider):
        yield


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Switch the adapter off inside the block, routers and its own LoRA: the frozen base model, to
    the bit. A budget of 1 keeps everything and leaves the LoRA on.
    """
    with _with_options(model, dense=True):
        yield


def runs_dense(decoder: nn.Module) -> bool:
    """Whether a forward of this decoder is the frozen base model's now."""
    routing: Routing | None = decoder.__dict__.get("routing")
    return options_for(decoder).dense or (routing is not None and not routing.enabled)


def left_out_when_dense(module: nn.Module) -> bool:
    """Whether a module is an adapter's own layer around one of the base model's (lora.py), which
    runs alone in a dense forward.
    """
    return bool(getattr(module, "of_routed_adapter", False))


@contextmanager
def execute(model: nn.Module, path: Path) -> Iterator[None]:
    """Force the path: "masked" computes every unit and hides what is skipped, "skipping" does not
    compute it, not even where that would be faster (paying.py).
    """
    if path not in get_args(Path):
        raise ConfigError(f"path must be one of {', '.join(get_args(Path))}, got {path!r}")
    with _with_options(model, path=path):
        yield


@contextmanager
def always_skipping(model: nn.Module) -> Iterator[None]:
    """Inside the block nothing runs for skipped tokens, not even where that is faster (paying.py):
    what a trace costs is then what its decisions are worth, at any length.
    """
    with _with_options(model, may_run_whole=False):
        yield


@contextmanager
def lowered_thresholds(model: nn.Module, by: Tensor) -> Iterator[None]:
    """Lower each row's threshold by so many logits (B,) inside the block, or each token's (B, T)
    where rows are packed: training at more than one budget.
    """
    with _with_options(model, lowered=by):
        yield


@contextmanager
def weighed_keys(model: nn.Module) -> Iterator[None]:
    """Let gradients reach decisions through the keys of their tokens too, inside the block: on the
    masked path, with kv="kept".
    """
    with _with_options(model, weighed_keys=True):
        yield


@contextmanager
def called_with(model: nn.Module, keywords: Mapping[str, Any]) -> Iterator[None]:
    """Bring our keywords from the causal LM to its decoder, which some families call without."""
    with _with_options(model, keywords=keywords):
        yield


@contextmanager
def prompts_until(model: nn.Module, end: int | Tensor | None) -> Iterator[None]:
    """Tell forwards over an empty cache inside the block the column that prompts end before, one
    for all rows or one a row (B,): pooling="prompt". None tells nothing.
    """
    with _with_options(model, prompt_end=end):
        yield


def open_forward(
    decoder: nn.Module,
    routing: Routing,
    options: CallOptions,
    inputs: Tensor,
    mask: object,
    cache: object,
    position_ids: Tensor | None,
    thresholds: list[float],
    path: Path,
) -> ForwardContext:
    """Read padding, positions and phase from a decoder's arguments; inputs are ids (B, T) or
    embeddings (B, T, D).

    Where `position_ids` start again, a new text of a packed row begins; as in transformers, only
    without a mask.
    """
    batch, length = inputs.shape[:2]
    start = int(cache.get_seq_length()) if cache is not None else 0  # type: ignore[attr-defined]
    real_BC = _padding(mask, batch, start, length, inputs.device)
    column_T = torch.arange(start, start + length, device=inputs.device)
    sequence_BT = None
    if mask is None and position_ids is not None:
        sequence_BT = packed_texts(position_ids.expand(batch, -1))
    real_BT = (
        torch.ones((batch, length), dtype=torch.bool, device=inputs.device)
        if real_BC is None
        else real_BC[:, start:]
    )
    return ForwardContext(
        routing=routing,
        decoder=decoder,
        cache=cache,
        masked=path == "masked",
        start=start,
        real_BT=real_BT,
        position_BT=_positions(real_BC, sequence_BT, column_T, batch),
        column_T=column_T,
        real_BC=real_BC,
        sequence_BT=sequence_BT,
        host_threshold_B1=_threshold_column(thresholds, batch, options.lowered),
        weighed_keys=options.weighed_keys,
        may_run_whole=options.path is None and options.may_run_whole,
        decider=options.decider,
        record=ForwardRecord(start, real_BT, routing.config.kv == "kept", sequence_BT=sequence_BT),
        is_read=options.trace is not None,
    )


def _padding(
    mask: object, batch: int, start: int, length: int, device: torch.device
) -> Tensor | None:
    """The 2-D padding mask over all columns as bool (B, C), or None where nothing is padded."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        kind = f"{mask.ndim}-D" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedCallError(
            f"routing needs the 2-D padding mask (batch, tokens) or none, got a {kind} mask; leave "
            "attention_mask 2-D, as generate() does over any cache (custom masks are not supported "
            "while routing is on)"
        )
    if mask.shape != (batch, start + length):
        raise UnsupportedCallError(
            "attention_mask must cover the cached and the new tokens: wanted "
            f"{(batch, start + length)}, "
            f"got {tuple(mask.shape)}"
        )
    real_BC = mask.to(device=device, dtype=torch.bool)
    return None if bool(real_BC.all()) else real_BC


def packed_texts(position_BT: Tensor) -> Tensor | None:
    """Index of the packed sequence of each token, where position ids start again; None if they
    never do.
    """
    fresh_BT = position_BT.diff(dim=1, prepend=position_BT[:, :1] - 1) != 1
    return fresh_BT.long().cumsum(1) if bool(fresh_BT.any()) else None


def _positions(
    real_BC: Tensor | None, sequence_BT: Tensor | None, column_T: Tensor, batch: int
) -> Tensor:
    if real_BC is not None:
        return (real_BC.long().cumsum(1) - 1).clamp(min=0)[:, column_T]
    if sequence_BT is None:
        return column_T.expand(batch, -1)
    begins_BT = sequence_BT.diff(dim=1, prepend=sequence_BT[:, :1] - 1) != 0
    return column_T - torch.where(begins_BT, column_T, 0).cummax(1).values


def _threshold_column(thresholds: list[float], batch: int, lowered: Tensor | None) -> Tensor:
    if not thresholds or batch % len(thresholds):
        raise BudgetError(
            f"budget must be one number or one a row: got {len(thresholds)} budgets for {batch} "
            "rows"
        )
    # Beams and num_return_sequences repeat the rows of a batch.
    times = batch // len(thresholds)
    column_B1 = torch.tensor([[t] for t in thresholds for _ in range(times)], dtype=torch.float32)
    if lowered is None:
        return column_B1
    return column_B1 - lowered.cpu().view(batch, -1)


def default_path(decoder: nn.Module, routing: Routing) -> Path:
    """Masked where a gradient can be wanted: grad is on, and the model trains or a router can be
    trained.
    """
    if not torch.is_grad_enabled():
        return "skipping"
    layers = decoder_layers(decoder)
    trainable = decoder.training or any(
        p.requires_grad for unit in routing.units for p in router_beside(layers, unit).parameters()
    )
    return "masked" if trainable else "skipping"
