"""ffmpeg: video files written here, and real ones from the folder that REAL_VIDEOS names."""
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
from plumbing.cli import UserError
from plumbing.datasets import list_videos
from plumbing.decoding import VideoError, map_videos, read_frames, read_views, stream_views

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


def make(*options):
    """Runs ffmpeg."""
    subprocess.run([FFMPEG, "-v", "error", *map(str, options)], check=True)


def test_frames_have_the_requested_rate_and_size(tmp_path, write_video):
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


def test_a_file_of_audio_alone_holds_no_video(tmp_path):
    path = tmp_path / "song.mp4"
    make("-f", "lavfi", "-i", "sine=duration=1", path)
    with pytest.raises(VideoError, match=f"^{path}: it holds no video$"):
        read_frames(path, 2, 16)


@pytest.mark.parametrize("ending", ["gif", "mp3"])
def test_gifs_and_sound_files_are_refused(tmp_path, ending):
    path, renamed = tmp_path / f"v.{ending}", tmp_path / "v.mp4"
    make("-f", "lavfi", "-i", "testsrc2=size=32x32:rate=4:duration=1", "-f", "lavfi",
         "-i", "sine=duration=1", path)
    path.rename(renamed)
    with pytest.raises(VideoError, match=f"^{renamed}: it is no video file.*GIFs, .*not read"):
        read_frames(renamed, 2, 16)


@pytest.mark.parametrize("content", [b"", b"this is no video", None])
def test_a_file_without_video_is_named_with_a_reason(tmp_path, content):
    path = tmp_path / "bad.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VideoError) as error:
        read_frames(path, 2, 16)
    line = str(error.value)
    assert line.startswith(f"{path}: ") and len(line.splitlines()) == 1


def test_an_unknown_crop_is_refused(tmp_path):
    with pytest.raises(UserError, match="upper.*center"):
        read_frames(tmp_path / "v.mp4", 2, 16, crop="upper")


# ---------------------------------------------------------------- as the released extraction


def scaled_size(width, height, side):
    """The frame size of the released extraction: the longer side is truncated."""
    if height >= width:
        return side, int(height * side / width)
    return int(width * side / height), side


SIZES = [(64, 64), (320, 240), (171, 129), (129, 171), (125, 77), (33, 200), (41, 40)]


@pytest.mark.parametrize("width, height", SIZES)
def test_frames_are_scaled_and_cropped_as_in_the_released_extraction(tmp_path, width, height):
    """ffmpeg scales to the size computed here, and numpy crops."""
    path = tmp_path / "v.mkv"
    make("-f", "lavfi", "-i", f"testsrc=size={width}x{height}:rate=4:duration=1",
         "-pix_fmt", "yuv420p", "-c:v", "ffv1", path)
    for size, resize in ((32, 32), (32, 40)):
        columns, rows = scaled_size(width, height, resize)
        done = subprocess.run([FFMPEG, "-v", "error", "-i", str(path), "-vf",
                               f"scale={columns}:{rows}:flags=bilinear", "-pix_fmt", "rgb24",
                               "-f", "rawvideo", "-"], capture_output=True, check=True)
        scaled = np.frombuffer(done.stdout, np.uint8).reshape(4, rows, columns, 3)
        corners = {"center": (int((rows - size) / 2), int((columns - size) / 2)),
                   "top-left": (0, 0), "bottom-right": (rows - size, columns - size)}
        for crop, (y, x) in corners.items():
            expected = scaled[:, y:y + size, x:x + size]
            assert np.array_equal(read_frames(path, 4, size, crop, resize=resize), expected)
            mirrored = read_frames(path, 4, size, crop, flip=True, resize=resize)
            assert np.array_equal(mirrored, expected[:, :, ::-1])


def test_a_video_that_starts_after_its_audio_starts_with_its_first_frame(tmp_path, write_video):
    """As in files cut with -c copy. The first frame is not repeated while only audio plays."""
    grey = range(0, 240, 10)
    video, late = write_video(tmp_path / "v.mp4", grey), tmp_path / "late.mp4"
    make("-f", "lavfi", "-i", "sine=duration=2", "-itsoffset", 0.9, "-i", video,
         "-map", "0:a", "-map", "1:v", "-c:v", "copy", late)
    expected = read_frames(video, 8, 64)
    assert len(expected) == 24 and np.array_equal(read_frames(late, 8, 64), expected)
    assert np.array_equal(read_frames(late, 2, 64), read_frames(video, 2, 64))
    span = read_views(late, 8, 64, [(64, "center", False)], span=(5, 12))[0]
    assert np.array_equal(span, expected[5:12])


def test_no_frame_is_lost_where_the_frame_size_changes(tmp_path):
    parts = [tmp_path / "a.ts", tmp_path / "b.ts"]
    for path, size in zip(parts, ("160x120", "120x160")):
        make("-f", "lavfi", "-i", f"testsrc=size={size}:rate=25:duration=1", "-c:v", "mpeg2video",
             "-f", "mpegts", path)
    both = tmp_path / "both.ts"
    both.write_bytes(b"".join(path.read_bytes() for path in parts))
    first, second = (read_frames(path, 5, 64) for path in parts)
    frames = read_frames(both, 5, 64)
    assert len(frames) == 10
    assert np.abs(frames[:5].astype(int) - first).mean() < 5
    assert np.abs(frames[5:].astype(int) - second).mean() < 5
    span = read_views(both, 25, 64, [(64, "center", False)], span=(20, 30))[0]
    every = [read_frames(path, 25, 64) for path in parts]
    assert len(span) in (9, 10)  # the rate's filter may lose one where it starts anew
    for frame, expected in ((span[0], every[0][20]), (span[-1], every[1][4])):
        assert np.abs(frame.astype(int) - expected).mean() < 5


def test_pixels_are_taken_as_square(tmp_path, write_video):
    """As in the released extraction, which ignores the sample aspect ratio."""
    path, wide = write_video(tmp_path / "v.mp4", [100] * 4), tmp_path / "wide.mp4"
    make("-i", path, "-c", "copy", "-bsf:v", "h264_metadata=sample_aspect_ratio=2/1", wide)
    assert np.array_equal(read_frames(wide, 8, 64), read_frames(path, 8, 64))


# ---------------------------------------------------------------- as the ffmpeg command line


def by_command_line(path):
    """The frames that the ffmpeg command line gives -> uint8 (F, 64, 64, 3)."""
    graph = ("setpts=PTS-STARTPTS,fps=2,scale=w='if(gte(ih,iw),64,trunc(iw*64/ih))':"
             "h='if(gte(ih,iw),trunc(ih*64/iw),64)':flags=bilinear,crop=64:64")
    done = subprocess.run([FFMPEG, "-v", "quiet", "-threads", "1", "-i", str(path), "-vf", graph,
                           "-pix_fmt", "rgb24", "-f", "rawvideo", "-"],
                          capture_output=True, check=False)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, 64, 64, 3)


def check_against_the_command_line(path):
    frames, expected = read_frames(path, 2, 64), by_command_line(path)
    if len(expected):  # the command line gives no frame of a video shorter than half an interval
        assert np.array_equal(frames, expected)
    _, seconds = imageio_ffmpeg.count_frames_and_secs(str(path))
    assert abs(len(frames) - 2 * seconds) <= 1 and len(frames) >= 1


CODECS = {
    "h264.mp4": ("libx264", ()),
    "hevc10.mp4": ("libx265", ("-pix_fmt", "yuv420p10le")),
    "vp9.webm": ("libvpx-vp9", ()),
    "av1.mkv": ("libsvtav1", ("-preset", "12")),
    "mpeg4.avi": ("mpeg4", ()),
}


@pytest.mark.parametrize("name", CODECS)
def test_frames_are_those_of_the_ffmpeg_command_line(tmp_path, write_video, name):
    codec, options = CODECS[name]
    path = write_video(tmp_path / name, range(0, 250, 10), width=96, height=128, codec=codec,
                       options=options)
    check_against_the_command_line(path)
    level = read_frames(path, 8, 64)[:, 32, 50, 0].astype(int)
    assert np.abs(level - np.arange(0, 250, 10)[:len(level)]).mean() < 6


def test_a_rotated_video_is_rotated_back(tmp_path, write_video):
    path = write_video(tmp_path / "flat.mp4", [100] * 8, width=128)
    turned = tmp_path / "turned.mp4"
    make("-display_rotation", "90", "-i", path, "-c", "copy", turned)
    upright = read_frames(turned, 8, 64, "bottom-right")[0, :, :, 0] > 180
    assert upright[-6:].all() and not upright[:-16].any()  # the stripe is now at the bottom


def test_of_several_video_streams_ffmpeg_s_choice_is_read(tmp_path, write_video):
    small, large = (write_video(tmp_path / f"{side}.mp4", [level] * 8, width=side, height=side)
                    for side, level in ((64, 50), (128, 150)))
    both = tmp_path / "both.mkv"
    make("-i", small, "-i", large, "-map", "0:v", "-map", "1:v", "-c", "copy", both)
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
    paths = [path for path, _ in list_videos("folder", os.environ["REAL_VIDEOS"], "")]
    bad = []
    for path in paths:
        try:
            read_frames(path, 2, 64)
        except VideoError as error:
            bad.append(os.path.basename(path))
            assert path in str(error) and len(str(error).splitlines()) == 1
        else:
            check_against_the_command_line(path)
    assert set(bad) <= {"empty.mp4", "not_a_video.mp4", "truncated.mp4"}
    assert len(paths) > len(bad)


# ---------------------------------------------------------------- many files


def numbers(pieces):
    return [int(piece[0]) for piece, _ in pieces]


def test_many_files_come_in_order_a_few_at_a_time(monkeypatch):
    started, results = [], []
    monkeypatch.setattr(decoding, "cores", lambda: 2)

    def read(number):
        started.append(number)
        time.sleep(0.002 * (12 - number))  # later files are faster
        for part in range(3):
            if (number, part) == (5, 1):
                raise VideoError("5 is broken")
            yield np.array([10 * number + part]), None

    for number, result, error in map_videos(numbers, read, range(12), workers=2):
        results.append(number)
        time.sleep(0.05)  # the caller is slow
        assert len(started) - len(results) <= 4
        if number == 5:
            assert result is None and error == "5 is broken"
        else:
            assert result == [10 * number + part for part in range(3)] and error is None
    assert results == list(range(12))


def test_an_error_that_is_not_the_file_s_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(map_videos(list, lambda number: [(np.zeros(1 // number), None)], [1, 0, 2], 2))


def test_at_most_one_file_more_than_cores_is_read_at_once(monkeypatch):
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

    assert len(list(map_videos(list, read, range(20), workers=16))) == 20
    assert most[0] == 3


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = decoding.cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert 1 <= decoding.cores() <= max(1, alone // 2)


def test_a_caller_that_stops_leaves_no_thread_at_work():
    def read(number):
        for _ in range(9):
            time.sleep(0.05)
            yield np.zeros(2, np.uint8), None

    before = threading.active_count()
    results = map_videos(list, read, range(9), 2)
    next(results)
    assert threading.active_count() == before + 2
    start = time.perf_counter()
    results.close()
    assert threading.active_count() == before
    assert time.perf_counter() - start < 0.3  # no file is read to its end


FAILING = """
import time
from plumbing.decoding import map_videos
def slow(path):
    for _ in range(999):
        time.sleep(0.1)
        yield None, None
def read(path):
    return slow(path) if path else [(None, None)]
def main():
    for _ in map_videos(list, read, range(9), 2):
        raise SystemError("the GPU is gone")
main()
"""


def test_a_script_that_fails_does_not_wait_for_other_files():
    done = subprocess.run([sys.executable, "-c", FAILING], cwd=ROOT, capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode == 1 and "the GPU is gone" in done.stderr


# ---------------------------------------------------------------- what goes wrong


@pytest.fixture
def other_ffmpeg(tmp_path, monkeypatch):
    """Replaces ffmpeg by a shell script, in which $FFMPEG is the real one."""
    def put(script):
        path = tmp_path / "other_ffmpeg"
        path.write_text(f"#!/bin/sh\nFFMPEG='{FFMPEG}'\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))
    return put


CENTER = [(64, "center", False)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_ffmpeg_is_an_error(tmp_path, write_video, monkeypatch, number):
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
    message = rf"{path}: ffmpeg was killed.* after \d+ frames.*memory"
    with pytest.raises(VideoError, match=message) as error:
        list(pieces)
    if number == signal.SIGKILL:  # at SIGTERM it still gives what it has decoded
        assert int(str(error.value).split(" frames")[0].split()[-1]) < 400


def test_an_ffmpeg_without_memory_is_an_error(tmp_path, write_video, other_ffmpeg):
    path = write_video(tmp_path / "v.mp4", [100] * 40)
    other_ffmpeg('"$FFMPEG" "$@" | head -c 122880\necho "decoder: Cannot allocate memory" >&2')
    with pytest.raises(VideoError, match="too little memory after 10 frames"):
        read_views(path, 8, 64, CENTER)


def test_an_ffmpeg_that_fails_is_not_taken_for_a_short_video(tmp_path, write_video, other_ffmpeg):
    path = write_video(tmp_path / "v.mp4", [100] * 40)
    other_ffmpeg('case "$*" in *fps=*) echo "No such filter: fps" >&2; exit 8;; esac\n'
                 'exec "$FFMPEG" "$@"')
    with pytest.raises(VideoError, match="No such filter: fps"):
        read_views(path, 8, 64, CENTER)


def test_the_frames_of_a_damaged_video_are_counted(tmp_path, write_video):
    path = write_video(tmp_path / "v.mkv", range(0, 240, 2), codec="libx264", options=("-g", "10"))
    assert [damage for _, damage in stream_views(path, 8, 64, CENTER)] == [None]
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])
    (frames, damage), = stream_views(path, 8, 64, CENTER)
    assert re.fullmatch(rf"{path}: gave {frames.shape[1]} frames, perhaps not all: .+", damage)


def test_an_ffmpeg_that_hangs_is_killed(tmp_path, write_video, other_ffmpeg, monkeypatch):
    path = write_video(tmp_path / "v.mp4", [100] * 4)
    other_ffmpeg("exec sleep 1000")
    monkeypatch.setattr(decoding, "QUIET", 0.2)
    with pytest.raises(VideoError, match="gave nothing for 0.2 seconds"):
        read_frames(path, 8, 64)


def test_a_device_or_folder_is_refused_unopened(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    for name in ("folder.mp4", "fifo.mp4", "zero.mp4"):
        with pytest.raises(VideoError, match=f"{name}: it is no regular file"):
            read_frames(tmp_path / name, 2, 16)


def test_the_pieces_of_a_video_are_its_frames(tmp_path, write_video, monkeypatch):
    path = write_video(tmp_path / "v.mp4", range(0, 240, 10))
    views = [(32, "center", False), (40, "top-left", True)]
    whole = read_views(path, 8, 32, views)
    for frames in (1, 5, 8, 23, 24):
        monkeypatch.setattr(decoding, "PIECE", frames * 2 * 32 * 32 * 3)
        pieces = [piece for piece, _ in stream_views(path, 8, 32, views)]
        rest = [24 % frames] * (24 % frames > 0)
        assert [piece.shape[1] for piece in pieces] == [frames] * (24 // frames) + rest
        assert np.array_equal(np.concatenate(pieces, axis=1), whole)


def test_a_few_bytes_do_not_become_a_day_of_frames(tmp_path):
    path = tmp_path / "gap.mp4"  # two frames, 24 hours apart
    make("-f", "lavfi", "-i", "testsrc2=size=16x16:rate=1:duration=2", "-vf", "setpts=N*86400/TB",
         "-fps_mode", "passthrough", "-pix_fmt", "yuv420p", path)
    pieces = list(stream_views(path, 2, 16, [(16, "center", False)]))
    frames, most = sum(piece.shape[1] for piece, _ in pieces), 1000 + path.stat().st_size
    assert frames == most < 5000
    assert f"only its first {most} frames are taken" in pieces[-1][1]


def test_more_views_have_fewer_frames(tmp_path, write_video, monkeypatch):
    path = write_video(tmp_path / "v.mp4", range(0, 240, 10))
    monkeypatch.setattr(decoding, "MOST_PICTURES", 21)
    (frames, damage), = stream_views(path, 8, 32, [(32, "center", False)] * 2)
    assert frames.shape[1] == 10 and "first 10 frames" in damage


# ---------------------------------------------------------------- hostile files


@pytest.mark.parametrize("fps", [
    -1, 0, float("nan"), float("inf"), 1e-30, "8", "8,movie=other.mp4", None, True])
def test_a_rate_that_is_no_number_above_0_is_refused(tmp_path, write_video, fps):
    with pytest.raises(UserError, match="fps must be a number from") as error:
        read_frames(write_video(tmp_path / "v.mp4", [100] * 8), fps, 64)
    assert not isinstance(error.value, VideoError)


@pytest.mark.parametrize("size, view, span", [
    ("64", (64, "center", False), None),
    (64, ("64,null", "center", False), None),
    (64.0, (64, "center", False), None),
    (64, (64, ["center"], False), None),
    (64, (64, "center:0", False), None),
    (64, (64, "center", False), (0, "9")),
    (64, (64, "center", False), (-1, 9)),
    (64, (64, "center", False), (0, float("inf")))])
def test_only_numbers_enter_the_filters(tmp_path, write_video, size, view, span):
    path = write_video(tmp_path / "v.mp4", [100] * 8)
    with pytest.raises(UserError) as error:
        read_views(path, 8, size, [view], span)
    assert not isinstance(error.value, VideoError)


MANIFEST = """<?xml version="1.0"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"
 profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" type="static"
 mediaPresentationDuration="PT3S" minBufferTime="PT1S"><Period><AdaptationSet mimeType="video/mp4">
<Representation id="1" bandwidth="1000" width="64" height="64">
<BaseURL>other.mp4</BaseURL></Representation>
</AdaptationSet></Period></MPD>"""


@pytest.mark.parametrize("content", [
    "ffconcat version 1.0\nfile other.mp4\n", MANIFEST,
    "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.mp4\n#EXT-X-ENDLIST\n"])
def test_a_list_of_other_files_is_no_video(tmp_path, write_video, content):
    write_video(tmp_path / "other.mp4", [100] * 24,
                options=("-movflags", "frag_keyframe+empty_moov"))
    for ending in (".mp4", ".ts"):
        path = tmp_path / f"list{ending}"
        path.write_text(content)
        with pytest.raises(VideoError, match=path.name):
            read_frames(path, 8, 64)


CONTAINERS = {
    ".3gp": "mpeg4", ".avi": "mpeg4", ".flv": "flv", ".m4v": "libx264", ".mkv": "libx264",
    ".mov": "mpeg4", ".mp4": "libx264", ".mpeg": "mpeg2video", ".mpg": "mpeg1video",
    ".ogv": "libtheora", ".ts": "mpeg2video", ".webm": "libvpx-vp9", ".wmv": "wmv2",
    "raw.mpg": "mpeg1video -f mpeg1video", "raw.m4v": "mpeg4 -f m4v",
}


def test_every_listed_kind_of_file_is_decoded(tmp_path):
    assert set(decoding.VIDEO_ENDINGS) <= CONTAINERS.keys()
    for ending, codec in CONTAINERS.items():
        path = str(tmp_path / f"v{ending}")
        make("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=25:duration=1", "-c:v",
             *codec.split(), path)
        frames, expected = read_frames(path, 2, 64), by_command_line(path)
        assert np.array_equal(frames, expected) and len(frames) == 2, ending


def test_any_name_is_printed_in_one_line():
    name = os.fsdecode(b"caf\xe9 \xc3\xa9\n\x1b[2J.mp4")
    assert decoding.printed(name) == "caf\\xe9 \u00e9\\n\\x1b[2J.mp4"
