"""The deferred order on a CUDA device: updates on a stream of their own, beside the caller's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Beside:
    """Runs updates on a CUDA stream of their own; elsewhere they run where they are called.

    An update starts when the work before it, the prediction included, has been done, because it writes the weights that
    the prediction reads. The caller's stream does not wait for it until the adapter is used again.
    """

    def __init__(self, device: torch.device, wanted: bool) -> None:
        self._stream = torch.cuda.Stream(device) if wanted and device.type == "cuda" else None

    def run(self, update: Callable[..., Any], x: Tensor, *more: Tensor | None) -> None:
        """Start `update(x, *more)`, on copies: the tensors are the caller's to write into after this."""
        if self._stream is None:
            update(x, *more)
            return
        copies = [None if tensor is None else tensor.clone() for tensor in (x, *more)]
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        try:
            with torch.cuda.stream(self._stream):
                update(*copies)
        finally:
            for copy in copies:
                if copy is not None:
                    copy.record_stream(self._stream)

    def settle(self) -> None:
        """Let the caller's stream wait for the updates that were started; the host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
