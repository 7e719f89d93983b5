"""The one thread that works with the model, and the bounded queue before it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ttt_adapt.serve.refusal import Refusal

T = TypeVar("T")
_SHARE = 0.1
"""Weight of the last call in the mean time of calls."""


class Worker:
    """Runs calls one after the other, in the order in which they came.

    Args:
        places: how many calls wait at most, beside the one that runs.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._work, name="ttt-adapt model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many calls wait."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether it takes calls."""
        return not self._closed and self._thread.is_alive()

    def check_room(self) -> None:
        """Refuse where a call would be refused now, so that nobody sends what is not taken.

        Raises:
            Refusal: the queue is full, or the worker is closed.
        """
        with self._changed:
            self._check()

    def submit(self, call: Callable[[], T], patient: bool = False) -> Future[T]:
        """Let a call run when it is its turn. One that is cancelled before does not run.

        Args:
            call: what runs.
            patient: wait for a place where the queue is full.

        Raises:
            Refusal: the queue is full, or the worker is closed.
        """
        with self._changed:
            while patient and self._is_full() and not self._closed:
                self._changed.wait()
            self._check()
            future: Future[T] = Future()
            self._waiting.append((future, call))
            self._changed.notify_all()
        return future

    def close(self) -> None:
        """Refuse what comes from now on, finish what was taken, and end the thread. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _is_full(self) -> bool:
        return len(self._waiting) >= self._places

    def _check(self) -> None:
        if self._closed:
            raise Refusal(503, "stopping", "the server is stopping: ask again when it is back", retry_after=5)
        if self._is_full():
            raise Refusal(
                429, "queue_full",
                f"{len(self._waiting)} calls wait for the model, as many as may: send fewer frames, or wait",
                retry_after=len(self._waiting) * self._seconds,
            )  # fmt: skip

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            self._run(*entry)
            del entry  # a frame does not stay until the next one comes

    def _run(self, future: Future[Any], call: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        started = time.monotonic()
        try:
            future.set_result(call())
        except BaseException as error:  # whatever it is, it belongs to who asked
            future.set_exception(error)
        self._seconds += _SHARE * (time.monotonic() - started - self._seconds)

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        """The call whose turn it is; None when there will be none."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            entry = self._waiting.popleft() if self._waiting else None
            self._changed.notify_all()
        return entry
