"""The page of the sweeps, docs/models.md, made of their results."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from sweeps.checks import AS_SUGGESTED, FAILS, NAMED, REFUSED

__all__ = ["AS_SUGGESTED", "page"]

STATUSES = (AS_SUGGESTED, NAMED, REFUSED, FAILS)


def page(folder: Path) -> str:
    """The whole page, of the JSON files in `folder`."""
    sweeps = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    rows = [_row(name, content["models"]) for name, content in sweeps.items()]
    return (
        "\n".join(
            ["# Models", "", "| sweep | models | " + " | ".join(STATUSES) + " |", "|---" + "|---:" * 5 + "|", *rows]
        )
        + "\n"
    )


def _row(name: str, models: dict[str, dict[str, Any]]) -> str:
    counts = Counter(result["status"] for result in models.values())
    return f"| {name} | {len(models)} | " + " | ".join(str(counts[status]) for status in STATUSES) + " |"
