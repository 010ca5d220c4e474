"""Options that several verbs share, and how their text is read. Imports no torch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from router_tuning.config import check_budget
from router_tuning.errors import BudgetError, ConfigError

NOT_IN_FILES = {"config", "help"}


# --- Reading text ---------------------------------------------------------------------------------


def budgets_in(text: str) -> tuple[float, ...]:
    """`0.9,0.8` as numbers in (0, 1], largest first, each once.

    Raises:
        ConfigError: not numbers, or none.
        BudgetError: out of range.
    """
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"--budgets wants numbers such as 0.9,0.8,0.7, got {text!r}") from error
    if not found:
        raise ConfigError("--budgets is empty; wanted numbers such as 0.9,0.8,0.7")
    return tuple(sorted({check_budget(b) for b in found}, reverse=True))


def budgets_to_calibrate(text: str, *more: float) -> tuple[float, ...]:
    """As `budgets_in`, with more of them added and without 1, which needs no threshold.

    Raises:
        BudgetError: also where nothing is left.
    """
    found = sorted({*budgets_in(text), *more} - {1.0}, reverse=True)
    if not found:
        raise BudgetError(
            f"--budgets {text}: a budget of 1 keeps everything and needs no calibration; "
            f"name budgets below 1, such as 0.9,0.8,0.7"
        )
    return tuple(found)


def names_in(text: str | None) -> tuple[str, ...]:
    """`arc_challenge,piqa` as names, each once; None for none.

    Raises:
        ConfigError: a text without a name.
    """
    if text is None:
        return ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise ConfigError("--tasks is empty; wanted names such as arc_challenge,piqa")
    return names


def files_by_name(option: str, given: list[str]) -> dict[str, str]:
    """`alpaca=alpaca.jsonl` and the like as file by name.

    Raises:
        ConfigError: not of that form, or a name twice.
    """
    files: dict[str, str] = {}
    for item in given:
        name, equals, file = (part.strip() for part in item.partition("="))
        if not (name and equals and file):
            raise ConfigError(f"{option} wants NAME=FILE, such as news=news.txt, got {item!r}")
        if name in files:
            raise ConfigError(f"{option} has two files of the name {name!r}; give each its own")
        files[name] = file
    return files


def granularities_in(text: str) -> str | list[str]:
    """`attn_token,mlp_token` as a list of names; one name alone as it is."""
    names = [part.strip() for part in text.split(",")]
    return names[0] if len(names) == 1 else names


def layers_in(text: str | None) -> list[int] | None:
    """`0-5,8` as indices; None for all layers.

    Raises:
        ConfigError: not such a list.
    """
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            layers |= set(range(int(first), int(last if dash else first) + 1))
        except ValueError as error:
            raise ConfigError(f"--layers wants indices such as 0-5,8, got {text!r}") from error
    return sorted(layers)


def check_writable_folder(folder: Path) -> None:
    """Make a folder and write to it once, before hours are spent.

    Raises:
        ConfigError: it cannot be made, or takes no file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise ConfigError(
            f"cannot write to the folder {folder}: {error.strerror or error}; free space there, "
            f"make it writable, or give another one"
        ) from error


def is_typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option stood on the command line; else it is a default, or of a --config file."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


# --- Callbacks ------------------------------------------------------------------------------------


def _read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Let a YAML file give the defaults of this verb's options; the command line wins."""
    if path is not None:
        ctx.default_map = {**(ctx.default_map or {}), **_defaults_in(path, ctx.command.params)}
    return path


def _defaults_in(path: Path, params: list[Any]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise typer.BadParameter(f"{path}{line}: not valid YAML ({error.problem})") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise typer.BadParameter(
            f"{path}: wanted option names with values, such as `steps: 120`, got a "
            f"{type(content).__name__}"
        )
    names = _names_of(params)
    several = {param.name for param in params if getattr(param, "multiple", False)}
    defaults: dict[str, Any] = {}
    for key, value in content.items():
        found = names.get(str(key).replace("-", "_"))
        if found is None:
            known = ", ".join(sorted({name.replace("_", "-") for name in names}))
            raise typer.BadParameter(f"{path}: unknown option {key!r}; this verb has {known}")
        if value is not None:
            name, opposite = found
            typed = (not value) if opposite else _as_typed(key, value, path, name in several)
            defaults[name] = typed
    return defaults


def _names_of(params: list[Any]) -> dict[str, tuple[str, bool]]:
    """Option name -> (parameter, whether the name is the opposite of a flag)."""
    names: dict[str, tuple[str, bool]] = {}
    for param in params:
        for opposite, options in ((False, param.opts), (True, param.secondary_opts)):
            for option in options:
                if option.startswith("--") and param.name not in NOT_IN_FILES:
                    names[option[2:].replace("-", "_")] = (param.name, opposite)
    return names


def _as_typed(key: str, value: Any, path: Path, several: bool) -> Any:
    """A list is what the command line writes with commas, or as an option given several times."""
    if several and not isinstance(value, dict):
        return [str(item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    if isinstance(value, dict):
        raise typer.BadParameter(f"{path}: {key} wants one value or a list, got a mapping")
    return value


def _check_json(path: Path | None) -> Path | None:
    """Find out before the work whether its result can be written."""
    if path is None:
        return None
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; wanted a file name")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _note_debug(ctx: typer.Context, debug: bool) -> bool:
    ctx.meta["debug"] = debug
    return debug


# --- The options ----------------------------------------------------------------------------------

JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", callback=_check_json, help="Write the result here as JSON."
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        callback=_read_config,
        is_eager=True,
        help="Read options from a YAML file (keys are option names). The command line wins.",
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", callback=_note_debug, help="Show a traceback where something fails."),
]
Seed = Annotated[int, typer.Option("--seed", help="Of everything that is random.")]
Adapter = Annotated[
    str, typer.Option("--adapter", metavar="DIR", help="An adapter's folder (or hub repository).")
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="M", help="The base model, where not the one that the adapter names."
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="float32, bfloat16, float16, or auto: float32 on a CPU, elsewhere that of the "
        "model's files.",
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", help="cpu, cuda, mps, or auto: cuda where there is one, else cpu."),
]
BUDGETS = "0.95,0.9,0.85,0.8,0.75,0.7,0.65,0.6,0.55,0.5"
"""Those that adapters are calibrated to where nothing else is asked."""
Budgets = Annotated[str, typer.Option("--budgets", help="Kept fractions to find thresholds for.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Windows of one forward.")]
Length = Annotated[int, typer.Option("--length", min=2, help="Tokens of a window.")]
