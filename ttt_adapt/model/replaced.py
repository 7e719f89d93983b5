"""`Watch`: whether a model still has the modules and tensors that it had, without a walk through it."""

from __future__ import annotations

from torch import Tensor, nn


class Watch:
    """Counts how often modules, parameters or buffers below some modules were replaced by others.

    Values that change in place are not its concern, and what is added beside the known is noticed with the next change.

    Attributes:
        last: the name of what was replaced last.

    Args:
        roots: what is watched.
    """

    def __init__(self, *roots: nn.Module) -> None:
        self._roots = roots
        self._version = 0
        self.last = ""
        self._look()

    def version(self) -> int:
        """Another number than before if something was replaced since the last call."""
        other = next((name for names, name, held in self._held if names.get(name) is not held), None)
        if other is None and [tensor.data_ptr() for tensor in self._tensors] == self._places:
            return self._version
        self.last = other or "weights"
        self._look()
        self._version += 1
        return self._version

    def _look(self) -> None:
        modules = [module for root in self._roots for module in root.modules()]
        own = [names for m in modules for names in (m._modules, m._parameters, m._buffers)]
        self._held = [(names, name, held) for names in own for name, held in names.items()]
        tensors = (held for m in modules for names in (m._parameters, m._buffers) for held in names.values())
        self._tensors = [tensor for tensor in tensors if tensor is not None and _has_place(tensor)]
        self._places = [tensor.data_ptr() for tensor in self._tensors]


def _has_place(tensor: Tensor) -> bool:
    """Whether a tensor lies in one piece of memory; sparse ones do not."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True
