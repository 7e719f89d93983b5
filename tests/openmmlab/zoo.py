"""A checkpoint as the model zoos of OpenMMLab publish them."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from mmengine.logging.history_buffer import HistoryBuffer


def zoo_checkpoint(state: dict, **more) -> dict:
    """A checkpoint as the projects publish them: metadata, log buffers, NumPy values, optimizer."""
    buffer = HistoryBuffer([1.0, 2.0, 3.0], [1, 1, 1])
    palette = [[128, 64, 128], [244, 35, 232], [70, 70, 70], [102, 102, 156]]
    return {
        "meta": {
            "dataset_meta": {"classes": ("road", "sidewalk", "building", "wall"), "palette": palette},
            "CLASSES": ("road", "sidewalk", "building", "wall"),
            "PALETTE": np.array(palette, dtype=np.uint8),
            "epoch": 0,
            "iter": 2,
            "seed": 3,
            "time": "20221203_012345",
            "mmengine_version": "0.3.1",
            "experiment_name": "mask2former",
            "best": np.float64(0.5),
            "cfg": "a = 1\n",
        },
        "state_dict": OrderedDict(state),
        "message_hub": {
            "log_scalars": OrderedDict({"train/lr": buffer, "train/loss": HistoryBuffer(np.ones(2), np.ones(2))}),
            "runtime_info": OrderedDict({"iter": 2, "loop": np.int64(4)}),
            "resumed_keys": {"train/lr": True},
        },
        **more,
    }
