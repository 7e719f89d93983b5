"""Training by several processes under `torchrun`: which process this is, and the group that they form."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def world_size() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0 to `world_size()` - 1; process 0 writes files and shows progress."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Form the group of all processes for the time of the block: NCCL on CUDA devices, Gloo elsewhere.

    A group that exists already is used and stays. A single process needs none.
    """
    forms = world_size() > 1 and not dist.is_initialized()
    if forms:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        if forms:
            dist.destroy_process_group()
