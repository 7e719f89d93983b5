"""window="auto": each step draws from as many frames as the gradients before it advise."""

from __future__ import annotations

import pytest
import torch
from test_schedule import attached, clip

import ttt_adapt.sharing.frame as module
from conftest import same_bits
from ttt_adapt import StreamConfig
from ttt_adapt.errors import CheckpointError, ConfigError
from ttt_adapt.stream.auto_window import AutoWindow, gradient_sketch
from ttt_adapt.stream.window import FrameWindow

CONFIG = StreamConfig(window="auto", batch_size=4, lr=1e-3)


def followed(adapter, frames) -> list:
    """What each frame gave, with the window it was drawn from."""
    return [(adapter.window, adapter.step(frame), adapter.last.losses) for frame in frames]


def test_every_step_draws_from_the_frames_that_the_gradients_before_it_advise(monkeypatch):
    sketches, drawn = [], []
    draw = FrameWindow.draw

    def spied(self, count, generator, crop_size=None, newest=None):
        drawn.append(newest)
        return draw(self, count, generator, crop_size, newest)

    def kept(parameters):
        sketches.append(gradient_sketch(parameters))
        return sketches[-1]

    monkeypatch.setattr(FrameWindow, "draw", spied)
    monkeypatch.setattr(module, "gradient_sketch", kept)
    adapter = attached(CONFIG.replace(grad_clip=1e-3, iterations=2))
    for frame in clip():
        adapter.adapt(frame)
    advisor, expected = AutoWindow(32, draws=4), []
    for sketch in sketches:
        expected += [advisor.length] * 2
        advisor.update(sketch)
    assert drawn == expected
    assert len(sketches) == len(clip())
    assert 1 < max(drawn) < len(clip())
    assert max(float(sketch.norm()) for sketch in sketches) > 1e-2  # taken before the gradient is clipped


def test_no_draw_reaches_behind_the_window(monkeypatch):
    monkeypatch.setattr(AutoWindow, "length", 2)
    adapter = attached(CONFIG.replace(batch_size=16))
    batches = []
    loss = adapter.branch.loss
    monkeypatch.setattr(adapter.branch, "loss", lambda x, **kw: batches.append(x.clone()) or loss(x, **kw))
    frames = clip()[:6]
    for frame in frames:
        adapter.adapt(frame)
    recent = frames[-2:]
    hits = [[bool(torch.equal(x, old)) for old in recent] for x in batches[-1]]
    assert all(any(hit) for hit in hits)
    assert {hit.index(True) for hit in hits} == {0, 1}


def test_reset_forgets_and_resume_is_exact():
    adapter = attached(CONFIG)
    whole = followed(adapter, clip()[:9])
    state = adapter.state_dict()
    whole += followed(adapter, clip()[9:])
    adapter.reset()
    assert adapter.window == 1
    assert same_bits(followed(adapter, clip()), whole)
    other = attached(CONFIG)
    other.load_state_dict(state)
    assert same_bits(followed(other, clip()[9:]), whole[9:])


def test_a_state_that_does_not_fit_changes_nothing():
    adapter = attached(CONFIG)
    followed(adapter, clip()[:4])
    before = adapter.state_dict()
    with pytest.raises(CheckpointError, match="AutoWindow"):
        adapter.load_state_dict({**before, "auto": {}})
    assert same_bits(adapter.state_dict(), before)


def test_a_step_that_fails_or_whose_gradient_is_not_finite_is_not_measured(monkeypatch):
    adapter = attached(CONFIG)
    followed(adapter, clip()[:4])
    before = adapter.state_dict()["auto"]
    with monkeypatch.context() as patch:
        patch.setattr(adapter.state.optimizer.optimizer, "step", lambda: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            adapter.adapt(clip()[4])
    assert same_bits(adapter.state_dict()["auto"], before)
    loss = adapter.branch.loss
    monkeypatch.setattr(adapter.branch, "loss", lambda x, **kw: loss(x, **kw) * float("inf"))
    assert adapter.adapt(clip()[4]).reason == "non-finite gradient"
    assert same_bits(adapter.state_dict()["auto"], before)


def test_leaving_out_frames_does_not_go_with_it():
    for change in ({"every": 2}, {"gate": "surprise"}):
        with pytest.raises(ConfigError, match="measures a step on each frame"):
            StreamConfig(window="auto", **change)
    with pytest.raises(ConfigError, match='or "auto"'):
        StreamConfig(window="all")
