"""The configs printed in the documents are read by MMEngine, and say what the page says of them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS

from ttt_adapt import MAEBranch
from ttt_adapt_openmmlab import OnlineTTTHook

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "openmmlab.md"]


def printed_configs() -> list[str]:
    return [code for page in PAGES for code in re.findall(r"```\w*\n(_base_ = .*?)```", page.read_text(), re.S)]


def test_both_projects_are_shown():
    assert {re.search(r"'?\"?(mmseg|mmdet)::", code)[1] for code in printed_configs()} == {"mmseg", "mmdet"}


@pytest.mark.parametrize("code", printed_configs())
def test_it_is_read_and_its_hook_is_built(code, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(code)
    cfg = Config.fromfile(path)
    assert cfg.model.type == "JointMAE"
    assert "backbone" in cfg.model.model
    assert set(cfg.model.branch) <= set(inspect.signature(MAEBranch.attach).parameters)
    hook = HOOKS.build(cfg.custom_hooks[0])
    assert isinstance(hook, OnlineTTTHook)
    assert hook.config.window == cfg.custom_hooks[0].window
