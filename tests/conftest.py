"""Fixtures of the whole suite; and no hub, and no test marked gpu where there is no GPU.

Tests that build several models take them from tiny.py: `from tiny import tiny_model`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else a forked worker warns about it

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from router_tuning.execution import paying
from tiny import FAMILIES, tiny_model, tiny_tokenizer


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip what is marked gpu where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def skipping_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' texts are so short that many attentions would always run whole. A module
    that is about that puts a fixture of this name in place of this one, which does nothing.
    """
    names = ("LEAST_SHARE", "LEAST_TOKENS", "LEAST_SHARE_AMX", "LEAST_TOKENS_AMX", "LEAST_PAIRS")
    for name in names:
        monkeypatch.setattr(paying, name, 0)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of each supported family in turn."""
    return str(request.param)


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """The factory `tiny_model(family, *, attn_implementation, seed, **config fields)`."""
    return tiny_model


@pytest.fixture
def model() -> PreTrainedModel:
    """A tiny Llama, fresh for each test."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, shared by all tests: change a copy, never this one."""
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def progress_bars() -> Iterator[None]:
    """The command line switches transformers' bars off for its process, here the tests' own."""
    yield
    logging.enable_progress_bar()
