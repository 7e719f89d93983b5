"""Reading and writing video: exact frames, bounded memory, threads that end, honest errors, kept output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ttt_adapt.errors import ConfigError, FrameError, FrameTypeError, MissingPackageError, StateError, VideoError
from ttt_adapt.video import VideoWriter, open_video
from ttt_adapt.video.read_ahead import ReadAhead
from ttt_adapt.video.reader import VideoReader
from ttt_adapt.video.rgb import ToRGB

av = pytest.importorskip("av", reason='needs PyAV: pip install "ttt-adapt[video]"')
Image = pytest.importorskip("PIL.Image", reason='needs Pillow: pip install "ttt-adapt[video]"')

NTSC = Fraction(30000, 1001)
CLIPS = Path(os.environ.get("TTT_ADAPT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "clips"


def picture(index: int, height: int = 96, width: int = 128) -> np.ndarray:
    """A coarse random pattern that moves with `index`: every frame differs from every other."""
    blocks = np.random.default_rng(0).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.roll(blocks.repeat(8, 0).repeat(8, 1)[:height, :width], 2 * index, axis=1)


def encode(path: Path, frames: int = 60, rate: Fraction = NTSC, times: list[int] | None = None) -> Path:
    """H.264 with B-frames and a keyframe every 20 frames; `times` in milliseconds make the rate variable."""
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"bf": "3", "g": "20"})
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture(index)), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    return encode(tmp_path_factory.mktemp("video") / "clip.mp4")


@pytest.fixture(scope="module")
def mkv(tmp_path_factory) -> Path:
    return encode(tmp_path_factory.mktemp("video") / "clip.mkv")


def reference(path: Path) -> list[np.ndarray]:
    """Every frame, from PyAV's plain decode loop."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def by_decord(path: Path) -> list[np.ndarray]:
    """Every frame, from a decoder that shares no code with the reader."""
    decord = pytest.importorskip("decord", reason="needs decord2 as the independent reference: pip install decord2")
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0))
    return [reader.next().asnumpy() for _ in range(len(reader))]


def assert_same(frames: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(frames) == len(expected)
    for index, (frame, other) in enumerate(zip(frames, expected, strict=True)):
        assert np.array_equal(frame, other), f"frame {index} differs"


def read_until_error(path: Path) -> tuple[list[np.ndarray], VideoError]:
    frames: list[np.ndarray] = []
    with pytest.raises(VideoError) as caught, open_video(path) as video:  # noqa: PT012
        for frame in video:
            frames.append(frame)
    return frames, caught.value


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "read-ahead" in thread.name]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert our_threads() == []


class TestFiles:
    @pytest.mark.parametrize("kind", ["mp4", "mkv"])
    def test_every_frame_comes_once_in_display_order_with_b_frames(self, kind, request):
        path = request.getfixturevalue(kind)
        with av.open(str(path)) as container:
            assert any(frame.pict_type == av.video.frame.PictureType.B for frame in container.decode(video=0))
        with open_video(path) as video:
            assert video.size == (96, 128)
            assert video.length == 60
            assert video.name == path.name
            assert video.fps == pytest.approx(30000 / 1001, abs=1e-12)
            frames = list(video)
        assert_same(frames, reference(path))
        assert_same(frames, by_decord(path))
        assert all(np.abs(frame.astype(int) - picture(i)).mean() < 30 for i, frame in enumerate(frames))

    @pytest.mark.parametrize("name", ["decord_pancake.mkv", "intel_car-detection.mp4", "udacity_solidWhiteRight.mp4"])
    def test_real_clips_are_read_frame_by_frame_as_an_independent_decoder_reads_them(self, name):
        path = CLIPS / name
        if not path.exists():
            pytest.skip(f"needs {name}: set TTT_ADAPT_DATA to the folder that holds clips/")
        decord = pytest.importorskip("decord", reason="needs decord2 as the independent reference")
        expected = decord.VideoReader(str(path), ctx=decord.cpu(0))
        with open_video(path) as video:
            assert video.length == len(expected)
            assert video.fps == pytest.approx(expected.get_avg_fps())
            count = 0
            for frame in video:
                assert np.array_equal(frame, expected.next().asnumpy()), f"frame {count} differs"
                count += 1
        assert count == len(expected)

    def test_frames_are_uint8_rgb_arrays_of_the_callers_own(self, mp4):
        with open_video(mp4) as video:
            frames = iter(video)
            first = next(frames)
            kept = first.copy()
            assert (first.dtype, first.shape) == (np.uint8, (96, 128, 3))
            assert first.flags.writeable
            assert first.flags.c_contiguous
            next(frames)[:] = 0
            assert np.array_equal(first, kept)

    def test_iterating_again_starts_from_the_first_frame(self, mp4):
        with open_video(mp4) as video:
            assert np.array_equal(next(iter(video)), next(iter(video)))
            assert all(np.array_equal(a, b) for a, b in zip(video, video, strict=True))

    @pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
    def test_variable_rate_files_yield_each_frame_once(self, tmp_path, suffix):
        times = [40 * i + 7 * (i % 3) + (700 if i > 12 else 0) for i in range(25)]
        path = encode(tmp_path / f"vfr{suffix}", 25, Fraction(25), times)
        with open_video(path) as video:
            assert video.length == 25
            assert_same(list(video), reference(path))

    def test_length_and_spacing_read_the_file_once_in_all(self, mp4, monkeypatch):
        passes, real = [], av.open
        with open_video(mp4) as video:
            monkeypatch.setattr(av, "open", lambda file, **options: passes.append(file) or real(file, **options))
            assert (video.length, video.uneven, video.length) == (60, False, 60)
        assert passes == [f"file:{mp4}"]

    def test_phone_videos_are_turned_upright(self, mp4, tmp_path):
        data = bytearray(mp4.read_bytes())
        matrix = data.find(b"tkhd") + 4 + 40  # in a version 0 track header
        turn = [0, 1 << 16, 0, -1 << 16, 0, 0, 96 << 16, 0, 1 << 30]
        data[matrix : matrix + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in turn)
        (tmp_path / "phone.mp4").write_bytes(data)
        with open_video(tmp_path / "phone.mp4") as video:
            assert video.size == (128, 96)
            frame = next(iter(video))
        assert np.array_equal(frame, np.rot90(reference(mp4)[0], -1))

    def test_frames_hidden_by_an_edit_list_are_neither_counted_nor_shown(self, tmp_path):
        source, cut = encode(tmp_path / "source.mp4", rate=Fraction(25)), tmp_path / "cut.mp4"
        with av.open(str(source)) as reader, av.open(str(cut), "w") as writer:
            stream = writer.add_stream_from_template(reader.streams.video[0])
            for packet in reader.demux(video=0):
                if packet.dts is not None:
                    shift = int(7 / 25 / packet.time_base)
                    packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                    writer.mux(packet)
        with open_video(cut) as video:
            assert video.length == 53
            assert_same(list(video), reference(source)[7:])

    def test_memory_stays_bounded_beside_a_slow_consumer(self, monkeypatch, mp4):
        decoded = []
        convert = ToRGB.__call__
        monkeypatch.setattr(ToRGB, "__call__", lambda rgb, frame: decoded.append(1) or convert(rgb, frame))
        with open_video(mp4, read_ahead=3) as video:
            decoded.clear()
            for taken, _ in enumerate(video, start=1):
                time.sleep(0.01)
                assert len(decoded) - taken <= 3 + 1
                if taken == 20:
                    break


class TestDamagedFiles:
    def test_a_truncated_mp4_yields_its_good_frames_then_names_the_first_broken_one(self, mp4, tmp_path):
        path = tmp_path / "cut.mp4"
        path.write_bytes(mp4.read_bytes()[: int(mp4.stat().st_size * 0.6)])
        frames, error = read_until_error(path)
        assert 10 < len(frames) < 60
        assert_same(frames, reference(mp4)[: len(frames)])
        assert f"breaks at frame {len(frames)}:" in str(error)

    def test_a_truncated_mkv_yields_its_good_frames_then_says_what_is_missing(self, mkv, tmp_path):
        path = tmp_path / "cut.mkv"
        path.write_bytes(mkv.read_bytes()[: int(mkv.stat().st_size * 0.6)])
        frames, error = read_until_error(path)
        assert 10 < len(frames) < 60
        assert_same(frames, reference(mkv)[: len(frames)])
        assert f"breaks at frame {len(frames)}:" in str(error)

    def test_a_frame_that_cannot_be_decoded_ends_the_video_after_every_frame_shown_before_it(self, mp4, tmp_path):
        with av.open(str(mp4)) as container:
            packets = [p for p in container.demux(video=0) if p.size]
        broken = packets[45]
        before = sum(p.pts < broken.pts for p in packets[:45])
        data = bytearray(mp4.read_bytes())
        data[broken.pos : broken.pos + broken.size] = b"\xff" * broken.size
        (tmp_path / "broken.mp4").write_bytes(data)
        frames, error = read_until_error(tmp_path / "broken.mp4")
        assert_same(frames, reference(mp4)[:before])
        assert f"breaks at frame {before}:" in str(error)

    def test_damage_that_the_decoder_hides_is_warned_about(self, mp4, tmp_path):
        with av.open(str(mp4)) as container:
            key = [p for p in container.demux(video=0) if p.is_keyframe][1]
        data = bytearray(mp4.read_bytes())
        start, end = key.pos + key.size // 10, key.pos + key.size
        data[start:end] = np.random.default_rng(1).integers(0, 256, end - start, dtype=np.uint8).tobytes()
        (tmp_path / "bits.mp4").write_bytes(data)
        with pytest.warns(UserWarning, match="frame 20 is damaged"), open_video(tmp_path / "bits.mp4") as video:
            assert len(list(video)) == 60

    def test_an_mp4_without_its_index_is_refused(self, tmp_path):
        source = encode(tmp_path / "slow.mkv", 30)
        with av.open(str(source)) as reader, av.open(str(tmp_path / "slow.mp4"), "w") as writer:
            stream = writer.add_stream_from_template(reader.streams.video[0])
            for packet in reader.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    writer.mux(packet)
        path = tmp_path / "slow.mp4"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(VideoError, match="cannot be opened as a video"):
            open_video(path)


class TestRefusals:
    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(VideoError, match=r"nothing\.mp4 does not exist"):
            open_video(tmp_path / "nothing.mp4")

    def test_an_empty_file_is_said_to_be_empty(self, tmp_path):
        (tmp_path / "empty.mp4").touch()
        with pytest.raises(VideoError, match="is empty"):
            open_video(tmp_path / "empty.mp4")

    def test_a_file_that_is_no_video_is_refused(self, tmp_path):
        (tmp_path / "text.mp4").write_text("no video " * 99)
        with pytest.raises(VideoError, match="cannot be opened as a video"):
            open_video(tmp_path / "text.mp4")

    def test_a_file_with_sound_only_is_refused(self, tmp_path):
        with av.open(str(tmp_path / "sound.mp4"), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        with pytest.raises(VideoError, match=r"no video stream\. Streams found: audio"):
            open_video(tmp_path / "sound.mp4")

    def test_an_unknown_codec_is_refused_with_a_way_out(self, mkv, tmp_path):
        path = tmp_path / "unknown.mkv"
        path.write_bytes(mkv.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_NOPE4/ISO/AVC"))
        with pytest.raises(VideoError, match=r"cannot decode\. Convert it: ffmpeg"):
            open_video(path)

    @pytest.mark.parametrize("source", [True, None, 1.5])
    def test_other_kinds_of_source_are_refused(self, source):
        with pytest.raises(VideoError, match="expected a path, a camera index or a URL"):
            open_video(source)

    @pytest.mark.parametrize("depth", [0, -1, True, 2.0])
    def test_the_read_ahead_is_a_positive_integer(self, depth, mp4):
        with pytest.raises(ConfigError, match="read_ahead"):
            open_video(mp4, read_ahead=depth)

    def test_without_pyav_the_error_says_what_to_install(self, monkeypatch, mp4):
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(MissingPackageError, match=r'pip install "ttt-adapt\[video\]"'):
            open_video(mp4)

    def test_importing_the_package_loads_no_video_library(self):
        code = "import sys, ttt_adapt.video; print({'av', 'PIL', 'decord'} & set(sys.modules))"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "set()"


class TestLive:
    @pytest.mark.parametrize("source", [97, "97"])
    def test_a_missing_camera_is_named(self, source):
        with pytest.raises(VideoError, match="camera 97"):
            open_video(source)

    def test_a_refused_connection_is_an_error_at_once(self):
        with pytest.raises(VideoError, match=r"rtsp://127\.0\.0\.1:9/none cannot be opened"):
            open_video("rtsp://127.0.0.1:9/none")

    @pytest.fixture
    def url(self, mp4):
        import functools
        import http.server

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

        with http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Quiet, directory=str(mp4.parent))
        ) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield f"http://127.0.0.1:{server.server_port}/{mp4.name}"
            server.shutdown()
            thread.join()

    def test_a_network_stream_yields_the_same_frames(self, url, mp4):
        with open_video(url) as video:
            assert (video.size, video.length) == ((96, 128), None)
            assert_same(list(video), reference(mp4))

    def test_a_live_source_has_one_iteration_at_a_time_and_goes_on_where_it_was(self, url):
        with open_video(url) as video:
            running = iter(video)
            next(running)
            with pytest.raises(StateError, match="already being iterated"):
                iter(video)
            running.close()
            assert 0 < len(list(video)) < 60


class TestFolders:
    def save(self, folder: Path, *names: str, size: tuple[int, int] = (24, 32)) -> None:
        for value, name in enumerate(names):
            Image.fromarray(np.full((*size, 3), 10 * value, np.uint8)).save(folder / name)

    def test_images_come_in_natural_order_and_other_files_are_ignored(self, tmp_path):
        self.save(tmp_path, "frame_1.png", "frame_2.png", "frame_10.png", "frame_11.PNG", "frame_100.bmp")
        (tmp_path / "notes.txt").write_text("not a frame")
        (tmp_path / "._frame_3.png").write_bytes(b"left by a file manager")
        (tmp_path / "frame_4.png").mkdir()
        with open_video(str(tmp_path)) as video:
            assert (video.length, video.fps, video.size) == (5, None, (24, 32))
            assert [int(frame[0, 0, 0]) for frame in video] == [0, 10, 20, 30, 40]

    def test_images_come_in_natural_order_of_their_whole_names_in_lower_case(self, tmp_path):
        names = ["2.png", "10.png", "A2.png", "a2b9.png", "a2b10.png", "a10b1.png", "b.png"]
        self.save(tmp_path, *names)
        with open_video(tmp_path) as video:
            assert [int(frame[0, 0, 0]) for frame in video] == [0, 10, 20, 30, 40, 50, 60]

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
    def test_every_kind_of_image_becomes_rgb(self, tmp_path, mode):
        image = Image.new("L" if mode == "I;16" else "RGB", (32, 24))
        (Image.new(mode, (32, 24)) if mode == "I;16" else image.convert(mode)).save(tmp_path / "a.png")
        with open_video(tmp_path) as video:
            assert [frame.shape for frame in video] == [(24, 32, 3)]

    def test_a_folder_without_images_is_refused(self, tmp_path):
        with pytest.raises(VideoError, match="holds no images"):
            open_video(tmp_path)

    def test_an_image_of_another_size_is_named_when_it_is_reached(self, tmp_path):
        self.save(tmp_path, "a1.png", "a2.png")
        self.save(tmp_path, "a3.png", size=(48, 64))
        frames, error = read_until_error(tmp_path)
        assert len(frames) == 2
        assert "a3.png (frame 2) is 48 x 64" in str(error)
        assert "24 x 32" in str(error)

    def test_a_damaged_image_is_named_after_the_good_ones(self, tmp_path):
        self.save(tmp_path, "a1.png", "a2.png", "a3.png")
        (tmp_path / "a2.png").write_bytes((tmp_path / "a2.png").read_bytes()[:40])
        frames, error = read_until_error(tmp_path)
        assert len(frames) == 1
        assert "a2.png (frame 1) cannot be read" in str(error)


class TestReadAhead:
    def counting(self, taken: list[int], count: int = 1000, error: BaseException | None = None):
        for index in range(count):
            taken.append(index)
            yield index
        if error:
            raise error

    def settle(self, taken: list[int]) -> int:
        """How many items were taken, once the thread waits."""
        before = -1
        while before != len(taken):
            before = len(taken)
            time.sleep(0.03)
        return before

    @pytest.mark.parametrize("depth", [1, 4])
    def test_never_more_than_the_depth_and_one_ahead(self, depth):
        taken: list[int] = []
        with ReadAhead(self.counting(taken), depth) as items:
            assert self.settle(taken) == depth + 1
            for expected in range(5):
                assert next(items) == expected
                assert self.settle(taken) == expected + 1 + depth + 1

    def test_an_error_arrives_after_every_item_before_it_and_once(self):
        seen = []
        with ReadAhead(self.counting([], 7, ValueError("broken")), 2) as items:
            with pytest.raises(ValueError, match="broken"):  # noqa: PT012
                for item in items:
                    seen.append(item)
            assert next(items, None) is None
        assert seen == list(range(7))

    def test_works_while_the_consumer_works(self):
        def slow():
            for index in range(5):
                time.sleep(0.05)
                yield index

        started = time.perf_counter()
        with ReadAhead(slow(), 4) as items:
            for _ in items:
                time.sleep(0.05)
        assert time.perf_counter() - started < 0.45

    def test_closing_wakes_a_consumer_that_waits(self):
        release = threading.Event()

        def stuck():
            release.wait(10)
            yield 1

        with ReadAhead(stuck(), 1) as items:
            seen: list[list[int]] = []
            consumer = threading.Thread(target=lambda: seen.append(list(items)))
            consumer.start()
            closer = threading.Thread(target=items.close)
            closer.start()
            consumer.join(5)
            assert seen == [[]]
            release.set()
            closer.join(5)


class TestThreadsEnd:
    def test_when_the_consumer_breaks_out(self, mp4):
        video = open_video(mp4)
        for _ in video:
            assert len(our_threads()) == 1
            break
        assert our_threads() == []

    def test_when_the_consumer_raises(self, mp4):
        with pytest.raises(RuntimeError, match="mine"):  # noqa: PT012
            for _ in open_video(mp4):
                raise RuntimeError("mine")
        assert our_threads() == []

    def test_when_the_reader_is_closed_in_the_middle(self, mp4):
        video = open_video(mp4)
        frames = iter(video)
        next(frames)
        video.close()
        video.close()
        assert our_threads() == []
        assert list(frames) == []
        with pytest.raises(StateError, match="closed"):
            iter(video)

    def test_when_all_frames_are_read(self, mp4):
        frames = iter(open_video(mp4))
        list(frames)
        assert our_threads() == []

    def test_opening_starts_none(self, mp4):
        video = open_video(mp4)
        assert isinstance(video, VideoReader)
        iter(video)
        assert our_threads() == []

    def test_when_the_program_ends_in_the_middle_of_a_video(self, mp4):
        code = f"from ttt_adapt.video import open_video; frames = iter(open_video({str(mp4)!r})); next(frames)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stderr) == (0, "")


class TestWriter:
    def probe(self, path: Path) -> tuple[int, Fraction, tuple[int, int], str, str]:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            shape = (stream.height, stream.width)
            return stream.frames, stream.average_rate, shape, stream.codec_context.name, stream.pix_fmt

    @pytest.mark.parametrize(
        ("fps", "exact"),
        [
            (30000 / 1001, NTSC),
            (NTSC, NTSC),
            (24000 / 1001, Fraction(24000, 1001)),
            (12.5, Fraction(25, 2)),
            (None, 25),
        ],
    )
    def test_the_file_has_the_exact_rate_size_and_number_of_frames(self, tmp_path, fps, exact):
        with VideoWriter(tmp_path / "out.mp4", fps) as writer:
            for index in range(10):
                writer.write(picture(index))
        assert self.probe(tmp_path / "out.mp4") == (10, exact, (96, 128), "h264", "yuv420p")
        assert os.listdir(tmp_path) == ["out.mp4"]

    def test_what_is_written_looks_like_what_is_read_back(self, tmp_path):
        smooth = np.stack(np.meshgrid(np.arange(128), np.arange(96)), -1).sum(-1, keepdims=True)
        frames = [(np.clip(smooth + 3 * i, 0, 255) * [1.0, 0.6, 0.2]).astype(np.uint8) for i in range(8)]
        with VideoWriter(tmp_path / "out.mp4", 25, crf=8) as writer:
            for frame in frames:
                writer.write(frame)
        with open_video(tmp_path / "out.mp4") as video:
            for frame, expected in zip(video, frames, strict=True):
                assert np.abs(frame.astype(int) - expected).mean() < 3

    def test_odd_sizes_get_one_more_row_and_column_like_the_last(self, tmp_path):
        frame = np.zeros((33, 47, 3), np.uint8)
        frame[:, 40:] = 200
        with VideoWriter(tmp_path / "odd.mp4", 25, size=(33, 47), crf=4) as writer:
            writer.write(frame)
        with open_video(tmp_path / "odd.mp4") as video:
            assert video.size == (34, 48)
            assert next(iter(video))[:, -1].mean() == pytest.approx(200, abs=6)

    def test_the_index_stands_in_front_for_playing_while_loading(self, tmp_path):
        with VideoWriter(tmp_path / "out.mp4", 25) as writer:
            writer.write(picture(0))
        data = (tmp_path / "out.mp4").read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_an_interruption_keeps_what_was_written_playable(self, tmp_path, error):
        with pytest.raises(error), VideoWriter(tmp_path / "out.mp4", 25) as writer:  # noqa: PT012
            for index in range(7):
                writer.write(picture(index))
            raise error
        assert self.probe(tmp_path / "out.mp4")[0] == 7
        assert (writer.path, writer.count, writer.finished) == (tmp_path / "out.mp4", 7, True)
        assert os.listdir(tmp_path) == ["out.mp4"]

    def test_ctrl_c_in_the_middle_of_a_frame_waits_until_the_frame_is_written(self, tmp_path, monkeypatch):
        real = av.VideoFrame

        class Interrupted:
            count = 0

            @classmethod
            def from_ndarray(cls, *arguments, **options):
                cls.count += 1
                if cls.count == 5:
                    signal.raise_signal(signal.SIGINT)
                return real.from_ndarray(*arguments, **options)

        monkeypatch.setattr(av, "VideoFrame", Interrupted)
        with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "out.mp4", 25) as writer:  # noqa: PT012
            for index in range(7):
                writer.write(picture(index))
        assert self.probe(tmp_path / "out.mp4")[:2] == (5, 25)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_a_writer_works_outside_of_the_main_thread(self, tmp_path):
        def work():
            with VideoWriter(tmp_path / "out.mp4", 25) as writer:
                writer.write(picture(0))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert self.probe(tmp_path / "out.mp4")[0] == 1

    def test_an_interruption_leaves_an_existing_file_and_keeps_the_new_one_beside_it(self, tmp_path):
        target = tmp_path / "out.mp4"
        target.write_bytes(b"precious")
        with (  # noqa: PT012, PT031
            pytest.warns(UserWarning, match=r"out\.partial\.mp4"),
            pytest.raises(KeyboardInterrupt),
            VideoWriter(target, 25) as writer,
        ):
            writer.write(picture(0))
            raise KeyboardInterrupt
        assert target.read_bytes() == b"precious"
        assert writer.path == tmp_path / "out.partial.mp4"
        assert self.probe(writer.path)[0] == 1
        assert sorted(os.listdir(tmp_path)) == ["out.mp4", "out.partial.mp4"]

    def test_success_replaces_an_existing_file_only_at_the_end(self, tmp_path):
        target = tmp_path / "out.mp4"
        target.write_bytes(b"old")
        with VideoWriter(target, 25) as writer:
            writer.write(picture(0))
            assert target.read_bytes() == b"old"
        assert self.probe(target)[0] == 1

    def test_a_failure_before_the_first_frame_leaves_nothing(self, tmp_path):
        with pytest.raises(RuntimeError), VideoWriter(tmp_path / "out.mp4", 25):
            raise RuntimeError
        assert os.listdir(tmp_path) == []

    def test_closing_without_a_frame_says_that_there_is_no_file(self, tmp_path):
        with pytest.raises(VideoError, match="No frame was written"):
            VideoWriter(tmp_path / "out.mp4", 25).close()
        assert os.listdir(tmp_path) == []

    def test_closing_twice_is_fine_and_writing_afterwards_is_not(self, tmp_path):
        writer = VideoWriter(tmp_path / "out.mp4", 25)
        writer.write(picture(0))
        writer.close()
        writer.close()
        with pytest.raises(StateError, match=r"is closed\. Make another VideoWriter"):
            writer.write(picture(1))

    def test_a_missing_encoder_is_named_before_anything_is_written(self, tmp_path, monkeypatch):
        def unknown(name, mode):
            raise ValueError(name)

        monkeypatch.setattr(av, "Codec", unknown)
        with pytest.raises(VideoError, match=r"libx264.*pip install.*av>=16"):
            VideoWriter(tmp_path / "out.mp4", 25)
        assert os.listdir(tmp_path) == []

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(VideoError, match="nowhere does not exist"):
            VideoWriter(tmp_path / "nowhere" / "out.mp4", 25)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"fps": 0}, "fps"),
            ({"fps": float("nan")}, "fps"),
            ({"crf": 52}, "crf"),
            ({"size": (0, 4)}, "size"),
            ({"path": "out.avi"}, "suffix"),
        ],
    )
    def test_settings_out_of_range_are_refused(self, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match=message):
            VideoWriter(**({"path": "out.mp4", "fps": 25} | arguments))

    @pytest.mark.parametrize(
        ("frame", "error"),
        [
            (np.zeros((24, 32, 3), np.float32), FrameTypeError),
            ([[[0, 0, 0]]], FrameTypeError),
            (np.zeros((24, 32), np.uint8), FrameError),
            (np.zeros((3, 24, 32), np.uint8), FrameError),
            (np.zeros((24, 34, 3), np.uint8), FrameError),
        ],
    )
    def test_frames_of_another_kind_are_refused_and_change_nothing(self, tmp_path, frame, error):
        with VideoWriter(tmp_path / "out.mp4", 25, size=(24, 32)) as writer:
            writer.write(np.zeros((24, 32, 3), np.uint8))
            with pytest.raises(error, match="expected"):
                writer.write(frame)
            writer.write(np.zeros((24, 32, 3), np.uint8))
        assert self.probe(tmp_path / "out.mp4")[0] == 2
