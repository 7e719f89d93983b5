"""The algorithm of `StreamAdapter`, setting by setting, on the smallest models."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import resource
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models as zoo
from conftest import left_as_it_was, live_tensors, photograph, same_bits, settle_norms
from ttt_adapt import MAEBranch, Normalize, Objective, StepReport, StreamAdapter, StreamConfig, TTTAdaptError
from ttt_adapt.errors import CheckpointError, ConfigError, EncoderError, FrameError, FrameTypeError, StateError
from ttt_adapt.model.dropout import drop_layers
from ttt_adapt.model.features import Features

SIZE = (32, 48)
CONFIG = StreamConfig(window=3, batch_size=2, lr=1e-2, encoder_lr_scale=0.5, seed=11)


def clip(count: int = 5, size: tuple[int, int] = SIZE, seed: int = 21) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator) for _ in range(count)]


def attached(make=zoo.PlainSeg, encoder: str = "backbone", config: StreamConfig = CONFIG, **more) -> StreamAdapter:
    """An adapter on a model and a branch that are the same in every call."""
    state = torch.get_rng_state()
    torch.manual_seed(9)
    model = settle_norms(make())
    branch = MAEBranch.attach(model, encoder)
    torch.set_rng_state(state)
    return StreamAdapter(model, branch, config=config, **more)


def weights(adapter: StreamAdapter) -> dict[str, torch.Tensor]:
    return adapter.state_dict()["weights"]


def run(adapter: StreamAdapter, frames) -> list:
    return [adapter.step(frame) for frame in frames]


# ---- the step, against a loop in plain PyTorch


def by_hand(model, branch, frames, config, fresh_optimizer: bool):
    """The recipe written out: push, draw, mask, one AdamW step for f and g; nothing of the library but the decoder."""
    generator = torch.Generator().manual_seed(config.seed)
    stem, rest, channel = model.backbone[0], model.backbone[1:], branch.mask_channel.weight
    encoder, own = list(model.backbone.parameters()), list(branch.parameters())

    def make():
        groups = []
        for parameters, lr in ((encoder, config.lr * config.encoder_lr_scale), (own, config.lr)):
            for decay in (config.weight_decay, 0.0):
                chosen = [p for p in parameters if (p.ndim > 1) == (decay > 0)]
                groups.append({"params": chosen, "lr": lr, "weight_decay": decay})
        return torch.optim.AdamW(groups)

    optimizer, losses = make(), []
    for t in range(len(frames)):
        optimizer = make() if fresh_optimizer else optimizer
        window = frames[max(0, t - config.window + 1) : t + 1]
        age = torch.randint(len(window), (config.batch_size,), generator=generator)
        batch = torch.stack([window[len(window) - 1 - int(a)] for a in age])
        order = torch.rand(config.batch_size, 6, generator=generator).argsort(dim=1)
        hidden = torch.ones(config.batch_size, 6, dtype=batch.dtype)
        for row, picked in zip(hidden, order[:, :1], strict=True):  # 6 patches, 0.8 hidden: one is visible
            row[picked] = 0.0
        hidden = F.interpolate(hidden.view(-1, 1, 2, 3), scale_factor=16)
        features = rest(stem(batch * (1 - hidden)) + F.conv2d(hidden, channel, stride=4))
        prediction = branch.decoder(Features([features], features, SIZE))
        loss = ((prediction - batch) ** 2 * hidden).sum() / (3 * hidden.sum())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder + own, config.grad_clip or float("inf"))
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_report_can_be_compared_copied_and_sent_to_another_process():
    adapter, frames = attached(), clip(2)
    first, second = [adapter.adapt(frame) for frame in frames]
    sent = pickle.loads(pickle.dumps(first))
    assert sent == first == copy.deepcopy(first)
    assert sent.losses == first.losses
    assert first != second
    assert first != "StepReport"
    assert repr(first).startswith("StepReport(frame_index=0, losses=(")


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("grad_clip", [None, 0.05])
def test_the_stream_equals_a_loop_written_by_hand(restart, grad_clip):
    # In double precision: Adam's first step is a sign, and where a gradient is next to nothing rounding decides.
    frames = [frame.double() for frame in clip(6)]
    config = CONFIG.replace(lr=1e-3, restart_optimizer=restart, grad_clip=grad_clip, weight_decay=0.3)
    adapter = attached(lambda: zoo.PlainSeg().double(), config=config)
    model, branch = copy.deepcopy(adapter.branch.model), copy.deepcopy(adapter.branch)
    mine = [adapter.adapt(frame).losses[0] for frame in frames]
    theirs = by_hand(model, branch, frames, config, restart)
    assert mine == pytest.approx(theirs, rel=1e-6)
    for mine, theirs in ((adapter.branch.model, model), (adapter.branch, branch)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_carrying_the_optimizer_is_something_else_than_restarting_it():
    outs = [run(attached(config=CONFIG.replace(restart_optimizer=r)), clip()) for r in (True, False)]
    assert same_bits(outs[0][0], outs[1][0])
    assert not same_bits(outs[0][2], outs[1][2])


def test_the_prediction_is_made_after_the_update_and_on_the_whole_frame():
    first, second = (attached(config=CONFIG.replace(crop_size=32)) for _ in range(2))
    frames = clip()
    for frame in frames:
        out = first.step(frame)
        second.adapt(frame)
        assert same_bits(out, second.predict(frame))
        assert out.shape[-2:] == (8, 12)


def test_predict_alone_changes_nothing():
    adapter, frames = attached(), clip()
    adapter.step(frames[0])
    before = adapter.state_dict()
    adapter.predict(frames[1])
    assert same_bits(adapter.state_dict(), before)
    assert adapter.last.frame_index == 0


def test_a_report_says_what_was_done():
    adapter = attached(config=CONFIG.replace(iterations=3))
    for i, frame in enumerate(clip(3)):
        report = adapter.adapt(frame)
        assert isinstance(report, StepReport)
        assert adapter.last is report
        assert (report.frame_index, report.adapted, report.reason) == (i, True, "")
        assert len(report.losses) == 3
        assert all(isinstance(loss, float) and 0 < loss < 100 for loss in report.losses)
        assert report.grad_norm > 0
        assert report.ms > 0


# ---- memory


def test_without_memory_a_prediction_does_not_depend_on_earlier_frames():
    last = clip(1, seed=77)[0]
    outs = []
    for before in (clip(0), clip(2), clip(4, seed=3)):
        adapter = attached(config=StreamConfig.no_memory(batch_size=2, lr=1e-2, seed=11))
        run(adapter, before)
        adapter.state.random.generator.manual_seed(123)
        outs.append(adapter.step(last))
    assert same_bits(outs[0], outs[1])
    assert same_bits(outs[0], outs[2])


@pytest.mark.parametrize("preset", [StreamConfig.online, StreamConfig.implicit_only, StreamConfig.explicit_only])
def test_with_either_memory_earlier_frames_have_a_say(preset):
    last, outs = clip(1, seed=77)[0], []
    for before in (clip(4), clip(4, seed=3)):
        adapter = attached(config=preset(batch_size=8, lr=1e-2))
        run(adapter, before)
        adapter.state.random.generator.manual_seed(123)
        outs.append(adapter.step(last))
    assert not same_bits(outs[0], outs[1])


def test_a_source_pull_of_one_equals_no_carried_weights():
    outs = [run(attached(config=CONFIG.replace(**c)), clip()) for c in ({"source_pull": 1.0}, {"carry_weights": False})]
    assert same_bits(outs[0], outs[1])


def test_embedding_tables_of_the_decoder_are_not_decayed():
    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.out = torch.nn.Embedding(16, 12), torch.nn.Linear(12, 3)

        def forward(self, features):
            finest = features.maps[0]
            image = self.out((finest.mean((2, 3))[:, None] + self.queries.weight.mean(0))[:, 0])
            return image[:, :, None, None].expand(-1, -1, *features.image_size)

    adapter = StreamAdapter(zoo.TinySeg(), encoder="backbone", decoder=Decoder(), config=StreamConfig.paper())
    decay = {
        id(p): group["weight_decay"]
        for group in adapter.state.optimizer.optimizer.param_groups
        for p in group["params"]
    }
    decoder = adapter.branch.decoder
    assert decay[id(decoder.queries.weight)] == 0.0
    assert decay[id(decoder.out.weight)] == 0.05


def test_a_source_pull_leaves_running_statistics_to_their_own_momentum():
    means = []
    for pull in (0.0, 0.5):
        adapter = attached(zoo.TinySeg, config=CONFIG.replace(source_pull=pull, norm_stats="ema", lr=0.0))
        for frame in clip():
            adapter.adapt(frame)
        means.append(adapter.branch.model.backbone[1].running_mean.clone())
    assert torch.equal(*means)


def test_a_source_pull_moves_that_fraction_back_before_the_step():
    frames = clip(3)
    adapter = attached(config=CONFIG.replace(source_pull=0.25, lr=1e-2))
    source = weights(adapter)
    run(adapter, frames[:2])
    adapted = weights(adapter)
    for group in adapter.state.optimizer.optimizer.param_groups:
        group["lr"] = 0.0
    adapter.step(frames[2])
    for name, now in weights(adapter).items():
        torch.testing.assert_close(now, adapted[name] + 0.25 * (source[name] - adapted[name]), rtol=1e-6, atol=1e-7)
    assert not same_bits(adapted, source)


def test_the_window_decides_which_frames_are_drawn():
    drawn = []
    adapter = attached(config=CONFIG.replace(window=2, batch_size=16))
    plain = adapter.branch.loss
    adapter.branch.loss = lambda images, generator=None: (drawn.append(images.clone()), plain(images))[1]
    frames = [torch.full((3, *SIZE), float(i)) for i in range(4)]
    run(adapter, frames)
    assert [sorted(d[:, 0, 0, 0].unique().tolist()) for d in drawn] == [[0], [0, 1], [1, 2], [2, 3]]


def test_reset_begins_anew_whatever_the_stream_was():
    config = CONFIG.replace(restart_optimizer=False, norm_stats="ema", source_pull=0.1, every=2)
    adapter = attached(zoo.TinySeg, config=config)
    fresh = adapter.state_dict()
    first = run(adapter, clip())
    adapter.reset()
    assert same_bits(adapter.state_dict(), fresh)
    assert same_bits(run(adapter, clip()), first)
    adapter.reset()
    adapter.step(torch.randn(3, 64, 64))  # a new video may have another size


# ---- what a setting does


def test_the_encoder_learns_at_its_own_rate():
    config = CONFIG.replace(encoder_lr_scale=0.25, weight_decay=0.0, lr=1e-2)
    adapter = attached(config=config)
    before = weights(adapter)
    adapter.step(clip(1)[0])
    moves = {name: (now - before[name]).abs().max().item() for name, now in weights(adapter).items()}
    # the first step of Adam has the size of the learning rate
    assert moves["model.backbone.0.weight"] == pytest.approx(0.25e-2, rel=1e-2)
    assert moves["branch.decoder.pyramid.out.weight"] == pytest.approx(1e-2, rel=1e-2)
    still = attached(config=config.replace(encoder_lr_scale=0.0))
    before = weights(still)
    still.step(clip(1)[0])
    assert torch.equal(weights(still)["model.backbone.0.weight"], before["model.backbone.0.weight"])


def decayed(model, encoder, **attach) -> tuple[set[str], set[str]]:
    """Names of the parameters with and without weight decay, as the optimizer is given them."""
    groups = []

    def record(given):
        groups.extend(given)
        return torch.optim.SGD(given, lr=0.1)

    adapter = StreamAdapter(model, encoder=encoder, config=CONFIG, optimizer=record, **attach)
    named = {id(p): f"model.{n}" for n, p in model.named_parameters()}
    named |= {id(p): f"branch.{n}" for n, p in adapter.branch.named_parameters()}
    split = ([g for g in groups if g["weight_decay"] > 0], [g for g in groups if g["weight_decay"] == 0])
    first, second = ({named[id(p)] for g in part for p in g["params"]} for part in split)
    assert not first & second
    adapter.detach()
    return first, second


def test_norms_biases_tokens_and_positions_are_not_decayed():
    decay, bare = decayed(zoo.vit_registers(), "norm")
    assert {"model.pos_embed", "model.reg_token", "branch.mask_token"} <= bare
    assert {"model.blocks.0.attn.qkv.weight", "model.blocks.1.mlp.fc1.weight", "branch.decoder.out.weight"} <= decay
    assert not any(name.endswith("bias") or "norm" in name for name in decay)
    decay, bare = decayed(zoo.vit(), "norm")
    assert {"model.cls_token", "model.pos_embed"} <= bare
    decay, bare = decayed(zoo.swin(), "norm")
    tables = {name for name in bare if name.endswith("relative_position_bias_table")}
    assert len(tables) == 5
    decay, bare = decayed(zoo.resnet(), "layer4")
    assert "model.layer1.0.conv1.weight" in decay
    assert {"model.bn1.weight", "model.bn1.bias"} <= bare


def test_the_patch_embeddings_convolution_is_decayed():
    assert "model.patch_embed.proj.weight" in decayed(zoo.vit(), "norm")[0]


def test_weight_decay_acts_on_what_it_is_given_alone():
    adapter = attached(config=CONFIG.replace(weight_decay=0.5, lr=1e-2, grad_clip=1e-30), optimizer=torch.optim.SGD)
    before = weights(adapter)
    adapter.step(clip(1)[0])
    now = weights(adapter)
    for name, lr in (("model.backbone.0.weight", 0.5e-2), ("branch.decoder.pyramid.out.weight", 1e-2)):
        torch.testing.assert_close(now[name], before[name] * (1 - lr * 0.5), rtol=1e-5, atol=1e-7)
    assert torch.equal(now["model.backbone.0.bias"], before["model.backbone.0.bias"])


def test_the_gradient_is_clipped_as_one_vector():
    seen = []

    class Look(torch.optim.SGD):
        def step(self, closure=None):
            grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
            seen.append(torch.stack([g.norm() for g in grads]).norm().item())

    adapter = attached(config=CONFIG.replace(grad_clip=0.01), optimizer=lambda groups: Look(groups, lr=0.1))
    report = adapter.adapt(clip(1)[0])
    assert seen == [pytest.approx(0.01, rel=1e-3)]
    assert report.grad_norm > 0.01
    free = attached(optimizer=lambda groups: Look(groups, lr=0.1))
    report = free.adapt(clip(1)[0])
    assert seen[1] == pytest.approx(report.grad_norm, rel=1e-5)


def test_every_nth_frame_is_adapted_to_and_every_frame_is_predicted():
    adapter, frames = attached(config=CONFIG.replace(every=3)), clip(7)
    changed, reasons = [], []
    for frame in frames:
        before = weights(adapter)
        assert adapter.step(frame).shape == (1, zoo.CLASSES, 8, 12)
        changed.append(not same_bits(weights(adapter), before))
        reasons.append((adapter.last.adapted, adapter.last.reason, len(adapter.last.losses)))
    assert changed == [True, False, False, True, False, False, True]
    assert reasons[0] == (True, "", 1)
    assert reasons[1] == (False, "every", 0)
    assert len(adapter.state.window) == 3  # the others are in the window all the same


def test_crops_have_the_asked_size_and_come_from_everywhere():
    adapter, shapes, corners = attached(config=CONFIG.replace(crop_size=(16, 32), batch_size=32)), set(), set()
    plain = adapter.branch.loss

    def look(images, generator=None):
        shapes.add(tuple(images.shape))
        corners.update(images[:, 0, 0, 0].tolist())
        return plain(images, generator=generator)

    adapter.branch.loss = look
    adapter.step(torch.arange(SIZE[0] * SIZE[1]).float().view(1, *SIZE).expand(3, *SIZE))
    assert shapes == {(32, 3, 16, 32)}
    assert len(corners) > 25


def test_iterations_are_that_many_gradient_steps_with_fresh_draws():
    adapter, count = attached(config=CONFIG.replace(iterations=4)), []
    plain = adapter.branch.loss
    adapter.branch.loss = lambda images, generator=None: (count.append(images), plain(images, generator=generator))[1]
    report = adapter.adapt(clip(1)[0])
    assert len(count) == len(report.losses) == 4
    assert len(set(report.losses)) == 4


def training_flags_during(adapter, frame) -> dict[str, set[bool]]:
    seen = {}
    handles = [
        m.register_forward_hook(lambda m, _a, _o: seen.setdefault(type(m).__name__, set()).add(m.training))
        for m in adapter.branch.model.modules()
    ]
    adapter.adapt(frame)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("asked", [False, True])
def test_dropout_and_stochastic_depth_are_active_only_if_asked_for(asked):
    adapter = attached(lambda: zoo.vit(drop_path_rate=0.5), "norm", CONFIG.replace(drop_path=asked))
    adapter.branch.model.train(False)
    seen = training_flags_during(adapter, clip(1)[0])
    assert seen["DropPath"] == {asked}
    assert not any(m.training for m in adapter.branch.model.modules())


class StochasticDepth(nn.Module):
    """Of torchvision's name."""

    def forward(self, x):
        return x


class PatchDropout(StochasticDepth):
    """Of timm's name: it drops tokens."""


class HFDropPath(StochasticDepth):
    """As Hugging Face's: a prefix and DropPath."""


def test_layers_that_drop_activations_or_paths_are_found_and_those_that_drop_tokens_are_not():
    model = nn.Sequential(StochasticDepth(), PatchDropout(), HFDropPath(), nn.Dropout2d(0.1), nn.Dropout(0.1))
    assert drop_layers(model) == [model[0], model[2], model[3], model[4]]


def test_a_failed_step_repeats_what_it_would_have_dropped():
    outs = []
    for fails in (False, True):
        adapter = attached(lambda: zoo.vit(drop_path_rate=0.5), "norm", CONFIG.replace(drop_path=True, source_pull=0.0))
        adapter.step(clip(2)[0])
        if fails:
            with pytest.raises(FrameError):
                adapter.step(torch.full((3, 32, 48), float("nan")))
        outs.append(adapter.step(clip(2)[1]))
    assert same_bits(*outs)


def test_a_model_left_in_training_mode_is_in_evaluation_mode_while_it_adapts():
    model = zoo.vit(drop_path_rate=0.5).train()
    with left_as_it_was(model):
        with StreamAdapter(model, encoder="norm", config=CONFIG) as adapter:
            assert training_flags_during(adapter, clip(1)[0])["DropPath"] == {False}
        assert model.training


def test_stochastic_depth_never_lets_masked_frames_into_running_statistics():
    adapter = attached(zoo.TinySeg, config=CONFIG.replace(drop_path=True))
    before = photograph(adapter.branch.model)["bytes"]
    assert training_flags_during(adapter, clip(1)[0])["BatchNorm2d"] == {False}
    after = photograph(adapter.branch.model)["bytes"]
    assert {n for n in after if after[n] != before[n]} <= set(adapter.branch.encoder_parameters())


def clean_statistics(model, frame):
    with torch.no_grad():
        x = model.backbone[0](frame[None])
    return x.mean((0, 2, 3)), x.var((0, 2, 3))


@pytest.mark.parametrize("kind", ["frozen", "ema", "blend", "batch"])
def test_running_statistics_are_frozen_or_those_of_clean_frames(kind):
    adapter = attached(zoo.TinySeg, config=CONFIG.replace(norm_stats=kind, norm_momentum=0.2, lr=0.0))
    norm = adapter.branch.model.backbone[1]
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    source, momentum = photograph(adapter.branch.model), norm.momentum
    for frame in clip(3):
        new_mean, new_var = clean_statistics(adapter.branch.model, frame)
        share = 0.2 if kind == "ema" else 0.0
        mean, var = mean + share * (new_mean - mean), var + share * (new_var - var)
        adapter.step(frame)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-5, atol=1e-6)
    assert norm.momentum == momentum
    assert not norm.training
    assert (photograph(adapter.branch.model)["bytes"] == source["bytes"]) == (kind != "ema")
    adapter.reset()
    assert photograph(adapter.branch.model) == source


@pytest.mark.parametrize("kind", ["ema", "batch"])
def test_norms_behind_global_pooling_keep_to_their_running_statistics(kind):
    adapter = attached(zoo.PooledSeg, config=CONFIG.replace(norm_stats=kind, norm_momentum=0.2, lr=0.0))
    model = adapter.branch.model
    pooled, before = model.pool[2], {name: b.clone() for name, b in model.named_buffers()}
    source = photograph(model)
    frame = clip(1)[0]
    found = adapter.step(frame)
    assert same_bits(dict(pooled.named_buffers()), {n: before[f"pool.2.{n}"] for n, _ in pooled.named_buffers()})
    assert torch.equal(model.backbone[1].running_mean, before["backbone.1.running_mean"]) == (kind == "batch")
    with torch.no_grad():
        if kind == "ema":  # the model with the statistics that it has now
            torch.testing.assert_close(found, copy.deepcopy(model)(frame[None]))
        else:
            x = model.backbone[0](frame[None])
            x = F.relu(F.batch_norm(x, None, None, model.backbone[1].weight, model.backbone[1].bias, training=True))
            torch.testing.assert_close(found, model.head(x + model.pool(x)))
    adapter.reset()
    assert photograph(model) == source


def test_a_share_that_is_the_default_or_of_no_account_is_no_other_configuration():
    for kind, momentum in (("frozen", 0.05), ("ema", 0.05), ("blend", 0.5), ("blend", 0.2)):
        config = CONFIG.replace(norm_stats=kind)
        state = attached(zoo.TinySeg, config=config.replace(norm_momentum=momentum)).state_dict()
        other = momentum == 0.2
        with pytest.raises(CheckpointError, match="norm_momentum") if other else nullcontext():
            attached(zoo.TinySeg, config=config).load_state_dict(state)


def test_a_frame_is_predicted_with_a_blend_of_its_own_statistics_and_the_running_ones():
    found = {}
    for momentum, share in ((None, 0.5), (0.2, 0.2)):
        adapter = attached(zoo.TinySeg, config=CONFIG.replace(norm_stats="blend", norm_momentum=momentum, lr=0.0))
        model, frame = adapter.branch.model, clip(1)[0]
        norm = model.backbone[1]
        mean, var = clean_statistics(model, frame)
        found[share] = adapter.step(frame)
        with torch.no_grad():
            norm.running_mean.lerp_(mean, share), norm.running_var.lerp_(var, share)
            torch.testing.assert_close(found[share], model(frame[None]))
    assert not torch.equal(found[0.5], found[0.2])


@pytest.mark.parametrize("every", [1, 3])
def test_each_frame_is_predicted_with_its_own_statistics_and_the_weights_after_the_step(every):
    adapter = attached(zoo.TinySeg, config=CONFIG.replace(norm_stats="batch", lr=1e-2, every=every))
    for frame in clip(4):
        found = adapter.step(frame)
        plain = zoo.TinySeg()
        plain.load_state_dict(adapter.branch.model.state_dict())
        for norm in (m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.forward = lambda x, m=norm: (
                (x - x.mean((0, 2, 3), keepdim=True))
                * (x.var((0, 2, 3), correction=0, keepdim=True) + m.eps).rsqrt()
                * m.weight[:, None, None]
                + m.bias[:, None, None]
            )
        with torch.no_grad():
            expected = plain.eval()(frame[None])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_moving_statistics_survive_saving_in_mid_stream(tmp_path):
    frames, config = clip(6), CONFIG.replace(norm_stats="ema", restart_optimizer=False)
    first, second = (attached(zoo.TinySeg, config=config) for _ in range(2))
    run(first, frames[:3])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same_bits(run(second, frames[3:]), run(first, frames[3:]))
    assert photograph(first.branch.model)["bytes"] == photograph(second.branch.model)["bytes"]


def test_half_precision_is_for_the_gradient_step_alone():
    seen = []
    adapter = attached(config=CONFIG.replace(precision="bf16"))
    adapter.branch.model.backbone[0].register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    out = adapter.step(clip(1)[0])
    assert seen == [torch.bfloat16, torch.float32]
    assert out.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in adapter.branch.model.parameters())


def test_an_optimizer_of_the_users_own_gets_groups_with_rates_and_names():
    given = []

    def make(groups):
        given.extend(groups)
        return torch.optim.SGD(groups, momentum=0.9)

    adapter = attached(optimizer=make, config=CONFIG.replace(restart_optimizer=False))
    assert {g["name"] for g in given} == {"encoder", "encoder_no_decay", "decoder", "decoder_no_decay"}
    assert {g["name"].split("_")[0]: g["lr"] for g in given} == {"encoder": 0.5e-2, "decoder": 1e-2}
    first = run(adapter, clip())
    adapter.reset()
    assert same_bits(run(adapter, clip()), first)  # momentum is forgotten by a reset
    assert not same_bits(run(attached(), clip())[0], first[0])


def test_an_optimizer_with_a_state_from_the_start_can_be_made_and_renewed_inside_inference_mode():
    def make(groups):
        return torch.optim.Adagrad(groups)

    frames = clip(3)
    plain = attached(optimizer=make)
    expected = run(plain, frames)
    model = plain.detach()
    with torch.inference_mode():
        adapter = StreamAdapter(model, plain.branch, config=CONFIG, optimizer=make)
        adapter.step(frames[0].clone())
        adapter.reset()
    assert same_bits(run(adapter, frames), expected)


def test_the_seed_decides_all_randomness_and_the_global_state_is_left_alone():
    outs = []
    for seed, outer in ((1, 0), (1, 99), (2, 0)):
        adapter = attached(lambda: zoo.vit(drop_path_rate=0.5), "norm", CONFIG.replace(seed=seed, drop_path=True))
        torch.manual_seed(outer)
        before = torch.get_rng_state()
        outs.append(run(adapter, clip()))
        assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(outs[0], outs[1])
    assert not same_bits(outs[0], outs[2])


# ---- other objectives


class Contrast:
    """A label-free objective in a few lines: a scalar of its own says how large features should be."""

    def __init__(self, model):
        self.model, self.target = model, nn.Parameter(torch.ones(1))
        self.training, self.gone = True, False

    def loss(self, images, *, generator=None):
        return (self.model.backbone(images).square().mean() - self.target).square().sum()

    def encoder_parameters(self):
        return {n: p for n, p in self.model.named_parameters() if n.startswith("backbone.")}

    def named_parameters(self):
        return iter([("target", self.target)])

    def train(self, mode=True):
        self.training = mode

    def detach(self):
        self.gone = True


def test_any_objective_drives_the_adapter():
    model = zoo.PlainSeg().eval()
    objective, frames = Contrast(model), clip()
    assert isinstance(objective, Objective)
    with left_as_it_was(model), StreamAdapter(model, objective, config=CONFIG) as adapter:
        assert not objective.training
        first = run(adapter, frames)
        assert objective.target.item() != 1.0
        adapter.reset()
        assert objective.target.item() == 1.0
        assert same_bits(run(adapter, frames), first)
        losses = [adapter.adapt(frames[0]).losses[0] for _ in range(30)]
        assert losses[-1] < losses[0]
    assert not objective.gone  # what the user made, the user lets go


def test_a_mae_branch_is_an_objective():
    assert isinstance(MAEBranch.attach(zoo.PlainSeg(), "backbone"), Objective)


# ---- what goes wrong


def glaring(model):
    """Let the encoder overflow on bright images."""
    model.backbone[0].register_forward_hook(lambda _m, a, out: out * float("inf") if a[0].max() > 50 else out)
    return model


def test_a_loss_that_is_not_finite_leaves_the_weights_and_is_reported():
    adapter = attached(lambda: glaring(zoo.PlainSeg()), config=CONFIG.replace(window=1, restart_optimizer=False))
    frames = clip(3)
    adapter.step(frames[0])
    before = adapter.state_dict()
    report = adapter.adapt(torch.full((3, *SIZE), 60.0))
    after = adapter.state_dict()
    assert not report.adapted
    assert "finite" in report.reason
    assert not np.isfinite(report.losses[0])
    assert same_bits(after["weights"], before["weights"])
    assert same_bits(after["optimizer"], before["optimizer"])
    assert adapter.adapt(frames[1]).adapted
    assert all(t.isfinite().all() for t in weights(adapter).values())


def test_a_frame_that_was_adapted_to_in_part_is_reported_as_adapted():
    adapter = attached(config=CONFIG.replace(iterations=2, window=1))
    plain, calls = adapter.branch.loss, itertools.count()
    adapter.branch.loss = lambda images, generator=None: plain(images) * (1.0 if next(calls) == 0 else float("nan"))
    before = weights(adapter)
    report = adapter.adapt(clip(1)[0])
    assert report.adapted == (not same_bits(weights(adapter), before))


def test_a_failed_step_takes_its_running_statistics_back():
    adapter = attached(zoo.TinySeg, config=CONFIG.replace(norm_stats="ema"))
    adapter.step(clip(1)[0])
    before = weights(adapter)

    def burst(*_args, **_kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    adapter.branch.loss = burst
    with pytest.raises(MemoryError):
        adapter.step(clip(2)[1])
    assert same_bits(weights(adapter), before)


def test_the_frame_of_a_failed_step_is_not_in_the_window():
    adapter, frames = attached(), clip(3)
    adapter.step(frames[0])
    plain = adapter.branch.loss

    def burst(*_args, **_kwargs):
        raise KeyError

    adapter.branch.loss = burst
    with pytest.raises(KeyError):
        adapter.step(frames[1])
    adapter.branch.loss = plain
    assert len(adapter.state.window) == 1
    adapter.step(frames[2])
    assert same_bits(adapter.state_dict()["window"]["frames"], torch.stack([frames[0], frames[2]]))
    assert adapter.last.frame_index == 1


def test_a_runtime_error_that_is_not_about_memory_stays_what_it_is():
    adapter = attached()

    def burst(*_args, **_kwargs):
        raise RuntimeError("shapes do not match")

    adapter.branch.loss = burst
    with pytest.raises(RuntimeError, match="shapes do not match") as caught:
        adapter.step(clip(1)[0])
    assert not isinstance(caught.value, TTTAdaptError)


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (torch.zeros(3, *SIZE).int(), FrameTypeError, "int32.*expected a uint8 RGB frame"),
        (np.zeros((*SIZE, 3), np.uint8), FrameError, "says nothing of its normalisation.*preprocess=Normalize"),
        (torch.zeros(*SIZE, 3), FrameError, r"\(32, 48, 3\).*channels come first"),
        (torch.zeros(2, 3, *SIZE), FrameError, r"\(2, 3, 32, 48\).*expected \[3, H, W\]"),
        (torch.full((3, *SIZE), float("inf")), FrameError, "NaN or infinite"),
        (torch.zeros(3, 16, 16), FrameError, r"is \(16, 16\) .*so far are \(32, 48\).*reset\(\)"),
        (None, FrameTypeError, "frame is None.*expected"),
    ],
)
def test_a_bad_frame_is_refused_with_what_came_and_what_is_expected(frame, error, message):
    adapter = attached()
    adapter.step(clip(1)[0])
    before = adapter.state_dict()
    with pytest.raises(error, match=message):
        adapter.step(frame)
    assert same_bits(adapter.state_dict(), before)


def test_a_crop_larger_than_the_frame_is_refused_before_anything_changes():
    adapter = attached(config=CONFIG.replace(crop_size=40))
    before = adapter.state_dict()
    with pytest.raises(FrameError, match=r"crop_size \(40, 40\).*\(32, 48\).*lower it"):
        adapter.step(clip(1)[0])
    assert same_bits(adapter.state_dict(), before)


def test_a_frame_in_double_precision_is_taken_as_the_model_takes_it():
    adapter, frame = attached(), clip(1)[0]
    expected = adapter.step(frame)
    adapter.reset()
    assert same_bits(adapter.step(frame.double().numpy()), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass a branch.*or encoder"),
        ({"encoder": "backbone", "config": {"window": 2}}, "config is a dict; expected a StreamConfig"),
        ({"branch": "mine", "encoder": "backbone"}, "a branch was given, and encoder for MAEBranch.attach"),
        ({"branch": "other"}, "attached to another model"),
        ({"encoder": "backbon"}, "nearest: 'backbone'"),
    ],
)
def test_wrong_arguments_are_refused_and_leave_no_trace(arguments, message):
    model = zoo.TinySeg().train()
    branches = {"mine": model, "other": zoo.TinySeg()}
    if "branch" in arguments:
        arguments = {**arguments, "branch": MAEBranch.attach(branches[arguments["branch"]], "backbone")}
    with left_as_it_was(model), pytest.raises(TTTAdaptError, match=message) as caught:
        StreamAdapter(model, **arguments)
    assert isinstance(caught.value, ValueError)
    StreamAdapter(model, encoder="backbone").detach()


def test_an_encoder_of_none_is_an_error_of_the_library():
    model = zoo.PlainSeg()
    with left_as_it_was(model), pytest.raises(EncoderError, match="encoder is None.*nearest: .*'backbone'"):
        StreamAdapter(model, encoder=None)


class Tied(nn.Module):
    """A decoder whose last layer is the stem transposed: its weight is the encoder's."""

    def __init__(self, stem: nn.Conv2d):
        super().__init__()
        self.stem, self.narrow = stem, nn.Conv2d(12, 8, 1)

    def forward(self, features):
        return F.conv_transpose2d(self.narrow(features.maps[0]), self.stem.weight, stride=4)


def test_a_weight_that_the_decoder_shares_with_the_encoder_is_adapted_once_as_the_encoders():
    model = zoo.PlainSeg().eval()
    stem, frames = model.backbone[0], clip()
    with left_as_it_was(model), StreamAdapter(model, encoder="backbone", decoder=Tied(stem), config=CONFIG) as adapter:
        groups = {
            g["name"]
            for g in adapter.state.optimizer.optimizer.param_groups
            if any(p is stem.weight for p in g["params"])
        }
        assert groups == {"encoder"}
        before = weights(adapter)
        assert [name for name, w in before.items() if torch.equal(w, stem.weight)] == ["model.backbone.0.weight"]
        first = run(adapter, frames)
        assert not torch.equal(stem.weight, before["model.backbone.0.weight"])
        adapter.reset()
        assert same_bits(run(adapter, frames), first)


class Wrapper(nn.Module):
    """Another model around the same weights."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model

    def forward(self, x):
        return self.inner(x).softmax(1)


@pytest.mark.parametrize("outer_first", [True, False])
def test_two_models_that_share_an_encoder_are_not_adapted_at_once(outer_first):
    model = zoo.PlainSeg().train()
    pairs = [(model, "backbone"), (Wrapper(model), "inner.backbone")]
    (one, path), (other, other_path) = reversed(pairs) if outer_first else pairs
    adapter = StreamAdapter(one, encoder=path, config=CONFIG)
    adapter.step(clip(1)[0])
    branch = MAEBranch.attach(other, other_path)
    for arguments in ({"encoder": other_path}, {"branch": branch}):
        with left_as_it_was(other), pytest.raises(StateError, match=r"backbone.0.weight.*shares them: detach\(\) that"):
            StreamAdapter(other, config=CONFIG, **arguments)
    adapter.detach()
    second = StreamAdapter(other, branch, config=CONFIG)
    del second  # lost without detach()
    live_tensors()  # collects
    with StreamAdapter(one, encoder=path, config=CONFIG), pytest.raises(StateError):
        StreamAdapter(other, branch, config=CONFIG)
    with StreamAdapter(copy.deepcopy(one), encoder=path), StreamAdapter(other, branch, config=CONFIG):
        pass  # a copy shares nothing


def test_two_branches_that_share_a_decoder_are_not_adapted_at_once():
    first, second, decoder = zoo.PlainSeg(), zoo.PlainSeg(), attached().branch.decoder
    with StreamAdapter(first, encoder="backbone", decoder=copy.deepcopy(decoder), config=CONFIG) as adapter:
        shared = adapter.branch.decoder
        with pytest.raises(StateError, match="branch.decoder"):
            StreamAdapter(second, encoder="backbone", decoder=shared, config=CONFIG)
        StreamAdapter(second, encoder="backbone", config=CONFIG).detach()


def test_models_are_free_again_once_their_adapters_are_gone():
    kept, lost = attached(), attached()
    models = kept.branch.model, lost.branch.model  # which live on
    for model in models:
        with pytest.raises(StateError, match="already has a StreamAdapter"):
            StreamAdapter(model, encoder="backbone", config=CONFIG)
    kept.detach()
    del lost
    live_tensors()  # collects
    for model in models:
        StreamAdapter(model, encoder="backbone", config=CONFIG).detach()


def test_a_model_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="model is a function; expected a torch.nn.Module"):
        StreamAdapter(clip, encoder="backbone")


def test_an_unknown_keyword_is_an_error_of_the_library():
    with pytest.raises(TTTAdaptError, match="mask_ration"):
        StreamAdapter(zoo.PlainSeg(), encoder="backbone", mask_ration=0.8)


@pytest.mark.parametrize(
    ("typo", "meant"), [("calibratoin", "calibration"), ("cofig", "config"), ("encodr", "encoder")]
)
def test_the_nearest_keyword_of_the_adapter_or_of_attach_is_named(typo, meant):
    with pytest.raises(ConfigError, match=f"'{typo}': unknown keyword; nearest: '{meant}'"):
        StreamAdapter(zoo.PlainSeg(), **{typo: None})


def test_a_preprocess_that_cannot_be_called_is_refused_when_the_adapter_is_made():
    model = zoo.TinySeg()
    with left_as_it_was(model), pytest.raises(ConfigError, match="preprocess is 'imagenet'; expected a function"):
        StreamAdapter(model, encoder="backbone", preprocess="imagenet")


def test_a_stream_of_nothing_is_refused_at_once():
    with pytest.raises(FrameTypeError, match="frames is None; expected frames one by one"):
        attached().stream(None)


def test_an_optimizer_factory_that_fails_leaves_no_trace():
    model = zoo.TinySeg().train()

    def fail(_groups):
        raise KeyError

    with left_as_it_was(model), pytest.raises(KeyError):
        StreamAdapter(model, encoder="backbone", optimizer=fail)
    StreamAdapter(model, encoder="backbone").detach()


# ---- saved states


def test_a_saved_state_holds_copies_and_may_be_loaded_twice():
    adapter, frames = attached(config=CONFIG.replace(restart_optimizer=False)), clip(6)
    run(adapter, frames[:2])
    state = adapter.state_dict()
    photo = copy.deepcopy(state)
    first = run(adapter, frames[2:4])
    assert same_bits(state, photo)
    adapter.load_state_dict(state)
    second = run(adapter, frames[2:4])
    adapter.load_state_dict(photo)
    assert same_bits(first, second)
    assert same_bits(run(adapter, frames[2:4]), first)


def test_a_state_is_not_written_to_by_the_stream_that_loaded_it():
    adapter, frames = attached(config=CONFIG.replace(restart_optimizer=False)), clip(6)
    run(adapter, frames[:2])
    state = adapter.state_dict()
    photo = copy.deepcopy(state)
    adapter.load_state_dict(state)
    run(adapter, frames[2:4])
    assert same_bits(state, photo)


@pytest.mark.parametrize("kind", ["empty", "other config", "other model", "other shapes"])
def test_a_state_that_does_not_fit_changes_nothing(kind):
    adapter = attached()
    adapter.step(clip(1)[0])
    good = adapter.state_dict()
    other_model = attached(zoo.TinySeg)
    shapes = {**good["weights"], "model.backbone.0.weight": torch.zeros(1)}
    state, message = {
        "empty": ({}, "no state of a StreamAdapter.*config"),
        "other config": ({**good, "config": {**good["config"], "window": 9}}, "'window': 9.*'window': 3"),
        "other model": (other_model.state_dict(), "missing.*unknown|unknown.*missing|missing"),
        "other shapes": ({**good, "weights": shapes}, r"other shapes \(1\): model.backbone.0.weight: \(1,\), expected"),
    }[kind]
    with pytest.raises(CheckpointError, match=message):
        adapter.load_state_dict(state)
    assert same_bits(adapter.state_dict(), good)


def branched(preprocess=None, make=zoo.PlainSeg, **settings) -> StreamAdapter:
    """An adapter whose branch has settings of its own, on weights that are the same in every call."""
    torch.manual_seed(9)
    model = make().eval()
    branch = MAEBranch.attach(model, "backbone", **settings)
    return StreamAdapter(model, branch, config=CONFIG, preprocess=preprocess)


def refused(adapter: StreamAdapter, state: dict, message: str) -> None:
    """The state does not fit, for this reason, and nothing has changed."""
    adapter.step(clip(1, seed=5)[0])
    before = adapter.state_dict()
    with pytest.raises(CheckpointError, match=message):
        adapter.load_state_dict(state)
    assert same_bits(adapter.state_dict(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mask_ratio": 0.3},
            r"saved with \{'mask_ratio': 0.8\}, this adapter has \{'mask_ratio': 0.3\}: adapt by the",
        ),
        ({"loss_on": "all"}, "'loss_on': 'masked'.*'loss_on': 'all'"),
        ({"norm_pix_loss": True}, "'norm_pix_loss': False.*'norm_pix_loss': True"),
        ({"patch_size": 8}, "'patch_size': 16.*'patch_size': 8"),
    ],
)
def test_a_state_of_another_objective_is_refused_by_the_setting_that_differs(settings, message):
    saved = branched()
    run(saved, clip(2))
    state = saved.state_dict()
    refused(branched(**settings), state, message)
    again = branched()
    again.load_state_dict(state)
    assert same_bits(run(again, clip(2)), run(saved, clip(2)))
    del state["setting"]  # an earlier version saved none
    branched(**settings).load_state_dict(state)


def test_a_setting_that_is_changed_for_a_while_counts_as_it_is():
    adapter = branched()
    with adapter.branch.using(mask_ratio=0.5):
        adapter.step(clip(1)[0])
        state = adapter.state_dict()
    refused(adapter, state, "'mask_ratio': 0.5.*'mask_ratio': 0.8")
    with adapter.branch.using(mask_ratio=0.5):
        adapter.load_state_dict(state)


class Other(Contrast):
    """The same weights, another loss."""


class Margin(Contrast):
    """With draws of its own, and a setting."""

    margin = 1.0

    def draw(self, images, generator=None):
        return torch.rand(len(images), generator=generator)

    def loss_of(self, images, drawn):
        return self.loss(images) * drawn.mean() * self.margin

    def weight(self, images, drawn):
        return torch.tensor(float(len(images)))

    def settings(self):
        return (self.margin,)


def test_objectives_of_other_kinds_and_settings_are_told_apart():
    def adapter(kind, margin=1.0):
        torch.manual_seed(9)
        model = zoo.PlainSeg().eval()
        objective = kind(model)
        objective.margin = margin
        return StreamAdapter(model, objective, config=CONFIG)

    state = adapter(Contrast).state_dict()
    refused(adapter(Other), state, "'objective': 'Contrast'.*'objective': 'Other'")
    refused(adapter(Margin, 2.0), adapter(Margin).state_dict(), r"'settings': \(1.0,\).*'settings': \(2.0,\)")
    adapter(Margin, 2.0).load_state_dict(adapter(Margin, 2.0).state_dict())


def test_a_state_of_other_preprocessing_is_refused_before_anything_changes():
    frames = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    normalize, other = Normalize(), Normalize((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    saved = branched(normalize)
    run(saved, frames)
    state = saved.state_dict()
    assert state["window"]["frames"].dtype == torch.uint8
    refused(branched(other), state, r"'mean': \(0.485.*'mean': \(0.5, 0.5, 0.5\).*pass the same preprocess")
    refused(branched(Normalize(size=SIZE)), state, r"'size': None.*'size': \(32, 48\).*pass the same preprocess")
    refused(branched(lambda frame: normalize(frame)), state, "'preprocess': 'Normalize'.*'preprocess': 'a function'")
    refused(branched(), state, "'preprocess': 'none'.*pass the same preprocess")
    branched(Normalize()).load_state_dict(state)
    del state["setting"]  # an earlier version saved none: what can be read is loaded
    branched(other).load_state_dict(state)
    refused(
        branched(lambda frame: normalize(frame)), state, "holds uint8 frames.*cannot normalise: pass the preprocess"
    )
    refused(branched(), state, "holds uint8 frames.*cannot normalise")


def test_the_setting_is_saved_in_plain_values(tmp_path):
    adapter = branched(Normalize(np.array([0.5] * 3), np.array([0.2] * 3)), mask_ratio=np.float64(0.5))
    torch.save(adapter.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    branched(Normalize((0.5,) * 3, (0.2,) * 3), mask_ratio=0.5).load_state_dict(state)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (
            lambda w: {**w, "frames": w["frames"].double()},
            "torch.float64 frames.*takes torch.float32: convert the model",
        ),
        (lambda w: {**w, "frames": w["frames"][:, :2]}, r"frames \(2, 2, 32, 48\); expected \[n, 3, H, W\]"),
        (lambda w: {**w, "frames": w["frames"][:1]}, "window is damaged"),
        (lambda w: {**w, "frames": None}, "window is damaged"),
        (lambda w: {}, "window is damaged"),
        (lambda w: None, "window is damaged"),
    ],
)
def test_a_window_that_cannot_be_drawn_from_is_refused_before_anything_changes(window, message):
    saved = branched()
    run(saved, clip(2))
    state = saved.state_dict()
    refused(branched(), {**state, "window": window(state["window"])}, message)


def test_after_detach_every_call_but_detach_is_an_error():
    adapter = attached()
    state = adapter.state_dict()
    adapter.detach()
    adapter.detach()
    for call in (adapter.reset, adapter.state_dict, lambda: adapter.load_state_dict(state)):
        with pytest.raises(StateError, match="detached"):
            call()
    for call in (adapter.step, adapter.adapt, adapter.predict):
        with pytest.raises(StateError, match="detached"):
            call(clip(1)[0])


# ---- the surface


def test_stream_is_lazy_and_takes_any_iterator():
    adapter, pulled = attached(), []

    def camera():
        for i in itertools.count():
            pulled.append(i)
            yield torch.randn(3, *SIZE)

    predictions = adapter.stream(camera())
    assert pulled == []
    for expected in ([0], [0, 1], [0, 1, 2]):
        next(predictions)
        assert pulled == expected
    assert adapter.last.frame_index == 2


def test_stream_equals_step_by_step():
    assert same_bits(list(attached().stream(clip())), run(attached(), clip()))


def test_step_returns_exactly_what_the_model_returns():
    adapter = attached(zoo.MaskQueryNet, config=CONFIG.replace(lr=0.0))
    frame = clip(1)[0]
    out = adapter.step(frame)
    assert set(out) == {"pred_logits", "pred_masks"}
    with torch.no_grad():
        assert same_bits(out, adapter.branch.model(frame[None]))


def test_predict_says_how_the_model_is_called():
    model = zoo.PlainSeg().eval()
    calls = []

    def predict(x):
        calls.append(tuple(x.shape))
        return model(x).argmax(1)

    with StreamAdapter(model, encoder="backbone", config=CONFIG, predict=predict) as adapter:
        out = adapter.step(clip(1)[0])
    assert calls == [(1, 3, *SIZE)]
    assert out.dtype == torch.int64
    assert not out.is_inference()


@pytest.mark.parametrize("norm_stats", ["frozen", "ema", "blend", "batch"])
def test_what_preprocess_returns_beside_x_comes_back_in_the_prediction_of_that_frame(norm_stats):
    normalize, frames = Normalize(), np.random.default_rng(0).integers(0, 256, (4, *SIZE, 3), dtype=np.uint8)
    config = CONFIG.replace(norm_stats=norm_stats)
    model = settle_norms(zoo.TinySeg())
    plain = attached(zoo.TinySeg, config=config, preprocess=normalize)
    model.load_state_dict(plain.branch.model.state_dict())
    branch = MAEBranch.attach(model, "backbone")
    branch.load_state_dict(plain.branch.state_dict())
    counted = iter(range(len(frames)))

    def predict(x, number):
        return number, model(x)

    adapter = StreamAdapter(
        model, branch, config=config, preprocess=lambda frame: (normalize(frame), next(counted)), predict=predict
    )
    for number, frame in enumerate(frames):
        found, output = adapter.step(frame)
        assert found == number
        assert same_bits(output, plain.step(frame))


def test_floats_that_preprocess_never_saw_have_nothing_beside_them():
    calls = []
    model = zoo.PlainSeg()
    adapter = StreamAdapter(
        model, encoder="backbone", config=CONFIG, preprocess=lambda frame: (Normalize()(frame), "context"),
        predict=lambda *given: calls.append(given[1:]),
    )  # fmt: skip
    adapter.step(clip(1)[0])
    adapter.step(np.zeros((*SIZE, 3), np.uint8))
    assert calls == [(), ("context",)]


def test_a_detach_that_failed_can_be_repeated(monkeypatch):
    model = zoo.PlainSeg()
    source = photograph(model)["bytes"]
    adapter = StreamAdapter(model, encoder="backbone", config=CONFIG)
    adapter.step(clip(1)[0])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", lambda *_: (_ for _ in ()).throw(RuntimeError("the card fell off")))
        with pytest.raises(RuntimeError, match="fell off"):
            adapter.detach()
    adapter.detach()
    assert photograph(model)["bytes"] == source
    StreamAdapter(model, encoder="backbone", config=CONFIG).detach()


def test_uint8_frames_and_normalised_floats_are_one_stream():
    frames = np.random.default_rng(0).integers(0, 256, (4, *SIZE, 3), dtype=np.uint8)
    normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    first = run(attached(preprocess=normalize), frames)
    second = run(attached(preprocess=normalize), [torch.from_numpy(f) for f in frames])
    floats = [(torch.from_numpy(f).permute(2, 0, 1).double() / 255 - mean) / std for f in frames]
    third = run(attached(preprocess=normalize), [x.float()[None] for x in floats])
    assert same_bits(first, second)
    for a, b in zip(first, third, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_timm_models_bring_their_own_normalisation():
    model = zoo.vit()
    adapter = StreamAdapter(model, encoder="norm", config=CONFIG.replace(lr=0.0))
    frame = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    x = (torch.from_numpy(frame).permute(2, 0, 1) / 255 - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(adapter.step(frame), model(x[None]), rtol=1e-4, atol=1e-5)


def test_the_adapter_takes_the_settings_of_the_branch():
    model = zoo.vit()
    adapter = StreamAdapter(model, encoder="norm", masking="pixels", mask_ratio=0.5, loss_on="all", config=CONFIG)
    assert (adapter.branch.masking, adapter.branch.mask_ratio, adapter.branch.loss_on) == ("pixels", 0.5, "all")
    branch = adapter.branch
    adapter.detach()
    with pytest.raises(StateError, match="detached"):
        branch.loss(torch.zeros(1, 3, *SIZE))  # it was the adapter's own


def test_the_model_is_never_deep_copied(monkeypatch):
    adapter = attached()
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("deepcopy in a step"))
    run(adapter, clip(2))
    adapter.reset()
    with StreamAdapter(adapter.detach(), encoder="backbone", config=CONFIG) as again:
        again.step(clip(1)[0])


def test_exactly_one_copy_of_the_adapted_weights_is_kept_beside_buffers_and_one_number_of_each_weight():
    gc.collect()
    model = zoo.TinySeg()
    branch = MAEBranch.attach(model, "backbone")
    before = {id(item) for item in gc.get_objects()}
    adapter = StreamAdapter(model, branch, config=CONFIG)
    own = {t.data_ptr() for module in (model, branch) for t in (*module.parameters(), *module.buffers())}
    new = [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and id(item) not in before]
    made = [tensor for tensor in new if tensor.data_ptr() not in own]  # views of the weights take no memory
    adapted = sum(t.numel() for t in weights(adapter).values())
    numbers = sum(1 for module in (model, branch) for _ in module.parameters())
    small = 2 * sum(t.numel() for t in model.buffers()) + 2 * numbers  # copies, and one number of each weight
    assert adapted <= sum(t.numel() for t in made) <= adapted + small < 1.1 * adapted
    outside = sum(p.numel() for p in adapter.branch.parameters())
    inside = sum(p.numel() for p in adapter.branch.encoder_parameters().values())
    assert adapted == outside + inside


def test_the_adapter_does_not_keep_a_model_alive_that_is_gone():
    model = zoo.PlainSeg()
    adapter = StreamAdapter(model, encoder="backbone", config=CONFIG)
    adapter.step(clip(1)[0])
    alive = weakref.ref(model)
    del adapter, model
    live_tensors()  # collects
    assert alive() is None


def test_three_hundred_frames_leave_the_number_of_live_tensors_flat():
    adapter = attached(config=CONFIG.replace(restart_optimizer=False))
    frames = (torch.randn(3, 16, 32) for _ in itertools.count())
    stream = adapter.stream(frames)
    counts = []
    for _ in range(3):
        for _ in itertools.islice(stream, 100):
            pass
        counts.append(live_tensors())
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.slow
def test_two_thousand_frames_leave_memory_flat():
    adapter = attached(zoo.TinySeg, config=CONFIG.replace(norm_stats="ema"))
    stream = adapter.stream(torch.randn(3, 64, 96) for _ in itertools.count())

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB on Linux

    for _ in itertools.islice(stream, 300):
        pass
    warm, tensors = peak(), live_tensors()
    for _ in itertools.islice(stream, 1700):
        pass
    assert peak() - warm < 8
    assert live_tensors() == tensors
