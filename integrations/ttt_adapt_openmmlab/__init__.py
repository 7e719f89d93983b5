"""Online test-time training in MMEngine, mmsegmentation and mmdetection: one wrapper to train, one hook to test.

Import this package before `mmseg.apis` and `mmdet.apis`. With mmcv-lite, which has no compiled operators, these can be
imported only after this package has put a stand-in in the place of the operators. A config imports it by
`custom_imports`.
"""

from ttt_adapt_openmmlab.environment import allow_zoo_checkpoints, require_packages
from ttt_adapt_openmmlab.ops.stand_in import speed_up_deformable_attention, stand_in_for_missing_ops

require_packages()
stand_in_for_missing_ops()
speed_up_deformable_attention()
allow_zoo_checkpoints()

from ttt_adapt_openmmlab.calibration import calibrate  # noqa: E402
from ttt_adapt_openmmlab.colorization import Colorizer, ColourPictures, PackColours, StreamColourMetric  # noqa: E402
from ttt_adapt_openmmlab.datasets import (  # noqa: E402
    CamVidStream,
    CocoVideos,
    DriftFrame,
    KittiStep,
    LoadKittiStepAnnotations,
    LoadPanopticSegments,
    LoadPicture,
)
from ttt_adapt_openmmlab.datasets.check import check_tree  # noqa: E402
from ttt_adapt_openmmlab.datasets.frame_order import video_of  # noqa: E402
from ttt_adapt_openmmlab.datasets.samplers import VideoSampler  # noqa: E402
from ttt_adapt_openmmlab.decoders import branch_for  # noqa: E402
from ttt_adapt_openmmlab.hooks import OnlineTTTHook  # noqa: E402
from ttt_adapt_openmmlab.joint import JointMAE, find_branch, plain_model  # noqa: E402
from ttt_adapt_openmmlab.metrics import StreamAPMetric, StreamIoUMetric, StreamPQMetric  # noqa: E402
from ttt_adapt_openmmlab.panoptic_kit import stand_in_for_panopticapi  # noqa: E402
from ttt_adapt_openmmlab.stream import stream_adapter  # noqa: E402

stand_in_for_panopticapi()

__all__ = [
    "CamVidStream",
    "CocoVideos",
    "Colorizer",
    "ColourPictures",
    "DriftFrame",
    "JointMAE",
    "KittiStep",
    "LoadKittiStepAnnotations",
    "LoadPanopticSegments",
    "LoadPicture",
    "OnlineTTTHook",
    "PackColours",
    "StreamAPMetric",
    "StreamColourMetric",
    "StreamIoUMetric",
    "StreamPQMetric",
    "VideoSampler",
    "branch_for",
    "calibrate",
    "check_tree",
    "find_branch",
    "plain_model",
    "stream_adapter",
    "video_of",
]
