"""What `StreamAdapter` promises, for every family of encoders."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import models as zoo
from conftest import left_as_it_was, mix_flags, photograph, same_bits, settle_norms
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig, TTTAdaptError
from ttt_adapt.errors import ConfigError, FrameError, MemoryLimitError, StateError
from ttt_adapt.tasks.dense_model import DenseModel

CONFIG = StreamConfig(window=3, batch_size=2, lr=1e-2, encoder_lr_scale=0.5, seed=11)


class AdapterContract:
    """Subclass it per encoder family."""

    encoder = "norm"
    decoder = "auto"
    size = (32, 48)
    config = CONFIG

    def make(self) -> nn.Module:
        raise NotImplementedError

    @pytest.fixture
    def model(self) -> nn.Module:
        return settle_norms(self.make())

    @pytest.fixture
    def frames(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(21)
        return [torch.randn(3, *self.size, generator=generator) for _ in range(5)]

    def adapter(self, model: nn.Module, weights: dict | None = None, **changes) -> StreamAdapter:
        """An adapter whose branch starts from `weights`, or from seed 5."""
        state = torch.get_rng_state()
        torch.manual_seed(5)
        branch = MAEBranch.attach(model, self.encoder, decoder=self.decoder)
        torch.set_rng_state(state)
        if weights is not None:
            branch.load_state_dict(weights)
        return StreamAdapter(model, branch, config=self.config.replace(**changes))

    def test_at_lr_zero_predictions_are_those_of_the_plain_model_bit_for_bit(self, model, frames):
        with torch.no_grad():
            plain = [model(frame[None]) for frame in frames]
        adapter = self.adapter(model, lr=0.0)
        assert all(same_bits(adapter.step(frame), p) for frame, p in zip(frames, plain, strict=True))
        assert adapter.last.adapted

    def test_a_step_is_that_of_an_adamw_that_is_not_fused(self, model, frames):
        twin = copy.deepcopy(model)
        default = self.adapter(model, iterations=1, weight_decay=0.1)
        branch = MAEBranch.attach(twin, self.encoder, decoder=self.decoder)
        branch.load_state_dict(default.branch.state_dict())
        plain = StreamAdapter(
            twin, branch, config=default.config, optimizer=lambda groups: torch.optim.AdamW(groups, foreach=False)
        )
        for adapter in (default, plain):
            adapter.adapt(frames[0])
        mine, theirs = default.state_dict()["weights"], plain.state_dict()["weights"]
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")

    def test_adaptation_changes_encoder_and_branch_and_predictions_and_never_the_head(self, model, frames):
        adapter = self.adapter(model)
        inside = adapter.branch.encoder_parameters()
        before = {name: t.clone() for name, t in model.state_dict().items()}
        own = {name: t.clone() for name, t in adapter.branch.state_dict().items()}
        first = adapter.predict(frames[0])
        outs = [adapter.step(frame) for frame in frames]
        assert not same_bits(outs[0], first)
        moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
        assert moved
        assert moved <= set(inside)
        assert len(moved) > 0.7 * len(inside)
        assert any(not torch.equal(t, own[name]) for name, t in adapter.branch.state_dict().items())
        assert all(p.grad is None for p in model.parameters())

    def test_activation_checkpointing_changes_no_bit_and_leaves_the_model_as_it_was(self, model, frames):
        settings = {"drop_path": True, "micro_batch": 1}
        plain = self.adapter(copy.deepcopy(model), **settings)
        with left_as_it_was(model):
            checkpointed = self.adapter(model, plain.branch.state_dict(), grad_checkpointing=True, **settings)
            for frame in frames[:3]:
                assert same_bits(checkpointed.step(frame), plain.step(frame))
            assert same_bits(checkpointed.state_dict()["weights"], plain.state_dict()["weights"])
            checkpointed.detach()

    def test_reset_then_the_same_frames_give_the_same_predictions_bit_for_bit(self, model, frames):
        source = photograph(model)["bytes"]
        adapter = self.adapter(model, restart_optimizer=False, drop_path=True)
        first = [adapter.step(frame) for frame in frames]
        reports = adapter.last
        adapter.reset()
        assert photograph(model)["bytes"] == source
        assert adapter.last is None
        again = [adapter.step(frame) for frame in frames]
        assert same_bits(first, again)
        assert adapter.last.losses == reports.losses
        assert adapter.last.frame_index == reports.frame_index == len(frames) - 1

    def test_saved_in_mid_stream_it_goes_on_as_if_it_had_never_stopped(self, model, frames, tmp_path):
        fresh = copy.deepcopy(model)
        adapter = self.adapter(model, restart_optimizer=False, crop_size=32, drop_path=True)
        weights = {name: t.clone() for name, t in adapter.branch.state_dict().items()}
        for frame in frames[:3]:
            adapter.step(frame)
        torch.save(adapter.state_dict(), tmp_path / "state.pt")
        expected = [adapter.step(frame) for frame in frames[3:]]
        other = self.adapter(fresh, weights, restart_optimizer=False, crop_size=32, drop_path=True)
        other.step(frames[0])  # what it saw before has no say
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert same_bits([other.step(frame) for frame in frames[3:]], expected)
        assert other.last.losses == adapter.last.losses
        assert other.last.frame_index == adapter.last.frame_index
        other.reset()
        adapter.reset()
        assert same_bits(other.step(frames[0]), adapter.step(frames[0]))

    def test_two_adapters_interleaved_equal_each_alone(self, model, frames):
        twin = copy.deepcopy(model)
        alone = []
        for order in (frames, frames[::-1]):
            with self.adapter(model, drop_path=True) as adapter:
                alone.append([adapter.step(frame) for frame in order])
        first, second = self.adapter(model, drop_path=True), self.adapter(twin, drop_path=True)
        together = [(first.step(a), second.step(b)) for a, b in zip(frames, frames[::-1], strict=True)]
        assert same_bits([a for a, _ in together], alone[0])
        assert same_bits([b for _, b in together], alone[1])

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_it_learns_the_same_inside_no_grad_and_inference_mode(self, model, frames, mode):
        with self.adapter(model) as adapter:
            expected = [adapter.step(frame) for frame in frames]
        with mode(), self.adapter(model) as adapter:
            assert same_bits([adapter.step(frame.clone()) for frame in frames], expected)
            adapter.reset()
            assert same_bits(adapter.step(frames[0]), expected[0])
            state = adapter.state_dict()
        with mode():
            adapter = self.adapter(model)
            adapter.load_state_dict(state)
        assert same_bits(adapter.step(frames[1]), expected[1])  # also after the block
        assert not any(t.is_inference() for t in model.state_dict().values())

    def test_detach_gives_the_model_back_as_it_was(self, model, frames):
        mix_flags(model)
        with left_as_it_was(model):
            adapter = self.adapter(model, drop_path=True, norm_stats="ema")
            for frame in frames:
                adapter.step(frame)
            assert adapter.detach() is model
            adapter.detach()

    def test_leaving_the_block_by_an_exception_gives_the_model_back_too(self, model, frames):
        mix_flags(model)

        def use():
            with self.adapter(model) as adapter:
                adapter.step(frames[0])
                raise KeyError

        with left_as_it_was(model), pytest.raises(KeyError):
            use()

    def test_keep_adapted_keeps_the_new_weights_and_gives_back_the_rest(self, model, frames):
        mix_flags(model)
        with left_as_it_was(model, "bytes"):
            adapter = self.adapter(model)
            for frame in frames:
                adapter.step(frame)
            adapted = photograph(model)["bytes"]
            adapter.detach(keep_adapted=True)
            assert photograph(model)["bytes"] == adapted

    def test_between_steps_no_hook_no_gradient_and_no_flag_is_left(self, model, frames):
        frozen = settle_norms(model).requires_grad_(False)
        adapter = self.adapter(frozen, drop_path=True)
        with left_as_it_was(frozen, "bytes"):
            adapter.step(frames[0])
        assert adapter.last.adapted

    def test_a_frozen_encoder_still_learns_and_its_flags_come_back(self, model, frames):
        with self.adapter(model) as adapter:
            expected = adapter.step(frames[0])
        model.requires_grad_(False)
        with self.adapter(model) as adapter:
            assert same_bits(adapter.step(frames[0]), expected)
        assert not any(p.requires_grad for p in model.parameters())

    def test_out_of_memory_says_what_to_lower_and_leaves_the_stream_as_it_was(self, model, frames):
        adapter = self.adapter(model, restart_optimizer=False, source_pull=0.0, norm_stats="frozen")
        for frame in frames[:2]:
            adapter.step(frame)
        before, weights = adapter.state_dict(), photograph(model)

        def burst(*_):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

        handle = adapter.branch.info.stem.register_forward_hook(burst)
        with pytest.raises(MemoryLimitError, match="batch_size=2.*lower batch_size or crop_size") as caught:
            adapter.step(frames[2])
        handle.remove()
        assert isinstance(caught.value, MemoryError)
        assert isinstance(caught.value, TTTAdaptError)
        assert same_bits(adapter.state_dict(), before)
        assert photograph(model) == weights
        after = adapter.step(frames[2])
        adapter.load_state_dict(before)
        assert same_bits(adapter.step(frames[2]), after)

    @pytest.mark.parametrize("kind", ["nan", "layout", "dtype", "size", "type"])
    def test_a_bad_frame_raises_before_anything_changes(self, model, frames, kind):
        adapter = self.adapter(model)
        adapter.step(frames[0])
        bad = {
            "nan": torch.full_like(frames[0], float("nan")),
            "layout": frames[0].permute(1, 2, 0),
            "dtype": frames[0].long(),
            "size": torch.zeros(3, self.size[0] + 16, self.size[1]),
            "type": "frame.png",
        }[kind]
        before, weights = adapter.state_dict(), photograph(model)
        for call in (adapter.step, adapter.adapt):
            with pytest.raises(TTTAdaptError) as caught:
                call(bad)
            assert isinstance(caught.value, TypeError if kind in ("dtype", "type") else ValueError)
        assert same_bits(adapter.state_dict(), before)
        assert photograph(model) == weights

    def test_an_error_of_the_model_comes_through_and_leaves_the_stream_as_it_was(self, model, frames):
        adapter = self.adapter(model, restart_optimizer=False, source_pull=0.0, norm_stats="frozen")
        adapter.step(frames[0])
        before = adapter.state_dict()

        def burst(*_):
            raise ZeroDivisionError

        handle = adapter.branch.info.stem.register_forward_hook(burst)
        with pytest.raises(ZeroDivisionError):
            adapter.step(frames[1])
        handle.remove()
        assert same_bits(adapter.state_dict(), before)
        with pytest.raises(FrameError):
            adapter.step(torch.zeros(3, 5))

    def test_a_second_adapter_on_the_same_model_is_refused_until_the_first_is_gone(self, model, frames):
        adapter = self.adapter(model)
        with pytest.raises(StateError, match="already has a StreamAdapter.*detach"):
            self.adapter(model)
        adapter.step(frames[0])
        adapter.detach()
        with pytest.raises(StateError, match="detached.*new StreamAdapter"):
            adapter.step(frames[0])
        self.adapter(model).step(frames[0])


class TestResNet(AdapterContract):
    encoder, size = "layer4", (64, 64)

    def make(self):
        return zoo.resnet()


class TestConvNeXt(AdapterContract):
    encoder, size = "stages", (64, 64)

    def make(self):
        return zoo.convnext()


class TestSwin(AdapterContract):
    size = (64, 96)

    def make(self):
        return zoo.swin(drop_path_rate=0.2)


class TestViT(AdapterContract):
    def make(self):
        return zoo.vit(drop_path_rate=0.2)


class TestViTWithRegisters(AdapterContract):
    def make(self):
        return zoo.vit_registers()


class TestRotaryEva(AdapterContract):
    size = (42, 56)

    def make(self):
        return zoo.eva()


class TestRotaryDINOv3(AdapterContract):
    def make(self):
        return zoo.dinov3()


class TestUNetWithCopiedHead(AdapterContract):
    encoder, decoder = "encoder", "copy_head"

    def make(self):
        return zoo.UNet()


class NothingRepeated:
    """Before an `AdapterContract`: an encoder of single layers."""

    def test_activation_checkpointing_changes_no_bit_and_leaves_the_model_as_it_was(self, model):
        with left_as_it_was(model), pytest.raises(ConfigError, match="no repeated blocks .*: set micro_batch instead"):
            self.adapter(model, grad_checkpointing=True)


class TestMaskQueryNet(NothingRepeated, AdapterContract):
    encoder = "backbone"

    def make(self):
        return zoo.MaskQueryNet()


class TestDenseModel(AdapterContract):
    encoder, decoder = "backbone", "copy_head"

    def make(self):
        return DenseModel("resnet18", 5, width=16, encoder_options={"channels": (8, 16, 24, 32)})


class TestTinyCarefully(NothingRepeated, AdapterContract):
    """All the other settings at once."""

    encoder = "backbone"
    config = CONFIG.replace(
        iterations=2, source_pull=0.3, grad_clip=0.1, crop_size=(16, 32), norm_stats="ema", precision="bf16"
    )

    def make(self):
        return zoo.TinySeg()

    def test_adaptation_changes_encoder_and_branch_and_predictions_and_never_the_head(self, model, frames):
        head = {name: t.clone() for name, t in model.head.state_dict().items()}
        adapter = self.adapter(model)
        for frame in frames:
            adapter.step(frame)
        assert same_bits(dict(model.head.state_dict()), head)

    def test_at_lr_zero_predictions_are_those_of_the_plain_model_bit_for_bit(self, model, frames):
        with torch.no_grad():
            plain = [model(frame[None]) for frame in frames]
        adapter = self.adapter(model, lr=0.0, norm_stats="frozen")
        assert all(same_bits(adapter.step(frame), p) for frame, p in zip(frames, plain, strict=True))
