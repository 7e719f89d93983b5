"""Make an existing vision model keep learning from the video it is watching."""

from ttt_adapt.adapter import StepReport, StreamAdapter
from ttt_adapt.branch import MAEBranch, Reconstruction
from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import TTTAdaptError
from ttt_adapt.frames import Normalize
from ttt_adapt.objectives import Objective

__all__ = [
    "MAEBranch",
    "Normalize",
    "Objective",
    "Reconstruction",
    "StepReport",
    "StreamAdapter",
    "StreamConfig",
    "TTTAdaptError",
]
__version__ = "0.1.0"
