"""Live sources, against a camera on loopback that stalls, breaks, refuses, comes back and changes its size."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest

from film_files import flat, write
from live_server import Camera, answer, frames, hang_up, stall, stream, wait_until
from ttt_adapt.errors import ConfigError, VideoError
from ttt_adapt.video import Reconnect, VideoReader, open_video
from ttt_adapt.video.stats import FrameCounts

pytest.importorskip("PIL")

LEVELS = list(range(0, 200, 10))
QUICK = Reconnect(tries=3, open_timeout=3, read_timeout=0.2, first_pause=0.01, longest_pause=0.05)
BRIEF = Reconnect(tries=0, read_timeout=0.5)
LOGIN, QUERY = "viewer:gehe%40im@", "?token=t0psecret&channel=1"
SECRETS = ("viewer", "gehe", "t0psecret")


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "read-ahead" in thread.name]


@pytest.fixture(autouse=True)
def _nothing_is_left():
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.is_dir() else 0
    yield
    wait_until(lambda: not our_threads())
    if before:
        wait_until(lambda: len(list(descriptors.iterdir())) <= before)


def level(frame: np.ndarray) -> int:
    return round(float(frame.mean()))


def near(found: list[int], expected: list[int]) -> bool:
    return len(found) == len(expected) and all(abs(a - b) <= 2 for a, b in zip(found, expected, strict=True))


def read(camera: Camera, count: int, limits: Reconnect = QUICK, **more) -> tuple[list[int], list[str], object]:
    said: list[str] = []
    with open_video(camera.url, keep="every", reconnect=limits, say=said.append, **more) as video:
        found = []
        for frame in video:
            found.append(level(frame))
            if len(found) == count:
                break
        return found, said, video.stats


def test_a_stalled_source_is_opened_again():
    with Camera(frames(LEVELS, stall), frames(LEVELS, stall)) as camera:
        found, said, stats = read(camera, 40)
    assert near(found, 2 * LEVELS)
    assert "is lost: no frame for 0.2 s; it is opened again" in said[0]
    assert " is back after " in said[1]
    assert len(said) == 2
    assert (stats.lost, stats.tries, stats.taken.frames, stats.dropped.frames) == (1, 1, 40, 0)


def test_a_source_that_ends_refuses_and_fails_comes_back():
    with Camera(frames(LEVELS), answer("503 Busy"), answer("401 No"), frames(LEVELS, stall)) as camera:
        found, said, stats = read(camera, 40)
    assert near(found, 2 * LEVELS)
    assert [line.split(" ", 1)[1].split(";")[0] for line in said[:3]] == [
        "is lost: the connection broke off",
        "cannot be opened: Server returned 5XX Server Error reply",
        "cannot be opened: Server returned 401 Unauthorized (authorization failed)",
    ]
    assert stats.tries == 3


def test_a_source_that_breaks_and_does_not_come_back_is_an_error_that_says_why():
    with Camera(frames(LEVELS, stall), answer("404 Gone")) as camera:
        with pytest.raises(
            VideoError, match=r"lost at frame 20: no frame for 0\.2 s; 3 tries in .*404 Not Found"
        ) as caught:
            read(camera, 40)
        assert camera.asked == 4
    assert "Immediate exit" not in str(caught.value)


def test_a_reset_connection_is_opened_again():
    with Camera(frames(LEVELS, hang_up, pause=0.005), frames(LEVELS, stall)) as camera:
        found, said, _ = read(camera, 25)
    assert len(found) == 25
    assert sum(" is lost: " in line for line in said) == 1


def test_a_transport_stream_that_ends_is_opened_again_or_ends_the_video(tmp_path):
    data = write(tmp_path / "a.ts", flat(12)).read_bytes()
    with Camera(stream(data)) as camera:
        found, said, _ = read(camera, 24)
    assert near(found[:12], found[12:])
    assert len(set(found)) == 12
    assert "is lost: the source ended the connection" in said[0]
    with Camera(stream(data)) as camera:
        assert near(read(camera, 24, Reconnect(tries=0))[0], found[:12])


def test_silence_ends_a_source_that_accepts_and_says_nothing():
    limits = Reconnect(
        tries=None, max_silence=0.5, open_timeout=0.2, read_timeout=5, first_pause=0.01, longest_pause=0.02
    )
    begun = time.monotonic()
    with Camera(frames(LEVELS, stall), stall) as camera, pytest.raises(VideoError, match="`max_silence`"):
        read(camera, 40, limits)
    assert time.monotonic() - begun < 4


def test_with_no_tries_a_broken_source_is_an_error_at_once():
    with Camera(frames(LEVELS)) as camera:
        with pytest.raises(VideoError, match="broke at frame 20: the connection broke off"):
            read(camera, 40, Reconnect(tries=0))
        assert camera.asked == 1


def test_a_source_that_starts_late_is_waited_for_where_that_is_asked_for():
    late = Reconnect(tries_at_start=3, first_pause=0.01)
    with Camera(answer("503 Busy"), answer("503 Busy"), frames(LEVELS, stall)) as camera:
        assert near(read(camera, 5, late)[0], LEVELS[:5])
    with Camera(answer("503 Busy")) as camera:
        with pytest.raises(VideoError, match="cannot be opened: Server returned 5XX"):
            read(camera, 5)
        assert camera.asked == 1


# ---- which frames


def test_the_newest_frame_wins_and_the_others_are_counted():
    with Camera(frames([*LEVELS, 250], stall)) as camera, open_video(camera.url, reconnect=BRIEF) as video:
        stream = iter(video)
        next(stream)
        wait_until(lambda: video.stats.read.frames == 21)
        assert abs(level(next(stream)) - 250) <= 2
        stats = video.stats
        assert stats.read.frames == stats.taken.frames + stats.dropped.frames
        assert stats.taken.frames == 2
        stream.close()


def test_every_frame_is_kept_where_that_is_asked_for():
    with (
        Camera(frames(LEVELS, stall)) as camera,
        open_video(camera.url, keep="every", read_ahead=2, reconnect=BRIEF) as video,
    ):
        stream = iter(video)
        found = [level(next(stream)) for _ in range(5)]
        time.sleep(0.05)
        found += [level(next(stream)) for _ in range(15)]
        stream.close()
    assert near(found, LEVELS)


def test_files_wait_unless_the_newest_frame_is_asked_for_and_then_they_play_at_their_rate(tmp_path):
    write(tmp_path / "a.mp4", flat(10))
    with open_video(tmp_path / "a.mp4") as video:
        for _ in video:
            time.sleep(0.01)
        assert (video.stats.taken.frames, video.stats.dropped.frames) == (10, 0)
    with open_video(tmp_path / "a.mp4", keep="newest") as video:
        begun = time.monotonic()
        taken = 0
        for _ in video:
            taken += 1
            time.sleep(3 / video.fps)
        assert time.monotonic() - begun > 8 / video.fps
        assert video.stats.read.frames == 10
        assert 0 < video.stats.dropped.frames == 10 - taken


def test_a_folder_has_no_rate_at_which_its_newest_frame_could_come(tmp_path):
    from PIL import Image

    Image.fromarray(flat(1)[0]).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"keep is 'newest', and .* has no frame rate .*: leave keep out"):
        open_video(tmp_path, keep="newest")


@pytest.mark.parametrize("wrong", [{"keep": "all"}, {"on_resize": "scale"}])
def test_unknown_choices_are_refused_before_anything_is_opened(wrong):
    with Camera(frames(LEVELS)) as camera:
        with pytest.raises(ConfigError, match="expected .* or "):
            open_video(camera.url, **wrong)
        assert camera.asked == 0


# ---- another size


def test_another_size_is_a_new_video_of_a_live_source_and_it_is_said():
    said: list[str] = []
    sizes = []
    with (
        Camera(frames(LEVELS), frames(LEVELS, stall, size=(32, 48))) as camera,
        open_video(camera.url, keep="every", reconnect=QUICK, say=said.append) as video,
    ):
        for frame in video:
            assert frame.shape[:2] == video.size
            sizes.append(video.size)
            if len(sizes) == 40:
                break
        assert video.stats.resized == 1
    assert sizes == [(48, 64)] * 20 + [(32, 48)] * 20
    assert "changes its size: 32 x 48 pixels high and wide after 48 x 64; a new video begins" in said[-1]


def test_another_size_is_an_error_where_that_is_asked_for():
    with (
        Camera(frames(LEVELS), frames(LEVELS, stall, size=(32, 48))) as camera,
        pytest.raises(VideoError, match="changes its size at frame 20: 32 x 48 .* after 48 x 64.* `on_resize`"),
    ):
        read(camera, 40, on_resize="error")


def test_a_folder_of_several_sizes_is_an_error_or_several_videos(tmp_path):
    from PIL import Image

    for index, size in enumerate([(32, 24), (32, 24), (16, 24)]):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    with pytest.raises(VideoError, match="`on_resize`"):
        list(open_video(tmp_path))
    said: list[str] = []
    video = open_video(tmp_path, on_resize="reset", say=said.append)
    assert [frame.shape[:2] for frame in video] == [(24, 32), (24, 32), (24, 16)]
    assert len(said) == 1
    assert [frame.shape[:2] for frame in video] == [(24, 32), (24, 32), (24, 16)]  # from the beginning again


# ---- secrets


def test_no_message_error_or_traceback_has_a_secret(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    refused = Camera(answer("401 No"), login=LOGIN, query=QUERY)
    texts = []
    with refused, pytest.raises(VideoError) as caught:
        open_video(refused.url)
    texts.append("".join(traceback.format_exception(caught.value)))
    with (
        Camera(frames(LEVELS, stall), answer("404 Gone"), login=LOGIN, query=QUERY) as camera,
        open_video(camera.url, reconnect=QUICK) as video,
    ):
        texts.append(video.name)
        with pytest.raises(VideoError) as caught:
            list(video)
    texts += [
        "".join(traceback.format_exception(caught.value)),
        repr(caught.value.__cause__),
        caplog.text,
        *capfd.readouterr(),
    ]
    with pytest.raises(VideoError) as caught:
        open_video(f"rtsp:/{LOGIN}127.0.0.1/x{QUERY}")  # a slash is missing
    texts.append(str(caught.value))
    with pytest.raises(VideoError, match="source is b'http") as caught:
        open_video(refused.url.encode())  # type: ignore[arg-type]
    texts.append(str(caught.value))
    assert "is lost" in caplog.text  # by default, a logger is told
    assert all("127.0.0.1" in text for text in texts[:3])
    assert not [secret for secret in SECRETS for text in texts if secret in text]


# ---- threads, connections and processes end


@pytest.mark.parametrize("keep", ["newest", "every"])
def test_leaving_during_a_stall_is_quick_and_the_thread_ends_with_its_read(keep, monkeypatch):
    monkeypatch.setattr("ttt_adapt.video.read_ahead.CLOSING_SECONDS", 0.05)
    slow = Reconnect(read_timeout=1.5)
    with Camera(frames(LEVELS, stall)) as camera:
        with open_video(camera.url, keep=keep, reconnect=slow) as video:
            stream = iter(video)
            next(stream)
            wait_until(lambda: video.stats.read.frames >= (20 if keep == "newest" else 5))
            begun = time.monotonic()
        assert time.monotonic() - begun < 1
        wait_until(lambda: not our_threads())
    assert list(stream) == []


def test_leaving_during_a_pause_ends_the_thread_at_once():
    long = Reconnect(first_pause=60, longest_pause=60)
    said: list[str] = []
    with Camera(frames(LEVELS), answer("503 Busy")) as camera:
        with open_video(camera.url, reconnect=long, say=said.append) as video:
            stream = iter(video)
            next(stream)
            wait_until(lambda: bool(said))
        assert not our_threads()


def test_an_exception_in_the_consumer_ends_the_thread():
    with Camera(frames(LEVELS, stall, pause=0.005)) as camera, open_video(camera.url, reconnect=QUICK) as video:

        def consume():
            for _ in video:
                raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            consume()
        wait_until(lambda: not our_threads())
        assert next(iter(video)).shape == (48, 64, 3)  # it goes on


def test_a_program_that_is_interrupted_during_a_stall_ends_soon_and_without_a_crash():
    code = (
        "import os, signal, sys, threading; from ttt_adapt.video import open_video\n"
        "threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()\n"
        "try:\n"
        "    with open_video(sys.argv[1]) as video:\n"
        "        for _ in video: pass\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    with Camera(frames(LEVELS, stall)) as camera:
        done = subprocess.run(
            [sys.executable, "-c", code, camera.url], capture_output=True, text=True, timeout=30, env={**os.environ}
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_a_driver_that_hangs_does_not_hang_the_loop_for_longer_than_its_patience(monkeypatch):
    monkeypatch.setattr("ttt_adapt.video.read_ahead.CLOSING_SECONDS", 0.05)
    release = threading.Event()

    class Hanging:
        name, kind, restarts, fps, size, sounds, length, uneven, patience = (
            "cam",
            "live",
            False,
            None,
            (4, 4),
            0,
            None,
            False,
            0.1,
        )

        def frames(self, any_size=False):
            yield np.zeros((4, 4, 3), np.uint8)
            release.wait(30)

        def interrupt(self):
            pass

        def close(self):
            pass

    counts = FrameCounts()
    with VideoReader(Hanging(), 4, keep=None, on_resize=None, counts=counts, say=print) as video:
        found = iter(video)
        next(found)
        with pytest.raises(VideoError, match="cam gave no frame for .* and the read of the next one does not end"):
            next(found)
    assert counts.taken.count().frames == 1
    release.set()
