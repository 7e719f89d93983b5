"""The table of arms: names, presets, and what would make an arm another one."""

from __future__ import annotations

import pytest

from ttt_adapt import StreamConfig
from ttt_adapt.arms import ARMS, PRESETS, contradictions, find_arm, normalized
from ttt_adapt.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_memory", "no-memory"), ("implicit_only", "implicit"), ("explicit-only", "explicit"), ("online", "online"),
        ("self_train+class+smooth_8", "self-train+class+smooth-8"), ("implicit_only+vote", "implicit+vote"),
        ("every_8", "every-8"),
    ],
)  # fmt: skip
def test_underscores_and_long_names_are_accepted(name, expected):
    assert normalized(name) == find_arm(name).name == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("offline-1000", "offline"), ("offline_oracle_1000", "offline-oracle"), ("every-04", "every-4"),
        ("tent+smooth-08", "tent+smooth-8"),
    ],
)  # fmt: skip
def test_a_number_has_one_spelling(name, expected):
    assert find_arm(name) == find_arm(expected)
    assert find_arm(name).name == expected


def test_every_preset_is_there_by_name_and_as_a_method():
    methods = {
        "online": StreamConfig.online,
        "no-memory": StreamConfig.no_memory,
        "implicit": StreamConfig.implicit_only,
        "explicit": StreamConfig.explicit_only,
        "paper": StreamConfig.paper,
    }
    assert set(methods) == set(PRESETS)
    for name, method in methods.items():
        assert StreamConfig.for_arm(name, seed=3, lr=0.5) == method(seed=3, lr=0.5)
    assert StreamConfig.for_arm("offline") == StreamConfig.online(source_pull=0.0)
    with pytest.raises(ConfigError, match="nearest: 'online'"):
        StreamConfig.for_arm("onlin")


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("fixed", "fixed adapts no weights"),
        ("norm_ema", "norm-ema adapts no weights"),
        ("fixed+vote", "fixed.vote adapts no weights"),
        ("online+vote", "online.vote has modifiers.* such as online$"),
    ],
)
def test_an_arm_that_a_configuration_cannot_be_is_refused(arm, message):
    with pytest.raises(ConfigError, match=message):
        StreamConfig.for_arm(arm)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if ARMS[arm].adapts])
def test_an_arm_with_its_own_settings_contradicts_nothing(arm):
    assert contradictions(ARMS[arm], StreamConfig.for_arm(arm)) == {}


@pytest.mark.parametrize(
    ("arm", "fields", "meant"),
    [
        ("online", {"window": 1}, {"window": "a window of at least 2"}),
        ("explicit", {"window": "auto"}, {}),
        ("no-memory", {"carry_weights": True}, {"carry_weights": "carry_weights=False"}),
        ("no-memory", {"window": 2}, {"window": "window=1"}),
        ("implicit", {"source_pull": 1.0}, {"source_pull": "source_pull below 1"}),
        ("no-memory", {"source_pull": 1.0}, {}),
        ("paper", {"grad_clip": None, "crop_size": 8, "seed": 3}, {"grad_clip": "grad_clip=0.01"}),
        ("offline", {"every": 2}, {"every": "every=1"}),
    ],
)  # fmt: skip
def test_a_field_that_makes_another_arm_is_named_with_what_the_arm_means(arm, fields, meant):
    assert contradictions(find_arm(arm), StreamConfig.for_arm(arm, **fields)) == meant


def test_no_configuration_contradicts_an_arm_that_adapts_no_weights():
    assert contradictions(find_arm("fixed"), StreamConfig.online(window=1, source_pull=1.0)) == {}
