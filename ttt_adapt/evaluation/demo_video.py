"""What the demo shows of every frame: both predictions, what adapting changed, the weather, and both scores so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ttt_adapt.data.street import CLASSES, IGNORE, PALETTE, StreetClip
from ttt_adapt.tasks.segmentation.score import SegmentationScore
from ttt_adapt.video import VideoWriter
from ttt_adapt.view.changes import changes_image
from ttt_adapt.view.overlay import blend, legend, panels
from ttt_adapt.view.terminal import progress_bar

SCALE = 2
"""The video's pixels for a pixel of the frame, so that small frames fill a screen."""


def write_pictures(
    video: Path, picture: Path, street: StreetClip, fixed: Sequence[np.ndarray], adapted: Sequence[np.ndarray]
) -> None:
    """Write the video of the stream, and its frame in the middle of the night as a PNG.

    Args:
        video: where the video goes.
        picture: where the PNG goes.
        street: the stream.
        fixed: the fixed model's prediction of every frame, class ids [H, W].
        adapted: the adapting model's.
    """
    from PIL import Image

    night = middle_of_the_night(street)
    with VideoWriter(video, street.fps) as writer, progress_bar("write the video", len(street)) as advance:
        for index, shown in enumerate(pictures(street, fixed, adapted)):
            writer.write(shown)
            if index == night:
                Image.fromarray(shown).save(picture)
            advance()


def pictures(street: StreetClip, fixed: Sequence[np.ndarray], adapted: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """One picture for every frame, uint8 RGB, all of one size: four panels, and the colours of the classes below.

    Args:
        street: the stream.
        fixed: the fixed model's prediction of every frame, class ids [H, W].
        adapted: the adapting model's.
    """
    palette = np.asarray(PALETTE, dtype=np.uint8)
    before, after = (_RunningScore(street.fps) for _ in range(2))
    for index, (frame, labels) in enumerate(street):
        own = {
            f"frame: {street.weather(index).title}": frame,
            "adapting made it right (green), wrong (red)": changes_image(
                frame, labels, fixed[index], adapted[index], IGNORE
            ),
            f"fixed model: {before.add(fixed[index], labels)}": blend(frame, fixed[index], palette, ignore=None),
            f"adapted model: {after.add(adapted[index], labels)}": blend(frame, adapted[index], palette, ignore=None),
        }
        sheet = panels({caption: _enlarge(shown) for caption, shown in own.items()}, columns=2)
        yield np.concatenate([sheet, legend(CLASSES, PALETTE, sheet.shape[1])])


def middle_of_the_night(street: StreetClip) -> int:
    """The index of the frame in the middle of the darkest ones."""
    darkness = np.array([street.weather(index).darkness for index in range(len(street))])
    darkest = np.flatnonzero(darkness == darkness.max())
    return int(darkest[len(darkest) // 2])


class _RunningScore:
    """The mIoU of the last second, and that of all frames so far."""

    def __init__(self, fps: float | None) -> None:
        self._score = SegmentationScore(len(CLASSES), IGNORE)
        self._last: deque[float] = deque(maxlen=max(1, round(fps or 1)))

    def add(self, prediction: np.ndarray, labels: np.ndarray) -> str:
        """Count a frame. Returns both numbers in percent, as text."""
        self._last.append(self._score.update(prediction, labels))
        return f"mIoU {100 * np.mean(self._last):.1f} now, {100 * self._score.result()['miou']:.1f} so far"


def _enlarge(picture: np.ndarray) -> np.ndarray:
    return picture.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
