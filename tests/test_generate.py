"""`generate` over routed models: greedy, sampling, beams, assisted, chunked, continued; and what is
refused.

Every generation is checked in full: its decisions are replayed over the whole text without a cache,
and the logits that each new token was chosen from must be those.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from laws import (
    CHUNKS,
    DELTA,
    LOGIT_TOLERANCE,
    SOME_CASES,
    Batch,
    Case,
    batch,
    calibrate_by_hand,
    difference,
    over,
    routed_model,
    run,
)
from router_tuning import dense, record, routing_of, set_budget
from router_tuning.errors import BudgetError, UnsupportedCallError
from router_tuning.record import Trace
from tiny import CACHE_KEY, FAMILIES, PAD, tiny_model

TOLERANCE = LOGIT_TOLERANCE[torch.float32]
NEW = 6
SOME = [
    Case(kv="all"),
    Case(sink=5, window=3),
    Case(granularity="attn_sequence"),
    Case(granularity="mlp_sequence", kv="all"),
    Case(granularity="attn_token+mlp_token"),
]
some_cases = pytest.mark.parametrize("case", SOME, ids=str)


def prompt(length: int = 12) -> Batch:
    """Three rows, padded on the left by four, none and one."""
    given = batch(3, length, padded=False)
    given.mask[0, :4] = 0
    given.mask[2, :1] = 0
    return Batch(given.ids * given.mask, given.mask)


def generate(model: Any, given: Batch, **options: Any) -> tuple[Any, Trace]:
    """A greedy generation of NEW tokens unless told otherwise, with its logits and what it ran."""
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


def whole_text(given: Batch, sequences: Tensor) -> Batch:
    """Prompt and answer, without the last token, which was never run."""
    mask = torch.ones_like(sequences)
    mask[:, : given.mask.shape[1]] = given.mask
    return Batch(sequences[:, :-1], mask[:, :-1])


def check(model: PreTrainedModel, given: Batch, out: Any, trace: Trace) -> None:
    """The logits of every new token are those of the whole text, under the same decisions."""
    text = whole_text(given, out.sequences)
    whole = run(model, text, decisions=trace.decisions())
    start = given.ids.shape[1] - 1
    for step, logits in enumerate(out.logits):
        assert (logits - whole.logits[:, start + step]).abs().max() < TOLERANCE
    free = run(model, text)
    for unit, keep in trace.decisions().items():
        assert torch.equal(keep, free.trace.decisions()[unit])


@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_greedy_on_a_left_padded_batch(case: Case) -> None:
    model, given = routed_model(case), prompt()
    out, trace = generate(model, given)
    check(model, given, out, trace)
    assert 0.2 < trace.kept_fraction() < 0.9
    with dense(model):
        base = model.generate(
            given.ids, attention_mask=given.mask, max_new_tokens=NEW, do_sample=False
        )
    assert not torch.equal(base, out.sequences)


@some_cases
def test_a_row_alone_answers_as_in_the_batch(case: Case) -> None:
    model, given = routed_model(case), prompt()
    together, _ = generate(model, given)
    for row in range(3):
        alone, _ = generate(model, given.row(row))
        assert torch.equal(alone.sequences[0, -NEW:], together.sequences[row, -NEW:])


@some_cases
def test_without_a_cache_the_answer_is_the_same(case: Case) -> None:
    model, given = routed_model(case), prompt()
    cached, _ = generate(model, given)
    bare, _ = generate(model, given, use_cache=False)
    assert torch.equal(cached.sequences, bare.sequences)


@some_cases
@pytest.mark.parametrize("chunk", [1, 5, 12, 50])
def test_chunked_prefill(case: Case, chunk: int) -> None:
    model, given = routed_model(case), prompt()
    straight, whole = generate(model, given)
    out, trace = generate(model, given, prefill_chunk_size=chunk)
    assert torch.equal(out.sequences, straight.sequences)
    for unit, keep in whole.decisions().items():
        assert torch.equal(keep, trace.decisions()[unit])
    for a, b in zip(out.logits, straight.logits, strict=True):
        assert (a - b).abs().max() < TOLERANCE


@some_cases
def test_sampling_follows_the_seed(case: Case) -> None:
    model, given = routed_model(case), prompt()
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        out, trace = generate(model, given, do_sample=True, temperature=1.5, top_k=0)
        check(model, given, out, trace)
        texts.append(out.sequences)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@some_cases
def test_several_answers_a_prompt(case: Case) -> None:
    model, given = routed_model(case), prompt()
    torch.manual_seed(0)
    out, trace = generate(model, given, do_sample=True, num_return_sequences=2, top_k=0)
    assert out.sequences.shape[0] == 6
    check(model, given.take([0, 0, 1, 1, 2, 2]), out, trace)


@some_cases
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_beams_with_a_cache_equal_beams_without(case: Case, family: str) -> None:
    model = routed_model(Case(family, case.granularity, case.kv, case.sink, case.window))
    given = prompt()
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    cached, _ = generate(model, given, **options)
    bare, _ = generate(model, given, use_cache=False, **options)
    assert torch.equal(cached.sequences, bare.sequences)
    torch.testing.assert_close(cached.sequences_scores, bare.sequences_scores)


@some_cases
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup_gives_the_greedy_answer(case: Case, family: str) -> None:
    """Guessed tokens are run, and cropped from the cache where the model would have said
    otherwise.
    """
    model = routed_model(Case(family, case.granularity, case.kv, case.sink, case.window))
    given = batch(1, 12, padded=False)
    given.ids[0, 6:] = given.ids[0, :6]  # something to look up
    straight, _ = generate(model, given, max_new_tokens=16, min_new_tokens=16)
    guessed, trace = generate(
        model, given, max_new_tokens=16, min_new_tokens=16, prompt_lookup_num_tokens=3
    )
    assert torch.equal(guessed.sequences, straight.sequences)
    ran = sum(forward.real_BT.shape[1] for forward in trace.forwards)
    assert ran > 12 + 15  # some guesses were wrong


@some_cases
@pytest.mark.parametrize("routed_assistant", [False, True])
def test_an_assistant_model_changes_no_answer(case: Case, routed_assistant: bool) -> None:
    model, given = routed_model(case), batch(1, 12, padded=False)
    straight, _ = generate(model, given, max_new_tokens=12, min_new_tokens=12)
    assistant = routed_model(case, router_seed=1) if routed_assistant else tiny_model(seed=5)
    out, trace = generate(
        model, given, max_new_tokens=12, min_new_tokens=12, assistant_model=assistant
    )
    assert torch.equal(out.sequences, straight.sequences)
    if routed_assistant:  # the same model: every guess is right, and few forwards are needed
        assert len(trace.forwards) < 12


@some_cases
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("name", sorted({CACHE_KEY, "past_key_values"}))
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_a_conversation_goes_on_with_its_old_cache(case: Case, family: str, name: str) -> None:
    model = routed_model(Case(family, case.granularity, case.kv, case.sink, case.window))
    given = prompt()
    first, _ = generate(model, given)
    question = batch(3, 5, padded=False, seed=8).ids
    ids = torch.cat([first.sequences, question], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :12] = given.mask
    mask[1, -5:-3] = 0  # the second turn is padded too
    text = Batch(ids, mask)
    continued, rest = generate(model, text, **{name: first[CACHE_KEY]})
    afresh, trace = generate(model, text)
    assert torch.equal(continued.sequences, afresh.sequences)
    assert rest.forwards[0].start == 12 + NEW - 1
    for unit, keep in rest.decisions().items():
        later = slice(rest.forwards[0].start, None)
        assert torch.equal(keep[:, later], trace.decisions()[unit][:, later])
    check(model, text, continued, trace)


@some_cases
def test_a_prompt_of_one_token(case: Case) -> None:
    model, given = routed_model(case), batch(2, 1, padded=False)
    out, trace = generate(model, given)
    check(model, given, out, trace)


def test_a_sequence_decides_in_the_middle_of_decoding() -> None:
    model, given = routed_model(Case(granularity="attn_sequence")), batch(3, 4, padded=False)
    given.mask[0, :2] = 0
    routing_of(model).config.decide_after = 6
    out, trace = generate(model, given, max_new_tokens=9, min_new_tokens=9)
    check(model, given, out, trace)
    text = whole_text(given, out.sequences)
    for keep in trace.decisions().values():
        assert keep[text.real & (text.positions < 6)].all()
        for row in range(3):
            later = keep[row][text.real[row] & (text.positions[row] >= 6)]
            assert later.all() or not later.any()
    assert trace.kept_fraction() < 1


def test_a_short_answer_of_sequences_is_the_dense_one() -> None:
    model, given = routed_model(Case(granularity="attn_sequence")), batch(2, 4, padded=False)
    routing_of(model).config.decide_after = 50
    out, trace = generate(model, given)
    assert trace.kept_fraction() == 1.0
    with dense(model):
        base, _ = generate(model, given)
    assert torch.equal(out.sequences, base.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, base.logits, strict=True))


@some_cases
def test_budgets_of_a_call_and_of_its_rows(case: Case) -> None:
    model, given = routed_model(case), prompt()
    calibrate_by_hand(model)
    budgets = [0.3, 0.5, 1.0]
    together, trace = generate(model, given, budget=budgets)
    for row, budget in enumerate(budgets):
        alone, one = generate(model, given.row(row), budget=budget)
        assert torch.equal(alone.sequences[0, -NEW:], together.sequences[row, -NEW:])
        for unit, keep in one.decisions().items():
            assert torch.equal(keep[0], trace.decisions()[unit][row][trace.real()[row]])
    assert torch.stack(list(trace.decisions().values()))[:, 2, 1:].all()
    set_budget(model, 0.5)
    default, _ = generate(model, given)
    named, _ = generate(model, given, budget=0.5)
    assert torch.equal(default.sequences, named.sequences)


def test_budgets_of_rows_go_with_beams_and_several_answers() -> None:
    model, given = routed_model(), prompt()
    calibrate_by_hand(model)
    budgets = [0.2, 0.5, 0.8]
    together, _ = generate(model, given, budget=budgets, num_beams=2)
    for row, budget in enumerate(budgets):
        alone, _ = generate(model, given.row(row), budget=budget, num_beams=2)
        assert torch.equal(alone.sequences[0, -NEW:], together.sequences[row, -NEW:])
    as_tensor, _ = generate(model, given, budget=torch.tensor(budgets), num_beams=2)
    assert torch.equal(as_tensor.sequences, together.sequences)


def test_a_dense_prompt_can_be_continued_routed() -> None:
    """What the dense model cached counts as kept."""
    for case in (Case(kv="all"), Case(sink=5, window=3)):
        model, given = routed_model(case), batch(2, padded=False)
        head = Batch(given.ids[:, :12], given.mask[:, :12])
        with dense(model):
            cache = run(model, head, [12]).cache
        rest = run(model, given, [1] * 8, cache=cache)
        decisions = {
            unit: torch.cat([torch.ones(2, 12, dtype=torch.bool), keep[:, 12:]], dim=1)
            for unit, keep in rest.trace.decisions().items()
        }
        whole = run(model, given, decisions=decisions)
        assert difference(rest.logits, whole.logits[:, 12:], given.real[:, 12:]) < TOLERANCE


def test_a_sequence_whose_beginning_no_router_saw_runs_dense() -> None:
    """A decision of nothing would be a guess."""
    model, given = routed_model(Case(granularity="attn_sequence")), batch(2, padded=False)
    calibrate_by_hand(model)
    head = Batch(given.ids[:, :12], given.mask[:, :12])
    with dense(model):
        cache = run(model, head, [12]).cache
    rest = run(model, given, [8], cache=cache, budget=0.1)
    assert rest.trace.kept_fraction() == 1.0


# What is refused, by name


def refused(model: Any, match: str, **options: Any) -> None:
    with pytest.raises(UnsupportedCallError, match=match):
        generate(model, prompt(), **options)


def has_offloaded_caches() -> bool:
    """Whether this torch can make one: before 2.7 it needs a GPU."""
    try:
        DynamicCache(offloading=True)
    except RuntimeError:
        return False
    return True


needs_offloading = pytest.mark.skipif(
    not has_offloaded_caches(), reason="this torch has no stream without a GPU"
)


@needs_offloading
@some_cases
def test_an_offloaded_cache_is_refused(case: Case) -> None:
    refused(routed_model(case), "offloaded cache", cache_implementation="offloaded")


def test_a_routed_cache_cannot_go_on_dense() -> None:
    for case in (Case(), Case(granularity="attn_sequence", sink=5, window=3)):
        model, given = routed_model(case), prompt()
        out, _ = generate(model, given)
        text = whole_text(given, out.sequences)
        longer = Batch(
            torch.cat([text.ids, text.ids[:, -2:]], 1), torch.cat([text.mask, text.mask[:, -2:]], 1)
        )
        with dense(model), pytest.raises(UnsupportedCallError, match="start a new cache"):
            run(model, longer, [2], cache=out[CACHE_KEY])
        routing_of(model).enabled = False
        with pytest.raises(UnsupportedCallError, match="start a new cache"):
            run(model, longer, [2], cache=out[CACHE_KEY])


def test_a_cache_is_refused_on_the_differentiable_path() -> None:
    model, given = routed_model(), batch(2, 4, padded=False)
    with pytest.raises(UnsupportedCallError, match=r"torch\.no_grad"):
        model(given.ids, **over(DynamicCache(config=model.config)))


@pytest.mark.parametrize("budget", [[0.5, 0.5], [0.5] * 4, []])
def test_a_wrong_number_of_budgets_is_refused(budget: list[float]) -> None:
    model = routed_model()
    calibrate_by_hand(model)
    with pytest.raises(BudgetError, match=f"got {len(budget)} budgets for 3 rows"):
        generate(model, prompt(), budget=budget)


@pytest.mark.parametrize(
    "budget",
    [0, 0.0, 1.2, -1, float("nan"), True, "0.5", [0.5, 2, 0.5], ["a"] * 3, {"a": 0.5}, object()],
)
def test_a_wrong_budget_is_refused(budget: Any) -> None:
    model, given = routed_model(), prompt()
    calibrate_by_hand(model)
    with pytest.raises(BudgetError):
        generate(model, given, budget=budget)


def test_budgets_that_are_not_calibrated_are_refused() -> None:
    model, given = routed_model(), prompt()
    with pytest.raises(BudgetError, match="no budget is calibrated"):
        generate(model, given, budget=0.5)
    calibrate_by_hand(model)
    with pytest.raises(BudgetError, match=r"outside the calibrated range 0\.1 to 0\.9"):
        generate(model, given, budget=0.95)
    generate(model, given, budget=1.0)


def test_a_mask_that_is_not_two_dimensional_is_refused() -> None:
    model, given = routed_model(), batch(2, 4, padded=False)
    mask = torch.ones((2, 1, 4, 4), dtype=torch.bool).tril()
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match="4-D mask"):
        model(given.ids, attention_mask=mask)


def test_a_mask_of_the_wrong_length_is_refused() -> None:
    model, given = routed_model(), batch(2, 20, padded=False)
    cache = run(model, Batch(given.ids[:, :12], given.mask[:, :12]), [12]).cache
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match=r"wanted \(2, 13\)"):
        model(given.ids[:, 12:13], attention_mask=given.mask[:, 12:13], **over(cache))


def test_generate_knows_the_word_budget_and_no_other() -> None:
    model, given = routed_model(), prompt()
    with pytest.raises(ValueError, match="budgte"):
        model.generate(given.ids, attention_mask=given.mask, budgte=0.5)


def test_a_generation_config_is_taken_as_by_any_model() -> None:
    model, given = routed_model(), prompt()
    plain, _ = generate(model, given)
    config = GenerationConfig(
        max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=PAD, eos_token_id=2
    )
    out = model.generate(given.ids, attention_mask=given.mask, generation_config=config)
    assert torch.equal(out, plain.sequences)


def test_decode_phases_cover_what_generate_does() -> None:
    """The law tests' decode phase and generate run the same thing."""
    model, given = routed_model(), prompt()
    out, trace = generate(model, given)
    text = whole_text(given, out.sequences)
    stepped = run(model, text, [12] + [1] * (NEW - 1))
    assert CHUNKS["decode"][0] == 12
    for a, b in zip(out.logits, stepped.logits[:, 11:].unbind(1), strict=True):
        assert (a - b).abs().max() < DELTA[torch.float32]
    for unit, keep in trace.decisions().items():
        assert torch.equal(keep, stepped.trace.decisions()[unit])
