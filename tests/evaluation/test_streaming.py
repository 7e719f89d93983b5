"""Arms that see one frame after the other: their formulas, and where they do not apply."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from arm_inputs import CONFIG, VIT, checkpoint, frames, predictions, suited
from conftest import same_bits, settle_norms
from ttt_adapt import StreamConfig
from ttt_adapt.arms import ARMS, find_arm
from ttt_adapt.errors import ConfigError
from ttt_adapt.evaluation.runners import Fixed, start
from ttt_adapt.evaluation.runners.streaming import LayerStatistics, NormBlend
from ttt_adapt.objectives import PseudoLabel


def test_online_norm_ema_moves_the_statistics_and_online_does_not():
    made = checkpoint()
    before = {name: b.clone() for name, b in made.model.named_buffers() if "running" in name}
    moved = {}
    for arm in ("online", "online-norm-ema"):
        runner = start(ARMS[arm], made, CONFIG)
        runner.step(frames(1)[0][0])
        now = {name: b for name, b in made.model.named_buffers() if "running" in name}
        moved[arm] = sum(not torch.equal(now[name], before[name]) for name in before)
        runner.close()
    assert moved == {"online": 0, "online-norm-ema": len(before)}
    assert all(torch.equal(b, before[name]) for name, b in made.model.named_buffers() if name in before)


@pytest.mark.parametrize("arm", ["norm-ema", "norm-blend", "online-norm-ema", "online-norm-blend"])
def test_norm_arms_refuse_a_model_without_batchnorm(arm):
    with pytest.raises(ConfigError, match="no BatchNorm"):
        start(ARMS[arm], checkpoint(**VIT), CONFIG)


def test_arms_say_where_they_do_not_apply():
    with pytest.raises(ConfigError, match="no LayerNorm.*norm-ema"):
        start(ARMS["ln-adapt"], checkpoint(), CONFIG)
    with pytest.raises(ConfigError, match="no rotation head.*train --objective rotation"):
        start(ARMS["rotation"], checkpoint(), CONFIG)
    with pytest.raises(ConfigError, match="trained for Rotation"):
        start(ARMS["online"], suited("rotation"), CONFIG)


@pytest.mark.parametrize("arm", ["no-memory", "implicit", "explicit", "online", "online-shuffled", "offline"])
def test_reconstructing_arms_refuse_a_model_without_a_branch(arm):
    with pytest.raises(ConfigError, match="main task alone"):
        start(ARMS[arm], checkpoint(branch=None), CONFIG)


def test_blended_statistics_are_those_of_the_formula_in_every_layer_of_one_pass():
    made, plain = checkpoint(), checkpoint()
    passes = []
    made.model.register_forward_hook(lambda *_: passes.append(1))
    found = predictions("norm-blend", made)
    assert len(passes) == len(found)
    own = [module for module in plain.model.modules() if isinstance(module, nn.BatchNorm2d)]

    def blended(m, x):
        mean = 0.5 * m.running_mean + 0.5 * x.mean((0, 2, 3))
        variance = 0.5 * m.running_var + 0.5 * x.var((0, 2, 3))
        y = (x - mean[:, None, None]) / (variance + m.eps).sqrt()[:, None, None]
        return y * m.weight[:, None, None] + m.bias[:, None, None]

    for module in own:
        module.forward = lambda x, m=module: blended(m, x)
    with torch.no_grad():
        for output, (frame, _) in zip(found, frames(), strict=True):
            torch.testing.assert_close(output, plain.model(plain.spec.preprocess()(frame)), rtol=1e-3, atol=1e-4)


def test_a_blend_without_a_share_is_the_fixed_model_also_where_batchnorm_activates():
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    model = settle_norms(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 4, 3), BatchNormAct2d(4)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frame = torch.randn(1, 3, 8, 8)
    plain = Fixed(model, lambda x: x).predict(frame)
    assert (plain >= 0).all()
    assert torch.equal(NormBlend(model, lambda x: x, share=0.0).predict(frame), plain)
    blended = NormBlend(model, lambda x: x, share=0.5).predict(frame)
    assert (blended >= 0).all()
    assert not torch.equal(blended, plain)
    assert same_bits(before, model.state_dict())


def test_online_with_blended_statistics_and_no_rate_is_the_blend():
    blended = predictions("norm-blend", checkpoint())
    runner = start(ARMS["online-norm-blend"], checkpoint(), CONFIG, {"lr": 0.0})
    for output, (frame, _) in zip(blended, frames(), strict=True):
        torch.testing.assert_close(runner.step(frame), output)
    runner.close()


def test_averaged_statistics_are_those_of_pytorchs_training_mode():
    made, plain = checkpoint(), checkpoint()
    found = predictions("norm-ema", made)
    norms = [module for module in plain.model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.momentum = 0.05
    with torch.no_grad():
        for output, (frame, _) in zip(found, frames(), strict=True):
            for training in (True, False):
                for module in norms:
                    module.train(training)
                expected = plain.model(plain.spec.preprocess()(frame))
            assert torch.equal(output, expected)


def test_blended_statistics_start_from_the_source_at_every_frame():
    made = checkpoint()
    runner = start(ARMS["norm-blend"], made, CONFIG)
    (first, _), (second, _) = frames(2)
    alone = runner.step(second).clone()
    runner.step(first)
    assert torch.equal(runner.step(second), alone)
    runner.close()


def test_ln_adapt_refuses_a_layernorm_that_may_do_more_than_normalise():
    from timm.layers import LayerNormAct2d

    with pytest.raises(ConfigError, match="LayerNormAct2d of this model may do more"):
        LayerStatistics(nn.Sequential(nn.LayerNorm(4), LayerNormAct2d(4)), lambda frame: frame, 0.05, 0.1)


class Tokens(nn.Module):
    """A norm on tokens that are given, whatever image comes."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.tokens = norm, None

    def forward(self, _image):
        return self.norm(self.tokens)


@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 6, 4, 3)], ids=["tokens", "channels first"])
def test_ln_adapt_normalises_by_the_blend_of_own_and_running_statistics(shape):
    from timm.layers import LayerNorm2d

    norm = (nn.LayerNorm if len(shape) == 3 else LayerNorm2d)(6).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    model = Tokens(norm)
    runner = LayerStatistics(model, lambda frame: frame, momentum=0.25, share=0.4)
    running = None
    with torch.no_grad():
        for seed in range(3):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * (seed + 1)
            tokens = (x if len(shape) == 3 else x.permute(0, 2, 3, 1)).numpy()
            mean, variance = tokens.mean(-1, keepdims=True), tokens.var(-1, keepdims=True)
            now = np.array([mean.mean(), variance.mean()])
            running = now if running is None else 0.75 * running + 0.25 * now
            mean, variance = 0.6 * mean + 0.4 * running[0], 0.6 * variance + 0.4 * running[1]
            expected = (tokens - mean) / np.sqrt(variance + norm.eps) * norm.weight.numpy() + norm.bias.numpy()
            model.tokens = x
            found = runner.step(torch.zeros(3, 4, 4))
            found = found if len(shape) == 3 else found.permute(0, 2, 3, 1)
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_ln_adapt_without_a_share_is_the_fixed_model_up_to_rounding():
    made = checkpoint(**VIT)
    runner = LayerStatistics(made.model, made.spec.preprocess(), momentum=0.05, share=0.0)
    found = [runner.step(frame) for frame, _ in frames()]
    torch.testing.assert_close(found, predictions("fixed", made), atol=1e-5, rtol=1e-5)


def test_methods_of_others_have_no_pull_unless_they_are_given_one():
    config = StreamConfig.online()
    for name in ("tent", "self-train", "self-train-plain", "ema-teacher"):
        for changes, pull in (({}, 0.0), ({"source_pull": 0.25}, 0.25)):
            runner = start(find_arm(name), checkpoint(), config, changes)
            assert runner.adapter.config.source_pull == pull
            runner.close()
    runner = start(find_arm("online"), checkpoint(), config)
    assert runner.adapter.config == config.replace(norm_stats="frozen")  # "auto" without a calibration
    runner.close()


def test_the_ema_arm_predicts_with_the_teacher():
    made = checkpoint()
    runner = start(ARMS["ema-teacher"], made, CONFIG.replace(lr=0.05))
    runner.step(frames()[0][0])
    objective = runner.adapter.branch
    assert isinstance(objective, PseudoLabel)
    x = made.spec.preprocess()(frames()[1][0])
    assert torch.equal(runner.predict(x), objective.teach(x))
    assert not torch.equal(runner.predict(x), made.model(x))
    runner.close()
