"""What the commands do: a config, changed by options, and MMEngine's runner on it."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import inspect
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import is_main_process
from mmengine.hooks import LoggerHook
from mmengine.runner import CheckpointLoader, Runner, find_latest_checkpoint
from torch import nn

from ttt_adapt import StreamConfig
from ttt_adapt.errors import CheckpointError, ConfigError, MissingPackageError
from ttt_adapt_openmmlab.arms import contradictions, nearest, stream_config
from ttt_adapt_openmmlab.batches import branch_part
from ttt_adapt_openmmlab.joint import find_branch, plain_model

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")
_READ_BY_RUNNER = (  # beside its arguments
    "activation_checkpointing",
    "compile",
    "custom_imports",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "sync_bn",
)


def read_config(path: Path, work_dir: Path | None, options: list[str]) -> Config:
    """The config of a file with `KEY=VALUE` options merged in; `custom_imports` are imported.

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
            raise ConfigError(f"--cfg-options {name}: the config has no entry {entry!r}{nearest(entry, known)}")
    try:
        cfg.merge_from_dict(changes)
    except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
        raise ConfigError(f"--cfg-options {' '.join(options)} does not fit {path}: {_text(error)}") from error
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
    """Go on from a file or URL, or from the latest checkpoint of the work dir ("auto").

    Where "auto" finds none, the run begins as the config says, `load_from` included.

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
    _check_exists(checkpoint)
    cfg.load_from = checkpoint


def _check_exists(checkpoint: str) -> None:
    if "://" not in checkpoint and not Path(checkpoint).expanduser().is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint} does not exist")


def set_arm(cfg: Config, arm: str) -> None:
    """Run this arm: sets `arm` of the config's OnlineTTTHook, or adds one; drops its fields that would contradict."""
    stream_config(arm, {})
    hooks = list(cfg.get("custom_hooks") or [])
    ours = [hook for hook in hooks if _name_of(hook) == "OnlineTTTHook"]
    if not ours:
        ours = [{"type": "OnlineTTTHook"}]
        hooks += ours
    known = {field.name for field in dataclasses.fields(StreamConfig)}
    for hook in ours:
        hook["arm"] = arm
        given = {name: hook[name] for name in known & hook.keys() if hook[name] is not None or name == "grad_clip"}
        for name in contradictions(arm, stream_config(arm, given)):
            hook.pop(name, None)
    cfg.custom_hooks = hooks


def set_show_dir(cfg: Config, folder: Path) -> None:
    """Paint predictions into a folder, by the visualization hook of mmseg or mmdet.

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


def run(cfg: Config, what: str, launcher: str, local_rank: int | None) -> None:
    """`Runner.train()` or `Runner.test()` on a config.

    Raises:
        ConfigError, CheckpointError, FileNotFoundError: told in one line, for what is wrong in config or checkpoint.
    """
    try:
        _prepare_processes(cfg, launcher, local_rank)
        if cfg.get("load_from") is not None:
            _check_exists(cfg.load_from)
        elif what == "test":
            raise ConfigError(
                "there are no weights to test: name them (ttt-adapt mm test CONFIG CHECKPOINT), or set load_from"
            )
        with _told_in_a_line():
            _run(cfg, what)
    finally:
        _end_processes()


def _run(cfg: Config, what: str) -> None:
    """Build the runner and run it; nothing of it is left when this returns."""
    runner = Runner.from_cfg(cfg)
    _let_one_process_write(runner)
    if what == "test":
        _check_weights(runner.model, cfg.load_from)
    getattr(runner, what)()


def _end_processes() -> None:
    """Leave the process group and join its threads while Python is alive.

    A thread of gloo that lets go of its last tensor while the interpreter ends aborts the process (pytorch/pytorch
    179291). The group joins its threads when it is freed, and the wrapped model of the runner, in a circle of
    references, would keep it until then.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()


def _let_one_process_write(runner: Runner) -> None:
    """Keep all processes but the first from the file of the scores: MMEngine's LoggerHook writes it in each of them."""
    for hook in runner.hooks:
        if isinstance(hook, LoggerHook) and not is_main_process():
            vars(hook)["after_test_epoch"] = lambda *_args, **_metrics: None


def _check_weights(model: nn.Module, file: str) -> None:
    """Refuse a checkpoint of another model or branch, which MMEngine would load as far as it fits.

    Raises:
        CheckpointError: less than half of the model's weights are in the file, or it holds another branch.
    """
    loaded = CheckpointLoader.load_checkpoint(file, map_location="cpu")
    state = {key.removeprefix("module."): value for key, value in loaded.get("state_dict", loaded).items()}
    plain, branch, trained = plain_model(model), find_branch(model), branch_part(state)
    own = plain.state_dict()
    fitting = sum(key in state and getattr(state[key], "shape", None) == value.shape for key, value in own.items())
    if 2 * fitting < len(own):
        raise CheckpointError(
            f"{file} holds {fitting} of the {len(own)} weights of this {type(plain).__name__}: it is of another config"
        )
    if branch is not None and trained:
        try:
            branch.load_state_dict(trained)
        except CheckpointError as error:
            raise CheckpointError(
                f"{file} holds a branch (mae_branch) of another config: {error}. Set model.branch as in the training"
            ) from error


def _prepare_processes(cfg: Config, launcher: str, local_rank: int | None) -> None:
    """Set what the launcher needs; without CUDA, start the process group here: MMEngine's own start asks for CUDA."""
    if launcher not in LAUNCHERS:
        raise ConfigError(f"--launcher is {launcher!r}; expected one of {', '.join(LAUNCHERS)}")
    cfg.launcher = launcher
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if launcher == "none":
        return
    if launcher == "pytorch" and not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        raise ConfigError(
            "--launcher pytorch needs RANK, WORLD_SIZE and LOCAL_RANK: start it as torchrun --nproc-per-node N "
            "-m ttt_adapt mm ..."
        )
    if torch.cuda.is_available():
        return
    if launcher != "pytorch":
        raise ConfigError(f"--launcher {launcher} needs CUDA devices; without them use torchrun and --launcher pytorch")
    torch.distributed.init_process_group("gloo")
    if cfg.get("model_wrapper_cfg") is None:  # MMEngine's default names a CUDA device
        unused = cfg.get("find_unused_parameters", False)
        cfg.model_wrapper_cfg = {
            "type": "MMDistributedDataParallel",
            "device_ids": None,
            "broadcast_buffers": False,
            "find_unused_parameters": unused,
        }


@contextmanager
def _told_in_a_line() -> Iterator[None]:
    """Turn what MMEngine raises over a wrong config or checkpoint into errors that are told in a line."""
    try:
        yield
    except KeyError as error:
        if "registry" not in _text(error):
            raise
        raise ConfigError(_text(error)) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ConfigError(f"the config passes an argument that is not known: {error}") from error
    except FileNotFoundError as error:
        if error.filename is None:  # MMEngine's own, over weights: its text names the file
            raise
        raise FileNotFoundError(
            f"{error.filename} does not exist: if it belongs to a data set, set data_root of the dataset in "
            "train_dataloader and test_dataloader; ttt-adapt mm check KIND PATH tells what a folder should hold"
        ) from error
    except ImportError as error:
        if "panopticapi" not in str(error):
            raise
        raise MissingPackageError(
            "panopticapi is not installed: it is not on the package index, and LoadPanopticSegments and StreamPQMetric "
            "do what LoadPanopticAnnotations and CocoPanopticMetric need it for"
        ) from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error}") from error
    except RuntimeError as error:
        if "No state_dict found" not in str(error) and "PytorchStreamReader" not in str(error):
            raise
        raise CheckpointError(f"the checkpoint cannot be read: {error}") from error


def _text(error: BaseException) -> str:
    return str(error.args[0]) if error.args else type(error).__name__


def _name_of(hook: Any) -> str:
    kind = hook.get("type") if isinstance(hook, dict) else type(hook)
    return getattr(kind, "__name__", str(kind)).split(".")[-1]
