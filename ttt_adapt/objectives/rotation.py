"""Rotation prediction: the loss of the first paper on test-time training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError
from ttt_adapt.model.encoder import EncoderInfo, inspect_encoder
from ttt_adapt.model.features import to_maps
from ttt_adapt.model.hooks import run_encoder, without_checkpointing
from ttt_adapt.model.norms import frozen_norms
from ttt_adapt.model.probe import in_evaluation, returning_as_evaluated
from ttt_adapt.objectives.base import Attached, examines


class Rotation(Attached):
    """Predict by how many quarter turns an image was rotated.

    Source: Sun et al., "Test-Time Training with Self-Supervision for Generalization under Distribution Shifts", ICML
    2020. A linear layer on the mean of the encoder's coarsest features predicts one of four classes. It has to be
    trained jointly with the main task first: `ttt_adapt.training.joint.fit` takes a `Rotation` in place of a branch.

    Make one with `Rotation.attach`. It rotates random square crops, as large as the images allow.
    """

    def __init__(self, info: EncoderInfo) -> None:
        super().__init__(info)
        self.head = nn.Linear(info.maps[-1].channels, 4)
        self.to(next(iter(info.parameters.values())))

    @classmethod
    @examines
    @torch.inference_mode(False)
    def attach(
        cls, model: nn.Module, encoder: str | nn.Module = "auto", image_size: int | tuple[int, int] | None = None
    ) -> Rotation:
        """Attach a rotation head to `model`. Arguments and errors are those of `MAEBranch.attach`."""
        return cls(inspect_encoder(model, encoder, image_size))

    def loss(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Cross-entropy over the four turns, a scalar. One turn is drawn for each of the images [B, 3, H, W]."""
        self.follow_model()
        turned, turns = self.turn(self.checked(images), generator)  # [B, 3, S, S], [B]
        info = self.info
        with (
            self.pass_state.kept(),
            frozen_norms(self.norms),
            without_checkpointing(info.checkpointing),
            in_evaluation(info.token_droppers),
            returning_as_evaluated(info.module),
        ):
            raw = run_encoder(info.model, info.module, turned)
        coarsest = to_maps(raw, self.info.maps, (turned.shape[-2], turned.shape[-1]))[-1]  # [B, C, h, w]
        return F.cross_entropy(self.head(coarsest.mean((2, 3))), turns)

    def turn(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Cut a random square out of each image and turn it counterclockwise by a random number of quarter turns.

        Returns:
            The turned crops [B, 3, S, S] and the numbers of quarter turns, int64 [B].

        Raises:
            ConfigError: the images are smaller than one cell of the coarsest features.
        """
        b, _, h, w = images.shape
        cell = self.info.maps[-1].stride
        side = min(h, w) - min(h, w) % cell
        if not side:
            raise ConfigError(f"images of {h} x {w} have no whole cell of {cell} x {cell} to turn: use larger frames")
        y, x = (  # rows and columns of each crop, [B, S]
            torch.randint(full - side + 1, (b, 1), generator=generator, device=images.device)
            + torch.arange(side, device=images.device)
            for full in (h, w)
        )
        rows = torch.arange(b, device=images.device)
        crops = images[rows[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
        turns = torch.randint(4, (b,), generator=generator, device=images.device)
        return torch.stack([torch.rot90(crops, quarters, (2, 3)) for quarters in range(4)])[turns, rows], turns
