"""The server as a process on loopback: clients that vanish, signals, and the ten lines of the example."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from serving import TOKEN, encoded, frames, opened, refused, scores

pytest.importorskip("uvicorn")
import httpx

pytestmark = pytest.mark.filterwarnings("ignore:this MAEBranch was never trained")
ROOT = Path(__file__).parents[2]


@contextmanager
def running(checkpoint: Path, *options: str, **environment: str):
    """A server of this checkpoint, and its address."""
    command = [sys.executable, "-W", "ignore", "-m", "ttt_adapt", "serve", "--port=0", "--device=cpu", *options]
    process = subprocess.Popen(
        [*command, f"--checkpoint={checkpoint}", "--set=window=3", "--set=batch_size=2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"http://\S+:\d+", line):
                break
        assert lines, "the server said nothing"
        assert found, "".join(lines)
        yield found[0], process
    finally:
        process.kill()
        process.communicate()


def test_clients_that_vanish_change_nothing_and_a_signal_lets_the_frame_in_work_be_finished(model_folder):
    video = frames(3)
    with running(model_folder / "model0.safetensors") as (address, process), httpx.Client(base_url=address) as client:
        place, other = opened(client), opened(client, "other")
        port, picture = int(address.rpartition(":")[2]), encoded(video[1])
        expected = [scores(client, other, frame) for frame in video]
        assert torch.equal(scores(client, place, video[0]), expected[0])
        for sent in (0, 10, len(picture) - 1):  # in the middle of the body
            with socket.create_connection(("127.0.0.1", port)) as gone:
                head = f"POST {place}/frames HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
                gone.sendall(f"{head}Content-Length: {len(picture)}\r\n\r\n".encode() + picture[:sent])
        assert torch.equal(scores(client, place, video[1]), expected[1])
        with socket.create_connection(("127.0.0.1", port)) as last:
            head = f"POST {place}/frames?answer=safetensors HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
            last.sendall(f"{head}Content-Length: {len(encoded(video[2]))}\r\n\r\n".encode() + encoded(video[2]))
            time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            answer = b""
            while part := last.recv(2**16):
                answer += part
        head, _, content = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        assert torch.equal(load(content)["output"], expected[2])
        assert process.wait(60) == 128 + signal.SIGTERM
        assert "stopped by SIGTERM" in process.stdout.read()


@pytest.fixture(scope="module")
def guarded(model_folder):
    """The address of a server that others reach, with a token."""
    options = ("--host=0.0.0.0", "--streams=10000")
    with running(model_folder / "model0.safetensors", *options, TTT_ADAPT_TOKEN=TOKEN) as (address, _):
        yield address.replace("0.0.0.0", "127.0.0.1")


def test_the_token_of_the_environment_is_asked_for(guarded):
    refused(httpx.get(f"{guarded}/v1/streams"), 401, "no_token")
    assert httpx.get(f"{guarded}/v1/streams", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_the_client_of_the_examples_gets_a_prediction_of_each_picture(guarded, tmp_path):
    for index, frame in enumerate(frames(2)):
        (tmp_path / f"{index}.png").write_bytes(encoded(frame))
    client = [sys.executable, str(ROOT / "examples" / "serve_client.py"), guarded, str(tmp_path)]
    environment = {**os.environ, "TTT_ADAPT_TOKEN": TOKEN}
    done = subprocess.run(client, capture_output=True, text=True, cwd=tmp_path, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0.png: frame 0, adapted: true", "1.png: frame 1, adapted: true"]
    assert (tmp_path / "1.labels.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_description_is_right_for_whatever_is_asked(guarded, tmp_path):
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    settings = ROOT / "tests" / "serve" / "schemathesis.toml"
    done = subprocess.run(
        [Path(sys.executable).with_name("st"), f"--config-file={settings}", "run", "--max-examples=3", "--workers=1",
         f"--header=Authorization: Bearer {TOKEN}", f"{guarded}/openapi.json"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
