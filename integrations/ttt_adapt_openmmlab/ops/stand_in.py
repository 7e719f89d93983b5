"""A stand-in for mmcv's compiled operators, and a faster function in the place of mmcv's deformable attention.

`mmcv-lite` has no compiled operators (`mmcv._ext`). mmdet imports `mmcv.ops`, which cannot be imported without them.
With the stand-in it can. `OPERATORS` are its operators: those of torchvision, and short formulas in PyTorch, forward
and backward. Any other operator raises an error when it is called. mmcv has the deformable attention of Mask2Former in
plain PyTorch, too, and `ttt_adapt_openmmlab.ops.deformable` takes the place of that function.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ttt_adapt.errors import MissingPackageError
from ttt_adapt_openmmlab.ops import boxes, deformable_conv, deformable_regions, focal_loss, regions, windows
from ttt_adapt_openmmlab.ops.deformable import instead_of

EXTENSION = "mmcv._ext"


def _not_compiled() -> str:
    return "none (mmcv-lite)"


OPERATORS: Mapping[str, Callable[..., Any]] = {
    operator.__name__: operator
    for operator in (
        boxes.nms,
        boxes.softnms,
        boxes.nms_match,
        boxes.bbox_overlaps,
        regions.roi_align_forward,
        regions.roi_align_backward,
        regions.roi_pool_forward,
        regions.roi_pool_backward,
        deformable_regions.deform_roi_pool_forward,
        deformable_regions.deform_roi_pool_backward,
        deformable_conv.deform_conv_forward,
        deformable_conv.deform_conv_backward_input,
        deformable_conv.deform_conv_backward_parameters,
        deformable_conv.modulated_deform_conv_forward,
        deformable_conv.modulated_deform_conv_backward,
        focal_loss.sigmoid_focal_loss_forward,
        focal_loss.sigmoid_focal_loss_backward,
        focal_loss.softmax_focal_loss_forward,
        focal_loss.softmax_focal_loss_backward,
        windows.carafe_forward,
        windows.carafe_backward,
        windows.carafe_naive_forward,
        windows.carafe_naive_backward,
        windows.masked_im2col_forward,
        windows.masked_col2im_forward,
        windows.psamask_forward,
        windows.psamask_backward,
    )
} | {"get_compiler_version": _not_compiled, "get_compiling_cuda_version": _not_compiled}
"""The operators of the stand-in by their names in `mmcv._ext`, with its arguments."""


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
    """A module that has an operator of every name; those that are not in `OPERATORS` raise an error when called."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "Stands in for the compiled operators of mmcv.")
        self.__spec__ = ModuleSpec(name, None)
        self.__dict__.update(OPERATORS)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing_op(name)


def _missing_op(name: str) -> Callable[..., Any]:
    def op(*_args: Any, **_kwargs: Any) -> Any:
        raise MissingOpError(
            f"the operator {name!r} needs the compiled mmcv==2.1.0, and this one came without its operators "
            "(mmcv-lite), which torchvision and PyTorch replace in part: build mmcv as 'Compiled operators' in "
            "docs/openmmlab.md says, or take a model without this operator; that page lists those that work"
        )

    op.__name__ = name
    return op
