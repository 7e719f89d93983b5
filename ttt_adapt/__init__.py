"""Make an existing vision model keep learning from the video it is watching."""

from ttt_adapt.adapter import StepReport, StreamAdapter
from ttt_adapt.branch import MAEBranch, Reconstruction
from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EncoderError,
    FrameError,
    FrameTypeError,
    MemoryLimitError,
    MissingPackageError,
    StateError,
    TTTAdaptError,
    VideoError,
)
from ttt_adapt.features import Features
from ttt_adapt.frames import Normalize
from ttt_adapt.lab import colour_frame, rgb_to_lab, to_grey
from ttt_adapt.objectives import Objective

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EncoderError",
    "Features",
    "FrameError",
    "FrameTypeError",
    "MAEBranch",
    "MemoryLimitError",
    "MissingPackageError",
    "Normalize",
    "Objective",
    "Reconstruction",
    "StateError",
    "StepReport",
    "StreamAdapter",
    "StreamConfig",
    "TTTAdaptError",
    "VideoError",
    "colour_frame",
    "rgb_to_lab",
    "to_grey",
]
__version__ = "0.1.0"
