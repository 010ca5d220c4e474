"""The laws on a real pretrained model, SmolLM2-135M: sizes, numbers and kernels that people run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import DynamicCache, PreTrainedModel

from laws import (
    Batch,
    Case,
    Counter,
    Run,
    bytes_in,
    calibrate_by_hand,
    difference,
    forward,
    over,
    pairs_by_hand,
    randomize,
    run,
)
from router_tuning import (
    RouterTrainer,
    RouterTrainingArguments,
    RouterTuningConfig,
    attach,
    dense,
    detach,
    load_adapter,
)
from router_tuning.cost import cost
from router_tuning.embedded import load_model, load_tokenizer
from router_tuning.record import same_decisions

pytestmark = [pytest.mark.slow, pytest.mark.network]

TOLERANCE = 1e-2
"""Of logits of size about 20, in fp32 through 30 layers."""
DELTA = 1e-3
FLIPS = 3
"""Of some thousand decisions, at most so many may fall the other way by rounding."""
CHUNKS = [40, 24] + [1] * 8
CASES = [
    Case(granularity=granularity, **policy)  # type: ignore[arg-type]
    for granularity in ("attn_token", "attn_sequence")
    for policy in ({"kv": "all"}, {"kv": "kept"}, {"sink": 4, "window": 16})
]


TEXTS = (
    "The router reads the hidden state of each token and says whether attention is worth its price "
    "there. Most tokens of a sentence are easy to foresee: the end of a word, or an article. " * 2,
    "Paris is the capital of France, and Rome is the capital of Italy. " * 3,
)


@pytest.fixture(scope="module")
def smollm2() -> tuple[PreTrainedModel, Batch]:
    """The model in fp32, and two real texts of different lengths, padded on the left."""
    tokenizer = load_tokenizer("smollm2-135m")
    ids = torch.zeros((2, 72), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (text, length) in enumerate(zip(TEXTS, (72, 45), strict=True)):
        tokens = tokenizer(text)["input_ids"][:length]
        assert len(tokens) == length
        ids[row, 72 - length :] = torch.tensor(tokens)
        mask[row, 72 - length :] = 1
    return load_model("smollm2-135m", dtype=torch.float32), Batch(ids, mask)


@pytest.fixture(params=CASES, ids=str)
def routed(request: Any, smollm2: tuple[PreTrainedModel, Batch]) -> Iterator[tuple[Any, Batch]]:
    model, given = smollm2
    with torch.no_grad():
        before = model(given.ids, attention_mask=given.mask, position_ids=given.positions).logits
    case: Case = request.param
    config = case.config
    config.decide_after = 16
    attach(model, config)
    assert torch.equal(run(model, given).logits, before)
    assert torch.equal(run(model, given, path="masked").logits, before)
    randomize(model, seed=3, scale=4.0)
    yield model, given
    detach(model)
    with torch.no_grad():
        assert torch.equal(
            model(given.ids, attention_mask=given.mask, position_ids=given.positions).logits, before
        )


def same(a: Run, b: Run) -> int:
    """How many decisions flipped; none may lie beyond DELTA of its threshold, unless a flip came
    before it.
    """
    ok, flips = same_decisions(a.trace, b.trace, DELTA)
    assert ok or flips
    return flips


def test_the_core_laws_hold(routed: tuple[Any, Batch], request: pytest.FixtureRequest) -> None:
    model, given = routed
    with Counter(model) as counter:
        whole = run(model, given)
    decisions = whole.trace.decisions()
    assert 0.2 < whole.trace.kept_fraction() < 0.9
    with dense(model):
        assert difference(run(model, given).logits, whole.logits, given.real) > 100 * TOLERANCE

    masked = run(model, given, path="masked", decisions=decisions)
    assert difference(masked.logits, whole.logits, given.real) < TOLERANCE
    cached = run(model, given, CHUNKS, decisions=decisions)
    assert difference(cached.logits, whole.logits, given.real) < TOLERANCE
    alone = given.row(1)
    one = run(model, alone)
    flips = same(whole, run(model, given, CHUNKS)) + same(whole, run(model, given, path="masked"))
    assert flips <= FLIPS, f"{flips} of {whole.trace.real().sum() * 60} decisions flipped"
    if all(
        torch.equal(keep[0], decisions[unit][1][given.real[1]])
        for unit, keep in one.trace.decisions().items()
    ):
        assert difference(one.logits[0], whole.logits[1][given.real[1]], alone.real[0]) < TOLERANCE
    else:
        pytest.fail("a row decided differently when it was alone")

    for index in range(30):
        keep = int(decisions[f"layers.{index}.attn"].sum())
        if keep < int(given.real.sum()):
            assert set(counter.entered(index, "query")) == {keep}
    assert cost(model, whole.trace).flops_fraction < 1


def test_law_4_a_changed_token_changes_nothing_before_it(routed: tuple[Any, Batch]) -> None:
    model, given = routed
    before = run(model, given)
    for token in (40, 66):
        ids = given.ids.clone()
        ids[:, token] = (ids[:, token] + 1000) % model.config.vocab_size
        changed = Batch(ids, given.mask)
        decided = run(model, changed).trace.decisions()
        flips = 0
        for unit, keep in before.trace.decisions().items():
            flips += int((decided[unit] != keep)[:, :token].sum())
            decided[unit][:, :token] = keep[:, :token]
        assert flips <= FLIPS
        after = run(model, changed, decisions=decided)
        real = given.real[:, :token]
        assert difference(after.logits[:, :token], before.logits[:, :token], real) < TOLERANCE
        assert difference(after.logits, before.logits, given.real) > 100 * TOLERANCE


def test_laws_6_and_10_bytes_and_flops_are_those_of_the_cache_and_the_layers(
    routed: tuple[Any, Batch], request: pytest.FixtureRequest
) -> None:
    case: Case = request.node.callspec.params["routed"]
    model, given = routed[0], routed[1].row(0)
    config = model.config
    for chunks in (None, CHUNKS):
        with Counter(model) as counter:
            result = run(model, given, chunks)
        decisions, tokens = result.trace.decisions(), given.ids.numel()
        pairs = sum(pairs_by_hand(case, keep, given.real, None) for keep in decisions.values())
        a_pair = 2 * 2 * config.num_attention_heads * config.head_dim  # a score, a weighted sum
        routers = 2 * (config.hidden_size + 1) * tokens * len(decisions)
        head = 2 * config.hidden_size * config.vocab_size * tokens
        found = cost(model, result.trace)
        assert found.flops == sum(counter.flops.values()) + a_pair * pairs + routers + head
        assert found.flops_fraction < 1
        a_key = 2 * config.num_key_value_heads * config.head_dim * 4
        assert found.dense_kv_bytes == a_key * tokens * config.num_hidden_layers
        if chunks is not None:
            assert found.kv_bytes == sum(map(bytes_in, result.cache.layers))


def test_law_7_interleaved_conversations_do_not_know_each_other(
    routed: tuple[Any, Batch],
) -> None:
    model, given = routed
    calibrate_by_hand(model)
    texts, budgets = [given.row(0), given.row(1)], [0.3, 0.7]
    chunks = [[text.ids.shape[1] - 8] + [1] * 8 for text in texts]
    alone = [
        run(model, text, lengths, budget=budget)
        for text, lengths, budget in zip(texts, chunks, budgets, strict=True)
    ]
    caches = [DynamicCache(config=model.config) for _ in texts]
    parts: list[list[torch.Tensor]] = [[], []]
    at = [0, 0]
    with torch.no_grad():
        for step in range(9):
            for i, text in enumerate(texts):
                end = at[i] + chunks[i][step]
                options = {**over(caches[i]), "use_cache": True, "budget": budgets[i]}
                parts[i].append(forward(model, text, at[i], end, **options))
                at[i] = end
    for part, one in zip(parts, alone, strict=True):
        assert torch.equal(torch.cat(part, 1), one.logits)
    other = run(model, texts[0], chunks[0], budget=budgets[1])
    assert alone[0].trace.kept_fraction() < other.trace.kept_fraction()


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
def test_laws_8_and_9_training_moves_routers_only_and_saved_equals_loaded(
    smollm2: tuple[PreTrainedModel, Batch], granularity: str, tmp_path: Path
) -> None:
    base, given = smollm2
    text = given.row(0)
    options = {"decide_after": 16, "kv_sink": 4, "kv_window": 16}
    model = get_peft_model(base, RouterTuningConfig(granularity=granularity, **options))
    arguments = RouterTrainingArguments(
        str(tmp_path / "runs"),
        max_steps=2,
        per_device_train_batch_size=1,
        learning_rate=0.5,  # so that two steps are enough to skip something
        budget=0.5,
        anneal_fraction=0.0,
        warm_start=0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    fresh = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    RouterTrainer(model, arguments, train_dataset=[{"input_ids": text.ids[0]}]).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 60
    assert not any(torch.equal(p, fresh[n]) for n, p in trained.items())
    model.eval()
    routed = run(model, text, CHUNKS)
    assert routed.trace.kept_fraction() < 1
    model.save_pretrained(str(tmp_path / "adapter"))
    assert model.unload() is base

    untouched = load_model("smollm2-135m", dtype=torch.float32)
    ours = dict(base.named_parameters())
    for name, parameter in untouched.named_parameters():
        assert torch.equal(ours[name], parameter), name
    del ours
    loaders = (PeftModel.from_pretrained, lambda base, folder: load_adapter(folder, base))
    for load in loaders:
        loaded = load(untouched, str(tmp_path / "adapter"))
        again = run(loaded, text, CHUNKS)
        assert torch.equal(again.logits, routed.logits)
        loaded.unload()
