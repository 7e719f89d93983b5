"""`VideoWriter`: writes frames into an H.264 file; whatever ends it, the frames so far can be played."""

from __future__ import annotations

import os
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from ttt_adapt.errors import ConfigError, FrameError, FrameTypeError, VideoError
from ttt_adapt.video.film import PROMPT, Encoding
from ttt_adapt.video.film_file import FilmFile
from ttt_adapt.video.sources import import_av

if TYPE_CHECKING:
    from av import VideoFrame


class VideoWriter(FilmFile):
    """Writes uint8 RGB frames [H, W, 3] as H.264 (yuv420p, BT.709), for use in a `with` block.

    See `FilmFile` for what is on disk while it is written, and when something ends it. yuv420p needs an even height and
    width: an odd one is padded by repeating the last row or column.

    Args:
        path: the target; `.mp4`, `.m4v`, `.mov` or `.mkv`. Its folder must exist.
        fps: frames per second. A float stands for the nearest fraction with a denominator up to 1001, so 29.97002997
            is exactly 30000/1001. None, as for a folder of images, means 25.
        size: (height, width) of the frames; None takes it from the first.
        crf: quality, 0 (lossless in luma) to 51; 18 looks like the source.

    Raises:
        ConfigError: `fps`, `size`, `crf` or the suffix is out of range.
        VideoError: the encoder is missing, or the target cannot be written. Nothing has been written then.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float | Fraction | None,
        size: tuple[int, int] | None = None,
        crf: int = 18,
    ) -> None:
        super().__init__(path, fps)
        self._size = size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ConfigError(f"size is {size}, expected (height, width) of at least 1.")
        if not 0 <= crf <= 51:
            raise ConfigError(f"crf is {crf}, expected 0 (best) to 51.")
        self.encoding = Encoding("libx264", "yuv420p", {"crf": str(crf), "x264-params": PROMPT})
        self._check_target()
        _check_encoder()

    def write(self, frame: np.ndarray) -> None:
        """Append one frame, uint8 RGB [H, W, 3].

        Raises:
            FrameError: its shape differs from [H, W, 3] or from the frames before.
            FrameTypeError: it is no uint8 array.
            VideoError: it cannot be encoded or written, such as on a full disk.
            StateError: the writer is closed.
        """
        super().write(frame)

    def _image(self, frame: np.ndarray) -> VideoFrame:
        self._check(frame)
        height, width = frame.shape[:2]
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        image = import_av().VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        return image.reformat(format="yuv420p", src_colorspace="ITU709", dst_colorspace="ITU709")

    def _check(self, frame: np.ndarray) -> None:
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
            what = f"{frame.dtype} array" if isinstance(frame, np.ndarray) else type(frame).__name__
            raise FrameTypeError(
                f"The frame is a {what}, expected a uint8 NumPy array [H, W, 3]. "
                "ttt_adapt.view.overlay.to_uint8 makes one from a normalized tensor."
            )
        if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
            raise FrameError(f"The frame has shape {list(frame.shape)}, expected [H, W, 3].")
        self._size = self._size or frame.shape[:2]
        if frame.shape[:2] != tuple(self._size):
            raise FrameError(f"The frame has shape {list(frame.shape)}, expected {[*self._size, 3]} as the video has.")


def _check_encoder() -> None:
    av = import_av()
    try:
        av.Codec("libx264", "w")
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(
            "This FFmpeg build has no H.264 encoder (libx264). The wheels from PyPI have it: "
            'pip install --force-reinstall --only-binary av "av>=16"; with conda: conda install -c conda-forge av'
        ) from error
