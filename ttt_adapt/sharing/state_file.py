"""A nested state of tensors and plain values in a .safetensors file, without pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ttt_adapt.errors import CheckpointError, missing
from ttt_adapt.files import atomic_write


def check_library() -> None:
    """Refuse to go on without the package that writes the files.

    Raises:
        MissingPackageError: `safetensors` is not installed.
    """
    _library()


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state of dicts, lists, tuples, tensors, text, numbers, True, False and None.

    Raises:
        CheckpointError: it holds something else.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_described(state, tensors))
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as part:
        _library().torch.save_file(content, part, {"state": tree})


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote, with all tensors on the CPU.

    Raises:
        CheckpointError: the file is gone, or is not as it was written.
    """
    try:
        with _library().safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found: dict[str, Any] = _restored(json.loads(file.metadata()["state"]), tensors)
            return found
    except Exception as error:  # safetensors has an error of its own for each kind of damage
        raise CheckpointError(
            f"the parked stream in {path} cannot be read ({error}): close() it, and open another"
        ) from error


def _described(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value in JSON: [kind, content]. Its tensors are put into `tensors`, by number."""
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value
        return ["tensor", str(len(tensors) - 1)]
    if type(value) is dict:
        return ["dict", [[_described(key, tensors), _described(item, tensors)] for key, item in value.items()]]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_described(item, tensors) for item in value]]
    if value is None or type(value) in (bool, int, float, str):
        return ["plain", value]
    raise CheckpointError(
        f"the stream cannot be parked in a file: its state holds a {type(value).__name__}, and expected are tensors "
        'and plain values. Use park="cpu"'
    )


def _restored(described: Any, tensors: dict[str, Tensor]) -> Any:
    """The value of a description."""
    kind, content = described
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_restored(key, tensors): _restored(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_restored(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    return content


def _library() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise missing("safetensors", "timm") from error
    return safetensors
