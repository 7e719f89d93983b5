"""The precision of a gradient step. Predictions are made with the weights in their own precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError
from ttt_adapt.model.half import HALF, half_tensors


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


class HalfWeights:
    """Float32 copies of weights in half precision: gradient steps change the copies; the weights are these, rounded.

    A usual step moves a weight by 1e-5. Such steps are lost in bfloat16, which has 8 bits, and Adam's second moments of
    float16 gradients are 0. Gradients of float16 underflow as well, without a scale of the loss. So a gradient pass
    runs in bfloat16, which has the range of float32, also for a model in float16. In full precision nothing differs.

    Source: Micikevicius et al., "Mixed precision training", ICLR 2018, for the copies.

    Attributes:
        copies: name -> copy, of the trained parameters that are in half precision.

    Args:
        modules: the model and the objective, where the parameters are.
        trained: name -> parameter.
    """

    def __init__(self, modules: Sequence[nn.Module], trained: Mapping[str, nn.Parameter]) -> None:
        self._modules = modules
        halves = {name: p for name, p in trained.items() if p.dtype in HALF}
        with torch.inference_mode(False):
            self.copies = {name: nn.Parameter(p.detach().float()) for name, p in halves.items()}
        self._rounded: list[Tensor] = list(halves.values())
        self._copy_of = {id(p): copy for p, copy in zip(halves.values(), self.copies.values(), strict=True)}

    def trained(self, parameter: nn.Parameter) -> nn.Parameter:
        """What a gradient step changes in the place of a parameter: its copy, or the parameter itself."""
        return self._copy_of.get(id(parameter), parameter)

    def of_pass(self, images: Tensor) -> Tensor:
        """Images in the precision of a gradient pass."""
        return images.to(torch.bfloat16) if self.copies and images.dtype in HALF else images

    @contextmanager
    def in_pass(self) -> Iterator[None]:
        """Inside the block, the modules have their weights in the precision of a gradient pass, made from the copies.

        Raises:
            ConfigError: a model in float16 does not run in bfloat16.
        """
        if not self.copies:
            yield
            return
        before = []
        try:
            for table, name, tensor in list(half_tensors(*self._modules)):
                before.append((table, name, tensor))
                table[name] = self._copy_of.get(id(tensor), tensor).to(torch.bfloat16)
            yield
        except RuntimeError as error:
            if "dtype" not in str(error) and "BFloat16" not in str(error):
                raise
            raise ConfigError(
                f"the weights are in half precision, and a gradient step runs in bfloat16, which this model does not "
                f"({error}): convert it with model.float() before the adapter is made"
            ) from error
        finally:
            for table, name, tensor in before:
                table[name] = tensor

    @torch.no_grad()
    def round(self) -> None:
        """After a step: make the weights the copies, rounded."""
        if self.copies:
            torch._foreach_copy_(self._rounded, list(self.copies.values()))
