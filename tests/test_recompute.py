"""Activation checkpointing in the gradient step: which blocks, what they keep, and what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import models as zoo
from conftest import left_as_it_was, same_bits, settle_norms
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.engine.recompute import recomputing, repeated_blocks
from ttt_adapt.errors import ConfigError

CONFIG = StreamConfig(window=2, batch_size=4, lr=1e-3, seed=3)


class Counted(nn.Module):
    """A residual block that counts its passes and recomputes by itself where it is told to."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)
        self.with_cp = False
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.work, x, use_reentrant=True) if self.with_cp else self.work(x)

    def work(self, x: Tensor) -> Tensor:
        self.passes += 1
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
        found = [block.passes for block in self.blocks]
        for block in self.blocks:
            block.passes = 0
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
    assert set(repeated_blocks(model, model.parameters())) == set(expected)


def test_stages_that_are_no_lists_are_looked_into_too():
    model = zoo.timm_model("regnetx_002")
    stages = [stage for stage in model.children() if type(stage).__name__ == "RegStage"]
    expected = {block for stage in stages if len(list(stage.children())) > 1 for block in stage.children()}
    assert len(expected) > 8
    assert set(repeated_blocks(model, model.parameters())) == expected


def test_blocks_that_hold_nothing_adapted_are_left_out(stack):
    assert repeated_blocks(stack, stack.blocks[1].parameters()) == {stack.blocks[1]: list(stack.blocks[1].children())}
    with pytest.raises(ConfigError, match="the encoder of this Stack has no repeated blocks"):
        repeated_blocks(stack, stack.norm.parameters())


def test_only_the_inputs_of_blocks_are_kept_and_gradients_are_the_same_bits(stack):
    images, parameters = torch.randn(2, 3, 32, 32), list(stack.parameters())
    whole = kept(stack, images)
    expected = torch.autograd.grad(stack(images).square().sum(), parameters)
    stack.passes()
    with recomputing(repeated_blocks(stack, stack.parameters())):
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
    for blocks in ({}, repeated_blocks(stack, stack.parameters())):
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
    assert any(stem in set(block.modules()) for block in repeated_blocks(model, model.parameters()))
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
    with recomputing(repeated_blocks(stack, stack.parameters())):
        loss = stack(torch.randn(1, 3, 32, 32)).square().sum()
        torch.autograd.grad(loss, list(stack.parameters()))
    assert stack.passes() == [2, 2, 2]
    assert all(vars(block)["forward"] is forward for block, forward in zip(stack.blocks, own, strict=True))


def test_an_error_in_the_block_leaves_the_model_as_it_was(stack):
    def fail() -> None:
        with recomputing(repeated_blocks(stack, stack.parameters())):
            stack(torch.randn(1, 3, 32, 32))
            raise ZeroDivisionError

    with left_as_it_was(stack), pytest.raises(ZeroDivisionError):
        fail()
