"""What `MAEBranch` promises, for every family of encoders."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models as zoo
from conftest import left_as_it_was, mix_flags, photograph, same_bits, settle_norms
from ttt_adapt import MAEBranch, Reconstruction, TTTAdaptError
from ttt_adapt.errors import CheckpointError, EncoderError, FrameError, StateError
from ttt_adapt.model.hooks import run_encoder
from ttt_adapt.model.norms import norm_layers
from ttt_adapt.objectives.masking import hidden_patches, upsample_mask


class BranchContract:
    """Subclass it per encoder family."""

    encoder = "norm"
    masking = "pixels"
    size = (48, 80)  # no square, and whole patches
    odd_size = (50, 71)  # no multiple of anything
    patch = 16

    def make(self) -> nn.Module:
        raise NotImplementedError

    @pytest.fixture
    def model(self) -> nn.Module:
        return settle_norms(self.make())

    @pytest.fixture
    def images(self) -> torch.Tensor:
        return torch.randn(2, 3, *self.size)

    @pytest.fixture
    def branch(self, model) -> MAEBranch:
        return MAEBranch.attach(model, self.encoder)

    def test_auto_chooses_the_masking_that_fits(self, branch):
        assert branch.masking == self.masking
        assert branch.patch_size == self.patch
        assert (branch.info.tokens is not None) == (self.masking == "tokens")

    def test_attach_use_and_detach_leave_the_model_as_it_was(self, model, images):
        mix_flags(model)
        with left_as_it_was(model):
            branch = MAEBranch.attach(model, self.encoder)
        with left_as_it_was(model, "grads"):
            branch.loss(images).backward()
            branch.reconstruct(images)
            model.zero_grad(set_to_none=True)
        with left_as_it_was(model):
            branch.detach()

    def test_attaching_changes_no_output_by_a_single_bit(self, model, images):
        with torch.no_grad():
            before = model(images)
            branch = MAEBranch.attach(model, self.encoder)
            assert same_bits(model(images), before)
            branch.reconstruct(images)
            assert same_bits(model(images), before)
            branch.detach()
            assert same_bits(model(images), before)

    def test_neither_state_dict_holds_weights_of_the_other(self, model):
        keys, parameters = list(model.state_dict()), {id(p) for p in model.parameters()}
        branch = MAEBranch.attach(model, self.encoder)
        assert list(model.state_dict()) == keys
        assert not any(id(p) in parameters for p in branch.parameters())
        storage = {t.data_ptr() for t in model.state_dict().values() if t.numel()}
        assert not any(t.data_ptr() in storage for t in branch.state_dict().values() if t.numel())
        assert all(key.startswith(("decoder.", "mask_channel.", "mask_token")) for key in branch.state_dict())

    def test_the_loss_reaches_every_encoder_and_branch_parameter_and_no_head(self, model, branch, images):
        nn.init.normal_(branch.mask_channel.weight) if self.masking == "pixels" else None
        branch.loss(images, generator=torch.Generator().manual_seed(0)).backward()
        inside = {id(p) for p in branch.encoder_parameters().values()}
        for name, p in branch.named_parameters():
            assert not p.requires_grad or p.grad is not None, name
        for name, p in model.named_parameters():
            assert (p.grad is not None) == (id(p) in inside), name
        assert 0 < len(inside) <= len(list(model.parameters()))

    def test_the_encoder_is_what_its_features_depend_on(self, model, branch, images):
        leaves = [t for t in _leaves(run_encoder(model, branch.info.module, images)) if t.ndim > 2]
        total = sum(t.float().square().sum() for t in leaves)
        gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        used = {n for (n, _), g in zip(model.named_parameters(), gradients, strict=True) if g is not None}
        assert set(branch.encoder_parameters()) == used

    def test_a_frame_that_is_no_multiple_of_anything_works(self, branch):
        images = torch.randn(2, 3, *self.odd_size)
        out = branch.reconstruct(images, generator=torch.Generator().manual_seed(1))
        assert isinstance(out, Reconstruction)
        assert out.prediction.shape == images.shape
        assert out.mask.shape == (2, 1, *self.odd_size)
        assert out.mask.dtype == torch.bool
        assert out.loss.isfinite()
        assert branch.loss(images).isfinite()

    def test_the_mask_is_exact_and_true_means_visible(self, branch):
        images = torch.randn(3, 3, *self.size)
        mask = branch.draw_mask(images)
        rows, columns = -(-self.size[0] // self.patch), -(-self.size[1] // self.patch)
        assert mask.shape == (3, rows, columns)
        assert (~mask).flatten(1).sum(1).tolist() == [hidden_patches(rows * columns, 0.8)] * 3
        out = branch.reconstruct(images, mask=mask)
        assert torch.equal(out.mask, upsample_mask(mask, self.patch)[..., : self.size[0], : self.size[1]])

    def test_hidden_pixels_never_reach_the_prediction(self, branch, images):
        """The loss looks at hidden pixels as its target; the encoder does not see them."""
        mask = branch.draw_mask(images)
        visible = upsample_mask(mask, self.patch)[..., : self.size[0], : self.size[1]]
        other = torch.where(visible, images, torch.randn_like(images) * 5)
        first, second = (branch.reconstruct(x, mask=mask) for x in (images, other))
        assert torch.equal(first.prediction, second.prediction)
        assert not torch.equal(first.loss, second.loss)
        moved = torch.where(visible, images + 1.0, images)
        assert not torch.equal(branch.reconstruct(moved, mask=mask).prediction, first.prediction)

    def test_a_seeded_generator_repeats_the_loss(self, branch, images):
        losses = [branch.loss(images, generator=torch.Generator().manual_seed(s)).item() for s in (4, 4, 5)]
        assert losses[0] == losses[1] != losses[2]

    @pytest.mark.parametrize("loss_on", ["masked", "all"])
    @pytest.mark.parametrize("norm_pix_loss", [False, True])
    def test_the_loss_equals_a_double_precision_computation_without_padded_pixels(self, model, loss_on, norm_pix_loss):
        branch = MAEBranch.attach(model, self.encoder, loss_on=loss_on, norm_pix_loss=norm_pix_loss)
        images = torch.randn(2, 3, *self.odd_size)
        mask = branch.draw_mask(images, torch.Generator().manual_seed(2))
        predictions = []  # as the loss sees them, in its units
        branch.decoder.register_forward_hook(lambda _m, _a, prediction: predictions.append(prediction))
        loss = branch.reconstruct(images, mask=mask).loss
        h, w = self.odd_size
        expected = _loss_by_hand(predictions[0][..., :h, :w], images, mask, self.patch, loss_on, norm_pix_loss)
        assert loss.item() == pytest.approx(expected, rel=1e-5)

    def test_running_statistics_stay_and_no_flag_moves_in_training_mode(self, model, branch, images):
        model.train()
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        with left_as_it_was(model, "grads"):
            branch.loss(images).backward()
            branch.reconstruct(images)
        for name, b in model.named_buffers():
            assert torch.equal(b, buffers[name]), name

    def test_no_encoder_norm_is_in_training_mode_during_a_masked_pass(self, model, branch, images):
        model.train()
        seen = []
        handles = [n.register_forward_hook(lambda m, _a, _o: seen.append(m.training)) for n in norm_layers(model)]
        branch.loss(images)
        for handle in handles:
            handle.remove()
        assert not any(seen)
        assert bool(seen) == any(True for _ in branch.info.norms)

    def test_an_exception_in_the_middle_of_the_loss_leaves_the_model_as_it_was(self, model, branch, images):
        mix_flags(model)
        ran = []
        handles = [m.register_forward_hook(lambda m, _a, _o: ran.append(m)) for m in branch.info.module.modules()]
        branch.reconstruct(images)
        for handle in handles:
            handle.remove()
        last = next((m for m in reversed(ran) if not list(m.children())), branch.info.stem)

        def burst(*_):
            raise ZeroDivisionError("in the encoder")

        handle = last.register_forward_pre_hook(burst)
        with left_as_it_was(model), pytest.raises(ZeroDivisionError):
            branch.loss(images)
        with left_as_it_was(model), pytest.raises(TTTAdaptError):
            MAEBranch.attach(model, self.encoder)  # cannot be run, whatever the size
        handle.remove()
        assert branch.loss(images).isfinite()

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"encoder": "no.such.module"}, "no module 'no.such.module'; nearest: '"),
            ({"encoder": nn.Identity()}, "Identity.*is not a module of this"),
            ({"mask_ratio": 0.0}, "mask_ratio is 0.0"),
            ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
            ({"patch_size": 0}, "patch_size is 0"),
            ({"patch_size": 2.5}, "patch_size is 2.5"),
            ({"masking": "blocks"}, "masking is 'blocks'"),
            ({"loss_on": "visible"}, "loss_on is 'visible'"),
            ({"decoder": "mlp"}, "decoder is 'mlp'"),
        ],
    )
    def test_a_failed_attach_says_why_and_leaves_no_trace(self, model, wrong, message):
        mix_flags(model)
        with left_as_it_was(model), pytest.raises(TTTAdaptError, match=message) as caught:
            MAEBranch.attach(model, **{"encoder": self.encoder, **wrong})
        assert isinstance(caught.value, ValueError)

    def test_a_decoder_of_the_wrong_size_is_refused_with_its_shape(self, model):
        class Stamp(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(1))

            def forward(self, features):
                return self.weight * features.maps[0].new_zeros(1, 3, 5, 7)

        with left_as_it_was(model), pytest.raises(EncoderError, match=r"\(1, 3, 5, 7\).*expected \[B, 3, H, W\]"):
            MAEBranch.attach(model, self.encoder, decoder=Stamp())

    @pytest.mark.parametrize(
        "images", [torch.zeros(3, 48, 80), torch.zeros(1, 4, 48, 80), torch.zeros(1, 3, 48, 80).byte(), "image"]
    )
    def test_what_are_no_images_is_refused_with_what_came(self, branch, images):
        came = "str" if isinstance(images, str) else str(tuple(images.shape)).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(FrameError, match=f"{came}.*expected float images"):
            branch.loss(images)

    def test_it_works_under_no_grad_and_inference_mode(self, model, branch, images):
        expected = branch.reconstruct(images, generator=torch.Generator().manual_seed(0)).prediction
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                other = MAEBranch.attach(model, self.encoder)
                other.load_state_dict(branch.state_dict())
                again = other.reconstruct(images, generator=torch.Generator().manual_seed(0)).prediction
                assert torch.equal(again, expected)
            assert not any(p.is_inference() for p in other.parameters())
            other.loss(images).backward()

    def test_after_detach_every_use_is_an_error_that_says_what_to_do(self, model, images):
        with MAEBranch.attach(model, self.encoder) as branch:
            weights = {name: t.clone() for name, t in branch.state_dict().items()}
        branch.detach()
        for use in (lambda: branch.loss(images), lambda: branch.reconstruct(images), lambda: branch.model):
            with pytest.raises(StateError, match="detached.*attach"):
                use()
        assert same_bits(dict(branch.state_dict()), weights)

    def test_the_state_goes_into_another_branch_and_a_foreign_one_changes_nothing(self, model, branch, images):
        other = MAEBranch.attach(model, self.encoder)
        other.load_state_dict(branch.state_dict())
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        assert torch.equal(branch.loss(images, generator=generators[0]), other.loss(images, generator=generators[1]))
        state = dict(branch.state_dict())
        state["stranger"] = state.pop(next(iter(state)))
        before = {name: t.clone() for name, t in branch.state_dict().items()}
        with pytest.raises(CheckpointError, match=r"missing \(1\).*unknown \(1\): stranger"):
            branch.load_state_dict(state)
        assert same_bits(dict(branch.state_dict()), before)


def _leaves(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [leaf for value in values for leaf in _leaves(value)]


def _loss_by_hand(prediction, images, mask, patch, loss_on, norm_pix):
    """Pixel by pixel in double precision, patches cut by slices; a cut patch is normalised with the zeros beside it."""
    prediction, images = prediction.double(), images.double()
    total, count = 0.0, 0
    for b in range(len(images)):
        for row in range(mask.shape[1]):
            for column in range(mask.shape[2]):
                rows, columns = slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch)
                target = images[b, :, rows, columns]
                if norm_pix:
                    full = torch.zeros(3, patch, patch, dtype=torch.float64)
                    full[:, : target.shape[1], : target.shape[2]] = target
                    target = (target - full.mean()) / (full.var() + 1e-6).sqrt()
                if loss_on == "all" or not mask[b, row, column]:
                    error = (prediction[b, :, rows, columns] - target).square()
                    total += error.sum().item()
                    count += error.numel()
    return total / count


class TestResNet(BranchContract):
    encoder = "layer4"

    def make(self):
        return zoo.resnet()

    def test_the_encoder_parameters_are_all_but_the_classifier(self, model, branch):
        names = {name for name, _ in model.named_parameters()}
        assert set(branch.encoder_parameters()) == names - {"fc.weight", "fc.bias"}


class TestResNetStoppedEarly(BranchContract):
    encoder = "layer2"

    def make(self):
        return zoo.resnet()

    def test_what_runs_behind_the_encoder_is_no_part_of_it(self, branch):
        assert not any(name.startswith(("layer3", "layer4", "fc")) for name in branch.encoder_parameters())


class TestResNetFeatures(BranchContract):
    encoder = ""

    def make(self):
        return zoo.resnet_features()


class TestConvNeXt(BranchContract):
    encoder = "stages"

    def make(self):
        return zoo.convnext()


class TestSwin(BranchContract):
    def make(self):
        return zoo.swin()

    def test_channels_last_maps_are_known(self, branch):
        assert [spec.layout for spec in branch.info.maps] == ["nhwc"]


class TestSwinFeatures(BranchContract):
    encoder = ""

    def make(self):
        return zoo.swin_features()


class TestViT(BranchContract):
    masking = "tokens"

    def make(self):
        return zoo.vit()


class TestViTBlocks(BranchContract):
    masking, encoder = "tokens", "blocks"

    def make(self):
        return zoo.vit()


class TestViTWithRegisters(BranchContract):
    masking = "tokens"

    def make(self):
        return zoo.vit_registers()


class TestViTFeatures(BranchContract):
    masking, encoder = "tokens", ""

    def make(self):
        return zoo.vit_features()


class TestViTWithNeck(BranchContract):
    masking, encoder = "tokens", "neck"

    def make(self):
        return zoo.NeckViT()


class TestRotaryEva(BranchContract):
    masking, patch, size = "tokens", 14, (42, 70)

    def make(self):
        return zoo.eva()


class TestRotaryDINOv3(BranchContract):
    masking = "tokens"

    def make(self):
        return zoo.dinov3()


class TestUNet(BranchContract):
    encoder = "encoder"

    def make(self):
        return zoo.UNet()


class TestUNetWithDict(BranchContract):
    encoder = "encoder"

    def make(self):
        return zoo.UNet(as_dict=True)


class TestTupleBackbone(BranchContract):
    encoder = "backbone"

    def make(self):
        return zoo.TupleNet()


class TestMaskQueryNet(BranchContract):
    encoder = "backbone"

    def make(self):
        return zoo.MaskQueryNet()


def test_a_photograph_notices_what_it_should():
    """The check that the tests above lean on can fail."""
    for change in (
        lambda m: m.encoder.train(False),
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: next(m.parameters()).requires_grad_(False),
        lambda m: m.encoder.down[0][1].running_mean.add_(1),
        lambda m: setattr(m.head.out, "weight", nn.Parameter(m.head.out.weight.detach().clone())),
    ):
        model = zoo.UNet()
        before = photograph(model)
        change(model)
        assert photograph(model) != before
