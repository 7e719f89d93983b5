"""A small Mask2Former through the hook: fixed, calibrated statistics, gradient steps, and both; several seeds.

    python benchmarks/mask2former_calibrated.py --data CAMVID            # hours on one core; goes on where it stopped

Of each seed: the model trains on CamVid's daylight images for the main task, then jointly with its branch, as in
`configs/mask2former/`. It is calibrated once, on images of the training set and without a label. Each arm then
predicts each stream: the 15 Hz clip of a clear day, the same under two drifts, and the clip at dusk. The rule of the
calibration is chosen under night, noise, fog, rain, blur and JPEG; low contrast is none of them.

Writes OUT/seed-N.json after every run, and prints mIoU in percent, mean and deviation over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner

import ttt_adapt_openmmlab  # before mmseg: it stands in for operators that mmcv-lite lacks
from ttt_adapt import Calibration
from ttt_adapt.evaluation.environment import environment
from ttt_adapt.files import atomic_write
from ttt_adapt_openmmlab.stills import training_images

CONFIGS = Path(__file__).parents[1] / "configs" / "mask2former"
MAIN = CONFIGS / "mask2former_swin-mini_camvid-96x128.py"
JOINT = CONFIGS / "mask2former_swin-mini_joint-mae_camvid-96x128.py"
ONLINE = CONFIGS / "mask2former_swin-mini_camvid-96x128_online.py"
DAY, DUSK = "0016E5_val_c", "0001TP_train_a"
ARMS: dict[str, dict[str, Any]] = {
    "fixed": {"arm": "fixed"},
    "calibrated": {"arm": "calibrated"},
    "online": {"arm": "online", "norm_stats": "frozen"},
    "both": {"arm": "online", "norm_stats": "calibrated"},
}
"""Name -> arguments of the hook."""


def streams(drifts: list[str]) -> dict[str, tuple[str, str]]:
    """Name -> (clip, drift)."""
    return {"day": (DAY, "none"), **{f"day+{drift}": (DAY, drift) for drift in drifts}, "dusk": (DUSK, "none")}


def settled(file: Path, seed: int, options: argparse.Namespace, work: Path) -> Config:
    """A config with this data set, seed and folder."""
    cfg = Config.fromfile(file)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(options.data)
    cfg.randomness = {"seed": seed}
    cfg.work_dir = str(work)
    cfg.experiment_name = f"{work.name}-{time.time_ns()}"  # MMEngine keeps one log per name
    cfg.train_cfg.max_iters = options.iterations
    warm, rest = cfg.param_scheduler
    warm.end = rest.begin = min(warm.end, options.iterations // 2)
    rest.end = options.iterations
    cfg.default_hooks.checkpoint.interval = max(options.iterations // 3, 1)
    return cfg


def trained(seed: int, options: argparse.Namespace) -> Path:
    """The checkpoint of the joint training of this seed; a training that was stopped goes on."""
    folder = options.work / f"seed-{seed}"
    checkpoint = None
    for name, file in (("main", MAIN), ("joint", JOINT)):
        cfg = settled(file, seed, options, folder / name)
        last = folder / name / f"iter_{options.iterations}.pth"
        if not last.is_file():
            cfg.load_from, cfg.resume = checkpoint, (folder / name / "last_checkpoint").is_file()
            if cfg.resume:
                cfg.load_from = None  # the latest of the work dir
            Runner.from_cfg(cfg).train()
        checkpoint = str(last)
    return last


def calibrated(seed: int, checkpoint: Path, options: argparse.Namespace) -> tuple[Path, float]:
    """The file of the calibration of this seed, and the seconds that it took; 0 where it was there."""
    file = checkpoint.with_suffix(".safetensors")
    if file.is_file():
        return file, 0.0
    cfg = settled(ONLINE, seed, options, checkpoint.parent)
    runner = Runner.from_cfg(cfg)
    runner.load_checkpoint(str(checkpoint))
    started = time.perf_counter()
    ttt_adapt_openmmlab.calibrate(runner.model, training_images(cfg, options.stills), cfg=cfg).save(file)
    return file, time.perf_counter() - started


def tested(
    seed: int, stream: tuple[str, str], arm: dict[str, Any], checkpoint: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """One test run through the hook: all scores, and what the hook logs."""
    clip, drift = stream
    cfg = settled(ONLINE, seed, options, checkpoint.parent / "test")
    cfg.load_from = str(checkpoint)
    dataset = cfg.test_dataloader.dataset
    dataset.clips = [clip]
    dataset.pipeline.insert(1, {"type": "DriftFrame", "drift": drift, "seed": seed})
    file = str(checkpoint.with_suffix(".safetensors"))
    cfg.custom_hooks = [{**cfg.custom_hooks[0], **arm, "seed": seed, "calibration": file}]
    runner = Runner.from_cfg(cfg)
    started = time.perf_counter()
    scores = runner.test()
    seconds = time.perf_counter() - started
    return {**scores, "ttt": runner.message_hub.get_info("test/ttt"), "seconds": seconds}


def run_seed(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """All that is missing of a seed; the report is written after every run."""
    out = options.out / f"seed-{seed}.json"
    settings = {"seed": seed, "iterations": options.iterations, "stills": options.stills}
    report: dict[str, Any] = {**settings, "environment": environment(), "streams": {}}
    if out.is_file():
        report = json.loads(out.read_text())
        if any(report.get(name) != value for name, value in settings.items()):
            raise SystemExit(f"{out} is of other settings than {settings}: remove it, or name another --out")
    wanted = streams(options.drifts)
    if all(arm in report["streams"].get(name, {}) for name in wanted for arm in ARMS):
        return report
    checkpoint = trained(seed, options)
    file, seconds = calibrated(seed, checkpoint, options)
    found = Calibration.load(file)
    report.setdefault("calibration", {"rule": vars(found.rule), "record": found.record, "seconds": seconds})
    for name, stream in wanted.items():
        for arm, arguments in ARMS.items():
            rows = report["streams"].setdefault(name, {})
            if arm not in rows:
                rows[arm] = tested(seed, stream, arguments, checkpoint, options)
                save(report, out)
    return report


def save(report: dict[str, Any], out: Path) -> None:
    """Write a report; an old one stays until the new one is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as part:
        part.write_text(json.dumps(report, indent=1) + "\n")


def table(reports: list[dict[str, Any]], drifts: list[str]) -> str:
    """mIoU in percent of every stream and arm, mean and deviation over the seeds."""
    lines = ["| stream | " + " | ".join(ARMS) + " |", "|---|" + "---:|" * len(ARMS)]
    for stream in streams(drifts):
        cells = []
        for arm in ARMS:
            values = [report["streams"][stream][arm]["stream/mIoU"] for report in reports]
            deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{deviation}")
        lines.append(f"| {stream} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("TTT_ADAPT_DATA")
    parser.add_argument("--data", type=Path, default=Path(data) / "camvid" if data else None, help="CamVid's clips")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--drifts", nargs="+", default=["night:3", "low-contrast:3"])
    parser.add_argument("--iterations", type=int, default=1500, help="of each of the two trainings")
    parser.add_argument("--stills", type=int, default=40)
    parser.add_argument("--work", type=Path, default=Path("runs/mask2former_calibrated"), help="for checkpoints")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mask2former_calibrated")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("name the folder of CamVid's clips by --data, or set TTT_ADAPT_DATA")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    reports = [run_seed(seed, options) for seed in options.seeds]
    print(table(reports, options.drifts))


if __name__ == "__main__":
    main()
