"""Who may change a model: one adapter at a time, which gives it back as it was."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ttt_adapt.errors import StateError
from ttt_adapt.model.start_state import StartState

_changed: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Tensor]]] = weakref.WeakKeyDictionary()
"""Models that have an adapter -> the tensors that it changes."""


def check_unowned(model: nn.Module) -> None:
    """Refuse a model that has an adapter.

    Raises:
        StateError: it has one.
    """
    if model in _changed:
        raise StateError("this model already has a StreamAdapter: detach() that one first, or copy the model")


def check_unshared(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that the adapter of another model changes.

    Args:
        tensors: name -> what a new adapter would change.

    Raises:
        StateError: the models, or their branches, share some of it.
    """
    taken = {id(ref()) for refs in _changed.values() for ref in refs}
    shared = [name for name, tensor in tensors.items() if id(tensor) in taken]
    if shared:
        names = ", ".join(shared[:3]) + ", ..." * (len(shared) > 3)
        raise StateError(
            f"{len(shared)} of {len(tensors)} tensors to adapt ({names}) are changed by the StreamAdapter of another "
            "model already, which shares them: detach() that one first, or copy the model"
        )


class Ownership:
    """A model in the hands of an adapter: in eval mode, until `give_back`.

    An owner that is lost without `give_back` gives the model back too.

    Args:
        owner: the adapter.
        model: the user's model.
        tensors: name -> what the adapter changes.
        parameters: those that get gradients.
        restore: writes the source values back into `tensors`. It must not hold the owner.
        start: the rest of what a stream may change in the model; it is always put back.
        inside: the model that `model` may be a wrapper around.
    """

    def __init__(
        self,
        owner: object,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        parameters: Sequence[nn.Parameter],
        restore: Callable[[], None],
        start: StartState,
        inside: nn.Module | None = None,
    ) -> None:
        flags = {module: module.training for module in model.modules()}
        owned = [model] if inside is None else [model, inside]
        self._parts, self._restore = (owned, flags, parameters, start), restore
        for each in owned:
            _changed[each] = [weakref.ref(tensor) for tensor in tensors.values()]
        self._finalizer = weakref.finalize(owner, _give_back, *self._parts, restore)
        self._finalizer.atexit = False
        model.eval()

    @property
    def ended(self) -> bool:
        """Whether the model was given back."""
        return not self._finalizer.alive

    def give_back(self, keep_adapted: bool = False) -> None:
        """Give the model back with its source weights, or with the adapted ones, and with its own flags."""
        if self._finalizer.alive:
            _give_back(*self._parts, None if keep_adapted else self._restore)
            self._finalizer.detach()  # after it: a call that failed can be repeated


def _give_back(
    owned: Sequence[nn.Module],
    flags: Mapping[nn.Module, bool],
    parameters: Sequence[nn.Parameter],
    start: StartState,
    restore: Callable[[], None] | None = None,
) -> None:
    if restore is not None:
        restore()
    start.put_back()
    for parameter in parameters:
        parameter.grad = None
    for module, training in flags.items():
        module.training = training
    torch.clear_autocast_cache()
    for model in owned:
        _changed.pop(model, None)
