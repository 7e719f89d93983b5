"""Options that several commands share, and what their text means."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttt_adapt.arms import PRESETS, find_arm, normalized
from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(help="Seed of masks and draws.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over what is there.")]
Preset = Annotated[str, typer.Option(help=f"{', '.join(PRESETS[:-1])} or {PRESETS[-1]}.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a field of StreamConfig; repeatable.")
]
Size = Annotated[str | None, typer.Option(metavar="HxW", help="Resize frames for the model, such as 144x192.")]
TestBranch = Annotated[
    list[str] | None,
    typer.Option(
        "--branch",
        metavar="NAME=VALUE",
        help="mask_ratio, loss_on or norm_pix_loss at test time.",
    ),
]
BranchSettings = Annotated[
    list[str] | None,
    typer.Option("--branch", metavar="NAME=VALUE", help="A keyword of MAEBranch.attach, such as mask_ratio=0.75."),
]


# ---- text to values


LONGEST_SIDE = 16384
"""Pixels; a longer side is a slip of the finger, and would not fit into memory."""


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
    if max(numbers[0], numbers[1]) > LONGEST_SIDE:
        raise ConfigError(f"size is {text!r}; expected HEIGHTxWIDTH in pixels, each at most {LONGEST_SIDE}")
    return numbers[0], numbers[1]


def parse_tries(name: str, text: str) -> int | None:
    """ "10" -> 10, "forever" -> None.

    Raises:
        ConfigError: anything else.
    """
    if text == "forever":
        return None
    number = whole_number(text)
    if number is None:
        raise ConfigError(f"{name} is {text!r}; expected a whole number, or forever")
    return number


def whole_number(text: str) -> int | None:
    """The number that up to 18 plain digits are; None for anything else, such as "-1", "1_000" or "²"."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def parse_names(text: str) -> tuple[str, ...]:
    """ "dusk, noon" -> ("dusk", "noon")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_classes(text: str) -> tuple[str, ...]:
    """Names of classes, as `parse_names` reads them.

    Raises:
        ConfigError: it is the name of a file.
    """
    if Path(text).is_file():
        raise ConfigError(f"classes is {text!r}, a file; expected the names, such as sky,road,car")
    return parse_names(text)


def parse_seeds(text: str, *checkpoints: Sequence[Path]) -> list[int]:
    """ "0,1,2" -> [0, 1, 2].

    Args:
        text: what was given.
        checkpoints: lists of files, each with one file for all seeds or one per seed.

    Raises:
        ConfigError: a seed is no whole number, or the files are not as many as the seeds.
    """
    seeds = []
    for part in parse_names(text):
        number = whole_number(part)
        if number is None:
            raise ConfigError(f"seed {part!r} is no whole number; expected seeds such as 0,1,2")
        seeds.append(number)
    for files in checkpoints:
        if len(files) > 1 and len(files) != len(seeds):
            raise ConfigError(f"{len(files)} checkpoints for {len(seeds)} seeds; expected one, or one per seed")
    return seeds


def parse_settings(pairs: Sequence[str] | None, example: str = "lr=1e-4") -> dict[str, Any]:
    """["lr=1e-4", "crop_size=(96, 128)"] -> {"lr": 1e-4, "crop_size": (96, 128)}.

    A value that is no Python literal is text; "true" and "false" are True and False, as shells and configuration files
    write them.

    Args:
        pairs: NAME=VALUE each.
        example: what the error shows.

    Raises:
        ConfigError: an entry without "=".
    """
    settings = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"got {pair!r}; expected NAME=VALUE, such as {example}")
        try:
            settings[name.strip()] = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, SyntaxError):
            settings[name.strip()] = value
    return settings


def parse_arm_settings(pairs: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """["lr=1e-4", "tent.lr=1e-3"] -> ({"lr": 1e-4}, {"tent": {"lr": 1e-3}}): for all arms, and for one of them.

    Raises:
        ConfigError: an entry without "=", an unknown arm, or the seed, which has an option of its own.
    """
    common: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for name, value in parse_settings(pairs).items():
        arm, dot, field = name.rpartition(".")
        if field == "seed":
            raise ConfigError(f"--set {name}={value}: the seeds of an evaluation are --seeds 0,1,2")
        (own.setdefault(find_arm(arm).name, {}) if dot else common)[field] = value
    return common, own


def parse_forwards(real_time: bool, pairs: Sequence[str] | None, arms: Sequence[str]) -> dict[str, float] | None:
    """["online=4.1"] -> {"online": 4.1}, the costs of real-time scoring; None without real-time scoring.

    Raises:
        ConfigError: costs without real-time scoring, a cost that is no number, or the cost of an arm that does not run.
    """
    if not real_time:
        if pairs:
            raise ConfigError("--forwards sets the costs for --real-time; give both or neither")
        return None
    costs = {find_arm(arm).name: cost for arm, cost in parse_settings(pairs).items()}
    known = [find_arm(arm).name for arm in arms]
    for arm, cost in costs.items():
        if arm not in known:
            raise ConfigError(f"--forwards {arm}={cost}: {arm} is none of the arms {', '.join(known)}")
        if not isinstance(cost, int | float) or isinstance(cost, bool):
            raise ConfigError(f"--forwards {arm}={cost}: expected a number of forward passes, such as {arm}=4")
    return costs


# ---- what the library takes


def branch_keywords(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Keywords of `MAEBranch.attach` from NAME=VALUE.

    Raises:
        ConfigError: a name that `attach` does not know.
    """
    from ttt_adapt.objectives.mae import MAEBranch

    settings = parse_settings(pairs, "mask_ratio=0.75")
    known = [name for name in inspect.signature(MAEBranch.attach).parameters if name not in ("model", "encoder")]
    for name in settings:
        if name not in known:
            raise ConfigError(f"a branch has no setting {name!r}; {nearest(name, known)}")
    return settings


def preset_config(preset: str, **changes: Any) -> StreamConfig:
    """The preset of that name with some fields changed.

    Raises:
        ConfigError: unknown preset or field, or a value out of range.
    """
    if normalized(preset) not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; expected one of {', '.join(PRESETS)}")
    return StreamConfig.for_arm(preset, **changes)


def pick_device(name: str) -> torch.device:
    """The torch device `name`; "auto" is CUDA where there is one, and the CPU elsewhere.

    Raises:
        ConfigError: the device cannot be used here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = "there is no such kind" if "device type" in str(error) else str(error).partition(". ")[0]
        raise ConfigError(
            f"device is {name!r}, which cannot be used here ({reason}); expected auto, cpu or cuda"
        ) from error
    return device
