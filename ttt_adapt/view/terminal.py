"""What the terminal shows while something runs: a progress bar and notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

_reword: ContextVar[Callable[[str], str]] = ContextVar("reword", default=str)
"""What is done to the text of a notice before it is printed."""
BESIDE_TITLE = 60
"""Characters that a progress bar needs beside its title: a line of 80 has room for titles of 20."""
SHORTEST = 4
"""Width of the bar itself where there is hardly room for it."""


@contextmanager
def progress_bar(title: str, total: int | None, unit: str = "frame", done: int = 0) -> Iterator[Any]:
    """A progress bar with rate, loss and time left. Yields `advance(loss)`, to be called once per `unit`.

    Args:
        title: what runs; the end of a long one is left out.
        total: how many units there are; None where that is unknown.
        unit: what is counted, in the singular.
        done: units that an earlier run did. They count as done, and not into the rate.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = BarColumn(bar_width=SHORTEST)
    columns = [
        TextColumn("{task.description}", markup=False),
        bar,
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, refresh_per_second=4) as progress:
        limit = max(progress.console.width - BESIDE_TITLE, 12)
        shown = title if len(title) <= limit else f"{title[: limit - 1]}…"
        task = progress.add_task(shown, total=total, completed=done, rate="", note="")

        def advance(note: str | float | None = None) -> None:
            progress.advance(task)
            state, width = progress.tasks[0], progress.console.width
            rate = f"{(state.completed - done) / state.elapsed:.1f}" if state.elapsed else ""
            if rate:
                rate += f" {unit}s/s" if width >= 100 else "/s"
            text = f"loss {note:.4f}" if isinstance(note, float) else note or ""
            counts = 2 * len(str(total if total is not None else int(state.completed))) + 1
            left = width - len(shown) - counts - len(rate) - len("0:00:00") - 5  # a space between columns
            bar.bar_width = max(SHORTEST, min(40, left - len(text)))
            progress.update(task, rate=rate, note=text[: max(left - SHORTEST, 0)])

        yield advance


def counted(number: int, noun: str) -> str:
    """ "1 frame", "2 frames"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def notice(text: str) -> None:
    """Print one line to standard error, without wrapping it. A terminal that is gone does not end the run."""
    from rich.console import Console

    with suppress(OSError):
        console = Console(stderr=True, markup=False, emoji=False)  # `[red]` and `:car:` may be parts of a file's name
        console.print(_reword.get()(text), highlight=False, soft_wrap=True)


@contextmanager
def rewording(reword: Callable[[str], str]) -> Iterator[None]:
    """Notices inside the block are printed as `reword` makes them: the command line has its own names for arguments."""
    token = _reword.set(reword)
    try:
        yield
    finally:
        _reword.reset(token)
