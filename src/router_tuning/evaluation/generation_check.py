"""Whether routed answers are still answers: beside dense, greedily, on the shipped prompts.

Losses can hide a model that repeats itself. So both answer the same prompts, and of each prompt is
measured: at how many tokens of dense's answer the routed model would go on as dense does, how far
the two answers are the same, how much of each repeats itself, and dense's loss on the routed one.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.data import default_prompts, evaluation_mode
from router_tuning.evaluation.paired import interval, mean, ratio_interval
from router_tuning.evaluation.variants import DENSE, Items, Ran, Variant
from router_tuning.sampling import continued, prompt_ids, stop_ids

PROMPTS, NEW_TOKENS, REPEATED = 32, 64, 4
"""Prompts by default, tokens of an answer at most, and the words' length in tokens whose repetition
is counted.
"""


class GenerationCheck:
    """Greedy answers beside dense ones.

    Args:
        model: routed.
        tokenizer: of it.
        limit: prompts; None takes PROMPTS.
        batch_size: prompts of one generation.
        max_new_tokens: of an answer.
    """

    name = "generation"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        limit: int | None = None,
        batch_size: int = 8,
        max_new_tokens: int = NEW_TOKENS,
    ) -> None:
        prompts = default_prompts()
        num = min(PROMPTS if limit is None else limit, len(prompts))
        spread = [prompts[i * len(prompts) // num] for i in range(num)]
        self.model, self.tokenizer = model, tokenizer
        self.inputs = prompt_ids(tokenizer, spread)
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.size = num
        self.dense_answers: list[list[int]] = []

    def measure(self, variant: Variant, tick: Callable[[int], None]) -> tuple[Items, Ran]:
        """Of each prompt: agreement, same (both 0 to 1), repetition (0 to 1), loss (nats, dense's
        of the whole answer), tokens. What ran is that of the generation.
        """
        answers, ran = self._answers(variant, tick)
        if variant.is_dense:
            self.dense_answers = answers
        likeliest, _ = self._read(self.dense_answers, variant)
        _, losses = self._read(answers, DENSE)
        items = [
            {
                "agreement": _share(picked, dense),
                "same": _same(answer, dense) / len(dense),
                "repetition": _repetition(answer),
                "loss": loss,
                "tokens": float(len(answer)),
            }
            for answer, dense, picked, loss in zip(
                answers, self.dense_answers, likeliest, losses, strict=True
            )
        ]
        return items, ran

    def _answers(
        self, variant: Variant, tick: Callable[[int], None]
    ) -> tuple[list[list[int]], Ran]:
        """Greedy answers, their end token included."""
        ran, found = Ran(), []
        stops = set(stop_ids(self.model, self.tokenizer))
        with torch.no_grad(), evaluation_mode(self.model), variant.on(self.model) as options:
            for start in range(0, self.size, self.batch_size):
                rows = self.inputs[start : start + self.batch_size]
                with ran.counting(self.model, variant):
                    new = continued(
                        self.model,
                        self.tokenizer,
                        rows,
                        self.max_new_tokens,
                        do_sample=False,
                        **options,
                    )
                found += [_until(row, stops) for row in new]
                tick(len(rows))
        return found, ran

    def _read(
        self, answers: Sequence[list[int]], variant: Variant
    ) -> tuple[list[list[int]], list[float]]:
        """The likeliest token at each place of the answers, and the answers' losses in nats."""
        picked: list[list[int]] = []
        losses: list[float] = []
        with torch.no_grad(), evaluation_mode(self.model), variant.on(self.model) as options:
            for start in range(0, self.size, self.batch_size):
                stop = start + self.batch_size
                rows = list(zip(self.inputs[start:stop], answers[start:stop], strict=True))
                ids_BT, mask_BT = _padded([prompt + answer for prompt, answer in rows], self.model)
                logits_BTV = self.model(
                    input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **options
                ).logits
                for logits_TV, (prompt, answer) in zip(logits_BTV, rows, strict=True):
                    first = len(prompt) - 1
                    said = logits_TV[first : first + len(answer)].float()
                    wanted = torch.tensor(answer, device=said.device)
                    picked.append(said.argmax(-1).tolist())
                    loss = torch.nn.functional.cross_entropy(said, wanted, reduction="sum")
                    losses.append(float(loss))
        return picked, losses

    def about(self) -> dict[str, Any]:
        """Kind and lengths."""
        return {"kind": "generation", "max_new_tokens": self.max_new_tokens}

    def summary(self, items: Items) -> dict[str, Any]:
        """Means over prompts; dense's loss in nats a token of the answers."""
        tokens = sum(item["tokens"] for item in items)
        return {
            "rows": len(items),
            "tokens": tokens,
            "repetition": mean([item["repetition"] for item in items]),
            "loss_of_dense": sum(item["loss"] for item in items) / tokens,
        }

    def beside_dense(self, items: Items, dense: Items) -> dict[str, Any]:
        """Agreement, how much is the same, and how much more repeats itself."""
        more = [a["repetition"] - b["repetition"] for a, b in zip(items, dense, strict=True)]
        lengths = [item["tokens"] for item in items]
        return {
            "agreement": interval([item["agreement"] for item in items]),
            "same_beginning": mean([item["same"] for item in items]),
            "repetition_difference": interval(more),
            "loss_of_dense_interval": ratio_interval([item["loss"] for item in items], lengths),
        }


def _padded(rows: Sequence[list[int]], model: nn.Module) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    device = next(model.parameters()).device
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def _until(row: list[int], stops: set[int]) -> list[int]:
    """Up to the first end token, which is part of it."""
    end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
    return row[:end]


def _share(picked: Sequence[int], wanted: Sequence[int]) -> float:
    return mean([float(a == b) for a, b in zip(picked, wanted, strict=True)])


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first difference."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _repetition(row: Sequence[int]) -> float:
    """Share of an answer's runs of REPEATED tokens that were there before."""
    runs = [tuple(row[i : i + REPEATED]) for i in range(len(row) - REPEATED + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
