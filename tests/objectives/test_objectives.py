"""Objectives, against their formulas written out by hand."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models as zoo
from conftest import left_as_it_was, live_tensors, mix_flags, photograph, same_bits, settle_norms
from ttt_adapt import MAEBranch, Objective, StreamAdapter, StreamConfig
from ttt_adapt.errors import ConfigError, StateError
from ttt_adapt.model.norms import is_norm
from ttt_adapt.objectives import Entropy, PseudoLabel, Rotation, StatefulObjective
from ttt_adapt.objectives.masking import random_mask
from ttt_adapt.training.joint import TrainConfig, fit

SIZE = (32, 48)
CONFIG = StreamConfig(window=3, batch_size=2, lr=1e-2, seed=11)


def clip(count: int = 4, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(21)
    return [torch.randn(3, *SIZE, generator=generator, dtype=dtype) for _ in range(count)]


def seg(sharp: float = 1.0) -> nn.Module:
    """A small segmentation model; `sharp` scales its logits."""
    torch.manual_seed(4)
    model = settle_norms(zoo.TinySeg())
    with torch.no_grad():
        model.head.weight.mul_(sharp)
    return model


MAKE = {
    "tent": Entropy,
    "self-train": lambda model: PseudoLabel(model, threshold=0.3),
    "self-train-plain": lambda model: PseudoLabel(model, threshold=0.0, mask_ratio=0.0),
    "ema": lambda model: PseudoLabel(model, threshold=0.3, average=0.9),
    "rotation": lambda model: Rotation.attach(model, "backbone"),
}


# ---- the protocol


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_every_objective_follows_the_protocol_and_its_loss_takes_images_alone(make):
    objective = make(seg())
    assert isinstance(objective, Objective)
    assert list(inspect.signature(objective.loss).parameters) == ["images", "generator"]
    loss = objective.loss(torch.randn(2, 3, *SIZE))
    assert loss.ndim == 0
    assert loss.requires_grad


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("norm_stats", ["frozen", "blend", "batch"])
def test_the_model_comes_back_bitwise(make, norm_stats):
    model = seg()
    mix_flags(model)
    with left_as_it_was(model):
        objective = make(model)
        with StreamAdapter(model, objective, config=CONFIG.replace(norm_stats=norm_stats)) as adapter:
            for frame in clip():
                adapter.step(frame)
        objective.detach()


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_reset_then_the_same_frames_and_resume_are_exact(make):
    model = seg()
    torch.manual_seed(0)
    with StreamAdapter(model, make(model), config=CONFIG) as adapter:
        whole = []
        for t, frame in enumerate(clip(6)):
            if t == 3:
                state = copy.deepcopy(adapter.state_dict())
            whole.append(adapter.step(frame))
        adapter.reset()
        assert same_bits([adapter.step(frame) for frame in clip(6)], whole)
        adapter.load_state_dict(state)
        assert same_bits([adapter.step(frame) for frame in clip(6)[3:]], whole[3:])


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_no_memory_starts_every_frame_from_the_source(make):
    model = seg()
    torch.manual_seed(0)
    config = CONFIG.replace(window=1, carry_weights=False, lr=0.1)
    objective = make(model)

    def weights() -> dict[str, torch.Tensor]:
        memory = objective.memory() if isinstance(objective, StatefulObjective) else {}
        own = {**dict(model.named_parameters()), **dict(objective.named_parameters()), **memory}
        return {name: tensor.detach().clone() for name, tensor in own.items()}

    source, seen = weights(), []
    with StreamAdapter(model, objective, config=config) as adapter:
        for frame in clip(2):
            handle = model.register_forward_pre_hook(lambda *_: seen.append(weights()))
            adapter.adapt(frame)
            handle.remove()
            assert not same_bits(weights(), source)
            assert same_bits(seen[0], source)
            seen.clear()


@pytest.mark.parametrize("make", [MAKE["tent"], MAKE["self-train"]], ids=["tent", "self-train"])
def test_outputs_that_are_no_class_scores_are_named_and_logits_helps(make):
    class Boxed(zoo.TinySeg):
        def forward(self, x):
            return {"scores": super().forward(x)}

    with pytest.raises(ConfigError, match="got dict: pass logits="):
        make(Boxed().eval()).loss(torch.randn(1, 3, *SIZE))
    objective = type(make(Boxed()))(Boxed().eval(), logits=lambda output: output["scores"])
    assert objective.loss(torch.randn(1, 3, *SIZE)).isfinite()


# ---- Tent


def tent_by_hand(model, frames, step):
    """Tent with nothing of the library: entropy of the softmax, batch statistics, and the update `step`."""
    weight, bias = (p.detach().clone() for p in (model.backbone[1].weight, model.backbone[1].bias))
    first, second, head = model.backbone[0].weight, model.backbone[3], model.head
    losses, trail = [], []
    for frame in frames:
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        x = F.conv2d(torch.stack([frame, frame]), first, None, 2, 1)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        x = (x - mean) / (var + 1e-5).sqrt() * w[:, None, None] + b[:, None, None]
        x = F.conv2d(F.conv2d(x.clamp(min=0), second.weight, second.bias, 2, 1).clamp(min=0), head.weight, head.bias)
        p = x.exp() / x.exp().sum(1, keepdim=True)
        loss = -(p * p.log()).sum(1).mean()
        weight, bias = step([weight, bias], torch.autograd.grad(loss, [w, b]))
        losses.append(loss.item())
        trail.append((weight, bias))
    return losses, trail


def adam_by_hand(lr):
    state = {"t": 0, "m": [0.0, 0.0], "v": [0.0, 0.0]}

    def step(parameters, grads):
        state["t"] += 1
        state["m"] = [0.9 * m + 0.1 * g for m, g in zip(state["m"], grads, strict=True)]
        state["v"] = [0.999 * v + 0.001 * g**2 for v, g in zip(state["v"], grads, strict=True)]
        scale = [1 - 0.9 ** state["t"], 1 - 0.999 ** state["t"]]
        return [
            p - lr * (m / scale[0]) / ((v / scale[1]).sqrt() + 1e-8)
            for p, m, v in zip(parameters, state["m"], state["v"], strict=True)
        ]

    return step


def sgd_by_hand(lr):
    return lambda parameters, grads: [p - lr * g for p, g in zip(parameters, grads, strict=True)]


@pytest.mark.parametrize(
    ("hand", "optimizer"),
    [(adam_by_hand, None), (adam_by_hand, torch.optim.Adam), (sgd_by_hand, torch.optim.SGD)],
    ids=["default", "Adam", "SGD"],
)
def test_tent_agrees_with_the_reference_formula_step_for_step(hand, optimizer):
    model, lr = seg().double(), 1e-2
    frames = clip(5, torch.float64)
    losses, trail = tent_by_hand(copy.deepcopy(model), frames, hand(lr))
    config = StreamConfig(window=1, batch_size=2, lr=lr, norm_stats="batch")
    adapter = StreamAdapter(model, Entropy(model), config=config, optimizer=optimizer)
    norm = model.backbone[1]
    for frame, loss, (weight, bias) in zip(frames, losses, trail, strict=True):
        with torch.no_grad():
            assert float(adapter.branch.loss(torch.stack([frame, frame]))) == pytest.approx(loss, abs=1e-12)
        assert adapter.adapt(frame).losses[0] == pytest.approx(loss, rel=1e-6)  # reports are float32
        torch.testing.assert_close(norm.weight.detach(), weight, atol=1e-10, rtol=0)
        torch.testing.assert_close(norm.bias.detach(), bias, atol=1e-10, rtol=0)
    adapter.detach()


def test_tent_trains_scale_and_shift_of_normalisation_and_nothing_else():
    model = seg()
    assert list(Entropy(model).encoder_parameters()) == ["backbone.1.weight", "backbone.1.bias"]
    vit = zoo.vit_features()
    names = Entropy(vit, logits=lambda maps: maps[-1]).encoder_parameters()
    assert names
    assert all("norm" in name for name in names)
    assert not is_norm(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no normalisation layer"):
        Entropy(zoo.PlainSeg())


def test_tents_loss_uses_batch_statistics_and_leaves_the_running_ones_alone():
    model = seg()
    with left_as_it_was(model):
        Entropy(model).loss(torch.randn(2, 3, *SIZE))


def test_tent_takes_one_image_of_a_model_with_global_pooling():
    model = settle_norms(zoo.PooledSeg())
    Entropy(model).loss(torch.randn(1, 3, *SIZE)).backward()
    assert all(p.grad is not None for p in (model.pool[2].weight, model.backbone[1].weight))


# ---- pseudo-labels


def cross_entropy_by_hand(scores, target, threshold):
    p, q = (torch.softmax(each.double(), 1).detach().numpy() for each in (target, scores))
    keep = p.max(1) > threshold
    picked = np.take_along_axis(q, p.argmax(1)[:, None], 1)[:, 0]
    return -np.log(picked[keep]).mean() if keep.any() else 0.0, keep


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.9])
def test_self_training_is_cross_entropy_on_confident_labels_from_a_masked_image(threshold):
    model, images = seg(sharp=30.0), torch.randn(3, 3, 40, 56)
    objective = PseudoLabel(model, threshold, 0.8, patch_size=16)
    found = objective.loss(images, generator=torch.Generator().manual_seed(5))
    mask = random_mask(3, (3, 4), 0.8, generator=torch.Generator().manual_seed(5))
    pixels = mask.numpy().repeat(16, 1).repeat(16, 2)[:, None, :40, :56]
    assert pixels.mean() < 0.35
    expected, keep = cross_entropy_by_hand(model(images * torch.from_numpy(pixels)), model(images), threshold)
    assert 0 < keep.mean() <= 1
    assert (keep.mean() == 1) == (threshold == 0.0)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_plain_self_training_looks_at_every_pixel_of_the_image_as_it_is():
    model, images = seg(sharp=10.0), torch.randn(2, 3, *SIZE)
    expected, _ = cross_entropy_by_hand(model(images), model(images), 0.0)
    assert PseudoLabel(model, 0.0, 0.0).loss(images).item() == pytest.approx(expected, rel=1e-5)


def test_no_confident_pixel_is_no_loss_and_no_gradient():
    model = seg(sharp=0.0)
    loss = PseudoLabel(model, threshold=0.99).loss(torch.randn(1, 3, *SIZE))
    assert float(loss) == 0.0
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert not any(g.any() for g in gradients if g is not None)


def test_pseudo_labels_are_targets_without_gradient():
    model, images = seg(sharp=10.0), torch.randn(2, 3, *SIZE)
    parameters = list(model.parameters())
    found = torch.autograd.grad(PseudoLabel(model, 0.0, 0.0).loss(images), parameters)
    expected = torch.autograd.grad(F.cross_entropy(model(images), model(images).argmax(1)), parameters)
    torch.testing.assert_close(found, expected)


def test_the_teacher_is_the_moving_average_of_the_weights_after_each_step():
    model, average = seg(sharp=10.0).double(), 0.7
    objective = PseudoLabel(model, 0.0, average=average)
    assert isinstance(objective, StatefulObjective)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}

    class Averaging(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            for name, p in model.named_parameters():
                expected[name] = average * expected[name] + (1 - average) * p.detach()

    config = CONFIG.replace(iterations=2)
    with StreamAdapter(model, objective, config=config, optimizer=Averaging) as adapter:
        for frame in clip(3, torch.float64):
            adapter.adapt(frame)
        for name, tensor in objective.memory().items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-12, rtol=0)
        assert not torch.equal(expected["head.weight"], model.head.weight)


def test_labels_come_from_the_teacher():
    model, images = seg(sharp=30.0), torch.randn(2, 3, *SIZE)
    objective = PseudoLabel(model, 0.0, 0.0, average=0.5)
    source = copy.deepcopy(model)
    with torch.no_grad():
        model.head.bias.add_(torch.tensor([5.0, 0, 0, 0, 0]))
    assert torch.equal(objective.teach(images), source(images))
    expected, _ = cross_entropy_by_hand(model(images), source(images), 0.0)
    assert objective.loss(images).item() == pytest.approx(expected, rel=1e-5)


def test_an_average_of_one_is_the_source_model_for_ever():
    model = seg()
    source = {name: p.detach().clone() for name, p in model.named_parameters()}
    objective = PseudoLabel(model, 0.0, average=1.0)
    with StreamAdapter(model, objective, config=CONFIG) as adapter:
        for frame in clip():
            adapter.adapt(frame)
        assert not torch.equal(model.head.weight, source["head.weight"])
        assert same_bits(dict(objective.memory()), source)


def test_the_teacher_costs_no_copy_of_the_model_per_step(monkeypatch):
    model = seg()
    objective = PseudoLabel(model, 0.0, average=0.9)
    with StreamAdapter(model, objective, config=CONFIG) as adapter:
        frames = clip()
        for i in range(3):  # the guards' numbers of a step exist from the second one on
            adapter.adapt(frames[i])
        places = [t.data_ptr() for t in objective.memory().values()]
        before = live_tensors()
        with monkeypatch.context() as patched:
            patched.setattr(copy, "deepcopy", lambda *_: pytest.fail("a deepcopy"))
            for i in range(4):
                adapter.adapt(frames[i])
        assert live_tensors() <= before
        assert [t.data_ptr() for t in objective.memory().values()] == places


def test_a_teacher_goes_back_to_the_source_with_reset_and_is_part_of_the_state():
    model = seg()
    objective = PseudoLabel(model, 0.0, average=0.5)
    source = {name: t.clone() for name, t in objective.memory().items()}
    with StreamAdapter(model, objective, config=CONFIG) as adapter:
        adapter.adapt(clip()[0])
        moved = {name: t.clone() for name, t in objective.memory().items()}
        state = adapter.state_dict()
        assert same_bits({n: state["weights"][f"memory.{n}"] for n in moved}, moved)
        adapter.reset()
        assert same_bits(dict(objective.memory()), source)
        adapter.load_state_dict(state)
        assert same_bits(dict(objective.memory()), moved)
    assert same_bits(dict(objective.memory()), source)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
        ({"average": -1}, "average is -1"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"parameters": {}}, "no parameters"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        PseudoLabel(seg(), **settings)


# ---- rotation


def test_a_turn_is_what_its_label_says():
    rotation = Rotation.attach(seg(), "backbone")
    images = torch.arange(2 * 3 * 33 * 48).view(2, 3, 33, 48).float().repeat(8, 1, 1, 1)
    turned, turns = rotation.turn(images, torch.Generator().manual_seed(0))
    assert turned.shape == (16, 3, 32, 32)
    assert set(turns.tolist()) == {0, 1, 2, 3}
    for image, crop, quarters in zip(images.numpy(), turned.numpy(), turns.tolist(), strict=True):
        upright = np.rot90(crop, -quarters, (1, 2))
        y, x = np.argwhere(image[0] == upright[0, 0, 0])[0]
        np.testing.assert_array_equal(upright, image[:, y : y + 32, x : x + 32])


def test_rotation_is_cross_entropy_of_a_linear_head_on_the_mean_feature():
    model = seg()
    rotation = Rotation.attach(model, "backbone")
    images = torch.randn(4, 3, *SIZE)
    found = rotation.loss(images, generator=torch.Generator().manual_seed(3))
    turned, turns = rotation.turn(images, torch.Generator().manual_seed(3))
    scores = model.backbone(turned).mean((2, 3)) @ rotation.head.weight.T + rotation.head.bias
    torch.testing.assert_close(found, F.cross_entropy(scores, turns))


@pytest.mark.parametrize(
    ("make", "encoder"), [(zoo.vit, "norm"), (zoo.swin_features, ""), (zoo.resnet, "layer4"), (zoo.UNet, "encoder")]
)
def test_rotation_takes_any_encoder(make, encoder):
    model = make().eval()
    with left_as_it_was(model):
        rotation = Rotation.attach(model, encoder)
        loss = rotation.loss(torch.randn(2, 3, 64, 96))
        grads = torch.autograd.grad(loss, list(rotation.encoder_parameters().values()), allow_unused=True)
        assert any(g is not None and g.any() for g in grads)


class Striped(torch.utils.data.Dataset):
    """Images of stripes that fade upward: which way is up can be seen."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        rows = (torch.arange(32) % 8 / 4 - 1)[:, None].expand(32, 32)
        image = torch.stack([rows, rows.sin(), rows * 0]) + 0.1 * torch.randn(3, 32, 32, generator=generator)
        return image, torch.zeros(8, 8, dtype=torch.long)


def test_joint_training_takes_a_rotation_head_in_place_of_the_branch(tmp_path):
    model = seg()
    rotation = Rotation.attach(model, "backbone")
    losses = []
    config = TrainConfig(epochs=12, batch_size=8, lr=2e-2, seed=1)
    fit(
        model, rotation, Striped(), lambda out, y: F.cross_entropy(out, y), config,
        state_file=tmp_path / "state", on_step=lambda progress: losses.append(progress.losses["mae"]),
    )  # fmt: skip
    assert losses[0] > 1.2
    assert losses[-1] < 0.7 * losses[0]
    before = photograph(model)
    with StreamAdapter(model, rotation, config=CONFIG) as adapter:
        adapter.step(clip()[0])
    assert photograph(model) == before


def test_rotation_says_when_it_cannot():
    with pytest.raises(ConfigError, match="no whole cell of 32 x 32"):
        Rotation.attach(zoo.resnet(), "layer4").loss(torch.randn(1, 3, 24, 64))
    rotation = Rotation.attach(seg(), "backbone")
    rotation.detach()
    rotation.detach()
    with pytest.raises(StateError, match=r"detached.*Rotation.attach"):
        rotation.loss(torch.randn(1, 3, *SIZE))
    with pytest.raises(ConfigError, match="another model"):
        StreamAdapter(seg(), MAEBranch.attach(seg(), "backbone"))
