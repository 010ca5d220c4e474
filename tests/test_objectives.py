"""The chunked losses equal the plain ones, in value and gradient, and stay small."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from router_tuning.errors import TrainingError, UnsupportedModelError
from router_tuning.training.objectives import distill_loss, head_of, lm_loss, shifted_targets
from router_tuning.units import decoder_of
from tiny import VOCAB_SIZE, tiny_model, token_ids

ROWS = 3  # positions a chunk: 16 positions are five chunks and one position
CHUNK = ROWS * VOCAB_SIZE * 4


@pytest.fixture(params=["llama", "gemma3", "capped"])
def causal(request: pytest.FixtureRequest) -> nn.Module:
    """A frozen model: plain head, tied head, and tied head under a soft cap."""
    fields = {"final_logit_softcapping": 3.0} if request.param == "capped" else {}
    name = "gemma3" if request.param == "capped" else request.param
    return tiny_model(name, **fields).requires_grad_(False)


def hidden(seed: int = 0, positions: int = 16) -> Tensor:
    return torch.randn((positions, 32), generator=torch.Generator().manual_seed(seed))


def test_head_gives_the_models_own_logits(causal: nn.Module) -> None:
    ids = token_ids()
    last = decoder_of(causal)(ids).last_hidden_state
    assert torch.equal(head_of(causal)(last), causal(ids).logits)


def test_distill_loss_is_the_mean_kl_with_its_gradient(causal: nn.Module) -> None:
    head, teacher = head_of(causal), hidden(1)
    chunked, plain = (hidden(0).requires_grad_() for _ in range(2))
    loss = distill_loss(chunked, teacher, head, chunk_bytes=CHUNK)
    p, q = head(teacher).softmax(-1), head(plain).softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    (loss * 3).backward()
    (expected * 3).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chunked.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_the_texts_own_cross_entropy_can_be_added(causal: nn.Module) -> None:
    head, teacher = head_of(causal), hidden(1)
    student, plain = (hidden(0).requires_grad_() for _ in range(2))
    targets = token_ids(1, 16)[0].clone()
    targets[5] = -100  # a position that predicts nothing
    both = distill_loss(student, teacher, head, target_N=targets, lm_weight=0.3, chunk_bytes=CHUNK)
    known = targets != -100
    entropy = nn.functional.cross_entropy(head(plain[known]), targets[known], reduction="sum")
    expected = distill_loss(plain, teacher, head) + 0.3 * entropy / 16
    both.backward()
    expected.backward()
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_a_student_like_its_teacher_has_no_loss(causal: nn.Module) -> None:
    student = hidden().requires_grad_()
    loss = distill_loss(student, student.detach(), head_of(causal))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


def test_lm_loss_is_the_models_own(causal: nn.Module) -> None:
    ids = token_ids(3, 10)
    labels = ids.clone()
    labels[0, :4] = labels[2, 7:] = -100
    last = decoder_of(causal)(ids).last_hidden_state
    vectors, targets = shifted_targets(last, labels)
    loss = lm_loss(vectors, targets, head_of(causal), chunk_bytes=CHUNK) / len(targets)
    torch.testing.assert_close(loss, causal(ids, labels=labels).loss, rtol=1e-5, atol=1e-5)


def test_lm_loss_has_the_gradient_of_cross_entropy(causal: nn.Module) -> None:
    head, targets = head_of(causal), token_ids(1, 16)[0]
    chunked, plain = (hidden().requires_grad_() for _ in range(2))
    lm_loss(chunked, targets, head, chunk_bytes=CHUNK).backward()
    nn.functional.cross_entropy(head(plain), targets, reduction="sum").backward()
    torch.testing.assert_close(chunked.grad, plain.grad, rtol=1e-4, atol=1e-5)


def test_no_call_of_the_head_exceeds_the_chunk(model: nn.Module) -> None:
    head, seen = head_of(model.requires_grad_(False)), []

    def counting(x: Tensor) -> Tensor:
        seen.append(len(x))
        return head(x)

    distill_loss(hidden().requires_grad_(), hidden(1), counting, chunk_bytes=CHUNK).backward()
    assert max(seen) == ROWS
    assert sum(seen) == 1 + 2 * 16  # one row to learn the vocabulary, then student and teacher


def test_without_grad_only_the_value_is_worked_out(model: nn.Module) -> None:
    head = head_of(model.requires_grad_(False))
    with torch.no_grad():
        quiet = distill_loss(hidden(), hidden(1), head, chunk_bytes=CHUNK)
    assert not quiet.requires_grad
    assert torch.equal(
        quiet, distill_loss(hidden().requires_grad_(), hidden(1), head, chunk_bytes=CHUNK)
    )


def test_bf16_gradients_do_not_underflow(model: nn.Module) -> None:
    model = model.requires_grad_(False).bfloat16()
    student = hidden().bfloat16().requires_grad_()
    loss = distill_loss(student, hidden(1).bfloat16(), head_of(model), chunk_bytes=CHUNK)
    (loss * 1e-6).backward()  # as a loss divided among very many positions
    assert loss.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16
    assert student.grad.abs().min() > 0


@pytest.mark.parametrize("loss", [distill_loss, lm_loss])
def test_no_position_is_a_loss_of_zero(loss: object, model: nn.Module) -> None:
    nothing = hidden(positions=0).requires_grad_()
    targets = nothing.detach() if loss is distill_loss else torch.empty(0, dtype=torch.long)
    value = partial(loss, nothing, targets, head_of(model.requires_grad_(False)))()  # type: ignore[arg-type]
    value.backward()
    assert value.item() == 0


def test_a_trainable_head_is_refused(model: nn.Module) -> None:
    with pytest.raises(TrainingError, match="output embedding has trainable parameters"):
        head_of(model)


def test_a_model_without_head_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        head_of(decoder_of(model))
