"""Models and loops that are wrapped, moved, compiled or checkpointed: the promises hold for them too."""

from __future__ import annotations

import gc
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import models as zoo
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.errors import CheckpointError, ConfigError, EncoderError

SIZE = (32, 48)
CONFIG = StreamConfig(window=3, batch_size=2, lr=1e-2)


def clip(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(3, *SIZE, generator=generator) for _ in range(count)]


def model() -> nn.Module:
    torch.manual_seed(0)
    return zoo.PlainSeg().eval()


def adapter(m: nn.Module, **changes) -> StreamAdapter:
    torch.manual_seed(1)
    return StreamAdapter(m, encoder="backbone", config=CONFIG.replace(**changes.pop("config", {})), **changes)


def small_vit(**options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, depth=2, embed_dim=24, num_heads=3, num_classes=4, **options
    ).eval()


def state(m: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in m.state_dict().items()}


def test_predictions_under_an_outer_autocast_use_the_adapted_weights() -> None:
    frames = clip(3)
    with adapter(model()) as a, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for frame in frames:
            mine = a.step(frame)
        torch.clear_autocast_cache()
        assert torch.equal(mine, a.predict(frames[-1]))


def test_reset_restores_a_model_that_was_moved_after_it_was_attached() -> None:
    m = model()
    before = state(m)
    a = adapter(m)
    m.to(memory_format=torch.channels_last)
    a.step(clip(1)[0])
    assert any(not torch.equal(before[name], value) for name, value in m.state_dict().items())
    a.reset()
    assert all(torch.equal(before[name], value) for name, value in m.state_dict().items())


def test_weights_that_were_replaced_after_attaching_are_the_ones_that_adapt() -> None:
    m = model()
    branch = MAEBranch.attach(m, "backbone")
    m.load_state_dict(state(m), assign=True)
    for p in m.parameters():
        p.requires_grad_(True)
    before = state(m)
    with StreamAdapter(m, branch, config=CONFIG) as a:
        a.step(clip(1)[0])
        assert not torch.equal(before["backbone.0.weight"], m.state_dict()["backbone.0.weight"])


def test_weights_that_are_replaced_under_an_adapter_are_an_error_and_no_silent_success() -> None:
    m = model()
    a = adapter(m)
    m.load_state_dict(state(m), assign=True)
    with pytest.raises(EncoderError, match=r"StreamAdapter\(model, branch\)"):
        a.step(clip(1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("masking", ["tokens", "pixels"])
def test_a_compiled_model_is_masked_like_the_plain_one(masking: str) -> None:
    torch.manual_seed(0)
    plain = small_vit()
    torch.manual_seed(3)
    expected = MAEBranch.attach(plain, "norm", masking=masking, image_size=SIZE)
    m = small_vit()
    compiled = torch.compile(m, backend="eager")
    compiled(torch.randn(1, 3, *SIZE))  # a graph without hooks is there before the branch comes
    torch.manual_seed(3)
    branch = MAEBranch.attach(compiled, "norm", masking=masking, image_size=SIZE)
    assert "torch._dynamo" in sys.modules
    images = torch.randn(2, 3, *SIZE)
    mask = expected.draw_mask(images)
    torch.testing.assert_close(
        branch.reconstruct(images, mask=mask).prediction, expected.reconstruct(images, mask=mask).prediction
    )


def test_a_checkpointed_vit_adapts_and_keeps_its_flag() -> None:
    m = small_vit()
    m.set_grad_checkpointing(True)
    with StreamAdapter(m, encoder="norm", image_size=SIZE, config=CONFIG) as a:
        a.step(torch.randn(3, *SIZE))
        assert a.last is not None
        assert a.last.adapted
    assert m.grad_checkpointing is True


def test_masked_inputs_do_not_reach_batchnorm_through_a_recomputed_forward_pass() -> None:
    m = timm.create_model("resnet18", num_classes=3).train()
    m.set_grad_checkpointing(True)
    branch = MAEBranch.attach(m, "layer4", image_size=(64, 96))
    before = {name: b.clone() for name, b in m.named_buffers()}
    branch.loss(torch.randn(2, 3, 64, 96)).backward()
    assert all(torch.equal(before[name], b) for name, b in m.named_buffers())


def test_reset_makes_a_fresh_optimizer_with_its_groups_as_they_were() -> None:
    class Decaying(torch.optim.SGD):
        def step(self, closure=None):
            done = super().step(closure)
            for group in self.param_groups:
                group["lr"] *= 0.5
            return done

    frames = clip(4)
    with adapter(model(), optimizer=Decaying) as a:
        first = [a.step(frame) for frame in frames]
        a.reset()
        assert all(torch.equal(x, a.step(frame)) for x, frame in zip(first, frames, strict=True))


@pytest.mark.parametrize("broken", ["optimizer", "random"])
def test_a_state_that_fits_in_part_only_changes_nothing(broken: str) -> None:
    frames = clip(4)
    with adapter(model()) as a, adapter(model(), optimizer=torch.optim.SGD) as other:
        for frame in frames[:2]:
            a.step(frame)
            other.step(frame)
        good = a.state_dict()
        bad = {**a.state_dict(), "frame_index": 0}
        bad["optimizer"] = other.state_dict()["optimizer"] if broken == "optimizer" else bad["optimizer"]
        bad["random"] = bad["random"][:16] if broken == "random" else bad["random"]
        bad["weights"] = {name: value + 1 for name, value in bad["weights"].items()}
        with pytest.raises(CheckpointError, match="does not fit"):
            a.load_state_dict(bad)
        mine = [a.step(frame) for frame in frames[2:]]
        a.load_state_dict(good)
        assert all(torch.equal(x, a.step(frame)) for x, frame in zip(mine, frames[2:], strict=True))


def test_frames_that_are_skipped_without_memory_are_predicted_with_the_source_weights() -> None:
    frames = clip(2)
    plain = model()
    with adapter(model(), config={"window": 1, "carry_weights": False, "every": 2}) as a, torch.no_grad():
        a.step(frames[0])
        assert torch.equal(a.step(frames[1]), plain(frames[1][None]))


def test_an_adapter_that_is_lost_gives_the_model_back() -> None:
    m = model().train()
    before = state(m)
    a = adapter(m)
    a.step(clip(1)[0])
    del a
    gc.collect()
    assert m.training
    assert all(torch.equal(before[name], value) for name, value in m.state_dict().items())
    adapter(m).detach()


def test_the_order_of_the_two_losses_does_not_change_the_gradient_of_a_batchnorm_encoder() -> None:
    images = torch.randn(4, 3, *SIZE)
    gradients = []
    for branch_first in (True, False):
        torch.manual_seed(0)
        m = zoo.PlainSeg().double().train()
        branch = MAEBranch.attach(m, "backbone").double()
        torch.manual_seed(7)
        if branch_first:
            loss = branch.loss(images.double()) + m(images.double()).square().mean()
        else:
            main = m(images.double()).square().mean()
            for norm in branch.info.norms:  # the masked pass has to see the statistics of before the main pass
                norm.reset_running_stats()
            torch.manual_seed(7)
            loss = branch.loss(images.double()) + main
        loss.backward()
        gradients.append(m.backbone[0].weight.grad.clone())
    assert m.backbone[1].training
    torch.testing.assert_close(gradients[0], gradients[1])


def test_an_encoder_that_does_not_see_the_images_is_refused() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = zoo.PlainSeg()

        def forward(self, images):
            return self.inner(torch.ones_like(images))

    with pytest.raises(EncoderError, match="do not depend on the images"):
        MAEBranch.attach(Blind(), "inner.backbone")


def test_a_model_that_resizes_its_images_inside_is_refused_for_pixel_masking() -> None:
    class Resizing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = zoo.PlainSeg()

        def forward(self, images):
            return self.inner(F.interpolate(images, scale_factor=2.0))

    with pytest.raises(EncoderError, match="resizes its images"):
        MAEBranch.attach(Resizing(), "inner.backbone")


@pytest.mark.parametrize("kind", ["list", "sequence"])
def test_empty_places_in_lists_of_modules_are_no_obstacle(kind: str) -> None:
    class Net(zoo.PlainSeg):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList([None, nn.Conv2d(12, 12, 1), None])
            if kind == "sequence":
                self.steps = nn.Sequential(nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1))
                self.steps._modules["0"] = None

        def forward(self, x):
            x = self.backbone(x)
            for step in self.steps:
                x = x if step is None else step(x)
            return self.head(x)

    m, frames = Net().eval(), clip(2)
    for encoder in ("backbone", "steps"):
        with adapter(m) if encoder == "backbone" else StreamAdapter(m, encoder=encoder, config=CONFIG) as a:
            assert all(a.step(frame).isfinite().all() for frame in frames)
            assert a.last is not None
            assert a.last.adapted


def test_half_precision_losses_do_not_overflow() -> None:
    m = model().to(torch.bfloat16)
    branch = MAEBranch.attach(m, "backbone")
    loss = branch.loss(200 * torch.randn(8, 3, 64, 96, dtype=torch.bfloat16))
    assert loss.dtype is torch.float32
    assert loss.isfinite()


def test_naming_the_encoder_in_the_place_of_the_branch_says_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r"StreamAdapter\(model, encoder=\.\.\.\)"):
        StreamAdapter(model(), "backbone")
