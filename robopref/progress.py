"""Progress of long work: one callback type, and a terminal bar with rate and time left for who wants one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ProgressCallback: TypeAlias = Callable[[int, int], None]
"""Called with how much is done and how much there is in all."""


def progress_columns(console: Console | None = None) -> Progress:
    """A bar with count, time so far and time left, as every part of robopref shows it."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )


@contextmanager
def progress_bar(description: str) -> Iterator[ProgressCallback]:
    """A terminal progress bar around a block; call what it yields with (count so far, total)."""
    with progress_columns() as bar:
        task = bar.add_task(description, total=None)
        yield lambda completed, total: bar.update(task, completed=completed, total=total)
