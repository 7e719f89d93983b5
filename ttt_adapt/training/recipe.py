"""Joint training (or probing) of a timm encoder and a head for a task, on images."""

from __future__ import annotations

import dataclasses
import glob
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.data import Clip, StillsDataset
from ttt_adapt.errors import ConfigError
from ttt_adapt.files import check_place, output_folder, refuse_existing
from ttt_adapt.tasks import Criterion, Stills, Task, find_task, task_of
from ttt_adapt.tasks.checkpoint import OBJECTIVES, Checkpoint, check_can_be_saved, save_checkpoint
from ttt_adapt.tasks.spec import ModelSpec
from ttt_adapt.training.distributed import process_group, rank
from ttt_adapt.training.finish import calibrate_trained, round_to_half, score_trained
from ttt_adapt.training.joint import Progress, TrainConfig, fit
from ttt_adapt.training.start import find_start
from ttt_adapt.view.terminal import notice, progress_bar

RECIPES = {
    "joint": ("main", "joint"),
    "main": ("main", "main"),
    "probe": ("mae", "probe"),
    "branch": ("main", "branch"),
}
"""Name -> the stages of training."""


def train(
    data: str,
    out: Path,
    *,
    encoder: str = "vit_tiny_patch16_224",
    encoder_options: Mapping[str, Any] | None = None,
    objective: str = "mae",
    branch: Mapping[str, Any] | None = None,
    clips: Sequence[str] = (),
    classes: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    stills: int = 400,
    recipe: str = "joint",
    first_epochs: int = 40,
    init: Path | None = None,
    pretrained: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    half: bool = False,
    calibrate: bool = True,
    device: torch.device | str = "cpu",
    config: TrainConfig | None = None,
    task: str = "segmentation",
    task_options: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Train, calibrate, write and score the checkpoint; with `resume`, go on from the state files beside it.

    Args:
        data: a folder of clips or stills, with labels where the task has some, or "street" for the rendered street of
            the demo.
        out: the checkpoint to write, .safetensors.
        encoder: timm model name.
        encoder_options: keywords of `timm.create_model`.
        objective: what is trained jointly: "mae", or "rotation".
        branch: keywords of `MAEBranch.attach`. Without a `patch_size`, it fits the frames: `patch_size_for`, or the
            encoder's own patch where tokens are masked.
        clips: names of the clips to use; () for all.
        classes: class names, where the data bring none.
        size: (H, W) that images are resized to; None: as on disk.
        stills: number of images rendered for "street".
        recipe: "joint" (main task, then joint), "main" (main task twice), "branch" (main task, then the branch beside
            the model, which stays as it is), or "probe" (reconstruction, then head).
        first_epochs: epochs of the recipe's first stage; 0 leaves it out.
        init: checkpoint to start from.
        pretrained: where the encoder's first weights come from: "timm" (it downloads), a file (.safetensors, .pth, .pt)
            in timm's or torchvision's names, or "package:efficientnet-lite0". They bring their own mean and std.
        resume: go on where an interrupted run with the same arguments stopped.
        overwrite: train anew where there is a checkpoint `out`, which stays until the new one is complete, or the state
            of an interrupted run, which is dropped; without it, both are refused.
        half: store weights as float16.
        calibrate: calibrate the trained model on some of its own stills (`ttt_adapt.tasks.calibrate`).
        device: where to train; under `torchrun`, each process takes the CUDA device of its own rank.
        config: of the last stage, the default `TrainConfig` if None; the first differs in stage and epochs only.
        task: what the head is trained for, see `ttt_adapt.tasks`.
        task_options: of the task.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is trained or written.
    """
    config, branch = config or TrainConfig(), dict(branch or {})
    encoder_options, task_options = dict(encoder_options or {}), dict(task_options or {})
    _check(recipe, objective, branch)
    _check_out(out, resume, overwrite)
    start = find_start(pretrained, init, encoder)
    device = _own_device(torch.device(device))
    opened = _open_stills(find_task(task), data, clips, size, classes, stills)
    chosen = objective == "mae" and recipe != "main" and "patch_size" not in branch
    if chosen:
        branch["patch_size"] = start.patch_size(opened.size)
    spec = ModelSpec(
        encoder,
        opened.classes,
        opened.size,
        encoder_options,
        None if recipe == "main" else branch,
        objective,
        opened.palette,
        task=task,
        task_options=task_options,
        **start.colours(),
    )
    samples = _samples(opened, spec, config.seed)
    checkpoint = start.build(spec, config.seed, device)
    check_can_be_saved(checkpoint)
    notes = []
    if chosen:
        branch["patch_size"] = side = checkpoint.mae_branch.patch_size  # a plain transformer has patches of its own
        notes = [
            f"mask patches of {side} x {side} pixels: chosen for the frames; patch_size of the `branch` sets another"
        ]
    criterion = checkpoint.task.criterion(samples)
    output_folder(out)
    depends_on = {
        "data": data,
        "clips": tuple(clips),
        "size": size,
        "stills": stills,
        "encoder": encoder,
        "encoder_options": encoder_options,
        "objective": objective,
        "branch": branch,
        "init": init,
        "pretrained": start.pretrained is not None and start.pretrained.source,
        **({"task": task, "task_options": task_options} if task != "segmentation" else {}),
    }
    origin = ", ".join(f"{name}={value}" for name, value in depends_on.items())
    stages = [
        dataclasses.replace(config, stage=stage, epochs=epochs)
        for stage, epochs in zip(RECIPES[recipe], (first_epochs, config.epochs), strict=True)
        if epochs
    ]
    files = [out.with_suffix(f".{i}-{stage.stage}.state") for i, stage in enumerate(stages)]
    if not resume:
        _remove(_states(out))
    try:
        _fit_stages(checkpoint, samples, criterion, dict(zip(files, stages, strict=True)), origin, notes)
        made_from = {"data": data, "clips": list(clips), **start.record()}
        spec.training.extend({**dataclasses.asdict(stage), **made_from} for stage in stages)
        if half:
            round_to_half(checkpoint)
        if rank() == 0:
            if calibrate:
                calibrate_trained(checkpoint, opened, config.seed)
            save_checkpoint(out, checkpoint, half)
            score_trained(checkpoint, opened)
        _remove(files)
    except KeyboardInterrupt:
        if kept := [file for file in files if file.exists()]:
            notice(f"the last finished epoch is kept in {kept[-1]}: the same command with --resume goes on")
        raise
    return checkpoint


def _fit_stages(
    checkpoint: Checkpoint,
    samples: NormalizedStills,
    criterion: Criterion,
    stages: Mapping[Path, TrainConfig],
    origin: str,
    notes: list[str],
) -> None:
    """Train one stage after the other.

    Args:
        checkpoint: model and branch.
        samples: of the task.
        criterion: of the task.
        stages: by the file that keeps a stage's state.
        origin: what else the run depends on, as text.
        notes: what the user is told once training runs: a run that is refused shows its error alone.
    """
    with process_group(next(checkpoint.model.parameters()).device):
        for file, config in stages.items():
            with _watch(config, notes) as on_step:
                fit(
                    checkpoint.model,
                    checkpoint.branch,
                    samples,
                    criterion,
                    config,
                    state_file=file,
                    origin=origin,
                    on_step=on_step,
                )


def _remove(files: Sequence[Path]) -> None:
    """Remove state files; under `torchrun`, the first process does."""
    if rank() == 0:
        for file in files:
            file.unlink(missing_ok=True)


def _check(recipe: str, objective: str, branch: Mapping[str, Any]) -> None:
    """Raises ConfigError where arguments of `train` contradict each other."""
    if recipe not in RECIPES:
        raise ConfigError(f"recipe is {recipe!r}; expected one of {', '.join(RECIPES)}")
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective is {objective!r}; expected one of {', '.join(OBJECTIVES)}")
    if branch and objective != "mae":
        raise ConfigError(
            f"branch has {next(iter(branch))}, which is a setting of the MAE branch; {objective} has none: leave it out"
        )


def _check_out(out: Path, resume: bool, overwrite: bool) -> None:
    """Raises ConfigError where the checkpoint cannot be written, or something would be lost by it."""
    if out.suffix != ".safetensors":
        raise ConfigError(f"out is {out}; expected a file name ending in .safetensors")
    check_place(out)
    states = _states(out)
    if resume:
        if out.exists() and not states:
            raise ConfigError(
                f"resume is set, and {out} is complete; leave resume out and set `overwrite` to train it anew, or "
                "choose another file"
            )
        return
    if states and not overwrite:
        raise ConfigError(
            f"{states[-1]} keeps an interrupted run: set `resume` to go on with it, or `overwrite` to train anew"
        )
    refuse_existing(out, overwrite)


def _states(out: Path) -> list[Path]:
    """The states of runs that write the checkpoint `out`, in the order of their stages."""
    return sorted(out.parent.glob(f"{glob.escape(out.stem)}.[0-9]*-*.state"))


class NormalizedStills(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """A `StillsDataset` as a task's model takes it: pairs of the normalised input and the target."""

    def __init__(self, stills: StillsDataset, spec: ModelSpec, task: Task) -> None:
        self._stills, self._task, self.ignore = stills, task, stills.ignore
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))

    def __len__(self) -> int:
        return len(self._stills)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self._task.sample(*self._stills[index])
        return (image - self._mean) / self._std, target

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of every sample."""
        self._stills.set_epoch(epoch)


CACHE_LIMIT = 2**30
"""Samples of up to this many bytes together are read once before training begins, and kept in memory."""


def _samples(stills: Stills, spec: ModelSpec, seed: int) -> NormalizedStills:
    """The data set of the opened images, as the model of `spec` takes them."""
    task = task_of(spec)
    count = sum(len(part) if isinstance(part, Clip) else 1 for part in stills.samples)
    cache = count * math.prod(stills.size) * 4 <= CACHE_LIMIT
    for note in stills.notes:
        notice(note)
    return NormalizedStills(StillsDataset(stills.samples, task.augment, seed, cache), spec, task)


def _open_stills(
    task: type[Task],
    data: str,
    clips: Sequence[str],
    size: tuple[int, int] | None,
    classes: Sequence[str],
    count: int,
) -> Stills:
    """The images to train on; of the rendered street, `count` of them."""
    if data != "street":
        return task.stills(data, clips, size, classes or None)
    from ttt_adapt.data.street.scene import CLASSES, PALETTE, street_stills

    size = size or (128, 192)
    labelled = Stills(list(street_stills(count, size)), size, CLASSES, PALETTE)
    return labelled if task.labelled else dataclasses.replace(labelled, classes=(), palette=())


def _watch(config: TrainConfig, notes: list[str]) -> Any:
    """A progress bar on the first process; its advance takes `Progress`. The first one tells the notes."""
    return _Bar(config, notes) if rank() == 0 else nullcontext(None)


class _Bar:
    """A progress bar over the updates of one stage."""

    def __init__(self, config: TrainConfig, notes: list[str]) -> None:
        self._title, self._config, self._notes = f"train {config.stage}", config, notes

    def __enter__(self) -> Callable[[Progress], None]:
        self._bar: Any = None
        return self._step

    def _step(self, progress: Progress) -> None:
        if self._bar is None:
            while self._notes:
                notice(self._notes.pop(0))
            done = progress.step - 1  # a resumed run starts in the middle
            self._bar = progress_bar(self._title, progress.steps, "step", done)
            self._advance = self._bar.__enter__()
        losses = "  ".join(f"{name} {value:.4f}" for name, value in progress.losses.items())
        self._advance(f"epoch {progress.epoch + 1}/{self._config.epochs}  {losses}")

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)


def _own_device(device: torch.device) -> torch.device:
    """The device of this process: under `torchrun`, the CUDA device of its local rank."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device
