"""Make an existing vision model keep learning from the video it is watching."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt_adapt.adapter import StepReport as StepReport
    from ttt_adapt.adapter import StreamAdapter as StreamAdapter
    from ttt_adapt.branch import MAEBranch as MAEBranch
    from ttt_adapt.branch import Reconstruction as Reconstruction
    from ttt_adapt.config import StreamConfig as StreamConfig
    from ttt_adapt.errors import CheckpointError as CheckpointError
    from ttt_adapt.errors import ConfigError as ConfigError
    from ttt_adapt.errors import DataError as DataError
    from ttt_adapt.errors import EncoderError as EncoderError
    from ttt_adapt.errors import FrameError as FrameError
    from ttt_adapt.errors import FrameTypeError as FrameTypeError
    from ttt_adapt.errors import MemoryLimitError as MemoryLimitError
    from ttt_adapt.errors import MissingPackageError as MissingPackageError
    from ttt_adapt.errors import StateError as StateError
    from ttt_adapt.errors import TTTAdaptError as TTTAdaptError
    from ttt_adapt.errors import VideoError as VideoError
    from ttt_adapt.features import Features as Features
    from ttt_adapt.frames import Normalize as Normalize
    from ttt_adapt.lab import colour_frame as colour_frame
    from ttt_adapt.lab import rgb_to_lab as rgb_to_lab
    from ttt_adapt.lab import to_grey as to_grey
    from ttt_adapt.objectives import Objective as Objective

_NAMES = {
    "adapter": ("StepReport", "StreamAdapter"),
    "branch": ("MAEBranch", "Reconstruction"),
    "config": ("StreamConfig",),
    "errors": (
        "CheckpointError", "ConfigError", "DataError", "EncoderError", "FrameError", "FrameTypeError",
        "MemoryLimitError", "MissingPackageError", "StateError", "TTTAdaptError", "VideoError",
    ),
    "features": ("Features",),
    "frames": ("Normalize",),
    "lab": ("colour_frame", "rgb_to_lab", "to_grey"),
    "objectives": ("Objective",),
}  # fmt: skip
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that `ttt-adapt --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
