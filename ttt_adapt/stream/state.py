"""A stream's saved state: whether it belongs to an adapter, and putting it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import CheckpointError
from ttt_adapt.model.parameters import check_state
from ttt_adapt.objectives.base import Objective, SplitLoss
from ttt_adapt.objectives.mae import SETTINGS, MAEBranch
from ttt_adapt.stream.frames import Normalize, Preprocess, scaling
from ttt_adapt.stream.optimizer import FusedAdamW
from ttt_adapt.stream.source import copied

PARTS = ("config", "weights", "optimizer", "window", "random", "gate", "auto", "frame_index")
_HOW = ("engine", "micro_batch", "grad_checkpointing")  # how a step is computed, not what


def setting_of(objective: Objective, preprocess: Preprocess | None) -> dict[str, Any]:
    """What a stream depends on beside its configuration and its tensors, in plain values.

    Args:
        objective: what is learned from. Of those that are neither `MAEBranch` nor `SplitLoss`, the kind alone is known.
        preprocess: of the frames; two functions of the user's own cannot be told apart.
    """
    setting: dict[str, Any] = {"objective": type(objective).__name__}
    if isinstance(objective, MAEBranch):
        setting |= {"masking": objective.masking, "patch_size": objective.patch_size}
        setting |= dict(zip(SETTINGS, objective.settings(), strict=True))
    elif isinstance(objective, SplitLoss):
        setting["settings"] = objective.settings()
    if type(preprocess) is Normalize:
        numbers = {name: tuple(map(float, getattr(preprocess, name))) for name in ("mean", "std")}
        return {**setting, "preprocess": "Normalize", **numbers, "size": preprocess.size and tuple(preprocess.size)}
    return {**setting, "preprocess": "none" if preprocess is None else "a function"}


def check_saved(state: Any, config: StreamConfig, setting: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a state of another model, configuration, objective or preprocessing.

    Args:
        state: what `StreamAdapter.state_dict` is said to have returned; without a "setting", one of an earlier version,
            which is not compared.
        config: this adapter's.
        setting: this adapter's, from `setting_of`.
        tensors: name -> what this adapter changes.

    Raises:
        CheckpointError: it does not fit; the message says in what.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"the state is a {type(state).__name__}; expected what state_dict() returned")
    if missing := [part for part in PARTS if part not in state]:
        raise CheckpointError(f"this is no state of a StreamAdapter: {', '.join(missing)} missing")
    own = asdict(config)
    other = {k: v for k, v in state["config"].items() if k not in _HOW and own.get(k) != v}
    if "norm_momentum" in other and _share(state["config"]) == config.frame_share:  # its default, or of no account
        del other["norm_momentum"]
    if other:
        raise CheckpointError(
            f"the state was saved with {other}, this adapter has { {k: own.get(k) for k in other} }: make the adapter "
            "with the same StreamConfig"
        )
    _check_setting(state.get("setting", setting), setting)
    check_state(tensors, state["weights"], "this adapter's model")


def _share(config: Mapping[str, Any]) -> float:
    """`StreamConfig.frame_share` of a saved configuration."""
    return StreamConfig(norm_stats=config["norm_stats"], norm_momentum=config["norm_momentum"]).frame_share


def _check_setting(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    other = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    if not other:
        return
    theirs, ours = ({name: values[name] for name in other if name in values} for values in (saved, own))
    frames = {"preprocess", "mean", "std", "size"}
    advice = []
    if set(other) - frames:
        advice.append("adapt by the same objective with the same settings (those of a branch change by using(...))")
    if set(other) & frames:
        advice.append("pass the same preprocess")
    raise CheckpointError(f"the state was saved with {theirs}, this adapter has {ours}: {' and '.join(advice)}")


def check_window(saved: Any, config: StreamConfig, preprocess: Preprocess | None, dtype: torch.dtype) -> None:
    """Refuse a window that this adapter cannot draw from.

    Args:
        saved: the state's "window".
        config: this adapter's.
        preprocess: this adapter's; frames that are held as bytes need its `Normalize`.
        dtype: of the model's images.

    Raises:
        CheckpointError: frames of another shape, dtype or number; the message says in what and what to do.
    """
    frames = saved.get("frames") if isinstance(saved, Mapping) else None
    seen = saved.get("seen") if isinstance(saved, Mapping) else None
    if seen == 0 and frames is None:
        return
    if not isinstance(frames, Tensor) or not isinstance(seen, int) or len(frames) != min(seen, config.capacity):
        raise CheckpointError("the state's window is damaged: it does not hold the frames that it counts")
    pixels = frames.dtype == torch.uint8
    if pixels and scaling(preprocess, dtype) is None:
        raise CheckpointError(
            "the state's window holds uint8 frames, which this adapter cannot normalise: pass the preprocess that the "
            "state was saved with, a Normalize(mean, std) without a function around it"
        )
    if not pixels and frames.dtype != dtype:
        raise CheckpointError(
            f"the state's window holds {frames.dtype} frames, this adapter's model takes {dtype}: convert the model to "
            "the dtype that the state was saved with"
        )
    layout, channels = ("[n, H, W, 3]", -1) if pixels else ("[n, 3, H, W]", 1)
    if frames.ndim != 4 or frames.shape[channels] != 3:
        raise CheckpointError(f"the state's window holds frames {tuple(frames.shape)}; expected {layout}")


def loaded_optimizer(
    saved: Mapping[str, Any], random: Tensor, make: Callable[[], torch.optim.Optimizer], device: torch.device
) -> torch.optim.Optimizer:
    """A new optimizer in the saved state: what does not fit has not changed anything.

    Args:
        saved: the state's "optimizer".
        random: the state's "random", which is tried out on a generator of `device`.
        make: makes a fresh optimizer.
        device: where the stream runs.

    Raises:
        CheckpointError: another optimizer, or a random state of another kind of device.
    """
    try:
        torch.Generator(device).set_state(random.cpu())
        optimizer = make()
        kinds = [type(optimizer).__name__] + ["AdamW"] * isinstance(optimizer, FusedAdamW)
        if saved["kind"] not in kinds:
            raise ValueError(f"the optimizer was {saved['kind']}, here it is {kinds[0]}")
        optimizer.load_state_dict(copied(saved["state"]))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the state's optimizer or random state does not fit this adapter ({error}): go on with the same "
            "optimizer, on the same kind of device"
        ) from error
    return optimizer
