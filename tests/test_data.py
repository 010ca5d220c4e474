"""Text to windows: files in every form, what is wrong with them by line, answers found by token."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.data import default_data_collator

from router_tuning.data import (
    Example,
    WindowDataset,
    Windows,
    default_prompts,
    evaluation_mode,
    interleaved,
    load_examples,
    make_windows,
)
from router_tuning.errors import ConfigError, DataError
from tiny import BOS, EOS, tiny_tokenizer


def chat(*turns: str) -> Example:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return Example(
        messages=tuple({"role": roles[i % 2], "content": t} for i, t in enumerate(turns))
    )


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def answers(tokenizer: PreTrainedTokenizerFast, windows: Windows) -> str:
    """What the windows mark as answer, as text."""
    return str(tokenizer.decode(windows.ids[windows.answer]))


# The prompts that ship with the package


def test_default_prompts_are_300_different_lines() -> None:
    prompts = default_prompts()
    assert len(prompts) == 300
    assert len({p.lower() for p in prompts}) == 300
    assert all(p == p.strip() and len(p) >= 10 and p.isascii() for p in prompts)


# Files


def write_jsonl(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_every_form_is_recognised_row_by_row(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = write_jsonl(
        tmp_path / "mixed.jsonl",
        {"messages": messages},
        {"prompt": "a?", "response": "b"},
        "",
        {"question": "c?", "answer": "d", "text": None},
        {"text": "e \u00e9", "prompt": None, "id": 7},
    )
    assert load_examples(path) == [
        Example(messages=tuple(messages)),
        chat("a?", "b"),
        chat("c?", "d"),
        Example(text="e \u00e9"),
    ]
    assert load_examples(str(path), limit=2) == [Example(messages=tuple(messages)), chat("a?", "b")]


def test_text_file_is_one_example(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert load_examples(path) == [Example(text="one\n\ntwo\n")]


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl.gz", '{"text": "packed"}\n'), ("a.txt.gz", "packed")]
)
def test_packed_file(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()))
    assert load_examples(path) == [Example(text="packed")]


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "x"}, {"text": "y"}, "{broken")
    assert len(load_examples(path, limit=2)) == 2
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
        load_examples(path, limit=0)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": "cut of', "not valid JSON (Unterminated string"),
        ("[1, 2]", "got a list"),
        ({}, "got the fields none"),
        ({"body": "x", "id": 1}, "got the fields 'body', 'id'"),
        ({"prompt": "x"}, "missing 'response'"),
        ({"answer": "x", "question": None}, "missing 'question'"),
        ({"text": "  \n"}, "text is empty"),
        ({"prompt": "x", "response": ""}, "response is empty"),
        ({"question": "x", "answer": 4}, "answer must be a text, got 4"),
        ({"text": "\ud800"}, "invalid character"),
        ({"messages": []}, "at least one message, got []"),
        ({"messages": "hello"}, "a list of at least one message, got 'hello'"),
        ({"messages": [{"role": "user"}]}, 'message 0 must be {"role", "content"}'),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
            "content of message 1 is empty",
        ),
    ],
)
def test_malformed_row_is_named_by_line(tmp_path: Path, row: object, words: str) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", {"text": "fine"}, "", row)
    with pytest.raises(DataError) as caught:
        load_examples(path)
    assert f"{path}, line 3: " in str(caught.value)
    assert words in str(caught.value)


def test_bytes_that_are_no_text_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("fine\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt, line 2: wanted UTF-8"):
        load_examples(path)


def test_cut_gzip_file(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: cannot be read after line"):
        load_examples(path)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("\n  \n")
    with pytest.raises(DataError, match=rf"{name} is empty"):
        load_examples(path)


def test_what_is_no_data_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        load_examples(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"unknown kind of file.*\.jsonl"):
        load_examples(tmp_path / "a.csv")
    for name in ("rows.jsonl", "./rows", "data/deep/rows", "~/nothing/here", "C:\\rows", "a b"):
        with pytest.raises(DataError, match="no such file"):
            load_examples(name)
    with pytest.raises(DataError, match="no such file"):
        load_examples(Path("org/name"))


# The hub


def test_hub_rows_are_read_in_the_same_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        return [{"question": "a?", "answer": "b", "text": None}, {"other": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_examples("org/set-v1.5", limit=1) == [chat("a?", "b")]
    assert asked == [("org/set-v1.5", None, "train")]
    with pytest.raises(DataError, match=r"org/set-v1\.5, row 1: wanted .* got the fields 'other'"):
        load_examples("org/set-v1.5")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("org/set:main", ("org/set", "main", "train")),
        ("org/set:main-1.0:test", ("org/set", "main-1.0", "test")),
        ("org/set::test", ("org/set", None, "test")),
        ("set:main", ("set", "main", "train")),
    ],
)
def test_a_hub_name_may_say_config_and_split(
    monkeypatch: pytest.MonkeyPatch, name: str, wanted: tuple[str, str | None, str]
) -> None:
    asked = []

    def load_dataset(path: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, config, split))
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_examples(name) == [Example(text="a")]
    assert asked == [wanted]


def test_a_missing_config_is_told_with_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_dataset(name: str, config: str | None, split: str) -> None:
        raise ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['main', "
            "'socratic']\nExample of usage:\n\tload_dataset(...)"
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"\['main', 'socratic'\]\)\. Check its name .*name:config"):
        load_examples("org/x")


def test_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, split: str) -> None:
        raise ConnectionError("offline mode\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"cannot load the data set 'org/x' .*offline mode\)"):
        load_examples("org/x")


# Windows: the stream and its cuts


def text_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.fixture
def no_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that adds nothing to a text, and without a chat template."""
    tokenizer = with_template(None)
    tokenizer.backend_tokenizer.post_processor = None
    assert tokenizer("a")["input_ids"] == text_ids(tokenizer, "a")
    return tokenizer


def test_texts_are_joined_by_eos_and_cut(no_bos: PreTrainedTokenizerFast) -> None:
    a, b = "The quick brown fox.", "keep or skip"
    stream = [*text_ids(no_bos, a), EOS, *text_ids(no_bos, b)]
    windows = make_windows(no_bos, [Example(text=a), Example(text=b)], length=7)
    whole = len(stream) // 7
    assert len(stream) % 7, "the case should leave a remainder"
    assert windows.ids.tolist() == [stream[i * 7 : i * 7 + 7] for i in range(whole)]
    assert windows.ids.dtype == torch.int64
    assert not windows.answer.any()
    assert windows.num_tokens == whole * 7


def test_each_window_begins_with_bos_where_the_tokenizer_does(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = "The quick brown fox jumps over the lazy dog, and the dog sleeps on."
    windows = make_windows(tokenizer, [Example(text=text)], length=8)
    assert (windows.ids[:, 0] == BOS).all()
    assert (windows.ids == BOS).sum() == len(windows)  # no second one where the text begins
    body = windows.ids[:, 1:].flatten().tolist()
    assert body == text_ids(tokenizer, text)[: len(body)]


def test_remainder_is_kept_only_if_it_is_all(tokenizer: PreTrainedTokenizerFast) -> None:
    short = make_windows(tokenizer, [Example(text="keep or skip")], length=256)
    assert short.ids.tolist() == [tokenizer("keep or skip")["input_ids"]]
    with pytest.raises(DataError, match="at least 2 tokens, got 0"):
        make_windows(tokenizer, [])
    with pytest.raises(DataError, match="at least 2 tokens, got 1"):
        make_windows(with_template(None), [Example(text="")])
    with pytest.raises(ConfigError, match="length must be at least 2, got 1"):
        make_windows(tokenizer, [Example(text="keep")], length=1)


def test_limit_reads_examples_only_as_far_as_needed(tokenizer: PreTrainedTokenizerFast) -> None:
    read = []

    def examples() -> Iterator[Example]:
        for i in range(1000):
            read.append(i)
            yield Example(text=f"sentence number {i} of many.")

    limited = make_windows(tokenizer, examples(), length=16, limit=3)
    assert len(limited) == 3
    assert len(read) < 10
    everything = make_windows(
        tokenizer, [Example(text=f"sentence number {i} of many.") for i in range(50)], length=16
    )
    assert torch.equal(limited.ids, everything.ids[:3])


def test_limit_tokenises_only_the_head_of_a_long_text(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 2000
    whole = make_windows(tokenizer, [Example(text=text)], length=16)
    lengths = []
    call = PreTrainedTokenizerFast.__call__

    def counting(self: PreTrainedTokenizerFast, text: str, **options: Any) -> Any:
        lengths.append(len(text))
        return call(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    head = make_windows(tokenizer, [Example(text=text)], length=16, limit=4)
    assert max(lengths) < len(text) / 10
    assert torch.equal(head.ids, whole.ids[:4])


# Windows: which tokens are answer


def test_answers_under_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = ("Hi, keep?", "skip it", "and now", " Yes.\n")
    windows = make_windows(tokenizer, [chat(*turns)], length=256)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids, answer = [BOS], [False]
    for i, content in enumerate(turns):
        header, body, close = (f"{('user', 'assistant')[i % 2]}\n", content, "\n")
        # The template's parts are tokenised alone here; special tokens keep them apart.
        head = text_ids(tokenizer, header + body)[: -len(text_ids(tokenizer, body)) or None]
        ids += [start, *head, *text_ids(tokenizer, body), end, *text_ids(tokenizer, close)]
        is_answer = i % 2 == 1
        answer += [False] * (1 + len(head))
        answer += [is_answer] * (len(text_ids(tokenizer, body)) + 1)
        answer += [False] * len(text_ids(tokenizer, close))
    assert windows.ids[0].tolist() == ids
    assert windows.answer[0].tolist() == answer


@pytest.mark.parametrize("answer", ["assistant", "user", "a", "\n", "im", "<|im_end|>\nx", "Yes"])
def test_answer_that_is_part_of_the_template(
    tokenizer: PreTrainedTokenizerFast, answer: str
) -> None:
    windows = make_windows(tokenizer, [chat(f"{answer} a user", answer)], length=256)
    assert answers(tokenizer, windows) == answer + "<|im_end|>"


TRIMS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}"
)
DROPS_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
)
ENDS_WITH_EOS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{{ eos_token }}{% endfor %}"
)
ENDS_BARE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "written", "marked"),
    [
        (TRIMS, "  fox dog \n", "fox dog<|im_end|>"),
        (DROPS_REASONING, "hmm</think>fox", "fox<|im_end|>"),
        (ENDS_WITH_EOS, "fox dog", "fox dog\n<eos>"),
        (ENDS_BARE, "fox dog", "fox dog"),
    ],
)
def test_answers_under_other_templates(template: str, written: str, marked: str) -> None:
    tokenizer = with_template(template)
    one = make_windows(tokenizer, [chat("fox?", written)], length=256)
    assert answers(tokenizer, one).strip(" ") == marked
    two = make_windows(tokenizer, [chat("fox?", written, "so", written)], length=256)
    assert "".join(answers(tokenizer, two).split(" ")) == "".join((marked * 2).split(" "))


def test_conversation_that_the_template_refuses() -> None:
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"example 0: .* refuses .* roles must alternate"):
        make_windows(tokenizer, [chat("a", "b")])


def test_conversation_without_a_chat_template() -> None:
    tokenizer = with_template(None)
    windows = make_windows(tokenizer, [chat("fox?", "dog", "So", "it is")], length=256)
    text = "User: fox?\nAssistant: dog\n\nUser: So\nAssistant: it is\n\n"
    assert windows.ids[0].tolist() == tokenizer(text)["input_ids"]
    assert windows.ids[0, 0] == BOS  # the tokenizer's own
    assert answers(tokenizer, windows).replace(" ", "") == "dog\n\nitis\n\n"


class SlowTokenizer:
    """The tiny tokenizer without offsets."""

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self.fast = fast
        self.is_fast = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)

    def __call__(self, text: str, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options, "slow tokenizers have none"
        return self.fast(text, **options)


@pytest.mark.parametrize("templated", [True, False])
def test_slow_tokenizer_marks_the_same_answers(templated: bool) -> None:
    fast = tiny_tokenizer() if templated else with_template(None)
    example = chat("fox?", "dog and fox", "So", "it is.")
    slow = make_windows(SlowTokenizer(fast), [example], length=256)  # type: ignore[arg-type]
    expected = make_windows(fast, [example], length=256)
    assert torch.equal(slow.ids, expected.ids)
    assert torch.equal(slow.answer, expected.answer)
    assert slow.answer.any()


# Windows as values


def numbered(count: int) -> Windows:
    ids = torch.arange(count)[:, None].expand(count, 4).contiguous()
    return Windows(ids, torch.zeros_like(ids, dtype=torch.bool))


def test_split_holds_back_rows_once_each() -> None:
    rest, held = numbered(20).split(0.25, seed=3)
    assert (len(rest), len(held)) == (15, 5)
    assert sorted([*rest.ids[:, 0].tolist(), *held.ids[:, 0].tolist()]) == list(range(20))
    assert torch.equal(held.ids, numbered(20).split(0.25, seed=3)[1].ids)
    assert not torch.equal(held.ids, numbered(20).split(0.25, seed=4)[1].ids)
    assert [len(part) for part in numbered(2).split(0.01)] == [1, 1]
    with pytest.raises(DataError, match="one window only"):
        numbered(1).split(0.5)
    with pytest.raises(ConfigError, match=r"between 0 and 1, got 1\.5"):
        numbered(4).split(1.5)


def test_take_keeps_the_given_order() -> None:
    assert numbered(5).take([4, 0]).ids[:, 0].tolist() == [4, 0]
    assert numbered(5).take(range(2)).ids[:, 0].tolist() == [0, 1]


def test_interleaved_windows_are_spread_and_come_again() -> None:
    def mixed(number: int, num_others: int) -> list[int]:
        others = Windows(-1 - numbered(2).ids, numbered(2).answer)
        found: list[int] = interleaved(numbered(6), others, number, num_others).ids[:, 0].tolist()
        return found

    assert mixed(8, 4) == [0, -1, 1, -2, 2, -1, 3, -2]
    assert mixed(8, 2) == [0, 1, 2, -1, 3, 4, 5, -2]
    assert mixed(3, 3) == [-1, -2, -1]


def test_dataset_of_windows_stacks_under_the_default_collator() -> None:
    ids = torch.arange(12).view(3, 4)
    answer = torch.zeros(3, 4, dtype=torch.bool)
    answer[0, 2] = answer[2, 0] = True  # in row 2 only the first token, which nothing predicts
    windows = Windows(ids, answer)
    batch = default_data_collator(list(WindowDataset(windows)))
    assert torch.equal(batch["input_ids"], ids)
    assert torch.equal(batch["labels"], ids)
    only = WindowDataset(windows, answers_only=True)
    assert len(only) == 1
    assert only[0]["labels"].tolist() == [-100, -100, 2, -100]
    with pytest.raises(DataError, match="no window holds an answer"):
        WindowDataset(numbered(2), answers_only=True)


def test_evaluation_mode_ends_with_an_error(model: PreTrainedModel) -> None:
    model.train()

    def fail() -> None:
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(module.training for module in model.modules())
