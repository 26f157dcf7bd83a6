import json
import os
import signal
import subprocess
import sys
import time

import imageio_ffmpeg
import numpy as np
import pytest
import torch

import data
import vqvae
from conftest import ROOT

HEADER = {"tokenizer": "t.pt", "fingerprint": "0123456789ab", "vocab_size": 100, "fps": 8, "size": 16, "height": 2,
          "width": 2, "views": [[16, "center", False], [16, "center", True]], "root": "/videos", "classes": None}
PAD = 101


def write_store(path, videos, finish=True):
    """videos: {name: (tokens (views, F, 2, 2), labels)}"""
    writer = data.StoreWriter(path, HEADER)
    for number, (name, (tokens, labels)) in enumerate(videos.items()):
        if name not in writer.done:
            writer.add(number, name, tokens, labels)
    writer.close()
    if finish:
        writer.finish()
    return path


def some_videos(count=5, seed=0):
    random = np.random.default_rng(seed)
    return {f"class {i}/v#{i}é.mp4": (random.integers(100, size=(2, 3 + 4 * i, 2, 2)), {"label": i % 2, "other": i})
            for i in range(count)}


def numbered(tmp_path, frames):
    """A store of one video whose tokens are the frame's number."""
    tokens = np.broadcast_to(np.arange(frames)[:, None, None], (2, frames, 2, 2))
    return data.TokenStore(write_store(tmp_path / f"store{frames}", {"v.mp4": (tokens, {"label": 0})}))


# ---------------------------------------------------------------- decoding


def test_frames_come_at_the_rate_and_size_asked_for(tmp_path, write_video):
    path = write_video(tmp_path / "a b.mp4", range(0, 240, 10))  # 24 frames at 8 a second
    frames = data.read_frames(path, 8, 32)
    assert frames.shape == (24, 32, 32, 3) and frames.dtype == np.uint8
    assert np.abs(frames[:, 16, 16, 0].astype(int) - np.arange(0, 240, 10)).max() <= 4
    assert abs(len(data.read_frames(path, 2, 32)) - 6) <= 1


def test_crops_flips_and_resizes(tmp_path, write_video):
    path = write_video(tmp_path / "wide.mp4", [100] * 4, width=128)  # the stripe is at the left
    bright = {(crop, flip): data.read_frames(path, 8, 64, crop, flip)[0, 32, :, 0] > 180
              for crop in ("top-left", "center", "bottom-right") for flip in (False, True)}
    assert bright["top-left", False][:6].all() and not bright["top-left", False][10:].any()
    assert bright["top-left", True][-6:].all() and not bright["top-left", True][:-10].any()
    assert not bright["center", False].any() and not bright["bottom-right", True].any()
    zoomed = data.read_frames(path, 8, 64, "top-left", resize=80)[0, 32, :, 0] > 180
    assert zoomed.sum() == pytest.approx(10, abs=1)  # 8 pixels of 64 become 10 of 80


def test_one_decode_of_several_views_equals_several_decodes(tmp_path, write_video):
    path = write_video(tmp_path / "wide.mp4", range(0, 200, 20), width=100)
    views = [(32, "center", False), (40, "top-left", True), (40, "bottom-right", False)]
    together = data.read_views(path, 4, 32, views)
    for frames, (resize, crop, flip) in zip(together, views):
        assert np.array_equal(frames, data.read_frames(path, 4, 32, crop, flip, resize))


def test_a_video_shorter_than_an_interval_gives_a_frame(tmp_path, write_video):
    assert len(data.read_frames(write_video(tmp_path / "short.mp4", [50]), 0.5, 16)) == 1


@pytest.mark.parametrize("content", [b"", b"this is no video", None])
def test_a_file_without_video_is_named_with_a_reason(tmp_path, content):
    path = tmp_path / "bad.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(data.VideoError) as error:
        data.read_frames(path, 2, 16)
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value).splitlines()) == 1


def test_an_unknown_crop_is_refused(tmp_path):
    with pytest.raises(ValueError, match="upper"):
        data.read_frames(tmp_path / "v.mp4", 2, 16, crop="upper")


def by_command_line(path, *options):
    """The frames that the ffmpeg command line gives -> uint8 (F, 64, 64, 3)."""
    done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", "-i", str(path), *options, "-vf",
                           "fps=2,scale=64:64:force_original_aspect_ratio=increase,crop=64:64", "-pix_fmt", "rgb24",
                           "-f", "rawvideo", "-"], capture_output=True)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, 64, 64, 3)


def check_against_the_command_line(path):
    frames, expected = data.read_frames(path, 2, 64), by_command_line(path)
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
    level = data.read_frames(path, 8, 64)[:, 32, 50, 0].astype(int)
    assert np.abs(level - np.arange(0, 250, 10)[:len(level)]).mean() < 6


def test_a_turned_video_is_turned_back(tmp_path, write_video):
    path = write_video(tmp_path / "flat.mp4", [100] * 8, width=128)
    turned = tmp_path / "turned.mp4"
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90", "-i", str(path), "-c",
                    "copy", str(turned)], check=True)
    upright = data.read_frames(turned, 8, 64, "bottom-right")[0, :, :, 0] > 180
    assert upright[-6:].all() and not upright[:-16].any()  # the stripe at the left is now at the bottom


def test_of_several_video_streams_the_one_that_ffmpeg_takes(tmp_path, write_video):
    small, large = (write_video(tmp_path / f"{side}.mp4", [level] * 8, width=side, height=side)
                    for side, level in ((64, 50), (128, 150)))
    both = tmp_path / "both.mkv"
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(small), "-i", str(large), "-map", "0:v",
                    "-map", "1:v", "-c", "copy", str(both)], check=True)
    assert abs(int(data.read_frames(both, 8, 64)[0, 32, 40, 0]) - 150) < 6
    check_against_the_command_line(both)


def test_a_damaged_video_gives_what_decodes(tmp_path, write_video):
    path = write_video(tmp_path / "v.mkv", range(0, 240, 2), codec="libx264", options=("-g", "10"))
    content = path.read_bytes()
    path.write_bytes(content[:len(content) * 6 // 10])
    assert 10 < len(data.read_frames(path, 8, 32)) < 120


def test_only_the_frames_of_a_span(tmp_path, write_video):
    path = write_video(tmp_path / "v.mp4", range(0, 240, 10))
    frames = data.read_views(path, 8, 64, [(64, "center", False)], span=(5, 12))[0]
    assert np.abs(frames[:, 32, 40, 0].astype(int) - np.arange(50, 120, 10)).max() <= 4


@pytest.mark.skipif(not os.environ.get("REAL_VIDEOS"), reason="REAL_VIDEOS names no folder")
def test_real_files():
    found = [path for path, _ in data.list_videos("folder", os.environ["REAL_VIDEOS"], "")]
    bad = []
    for path in found:
        try:
            data.read_frames(path, 2, 64)
        except data.VideoError as error:
            bad.append(os.path.basename(path))
            assert path in str(error) and len(str(error).splitlines()) == 1
        else:
            check_against_the_command_line(path)
    assert set(bad) <= {"empty.mp4", "not_a_video.mp4", "truncated.mp4"} and len(found) > len(bad)


# ---------------------------------------------------------------- listing


def test_lists_with_numbers_words_and_spaces(tmp_path):
    for name in ("a b/c.mp4", "c.mp4", "d.mp4", "e.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "train.txt").write_text("a b/c.mp4 1\nd.mp4 0\n")
    expected = [(str(tmp_path / "a b/c.mp4"), 1), (str(tmp_path / "d.mp4"), 0)]
    assert data.list_videos("list", tmp_path, "train") == expected
    (tmp_path / "train.txt").write_text("c.mp4 walk\nd.mp4 jump\n")
    (tmp_path / "test.txt").write_text("e.mp4 walk\n")
    assert [label for _, label in data.list_videos("list", tmp_path, "train")] == [1, 0]
    assert [label for _, label in data.list_videos("list", tmp_path, "test")] == [1]
    (tmp_path / "test.txt").write_text("e.mp4 swim\n")
    with pytest.raises(ValueError, match="swim"):
        data.list_videos("list", tmp_path, "test")


def test_what_is_missing_is_named(tmp_path):
    for dataset, root in (("folder", tmp_path), ("folder", tmp_path / "none"), ("list", tmp_path)):
        with pytest.raises(FileNotFoundError, match=str(root)):
            data.list_videos(dataset, root, "train")
    with pytest.raises(FileNotFoundError, match="tokenize"):
        data.TokenStore(tmp_path)


# ---------------------------------------------------------------- the token store


def test_what_is_written_is_read(tmp_path):
    videos = some_videos()
    store = data.TokenStore(write_store(tmp_path / "s", videos))
    assert len(store) == 5 and store.label_sets() == ["label", "other"]
    for i, (name, (tokens, labels)) in enumerate(videos.items()):
        assert store.name(i) == name
        assert [store.labels(key)[i] for key in labels] == list(labels.values())
        for view in range(2):
            assert np.array_equal(store.tokens(i, view), tokens[view])
    assert json.loads((tmp_path / "s/header.json").read_text())["tokenizer"] == "t.pt"


@pytest.mark.parametrize("lost", ["tokens", "journal", "both"])
def test_a_store_cut_short_is_completed(tmp_path, lost):
    videos = some_videos()
    write_store(tmp_path / "s", dict(list(videos.items())[:3]), finish=False)
    if lost != "journal":  # killed while the tokens of the fourth video were written
        with open(tmp_path / "s/tokens-00000.bin", "ab") as file:
            file.write(b"\1" * 7)
    if lost != "tokens":  # killed while the line about the third was written
        text = (tmp_path / "s/journal-00000.jsonl").read_text()
        (tmp_path / "s/journal-00000.jsonl").write_text(text[:-9])
    again = data.TokenStore(write_store(tmp_path / "s", videos))
    whole = data.TokenStore(write_store(tmp_path / "whole", videos))
    assert len(again) == 5
    for i in range(5):
        assert again.name(i) == whole.name(i)
        assert np.array_equal(again.tokens(i, 1), whole.tokens(i, 1))


def test_a_tokenisation_killed_again_and_again_ends_like_one_that_was_not(tmp_path, write_video):
    for i in range(30):
        write_video(tmp_path / f"videos/{i}.mp4", range(0, 240, 5 + i))
    torch.manual_seed(0)
    tokenizer = vqvae.VQVAE(codes=32, width=16)
    tokenizer.codebook.codes.normal_(std=0.1)
    vqvae.save_tokenizer(tokenizer, tmp_path / "t.pt")

    def start(out):
        command = [sys.executable, ROOT / "vqvae.py", "tokenize", "--videos", tmp_path / "videos", "--tokenizer",
                   tmp_path / "t.pt", "--frame-size", 32, "--fps", 8, "--batch", 64, "--workers", 1, "--out",
                   tmp_path / out]
        return subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)

    for lines in (1, 6, 12):  # killed as soon as so many videos are there
        process = start("killed")
        journal = tmp_path / "killed/journal-00000.jsonl"
        while process.poll() is None and (not journal.is_file() or journal.read_text().count("\n") < lines):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed/index.npy").is_file()  # it was killed before its end, each time
    assert start("killed").wait() == 0 and start("whole").wait() == 0
    killed, whole = (data.TokenStore(tmp_path / out) for out in ("killed", "whole"))
    assert [killed.name(i) for i in range(len(killed))] == [whole.name(i) for i in range(30)]
    assert all(np.array_equal(killed.tokens(i), whole.tokens(i)) for i in range(30))


def test_a_store_of_another_kind_is_refused(tmp_path):
    write_store(tmp_path / "s", some_videos())
    with pytest.raises(ValueError, match="fps 8, not 2"):
        data.StoreWriter(tmp_path / "s", {**HEADER, "fps": 2})


# ---------------------------------------------------------------- clips


@pytest.mark.parametrize("length, frames, stride, last", [(10, 5, 1, 5), (10, 5, 2, 1), (10, 5, 3, 0), (1, 5, 1, 0)])
def test_the_last_start_that_fits(length, frames, stride, last):
    assert data.last_start(length, frames, stride) == last


def test_a_short_video_is_padded_at_its_end(tmp_path):
    store = numbered(tmp_path, 3)
    clip = data.cut(store.tokens(0), 1, 5, 1, PAD)
    assert clip[:, 0, 0].tolist() == [1, 2, PAD, PAD, PAD] and (clip[2:] == PAD).all()
    pair = data.ClipPairs(store, 5)[0, 0]
    assert pair[:, :, 0, 0].tolist() == [[0, 1, 2, PAD, PAD]] * 2


def test_pairs_cover_all_starts_and_strides_and_repeat(tmp_path):
    store = numbered(tmp_path, 20)
    pairs = data.ClipPairs(store, 4, strides=(1, 3))
    clips = np.stack([pairs[0, epoch] for epoch in range(400)])[..., 0, 0]  # (400, 2, 4)
    strides = clips[:, :, 1] - clips[:, :, 0]
    assert set(strides.flatten()) == {1, 2, 3} and (np.diff(clips, axis=2) == strides[..., None]).all()
    for stride in (1, 2, 3):
        assert set(clips[strides == stride][:, 0]) == set(range(20 - 3 * stride))
    assert abs(np.corrcoef(clips[:, 0, 0], clips[:, 1, 0])[0, 1]) < 0.2  # drawn independently
    assert np.array_equal(pairs[0, 7], pairs[0, 7])


def test_d_max_limits_the_distance_of_the_starts(tmp_path):
    store = numbered(tmp_path, 60)  # 8 frames a second
    for d_max, most in ((1, 8), (0, 0)):
        starts = np.stack([data.ClipPairs(store, 4, d_max=d_max)[0, e][:, 0, 0, 0] for e in range(200)])
        assert np.abs(starts[:, 0] - starts[:, 1]).max() == most


def test_fine_tuning_draws_every_view_and_subsamples(tmp_path):
    store = data.TokenStore(write_store(tmp_path / "s", some_videos()))
    clips = data.RandomClips(store, "other", 3, stride=2)
    seen = set()
    for epoch in range(60):
        clip, label = clips[4, epoch]
        assert label == 4
        matches = [(view, start) for view in range(2) for start in range(15)
                   if np.array_equal(clip, store.tokens(4, view)[start:start + 5:2])]
        assert len(matches) == 1
        seen.update(matches)
    assert {view for view, _ in seen} == {0, 1} and len({start for _, start in seen}) > 10


def test_even_clips_span_the_video(tmp_path):
    starts = data.even_clips(numbered(tmp_path, 25), 0, 5, 1, 5)[:, 0, 0, 0]
    assert starts.tolist() == [0, 5, 10, 15, 20] * 2  # two views
    assert data.even_clips(numbered(tmp_path, 25), 0, 5, 1, 1)[0, 0, 0, 0] == 10  # one clip: the middle


def test_batches_are_shared_by_processes_and_resumed():
    whole = list(data.Batches(10, 4, steps=7, seed=3))
    halves = [list(data.Batches(10, 4, steps=7, seed=3, rank=rank, world=2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves)] == [sorted(batch) for batch in whole]
    assert list(data.Batches(10, 4, steps=7, first_step=5, seed=3)) == whole[5:]
    assert all(len(set(a + b)) == 8 for a, b in zip(whole[::2], whole[1::2]))  # an epoch repeats no video
    assert [video for video, _ in whole[0]] != [video for video, _ in whole[2]]
