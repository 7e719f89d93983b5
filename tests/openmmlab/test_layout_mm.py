"""The arrows between the modules of the integration."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ttt_adapt_openmmlab

ROOT = Path(ttt_adapt_openmmlab.__file__).parent

# Each part imports from those before it, and from itself where it is a folder.
ORDER = [
    "environment", "ops", "datasets", "panoptic_kit", "refused_models", "metrics", "arms", "decoders", "joint",
    "colorization", "batches", "frames", "calibration", "stream_branch", "stills", "run_calibration", "reconstruction",
    "totals", "hooks", "stream", "run_config", "launch", "cli", "__init__",
]  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Names of the integration's modules that a module imports at any time, such as "datasets.clips"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level  # absolute imports alone
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *pieces = name.split(".")
            if package == ROOT.name:
                found.add(module_of(pieces))
    return found


def module_of(pieces: list[str]) -> str:
    """The module that a dotted name lies in."""
    for end in range(len(pieces), -1, -1):
        if ROOT.joinpath(*pieces[:end]).with_suffix(".py").is_file():
            return ".".join(pieces[:end])
        if ROOT.joinpath(*pieces[:end], "__init__.py").is_file():
            return ".".join([*pieces[:end], "__init__"])
    raise AssertionError(f"no module holds {'.'.join(pieces)}")


def test_the_order_names_every_part():
    assert {name_of(path).split(".")[0] for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_arrows_point_one_way(path):
    mine = name_of(path).split(".")[0]
    others = {name.split(".")[0] for name in imported(path)} - {mine}
    assert not [other for other in others if ORDER.index(other) > ORDER.index(mine)]


def test_no_module_imports_itself_through_others():
    below = {name_of(path): imported(path) - {name_of(path)} for path in FILES}
    free: set[str] = set()
    while ready := {name for name in below.keys() - free if below[name] <= free}:
        free |= ready
    assert sorted(below.keys() - free) == []
