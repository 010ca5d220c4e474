"""The benchmark: what it compares, what it counts, and how it works out a saving. No clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from laws import Case, calibrate_by_hand, routed_model
from router_tuning import RandomMask, decided_by, record
from router_tuning.bench import Plan, Times, _Cell, _phase, bench
from router_tuning.cost import Cost
from router_tuning.errors import BudgetError, ConfigError, DataError
from router_tuning.units import unwrap
from tiny import token_ids

VARIANTS = ["dense", "all_kept", "routed", "random", "static", "floor", "masked"]
BUDGET = 0.5


LLAMA = Case()


def prepared(case: Case = LLAMA) -> Any:
    model = routed_model(case)
    calibrate_by_hand(model)
    return model


def plan(**changes: Any) -> Plan:
    return Plan(
        **{"prompt_tokens": [9, 14], "new_tokens": 3, "batch_sizes": [1, 2], "budgets": [BUDGET]}
        | {"repeats": 1}
        | changes
    )


@pytest.mark.parametrize(
    "case", [Case(), Case(kv="all"), Case(granularity="mlp_token"), Case(granularity="block_token")]
)
def test_each_cell_holds_every_variant(case: Case) -> None:
    seen: list[tuple[int, int]] = []
    cells = bench(prepared(case), token_ids(1, 50)[0], plan(), progress=lambda *x: seen.append(x))
    assert [(c["batch_size"], c["prompt_tokens"]) for c in cells] == [
        (1, 9), (1, 14), (2, 9), (2, 14),
    ]  # fmt: skip
    for cell in cells:
        assert list(cell["prefill"]["seconds"]) == VARIANTS
        assert list(cell["decode"]["seconds"]) == [v for v in VARIANTS if v != "masked"]
        assert set(cell["prefill"]["realised_saving"]) <= {"routed", "random"}
        assert 0 < cell["kept_of_routed"] < 1
        counted = cell["kv_bytes_counted"]
        assert cell["memory"]["dense"]["kv_bytes"] == counted["dense"]
        if cell["batch_size"] == 1:  # rows of a batch hold room for the longest
            assert cell["memory"]["routed"]["kv_bytes"] == counted["routed"]
        assert cell["memory"]["masked"]["kv_bytes"] is None
    assert seen[-1] == (8, 8)


def test_without_new_tokens_only_the_prompt_is_measured() -> None:
    (cell,) = bench(
        prepared(), token_ids(1, 50)[0], plan(prompt_tokens=[9], batch_sizes=[1], new_tokens=0)
    )
    assert cell["decode"] is None
    assert cell["end_to_end"] is None


def test_the_model_is_left_as_it_was() -> None:
    model = prepared().train()
    bench(model, token_ids(1, 50)[0], plan(prompt_tokens=[9], batch_sizes=[1]))
    assert model.training
    assert model.model.__dict__["routing"].config.default_budget is None


@pytest.mark.parametrize("case", [Case(), Case(granularity="attn_sequence", kv="all")])
def test_the_limits_keep_all_and_nothing(case: Case) -> None:
    cell = _Cell(prepared(case), token_ids(2, 12), 9, BUDGET, plan())
    for variant, kept in ((cell._all_kept, 1.0), (cell._floor, 0.0)):
        with torch.no_grad(), variant(), record(cell.model) as trace:
            cell._decode(cell._prefill())
        assert trace.kept_of_routed() == kept
        assert trace.real().shape == (2, 12)
    with torch.no_grad(), cell._all_kept(), record(cell.model) as trace:
        cell._prefill()
    assert all(unit.logits_BT is not None for unit in trace.forwards[0].units.values())


def test_the_output_embedding_is_never_given_a_slice() -> None:
    """PyTorch copies the embedding once a row for that, which would slow dense and routed alike."""
    model = prepared()
    given: list[bool] = []
    head: Any = unwrap(model).get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(
        lambda module, args: given.append(args[0].is_contiguous())
    )
    bench(model, token_ids(1, 50)[0], plan(prompt_tokens=[9], batch_sizes=[3]))
    handle.remove()
    assert given
    assert all(given)


def test_every_variant_decodes_the_text_itself() -> None:
    """So that they do the same work, whatever they would say."""
    model, ids = prepared(), token_ids(2, 12)
    cell = _Cell(model, ids, 9, BUDGET, plan())
    given: list[torch.Tensor] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        cell._round({"routed": cell._routed}, 0)
    assert torch.equal(torch.cat(given, dim=1), ids)


def test_variants_decode_in_turns_each_on_its_own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what slows the machine for a second slows all of them, and nobody reads another's."""
    cell = _Cell(prepared(), token_ids(2, 12), 9, BUDGET, plan())
    steps: list[tuple[int, int]] = []
    decoded = cell._decoded

    def noted(column: int, cache: Any) -> None:
        steps.append((column, id(cache)))
        decoded(column, cache)

    monkeypatch.setattr(cell, "_decoded", noted)
    variants = {name: v for name, v in cell._variants(0.5).items() if name != "routed"}
    with torch.no_grad():
        seconds = cell._round(variants, 1)
    decoding = len(variants) - 1  # the masked path has no cache
    assert [column for column, _ in steps] == [9] * decoding + [10] * decoding + [11] * decoding
    of_column = [[cache for column, cache in steps if column == c] for c in (9, 10, 11)]
    assert all(len(set(caches)) == decoding for caches in of_column)
    assert of_column[1] == of_column[0][1:] + of_column[0][:1]  # another one begins
    assert {name: len(took) for name, took in seconds.items()} == {
        name: 1 if name == "masked" else 4 for name in variants
    }


def test_random_masks_are_drawn_before_the_clock_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared()
    cell = _Cell(model, token_ids(2, 12), 9, BUDGET, plan())
    with torch.no_grad():
        random = cell._variants(0.5)["random"]
        drawn = cell._drawn(0.5)
        with decided_by(model, RandomMask(0.5, 0)), record(model) as wanted:
            cell._decode(cell._prefill())
    monkeypatch.delattr(RandomMask, "__call__")
    with torch.no_grad(), random(), record(model) as trace:
        cell._decode(cell._prefill())
    for name, keep in trace.decisions().items():
        assert torch.equal(keep, wanted.decisions()[name])
        assert torch.equal(keep, drawn[name])


def test_a_saving_is_a_share_of_what_could_be_saved() -> None:
    seconds = {
        "dense": Times(10.0, 0.2),
        "routed": Times(8.0, 0.1),
        "random": Times(7.0, 0.1),
        "floor": Times(4.0, 0.3),
    }
    # Dense work 100, floor 40; the routed half of what is between.
    phase = _phase(seconds, Cost(70.0, 100.0, 0, 0), Cost(40.0, 100.0, 0, 0))
    assert phase["flops_share"] == 0.5
    assert phase["flops_fraction"] == {"routed": 0.7, "floor": 0.4}
    assert phase["ideal_seconds"] == 7.0
    assert phase["realised_saving"]["routed"] == pytest.approx(2 / 3)
    assert phase["realised_saving"]["random"] == 1.0
    assert phase["conclusive"]
    noisy = {**seconds, "dense": Times(10.0, 1.1)}
    assert not _phase(noisy, Cost(70.0, 100.0, 0, 0), Cost(40.0, 100.0, 0, 0))["conclusive"]


def test_times_are_a_median_and_the_distance_of_quartiles() -> None:
    assert Times.of([[5.0], [1.0], [2.0], [3.0], [4.0]]) == Times(3.0, 2.0)


def test_steps_that_differ_all_count_and_one_that_was_disturbed_does_not() -> None:
    steady = [1.0, 3.0]
    times = Times.of([steady, [1.0, 99.0], steady])
    assert times.median == 2.0
    assert times.spread == 24.0  # of 2, 50 and 2


def test_what_cannot_be_measured_is_refused() -> None:
    model, ids = prepared(), token_ids(1, 50)[0]
    with pytest.raises(BudgetError):
        bench(model, ids, plan(budgets=[0.33, 0.01]))
    with pytest.raises(DataError, match="real text"):
        bench(model, ids[:0], plan())
    with pytest.raises(ConfigError, match="at least 1"):
        plan(prompt_tokens=[0])
    with pytest.raises(ConfigError, match="at least 1"):
        plan(repeats=0)
    with pytest.raises(ConfigError, match="no variant 'slow'"):
        plan(variants=["slow"])
    model.model.__dict__["routing"].config.pooling = "prompt"
    with pytest.raises(ConfigError, match="no prompts"):
        bench(model, ids, plan())
