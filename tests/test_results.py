"""The results that the documents are made from say nothing of the machine they were made on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import RESULTS, shown

ABSOLUTE = re.compile(r"""(?<![\w.:/])/[A-Za-z]\w*/""")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_no_result_names_a_folder_of_the_machine(path: Path) -> None:
    assert ABSOLUTE.findall(path.read_text()) == []


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("--json", "--json"),
        ("benchmarks/results/a.json", "benchmarks/results/a.json"),
        ("/home/me/a.json", "a.json"),
        ("alpaca=/home/me/a.jsonl", "alpaca=a.jsonl"),
    ],
)
def test_a_command_is_shown_without_folders(argument: str, wanted: str) -> None:
    assert shown(argument) == wanted
    assert not ABSOLUTE.search(shown(argument))


def test_a_folder_would_be_noticed() -> None:
    assert ABSOLUTE.search('"--json /home/me/a.json"')
    assert not ABSOLUTE.search('"https://example.org/a/b and benchmarks/results/a.json"')
