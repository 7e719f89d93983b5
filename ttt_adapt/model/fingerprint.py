"""A hash of weights, by which calibrations and saved streams know the model that they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint_of(model: nn.Module, dtype: torch.dtype = torch.float16) -> str:
    """A hash of all parameters and buffers, in half precision: a model and its copy in this `dtype` have the same."""
    return fingerprint(model.state_dict(), dtype)


def fingerprint(tensors: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> str:
    """A hash of named tensors, in half precision; what is no tensor is left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor):
            tensor = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            plain = tensor.contiguous().cpu()
            digest.update((plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy().tobytes())
    return digest.hexdigest()[:32]
