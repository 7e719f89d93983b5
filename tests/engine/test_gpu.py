"""The promises on a CUDA device: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

import models as zoo
from ttt_adapt import StreamAdapter, StreamConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZE = (64, 96)


def clip(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(3, *SIZE, generator=generator) for _ in range(count)]


def adapter(make, encoder: str, **changes) -> StreamAdapter:
    torch.manual_seed(0)
    config = StreamConfig(window=3, batch_size=2, lr=1e-3).replace(**changes)
    return StreamAdapter(make().cuda().eval(), encoder=encoder, config=config)


CASES = [(zoo.PlainSeg, "backbone"), (zoo.vit, "norm"), (zoo.eva, "norm")]


@pytest.mark.parametrize(("make", "encoder"), CASES)
def test_frames_from_the_host_adapt_a_model_on_the_device_and_reset_repeats_them(make, encoder) -> None:
    with adapter(make, encoder) as a:
        first = [a.step(frame) for frame in clip(3)]
        assert all(prediction.is_cuda for prediction in first)
        assert a.last is not None
        assert a.last.adapted
        a.reset()
        for prediction, frame in zip(first, clip(3), strict=True):
            torch.testing.assert_close(a.step(frame), prediction)


@pytest.mark.parametrize(("make", "encoder"), CASES)
def test_a_learning_rate_of_zero_changes_no_prediction(make, encoder) -> None:
    with adapter(make, encoder, lr=0.0, weight_decay=0.0) as a, torch.no_grad():
        for frame in clip(2):
            assert torch.equal(a.step(frame), a.branch.model(frame[None].cuda()))


def test_a_saved_stream_goes_on_and_bf16_steps_run() -> None:
    frames = clip(4)
    with adapter(zoo.vit, "norm", precision="bf16") as a:
        for frame in frames[:2]:
            a.step(frame)
        state = a.state_dict()
        mine = [a.step(frame) for frame in frames[2:]]
        a.load_state_dict(state)
        for prediction, frame in zip(mine, frames[2:], strict=True):
            torch.testing.assert_close(a.step(frame), prediction)
