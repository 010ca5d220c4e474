"""Imports go one way through the package, and files know only what they may: read off the source.

`violations` parses every file (imports inside functions and under TYPE_CHECKING count too) and
returns one sentence for each break of a rule. The tests below it plant each break in a small tree
and look for its sentence.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "router_tuning"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

# Low to high. A part (module or subpackage) may import its own tier and the tiers before it.
TIERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "config"}),
    frozenset({"units", "routers", "decide", "embedded", "identity", "processor"}),
    frozenset({"record"}),
    frozenset({"execution", "cost", "expected", "layer_cost", "prices", "weight_bytes", "memory"}),
    frozenset({"attach"}),
    frozenset({"data", "sampling"}),
    frozenset({"peft_config", "lora", "card", "baselines"}),
    frozenset({"peft_tuner"}),
    frozenset({"adapter_folder"}),
    frozenset(
        {"training", "averaging", "calibration", "evaluation", "bench", "export", "official"}
    ),
    frozenset({"report"}),
    frozenset({"cli", "__main__"}),
)
TOP = len(TIERS)  # the package's own __init__, which gathers the public names
HEAVY = frozenset({"torch", "transformers", "peft"})
PEFT_INTERNALS = "peft_tuner"
NO_PEFT = frozenset().union(*TIERS[:5], {"report"})  # the engine works without it
FAMILY_NAMES = re.compile(
    r"(cohere|deepseek|falcon|gemma|glm|gpt_?neox|gpt_?oss|granite|llama|mistral|mixtral|olmo|phi"
    r"|qwen|smollm)[0-9a-z_]*",
    re.IGNORECASE,
)
MAY_NAME_FAMILIES = frozenset(
    {"units", "embedded"}
)  # embedded: the aliases of the models it converts


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name, and the line it stands in."""

    module: str
    line: int


def violations(source: Path) -> list[str]:
    """Return a sentence for each break of a rule under source, in order of file and line."""
    found = []
    for path in sorted(source.rglob("*.py")):
        module = path.relative_to(source).with_suffix("").parts
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        place = path.relative_to(source).as_posix()
        found += [f"{place}:{line} {text}" for line, text in sorted(_breaks(source, module, tree))]
    return found


def _breaks(source: Path, module: tuple[str, ...], tree: ast.Module) -> Iterator[tuple[int, str]]:
    part = module[0]
    if part != "__init__" and _tier(part) is None:
        yield 1, f"is in no tier of the layout; give {part!r} its place in TIERS of this test"
        return
    for imported in _imports(source, module, tree):
        yield from ((imported.line, text) for text in _import_breaks(part, imported.module))
    if part not in MAY_NAME_FAMILIES:
        yield from _family_names(tree)


def _import_breaks(part: str, imported: str) -> Iterator[str]:
    outer, _, inner = imported.partition(".")
    if outer == PACKAGE:
        yield from _upward(part, inner.partition(".")[0])
    if part in TIERS[0] and outer in HEAVY:
        yield f"imports {imported}, but errors and config import no {', '.join(sorted(HEAVY))}"
    if part == "report" and outer == "torch":
        yield f"imports {imported}, but report reads JSON and records, never a model"
    if outer == "peft" and inner and part != PEFT_INTERNALS:
        yield f"imports {imported}, but only {PEFT_INTERNALS}.py imports from inside peft"
    elif outer == "peft" and part in NO_PEFT:
        yield "imports peft, but the engine and the report work without it"
    if imported.startswith("transformers.models.") and part != "units":
        yield f"imports {imported}, but only units.py knows model families"


def _upward(part: str, target: str) -> Iterator[str]:
    own = TOP if part == "__init__" else _tier(part)
    other = _tier(target) if target else TOP - 1  # the package itself: for the top tier only
    name = f"{PACKAGE}.{target}" if target else PACKAGE
    assert own is not None
    if other is None:
        yield f"imports {name}, which is in no tier of the layout; give it its place in TIERS"
    elif other > own:
        yield (
            f"imports {name}, but imports go down only: {target or 'the package itself'} stands in "
            f"tier {other}, {part} in tier {own}; move what is needed down, or hand it in"
        )


def _tier(part: str) -> int | None:
    return next((i for i, tier in enumerate(TIERS) if part in tier), None)


def _imports(source: Path, module: tuple[str, ...], tree: ast.Module) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            for alias in node.names:  # `from package import part` imports the part
                inner = f"{base}.{alias.name}"
                yield Import(inner if _is_module(source, inner) else base, node.lineno)
        elif isinstance(node, ast.Attribute) and _dotted(node).startswith(
            ("peft.tuners", "peft.utils")
        ):
            yield Import(_dotted(node), node.lineno)  # reached through a plain `import peft`


def _absolute(module: tuple[str, ...], node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    folder = (PACKAGE, *module[:-1])
    kept = folder[: len(folder) - (node.level - 1)]
    return ".".join((*kept, *((node.module,) if node.module else ())))


def _is_module(source: Path, name: str) -> bool:
    if name in ("peft.tuners", "peft.utils"):
        return True
    outer, _, inner = name.partition(".")
    place = source.joinpath(*inner.split("."))
    return outer == PACKAGE and (place.with_suffix(".py").exists() or place.is_dir())


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _family_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and FAMILY_NAMES.fullmatch(node.value)
        ):
            yield (
                node.lineno,
                f"names the model family {node.value!r}, but only units.py knows families",
            )


def test_package_keeps_the_rules() -> None:
    found = violations(SOURCE)
    assert not found, "\n".join(["", *found])


def test_package_was_read() -> None:
    assert {"errors.py", "config.py"} <= {path.name for path in SOURCE.rglob("*.py")}


CLEAN = {
    "__init__.py": "from router_tuning.attach import attach\nfrom router_tuning.cli import main\n",
    "errors.py": '"""The word llama in a sentence is no family name."""\n',
    "config.py": "import math\nfrom router_tuning.errors import ConfigError\n",
    "units.py": 'import torch\nfrom router_tuning import config\nX = ("llama", "gemma3_text")\n',
    "record.py": "from .units import Unit\n",
    "execution/__init__.py": "",
    "execution/context.py": "from ..record import Trace\nfrom .cache import KeptLayer\n",
    "execution/cache.py": "from router_tuning.execution import context\n",
    "attach.py": "from router_tuning.execution.context import record\n",
    "peft_config.py": "from peft import PeftConfig, PeftType\n",
    "peft_tuner.py": "from peft.tuners.tuners_utils import BaseTuner\nfrom . import peft_config\n",
    "adapter_folder.py": "from peft import PeftModel\nfrom router_tuning import peft_tuner\n",
    "training/trainer.py": "from peft import PeftModel\nfrom ..calibration import calibrate\n",
    "calibration.py": "from router_tuning.data import Windows\n",
    "data.py": "from router_tuning.config import RoutingConfig\n",
    "report/tables.py": "import json\n",
    "cli/__init__.py": "from router_tuning import __version__, bench\nDEFAULT = 'smollm2-135m'\n",
    "bench.py": "",
}


def plant(folder: Path, files: dict[str, str]) -> Path:
    """Write the clean tree with some files replaced or added; return its root."""
    for name, text in {**CLEAN, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_clean_tree_has_no_violation(tmp_path: Path) -> None:
    assert violations(plant(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        (
            "units.py",
            "from router_tuning.attach import attach",
            "imports router_tuning.attach, but imports go",
        ),
        ("units.py", "from router_tuning import attach", "imports router_tuning.attach"),
        ("units.py", "import router_tuning.record", "imports router_tuning.record"),
        ("units.py", "def f():\n    from . import record", "imports router_tuning.record"),
        (
            "decide.py",
            "from router_tuning.execution.context import record",
            "router_tuning.execution",
        ),
        ("record.py", "from .execution import context", "router_tuning.execution"),
        ("execution/cache.py", "from ..attach import attach", "imports router_tuning.attach"),
        ("execution/cache.py", "from .. import attach", "imports router_tuning.attach"),
        (
            "data.py",
            "from router_tuning.training.trainer import RouterTrainer",
            "router_tuning.training",
        ),
        ("report/tables.py", "from router_tuning.cli import main", "imports router_tuning.cli"),
        (
            "attach.py",
            "from router_tuning import __version__",
            "imports router_tuning, but imports go",
        ),
        (
            "attach.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import router_tuning.data",
            "data",
        ),
        ("attach.py", "import router_tuning.gone", "which is in no tier"),
        ("helpers.py", "", "is in no tier of the layout"),
        ("config.py", "import torch", "imports torch, but errors and config"),
        (
            "config.py",
            "from transformers import PreTrainedModel",
            "imports transformers, but errors and config",
        ),
        ("config.py", "def f():\n    import peft", "imports peft, but errors and config"),
        ("report/tables.py", "from torch import Tensor", "imports torch, but report"),
        (
            "training/trainer.py",
            "from peft.utils import get_peft_model_state_dict",
            "only peft_tuner.py imports",
        ),
        (
            "training/trainer.py",
            "from peft import tuners",
            "imports peft.tuners, but only peft_tuner.py",
        ),
        ("training/trainer.py", "import peft\nX = peft.tuners.lora", "imports peft.tuners"),
        ("peft_config.py", "from peft.utils import CONFIG_NAME", "only peft_tuner.py imports"),
        ("adapter_folder.py", "from peft.utils import CONFIG_NAME", "only peft_tuner.py imports"),
        ("peft_config.py", "from .peft_tuner import ROUTERS", "imports router_tuning.peft_tuner"),
        ("peft_tuner.py", "from . import adapter_folder", "imports router_tuning.adapter_folder"),
        ("attach.py", "from peft import PeftModel", "imports peft, but the engine"),
        (
            "attach.py",
            'def f(kind):\n    return kind == "gemma3_text"',
            "names the model family 'gemma3_text'",
        ),
        ("execution/cache.py", 'X = "Gemma3RMSNorm"', "names the model family 'Gemma3RMSNorm'"),
        (
            "routers.py",
            "from transformers.models.llama import modeling_llama",
            "only units.py knows",
        ),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, file: str, text: str, words: str) -> None:
    found = violations(plant(tmp_path, {file: text + "\n"}))
    assert found, f"nothing was said about {text!r} in {file}"
    assert all(sentence.startswith(f"{file}:") for sentence in found)
    assert any(words in sentence for sentence in found), found
