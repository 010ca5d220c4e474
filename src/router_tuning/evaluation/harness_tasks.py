"""The two kinds of tasks that come from lm-evaluation-harness, and what is reported of them.

Prompts, requests and what counts as right are the harness's own; requests are made once, so that
every variant of the model is asked the very same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from router_tuning.errors import DataError
from router_tuning.evaluation.harness import Harness, Tick
from router_tuning.evaluation.local_tasks import PAPER
from router_tuning.evaluation.paired import interval, mean, ratio_interval, standard_error
from router_tuning.evaluation.variants import Items, Ran, Variant

CLEARLY = 3
"""Standard errors over chance from which on a share of dense's score means something."""


class _FromHarness:
    """The rows of a task's parts, as requests that are the same for every variant."""

    def __init__(
        self, name: str, parts: Sequence[Any], harness: Harness, limit: int | None
    ) -> None:
        self.name = name
        self.harness = harness
        self.parts = parts
        self.shots = max(part.get_config("num_fewshot") or 0 for part in parts)
        self.rows = [_requests(part, docs, i) for part, docs, i in _spread(parts, limit)]
        self.size = sum(len(requests) for _, requests in self.rows)

    def answers(
        self, variant: Variant, tick: Tick
    ) -> tuple[list[tuple[Any, list[Any], list[tuple[float, bool]]]], Ran]:
        """Of each row its part, its requests, and what the model said to them."""
        flat = [request for _, requests in self.rows for request in requests]
        said, ran = self.harness.ask(flat, variant, tick)
        answers = iter(said)
        rows = [(part, asked, [next(answers) for _ in asked]) for part, asked in self.rows]
        return rows, ran


def _spread(parts: Sequence[Any], limit: int | None) -> Iterator[tuple[Any, Any, int]]:
    """Parts, their rows, and a row's number: all of them, or so many at equal distances, since
    files are often sorted.
    """
    rows = [(part, part.eval_docs) for part in parts]  # which may be made anew at each access
    places = [(part, docs, i) for part, docs in rows for i in range(len(docs))]
    num = len(places) if limit is None else min(limit, len(places))
    return (places[i * len(places) // num] for i in range(num))


def _requests(part: Any, docs: Any, index: int) -> tuple[Any, list[Any]]:
    """lm-eval's requests for a row. Its few-shot examples are drawn by its own number, so they are
    the same whatever other rows are asked.
    """
    doc = docs[index]
    part.set_fewshot_seed(index)
    context = part.fewshot_context(doc, part.get_config("num_fewshot") or 0)
    made = part.construct_requests(doc, context, metadata=(part.task_name, index, 1))
    return part, made if isinstance(made, list) else [made]


class ChoiceTask(_FromHarness):
    """Multiple choice: whether the gold answer is the likeliest, and how likely it is."""

    @property
    def metric(self) -> str:
        """lm-eval's name of what is counted as right."""
        known = PAPER.get(self.name)
        has = {name for part in self.parts for name in part.aggregation()}
        normalised = known.normalised if known is not None else "acc_norm" in has
        return "acc_norm" if normalised else "acc"

    def measure(self, variant: Variant, tick: Tick) -> tuple[Items, Ran]:
        """Of each row: score (0 or 1), gold (nats), among (nats, of the gold answer if it has to be
        one of the choices), chars of the gold answer, chance.
        """
        rows, ran = self.answers(variant, tick)
        return [self._item(*row) for row in rows], ran

    def _item(
        self, part: Any, requests: list[Any], said: list[tuple[float, bool]]
    ) -> dict[str, float]:
        doc = requests[0].doc
        choices = part.doc_to_choice(doc)
        gold = _gold(part, doc, choices)
        text = requests[gold].args[1]
        return {
            "score": float(part.process_results(doc, said)[self.metric]),
            "gold": said[gold][0],
            "among": _among([answer for answer, _ in said[: len(choices)]], gold),
            "chars": float(max(len(text) - len(part.get_config("target_delimiter")), 1)),
            "chance": 1 / len(choices),
        }

    def about(self) -> dict[str, Any]:
        """Kind, metric, shots."""
        return {"kind": "choice", "metric": self.metric, "shots": self.shots}

    def summary(self, items: Items) -> dict[str, Any]:
        """Accuracy with its standard error and above chance; the gold answer's log-likelihood."""
        scores = [item["score"] for item in items]
        accuracy, chance = mean(scores), mean([item["chance"] for item in items])
        return {
            "rows": len(items),
            "accuracy": accuracy,
            "stderr": standard_error(scores),
            "chance": chance,
            "above_chance": accuracy - chance,
            "gold_log_likelihood": mean([item["gold"] for item in items]),
        }

    def beside_dense(self, items: Items, dense: Items) -> dict[str, Any]:
        """Paired differences to dense, and the share of dense's score above chance."""
        pairs = list(zip(items, dense, strict=True))
        gold = [one["gold"] - other["gold"] for one, other in pairs]
        by_char = [d / one["chars"] for d, one in zip(gold, items, strict=True)]
        there = self.summary(dense)
        clear = there["stderr"] is not None and there["above_chance"] > CLEARLY * there["stderr"]
        ours = self.summary(items)["above_chance"]
        return {
            "share_above_chance": ours / there["above_chance"] if clear else None,
            "accuracy_difference": interval([a["score"] - b["score"] for a, b in pairs]),
            "gold_difference": interval(gold),
            "among_choices_difference": interval([a["among"] - b["among"] for a, b in pairs]),
            "gold_difference_per_char": interval(by_char) if self.metric == "acc_norm" else None,
        }


def _among(likelihoods: Sequence[float], gold: int) -> float:
    """Log-probability of the gold answer where one of the choices is given (a log-softmax)."""
    most = max(likelihoods)
    return likelihoods[gold] - most - math.log(sum(math.exp(v - most) for v in likelihoods))


def _gold(part: Any, doc: Any, choices: list[str]) -> int:
    """Index of a row's gold answer; the first of several."""
    gold = part.doc_to_text(doc) if part.multiple_input else part.doc_to_target(doc)
    gold = gold[0] if isinstance(gold, list) else gold
    index = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
    if not isinstance(index, int) or not 0 <= index < len(choices):
        raise DataError(f"{part.task_name}: no choice is the gold answer {gold!r}")
    return index


class LossTask(_FromHarness):
    """The loss of a given answer, such as a worked solution."""

    def measure(self, variant: Variant, tick: Tick) -> tuple[Items, Ran]:
        """Of each row: loss (nats, of the whole answer), tokens."""
        rows, ran = self.answers(variant, tick)
        items = [
            {"loss": -said[0][0], "tokens": float(self.harness.num_tokens(requests[0]))}
            for _, requests, said in rows
        ]
        return items, ran

    def about(self) -> dict[str, Any]:
        """Kind, metric, shots."""
        return {"kind": "loss", "metric": "nats a token", "shots": self.shots}

    def summary(self, items: Items) -> dict[str, Any]:
        """Nats a token, over all answers' tokens."""
        tokens = sum(item["tokens"] for item in items)
        loss = sum(item["loss"] for item in items) / tokens
        return {"rows": len(items), "tokens": int(tokens), "loss": loss}

    def beside_dense(self, items: Items, dense: Items) -> dict[str, Any]:
        """The paired difference, in nats a token."""
        more = [one["loss"] - other["loss"] for one, other in zip(items, dense, strict=True)]
        return {"loss_difference": ratio_interval(more, [item["tokens"] for item in items])}
