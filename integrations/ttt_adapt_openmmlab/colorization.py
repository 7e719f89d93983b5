"""Colorization in MMEngine: grey in, colours out, with a backbone and a Mask2Former head.

The head is that of the paper's segmentation model with another output. For a mask stride of s it has 2 * s * s queries,
and its mask maps are pixel-shuffled to the channels a and b of CIE Lab.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS, TRANSFORMS
from mmengine.structures import BaseDataElement, PixelData
from torch import Tensor

from ttt_adapt.errors import DataError
from ttt_adapt.integration import AB_SCALE, LABEL_FOLDERS, PHOTO_SUFFIXES, colour_frame, psnr, rgb_to_lab, to_grey
from ttt_adapt_openmmlab.datasets.frame_order import file_of
from ttt_adapt_openmmlab.decoders import into_pixel_head
from ttt_adapt_openmmlab.metrics.base import Scores, StreamMetric

STRIDE = 4
"""The stride of the head's mask maps."""


@DATASETS.register_module()
class ColourPictures(BaseDataset):
    """Pictures in folders, as ImageNet has them (`train/CLASS/*.JPEG`), or frames of videos; classes are not used.

    `VideoSampler` takes each folder as a video, with its files in natural order. Folders of labels, and a `NAME.png`
    beside a `NAME.jpg`, are left out.

    Args:
        data_root: the folder; folders inside of it are searched at any depth.
        suffixes: of the pictures, in lower case.
        **options: as for MMEngine's `BaseDataset`.

    Raises:
        DataError: there is no picture.
    """

    METAINFO: ClassVar[dict] = {"classes": ()}

    def __init__(
        self, data_root: str | Path, suffixes: Sequence[str] = (*sorted(PHOTO_SUFFIXES), ".png"), **options: Any
    ) -> None:
        self._suffixes = tuple(suffixes)
        super().__init__(ann_file="", data_root=str(data_root), **options)

    def load_data_list(self) -> list[dict]:
        """The data info of every picture."""
        root = Path(self.data_root)
        every = {path for path in root.rglob("*") if path.suffix.lower() in self._suffixes}
        photographs = {path.with_suffix("") for path in every if path.suffix.lower() in PHOTO_SUFFIXES}
        files = sorted(
            path
            for path in every
            if not LABEL_FOLDERS & {part.lower() for part in path.relative_to(root).parts[:-1]}
            and (path.suffix.lower() != ".png" or path.with_suffix("") not in photographs)
        )
        if not files:
            raise DataError(f"{root} holds no picture; expected folders of {' '.join(self._suffixes)} files")
        return [{"img_path": str(file), "video_id": str(file.parent.relative_to(root))} for file in files]


@TRANSFORMS.register_module()
class PackColours(BaseTransform):
    """Ends a pipeline: packs the grey picture as the input and its colours as the label.

    Reads `img`, uint8 BGR [H, W, 3], as `LoadPicture` gives it. Returns `inputs`, uint8 [3, H, W] with three
    equal channels, and a data sample with `grey`, the same picture, and `gt_ab`, float [2, H, W], a and b of CIE Lab.

    Args:
        meta_keys: what the data sample keeps.
    """

    def __init__(
        self,
        meta_keys: Sequence[str] = ("img_path", "ori_shape", "img_shape", "scale_factor", "flip", "video_id"),
    ) -> None:
        self._keys = tuple(meta_keys)

    def transform(self, results: dict) -> dict:
        """The packed picture."""
        rgb = np.ascontiguousarray(results["img"][..., ::-1])
        picture = torch.from_numpy(rgb).permute(2, 0, 1)
        sample = BaseDataElement(metainfo={key: results[key] for key in self._keys if key in results})
        grey = torch.from_numpy(to_grey(rgb)).permute(2, 0, 1).contiguous()
        sample.gt_ab, sample.grey = PixelData(data=rgb_to_lab(picture.float() / 255)[1:]), PixelData(data=grey)
        return {"inputs": grey, "data_samples": sample}


@MODELS.register_module()
class Colorizer(BaseModel):
    """A backbone and a mask head that predicts a and b of CIE Lab.

    Args:
        backbone: config.
        decode_head: config of a Mask2Former head; its classes and queries are replaced.
        data_preprocessor: config. A grey picture has three equal channels, so the order of channels does not matter.
        init_cfg: as in every MMEngine module.
        **inherited: entries that a config inherits from a segmentor's config, such as `test_cfg`; they have no effect.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        decode_head: dict[str, Any],
        data_preprocessor: dict[str, Any],
        init_cfg: dict[str, Any] | None = None,
        **inherited: Any,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        self.backbone = MODELS.build(backbone)
        self.decode_head = into_pixel_head(MODELS.build(decode_head), 2, STRIDE)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        """Colours, losses, or data samples with `pred_ab`.

        Args:
            inputs: float [B, 3, H, W], from the data preprocessor.
            data_samples: one per image, with `gt_ab` for mode "loss".
            mode: "tensor" gives [B, 2, H, W], a and b over `AB_SCALE`; "loss" and "predict" as in MMEngine.
        """
        size = tuple(inputs.shape[2:])
        maps = self.backbone(inputs)
        blank = [BaseDataElement(metainfo={"batch_input_shape": size, "img_shape": size}) for _ in inputs]
        every = [F.pixel_shuffle(masks, STRIDE) for masks in self.decode_head(maps, blank)[1]]
        if mode == "loss":
            ab = torch.stack([sample.gt_ab.data for sample in data_samples]).to(inputs) / AB_SCALE
            return {f"d{i}.loss_ab": F.smooth_l1_loss(_fit(found, ab), ab) for i, found in enumerate(every)}
        colours = _fit(every[-1], inputs)
        if mode == "tensor":
            return colours
        for sample, found in zip(data_samples, colours, strict=True):
            height, width = sample.metainfo["img_shape"][:2]  # without padding
            sample.pred_ab = PixelData(data=found[:, :height, :width] * AB_SCALE)
        return data_samples


@METRICS.register_module()
class StreamColourMetric(StreamMetric):
    """PSNR of RGB in dB, over the data set, over frames and over videos; `PSNR_grey` is the PSNR of the grey input.

    Predicted and true colours are both combined with the frame's grey before they are compared, so that colours alone
    make a difference.

    Args:
        **options: `collect_device` and `prefix`, as for `StreamMetric`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(("PSNR",), **options)

    def measure(self, sample: dict) -> tuple[float, float]:
        """Mean square errors of a frame: of the prediction, and of the grey picture.

        Raises:
            DataError: a sample without colours, or with predicted ones of another size.
        """
        truth, found, frame = (sample.get(key, {}).get("data") for key in ("gt_ab", "pred_ab", "grey"))
        if truth is None or found is None or frame is None or truth.shape != found.shape:
            shapes = [None if part is None else (*part.shape,) for part in (truth, found)]
            raise DataError(
                f"{file_of(sample)} has gt_ab and pred_ab of shapes {shapes}; expected one shape: PackColours behind "
                "Resize, and Colorizer"
            )
        grey = frame.permute(1, 2, 0).cpu().numpy()
        true, ours = (colour_frame(grey, ab.cpu().float()).astype(np.float64) for ab in (truth, found))
        return float(np.square(ours - true).mean()), float(np.square(grey - true).mean())

    def score(self, values: Sequence[Any]) -> Scores:
        """PSNR in dB of the mean square errors, at most 100."""
        ours, grey = np.mean(np.array(values), axis=0)
        return {"PSNR": psnr(ours), "PSNR_grey": psnr(grey)}


def _fit(maps: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(maps, like.shape[2:], mode="bilinear", align_corners=False)
