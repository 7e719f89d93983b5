"""Joint training in a plain loop and through `fit`: stages, accumulation, resuming, precision, two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import same_bits
from models import CLASSES, PlainSeg, TinySeg
from ttt_adapt import MAEBranch
from ttt_adapt.errors import CheckpointError, ConfigError, StateError
from ttt_adapt.training.joint import STAGES, Progress, TrainConfig, fit

SIZE = (32, 48)


class Blocks(torch.utils.data.Dataset):
    """Coloured rectangles on grey; the colour is the class."""

    def __init__(self, count: int = 8) -> None:
        generator = torch.Generator().manual_seed(3)
        self.samples, self.epochs = [], []
        for i in range(count):
            label = torch.zeros(SIZE, dtype=torch.long)
            top, left = torch.randint(0, 16, (2,), generator=generator).tolist()
            label[top : top + 14, left : left + 20] = 1 + i % (CLASSES - 1)
            image = torch.linspace(-1, 1, CLASSES)[label] * torch.tensor([1.0, -0.5, 0.3]).view(3, 1, 1)
            self.samples.append((image + 0.1 * torch.randn(3, *SIZE, generator=generator), label))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        return self.samples[index]

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def criterion(logits, labels):
    return F.cross_entropy(F.interpolate(logits, size=labels.shape[-2:]), labels)


def attached(kind=TinySeg, **settings):
    torch.manual_seed(5)
    model = kind()
    return model, MAEBranch.attach(model, "backbone", patch_size=8, **settings)


def everything(model, branch):
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"branch.{k}": v for k, v in branch.state_dict().items()}
    return {k: v.clone() for k, v in state.items()}


def config(**changes):
    return TrainConfig(**{"epochs": 2, "batch_size": 4, "lr": 3e-3, "warmup": 0.0, **changes})


def one_mask_for_all(branch):
    """The same mask for every image, so that batches can be split without changing a loss."""
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) > 0.5
    branch.draw_mask = lambda images, generator=None: mask.expand(len(images), 4, 6)


def test_one_extra_line_in_a_plain_loop_trains_both_losses():
    model, branch = attached()
    images, labels = (torch.stack(part) for part in zip(*Blocks().samples, strict=True))
    optimizer = torch.optim.AdamW([*model.parameters(), *branch.parameters()], lr=3e-3)
    history = []
    for _ in range(30):
        main, mae = criterion(model(images), labels), branch.loss(images)
        (main + mae).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append((main.item(), mae.item()))
    assert history[-1][0] < 0.8 * history[0][0]
    assert history[-1][1] < 0.8 * history[0][1]


def test_fit_decreases_both_losses_and_reports_every_update():
    model, branch = attached()
    seen: list[Progress] = []
    fit(model, branch, Blocks(), criterion, config(epochs=10), on_step=seen.append)
    assert [p.step for p in seen] == list(range(1, 21))
    assert {p.steps for p in seen} == {20}
    assert [p.epoch for p in seen] == sorted(i // 2 for i in range(20))
    first, last = seen[1].losses, seen[-1].losses
    assert last["main"] < 0.9 * first["main"]
    assert last["mae"] < 0.9 * first["mae"]


def test_fit_leaves_eval_mode_no_gradients_and_the_flags_of_every_parameter():
    model, branch = attached()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    for stage in STAGES:
        fit(model, branch, Blocks(4), criterion, config(stage=stage, epochs=1))
        assert not any(m.training for part in (model, branch) for m in part.modules()), stage
        assert all(p.grad is None for part in (model, branch) for p in part.parameters()), stage
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags, stage


@pytest.mark.parametrize(
    ("stage", "trained", "frozen"),
    [
        ("main", ("model.backbone", "model.head"), ("branch",)),
        ("joint", ("model.backbone", "model.head", "branch"), ()),
        ("mae", ("model.backbone", "branch"), ("model.head",)),
        ("probe", ("model.head",), ("model.backbone", "branch")),
        ("branch", ("branch",), ("model",)),
    ],
)
def test_each_stage_trains_its_parts_and_leaves_the_others_bitwise(stage, trained, frozen):
    model, branch = attached()
    before = everything(model, branch)
    fit(model, branch, Blocks(), criterion, config(stage=stage))
    after = everything(model, branch)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if name.startswith(frozen)] if frozen else True
    for part in trained:
        assert any(name.startswith(part) for name in changed), part


def test_masked_images_never_enter_the_statistics_of_batchnorm():
    """After one update, joint training has the very statistics of training on the clean images alone."""
    buffers = {}
    for stage in ("main", "joint"):
        model, branch = attached()
        fit(model, branch, Blocks(4), criterion, config(stage=stage, epochs=1))
        buffers[stage] = {k: v.clone() for k, v in model.named_buffers()}
    assert buffers["main"]["backbone.1.num_batches_tracked"] == 1
    assert same_bits(buffers["main"], buffers["joint"])


@pytest.mark.parametrize("stage", ["main", "joint"])
def test_two_batches_of_2_accumulated_equal_a_batch_of_4(stage):
    states = []
    for size, parts in ((4, 1), (2, 2)):
        model, branch = attached(PlainSeg, loss_on="all")
        one_mask_for_all(branch)
        model.double(), branch.double()
        data = [(image.double(), label) for image, label in Blocks().samples]
        fit(model, branch, data, criterion, config(stage=stage, batch_size=size, accumulate=parts))
        states.append(everything(model, branch))
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], atol=1e-9, rtol=1e-7, msg=name)


def test_a_last_update_of_fewer_batches_still_averages_over_those_it_has():
    """6 images in batches of 2, two to an update: the second update has one batch and its full gradient."""
    gradients = []
    model, branch = attached(PlainSeg)
    data = [Blocks(1).samples[0]] * 6  # every batch is the same
    step = torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        gradients.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]))
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", record)
        fit(model, branch, data, criterion, config(stage="main", epochs=1, batch_size=2, accumulate=2, lr=1e-9))
    assert len(gradients) == 2
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("stage", ["joint", "main"])
def test_a_run_resumed_after_an_interruption_equals_one_that_never_stopped(tmp_path, stage):
    whole = attached()
    data = Blocks()
    fit(*whole, data, criterion, config(stage=stage, epochs=4))
    assert data.epochs == [0, 1, 2, 3]

    def stop(progress):
        if progress.epoch == 2:
            raise KeyboardInterrupt

    broken, file = attached(), tmp_path / "run.state"
    with pytest.raises(KeyboardInterrupt):
        fit(*broken, Blocks(), criterion, config(stage=stage, epochs=4), state_file=file, on_step=stop)
    resumed = attached()
    steps = []
    fit(*resumed, Blocks(), criterion, config(stage=stage, epochs=4), state_file=file, on_step=steps.append)
    assert [p.step for p in steps] == [5, 6, 7, 8]
    assert same_bits(everything(*resumed), everything(*whole))


def test_interrupting_leaves_the_last_epoch_readable_and_the_model_in_order(tmp_path):
    model, branch = attached()
    file = tmp_path / "run.state"

    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, branch, Blocks(), criterion, config(stage="probe"), state_file=file, on_step=stop)
    assert torch.load(file, weights_only=True)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.state"]
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training


def test_a_finished_state_file_gives_the_trained_weights_without_a_step(tmp_path):
    done = attached()
    fit(*done, Blocks(), criterion, config(), state_file=tmp_path / "run.state")
    again = attached()
    fit(*again, Blocks(), criterion, config(), state_file=tmp_path / "run.state", on_step=pytest.fail)
    assert same_bits(everything(*done), everything(*again))


def refused(model, branch, file, match, **changes):
    before, text = everything(model, branch), file.read_bytes()
    with pytest.raises(CheckpointError, match=match):
        fit(model, branch, Blocks(4), criterion, config(**changes), state_file=file)
    assert same_bits(before, everything(model, branch))
    assert file.read_bytes() == text
    assert all(p.requires_grad for p in model.parameters())


def test_a_state_file_that_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    file = tmp_path / "run.state"
    fit(*attached(), Blocks(4), criterion, config(epochs=1), state_file=file)
    refused(*attached(), file, "'lr': 0.003", lr=1e-3)
    refused(*attached(PlainSeg), file, "backbone", epochs=1)
    refused(*attached(decoder="copy_head"), file, "decoder", epochs=1)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(*attached(), file, "remove it", epochs=1)
    torch.save({"weights": torch.zeros(2)}, file)
    refused(*attached(), file, "no training state", epochs=1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_and_keeps_fp32_weights(precision):
    model, branch = attached()
    before = everything(model, branch)
    seen = []
    fit(model, branch, Blocks(), criterion, config(epochs=8, precision=precision), on_step=seen.append)
    after = everything(model, branch)
    assert seen[-1].losses["main"] < seen[1].losses["main"]
    assert all(after[k].dtype == before[k].dtype for k in before)
    assert all(torch.isfinite(v).all() for v in after.values())


def test_loader_workers_change_nothing():
    states = []
    for workers in (0, 1):
        model, branch = attached()
        fit(model, branch, Blocks(), criterion, config(epochs=1, workers=workers))
        states.append(everything(model, branch))
    assert same_bits(states[0], states[1])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"stage": "both"}, "'both'"),
        ({"precision": "fp8"}, "'fp8'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"lr": 0.0}, "lr is 0.0; expected a number above 0"),
        ({"warmup": 1.0}, "warmup is 1.0"),
    ],
)
def test_bad_settings_are_named(settings, match):
    with pytest.raises(ConfigError, match=match):
        TrainConfig(**settings)


def test_a_missing_or_foreign_branch_is_refused():
    model, branch = attached()
    with pytest.raises(ConfigError, match="needs a branch"):
        fit(model, None, Blocks(), criterion, config(stage="joint"))
    with pytest.raises(StateError, match="another model"):
        fit(TinySeg(), branch, Blocks(), criterion, config())
    fit(model, None, Blocks(4), criterion, config(stage="main", epochs=1))


TWO_PROCESSES = """
import sys
import torch
from test_joint import Blocks, attached, config, criterion, everything, fit, one_mask_for_all
from models import PlainSeg
import os

torch.set_num_threads(1)
model, branch = attached(PlainSeg, loss_on="all")
one_mask_for_all(branch)
model.double(), branch.double()
data = [(image.double(), label) for image, label in Blocks(4).samples]
fit(model, branch, data, criterion, config(epochs=3, batch_size=int(sys.argv[2]), accumulate=int(sys.argv[3])),
    state_file=sys.argv[1] + "/run.state")
torch.save(everything(model, branch), sys.argv[1] + "/weights" + os.environ["RANK"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "accumulate"), [(2, 1), (1, 2)])
def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path, batch, accumulate):
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    folders = [*Path(__file__).parents][:3]  # of this module, of the shared helpers, of the library
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(tmp_path), str(batch), str(accumulate)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"weights{rank}") for rank in (0, 1))
    assert same_bits(first, second)
    model, branch = attached(PlainSeg, loss_on="all")
    one_mask_for_all(branch)
    model.double(), branch.double()
    data = [(image.double(), label) for image, label in Blocks(4).samples]
    fit(model, branch, data, criterion, config(epochs=3, batch_size=4))
    alone = everything(model, branch)
    for name in alone:
        torch.testing.assert_close(first[name], alone[name], atol=1e-9, rtol=1e-7, msg=name)
    assert torch.load(tmp_path / "run.state", weights_only=True)["epoch"] == 3


class StoppedError(Exception):
    """Raised in the middle of a training."""


def stop_at(step: int):
    def on_step(progress: Progress) -> None:
        if progress.step == step:
            raise StoppedError

    return on_step


def interrupted(file: Path):
    """A training of 3 epochs that stops in the second one; its state is of the end of the first."""
    model, branch = attached()
    with pytest.raises(StoppedError):
        fit(model, branch, Blocks(), criterion, config(epochs=3), state_file=file, on_step=stop_at(3))


def test_a_state_from_before_formats_had_numbers_goes_on_to_the_same_bits(tmp_path):
    file = tmp_path / "run.state"
    interrupted(file)
    state = torch.load(file, weights_only=True)
    assert state["format"] == 1
    old = {
        name: state[name]
        for name in ("config", "origin", "epoch", "model", "branch", "optimizer", "schedule", "scaler")
    }
    torch.save(old, file)
    model, branch = attached()
    fit(model, branch, Blocks(), criterion, config(epochs=3), state_file=file)
    whole, its_branch = attached()
    fit(whole, its_branch, Blocks(), criterion, config(epochs=3))
    assert same_bits(everything(model, branch), everything(whole, its_branch))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 2, "of": "tomorrow"}, r"run\.state has format 2, .* up to 1: update ttt_adapt"),
        ({"format": "new"}, "no training state"),
        ({"of": "another program"}, "no training state"),
    ],
)
def test_a_state_of_a_newer_or_unknown_format_is_refused_and_changes_nothing(tmp_path, change, match):
    file = tmp_path / "run.state"
    interrupted(file)
    torch.save(torch.load(file, weights_only=True) | change, file)
    model, branch = attached()
    before = everything(model, branch)
    with pytest.raises(CheckpointError, match=match):
        fit(model, branch, Blocks(), criterion, config(epochs=3), state_file=file)
    assert same_bits(everything(model, branch), before)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["schedule"].update(lr_lambdas=[0] * len(state["schedule"]["lr_lambdas"])),
        lambda state: state["schedule"].update(lr_lambdas=[torch.zeros(2)] * len(state["schedule"]["lr_lambdas"])),
        lambda state: state["optimizer"]["param_groups"][0].update(params=torch.arange(3)),
        lambda state: state["model"].update({next(iter(state["model"])): torch.zeros(1).to_sparse()}),
    ],
    ids=["a number as a schedule", "a tensor as a schedule", "a tensor as a list", "a sparse weight"],
)
def test_a_damaged_state_is_refused_and_changes_nothing(tmp_path, damage):
    file = tmp_path / "run.state"
    interrupted(file)
    state = torch.load(file, weights_only=True)
    damage(state)
    torch.save(state, file)
    model, branch = attached()
    before, content = everything(model, branch), file.read_bytes()
    with pytest.raises(CheckpointError):
        fit(model, branch, Blocks(), criterion, config(epochs=3), state_file=file)
    assert same_bits(everything(model, branch), before)
    assert file.read_bytes() == content


def test_a_state_of_other_data_is_refused_and_changes_nothing(tmp_path):
    file = tmp_path / "run.state"
    model, branch = attached()
    fit(model, branch, Blocks(), criterion, config(), state_file=file, origin="data=day")
    model, branch = attached()
    before = everything(model, branch)
    with pytest.raises(CheckpointError, match="data=day, this one has data=night"):
        fit(model, branch, Blocks(), criterion, config(), state_file=file, origin="data=night")
    after = everything(model, branch)
    assert all(torch.equal(before[name], after[name]) for name in before)
