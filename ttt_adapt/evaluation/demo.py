"""The demo: a small model adapts to a rendered street that drifts to night, fog and rain, and back each time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ttt_adapt.arms import find_arm
from ttt_adapt.config import StreamConfig
from ttt_adapt.data.street import WEIGHTS, StreetClip
from ttt_adapt.errors import ConfigError
from ttt_adapt.evaluation.demo_video import write_pictures
from ttt_adapt.evaluation.environment import environment
from ttt_adapt.evaluation.report import Report
from ttt_adapt.evaluation.run_arm import run_arm
from ttt_adapt.evaluation.stream_plot import plot_stream
from ttt_adapt.evaluation.tables import markdown_table
from ttt_adapt.files import check_place, output_folder, refuse_existing
from ttt_adapt.tasks.checkpoint import load_checkpoint
from ttt_adapt.view.terminal import progress_bar


def run_demo(
    out: Path,
    frames: int,
    seed: int,
    config: StreamConfig | None = None,
    device: torch.device | str = "cpu",
    arm: str = "calibrated",
    overwrite: bool = False,
) -> Report:
    """Stream the rendered scene through the fixed model and an arm; write the table, the video and the plot.

    Every number is measured in this run, on this machine.

    Args:
        out: folder for demo.mp4, demo.png (a frame of it at night), stream.png, report.json and table.md.
        frames: length of the stream.
        seed: which street, and the seed of adaptation.
        config: of an arm that adapts weights; None: `StreamConfig.online()`.
        device: where to run.
        arm: what runs beside the fixed model.
        overwrite: replace the results of an earlier demo.

    Raises:
        ConfigError: `out` is not empty, there is no such arm, it sees the whole clip first, or it does not read the
            configuration.
    """
    chosen = find_arm(arm)
    if not chosen.streaming or chosen.name == "fixed":
        raise ConfigError(f"arm is {arm!r}; the demo shows the fixed model beside another arm that streams")
    if config is not None and not chosen.adapts:
        raise ConfigError(f"arm {arm} adapts no weights, so a configuration would change nothing: choose arm online")
    check_place(out, folder=True)
    refuse_existing(out, overwrite)
    config = StreamConfig.online() if config is None else config
    checkpoint = load_checkpoint(WEIGHTS, device)
    output_folder(out, folder=True)
    street = StreetClip(seed, frames, checkpoint.spec.size)
    with progress_bar("render the street", frames) as advance:
        for _ in street:
            advance()
    report = Report(
        {"config": asdict(config), "frames": frames, "seed": seed, "size": list(checkpoint.spec.size)}, environment()
    )
    predictions: dict[str, list[np.ndarray]] = {"fixed": [], chosen.name: []}
    for name, kept in predictions.items():
        with progress_bar(find_arm(name).title, frames) as advance:

            def keep(_index: int, _frame: np.ndarray, prediction: np.ndarray, miou: float, loss: float | None) -> None:
                kept.append(prediction)  # noqa: B023
                advance(loss if loss is not None else f"this frame: mIoU {miou:.3f}")

            run = run_arm(
                find_arm(name), checkpoint, street, config.replace(seed=seed), name="street", label=name, on_frame=keep
            )
            report.add(run)
    write_pictures(out / "demo.mp4", out / "demo.png", street, predictions["fixed"], predictions[chosen.name])
    weather = [street.weather(index).kind for index in range(frames)]
    plot_stream(out / "stream.png", report.runs, "A street that drifts and comes back", weather)
    report.save(out / "report.json")
    (out / "table.md").write_text(markdown_table(report), encoding="utf-8")
    return report
