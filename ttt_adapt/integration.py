"""What integrations may import in addition to the public names, `ttt_adapt.errors` and `ttt_adapt.objectives`.

An integration (one package per ecosystem, in `integrations/`) imports nothing else of this library, so everything else
may change without breaking one.
"""

from ttt_adapt.arms import ARMS, PRESETS, contradictions, find_arm
from ttt_adapt.colour import colour_frame, rgb_to_lab, to_grey
from ttt_adapt.data.drift import parse_drift
from ttt_adapt.data.order import shuffled_epochs
from ttt_adapt.files import LABEL_FOLDERS, PHOTO_SUFFIXES, folders_in, natural_key
from ttt_adapt.model.features import Features
from ttt_adapt.model.measure import LEAST_STILLS
from ttt_adapt.tasks.colorization.score import psnr
from ttt_adapt.tasks.colorization.task import AB_SCALE
from ttt_adapt.video.pictures import header as picture_header
from ttt_adapt.video.pictures import read_picture

__all__ = [
    "AB_SCALE",
    "ARMS",
    "LABEL_FOLDERS",
    "LEAST_STILLS",
    "PHOTO_SUFFIXES",
    "PRESETS",
    "Features",
    "colour_frame",
    "contradictions",
    "find_arm",
    "folders_in",
    "natural_key",
    "parse_drift",
    "picture_header",
    "psnr",
    "read_picture",
    "rgb_to_lab",
    "shuffled_epochs",
    "to_grey",
]
