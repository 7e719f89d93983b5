"""Overlays: the right colour on the right pixel, and captions that can be read."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from ttt_adapt.errors import ConfigError, FrameError, FrameTypeError, MissingPackageError
from ttt_adapt.view.overlay import BAR_COLOR, blend, colorize, default_palette, fitted, legend, panels, to_uint8

PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
LABELS = np.array([[0, 1], [2, 255]], np.uint8)


def grey(height: int = 60, width: int = 80, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


class TestPalette:
    @pytest.mark.parametrize("n", [0, 1, 2, 19, 133, 256])
    def test_colours_are_distinct(self, n):
        palette = default_palette(n)
        assert (palette.shape, palette.dtype) == ((n, 3), np.uint8)
        assert len({tuple(color) for color in palette}) == n

    def test_colours_of_few_classes_are_far_apart(self):
        palette = default_palette(12).astype(int)
        gaps = np.abs(palette[:, None] - palette[None]).sum(-1) + 999 * np.eye(12, dtype=int)
        assert gaps.min() >= 60

    def test_a_class_keeps_its_colour_when_classes_are_added(self):
        assert np.array_equal(default_palette(7), default_palette(40)[:7])

    @pytest.mark.parametrize("n", [-1, 257])
    def test_other_counts_are_refused(self, n):
        with pytest.raises(ConfigError, match="0 to 256"):
            default_palette(n)


class TestColorize:
    def test_each_label_gets_its_colour_and_the_ignored_one_black(self):
        expected = [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]]
        assert np.array_equal(colorize(LABELS, PALETTE), expected)
        assert np.array_equal(colorize(LABELS.astype(np.int64), PALETTE), expected)

    def test_a_label_outside_the_palette_is_named(self):
        with pytest.raises(FrameError, match=r"\[7\].*0 to 2"):
            colorize(np.array([[0, 7]]), PALETTE)
        with pytest.raises(FrameError, match=r"\[-1\]"):
            colorize(np.array([[0, -1]]), PALETTE)
        with pytest.raises(FrameError, match=r"\[255\]"):
            colorize(LABELS, PALETTE, ignore=None)

    def test_other_shapes_and_types_are_refused(self):
        with pytest.raises(FrameError, match=r"\[H, W\]"):
            colorize(LABELS[None], PALETTE)
        with pytest.raises(FrameTypeError, match="integers"):
            colorize(LABELS.astype(float), PALETTE)
        with pytest.raises(ConfigError, match=r"\[n, 3\]"):
            colorize(LABELS, PALETTE[0])


class TestBlend:
    def test_mixes_by_alpha_and_leaves_ignored_pixels_alone(self):
        out = blend(grey(2, 2), LABELS, PALETTE, alpha=0.25)
        assert out.dtype == np.uint8
        assert out[0, 0].tolist() == [139, 75, 75]
        assert out[1, 1].tolist() == [100, 100, 100]

    def test_the_ends_of_alpha_are_the_frame_and_the_colours(self):
        frame = np.random.default_rng(0).integers(0, 256, (2, 2, 3), dtype=np.uint8)
        labels = np.array([[0, 1], [2, 0]])
        assert np.array_equal(blend(frame, labels, PALETTE, alpha=0), frame)
        assert np.array_equal(blend(frame, labels, PALETTE, alpha=1), colorize(labels, PALETTE))

    def test_the_frame_is_not_changed(self):
        frame = grey(2, 2)
        blend(frame, LABELS, PALETTE)
        assert (frame == 100).all()

    def test_mismatches_are_refused(self):
        with pytest.raises(FrameError, match=r"expected \[3, 2\]"):
            blend(grey(3, 2), LABELS, PALETTE)
        with pytest.raises(FrameTypeError, match="float64"):
            blend(grey(2, 2).astype(float), LABELS, PALETTE)
        with pytest.raises(ConfigError, match="alpha"):
            blend(grey(2, 2), LABELS, PALETTE, alpha=1.5)


class TestPanels:
    @pytest.fixture(autouse=True)
    def _pillow(self):
        pytest.importorskip("PIL", reason='needs Pillow: pip install "ttt-adapt[video]"')

    def test_pictures_stand_side_by_side_unchanged_under_readable_captions(self):
        first, second = np.random.default_rng(0).integers(0, 256, (2, 60, 80, 3), dtype=np.uint8)
        sheet = panels({"frame": first, "adapted": second})
        bar = sheet.shape[0] - 60
        assert sheet.shape[1] == 160
        assert np.array_equal(sheet[bar:, :80], first)
        assert np.array_equal(sheet[bar:, 80:], second)
        for caption in (sheet[:bar, :80], sheet[:bar, 80:]):
            assert int(caption.max()) - int(caption.min()) > 150

    def test_the_caption_grows_with_the_picture(self):
        bars = [panels({"x": grey(height, 400)}).shape[0] - height for height in (60, 480, 1080)]
        assert bars == sorted(bars)
        assert bars[2] > 4 * bars[0]

    def test_a_long_caption_stays_inside_its_panel(self):
        sheet = panels([("a caption much longer than its panel", grey(200, 200)), ("", grey(200, 200))])
        bar = sheet[: sheet.shape[0] - 200]
        assert np.ptp(bar[:, 200:]) == np.ptp(bar[0, 0])
        assert np.ptp(bar[:, 198:200]) == np.ptp(bar[0, 0])

    def test_columns_make_rows(self):
        pairs = [(str(k), grey(60, 80, 40 * k)) for k in range(5)]
        sheet = panels(pairs, columns=2)
        height = sheet.shape[0] // 3
        assert sheet.shape == (3 * height, 160, 3)
        assert (sheet[2 * height - 1, 159] == 120).all()
        assert (sheet[-1, 159] < 60).all()

    def test_all_take_the_size_of_the_first(self):
        sheet = panels({"small": grey(60, 80), "large": grey(240, 320, 200)})
        assert sheet.shape[1] == 160
        assert (sheet[-60:, 80:] == 200).all()

    def test_same_input_same_picture(self):
        assert np.array_equal(panels({"a": grey()}), panels([("a", grey())]))

    def test_what_cannot_be_shown_is_refused(self):
        with pytest.raises(FrameError, match="empty"):
            panels({})
        with pytest.raises(FrameError, match="panel 'x'"):
            panels({"x": grey()[..., 0]})
        with pytest.raises(FrameTypeError, match="float64"):
            panels({"x": grey() / 255})
        with pytest.raises(ConfigError, match="columns"):
            panels({"x": grey()}, columns=0)

    def test_without_pillow_the_error_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(MissingPackageError, match=r'pip install "ttt-adapt\[video\]"'):
            panels({"x": grey()})


class TestLegend:
    @pytest.fixture(autouse=True)
    def _pillow(self):
        pytest.importorskip("PIL", reason='needs Pillow: pip install "ttt-adapt[video]"')

    def test_every_class_has_its_colour_and_a_name_beside_it(self):
        strip = legend(["road", "tree", "car"], PALETTE, 300)
        assert (strip.shape[1], strip.shape[2], strip.dtype) == (300, 3, np.uint8)
        places = [np.flatnonzero((strip == colour).all(-1).any(0)) for colour in PALETTE]
        assert all(place.size for place in places)
        for place, end in zip(places, [places[1][0], places[2][0], 300], strict=True):
            assert strip[:, place[-1] + 1 : end].max() > 180  # the name is bright

    def test_a_narrow_legend_has_more_rows_and_cuts_no_name(self):
        wide, narrow = (legend(["pavement"] * 3, PALETTE, width) for width in (400, 100))
        assert narrow.shape[0] == 3 * wide.shape[0]
        assert (narrow[:, -2:] == narrow[0, 0]).all()

    def test_what_cannot_be_shown_is_refused(self):
        with pytest.raises(ConfigError, match="2 names and 3 colours"):
            legend(["road", "tree"], PALETTE, 300)
        with pytest.raises(ConfigError, match="width is 40; expected at least"):
            legend(["a very long name", "tree", "car"], PALETTE, 40)

    def test_without_pillow_the_error_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(MissingPackageError, match=r'pip install "ttt-adapt\[video\]"'):
            legend(["road", "tree", "car"], PALETTE, 300)


class TestToUint8:
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def normalised(self, image: np.ndarray) -> torch.Tensor:
        rgb = torch.from_numpy(image).permute(2, 0, 1) / 255
        return (rgb - torch.tensor(self.MEAN).view(3, 1, 1)) / torch.tensor(self.STD).view(3, 1, 1)

    @pytest.mark.parametrize("batched", [False, True])
    def test_undoes_the_normalisation_exactly(self, batched):
        image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        x = self.normalised(image)
        out = to_uint8(x[None] if batched else x, self.MEAN, self.STD)
        assert out.dtype == np.uint8
        assert out.flags.c_contiguous
        assert np.array_equal(out, image)

    def test_clips_what_lies_outside_and_takes_graphs_and_half_precision(self):
        x = torch.tensor([-9.0, 0.0, 9.0]).view(3, 1, 1).to(torch.bfloat16).requires_grad_()
        assert to_uint8(x, (0.5,) * 3, (0.5,) * 3).ravel().tolist() == [0, 128, 255]

    @pytest.mark.parametrize("shape", [(1, 4, 4), (2, 3, 4, 4), (4, 4, 3)])
    def test_other_shapes_are_refused(self, shape):
        with pytest.raises(FrameError, match=r"\[3, H, W\]"):
            to_uint8(torch.zeros(shape), self.MEAN, self.STD)


def test_a_picture_is_fitted_into_another_size_as_a_whole_and_in_the_middle():
    image = np.full((10, 40, 3), 200, np.uint8)
    assert fitted(image, (10, 40)) is image
    wide = fitted(image, (40, 40))
    assert wide.shape == (40, 40, 3)
    assert (wide[15:25] == 200).all()
    assert (wide[:15] == BAR_COLOR).all()
    assert (wide[25:] == BAR_COLOR).all()
    assert fitted(image, (1, 1)).shape == (1, 1, 3)
