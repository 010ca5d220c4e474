"""Continuous batching: refused at once while the model is routed, else the dense model's own.

transformers runs it in a thread that swallows errors, and then answers nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import transformers
from peft import get_peft_model
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from laws import batch, routed_model
from router_tuning import RouterTuningConfig, RoutingConfig, attach, dense, detach, routing_of
from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.causal import CONTINUOUS
from tiny import EOS, PAD, tiny_model

# PEFT 0.21 asks transformers 5.24 for it whenever a PeftModel is made.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]


def adapted() -> Any:
    return get_peft_model(tiny_model(), RouterTuningConfig()).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "attach": routed_model,
    "PEFT": adapted,
    "PEFT's base": lambda: adapted().get_base_model(),
}
routed_models = pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))


def names_in(model: nn.Module) -> list[str]:
    """What is there to call; the oldest transformers that we support has fewer."""
    return [name for name in CONTINUOUS if hasattr(model, name)]


def answers(model: Any) -> list[list[int]]:
    """Four greedy tokens a prompt, from a small paged cache."""
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=EOS, pad_token_id=PAD)
    paged = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    out = model.generate_batch(
        PROMPTS, generation_config=config, continuous_batching_config=paged, warmup=False
    )
    return [answer.generated_tokens for answer in out.values()]


@routed_models
def test_every_way_in_is_refused_at_once_with_what_to_use(make: Callable[[], Any]) -> None:
    model = make()
    assert "generate_batch" in names_in(model)
    for name in names_in(model):
        with pytest.raises(UnsupportedCallError, match=rf"{name} .* generate\(\) with a left-pad"):
            getattr(model, name)(PROMPTS)


def test_generate_with_a_paged_cache_is_refused() -> None:
    given = batch(2, 4, padded=False)
    with pytest.raises(UnsupportedCallError, match="generate_batch keeps keys in pages"):
        routed_model().generate(given.ids, cache_implementation="paged", max_new_tokens=2)


def test_inside_dense_it_is_refused_since_the_thread_does_not_see_the_block() -> None:
    model = routed_model()
    with dense(model), pytest.raises(UnsupportedCallError, match=r"does not see .with dense"):
        model.generate_batch(PROMPTS)


def switched_off(model: Any) -> AbstractContextManager[Any]:
    """Routing off inside the block, or from now on."""
    if hasattr(model, "disable_adapter"):
        return model.disable_adapter()  # type: ignore[no-any-return]
    routing_of(model).enabled = False
    return nullcontext()


@pytest.mark.skipif(
    not hasattr(transformers, "ContinuousBatchingConfig"), reason="an older transformers' own form"
)
@pytest.mark.parametrize("make", [routed_model, adapted], ids=["attach", "PEFT"])
def test_with_the_routers_off_it_is_the_dense_models_own(make: Callable[[], Any]) -> None:
    model = make()
    with switched_off(model):
        found = answers(model)
    assert found == answers(tiny_model())
    assert [len(answer) for answer in found] == [4, 4]
    routing_of(model).enabled = True
    with pytest.raises(UnsupportedCallError):
        answers(model)


def test_taking_the_routers_off_leaves_the_originals_and_no_trace() -> None:
    model = tiny_model()
    before = set(model.__dict__)
    attach(model, RoutingConfig())
    assert set(names_in(model)) <= set(model.__dict__)
    detach(model)
    assert set(model.__dict__) == before
    base = adapted().unload()
    assert set(base.__dict__) == before
    for name in names_in(model):
        assert getattr(model, name).__func__ is getattr(type(model), name)


def test_a_method_of_the_instance_is_called_and_put_back() -> None:
    model: Any = tiny_model()

    def own(*args: Any, **kwargs: Any) -> str:
        return "mine"

    model.generate_batch = own
    attach(model, RoutingConfig())
    with pytest.raises(UnsupportedCallError):
        model.generate_batch(PROMPTS)
    routing_of(model).enabled = False
    assert model.generate_batch(PROMPTS) == "mine"
    detach(model)
    assert model.__dict__["generate_batch"] is own


@pytest.mark.parametrize("missing", CONTINUOUS)
def test_a_transformers_without_one_of_them_is_served(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    model: PreTrainedModel = tiny_model()
    owner = next((c for c in type(model).__mro__ if missing in c.__dict__), None)
    if owner is not None:
        monkeypatch.delattr(owner, missing)
    before = set(model.__dict__)
    attach(model, RoutingConfig())
    assert not hasattr(model, missing)
    for name in names_in(model):
        with pytest.raises(UnsupportedCallError):
            getattr(model, name)(PROMPTS)
    detach(model)
    assert set(model.__dict__) == before
