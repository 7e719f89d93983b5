"""What happens to a model when its training is over: weights are rounded as they are stored, and it is calibrated."""

from __future__ import annotations

import torch

from ttt_adapt.calibration.describe import describe_rule
from ttt_adapt.errors import TTTAdaptError
from ttt_adapt.model.measure import LEAST_STILLS
from ttt_adapt.tasks import Stills
from ttt_adapt.tasks.calibrate import calibrate_checkpoint, training_stills
from ttt_adapt.tasks.checkpoint import Checkpoint
from ttt_adapt.view.terminal import notice


@torch.no_grad()
def round_to_half(checkpoint: Checkpoint) -> None:
    """Round all weights and buffers to what float16 holds, in place: what is measured then is what is stored."""
    for module in filter(None, (checkpoint.model, checkpoint.branch)):
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())


def calibrate_trained(checkpoint: Checkpoint, opened: Stills, seed: int) -> None:
    """Calibrate a trained model on evenly chosen, unchanged training stills, with their labels where these are classes.

    Where that is not possible, such as on fewer than 8 stills, the user is told why, and the model stays as it is.

    Args:
        checkpoint: the trained model.
        opened: what it was trained on.
        seed: of drifts and masks.
    """
    stills = training_stills(opened, checkpoint.task.labelled)
    if len(stills.frames) < LEAST_STILLS:
        notice(
            f"not calibrated: there are {len(stills.frames)} training stills, and it takes at least {LEAST_STILLS}; "
            "`ttt-adapt calibrate` takes any"
        )
        return
    try:
        found = calibrate_checkpoint(checkpoint, stills, seed=seed)
    except TTTAdaptError as error:  # the training is not lost by it
        notice(f"not calibrated: {error}")
        return
    notice(f"calibrated on {found.stills} of {stills.of} training stills: {describe_rule(found.rule)}")
