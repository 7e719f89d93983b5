"""Configs of `configs/` and of the documents, made small; and a config of a joint model as a page shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config

import miniatures
from ttt_adapt_openmmlab.datasets.kitti_step import PAPER_VAL

IMAGES = 8  # in each training set: a calibration takes no fewer
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

STOCK = """
default_scope = 'mmseg'
model = {plain!r}
"""
JOINT = """
_base_ = ['{base}']
custom_imports = dict(imports=['ttt_adapt_openmmlab'], allow_failed_imports=False)
model = dict({delete}type='JointMAE', model=_base_.model,
             branch=dict(encoder='backbone', decoder='copy_head', mask_ratio=0.8))
"""


def joint_config(tmp_path: Path, plain: dict, delete: str = "") -> Config:
    """The config of a plain model, and that of a JointMAE which inherits from it."""
    (tmp_path / "stock.py").write_text(STOCK.format(plain=plain))
    (tmp_path / "joint.py").write_text(JOINT.format(base="stock.py", delete=delete))
    return Config.fromfile(tmp_path / "joint.py")


def small(node: Any, key: str = "") -> Any:
    """A config with every width, depth and image size made small."""
    if isinstance(node, dict):
        kind = str(node.get("type", "")).split(".")[-1]
        changed = {name: small(value, name) for name, value in node.items() if name != "pretrained"}
        if kind == "Mask2FormerHead":
            changed |= {"in_channels": [16, 32, 64, 128], "num_queries": 6}
        if kind == "OnlineTTTHook" and "crop_size" in node:
            changed["crop_size"] = (32, 48)
        if kind == "OnlineTTTHook" and "stills" in node:
            changed["stills"] = IMAGES
        if kind in ("SegDataPreProcessor", "SegDataPreprocessor"):
            changed["size"] = SMALL
        return changed | SETTINGS.get(kind, {})
    if isinstance(node, list | tuple):
        return type(node)(small(value) for value in node)
    if key in ("num_layers",) and isinstance(node, int):
        return min(node, 3)
    widths = ("embed_dims", "feat_channels", "out_channels", "feedforward_channels", "num_feats", "num_points")
    return NUMBERS.get(node, node) if key in widths and isinstance(node, int) else node


def small_config(path: Path, tmp_path: Path) -> Config:
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
        dataset.data_root = str(miniatures.cityscapes(root / "cityscapes", IMAGES))
        dataset.seg_map_suffix = "_gtFine_labelTrainIds.png"
    elif kind == "KittiStep":
        for split, videos in (("train", None), ("val", dict.fromkeys(PAPER_VAL, 1))):
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
        dataset.update(
            data_root=str(miniatures.coco(root / "coco", IMAGES)), ann_file=f"{task}.json", data_prefix=prefix
        )
        if "filter_cfg" in dataset:
            dataset.filter_cfg.min_size = 1
