"""`encoder="auto"` ends the encoder where people would name it."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models as zoo
from conftest import left_as_it_was
from ttt_adapt import MAEBranch, StreamAdapter
from ttt_adapt.errors import EncoderError
from ttt_adapt.model.encoder import inspect_encoder


class FlatUNet(nn.Module):
    """A U-Net without a module that holds its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down1, self.down2 = zoo.Pair(3, 4), zoo.Pair(4, 8), zoo.Pair(8, 16)
        self.up1, self.up2, self.out = zoo.Pair(24, 8), zoo.Pair(12, 4), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.inc(x)
        middle = self.down1(F.max_pool2d(fine, 2))
        coarse = self.down2(F.max_pool2d(middle, 2))
        x = self.up1(torch.cat([middle, F.interpolate(coarse, scale_factor=2)], 1))
        return self.out(self.up2(torch.cat([fine, F.interpolate(x, scale_factor=2)], 1)))


class TwoHeads(nn.Module):
    """Two heads on one trunk; the second one has a deep map of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 16, 2, 2), nn.GELU())
        self.boxes, self.masks = (
            nn.Linear(16, 4),
            nn.Sequential(nn.Conv2d(16, 16, 2, 2), nn.GELU(), nn.Conv2d(16, 5, 1)),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        return {"boxes": self.boxes(features.mean((2, 3))), "masks": self.masks(features)}


class Wrapped(nn.Module):
    """A model inside of another, as wrappers and pipelines hold it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(2 * x)


class TokenNet(nn.Module):
    """Patch tokens with a class token, read by a linear head; the blocks are a list that the model loops over."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Conv2d(3, 16, 16, 16), nn.Parameter(torch.randn(1, 1, 16))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(x), -1, -1), tokens], 1)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(tokens[:, 0])


def sequential() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 12, 3, 1, 1), nn.GELU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (zoo.resnet, "layer4"),
        (zoo.convnext, "stages"),
        (zoo.vit, "norm"),
        (zoo.swin, "norm"),
        (lambda: timm.create_model("test_efficientnet"), "bn2"),
        (zoo.resnet_features, ""),
        (zoo.UNet, "encoder"),
        (lambda: zoo.UNet(as_dict=True), "encoder"),
        (zoo.PlainSeg, "backbone"),
        (zoo.MaskQueryNet, "backbone"),
        (zoo.TupleNet, "backbone"),
        (zoo.PooledSeg, "backbone"),
        (FlatUNet, "down2"),
        (TwoHeads, "trunk"),
        (TokenNet, "layers"),
        (lambda: Wrapped(TokenNet()), "inner.layers"),
        (lambda: Wrapped(zoo.PlainSeg()), "inner.backbone"),
        (sequential, "0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_encoder_ends_where_people_would_name_it(make, path):
    model = make().eval()
    with left_as_it_was(model):
        assert inspect_encoder(model).path == path


def test_a_frozen_model_in_training_mode_is_looked_at_and_left_as_it_was():
    model = zoo.resnet().requires_grad_(False).train()
    with left_as_it_was(model):
        assert inspect_encoder(model).path == "layer4"


def test_of_a_model_that_resizes_all_images_to_one_size_the_encoder_has_whole_cells():
    class Resizing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.img_size, self.fine, self.rough = 48, nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 2, 1)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.interpolate(x, (48, 48))
            return self.head(self.rough(self.fine(x)).mean((2, 3)))

    branch = MAEBranch.attach(Resizing())
    assert (branch.info.path, branch.info.probe_size) == ("fine", (48, 48))


def test_attach_needs_no_encoder_and_adapts_all_that_all_heads_share():
    model = TwoHeads()
    branch = MAEBranch.attach(model)
    assert set(branch.encoder_parameters()) == {f"trunk.{name}" for name, _ in model.trunk.named_parameters()}
    assert branch.loss(torch.randn(2, 3, 32, 48)).isfinite()


def test_the_alternatives_are_the_other_ends_and_none_where_the_caller_chose():
    model = zoo.resnet().eval()
    assert inspect_encoder(model).alternatives[:2] == ("layer3", "layer2")
    assert inspect_encoder(model, "layer3").alternatives == ()


def test_a_model_without_any_map_is_refused_and_told_to_name_its_encoder():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    with left_as_it_was(model), pytest.raises(EncoderError, match='no module of Sequential.*encoder="..."'):
        inspect_encoder(model)


class InstallsHooks(nn.Module):
    """As models of transformers: the first pass installs hooks that collect what layers return, and notes that."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 8, 3, 1, 1))
        self.head = nn.Conv2d(16, 5, 1)
        self.installed, self.collected = False, []

    def forward(self, x):
        if not self.installed:
            for layer in (self.backbone[0], self.backbone[2]):
                layer.register_forward_hook(lambda _m, _a, output: self.collected.append(output))
            self.installed = True
        self.collected.clear()
        self.backbone(x)
        return self.head(torch.cat(self.collected, 1))


def test_hooks_that_a_model_installs_in_its_first_pass_are_installed_once():
    model, x = InstallsHooks().eval(), torch.randn(1, 3, 32, 48)
    twin = InstallsHooks().eval()
    twin.load_state_dict(model.state_dict())
    branch = MAEBranch.attach(model)
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))
    assert branch.loss(x).isfinite()
    with StreamAdapter(model, branch) as adapter:
        adapter.step(torch.randn(3, 32, 48))
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))


class FitsItselfToASize(nn.Module):
    """As Swin of transformers: a pass over a small image makes a window smaller, and fails where it does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.window = nn.Conv2d(3, 8, 8, 8), 7

    def forward(self, x):
        features = self.backbone(x)
        self.window = min(self.window, features.shape[-1] // 4)
        if features.shape[-1] % self.window or self.window != 7:
            raise RuntimeError(f"windows of {self.window} do not fit")
        return features


def test_a_size_that_a_model_refuses_leaves_it_whole_for_the_next_one():
    model = FitsItselfToASize().eval()
    assert inspect_encoder(model).probe_size == (224, 224)
    assert model.window == 7


class DetectionTokens(nn.Module):
    """As YOLOS: patch tokens between a class token and many tokens that the heads read."""

    def __init__(self, behind: int = 40) -> None:
        super().__init__()
        self.embed, self.behind = nn.Conv2d(3, 16, 16, 16), nn.Parameter(torch.randn(1, behind, 16))
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(3))
        self.classes, self.boxes = nn.Linear(16, 5), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(x), -1, -1), tokens, self.behind.expand(len(x), -1, -1)], 1)
        for layer in self.layers:
            tokens = layer(tokens)
        found = tokens[:, -self.behind.shape[1] :]
        return self.classes(found), self.boxes(found)


def test_an_encoder_holds_the_layers_and_not_the_embedding_of_patches_alone():
    info = inspect_encoder(DetectionTokens().eval())
    assert info.path == "layers"
    assert (info.maps[0].prefix, info.maps[0].suffix) == (1, 40)
    assert any(name.startswith("layers.2") for name in info.parameters)


class Windowed(nn.Module):
    """As a windowed ViT: its tokens are sorted into windows inside, and only what it returns is a map again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, c, h, w = x.shape
        tokens = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens.view(b, h // 2, w // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


def test_a_model_whose_layers_show_no_map_but_at_its_end_is_the_encoder_itself():
    assert inspect_encoder(Windowed().eval()).path == ""


class Queries(nn.Module):
    """Encoder and decoder of a detector with queries."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 6, 16))
        self.body = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.GELU(), nn.Conv2d(16, 16, 2, 2), nn.GELU())
        self.decoder = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.body(x).flatten(2).transpose(1, 2)
        return self.decoder(self.queries.expand(len(x), -1, -1), memory, memory)[0]


class QueryDetector(nn.Module):
    """As detectors of Hugging Face: the heads lie beside the part that holds encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.classes, self.boxes = Queries(), nn.Linear(16, 5), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.model(x)
        start = self.model.queries.sigmoid()[..., :4].expand(len(x), -1, -1)  # the same for all images
        return {"classes": self.classes(found), "boxes": self.boxes(found), "start": start}


def test_the_decoder_of_queries_is_a_head_and_outputs_without_an_image_have_no_say():
    assert inspect_encoder(QueryDetector().eval()).path == "model.body"


class LearnedPositions(nn.Module):
    """A map of the size of its input that does not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 16, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.weight, x.shape[-2:])


def test_a_map_that_does_not_depend_on_the_images_makes_way_for_the_next_one():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 16, 2, 2))
            self.positions, self.head = LearnedPositions(), nn.Conv2d(16, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            features = self.trunk(x)
            return self.head(features + self.positions(features))

    assert inspect_encoder(Net().eval()).path == "trunk"


def test_a_mask_beside_the_features_is_no_map():
    class WithMask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 16, 2, 2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = self.body(x)
            return features, torch.ones(features[:, 0].shape, dtype=torch.bool)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = WithMask(), nn.Conv2d(16, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            features, mask = self.backbone(x)
            return self.head(features * mask[:, None])

    info = inspect_encoder(Net().eval())
    assert (info.path, [spec.index for spec in info.maps]) == ("backbone", [0])


class Gated(nn.Module):
    """A block whose gate is coarser than its map."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(F.avg_pool2d(x, 2)).sigmoid()
        return x + self.body(x) * F.interpolate(gate, scale_factor=2)


class AttentionPool(nn.Module):
    """Reads all tokens with one query."""

    def __init__(self) -> None:
        super().__init__()
        self.kv, self.query = nn.Linear(8, 16), nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        keys, values = self.kv(tokens).chunk(2, -1)
        return F.scaled_dot_product_attention(self.query.expand(len(tokens), -1, -1), keys, values)[:, 0]


class GatedNet(nn.Module):
    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 8, 8), nn.Sequential(Gated(), Gated())
        self.norm, self.pool, self.head = nn.LayerNorm(8), AttentionPool() if pool else None, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.blocks(self.stem(x)).flatten(2).transpose(1, 2))
        return self.head(tokens.mean(1) if self.pool is None else self.pool(tokens))


@pytest.mark.parametrize("pool", [False, True])
def test_a_part_of_a_block_or_of_a_pooling_is_no_end_of_an_encoder(pool):
    info = inspect_encoder(GatedNet(pool).eval())
    assert info.path == "norm"
    assert not any(part in path for path in info.alternatives for part in ("gate", "body", "kv"))
