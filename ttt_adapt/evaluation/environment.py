"""Where a result was made (versions, hardware, commit), and how two such environments differ."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Versions and hardware that a result depends on.

    `commit` is the commit of the checkout that the running ttt_adapt belongs to, and `dirty` whether tracked files
    were changed in it; both are None for an installed package.
    """
    packages = ("ttt-adapt", "torch", "numpy", "timm", "torchmetrics")
    folder = Path(__file__).resolve().parents[1]
    # Git answers for any repository around the folder, such as the one around a virtual environment.
    ours = _git(folder, "ls-files", "--error-unmatch", "errors.py") is not None
    commit = _git(folder, "rev-parse", "HEAD") if ours else None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no") if ours else None
    return {
        "packages": {name: _version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
    }


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The entries that differ between two environments, each as "name (before, now)"; a package has its own name."""
    old, new = ({**found, **(found.get("packages") or {})} for found in (before, now))
    names = [name for name in dict.fromkeys([*old, *new]) if name != "packages"]
    return [f"{name} ({old.get(name)}, now {new.get(name)})" for name in names if old.get(name) != new.get(name)]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command in `folder`; None if the command fails."""
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
