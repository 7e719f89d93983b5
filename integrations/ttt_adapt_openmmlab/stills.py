"""Images of the training set to calibrate a model on, as the test pipeline makes them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS

from ttt_adapt.errors import ConfigError
from ttt_adapt.integration import LEAST_STILLS, picture_header
from ttt_adapt_openmmlab.datasets.samplers import frame_infos

CANDIDATES = 10
"""So many images are looked at for each one that is taken, to find images of one size."""


def training_images(cfg: Any, count: int) -> list[str]:
    """Paths of `count` images of one size, evenly spaced in the training set, or of all where it has fewer.

    Args:
        cfg: a config with `train_dataloader`.
        count: at least 1.

    Raises:
        ConfigError: no training set, one that does not tell its files, or too few of one size.
        DataError: a file is no image.
    """
    dataset = (cfg.get("train_dataloader") or {}).get("dataset")
    if dataset is None:
        raise ConfigError(
            f"stills={count} takes images of the training set, and the config has no train_dataloader.dataset: add it, "
            "or calibrate in a script and name the file by calibration='FILE.safetensors'"
        )
    infos = frame_infos(DATASETS.build(dataset))
    paths = list(dict.fromkeys(info["img_path"] for info in infos or () if "img_path" in info))
    if not paths:
        raise ConfigError(
            f"stills={count} takes images of the training set, and a {dataset.type} does not tell their files: "
            "calibrate in a script and name the file by calibration='FILE.safetensors'"
        )
    sizes = {path: picture_header(Path(path)).size for path in _spaced(paths, CANDIDATES * count)}
    usual = Counter(sizes.values()).most_common(1)[0][0]
    found = _spaced([path for path, size in sizes.items() if size == usual], count)
    if len(found) < LEAST_STILLS:
        raise ConfigError(
            f"stills={count} found {len(found)} images of {usual[0]} x {usual[1]} (H x W) in the training set; "
            f"expected at least {LEAST_STILLS} of one size: calibrate in a script on other images and name the file by "
            "calibration='FILE.safetensors'"
        )
    return found


def _spaced(items: list[str], count: int) -> list[str]:
    """`count` of the items at even distances, or all."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
