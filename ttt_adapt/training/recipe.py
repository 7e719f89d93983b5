"""`ttt-adapt train`: joint training (or probing) of a timm encoder and a head for a task, on images."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.cli.options import pick_device
from ttt_adapt.data import Clip, StillsDataset
from ttt_adapt.errors import ConfigError
from ttt_adapt.files import output_folder
from ttt_adapt.tasks import Stills, Task, find_task, task_of
from ttt_adapt.tasks.checkpoint import OBJECTIVES, Checkpoint, build_model, load_initial, save_checkpoint
from ttt_adapt.tasks.spec import ModelSpec
from ttt_adapt.training.distributed import process_group, rank
from ttt_adapt.training.joint import Progress, TrainConfig, fit
from ttt_adapt.view.terminal import notice, progress_bar

RECIPES = {"joint": ("main", "joint"), "main": ("main", "main"), "probe": ("mae", "probe")}


@dataclass(frozen=True)
class TrainOptions:
    """What to train, on what, and how.

    Attributes:
        data: a folder of clips or stills, with labels where the task has some, or "street" for the rendered street of
            the demo.
        out: the checkpoint to write, .safetensors.
        encoder: timm model name.
        encoder_options: keywords of `timm.create_model`.
        objective: what is trained jointly: "mae", or "rotation".
        branch: keywords of `MAEBranch.attach`.
        clips: names of the clips to use; () for all.
        classes: class names, where the data bring none.
        size: (H, W) that images are resized to; None: as on disk.
        stills: number of images rendered for "street".
        recipe: "joint" (main task, then joint), "main" (main task twice), or "probe" (reconstruction, then head).
        first_epochs: epochs of the recipe's first stage; 0 leaves it out.
        init: checkpoint to start from.
        pretrained: start from timm's pretrained encoder.
        resume: go on where an interrupted run of the same options stopped.
        half: store weights as float16.
        device: "auto", "cpu", "cuda", ...
        config: of the last stage; the first differs in stage and epochs only.
        task: what the head is trained for, see `ttt_adapt.tasks`.
        task_options: of the task.
    """

    data: str
    out: Path
    encoder: str = "vit_tiny_patch16_224"
    encoder_options: dict[str, Any] = field(default_factory=dict)
    objective: str = "mae"
    branch: dict[str, Any] = field(default_factory=dict)
    clips: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    stills: int = 400
    recipe: str = "joint"
    first_epochs: int = 40
    init: Path | None = None
    pretrained: bool = False
    resume: bool = False
    half: bool = False
    device: str = "auto"
    config: TrainConfig = field(default_factory=TrainConfig)
    task: str = "segmentation"
    task_options: dict[str, Any] = field(default_factory=dict)


def train(options: TrainOptions) -> Checkpoint:
    """Train and write the checkpoint; with `resume`, go on from the state files beside it.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is trained or written.
    """
    _check(options)
    device = _device(options.device)
    data, spec = _open_data(options)
    torch.manual_seed(options.config.seed)
    model, branch = build_model(spec, options.pretrained)
    checkpoint = Checkpoint(model.to(device), branch.to(device) if branch is not None else None, spec)
    if options.init is not None:
        load_initial(options.init, checkpoint)
    _try_size(checkpoint, device)
    criterion = checkpoint.task.criterion(data)
    output_folder(options.out.parent)
    stages = [
        s for s in zip(RECIPES[options.recipe], (options.first_epochs, options.config.epochs), strict=True) if s[1]
    ]
    files = [options.out.with_suffix(f".{i}-{stage}.state") for i, (stage, _) in enumerate(stages)]
    if not options.resume and rank() == 0:
        for file in files:
            file.unlink(missing_ok=True)
    try:
        with process_group(device):
            for (stage, epochs), file in zip(stages, files, strict=True):
                config = dataclasses.replace(options.config, stage=stage, epochs=epochs)
                with _watch(stage, config) as on_step:
                    fit(
                        model,
                        branch,
                        data,
                        criterion,
                        config,
                        state_file=file,
                        origin=_origin(options),
                        on_step=on_step,
                    )
                spec.training.append({**dataclasses.asdict(config), "data": options.data, "clips": list(options.clips)})
        if rank() == 0:
            save_checkpoint(options.out, checkpoint, options.half)
            for file in files:
                file.unlink(missing_ok=True)
    except KeyboardInterrupt:
        if kept := [file for file in files if file.exists()]:
            notice(f"the last finished epoch is kept in {kept[-1]}: the same command with --resume goes on")
        raise
    return checkpoint


def _check(options: TrainOptions) -> None:
    """Raises ConfigError where the options contradict each other."""
    if options.recipe not in RECIPES:
        raise ConfigError(f"recipe is {options.recipe!r}; expected one of {', '.join(RECIPES)}")
    if options.objective not in OBJECTIVES:
        raise ConfigError(f"objective is {options.objective!r}; expected one of {', '.join(OBJECTIVES)}")
    if options.branch and options.objective != "mae":
        raise ConfigError(
            f"--branch {next(iter(options.branch))} is of the MAE branch; {options.objective} has no settings"
        )
    if options.out.suffix != ".safetensors":
        raise ConfigError(f"--out is {options.out}; expected a file name ending in .safetensors")
    if options.out.is_dir():
        raise ConfigError(f"--out is {options.out}, a folder; expected the name of a file")
    states = options.out.parent.glob(f"{options.out.stem}.*.state")
    if options.resume and options.out.exists() and not any(states):
        raise ConfigError(
            f"--resume: {options.out} is complete; leave --resume out to train it anew, or choose another --out"
        )


@torch.no_grad()
def _try_size(checkpoint: Checkpoint, device: torch.device) -> None:
    """Raise a ConfigError where the encoder takes other image sizes only."""
    spec = checkpoint.spec
    try:
        checkpoint.model.eval()(torch.zeros(1, 3, *spec.size, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{spec.encoder} cannot take images of {spec.size} (H, W): {error}") from error


def _origin(options: TrainOptions) -> str:
    """What a run depends on beside its `TrainConfig`, for its state files."""
    names = (
        "data",
        "clips",
        "size",
        "stills",
        "encoder",
        "encoder_options",
        "objective",
        "branch",
        "init",
        "pretrained",
        *(("task", "task_options") if options.task != "segmentation" else ()),
    )
    return ", ".join(f"{name}={getattr(options, name)}" for name in names)


class NormalizedStills(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """`StillsDataset` as a task's model takes it: what it is shown, normalised, and the target."""

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
"""Bytes of samples up to which all are read before training begins, and kept."""


def _open_data(options: TrainOptions) -> tuple[NormalizedStills, ModelSpec]:
    stills = _open_stills(options)
    spec = ModelSpec(
        options.encoder,
        stills.classes,
        stills.size,
        options.encoder_options,
        None if options.recipe == "main" else options.branch,
        options.objective,
        stills.palette,
        task=options.task,
        task_options=options.task_options,
    )
    task = task_of(spec)
    count = sum(len(part) if isinstance(part, Clip) else 1 for part in stills.samples)
    cache = count * math.prod(stills.size) * 4 <= CACHE_LIMIT
    samples = StillsDataset(stills.samples, task.augment, options.config.seed, cache)
    for note in stills.notes:
        notice(note)
    return NormalizedStills(samples, spec, task), spec


def _open_stills(options: TrainOptions) -> Stills:
    task = find_task(options.task)
    if options.data != "street":
        return task.stills(options.data, options.clips, options.size, options.classes or None)
    from ttt_adapt.data.street.scene import CLASSES, PALETTE, street_stills

    size = options.size or (128, 192)
    labelled = Stills(list(street_stills(options.stills, size)), size, CLASSES, PALETTE)
    return labelled if task.labelled else dataclasses.replace(labelled, classes=(), palette=())


def _watch(stage: str, config: TrainConfig) -> Any:
    """A progress bar on the first process; its advance takes `Progress`."""
    if rank() != 0:
        return nullcontext(None)
    return _Bar(stage, config)


class _Bar:
    """A progress bar over the updates of one stage."""

    def __init__(self, stage: str, config: TrainConfig) -> None:
        self._title, self._config = f"train {stage}", config

    def __enter__(self) -> Callable[[Progress], None]:
        self._bar: Any = None
        return self._step

    def _step(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = progress_bar(self._title, progress.steps, "step")
            self._advance = self._bar.__enter__()
            for _ in range(progress.step - 1):  # a resumed run starts in the middle
                self._advance()
        losses = "  ".join(f"{name} {value:.4f}" for name, value in progress.losses.items())
        self._advance(f"epoch {progress.epoch + 1}/{self._config.epochs}  {losses}")

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)


def _device(name: str) -> torch.device:
    device = pick_device(name)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device
