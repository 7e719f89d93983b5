"""`ttt-adapt mm`: MMEngine's runner behind the project's command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.utils import ManagerMixin

import miniatures
import tiny
import videos as v
from ttt_adapt.cli.app import main
from ttt_adapt_openmmlab import launch
from ttt_adapt_openmmlab.arms import HOOK_ARMS, contradiction
from ttt_adapt_openmmlab.run_config import parse_options, read_config, set_amp, set_arm


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    tiny.without_slow_logs(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tmp_path):
    """A config file that trains and tests on two generated videos."""
    root = v.write_videos(tmp_path / "data", {"a": 3, "b": 2})
    return write(tmp_path / "joint.py", **v.seg_config(root, tmp_path / "work"), **v.train_entries(root))


def write(path: Path, **entries) -> Path:
    return v.write_config(path, entries)


@pytest.fixture
def checkpoint(config, tmp_path):
    """Weights of the config's model, as they are made."""
    init_default_scope("mmseg")
    file = tmp_path / "model.pth"
    torch.save({"state_dict": MODELS.build(Config.fromfile(config).model).state_dict()}, file)
    return file


def forget(kind: type) -> None:
    """All instances that MMEngine keeps by name."""
    for child in kind.__subclasses__():
        child._instance_dict.clear()
        forget(child)


def mm(*args: object) -> int:
    """Exit status of the command, as of a process of its own: MMEngine keeps one log for all runs of one second."""
    forget(ManagerMixin)
    sys.argv = ["ttt-adapt", "mm", *map(str, args)]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def failed(capsys, *args: object) -> str:
    """The one line that a failing command prints."""
    assert mm(*args) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


def run_dir(work: Path) -> Path:
    return max(path for path in work.iterdir() if path.is_dir())


def result(work: Path) -> dict:
    return json.loads((run_dir(work) / f"{run_dir(work).name}.json").read_text())


def test_train_then_test_with_and_without_adaptation(config, tmp_path):
    assert mm("train", config) == 0
    checkpoint = tmp_path / "work/iter_2.pth"
    state = torch.load(checkpoint)["state_dict"]
    assert any(name.startswith("mae_branch.") for name in state)
    assert "decode_head.conv_seg.weight" in state
    losses = [json.loads(x) for x in next((tmp_path / "work").glob("*/vis_data/scalars.json")).read_text().splitlines()]
    assert {"loss_mae", "decode.loss_ce"} <= losses[-1].keys()
    found = {}
    for arm in ("fixed", "online", "no-memory"):
        assert mm("test", config, checkpoint, "--arm", arm, "--work-dir", tmp_path / arm) == 0
        found[arm] = result(tmp_path / arm)
        assert found[arm]["ttt"]["arm"] == arm
        assert found[arm]["ttt"]["frames"] == 5
    assert "mean_loss" not in found["fixed"]["ttt"]


def test_training_goes_on_where_it_stopped(config, tmp_path):
    assert mm("train", config) == 0
    assert mm("train", config, "--resume", "--cfg-options", "train_cfg.max_iters=4") == 0
    assert torch.load(tmp_path / "work/iter_4.pth")["meta"]["iter"] == 4
    assert mm("train", "--resume", tmp_path / "work/iter_2.pth", config, "--work-dir", tmp_path / "other") == 0
    log = next((tmp_path / "other").glob("*/*.log")).read_text()
    assert "resumed epoch: 0, iter: 2" in log


def test_resuming_in_an_empty_work_dir_begins_with_the_weights_of_the_config(config, checkpoint, tmp_path):
    assert mm("train", config, "--resume", "--cfg-options", f"load_from={checkpoint}") == 0
    log = next((tmp_path / "work").glob("*/*.log")).read_text()
    assert f"Load checkpoint from {checkpoint}" in log
    assert "resumed" not in log


def test_cfg_options_are_mmengines(config, tmp_path, monkeypatch):
    taken = {}
    monkeypatch.setattr(Runner, "from_cfg", classmethod(lambda cls, cfg: taken.update(cfg=cfg) or _Nothing()))
    options = [
        "--cfg-options",
        "model.branch.mask_ratio=0.75",
        "env_cfg.b=[1,(2,3)]",
        "--out",
        "here",
        "--cfg-options",
        "param_scheduler=x,y",
    ]
    assert mm("train", *options, "--cfg-options", "experiment_name='p q'", config) == 0
    cfg = taken["cfg"]
    assert cfg.model.branch.mask_ratio == 0.75
    assert cfg.env_cfg.b == [1, (2, 3)]
    assert (cfg.param_scheduler, cfg.experiment_name, cfg.work_dir) == (["x", "y"], "pq", "here")


class _Nothing:
    hooks = ()

    def train(self):
        pass


def test_options_parse_as_in_mmengine():
    assert parse_options(["a.0.b=None", "c=true", "d=1e-3", "e=k=v", "f=(1,)", "g="]) == {
        "a.0.b": None,
        "c": True,
        "d": 1e-3,
        "e": "k=v",
        "f": (1,),
        "g": "",
    }


def test_the_work_dir_is_named_after_the_config(tmp_path):
    assert read_config(write(tmp_path / "some.py", x=1), None, []).work_dir == "work_dirs/some"


def test_configs_inherit_from_an_installed_project(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "_base_ = ['mmseg::mask2former/mask2former_swin-t_8xb2-90k_cityscapes-512x1024.py']\n"
        "custom_imports = dict(imports=['ttt_adapt_openmmlab'], allow_failed_imports=False)\n"
        "model = dict(_delete_=True, type='JointMAE', model=_base_.model, branch=dict(decoder='copy_head'))\n"
        "custom_hooks = [dict(type='OnlineTTTHook', window=16, batch_size=32, crop_size=(512, 1024))]\n"
    )
    cfg = read_config(path, None, ["model.branch.mask_ratio=0.9"])
    assert cfg.model.model.type == "EncoderDecoder"
    assert cfg.model.branch == {"decoder": "copy_head", "mask_ratio": 0.9}


MEMORIES = {"window": 16, "batch_size": 4, "carry_weights": True}


@pytest.mark.parametrize(
    ("arm", "given", "left"),
    [
        ("no-memory", MEMORIES, {"batch_size": 4}),
        ("explicit", MEMORIES, {"window": 16, "batch_size": 4}),
        ("explicit", {"window": 1, "lr": 0.1}, {"lr": 0.1}),
        ("online", {"window": 1, "source_pull": 1.0, "batch_size": 4}, {"batch_size": 4}),
        ("online", {"carry_weights": False, "window": None}, {"window": None}),
        ("offline", MEMORIES, MEMORIES),
        ("offline", {"source_pull": 0.5, "iterations": 2, "every": 2, "gate": "surprise", "lr": 0.1}, None),
        ("offline", {"source_pull": 1.0, "carry_weights": False, "lr": 0.1}, {"lr": 0.1}),
        ("offline", {"window": 1, "offline_steps": 3}, {"offline_steps": 3}),
        ("fixed", MEMORIES, MEMORIES),
        ("paper", {**MEMORIES, "grad_clip": None, "lr": 0.1}, {"window": 16, "carry_weights": True}),
        ("paper", {"crop_size": (4, 5), "seed": 3, "precision": "bf16"}, None),
        ("paper", {"log_interval": 3, "branch": {"decoder": "conv"}}, None),
    ],
)
def test_an_arm_by_name_drops_what_contradicts_it_and_nothing_else(arm, given, left):
    cfg = Config({"custom_hooks": [{"type": "EmptyCacheHook"}, {"type": "OnlineTTTHook", **given}]})
    set_arm(cfg, arm)
    assert cfg.custom_hooks[0] == {"type": "EmptyCacheHook"}
    assert cfg.custom_hooks[1] == {"type": "OnlineTTTHook", "arm": arm, **(given if left is None else left)}
    hook = HOOKS.build(cfg.custom_hooks[1])
    assert not contradiction(arm, hook.config)


def test_help_names_the_arms_of_the_hook(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert mm("test", "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"{', '.join(HOOK_ARMS[:-1])} or {HOOK_ARMS[-1]}." in shown


@pytest.mark.parametrize(("given", "arm"), [("online", "online"), ("no_memory", "no-memory")])
def test_an_arm_by_name_brings_the_hook(given, arm):
    cfg = Config({"model": {}})
    set_arm(cfg, given)
    assert cfg.custom_hooks == [{"type": "OnlineTTTHook", "arm": arm}]


def test_predictions_are_painted_into_a_folder(config, checkpoint, tmp_path):
    hook = "default_hooks.visualization.type=SegVisualizationHook"
    assert mm("test", config, checkpoint, "--show-dir", tmp_path / "shown", "--cfg-options", hook) == 0
    assert list((tmp_path / "shown").rglob("*.png"))


def test_wrong_calls_are_told_in_a_line(config, checkpoint, tmp_path, capsys):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no checkpoint")
    other = tmp_path / "other.pth"
    torch.save({"state_dict": {"backbone.layer9.weight": torch.zeros(1)}}, other)
    backbone = [f"model.model.backbone.init_cfg.{entry}" for entry in ("type=Pretrained", "checkpoint=no.pth")]
    for args, message in [
        (("test", "absent.py"), "config absent.py does not exist"),
        (("test", config, "absent.pth"), "checkpoint absent.pth does not exist"),
        (("test", config, broken), "cannot be read"),
        (("test", config, "--cfg-options", "load_from=absent.pth"), "checkpoint absent.pth does not exist"),
        (("train", config, "--cfg-options", "load_from=absent.pth"), "checkpoint absent.pth does not exist"),
        (("train", config, "--cfg-options", *backbone), "no.pth can not be found"),
        (("test", config, checkpoint, "--cfg-options", "model.branch.decoder=copy_head"), "of another config: the"),
        (("train", config, "--resume", "absent.pth"), "absent.pth does not exist"),
        (("test", config, "--arm", "onlin"), "'online'"),
        (("test", config, "--launcher", "torchrun"), "pytorch, slurm, mpi"),
        (("test", config, "--launcher", "pytorch"), "torchrun --nproc-per-node"),
        (("test", config, "--cfg-options", "window"), "KEY=VALUE"),
        (("test", config, "--cfg-options", "load_from=[1,2"), "Imbalanced"),
        (("test", config, "--cfg-options", "modle.branch.mask_ratio=0.5"), "nearest: 'model'"),
        (("test", config), "there are no weights to test"),
        (("test", config, other), "holds 0 of the"),
        (("test", config, "--cfg-options", "custom_hooks.7.arm=fixed"), "custom_hooks.7.arm=fixed"),
        (("test", config, checkpoint, "--cfg-options", "custom_hooks.0.windows=3"), "'window'"),
        (("test", config, checkpoint, "--cfg-options", "custom_hooks.0.type=TTTHook"), "TTTHook is not in"),
        (("test", config, checkpoint, "--cfg-options", "test_dataloader.batch_size=2"), "batch_size=1"),
        (("test", config, checkpoint, "--cfg-options", "test_dataloader.dataset.data_root=no"), "set data_root"),
        (("test", config, "--show-dir", "x"), "default_hooks.visualization"),
    ]:
        line = failed(capsys, *args)
        assert message in line, args
        assert ("set data_root" in line) == (message == "set data_root"), args


def test_mixed_precision_needs_a_gpu(config, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--amp needs a CUDA device" in failed(capsys, "train", config, "--amp")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = read_config(config, None, [])
    set_amp(cfg)
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"


@pytest.mark.parametrize(
    "text", ["x = (", "_base_ = ['absent.py']", "custom_imports = dict(imports=['absent_package'])", "x = y"]
)
def test_configs_that_cannot_be_read_are_told_in_a_line(tmp_path, capsys, text):
    (tmp_path / "bad.py").write_text(text)
    assert "bad.py" in failed(capsys, "test", tmp_path / "bad.py") or "absent.py" in text


def test_an_interrupted_run_exits_with_130(config, checkpoint, monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "test", interrupted)
    assert mm("test", config, checkpoint) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_check_names_problems_and_exits_with_1(tmp_path, capsys):
    assert mm("check", "camvid", tmp_path / "absent") == 1
    assert "no folder" in capsys.readouterr().out
    assert mm("check", "camvid", miniatures.camvid(tmp_path / "camvid")) == 0
    assert "no problem found" in capsys.readouterr().out
    assert "expected one of camvid" in failed(capsys, "check", "vid", tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_writes_the_scores(config, checkpoint, tmp_path, monkeypatch, rank):
    monkeypatch.setattr(launch, "is_main_process", lambda: rank == 0)
    assert mm("test", config, checkpoint, "--work-dir", tmp_path / "scores") == 0
    folder = run_dir(tmp_path / "scores")
    assert (folder / f"{folder.name}.json").exists() == (rank == 0)
