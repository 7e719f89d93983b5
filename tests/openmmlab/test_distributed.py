"""Several processes adapt to whole videos each, and the metrics are those of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.runner import Runner, save_checkpoint

import tiny
import videos as v
from conftest import settle_norms
from ttt_adapt_openmmlab import plain_model

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    tiny.without_slow_logs(monkeypatch)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def alone(config: Path, out: Path) -> tuple[dict, dict[str, bytes], str]:
    """Metrics, predicted label maps by name, and the log, of a run by MMEngine's runner in this process."""
    cfg = Config.fromfile(config)
    cfg.experiment_name = f"{cfg.experiment_name}-alone"
    cfg.work_dir, cfg.test_evaluator["output_dir"] = str(out), f"{out}/maps"
    Runner.from_cfg(cfg).test()
    return results(out)


def together(config: Path, out: Path) -> tuple[dict, dict[str, bytes], str]:
    """The same from two processes of the command line."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command += ["-m", "ttt_adapt", "mm", "test", str(config), "--launcher", "pytorch", "--work-dir", str(out)]
    command += ["--cfg-options", f"test_evaluator.output_dir={out}/maps"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=out.parent, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return results(out)


def results(out: Path) -> tuple[dict, dict[str, bytes], str]:
    run = next(path for path in out.iterdir() if path.is_dir() and path.name != "maps")
    maps = {path.name: path.read_bytes() for path in (out / "maps").iterdir()}
    return json.loads((run / f"{run.name}.json").read_text()), maps, (run / f"{run.name}.log").read_text()


def config_for(tmp_path: Path, lengths: dict[str, int], **changes) -> Path:
    """A config with trained-looking weights; the frames' numbers differ between videos, as the maps go by name."""
    data = tmp_path / "data"
    for i, (name, length) in enumerate(lengths.items()):
        v.write_video(data, name, [100 * i + n for n in range(length)])
    loader = v.loader_of(data, sampler={"type": "VideoSampler"})
    entries = v.seg_config(data, tmp_path / "work", test_dataloader=loader, **changes)
    runner = Runner.from_cfg(Config(entries))
    settle_norms(plain_model(runner.model))
    save_checkpoint({"state_dict": runner.model.state_dict()}, str(tmp_path / "model.pth"))
    return v.write_config(tmp_path / "config.py", {**entries, "load_from": str(tmp_path / "model.pth")})


LATE_METRIC = """
import time
from mmengine.dist import get_world_size, is_main_process
from mmengine.registry import METRICS
from mmseg.evaluation import IoUMetric

@METRICS.register_module()
class LateIoUMetric(IoUMetric):
    def __init__(self, **settings):
        if get_world_size() > 1 and is_main_process():
            time.sleep(1)
        super().__init__(**settings)
"""


def test_two_processes_give_exactly_the_result_of_one(tmp_path, monkeypatch):
    """The first process is late with the folder that the predictions are written to; the second one waits for it."""
    (tmp_path / "late_metric.py").write_text(LATE_METRIC)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path)
    imports = {"imports": ["ttt_adapt_openmmlab", "late_metric"], "allow_failed_imports": False}
    metric = {"type": "LateIoUMetric", "iou_metrics": ["mIoU"]}
    lengths = {"a": 2, "b": 5, "c": 1, "d": 3}
    config = config_for(tmp_path, lengths, custom_imports=imports, test_evaluator=metric)
    one, one_maps, _ = alone(config, tmp_path / "one")
    two, two_maps, log = together(config, tmp_path / "two")
    assert len(one_maps) == 11
    assert one_maps == two_maps
    names = ("mIoU", "mAcc", "aAcc")
    assert [two[name] for name in names] == [one[name] for name in names]
    assert "Distributed training: True" in log
    assert "GPU number: 2" in log
    assert two["ttt"]["mean_loss"] == pytest.approx(one["ttt"]["mean_loss"], abs=2e-6)
    assert [(r["ttt"]["arm"], r["ttt"]["frames"], r["ttt"]["videos"]) for r in (one, two)] == [("online", 11, 4)] * 2


def test_a_process_without_a_video_waits_for_the_others(tmp_path):
    config = config_for(tmp_path, {"a": 3})
    one, one_maps, _ = alone(config, tmp_path / "one")
    two, two_maps, _ = together(config, tmp_path / "two")
    assert one_maps == two_maps
    assert two["mIoU"] == one["mIoU"]
    assert two["ttt"]["frames"] == 3


TEST_AND_LIST_THREADS = """
import sys
from pathlib import Path
from ttt_adapt_openmmlab.launch import run
from ttt_adapt_openmmlab.run_config import read_config

run(read_config(Path(sys.argv[1]), Path(sys.argv[2]), []), "test", "pytorch", None)
print("threads:", *(task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="lists threads by /proc")
def test_no_thread_of_the_process_group_is_left_when_python_ends(tmp_path):
    config = config_for(tmp_path, {"a": 1})
    alone_in_a_group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", TEST_AND_LIST_THREADS, str(config), str(tmp_path / "out")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **alone_in_a_group, "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    threads = done.stdout.rpartition("threads:")[2].split()
    assert threads
    assert not [name for name in threads if "gloo" in name]
