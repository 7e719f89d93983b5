"""A model's buffers, and what its passes keep in attributes, as they were when a stream began."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.model.pass_state import PassState
from ttt_adapt.model.slots import cloned, copy_of, same_values


class StartState:
    """Copies of what a stream may change in a model beside the tensors that adaptation changes.

    During a stream the model's own passes change its own memory, as they do without one. A new video begins with what
    is kept here, and the model is given back with it.

    Args:
        model: the model.
        passes: what its passes change.
        adapted: tensors that somebody else puts back.
    """

    def __init__(self, model: nn.Module, passes: PassState, adapted: Collection[Tensor] = ()) -> None:
        taken = {id(tensor) for tensor in adapted}
        found = [(module, name, tensor) for module in model.modules() for name, tensor in module._buffers.items()]
        self._buffers = [
            (module, name, tensor, None if tensor is None else cloned(tensor))
            for module, name, tensor in found
            if id(tensor) not in taken
        ]
        self._there = {(id(module), True, name) for module, name, _ in found}
        self._passes = passes
        memo: dict[int, Any] = {}
        chosen = [change.slot for change in passes.changes if not change.slot.buffer]
        self._attributes = {slot.key: copy_of(slot.value, memo) for slot in chosen}

    def buffers(self, model: nn.Module, among: Collection[str]) -> dict[str, Tensor]:
        """Name in a model -> copy, of the buffers with these names.

        Args:
            model: the one that this is of, or one around or inside of it.
            among: names, as `model.state_dict()` has them.
        """
        kept = {(id(module), name): copy for module, name, _, copy in self._buffers if copy is not None}
        named = {
            f"{path}.{name}" if path else name: kept.get((id(module), name))
            for path, module in model.named_modules(remove_duplicate=False)
            for name in module._buffers
        }
        return {name: copy for name, copy in named.items() if copy is not None and name in among}

    @torch.inference_mode(False)
    @torch.no_grad()
    def put_back(self) -> None:
        """Write the copies back into the model, into the same objects where they are still there.

        What passes change, and what was not known to be changed by them when the stream began, is put back as it was
        before the first pass that changed it.
        """
        for module, name, tensor, kept in self._buffers:
            now = module._buffers.get(name)
            if tensor is None or kept is None:
                module._buffers[name] = tensor
            elif now is not None and (now.dtype, now.device) != (kept.dtype, kept.device):  # the model was moved
                module._buffers[name] = kept.to(now.device, now.dtype if now.is_floating_point() else kept.dtype)
            else:
                module._buffers[name] = rewritten(tensor, kept)
        memo: dict[int, Any] = {}
        for slot, first, _ in self._passes.changes:
            if slot.key not in self._there:
                slot.put(copy_of(self._attributes.get(slot.key, first), memo))


def rewritten(tensor: Tensor, kept: Tensor) -> Tensor:
    """The tensor with the values of the copy; the copy of the copy where the tensor cannot be written."""
    if same_values(tensor, kept):
        return tensor
    if tensor.is_inference() or (tensor.shape != kept.shape and not tensor.is_contiguous()):
        return cloned(kept)
    return tensor.resize_(kept.shape).copy_(kept) if tensor.shape != kept.shape else tensor.copy_(kept)
