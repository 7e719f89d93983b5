"""mmcv's deformable convolutions (Dai et al. 2017; Zhu et al. 2019, with modulation) by torchvision's operator.

Both libraries have the offsets of a place in one order: (dy, dx) for each element of the kernel, row by row, for each
deformable group.

The modulated convolution of mmcv reads offsets and mask by the size of its own output, h x w, and does not look at
theirs. From larger fields it takes the first numbers of each image, as if they were [channels, h, w]. DyHead (Dai et
al. 2021) of mmdet is trained with this: it applies the offsets of one level to the next smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torchvision import ops

from ttt_adapt_openmmlab.ops.formula import fill, gradients, wide


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **geometry: int
) -> None:
    """Fill `output` with the deformable convolution.

    Args:
        input: [B, C, H, W].
        weight: [D, C / groups, kh, kw].
        offset: [B, deformable groups * 2 * kh * kw, h, w].
        output: [B, D, h, w].
        columns: not used.
        ones: not used.
        **geometry: `kW`, `kH`, `dW`, `dH` (stride), `padW`, `padH`, `dilationW`, `dilationH`, and those that follow
            from the shapes: `group`, `deformable_group`, `im2col_step`.
    """
    fill(output, _plain(geometry), input, weight, offset)


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Fill the gradients of input and offset; leave that of the weight in `columns` for the call that asks for it."""
    found = gradients(_plain(geometry), [input, weight, offset], grad_output)
    grad_input.copy_(found[0])
    columns.resize_(found[1].shape).copy_(found[1])
    grad_offset.copy_(found[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float = 1.0,
    **geometry: int,
) -> None:
    """Add `scale` times its gradient to that of the weight: from `columns`, where the call before left it."""
    if not columns.numel():  # neither input nor offset needed a gradient
        x, moved = wide(input), wide(offset)
        found = gradients(lambda weight: _plain(geometry)(x, weight, moved), [grad_weight], grad_output)
        columns = found[0]
    grad_weight.add_(columns.to(grad_weight.dtype), alpha=scale)
    columns.resize_(0)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Fill `output` with the modulated deformable convolution.

    Args:
        input: [B, C, H, W].
        weight: [D, C / groups, kh, kw].
        bias: [D], used if `with_bias`.
        ones: not used.
        offset: [B, deformable groups * 2 * kh * kw, h, w].
        mask: [B, deformable groups * kh * kw, h, w].
        output: [B, D, h, w].
        columns: not used.
        **geometry: `kernel_h`, `kernel_w`, `stride_h`, `stride_w`, `pad_h`, `pad_w`, `dilation_h`, `dilation_w`,
            `group`, `deformable_group`, `with_bias`.
    """
    given = [input, weight, offset, mask, *([bias] if geometry["with_bias"] else [])]
    fill(output, _modulated(geometry), *given)


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    **geometry: int,
) -> None:
    """Fill the gradients of all inputs; the arguments are those of `modulated_deform_conv_forward`."""
    given, filled = [input, weight, offset, mask], [grad_input, grad_weight, grad_offset, grad_mask]
    if geometry["with_bias"]:
        given, filled = [*given, bias], [*filled, grad_bias]
    for tensor, gradient in zip(filled, gradients(_modulated(geometry), given, grad_output), strict=True):
        tensor.copy_(gradient)


def _plain(geometry: dict[str, int]) -> Callable[..., Tensor]:
    """The convolution of (input, weight, offset), by the names of the first version."""
    stride, padding = (geometry["dH"], geometry["dW"]), (geometry["padH"], geometry["padW"])
    dilation = geometry["dilationH"], geometry["dilationW"]

    def convolve(x: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        return ops.deform_conv2d(x, offset, weight, None, stride, padding, dilation)

    return convolve


def _modulated(geometry: dict[str, int]) -> Callable[..., Tensor]:
    """The convolution of (input, weight, offset, mask, bias), by the names of the second version."""
    stride, padding, dilation = (
        (geometry[f"{name}_h"], geometry[f"{name}_w"]) for name in ("stride", "pad", "dilation")
    )

    def convolve(x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
        sides = zip(x.shape[-2:], weight.shape[-2:], stride, padding, dilation, strict=True)
        size = [(side + 2 * pad - far * (kernel - 1) - 1) // step + 1 for side, kernel, step, pad, far in sides]
        offset, mask = (_first_numbers(fields, size) for fields in (offset, mask))
        return ops.deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)

    return convolve


def _first_numbers(fields: Tensor, size: list[int]) -> Tensor:
    """Fields [B, C, H, W] as mmcv reads them for an output of `size` (h, w): the first C * h * w numbers per image."""
    count = fields.shape[1] * size[0] * size[1]
    if list(fields.shape[-2:]) == size or math.prod(fields.shape[1:]) < count:  # too few numbers: torchvision says so
        return fields
    return fields.flatten(1)[:, :count].unflatten(1, (fields.shape[1], *size))
