"""Scores of colorization that a network gives, by torchmetrics. Weights come from files; nothing is downloaded.

| file | of | from |
|---|---|---|
| `alexnet-owt-7be5be79.pth` | LPIPS | https://download.pytorch.org/models/alexnet-owt-7be5be79.pth |
| `weights-inception-2015-12-05-6726825d.pth` | FID, Inception Score | releases of github.com/toshas/torch-fidelity |

LPIPS' own linear layers come with torchmetrics.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.errors import DataError, missing

ALEXNET = "alexnet-owt-7be5be79.pth"
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
SOURCES = {
    ALEXNET: f"https://download.pytorch.org/models/{ALEXNET}",
    INCEPTION: f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}",
}
"""Name of the file -> where to get it."""


class Networks:
    """LPIPS, FID and Inception Score of one clip.

    Args:
        folder: holds the file `ALEXNET`, `INCEPTION`, or both. Scores whose file is missing are left out.

    Raises:
        DataError: neither file is there, or one cannot be read; the message says where to get it.
        MissingPackageError: a package is not installed.
    """

    def __init__(self, folder: Path) -> None:
        check_weights(folder)
        self._lpips = _lpips(folder / ALEXNET) if (folder / ALEXNET).is_file() else None
        self._fid: Any = None
        self._score: Any = None
        if (folder / INCEPTION).is_file():
            self._fid, self._score = _inception(folder / INCEPTION)
        self._distances: list[float] = []
        self._frames = 0

    @torch.no_grad()
    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Add a frame, both uint8 [1, 3, H, W]."""
        self._frames += 1
        if self._lpips is not None:
            ours, true = (image.float() / 127.5 - 1 for image in (prediction, truth))
            self._distances.append(float(self._lpips(ours, true)))
        if self._fid is not None:
            self._fid.update(truth, real=True)
            self._fid.update(prediction, real=False)
            self._score.update(prediction)

    def result(self) -> dict[str, float | None]:
        """The scores by name; None for a score that was not measured."""
        found: dict[str, float | None] = {"lpips": None, "fid": None, "inception_score": None}
        if self._distances:
            found["lpips"] = sum(self._distances) / len(self._distances)
        if self._fid is not None and self._frames > 1:  # a covariance needs two
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one split has no deviation
                found["inception_score"] = float(self._score.compute()[0])
            found["fid"] = float(self._fid.compute())
        return found


def check_weights(folder: Path) -> None:
    """Raises DataError unless one of the networks' files is in `folder`."""
    if not any((folder / name).is_file() for name in SOURCES):
        wanted = "; ".join(f"{name} from {url}" for name, url in SOURCES.items())
        what = "holds no weights" if folder.is_dir() else "is not a folder"
        raise DataError(
            f"the folder of metric weights {folder} {what}; expected one of these or both, none is downloaded: {wanted}"
        )


def _lpips(file: Path) -> Any:
    try:
        from torchmetrics.functional.image.lpips import _LPIPS
    except ImportError as error:
        raise missing("torchmetrics or torchvision", "cli") from error
    network = _LPIPS(pretrained=True, net="alex", pnet_rand=True)  # the linear layers; the rest follows
    weights = _read(file)
    state = {
        f"{part}.{key}.{kind}": weights[f"features.{key}.{kind}"]
        for part, layers in network.net.named_children()
        for key, layer in layers.named_children()
        for kind in layer.state_dict()
        if f"features.{key}.{kind}" in weights
    }
    try:
        network.net.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{file} is not torchvision's AlexNet; get it from {SOURCES[ALEXNET]}") from error
    return network.eval()


def _inception(file: Path) -> tuple[Any, Any]:
    """FID and Inception Score on one network."""
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise missing("torch-fidelity", "colorization") from error
    from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
    from torchmetrics.image.inception import InceptionScore

    features = "2048", "logits_unbiased"
    try:
        network = NoTrainInceptionV3("inception-v3-compat", list(features), str(file))
    except Exception as error:  # whatever a broken or foreign file makes of the loader
        raise DataError(f"{file} is not torch-fidelity's Inception v3; get it from {SOURCES[INCEPTION]}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that features are kept: a clip's fit
        return (
            FrechetInceptionDistance(_Output(network, 0, 2048)),
            InceptionScore(_Output(network, 1, 1008), splits=1),
        )


class _Output(nn.Module):
    """One of the network's outputs, [B, features]."""

    def __init__(self, network: Any, index: int, features: int) -> None:
        super().__init__()
        self._network, self._index, self.num_features = network, index, features

    def forward(self, images: Tensor) -> Tensor:
        return self._network._torch_fidelity_forward(images)[self._index]


def _read(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes of the loader
        raise DataError(f"{file} cannot be read ({type(error).__name__}); get it from {SOURCES[ALEXNET]}") from error
