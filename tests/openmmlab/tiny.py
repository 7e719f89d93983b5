"""Smallest configs of the model families, as the projects' own configs write them, and data to run them on."""

from __future__ import annotations

from typing import Any

import mmengine.config.config
import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from torch import nn

import ttt_adapt_openmmlab  # noqa: F401

CLASSES = 4
SIZE = (64, 96)
NORMALISE = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "bgr_to_rgb": True}


def without_slow_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners log no compiler versions and no formatted config, which takes seconds."""
    monkeypatch.setattr(Runner, "_log_env", lambda self, env: None)
    monkeypatch.setattr(mmengine.config.config, "FormatCode", lambda text, **_: (text, True))


def seg_preprocessor(size: tuple[int, int] = SIZE) -> dict[str, Any]:
    return {
        "type": "SegDataPreProcessor",
        **NORMALISE,
        "pad_val": 0,
        "seg_pad_val": 255,
        "size": size,
        "test_cfg": {"size_divisor": 32},
    }


def det_preprocessor(**settings: Any) -> dict[str, Any]:
    return {
        "type": "DetDataPreprocessor",
        **NORMALISE,
        "pad_size_divisor": 32,
        "pad_mask": True,
        "mask_pad_value": 0,
        **settings,
    }


def resnet(norm: str = "BN", **settings: Any) -> dict[str, Any]:
    return {
        "type": "ResNet",
        "depth": 18,
        "base_channels": 8,
        "num_stages": 4,
        "out_indices": (0, 1, 2, 3),
        "norm_cfg": {"type": norm, "requires_grad": True},
        "norm_eval": False,
        "style": "pytorch",
        **settings,
    }


def swin(**settings: Any) -> dict[str, Any]:
    return {
        "type": "SwinTransformer",
        "embed_dims": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "window_size": 4,
        "patch_norm": True,
        "out_indices": (0, 1, 2, 3),
        "drop_path_rate": 0.1,
        **settings,
    }


def segmentor(backbone: dict[str, Any], head: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": seg_preprocessor(),
        "backbone": backbone,
        "decode_head": head,
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
        **settings,
    }


def head(kind: str, norm: str = "BN", **settings: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "channels": 8,
        "num_classes": CLASSES,
        "norm_cfg": {"type": norm, "requires_grad": True},
        "align_corners": False,
        "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
        **settings,
    }


def fcn(norm: str = "BN", **settings: Any) -> dict[str, Any]:
    """EncoderDecoder: ResNet and an FCN head with BatchNorm, with an auxiliary head as in most configs."""
    main = head("FCNHead", norm, in_channels=64, in_index=3, num_convs=1, dropout_ratio=0.1)
    auxiliary = head("FCNHead", norm, in_channels=32, in_index=2, num_convs=1, dropout_ratio=0.1, channels=4)
    return segmentor(resnet(norm), main, auxiliary_head=auxiliary, **settings)


def upernet() -> dict[str, Any]:
    in_channels = [8, 16, 32, 64]
    return segmentor(resnet(), head("UPerHead", in_channels=in_channels, in_index=[0, 1, 2, 3], pool_scales=(1, 2)))


def deeplabv3plus() -> dict[str, Any]:
    settings = {"in_channels": 64, "in_index": 3, "dilations": (1, 2), "c1_in_channels": 8, "c1_channels": 4}
    backbone = resnet(dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1))
    return segmentor(backbone, head("DepthwiseSeparableASPPHead", **settings))


def segformer() -> dict[str, Any]:
    backbone = {
        "type": "MixVisionTransformer",
        "embed_dims": 8,
        "num_stages": 4,
        "num_layers": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "patch_sizes": [7, 3, 3, 3],
        "sr_ratios": [8, 4, 2, 1],
        "out_indices": (0, 1, 2, 3),
    }
    in_channels = [8, 8, 16, 16]
    return segmentor(backbone, head("SegformerHead", in_channels=in_channels, in_index=[0, 1, 2, 3]))


def mask_head(things: int, stuff: int, queries: int = 6, layers: int = 3) -> dict[str, Any]:
    """A Mask2Former head in mmdet's form."""
    width, classes = 16, things + stuff
    attention = {"embed_dims": width, "num_heads": 2, "dropout": 0.0, "batch_first": True}
    ffn = {"embed_dims": width, "feedforward_channels": 32, "num_fcs": 2, "ffn_drop": 0.0}
    ffn["act_cfg"] = {"type": "ReLU", "inplace": True}
    deformable = {**attention, "num_levels": 3, "num_points": 2}
    positions = {"num_feats": width // 2, "normalize": True}
    return {
        "type": "Mask2FormerHead",
        "in_channels": [16, 32, 64, 128],
        "strides": [4, 8, 16, 32],
        "feat_channels": width,
        "out_channels": width,
        "num_things_classes": things,
        "num_stuff_classes": stuff,
        "num_queries": queries,
        "num_transformer_feat_level": 3,
        "pixel_decoder": {
            "type": "mmdet.MSDeformAttnPixelDecoder",
            "num_outs": 3,
            "norm_cfg": {"type": "GN", "num_groups": 4},
            "act_cfg": {"type": "ReLU"},
            "encoder": {"num_layers": 1, "layer_cfg": {"self_attn_cfg": deformable, "ffn_cfg": ffn}},
            "positional_encoding": positions,
        },
        "enforce_decoder_input_project": False,
        "positional_encoding": positions,
        "transformer_decoder": {
            "return_intermediate": True,
            "num_layers": layers,
            "layer_cfg": {"self_attn_cfg": attention, "cross_attn_cfg": attention, "ffn_cfg": ffn},
            "init_cfg": None,
        },
        "loss_cls": {
            "type": "mmdet.CrossEntropyLoss",
            "use_sigmoid": False,
            "loss_weight": 2.0,
            "reduction": "mean",
            "class_weight": [1.0] * classes + [0.1],
        },
        "loss_mask": {
            "type": "mmdet.CrossEntropyLoss",
            "use_sigmoid": True,
            "reduction": "mean",
            "loss_weight": 5.0,
        },
        "loss_dice": {
            "type": "mmdet.DiceLoss",
            "use_sigmoid": True,
            "activate": True,
            "reduction": "mean",
            "naive_dice": True,
            "eps": 1.0,
            "loss_weight": 5.0,
        },
    }


def matching() -> dict[str, Any]:
    """The train_cfg of Mask2Former."""
    costs = [
        {"type": "mmdet.ClassificationCost", "weight": 2.0},
        {"type": "mmdet.CrossEntropyLossCost", "weight": 5.0, "use_sigmoid": True},
        {"type": "mmdet.DiceCost", "weight": 5.0, "pred_act": True, "eps": 1.0},
    ]
    return {
        "num_points": 64,
        "oversample_ratio": 3.0,
        "importance_sample_ratio": 0.75,
        "assigner": {"type": "mmdet.HungarianAssigner", "match_costs": costs},
        "sampler": {"type": "mmdet.MaskPseudoSampler"},
    }


def mask2former_semantic(**settings: Any) -> dict[str, Any]:
    """mmseg's Mask2Former on a tiny Swin."""
    head = mask_head(CLASSES, 0, **settings)
    for key in ("num_things_classes", "num_stuff_classes"):
        del head[key]
    head |= {"num_classes": CLASSES, "align_corners": False, "train_cfg": matching()}
    return segmentor(swin(), head)


def mask2former(things: int = 3, stuff: int = 0, **settings: Any) -> dict[str, Any]:
    """mmdet's Mask2Former on a tiny Swin; with stuff classes it is the panoptic one."""
    fusion = {"type": "MaskFormerFusionHead", "num_things_classes": things, "num_stuff_classes": stuff}
    return {
        "type": "Mask2Former",
        "data_preprocessor": det_preprocessor(pad_seg=bool(stuff), seg_pad_value=255),
        "backbone": swin(),
        "panoptic_head": mask_head(things, stuff, **settings),
        "panoptic_fusion_head": {**fusion, "loss_panoptic": None, "init_cfg": None},
        "train_cfg": matching(),
        "test_cfg": {
            "panoptic_on": bool(stuff),
            "semantic_on": False,
            "instance_on": True,
            "max_per_image": 10,
            "iou_thr": 0.8,
            "filter_low_score": True,
        },
    }


def mask_rcnn() -> dict[str, Any]:
    """mmdet's Mask R-CNN with one pyramid level per stage; its operators need the compiled mmcv."""
    coder = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": [1.0] * 4}
    align = {"type": "RoIAlign", "sampling_ratio": 0}
    return {
        "type": "MaskRCNN",
        "data_preprocessor": det_preprocessor(),
        "backbone": resnet(),
        "neck": {"type": "FPN", "in_channels": [8, 16, 32, 64], "out_channels": 8, "num_outs": 5},
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": 8,
            "feat_channels": 8,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [8],
                "ratios": [1.0],
                "strides": [4, 8, 16, 32, 64],
            },
            "bbox_coder": coder,
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
            "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
        },
        "roi_head": {
            "type": "StandardRoIHead",
            "bbox_roi_extractor": {
                "type": "SingleRoIExtractor",
                "roi_layer": {**align, "output_size": 7},
                "out_channels": 8,
                "featmap_strides": [4, 8, 16, 32],
            },
            "bbox_head": {
                "type": "Shared2FCBBoxHead",
                "in_channels": 8,
                "fc_out_channels": 8,
                "roi_feat_size": 7,
                "num_classes": 3,
                "bbox_coder": coder,
                "reg_class_agnostic": False,
                "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
                "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
            },
            "mask_roi_extractor": {
                "type": "SingleRoIExtractor",
                "roi_layer": {**align, "output_size": 14},
                "out_channels": 8,
                "featmap_strides": [4, 8, 16, 32],
            },
            "mask_head": {
                "type": "FCNMaskHead",
                "num_convs": 1,
                "in_channels": 8,
                "conv_out_channels": 8,
                "num_classes": 3,
                "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0},
            },
        },
        "train_cfg": None,
        "test_cfg": {
            "rpn": {"nms_pre": 50, "max_per_img": 20, "nms": {"type": "nms", "iou_threshold": 0.7}, "min_bbox_size": 0},
            "rcnn": {"score_thr": 0.05, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 5},
        },
    }


def scope_of(config: dict[str, Any]) -> str:
    """ "mmseg" or "mmdet", by the outermost type, or by that of the model inside a wrapper."""
    config = config.get("model", config)
    return "mmseg" if config["type"] == "EncoderDecoder" else "mmdet"


def enter(scope: str) -> None:
    """Make `scope` the default scope, as `init_model` and the Runner do."""
    if DefaultScope.check_instance_created(scope):
        DefaultScope._instance_dict.move_to_end(scope)  # it exists: make it the current one again
    init_default_scope(scope)


def build(config: dict[str, Any]) -> nn.Module:
    """A model by its config, in its own scope, from fixed random weights."""
    enter(scope_of(config))
    torch.manual_seed(0)
    return MODELS.build(ConfigDict(config))


def frame(size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    """A smooth uint8 BGR frame [H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 8, generator=generator) * 255
    image = nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 255)
    return image[0].permute(1, 2, 0).to(torch.uint8).numpy().copy()


def batch(config: dict[str, Any], count: int = 2, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """What a data loader gives a model of this config: images, and data samples with annotations."""
    make = _seg_sample if scope_of(config) == "mmseg" else _det_sample
    images = [torch.from_numpy(frame(size, seed)).permute(2, 0, 1) for seed in range(count)]
    return {"inputs": images, "data_samples": [make(size, seed) for seed in range(count)]}


def changed(model: nn.Module) -> nn.Module:
    """The model after some training: every tensor another one."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return model


def tensors(sample: Any) -> dict:
    """All tensors of a data sample, by name."""
    return {
        f"{field}.{key}": value
        for field, part in sample.all_items()
        if hasattr(part, "all_items")
        for key, value in part.all_items()
        if isinstance(value, torch.Tensor)
    }


def _metainfo(size: tuple[int, int]) -> dict[str, Any]:
    return {"ori_shape": size, "img_shape": size, "pad_shape": size, "scale_factor": (1.0, 1.0), "img_id": 0}


def _halves(size: tuple[int, int], seed: int) -> torch.Tensor:
    """A label map [H, W] of two classes, split at a column that depends on the seed."""
    labels = torch.zeros(size, dtype=torch.long)
    labels[:, size[1] // 3 + seed * 8 :] = 1
    return labels


def _seg_sample(size: tuple[int, int], seed: int) -> Any:
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=_metainfo(size))
    sample.gt_sem_seg = PixelData(data=_halves(size, seed)[None])
    return sample


def _det_sample(size: tuple[int, int], seed: int) -> Any:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    labels = _halves(size, seed)
    masks = np.stack([(labels == i).numpy().astype(np.uint8) for i in range(2)])
    boxes = torch.tensor([[0.0, 0.0, size[1] // 3, size[0]], [size[1] // 3, 0.0, size[1], size[0]]])
    sample = DetDataSample(metainfo=_metainfo(size))
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]), masks=BitmapMasks(masks, *size))
    sample.gt_sem_seg = PixelData(sem_seg=labels[None])
    return sample
