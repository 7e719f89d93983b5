"""A stand-in for mmcv's compiled operators, and a faster function in the place of mmcv's deformable attention.

`mmcv-lite` has no compiled operators (`mmcv._ext`). mmdet imports `mmcv.ops`, which cannot be imported without them.
With the stand-in it can, and an operator raises an error when it is called. Mask2Former and most segmentation models
never call one. mmcv has the deformable attention of Mask2Former in plain PyTorch, too, and
`ttt_adapt_openmmlab.ops.deformable` takes the place of that function.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ttt_adapt.errors import MissingPackageError
from ttt_adapt_openmmlab.ops.deformable import instead_of

EXTENSION = "mmcv._ext"


class MissingOpError(MissingPackageError, NotImplementedError):
    """An operator that only the compiled mmcv has was called."""


def stand_in_for_missing_ops() -> None:
    """Let `mmcv.ops` import where mmcv was installed without compiled operators; elsewhere do nothing."""
    if importlib.util.find_spec(EXTENSION) is not None:  # compiled, or this function ran before
        return
    sys.modules[EXTENSION] = _StandIn(EXTENSION)
    # mmcv has deformable attention in plain PyTorch, too, and calls it where this says that there is no CUDA.
    attention: Any = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    attention.IS_CUDA_AVAILABLE = False


def speed_up_deformable_attention() -> None:
    """Put the library's deformable attention in the place of mmcv's function in plain PyTorch.

    mmcv calls that function for CPU tensors, and for all tensors where `stand_in_for_missing_ops` set that there is
    no CUDA. So on a GPU a compiled operator is still used where there is one, and else a Triton kernel.
    """
    attention: Any = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    attention.multi_scale_deformable_attn_pytorch = instead_of(attention.multi_scale_deformable_attn_pytorch)


class _StandIn(ModuleType):
    """A module that has an operator of every name; each raises an error when it is called."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "Stands in for the compiled operators of mmcv.")
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing_op(name)


def _missing_op(name: str) -> Callable[..., Any]:
    def op(*_args: Any, **_kwargs: Any) -> Any:
        raise MissingOpError(
            f"the operator {name!r} needs the compiled mmcv==2.1.0, and this one came without its operators "
            "(mmcv-lite): build it as 'Compiled operators' in docs/openmmlab.md says, or take a model without it, such "
            "as Mask2Former"
        )

    op.__name__ = name
    return op
