"""Pictures of predictions: colours, overlays, and panels with captions. Images are uint8 RGB [H, W, 3]."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt_adapt.errors import ConfigError, FrameError, FrameTypeError, missing

if TYPE_CHECKING:
    import torch
    from PIL import Image, ImageFont

BAR_COLOR = (24, 24, 28)
TEXT_COLOR = (245, 245, 245)
GOLDEN_RATIO = 0.618033988749895  # steps of this share of the hue circle never come close to an earlier one


def default_palette(n: int) -> np.ndarray:
    """`n` distinct colours, uint8 [n, 3]; the first k of them are the same for every n >= k."""
    if not 0 <= n <= 256:
        raise ConfigError(f"n is {n}, expected 0 to 256 colours.")
    rings = ((0.75, 1.0), (0.95, 0.75), (0.45, 0.9))  # (saturation, value), one after the other
    colors = [colorsys.hsv_to_rgb(k * GOLDEN_RATIO % 1, *rings[k % 3]) for k in range(n)]
    return np.round(np.array(colors).reshape(n, 3) * 255).astype(np.uint8)


def colorize(labels: np.ndarray, palette: np.ndarray, ignore: int | None = 255) -> np.ndarray:
    """Colour each label.

    Args:
        labels: integers [H, W], indices into `palette`.
        palette: uint8 RGB [n, 3].
        ignore: the label without a colour, shown black; None where every label has one.

    Returns:
        uint8 RGB [H, W, 3].

    Raises:
        FrameTypeError: `labels` are not integers.
        FrameError: `labels` are not [H, W], or a label has no colour in the palette.
    """
    labels, palette = np.asarray(labels), np.asarray(palette)
    if labels.dtype.kind not in "iu":
        raise FrameTypeError(f"labels have dtype {labels.dtype}, expected integers.")
    if labels.ndim != 2:
        raise FrameError(f"labels have shape {list(labels.shape)}, expected [H, W].")
    if palette.ndim != 2 or palette.shape[1] != 3:
        raise ConfigError(f"palette has shape {list(palette.shape)}, expected [n, 3].")
    known = np.ones(labels.shape, bool) if ignore is None else labels != ignore
    outside = np.unique(labels[known & ((labels < 0) | (labels >= len(palette)))])
    if outside.size:
        raise FrameError(
            f"labels hold {outside[:5].tolist()}, but the palette has colours for 0 to {len(palette) - 1}."
        )
    colors = np.zeros((*labels.shape, 3), np.uint8)
    colors[known] = palette[labels[known]]
    return colors


def blend(
    frame: np.ndarray, labels: np.ndarray, palette: np.ndarray, alpha: float = 0.5, ignore: int | None = 255
) -> np.ndarray:
    """The frame with coloured labels over it.

    Args:
        frame: uint8 RGB [H, W, 3].
        labels: integers [H, W], indices into `palette`.
        palette: uint8 RGB [n, 3].
        alpha: share of the colour, 0 (frame only) to 1 (colour only).
        ignore: the label that leaves the frame as it is; None where no label does.

    Returns:
        uint8 RGB [H, W, 3].
    """
    check_image(frame, "frame")
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}, expected 0 to 1.")
    labels = np.asarray(labels)
    if labels.shape != frame.shape[:2]:
        raise FrameError(f"labels have shape {list(labels.shape)}, expected {list(frame.shape[:2])} as the frame has.")
    mixed = (1 - alpha) * frame + alpha * colorize(labels, palette, ignore)
    out = np.round(mixed).astype(np.uint8)
    return out if ignore is None else np.where((labels == ignore)[..., None], frame, out)


def fitted(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The image in a picture of another size: scaled as a whole, with its aspect, in the middle of a dark ground.

    Args:
        image: uint8 RGB [h, w, 3].
        size: (H, W).

    Returns:
        uint8 RGB [H, W, 3]; the image itself where it has that size.
    """
    if image.shape[:2] == tuple(size):
        return image
    _need_pillow()
    from PIL import Image

    (h, w), (height, width) = image.shape[:2], size
    scale = min(height / h, width / w)
    small = max(round(w * scale), 1), max(round(h * scale), 1)
    ground = Image.new("RGB", (width, height), BAR_COLOR)
    picture = Image.fromarray(np.ascontiguousarray(image)).resize(small, Image.Resampling.BILINEAR)
    ground.paste(picture, ((width - small[0]) // 2, (height - small[1]) // 2))
    return np.array(ground)


def panels(
    images: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]], columns: int | None = None
) -> np.ndarray:
    """Images side by side, each under its caption.

    Args:
        images: caption to uint8 RGB [H, W, 3], in order; resized to the first one's size where they differ.
        columns: panels per row; None puts all in one row. Empty places are dark.

    Returns:
        uint8 RGB [rows * (H + bar), columns * W, 3].

    Raises:
        FrameError: there are no images, or one is not [H, W, 3].
        FrameTypeError: an image is not a uint8 array.
        MissingPackageError: Pillow is not installed.
    """
    _need_pillow()
    from PIL import Image

    items = list(images.items() if isinstance(images, Mapping) else images)
    if not items:
        raise FrameError("images is empty, expected at least one (caption, image).")
    for caption, image in items:
        check_image(image, f"panel {caption!r}")
    columns = len(items) if columns is None else columns
    if columns < 1:
        raise ConfigError(f"columns is {columns}, expected at least 1.")
    height, width = items[0][1].shape[:2]
    bar = max(14, round(height * 0.09))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(items) / columns) * (height + bar)), BAR_COLOR)
    for k, (caption, image) in enumerate(items):
        x, y = k % columns * width, k // columns * (height + bar)
        picture = Image.fromarray(np.ascontiguousarray(image))
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        sheet.paste(_caption_bar(str(caption), width, bar), (x, y))
        sheet.paste(picture, (x, y + bar))
    return np.array(sheet)


def legend(
    names: Sequence[str], palette: np.ndarray | Sequence[Sequence[int]], width: int, height: int | None = None
) -> np.ndarray:
    """A strip that says which class has which colour, in as many rows as its width needs.

    Args:
        names: of the classes.
        palette: their colours, RGB in [0, 255], one for each name.
        width: of the strip, pixels.
        height: of the strip, pixels; names that do not fit are left out, but never the first row. None: as needed.

    Returns:
        uint8 RGB [rows * bar, width, 3]; of that height, if one is given.

    Raises:
        ConfigError: no names, not one colour for each, or a width too small for the longest name.
        MissingPackageError: Pillow is not installed.
    """
    _need_pillow()
    from PIL import Image, ImageDraw

    if not names or len(names) != len(palette):
        raise ConfigError(f"got {len(names)} names and {len(palette)} colours; expected one colour for each name.")
    bar, font, places = _places_in_legend(names, width)
    swatch, gap = round(bar * 0.6), round(bar * 0.4)
    rows = places[-1][1] // bar + 1 if height is None else max(height // bar, 1)
    strip = Image.new("RGB", (width, rows * bar if height is None else max(height, bar)), BAR_COLOR)
    draw = ImageDraw.Draw(strip)
    for name, colour, (x, y) in zip(names, palette, places, strict=True):
        if y >= rows * bar:
            break
        top = y + (bar - swatch) / 2
        draw.rectangle((x, top, x + swatch, top + swatch), fill=tuple(int(value) for value in colour))
        draw.text((x + swatch + gap, y + bar / 2), name, fill=TEXT_COLOR, font=font, anchor="lm")
    return np.array(strip)


def names_that_fit(names: Sequence[str], width: int, height: int) -> bool:
    """Whether a `legend` of this size has room for all names.

    Raises:
        ConfigError: no names, or a width too small for the longest name.
        MissingPackageError: Pillow is not installed.
    """
    _need_pillow()
    if not names:
        raise ConfigError("got no names; expected at least one.")
    bar, _, places = _places_in_legend(names, width)
    return places[-1][1] // bar < max(height // bar, 1)


def _places_in_legend(names: Sequence[str], width: int) -> tuple[int, Any, list[tuple[int, int]]]:
    """Height of a row, font, and the place (x, y) of each name."""
    from PIL import ImageFont

    bar = max(14, round(width * 0.033))
    font = ImageFont.load_default(bar * 0.62)
    swatch, gap = round(bar * 0.6), round(bar * 0.4)
    needed = [swatch + gap + math.ceil(font.getlength(name)) for name in names]
    if max(needed) + 2 * gap > width:
        raise ConfigError(
            f"width is {width}; expected at least {max(needed) + 2 * gap}, for the longest name of the legend: enlarge "
            "the pictures, or leave legend out"
        )
    places, x, row = [], gap, 0
    for size in needed:
        if x + size + gap > width:
            x, row = gap, row + 1
        places.append((x, row * bar))
        x += size + 3 * gap
    return bar, font, places


def to_uint8(image: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised tensor back as an image.

    Args:
        image: float [3, H, W] or [1, 3, H, W], (rgb - mean) / std with rgb in [0, 1]; any device.
        mean: one per channel, on the scale [0, 1].
        std: one per channel, on the scale [0, 1].

    Returns:
        uint8 RGB [H, W, 3]; values outside of the range are clipped.
    """
    import torch

    shape = list(image.shape)
    if len(shape) == 4 and shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.shape[0] != 3:
        raise FrameError(f"image has shape {shape}, expected [3, H, W].")
    pixels = image.detach().float().cpu()
    scale, shift = (torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1) for values in (std, mean))
    rgb = (pixels * scale + shift).nan_to_num().clamp(0, 1)
    return (rgb * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def check_image(image: np.ndarray, name: str) -> None:
    """Check that `image` is a picture.

    Args:
        image: what to check.
        name: its name in the message.

    Raises:
        FrameTypeError: it is not a uint8 array.
        FrameError: it is not [H, W, 3].
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        what = f"{image.dtype} array" if isinstance(image, np.ndarray) else type(image).__name__
        raise FrameTypeError(f"{name} is a {what}, expected a uint8 NumPy array [H, W, 3].")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise FrameError(f"{name} has shape {list(image.shape)}, expected [H, W, 3].")


def _need_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise missing("pillow", "video") from error


def _caption_bar(caption: str, width: int, height: int) -> Image.Image:
    from PIL import Image, ImageDraw

    bar = Image.new("RGB", (width, height), BAR_COLOR)
    draw = ImageDraw.Draw(bar)
    font = _fitting_font(caption, width - 6, height)
    draw.text((width / 2, height / 2), caption, fill=TEXT_COLOR, font=font, anchor="mm")
    return bar


def _fitting_font(caption: str, width: int, height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of Pillow, as large as the bar allows, and smaller where the caption would be too wide."""
    from PIL import ImageFont

    size = height * 0.72
    font = ImageFont.load_default(size)
    needed = font.getlength(caption)
    return font if needed <= width else ImageFont.load_default(max(8.0, size * width / needed))
