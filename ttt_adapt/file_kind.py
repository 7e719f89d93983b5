"""What kind of file lies at a path, and what takes it: for messages about a file of another kind than expected."""

from __future__ import annotations

import json
import pickle
import shlex
import stat
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ttt_adapt.errors import TTTAdaptError
from ttt_adapt.files import PICTURE_SUFFIXES, VIDEO_SUFFIXES, files_in

HEADER = 16 * 2**20
"""Bytes of the longest header and of the longest JSON text that are looked into."""
PICKLED = 2**30
"""Bytes of the largest pickle that is looked into."""


class FileKind(NamedTuple):
    """A kind of file.

    Attributes:
        name: by which code asks for it.
        what: in words, such as "a video".
        use: what takes it, with FILE for its path; "" where nothing of this library does.
    """

    name: str
    what: str
    use: str = ""


NOTHING = FileKind("nothing", "no file")
UNKNOWN = FileKind("unknown", "of a kind that is not known here")
TEXT = FileKind("text", "a text")
JSON = FileKind("json", "a JSON text")
BROKEN = FileKind("safetensors", "a .safetensors file whose header is broken")
CHECKPOINT = FileKind(
    "checkpoint",
    "a checkpoint of `ttt-adapt train`",
    "`load_checkpoint` of `ttt_adapt.tasks.checkpoint` gives its model, branch and calibration, and "
    "`ttt-adapt info FILE` shows them",
)
CALIBRATION = FileKind(
    "calibration",
    "a calibration without its model",
    "StreamAdapter(model, calibration=Calibration.load(FILE)) takes it",
)
STREAM = FileKind(
    "stream",
    "the state of a stream",
    "`load_state_dict(torch.load(FILE))` of a StreamAdapter goes on with it, over the model that it was saved over",
)
STREAM_FILE = FileKind(
    "stream-file",
    "the state of a stream, as `save` wrote it",
    "`load(FILE)` of a StreamAdapter goes on with it, over the model that it was saved over",
)
RUN_STATE = FileKind(
    "run-state", "the state of a run", "the same command of `ttt-adapt run` with --state FILE --resume goes on with it"
)
TRAINING = FileKind(
    "training", "the state of a training that was stopped", "`ttt-adapt train --resume`, or `fit`, goes on with it"
)
WEIGHTS = FileKind(
    "weights",
    "a file of weights without a description of their model",
    "`ttt-adapt train --pretrained FILE` starts from them; in Python, `load_state_dict` of your model loads them",
)
OPENMMLAB = FileKind("openmmlab", "a checkpoint of OpenMMLab", "`ttt-adapt mm test CONFIG FILE` runs it")
PICKLE = FileKind(
    "pickle", "a pickle of Python objects, whose code is not run", "save the model's state_dict() in its place"
)
REPORT = FileKind("report", "the report of an evaluation", "`Report.load` of `ttt_adapt.evaluation.report` reads it")
COCO = FileKind(
    "coco", "a file of annotations in the layout of COCO", "`ttt-adapt eval` takes the folder that holds them"
)
VIDEO = FileKind("video", "a video", "`ttt-adapt run FILE --checkpoint MODEL.safetensors` adapts a model to it")
PICTURE = FileKind(
    "picture", "a picture", "`ttt-adapt run FOLDER --checkpoint MODEL.safetensors` takes a folder of pictures"
)
PICTURES = FileKind(
    "pictures",
    "a folder of pictures",
    "`ttt-adapt run FILE --checkpoint MODEL.safetensors` adapts a model to them",
)
ARRAYS = FileKind("arrays", "a file with arrays of NumPy", "`np.load(FILE)` reads them")
CONFIG = FileKind("config", "a config of OpenMMLab", "`ttt-adapt mm train FILE` trains by it")

_MAGIC = {
    b"\x89PNG": PICTURE, b"\xff\xd8\xff": PICTURE, b"GIF8": PICTURE, b"II*\x00": PICTURE, b"MM\x00*": PICTURE,
    b"\x1aE\xdf\xa3": VIDEO, b"FLV\x01": VIDEO, b"\x00\x00\x01\xba": VIDEO, b"\x93NUMPY": ARRAYS,
    b"%PDF": FileKind("pdf", "a PDF document"), b"\x1f\x8b": FileKind("gzip", "packed by gzip", "unpack it first"),
    b"\x89HDF": FileKind("hdf5", "a file of HDF5"),
}  # fmt: skip
_SUFFIXES = {
    **dict.fromkeys(VIDEO_SUFFIXES, VIDEO),
    **dict.fromkeys(PICTURE_SUFFIXES, PICTURE),
    ".onnx": FileKind("onnx", "a model in ONNX", "this library takes models of PyTorch"),
}


def refuse_other_kind(path: str | Path, names: Collection[str], expected: str, error: type[TTTAdaptError]) -> None:
    """Refuse a file of another kind; where nothing is there, nothing happens.

    Args:
        path: the file.
        names: of the kinds that it may be of; a damaged file may be of several.
        expected: what it is not, for the message, such as "no calibration".
        error: what to raise.

    Raises:
        `error`: it is of another kind; the message says of which, and what takes it.
    """
    kind = kind_of(path)
    if kind is not NOTHING and kind.name not in names:
        use = kind.use.replace("FILE", shlex.quote(str(path)) if "`ttt-adapt" in kind.use else repr(str(path)))
        raise error(f"{path} is {expected}: it is {kind.what}" + (f"; {use}" if use else ""))


def kind_of(path: str | Path) -> FileKind:
    """What lies at a path. It is never opened where opening could wait, and never read whole where it is large."""
    path = Path(path)
    try:
        found = path.stat()
    except (OSError, ValueError):
        return NOTHING
    try:
        if stat.S_ISDIR(found.st_mode):
            return PICTURES if files_in(path, PICTURE_SUFFIXES) else FileKind("folder", "a folder")
        if not stat.S_ISREG(found.st_mode):
            return FileKind("device", "no regular file, but a pipe or a device")
        if not found.st_size:
            return FileKind("empty", "an empty file")
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        return FileKind("unreadable", f"a file that cannot be read ({error.strerror})")
    return _of_content(path, head, found.st_size)


def _of_content(path: Path, head: bytes, size: int) -> FileKind:
    """The kind of a regular file, by its first bytes, and else by its suffix."""
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[4:8] == b"ftyp":
        return PICTURE if head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1") else VIDEO
    if head.startswith(b"RIFF"):
        return {b"AVI ": VIDEO, b"WEBP": PICTURE}.get(head[8:12], UNKNOWN)
    if head[8:9] == b"{" and 8 + int.from_bytes(head[:8], "little") <= size:
        return _of_safetensors(path, int.from_bytes(head[:8], "little"))
    if head.startswith(b"PK\x03\x04"):
        return _of_archive(path)
    if head.startswith(b"\x80") and size <= PICKLED:
        return _of_torch(path)
    if head.lstrip()[:1] in (b"{", b"[") and size <= HEADER:
        return _of_json(path)
    if path.suffix.lower() == ".py" and size <= HEADER:
        content = path.read_bytes()
        return CONFIG if b"_base_" in content or b"dict(" in content else TEXT
    return _SUFFIXES.get(path.suffix.lower(), TEXT if _is_text(head) else UNKNOWN)


def _is_text(head: bytes) -> bool:
    return head.isascii() and head.decode("ascii").replace("\n", "").replace("\t", "").replace("\r", "").isprintable()


def _of_safetensors(path: Path, length: int) -> FileKind:
    """The kind of a .safetensors file, by what its header says of the tensors."""
    if length > HEADER:
        return BROKEN
    try:
        with path.open("rb") as file:
            file.seek(8)
            header = json.loads(file.read(length))
    except (ValueError, RecursionError, OSError):
        return BROKEN
    told = header.get("__metadata__") if isinstance(header, dict) else None
    names = told if isinstance(told, dict) else {}
    if {"kind", "sha256", "state"} <= names.keys():
        return RUN_STATE if names["kind"] == RUN_STATE.name else STREAM_FILE
    return CHECKPOINT if "spec" in names else CALIBRATION if "calibration" in names else WEIGHTS


def _of_archive(path: Path) -> FileKind:
    """The kind of a zip archive: torch.save and np.savez write such."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = {each.filename: each.file_size for each in archive.infolist()}
    except Exception:  # a broken file can raise any error
        return UNKNOWN
    names = list(unpacked)
    if any(name.endswith("/constants.pkl") for name in names):
        return FileKind("torchscript", "a model of TorchScript", "this library takes models that are PyTorch modules")
    described = [size for name, size in unpacked.items() if name.endswith("/data.pkl")]
    if described:  # names and shapes, which are read whole; the tensors are files of their own
        return _of_torch(path, mmap=True) if max(described) <= HEADER else UNKNOWN
    if any(name.endswith(".npy") for name in names):
        return ARRAYS
    return FileKind("zip", "a zip archive", "unpack it first")


def _of_torch(path: Path, mmap: bool = False) -> FileKind:
    """The kind of what `torch.save` wrote, by its names."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        return PICKLE
    except Exception:  # a broken file can raise any error
        return UNKNOWN
    if not isinstance(content, Mapping):
        return FileKind("torch", f"a {type(content).__name__} that torch.save wrote")
    return kind_of_dict(content)


def kind_of_dict(content: Mapping[Any, Any]) -> FileKind:
    """The kind of a dict that `torch.save` wrote, by its names."""
    import torch

    for kind, names in (
        (TRAINING, {"config", "origin", "epoch", "optimizer", "schedule"}),
        (STREAM, {"config", "weights", "optimizer", "window"}),
        (OPENMMLAB, {"state_dict", "meta"}),
    ):
        if names <= content.keys():
            return kind
    wrapped = [content[name] for name in ("state_dict", "model") if isinstance(content.get(name), Mapping)]
    inside = wrapped[0] if wrapped else content
    if inside and all(isinstance(value, torch.Tensor) for value in inside.values()):
        return WEIGHTS
    return FileKind("torch", "a dict that torch.save wrote")


def _of_json(path: Path) -> FileKind:
    """The kind of a JSON text."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError):
        return JSON
    if not isinstance(content, dict):
        return JSON
    if {"config", "environment", "runs"} <= content.keys():
        return REPORT
    return COCO if {"images", "annotations"} <= content.keys() else JSON
