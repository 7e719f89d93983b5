"""A recorder that stands in for CUDA graphs on the CPU: what it replays are operations on fixed tensors, no Python."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default}


def storages(values) -> set[int]:
    return {x.untyped_storage()._cdata for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


class Tape(TorchDispatchMode):
    """One recording: the operations of a call, with the very tensors that they read and wrote."""

    def __init__(self):
        super().__init__()
        self.operations, self.made, self.before = [], set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in WAITS:
            raise RuntimeError(f"{func} would wait for the device")
        args = tree_map(lambda x: x, args)  # lists of its own
        self._remember_what_is_written(func, args, kwargs)
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        self.made |= storages(out) - storages([args, kwargs])
        return out

    def _remember_what_is_written(self, func, args, kwargs):
        for i, argument in enumerate(func._schema.arguments):
            # batch norm moves its running statistics, and its signature does not say so
            written = argument.alias_info is not None and argument.alias_info.is_write
            if not written and argument.name not in ("running_mean", "running_var"):
                continue
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            for x in tree_leaves(value):
                if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.made:
                    self.before.setdefault(id(x), (x, x.detach().clone()))

    def undo(self):
        """Recording does no work: what it wrote is as before."""
        with torch.no_grad():
            for x, before in self.before.values():
                x.copy_(before)

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # casts were recorded
    def replay(self):
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for kept, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.detach().copy_(new)


class TapeRecorder:
    """What `CudaRecorder` is on a GPU; counts what is asked of it."""

    def __init__(self):
        self.recorded, self.replayed = 0, 0
        self._pool: list[weakref.ref] | None = None

    def record(self, call, generator=None):
        if self._pool is not None and not any(replay() for replay in self._pool):
            raise RuntimeError("recorded into the memory of graphs that are gone")
        self.recorded += 1
        tape, random = Tape(), None if generator is None else generator.get_state()
        try:
            with tape:
                result = call()
        finally:
            if generator is not None:
                generator.set_state(random)
            tape.undo()

        def replay():
            self.replayed += 1
            tape.replay()

        self._pool = [*(self._pool or ()), weakref.ref(replay)]
        return replay, result

    def forget(self):
        self._pool = None
