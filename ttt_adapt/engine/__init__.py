"""How a step runs: eager, compiled, or recorded as a CUDA graph."""

from ttt_adapt.engine.choose import choose_engine, describe_engines
from ttt_adapt.engine.eager import EagerEngine, Problem, explained_memory_errors
from ttt_adapt.engine.overlap import Beside
from ttt_adapt.stream.report import StepReport

__all__ = [
    "Beside",
    "EagerEngine",
    "Problem",
    "StepReport",
    "choose_engine",
    "describe_engines",
    "explained_memory_errors",
]
