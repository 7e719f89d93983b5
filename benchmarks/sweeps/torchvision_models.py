"""torchvision: one or two small models of every architecture: classification, segmentation, detection, video.

Video models take clips [B, 3, T, H, W] and not images; they have to be refused.
"""

from __future__ import annotations

from typing import Any

from sweeps.subject import Subject

MODELS = {
    "classification": (
        "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t "
        "mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d "
        "shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_16 vit_b_32 wide_resnet50_2"
    ),
    "segmentation": "deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large",
    "detection": (
        "fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn "
        "keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn retinanet_resnet50_fpn ssd300_vgg16 "
        "ssdlite320_mobilenet_v3_large"
    ),
    "video": "mc3_18 mvit_v2_s r3d_18 s3d swin3d_t",
}
FIXED = ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large")
"""Detectors that resize every image to one size of their own."""


def prepare() -> None:
    """Import what every model needs."""
    import torchvision  # noqa: F401


def names() -> list[str]:
    """The models of the sweep."""
    return [name for listed in MODELS.values() for name in listed.split()]


def group(name: str) -> str:
    """The task of a model."""
    return next(task for task, listed in MODELS.items() if name in listed.split())


def build(name: str) -> Subject:
    """A model with random weights; detectors take small images as they come."""
    import torchvision

    task = group(name)
    settings: dict[str, Any] = {"weights": None}
    if task in ("segmentation", "detection"):
        settings["weights_backbone"] = None
    if task == "detection" and name not in FIXED:
        settings |= {"min_size": 128, "max_size": 160}
    if name in ("googlenet", "inception_v3"):
        settings["init_weights"] = False  # the slow initialisation draws other random weights, and nothing else
    return Subject(torchvision.models.get_model(name, **settings).eval())
