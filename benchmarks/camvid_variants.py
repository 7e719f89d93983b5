"""Variants of the recipe on the tuning clip: what the two readings of the paper disagree on, one change at a time.

    python benchmarks/camvid_variants.py --data PATH_TO_CAMVID --checkpoint runs/camvid/vit-0-joint.safetensors

Each variant changes the online preset in one point and streams the 15 Hz clip twice: as it is, and darkened step by
step (dark, bluish, noisy). The preset was chosen on these two; the dusk clip is not looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ttt_adapt import StreamConfig
from ttt_adapt.checkpoint import Checkpoint, load_checkpoint
from ttt_adapt.data import open_clips
from ttt_adapt.evaluation.arms import ARMS
from ttt_adapt.evaluation.runner import run_arm

Sample = tuple[np.ndarray, np.ndarray]

VARIANTS: dict[str, dict[str, Any]] = {
    "online preset": {},
    "no pull (the paper)": {"source_pull": 0.0},
    "pull 0.05": {"source_pull": 0.05},
    "optimizer restarted (released code)": {"restart_optimizer": True},
    "encoder at a tenth (released code)": {"encoder_lr_scale": 0.1},
    "lr 3e-5": {"lr": 3e-5},
    "window 1 (implicit only)": {"window": 1},
    "weights not carried (explicit only)": {"carry_weights": False},
    "mask ratio 0.5": {"mask_ratio": 0.5},
    "loss on all pixels (released code)": {"loss_on": "all"},
    "batch 32": {"batch_size": 32},
}


def darkened(clip: list[Sample]) -> Iterator[Sample]:
    """The clip as if night fell during its first half."""
    for i, (frame, labels) in enumerate(clip):
        t = min(2.0 * i / len(clip), 1.0)
        x = (frame / 255.0) ** (1 + 0.5 * t) * (1 - 0.55 * t) * np.array([1 - 0.05 * t, 1 - 0.05 * t, 1.0])
        x = x + np.random.default_rng(i).normal(0.0, 0.02 * t, x.shape)
        yield (np.clip(x, 0, 1) * 255).astype(np.uint8), labels


def score(arm: str, checkpoint: Checkpoint, clips: dict[str, list[Sample]], changes: dict[str, Any]) -> list[float]:
    """mIoU on each clip with the branch's and the preset's settings changed."""
    branch = checkpoint.branch
    assert branch is not None
    own = {name: getattr(branch, name) for name in ("mask_ratio", "loss_on")}
    for name in own:
        setattr(branch, name, changes.get(name, own[name]))
    config = StreamConfig.online(**{k: v for k, v in changes.items() if k not in own})
    found = [run_arm(ARMS[arm], checkpoint, clip, config, name=name).miou for name, clip in clips.items()]
    for name, value in own.items():
        setattr(branch, name, value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "camvid-vit-variants.md")
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.checkpoint)
    clip = list(open_clips(options.data, ["0016E5_val_c"], checkpoint.spec.size)[0])
    clips = {"as it is": clip, "darkened": list(darkened(clip))}
    fixed = score("fixed", checkpoint, clips, {})
    rows = ["| one change to the online preset | as it is | darkened |", "|---|---:|---:|"]
    rows.append("| fixed | " + " | ".join(f"{100 * value:.2f}" for value in fixed) + " |")
    for title, changes in VARIANTS.items():
        found = score("online", checkpoint, clips, changes)
        cells = (f"{100 * v:.2f} ({100 * (v / f - 1):+.1f}%)" for v, f in zip(found, fixed, strict=True))
        rows.append(f"| {title} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
        options.out.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
