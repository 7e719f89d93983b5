"""What `MAEBranch` promises, for every family of encoders."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models as zoo
from conftest import left_as_it_was, mix_flags, photograph, same_bits, settle_norms
from ttt_adapt import MAEBranch, Reconstruction, TTTAdaptError
from ttt_adapt.errors import CheckpointError, ConfigError, EncoderError, FrameError, StateError
from ttt_adapt.model.encoder import inspect_encoder
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
        prediction = decoded(branch)
        loss = branch.reconstruct(images, mask=mask).loss
        h, w = self.odd_size
        expected = _loss_by_hand(prediction[0][..., :h, :w], images, mask, self.patch, loss_on, norm_pix_loss)
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


def decoded(branch: MAEBranch) -> list[torch.Tensor]:
    """Where every prediction of the decoder goes from now on: as the loss sees it, in its units."""
    seen: list[torch.Tensor] = []
    branch.decoder.register_forward_hook(lambda _m, _a, prediction: seen.append(prediction.detach()))
    return seen


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


# ---- pixels on plain ViTs, and the models that must never lose a token


@pytest.mark.parametrize(("make", "patch"), [(zoo.vit, 16), (zoo.eva, 14), (zoo.vit_features, 16)])
def test_a_plain_vit_takes_pixel_masking_too(make, patch):
    model = make()
    branch = MAEBranch.attach(model, "" if make is zoo.vit_features else "norm", masking="pixels")
    assert branch.masking == "pixels"
    assert branch.patch_size == 16
    images = torch.randn(2, 3, 50, 71)
    out = branch.reconstruct(images)
    assert out.prediction.shape == images.shape
    assert branch.draw_mask(images).shape == (2, 4, 5)
    whole = torch.randn(1, 3, 4 * patch, 5 * patch)  # whole tokens, which are no whole patches where they are 14 wide
    assert branch.draw_mask(whole).shape == (1, 4, 5)
    assert branch.reconstruct(whole).prediction.shape == whole.shape


def test_pixel_masks_that_do_not_meet_the_tokens_still_hide_exactly_their_patches():
    """Patch 16 on a model with tokens of 14: the frame is padded to the tokens and the mask stays on its own grid."""
    model = zoo.eva().eval()
    branch = MAEBranch.attach(model, "norm", masking="pixels", norm_pix_loss=True)
    images = torch.randn(1, 3, 50, 71)
    mask = branch.draw_mask(images)
    visible = upsample_mask(mask, 16)[..., :50, :71]
    other = torch.where(visible, images, torch.randn_like(images))
    seen = decoded(branch)  # `reconstruct` returns it scaled by the statistics of the hidden patches
    assert branch.reconstruct(images, mask=mask).prediction.shape == images.shape
    branch.reconstruct(other, mask=mask)
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    ("make", "encoder"),
    [
        (zoo.beit, "blocks"),
        (lambda: zoo.beit(init_values=1e-5), "blocks"),
        (zoo.swin, "norm"),
        (zoo.swin_features, ""),
        (zoo.WindowNet, "norm"),
        (lambda: zoo.WindowNet(table=False), "norm"),
        (zoo.resnet, "layer4"),
        (zoo.UNet, "encoder"),
    ],
    ids=["beit", "beit scaled", "swin", "swin features", "windows of tokens", "windows, no table", "resnet", "unet"],
)
def test_windowed_and_relative_position_models_never_get_token_masking(make, encoder):
    model = make()
    assert MAEBranch.attach(model, encoder).masking == "pixels"
    with left_as_it_was(model), pytest.raises(EncoderError, match='masking="tokens" needs a plain transformer.*pixels'):
        MAEBranch.attach(model, encoder, masking="tokens")


def test_the_patch_size_is_rounded_to_whole_tokens():
    model = zoo.eva()
    for asked, given in ((1, 14), (16, 14), (24, 28), (28, 28)):
        assert MAEBranch.attach(model, "norm", patch_size=asked).patch_size == given


def test_patches_of_several_tokens_hide_them_together():
    model = zoo.vit().eval()
    branch = MAEBranch.attach(model, "norm", patch_size=32, mask_ratio=0.75)
    images = torch.randn(2, 3, 70, 100)
    mask = branch.draw_mask(images)
    assert mask.shape == (2, 3, 4)
    every, kept = [], []  # tokens in front of the blocks, and those that the first block sees
    model.norm_pre.register_forward_hook(lambda _m, _a, tokens: every.append(tokens[:, 1:]))
    model.blocks[0].norm1.register_forward_pre_hook(lambda _m, args: kept.append(args[0][:, 1:]))
    assert branch.reconstruct(images, mask=mask).prediction.shape == images.shape
    assert every[0].shape[:2] == (2, 6 * 8)
    assert kept[0].shape[:2] == (2, 3 * 4)
    for i in range(2):
        order = (every[0][i] == kept[0][i][:, None]).all(-1).nonzero()[:, 1].tolist()
        assert len(order) == 3 * 4
        assert order == sorted(order)
        cells = {(n // 8 // 2, n % 8 // 2) for n in order}
        assert cells == {tuple(cell) for cell in mask[i].nonzero().tolist()}


# ---- encoders that cannot be used


def test_an_unknown_path_comes_with_the_nearest_names():
    with pytest.raises(EncoderError, match="UNet has no module 'encodr'; nearest: 'encoder'"):
        MAEBranch.attach(zoo.UNet(), "encodr")


def test_an_encoder_that_is_never_reached_is_refused():
    model = zoo.UNet()
    model.spare = nn.Conv2d(3, 4, 3)
    with left_as_it_was(model), pytest.raises(EncoderError, match="Conv2d.*never reached"):
        MAEBranch.attach(model, "spare")
    model.unused = nn.ModuleList([nn.Conv2d(3, 4, 3)])
    with left_as_it_was(model), pytest.raises(EncoderError, match="never reached"):
        MAEBranch.attach(model, "unused")


def test_a_list_that_the_model_loops_over_ends_where_its_last_member_ends():
    model = zoo.WindowNet()
    assert inspect_encoder(model, "stage").module is model.stage[1]


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())])
def test_pooled_features_are_refused_with_a_hint(pool):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), pool)
    with left_as_it_was(model), pytest.raises(EncoderError, match="name an earlier module, before.*pooled"):
        MAEBranch.attach(model, "1")


def test_a_model_without_parameters_is_refused():
    with pytest.raises(EncoderError, match="no parameters.*nothing to adapt"):
        MAEBranch.attach(nn.Sequential(nn.AvgPool2d(4)), "0")


def test_an_encoder_without_parameters_or_gradient_is_refused():
    model = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(3, 8, 1))
    with left_as_it_was(model), pytest.raises(EncoderError, match="no gradient"):
        MAEBranch.attach(model, "0")

    class Closed(zoo.PlainSeg):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(EncoderError, match=r"torch.no_grad\(\)"):
        MAEBranch.attach(Closed(), "backbone")


def test_a_model_made_under_inference_mode_is_refused():
    with torch.inference_mode():
        model = zoo.PlainSeg()
    with pytest.raises(EncoderError, match="inference_mode"):
        MAEBranch.attach(model, "backbone")


def test_a_model_without_a_stem_is_refused_for_pixels():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(3, 8)

        def forward(self, x):
            return self.body(x.permute(0, 2, 3, 1))

    with pytest.raises(EncoderError, match="stem"):
        MAEBranch.attach(Linear(), "body")


def test_a_model_that_takes_no_image_says_what_was_tried():
    class Fussy(zoo.PlainSeg):
        def forward(self, x):
            if x.shape[-1] != 48:
                raise RuntimeError("only 48 wide")
            return super().forward(x)

    with pytest.raises(EncoderError, match=r"tried 128 x 160: RuntimeError: only 48 wide.*image_size=\(H, W\)"):
        MAEBranch.attach(Fussy(), "backbone")
    assert MAEBranch.attach(Fussy(), "backbone", image_size=(32, 48)).info.probe_size == (32, 48)


def test_a_frozen_encoder_is_found_as_well_and_stays_frozen():
    model = zoo.UNet().requires_grad_(False)
    with left_as_it_was(model):
        branch = MAEBranch.attach(model, "encoder")
    assert len(branch.encoder_parameters()) == len(list(model.encoder.parameters()))


def test_the_encoder_may_be_given_as_a_module():
    model = zoo.UNet()
    by_name, by_module = (MAEBranch.attach(model, encoder) for encoder in ("encoder", model.encoder))
    assert by_module.info.path == by_name.info.path == "encoder"
    assert list(by_module.encoder_parameters()) == list(by_name.encoder_parameters())


def test_batchnorm_of_the_encoder_alone_is_held_still_by_the_branch():
    model = settle_norms(zoo.UNet())
    branch = MAEBranch.attach(model, "encoder")
    assert {id(n) for n in branch.info.norms} == {id(n) for n in norm_layers(model.encoder)}


def test_norms_without_weights_are_held_still_where_a_masked_pass_calls_them():
    model = nn.Sequential(
        nn.BatchNorm2d(3, affine=False),
        nn.Conv2d(3, 8, 4, 4),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 5, 1),
        nn.BatchNorm2d(5, affine=False),
    ).train()
    branch = MAEBranch.attach(model, "2")
    assert branch.info.norms == [model[0], model[2]]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    branch.loss(torch.randn(2, 3, 32, 48)).backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    plain = list(model)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # what distributed training puts in their place
    assert model[0] is not plain[0]
    assert branch.info.norms == [model[0], model[2]]
    model[0] = nn.Sequential(plain[0])  # a wrapper around a layer that was seen
    assert branch.info.norms == [plain[0], model[2]]


def test_norms_without_weights_that_only_the_head_calls_are_none_of_the_encoders():
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.body = nn.BatchNorm2d(5, affine=False), nn.Conv2d(3, 5, 4, 4)

        def forward(self, x):
            return self.norm(self.body(x))

    assert MAEBranch.attach(Tail(), "body").info.norms == []


@pytest.mark.parametrize("encoder", [None, 3, ["encoder"]])
def test_an_encoder_that_is_no_path_is_refused_with_names_to_choose_from(encoder):
    model = zoo.UNet()
    with left_as_it_was(model), pytest.raises(EncoderError, match=r"encoder is .*expected the dotted path.*nearest: '"):
        MAEBranch.attach(model, encoder)


@pytest.mark.parametrize("value", ["no", 1, None])
def test_the_patch_normalisation_is_true_or_false(value):
    with pytest.raises(ConfigError, match="norm_pix_loss is .*expected True or False"):
        MAEBranch.attach(zoo.PlainSeg(), "backbone", norm_pix_loss=value)
    branch = MAEBranch.attach(zoo.PlainSeg(), "backbone")
    with pytest.raises(ConfigError, match="norm_pix_loss"), branch.using(norm_pix_loss=value):
        pass
    assert branch.norm_pix_loss is False


def test_a_given_mask_draws_no_other():
    branch, images = MAEBranch.attach(zoo.PlainSeg(), "backbone"), torch.randn(2, 3, 32, 40)
    mask, generator = branch.draw_mask(images), torch.Generator().manual_seed(3)
    states = generator.get_state(), torch.get_rng_state()
    branch.reconstruct(images, mask=mask, generator=generator)
    branch.reconstruct(images, mask=mask)
    assert torch.equal(generator.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    with pytest.raises(ConfigError, match=r"mask is \(2, 2, 2\).*expected bool \(2, 2, 3\)"):
        branch.reconstruct(images, mask=mask[..., :2])


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


# ---- Hugging Face


def _hf(name: str, **extra) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'ttt-adapt[test]'")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(**sizes, **extra)
    return getattr(transformers, f"{name}Model")(config).eval()


HUGGING_FACE = {
    "ViT": (lambda: _hf("ViT", image_size=64, patch_size=16), "layernorm", 16, 1, (64, 64)),
    "DINOv2": (lambda: _hf("Dinov2", image_size=56, patch_size=14), "layernorm", 14, 1, (50, 71)),
    "DINOv2 with registers": (
        lambda: _hf("Dinov2WithRegisters", image_size=56, patch_size=14, num_register_tokens=3),
        "layernorm",
        14,
        4,
        (50, 71),
    ),
    "DINOv3": (
        lambda: _hf("DINOv3ViT", image_size=64, patch_size=16, num_register_tokens=2),
        "norm",
        16,
        3,
        (50, 71),
    ),
}


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_hugging_face_vits_are_masked_by_tokens_and_left_as_they_were(family):
    make, encoder, patch, prefix, size = HUGGING_FACE[family]
    model = make()
    images = torch.randn(2, 3, *size)
    with left_as_it_was(model):
        branch = MAEBranch.attach(model, encoder)
        out = branch.reconstruct(images)
    assert branch.masking == "tokens"
    assert (branch.info.tokens.patch_size, branch.info.tokens.prefix) == (patch, prefix)
    assert out.prediction.shape == images.shape
    branch.loss(images).backward()
    assert all(p.grad is not None for p in branch.encoder_parameters().values())
    mask = branch.draw_mask(images)
    visible = upsample_mask(mask, patch)[..., : size[0], : size[1]]
    other = torch.where(visible, images, torch.randn_like(images))
    same = [branch.reconstruct(x, mask=mask).prediction for x in (images, other)]
    assert torch.equal(same[0], same[1])


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_hugging_face_blocks_see_the_visible_tokens_only(family):
    make, encoder, patch, prefix, _ = HUGGING_FACE[family]
    model = make()
    branch = MAEBranch.attach(model, encoder)
    lengths = []
    for block in branch.info.tokens.blocks:
        block.register_forward_hook(lambda _m, args, out: lengths.append(args[0].shape[1]))
    images = torch.randn(1, 3, 4 * patch, 4 * patch)
    branch.reconstruct(images)
    assert lengths == [prefix + 16 - hidden_patches(16, 0.8)] * 2


def test_error_types_are_builtins_too():
    for error, builtin in ((ConfigError, ValueError), (EncoderError, ValueError), (StateError, RuntimeError)):
        assert issubclass(error, TTTAdaptError)
        assert issubclass(error, builtin)


def test_a_size_that_the_model_refuses_is_told_with_the_users_own_numbers():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    branch = MAEBranch.attach(model, "norm")
    with pytest.raises(FrameError, match=r"does not take images of \(100, 90\).*\(112, 96\)"):
        branch.loss(torch.randn(1, 3, 100, 90))
