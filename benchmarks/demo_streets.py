"""What the demo gains on streets that nobody tuned on: streets 200 to 209, one table.

    OMP_NUM_THREADS=1 python benchmarks/demo_streets.py                                 # 3 minutes on one idle core
    OMP_NUM_THREADS=1 python benchmarks/demo_streets.py --arms fixed calibrated online --streets 200 204
    OMP_NUM_THREADS=1 python benchmarks/demo_streets.py --streets 50 53 --out TUNING    # the streets to tune on

Every arm runs with the preset. Each street has a report of its own, `street-200.json`, that is saved
after every run; given again, the command goes on where it stopped, and adds arms, seeds and streets. `table.md` has the
streets of the last command: mIoU over the stream, its relative gain over the first arm, and the paired difference of
the frame mIoU with its 95 % interval. Numbers of 200 and more are for this table alone: tune on 50 to 53.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ttt_adapt import StreamConfig
from ttt_adapt.arms import find_arm
from ttt_adapt.data.street import WEIGHTS, StreetClip
from ttt_adapt.errors import StateError
from ttt_adapt.evaluation.differences import Difference, average_difference, paired_difference, runs_by_seed
from ttt_adapt.evaluation.environment import environment
from ttt_adapt.evaluation.report import Report
from ttt_adapt.evaluation.run_arm import run_arm
from ttt_adapt.files import file_digest
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint

CONFIG = StreamConfig.online()
OUT = Path(__file__).parent / "results" / "demo-streets"


def street_report(
    file: Path, checkpoint: Checkpoint, street: int, arms: Sequence[str], seeds: Sequence[int], frames: int
) -> Report:
    """The report of one street: what `file` holds, and the runs that it lacks.

    Raises:
        StateError: the file was made with another configuration, other weights or another length.
    """
    settings = {"config": asdict(CONFIG), "weights": file_digest(WEIGHTS), "frames": frames, "street": street}
    report = _go_on(file, settings) if file.exists() else Report(settings, environment())
    wanted = [(arm, seed) for arm in arms for seed in seeds if not report.has(arm, f"street {street}", seed)]
    clip = StreetClip(street, frames, checkpoint.spec.size)
    for arm, seed in wanted:
        run = run_arm(find_arm(arm), checkpoint, clip, CONFIG.replace(seed=seed), name=f"street {street}", label=arm)
        report.add(run)
        report.save(file)
        print(f"street {street}, {arm}, seed {seed}: mIoU {100 * run.scores['miou']:.2f}", flush=True)
    return report


def _go_on(file: Path, settings: dict[str, Any]) -> Report:
    report = Report.load(file)
    plain = json.loads(json.dumps(settings))
    if changed := [name for name, value in plain.items() if report.config.get(name) != value]:
        raise StateError(
            f"{file} was made with other values of {', '.join(changed)}; move it away, or choose another --out"
        )
    return report


def summary(reports: Sequence[Report], arms: Sequence[str], seeds: Sequence[int]) -> str:
    """The Markdown table: a row per street and one for their mean, with the first arm as the reference."""
    runs = [run for report in reports for run in report.runs if run.arm in arms and run.seed in seeds]
    whole = Report({"rows": list(arms)}, runs=runs)
    reference, *others = arms
    header = ["street", reference, *(text for arm in others for text in (arm, "points [95 %]"))]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    gains: dict[str, list[float]] = {arm: [] for arm in others}
    for clip in whole.clips:
        base = _miou(whole, reference, clip)
        cells = [clip.split()[1], f"{base:.2f}"]
        for arm in others:
            gains[arm].append(100 * (_miou(whole, arm, clip) / base - 1))
            cells += [f"{_miou(whole, arm, clip):.2f} ({gains[arm][-1]:+.1f} %)"]
            cells += [_interval(paired_difference(whole, arm, reference, clip))]
        lines.append("| " + " | ".join(cells) + " |")
    cells = ["**mean**", f"{np.mean([_miou(whole, reference, clip) for clip in whole.clips]):.2f}"]
    for arm in others:
        mean = np.mean([_miou(whole, arm, clip) for clip in whole.clips])
        cells += [f"{mean:.2f} ({np.mean(gains[arm]):+.1f} %)", _interval(average_difference(whole, arm, reference))]
    lines.append("| " + " | ".join(cells) + " |")
    counts = [f"{arm} gains on {sum(gain > 0 for gain in gains[arm])} of {len(gains[arm])} streets" for arm in others]
    note = (
        f"mIoU in percent over {reports[0].config['frames']} frames, means over seeds {', '.join(map(str, seeds))}; in "
        f"brackets the change relative to {reference}, in the last row the mean of the streets' changes. Points: the "
        "paired difference of the frame mIoU, with an interval over frames and seeds, in the last row over streets and "
        f"seeds. {'; '.join(counts)}."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def _miou(report: Report, arm: str, clip: str) -> float:
    """In percent, the mean over seeds."""
    return 100 * float(np.mean([run.scores["miou"] for run in runs_by_seed(report, arm, clip).values()]))


def _interval(difference: Difference | None) -> str:
    assert difference is not None  # every arm ran every street with every seed
    text = f"{100 * difference.mean:+.2f}"
    if difference.low is None or difference.high is None:
        return text
    return f"{text} [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streets", type=int, nargs=2, default=[200, 209], metavar=("FIRST", "LAST"))
    parser.add_argument("--arms", nargs="+", default=["fixed", "calibrated"], help="the first is the reference")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of adaptation")
    parser.add_argument("--frames", type=int, default=240)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if len(options.arms) < 2:
        parser.error("--arms needs two arms or more: the first is the reference")
    arms = [find_arm(arm).name for arm in options.arms]
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = load_checkpoint(WEIGHTS)
    first, last = options.streets
    reports = []
    for street in range(first, last + 1):
        file = options.out / f"street-{street}.json"
        reports.append(street_report(file, checkpoint, street, arms, options.seeds, options.frames))
        (options.out / "table.md").write_text(summary(reports, arms, options.seeds), encoding="utf-8")
    print(f"\n{summary(reports, arms, options.seeds)}")


if __name__ == "__main__":
    main()
