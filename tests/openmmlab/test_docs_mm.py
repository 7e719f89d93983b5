"""What the documents print runs: configs train and test on miniature data, and imports work in the order shown."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS
from mmengine.runner import Runner

import tiny
from small_configs import small_config
from ttt_adapt import MAEBranch
from ttt_adapt_openmmlab import OnlineTTTHook

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "openmmlab.md"
PAGES = [ROOT / "README.md", PAGE]


def printed_configs(*pages: Path) -> list[str]:
    return [code for page in pages for code in re.findall(r"```\w*\n(_base_ = .*?)```", page.read_text(), re.S)]


def printed_imports() -> list[str]:
    """The import lines of each program on the page."""
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    found = ["\n".join(re.findall(r"^(?:import|from) .*", code, re.M)) for code in programs]
    return [lines for lines in found if lines]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    tiny.without_slow_logs(monkeypatch)


def saved(code: str, folder: Path) -> Path:
    path = folder / "config.py"
    path.write_text(code)
    return path


def test_both_projects_are_shown():
    assert {re.search(r"'?\"?(mmseg|mmdet)::", code)[1] for code in printed_configs(*PAGES)} == {"mmseg", "mmdet"}


@pytest.mark.parametrize("code", printed_configs(*PAGES))
def test_it_is_read_and_its_hook_is_built(code, tmp_path):
    cfg = Config.fromfile(saved(code, tmp_path))
    assert cfg.model.type == "JointMAE"
    assert "backbone" in cfg.model.model
    assert set(cfg.model.branch) <= set(inspect.signature(MAEBranch.attach).parameters)
    hook = HOOKS.build(cfg.custom_hooks[0])
    assert isinstance(hook, OnlineTTTHook)
    assert hook.config.window == cfg.custom_hooks[0].window


def test_configs_have_ten_lines_and_each_that_is_new_is_explained_below():
    page, known = PAGE.read_text(), set()
    for code in printed_configs(PAGE):
        lines = code.splitlines()
        assert len(lines) == 10
        below = page.split(code)[1].split("\n## ")[0]
        names = [line.split(" = ")[0] for line in lines if line not in known]
        assert re.findall(r"^\| `(\w+)` \|", below, re.M) == names
        known |= set(lines)


@pytest.mark.slow
@pytest.mark.parametrize("code", printed_configs(*PAGES))
def test_it_trains_jointly(code, tmp_path):
    cfg = small_config(saved(code, tmp_path), tmp_path)
    cfg.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 1}
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert math.isfinite(runner.message_hub.get_scalar("train/loss").current())
    assert math.isfinite(runner.message_hub.get_scalar("train/loss_mae").current())


@pytest.mark.slow
@pytest.mark.parametrize("code", printed_configs(*PAGES))
def test_it_tests_with_adaptation(code, tmp_path):
    runner = Runner.from_cfg(small_config(saved(code, tmp_path), tmp_path))
    assert runner.test()
    summary = runner.message_hub.get_info("test/ttt")
    assert summary["arm"] == "online"
    assert summary["frames"] == len(runner.test_dataloader) > 0
    assert math.isfinite(summary["mean_loss"])


@pytest.mark.parametrize("code", printed_configs(*PAGES))
def test_it_tests_on_videos(code, tmp_path):
    loader = Config.fromfile(saved(code, tmp_path)).test_dataloader
    assert loader.sampler.type == "VideoSampler"
    assert loader.dataset.type in ("KittiStep", "CocoVideos")


def test_programs_for_both_projects_are_shown():
    imports = "\n".join(printed_imports())
    assert set(re.findall(r"from (mm\w+)\.apis", imports)) == {"mmseg", "mmdet"}


@pytest.mark.slow
@pytest.mark.parametrize("lines", printed_imports())
def test_imports_work_in_the_order_shown(lines):
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
