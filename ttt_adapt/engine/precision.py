"""The precision of a gradient step. Weights and optimizer keep their own precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ttt_adapt.errors import ConfigError


def forward_pass(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """For the forward pass: autocast to bfloat16 if the precision is "bf16"; a caller's own autocast is off.

    Casts of weights are not cached: after the update of the weights they would be stale.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


@contextmanager
def both_passes(precision: str) -> Iterator[None]:
    """For forward and backward pass: TF32 is on if the precision is "tf32", and as it was after the block."""
    if precision != "tf32":
        yield
        return
    switches, name, on = _tf32_switches()
    before = [(switch, value) for switch in switches if (value := getattr(switch, name)) != on]
    for switch, _ in before:
        setattr(switch, name, on)
    try:
        yield
    finally:
        for switch, value in before:
            setattr(switch, name, value)


def _tf32_switches() -> tuple[list[Any], str, Any]:
    """Where TF32 is switched on, by which attribute, and its value."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn  # type: Any, Any
    try:
        _ = products.allow_tf32, convolutions.allow_tf32
    except RuntimeError:  # the process uses the newer way, and the older one is closed to it
        return [products, convolutions.conv], "fp32_precision", "tf32"
    return [products, convolutions], "allow_tf32", True


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse what the device cannot do.

    Raises:
        ConfigError: TF32 on anything but a CUDA device of compute capability 8.0 or later.
    """
    if precision != "tf32":
        return
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if not able:
        raise ConfigError(
            f"precision is 'tf32' and the model is on {device}: TF32 is a mode of CUDA devices of compute capability "
            "8.0 or later; use 'fp32' or 'bf16'"
        )
