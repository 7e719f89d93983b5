"""The commands and code blocks of the README and of pages beside it, for the tests and the project's own check."""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str, page: Path = README) -> list[str]:
    """The fenced code blocks of a language on a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def command(end: str) -> str:
    """The one set-up command of the README that ends in `end`."""
    found = [line for block in blocks("bash") for line in block.splitlines() if line.endswith(end)]
    assert len(found) == 1, f"expected one command that ends in {end!r}, found {found}"
    return found[0]


if __name__ == "__main__":
    print(command({"test-command": "pytest -n auto"}[sys.argv[1]]))
