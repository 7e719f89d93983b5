"""Activation checkpointing in the gradient step: which blocks, what they keep, and what is left alone."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import models as zoo
from conftest import left_as_it_was, same_bits, settle_norms
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.engine.recompute import blocks_to_repeat, recomputing
from ttt_adapt.errors import ConfigError
from ttt_adapt.objectives import PseudoLabel

CONFIG = StreamConfig(window=2, batch_size=4, lr=1e-3, seed=3)


PASSES: Counter[nn.Module] = Counter()
"""How often blocks ran; an attribute of a block would be put back after each pass."""


class Counted(nn.Module):
    """A residual block that counts its passes and recomputes by itself where it is told to."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)
        self.with_cp = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.work, x, use_reentrant=True) if self.with_cp else self.work(x)

    def work(self, x: Tensor) -> Tensor:
        PASSES[self] += 1
        return x + self.outer(self.inner(x).relu())


class Stack(nn.Module):
    """Patches, counted blocks, and a norm."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.blocks = nn.ModuleList(Counted() for _ in range(depth))
        self.norm = nn.LayerNorm(8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def passes(self) -> list[int]:
        found = [PASSES[block] for block in self.blocks]
        PASSES.clear()
        return found


@pytest.fixture
def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


def kept(module: nn.Module, images: Tensor) -> int:
    """Bytes that a pass keeps for its backward pass, beside the weights and the images."""
    weights = {p.data_ptr() for p in (*module.parameters(), images)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(images)
    return sum(found.values())


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (zoo.resnet, "BasicBlock"), (zoo.convnext, "ConvNeXtBlock"), (zoo.swin, "SwinTransformerBlock"),
        (zoo.vit, "Block"), (zoo.eva, "EvaBlock"), (Stack, "Counted"),
    ],
    ids=["resnet", "convnext", "swin", "vit", "eva", "own"],
)  # fmt: skip
def test_blocks_are_those_that_a_model_repeats_however_they_are_grouped(make, kind):
    model = make()
    expected = [m for m in model.modules() if type(m).__name__ == kind]
    assert len(expected) > 1
    assert set(blocks_to_repeat(model, model.parameters())) == set(expected)


def test_stages_that_are_no_lists_are_looked_into_too():
    model = zoo.timm_model("regnetx_002")
    stages = [stage for stage in model.children() if type(stage).__name__ == "RegStage"]
    expected = {block for stage in stages if len(list(stage.children())) > 1 for block in stage.children()}
    assert len(expected) > 8
    assert set(blocks_to_repeat(model, model.parameters())) == expected


def test_blocks_that_hold_nothing_adapted_are_left_out(stack):
    assert blocks_to_repeat(stack, stack.blocks[1].parameters()) == {stack.blocks[1]: list(stack.blocks[1].children())}
    with pytest.raises(ConfigError, match="the encoder of this Stack has no repeated blocks"):
        blocks_to_repeat(stack, stack.norm.parameters())


def test_only_the_inputs_of_blocks_are_kept_and_gradients_are_the_same_bits(stack):
    images, parameters = torch.randn(2, 3, 32, 32), list(stack.parameters())
    whole = kept(stack, images)
    expected = torch.autograd.grad(stack(images).square().sum(), parameters)
    stack.passes()
    with recomputing(blocks_to_repeat(stack, stack.parameters())):
        less = kept(stack, images)
        assert stack.passes() == [1, 1, 1]
        loss = stack(images).square().sum()
        found = torch.autograd.grad(loss, parameters)
    assert stack.passes() == [2, 2, 2]
    assert less < 0.3 * whole
    assert same_bits(list(found), list(expected))


def test_blocks_that_always_draw_draw_the_same_again(stack):
    for block in stack.blocks:
        block.inner.forward = lambda x, f=block.inner.forward: torch.dropout(f(x), 0.5, train=True)
    images, found = torch.randn(2, 3, 32, 32), []
    for blocks in ({}, blocks_to_repeat(stack, stack.parameters())):
        torch.manual_seed(1)
        with recomputing(blocks):
            found.append(torch.autograd.grad(stack(images).square().sum(), list(stack.parameters())))
    assert stack.passes() == [3, 3, 3]
    assert same_bits(*map(list, found))


def test_a_step_runs_every_block_again_and_a_prediction_does_not(stack):
    with StreamAdapter(stack, encoder="norm", config=CONFIG.replace(grad_checkpointing=True)) as adapter:
        stack.passes()
        adapter.adapt(torch.randn(3, 32, 32))
        assert stack.passes() == [2, 2, 2]
        adapter.predict(torch.randn(3, 32, 32))
        assert stack.passes() == [1, 1, 1]


def test_a_block_with_hooks_inside_runs_once_and_its_hooks_too(stack):
    calls = []
    stack.blocks[1].inner.register_forward_hook(lambda *_: calls.append(1))
    with StreamAdapter(stack, encoder="norm", config=CONFIG.replace(grad_checkpointing=True)) as adapter:
        stack.passes(), calls.clear()
        adapter.adapt(torch.randn(3, 32, 32))
    assert stack.passes() == [2, 1, 2]
    assert calls == [1]


def test_a_masked_stem_inside_of_a_block_meets_its_mask():
    model = settle_norms(zoo.UNet())
    stem = MAEBranch.attach(model, "encoder").info.stem
    assert any(stem in set(block.modules()) for block in blocks_to_repeat(model, model.parameters()))
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = CONFIG.replace(grad_checkpointing=checkpointing)
        with StreamAdapter(copy.deepcopy(model), encoder="encoder", config=config) as adapter:
            adapter.adapt(torch.randn(3, 32, 48))
            found.append(adapter.state_dict()["weights"])
    assert same_bits(*found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_of_the_models_own_is_off_in_the_gradient_step_and_on_after_it(stack, checkpointing):
    for block in stack.blocks:
        block.with_cp = True
    with StreamAdapter(stack, encoder="norm", config=CONFIG.replace(grad_checkpointing=checkpointing)) as adapter:
        stack.passes()
        adapter.adapt(torch.randn(3, 32, 32))
        assert stack.passes() == ([2, 2, 2] if checkpointing else [1, 1, 1])
        assert all(block.with_cp for block in stack.blocks)


def test_a_forward_that_recomputes_is_taken_off_the_block_and_put_back(stack):
    def wrapped(forward):  # as MMEngine does
        def recomputed(*args):
            return checkpoint(forward, *args, use_reentrant=True)

        recomputed.__wrapped__ = forward
        return recomputed

    for block in stack.blocks:
        block.forward = wrapped(block.forward)
    own = [block.forward for block in stack.blocks]
    with recomputing(blocks_to_repeat(stack, stack.parameters())):
        loss = stack(torch.randn(1, 3, 32, 32)).square().sum()
        torch.autograd.grad(loss, list(stack.parameters()))
    assert stack.passes() == [2, 2, 2]
    assert all(vars(block)["forward"] is forward for block, forward in zip(stack.blocks, own, strict=True))


class Dense(nn.Module):
    """Blocks that are given all features so far, in a list (or dict) that grows, as in a DenseNet."""

    def __init__(self, keyed: bool = False) -> None:
        super().__init__()
        self.keyed = keyed
        self.blocks = nn.ModuleList(DenseBlock(8 * (i + 1)) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = [x]
        state = {"found": found}
        for block in self.blocks:
            found.append(block(state=state) if self.keyed else block(found))
        return torch.cat(found, -1)


class DenseBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 8)

    def forward(self, found: list[Tensor] | None = None, state: dict[str, list[Tensor]] | None = None) -> Tensor:
        return self.inner(torch.cat(state["found"] if state else found, -1)).tanh()


@pytest.fixture
def checkpointed(monkeypatch) -> list[int]:
    """Has an entry for every block that was checkpointed."""
    found: list[int] = []

    def counting(*args, **kwargs):
        found.append(1)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr("ttt_adapt.engine.recompute.checkpoint", counting)
    return found


def gradients(model: nn.Module, x: Tensor, checkpointing: bool = True) -> list[Tensor]:
    with recomputing(blocks_to_repeat(model, model.parameters()) if checkpointing else {}):
        return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


@pytest.mark.parametrize("keyed", [False, True])
def test_a_block_runs_again_on_what_its_lists_and_dicts_held_then(keyed, checkpointed):
    torch.manual_seed(0)
    model, x = Dense(keyed), torch.randn(4, 8)
    plain = gradients(model, x, checkpointing=False)
    assert not checkpointed
    assert same_bits(gradients(model, x), plain)
    assert len(checkpointed) == 3


def test_a_block_that_is_given_what_may_change_runs_once(stack):
    class Box:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    for block in stack.blocks:
        block.forward = lambda box, f=block.forward: f(box.x)
    with recomputing(blocks_to_repeat(stack, stack.parameters())):
        x = torch.randn(2, 3, 8)
        loss = sum(block(Box(x)).sum() for block in stack.blocks)
        torch.autograd.grad(loss, list(stack.blocks.parameters()))
    assert stack.passes() == [1, 1, 1]


class InPlace(nn.Module):
    """Blocks that begin in place, as in pix2pix."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.stages = nn.Sequential(
            *(nn.Sequential(nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(8, 8, 1)) for _ in range(2))
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(self.stem(images))


def test_blocks_that_change_what_they_are_given_are_refused_and_the_stream_stays_whole():
    model = InPlace()
    adapter = StreamAdapter(model, encoder="stages", config=CONFIG.replace(grad_checkpointing=True))
    with left_as_it_was(model), pytest.raises(ConfigError, match="changes its input in place.*micro_batch"):
        adapter.adapt(torch.randn(3, 32, 32))
    adapter.detach()
    with StreamAdapter(model, encoder="stages", config=CONFIG) as plain:
        plain.adapt(torch.randn(3, 32, 32))  # as it is, it learns


@pytest.mark.parametrize("kind", ["positional", "keyword", "in a tuple"])
def test_a_model_that_changes_a_blocks_input_afterwards_is_refused(stack, kind):
    block, x = stack.blocks[0], torch.randn(1, 3, 8)
    # the product keeps no x, so that without checkpointing nothing is wrong
    block.forward = lambda x, f=block.forward: f(0.5 * (x if isinstance(x, Tensor) else x[0]))

    def run(blocks: dict[nn.Module, list[nn.Module]]) -> None:
        with recomputing(blocks):
            y = block(x=x) if kind == "keyword" else block((x, 1) if kind == "in a tuple" else x)
            x.add_(1.0)
            torch.autograd.grad(y.sum(), list(block.parameters()))

    run({})
    with pytest.raises(ConfigError, match="or the model changes that input afterwards"):
        run(blocks_to_repeat(stack, stack.parameters()))


@pytest.mark.parametrize("what", ["weights", "mode", "values"])
def test_an_objective_that_changes_the_model_only_while_it_is_taken_is_refused(stack, what):
    def loss() -> Tensor:
        images = torch.randn(1, 3, 16, 16)
        if what == "weights":
            other = {name: 2 * p for name, p in stack.named_parameters()}
            return torch.func.functional_call(stack, other, (images,)).sum()
        stack.train(what == "mode")
        found = stack(images).sum()
        stack.eval()
        if what == "values":
            with torch.no_grad():
                stack.blocks[1].inner.bias.add_(1.0)
        return found

    def run() -> None:
        with recomputing(blocks_to_repeat(stack, stack.parameters())):
            torch.autograd.grad(loss(), list(stack.parameters()))

    with pytest.raises(ConfigError, match="other weights or another mode only while it takes its loss"):
        run()


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"}, {"gate": "surprise"}, {"window": "auto"}, {"iterations": 2},
        {"every": 2}, {"drop_path": True, "micro_batch": 1}, {"crop_size": (16, 32)},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("make", [MAEBranch.attach, PseudoLabel], ids=["reconstruction", "pseudo-labels"])
def test_every_setting_gives_the_same_bits(make, changes, checkpointed):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = settle_norms(zoo.vit(drop_path_rate=0.2))
        objective = make(model, "norm") if make == MAEBranch.attach else make(model, threshold=0.0)
        config = CONFIG.replace(**{**changes, "grad_checkpointing": checkpointing})
        torch.manual_seed(1)
        with StreamAdapter(model, objective, config=config) as adapter:
            outputs = [
                adapter.step(torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(i))) for i in range(4)
            ]
            found.append([*outputs, *adapter.state_dict()["weights"].values()])
        assert bool(checkpointed) == checkpointing
    assert same_bits(*found)


def test_an_error_while_blocks_run_again_leaves_the_model_as_it_was(stack):
    def fail() -> None:
        with recomputing(blocks_to_repeat(stack, stack.parameters())):
            loss = stack(torch.randn(1, 3, 32, 32)).sum()
            stack.blocks[1].work = None
            try:
                torch.autograd.grad(loss, list(stack.parameters()))
            finally:
                del stack.blocks[1].work

    with left_as_it_was(stack), pytest.raises(TypeError, match="not callable"):
        fail()


def test_an_error_after_the_blocks_leaves_the_model_as_it_was(stack):
    def fail() -> None:
        with recomputing(blocks_to_repeat(stack, stack.parameters())):
            stack(torch.randn(1, 3, 32, 32))
            raise ZeroDivisionError

    with left_as_it_was(stack), pytest.raises(ZeroDivisionError):
        fail()
