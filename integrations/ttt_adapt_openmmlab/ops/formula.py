"""Forward and backward of an operator from one formula, in at least single precision.

mmcv's Python code calls an operator's forward with tensors for the results, and its backward with tensors for the
gradients; both are filled in place, and no graph is kept in between. A backward here runs the formula again and asks
autograd. 16-bit numbers are computed in float32, as torchvision's operators are under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Formula = Callable[..., Tensor]


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it has 16 bits, otherwise itself."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def fill(output: Tensor, formula: Formula, *inputs: Tensor) -> None:
    """Write `formula(*inputs)` into `output`, of any floating dtype."""
    with torch.autocast(output.device.type, enabled=False):
        output.copy_(formula(*map(wide, inputs)))


def gradients(formula: Formula, inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `formula(*inputs)` for all inputs, given that of its result.

    Args:
        formula: differentiable; gets the inputs in at least single precision.
        inputs: floating tensors of any shape.
        grad_output: of the shape of the result.

    Returns:
        A tensor for each input, of its shape; of float32 for inputs of 16 bits.
    """
    with torch.enable_grad(), torch.autocast(grad_output.device.type, enabled=False):
        leaves = [wide(tensor.detach()).requires_grad_() for tensor in inputs]
        output = formula(*leaves)
    return torch.autograd.grad(output, leaves, wide(grad_output))
