"""The config of a command: read from a file, and changed by the command's options."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner, find_latest_checkpoint

from ttt_adapt import StreamConfig
from ttt_adapt.errors import ConfigError, nearest
from ttt_adapt_openmmlab.arms import arm_name, contradicting_fields, stream_config

_READ_BY_RUNNER = (  # entries that the runner reads, other than its arguments
    "activation_checkpointing",
    "compile",
    "custom_imports",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "sync_bn",
)


def read_config(path: Path, work_dir: Path | None, options: list[str]) -> Config:
    """Read a config file, import its `custom_imports`, and merge `KEY=VALUE` options into it.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: the file, or an option, cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist")
    try:
        cfg = Config.fromfile(path)
    except (ImportError, SyntaxError, NameError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"config {path} cannot be read: {type(error).__name__}: {error}") from error
    changes = parse_options(options)
    known = {*cfg.keys(), *inspect.signature(Runner).parameters, *_READ_BY_RUNNER}
    for name in changes:
        entry = name.partition(".")[0]
        if entry not in known:
            raise ConfigError(f"--cfg-options {name}: the config has no entry {entry!r}; {nearest(entry, known)}")
    try:
        cfg.merge_from_dict(changes)
    except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
        raise ConfigError(f"--cfg-options {' '.join(options)} does not fit {path}: {error_text(error)}") from error
    if work_dir is not None:
        cfg.work_dir = str(work_dir)
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs") / path.stem)
    return cfg


def parse_options(options: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts as MMEngine parses them: numbers, booleans, None, lists `1,2` or `[1,2]`, nested, tuples."""
    for option in options:
        if not option.partition("=")[0].strip() or "=" not in option:
            raise ConfigError(f"--cfg-options got {option!r}; expected KEY=VALUE, such as model.branch.mask_ratio=0.75")
    if not options:
        return {}
    parser = argparse.ArgumentParser()
    parser.add_argument("options", nargs="+", action=DictAction)
    try:
        return dict(parser.parse_args(["--", *options]).options)
    except AssertionError as error:
        raise ConfigError(f"--cfg-options cannot be read: {error}") from error


def set_amp(cfg: Config) -> None:
    """Mixed precision by MMEngine's AmpOptimWrapper.

    Raises:
        ConfigError: no CUDA, or an optimizer wrapper of another kind.
    """
    if not torch.cuda.is_available():
        raise ConfigError("--amp needs a CUDA device, and there is none: leave it out")
    kind = cfg.optim_wrapper.get("type", "OptimWrapper")
    if kind not in ("OptimWrapper", "AmpOptimWrapper"):
        raise ConfigError(f"--amp takes an optim_wrapper of type OptimWrapper; the config has {kind!r}")
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def set_resume(cfg: Config, resume: str) -> None:
    """Continue from a file or URL, or from the latest checkpoint of the work dir ("auto").

    Where "auto" finds none, the run begins as the config says, with its `load_from`.

    Raises:
        FileNotFoundError: no such file.
    """
    found = find_latest_checkpoint(cfg.work_dir) if resume == "auto" else resume
    cfg.resume = found is not None
    if found is not None:
        set_checkpoint(cfg, found)


def set_checkpoint(cfg: Config, checkpoint: str) -> None:
    """Load this file or URL.

    Raises:
        FileNotFoundError: no such file.
    """
    check_exists(checkpoint)
    cfg.load_from = checkpoint


def check_exists(checkpoint: str) -> None:
    """Refuse a file that does not exist; a URL is not looked up.

    Raises:
        FileNotFoundError: no such file.
    """
    if "://" not in checkpoint and not Path(checkpoint).expanduser().is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint} does not exist")


def set_arm(cfg: Config, arm: str) -> None:
    """Set the arm of the config's OnlineTTTHook, or add the hook; drop fields that would make another arm of it."""
    arm = arm_name(arm)
    hooks = list(cfg.get("custom_hooks") or [])
    ours = [hook for hook in hooks if _name_of(hook) == "OnlineTTTHook"]
    if not ours:
        ours = [{"type": "OnlineTTTHook"}]
        hooks += ours
    known = {field.name for field in dataclasses.fields(StreamConfig)}
    for hook in ours:
        hook["arm"] = arm
        given = {name: hook[name] for name in known & hook.keys() if hook[name] is not None or name == "grad_clip"}
        for name in contradicting_fields(arm, stream_config(arm, given)):
            hook.pop(name, None)
    cfg.custom_hooks = hooks


def set_show_dir(cfg: Config, folder: Path) -> None:
    """Let the visualization hook of mmseg or mmdet write painted predictions into a folder.

    Raises:
        ConfigError: the config has no such hook.
    """
    hook = cfg.get("default_hooks", {}).get("visualization")
    if hook is None:
        raise ConfigError(
            "--show-dir needs default_hooks.visualization, such as dict(type='SegVisualizationHook') or "
            "dict(type='DetVisualizationHook'), and a visualizer"
        )
    hook["draw"] = True
    if "Det" in _name_of(hook):
        hook["test_out_dir"] = str(folder.absolute())
    else:
        hook.setdefault("interval", 1)
        cfg.visualizer["save_dir"] = str(folder)


def error_text(error: BaseException) -> str:
    """The text of an error without the quotes that a `KeyError` adds."""
    return str(error.args[0]) if error.args else type(error).__name__


def _name_of(hook: Any) -> str:
    kind = hook.get("type") if isinstance(hook, dict) else type(hook)
    return getattr(kind, "__name__", str(kind)).split(".")[-1]
