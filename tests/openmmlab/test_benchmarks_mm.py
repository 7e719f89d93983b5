"""What the benchmarks of Mask2Former measure: parts of a step, the floor, and attention computed in several ways."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import tiny
from ttt_adapt import StreamConfig, calibrate

CPU = torch.device("cpu")


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    """A benchmark as a module; what it shares with others is imported from its folder."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        spec.loader.exec_module(module)
    return module


step = load("mask2former_step")


def test_the_clock_gives_each_part_the_time_since_the_moment_before():
    clock = step.Clock(CPU)
    clock.start()
    time.sleep(0.02)
    clock.stop("encoder")()
    clock.stop("decoder")()
    time.sleep(0.02)
    clock.start()
    clock.stop("predict")()
    ms = clock.read()
    assert list(ms) == ["encoder", "decoder", "predict"]
    assert ms["encoder"] >= 20
    assert ms["decoder"] < ms["encoder"]
    assert ms["predict"] < ms["encoder"]
    assert clock.read() == {}


def test_the_floor_counts_forward_and_backward_and_divides_by_the_measured_rate(monkeypatch):
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(8, 64)
    monkeypatch.setattr(step, "matmul_tflops", lambda precision, device: {"bf16": 2.0, "tf32": 1.0}[precision])
    found = step.floor(lambda: layer(x).sum().backward(), lambda: layer(x), 3, "bf16", CPU)
    product = 2 * 8 * 64 * 32 / 1e12
    assert found["predict_tflop"] == pytest.approx(product)
    assert found["adapt_tflop"] == pytest.approx(3 * 2 * product)  # the input needs no gradient
    assert found["floor_ms"] == pytest.approx(1e3 * (3 * 2 * product / 2 + product))


def test_the_paper_preset_is_the_recipe_of_the_paper():
    options = step.parse(["--paper", "--precision", "bf16"])
    assert (options.batches, list(options.size), options.frame) == ([32], [512, 1024], [618, 2048])
    assert step.branch_settings(options) == {"mask_ratio": 0.85, "loss_on": "all"}
    config = step.stream_config(options, 32)
    assert config == StreamConfig.paper(window=16, batch_size=32, crop_size=(512, 1024), precision="bf16")
    assert step.stream_config(step.parse([]), 4) == StreamConfig.online(window=16, batch_size=4)


def test_a_batch_may_be_taken_in_parts_whose_times_add_up():
    options = step.parse(["--micro-batch", "2"])
    assert [step.stream_config(options, batch).micro_batch for batch in (1, 8)] == [1, 2]
    clock = step.Clock(CPU)
    for _ in range(2):
        clock.enter()
        clock.stop("encoder")()
        clock.stop("decoder")()
        time.sleep(0.01)
    clock.stop("backward")()
    ms = clock.read()
    assert list(ms) == ["encoder", "decoder", "backward"]
    assert ms["backward"] >= 20


@pytest.mark.parametrize("micro", [[], ["--micro-batch", "1"]])
def test_a_step_is_measured_with_every_part_and_with_crops(micro, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(step, "build", lambda device: tiny.build(tiny.mask2former_semantic()).eval())
    monkeypatch.setattr(step, "in_own_process", lambda options, batch: measured(options, batch))
    out = tmp_path / "step.json"
    arguments = ["--size", "64", "64", "--frame", "64", "96", "--frames", "1", "--batches", "2", "--device", "cpu"]
    step.compare(step.parse([*arguments, *micro, "--out", str(out)]))
    report = json.loads(out.read_text())
    assert (report["precision"], report["device"], report["frame"]) == ("fp32", "cpu", [64, 96])
    found = report["batches"]["2"]
    parts = [found[name] for name in (*step.PARTS, "predict")]
    assert all(part > 0 for part in parts)
    assert sum(parts) <= found["step"]
    assert found["adapt_tflop"] > found["predict_tflop"] > 0
    assert found["step_over_floor"] > 0
    assert found["peak_mib"] > 0
    assert "| 2 |" in capsys.readouterr().out


def measured(options, batch: int) -> dict:
    return step.measure(options, batch, CPU) if batch else step.measure_plain(options, CPU)


def test_the_implementations_of_deformable_attention_compute_the_same(monkeypatch, tmp_path, capsys):
    bench = load("deformable_attention")
    monkeypatch.setattr(bench, "CASES", {"small": ((64, 96), 2, (2, 8))})
    out = tmp_path / "attention.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds", "2", "--device", "cpu", "--out", str(out)])
    bench.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["pass"] for row in rows] == ["forward", "forward and backward"]
    for row in rows:
        assert set(row["ratio"]) >= {"mmcv", "ours"}
        assert row["ratio"]["mmcv"] == 1
        assert max(row["error"].values()) < 1e-5
    assert "| small | forward |" in capsys.readouterr().out


def test_the_calibrated_mask2former_runs_what_is_missing_and_tabulates_all(monkeypatch, tmp_path, capsys):
    bench = load("mask2former_calibrated")
    asked = []

    def tested(seed, stream, arm, checkpoint, options):
        asked.append((seed, *stream, *arm.values()))
        return {"stream/mIoU": 40.0 + 2 * seed}

    def calibrated(seed, checkpoint, options):
        model = tiny.build(tiny.fcn()).eval()
        stills = [torch.randn(3, *tiny.SIZE) for _ in range(8)]
        calibrate(model, stills, choose=False).save(tmp_path / "calibration.safetensors")
        return tmp_path / "calibration.safetensors", 1.5

    monkeypatch.setattr(bench, "trained", lambda seed, options: tmp_path / "iter_6.pth")
    monkeypatch.setattr(bench, "calibrated", calibrated)
    monkeypatch.setattr(bench, "tested", tested)
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--seeds", "0", "1", "--drifts", "fog:2"]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--iterations", "6"])
    bench.main()
    assert len(asked) == len(set(asked)) == 2 * 3 * 4
    assert (1, "0016E5_val_c", "fog:2", "online", "frozen") in asked
    assert "| dusk | 41.00 ± 1.41 |" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "seed-1.json").read_text())
    assert report["calibration"]["rule"]["points"] == "batchnorm"
    del report["streams"]["dusk"]["both"]
    (tmp_path / "out" / "seed-1.json").write_text(json.dumps(report))
    bench.main()
    assert asked[24:] == [(1, "0001TP_train_a", "none", "online", "calibrated")]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--iterations", "7"])
    with pytest.raises(SystemExit, match="other settings"):
        bench.main()
