"""Detectors of mmdet train jointly and stream by their own configs, with the backbone made small."""

from __future__ import annotations

from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from torch import nn

import tiny
from ttt_adapt import StreamConfig
from ttt_adapt.errors import ConfigError
from ttt_adapt_openmmlab import JointMAE, stream_adapter

CONFIGS = Path(mmdet.__file__).parent / ".mim/configs"
SIZE = (64, 96)
DETECTORS = {
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": {"loss_rpn_cls", "loss_bbox"},
    "mask_rcnn/mask-rcnn_r50-caffe_fpn_1x_coco.py": {"loss_mask"},
    "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py": {"s2.loss_bbox"},
    "retinanet/retinanet_r50_fpn_1x_coco.py": {"loss_cls", "loss_bbox"},
    "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py": {"loss_bbox"},
    "dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco.py": {"loss_bbox"},
    "carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py": {"loss_bbox"},
    "solo/decoupled-solo_r50_fpn_1x_coco.py": {"loss_mask"},
}


def small(name: str) -> Config:
    """The config with a ResNet of 4 channels, few proposals, and frames of one small size."""
    config = Config.fromfile(CONFIGS / name)
    config.model.backbone.update(base_channels=4, init_cfg=None, frozen_stages=-1, norm_eval=False)
    config.model.neck.in_channels = [16, 32, 64, 128]
    if "rpn_head" in config.model:
        config.model.train_cfg.rpn_proposal.max_per_img = config.model.test_cfg.rpn.max_per_img = 40
    for transform in config.test_dataloader.dataset.pipeline:
        if transform.type == "Resize":
            transform.scale = (SIZE[1], SIZE[0])
    return config


def joint(name: str) -> JointMAE:
    config = small(name)
    tiny.enter("mmdet")
    torch.manual_seed(0)
    model = JointMAE(config.model)
    model.cfg = config
    return model


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_trains_jointly_and_streams(name):
    model = joint(name)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3))
    trained = {key: value for key, value in model.model.backbone.named_parameters() if value.requires_grad}
    before = {key: value.detach().clone() for key, value in trained.items()}
    logs = model.train().train_step(tiny.batch({"type": type(model.model).__name__}, size=SIZE), wrapper)
    assert DETECTORS[name] | {"loss", "loss_mae"} <= set(logs)
    assert all(torch.isfinite(value).all() for value in logs.values())
    assert [key for key, value in trained.items() if torch.equal(value, before[key])] == []
    with stream_adapter(model.eval(), config=StreamConfig(window=2, batch_size=1)) as adapter:
        for seed in range(3):
            sample = adapter.step(tiny.frame(SIZE, seed))
            assert adapter.last.adapted
            assert {"scores", "labels"} <= set(sample.pred_instances.keys())


def test_pixels_up_to_255_are_reconstructed_with_normalised_patches():
    caffe = joint("mask_rcnn/mask-rcnn_r50-caffe_fpn_1x_coco.py")
    assert caffe.branch.norm_pix_loss
    assert not joint("retinanet/retinanet_r50_fpn_1x_coco.py").branch.norm_pix_loss
    config = small("mask_rcnn/mask-rcnn_r50-caffe_fpn_1x_coco.py")
    assert not JointMAE(config.model, branch={"norm_pix_loss": False}).branch.norm_pix_loss


@pytest.mark.parametrize(
    "name",
    [
        "qdtrack/qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval.py",
        "bytetrack/bytetrack_yolox_x_8xb4-80e_crowdhuman-mot17halftrain_test-mot17halfval.py",
        "mask2former_vis/mask2former_r50_8xb2-8e_youtubevis2021.py",
        "masktrack_rcnn/masktrack-rcnn_mask-rcnn_r50_fpn_8xb1-12e_youtubevis2019.py",
    ],
)
def test_a_tracker_is_refused_before_it_is_built(name):
    tiny.enter("mmdet")
    with pytest.raises(ConfigError, match=r"tracks objects through clips.*take a model that predicts single images"):
        JointMAE(Config.fromfile(CONFIGS / name).model)


def test_a_semi_supervised_detector_is_refused_before_it_is_built():
    tiny.enter("mmdet")
    name = "soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py"
    with pytest.raises(ConfigError, match=r"SoftTeacher of mmdet holds two detectors.*take the detector in its config"):
        JointMAE(Config.fromfile(CONFIGS / name).model)


def test_a_model_that_needs_proposals_of_a_file_is_refused_by_a_stream():
    config = small("fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py")
    tiny.enter("mmdet")
    model = JointMAE(config.model)
    model.cfg = config
    with pytest.raises(ConfigError, match=r"LoadProposals.*such as Faster R-CNN"):
        stream_adapter(model)


def test_a_tracker_that_is_built_is_refused_by_a_stream():
    from mmdet.models.mot import BaseMOTModel

    class Tracker(BaseMOTModel):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Conv2d(3, 4, 3)

        loss = predict = None

    model = Tracker()
    model.cfg = small("retinanet/retinanet_r50_fpn_1x_coco.py")
    with pytest.raises(ConfigError, match="Tracker of mmdet tracks objects through clips"):
        stream_adapter(model)
    with pytest.raises(ConfigError, match="Tracker of mmdet tracks objects through clips"):
        JointMAE(model)


def test_a_pad_that_is_the_same_for_every_frame_is_no_random_one():
    config = Config.fromfile(CONFIGS / "centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py")
    config.model.backbone.init_cfg = None
    tiny.enter("mmdet")
    model = JointMAE(config.model)
    model.cfg = config
    with stream_adapter(model.eval(), config=StreamConfig(window=2, batch_size=1)) as adapter:
        assert adapter.predict(tiny.frame(SIZE)).img_shape == (96, 128)
