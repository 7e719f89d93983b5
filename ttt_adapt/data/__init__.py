"""Clips of many layouts, labelled or not, and training stills.

`open_clips` finds the labelled clips of a folder; each gives its frames with their label images lazily and in order.
`open_frames` finds the pictures and videos of any folder, for tasks whose labels are the frames themselves.
`StillsDataset` turns clips into augmented training samples. Class ids are `uint8`; the ignore id (255 unless the data
say otherwise) marks void pixels.
"""

from ttt_adapt.data.augment import Augment
from ttt_adapt.data.clip import Clip
from ttt_adapt.data.labelled import LabelledClip
from ttt_adapt.data.layouts import is_unnamed, open_clips
from ttt_adapt.data.stills import StillsDataset
from ttt_adapt.data.street.clip import StreetClip
from ttt_adapt.data.unlabelled import PictureClip, VideoClip, open_frames

__all__ = [
    "Augment",
    "Clip",
    "LabelledClip",
    "PictureClip",
    "StillsDataset",
    "StreetClip",
    "VideoClip",
    "is_unnamed",
    "open_clips",
    "open_frames",
]
