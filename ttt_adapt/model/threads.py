"""Passes of several threads over one model: a lock for each model, and hooks that act in one thread only.

The lock makes the calls of an adapter come one after the other. Hooks are seen by every thread that calls the model, so
those of a pass look whether it is their own thread that calls.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import nn

ANOTHER_THREAD = (
    "the model ran in another thread, where the statistics of this frame do not act: call the model in the thread that "
    "calls the adapter (a predict= that hands the pass to a worker thread, or DataParallel, does not)"
)
"""For an error: nothing of a pass ran where its hooks act."""

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def lock_of(model: nn.Module) -> Any:
    """The lock of a model, always the same. The thread that holds it may take it again."""
    return _locks.setdefault(model, threading.RLock())


def in_this_thread(hook: Callable[..., Any], elsewhere: Callable[[], None] | None = None) -> Callable[..., Any]:
    """A forward hook, or one before the forward pass, that acts only where this thread calls the module.

    What is compiled belongs to the thread that compiles it.

    Args:
        hook: the hook.
        elsewhere: called where another thread calls the module.
    """
    own = threading.get_ident()

    def act(*args: Any) -> Any:
        if torch.compiler.is_compiling() or threading.get_ident() == own:
            return hook(*args)
        if elsewhere is not None:
            elsewhere()
        return None  # PyTorch goes on as without a hook

    return act


class Locked(Protocol):
    """What has a lock for its calls."""

    _lock: Any


S = TypeVar("S", bound=Locked)
P = ParamSpec("P")
R = TypeVar("R")


def one_at_a_time(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that waits until no other thread is in such a method of the same object, or of one with its lock."""

    @functools.wraps(method)
    def locked(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked
