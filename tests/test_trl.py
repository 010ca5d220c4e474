"""TRL's trainers train routers: our losses from chunks of logits, packed texts as if each were
alone, DPO beside the budget.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, PrinterCallback

pytest.importorskip("trl")

from datasets import Dataset

import router_tuning
from router_tuning import RouterDPOConfig, RouterDPOTrainer, RouterSFTConfig, RouterSFTTrainer
from router_tuning.data import evaluation_mode
from router_tuning.errors import ConfigError, UnsupportedCallError
from router_tuning.execution.context import dense, execute, lowered_thresholds, record, replay
from router_tuning.peft_config import RouterTuningConfig
from router_tuning.training import objectives
from router_tuning.training.arguments import RouterTrainingArguments
from router_tuning.training.trainer import RouterTrainerMixin
from router_tuning.units import decoder_layers, decoder_of
from tiny import CHAT_TEMPLATE, SENTENCES, VOCAB_SIZE, tiny_model, token_ids

EXAMPLES = Path(__file__).parents[1] / "examples"
LENGTHS = (11, 14, 8, 13, 9, 12)
QUIET = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "logging_steps": 1}
SMALL = {  # a short training with large steps, all texts at one threshold
    "max_steps": 4,
    "per_device_train_batch_size": 3,
    "warm_start": 0,
    "anneal_fraction": 0.25,
    "learning_rate": 1e-2,
    "threshold_range": 0.0,
    "lm_weight": 0.0,
    "save_strategy": "no",
}
PACKED = {"packing": True, "max_length": 32}
PADDING_FREE = {"padding_free": True, "max_length": None}
every_objective = pytest.mark.parametrize("objective", ["distill", "lm"])


def texts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Dataset:
    """Tokenized texts; the first tokens of every second have no label."""
    rows = []
    for number, length in enumerate(lengths):
        ids = token_ids(1, length, seed=seed + number)[0].tolist()
        unlabelled = 3 * (number % 2)
        rows.append({"input_ids": ids, "labels": [-100] * unlabelled + ids[unlabelled:]})
    return Dataset.from_list(rows)


def pairs() -> Dataset:
    rows = [{"prompt": "Say it", "chosen": f" {a}", "rejected": f" {b}"} for a, b in PAIRS]
    return Dataset.from_list(rows)


PAIRS = [(a[:20], b[: 12 + i]) for i, (a, b) in enumerate(pairwise(SENTENCES * 2))]


def routed(family: str = "llama", **config: Any) -> PeftModel:
    """A PEFT model with fresh routers."""
    return get_peft_model(tiny_model(family), config_of(**config))


def config_of(**config: Any) -> RouterTuningConfig:
    return RouterTuningConfig(**{"budget": 0.7, "decide_after": 4, **config})


def awake(model: Any, seed: int = 0) -> Any:
    """Give the routers weights, so that they keep some tokens and skip others."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * (0.3 if parameter.numel() > 1 else 0.1)
    return model


class SFTInOrder(RouterSFTTrainer):
    """Takes the rows in their order, epoch by epoch."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class DPOInOrder(RouterDPOTrainer):
    """Takes the pairs in their order, epoch by epoch."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


@pytest.fixture
def sft(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., RouterSFTTrainer]:
    """A quiet trainer of a model on tokenized texts, or on a data set."""

    def make(model: Any, data: Dataset | None = None, **fields: Any) -> RouterSFTTrainer:
        names = ("peft_config", "eval_dataset", "processing_class")
        given = {n: fields.pop(n) for n in names if n in fields}
        given.setdefault("processing_class", copy.deepcopy(tokenizer))
        args = RouterSFTConfig(str(tmp_path), **{**QUIET, **SMALL, **fields})
        data = texts() if data is None else data
        trainer = SFTInOrder(model, args, train_dataset=data, **given)
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


@pytest.fixture
def dpo(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., RouterDPOTrainer]:
    """A quiet trainer of a model on pairs of answers."""

    def make(model: Any, **fields: Any) -> RouterDPOTrainer:
        given = {n: fields.pop(n) for n in ("peft_config", "eval_dataset") if n in fields}
        args = RouterDPOConfig(str(tmp_path), **{**QUIET, **SMALL, **fields})
        trainer = DPOInOrder(
            model,
            args=args,
            train_dataset=pairs(),
            processing_class=copy.deepcopy(tokenizer),
            **given,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


def logged(trainer: Any, *names: str) -> list[tuple[float, ...]]:
    """The named values of each training log."""
    return [tuple(x[n] for n in names) for x in trainer.state.log_history if "task_loss" in x]


def first_batch(trainer: Any, number: int = 0) -> dict[str, Any]:
    """A batch of the training data, as the trainer collates it."""
    batches = [dict(batch) for batch in trainer.get_train_dataloader()]
    return batches[number]


def loss_and_gradients(
    trainer: Any, batch: dict[str, Any], step: int = 3
) -> tuple[float, dict[str, Tensor]]:
    """One loss in the middle of a training, and its gradients."""
    model = trainer.routed
    trainer.state.max_steps, trainer.state.global_step = 4, step
    model.train()
    model.zero_grad()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.any() for gradient in found.values())
    return loss.item(), found


def assert_same(one: tuple[float, Any], other: tuple[float, Any]) -> None:
    assert other[0] == pytest.approx(one[0], rel=1e-5)
    assert one[1].keys() == other[1].keys() != set()
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, rtol=1e-3, atol=1e-6)


def labelled_logits(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The logits that predict labelled tokens, and these tokens."""
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return logits[labels != -100], labels[labels != -100]


# ---- supervised fine-tuning ----


@every_objective
@pytest.mark.parametrize("rows", [{}, PACKED, PADDING_FREE], ids=["padded", "packed", "flat"])
def test_sft_moves_routers_and_nothing_else(
    rows: dict[str, Any], objective: str, sft: Callable[..., RouterSFTTrainer]
) -> None:
    trainer = sft(
        tiny_model(),
        peft_config=config_of(granularity=["attn_token", "mlp_sequence"], decide_after=4),
        objective=objective,
        warm_start=2,
        threshold_range=2.0,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1 if rows is PACKED else 3,
        **rows,
    )
    before = {n: p.detach().clone() for n, p in trainer.routed.named_parameters()}
    trainer.train()
    after = dict(trainer.routed.named_parameters())
    moved = {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "skip_router" in n}
    for loss, task, budget, kept, target in logged(
        trainer, "loss", "task_loss", "budget_loss", "kept", "target"
    ):
        assert loss == pytest.approx(task + budget, abs=1e-4)
        assert 0 < kept <= 1
        assert target == pytest.approx(1.0 if loss == logged(trainer, "loss")[0][0] else 0.7)


@pytest.mark.parametrize("rows", [{}, PADDING_FREE], ids=["padded", "flat"])
@every_objective
def test_no_logits_of_all_positions_are_made(
    objective: str,
    rows: dict[str, Any],
    sft: Callable[..., RouterSFTTrainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for loss in (objectives.lm_loss, objectives.distill_loss):
        monkeypatch.setitem(loss.__kwdefaults__, "chunk_bytes", 4 * VOCAB_SIZE * 5)
    data = texts((40, 40, 40))
    trainer = sft(awake(routed()), data, objective=objective, eval_dataset=data, **rows)
    trainer._head_checked = False
    with Widest() as seen:
        loss_and_gradients(trainer, first_batch(trainer))
        trainer.evaluate()
    assert 5 <= rows_of(seen.shape) < 40, seen.shape


class Widest(TorchDispatchMode):
    """Notes the shape with the most rows of those that are as wide as logits."""

    shape: tuple[int, ...] = (0, VOCAB_SIZE)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for made in output if isinstance(output, tuple | list) else [output]:
            if isinstance(made, Tensor) and made.ndim > 1 and self.as_logits(made):
                self.shape = max(self.shape, tuple(made.shape), key=rows_of)
        return output

    @staticmethod
    def as_logits(made: Tensor) -> bool:
        """As wide as the vocabulary, or as the tiles of TRL's fused head, and no view of the output
        embedding.
        """
        return made.shape[-1] in (VOCAB_SIZE, 32768) and made.shape[-2:] != (32, VOCAB_SIZE)


def rows_of(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


def test_held_out_metrics_are_those_of_the_routed_model(
    sft: Callable[..., RouterSFTTrainer],
) -> None:
    model, data = awake(routed()), texts(seed=50)
    trainer = sft(model, objective="lm", eval_dataset=data, per_device_eval_batch_size=6)
    metrics = trainer.evaluate()
    (batch,) = trainer.get_eval_dataloader()
    with record(model) as trace:
        logits, targets = labelled_logits(model, batch)
    probability = logits.softmax(-1)
    entropy = -(probability * probability.log()).sum(-1).mean().item()
    assert metrics["eval_loss"] == pytest.approx(functional.cross_entropy(logits, targets).item())
    assert metrics["eval_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(
        (logits.argmax(-1) == targets).float().mean().item()
    )
    assert metrics["eval_kept"] == pytest.approx(trace.kept_fraction())
    assert 0.2 < metrics["eval_kept"] < 0.9


def test_distilling_logs_what_the_routed_model_predicts(
    sft: Callable[..., RouterSFTTrainer],
) -> None:
    model = awake(routed())
    metrics = [
        sft(model, objective=o, eval_dataset=texts(seed=50)).evaluate() for o in ("lm", "distill")
    ]
    assert metrics[0]["eval_loss"] != pytest.approx(metrics[1]["eval_loss"])
    for name in ("eval_entropy", "eval_mean_token_accuracy", "eval_kept"):
        assert metrics[1][name] == pytest.approx(metrics[0][name])


GENERATION = CHAT_TEMPLATE.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)


@pytest.mark.parametrize("form", ["completion", "assistant"])
def test_prompts_have_no_loss(
    form: str, sft: Callable[..., RouterSFTTrainer], tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = GENERATION
    if form == "completion":
        rows = [{"prompt": "What?", "completion": f" {s[:9]}"} for s in SENTENCES]
    else:
        said = [("user", "What?"), ("assistant", "This.")]
        rows = [{"messages": [{"role": r, "content": c} for r, c in said]}] * 5
    trainer = sft(
        awake(routed()),
        Dataset.from_list(rows),
        processing_class=tokenizer,
        objective="lm",
        assistant_only_loss=form == "assistant",
        budget_weight=0.0,
    )
    batch = first_batch(trainer)
    prompts = batch["labels"] == -100
    assert prompts[:, :3].all()
    learned = tokenizer.decode(batch["labels"][0][~prompts[0]]).strip()
    assert learned.startswith("This." if form == "assistant" else SENTENCES[0][:9])
    logits, targets = labelled_logits(trainer.routed, batch)
    loss, _ = loss_and_gradients(trainer, batch)
    assert loss == pytest.approx(functional.cross_entropy(logits, targets).item(), rel=1e-5)


@every_objective
def test_sft_with_checkpointing_equals_sft_without(
    objective: str, sft: Callable[..., RouterSFTTrainer]
) -> None:
    plain, saving = (
        sft(awake(routed()), objective=objective, gradient_checkpointing=on, **PACKED)
        for on in (False, True)
    )
    plain.train()
    saving.train()
    assert all(x.gradient_checkpointing for x in decoder_layers(decoder_of(saving.routed)))  # type: ignore[attr-defined]
    for expected, got in zip(
        logged(plain, "loss", "kept"), logged(saving, "loss", "kept"), strict=True
    ):
        assert got == pytest.approx(expected, rel=1e-4)


def test_sft_resumes_where_it_was(sft: Callable[..., RouterSFTTrainer]) -> None:
    fields = {**PACKED, "save_strategy": "steps", "save_steps": 2, "threshold_range": 2.0}
    fields = {**fields, "per_device_train_batch_size": 1}
    whole = sft(awake(routed()), **fields)
    whole.train()
    folder = Path(str(whole.args.output_dir)) / "checkpoint-2"
    assert "router-tuning" in (folder / "README.md").read_text()
    resumed = sft(routed(), **fields)
    resumed.train(resume_from_checkpoint=str(folder))
    assert logged(resumed, "loss", "kept")[-2:] == logged(whole, "loss", "kept")[2:]


def test_taking_the_routers_off_takes_the_fused_head_off(
    sft: Callable[..., RouterSFTTrainer],
) -> None:
    base = tiny_model()
    trainer = sft(base, peft_config=config_of())
    assert "forward" in base.__dict__
    assert trainer.model.unload() is base  # type: ignore[union-attr, operator]
    assert "forward" not in base.__dict__


# ---- losses of TRL's own ----


def test_dft_is_left_to_trl(sft: Callable[..., RouterSFTTrainer]) -> None:
    trainer = sft(awake(routed()), objective="lm", loss_type="dft", budget_weight=0.0)
    batch = first_batch(trainer)
    logits, targets = labelled_logits(trainer.routed, batch)
    loss, _ = loss_and_gradients(trainer, batch)
    entropy = functional.cross_entropy(logits, targets, reduction="none")
    assert loss == pytest.approx((entropy * (-entropy).exp()).mean().item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
def test_the_budget_counts_the_forward_that_trains(sft: Callable[..., RouterSFTTrainer]) -> None:
    """TRL smooths labels over full logits, and runs the model again for its metrics."""

    def found(budget_weight: float) -> dict[str, Tensor]:
        trainer = sft(
            awake(routed()),
            objective="lm",
            label_smoothing_factor=0.1,
            budget_weight=budget_weight,
        )
        return loss_and_gradients(trainer, first_batch(trainer))[1]

    without, with_budget = found(0.0), found(20.0)
    assert all(not torch.allclose(with_budget[n], without[n]) for n in without)


def test_experts_have_no_loss_of_their_own(sft: Callable[..., RouterSFTTrainer]) -> None:
    """Who picks them is frozen, and logits of all experts are not asked for."""
    trainer = sft(routed("mixtral"))
    assert not trainer.routed.config.output_router_logits  # type: ignore[union-attr]
    trainer.train()
    for objective in ("distill", "lm"):
        with pytest.raises(ConfigError, match=r"router_aux_loss_coef=0\.01 weighs"):
            sft(routed("mixtral"), objective=objective, router_aux_loss_coef=0.01)


# ---- packed texts ----


PADDED_EQUALS_FLAT = [
    {"granularity": "attn_token", "kv": "kept"},
    {"granularity": "attn_token", "kv": "all"},
    {"granularity": "attn_token", "kv": "kept", "kv_sink": 2, "kv_window": 3},
    {"granularity": "attn_sequence", "kv": "kept"},
    {"granularity": "block_token"},
    {"granularity": ["attn_token", "mlp_sequence"]},
]


@every_objective
@pytest.mark.parametrize("config", PADDED_EQUALS_FLAT, ids=str)
def test_packed_texts_train_as_rows_do(
    config: dict[str, Any], objective: str, sft: Callable[..., RouterSFTTrainer]
) -> None:
    """Loss, kept fraction and gradients; every second text at a lowered threshold."""
    found, kept = [], []
    for rows in ({}, PADDING_FREE):
        trainer = sft(
            awake(routed(**config)),
            objective=objective,
            lm_weight=0.1,
            threshold_range=2.0,
            per_device_train_batch_size=6,
            **rows,
        )
        batch = first_batch(trainer)
        assert batch["input_ids"].shape[0] == (1 if rows else 6)
        found.append(loss_and_gradients(trainer, batch))
        kept.append(trainer._sums["kept"])
    assert_same(*found)
    assert 0.2 < kept[0] < 0.95
    assert kept[1] == pytest.approx(kept[0])


@every_objective
def test_bins_train_as_rows_do(objective: str, sft: Callable[..., RouterSFTTrainer]) -> None:
    """Packing puts texts into bins in another order."""
    padded = sft(awake(routed()), objective=objective, per_device_train_batch_size=6)
    packed = sft(awake(routed()), objective=objective, per_device_train_batch_size=6, **PACKED)
    assert 1 < len(packed.train_dataset) < 6  # type: ignore[arg-type]
    batch = first_batch(packed)
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    assert_same(loss_and_gradients(padded, first_batch(padded)), loss_and_gradients(packed, batch))


@every_objective
@pytest.mark.parametrize("path", ["masked", "skipping"])
def test_replayed_decisions_give_packed_texts_the_loss_of_rows(
    path: Any, objective: str, sft: Callable[..., RouterSFTTrainer]
) -> None:
    model = awake(routed())
    padded = sft(model, objective=objective, per_device_train_batch_size=6)
    rows = first_batch(padded)
    flat = first_batch(
        sft(model, objective=objective, per_device_train_batch_size=6, **PADDING_FREE)
    )
    real = rows["attention_mask"].bool()
    keep = {f"layers.{i}.attn": torch.rand(real.shape) < 0.6 for i in range(4)}
    packed = {name: decided[real][None] for name, decided in keep.items()}
    losses = []
    for batch, decisions in ((rows, keep), (flat, packed)):
        with (
            torch.no_grad(),
            execute(model, path),
            replay(model, decisions),
            evaluation_mode(model),
        ):
            losses.append(padded.compute_loss(model, dict(batch)).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    with torch.no_grad(), record(model) as alone:
        model(rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False)
    with torch.no_grad(), record(model) as together:
        model(flat["input_ids"], position_ids=flat["position_ids"], use_cache=False)
    for name, decided in alone.decisions().items():
        assert torch.equal(decided[real], together.decisions()[name][0])


def test_every_second_packed_text_learns_a_larger_budget(
    sft: Callable[..., RouterSFTTrainer],
) -> None:
    trainer = sft(
        awake(routed()), threshold_range=2.0, per_device_train_batch_size=6, **PADDING_FREE
    )
    lowered = trainer._lowered(first_batch(trainer))
    assert lowered.shape == (1, sum(LENGTHS))
    for number, part_T in enumerate(lowered[0].split(LENGTHS)):
        assert len(part_T.unique()) == 1
        assert (0 < part_T[0] <= 2) if number % 2 else part_T[0] == 0
    two_rows = {"input_ids": torch.zeros(2, 5), "position_ids": torch.tensor([[0, 1, 0, 1, 2]] * 2)}
    assert trainer.texts_of(two_rows).tolist() == [[0, 0, 1, 1, 1], [2, 2, 3, 3, 3]]


def test_training_starts_from_texts_and_not_from_bins(
    sft: Callable[..., RouterSFTTrainer],
) -> None:
    trainer = sft(routed(), **PACKED)
    bins = [row["seq_lengths"] for row in trainer.train_dataset]
    found = [batch["input_ids"].shape for batch in trainer._first_rows(4)]
    assert found == [(1, length) for lengths in bins for length in lengths][:4]
    assert sft(routed(), **PADDING_FREE)._first_rows(1)[0]["input_ids"].shape == (1, LENGTHS[0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_lets_packed_texts_see_each_other_is_refused(
    attention: str, sft: Callable[..., RouterSFTTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of transformers' do not look at positions when they make a mask."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    base = tiny_model(attn_implementation=attention)
    trainer = sft(get_peft_model(base, config_of()), **PADDING_FREE)
    with pytest.raises(UnsupportedCallError, match="lets each see the one before"):
        trainer.train()


@pytest.mark.parametrize(
    ("fields", "config", "words"),
    [
        ({**PADDING_FREE, "pad_to_multiple_of": 8}, {}, "pad_to_multiple_of=8 adds padding"),
        ({"eval_packing": True}, {}, "pack both, or neither"),
        (
            PACKED,
            {"granularity": "attn_sequence", "pooling": "prompt"},
            "takes one text a row; use packing=False",
        ),
        ({"loss_type": "dft"}, {}, 'use objective="lm"'),
    ],
    ids=["padding", "eval_packing", "prompt", "dft"],
)
def test_what_does_not_go_together_is_refused(
    fields: dict[str, Any],
    config: dict[str, Any],
    words: str,
    sft: Callable[..., RouterSFTTrainer],
) -> None:
    with pytest.raises(ConfigError, match=words):
        sft(routed(**config), **fields)


def test_arguments_of_another_trainer_are_refused(tmp_path: Path) -> None:
    args = RouterTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ConfigError, match="must be RouterSFTConfig, got RouterTrainingArguments"):
        RouterSFTTrainer(routed(), args, train_dataset=texts())
    with pytest.raises(ConfigError, match="objective must be one of dpo, got 'lm'"):
        RouterDPOConfig(str(tmp_path), objective="lm")


def test_defaults_are_those_of_a_router_training(tmp_path: Path) -> None:
    ours = RouterTrainingArguments(str(tmp_path), use_cpu=True)
    for arguments in (RouterSFTConfig, RouterDPOConfig):
        args = arguments(str(tmp_path), use_cpu=True)
        for name in ("learning_rate", "bf16", "gradient_checkpointing", "logging_steps"):
            assert getattr(args, name) == getattr(ours, name)


# ---- preferences ----


def answers_logps(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The log probability of each answer: (2P,)."""
    with torch.no_grad(), evaluation_mode(model):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (logps * batch["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
@pytest.mark.parametrize("given", ["model", "adapter"])
def test_dpo_moves_routers_and_nothing_else(
    given: str, granularity: str, dpo: Callable[..., RouterDPOTrainer]
) -> None:
    config = config_of(granularity=granularity)
    model = tiny_model() if given == "model" else awake(get_peft_model(tiny_model(), config))
    trainer = dpo(
        model,
        peft_config=config if given == "model" else None,
        warm_start=2,
        gradient_accumulation_steps=2,
        threshold_range=2.0,
        eval_dataset=pairs(),
    )
    before = {n: p.detach().clone() for n, p in trainer.routed.named_parameters()}
    assert list(trainer.routed.peft_config) == ["default"]  # type: ignore[union-attr, arg-type]
    trainer.train()
    after = dict(trainer.routed.named_parameters())
    moved = {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "skip_router" in n}
    for loss, task, budget, kept in logged(trainer, "loss", "task_loss", "budget_loss", "kept"):
        assert loss == pytest.approx(task + budget, abs=1e-4)
        assert 0 < kept <= 1
    assert 0 < trainer.evaluate()["eval_kept"] <= 1


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj"]}], ids=["", "lora"])
@pytest.mark.parametrize("precomputed", [False, True])
def test_the_reference_is_the_model_with_the_adapter_off(
    precomputed: bool, lora: dict[str, Any] | None, dpo: Callable[..., RouterDPOTrainer]
) -> None:
    model = awake(routed(lora=lora))
    trainer = dpo(model, precompute_ref_log_probs=precomputed, budget_weight=0.0)
    batch = first_batch(trainer)
    loss, _ = loss_and_gradients(trainer, batch)
    with dense(model):
        reference = answers_logps(model, batch)
    chosen, rejected = (answers_logps(model, batch) - reference).chunk(2)
    assert loss == pytest.approx(
        -functional.logsigmoid(0.1 * (chosen - rejected)).mean().item(), rel=1e-4
    )
    assert abs(chosen - rejected).max() > 0.1


def test_both_answers_of_a_pair_count_and_decide_alike(
    dpo: Callable[..., RouterDPOTrainer],
) -> None:
    model = awake(routed())
    trainer = dpo(model, threshold_range=2.0)
    batch = first_batch(trainer)
    lowered = trainer._lowered(batch)
    chosen, rejected = lowered.chunk(2)
    assert torch.equal(chosen, rejected)
    assert [bool(x) for x in chosen] == [False, True, False]
    loss_and_gradients(trainer, batch)
    counted = {n: x[[0, 2, 3, 5]] for n, x in batch.items()}
    with torch.no_grad(), record(model) as trace:
        model(counted["input_ids"], attention_mask=counted["attention_mask"], use_cache=False)
    assert trainer._sums["kept"] == pytest.approx(trace.kept_fraction())
    with torch.no_grad(), record(model) as trace, lowered_thresholds(model, lowered):
        model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    assert trainer._sums["kept"] != pytest.approx(trace.kept_fraction())


def test_dpo_meets_its_budget(dpo: Callable[..., RouterDPOTrainer]) -> None:
    trainer = dpo(routed(), max_steps=60, per_device_train_batch_size=9)
    trainer.train()
    kept = [k for (k,) in logged(trainer, "kept")]
    assert kept[0] == 1.0
    assert sum(kept[-10:]) / 10 == pytest.approx(0.7, abs=0.05)


def test_prompts_of_pairs_decide(dpo: Callable[..., RouterDPOTrainer]) -> None:
    trainer = dpo(awake(routed(granularity="attn_sequence", pooling="prompt")))
    with record(trainer.routed) as trace:
        loss_and_gradients(trainer, first_batch(trainer))
    assert not trace.forwards  # the trainer's own record stands before it
    fresh = dpo(routed(granularity="attn_sequence", pooling="prompt"), warm_start=2)
    fresh.train()
    assert all(loss == loss for (loss,) in logged(fresh, "loss"))


def test_dpo_with_checkpointing_equals_dpo_without(dpo: Callable[..., RouterDPOTrainer]) -> None:
    plain, saving = (dpo(awake(routed()), gradient_checkpointing=on) for on in (False, True))
    plain.train()
    saving.train()
    assert all(x.gradient_checkpointing for x in decoder_layers(decoder_of(saving.routed)))  # type: ignore[attr-defined]
    for expected, got in zip(
        logged(plain, "loss", "kept"), logged(saving, "loss", "kept"), strict=True
    ):
        assert got == pytest.approx(expected, rel=1e-4)


def test_dpo_resumes_where_it_was(dpo: Callable[..., RouterDPOTrainer]) -> None:
    fields = {"save_strategy": "steps", "save_steps": 2, "threshold_range": 2.0}
    whole = dpo(awake(routed()), **fields)
    whole.train()
    resumed = dpo(routed(), **fields)
    resumed.train(resume_from_checkpoint=str(Path(str(whole.args.output_dir)) / "checkpoint-2"))
    assert logged(resumed, "loss", "kept")[-2:] == logged(whole, "loss", "kept")[2:]


# ---- the package without TRL ----


def test_trl_is_imported_when_asked_for() -> None:
    code = (
        "import sys, router_tuning\n"
        "from router_tuning import *\n"
        "assert 'trl' not in sys.modules\n"
        "sys.modules['trl'] = None\n"  # as if it were not installed
        "router_tuning.RouterSFTTrainer\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].endswith('run pip install "router-tuning[trl]"')
    assert "ConfigError" in ran.stderr.splitlines()[-1]


def test_names_that_are_not_there_are_said_so() -> None:
    for name in router_tuning._OF_TRL:
        assert issubclass(
            getattr(router_tuning, name), RouterTrainerMixin | RouterTrainingArguments
        )
    with pytest.raises(AttributeError, match="has no attribute 'RouterPPOTrainer'"):
        router_tuning.RouterPPOTrainer  # noqa: B018


# ---- the example ----


def test_the_example_runs(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = EXAMPLES / "sft.py"
    assert len(script.read_text("utf-8").splitlines()) <= 40
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [
        {"messages": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": text}]}
        for text in SENTENCES * 4
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--model base --data chats.jsonl --out adapter --steps 10 --held-out 8"
    ran = subprocess.run(
        [sys.executable, str(script), *options.split()],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "'kept'" in ran.stdout
    monkeypatch.chdir(tmp_path)  # where the model is
    model = router_tuning.load_adapter("adapter")
    assert [e["budget"] for e in router_tuning.routing_of(model).config.calibration] == [0.8, 0.9]
    assert "# Routers for" in Path("adapter", "README.md").read_text()
