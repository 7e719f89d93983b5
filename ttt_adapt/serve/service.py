"""All that the routes of one server share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from ttt_adapt.adapter import StreamAdapter
from ttt_adapt.serve.limits import Limits
from ttt_adapt.serve.metrics import Metrics
from ttt_adapt.serve.sources import AllowedSources, SourceReader
from ttt_adapt.serve.streams import Served, ServedStreams, Size
from ttt_adapt.serve.worker import Worker
from ttt_adapt.tasks.checkpoint import Checkpoint

T = TypeVar("T")


@dataclass(eq=False)
class Service:
    """The streams of one checkpoint, the thread that works on them, and what clients may do.

    Attributes:
        checkpoint: the model.
        adapter: over it; its streams are those of the clients.
        size: at which the model sees frames, as for `ServedStreams`.
        limits: what clients may ask for.
        sources: what they may name as a source.
        metrics: counts.
        worker: works with the model.
        streams: that are open.

    Raises:
        MissingPackageError: `prometheus_client` is not installed.
    """

    checkpoint: Checkpoint
    adapter: StreamAdapter
    size: Size = None
    limits: Limits = field(default_factory=Limits)
    sources: AllowedSources = field(default_factory=AllowedSources)
    metrics: Metrics = field(default_factory=Metrics)
    worker: Worker = field(init=False)
    streams: ServedStreams = field(init=False)

    def __post_init__(self) -> None:
        self.streams = ServedStreams(self.checkpoint, self.adapter, self.size, self.limits, self.metrics)
        self.worker = Worker(self.limits.queue)
        self.metrics.watch(lambda: self.worker.waiting, lambda: len(self.streams.names))

    async def run(self, call: Callable[[], T]) -> T:
        """What a call in the worker's thread returns.

        Raises:
            Refusal: the queue is full.
        """
        return await asyncio.wrap_future(self.worker.submit(call))

    def watch(self, name: str, source: str) -> Served:
        """Let the server read the frames of a stream; in the worker's thread.

        Raises:
            Refusal: see `AllowedSources.find` and `ServedStreams.watch`.
        """
        self.streams.find(name)
        found = self.sources.find(source)
        return self.streams.watch(
            name, lambda served: SourceReader(found, source, partial(self._hand_over, served), self.sources.told)
        )

    def _hand_over(self, served: Served, frame: np.ndarray, begins: bool) -> None:
        """A frame of a source waits for its turn; in the source's thread."""
        self.worker.submit(partial(self.streams.take, served, frame, begins), patient=True).result()

    async def stop(self) -> None:
        """Finish what was taken; the adapter stays as it is."""
        self.streams.stop_sources()
        await asyncio.to_thread(self.worker.close)
