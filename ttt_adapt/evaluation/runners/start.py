"""Makes the runner of an arm (`ttt_adapt.arms`) on a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ttt_adapt.arms import Arm
from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import ConfigError
from ttt_adapt.evaluation.runners.base import Runner, device_of
from ttt_adapt.evaluation.runners.modifiers import ClassBalanced, Smoothed, Voting
from ttt_adapt.evaluation.runners.streaming import Adapting, Fixed, LayerStatistics, NormAverage, NormBlend
from ttt_adapt.evaluation.runners.whole_clip import Offline, Shuffled
from ttt_adapt.model.calibration import Calibration
from ttt_adapt.model.frames import Normalize
from ttt_adapt.model.norms import norm_layers
from ttt_adapt.objectives import Entropy, PseudoLabel, Rotation
from ttt_adapt.objectives.forward_only import ForwardOnly
from ttt_adapt.tasks.checkpoint import Checkpoint

SMOOTH_LENGTH = 5


def configured(
    arm: Arm,
    config: StreamConfig,
    changes: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> StreamConfig:
    """The arm's own configuration; "online" has the settings that the model's calibration chose, as `settle` says.

    Other arguments and errors are those of `start`.
    """
    own = arm.settings(changes)
    config = config.replace(**own)
    if arm.name.partition("+")[0] == "online" and calibration is not None:
        config = calibration.settle(config, given=own)
    return config


def start(arm: Arm, checkpoint: Checkpoint, config: StreamConfig, changes: Mapping[str, Any] | None = None) -> Runner:
    """A runner at the beginning of a stream.

    The runner of an arm that is not streaming is a `ClipRunner`, which is given the whole clip first.

    Args:
        arm: what to run.
        checkpoint: the model.
        config: the online arm's; other arms vary it.
        changes: fields that win over the arm's own defaults.

    Raises:
        ConfigError: the arm does not apply to this model, or the changes would make another arm of it; the message
            says why.
    """
    return runner_of(arm, checkpoint, configured(arm, config, changes, checkpoint.calibration))


def runner_of(arm: Arm, checkpoint: Checkpoint, config: StreamConfig) -> Runner:
    """A runner with the arm's own configuration, as `configured` gives it; errors as in `start`."""
    for need in arm.needs:
        _NEEDS[need](checkpoint, f"arm {arm.name}")
    runner = RUNNERS[arm.method](checkpoint, config, **arm.options)
    try:
        for word, number in arm.modifiers:
            runner = _MODIFIERS[word](runner, checkpoint, config, number)
    except BaseException:
        runner.close()
        raise
    return runner


# ---- what an arm needs


def _need_class_scores(checkpoint: Checkpoint, what: str) -> None:
    """Raises ConfigError where the model's output is not a distribution over classes."""
    if not checkpoint.task.distribution:
        raise ConfigError(
            f"{what} uses class distributions, and this checkpoint ({checkpoint.task.name}) predicts "
            f"{checkpoint.task.outputs}: it does not apply"
        )


def _need_branch(checkpoint: Checkpoint, what: str) -> None:
    checkpoint.mae_branch  # noqa: B018 - raises where there is none


def _need_rotation_head(checkpoint: Checkpoint, what: str) -> None:
    if not isinstance(checkpoint.branch, Rotation):
        raise ConfigError(
            "this checkpoint has no rotation head: train the model with one (ttt-adapt train --objective rotation)"
        )


def _need_batch_norm(checkpoint: Checkpoint, what: str) -> None:
    if not norm_layers(checkpoint.model):
        raise ConfigError(f"this model has no BatchNorm: {what} re-estimates its statistics and does not apply")


def _need_layer_norm(checkpoint: Checkpoint, what: str) -> None:
    if not any(isinstance(module, nn.LayerNorm) for module in checkpoint.model.modules()):
        raise ConfigError(f"this model has no LayerNorm: {what} does not apply to it; for BatchNorm there is norm-ema")


def _need_calibration(checkpoint: Checkpoint, what: str) -> None:
    if checkpoint.calibration is None:
        raise ConfigError(
            f"this checkpoint is not calibrated, and {what} needs it: run ttt-adapt calibrate on it first"
        )


_NEEDS: dict[str, Callable[[Checkpoint, str], None]] = {
    "calibration": _need_calibration,
    "class scores": _need_class_scores,
    "MAE branch": _need_branch,
    "rotation head": _need_rotation_head,
    "BatchNorm": _need_batch_norm,
    "LayerNorm": _need_layer_norm,
}


# ---- what runs an arm


def _preprocess(checkpoint: Checkpoint) -> Normalize:
    return checkpoint.spec.preprocess(device_of(checkpoint))


def _fixed(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
    return Fixed(checkpoint.model, _preprocess(checkpoint))


def _norm_average(checkpoint: Checkpoint, config: StreamConfig, momentum: float) -> Runner:
    return NormAverage(checkpoint.model, _preprocess(checkpoint), momentum)


def _norm_blend(checkpoint: Checkpoint, config: StreamConfig, share: float) -> Runner:
    return NormBlend(checkpoint.model, _preprocess(checkpoint), share)


def _calibrated(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
    alone = config.replace(norm_stats="calibrated")
    return Adapting(ForwardOnly(checkpoint.model), _preprocess(checkpoint), alone, calibration=checkpoint.calibration)


def _layer_norm(checkpoint: Checkpoint, config: StreamConfig, momentum: float, share: float) -> Runner:
    return LayerStatistics(checkpoint.model, _preprocess(checkpoint), momentum, share)


def _mae(checkpoint: Checkpoint, config: StreamConfig) -> Adapting:
    return Adapting(checkpoint.mae_branch, _preprocess(checkpoint), config)


def _entropy(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
    if not norm_layers(checkpoint.model):
        config = config.replace(norm_stats="frozen")
    return Adapting(Entropy(checkpoint.model), _preprocess(checkpoint), config)


def _pseudo_label(checkpoint: Checkpoint, config: StreamConfig, **options: Any) -> Runner:
    return Adapting(PseudoLabel(checkpoint.model, **options), _preprocess(checkpoint), config)


def _ema_teacher(checkpoint: Checkpoint, config: StreamConfig, average: float) -> Runner:
    objective = PseudoLabel(checkpoint.model, average=average)
    return Adapting(objective, _preprocess(checkpoint), config, predict=objective.teach)


def _rotation(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
    assert isinstance(checkpoint.branch, Rotation)  # checked above
    return Adapting(checkpoint.branch, _preprocess(checkpoint), config)


def _shuffled(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
    task = checkpoint.task
    if task.distribution and not task.keeps_classes:
        raise ConfigError(
            f"online-shuffled keeps one class per pixel, and a prediction of {task.name} is made of all "
            f"{task.outputs}: it does not apply"
        )
    return Shuffled(_mae(checkpoint, _unwatched(config)), config.seed, task.keeps_classes)


def _offline(checkpoint: Checkpoint, config: StreamConfig, steps: int) -> Runner:
    return Offline(_mae(checkpoint, _unwatched(config)), steps, config.seed)


def _unwatched(config: StreamConfig) -> StreamConfig:
    """Without guards: frames that come in random order are no camera's."""
    return config.replace(guards=False, on_cut="keep")


RUNNERS: dict[str, Callable[..., Runner]] = {
    "fixed": _fixed,
    "norm-average": _norm_average,
    "norm-blend": _norm_blend,
    "calibrated": _calibrated,
    "layer-norm": _layer_norm,
    "mae": _mae,
    "entropy": _entropy,
    "pseudo-label": _pseudo_label,
    "ema-teacher": _ema_teacher,
    "rotation": _rotation,
    "shuffled": _shuffled,
    "offline": _offline,
}
"""An arm's method -> (checkpoint, the arm's configuration, the arm's options) -> its runner."""


# ---- what goes on top of a runner


def _class_balanced(runner: Runner, checkpoint: Checkpoint, config: StreamConfig, number: int | None) -> Runner:
    if not isinstance(runner, Adapting):
        raise ConfigError(
            "+class resets adapted weights: put it right behind an arm that adapts weights on the stream, such as "
            "tent+class or self-train+class+smooth"
        )
    _need_class_scores(checkpoint, "+class")
    return ClassBalanced(runner, config.capacity if number is None else number)


def _smoothed(runner: Runner, checkpoint: Checkpoint, config: StreamConfig, number: int | None) -> Runner:
    _need_class_scores(checkpoint, "+smooth")
    _refuse_shuffled(runner, "smooth")
    return Smoothed(runner, SMOOTH_LENGTH if number is None else number)


def _voting(runner: Runner, checkpoint: Checkpoint, config: StreamConfig, number: int | None) -> Runner:
    _need_class_scores(checkpoint, "+vote")
    _refuse_shuffled(runner, "vote")
    return Voting(runner, _preprocess(checkpoint))


def _refuse_shuffled(runner: Runner, modifier: str) -> None:
    if isinstance(runner, Shuffled):
        raise ConfigError(
            f"online-shuffled keeps predicted classes only, and +{modifier} needs distributions: leave one of them out"
        )


_MODIFIERS: dict[str, Callable[[Runner, Checkpoint, StreamConfig, int | None], Runner]] = {
    "class": _class_balanced,
    "smooth": _smoothed,
    "vote": _voting,
}
