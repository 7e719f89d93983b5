"""Reports: storage, tables, figures."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from ttt_adapt.errors import ConfigError, DataError, StateError
from ttt_adapt.evaluation.report import Report, Run, markdown_table, rich_table, write_json
from ttt_adapt.tasks.segmentation.score import SegmentationScore


def make_run(arm: str = "online", clip: str = "dusk", seed: int = 0, miou: float = 0.5, **changes) -> Run:
    values = {
        "miou_frames": miou - 0.1,
        "pixel_accuracy": 0.9,
        "per_class": {"road": miou, "car": None},
        "per_frame": [miou, None, *[miou] * 10],
        "losses": [None] * 12 if arm == "fixed" else [1.0 / (frame + 1) for frame in range(12)],
        "ms_per_frame": 20.0 + seed,
    }
    return Run(arm=arm, clip=clip, seed=seed, miou=miou, **{**values, **changes})


def make_report() -> Report:
    report = Report(config={"window": 16}, environment={"torch": "2"})
    for seed in range(3):
        report.add(make_run("fixed", "dusk", seed, 0.4))
        report.add(make_run("online", "dusk", seed, 0.5 + 0.01 * seed))
        report.add(make_run("online", "day", seed, 0.6))
    return report


# Storage -----------------------------------------------------------------------------------------------------------


def test_a_run_takes_its_numbers_from_the_score():
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    score = SegmentationScore(2, classes=("road", "car"))
    score.update(np.array([[0, 1]]), np.array([[0, 0]]))
    score.update(np.array([[0, 1]]), np.array([[255, 255]]))
    score.update(np.array([[0, 0]]), np.array([[0, 0]]))
    run = Run.from_score("online", "dusk", 3, score, losses=[None, float("inf"), 0.25], ms=[90.0, 10.0, 12.0])
    assert (run.arm, run.clip, run.seed) == ("online", "dusk", 3)
    assert run.miou == pytest.approx(3 / 4)
    assert run.miou_frames == pytest.approx(3 / 4)
    assert run.per_class == {"road": 0.75, "car": None}
    assert run.per_frame == [0.5, None, 1.0]
    assert run.losses == [None, None, 0.25]
    assert run.ms_per_frame == 11.0  # the first frame warms up
    with pytest.raises(DataError, match="losses has 1 values for 3 frames"):
        Run.from_score("online", "dusk", 3, score, losses=[None], ms=[1.0, 1.0, 1.0])


def test_a_saved_report_comes_back_equal(tmp_path):
    report = make_report()
    report.save(tmp_path / "deep" / "report.json")
    assert Report.load(tmp_path / "deep" / "report.json") == report


def test_an_interrupted_evaluation_knows_what_it_has(tmp_path):
    make_report().save(tmp_path / "report.json")
    report = Report.load(tmp_path / "report.json")
    assert report.has("fixed", "dusk", 2)
    assert not report.has("fixed", "dusk", 3)
    assert not report.has("fixed", "day", 0)
    with pytest.raises(StateError, match="'fixed' on clip 'dusk' with seed 2"):
        report.add(make_run("fixed", "dusk", 2))


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    make_report().save(path)
    old = path.read_bytes()
    with pytest.raises(DataError, match="JSON"):
        write_json(path, Report(config={"model": object()}))
    with pytest.raises(DataError, match="JSON"):
        write_json(path, Report(runs=[make_run(miou=float("nan"))]))

    def full_disk(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, Report())
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 99}', '{"format": 1, "runs": [{}]}'])
def test_a_file_that_is_no_report_is_refused(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"report\.json"):
        Report.load(path)


def test_a_missing_report_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        Report.load(tmp_path / "report.json")


# Tables ------------------------------------------------------------------------------------------------------------


def test_the_table_shows_mean_deviation_and_change_in_percent():
    lines = markdown_table(make_report()).splitlines()
    header, _, fixed, online = (([cell.strip() for cell in line.strip("|").split("|")]) for line in lines[:4])
    assert header[:4] == ["arm", "dusk: mIoU (%)", "dusk: frame mIoU (%)", "dusk: ms/frame"]
    assert header[4] == "day: mIoU (%)"
    assert fixed == ["fixed", "40.00 ± 0.00", "30.00 ± 0.00", "21.0", "n/a", "n/a", "n/a"]
    assert online[1:4] == ["**51.00 ± 1.00 (+27.5%)**", "**41.00 ± 1.00 (+36.7%)**", "21.0"]
    assert online[4] == "60.00 ± 0.00"


def test_the_reference_arm_may_be_chosen():
    table = markdown_table(make_report(), reference="online")
    assert "40.00 ± 0.00 (-21.6%)" in table
    with pytest.raises(ConfigError, match=r"'onlin'.*'online'"):
        markdown_table(make_report(), reference="onlin")
    with pytest.raises(DataError, match="no runs"):
        markdown_table(Report())


@pytest.mark.parametrize(
    ("others", "bold"),
    [([0.4, 0.4], True), ([0.49, 0.52], False), ([0.4], False), ([], False)],
    ids=["apart", "overlapping", "one seed", "alone"],
)
def test_bold_means_best_beyond_the_spread(others, bold):
    report = Report(runs=[make_run("online", "dusk", seed, miou) for seed, miou in enumerate([0.50, 0.53])])
    for seed, miou in enumerate(others):
        report.add(make_run("fixed", "dusk", seed, miou))
    assert ("**51.50" in markdown_table(report)) == bold


def test_the_terminal_table_holds_the_same_cells():
    console = pytest.importorskip("rich.console", reason="rich is not installed").Console(width=220)
    with console.capture() as capture:
        console.print(rich_table(make_report()))
    text = capture.get()
    assert "51.00 ± 1.00 (+27.5%)" in text
    assert "ms/frame" in text
    rows = [line for line in text.splitlines() if "day" in line]
    assert len(rows) == 2
    assert "n/a" in rows[0]  # fixed did not run there
    assert "60.00 ± 0.00" in rows[1]


# Imports -----------------------------------------------------------------------------------------------------------


def test_importing_the_evaluation_modules_imports_no_optional_package():
    code = (
        "import sys, ttt_adapt.data, ttt_adapt.evaluation.report, ttt_adapt.evaluation.plots;"
        "print([n for n in ('torchmetrics', 'matplotlib', 'PIL', 'rich', 'timm') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Figures -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from ttt_adapt.evaluation import plots

    return plots


def test_the_stream_figure_is_1200_pixels_wide_and_draws_every_arm(tmp_path, plots):
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    runs = make_report().select(clip="dusk")
    plots.plot_stream(tmp_path / "a" / "stream.png", runs)
    with image.open(tmp_path / "a" / "stream.png") as picture:
        assert picture.size == (1200, 900)
        both = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {(0x6B, 0x6B, 0x6B), (0x00, 0x72, 0xB2)} <= both
    plots.plot_stream(tmp_path / "fixed.svg", [run for run in runs if run.arm == "fixed"], title="no loss at all")
    assert (tmp_path / "fixed.svg").stat().st_size > 0
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []


def test_the_stream_figure_refuses_runs_that_share_no_axis(tmp_path, plots):
    with pytest.raises(DataError, match="one clip"):
        plots.plot_stream(tmp_path / "stream.png", make_report().runs)
    with pytest.raises(DataError, match="0 runs"):
        plots.plot_stream(tmp_path / "stream.png", [])


def test_the_bar_figure_draws_clips_that_some_arms_never_ran(tmp_path, plots):
    plots.plot_bars(tmp_path / "bars.png", make_report())
    assert (tmp_path / "bars.png").stat().st_size > 5000
    with pytest.raises(DataError, match="no runs"):
        plots.plot_bars(tmp_path / "bars.png", Report())


def test_bars_begin_at_what_the_input_scores_where_the_metric_has_such_a_floor(tmp_path, plots, monkeypatch):
    drawn = []
    real = plots._draw_bar
    monkeypatch.setattr(plots, "_draw_bar", lambda axes, *rest: (real(axes, *rest), drawn.append(axes.patches[-1])))
    report = Report()
    for seed, psnr in enumerate((21.0, 23.0)):
        report.add(Run("Fixed", "dog", seed, [psnr], [None], 5.0, task="colorization", psnr=psnr, psnr_grey=20.0))
    plots.plot_bars(tmp_path / "bars.png", report)
    assert [(bar.get_y(), bar.get_height()) for bar in drawn] == [(20.0, 2.0)]
    drawn.clear()
    plots.plot_bars(tmp_path / "bars.png", make_report())
    assert {bar.get_y() for bar in drawn} == {0.0}


def test_the_running_mean_is_centred_and_steps_over_gaps(plots):
    nan = np.nan
    np.testing.assert_allclose(plots.running_mean(np.array([1.0, 2, 6, nan, 4]), 3), [1.5, 3, 4, nan, 4])


@pytest.mark.parametrize("count", [6, 21])
def test_the_legend_fits_into_the_figure(tmp_path, plots, count):
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    report = Report()
    for i in range(count):
        report.add(make_run(f"Self-Train with a long name + Class {i}"))
    for path in (tmp_path / "bars.png", tmp_path / "stream.png"):
        plots.plot_bars(path, report) if path.stem == "bars" else plots.plot_stream(path, report.runs)
        with image.open(path) as picture:
            pixels = np.asarray(picture.convert("L"))
        legend = pixels[:40] if path.stem == "bars" else pixels[-40:]  # its first or last rows
        assert (legend < 128).any()
        assert (legend[:, :8] > 250).all()
        assert (legend[:, -8:] > 250).all()
