"""What the frozen model writes: answers in the order of prompts, and whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from router_tuning.attach import attach, routing_of, set_budget
from router_tuning.config import RoutingConfig
from router_tuning.data import Example
from router_tuning.errors import ConfigError, DataError
from router_tuning.peft_config import RouterTuningConfig
from router_tuning.sampling import sample_answers, sample_texts
from tiny import BOS, EOS, tiny_model, tiny_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model()


def without_template() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def text_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_sampled_answers_come_in_the_order_of_the_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = ["a long prompt about a fox and a dog", "fox", "some dog", "it"]
    progress: list[tuple[int, int]] = []
    model.train()
    model.lm_head.eval()
    before = torch.random.get_rng_state()
    options: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 3}
    found = sample_answers(
        model, tokenizer, prompts, **options, progress=lambda *n: progress.append(n)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training
    assert not model.lm_head.training  # each module has its own mode back
    asked = [e.messages[0]["content"] for e in found if e.messages]
    assert len(asked) > 1
    assert asked == [p for p in prompts if p in asked]  # an empty answer is left out
    assert all(e.messages and e.messages[1]["content"].strip() for e in found)
    assert progress == [(3, 4), (4, 4)]
    assert found == sample_answers(model, tokenizer, prompts, **options)
    assert found != sample_answers(model, tokenizer, prompts, **options, seed=1)


@pytest.mark.parametrize("peft", [False, True])
def test_sampled_answers_are_those_of_the_frozen_model(
    tokenizer: PreTrainedTokenizerFast, peft: bool
) -> None:
    prompts = ["fox", "a dog"]
    expected = sample_answers(tiny_model(), tokenizer, prompts, max_new_tokens=8)
    routed: torch.nn.Module = tiny_model()
    if peft:
        routed = get_peft_model(routed, RouterTuningConfig())
    else:
        attach(routed, RoutingConfig())
    routing_of(routed).config.calibration = [{"budget": 0.5, "threshold": 9.0}]
    set_budget(routed, 0.5)  # routers on, nothing would run
    assert sample_answers(routed, tokenizer, prompts, max_new_tokens=8) == expected


class Scripted(torch.nn.Module):
    """A model that answers what it is told to, by the text of the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, script: dict[str, str]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.script = tokenizer, script
        self.generation_config = SimpleNamespace(eos_token_id=[EOS, 5])
        self.calls: list[dict[str, Any]] = []

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self.calls.append({"input_ids": input_ids, **options})
        rows = [self._answer(self.tokenizer.decode(row)) for row in input_ids]
        width = max(map(len, rows))
        padded = torch.tensor(
            [row + [options["pad_token_id"]] * (width - len(row)) for row in rows]
        )
        return torch.cat([input_ids, padded], dim=1)

    def _answer(self, prompt: str) -> list[int]:
        return text_ids(self.tokenizer, next(a for p, a in self.script.items() if p in prompt))


def answered(examples: Sequence[Example]) -> list[str]:
    return [e.messages[1]["content"] for e in examples if e.messages]


def test_empty_answers_are_left_out_and_others_end_at_a_special_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    script = {"fox": "<|im_end|>", "dog": "it is<|im_end|>ab", "box": " so <eos>", "jug": "now"}
    model = Scripted(tokenizer, script)
    found = sample_answers(model, tokenizer, list(script))
    assert answered(found) == ["it is", "so", "now"]
    (call,) = model.calls
    assert call["eos_token_id"] == [EOS, 5]
    assert (call["do_sample"], call["temperature"], call["top_p"]) == (True, 0.8, 0.95)


def test_prompts_are_padded_on_the_left(tokenizer: PreTrainedTokenizerFast) -> None:
    model = Scripted(tokenizer, {"dog": "it", "fox": "so"})
    sample_answers(model, tokenizer, ["fox", "dog and dog"])
    (call,) = model.calls
    for ids, mask, prompt in zip(
        call["input_ids"], call["attention_mask"], ("fox", "dog and dog"), strict=True
    ):
        wanted = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(ids[mask.bool()]) == wanted
        assert mask.tolist() == sorted(mask.tolist())


def test_model_without_chat_template_does_not_play_the_user() -> None:
    tokenizer = without_template()
    model = Scripted(tokenizer, {"fox": " dog\nUser: And", "box": "it\n\nUser: x"})
    found = sample_answers(model, tokenizer, ["fox", "box"])
    assert answered(found) == ["dog", "it"]
    ids, mask = model.calls[0]["input_ids"][0], model.calls[0]["attention_mask"][0]
    assert tokenizer.decode(ids[mask.bool()]) == "<bos>User: fox\nAssistant:"


# Texts from nothing


def test_sampled_texts_are_those_of_the_frozen_model_and_of_the_seed(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 2}
    progress: list[tuple[int, int]] = []
    before = torch.random.get_rng_state()
    found = sample_texts(
        tiny_model(), tokenizer, 30, **options, progress=lambda *n: progress.append(n)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert progress == sorted(progress)
    assert progress[-1] == (30, 30)
    assert len(progress) >= 3  # two texts of at most six tokens each time
    assert sum(len(text_ids(tokenizer, e.text or "")) for e in found) >= 30
    assert all(e.text and e.messages is None for e in found)
    routed = tiny_model()
    attach(routed, RoutingConfig())
    routing_of(routed).config.calibration = [{"budget": 0.5, "threshold": 9.0}]
    set_budget(routed, 0.5)  # routers on, nothing would run
    assert sample_texts(routed, tokenizer, 30, **options) == found
    assert sample_texts(routed, tokenizer, 30, **options, seed=1) != found


def test_a_text_begins_as_texts_do(tokenizer: PreTrainedTokenizerFast) -> None:
    def begins(tokenizer: PreTrainedTokenizerFast) -> list[int]:
        model = Scripted(tokenizer, {"": "it is"})
        assert {e.text for e in sample_texts(model, tokenizer, 300)} == {"it is"}
        ids: list[int] = model.calls[0]["input_ids"].flatten().tolist()
        return ids

    assert begins(tokenizer) == [BOS, BOS]
    chat = tiny_tokenizer()
    chat.add_tokens("<|endoftext|>")
    assert begins(chat) == [BOS, BOS]  # its texts have a bos
    chat.backend_tokenizer.post_processor = None
    assert begins(chat) == [chat.convert_tokens_to_ids("<|endoftext|>")] * 2


def test_what_cannot_write_is_told(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match="tokens must be at least 1, got 0"):
        sample_texts(model, tokenizer, 0)
    with pytest.raises(DataError, match="ends texts where they begin"):
        sample_texts(Scripted(tokenizer, {"": "<|im_end|>"}), tokenizer, 9)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(DataError, match="no bos, eos or end-of-text token"):
        sample_texts(model, tokenizer, 1)
