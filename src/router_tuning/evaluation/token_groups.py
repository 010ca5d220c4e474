"""Groups of a text's tokens that routing may treat alike: kinds, quarters by frequency and by loss.

Every grouping gives each token at most one label. Knows no model; losses are handed in.

Shapes: N windows, L tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = (
    "window start",
    "special",
    "line break",
    "digit",
    "punctuation",
    "word start",
    "word continuation",
    "other",
)
"""The first that fits counts. `special` are tokens that no text is written in (a chat template's
marks, ends of text); `other` are spaces alone and parts of characters."""
FREQUENCIES = ("rarest", "rare", "frequent", "most frequent")
LOSSES = ("easiest", "easy", "hard", "hardest")

START, SPECIAL, LINE_BREAK, DIGIT, PUNCTUATION, WORD, CONTINUATION, OTHER = range(len(KINDS))
_PART_OF_A_CHARACTER = "\ufffd"


@dataclass(frozen=True, eq=False)
class Groups:
    """A label for each token."""

    names: tuple[str, ...]
    label_NL: Tensor
    """Index into names; -1 where a token is in none."""


def kinds(tokenizer: PreTrainedTokenizerBase, ids_NL: Tensor) -> Groups:
    """The kind of each token, from its own text and that of the token before it."""
    texts = _texts(tokenizer, sorted(set(ids_NL.flatten().tolist())))
    special = _special_ids(tokenizer)
    rows = [_row(row, texts, special) for row in ids_NL.tolist()]
    return Groups(KINDS, torch.tensor(rows))


def frequency_quarters(ids_NL: Tensor) -> Groups:
    """Quarters of the tokens by how often their like stands in this very text."""
    _, inverse_NL, count = torch.unique(ids_NL, return_inverse=True, return_counts=True)
    return Groups(FREQUENCIES, _quarters(count[inverse_NL].double()))


def loss_quarters(loss_NL: Tensor) -> Groups:
    """Quarters of the tokens by a loss; NaN is in none."""
    return Groups(LOSSES, _quarters(loss_NL))


def _quarters(value_NL: Tensor) -> Tensor:
    """The quarter of each value among all. Equal values stay together, so quarters may differ in
    size.
    """
    label_NL = torch.full(value_NL.shape, -1)
    known_NL = value_NL.isfinite()
    _, inverse, count = torch.unique(value_NL[known_NL], return_inverse=True, return_counts=True)
    middle = count.cumsum(0) - count / 2
    label_NL[known_NL] = (4 * middle / known_NL.sum()).long().clamp(max=3)[inverse]
    return label_NL


def _row(ids: list[int], texts: dict[int, str], special: set[int]) -> list[int]:
    before = ["", *(texts[i] for i in ids)]
    labels = [
        SPECIAL if i in special else _kind(texts[i], last)
        for i, last in zip(ids, before, strict=False)
    ]
    return [START, *labels[1:]]


def _kind(text: str, before: str) -> int:
    bare = text.strip()
    if not bare:
        return LINE_BREAK if "\n" in text else OTHER
    if any(c.isalpha() for c in bare):
        inside = not text[0].isspace() and before[-1:].isalnum()
        return CONTINUATION if inside else WORD
    if any(c.isdigit() for c in bare):
        return DIGIT
    return OTHER if _PART_OF_A_CHARACTER in bare else PUNCTUATION


def _texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> dict[int, str]:
    """What each token adds to a text. Some tokenizers leave a space out at a text's beginning, so
    another token stands before.
    """
    first: int = tokenizer("a", add_special_tokens=False)["input_ids"][-1]

    def text(*of: int) -> str:
        return str(tokenizer.decode([first, *of], clean_up_tokenization_spaces=False))

    length = len(text())
    return {i: text(i)[length:] for i in ids}


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
