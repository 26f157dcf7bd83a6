"""ffmpeg: video files written here, and the real ones of the folder that REAL_VIDEOS names."""
import os
import re
import signal
import subprocess
import sys
import threading
import time

import imageio_ffmpeg
import numpy as np
import pytest
from conftest import ROOT

from plumbing import decoding
from plumbing.annotations import list_videos
from plumbing.cli import UserError
from plumbing.decoding import VideoError, decode_all, read_frames, read_views, stream_views

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


def test_frames_come_at_the_rate_and_size_asked_for(tmp_path, write_video):
    path = write_video(tmp_path / "a b.mp4", range(0, 240, 10))  # 24 frames at 8 a second
    frames = read_frames(path, 8, 32)
    assert frames.shape == (24, 32, 32, 3) and frames.dtype == np.uint8
    assert np.abs(frames[:, 16, 16, 0].astype(int) - np.arange(0, 240, 10)).max() <= 4
    assert abs(len(read_frames(path, 2, 32)) - 6) <= 1


def test_crops_flips_and_resizes(tmp_path, write_video):
    path = write_video(tmp_path / "wide.mp4", [100] * 4, width=128)  # the stripe is at the left
    bright = {(crop, flip): read_frames(path, 8, 64, crop, flip)[0, 32, :, 0] > 180
              for crop in ("top-left", "center", "bottom-right") for flip in (False, True)}
    assert bright["top-left", False][:6].all() and not bright["top-left", False][10:].any()
    assert bright["top-left", True][-6:].all() and not bright["top-left", True][:-10].any()
    assert not bright["center", False].any() and not bright["bottom-right", True].any()
    zoomed = read_frames(path, 8, 64, "top-left", resize=80)[0, 32, :, 0] > 180
    assert zoomed.sum() == pytest.approx(10, abs=1)  # 8 pixels of 64 become 10 of 80


def test_one_decode_of_several_views_equals_several_decodes(tmp_path, write_video):
    path = write_video(tmp_path / "wide.mp4", range(0, 200, 20), width=100)
    views = [(32, "center", False), (40, "top-left", True), (40, "bottom-right", False)]
    together = read_views(path, 4, 32, views)
    for frames, (resize, crop, flip) in zip(together, views):
        assert np.array_equal(frames, read_frames(path, 4, 32, crop, flip, resize))


def test_a_video_shorter_than_an_interval_gives_a_frame(tmp_path, write_video):
    assert len(read_frames(write_video(tmp_path / "short.mp4", [50]), 0.5, 16)) == 1


@pytest.mark.parametrize("content", [b"", b"this is no video", None])
def test_a_file_without_video_is_named_with_a_reason(tmp_path, content):
    path = tmp_path / "bad.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VideoError) as error:
        read_frames(path, 2, 16)
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value).splitlines()) == 1


def test_an_unknown_crop_is_refused(tmp_path):
    with pytest.raises(UserError, match="upper.*center"):
        read_frames(tmp_path / "v.mp4", 2, 16, crop="upper")


def by_command_line(path, *options):
    """The frames that the ffmpeg command line gives -> uint8 (F, 64, 64, 3)."""
    done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", "-i", str(path), *options, "-vf",
                           "fps=2,scale=64:64:force_original_aspect_ratio=increase,crop=64:64", "-pix_fmt", "rgb24",
                           "-f", "rawvideo", "-"], capture_output=True, check=False)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, 64, 64, 3)


def check_against_the_command_line(path):
    frames, expected = read_frames(path, 2, 64), by_command_line(path)
    if len(expected):  # of a video shorter than half an interval the command line gives no frame at all
        assert len(frames) == len(expected)
        assert np.abs(frames.astype(int) - expected).mean() < 2
    _, seconds = imageio_ffmpeg.count_frames_and_secs(str(path))
    assert abs(len(frames) - 2 * seconds) <= 1 and len(frames) >= 1


CODECS = {"h264.mp4": ("libx264", ()), "hevc10.mp4": ("libx265", ("-pix_fmt", "yuv420p10le")),
          "vp9.webm": ("libvpx-vp9", ()), "av1.mkv": ("libsvtav1", ("-preset", "12")), "mpeg4.avi": ("mpeg4", ())}


@pytest.mark.parametrize("name", CODECS)
def test_frames_are_those_of_the_ffmpeg_command_line(tmp_path, write_video, name):
    codec, options = CODECS[name]
    path = write_video(tmp_path / name, range(0, 250, 10), width=96, height=128, codec=codec, options=options)
    check_against_the_command_line(path)
    level = read_frames(path, 8, 64)[:, 32, 50, 0].astype(int)
    assert np.abs(level - np.arange(0, 250, 10)[:len(level)]).mean() < 6


def test_a_turned_video_is_turned_back(tmp_path, write_video):
    path = write_video(tmp_path / "flat.mp4", [100] * 8, width=128)
    turned = tmp_path / "turned.mp4"
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90", "-i", str(path), "-c",
                    "copy", str(turned)], check=True)
    upright = read_frames(turned, 8, 64, "bottom-right")[0, :, :, 0] > 180
    assert upright[-6:].all() and not upright[:-16].any()  # the stripe at the left is now at the bottom


def test_of_several_video_streams_the_one_that_ffmpeg_takes(tmp_path, write_video):
    small, large = (write_video(tmp_path / f"{side}.mp4", [level] * 8, width=side, height=side)
                    for side, level in ((64, 50), (128, 150)))
    both = tmp_path / "both.mkv"
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(small), "-i", str(large), "-map", "0:v",
                    "-map", "1:v", "-c", "copy", str(both)], check=True)
    assert abs(int(read_frames(both, 8, 64)[0, 32, 40, 0]) - 150) < 6
    check_against_the_command_line(both)


def test_a_damaged_video_gives_what_decodes(tmp_path, write_video):
    path = write_video(tmp_path / "v.mkv", range(0, 240, 2), codec="libx264", options=("-g", "10"))
    content = path.read_bytes()
    path.write_bytes(content[:len(content) * 6 // 10])
    assert 10 < len(read_frames(path, 8, 32)) < 120


def test_only_the_frames_of_a_span(tmp_path, write_video):
    path = write_video(tmp_path / "v.mp4", range(0, 240, 10))
    frames = read_views(path, 8, 64, [(64, "center", False)], span=(5, 12))[0]
    assert np.abs(frames[:, 32, 40, 0].astype(int) - np.arange(50, 120, 10)).max() <= 4


@pytest.mark.skipif(not os.environ.get("REAL_VIDEOS"), reason="REAL_VIDEOS names no folder")
def test_real_files():
    found = [path for path, _ in list_videos("folder", os.environ["REAL_VIDEOS"], "")]
    bad = []
    for path in found:
        try:
            read_frames(path, 2, 64)
        except VideoError as error:
            bad.append(os.path.basename(path))
            assert path in str(error) and len(str(error).splitlines()) == 1
        else:
            check_against_the_command_line(path)
    assert set(bad) <= {"empty.mp4", "not_a_video.mp4", "truncated.mp4"} and len(found) > len(bad)


def test_many_files_come_in_order_a_few_at_a_time(monkeypatch):
    started, taken = [], []
    monkeypatch.setattr(decoding, "cores", lambda: 2)

    def read(number):
        started.append(number)
        time.sleep(0.002 * (12 - number))  # the later, the sooner done
        for part in range(3):
            if (number, part) == (5, 1):
                raise VideoError("5 is broken")
            yield np.array([10 * number + part]), None
    for number, pieces in decode_all(range(12), read, workers=2):
        taken.append(number)
        time.sleep(0.05)  # who takes them is slow
        assert len(started) - len(taken) <= 4
        if number == 5:
            with pytest.raises(VideoError, match="5 is broken"):
                list(pieces)
        else:
            assert [int(piece[0]) for piece, _ in pieces] == [10 * number + part for part in range(3)]
    assert taken == list(range(12))


def test_an_error_that_is_no_video_s_fault_is_not_passed_over():
    with pytest.raises(ZeroDivisionError):
        for _, pieces in decode_all([1, 0, 2], lambda number: [(np.zeros(1 // number), None)], workers=2):
            list(pieces)


def test_no_more_files_are_read_at_once_than_there_are_cores_and_one(monkeypatch):
    monkeypatch.setattr(decoding, "cores", lambda: 2)
    now, most, lock = [0], [0], threading.Lock()

    def read(number):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        yield np.zeros(1), None
    assert [sum(1 for _ in pieces) for _, pieces in decode_all(range(20), read, workers=16)] == [1] * 20
    assert most[0] == 3


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = decoding.cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert 1 <= decoding.cores() <= max(1, alone // 2)


def test_of_long_videos_few_frames_wait(monkeypatch):
    monkeypatch.setattr(decoding, "cores", lambda: 2)
    monkeypatch.setattr(decoding, "WAITING", 10)
    made, taken = [], []

    def read(number):
        for part in range(40):
            made.append(part)
            yield np.zeros(2, np.uint8), None  # of 20 bytes that may wait
    for _, pieces in decode_all(range(4), read, workers=2):
        for piece, _ in pieces:
            taken.append(piece)
            time.sleep(0.001)
            assert len(made) - len(taken) <= 10 + 2 + 1  # that wait, that ask to, and one that is on its way here
    assert len(taken) == 160


def test_who_takes_no_more_leaves_no_thread_at_work():
    def read(number):
        for _ in range(9):
            time.sleep(0.05)
            yield np.zeros(2, np.uint8), None
    before, videos = threading.active_count(), decode_all(range(9), read, 2)
    next(next(videos)[1])
    assert threading.active_count() == before + 2
    videos.close()
    assert threading.active_count() == before


def test_a_script_that_fails_does_not_wait_for_those_ahead():
    program = """
import numpy as np
from plumbing import decoding
decoding.WAITING = 10
def main():
    videos = decoding.decode_all(range(9), lambda path: ((np.zeros(4), None) for _ in range(99)), 2)
    for path, pieces in videos:
        for _ in pieces:
            raise SystemError("the GPU is gone")
main()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 1 and "the GPU is gone" in done.stderr


# ---------------------------------------------------------------- what goes wrong


@pytest.fixture
def other_ffmpeg(tmp_path, monkeypatch):
    """Puts a shell script, in which $FFMPEG is the real one, in the place of ffmpeg."""
    def put(script):
        path = tmp_path / "other_ffmpeg"
        path.write_text(f"#!/bin/sh\nFFMPEG='{FFMPEG}'\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))
    return put


CENTER = [(64, "center", False)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_video_whose_ffmpeg_was_killed_is_none(tmp_path, write_video, monkeypatch, number):
    path, started = write_video(tmp_path / "v.mp4", [100] * 400), []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)
    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(decoding, "PIECE", 20000)
    pieces = stream_views(path, 8, 64, CENTER)
    assert next(pieces)[0].shape == (1, 1, 64, 64, 3)
    started[0].send_signal(number)
    with pytest.raises(VideoError, match=rf"{path}: ffmpeg was killed.* after \d+ frames.*memory") as error:
        list(pieces)
    if number == signal.SIGKILL:  # at SIGTERM it still gives what it has decoded
        assert int(str(error.value).split(" frames")[0].split()[-1]) < 400


def test_an_ffmpeg_without_memory_is_none_of_the_file_s_faults(tmp_path, write_video, other_ffmpeg):
    path = write_video(tmp_path / "v.mp4", [100] * 40)
    other_ffmpeg('"$FFMPEG" "$@" | head -c 122880\necho "decoder: Cannot allocate memory" >&2')
    with pytest.raises(VideoError, match="too little memory after 10 frames"):
        read_views(path, 8, 64, CENTER)


def test_an_error_of_ffmpeg_s_own_is_not_taken_for_a_short_video(tmp_path, write_video, other_ffmpeg):
    path = write_video(tmp_path / "v.mp4", [100] * 40)
    other_ffmpeg('case "$*" in *fps=*) echo "No such filter: fps" >&2; exit 8;; esac\nexec "$FFMPEG" "$@"')
    with pytest.raises(VideoError, match="No such filter: fps"):
        read_views(path, 8, 64, CENTER)


def test_how_many_frames_a_damaged_video_gave_is_said(tmp_path, write_video):
    path = write_video(tmp_path / "v.mkv", range(0, 240, 2), codec="libx264", options=("-g", "10"))
    assert [damage for _, damage in stream_views(path, 8, 64, CENTER)] == [None]
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])
    (frames, damage), = stream_views(path, 8, 64, CENTER)
    assert re.fullmatch(rf"{path}: gave {frames.shape[1]} frames, perhaps not all: .+", damage)


def test_an_ffmpeg_that_gives_nothing_is_ended(tmp_path, write_video, other_ffmpeg, monkeypatch):
    path = write_video(tmp_path / "v.mp4", [100] * 4)
    other_ffmpeg("exec sleep 1000")
    monkeypatch.setattr(decoding, "QUIET", 0.2)
    with pytest.raises(VideoError, match="gave nothing for 0.2 seconds"):
        read_frames(path, 8, 64)


def test_what_is_no_regular_file_is_refused_unopened(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    for name in ("folder.mp4", "fifo.mp4", "zero.mp4"):
        with pytest.raises(VideoError, match=f"{name}: it is no regular file"):
            read_frames(tmp_path / name, 2, 16)


def test_the_pieces_of_a_video_are_its_frames(tmp_path, write_video, monkeypatch):
    path, views = write_video(tmp_path / "v.mp4", range(0, 240, 10)), [(32, "center", False), (40, "top-left", True)]
    whole = read_views(path, 8, 32, views)
    for frames in (1, 5, 8, 23, 24):
        monkeypatch.setattr(decoding, "PIECE", frames * 2 * 32 * 32 * 3)
        pieces = [piece for piece, _ in stream_views(path, 8, 32, views)]
        assert [piece.shape[1] for piece in pieces] == [frames] * (24 // frames) + [24 % frames] * (24 % frames > 0)
        assert np.array_equal(np.concatenate(pieces, axis=1), whole)


def test_a_few_bytes_do_not_become_a_day_of_frames(tmp_path):
    path = tmp_path / "gap.mp4"  # two frames, 24 hours apart
    subprocess.run([FFMPEG, "-v", "error", "-f", "lavfi", "-i", "testsrc2=size=16x16:rate=1:duration=2", "-vf",
                    "setpts=N*86400/TB", "-fps_mode", "passthrough", "-pix_fmt", "yuv420p", str(path)], check=True)
    pieces = list(stream_views(path, 2, 16, [(16, "center", False)]))
    frames, most = sum(piece.shape[1] for piece, _ in pieces), 1000 + path.stat().st_size
    assert frames == most < 5000 and f"only its first {most} frames are taken" in pieces[-1][1]


def test_more_views_are_of_fewer_frames(tmp_path, write_video, monkeypatch):
    path = write_video(tmp_path / "v.mp4", range(0, 240, 10))
    monkeypatch.setattr(decoding, "MOST_PICTURES", 21)
    (frames, damage), = stream_views(path, 8, 32, [(32, "center", False)] * 2)
    assert frames.shape[1] == 10 and "first 10 frames" in damage


# ---------------------------------------------------------------- hostile files


@pytest.mark.parametrize("fps", [-1, 0, float("nan"), float("inf"), 1e-30, "8", "8,movie=other.mp4", None, True])
def test_a_rate_that_is_no_number_above_0_is_refused(tmp_path, write_video, fps):
    with pytest.raises(UserError, match="fps must be a number from") as error:
        read_frames(write_video(tmp_path / "v.mp4", [100] * 8), fps, 64)
    assert not isinstance(error.value, VideoError)


@pytest.mark.parametrize("size, view, span", [
    ("64", (64, "center", False), None), (64, ("64,null", "center", False), None), (64.0, (64, "center", False), None),
    (64, (64, ["center"], False), None), (64, (64, "center:0", False), None), (64, (64, "center", False), (0, "9")),
    (64, (64, "center", False), (-1, 9)), (64, (64, "center", False), (0, float("inf")))])
def test_nothing_but_numbers_enters_the_filters(tmp_path, write_video, size, view, span):
    with pytest.raises(UserError) as error:
        read_views(write_video(tmp_path / "v.mp4", [100] * 8), 8, size, [view], span)
    assert not isinstance(error.value, VideoError)


MANIFEST = """<?xml version="1.0"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" type="static"
 mediaPresentationDuration="PT3S" minBufferTime="PT1S"><Period><AdaptationSet mimeType="video/mp4">
<Representation id="1" bandwidth="1000" width="64" height="64"><BaseURL>other.mp4</BaseURL></Representation>
</AdaptationSet></Period></MPD>"""


@pytest.mark.parametrize("content", ["ffconcat version 1.0\nfile other.mp4\n", MANIFEST,
                                     "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.mp4\n#EXT-X-ENDLIST\n"])
def test_a_list_of_other_files_is_no_video(tmp_path, write_video, content):
    write_video(tmp_path / "other.mp4", [100] * 24, options=("-movflags", "frag_keyframe+empty_moov"))
    for ending in (".mp4", ".ts"):
        path = tmp_path / f"list{ending}"
        path.write_text(content)
        with pytest.raises(VideoError, match=path.name):
            read_frames(path, 8, 64)


CONTAINERS = {".3gp": "mpeg4", ".avi": "mpeg4", ".flv": "flv", ".m4v": "libx264", ".mkv": "libx264", ".mov": "mpeg4",
              ".mp4": "libx264", ".mpeg": "mpeg2video", ".mpg": "mpeg1video", ".ogv": "libtheora", ".ts": "mpeg2video",
              ".webm": "libvpx-vp9", ".wmv": "wmv2", "raw.mpg": "mpeg1video -f mpeg1video", "raw.m4v": "mpeg4 -f m4v"}


def test_every_kind_of_file_that_is_looked_for_is_decoded(tmp_path):
    assert set(decoding.VIDEO_ENDINGS) <= CONTAINERS.keys()
    for ending, codec in CONTAINERS.items():
        path = str(tmp_path / f"v{ending}")
        subprocess.run([FFMPEG, "-v", "error", "-f", "lavfi", "-i", "testsrc2=size=64x64:rate=25:duration=1", "-c:v",
                        *codec.split(), path], check=True)
        frames, expected = read_frames(path, 2, 64), by_command_line(path)
        assert np.array_equal(frames, expected) and len(frames) == 2, ending


def test_a_name_is_printed_in_one_line_whatever_it_holds():
    name = os.fsdecode(b"caf\xe9 \xc3\xa9\n\x1b[2J.mp4")
    assert decoding.printed(name) == "caf\\xe9 \u00e9\\n\\x1b[2J.mp4"
