"""A nested state of tensors and plain values in a .safetensors file, without pickle.

The header has the kind and the format of the state, its structure as JSON, and a SHA-256 of all other bytes of the
file, so that one changed bit anywhere is noticed.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from ttt_adapt.errors import CheckpointError, missing
from ttt_adapt.file_kind import STREAM_FILE, FileKind, refuse_other_kind
from ttt_adapt.files import atomic_write, check_format_number

FORMAT = 1
"""Version of the layout of the file. What is in it has a version of its own."""
_HEADER = 100_000_000
"""Bytes of the longest header that safetensors reads."""
_MARK, _BLANK = b'"sha256":"', b"0" * 64


def check_library() -> None:
    """Refuse to go on without the package that writes the files.

    Raises:
        MissingPackageError: `safetensors` is not installed.
    """
    _library()


def write_state(path: Path, state: dict[str, Any], kind: FileKind = STREAM_FILE, *, lasting: bool = True) -> None:
    """Write a state of dicts, lists, tuples, tensors, text, numbers, True, False and None, whole or not at all.

    Args:
        path: of the file; an existing one stays until the new one is complete.
        state: what is written.
        kind: of the file.
        lasting: wait until the disk has it, so that it outlives a loss of power.

    Raises:
        CheckpointError: the state holds something else.
        OSError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_described(state, tensors))
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"kind": kind.name, "format": str(FORMAT), "state": tree, "sha256": _BLANK.decode()}
    data = bytearray(_library().torch.save(content, about))  # `save_file`, when it is killed, leaves a file of its own
    place, _, digest = _digests(io.BytesIO(data))
    data[place : place + len(digest)] = digest
    with atomic_write(path) as part, part.open("wb") as file:
        file.write(data)
        if lasting:
            file.flush()
            os.fsync(file.fileno())


def read_state(path: Path, kind: FileKind = STREAM_FILE) -> dict[str, Any]:
    """What `write_state` wrote, with all tensors on the CPU.

    Raises:
        CheckpointError: the file is gone, of another kind or a later version, or not as it was written: its content has
            another hash than the one in it.
    """
    if not os.path.lexists(path):
        raise CheckpointError(f"there is no file {path}; expected {kind.what}")
    refuse_other_kind(path, (kind.name, "safetensors"), f"not {kind.what}", CheckpointError)
    try:
        with path.open("rb") as file:
            _, told, digest = _digests(file)
        if told != digest:
            raise ValueError("its content has another hash than the one that it was written with")
        with _library().safe_open(path, "pt") as file:
            about = file.metadata()
            check_format_number(_number(about["format"]), FORMAT, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found: dict[str, Any] = _restored(json.loads(about["state"]), tensors)
        return found
    except CheckpointError:
        raise
    except Exception as error:  # safetensors has an error of its own for each kind of damage
        raise CheckpointError(f"{path} is damaged, and nothing of it is used: {error}") from error


def is_finite(value: Any) -> bool:
    """Whether a nested state has neither NaN nor infinite numbers."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _digests(file: BinaryIO) -> tuple[int, bytes, bytes]:
    """Where the hash of a file stands in it, the hash that stands there, and that of all other bytes: SHA-256 in hex.

    The place of the hash counts as zeros.

    Raises:
        ValueError: there is no such place.
    """
    length = int.from_bytes(file.read(8), "little")
    file.seek(0)
    head = file.read(8 + min(length, _HEADER))
    if head.count(_MARK) != 1 or len(head) < 8 + length:  # within texts, quotes are escaped
        raise ValueError("its header is cut off, or has no hash")
    place = head.index(_MARK) + len(_MARK)
    end = place + len(_BLANK)
    digest = hashlib.sha256(head[:place] + _BLANK + head[end:])
    while piece := file.read(1 << 20):
        digest.update(piece)
    return place, head[place:end], digest.hexdigest().encode()


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


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
        f"the stream cannot be kept in a file: its state holds a {type(value).__name__}, and expected are tensors "
        'and plain values. Idle streams can be parked with park="cpu"'
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
