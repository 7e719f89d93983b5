"""Adapt a trained model to a video, and write a video of what it sees."""

from __future__ import annotations

import shlex
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ttt_adapt.arms import find_arm
from ttt_adapt.calibration.describe import describe_rule
from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import CheckpointError, ConfigError
from ttt_adapt.evaluation.run_outputs import Outputs
from ttt_adapt.evaluation.run_state import RunStates
from ttt_adapt.evaluation.run_targets import Targets
from ttt_adapt.evaluation.runners.base import Runner, device_of
from ttt_adapt.evaluation.runners.start import start
from ttt_adapt.evaluation.runners.streaming import Adapting
from ttt_adapt.evaluation.watching import Watching, unmodified
from ttt_adapt.files import exists, file_digest
from ttt_adapt.objectives.forward_only import ForwardOnly
from ttt_adapt.objectives.mae import MAEBranch
from ttt_adapt.tasks import find_task
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint
from ttt_adapt.video import DEFAULT_FPS, Reconnect, VideoReader, open_video
from ttt_adapt.video.address import redacted
from ttt_adapt.video.reader import Keep, OnResize
from ttt_adapt.view.legend import Legend
from ttt_adapt.view.overlay import fitted, panels
from ttt_adapt.view.reconstruction import reconstruction_image
from ttt_adapt.view.terminal import counted, notice, progress_bar

COLOUR_NOISE = 8
"""Largest difference between the channels of a grey frame, in levels of 256: a video codec rounds."""


def adapt_video(
    source: str,
    checkpoint: Path,
    out: Path | None,
    *,
    labels_out: Path | None = None,
    raw_out: Path | None = None,
    overwrite: bool = False,
    view: str = "overlay",
    legend: bool = False,
    size: tuple[int, int] | Literal["native"] | None = None,
    limit: int | None = None,
    fps: float | None = None,
    keep: Keep | None = None,
    on_resize: OnResize | None = None,
    reconnect: Reconnect | None = None,
    config: StreamConfig | None = None,
    arm: str | None = None,
    changes: Mapping[str, Any] | None = None,
    branch: Mapping[str, Any] | None = None,
    task: str | None = None,
    device: torch.device | str = "cpu",
    state: Path | None = None,
    state_every: int | None = None,
    resume: bool = False,
) -> int:
    """Adapt to a video frame by frame, and write what the model sees: a film, label maps, or its raw outputs.

    What was written can be used whatever ends the run. After Ctrl-C, or when the video breaks in the middle, the film
    is a whole file; when the process is killed, it is `NAME.partial.mp4`, which plays too. The file `run.json` in a
    folder of label maps or raw outputs says whether they are complete. After Ctrl-C all of them have the same frames.

    Args:
        source: video file, folder of frames, camera index, or URL.
        checkpoint: a file of `ttt-adapt train`.
        out: the mp4 to write; None: no film.
        labels_out: folder for label maps: a palette PNG of class ids for each frame, of the frame's size and name
            (frames of a video have their numbers from 000000); or an `.mkv` with the ids as grey levels without loss,
            see `LabelVideoWriter`. None: none. For tasks with classes.
        raw_out: folder for what the model returns: an npz file for each frame, with `output`, float32 [C, H, W] of the
            model's size: class scores, whose softmax over C is the predicted distribution. None: none.
        overwrite: replace a film, label maps and raw outputs of an earlier run.
        view: "overlay" (the prediction, of classes over the frame) or "panels" (frame, fixed and adapted prediction,
            reconstruction).
        legend: whether the film has a strip with the names and colours of the classes at its lower edge.
        size: (H, W) at which the model sees the frames; "native": their own; None: the training height, and the
            video's aspect.
        limit: stop after this many frames; None: at the end.
        fps: frames per second of the written videos; None: the source's own rate.
        keep: "newest" frame or "every" one, see `open_video`.
        on_resize: "reset" or "error", see `open_video`. A reset begins the stream anew; the film keeps its size, and
            frames of another one are scaled to fit into it.
        reconnect: how long a live source is waited for.
        config: how to adapt. None: the default `StreamConfig`, or for a calibrated checkpoint `StreamConfig.online()`
            with the settings that were chosen for it.
        arm: name of a streaming arm that runs instead; its own configuration varies `config`. None: reconstruction as
            `config` says, and calibrated statistics alone for a calibrated checkpoint without an MAE branch.
        changes: fields of the configuration that win over the arm's own defaults.
        branch: what the branch hides and scores at test time, see `MAEBranch.using`.
        task: what the checkpoint is expected to be trained for; None: whatever it is.
        device: where to run.
        state: the file that keeps the state of the run, so that it can go on after anything that ends the process.
            Films grow in parts, `NAME.part-000.mp4`, which are joined at the end.
        state_every: frames between two states; None: 500. The run's last frame has one, too, unless it is killed.
        resume: go on from the state, or begin where there is none. A film is read up to the frame of the state; live
            sources go on with the next frame. All targets go on, too: what is newer than the state is written again.
            `limit` counts the frames of all runs.

    Returns:
        The number of frames written, those before the state included.

    Raises:
        ConfigError, CheckpointError: the arguments do not fit together, a target exists already, or the state is
            damaged, or of another model, configuration or video; nothing is written.
        VideoError: the video cannot be read, or the new one cannot be written.
    """
    if view not in ("overlay", "panels"):
        raise ConfigError(f'view is {view!r}; expected "overlay" or "panels"')
    targets = Targets(out, labels_out, raw_out, overwrite)
    if (out is None and (legend or view != "overlay")) or (fps is not None and not targets.films):
        raise ConfigError("`legend`, `view` and `fps` are of a film, and none is written: name one with `out`")
    states = RunStates(state, state_every, resume, overwrite)
    targets.check(tuple(path for path in (Path(source), checkpoint) if exists(path)), fps, states)
    model = loaded(checkpoint, task, arm, device)
    targets.check_task(model)
    if states.kept:
        how = {
            "arm": arm,
            "changes": changes,
            "branch": branch,
            "size": size,
            "view": view,
            "legend": legend,
            "fps": fps,
        }
        states.check(_settings(checkpoint, config, targets, how))
    about = {"source": redacted(source), "checkpoint": str(checkpoint), **_colours(model)}
    # The outputs end last, so that a signal finds them in order while the rest is closed.
    with Outputs(targets, model, about, states) as written:
        with ExitStack() as stack:
            if branch or (arm is None and model.calibration is None):
                stack.enter_context(model.mae_branch.using(**(branch or {})))  # it raises where there is none
            video = stack.enter_context(
                open_video(source, keep=keep, on_resize=on_resize, reconnect=reconnect, say=notice)
            )
            if states.kept and video.film and keep == "newest":
                raise ConfigError(
                    f"keep is 'newest', and the clock decides which frames of {video.name} that leaves out, so that no "
                    "state can go on with them: leave keep out, or `state`"
                )
            frames = stack.enter_context(closing(_iterated(video)))
            states.find(video, frames)
            rate = video.fps if fps is None else fps
            if states.earlier is not None and states.frames:
                rate = states.earlier.rate
            watching = stack.enter_context(
                closing(Watching(model, size, video, lambda: start_runner(model, config, arm, changes)))
            )
            fixed = load_checkpoint(checkpoint, device).model if view == "panels" and out is not None else None
            pictures = _Pictures(model, fixed, watching, legend)
            if states.earlier is not None and states.earlier.runner is not None:
                watching.go_on(states.earlier.runner, states.earlier.size)
                pictures.go_on(states.earlier.picture)
            remarks = _Remarks(video, source, out, rate, _how_it_runs(model, watching.runner))
            total = video.length if limit is None else min(video.length or limit, limit)
            written.expect(rate, video.names, total)
            stack.callback(_account, video, about)

            def save(last: bool = False) -> None:
                if states.is_whole(written.count) and (last or states.due(written.count)):
                    outputs = {**written.state(), "picture": pictures.size}
                    states.save(written.count, video, watching.state_dict(), outputs)

            stack.callback(save, last=True)
            advance = stack.enter_context(progress_bar(video.name, total, done=written.count))
            for frame in islice(frames, None if limit is None else max(limit - written.count, 0)):
                with states.frame(frame):
                    seen = model.task.see(frame)
                    output = watching.step(seen)
                    prediction = model.task.predict(output, seen)
                    picture = None if out is None else pictures.draw(seen, prediction)
                    written.begin(output)
                    remarks.look(frame, seen, picture)
                    written.write(output, prediction, picture)
                save()
                advance(watching.runner.loss)
        written.finish()
        return written.count


def _iterated(video: VideoReader) -> Generator[np.ndarray, None, None]:
    yield from video


def _settings(
    checkpoint: Path, config: StreamConfig | None, targets: Targets, how: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run depends on, beside its video, in plain values."""
    plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in how.items()}
    return {
        "checkpoint": file_digest(checkpoint),
        "config": None if config is None else asdict(config),
        "outputs": targets.kinds,
        **plain,
    }


def _account(video: VideoReader, about: dict[str, Any]) -> None:
    """Put what became of the source's frames into what `run.json` gets, and say it of a live one."""
    about["frames_of_source"] = video.stats.as_dict()
    if video.live:
        notice(f"{video.name}: {video.stats}")


def _colours(checkpoint: Checkpoint) -> dict[str, Any]:
    """The names and colours of the classes; {} for a task without classes."""
    palette = checkpoint.task.palette
    return {} if palette is None else {"classes": list(checkpoint.spec.classes), "palette": palette.tolist()}


def loaded(file: Path, task: str | None, arm: str | None, device: torch.device | str) -> Checkpoint:
    """The checkpoint, if it is for the task and there is something to run it by.

    Raises:
        CheckpointError: it is not, or cannot be read.
    """
    if task is not None:
        find_task(task)
    checkpoint = load_checkpoint(file, device)
    if task not in (None, checkpoint.task.name):
        raise CheckpointError(
            f"{file} was trained for {checkpoint.task.name}, not for {task}: leave task out, or train one for {task}"
        )
    if checkpoint.branch is None and checkpoint.calibration is None and arm is None:
        raise CheckpointError(
            f"{file} was trained for the main task alone and cannot adapt: calibrate it (ttt-adapt calibrate), or "
            "train it with the recipe 'joint'"
        )
    return checkpoint


def start_runner(
    checkpoint: Checkpoint, config: StreamConfig | None, arm: str | None, changes: Mapping[str, Any] | None
) -> Runner:
    """What runs the stream.

    Raises:
        ConfigError: the arm is unknown, needs the whole clip first, or does not apply to this checkpoint.
    """
    if config is None:
        chosen = checkpoint.calibration
        config = StreamConfig() if chosen is None else StreamConfig.online(**chosen.settings)
    if arm is None and isinstance(checkpoint.branch, MAEBranch):
        return Adapting(checkpoint.branch, checkpoint.spec.preprocess(device_of(checkpoint)), config)
    found = find_arm("calibrated" if arm is None else arm)
    if not found.streaming:
        raise ConfigError(
            f"arm {found.name} sees the whole clip before it predicts, and a video is shown frame by frame: expected "
            "a streaming arm, such as online; `ttt-adapt eval` runs the others"
        )
    return start(found, checkpoint, config, changes)


def _how_it_runs(checkpoint: Checkpoint, runner: Runner) -> str:
    """What the calibration does to this stream, as a sentence; "" where it is not used."""
    runner = unmodified(runner)
    chosen = checkpoint.calibration
    if chosen is None or not isinstance(runner, Adapting) or runner.adapter.config.norm_stats != "calibrated":
        return ""
    steps = "without" if isinstance(runner.adapter.branch, ForwardOnly) else "with"
    return f"calibrated statistics, {steps} gradient steps: {describe_rule(chosen.rule)}"


class _Remarks:
    """Tells the user what is unusual about the video and about what is written, each thing once."""

    def __init__(self, video: VideoReader, source: str, out: Path | None, rate: float | None, how: str) -> None:
        self._video, self._source, self._out, self._rate, self._how = video, source, out, rate, how
        self._begun = self._coloured = False

    def look(self, frame: np.ndarray, seen: np.ndarray, picture: np.ndarray | None) -> None:
        """Look at a frame, at the frame as the model sees it, and at the picture of the film, if there is one."""
        name = self._video.name
        if not self._begun:
            self._begun = True
            if self._how:
                notice(self._how)
            if picture is not None:
                self._begin_film(name, *picture.shape[:2])
        if self._coloured or seen is frame or np.abs(frame.astype(np.int16) - seen).max() <= COLOUR_NOISE:
            return
        self._coloured = True
        notice(f"{name} is in colour: its frames are converted to grey of the same luminance, and coloured anew")

    def _begin_film(self, name: str, height: int, width: int) -> None:
        """Say what is known when the first picture is there."""
        if self._rate is None:
            notice(f"{name} has no frame rate: written at {DEFAULT_FPS} frames a second; `fps` sets another rate")
        elif self._video.uneven:
            notice(f"{name}: its frames are not evenly spaced in time; every one is written, {self._rate:.4g} a second")
        if tracks := self._video.sounds:
            notice(f"{name}: the sound ({counted(tracks, 'track')}) is left out; {self._how_to_add_sound()}")
        if height % 2 or width % 2:
            notice(
                f"{name}: H.264 needs an even height and width; {height} x {width} is written as "
                f"{height + height % 2} x {width + width % 2}, its last row or column repeated"
            )

    def _how_to_add_sound(self) -> str:
        """The command that adds the sound of the source to the written video."""
        if self._rate not in (None, self._video.fps):
            return f"at {self._rate:g} frames a second it would not fit"
        assert self._out is not None  # there is a film
        files = [str(self._out), self._source, str(self._out.with_name(f"{self._out.stem}-sound.mkv"))]
        out, source, target = map(_as_argument, files)  # only files have sounds that are told
        drift = " (it may drift: the frames are written evenly)" if self._video.uneven else ""
        return f"put it back with: ffmpeg -i {out} -i {source} -map 0:v -map 1:a -c copy -shortest {target}{drift}"


def _as_argument(source: str) -> str:
    """A file or address for ffmpeg in a shell; `-a.mp4` would be an option, and `cam:1.mp4` an address."""
    local = "://" not in source or Path(source).exists()
    return shlex.quote(f"./{source}" if local and (source.startswith("-") or ":" in source.split("/")[0]) else source)


class _Pictures:
    """Turns predictions into pictures; with a fixed model beside it, into four panels."""

    def __init__(self, checkpoint: Checkpoint, fixed: nn.Module | None, watching: Watching, legend: bool) -> None:
        self._checkpoint, self._fixed, self._watching = checkpoint, fixed, watching
        self._size: tuple[int, int] | None = None  # of the film
        self._device = next(checkpoint.model.parameters()).device
        palette = checkpoint.task.palette
        if legend and palette is None:
            raise ConfigError(
                f"legend is set, and {checkpoint.task.name} has no classes that it could name: leave legend out"
            )
        self._legend = Legend(checkpoint.spec.classes, palette) if legend and palette is not None else None

    @property
    def size(self) -> list[int]:
        """(height, width) of the film; [] before its first picture."""
        return [] if self._size is None else list(self._size)

    def go_on(self, size: Sequence[int]) -> None:
        """Go on with a film of this (height, width)."""
        self._size = (size[0], size[1]) if size else None

    def draw(self, frame: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """The picture of one frame, uint8 RGB [H, W, 3]: the prediction, or the four panels."""
        picture = self._checkpoint.task.draw(frame, prediction)
        if self._fixed is not None:
            picture = self._panels(self._fixed, frame, picture)
        if self._legend is not None:
            picture = self._legend.below(picture, prediction)
        self._size = self._size or picture.shape[:2]
        return fitted(picture, self._size)

    @torch.no_grad()
    def _panels(self, fixed: nn.Module, frame: np.ndarray, adapted: np.ndarray) -> np.ndarray:
        """The frame, the fixed prediction, the picture of the adapted one, and the reconstruction if there is one."""
        x, task = self._watching.normalize(frame), self._checkpoint.task
        shown = {task.source: frame, "fixed": task.draw(frame, task.predict(fixed(x), frame)), "adapted": adapted}
        if isinstance(self._checkpoint.branch, MAEBranch):
            generator = torch.Generator(self._device).manual_seed(0)
            seen = self._checkpoint.branch.reconstruct(x, generator=generator)
            shown["reconstruction"] = reconstruction_image(seen, x, self._watching.normalize)
        return panels(shown, columns=2)
