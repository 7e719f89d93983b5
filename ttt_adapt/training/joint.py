"""Joint training of the main task and the reconstruction, in plain PyTorch.

In your own training loop, one line is enough:

    loss = criterion(model(images), labels) + branch.loss(images)

Give `branch.parameters()` to the optimizer too. `fit` is that loop with gradient accumulation, mixed precision,
resuming, and data-parallel training under `torchrun`.

Stages ("Test-Time Training on Video Streams", section 4.1, and its probing alternative):

- "main": the loss of the main task alone.
- "joint": main loss + reconstruction loss, from a checkpoint that was trained for the main task.
- "mae": the reconstruction loss alone; the first half of probing.
- "probe": the main loss, which trains the head on a frozen encoder; the second half of probing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ttt_adapt.errors import CheckpointError, ConfigError, StateError
from ttt_adapt.files import atomic_write
from ttt_adapt.model.hooks import run_encoder
from ttt_adapt.model.norms import frozen_norms
from ttt_adapt.model.parameters import check_state, split_by_decay
from ttt_adapt.model.wrappers import unwrapped
from ttt_adapt.objectives.base import Attached
from ttt_adapt.objectives.check_objective import of_another_model
from ttt_adapt.training.distributed import process_group, rank, world_size
from ttt_adapt.training.state import FORMAT, check_parts, read_state

STAGES = ("main", "joint", "mae", "probe", "branch")

Criterion = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class TrainConfig:
    """How `fit` trains.

    Attributes:
        stage: what learns, and by which loss: "main", the model by its task; "joint", model and branch by both; "mae",
            encoder and branch by reconstruction; "probe", the head by its task; "branch", the branch alone, beside a
            model that stays as it is, by reconstruction.
        epochs: passes over the data.
        batch_size: images per process and step, before accumulation.
        accumulate: steps whose gradients are added up for one update.
        lr: highest learning rate of AdamW. It rises linearly during warm-up, then falls to 0 along a cosine.
        warmup: share of all updates that the warm-up takes.
        weight_decay: decoupled weight decay on matrices and kernels.
        grad_clip: largest gradient norm; None: no limit.
        mae_weight: weight of the reconstruction loss in "joint".
        precision: "fp32", "bf16", or "fp16" with loss scaling.
        workers: processes that load data.
        seed: of the order of samples, augmentation, masks and dropout.
    """

    stage: str = "joint"
    epochs: int = 40
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    grad_clip: float | None = 1.0
    mae_weight: float = 1.0
    precision: str = "fp32"
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ConfigError(f"stage is {self.stage!r}; expected one of {', '.join(map(repr, STAGES))}")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ConfigError(f'precision is {self.precision!r}; expected "fp32", "bf16" or "fp16"')
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected at least 1")
        if not self.lr > 0:
            raise ConfigError(f"lr is {self.lr!r}; expected a number above 0, such as 1e-3")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is {self.warmup!r}; expected a share of the training, from 0 to below 1")


@dataclass(frozen=True)
class Progress:
    """Where training stands, after each update.

    Attributes:
        epoch: current epoch, from 0.
        step: updates done in all.
        steps: updates to do in all.
        losses: "main" and "mae", each the mean over the epoch so far.
    """

    epoch: int
    step: int
    steps: int
    losses: dict[str, float]


class JointLoss(nn.Module):
    """The model, its branch and the criterion as one module, so that data-parallel training can wrap them."""

    def __init__(self, model: nn.Module, branch: Attached | None, criterion: Criterion, stage: str) -> None:
        super().__init__()
        self.model, self.branch = model, branch if stage in ("joint", "mae", "branch") else None
        self._criterion, self._stage = criterion, stage

    def forward(self, images: Tensor, targets: Any) -> dict[str, Tensor]:
        """The stage's losses by name; images [B, 3, H, W] as the model takes them."""
        losses = {}
        if self._stage not in ("mae", "branch"):
            losses["main"] = self._criterion(self.model(images), targets)
        if self.branch is not None:
            info = self.branch.info
            if self._stage == "mae" and info.norms:  # masked passes do not update BatchNorm: this one does
                with torch.no_grad():
                    run_encoder(info.model, info.module, images)
            losses["mae"] = self.branch.loss(images)
        return losses


def fit(
    model: nn.Module,
    branch: Attached | None,
    data: Dataset[Any],
    criterion: Criterion,
    config: TrainConfig,
    *,
    state_file: str | Path | None = None,
    origin: str = "",
    on_step: Callable[[Progress], None] | None = None,
) -> None:
    """Train `model` (and `branch`) in place.

    Under `torchrun` every process calls this with the same arguments; gradients are averaged over processes, and
    process 0 writes the state.

    Args:
        model: on the device to train on; it is left in eval mode, also by an error or Ctrl-C.
        branch: an `MAEBranch`, or another objective with its own layers (`objectives.Rotation`), attached to `model`
            and on the same device. Its loss is used where "mae" is named. Stage "main" needs none.
        data: samples (image [3, H, W] as the model takes it, target); `set_epoch(epoch)` is called where it exists.
        criterion: (model output, targets) -> scalar loss.
        config: see `TrainConfig`.
        state_file: written after each epoch. If it exists, training goes on from it as if it had not stopped.
        origin: what else a run depends on (data, model), as text; a state of another origin is refused.
        on_step: called after each update.

    Raises:
        ConfigError, StateError: settings do not fit together.
        CheckpointError: `state_file` is of another run or a newer version, or cannot be read; nothing has changed.
    """
    if branch is None and config.stage != "main":
        raise ConfigError(f'stage {config.stage!r} needs a branch; only "main" trains without one')
    if branch is not None and unwrapped(branch.model) is not unwrapped(model):
        raise StateError(of_another_model(model, branch))
    device = next(model.parameters()).device
    with process_group(device), _Run(model, branch, data, criterion, config) as run:
        first = run.resume(state_file, origin) if state_file is not None and Path(state_file).exists() else 0
        for epoch in range(first, config.epochs):
            run.epoch(epoch, on_step)
            if state_file is not None:
                run.save(state_file, epoch + 1, origin)


class _Run:
    """One call of `fit`: optimizer, schedule and loader."""

    def __init__(
        self, model: nn.Module, branch: Attached | None, data: Any, criterion: Criterion, config: TrainConfig
    ) -> None:
        self.config, self.data, self.model, self.branch = config, data, model, branch
        self.world, self.rank = world_size(), rank()
        self.device = next(model.parameters()).device
        self._criterion = criterion
        self._frozen = _parameters_to_freeze(model, branch, config.stage)
        self._frozen_norms = branch.info.norms if branch is not None and config.stage in ("probe", "branch") else []

    def __enter__(self) -> _Run:
        self._thawed = [p for p in self._frozen if p.requires_grad]
        for p in self._thawed:
            p.requires_grad_(False)
        try:
            self._prepare()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _prepare(self) -> None:
        self.losses: nn.Module = JointLoss(self.model, self.branch, self._criterion, self.config.stage).train()
        if self.world > 1:
            self.losses = DistributedDataParallel(self.losses)
        self.optimizer = torch.optim.AdamW(_decay_groups(self.losses, self.config), lr=self.config.lr, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "fp16")
        self.sampler: Any = DistributedSampler(self.data, seed=self.config.seed) if self.world > 1 else None
        self.order = torch.Generator()
        self.loader = DataLoader(
            self.data,
            self.config.batch_size,
            shuffle=self.sampler is None,
            sampler=self.sampler,
            num_workers=self.config.workers,
            generator=self.order,
            drop_last=len(self.data) // self.world >= self.config.batch_size,
        )
        self.updates = -(-len(self.loader) // self.config.accumulate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)

    def __exit__(self, *exc: object) -> None:
        for p in self._thawed:
            p.requires_grad_(True)
        for module in (self.model, self.branch):
            if module is not None:
                module.zero_grad(set_to_none=True)
                module.eval()

    def _factor(self, step: int) -> float:
        total = self.updates * self.config.epochs
        warm = max(round(self.config.warmup * total), 1)
        return (
            (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))
        )

    def epoch(self, epoch: int, on_step: Callable[[Progress], None] | None) -> None:
        """One pass over the data; its randomness depends on (seed, epoch, process) alone."""
        torch.manual_seed((self.config.seed * 10007 + epoch) * self.world + self.rank)
        self.order.manual_seed(self.config.seed * 10007 + epoch)
        for part in (self.data, self.sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        sums: dict[str, Tensor] = {}
        batches = len(self.loader)
        for i, (images, targets) in enumerate(self.loader):
            last = (i + 1) % self.config.accumulate == 0 or i + 1 == batches
            parts = min(self.config.accumulate, batches - i // self.config.accumulate * self.config.accumulate)
            losses = self._backward(images, targets, last, parts)
            for name, value in losses.items():
                sums[name] = sums.get(name, value.new_zeros(())) + value.detach()
            if last:
                self._update()
                if on_step is not None:
                    means = {name: float(total) / (i + 1) for name, total in sums.items()}
                    done = epoch * self.updates + -(-(i + 1) // self.config.accumulate)
                    on_step(Progress(epoch, done, self.updates * self.config.epochs, means))

    def _backward(self, images: Tensor, targets: Any, last: bool, parts: int) -> dict[str, Tensor]:
        """Add the gradients of one of the `parts` batches of an update."""
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.precision, torch.float32)
        wait = nullcontext() if last or self.world == 1 else self.losses.no_sync()  # type: ignore[operator]
        targets = targets.to(self.device) if isinstance(targets, Tensor) else targets
        with wait, frozen_norms(self._frozen_norms):
            with torch.autocast(self.device.type, kind, enabled=kind is not torch.float32):
                losses = self.losses(images.to(self.device), targets)
                weights = {"mae": self.config.mae_weight if self.config.stage == "joint" else 1.0}
                total = sum(weights.get(name, 1.0) * value for name, value in losses.items())
            self.scaler.scale(total / parts).backward()
        return losses

    def _update(self) -> None:
        if self.config.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.losses.parameters(), self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()

    def save(self, file: str | Path, epoch: int, origin: str) -> None:
        """Write all that `resume` needs. The old file stays as it is until the new one is complete."""
        if self.rank:
            return
        state = {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "origin": origin,
            "epoch": epoch,
            "model": self.model.state_dict(),
            "branch": self.branch.state_dict() if self.branch is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        with atomic_write(file) as part:
            torch.save(state, part)

    def resume(self, file: str | Path, origin: str) -> int:
        """Load a state and return the epoch to go on with. If one part does not fit, nothing is loaded."""
        state = read_state(file, self.device)
        ours = dataclasses.asdict(self.config)
        other = {k: v for k, v in state["config"].items() if ours.get(k) != v}
        if other:
            raise CheckpointError(f"{file} is of a run with {other}; go on with the same settings, or remove the file")
        if state["origin"] != origin:
            raise CheckpointError(
                f"{file} is of a run with {state['origin'] or 'no origin'}, this one has {origin or 'none'}: go on "
                "with the same data and model, or remove the file"
            )
        check_state(self.model.state_dict(), state["model"], f"the run of {file}: its model is another one")
        if self.branch is not None:
            check_state(self.branch.state_dict(), state["branch"], f"the run of {file}: its branch is another one")
        check_parts(state, self.config.epochs, self.optimizer, self.schedule, self.scaler, file)
        self.model.load_state_dict(state["model"])
        if self.branch is not None:
            self.branch.load_state_dict(state["branch"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        return int(state["epoch"])


def _parameters_to_freeze(model: nn.Module, branch: Attached | None, stage: str) -> list[nn.Parameter]:
    """What a stage does not train: the head for "mae", the encoder for "probe", both for "branch"."""
    if branch is None or stage in ("main", "joint"):
        return []
    if stage == "branch":
        return list(model.parameters())
    encoder = {id(p) for p in branch.encoder_parameters().values()}
    return [p for p in model.parameters() if (id(p) in encoder) == (stage == "probe")]


def _decay_groups(module: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    trained = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
    with_decay, without = split_by_decay(trained, [module])
    return [
        {"params": with_decay, "weight_decay": config.weight_decay},
        {"params": without, "weight_decay": 0.0},
    ]
