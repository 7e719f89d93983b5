"""The state of a stream as a file: it comes back bit for bit, or is refused whole."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch

import models as zoo
from conftest import same_bits, settle_norms
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.errors import CheckpointError, StateError
from ttt_adapt.file_kind import RUN_STATE
from ttt_adapt.sharing.state_file import read_state, write_state

pytest.importorskip("safetensors")
FAST = {"window": 3, "batch_size": 2, "lr": 1e-2, "seed": 11}
CONFIGS = {
    "online": StreamConfig.online(**FAST),
    "auto window": StreamConfig.online(**{**FAST, "window": "auto"}),
    "surprise": StreamConfig.online(gate="surprise", **FAST),
    "ema": StreamConfig.online(norm_stats="ema", **FAST),
    "norms": StreamConfig.online(adapt="norms", **FAST),
}


def clip(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(21)
    return [torch.randn(3, 32, 48, generator=generator).clamp(-1.9, 1.9) for _ in range(count)]


def adapter(name: str = "online", seed: int = 9) -> StreamAdapter:
    torch.manual_seed(seed)
    model = settle_norms(zoo.TinySeg())
    return StreamAdapter(model, MAEBranch.attach(model, "backbone", patch_size=16), config=CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stream_goes_on_from_its_file_as_if_it_had_not_stopped(tmp_path, name):
    whole, first, second = (adapter(name) for _ in range(3))
    frames = clip(6)
    expected = [whole.step(frame) for frame in frames]
    for frame in frames[:3]:
        first.step(frame)
    first.save(tmp_path / "cam.safetensors")
    second.step(frames[5])  # something else came before
    second.load(str(tmp_path / "cam.safetensors"))
    assert same_bits([second.step(frame) for frame in frames[3:]], expected[3:])
    assert same_bits(second.state_dict(), whole.state_dict())


def test_handles_save_and_load_as_adapters_do(tmp_path):
    alone, shared, frames = adapter(), adapter(), clip(4)
    expected = [alone.step(frame) for frame in frames]
    one, other = shared.open_stream("one"), shared.open_stream("other")
    for frame in frames[:2]:
        one.step(frame)
    one.save(tmp_path / "a.safetensors")
    other.load(tmp_path / "a.safetensors")
    assert same_bits([other.step(frame) for frame in frames[2:]], expected[2:])


def test_an_existing_file_stays_until_the_new_one_is_complete_and_nothing_else_is_left(tmp_path):
    stream, file = adapter(), tmp_path / "a.safetensors"
    stream.save(file)
    before = file.read_bytes()
    stream.step(clip(1)[0])
    stream.save(file)
    assert file.read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(CheckpointError, match="cannot be written"):
        stream.save(tmp_path / "nowhere" / "a.safetensors")


def test_a_flipped_bit_in_any_byte_of_a_file_is_noticed_and_so_is_another_length(tmp_path):
    file, dice = tmp_path / "a.safetensors", random.Random(0)
    state = {"a": torch.arange(3.0), "b": [1, None, ("x", True, 0.1)], "c": torch.tensor(True)}
    write_state(file, state)
    assert same_bits(read_state(file), state)
    whole = file.read_bytes()
    damaged = [bytearray(whole) for _ in whole]
    for place, content in enumerate(damaged):
        content[place] ^= 1 << dice.randrange(8)
    damaged += [whole[:length] for length in range(0, len(whole), 9)] + [whole + b"\0", whole + whole]
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(CheckpointError):
            read_state(file)


def test_a_damaged_file_changes_nothing(tmp_path):
    stream, file, frames, dice = adapter(), tmp_path / "a.safetensors", clip(4), random.Random(0)
    for frame in frames[:2]:
        stream.step(frame)
    stream.save(file)
    stream.step(frames[2])
    before, whole = stream.state_dict(), file.read_bytes()
    for _ in range(20):
        content = bytearray(whole)
        content[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        file.write_bytes(content)
        with pytest.raises(CheckpointError):
            stream.load(file)
    assert same_bits(stream.state_dict(), before)


def test_what_is_foreign_is_refused_with_what_it_is(tmp_path):
    stream, file = adapter(), tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="there is no file"):
        stream.load(file)
    adapter(seed=10).save(file)
    with pytest.raises(CheckpointError, match="other source weights"):
        stream.load(file)
    adapter("norms").save(file)
    with pytest.raises(CheckpointError, match="the same StreamConfig"):
        stream.load(file)
    write_state(file, {}, RUN_STATE)
    with pytest.raises(CheckpointError, match="it is the state of a run"):
        stream.load(file)
    torch.save(stream.state_dict(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="load_state_dict"):
        stream.load(tmp_path / "a.pt")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="a pipe or a device"):
        stream.load(file)


def test_a_file_of_a_later_version_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("ttt_adapt.sharing.state_file.FORMAT", 2)
    write_state(tmp_path / "a.safetensors", {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2, and this version of ttt_adapt reads formats up to 1"):
        read_state(tmp_path / "a.safetensors")


def test_a_state_that_load_would_refuse_is_not_written_over_a_good_one(tmp_path):
    stream, file = adapter(), tmp_path / "a.safetensors"
    stream.save(file)
    before = file.read_bytes()
    state = stream.state_dict()
    stream.step(clip(1)[0])
    with torch.no_grad():
        next(stream.branch.model.parameters()).fill_(float("nan"))
    with pytest.raises(StateError):
        stream.save(file)
    assert file.read_bytes() == before
    stream.load(file)
    assert same_bits(stream.state_dict(), state)


def test_a_process_that_is_killed_while_it_saves_leaves_a_whole_file(tmp_path):
    """One that writes its state without a pause is killed; what is there is one of the states that it wrote."""
    file, code = tmp_path / "a.safetensors", (
        "import sys, torch\nfrom pathlib import Path\nfrom ttt_adapt.sharing.state_file import write_state\n"
        "for i in range(10**6):\n"
        "    write_state(Path(sys.argv[1]), {'i': i, 'x': torch.full((200_000,), float(i))})\n"
        "    if i == 2: print(flush=True)\n"
    )  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code, file], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate()
    state = read_state(file)
    assert state["i"] >= 2
    assert bool((state["x"] == state["i"]).all())
