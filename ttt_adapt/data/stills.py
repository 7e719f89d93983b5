"""Training samples from labelled clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttt_adapt.data.augment import Augment
from ttt_adapt.data.clip import Clip, Sample
from ttt_adapt.errors import DataError, warn


class StillsDataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Training samples from labelled clips.

    A sample is the image, `float32 [3, H, W]` RGB in [0, 1] and *not* normalised, and the labels, `int64 [H, W]`.
    The augmentation of a sample depends on (seed, epoch, index) alone. A resumed run therefore sees the samples that it
    would have seen without the interruption, with any number of workers. Call `set_epoch` before every epoch. Loader
    workers that live longer than an epoch (`persistent_workers=True`) do not learn of the call.

    Attributes:
        ignore: the label of void and padding.

    Args:
        sources: one clip, several clips, or a sequence of (frame, labels) pairs as `Clip` gives them.
        augment: the random changes; None for none.
        seed: any integer >= 0.
        cache: read all samples now and keep them, as `uint8`; otherwise a sample is read when it is asked for.
        ignore: the label of void and padding where pairs are given; clips have their own.

    Raises:
        DataError: nothing is given, or the clips have different classes. When samples are read: they differ in size.
    """

    def __init__(
        self,
        sources: Clip | Sequence[Clip] | Sequence[Sample],
        augment: Augment | None = None,
        seed: int = 0,
        cache: bool = True,
        ignore: int = 255,
    ) -> None:
        clips = [sources] if isinstance(sources, Clip) else sources
        if not len(clips):
            raise DataError("no clips and no samples were given; expected at least one of them")
        self._samples: Sequence[Sample]
        if isinstance(clips[0], Clip):
            self._samples = _Chain(clips)  # type: ignore[arg-type]
            ignore = clips[0].ignore
        else:
            self._samples = clips  # type: ignore[assignment]
        self.augment, self.seed, self.epoch, self.ignore = augment, seed, 0, ignore
        self._shape: tuple[int, ...] | None = None
        self._cache = [self._read(index) for index in range(len(self._samples))] if cache else None
        if self._cache is not None and isinstance(clips[0], Clip) and clips[0].classes:
            _say_unused(clips[0].classes, ignore, [labels for _, labels in self._cache])

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        index = range(len(self))[index]
        frame, ids = self._read(index) if self._cache is None else self._cache[index]
        image = torch.from_numpy(frame).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        image, labels = image.div_(255.0), torch.from_numpy(ids).long()
        if self.augment is None:
            return image, labels
        state = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1, np.uint32)
        generator = torch.Generator().manual_seed(int(state[0]))
        return self.augment(image, labels, generator, self.ignore)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the augmentation of every sample; `epoch` is any integer >= 0."""
        self.epoch = epoch

    def _read(self, index: int) -> Sample:
        frame, labels = self._samples[index]
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or labels.shape != frame.shape[:2]:
            raise DataError(
                f"sample {index}{self._place(index)} is a {frame.dtype} frame {frame.shape} with labels "
                f"{labels.shape}; expected a uint8 frame (H, W, 3) with labels (H, W)"
            )
        self._shape = self._shape or frame.shape
        if frame.shape != self._shape:
            raise DataError(
                f"sample {index}{self._place(index)} has shape {frame.shape}, others {self._shape}, such as "
                f"sample 0{self._place(0)}; open the clips with size="
            )
        return frame, labels

    def _place(self, index: int) -> str:
        """Where a sample is from, in brackets; "" where pairs were given."""
        return f" ({self._samples.place(index)})" if isinstance(self._samples, _Chain) else ""


def _say_unused(classes: Sequence[str], ignore: int, labels: Sequence[np.ndarray]) -> None:
    """Warn of class names behind the last one that a label has."""
    used = np.sum([np.bincount(ids.ravel(), minlength=256) for ids in labels], axis=0)
    used[ignore] = 0
    count = int(used.nonzero()[0].max(initial=-1)) + 1
    if count < len(classes):
        some = ", ".join(map(repr, classes[count : count + 5])) + (", ..." if len(classes) > count + 5 else "")
        last = f"up to {count - 1}" if count else "of no class"
        warn(f"the labels hold class ids {last}, and there are {len(classes)} class names: nothing teaches {some}")


class _Chain(Sequence[Sample]):
    """Several clips of the same classes, one after the other."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        for clip in clips[1:]:
            if (clip.classes, clip.ignore) != (clips[0].classes, clips[0].ignore):
                raise DataError(
                    f"clips {clips[0].name!r} and {clip.name!r} have different classes or ignore ids; expected the same"
                )
        self._places = [(clip, index) for clip in clips for index in range(len(clip))]

    def __len__(self) -> int:
        return len(self._places)

    def place(self, index: int) -> str:
        """What messages call a sample."""
        clip, place = self._places[index]
        return clip.place(place)

    def __getitem__(self, index: Any) -> Any:
        clip, place = self._places[index]
        return clip[place]
