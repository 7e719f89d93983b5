"""timm: the smallest variants of every module of its registry.

The rule of the list, which `choose` applies and `timm_models.txt` keeps: of each module, up to four variants of at most
20 million parameters, or the single smallest where all are larger. Variants are ordered by their number of parameters,
then by name. First come the smallest of each family (the letters at the start of the name), then the next in order;
never two of the same number of parameters.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from sweeps.subject import Subject, draw_biases

LIST = Path(__file__).with_suffix(".txt")
LARGEST = 20e6
VARIANTS = 4
FEWER: dict[str, dict[str, tuple[int, ...]]] = {
    "davit_tiny": {"depths": (1, 1, 1, 1)},
    "res2next50": {"layers": (1, 1, 1, 1)},
    "sequencer2d_s": {"layers": (1, 1, 1, 1)},
    "swin_tiny_patch4_window7_224": {"depths": (1, 2, 1, 1)},
    "swinv2_tiny_window16_256": {"depths": (1, 2, 1, 1)},
    "swinv2_cr_tiny_224": {"depths": (1, 2, 1, 1)},
    "tresnet_m": {"layers": (1, 1, 1, 1)},
    "twins_svt_small": {"depths": (1, 1, 1, 1)},
}
"""How some of the largest get fewer blocks; others get a `depth` of 3 where they have one."""


def prepare() -> None:
    """Import what every model needs."""
    import timm  # noqa: F401


def names() -> list[str]:
    """The models of the sweep, by module."""
    lines = [line for line in LIST.read_text().splitlines() if not line.startswith("#")]
    return [name for line in lines for name in line.partition(":")[2].split()]


def group(name: str) -> str:
    """The module that a model is in."""
    lines = (line.partition(":") for line in LIST.read_text().splitlines() if not line.startswith("#"))
    return next(module for module, _, listed in lines if name in listed.split())


def build(name: str) -> Subject:
    """A model with random weights, with fewer blocks than its own where `timm.create_model` can make that."""
    import timm

    smaller = FEWER.get(name, {"depth": 3})
    try:
        model = timm.create_model(name, pretrained=False, **smaller)
    except Exception:  # it has no such setting, or takes its own depth only
        model = timm.create_model(name, pretrained=False)
    draw_biases(model)
    return Subject(model.eval(), bytes=True)


def choose() -> str:
    """The text of the list, by the rule above. It takes minutes, since each model is built without memory."""
    import timm

    lines = [f"# timm {timm.__version__}: module: variants"]
    for module in sorted(timm.list_modules()):
        sizes = sorted((_parameters(name), name) for name in timm.list_models(module=module))
        lines.append(f"{module}: {' '.join(_smallest(sizes))}")
    return "\n".join(lines) + "\n"


def _parameters(name: str) -> int:
    import timm

    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())


def _smallest(sizes: list[tuple[int, str]]) -> list[str]:
    """Names by the rule above, of (number of parameters, name) in ascending order."""
    small = [(count, name) for count, name in sizes if count <= LARGEST] or sizes[:1]
    chosen: dict[int, str] = {}
    families: set[str] = set()
    for only_new_families in (True, False):
        for count, name in small:
            family = re.match("[a-z]*", name).group()  # type: ignore[union-attr]
            if len(chosen) < VARIANTS and count not in chosen and not (only_new_families and family in families):
                chosen[count] = name
                families.add(family)
    return list(chosen.values())
