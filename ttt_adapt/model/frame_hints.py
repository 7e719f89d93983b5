"""The way from what people have (grey, BGR, RGBA, PIL, floats, batches) to a frame, for the errors of wrong frames."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import Tensor


def from_object(frame: Any) -> str:
    """What to do with a frame that is neither an array nor a tensor, as the end of a sentence; "" where unknown."""
    package = type(frame).__module__.partition(".")[0]
    if package == "PIL":
        return ': pass np.asarray(image.convert("RGB"))'
    if package == "av":
        return ': pass frame.to_ndarray(format="rgb24")'
    if isinstance(frame, (str, os.PathLike)):
        return ": read it first, by ttt_adapt.video.open_video(path)"
    if isinstance(frame, tuple) and len(frame) == 2 and isinstance(frame[1], np.ndarray):
        return ": pass the array alone"
    if isinstance(frame, (list, tuple)) and frame and isinstance(frame[0], np.ndarray | Tensor):
        return ": pass the frames one by one, or all by adapter.stream(frames)"
    if isinstance(frame, (list, tuple)) or hasattr(frame, "__array__"):
        return ": pass np.asarray(frame, dtype=np.uint8)"
    return ""


def from_layout(frame: Any) -> str:
    """What to do with a frame of another layout, as the end of a sentence.

    Args:
        frame: a uint8 or float array or tensor that is not laid out as a frame.
    """
    steps: list[str] = []
    shape = tuple(frame.shape)
    if 0 in shape:
        return ""
    if len(shape) > 3 and shape[0] > 1:
        return ": it is a batch, pass its frames one by one"
    while len(shape) > 3 and shape[0] == 1:
        steps, shape = [*steps, "it is a batch of one, take frame[0]"], shape[1:]
    if len(shape) not in (2, 3):
        return ""
    if len(shape) == 3 and shape[2] not in (1, 2, 3, 4) and shape[0] in (1, 3, 4):
        channels, how = shape[0], "frame.permute(1, 2, 0)" if isinstance(frame, Tensor) else "frame.transpose(1, 2, 0)"
        steps.append(f"transpose it to channels last, {how}")
    else:
        channels = 1 if len(shape) == 2 else shape[2]
    if channels in (1, 2):
        steps.append(f"it is grey, repeat it in three channels, {_grey(frame, len(shape), channels)}")
    elif channels == 4:
        steps.append("leave its alpha channel out, frame[..., :3] (of BGRA frame[..., 2::-1])")
    elif channels != 3:
        return ""
    return ": " + ", then ".join(steps) if steps else ""


def from_float_layout(frame: Any) -> str:
    """What to do with a float frame of another layout, as the end of a sentence: the way to bytes leads through it."""
    shape = tuple(frame.shape)
    if len(shape) == 4 and shape[0] > 1:
        return ": it is a batch, pass its frames one by one"
    plain, layout = to_bytes(frame).removeprefix(": "), from_layout(frame).removeprefix(": ")
    if not plain:  # normalised already
        channels_first = len(shape) in (3, 4) and shape[-1] == 3
        return ": channels come first, and HWC frames are uint8" if channels_first else ""
    last = "channels come first, and HWC frames are uint8: " if shape[-1:] == (3,) else ""
    return f": {last}{layout + ', then ' if layout else ''}{plain}"


def _grey(frame: Any, dimensions: int, channels: int) -> str:
    plane = "frame[..., None]" if dimensions == 2 else "frame[..., :1]" if channels == 2 else "frame"
    return f"{plane}.expand(-1, -1, 3)" if isinstance(frame, Tensor) else f"np.repeat({plane}, 3, axis=2)"


def to_bytes(frame: Any) -> str:
    """How the numbers of a frame that is not uint8 become bytes, as the end of a sentence; "" where unknown."""
    if "complex" in str(frame.dtype):
        return ""
    try:
        low, high = float(frame.min()), float(frame.max())
    except (TypeError, ValueError, RuntimeError):  # text, objects or no numbers
        return ""
    cast = ".to(torch.uint8)" if isinstance(frame, Tensor) else ".astype(np.uint8)"
    if str(frame.dtype).endswith("bool"):
        return f": make it bytes, 255 * frame{cast}"
    if low >= 0 and high <= 1 and _is_float(frame):
        return f": make it bytes, (255 * frame).round(){cast}"
    if low >= 0 and high <= 255:
        return f": make it bytes, frame{cast}"
    if low >= 0 and high <= 65535 and not _is_float(frame):
        return f": make it bytes of its upper 8 bits, (frame >> 8){cast}"
    return ""


def _is_float(frame: Any) -> bool:
    return frame.is_floating_point() if isinstance(frame, Tensor) else frame.dtype.kind == "f"
