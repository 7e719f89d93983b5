"""Where a model fails on a frame because of its size, the error says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_adapt.errors import FrameSizeError, TTTAdaptError
from ttt_adapt.model.frames import TakenFrame
from ttt_adapt.model.probe import probe_sizes
from ttt_adapt.objectives.base import Objective
from ttt_adapt.stream.state import StreamState

Size = tuple[int, int]

_OF_A_SIZE = (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError)
"""What models and PyTorch raise of a size that they do not take."""


@contextmanager
def explained_sizes(
    taken: TakenFrame,
    worked: tuple[int, ...] | None,
    others: Callable[[], Iterable[Size]],
    attempt: Callable[[Tensor], object],
) -> Iterator[None]:
    """Turn an error inside the block into one of the frame's size, where the size is the reason.

    It is where the same frame fails again, an image without content in the same size fails too, and both pass in
    another size. Nothing of this is run where nothing fails, nor where frames of this size worked before.

    Args:
        taken: the frame. One with a context is not tried again: the context may hold the size.
        worked: the shape [..., H, W] of frames that the model takes, if one is known: of the stream so far.
        others: returns sizes (H, W) to compare with, best those that are known to work.
        attempt: does what the block does with a frame, and leaves nothing behind.

    Raises:
        FrameSizeError: the model does not take frames of this size.
    """
    try:
        yield
    except TTTAdaptError:
        raise
    except _OF_A_SIZE as error:
        x, size = taken.x, (taken.x.shape[-2], taken.x.shape[-1])
        known = taken.context or (worked is not None and tuple(worked[-2:]) == size)
        pictures = (x, torch.zeros_like(x))
        if known or any(_works(attempt, picture) for picture in pictures):
            raise
        both = (s for s in others() if s != size and all(_works(attempt, picture, s) for picture in pictures))
        if (works := next(both, None)) is None:
            raise
        raise FrameSizeError(
            f"the model does not take frames of {size[0]} x {size[1]} (H x W): {type(error).__name__}: {error}. It "
            f"takes {works[0]} x {works[1]}: resize the frames, or pad or crop them, to a size that it takes"
        ) from error


def known_sizes(objective: Objective, state: StreamState) -> list[Size]:
    """Sizes (H, W) that a model probably takes: of the stream so far, of the images for its examination, and others."""
    info = getattr(objective, "info", None)
    known = [state.window.frame_shape, getattr(info, "probe_size", None), *probe_sizes(objective.model, None)]
    return [*dict.fromkeys((size[-2], size[-1]) for size in known if size)]


@torch.no_grad()
def _works(attempt: Callable[[Tensor], object], x: Tensor, size: Size | None = None) -> bool:
    """Whether an attempt does not fail; with `size`, on the frame in this size (H, W)."""
    try:
        attempt(x if size is None else F.interpolate(x.float(), size).to(x))
    except Exception:  # of any kind: it is the first error that is raised then
        return False
    return True
