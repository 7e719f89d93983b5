"""Multi-scale deformable attention without compiled operators, as Mask2Former's pixel decoder needs it.

One operator, `torch.ops.ttt_adapt.deformable_attention`, with an implementation per device: Triton kernels on CUDA
(`deformable_cuda`), sums over a padded table on the CPU (`deformable_cpu`). `torch.compile` takes it as one
node, without a graph break. `instead_of` puts it in the place of mmcv's function in plain PyTorch, which is still
called for tensors on other devices.

Formula: Zhu et al., Deformable DETR (ICLR 2021), equation 3, with bilinear samples as `grid_sample` takes them under
`align_corners=False, padding_mode="zeros"`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ttt_adapt import TTTAdaptError
from ttt_adapt.errors import StateError, warn
from ttt_adapt_openmmlab.ops import deformable_cpu

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class DeformableAttentionError(TTTAdaptError, ValueError):
    """The arguments of deformable attention do not fit each other."""


def deformable_attention(
    value: Tensor, value_spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The weighted sum of bilinear samples from several levels, per head.

    Locations and weights may have another dtype than the values, as they have under `torch.autocast`. Products are
    summed in float32, or in float64 for float64 values. A NaN in a location or weight comes out as NaN.

    Args:
        value: [B, S, heads, dim], the pixels of all levels one after the other, each row by row; CPU or CUDA.
        value_spatial_shapes: [L, 2], integers, height and width of every level; their areas add up to S. On the CPU, a
            table is made of (sum of heights + 4 L) x (largest width + 2) pixels per image.
        sampling_locations: [B, Q, heads, L, points, 2], (x, y) in units of the level: 0 is its left or upper edge, 1
            its right or lower one. What lies outside is zero.
        attention_weights: [B, Q, heads, L, points].

    Returns:
        [B, Q, heads * dim], in the dtype of `value`. It has a first derivative and no second.

    Raises:
        DeformableAttentionError: shapes or dtypes do not fit. On CUDA, S is not compared with the areas, which would
            wait for the device; pixels beyond S are zero.
        StateError: in the backward pass of a backward pass.
    """
    _check(value, value_spatial_shapes, sampling_locations, attention_weights)
    return _forward(value, value_spatial_shapes, sampling_locations, attention_weights)


def _check(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> None:
    if value.ndim != 4 or shapes.ndim != 2 or shapes.shape[1] != 2 or len(shapes) == 0:
        raise DeformableAttentionError(
            f"values are {list(value.shape)}, level sizes {list(shapes.shape)}; expected [B, S, heads, dim] and [L, 2]"
        )
    expected = [value.shape[0], None, value.shape[2], len(shapes)]
    got = list(locations.shape)
    fits = len(got) == 6 and got[-1] == 2 and all(e in (None, g) for e, g in zip(expected, got, strict=False))
    if not fits or list(weights.shape) != got[:-1]:
        raise DeformableAttentionError(
            f"locations are {got} and weights {list(weights.shape)}; expected [{expected[0]}, Q, {expected[2]}, "
            f"{expected[3]}, points, 2] and the same without the 2, from values {list(value.shape)} and "
            f"{len(shapes)} levels"
        )
    kinds = [value.dtype, locations.dtype, weights.dtype]
    if not all(kind.is_floating_point for kind in kinds) or shapes.is_floating_point():
        raise DeformableAttentionError(
            f"values, locations and weights are {kinds} and level sizes {shapes.dtype}; expected floats and integers"
        )


@torch.library.custom_op("ttt_adapt::deformable_attention", mutates_args=())
def _forward(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return _implementation(value, shapes).forward(value, shapes, locations, weights)


@_forward.register_fake
def _(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op("ttt_adapt::deformable_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation(value, shapes).backward(grad, value, shapes, locations, weights)


@_backward.register_fake
def _(grad: Tensor, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (value, locations, weights))  # type: ignore[return-value]


def _implementation(value: Tensor, shapes: Tensor) -> ModuleType:
    """The module with `forward` and `backward` for these values.

    Raises:
        DeformableAttentionError: the areas of the levels do not add up to the pixels, where that can be seen at once.
    """
    if value.is_cuda:
        return importlib.import_module("ttt_adapt_openmmlab.ops.deformable_cuda")
    if int(shapes.prod(1).sum()) != value.shape[1]:
        raise DeformableAttentionError(
            f"levels of {shapes.tolist()} (height, width) have {int(shapes.prod(1).sum())} pixels and values "
            f"{list(value.shape)} have {value.shape[1]}; expected [B, S, heads, dim] with S pixels in all levels"
        )
    return deformable_cpu


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    grad_value, grad_locations, grad_weights = _backward(grad, *ctx.saved_tensors)
    return grad_value, None, grad_locations, grad_weights


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise StateError(
        "deformable attention has no second derivative: a gradient was asked for of its gradient. Call "
        "torch.autograd.grad or backward without create_graph=True"
    )


torch.library.register_autograd("ttt_adapt::deformable_attention", _differentiate, setup_context=_keep)
torch.library.register_autograd("ttt_adapt::deformable_attention_backward", _refuse)


def instead_of(plain: Attention) -> Attention:
    """A function that calls `deformable_attention` where there is an implementation for it, and else `plain`.

    Args:
        plain: mmcv's `multi_scale_deformable_attn_pytorch`, or this function's result for it, which is given back.
    """
    if getattr(plain, "in_place_of_mmcv", False):
        return plain

    @functools.wraps(plain)
    def attention(
        value: Tensor, value_spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
    ) -> Tensor:
        ours = value.device.type == "cpu" or (value.is_cuda and triton_works())
        chosen = deformable_attention if ours else plain
        return chosen(value, value_spatial_shapes, sampling_locations, attention_weights)

    attention.in_place_of_mmcv = True  # type: ignore[attr-defined]
    return attention


@torch.compiler.assume_constant_result
def triton_works() -> bool:
    """Whether Triton is installed and runs a kernel on the CUDA device of this process; tried out once.

    Triton translates without a compiler, but some of its versions build their launcher with the C compiler.
    """
    return try_triton()


@functools.lru_cache(maxsize=1)
def try_triton() -> bool:
    """Run a kernel on the CUDA device; the answer is kept, and a warning says why it does not run."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        kernels = importlib.import_module("ttt_adapt_openmmlab.ops.deformable_cuda")
        pixel = torch.zeros(1, 1, 1, 16, device="cuda")
        kernels.forward(pixel, pixel.new_ones(1, 2, dtype=torch.long), pixel[..., None, None, :2], pixel[..., :1, None])
    except Exception as error:  # of many kinds: no compiler, no driver, a device too old
        warn(f"Triton runs no kernel here ({error!r}); deformable attention takes mmcv's path in plain PyTorch")
        return False
    return True
