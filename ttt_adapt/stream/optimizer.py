"""The optimizer of a stream: its parameter groups, where the encoder's learning rate is applied, and AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import CheckpointError
from ttt_adapt.model.parameters import split_by_decay
from ttt_adapt.schema import check_fields, text
from ttt_adapt.stream.check_optimizer import check_optimizer_state
from ttt_adapt.stream.source import copied
from ttt_adapt.stream.state_part import Part, nothing

ParamGroups = list[dict[str, Any]]


def parameter_groups(
    encoder: Mapping[str, nn.Parameter],
    own: Mapping[str, nn.Parameter],
    modules: Iterable[nn.Module],
    config: StreamConfig,
    trained: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
) -> ParamGroups:
    """Encoder and decoder, each with and without weight decay.

    Args:
        encoder: name -> parameter of the model that is adapted, at `lr * encoder_lr_scale`.
        own: name -> parameter of the branch, at `lr`.
        modules: where the parameters live, the user's model and the branch: embedding tables are not decayed.
        config: learning rates and weight decay.
        trained: parameter -> what the optimizer changes in its place.

    Returns:
        Groups with `name`, `params`, `lr` and `weight_decay`; empty ones are left out. Where nothing is adapted there
        is one empty group, because optimizers refuse to have none.
    """
    modules, groups = list(modules), ParamGroups()
    for part, named, lr in (("encoder", encoder, config.lr * config.encoder_lr_scale), ("decoder", own, config.lr)):
        with_decay, without = split_by_decay(named.items(), modules)
        for name, members, decay in (
            (part, with_decay, config.weight_decay),
            (f"{part}_no_decay", without, 0.0),
        ):
            if members:
                chosen = [trained(member) for member in members]
                groups.append({"name": name, "params": chosen, "lr": lr, "weight_decay": decay})
    return groups or [{"name": "nothing", "params": [], "lr": config.lr, "weight_decay": 0.0}]


class FusedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)` that prepares its lists of tensors once: a step is one fused call per group.

    Results and `state_dict()` are those of its base class, bit for bit. A fused step reads the memory of a parameter,
    of its gradient and of its moments in the same order, so a gradient must have the memory layout of its parameter
    (see `laid_out_alike`). `.backward()` gives it that layout, `torch.autograd.grad` may not. The optimizer supports
    CUDA graphs and `found_inf`, the flag on the device with which `torch.amp.GradScaler` leaves a step out.
    """

    def __init__(self, groups: ParamGroups) -> None:
        super().__init__(groups, fused=True)
        self._ready: list[tuple[dict[str, Any], list[Tensor], list[list[Tensor]]]] = []
        self._idle: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step on the gradients in `.grad`; parameters without one are left alone."""
        if closure is not None or not self._is_ready():
            loss = super().step(closure)
            self._prepare()
            return loss
        skip = getattr(self, "found_inf", None)
        for group, members, lists in self._ready:
            first, second, steps = lists or self._begin(members, lists)
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                members,
                [p.grad for p in members],  # type: ignore[misc]  # none is None: see `_is_ready`
                first,
                second,
                [],
                steps,
                amsgrad=False,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                grad_scale=None,
                found_inf=skip,
            )
            if skip is not None:
                torch._foreach_sub_(steps, [skip] * len(steps))
        return None

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the moments, as before the first step.

        Their memory, twice that of the parameters, is free until the next step.
        """
        self.state.clear()
        for _, _, lists in self._ready:
            lists.clear()

    def load_state_dict(self, state_dict: Any) -> None:
        """As in the base class, also from an AdamW that is not fused.

        Raises:
            ValueError: the state is of AMSGrad, or of an optimizer that maximizes.
        """
        if any(group.get("amsgrad") or group.get("maximize") for group in state_dict["param_groups"]):
            raise ValueError("the optimizer's state has amsgrad or maximize set; expected neither")
        fused = [{**group, "fused": True, "foreach": None} for group in state_dict["param_groups"]]
        self._ready = []
        super().load_state_dict({**state_dict, "param_groups": fused})
        if self.state:
            self._prepare()

    def _is_ready(self) -> bool:
        """Whether the gradients are those of the parameters that the lists hold."""
        if not self._ready:
            return False
        complete = all(p.grad is not None for _, members, _ in self._ready for p in members)
        return complete and all(p.grad is None for p in self._idle)

    def _begin(self, members: list[Tensor], lists: list[list[Tensor]]) -> list[list[Tensor]]:
        """Fill the lists of members that were restarted: a state of zeros."""
        lists += [[torch.zeros_like(p) for p in members] for _ in range(2)]
        lists.append(list(torch.zeros(len(members), device=members[0].device).unbind()))
        for p, first, second, step in zip(members, *lists, strict=True):
            self.state[p] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        return lists

    def _prepare(self) -> None:
        """The lists of each group and dtype: members with a state, their two moments and step counts."""
        self._ready, self._idle = [], []
        names = ("exp_avg", "exp_avg_sq", "step")
        for group in self.param_groups:
            self._idle += [p for p in group["params"] if p not in self.state]
            stepped = [p for p in group["params"] if p in self.state]
            for p in stepped:
                self.state[p] |= {name: laid_out(self.state[p][name], p) for name in names[:2]}
            for dtype in dict.fromkeys(p.dtype for p in stepped):  # a fused call takes one
                members = [p for p in stepped if p.dtype == dtype]
                self._ready.append((group, members, [[self.state[p][name] for p in members] for name in names]))


def adamw(groups: ParamGroups) -> torch.optim.Optimizer:
    """AdamW in its fused form, which wants parameters without gaps; the groups carry rates and weight decay."""
    dense = all(laid_out_alike(torch.empty_like(p), p) for group in groups for p in group["params"])
    return FusedAdamW(groups) if dense else torch.optim.AdamW(groups)


def laid_out_alike(a: Tensor, b: Tensor) -> bool:
    """Whether the elements of two tensors of one shape follow each other in memory in the same order."""
    if a.stride() == b.stride():
        return True
    return all(n == 1 or i == j for n, i, j in zip(a.shape, a.stride(), b.stride(), strict=True))


def laid_out(values: Tensor, like: Tensor) -> Tensor:
    """`values` in the memory order of `like`: themselves, or a copy."""
    return values if laid_out_alike(values, like) else torch.empty_like(like, requires_grad=False).copy_(values)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a scalar on their device."""
    norms = torch._foreach_norm(list(gradients))
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]))


class StreamOptimizer(Part):
    """The optimizer of one video.

    Args:
        make: makes a fresh optimizer of the adapted parameters.
    """

    def __init__(self, make: Callable[[], torch.optim.Optimizer]) -> None:
        self._make = torch.inference_mode(False)(make)
        self._use(self._make())

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself; `reset` and a load put a new one in its place."""
        return self._optimizer

    def restart(self) -> None:
        """Make it as new without building another: no state, and the groups' settings as they were made."""
        if isinstance(self._optimizer, FusedAdamW):
            self._optimizer.restart()
        else:
            self._optimizer.state.clear()
        self.restore_settings()

    def restore_settings(self) -> None:
        """Give the groups the settings that they were made with, such as a learning rate that a user changed."""
        for group, fresh in zip(self._optimizer.param_groups, self._fresh, strict=True):
            group.update(copied(fresh))

    def reset(self) -> None:
        """See `Part`."""
        self._use(self._make())

    def renew(self) -> None:
        """Put a new one in its place that has the settings of this one, such as a learning rate that a user changed."""
        settings = [_settings(group) for group in self._optimizer.param_groups]
        self._use(self._make())
        for group, own in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(own)

    def state_dict(self) -> dict[str, Any]:
        """The kind of optimizer, and a copy of its state."""
        return {"kind": type(self._optimizer).__name__, "state": copied(self._optimizer.state_dict())}

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """See `Part`; a new optimizer takes the saved state, so that one that does not fit changes nothing."""
        check_fields(saved, {"kind": text, "state": lambda _state: ""}, "the state's optimizer")
        try:
            with torch.inference_mode(False):
                optimizer = self._make()
                fresh = [_settings(group) for group in optimizer.param_groups]
                kinds = [type(optimizer).__name__] + ["AdamW"] * isinstance(optimizer, FusedAdamW)
                if saved["kind"] not in kinds:
                    raise ValueError(f"the optimizer was {saved['kind']}, here it is {kinds[0]}")
                check_optimizer_state(optimizer, saved["state"], self._optimizer.param_groups)
                optimizer.load_state_dict(copied(dict(saved["state"])))
        except CheckpointError:
            raise
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the state's optimizer does not fit this adapter ({error}): go on with the same optimizer"
            ) from error
        return lambda: self._use(optimizer, fresh)

    def free(self) -> None:
        """See `Part`."""
        self.restart()

    def mark(self) -> Callable[[], None]:
        """See `Part`; the optimizer stays as the last finished gradient step left it, like the weights."""
        return nothing

    def _use(self, optimizer: torch.optim.Optimizer, fresh: list[dict[str, Any]] | None = None) -> None:
        """Put an optimizer in place.

        Args:
            optimizer: which.
            fresh: the settings of its groups when it was made; None: it is as it was made.
        """
        self._optimizer = optimizer
        self._fresh = [_settings(group) for group in optimizer.param_groups] if fresh is None else fresh


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of what a group says beside its parameters."""
    return {name: copied(value) for name, value in group.items() if name != "params"}


def decides_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer leaves a step out by a flag on the device (`found_inf`), as fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def step_if(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """`optimizer.step()` where `finite`, a bool scalar on the device, is true; nothing waits for it."""
    optimizer.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
