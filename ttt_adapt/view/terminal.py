"""What the terminal shows while something runs: a progress bar and notices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(title: str, total: int | None, unit: str = "frame") -> Iterator[Any]:
    """A progress bar with rate, loss and time left. Yields `advance(loss)`, to be called once per `unit`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, refresh_per_second=4) as progress:
        task = progress.add_task(title, total=total, rate="", note="")

        def advance(note: str | float | None = None) -> None:
            progress.advance(task)
            state = progress.tasks[0]
            rate = f"{state.completed / state.elapsed:.1f} {unit}s/s" if state.elapsed else ""
            text = f"loss {note:.4f}" if isinstance(note, float) else note or ""
            progress.update(task, rate=rate, note=text)

        yield advance


def counted(number: int, noun: str) -> str:
    """ "1 frame", "2 frames"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def notice(text: str) -> None:
    """Print one line to standard error, without wrapping it."""
    from rich.console import Console

    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
