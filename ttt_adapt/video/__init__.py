"""Video in and out: frames from files, folders, cameras and streams; H.264 files; overlays.

Frames are uint8 RGB arrays [H, W, 3] everywhere. FFmpeg (`av`) and Pillow are imported when they are first needed.
"""

from ttt_adapt.video.reader import VideoReader, open_video
from ttt_adapt.video.writer import DEFAULT_FPS, VideoWriter, check_format
from ttt_adapt.view.overlay import blend, colorize, default_palette, panels, to_uint8

__all__ = [
    "DEFAULT_FPS",
    "VideoReader",
    "VideoWriter",
    "blend",
    "check_format",
    "colorize",
    "default_palette",
    "open_video",
    "panels",
    "to_uint8",
]
