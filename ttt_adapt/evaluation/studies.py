"""The analyses of the paper, each as a list of settings to run side by side.

| study | of the paper | what varies |
|---|---|---|
| memory | Table 4 | no memory, implicit, explicit, both |
| window | Figure 5 | frames in the window: 1, 2, 4, ..., all |
| smoothness | the shuffle experiment, section 5 | the order of the frames |
| iterations | gradient steps per frame | 1, 2, 4, 8 |
| mask-ratio | share of patches hidden | 0.25 to 0.9, at test time only: the branch stays as it was trained |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ttt_adapt.errors import ConfigError, nearest

ITERATIONS = (1, 2, 4, 8)
MASK_RATIOS = (0.25, 0.5, 0.65, 0.75, 0.8, 0.85, 0.9)


@dataclass(frozen=True)
class Setting:
    """One row of a study.

    Attributes:
        label: its name in the table.
        arm: what runs.
        value: its place on the study's axis; None for a row without one.
        changes: fields of the online configuration that differ.
        branch: what the branch hides and scores, see `MAEBranch.using`.
    """

    label: str
    arm: str
    value: float | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    branch: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A named comparison; the first setting is the fixed model, to which the others are compared.

    Attributes:
        name: as on the command line.
        title: heading of its table.
        axis: what varies along the axis of its plot; "" for bars.
        log: whether that axis is logarithmic.
        settings: length of the longest clip -> rows.
    """

    name: str
    title: str
    axis: str
    log: bool
    settings: Callable[[int], list[Setting]]


FIXED = Setting("Fixed", "fixed")


def _memory(_frames: int) -> list[Setting]:
    rows = {"No memory": "no-memory", "Implicit only": "implicit", "Explicit only": "explicit", "Both": "online"}
    return [FIXED, *(Setting(label, arm) for label, arm in rows.items())]


def _window(frames: int) -> list[Setting]:
    sizes = [2**i for i in range(frames.bit_length()) if 2**i < frames]
    rows = [Setting(f"Window {k}", "online", k, {"window": k}) for k in sizes]
    rows.append(Setting("Window all", "online", frames, {"window": frames}))
    return [FIXED, *rows, Setting("Window auto", "online", None, {"window": "auto"})]


def _smoothness(_frames: int) -> list[Setting]:
    return [FIXED, Setting("Online", "online"), Setting("Online, shuffled frames", "online-shuffled")]


def _iterations(_frames: int) -> list[Setting]:
    return [FIXED, *(Setting(f"{n} iterations", "online", n, {"iterations": n}) for n in ITERATIONS)]


def _mask_ratio(_frames: int) -> list[Setting]:
    return [FIXED, *(Setting(f"Mask {r:g}", "online", r, branch={"mask_ratio": r}) for r in MASK_RATIOS)]


STUDIES = {
    study.name: study
    for study in (
        Study("memory", "Memory: explicit, implicit, both", "", False, _memory),
        Study("window", "Window size", "frames in the window", True, _window),
        Study("smoothness", "Temporal smoothness: frames in order and shuffled", "", False, _smoothness),
        Study("iterations", "Gradient steps per frame", "gradient steps per frame", True, _iterations),
        Study("mask-ratio", "Mask ratio at test time", "share of patches hidden", False, _mask_ratio),
    )
}


def find_study(name: str) -> Study:
    """The study of that name.

    Raises:
        ConfigError: there is none; the message holds the nearest.
    """
    if name not in STUDIES:
        raise ConfigError(f"there is no study {name!r}; {nearest(name, STUDIES)}")
    return STUDIES[name]
