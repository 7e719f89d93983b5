"""The arrows between the modules of the library, and what importing it loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ttt_adapt

ROOT = Path(ttt_adapt.__file__).parent

# Each part imports from those before it, and from itself where it is a folder.
ORDER = [
    "errors", "schema", "files", "file_kind", "colour", "theory", "arms", "config", "model", "objectives", "stream",
    "engine", "sharing", "adapter", "view", "video", "data", "calibration", "tasks", "training", "evaluation",
    "integration", "serve",
    "cli", "__main__",
]  # fmt: skip
OUTSIDE = [
    "timm", "torchvision", "mmengine", "mmcv", "mmseg", "mmdet", "decord", "av", "matplotlib", "PIL", "torchmetrics",
    "typer", "rich", "transformers", "cv2", "safetensors", "einops", "fastapi",
    "starlette", "uvicorn", "prometheus_client",
]  # fmt: skip


def source_files() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(path: Path, top_level_only: bool = False, runs_only: bool = False) -> set[str]:
    """Absolute dotted names that a module imports; relative imports are resolved.

    With `runs_only`, those that are for type checkers alone are left out; with `top_level_only`, also those that run
    when a function is called.
    """
    tree = ast.parse(path.read_text())
    package = [ROOT.name, *path.relative_to(ROOT).parent.parts] if path.is_relative_to(ROOT) else []
    nodes = _run(tree, functions=not top_level_only) if top_level_only or runs_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names.add(stem)
            names |= {f"{stem}.{alias.name}" for alias in node.names}
    return names


def _run(tree: ast.Module, functions: bool):
    """Nodes that run when the module is imported, and with `functions` also those that run when it is used."""
    queue: list[ast.AST] = list(tree.body)
    while queue:
        node = queue.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not functions:
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        queue.extend(ast.iter_child_nodes(node))


def part_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def modules_imported(path: Path) -> set[str]:
    """Modules of the library, as dotted names below it, that a module imports at any time, also for type checkers."""
    found = set()
    for name in imported(path):
        pieces = name.split(".")
        if pieces[0] != ROOT.name:
            continue
        while len(pieces) > 1 and module_file(pieces[1:]) is None:  # a name inside of the module
            pieces.pop()
        if len(pieces) > 1:
            found.add(".".join(pieces[1:]))
    return found


def module_file(pieces: list[str]) -> Path | None:
    place = ROOT.joinpath(*pieces)
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.exists()), None)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    mine = part_of(path)
    others = {name.split(".")[0] for name in modules_imported(path)} - {mine}
    assert not [other for other in others if ORDER.index(other) > ORDER.index(mine)]


def test_no_module_imports_itself_through_others():
    """Inside of folders neither, and for type checkers neither."""
    below = {dotted(path): modules_imported(path) - {dotted(path)} for path in source_files()}
    free: set[str] = set()
    while ready := {name for name in below.keys() - free if below[name] <= free}:
        free |= ready
    assert sorted(below.keys() - free) == []


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_imports_the_package_itself(path):
    """`import ttt_adapt` or `from ttt_adapt import ...` inside it would be a circle that the arrows do not show."""
    assert ROOT.name not in imported(path)


def test_the_order_names_every_part():
    assert {part_of(path) for path in source_files()} == set(ORDER)


def test_importing_the_library_loads_nothing_that_is_optional():
    code = "import sys; from ttt_adapt import *; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    loaded = set(out.stdout.split())
    assert {"torch", "ttt_adapt"} <= loaded
    assert not loaded & set(OUTSIDE)


def test_the_command_line_waits_for_torch_only_where_it_runs_something():
    code = "import sys, ttt_adapt.cli.app; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert out.stdout.strip() == "False"


def test_public_names_and_modules_are_there_when_they_are_used():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name for node in imports if node.module.startswith("ttt_adapt.") for alias in node.names}
    assert seen == set(ttt_adapt.__all__)  # what type checkers are shown
    for name in ttt_adapt.__all__:
        assert getattr(ttt_adapt, name).__name__ == name
    code = "import ttt_adapt; print(ttt_adapt.adapter.__name__, ttt_adapt.TTTAdaptError, hasattr(ttt_adapt, 'nothing'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert out.stdout.split() == ["ttt_adapt.adapter", "<class", "'ttt_adapt.errors.TTTAdaptError'>", "False"]


def test_a_type_checker_knows_every_public_name_and_no_other(tmp_path):
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    (tmp_path / "good.py").write_text("from ttt_adapt import *\nconfig: StreamConfig = StreamConfig()\n")
    (tmp_path / "bad.py").write_text("from ttt_adapt import StreamAdaptor\n")
    options = ["--config-file=", f"--cache-dir={tmp_path}", "--ignore-missing-imports", "--follow-imports=silent"]
    text, _, status = api.run([*options, str(tmp_path / "good.py")])
    assert status == 0, text
    text, _, status = api.run([*options, str(tmp_path / "bad.py")])
    assert status == 1
    assert "StreamAdaptor" in text


@pytest.mark.parametrize(
    "path",
    [path for path in source_files() if part_of(path) not in ("cli", "__main__")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_optional_packages_are_imported_where_they_are_used(path):
    at_import = {name.split(".")[0] for name in imported(path, top_level_only=True)}
    assert not at_import & set(OUTSIDE)


def test_the_public_names_are_twelve():
    expected = "Calibration MAEBranch Normalize Objective Reconstruction StepReport StreamAdapter StreamConfig"
    assert sorted(ttt_adapt.__all__) == [*expected.split(), "TTTAdaptError", "TrainConfig", "calibrate", "fit"]


INTEGRATIONS = sorted((ROOT.parent / "integrations").rglob("*.py"))


@pytest.mark.parametrize("path", INTEGRATIONS, ids=lambda path: str(path.relative_to(ROOT.parent)))
def test_integrations_use_the_public_surface_only(path):
    open_to_all = {f"{ROOT.name}.{name}" for name in ("errors", "objectives", "integration")}
    wrong = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wrong += [a.name for a in node.names if a.name.startswith(f"{ROOT.name}.")]
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == ROOT.name:
            names = {alias.name for alias in node.names}
            if node.module == ROOT.name:
                wrong += sorted(names - set(ttt_adapt.__all__))
            elif node.module not in open_to_all:
                wrong.append(node.module)
    assert not wrong


BENCHMARKS = sorted((ROOT.parent / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_benchmarks_import_no_module_of_the_command_line(path):
    assert not [name for name in imported(path) if f"{name}.".startswith(f"{ROOT.name}.cli.")]


def test_the_core_knows_no_integration():
    packages = {path.name for path in (ROOT.parent / "integrations").iterdir() if path.is_dir()}
    assert packages
    assert not [path for path in source_files() if {name.split(".")[0] for name in imported(path)} & packages]
