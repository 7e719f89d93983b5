"""Whether a test dataloader gives a video stream: frame by frame, in order, each frame once and as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.dataset import DefaultSampler
from mmengine.dist import get_world_size
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt_openmmlab.datasets.samplers import VideoSampler, frame_infos

_FIX = "set test_dataloader.sampler to dict(type='VideoSampler')"


def check_stream(loader: Any) -> None:
    """Refuse a test dataloader that is no video stream, as far as this is known before it runs.

    Raises:
        ConfigError: more than one frame per batch, a shuffled order, workers whose results are not put in order, videos
            spread over ranks, or a pipeline that makes several views of a frame or changes it at random.
    """
    if not isinstance(loader, DataLoader):
        raise ConfigError(f"the test dataloader is a {type(loader).__name__}; expected a torch DataLoader")
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if size != 1:
        raise ConfigError(f"the test dataloader has batch_size={size}; a stream goes frame by frame: set batch_size=1")
    _check_workers(loader)
    _check_sampler(loader.sampler)
    for transform in _transforms(loader.dataset):
        prob = getattr(transform, "prob", getattr(transform, "flip_ratio", None))
        check_transform(type(transform).__name__, prob, getattr(transform, "test_mode", None))


def stream_infos(loader: DataLoader) -> tuple[list[int], list[dict[str, Any]]] | None:
    """The dataset's indices and infos in the order of the stream, without loading a frame.

    None where they are not known: for a dataset without `get_data_info`, or a sampler of another kind.
    """
    known = isinstance(loader.sampler, VideoSampler | DefaultSampler | SequentialSampler)
    infos = frame_infos(loader.dataset) if known and type(loader.batch_sampler) is BatchSampler else None
    if infos is None:
        return None
    indices = list(loader.sampler)
    return indices, [infos[index] for index in indices]


def offline_indices(loader: DataLoader) -> tuple[list[int], list[dict[str, Any]]]:
    """Like `stream_infos`, for an arm that needs them.

    Raises:
        DataError: they are not known.
    """
    stream = stream_infos(loader)
    if stream is None:
        raise DataError(
            f"arm 'offline' must know the frames of a video before it begins, and a {type(loader.dataset).__name__} "
            f"with a {type(loader.sampler).__name__} does not tell: use a dataset with get_data_info, and {_FIX}"
        )
    return stream


def _check_workers(loader: DataLoader) -> None:
    if not getattr(loader, "in_order", True):
        raise ConfigError(
            "the test dataloader has in_order=False: its workers hand out frames in any order; set in_order=True"
        )
    if isinstance(loader.dataset, IterableDataset) and loader.num_workers > 1:
        raise ConfigError(
            f"the test dataset is iterable and its dataloader has {loader.num_workers} workers, which take frames in "
            "turns: set num_workers=1 or 0"
        )


def _check_sampler(sampler: Any) -> None:
    shuffled = isinstance(sampler, RandomSampler) or bool(getattr(sampler, "shuffle", False))
    if shuffled:
        raise ConfigError(f"the test dataloader shuffles frames ({type(sampler).__name__}): {_FIX}, or shuffle=False")
    if get_world_size() > 1 and not isinstance(sampler, VideoSampler):
        raise ConfigError(
            f"{type(sampler).__name__} deals the frames of a video out to {get_world_size()} processes; adaptation "
            f"needs whole videos: {_FIX}"
        )


def _transforms(dataset: Any) -> Iterator[Any]:
    """All transforms of the dataset's pipelines, those inside of others included."""
    for inner in getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]:
        if inner is not None:
            yield from _transforms(inner)
    queue = [getattr(dataset, "pipeline", None)]
    while queue:
        item = queue.pop()
        if isinstance(item, list | tuple):
            queue.extend(item)
        elif item is not None:
            yield item
            queue.append(getattr(item, "transforms", None))


def check_transform(name: str, prob: Any, test_mode: Any = None) -> None:
    """Refuse a transform of a test pipeline that makes several views of a frame, or another image each time.

    Args:
        name: of its class.
        prob: how likely it acts: a number, a list of them, or None for one that always does.
        test_mode: whether it was told to do the same to every frame, as CenterNet's RandomCenterCropPad can be.

    Raises:
        ConfigError: it is one of these.
    """
    if "TestTimeAug" in name or "MultiScaleFlip" in name:
        raise ConfigError(
            f"the test pipeline holds {name}, which makes several views of a frame; a stream has one: take it out "
            "(and tta_model, tta_pipeline)"
        )
    if test_mode:
        return
    acts = any(p > 0 for p in prob) if isinstance(prob, list | tuple) else prob is None or prob > 0
    if acts and ("Flip" in name or "Random" in name or "PhotoMetric" in name):
        does = "flips frames" if "Flip" in name else "changes frames at random"
        how, fix = (name, "") if prob is None else (f"{name}, prob={prob}", ", or set prob=0")
        raise ConfigError(f"the test pipeline {does} ({how}); a stream takes them as they are: take it out{fix}")
