"""ffmpeg: video files written here, and the real ones of the folder that REAL_VIDEOS names."""
import os
import subprocess
import time

import imageio_ffmpeg
import numpy as np
import pytest

from plumbing.annotations import list_videos
from plumbing.cli import UserError
from plumbing.decoding import VideoError, decode_all, read_frames, read_views


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


def test_many_files_come_in_order_a_few_at_a_time():
    started, taken = [], []

    def read(number):
        started.append(number)
        time.sleep(0.002 * (12 - number))  # the later, the sooner done
        if number == 5:
            raise VideoError("5 is broken")
        return 10 * number
    for number, result in decode_all(range(12), read, workers=2):
        taken.append(number)
        time.sleep(0.05)  # who takes them is slow
        assert len(started) - len(taken) <= 4
        assert str(result) == ("5 is broken" if number == 5 else str(10 * number))
    assert taken == list(range(12))


def test_an_error_that_is_no_video_s_fault_is_not_passed_over():
    with pytest.raises(ZeroDivisionError):
        list(decode_all([1, 0, 2], lambda number: 1 // number, workers=2))
