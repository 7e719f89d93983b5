"""Corrected passes against a plain implementation of the formula, and what they leave behind."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models as zoo
from conftest import left_as_it_was, mix_flags, same_bits, settle_norms
from ttt_adapt.model.calibration import Calibration
from ttt_adapt.model.correction import correction
from ttt_adapt.model.hooks import hooks
from ttt_adapt.model.measure import measure, take_stills
from ttt_adapt.model.rule import Rule

FAMILIES = {
    "resnet": (zoo.resnet, (64, 64)),
    "convnext": (zoo.convnext, (64, 64)),
    "swin": (zoo.swin, (64, 96)),
    "vit": (zoo.vit, (32, 48)),
    "registers": (zoo.vit_registers, (32, 48)),
    "eva": (zoo.eva, (42, 56)),
    "unet": (zoo.UNet, (32, 48)),
    "queries": (zoo.MaskQueryNet, (64, 80)),
}
KINDS = [
    (family, kind)
    for family, kinds in {
        "resnet": ("batchnorm", "blocks"), "convnext": ("norms", "blocks", "input"),
        "swin": ("norms", "blocks", "input+blocks"), "vit": ("norms", "blocks", "input", "input+norms"),
        "registers": ("norms", "blocks"), "eva": ("norms", "blocks", "norms+blocks"),
        "unet": ("batchnorm", "input", "input+batchnorm"), "queries": ("batchnorm",),
    }.items()
    for kind in kinds
]  # fmt: skip


def calibrated(family: str) -> tuple[nn.Module, Calibration, torch.Tensor]:
    """A model, its calibration on noise, and a frame that is darker and flatter than that, [1, 3, H, W]."""
    make, size = FAMILIES[family]
    model = settle_norms(make())
    generator = torch.Generator().manual_seed(4)
    stills = [torch.randn(3, *size, generator=generator) for _ in range(8)]
    return model, measure(model, take_stills(model, stills)), stills[0][None] * 0.3 - 1.0


def with_rule(calibration: Calibration, **changes) -> Calibration:
    return calibration.replace(rule=dataclasses.replace(calibration.rule, **changes))


def run(model: nn.Module, calibration: Calibration, *frames: torch.Tensor) -> list:
    corrected = correction(model, calibration)
    outputs = []
    with torch.no_grad():
        for frame in frames:
            with corrected.active():
                outputs.append(model(frame))
    return outputs


def first(output) -> torch.Tensor:
    return output["pred_masks"] if isinstance(output, dict) else output


def plain_correction(model: nn.Module, calibration: Calibration, frame: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What the model returns with the formula written out, in float64, and the drift."""
    rule, drifts, handles = calibration.rule, [], []

    def share_of(mean, variance, source):
        least = source.std.clamp_min(source.std.max() * 1e-4)  # for channels that are constant in the source
        d = ((mean - source.mean) / least).square() + ((variance.sqrt() - source.std) / least).square()
        return share_at(d, source, rule.margin)

    def share_at(d, source, margin):
        usual = {
            ("layer", "mean"): source.layer_usual, ("layer", "high"): source.layer_high,
            ("channel", "mean"): source.usual, ("channel", "high"): source.high,
        }[rule.per, margin]  # fmt: skip
        drifts.append(float(d.mean() / source.layer_usual))
        d = d if rule.per == "channel" else d.mean()
        return (1 - rule.strength * usual / d).clamp(0, rule.largest).nan_to_num(0.0)  # a dead channel has 0 / 0

    def normalise(source, norm, args, _output):
        x = args[0].double()
        mean, variance, n = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0), x.numel() // x.shape[1]
        share = share_of(mean, variance, source)
        own = {"running_mean": mean, "running_var": variance * n / (n - 1)}
        blended = {name: (1 - share) * getattr(norm, name).double() + share * value for name, value in own.items()}
        affine = norm.weight.double(), norm.bias.double()
        y = F.batch_norm(x, blended["running_mean"], blended["running_var"], *affine, eps=norm.eps).float()
        for name in ("drop", "act"):  # of timm's BatchNorm, which holds its activation
            y = getattr(norm, name)(y) if hasattr(norm, name) else y
        return y

    def before(source, _module, args):
        (image,) = args[0].double()
        step = math.isqrt(image[0].numel() // 1024)  # an even grid of some 1024 pixels
        looked_at = image[:, :: max(step, 1), :: max(step, 1)].flatten(1)
        at = [round((0.02 + 0.12 * i) * (looked_at.shape[1] - 1)) for i in range(9)]
        levels = looked_at.sort(1).values[:, at]
        d = ((levels - source.mean) / source.std[:, None]).square().mean(1)
        share = share_at(d, source, "high").expand(len(d))
        wanted = levels + share[:, None] * (source.mean - levels)  # noise has no two levels of one value
        rows = zip(image, levels, wanted, strict=True)
        curved = [np.interp(*(each.numpy() for each in (values.flatten(), a, b))) for values, a, b in rows]
        moved = torch.from_numpy(np.stack(curved)).view_as(image)
        low, high = levels[:, :1, None], levels[:, -1:, None]  # beyond the outermost levels the slope is one
        moved = moved + (image - low).clamp_max(0) + (image - high).clamp_min(0)
        return moved[None].float()

    def shift(source, _module, _args, output):
        y = output.double().clone()
        axis = 1 if source.layout == "nchw" else y.ndim - 1
        patches = y[:, source.prefix :]
        flat = patches.movedim(axis, -1).reshape(-1, patches.shape[axis])
        mean, variance = flat.mean(0), flat.var(0, correction=0)
        share = share_of(mean, variance, source)
        pairs = zip((source.mean, source.std), (mean, variance.sqrt()), strict=True)
        blended_mean, blended_std = ((1 - share) * a + share * b for a, b in pairs)
        least = source.std.max() * 1e-4
        moved = (patches.movedim(axis, -1) - blended_mean) / blended_std.clamp_min(least)
        moved = moved * source.std.clamp_min(least) + source.mean
        return torch.cat([y[:, : source.prefix], moved.movedim(-1, axis)], 1).float()

    for (kind, name), source in calibration.points.items():
        call = {"batchnorm": normalise, "input": before}.get(kind, shift)
        wide = {n: v.double() for n, v in vars(source).items() if isinstance(v, torch.Tensor)}
        source = dataclasses.replace(source, **wide)
        module = model.get_submodule(name)
        hook = module.register_forward_pre_hook if kind == "input" else module.register_forward_hook
        handles.append(hook(lambda *a, c=call, s=source: c(s, *a)))
    with torch.no_grad(), hooks(handles):
        return first(model(frame)), sum(drifts) / len(drifts)


@pytest.mark.parametrize(
    "changes",
    [{"per": per, "margin": margin} for per, margin in itertools.product(("layer", "channel"), ("mean", "high"))]
    + [
        {"strength": 0.5, "largest": 0.9},
        {"strength": 2.0},
        {"strength": 0.0, "largest": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_a_corrected_pass_is_that_of_the_formula(family, kind, changes):
    model, calibration, frame = calibrated(family)
    calibration = calibration.replace(rule=Rule(kind, **changes))
    corrected = correction(model, calibration)
    assert corrected.drift() is None
    with torch.no_grad(), corrected.active():
        found = first(model(frame))
    expected, drift = plain_correction(model, calibration, frame)
    with torch.no_grad():
        plain = first(model(frame))
    scale = (expected - plain).abs().max()
    assert scale > 0 or calibration.rule.strength > 1  # then a frame may count as usual everywhere
    assert (found - expected).abs().max() <= 2e-3 * scale + 1e-5 * plain.abs().max()
    assert float(corrected.drift()) == pytest.approx(drift, rel=1e-3)


@pytest.mark.parametrize(
    "changes", [{"strength": 1e12}, {"largest": 0.0}, {"per": "channel", "strength": 1e12}], ids=str
)
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_a_share_of_zero_is_the_plain_prediction_bit_for_bit(family, kind, changes):
    model, calibration, frame = calibrated(family)
    with torch.no_grad():
        plain = model(frame)
    assert same_bits(run(model, calibration.replace(rule=Rule(kind, **changes)), frame)[0], plain)


def test_a_rule_that_corrects_nowhere_is_the_plain_prediction_bit_for_bit():
    model, calibration, frame = calibrated("unet")
    with torch.no_grad():
        plain = model(frame)
    corrected = correction(model, calibration.replace(rule=Rule("none")))
    with torch.no_grad(), corrected.active():
        assert same_bits(model(frame), plain)
    assert corrected.drift() is None


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_nothing_carries_over_from_frame_to_frame(family, kind, per):
    model, calibration, far = calibrated(family)
    calibration = calibration.replace(rule=Rule(kind, per))
    frames = [far, torch.randn_like(far), far * 5.0, torch.full_like(far, 0.25)]
    alone = [run(model, calibration, frame)[0] for frame in frames]
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        assert same_bits(run(model, calibration, *[frames[i] for i in order]), [alone[i] for i in order])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e25])
@pytest.mark.parametrize("family", ["unet", "vit", "convnext"])
def test_a_frame_that_overflows_poisons_no_later_one(family, value):
    model, calibration, frame = calibrated(family)
    corrected, bad = correction(model, calibration), frame.clone()
    bad[0, :, 3, 4] = value
    expected = run(model, calibration, frame)[0]
    with torch.no_grad():
        with corrected.active():
            model(bad)
        with corrected.active():
            assert same_bits(model(frame), expected)
    assert corrected.drift().isfinite()


OVERFLOWS = [("unet", "batchnorm"), ("resnet", "blocks"), ("convnext", "norms"), ("vit", "norms"), ("swin", "blocks")]


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize(("family", "kind"), OVERFLOWS)
def test_an_overflow_in_one_channel_at_one_place_stays_where_it_is(family, kind, per):
    model, calibration, frame = calibrated(family)
    name, statistics = list(calibration.statistics[kind].items())[-1]
    rule = Rule(kind, per, strength=0.1)
    calibration = calibration.replace(statistics={kind: {name: statistics}}, rule=rule)
    module, seen, bad = model.get_submodule(name), [], []
    channel = len(statistics.mean) // 2
    axis = 1 if statistics.layout == "nchw" else -1

    def overflow(x):
        if bad:
            x = x.clone()
            rows = x.movedim(axis, -1)
            rows[(0, *(size // 2 for size in rows.shape[1:-1]), channel)] = float("inf")
        return x

    if kind == "batchnorm":
        inject = module.register_forward_pre_hook(lambda _module, args: (overflow(args[0]),))
    else:
        inject = module.register_forward_hook(lambda _module, _args, output: overflow(output))
    corrected = correction(model, calibration)
    for _ in range(2):
        with torch.no_grad(), corrected.active():
            see = module.register_forward_hook(lambda _module, _args, output: seen.append(output.movedim(axis, -1)))
            model(frame)
            see.remove()
        bad.append(True)
    inject.remove()
    clean, found = seen
    assert clean.isfinite().all()
    assert int((~found.isfinite()).sum()) == 1
    assert not found[..., channel].isfinite().all()
    others = [i for i in range(found.shape[-1]) if i != channel]
    if per == "channel":
        assert same_bits(found[..., others], clean[..., others])
    scale = float(clean[..., others].abs().max())
    assert float((found[..., others] - clean[..., others]).abs().max()) < 0.5 * scale
    assert corrected.drift().isfinite()


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_the_model_is_left_as_it_was_also_after_an_error(family, kind):
    model, calibration, frame = calibrated(family)
    expected = run(model, calibration, frame)[0]
    mix_flags(model)
    corrected = correction(model, calibration.replace(rule=Rule(kind)))

    def fails():
        with torch.no_grad(), corrected.active():
            model.eval()(frame)
            mix_flags(model)
            raise KeyError

    with left_as_it_was(model):
        for _ in range(2):
            with pytest.raises(KeyError):
                fails()
    assert same_bits(run(model.eval(), calibration, frame)[0], expected)


def test_layers_in_training_mode_are_corrected_as_in_evaluation():
    model, calibration, frame = calibrated("unet")
    expected = run(model, calibration, frame)[0]
    model.train()
    with left_as_it_was(model):
        assert same_bits(run(model, calibration, frame)[0], expected)


def test_prefix_tokens_are_not_touched():
    model, calibration, frame = calibrated("registers")
    calibration = with_rule(calibration, points="blocks", strength=0.0, largest=1.0)
    (_, name), point = next(iter(calibration.points.items()))
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        model(frame)
        with correction(model, calibration).active():
            after = model.get_submodule(name).register_forward_hook(lambda _m, _a, out: seen.append(out))
            model(frame)
    handle.remove()
    after.remove()
    plain, before, corrected = seen
    assert point.prefix == 4
    assert torch.equal(plain, before)
    assert torch.equal(corrected[:, :4], plain[:, :4])
    assert not torch.allclose(corrected[:, 4:], plain[:, 4:], atol=1e-3)


def test_a_whole_share_gives_patches_the_moments_of_the_source():
    model, calibration, frame = calibrated("vit")
    calibration = with_rule(calibration, points="norms", strength=0.0, largest=1.0)
    (_, name), point = next(iter(calibration.points.items()))
    with torch.no_grad(), correction(model, calibration).active():
        seen = []
        handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, out: seen.append(out))
        model(frame)
    handle.remove()
    patches = seen[0][:, point.prefix :]
    torch.testing.assert_close(patches.mean((0, 1)), point.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patches.std((0, 1), correction=0), point.std, rtol=1e-4, atol=1e-5)


def test_a_channel_that_is_constant_in_the_source_passes_where_nothing_is_corrected():
    model, _, frame = calibrated("convnext")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight[1] = 0.0
    stills = [torch.randn(3, 64, 64) for _ in range(8)]
    calibration = measure(model, take_stills(model, stills)).replace(rule=Rule("norms", strength=1e12))
    with torch.no_grad():
        plain = model(frame)
    assert same_bits(run(model, calibration, frame)[0], plain)
    output = run(model, with_rule(calibration, strength=0.0, largest=1.0), frame)[0]
    assert output.isfinite().all()


@pytest.mark.parametrize("family", ["unet", "vit", "convnext"])
def test_a_batch_has_the_statistics_of_all_its_images(family):
    model, calibration, frame = calibrated(family)
    one = run(model, calibration, frame)[0]
    both = run(model, calibration, torch.cat([frame, frame]))[0]
    for output in both.split(1):
        torch.testing.assert_close(output, one, rtol=1e-3, atol=1e-4)


def test_a_block_that_returns_a_tuple_is_corrected_in_its_first_tensor():
    from test_points import Blocks

    models = [Blocks(tuples) for tuples in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    stills = [torch.randn(3, 32, 48) for _ in range(8)]
    frame, outputs = torch.randn(1, 3, 32, 48) * 3.0 - 2.0, []
    for model in models:
        calibration = measure(model, take_stills(model, stills))
        assert calibration.rule.points == "blocks"
        outputs.append(run(model, calibration, frame)[0])
    assert same_bits(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], models[0](frame))


def test_drift_is_the_mean_over_the_passes_of_one_frame():
    model, calibration, frame = calibrated("unet")
    corrected, drifts = correction(model, calibration), []
    frames = [frame, torch.randn_like(frame)]
    with torch.no_grad():
        for each in frames:
            with corrected.active():
                model(each)
            drifts.append(float(corrected.drift()))
        with corrected.active():
            for each in frames:
                model(each)
    assert drifts[0] > 1.2 * drifts[1]
    assert float(corrected.drift()) == pytest.approx(sum(drifts) / 2)


def test_stills_have_a_drift_of_one_on_average():
    model = settle_norms(zoo.vit())
    stills = [torch.randn(3, 32, 48) for _ in range(8)]
    taken = take_stills(model, stills)
    corrected = correction(model, measure(model, taken).replace(rule=Rule("norms", largest=0.0)))
    drifts = []
    with torch.no_grad():
        for still in taken:
            with corrected.active():
                model(still.x)
            drifts.append(float(corrected.drift()))
    assert sum(drifts) / 8 == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["unet", "vit", "convnext"])
def test_models_in_other_precisions_are_corrected_in_their_own(family, dtype):
    model, calibration, frame = calibrated(family)
    expected = run(model, calibration, frame)[0]
    with torch.no_grad():
        plain = model(frame)
    found = run(model.to(dtype), calibration, frame.to(dtype))[0]
    assert found.dtype == dtype
    scale = (expected - plain).abs().max()
    assert (found.float() - expected).abs().max() <= (0.5 * scale if dtype != torch.float64 else 1e-3 * scale)


@pytest.mark.parametrize("family", ["unet", "vit"])
def test_an_autocast_outside_gives_nearly_the_same(family):
    model, calibration, frame = calibrated(family)
    expected = run(model, calibration, frame)[0]
    with torch.no_grad():
        plain = model(frame)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(model, calibration, frame)[0]
    assert (found.float() - expected).abs().max() <= 0.5 * (expected - plain).abs().max()


def test_one_value_per_channel_meets_the_running_statistics():
    model = settle_norms(zoo.PooledSeg())
    stills = [torch.randn(3, 16, 16) for _ in range(8)]
    calibration = measure(model, take_stills(model, stills))
    assert list(calibration.points) == [("batchnorm", "backbone.1")]
    tiny = torch.randn(1, 3, 2, 2)  # one value per channel behind the first convolution
    with torch.no_grad():
        assert same_bits(run(model, calibration, tiny)[0], model(tiny))
    model(tiny)
    mixed = run(model, calibration, stills[0][None] * 3, tiny)
    assert same_bits(mixed[1], model(tiny).detach())


def test_a_layer_may_be_called_with_its_input_by_name():
    class Named(zoo.TinySeg):
        def forward(self, x):
            x = self.backbone[1](input=self.backbone[0](x))
            return self.head(x.relu().repeat(1, 2, 1, 1)[:, :12])

    model = settle_norms(Named())
    stills = [torch.randn(3, 16, 16) for _ in range(8)]
    calibration = measure(model, take_stills(model, stills))
    frame = stills[0][None] * 4 + 1
    with torch.no_grad():
        plain = model(frame)
    expected, _ = plain_correction_of_named(model, calibration, frame)
    found = run(model, calibration, frame)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)


def plain_correction_of_named(model: nn.Module, calibration: Calibration, frame: torch.Tensor):
    """As `plain_correction`: the layer gets its input as the first argument."""
    layer = model.backbone[1]
    forward = type(model).forward
    try:
        type(model).forward = lambda self, x: self.head(layer(self.backbone[0](x)).relu().repeat(1, 2, 1, 1)[:, :12])
        return plain_correction(model, calibration, frame)
    finally:
        type(model).forward = forward
