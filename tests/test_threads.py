"""Several threads over one model: each gets what it would get alone."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

import models as zoo
from conftest import hooks_of, same_bits, settle_norms
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.errors import StateError
from ttt_adapt.model.features import MapSpec
from ttt_adapt.model.hooks import inputs_of
from ttt_adapt.model.stem import hidden_on_map
from ttt_adapt.model.threads import in_this_thread, lock_of

SIZE = (32, 48)
STILL = StreamConfig(window=2, batch_size=1, lr=0.0, weight_decay=0.0)


def frames(count: int, seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *SIZE, generator=generator) for _ in range(count)]


def attached(config: StreamConfig, make=zoo.TinySeg, encoder: str = "backbone") -> StreamAdapter:
    torch.manual_seed(9)
    model = settle_norms(make())
    return StreamAdapter(model, MAEBranch.attach(model, encoder), config=config)


@contextmanager
def beside(work):
    """Runs `work` in another thread while the block runs; its error is raised here."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield thread
    thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize(("make", "encoder"), [(zoo.TinySeg, "backbone"), (zoo.vit, "norm")], ids=["pixels", "tokens"])
@pytest.mark.parametrize("plain", [False, True], ids=["adapter", "model"])
def test_predictions_beside_steps_are_those_without_them(make, encoder, plain):
    adapter, clip = attached(STILL, make, encoder), frames(6)
    with adapter, torch.no_grad():
        call = (lambda x: adapter.branch.model(x[None])) if plain else adapter.predict
        wanted = [call(frame) for frame in clip]
        with beside(lambda: [adapter.adapt(frame) for frame in clip * 8]) as thread:
            while thread.is_alive():
                for frame, right in zip(clip, wanted, strict=True):
                    assert torch.equal(call(frame), right)
        assert hooks_of(adapter.branch.model) == 0


def test_a_prediction_beside_steps_is_that_of_finished_steps():
    config, clip = STILL.replace(lr=1e-2, norm_stats="ema"), frames(20)
    with attached(config) as alone:
        probe = clip[0]
        finished = [alone.predict(probe)]
        for frame in clip:
            alone.adapt(frame)
            finished.append(alone.predict(probe))
    with attached(config) as adapter, beside(lambda: [adapter.adapt(frame) for frame in clip]) as thread:
        seen = [adapter.predict(probe)]
        while thread.is_alive():
            seen.append(adapter.predict(probe))
    assert all(any(torch.equal(each, one) for one in finished) for each in seen)


def test_steps_of_two_threads_follow_each_other():
    with attached(STILL) as adapter:
        with beside(lambda: [adapter.step(frame) for frame in frames(10)]):
            for frame in frames(10, seed=4):
                adapter.step(frame)
        assert adapter.state.progress.frame_index == 20


def test_two_calibrated_threads_see_their_own_frames_alone():
    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg())
    branch = MAEBranch.attach(model, "backbone")
    branch.calibrate(frames(8))
    with StreamAdapter(model, branch, config=STILL.replace(norm_stats="calibrated")) as adapter:
        clip = [3.0 * frame for frame in frames(5)]
        wanted = [adapter.predict(frame) for frame in clip]
        with beside(lambda: [adapter.step(frame) for frame in frames(20, seed=8)]) as thread:
            while thread.is_alive():
                for frame, right in zip(clip, wanted, strict=True):
                    assert torch.equal(adapter.predict(frame), right)


@pytest.mark.parametrize("points", ["batchnorm", "input"])
def test_a_calibrated_prediction_in_a_worker_thread_is_refused_and_leaves_the_drift(points):
    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg())
    branch = MAEBranch.attach(model, "backbone")
    found = branch.calibrate(frames(8))
    found = found.replace(rule=dataclasses.replace(found.rule, points=points))
    in_worker: list[bool] = []

    def predict(x):
        if not in_worker:
            return model(x)
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(model, x).result()

    config = STILL.replace(norm_stats="calibrated")
    with StreamAdapter(model, branch, config=config, calibration=found, predict=predict) as adapter:
        first, second = frames(2)
        adapter.predict(first)
        drift = adapter.drift
        in_worker.append(True)
        with pytest.raises(StateError, match="another thread.*call the model in the thread"):
            adapter.predict(second)
        assert adapter.drift == drift
        in_worker.clear()
        adapter.predict(second)
        assert adapter.drift != drift
    assert hooks_of(model) == 0


@pytest.mark.parametrize("stats", ["blend", "batch", "ema"])
def test_a_frame_that_is_normalised_by_itself_in_a_worker_thread_is_refused_and_changes_nothing(stats):
    in_worker: list[bool] = []

    def predict(x):
        if not in_worker:
            return adapter.branch.model(x)
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(adapter.branch.model, x).result()

    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg())
    branch = MAEBranch.attach(model, "backbone")
    with StreamAdapter(model, branch, config=STILL.replace(norm_stats=stats), predict=predict) as adapter:
        first, second = frames(2)
        adapter.step(first)
        before = adapter.state_dict()
        in_worker.append(True)
        calls = [adapter.step, adapter.adapt] if stats == "ema" else [adapter.step, adapter.predict]
        for call in calls:
            with pytest.raises(StateError, match="another thread.*call the model in the thread"):
                call(second)
        after = adapter.state_dict()
        same = before.keys() - {"optimizer"}  # gradient steps that were taken stay; at lr=0 they change no weight
        assert all(same_bits(after[name], before[name]) for name in same)
        in_worker.clear()
        adapter.step(second)
    assert hooks_of(model) == 0


def test_the_block_of_statistics_keeps_other_threads_waiting():
    adapter, begun, done = attached(STILL.replace(norm_stats="batch")), threading.Event(), threading.Event()

    def step() -> None:
        begun.set()
        adapter.step(frames(1)[0])
        done.set()

    with adapter:
        with adapter.statistics():
            thread = threading.Thread(target=step)
            thread.start()
            begun.wait()
            assert not done.wait(0.1)
        thread.join()
        assert done.is_set()


def test_a_hook_of_one_thread_is_not_called_by_another():
    seen: list[int] = []
    layer = torch.nn.Linear(2, 2)
    layer.register_forward_hook(in_this_thread(lambda *_: seen.append(threading.get_ident())))
    with beside(lambda: layer(torch.zeros(1, 2))):
        pass
    layer(torch.zeros(1, 2))
    assert seen == [threading.get_ident()]


def test_another_thread_that_calls_the_model_meets_no_hook_of_a_look_at_what_a_module_gets():
    entered, looked = threading.Event(), threading.Event()
    layer = torch.nn.Linear(2, 2)
    wanted, images, seen = layer(torch.ones(1, 2)), torch.zeros(1, 2), []

    def model(x):
        entered.set()
        assert looked.wait(10)
        return layer(x)

    def other() -> None:
        assert entered.wait(10)
        seen.append(layer(torch.ones(1, 2)))
        looked.set()

    with beside(other):
        try:
            assert inputs_of(model, layer, images) == [images]
        finally:
            looked.set()
    assert torch.equal(seen[0], wanted)


def test_another_thread_that_calls_the_first_layer_is_not_told_of_hidden_pixels():
    stem, spec = torch.nn.Conv2d(3, 4, 4, 4), MapSpec(0, "nchw", 4, 4)
    images, seen = torch.randn(1, 3, 8, 8), []
    plain = stem(images)
    with hidden_on_map(stem, spec, lambda hidden: hidden[..., ::4, ::4].expand(-1, 4, -1, -1), torch.ones(1, 1, 8, 8)):
        with beside(lambda: seen.append(stem(images))):
            pass
        torch.testing.assert_close(stem(images), plain + 1)
    assert torch.equal(seen[0], plain)


def test_a_model_has_one_lock_which_its_thread_may_take_again():
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert lock_of(model) is lock_of(model)
    assert lock_of(model) is not lock_of(other)
    with lock_of(model), lock_of(model), lock_of(other):
        pass
