"""Notice when a model's modules, parameters or buffers were replaced by others, without a walk over the model."""

from __future__ import annotations

from torch import Tensor, nn


class ReplacementCounter:
    """Counts how often modules, parameters or buffers of some modules were replaced by other objects.

    In-place changes of values are ignored. Objects that are added are noticed at the next replacement.

    Attributes:
        last_replaced: name of the last object that was replaced; "weights" if only its memory is another.

    Args:
        roots: the modules, with all modules inside of them.
    """

    def __init__(self, *roots: nn.Module) -> None:
        self._roots = roots
        self._count = 0
        self.last_replaced = ""
        self._remember()

    def count(self) -> int:
        """The number of calls of `count` that found something replaced; this call is included."""
        replaced = next((name for names, name, held in self._held if names.get(name) is not held), None)
        if replaced is None and [tensor.data_ptr() for tensor in self._tensors] == self._addresses:
            return self._count
        self.last_replaced = replaced or "weights"
        self._remember()
        self._count += 1
        return self._count

    def _remember(self) -> None:
        """Note every object that the modules hold now, and the address of every tensor."""
        modules = [module for root in self._roots for module in root.modules()]
        tables = [names for m in modules for names in (m._modules, m._parameters, m._buffers)]
        self._held = [(names, name, held) for names in tables for name, held in names.items()]
        tensors = (held for m in modules for names in (m._parameters, m._buffers) for held in names.values())
        self._tensors = [tensor for tensor in tensors if tensor is not None and _has_address(tensor)]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]


def _has_address(tensor: Tensor) -> bool:
    """Whether a tensor lies in one piece of memory; sparse ones do not."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True
