"""What the commands print."""

from __future__ import annotations

from rich.console import Console

console = Console()


def say(text: str) -> None:
    """Print plain text: brackets in paths are no markup, and long lines are not folded."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
