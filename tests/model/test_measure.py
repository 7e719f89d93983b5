"""Moments of channels, and what a model is like on source stills."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import models as zoo
from conftest import left_as_it_was, mix_flags, settle_norms
from ttt_adapt.errors import ConfigError, FrameError
from ttt_adapt.model.calibration import Rule
from ttt_adapt.model.correction import correction
from ttt_adapt.model.measure import LEAST_STILLS, measure, take_stills
from ttt_adapt.model.norms import channel_moments

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
    d = ((means - norm.running_mean) / std).square() + (variances.sqrt() / std - 1).square()
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
        take_stills(model, [stills(1)[0], torch.full((3, 8, 8), float("nan"))])


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
    torch.testing.assert_close(each.mean.double(), frames.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    deviations = frames.flatten(2).std(2, correction=0)
    torch.testing.assert_close(each.std.double(), deviations.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("points", ["batchnorm", "blocks", "input", "input+blocks", "batchnorm+input", "none"])
def test_the_limit_is_the_95th_percentile_of_the_stills_drifts(points):
    model = settle_norms(zoo.resnet())
    taken = take_stills(model, stills(12, (64, 64)))
    found = measure(model, taken).replace(rule=Rule(points, largest=0.0))
    if points == "none":
        assert found.limit == float("inf")
        return
    corrected, drifts = correction(model.eval(), found), []
    for still in taken:
        with torch.no_grad(), corrected.active():
            model(still.x)
        drifts.append(float(corrected.drift()))
    assert found.limit == pytest.approx(np.quantile(drifts, 0.95), rel=1e-4)
    assert min(drifts) < found.limit < max(drifts)


def test_the_drift_of_a_still_in_several_passes_is_the_mean_over_them():
    model = settle_norms(zoo.UNet())

    def slide(x):
        return torch.cat([model(part) for part in x.split(32, dim=3)], dim=3)

    taken = take_stills(model, stills(size=(32, 64)))
    found = measure(model, taken, slide)
    found = found.replace(rule=Rule("batchnorm", largest=0.0))
    corrected, drifts = correction(model.eval(), found), []
    for still in taken:
        with torch.no_grad(), corrected.active():
            slide(still.x)
        drifts.append(float(corrected.drift()))
    assert list(found.drifts["batchnorm"]) == pytest.approx(drifts, rel=1e-4)
    assert found.limit == pytest.approx(np.quantile(drifts, 0.95), rel=1e-4)
