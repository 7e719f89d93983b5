"""Sources that the server reads: only those that were allowed, and with the same predictions as anywhere."""

from __future__ import annotations

import os
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load

from serving import PNG, encoded, frames, opened, refused, runner, served
from ttt_adapt.errors import ConfigError
from ttt_adapt.serve.refusal import Refusal
from ttt_adapt.serve.sources import AllowedSources

pytestmark = pytest.mark.filterwarnings("ignore:this MAEBranch was never trained")


@pytest.fixture
def folder(tmp_path):
    """A folder whose files may be read, with a clip; a secret lies beside it."""
    clip = tmp_path / "videos" / "clip"
    clip.mkdir(parents=True)
    for index, frame in enumerate(frames(3)):
        Image.fromarray(frame).save(clip / f"{index}.png")
    (tmp_path / "secret.png").write_bytes(encoded(frames(1)[0]))
    (tmp_path / "videos-too").mkdir()
    (tmp_path / "videos" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "videos" / "circle").symlink_to("circle")
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video")
    os.mkfifo(tmp_path / "videos" / "pipe")
    return tmp_path / "videos"


def ended(client, place: str) -> dict:
    """The counters of a stream whose source has come to its end."""
    until = time.monotonic() + 20
    while (stats := client.get(place).json())["source"]["state"] in ("opening", "reading"):
        assert time.monotonic() < until, stats
        time.sleep(0.01)
    return stats


def test_a_file_of_the_folder_is_read_to_its_end_and_predicted_as_if_its_frames_were_posted(folder):
    adapting = runner()
    expected = [adapting.step(frame).clone() for frame in frames(3)]
    adapting.close()
    with served(sources=AllowedSources(folder)) as (client, _):
        place = opened(client)
        refused(client.get(f"{place}/prediction"), 409, "no_prediction")
        assert client.put(f"{place}/source", json={"source": "clip"}).status_code == 202
        stats = ended(client, place)
        assert (stats["source"]["state"], stats["source"]["source"], stats["source"]["error"]) == ("ended", "clip", "")
        assert stats["frames"]["adapted"] == 3
        last = client.get(f"{place}/prediction?answer=safetensors")
        assert torch.equal(load(last.content)["output"], expected[-1])
        assert client.get(f"{place}/prediction").content.startswith(b"\x89PNG")
        posted = client.post(f"{place}/frames", content=encoded(frames(1)[0]), headers=PNG)
        assert posted.headers["ttt-frame"] == "3"  # the stream goes on where its source ended


def test_a_source_that_breaks_is_told_without_the_place_of_the_folder(folder):
    with served(sources=AllowedSources(folder)) as (client, _):
        place = opened(client)
        client.put(f"{place}/source", json={"source": "broken.mp4"})
        stats = ended(client, place)
        assert stats["source"]["state"] == "failed"
        assert "broken.mp4" in stats["source"]["error"]
        assert str(folder) not in str(stats)
        assert client.delete(f"{place}/source").status_code == 200
        assert client.put(f"{place}/source", json={"source": "clip"}).status_code == 202  # another may follow
        assert ended(client, place)["source"]["state"] == "ended"


def test_a_stream_has_one_source_and_takes_no_posts_beside_it(folder):
    with served(sources=AllowedSources(folder, ["rtsp://127.0.0.1:9/"])) as (client, service):
        place = opened(client)
        go = service.worker.submit(lambda: time.sleep(0.3))  # the frames of the source wait meanwhile
        assert client.put(f"{place}/source", json={"source": "clip"}).status_code == 202
        refused(client.put(f"{place}/source", json={"source": "clip"}), 409, "has_source")
        refused(client.post(f"{place}/frames", content=encoded(frames(1)[0]), headers=PNG), 409, "has_source")
        go.result()
        assert client.delete(f"{place}/source").json()["source"]["state"] in ("stopped", "ended")
        assert client.post(f"{place}/frames", content=encoded(frames(1)[0]), headers=PNG).status_code == 200


def test_a_stream_that_is_closed_takes_its_source_along(folder):
    with served(sources=AllowedSources(folder)) as (client, service):
        place = opened(client)
        client.put(f"{place}/source", json={"source": "clip"})
        client.delete(place)
        assert opened(client) == place
        service.worker.submit(lambda: None).result()
        assert client.get(place).json()["frames"]["adapted"] == 0  # frames of the old one do not come into the new one


@pytest.mark.parametrize(
    "source",
    [
        "../secret.png", "clip/../../secret.png", "/etc/passwd", "link.png", "..", ".", "../videos-too", "../videos",
        "/dev/zero", "http://127.0.0.1/a.mp4", "file:///etc/passwd", "rtsp://u:p@10.0.0.9/x",
    ],
)  # fmt: skip
def test_what_lies_outside_is_refused(folder, source):
    with pytest.raises(Refusal) as refusal:
        AllowedSources(folder).find(source)
    assert (refusal.value.status, refusal.value.code) == (403, "source_not_allowed")


@pytest.mark.parametrize(
    "source", ["absent.mp4", "circle", "pipe", "0", "a\0b", "x" * 5000, "concat:clip|clip", "file:clip", "-", "~"]
)
def test_what_is_no_file_of_the_folder_is_not_found(folder, source):
    with pytest.raises(Refusal) as refusal:
        AllowedSources(folder).find(source)
    assert (refusal.value.status, refusal.value.code) == (404, "no_source")


def test_by_default_nothing_is_read(folder):
    for source in (str(folder / "clip"), "clip", "0", "rtsp://127.0.0.1/x"):
        with pytest.raises(Refusal, match="source is refused"):
            AllowedSources().find(source)
    with served() as (client, _):
        place = opened(client)
        answer = client.put(f"{place}/source", json={"source": "http://user:password@127.0.0.1/x"})
        assert "password" not in refused(answer, 403, "source_not_allowed")
        assert client.get(place).json()["source"] is None


def test_an_address_is_read_below_the_one_that_was_allowed_only():
    allowed = AllowedSources(None, ["rtsp://10.0.0.5/cams", "http://cameras.example:8080/"])
    for source in (
        "rtsp://10.0.0.5/cams", "rtsp://10.0.0.5/cams/1?x=2", "rtsp://user:pw@10.0.0.5/cams/1", "RTSP://10.0.0.5/cams/2",
        "http://Cameras.Example:8080/a/b.mjpeg",
    ):  # fmt: skip
        assert allowed.find(source) == source
    for source in (
        "rtsp://10.0.0.5/camsite", "rtsp://10.0.0.5/", "rtsp://10.0.0.5/cams/../admin", "rtsp://10.0.0.5/cams/%2e%2e/x",
        "rtsp://10.0.0.5:554/cams/1", "http://10.0.0.5/cams", "rtsp://10.0.0.55/cams", "http://cameras.example/",
        "http://cameras.example:8080@evil.example/", "http://evil.example#@cameras.example:8080/",
        "http://evil.example\\@cameras.example:8080/", "http://evil.example/@cameras.example:8080/",
        "http://cameras.example:8080/a b", "http://cameras.example:x/", "http://[::1/", "http:///x",
    ):  # fmt: skip
        with pytest.raises(Refusal, match="this address is not among"):
            allowed.find(source)


def test_what_may_be_read_is_checked_when_the_server_starts(tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        AllowedSources(tmp_path / "absent")
    for address in ("file:///etc/", "10.0.0.5", "concat://x/", "rtsp://", "rtsp://a/../b"):
        with pytest.raises(ConfigError, match="source_url is"):
            AllowedSources(None, [address])
