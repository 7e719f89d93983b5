"""`StreamConfig.adapt`: what a stream adapts, what it holds, and that the rest of the model stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models as zoo
from conftest import hooks_of, left_as_it_was, mix_flags, same_bits, settle_norms
from tape import TapeRecorder
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.config import adapted_part
from ttt_adapt.engine.compiled import CompileEngine
from ttt_adapt.engine.eager import EagerEngine
from ttt_adapt.engine.graphs import GraphEngine
from ttt_adapt.errors import CheckpointError, ConfigError
from ttt_adapt.model.adapted_part import part_of_encoder
from ttt_adapt.model.low_rank import LowRank
from ttt_adapt.objectives import PseudoLabel

SIZE = (32, 48)
CONFIG = StreamConfig(window=3, batch_size=2, lr=1e-2, source_pull=0.2, seed=4)
PARTS = ["norms", "bias", "last:1", "last:2", "lora:1", "lora:4"]


def clip(count: int, seed: int = 21) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *SIZE, generator=generator).clamp(-1.9, 1.9) for _ in range(count)]


def vit() -> nn.Module:
    torch.manual_seed(9)
    return zoo.vit()


def attached(adapt: str, model: nn.Module | None = None, **changes) -> StreamAdapter:
    torch.manual_seed(3)
    model = vit() if model is None else model
    branch = MAEBranch.attach(model, "norm")
    return StreamAdapter(model, branch, config=CONFIG.replace(adapt=adapt, **changes))


def encoder_names(adapt: str, model: nn.Module) -> list[str]:
    named = {name: p for name, p in model.named_parameters() if not name.startswith("head")}
    return [*part_of_encoder(named, model, *adapted_part(adapt))]


# ---- which parameters


def test_each_part_names_its_parameters_and_no_others():
    model = zoo.vit()
    encoder = [name for name, _ in model.named_parameters() if not name.startswith("head")]
    norms = [name for name in encoder if "norm" in name]
    assert norms
    assert encoder_names("all", model) == encoder
    assert encoder_names("norms", model) == norms
    assert encoder_names("bias", model) == [name for name in encoder if name.endswith(".bias")]
    assert encoder_names("last:1", model) == [n for n in encoder if n.startswith(("blocks.1.", "norm."))]
    assert encoder_names("last:2", model) == [n for n in encoder if n.startswith(("blocks.", "norm."))]
    linear = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    assert encoder_names("lora:2", model) == [n for n in encoder if n.endswith(linear)]


def test_attention_of_pytorch_and_pointwise_convolutions_have_factors_and_other_convolutions_have_none():
    model = nn.Sequential(
        nn.MultiheadAttention(8, 2), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 1, groups=2)
    )
    assert encoder_names("lora:2", model) == ["0.in_proj_weight", "0.out_proj.weight", "1.weight"]


def test_norms_of_a_kind_of_their_own_are_known_by_their_name():
    class ScaleNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

    assert encoder_names("norms", nn.Sequential(nn.Linear(4, 4), ScaleNorm())) == ["1.scale"]


@pytest.mark.parametrize(
    ("adapt", "words"),
    [("norms", "no layers that normalise"), ("last:1", "repeats 0 blocks"), ("lora:2", "no linear layers")],
)
def test_a_part_that_the_encoder_has_not_is_refused_and_the_model_stays_free(adapt, words):
    model = zoo.PlainSeg()
    with left_as_it_was(model):
        with pytest.raises(ConfigError, match=words):
            StreamAdapter(model, encoder="backbone", config=CONFIG.replace(adapt=adapt))
        StreamAdapter(model, encoder="backbone").detach()


def test_more_blocks_than_there_are_are_refused_with_their_number():
    with pytest.raises(ConfigError, match=r"repeats 2 blocks: expected last:1 to last:2"):
        attached("last:3")


@pytest.mark.parametrize(
    "adapt",
    ["", "none", "norm", "all:1", "norms:2", "last", "last:", "last:0", "last:-1", "lora:1.5", "lora:²", 3, None],
)
def test_what_names_no_part_is_refused(adapt):
    with pytest.raises(ConfigError, match="adapt is"):
        StreamConfig(adapt=adapt)


# ---- what a stream of a part does


@pytest.mark.parametrize("adapt", PARTS)
def test_a_part_learns_and_the_rest_of_model_and_branch_stays_bit_for_bit(adapt):
    model = vit()
    adapter = attached(adapt, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    branch = {name: p.detach().clone() for name, p in adapter.branch.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    for frame in clip(3):
        adapter.step(frame)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed
    assert set(changed) <= set(encoder_names(adapt, model))
    assert same_bits(dict(adapter.branch.named_parameters()), branch)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("adapt", ["norms", "last:1", "lora:2"])
def test_a_model_is_given_back_as_it_was(adapt):
    model = vit()
    mix_flags(model)
    with left_as_it_was(model), attached(adapt, model) as adapter:
        for frame in clip(2):
            adapter.step(frame)
        assert hooks_of(model) == 0
        assert set(model.state_dict()) == set(vit().state_dict())


def test_a_stream_holds_what_it_adapts_and_no_more():
    sizes = {}
    for adapt in ["all", *PARTS]:
        adapter = attached(adapt)
        adapter.step(clip(1)[0])
        state = adapter.state_dict()
        sizes[adapt] = sum(tensor.numel() for tensor in state["weights"].values())
        moments = [v for values in state["optimizer"]["state"]["state"].values() for v in values.values() if v.ndim]
        assert sum(v.numel() for v in moments) <= 2 * sizes[adapt]
    model = vit()
    named = dict(model.named_parameters())
    assert sizes["norms"] == sum(named[name].numel() for name in encoder_names("norms", model))
    assert sizes["lora:4"] == 4 * sizes["lora:1"]
    assert sizes["norms"] < sizes["lora:1"] < sizes["last:1"] < sizes["last:2"] < sizes["all"]


@pytest.mark.parametrize("adapt", ["bias", "last:1", "lora:2"])
def test_reset_save_load_and_keeping_are_exact(adapt):
    frames, adapter = clip(5), attached(adapt)
    first = [adapter.step(frame) for frame in frames[:3]]
    saved = adapter.state_dict()
    wanted = [adapter.step(frame) for frame in frames[3:]]
    adapter.load_state_dict(saved)
    assert same_bits([adapter.step(frame) for frame in frames[3:]], wanted)
    adapter.reset()
    assert same_bits([adapter.step(frame) for frame in frames[:3]], first)
    other = attached(adapt)
    other.load_state_dict(saved)
    assert same_bits([other.step(frame) for frame in frames[3:]], wanted)
    kept = other.predict(frames[0])
    model = other.detach(keep_adapted=True)
    with torch.no_grad():
        assert same_bits(model(frames[0][None]), kept)


def test_a_state_of_another_part_is_refused():
    saved = attached("norms").state_dict()
    with pytest.raises(CheckpointError, match=r"'adapt': 'norms'.*'adapt': 'bias'"):
        attached("bias").load_state_dict(saved)


def test_a_state_from_before_the_option_goes_on_where_all_is_adapted():
    adapter = attached("all")
    saved = adapter.state_dict()
    del saved["config"]["adapt"]
    adapter.load_state_dict(saved)
    with pytest.raises(CheckpointError, match="adapt"):
        attached("norms").load_state_dict(saved)


@pytest.mark.parametrize("adapt", ["norms", "lora:2"])
def test_a_step_that_fails_at_the_beginning_leaves_the_source(monkeypatch, adapt):
    model, frame = vit(), clip(1)[0]
    with torch.no_grad():
        plain = model(frame[None])
    adapter = attached(adapt, model)

    def burst(*_):
        raise KeyError("burst")

    with monkeypatch.context() as patch:
        patch.setattr("ttt_adapt.sharing.frame.StepReport", burst)
        with pytest.raises(KeyError):
            adapter.step(frame)
    assert same_bits(adapter.predict(frame), plain)


@pytest.mark.parametrize("adapt", ["norms", "lora:2"])
def test_every_engine_takes_the_same_steps(monkeypatch, adapt):
    engines = {
        "eager": EagerEngine,
        "compile": lambda step: CompileEngine(step, backend="aot_eager"),
        "cudagraph": lambda step: GraphEngine(step, TapeRecorder()),
    }
    found = {}
    for name, make in engines.items():
        monkeypatch.setattr("ttt_adapt.adapter.choose_engine", lambda step, _optimizer, make=make: make(step))
        with attached(adapt) as adapter:
            outputs = [adapter.step(frame) for frame in clip(6)]
            found[name] = outputs, adapter.state_dict()["weights"]
    torch._dynamo.reset()
    for outputs, weights in found.values():
        for own, wanted in zip(outputs, found["eager"][0], strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)
        assert weights.keys() == found["eager"][1].keys()


def test_a_part_of_what_another_objective_adapts():
    model = settle_norms(zoo.TinySeg())
    with StreamAdapter(model, PseudoLabel(model, threshold=0.0), config=CONFIG.replace(adapt="norms")) as adapter:
        adapter.step(clip(1)[0])
        assert list(adapter.state_dict()["weights"]) == ["model.backbone.1.weight", "model.backbone.1.bias"]


# ---- low rank


def test_a_stream_of_factors_begins_with_the_source_bit_for_bit():
    model, frames = vit(), clip(3)
    with torch.no_grad():
        plain = [model(frame[None]) for frame in frames]
    with attached("lora:3", model, lr=0.0) as adapter:
        assert same_bits([adapter.step(frame) for frame in frames], plain)


def test_gradients_of_factors_are_those_of_autograd_and_the_weight_is_source_plus_product():
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 5).double(), torch.randn(4, 7, dtype=torch.float64)
    source = layer.weight.detach().clone()
    factors = LowRank({"w": layer.weight}, 3, seed=1)
    down, up = factors.factors.values()
    with torch.no_grad():
        up.normal_()
    factors.derive()
    assert torch.allclose(layer.weight, source + up @ down)
    whole = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    mine = factors.gradients(whole)
    wanted = torch.autograd.grad((x @ (source + up @ down).T + layer.bias).square().sum(), [down, up])
    for own, right in zip(mine, wanted, strict=True):
        torch.testing.assert_close(own, right)
    factors.restore()
    assert same_bits(layer.weight.detach(), source)


def test_factors_are_drawn_by_the_seed_and_a_rank_is_at_most_that_of_the_weight():
    weights = {"w": nn.Parameter(torch.randn(3, 8))}
    one, two, other = (LowRank(weights, 5, seed).factors for seed in (1, 1, 2))
    assert one["w.down"].shape == (3, 8)
    assert one["w.up"].shape == (3, 3)
    assert torch.equal(one["w.down"], two["w.down"])
    assert not torch.equal(one["w.down"], other["w.down"])


def test_factors_beside_weights_in_half_precision_are_refused_with_the_way_out():
    model = vit().half()
    with left_as_it_was(model), pytest.raises(ConfigError, match=r"half precision.*model\.float\(\)"):
        attached("lora:2", model)
