"""What may lie at a path in place of a good file: other kinds of files, no files, and sizes that nobody has."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

TERABYTE = 2**40


def put_something_else(path: Path, good: bytes, dice: random.Random) -> str:
    """Put something into the place of a good file; what was there before is gone.

    Args:
        path: where the file is expected.
        good: the content of a good file.
        dice: chooses.

    Returns:
        Its name, for messages.
    """
    empty(path)
    if dice.random() < 0.5:
        name, write = dice.choice(_PLACES)
        write(path, good)
        return name
    name, make = dice.choice(_CONTENTS)
    path.write_bytes(make(good, dice))
    return name


def empty(path: Path) -> None:
    """Take away what is there, whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


# ---- no regular files, and files of any size


def _folder(path: Path, good: bytes) -> None:
    path.mkdir()
    (path / path.name).write_bytes(good)


def _linked(path: Path, good: bytes) -> None:
    target = path.with_name("linked")
    target.write_bytes(good)
    path.symlink_to(target)


def _sparse(path: Path, content: bytes) -> None:
    """A file of a terabyte that takes no room: its content, and nothing but zeros behind it."""
    path.write_bytes(content)
    os.truncate(path, TERABYTE)


def _sparse_tensor(path: Path, _good: bytes) -> None:
    """A whole .safetensors file whose only tensor has nearly a terabyte."""
    head = json.dumps({"model.x": {"dtype": "U8", "shape": [TERABYTE - 4096], "data_offsets": [0, TERABYTE - 4096]}})
    _sparse(path, _framed(head.ljust(4088).encode()))


_PLACES: tuple[tuple[str, Callable[[Path, bytes], None]], ...] = (
    ("nothing", lambda path, good: None),
    ("a folder", _folder),
    ("a link to a good file", _linked),
    ("a link to nothing", lambda path, good: path.symlink_to(path.with_name("nowhere"))),
    ("a link to itself", lambda path, good: path.symlink_to(path)),
    ("a link to its folder", lambda path, good: path.symlink_to(path.parent)),
    ("a pipe", lambda path, good: os.mkfifo(path)),
    ("a file that cannot be read", lambda path, good: path.symlink_to("/proc/self/mem")),
    ("a device without end", lambda path, good: path.symlink_to("/dev/zero")),
    ("an empty device", lambda path, good: path.symlink_to("/dev/null")),
    ("a terabyte of zeros", lambda path, good: _sparse(path, b"")),
    ("a good file and a terabyte", _sparse),
    ("a tensor of a terabyte", _sparse_tensor),
)


# ---- contents


def _framed(header: bytes, length: int | None = None) -> bytes:
    """The beginning of a .safetensors file."""
    return struct.pack("<Q", len(header) if length is None else length) + header


def _claimed(_good: bytes, dice: random.Random) -> bytes:
    """A .safetensors file whose header is longer than the file."""
    length = dice.choice((1, 10**6, 99_999_999, 10**8, TERABYTE, 2**63 - 1, 2**63, 2**64 - 1))
    return _framed(b'{"__metadata__":{"spec":"{}"}}', length)


def _claimed_tensor(_good: bytes, dice: random.Random) -> bytes:
    """A .safetensors file with a tensor that is larger than the file, or than any memory."""
    shape = dice.choice(([TERABYTE], [2**62, 4], [2**63], [2**64 - 1], [0, 2**62], [-1], [1] * 5000, [TERABYTE, 0]))
    end = dice.choice((0, 4, 4 * TERABYTE, 2**63, 2**64 - 1, -4))
    header = {"__metadata__": {"spec": "{}"}, "model.x": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
    return _framed(json.dumps(header).encode()) + b"\x00" * 4


def _many(_good: bytes, _dice: random.Random) -> bytes:
    """A .safetensors file with very many tensors."""
    empty_tensor = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return _framed(json.dumps({f"model.{i}": empty_tensor for i in range(5000)}).encode())


def _twice_named(good: bytes, dice: random.Random) -> bytes:
    """A .safetensors file, or a JSON text, in which a name stands twice."""
    place = good.find(b'{"') if dice.random() < 0.5 else good.rfind(b'{"')
    if place < 0:
        return good + good
    more = dice.choice(
        (b'"format":"1",', b'"spec":"{}",', b'"encoder":"resnet18",', b'"runs":[],', b'"__metadata__":{},')
    )
    content = good[: place + 1] + more + more + good[place + 1 :]
    if good[8:9] != b"{":
        return content
    return struct.pack("<Q", struct.unpack("<Q", good[:8])[0] + 2 * len(more)) + content[8:]


def _saved_by_torch(value: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **how)
    return file.getvalue()


def _zipped(good: bytes, _dice: random.Random) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", good)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", b"\x00" * 10**6)  # a thousandth of it in the file
    return file.getvalue()


def _arrays(_good: bytes, dice: random.Random) -> bytes:
    file = io.BytesIO()
    if dice.random() < 0.5:
        np.savez_compressed(file, a=np.zeros((4, 8)))
    else:
        np.save(file, np.zeros((4, 8)))
    return file.getvalue()


class _Code:
    """What runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code of a file was run')",)


_TENSORS = {"0.weight": torch.zeros(4, 3, 3, 3), "0.bias": torch.zeros(4)}
_OTHER_KINDS = (
    b"", b"\x00", b"{", b"null", b"[]", b"\xff\xfe{\x00}\x00", b"%PDF-1.7\n", b"\x89PNG\r\n\x1a\n" + bytes(40),
    b"\xff\xd8\xff\xe0" + bytes(40), b"\x00\x00\x00\x20ftypisom" + bytes(40), b"RIFF\x00\x00\x00\x00AVI LIST",
    b"\x1aE\xdf\xa3" + bytes(40), b"\x89HDF\r\n\x1a\n" + bytes(40), b"import torch\n", b"model = dict(type='X')\n",
    b"\x80\x04\x95" + b"\xff" * 8, b"PK\x03\x04" + bytes(60), b"PK\x05\x06" + bytes(18), b"GIF89a" + bytes(40),
    json.dumps({"classes": ["road"], "clips": {}}).encode(), json.dumps({"images": [], "annotations": []}).encode(),
    json.dumps({"format": 2, "config": {}, "environment": {}, "runs": []}).encode(),
    b'"\\ud800"', b"1e999", b"9" * 5000,
)  # fmt: skip
_CONTENTS: tuple[tuple[str, Callable[[bytes, random.Random], bytes]], ...] = (
    ("a header that is longer than the file", _claimed),
    ("a tensor that is larger than the file", _claimed_tensor),
    ("thousands of tensors", _many),
    ("a name that stands twice", _twice_named),
    ("another kind of file", lambda good, dice: dice.choice(_OTHER_KINDS)),
    ("weights alone", lambda good, dice: bytes(save(_TENSORS, dice.choice((None, {"format": "pt"}))))),
    ("a calibration of nothing", lambda good, dice: bytes(save(_TENSORS, {"calibration": "{}"}))),
    ("weights by torch.save", lambda good, dice: _saved_by_torch(_TENSORS)),
    ("weights of long ago", lambda good, dice: _saved_by_torch(_TENSORS, _use_new_zipfile_serialization=False)),
    ("code in a pickle", lambda good, dice: _saved_by_torch({"model": _Code()})),
    ("a pickle of Python", lambda good, dice: pickle.dumps({"epoch": 1, "model": _Code()})),
    ("a zip archive", _zipped),
    ("a file of gzip", lambda good, dice: gzip.compress(good, 1)),
    ("arrays of NumPy", _arrays),
    ("the file twice", lambda good, dice: good + good),
    ("the file backwards", lambda good, dice: good[::-1]),
    ("the file without its end", lambda good, dice: good[: dice.randrange(len(good))]),
    ("the end of the file", lambda good, dice: good[dice.randrange(1, len(good)) :]),
    ("the file in UTF-16", lambda good, dice: good.decode("latin-1").encode("utf-16")),
)
