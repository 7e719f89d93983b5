"""How the online preset is chosen: variants of the recipe on the tuning clip, one or two changes at a time.

    python benchmarks/camvid_variants.py --data PATH_TO_CAMVID --checkpoint runs/camvid/vit-0-joint.safetensors

Each variant streams the 15 Hz clip twice: as it is, and darkened step by step (dark, bluish, noisy). The rule, fixed
before the table was made: of the stream settings (mask ratio and loss belong to the branch) that lose at most 2 % as it
is, the one that gains most on the darkened clip. The dusk clip is not looked at.
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
from ttt_adapt.taps import norm_layers

Sample = tuple[np.ndarray, np.ndarray]

VARIANTS: dict[str, dict[str, Any]] = {
    **{
        f"lr {lr:g}, pull {pull:g}": {"lr": lr, "source_pull": pull}
        for lr in (3e-5, 1e-4, 3e-4)
        for pull in (0.0, 0.05, 0.2, 0.5)
    },
    "optimizer restarted (released code)": {"restart_optimizer": True},
    "encoder at a tenth (released code)": {"encoder_lr_scale": 0.1},
    "window 1 (implicit only)": {"window": 1},
    "weights not carried (explicit only)": {"carry_weights": False},
    "mask ratio 0.5": {"mask_ratio": 0.5},
    "loss on all pixels (released code)": {"loss_on": "all"},
    "batch 32": {"batch_size": 32},
}
NORM_VARIANTS: dict[str, dict[str, Any]] = {
    f"BatchNorm EMA {momentum:g}": {"norm_stats": "ema", "norm_momentum": momentum} for momentum in (0.02, 0.05, 0.1)
}
BRANCH = {"mask_ratio", "loss_on"}
LIMIT = -0.02  # what the chosen variant may lose on the clip as it is, relative


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
    own = {name: getattr(branch, name) for name in BRANCH}
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
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write, in benchmarks/results")
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.checkpoint)
    clip = list(open_clips(options.data, ["0016E5_val_c"], checkpoint.spec.size)[0])
    clips = {"as it is": clip, "darkened": list(darkened(clip))}
    fixed = score("fixed", checkpoint, clips, {})
    rows = ["| change to the online preset | as it is | darkened |", "|---|---:|---:|"]
    rows.append("| fixed | " + " | ".join(f"{100 * value:.2f}" for value in fixed) + " |")
    if norm_layers(checkpoint.model):
        found = score("norm-ema", checkpoint, clips, {})
        rows.append(row("BatchNorm EMA 0.05, forward only", found, fixed))
    best, most = "fixed", 0.0
    for title, changes in (VARIANTS | (NORM_VARIANTS if norm_layers(checkpoint.model) else {})).items():
        found = score("online", checkpoint, clips, changes)
        rows.append(row(title, found, fixed))
        print(rows[-1], flush=True)
        if found[0] / fixed[0] - 1 >= LIMIT and found[1] / fixed[1] - 1 > most and not BRANCH & set(changes):
            best, most = title, found[1] / fixed[1] - 1
        options.out.write_text("\n".join(rows) + f"\n\nBy the rule: {best}.\n")


def row(title: str, found: list[float], fixed: list[float]) -> str:
    """One line of the table: scores in percent, and what they gain on the fixed model."""
    cells = (f"{100 * v:.2f} ({100 * (v / f - 1):+.1f}%)" for v, f in zip(found, fixed, strict=True))
    return f"| {title} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
