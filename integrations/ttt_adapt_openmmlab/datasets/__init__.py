"""Data sets that are videos: CamVid, KITTI-STEP and COCO Videos."""

from ttt_adapt_openmmlab.datasets.camvid import CamVidStream
from ttt_adapt_openmmlab.datasets.coco_videos import CocoVideos
from ttt_adapt_openmmlab.datasets.drift_frame import DriftFrame
from ttt_adapt_openmmlab.datasets.kitti_step import KittiStep
from ttt_adapt_openmmlab.datasets.load_picture import LoadPicture
from ttt_adapt_openmmlab.datasets.transforms import LoadKittiStepAnnotations, LoadPanopticSegments

__all__ = [
    "CamVidStream",
    "CocoVideos",
    "DriftFrame",
    "KittiStep",
    "LoadKittiStepAnnotations",
    "LoadPanopticSegments",
    "LoadPicture",
]
