"""What the commands print."""

from __future__ import annotations

from rich.console import Console

console = Console(emoji=False)


def say(text: str) -> None:
    """Print plain text: `[red]` and `:car:` may be parts of a path, and long lines are not folded."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
