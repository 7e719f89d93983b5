"""A small checkpoint and a labelled clip for tests of arms and of the evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from conftest import settle_norms
from ttt_adapt import StreamConfig
from ttt_adapt.arms import Arm, find_arm
from ttt_adapt.evaluation.rows import Row
from ttt_adapt.evaluation.runners import RUNNERS, start
from ttt_adapt.objectives import Rotation
from ttt_adapt.tasks.calibrate import SourceStills, calibrate_checkpoint
from ttt_adapt.tasks.checkpoint import Checkpoint, build_model
from ttt_adapt.tasks.spec import ModelSpec

SIZE = (48, 64)
CLASSES = ("road", "car", "sky")
CONFIG = StreamConfig(window=3, batch_size=2, lr=1e-3, encoder_lr_scale=1.0)
VIT = {"encoder": "vit_tiny_patch16_224", "encoder_options": {"depth": 2, "embed_dim": 48, "num_heads": 3}}


def checkpoint(seed: int = 0, **changes) -> Checkpoint:
    torch.manual_seed(seed)
    cnn = {"encoder": "resnet18", "encoder_options": {"channels": [8, 16, 24, 32]}}
    spec = ModelSpec(**{**cnn, "classes": CLASSES, "size": SIZE, "branch": {}, "width": 16, **changes})
    model, branch = build_model(spec)
    settle_norms(model)
    return Checkpoint(model.eval(), branch, spec)


def frames(count: int = 4, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(seed)
    labels = (np.arange(SIZE[0])[:, None] // 16 + np.zeros(SIZE, int)).astype(np.uint8)
    labels[:4] = 255
    return [(random.integers(0, 256, (*SIZE, 3), dtype=np.uint8), labels) for _ in range(count)]


def arm_run_by(monkeypatch, make, name: str = "own", **attributes) -> Arm:
    """An arm with a runner of the test's own: `make(checkpoint, config)`."""
    monkeypatch.setitem(RUNNERS, name, make)
    return Arm(name, name.capitalize(), name, **attributes)


def write_clip(folder: Path, count: int, seed: int = 0) -> None:
    """A labelled clip as image files, with the class names beside it."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for index, (frame, labels) in enumerate(frames(count, seed)):
        Image.fromarray(frame).save(folder / "images" / f"{index}.png")
        Image.fromarray(labels).save(folder / "labels" / f"{index}.png")
    (folder.parent / "index.json").write_text(json.dumps({"classes": CLASSES, "ignore": 255}))


def two_rows(files: list[Path]) -> list[Row]:
    """The fixed and the online arm."""
    return [Row("fixed", "Fixed", tuple(files)), Row("online", "Online", tuple(files))]


def suited(name: str, seed: int = 0) -> Checkpoint:
    """A checkpoint that the arm applies to."""
    if name.startswith("ln-adapt"):
        return checkpoint(seed, **VIT)
    made = checkpoint(seed)
    if "calibration" in find_arm(name).needs:
        calibrate_checkpoint(made, SourceStills([frame for frame, _ in frames(9)]), choose=False)
    if name == "rotation":
        return Checkpoint(made.model, Rotation.attach(made.model, "backbone"), made.spec)
    if name == "calibrated":  # on darker frames than those of a stream
        calibrate_checkpoint(made, SourceStills([frame // 2 for frame, _ in frames(8, seed=9)]), choose=False)
    return made


def predictions(name: str, made: Checkpoint, config=CONFIG, clip=None) -> list[torch.Tensor]:
    clip = frames() if clip is None else clip
    arm = find_arm(name)
    runner = start(arm, made, config)
    try:
        if not arm.streaming:
            first = clip[0][0]
            runner.prepare([frame for frame, _ in clip], (lambda p: float(p(first).std())) if arm.oracle else None)
        return [runner.step(frame).clone() for frame, _ in clip]
    finally:
        runner.close()
