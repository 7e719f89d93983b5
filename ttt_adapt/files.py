"""Files and folders: which files are pictures and videos, their natural order, and writing a file whole."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shlex
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ttt_adapt.errors import CheckpointError, ConfigError, TTTAdaptError
from ttt_adapt.schema import shown, whole

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif"})
"""Photographs. A PNG file with the same stem in the same folder is its label, not a picture."""
PICTURE_SUFFIXES = PHOTO_SUFFIXES | {
    ".png", ".bmp", ".webp", ".avif", ".jp2", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".gif",
}  # fmt: skip
"""Pictures: frames of clips, stills, and labels."""
UNREAD_SUFFIXES = frozenset({
    ".heic", ".heif", ".hif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".psd", ".exr",
    ".hdr", ".svg", ".tga", ".dds",
})  # fmt: skip
"""Pictures that are not read."""
VIDEO_SUFFIXES = frozenset({
    ".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ogv", ".mts", ".m2ts", ".wmv", ".flv", ".3gp",
    ".qt",
})  # fmt: skip
"""Videos."""
FRAME_FOLDERS = ("images", "frames")
"""Names of the folder of a clip that holds its frames, beside folders of labels."""
LABEL_FOLDERS = frozenset({
    "labels", "label", "labelids", "annotations", "annotation", "masks", "mask", "gt", "ground_truth", "groundtruth",
    "segmentation", "segmentations", "segmentationclass", "segmentationobject", "panoptic", "panoptic_maps",
    "panoptic_images", "semantic_images", "gtfine", "gtcoarse",
})  # fmt: skip
"""Names, in lower case, of folders that hold labels and no pictures."""

SMALL = 2**28
"""Bytes of the largest file that is read whole: a report, or a calibration."""

NaturalKey = tuple[tuple[int, int, str], ...]


def natural_key(name: str) -> NaturalKey:
    """A sort key that compares runs of digits as numbers: `frame_2` comes before `frame_10`.

    Pass the stem of a file (`path.stem`), so that the suffix takes no part. Each run of digits gives (0, number, ""),
    each run of other characters (1, 0, text).
    """
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)


def check_path(path: object, what: str, error: type[TTTAdaptError]) -> None:
    """Refuse what is no path.

    Args:
        path: what came.
        what: what should be read, for the message.
        error: what to raise.

    Raises:
        `error`: it is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise error(f"the path of the {what} is {path!r}; expected a string or a pathlib.Path")


def exists(path: Path) -> bool:
    """Whether there is a file or a folder; False for what no file system takes, such as a name that is too long."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def folders_in(folder: Path) -> list[Path]:
    """The folders directly inside `folder` in natural order, without hidden ones and without links to folders above."""
    above = {folder.resolve(), *folder.resolve().parents}
    inside = (path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    visible = (path for path in inside if not (path.is_symlink() and path.resolve() in above))
    return sorted(visible, key=lambda path: natural_key(path.stem))


def files_in(folder: Path, suffixes: Container[str]) -> list[Path]:
    """The files directly inside `folder` in natural order, without hidden ones.

    Args:
        folder: where to look.
        suffixes: the suffixes of the files that are wanted, in lower case and with the dot.
    """
    visible = (path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    wanted = (path for path in visible if path.suffix.lower() in suffixes)
    return sorted(wanted, key=lambda path: natural_key(path.stem))


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, which are read piece by piece."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_small(path: str | Path, error: type[TTTAdaptError]) -> bytes:
    """The content of a file that is read whole, if it has at most `SMALL` bytes; a pipe or a device is not opened.

    Raises:
        `error`: it cannot be read, or is too large.
    """
    path = Path(path)
    try:
        if not path.is_file():
            why = "is no regular file" if os.path.lexists(path) else "is not there"
            raise error(f"{path} cannot be read: it {why}")
        if path.stat().st_size > SMALL:
            raise error(f"{path} cannot be read: it has {path.stat().st_size} bytes; expected at most {SMALL}")
        with path.open("rb") as file:
            return file.read(SMALL)
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason}") from reason


def part_file(path: Path) -> Path:
    """The name of the temporary file beside `path`, of this process alone: `.NAME.PROCESS.part`."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def abandoned_parts(folder: Path, name: str = "*") -> list[Path]:
    """Temporary files of `atomic_write` for the file `name`, or for any, in a folder where nobody writes now."""
    pattern = f".{name if name == '*' else glob.escape(name)}.[0-9]*.part"
    return [path for path in folder.glob(pattern) if path.name.split(".")[-2].isdecimal()]


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all: an existing file stays until the new one is complete.

    The block writes to the temporary path that it is given. The temporary file takes the name `path` when the block
    ends, and is removed when the block fails.
    """
    part = part_file(Path(path))
    try:
        yield part
        os.replace(part, path)
    finally:
        with suppress(OSError):  # it is gone where all went well
            part.unlink()


def check_format_number(number: object, newest: int, file: str | Path) -> None:
    """Refuse a saved file whose format is newer than this version of the library.

    Args:
        number: the format that the file names.
        newest: the newest format that this version reads.
        file: where it was read from, for the message.

    Raises:
        CheckpointError: `number` is no whole number from 1 to `newest`.
    """
    if whole(1, newest)(number):
        raise CheckpointError(
            f"{file} has format {shown(number)}, and this version of ttt_adapt reads formats up to {newest}: update "
            "ttt_adapt"
        )


def check_place(path: Path, what: str = "out", *, folder: bool = False) -> None:
    """Refuse a target that cannot be made. Nothing is changed, so this comes before anything is loaded or computed.

    One folder is made for results where it is missing: the one that `path` is, or that the file `path` lies in. The
    folder above it has to be there: a slip in a path never makes a tree of folders.

    Args:
        path: the file, or the folder, that results go to.
        what: the name of the argument that names it.
        folder: whether it is a folder.

    Raises:
        ConfigError: it is the other kind, the folder above is missing, or nothing can be written there.
    """
    made = path if folder else path.parent
    try:
        for name in (path, part_file(path)):
            with suppress(FileNotFoundError):
                name.lstat()  # it fails where a name is too long, and where a file is taken for a folder
        if os.path.lexists(path) and path.is_dir() != folder:
            kinds = ("a file", "a folder") if folder else ("a folder", "the name of a file")
            raise ConfigError(f"{what} is {path}, {kinds[0]}; expected {kinds[1]}")
        place = made if os.path.lexists(made) else made.parent
        if not place.exists():
            absent = next(each for each in (*reversed(place.parents), place) if not each.exists())
            raise ConfigError(
                f"{what} is {path}, and there is no folder {absent}: mend the path, or make it with mkdir -p "
                f"{shlex.quote(str(place))}"
            )
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise _unwritable(path, made, what, error) from error


def output_folder(path: Path, what: str = "out", *, folder: bool = False) -> None:
    """Make the folder for results at `path` as `check_place` allows it.

    Raises:
        ConfigError: as `check_place`.
    """
    check_place(path, what, folder=folder)
    made = path if folder else path.parent
    try:
        made.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(path, made, what, error) from error


def _unwritable(path: Path, made: Path, what: str, error: OSError) -> ConfigError:
    if error.errno == errno.ENAMETOOLONG:
        return ConfigError(f"{what} is {path}, a name that is too long for this disk: choose a shorter one")
    return ConfigError(
        f"{what} is {path}, and {made} is no folder that can be written to ({error.strerror}): choose another one"
    )


def refuse_existing(path: Path, overwrite: bool, what: str = "out") -> None:
    """Nothing is written over unasked: refuse a file that is there, or a folder that holds something.

    Args:
        path: what is to be written.
        overwrite: whether the caller was asked to write over it.
        what: the name of the argument that names it.

    Raises:
        ConfigError: it is there.
    """
    if overwrite or not os.path.lexists(path):
        return
    if not path.is_dir():
        raise ConfigError(f"{what} is {path}, which exists: choose another name, or set `overwrite` to replace it")
    if next(path.iterdir(), None) is not None:
        raise ConfigError(f"{what} is {path}, which is not empty: choose another folder, or set `overwrite`")
