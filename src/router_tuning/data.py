"""Text in, token windows out: what routers are tuned, calibrated and measured on.

Examples come from a local file, a hub data set, or the frozen model itself (sampling.py).
`make_windows` tokenises them under the model's own chat template and cuts the stream into windows
of equal length, each token marked as answer or not. Knows nothing of routers.

Shapes: N windows, L tokens of a window.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from router_tuning.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Called with (done, total) as work goes on."""

FORMS = (("messages",), ("prompt", "response"), ("question", "answer"), ("text",))
WANTED = (
    'wanted {"messages": [{"role", "content"}, ...]}, {"prompt", "response"}, '
    '{"question", "answer"} or {"text"}'
)
HUB_FORMS = "org/name, org/name:config or org/name:config:split"
FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
_PATH_SUFFIXES = {*FILE_SUFFIXES, ".gz", ".json", ".csv", ".tsv", ".parquet", ".md", ".zip", ".zst"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")

_MARK = "q7Jx{}Wz"  # stands for the i-th message while a template's own text is found out
_MARKS = re.compile(r"q7Jx(\d+)Wz")
_CHARS_PER_TOKEN = (
    16  # far above what real text has, so that a head this long holds the tokens asked for
)


@dataclass(frozen=True)
class Example:
    """One conversation, or one plain text: exactly one of the two is set."""

    messages: tuple[dict[str, str], ...] | None = None
    text: str | None = None


def load_examples(source: str | Path, *, limit: int | None = None) -> list[Example]:
    """Read examples from a local file or, by name, from the hub.

    Args:
        source: a `.jsonl` file (each row in one of the four FORMS), a `.txt` file (one example, the
            whole text), either also with `.gz`, or the id of a hub data set: `org/name`,
            `org/name:config`, or `org/name:config:split` (the split is "train" unless named).
        limit: at most so many examples. None reads all.

    Raises:
        DataError: missing, unreadable, empty or malformed; a file's line number is named.
    """
    at_least(1, limit=limit)
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(
            f"{source} is a folder; wanted a file ({', '.join(FILE_SUFFIXES)}) or a hub id"
        )
    if path.exists():
        found = _file_examples(path)
    elif isinstance(source, Path) or _looks_like_path(source):
        raise DataError(
            f"no such file: {source}; wanted a file ({', '.join(FILE_SUFFIXES)}) or a hub id "
            f"({HUB_FORMS})"
        )
    else:
        found = _hub_examples(source)
    examples = list(islice(found, limit))
    if not examples:
        raise DataError(f"{source} is empty: it holds no example; {WANTED}")
    return examples


def default_prompts() -> list[str]:
    """The prompts shipped with the package, for tuning without any data."""
    return resources.files("router_tuning").joinpath("prompts.txt").read_text("utf-8").splitlines()


def _looks_like_path(name: str) -> bool:
    suffixes = {Path(name).suffix.lower()}
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or bool(suffixes & _PATH_SUFFIXES)
        or not _HUB_ID.fullmatch(name)
    )


def _file_examples(path: Path) -> Iterator[Example]:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".txt"):
        text = "".join(line for _, line in _lines(path)).replace("\r\n", "\n")
        if text.strip():
            yield Example(text=text)
    elif name.endswith(".jsonl"):
        for where, row in json_rows(path):
            yield _example(row, where)
    else:
        raise DataError(
            f"{path}: unknown kind of file; wanted a name ending in {', '.join(FILE_SUFFIXES)}"
        )


def json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a `.jsonl` file (also with `.gz`), each with the words for where it stands.

    Raises:
        DataError: unreadable, or a line that is no JSON.
    """
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _row(line, where)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, numbered from 1."""
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: wanted UTF-8 text, got {error.reason}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read after line {number} ({error})") from error


def _row(line: str, where: str) -> object:
    try:
        return json.loads(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON ({error.msg}, column {error.colno}); wanted one JSON object "
            f"a line"
        ) from error


def _hub_examples(name: str) -> Iterator[Example]:
    import datasets  # slow to import, and most runs read local files

    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # many kinds: offline, unknown name, no such split, needs a config
        lines = str(error).strip().split("\n")
        reason = " ".join(lines[: 2 if "config" in lines[0].lower() else 1])  # which there are
        raise DataError(
            f"cannot load the data set {name!r} from the hub ({type(error).__name__}: {reason}). "
            f"Check its name ({HUB_FORMS}) and the network, or give a local file "
            f"({', '.join(FILE_SUFFIXES)})"
        ) from error
    for number, row in enumerate(rows):
        yield _example(row, f"{name}, row {number}")


def _example(row: object, where: str) -> Example:
    """One row in one of the four FORMS; a field that is null counts as absent."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: {WANTED}, got a {type(row).__name__}")
    present = {key for key, value in row.items() if value is not None}
    form = next((form for form in FORMS if present.issuperset(form)), None)
    if form is None:
        half = next((form for form in FORMS if present.intersection(form)), None)
        got = f"got the fields {', '.join(map(repr, row)) or 'none'}"
        if half:
            missing = ", ".join(repr(key) for key in half if key not in present)
            raise DataError(f"{where}: missing {missing}; {WANTED}, {got}")
        raise DataError(f"{where}: {WANTED}, {got}")
    if form == ("messages",):
        return Example(messages=_messages(row["messages"], where))
    values = [_content(row[key], key, where) for key in form]
    if form == ("text",):
        return Example(text=values[0])
    return Example(messages=turns(*values))


def _messages(messages: object, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: messages must be a list of at least one message, got {messages!r:.80}"
        )
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(
                f'{where}: message {number} must be {{"role", "content"}}, got {message!r:.80}'
            )
    return tuple(
        {
            key: _content(message[key], f"{key} of message {number}", where)
            for key in ("role", "content")
        }
        for number, message in enumerate(messages)
    )


def turns(prompt: str, response: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})


def _content(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} must be a text, got {value!r:.80}")
    if not value.strip():
        raise DataError(f"{where}: {name} is empty; leave the row out")
    try:
        value.encode()
    except (
        UnicodeEncodeError
    ) as error:  # JSON can spell half a surrogate pair; tokenizers fail on it
        raise DataError(f"{where}: {name} holds an invalid character ({error.reason})") from error
    return value


def at_least(low: int, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < low:
            raise ConfigError(f"{name} must be at least {low}, got {value}")


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows of equal length, without padding."""

    ids: Tensor
    """Token ids, int64 (N, L)."""
    answer: Tensor
    """True at the tokens that an assistant wrote, its end of turn included: bool (N, L)."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """All tokens of all windows."""
        return self.ids.numel()

    def take(self, indices: Sequence[int] | Tensor) -> Windows:
        """The windows at these indices, in this order."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        return Windows(self.ids[rows], self.answer[rows])

    def split(self, fraction: float, seed: int = 0) -> tuple[Windows, Windows]:
        """Hold back a random fraction of the windows: (the rest, held back), at least one in each.

        Raises:
            ConfigError: the fraction is not between 0 and 1.
            DataError: there is only one window.
        """
        if not 0.0 < fraction < 1.0:
            raise ConfigError(f"the fraction to hold back must be between 0 and 1, got {fraction}")
        if len(self) < 2:
            raise DataError(
                "there is one window only, so none can be held back; give more text or shorter "
                "windows"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held = min(max(round(fraction * len(self)), 1), len(self) - 1)
        return self.take(order[held:].sort().values), self.take(order[:held].sort().values)


def interleaved(data: Windows, others: Windows, number: int, num_others: int) -> Windows:
    """So many windows, `num_others` of them of the others, spread evenly; where one of both has too
    few, they come again.
    """
    place = torch.arange(number)
    others_before = (place * num_others) // number
    is_other = ((place + 1) * num_others) // number > others_before
    both = Windows(torch.cat([data.ids, others.ids]), torch.cat([data.answer, others.answer]))
    of_others = len(data) + others_before % len(others)
    return both.take(torch.where(is_other, of_others, (place - others_before) % len(data)))


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Windows as a training set: {"input_ids": (L,), "labels": (L,)}.

    Labels are the ids (a causal LM shifts them itself). With `answers_only` they are -100 outside
    answers, and windows without an answer token to predict are left out.
    """

    def __init__(self, windows: Windows, *, answers_only: bool = False) -> None:
        if answers_only:
            windows = windows.take(windows.answer[:, 1:].any(dim=1).nonzero().flatten())
            if not len(windows):
                raise DataError(
                    "no window holds an answer; give conversations, or train on all tokens"
                )
        self.windows = windows
        self.answers_only = answers_only

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, answer = self.windows.ids[index], self.windows.answer[index]
        labels = ids.masked_fill(~answer, -100) if self.answers_only else ids.clone()
        return {"input_ids": ids, "labels": labels}


def make_windows(
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    *,
    length: int = 256,
    limit: int | None = None,
) -> Windows:
    """Tokenise examples into one stream and cut it into windows.

    Conversations are written by the model's chat template, or where the tokenizer has none as
    `User: ...\\nAssistant: ...\\n\\n`. A plain text is taken as it is; the end-of-text token stands
    between it and what follows. Where the tokenizer begins a text with a bos token, every window
    begins with it: such models are far off without it. No other bos is added. What is left over is
    dropped, unless it is all there is: then it makes one shorter window.

    Args:
        tokenizer: the model's own.
        examples: conversations and texts; read only as far as needed.
        length: L, tokens of a window, at least 2.
        limit: at most so many windows. None makes all.

    Raises:
        DataError: fewer than two tokens, or a conversation that the chat template refuses.
    """
    at_least(2, length=length)
    at_least(1, limit=limit)
    stream = _Stream([], [])
    wanted = None if limit is None else limit * length
    after_text = False
    for number, example in enumerate(examples):
        if after_text and tokenizer.eos_token_id not in (None, stream.ids[-1]):
            stream.add([tokenizer.eos_token_id], [False])
        if example.messages is not None:
            stream.add(*_chat_tokens(tokenizer, example.messages, f"example {number}"))
        else:
            ids = _text_tokens(tokenizer, example.text or "", wanted and wanted - len(stream.ids))
            stream.add(ids, [False] * len(ids))
        after_text = example.messages is None
        if wanted is not None and len(stream.ids) >= wanted:
            break
    return stream.cut(length, limit, leading_bos(tokenizer))


@dataclass
class _Stream:
    """All tokens in order, each marked as answer or not."""

    ids: list[int]
    answer: list[bool]

    def add(self, ids: list[int], answer: list[bool]) -> None:
        self.ids += ids
        self.answer += answer

    def cut(self, length: int, limit: int | None, bos: int | None) -> Windows:
        ids: list[list[int]] = []
        answer: list[list[bool]] = []
        position = 0
        while position < len(self.ids) and (limit is None or len(ids) < limit):
            lead = 0 if bos is None or self.ids[position] == bos else 1
            end = position + length - lead
            if end > len(self.ids) and ids:
                break
            ids.append([bos or 0] * lead + self.ids[position:end])
            answer.append([False] * lead + self.answer[position:end])
            position = end
        if not ids or len(ids[0]) < 2:
            raise DataError(f"the text is too short: wanted at least 2 tokens, got {len(self.ids)}")
        return Windows(torch.tensor(ids), torch.tensor(answer))


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The bos token if the tokenizer begins a plain text with it, else None."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _text_tokens(tokenizer: PreTrainedTokenizerBase, text: str, wanted: int | None) -> list[int]:
    """The tokens of a text; where only `wanted` are needed, of a head that is long enough."""
    if wanted is not None and len(text) > _CHARS_PER_TOKEN * wanted:
        ids: list[int] = tokenizer(text[: _CHARS_PER_TOKEN * wanted], verbose=False)["input_ids"]
        if len(ids) >= 2 * wanted:  # what the cut may have changed lies far behind
            return ids[:wanted]
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids


def _chat_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], where: str
) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which of them are answer."""
    templated = bool(tokenizer.chat_template)
    text, spans = _rendered(tokenizer, messages, where) if templated else plain_chat(messages)
    special = not templated  # a template writes its own bos
    if not tokenizer.is_fast:
        return _slow_tokens(tokenizer, text, spans, special)
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )
    offsets = encoded["offset_mapping"]
    answer = [any(start < b and end > a for a, b in spans) for start, end in offsets]
    return encoded["input_ids"], answer


def _slow_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]], special: bool
) -> tuple[list[int], list[bool]]:
    """As _chat_tokens, where there are no offsets: the text before a place is tokenised alone."""

    def tokens(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    ids = tokens(text)
    answer = [False] * len(ids)
    for a, b in spans:
        first, last = _agreement(tokens(text[:a]), ids)[0], _agreement(tokens(text[:b]), ids)[1]
        answer[first:last] = [True] * (last - first)
    return ids, answer


def _agreement(prefix: list[int], ids: list[int]) -> tuple[int, int]:
    """Tokens that a text shares with its prefix, without and with the one that the cut parts."""
    same = next((i for i, (p, t) in enumerate(zip(prefix, ids, strict=False)) if p != t), None)
    return (len(prefix), len(prefix)) if same is None else (same, same + 1)


def plain_chat(messages: Sequence[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """A conversation for models without a chat template, and where its answers are."""
    text, spans = "", []
    for message in messages:
        is_answer = message["role"] == "assistant"
        text += f"{message['role'].capitalize()}: "
        turn = message["content"] + ("\n\n" if is_answer else "\n")
        if is_answer:
            spans.append((len(text), len(text) + len(turn)))
        text += turn
    return text, spans


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], where: str
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation under the model's chat template, and where its answers are.

    The template is also run with marks for answers, which tells its own text from theirs: an answer
    is found even if it is a word of the template, is trimmed by it, or loses its reasoning.
    """
    text = templated(tokenizer, messages, where)
    marked = [
        {**m, "content": _MARK.format(i)} if m["role"] == "assistant" else m
        for i, m in enumerate(messages)
    ]
    begin, *rest = _MARKS.split(templated(tokenizer, marked, where))
    ends = (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())
    position, spans = len(begin), []
    for index, after in zip(map(int, rest[::2]), rest[1::2], strict=True):
        end = _content_end(text, position, messages[index]["content"], after)
        if end < 0 or not text.startswith(begin):
            raise DataError(
                f"{where}: the answers cannot be told from the rest of this conversation under the "
                f"model's chat template; leave it out, or give it as a text"
            )
        spans.append((position, end + _end_of_turn(after, ends)))
        position = end + len(after)
    return text, spans


def templated(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    where: str,
    generation_prompt: bool = False,
) -> str:
    try:
        text: Any = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception as error:  # whatever a template's own code raises
        raise DataError(
            f"{where}: the model's chat template refuses this conversation: {error}"
        ) from error
    return str(text)


def _content_end(text: str, start: int, content: str, after: str) -> int:
    """Where the content that begins at `start` ends, before the template's text after it, or -1."""
    for written in (content, content.strip(), content.lstrip(), content.rstrip()):
        if text.startswith(written + after, start):
            return start + len(written)
    return text.find(after, start) if after else len(text)


def _end_of_turn(after: str, special_tokens: Iterable[str]) -> int:
    """Length of the end-of-turn token that a template's text starts with (after blanks), or 0."""
    blanks = len(after) - len(after.lstrip())
    return max(
        (blanks + len(t) for t in special_tokens if t and after.startswith(t, blanks)), default=0
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off inside the block; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
