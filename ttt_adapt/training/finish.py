"""What happens to a model when its training is over: its weights are rounded, and it is calibrated and scored."""

from __future__ import annotations

import torch

from ttt_adapt.calibration.describe import describe_rule
from ttt_adapt.errors import TTTAdaptError
from ttt_adapt.model.frames import Normalize
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


@torch.no_grad()
def score_trained(checkpoint: Checkpoint, opened: Stills) -> None:
    """Tell the user what the trained model scores on evenly chosen, unchanged training stills.

    The model knows these stills: the number says whether training worked, not how good the model is elsewhere.

    Args:
        checkpoint: the trained model.
        opened: what it was trained on.
    """
    spec, task = checkpoint.spec, checkpoint.task
    stills = training_stills(opened, task.labelled)
    normalize = Normalize(spec.mean, spec.std, spec.size, next(checkpoint.model.parameters()).device)
    try:
        score = task.score(stills.ignore)
        for index, frame in enumerate(stills.frames):
            seen = task.see(frame)
            truth = frame if stills.labels is None else stills.labels[index]
            score.update(task.predict(checkpoint.model(normalize(seen)), seen), truth)
        found = score.result()
    except TTTAdaptError as error:  # the training is not lost by it
        notice(f"not scored: {error}")
        return
    metric = task.metrics[0]
    unit = f" {metric.unit}" if metric.unit else ""
    notice(
        f"{metric.title} {metric.text(found[metric.field])}{unit} on {len(stills.frames)} of its {stills.of} training "
        "stills; `ttt-adapt eval` scores it on clips that it does not know"
    )
