"""A prediction as bytes: a PNG of the task, or the model's own output."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from torch import Tensor

from ttt_adapt.errors import missing
from ttt_adapt.tasks.base import Task
from ttt_adapt.video.pictures import pillow
from ttt_adapt.view.label_map import write_label_map

Form = Literal["png", "safetensors"]
MEDIA_TYPES: dict[str, str] = {"png": "image/png", "safetensors": "application/octet-stream"}


def encoded(form: Form, task: Task, output: Tensor, frame: np.ndarray) -> bytes:
    """A prediction as bytes.

    Args:
        form: "png": of class ids with the colours of the classes, of the frame's size; of a task without classes, the
            picture. "safetensors": the tensor `output`, exactly what the model returns, [1, C, h, w].
        task: of the model.
        output: what the model returned.
        frame: as the model was shown it, uint8 RGB [H, W, 3].

    Raises:
        MissingPackageError: pillow or safetensors is not installed.
    """
    if form == "safetensors":
        try:
            from safetensors.torch import save
        except ImportError as error:
            raise missing("safetensors", "timm") from error
        content: bytes = save({"output": output.detach().cpu().contiguous()}, {"outputs": task.outputs})
        return content
    prediction = task.predict(output, frame)
    file = io.BytesIO()
    if task.palette is not None:
        write_label_map(file, prediction, task.palette)
    else:
        pillow().fromarray(task.draw(frame, prediction)).save(file, format="png")
    return file.getvalue()
