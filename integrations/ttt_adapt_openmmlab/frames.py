"""Images for a segmentor or detector in a script: what the model sees of them, and the data sample that it predicts."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import TRANSFORMS, init_default_scope
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError, FrameError, TTTAdaptError
from ttt_adapt_openmmlab.batches import only_sample, predicted
from ttt_adapt_openmmlab.datasets.loaders import check_transform
from ttt_adapt_openmmlab.joint import data_preprocessor_of

LOADERS = ("LoadPicture", "LoadImageFromFile", "LoadImageFromNDArray")
"""Transforms that a test pipeline may begin with."""
NO_IMAGE = (
    "a {} frame {} came; expected a uint8 BGR frame [H, W, 3]. A prediction needs the size of the image before the "
    "test pipeline, which a float tensor does not tell: pass the image itself"
)


class Frames:
    """Makes a tensor of a frame, and a data sample of the tensor: test pipeline, data preprocessor, model.

    Args:
        model: the plain segmentor or detector.
        cfg: its config.

    Raises:
        ConfigError: no config or data preprocessor, or a test pipeline that is not one image in, one image out.
    """

    def __init__(self, model: nn.Module, cfg: Any) -> None:
        if not isinstance(cfg, Config):
            raise ConfigError(
                f"{type(model).__name__} has no config in .cfg, whose test pipeline the frames go through: make the "
                "model with init_model (mmseg.apis) or init_detector (mmdet.apis)"
            )
        self._model = model
        self._preprocessor = data_preprocessor_of(model)
        self._scope = _scope(model, cfg)
        first, rest = _transforms(cfg, self._scope)
        self._loader = first
        in_memory = {**first, "type": f"{self._scope}.LoadImageFromNDArray"}
        self._pipeline = Compose([_built(transform, self._scope) for transform in (in_memory, *rest)])

    def __call__(self, frame: np.ndarray | Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Preprocess a frame.

        Args:
            frame: uint8 BGR [H, W, 3].

        Returns:
            The frame as the model takes it, float [1, 3, H', W'], and what else `predict` needs: its data sample.
        """
        image = frame.cpu().numpy() if isinstance(frame, Tensor) else frame
        packed = self._pipeline({"img": image, "img_id": 0} if self._scope == "mmdet" else {"img": image})
        batch = {key: [packed[key]] for key in ("inputs", "data_samples")}
        only_sample(batch)
        data = dict(self._preprocessor(batch, False))
        return data.pop("inputs").to(next(self._model.parameters()).dtype), data

    def read(self, path: str | os.PathLike[str]) -> np.ndarray:
        """A picture as the first transform of the test pipeline loads it, uint8 BGR [H, W, 3].

        Raises:
            FrameError, DataError, FileNotFoundError: the file is missing or no picture.
        """
        in_memory = _name(self._loader) == "LoadImageFromNDArray"  # loads no file
        loader = {"type": "LoadPicture"} if in_memory else {**self._loader, "to_float32": False}
        try:
            loaded = _built(loader, self._scope).transform({"img_path": os.fspath(path)})
        except (TTTAdaptError, FileNotFoundError):
            raise
        except Exception as error:  # broken files make decoders raise whatever they stumble over
            raise FrameError(f"{path} cannot be decoded; expected an image file, such as JPEG or PNG") from error
        image: np.ndarray = loaded["img"]
        return image

    def predict(self, x: Tensor, data: dict[str, Any] | None = None) -> Any:
        """What `model.test_step` returns for the frame that became `x`.

        Args:
            x: float [1, 3, H', W'].
            data: what else preprocessing made of the frame. It stays as it is: a frame may be predicted again.

        Raises:
            FrameError: no data, because the frame came as a float tensor, without the image behind it.
        """
        if data is None:
            raise FrameError(NO_IMAGE.format(x.dtype, tuple(x.shape)))
        return predicted(self._model, x, data)


def _scope(model: nn.Module, cfg: Config) -> str:
    """Whose conventions the model follows: "mmseg" or "mmdet"."""
    packages = [parent.__module__.partition(".")[0] for parent in type(model).__mro__]
    scope = next((name for name in packages if name in ("mmseg", "mmdet")), cfg.get("default_scope"))
    if scope not in ("mmseg", "mmdet"):
        raise ConfigError(
            f"{type(model).__name__} is neither a model of mmseg nor one of mmdet: pass a model of one of them, or set "
            "default_scope='mmseg' or default_scope='mmdet' in its config, whichever it follows"
        )
    return scope


def _transforms(cfg: Config, scope: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The configs of the test pipeline's transforms: the one that loads images, and the rest without annotations."""
    found = cfg.get("test_pipeline") if scope == "mmseg" else None
    found = (
        found or _dataset_pipeline((cfg.get("test_dataloader") or {}).get("dataset", {})) or cfg.get("test_pipeline")
    )
    if not found or _name(found[0]) not in LOADERS:
        begin = _name(found[0]) if found else "nothing"
        raise ConfigError(f"the config's test pipeline begins with {begin}; expected LoadPicture or LoadImageFromFile")
    if any(_name(transform) == "LoadProposals" for transform in found):
        raise ConfigError(
            "the test pipeline loads the proposals of another model from a file (LoadProposals), and a stream has "
            "frames alone: take a model with an rpn_head, such as Faster R-CNN"
        )
    rest = [transform for transform in found[1:] if not _name(transform).startswith("Load")]  # annotations
    for transform in rest:
        check_transform(_name(transform), transform.get("prob"), transform.get("test_mode"))
    return dict(found[0]), rest


def _built(transform: dict[str, Any], scope: str) -> Any:
    """A transform of a config, by the names of `scope`."""
    init_default_scope(scope)
    return TRANSFORMS.build(dict(transform))


def _dataset_pipeline(dataset: Any) -> Any:
    """The pipeline of a dataset's config, through wrappers such as ConcatDataset."""
    while "pipeline" not in dataset:
        inner = dataset.get("dataset") or next(iter(dataset.get("datasets", ())), None)
        if inner is None:
            return None
        dataset = inner
    return dataset["pipeline"]


def _name(transform: Any) -> str:
    kind = transform["type"]
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__
