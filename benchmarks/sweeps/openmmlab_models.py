"""mmsegmentation and mmdetection: one config of every family, from the configs in the installed packages.

The rule of the list: of each folder of configs with a model of its own, the config whose file name has the lowest
`cost`, then the shortest, then the first; folders in `WITHOUT_MODELS` hold data sets, schedules and tricks of training
on models of other folders. Images are small, pretrained files are left out, everything else is the config's.

Per config: the model builds, a `JointMAE` trains for one iteration on made-up labels, three frames are streamed through
the config's test pipeline, masks hide, gradients are there, and afterwards the model is as it was.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sweeps.checks import (
    AS_SUGGESTED,
    FAILS,
    NOT_BUILT,
    REFUSED,
    Broken,
    check_gradients,
    check_masks,
    finite,
    statistics_of_images,
    told,
)
from sweeps.subject import Snapshot, Subject, leaves
from ttt_adapt import StreamConfig, TTTAdaptError

SIZE = (128, 160)
CONFIG = StreamConfig(window=2, batch_size=1)
PACKAGES = ("mmseg", "mmdet")
PARTS = ("models", "apis", "datasets.transforms")
WITHOUT_MODELS = re.compile(
    "_base_|common|albu_example|cityscapes|deepfashion|dsdl|instaboost|legacy_1.x|lvis|misc|objects365|openimages|"
    "pascal_voc|resnet_strikes_back|scratch|seesaw_loss|selfsup_pretrain|simple_copy_paste|strong_baselines|v3det|"
    "wider_face|timm_example|reid"
)
LARGE = re.compile("x101|r101|r152|101|hourglass104|swin-[lb]|vit-[bhlg]|large|[-_][lx]_|w40|w48|b[45]")
SMALL = re.compile("r18|r50|tiny|swin-t|mit-b0|[-_][st]_|atto|m-v2|w18")


def prepare() -> None:
    """Import what every model needs."""
    for module in ("ttt_adapt_openmmlab", *(f"{package}.{part}" for package in PACKAGES for part in PARTS)):
        importlib.import_module(module)  # ours first: it stands in for what mmcv-lite lacks


@functools.cache
def _files() -> dict[str, Path]:
    """Name of a model, "mmseg/fcn" -> its config."""
    found = {}
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent / ".mim" / "configs"
        for folder in sorted(path for path in root.iterdir() if not WITHOUT_MODELS.fullmatch(path.name)):
            if files := sorted(folder.glob("*.py")):
                found[f"{package}/{folder.name}"] = min(files, key=lambda file: (cost(file.stem), len(file.stem)))
    return found


def cost(name: str) -> int:
    """How large the model of a config is, by the words in its name: lower is smaller."""
    return 2 * bool(LARGE.search(f"{name}_")) - bool(SMALL.search(f"{name}_"))


def names() -> list[str]:
    """The families of the sweep."""
    return list(_files())


def group(name: str) -> str:
    """The package of a family."""
    return name.partition("/")[0]


def check(name: str) -> dict[str, Any]:
    """All checks of the config of a family."""
    found: dict[str, Any] = {"status": NOT_BUILT, "config": _files()[name].name, "checks": {}}
    try:
        config, plain = _built(name)
    except TTTAdaptError as error:
        return found | {"status": REFUSED, "reason": told(error)}
    except Exception as error:
        return found | {"reason": told(error)}
    status, stages = AS_SUGGESTED, _stages(config, plain, group(name))
    for stage, run in stages:
        try:
            run()
            found["checks"][stage] = "ok"
        except Exception as error:
            found["checks"][stage] = told(error)
            status = REFUSED if isinstance(error, TTTAdaptError) else FAILS
            found["reason"] = f"{stage}: {told(error)}"
            break
    return found | {"status": status}


def _built(name: str) -> tuple[Any, nn.Module]:
    """The config, small, and its model in evaluation mode."""
    from mmengine.config import Config
    from mmengine.logging import MessageHub
    from mmengine.registry import MODELS, init_default_scope

    config = Config.fromfile(_files()[name])
    init_default_scope(group(name))
    hub = MessageHub.get_current_instance()  # some losses ask how far the training is
    for key, value in {"iter": 0, "epoch": 0, "max_iters": 10, "max_epochs": 1}.items():
        hub.update_info(key, value)
    for node in _dicts(config._cfg_dict):
        _make_small(node, group(name))
    model = config.model
    if model.get("data_preprocessor") is None and config.get("data_preprocessor") is not None:
        model.data_preprocessor = config.data_preprocessor
    torch.manual_seed(0)
    built = MODELS.build(model)
    built.init_weights()
    built.cfg = config
    return config, built.eval()


def _dicts(node: Any) -> Iterator[Any]:
    """All dicts in a config, the outer ones first."""
    if isinstance(node, dict):
        yield node
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        yield from _dicts(value)


def _make_small(node: Any, package: str) -> None:
    """Take pretrained files and random sizes out of one dict of a config, and make its images small."""
    for key in ("pretrained", "checkpoint"):
        if isinstance(node.get(key), str):
            node[key] = None
    if isinstance(node.get("init_cfg"), dict) and node["init_cfg"].get("type") == "Pretrained":
        node["init_cfg"] = None
    if node.get("batch_augments") is not None:  # they resize to sizes of their own
        node["batch_augments"] = None
    kind = str(node.get("type", ""))
    if "Resize" in kind or kind.endswith("Pad"):
        for key in ("scale", "size", "img_scale"):
            if node.get(key) is not None:
                node[key] = SIZE[::-1]
    if kind.endswith("SegDataPreProcessor"):
        node["size"] = SIZE
        node.pop("size_divisor", None)
    if package == "mmseg" and node.get("mode") == "slide":
        node |= {"crop_size": (SIZE[0], SIZE[0]), "stride": (96, 96)}


def _stages(config: Any, plain: nn.Module, package: str) -> list[tuple[str, Any]]:
    """Name and function of each check, to be called in this order."""
    import ttt_adapt_openmmlab

    made: dict[str, Any] = {}

    def attach() -> None:
        _settle(plain)
        before = Snapshot.of(plain)
        made["joint"] = ttt_adapt_openmmlab.JointMAE(model=plain)
        if left := before.differences(plain):
            raise Broken(f"attaching left {', '.join(left)}")

    def train() -> None:
        _train(made["joint"], _batch(config, package))
        made["before"] = Snapshot.of(plain.eval())

    def branch_of(check: Any) -> Any:
        return lambda: check(Subject(plain), made["joint"].branch, made["before"])

    def stream() -> None:
        _stream(made["joint"].eval(), config)
        if left := made["before"].differences(plain):
            raise Broken(f"detaching left {', '.join(left)}")

    masks, gradients = branch_of(check_masks), branch_of(check_gradients)
    return [("attach", attach), ("train", train), ("masks", masks), ("gradients", gradients), ("stream", stream)]


def _settle(plain: nn.Module) -> None:
    """Running statistics of random images in the backbone, as a trained model has those of its data."""
    backbone = getattr(plain, "backbone", None)
    if isinstance(backbone, nn.Module):
        with statistics_of_images(backbone), torch.no_grad(), suppress(Exception):
            backbone(torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(4)))


def _train(joint: Any, batch: dict[str, Any]) -> None:
    """One joint iteration; all losses are there and finite."""
    from mmengine.optim import OptimWrapper

    joint.train()
    logs = joint.train_step(batch, OptimWrapper(torch.optim.SGD(joint.parameters(), 1e-6)))
    losses = {key: value for key, value in logs.items() if "loss" in key}
    if "loss_mae" not in losses or len(losses) < 3:
        raise Broken(f"a joint iteration has the losses {', '.join(losses)}; expected loss_mae and those of the model")
    if wrong := [key for key, value in losses.items() if not bool(torch.as_tensor(value).isfinite().all())]:
        raise Broken(f"losses are not finite: {', '.join(wrong)}")


def _stream(joint: Any, config: Any) -> None:
    """Three frames through the config's test pipeline."""
    from ttt_adapt_openmmlab import stream_adapter

    joint.cfg = config
    frames = [Subject(joint, bytes=True).frame(SIZE, seed).numpy()[..., ::-1].copy() for seed in range(3)]
    with stream_adapter(joint, config=CONFIG) as adapter:
        for frame in frames:
            output = adapter.step(frame)
            if not adapter.last.adapted:
                raise Broken(f"frame {adapter.last.frame_index} was not adapted to: {adapter.last.reason}")
            finite(output)
            if not any(True for _ in leaves(output)):
                raise Broken(f"the prediction is a {type(output).__name__} without tensors")


def _batch(config: Any, package: str) -> dict[str, Any]:
    """Two images with made-up labels, as a data loader gives them."""
    classes = max(2, min(next(_classes(config.model), 3), 8))
    with_masks = any(node.get("with_mask") for node in _dicts(config._cfg_dict))  # what the config's pipeline loads
    detection = functools.partial(_detection_sample, with_masks=with_masks)
    make = _segmentation_sample if package == "mmseg" else detection
    generator = torch.Generator().manual_seed(5)
    images = [torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=generator) for _ in range(2)]
    return {"inputs": images, "data_samples": [make(classes, seed) for seed in range(2)]}


def _classes(model: Any) -> Iterator[int]:
    """The numbers of classes in a model's config."""
    for node in _dicts(model):
        if isinstance(node.get("num_classes"), int):
            yield node["num_classes"]


def _metainfo() -> dict[str, Any]:
    shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), SIZE)
    return {**shapes, "scale_factor": (1.0, 1.0), "flip": False, "img_id": 0, "img_path": "a.png"}


def _segmentation_sample(classes: int, seed: int) -> Any:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    labels = _label_map(classes, seed)
    sample = SegDataSample(metainfo=_metainfo())
    sample.gt_sem_seg = PixelData(data=labels)
    sample.gt_edge_map = PixelData(data=(labels % 7 == 0).long())
    return sample


def _detection_sample(classes: int, seed: int, with_masks: bool) -> Any:
    """Two or three boxes, their masks if the config asks for them, and a label map."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData, PixelData

    boxes = torch.tensor([[8.0, 16.0, 72.0, 80.0], [60.0, 40.0, 150.0, 120.0], [20.0, 90.0, 60.0, 122.0]])[: 2 + seed]
    masks = np.zeros((len(boxes), *SIZE), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    sample = DetDataSample(metainfo=_metainfo())
    sample.gt_instances = InstanceData(bboxes=HorizontalBoxes(boxes), labels=torch.arange(len(boxes)) % classes)
    if with_masks:
        sample.gt_instances.masks = BitmapMasks(masks, *SIZE)
    sample.ignored_instances = InstanceData(bboxes=HorizontalBoxes(torch.zeros(0, 4)))
    sample.gt_sem_seg = PixelData(sem_seg=_label_map(classes, seed))
    return sample


def _label_map(classes: int, seed: int) -> torch.Tensor:
    """Squares of class ids, int64 [1, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, classes, (1, SIZE[0] // 16, SIZE[1] // 16), generator=generator)
    return coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
