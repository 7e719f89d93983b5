"""A small service for tests, and what clients send to it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("fastapi", reason='no server: pip install "ttt-adapt[serve]"')
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

import torch
from PIL import Image
from safetensors.torch import load
from starlette.testclient import TestClient

from arm_inputs import CONFIG, checkpoint
from arm_inputs import frames as labelled
from ttt_adapt.evaluation.adapt_video import start_runner
from ttt_adapt.evaluation.runners.streaming import Adapting
from ttt_adapt.serve.app import make_app
from ttt_adapt.serve.limits import Limits
from ttt_adapt.serve.service import Service

LOCAL = "http://127.0.0.1"
TOKEN = "a-token-of-these-tests"
PNG, STATE = {"content-type": "image/png"}, {"content-type": "application/octet-stream"}


def frames(count: int, seed: int = 0) -> list[np.ndarray]:
    return [frame for frame, _ in labelled(count, seed)]


def encoded(frame: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, kind)
    return file.getvalue()


def runner(**changes) -> Adapting:
    """An adapter of its own, over a model of its own; always the same one."""
    made = start_runner(checkpoint(), CONFIG.replace(**changes), None, None)
    assert isinstance(made, Adapting)
    return made


@contextmanager
def served(limits: Limits | None = None, token: str | None = None, **more) -> Iterator[tuple[TestClient, Service]]:
    """A client of a service that runs, and the service."""
    made = checkpoint()
    adapting = start_runner(made, CONFIG, None, None)
    assert isinstance(adapting, Adapting)
    service = Service(made, adapting.adapter, limits=limits or Limits(), **more)
    with TestClient(make_app(service, token), base_url=LOCAL, raise_server_exceptions=False) as client:
        yield client, service
    adapting.close()


def opened(client: TestClient, name: str = "cam") -> str:
    answer = client.post("/v1/streams", json={"name": name})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/v1/streams/{name}"
    return answer.headers["location"]


def scores(client: TestClient, place: str, frame: np.ndarray) -> torch.Tensor:
    """What the model returns for a frame, over HTTP."""
    answer = client.post(f"{place}/frames?answer=safetensors", content=encoded(frame), headers=PNG)
    assert answer.status_code == 200, answer.text
    return load(answer.content)["output"]


def refused(answer, status: int, code: str) -> str:
    """Check that an answer is an error of the one shape; returns its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"code", "message"}
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["message"]
    return answer.json()["error"]["message"]
