"""Clips (frames in order, with or without labels) and the training samples that are made from them.

`open_clips` finds the labelled clips of a folder. `open_frames` finds the pictures and videos of any folder, for tasks
whose labels are the frames themselves. A clip reads a frame and its labels when they are asked for. `StillsDataset`
turns clips into augmented training samples. `DriftedClip` lets night, noise, fog and others come over a clip. Labels
are class ids, `uint8`. Void pixels, which nobody labelled, have the ignore id: 255 unless the data say otherwise.
"""

from ttt_adapt.data.augment import Augment
from ttt_adapt.data.clip import Clip
from ttt_adapt.data.drift import Drift, DriftedClip, Schedule
from ttt_adapt.data.labelled import LabelledClip
from ttt_adapt.data.layouts import is_unnamed, open_clips
from ttt_adapt.data.stills import StillsDataset
from ttt_adapt.data.street.clip import StreetClip
from ttt_adapt.data.unlabelled import PictureClip, VideoClip, open_frames

__all__ = [
    "Augment",
    "Clip",
    "Drift",
    "DriftedClip",
    "LabelledClip",
    "PictureClip",
    "Schedule",
    "StillsDataset",
    "StreetClip",
    "VideoClip",
    "is_unnamed",
    "open_clips",
    "open_frames",
]
