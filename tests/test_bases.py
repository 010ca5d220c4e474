"""What routers sit on: a base in any dtype, in int8, from GGUF; and several adapters on one model.

Whatever the base, skipping equals masking, a saved adapter is the one that loads, and training
moves routers only. Of several adapters, each gives what it gives alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from laws import assert_close, assert_same_decisions, batch, calibrate_by_hand, over, run
from router_tuning.adapter_folder import load_adapter
from router_tuning.attach import routing_of, set_budget
from router_tuning.errors import BaseModelMismatchError, UnsupportedCallError
from router_tuning.execution.context import dense, record, routers_of
from router_tuning.identity import base_parameters
from router_tuning.peft_config import RouterTuningConfig
from test_embedded import write_gguf
from test_peft_tuner import base_from, randomise
from test_trainer import trainable, trainer_of
from tiny import tiny_model

# PEFT 0.21 asks transformers 5.24 for it whenever a PeftModel is made.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

KEPT = {"kv": "kept", "kv_sink": 2, "kv_window": 3}
BOTH = {"granularity": ["attn_token", "mlp_token"], **KEPT}
GIVEN = batch()
PROMPT = {"input_ids": GIVEN.ids[2:, :12], "attention_mask": GIVEN.mask[2:, :12]}


@pytest.fixture(autouse=True)
def _no_progress_bars() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def adapted(base: PreTrainedModel, seed: int = 1, **fields: Any) -> PeftModel:
    """The base with an adapter whose routers keep about half."""
    model = get_peft_model(base, RouterTuningConfig(**fields))
    randomise(model, seed=seed)
    return model.eval()


def bits_of_base(base: nn.Module) -> dict[str, bytes]:
    """Every weight of a base, to the bit, plain or packed; no router."""
    return {
        name: b"".join(_plain(part) for part in _parts(parameter.data))
        for name, parameter in base_parameters(base)
    }


def _parts(tensor: Tensor) -> list[Tensor]:
    flatten = getattr(tensor, "__tensor_flatten__", None)  # a subclass names what it packs
    return [tensor] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]


def _plain(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


# --- Bases: how each is loaded from the folder of a tiny model in float32


def in_dtype(dtype: torch.dtype) -> Callable[[Path], PreTrainedModel]:
    return partial(base_from, dtype=dtype)


def by_torchao(folder: Path) -> PreTrainedModel:
    """Weights in int8 with a scale a row; what is multiplied with them stays in bfloat16."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    quantised = TorchAoConfig(Int8WeightOnlyConfig())
    model = base_from(folder, dtype=torch.bfloat16, quantization_config=quantised)
    assert type(model.model.layers[0].mlp.up_proj.weight.data) is not Tensor
    return model


def by_bitsandbytes(folder: Path) -> PreTrainedModel:
    """LLM.int8(): weights in int8. The threshold of 0 turns outlier columns off, which are chosen
    over all tokens of a call, so that there no token would be computed by itself.
    """
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    model = base_from(folder, dtype=torch.float32, quantization_config=quantised)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    return model


def from_gguf(folder: Path) -> PreTrainedModel:
    write_gguf(folder / "tiny.gguf", tiny_model())
    return base_from(folder, gguf_file="tiny.gguf", dtype=torch.float32)


PLAIN = {
    "float32": in_dtype(torch.float32),
    "bfloat16": in_dtype(torch.bfloat16),
    "float16": in_dtype(torch.float16),
    "gguf": from_gguf,
}
INT8 = {"torchao": by_torchao, "bitsandbytes": by_bitsandbytes}
BASES = {**PLAIN, **INT8}
every_base = pytest.mark.parametrize("load", BASES.values(), ids=BASES)
every_int8 = pytest.mark.parametrize("load", INT8.values(), ids=INT8)
"""Loaders of one base a call, always from the same weights."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama."""
    made = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(made)
    return made


@contextmanager
def shape_only(load: Callable[[Path], PreTrainedModel]) -> Iterator[None]:
    """Expect to be told that weights in int8 were not compared; of other bases nothing is said."""
    if load in INT8.values():
        with pytest.warns(UserWarning, match="by shape only: the weights are quantised"):
            yield
    else:
        yield


@every_base
def test_a_fresh_adapter_changes_nothing_and_decides_in_float32(
    load: Callable[[Path], PreTrainedModel], folder: Path
) -> None:
    base = load(folder)
    with torch.no_grad():
        before = base(**PROMPT).logits
    model = get_peft_model(base, RouterTuningConfig(**BOTH)).eval()
    with torch.no_grad(), record(model) as trace:
        assert torch.equal(model(**PROMPT).logits, before)
    routers = [p for router in routers_of(model).values() for p in router.parameters()]
    assert {p.dtype for p in routers} == {torch.float32}
    seen = [unit.logits_BT for unit in trace.forwards[0].units.values()]
    assert {logits_BT.dtype for logits_BT in seen if logits_BT is not None} == {torch.float32}


@every_base
def test_skipping_equals_masking_on_every_base(
    load: Callable[[Path], PreTrainedModel], folder: Path
) -> None:
    model = adapted(load(folder), **BOTH)
    skipped = run(model, GIVEN)
    assert 0.2 < skipped.trace.kept_fraction() < 0.8
    decisions = skipped.trace.decisions()
    masked = run(model, GIVEN, decisions=decisions, path="masked")
    assert_close(run(model, GIVEN, decisions=decisions), masked, GIVEN.real)
    assert_close(run(model, GIVEN, [7, 1, 6, 6], decisions=decisions), masked, GIVEN.real)


@every_base
def test_routers_train_and_are_saved_to_the_bit(
    load: Callable[[Path], PreTrainedModel], folder: Path, tmp_path: Path
) -> None:
    base = load(folder)
    before = bits_of_base(base)
    model = get_peft_model(base, RouterTuningConfig(budget=0.7, **BOTH))
    fresh = trainable(model)
    trainer_of(model, tmp_path / "runs", max_steps=4, warm_start=4).train()
    assert bits_of_base(base) == before
    moved = trainable(model)
    assert all(not torch.equal(moved[name], fresh[name]) for name in fresh)
    randomise(model)  # so that what is loaded is seen to decide
    model.eval().save_pretrained(tmp_path / "adapter")
    with shape_only(load):
        again = load_adapter(tmp_path / "adapter", load(folder))
    saved, loaded = run(model, GIVEN), run(again, GIVEN)
    assert torch.equal(saved.logits, loaded.logits)
    assert torch.equal(
        model.generate(**PROMPT, max_new_tokens=5), again.generate(**PROMPT, max_new_tokens=5)
    )


@every_int8
def test_an_adapter_serves_the_int8_form_of_its_base_and_the_reverse(
    load: Callable[[Path], PreTrainedModel], folder: Path, tmp_path: Path
) -> None:
    plain = adapted(in_dtype(torch.bfloat16)(folder), **KEPT)
    plain.save_pretrained(tmp_path / "plain")
    with shape_only(load):
        small = load_adapter(tmp_path / "plain", load(folder))
    ours, theirs = run(plain, GIVEN).trace.decisions(), run(small, GIVEN).trace.decisions()
    same = torch.stack([(ours[name] == theirs[name])[GIVEN.real].float().mean() for name in ours])
    assert same.mean() > 0.8  # eight bits move some logits over the threshold, not most
    small.save_pretrained(tmp_path / "small")
    back = load_adapter(tmp_path / "small", in_dtype(torch.bfloat16)(folder))  # compared, as before
    assert torch.equal(run(back, GIVEN).logits, run(plain, GIVEN).logits)
    adapted(load(folder), **KEPT).save_pretrained(tmp_path / "new")
    with shape_only(load):
        load_adapter(tmp_path / "new", in_dtype(torch.bfloat16)(folder))


def test_weights_from_gguf_are_compared_like_any_others(folder: Path, tmp_path: Path) -> None:
    adapted(from_gguf(folder)).save_pretrained(tmp_path)
    load_adapter(tmp_path, base_from(folder))
    with pytest.raises(BaseModelMismatchError, match="other numbers"):
        load_adapter(tmp_path, tiny_model(seed=3))


@every_int8
def test_an_int8_base_of_another_shape_is_refused(
    load: Callable[[Path], PreTrainedModel], folder: Path, tmp_path: Path
) -> None:
    adapted(load(folder)).save_pretrained(tmp_path)
    with pytest.raises(BaseModelMismatchError, match="num_layers 4 there, 2 here"):
        load_adapter(tmp_path, tiny_model(num_hidden_layers=2))


# --- Several adapters on one model

SEVERAL: dict[str, dict[str, Any]] = {
    "default": {**KEPT},
    "sequences": {"granularity": "attn_sequence", "kv": "all", "decide_after": 4},
    "mlps": {"granularity": "mlp_token", "layers": [1, 3]},
    "all": {"kv": "all"},
    "again": {**KEPT},
}
"""Adapters of one model, by name: the last has the settings of the first, and other routers."""


def alone(name: str) -> PeftModel:
    """One of the adapters on a model of its own."""
    return adapted(tiny_model(), list(SEVERAL).index(name), **SEVERAL[name])


def all_at_once(folder: Path | None = None) -> PeftModel:
    """A model with all of them, added one by one, or loaded from folders."""
    model = alone("default")
    for name in list(SEVERAL)[1:]:
        if folder is None:
            model.add_adapter(name, RouterTuningConfig(**SEVERAL[name]))
            model.set_adapter(name)
            randomise(model, name, list(SEVERAL).index(name))
        else:
            alone(name).save_pretrained(folder / name)
            load_adapter(folder / name, model, adapter_name=name)
    return model.eval()


def generated(model: nn.Module, **options: Any) -> Tensor:
    """Six greedy tokens after a prompt."""
    generate: Any = model.generate
    out: Tensor = generate(**PROMPT, max_new_tokens=6, min_new_tokens=6, **options)
    return out


@pytest.mark.parametrize("loaded", [False, True], ids=["added", "loaded"])
def test_each_of_several_adapters_gives_what_it_gives_alone(loaded: bool, tmp_path: Path) -> None:
    model = all_at_once(tmp_path if loaded else None)
    wanted = {}
    for name in SEVERAL:
        one = alone(name)
        wanted[name] = run(one, GIVEN), generated(one)
    texts = {tuple(text.flatten().tolist()) for _, text in wanted.values()}
    assert len(texts) == len(SEVERAL)  # each decides in its own way
    for name in (*reversed(SEVERAL), "sequences"):
        model.set_adapter(name)
        found = run(model, GIVEN)
        assert torch.equal(found.logits, wanted[name][0].logits)
        assert_same_decisions(found, wanted[name][0])
        assert torch.equal(generated(model), wanted[name][1])


def test_deleting_one_leaves_the_others_as_they_were() -> None:
    model = all_at_once()
    for name in list(SEVERAL)[:-1]:
        model.delete_adapter(name)
        (active,) = model.active_adapters
        assert torch.equal(run(model, GIVEN).logits, run(alone(active), GIVEN).logits)
    assert list(model.peft_config) == ["again"]
    assert torch.equal(generated(model), generated(alone("again")))


def test_each_adapter_has_its_own_budgets() -> None:
    model = all_at_once()
    for name in ("default", "all"):
        model.set_adapter(name)
        calibrate_by_hand(model)
    set_budget(model, 0.2)
    few = run(model, GIVEN).trace.kept_fraction()
    model.set_adapter("default")
    assert routing_of(model).config.default_budget is None
    assert run(model, GIVEN).trace.kept_fraction() > few
    model.set_adapter("all")
    assert run(model, GIVEN).trace.kept_fraction() == few


# --- A conversation belongs to the adapter that began it


def turn(model: nn.Module, cache: Any, begin: int, end: int) -> Tensor:
    """Logits of some columns of GIVEN, over a cache that holds those before."""
    with torch.no_grad():
        out: Tensor = model(GIVEN.ids[:, begin:end], **over(cache)).logits
    return out


@pytest.mark.parametrize("other", [name for name in SEVERAL if name != "default"])
@pytest.mark.parametrize("first", ["default", "sequences"])
def test_a_cache_that_lacks_keys_or_holds_decisions_is_refused_under_another_adapter(
    first: str, other: str
) -> None:
    if first == other:
        return
    model, cache = all_at_once(), DynamicCache()
    model.set_adapter(first)
    turn(model, cache, 0, 12)
    model.set_adapter(other)
    with pytest.raises(UnsupportedCallError, match=rf"filled under the adapter '{first}'.*{other}"):
        turn(model, cache, 12, 14)
    with pytest.raises(UnsupportedCallError, match="start a new cache"):
        generated(model, **over(cache))
    model.set_adapter(first)
    went_on = turn(model, cache, 12, 20)
    assert cache.get_seq_length() == 20  # nothing was written by what was refused
    model, cache = alone(first), DynamicCache()
    turn(model, cache, 0, 12)
    assert torch.equal(went_on, turn(model, cache, 12, 20))


def test_a_cache_of_every_key_goes_on_under_another_adapter() -> None:
    model, cache = all_at_once(), DynamicCache()
    model.set_adapter("all")
    turn(model, cache, 0, 12)
    model.set_adapter("default")
    turn(model, cache, 12, 16)
    model.set_adapter("again")  # but now keys are left out
    with pytest.raises(UnsupportedCallError, match="'default'"):
        turn(model, cache, 16, 20)
    cache.reset()
    assert torch.equal(turn(model, cache, 0, 12), turn(alone("again"), DynamicCache(), 0, 12))


def test_a_cache_whose_keys_are_all_there_is_any_adapters() -> None:
    model, cache = all_at_once(), DynamicCache()
    model.set_adapter("default")
    with dense(model):
        turn(model, cache, 0, 8)
    turn(model, cache, 8, 12)
    assert any(layer.is_bound for layer in cache.layers)
