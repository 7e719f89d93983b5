"""Every error this library raises on purpose, and the way in which it warns.

Each is a `TTTAdaptError` and also the builtin that fits, so `except ValueError` keeps working. Messages say what
came, what was expected and what to do.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable


class TTTAdaptError(Exception):
    """Base of every error raised by ttt_adapt."""


class ConfigError(TTTAdaptError, ValueError):
    """A setting is out of range or contradicts another."""


class FrameError(TTTAdaptError, ValueError):
    """A frame has the wrong shape, range or content."""


class FrameSizeError(FrameError, RuntimeError):
    """A frame has a size (H, W) that the model does not take."""


class FrameTypeError(TTTAdaptError, TypeError):
    """A frame has the wrong type or dtype."""


class EncoderError(TTTAdaptError, ValueError):
    """The encoder cannot be used: not found, never reached, nothing to adapt, or features of an unknown layout."""


class FeatureMapError(EncoderError):
    """What the encoder returns is no feature map over the image."""


class StateError(TTTAdaptError, RuntimeError):
    """A call came in the wrong state, such as a step after `detach()`."""


class CheckpointError(TTTAdaptError, ValueError):
    """A checkpoint or a saved state does not belong to this model."""


class DataError(TTTAdaptError, ValueError):
    """Labelled data on disk are missing or inconsistent."""


class VideoError(TTTAdaptError, OSError):
    """A video cannot be opened, read or written."""


class MemoryLimitError(TTTAdaptError, MemoryError):
    """The device ran out of memory; the message says what to lower."""


class MissingPackageError(TTTAdaptError, ImportError):
    """An optional package is not installed; the message holds the exact `pip install`."""


def missing(package: str, extra: str) -> MissingPackageError:
    """The error for an optional `package` that the extra `extra` installs."""
    return MissingPackageError(f'{package} is not installed. Run: pip install "ttt-adapt[{extra}]"')


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint for an unknown `name`: the choices that resemble it most."""
    options = list(choices)
    close = difflib.get_close_matches(name, options, n=5, cutoff=0.4) or options[:5]
    return "nearest: " + ", ".join(repr(option) for option in close)


_LIBRARY = ("ttt_adapt", "ttt_adapt_openmmlab")
_BETWEEN = ("contextlib", "functools", "torch.utils._contextlib")  # their frames lie between a caller and the library


def warn(message: str) -> None:
    """Warn, once for each line of a caller: the warning points at the line that called the library."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARY or module in _BETWEEN
