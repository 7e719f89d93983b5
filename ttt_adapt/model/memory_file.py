"""What a model keeps of a video as tensors and plain values, which `torch.load(weights_only=True)` reads.

Only the model knows what shape its memory must have, so a saved memory carries a hash of itself: damage is found
before anything changes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ttt_adapt.errors import CheckpointError
from ttt_adapt.model.fingerprint import fingerprint
from ttt_adapt.model.slots import Absent, Slot, count_of, is_container, is_plain_object, slots
from ttt_adapt.schema import DEPTH, check_fields, dict_of, shown, text

_PLAIN = (bool, int, float, str, bytes)
_LISTS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "size": torch.Size}
_DICTS: dict[str, Any] = {"dict": dict, "ordered": OrderedDict}


def pack_memory(values: Iterable[tuple[Slot, Any]], home: torch.device) -> dict[str, Any]:
    """Places and their values as nested dicts and lists of tensors and plain values.

    Args:
        values: what passes change, as it is.
        home: device of the model.

    Raises:
        TypeError: a value consists of other objects; the message names it.
    """
    packed: dict[str, Any] = {"buffers": {}, "attributes": {}}
    for slot, value in values:
        try:
            packed["buffers" if slot.buffer else "attributes"][slot.path] = _packed(value, home)
        except TypeError as error:
            raise TypeError(f"{slot.path} holds {error}") from error
    return {**packed, "hash": _hash(packed)} if any(packed.values()) else {}


def unpack_memory(saved: Any, model: nn.Module, home: torch.device) -> list[tuple[Slot, Any]]:
    """Places of a model and what was saved of them.

    Args:
        saved: from `pack_memory`; {} where nothing was kept.
        model: whose places they are.
        home: device of the model.

    Raises:
        CheckpointError: it is damaged, or the model has no such places.
    """
    what = "the state's memory of the model"
    if isinstance(saved, Mapping) and not saved:
        return []
    check_fields(saved, {"buffers": dict_of(_any), "attributes": dict_of(_any), "hash": text}, what)
    try:
        own = _hash({"buffers": dict(saved["buffers"]), "attributes": dict(saved["attributes"])})
        if own != saved["hash"]:
            raise ValueError("its hash is another")
        places = _Places(model)
        found = [places.find(path, True, _unpacked(each, home)) for path, each in saved["buffers"].items()]
        found += [places.find(path, False, _unpacked(each, home)) for path, each in saved["attributes"].items()]
    except (TypeError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{what} is damaged ({error}): begin the video anew, with reset()") from error
    return found


def _any(_value: Any) -> str:
    return ""


class _Places:
    """The places of a model where something may be kept, by path."""

    def __init__(self, model: nn.Module) -> None:
        self._slots = {(slot.path, slot.buffer): slot for slot in slots(model)}
        self._owners: dict[str, Any] = {p: s.value for (p, _), s in self._slots.items() if is_plain_object(s.value)}
        self._owners |= {p.removesuffix(f".{s.name}"): s.owner for (p, _), s in self._slots.items() if "." in p}
        self._owners |= dict(model.named_modules())

    def find(self, path: str, buffer: bool, value: Any) -> tuple[Slot, Any]:
        """The place with this path, and the value.

        Raises:
            CheckpointError: the model has no such place, or keeps something else there.
        """
        slot = self._slots.get((path, buffer)) or self._absent(path, buffer)
        now = None if slot is None else slot.value
        fits = slot is not None and _is_kept(now) and (not buffer or value is None or isinstance(value, Tensor))
        if isinstance(now, Tensor) and isinstance(value, Tensor):
            fits = fits and now.dtype == value.dtype
        elif isinstance(now, _PLAIN) and isinstance(value, _PLAIN):
            fits = fits and type(now) is type(value)
        if not fits or slot is None:
            own = "nothing of this kind" if slot is None else shown(now)
            raise CheckpointError(
                f"the state's model kept {shown(value)} at {path!r}, where this model has {own}: go on over the model "
                "that the state was saved over"
            )
        return slot, value

    def _absent(self, path: str, buffer: bool) -> Slot | None:
        """A place that passes may make; None where something else has its name."""
        start, _, name = path.rpartition(".")
        owner = self._owners.get(start)
        taken = owner is None or hasattr(owner, name) or not name.isidentifier()
        return None if taken or (buffer and not isinstance(owner, nn.Module)) else Slot(owner, buffer, name, path)


def _is_kept(value: Any) -> bool:
    """Whether passes may keep something in the place of a value: it is no layer, function or other object."""
    counts = type(value) is itertools.count
    return (
        counts
        or value is Absent
        or value is None
        or isinstance(value, _PLAIN)
        or _is_tensor(value)
        or is_container(value)
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray | np.generic) and not isinstance(value, nn.Parameter)


def _packed(value: Any, home: torch.device, depth: int = 0) -> Any:
    """A value as tensors and plain values; every other kind is a dict with the name of the kind.

    Raises:
        TypeError: it consists of other objects.
    """

    def inside(items: Iterable[Any]) -> list[Any]:
        if depth == DEPTH:
            raise TypeError(f"values nested more than {DEPTH} deep")
        return [_packed(item, home, depth + 1) for item in items]

    if value is None or type(value) in _PLAIN:
        return value
    if value is Absent:
        return {"absent": True}
    if isinstance(value, Tensor) and type(value) is Tensor and value.layout is torch.strided:
        away = value.device.type != home.type
        return {"on": str(value.device), "tensor": value.detach().clone()} if away else value.detach().clone()
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        return {"array" if isinstance(value, np.ndarray) else "number": torch.from_numpy(np.array(value))}
    for name, kind in _DICTS.items():
        if type(value) is kind:
            return {name: inside(part for item in value.items() for part in item)}
    for name, kind in _LISTS.items():
        if type(value) is kind:
            return {name: inside(value)}
    if type(value) is deque:
        return {"deque": inside(value), "most": value.maxlen}
    if type(value) is itertools.count:
        return {"count": inside(count_of(value))}
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__}")


def _unpacked(saved: Any, home: torch.device) -> Any:
    """What `_packed` was given.

    Raises:
        TypeError, ValueError, KeyError: it is damaged.
    """
    if isinstance(saved, Tensor):
        return saved.detach().to(home, copy=True)
    if not isinstance(saved, Mapping):
        return saved
    kind, content = next(iter(saved.items()))
    if kind in _DICTS:
        items = [_unpacked(item, home) for item in content]
        return _DICTS[kind](zip(items[::2], items[1::2], strict=True))
    if kind in _LISTS:
        return _LISTS[kind](_unpacked(item, home) for item in content)
    return _KINDS[kind](content, saved, home)


_KINDS: dict[str, Callable[[Any, Mapping[str, Any], torch.device], Any]] = {
    "absent": lambda _content, _saved, _home: Absent,
    "on": lambda device, saved, _home: saved["tensor"].detach().to(device, copy=True),
    "array": lambda tensor, _saved, _home: tensor.cpu().numpy().copy(),
    "number": lambda tensor, _saved, _home: tensor.cpu().numpy()[()],
    "deque": lambda items, saved, home: deque((_unpacked(item, home) for item in items), saved["most"]),
    "count": lambda items, _saved, home: itertools.count(*(_unpacked(item, home) for item in items)),
    "dtype": lambda name, _saved, _home: getattr(torch, name),
    "device": lambda name, _saved, _home: torch.device(name),
}


def _hash(packed: Mapping[str, Any]) -> str:
    """A hash of packed values.

    Raises:
        TypeError, ValueError: it is damaged.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_meta or value.layout is not torch.strided:
                raise ValueError("a tensor has no values")
            tensors[str(len(tensors))] = value
            return {"tensor": str(value.dtype)}
        if isinstance(value, bytes):
            return {"bytes": value.hex()}
        raise TypeError(f"it holds a {type(value).__name__}")

    words = json.dumps(packed, default=plain, sort_keys=True)
    wide = {name: torch.view_as_real(t) if t.is_complex() else t for name, t in tensors.items()}
    return hashlib.sha256((words + fingerprint(wide, torch.float64)).encode()).hexdigest()[:32]
