"""Arms that see the whole clip first: the order of frames, and which weights an oracle keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arm_inputs import CONFIG, checkpoint, frames
from conftest import same_bits
from ttt_adapt.arms import find_arm
from ttt_adapt.errors import StateError
from ttt_adapt.evaluation.runners import start
from ttt_adapt.evaluation.runners.whole_clip import Offline, Shuffled


class Echo:
    """Predicts the brightness of the frame; its loss counts the steps."""

    def __init__(self):
        self.loss, self.seen = None, []

    def step(self, frame):
        self.seen.append(int(frame))
        self.loss = float(len(self.seen))
        return F.one_hot(torch.full((1, 2, 2), int(frame)), 9).movedim(-1, 1).float()

    def close(self):
        pass


def test_shuffled_frames_are_seen_in_random_order_and_predictions_are_put_back():
    echo = Echo()
    runner = Shuffled(echo, seed=3)
    runner.prepare(list(range(9)))
    assert sorted(echo.seen) == list(range(9))
    assert echo.seen != sorted(echo.seen)
    found, losses = [], []
    for frame in range(9):
        found.append(int(runner.step(frame).argmax(1)[0, 0, 0]))
        losses.append(int(runner.loss))
    assert found == list(range(9))
    assert losses == [echo.seen.index(frame) + 1 for frame in range(9)]
    with pytest.raises(StateError, match="more frames than prepare"):
        runner.step(9)


def test_offline_adapts_to_shuffled_frames_for_a_fixed_number_of_steps():
    made, clip = checkpoint(), frames()
    runner = start(find_arm("offline-10"), made, CONFIG.replace(source_pull=0.5, every=2))
    seen = []
    adapt = runner.runner.adapter.adapt
    runner.runner.adapter.adapt = lambda frame: (seen.append(frame), adapt(frame))
    runner.prepare([frame for frame, _ in clip])
    position = [next(i for i, (frame, _) in enumerate(clip) if frame is one) for one in seen]
    assert len(seen) == 10
    assert sorted(position[:4]) == sorted(position[4:8]) == [0, 1, 2, 3]
    config = runner.runner.adapter.config
    assert (config.source_pull, config.every, config.carry_weights) == (0.0, 1, True)
    weights = {k: v.clone() for k, v in made.model.state_dict().items()}
    runner.step(clip[0][0])
    assert same_bits(weights, dict(made.model.state_dict()))
    runner.close()


@pytest.mark.parametrize("best", [0, 1, 5, 12])
def test_the_oracle_keeps_the_weights_of_the_best_step_it_looked_at(best):
    made, clip = checkpoint(), [frame for frame, _ in frames()]
    scored = []
    runner = start(find_arm("offline-oracle-12"), made, CONFIG)
    assert isinstance(runner, Offline)

    stops = [0, 1, 2, 5, 10, 12]

    def score(predict):
        scored.append({k: v.clone() for k, v in made.model.state_dict().items()})
        return float(stops[len(scored) - 1] == best)

    runner.prepare(clip, score)
    assert len(scored) == len(stops)
    assert same_bits(dict(made.model.state_dict()), scored[stops.index(best)])
    runner.close()
