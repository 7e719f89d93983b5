"""Models of mmdetection that no stream of single images can take, refused by name, with the way out."""

from __future__ import annotations

from mmengine.registry import MODELS

from ttt_adapt.errors import ConfigError

_TRACKER = (
    "{} of mmdet tracks objects through clips: its frames come as [B, T, 3, H, W], and what it remembers of earlier "
    "frames belongs to no single one. A stream has one frame at a time, [1, 3, H, W]: take a model that predicts "
    "single images, such as the detector in the tracker's config"
)
_SEMI_SUPERVISED = (
    "{} of mmdet holds two detectors and trains on several batches at once, with and without labels; JointMAE and "
    "streams have one batch of images. Train it as mmdet does, and take the detector in its config with the teacher's "
    "weights"
)


def refuse_model(kind: object) -> None:
    """Check that a model takes one batch of single images.

    Args:
        kind: the class of a model, or what a config has as its type. A name that no registry knows passes.

    Raises:
        ConfigError: it takes clips of several frames, or several batches.
    """
    with MODELS.switch_scope_and_registry(None) as registry:  # that of the default scope, as `build` takes it
        found = registry.get(kind) if isinstance(kind, str) else kind
    try:
        from mmdet.models.detectors import SemiBaseDetector
        from mmdet.models.mot import BaseMOTModel
    except ImportError:  # without mmdet there are no such models
        return
    for base, message in ((BaseMOTModel, _TRACKER), (SemiBaseDetector, _SEMI_SUPERVISED)):
        if isinstance(found, type) and issubclass(found, base):
            raise ConfigError(message.format(found.__name__))
