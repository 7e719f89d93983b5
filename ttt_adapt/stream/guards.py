"""Guards: what watches over one video: its frames, its losses, its weights and its predictions.

Here is what is known and decided. What is done to the model then is in `ttt_adapt/sharing/guarding.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ttt_adapt.schema import check_fields, optional, whole
from ttt_adapt.stream.frame_look import FrameLook
from ttt_adapt.stream.last_good import LastGood
from ttt_adapt.stream.late import Delayed
from ttt_adapt.stream.loss_limit import LossLimit
from ttt_adapt.stream.prediction_look import PredictionLook
from ttt_adapt.stream.state_part import Part

EVERY = 16
"""After so many frames the weights are looked at."""
KEEP_EVERY = 64
"""After so many frames in order, the video is kept as the last good one."""


class Guards(Part):
    """The guards of one video.

    Attributes:
        frames: looks at what the camera shows.
        losses: says which loss is a spike.
        predictions: looks at predictions.
        drift: distances of the weights from the source, on their way to the host.
        good: the video as it was when all was well.

    Args:
        device: of the losses.
        parts: name -> the parts of the video that go back together.
    """

    def __init__(self, device: torch.device, parts: Mapping[str, Part]) -> None:
        self.frames, self.losses, self.predictions = FrameLook(), LossLimit(device), PredictionLook()
        self.drift, self.good = Delayed(1, 1), LastGood(parts)
        self._members: dict[str, Part] = {
            "frames": self.frames,
            "losses": self.losses,
            "predictions": self.predictions,
            "drift": self.drift,
            "good": self.good,
        }
        self._begin()

    def _begin(self) -> None:
        self._fresh: int | None = None
        self._quiet = 0
        self._restored: int | None = None

    @property
    def newest(self) -> int | None:
        """How many frames a draw may see, the current one included; None: all of the window."""
        return None if self._fresh is None else self._fresh + 1

    def begin_window(self) -> None:
        """Let draws see the current frame and later ones only."""
        self._fresh = 0

    def count(self, committed: bool) -> None:
        """Go on to the next frame.

        Args:
            committed: whether the current one is in the window.
        """
        if self._fresh is not None and committed:
            self._fresh += 1
        self._quiet += 1
        if self._restored is not None:
            self._restored += 1

    @property
    def looks_at_weights(self) -> bool:
        """Whether the weights are looked at behind the current frame."""
        return (self._quiet + 1) % EVERY == 0

    def keep_if_due(self) -> None:
        """Keep the video as the last good one, where it has gone on in order for long enough."""
        if (self._quiet + 1) % KEEP_EVERY == 0 and self.predictions.sound:
            self.good.keep()

    def restore(self) -> bool:
        """Bring the video back to where all was well; False where only the source is left.

        The source is also left where the last time was not long ago.
        """
        recent = self._restored is not None and self._restored < KEEP_EVERY
        found = not recent and self.good.restore()
        if not found:
            self.good.reset()
        self._quiet, self._restored = 0, 0
        self.begin_window()
        self.losses.reset()
        self.drift.reset()
        self.predictions.begin_again()
        return found

    # ---- as a part of the stream's state

    def reset(self) -> None:
        """See `Part`."""
        for member in self._members.values():
            member.reset()
        self._begin()

    def free(self) -> None:
        """See `Part`."""
        self.good.free()

    def state_dict(self) -> dict[str, Any]:
        """What each guard knows."""
        own = {"fresh": self._fresh, "quiet": self._quiet, "restored": self._restored}
        return {**own, **{name: member.state_dict() for name, member in self._members.items()}}

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """See `Part`; None is from a stream without guards: they begin here."""
        if saved is None:
            return self.reset
        check_fields(saved, dict.fromkeys(self._members, _checked_there) | _FIELDS, "the state's guards")
        takers = [member.prepare_load(saved[name]) for name, member in self._members.items()]
        own = saved["fresh"], saved["quiet"], saved["restored"]

        def load() -> None:
            for take in takers:
                take()
            self._fresh, self._quiet, self._restored = own

        return load

    def mark(self) -> Callable[[], None]:
        """See `Part`."""
        undoes = [member.mark() for member in self._members.values()]
        own = self._fresh, self._quiet, self._restored

        def undo() -> None:
            for each in undoes:
                each()
            self._fresh, self._quiet, self._restored = own

        return undo


_FIELDS = {"fresh": optional(whole()), "quiet": whole(), "restored": optional(whole())}


def _checked_there(_value: Any) -> str:
    """For what the member itself checks."""
    return ""
