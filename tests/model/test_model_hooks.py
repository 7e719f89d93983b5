from __future__ import annotations

from functools import wraps

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import models as zoo
from conftest import hooks_of, left_as_it_was, same_bits, settle_norms
from ttt_adapt import MAEBranch
from ttt_adapt.errors import EncoderError
from ttt_adapt.model.encoder import inspect_encoder
from ttt_adapt.model.hooks import (
    hidden_channel,
    hooks,
    run_encoder,
    visible_tokens,
    without_checkpointing,
)
from ttt_adapt.objectives.masking import random_mask, upsample_mask

# ---- the run to the end of the encoder


def test_the_encoder_runs_from_the_models_input_and_nothing_behind_it_runs():
    model = settle_norms(zoo.resnet())
    ran = []
    model.fc.register_forward_hook(lambda *_: ran.append("fc"))
    x = torch.randn(2, 3, 64, 96)
    features = run_encoder(model, model.layer4, x)
    assert torch.equal(features, model.forward_features(x))
    assert ran == []


def test_an_except_exception_in_the_model_does_not_swallow_the_features():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            try:
                return self.body(x).mean()
            except Exception:
                return None

    model = Careful()
    assert run_encoder(model, model.body, torch.zeros(1, 3, 4, 4)).shape == (1, 4, 4, 4)


def test_a_module_that_is_never_called_is_an_error_and_no_hook_stays():
    model = zoo.PlainSeg()
    model.spare = nn.Conv2d(3, 4, 1)
    with pytest.raises(EncoderError, match="Conv2d.*never reached"):
        run_encoder(model, model.spare, torch.zeros(1, 3, 8, 8))
    assert hooks_of(model) == 0


def test_hooks_that_cannot_all_be_set_leave_none():
    model = zoo.TinySeg()

    def handles():
        yield model.backbone.register_forward_hook(lambda *_: None)
        raise ZeroDivisionError

    with left_as_it_was(model), pytest.raises(ZeroDivisionError), hooks(handles()):
        pass


def test_an_error_inside_the_model_comes_through_and_no_hook_stays():
    model = zoo.PlainSeg()
    with pytest.raises(RuntimeError):
        run_encoder(model, model.backbone, torch.zeros(1, 5, 8, 8))
    assert hooks_of(model) == 0


# ---- the mask channel


@pytest.mark.parametrize(
    ("make", "stem"), [(zoo.resnet, "conv1"), (zoo.convnext, "stem.0"), (zoo.UNet, "encoder.down.0.0")]
)
def test_the_mask_channel_equals_a_fourth_channel_of_the_stem(make, stem):
    model = settle_norms(make())
    path = {"conv1": "layer4", "stem.0": "stages", "encoder.down.0.0": "encoder"}[stem]
    branch = MAEBranch.attach(model, path)
    nn.init.normal_(branch.mask_channel.weight)
    images, mask = torch.randn(2, 3, 64, 96), random_mask(2, (4, 6), 0.8)
    visible = upsample_mask(mask, 16).float()

    three = model.get_submodule(stem)
    four = nn.Conv2d(4, three.out_channels, three.kernel_size, three.stride, three.padding, bias=three.bias is not None)
    with torch.no_grad():
        four.weight.copy_(torch.cat([three.weight, branch.mask_channel.weight], dim=1))
        if three.bias is not None:
            four.bias.copy_(three.bias)
        expected = four(torch.cat([images * visible, 1 - visible], dim=1))
        with hidden_channel(three, branch.mask_channel, 1 - visible):
            seen = run_encoder(model, three, images * visible)
            torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
        assert (expected - three(images * visible)).abs().max() > 0.1  # the channel does something


def test_with_nothing_hidden_the_mask_channel_changes_no_bit_however_it_was_trained():
    model = settle_norms(zoo.UNet())
    branch = MAEBranch.attach(model, "encoder")
    nn.init.normal_(branch.mask_channel.weight)
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        plain = model(x)
        with hidden_channel(branch.info.stem, branch.mask_channel, torch.zeros(1, 1, 32, 48)):
            assert torch.equal(model(x), plain)


def test_the_mask_channel_follows_tensorflow_padding():
    model = zoo.timm_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2))
    branch = MAEBranch.attach(model, model)
    assert type(branch.info.stem).__name__ == "Conv2dSame"
    for size in ((32, 48), (33, 47)):
        assert branch.mask_channel(torch.zeros(1, 1, *size)).shape == branch.info.stem(torch.zeros(1, 3, *size)).shape


def test_a_stem_that_sees_another_size_than_the_mask_is_an_error_with_both_sizes():
    model = zoo.PlainSeg()
    tap = hidden_channel(model.backbone[0], lambda hidden: hidden, torch.zeros(1, 1, 32, 32))
    with pytest.raises(EncoderError, match=r"\(1, 3, 16, 16\).*\(1, 1, 32, 32\)"), tap:
        model(torch.zeros(1, 3, 16, 16))
    assert hooks_of(model) == 0


# ---- token drop


def gathered(x, order, prefix):
    rows = [torch.cat([x[i, :prefix], x[i, prefix + order[i]]]) for i in range(len(x))]
    return torch.stack(rows)


def visible_order(mask):
    return torch.stack([row.nonzero().flatten() for row in mask.flatten(1)])


def by_hand_vit(model, x, order):
    """timm's VisionTransformer.forward_features with the tokens picked before the blocks."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    x = gathered(x, order, model.num_prefix_tokens)
    for block in model.blocks:
        x = block(x)
    return model.norm(x)


def by_hand_eva(model, x, order):
    """timm's Eva.forward_features, with the rotary embedding picked for every image."""
    x, rotary = model._pos_embed(model.patch_embed(x))
    if rotary.ndim == 2:
        rotary = rotary[None, None]
    x = model.norm_pre(x)
    x = gathered(x, order, model.num_prefix_tokens)
    rows = [rotary[0][:, order[i]] for i in range(len(x))]
    rotary = torch.stack(rows)
    for block in model.blocks:
        x = block(x, rope=rotary)
    return model.norm(x)


def lively(model):
    """Weights large enough that every token matters to every other."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * (0.2 if p.ndim > 1 else 0.5)
            )
    return model.eval()


PLAIN = {
    "vit": (zoo.vit, by_hand_vit, 16, 1),
    "registers": (zoo.vit_registers, by_hand_vit, 16, 4),
    "rotary eva": (zoo.eva, by_hand_eva, 14, 1),
    "rotary dinov3": (zoo.dinov3, by_hand_eva, 16, 5),
}


@pytest.mark.parametrize("family", PLAIN)
def test_token_masking_equals_the_blocks_run_by_hand_on_the_visible_tokens(family):
    make, by_hand, patch, prefix = PLAIN[family]
    model = lively(make())
    info = inspect_encoder(model, "norm")
    assert info.tokens.prefix == prefix == model.num_prefix_tokens
    images, mask = torch.randn(2, 3, 4 * patch, 5 * patch), random_mask(2, (4, 5), 0.8)
    order = visible_order(mask)
    fill = torch.randn(48)
    with torch.no_grad():
        expected = by_hand(model, images, order)
        with visible_tokens(info.tokens, order, 20, fill):
            seen = run_encoder(model, model.norm, images)
        filled = model.norm(fill)
    kept = gathered(seen, order, prefix)
    assert expected.shape[1] == prefix + 4
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-5)
    for i in range(2):
        hidden = seen[i, prefix:][~mask[i].flatten()]
        torch.testing.assert_close(hidden, filled.expand_as(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", PLAIN)
def test_hidden_pixels_have_no_say_in_the_visible_tokens(family):
    make, _, patch, _ = PLAIN[family]
    model = lively(make())
    info = inspect_encoder(model, "norm")
    images, mask = torch.randn(2, 3, 4 * patch, 5 * patch), random_mask(2, (4, 5), 0.8)
    other = torch.where(upsample_mask(mask, patch), images, torch.randn_like(images))
    order = visible_order(mask)
    with torch.no_grad(), visible_tokens(info.tokens, order, 20, torch.zeros(48)):
        first, second = (run_encoder(model, model.norm, x) for x in (images, other))
    assert torch.equal(first, second)
    with torch.no_grad():  # and without the mask they have one
        assert not torch.equal(run_encoder(model, model.norm, images), run_encoder(model, model.norm, other))


def test_prefix_tokens_and_visible_tokens_are_all_that_the_blocks_see():
    model = zoo.vit_registers().eval()
    info = inspect_encoder(model, "norm")
    seen = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
    order = visible_order(random_mask(1, (4, 5), 0.8))
    with torch.no_grad(), visible_tokens(info.tokens, order, 20, torch.zeros(48)):
        run_encoder(model, model.norm, torch.randn(1, 3, 64, 80))
    assert seen == [4 + 4, 4 + 4]


def test_intermediate_features_are_put_back_in_place_after_every_block():
    model, plain = lively(zoo.vit_features()), None
    info = inspect_encoder(model, "")
    assert info.tokens.every_block
    images, mask = torch.randn(2, 3, 64, 80), random_mask(2, (4, 5), 0.8)
    order, fill = visible_order(mask), torch.randn(48)
    with torch.no_grad():
        with visible_tokens(info.tokens, order, 20, fill):
            maps = run_encoder(model, model, images)
        vit = model.model
        x = gathered(vit._pos_embed(vit.patch_embed(images)), order, 1)
        for i, block in enumerate(vit.blocks):
            x = block(x)
            plain = maps[i].flatten(2).transpose(1, 2)
            rows = torch.stack([plain[b, order[b]] for b in range(2)])
            torch.testing.assert_close(rows, x[:, 1:], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("make", [zoo.vit, zoo.vit_registers, zoo.eva, zoo.dinov3])
def test_with_every_token_visible_the_encoder_is_the_plain_one(make):
    model = lively(make())
    info = inspect_encoder(model, "norm")
    side = info.tokens.patch_size
    images = torch.randn(2, 3, 3 * side, 4 * side)
    with torch.no_grad():
        plain = run_encoder(model, model.norm, images)
        with visible_tokens(info.tokens, torch.arange(12).expand(2, 12), 12, torch.zeros(48)):
            torch.testing.assert_close(run_encoder(model, model.norm, images), plain, rtol=1e-5, atol=1e-5)


def test_at_mask_ratio_08_the_encoder_costs_at_most_a_quarter_of_the_full_pass():
    model = zoo.timm_model("vit_tiny_patch16_224").eval()
    branch = MAEBranch.attach(model, "norm", mask_ratio=0.8)
    assert branch.masking == "tokens"
    images = torch.randn(1, 3, 224, 224)

    def flops(run) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        return counter.get_total_flops()

    features = []
    branch.decoder.register_forward_pre_hook(lambda _m, args: features.append(args[0]))
    full = flops(lambda: run_encoder(model, model.norm, images))
    masked = flops(lambda: branch.reconstruct(images)) - flops(lambda: branch.decoder(features[0]))
    assert full > 1e9
    assert 0 < masked <= 0.25 * full


# ---- activation checkpointing


def recomputing(module: nn.Module) -> nn.Module:
    """As MMEngine's `turn_on_activation_checkpointing` does it: the forward of the instance is wrapped."""
    forward = module.forward

    @wraps(forward)
    def wrapper(*args):
        return checkpoint(forward, *args, use_reentrant=False)

    module.forward = wrapper
    return module


def gradients_of_a_masked_pass(model: nn.Module, branch: MAEBranch) -> list[torch.Tensor]:
    model.zero_grad()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    branch.loss(images, generator=torch.Generator().manual_seed(2)).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("wrapped", ["layer2", "layer2.0", "layer1 layer3", "layer2 layer2", ""])
def test_a_wrapped_forward_that_recomputes_changes_no_gradient_and_no_running_statistics(wrapped):
    model = settle_norms(zoo.resnet()).train()
    branch = MAEBranch.attach(model, "layer4")
    expected = gradients_of_a_masked_pass(model, branch)
    for name in wrapped.split() or [""]:
        recomputing(model.get_submodule(name))  # after the branch was attached, as MMEngine does before a run
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    forwards = {module: vars(module).get("forward") for module in model.modules()}
    assert same_bits(gradients_of_a_masked_pass(model, branch), expected)
    assert same_bits(dict(model.named_buffers()), before)
    assert all(vars(module).get("forward") is forward for module, forward in forwards.items())
    assert sum(forward is not None for forward in forwards.values()) == max(len(set(wrapped.split())), 1)


def test_a_wrapped_forward_is_given_back_after_an_error_and_other_wrappers_are_left_alone():
    recomputes, moves = recomputing(nn.Conv2d(3, 4, 1)), nn.Conv2d(3, 4, 1)
    plain = moves.forward
    moves.forward = wraps(plain)(lambda x: plain(x.to("cpu")))  # as libraries that place tensors do
    before = [(dict(vars(module)), list(vars(module))) for module in (recomputes, moves)]
    with without_checkpointing([recomputes, moves]):
        assert recomputes.forward.__func__ is nn.Conv2d.forward
        assert moves.forward is before[1][0]["forward"]
    with pytest.raises(KeyError), without_checkpointing([recomputes, moves]):
        raise KeyError
    assert [(dict(vars(module)), list(vars(module))) for module in (recomputes, moves)] == before
