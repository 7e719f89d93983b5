"""What every engine promises, and what each adds. `pytest -m gpu` runs the matrix on a CUDA device."""

from __future__ import annotations

import copy
import itertools
import resource
import shutil
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import models as zoo
from conftest import left_as_it_was, live_tensors, same_bits, settle_norms
from tape import TapeRecorder
from ttt_adapt import MAEBranch, Normalize, StreamAdapter, StreamConfig
from ttt_adapt.engine.choose import no_recording
from ttt_adapt.engine.compiled import CompileEngine
from ttt_adapt.engine.eager import EagerEngine, apart
from ttt_adapt.engine.gradient_step import PATIENCE, GradientStep
from ttt_adapt.engine.graphs import KEPT, WARM_UP, CudaRecorder, GraphEngine, cached_tensors
from ttt_adapt.engine.precision import both_passes
from ttt_adapt.errors import ConfigError, EncoderError
from ttt_adapt.model.frames import copied_beside, copy_stream
from ttt_adapt.objectives import Entropy
from ttt_adapt.stream.optimizer import FusedAdamW, StreamOptimizer, adamw, step_if, total_norm

SIZE = (32, 48)
CONFIG = StreamConfig(window=3, batch_size=2, lr=1e-3, source_pull=0.2, grad_clip=1.0, seed=11)
ENGINES = ["eager", "compile", "cudagraph"]
FAMILIES = {"pixels": (zoo.TinySeg, "backbone"), "tokens": (zoo.vit, "norm")}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Kernels sum in another order, and Adam turns a rounding error of a gradient next to nothing into a step of up to `lr`.
TOLERANCE = {"eager": (0.0, 0.0), "cudagraph": (0.0, 0.0), "compile": (1e-3, 2e-3)}


def clip(count: int, size=SIZE, seed: int = 21) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator) for _ in range(count)]


def stand_in(kind: str):
    """What `choose_engine` gives for `kind`, on the CPU and without a C++ compiler."""

    def choose(step, optimizer):
        if kind == "compile":
            return CompileEngine(step, backend="aot_eager")
        if kind == "cudagraph":
            assert not no_recording(step.config, step.objective, type(optimizer))
            return GraphEngine(step, TapeRecorder())
        return EagerEngine(step)

    return choose


engines = weakref.WeakKeyDictionary()
"""The adapters that `make` made -> their engines."""


@pytest.fixture
def make(monkeypatch):
    """make(kind, family, **changes of CONFIG) -> an adapter on the same model and branch at every call."""

    def build(kind: str, family: str = "pixels", model=None, choose=None, **changes) -> StreamAdapter:
        chosen = []

        def noted(*given):
            chosen.append((choose or stand_in(kind))(*given))
            return chosen[-1]

        monkeypatch.setattr("ttt_adapt.adapter.choose_engine", noted)
        torch.manual_seed(9)
        made, encoder = FAMILIES[family]
        model = settle_norms(made()) if model is None else model
        adapter = StreamAdapter(model, MAEBranch.attach(model, encoder), config=CONFIG.replace(**changes))
        engines[adapter] = chosen[0]
        return adapter

    yield build
    torch._dynamo.reset()


def weights(adapter: StreamAdapter) -> dict[str, torch.Tensor]:
    return adapter.state_dict()["weights"]


def assert_near(mine, theirs, kind: str) -> None:
    rtol, atol = TOLERANCE[kind]
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---- one matrix for all engines


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ENGINES[1:])
def test_fifty_frames_are_those_of_the_eager_engine(make, kind, family):
    frames = clip(50)
    eager, other = make("eager", family), make(kind, family)
    for frame in frames:
        assert_near([other.step(frame)], [eager.step(frame)], kind)
        assert other.last.losses == pytest.approx(eager.last.losses, rel=TOLERANCE[kind][0] or 1e-12)
    assert_near(weights(other).values(), weights(eager).values(), kind)


@pytest.mark.parametrize(
    "changes",
    [
        {"restart_optimizer": True}, {"iterations": 2, "every": 2}, {"crop_size": (16, 32)}, {"carry_weights": False},
        {"norm_stats": "ema"}, {"norm_stats": "batch"}, {"norm_stats": "blend"}, {"precision": "bf16"},
        {"micro_batch": 1}, {"gate": "surprise"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ENGINES[1:])
def test_every_setting_means_the_same_on_every_engine(make, kind, changes):
    frames = clip(8)
    eager, other = make("eager", **changes), make(kind, **changes)
    rtol, atol = (5e-2, 5e-2) if "precision" in changes and kind == "compile" else TOLERANCE[kind]
    for frame in frames:
        torch.testing.assert_close(other.step(frame), eager.step(frame), rtol=rtol, atol=atol)
        assert (other.last.adapted, other.last.reason) == (eager.last.adapted, eager.last.reason)


@pytest.mark.parametrize("norm_stats", ["ema", "blend", "batch"])
def test_statistics_of_a_frame_are_no_change_of_the_model_to_a_recording(make, norm_stats):
    eager, recorded = (make(kind, norm_stats=norm_stats) for kind in ("eager", "cudagraph"))
    for frame in clip(PATIENCE + WARM_UP + 10):
        assert same_bits(recorded.step(frame), eager.step(frame))


def test_activation_checkpointing_is_recorded_as_it_runs(make):
    plain, recorded = make("eager", "tokens"), make("cudagraph", "tokens", grad_checkpointing=True)
    for frame in clip(WARM_UP + 5):
        assert same_bits(recorded.step(frame), plain.step(frame))
    assert same_bits(weights(recorded), weights(plain))


def test_activation_checkpointing_is_refused_by_the_compiler():
    model = settle_norms(zoo.vit())
    with (
        left_as_it_was(model),
        pytest.raises(ConfigError, match="combined with grad_checkpointing: set micro_batch"),
    ):
        StreamAdapter(model, encoder="norm", config=CONFIG.replace(engine="compile", grad_checkpointing=True))


@pytest.mark.parametrize("norm_stats", ["ema", "blend", "batch"])
@pytest.mark.parametrize("kind", ENGINES[1:])
def test_norms_behind_global_pooling_keep_their_statistics_on_every_engine(make, kind, norm_stats):
    model = settle_norms(zoo.PooledSeg())
    adapters = [make(k, model=copy.deepcopy(model), norm_stats=norm_stats, lr=0.0) for k in ("eager", kind)]
    for frame in clip(WARM_UP + 4):
        expected, found = (adapter.step(frame) for adapter in adapters)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_near(weights(adapters[1]).values(), weights(adapters[0]).values(), kind)


@pytest.mark.parametrize("kind", ["eager", "compile"])
def test_stochastic_depth_is_drawn_anew_at_every_step_and_never_in_a_prediction(make, kind):
    model, frame = zoo.vit(drop_path_rate=0.5).eval(), clip(1)[0]
    with torch.no_grad():
        plain = model(frame[None])
    losses = {}
    for asked in (False, True):  # the same frames, masks and weights
        with make(kind, "tokens", model, lr=0.0, drop_path=asked) as adapter:
            losses[asked] = [adapter.adapt(frame).losses[0] for _ in range(2 * WARM_UP + 2)]
            torch.testing.assert_close(adapter.predict(frame), plain, rtol=1e-4, atol=1e-4)
    shares = [dropped / whole for dropped, whole in zip(losses[True], losses[False], strict=True)]
    assert len(set(shares)) == len(shares)
    assert 1.0 not in shares


@pytest.mark.parametrize("kind", ["eager", "compile"])
def test_what_stochastic_depth_drops_is_for_the_seed_of_the_stream_to_decide(make, kind):
    frames, found = clip(4), []
    for outer in (1, 2):
        torch.manual_seed(3)
        adapter = make(kind, "tokens", zoo.vit(drop_path_rate=0.5).eval(), drop_path=True)
        torch.manual_seed(outer)
        found.append([adapter.step(frame) for frame in frames])
    assert same_bits(*found)


def test_recordings_are_refused_where_stochastic_depth_has_to_be_repeatable():
    branch = MAEBranch.attach(zoo.vit(drop_path_rate=0.5), "norm")
    assert "drop_path" in no_recording(CONFIG.replace(drop_path=True), branch, FusedAdamW)


@pytest.mark.parametrize("kind", ENGINES)
def test_at_lr_zero_no_prediction_changes_by_a_bit(make, kind):
    adapter, frames = make(kind, lr=0.0), clip(6)
    plain = [adapter.predict(frame) for frame in frames]
    assert all(same_bits(adapter.step(frame), p) for frame, p in zip(frames, plain, strict=True))
    if kind != "compile":  # compiled kernels round in their own way
        with torch.no_grad():
            assert same_bits(plain, [adapter.branch.model(frame[None]) for frame in frames])


@pytest.mark.parametrize("kind", ENGINES)
def test_reset_then_the_same_frames_give_the_same_bits(make, kind):
    adapter, frames = make(kind), clip(6)
    fresh = adapter.state_dict()
    first = [adapter.step(frame) for frame in frames]
    adapter.reset()
    assert same_bits(adapter.state_dict(), fresh)
    assert same_bits([adapter.step(frame) for frame in frames], first)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_saved_stream_goes_on_with_the_same_bits(make, kind):
    adapter, frames = make(kind), clip(9)
    for frame in frames[:5]:
        adapter.step(frame)
    state = adapter.state_dict()
    expected = [adapter.step(frame) for frame in frames[5:]]
    other = make(kind)
    other.load_state_dict(state)
    assert same_bits([other.step(frame) for frame in frames[5:]], expected)


def test_a_stream_saved_on_one_engine_goes_on_on_another(make):
    eager, frames = make("eager", engine="eager"), clip(9)
    for frame in frames[:5]:
        eager.step(frame)
    other = make("cudagraph", engine="auto")
    other.load_state_dict(eager.state_dict())
    assert same_bits([other.step(frame) for frame in frames[5:]], [eager.step(frame) for frame in frames[5:]])


@pytest.mark.parametrize("kind", ENGINES)
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(make, kind):
    adapter, frames = make(kind, window=1, source_pull=0.0), clip(6)
    for frame in frames[:4]:
        adapter.step(frame)
    before = adapter.state_dict()
    adapter.step(torch.full((3, *SIZE), 1e25))
    after = adapter.state_dict()
    assert (adapter.last.adapted, adapter.last.reason) == (False, "non-finite gradient")
    assert not np.isfinite(adapter.last.losses[0])
    assert same_bits(after["weights"], before["weights"])
    assert same_bits(after["optimizer"], before["optimizer"])
    adapter.step(frames[5])
    assert adapter.last.adapted
    assert all(w.isfinite().all() for w in weights(adapter).values())


@pytest.mark.parametrize("kind", ENGINES)
def test_detach_gives_the_model_back_as_it_was(make, kind):
    model = settle_norms(zoo.TinySeg())
    with left_as_it_was(model):
        adapter = make(kind, model=model, norm_stats="ema")
        for frame in clip(5):
            adapter.step(frame)
        adapter.detach()


@pytest.mark.parametrize("kind", ENGINES)
def test_a_head_whose_weights_are_replaced_predicts_with_the_new_ones(make, kind):
    model, frame = settle_norms(zoo.TinySeg()), clip(1)[0]
    adapter = make(kind, model=model, lr=0.0)
    for _ in range(WARM_UP + 2):
        adapter.step(frame)
    model.head.load_state_dict({name: w + 1 for name, w in model.head.state_dict().items()}, assign=True)
    for _ in range(WARM_UP + 2):
        with torch.no_grad():
            expected = model(frame[None])
        assert_near([adapter.predict(frame)], [expected], kind)
        assert_near([adapter.step(frame)], [expected], kind)


@pytest.mark.parametrize("kind", ENGINES)
def test_weights_that_are_replaced_mid_stream_are_an_error(make, kind):
    model = settle_norms(zoo.TinySeg())
    adapter, frames = make(kind, model=model, window=1), clip(5)
    for frame in frames[:4]:
        adapter.step(frame)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    for _ in range(2):  # it does not get used to it
        with pytest.raises(EncoderError, match=r"were replaced.*StreamAdapter\(model, branch\)"):
            adapter.step(frames[4])


@pytest.mark.parametrize("kind", ENGINES)
def test_a_buffer_that_is_replaced_mid_stream_is_heeded_at_once(make, kind):
    model = settle_norms(zoo.TinySeg())
    adapters = [make(k, model=copy.deepcopy(model), lr=0.0) for k in ("eager", kind)]
    for index, frame in enumerate(clip(2 * WARM_UP + 4)):
        for adapter in adapters:
            norm = next(m for m in adapter.branch.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
            if index == WARM_UP + 3:
                norm.running_mean = norm.running_mean + 5
        expected, found = ((adapter.step(frame), adapter.last.losses[0]) for adapter in adapters)
        assert found[1] == pytest.approx(expected[1], rel=1e-4)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENGINES)
def test_five_thousand_frames_leave_memory_flat(make, kind):
    adapter = make(kind, restart_optimizer=True)
    stream = adapter.stream(torch.randn(3, 16, 32) for _ in itertools.count())

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB on Linux

    for _ in itertools.islice(stream, 500):
        pass
    warm, tensors = peak(), live_tensors()
    for _ in itertools.islice(stream, 4500):
        pass
    assert peak() - warm < 8
    assert live_tensors() == tensors


class Rebinding(zoo.PlainSeg):
    """Counts its passes in a buffer that it makes anew in each."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen = self.seen + 1
        return super().forward(x)


@pytest.mark.parametrize("kind", ENGINES[1:])
def test_a_model_that_never_rests_is_refused_by_what_is_written_down_once(make, kind):
    frames = clip(20)
    eager = make("eager", model=Rebinding().eval())
    for frame in frames:
        eager.step(frame)
    other = make(kind, model=Rebinding().eval())
    with pytest.raises(ConfigError, match="its 'seen' at every frame.*use engine=\"eager\""):
        list(other.stream(frames))


def test_a_model_with_a_sparse_buffer_streams():
    model = zoo.PlainSeg().eval()
    model.register_buffer("graph", torch.eye(3).to_sparse())
    with StreamAdapter(model, encoder="backbone", config=CONFIG) as adapter:
        for frame in clip(2):
            adapter.step(frame)
        assert adapter.last.adapted


@pytest.mark.parametrize("kind", ENGINES)
def test_weights_of_the_branch_that_are_replaced_mid_stream_are_an_error(make, kind):
    adapter, frames = make(kind, window=1), clip(5)
    for frame in frames[:4]:
        adapter.step(frame)
    adapter.branch.load_state_dict({n: v.clone() for n, v in adapter.branch.state_dict().items()}, assign=True)
    with pytest.raises(EncoderError, match=r"the branch's parameters.*StreamAdapter\(model, branch\)"):
        adapter.step(frames[4])


@pytest.mark.parametrize("kind", ENGINES)
def test_videos_that_take_turns_over_one_model_are_streams_of_their_own_on_every_engine(make, kind):
    clips = [clip(2 * WARM_UP + 6), clip(2 * WARM_UP + 6, seed=5)]
    alone, shared = [make(kind, window=2) for _ in clips], make(kind, window=2)
    states = [shared.state, shared.new_state()]
    for index, frames in enumerate(zip(*clips, strict=True)):
        for adapter, state, frame in zip(alone, states, frames, strict=True):
            shared.swap(state)
            assert_near([shared.step(frame)], [adapter.step(frame)], kind)
        if index == WARM_UP + 3:  # by now both are recorded
            states[0].reset()
            alone[0].reset()


@pytest.mark.parametrize("norm_stats", ["frozen", "ema"])
@pytest.mark.parametrize("kind", ENGINES[1:])
def test_frames_with_a_context_give_the_eager_results_and_the_reason_says_so(monkeypatch, kind, norm_stats):
    normalize, found = Normalize(), []
    frames = np.random.default_rng(0).integers(0, 256, (WARM_UP + 3, *SIZE, 3), dtype=np.uint8)
    for engine in ("eager", kind):
        monkeypatch.setattr("ttt_adapt.adapter.choose_engine", stand_in(engine))
        torch.manual_seed(9)
        model, numbers = settle_norms(zoo.TinySeg()), itertools.count()
        adapter = StreamAdapter(
            model,
            encoder="backbone",
            config=CONFIG.replace(norm_stats=norm_stats),
            preprocess=lambda frame, numbers=numbers: (normalize(frame), next(numbers)),
            predict=lambda x, number, model=model: model(x) + number,
        )
        found.append([adapter.step(frame) for frame in frames])
    assert_near(found[1], found[0], kind)
    assert "context" in adapter.engine[1]


# ---- compile


def test_what_breaks_while_a_compiled_pass_runs_is_not_called_the_compilers_fault(make, monkeypatch):
    def breaks_at_the_second_run(call, **_options):
        runs = []

        def run(*inputs):
            runs.append(1)
            if len(runs) > 1:
                raise RuntimeError("device-side assert")
            return call(*inputs)

        return run

    adapter, frames = make("compile"), clip(3)
    monkeypatch.setattr(torch, "compile", breaks_at_the_second_run)
    adapter.step(frames[0])
    with pytest.raises(RuntimeError, match="device-side assert"):
        adapter.step(frames[1])


def test_what_stochastic_depth_drops_is_repeated_after_a_reset_and_a_load(make):
    frames, losses, state, model = clip(6), [], None, zoo.vit(drop_path_rate=0.5).eval()
    adapter, fresh = (make("compile", "tokens", copy.deepcopy(model), drop_path=True) for _ in range(2))
    for _ in range(2):
        for index, frame in enumerate(frames):
            adapter.step(frame)
            losses.append(adapter.last.losses[0])
            if index == 2:
                state = adapter.state_dict()
        adapter.reset()
    assert losses[:6] == losses[6:]
    fresh.load_state_dict(state)
    for frame, expected in zip(frames[3:], losses[3:6], strict=True):
        fresh.step(frame)
        assert fresh.last.losses[0] == expected


def test_a_pass_that_cannot_be_compiled_is_refused_and_the_stream_stays_as_it_was(make):
    class Reading(zoo.PlainSeg):
        def forward(self, x):
            return super().forward(x * float(x.detach().abs().max() > 0))

    model = Reading().eval()
    adapter = make("compile", model=model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match='cannot be compiled.*use engine="eager"'):
        adapter.step(clip(1)[0])
    assert same_bits(list(model.state_dict().values()), list(before.values()))
    assert adapter.last is None


def test_a_steady_stream_has_no_graph_break_and_no_recompilation(make):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for family in FAMILIES:
        adapter, frames = make("compile", family), clip(12)
        adapter.step(frames[0])
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            for frame in frames[1:]:
                adapter.step(frame)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        assert engines[adapter].kept[0] == 1
        adapter.detach()
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_pass_leaves_no_python_of_the_branch_in_a_step(make):
    adapter, frames = make("compile"), clip(3)
    adapter.step(frames[0])
    adapter.branch.loss_of = lambda *_: pytest.fail("the loss ran as Python")
    adapter.step(frames[1])
    assert adapter.last.adapted


def test_predictions_of_every_shape_are_compiled_however_many_came_before(make):
    with torch._dynamo.config.patch(error_on_recompile=True):
        adapters = [make("compile") for _ in range(2)]
        for size in [(32, 48), (48, 32), (48, 48), (32, 32), (64, 32)]:
            for adapter in adapters:
                adapter.predict(clip(1, size)[0])
                assert engines[adapter].kept[1] <= KEPT


def test_gradients_that_share_memory_are_clipped_once(make):
    class Twice(zoo.PlainSeg):  # two biases with one and the same gradient
        def __init__(self):
            super().__init__()
            self.backbone.append(torch.nn.Conv2d(12, 12, 1))
            self.backbone.append(Sum(12))

    class Sum(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b = (torch.nn.Parameter(torch.zeros(width, 1, 1)) for _ in range(2))

        def forward(self, x):
            return x + self.a + self.b

    frames, found = clip(3), []
    for kind in ("eager", "compile"):
        torch.manual_seed(9)
        adapter = make(kind, model=Twice().eval(), grad_clip=1e-3)
        found.append([adapter.step(frame) for frame in frames])
    assert_near(*found, "compile")


class Aliased:
    """One gradient for both `p` and `q`, one whose elements are one number for `r`; from the second pass on, `s`."""

    def __init__(self):
        self.passes, self.model = 0, torch.nn.Identity()
        self.p, self.q, self.r, self.s = (torch.nn.Parameter(torch.ones(3)) for _ in range(4))

    def encoder_parameters(self):
        return {name: getattr(self, name) for name in "spqr"}

    def named_parameters(self):
        return iter(())

    def loss(self, images, *, generator=None):
        self.passes += 1
        late = (self.s**2).sum() if self.passes > 1 else 0.0
        return ((self.p + self.q) ** 2).sum() + self.r.sum() + late


@pytest.mark.parametrize("parts", [None, 1])
def test_gradients_in_one_memory_are_scaled_once_and_meet_their_own_parameter(parts):
    objective = Aliased()
    step = GradientStep(objective, CONFIG.replace(micro_batch=parts))
    EagerEngine(step).gradients(torch.zeros(2, 3, *SIZE), torch.Generator())
    found = [p.grad for p in (objective.s, objective.p, objective.q, objective.r)]
    assert (found[0] is None) == (parts is None)
    expected = [torch.full((3,), value) for value in (1.0, 4.0, 4.0, 1.0)]
    assert same_bits(found[1:], expected[1:])
    assert found[0] is None or same_bits(found[0], expected[0])
    for gradient in found[1:]:
        gradient.mul_(0.5)
    assert same_bits(found[1:], [e * 0.5 for e in expected[1:]])


@pytest.mark.parametrize("kind", ENGINES)
def test_other_settings_of_the_branch_are_heeded_at_once(make, kind):
    eager, other, frames = make("eager", window=1), make(kind, window=1), clip(WARM_UP + 2)
    for adapter in (eager, other):
        for frame in frames[:-1]:
            adapter.step(frame)
        with adapter.branch.using(loss_on="all"):
            adapter.step(frames[-1])
    assert other.last.losses == pytest.approx(eager.last.losses, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_compiler_itself_gives_the_results_of_the_eager_engine(monkeypatch):
    adapters = []
    for engine in ("eager", "compile"):
        torch.manual_seed(9)
        model = settle_norms(zoo.PlainSeg())
        adapters.append(StreamAdapter(model, encoder="backbone", config=CONFIG.replace(engine=engine)))
    assert adapters[1].engine == ("compile", "asked for")
    for frame in clip(10):
        assert_near([adapters[1].step(frame)], [adapters[0].step(frame)], "compile")


# ---- CUDA graphs, on a tape


def test_after_its_recording_a_step_runs_no_python_of_the_model(make):
    adapter, frames = make("cudagraph", window=2), clip(10)
    recorder = engines[adapter].recorder
    for frame in frames[:5]:
        adapter.step(frame)
    assert (recorder.recorded, recorder.replayed) == (2, 2 * 5 - 2 * WARM_UP - 1)  # one frame while the window filled
    adapter.branch.loss = adapter.branch.model.forward = lambda *_, **__: pytest.fail("Python ran")
    for frame in frames[5:]:
        adapter.step(frame)
    assert recorder.recorded == 2


class NothingKept:
    """A recorder whose recordings keep alive what a graph does: its own results, and no tensor that it reads."""

    def record(self, call, generator=None):
        replay, result = TapeRecorder().record(call, generator)
        del replay
        return (lambda: None), result

    def forget(self):
        pass


def test_what_a_recording_reads_stays_in_memory_though_its_owner_replaces_it(make):
    def choose(step, _optimizer):
        return GraphEngine(step, NothingKept())

    adapter = make("cudagraph", "tokens", choose=choose, window=1, crop_size=(16, 32))
    frames = clip(WARM_UP + 1)
    for frame in frames:
        adapter.step(frame)
    tables = [weakref.ref(table) for table in cached_tensors(adapter.branch)]
    for width in range(64, 64 + 16 * KEPT, 16):  # as many other grids as the decoder keeps
        adapter.branch.reconstruct(torch.zeros(1, 3, 32, width))
    assert tables
    assert all(table() is not None for table in tables)
    adapter.reset()  # which drops the recordings
    assert all(table() is None for table in tables)


def test_a_callers_autocast_is_in_what_is_recorded_and_does_not_keep_old_weights(make):
    adapters, frames = [make(kind, "tokens", lr=1e-2) for kind in ("eager", "cudagraph")], clip(3 * WARM_UP + 4)
    for frame in frames[: WARM_UP + 1]:
        for adapter in adapters:
            adapter.predict(frame)
    with torch.autocast("cpu", torch.bfloat16):
        for frame in frames[:3]:
            outs = [adapter.predict(frame) for adapter in adapters]
        assert outs[0].dtype == outs[1].dtype == torch.bfloat16
        for frame in frames:
            expected, found = (adapter.step(frame) for adapter in adapters)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_statistics_renewed_under_a_callers_autocast_are_the_eager_engines(make):
    model = settle_norms(zoo.TinySeg())
    adapters = [make(kind, model=copy.deepcopy(model), norm_stats="ema") for kind in ("eager", "cudagraph")]
    frames = clip(2 * WARM_UP + 6)
    for place, frame in enumerate(frames):
        with torch.autocast("cpu", torch.bfloat16, enabled=place > WARM_UP + 3):
            for adapter in adapters:
                adapter.step(frame)
    assert_near(weights(adapters[1]).values(), weights(adapters[0]).values(), "cudagraph")


def test_running_out_of_memory_while_recording_ends_the_recordings_and_no_more(make):
    class Full(TapeRecorder):
        def record(self, call, generator=None):
            if self.recorded == 1:
                self.recorded += 1
                raise torch.OutOfMemoryError("the card is full")
            return super().record(call, generator)

    def choose(step, _optimizer):
        return GraphEngine(step, Full())

    adapter, eager, frames = make("cudagraph", choose=choose, window=1), make("eager", window=1), clip(4 * WARM_UP + 6)
    for frame in frames:  # the second recording is the prediction's, which may run eagerly
        assert_near([adapter.step(frame)], [eager.step(frame)], "cudagraph")
    assert "the predict pass runs eagerly" in adapter.engine[1]
    assert engines[adapter].recorder.replayed > 0


def test_predictions_of_many_sizes_before_a_stream_do_not_end_its_recordings(make):
    adapter = make("cudagraph", window=1)
    for width in range(16, 16 + 16 * (KEPT + 1), 16):
        for _ in range(WARM_UP + 1):
            adapter.predict(torch.zeros(3, 16, width))
    for frame in clip(2 * WARM_UP + 4):
        adapter.step(frame)
    assert "eagerly" not in adapter.engine[1]
    assert engines[adapter].recorder.replayed > KEPT + 1


class FakeCuda:
    """The calls of `torch.cuda` that a recording makes, in order."""

    def __init__(self, monkeypatch):
        self.calls = calls = []

        def noted(name, result=None):
            return lambda *args, **keywords: calls.append((name, *args, *keywords.values())) or result

        def block(name):
            @contextmanager
            def within(*_):
                calls.append((f"enter {name}",))
                try:
                    yield
                finally:
                    calls.append((f"leave {name}",))

            return within

        class Stream:
            device_index = 1

            def __init__(self, *_):
                calls.append(("new stream",))

            wait_stream = noted("wait")

        class Graph:
            register_generator_state = noted("register")
            replay = noted("replay")

            def capture_begin(self, pool=None, capture_error_mode=""):
                calls.append(("begin", pool, capture_error_mode))

            def capture_end(self):
                calls.append(("end",))

            def pool(self):
                return "pool"

        self.device = torch.device("cuda:1")
        for name, value in {
            "CUDAGraph": Graph, "Stream": Stream, "stream": block("stream"), "device": block("device"),
            "synchronize": noted("synchronize"), "current_stream": Stream,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def clone_state(self):
        return "as before"

    def graphsafe_set_state(self, state):
        self.calls.append(("set state", state))


class FakeTensor:
    """A frame on a GPU."""

    device = torch.device("cuda:1")

    def __init__(self, calls, name):
        self.calls, self.name = calls, name

    def clone(self):
        return FakeTensor(self.calls, f"copy of {self.name}")

    def record_stream(self, stream):
        self.calls.append(("used by", self.name))

    def to(self, device, non_blocking):
        self.calls.append(("copy", device, non_blocking))
        return FakeTensor(self.calls, f"{self.name} over there")


def test_a_frame_is_copied_beside_the_step_that_still_runs(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    copy_stream.cache_clear()
    for _ in range(2):
        assert copied_beside(FakeTensor(cuda.calls, "frame"), torch.device("cuda")).name == "frame over there"
        within = cuda.calls.index(("enter stream",)), cuda.calls.index(("leave stream",))
        assert within[0] < cuda.calls.index(("copy", "cuda:1", True)) < within[1]
        assert [call[0] for call in cuda.calls[within[1] + 1 :]] == ["wait", "used by"]
        streams = cuda.calls.count(("new stream",))  # one of its own, and what stands for the caller's
        cuda.calls.clear()
    copy_stream.cache_clear()
    assert streams == 1


def test_a_failed_recording_gives_back_stream_random_source_and_pool(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    recorder = CudaRecorder(cuda.device)
    replay, result = recorder.record(lambda: cuda.calls.append(("work",)) or 7, cuda)
    assert result == 7
    names = [call[0] for call in cuda.calls]
    assert names.index("enter device") < names.index("enter stream") < names.index("begin") < names.index("work")
    assert names.index("work") < names.index("end") < names.index("leave stream") < names.index("leave device")
    assert ("begin", None, "thread_local") in cuda.calls
    replay()
    assert cuda.calls[-1][0] == "replay"
    cuda.calls.clear()
    with pytest.raises(RuntimeError, match="it waits"):
        recorder.record(lambda: (_ for _ in ()).throw(RuntimeError("it waits")), cuda)
    names = [call[0] for call in cuda.calls]
    assert ("begin", "pool", "thread_local") in cuda.calls
    assert names[-4:] == ["end", "set state", "leave stream", "leave device"]
    assert ("set state", "as before") in cuda.calls
    cuda.calls.clear()
    recorder.record(lambda: None, cuda)  # on a stream and in memory that saw no failure
    assert ("begin", None, "thread_local") in cuda.calls
    assert ("new stream",) in cuda.calls


def test_predictions_and_reports_outlive_the_next_replay(make):
    adapter, frames = make("cudagraph", window=1), clip(8)
    for frame in frames[:4]:
        adapter.step(frame)
    kept, report = adapter.step(frames[4]), adapter.last
    copy, losses = kept.clone(), make("eager", window=1)
    for frame in frames[5:]:
        adapter.step(frame)
    assert torch.equal(kept, copy)
    for frame in frames[:5]:
        losses.step(frame)
    assert report.losses == losses.last.losses


def test_a_video_of_another_size_is_recorded_anew_and_few_recordings_are_kept(make):
    adapter = make("cudagraph", window=1)
    for size in [(32, 48), (48, 32), (32, 48), (48, 48)]:
        eager = make("eager", window=1)
        adapter.reset()
        for frame in clip(4, size):
            assert same_bits(adapter.step(frame), eager.step(frame))
        assert engines[adapter].kept <= KEPT
    assert engines[adapter].recorder.recorded == 8


@pytest.mark.parametrize("inside_first", [True, False])
def test_a_recording_serves_inside_and_outside_of_inference_mode(make, inside_first):
    adapter, eager, frames = make("cudagraph", window=1), make("eager", window=1), clip(8)
    for i, frame in enumerate(frames):
        with torch.inference_mode((i < 4) == inside_first):
            found = adapter.step(frame)
        assert same_bits(found.clone(), eager.step(frame))
    assert engines[adapter].recorder.recorded == 2


class WaitingHead(zoo.TinySeg):
    def forward(self, x):
        return super().forward(x) * float(x.mean().isfinite())


class WaitingEncoder(zoo.TinySeg):
    def forward(self, x):
        return super().forward(x * float(x.mean().isfinite()))


def test_an_update_that_cannot_be_recorded_is_refused_and_the_stream_stays_as_it_was(make):
    adapter, frames = make("cudagraph", model=settle_norms(WaitingEncoder()), window=1, source_pull=0.0), clip(6)
    for frame in frames[:WARM_UP]:
        adapter.step(frame)
    before = adapter.state_dict()
    with pytest.raises(ConfigError, match=r'the update pass.*cannot be recorded.*wait for the device.*engine="eager"'):
        adapter.step(frames[2])
    assert same_bits(adapter.state_dict(), before)


def test_a_prediction_that_cannot_be_recorded_runs_eagerly_and_says_so(make):
    frames, adapters = clip(6), []
    for kind in ("cudagraph", "eager"):
        torch.manual_seed(9)
        adapters.append(make(kind, model=settle_norms(WaitingHead()), window=1))
    for frame in frames:
        assert same_bits(adapters[0].step(frame), adapters[1].step(frame))
    assert "the predict pass runs eagerly" in adapters[0].engine[1]


# ---- choosing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "cudagraph"}, "cudagraph.*the model is on cpu.*engine=\"eager\" works everywhere"),
        ({"precision": "tf32"}, "tf32.*on cpu.*compute capability 8.0"),
    ],
)  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_what_is_not_available_is_refused_before_anything_changes(changes, message):
    model = zoo.TinySeg().train()
    with left_as_it_was(model), pytest.raises(ConfigError, match=message):
        StreamAdapter(model, encoder="backbone", config=CONFIG.replace(**changes))
    StreamAdapter(model, encoder="backbone").detach()


def test_compiling_needs_a_compiler_and_an_objective_whose_draws_come_apart(monkeypatch):
    model = zoo.TinySeg()
    with pytest.raises(ConfigError, match="Entropy does not separate its random draws"):
        StreamAdapter(model, Entropy(model), config=CONFIG.replace(engine="compile"))
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(ConfigError, match=r"C\+\+ compiler.*install g\+\+"):
        StreamAdapter(model, encoder="backbone", config=CONFIG.replace(engine="compile"))


def test_what_cannot_be_recorded_says_why():
    model = zoo.TinySeg()
    branch = MAEBranch.attach(model, "backbone")
    assert "SGD" in no_recording(CONFIG, branch, torch.optim.SGD)
    assert 'window="auto"' in no_recording(CONFIG.replace(window="auto"), branch, FusedAdamW)
    assert not no_recording(CONFIG, branch, FusedAdamW)


def test_auto_says_what_it_picked_and_why():
    with StreamAdapter(zoo.TinySeg(), encoder="backbone") as adapter:
        name, reason = adapter.engine
    assert name == "eager"
    assert "CPU" in reason


# ---- less work


@pytest.mark.parametrize("size", [SIZE, (40, 50)], ids=["divided", "not divided"])
def test_a_batch_in_parts_learns_what_the_whole_batch_does(size):
    found = []
    for parts in (None, 1, 2, 3):
        torch.manual_seed(9)
        model = zoo.PlainSeg().double().eval()
        config = CONFIG.replace(batch_size=4, micro_batch=parts)
        with StreamAdapter(model, encoder="backbone", config=config) as adapter:
            for frame in clip(4, size):
                adapter.step(frame)
            found.append(({name: w.clone() for name, w in weights(adapter).items()}, adapter.last.losses))
    for each, losses in found[1:]:
        assert losses == pytest.approx(found[0][1], rel=1e-6)
        for name, w in each.items():
            torch.testing.assert_close(w, found[0][0][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("changes", [{"every": 3}, {"gate": "surprise"}])
def test_a_frame_that_is_left_out_costs_no_gradient(make, changes):
    adapter, passes = make("eager", **changes), []
    engine = engines[adapter]
    plain = engine.one_pass
    engine.one_pass = lambda *given: (passes.append(adapter.state.progress.frame_index), plain(*given))[1]
    adapted = []
    for i, frame in enumerate(clip(12)):
        adapter.step(frame)
        adapted += [i] * adapter.last.adapted
    assert 0 < len(adapted) < 12
    assert passes == adapted


def bytes_clip(count: int, size=(33, 47)) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8))


@pytest.mark.parametrize("crop", [None, (17, 32)])
def test_a_window_of_bytes_gives_the_bits_of_a_window_of_floats(crop):
    normalize, frames, outs = Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), bytes_clip(7), []
    for preprocess in (normalize, lambda frame: normalize(frame)):  # only the former is known to be pixel by pixel
        torch.manual_seed(9)
        model = settle_norms(zoo.TinySeg())
        config = CONFIG.replace(crop_size=crop)
        adapter = StreamAdapter(model, encoder="backbone", config=config, preprocess=preprocess)
        outs.append([adapter.step(frame) for frame in frames])
        held = adapter.state_dict()["window"]["frames"]
        assert held.dtype == (torch.uint8 if preprocess is normalize else torch.float32)
        again = adapter.state_dict()
        adapter.load_state_dict(again)
        outs[-1].append(adapter.step(frames[0]))
    assert same_bits(*outs)


def test_bytes_and_floats_may_come_in_one_stream():
    normalize, frames, outs = Normalize(), bytes_clip(6), []
    for mixed in (True, False):
        torch.manual_seed(9)
        adapter = StreamAdapter(settle_norms(zoo.TinySeg()), encoder="backbone", config=CONFIG, preprocess=normalize)
        outs.append([adapter.step(normalize(f) if i == 3 or not mixed else f) for i, f in enumerate(frames)])
    assert same_bits(*outs)


# ---- order, precision, optimizer


def test_under_bf16_weights_gradients_and_optimizer_stay_in_float32(make):
    adapter = make("eager", precision="bf16")
    adapter.step(clip(1)[0])
    state = adapter.state_dict()
    assert {w.dtype for w in state["weights"].values()} == {torch.float32}
    assert {t.dtype for s in state["optimizer"]["state"]["state"].values() for t in s.values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["eager", "compile"])
def test_a_callers_autocast_does_not_change_what_is_learned(make, kind, precision):
    plain, inside = (make(kind, precision=precision, iterations=2, lr=1e-2) for _ in range(2))
    for frame in clip(3):
        plain.adapt(frame)
        with torch.autocast("cpu", torch.bfloat16):
            inside.adapt(frame)
        assert inside.last.losses == plain.last.losses


def test_fp16_is_refused_with_what_to_use_instead():
    with pytest.raises(ConfigError, match="fp16.*loss scale.*bf16"):
        StreamConfig(precision="fp16")


def test_tf32_is_on_inside_the_passes_and_as_it_was_after_them():
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    with both_passes("tf32"):
        assert all(switch.allow_tf32 for switch in switches)
    assert [switch.allow_tf32 for switch in switches] == before


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has one way to ask")
def test_tf32_is_switched_in_a_process_that_asks_for_it_the_newer_way():
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = products.fp32_precision
    products.fp32_precision = "tf32"  # from here on the older switch cannot be read
    try:
        with both_passes("tf32"):
            assert products.fp32_precision == convolutions.fp32_precision == "tf32"
        assert products.fp32_precision == "tf32"
        products.fp32_precision = "ieee"
        with both_passes("tf32"):
            assert products.fp32_precision == "tf32"
        assert products.fp32_precision == "ieee"
    finally:
        products.fp32_precision = before


def test_the_norm_of_all_gradients_is_that_of_one_long_vector():
    torch.manual_seed(0)
    parts = [torch.randn(n) for n in (3, 50, 7)]
    assert total_norm(parts).item() == pytest.approx(torch.cat(parts).double().norm().item(), rel=1e-6)
    mixed = [parts[0], parts[1].bfloat16()]
    assert total_norm(mixed).item() == pytest.approx(torch.cat([p.float() for p in mixed]).norm().item(), rel=1e-2)
    assert not total_norm([torch.tensor([1.0]), torch.tensor([float("nan")])]).isfinite()


def groups(seed: int = 0) -> list[dict]:
    torch.manual_seed(seed)
    a, b, c = (torch.nn.Parameter(torch.randn(n)) for n in (3, 5, 40))
    return [{"params": [a, b], "lr": 1e-2, "weight_decay": 0.1}, {"params": [c], "lr": 1e-3, "weight_decay": 0.0}]


def test_the_default_optimizer_is_torchs_adamw_bit_for_bit():
    mine, theirs = FusedAdamW(groups()), torch.optim.AdamW(groups(), fused=True)
    generator = torch.Generator().manual_seed(1)
    for i in range(6):
        if i == 4:
            mine.load_state_dict(mine.state_dict())
        pairs = zip(mine.param_groups, theirs.param_groups, strict=True)
        for p, q in [pair for m, t in pairs for pair in zip(m["params"], t["params"], strict=True)]:
            gradient = None if i < 2 and len(p) == 5 else torch.randn(len(p), generator=generator)  # reached later on
            p.grad, q.grad = gradient, None if gradient is None else gradient.clone()
        mine.step()
        theirs.step()
    for m, t in zip(mine.param_groups, theirs.param_groups, strict=True):
        assert same_bits([p.detach() for p in m["params"]], [p.detach() for p in t["params"]])
    assert same_bits(mine.state_dict()["state"], theirs.state_dict()["state"])


def test_the_default_optimizer_takes_groups_of_several_dtypes():
    found = []
    for made in (FusedAdamW, lambda group: torch.optim.AdamW(group, fused=True)):
        torch.manual_seed(0)
        members = [torch.nn.Parameter(torch.randn(5, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float32)]
        optimizer = made([{"params": members, "lr": 1e-2, "weight_decay": 0.1}])
        for _ in range(3):
            for p in members:
                p.grad = p.detach().clone()
            optimizer.step()
        found.append([p.detach() for p in members])
    assert same_bits(*found)


@pytest.mark.parametrize("fused", [True, False])
def test_a_stream_saved_with_torchs_adamw_goes_on_with_the_default_one(make, fused):
    adapter, frames = make("eager"), clip(5)
    torch.manual_seed(9)
    theirs = StreamAdapter(
        settle_norms(zoo.TinySeg()),
        encoder="backbone",
        config=CONFIG,
        optimizer=lambda given: torch.optim.AdamW(given, fused=fused),
    )
    for frame in frames[:3]:
        theirs.step(frame)
    adapter.load_state_dict(theirs.state_dict())
    for frame in frames[3:]:
        torch.testing.assert_close(adapter.step(frame), theirs.step(frame), rtol=1e-4, atol=1e-5)


def test_an_optimizer_steps_only_where_the_flag_says_so():
    optimizer = FusedAdamW(groups())
    p = optimizer.param_groups[0]["params"][0]
    for finite in (True, True, False, False, True):
        before = [q.detach().clone() for g in optimizer.param_groups for q in g["params"]]
        for g in optimizer.param_groups:
            for q in g["params"]:
                q.grad = torch.full_like(q, 1.0 if finite else float("nan"))
        step_if(optimizer, torch.tensor(finite))
        after = [q.detach() for g in optimizer.param_groups for q in g["params"]]
        assert same_bits(before, after) == (not finite)
    assert optimizer.state[p]["step"].item() == 3


@pytest.mark.parametrize("engine", [EagerEngine, GraphEngine])
def test_a_restarted_optimizer_is_a_new_one(engine):
    mine, theirs = (StreamOptimizer(lambda: FusedAdamW(groups())) for _ in range(2))
    step = GradientStep(Aliased(), CONFIG)
    restarts = engine(step) if engine is EagerEngine else engine(step, TapeRecorder())
    for part, times in ((mine, 3), (theirs, 1)):
        optimizer = part.optimizer
        for n in range(times):
            if n == times - 1:
                with torch.no_grad():
                    for g, fresh in zip(optimizer.param_groups, groups(), strict=True):
                        for q, f in zip(g["params"], fresh["params"], strict=True):
                            q.copy_(f)
                restarts.restart(part)
            for g in optimizer.param_groups:
                for q in g["params"]:
                    q.grad = q.detach() + (n - times + 1)
            optimizer.step()
    assert same_bits(mine.optimizer.state_dict()["state"], theirs.optimizer.state_dict()["state"])


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def test_gradients_and_loaded_moments_lie_as_their_parameter_does():
    torch.manual_seed(0)
    mine = torch.nn.Parameter(torch.randn(8, 6, 3, 3))
    theirs = torch.nn.Parameter(mine.detach().clone())
    first, second = adamw([{"params": [mine], "lr": 1e-2}]), torch.optim.AdamW([theirs], lr=1e-2, foreach=False)
    for _ in range(3):
        gradient = channels_last(8, 6, 3, 3)
        mine.grad, theirs.grad = apart([gradient], [mine])[0], gradient
        first.step()
        second.step()
        moments = first.state_dict()
        for name in ("exp_avg", "exp_avg_sq"):
            moments["state"][0][name] = moments["state"][0][name].contiguous(memory_format=torch.channels_last)
        first.load_state_dict(moments)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_a_gradient_that_lies_as_its_parameter_is_not_copied():
    parameter, one_by_one = torch.nn.Parameter(torch.randn(4, 3, 3, 3)), torch.nn.Parameter(torch.randn(4, 3, 1, 1))
    gradients = [torch.randn(4, 3, 3, 3), channels_last(4, 3, 1, 1)]
    assert all(a is b for a, b in zip(apart(gradients, [parameter, one_by_one]), gradients, strict=True))


def test_parameters_with_gaps_in_memory_get_an_optimizer_that_heeds_strides():
    whole = torch.randn(6, 8)
    part = torch.nn.Parameter(whole[:, :4])
    kept, expected = whole[:, 4:].clone(), torch.nn.Parameter(part.detach().clone())
    optimizer, plain = adamw([{"params": [part], "lr": 0.1}]), torch.optim.AdamW([expected], lr=0.1)
    for p in (part, expected):
        p.grad = torch.ones(6, 4)
    optimizer.step()
    plain.step()
    assert not isinstance(optimizer, FusedAdamW)
    torch.testing.assert_close(part, expected)
    assert torch.equal(whole[:, 4:], kept)


def test_a_restarted_optimizer_holds_no_memory_until_its_next_step():
    optimizer = FusedAdamW(groups())
    members = [q for g in optimizer.param_groups for q in g["params"]]
    for _ in range(2):
        for q in members:
            q.grad = torch.ones_like(q)
        optimizer.step()
    moments = [weakref.ref(optimizer.state[q][name]) for q in members for name in ("exp_avg", "exp_avg_sq")]
    assert all(moment() is not None for moment in moments)
    optimizer.restart()
    assert not optimizer.state_dict()["state"]
    assert all(moment() is None for moment in moments)


# ---- on a GPU


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"restart_optimizer": True}, {"norm_stats": "ema"}], ids=str)
@pytest.mark.parametrize("engine", ["compile", "cudagraph"])
def test_on_a_gpu_fifty_frames_are_those_of_the_eager_engine(engine, changes, family):
    outs = []
    for name in ("eager", engine):
        torch.manual_seed(9)
        made, encoder = FAMILIES[family]
        model = settle_norms(made()).cuda()
        with StreamAdapter(model, encoder=encoder, config=CONFIG.replace(engine=name, **changes)) as adapter:
            outs.append([adapter.step(frame).cpu() for frame in clip(50)])
            assert adapter.last.adapted
            assert "eagerly" not in adapter.engine[1]
            adapter.reset()
            torch.testing.assert_close(adapter.step(clip(1)[0]).cpu(), outs[-1][0])
    for mine, theirs in zip(outs[1], outs[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-3)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("device", range(torch.cuda.device_count()))
def test_on_a_gpu_a_prediction_that_cannot_be_recorded_costs_the_stream_nothing(device):
    class Reading(zoo.PlainSeg):
        def forward(self, x):
            out = super().forward(x)
            return out * float(out.abs().max() > 0) if not torch.is_grad_enabled() else out

    frames, outs = clip(12), []
    for engine in ("eager", "cudagraph"):
        torch.manual_seed(9)
        model = Reading().eval().to(f"cuda:{device}")
        with StreamAdapter(model, encoder="backbone", config=CONFIG.replace(engine=engine)) as adapter:
            outs.append([adapter.step(frame).cpu() for frame in frames])
            assert ("predict pass runs eagerly" in adapter.engine[1]) == (engine == "cudagraph")
        torch.cuda.empty_cache()
        torch.rand(1, device=f"cuda:{device}")
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-3, atol=2e-3)


@pytest.mark.gpu
@GPU
def test_on_a_gpu_a_replayed_step_never_waits_for_the_device():
    frames = [frame.byte().permute(1, 2, 0).contiguous() for frame in clip(8)]
    model = zoo.vit().cuda().eval()
    with StreamAdapter(model, encoder="norm", config=CONFIG.replace(engine="cudagraph", window=2)) as adapter:
        for frame in frames[:5]:
            adapter.step(frame)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for frame in frames[5:]:
                adapter.step(frame)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert adapter.last.adapted
