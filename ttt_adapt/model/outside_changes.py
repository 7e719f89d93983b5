"""Notice what somebody else changes in a model while a stream has it, before the next frame."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

from ttt_adapt.errors import EncoderError, StateError
from ttt_adapt.model.half import HALF
from ttt_adapt.model.norms import norm_layers
from ttt_adapt.model.slots import cloned, same_values

REPLACED = (
    "they were replaced by others (by load_state_dict(assign=True), for example): detach() the adapter and make a new "
    "one with the same branch, StreamAdapter(model, branch)"
)

_modes = attrgetter("training")
_learns = attrgetter("requires_grad")
_version = attrgetter("_version")


class OutsideChanges:
    """Compares a model with what a stream left of it: modes, flags, precision, device, weights and running statistics.

    A look costs one Python attribute per module and two per weight. Values are compared only where PyTorch counts a
    write: one number of every weight, which a load of other weights changes.

    `model.half()` and its kin put new tensors in place of the old ones, which are held here. So what a way to half
    precision and back has rounded can be put back, without a copy.

    Args:
        roots: the model and the objective, as far as they are modules.
        learning: the parameters that the stream trains.
        moving: running statistics that follow the video; nobody else puts them back.
        replacements: how often modules or tensors were found replaced; see `ReplacementCounter.count`.
    """

    def __init__(
        self,
        roots: Sequence[nn.Module],
        learning: Sequence[nn.Parameter],
        moving: Collection[Tensor],
        replacements: Callable[[], int],
    ) -> None:
        modules = {id(m): m for root in roots for m in root.modules()}
        self._modules = list(modules.values())
        self._paths = {id(m): path for root in reversed(roots) for path, m in root.named_modules()}
        weights = {id(p): (name, p) for root in roots for name, p in root.named_parameters() if not p.is_inference()}
        self._names, self._weights = [name for name, _ in weights.values()], [p for _, p in weights.values()]
        self._roots = roots
        self._kinds = [(p.dtype, p.device) for p in self._weights]
        self._of_model = {id(p) for p in roots[0].parameters()}
        self._learning, self._flags = list(learning), [p.requires_grad for p in learning]
        self._replacements, self._replaced = replacements, replacements()
        followed = {id(tensor) for tensor in moving}
        self._statistics = [
            (norm, name, buffer)
            for norm in norm_layers(roots[0])
            for name, buffer in norm._buffers.items()
            if buffer is not None and not buffer.is_inference()
        ]
        self._following = [buffer for _, _, buffer in self._statistics if id(buffer) in followed]
        self._copies = [cloned(buffer) for _, _, buffer in self._statistics]
        pairs = zip(self._statistics, self._copies, strict=True)
        self._followers = [copy for (_, _, own), copy in pairs if id(own) in followed]
        self._tensors: list[Tensor] = [*self._weights, *(buffer for _, _, buffer in self._statistics)]
        self._see()
        self.accept_modes()
        self.accept()

    def accept_modes(self) -> None:
        """Take the modes of all modules as they are: a pass of the model itself may have changed them."""
        self._training = list(map(_modes, self._modules))

    @torch.inference_mode(False)
    @torch.no_grad()
    def accept(self) -> None:
        """Take weights and statistics as they are: the stream changed them."""
        self._versions = list(map(_version, self._tensors))
        self._numbers = [torch.cat(views) for views in self._views]
        if self._following:
            torch._foreach_copy_(self._followers, self._following)

    def check(self) -> None:
        """Refuse to go on with a model that somebody else changed. Running statistics are put back.

        Raises:
            StateError: the message says what changed, and how the stream can go on.
        """
        if list(map(_modes, self._modules)) != self._training:
            self._refuse_modes()
        if list(map(_learns, self._learning)) != self._flags:
            raise StateError(
                "requires_grad of weights that this stream adapts was changed after the last frame: set it back, with "
                f"requires_grad_({self._flags[0]}), to go on, or detach() the adapter first"
            )
        replaced = self._replacements()
        if replaced != self._replaced or list(map(_version, self._tensors)) != self._versions or not self._as_seen():
            self._look_closer()
            self._replaced = replaced

    def _refuse_modes(self) -> None:
        modes = zip(self._modules, self._training, strict=True)
        module, before = next((m, before) for m, before in modes if m.training != before)
        name, words = self._paths.get(id(module), ""), {True: "training", False: "evaluation"}
        raise StateError(
            f"{name or 'the model'} ({type(module).__name__}) is in {words[module.training]} mode, and was in "
            f"{words[before]} mode at the last frame: call model.{'train' if before else 'eval'}() to go on, or "
            "detach() the adapter before you train the model"
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _look_closer(self) -> None:
        """After a write or a replacement: put statistics back, and refuse other weights.

        Raises:
            StateError: precision, device or values of weights are others.
        """
        self.check_kinds()
        self.undo_rounding()
        present = {id(p) for module in self._modules for p in module._parameters.values()}
        if absent := [p for p in self._learning if id(p) not in present]:
            whose = "encoder" if id(absent[0]) in self._of_model else "branch"
            raise EncoderError(f"the {whose}'s parameters are not those that are adapted: {REPLACED}")
        replaced = self._count_replaced()
        self._put_statistics_back()
        self._see()
        adapted, others = self._count_changed()
        self._refuse_unadapted(others + replaced)
        if adapted:
            raise StateError(
                f"{adapted} of {len(self._weights)} weights were changed by somebody else after the last frame: load "
                "what they were to go on, or reset() to begin anew with the source weights, or detach() the adapter "
                "before you load other weights"
            )
        self.accept()

    @torch.inference_mode(False)
    @torch.no_grad()
    def check_unadapted(self) -> None:
        """Before the adapted weights are written anew: refuse changes of all others, which stay as they are.

        Raises:
            StateError: as for `check`; precision, device or values of weights are others.
        """
        self.check_kinds()
        self.undo_rounding()
        replaced = self._count_replaced()
        self._see()
        self._refuse_unadapted(self._count_changed()[1] + replaced)

    @torch.inference_mode(False)
    @torch.no_grad()
    def undo_rounding(self) -> None:
        """Put back what was rounded by a way to half precision and back, bit for bit, as far as it is that alone."""
        moved = [(p, held) for p, held in self._held if not p.is_meta and p.data_ptr() != held.data_ptr()]
        for p, held in moved:
            if _is_rounded(p, held):
                p.copy_(held)
        for module, name, held in self._buffers if moved else ():  # otherwise the model's own passes replace them
            now = module._buffers.get(name)
            if now is not None and now is not held and _is_rounded(now, held):
                module._buffers[name] = held

    def _count_replaced(self) -> int:
        """How many weights of a stream that adapts none were replaced by others, with other values.

        A stream that adapts weights goes on with a new head.
        """
        if self._learning:
            return 0
        present = {name: p for root in reversed(self._roots) for name, p in root.named_parameters()}
        there, count = {id(p) for root in self._roots for p in root.parameters()}, 0
        for i, (name, p) in enumerate(zip(self._names, self._weights, strict=True)):
            if id(p) in there:
                continue
            now = present.get(name)
            if now is None or now.device != p.device or now.is_meta or not same_values(now, p):
                count += 1
            else:
                self._weights[i] = now
        return count

    def _count_changed(self) -> tuple[int, int]:
        """How many weights have other values than at the last `accept`: of the adapted ones, and of the others."""
        adapted, others = 0, 0
        for before, views, learns in zip(self._numbers, self._views, self._adapted, strict=True):
            changed = _changed(torch.cat(views), before).tolist()
            adapted += sum(now and own for now, own in zip(changed, learns, strict=True))
            others += sum(now and not own for now, own in zip(changed, learns, strict=True))
        return adapted, others

    def _refuse_unadapted(self, changed: int) -> None:
        if changed:
            raise StateError(
                f"{changed} of the weights that this stream does not adapt were changed by somebody else: load what "
                "they were to go on, also to reset(), which writes the adapted weights only; or detach() the adapter "
                "and make a new one over the weights as they are"
            )

    def _put_statistics_back(self) -> None:
        """Undo writes to running statistics. Those that do not follow the video may be replaced by other tensors."""
        following = {id(buffer) for buffer in self._following}
        for i, (norm, name, own) in enumerate(self._statistics):
            now = norm._buffers.get(name)
            if now is None or now is own or id(own) in following or now.is_inference():
                norm._buffers[name] = own.copy_(self._copies[i])
            else:
                self._statistics[i], self._copies[i] = (norm, name, now), cloned(now)
        self._tensors = [*self._weights, *(buffer for _, _, buffer in self._statistics)]

    def check_kinds(self) -> None:
        """Refuse weights in another precision or on another device.

        Raises:
            StateError: they were converted or moved.
        """
        for name, p, (dtype, device) in zip(self._names, self._weights, self._kinds, strict=True):
            if (p.dtype, p.device) != (dtype, device):
                raise StateError(
                    f"{name} is {_kind(p.dtype, p.device)} now, and was {_kind(dtype, device)} when the adapter was "
                    f"made: convert the model back, with model.to({str(device)!r}, {dtype}), to go on, or detach() the "
                    "adapter and make a new one"
                )

    @torch.no_grad()
    def _as_seen(self) -> bool:
        """Whether numbers on the CPU are those of the last `accept`: PyTorch does not count writes to `p.data`."""
        pairs = zip(self._numbers, self._views, strict=True)
        return all(before.is_cuda or torch.equal(torch.cat(views), before) for before, views in pairs)

    @torch.no_grad()
    def _see(self) -> None:
        """Find one number of every weight in memory, by device and precision."""
        found: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, bool]]] = {}
        adapted = {id(p) for p in self._learning}
        for p in self._weights:
            if p.numel() and p.layout is torch.strided:
                place = p.storage_offset() + sum(s * (n // 2) for n, s in zip(p.shape, p.stride(), strict=True))
                view = torch.empty(0, dtype=p.dtype, device=p.device).set_(p.untyped_storage(), place, (1,), (1,))
                found.setdefault((p.device, p.dtype), []).append((view, id(p) in adapted))
        strided = (p for p in self._weights if p.layout is torch.strided and not p.is_meta)
        self._held = [(p, p.detach()) for p in strided if p.is_floating_point()]
        self._buffers = [
            (module, name, buffer)
            for module in self._modules
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        ]
        self._views = [[view for view, _ in group] for group in found.values()]
        self._adapted = [[learns for _, learns in group] for group in found.values()]


def _changed(now: Tensor, before: Tensor) -> Tensor:
    """Which numbers are others than before."""
    return ((now == before) | ((now != now) & (before != before))).logical_not()


def _is_rounded(now: Tensor, held: Tensor) -> bool:
    """Whether a tensor is another one, rounded to half precision, in the kind of the other."""
    if (now.shape, now.dtype, now.device) != (held.shape, held.dtype, held.device) or same_values(now, held):
        return False
    return any(same_values(now, held.to(dtype).to(held.dtype)) for dtype in HALF)


def _kind(dtype: torch.dtype, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} on {device}"
