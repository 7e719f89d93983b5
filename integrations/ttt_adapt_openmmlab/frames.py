"""Images for a segmentor or detector in a script: what the model sees of them, and the data sample that it predicts."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import TRANSFORMS, init_default_scope
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError, FrameError
from ttt_adapt_openmmlab.batches import only_sample, predicted
from ttt_adapt_openmmlab.datasets.loaders import check_transform
from ttt_adapt_openmmlab.joint import data_preprocessor_of

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
        self._pipeline = _pipeline(cfg, self._scope)

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


def _pipeline(cfg: Config, scope: str) -> Compose:
    """The test pipeline for images in memory: as the config has it, without files and annotations."""
    found = cfg.get("test_pipeline") if scope == "mmseg" else None
    found = (
        found or _dataset_pipeline((cfg.get("test_dataloader") or {}).get("dataset", {})) or cfg.get("test_pipeline")
    )
    if not found or _name(found[0]) not in ("LoadImageFromFile", "LoadImageFromNDArray"):
        begin = _name(found[0]) if found else "nothing"
        raise ConfigError(f"the config's test pipeline begins with {begin}; expected LoadImageFromFile")
    first = {**found[0], "type": f"{scope}.LoadImageFromNDArray"}
    if any(_name(transform) == "LoadProposals" for transform in found):
        raise ConfigError(
            "the test pipeline loads the proposals of another model from a file (LoadProposals), and a stream has "
            "frames alone: take a model with an rpn_head, such as Faster R-CNN"
        )
    rest = [transform for transform in found[1:] if not _name(transform).startswith("Load")]  # annotations
    for transform in rest:
        check_transform(_name(transform), transform.get("prob"), transform.get("test_mode"))
    init_default_scope(scope)
    return Compose([TRANSFORMS.build(dict(transform)) for transform in (first, *rest)])


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
