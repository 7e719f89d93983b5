"""The paper's arms, as settings of a stream."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ttt_adapt import ConfigError, StreamConfig

ARMS = ("fixed", "no_memory", "implicit_only", "explicit_only", "online", "paper", "offline")
MEMORY: dict[str, dict[str, Any]] = {  # what makes each arm what it is
    "fixed": {},
    "no_memory": {"window": 1, "carry_weights": False},
    "implicit_only": {"window": 1, "carry_weights": True},
    "explicit_only": {"carry_weights": False},
    "online": {"carry_weights": True},
    "paper": {"carry_weights": True},
    "offline": {"carry_weights": True},
}
_OWN = ("arm", "branch", "log_interval", "visualize_interval", "offline_epochs")


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
        size = fields.get("batch_size", StreamConfig.batch_size)
        return StreamConfig.online(**{"source_pull": 0.0, "window": size, **fields})
    make: Callable[..., StreamConfig] = getattr(StreamConfig, "online" if arm == "fixed" else arm)
    return make(**fields)


def contradiction(arm: str, config: StreamConfig) -> str:
    """A warning where explicit settings turn an arm into another; "" elsewhere."""
    meant = MEMORY[arm]
    changed = [f"{name}={getattr(config, name)}" for name, value in meant.items() if getattr(config, name) != value]
    expected = ", ".join(f"{name}={value}" for name, value in meant.items())
    return f"arm {arm!r} means {expected}, and the hook was given {', '.join(changed)}" if changed else ""


def nearest(name: Any, choices: Iterable[str]) -> str:
    """A hint for an unknown name."""
    close = difflib.get_close_matches(str(name), list(choices), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
