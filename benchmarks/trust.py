"""Which sign tells, without labels, the frames that adapting harms?

    python benchmarks/trust.py CHECKPOINT --data PATH_TO_CAMVID       # a calibrated checkpoint on drifted CamVid
    python benchmarks/trust.py                                        # the demo's model on rendered streets

A frame is harmed where the arm's mIoU on it is more than half a point below that of the fixed model. For every sign
the table has the area under the ROC curve over all frames of all streams: 0.5 is chance, 1 ranks every harmed frame
above every other. A sign is chosen on the first half of the streams, and reported on the second.

| sign | what it is |
|---|---|
| drift | `adapter.drift`: how far the frame is from the source, in units of what is usual there |
| entropy | mean entropy of the arm's prediction |
| more entropy | that, minus the entropy of the fixed model's prediction |
| disagreement | share of pixels whose class differs between the arm and the fixed model |
| flip | share of pixels whose class changes when the arm predicts the mirrored frame |
| more flip | that, minus the same of the fixed model |
| loss | the reconstruction loss at the frame, where the arm has one |
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from ttt_adapt import StreamConfig
from ttt_adapt.arms import find_arm
from ttt_adapt.data import Clip, open_clips
from ttt_adapt.data.drift import DriftedClip
from ttt_adapt.data.street import WEIGHTS, StreetClip
from ttt_adapt.evaluation.runners.start import start
from ttt_adapt.model.frames import to_model_input
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint
from ttt_adapt.tasks.segmentation.score import SegmentationScore

HARM = 0.005
CAMVID = ("night:3", "fog:3", "jpeg:3", "blur:3"), ("noise:3", "rain:3", "motion-blur:3", "none")
STREETS = (50, 51), (52, 53)


def signs(arm: Any, fixed: Any, frame: np.ndarray, x: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    """The signs at one frame, and the classes [H, W] that the arm and the fixed model predict."""
    ours, theirs = arm.step(frame), fixed.step(frame)
    mirrored = x.flip(-1)
    found = {"drift": getattr(getattr(arm, "adapter", None), "drift", None), "loss": arm.loss}
    entropies = [float(_entropy(scores)) for scores in (ours, theirs)]
    flips = [
        float((scores.argmax(1) != runner.predict(mirrored).flip(-1).argmax(1)).float().mean())
        for runner, scores in ((arm, ours), (fixed, theirs))
    ]
    found |= {"entropy": entropies[0], "more entropy": entropies[0] - entropies[1]}
    found |= {"disagreement": float((ours.argmax(1) != theirs.argmax(1)).float().mean())}
    found |= {"flip": flips[0], "more flip": flips[0] - flips[1]}
    known = {name: float(value) for name, value in found.items() if value is not None}
    return known, ours[0].argmax(0), theirs[0].argmax(0)


def _entropy(scores: Tensor) -> Tensor:
    return -(scores.softmax(1) * scores.log_softmax(1)).sum(1).mean()


def watched(checkpoint: Checkpoint, arm: str, clip: Clip) -> Iterator[tuple[dict[str, float], float]]:
    """For every frame its signs, and how much the arm gains in its mIoU."""
    config = StreamConfig.online()
    runner, fixed = (start(find_arm(name), checkpoint, config) for name in (arm, "fixed"))
    other = load_checkpoint(checkpoint_file(checkpoint)).model  # the arm changes its own in place
    fixed.model = other.eval()  # type: ignore[attr-defined]
    preprocess = checkpoint.spec.preprocess()
    try:
        for frame, label in clip:
            x = to_model_input(frame, preprocess, torch.device("cpu"))
            found, ours, theirs = signs(runner, fixed, frame, x)
            scores = [_miou(checkpoint, prediction, label) for prediction in (ours, theirs)]
            yield found, scores[0] - scores[1]
    finally:
        runner.close()


FILES: dict[int, Path] = {}


def checkpoint_file(checkpoint: Checkpoint) -> Path:
    """The file that a checkpoint came from."""
    return FILES[id(checkpoint)]


def _miou(checkpoint: Checkpoint, prediction: Tensor, label: np.ndarray) -> float:
    score = SegmentationScore(len(checkpoint.spec.classes), 255)
    return score.update(prediction.numpy().astype(np.uint8), label)


def table(halves: Sequence[Sequence[tuple[dict[str, float], float]]]) -> list[str]:
    """AUROC of each sign on both halves."""
    names = list(dict.fromkeys(name for half in halves for found, _ in half for name in found))
    lines = []
    for name in names:
        cells = []
        for half in halves:
            pairs = [(found[name], gain < -HARM) for found, gain in half if name in found and np.isfinite(gain)]
            values, harmed = torch.tensor([v for v, _ in pairs]), torch.tensor([int(h) for _, h in pairs])
            if not 0 < harmed.sum() < len(harmed):
                cells.append("n/a")
                continue
            scaled = (values - values.min()) / (values.max() - values.min()).clamp_min(1e-12)  # it wants [0, 1]
            cells.append(f"{float(binary_auroc(scaled, harmed)):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    rows = {
        "frames harmed": lambda half: f"{100 * np.mean([gain < -HARM for _, gain in half]):.0f} %",
        "mean gain, points": lambda half: f"{100 * np.mean([gain for _, gain in half]):+.2f}",
        "mean gain, falling back where entropy rises": lambda half: f"{100 * np.mean(_kept(half)):+.2f}",
    }
    return [*lines, *(f"| {name} | {' | '.join(map(cell, halves))} |" for name, cell in rows.items())]


def _kept(half: Sequence[tuple[dict[str, float], float]]) -> list[float]:
    """The gains, if frames whose prediction is less certain than the fixed model's are left to the fixed model."""
    return [gain if found["more entropy"] <= 0 else 0.0 for found, gain in half]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=WEIGHTS)
    parser.add_argument("--data", type=Path, help="folder of CamVid; without it, rendered streets")
    parser.add_argument("--arms", nargs="+", default=["calibrated"])
    parser.add_argument("--every", type=int, default=3, help="frames of a CamVid clip: every n-th")
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.checkpoint)
    FILES[id(checkpoint)] = options.checkpoint
    size = checkpoint.spec.size
    if options.data:
        (day,) = open_clips(options.data, ("0016E5_val_c",), size)
        halves = [[DriftedClip(day, name) for name in half] for half in CAMVID]
    else:
        halves = [[StreetClip(seed, 240, size) for seed in half] for half in STREETS]
    for arm in options.arms:
        found = []
        for half in halves:
            frames = []
            for clip in half:
                samples = [clip[i] for i in range(0, len(clip), options.every)] if options.data else clip
                frames += list(watched(checkpoint, arm, samples))  # type: ignore[arg-type]
            found.append(frames)
        print(f"{arm} on {options.checkpoint.name}\n\n| sign | chosen on | reported on |\n|---|---:|---:|")
        print("\n".join(table(found)) + "\n", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
