"""Whether a saved stream belongs to an adapter: same format, configuration, objective and preprocessing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import CheckpointError, ConfigError
from ttt_adapt.file_kind import OPENMMLAB, TRAINING, WEIGHTS, kind_of_dict
from ttt_adapt.files import check_format_number
from ttt_adapt.model.fingerprint import fingerprint
from ttt_adapt.model.frames import Normalize, Preprocess
from ttt_adapt.model.start_state import StartState
from ttt_adapt.objectives.base import Attached, Objective, SplitLoss, StatefulObjective
from ttt_adapt.objectives.mae import SETTINGS, MAEBranch
from ttt_adapt.schema import check_fields, dict_of, plain, text
from ttt_adapt.stream.source import SourceWeights

FORMAT = 1
"""Version of the layout of a saved stream. States without a number are of version 0."""

_HOW = ("engine", "micro_batch", "grad_checkpointing")  # how a step is computed, not what
_WATCHING = ("guards", "on_cut", "max_drift", "max_ms")  # what is done where something is wrong


def current_format(state: Any) -> dict[str, Any]:
    """A saved stream in the layout of today.

    Args:
        state: what `StreamAdapter.state_dict` returned, in this version or an earlier one.

    Raises:
        CheckpointError: it is no saved stream, or one of a later version.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"the state is a {type(state).__name__}; expected what state_dict() returned")
    state, kind = dict(state), kind_of_dict(state)
    if kind in (TRAINING, WEIGHTS, OPENMMLAB):
        raise CheckpointError(f"the state is {kind.what}; expected what state_dict() returned")
    if "format" in state:
        check_format_number(state["format"], FORMAT, "the state")
    else:
        _upgrade_from_0(state)
    if not isinstance(state.get("config"), Mapping):
        raise CheckpointError("this is no state of a StreamAdapter: config missing")
    check_fields(state, _FIELDS, "the state", required=("config",), others=True)
    state.setdefault("passes", {})  # early versions did not save what a model keeps of a video
    return {**dict.fromkeys(_LATER), **state}


_LATER = ("tally", "guards", "budget")
"""Parts that early versions of format 1 do not have; each of them takes None, and begins."""
_FIELDS = {"config": dict_of(plain), "setting": dict_of(plain), "source": dict_of(text)}
"""What a saved stream holds beside the parts of `StreamState`."""


def _upgrade_from_0(state: dict[str, Any]) -> None:
    """Format 0 had the index of the next frame by itself, and an option `deferred`, which is gone."""
    if "frame_index" in state:
        state["progress"] = {"frame_index": state.pop("frame_index")}
    config = state.get("config")
    if isinstance(config, Mapping) and "deferred" in config:
        if config["deferred"]:
            raise CheckpointError(
                "the state has format 0 and was saved with deferred=True, an option that is gone: it cannot go on. "
                "Begin the stream anew, and call predict(frame) before adapt(frame) to predict first"
            )
        state["config"] = {name: value for name, value in config.items() if name != "deferred"}


def setting_of(objective: Objective, preprocess: Preprocess | None, calibration: str | None = None) -> dict[str, Any]:
    """What a stream depends on beside its configuration and its tensors, in plain values.

    Args:
        objective: what is learned from. Of one that is no `MAEBranch` and no `SplitLoss`, only the kind is known.
        calibration: `Calibration.digest`, where frames are corrected by one.
        preprocess: of the frames; two functions of the user's own cannot be told apart.
    """
    setting: dict[str, Any] = {"objective": type(objective).__name__}
    if calibration is not None:
        setting["calibration"] = calibration
    if isinstance(objective, MAEBranch):
        setting |= {"masking": objective.masking, "patch_size": objective.patch_size}
        setting |= dict(zip(SETTINGS, objective.settings(), strict=True))
    elif isinstance(objective, SplitLoss):
        setting["settings"] = objective.settings()
    if type(preprocess) is Normalize:
        numbers = {name: tuple(map(float, getattr(preprocess, name))) for name in ("mean", "std")}
        return {**setting, "preprocess": "Normalize", **numbers, "size": preprocess.size and tuple(preprocess.size)}
    return {**setting, "preprocess": "none" if preprocess is None else "a function"}


def source_of(objective: Objective, source: SourceWeights, start: StartState) -> dict[str, str]:
    """Hashes of the source weights of a stream: those of the whole model, and those of the objective.

    Args:
        objective: with the model.
        source: the source values of what is adapted.
        start: the model's other buffers as they were when the adapter was made: predictions may change them.
    """
    branch = objective.state_dict(keep_vars=True) if isinstance(objective, Attached) else {}
    memory = objective.memory() if isinstance(objective, StatefulObjective) else {}
    own = {**dict(objective.named_parameters()), **branch, **memory}
    model = objective.model.state_dict(keep_vars=True)
    parts = {"model": model | start.buffers(objective.model, among=model), "objective": own}
    return {name: fingerprint(source.originals(tensors)) for name, tensors in parts.items()}


def check_source(state: Mapping[str, Any], own: Callable[[], Mapping[str, str]]) -> None:
    """Refuse a stream that began with other weights.

    Args:
        state: from `current_format`; without a "source", one of an early version, which is not compared.
        own: this adapter's, from `source_of`.

    Raises:
        CheckpointError: the source weights of the model or of the objective are others.
    """
    if "source" not in state:
        return
    theirs, ours = state["source"], own()
    if other := [name for name in ours if theirs.get(name) != ours[name]]:
        what = " and of the ".join(other)
        raise CheckpointError(
            f"the state was saved over other source weights of the {what} (hash {theirs.get(other[0])!r}, here "
            f"{ours[other[0]]!r}): make the adapter on the weights that the stream began with"
        )


def check_compatible(state: Mapping[str, Any], config: StreamConfig, setting: Mapping[str, Any]) -> None:
    """Refuse a stream of another configuration, objective or preprocessing.

    Args:
        state: from `current_format`; without a "setting", one of an early version, which is not compared.
        config: this adapter's.
        setting: this adapter's, from `setting_of`.

    Raises:
        CheckpointError: it does not fit; the message says in what.
    """
    own = asdict(config)
    saved = {**asdict(StreamConfig()), **state["config"]}  # an early version lacks fields that came later
    other = {k: v for k, v in saved.items() if k not in (*_HOW, *_WATCHING) and own.get(k) != v}
    if [*other] == ["norm_momentum"] and _share(saved) == config.frame_share:  # its default, or not used
        del other["norm_momentum"]
    if other:
        raise CheckpointError(
            f"the state was saved with {other}, this adapter has { {k: own.get(k) for k in other} }: make the adapter "
            "with the same StreamConfig"
        )
    _check_setting(state.get("setting", setting), setting)


def _share(config: Mapping[str, Any]) -> float:
    """`StreamConfig.frame_share` of a saved configuration; NaN where its momentum is none."""
    try:
        return StreamConfig(norm_stats=config["norm_stats"], norm_momentum=config["norm_momentum"]).frame_share
    except ConfigError:
        return math.nan


def _check_setting(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    other = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    if not other:
        return
    theirs, ours = ({name: values[name] for name in other if name in values} for values in (saved, own))
    frames = {"preprocess", "mean", "std", "size"}
    advice = []
    if "calibration" in other:
        advice.append("pass the same calibration")
    if set(other) - frames - {"calibration"}:
        advice.append("adapt by the same objective with the same settings (those of a branch change by using(...))")
    if set(other) & frames:
        advice.append("pass the same preprocess")
    raise CheckpointError(f"the state was saved with {theirs}, this adapter has {ours}: {' and '.join(advice)}")
