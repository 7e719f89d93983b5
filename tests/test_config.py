from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_adapt import StreamConfig, TTTAdaptError
from ttt_adapt.errors import ConfigError

CONTRACT = [
    "window", "batch_size", "iterations", "carry_weights", "source_pull", "restart_optimizer", "lr",
    "encoder_lr_scale", "weight_decay", "grad_clip", "crop_size", "precision", "norm_stats", "drop_path",
    "engine", "every", "seed",
]  # fmt: skip


def test_the_fields_of_the_contract_are_there_with_its_defaults():
    fields = {field.name for field in dataclasses.fields(StreamConfig)}
    assert set(CONTRACT) <= fields
    config = StreamConfig()
    assert (config.window, config.iterations, config.carry_weights, config.source_pull) == (16, 1, True, 0.0)
    assert (config.crop_size, config.precision, config.norm_stats) == (None, "fp32", "frozen")
    assert (config.drop_path, config.engine, config.every, config.seed) == (False, "auto", 1, 0)


def test_a_config_is_frozen_and_replace_makes_a_checked_copy():
    config = StreamConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 3
    changed = config.replace(window=3, lr=0.1)
    assert (changed.window, changed.lr, config.window) == (3, 0.1, 16)
    assert config.replace() == config
    with pytest.raises(ConfigError, match="no field 'windw'"):
        config.replace(windw=3)
    with pytest.raises(ConfigError, match="window is 0"):
        config.replace(window=0)


@pytest.mark.parametrize(
    ("preset", "window", "carry"),
    [("online", 16, True), ("no_memory", 1, False), ("implicit_only", 1, True), ("explicit_only", 16, False)],
)
def test_the_arms_differ_in_their_memories(preset, window, carry):
    config = getattr(StreamConfig, preset)()
    assert (config.window, config.carry_weights) == (window, carry)
    assert getattr(StreamConfig, preset)(seed=7).seed == 7
    with pytest.raises(ConfigError):
        getattr(StreamConfig, preset)(nonsense=1)


@pytest.mark.parametrize("preset", ["no_memory", "implicit_only", "explicit_only"])
def test_the_arms_with_less_memory_run_on_the_statistics_of_the_source(preset):
    make = getattr(StreamConfig, preset)
    assert make().norm_stats == "frozen"
    assert make(norm_stats="calibrated").norm_stats == "calibrated"
    assert StreamConfig.online().norm_stats == "auto"


def test_the_papers_recipe_is_that_of_its_released_code():
    config = StreamConfig.paper()
    assert (config.window, config.batch_size, config.iterations) == (16, 32, 1)
    assert (config.lr, config.encoder_lr_scale, config.weight_decay, config.grad_clip) == (1e-4, 0.1, 0.05, 0.01)
    assert config.restart_optimizer
    assert config.drop_path
    assert config.carry_weights
    assert config.source_pull == 0.0


@pytest.mark.parametrize("name", ["window", "batch_size", "every"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "4", None, True])
def test_counts_are_whole_numbers_from_one(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value!r}; expected a whole number, at least 1") as caught:
        StreamConfig(**{name: value})
    assert isinstance(caught.value, TTTAdaptError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", [-1, 1.5, "4", None, True])
def test_iterations_are_a_whole_number_from_zero(value):
    with pytest.raises(ConfigError, match=f"iterations is {value!r}; expected a whole number, at least 0"):
        StreamConfig(iterations=value)
    assert StreamConfig(iterations=0).iterations == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source_pull", -0.1), ("source_pull", 1.1), ("norm_momentum", 2.0), ("lr", -1.0), ("lr", float("nan")),
        ("encoder_lr_scale", -1), ("weight_decay", "0.1"), ("lr", None), ("source_pull", True), ("grad_clip", 0.0),
        ("grad_clip", -1.0), ("precision", "fp16"), ("norm_stats", "moving"), ("engine", "magic"), ("crop_size", 0),
        ("crop_size", (1, 2, 3)), ("crop_size", (0, 4)), ("crop_size", 1.5), ("crop_size", "64"),
        ("micro_batch", 0), ("micro_batch", 1.5), ("grad_checkpointing", 1),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_with_its_name_and_value(name, value):
    with pytest.raises(ConfigError) as caught:
        StreamConfig(**{name: value})
    assert f"{name} is {value!r}; expected" in str(caught.value)


@given(st.floats(0, 1), st.floats(0, 10), st.integers(1, 99))
def test_everything_in_range_is_taken(pull, lr, window):
    config = StreamConfig(source_pull=pull, lr=lr, window=window)
    assert (config.source_pull, config.lr, config.window) == (pull, lr, window)


def test_one_side_means_a_square_crop():
    assert StreamConfig(crop_size=64).crop_size == StreamConfig(crop_size=[64, 64]).crop_size == (64, 64)
    assert StreamConfig(crop_size=(32, 64)).crop_size == (32, 64)


def test_numbers_of_numpy_are_taken_and_kept_as_plain_ones():
    counts = ("window", "batch_size", "iterations", "every", "micro_batch", "seed")
    config = StreamConfig(**{name: np.int64(4) for name in counts}, lr=np.float32(0.5), source_pull=np.float64(0.25))
    assert config == StreamConfig(**dict.fromkeys(counts, 4), lr=0.5, source_pull=0.25)
    assert {type(getattr(config, name)) for name in counts} == {int}
    assert type(config.lr) is type(config.source_pull) is float
    assert StreamConfig(crop_size=np.int32(64)).crop_size == StreamConfig(crop_size=(np.int8(64), 64)).crop_size
    for value in (np.float64(4.0), np.bool_(True), np.int64(0)):
        with pytest.raises(ConfigError, match="batch_size is"):
            StreamConfig(batch_size=value)
