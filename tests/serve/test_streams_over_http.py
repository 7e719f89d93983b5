"""Streams over HTTP: what comes back is what an adapter gives, and what is refused changes nothing."""

from __future__ import annotations

import io
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from arm_inputs import CONFIG, checkpoint
from serving import PNG, STATE, encoded, frames, opened, refused, runner, scores, served
from ttt_adapt.evaluation.adapt_video import start_runner
from ttt_adapt.serve.limits import Limits
from ttt_adapt.serve.metrics import Metrics
from ttt_adapt.serve.streams import ServedStreams

pytestmark = pytest.mark.filterwarnings("ignore:this MAEBranch was never trained")


def png_of_claimed_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


BAD_FRAMES = {
    "empty": (b"", PNG, 422, "bad_picture"),
    "garbage": (b"no picture" * 100, PNG, 422, "bad_picture"),
    "torn": (encoded(frames(1)[0])[:-300], PNG, 422, "bad_picture"),
    "gif": (encoded(frames(1)[0], "GIF"), PNG, 422, "bad_picture"),
    "bomb": (png_of_claimed_size(50_000, 50_000), PNG, 422, "bad_picture"),
    "more pixels than may be": (png_of_claimed_size(8_000, 8_000), PNG, 422, "bad_picture"),
    "strip": (encoded(np.zeros((4, 1000, 3), np.uint8)), PNG, 422, "bad_frame"),
    "another size": (encoded(np.zeros((48, 96, 3), np.uint8)), PNG, 422, "bad_frame"),
    "too many bytes": (b"\0" * 300_000, PNG, 413, "too_large"),
    "another type": (encoded(frames(1)[0]), {"content-type": "image/webp"}, 415, "wrong_media_type"),
    "no type": (encoded(frames(1)[0]), {}, 415, "wrong_media_type"),
}


def test_streams_that_take_turns_give_what_adapters_of_their_own_give_bit_for_bit():
    videos = [frames(4, seed) for seed in range(3)]
    alone = []
    for video in videos:
        adapting = runner()
        alone.append([adapting.step(frame).clone() for frame in video])
        adapting.close()
    with served() as (client, _):
        places = [opened(client, f"cam-{i}") for i in range(len(videos))]
        for index, turn in enumerate(zip(*videos, strict=True)):
            for place, frame, expected in zip(places, turn, alone, strict=True):
                assert torch.equal(scores(client, place, frame), expected[index])
    assert not torch.equal(alone[0][-1], alone[1][-1])


def test_clients_that_post_at_once_get_what_each_alone_would_get():
    videos = [frames(3, seed) for seed in range(3)]
    alone = []
    for video in videos:
        adapting = runner()
        alone.append([adapting.step(frame).clone() for frame in video])
        adapting.close()
    found: dict[int, list[torch.Tensor]] = {}
    with served() as (client, _):

        def watch(number: int) -> None:
            place = opened(client, f"cam-{number}")
            found[number] = [scores(client, place, frame) for frame in videos[number]]

        threads = [threading.Thread(target=watch, args=(number,)) for number in range(len(videos))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, expected in enumerate(alone):
        assert all(map(torch.equal, found[number], expected))


def test_a_png_holds_the_most_likely_class_of_each_pixel_with_the_colours_of_the_classes():
    [frame] = frames(1)
    adapting = runner()
    expected = adapting.step(frame).argmax(1)[0].numpy()
    adapting.close()
    with served() as (client, service):
        answer = client.post(f"{opened(client)}/frames", content=encoded(frame), headers=PNG)
        picture = Image.open(io.BytesIO(answer.content))
        assert (answer.headers["content-type"], picture.format, picture.mode) == ("image/png", "PNG", "P")
        assert np.array_equal(np.asarray(picture), expected)
        palette = service.checkpoint.task.palette
        assert np.array_equal(np.asarray(picture.convert("RGB")), palette[expected])
        assert (answer.headers["ttt-frame"], answer.headers["ttt-adapted"]) == ("0", "true")


def test_jpeg_is_taken_as_pillow_decodes_it():
    content = encoded(frames(1)[0], "JPEG")
    adapting = runner()
    expected = adapting.step(np.asarray(Image.open(io.BytesIO(content))))
    adapting.close()
    with served() as (client, _):
        place = opened(client)
        headers = {"content-type": "image/jpeg; charset=binary"}
        answer = client.post(f"{place}/frames?answer=safetensors", content=content, headers=headers)
        assert torch.equal(load(answer.content)["output"], expected)


def test_a_frame_that_is_predicted_only_does_not_enter_the_stream():
    first, second = frames(2)
    adapting = runner()
    expected = [adapting.step(first).clone(), adapting.step(second).clone()]
    adapting.close()
    with served() as (client, _):
        place = opened(client)
        assert torch.equal(scores(client, place, first), expected[0])
        answer = client.post(f"{place}/frames?adapt=false", content=encoded(second), headers=PNG)
        assert answer.headers["ttt-adapted"] == "false"
        assert "ttt-frame" not in answer.headers
        assert torch.equal(scores(client, place, second), expected[1])
        assert client.get(place).json()["frames"] == {"adapted": 2, "skipped": 0, "predicted": 1, "refused": 0}


def test_what_cannot_be_used_is_refused_and_changes_nothing():
    first, second = frames(2)
    adapting = runner()
    expected = [adapting.step(first).clone(), adapting.step(second).clone()]
    adapting.close()
    with served(Limits(frame_bytes=200_000)) as (client, _):
        place = opened(client)
        assert torch.equal(scores(client, place, first), expected[0])
        for content, headers, status, code in BAD_FRAMES.values():
            refused(client.post(f"{place}/frames", content=content, headers=headers), status, code)
        for query in ("answer=gif", "adapt=perhaps"):
            answer = client.post(f"{place}/frames?{query}", content=encoded(second), headers=PNG)
            refused(answer, 422, "bad_request")
        assert torch.equal(scores(client, place, second), expected[1])
        decoded = sum(code in ("bad_picture", "bad_frame") for *_, code in BAD_FRAMES.values())
        assert client.get(place).json()["frames"] == {"adapted": 2, "skipped": 0, "predicted": 0, "refused": decoded}


def test_a_body_whose_length_is_not_told_is_cut_off_where_it_is_too_large():
    with served(Limits(frame_bytes=1000)) as (client, _):
        place = opened(client)
        parts = (b"x" * 100 for _ in range(1000))
        refused(client.post(f"{place}/frames", content=parts, headers=PNG), 413, "too_large")


def test_a_reset_begins_the_stream_anew():
    first, second = frames(2)
    with served() as (client, _):
        place = opened(client)
        fresh = scores(client, place, first)
        scores(client, place, second)
        assert client.post(f"{place}/reset").status_code == 200
        assert torch.equal(scores(client, place, first), fresh)


def test_a_stream_that_was_skipped_says_why():
    made = checkpoint()
    adapting = start_runner(made, CONFIG.replace(every=2), None, None)
    streams = ServedStreams(made, adapting.adapter, None, Limits(), Metrics())
    streams.open("cam")
    answers = [streams.post("cam", encoded(frame), "png", True) for frame in frames(3)]
    assert [answer.reason for answer in answers] == ["", "every", ""]
    assert streams.find("cam").stats["skipped"] == {"every": 1}
    adapting.close()


# ---- opening and closing


def test_a_name_is_open_once_and_free_when_it_was_closed():
    with served() as (client, _):
        place = opened(client)
        refused(client.post("/v1/streams", json={"name": "cam"}), 409, "stream_is_open")
        assert client.get("/v1/streams").json() == {"streams": ["cam"]}
        answer = client.delete(place)
        assert (answer.status_code, answer.content) == (204, b"")
        assert client.get("/v1/streams").json() == {"streams": []}
        assert opened(client) == place


NO_NAMES = [
    b"", b"{", b"[]", b"null", b'"cam"', b"{}", b'{"name": 3}', b'{"name": ""}', b'{"name": "a/b"}', b'{"name": ".."}',
    b'{"name": "a\\n"}', b'{"name": "cam", "more": 1}', b'{"name": "' + b"a" * 65 + b'"}', b"[" * 60_000, b"\xff",
]  # fmt: skip


def test_a_stream_that_has_no_name_is_not_opened():
    with served() as (client, _):
        for body in NO_NAMES:
            answer = client.post("/v1/streams", content=body, headers={"content-type": "application/json"})
            refused(answer, 422, "bad_request")
        assert client.get("/v1/streams").json() == {"streams": []}


def test_json_of_another_type_or_without_an_end_is_refused():
    with served() as (client, _):
        refused(client.post("/v1/streams", content=b"{}"), 415, "wrong_media_type")
        headers = {"content-type": "application/json"}
        refused(client.post("/v1/streams", content=b" " * 70_000, headers=headers), 413, "too_large")


def test_more_streams_than_may_be_are_refused():
    with served(Limits(streams=2)) as (client, _):
        opened(client, "a")
        opened(client, "b")
        answer = client.post("/v1/streams", json={"name": "c"})
        refused(answer, 429, "too_many_streams")
        assert int(answer.headers["retry-after"]) > 0
        client.delete("/v1/streams/a")
        opened(client, "c")


def test_what_is_not_there_is_told_as_such():
    with served() as (client, _):
        json = {"content-type": "application/json"}
        asked = [
            client.get("/v1/streams/cam"),
            client.delete("/v1/streams/cam"),
            client.post("/v1/streams/cam/reset"),
            client.post("/v1/streams/cam/frames", content=encoded(frames(1)[0]), headers=PNG),
            client.get("/v1/streams/cam/prediction"),
            client.get("/v1/streams/cam/state"),
            client.put("/v1/streams/cam/state", content=b"x", headers=STATE),
            client.put("/v1/streams/cam/source", content=b'{"source": "a.mp4"}', headers=json),
            client.delete("/v1/streams/cam/source"),
        ]
        for answer in asked:
            refused(answer, 404, "no_stream")
        refused(client.get("/nothing"), 404, "not_found")
        answer = client.put("/v1/streams")
        refused(answer, 405, "no_such_method")
        assert answer.headers["allow"] == "GET, POST"


# ---- states


def test_a_state_that_was_kept_goes_on_with_the_same_bits_in_another_stream():
    video = frames(4)
    with served() as (client, _):
        place, other = opened(client), opened(client, "other")
        for frame in video[:2]:
            scores(client, place, frame)
        kept = client.get(f"{place}/state")
        assert kept.headers["content-type"] == "application/octet-stream"
        expected = [scores(client, place, frame) for frame in video[2:]]
        scores(client, other, video[3])
        assert client.put(f"{other}/state", content=kept.content, headers=STATE).status_code == 200
        assert all(map(torch.equal, [scores(client, other, frame) for frame in video[2:]], expected))


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    video = frames(3)
    adapting = runner()
    expected = [adapting.step(frame).clone() for frame in video]
    adapting.close()
    with served(Limits(state_bytes=10**7)) as (client, _):
        place = opened(client)
        for frame in video[:2]:
            scores(client, place, frame)
        kept = client.get(f"{place}/state").content
        bad = [
            b"",
            b"no state",
            kept[:-100],
            kept[: len(kept) // 2],
            kept + b"x",
            kept.replace(b"batch_size", b"batch_sizf"),
        ]
        for content in bad:
            refused(client.put(f"{place}/state", content=content, headers=STATE), 422, "bad_state")
        refused(client.put(f"{place}/state", content=kept, headers=PNG), 415, "wrong_media_type")
        refused(client.put(f"{place}/state", content=b"\0" * (10**7 + 1), headers=STATE), 413, "too_large")
        assert torch.equal(scores(client, place, video[2]), expected[2])


def test_a_state_that_was_downloaded_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with served() as (client, _):
        place = opened(client)
        kept = client.get(f"{place}/state").content
        client.put(f"{place}/state", content=kept, headers=STATE)
    assert list(tmp_path.iterdir()) == []
