"""Reading ahead in a thread: by a bounded number of items, or always the newest one."""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")

CLOSING_SECONDS = 2.0
"""How long `close` waits for a thread that is in the middle of a read which nobody can interrupt."""


class ReadAhead(Generic[T]):
    """Iterates over `items` in a thread of its own, at most `depth` + 1 items ahead of the consumer.

    The thread starts when the `with` block begins, and has ended when the block is left in any way. There is one
    exception: FFmpeg's reads end only by themselves, at the latest with their timeout. `close` waits for
    `CLOSING_SECONDS`; a thread that still reads then ends with that read, and nobody sees its item.

    An exception of `items` reaches the consumer after all items before it. `close` ends an iteration that still runs.

    Args:
        items: are taken and closed in the thread.
        depth: how many of them wait for the consumer at most.
        newest: where there is no room, drop the oldest item that waits. Otherwise, the thread waits for room.
        dropped: is called in the thread for each item that is dropped so.
        interrupt: ends the waiting of `items`, as far as they can be interrupted; called from the consumer's thread.
        patience: seconds that the consumer waits for an item, before a TimeoutError; None: as long as it takes.
    """

    def __init__(
        self,
        items: Generator[T, None, None],
        depth: int,
        *,
        newest: bool = False,
        dropped: Callable[[], None] = lambda: None,
        interrupt: Callable[[], None] = lambda: None,
        patience: float | None = None,
    ) -> None:
        self._items = items
        self._depth = depth
        self._newest, self._dropped, self._interrupt, self._patience = newest, dropped, interrupt, patience
        self._buffer: deque[T] = deque()
        self._change = threading.Condition()
        self._ended = False  # no more items will come
        self._error: BaseException | None = None
        # A daemon thread: for others the interpreter waits before it runs `atexit`. `close` joins it.
        self._thread = threading.Thread(target=self._work, name="ttt_adapt read-ahead", daemon=True)

    def __enter__(self) -> ReadAhead[T]:
        atexit.register(self.close)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __iter__(self) -> ReadAhead[T]:
        return self

    def __next__(self) -> T:
        with self._change:
            if not self._change.wait_for(lambda: self._buffer or self._ended, self._patience):
                raise TimeoutError
            if self._buffer:
                self._change.notify_all()
                return self._buffer.popleft()
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            raise StopIteration

    def close(self) -> None:
        """End the thread after its current item, and forget the items that it has read ahead. May be called twice."""
        atexit.unregister(self.close)
        with self._change:
            self._ended = True
            self._error = None
            self._buffer.clear()
            self._change.notify_all()
        self._interrupt()
        self._thread.join(CLOSING_SECONDS)

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                if not self._put(item):
                    break
        except BaseException as caught:
            error = caught
        finally:
            self._items.close()
            with self._change:
                if not self._ended:
                    self._ended, self._error = True, error
                self._change.notify_all()

    def _put(self, item: T) -> bool:
        """Hand `item` over, as soon as there is room or at once. Returns False if the consumer has left."""
        with self._change:
            if self._newest and len(self._buffer) == self._depth:
                self._buffer.popleft()
                self._dropped()
            self._change.wait_for(lambda: self._ended or len(self._buffer) < self._depth)
            if not self._ended:
                self._buffer.append(item)
                self._change.notify_all()
            return not self._ended
