"""JointMAE: the wrapped model's losses, predictions, checkpoints and training are its own; `loss_mae` comes on top."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModel, convert_sync_batchnorm
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner, autocast, load_checkpoint, save_checkpoint
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from mmengine.runner.checkpoint import get_state_dict
from torch import nn

import tiny
from conftest import photograph, same_bits
from small_configs import joint_config
from ttt_adapt import MAEBranch, TTTAdaptError
from ttt_adapt.errors import ConfigError
from ttt_adapt_openmmlab import JointMAE, find_branch, plain_model
from zoo import zoo_checkpoint

FAMILIES = {
    "fcn": tiny.fcn,
    "mask2former_semantic": tiny.mask2former_semantic,
    "mask2former_instance": tiny.mask2former,
    "mask2former_panoptic": lambda: tiny.mask2former(2, 2),
}


def joint(config: dict, **branch) -> JointMAE:
    model = tiny.build(config)
    torch.manual_seed(1)
    return JointMAE(model, {"decoder": "copy_head", **branch})


def losses_of(model: nn.Module, config: dict, seed: int = 5) -> dict:
    data = plain_model(model).data_preprocessor(tiny.batch(config), True)
    torch.manual_seed(seed)
    return model(**data, mode="loss")


# ---- the model's own behaviour


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_without_loss_mae_are_those_of_the_plain_model(family):
    config = FAMILIES[family]()
    plain = tiny.build(config).train()
    wrapped = joint(config).train()
    expected, got = losses_of(plain, config), losses_of(wrapped, config)
    mae = got.pop("loss_mae")
    assert mae.ndim == 0
    assert 0.1 < mae.item() < 100
    assert same_bits(expected, got)
    assert same_bits(dict(plain.named_buffers()), dict(wrapped.model.named_buffers()))  # BatchNorm moved as far


def test_activation_checkpointing_by_mmengine_changes_no_gradient_and_lets_no_masked_image_into_batchnorm():
    model = joint(tiny.fcn()).train()
    images = model.data_preprocessor(tiny.batch(tiny.fcn()), True)["inputs"]
    encoder = list(model.branch.encoder_parameters().values())

    def gradients() -> tuple:
        torch.manual_seed(2)  # of the masks, and of the dropout in the copied head
        return torch.autograd.grad(model.branch.loss(images), encoder)

    expected, before = gradients(), {name: buffer.clone() for name, buffer in model.model.named_buffers()}
    turn_on_activation_checkpointing(model, ["backbone.layer1", "backbone.layer3.0"])
    assert same_bits(gradients(), expected)
    assert same_bits(dict(model.model.named_buffers()), before)


def test_the_total_loss_is_the_main_loss_plus_the_reconstruction_1_to_1():
    config = tiny.fcn()
    losses = losses_of(joint(config), config)
    total, log = joint(config).parse_losses(losses)
    assert torch.allclose(total, sum(value for key, value in losses.items() if "loss" in key))
    assert "loss_mae" in log
    assert "decode.acc_seg" in log


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_those_of_the_plain_model(family):
    config = FAMILIES[family]()
    plain, wrapped = tiny.build(config).eval(), joint(config).eval()
    for step in ("test_step", "val_step"):
        with torch.no_grad():
            expected = getattr(plain, step)(tiny.batch(config))
            got = getattr(wrapped, step)(tiny.batch(config))
        assert len(expected) == 2
        for a, b in zip(expected, got, strict=True):
            assert tiny.tensors(a)
            assert same_bits(tiny.tensors(a), tiny.tensors(b))
    images = torch.randn(1, 3, *tiny.SIZE)
    if family == "fcn":  # mask heads of mmseg have no mode "tensor"
        assert same_bits(plain(images), wrapped(images))


def test_wrapping_leaves_a_model_that_is_built_as_it_was():
    model = tiny.build(tiny.fcn()).train()
    before = photograph(model)
    JointMAE(model, {"decoder": "copy_head"})
    assert photograph(model) == before


def test_building_the_branch_draws_no_random_numbers():
    config = tiny.fcn()
    model = tiny.build(config)
    state = torch.get_rng_state()
    JointMAE(model, {"decoder": "copy_head"})
    assert torch.equal(torch.get_rng_state(), state)


def test_what_only_the_model_has_is_reached_through_the_wrapper():
    wrapped = joint(tiny.fcn())
    assert wrapped.data_preprocessor is wrapped.model.data_preprocessor
    assert wrapped.decode_head is wrapped.model.decode_head
    assert wrapped.num_classes == tiny.CLASSES
    assert not hasattr(wrapped, "no_such_thing")
    assert isinstance(wrapped, BaseModel)


def test_plain_model_and_branch_are_found_behind_wrappers():
    wrapped = joint(tiny.fcn())
    assert plain_model(wrapped) is wrapped.model
    assert find_branch(wrapped) is wrapped.branch
    assert isinstance(wrapped.branch, MAEBranch)
    assert wrapped.branch.model is wrapped.model
    assert plain_model(wrapped.model) is wrapped.model
    assert find_branch(wrapped.model) is None


def test_a_deep_copy_shares_nothing_and_still_trains():
    config = tiny.fcn()
    wrapped = joint(config)
    twin = copy.deepcopy(wrapped)
    assert twin.branch.model is twin.model
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in wrapped.parameters()}
    assert same_bits(losses_of(twin, config), losses_of(wrapped, config))


# ---- configs


@pytest.mark.parametrize("delete", ["", "_delete_=True, "])
def test_a_config_wraps_the_model_of_its_base(tmp_path, delete):
    cfg = joint_config(tmp_path, tiny.fcn(), delete)
    tiny.enter("mmseg")
    model = MODELS.build(cfg.model)
    assert type(model) is JointMAE
    assert type(model.model).__name__ == "EncoderDecoder"
    assert model.branch.mask_ratio == 0.8
    assert model.data_preprocessor.size == tiny.SIZE


def test_what_stands_inside_of_model_wins_over_what_the_config_inherits(tmp_path):
    cfg = joint_config(tmp_path, tiny.fcn())
    cfg.model.model.decode_head.num_classes = 7
    cfg.model.model.auxiliary_head.num_classes = 7
    tiny.enter("mmseg")
    assert MODELS.build(cfg.model).model.num_classes == 7


def test_a_data_preprocessor_beside_a_model_without_one_becomes_the_model_s():
    config = tiny.fcn()
    outer = config.pop("data_preprocessor")
    tiny.enter("mmseg")
    model = MODELS.build({"type": "JointMAE", "model": config, "data_preprocessor": outer})
    assert type(model.model.data_preprocessor).__name__ == "SegDataPreProcessor"


def test_a_data_preprocessor_that_the_model_s_own_overrides_is_told(monkeypatch):
    logged = []
    monkeypatch.setattr("ttt_adapt_openmmlab.joint.print_log", lambda message, **_: logged.append(message))
    config = tiny.fcn()
    outer = {**config["data_preprocessor"], "bgr_to_rgb": False}
    tiny.enter("mmseg")
    JointMAE(config, {"decoder": "conv"}, data_preprocessor=config["data_preprocessor"])
    assert not logged
    model = JointMAE(config, {"decoder": "conv"}, data_preprocessor=outer)
    assert model.data_preprocessor.channel_conversion
    assert "True for model.data_preprocessor.bgr_to_rgb, not False" in logged[0]
    with pytest.raises(ConfigError, match="'data_preprocessor' and a model that is built already"):
        JointMAE(model.model, {}, data_preprocessor=outer)


def test_the_name_resolves_in_the_scopes_of_mmseg_and_mmdet():
    import mmdet.registry
    import mmseg.registry

    assert MODELS.get("JointMAE") is JointMAE
    assert mmseg.registry.MODELS.get("JointMAE") is JointMAE
    assert mmdet.registry.MODELS.get("JointMAE") is JointMAE


class NoBackbone(BaseModel):
    def __init__(self, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.body = nn.Conv2d(3, 4, 3)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return self.body(inputs)


def without(config: dict, key: str) -> dict:
    return {name: value for name, value in config.items() if name != key}


@pytest.mark.parametrize(
    ("model", "branch", "message"),
    [
        (lambda: NoBackbone(), {}, "NoBackbone has no backbone"),
        (lambda: without(tiny.fcn(), "backbone"), {}, "EncoderDecoder has no backbone"),
        (lambda: without(tiny.fcn(), "data_preprocessor"), {}, "no data_preprocessor.*SegDataPreProcessor"),
        (lambda: "mask2former", {}, "expected a module, or a config"),
        (tiny.fcn, {"mask_rato": 0.8}, "'mask_rato'; nearest: 'mask_ratio'"),
        (tiny.fcn, {"mask_ratio": 1.5}, "mask_ratio is 1.5"),
        (tiny.fcn, {"encoder": "back"}, "no module 'back'"),
        (tiny.fcn, {"decoder": "copyhead"}, "decoder is 'copyhead'"),
    ],
)
def test_bad_configs_are_refused_with_what_to_do(model, branch, message):
    tiny.enter("mmseg")
    with pytest.raises(TTTAdaptError, match=message):
        JointMAE(model(), branch)


def test_settings_of_the_branch_beside_it_are_refused():
    with pytest.raises(ConfigError, match="'mask_ratio', which belong to the branch"):
        JointMAE(tiny.fcn(), {}, mask_ratio=0.8)


def test_a_refused_model_is_left_as_it_was():
    model = tiny.build(tiny.fcn())
    before = photograph(model)
    for branch in ({"encoder": "nowhere"}, {"mask_ratio": 2.0}, {"patch_size": 0}):
        with pytest.raises(TTTAdaptError):
            JointMAE(model, branch)
    assert photograph(model) == before


# ---- weights


def test_state_dict_keys_are_the_plain_ones_and_the_branch_s_beside_them():
    config = tiny.fcn()
    plain, wrapped = tiny.build(config), joint(config)
    branch = [f"mae_branch.{key}" for key in wrapped.branch.state_dict()]
    for state in (wrapped.state_dict(), get_state_dict(wrapped)):
        assert list(state) == [*plain.state_dict(), *branch]
        assert set(plain.state_dict()._metadata) <= set(state._metadata)
        assert state._metadata["backbone.bn1"] == {"version": 2}
    names = [name for name, _ in wrapped.named_parameters()]
    expected = [f"mae_branch.{name}" for name, _ in wrapped.branch.named_parameters()]
    assert names == [name for name, _ in plain.named_parameters()] + expected


def test_state_dict_keys_hold_inside_of_another_module():
    wrapped = joint(tiny.fcn())
    outer = nn.ModuleDict({"module": wrapped})
    state = outer.state_dict()
    assert list(state) == [f"module.{key}" for key in wrapped.state_dict()]
    other = nn.ModuleDict({"module": JointMAE(tiny.build(tiny.fcn()), {"decoder": "copy_head"})})
    with torch.no_grad():
        other["module"].model.backbone.conv1.weight.zero_()
    other.load_state_dict(state)
    assert same_bits(dict(other.state_dict()), dict(state))


@pytest.mark.parametrize("family", ["fcn", "mask2former_instance"])
def test_a_plain_checkpoint_loads_and_saves_back_under_its_keys(tmp_path, family):
    config = FAMILIES[family]()
    trained = tiny.changed(tiny.build(config))
    save_checkpoint({"state_dict": trained.state_dict(), "meta": {}}, str(tmp_path / "plain.pth"))
    wrapped = joint(config)
    load_checkpoint(wrapped, str(tmp_path / "plain.pth"), strict=True)
    assert same_bits(dict(trained.state_dict()), dict(wrapped.model.state_dict()))

    save_checkpoint({"state_dict": get_state_dict(wrapped), "meta": {}}, str(tmp_path / "joint.pth"))
    plain = tiny.build(config)
    unexpected = plain.load_state_dict(torch.load(tmp_path / "joint.pth")["state_dict"], strict=False)
    assert not unexpected.missing_keys
    assert all(key.startswith("mae_branch.") for key in unexpected.unexpected_keys)
    assert same_bits(dict(trained.state_dict()), dict(plain.state_dict()))


def copied_part(wrapped: JointMAE, state: dict) -> dict[str, tuple]:
    """Name in the branch -> (tensor of the copy, tensor of the plain model with that name)."""
    own = wrapped.branch.decoder.state_dict()
    of_whole_model = type(wrapped.branch.decoder).__name__ == "HeadCopy"
    name = "" if of_whole_model else f"{wrapped.branch.decoder.name}."
    plain = {key: name + key.removeprefix("head.") for key in own}
    return {key: (own[key], state[plain[key]]) for key in own if plain[key] in state}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_checkpoint_sets_the_copy_of_the_head_to_the_loaded_head(family):
    config = FAMILIES[family]()
    wrapped = joint(config)
    fresh = {k: v.clone() for k, v in wrapped.branch.state_dict().items()}
    parameters = [id(p) for p in wrapped.parameters()]
    trained = tiny.changed(tiny.build(config))
    wrapped.load_state_dict(trained.state_dict())
    pairs = copied_part(wrapped, trained.state_dict())
    assert len(pairs) > 5
    differing = {key for key, (a, b) in pairs.items() if a.shape != b.shape or not torch.equal(a, b)}
    last = {"head.query_feat.weight", "head.query_embed.weight"}
    if family == "fcn":
        last = {"head.decode_head.conv_seg.weight", "head.decode_head.conv_seg.bias"}
    assert differing == last
    for key in last:  # the new last layer stays what it was
        assert torch.equal(fresh[f"decoder.{key}"], wrapped.branch.state_dict()[f"decoder.{key}"])
    assert [id(p) for p in wrapped.parameters()] == parameters


def test_a_joint_checkpoint_restores_the_branch_itself():
    config = tiny.fcn()
    trained = tiny.changed(joint(config))
    wrapped = JointMAE(tiny.build(config), {"decoder": "copy_head"})
    result = wrapped.load_state_dict(trained.state_dict())
    assert not result.missing_keys
    assert same_bits(dict(trained.state_dict()), dict(wrapped.state_dict()))


def test_keys_that_do_not_fit_are_told_under_the_names_of_the_plain_model():
    wrapped = joint(tiny.fcn())
    state = dict(wrapped.state_dict())
    del state["backbone.conv1.weight"]
    del state["mae_branch.mask_channel.weight"]
    state["nowhere.weight"] = torch.zeros(1)
    result = wrapped.load_state_dict(state, strict=False)
    assert result.missing_keys == ["backbone.conv1.weight", "mae_branch.mask_channel.weight"]
    assert result.unexpected_keys == ["nowhere.weight"]
    with pytest.raises(RuntimeError, match="nowhere"):
        wrapped.load_state_dict(state)


def test_initialising_gives_the_model_the_weights_that_it_gets_alone_and_the_copy_its_head():
    config = tiny.mask2former_semantic()
    plain, wrapped = tiny.build(config), joint(config)
    torch.manual_seed(3)
    plain.init_weights()
    torch.manual_seed(3)
    wrapped.init_weights()
    assert same_bits(dict(plain.state_dict()), dict(wrapped.model.state_dict()))
    for key, (a, b) in copied_part(wrapped, plain.state_dict()).items():
        assert "query" in key or torch.equal(a, b), key


# ---- training


def test_rules_by_parameter_name_written_for_the_plain_model_go_on_working():
    config = tiny.mask2former_semantic()
    optim = {
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.5},
        "paramwise_cfg": {
            "custom_keys": {"backbone": {"lr_mult": 0.1}, "query_feat": {"decay_mult": 0.0}},
            "norm_decay_mult": 0.0,
        },
    }
    rules = {}
    for name, model in (("plain", tiny.build(config)), ("joint", joint(config))):
        groups = build_optim_wrapper(model, copy.deepcopy(optim)).optimizer.param_groups
        by_id = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        rules[name] = {key: by_id[id(p)] for key, p in model.named_parameters()}
    assert rules["plain"].items() <= rules["joint"].items()
    branch = {key: rule for key, rule in rules["joint"].items() if key not in rules["plain"]}
    assert all(key.startswith("mae_branch.") for key in branch)
    assert {lr for lr, _ in branch.values()} == {1.0}
    assert branch["mae_branch.decoder.head.query_feat.weight"] == (1.0, 0.0)


def test_layer_wise_learning_rates_see_the_names_of_the_plain_model():
    """Constructors with layer decay ask where a name begins."""
    names = [name for name, _ in joint(tiny.fcn()).named_parameters()]
    assert names[0].startswith("backbone.")
    assert not any(name.startswith("model.") for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_that_asks_for_a_gradient_gets_one(family):
    config = FAMILIES[family]()
    wrapped = joint(config).train()
    total, _ = wrapped.parse_losses(losses_of(wrapped, config))
    total.backward()
    assert not [name for name, p in wrapped.named_parameters() if p.requires_grad and p.grad is None]


def test_gradient_accumulation_sums_over_iterations():
    config = tiny.fcn()
    wrapped = joint(config).train()
    before = {k: v.clone() for k, v in wrapped.named_parameters()}
    optimizer = OptimWrapper(torch.optim.SGD(wrapped.parameters(), lr=0.1), accumulative_counts=2)
    optimizer.initialize_count_status(wrapped, 0, 4)
    log = wrapped.train_step(tiny.batch(config), optimizer)
    assert {"loss", "loss_mae", "decode.loss_ce"} <= set(log)
    assert same_bits(before, dict(wrapped.named_parameters()))
    wrapped.train_step(tiny.batch(config), optimizer)
    assert not same_bits(before, dict(wrapped.named_parameters()))


@pytest.mark.parametrize("family", ["fcn", "mask2former_semantic"])
def test_mixed_precision_trains_with_finite_losses_near_those_in_full(family):
    config = FAMILIES[family]()
    wrapped = joint(config).train()
    full = losses_of(wrapped, config)
    with autocast(device_type="cpu", dtype=torch.bfloat16):
        losses = losses_of(wrapped, config)
    total, _ = wrapped.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total)
    assert losses["loss_mae"].dtype is torch.float32
    assert losses["loss_mae"].item() == pytest.approx(full["loss_mae"].item(), rel=0.05)
    assert all(torch.isfinite(p.grad).all() for p in wrapped.parameters() if p.grad is not None)


@pytest.mark.parametrize("written", ["SyncBN", "BN"])
def test_batch_norm_syncing_keeps_masked_images_out_of_the_statistics(written):
    """MMEngine puts other norm layers into the model after it was wrapped, one way or the other."""
    config = tiny.fcn(norm=written)
    model = joint(config).train()
    if written == "SyncBN":
        model = revert_sync_batchnorm(model)  # as the Runner does in a single process
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    else:
        model = convert_sync_batchnorm(model, "torch")
        assert any(isinstance(m, nn.SyncBatchNorm) for m in model.model.backbone.modules())
    before = {k: v.clone() for k, v in model.model.named_buffers()}
    model.branch.loss(torch.randn(2, 3, *tiny.SIZE)).backward()
    assert same_bits(before, dict(model.model.named_buffers()))
    assert all(p.requires_grad for p in model.model.parameters())


# ---- MMEngine's Runner


class Stills(torch.utils.data.Dataset):
    def __init__(self, config: dict) -> None:
        self.metainfo = {"classes": tuple("abcd"), "palette": [[0, 0, 0]] * 4}
        data = tiny.batch(config, 4)
        self.items = [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return copy.deepcopy(self.items[index])


def runner(tmp_path: Path, config: dict, iterations: int = 2, **settings) -> Runner:
    tiny.enter("mmseg")
    loader = {
        "dataset": Stills(config),
        "batch_size": 2,
        "num_workers": 0,
        "sampler": {"type": "DefaultSampler", "shuffle": True},
        "collate_fn": {"type": "pseudo_collate"},
    }
    return Runner(
        model={"type": "JointMAE", "model": config, "branch": {"decoder": "copy_head"}},
        work_dir=str(tmp_path),
        train_dataloader=loader,
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": iterations},
        optim_wrapper={"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 1e-3, "momentum": 0.9}},
        default_scope="mmseg",
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1, "by_epoch": False}},
        randomness={"seed": 0},
        experiment_name=f"{tmp_path.name}{iterations}{len(settings)}",
        log_level="ERROR",
        **settings,
    )


def test_the_runner_trains_saves_and_resumes(tmp_path):
    config = tiny.fcn(norm="SyncBN")
    trained = runner(tmp_path, config).train()
    saved = torch.load(tmp_path / "iter_2.pth")
    assert same_bits(dict(saved["state_dict"]), dict(trained.state_dict()))
    assert "train/loss_mae" in saved["message_hub"]["log_scalars"]

    resumed = runner(tmp_path, config, 3, load_from=str(tmp_path / "iter_2.pth"), resume=True)
    resumed.load_or_resume()
    assert resumed.iter == 2
    assert same_bits(dict(saved["state_dict"]), dict(resumed.model.state_dict()))
    resumed.train()
    assert resumed.iter == 3


def test_the_runner_loads_a_zoo_checkpoint_and_the_copy_is_its_head(tmp_path):
    config = tiny.fcn()
    trained = tiny.changed(tiny.build(config))
    torch.save(zoo_checkpoint(trained.state_dict()), tmp_path / "zoo.pth")
    run = runner(tmp_path, config, load_from=str(tmp_path / "zoo.pth"))
    run._init_model_weights()
    run.load_or_resume()
    assert same_bits(dict(trained.state_dict()), dict(run.model.model.state_dict()))
    differing = {k for k, (a, b) in copied_part(run.model, trained.state_dict()).items() if not torch.equal(a, b)}
    assert differing == {"head.decode_head.conv_seg.weight", "head.decode_head.conv_seg.bias"}


# ---- two processes


WORKER = """
import gc, sys
sys.path[:0] = [{tests!r}, {openmmlab!r}]
import tiny, torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from ttt_adapt_openmmlab import JointMAE, find_branch, plain_model

def train(rank):
    config = tiny.{family}()
    model = JointMAE(tiny.build(config), dict(decoder="copy_head")).train()
    wrapped = MMDistributedDataParallel(module=model, broadcast_buffers=False, find_unused_parameters=False)
    assert plain_model(wrapped) is model.model and find_branch(wrapped) is model.branch
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-2), accumulative_counts=2)
    optimizer.initialize_count_status(wrapped, 0, 4)
    torch.manual_seed(rank)
    for _ in range(4):
        data = tiny.batch(config, 2)
        log = wrapped.train_step(data, optimizer)
        assert "loss_mae" in log
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    others = [torch.zeros_like(flat) for _ in range(2)]
    dist.all_gather(others, flat)
    assert torch.equal(others[0], others[1])
    assert not torch.isnan(flat).any()
    print("same %d\\n" % rank, end="", flush=True)  # one write: two processes share the pipe

torch.set_num_threads(1)
dist.init_process_group("gloo")
train(dist.get_rank())
dist.destroy_process_group()
gc.collect()  # the wrapped model would keep the group, and threads of gloo that still run when Python ends abort it
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["fcn", "mask2former"])
def test_two_processes_train_in_step_without_searching_for_unused_parameters(tmp_path, family):
    here = Path(__file__).parent
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(here.parent), openmmlab=str(here), family=family))
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"same 0", "same 1"} <= set(done.stdout.splitlines())
