"""Colorization on real video: train on pictures and frames in colour, stream the grey of clips that training never saw.

    python benchmarks/colorization.py --data DATA

DATA holds `davis/`, `coco100/` and `clips/`. As for CamVid (`camvid.py`), a model is trained from scratch for the main
task; from there two trainings of equal length go on, one with the main task alone, one jointly with the reconstruction.

The learning rate and the pull of adaptation are chosen on one DAVIS sequence that is neither trained on nor reported,
with seed 0, by a rule fixed before the table is made: of the settings that flicker no more than the fixed model, the
one of the highest PSNR; the online preset if there is none. The other clips are streamed with what was chosen.

Writes reports, tables and plots of the tuning and of the streams, and sheet.png: grey, fixed, online and truth.
Everything goes on where it stopped when the command is given again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from camvid import ARMS, Training, checkpoints
from ttt_adapt import StreamConfig
from ttt_adapt.arms import find_arm
from ttt_adapt.data import Clip, open_frames
from ttt_adapt.evaluation.rows import Row
from ttt_adapt.evaluation.run_arm import run_arm
from ttt_adapt.evaluation.session import evaluate
from ttt_adapt.tasks import Colorization
from ttt_adapt.tasks.checkpoint import load_checkpoint
from ttt_adapt.view.overlay import panels

TRAIN = ("coco100", "bmx-trees", "car-roundabout", "cows", "drift-straight", "horsejump-high", "kite-surf")
TUNE = "dog"
STREAMS = (
    "blackswan",
    "breakdance",
    "scooter-black",
    "intel_car-detection",
    "udacity_solidWhiteRight",
    "decord_pancake",
)
FRAMES = 60
"""Frames used of each clip, from the first on."""
SIZE = (96, 160)
EPOCHS = 16
FIXED = "MAE Joint Training (fixed)"


class Variant(NamedTuple):
    """A setting of adaptation."""

    lr: float
    source_pull: float


VARIANTS = [Variant(lr, pull) for lr in (3e-5, 1e-4, 3e-4) for pull in (0.5, 0.1, 0.0)]


def clips(data: Path, names: Sequence[str]) -> list[Clip]:
    return [Colorization.adopt(clip) for clip in open_frames(data, names, SIZE, FRAMES)]


def tune(joint: Path, data: Path, out: Path) -> StreamConfig:
    """Every variant on the tuning clip with seed 0, and the one that the rule chooses."""
    fixed = Row("fixed", "fixed", (joint,))
    rows = [Row("online", f"lr {v.lr:g}, pull {v.source_pull:g}", (joint,), v._asdict()) for v in VARIANTS]
    report = evaluate([fixed, *rows], clips(data, [TUNE]), StreamConfig.online(), [0], out)
    level = report.select("fixed")[0].scores["flicker"]
    steady = [run for run in report.runs if run.arm != "fixed" and run.scores["flicker"] <= level]
    best = max(steady, key=lambda run: run.scores["psnr"], default=None)
    if best is None:
        return StreamConfig.online()
    return StreamConfig.online(**VARIANTS[[row.label for row in rows].index(best.arm)]._asdict())


def sheet(checkpoint: Path, streams: Sequence[Clip], config: StreamConfig, path: Path) -> None:
    """The last frame of every clip: what the arms were shown, what two of them made of it, and the truth."""
    pictures: list[tuple[str, np.ndarray]] = []
    for clip in streams:
        grey, truth = clip[len(clip) - 1]
        row = {"grey": grey}
        for arm in ("fixed", "online"):

            def keep(
                index: int, _frame: np.ndarray, prediction: np.ndarray, _found: float, _loss: float | None
            ) -> None:
                if index == len(clip) - 1:  # noqa: B023
                    row[arm] = prediction  # noqa: B023

            run_arm(find_arm(arm), load_checkpoint(checkpoint), clip, config, name=clip.name, on_frame=keep)
        pictures += [(f"{name}, {clip.name}", twice(picture)) for name, picture in {**row, "truth": truth}.items()]
    Image.fromarray(panels(pictures, columns=4)).save(path)


def twice(picture: np.ndarray) -> np.ndarray:
    return picture.repeat(2, axis=0).repeat(2, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds davis/, coco100/ and clips/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=Path, default=Path("runs/colorization"))
    parser.add_argument("--out", type=Path, default=Path("runs/colorization"), help="folder for the reports")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    streams = clips(options.data, STREAMS)
    trainings = [
        Training("vit", seed, options.data, options.weights / f"vit-{seed}", TRAIN, SIZE, "colorization", EPOCHS)
        for seed in options.seeds
    ]
    pairs = checkpoints(trainings)
    config = tune(pairs[0][1], options.data, options.out / "colorization-tuning")
    joint = tuple(pair[1] for pair in pairs)
    rows = [
        Row("fixed", FIXED, joint),
        Row("fixed", "Main Task Only (fixed)", tuple(pair[0] for pair in pairs)),
        *(Row(arm, title, joint) for arm, title in ARMS.items()),
    ]
    out = options.out / "colorization-vit"
    evaluate(rows, streams, config, options.seeds, out)
    sheet(joint[0], streams, config.replace(seed=options.seeds[0]), out / "sheet.png")


if __name__ == "__main__":
    main()
