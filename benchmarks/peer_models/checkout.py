"""Code from a checkout, and what peers need to run beside another transformers than their own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

OF_4 = hasattr(DynamicCache, "from_legacy_cache")
"""Whether this is a transformers 4."""
LIKE_4 = "hooks that give attentions and layers the outputs they had in transformers 4"


def like_4(model: Any, inner: str = "") -> list[str]:
    """Give attentions and layers the outputs that they had in transformers 4; what was done."""
    if OF_4:
        return []
    for layer in model.model.layers:
        attention = (getattr(layer, inner) if inner else layer).self_attn
        attention.register_forward_hook(lambda _, args, output: (*output, None))
        layer.register_forward_hook(lambda _, args, output: output[0])
    return [LIKE_4]


def filled(model: nn.Module, weights: dict[str, Tensor], but: str = "\0") -> None:
    """Load a peer's weights; all must be there but its own."""
    missing = model.load_state_dict(weights, strict=False).missing_keys
    wrong = [name for name in missing if but not in name]
    if wrong:
        raise ValueError(f"the base has no weights for {wrong[0]}")


@contextmanager
def class_name_kept(kind: type) -> Iterator[None]:
    """Undo that some peers rename the class of a model, for the whole process."""
    before = kind.__name__
    try:
        yield
    finally:
        kind.__name__ = before


def module_in(path: Path, name: str) -> ModuleType:
    """A module by its file: packages called `utils` or `llama` are not the only ones so called."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"no {path.name} in the peer's folder")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def package_in(folder: Path, name: str) -> str:
    """A package by its folder, under this name."""
    module_in(folder / "__init__.py", name).__path__ = [str(folder)]
    return name
