"""What predictions look like: values that are not finite, and one class everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ttt_adapt.schema import check_fields, list_of, whole
from ttt_adapt.stream.late import Delayed
from ttt_adapt.stream.state_part import Part

NOT_FINITE, COLLAPSE = "non-finite prediction", "class collapse"
PATIENCE = 16
"""So many predictions in a row with one class everywhere look like a collapse."""
EXCUSED = 64
"""For so many frames nobody asks again about something that the source weights do too."""
_SIDE = 16  # samples of a map of scores, in height and in width
_ALL, _MOST = 0.995, 0.9  # share of the largest class: a collapse, and still a picture of several classes


def signals(output: Any) -> Tensor | None:
    """What a prediction shows in two numbers, on its device: [2]; None for one without floats.

    The first is finite where all values are. The second is the share of the largest class among samples of the first
    map of scores [1, C, H, W], C > 1, from 8 x 8 on; 0 where there is none.
    """
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
    floats = [leaf for leaf in tensors if leaf.is_floating_point()]
    if not floats:
        return None
    total = torch.stack([leaf.detach().sum(dtype=torch.float32).to(floats[0].device) for leaf in floats]).sum()
    scores = next((leaf for leaf in floats if _is_map(leaf)), None)
    return torch.stack([total, total.new_zeros(()) if scores is None else _largest_share(scores).to(total.device)])


def _is_map(leaf: Tensor) -> bool:
    return leaf.ndim == 4 and leaf.shape[0] == 1 and leaf.shape[1] > 1 and min(leaf.shape[2:]) >= 8


def _largest_share(scores: Tensor) -> Tensor:
    """Of the classes with the highest score, the share of the most frequent one."""
    down, across = (-(-side // _SIDE) for side in scores.shape[2:])
    ids = scores.detach()[0, :, ::down, ::across].argmax(0).flatten()
    counts = torch.zeros(scores.shape[1], device=ids.device).index_add_(0, ids, torch.ones_like(ids, dtype=torch.float))
    return counts.amax() / len(ids)


def shows(kind: str, found: list[float], limit: float = _MOST) -> bool:
    """Whether `signals` of a prediction show a trouble.

    Args:
        kind: `NOT_FINITE` or `COLLAPSE`.
        found: the signals.
        limit: share of the largest class from which on it is one.
    """
    if kind == NOT_FINITE:
        return not math.isfinite(found[0])
    return found[1] >= limit


class PredictionLook(Part):
    """Looks at the predictions of one video, by two numbers of each.

    Predictions on a device other than the CPU are judged two frames later, so that the host does not wait for them.
    """

    def __init__(self) -> None:
        self._numbers = Delayed(2, 2)
        self._same, self._excused = 0, dict.fromkeys((NOT_FINITE, COLLAPSE), 0)

    @property
    def sound(self) -> bool:
        """Whether the last predictions show nothing, or only what the source weights do too."""
        return self._same == 0 or self._excused[COLLAPSE] > 0

    def trouble(self, output: Any) -> str:
        """What is wrong with the predictions, the one of the next frame included: a kind, or ""."""
        found = signals(output)
        due = None if found is None else self._numbers.push(found)
        if due is None:
            return ""
        self._same = self._same + 1 if shows(COLLAPSE, due, _ALL) else 0
        self._excused = {kind: max(0, left - 1) for kind, left in self._excused.items()}
        kind = NOT_FINITE if shows(NOT_FINITE, due) else COLLAPSE if self._same >= PATIENCE else ""
        return "" if self._excused.get(kind) else kind

    def excuse(self, kind: str) -> None:
        """What was found is no trouble: the source weights do it too."""
        self._same, self._excused = 0, {**self._excused, kind: EXCUSED}

    def begin_again(self) -> None:
        """Forget the predictions so far: they are of weights that are gone."""
        self._same = 0
        self._numbers.reset()

    def reset(self) -> None:
        """See `Part`."""
        self.begin_again()
        self._excused = dict.fromkeys(self._excused, 0)

    def state_dict(self) -> dict[str, Any]:
        """What is known."""
        return {"same": self._same, "excused": list(self._excused.values()), "waiting": self._numbers.state_dict()}

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """See `Part`."""
        fields = {"same": whole(), "excused": list_of(whole(0, EXCUSED), 2, 2), "waiting": lambda value: ""}
        check_fields(saved, fields, "the state's look at predictions")
        waiting, same = self._numbers.prepare_load(saved["waiting"]), saved["same"]
        excused = dict(zip(self._excused, saved["excused"], strict=True))

        def load() -> None:
            waiting()
            self._same, self._excused = same, excused

        return load

    def mark(self) -> Callable[[], None]:
        """See `Part`."""
        waiting, same, excused = self._numbers.mark(), self._same, self._excused

        def undo() -> None:
            waiting()
            self._same, self._excused = same, excused

        return undo
