"""Stopping a training without losing it: Ctrl-C, complete checkpoints, writable folders."""

from __future__ import annotations

import json
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from router_tuning.errors import TrainingError

LAST_FILE = "trainer_state.json"
"""transformers writes this last, so a checkpoint without it, or with a part of it, was cut
short."""


class StopRequest:
    """Whether Ctrl-C was pressed once."""

    asked = False
    """In this process."""
    agreed = False
    """All processes know that it was pressed in one of them, and stop after the same step."""


@contextmanager
def stop_on_interrupt(request: StopRequest) -> Iterator[None]:
    """Let the first Ctrl-C inside the block only ask to stop; the second stops at once.

    Leaves a handler that the application has set alone, and does nothing outside the main thread.
    """
    request.asked = request.agreed = False
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def handle(signum: int, frame: Any) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True
        print("\nStopping after this step; Ctrl-C again stops at once.", file=sys.stderr)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def last_complete_checkpoint(output_dir: str) -> Path | None:
    """The checkpoint of the latest step that was written to its end; None if there is none."""
    folder = Path(output_dir)
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and _is_complete(path)
    ]
    return max(found)[1] if found else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / LAST_FILE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def check_writable(folder: str) -> None:
    """Make the folder and write to it once, before hours are spent.

    Raises:
        TrainingError: it cannot be made, or takes no file.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise TrainingError(
            f"cannot write to the output folder {folder}: {error.strerror or error}; free space "
            "there, or give another output folder"
        ) from error
