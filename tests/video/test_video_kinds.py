"""Videos of every kind: the right pixels in the right place, every local name, and what was done is said once."""

from __future__ import annotations

import os
import threading
import warnings

import numpy as np
import pytest

from film_files import SIZE, flat, write
from ttt_adapt.errors import VideoError
from ttt_adapt.video import open_video
from ttt_adapt.video.hdr import HLG, PQ, tone_map

av = pytest.importorskip("av", reason='needs PyAV: pip install "ttt-adapt[video]"')

ONE = 1 << 16


def read(source) -> tuple[list[np.ndarray], list[str]]:
    """All frames, read twice, and what was said about them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_video(source) as video:
            frames = list(video)
            assert video.length in (len(frames), None)
            if video.length is not None:
                assert len(list(video)) == len(frames)
    return frames, [str(warning.message) for warning in caught]


def greys(frames: list[np.ndarray]) -> list[int]:
    return [round(float(frame.mean()) / 20) for frame in frames]


# ---- names


NAMES = [
    "cam:1.mp4", "file:a.mp4", "rtsp:x.mp4", "http:x.mp4", "data:1.mp4", "pipe:0.mp4", "concat:a|b.mp4", "crypto:x.mp4",
    "subfile,,start,0,end,0,,:a.mp4", "a?b.mp4", "a*b.mp4", "[x].mp4", "[red]x.mp4", "[bold.mp4", "%d.mp4", "%03d.mp4",
    "-a.mp4", "--size.mp4", " a b .mp4", "ü 日本 ❤.mp4", "a#b.mp4", "a,b;c&d.mp4", "'q\".mp4", "a\\b.mp4", "a\nb.mp4",
    "0001.mp4", "~a.mp4", "$HOME.mp4",
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write(tmp_path_factory.mktemp("plain") / "plain.mp4", flat(4))


@pytest.mark.parametrize("name", NAMES)
def test_a_local_name_is_a_file_whatever_its_characters(tmp_path, monkeypatch, plain, name):
    monkeypatch.chdir(tmp_path)
    os.link(plain, tmp_path / name)
    for source in (name, f"./{name}", tmp_path / name):
        frames, said = read(source)
        assert (greys(frames), said) == ([0, 1, 2, 3], [])


def test_a_name_that_is_no_utf8_is_a_file(tmp_path, plain):
    name = os.fsencode(tmp_path) + b"/\xff.mp4"
    try:
        os.link(plain, name)
    except OSError:
        pytest.skip("the file system takes no such name")
    assert greys(read(os.fsdecode(name))[0]) == [0, 1, 2, 3]


def test_a_name_with_a_protocol_is_a_file_where_it_exists(tmp_path, monkeypatch, plain):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rtsp:").mkdir()
    os.link(plain, tmp_path / "rtsp:" / "x.mp4")
    assert len(read("rtsp://x.mp4")[0]) == 4


def test_urls_of_local_files_are_read(tmp_path, monkeypatch, plain):
    monkeypatch.chdir(tmp_path)
    os.link(plain, tmp_path / "a b.mp4")
    for source in ((tmp_path / "a b.mp4").as_uri(), f"file:{tmp_path}/a b.mp4", "file:a b.mp4"):
        assert len(read(source)[0]) == 4


@pytest.mark.parametrize("name", ["x:1", "%d", "[x]", "a?b", "-f", "0001", "clip.mp4", "rtsp:x"])
def test_a_folder_may_have_any_name(tmp_path, monkeypatch, name):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    image.fromarray(flat(2)[1]).save(tmp_path / name / f"{name}.png")
    assert greys(read(name)[0]) == [1]


@pytest.mark.parametrize("name", ["%d.png", "a?b.png", "[x].jpg", "c:1.png"])
def test_a_picture_may_have_any_name(tmp_path, monkeypatch, name):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    image.fromarray(flat(2)[1]).save(tmp_path / name)
    assert greys(read(name)[0]) == [1]


@pytest.mark.parametrize("source", ["", "a\0b", "x" * 5000, "rtsp:nothing.mp4", "0001"])
def test_a_name_of_nothing_is_refused(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoError, match="expected"):
        open_video(source)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_read_once_as_it_comes(tmp_path):
    data = write(tmp_path / "a.ts", flat(4)).read_bytes()
    os.mkfifo(tmp_path / "pipe.ts")
    feeder = threading.Thread(target=lambda: (tmp_path / "pipe.ts").write_bytes(data))
    feeder.start()
    assert greys(read(tmp_path / "pipe.ts")[0]) == [0, 1, 2, 3]
    feeder.join()


def test_titles_that_are_no_utf8_do_not_matter(tmp_path):
    path = write(tmp_path / "a.mkv", flat(2), metadata={"title": "TITLETITLE"})
    path.write_bytes(path.read_bytes().replace(b"TITLETITLE", b"\xff\xfe\xe9TITLE\xe9\xff"))
    assert len(read(path)[0]) == 2


# ---- the display matrix


MATRICES = {
    "as it is": ((ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30), lambda a: a),
    "hflip": ((-ONE, 0, 0, 0, ONE, 0, 96 * ONE, 0, 1 << 30), lambda a: a[:, ::-1]),
    "vflip": ((ONE, 0, 0, 0, -ONE, 0, 0, 64 * ONE, 1 << 30), lambda a: a[::-1]),
    "half turn": ((-ONE, 0, 0, 0, -ONE, 0, 96 * ONE, 64 * ONE, 1 << 30), lambda a: a[::-1, ::-1]),
    "transpose": ((0, ONE, 0, ONE, 0, 0, 0, 0, 1 << 30), lambda a: a.swapaxes(0, 1)),
    "clockwise": ((0, ONE, 0, -ONE, 0, 0, 64 * ONE, 0, 1 << 30), lambda a: np.rot90(a, -1)),
    "counterclockwise": ((0, -ONE, 0, ONE, 0, 0, 0, 96 * ONE, 1 << 30), lambda a: np.rot90(a, 1)),
    "transverse": ((0, -ONE, 0, -ONE, 0, 0, 64 * ONE, 96 * ONE, 1 << 30), lambda a: a[::-1, ::-1].swapaxes(0, 1)),
}


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
@pytest.mark.parametrize("name", MATRICES)
def test_a_display_matrix_turns_and_mirrors_as_players_do(tmp_path, name, suffix):
    matrix, turned = MATRICES[name]
    picture = np.zeros((*SIZE, 3), np.uint8)
    picture[:20, :30] = (220, 40, 40)
    path = write(tmp_path / f"a{suffix}", [picture] * 2, matrix=matrix)
    with open_video(path) as video:
        assert video.size == turned(picture).shape[:2]
    frames, said = read(path)
    assert said == []
    for frame in frames:
        assert frame.flags.c_contiguous
        assert np.abs(frame.astype(int) - turned(picture)).mean() < 3


def test_an_odd_angle_becomes_the_nearest_quarter_turn_and_this_is_said_once(tmp_path):
    tilted = (0, ONE, 0, -ONE, ONE // 8, 0, 0, 0, 1 << 30)
    frames, said = read(write(tmp_path / "a.mp4", flat(3), matrix=tilted))
    assert frames[0].shape[:2] == (96, 64)
    assert said == ["a.mp4 asks to be turned by an angle that is no multiple of 90 degrees: the nearest one is taken"]


# ---- sound, covers, several videos


@pytest.mark.parametrize("suffix", [".mp3", ".mp4"])
def test_sound_with_a_cover_picture_is_no_video(tmp_path, suffix):
    path = write(tmp_path / f"song{suffix}", [], cover="last", sound=True)
    with pytest.raises(VideoError, match=rf"song\{suffix} has no video stream.*cover picture that does not move"):
        open_video(path)


@pytest.mark.parametrize("cover", ["first", "last"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video_with_a_cover_picture_plays_the_video(tmp_path, cover, suffix):
    frames, _ = read(write(tmp_path / f"film{suffix}", flat(6), cover=cover, sound=True))
    assert greys(frames) == [0, 1, 2, 3, 4, 5]
    with open_video(tmp_path / f"film{suffix}") as video:
        assert (video.size, video.fps, video.sounds) == (SIZE, 25, 1)


# ---- interlaced


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {"codec": "libx264", "options": {"x264-params": "tff=1"}}),
        ("a.mkv", {"codec": "libx264", "options": {"x264-params": "bff=1"}}),
        ("a.mpg", {"codec": "mpeg2video", "options": {"flags": "+ildct+ilme"}}),
        ("a.m2v", {"codec": "mpeg2video", "options": {"flags": "+ildct+ilme"}}),
    ],
)
def test_interlaced_video_has_all_its_frames_and_this_is_said_once(tmp_path, name, options):
    frames, said = read(write(tmp_path / name, flat(6), **options))
    assert greys(frames) == [0, 1, 2, 3, 4, 5]
    assert said == [f"{name} is interlaced: the half pictures of each frame are made into one (bwdif)"]


def test_what_moves_has_no_comb_in_an_interlaced_video(tmp_path):
    frames = []
    for index in range(8):
        frame = np.zeros((*SIZE, 3), np.uint8)
        for field in range(2):  # the second half picture is of a later moment
            left = 8 * index + 4 * field
            frame[field::2, left : left + 24] = 230
        frames.append(frame)
    path = write(tmp_path / "a.mp4", frames, options={"x264-params": "tff=1:crf=1"})

    def comb(frame: np.ndarray) -> float:
        rows = frame[..., 0].astype(int)
        return float(np.abs(rows[1:-1] - (rows[:-2] + rows[2:]) / 2).mean())

    shown, _ = read(path)
    assert len(shown) == 8
    assert max(comb(frame) for frame in shown[1:-1]) < comb(frames[3]) / 4


def test_an_interlaced_video_that_breaks_shows_every_frame_before_the_break(tmp_path):
    whole = write(tmp_path / "a.mp4", flat(10), options={"x264-params": "tff=1:keyint=1"})
    with av.open(str(whole)) as container:
        broken = [packet for packet in container.demux(video=0) if packet.size][6]
    data = bytearray(whole.read_bytes())
    data[broken.pos : broken.pos + broken.size] = b"\xff" * broken.size
    (tmp_path / "b.mp4").write_bytes(data)
    seen = []
    with pytest.warns(UserWarning, match="interlaced"):
        video = open_video(tmp_path / "b.mp4")
    with pytest.raises(VideoError, match=r"b\.mp4 breaks at frame 6:"):  # noqa: PT012
        for frame in video:
            seen.append(frame)
    assert greys(seen) == [0, 1, 2, 3, 4, 5]


# ---- transparency


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mov", "qtrle", "argb"),
        ("b.mov", "prores_ks", "yuva444p10le"),
        ("c.mkv", "ffv1", "bgra"),
        ("d.apng", "apng", "rgba"),
    ],
)
def test_transparent_video_is_shown_on_white_as_pictures_are(tmp_path, name, codec, pix_fmt):
    layers = [np.dstack([np.full((*SIZE, 3), 50, np.uint8), np.full(SIZE, alpha, np.uint8)]) for alpha in (255, 128, 0)]
    frames, said = read(write(tmp_path / name, layers, codec, pix_fmt, layout="rgba"))
    assert [float(frame.mean()) for frame in frames] == pytest.approx([50, 152, 255], abs=2)
    assert said == [f"{name} has transparent pixels: they are shown on white"]


def test_opaque_video_with_an_alpha_channel_needs_no_word(tmp_path):
    opaque = [np.dstack([frame, np.full(SIZE, 255, np.uint8)]) for frame in flat(2)]
    frames, said = read(write(tmp_path / "a.mov", opaque, "qtrle", "argb", layout="rgba"))
    assert (greys(frames), said) == ([0, 1], [])


VPX = [("a.webm", "libvpx-vp9", {}), ("a.mkv", "libvpx-vp9", {}), ("a.webm", "libvpx", {"auto-alt-ref": "0"})]


@pytest.mark.parametrize(("name", "codec", "options"), VPX)
def test_transparency_in_a_second_picture_is_read_too(tmp_path, name, codec, options):
    layers = [np.dstack([np.full((*SIZE, 3), 50, np.uint8), np.full(SIZE, alpha, np.uint8)]) for alpha in (255, 128, 0)]
    frames, said = read(write(tmp_path / name, layers, codec, "yuva420p", layout="rgba", options=options))
    assert [float(frame.mean()) for frame in frames] == pytest.approx([50, 152, 255], abs=3)
    assert said == [f"{name} has transparent pixels: they are shown on white"]


def test_an_opaque_second_picture_needs_no_word_and_a_break_is_where_it_is(tmp_path):
    opaque = [np.dstack([frame, np.full(SIZE, 255, np.uint8)]) for frame in flat(6)]
    whole = write(tmp_path / "a.webm", opaque, "libvpx-vp9", "yuva420p", layout="rgba", options={"g": "1"})
    frames, said = read(whole)
    assert (greys(frames), said) == ([0, 1, 2, 3, 4, 5], [])
    with av.open(str(whole)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][4]
        picture = bytes(packet)
    data = whole.read_bytes()
    assert data.count(picture) == 1
    (tmp_path / "b.webm").write_bytes(data.replace(picture, b"\xff" * len(picture)))
    seen = []
    with pytest.raises(VideoError, match=r"b\.webm breaks at frame 4:"):  # noqa: PT012
        for frame in open_video(tmp_path / "b.webm"):
            seen.append(frame)
    assert greys(seen) == [0, 1, 2, 3]


def test_transparency_that_no_decoder_reads_is_said(tmp_path, monkeypatch):
    layer = np.dstack([np.full((*SIZE, 3), 100, np.uint8), np.full(SIZE, 40, np.uint8)])
    path = write(tmp_path / "a.webm", [layer] * 2, "libvpx-vp9", "yuva420p", layout="rgba")
    monkeypatch.setattr("ttt_adapt.video.video_file.alpha_decoder", lambda _stream: None)  # FFmpeg without libvpx
    frames, said = read(path)
    assert len(frames) == 2
    assert said == ["a.webm keeps its transparency in a second picture, which is not read: frames are opaque"]


# ---- HDR


def pq(nits: float) -> float:
    """The signal of a light in cd/m2: SMPTE ST 2084."""
    y = (nits / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


def test_light_below_white_keeps_its_brightness_and_light_above_stays_apart():
    nits = [0, 1, 10, 50, 100, 160, 203, 400, 1000, 4000]
    codes = np.array([round(65535 * pq(value)) for value in nits], np.uint16)[None, :, None].repeat(3, 2)
    shown = tone_map(codes, PQ)[0, :, 1].astype(int)
    assert shown.tolist() == sorted(set(shown.tolist()))
    for value, code in zip(nits[:6], shown[:6], strict=True):
        assert code == pytest.approx(255 * (value / 203) ** (1 / 2.4), abs=1.5)
    assert 235 < shown[6] < 250


def test_hlg_of_75_percent_is_about_white_and_black_is_black():
    codes = np.array([0, 0.25, 0.5, 0.75, 1.0])[None, :, None].repeat(3, 2) * 65535
    shown = tone_map(codes.astype(np.uint16), HLG)[0, :, 0].astype(int)
    assert shown.tolist() == sorted(set(shown.tolist()))
    assert shown[0] == 0
    assert 235 < shown[3] < 250


def test_colours_of_bt2020_become_those_of_bt709():
    red709 = np.array([0.6274, 0.0691, 0.0164]) * 100  # pure red of BT.709 at 100 cd/m2, in the colours of BT.2020
    codes = np.array([round(65535 * pq(value)) for value in red709], np.uint16)[None, None]
    red, green, blue = tone_map(codes, PQ)[0, 0].astype(int)
    assert red == pytest.approx(255 * (100 / 203) ** (1 / 2.4), abs=3)
    assert max(green, blue) < 20


@pytest.mark.parametrize(("transfer", "kind"), [(PQ, "PQ"), (HLG, "HLG")])
def test_hdr_video_is_mapped_to_an_ordinary_display_and_this_is_said_once(tmp_path, transfer, kind):
    blocks = np.random.default_rng(0).integers(4000, 40000, (4, 6, 1)).astype(np.uint16).repeat(3, 2)  # grey
    codes = blocks.repeat(16, 0).repeat(16, 1)
    path = write(
        tmp_path / "a.mkv", [codes] * 2, "ffv1", "yuv444p10le", layout="rgb48le", color_trc=transfer, colorspace=9,
        color_primaries=9, color_range=1,
    )  # fmt: skip
    frames, said = read(path)
    assert len(said) == 1
    assert f"a.mkv is HDR ({kind})" in said[0]
    inside = frames[0][8::16, 8::16].astype(int)
    assert np.abs(inside - tone_map(blocks, transfer)).max() < 3


# ---- sizes


@pytest.mark.parametrize("size", [(33, 47), (1, 1), (2, 3), (64, 31)])
def test_odd_sizes_keep_every_row_and_column(tmp_path, size):
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    frames, _ = read(write(tmp_path / "a.mkv", [frame] * 2, "ffv1", "bgr0"))
    assert np.array_equal(frames[0], frame)
