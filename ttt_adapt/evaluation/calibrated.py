"""What the calibrations of checkpoints mean for an evaluation: which arms, which settings, and what is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt_adapt.tasks.checkpoint import read_calibration, read_spec

DEFAULT_ARMS = ("fixed", "no-memory", "implicit", "explicit", "online")
"""The arms that are compared on checkpoints without a calibration, unless somebody names others."""


def default_arms(checkpoints: Sequence[Path]) -> tuple[str, ...]:
    """The arms that are compared unless somebody names others.

    They are `DEFAULT_ARMS`, with calibrated statistics where all checkpoints are calibrated. Where these have no branch
    either, there is nothing else to compare.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if not checkpoints or any(read_calibration(path) is None for path in checkpoints):
        return DEFAULT_ARMS
    if all(read_spec(path).branch is None for path in checkpoints):
        return ("fixed", "calibrated")
    return ("fixed", "calibrated", *DEFAULT_ARMS[1:])


def chosen_settings(checkpoint: Path, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields of the online preset that the calibration of a checkpoint chose; {} where it chose none.

    Args:
        checkpoint: the file.
        given: fields that somebody gives, which win; what does not go together with them is left out.

    Raises:
        CheckpointError: the file cannot be read.
    """
    calibration = read_calibration(checkpoint)
    return {} if calibration is None else calibration.settings_beside(given or {})


def digests(checkpoints: Sequence[Path]) -> list[str | None]:
    """A hash of each checkpoint's calibration, None where it has none; [] where no one has.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found = [read_calibration(path) for path in checkpoints]
    return [None if each is None else each.digest for each in found] if any(found) else []
