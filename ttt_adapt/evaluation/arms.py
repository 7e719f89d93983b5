"""Arms: ways of running the same model on the same video, all with one interface.

An arm is a context manager with `step(frame) -> prediction` and `loss`, the label-free loss at the last frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ttt_adapt.adapter import StreamAdapter
from ttt_adapt.checkpoint import Checkpoint
from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import ConfigError, nearest
from ttt_adapt.frames import Preprocess, to_model_input
from ttt_adapt.snapshot import Snapshot
from ttt_adapt.taps import norm_layers, updating_norms


class Runner(Protocol):
    """A model on a stream."""

    @property
    def loss(self) -> float | None:
        """The label-free loss at the last frame; None where there was none."""
        ...

    def step(self, frame: Any) -> Tensor:
        """The model's output for a frame; the runner has seen this frame and earlier ones only."""
        ...

    def close(self) -> None:
        """Give the model back as it was."""
        ...


class Fixed:
    """The model as trained."""

    loss: float | None = None

    def __init__(self, model: nn.Module, preprocess: Preprocess) -> None:
        self._model, self._preprocess = model, preprocess
        self._device = next(model.parameters()).device

    def step(self, frame: Any) -> Tensor:
        """Predict, nothing else."""
        with torch.no_grad():
            return self._model(to_model_input(frame, self._preprocess, self._device))

    def close(self) -> None:
        """Nothing to undo."""


class NormStatistics:
    """Forward-only re-estimation of BatchNorm statistics, no gradient.

    Args:
        model: a model with BatchNorm.
        preprocess: frame -> model input.
        momentum: weight of the current frame.
        carry: True for a moving average over the stream, False to blend each frame into the source statistics.
    """

    loss: float | None = None

    def __init__(self, model: nn.Module, preprocess: Preprocess, momentum: float, carry: bool) -> None:
        self._fixed = Fixed(model, preprocess)
        self._norms, self._momentum, self._carry = norm_layers(model), momentum, carry
        if not self._norms:
            raise ConfigError("this model has no BatchNorm: re-estimated statistics do not apply to it")
        self._source = Snapshot({f"{i}.{n}": b for i, m in enumerate(self._norms) for n, b in m.named_buffers()})

    def step(self, frame: Any) -> Tensor:
        """Blend the frame's statistics in, then predict with the blend."""
        if not self._carry:
            self._source.restore()
        with updating_norms(self._norms, self._momentum):
            self._fixed.step(frame)
        return self._fixed.step(frame)

    def close(self) -> None:
        """The source statistics again."""
        self._source.restore()


class Adapting:
    """Test-time training through `StreamAdapter`."""

    def __init__(self, checkpoint: Checkpoint, preprocess: Preprocess, config: StreamConfig) -> None:
        if checkpoint.branch is None:
            raise ConfigError("this checkpoint was trained for the main task alone: adaptation needs its branch")
        if config.norm_stats != "frozen" and not norm_layers(checkpoint.model):
            raise ConfigError(f"this model has no BatchNorm: norm_stats={config.norm_stats!r} does not apply to it")
        self._adapter = StreamAdapter(checkpoint.model, checkpoint.branch, config=config, preprocess=preprocess)

    @property
    def loss(self) -> float | None:
        """The reconstruction loss before the last frame's first step."""
        report = self._adapter.last
        return report.losses[0] if report is not None and report.losses else None

    def step(self, frame: Any) -> Tensor:
        """Adapt, then predict."""
        return self._adapter.step(frame)

    def close(self) -> None:
        """Detach the adapter; the source weights are back."""
        self._adapter.detach()


@dataclass(frozen=True)
class Arm:
    """A named way of running a checkpoint.

    Attributes:
        name: as on the command line.
        title: as in tables.
        make: (checkpoint, online configuration) -> runner.
    """

    name: str
    title: str
    make: Callable[[Checkpoint, StreamConfig], Runner]

    def start(self, checkpoint: Checkpoint, config: StreamConfig) -> Runner:
        """A runner at the beginning of a stream; `config` is the online arm's, other arms vary it."""
        return self.make(checkpoint, config)


def _fixed(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
    return Fixed(checkpoint.model, checkpoint.spec.preprocess(_device(checkpoint)))


def _norms(momentum: float, carry: bool) -> Callable[[Checkpoint, StreamConfig], Runner]:
    def make(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
        return NormStatistics(checkpoint.model, checkpoint.spec.preprocess(_device(checkpoint)), momentum, carry)

    return make


def _adapting(**changes: Any) -> Callable[[Checkpoint, StreamConfig], Runner]:
    def make(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
        return Adapting(checkpoint, checkpoint.spec.preprocess(_device(checkpoint)), config.replace(**changes))

    return make


def _device(checkpoint: Checkpoint) -> torch.device:
    return next(checkpoint.model.parameters()).device


ARMS = {
    arm.name: arm
    for arm in (
        Arm("fixed", "Fixed", _fixed),
        Arm("norm-ema", "BatchNorm statistics, EMA 0.05", _norms(0.05, carry=True)),
        Arm("norm-blend", "BatchNorm statistics, blend 0.3", _norms(0.3, carry=False)),
        Arm("no-memory", "TTT-MAE No Memory", _adapting(window=1, carry_weights=False)),
        Arm("implicit", "Implicit Memory Only", _adapting(window=1)),
        Arm("explicit", "Explicit Memory Only", _adapting(carry_weights=False)),
        Arm("online", "Online TTT-MAE", _adapting()),
        Arm("online-norm-ema", "Online TTT-MAE + BatchNorm EMA", _adapting(norm_stats="ema")),
    )
}


def find_arms(names: list[str]) -> list[Arm]:
    """The arms called `names`.

    Raises:
        ConfigError: an unknown name; the message holds the nearest.
    """
    for name in names:
        if name not in ARMS:
            raise ConfigError(f"there is no arm {name!r}; {nearest(name, ARMS)}")
    return [ARMS[name] for name in names]
