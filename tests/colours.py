"""Pictures, films and weights that the tests of colorization and of unlabelled clips use."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from ttt_adapt.data.street import street_stream
from ttt_adapt.tasks.colorization.networks import ALEXNET, INCEPTION

SIZE = (48, 64)


def colour_frames(count: int = 4, size: tuple[int, int] = SIZE, seed: int = 0) -> list[np.ndarray]:
    """Frames of the rendered street."""
    return [frame for frame, _ in street_stream(count, size, seed)]


def write_album(root: Path) -> Path:
    """A folder as people have them: sizes, file kinds and folders of all sorts, labels among them."""
    (root / "trip" / "frames").mkdir(parents=True)
    (root / "trip" / "labels").mkdir()
    (root / "deep" / "er").mkdir(parents=True)
    for i, frame in enumerate(colour_frames(4)):
        Image.fromarray(frame).save(root / "trip" / "frames" / f"{i}.png")
        Image.new("P", SIZE[::-1]).save(root / "trip" / "labels" / f"{i}.png")
    odd = Image.fromarray(colour_frames(1, (61, 83), 3)[0])
    odd.save(root / "deep" / "er" / "odd.jpg")
    odd.convert("P", palette=Image.Palette.ADAPTIVE).save(root / "deep" / "palette.png")
    odd.convert("CMYK").save(root / "deep" / "print.jpg")
    odd.convert("RGBA").save(root / "deep" / "alpha.png")
    odd.convert("L").save(root / "deep" / "grey.png")
    Image.fromarray(np.asarray(odd.convert("L")).astype(np.uint16) * 257).save(root / "deep" / "deep.tif")
    return root


def write_video(
    path: Path, frames: list[np.ndarray], fps: int = 12, *, codec: str = "ffv1", pix_fmt: str = "bgr0",
    times: list[int] | None = None, sound: bool = False,
) -> Path:  # fmt: skip
    """A file of these frames; `times` in milliseconds makes its rate uneven."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        audio = container.add_stream("aac", rate=8000, layout="mono") if sound else None
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            image = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix_fmt)
            image.pts = i if times is None else times[i]
            container.mux(stream.encode(image))
        container.mux(stream.encode())
        if audio is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 8000
            container.mux(audio.encode(silence))
            container.mux(audio.encode())
    return path


def decoded(path: Path) -> list[np.ndarray]:
    """The frames of a video file."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams.video[0])]


def write_metric_weights(root: Path) -> Path:
    """Random weights in the formats of the published files."""
    import torchvision
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), root / ALEXNET)
    with pytest.MonkeyPatch.context() as patch:  # it loads weights where it is built
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **keywords: {})
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(root / ALEXNET))
    torch.save(network.state_dict(), root / INCEPTION)
    return root
