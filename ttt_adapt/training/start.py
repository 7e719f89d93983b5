"""What training starts from: random weights, a pretrained encoder, or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ttt_adapt.errors import ConfigError
from ttt_adapt.objectives.mae_settings import patch_size_for
from ttt_adapt.tasks.checkpoint import Checkpoint, build_model, load_initial, read_spec
from ttt_adapt.tasks.pretrained import Pretrained, find_pretrained
from ttt_adapt.tasks.spec import ModelSpec


@dataclass(frozen=True)
class Start:
    """The weights that training starts from.

    Attributes:
        pretrained: of the encoder; None for random ones.
        init: a checkpoint with all weights; None without one.
        spec: the description of `init`.
    """

    pretrained: Pretrained | None = None
    init: Path | None = None
    spec: ModelSpec | None = None

    def colours(self) -> dict[str, Any]:
        """The mean and std that these weights were trained with, as keywords of `ModelSpec`; {} for the default."""
        source = self.spec or self.pretrained
        return {} if source is None else {"mean": source.mean, "std": source.std}

    def patch_size(self, size: tuple[int, int]) -> int:
        """The side of a mask patch: that of the branch in `init`, otherwise what fits frames of this size (H, W)."""
        if self.spec is not None and self.spec.branch is not None and self.spec.objective == "mae":
            side: int = self.spec.branch.get("patch_size", 16)  # the default of `MAEBranch.attach`
            return side
        return patch_size_for(size)

    def record(self) -> dict[str, str]:
        """Where the weights come from, for `ModelSpec.training`."""
        return {} if self.pretrained is None else {"pretrained": self.pretrained.source}

    def build(self, spec: ModelSpec, seed: int, device: torch.device) -> Checkpoint:
        """The model and branch to train, with the weights that training starts from.

        Raises:
            ConfigError, CheckpointError: the weights do not fit, or the encoder takes other image sizes only.
        """
        torch.manual_seed(seed)
        model, branch = build_model(spec, self.pretrained)
        checkpoint = Checkpoint(model.to(device), branch.to(device) if branch is not None else None, spec)
        if self.init is not None:
            load_initial(self.init, checkpoint)
        _try_size(checkpoint, device)
        return checkpoint


def find_start(pretrained: str | Path | None, init: Path | None, encoder: str) -> Start:
    """Find and read what training starts from.

    Args:
        pretrained: as `find_pretrained` takes it.
        init: a checkpoint.
        encoder: timm model name.

    Raises:
        ConfigError: both are given, or as for `find_pretrained`.
        CheckpointError: a file cannot be read.
    """
    if pretrained is not None and init is not None:
        raise ConfigError(
            f"pretrained is {str(pretrained)!r} and init is {str(init)!r}, which has the weights of the whole model "
            "and would replace the pretrained ones: give one of the two"
        )
    if init is not None:
        return Start(init=init, spec=read_spec(init))
    return Start(find_pretrained(pretrained, encoder))


@torch.no_grad()
def _try_size(checkpoint: Checkpoint, device: torch.device) -> None:
    """Raise a ConfigError where the encoder takes other image sizes only."""
    spec = checkpoint.spec
    try:
        checkpoint.model.eval()(torch.zeros(1, 3, *spec.size, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{spec.encoder} cannot take images of {spec.size} (H, W): {error}") from error
