"""All arms, as data: what each is called, what it changes in `StreamConfig`, and what runs it.

An arm is one way of running the same model on the same video. The presets of `StreamConfig`, the command line, the
evaluation and the integrations read the arms from here. An arm's name is put together like this:

- a name of `ARMS`: `online`, `no-memory`, `tent`, ...
- with another number, where the name ends in one or takes one: `every-8`, `offline-300`, `offline-oracle-300`;
- with modifiers behind a "+", applied from left to right: `online+smooth`, `fixed+vote`, `tent+class+smooth-8`.

Underscores stand for hyphens, so `no_memory` is `no-memory`; `implicit-only` is `implicit`, `explicit-only` is
`explicit`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ttt_adapt.errors import ConfigError, nearest

BASE = {"lr": 1e-4, "source_pull": 0.5, "norm_stats": "auto"}
"""What presets change in `StreamConfig` before the changes of their arm.

A calibrated model predicts with calibrated statistics. The learning rate is larger than the default. The pull toward
the source weights limits how far the weights move: without the pull a stream of any length drifts away from the head.
"""

OFFLINE_STEPS = 1000
"""Where the paper finds the best iteration of many videos."""


@dataclass(frozen=True)
class Arm:
    """A named way of running a model on a video.

    Attributes:
        name: as on the command line.
        title: as in tables.
        method: what runs it, a name in `ttt_adapt.evaluation.runners.RUNNERS`.
        fixes: fields of `StreamConfig` that make the arm what it is.
        defaults: other fields that this arm changes, unless somebody sets them.
        options: keywords of the method.
        needs: what a checkpoint must have: "MAE branch", "rotation head", "calibration", "BatchNorm", "LayerNorm" or
            "class scores".
        least_window: frames that the arm's window holds at least, to be this arm.
        adapts: whether it adapts weights; other arms ignore the configuration.
        streaming: whether frame t and those before it are all that the prediction of frame t depends on.
        oracle: whether it chooses by the labels; its results are a bound, not a method.
        modifiers: (word, number) for each modifier on top of it; the number is None where there is none.
    """

    name: str
    title: str
    method: str
    fixes: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    least_window: int = 1
    adapts: bool = True
    streaming: bool = True
    oracle: bool = False
    modifiers: tuple[tuple[str, int | None], ...] = ()

    def settings(self, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The fields of `StreamConfig` that differ from the configuration of an evaluation when this arm runs.

        Args:
            changes: fields that win over the arm's defaults.

        Raises:
            ConfigError: the changes would make another arm of it, or the arm reads no configuration.
        """
        given = dict(changes or {})
        if given and not self.adapts:
            raise ConfigError(f"arm {self.name} adapts no weights, so {', '.join(given)} would change nothing of it")
        for name, value in given.items():
            if name in self.fixes and value != self.fixes[name]:
                raise ConfigError(
                    f"{name}={value!r} would make another arm of {self.name}, which is defined by "
                    f"{name}={self.fixes[name]!r}: leave it out, or run the arm that has it"
                )
        return {**self.defaults, **given, **self.fixes}


@dataclass(frozen=True)
class Modifier:
    """Something that is put on top of an arm.

    Attributes:
        word: what stands behind the "+".
        title: as in tables, behind the arm's title.
        numbered: whether a number may follow the word.
    """

    word: str
    title: str
    numbered: bool


MODIFIERS = {
    modifier.word: modifier
    for modifier in (
        Modifier("class", "Class", numbered=True),
        Modifier("smooth", "smoothing", numbered=True),
        Modifier("vote", "vote", numbered=False),
    )
}
"""What may stand behind a "+"."""

_CARRIED = {"carry_weights": True}
_ABLATION = {"norm_stats": "frozen", "guards": False}
"""The paper's ablation of memory has no calibrated statistics and no guards."""
_OFFLINE = {**_CARRIED, "iterations": 1, "source_pull": 0.0, "every": 1, "gate": "none"}
_UNGUARDED = {"guards": False}
"""The paper's recipes have no guards."""
_PUBLISHED = {"source_pull": 0.0, **_UNGUARDED}
"""Methods of others run as they were published: weights are carried, and only `+class` takes them back."""

# Everything but what depends on the data and the machine: crops, seed, precision, engine, memory savings.
_PAPER = {
    "window": 16,
    "batch_size": 32,
    "iterations": 1,
    "carry_weights": True,
    "source_pull": 0.0,
    "restart_optimizer": True,
    "lr": 1e-4,
    "encoder_lr_scale": 0.1,
    "weight_decay": 0.05,
    "grad_clip": 0.01,
    "norm_stats": "frozen",
    "norm_momentum": None,
    "drop_path": True,
    "every": 1,
    "gate": "none",
    "adapt": "all",
}


def _mae(name: str, title: str, fixes: Mapping[str, Any], least_window: int = 2, **more: Any) -> Arm:
    """An arm that adapts by reconstruction."""
    needs = ("MAE branch", *more.pop("needs", ()))
    return Arm(name, title, more.pop("method", "mae"), fixes, needs=needs, least_window=least_window, **more)


def _baseline(name: str, title: str, method: str, **more: Any) -> Arm:
    """A method of others, which needs a distribution over classes."""
    defaults = {**_PUBLISHED, **more.pop("defaults", {})}
    return Arm(name, title, method, _CARRIED, defaults, needs=("class scores",), **more)


def _forward_only(name: str, title: str, method: str, needs: str, **options: float) -> Arm:
    """An arm that takes no gradient step."""
    return Arm(name, title, method, options=options, needs=(needs,), adapts=False)


def _every(number: int) -> Arm:
    return _mae(f"every-{number}", f"Online TTT-MAE, every {number} frames", {**_CARRIED, "every": number})


def _offline(steps: int = OFFLINE_STEPS) -> Arm:
    name = "offline" if steps == OFFLINE_STEPS else f"offline-{steps}"
    title = f"Offline MAE All Frames, {steps} steps"
    return _mae(name, title, _OFFLINE, method="offline", options={"steps": steps}, streaming=False)


def _oracle(steps: int = OFFLINE_STEPS) -> Arm:
    name = "offline-oracle" if steps == OFFLINE_STEPS else f"offline-oracle-{steps}"
    title = f"Offline MAE All Frames, oracle stop at 0, 1, 2, 5, ... {steps} steps"
    return dataclasses.replace(_offline(steps), name=name, title=title, oracle=True)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("fixed", "Fixed", "fixed", adapts=False),
        _forward_only("norm-ema", "BatchNorm statistics, EMA 0.05", "norm-average", "BatchNorm", momentum=0.05),
        _forward_only("norm-blend", "BatchNorm statistics, blend 0.5", "norm-blend", "BatchNorm", share=0.5),
        _forward_only("calibrated", "Calibrated statistics", "calibrated", "calibration"),
        _forward_only("ln-adapt", "LN Adapt", "layer-norm", "LayerNorm", momentum=0.05, share=0.1),
        _mae("no-memory", "TTT-MAE No Memory", {"window": 1, "carry_weights": False}, 1, defaults=_ABLATION),
        _mae("implicit", "Implicit Memory Only", {"window": 1, **_CARRIED}, 1, defaults=_ABLATION),
        _mae("explicit", "Explicit Memory Only", {"carry_weights": False}, defaults=_ABLATION),
        _mae("online", "Online TTT-MAE", _CARRIED),
        _mae("paper", "Online TTT-MAE, optimizer settings of the paper's code", _PAPER, defaults=_UNGUARDED),
        _mae(
            "online-norm-ema",
            "Online TTT-MAE + BatchNorm EMA",
            {**_CARRIED, "norm_stats": "ema"},
            needs=("BatchNorm",),
        ),
        _mae(
            "online-norm-blend",
            "Online TTT-MAE + BatchNorm blend",
            {**_CARRIED, "norm_stats": "blend"},
            needs=("BatchNorm",),
        ),
        _mae(
            "online-norm-frozen",
            "Online TTT-MAE, without calibrated statistics",
            {**_CARRIED, "norm_stats": "frozen"},
        ),
        _mae("online-gate", "Online TTT-MAE + surprise gate", {**_CARRIED, "gate": "surprise"}),
        _every(4),
        _mae("online-shuffled", "Online TTT-MAE, shuffled frames", _CARRIED, method="shuffled", streaming=False),
        _offline(),
        _oracle(),
        _baseline("tent", "Tent", "entropy", defaults={"norm_stats": "batch"}),
        _baseline("self-train", "Self-Train", "pseudo-label"),
        _baseline(
            "self-train-plain",
            "Self-Train, no threshold, no mask",
            "pseudo-label",
            options={"threshold": 0.0, "mask_ratio": 0.0},
        ),
        _baseline("ema-teacher", "EMA teacher", "ema-teacher", options={"average": 0.99}),
        Arm("rotation", "TTT-Rotation", "rotation", _CARRIED, _UNGUARDED, needs=("rotation head",)),
    )
}
"""Every arm by name."""

_NUMBERED: dict[str, Callable[[int], Arm]] = {"every": _every, "offline": _offline, "offline-oracle": _oracle}
"""Arms whose name may end in another number."""

_OTHER_NAMES = {"implicit-only": "implicit", "explicit-only": "explicit"}

PRESETS = ("online", "paper", "no-memory", "implicit", "explicit")
"""Names of the arms that `StreamConfig` has presets of."""


def normalized(name: str) -> str:
    """An arm's name as `ARMS` spells it: `no_memory` -> `no-memory`, `implicit_only` -> `implicit`."""
    base, plus, modifiers = str(name).replace("_", "-").partition("+")
    return _OTHER_NAMES.get(base, base) + plus + modifiers


def find_arm(name: str) -> Arm:
    """The arm called `name`, with its modifiers.

    All spellings of a name give the same arm. Its `name` is the one spelling that arms are compared by: `every-04` ->
    `every-4`, `offline-1000` -> `offline`.

    Raises:
        ConfigError: an unknown name or modifier; the message holds the nearest.
    """
    base, *modifiers = normalized(name).split("+")
    arm = _base_arm(base)
    for modifier in modifiers:
        arm = _modified(arm, modifier)
    return arm


def preset_fields(name: str) -> dict[str, Any]:
    """What the preset of an arm changes in `StreamConfig`.

    Raises:
        ConfigError: an unknown arm, or one that a configuration alone cannot be: it adapts no weights, or it has
            modifiers.
    """
    arm = find_arm(name)
    if not arm.adapts:
        raise ConfigError(
            f"arm {arm.name} adapts no weights, so it has no configuration: expected an arm that adapts, such as online"
        )
    if arm.modifiers:
        base = arm.name.partition("+")[0]
        raise ConfigError(
            f"arm {arm.name} has modifiers, which a configuration cannot hold: expected an arm without, such as {base}"
        )
    return {**BASE, **arm.settings()}


def contradictions(arm: Arm, config: Any) -> dict[str, str]:
    """The fields of a `StreamConfig` that turn the arm into another one, each with what the arm means by it.

    Args:
        arm: what is wanted.
        config: what would run.
    """
    wrong = {name: f"{name}={value!r}" for name, value in arm.fixes.items() if getattr(config, name) != value}
    if config.capacity < arm.least_window:
        wrong.setdefault("window", f"a window of at least {arm.least_window}")
    if arm.fixes.get("carry_weights") and config.source_pull == 1:  # which goes all the way back before each frame
        wrong.setdefault("source_pull", "source_pull below 1")
    return wrong


def _base_arm(name: str) -> Arm:
    if name in ARMS:
        return ARMS[name]
    family, number = _numbered(name)
    if family in _NUMBERED and number:
        return _NUMBERED[family](number)
    raise ConfigError(f"there is no arm {name!r}; {nearest(name, ARMS)}")


def _modified(arm: Arm, modifier: str) -> Arm:
    word, number = _numbered(modifier)
    known = MODIFIERS.get(word)
    if known is None or (number is not None and not (known.numbered and number)):
        choices = ", ".join(f"+{each.word}" + ("-N" if each.numbered else "") for each in MODIFIERS.values())
        raise ConfigError(f"arm {arm.name!r} cannot be modified by {'+' + modifier!r}; expected one of {choices}")
    suffix, shown = ("", "") if number is None else (f"-{number}", f" {number}")
    return dataclasses.replace(
        arm,
        name=f"{arm.name}+{word}{suffix}",
        title=f"{arm.title} + {known.title}{shown}",
        modifiers=(*arm.modifiers, (word, number)),
    )


def _numbered(name: str) -> tuple[str, int | None]:
    """ "every-8" -> ("every", 8); a name without a number at its end -> (name, None)."""
    match = re.fullmatch(r"(.+)-(\d+)", name)
    return (match[1], int(match[2])) if match else (name, None)
