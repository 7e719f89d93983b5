"""Labelled clips of many layouts, and training stills, for semantic segmentation.

`open_clips` finds the labelled clips of a folder; each gives its frames with their label images lazily and in order.
`StillsDataset` turns clips into augmented training samples. Class ids are `uint8`; the ignore id (255 unless the data
say otherwise) marks void pixels.
"""

from ttt_adapt.augment import Augment
from ttt_adapt.data.clips import Clip, LabelledClip, Sample
from ttt_adapt.data.layouts import FORMATS, is_unnamed, open_clips
from ttt_adapt.data.stills import StillsDataset
from ttt_adapt.data.street import StreetClip

__all__ = [
    "FORMATS",
    "Augment",
    "Clip",
    "LabelledClip",
    "Sample",
    "StillsDataset",
    "StreetClip",
    "is_unnamed",
    "open_clips",
]
