"""Generated videos in folders, and small mmseg configs that test on them."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_numbers = itertools.count()
CLASSES = ("low", "middle", "high")


def write_video(root: Path, name: str, numbers: list[int], size: tuple[int, int] = (48, 64), seed: int = 0) -> None:
    """Frames `images/<name>/<number>.png` that drift to the right, and their labels by brightness."""
    rng = np.random.default_rng([seed, *name.encode()])
    base = rng.integers(0, 256, (6, 16, 3)).astype(np.uint8)
    wide = np.asarray(Image.fromarray(base).resize((size[1] * 2, size[0]), Image.BICUBIC))
    for folder in ("images", "labels"):
        (root / folder / name).mkdir(parents=True, exist_ok=True)
    for i, number in enumerate(numbers):
        frame = np.roll(wide, 3 * i, axis=1)[:, : size[1]]
        noisy = np.clip(frame + rng.normal(0, 8, frame.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / "images" / name / f"{number:06d}.png")
        label = np.digitize(frame.mean(2), [85, 170]).astype(np.uint8)
        Image.fromarray(label).save(root / "labels" / name / f"{number:06d}.png")


def write_videos(root: Path, lengths: dict[str, int], size: tuple[int, int] = (48, 64)) -> Path:
    for name, length in lengths.items():
        write_video(root, name, list(range(length)), size)
    return root


MODEL: dict[str, Any] = {
    "type": "EncoderDecoder",
    "data_preprocessor": {
        "type": "SegDataPreProcessor",
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
        "bgr_to_rgb": True,
        "size": (48, 64),
    },
    "backbone": {
        "type": "ResNet",
        "depth": 18,
        "base_channels": 8,
        "num_stages": 2,
        "out_indices": (0, 1),
        "strides": (1, 2),
        "dilations": (1, 1),
        "norm_cfg": {"type": "BN"},
    },
    "decode_head": {
        "type": "FCNHead",
        "in_channels": 16,
        "in_index": 1,
        "channels": 8,
        "num_convs": 1,
        "concat_input": False,
        "num_classes": 3,
        "norm_cfg": {"type": "BN"},
        "align_corners": False,
    },
    "train_cfg": {},
    "test_cfg": {"mode": "whole"},
}


def joint_model(**branch: Any) -> dict[str, Any]:
    return {
        "type": "JointMAE",
        "model": copy.deepcopy(MODEL),
        "branch": {"decoder": "conv", "patch_size": 8, **branch},
    }


def loader_of(root: Path, **changes: Any) -> dict[str, Any]:
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}, {"type": "PackSegInputs"}]
    dataset = {
        "type": "BaseSegDataset",
        "data_root": str(root),
        "data_prefix": {"img_path": "images", "seg_map_path": "labels"},
        "img_suffix": ".png",
        "seg_map_suffix": ".png",
        "metainfo": {"classes": CLASSES},
        "reduce_zero_label": False,
        "pipeline": pipeline,
    }
    loader = {
        "batch_size": 1,
        "num_workers": 0,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": dataset,
    }
    return {**loader, **changes}


def hook(**changes: Any) -> dict[str, Any]:
    return {"type": "OnlineTTTHook", "window": 2, "batch_size": 2, "lr": 0.01, "offline_steps": 5, **changes}


def seg_config(root: Path, work_dir: Path, **changes: Any) -> dict[str, Any]:
    """A config of a test run, as a dict; keywords replace its entries."""
    config = {
        "default_scope": "mmseg",
        "custom_imports": {"imports": ["ttt_adapt_openmmlab"], "allow_failed_imports": False},
        "model": joint_model(),
        "test_dataloader": loader_of(root),
        "test_cfg": {"type": "TestLoop"},
        "test_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
        "custom_hooks": [hook()],
        "work_dir": str(work_dir),
        "randomness": {"seed": 0},
        "visualizer": {"type": "SegLocalVisualizer", "vis_backends": [{"type": "LocalVisBackend"}]},
        "log_level": "INFO",
        "experiment_name": f"run{next(_numbers)}",  # MMEngine keeps one log and one visualizer per name
    }
    return {**config, **changes}


def train_entries(root: Path, iterations: int = 2) -> dict[str, Any]:
    loader = loader_of(root, sampler={"type": "InfiniteSampler", "shuffle": True}, batch_size=2)
    loader["dataset"]["pipeline"] = [*loader["dataset"]["pipeline"]]
    return {
        "train_dataloader": loader,
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": iterations},
        "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.01}},
        "default_hooks": {
            "checkpoint": {"type": "CheckpointHook", "interval": iterations, "by_epoch": False},
            "logger": {"type": "LoggerHook", "interval": 1},
        },
        "log_processor": {"by_epoch": False},
    }


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text("\n".join(f"{name} = {value!r}" for name, value in config.items()) + "\n")
    return path
