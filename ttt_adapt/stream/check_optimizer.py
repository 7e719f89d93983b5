"""Whether the saved state of an optimizer fits an optimizer, so that no step meets a number that it cannot use.

A fused optimizer goes through the memory of parameters and moments side by side and checks no shapes: a moment of
another shape ends the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.errors import CheckpointError
from ttt_adapt.model.parameters import dense
from ttt_adapt.schema import Check, dict_of, flag, list_of, number, optional, plain, shown, text, whole

_NAMES: dict[type, set[str]] = {
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
}
"""What these optimizers remember of a parameter that was stepped."""
_NOT_NEGATIVE = {"step", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}
"""Counts, and means of squares, whose root is taken."""
_ONE_NUMBER = {"step", "mu_product", "mu", "eta"}
"""What optimizers of PyTorch keep as one number for a parameter; all else has the shape of the parameter."""
_FACTORS = {"row_var", "col_var"}
"""What Adafactor keeps in the place of a whole mean of squares."""


_BY_SCHEDULE = {"lr", "initial_lr", "momentum", "betas", "max_lr", "min_lr", "base_momentum", "max_momentum"}
"""Settings that schedules of PyTorch change."""


def check_optimizer_state(
    optimizer: torch.optim.Optimizer, saved: Any, changed: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Check what `optimizer.state_dict()` of another optimizer of this kind returned.

    An optimizer of PyTorch or of this library keeps its settings, so they must be the same in the state. Only a
    schedule changes some of them, and it leaves an "initial_lr" in the groups. An optimizer of the user's own may
    change its settings by itself; theirs must be of the same kind.

    Args:
        optimizer: of the parameters that the state is for; it does not change.
        saved: its "state" and "param_groups".
        changed: settings of the groups that are right as well, such as those that a user changed by hand.

    Raises:
        CheckpointError: `optimizer` could not go on from it, or would go on with other settings.
    """
    if not isinstance(saved, Mapping) or saved.keys() != {"state", "param_groups"}:
        raise CheckpointError(f"the state's optimizer is {shown(saved)}; expected its state and its param_groups")
    groups = optimizer.state_dict()["param_groups"]
    theirs = saved["param_groups"]
    if not isinstance(theirs, list) or len(theirs) != len(groups):
        raise CheckpointError(f"the state's optimizer has {shown(theirs)} as groups; expected {len(groups)} of them")
    keeps = type(optimizer).__module__.startswith(("torch.optim", "ttt_adapt."))
    for own, by_hand, other in zip(groups, changed or groups, theirs, strict=True):
        _check_group(own, other)
        if keeps:
            _check_settings(own, by_hand, other)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = saved["state"]
    if not isinstance(entries, Mapping) or any(whole(0, len(parameters) - 1)(key) for key in entries):
        raise CheckpointError(f"the state's optimizer has moments of parameters that are not there ({shown(entries)})")
    for index, entry in entries.items():
        _check_entry(optimizer, parameters[index], entry, f"the state's optimizer, for parameter {index},")
    if len({frozenset(entry) for entry in entries.values()}) > 1:
        raise CheckpointError("the state's optimizer remembers other things of one parameter than of another")


def _check_group(own: Mapping[str, Any], other: Any) -> None:
    """Refuse a group of other parameters, or with settings of another kind than those of this optimizer."""
    if not isinstance(other, Mapping):
        raise CheckpointError(f"the state's optimizer has {shown(other)} as a group; expected a dict")
    name = own.get("name", "")
    if list_of(whole())(other.get("params")) or list(other["params"]) != own["params"]:
        raise CheckpointError(
            f"the state's optimizer has the parameters {shown(other.get('params'))} in its group {name!r}; expected "
            f"{shown(own['params'])}"
        )
    for key, value in own.items():
        if key == "params" or (key not in other and (value is None or isinstance(value, bool))):  # an earlier PyTorch
            continue
        check = optional(flag) if key in ("fused", "foreach") else _like(value)  # how a step runs, not what it does
        expected = check(other[key]) if key in other else "a value"
        if expected or (key == "name" and other[key] != value):
            raise CheckpointError(
                f"the state's optimizer has {shown(other.get(key))} as {key} in its group {name!r}; expected "
                f"{expected or repr(value)}"
            )
    if unknown := [key for key, value in other.items() if key not in own and (text(key) or plain(value))]:
        raise CheckpointError(
            f"the state's optimizer has {shown(unknown[0])} in its group {name!r}, which is no setting"
        )


def _check_settings(own: Mapping[str, Any], by_hand: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuse a group with other settings than `own` and `by_hand`, those that a schedule changes aside."""
    free = {"params", "fused", "foreach", *(_BY_SCHEDULE if "initial_lr" in own else ())}
    for key in other.keys() & own.keys() - free:
        if not any(_equal(other[key], group[key]) for group in (own, by_hand) if key in group):
            raise CheckpointError(
                f"the state's optimizer has {other[key]!r} as {key} in its group {own.get('name', '')!r}, here it is "
                f"{own[key]!r}: make the adapter with the optimizer and the rates that the stream began with"
            )


def _equal(a: Any, b: Any) -> bool:
    """Whether two settings are the same, also where one is a list and the other a tuple, or one a tensor."""
    a, b = (value.item() if isinstance(value, Tensor) else value for value in (a, b))
    return bool(list(a) == list(b)) if isinstance(a, list | tuple) and isinstance(b, list | tuple) else bool(a == b)


def _like(value: Any) -> Check:
    """A check for settings of the same kind as `value`: rates and the like are not negative."""
    if isinstance(value, bool):
        return lambda item: "" if item is value else f"{value}"
    if value is None:
        return plain
    if isinstance(value, int | float):
        return number(0.0) if value >= 0 else number()
    if isinstance(value, list | tuple):
        share = all(isinstance(item, float) and 0.0 <= item < 1.0 for item in value)
        inside = (lambda item: number(0.0, 1.0)(item) or (item == 1 and "below 1") or "") if share else number()
        return list_of(inside, len(value), len(value))
    if isinstance(value, str):
        return text
    if isinstance(value, Tensor):
        return lambda item: "" if _number_tensor(item) else "a number in a tensor"
    return lambda item: "" if isinstance(item, type(value)) else f"a {type(value).__name__}"


def _number_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and dense(value) and value.ndim == 0 and bool(value.isfinite())


def _fits(name: str, value: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor can be what an optimizer of PyTorch remembers of a parameter under this name."""
    fits = value.ndim == 0 if name in _ONE_NUMBER else value.shape == parameter.shape or name in _FACTORS
    return fits and value.is_floating_point()


def _check_entry(optimizer: torch.optim.Optimizer, parameter: Tensor, entry: Any, what: str) -> None:
    """Refuse what an optimizer remembers of a parameter, where a step could not use it."""
    if dict_of(lambda _value: "")(entry):
        raise CheckpointError(f"{what} has {shown(entry)}; expected a dict")
    known = next((names for kind, names in _NAMES.items() if isinstance(optimizer, kind)), None)
    if known is not None and entry and set(entry) - {"max_exp_avg_sq"} != known:
        raise CheckpointError(f"{what} has {', '.join(entry)}; expected {', '.join(sorted(known))}")
    of_torch = type(optimizer).__module__.startswith(("torch.optim", "ttt_adapt."))
    for name, value in entry.items():
        if not isinstance(value, Tensor):
            other = value is not None and (name not in _ONE_NUMBER or number(0.0)(value))
            if known is not None or (of_torch and other):
                raise CheckpointError(f"{what} has {shown(value)} as {name}; expected a tensor or a number")
            continue
        if not dense(value) or (of_torch and not _fits(name, value, parameter)):
            raise CheckpointError(f"{what} has {shown(value)} as {name}; expected one like {shown(parameter)}")
        if not bool(value.isfinite().all()) or (name in _NOT_NEGATIVE and bool((value < 0).any())):
            raise CheckpointError(f"{what} has numbers as {name} that are not finite, or below 0")
