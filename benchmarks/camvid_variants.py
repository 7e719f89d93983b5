"""How presets are chosen: variants of the recipe, and the baselines' learning rates, on the tuning clip.

    python benchmarks/camvid_variants.py --data PATH_TO_CAMVID --out TABLE.md --checkpoints vit-0-joint.safetensors ...
    python benchmarks/camvid_variants.py ... --arms tent self-train          # learning rates of other arms

Each row streams the 15 Hz clip twice, as it is and darkened step by step (dark, bluish, noisy), through every
checkpoint with one seed each; scores are means over the checkpoints. The dusk clip is not looked at. The rules, fixed
before the tables were made:

- the online preset is, of the rows that change StreamConfig alone (mask ratio and loss belong to the branch and are
  fixed by training) and lose at most 2 % as it is, the one that gains most on the darkened clip;
- a baseline's learning rate is the one with the highest mean over both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ttt_adapt import StreamConfig
from ttt_adapt.arms import ARMS
from ttt_adapt.data import open_clips
from ttt_adapt.evaluation.run_arm import run_arm
from ttt_adapt.model.norms import norm_layers
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint

Sample = tuple[np.ndarray, np.ndarray]
Variant = tuple[str, dict[str, Any]]
"""An arm and what it changes: fields of StreamConfig, or settings of `MAEBranch.using`."""

GRID: dict[str, Variant] = {
    f"lr {lr:g}, pull {pull:g}": ("online", {"lr": lr, "source_pull": pull})
    for lr in (3e-5, 1e-4, 3e-4)
    for pull in (0.0, 0.05, 0.2, 0.5)
}
OTHERS: dict[str, Variant] = {
    "optimizer restarted (released code)": ("online", {"restart_optimizer": True}),
    "encoder at a tenth (released code)": ("online", {"encoder_lr_scale": 0.1}),
    "implicit memory only": ("implicit", {}),
    "explicit memory only": ("explicit", {}),
    "mask ratio 0.5": ("online", {"mask_ratio": 0.5}),
    "loss on all pixels (released code)": ("online", {"loss_on": "all"}),
    "mask ratio 0.5, loss on all pixels": ("online", {"mask_ratio": 0.5, "loss_on": "all"}),
    "batch 32": ("online", {"batch_size": 32}),
    "2 iterations": ("online", {"iterations": 2}),
    "surprise gate": ("online-gate", {}),
}
NORMS: dict[str, Variant] = {
    "BatchNorm EMA 0.05, forward only": ("norm-ema", {}),
    **{
        f"BatchNorm EMA {momentum:g}": ("online-norm-ema", {"norm_momentum": momentum})
        for momentum in (0.02, 0.05, 0.1)
    },
    "BatchNorm blend 0.5, forward only": ("norm-blend", {}),
    **{f"BatchNorm blend {share:g}": ("online-norm-blend", {"norm_momentum": share}) for share in (0.1, 0.3, 0.5)},
}
PARTS = {"grid": GRID, "others": OTHERS, "norms": NORMS}
RATES = (1e-7, 1e-6, 1e-5, 1e-4)
BRANCH = {"mask_ratio", "loss_on"}
LIMIT = -0.02  # what the chosen variant may lose on the clip as it is, relative


def darkened(clip: list[Sample]) -> Iterator[Sample]:
    """The clip as if night fell during its first half."""
    for i, (frame, labels) in enumerate(clip):
        t = min(2.0 * i / len(clip), 1.0)
        x = (frame / 255.0) ** (1 + 0.5 * t) * (1 - 0.55 * t) * np.array([1 - 0.05 * t, 1 - 0.05 * t, 1.0])
        x = x + np.random.default_rng(i).normal(0.0, 0.02 * t, x.shape)
        yield (np.clip(x, 0, 1) * 255).astype(np.uint8), labels


def score(checkpoints: Sequence[Checkpoint], clips: dict[str, list[Sample]], variant: Variant) -> np.ndarray:
    """mIoU [checkpoints, clips]; the i-th checkpoint runs with seed i."""
    arm, changes = variant
    hidden = {name: value for name, value in changes.items() if name in BRANCH}
    own = {name: value for name, value in changes.items() if name not in BRANCH}
    found = np.zeros((len(checkpoints), len(clips)))
    for i, checkpoint in enumerate(checkpoints):
        config = StreamConfig.online(seed=i)
        with checkpoint.mae_branch.using(**hidden) if hidden else nullcontext():
            for j, (name, clip) in enumerate(clips.items()):
                found[i, j] = run_arm(ARMS[arm], checkpoint, clip, config, name=name, changes=own).scores["miou"]
    return found


def row(title: str, found: np.ndarray, fixed: np.ndarray) -> str:
    """One line of the table: means in percent, their relative gain on the fixed model, and every checkpoint's."""
    cells = []
    for mean, base, each, bases in zip(found.mean(0), fixed.mean(0), found.T, fixed.T, strict=True):
        gains = "" if len(each) == 1 else "; " + ", ".join(f"{100 * (a / b - 1):+.1f}" for a, b in zip(each, bases))  # noqa: B905
        cells.append(f"{100 * mean:.2f} ({100 * (mean / base - 1):+.1f}%{gains})")
    return f"| {title} | " + " | ".join(cells) + " |"


def best_preset(gains: dict[str, np.ndarray]) -> str:
    """The title that the rule for the online preset chooses; `gains` are (as it is, darkened)."""
    allowed = {title: gain for title, gain in gains.items() if gain[0] >= LIMIT and gain[1] > 0}
    return max(allowed, key=lambda title: allowed[title][1], default="fixed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True, help="jointly trained, one per seed")
    parser.add_argument("--parts", choices=list(PARTS), nargs="+", default=["grid", "others"])
    parser.add_argument("--arms", choices=list(ARMS), nargs="+", help="search these arms' learning rates instead")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write, in benchmarks/results")
    options = parser.parse_args()
    checkpoints = [load_checkpoint(path) for path in options.checkpoints]
    clip = list(open_clips(options.data, ["0016E5_val_c"], checkpoints[0].spec.size)[0])
    clips = {"as it is": clip, "darkened": list(darkened(clip))}
    fixed = score(checkpoints, clips, ("fixed", {}))
    rows = ["| change to the online preset | as it is | darkened |", "|---|---:|---:|"]
    rows.append("| fixed | " + " | ".join(f"{100 * value:.2f}" for value in fixed.mean(0)) + " |")
    variants: dict[str, Variant] = {}
    for part in options.parts:
        variants |= PARTS[part] if part != "norms" or norm_layers(checkpoints[0].model) else {}
    if options.arms:
        variants = {f"{arm}, lr {lr:g}": (arm, {"lr": lr}) for arm in options.arms for lr in RATES}
    gains: dict[str, np.ndarray] = {}
    for title, variant in variants.items():
        found = score(checkpoints, clips, variant)
        gains[title] = found.mean(0) / fixed.mean(0) - 1
        rows.append(row(title, found, fixed))
        print(rows[-1], flush=True)
        options.out.write_text("\n".join(rows) + f"\n\nBy the rule: {chosen(gains, variants, options.arms or [])}.\n")


def chosen(gains: dict[str, np.ndarray], variants: dict[str, Variant], arms: Sequence[str]) -> str:
    """What the rules make of the table so far."""
    if not arms:
        return best_preset({title: gain for title, gain in gains.items() if not BRANCH & set(variants[title][1])})
    best = (
        max(ours, key=lambda title: gains[title].sum())
        for arm in arms
        if (ours := [title for title in gains if variants[title][0] == arm])
    )
    return "; ".join(best)


if __name__ == "__main__":
    main()
