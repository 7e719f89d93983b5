"""Figures: what is drawn, in which size, with which names."""

from __future__ import annotations

import numpy as np
import pytest

from report_inputs import make_report, make_run, marked_report, sweep_report
from ttt_adapt.errors import DataError
from ttt_adapt.evaluation import plots
from ttt_adapt.evaluation.report import Report, Run
from ttt_adapt.evaluation.stream_plot import plot_stream, running_mean

figure_module = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """Name of a file -> the figure that would be written there; nothing is written."""
    found = {}
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, path, **_: found.update({path.stem: figure}))
    return found


def test_the_stream_figure_is_1200_pixels_wide_and_draws_every_arm(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    runs = make_report().select(clip="dusk")
    plot_stream(tmp_path / "a" / "stream.png", runs)
    with image.open(tmp_path / "a" / "stream.png") as picture:
        assert picture.size == (1200, 900)
        both = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {(0x6B, 0x6B, 0x6B), (0x00, 0x72, 0xB2)} <= both
    plot_stream(tmp_path / "fixed.svg", [run for run in runs if run.arm == "fixed"], title="no loss at all")
    assert (tmp_path / "fixed.svg").stat().st_size > 0
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []


def test_the_stream_figure_refuses_runs_that_share_no_axis(tmp_path):
    with pytest.raises(DataError, match="one clip"):
        plot_stream(tmp_path / "stream.png", make_report().runs)
    with pytest.raises(DataError, match="0 runs"):
        plot_stream(tmp_path / "stream.png", [])


def test_the_stream_figure_names_bands_of_frames_of_one_condition(tmp_path, drawn):
    runs = make_report().select(clip="dusk")
    conditions = ["clear day"] * 4 + ["night"] * 5 + ["clear day"] * 3
    plot_stream(tmp_path / "stream.png", runs, conditions=conditions)
    upper, lower = drawn["stream"].axes
    names = {text.get_text(): text.get_position()[0] for text in lower.texts}
    assert [text.get_text() for text in lower.texts] == ["clear\nday", "night", "clear\nday"]
    assert names["night"] == 6.0
    for axes in (upper, lower):
        day, night, again = (patch.get_facecolor() for patch in axes.patches)
        assert day == again != night
    lowest = min(line.get_ydata()[~np.isnan(line.get_ydata())].min() for line in lower.get_lines())
    height = np.diff(lower.get_ylim())[0]
    assert lowest - lower.get_ylim()[0] > 0.1 * height  # the names stand below the lines
    plot_stream(tmp_path / "fixed.png", [run for run in runs if run.arm == "fixed"], conditions=conditions)
    (panel,) = drawn["fixed"].axes  # no arm adapted: there is no panel of losses
    assert [text.get_text() for text in panel.texts] == ["clear\nday", "night", "clear\nday"]
    with pytest.raises(DataError, match="3 conditions for 12 frames"):
        plot_stream(tmp_path / "stream.png", runs, conditions=["night"] * 3)


def test_the_bar_figure_draws_clips_that_some_arms_never_ran(tmp_path):
    plots.plot_bars(tmp_path / "bars.png", make_report())
    assert (tmp_path / "bars.png").stat().st_size > 5000
    with pytest.raises(DataError, match="no runs"):
        plots.plot_bars(tmp_path / "bars.png", Report())


def test_bars_begin_at_what_the_input_scores_where_the_metric_has_such_a_floor(tmp_path, drawn):
    report = Report()
    for seed, psnr in enumerate((21.0, 23.0)):
        report.add(
            Run(
                "Fixed", "dog", seed, [psnr], [None], 5.0, task="colorization", scores={"psnr": psnr, "psnr_grey": 20.0}
            )
        )
    plots.plot_bars(tmp_path / "bars.png", report)
    assert [(bar.get_y(), bar.get_height()) for bar in drawn["bars"].axes[0].patches] == [(20.0, 2.0)]
    plots.plot_bars(tmp_path / "bars.png", make_report())
    assert {bar.get_y() for bar in drawn["bars"].axes[0].patches} == {0.0}


def test_the_running_mean_is_centred_and_steps_over_gaps():
    nan = np.nan
    np.testing.assert_allclose(running_mean(np.array([1.0, 2, 6, nan, 4]), 3), [1.5, 3, 4, nan, 4])


@pytest.mark.parametrize("count", [6, 21])
def test_the_legend_fits_into_the_figure(tmp_path, count):
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    report = Report()
    for i in range(count):
        report.add(make_run(f"Self-Train with a long name + Class {i}"))
    for path in (tmp_path / "bars.png", tmp_path / "stream.png"):
        plots.plot_bars(path, report) if path.stem == "bars" else plot_stream(path, report.runs)
        with image.open(path) as picture:
            pixels = np.asarray(picture.convert("L"))
        legend = pixels[:40] if path.stem == "bars" else pixels[-40:]  # its first or last rows
        assert (legend < 128).any()
        assert (legend[:, :8] > 250).all()
        assert (legend[:, -8:] > 250).all()


def test_the_sweep_figure_has_a_log_axis_with_every_setting_on_it(tmp_path, drawn):
    values = {"k1": 1, "k4": 4, "k16": 16, "k99": 99, "auto": None}
    report = sweep_report()
    report.add(make_run("auto", "dusk", 0, 0.5))
    plots.plot_sweep(tmp_path / "sweep.png", report, values, "fixed", "frames in the window")
    axes = drawn["sweep"].axes[0]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "frames in the window"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "4", "16"]
    mean = next(line for line in axes.get_lines() if line.get_label() == "mean")
    np.testing.assert_allclose(mean.get_ydata(), [1.05, 4.05, 16.05])
    level = next(line for line in axes.get_lines() if line.get_label() == "auto")
    np.testing.assert_allclose(level.get_ydata(), 10.0)
    with pytest.raises(DataError, match="nothing to draw"):
        plots.plot_sweep(tmp_path / "sweep.png", report, {"k99": 99}, "fixed", "k")


def test_the_loss_figure_draws_runs_relative_to_their_clip_and_leaves_out_arms_without_loss(tmp_path, drawn):
    report = Report()
    for clip, base in (("dusk", 0.4), ("noon", 0.6)):
        report.add(make_run("fixed", clip, 0, base))
        report.add(make_run("a", clip, 0, base, losses=[base, None]))
        report.add(make_run("b", clip, 0, base + 0.1, losses=[base - 0.2, base]))
    assert plots.plot_losses(tmp_path / "loss.png", report)
    points = {c.get_label(): np.asarray(c.get_offsets()) for c in drawn["loss"].axes[0].collections}
    assert points.keys() == {"a", "b"}
    np.testing.assert_allclose(points["a"], [[0.05, -5.0]] * 2)
    np.testing.assert_allclose(points["b"], [[-0.05, 5.0]] * 2)
    assert not plots.plot_losses(tmp_path / "none.png", Report(runs=[make_run("fixed")]))
    assert drawn.keys() == {"loss"}


def test_legends_mark_arms_that_see_the_whole_clip(tmp_path, drawn):
    report = marked_report()
    plot_stream(tmp_path / "stream.png", report.select(clip="noon"))
    plots.plot_bars(tmp_path / "bars.png", report)
    plots.plot_losses(tmp_path / "loss.png", report)
    plots.plot_sweep(tmp_path / "sweep.png", report, {"Oracle": 1.0, "Offline": None}, "Fixed", "steps")
    legends = {
        name: {text.get_text() for legend in figure.legends for text in legend.get_texts()}
        for name, figure in drawn.items()
    }
    names = {"Fixed", "Offline †", "Oracle ‡", "Shuffled †"}
    assert legends["stream"] == legends["bars"] == legends["loss"] == names
    assert legends["sweep"] == {"dusk", "noon", "mean", "Offline †"}
