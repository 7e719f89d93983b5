"""Frames: what a user may pass, the checks that refuse the rest, and the way to what the model takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError, FrameError, FrameTypeError, warn
from ttt_adapt.model.frame_hints import from_float_layout, from_layout, from_object, to_bytes
from ttt_adapt.model.preprocess import ONE_CHANNEL, check_made, check_preprocess, preprocessed
from ttt_adapt.model.probe import data_config

Preprocess = Callable[[Any], Any]
"""A uint8 RGB frame [H, W, 3] -> float [1, 3, H, W] as the model takes it; or a tuple of that and a context.

The context is handed to `predict(x, context)` when this frame is predicted: what a prediction needs beside x.
"""

ACCEPTED = (
    "a uint8 RGB frame [H, W, 3] (NumPy array or tensor; of OpenCV's BGR, pass frame[..., ::-1]), or a float tensor "
    "[3, H, W] or [1, 3, H, W] already normalised as the model takes it"
)


class Normalize:
    """uint8 RGB [H, W, 3], 0 to 255 -> float [1, 3, H, W]: scaled to 0..1, minus mean, over std.

    Args:
        mean: per channel, RGB, for images in 0..1.
        std: per channel.
        size: (H, W) to resize to, bicubic with antialiasing, for models that take one size only; None: as it comes.
    """

    def __init__(
        self,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        size: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not (_three_numbers(mean) and _three_numbers(std)) or min(std) <= 0:
            grey = all(isinstance(each, (list, tuple)) and len(each) == 1 for each in (mean, std))
            raise ConfigError(
                f"mean {mean!r} and std {std!r} must be three finite numbers each, std above 0"
                f"{': frames are RGB; ' + ONE_CHANNEL if grey else ''}"
            )
        if max(map(abs, mean)) > 3 or max(std) > 3:
            raise ConfigError(
                f"mean {tuple(mean)} and std {tuple(std)} are for images in 0..255; expected those for images in 0..1: "
                "divide them by 255"
            )
        self.mean, self.std, self.size = tuple(mean), tuple(std), size
        self._device = None if device is None else torch.device(device)
        place = "cpu" if device is None else device  # and not PyTorch's default device
        shift, scale = (torch.tensor(values, device=place).view(1, 3, 1, 1) for values in (mean, std))
        self._shift, self._scale = -shift / scale, 1.0 / (255.0 * scale)

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest value that a picture has after it."""
        pairs = list(zip(self.mean, self.std, strict=True))
        return min(-m / s for m, s in pairs), max((1 - m) / s for m, s in pairs)

    def __call__(self, frame: Any) -> Tensor:
        """[H, W, 3] uint8 -> [1, 3, H, W] float32, on the normaliser's device, or without one where the frame is."""
        if not isinstance(frame, np.ndarray | Tensor):
            raise FrameTypeError(
                f"the frame is of type {type(frame).__name__}; expected {ACCEPTED}{from_object(frame)}"
            )
        x = self.scaled(to_device(frame, self._device).permute(2, 0, 1)[None])
        if self.size is not None and tuple(x.shape[-2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True, align_corners=False)
        return x.contiguous()

    def scaled(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, 3, H, W], pixel by pixel, without a resize."""
        if self._scale.device != pixels.device:
            self._shift, self._scale = self._shift.to(pixels.device), self._scale.to(pixels.device)
        return torch.addcmul(self._shift, pixels.float(), self._scale)


def _three_numbers(values: Any) -> bool:
    try:
        return len(values) == 3 and all(map(math.isfinite, values))
    except TypeError:  # no sequence, or not of numbers
        return False


def to_device(frame: Any, device: torch.device | None) -> Tensor:
    """A frame (array or tensor) on `device`; to a CUDA device by pinned memory, without waiting for the copy."""
    if isinstance(frame, np.ndarray):
        frame = np.require(frame, requirements=["C", "W"])  # views that PyTorch cannot share, such as BGR reversed
    x = torch.from_numpy(frame) if isinstance(frame, np.ndarray) else frame
    if device is None or device.type != "cuda" or x.device.type != "cpu":
        return x.to(x.device if device is None else device)
    if x.is_pinned():  # the caller's own, who may fill it again before the copy is through
        return copied_beside(torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True).copy_(x), device)
    return copied_beside(x.contiguous().pin_memory(), device)


@functools.cache
def copy_stream(index: int) -> torch.cuda.Stream:
    """The stream of a CUDA device on which frames are copied to it."""
    return torch.cuda.Stream(index)


def copied_beside(pinned: Tensor, device: torch.device) -> Tensor:
    """A pinned tensor on a CUDA device, copied beside the work that waits there, such as the step before."""
    caller = torch.cuda.current_stream(device)
    index = caller.device_index  # "cuda" alone is whichever device is the current one
    with torch.cuda.stream(copy_stream(index)):
        x = pinned.to(f"cuda:{index}", non_blocking=True)
    caller.wait_stream(copy_stream(index))
    x.record_stream(caller)
    return x


def pixels_of(frame: Any, preprocess: Preprocess | None, device: torch.device) -> Any:
    """A uint8 frame on `device`, if `preprocess` is `Normalize` alone; every other frame is None."""
    known = isinstance(frame, np.ndarray | Tensor) and frame.dtype in (np.uint8, torch.uint8)
    return to_device(frame, device) if known and type(preprocess) is Normalize else None


def scaling(preprocess: Preprocess | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """What `Normalize` does to pixels, uint8 [B, 3, H, W] -> `dtype`; None for every other `preprocess`."""
    return (lambda pixels: preprocess.scaled(pixels).to(dtype)) if type(preprocess) is Normalize else None


def default_preprocess(model: nn.Module, device: torch.device) -> Normalize | None:
    """The model's own normalisation, from the data configuration that timm keeps on it; None for other models."""
    config = data_config(model)
    if not config:
        return None
    return Normalize(tuple(config["mean"]), tuple(config["std"]), _fixed_size(model), device)


def _fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """(H, W) of a model that takes one size only, as timm's ViTs and Swins do unless they were told otherwise.

    Embeddings of patches say it. One behind a stem has the size of what the stem returns, so a module around it goes
    first, if it names a size.
    """
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if not (getattr(module, "strict_img_size", False) and getattr(module, "img_size", None)):
            continue
        parts = path.split(".") if path else []
        around = (modules[".".join(parts[:depth])] for depth in range(len(parts) + 1))
        size: Any = next(size for size in (getattr(each, "img_size", None) for each in around) if size)
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return None


class TakenFrame(NamedTuple):
    """A frame on its way through the stream.

    Attributes:
        x: float [1, 3, H, W], as the model takes it.
        pixels: uint8 [H, W, 3], as it came, where the window may keep that instead; else None.
        context: (what `preprocess` returned beside x,), or () where it returned x alone.
        small: a thumbnail of the frame as it came, for those who look at cameras; else None.
    """

    x: Tensor
    pixels: Tensor | None = None
    context: tuple[Any, ...] = ()
    small: Tensor | None = None


class FrameIntake:
    """Takes frames into a stream: checked, as the model takes them, on its device.

    Args:
        preprocess: for uint8 frames; None: they are refused.
        device: of the model.
        dtype: of the model's images.
        crop_size: (H, W) of the crops that are drawn from a frame; None: whole frames.
        expects: how the model's own frames are normalised, as far as it is known: frames that look as if they were not
            get one warning.
    """

    def __init__(
        self,
        preprocess: Preprocess | None,
        device: torch.device,
        dtype: torch.dtype,
        crop_size: tuple[int, int] | None = None,
        expects: Normalize | None = None,
    ) -> None:
        check_preprocess(preprocess)
        self.preprocess, self.device, self.dtype, self._crop = preprocess, device, dtype, crop_size
        known = preprocess if isinstance(preprocess, Normalize) else expects
        self._limits = None if known is None or known.limits == (0.0, 1.0) else known.limits

    @torch.inference_mode(False)
    @torch.no_grad()
    def take(self, frame: Any, stream_shape: tuple[int, ...] | None = None) -> TakenFrame:
        """Check a frame and turn it into what the model takes.

        Args:
            frame: uint8 RGB [H, W, 3], or float [3, H, W] or [1, 3, H, W] as the model takes it.
            stream_shape: (3, H, W) of the frames of the stream so far; None at its beginning.

        Raises:
            FrameTypeError, FrameError: the frame cannot be used, has another size than the stream so far, or is
                smaller than a crop.
        """
        if getattr(frame, "dtype", None) in (np.uint8, torch.uint8):
            _check_layout(frame)  # as it came, so that the advice is about an array, or a tensor
        pixels = pixels_of(frame, self.preprocess, self.device)
        came = frame if pixels is None else pixels
        x, context, values = _model_input(came, self.preprocess, self.device, self.dtype)
        if values is not None and self._limits is not None:
            self._look_at(*values)
        x = x.clone() if x.is_inference() else x
        if stream_shape is not None and stream_shape != tuple(x.shape[1:]):
            raise FrameError(
                f"the frame is {tuple(x.shape[2:])} (H, W) after preprocessing, and those of the stream so far are "
                f"{stream_shape[1:]}: call reset() where a new video begins, or resize the frames"
            )
        if self._crop is not None and (self._crop[0] > x.shape[2] or self._crop[1] > x.shape[3]):
            raise FrameError(
                f"crop_size {self._crop} does not fit into a frame of {tuple(x.shape[2:])} (H, W): lower it"
            )
        resized = pixels is not None and pixels.shape[:2] != x.shape[2:]
        return TakenFrame(x, None if resized else pixels, context)

    def _look_at(self, low: float, high: float) -> None:
        """Warn, once, of a frame between 0 and 1 for a model whose frames are normalised."""
        if 0.0 <= low < high <= 1.0 and self._limits is not None:
            floor, ceiling = self._limits
            self._limits = None
            warn(
                f"all values of the frame lie in [{low:.3g}, {high:.3g}], and this model takes frames that are "
                f"normalised, to [{floor:.3g}, {ceiling:.3g}]: subtract its mean and divide by its std, or pass uint8 "
                "frames [H, W, 3]"
            )


def to_model_input(
    frame: Any, preprocess: Preprocess | None, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Check a frame and turn it into [1, 3, H, W] float on `device`, cast to `dtype` where one is given.

    Raises:
        FrameTypeError: not an array or tensor, or a dtype that is neither uint8 nor floating point.
        FrameError: wrong shape or layout, NaN or infinite values, or no known normalisation for uint8.
    """
    return _model_input(frame, preprocess, device, dtype)[0]


def _model_input(
    frame: Any, preprocess: Preprocess | None, device: torch.device, dtype: torch.dtype | None
) -> tuple[Tensor, tuple[Any, ...], tuple[float, float] | None]:
    """`to_model_input`, the context that came with it, and lowest and highest value, as far as they were looked at.

    Values that `preprocess` leaves on another device than the CPU are not looked at: the host would wait for them.
    """
    if not isinstance(frame, np.ndarray | Tensor):
        got = "None (did the video end?)" if frame is None else f"of type {type(frame).__name__}"
        raise FrameTypeError(f"the frame is {got}; expected {ACCEPTED}{from_object(frame)}")
    is_float = frame.dtype not in (np.uint8, torch.uint8)
    context: tuple[Any, ...] = ()
    x = _from_float(frame) if is_float else _from_uint8(frame, preprocess)
    if isinstance(x, tuple) and len(x) == 2:
        x, context = x[0], (x[1],)
    x = check_made(x)
    values = None
    if is_float or (x.device.type == "cpu" and type(preprocess) is not Normalize):  # which makes finite values
        values = _value_range(x, x.dtype if dtype is None else dtype, "" if is_float else " behind preprocess")
    if is_float and values is not None and isinstance(preprocess, Normalize):
        _check_range(*values, preprocess)
    x = to_device(x, device)
    return (x if dtype is None else x.to(dtype)), context, values


def _value_range(x: Tensor, dtype: torch.dtype, where: str) -> tuple[float, float]:
    """The lowest and the highest value, which the host waits for.

    Raises:
        FrameError: they are not finite, also in the precision `dtype` of the model.
    """
    low, high = torch.stack(torch.aminmax(x)).tolist()
    if not np.isfinite([low, high]).all():
        raise FrameError(f"the frame holds NaN or infinite values{where}: drop it, or repair it before the step")
    if max(abs(low), abs(high)) > torch.finfo(dtype).max:
        raise FrameError(
            f"the frame lies in [{low:.4g}, {high:.4g}]{where}, which is infinite in the model's {dtype}: normalise it "
            "as the model takes it"
        )
    return low, high


def _check_layout(frame: Any) -> None:
    """Refuse a uint8 frame that is not [H, W, 3].

    Raises:
        FrameError: it is not; the message has the way there.
        FrameTypeError: a tensor without values, or a sparse one.
    """
    if isinstance(frame, Tensor):
        _check_dense(frame)
    shape = tuple(frame.shape)
    if len(shape) != 3 or shape[2] != 3:
        raise FrameError(f"the uint8 frame is {shape}; expected [H, W, 3] RGB{from_layout(frame)}")
    if 0 in shape:
        raise FrameError(f"the frame is empty: {shape}")


def _check_dense(frame: Tensor) -> None:
    """Refuse a tensor without values, or a sparse one.

    Raises:
        FrameTypeError: it is one.
    """
    if frame.is_meta:
        raise FrameTypeError(f"the frame is on the meta device, which keeps no values; expected {ACCEPTED}")
    if frame.layout is not torch.strided:
        raise FrameTypeError(f"the frame has the layout {frame.layout}; expected {ACCEPTED}: pass frame.to_dense()")


def _from_uint8(frame: Any, preprocess: Preprocess | None) -> Any:
    _check_layout(frame)
    if preprocess is None:
        raise FrameError(
            "a uint8 frame came, and this model says nothing of its normalisation: pass preprocess=Normalize(mean, "
            "std) (from ttt_adapt), or frames as float [3, H, W] already normalised as the model takes them"
        )
    return preprocessed(preprocess, frame)


def _from_float(frame: Any) -> Tensor:
    if not (frame.dtype.kind == "f" if isinstance(frame, np.ndarray) else frame.is_floating_point()):
        raise FrameTypeError(f"the frame has dtype {frame.dtype}; expected {ACCEPTED}{to_bytes(frame)}")
    x = to_device(frame, None).detach()
    shape = tuple(x.shape)
    _check_dense(x)
    if x.ndim == 3:
        x = x[None]
    if x.ndim == 4 and x.shape[:2] == (1, 1):
        raise FrameError(f"the float frame is {shape}; expected [3, H, W] or [1, 3, H, W]: {ONE_CHANNEL}")
    if x.ndim != 4 or x.shape[0] != 1 or x.shape[1] != 3:
        raise FrameError(f"the float frame is {shape}; expected [3, H, W] or [1, 3, H, W]{from_float_layout(frame)}")
    if 0 in shape:
        raise FrameError(f"the frame is empty: {shape}")
    return x


def _check_range(low: float, high: float, normalize: Normalize) -> None:
    """Refuse floats that cannot be images normalised with this mean and std, such as 0..255."""
    floor, ceiling = normalize.limits
    limit = 10.0 * max(abs(floor), abs(ceiling))  # resampling and noise overshoot a little, 0..255 lies far outside
    if max(abs(low), abs(high)) > limit:
        raise FrameError(
            f"the float frame lies in [{low:.4g}, {high:.4g}]; normalised with this model's mean and std it would lie "
            f"in [{floor:.4g}, {ceiling:.4g}]: pass 0..255 frames as uint8 [H, W, 3], or normalise them first"
        )
