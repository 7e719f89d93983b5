"""Files and folders: where results go."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ttt_adapt.errors import ConfigError


def output_folder(folder: Path) -> None:
    """Make the folder that results go into, if need be, and try to write there, before anything is computed.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--out: {folder} is no folder that can be written to ({error.strerror})") from error
