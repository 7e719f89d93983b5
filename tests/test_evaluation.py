"""Arms, the streaming rule, and `evaluate`: what a result may depend on, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ttt_adapt.commands.evaluate as command
from conftest import photograph, same_bits, settle_norms
from ttt_adapt import StreamConfig
from ttt_adapt.checkpoint import Checkpoint, ModelSpec, save_checkpoint
from ttt_adapt.commands.evaluate import Contender, evaluate
from ttt_adapt.data import open_clips
from ttt_adapt.errors import CheckpointError, ConfigError, DataError
from ttt_adapt.evaluation.arms import ARMS, find_arms
from ttt_adapt.evaluation.report import Report
from ttt_adapt.evaluation.runner import run_arm

SIZE = (48, 64)
CLASSES = ("road", "car", "sky")
CONFIG = StreamConfig(window=3, batch_size=2, lr=1e-3, encoder_lr_scale=1.0)
ADAPTING = ("no-memory", "implicit", "explicit", "online")
VIT = {"encoder": "vit_tiny_patch16_224", "encoder_options": {"depth": 2, "embed_dim": 48, "num_heads": 3}}


def checkpoint(seed: int = 0, **changes) -> Checkpoint:
    torch.manual_seed(seed)
    cnn = {"encoder": "resnet18", "encoder_options": {"channels": [8, 16, 24, 32]}}
    spec = ModelSpec(**{**cnn, "classes": CLASSES, "size": SIZE, "branch": {}, "width": 16, **changes})
    model, branch = spec.build()
    settle_norms(model)
    return Checkpoint(model.eval(), branch, spec)


def frames(count: int = 4, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(seed)
    labels = (np.arange(SIZE[0])[:, None] // 16 + np.zeros(SIZE, int)).astype(np.uint8)
    labels[:4] = 255
    return [(random.integers(0, 256, (*SIZE, 3), dtype=np.uint8), labels) for _ in range(count)]


def predictions(arm: str, made: Checkpoint, config: StreamConfig = CONFIG) -> list[torch.Tensor]:
    runner = ARMS[arm].start(made, config)
    try:
        return [runner.step(frame).clone() for frame, _ in frames()]
    finally:
        runner.close()


def test_the_fixed_arm_is_the_plain_model_bitwise():
    made = checkpoint()
    normalize = made.spec.preprocess()
    with torch.no_grad():
        plain = [made.model(normalize(frame)) for frame, _ in frames()]
    assert same_bits(predictions("fixed", made), plain)


@pytest.mark.parametrize("arm", ADAPTING)
def test_without_a_learning_rate_every_adapting_arm_is_the_fixed_one_bitwise(arm):
    made = checkpoint()
    assert same_bits(predictions(arm, made, CONFIG.replace(lr=0.0)), predictions("fixed", made))


@pytest.mark.parametrize("arm", [name for name in ARMS if name != "fixed"])
def test_every_other_arm_changes_predictions_and_repeats_itself(arm):
    made = checkpoint()
    first, again = predictions(arm, made), predictions(arm, made)
    assert same_bits(first, again)
    assert not torch.equal(first[-1], predictions("fixed", made)[-1])


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("breaks", [False, True], ids=["to the end", "broken off"])
def test_an_arm_leaves_weights_buffers_and_flags_as_they_were(arm, breaks):
    made = checkpoint()
    model, branch = photograph(made.model), {k: v.clone() for k, v in made.branch.state_dict().items()}

    def clip():
        yield from frames(3)
        if breaks:
            raise OSError("the disk is gone")

    if breaks:
        with pytest.raises(OSError, match="disk"):
            run_arm(ARMS[arm], made, clip(), CONFIG, name="clip")
    else:
        run_arm(ARMS[arm], made, clip(), CONFIG, name="clip")
    assert photograph(made.model) == model
    assert same_bits(branch, dict(made.branch.state_dict()))


def test_an_arm_that_fails_in_mid_stream_gives_the_model_back():
    made = checkpoint()
    before = photograph(made.model)
    clip = [*frames(2), (np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.uint8))]
    with pytest.raises(ValueError, match="40"):
        run_arm(ARMS["online"], made, clip, CONFIG, name="clip")
    assert photograph(made.model) == before
    run_arm(ARMS["online"], made, frames(2), CONFIG, name="clip")


@pytest.mark.parametrize("arm", ARMS)
def test_a_frame_is_predicted_before_the_next_is_read(arm):
    events = []

    def clip():
        for index, pair in enumerate(frames()):
            events.append(f"read {index}")
            yield pair

    run_arm(ARMS[arm], checkpoint(), clip(), CONFIG, name="clip", on_frame=lambda i, *_: events.append(f"predict {i}"))
    assert events == [f"{what} {i}" for i in range(4) for what in ("read", "predict")]


@pytest.mark.parametrize("arm", ARMS)
def test_labels_reach_the_score_and_nothing_else(arm):
    """Other labels, same predictions and losses."""
    seen = {}
    for name, shift in (("true", 0), ("other", 1)):
        clip = [
            (frame, np.where(labels == 255, 255, (labels + shift) % 3).astype(np.uint8)) for frame, labels in frames()
        ]
        seen[name] = []
        run = run_arm(
            ARMS[arm], checkpoint(), clip, CONFIG, name="clip",
            on_frame=lambda _i, _f, prediction, _m, loss, to=seen[name]: to.append((prediction.tobytes(), loss)),
        )  # fmt: skip
        seen[name].append(run.losses)
        seen[f"{name} score"] = run.miou
    assert seen["true"] == seen["other"]
    assert seen["true score"] != seen["other score"]


def test_the_runner_is_given_frames_only():
    given = []

    class Recording:
        loss = None

        def step(self, *args):
            given.append(args)
            return torch.zeros(1, 3, *SIZE)

        def close(self):
            given.append("closed")

    class Arm:
        name = "recording"

        @staticmethod
        def start(_checkpoint, _config):
            return Recording()

    clip = frames()
    run = run_arm(Arm, checkpoint(), clip, CONFIG, name="clip")
    assert [len(args) for args in given[:-1]] == [1] * 4
    assert all(args[0] is frame for args, (frame, _) in zip(given[:-1], clip, strict=True))
    assert given[-1] == "closed"
    assert run.losses == [None] * 4


def test_a_run_holds_one_loss_and_score_per_frame():
    run = run_arm(ARMS["online"], checkpoint(), frames(), CONFIG.replace(seed=7), name="street", label="ours")
    assert (run.arm, run.clip, run.seed) == ("ours", "street", 7)
    assert len(run.per_frame) == len(run.losses) == 4
    assert all(loss > 0 for loss in run.losses)
    assert set(run.per_class) == set(CLASSES)
    assert 0 <= run.miou <= 1
    assert run.ms_per_frame > 0


def test_memories_are_what_their_names_say():
    made = checkpoint()
    carry = {}
    for arm in ADAPTING:
        runner = ARMS[arm].start(made, CONFIG)
        carry[arm] = (runner._adapter.config.window, runner._adapter.config.carry_weights)
        runner.close()
    assert carry == {"no-memory": (1, False), "implicit": (1, True), "explicit": (3, False), "online": (3, True)}


def test_online_norm_ema_moves_the_statistics_and_online_does_not():
    made = checkpoint()
    before = {name: b.clone() for name, b in made.model.named_buffers() if "running" in name}
    moved = {}
    for arm in ("online", "online-norm-ema"):
        runner = ARMS[arm].start(made, CONFIG)
        runner.step(frames(1)[0][0])
        now = {name: b for name, b in made.model.named_buffers() if "running" in name}
        moved[arm] = sum(not torch.equal(now[name], before[name]) for name in before)
        runner.close()
    assert moved == {"online": 0, "online-norm-ema": len(before)}
    assert all(torch.equal(b, before[name]) for name, b in made.model.named_buffers() if name in before)


@pytest.mark.parametrize("arm", ["norm-ema", "norm-blend", "online-norm-ema"])
def test_norm_arms_refuse_a_model_without_batchnorm(arm):
    with pytest.raises(ConfigError, match="no BatchNorm"):
        ARMS[arm].start(checkpoint(**VIT), CONFIG)


@pytest.mark.parametrize("arm", ADAPTING)
def test_adapting_arms_refuse_a_model_without_a_branch(arm):
    with pytest.raises(ConfigError, match="main task alone"):
        ARMS[arm].start(checkpoint(branch=None), CONFIG)


def test_blended_statistics_start_from_the_source_at_every_frame():
    made = checkpoint()
    runner = ARMS["norm-blend"].start(made, CONFIG)
    (first, _), (second, _) = frames(2)
    alone = runner.step(second).clone()
    runner.step(first)
    assert torch.equal(runner.step(second), alone)
    runner.close()


def test_an_unknown_arm_comes_with_the_nearest():
    with pytest.raises(ConfigError, match="'onlin'; nearest: 'online'"):
        find_arms(["fixed", "onlin"])


# ---- evaluate


@pytest.fixture
def clips(tmp_path) -> list:
    root = tmp_path / "data"
    for number, name in enumerate(("dusk", "noon")):
        for kind in ("images", "labels"):
            (root / name / kind).mkdir(parents=True)
        for index, (frame, labels) in enumerate(frames(3, seed=number)):
            Image.fromarray(frame).save(root / name / "images" / f"{index}.png")
            Image.fromarray(labels).save(root / name / "labels" / f"{index}.png")
    index = {"classes": CLASSES, "ignore": 255, "clips": [{"clip": "dusk"}, {"clip": "noon"}]}
    (root / "index.json").write_text(json.dumps(index))
    return open_clips(root)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / f"model{seed}.safetensors" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        save_checkpoint(path, checkpoint(seed))
    return paths


def contenders(files) -> list[Contender]:
    return [Contender("fixed", "Fixed", tuple(files)), Contender("online", "Online", tuple(files))]


def results(report: Report) -> list:
    return [(run.arm, run.clip, run.seed, run.miou, run.losses) for run in report.runs]


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The runs that are really made."""
    made = []

    def run(arm, *args, **keywords):
        made.append(f"{arm.name} {keywords['name']}")
        return run_arm(arm, *args, **keywords)

    monkeypatch.setattr(command, "run_arm", run)
    return made


def test_evaluate_runs_every_row_on_every_clip_with_every_seed_and_writes_it_down(tmp_path, clips, files):
    out = tmp_path / "out"
    report = evaluate(contenders(files[:1]), clips, CONFIG, [0, 1], out)
    assert {(run.arm, run.clip, run.seed) for run in report.runs} == {
        (arm, clip, seed) for arm in ("Fixed", "Online") for clip in ("dusk", "noon") for seed in (0, 1)
    }
    assert {path.name for path in out.iterdir()} == {"report.json", "table.md", "miou.png", "dusk.png", "noon.png"}
    assert results(Report.load(out / "report.json")) == results(report)
    table = (out / "table.md").read_text()
    assert "| Online |" in table
    assert "dusk: mIoU (%)" in table
    for name in ("miou", "dusk", "noon"):
        assert min(Image.open(out / f"{name}.png").size) > 300


def test_each_seed_has_its_own_checkpoint(tmp_path, clips, files):
    report = evaluate(contenders(files), clips[:1], CONFIG, [0, 1], tmp_path / "out")
    for seed, file in enumerate(files):
        run = run_arm(
            ARMS["online"],
            command.load_checkpoint(file),
            clips[0],
            CONFIG.replace(seed=seed),
            name="dusk",
            label="Online",
        )
        ours = next(r for r in report.runs if r.arm == "Online" and r.seed == seed)
        assert (ours.miou, ours.losses) == (run.miou, run.losses)


def test_a_second_call_runs_nothing_again(tmp_path, clips, files, counted):
    config = CONFIG.replace(crop_size=(32, 32))
    first = evaluate(contenders(files), clips, config, [0], tmp_path / "out")
    assert len(counted) == 4
    again = evaluate(contenders(files), clips, config, [0], tmp_path / "out")
    assert len(counted) == 4
    assert results(again) == results(first)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path, clips, files, counted, monkeypatch):
    whole = evaluate(contenders(files), clips, CONFIG, [0], tmp_path / "whole")
    counted.clear()
    real = command.run_arm

    def stop(*args, **keywords):
        if len(counted) == 2:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(command, "run_arm", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(contenders(files), clips, CONFIG, [0], tmp_path / "out")
    assert len(Report.load(tmp_path / "out" / "report.json").runs) == 2
    report = evaluate(contenders(files), clips, CONFIG, [0], tmp_path / "out")
    assert counted == ["fixed dusk", "fixed noon", "online dusk", "online noon"]
    assert results(report) == results(whole)


def test_results_of_other_settings_or_of_other_weights_are_not_mixed(tmp_path, clips, files, counted):
    evaluate(contenders(files[:1]), clips, CONFIG, [0], tmp_path / "out")
    text = (tmp_path / "out" / "report.json").read_text()
    for changes in ({"config": CONFIG.replace(lr=0.5)}, {"seeds": [0, 1]}, {"clips": clips[:1]}):
        arguments = {"contenders": contenders(files[:1]), "clips": clips, "config": CONFIG, "seeds": [0], **changes}
        with pytest.raises(DataError, match="other settings"):
            evaluate(**arguments, out=tmp_path / "out")
    save_checkpoint(files[0], checkpoint(9))  # the same name, trained anew
    with pytest.raises(DataError, match="other settings"):
        evaluate(contenders(files[:1]), clips, CONFIG, [0], tmp_path / "out")
    assert (tmp_path / "out" / "report.json").read_text() == text
    assert len(counted) == 4


def test_what_does_not_fit_fails_before_anything_runs_or_is_written(tmp_path, clips, files, counted):
    save_checkpoint(tmp_path / "vit.safetensors", checkpoint(**VIT))
    save_checkpoint(tmp_path / "main.safetensors", checkpoint(branch=None))
    save_checkpoint(tmp_path / "other.safetensors", checkpoint(classes=("cat", "dog")))
    fixed = contenders(files[:1])[0]
    bad = [
        (Contender("norm-ema", "BN", (tmp_path / "vit.safetensors",)), ConfigError, "no BatchNorm"),
        (Contender("online", "O", (tmp_path / "main.safetensors",)), ConfigError, "main task alone"),
        (Contender("fixed", "F", (tmp_path / "other.safetensors",)), CheckpointError, "cat, dog; clip dusk has road"),
        (Contender("online", "O", (files[0], tmp_path / "none.safetensors")), CheckpointError, "no checkpoint"),
        (Contender("offline", "O", (files[0],)), ConfigError, "no arm 'offline'"),
    ]
    for contender, kind, match in bad:
        with pytest.raises(kind, match=match):
            evaluate([fixed, contender], clips, CONFIG, [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not counted
