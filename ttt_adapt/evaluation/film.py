"""`ttt-adapt run`: adapt a trained model to a video and write what it sees."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttt_adapt.adapter import StreamAdapter
from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import CheckpointError, ConfigError
from ttt_adapt.files import output_folder
from ttt_adapt.stream.frames import Normalize
from ttt_adapt.tasks import find_task
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint
from ttt_adapt.video import DEFAULT_FPS, VideoReader, VideoWriter, check_format, open_video
from ttt_adapt.view.overlay import panels
from ttt_adapt.view.reconstruction import reconstruction_image
from ttt_adapt.view.terminal import counted, notice, progress_bar

COLOUR_NOISE = 8
"""Levels between the channels of a grey frame that a video codec's rounding may leave."""


@dataclass(frozen=True)
class RunOptions:
    """What to stream, through what, into what.

    Attributes:
        source: video file, folder of frames, camera index, or URL.
        checkpoint: a file of `ttt-adapt train`.
        out: the mp4 to write.
        view: "overlay" (the prediction, of classes over the frame) or "panels" (frame, fixed and adapted prediction,
            reconstruction).
        size: (H, W) at which the model sees the frames; None: the training height, the video's aspect.
        native: the model sees the frames at their own size.
        limit: stop after this many frames; None: at the end.
        fps: frames per second of the written video; None: the source's own rate.
        device: where to run.
        config: how to adapt.
        branch: what the branch hides and scores at test time, see `MAEBranch.using`.
        task: what the checkpoint is expected to be trained for; None: whatever it is.
    """

    source: str
    checkpoint: Path
    out: Path
    view: str = "overlay"
    size: tuple[int, int] | None = None
    native: bool = False
    limit: int | None = None
    fps: float | None = None
    device: torch.device | str = "cpu"
    config: StreamConfig = field(default_factory=StreamConfig)
    branch: dict[str, Any] = field(default_factory=dict)
    task: str | None = None


def run(options: RunOptions) -> int:
    """Adapt frame by frame and write the video; returns the number of frames written.

    What was written is a playable file also after Ctrl-C or a video that breaks in the middle.
    """
    checkpoint = _checked(options)
    task = checkpoint.task
    writer = None
    try:
        with ExitStack() as stack:
            stack.enter_context(checkpoint.mae_branch.using(**options.branch))
            video = stack.enter_context(open_video(options.source))
            rate = video.fps if options.fps is None else options.fps
            normalize = _normalize(checkpoint, options, video.size)
            adapter = stack.enter_context(
                StreamAdapter(checkpoint.model, checkpoint.branch, config=options.config, preprocess=normalize)
            )
            view = _View(checkpoint, options, normalize)
            remarks = _Remarks(video, options, rate)
            total = video.length if options.limit is None else min(video.length or options.limit, options.limit)
            advance = stack.enter_context(progress_bar(video.name, total))
            for frame in islice(video, options.limit):
                seen = task.see(frame)
                picture = view.draw(seen, adapter.step(seen))
                if writer is None:
                    output_folder(options.out.parent)
                    writer = stack.enter_context(VideoWriter(options.out, rate))
                remarks.look(frame, seen, picture)
                writer.write(picture)
                assert adapter.last is not None
                advance(adapter.last.losses[0] if adapter.last.losses else None)
    except BaseException:
        if writer is not None and writer.finished:
            notice(f"kept in {writer.path}: {counted(writer.count, 'frame')}")
        raise
    return 0 if writer is None else writer.count


def _checked(options: RunOptions) -> Checkpoint:
    """The checkpoint, if it can do what is asked for."""
    if options.view not in ("overlay", "panels"):
        raise ConfigError(f'view is {options.view!r}; expected "overlay" or "panels"')
    for read in (Path(options.source), options.checkpoint):
        if read.exists() and options.out.exists() and options.out.samefile(read):
            raise ConfigError(f"--out is {options.out}, which is read: it would be lost; choose another file")
    check_format(options.out, options.fps)
    if options.task is not None:
        find_task(options.task)
    checkpoint = load_checkpoint(options.checkpoint, options.device)
    if options.task not in (None, checkpoint.task.name):
        raise CheckpointError(
            f"{options.checkpoint} was trained for {checkpoint.task.name}, not for {options.task}: leave --task "
            f"out, or train one with --task {options.task}"
        )
    if checkpoint.branch is None:
        raise CheckpointError(
            f"{options.checkpoint} was trained for the main task alone and cannot adapt: train it with --recipe joint"
        )
    return checkpoint


def _normalize(checkpoint: Checkpoint, options: RunOptions, size: tuple[int, int]) -> Normalize:
    spec = checkpoint.spec
    target = None if options.native else options.size
    if target is None and not options.native:
        height = spec.size[0]
        target = (height, max(round(height * size[1] / size[0] / 16), 1) * 16)
    return Normalize(spec.mean, spec.std, target, next(checkpoint.model.parameters()).device)


class _Remarks:
    """What the user should know about a video and what is written of it, each said once."""

    def __init__(self, video: VideoReader, options: RunOptions, rate: float | None) -> None:
        self._video, self._options, self._rate = video, options, rate
        self._begun = self._coloured = False

    def look(self, frame: np.ndarray, seen: np.ndarray, picture: np.ndarray) -> None:
        """A frame as it came, as the model is shown it, and the picture that is written."""
        name = self._video.name
        if not self._begun:
            self._begun = True
            self._begin(name, *picture.shape[:2])
        if self._coloured or seen is frame or np.abs(frame.astype(np.int16) - seen).max() <= COLOUR_NOISE:
            return
        self._coloured = True
        notice(f"{name} is in colour: its frames are converted to grey of the same luminance, and coloured anew")

    def _begin(self, name: str, height: int, width: int) -> None:
        """What is known once the first picture is there."""
        if self._rate is None:
            notice(f"{name} has no frame rate: written at {DEFAULT_FPS} frames a second; another one with --fps")
        elif self._video.uneven:
            notice(f"{name}: its frames are not evenly spaced in time; every one is written, {self._rate:.4g} a second")
        if tracks := self._video.sounds:
            notice(f"{name}: the sound ({counted(tracks, 'track')}) is left out; {_sound(self._video, self._options)}")
        if height % 2 or width % 2:
            notice(
                f"{name}: H.264 needs an even height and width; {height} x {width} is written as "
                f"{height + height % 2} x {width + width % 2}, its last row or column repeated"
            )


def _sound(video: VideoReader, options: RunOptions) -> str:
    """How to get a film's sound back."""
    if options.fps not in (None, video.fps):
        return f"at {options.fps:g} frames a second it would not fit"
    files = [str(options.out), options.source, str(options.out.with_name(f"{options.out.stem}-sound.mkv"))]
    out, source, target = (shlex.quote(f"./{file}" if file.startswith("-") else file) for file in files)
    drift = " (it may drift: the frames are written evenly)" if video.uneven else ""
    return f"put it back with: ffmpeg -i {out} -i {source} -map 0:v -map 1:a -c copy -shortest {target}{drift}"


class _View:
    """Turns what a model returns into pictures."""

    def __init__(self, checkpoint: Checkpoint, options: RunOptions, normalize: Normalize) -> None:
        self._checkpoint, self._normalize, self._panels = checkpoint, normalize, options.view == "panels"
        self._fixed = load_checkpoint(options.checkpoint, options.device).model if self._panels else None
        self._device = next(checkpoint.model.parameters()).device

    @torch.no_grad()
    def draw(self, frame: np.ndarray, output: torch.Tensor) -> np.ndarray:
        """uint8 [H, W, 3]: the prediction for the frame that was seen, or the four panels."""
        adapted = self._picture(frame, output)
        if self._fixed is None:
            return adapted
        x = self._normalize(frame)
        generator = torch.Generator(self._device).manual_seed(0)
        seen = self._checkpoint.mae_branch.reconstruct(x, generator=generator)
        return panels(
            {
                self._checkpoint.task.source: frame,
                "fixed": self._picture(frame, self._fixed(x)),
                "adapted": adapted,
                "reconstruction": reconstruction_image(seen, x, self._normalize),
            },
            columns=2,
        )

    def _picture(self, frame: np.ndarray, output: torch.Tensor) -> np.ndarray:
        task = self._checkpoint.task
        return task.draw(frame, task.predict(output, frame))
