"""Learning results on real driving video: train on CamVid's daylight stills, stream clips that training never saw.

    python benchmarks/camvid.py --data PATH_TO_CAMVID                     # ViT and RegNet, 3 seeds
    python benchmarks/camvid.py --data PATH_TO_CAMVID --models convnext

For each seed a model is trained from scratch for the main task; from there two trainings of equal length and equal
augmentation go on, one with the main task alone ("Main Task Only"), one jointly with the reconstruction. All arms
stream the 15 Hz clip and the dusk clip at 144 x 192. Hyper-parameters of adaptation are chosen on the 15 Hz clip, as it
is and artificially darkened (`camvid_variants.py`).

As many trainings, and then evaluations, run side by side as there are cores, each on one thread; each training writes
its messages to a log beside its checkpoints. Everything goes on where it stopped when the command is given again.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ttt_adapt import StreamConfig
from ttt_adapt.data import open_clips
from ttt_adapt.evaluation.rows import Row
from ttt_adapt.evaluation.session import evaluate
from ttt_adapt.evaluation.tables import markdown_table
from ttt_adapt.training.joint import TrainConfig
from ttt_adapt.training.recipe import train

TRAIN = ("0006R0_train_a", "0016E5_train_a", "0016E5_train_b", "0016E5_train_d")
STREAMS = ("0016E5_val_c", "0001TP_train_a")
SIZE = (144, 192)
ARMS = {"no-memory": "TTT-MAE No Memory", "online": "Online TTT-MAE"}
NORM_ARMS = {"norm-ema": "BatchNorm EMA, forward only", "online-norm-ema": "Online TTT-MAE + BatchNorm EMA"}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {"encoder": "vit_tiny_patch16_224", "options": {"depth": 4}, "epochs": 25, "arms": ARMS},
    "regnet": {"encoder": "regnetx_002", "options": {}, "epochs": 16, "arms": ARMS | NORM_ARMS},
    "convnext": {"encoder": "convnext_atto", "options": {}, "epochs": 12, "arms": ARMS},
}


class Training(NamedTuple):
    """Three trainings from one seed: a first one from scratch, then the main task alone and jointly from there."""

    model: str
    seed: int
    data: Path
    stem: Path
    """What the names of the files begin with."""
    clips: tuple[str, ...] = TRAIN
    size: tuple[int, int] = SIZE
    task: str = "segmentation"
    epochs: int | None = None
    """Of each of the three; None for those of `MODELS`."""


def checkpoints(trainings: Sequence[Training]) -> list[tuple[Path, Path]]:
    """The files of (Main Task Only, joint) of each; what is missing is trained, side by side."""
    with side_by_side() as pool:
        return list(pool.map(_trained, trainings))


def side_by_side() -> ProcessPoolExecutor:
    """A process per core, each with one thread."""
    context = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0))
    return ProcessPoolExecutor(cores, context, initializer=torch.set_num_threads, initargs=(1,))


def _trained(training: Training) -> tuple[Path, Path]:
    first, main, joint = (Path(f"{training.stem}-{part}.safetensors") for part in ("first", "main", "joint"))
    training.stem.parent.mkdir(parents=True, exist_ok=True)
    with (
        Path(f"{training.stem}.log").open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        for out, recipe, init in ((first, "main", None), (main, "main", first), (joint, "joint", first)):
            if not out.exists():
                train(str(training.data), out, recipe=recipe, init=init, **_keywords(training))
    return main, joint


def _keywords(training: Training) -> dict[str, Any]:
    """What all three trainings share."""
    model = MODELS[training.model]
    return {
        "encoder": model["encoder"],
        "encoder_options": model["options"] | ({"img_size": training.size} if training.model == "vit" else {}),
        "clips": training.clips,
        "size": training.size,
        "branch": {"patch_size": 16},
        "first_epochs": 0,
        "resume": True,
        "device": "cpu",
        "config": TrainConfig(epochs=training.epochs or model["epochs"], seed=training.seed),
        "task": training.task,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds CamVid's clips and index.json")
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=["vit", "regnet"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=Path, default=Path("runs/camvid"))
    parser.add_argument("--out", type=Path, default=Path("runs/camvid"), help="folder for the reports")
    options = parser.parse_args()
    wanted = [(name, seed) for name in options.models for seed in options.seeds]
    trainings = [Training(name, seed, options.data, options.weights / f"{name}-{seed}") for name, seed in wanted]
    options.out.mkdir(parents=True, exist_ok=True)
    found = dict(zip(wanted, checkpoints(trainings), strict=True))
    pairs = [[found[name, seed] for seed in options.seeds] for name in options.models]
    with side_by_side() as pool:
        tables = pool.map(partial(_evaluated, options), options.models, pairs)
        for name, table in zip(options.models, tables, strict=True):
            print(f"{name}\n\n{table}")


def _evaluated(options: argparse.Namespace, name: str, pairs: list[tuple[Path, Path]]) -> str:
    """Stream the clips through a model's arms and write the report; returns the table."""
    joint = tuple(pair[1] for pair in pairs)
    rows = [
        Row("fixed", "MAE Joint Training (fixed)", joint),
        Row("fixed", "Main Task Only (fixed)", tuple(pair[0] for pair in pairs)),
        *(Row(arm, title, joint) for arm, title in MODELS[name]["arms"].items()),
    ]
    out = options.out / f"camvid-{name}"
    clips = open_clips(options.data, STREAMS, SIZE)
    return markdown_table(evaluate(rows, clips, StreamConfig.online(), options.seeds, out))


if __name__ == "__main__":
    main()
