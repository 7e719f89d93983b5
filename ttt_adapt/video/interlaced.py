"""Interlaced video: two half pictures in one frame, of two moments, become one whole picture of one moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ttt_adapt.video.sources import import_av

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.stream import VideoStream


def deinterlaced(frames: Iterator[VideoFrame], stream: VideoStream, say: Callable[[str], None]) -> Iterator[VideoFrame]:
    """The same number of frames in the same order, without comb-like edges of what moves. Others pass as they are.

    From the first interlaced frame on, FFmpeg's filter bwdif sees every frame; it holds one back until the next comes.

    Args:
        frames: decoded frames in display order. Their error comes after all frames before it.
        stream: where they are from.
        say: is told when the first interlaced frame comes.
    """
    graph: Any = None
    error: Exception | None = None
    try:
        for frame in frames:
            if graph is None and frame.interlaced_frame:
                say("is interlaced: the half pictures of each frame are made into one (bwdif)")
                graph = _filter(stream)
            if graph is None:
                yield frame
            else:
                graph.push(frame)
                yield from _ready(graph)
    except Exception as caught:
        error = caught
    if graph is not None:
        graph.push(None)  # the frame that is held back
        yield from _ready(graph)
    if error is not None:
        raise error


def _filter(stream: VideoStream) -> Any:
    from av.filter import Graph

    graph = Graph()
    source, sink = graph.add_buffer(template=stream), graph.add("buffersink")
    bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
    source.link_to(bwdif)
    bwdif.link_to(sink)
    graph.configure()
    return graph


def _ready(graph: Any) -> Iterator[VideoFrame]:
    """The frames that the filter has finished."""
    av = import_av()
    while True:
        try:
            yield graph.pull()
        except (av.BlockingIOError, av.EOFError):  # it wants another frame, or is through
            return
