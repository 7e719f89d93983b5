"""Moments of channels, and what a model is like on source stills."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import models as zoo
from conftest import left_as_it_was, mix_flags, settle_norms
from ttt_adapt import MAEBranch, StreamAdapter
from ttt_adapt.errors import ConfigError, FrameError, StateError
from ttt_adapt.model.correction import correction
from ttt_adapt.model.measure import LEAST_STILLS, TakenStills, measure, take_stills, with_drifts
from ttt_adapt.model.norms import channel_moments
from ttt_adapt.model.rule import Rule, varies

SIZE = (32, 48)


def stills(count: int = LEAST_STILLS, size=SIZE, seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = 0.5 + torch.rand(count, generator=generator)
    return [torch.randn(3, *size, generator=generator) * s for s in scale]


SHAPES = [((2, 5, 6, 7), 1), ((1, 5, 9, 3), 1), ((2, 6, 7, 5), -1), ((3, 11, 5), -1), ((1, 4, 5), -1), ((4, 5), 1)]


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_moments_are_those_of_float64_in_every_layout_and_precision(shape, axis, dtype):
    x = (torch.randn(shape).movedim(axis, -1) * torch.linspace(0.5, 2.0, 5) + 0.5).movedim(-1, axis).to(dtype)
    axes = [i for i in range(len(shape)) if i != axis % len(shape)]
    variance, mean = torch.var_mean(x.double(), axes, correction=0)
    found = channel_moments(x, axis)
    assert [each.dtype for each in found] == [torch.promote_types(dtype, torch.float32)] * 2
    torch.testing.assert_close(found[0].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1].double(), variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("axis", [1, -1])
def test_the_error_of_a_variance_stays_below_some_millionths_of_the_mean_square(ratio, axis):
    x = torch.randn(1, 8, 48, 8) + ratio
    x = x if axis == 1 else x.transpose(1, 3)
    axes = [i for i in range(4) if i != axis % 4]
    variance, mean = torch.var_mean(x.double(), axes, correction=0)
    error = (channel_moments(x, axis)[1].double() - variance).abs()
    assert (error <= 4e-6 * (mean.square() + variance)).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("shape", [(1, 48, 48, 8), (1, 14, 14, 96), (1, 300, 8), (2, 77, 12)])
def test_a_variance_with_channels_last_is_exact_also_where_the_mean_is_100_deviations_from_zero(shape, sign):
    x = torch.randn(shape) * torch.linspace(0.5, 2.0, shape[-1])
    x = x + 100.0 * sign * torch.linspace(0.5, 2.0, shape[-1])
    axes = list(range(len(shape) - 1))
    variance, mean = torch.var_mean(x.double(), axes, correction=0)
    found = channel_moments(x, -1)
    torch.testing.assert_close(found[0].double(), mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1].double(), variance, rtol=1e-5, atol=0)


@pytest.mark.parametrize("axis", [1, -1])
def test_a_constant_channel_has_no_variance_below_zero(axis):
    for value in (0.0, 0.1, 3.3, -1e4):
        assert (channel_moments(torch.full((1, 3, 5, 3), value), axis)[1] >= 0).all()


@pytest.mark.parametrize("axis", [1, -1])
def test_an_autocast_outside_changes_no_moment(axis):
    x = torch.randn(1, 6, 7, 6) + 2.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = channel_moments(x, axis)
    for a, b in zip(inside, channel_moments(x, axis), strict=True):
        assert torch.equal(a, b)


def by_hand(model: nn.Module, name: str, frames, after: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and variances of a module's input or output for every frame, in float64, [stills, C]."""
    found = []

    def see(_module, args, output):
        x = (output if after else args[0]).double().movedim(1, -1).flatten(0, -2)
        found.append((x.mean(0), x.var(0, correction=0)))

    handle = model.get_submodule(name).register_forward_hook(see)
    with torch.no_grad():
        for frame in frames:
            model(frame[None])
    handle.remove()
    means, variances = zip(*found, strict=True)
    return torch.stack(means), torch.stack(variances)


def test_statistics_of_batchnorm_are_the_running_ones_and_the_spread_of_the_stills_around_them():
    model = settle_norms(zoo.UNet())
    calibration = measure(model, take_stills(model, stills()))
    means, variances = by_hand(model, "encoder.down.1.1", stills(), after=False)
    norm = model.encoder.down[1][1]
    std = (norm.running_var.double() + norm.eps).sqrt()
    d = ((means - norm.running_mean) / std).square() + ((variances.sqrt() - std) / std).square()
    found = calibration.statistics["batchnorm"]["encoder.down.1.1"]
    assert torch.equal(found.mean, norm.running_mean)
    expected = {
        "std": std, "usual": d.mean(0), "high": d.quantile(0.95, 0),
        "layer_usual": d.mean(), "layer_high": d.mean(1).quantile(0.95),
    }  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name).double(), value, rtol=1e-4, atol=1e-5)
    assert found.mean is not norm.running_mean
    assert (calibration.stills, calibration.size, calibration.loss) == (LEAST_STILLS, SIZE, None)


def test_statistics_of_other_norms_are_means_over_the_stills():
    model = zoo.convnext().eval()
    frames = stills(size=(64, 64))
    found = measure(model, take_stills(model, frames)).statistics["norms"]["stem.1"]
    means, variances = by_hand(model, "stem.1", frames, after=True)
    torch.testing.assert_close(found.mean.double(), means.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.std.double(), variances.sqrt().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [zoo.UNet, zoo.vit, zoo.MaskQueryNet])
def test_measuring_leaves_the_model_as_it_was(make):
    model = make()
    mix_flags(model)
    with left_as_it_was(model):
        measure(model, take_stills(model, stills()))


def test_an_error_of_the_model_comes_through_and_leaves_it_as_it_was():
    model = zoo.UNet()
    taken = take_stills(model, stills())

    def burst(*_):
        raise ZeroDivisionError

    with left_as_it_was(model), pytest.raises(ZeroDivisionError):
        measure(model, taken, predict=lambda x: burst(model(x)))


def test_a_frame_in_several_passes_is_measured_in_each_of_them():
    model = settle_norms(zoo.UNet())
    frames = stills(size=(32, 64))
    halves = [half for frame in frames for half in frame.split(32, dim=2)]

    def slide(x):
        return torch.cat([model(part) for part in x.split(32, dim=3)], dim=3)

    found = measure(model, take_stills(model, frames), slide)
    alone = measure(model, take_stills(model, halves))
    assert found.points.keys() == alone.points.keys()
    for name, each in found.points.items():
        torch.testing.assert_close(each.layer_usual, alone.points[name].layer_usual)
        torch.testing.assert_close(each.high, alone.points[name].high)


def test_the_reconstruction_loss_and_its_spread_are_measured():
    model = zoo.TinySeg()
    losses = iter(range(LEAST_STILLS))
    found = measure(model, take_stills(model, stills()), loss=lambda _x: torch.tensor(float(next(losses))))
    expected = np.arange(LEAST_STILLS)
    assert found.loss == pytest.approx((expected.mean(), expected.std(ddof=1)))


def test_too_few_stills_or_stills_of_several_sizes_are_refused():
    model = zoo.TinySeg()
    with pytest.raises(ConfigError, match=f"got 7 stills; expected at least {LEAST_STILLS}"):
        take_stills(model, stills(7))
    with pytest.raises(FrameError, match=r"still 2 is \(32, 64\).*first one is.*\(32, 48\)"):
        take_stills(model, [*stills(2), *stills(8, (32, 64))])
    with pytest.raises(FrameError, match="still 1: .*NaN"):
        take_stills(model, [stills(1)[0], torch.full((3, 8, 8), float("nan")), *stills(6)])


def test_a_model_with_nothing_to_measure_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE[0] * SIZE[1], 2))
    with pytest.raises(ConfigError, match="Sequential has no normalisation layer, no repeated block .* no convolution"):
        measure(model, take_stills(model, stills()))


def test_a_model_without_norms_and_blocks_is_measured_at_its_input():
    model = zoo.PlainSeg()
    found = measure(model, take_stills(model, stills()))
    ((kind, _name), each), *others = found.points.items()
    assert (kind, found.rule.points, others) == ("input", "input", [])
    frames = torch.stack(stills()).double()
    quantiles = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)
    levels = frames.flatten(2).quantile(quantiles, 2, interpolation="nearest")  # [9, stills, C]
    torch.testing.assert_close(each.mean.double(), levels.mean(1).T, rtol=1e-4, atol=1e-5)
    deviations = frames.flatten(2).std(2, correction=0)
    torch.testing.assert_close(each.std.double(), deviations.mean(0), rtol=1e-4, atol=1e-5)
    d = ((levels - levels.mean(1, keepdim=True)) / deviations.mean(0)).square().mean(0)  # [stills, C]
    torch.testing.assert_close(each.usual.double(), d.mean(0), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(each.layer_high.double(), d.mean(1).quantile(0.95), rtol=1e-3, atol=1e-6)


def drifts_by_hand(model: nn.Module, found, taken, predict=None) -> list[float]:
    """The drift of every still in a pass that the rule corrects, in units of what is usual at a layer."""
    corrected, drifts = correction(model.eval(), found.replace(drifts=())), []
    for still in taken:
        with torch.no_grad(), corrected.active():
            (predict or model)(still.x)
        drifts.append(float(corrected.drift()))
    return drifts


@pytest.mark.parametrize("largest", [0.0, 0.5])
@pytest.mark.parametrize("points", ["batchnorm", "blocks", "input", "input+blocks", "batchnorm+input", "none"])
def test_drifts_are_those_of_passes_that_the_rule_corrects(points, largest):
    model = settle_norms(zoo.resnet())
    taken = take_stills(model, stills(12, (64, 64)))
    rule = Rule(points, strength=0.2, largest=largest)
    found = measure(model, taken).replace(rule=rule)
    with left_as_it_was(model):
        found = with_drifts(model, found, taken)
    if points == "none":
        assert found.drifts == (0.0,) * 12
        return
    drifts = drifts_by_hand(model, found, taken)
    assert list(found.drifts) == pytest.approx(drifts, rel=1e-5)
    assert found.usual_drift == pytest.approx(np.mean(drifts), rel=1e-5)
    assert found.limit == pytest.approx(np.quantile(drifts, 0.95) / np.mean(drifts), rel=1e-4)
    frames = [still.x for still in taken]
    with StreamAdapter(model, calibration=found) as adapter:
        seen = []
        for frame in frames:
            adapter.step(frame)
            seen.append(adapter.drift)
    assert np.mean(seen) == pytest.approx(1.0, rel=1e-4)
    assert min(seen) < found.limit < max(seen)
    again = with_drifts(model, found, taken)  # the unit of an earlier calibration does not matter
    assert list(again.drifts) == pytest.approx(drifts, rel=1e-5)


def test_a_correction_changes_the_drift_of_later_points():
    model = settle_norms(zoo.resnet())
    taken = take_stills(model, stills(12, (64, 64)))
    found = measure(model, taken)
    plain, corrected = (
        with_drifts(model, found.replace(rule=Rule("batchnorm", strength=0.2, largest=largest)), taken)
        for largest in (0.0, 0.5)
    )
    assert plain.usual_drift != pytest.approx(corrected.usual_drift, rel=1e-3)


def test_the_drift_of_a_still_in_several_passes_is_the_mean_over_them():
    model = settle_norms(zoo.UNet())

    def slide(x):
        return torch.cat([model(part) for part in x.split(32, dim=3)], dim=3)

    taken = take_stills(model, stills(size=(32, 64)))
    rule = Rule("batchnorm", largest=0.0)
    found = with_drifts(model, measure(model, taken, slide).replace(rule=rule), taken, slide)
    assert list(found.drifts) == pytest.approx(drifts_by_hand(model, found, taken, slide), rel=1e-5)
    halves = take_stills(model, [half for still in stills(size=(32, 64)) for half in still.split(32, dim=2)])
    alone = np.array(drifts_by_hand(model, found, halves)).reshape(-1, 2).mean(1)
    assert list(found.drifts) == pytest.approx(list(alone), rel=1e-4)


# ---- stills


def test_stills_become_what_the_model_takes_when_they_are_asked_for():
    made = []

    def preprocess(frame):
        made.append(frame)
        return torch.as_tensor(frame).permute(2, 0, 1)[None].float() / 255

    frames = list(np.random.default_rng(0).integers(0, 256, (9, *SIZE, 3), dtype=np.uint8))
    taken = take_stills(zoo.TinySeg(), frames, preprocess)
    assert isinstance(taken, TakenStills)
    assert (len(taken), len(made)) == (9, 9)  # each was checked
    some = taken.at([4, 2])
    assert (len(some), len(made)) == (2, 9)
    assert torch.equal(some[0].x, preprocess(frames[4]))
    assert some[0].x is not some[0].x
    assert [id(frame) for frame in some.frames] == [id(frames[4]), id(frames[2])]
    assert len(list(taken)) == 9


def test_a_model_that_a_stream_adapts_is_not_calibrated():
    model = zoo.TinySeg()
    adapter = StreamAdapter(model, MAEBranch.attach(model, "backbone"))
    with pytest.raises(StateError):
        take_stills(model, stills())
    adapter.detach()
    assert len(take_stills(model, stills())) == LEAST_STILLS


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ConfigError, match="Identity has no parameters: there is nothing to calibrate"):
        take_stills(nn.Identity(), stills())


def test_a_point_that_is_constant_over_space_on_every_still_does_not_vary():
    means = torch.linspace(-1e-4, 1e-4, 8)[:, None].expand(8, 4)
    assert not varies(means, torch.zeros(8, 4))
    assert not varies(means, torch.full((8, 4), 1e-24))
    assert not varies(torch.zeros(8, 4), torch.zeros(8, 4))
    assert varies(means, torch.full((8, 4), 1e-12))


def test_an_error_of_values_that_are_not_finite_names_the_first_layer():
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(1, 4)]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[2].weight.fill_(float("inf"))
    with pytest.raises(ConfigError, match=r"values at 3 \(GroupNorm\) are not finite"):
        measure(model, take_stills(model, stills()))
