"""Runs and reports of numbers that are made up."""

from __future__ import annotations

from ttt_adapt.evaluation.report import Report, Run


def make_run(arm: str = "online", clip: str = "dusk", seed: int = 0, miou: float = 0.5, **changes) -> Run:
    scores = {"miou": miou, "miou_frames": miou - 0.1, "pixel_accuracy": 0.9, **changes.pop("scores", {})}
    values = {
        "scores": scores,
        "per_class": {"road": miou, "car": None},
        "per_frame": [miou, None, *[miou] * 10],
        "losses": [None] * 12 if arm == "fixed" else [1.0 / (frame + 1) for frame in range(12)],
        "ms_per_frame": 20.0 + seed,
    }
    return Run(arm=arm, clip=clip, seed=seed, **{**values, **changes})


def make_report() -> Report:
    report = Report(config={"window": 16}, environment={"torch": "2"})
    for seed in range(3):
        report.add(make_run("fixed", "dusk", seed, 0.4))
        report.add(make_run("online", "dusk", seed, 0.5 + 0.01 * seed))
        report.add(make_run("online", "day", seed, 0.6))
    return report


def sweep_report() -> Report:
    report = Report()
    for seed in range(2):
        for clip, base in (("dusk", 0.4), ("noon", 0.6)):
            report.add(make_run("fixed", clip, seed, base))
            for k in (1, 4, 16):
                report.add(make_run(f"k{k}", clip, seed, base + 0.01 * k + 0.001 * seed))
    return report


def marked_report() -> Report:
    report = Report(failures=[{"arm": "Offline", "clip": "noon", "seed": 2, "error": "RuntimeError: no"}])
    for seed in range(2):
        for clip in ("dusk", "noon"):
            for place, arm in enumerate(("Fixed", "Offline", "Oracle", "Shuffled")):
                run = make_run(arm, clip, seed, 0.4 + 0.1 * place)
                run.streaming, run.oracle = arm == "Fixed", arm == "Oracle"
                run.forwards = 1.0 if run.streaming else None
                report.add(run)
    report.runs = [run for run in report.runs if (run.arm, run.clip, run.seed) != ("Shuffled", "dusk", 0)]
    return report
