"""Calibrations as files, and what a stream's configuration becomes with one."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import models as zoo
from conftest import settle_norms
from ttt_adapt import StreamAdapter, StreamConfig
from ttt_adapt.errors import CheckpointError, ConfigError
from ttt_adapt.model.calibration import Calibration, default_rule, settled_config
from ttt_adapt.model.calibration_file import is_outdated
from ttt_adapt.model.fingerprint import fingerprint_of
from ttt_adapt.model.measure import measure, take_stills
from ttt_adapt.model.rule import Rule


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return settle_norms(zoo.resnet())


@pytest.fixture(scope="module")
def calibration(model) -> Calibration:
    generator = torch.Generator().manual_seed(1)
    taken = take_stills(model, [torch.randn(3, 64, 64, generator=generator) for _ in range(8)])
    found = measure(model, taken, loss=lambda x: x.square().mean())
    return found.replace(
        rule=Rule("batchnorm", "channel", "high", 0.5, 0.25),
        drifts=(0.25, 0.5, 1.5),
        settings={"lr": 1e-4},
        record={"by": "labels"},
    )


def assert_same(a: Calibration, b: Calibration) -> None:
    tensors = a.tensors(), b.tensors()
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    for field in dataclasses.fields(a):
        if field.name != "statistics":
            assert getattr(a, field.name) == getattr(b, field.name), field.name
    places = [{k: {n: (s.layout, s.prefix) for n, s in v.items()} for k, v in c.statistics.items()} for c in (a, b)]
    assert places[0] == places[1]
    assert a.digest == b.digest


def test_a_saved_calibration_is_loaded_as_it_was(calibration, tmp_path):
    calibration.save(tmp_path / "c.safetensors")
    assert_same(Calibration.load(tmp_path / "c.safetensors"), calibration)
    assert_same(Calibration.of_tensors(calibration.tensors(), calibration.to_json()), calibration)


def test_a_file_that_cannot_be_written_leaves_the_old_one(calibration, tmp_path):
    absent = tmp_path / "there is no such folder"
    for path in (absent / "c.safetensors", absent / "nor this" / "c.safetensors"):
        with pytest.raises(CheckpointError, match=rf"cannot be written: .*there is no folder {absent}") as caught:
            calibration.save(path)
        assert ".part" not in str(caught.value)
    assert not absent.exists()


@pytest.mark.parametrize("path", [None, 3])
def test_what_is_no_path_is_refused(calibration, path):
    for call in (Calibration.load, calibration.save):
        with pytest.raises(CheckpointError, match=f"path of the calibration is {path}; expected a string"):
            call(path)


def test_every_broken_file_is_an_error_of_the_library(calibration, tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(CheckpointError, match="there is no calibration .*: make one with `ttt-adapt calibrate`"):
        Calibration.load(path)
    calibration.save(path)
    whole = path.read_bytes()
    for cut in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            Calibration.load(path)
    generator = torch.Generator().manual_seed(0)
    length = int.from_bytes(whole[:8], "little")
    for place in torch.randint(8, 8 + length, (60,), generator=generator).tolist():
        path.write_bytes(whole[:place] + b"\x7f" + whole[place + 1 :])
        try:
            Calibration.load(path)
        except (CheckpointError, ConfigError):
            continue


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99}, {"rule": {"points": "elsewhere"}}, {"rule": None}, {"rule": []}, {"size": 3}, {"loss": 1.0},
        {"places": {"batchnorm": {"nowhere": ["nchw", 0]}}}, {"places": []}, {"places": {"norms": {"a": 3}}},
        {"strange": 1}, {"drifts": 3}, {"rule": {"points": "norms"}},
    ],
    ids=str,
)  # fmt: skip
def test_text_that_does_not_fit_its_tensors_is_refused(calibration, change):
    text = json.dumps({**json.loads(calibration.to_json()), **change})
    with pytest.raises((CheckpointError, ConfigError)):
        Calibration.of_tensors(calibration.tensors(), text, "here.safetensors")


def test_a_file_without_the_fingerprint_in_bfloat16_is_read_as_before(model, calibration):
    plain = {name: value for name, value in json.loads(calibration.to_json()).items() if name != "rounded"}
    read = Calibration.of_tensors(calibration.tensors(), json.dumps(plain))
    assert_same(read, calibration.replace(rounded=""))
    read.check(model)


@pytest.mark.parametrize("place", [1, 8])
def test_levels_of_an_image_that_descend_are_refused(place, calibration):
    tensors = calibration.tensors()
    (name,) = [name for name in tensors if name.startswith("input/") and name.endswith("/mean")]
    Calibration.of_tensors({**tensors, name: torch.zeros_like(tensors[name])}, calibration.to_json())
    levels = tensors[name].clone()
    levels[1, place] = levels[1, place - 1] - 1.0
    with pytest.raises(CheckpointError, match="levels that descend"):
        Calibration.of_tensors({**tensors, name: levels}, calibration.to_json())


def test_a_calibration_of_an_earlier_version_is_known_by_its_whole_number():
    assert is_outdated('{"format": 1}', "here")
    for other in ("true", "0", "-1", "2", '"1"', "1.0", "null", "[]"):
        assert not is_outdated(f'{{"format": {other}}}', "here"), other


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "3", '{"format": 1}'])
def test_other_text_is_no_calibration(calibration, text):
    with pytest.raises(CheckpointError, match="here"):
        Calibration.of_tensors(calibration.tensors(), text, "here")


def test_other_weights_are_refused_and_a_copy_in_half_precision_is_not(model, calibration):
    calibration.check(model)
    half = settle_norms(zoo.resnet())
    half.load_state_dict(model.state_dict())
    calibration.check(half.half())
    calibration.check(half.float())
    assert fingerprint_of(half) == calibration.fingerprint
    with torch.no_grad():
        half.fc.bias[0] += 0.1
    with pytest.raises(ConfigError, match="of other weights than those of this ResNet: calibrate the model again"):
        calibration.check(half)


PRECISIONS = {
    "float32": (torch.float32,), "float64": (torch.float64,), "float16": (torch.float16,),
    "bfloat16": (torch.bfloat16,), "float32 of float16": (torch.float16, torch.float32),
    "float32 of bfloat16": (torch.bfloat16, torch.float32),
}  # fmt: skip
"""How a model was cast, one precision after the other."""
HALF = {"float16", "float32 of float16"}
BRAIN = {"bfloat16", "float32 of bfloat16"}


def cast(model, through):
    copy = settle_norms(zoo.resnet())
    copy.load_state_dict(model.state_dict())
    for dtype in through:
        copy = copy.to(dtype)
    return copy


@pytest.mark.parametrize("calibrated", PRECISIONS)
def test_a_calibration_fits_the_model_in_the_precisions_that_can_be_told(calibrated, model, calibration):
    """Rounding to float16 and rounding to bfloat16 give other weights, and neither tells of the other."""
    one = cast(model, PRECISIONS[calibrated])
    own = calibration.replace(fingerprint=fingerprint_of(one), rounded=fingerprint_of(one, torch.bfloat16))
    strange = BRAIN if calibrated in HALF else HALF if calibrated in BRAIN else set()
    for name, through in PRECISIONS.items():
        other = cast(model, through)
        if name in strange:
            with pytest.raises(ConfigError, match="of other weights"):
                own.check(other)
        else:
            own.check(other)
        with torch.no_grad():
            other.fc.bias[0] += 0.1
        with pytest.raises(ConfigError, match="of other weights"):
            own.check(other)


def test_a_refused_model_in_half_precision_is_told_the_way(model, calibration):
    one = cast(model, [torch.float16])
    own = calibration.replace(fingerprint=fingerprint_of(one), rounded=fingerprint_of(one, torch.bfloat16))
    with pytest.raises(ConfigError, match="A calibration of the model in float32 fits its copies in float16 and in"):
        own.check(cast(model, [torch.bfloat16]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_calibration_measured_in_half_precision_corrects_the_model_in_float32(dtype, model):
    half, stills = cast(model, [dtype]), torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    found = measure(half, take_stills(half, list(stills.to(dtype))))
    with StreamAdapter(cast(model, [torch.float32]), calibration=found) as adapter:
        assert adapter.step(stills[0] + 1.0).dtype == torch.float32


def test_a_fingerprint_sees_buffers_too(model):
    twin = settle_norms(zoo.resnet())
    twin.load_state_dict(model.state_dict())
    assert fingerprint_of(twin) == fingerprint_of(model)
    twin.bn1.running_mean[0] += 0.5
    assert fingerprint_of(twin) != fingerprint_of(model)


def test_the_digest_is_that_of_what_a_corrected_pass_depends_on(calibration):
    assert calibration.replace(record={"other": 1}, stills=3).digest == calibration.digest
    changed = calibration.replace(rule=dataclasses.replace(calibration.rule, strength=2.0))
    assert changed.digest != calibration.digest


@pytest.mark.parametrize(
    "wrong",
    [
        {"points": "norm"}, {"per": "image"}, {"margin": "median"}, {"largest": 1.5}, {"largest": -0.1},
        {"strength": -1.0}, {"strength": float("nan")}, {"largest": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_a_rule_out_of_range_is_refused(wrong):
    with pytest.raises(ConfigError):
        Rule(**{"points": "norms", **wrong})


@pytest.mark.parametrize(
    "points", ["batchnorm", "norms", "blocks", "input", "input+blocks", "input+norms", "norms+blocks", "none"]
)
def test_a_rule_names_one_kind_of_points_or_several_of_them(points):
    assert Rule(points).kinds == ([] if points == "none" else points.split("+"))


@pytest.mark.parametrize("wrong", ["", "input+", "input+nowhere", "none+input", "input blocks", "+"])
def test_a_rule_with_an_unknown_kind_among_several_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"expected kinds of batchnorm, norms, blocks, input with \+ between"):
        Rule(wrong)


def test_the_points_of_a_combined_rule_are_those_of_all_its_kinds(calibration):
    both = calibration.replace(rule=Rule("input+batchnorm")).points
    alone = [calibration.replace(rule=Rule(kind)).points for kind in ("input", "batchnorm")]
    assert list(both) == [*alone[0], *alone[1]]
    assert {kind for kind, _ in both} == {"input", "batchnorm"}
    assert all(both[key] is calibration.statistics[key[0]][key[1]] for key in both)
    assert calibration.replace(rule=Rule("none")).points == {}


def test_a_rule_at_points_that_the_model_lacks_is_refused(calibration):
    for points in ("norms", "input+norms"):
        with pytest.raises(
            ConfigError, match=r"corrects 'norms', and this model has no such points; it has .*batchnorm"
        ):
            calibration.replace(rule=Rule(points))
    with pytest.raises(ConfigError, match="corrects 'input', and this model has no such points; it has none"):
        calibration.replace(statistics={}, rule=Rule("input"))


def test_at_the_image_usual_is_what_nearly_all_stills_show():
    for margin in ("mean", "high"):
        rule = Rule("input+norms", "channel", margin, 0.7, 0.3)
        assert rule.at_image() == Rule("input+norms", "channel", "high", 0.7, 0.3)


def test_the_limit_is_the_95th_percentile_of_the_drifts_in_units_of_their_mean(calibration):
    drifts = tuple(0.1 * i for i in range(1, 21))
    found = calibration.replace(drifts=drifts)
    assert found.usual_drift == pytest.approx(np.mean(drifts))
    assert found.limit == pytest.approx(np.quantile(drifts, 0.95) / np.mean(drifts))
    scaled = calibration.replace(drifts=tuple(1000.0 * drift for drift in drifts))
    assert scaled.limit == pytest.approx(found.limit)


def test_a_calibration_without_drifts_cannot_open_a_gate(calibration):
    config = StreamConfig.online(gate="calibrated", norm_stats="calibrated")
    assert settled_config(config, calibration) == config
    with pytest.raises(ConfigError, match="no calibration with the drifts of its stills: make one"):
        settled_config(config, calibration.replace(drifts=()))
    chosen = calibration.replace(drifts=(), settings={"gate": "calibrated"})
    with pytest.raises(ConfigError, match="no calibration with the drifts of its stills: make one"):
        settled_config(None, chosen)


def test_the_default_rule_is_at_the_first_kind_of_points_that_there_is():
    kinds = ("input", "norms", "blocks", "batchnorm")
    assert [default_rule({kind: {"x": 1} for kind in kinds[:n]}).points for n in range(5)] == [
        "none", "input", "norms", "blocks", "batchnorm",
    ]  # fmt: skip


def test_chosen_settings_are_taken_over_where_a_configuration_has_the_values_of_the_preset(calibration):
    chosen = calibration.replace(settings={"lr": 3e-4, "source_pull": 0.02, "gate": "calibrated"})
    preset = StreamConfig.online()
    assert chosen.settle(preset) == preset.replace(**chosen.settings)
    own = preset.replace(lr=2e-5, seed=7)
    assert chosen.settle(own) == own.replace(source_pull=0.02, gate="calibrated")
    assert chosen.settle(preset, given=["lr", "gate"]) == preset.replace(source_pull=0.02)
    surprise = preset.replace(gate="surprise")
    assert chosen.settle(surprise) == surprise.replace(lr=3e-4, source_pull=0.02)
    assert calibration.replace(settings={}).settle(own) == own


@pytest.mark.parametrize("changes", [{"norm_stats": "frozen"}, {"norm_stats": "blend"}, {"window": "auto"}], ids=str)
def test_a_chosen_gate_is_left_out_where_it_cannot_be(calibration, changes):
    chosen = calibration.replace(settings={"lr": 3e-4, "gate": "calibrated"})
    config = StreamConfig.online(**changes)
    assert chosen.settle(config) == config.replace(lr=3e-4)
    assert chosen.settings_beside(changes) == {"lr": 3e-4}
    assert chosen.settings_beside({"norm_stats": "calibrated", "lr": 1.0}) == {"gate": "calibrated"}


def test_what_a_configuration_becomes(calibration):
    online = StreamConfig.online(lr=1e-4)
    table = [
        (None, None, StreamConfig().replace(norm_stats="frozen")),
        (None, calibration, online.replace(norm_stats="calibrated")),
        (online, None, online.replace(norm_stats="frozen")),
        (online, calibration, online.replace(norm_stats="calibrated")),
        (StreamConfig(norm_stats="frozen"), calibration, StreamConfig(norm_stats="frozen")),
        (StreamConfig(norm_stats="ema"), calibration, StreamConfig(norm_stats="ema")),
        (StreamConfig(norm_stats="calibrated"), calibration, StreamConfig(norm_stats="calibrated")),
    ]
    for config, given, expected in table:
        if config is not online or online.norm_stats == "auto":
            assert settled_config(config, given) == expected
    with pytest.raises(ConfigError, match="has no calibration: make one"):
        settled_config(StreamConfig(norm_stats="calibrated"), None)
    with pytest.raises(ConfigError, match="calibration is a dict; expected what calibrate"):
        settled_config(None, {})
    with pytest.raises(ConfigError, match="config is a dict; expected a StreamConfig"):
        settled_config({}, None)


def test_a_calibration_without_the_hash_of_rounded_weights_is_read(calibration):
    plain = json.loads(calibration.to_json())
    del plain["rounded"]
    assert Calibration.of_tensors(calibration.tensors(), json.dumps(plain)).rounded == ""
