"""The package's public door: __all__ is sorted, complete, and every name in it is really there."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import resources
from pathlib import Path

import pytest

import router_tuning
from router_tuning import errors

INIT = Path(router_tuning.__file__)
README = Path(__file__).parents[1] / "README.md"


def order(name: str) -> tuple[bool, bool, str]:
    """CONSTANTS, then Classes, then the rest: the order that ruff keeps (RUF022)."""
    return (not name.isupper(), not name[0].isupper(), name)


def imported_names(source: str) -> set[str]:
    """The public names that a piece of Python imports from the package or from a part of it."""
    return {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").partition(".")[0] == "router_tuning"
        for alias in node.names
        if not (alias.asname or alias.name).startswith("_")
    }


def test_all_is_sorted_and_has_no_doubles() -> None:
    names = list(router_tuning.__all__)
    assert names == sorted(set(names), key=order)


@pytest.mark.parametrize("name", router_tuning.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(router_tuning, name) is not None


def test_all_is_complete() -> None:
    # Trainers that need an extra are public, but importing every name must work without it.
    public = {*router_tuning.__all__, *router_tuning._OF_TRL}
    assert imported_names(INIT.read_text(encoding="utf-8")) == public


def test_readme_imports_public_names() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names = set().union(*map(imported_names, blocks))
    assert {"RouterTuningConfig", "calibrate", "record"} <= names  # the blocks were found
    assert names <= set(router_tuning.__all__)


def test_every_error_is_public() -> None:
    own = {name for name, _ in inspect.getmembers(errors, inspect.isclass)}
    assert own <= set(router_tuning.__all__)


@pytest.mark.parametrize("name", ["py.typed", "prompts.txt"])
def test_data_files_lie_in_the_package(name: str) -> None:
    assert resources.files("router_tuning").joinpath(name).is_file()
