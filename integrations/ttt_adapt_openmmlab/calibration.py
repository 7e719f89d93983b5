"""calibrate: what a segmentor or detector is like on images of its own ground, without a label.

For a choice, predictions of drifted images are compared with those of the clean ones. What is compared are scores per
class and pixel: the `seg_logits` of a segmentor; of a detector its instances or segments, painted with their scores.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_adapt import Calibration, MAEBranch
from ttt_adapt import calibrate as calibrate_model
from ttt_adapt_openmmlab.frames import Frames
from ttt_adapt_openmmlab.joint import find_branch, plain_model

SIDE = 256
"""Pixels along the longer side of what predictions are compared on: more would only take memory."""


def calibrate(
    model: nn.Module,
    images: Iterable[Any],
    labels: Iterable[Any] | None = None,
    *,
    branch: MAEBranch | None = None,
    cfg: Any = None,
    **options: Any,
) -> Calibration:
    """Describe a model on its own ground, and choose how frames that are far from it are corrected.

    As `ttt_adapt.calibrate`, for what `init_model` or `init_detector` returns: images go through the config's test
    pipeline and the model's data preprocessor, as in `stream_adapter`. The model is not changed. The branch of a
    `JointMAE` keeps the calibration, and saves it with the weights.

    Args:
        model: a segmentor or detector with its config in `.cfg`, or a `JointMAE` around one.
        images: at least 8, better some 40, of ordinary scenes in ordinary weather: paths, whose files are read as
            the test pipeline reads them, or uint8 BGR [H, W, 3] as `cv2` reads them.
        labels: of a segmentor, class ids [H, W] of every image; they make a better choice.
        branch: on the plain model; by default the branch of the `JointMAE`, if there is one.
        cfg: the config, if the model has none in `.cfg`.
        **options: keywords of `ttt_adapt.calibrate`: `choose=False` takes the default rule and 40 passes, `drifts`,
            `ignore`, `seed`.

    Raises:
        ConfigError: too few images, a model that cannot be calibrated, or no config.
        FrameError, FrameTypeError, DataError, FileNotFoundError: an image cannot be used; nothing has changed.
    """
    plain = plain_model(model)
    frames = Frames(plain, getattr(model, "cfg", None) if cfg is None else cfg)
    scores = _Scores(plain, whole=labels is not None)
    return calibrate_model(
        plain,
        (_rgb(image, frames) for image in images),
        labels,
        branch=find_branch(model) if branch is None else branch,
        preprocess=lambda rgb: frames(rgb[..., ::-1]),
        predict=lambda x, data=None: scores(frames.predict(x, data)),
        **options,
    )


def _rgb(image: Any, frames: Frames) -> Any:
    """RGB of a BGR image or of a file, because drifts are defined in RGB."""
    if isinstance(image, str | os.PathLike):
        image = frames.read(image)
    image = image.cpu().numpy() if isinstance(image, Tensor) else image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
        return np.ascontiguousarray(image[..., ::-1])
    return image


class _Scores:
    """Scores per class and pixel of what a model predicts.

    Args:
        model: the plain model, which knows its number of classes.
        whole: keep every pixel, for labels; else at most `SIDE` along a side.
    """

    def __init__(self, model: nn.Module, whole: bool) -> None:
        counts = (getattr(module, "num_classes", None) for module in model.modules())
        self._classes = max((count for count in counts if isinstance(count, int)), default=0)
        self._whole = whole

    def __call__(self, sample: Any) -> Any:
        """The sample of an image -> logits [1, C, h, w], or all tensors of what it predicts where it has no classes."""
        if "seg_logits" in sample:
            return self._smaller(_logits(sample.seg_logits.data))
        if self._classes and "pred_panoptic_seg" in sample:
            ids = self._smaller(sample.pred_panoptic_seg.sem_seg)[0] % 1000  # class + 1000 * instance
            segments = F.one_hot(ids.long().clamp_max(self._classes), self._classes + 1)
            return _log(segments.permute(2, 0, 1)[None].float())
        if self._classes and "pred_instances" in sample:
            return _log(self._painted(sample.pred_instances, sample.metainfo["ori_shape"][:2]))
        return list(_predicted(sample))

    def _smaller(self, scores: Tensor) -> Tensor:
        step = 1 if self._whole else max(math.ceil(max(scores.shape[-2:]) / SIDE), 1)
        return scores[..., ::step, ::step]

    def _painted(self, found: Any, size: tuple[int, int]) -> Tensor:
        """Instances with their scores: [1, classes + 1, h, w], the last for "nothing"."""
        scores = found.scores.new_zeros(self._classes + 1, *self._smaller(torch.empty(size)).shape)
        masks = found.masks if "masks" in found else _filled(found.bboxes, size)
        for mask, label, score in zip(masks, found.labels.tolist(), found.scores, strict=True):
            place = self._smaller(torch.as_tensor(mask, device=scores.device))
            scores[label] = torch.maximum(scores[label], place * score)
        scores[-1] = 1.0 - scores[:-1].amax(0)
        return scores[None]


def _filled(boxes: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """A mask [H, W] of each box [x1, y1, x2, y2]."""
    y, x = (torch.arange(side, device=boxes.device) for side in size)
    for box in boxes:
        yield ((y >= box[1]) & (y < box[3]))[:, None] & ((x >= box[0]) & (x < box[2]))[None]


def _logits(scores: Tensor) -> Tensor:
    """Scores [C, H, W] of a segmentor as logits over classes [1, C, H, W].

    Heads with queries, such as Mask2Former's, give sums of probabilities, none of them negative.
    """
    if len(scores) == 1:  # one class against nothing
        scores = torch.cat([torch.zeros_like(scores), scores])
    return _log(scores)[None] if bool((scores >= 0).all()) else scores[None]


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(1e-6).log()


def _predicted(sample: Any) -> Iterator[Tensor]:
    """All tensors of the predictions in a data sample."""
    for name, part in sample.all_items():
        if not name.startswith("gt_") and callable(getattr(part, "all_items", None)):
            yield from (value for _, value in part.all_items() if isinstance(value, Tensor))
        elif isinstance(part, Tensor):
            yield part
