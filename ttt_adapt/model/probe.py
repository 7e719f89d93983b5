"""Random images to run a model on, to find out how it is built."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FIRST_SIZE = (128, 160)
"""The size (H, W) of images that is tried first: small, not square, and whole cells of most strides."""


def probe_images(model: nn.Module, size: tuple[int, int], channels: int = 3) -> Tensor:
    """Fixed random images [1, C, H, W] of `size` (H, W), with the dtype and on the device of the model."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(1, channels, *size, generator=generator, device="cpu").to(like)


def probe_sizes(model: nn.Module, image_size: int | tuple[int, int] | None) -> list[tuple[int, int]]:
    """The sizes (H, W) to try, in this order.

    `image_size` alone if it is given. Otherwise a small size that is not square, the sizes that the model names, and
    two that are common.
    """
    if image_size is not None:
        return [(image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])]
    sizes = [FIRST_SIZE]
    if "input_size" in (config := data_config(model)):
        sizes.append(tuple(config["input_size"][-2:]))
    for module in model.modules():
        side = getattr(module, "img_size", None) or getattr(getattr(module, "config", None), "image_size", None)
        if side:
            sizes.append((along(side), along(side, 1)))
    return list(dict.fromkeys([*sizes, (224, 224), (256, 256)]))


def other_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes (H, W) beside `size` to try, in this order: another shape, larger, whole multiples, and a square."""
    h, w = size
    return [
        *([(192, 128)] if size == FIRST_SIZE else []),
        (2 * h, w),
        (h + 64, w + 64),
        (2 * h, 2 * w),
        *([(min(size),) * 2] if w != h else []),
    ]


def along(value: Any, axis: int = 0) -> int:
    """A number that may be given once or for each axis (H, W), as sizes and strides are."""
    return int(value if isinstance(value, int) else value[axis])


def data_config(model: nn.Module) -> dict[str, Any]:
    """The data configuration (mean, std, input_size) that timm keeps on its models; empty for other models."""
    for module in model.modules():
        config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
        if config and "mean" in config:
            return dict(config)
    return {}


@contextmanager
def in_evaluation(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, these modules, not those inside of them, are in evaluation mode; afterwards as they were."""
    training = [m for m in modules if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Inside the block, every module is in evaluation mode; afterwards each is as it was."""
    return in_evaluation(model.modules())


def returning_as_evaluated(module: nn.Module) -> AbstractContextManager[None]:
    """Inside the block, a module in training mode returns what it returns in evaluation mode; its layers train on.

    Some encoders return further maps in training, for losses of the model's own.
    """
    return in_evaluation([module] if any(True for _ in module.children()) else [])
