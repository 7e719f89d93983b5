"""The weights that `StreamAdapter` changes: precision, device, wrappers, what is frozen, and what others change."""

from __future__ import annotations

import copy
import linecache
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import models as zoo
from conftest import left_as_it_was, same_bits, settle_norms
from ttt_adapt import MAEBranch, Normalize, StreamAdapter, StreamConfig, TrainConfig, TTTAdaptError, calibrate, fit
from ttt_adapt.errors import ConfigError, EncoderError, FrameError, StateError
from ttt_adapt.objectives import Entropy, PseudoLabel

SIZE = (32, 48)
CONFIG = StreamConfig(window=3, batch_size=2, lr=1e-3, seed=11)


def clip(count: int = 5, seed: int = 21) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *SIZE, generator=generator) for _ in range(count)]


def pictures(count: int = 5) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *SIZE, 3), dtype=np.uint8))


def net() -> nn.Module:
    torch.manual_seed(9)
    return settle_norms(zoo.PlainSeg())


def branch_on(model: nn.Module, encoder: str = "backbone") -> MAEBranch:
    torch.manual_seed(5)
    return MAEBranch.attach(model, encoder)


# ---- half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "encoder"), [(zoo.PlainSeg, "backbone"), (lambda: zoo.vit(img_size=SIZE), "norm")], ids=["cnn", "vit"]
)
def test_a_model_in_half_precision_adapts_as_far_as_in_float32(make, encoder, dtype):
    moves = {}
    for kind in (torch.float32, dtype):
        torch.manual_seed(9)
        model = settle_norms(make()).to(kind)
        branch = branch_on(model, encoder)
        before = {name: p.detach().float().clone() for name, p in branch.encoder_parameters().items()}
        with StreamAdapter(model, branch, config=CONFIG) as adapter:
            for frame in clip():
                assert adapter.step(frame).dtype == kind
            found = [(p.detach().float() - before[n]).flatten() for n, p in branch.encoder_parameters().items()]
            moves[kind] = branch.masking, torch.cat(found).norm(), adapter.last.losses[0]
            assert torch.cat(found).abs().max() < 0.01
        assert all(torch.equal(p.float(), before[n]) for n, p in branch.encoder_parameters().items())
    assert moves[dtype][0] == moves[torch.float32][0]
    for found, wanted in zip(moves[dtype][1:], moves[torch.float32][1:], strict=True):
        assert float(found) == pytest.approx(float(wanted), rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_stream_in_half_precision_goes_on_after_a_load_and_begins_anew_after_a_reset(dtype):
    def adapter() -> StreamAdapter:
        model = net().to(dtype)
        return StreamAdapter(model, branch_on(model), config=CONFIG.replace(source_pull=0.1, norm_stats="ema"))

    first, second = adapter(), adapter()
    wanted = [first.step(frame) for frame in clip()[:3]]
    second.load_state_dict(first.state_dict())
    rest = [first.step(frame) for frame in clip()[3:]]
    assert same_bits([second.step(frame) for frame in clip()[3:]], rest)
    second.reset()
    assert same_bits([second.step(frame) for frame in clip()[:3]], wanted)


def test_steps_that_are_lost_in_bfloat16_one_by_one_add_up():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).bfloat16().eval()
    with StreamAdapter(model, Entropy(model), config=CONFIG.replace(weight_decay=0.0)) as adapter:
        scale = model[1].weight
        adapter.adapt(clip()[0])
        assert (scale == 1.0).all()  # a step is 0.001, and numbers below 1 are 0.004 apart
        for _ in range(8):
            adapter.adapt(clip()[0])
        assert (scale != 1.0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_calibration_holds_for_a_copy_in_half_precision_and_such_a_copy_can_be_calibrated(dtype):
    model, stills = net(), pictures(10)
    calibration = calibrate(model, stills, preprocess=Normalize(), choose=False)
    half = copy.deepcopy(model).to(dtype)
    assert len(calibrate(half, stills, preprocess=Normalize(), choose=False).drifts) == 10
    with StreamAdapter(half, calibration=calibration, preprocess=Normalize()) as adapter:
        adapter.step(stills[0])
        assert 0.3 < adapter.drift < 3.0
    with torch.no_grad():
        half.head.bias[0] += 1.0
    with pytest.raises(ConfigError, match="of other weights"):
        StreamAdapter(half, calibration=calibration, preprocess=Normalize())


# ---- device and dtype, wrappers


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_branch_follows_its_model_to_another_dtype(dtype):
    model = net()
    branch = branch_on(model)
    model.to(dtype)
    frames = [frame.to(dtype) for frame in clip()]
    assert branch.loss(frames[0][None]).isfinite()
    assert {p.dtype for p in branch.parameters()} == {dtype}
    model.float()
    with StreamAdapter(model, branch, config=CONFIG) as adapter:
        adapter.step(clip()[0])
        assert adapter.last.adapted


class Wrapper(nn.Module):
    """As training libraries have it: model and branch in a module of one's own."""

    def __init__(self, model: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.net, self.branch = model, branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    "wrap",
    [lambda m, b: torch.compile(m, backend="eager"), lambda m, b: nn.DataParallel(m), Wrapper],
    ids=["compile", "DataParallel", "module"],
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_wrapper_around_the_model_streams_as_the_model_does(wrap, calibrated):
    model = net()
    branch = branch_on(model)
    if calibrated:
        calibrate(wrap(model, branch), pictures(10), branch=branch, preprocess=Normalize(), choose=False)
    with StreamAdapter(model, branch, config=CONFIG.replace(norm_stats="auto"), preprocess=Normalize()) as adapter:
        wanted = [adapter.step(frame) for frame in pictures()]
    wrapper = wrap(model, branch)
    with left_as_it_was(model):
        with StreamAdapter(
            wrapper, branch, config=CONFIG.replace(norm_stats="auto"), preprocess=Normalize()
        ) as adapter:
            assert same_bits([adapter.step(frame) for frame in pictures()], wanted)
            with pytest.raises(StateError, match="already"):
                StreamAdapter(model, branch)
        assert adapter.detach() is wrapper


def test_a_branch_on_a_compiled_model_streams_over_the_plain_one():
    model = net()
    branch = MAEBranch.attach(torch.compile(model, backend="eager"), "backbone")
    with StreamAdapter(model, branch, config=CONFIG) as adapter:
        adapter.step(clip()[0])
        assert adapter.last.adapted


def test_the_error_of_a_branch_of_another_model_names_ways_that_keep_its_weights():
    model = net()
    branch = branch_on(model)
    with torch.no_grad():
        next(branch.decoder.parameters()).add_(1.0)
    other = copy.deepcopy(model)
    for call in (lambda: StreamAdapter(other, branch), lambda: fit(other, branch, [], print, TrainConfig())):
        with pytest.raises(TTTAdaptError, match=r"deepcopy\(\(model, branch\)\).*load_state_dict\(branch.state_dict"):
            call()
    new = MAEBranch.attach(other, "backbone")
    new.load_state_dict(branch.state_dict())
    twin, twins = copy.deepcopy((model, branch))
    for pair in ((other, new), (twin, twins)):
        with StreamAdapter(*pair, config=CONFIG) as adapter:
            adapter.step(clip()[0])
            assert same_bits(list(pair[1].state_dict()), list(branch.state_dict()))


# ---- what is frozen


def test_a_wholly_frozen_model_is_adapted_and_stays_frozen():
    model = net().requires_grad_(False)
    branch = branch_on(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with StreamAdapter(model, branch, config=CONFIG) as adapter:
        adapter.step(clip()[0])
        assert all(not torch.equal(p, before[name]) for name, p in branch.encoder_parameters().items())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", [MAEBranch, Entropy])
def test_what_is_frozen_in_a_partly_frozen_model_does_not_move(kind):
    torch.manual_seed(9)
    model = settle_norms(zoo.resnet())
    model.layer1.requires_grad_(False)
    objective = branch_on(model, "layer4") if kind is MAEBranch else Entropy(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with StreamAdapter(model, objective, config=CONFIG) as adapter:
        adapter.step(clip()[0])
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    frozen = {name for name in objective.encoder_parameters() if name.startswith("layer1")}
    assert frozen
    assert moved
    assert not moved & frozen


def test_a_frozen_encoder_under_a_head_that_is_not_frozen_is_refused():
    model = net()
    model.backbone.requires_grad_(False)
    with left_as_it_was(model), pytest.raises(ConfigError, match=r"frozen.*model.requires_grad_\(False\)"):
        StreamAdapter(model, branch_on(model), config=CONFIG)


# ---- what others change in the middle of a stream


def load_other(model: nn.Module) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


CHANGES = {
    "train": lambda m: (m.train(), m(torch.randn(4, 3, *SIZE))),
    "train a part": lambda m: m.backbone.train(),
    "freeze": lambda m: m.requires_grad_(False),
    "freeze a part": lambda m: next(m.backbone.parameters()).requires_grad_(False),
    "double": lambda m: m.double(),
    "load": load_other,
    "data": lambda m: next(m.parameters()).data.mul_(2.0),
    "assign": lambda m: m.load_state_dict({n: v + 1 for n, v in m.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize("stats", ["frozen", "ema"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_from_outside_is_an_error_and_once_it_is_undone_the_stream_goes_on(change, stats):
    model = net()
    branch = branch_on(model)
    twins = copy.deepcopy((model, branch))
    config = CONFIG.replace(norm_stats=stats)
    with StreamAdapter(*twins, config=config) as adapter:
        wanted = [adapter.step(frame) for frame in clip()]
    with left_as_it_was(model):
        adapter = StreamAdapter(model, branch, config=config)
        found = [adapter.step(frame) for frame in clip()[:2]]
        kept = copy.deepcopy(model.state_dict())
        objects = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
        CHANGES[change](model)
        for call in (adapter.step, adapter.adapt, adapter.predict):
            with pytest.raises((StateError, EncoderError)):
                call(clip()[2])
        if change == "assign":
            for module, parameters, buffers in objects:
                module._parameters.update(parameters)
                module._buffers.update(buffers)
        model.eval().requires_grad_(True).float()
        if change in ("load", "data"):
            model.load_state_dict(kept)
        found += [adapter.step(frame) for frame in clip()[2:]]
        assert same_bits(found, wanted)
        adapter.detach()


@pytest.mark.parametrize("change", ["train", "double", "load"])
def test_a_model_that_somebody_changed_is_given_back_with_its_source_weights_and_buffers(change):
    model = net()
    before = copy.deepcopy(model.state_dict())
    branch = branch_on(model)
    adapter = StreamAdapter(model, branch, config=CONFIG.replace(norm_stats="ema"))
    adapter.step(clip()[0])
    CHANGES[change](model)
    adapter.detach()
    inside = {*branch.encoder_parameters(), *(name for name, _ in model.named_buffers())}
    assert all(
        torch.equal(value, before[name].to(value)) for name, value in model.state_dict().items() if name in inside
    )


def test_after_other_weights_were_loaded_a_reset_begins_anew_with_the_source_weights():
    model = net()
    adapter = StreamAdapter(model, branch_on(model), config=CONFIG)
    wanted = [adapter.step(frame) for frame in clip()]
    model.backbone.load_state_dict({name: value + 1 for name, value in model.backbone.state_dict().items()})
    with pytest.raises(StateError, match="reset"):
        adapter.step(clip()[0])
    adapter.reset()
    assert same_bits([adapter.step(frame) for frame in clip()], wanted)


@pytest.mark.parametrize("change", ["load", "data"])
@pytest.mark.parametrize("call", ["state_dict", "swap"])
def test_a_change_from_outside_is_not_taken_into_a_state_or_a_swap(call, change):
    model = net()
    adapter = StreamAdapter(model, branch_on(model), config=CONFIG)
    other = adapter.new_state()
    adapter.step(clip()[0])
    kept = copy.deepcopy(model.state_dict())
    before = adapter.state_dict()
    CHANGES[change](model)
    with pytest.raises(StateError, match="changed by somebody else"):
        adapter.state_dict() if call == "state_dict" else adapter.swap(other)
    model.load_state_dict(kept)
    assert same_bits(adapter.state_dict(), before)


def test_weights_that_are_not_adapted_are_not_put_back_by_a_reset_or_a_load_and_the_error_says_so():
    model = net()
    adapter = StreamAdapter(model, branch_on(model), config=CONFIG)
    state = adapter.state_dict()
    wanted = [adapter.step(frame) for frame in clip()]
    kept = copy.deepcopy(model.head.state_dict())
    with torch.no_grad():
        for p in model.head.parameters():
            p.add_(1.0)
    for call in (adapter.reset, lambda: adapter.load_state_dict(state), lambda: adapter.step(clip()[0])):
        with pytest.raises(StateError, match="does not adapt.*load what they were to go on"):
            call()
    model.head.load_state_dict(kept)
    adapter.reset()
    assert same_bits([adapter.step(frame) for frame in clip()], wanted)


def test_a_load_puts_adapted_weights_right_that_somebody_changed():
    model = net()
    adapter = StreamAdapter(model, branch_on(model), config=CONFIG)
    adapter.step(clip()[0])
    state = adapter.state_dict()
    wanted = adapter.step(clip()[1])
    model.backbone.load_state_dict({name: value + 1 for name, value in model.backbone.state_dict().items()})
    adapter.load_state_dict(state)
    assert same_bits(adapter.step(clip()[1]), wanted)


def calibrated_stream(model: nn.Module, wrap=lambda net: net) -> StreamAdapter:
    calibration = branch_on(model).calibrate(clip(8))
    return StreamAdapter(wrap(model), calibration=calibration)


WITHOUT_EFFECT = ("freeze", "freeze a part")
WRAPS = {
    "plain": lambda m: m,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("change", [*CHANGES, "half", "empty"])
def test_a_change_from_outside_is_an_error_in_a_stream_without_a_branch_too(change, wrap):
    more = {"half": lambda m: m.half(), "empty": lambda m: m.to_empty(device="meta")}
    model = net()
    adapter = calibrated_stream(model, WRAPS[wrap])
    wanted = [adapter.step(frame) for frame in clip()]
    adapter.reset()
    found = [adapter.step(frame) for frame in clip()[:2]]
    kept = copy.deepcopy(model.state_dict())
    objects = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    {**CHANGES, **more}[change](model)
    for call in (adapter.step, adapter.adapt, adapter.predict, lambda _: adapter.state_dict()):
        if change in WITHOUT_EFFECT:  # nothing learns in such a stream
            call(clip()[0])
            continue
        with pytest.raises((StateError, EncoderError)):
            call(clip()[2])
    if change in WITHOUT_EFFECT:
        return
    for module, parameters, buffers in objects:
        module._parameters.update(parameters)
        module._buffers.update(buffers)
    model.eval().requires_grad_(True).float().load_state_dict(kept)
    found += [adapter.step(frame) for frame in clip()[2:]]
    assert same_bits(found, wanted)
    adapter.detach()


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("then", ["step", "reset", "detach"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_way_to_half_precision_and_back_loses_nothing(dtype, then, branch):
    model = net()
    model.register_buffer("table", torch.rand(5))
    source = copy.deepcopy(model.state_dict())
    adapter = StreamAdapter(model, branch_on(model), config=CONFIG) if branch else calibrated_stream(model)
    wanted = [adapter.step(frame) for frame in clip()[:2]]
    adapter.reset()
    found = [adapter.step(clip()[0])]
    model.to(dtype)
    with pytest.raises(StateError, match="convert the model back"):
        adapter.step(clip()[1])
    model.to(torch.float32)
    if then == "reset":
        adapter.reset()
        found = [adapter.step(clip()[0])]
    if then != "detach":
        assert same_bits([*found, adapter.step(clip()[1])], wanted)
    adapter.detach()
    assert same_bits(model.state_dict(), source)


def test_weights_that_were_rounded_in_place_are_others():
    model = net()
    with calibrated_stream(model) as adapter:
        adapter.step(clip()[0])
        with torch.no_grad():
            model.head.weight.copy_(model.head.weight.half())
        with pytest.raises(StateError, match="load what they were"):
            adapter.step(clip()[1])


@pytest.mark.parametrize("how", ["assign", "module"])
def test_a_stream_without_a_branch_refuses_another_head_and_takes_one_with_the_same_values(how):
    model = net()

    def replace(change: float) -> None:
        if how == "assign":
            model.head.load_state_dict({n: v + change for n, v in model.head.state_dict().items()}, assign=True)
        else:
            model.head = copy.deepcopy(model.head)
            with torch.no_grad():
                model.head.weight.add_(change)

    with calibrated_stream(model) as adapter:
        wanted = [adapter.step(frame) for frame in clip()]
        adapter.reset()
        replace(0.0)
        assert same_bits([adapter.step(frame) for frame in clip()], wanted)
        replace(1.0)
        for call in (lambda: adapter.step(clip()[0]), adapter.reset):
            with pytest.raises(StateError, match="does not adapt"):
                call()


def test_running_statistics_that_are_replaced_in_inference_mode_are_put_back():
    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg())
    adapter = StreamAdapter(model, branch_on(model), config=CONFIG)
    adapter.step(clip()[0])
    wanted = adapter.predict(clip()[1])
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    own = norm.running_mean
    with torch.inference_mode():
        norm.running_mean = norm.running_mean + 1
    assert same_bits(adapter.predict(clip()[1]), wanted)
    assert norm.running_mean is own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_teacher_of_a_model_in_half_precision_moves_as_far_as_in_float32(dtype):
    ways = {}
    for kind in (torch.float32, dtype):
        model = net().to(kind)
        objective = PseudoLabel(model, threshold=0.0, average=0.99)
        before = {name: tensor.double() for name, tensor in objective.memory().items()}
        with StreamAdapter(model, objective, config=CONFIG.replace(lr=1e-2)) as adapter:
            for frame in clip(6):
                adapter.step(frame)
            assert {tensor.dtype for tensor in objective.memory().values()} == {torch.float32}
            after = {name: tensor.double() for name, tensor in objective.memory().items()}
        ways[kind] = {name: (after[name] - tensor).abs().mean() for name, tensor in before.items()}
    for name, way in ways[dtype].items():
        assert way == pytest.approx(float(ways[torch.float32][name]), rel=0.3), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_their_copies_rounded_also_after_a_pull(dtype):
    model = net().to(dtype)
    config = CONFIG.replace(source_pull=0.3, lr=1e-5)
    with StreamAdapter(model, branch_on(model), config=config) as adapter:
        for frame in clip():
            adapter.adapt(frame)
            weights = adapter.state_dict()["weights"]
            copies = {name.removeprefix("float32."): v for name, v in weights.items() if name.startswith("float32.")}
            assert copies
            assert all(torch.equal(weights[name], copy.to(dtype)) for name, copy in copies.items())


# ---- values that are not finite


@pytest.mark.parametrize("stats", ["frozen", "ema", "blend", "batch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_frame_that_is_not_finite_behind_preprocess_is_refused_and_poisons_nothing(stats, value):
    broken: list[bool] = [False]

    def preprocess(frame: np.ndarray) -> torch.Tensor:
        x = Normalize()(frame)
        x[0, 1, 2, 3] = value if broken[0] else x[0, 1, 2, 3]
        return x

    def run(bad: bool) -> list[torch.Tensor]:
        model = net()
        with StreamAdapter(
            model, branch_on(model), config=CONFIG.replace(norm_stats=stats), preprocess=preprocess
        ) as adapter:
            outputs = [adapter.step(frame) for frame in pictures()[:3]]
            if bad:
                broken[0] = True
                with pytest.raises(FrameError, match="NaN or infinite values behind preprocess"):
                    adapter.step(pictures()[3])
                broken[0] = False
            return outputs + [adapter.step(frame) for frame in pictures()[3:]]

    assert same_bits(run(True), run(False))


def test_values_that_a_float16_model_cannot_hold_are_refused():
    model = net().half()
    with StreamAdapter(model, branch_on(model), config=CONFIG) as adapter:
        with pytest.raises(FrameError, match=r"infinite in the model's torch.float16"):
            adapter.step(torch.full((3, *SIZE), 1e6))
        assert adapter.step(clip()[0]).isfinite().all()


# ---- the default device, warnings


def test_a_default_device_of_the_caller_changes_nothing():
    def run(model: nn.Module) -> list[torch.Tensor]:
        branch = branch_on(model)
        calibrate(model, pictures(10), branch=branch, preprocess=Normalize(), choose=False)
        with StreamAdapter(model, branch, config=CONFIG.replace(norm_stats="auto"), preprocess=Normalize()) as adapter:
            return [adapter.step(frame) for frame in pictures()]

    wanted, model, other = run(net()), net(), net()
    with torch.device("meta"):
        assert same_bits(run(model), wanted)
    torch.set_default_device("meta")
    try:
        found = run(other)
    finally:
        torch.set_default_device(None)
    assert same_bits(found, wanted)


def warnings_of(call) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in found if each.category is UserWarning]


def places_of(call) -> list[tuple[str, str]]:
    """File and text of the lines that the library's warnings point at."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    own = [each for each in found if each.category is UserWarning]
    return [(each.filename, linecache.getline(each.filename, each.lineno)) for each in own]


def in_a_thread(call) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


def test_every_warning_points_at_the_line_that_calls_the_library():
    model = settle_norms(zoo.resnet())
    branch = branch_on(model, "layer4")
    dull = [torch.rand(3, *SIZE) for _ in range(2)]
    alike = [np.full((*SIZE, 3), 9, dtype=np.uint8)] * 16
    quiet = CONFIG.replace(lr=0.0)

    def warned(call, line: str) -> None:
        found = places_of(call)
        assert found
        assert all(file == __file__ and line in text for file, text in found), found

    calls = {
        "adapter.step(": lambda adapter: adapter.step(dull[0]),
        "adapter.adapt(": lambda adapter: adapter.adapt(dull[0]),
        "adapter.predict(": lambda adapter: adapter.predict(dull[0]),
        "adapter.stream(": lambda adapter: [*adapter.stream(dull)],
    }
    for line, call in calls.items():
        for run in (lambda work: work(), in_a_thread):
            with StreamAdapter(model, branch, config=quiet) as adapter:
                warned(lambda: run(lambda: call(adapter)), line)  # noqa: B023
    warned(lambda: StreamAdapter(model, branch, config=CONFIG).detach(), "StreamAdapter(")
    warned(lambda: StreamAdapter(model, encoder="layer4", config=CONFIG).detach(), "StreamAdapter(")
    warned(lambda: calibrate(model, alike, drifts="night:3"), "calibrate(")
    warned(lambda: branch.calibrate(alike), "branch.calibrate(")


def test_floats_between_0_and_1_for_a_model_of_normalised_frames_get_one_warning():
    model = settle_norms(zoo.resnet())  # it says how its frames are normalised
    branch = branch_on(model, "layer4")
    branch.mask_channel.weight.data.fill_(0.1)
    frames = [torch.rand(3, *SIZE) for _ in range(2)]
    with StreamAdapter(model, branch, config=CONFIG) as adapter:
        assert not warnings_of(lambda: adapter.step(clip()[0]))
        (message,) = warnings_of(lambda: [adapter.step(frame) for frame in frames])
        assert "normalised, to [-2.12, 2.64]" in message
    with StreamAdapter(model, branch, config=CONFIG, preprocess=lambda f: torch.rand(1, 3, *SIZE)) as adapter:
        assert len(warnings_of(lambda: [adapter.step(frame) for frame in pictures()])) == 1
    plain = net()  # nothing is known of this one
    with StreamAdapter(plain, branch_on(plain), config=CONFIG) as adapter:
        assert not warnings_of(lambda: adapter.step(frames[0]))


def test_gradient_steps_on_a_branch_that_was_never_trained_get_a_warning():
    model = net()
    branch = branch_on(model)

    def stream(**changes) -> list[str]:
        return warnings_of(lambda: StreamAdapter(model, branch, config=CONFIG.replace(**changes)).detach())

    (message,) = stream()
    assert "never trained" in message
    assert not stream(lr=0.0)
    assert not stream(iterations=0)
    torch.optim.SGD(branch.parameters(), 0.1).step(lambda: branch.loss(torch.randn(2, 3, *SIZE)).backward())
    assert not stream()
    other = branch_on(model)
    other.load_state_dict(branch.state_dict())
    assert not warnings_of(lambda: StreamAdapter(model, other, config=CONFIG).detach())
