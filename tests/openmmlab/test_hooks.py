"""OnlineTTTHook in MMEngine's own test loop, on generated videos."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, save_checkpoint
from PIL import Image

import tiny
import ttt_adapt_openmmlab  # noqa: F401
import videos as v
from conftest import left_as_it_was, mix_flags, same_bits, settle_norms
from ttt_adapt import StreamAdapter, StreamConfig
from ttt_adapt.errors import CheckpointError, ConfigError, DataError, EncoderError, FrameError
from ttt_adapt_openmmlab import OnlineTTTHook, find_branch, plain_model
from ttt_adapt_openmmlab.arms import HOOK_ARMS, contradiction
from ttt_adapt_openmmlab.batches import images
from ttt_adapt_openmmlab.datasets import loaders

LENGTHS = {"a": 4, "b": 3}


class Watcher(Hook):
    """Keeps what the loop saw; runs after the hook under test."""

    priority = "VERY_LOW"

    def __init__(self, fail_at: int | None = None, error: type[BaseException] = RuntimeError) -> None:
        self.batches, self.outputs, self.weights = [], [], []
        self.fail_at, self.error = fail_at, error

    def before_test_iter(self, runner, batch_idx, data_batch=None):
        self.batches.append(copy.deepcopy(data_batch))
        self.weights.append([p.detach().clone() for p in plain_model(runner.model).parameters()])
        if batch_idx == self.fail_at:
            raise self.error("on purpose")

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.outputs += [sample.seg_logits.data.clone() for sample in outputs]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return v.write_videos(tmp_path_factory.mktemp("data"), LENGTHS)


@pytest.fixture
def make(root, tmp_path, monkeypatch):
    """A runner with the hook under test (None: without) and a Watcher."""
    tiny.without_slow_logs(monkeypatch)

    def runner(hook=None, watcher=None, **changes):
        hooks = [] if hook is None else [hook]
        made = Runner.from_cfg(Config(v.seg_config(root, tmp_path / "work", custom_hooks=hooks, **changes)))
        made.register_hook(watcher or Watcher())
        settle_norms(plain_model(made.model))
        return made

    return runner


def watcher_of(runner) -> Watcher:
    return next(hook for hook in runner.hooks if isinstance(hook, Watcher))


def outputs_of(runner) -> list[torch.Tensor]:
    runner.test()
    return watcher_of(runner).outputs


def log_of(runner) -> str:
    return Path(runner.log_dir, f"{runner.timestamp}.log").read_text()


def test_at_lr_0_predictions_are_those_without_the_hook_bitwise(make):
    plain = outputs_of(make())
    for arm in ("online", "paper", "offline"):
        assert same_bits(outputs_of(make(v.hook(lr=0.0, arm=arm))), plain), arm


def test_the_runner_gets_the_batches_untouched(make):
    plain, hooked = make(), make(v.hook())
    plain.test()
    hooked.test()
    for one, other in zip(watcher_of(plain).batches, watcher_of(hooked).batches, strict=True):
        assert same_bits(one["inputs"], other["inputs"])
        assert one["data_samples"][0].metainfo == other["data_samples"][0].metainfo
        assert torch.equal(one["data_samples"][0].gt_sem_seg.data, other["data_samples"][0].gt_sem_seg.data)


def test_predictions_are_those_of_a_stream_adapter_that_is_reset_at_each_video(make):
    runner = make(v.hook(crop_size=(32, 32)))
    model = plain_model(runner.model)
    found = outputs_of(runner)
    config = StreamConfig.online(window=2, batch_size=2, lr=0.01, crop_size=(32, 32))
    expected = []
    with StreamAdapter(model, find_branch(runner.model), config=config) as adapter, torch.no_grad():
        for i, batch in enumerate(watcher_of(runner).batches):
            if i in (0, LENGTHS["a"]):
                adapter.reset()
            adapter.adapt(images(model.data_preprocessor, batch))
            expected += [sample.seg_logits.data for sample in model.test_step(batch)]
    assert same_bits(found, expected)
    assert not same_bits(found, outputs_of(make()))


@pytest.mark.parametrize("arm", ["online", "paper", "no-memory", "explicit", "implicit", "offline"])
def test_the_model_is_left_as_it_was(make, arm):
    runner = make(v.hook(arm=arm, norm_stats="ema"))
    mix_flags(runner.model)
    with left_as_it_was(runner.model):
        runner.test()
    weights = watcher_of(runner).weights
    assert not same_bits(weights[1], list(plain_model(runner.model).parameters()))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_or_is_interrupted_gives_the_model_back(make, error):
    runner = make(v.hook(), Watcher(fail_at=2, error=error))
    mix_flags(runner.model)
    with left_as_it_was(runner.model), pytest.raises(error, match="on purpose"):
        runner.test()
    watcher_of(runner).fail_at = None
    runner.test()  # and it can run again


def test_metrics_that_fail_give_the_model_back(make, monkeypatch):
    def evaluate(self, size):
        raise RuntimeError("no metrics today")

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    runner = make(v.hook())
    mix_flags(runner.model)
    with left_as_it_was(runner.model), pytest.raises(RuntimeError, match="no metrics today"):
        runner.test()


def test_two_runs_of_one_runner_are_the_same(make):
    runner = make(v.hook())
    first = outputs_of(runner)
    watcher_of(runner).outputs = []
    assert same_bits(outputs_of(runner), first)


def test_weights_that_another_hook_swaps_in_are_the_source(make):
    """MMEngine's EMAHook changes the weights after before_test and takes them back in after_test_epoch."""

    class Swap(Hook):
        def _swap(self, runner):
            for parameter in plain_model(runner.model).parameters():
                parameter.data.mul_(-1)

        def before_test_epoch(self, runner):
            self._swap(runner)

        def after_test_epoch(self, runner, metrics=None):
            self._swap(runner)

    def run(hook=None):
        runner = make(hook)
        runner.register_hook(Swap())
        with left_as_it_was(runner.model, "training"):
            runner.test()
        return watcher_of(runner).outputs

    assert same_bits(run(v.hook(lr=0.0)), run())
    assert not same_bits(run(v.hook()), run())


# ---- arms


@pytest.mark.parametrize(
    ("arm", "preset"),
    [
        ("online", StreamConfig.online),
        ("no-memory", StreamConfig.no_memory),
        ("implicit", StreamConfig.implicit_only),
        ("explicit", StreamConfig.explicit_only),
        ("paper", StreamConfig.paper),
    ],
)
def test_an_arm_is_the_preset_and_explicit_arguments_win(arm, preset):
    assert OnlineTTTHook(arm=arm).config == preset()
    changes = {"batch_size": 3, "lr": 0.5, "crop_size": [4, 5]}
    assert OnlineTTTHook(arm=arm, **changes).config == preset(**changes)


@pytest.mark.parametrize(
    ("given", "arm"),
    [
        ("no_memory", "no-memory"),
        ("implicit_only", "implicit"),
        ("implicit-only", "implicit"),
        ("explicit_only", "explicit"),
        ("explicit-only", "explicit"),
    ],
)
def test_underscores_and_long_names_of_arms_are_accepted(given, arm):
    assert OnlineTTTHook(arm=given).arm == arm
    assert OnlineTTTHook(arm=given).config == OnlineTTTHook(arm=arm).config


def test_the_call_of_the_readme_is_understood():
    config = OnlineTTTHook(window=16, batch_size=32, crop_size=(512, 1024)).config
    assert (config.window, config.batch_size, config.crop_size) == (16, 32, (512, 1024))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arm": "onlin"}, "'onlin'; expected one of .*'online'"),
        ({"arm": "tent"}, "'tent'; expected one of .*'online'"),
        ({"arm": "online+vote"}, "expected one of .*'online'"),
        ({"windows": 4}, "nearest: 'window'"),
        ({"batchsize": 4}, "'batch_size'"),
        ({"window": 0}, "window is 0"),
        ({"log_interval": 0}, "log_interval"),
        ({"offline_steps": True}, "offline_steps"),
        ({"branch": "conv"}, "dict\\(decoder='conv'\\)"),
        ({"branch": {"mask_ration": 0.5}}, "'mask_ratio'"),
    ],
)
def test_wrong_arguments_are_named_when_the_hook_is_made(arguments, message):
    with pytest.raises(ConfigError, match=message):
        HOOKS.build({"type": "OnlineTTTHook", **arguments})


def test_fixed_is_the_plain_model_and_needs_no_branch(make):
    plain = outputs_of(make())
    model = copy.deepcopy(v.MODEL)
    runner = make(v.hook(arm="fixed"), model=model)
    trained = make()
    plain_model(runner.model).load_state_dict(plain_model(trained.model).state_dict())
    assert same_bits(outputs_of(runner), plain)


def test_offline_adapts_to_the_whole_video_first_and_then_holds_still(make):
    runner = make(v.hook(arm="offline", offline_steps=6))
    runner.test()
    weights = watcher_of(runner).weights
    assert all(same_bits(weights[0], other) for other in weights[:4])
    assert all(same_bits(weights[4], other) for other in weights[4:])
    assert not same_bits(weights[0], weights[4])
    assert len(runner.message_hub.get_scalar("ttt/loss").data[0]) == 2 * 6


def test_offline_is_the_papers_thousand_steps_with_the_window_and_without_a_pull():
    hook = OnlineTTTHook(arm="offline", batch_size=8)
    assert hook.offline_steps == 1000
    assert hook.config == StreamConfig.online(batch_size=8, source_pull=0.0)


def test_offline_is_adapt_over_the_video_shuffled_again_and_again(make):
    runner = make(v.hook(arm="offline", seed=3, offline_steps=10))
    runner.test()
    model, batches = plain_model(runner.model), watcher_of(runner).batches
    config = StreamConfig.online(window=2, batch_size=2, lr=0.01, source_pull=0.0, seed=3)
    with StreamAdapter(model, find_branch(runner.model), config=config) as adapter, torch.no_grad():
        random = np.random.default_rng(3)
        order = [i for _ in range(3) for i in random.permutation(4).tolist()][:10]
        for i in order:
            adapter.adapt(images(model.data_preprocessor, batches[i]))
        assert same_bits(watcher_of(runner).weights[0], list(model.parameters()))


def test_settings_that_turn_an_arm_into_another_are_warned_of(make):
    runner = make(v.hook(arm="no_memory"))
    runner.test()
    assert "arm 'no-memory' means window=1, and the hook was given window=2" in log_of(runner)


@pytest.mark.parametrize(
    ("arm", "fields", "warning"),
    [
        ("online", {"window": 1}, "a window of at least 2, and the hook was given window=1"),
        ("explicit", {"window": 1}, "a window of at least 2"),
        ("offline", {"window": 1}, "a window of at least 2"),
        ("offline", {"source_pull": 1.0}, "source_pull below 1"),
        ("offline", {"source_pull": 0.5, "iterations": 2, "every": 2, "gate": "surprise"}, ""),
        ("online", {"source_pull": 1.0}, "source_pull below 1, and the hook was given source_pull=1.0"),
        ("implicit", {"source_pull": 1.0}, "source_pull below 1"),
        ("online", {"carry_weights": False}, "carry_weights=True"),
        ("no-memory", {"window": 2, "carry_weights": True}, "window=1, carry_weights=False"),
        ("paper", {"batch_size": 8}, "batch_size=32"),
        ("paper", {"lr": 1e-3}, "lr=0.0001"),
        ("paper", {"grad_clip": None}, "grad_clip=0.01, and the hook was given grad_clip=None"),
        ("paper", {"source_pull": 0.5}, "source_pull=0.0"),
        ("paper", {"crop_size": (4, 5), "seed": 3, "precision": "bf16"}, ""),
        ("online", {"window": "auto"}, ""),
        ("online", {"window": 2, "batch_size": 1, "lr": 1.0, "source_pull": 0.9}, ""),
        ("no-memory", {"source_pull": 1.0}, ""),
        ("fixed", {"window": 1}, ""),
    ],
)
def test_the_name_of_an_arm_is_what_runs_or_a_warning_says_so(arm, fields, warning):
    told = contradiction(arm, OnlineTTTHook(arm=arm, **fields).config)
    assert bool(told) == bool(warning)
    assert warning in told


@pytest.mark.parametrize("arm", HOOK_ARMS)
def test_an_arm_as_it_is_contradicts_nothing(arm):
    assert not contradiction(arm, OnlineTTTHook(arm=arm).config)


def test_a_checkpoint_without_a_branch_is_warned_of_and_training_or_a_branch_ends_that(make, tmp_path):
    file = tmp_path / "plain.pth"
    runner = make(v.hook())
    save_checkpoint({"state_dict": plain_model(runner.model).state_dict()}, str(file))
    runner.load_checkpoint(str(file))
    runner.test()
    assert "holds no trained branch" in log_of(runner)
    assert runner.model.branch_is_new
    batch = runner.model.data_preprocessor(watcher_of(runner).batches[0], training=True)
    runner.model(**batch, mode="loss")
    assert not runner.model.branch_is_new
    joint = make(v.hook()).model
    assert not joint.branch_is_new
    joint.load_state_dict(torch.load(file)["state_dict"])
    assert joint.branch_is_new
    joint.load_state_dict(runner.model.state_dict())
    assert not joint.branch_is_new


@pytest.mark.parametrize("change", ["key", "shape"])
def test_a_checkpoint_of_another_branch_is_warned_of_too(make, tmp_path, change):
    runner = make(v.hook())
    state = runner.model.state_dict()
    name = next(name for name in state if name.startswith("mae_branch.decoder"))
    if change == "key":
        del state[name]
    else:
        state[name] = torch.zeros(1)
    save_checkpoint({"state_dict": state}, str(tmp_path / "other.pth"))
    runner.load_checkpoint(str(tmp_path / "other.pth"))
    assert runner.model.branch_is_new
    runner.test()
    assert "or not the whole of this one" in log_of(runner)


@pytest.mark.parametrize(("branch", "warned"), [({}, True), ({"mask_ratio": 0.85, "loss_on": "all"}, False)])
def test_the_arm_of_the_paper_with_other_masks_is_warned_of(make, branch, warned):
    runner = make(v.hook(arm="paper"), model=v.joint_model(**branch))
    runner.test()
    assert ("the paper's released code hides 0.85" in log_of(runner)) == warned


# ---- branches


def plain_runner(make, **hook):
    return make(v.hook(**hook), model=copy.deepcopy(v.MODEL))


def test_the_hook_attaches_a_branch_to_a_plain_model_and_takes_it_off(make):
    runner = plain_runner(make, branch={"decoder": "conv", "patch_size": 8})
    with left_as_it_was(runner.model, "training"):
        runner.test()
    assert "untrained" in log_of(runner)
    again = plain_runner(make, branch={"decoder": "conv", "patch_size": 8})
    again.model.load_state_dict(runner.model.state_dict())
    torch.rand(3)  # the decoder does not depend on the run's own random numbers
    assert same_bits(outputs_of(again), watcher_of(runner).outputs)


def test_a_checkpoint_of_jointmae_brings_the_branch(make, tmp_path):
    joint = make(v.hook())
    expected = outputs_of(joint)
    file = tmp_path / "joint.pth"
    save_checkpoint({"state_dict": joint.model.state_dict()}, str(file))
    runner = plain_runner(make, branch={"decoder": "conv", "patch_size": 8, "checkpoint": str(file)})
    runner.load_checkpoint(str(file))
    assert same_bits(outputs_of(runner), expected)


def test_a_checkpoint_without_a_branch_is_refused(make, tmp_path):
    file = tmp_path / "plain.pth"
    runner = plain_runner(make, branch={"decoder": "conv", "checkpoint": str(file)})
    save_checkpoint({"state_dict": runner.model.state_dict()}, str(file))
    with pytest.raises(CheckpointError, match=r"plain\.pth.*mae_branch"):
        runner.test()
    missing = plain_runner(make, branch={"decoder": "conv", "checkpoint": "absent.pth"})
    with pytest.raises(CheckpointError, match=r"the branch's checkpoint absent\.pth does not exist"):
        missing.test()


def test_a_model_without_a_branch_is_refused(make):
    with pytest.raises(ConfigError, match="JointMAE"):
        plain_runner(make).test()


def test_a_model_without_backbone_is_refused(make):
    runner = plain_runner(make, branch={"encoder": "trunk"})
    with pytest.raises(EncoderError, match="trunk"):
        runner.test()


def test_a_model_without_data_preprocessor_is_refused(make):
    model = {**copy.deepcopy(v.MODEL), "data_preprocessor": None}
    with pytest.raises(ConfigError, match="SegDataPreProcessor"):
        make(v.hook(branch={"decoder": "conv"}), model=model).test()


# ---- streams


def with_pipeline(root, *transforms):
    loader = v.loader_of(root)
    loader["dataset"]["pipeline"][1:1] = transforms
    return loader


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 2}, "batch_size=1"),
        ({"sampler": {"type": "DefaultSampler", "shuffle": True}}, "shuffles frames"),
        ({"sampler": {"type": "InfiniteSampler", "shuffle": True}}, "VideoSampler"),
    ],
)
def test_loaders_that_are_no_stream_are_refused_before_anything_changes(make, root, change, message):
    runner = make(v.hook(), test_dataloader=v.loader_of(root, **change))
    with left_as_it_was(runner.model), pytest.raises(ConfigError, match=message):
        runner.test()
    assert not watcher_of(runner).batches


def test_workers_without_an_order_are_refused(make, root):
    loader = v.loader_of(root, num_workers=2, in_order=False)
    with pytest.raises(ConfigError, match="in_order"):
        make(v.hook(), test_dataloader=loader).test()


def test_workers_that_keep_the_order_change_nothing(make, root):
    loader = v.loader_of(root, num_workers=2)
    assert same_bits(outputs_of(make(v.hook(), test_dataloader=loader)), outputs_of(make(v.hook())))


def test_flips_random_changes_and_several_views_are_refused(make, root):
    with pytest.raises(ConfigError, match=r"flips frames \(RandomFlip, prob=0.5\)"):
        make(v.hook(), test_dataloader=with_pipeline(root, {"type": "RandomFlip", "prob": 0.5})).test()
    for change in ({"type": "PhotoMetricDistortion"}, {"type": "RandomResize", "scale": (96, 64)}):
        with pytest.raises(ConfigError, match=rf"at random \({change['type']}\).*take it out$"):
            make(v.hook(), test_dataloader=with_pipeline(root, change)).test()
    views = {"type": "TestTimeAug", "transforms": [[{"type": "RandomFlip", "prob": 0.0}], [{"type": "PackSegInputs"}]]}
    loader = v.loader_of(root)
    loader["dataset"]["pipeline"] = [{"type": "LoadImageFromFile"}, views]
    with pytest.raises(ConfigError, match="several views"):
        make(v.hook(), test_dataloader=loader).test()
    make(v.hook(), test_dataloader=with_pipeline(root, {"type": "RandomFlip", "prob": 0.0})).test()


class Reordered(torch.utils.data.Dataset):
    """Frames of a dataset, without data infos, in another order."""

    def __init__(self, dataset, order):
        self.dataset, self.order, self.metainfo = dataset, order, dataset.metainfo

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        return self.dataset[self.order[index]]


def reordered(make, order, **hook):
    runner = make(v.hook(**hook))
    loader = runner.build_dataloader(runner.cfg.test_dataloader)
    runner._test_loop["dataloader"] = torch.utils.data.DataLoader(
        Reordered(loader.dataset, order), batch_size=1, collate_fn=loader.collate_fn
    )
    return runner


def test_streams_are_followed_by_what_comes_where_the_dataset_tells_nothing(make):
    ordered = reordered(make, range(7))
    assert same_bits(outputs_of(ordered), outputs_of(make(v.hook())))


@pytest.mark.parametrize(
    ("order", "message"), [([0, 2, 1], "000001.png comes after .*000002.png"), ([0, 4, 1], "interleaves videos")]
)
def test_frames_out_of_order_are_refused_and_the_model_is_given_back(make, order, message):
    runner = reordered(make, order)
    with left_as_it_was(runner.model), pytest.raises(DataError, match=message):
        runner.test()


def test_offline_needs_to_know_the_frames(make):
    with pytest.raises(DataError, match="get_data_info"):
        reordered(make, range(7), arm="offline").test()


def test_a_new_video_may_have_a_new_size(make, tmp_path):
    v.write_video(tmp_path, "a", [0, 1], (48, 64))
    v.write_video(tmp_path, "b", [0, 1], (32, 64))
    runner = make(v.hook(), test_dataloader=v.loader_of(tmp_path))
    assert [tuple(out.shape[1:]) for out in outputs_of(runner)] == [(48, 64)] * 2 + [(32, 64)] * 2


@pytest.mark.parametrize("arm", ["online", "offline"])
def test_another_size_inside_a_video_is_refused_with_its_file(make, tmp_path, arm):
    v.write_video(tmp_path, "a", [0, 1], (48, 64))
    v.write_video(tmp_path, "a", [2], (32, 64))
    runner = make(v.hook(arm=arm), test_dataloader=v.loader_of(tmp_path))
    with left_as_it_was(runner.model), pytest.raises(FrameError, match=r"00000\d.png.*\(32, 64\)"):
        runner.test()


def test_a_crop_that_does_not_fit_is_refused_with_the_file(make):
    with pytest.raises(FrameError, match=r"a/000000.png: crop_size \(512, 1024\) does not fit"):
        make(v.hook(crop_size=(512, 1024))).test()


def test_missing_frames_are_warned_of_once(make, tmp_path):
    v.write_video(tmp_path, "a", [0, 1, 3, 4, 7])
    runner = make(v.hook(), test_dataloader=v.loader_of(tmp_path))
    runner.test()
    assert log_of(runner).count("frames are missing in video") == 1
    assert "000003.png" in log_of(runner)


# ---- what it tells


def test_loss_and_time_go_to_log_message_hub_and_visualizer(make):
    runner = make(v.hook(log_interval=3))
    runner.test()
    losses = runner.message_hub.get_scalar("ttt/loss").data[0]
    assert len(losses) == 7
    text = Path(runner.log_dir, "vis_data/scalars.json").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    scalars = [line for line in lines if "ttt/loss" in line]
    assert [line["step"] for line in scalars] == list(range(1, 8))
    assert [line["ttt/loss"] for line in scalars] == pytest.approx(list(losses))
    assert all(line["ttt/ms"] > 0 for line in scalars)
    text = log_of(runner)
    assert text.count("TTT online, frame") == 2
    assert "arm online, frames 7, videos 2" in text
    summary = json.loads(Path(runner.log_dir, f"{runner.timestamp}.json").read_text())["ttt"]
    assert summary["mean_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_reconstructions_go_to_the_visualizer_every_n_frames(make, root):
    runner = make(v.hook(visualize_interval=4, lr=0.0))
    runner.test()
    files = sorted(Path(runner.log_dir).rglob("vis_image/*.png"))
    assert [file.name for file in files] == ["ttt_reconstruction_4.png"]
    image = np.asarray(Image.open(files[0]))
    frame = np.asarray(Image.open(root / "images/a/000003.png"))
    assert image.shape == (48, 3 * 64, 3)
    assert np.array_equal(image[:, :64], frame)
    hidden = (image[:, 64:128] != frame).any(2)
    assert 0.7 < hidden.mean() < 0.9
    assert np.array_equal(image[:, 128:][~hidden], frame[~hidden])
    plain = make(v.hook(lr=0.0))
    assert same_bits(outputs_of(plain), watcher_of(runner).outputs)


def test_several_processes_need_whole_videos(make, root, monkeypatch):
    monkeypatch.setattr(loaders, "get_world_size", lambda: 2)
    runner = make(v.hook())
    with left_as_it_was(runner.model), pytest.raises(ConfigError, match="needs whole videos.*VideoSampler"):
        runner.test()
    make(v.hook(), test_dataloader=v.loader_of(root, sampler={"type": "VideoSampler"})).test()


# ---- other models


def coco_loader(folder: Path) -> tuple[dict, str]:
    """Two small videos as mmdet reads them: a test dataloader, and its annotation file."""
    v.write_videos(folder, {"a": 2, "b": 2}, tiny.SIZE)
    names = sorted(str(path.relative_to(folder / "images")) for path in (folder / "images").rglob("*.png"))
    height, width = tiny.SIZE
    box = {"iscrowd": 0, "category_id": 1, "bbox": [0, 0, 40, 40], "area": 1600}
    box["segmentation"] = [[0, 0, 40, 0, 40, 40, 0, 40]]
    listed = {
        "images": [{"id": i, "file_name": name, "height": height, "width": width} for i, name in enumerate(names)],
        "annotations": [{**box, "id": i + 1, "image_id": i} for i in range(len(names))],
        "categories": [{"id": i, "name": f"thing{i}"} for i in range(1, 4)],
    }
    file = folder / "instances.json"
    file.write_text(json.dumps(listed))
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "PackDetInputs", "meta_keys": keys}]
    dataset = {
        "type": "CocoDataset",
        "ann_file": str(file),
        "data_prefix": {"img": str(folder / "images")},
        "metainfo": {"classes": ("thing1", "thing2", "thing3")},
        "test_mode": True,
        "pipeline": pipeline,
    }
    sampler = {"type": "VideoSampler"}
    return {"batch_size": 1, "num_workers": 0, "sampler": sampler, "dataset": dataset}, str(file)


class Detections(Hook):
    """Keeps what a detector found."""

    def __init__(self):
        self.outputs = []

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        for sample in outputs:
            found = sample.pred_instances
            self.outputs.append([found.scores.clone(), found.masks.clone()])


def test_mmdets_mask2former_adapts_too(tmp_path, monkeypatch):
    tiny.without_slow_logs(monkeypatch)
    loader, file = coco_loader(tmp_path)

    def run(*hooks):
        tiny.enter("mmdet")
        config = v.seg_config(tmp_path, tmp_path / "work", test_dataloader=copy.deepcopy(loader))
        config |= {
            "default_scope": "mmdet",
            "model": {"type": "JointMAE", "model": tiny.mask2former(), "branch": {"decoder": "copy_head"}},
            "test_evaluator": {"type": "CocoMetric", "ann_file": file, "metric": "segm"},
            "visualizer": {"type": "DetLocalVisualizer", "vis_backends": [{"type": "LocalVisBackend"}]},
            "custom_hooks": list(hooks),
        }
        runner = Runner.from_cfg(Config(config))
        watcher = Detections()
        runner.register_hook(watcher)
        with left_as_it_was(runner.model, "training"):
            runner.test()
        return runner, watcher.outputs

    plain = run()[1]
    assert same_bits(run(v.hook(lr=0.0, crop_size=(32, 64)))[1], plain)
    runner, adapted = run(v.hook(crop_size=(32, 64)))
    assert not same_bits(adapted, plain)
    assert "arm online, frames 4, videos 2" in log_of(runner)
