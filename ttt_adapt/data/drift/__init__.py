"""Drift as data: night, noise, fog, rain, ... over any clip, with severities and schedules, reproducible by a seed.

`Drift("night", 3).apply(frame, index)` changes a frame. `DriftedClip` does it to the frames of a clip and keeps the
labels. `Schedule` lets drifts come and go. `parse_drift("night:3")` and `parse_schedule("none..night:3..none")` read
them from text.
"""

from ttt_adapt.data.drift.clip import DriftedClip, ForthAndBack
from ttt_adapt.data.drift.schedule import Schedule, parse_drifts, parse_schedule
from ttt_adapt.data.drift.table import DRIFTS, NONE, SEVERITIES, Drift, drifted, every_drift, parse_drift

__all__ = [
    "DRIFTS",
    "NONE",
    "SEVERITIES",
    "Drift",
    "DriftedClip",
    "ForthAndBack",
    "Schedule",
    "drifted",
    "every_drift",
    "parse_drift",
    "parse_drifts",
    "parse_schedule",
]
