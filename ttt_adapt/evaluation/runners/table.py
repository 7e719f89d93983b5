"""All arms by name, and how names are put together.

- a name of `ARMS`: `online`, `tent`, ...
- with another number, where the name ends in one or takes one: `every-8`, `offline-300`, `offline-oracle-300`;
- with modifiers, applied from left to right: `online+smooth`, `fixed+vote`, `tent+class+smooth-8`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import ConfigError, nearest
from ttt_adapt.evaluation.runners.base import Arm, Runner, device_of
from ttt_adapt.evaluation.runners.modifiers import ClassBalanced, Smoothed, Voting
from ttt_adapt.evaluation.runners.streaming import Adapting, Fixed, LayerStatistics, NormAverage, NormBlend
from ttt_adapt.evaluation.runners.whole_clip import Offline, Shuffled
from ttt_adapt.model.norms import norm_layers
from ttt_adapt.objectives import Entropy, PseudoLabel, Rotation
from ttt_adapt.stream.frames import Normalize
from ttt_adapt.tasks.checkpoint import Checkpoint

Make = Callable[[Checkpoint, StreamConfig], Runner]

OFFLINE_STEPS = 1000
"""Where the paper finds the best iteration of many videos."""

SMOOTH_LENGTH = 5


def _preprocess(checkpoint: Checkpoint) -> Normalize:
    return checkpoint.spec.preprocess(device_of(checkpoint))


def _needs_distribution(checkpoint: Checkpoint, what: str) -> None:
    """Raises ConfigError where the model's output is not a distribution over classes."""
    if not checkpoint.task.distribution:
        raise ConfigError(
            f"{what} is made of class distributions, and this checkpoint ({checkpoint.task.name}) predicts "
            f"{checkpoint.task.outputs}: it does not apply"
        )


# ---- streaming arms


def _fixed(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
    return Fixed(checkpoint.model, _preprocess(checkpoint))


def _norms(kind: type[NormAverage] | type[NormBlend], momentum: float) -> Make:
    return lambda checkpoint, config: kind(checkpoint.model, _preprocess(checkpoint), momentum)


def _layer_norms(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
    return LayerStatistics(checkpoint.model, _preprocess(checkpoint), momentum=0.05, share=0.1)


def _mae(checkpoint: Checkpoint, config: StreamConfig) -> Adapting:
    return Adapting(checkpoint.mae_branch, _preprocess(checkpoint), config)


def _tent(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
    _needs_distribution(checkpoint, "the entropy of Tent")
    if not norm_layers(checkpoint.model):
        config = config.replace(norm_stats="frozen")
    return Adapting(Entropy(checkpoint.model), _preprocess(checkpoint), config)


def _self_train(**settings: Any) -> Make:
    def make(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
        _needs_distribution(checkpoint, "self-training")
        return Adapting(PseudoLabel(checkpoint.model, **settings), _preprocess(checkpoint), config)

    return make


def _ema_teacher(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
    _needs_distribution(checkpoint, "the EMA teacher")
    objective = PseudoLabel(checkpoint.model, average=0.99)
    return Adapting(objective, _preprocess(checkpoint), config, predict=objective.teach)


def _rotation(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
    if not isinstance(checkpoint.branch, Rotation):
        raise ConfigError(
            "this checkpoint has no rotation head: train the model with one (ttt-adapt train --objective rotation)"
        )
    return Adapting(checkpoint.branch, _preprocess(checkpoint), config)


def _every(number: int) -> Arm:
    title = f"Online TTT-MAE, every {number} frames"
    return Arm(f"every-{number}", title, _mae, fixes={**_CARRIED, "every": number})


# ---- arms that see the whole clip


def _shuffled(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
    task = checkpoint.task
    if task.distribution and not task.keeps_classes:
        raise ConfigError(
            f"online-shuffled keeps one class per pixel, and a prediction of {task.name} is made of all "
            f"{task.outputs}: it does not apply"
        )
    return Shuffled(_mae(checkpoint, config), config.seed, task.keeps_classes)


def _offline_runner(steps: int) -> Make:
    def make(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
        return Offline(_mae(checkpoint, config), steps, config.seed)

    return make


def _offline(steps: int = OFFLINE_STEPS) -> Arm:
    name = "offline" if steps == OFFLINE_STEPS else f"offline-{steps}"
    title = f"Offline MAE All Frames, {steps} steps"
    return Arm(name, title, _offline_runner(steps), streaming=False, fixes=_OFFLINE)


def _oracle(steps: int = OFFLINE_STEPS) -> Arm:
    name = "offline-oracle" if steps == OFFLINE_STEPS else f"offline-oracle-{steps}"
    title = f"Offline MAE All Frames, oracle stop at 0, 1, 2, 5, ... {steps} steps"
    return Arm(name, title, _offline_runner(steps), streaming=False, oracle=True, fixes=_OFFLINE)


_CARRIED = {"carry_weights": True}
_RESET = {"carry_weights": False}
_OFFLINE = {**_CARRIED, "iterations": 1, "source_pull": 0.0, "every": 1, "gate": "none"}
_BASELINE = {"source_pull": 0.0}
"""Methods of others as they are published: weights are carried, and nothing pulls them back but `+class`."""

ARMS = {
    arm.name: arm
    for arm in (
        Arm("fixed", "Fixed", _fixed, adapts=False),
        Arm("norm-ema", "BatchNorm statistics, EMA 0.05", _norms(NormAverage, 0.05), adapts=False),
        Arm("norm-blend", "BatchNorm statistics, blend 0.5", _norms(NormBlend, 0.5), adapts=False),
        Arm("ln-adapt", "LN Adapt", _layer_norms, adapts=False),
        Arm("no-memory", "TTT-MAE No Memory", _mae, fixes={**_RESET, "window": 1}),
        Arm("implicit", "Implicit Memory Only", _mae, fixes={**_CARRIED, "window": 1}),
        Arm("explicit", "Explicit Memory Only", _mae, fixes=_RESET),
        Arm("online", "Online TTT-MAE", _mae, fixes=_CARRIED),
        Arm("online-norm-ema", "Online TTT-MAE + BatchNorm EMA", _mae, fixes={**_CARRIED, "norm_stats": "ema"}),
        Arm("online-norm-blend", "Online TTT-MAE + BatchNorm blend", _mae, fixes={**_CARRIED, "norm_stats": "blend"}),
        Arm("online-gate", "Online TTT-MAE + surprise gate", _mae, fixes={**_CARRIED, "gate": "surprise"}),
        _every(4),
        Arm("online-shuffled", "Online TTT-MAE, shuffled frames", _shuffled, streaming=False, fixes=_CARRIED),
        _offline(),
        _oracle(),
        Arm("tent", "Tent", _tent, fixes=_CARRIED, defaults={**_BASELINE, "norm_stats": "batch"}),
        Arm("self-train", "Self-Train", _self_train(), fixes=_CARRIED, defaults=_BASELINE),
        Arm(
            "self-train-plain",
            "Self-Train, no threshold, no mask",
            _self_train(threshold=0.0, mask_ratio=0.0),
            fixes=_CARRIED,
            defaults=_BASELINE,
        ),
        Arm("ema-teacher", "EMA teacher", _ema_teacher, fixes=_CARRIED, defaults=_BASELINE),
        Arm("rotation", "TTT-Rotation", _rotation, fixes=_CARRIED),
    )
}

NUMBERED: dict[str, Callable[[int], Arm]] = {"every": _every, "offline": _offline, "offline-oracle": _oracle}
"""Arms whose name may end in another number."""


# ---- modifiers


def _balanced(runner: Runner, checkpoint: Checkpoint, config: StreamConfig, number: int | None) -> Runner:
    if not isinstance(runner, Adapting):
        raise ConfigError(
            "+class resets adapted weights: it goes right behind an arm that adapts weights on the stream, such as "
            "tent+class or self-train+class+smooth"
        )
    _needs_distribution(checkpoint, "+class")
    return ClassBalanced(runner, config.capacity if number is None else number)


def _smoothed(runner: Runner, checkpoint: Checkpoint, config: StreamConfig, number: int | None) -> Runner:
    _needs_distribution(checkpoint, "+smooth")
    _refuse_shuffled(runner, "smooth")
    return Smoothed(runner, SMOOTH_LENGTH if number is None else number)


def _voting(runner: Runner, checkpoint: Checkpoint, config: StreamConfig, number: int | None) -> Runner:
    _needs_distribution(checkpoint, "+vote")
    _refuse_shuffled(runner, "vote")
    return Voting(runner, _preprocess(checkpoint))


def _refuse_shuffled(runner: Runner, modifier: str) -> None:
    if isinstance(runner, Shuffled):
        raise ConfigError(f"online-shuffled keeps predicted classes, and +{modifier} is made of distributions")


MODIFIERS: dict[str, tuple[str, Callable[[Runner, Checkpoint, StreamConfig, int | None], Runner], bool]] = {
    "class": ("Class", _balanced, True),
    "smooth": ("smoothing", _smoothed, True),
    "vote": ("vote", _voting, False),
}
"""What comes behind a "+": its title, how it is put on a runner, and whether a number may follow it."""


def find_arm(name: str) -> Arm:
    """The arm called `name`, with its modifiers.

    Raises:
        ConfigError: an unknown name or modifier; the message holds the nearest.
    """
    base, *modifiers = name.split("+")
    arm = _base_arm(base)
    for modifier in modifiers:
        arm = _modified(arm, modifier)
    return arm


def find_arms(names: Sequence[str]) -> list[Arm]:
    """The arms called `names`; errors as in `find_arm`."""
    return [find_arm(name) for name in names]


def _base_arm(name: str) -> Arm:
    if name in ARMS:
        return ARMS[name]
    family, number = _numbered(name)
    if family in NUMBERED and number:
        return NUMBERED[family](number)
    raise ConfigError(f"there is no arm {name!r}; {nearest(name, ARMS)}")


def _modified(arm: Arm, modifier: str) -> Arm:
    word, number = _numbered(modifier)
    if word not in MODIFIERS or (number is not None and not (MODIFIERS[word][2] and number)):
        known = ", ".join(f"+{word}" + ("-N" if numbered else "") for word, (_, _, numbered) in MODIFIERS.items())
        raise ConfigError(f"arm {arm.name!r} cannot be modified by {'+' + modifier!r}; expected one of {known}")
    title, put, _ = MODIFIERS[word]

    def make(checkpoint: Checkpoint, config: StreamConfig) -> Runner:
        runner = arm.make(checkpoint, config)
        try:
            return put(runner, checkpoint, config, number)
        except BaseException:
            runner.close()
            raise

    shown = title if number is None else f"{title} {number}"
    return dataclasses.replace(arm, name=f"{arm.name}+{modifier}", title=f"{arm.title} + {shown}", make=make)


def _numbered(name: str) -> tuple[str, int | None]:
    """ "every-8" -> ("every", 8); a name without a number at its end -> (name, None)."""
    match = re.fullmatch(r"(.+)-(\d+)", name)
    return (match[1], int(match[2])) if match else (name, None)
