"""Video in and out: frames from files, folders, cameras and streams; H.264 files, and videos of labels.

Frames are uint8 RGB arrays [H, W, 3] everywhere. FFmpeg (`av`) and Pillow are imported when they are first needed.
"""

from ttt_adapt.video.film_file import DEFAULT_FPS, check_format
from ttt_adapt.video.label_video import LabelVideoWriter
from ttt_adapt.video.reader import VideoReader, open_video
from ttt_adapt.video.reconnect import Reconnect
from ttt_adapt.video.stats import SourceStats
from ttt_adapt.video.writer import VideoWriter

__all__ = [
    "DEFAULT_FPS", "LabelVideoWriter", "Reconnect", "SourceStats", "VideoReader", "VideoWriter", "check_format",
    "open_video",
]  # fmt: skip
