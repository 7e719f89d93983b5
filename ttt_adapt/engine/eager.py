"""The eager engine: forward and backward as PyTorch runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def gradients(
    loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], precision: str, device: torch.device
) -> Tensor:
    """Compute `loss()` and leave its gradients in `.grad` of `parameters`, and of no others.

    Args:
        loss: returns a scalar with graph.
        parameters: what to differentiate by; one that the loss does not reach keeps `.grad` None.
        precision: "fp32", or "bf16" for a forward pass under autocast.
        device: where it runs.

    Returns:
        The loss, detached.
    """
    with torch.enable_grad():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(value, parameters, allow_unused=True), strict=True
        ):
            parameter.grad = gradient
    return value.detach()
