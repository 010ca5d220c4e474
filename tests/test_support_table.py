"""docs/families.md says what the laws say: all families are there, and rows can be made again."""

from __future__ import annotations

import pytest

import support_table
from support_table import COLUMNS, DOCS, ROWS, DisagreementError, read, row_of, table
from tiny import FAMILIES, FOUND, PARTLY

STORED = read(DOCS.read_text(encoding="utf-8")) if DOCS.exists() else {}


def test_every_family_has_its_row() -> None:
    again = "run scripts/support-table"
    assert tuple(STORED) == (*FAMILIES, *PARTLY, *FOUND) == ROWS, again
    assert all(tuple(row) == COLUMNS for row in STORED.values()), again
    assert all(cell for row in STORED.values() for cell in row.values()), again


def test_a_document_reads_back_as_it_was_written() -> None:
    document = table(STORED)
    assert read(document) == STORED
    assert document.splitlines()[:-2] == DOCS.read_text(encoding="utf-8").splitlines()[:-2]


@pytest.mark.parametrize("family", ["llama", "gemma4", "opt"])
def test_a_row_made_again_is_the_stored_one(family: str) -> None:
    """One of each kind; the others take `scripts/support-table`."""
    assert row_of(family) == STORED[family], f"run scripts/support-table {family}"


def test_a_disagreement_is_no_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support_table.TOLERANCE, "llama", 0.0)
    with pytest.raises(DisagreementError, match="apart"):
        row_of("llama")
