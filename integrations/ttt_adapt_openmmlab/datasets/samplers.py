"""A sampler for several processes: each one gets whole videos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt_openmmlab.datasets.frame_order import frame_key, video_of


def frame_infos(dataset: Any) -> list[dict[str, Any]] | None:
    """`video_id`, `frame_id` and `img_path` of every frame, without loading one; None if the dataset cannot tell."""
    if not callable(getattr(dataset, "get_data_info", None)):
        return None
    if callable(getattr(dataset, "full_init", None)):
        dataset.full_init()
    kept = ("video_id", "frame_id", "img_path")
    infos = (dataset.get_data_info(i) for i in range(len(dataset)))
    return [{key: info[key] for key in kept if info.get(key) is not None} for info in infos]


def share_out(videos: Iterable[list[int]], ranks: int) -> list[list[int]]:
    """Indices of frames for each rank: whole videos, the longest first to the rank with the fewest frames so far.

    Args:
        videos: the indices of each video's frames, in order. Each rank gets its videos in this sequence.
    """
    numbered = list(enumerate(videos))
    shares: list[list[tuple[int, list[int]]]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for number, video in sorted(numbered, key=lambda item: (-len(item[1]), item[0])):
        rank = loads.index(min(loads))
        shares[rank].append((number, video))
        loads[rank] += len(video)
    return [[index for _, video in sorted(share) for index in video] for share in shares]


@DATA_SAMPLERS.register_module()
class VideoSampler(Sampler):
    """Hands out whole videos to ranks, balanced by length, in order within a video; the same on every call.

    The longest video goes first, each to the rank with the fewest frames so far. Every frame goes to exactly one rank,
    so that metrics gather correctly; with more ranks than videos some ranks have nothing to do. It needs no seed.

    Args:
        dataset: an MMEngine dataset (`get_data_info`), whose frames name their video (see `video_of`).
        seed: accepted because MMEngine passes it; nothing is random.
        shuffle: must be False.

    Raises:
        ConfigError: `shuffle`.
        DataError: the dataset cannot tell the videos of its frames.
    """

    def __init__(self, dataset: Sized, seed: int | None = None, shuffle: bool = False) -> None:
        if shuffle:
            raise ConfigError("VideoSampler got shuffle=True; a video stream has an order: set shuffle=False")
        infos = frame_infos(dataset)
        if infos is None:
            raise DataError(
                f"VideoSampler needs a dataset with get_data_info(index), such as MMEngine's BaseDataset; got a "
                f"{type(dataset).__name__}"
            )
        videos: dict[str, list[int]] = {}
        for index, info in enumerate(infos):
            videos.setdefault(video_of(info), []).append(index)
        for frames in videos.values():
            frames.sort(key=lambda index: frame_key(infos[index]))
        rank, ranks = get_dist_info()
        self.dataset, self.seed = dataset, seed
        self.indices = share_out(videos.values(), ranks)[rank]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        """The number of frames of this rank."""
        return len(self.indices)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: every epoch is the same."""
