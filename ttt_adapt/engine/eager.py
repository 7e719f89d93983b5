"""The eager engine: forward and backward as PyTorch runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import EncoderError, MemoryLimitError


def gradients(
    loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], encoder: int, precision: str, device: torch.device
) -> Tensor:
    """Compute `loss()` and leave its gradients in `.grad` of `parameters`, and of no others.

    Args:
        loss: returns a scalar with graph.
        parameters: what to differentiate by; one that the loss does not reach keeps `.grad` None.
        encoder: how many of them, from the first, are the encoder's.
        precision: "fp32", or "bf16" for a forward pass under autocast.
        device: where it runs.

    Returns:
        The loss, detached.

    Raises:
        EncoderError: the loss reaches no parameter of the encoder.
    """
    with torch.enable_grad():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(value, parameters, allow_unused=True), strict=True
        ):
            parameter.grad = gradient
    if all(parameter.grad is None for parameter in parameters[:encoder]):
        raise EncoderError(
            "the loss reaches none of the encoder's parameters: they were replaced after the branch was attached (by "
            "load_state_dict(assign=True), for example); attach again"
        )
    return value.detach()


@contextmanager
def explained_memory_errors(config: StreamConfig) -> Iterator[None]:
    """Turn out-of-memory errors inside the block into one that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
        if not known or isinstance(error, MemoryLimitError):
            raise
        raise MemoryLimitError(
            f"out of memory in a step with batch_size={config.batch_size}, crop_size={config.crop_size}, "
            f"window={config.window}: lower batch_size or crop_size first, then window, or use precision='bf16'"
        ) from error
