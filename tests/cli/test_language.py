"""Messages name the options of the command line, and not the arguments of Python."""

from __future__ import annotations

import pytest

from command_line import fail, invoke
from ttt_adapt import __version__
from ttt_adapt.cli.language import in_options
from ttt_adapt.errors import VideoError

OPTIONS = {
    name: (f"--{name.replace('_', '-')}",) * 2
    for name in ("size", "classes", "first_epochs", "fps", "out", "task", "encoder_option", "arms")
} | {"calibrate": ("--calibrate", "--no-calibrate"), "overwrite": ("--overwrite", "--overwrite")}


@pytest.mark.parametrize(
    ("python", "shell"),
    [
        ("size is '3x'; expected HxW", "--size is '3x'; expected HxW"),
        ("a.png: size is (3, 4); fps is 0", "a.png: --size is (3, 4); --fps is 0"),
        ("arms is empty; classes are a, b", "--arms is empty; --classes are a, b"),
        ("set `overwrite`, or name `out`", "set --overwrite, or name --out"),
        ("pass overwrite=True.", "pass --overwrite."),
        ("`calibrate=False` leaves it out", "--no-calibrate leaves it out"),
        ("give their names (classes=)", "give their names (--classes)"),
        ("give their names (classes=, --classes)", "give their names (--classes)"),
        ("masks of 0 and 255 are binary=True", "masks of 0 and 255 are --classes background,foreground"),
        ("`first_epochs` is", "--first-epochs is"),
        ("`encoder_options` has 'x'", "--encoder-option has 'x'"),
        ("leave task out, or train", "leave --task out, or train"),
    ],
)
def test_arguments_become_options(python, shell):
    assert in_options(python, OPTIONS) == shell


@pytest.mark.parametrize(
    "text",
    [
        "/data/size=/a.png cannot be read",
        "the size is good",
        "window is 0; lr=1e-3",
        'use masking="pixels"',
        "--size is 3",
        "in this task, out of three, the classes",
        "a run with size=(3, 4), this one has size=(5, 6)",
    ],
)
def test_other_words_stay(text):
    assert in_options(text, OPTIONS) == text


def test_an_option_that_the_command_lacks_is_not_named():
    assert in_options("set `overwrite`; masks are binary=True", {"size": ("--size", "--size")}) == (
        "set `overwrite`; masks are binary=True"
    )


def test_errors_keep_their_kind(monkeypatch, capsys):
    def broken(*_args, **_keywords):
        raise VideoError("`size` of 3 cannot be encoded")

    monkeypatch.setattr("ttt_adapt.evaluation.model_info.inspect_model", broken)
    assert fail(capsys, monkeypatch, "info", "resnet18") == "error: --size of 3 cannot be encoded\n"


def test_the_version_is_shown():
    assert invoke("--version") == f"ttt-adapt {__version__}\n"


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("learning_rate=1e-3", "it is called 'lr'"),
        ("momentum=0.1", "it is called 'norm_momentum'"),
        ("windw=3", "nearest: 'window'"),
        ("mask_ratio=0.5", "mask_ratio is a setting of the --branch"),
    ],
)
def test_a_setting_by_another_name_is_found(setting, hint, capsys, monkeypatch):
    assert hint in fail(capsys, monkeypatch, "info", "resnet18", f"--set={setting}")
