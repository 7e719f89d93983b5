"""A stand-in for `panopticapi`, COCO's panoptic development kit, which is not on the package index.

mmdet needs two things of it to predict panoptic maps and to load them: the code of segment ids as colours, and the id
of void pixels. Its scores are not here: `StreamPQMetric` computes them.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

from ttt_adapt_openmmlab.datasets.label_images import segment_ids

PACKAGE = "panopticapi"


def rgb2id(colour: Any) -> Any:
    """Segment ids of a panoptic image: RGB [H, W, 3] -> int32 [H, W]; three numbers -> one."""
    ids = segment_ids(np.asarray(colour))
    return ids if ids.ndim else int(ids)


def id2rgb(ids: Any) -> Any:
    """The colours of segment ids: integers [H, W] -> uint8 RGB [H, W, 3]; one number -> three."""
    numbers = np.asarray(ids)
    colour = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536 % 256], -1).astype(np.uint8)
    return colour if numbers.ndim else colour.tolist()


def stand_in_for_panopticapi() -> None:
    """Let mmdet find the codes of `panopticapi` where it is not installed; elsewhere do nothing."""
    if importlib.util.find_spec(PACKAGE) is not None:  # installed, or this function ran before
        return
    parts: dict[str, dict[str, Any]] = {"": {"__path__": []}, ".utils": {"rgb2id": rgb2id, "id2rgb": id2rgb}}
    parts[".evaluation"] = {"VOID": 0, "OFFSET": 256**3}
    for name, content in parts.items():
        module = ModuleType(PACKAGE + name, "Stands in for COCO's panoptic development kit.")
        module.__spec__ = ModuleSpec(PACKAGE + name, None, is_package=not name)
        vars(module).update(content)
        sys.modules[PACKAGE + name] = module
        if name:
            setattr(sys.modules[PACKAGE], name[1:], module)
