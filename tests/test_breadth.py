"""The sweeps over other libraries' models: a sample of each works as suggested, and the command keeps what it found."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)
    breadth = importlib.import_module("breadth")
    checks = importlib.import_module("sweeps.checks")
    report = importlib.import_module("sweeps.report")
    subject = importlib.import_module("sweeps.subject")
    SWEEPS = {name: importlib.import_module(f"sweeps.{name}_models") for name in breadth.SWEEPS}

QUICK = {
    "timm": "test_vit test_resnet test_convnext test_nfnet levit_128s",
    "torchvision": "mobilenet_v3_small shufflenet_v2_x0_5",
    "transformers": "SegformerForSemanticSegmentation ResNetBackbone",
    "openmmlab": "",
}
SLOW = {
    "timm": (
        "xcit_nano_12_p8_224 test_efficientnet test_mambaout test_maxvit test_vit_relpos swin_tiny_patch4_window7_224 "
        "tresnet_m"
    ),
    "torchvision": (
        "resnet18 regnet_x_400mf squeezenet1_1 googlenet vit_b_32 lraspp_mobilenet_v3_large swin_t alexnet "
        "fasterrcnn_mobilenet_v3_large_fpn ssdlite320_mobilenet_v3_large"
    ),
    "transformers": (
        "ViTForImageClassification SwinForImageClassification ConvNextV2ForImageClassification "
        "Dinov2WithRegistersForImageClassification DPTForDepthEstimation UperNetForSemanticSegmentation "
        "Mask2FormerForUniversalSegmentation RTDetrForObjectDetection ViTForMaskedImageModeling SwinBackbone"
    ),
    "openmmlab": (
        "mmseg/fcn mmseg/segformer mmseg/pidnet mmseg/mask2former mmseg/vit mmseg/upernet mmdet/retinanet "
        "mmdet/mask_rcnn mmdet/fcos mmdet/rtmdet mmdet/yolox mmdet/detr"
    ),
}
SAMPLE = [(sweep, model) for sweep, listed in QUICK.items() for model in listed.split()] + [
    pytest.param(sweep, model, marks=pytest.mark.slow) for sweep, listed in SLOW.items() for model in listed.split()
]


def result_of(sweep: str, model: str) -> dict:
    """What the sweep finds out about a model, in this process."""
    return breadth.looked_at(SWEEPS[sweep], model)


@pytest.mark.parametrize(("sweep", "model"), SAMPLE)
def test_a_model_works_as_suggested(sweep, model):
    SWEEPS[sweep].prepare()
    found = result_of(sweep, model)
    assert found["status"] == checks.AS_SUGGESTED, found
    assert set(found["checks"].values()) == {"ok"}


def test_a_model_of_clips_is_refused_with_a_reason():
    found = result_of("torchvision", "r3d_18")
    assert found["status"] == checks.REFUSED
    assert found["reason"].startswith("EncoderError: ")


@pytest.mark.parametrize("sweep", ["timm", "torchvision"])
def test_every_model_of_a_list_is_one_of_its_library(sweep):
    import timm
    import torchvision

    known = {"timm": timm.is_model, "torchvision": torchvision.models.list_models().__contains__}[sweep]
    names = SWEEPS[sweep].names()
    assert len(names) == len(set(names)) >= {"timm": 230, "torchvision": 43}[sweep]
    assert [name for name in names if not known(name)] == []


def test_the_list_of_timm_has_all_of_its_modules():
    import timm

    listed = {SWEEPS["timm"].group(name) for name in SWEEPS["timm"].names()}
    assert listed == set(timm.list_modules())


class Tiny(nn.Module):
    """A model that tests break in one way each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stages, self.head = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.stages(self.stem(x).relu()).mean((2, 3)))


class Remembers(Tiny):
    """What it returns depends on how often it was called, which it notes outside of itself: nothing can undo that."""

    calls: ClassVar[list[int]] = []

    def forward(self, x):
        self.calls.append(1)
        return super().forward(x) + len(self.calls)


class Infinite(Tiny):
    """Returns no finite number."""

    def forward(self, x):
        return super().forward(x) / 0


def test_a_plain_model_passes_all_checks():
    found = checks.check_model(subject.Subject(Tiny().eval()))
    assert found["status"] == checks.AS_SUGGESTED, found
    assert list(found["checks"]) == list(checks.CHECKS)


@pytest.mark.parametrize(("model", "check"), [(Remembers, "lr 0"), (Infinite, "stream")])
def test_a_check_finds_what_is_wrong(model, check):
    found = checks.check_model(subject.Subject(model().eval()))
    assert found["status"] == checks.FAILS
    assert found["checks"][check] != "ok"
    assert check in found["reason"]


def test_a_model_that_is_changed_is_noticed():
    model = Tiny()
    before = subject.Snapshot.of(model)
    assert before.differences(model) == []
    model.train(False)
    model.stem.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model.stages.weight += 1
    model.head.weight.requires_grad_(False)
    model.stem.bias = nn.Parameter(model.stem.bias.detach().clone())
    text = " ".join(before.differences(model))
    for word in ("stem.bias", "stages.weight", "training", "hooks", "flags"):
        assert word in text


# ---- the command


@pytest.fixture
def sweep(monkeypatch):
    """A sweep of four models, whose checks are made up and noted in the file `ran` of the folder `out`."""

    def prepare() -> None:
        """Nothing is needed."""

    def check(name: str) -> dict:
        if name == "crashes":
            os._exit(3)
        if name == "hangs":
            while True:
                time.time()
        return {"status": checks.REFUSED if name == "refused" else checks.AS_SUGGESTED, "reason": "a | b", "checks": {}}

    made = SimpleNamespace(
        names=lambda: ["good", "refused", "crashes", "hangs"], group=lambda _: "made up", prepare=prepare, check=check
    )
    monkeypatch.setitem(sys.modules, "sweeps.timm_models", made)
    return made


def run(tmp_path, *arguments: str) -> dict:
    """Run the command on the sweep of four models; its results."""
    breadth.main(["--timm", "--seconds", "1", "--out", str(tmp_path), "--page", str(tmp_path / "page.md"), *arguments])
    file = tmp_path / "timm.json"
    return json.loads(file.read_text())["models"] if file.exists() else {}


def test_a_model_that_crashes_or_hangs_is_a_result_like_others(sweep, tmp_path):
    found = run(tmp_path)
    assert {name: result["status"] for name, result in found.items()} == {
        "good": checks.AS_SUGGESTED,
        "refused": checks.REFUSED,
        "crashes": checks.FAILS,
        "hangs": checks.FAILS,
    }
    assert found["crashes"]["reason"] == "the process ended with status 3"
    assert found["hangs"]["reason"] == "no result after 1 s"
    page = (tmp_path / "page.md").read_text()
    assert "| timm, the smallest variants of all modules | 4 | 1 | 0 | 1 | 2 | 0 |" in page
    assert "| refused | refused |  | a \\| b |" in page


def test_a_sweep_goes_on_where_it_stopped(sweep, tmp_path, capsys):
    assert list(run(tmp_path, "--limit", "1")) == ["good"]
    capsys.readouterr()
    assert list(run(tmp_path, "--limit", "1")) == ["good", "refused"]
    assert "good" not in capsys.readouterr().out.splitlines()[0]


def test_results_of_another_code_are_made_again(sweep, tmp_path, monkeypatch, capsys):
    run(tmp_path, "--limit", "2")
    monkeypatch.setattr(breadth, "code_state", lambda _: "another")
    capsys.readouterr()
    found = run(tmp_path, "--limit", "1")
    assert capsys.readouterr().out.startswith("1/1 good")
    assert [result["state"] == "another" for result in found.values()] == [True, False]
    assert "1 of the results come from earlier states of the code" in (tmp_path / "page.md").read_text()


def test_what_did_not_work_can_be_run_again(sweep, tmp_path, capsys):
    run(tmp_path, "--limit", "2")
    capsys.readouterr()
    run(tmp_path, "--failed", "--limit", "1")
    assert capsys.readouterr().out.startswith("1/1 refused")


def test_models_that_are_named_are_shown_and_not_saved(sweep, tmp_path, capsys):
    assert run(tmp_path, "--only", "good") == {}
    assert capsys.readouterr().out.startswith("good: as suggested")
    assert list(tmp_path.iterdir()) == []


def test_reasons_do_not_say_where_a_machine_keeps_its_files():
    from sweeps.checks import without_folders

    told = without_folders('file "/home/me/lib/configs/a.py" of https://a.org/b/c and models/x.py, at /opt/x/y.py:3')
    assert told == 'file ".../configs/a.py" of https://a.org/b/c and models/x.py, at .../x/y.py:3'
