"""What people see: results on stdout, progress and messages on stderr. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

WIDTH_OF_FILES = 120
"""Columns of a table that goes into a file or a pipe."""


def stdout() -> Console:
    """Where results go."""
    return _console(stderr=False)


def stderr() -> Console:
    """Where progress and messages go."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    # Made anew each time: the streams of a process can be replaced.
    console = Console(stderr=stderr, highlight=False)
    return (
        console
        if console.is_terminal
        else Console(stderr=stderr, highlight=False, width=WIDTH_OF_FILES)
    )


def say(line: str = "") -> None:
    """A line about what goes on."""
    stderr().print(Text(line), soft_wrap=True)


def warn(line: str) -> None:
    """A line about something to know."""
    stderr().print(Text.assemble(("note: ", "yellow"), line), soft_wrap=True)


def fail(line: str, label: str = "error") -> None:
    """A line about what went wrong."""
    stderr().print(Text.assemble((f"{label}: ", "bold red"), line), soft_wrap=True)


def show(line: str = "") -> None:
    """A line of the result."""
    stdout().print(Text(line), soft_wrap=True)


class Bar:
    """A progress bar: call it with (done, total)."""

    def __init__(self, progress: Progress, text: str) -> None:
        self._progress = progress
        self._task = progress.add_task(text, total=None, note="")
        self._started = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        """Put a few words behind the bar."""
        self._progress.update(self._task, note=text)

    def finish(self) -> None:
        """Show the bar as full."""
        task = self._progress.tasks[0]
        if task.total is None:
            self._progress.update(self._task, completed=1, total=1)

    @property
    def seconds(self) -> float:
        """Since the bar began."""
        return time.monotonic() - self._started


@contextmanager
def bar(text: str) -> Iterator[Bar]:
    """A progress bar on stderr while the block runs; it pulses until it is called.

    Where stderr is no terminal, one line is printed at the end.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False, style="dim"),
    )
    with Progress(*columns, console=stderr()) as progress:
        one = Bar(progress, text)
        yield one
        one.finish()
