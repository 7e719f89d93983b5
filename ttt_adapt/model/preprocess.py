"""Functions of users that turn a frame into what the model takes: checked, called, and what to do where they fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttt_adapt.errors import ConfigError, FrameError, FrameTypeError

EXPECTED = "preprocess gets a uint8 RGB frame [H, W, 3] and returns a float tensor [1, 3, H, W]"
ONE_CHANNEL = (
    "for a model of one channel, wrap the model in a module whose forward takes images [B, 3, H, W] and makes one "
    "channel of them, x.mean(1, keepdim=True); a grey frame has three equal channels then"
)
_OF_PYTHON = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError)


def check_preprocess(preprocess: Any) -> None:
    """Refuse what cannot be called.

    Raises:
        ConfigError: it is neither None nor callable.
    """
    if preprocess is not None and not callable(preprocess):
        raise ConfigError(
            f"preprocess is {preprocess!r}; expected a function or Normalize(mean, std) (from ttt_adapt): {EXPECTED}"
        )


def preprocessed(preprocess: Callable[[Any], Any], frame: Any) -> Any:
    """What `preprocess` returns for a uint8 frame [H, W, 3]; of transforms of torchvision see `_by_trial`.

    Raises:
        FrameError, FrameTypeError: it raised an error of Python's own kinds; others come through.
    """
    frame = np.require(frame, requirements=["C", "W"]) if isinstance(frame, np.ndarray) else frame
    of_torchvision = type(preprocess).__module__.startswith("torchvision.transforms")
    try:
        return _by_trial(preprocess, frame) if of_torchvision else preprocess(frame)
    except _OF_PYTHON as error:
        if type(error).__module__ != "builtins":
            raise
        kind = FrameTypeError if isinstance(error, TypeError) else FrameError
        raise kind(f"preprocess raised {type(error).__name__}: {error}. {EXPECTED}") from error


def _by_trial(transform: Callable[[Any], Any], frame: Any) -> Any:
    """What a transform of torchvision returns for a frame.

    Some of them take arrays [H, W, 3], some pictures of Pillow, some tensors [3, H, W]: the first of these ways that
    gives an image is taken.

    Raises:
        Exception: of the last way, where none gives an image.
    """
    ways: list[Callable[[], Any]] = [
        lambda: frame,
        lambda: sys.modules["torchvision.transforms.functional"].to_pil_image(_array(frame)),
        lambda: torch.as_tensor(frame).permute(2, 0, 1),
    ]
    for way in ways[:-1]:
        try:
            made = transform(way())
        except Exception:
            continue
        if _is_image(made):
            return made
    return transform(ways[-1]())


def _array(frame: Any) -> np.ndarray:
    return frame.cpu().numpy() if isinstance(frame, Tensor) else np.asarray(frame)


def _is_image(made: Any) -> bool:
    """Whether a transform returned a float image [3, H, W] or [1, 3, H, W]."""
    return isinstance(made, Tensor) and made.is_floating_point() and made.ndim in (3, 4) and made.shape[-3] == 3


def check_made(x: Any) -> Tensor:
    """What `preprocess` returned as [1, 3, H, W], without its graph.

    Raises:
        FrameTypeError, FrameError: it is no image.
    """
    if not isinstance(x, Tensor):
        raise FrameTypeError(f"preprocess returned a {type(x).__name__}; expected a float tensor [1, 3, H, W]")
    shape, x = tuple(x.shape), x.detach()
    x = x[None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[0] != 1 or x.shape[1] != 3 or 0 in x.shape or not x.is_floating_point():
        grey = x.ndim == 4 and x.shape[:2] == (1, 1)
        raise FrameError(
            f"preprocess returned {shape} {x.dtype}; expected float [1, 3, H, W]{': ' + ONE_CHANNEL if grey else ''}"
        )
    return x
