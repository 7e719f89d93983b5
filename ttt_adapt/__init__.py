"""Make an existing vision model keep learning from the video it is watching."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers see; a test compares it with the table below
    from ttt_adapt.adapter import StreamAdapter as StreamAdapter
    from ttt_adapt.calibration.calibrate import calibrate as calibrate
    from ttt_adapt.config import StreamConfig as StreamConfig
    from ttt_adapt.errors import TTTAdaptError as TTTAdaptError
    from ttt_adapt.model.calibration import Calibration as Calibration
    from ttt_adapt.model.frames import Normalize as Normalize
    from ttt_adapt.objectives.base import Objective as Objective
    from ttt_adapt.objectives.mae import MAEBranch as MAEBranch
    from ttt_adapt.objectives.reconstruction_error import Reconstruction as Reconstruction
    from ttt_adapt.stream.report import StepReport as StepReport
    from ttt_adapt.training.joint import TrainConfig as TrainConfig
    from ttt_adapt.training.joint import fit as fit

_MODULE_OF = {
    "Calibration": "model.calibration",
    "MAEBranch": "objectives.mae",
    "Normalize": "model.frames",
    "Objective": "objectives.base",
    "Reconstruction": "objectives.reconstruction_error",
    "StepReport": "stream.report",
    "StreamAdapter": "adapter",
    "StreamConfig": "config",
    "TTTAdaptError": "errors",
    "TrainConfig": "training.joint",
    "calibrate": "calibration.calibrate",
    "fit": "training.joint",
}
"""Public name -> the module that defines it, which is imported when the name is first used."""

__version__ = "0.1.0"

if not TYPE_CHECKING:  # a type checker would take `__getattr__` for any name at all
    __all__ = [*_MODULE_OF]

    def __getattr__(name: str) -> Any:
        """Import a public name or a module when it is first used: `ttt-adapt --help` does not wait for torch."""
        if name in _MODULE_OF:
            value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
            return value
        if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
