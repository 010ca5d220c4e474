"""Losses from last hidden states, a chunk of positions at a time.

Two thousand positions of a 262k vocabulary are 2 GB of fp32 logits, and a softmax needs several
such tensors. Here a chunk's logits live only while its loss, and the gradient to its hidden states,
are worked out: the output embedding is frozen, so the backward pass needs nothing else. Knows
nothing of routers or budgets.

Shapes: B batch, T tokens, N chosen positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from router_tuning.errors import TrainingError, UnsupportedModelError
from router_tuning.units import decoder_of, unwrap

Head = Callable[[Tensor], Tensor]
"""Last hidden states (N, D) -> logits (N, V)."""

CHUNK_BYTES = 64 * 2**20
"""Most bytes that the fp32 logits of a chunk take. Larger chunks were no faster on a CPU."""

IGNORED = -100
"""The label of a position without a loss, as everywhere in transformers."""


def head_of(model: nn.Module) -> Head:
    """What a causal LM does from last hidden state to logits: output embedding, scale, soft cap.

    Raises:
        UnsupportedModelError: the model has no output embedding.
        TrainingError: the output embedding trains, but gradients reach the hidden states only.
    """
    causal = unwrap(model)
    get = getattr(causal, "get_output_embeddings", None)
    embedding = get() if callable(get) else None
    if not isinstance(embedding, nn.Module):
        raise UnsupportedModelError(
            "training needs a causal language model with an output embedding, got "
            f"{type(causal).__name__}; load it with AutoModelForCausalLM"
        )
    if any(p.requires_grad for p in embedding.parameters()):
        raise TrainingError(
            "the output embedding has trainable parameters, but only routers are trained; freeze "
            "the base model (get_peft_model does) or call model.requires_grad_(False) before "
            "attaching the routers"
        )
    config = decoder_of(model).config
    # Granite divides its logits, Cohere multiplies them.
    scale = float(getattr(config, "logit_scale", None) or 1)
    scale /= float(getattr(config, "logits_scaling", None) or 1)
    cap: float | None = getattr(config, "final_logit_softcapping", None)
    embed = _gathered(embedding)
    if not cap:
        return embed if scale == 1 else lambda hidden_ND: embed(hidden_ND) * scale
    return lambda hidden_ND: torch.tanh(embed(hidden_ND) * scale / cap) * cap


def _gathered(embedding: nn.Module) -> Head:
    """The output embedding as a function, of its whole weights where FSDP2 has sharded them.

    A loss is worked out outside the model's forward, where nothing gathers them; and a call of an
    embedding that is a shard of its own would end FSDP's backward pass with the gradients that the
    loss takes in its forward pass.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return embedding
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    sharded = any(isinstance(p, DTensor) for p in embedding.parameters())
    if not sharded and not isinstance(embedding, FSDPModule):
        return embedding
    weights: dict[str, Tensor] = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in embedding.named_parameters()
    }
    return lambda hidden_ND: functional.linear(hidden_ND, weights["weight"], weights.get("bias"))


@dataclass
class Predictions:
    """What can be said of the predictions of labelled tokens, summed while their logits are there;
    one rank's.
    """

    entropy: Tensor | float = 0.0
    """Of the predicted distributions, in nats."""
    correct: Tensor | float = 0.0
    """How often the token was the likeliest."""
    number: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, logits_nV: Tensor, target_n: Tensor) -> None:
        """Take in the predictions of some tokens, IGNORED ones among them."""
        labelled_n = target_n != IGNORED
        logits_nV, target_n = logits_nV[labelled_n], target_n[labelled_n]
        self.entropy += torch.special.entr(logits_nV.softmax(-1)).sum()
        self.correct += (logits_nV.argmax(-1) == target_n).sum()
        self.number += len(target_n)


def distill_loss(
    student_ND: Tensor,
    teacher_ND: Tensor,
    head: Head,
    *,
    target_N: Tensor | None = None,
    lm_weight: float = 0.0,
    predictions: Predictions | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Mean KL(teacher || student) over the positions in nats; gradient to the student only.

    With `target_N` (the next tokens, -100 for none) the cross entropy to them is added,
    `lm_weight` times. `predictions` takes in what the student says of them.
    """

    def kl(hidden_nD: Tensor, start: int) -> Tensor:
        some = slice(start, start + len(hidden_nD))
        target_n = None if target_N is None else target_N[some]
        with torch.no_grad():
            teacher_nV = head(teacher_ND[some])
        student_nV = head(hidden_nD)
        if predictions is not None and target_n is not None:
            predictions.add(student_nV.float(), target_n)
        loss: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
            student_nV, teacher_nV, target_n if lm_weight else None, lm_weight
        )
        return loss

    return _sum_over_chunks(student_ND, kl, head, chunk_bytes) / max(len(student_ND), 1)


def lm_loss(
    hidden_ND: Tensor,
    target_N: Tensor,
    head: Head,
    *,
    predictions: Predictions | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Sum of the cross entropies to the target tokens, in nats."""

    def cross_entropy(hidden_nD: Tensor, start: int) -> Tensor:
        logits_nV = head(hidden_nD).float()
        target_n = target_N[start : start + len(hidden_nD)]
        if predictions is not None:
            predictions.add(logits_nV, target_n)
        return functional.cross_entropy(logits_nV, target_n, reduction="sum")

    return _sum_over_chunks(hidden_ND, cross_entropy, head, chunk_bytes)


def sampled_loss(
    hidden_ND: Tensor, head: Head, generator: torch.Generator, *, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Sum of the cross entropies to tokens drawn from the model itself, in nats.

    The expected square of its derivative by anything is that thing's Fisher information.
    """

    def cross_entropy(hidden_nD: Tensor, start: int) -> Tensor:
        logits_nV = head(hidden_nD).float()
        with torch.no_grad():
            # The least of exponential waits is drawn with probability proportional to its rate.
            waits_nV = torch.empty_like(logits_nV).exponential_(generator=generator)
            drawn_n = (logits_nV.softmax(-1) / waits_nV).argmax(-1)
        return functional.cross_entropy(logits_nV, drawn_n, reduction="sum")

    return _sum_over_chunks(hidden_ND, cross_entropy, head, chunk_bytes)


def shifted_targets(hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states that predict a labelled token, and those tokens: (N, D), (N,)."""
    predicts_BT = labels_BT[:, 1:] != IGNORED
    return hidden_BTD[:, :-1][predicts_BT], labels_BT[:, 1:][predicts_BT]


def next_tokens(labels_BT: Tensor) -> Tensor:
    """The token that each position predicts, IGNORED at the last: (B, T)."""
    return functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


ChunkLoss = Callable[[Tensor, int], Tensor]
"""(hidden states of a chunk, its first position) -> the sum of its losses."""


def _sum_over_chunks(
    hidden_ND: Tensor, chunk_loss: ChunkLoss, head: Head, chunk_bytes: int
) -> Tensor:
    if not len(hidden_ND):
        return hidden_ND.float().sum()  # 0, and still part of the graph
    with torch.no_grad():
        vocabulary = head(hidden_ND[:1]).shape[-1]
    rows = max(chunk_bytes // (4 * vocabulary), 1)
    total: Tensor = _ChunkedSum.apply(hidden_ND, chunk_loss, rows)  # type: ignore[no-untyped-call]
    return total


class _Divergence(torch.autograd.Function):
    """KL(teacher || student) of logits (n, V), and `lm_weight` times the cross entropy to the
    targets, summed. Its derivative by the student's logits is what is predicted less what should
    be: worked out here in place, since autograd goes over (n, V) many times more for it.
    """

    @staticmethod
    def forward(
        ctx: Any, student_nV: Tensor, teacher_nV: Tensor, target_n: Tensor | None, lm_weight: float
    ) -> Tensor:
        predicted_nV = student_nV.float().log_softmax(-1)
        teacher_nV = teacher_nV.float().log_softmax(-1)
        wanted_nV = teacher_nV.exp()
        total = teacher_nV.sub_(predicted_nV).mul_(wanted_nV).sum()
        if target_n is not None:
            total += lm_weight * functional.nll_loss(predicted_nV, target_n, reduction="sum")
        if ctx.needs_input_grad[0]:
            grad_nV = predicted_nV.exp_()
            if target_n is not None:
                labelled_n = target_n != IGNORED
                grad_nV *= 1 + lm_weight * labelled_n.unsqueeze(-1)
                grad_nV[labelled_n, target_n[labelled_n]] -= lm_weight
            ctx.grad_nV = grad_nV.sub_(wanted_nV).to(student_nV.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.grad_nV * grad_outputs[0], None, None, None


class _ChunkedSum(torch.autograd.Function):
    """Works out the gradient along with the loss; backward only scales it."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, chunk_loss: ChunkLoss, rows: int) -> Tensor:
        wants_grad = ctx.needs_input_grad[0]
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_ND = torch.empty_like(hidden_ND) if wants_grad else None
        for start in range(0, len(hidden_ND), rows):
            part_nD = hidden_ND[start : start + rows].detach()
            with torch.set_grad_enabled(wants_grad):
                loss = chunk_loss(part_nD.requires_grad_(wants_grad), start)
            total += loss.detach()
            if grad_ND is not None:
                (grad_ND[start : start + rows],) = torch.autograd.grad(loss, part_nD)
        ctx.grad_ND = grad_ND
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        # The gradient of the sum is of order one, so a bf16 copy of it loses nothing to underflow.
        return ctx.grad_ND * grad_outputs[0], None, None
