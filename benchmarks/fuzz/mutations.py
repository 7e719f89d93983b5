"""Random damage to saved values: nested dicts, lists, tensors, plain values, JSON texts and the bytes of files."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, -1.5, 1e-300,
    1e38, 1e300, math.nan, math.inf, -math.inf, "", "0", "x" * 1000, "ttt", "\ud800", "\x00", [], (), {}, [0], [None],
    ["a"], {"a": 1}, {0: 1}, {None: None}, [[[]]], (1, 2, 3), set(), b"bytes", 1j, object, range(3),
    torch.zeros(3), torch.tensor(1), np.zeros(3),
)  # fmt: skip
"""Values of all kinds that a field does not expect."""
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.bool, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
JSON_STRANGE = tuple(
    value for value in STRANGE if isinstance(value, None | bool | int | float | str | list | tuple | dict)
)


def nested(depth: int, leaf: Any = None) -> Any:
    """Lists and dicts inside of each other."""
    value = leaf
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all that lies inside a nested value, at most 8 deep."""
    if len(path) == 8:
        return []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [each for key, item in inside for each in ((*path, key), *places(item, (*path, key)))]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """What lies there."""
    for key in path:
        value = value[key]
    return value


def put(value: Any, path: tuple[Any, ...], item: Any) -> Any:
    """A nested value with something else in this place; what is around it is copied."""
    if not path:
        return item
    key, rest = path[0], path[1:]
    if isinstance(value, dict):
        return {**value, key: put(value[key], rest, item)}
    changed = [*value[:key], put(value[key], rest, item), *value[key + 1 :]]
    return changed if isinstance(value, list) else tuple(changed)


def without(value: Any, path: tuple[Any, ...]) -> Any:
    """A nested value without what lies in this place."""
    around, key = at(value, path[:-1]), path[-1]
    if isinstance(around, dict):
        return put(value, path[:-1], {k: v for k, v in around.items() if k != key})
    return put(value, path[:-1], type(around)([*around[:key], *around[key + 1 :]]))


def damaged_tensor(tensor: Tensor, dice: random.Random) -> Any:
    """A tensor of another shape, kind or content."""
    shape = list(tensor.shape)
    numbers = tensor.detach().clone()
    kind = dice.randrange(18)
    if kind == 0:
        return torch.zeros([side + dice.choice((-1, 1, 3)) if side else 1 for side in shape], dtype=tensor.dtype)
    if kind == 1:
        return numbers.to(dice.choice(DTYPES))
    if kind == 2:
        return numbers.flatten()
    if kind == 3:
        return numbers[None]
    if kind == 4:
        return torch.zeros(dice.choice(((), (0,), (1,), (2, 0), (1, 1, 1))), dtype=tensor.dtype)
    if kind == 5:
        return numbers.to("meta")
    if kind == 6 and tensor.ndim:
        return numbers.to_sparse()
    if kind == 7 and tensor.is_floating_point():
        return numbers.fill_(dice.choice((math.nan, math.inf, -math.inf, 1e38, -1.0)))
    if kind == 8 and tensor.is_floating_point() and tensor.numel():
        numbers.view(-1)[dice.randrange(tensor.numel())] = dice.choice((math.nan, math.inf, -1e30, -1.0))
        return numbers
    if kind == 9:
        return numbers.T.contiguous() if tensor.ndim == 2 else numbers.tolist()
    if kind == 10:
        return numbers.expand(2, *shape)
    if kind == 11 and tensor.dtype == torch.uint8 and tensor.numel():
        for _ in range(dice.choice((1, 8, 400))):
            numbers.view(-1)[dice.randrange(tensor.numel())] = dice.randrange(256)
        return numbers
    if kind == 12 and tensor.is_floating_point() and tensor.ndim:
        return torch.quantize_per_tensor(numbers.float(), 0.1, 0, torch.quint8)
    if kind > 13:
        return _of_another_make(numbers, dice)
    return numbers[..., :-1] if tensor.ndim else numbers.repeat(3)


class Odd(Tensor):
    """A tensor of a class of somebody else."""


def _of_another_make(numbers: Tensor, dice: random.Random) -> Any:
    """The same numbers in a tensor of another make, or one that claims a size that no memory has."""
    shape = [side or 1 for side in numbers.shape]
    huge = dice.choice(([2**40], [2**20, 2**20], [*shape[:-1], 2**40], [2**40, *shape], [*shape[:-2], 2**18, 2**18]))
    kind = dice.randrange(9)
    if kind < 3:
        return torch.zeros((), dtype=numbers.dtype).expand(huge)  # one number in memory
    if kind == 3:
        return numbers.as_subclass(Odd)
    if kind == 4 and numbers.is_floating_point():
        return torch.nn.Parameter(numbers)
    if kind == 5:
        with torch.inference_mode():
            return numbers.clone()
    if kind == 6 and numbers.is_floating_point() and numbers.ndim:
        return torch.nested.nested_tensor([numbers, numbers])
    if kind == 7:
        return numbers.float().numpy()
    return torch.zeros([1] * len(shape), dtype=numbers.dtype).expand(shape)  # overlaps itself


def damaged(value: Any, dice: random.Random, strange: tuple[Any, ...] = STRANGE) -> Any:
    """A nested value with one to three random changes; the original stays as it is."""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        value = _damaged_once(value, dice, strange)
    return value


def _damaged_once(value: Any, dice: random.Random, strange: tuple[Any, ...]) -> Any:
    paths = places(value)
    if not paths:
        return dice.choice(strange)
    depth = dice.randrange(1, 1 + max(map(len, paths)))  # else nearly all changes would be at the bottom
    path = dice.choice([each for each in paths if len(each) == depth] or paths)
    item, kind = at(value, path), dice.randrange(12)
    if kind == 10:  # two things in each other's place
        other = dice.choice(
            [each for each in paths if each[: len(path)] != path and path[: len(each)] != each] or [path]
        )
        return put(put(value, path, at(value, other)), other, item)
    if kind == 11:
        return _renamed(value, path, dice)
    if kind == 0:
        return without(value, path)
    if kind == 1:
        return put(value, path[:-1], _with_more(at(value, path[:-1]), item, dice))
    if kind == 2:
        return put(value, path, at(value, dice.choice(paths)))  # something from elsewhere
    if kind == 3:
        return put(value, path, nested(dice.choice((3, 30, 400, 3000)), item))
    if kind < 8:
        return put(value, path, near(item, dice, strange))
    return put(value, path, dice.choice(strange))


def _renamed(value: Any, path: tuple[Any, ...], dice: random.Random) -> Any:
    """Something under another name, or two names exchanged; in a list, in another place."""
    around, key = at(value, path[:-1]), path[-1]
    if not isinstance(around, dict):
        return put(value, path[:-1], type(around)([*around[key:], *around[:key]]))
    other = dice.choice([*around, f"{key}x", str(key)[:-1], str(key).upper(), f" {key}", "\ud800", "a.b", key])
    names = {key: other, other: key}
    return put(value, path[:-1], {names.get(name, name): item for name, item in around.items()})


def _with_more(around: Any, item: Any, dice: random.Random) -> Any:
    """A dict or list with one thing more in it."""
    if isinstance(around, dict):
        return {**around, dice.choice(("another", "model.another", 99, None, "\ud800", "params")): copy.copy(item)}
    return type(around)([*around, item])


def near(item: Any, dice: random.Random, strange: tuple[Any, ...]) -> Any:
    """Something of the same kind, with another value."""
    if isinstance(item, Tensor):
        return damaged_tensor(item, dice)
    if isinstance(item, bool):
        return not item
    if isinstance(item, int):
        return item + dice.choice((-1, 1, 5, -1000, 1000, 10**6, 10**9, 2**62, 2**70))
    if isinstance(item, float):
        return dice.choice(
            (-item, item * 1e30, math.nan, math.inf, item + 1.0, int(item) if math.isfinite(item) else 0)
        )
    if isinstance(item, str):
        return dice.choice((item + "x", item[:-1], item.upper(), "", item * 50, item.replace(".", "/"), "\ud800"))
    if isinstance(item, dict):
        return dict(list(item.items())[::-1][1:])
    if isinstance(item, list | tuple):
        return type(item)(item[::-1]) if dice.random() < 0.5 else type(item)(item[:-1])
    return dice.choice(strange)


def damaged_json(content: str, dice: random.Random) -> str:
    """A JSON text with other values, or that is none."""
    kind = dice.randrange(9)
    if kind == 8 and '": ' in content:  # a name that stands twice in one dict
        place = dice.choice([i for i in range(len(content)) if content.startswith('"', i) and content[i - 1] in "{ "])
        end = content.find('": ', place)
        return f"{content[:place]}{content[place : end + 2]}{dice.choice(('0', 'null', '[]', '{}'))}, {content[place:]}"
    if kind == 0:
        place = dice.randrange(len(content) + 1)
        return (
            content[:place] + dice.choice(('"', "[", "}", "[" * 5000, "NaN", "1e999", "9" * 5000, "")) + content[place:]
        )
    if kind == 1:
        return content[: dice.randrange(len(content) + 1)]
    value = damaged(json.loads(content), dice, JSON_STRANGE)
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return content.replace(":", ": [" * 2000, 1)


def damaged_bytes(data: bytes, dice: random.Random, head: int) -> bytes:
    """Bytes of a file with some changed, left out or added, half of the time in its first `head` bytes."""
    content = bytearray(data)
    for _ in range(dice.choice((1, 2, 8, 64))):
        place = dice.randrange(min(head, len(content)) if dice.random() < 0.5 else len(content))
        content[place] = dice.randrange(256)
    kind, place = dice.randrange(5), dice.randrange(len(content))
    if kind == 0:
        return bytes(content[:place])
    if kind == 1:
        return bytes(content[:place] + content[place + dice.choice((1, 8, 1000)) :])
    return bytes(content)
