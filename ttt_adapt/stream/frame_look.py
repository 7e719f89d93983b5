"""What a camera shows: a blank or frozen picture, another scene, or an ordinary next frame."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_adapt.errors import CheckpointError
from ttt_adapt.model.parameters import dense
from ttt_adapt.schema import check_fields, flag, number, shown, whole
from ttt_adapt.stream.late import Delayed
from ttt_adapt.stream.state_part import Part

SIDE = 64
"""Pixels of a thumbnail at most, in height and in width."""
BLANK = 4
"""So many blank frames in a row are taken as they come, such as a flash or a fade; then the camera is covered."""
FROZEN = 100
"""So many equal frames in a row are taken as they come, such as those of a slower film; then the camera hangs."""
_SETTLED = 8  # frames until a usual change is known
_RATE = 0.05  # of the averages
_FLOOR = {True: 2.0, False: 0.01}  # contrast that is none, of bytes, and of floats as a model takes them
_FAINT = 0.05  # of the usual contrast: none either
_BLOCKS = 8  # means over 8 x 8 blocks say little of motion and much of the scene
# within videos (DAVIS, cars) never both: at most 0.49 of the contrast or 2.4 times; between them from 0.62 and 3.9 on
_CUT_OF_CONTRAST, _CUT_OF_USUAL = 0.55, 3.0


def thumbnail(frame: np.ndarray | Tensor) -> Tensor:
    """A copy of some pixels of a frame, where the frame is.

    Args:
        frame: uint8 [H, W, 3], or float [3, H, W] or [1, 3, H, W].

    Returns:
        [3, h, w] with h and w at most `SIDE`, of the frame's dtype.
    """
    bytewise = frame.dtype in (np.uint8, torch.uint8)
    height, width = frame.shape[:2] if bytewise else frame.shape[-2:]
    down, across = -(-height // SIDE), -(-width // SIDE)
    part: Any = frame[::down, ::across] if bytewise else frame[..., ::down, ::across]
    x = torch.from_numpy(np.array(part, order="C")) if isinstance(part, np.ndarray) else part.detach()
    channels_first = x.permute(2, 0, 1) if bytewise else x.reshape(3, *x.shape[-2:])
    return channels_first.clone(memory_format=torch.contiguous_format)


class Sight(NamedTuple):
    """What is seen.

    Attributes:
        held: "blank" or "frozen": the frame teaches nothing; "" for a picture.
        resumed: whether it is the first picture after such frames.
        cut: whether another scene begins.
    """

    held: str = ""
    resumed: bool = False
    cut: bool = False


@dataclass(frozen=True)
class _Seen:
    """What is known of a camera.

    Attributes:
        frames: how many pictures.
        blank: how many frames in a row are blank.
        same: how many frames in a row equal the one before.
        held: whether the last frame was held back.
        contrast: usual standard deviation of a channel.
        coarse: the same, of the means over blocks.
        change: usual mean difference of these from those of the frame before.
    """

    frames: int = 0
    blank: int = 0
    same: int = 0
    held: bool = False
    contrast: float = 0.0
    coarse: float = 0.0
    change: float = 0.0


_FIELDS = {
    "thumbnail": lambda value: "",
    "frames": whole(), "blank": whole(), "same": whole(), "held": flag, "contrast": number(0.0), "coarse": number(0.0),
    "change": number(0.0), "waiting": lambda value: "",
}  # fmt: skip


class FrameLook(Part):
    """Looks at each frame of a camera, by a thumbnail; nothing of it enters a step.

    Frames on a CUDA device are judged one frame later, so that the host does not wait for them.
    """

    def __init__(self) -> None:
        self._before: Tensor | None = None
        self._seen = _Seen()
        self._numbers = Delayed(1, 4)

    def at(self, small: Tensor) -> Sight:
        """Look at the next frame.

        Args:
            small: its thumbnail.
        """
        before, self._before = self._before, small
        now, then = small.float(), None if before is None or before.shape != small.shape else before.to(small).float()
        blocks = F.adaptive_avg_pool2d(now, _BLOCKS)
        contrast, coarse = (x.flatten(1).std(1, correction=0).amax() for x in (now, blocks))
        change = largest = torch.full_like(contrast, -1.0)
        if then is not None:
            change = (blocks - F.adaptive_avg_pool2d(then, _BLOCKS)).abs().mean()
            largest = (now - then).abs().amax()
        found = self._numbers.push(torch.stack([contrast, coarse, change, largest]))
        return Sight() if found is None else self._judge(*found, bytewise=small.dtype == torch.uint8)

    def _judge(self, contrast: float, coarse: float, change: float, largest: float, *, bytewise: bool) -> Sight:
        was = self._seen
        is_blank = contrast <= max(_FLOOR[bytewise], _FAINT * was.contrast)
        is_same = largest == 0.0
        blank, same = (was.blank + 1 if is_blank else 0), (was.same + 1 if is_same else 0)
        held = "blank" if blank > BLANK else "frozen" if same > FROZEN else ""
        seen = replace(was, blank=blank, same=same, held=bool(held))
        cut = False
        if not is_blank and not is_same and math.isfinite(contrast + change):
            usual = was.frames > _SETTLED and not was.blank
            cut = usual and change > _CUT_OF_CONTRAST * was.coarse and change > _CUT_OF_USUAL * was.change
            rate = max(1.0 / (was.frames + 1), _RATE)
            seen = replace(seen, frames=was.frames + 1, contrast=_toward(was.contrast, contrast, rate))
            seen = replace(seen, coarse=_toward(was.coarse, coarse, rate))
            if change >= 0.0 and not cut and not was.blank:  # a picture after none is no change of the usual kind
                seen = replace(seen, change=_toward(was.change, change, rate))
        self._seen = seen
        return Sight(held, was.held and not held, cut)

    def reset(self) -> None:
        """See `Part`."""
        self._before, self._seen = None, _Seen()
        self._numbers.reset()

    def state_dict(self) -> dict[str, Any]:
        """The last thumbnail, and what is known."""
        small = None if self._before is None else self._before.clone()
        return {"thumbnail": small, **vars(self._seen), "waiting": self._numbers.state_dict()}

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """See `Part`."""
        check_fields(saved, _FIELDS, "the state's look at frames")
        small = saved["thumbnail"]
        if small is not None and not _is_thumbnail(small):
            raise CheckpointError(f"the state's thumbnail is {shown(small)}; expected [3, h, w], uint8 or float")
        waiting = self._numbers.prepare_load(saved["waiting"])
        seen = _Seen(**{name: saved[name] for name in vars(_Seen())})
        small = None if small is None else small.detach().clone()

        def load() -> None:
            waiting()
            self._before, self._seen = small, seen

        return load

    def mark(self) -> Callable[[], None]:
        """See `Part`."""
        before, seen, waiting = self._before, self._seen, self._numbers.mark()

        def undo() -> None:
            waiting()
            self._before, self._seen = before, seen

        return undo


def _is_thumbnail(small: Any) -> bool:
    """Whether a value can be what `thumbnail` returns."""
    if not isinstance(small, Tensor) or not dense(small):
        return False
    fits = small.ndim == 3 and len(small) == 3 and 0 < min(small.shape[1:]) <= max(small.shape[1:]) <= SIDE
    return fits and (small.dtype == torch.uint8 or small.is_floating_point())


def _toward(average: float, value: float, rate: float) -> float:
    """A moving average, one value later."""
    return average + rate * (value - average)
