"""Models of mmdetection that take clips of several frames (tracking, video instance segmentation): refused."""

from __future__ import annotations

from mmengine.registry import MODELS

from ttt_adapt.errors import ConfigError


def refuse_video_model(kind: object) -> None:
    """Check that a model takes single images.

    Args:
        kind: the class of a model, or what a config has as its type. A name that no registry knows passes.

    Raises:
        ConfigError: it takes clips.
    """
    with MODELS.switch_scope_and_registry(None) as registry:  # that of the default scope, as `build` takes it
        found = registry.get(kind) if isinstance(kind, str) else kind
    try:
        from mmdet.models.mot import BaseMOTModel
    except ImportError:  # without mmdet there is no such model
        return
    if isinstance(found, type) and issubclass(found, BaseMOTModel):
        raise ConfigError(
            f"{found.__name__} of mmdet tracks objects through clips: its frames come as [B, T, 3, H, W], and what it "
            "remembers of earlier frames belongs to no single one. A stream has one frame at a time, [1, 3, H, W]: "
            "take a model that predicts single images, such as the detector in the tracker's config"
        )
