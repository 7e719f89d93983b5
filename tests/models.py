"""Small models for the tests: one of each family of encoders, quick enough for one thread."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5


def timm_model(name: str, **options) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


TINY_VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3, "dynamic_img_size": True}


def resnet(**options) -> nn.Module:
    return timm_model("resnet18", channels=(8, 16, 24, 32), **options)


def resnet_features() -> nn.Module:
    return resnet(features_only=True)


def convnext() -> nn.Module:
    return timm_model("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 32, 48, 64))


def swin(**options) -> nn.Module:
    sizes = {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (2, 2, 4, 4)}
    return timm_model("swin_tiny_patch4_window7_224", strict_img_size=False, **sizes, **options)


def swin_features() -> nn.Module:
    return swin(features_only=True)


def vit(**options) -> nn.Module:
    return timm_model("vit_tiny_patch16_224", **{**TINY_VIT, **options})


def vit_features() -> nn.Module:
    return vit(features_only=True, out_indices=(0, 1))


def vit_registers() -> nn.Module:
    return timm_model("vit_base_patch16_reg4_gap_256", **TINY_VIT)


def eva() -> nn.Module:
    return timm_model("eva02_tiny_patch14_224", **TINY_VIT)


def dinov3() -> nn.Module:
    return timm_model("vit_tiny_patch16_dinov3_qkvb", **TINY_VIT)


def beit(**options) -> nn.Module:
    return timm_model("beit_base_patch16_224", depth=2, embed_dim=48, num_heads=3, **options)


class Pair(nn.Sequential):
    """Two convolutions with BatchNorm."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(
            nn.Conv2d(inside, outside, 3, padding=1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, padding=1),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
        )


class UNetEncoder(nn.Module):
    """Three levels; returns all of them, as a list or as a dict."""

    def __init__(self, as_dict: bool = False, width: int = 8) -> None:
        super().__init__()
        self.as_dict = as_dict
        self.down = nn.ModuleList([Pair(3, width), Pair(width, 2 * width), Pair(2 * width, 4 * width)])

    def forward(self, x: Tensor) -> list[Tensor] | dict[str, Tensor]:
        levels = []
        for i, pair in enumerate(self.down):
            x = pair(F.max_pool2d(x, 2) if i else x)
            levels.append(x)
        return {f"level{i}": level for i, level in enumerate(levels)} if self.as_dict else levels


class UNetHead(nn.Module):
    """Up again, with gated skip connections, so that the head is more than one path."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.gates = nn.ModuleList([nn.Conv2d(width, width, 1), nn.Conv2d(2 * width, 2 * width, 1)])
        self.up = nn.ModuleList([Pair(3 * width, width), Pair(6 * width, 2 * width)])
        self.out = nn.Conv2d(width, CLASSES, 1)

    def forward(self, levels: list[Tensor] | dict[str, Tensor]) -> Tensor:
        levels = list(levels.values()) if isinstance(levels, dict) else levels
        x = levels[-1]
        for i in (1, 0):
            x = F.interpolate(x, size=levels[i].shape[-2:], mode="bilinear", align_corners=False)
            x = self.up[i](torch.cat([levels[i] * self.gates[i](levels[i]).sigmoid(), x], dim=1))
        return self.out(x)


class UNet(nn.Module):
    """A plain U-Net; any H x W."""

    def __init__(self, as_dict: bool = False) -> None:
        super().__init__()
        self.encoder, self.head = UNetEncoder(as_dict), UNetHead()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class TupleBackbone(nn.Module):
    """Returns a nested tuple of maps and something that is no map."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)

    def forward(self, x: Tensor) -> tuple:
        fine = F.gelu(self.one(x))
        coarse = F.gelu(self.two(fine))
        return (fine, (coarse, coarse.mean((2, 3))))


class TupleNet(nn.Module):
    """A CNN whose encoder returns a nested tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.fc = TupleBackbone(), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x)[1][1])


class DictBackbone(nn.Module):
    """Convolutional backbone that returns a dict of maps at strides 4, 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 16, 24)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 4, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.res2 = Pair(8, widths[0])
        self.res3 = nn.Sequential(nn.Conv2d(widths[0], widths[1], 3, 2, 1), nn.BatchNorm2d(widths[1]), nn.ReLU())
        self.res4 = nn.Sequential(nn.Conv2d(widths[1], widths[2], 3, 2, 1), nn.BatchNorm2d(widths[2]), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        res2 = self.res2(self.stem(x))
        res3 = self.res3(res2)
        return {"res2": res2, "res3": res3, "res4": self.res4(res3)}


class QueryHead(nn.Module):
    """A pixel decoder and learned queries that cross-attend to it; masks are query times pixel embedding."""

    def __init__(self, queries: int = 6, width: int = 16) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in (8, 16, 24))
        self.mask_features = nn.Conv2d(width, width, 3, padding=1)
        self.query_feat, self.query_embed = nn.Embedding(queries, width), nn.Embedding(queries, width)
        self.attend = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.classify, self.mask_embed = nn.Linear(width, CLASSES + 1), nn.Linear(width, width)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.lateral[2](maps["res4"])
        for i, name in ((1, "res3"), (0, "res2")):
            x = F.interpolate(x, size=maps[name].shape[-2:]) + self.lateral[i](maps[name])
        memory = self.lateral[2](maps["res4"]).flatten(2).transpose(1, 2)
        query = self.query_feat.weight.expand(len(x), -1, -1)
        query = self.norm(query + self.attend(query + self.query_embed.weight, memory, memory)[0])
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(query), self.mask_features(x))
        return {"pred_logits": self.classify(query), "pred_masks": masks}


class MaskQueryNet(nn.Module):
    """The shape of Mask2Former in small: a backbone with a dict of maps, a pixel decoder, and mask queries."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.sem_seg_head = DictBackbone(), QueryHead()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.sem_seg_head(self.backbone(x))


class WindowBlock(nn.Module):
    """Attention inside windows of 4 x 4 tokens; tokens come and go as [B, L, C], as in mmseg's Swin."""

    def __init__(self, width: int, grid: tuple[int, int], table: bool) -> None:
        super().__init__()
        self.grid, self.norm, self.attend = grid, nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.relative_position_bias_table = nn.Parameter(torch.randn(2, 16, 16) * 0.02) if table else None

    def forward(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        h, w = (side // 4 for side in self.grid)
        y = self.norm(x).view(b, h, 4, w, 4, c).transpose(2, 3).reshape(b * h * w, 16, c)
        bias = self.relative_position_bias_table
        mask = None if bias is None else bias.repeat(len(y), 1, 1)
        y = self.attend(y, y, y, attn_mask=mask, need_weights=False)[0]
        x = x + y.view(b, h, w, 4, 4, c).transpose(2, 3).reshape(b, -1, c)
        return x + self.mlp(x)


class WindowNet(nn.Module):
    """A one-stage windowed transformer whose blocks take [B, L, C] and know the grid: no set of tokens."""

    def __init__(self, grid: tuple[int, int] = (8, 8), patch: int = 8, table: bool = True, window: bool = True) -> None:
        super().__init__()
        self.patch_embed, self.img_size = nn.Conv2d(3, 16, patch, patch), (grid[0] * patch, grid[1] * patch)
        self.pos_embed = nn.Parameter(torch.randn(1, grid[0] * grid[1], 16) * 0.02)
        self.stage = nn.ModuleList(WindowBlock(16, grid, table) for _ in range(2))
        self.norm, self.head, self.grid = nn.LayerNorm(16), nn.Conv2d(16, CLASSES, 1), grid

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.stage:
            x = block(x)
        return self.head(self.norm(x).transpose(1, 2).unflatten(2, self.grid))


class NeckViT(nn.Module):
    """A plain ViT whose features pass a projection to another width before the encoder ends."""

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.neck, self.head = vit(global_pool=""), nn.Linear(48, 20), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.vit.forward_features(x)).mean(1))


class TinySeg(nn.Module):
    """The smallest segmentation model with BatchNorm and dropout, for tests of the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU()
        )
        self.drop, self.head = nn.Dropout(0.5), nn.Conv2d(12, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.backbone(x)))


class PlainSeg(nn.Module):
    """The same without normalisation, so that a step is nothing but weights."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 12, 3, 1, 1), nn.GELU())
        self.head = nn.Conv2d(12, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class PooledSeg(nn.Module):
    """A head with image pooling, as in ASPP and PSP: its second BatchNorm sees one value per channel of a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        return self.head(x + self.pool(x))
