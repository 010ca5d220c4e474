"""lm-evaluation-harness beside our models: its tasks, and its HFLM asking a routed model.

lm-eval is imported inside functions only: it is the extra `eval`.

HFLM pads rows on the right with zeros and hands no attention mask on. Logits before the padding do
not depend on it, but the record would count it, so a mask is made here. And only the logits of the
positions that are scored are asked for.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.data import evaluation_mode
from router_tuning.errors import ConfigError, DataError
from router_tuning.evaluation.local_tasks import (
    LOCAL,
    PAPER,
    WORKED_CONFIG,
    local_configs,
    metrics_of,
)
from router_tuning.evaluation.variants import Ran, Variant
from router_tuning.units import last_columns, unwrap

Tick = Callable[[int], None]
"""Called with the number of requests done since the last call."""

LOGIT_BYTES = 2**30
"""Most bytes of fp32 logits that a batch may have."""
WORKED_ON_THE_HUB = {
    "dataset_path": "openai/gsm8k",
    "dataset_name": "main",
    "training_split": "train",
    "fewshot_split": "train",
    "test_split": "test",
}


@contextmanager
def quiet() -> Iterator[None]:
    """No talk of lm-eval's own inside the block; imports it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import lm_eval  # noqa: F401  whether it is there
    except ImportError as error:
        raise ConfigError(
            "tasks run in lm-evaluation-harness, which is not installed; run pip install "
            '"router-tuning[eval]"'
        ) from error
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def load_parts(name: str, folder: Path | None, shots: int | None) -> list[Any]:
    """The tasks of lm-eval that a name stands for: one, or those of a group.

    Args:
        name: in a folder one of LOCAL, else any of the harness's own.
        folder: of local JSONL files; None takes the harness's own data.
        shots: few-shot examples; None takes the paper's number, or else the task's own.

    Raises:
        ConfigError: unknown name, or lm-eval is not installed.
        DataError: the data cannot be had, or is malformed.
    """
    wanted = PAPER[name].shots if shots is None and name in PAPER else shots
    with quiet():
        from lm_eval.api.task import ConfigurableTask

        if folder is not None:
            if name not in LOCAL:
                raise _unknown(name, sorted(LOCAL), f"local files ({folder})")
            configs = local_configs(name, folder, wanted or 0)
            return [ConfigurableTask(config=config) for config in configs]
        parts = [_worked_from_hub(wanted or 0)] if name == "gsm8k" else _own(name)
        for part in parts:
            given = part.get_config("num_fewshot") or 0 if wanted is None else wanted
            part.set_config(key="num_fewshot", value=given)
    return parts


def _own(name: str) -> list[Any]:
    """The harness's own task, or those of its group."""
    manager = _manager()
    if name not in manager.all_tasks:
        raise _unknown(name, list(manager.all_tasks), "the harness")
    try:
        return list(manager.load([name])["tasks"].values())
    except Exception as error:  # of many kinds: offline, no such data set, a changed repository
        raise _no_data(name, error) from error


@functools.cache
def _manager() -> Any:
    """The harness's index of its tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _worked_from_hub(shots: int) -> Any:
    from lm_eval.api.task import ConfigurableTask

    config = {**WORKED_CONFIG, **WORKED_ON_THE_HUB, "task": "gsm8k", "num_fewshot": shots}
    try:
        return ConfigurableTask(config={**config, "metric_list": metrics_of("loglikelihood")})
    except Exception as error:  # as above
        raise _no_data("gsm8k", error) from error


def _no_data(name: str, error: Exception) -> DataError:
    reason = str(error).strip().split("\n")[0]
    return DataError(
        f"cannot load the data of the task {name} ({type(error).__name__}: {reason}). Check the "
        f"network, or give local files with --task-data DIR"
    )


def _unknown(name: str, known: Sequence[str], of: str) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=5) or (known if len(known) < 20 else [])
    hint = f"; wanted one such as {', '.join(near)}" if near else ""
    return ConfigError(f"unknown task {name!r} of {of}{hint}")


class Harness:
    """HFLM over one model, asked under one variant after another.

    Args:
        model: a routed causal LM or a PEFT model of one.
        tokenizer: of it; it is copied, since HFLM may give it a pad token.
        batch_size: requests of one forward, at most. Results do not depend on it.
        max_length: tokens of a request, at most; longer ones lose their beginning. None takes the
            model's own.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, batch_size: int, max_length: int | None = None
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        with quiet(), evaluation_mode(model):
            from lm_eval.models.huggingface import HFLM

            self.lm: Any = HFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size,
                max_length=max_length,
                backend="causal",
            )

    def ask(
        self, requests: Sequence[Any], variant: Variant, tick: Tick
    ) -> tuple[list[tuple[float, bool]], Ran]:
        """What lm-eval's loglikelihood gives for each request (nats, whether it was the likeliest
        text), and what ran for it.
        """
        ran = Ran()
        pairs = [self.lm._encode_pair(*request.args) for request in requests]
        scored = max(len(continuation) for _, continuation in pairs)
        longest = max(len(context) + len(continuation) for context, continuation in pairs)
        self.lm.batch_size_per_gpu = self._rows(min(longest, self.lm.max_length))
        self.lm.set_cache_hook(_Hook(tick))
        with quiet(), evaluation_mode(self.model), variant.on(self.model) as options:

            def call(ids_BT: Tensor) -> Tensor:
                with torch.no_grad(), ran.counting(self.model, variant):
                    return _scored_logits(self.model, ids_BT, scored, options)

            self.lm._model_call = call
            found = self.lm.loglikelihood(list(requests), disable_tqdm=True)
        return found, ran

    def _rows(self, longest: int) -> int:
        causal: Any = unwrap(self.model)
        vocabulary = causal.get_input_embeddings().weight.shape[0]
        return max(min(self.batch_size, LOGIT_BYTES // (4 * vocabulary * longest)), 1)

    def num_tokens(self, request: Any) -> int:
        """Tokens of what a request scores."""
        return len(self.lm._encode_pair(*request.args)[1])


class _Hook:
    """Stands where lm-eval has its cache, and is told of each answer."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.tick(1)


def _scored_logits(
    model: nn.Module, ids_BT: Tensor, scored: int, options: Mapping[str, float]
) -> Tensor:
    """Logits of the last positions, as many as hold each row's last `scored` tokens: (B, <=T, V).

    HFLM counts its positions from the end, so it may get fewer than it gave tokens.
    """
    real_BT = _real(ids_BT)
    given: dict[str, Any] = dict(options)
    if not bool(real_BT.all()):
        given["attention_mask"] = real_BT.long()
    if "logits_to_keep" in inspect.signature(type(unwrap(model)).forward).parameters:
        padding = ids_BT.shape[1] - int(real_BT.sum(1).min())
        given["logits_to_keep"] = last_columns(
            min(scored + padding, ids_BT.shape[1]), ids_BT.device
        )
    logits: Tensor = model(input_ids=ids_BT, use_cache=False, **given).logits
    return logits


def _real(ids_BT: Tensor) -> Tensor:
    """False at the zeros that a row ends in, but for its first token: bool (B, T)."""
    after_BT = (ids_BT != 0).flip(1).cummax(1).values.flip(1)
    after_BT[:, 0] = True
    return after_BT
