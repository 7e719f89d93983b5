"""A hash of weights, by which calibrations and saved streams know the model that they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def fingerprint_of(model: nn.Module) -> str:
    """A hash of all parameters and buffers, as float16: a model and its copy in float16 have the same."""
    return fingerprint(model.state_dict())


def fingerprint(tensors: Mapping[str, Any]) -> str:
    """A hash of named tensors, as float16; what is no tensor is left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor):
            tensor = tensor.detach().half() if tensor.is_floating_point() else tensor.detach()
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
