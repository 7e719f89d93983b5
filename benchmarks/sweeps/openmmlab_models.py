"""mmsegmentation and mmdetection: one config of every family, from the configs in the installed packages.

The rule of the list: of each folder of configs with a model of its own, the config whose file name has the lowest
`cost`, then the shortest, then the first; of the first `TRIED` the first whose model can be built. Folders in
`WITHOUT_MODELS` hold data sets, schedules and tricks of training on models of other folders. Images are small,
pretrained files are left out, everything else is the config's.

Per config: the model builds, a `JointMAE` trains for one iteration on made-up labels, three frames are streamed through
the config's test pipeline, masks hide, gradients are there, and afterwards the model is as it was.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from contextlib import chdir, suppress
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
SIZES = {
    "mmseg/beit": (128, 128),  # only images of the config's img_size, which is set to this
    "mmseg/mae": (128, 128),
    "mmseg/mobilenet_v3": (448, 448),  # its head takes means of 49 x 49 cells
    "mmdet/dino": (192, 256),  # 900 queries are chosen from the cells of all maps
    "mmdet/ssd": (304, 304),  # its last maps have no cells left otherwise
}
"""(H, W) of the images of families that do not take `SIZE`."""
TRIED = 3
CONFIG = StreamConfig(window=2, batch_size=1)
PACKAGES = ("mmseg", "mmdet")
PARTS = ("models", "apis", "datasets.transforms")
WITHOUT_MODELS = re.compile(
    "_base_|common|albu_example|cityscapes|deepfashion|dsdl|instaboost|legacy_1.x|lvis|misc|objects365|openimages|"
    "pascal_voc|resnet_strikes_back|scratch|seesaw_loss|selfsup_pretrain|simple_copy_paste|strong_baselines|v3det|"
    "wider_face|timm_example|reid"
)
LARGE = re.compile("x101|r101|r152|101|hourglass104|swin-[lb]|vit-[bhlg]|large|[-_][lx]_|w40|w48|b[45]")
OTHER_INPUTS = re.compile("levir|fast-rcnn")
"""Configs whose models take more than an image: two photographs of one place, or proposals of another model."""
SMALL = re.compile("r18|r50|tiny|swin-t|mit-b0|[-_][st]_|atto|m-v2|w18")


def prepare() -> None:
    """Import what every model needs."""
    for module in ("ttt_adapt_openmmlab", *(f"{package}.{part}" for package in PACKAGES for part in PARTS)):
        importlib.import_module(module)  # ours first: it stands in for what mmcv-lite lacks


@functools.cache
def _files() -> dict[str, list[Path]]:
    """Name of a model, "mmseg/fcn" -> its configs, the one to take first."""
    found = {}
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent / ".mim" / "configs"
        for folder in sorted(path for path in root.iterdir() if not WITHOUT_MODELS.fullmatch(path.name)):
            if files := sorted(folder.glob("*.py")):
                files.sort(key=lambda file: (cost(file.stem), len(file.stem)))
                found[f"{package}/{folder.name}"] = files[:TRIED]
    return found


def cost(name: str) -> int:
    """How large the model of a config is, by the words in its name: lower is smaller."""
    size = 2 * bool(LARGE.search(f"{name}_")) - bool(SMALL.search(f"{name}_"))
    return size + 4 * bool(OTHER_INPUTS.search(name))


def names() -> list[str]:
    """The families of the sweep."""
    return list(_files())


def group(name: str) -> str:
    """The package of a family."""
    return name.partition("/")[0]


def check(name: str) -> dict[str, Any]:
    """All checks of the config of a family."""
    size, failures = SIZES.get(name, SIZE), list[dict[str, Any]]()
    for file in _files()[name]:
        found: dict[str, Any] = {"status": NOT_BUILT, "config": file.name, "checks": {}}
        try:
            config = _small_config(file, group(name), size)
            plain = _built(config, file)
        except Exception as error:
            if refusal := _refused(file):
                return found | refusal
            failures.append(found | {"reason": told(error)})
            continue
        return found | _checked(_stages(config, plain, group(name), size), found["checks"])
    return failures[0]


def _checked(stages: list[tuple[str, Any]], checks: dict[str, str]) -> dict[str, Any]:
    """Run the stages until one fails, and note in `checks` how each went."""
    found: dict[str, Any] = {"status": AS_SUGGESTED}
    for stage, run in stages:
        try:
            run()
            checks[stage] = "ok"
        except Exception as error:
            checks[stage] = told(error)
            return {
                "status": REFUSED if isinstance(error, TTTAdaptError) else FAILS,
                "reason": f"{stage}: {told(error)}",
            }
    return found


def _refused(file: Path) -> dict[str, Any]:
    """The refusal of a model that its own library cannot build here; nothing where the library does not refuse it."""
    from mmengine.config import Config

    import ttt_adapt_openmmlab

    try:
        ttt_adapt_openmmlab.JointMAE(model=Config.fromfile(file).model)
    except TTTAdaptError as error:
        return {"status": REFUSED, "reason": told(error)}
    except Exception:
        return {}
    return {}


def _small_config(file: Path, package: str, size: tuple[int, int]) -> Any:
    """A config without pretrained files, for images of `size`."""
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    config = Config.fromfile(file)
    init_default_scope(package)
    for node in _dicts(config._cfg_dict):
        _make_small(node, package, size)
    return config


def _built(config: Any, file: Path) -> nn.Module:
    """The model of a config, in evaluation mode."""
    from mmengine.logging import MessageHub
    from mmengine.registry import MODELS

    hub = MessageHub.get_current_instance()  # some losses ask how far the training is
    for key, value in {"iter": 0, "epoch": 0, "max_iters": 10, "max_epochs": 1}.items():
        hub.update_info(key, value)
    model = config.model
    if model.get("data_preprocessor") is None and config.get("data_preprocessor") is not None:
        model.data_preprocessor = config.data_preprocessor
    torch.manual_seed(0)
    with chdir(file.parents[2]):  # configs name those of teachers by their path in the repository
        built = MODELS.build(model)
    with suppress(AttributeError):  # parts of SAN take their weights from a pretrained file alone
        built.init_weights()
    for p in getattr(built, "text_encoder", nn.Module()).parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)
    built.cfg = config
    built.eval()  # that of mmdet's distilled models returns nothing
    return built


def _dicts(node: Any) -> Iterator[Any]:
    """All dicts in a config, the outer ones first."""
    if isinstance(node, dict):
        yield node
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        yield from _dicts(value)


def _make_small(node: Any, package: str, size: tuple[int, int]) -> None:
    """Take pretrained files and random sizes out of one dict of a config, and make its images small."""
    for key in ("pretrained", "checkpoint", "teacher_ckpt"):
        if isinstance(node.get(key), str):
            node[key] = None
    if isinstance(node.get("init_cfg"), dict) and "checkpoint" in node["init_cfg"]:
        node["init_cfg"] = None
    if node.get("batch_augments") is not None:  # they resize to sizes of their own
        node["batch_augments"] = None
    kind = str(node.get("type", ""))
    if "Resize" in kind or kind.endswith("Pad"):
        for key in ("scale", "size", "img_scale"):
            if node.get(key) is not None:
                node[key] = size[::-1]
    if kind.endswith("SegDataPreProcessor"):
        node["size"] = size
        node.pop("size_divisor", None)
    if package == "mmseg" and node.get("mode") == "slide":
        node |= {"crop_size": (size[0], size[0]), "stride": (96, 96)}
    if kind in ("BEiT", "MAE"):
        node["img_size"] = size


def _stages(config: Any, plain: nn.Module, package: str, size: tuple[int, int]) -> list[tuple[str, Any]]:
    """Name and function of each check, to be called in this order."""
    import ttt_adapt_openmmlab

    made: dict[str, Any] = {}

    def attach() -> None:
        _settle(plain, size)
        before = Snapshot.of(plain)
        made["joint"] = ttt_adapt_openmmlab.JointMAE(model=plain)
        if left := before.differences(plain):
            raise Broken(f"attaching left {', '.join(left)}")

    def train() -> None:
        _train(made["joint"], _batch(config, package, size))
        plain.eval()
        made["before"] = Snapshot.of(plain)

    def branch_of(check: Any) -> Any:
        return lambda: check(Subject(plain), made["joint"].branch, made["before"])

    def stream() -> None:
        _stream(made["joint"].eval(), config, size)
        if left := made["before"].differences(plain):
            raise Broken(f"detaching left {', '.join(left)}")

    masks, gradients = branch_of(check_masks), branch_of(check_gradients)
    return [("attach", attach), ("train", train), ("masks", masks), ("gradients", gradients), ("stream", stream)]


def _settle(plain: nn.Module, size: tuple[int, int]) -> None:
    """Running statistics of random images in the backbone, as a trained model has those of its data."""
    backbone = getattr(plain, "backbone", None)
    if isinstance(backbone, nn.Module):
        with statistics_of_images(backbone), torch.no_grad(), suppress(Exception):
            backbone(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(4)))


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


def _stream(joint: Any, config: Any, size: tuple[int, int]) -> None:
    """Three frames through the config's test pipeline."""
    from ttt_adapt_openmmlab import stream_adapter

    joint.cfg = config
    frames = [Subject(joint, bytes=True).frame(size, seed).numpy()[..., ::-1].copy() for seed in range(3)]
    with stream_adapter(joint, config=CONFIG) as adapter:
        for frame in frames:
            output = adapter.step(frame)
            if not adapter.last.adapted:
                raise Broken(f"frame {adapter.last.frame_index} was not adapted to: {adapter.last.reason}")
            finite(output)
            if not any(True for _ in leaves(output)):
                raise Broken(f"the prediction is a {type(output).__name__} without tensors")


def _batch(config: Any, package: str, size: tuple[int, int]) -> dict[str, Any]:
    """Two images with made-up labels, as a data loader gives them."""
    classes = max(2 if package == "mmseg" else 1, min(next(_classes(config.model), 3), 8))
    nodes = list(_dicts(config._cfg_dict))
    loaded = {"masks": any(map(_loads_masks, nodes)), "proposals": any(map(_loads_proposals, nodes))}
    detection = functools.partial(_detection_sample, loaded=loaded)
    make = _segmentation_sample if package == "mmseg" else detection
    generator = torch.Generator().manual_seed(5)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for _ in range(2)]
    return {"inputs": images, "data_samples": [make(classes, seed, size) for seed in range(2)]}


def _loads_masks(node: Any) -> bool:
    """Whether a dict of a config is a transform that loads masks."""
    return bool(node.get("with_mask", str(node.get("type", "")).endswith("LoadPanopticAnnotations")))


def _loads_proposals(node: Any) -> bool:
    """Whether a dict of a config is a transform that loads the proposals of another model."""
    return str(node.get("type", "")).endswith("LoadProposals")


def _classes(model: Any) -> Iterator[int]:
    """The numbers of classes in a model's config."""
    for node in _dicts(model):
        if isinstance(node.get("num_classes"), int):
            yield node["num_classes"]


def _metainfo(size: tuple[int, int]) -> dict[str, Any]:
    shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), size)
    return {**shapes, "scale_factor": (1.0, 1.0), "flip": False, "img_id": 0, "img_path": "a.png"}


def _segmentation_sample(classes: int, seed: int, size: tuple[int, int]) -> Any:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    labels = _label_map(classes, seed, size)
    sample = SegDataSample(metainfo=_metainfo(size))
    sample.gt_sem_seg = PixelData(data=labels)
    sample.gt_edge_map = PixelData(data=(labels % 7 == 0).long())
    return sample


def _detection_sample(classes: int, seed: int, size: tuple[int, int], loaded: dict[str, bool]) -> Any:
    """Two or three boxes, a label map, and what else the config's pipeline loads."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData, PixelData

    boxes = torch.tensor([[8.0, 16.0, 72.0, 80.0], [60.0, 40.0, 150.0, 120.0], [20.0, 90.0, 60.0, 122.0]])[: 2 + seed]
    masks = np.zeros((len(boxes), *size), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    sample = DetDataSample(metainfo=_metainfo(size))
    sample.gt_instances = InstanceData(bboxes=HorizontalBoxes(boxes), labels=torch.arange(len(boxes)) % classes)
    if loaded["proposals"]:
        sample.proposals = InstanceData(bboxes=boxes + 4)
    if loaded["masks"]:
        sample.gt_instances.masks = BitmapMasks(masks, *size)
    sample.ignored_instances = InstanceData(bboxes=HorizontalBoxes(torch.zeros(0, 4)))
    sample.gt_sem_seg = PixelData(sem_seg=_label_map(classes, seed, size))
    return sample


def _label_map(classes: int, seed: int, size: tuple[int, int]) -> torch.Tensor:
    """Squares of class ids, int64 [1, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, classes, (1, size[0] // 16, size[1] // 16), generator=generator)
    return coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
