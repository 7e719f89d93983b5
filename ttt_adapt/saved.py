"""A stream's saved state: whether it belongs to an adapter, and putting it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.branch import check_state
from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import CheckpointError
from ttt_adapt.optim import FusedAdamW
from ttt_adapt.snapshot import copied

PARTS = ("config", "weights", "optimizer", "window", "random", "gate", "auto", "frame_index")
_HOW = ("engine", "micro_batch")  # how a step is computed, not what


def check_saved(state: Any, config: StreamConfig, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a state of another model or configuration.

    Args:
        state: what `StreamAdapter.state_dict` is said to have returned.
        config: this adapter's.
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
    if other:
        raise CheckpointError(
            f"the state was saved with {other}, this adapter has { {k: own.get(k) for k in other} }: make the adapter "
            "with the same StreamConfig"
        )
    check_state(tensors, state["weights"], "this adapter's model")


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
