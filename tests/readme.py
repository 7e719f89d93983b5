"""The commands, code blocks, words and links of the README and of the pages beside it.

The tests read them, and the project's own check takes its test command from here:

    python tests/readme.py test-command
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(language: str, page: Path = README) -> list[str]:
    """The fenced code blocks of a language on a page, in order."""
    return [code for _, name, code in _FENCED.findall(_text(page)) if name == language]


def prose(page: Path = README) -> str:
    """The page without its code blocks."""
    return _FENCED.sub("", _text(page))


def command(end: str) -> str:
    """The one set-up command of the README that ends in `end`."""
    found = [line for block in blocks("bash") for line in block.splitlines() if line.endswith(end)]
    assert len(found) == 1, f"expected one command that ends in {end!r}, found {found}"
    return found[0]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        found.add(plain if plain not in found else f"{plain}-1")
    return found


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to a heading that their page does not have."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
            broken.append(link)
    return broken


def named_files(page: Path) -> list[str]:
    """The files and folders that a page names in backticks by their path from the root: `ttt_adapt/config.py`."""
    return re.findall(r"`((?:ttt_adapt|integrations|tests|benchmarks|configs|examples)/[\w./-]*)`", prose(page))


def named_objects(page: Path) -> list[str]:
    """The modules of the library, and names in them, that a page names in backticks, such as `ttt_adapt.theory`."""
    return re.findall(r"`(ttt_adapt(?:_openmmlab)?(?:\.\w+)+)`", prose(page))


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(command({"test-command": "pytest -n auto"}[sys.argv[1]]))
