"""The one frame of a test batch, and what the model's own preprocessing makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ttt_adapt.errors import ConfigError, FrameError
from ttt_adapt_openmmlab.datasets.frame_order import file_of


def only_sample(data_batch: Any) -> Any:
    """The data sample of a batch of one frame.

    Raises:
        ConfigError: a batch of several frames, of several views of one, or of a flipped one.
    """
    if not isinstance(data_batch, Mapping) or not data_batch.get("data_samples"):
        raise ConfigError(
            f"the test dataloader gave a {type(data_batch).__name__} without data_samples; expected a dict of inputs "
            "and data_samples: end the test pipeline with PackSegInputs or PackDetInputs"
        )
    inputs, samples = data_batch["inputs"], data_batch["data_samples"]
    if isinstance(inputs[0], list | tuple) or isinstance(samples[0], list | tuple):
        raise ConfigError(
            "the test pipeline makes several views of a frame (TestTimeAug); a stream has one: take TestTimeAug out"
        )
    if len(samples) != 1 or len(inputs) != 1:
        raise ConfigError(
            f"the test dataloader gave a batch of {len(samples)} frames; a stream has one at a time: set batch_size=1"
        )
    if samples[0].metainfo.get("flip"):
        raise ConfigError(f"{file_of(samples[0].metainfo)} was flipped by the test pipeline: take the flip out")
    return samples[0]


def images(preprocessor: nn.Module, data_batch: Mapping[str, Any]) -> Tensor:
    """The frame of a batch as the model takes it, float [1, 3, H, W]; errors as in `prepared`."""
    return prepared(preprocessor, data_batch)[0]


def prepared(preprocessor: nn.Module, data_batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The frame of a batch as the model takes it, float [1, 3, H, W], and what else the model's `forward` takes.

    The model's own preprocessing works on a copy of the frame without its labels.

    Raises:
        FrameError: preprocessing returns something else; the message names the file.
    """
    sample = only_sample(data_batch)
    copy = {
        "inputs": [image.clone() for image in data_batch["inputs"]],
        "data_samples": [type(sample)(metainfo=sample.metainfo)],
    }
    data = dict(preprocessor(copy, False))
    x = data.pop("inputs")
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[:2] != (1, 3) or not x.is_floating_point():
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise FrameError(
            f"{file_of(sample.metainfo)}: the model's data_preprocessor made {got} of it; expected float [1, 3, H, W], "
            "as SegDataPreProcessor and DetDataPreprocessor give"
        )
    return x, data


def predicted(model: nn.Module, x: Tensor, data: Mapping[str, Any]) -> Any:
    """What `model.test_step` returns for the one frame of a batch.

    Args:
        model: the plain model.
        x: float [1, 3, H, W], as preprocessing made it.
        data: what else it made. It stays as it is: a frame may be predicted again.
    """
    samples = [sample.clone() for sample in data["data_samples"]]
    return model(**{**data, "inputs": x, "data_samples": samples}, mode="predict")[0]
