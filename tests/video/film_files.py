"""Small videos of every sort, made by PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason='needs PyAV: pip install "ttt-adapt[video]"')

SIZE = (64, 96)


def flat(count: int) -> list[np.ndarray]:
    """Frames of one grey each, 20 levels apart."""
    return [np.full((*SIZE, 3), 20 * index, np.uint8) for index in range(count)]


def write(
    path: Path | str,
    frames: Sequence[np.ndarray],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    *,
    layout: str = "rgb24",
    matrix: Sequence[int] | None = None,
    cover: str = "",
    sound: bool = False,
    options: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
    **colours: Any,
) -> Path | str:
    """Write `frames` at 25 a second; `cover` is "first" or "last" for a still cover picture before or behind the video.

    Without frames, there is sound alone.
    """
    with av.open(f"file:{path}", "w") as container:
        container.metadata.update(metadata or {})
        still = _still(container) if cover == "first" else None
        stream = None
        if frames:
            stream = container.add_stream(codec, rate=25, options=options or {})
            (stream.height, stream.width), stream.pix_fmt = frames[0].shape[:2], pix_fmt
            if matrix is not None:
                stream.set_display_matrix(matrix)
            for name, value in colours.items():
                setattr(stream.codec_context, name, value)
        voice = (
            container.add_stream("libmp3lame" if str(path).endswith("mp3") else "aac", rate=48000) if sound else None
        )
        still = _still(container) if cover == "last" else still
        if still is not None:
            _mux(container, still, [av.VideoFrame.from_ndarray(np.full((32, 48, 3), 200, np.uint8), format="rgb24")])
        if stream is not None:
            _mux(container, stream, [av.VideoFrame.from_ndarray(frame, format=layout) for frame in frames])
        if voice is not None:
            _mux(container, voice, _silence(1152 if str(path).endswith("mp3") else 1024))
    return path


def _still(container: Any) -> Any:
    stream = container.add_stream("mjpeg", rate=1)
    stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
    stream.disposition = av.stream.Disposition.attached_pic
    return stream


def _silence(samples: int) -> list[Any]:
    sounds = []
    for _ in range(12):
        sound = av.AudioFrame.from_ndarray(np.zeros((2, samples), np.float32), format="fltp", layout="stereo")
        sound.rate = 48000
        sounds.append(sound)
    return sounds


def _mux(container: Any, stream: Any, frames: list[Any]) -> None:
    for frame in [*frames, None]:
        container.mux(stream.encode(frame))
