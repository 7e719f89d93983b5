"""A model that a sweep looks at, and what comes out of models: nested outputs as a list of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SIZES = ((128, 160), (224, 224), (256, 256), (64, 64), (384, 384), (448, 448))
"""(H, W) of images; most models take one of these."""


@dataclass
class Subject:
    """A model with random weights, ready to be looked at.

    Attributes:
        model: in evaluation mode.
        bytes: whether frames come as uint8 [H, W, 3], for models that say how frames are normalised; else as floats.
        attach: keywords of `MAEBranch.attach`, such as a size that the model takes.
    """

    model: nn.Module
    bytes: bool = False
    attach: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, before: Callable[[], Any] = lambda: None, batch: int = 1) -> None:
        """Run the model on random images of the first of some sizes that it takes; `before` each try, call that."""
        size = self.attach.get("image_size")
        for height, width in [size] if size else SIZES:
            before()
            with suppress(Exception), torch.no_grad():
                self.model(torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(4)))
                return

    def frame(self, size: tuple[int, int], seed: int) -> Tensor:
        """A frame of `size` (H, W): uint8 [H, W, 3], or float [3, H, W]. Smooth, so that resizing keeps it."""
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(1, 3, 6, 8, generator=generator)
        image = nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)[0]
        if self.bytes:
            return (image * 255).to(torch.uint8).permute(1, 2, 0).contiguous()
        return (image - 0.5) / 0.25

    def frames(self, size: tuple[int, int], count: int) -> list[Tensor]:
        """`count` different frames."""
        return [self.frame(size, seed) for seed in range(count)]


def draw_biases(model: nn.Module) -> None:
    """Give small random values to biases that are all 0, as trained models have.

    Without them, a token of hidden pixels is 0 in every layer, and each LayerNorm on its way multiplies the gradient by
    `1 / sqrt(eps)`: it overflows.
    """
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and not bool(parameter.any()):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def leaves(output: Any) -> Iterator[Tensor]:
    """All tensors of an output, depth first: of mappings, sequences, dataclasses and data samples."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from leaves(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from leaves(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from leaves(getattr(output, field.name))
    elif callable(getattr(output, "all_items", None)):  # structures of MMEngine
        for _, value in output.all_items():
            yield from leaves(value)


def same(a: Any, b: Any) -> bool:
    """Whether two outputs hold the same tensors, bit for bit; NaN equals NaN."""
    first, second = list(leaves(a)), list(leaves(b))
    return len(first) == len(second) and all(identical(x, y) for x, y in zip(first, second, strict=True))


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and values; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


@dataclass
class Snapshot:
    """What a model was like: to be compared with what it is like later."""

    tensors: dict[str, tuple[int, Tensor]]
    keys: list[str]
    flags: dict[str, bool]
    training: list[bool]
    hooks: int
    classes: list[type]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """The tensors, flags and hooks of a model now."""
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return cls(
            tensors={name: (id(tensor), tensor.detach().clone()) for name, tensor in named},
            keys=list(model.state_dict()),
            flags={name: p.requires_grad for name, p in model.named_parameters()},
            training=[m.training for m in model.modules()],
            hooks=_count_hooks(model),
            classes=[type(m) for m in model.modules()],
        )

    def differences(self, model: nn.Module) -> list[str]:
        """In words, what is different in the model now."""
        now, found = Snapshot.of(model), []
        if list(self.tensors) != list(now.tensors) or self.keys != now.keys:
            found.append("other names of parameters or buffers")
        names = [name for name in self.tensors if name in now.tensors]
        if moved := [name for name in names if self.tensors[name][0] != now.tensors[name][0]]:
            found.append(f"{len(moved)} tensors are other objects, such as {moved[0]}")
        if moved := [name for name in names if not identical(self.tensors[name][1], now.tensors[name][1])]:
            found.append(f"{len(moved)} tensors have other values, such as {moved[0]}")
        for what in ("flags", "training", "hooks", "classes"):
            if getattr(self, what) != getattr(now, what):
                found.append(f"{what} changed")
        return found


def _count_hooks(model: nn.Module) -> int:
    stores = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, store)) for m in model.modules() for store in stores)
