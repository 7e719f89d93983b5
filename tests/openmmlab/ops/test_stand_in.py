"""The stand-in for compiled operators, missing packages, and checkpoints with more than tensors in them."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from mmengine.logging.history_buffer import HistoryBuffer

import ttt_adapt_openmmlab  # noqa: F401
from ttt_adapt import TTTAdaptError
from ttt_adapt.errors import MissingPackageError
from ttt_adapt_openmmlab.environment import require_packages
from ttt_adapt_openmmlab.ops import stand_in as ops
from zoo import zoo_checkpoint

ROOT = Path(__file__).parents[3]
COMPILED = Path(importlib.util.find_spec("mmcv").origin).parent.glob("_ext*.so")
lite = pytest.mark.skipif(any(COMPILED), reason="mmcv has its compiled operators here")


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


@lite
def test_an_operator_without_its_compiled_code_says_what_to_install():
    from mmcv.ops import border_align, nms_rotated

    with pytest.raises(NotImplementedError, match=r"'nms_rotated'.*mmcv==2\.1\.0") as raised:
        nms_rotated(torch.rand(3, 5), torch.rand(3), 0.5)
    assert isinstance(raised.value, TTTAdaptError)
    with pytest.raises(NotImplementedError, match="'border_align_forward'"):
        border_align(torch.rand(1, 4, 8, 8), torch.rand(1, 64, 4), 2)


@lite
def test_the_environment_says_that_mmcv_was_not_compiled():
    from mmcv.utils import collect_env

    assert "mmcv-lite" in collect_env()["MMCV Compiler"]


@lite
def test_the_stand_in_is_found_as_a_module_and_installing_it_again_changes_nothing():
    before = sys.modules[ops.EXTENSION]
    assert importlib.util.find_spec(ops.EXTENSION).name == ops.EXTENSION
    ops.stand_in_for_missing_ops()
    assert sys.modules[ops.EXTENSION] is before
    assert not hasattr(before, "__path__")


def test_compiled_operators_are_left_alone(monkeypatch):
    compiled = ModuleType(ops.EXTENSION)
    compiled.__spec__ = importlib.machinery.ModuleSpec(ops.EXTENSION, None, origin="_ext.so")
    monkeypatch.setitem(sys.modules, ops.EXTENSION, compiled)
    attention = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    monkeypatch.setattr(attention, "IS_CUDA_AVAILABLE", True)
    ops.stand_in_for_missing_ops()
    ops.speed_up_deformable_attention()
    assert sys.modules[ops.EXTENSION] is compiled
    assert attention.IS_CUDA_AVAILABLE  # on a GPU mmcv calls its compiled operator, as before


@pytest.mark.parametrize("absent", [["mmengine"], ["mmcv"], ["mmseg", "mmdet"]])
def test_a_missing_package_is_named_with_the_install_command(monkeypatch, absent):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else find(name, *a))
    with pytest.raises(MissingPackageError, match=r'pip install "ttt-adapt\[openmmlab\]"'):
        require_packages()


def test_one_of_mmseg_and_mmdet_is_enough(monkeypatch):
    find = importlib.util.find_spec
    for absent in ("mmseg", "mmdet"):
        without = lambda name, *a, no=absent: None if name == no else find(name, *a)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", without)
        require_packages()


BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {absent!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
import importlib
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.partition('.')[0] in {absent!r} else find(name, *a)
"""


@pytest.mark.slow
def test_importing_without_mmengine_is_a_missing_package():
    done = run(BLOCK.format(absent=["mmengine"]) + "import ttt_adapt_openmmlab")
    assert 'MissingPackageError: mmengine is not installed. Run: pip install "ttt-adapt[openmmlab]"' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("absent", ["mmdet", "mmseg"])
def test_importing_works_with_only_the_other_of_mmseg_and_mmdet(absent):
    done = run(BLOCK.format(absent=[absent]) + "import ttt_adapt_openmmlab; print('imported')")
    assert done.stdout.strip().endswith("imported"), done.stderr


def test_pickled_metadata_of_the_zoo_loads_with_weights_only(tmp_path):
    path = tmp_path / "zoo.pth"
    saved = zoo_checkpoint({"weight": torch.arange(3.0)})
    torch.save(saved, path)
    loaded = torch.load(path, weights_only=True)
    buffer = loaded["message_hub"]["log_scalars"]["train/lr"]
    assert buffer.mean() == 2.0
    assert buffer.statistics("max") == 3.0
    assert np.array_equal(loaded["meta"]["PALETTE"], saved["meta"]["PALETTE"])
    assert loaded["meta"]["best"] == 0.5
    assert torch.equal(loaded["state_dict"]["weight"], torch.arange(3.0))


def test_checkpoints_written_under_another_numpy_load(tmp_path):
    """NumPy 1 and NumPy 2 call the module of their constructors differently."""
    path = tmp_path / "old.pth"
    palette = np.arange(6).reshape(2, 3)
    torch.save({"PALETTE": palette, "best": np.float64(0.5)}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
    assert new in raw or old in raw
    path.write_bytes(raw.replace(new, old) if new in raw else raw.replace(old, new))
    loaded = torch.load(path, weights_only=True)
    assert np.array_equal(loaded["PALETTE"], palette)
    assert loaded["best"] == 0.5


class Evil:
    def __reduce__(self):
        return getattr, (HistoryBuffer, "__init__")


class Worse:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("evil", [Evil(), Worse()])
def test_anything_else_in_a_checkpoint_is_still_refused(tmp_path, evil):
    path = tmp_path / "evil.pth"
    torch.save({"meta": evil}, path)
    with pytest.raises(Exception, match=r"getattr|Unsupported|not an allowed"):
        torch.load(path)
