"""Who may come in, how much at once, and what is counted."""

from __future__ import annotations

import asyncio
import sys
import threading
import time

import pytest

from serving import PNG, TOKEN, encoded, frames, opened, refused, scores, served
from ttt_adapt.errors import ConfigError, MissingPackageError
from ttt_adapt.serve.access import check_access
from ttt_adapt.serve.bodies import body
from ttt_adapt.serve.limits import Limits, Rate
from ttt_adapt.serve.refusal import Refusal
from ttt_adapt.serve.server import read_token, serve
from ttt_adapt.serve.worker import Worker

pytestmark = pytest.mark.filterwarnings("ignore:this MAEBranch was never trained")


# ---- the queue and the worker


def test_a_full_queue_is_told_with_the_time_to_wait_and_what_was_taken_is_done():
    picture = encoded(frames(1)[0])
    with served(Limits(queue=1)) as (client, service):
        place, go = opened(client), threading.Event()
        begun = threading.Event()
        service.worker.submit(lambda: (begun.set(), go.wait()))
        begun.wait()
        waiting = service.worker.submit(lambda: "done")
        answers = [
            client.post(f"{place}/frames", content=picture, headers=PNG),
            client.post(f"{place}/reset"),
            client.get(f"{place}/state"),
            client.delete(place),
        ]
        for answer in answers:
            refused(answer, 429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
        assert client.get(place).json()["frames"]["refused"] == 0  # counters do not wait for the model
        assert client.get("/ready").status_code == 200
        go.set()
        assert waiting.result(10) == "done"
        assert client.post(f"{place}/frames", content=picture, headers=PNG).status_code == 200


def test_a_worker_runs_calls_in_order_hands_errors_back_and_goes_on():
    worker, order = Worker(10), []
    failed = worker.submit(lambda: 1 / 0)
    futures = [worker.submit(lambda i=i: order.append(i)) for i in range(5)]
    with pytest.raises(ZeroDivisionError):
        failed.result(10)
    for future in futures:
        future.result(10)
    assert order == list(range(5))
    worker.close()


def test_a_worker_that_closes_finishes_what_it_took_and_refuses_the_rest():
    worker, go = Worker(2), threading.Event()
    taken = [worker.submit(lambda: go.wait(10)), worker.submit(lambda: "second")]
    closing = threading.Thread(target=worker.close)
    closing.start()
    while worker.alive:
        time.sleep(0.001)
    with pytest.raises(Refusal, match="stopping") as refusal:
        worker.submit(lambda: None)
    assert refusal.value.status == 503
    go.set()
    closing.join(10)
    assert [future.result(0) for future in taken] == [True, "second"]


def test_a_call_that_waits_for_a_place_gets_one_and_none_once_the_worker_is_closed():
    worker, go = Worker(1), threading.Event()
    begun = threading.Event()
    worker.submit(lambda: (begun.set(), go.wait(10)))
    begun.wait()
    worker.submit(lambda: None)
    found = []
    patient = threading.Thread(target=lambda: found.append(worker.submit(lambda: "late", patient=True).result(10)))
    patient.start()
    go.set()
    patient.join(10)
    assert found == ["late"]
    worker.close()
    with pytest.raises(Refusal, match="stopping"):
        worker.submit(lambda: None, patient=True)


def test_a_call_that_nobody_waits_for_any_more_does_not_run():
    worker, go, ran = Worker(5), threading.Event(), []
    begun = threading.Event()
    worker.submit(lambda: (begun.set(), go.wait(10)))
    begun.wait()
    gone = worker.submit(lambda: ran.append("gone"))
    assert gone.cancel()
    go.set()
    worker.submit(lambda: ran.append("next")).result(10)
    assert ran == ["next"]
    worker.close()


# ---- limits


def test_a_rate_lets_so_many_pass_in_a_second():
    rate = Rate(2.0)
    assert [rate.wait(0.0), rate.wait(0.0)] == [0.0, 0.0]  # after a rest, a second's worth
    assert rate.wait(0.0) == pytest.approx(0.5)
    assert rate.wait(0.25) == pytest.approx(0.25)
    assert [rate.wait(0.5), rate.wait(100.0), rate.wait(100.0)] == [0.0, 0.0, 0.0]
    assert rate.wait(100.0) == pytest.approx(0.5)
    assert all(Rate(None).wait(0.0) == 0.0 for _ in range(100))


def test_frames_that_come_too_fast_are_refused():
    picture = encoded(frames(1)[0])
    with served(Limits(rate=0.01)) as (client, _):
        place = opened(client)
        assert client.post(f"{place}/frames", content=picture, headers=PNG).status_code == 200
        answer = client.post(f"{place}/frames", content=picture, headers=PNG)
        refused(answer, 429, "too_fast")
        assert 1 < int(answer.headers["retry-after"]) <= 100
        assert client.post(f"{opened(client, 'other')}/frames", content=picture, headers=PNG).status_code == 200


@pytest.mark.parametrize(
    "wrong", [{"streams": 0}, {"queue": 1.5}, {"rate": -1}, {"rate": float("nan")}, {"frame_bytes": True}]
)
def test_limits_that_are_none_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is"):
        Limits(**wrong)


def test_a_body_that_does_not_come_in_time_or_is_cut_short_is_given_up():
    from starlette.requests import Request

    async def stalled() -> dict:
        await asyncio.sleep(60)
        return {"type": "http.request"}

    async def gone() -> dict:
        return {"type": "http.disconnect"}

    for receive, status, code in ((stalled, 408, "too_slow"), (gone, 400, "cut_short")):
        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        with pytest.raises(Refusal) as refusal:
            asyncio.run(body(request, 100, 0.05))
        assert (refusal.value.status, refusal.value.code) == (status, code)


# ---- who may come in


def test_a_request_needs_the_token_and_nothing_else_will_do():
    with served(token=TOKEN) as (client, _):
        wrong = [
            {}, {"authorization": TOKEN}, {"authorization": f"Basic {TOKEN}"}, {"authorization": "Bearer "},
            {"authorization": f"Bearer {TOKEN}x"}, {"authorization": f"Bearer {TOKEN[:-1]}"},
            {"authorization": "Bearer \xe9".encode("latin-1")},
        ]  # fmt: skip
        for headers in wrong:
            for method, path in (("GET", "/v1/streams"), ("POST", "/v1/streams"), ("GET", "/metrics"), ("GET", "/no")):
                answer = client.request(method, path, headers=headers)
                refused(answer, 401, "no_token")
                assert answer.headers["www-authenticate"] == "Bearer"
        assert [client.get(path).status_code for path in ("/health", "/ready")] == [200, 200]
        right = {"authorization": f"bearer {TOKEN}"}
        assert client.get("/v1/streams", headers=right).json() == {"streams": []}
        assert client.get("/v1/streams", headers={**right, "host": "cameras.example"}).status_code == 200


def test_without_a_token_pages_of_browsers_and_other_names_are_refused():
    with served() as (client, _):
        foreign = [
            {"host": "evil.example"}, {"host": "127.0.0.1.evil.example"}, {"host": "[::1"}, {"host": ""},
            {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:1"},
        ]  # fmt: skip
        for headers in foreign:
            refused(client.post("/v1/streams", json={"name": "cam"}, headers=headers), 403, "not_local")
        assert client.get("/v1/streams").json() == {"streams": []}
        for host in ("localhost", "localhost:8000", "127.0.0.1:80", "[::1]:8000"):
            assert client.get("/v1/streams", headers={"host": host}).status_code == 200


def test_a_host_that_others_reach_needs_a_token(tmp_path):
    for host in ("0.0.0.0", "::", "192.168.1.5", "cameras.example", ""):
        with pytest.raises(ConfigError, match="there is no token"):
            check_access(host, None)
        check_access(host, TOKEN)
    for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"):
        check_access(host, None)
    for token in ("", "short", "with a blank in the middle", "ü" * 20):
        with pytest.raises(ConfigError, match="the token is shorter"):
            check_access("127.0.0.1", token)
    with pytest.raises(ConfigError, match="there is no token"):  # before the checkpoint is read
        serve(tmp_path / "absent.safetensors", host="0.0.0.0")


def test_the_token_is_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.delenv("TTT_ADAPT_TOKEN", raising=False)
    assert read_token(tmp_path / "token") == TOKEN
    assert read_token(None) is None
    monkeypatch.setenv("TTT_ADAPT_TOKEN", "of the environment")
    assert read_token(None) == "of the environment"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(tmp_path)


# ---- what is counted, what fails


def test_requests_and_frames_are_counted():
    with served() as (client, service):
        place = opened(client)
        for frame in frames(2):
            scores(client, place, frame)
        client.post(f"{place}/frames?adapt=false", content=encoded(frames(1)[0]), headers=PNG)
        client.post(f"{place}/frames", content=b"garbage", headers=PNG)
        client.get("/no/such/path")
        client.request("BREW", "/health")
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        lines = answer.text.splitlines()
        for line in (
            'ttt_adapt_frames_total{result="adapted",stream="cam"} 2.0',
            'ttt_adapt_frames_total{result="predicted",stream="cam"} 1.0',
            'ttt_adapt_frames_total{result="refused",stream="cam"} 1.0',
            'ttt_adapt_frames_total{result="skipped",stream="cam"} 0.0',
            'ttt_adapt_requests_total{method="POST",route="/v1/streams/{name}/frames",status="200"} 3.0',
            'ttt_adapt_requests_total{method="POST",route="/v1/streams/{name}/frames",status="422"} 1.0',
            'ttt_adapt_requests_total{method="GET",route="none",status="404"} 1.0',
            'ttt_adapt_requests_total{method="other",route="/health",status="405"} 1.0',
            "ttt_adapt_frame_seconds_count 3.0",
            "ttt_adapt_streams 1.0",
            "ttt_adapt_queue 0.0",
        ):
            assert line in lines
        client.delete(place)
        assert 'stream="cam"' not in client.get("/metrics").text
        assert service.streams.names == []


def test_a_failure_that_nobody_expected_is_told_without_its_text_and_the_server_goes_on(monkeypatch, caplog):
    with served() as (client, service):
        place = opened(client)

        def fail(*_):
            raise RuntimeError("a secret of the machine")

        with monkeypatch.context() as patch:
            patch.setattr(service.streams, "reset", fail)
            answer = client.post(f"{place}/reset")
        assert "secret" not in refused(answer, 500, "failed")
        assert "a secret of the machine" in caplog.text
        assert client.post(f"{place}/reset").status_code == 200
        assert 'route="/v1/streams/{name}/reset",status="500"} 1.0' in client.get("/metrics").text


def test_a_server_that_stops_is_not_ready():
    with served() as (client, service):
        opened(client)
        service.worker.close()
        refused(client.get("/ready"), 503, "stopping")
        refused(client.post("/v1/streams", json={"name": "more"}), 503, "stopping")
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("package", ["fastapi", "prometheus_client", "uvicorn"])
def test_a_missing_package_is_told_with_the_command_that_installs_it(package, monkeypatch, model_folder):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=r'pip install "ttt-adapt\[serve\]"'):
        serve(model_folder / "model0.safetensors")


def test_the_description_names_each_route_and_the_token():
    with served(token=TOKEN) as (client, _):
        found = client.get("/openapi.json", headers={"authorization": f"Bearer {TOKEN}"}).json()
        assert found["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
        assert all("security" in each for path, of in found["paths"].items() for each in of.values() if "/v1" in path)
    with served() as (client, _):
        assert set(client.get("/openapi.json").json()["paths"]) == set(found["paths"])
