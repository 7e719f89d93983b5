"""GradientStep: what a step differentiates, by which weights, and how the model is prepared for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ttt_adapt.config import StreamConfig, adapted_part
from ttt_adapt.engine.precision import HalfWeights
from ttt_adapt.engine.recompute import blocks_to_repeat
from ttt_adapt.errors import ConfigError, EncoderError
from ttt_adapt.model.adapted_part import part_of_encoder
from ttt_adapt.model.dropout import drop_layers, dropping
from ttt_adapt.model.low_rank import LowRank
from ttt_adapt.model.outside_changes import REPLACED
from ttt_adapt.model.pass_state import PassState
from ttt_adapt.model.replaced import ReplacementCounter
from ttt_adapt.objectives.base import Attached, Objective, StatefulObjective
from ttt_adapt.objectives.forward_only import ForwardOnly
from ttt_adapt.stream.adapted_weights import named_weights

PATIENCE = 8
"""After this many steps in a row that find a tensor replaced, compiled and recording engines refuse the model."""


class GradientStep:
    """The loss of an objective, and the parameters that a step changes.

    Attributes:
        objective: whose loss.
        encoder: name -> parameter inside of the user's model that the loss adapts, see `not_frozen` and
            `part_of_encoder`.
        own: name -> parameter of the objective's own that learns. A weight that both share is the encoder's.
        trained: name -> what the optimizer changes in the place of `encoder`: these parameters, or their factors.
        parameters: what gets gradients, that of `trained` first: these parameters, or float32 copies of those in half
            precision. A parameter that the loss does not reach gets no gradient.
        differentiated: what a backward pass is asked for, in the place of `parameters`.
        half: the copies.
        low_rank: the factors; None where none were asked for.
        adapted: the parameters of model and objective that a step changes, the encoder's first.
        config: the stream's settings.
        device: where it runs.
        dtype: of the images that the model takes.
        blocks: modules that run again in the backward pass -> the modules in each; none without `grad_checkpointing`.
        pass_state: what the model's passes change in it beside its parameters; gradient passes leave it alone.
        remembers: whether the objective changes something of its own after a step that was taken.
        version: changes when tensors of the model or of the objective were replaced by others.

    Args:
        objective: whose loss.
        config: the stream's settings.

    Raises:
        ConfigError: an objective that adapts nothing, a part to adapt that the encoder has not, or `grad_checkpointing`
            without blocks to run again.
    """

    def __init__(self, objective: Objective, config: StreamConfig) -> None:
        self.objective, self.config = objective, config
        if isinstance(objective, Attached):
            objective.follow_model()
        kind, number = adapted_part(config.adapt)
        learning = not_frozen(objective.encoder_parameters(), objective.model)
        self.encoder = encoder = part_of_encoder(learning, objective.model, kind, number)
        if not encoder and not isinstance(objective, ForwardOnly):
            raise ConfigError("the branch names no encoder parameters: there is nothing to adapt")
        inside = {id(p) for p in encoder.values()}
        named = objective.named_parameters() if kind == "all" else iter(())
        own = {n: p for n, p in named if p.requires_grad and id(p) not in inside}
        self.own, self.adapted = own, [*encoder.values(), *own.values()]
        known = (*self.adapted, *objective.model.parameters())
        like = next((p for p in known if p.is_floating_point()), None)
        if like is None:
            raise ConfigError(f"{type(objective.model).__name__} has no parameters: there is nothing to adapt")
        self.device, self.dtype = like.device, like.dtype
        self.pass_state: PassState = getattr(objective, "pass_state", None) or PassState(objective.model)
        self._frozen = [p for p in encoder.values() if not p.requires_grad]
        self._drops = drop_layers(objective.model) if config.drop_path else []
        roots = [m for m in (objective.model, objective) if isinstance(m, nn.Module)]
        self.low_rank = LowRank(encoder, number, config.seed) if kind == "lora" else None
        self.trained = encoder if self.low_rank is None else self.low_rank.factors
        self.half = HalfWeights(roots, named_weights(self.trained, own))
        self.parameters = [self.half.trained(p) for p in (*self.trained.values(), *own.values())]
        self.differentiated = self.parameters if self.low_rank is None else self.adapted
        self._resting = [] if kind == "all" else others_learning(roots, self.adapted)
        self.blocks = blocks_to_repeat(objective.model, self.adapted) if config.grad_checkpointing else {}
        stateful = isinstance(objective, StatefulObjective)
        self.remembers = stateful and bool(objective.memory())  # type: ignore[attr-defined]
        self._objective_after: Callable[[], None] = objective.after_step if stateful else _nothing  # type: ignore[attr-defined]
        self._replaced = ReplacementCounter(*roots)
        self.version, self._changes = -1, 0

    def check_parameters(self) -> None:
        """Refuse a model whose weights are no longer those that a step changes.

        The objective is asked for its parameters only after something was replaced.

        Raises:
            EncoderError: other parameters stand in their place.
        """
        version = self.replacements()
        if version == self.version:
            self._changes = 0
            return
        self._changes += 1
        now, count = self.objective.encoder_parameters(), len(self.encoder)
        if any(now.get(name) is not p for name, p in self.encoder.items()):
            raise EncoderError(f"the encoder's parameters are not those that are adapted: {REPLACED}")
        own = self.adapted[count:]
        if own and not {id(p) for p in own} <= {id(p) for _, p in self.objective.named_parameters()}:
            raise EncoderError(f"the branch's parameters are not those that are adapted: {REPLACED}")
        self.version = version

    def replacements(self) -> int:
        """How often tensors or modules were found replaced; it grows if some were replaced since the last call."""
        return self._replaced.count()

    def check_steady(self, engine: str) -> None:
        """Refuse a model that an engine cannot follow which writes a pass down once.

        Raises:
            ConfigError: the model replaces tensors of its own again and again.
        """
        if self._changes > PATIENCE:
            name = self._replaced.last_replaced
            raise ConfigError(
                f"the model puts another tensor in the place of its {name!r} at every frame, which engine={engine!r} "
                'cannot follow: use engine="eager"'
            )

    @contextmanager
    def learning(self, number: int) -> Iterator[None]:
        """Inside the block the encoder's parameters learn, and layers of dropout drop, if the configuration says so.

        Args:
            number: of the gradient step, from the beginning of the video; with the seed it decides what is dropped.
        """
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for parameter in self._resting:  # a pass keeps nothing for gradients that nobody asks for
            parameter.requires_grad_(False)
        try:
            with dropping(self._drops, (self.config.seed + number * 0x9E3779B97F4A7C15) % 2**64, self.device):
                yield
        finally:
            for parameter in self._frozen:
                parameter.requires_grad_(False)
            for parameter in self._resting:
                parameter.requires_grad_(True)

    @contextmanager
    def in_pass(self) -> Iterator[None]:
        """Around a gradient pass: its precision, and what the model's passes change in it stays as it is."""
        with self.pass_state.kept(), self.half.in_pass():
            yield

    def of_parameters(self, found: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients of `parameters`, from those of `differentiated`."""
        return found if self.low_rank is None else self.low_rank.gradients(found)

    def after_step(self) -> None:
        """What follows a step that was taken: weights that follow from others, and what the objective remembers."""
        self.half.round()
        if self.low_rank is not None:
            self.low_rank.derive()
        self._objective_after()

    def forget_gradients(self) -> None:
        """Free the memory of the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


def others_learning(roots: Iterable[nn.Module], adapted: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters of some modules that require gradients and are not adapted."""
    own = {id(p) for p in adapted}
    found = {id(p): p for root in roots for p in root.parameters() if p.requires_grad and not p.is_inference()}
    return [p for key, p in found.items() if key not in own]


def not_frozen(encoder: Mapping[str, nn.Parameter], model: nn.Module) -> dict[str, nn.Parameter]:
    """The encoder's parameters that may be adapted: in a model that is partly frozen, those that are not.

    A wholly frozen model is one that is ready for predictions, and is adapted.

    Args:
        encoder: name -> parameter.
        model: with all of its parameters.

    Raises:
        ConfigError: in a partly frozen model, the whole encoder is frozen.
    """
    if not any(p.requires_grad for p in model.parameters()):
        return dict(encoder)
    learning = {name: p for name, p in encoder.items() if p.requires_grad}
    if encoder and not learning:
        raise ConfigError(
            f"all {len(encoder)} parameters of the encoder are frozen (requires_grad is False) and others of the model "
            "are not, so nothing may be adapted: call requires_grad_(True) on what may be, or on nothing of the model, "
            "model.requires_grad_(False): a model that is frozen as a whole is adapted"
        )
    return learning


def _nothing() -> None:
    """For objectives that change nothing after a step."""
