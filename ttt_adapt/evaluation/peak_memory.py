"""Peak memory of a run, above the memory that was in use when it began (by the model, in an evaluation).

On a GPU the number is exact: the largest sum of live tensors (`torch.cuda.max_memory_allocated`). On the CPU it is the
growth of the process's largest resident size, as Linux counts it. Before the run, memory that earlier runs left unused
is given back to the system. The number is good to some MiB. In the first run of a process it includes what libraries
allocate once.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch


class PeakMemory:
    """Measures the block of a `with` statement.

    Attributes:
        mib: the peak above the start in MiB, after the block; None where the system does not say.

    Args:
        device: where the tensors live.
        account: the folder in which Linux reports about this process.
    """

    def __init__(self, device: torch.device, account: Path = Path("/proc/self")) -> None:
        self._device, self._account = device, account
        self._start: float | None = None
        self.mib: float | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device) / 2**20
        else:
            _give_back_free_memory()
            if _forget_peak(self._account):
                self._start = _resident(self._account, "VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._start is None:
            return
        cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) / 2**20 if cuda else _resident(self._account, "VmHWM")
        self.mib = None if peak is None else max(0.0, peak - self._start)


def _forget_peak(account: Path) -> bool:
    """Let the kernel count the largest resident size anew from now on; False where the kernel cannot."""
    try:
        (account / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _give_back_free_memory() -> None:
    """Give memory that Python and the C library hold but do not use back to the system, as far as possible."""
    gc.collect()
    with suppress(OSError, AttributeError):  # other C libraries than glibc have no such call
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(account: Path, field: str) -> float | None:
    """A size in MiB that Linux reports of this process; None where it reports none."""
    try:
        lines = (account / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), None)
