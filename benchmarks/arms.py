"""All arms, the window sweep and the shuffle experiment, on real driving and real objects.

    python benchmarks/arms.py --data DATA                        # DATA holds camvid/ and davis/; hours on one core
    python benchmarks/arms.py --data DATA --only camvid --parts arms window

- **camvid**: the ViTs and RegNets (BatchNorm) of `camvid.py`, one per seed, on the 15 Hz clip, which the online preset
  was chosen on, and the dusk clip.
- **davis**: the ten DAVIS sequences, foreground against background. Two folds: a ViT trained on five sequences (as
  `camvid.py` trains, at 96 x 160, half as long) streams the five others, and the other way round; one pair per seed.

Parts: all arms, what a frame costs each of them (on a machine with nothing else to do, with OMP_NUM_THREADS=1), and the
window sweep. Everything goes on where it stopped when the command is given again. Of finished reports of all arms,

    python benchmarks/arms.py --average benchmarks/results       # writes dense.md there

averages over the dense streams: the 15 Hz clip and the ten sequences, with equal weights.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from camvid import SIZE, STREAMS, Training, checkpoints
from timing import interleaved, table, write
from ttt_adapt import StreamConfig
from ttt_adapt.arms import find_arm
from ttt_adapt.data import Clip, open_clips
from ttt_adapt.evaluation.report import Report
from ttt_adapt.evaluation.rows import Row, rows_of
from ttt_adapt.evaluation.runners import start
from ttt_adapt.evaluation.session import evaluate
from ttt_adapt.evaluation.studies import find_study, rows_of_study
from ttt_adapt.tasks.checkpoint import load_checkpoint

ARMS = (
    "fixed",
    "ln-adapt",
    "no-memory",
    "implicit",
    "explicit",
    "online",
    "online-gate",
    "every-4",
    "online-shuffled",
    "offline-200",
    "offline-oracle-200",
    "tent",
    "tent+class",
    "self-train",
    "self-train+class",
    "self-train-plain",
    "ema-teacher",
    "fixed+smooth",
    "online+smooth",
    "fixed+vote",
    "online+vote",
)
NORMS = ("norm-ema", "norm-blend", "online-norm-ema", "online-norm-blend")
"""In place of ln-adapt, where the encoder has BatchNorm."""
RATES = {"tent": 1e-7, "self-train": 1e-7, "self-train-plain": 1e-4, "ema-teacher": 1e-6}
"""Learning rates of the baselines, also below a modifier; `camvid_variants.py --arms` chose them."""
FRAMES = 25
"""Of the first clip, for the cost of an arm."""
DAVIS_SIZE, DAVIS_EPOCHS = (96, 160), 12
PARTS = ("arms", "cost", "window")


Job = tuple[str, list[Clip], list[Path], list[Path]]
"""Name, clips, joint checkpoints and main-task checkpoints: one of each per seed, or one for all."""


def camvid(data: Path, weights: Path, seeds: Sequence[int]) -> list[Job]:
    """Two encoders on two clips."""
    clips = open_clips(data / "camvid", STREAMS, SIZE)
    found = []
    for model in ("vit", "regnet"):
        pairs = checkpoints([Training(model, seed, data / "camvid", weights / f"{model}-{seed}") for seed in seeds])
        found.append((f"camvid-{model}", clips, [joint for _, joint in pairs], [main for main, _ in pairs]))
    return found


def davis(data: Path, weights: Path, seeds: Sequence[int]) -> list[Job]:
    """Each half of the sequences, by models trained on the other half."""
    names = [clip.name for clip in open_clips(data / "davis")]
    halves = {"davis-1": names[0::2], "davis-2": names[1::2]}
    found = []
    for half, streams in halves.items():
        others = tuple(name for name in names if name not in streams)
        trainings = [
            Training("vit", seed, data / "davis", weights / f"{half}-{seed}", others, DAVIS_SIZE, epochs=DAVIS_EPOCHS)
            for seed in seeds
        ]
        pairs = checkpoints(trainings)
        clips = open_clips(data / "davis", streams, DAVIS_SIZE)
        found.append((half, clips, [joint for _, joint in pairs], [main for main, _ in pairs]))
    return found


DENSE: dict[str, dict[str, Sequence[str]]] = {
    "CamVid, 15 Hz": {"camvid-vit": ["0016E5_val_c"]},
    "DAVIS": {"davis-1": [], "davis-2": []},
}
"""What `--average` averages over: jobs and their clips; all where none is named."""
STREAMS_OF = {"camvid": camvid, "davis": davis}


def rows(name: str, joint: Sequence[Path], main: Sequence[Path]) -> list[Row]:
    """The jointly trained fixed model first: all others are compared with it."""
    arms = [arm for arm in ARMS if arm != "ln-adapt"] + [*NORMS] if name.endswith("regnet") else ARMS
    changes = {arm: {"lr": RATES[base]} for arm in arms if (base := arm.partition("+")[0]) in RATES}
    found = rows_of(arms, joint, main, changes)
    return sorted(found, key=lambda row: row.label != "Fixed")


def write_costs(rows: Sequence[Row], clip: Clip, config: StreamConfig, out: Path) -> None:
    """What a frame costs each streaming arm, in forward passes of the fixed model: means over frames in turns."""
    streaming = {row.arm: row for row in rows if find_arm(row.arm).streaming}
    runners = {
        name: start(find_arm(name), load_checkpoint(row.checkpoints[0]), config, row.changes)
        for name, row in streaming.items()
    }
    frames = [clip[index][0] for index in range(min(FRAMES, len(clip)))]
    ms = interleaved({name: runner.step for name, runner in runners.items()}, frames, middle=statistics.mean)
    found = [{"arm": name, "forwards": value / ms["fixed"]} for name, value in ms.items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, found)
    print(table(found, ["arm", "forwards"]))


def write_average(results: Path) -> None:
    """How much each arm gains on the fixed model over the dense streams: mIoU in points, `dense.md` in `results`."""
    kinds = [gains(results, streams) for streams in DENSE.values()]
    rows = []
    for arm in (arm for arm in kinds[0] if all(arm in kind for kind in kinds)):
        by_seed = np.mean([kind[arm] for kind in kinds], axis=0)
        row = {"arm": arm} | {name: f"{kind[arm].mean():+.2f}" for name, kind in zip(DENSE, kinds, strict=True)}
        rows.append((by_seed.mean(), row | {"mean": f"{by_seed.mean():+.2f} ± {by_seed.std(ddof=1):.2f}"}))
    rows.sort(key=lambda row: -row[0])
    written = table([row for _, row in rows], ["arm", *DENSE, "mean"])
    (results / "dense.md").write_text(written + "\n")
    print(written)


def gains(results: Path, streams: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """Arm -> mIoU above the fixed model's, in points, [seeds], mean over the clips: all clips where none is named."""
    found: dict[str, list[list[float]]] = {}
    for name, clips in streams.items():
        report = Report.load(results / f"{name}-arms" / "report.json")
        for arm in report.arms:
            for clip in clips or report.clips:
                ours, fixed = ({r.seed: r.scores["miou"] for r in report.select(a, clip)} for a in (arm, "Fixed"))
                found.setdefault(report.marked(arm), []).append(
                    [100 * (ours[seed] - fixed[seed]) for seed in sorted(fixed)]
                )
    return {arm: np.mean(by_clip, axis=0) for arm, by_clip in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("TTT_ADAPT_DATA"), help="holds camvid/ and davis/")
    parser.add_argument("--only", choices=list(STREAMS_OF), nargs="+", default=list(STREAMS_OF))
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=Path, default=Path("runs/arms"))
    parser.add_argument("--out", type=Path, default=Path("runs/arms"), help="folder for the reports")
    parser.add_argument("--average", type=Path, metavar="RESULTS", help="average finished reports, and run nothing")
    options = parser.parse_args()
    if options.average:
        write_average(options.average)
        return
    config = StreamConfig.online()
    for kind in options.only:
        for name, clips, joint, main_task in STREAMS_OF[kind](Path(options.data), options.weights, options.seeds):
            seeds = options.seeds
            if "arms" in options.parts:
                evaluate(rows(name, joint, main_task), clips, config, seeds, options.out / f"{name}-arms")
            if "cost" in options.parts:
                write_costs(rows(name, joint, main_task), clips[0], config, options.out / f"{name}-arms" / "cost.json")
            if "window" in options.parts:
                study = find_study("window")
                sweep = rows_of_study(study, clips, joint)
                evaluate(sweep, clips, config, seeds, options.out / f"{name}-window", study=study)


if __name__ == "__main__":
    main()
