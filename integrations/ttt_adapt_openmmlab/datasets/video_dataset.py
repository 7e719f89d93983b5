"""The base of data sets that are videos with a label image for every frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset

from ttt_adapt_openmmlab.datasets.clips import Clip, choose, refuse


class VideoDataset(BaseDataset):
    """Frames of videos, one video after the other and each in its true order.

    A data info holds `img_path`, `seg_map_path`, `img_id`, `height`, `width`, `video_id`, `frame_id` (from 0, the place
    in the video) and what mmsegmentation's loading expects. Name `video_id` and `frame_id` in the `meta_keys` of the
    packing transform to have them in the data samples.

    Args:
        data_root: the folder of the data set.
        videos: names of the videos to read, in this order; all of them by default.
        metainfo: class names and palette, as MMEngine takes them.
        pipeline: transforms of a frame.
        test_mode: as MMEngine takes it.
        **options: MMEngine's `indices`, `serialize_data`, `lazy_init` and `max_refetch`.

    Raises:
        DataError: the folder lacks frames or labels, or holds files of a wrong encoding or size.
    """

    def __init__(
        self,
        data_root: str | Path,
        videos: Sequence[str] | None = None,
        *,
        metainfo: dict | None = None,
        pipeline: Sequence[Any] = (),
        test_mode: bool = False,
        **options: Any,
    ) -> None:
        self.videos = videos
        super().__init__(
            data_root=str(data_root),
            data_prefix={},
            metainfo=metainfo,
            pipeline=list(pipeline),
            test_mode=test_mode,
            **options,
        )

    def find_clips(self) -> dict[str, Clip]:
        """The videos that the folder holds, by name.

        Raises:
            DataError: the layout is not that of this data set.
        """
        raise NotImplementedError

    def label_info(self, clip: Clip, frame: int) -> dict:
        """What else belongs into the data info of a frame."""
        return {}

    def load_data_list(self) -> list[dict]:
        """The data infos of all frames."""
        clips = choose(self.find_clips(), self.videos, Path(self.data_root))
        refuse(clips)
        sizes = [clip.size() for clip in clips]
        return [
            self._info(clip, frame, size)
            for clip, size in zip(clips, sizes, strict=True)
            for frame in range(len(clip.frames))
        ]

    def _info(self, clip: Clip, frame: int, size: tuple[int, int]) -> dict:
        return {
            "img_path": str(clip.frames[frame]),
            "seg_map_path": str(clip.labels[frame]),
            "img_id": f"{clip.name}/{clip.frames[frame].stem}",
            "video_id": clip.name,
            "frame_id": frame,
            "height": size[0],
            "width": size[1],
            "label_map": None,
            "reduce_zero_label": False,
            "seg_fields": [],
            **self.label_info(clip, frame),
        }
