from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_adapt.errors import CheckpointError
from ttt_adapt.stream.window import FrameWindow


def frame(value: float, size=(4, 6)) -> torch.Tensor:
    return torch.full((3, *size), float(value))


def filled(capacity: int, frames: int) -> FrameWindow:
    window = FrameWindow(capacity)
    for i in range(frames):
        window.stage(frame(i))
        window.commit()
    return window


def drawn(window: FrameWindow, count: int = 400, seed: int = 0) -> list[float]:
    batch = window.draw(count, torch.Generator().manual_seed(seed))
    return sorted(batch[:, 0, 0, 0].unique().tolist())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(0, 15))
def test_a_draw_sees_exactly_the_last_frames_the_staged_one_included(capacity, before):
    window = filled(capacity, before)
    window.stage(frame(before))
    assert drawn(window) == [float(i) for i in range(max(0, before - capacity + 1), before + 1)]
    assert len(window) == min(before, capacity)


def test_draws_are_with_replacement_and_even():
    window = filled(4, 9)
    window.stage(frame(9))
    values = window.draw(4000, torch.Generator().manual_seed(0))[:, 0, 0, 0]
    for value in (6.0, 7.0, 8.0, 9.0):
        assert (values == value).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_a_frame_that_is_never_committed_leaves_the_window_as_it_was():
    window = filled(3, 5)
    before = window.state_dict()
    window.stage(frame(99))
    after = window.state_dict()
    assert after["seen"] == before["seen"]
    assert torch.equal(after["frames"], before["frames"])
    window.stage(frame(5))
    assert 99.0 not in drawn(window)


def test_the_buffer_is_allocated_once_and_written_in_place():
    window = FrameWindow(4)
    window.stage(frame(0))
    pointer = window.buffer.data_ptr()
    for i in range(20):
        window.stage(frame(i))
        window.commit()
    window.reset()
    window.stage(frame(7))
    assert window.buffer.data_ptr() == pointer
    assert window.buffer.shape[0] == 5


def test_the_window_keeps_a_copy_of_the_frame():
    window, mine = FrameWindow(2), frame(1)
    window.stage(mine)
    mine.fill_(50.0)
    assert drawn(window) == [1.0]


def test_a_draw_is_a_copy():
    window = filled(2, 2)
    window.stage(frame(2))
    window.draw(8, torch.Generator().manual_seed(0)).fill_(70.0)
    assert drawn(window) == [1.0, 2.0]


def test_crops_are_cut_from_the_frames_and_reach_every_corner():
    window = FrameWindow(1)
    image = torch.arange(3 * 5 * 7).float().view(3, 5, 7)
    window.stage(image)
    crops = window.draw(300, torch.Generator().manual_seed(0), (3, 4))
    assert crops.shape == (300, 3, 3, 4)
    assert crops.is_contiguous()  # channels-last would carry on into every convolution
    corners = set()
    for crop in crops:
        y, x = divmod(int(crop[0, 0, 0]), 7)
        assert torch.equal(crop, image[:, y : y + 3, x : x + 4])
        corners.add((y, x))
    assert corners == {(y, x) for y in range(3) for x in range(4)}


def test_a_crop_of_the_whole_frame_is_the_frame():
    window = FrameWindow(1)
    image = torch.randn(3, 5, 7)
    window.stage(image)
    assert torch.equal(window.draw(2, torch.Generator().manual_seed(0), (5, 7)), image.expand(2, 3, 5, 7))


def test_the_generator_decides_every_draw_and_crop():
    window = filled(5, 8)
    window.stage(torch.randn(3, 4, 6))
    batches = [window.draw(16, torch.Generator().manual_seed(seed), (2, 3)) for seed in (1, 1, 2)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_reset_forgets_frames_and_takes_another_size():
    window = filled(3, 4)
    window.reset()
    assert len(window) == 0
    assert window.frame_shape is None
    window.stage(frame(1, (8, 8)))
    window.commit()
    assert window.frame_shape == (3, 8, 8)
    window.stage(frame(2, (8, 8)))
    assert drawn(window) == [1.0, 2.0]


@pytest.mark.parametrize("frames", [0, 1, 3, 4, 9])
def test_a_saved_window_goes_on_where_it_stopped(frames):
    window, other = filled(4, frames), filled(4, 2)
    other.reset()
    other.load_state_dict(window.state_dict())
    for i in range(frames, frames + 6):
        for one in (window, other):
            one.stage(frame(i))
        generators = [torch.Generator().manual_seed(i) for _ in range(2)]
        assert torch.equal(window.draw(9, generators[0]), other.draw(9, generators[1]))
        assert len(window) == len(other)
        for one in (window, other):
            one.commit()


def test_a_saved_window_holds_copies_oldest_first():
    window = filled(3, 5)
    state = window.state_dict()
    assert state["frames"][:, 0, 0, 0].tolist() == [2.0, 3.0, 4.0]
    window.stage(frame(5))
    window.commit()
    assert state["frames"][:, 0, 0, 0].tolist() == [2.0, 3.0, 4.0]


def test_a_saved_window_that_is_damaged_changes_nothing():
    window = filled(3, 2)
    before = window.state_dict()
    with pytest.raises(CheckpointError, match="does not hold the frames that it counts"):
        window.load_state_dict({"frames": torch.zeros(2, 3, 8, 8), "seen": 3})
    assert torch.equal(window.state_dict()["frames"], before["frames"])
    assert window.state_dict()["seen"] == before["seen"]
