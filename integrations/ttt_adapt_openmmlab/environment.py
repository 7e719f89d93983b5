"""What this package needs of its surroundings: installed packages, and a `torch.load` that reads OpenMMLab's files."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import torch

from ttt_adapt.errors import CheckpointError, MissingPackageError


def require_packages() -> None:
    """Check that MMEngine, mmcv and at least one of mmsegmentation and mmdetection are installed.

    Raises:
        MissingPackageError: one is not; the message holds the `pip install`.
    """
    absent = [name for name in ("mmengine", "mmcv") if importlib.util.find_spec(name) is None]
    if all(importlib.util.find_spec(name) is None for name in ("mmseg", "mmdet")):
        absent.append("mmsegmentation or mmdetection")
    if absent:
        what = ", ".join(absent)
        raise MissingPackageError(f'{what} is not installed. Run: pip install "ttt-adapt[openmmlab]"')


def allow_zoo_checkpoints() -> None:
    """Let `torch.load` read what OpenMMLab's checkpoints hold besides tensors: NumPy values and log buffers.

    From version 2.6 on, PyTorch loads only classes of a list. This adds classes to the list that only hold data. Older
    log buffers name their statistics by `getattr`; it is replaced by a function that returns these statistics alone.
    """
    from mmengine.logging.history_buffer import HistoryBuffer

    core = importlib.import_module("numpy._core" if hasattr(np, "_core") else "numpy.core")
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"]}
    functions = [
        (getattr(core.multiarray, name), f"{package}.multiarray.{name}")
        for name in ("_reconstruct", "scalar")
        for package in ("numpy.core", "numpy._core")  # as NumPy 1 and NumPy 2 write it
    ]
    named = [(_statistic, "builtins.getattr")]
    torch.serialization.add_safe_globals([HistoryBuffer, np.ndarray, np.dtype, *dtypes, *functions, *named])


def _statistic(owner: Any, name: str) -> Any:
    """A statistic of a log buffer ("min", "max", "current", "mean"), and nothing else."""
    from mmengine.logging.history_buffer import HistoryBuffer

    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise CheckpointError(f"the checkpoint asks for getattr({owner!r}, {name!r}), which no checkpoint needs")
    return getattr(HistoryBuffer, name)
