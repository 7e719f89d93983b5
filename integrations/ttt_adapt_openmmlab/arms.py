"""The paper's arms, as settings of a stream."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ttt_adapt import StreamConfig
from ttt_adapt.errors import ConfigError

ARMS = ("fixed", "no_memory", "implicit_only", "explicit_only", "online", "paper", "offline")
_ONE_FRAME = ("no_memory", "implicit_only")  # arms without a window, and
_FROM_SOURCE = ("no_memory", "explicit_only")  # arms whose weights do not go on
# what the paper's recipe leaves to the data and the machine
_FREE = ("crop_size", "seed", "precision", "engine", "micro_batch", "grad_checkpointing")
_OWN = ("arm", "branch", "log_interval", "visualize_interval", "offline_steps")


def stream_config(arm: str, fields: Mapping[str, Any]) -> StreamConfig:
    """The settings of an arm; `fields` of StreamConfig win over the arm's own.

    Raises:
        ConfigError: an unknown arm or field; the message names the nearest.
    """
    if arm not in ARMS:
        raise ConfigError(f"arm is {arm!r}; expected one of {', '.join(map(repr, ARMS))}{nearest(arm, ARMS)}")
    known = [field.name for field in dataclasses.fields(StreamConfig)]
    for name in fields:
        if name not in known:
            raise ConfigError(
                f"OnlineTTTHook has no argument {name!r}{nearest(name, [*known, *_OWN])}; expected a field of "
                f"StreamConfig or one of {', '.join(_OWN)}"
            )
    if arm == "offline":
        return StreamConfig.online(**{"source_pull": 0.0, **fields})
    make: Callable[..., StreamConfig] = getattr(StreamConfig, "online" if arm == "fixed" else arm)
    return make(**fields)


def contradictions(arm: str, config: StreamConfig) -> dict[str, str]:
    """The fields of `config` that turn the arm into another, and what the arm means by each."""
    if arm == "fixed":
        return {}
    if arm == "paper":
        meant = dataclasses.asdict(StreamConfig.paper())
        return {
            name: f"{name}={value!r}"
            for name, value in meant.items()
            if name not in _FREE and getattr(config, name) != value
        }
    wrong, carries = {}, arm not in _FROM_SOURCE
    if arm in _ONE_FRAME and config.window != 1:
        wrong["window"] = "window=1"
    if arm not in _ONE_FRAME and config.capacity < 2:
        wrong["window"] = "a window of at least 2"
    if config.carry_weights != carries:
        wrong["carry_weights"] = f"carry_weights={carries}"
    if carries and config.source_pull == 1:  # which goes all the way back before each frame
        wrong["source_pull"] = "source_pull below 1"
    return wrong


def contradiction(arm: str, config: StreamConfig) -> str:
    """A warning where explicit settings turn an arm into another; "" elsewhere."""
    wrong = contradictions(arm, config)
    given = ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
    return f"arm {arm!r} means {', '.join(wrong.values())}, and the hook was given {given}" if wrong else ""


def nearest(name: Any, choices: Iterable[str]) -> str:
    """A hint for an unknown name."""
    close = difflib.get_close_matches(str(name), list(choices), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
