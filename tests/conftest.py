"""Fixtures and checks that several test modules share."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start; every core runs a test
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell ignores Ctrl-C for what it starts in the background

import pytest
import torch
from torch import nn

# the OpenMMLab integration is optional
collect_ignore_glob = [] if importlib.util.find_spec("mmengine") else ["openmmlab/*"]


def pytest_configure(config):
    """Let one process write yapf's cache of its grammar: in a new environment the workers read it half written."""
    if not hasattr(config, "workerinput") and importlib.util.find_spec("yapf"):
        importlib.import_module("yapf")


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same global random state and runs on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small_collections():
    """Import what evaluations need, and keep it out of garbage collections: there is one before each of their runs."""
    import matplotlib.figure  # noqa: F401
    import timm  # noqa: F401
    import torchmetrics  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture
def committed(monkeypatch, small_collections):
    """As if the code that runs were committed: only then are reports gone on with."""
    import ttt_adapt.evaluation.session as session

    real = session.environment
    monkeypatch.setattr(session, "environment", lambda: {**real(), "dirty": False})


@pytest.fixture
def clips(tmp_path) -> list:
    """Two labelled clips of three frames, dusk and noon, in the folder data."""
    from arm_inputs import write_clip
    from ttt_adapt.data import open_clips

    for seed, name in enumerate(("dusk", "noon")):
        write_clip(tmp_path / "data" / name, 3, seed)
    return open_clips(tmp_path / "data")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder with two checkpoints of the same model with other weights."""
    from arm_inputs import checkpoint
    from ttt_adapt.tasks.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        save_checkpoint(folder / f"model{seed}.safetensors", checkpoint(seed))
    return folder


@pytest.fixture
def files(tmp_path, model_folder) -> list:
    """Two checkpoints of the same model with other weights, which a test may overwrite."""
    names = sorted(path.name for path in model_folder.iterdir())
    return [Path(shutil.copy(model_folder / name, tmp_path)) for name in names]


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The runs that an evaluation really makes, as "ARM CLIP"."""
    import ttt_adapt.evaluation.session as session
    from ttt_adapt.evaluation.run_arm import run_arm

    made = []

    def run(arm, *args, **keywords):
        made.append(f"{arm.name} {keywords['name']}")
        return run_arm(arm, *args, **keywords)

    monkeypatch.setattr(session, "run_arm", run)
    return made


def hooks_of(model: nn.Module) -> int:
    """How many hooks of any kind are on the model's modules."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    )
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def photograph(model: nn.Module) -> dict:
    """Everything about a model that attaching must leave alone."""
    return {
        "class": type(model),
        "classes": [(name, type(m)) for name, m in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "buffers": [(name, id(b)) for name, b in model.named_buffers()],
        "grads": [(name, p.grad is None) for name, p in model.named_parameters()],
        "bytes": {name: bytes_of(t) for name, t in model.state_dict().items()},
        "training": [(name, m.training) for name, m in model.named_modules()],
        "forward": [name for name, m in model.named_modules() if "forward" in vars(m)],
        "hooks": hooks_of(model),
    }


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor of any type, also of those that NumPy does not know."""
    return tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()


@contextmanager
def left_as_it_was(model: nn.Module, *but: str):
    """Assert that the block leaves the model as it was, save for the aspects named in `but`."""
    before = photograph(model)
    yield
    after = photograph(model)
    for aspect, value in before.items():
        if aspect not in but:
            assert after[aspect] == value, aspect


def mix_flags(model: nn.Module) -> None:
    """Training mode for every other module, requires_grad off for every third parameter."""
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)


def settle_norms(model: nn.Module) -> nn.Module:
    """Running statistics and affine weights of BatchNorm that are not the trivial ones."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


def same_bits(a, b) -> bool:
    """Whether two nested outputs are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def live_tensors() -> int:
    gc.collect()
    return sum(1 for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter))
