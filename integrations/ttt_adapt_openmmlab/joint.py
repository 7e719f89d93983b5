"""JointMAE: joint training of a model of mmsegmentation or mmdetection and its reconstruction branch."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.model import BaseDataPreprocessor, BaseModel, is_model_wrapper
from mmengine.registry import MODELS
from torch import Tensor, nn

from ttt_adapt import Calibration, MAEBranch
from ttt_adapt.errors import ConfigError
from ttt_adapt_openmmlab.decoders import ATTACH, branch_for, branch_settings, encoder_name
from ttt_adapt_openmmlab.refused_models import refuse_model

INNER = "model."  # prefix of the plain model's parameters; the keys of a state_dict are without it
BRANCH = "mae_branch."
CALIBRATION = "mae_calibration"
"""The key of a calibration in a `state_dict`: its bytes, uint8 [N]."""


@MODELS.register_module()
class JointMAE(BaseModel):
    """A model with a reconstruction branch on its backbone: `loss` gains `loss_mae`, all else is the model's own.

    Training minimises `main loss + mean squared error of the reconstruction`, weights 1:1. The branch sees the images
    that the model's data preprocessor makes (padding included), with new masks each time. Its pass comes after the main
    one, so the main losses are bitwise those of the plain model.

    Parameters and `state_dict` keys of the model keep their names, so plain checkpoints load, and a checkpoint saved
    here loads into the plain model, which reports the keys of `mae_branch.` as unexpected. A decoder that copies the
    model's head begins training with the weights of that head: they are copied again after `init_weights`, and when a
    checkpoint without a branch is loaded.

    A calibration of the branch (`ttt_adapt_openmmlab.calibrate`) is part of the `state_dict`, as one tensor of bytes:
    whoever loads the weights has it, be it a runner or `init_model`. A training pass removes it, because it describes
    the weights before.

    Args:
        model: the model, or its config.
        branch: keywords of `MAEBranch.attach`; `encoder` is by default "backbone", or "image_encoder" for a model that
            has a text encoder beside it.
        data_preprocessor: for a model config that has none; one inside of `model` wins.
        init_cfg: as in every MMEngine module.
        **inherited: entries that the config inherits from the config of the plain model, and entries that `init_model`
            sets to None. They have no effect. Where they differ from `model`, the log warns.

    Raises:
        ConfigError: a model without backbone or data preprocessor, or a misplaced keyword.
        EncoderError: the branch cannot be attached.
    """

    def __init__(
        self,
        model: dict[str, Any] | nn.Module,
        branch: Mapping[str, Any] | None = None,
        data_preprocessor: dict[str, Any] | nn.Module | None = None,
        init_cfg: dict[str, Any] | None = None,
        **inherited: Any,
    ) -> None:
        super(BaseModel, self).__init__(init_cfg)  # the data preprocessor is the model's: BaseModel would make another
        settings = branch_settings(branch or {})
        if misplaced := sorted(set(inherited) & (ATTACH - {"encoder"})):
            raise ConfigError(
                f"JointMAE got {', '.join(map(repr, misplaced))}, which belong to the branch: write branch=dict(...)"
            )
        plain = _built(model, data_preprocessor, inherited)
        encoder = settings.setdefault("encoder", encoder_name(plain))
        _check_model(plain, encoder)
        with torch.random.fork_rng(devices=[]):  # the model gets the same random numbers as without a branch
            attached = branch_for(plain, **settings)
        self.model: Any = plain  # its methods are those of MMEngine's models
        self.mae_branch = attached
        self.branch_is_new = False  # whether weights without it were loaded and it was not trained since
        self.register_state_dict_post_hook(_plain_names)
        self.register_load_state_dict_post_hook(_loaded)

    @property
    def branch(self) -> MAEBranch:
        """The reconstruction branch."""
        return self.mae_branch

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        """As the model's own; with mode "loss", `loss_mae` is among the losses.

        Args:
            inputs: float [B, 3, H, W], from the data preprocessor.
            data_samples: annotations and meta information, one per image.
            mode: "tensor", "predict" or "loss".
        """
        outputs = self.model(inputs, data_samples, mode=mode)
        if mode == "loss":
            self.branch_is_new, self.mae_branch.calibration = False, None
        return {**outputs, "loss_mae": self.mae_branch.loss(inputs)} if mode == "loss" else outputs

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Any]:
        """The model's losses and `loss_mae`; arguments as in `forward`."""
        return self(inputs, data_samples, mode="loss")

    def parse_losses(self, losses: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """As the model parses its losses."""
        return self.model.parse_losses(losses)

    def val_step(self, data: Any) -> Any:
        """As the model's own."""
        return self.model.val_step(data)

    def test_step(self, data: Any) -> Any:
        """As the model's own."""
        return self.model.test_step(data)

    def init_weights(self) -> None:
        """Initialise the model; a decoder that copies its head gets the weights of that head."""
        super().init_weights()
        self._renew_copy()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """With the names of the plain model, which rules such as layer-wise learning rates match on."""
        start = f"{prefix}." if prefix else ""
        for name, parameter in super().named_parameters("", recurse, remove_duplicate):
            yield start + name.removeprefix(INNER), parameter

    def __getattr__(self, name: str) -> Any:
        """What only the model has, such as its data preprocessor or its head."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None:
                raise
            return getattr(model, name)

    def _renew_copy(self) -> None:
        renew = getattr(self.mae_branch.decoder, "renew", None)
        if renew is not None:
            renew(self.model)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Rename the plain model's keys to their names in this module; PyTorch and MMEngine both call this."""
        own, start = self.mae_branch.state_dict(), prefix + BRANCH
        found = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
        whole = all(key in found and found[key].shape == value.shape for key, value in own.items())
        self._loading = prefix, bool(found), whole
        self.mae_branch.calibration = saved_calibration(state_dict, prefix)
        state_dict.pop(prefix + CALIBRATION, None)
        _rename(state_dict, prefix, lambda key: key if key.startswith(BRANCH) else INNER + key)
        versions = {} if prefix else getattr(state_dict, "_metadata", None) or {}
        for key in list(versions):
            versions.setdefault((INNER + key).removesuffix("."), versions[key])
        super()._load_from_state_dict(state_dict, prefix, *args)


def plain_model(model: nn.Module) -> nn.Module:
    """The segmentor or detector itself, out of `JointMAE` and wrappers for distributed training."""
    inside = unwrapped(model)
    return inside.model if isinstance(inside, JointMAE) else inside


def find_branch(model: nn.Module) -> MAEBranch | None:
    """The branch of a `JointMAE`, also inside a wrapper for distributed training; None for other models."""
    inside = unwrapped(model)
    return inside.branch if isinstance(inside, JointMAE) else None


def data_preprocessor_of(model: nn.Module) -> nn.Module:
    """The plain model's own.

    Raises:
        ConfigError: there is none that makes batches of images, or the model takes clips or several batches.
    """
    refuse_model(type(model))
    found = getattr(model, "data_preprocessor", None)
    if not isinstance(found, nn.Module) or type(found) is BaseDataPreprocessor:
        raise ConfigError(
            f"{type(model).__name__} has no data_preprocessor that normalises images: set model.data_preprocessor to "
            "dict(type='SegDataPreProcessor' or 'DetDataPreprocessor', mean=..., std=..., bgr_to_rgb=True)"
        )
    return found


def unwrapped(model: Any) -> Any:
    """The model inside a wrapper for distributed training."""
    return model.module if is_model_wrapper(model) else model


def saved_calibration(state_dict: Mapping[str, Tensor], prefix: str = "") -> Calibration | None:
    """The calibration in a `state_dict` of `JointMAE`; None without one.

    Raises:
        CheckpointError: a later version wrote it, or it is damaged.
    """
    found = state_dict.get(prefix + CALIBRATION)
    return None if found is None else Calibration.of_bytes(found.cpu().numpy().tobytes(), CALIBRATION)


def _plain_names(module: JointMAE, state_dict: Any, prefix: str, _metadata: Any) -> None:
    """After `state_dict`: the model's keys as in the plain model, and the calibration."""
    if module.mae_branch.calibration is not None:
        data = bytearray(module.mae_branch.calibration.to_bytes())
        state_dict[prefix + CALIBRATION] = torch.frombuffer(data, dtype=torch.uint8)
    _rename(state_dict, prefix, lambda key: key.removeprefix(INNER))
    versions = getattr(state_dict, "_metadata", {})
    for key in [key for key in versions if f"{key}.".startswith(prefix + INNER)]:
        versions[(prefix + f"{key}."[len(prefix + INNER) :]).removesuffix(".")] = versions.pop(key)


def _loaded(module: JointMAE, incompatible: Any) -> None:
    """After loading, name keys as in the plain model; a checkpoint without a branch has no missing keys."""
    prefix, with_branch, whole = module._loading
    module.branch_is_new = not whole
    for keys in incompatible:
        keys[:] = [prefix + key[len(prefix) :].removeprefix(INNER) if key.startswith(prefix) else key for key in keys]
    if not with_branch:
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if not key.startswith(prefix + BRANCH)]
        module._renew_copy()
        print_log("the weights hold no mae_branch: the reconstruction branch is not trained yet", logger="current")


def _rename(state_dict: dict[str, Any], prefix: str, rename: Callable[[str], str]) -> None:
    """Rename the keys that start with `prefix`, behind it, in place and in order."""
    items = list(state_dict.items())
    state_dict.clear()
    for key, value in items:
        state_dict[prefix + rename(key[len(prefix) :]) if key.startswith(prefix) else key] = value


def _built(model: Any, data_preprocessor: Any, inherited: Mapping[str, Any]) -> nn.Module:
    """The model itself, or what its config describes."""
    extra = {**inherited, "data_preprocessor": data_preprocessor}
    if isinstance(model, nn.Module):
        if given := [key for key, value in extra.items() if value is not None]:
            raise ConfigError(
                f"JointMAE got {', '.join(map(repr, given))} and a model that is built already: leave them out"
            )
        return model
    if not isinstance(model, Mapping) or "type" not in model:
        raise ConfigError(f"model is a {type(model).__name__}; expected a module, or a config dict with a type")
    refuse_model(model["type"])
    config = copy.deepcopy(ConfigDict(model))
    if config.get("data_preprocessor") is None and data_preprocessor is not None:
        config["data_preprocessor"] = data_preprocessor
    if ignored := list(_differences(extra, config, "model.")):
        print_log(
            f"JointMAE takes {'; '.join(ignored[:5])}. Entries other than JointMAE's own keywords have no effect, such "
            "as those that a config inherits from the plain model's: write changes into JointMAE's model=dict(...)",
            logger="current",
            level=logging.WARNING,
        )
    try:
        return MODELS.build(config)
    except TypeError as error:
        if "backbone" in config:
            raise
        raise ConfigError(_NO_BACKBONE.format(config["type"])) from error


def _differences(inherited: Mapping[str, Any], own: Mapping[str, Any], path: str) -> Iterator[str]:
    """Where `inherited` and `own` differ, in words."""
    for key, value in inherited.items():
        kept = own.get(key)
        if isinstance(value, Mapping) and isinstance(kept, Mapping):
            yield from _differences(value, kept, f"{path}{key}.")
        elif value is not None and value != kept:
            yield f"{kept!r} for {path}{key}, not {value!r}"


_NO_BACKBONE = (
    "{} has no backbone, which JointMAE takes as the encoder: name another module by branch=dict(encoder=...)"
)


def _check_model(model: nn.Module, encoder: Any) -> None:
    refuse_model(type(model))
    if encoder == "backbone" and not isinstance(getattr(model, "backbone", None), nn.Module):
        raise ConfigError(_NO_BACKBONE.format(type(model).__name__))
    data_preprocessor_of(model)
