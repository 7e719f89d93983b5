"""What would be adapted in a model, and what a step costs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ttt_adapt.calibration.describe import describe_calibration
from ttt_adapt.config import StreamConfig
from ttt_adapt.engine.choose import describe_engines
from ttt_adapt.engine.recompute import blocks_to_repeat
from ttt_adapt.errors import ConfigError, missing, nearest
from ttt_adapt.model.hooks import run_encoder
from ttt_adapt.model.norms import norm_layers
from ttt_adapt.objectives.mae import MAEBranch
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint


@dataclass(frozen=True)
class ModelInfo:
    """What `inspect_model` found.

    Attributes:
        rows: pairs of a name and a value, as text for people.
    """

    rows: list[tuple[str, str]]


def inspect_model(
    name: str,
    *,
    encoder: str = "auto",
    size: tuple[int, int] | None = None,
    attach: dict[str, Any] | None = None,
    config: StreamConfig | None = None,
    device: torch.device | str = "cpu",
) -> ModelInfo:
    """Look at a timm model or a checkpoint of `ttt-adapt train`.

    Args:
        name: timm model name, or the file of a checkpoint.
        encoder: dotted path where the encoder ends, for models without a trained branch; "auto" finds it.
        size: (H, W) of the frames to count FLOPs for; by default a checkpoint's training size, and for timm models
            the size at which `MAEBranch.attach` ran them.
        attach: keywords of `MAEBranch.attach`; of a trained branch, those of `MAEBranch.using`.
        config: whose step is counted.
        device: where the model would run, which engines depend on.

    Raises:
        ConfigError: unknown model, a setting that a trained branch cannot change, or a crop larger than the frame.
        EncoderError: unknown encoder.
        CheckpointError: a file that is no checkpoint; the message says what it is.
    """
    config, settings, calibration = config or StreamConfig(), attach or {}, []
    with ExitStack() as stack:
        if _is_file(name):
            checkpoint = load_checkpoint(name, device)
            size = size or checkpoint.spec.size
            model: nn.Module = checkpoint.model
            calibration = _calibration_rows(checkpoint, name)
            if checkpoint.branch is None:
                branch = MAEBranch.attach(model, encoder, **settings)
            else:
                _refuse_encoder(name, encoder, checkpoint.branch.info.path)
                branch = stack.enter_context(checkpoint.mae_branch.using(**settings))
        else:
            model = _timm_model(name).to(device)
            branch = MAEBranch.attach(model, encoder, **settings)
        return ModelInfo([*_describe(model, branch, size or branch.info.probe_size, config), *calibration])


def _is_file(name: str) -> bool:
    """Whether a name is that of a file, and not of a model in timm."""
    return name.endswith(".safetensors") or (os.path.lexists(name) and not _timm().is_model(name))


def _calibration_rows(checkpoint: Checkpoint, name: str) -> list[tuple[str, str]]:
    """The checkpoint's calibration, or how to make one."""
    if checkpoint.calibration is None:
        return [("calibration", f"none; ttt-adapt calibrate {shlex.quote(name)} STILLS makes one")]
    return describe_calibration(checkpoint.calibration, checkpoint.model)


def _refuse_encoder(name: str, encoder: str, own: str) -> None:
    if encoder not in ("auto", own):
        raise ConfigError(
            f"encoder is {encoder!r}, and the branch of {name} was trained on {own!r}: leave it out, or train "
            "another checkpoint"
        )


def _describe(
    model: nn.Module, branch: MAEBranch, size: tuple[int, int], config: StreamConfig
) -> list[tuple[str, str]]:
    info = branch.info
    adapted = sum(p.numel() for p in info.parameters.values())
    if config.grad_checkpointing:
        blocks_to_repeat(model, info.parameters.values())  # raises where there are none, as a stream would
    images = torch.zeros(1, 3, *size).to(next(model.parameters()))
    drawn = _drawn(images, config.crop_size)
    with torch.no_grad():
        predict = _flops(lambda: model(images))
        encode = _flops(lambda: run_encoder(model, info.module, images))
        masked = _flops(lambda: branch.loss(drawn))
    return [
        ("model", f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"),
        ("encoder", f"{info.path or '(the whole model)'}, {adapted / 1e6:.2f} M parameters adapted"),
        *_alternatives(info.alternatives),
        ("features", ", ".join(f"{m.channels} channels at stride {m.stride} ({m.layout})" for m in info.maps)),
        ("prefix tokens", str(info.tokens.prefix) if info.tokens is not None else "none"),
        ("masking", f"{branch.masking}, patches of {branch.patch_size} px, ratio {branch.mask_ratio}"),
        ("stem", f"{info.stem_path or 'none'}" + (f" {info.stem}" if info.stem is not None else "")),
        ("decoder", f"{type(branch.decoder).__name__}, {sum(p.numel() for p in branch.parameters()) / 1e6:.2f} M"),
        ("frame", f"{size[0]} x {size[1]} (H x W)"),
        ("predict", f"{predict / 1e9:.2f} GFLOPs, of which the encoder {encode / 1e9:.2f}"),
        ("masked pass", f"{masked / 1e9:.2f} GFLOPs with the decoder, on {drawn.shape[2]} x {drawn.shape[3]}"),
        *_step_rows(predict, masked, config, bool(norm_layers(model))),
        ("engine", "; ".join(f"{name}: {why}" for name, why in describe_engines(config, branch).items())),
    ]


SHOWN = 6
"""How many other modules are named at which the encoder might end."""


def _alternatives(paths: Sequence[str]) -> list[tuple[str, str]]:
    """A row with other modules at which the encoder might end; none where the caller named it."""
    more = ", ..." if len(paths) > SHOWN else ""
    return (
        [("or, with --encoder", ", ".join(path or "(the whole model)" for path in paths[:SHOWN]) + more)]
        if paths
        else []
    )


def _drawn(images: Tensor, crop: Any) -> Tensor:
    """One image of a gradient step: a crop, or the whole frame."""
    if crop is None:
        return images
    if any(side > full for side, full in zip(crop, images.shape[-2:], strict=True)):
        raise ConfigError(f"crop_size {crop} does not fit into a frame of {tuple(images.shape[-2:])} (H, W): lower it")
    return images[..., : crop[0], : crop[1]]


def _step_rows(predict: int, masked: int, config: StreamConfig, has_norms: bool) -> list[tuple[str, str]]:
    """What a frame costs, as docs/cost.md counts it; with `every`, the mean over frames.

    Args:
        predict: FLOPs of a prediction.
        masked: of the masked pass of one image.
        config: what a step consists of.
        has_norms: whether the model has running statistics.
    """
    batch, times = config.batch_size, config.iterations
    passes = 4 if config.grad_checkpointing else 3  # a backward pass costs two forward passes
    update = passes * masked * batch * times
    parts = [f"{times} iteration(s) on {batch}" if times else "no gradient step"]
    if config.grad_checkpointing and times:
        parts.append("at most another pass for activation checkpointing")
    if config.norm_stats == "ema" and has_norms and times:
        update += predict
        parts.append("a pass for running statistics")
    loss = masked * batch
    gates = {"surprise": (loss, loss, "a loss for the gate"), "calibrated": (predict, 0, "a prediction for the gate")}
    gate, kept_shut, what = gates.get(config.gate, (0, 0, "")) if times else (0, 0, "")
    if gate:
        parts.append(what)
    step, shut = ((adapting / config.every + predict) for adapting in (update + gate, kept_shut))
    often = "" if config.every == 1 else f" on one frame in {config.every}"
    cost = f"{step / predict:.1f} x the fixed model"
    return [
        ("step", f"{step / 1e9:.2f} GFLOPs: {', '.join(parts)}{often}, and predict"),
        ("cost", f"{cost}, {shut / predict:.1f} x while the gate is shut" if gate else cost),
    ]


def _flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise missing("timm", "timm") from error
    return timm


def _timm_model(name: str) -> nn.Module:
    timm = _timm()
    if not timm.is_model(name):
        hint = f"there is no file {Path(name)}, and " if "/" in name or "." in name else ""
        raise ConfigError(f"{hint}timm has no model {name!r}; {nearest(name, timm.list_models())}")
    made: nn.Module = timm.create_model(name, pretrained=False).eval()
    return made
