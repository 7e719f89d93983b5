"""What the README and the pages beside it say is what happens."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import readme
from ttt_adapt import StreamConfig

DOCS = readme.ROOT / "docs"
FIRST, *OTHERS = readme.blocks("python")
PAGES_WITH_CODE = [DOCS / "objectives.md", DOCS / "streams.md"]
CODE_OF_PAGES = [code for page in PAGES_WITH_CODE for code in readme.blocks("python", page)]
CODE = readme.ROOT / "ttt_adapt"
PRESENT = [page for page in readme.PAGES if page.name != "CHANGELOG.md"]
"""Pages that speak of what is there now; the changelog names what was there, too."""
ENTRY_POINTS = set(
    re.findall(r'^\[project\.entry-points\."([^"]+)"\]', (readme.ROOT / "pyproject.toml").read_text(), re.MULTILINE)
)
"""The groups of entry points under which integrations add commands."""
LONGEST = 900
"""Words that the README may have outside of its code blocks."""


@pytest.mark.parametrize("code", [*OTHERS, *CODE_OF_PAGES], ids=lambda code: code.strip().splitlines()[-1][:40])
def test_every_python_block_runs_as_it_stands(code: str, tmp_path: Path) -> None:
    done = _run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_first_lines_of_the_readme_print_the_gain_that_it_tells(tmp_path: Path) -> None:
    done = _run(FIRST, tmp_path)
    assert done.returncode == 0, done.stderr
    trained, adapted = (float(number) for number in re.findall(r"([\d.]+)%", done.stdout))
    told = re.search(r"prints ([\d.]+) % and ([\d.]+) %", " ".join(readme.prose().split()))
    assert told is not None
    assert trained == pytest.approx(float(told[1]), abs=0.02)
    assert adapted == pytest.approx(float(told[2]), abs=0.1)  # a sum in another order moves the adapted weights
    assert adapted > trained


def test_the_two_commands_install_then_run_the_demo_and_the_tests() -> None:
    for word, extra in (("ttt-adapt demo", "cli"), ("pytest -n auto", "test")):
        command = readme.command(word)
        assert f'pip install -e ".[{extra}]"' in command


def test_the_readme_is_short() -> None:
    words = [word for word in readme.prose().split() if re.search(r"\w", word)]  # the bars of tables are none
    assert 0 < len(words) <= LONGEST


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_to_a_heading(page: Path) -> None:
    assert readme.broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One heading, here\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n[a](other.md) [b](other.md#one-heading-here) [c](#page) [d](https://no.where/x) "
        "[e](absent.md) [f](other.md#two) [g](#no) [h](other.md#no-heading)\n```\n[i](absent.md)\n```\n"
    )
    assert readme.broken_links(page) == ["absent.md", "other.md#two", "#no", "other.md#no-heading"]


@pytest.mark.parametrize("page", PRESENT, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    assert [name for name in readme.named_files(page) if not (readme.ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PRESENT, ids=lambda page: page.name)
def test_every_module_and_name_of_the_library_that_a_page_names_is_there(page: Path) -> None:
    assert [name for name in readme.named_objects(page) if name not in ENTRY_POINTS and not _found(name)] == []


def test_the_page_on_the_architecture_names_the_entry_point_that_the_command_line_reads() -> None:
    assert ENTRY_POINTS
    assert set(readme.named_objects(DOCS / "architecture.md")) >= ENTRY_POINTS
    assert set(re.findall(r'entry_points\(group="([^"]+)"\)', (CODE / "cli" / "app.py").read_text())) == ENTRY_POINTS


def test_the_page_on_the_architecture_names_every_module_of_the_core() -> None:
    named = set(readme.named_files(DOCS / "architecture.md"))
    parts = ("model", "objectives", "stream", "engine")
    files = {f"ttt_adapt/{part}/{path.name}" for part in parts for path in (CODE / part).glob("[!_]*.py")}
    assert files - named == set()


def test_the_readme_links_to_every_page_of_the_docs() -> None:
    linked = set(re.findall(r"\]\((docs/\w[\w-]*\.md)", readme.prose()))
    assert linked == {f"docs/{page.name}" for page in DOCS.glob("*.md")}


def test_the_options_page_has_every_field_of_stream_config_with_its_default() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| ([^ |]+)", readme.prose(DOCS / "options.md").partition("## Fields")[2], re.MULTILINE
    )
    told = [(name, ast.literal_eval(default)) for name, default in rows]
    assert told == [(field.name, field.default) for field in dataclasses.fields(StreamConfig)]


def _found(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part, None)
        return value is not None
    return False


def _run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
