"""Tables: every change on what both arms have, seeds beside their mean, and marks wherever an arm is named."""

from __future__ import annotations

import re

import numpy as np
import pytest

from report_inputs import make_report, make_run, marked_report
from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt.evaluation.differences import average_difference, paired_difference
from ttt_adapt.evaluation.plots import plot_bars
from ttt_adapt.evaluation.report import Report, Run
from ttt_adapt.evaluation.statistics import block_length, paired_bootstrap
from ttt_adapt.evaluation.tables import markdown_table, rich_table, study_table
from ttt_adapt.tasks import TASKS, Metric, Segmentation


def rows(table: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of one Markdown table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in lines}


def section(text: str, title: str) -> str:
    """A part of a report from its heading to the next."""
    return text.partition(f"### {title}")[2].partition("###")[0]


# Changes on what both arms have ------------------------------------------------------------------------------------


def uneven_report(clips=("dusk",)) -> Report:
    """Online lacks the fixed model's worst seed on the first clip: its mean is higher, and every change is a loss."""
    report = Report()
    for clip in clips:
        for seed, fixed in enumerate((0.2, 0.5, 0.5)):
            report.add(make_run("fixed", clip, seed, fixed))
            if seed or clip != clips[0]:
                report.add(make_run("online", clip, seed, 0.45))
    return report


def test_a_failed_seed_does_not_turn_a_loss_into_a_gain():
    text = markdown_table(uneven_report())
    assert rows(text.partition("###")[0])["online"][0] == "45.00 ± 0.00 (-10.0%) §"
    assert "§ on the seeds that both arms ran: online on dusk seeds 1, 2." in text
    paired = rows(section(text, "Paired"))["online"]
    assert (paired[0].split()[0], paired[1]) == ("-5.00", "n/a, -5.00, -5.00")


def test_a_difference_in_brackets_is_on_shared_seeds_too():
    report = Report()
    for seed, fixed in enumerate((10.0, 30.0)):
        report.add(Run("fixed", "dog", seed, [fixed] * 3, [None] * 3, 5.0, task="colorization", scores={"psnr": fixed}))
    report.add(Run("online", "dog", 1, [29.0] * 3, [None] * 3, 5.0, task="colorization", scores={"psnr": 29.0}))
    assert rows(markdown_table(report).partition("###")[0])["online"][0] == "29.00 (-1.00) §"


def test_arms_with_the_same_seeds_need_no_footnote():
    report = Report(runs=[make_run(arm, "dusk", seed, 0.5) for arm in ("fixed", "online") for seed in range(2)])
    text = markdown_table(report)
    assert "§" not in text
    assert "that both arms ran:" not in text
    assert "lacks" not in text


def test_nothing_is_best_where_streaming_arms_ran_other_seeds():
    report = uneven_report()
    report.runs = [run for run in report.runs if run.seed]  # the same seeds: fixed is best
    assert "**50.00" in markdown_table(report)
    report.add(make_run("fixed", "dusk", 3, 0.5))
    assert "**" not in markdown_table(report)


def test_an_arm_that_shares_no_seed_with_the_reference_has_no_change():
    report = Report(runs=[make_run("fixed", "dusk", 0, 0.2), make_run("online", "dusk", 1, 0.4)])
    text = markdown_table(report)
    assert rows(text.partition("###")[0])["online"][0] == "40.00"
    assert rows(section(text, "Paired"))["online"] == ["n/a", "n/a, n/a"]


def test_means_over_clips_are_of_whole_seeds_and_differences_of_shared_ones_and_both_are_said():
    report = uneven_report(("dusk", "noon"))
    found = average_difference(report, "online", "fixed")
    assert (found.mean, dict(found.by_seed)) == (pytest.approx(-0.05), pytest.approx({1: -0.05, 2: -0.05}))
    for text in (section(markdown_table(report), "Mean over clips"), study_table(report, "Memory", "fixed")):
        cells = rows(text)["online"]
        assert (cells[0], cells[2]) == ("45.00 ± 0.00", "-5.00")
        assert "Means are over the seeds that ran on every clip: online seeds 1, 2." in text
        assert "Differences are on the clips and seeds that both arms ran: online dusk, noon with seeds 1, 2." in text


def test_a_clip_that_one_arm_never_ran_is_left_out_of_the_difference_and_named():
    report = uneven_report()
    report.runs += [make_run("online", "noon", seed, 0.9) for seed in range(3)]
    text = section(markdown_table(report), "Mean over clips")
    assert rows(text)["fixed"][0] == "n/a"
    assert rows(text)["online"][2].startswith("-5.00")
    assert "that both arms ran: online dusk with seeds 1, 2." in text
    assert average_difference(report, "online", "fixed") == paired_difference(report, "online", "fixed", "dusk")


def test_classes_say_which_runs_an_arm_lacks():
    text = section(markdown_table(uneven_report()), "IoU of every class")
    assert "Not all arms are over the same runs: online lacks dusk seed 0." in text


# Seeds and frames --------------------------------------------------------------------------------------------------


def test_the_paired_table_shows_every_seed_and_its_interval_draws_them():
    random = np.random.default_rng(0)
    gains = {0: 0.0067, 1: -0.0025, 2: -0.0005}
    report = Report()
    frames = {}
    for seed, gain in gains.items():
        base = 0.4 + 0.02 * random.random(60)
        noise = 0.004 * random.normal(size=60)
        frames[seed] = (base + gain + noise - noise.mean(), base)
        for arm, per_frame in zip(("online", "fixed"), frames[seed], strict=True):
            report.add(make_run(arm, "dusk", seed, per_frame=per_frame.tolist(), losses=[None] * 60, fps=1.0))
    text = section(markdown_table(report, "fixed"), "Paired")
    both, by_seed = rows(text)["online"]
    assert by_seed == "+0.67, -0.25, -0.05"
    a, b = (np.array([pair[i] for pair in frames.values()]) for i in (0, 1))
    block = block_length((a - b).mean(axis=0), 1.0)
    mean, low, high = paired_bootstrap(a, b, block=block)
    assert both == f"{100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    assert "By seed: seeds 0, 1, 2" in text
    assert "over frames and seeds" in text
    assert f"frames per block: dusk {block}." in text
    alone = paired_bootstrap(a.mean(axis=0), b.mean(axis=0), block=block)
    assert high - low > 2 * (alone[2] - alone[1])  # seeds differ more than frames here


def test_one_seed_needs_no_column_of_seeds():
    text = markdown_table(Report(runs=[make_run(arm, "dusk", 0, 0.5) for arm in ("fixed", "online")]))
    assert "by seed" not in text.lower()
    assert "bootstrap over frames, 2000" in text


def test_clips_and_arms_are_named_as_they_are():
    console = pytest.importorskip("rich.console", reason="rich is not installed").Console(width=200)
    report = Report(runs=[make_run("Arm [b]", "[red]x:car:", 0, 0.5), make_run("Arm [/]", "[red]x:car:", 0, 0.6)])
    with console.capture() as capture:
        console.print(rich_table(report))
    for name in ("[red]x:car:", "Arm [b]", "Arm [/]"):
        assert name in capture.get()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_narrow_terminal_gets_whole_columns_and_the_names_of_the_others(width):
    console = pytest.importorskip("rich.console", reason="rich is not installed").Console(width=width)
    report = Report(runs=[make_run(f"Arm {i} of a long name", "daylight", 0, 0.5) for i in range(3)])
    with console.capture() as capture:
        console.print(rich_table(report, width=width))
    text = " ".join(capture.get().split())
    for i in range(3):
        assert f"Arm {i} of a long name" in text
    for title in ("mIoU (%)", "frame mIoU (%)", "ms/frame"):
        assert title in text
    assert ("In the written table:" in text) == (width < 80)


# Marks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["Fixed", "Offline"])
def test_arms_that_see_the_whole_clip_are_marked_wherever_they_are_named(reference):
    report = marked_report()
    console = pytest.importorskip("rich.console", reason="rich is not installed").Console(width=2000)
    with console.capture() as capture:
        console.print(rich_table(report, reference))
    texts = [markdown_table(report, reference), study_table(report, "Memory", reference), capture.get()]
    for text in (" ".join(text.split()) for text in texts):  # captions are folded
        for arm, mark in (("Offline", "†"), ("Shuffled", "†"), ("Oracle", "‡")):
            named = re.findall(rf"{arm}(?! {mark})", text)
            assert arm in text
            assert not named, (arm, text)
        assert not re.search("Fixed [†‡]", text)
        assert "† sees the whole clip before it predicts; ‡ and chooses by the labels" in text
    assert all(f"### {part}" in texts[0] for part in ("Paired", "Mean over", "IoU of every class", "Runs that failed"))


def test_arms_that_see_the_whole_clip_are_marked_and_never_the_best():
    report = Report()
    for seed in (0, 1):
        for arm, score in (("fixed", 0.5), ("online", 0.6), ("offline", 0.7), ("oracle", 0.8)):
            run = make_run(arm, seed=seed, miou=score + 0.001 * seed)
            run.streaming, run.oracle = arm in ("fixed", "online"), arm == "oracle"
            report.add(run)
    table = markdown_table(report)
    first, _, _ = table.partition("###")
    rows = {line.split("|")[1].strip(): line for line in first.splitlines() if line.startswith("| ")}
    assert "offline †" in rows
    assert "oracle ‡" in rows
    assert "**" in rows["online"]
    assert not any("**" in rows[name] for name in ("fixed", "offline †", "oracle ‡"))
    assert "chooses by the labels" in table


# Columns --------------------------------------------------------------------------------------------------------------


def test_the_table_has_columns_for_j_and_memory_where_runs_hold_them():
    assert " J " not in markdown_table(make_report())
    scores = {"j": 0.25, "j_frames": 0.5}
    report = Report(runs=[make_run(arm, "dog", 0, 0.5, scores=scores, peak_memory_mib=12.0) for arm in "ab"])
    header, _, first = markdown_table(report).splitlines()[:3]
    assert header.endswith("| dog: J (%) | dog: frame J (%) | dog: ms/frame | dog: peak MiB |")
    assert first.endswith("| 25.00 | 50.00 | 20.0 | 12.0 |")


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


def test_a_new_task_brings_its_metrics_into_tables_and_figures(monkeypatch, tmp_path):
    class Depth(Segmentation):
        name = "depth"
        metrics = (
            Metric("rmse", "RMSE", "m", "metres", digits=3, higher_is_better=False, note="RMSE is of metres."),
            Metric("rmse_frames", "frame RMSE", "m", "metres", digits=3, higher_is_better=False),
        )
        class_metric = Metric("per_class", "RMSE", "m", digits=1)
        about = "RMSE over the whole clip"

    monkeypatch.setitem(TASKS, "depth", Depth)
    report = Report()
    for arm, error in (("fixed", 2.0), ("online", 1.5)):
        for seed in range(2):
            score = Fixed({"frames": 2, "rmse": error, "rmse_frames": error, "per_class": {"near": error}}, [error] * 2)
            report.add(Run.from_score(arm, "hall", seed, score, [None, None], [1.0, 1.0], "depth"))
    report.save(tmp_path / "report.json")
    text = markdown_table(Report.load(tmp_path / "report.json"))
    assert rows(text.partition("###")[0])["online"][0] == "**1.500 ± 0.000 (-0.500)**"
    assert "RMSE over the whole clip" in text
    assert "RMSE is of metres." in text
    assert rows(section(text, "RMSE of every class (m)"))["near"] == ["2.0", "1.5"]
    plot_bars(tmp_path / "bars.png", report)
    assert (tmp_path / "bars.png").stat().st_size > 1000


class Fixed:
    """A score that was collected already."""

    def __init__(self, result, per_frame):
        self.result, self.per_frame = lambda: result, lambda: per_frame
