"""The demo: a small model adapts to a rendered street that drifts to night, fog and rain, and back each time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ttt_adapt.arms import ARMS
from ttt_adapt.config import StreamConfig
from ttt_adapt.data.street import PALETTE, WEIGHTS, StreetClip
from ttt_adapt.evaluation.environment import environment
from ttt_adapt.evaluation.plots import plot_stream
from ttt_adapt.evaluation.report import Report
from ttt_adapt.evaluation.run_arm import run_arm
from ttt_adapt.evaluation.tables import markdown_table
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint
from ttt_adapt.video import VideoWriter
from ttt_adapt.view.overlay import blend, panels
from ttt_adapt.view.reconstruction import reconstruction_image
from ttt_adapt.view.terminal import progress_bar

CONFIG = StreamConfig.online(source_pull=0.02)
"""Chosen by `benchmarks/demo_variants.py` on streets that the demo does not show. The street changes much, so the pull
toward the source weights is weak."""


def run_demo(
    out: Path, frames: int, seed: int, config: StreamConfig = CONFIG, device: torch.device | str = "cpu"
) -> Report:
    """Stream the rendered scene through the fixed and the adapting model; write the table, the video and the plot.

    Every number is measured in this run, on this machine.

    Args:
        out: folder for demo.mp4, stream.png, report.json and table.md.
        frames: length of the stream.
        seed: which street, and the seed of adaptation.
        config: of the online arm.
        device: where to run.
    """
    checkpoint = load_checkpoint(WEIGHTS, device)
    out.mkdir(parents=True, exist_ok=True)
    size = checkpoint.spec.size
    street = StreetClip(seed, frames, size)
    with progress_bar("render the street", frames) as advance:
        clip = []
        for sample in street:
            clip.append(sample)
            advance()
    report = Report({"config": asdict(config), "frames": frames, "seed": seed, "size": list(size)}, environment())
    predictions: dict[str, list[np.ndarray]] = {"fixed": [], "online": []}
    rebuilt: list[np.ndarray] = []
    for arm in ("fixed", "online"):
        with progress_bar(ARMS[arm].title, frames) as advance:

            def keep(_index: int, frame: np.ndarray, prediction: np.ndarray, miou: float, loss: float | None) -> None:
                predictions[arm].append(prediction)  # noqa: B023
                if arm == "online":  # noqa: B023
                    rebuilt.append(_reconstruct(checkpoint, frame))
                advance(loss if loss is not None else f"mIoU {miou:.3f}")

            report.add(
                run_arm(ARMS[arm], checkpoint, clip, config.replace(seed=seed), name="street", label=arm, on_frame=keep)
            )
    _write_video(out / "demo.mp4", street.fps, [frame for frame, _ in clip], predictions, rebuilt)
    plot_stream(out / "stream.png", report.runs, "A street that drifts from clear day to dusk, fog and rain")
    report.save(out / "report.json")
    (out / "table.md").write_text(markdown_table(report), encoding="utf-8")
    return report


def _reconstruct(checkpoint: Checkpoint, frame: np.ndarray) -> np.ndarray:
    device = next(checkpoint.model.parameters()).device
    normalize = checkpoint.spec.preprocess(device)
    x = normalize(frame)
    seen = checkpoint.mae_branch.reconstruct(x, generator=torch.Generator(device).manual_seed(0))
    return reconstruction_image(seen, x, normalize)


def _write_video(
    path: Path,
    fps: float | None,
    frames: list[np.ndarray],
    predictions: dict[str, list[np.ndarray]],
    rebuilt: list[np.ndarray],
) -> None:
    palette = np.asarray(PALETTE, dtype=np.uint8)
    with VideoWriter(path, fps) as writer, progress_bar("write the video", len(frames)) as advance:
        for frame, fixed, online, image in zip(
            frames, predictions["fixed"], predictions["online"], rebuilt, strict=True
        ):
            pictures = {
                "frame": frame,
                "fixed model": blend(frame, fixed, palette),
                "adapted model": blend(frame, online, palette),
                "reconstruction": image,
            }
            writer.write(panels({name: _twice(picture) for name, picture in pictures.items()}, columns=2))
            advance()


def _twice(picture: np.ndarray) -> np.ndarray:
    """Twice the size, so that small frames fill a screen."""
    return picture.repeat(2, axis=0).repeat(2, axis=1)
