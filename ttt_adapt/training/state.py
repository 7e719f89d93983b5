"""The state of a training in a file: read and checked whole, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ttt_adapt.errors import CheckpointError
from ttt_adapt.file_kind import refuse_other_kind
from ttt_adapt.files import check_format_number
from ttt_adapt.schema import check_fields, dict_of, list_of, number, plain, text, whole
from ttt_adapt.stream.check_optimizer import check_optimizer_state

FORMAT = 1
"""Number of the layout of training states, under "format". States without a number have the same layout."""

_ANYTHING = dict_of(lambda _value: "")
_FIELDS = {
    "config": dict_of(plain),
    "origin": text,
    "epoch": whole(0),
    "model": _ANYTHING,
    "branch": _ANYTHING,
    "optimizer": _ANYTHING,
    "schedule": _ANYTHING,
    "scaler": _ANYTHING,
}


def _of_function(value: Any) -> str:
    """What a schedule keeps of a function: None, or of one that is an object, its attributes, which are none here."""
    return "" if value is None or (isinstance(value, dict) and not value) else "None"


def read_state(file: str | Path, device: torch.device) -> dict[str, Any]:
    """What a training wrote into `file`, its tensors on `device`.

    Raises:
        CheckpointError: the file cannot be read, is no training state, or is of a later version.
    """
    refuse_other_kind(file, ("training", "torch", "unknown"), "no training state", CheckpointError)
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # a broken file can raise any error
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}): remove it to start anew") from error
    number_of_format = state.get("format", FORMAT) if isinstance(state, dict) else None
    if not isinstance(number_of_format, int):
        raise CheckpointError(f"{file} is no training state: remove it to start anew")
    check_format_number(number_of_format, FORMAT, file)
    try:
        check_fields({name: value for name, value in state.items() if name != "format"}, _FIELDS, "it")
    except CheckpointError as error:
        raise CheckpointError(f"{file} is no training state ({error}): remove it to start anew") from error
    return state


def check_parts(state: Mapping[str, Any], epochs: int, optimizer: Any, schedule: Any, scaler: Any, file: Any) -> None:
    """Check that these could go on from a state; they do not change.

    Args:
        state: from `read_state`.
        epochs: of the whole training.
        optimizer: of the training.
        schedule: its schedule of learning rates.
        scaler: its loss scaler.
        file: where the state was read from.

    Raises:
        CheckpointError: one could not.
    """
    rates = list_of(number(0.0), *[len(optimizer.param_groups)] * 2)
    scales = {k: whole() if isinstance(v, int) else number(math.ulp(0.0)) for k, v in scaler.state_dict().items()}
    fields = {"base_lrs": rates, "_last_lr": rates, "last_epoch": whole(), "_step_count": whole()}
    fields["lr_lambdas"] = list_of(_of_function, *[len(optimizer.param_groups)] * 2)
    flags = dict.fromkeys({*schedule.state_dict(), "verbose"} - fields.keys(), plain)  # other versions have other flags
    try:
        check_fields({"epoch": state["epoch"]}, {"epoch": whole(0, epochs)}, "it")
        check_fields(state["schedule"], {**fields, **flags}, "its schedule", required=fields)
        check_fields(state["scaler"], scales, "its scaler")
        check_optimizer_state(optimizer, state["optimizer"])
    except CheckpointError as error:
        raise CheckpointError(f"{file} is damaged ({error}): remove it to start anew") from error
