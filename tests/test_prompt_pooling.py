"""pooling="prompt": the whole prompt decides, for itself and for all that follows.

Random routers over families and units; every way to say where the prompt ends, and every way not
to. The laws of caching and causality hold from the boundary on.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PrinterCallback

from laws import (
    EFFECT,
    LOGIT_TOLERANCE,
    Batch,
    Case,
    Run,
    assert_close,
    assert_same_decisions,
    batch,
    calibrate_by_hand,
    difference,
    forward,
    over,
    routed_model,
    run,
)
from router_tuning import (
    RouterTuningConfig,
    attach,
    dense,
    detach,
    execute,
    record,
    replay,
    routing_of,
)
from router_tuning.baselines import RandomMask, StaticDrop
from router_tuning.calibration import calibrate, calibrate_windows
from router_tuning.card import card_text
from router_tuning.config import RoutingConfig
from router_tuning.data import Windows
from router_tuning.errors import UnsupportedCallError
from router_tuning.evaluation.perplexity import evaluate, window_loss
from router_tuning.execution.context import ForwardContext, decided_by, routers_of
from router_tuning.record import Trace
from router_tuning.training.trainer import RouterTrainer, RouterTrainingArguments
from router_tuning.units import Unit
from tiny import CACHE_KEY, PAD, checkpoint_activations, tiny_model, token_ids

FAMILIES = ("llama", "gemma3", "gpt_neox", "mixtral", "falcon")
CASES = [
    Case(family, granularity, kv)
    for family in FAMILIES
    for granularity in ("attn_sequence", "mlp_sequence", "block_sequence")
    for kv in ("all", "kept")
]
SOME = [
    Case(granularity="attn_sequence", sink=5, window=3),
    Case("gpt_neox", "attn_sequence+mlp_sequence"),
    Case("falcon", "block_sequence", "all"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
some_cases = pytest.mark.parametrize("case", SOME, ids=str)
LENGTHS = [6, 9, 11]
"""Of the prompts of `laws.batch`, whose rows then answer from columns 10, 9 and 11 on."""
NEW = 6
TOLERANCE = LOGIT_TOLERANCE[torch.float32]
NO_BOUNDARY = r"does not say where the prompt ends; pass prompt_lengths=\[...\].*labels.*generate"


def prompting(case: Case, router_seed: int = 1) -> PreTrainedModel:
    """A tiny model whose prompts decide."""
    model = routed_model(case, router_seed=router_seed)
    routing_of(model).config.pooling = "prompt"
    return model


def mixed(case: Case, given: Batch, lengths: Any) -> tuple[PreTrainedModel, Run]:
    """A model whose routers keep some and skip some, rows differing, and its uncached run."""
    for seed in itertools.count(1):
        model = prompting(case, seed)
        whole = run(model, given, prompt_lengths=lengths)
        rows = set(map(tuple, decided(whole.trace).T.tolist()))
        if 0.2 < whole.trace.kept_fraction() < 0.85 and len(rows) == len(lengths):
            return model, whole
    raise AssertionError


def decided(trace: Trace) -> Tensor:
    """What each unit does in each row, which must be the same at all of its real tokens: (U, B)."""
    real = trace.real()
    kept = []
    for keep in trace.decisions().values():
        some, every = keep.any(1), (keep | ~real).all(1)
        assert torch.equal(some, every)
        kept.append(some)
    return torch.stack(kept)


def generate(model: Any, given: Batch, **options: Any) -> tuple[Any, Trace]:
    settings: dict[str, Any] = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "pad_token_id": PAD,
        **options,
    }
    with record(model) as trace:
        out = model.generate(given.ids, attention_mask=given.mask, **settings)
    return out, trace


def questions() -> Batch:
    """Three prompts, padded on the left by four, none and one."""
    given = batch(3, 12, padded=False)
    given.mask[0, :4] = 0
    given.mask[2, :1] = 0
    return Batch(given.ids * given.mask, given.mask)


def lengths_of(given: Batch) -> list[int]:
    lengths: list[int] = given.mask.sum(1).tolist()
    return lengths


def texts(given: Batch, sequences: Tensor) -> Batch:
    """Prompts with their answers, without the last token, which was never run."""
    mask = torch.ones_like(sequences)
    mask[:, : given.mask.shape[1]] = given.mask
    return Batch(sequences[:, :-1], mask[:, :-1])


# ---- the laws ----


@each_case
def test_skipping_equals_masking(case: Case) -> None:
    given = batch()
    model, fast = mixed(case, given, LENGTHS)
    slow = run(model, given, path="masked", prompt_lengths=LENGTHS)
    assert_same_decisions(fast, slow)
    assert_close(
        fast, run(model, given, path="masked", decisions=fast.trace.decisions()), given.real
    )
    with dense(model), torch.no_grad():
        base = forward(model, given, 0, 20)
    assert difference(fast.logits, base, given.real) > EFFECT


@each_case
def test_cached_decoding_equals_scoring(case: Case) -> None:
    given = batch()
    model, whole = mixed(case, given, LENGTHS)
    for chunks in ([20], [12] + [1] * 8, [11, 4, 1, 4]):
        cached = run(model, given, chunks, prompt_lengths=torch.tensor(LENGTHS))
        assert_same_decisions(whole, cached)
        assert_close(whole, cached, given.real)


@each_case
def test_answers_change_no_decision_and_never_reach_a_router(case: Case) -> None:
    given = batch(padded=False)
    lengths = [6, 9, 11]
    model, before = mixed(case, given, lengths)
    seen: list[int] = []
    for router in routers_of(model).values():
        router.register_forward_pre_hook(lambda module, args: seen.append(args[0][..., 0].numel()))
    changed = Batch(given.ids.clone(), given.mask)
    for row, length in enumerate(lengths):
        changed.ids[row, length:] = token_ids(1, 20 - length, seed=7 + row)[0]
    for chunks in (None, [12] + [1] * 8):
        after = run(model, changed, chunks, prompt_lengths=lengths)
        assert torch.equal(decided(before.trace), decided(after.trace))
        prompts = torch.arange(20) < torch.tensor(lengths)[:, None]
        assert difference(before.logits, after.logits, prompts) < TOLERANCE
    assert seen == [sum(lengths)] * 2 * len(routers_of(model))
    changed.ids[:, 3] = given.ids[:, 3].flip(0)
    moved = run(model, changed, prompt_lengths=lengths).trace.logits()
    assert any(not torch.equal(moved[name], x) for name, x in before.trace.logits().items())


@each_case
def test_padding_and_neighbours_change_nothing(case: Case) -> None:
    given = batch()
    model, together = mixed(case, given, LENGTHS)
    for row, length in enumerate(LENGTHS):
        for left, right in ((0, 0), (3, 0), (0, 3), (2, 1)):
            one = given.row(row, left, right)
            alone = run(model, one, prompt_lengths=length)
            assert torch.equal(decided(alone.trace)[:, 0], decided(together.trace)[:, row])
            rows = together.logits[row][given.real[row]]
            assert (alone.logits[0][one.real[0]] - rows).abs().max() < TOLERANCE
    order = [2, 0, 1]
    turned = run(model, given.take(order), prompt_lengths=[LENGTHS[i] for i in order])
    assert torch.equal(decided(turned.trace), decided(together.trace)[:, order])


@each_case
def test_the_decision_is_the_mean_logit_of_the_prompts_real_tokens(case: Case) -> None:
    """Of the first unit, whose input no decision has touched."""
    given = batch()
    model, whole = mixed(case, given, LENGTHS)
    name, router = next(iter(routers_of(model).items()))
    found: list[Tensor] = []
    if case.granularity != "mlp_sequence":
        router.register_forward_hook(lambda module, args, output: found.append(output))
        routing_of(model).config.pooling = "prefix"
        run(model, given)  # there the router sees all tokens
        by_hand = [
            found[0][row][given.real[row]][:length].mean() for row, length in enumerate(LENGTHS)
        ]
        logits = whole.trace.logits()[name]
        assert torch.allclose(logits[:, 0], torch.stack(by_hand), atol=1e-5)
    record_ = whole.trace.forwards[0].units[name]
    assert record_.always_BT is None
    assert record_.logits_BT is not None
    assert torch.equal(record_.logits_BT, record_.logits_BT[:, :1].expand(3, 20))
    assert torch.equal(record_.keep_BT, (record_.logits_BT >= 0) & given.real)


# ---- generate ----


@each_case
def test_greedy_answers_equal_scoring(case: Case) -> None:
    given = questions()
    model, _ = mixed(case, given, lengths_of(given))
    out, trace = generate(model, given)
    text = texts(given, out.sequences)
    whole = run(model, text, prompt_lengths=lengths_of(given))
    assert torch.equal(decided(trace), decided(whole.trace))
    for step, logits in enumerate(out.logits):
        assert (logits - whole.logits[:, 11 + step]).abs().max() < TOLERANCE
    bare, _ = generate(model, given, use_cache=False)
    assert torch.equal(bare.sequences, out.sequences)


@each_case
def test_beams_equal_scoring(case: Case) -> None:
    given = questions()
    model, first = mixed(case, given, lengths_of(given))
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    out, _ = generate(model, given, **options)
    rows = given.take([0, 0, 1, 1, 2, 2])
    text = texts(rows, out.sequences)
    whole = run(model, text, prompt_lengths=lengths_of(rows))
    assert torch.equal(decided(whole.trace), decided(first.trace)[:, [0, 0, 1, 1, 2, 2]])
    scores = whole.logits[:, 11:].log_softmax(-1).gather(2, out.sequences[:, 12:, None])
    torch.testing.assert_close(scores.sum((1, 2)) / NEW, out.sequences_scores, atol=1e-4, rtol=0)


@some_cases
def test_guessed_tokens_are_no_part_of_the_prompt(case: Case) -> None:
    """Assisted decoding runs its first guesses together with the prompt."""
    given = batch(1, 12, padded=False)
    given.ids[0, 6:] = given.ids[0, :6]  # something to look up
    model, first = mixed(case, given, [12])
    longer = {"max_new_tokens": 16, "min_new_tokens": 16}
    straight, _ = generate(model, given, **longer)
    guessed, trace = generate(model, given, prompt_lookup_num_tokens=3, **longer)
    assert trace.forwards[0].real_BT.shape[1] > 12
    assert torch.equal(guessed.sequences, straight.sequences)
    assert torch.equal(decided(trace), decided(first.trace))
    for assistant in (mixed(case, given, [12])[0], tiny_model(seed=5)):
        out, trace = generate(model, given, assistant_model=assistant, **longer)
        assert torch.equal(out.sequences, straight.sequences)
        assert torch.equal(decided(trace), decided(first.trace))


@some_cases
def test_several_answers_share_their_prompts_decision(case: Case) -> None:
    given = questions()
    model, first = mixed(case, given, lengths_of(given))
    torch.manual_seed(0)
    _, trace = generate(model, given, do_sample=True, num_return_sequences=2, top_k=0)
    assert torch.equal(decided(trace), decided(first.trace)[:, [0, 0, 1, 1, 2, 2]])


@some_cases
def test_in_a_conversation_the_first_prompt_has_decided(case: Case) -> None:
    given = questions()
    model, first = mixed(case, given, lengths_of(given))
    out, _ = generate(model, given)
    ids = torch.cat([out.sequences, token_ids(3, 5, seed=8)], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :12] = given.mask
    text = Batch(ids, mask)
    again, trace = generate(model, text, **{CACHE_KEY: out[CACHE_KEY]})
    assert torch.equal(decided(trace), decided(first.trace))
    whole = run(model, texts(text, again.sequences), prompt_lengths=lengths_of(given))
    for step, logits in enumerate(again.logits):
        assert (logits - whole.logits[:, ids.shape[1] - 1 + step]).abs().max() < TOLERANCE
    _, afresh = generate(model, text)  # here the whole conversation is the prompt
    logits = afresh.forwards[0].units, trace.forwards[0].units
    assert any(
        not torch.equal(u.logits_BT[:, 0], logits[1][name].logits_BT[:, 0])  # type: ignore[index]
        for name, u in logits[0].items()
    )


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_an_answer_that_is_begun_already(as_tensor: bool, use_cache: bool) -> None:
    """prompt_lengths goes before the end of generate's input, also for repeated rows."""
    given, lengths = questions(), [5, 9, 10]
    model, whole = mixed(SOME[0], given, lengths)
    asked: Any = torch.tensor(lengths) if as_tensor else lengths
    _, trace = generate(model, given, prompt_lengths=asked, num_beams=2, use_cache=use_cache)
    first = trace.forwards[0]
    for unit, found in first.units.items():
        expected = whole.trace.decisions()[unit].repeat_interleave(2, dim=0)
        assert torch.equal(found.keep_BT, expected)


def test_prompts_as_embeddings_or_absent_are_as_wide_as_they_are() -> None:
    given = batch(2, 12, padded=False)
    model, first = mixed(SOME[0], given, [12, 12])
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": PAD}
    with record(model) as trace:
        model.generate(inputs_embeds=model.get_input_embeddings()(given.ids), **options)
    assert torch.equal(decided(trace), decided(first.trace))
    with record(model) as trace:
        out = model.generate(**options)
    whole = run(model, Batch(out[:, :-1], torch.ones_like(out)[:, :-1]), prompt_lengths=1)
    assert torch.equal(decided(trace), decided(whole.trace))


@some_cases
def test_budgets_move_the_threshold_of_the_prompts_decision(case: Case) -> None:
    given = questions()
    model, _ = mixed(case, given, lengths_of(given))
    calibrate_by_hand(model)
    _, trace = generate(model, given, budget=[0.9, 0.1, 1.0])
    for unit in trace.forwards[0].units.values():
        assert unit.logits_BT is not None
        logit = unit.logits_BT[:, 0]
        assert unit.keep_BT[:, -1].tolist() == [bool(logit[0] >= -1), bool(logit[1] >= 1), True]


# ---- the cache ----


def test_rows_of_a_cache_take_their_decisions_along() -> None:
    given = batch(padded=False)
    for case in SOME:
        model, whole = mixed(case, given, LENGTHS)
        for change, rows in (
            (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            (lambda c: c.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
            (lambda c: c.reorder_cache(torch.tensor([1, 1, 2])), [1, 1, 2]),
        ):
            head = Batch(given.ids[:, :12], given.mask[:, :12])
            cache = run(model, head, [12], prompt_lengths=LENGTHS).cache
            change(cache)
            rest = run(model, given.take(rows), [8], cache=cache)
            assert (rest.logits - whole.logits[rows, 12:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", [*SOME, Case(granularity="mlp_sequence", kv="all")], ids=str)
def test_cropping_into_a_prompt_forgets_it(case: Case) -> None:
    given = batch(padded=False)
    model, whole = mixed(case, given, LENGTHS)
    cache = run(model, given, [20], prompt_lengths=LENGTHS).cache
    cache.crop(-9)  # to 11 columns: the end of the longest prompt
    rest = run(model, given, [9], cache=cache)
    assert (rest.logits - whole.logits[:, 11:]).abs().max() < TOLERANCE
    cache.crop(-10)  # one into it
    for lengths in (None, LENGTHS):
        with pytest.raises(UnsupportedCallError, match=r"holds 10 tokens, but not.*new cache"):
            run(model, given, [10], cache=cache, prompt_lengths=lengths)
    assert cache.get_seq_length() == 10
    cache.crop(-10)
    with pytest.raises(UnsupportedCallError, match=NO_BOUNDARY):
        run(model, given, [20], cache=cache)
    again = run(model, given, [20], cache=cache, prompt_lengths=LENGTHS)
    assert torch.equal(decided(again.trace), decided(whole.trace))


def test_a_cache_that_others_filled_is_refused() -> None:
    given = batch(padded=False)
    model, whole = mixed(SOME[0], given, LENGTHS)
    head = Batch(given.ids[:, :12], given.mask[:, :12])
    with dense(model):
        filled = run(model, head, [12]).cache
    ran = run(model, head, [12], decisions=whole.trace.decisions()).cache
    for cache in (filled, ran):
        with pytest.raises(UnsupportedCallError, match="filled by the dense model or under given"):
            run(model, given, [8], cache=cache, prompt_lengths=LENGTHS)


@pytest.mark.parametrize("pooling", ["prefix", "prompt"])
@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_sequence", "block_sequence"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_that_the_model_makes_remembers(
    family: str, granularity: str, pooling: str
) -> None:
    given = batch(2, 14, padded=False)
    model, whole = mixed(Case(family, granularity, "all"), given, [8, 10])
    routing_of(model).config.pooling = pooling
    if pooling == "prefix":
        whole = run(model, given)
    with torch.no_grad(), record(model) as trace:
        first = model(given.ids[:, :10], prompt_lengths=[8, 10], use_cache=True)
        model(given.ids[:, 10:], **over(first[CACHE_KEY]))
    for unit, keep in whole.trace.decisions().items():
        assert torch.equal(keep, trace.decisions()[unit])


# ---- labels and training ----


def answered() -> dict[str, Tensor]:
    """Rows with labels over their answers: one padded on the right, one with two turns, one all
    prompt.
    """
    ids = token_ids(4, 12)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels = ids.clone()
    for row, prompt in enumerate((3, 6, 4, 12)):
        labels[row, :prompt] = -100
    labels[1, -3:] = -100
    labels[2, 7:9] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("case", [*SOME, Case("gemma3", "block_sequence")], ids=str)
def test_labels_say_where_prompts_end(case: Case) -> None:
    inputs = answered()
    given = Batch(inputs["input_ids"], inputs["attention_mask"])
    model, whole = mixed(case, given, [3, 6, 4, 12])
    with torch.no_grad(), record(model) as trace:
        by_name = model(**inputs, use_cache=False)
        positional = (
            model.forward(
                given.ids, given.mask, None, None, None, inputs["labels"], use_cache=False
            )
            if case.family == "llama"
            else by_name
        )
    assert torch.equal(trace.forwards[0].real_BT, given.real)
    for done in trace.forwards:
        for unit, found in done.units.items():
            assert torch.equal(found.keep_BT, whole.trace.decisions()[unit])
    assert by_name.loss == positional.loss


def trainer_of(model: nn.Module, folder: Path, **fields: Any) -> RouterTrainer:
    args = RouterTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=4,
        save_strategy="no",
        **{"max_steps": 2, "threshold_range": 0.0, **fields},
    )
    inputs = answered()
    data = [{name: x[row] for name, x in inputs.items()} for row in range(4)]
    trainer = RouterTrainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def tuned(family: str, granularity: str) -> PeftModel:
    config = RouterTuningConfig(granularity=granularity, pooling="prompt", budget=0.7)
    return get_peft_model(tiny_model(family), config)


@pytest.mark.parametrize("objective", ["distill", "lm"])
@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_sequence", "block_sequence"])
def test_training_takes_the_boundary_from_labels(
    objective: str, granularity: str, tmp_path: Path
) -> None:
    model = tuned("llama", granularity)
    for router in routers_of(model).values():
        for parameter in router.parameters():
            parameter.data = torch.randn(parameter.shape, generator=torch.manual_seed(3)) * 0.2
    trainer = trainer_of(model, tmp_path, objective=objective)
    trainer.state.max_steps, trainer.state.global_step = 2, 2
    model.train()
    seen: list[Tensor] = []
    for router in routers_of(model).values():
        router.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    gradients: list[list[Tensor]] = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model.get_base_model())
        trainer._micro_batch = 0
        model.zero_grad()
        trainer.compute_loss(model, answered()).backward()
        trained = [p for router in routers_of(model).values() for p in router.parameters()]
        gradients.append([p.grad.clone() for p in trained if p.grad is not None])
    assert all(g.abs().max() > 0 for g in gradients[0])
    assert len(gradients[0]) == 4 * 2
    torch.testing.assert_close(gradients[0], gradients[1])
    assert {x.shape[1] for x in seen} == {3 + 6 + 4 + 12}  # the prompts, and nothing else
    with torch.no_grad():
        trainer.compute_loss(model, {**answered(), "prompt_lengths": torch.tensor([2, 2, 2, 2])})
    assert seen[-1].shape[1] == 8


@pytest.mark.parametrize("objective", ["distill", "lm"])
def test_a_whole_training_with_its_warm_start(objective: str, tmp_path: Path) -> None:
    model = tuned("gemma3", "block_sequence")
    trainer = trainer_of(model, tmp_path, objective=objective, max_steps=3, anneal_fraction=0.1)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], p) for name, p in before.items())
    assert 0 < trainer.evaluate()["eval_kept"] <= 1


def test_training_without_labels_says_what_is_missing(tmp_path: Path) -> None:
    model = tuned("llama", "attn_sequence")
    trainer = trainer_of(model, tmp_path)
    inputs = answered()
    del inputs["labels"]
    with pytest.raises(UnsupportedCallError, match=NO_BOUNDARY):
        trainer.compute_loss(model, inputs)


# ---- who needs no boundary ----


@some_cases
def test_what_is_no_router_needs_no_boundary(case: Case) -> None:
    given = batch()
    model, whole = mixed(case, given, LENGTHS)
    names = list(routers_of(model))
    with decided_by(model, StaticDrop(names[:1])), record(model) as trace:
        forward(model, given, 0, 20, use_cache=False)
    assert not decided(trace)[0].any()
    with decided_by(model, RandomMask(0.5)), record(model) as trace:
        forward(model, given, 0, 20, use_cache=False)
    random = decided(trace)  # a sequence as a whole, its first tokens too
    assert 0 < random.float().mean() < 1
    with replay(model, whole.trace.decisions()):
        generate(
            model,
            Batch(given.ids[:, :4], given.mask[:, 4:8]),
            prefill_chunk_size=2,
            max_new_tokens=6,
        )
    with dense(model):
        forward(model, given, 0, 20, prompt_lengths=LENGTHS)
        generate(model, questions(), prefill_chunk_size=5)
    routing_of(model).enabled = False
    generate(model, questions(), prefill_chunk_size=5)


def test_fresh_routers_change_no_bit() -> None:
    given = questions()
    for granularity in ("attn_sequence", "mlp_sequence", "block_sequence"):
        model: Any = tiny_model()
        base = model(given.ids, attention_mask=given.mask).logits
        attach(model, RoutingConfig(granularity=granularity, pooling="prompt"))
        for path in ("masked", "skipping"):
            with execute(model, path), torch.no_grad():
                found = model(given.ids, attention_mask=given.mask, prompt_lengths=[1, 2, 3])
            assert torch.equal(found.logits, base)


def test_token_granularities_do_not_pool() -> None:
    model, given = routed_model(Case()), batch()
    before = run(model, given)
    routing_of(model).config.pooling = "prompt"
    assert torch.equal(run(model, given).logits, before.logits)
    generate(model, questions(), prefill_chunk_size=5)


def test_generate_is_put_back() -> None:
    model = tiny_model()
    before = set(model.__dict__)
    attach(model, RoutingConfig(granularity="attn_sequence", pooling="prompt"))
    assert "generate" in model.__dict__
    detach(model)
    assert set(model.__dict__) == before


def test_two_interleaved_conversations_keep_their_own_decisions() -> None:
    a, b = batch(2, 14, padded=False), batch(2, 14, padded=False, seed=5)
    model, first = mixed(SOME[0], a, [8, 10])
    second = run(model, b, prompt_lengths=[3, 4])
    caches = [DynamicCache(config=model.config) for _ in range(2)]  # type: ignore[arg-type]
    with torch.no_grad():
        for start, end in ((0, 10), (10, 12), (12, 14)):
            for given, lengths, cache, whole in (
                (a, [8, 10], caches[0], first),
                (b, [3, 4], caches[1], second),
            ):
                asked = {"prompt_lengths": lengths} if start == 0 else {}
                logits = forward(model, given, start, end, **over(cache), **asked)
                assert (logits - whole.logits[:, start:end]).abs().max() < TOLERANCE


def test_the_model_card_says_who_decides() -> None:
    text = card_text(RoutingConfig(granularity="attn_sequence", pooling="prompt"), None)
    assert "its whole prompt" in text
    assert "which always run" not in text


# ---- errors ----


@pytest.fixture
def model() -> PreTrainedModel:
    return prompting(Case(granularity="attn_sequence"))


@pytest.mark.parametrize("chunks", [None, [20]])
def test_without_a_boundary_the_error_says_what_to_give(
    model: PreTrainedModel, chunks: list[int] | None
) -> None:
    with pytest.raises(UnsupportedCallError, match=NO_BOUNDARY):
        run(model, batch(), chunks)


@pytest.mark.parametrize(
    ("lengths", "match"),
    [
        ([6, 0, 3], "at least 1.*got 0"),
        ([6, -2, 3], "at least 1.*got -2"),
        ([6, 2.5, 3], "whole numbers.*got 2.5"),
        ([6, True, 3], "whole numbers.*got True"),
        (["6", "9", "11"], "whole numbers.*got '6'"),
        (torch.tensor([6.0, 9.0, 11.0]), "whole numbers.*got 6.0"),
        (0, "at least 1.*got 0"),
        ([6, 9], "one number a row: got 2 for 3 rows"),
        ([6], "one number a row: got 1 for 3 rows"),
        ([], "one number a row: got 0 for 3 rows"),
        ([6, 16, 11], "says 16 tokens for row 1, but .* only 15 real ones: .*cut into chunks"),
    ],
)
def test_wrong_lengths_are_named(model: PreTrainedModel, lengths: Any, match: str) -> None:
    with pytest.raises(UnsupportedCallError, match=match):
        run(model, batch(), prompt_lengths=lengths)


def test_a_prompt_in_chunks_is_refused(model: PreTrainedModel) -> None:
    given = questions()
    with pytest.raises(UnsupportedCallError, match="cannot be cut into chunks"):
        run(model, given, [6, 6], prompt_lengths=lengths_of(given))
    for options in (
        {"prefill_chunk_size": 5},
        {"generation_config": GenerationConfig(prefill_chunk_size=5)},
    ):
        with pytest.raises(UnsupportedCallError, match="prefill_chunk_size=5 cuts the prompt"):
            model.generate(given.ids, attention_mask=given.mask, **options)
    model.generation_config.prefill_chunk_size = 5  # type: ignore[union-attr]
    with pytest.raises(UnsupportedCallError, match="prefill_chunk_size=5 cuts the prompt"):
        model.generate(given.ids, attention_mask=given.mask)


def test_guidance_is_refused(model: PreTrainedModel) -> None:
    given = questions()
    with pytest.raises(UnsupportedCallError, match=r"guidance_scale=1\.5 runs a second prompt"):
        generate(model, given, guidance_scale=1.5)
    generate(model, given, guidance_scale=1)


def test_a_forward_inside_generate_that_is_shorter_than_the_prompt_is_refused(
    model: PreTrainedModel,
) -> None:
    def own(model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        return model(input_ids[:, :5])

    with pytest.raises(UnsupportedCallError, match=r"has 12 columns, but .* only 5"):
        model.generate(questions().ids, custom_generate=own, pad_token_id=PAD, max_new_tokens=2)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_packed_rows_are_refused(model: PreTrainedModel, use_cache: bool, masked: bool) -> None:
    ids = token_ids(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    with pytest.raises(UnsupportedCallError, match="position_ids start again"):
        model(ids, position_ids=positions, use_cache=use_cache, prompt_lengths=[3], **mask)


def test_a_row_without_a_prompt_is_refused(model: PreTrainedModel) -> None:
    inputs = answered()
    inputs["labels"][2] = inputs["input_ids"][2]
    with pytest.raises(UnsupportedCallError, match=r"prompt of row 2 has no token.*must be -100"):
        model(**inputs)


def test_windows_have_no_prompts(model: PreTrainedModel) -> None:
    ids = token_ids(2, 16)
    windows = Windows(ids, torch.zeros_like(ids).bool())
    calibrate_by_hand(model)
    for call in (
        lambda: evaluate(model, windows, [0.5]),
        lambda: window_loss(model, windows),
        lambda: calibrate_windows(model, windows, [0.5]),
        lambda: calibrate(model, None, [], [0.5]),
    ):
        with pytest.raises(UnsupportedCallError, match=r'needs texts with one.*pooling="prefix"'):
            call()
    with dense(model):
        window_loss(model, windows)
    with decided_by(model, RandomMask(0.5)):
        window_loss(model, windows)


def test_deciders_see_the_context_without_a_prompt(model: PreTrainedModel) -> None:
    def keep(unit: Unit, x_BTD: Tensor, forward: ForwardContext) -> Tensor:
        assert forward.prompt_BT is None
        return torch.ones(x_BTD.shape[:2], dtype=torch.bool)

    with decided_by(model, keep):
        run(model, batch())
