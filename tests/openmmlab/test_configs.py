"""Every config in `configs/` builds, and runs an iteration of training and of test, small and on small data."""

from __future__ import annotations

import math
import numbers
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner

import tiny
from small_configs import small_config
from ttt_adapt_openmmlab.arms import HOOK_ARMS

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.py") if path.parent.name != "_base_")
STREAMS = ("kitti-step", "coco-videos-instance", "coco-videos-panoptic")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    tiny.without_slow_logs(monkeypatch)


def is_arm(path: Path) -> bool:
    return path.stem.rpartition("_")[2] in HOOK_ARMS and "joint-mae" not in path.stem


def test_every_arm_has_a_config_for_every_stream():
    names = {path.stem for path in FILES}
    assert {f"mask2former_swin-s_{stream}_{arm}" for stream in STREAMS for arm in HOOK_ARMS} <= names


def resized(pipeline: list[dict], size: tuple[int, int]) -> tuple[int, int]:
    """The (H, W) that a test pipeline makes of a frame."""
    results = {"img": np.zeros((*size, 3), np.uint8)}
    for transform in pipeline:
        if "Resize" in transform.type:
            results = TRANSFORMS.build(transform).transform(results)
    return results["img"].shape[:2]


STREAMED = [path for path in FILES if "kitti-step" in path.stem or "camvid" in path.stem]


@pytest.mark.parametrize("path", STREAMED, ids=lambda path: path.stem)
def test_frames_have_one_size_in_the_test_run_and_in_a_script_and_the_papers_on_kitti_step(path):
    cfg = Config.fromfile(path)
    tiny.enter("mmseg")
    size = resized(cfg.test_dataloader.dataset.pipeline, (375, 1242))
    assert size == resized(cfg.test_pipeline, (375, 1242))
    assert size == ((618, 2048) if "kitti" in path.stem else (96, 128))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_runs_a_test(path, tmp_path):
    cfg = small_config(path, tmp_path)
    if "ann_file" in cfg.test_evaluator:
        cfg.test_evaluator.ann_file = str(tmp_path / "data" / "coco" / "instances.json")
    runner = Runner.from_cfg(cfg)
    scores = runner.test()
    assert scores
    assert all(isinstance(value, numbers.Real) for value in scores.values())
    if is_arm(path):
        summary = runner.message_hub.get_info("test/ttt")
        assert summary["arm"] == path.stem.rpartition("_")[2]
        assert summary["frames"] == len(runner.test_dataloader)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_trains(path, tmp_path):
    cfg = small_config(path, tmp_path)
    cfg.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 1}
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    runner = Runner.from_cfg(cfg)
    runner.train()
    losses = {name: runner.message_hub.get_scalar(name).current() for name in runner.message_hub.log_scalars}
    assert math.isfinite(losses["train/loss"])
    assert ("train/loss_mae" in losses) == ("JointMAE" in cfg.model.type)
