"""The command line: `router-tuning tune | calibrate | eval | analyse | generate | ...`.

One file a verb: it parses, calls, prints. Nothing here or in those files imports torch before a
verb runs, so `--help` is fast. Errors leave here as one line on stderr and an exit code:

0    done
1    an error of this package (or an unexpected one; --debug shows where)
2    a wrong option, budget or data file
3    training stopped; the last good state is saved
130  Ctrl-C
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import router_tuning
from router_tuning.cli import (
    analyse,
    average,
    bench,
    calibrate,
    demo,
    env,
    evaluate,
    export,
    generate,
    import_official,
    tune,
)
from router_tuning.cli.console import fail, warn
from router_tuning.errors import (
    BudgetError,
    ConfigError,
    DataError,
    RouterTuningError,
    TrainingError,
)

USAGE_ERRORS = (ConfigError, BudgetError, DataError)
INTERRUPTED = 130


class _Group(TyperGroup):
    """Turns errors into a line and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["arguments"] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            fail(str(error) or "stopped by Ctrl-C", label="interrupted")
            raise typer.Exit(INTERRUPTED) from error
        except Exception as error:
            code = exit_code(error)
            if code is None:  # typer's own: wrong usage, an exit
                raise
            _explain(error, bool(ctx.meta.get("debug")))
            raise typer.Exit(code) from error


def exit_code(error: Exception) -> int | None:
    """The exit code of an error; None for those that typer handles itself."""
    if isinstance(error, USAGE_ERRORS):
        return 2
    if isinstance(error, TrainingError):
        return 3
    module = type(error).__module__
    return None if module.startswith(("typer", "click")) else 1


def _explain(error: Exception, debug: bool) -> None:
    if debug:
        fail("".join(traceback.format_exception(error)).rstrip(), label="traceback")
    if isinstance(error, RouterTuningError):
        fail(str(error))
    elif isinstance(error, OSError):
        fail(f"{error}; run again with --debug to see where")
    else:
        fail(
            f"unexpected {type(error).__name__}: {error}. This is a fault of router-tuning or "
            f"of a library: please report it with what --debug shows and the output of "
            f"`router-tuning env`"
        )


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("tune")(tune.tune)
app.command("calibrate")(calibrate.calibrate)
app.command("average")(average.average)
app.command("eval")(evaluate.evaluate)
app.command("analyse")(analyse.analyse)
app.command("generate")(generate.generate)
app.command("bench")(bench.bench)
app.command("export")(export.export)
app.command("import-official")(import_official.import_official)
app.command("demo")(demo.demo)
app.command("env")(env.env)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"router-tuning {router_tuning.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Tiny routers that skip attention where a frozen language model does not need it."""
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError(
            f"router-tuning runs in one process, but a launcher started "
            f"{os.environ['WORLD_SIZE']}; train in several with "
            f"`accelerate launch recipes/tune.py` (recipes/README.md), then calibrate and evaluate "
            f"the adapter in one"
        )


def main() -> None:
    """Run the command line of this process."""
    if "--debug" not in sys.argv:
        warnings.simplefilter("ignore", FutureWarning)  # libraries talking to each other
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = lambda message, *args, **kwargs: warn(str(message))
    app()
