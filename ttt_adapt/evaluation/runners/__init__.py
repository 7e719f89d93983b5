"""Runners: what streams a video through a model for an arm, all with one interface."""

from ttt_adapt.evaluation.runners.base import ClipRunner, Predict, Runner, Score
from ttt_adapt.evaluation.runners.start import RUNNERS, configured, runner_of, start
from ttt_adapt.evaluation.runners.streaming import Adapting, Fixed

__all__ = [
    "RUNNERS",
    "Adapting",
    "ClipRunner",
    "Fixed",
    "Predict",
    "Runner",
    "Score",
    "configured",
    "runner_of",
    "start",
]
