"""What the README says is what happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import readme

ROOT = Path(__file__).parent.parent


OBJECTIVES = readme.blocks("python", ROOT / "docs" / "objectives.md")


@pytest.mark.parametrize(
    "code", [*readme.blocks("python"), *OBJECTIVES], ids=lambda code: code.strip().splitlines()[0][:40]
)
def test_every_python_block_runs_as_it_stands(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_two_commands_install_then_run_the_demo_and_the_tests() -> None:
    for word, extra in (("ttt-adapt demo", "cli"), ("pytest", "test")):
        command = readme.command(word)
        assert f'pip install -e ".[{extra}]"' in command


def test_every_file_that_the_readme_links_to_exists() -> None:
    import re

    text = readme.README.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
