"""Video in and out: frames from files, folders, cameras and streams; H.264 files.

Frames are uint8 RGB arrays [H, W, 3] everywhere. FFmpeg (`av`) and Pillow are imported when they are first needed.
"""

from ttt_adapt.video.reader import VideoReader, open_video
from ttt_adapt.video.reconnect import Reconnect
from ttt_adapt.video.stats import SourceStats
from ttt_adapt.video.writer import DEFAULT_FPS, VideoWriter, check_format

__all__ = ["DEFAULT_FPS", "Reconnect", "SourceStats", "VideoReader", "VideoWriter", "check_format", "open_video"]
