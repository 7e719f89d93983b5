"""transformers: all classes of the automatic mappings of vision tasks that take one batch of images.

The rule of the list: every class that `transformers.models.auto` names for one of `TASKS` and whose main input is
`pixel_values`, except for those in `INCOMPLETE`. Each is built from the default values of its config class, made small
by `shrink`: few layers, small images, the widths as they are.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from sweeps.subject import Subject, draw_biases

TASKS = (
    "IMAGE_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "OBJECT_DETECTION",
    "DEPTH_ESTIMATION",
    "MASKED_IMAGE_MODELING",
    "BACKBONE",
    "IMAGE_TO_IMAGE",
)
INCOMPLETE = (
    "PPDocLayoutV2ForObjectDetection",
    "PPOCRV5ServerDetForObjectDetection",
    "PPOCRV6MediumDetForObjectDetection",
    "PPOCRV6SmallDetForObjectDetection",
)
"""Classes whose config's default values make no model that runs."""
LAYERS = 4
SIDE = 64
AT_MOST = {
    "num_hidden_layers": LAYERS,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_queries": 10,
    "num_detection_tokens": 10,
}
"""Numbers in a config that become no larger than this."""
SETTINGS: dict[str, dict[str, Any]] = {
    "swin": {"window_size": 2},
    "donut-swin": {"window_size": 2},
    "maskformer-swin": {"window_size": 2},
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 0.4, "hidden_dim": 1280},
    "lw_detr_vit": {"image_size": 128},
    "lw_detr": {"projector_scale_factors": [1.0], "projector_in_channels": [256], "num_feature_levels": 1},
    "swin2sr": {"depths": [1, 1], "num_heads": [6, 6], "num_layers": 2},
    "timm_backbone": {"backbone": "resnet18", "use_pretrained_backbone": False},
}
"""`model_type` of a config -> what its class needs at this size."""
OWN_LAYERS = ("lw_detr_vit", "rf_detr_dinov2", "rf_detr_windowed_dinov2")
"""`model_type` of configs that name layers by number, so that none can be left out."""
LISTS = {
    "BeitForSemanticSegmentation": {"out_indices": [1, 2, 3, 4]},
    "Data2VecVisionForSemanticSegmentation": {"out_indices": [1, 2, 3, 4]},
    "Sapiens2ForSemanticSegmentation": {
        "head_config": {
            "upsample_out_channels": [32, 32],
            "upsample_kernel_sizes": [4, 4],
            "conv_out_channels": [32],
            "conv_kernel_sizes": [1],
        }
    },
    "DepthProForDepthEstimation": {"patch_size": 32, "intermediate_hook_ids": [3, 1]},
}


def prepare() -> None:
    """Import what every model needs."""
    import timm  # noqa: F401
    import transformers
    import transformers.backbone_utils
    import transformers.image_transforms
    import transformers.loss.loss_utils
    import transformers.modeling_outputs
    import transformers.modeling_utils

    transformers.logging.set_verbosity_error()
    names()


@functools.cache
def _tasks() -> dict[str, str]:
    """Class name -> task, in the order of the mappings."""
    import transformers
    import transformers.models.auto.modeling_auto as auto

    found: dict[str, str] = {}
    for task in TASKS:
        for listed in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values():
            for name in (listed,) if isinstance(listed, str) else listed:
                if name not in INCOMPLETE and getattr(transformers, name).main_input_name == "pixel_values":
                    found.setdefault(name, task.lower().replace("_", " "))
    return found


def names() -> list[str]:
    """The classes of the sweep."""
    return list(_tasks())


def group(name: str) -> str:
    """The task of a class."""
    return _tasks()[name]


def build(name: str) -> Subject:
    """A model of this class with random weights."""
    import transformers

    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    settings = shrink(config_class().to_dict()) | LISTS.get(name, {})
    model = model_class(config_class.from_dict(settings)).eval()
    draw_biases(model)
    restore_scales(model)
    return Subject(model)


def restore_scales(model: nn.Module) -> None:
    """Give 1 to scales of BatchNorm that are all near 0, as trained models have none.

    EfficientNet draws them from a normal distribution of deviation 0.02. Every layer then makes the image 50 times
    weaker, until nothing of it is left beside the biases.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None and float(module.weight.abs().max()) < 0.2:
            nn.init.ones_(module.weight)


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a config with few layers and small images; also of the configs inside of it."""
    kind = config.get("model_type")
    found = {key: _smaller(key, value, config) for key, value in config.items()}
    if kind in OWN_LAYERS:
        return found | {"num_hidden_layers": config["num_hidden_layers"]} | SETTINGS.get(str(kind), {})
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > LAYERS and "depths" not in config:
        for key in ("stage_names", "out_features"):
            found.pop(key, None)
        if chosen := config.get("out_indices"):
            found["out_indices"] = list(range(LAYERS + 1))[-len(chosen) :]
        if chosen := config.get("backbone_out_indices"):
            found["backbone_out_indices"] = list(range(LAYERS))[-len(chosen) :]
    return found | SETTINGS.get(str(kind), {})


def _smaller(key: str, value: Any, config: dict[str, Any]) -> Any:
    """One value of a config."""
    if isinstance(value, dict) and key not in ("id2label", "label2id"):
        return shrink(value)
    if key in AT_MOST and isinstance(value, int):
        return min(value, AT_MOST[key])
    if key == "depths" and isinstance(value, list | tuple):
        return [1] * len(value)
    if key == "image_size" and value:
        patch = config.get("patch_size")
        side = 4 * patch if isinstance(patch, int) and SIDE % patch else SIDE
        return [side, side] if isinstance(value, list | tuple) else side
    return value
