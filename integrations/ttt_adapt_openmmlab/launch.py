"""Run MMEngine's runner on a config, in one process or in several."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import LoggerHook
from mmengine.runner import CheckpointLoader, Runner
from torch import nn

from ttt_adapt.errors import CheckpointError, ConfigError, MissingPackageError
from ttt_adapt_openmmlab.joint import find_branch, plain_model
from ttt_adapt_openmmlab.run_config import check_exists, error_text
from ttt_adapt_openmmlab.stream_branch import branch_part

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")


def run(cfg: Config, what: str, launcher: str, local_rank: int | None) -> None:
    """`Runner.train()` or `Runner.test()` on a config.

    Raises:
        ConfigError, CheckpointError, FileNotFoundError: something is wrong with the config or the checkpoint.
    """
    try:
        _prepare_processes(cfg, launcher, local_rank)
        if cfg.get("load_from") is not None:
            check_exists(cfg.load_from)
        elif what == "test":
            raise ConfigError(
                "there are no weights to test: name them (ttt-adapt mm test CONFIG CHECKPOINT), or set load_from"
            )
        with _readable_errors():
            _run(cfg, what)
    finally:
        _end_processes()


def _run(cfg: Config, what: str) -> None:
    """Build the runner and run it. The runner is freed when this returns."""
    runner = Runner.from_cfg(cfg)
    _let_one_process_write(runner)
    if what == "test":
        _check_weights(runner.model, cfg.load_from)
        _build_metrics(runner)
    getattr(runner, what)()


def _build_metrics(runner: Runner) -> None:
    """Build the test loop in every process before one of them begins to predict.

    The first process makes the folder that a metric writes predictions to (`output_dir` of mmsegmentation's
    `IoUMetric`) when it builds that metric. Another process that is ahead of it would find no folder.
    """
    _ = runner.test_loop  # MMEngine builds the loop and its metrics when it is first asked for
    barrier()


def _end_processes() -> None:
    """Leave the process group and end its threads before Python ends.

    A thread of gloo that frees its last tensor while Python ends aborts the process (pytorch/pytorch 179291). The group
    ends its threads when it is freed. The runner's wrapped model holds the group and is part of a circle of references,
    which only the garbage collector frees.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()


def _let_one_process_write(runner: Runner) -> None:
    """Let only the first process write the file of the scores; MMEngine's LoggerHook writes it in every process."""
    for hook in runner.hooks:
        if isinstance(hook, LoggerHook) and not is_main_process():
            vars(hook)["after_test_epoch"] = lambda *_args, **_metrics: None


def _check_weights(model: nn.Module, file: str) -> None:
    """Refuse a checkpoint of another model or branch. MMEngine would load the part of it that fits.

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
            f"{file} holds {fitting} of the {len(own)} weights of this {type(plain).__name__}: it belongs to "
            "another config"
        )
    if branch is not None and trained:
        try:
            branch.load_state_dict(trained)
        except CheckpointError as error:
            raise CheckpointError(
                f"{file} holds a branch (mae_branch) of another config: {error}. Set model.branch as in the training"
            ) from error


def _prepare_processes(cfg: Config, launcher: str, local_rank: int | None) -> None:
    """Set what the launcher needs. Without CUDA, start the process group here: MMEngine's own start needs CUDA."""
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
def _readable_errors() -> Iterator[None]:
    """Turn errors about a wrong config or checkpoint into errors that the command line prints in one line."""
    try:
        yield
    except KeyError as error:
        if "registry" not in error_text(error):
            raise
        raise ConfigError(error_text(error)) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ConfigError(f"the config passes an argument that is not known: {error}") from error
    except FileNotFoundError as error:
        if error.filename is None:  # MMEngine's own, about weights: its text names the file
            raise
        raise FileNotFoundError(
            f"{error.filename} does not exist: if it belongs to a data set, set data_root of the dataset in "
            "train_dataloader and test_dataloader; ttt-adapt mm check KIND PATH tells what a folder should hold"
        ) from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error}") from error
    except RuntimeError as error:
        if "panopticapi is not installed" in str(error):
            raise MissingPackageError(
                "panopticapi is not installed, and it is not on the package index: StreamPQMetric computes what "
                "CocoPanopticMetric needs it for"
            ) from error
        if "No state_dict found" not in str(error) and "PytorchStreamReader" not in str(error):
            raise
        raise CheckpointError(f"the checkpoint cannot be read: {error}") from error
