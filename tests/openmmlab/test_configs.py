"""Every config in `configs/` builds, and runs an iteration of training and of test, small and on small data."""

from __future__ import annotations

import math
import numbers
from pathlib import Path
from typing import Any

import mmengine.config.config
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner

import miniatures
import tiny
import ttt_adapt_openmmlab  # noqa: F401

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.py") if path.parent.name != "_base_")
ARMS = {"fixed", "no-memory", "implicit", "explicit", "online", "paper", "offline"}
STREAMS = ("kitti-step", "coco-videos-instance", "coco-videos-panoptic")
SMALL = (64, 64)  # square: mmseg takes (height, width) and mmdet (width, height)
NUMBERS = {256: 32, 1024: 64, 2048: 64, 128: 16, 512: 32, 12544: 64}
SETTINGS: dict[str, dict[str, Any]] = {
    "RandomChoiceResize": {"scales": [64]},
    "RandomResize": {"scale": (64, 64)},
    "Resize": {"scale": (64, 64)},
    "RandomCrop": {"crop_size": SMALL},
    "BatchFixedSizePad": {"size": SMALL},
    "SwinTransformer": {"embed_dims": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "init_cfg": None},
    "MixVisionTransformer": {"embed_dims": 8, "num_layers": [1, 1, 1, 1], "init_cfg": None},
    "ResNetV1c": {"depth": 50, "base_channels": 8, "stem_channels": 8, "init_cfg": None},
    "SegformerHead": {"in_channels": [8, 16, 40, 64], "channels": 16},
    "DepthwiseSeparableASPPHead": {"in_channels": 256, "channels": 16, "c1_in_channels": 32, "c1_channels": 8},
    "FCNHead": {"in_channels": 128, "channels": 16},
    "GN": {"num_groups": 8},
    "OnlineTTTHook": {"batch_size": 2, "window": 2, "offline_steps": 3},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(Runner, "_log_env", lambda self, env: None)  # asks compilers for their versions
    monkeypatch.setattr(mmengine.config.config, "FormatCode", lambda text, **_: (text, True))  # for logs; takes seconds


def small(node: Any, key: str = "") -> Any:
    """A config with every width, depth and image size made small."""
    if isinstance(node, dict):
        kind = str(node.get("type", "")).split(".")[-1]
        changed = {name: small(value, name) for name, value in node.items() if name != "pretrained"}
        if kind == "Mask2FormerHead":
            changed |= {"in_channels": [16, 32, 64, 128], "num_queries": 6}
        if kind == "OnlineTTTHook" and "crop_size" in node:
            changed["crop_size"] = (32, 48)
        if kind in ("SegDataPreProcessor", "SegDataPreprocessor"):
            changed["size"] = SMALL
        return changed | SETTINGS.get(kind, {})
    if isinstance(node, list | tuple):
        return type(node)(small(value) for value in node)
    if key in ("num_layers",) and isinstance(node, int):
        return min(node, 3)
    widths = ("embed_dims", "feat_channels", "out_channels", "feedforward_channels", "num_feats", "num_points")
    return NUMBERS.get(node, node) if key in widths and isinstance(node, int) else node


def read(path: Path, tmp_path: Path) -> Config:
    """The config, small, on miniature data, without downloads."""
    config = Config.fromfile(path)
    settings = dict(config._cfg_dict.to_dict())
    cfg = Config({**settings, **{name: small(settings[name]) for name in settings if name != "optim_wrapper"}})
    cfg.work_dir, cfg.load_from, cfg.resume = str(tmp_path / "work"), None, False
    cfg.experiment_name = f"{path.stem}-{tmp_path.name}"  # runs of one second share their scalars without a name
    cfg.visualizer = {"type": "Visualizer", "vis_backends": []}
    cfg.default_hooks = {"logger": {"type": "LoggerHook", "interval": 1}}
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.num_workers, loader.persistent_workers = 0, False
        use_miniature(loader.dataset, tmp_path / "data")
    cfg.train_dataloader.batch_size = 2
    return cfg


def use_miniature(dataset: Any, root: Path) -> None:
    kind = dataset.type.split(".")[-1]
    if kind == "CityscapesDataset":
        dataset.data_root = str(miniatures.cityscapes(root / "cityscapes"))
        dataset.seg_map_suffix = "_gtFine_labelTrainIds.png"
    elif kind == "KittiStep":
        for split, videos in (("train", None), ("val", dict.fromkeys(ttt_val(), 1))):
            miniatures.kitti_step(root / "kitti", split, videos)
        dataset.data_root = str(root / "kitti")
    elif kind == "CocoVideos":
        dataset.data_root = str(miniatures.coco_videos(root / "videos", videos={"bar": 2, "tokyo": 1}))
    elif kind == "CamVidStream":
        names = dict.fromkeys(dataset.clips, 2)
        dataset.data_root = str(miniatures.camvid(root / "-".join(names), names))
    elif kind == "ColourPictures":
        for i, folder in enumerate(("n01440764", "n01440764", "n01443537")):
            miniatures.picture(root / "colours" / folder / f"{i}.JPEG", i, (40, 56))
        dataset.data_root = str(root / "colours")
    else:
        task = "panoptic" if "Panoptic" in kind else "instances"
        prefix = {"img": "images/"} | ({"seg": "panoptic/"} if task == "panoptic" else {})
        dataset.update(data_root=str(miniatures.coco(root / "coco")), ann_file=f"{task}.json", data_prefix=prefix)
        if "filter_cfg" in dataset:
            dataset.filter_cfg.min_size = 1


def ttt_val() -> tuple[str, ...]:
    from ttt_adapt_openmmlab.datasets.kitti_step import PAPER_VAL

    return PAPER_VAL


def is_arm(path: Path) -> bool:
    return path.stem.rpartition("_")[2] in ARMS and "joint-mae" not in path.stem


def test_every_arm_has_a_config_for_every_stream():
    names = {path.stem for path in FILES}
    assert {f"mask2former_swin-s_{stream}_{arm}" for stream in STREAMS for arm in ARMS} <= names


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
    cfg = read(path, tmp_path)
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
    cfg = read(path, tmp_path)
    cfg.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 1}
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    runner = Runner.from_cfg(cfg)
    runner.train()
    losses = {name: runner.message_hub.get_scalar(name).current() for name in runner.message_hub.log_scalars}
    assert math.isfinite(losses["train/loss"])
    assert ("train/loss_mae" in losses) == ("JointMAE" in cfg.model.type)
