"""Which of an encoder's parameters a stream adapts: all, or a part that costs less memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from ttt_adapt.errors import ConfigError
from ttt_adapt.model.blocks import repeated_blocks
from ttt_adapt.model.norms import is_norm


def part_of_encoder(
    encoder: Mapping[str, nn.Parameter], model: nn.Module, kind: str, number: int = 0
) -> dict[str, nn.Parameter]:
    """The parameters that `StreamConfig.adapt` names.

    Args:
        encoder: name -> parameter of the encoder.
        model: whose parameters these are.
        kind: "all", "norms", "bias", "last" or "lora".
        number: of blocks, with "last".

    Returns:
        Name -> parameter, in the order of `encoder`.

    Raises:
        ConfigError: there is no such parameter.
    """
    if kind == "all" or not encoder:
        return dict(encoder)
    if kind == "bias":
        chosen = {id(p) for name, p in encoder.items() if name.endswith("bias")}
        what = "biases"
    elif kind == "norms":
        chosen = {id(p) for module in model.modules() for p in _of_norm(module)}
        what = "layers that normalise with weights of their own"
    elif kind == "lora":
        chosen = {id(p) for module in model.modules() for p in _matrices(module)}
        what = "linear layers and no 1x1 convolutions"
    else:
        chosen = _of_last_blocks(encoder, model, number)
        what = "such blocks"
    found = {name: p for name, p in encoder.items() if id(p) in chosen}
    if not found:
        raise ConfigError(f'adapt names a part that this encoder has not: it has no {what}. adapt="all" always works')
    return found


def _of_norm(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a layer that normalises; none of other layers."""
    if is_norm(module) or "norm" in type(module).__name__.lower():
        yield from (p for p in module._parameters.values() if p is not None)


def _matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of a layer that are matrices: of linear layers, attention, and 1x1 convolutions."""
    pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    attention = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    names = attention if isinstance(module, nn.MultiheadAttention) else ["weight"]
    if pointwise or isinstance(module, nn.Linear | nn.MultiheadAttention):
        found = (module._parameters.get(name) for name in names)
        yield from (p for p in found if p is not None)


def _of_last_blocks(encoder: Mapping[str, nn.Parameter], model: nn.Module, number: int) -> set[int]:
    """The ids of the parameters of the last blocks, and of the layers that normalise behind them.

    Raises:
        ConfigError: the encoder has fewer blocks.
    """
    own = {id(p) for p in encoder.values()}
    blocks = [*repeated_blocks(model, lambda block: any(id(p) in own for p in block.parameters()))]
    if number > len(blocks):
        raise ConfigError(
            f"adapt is 'last:{number}', and this encoder repeats {len(blocks)} blocks: expected "
            + (f"last:1 to last:{len(blocks)}" if blocks else 'another part, such as adapt="norms"')
        )
    order = {id(module): i for i, module in enumerate(model.modules())}
    inside = {id(module) for block in blocks for module in block.modules()}
    end = max(order[id(module)] for module in blocks[-1].modules())
    behind = [m for m in model.modules() if id(m) not in inside and order[id(m)] > end]
    chosen = [p for block in blocks[-number:] for p in block.parameters()]
    return {id(p) for p in [*chosen, *(p for module in behind for p in _of_norm(module))]}
