"""What the text of options means."""

from __future__ import annotations

import pytest

from command_line import invoke
from ttt_adapt import StreamConfig
from ttt_adapt.arms import PRESETS
from ttt_adapt.cli.eval import DRIFTS as NAMED
from ttt_adapt.cli.options import parse_arm_settings, parse_forwards, parse_settings, preset_config
from ttt_adapt.data.drift import DRIFTS
from ttt_adapt.errors import ConfigError
from ttt_adapt.evaluation.studies import STUDIES


@pytest.mark.parametrize(("command", "names"), [("run", PRESETS), ("eval", PRESETS), ("eval", STUDIES)])
def test_help_names_what_can_be_chosen(command, names):
    first, *between, last = names
    assert f"{', '.join([first, *between])} or {last}" in " ".join(invoke(command, "--help").replace("│", " ").split())


def test_help_of_eval_names_every_drift():
    assert tuple(DRIFTS) == NAMED
    assert f"{', '.join(NAMED)} or none" in " ".join(invoke("eval", "--help").replace("│", " ").split())


def test_settings_are_literals_or_text_and_true_and_false_may_be_small():
    given = ["drop_path=true", "carry_weights=False", "gate=none", "grad_clip=None", "crop_size=(8, 16)", "lr=1e-4"]
    assert parse_settings(given) == {
        "drop_path": True, "carry_weights": False, "gate": "none", "grad_clip": None, "crop_size": (8, 16), "lr": 1e-4,
    }  # fmt: skip


def test_settings_are_of_all_arms_or_of_one():
    given = ["lr=1e-4", "tent.lr=1e-3", "tent.window=2", "no_memory.lr=1"]
    expected = {"tent": {"lr": 1e-3, "window": 2}, "no-memory": {"lr": 1}}
    assert parse_arm_settings(given) == ({"lr": 1e-4}, expected)
    assert parse_arm_settings(["offline-1000.lr=1"]) == ({}, {"offline": {"lr": 1}})
    with pytest.raises(ConfigError, match="--seeds"):
        parse_arm_settings(["seed=3"])


def test_costs_are_numbers_of_the_arms_that_run():
    arms = ("online", "tent", "no_memory")
    assert parse_forwards(False, [], arms) is None
    given = ["online=4.1", "tent=2", "no-memory=3"]
    assert parse_forwards(True, given, arms) == {"online": 4.1, "tent": 2, "no-memory": 3}
    assert parse_forwards(True, ["every-04=3"], ["every-4"]) == {"every-4": 3}
    with pytest.raises(ConfigError, match="--real-time"):
        parse_forwards(False, ["online=4"], arms)
    with pytest.raises(ConfigError, match="expected a number"):
        parse_forwards(True, ["online=fast"], arms)
    with pytest.raises(ConfigError, match="implicit is none of the arms online, tent"):
        parse_forwards(True, ["implicit=4"], arms)


def test_presets_go_by_any_of_their_names_and_other_arms_are_none():
    for name in ("explicit", "explicit_only", "explicit-only"):
        assert preset_config(name, lr=0.5) == StreamConfig.explicit_only(lr=0.5)
    with pytest.raises(ConfigError, match="no preset 'tent'; expected one of .*paper"):
        preset_config("tent")
