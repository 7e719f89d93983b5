"""Parsing and progress that several commands share."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import torch

from ttt_adapt.arms import PRESETS, normalized
from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import ConfigError, nearest
from ttt_adapt.objectives.mae import MAEBranch


def parse_size(text: str | None) -> tuple[int, int] | None:
    """ "144x192" -> (144, 192), height x width; None and "native" -> None.

    Raises:
        ConfigError: anything else.
    """
    if text is None or text == "native":
        return None
    numbers = [whole_number(part) for part in text.lower().split("x")]
    if len(numbers) != 2 or not numbers[0] or not numbers[1]:
        raise ConfigError(f"size is {text!r}; expected HEIGHTxWIDTH, such as 144x192")
    return numbers[0], numbers[1]


def whole_number(text: str) -> int | None:
    """The number that up to 18 plain digits are; None for anything else, such as "-1", "1_000" or "²"."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def parse_settings(pairs: list[str], example: str = "lr=1e-4") -> dict[str, Any]:
    """["lr=1e-4", "crop_size=(96, 128)"] -> {"lr": 1e-4, "crop_size": (96, 128)}; a value that is no literal is text.

    Of text, true and false are what they say, as shells and configuration files write them. `example` is what the
    error shows.

    Raises:
        ConfigError: an entry without "=".
    """
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"got {pair!r}; expected NAME=VALUE, such as {example}")
        try:
            settings[name.strip()] = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, SyntaxError):
            settings[name.strip()] = value
    return settings


def per_arm(pairs: list[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """["lr=1e-4", "tent.lr=1e-3"] -> (["lr=1e-4"], {"tent": {"lr": 1e-3}}).

    Raises:
        ConfigError: an entry without "=", or the seed, which has an option of its own.
    """
    common: list[str] = []
    own: dict[str, dict[str, Any]] = {}
    for pair, (name, value) in zip(pairs, (next(iter(parse_settings([p]).items())) for p in pairs), strict=True):
        arm, dot, field = name.rpartition(".")
        if field == "seed":
            raise ConfigError(f"--set {pair}: the seeds of an evaluation are --seeds 0,1,2")
        if dot:
            own.setdefault(arm, {})[field] = value
        else:
            common.append(pair)
    return common, own


def branch_settings(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE for `MAEBranch.attach`.

    Raises:
        ConfigError: a name that `attach` does not know.
    """
    settings = parse_settings(pairs, "mask_ratio=0.75")
    known = [name for name in inspect.signature(MAEBranch.attach).parameters if name not in ("model", "encoder")]
    for name in settings:
        if name not in known:
            raise ConfigError(f"a branch has no setting {name!r}; {nearest(name, known)}")
    return settings


def stream_config(preset: str, pairs: list[str], seed: int) -> StreamConfig:
    """The preset of that name with NAME=VALUE changes and a seed.

    Raises:
        ConfigError: unknown preset or field, or a value out of range.
    """
    if normalized(preset) not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; expected one of {', '.join(PRESETS)}")
    return StreamConfig.for_arm(preset, **{"seed": seed, **parse_settings(pairs)})


def pick_device(name: str) -> torch.device:
    """The torch device `name`; "auto" is CUDA where there is one, and the CPU elsewhere."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here ({error}); expected auto, cpu or cuda") from error
    return device
