"""Make an existing vision model keep learning from the video it is watching."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt_adapt.adapter import StepReport, StreamAdapter
    from ttt_adapt.colour import colour_frame, rgb_to_lab, to_grey
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
    from ttt_adapt.model.features import Features
    from ttt_adapt.objectives import Objective
    from ttt_adapt.objectives.mae import MAEBranch, Reconstruction
    from ttt_adapt.stream.frames import Normalize

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

_HOMES = ("errors", "colour", "config", "model.features", "stream.frames", "objectives", "objectives.mae", "adapter")
"""Where the public names are defined, or imported from another of these."""

if not TYPE_CHECKING:  # which would take it for any name at all

    def __getattr__(name: str) -> Any:
        """Names and modules are imported when they are first used: `ttt-adapt --help` does not wait for torch."""
        if name in __all__:
            modules = (import_module(f"{__name__}.{home}") for home in _HOMES)
            value = globals()[name] = next(getattr(module, name) for module in modules if hasattr(module, name))
            return value
        if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
