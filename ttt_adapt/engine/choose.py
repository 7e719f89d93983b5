"""Which engine runs a stream, and why; refused before anything changes where it cannot."""

from __future__ import annotations

import os
import shutil

import torch

from ttt_adapt.config import StreamConfig
from ttt_adapt.engine.compiled import CompileEngine
from ttt_adapt.engine.eager import EagerEngine
from ttt_adapt.engine.gradient_step import GradientStep
from ttt_adapt.engine.graphs import CudaRecorder, GraphEngine
from ttt_adapt.engine.precision import check_precision
from ttt_adapt.errors import ConfigError
from ttt_adapt.objectives.base import Objective, SplitLoss, StatefulObjective
from ttt_adapt.objectives.forward_only import ForwardOnly
from ttt_adapt.stream.optimizer import FusedAdamW


def choose_engine(step: GradientStep, optimizer: torch.optim.Optimizer) -> EagerEngine:
    """The engine that `engine` of the configuration names, or for "auto" the one that suits.

    Args:
        step: what is differentiated, with the configuration.
        optimizer: what takes the steps.

    Raises:
        ConfigError: the engine or the precision is not available here; the message says why.
    """
    config, objective, device = step.config, step.objective, step.device
    check_precision(config.precision, device)
    if config.engine == "compile":
        _refuse("compile", no_compile(config, objective, device))
        return CompileEngine(step)
    if config.engine == "cudagraph":
        _refuse("cudagraph", no_graphs(config, objective, type(optimizer), device))
        return GraphEngine(step, CudaRecorder(device))
    return EagerEngine(step) if config.engine == "eager" else EagerEngine(step, why_eager(device))


def why_eager(device: torch.device) -> str:
    """Why "auto" is the eager engine on this device."""
    if device.type == "cuda":
        return 'it runs every model; engine="cudagraph" saves the time that launching many small kernels takes'
    return f"on the {device.type.upper()} compiling takes minutes: ask for it on long streams"


def describe_engines(config: StreamConfig, objective: Objective) -> dict[str, str]:
    """Name -> for people: what "auto" is with the default optimizer and why, and whether the others can run."""
    device = next(iter(objective.encoder_parameters().values()), next(objective.model.parameters())).device
    hindrances = {
        "compile": no_compile(config, objective, device),
        "cudagraph": no_graphs(config, objective, FusedAdamW, device),
    }
    others = {name: hindrance or "available" for name, hindrance in hindrances.items()}
    return {"auto": f"eager ({why_eager(device)})", **others}


def no_compile(config: StreamConfig, objective: Objective, device: torch.device) -> str:
    """Why `torch.compile` cannot run this stream; "" if it can."""
    if not isinstance(objective, SplitLoss | ForwardOnly):
        return (
            f"{type(objective).__name__} does not separate its random draws from its loss, as objectives.SplitLoss "
            "does (draw, loss_of, weight, settings)"
        )
    if config.grad_checkpointing:
        return "it cannot be combined with grad_checkpointing: set micro_batch instead"
    if device.type == "cpu" and not _has_cpp_compiler():
        return "torch.compile needs a C++ compiler on the CPU, and none was found: install g++, or set CXX"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "torch.compile needs Triton on CUDA devices, and it does not work here"
    return ""


def no_graphs(
    config: StreamConfig, objective: Objective, optimizer: type[torch.optim.Optimizer], device: torch.device
) -> str:
    """Why CUDA graphs cannot run this stream; "" if they can."""
    if device.type != "cuda":
        return f"the model is on {device}: CUDA graphs need a CUDA device"
    return no_recording(config, objective, optimizer)


def no_recording(config: StreamConfig, objective: Objective, optimizer: type[torch.optim.Optimizer]) -> str:
    """Why a step with these settings cannot be recorded, on any device; "" if it can."""
    if not issubclass(optimizer, FusedAdamW):
        return f"the optimizer is a {optimizer.__name__} of your own; only the default one can be recorded"
    if config.window == "auto":
        return 'window="auto" reads the gradient on the host after every frame'
    if config.drop_path:
        return "drop_path sets PyTorch's global random source at every step, so that the seed decides what is dropped"
    if isinstance(objective, StatefulObjective) and objective.memory():
        return f"{type(objective).__name__} changes its memory after each step, and a recording skips no step"
    return ""


def _refuse(engine: str, hindrance: str) -> None:
    if hindrance:
        raise ConfigError(f'engine is {engine!r}: {hindrance}. engine="eager" works everywhere')


def _has_cpp_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "c++", "cl"))
