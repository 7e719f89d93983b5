"""The arms of `OnlineTTTHook`: which of the library's arms it runs, and what it says about their settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ttt_adapt import StreamConfig
from ttt_adapt.errors import ConfigError, nearest
from ttt_adapt.integration import ARMS, PRESETS, contradictions, find_arm

HOOK_ARMS = tuple(name for name in ARMS if name in (*PRESETS, "fixed", "calibrated", "offline"))
"""Names of the arms that the hook runs."""
_FORWARD_ONLY = ("fixed", "calibrated")
_HOOK_ARGUMENTS = ("arm", "branch", "calibration", "stills", "log_interval", "visualize_interval", "offline_steps")


def arm_name(name: str) -> str:
    """The name of an arm of the hook as the library spells it: "no_memory" -> "no-memory".

    Raises:
        ConfigError: the hook runs no such arm.
    """
    try:
        known = find_arm(name).name
    except ConfigError:
        known = ""
    if known not in HOOK_ARMS:
        raise ConfigError(f"arm is {name!r}; expected one of {', '.join(map(repr, HOOK_ARMS))}")
    return known


def stream_config(arm: str, fields: Mapping[str, Any]) -> StreamConfig:
    """The settings of an arm; `fields` of StreamConfig win over the arm's own.

    Raises:
        ConfigError: an unknown arm or field; the message names the nearest.
    """
    name = arm_name(arm)
    known = [field.name for field in dataclasses.fields(StreamConfig)]
    for field in fields:
        if field not in known:
            raise ConfigError(
                f"OnlineTTTHook has no argument {field!r}; expected a field of StreamConfig or one of "
                f"{', '.join(_HOOK_ARGUMENTS)}; {nearest(field, [*known, *_HOOK_ARGUMENTS])}"
            )
    return StreamConfig.for_arm("online" if name in _FORWARD_ONLY else name, **fields)  # these have fields checked only


def contradicting_fields(arm: str, config: StreamConfig) -> dict[str, str]:
    """The fields of `config` that turn the arm into another one, each with what the arm means by it.

    The hook's arm "offline" takes any number of iterations, any gate and any pull below 1, so it is compared like
    "online".
    """
    return contradictions(find_arm("online" if arm == "offline" else arm), config)


def contradiction(arm: str, config: StreamConfig) -> str:
    """A warning where explicit settings turn the arm into another one; "" elsewhere."""
    wrong = contradicting_fields(arm, config)
    given = ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
    return f"arm {arm!r} means {', '.join(wrong.values())}, and the hook was given {given}" if wrong else ""
