"""The page of the sweeps, docs/models.md, made of their results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sweeps.checks import AS_SUGGESTED, FAILS, NAMED, NOT_BUILT, REFUSED

STATUSES = (AS_SUGGESTED, NAMED, REFUSED, FAILS, NOT_BUILT)
TITLES = {
    "timm": "timm, the smallest variants of all modules",
    "transformers": "transformers, vision classes, small random configs",
    "torchvision": "torchvision",
    "openmmlab": "mmsegmentation and mmdetection, a config of each family",
}
LONGEST = 300
"""Characters of a reason."""

HEAD = """# Which models work

The library takes any module that gets images. This page says how that went for the models of four libraries, with
random weights and at a small size. A command makes it, and nothing in it is written by hand:

```
OMP_NUM_THREADS=1 nice python benchmarks/breadth.py --timm --transformers --torchvision --openmmlab
```
"""

MEANING = f"""
- **{AS_SUGGESTED}**: the library is not told where the encoder ends, and all checks pass.
- **{NAMED}**: all checks pass once the end of the encoder is named.
- **{REFUSED}**: the library raises its own error, with the reason.
- **{FAILS}**: a check does not pass, or another error comes out.
- **{NOT_BUILT}**: the model's own library cannot make it here. It may want another package or a file, for example.

The checks:

1. Attaching leaves no trace in the model.
2. Hidden pixels have no say in the reconstruction, bit for bit, and visible ones have one.
3. The loss has finite gradients by all parameters that it names, and those of the encoder are not all 0.
4. Frames are adapted to and predicted. After `reset()` the model predicts as at first. After `detach()` every tensor,
   flag and hook is as before, bit for bit.
5. With a learning rate of 0, the prediction is that of the plain model, bit for bit.
6. The model can be calibrated on 8 frames, and a calibrated stream predicts; or calibration is refused with the reason.

A model of OpenMMLab trains jointly for one iteration and streams three frames through its test pipeline; 5 and 6 are
left out.
"""


def page(folder: Path) -> str:
    """The whole page, of the results in `folder`."""
    files = {name: folder / f"{name}.json" for name in TITLES}
    sweeps = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    lines = [HEAD, "| library | models | " + " | ".join(STATUSES) + " |", "|---" + "|---:" * (1 + len(STATUSES)) + "|"]
    lines += [_row(title, sweeps.get(name)) for name, title in TITLES.items()]
    lines += [MEANING]
    for name, content in sweeps.items():
        lines += [f"## {TITLES[name]}", "", *_details(name, content), ""]
    return "\n".join(lines).rstrip() + "\n"


def _row(title: str, content: dict[str, Any] | None) -> str:
    """Counts of one sweep; how many are missing, where some are."""
    if content is None:
        return f"| {title} | not run |" + " |" * len(STATUSES)
    models, listed = content["models"], content["listed"]
    counts = Counter(result["status"] for result in models.values())
    count = str(listed) if len(models) == listed else f"{len(models)} of {listed}"
    return f"| {title} | {count} | " + " | ".join(str(counts[status]) for status in STATUSES) + " |"


def _details(name: str, content: dict[str, Any]) -> Iterator[str]:
    """Where the results come from, and every model that does not work as suggested."""
    models = content["models"]
    seconds = sum(result["seconds"] for result in models.values())
    states = Counter(result["state"] for result in models.values())
    made = f"Made by `python benchmarks/breadth.py --{name}` in {seconds / 60:.0f} minutes of one core"
    yield f"{made}, at commit {_commit(content)}{_mixed(states)}."
    if refused := [
        model for model, result in models.items() if _is_refused(result.get("checks", {}).get("calibration", ""))
    ]:
        yield f"Calibration is refused for {', '.join(refused)}."
    others = {model: result for model, result in models.items() if result["status"] != AS_SUGGESTED}
    if not others:
        return
    yield from ("", "| model | | encoder | reason |", "|---|---|---|---|")
    for model, result in sorted(others.items(), key=lambda item: STATUSES.index(item[1]["status"])):
        encoder = f"`{result['encoder']}`" if "encoder" in result else ""
        yield f"| {model} | {result['status']} | {encoder} | {_short(_reason(result))} |"


def _is_refused(text: str) -> bool:
    """Whether the outcome of a check is a refusal with a reason."""
    return text.startswith("refused: ")


def _commit(content: dict[str, Any]) -> str:
    made = content["environment"]
    return f"{made.get('commit', 'unknown')}{', with changes' if made.get('dirty') else ''}"


def _mixed(states: Counter[str]) -> str:
    """A remark where the results come from several states of the code."""
    if len(states) < 2:
        return ""
    earlier = sum(states.values()) - max(states.values())
    return f"; {earlier} of the results come from earlier states of the code"


def _reason(result: dict[str, Any]) -> str:
    """Why a model does not work as suggested; of one that fails with a named path, why that fails."""
    return result.get("with path") or result.get("reason", "")


def _short(text: str) -> str:
    """One cell of a table."""
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= LONGEST else text[:LONGEST].rstrip() + " ..."
