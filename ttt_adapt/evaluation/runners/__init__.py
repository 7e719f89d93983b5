"""Arms: ways of running the same model on the same video, all with one interface."""

from ttt_adapt.evaluation.runners.base import Arm, ClipRunner, Predict, Runner, Score
from ttt_adapt.evaluation.runners.streaming import Adapting, Fixed
from ttt_adapt.evaluation.runners.table import ARMS, MODIFIERS, find_arm, find_arms

__all__ = [
    "ARMS",
    "MODIFIERS",
    "Adapting",
    "Arm",
    "ClipRunner",
    "Fixed",
    "Predict",
    "Runner",
    "Score",
    "find_arm",
    "find_arms",
]
