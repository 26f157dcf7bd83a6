"""The toy world: real video files whose pixels show what their labels say."""
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest

import data
import toy
from plumbing.cli import UserError

SPLITS = {"pretrain": 6, "train": 5, "val": 4, "test": 3}


def test_the_world_is_real_files_with_lists(tmp_path):
    root = toy.make(tmp_path / "toy", SPLITS, seed=1, workers=1)
    number = 0
    for split, count in SPLITS.items():
        videos = toy.split_videos(root, split)
        assert len(videos) == count
        for path, labels in videos:
            drawn, truth = toy.draw_video(number, seed=1)
            frames = data.read_frames(path, toy.FPS, toy.SIZE)
            assert labels == truth and frames.shape == drawn.shape == (toy.FRAMES, 64, 64, 3)
            assert np.abs(frames.astype(int) - drawn).mean() < 4
            number += 1
    assert len(list((root / "videos").iterdir())) == 18
    picture = imageio.imread(root / "toy.png")
    assert picture.shape[0] > 4 * 64 and picture.std() > 20


def test_incomplete_splits_are_made_again_and_complete_ones_are_left(tmp_path):
    root = toy.make(tmp_path / "toy", {"train": 2}, workers=1)
    video = root / "videos/00000.mp4"
    video.write_bytes(b"")
    assert toy.make(root, {"train": 2}, workers=1) == root and video.read_bytes() == b""
    (root / "appearance/train.txt").unlink()
    toy.make(root, {"train": 2}, workers=1)
    assert len(data.read_frames(video, toy.FPS, toy.SIZE)) == toy.FRAMES


def test_a_world_written_split_by_split_equals_one_written_at_once(tmp_path):
    split_by_split, at_once = (tmp_path / "a", tmp_path / "b")
    for split in ("val", "pretrain"):
        toy.make(split_by_split, SPLITS, workers=1, wanted=[split])
        assert toy.finished(split_by_split, [split]) and not toy.finished(split_by_split)
    with pytest.raises(UserError, match="was made with"):
        toy.make(split_by_split, SPLITS, seed=1, workers=1)
    for root in (split_by_split, at_once):
        toy.make(root, SPLITS, workers=1)
        assert toy.finished(root)
    assert files_below(split_by_split) == files_below(at_once)


def files_below(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*")
            if path.is_file()}


def test_a_world_of_other_settings_is_refused(tmp_path):
    toy.make(tmp_path / "toy", {"train": 2}, seed=1, workers=1)
    with pytest.raises(UserError, match='made with .*"seed": 1.*, not .*"seed": 0'):
        toy.make(tmp_path / "toy", {"train": 2}, workers=1)
    with pytest.raises(UserError, match='"train": 2.* not .*"train": 3'):
        toy.make(tmp_path / "toy", {"train": 3}, seed=1, workers=1)
    with pytest.raises(UserError, match='"seed": 1.* not .*"light": false'):
        toy.make(tmp_path / "toy", {"train": 2}, seed=1, workers=1, world=toy.World(light=False))
    (tmp_path / "toy/toy.json").write_bytes(b"{\xff")
    with pytest.raises(UserError, match="was made with"):
        toy.make(tmp_path / "toy", {"train": 2}, seed=1, workers=1)
    (tmp_path / "toy/toy.json").unlink()
    assert toy.make(tmp_path / "toy", {"train": 3}, workers=1) == tmp_path / "toy"


def test_a_disk_that_is_too_small_for_the_world_is_called_full(tmp_path, small_disk):
    argv = [sys.executable, toy.__file__, "--out", tmp_path / "disk/toy"]
    done = subprocess.run([*small_disk(tmp_path / "disk"), *argv], check=False,
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert f"the disk of {tmp_path}/disk/toy/videos is full" in done.stderr.splitlines()[-1]


def ink(video):
    """The pixels of the shape: bool, of a video (F, S, S, 3) or a frame (S, S, 3)."""
    background = np.median(video, axis=(-3, -2), keepdims=True)
    return np.abs(video.astype(int) - background).max(axis=-1) > 25


def centre(shapes):
    """The middle of bool (F, S, S) on the torus, in pixels -> (2, F): x and y, without jumps."""
    wave = np.exp(2j * np.pi * np.arange(64) / 64)
    angles = [np.angle((shapes.sum(axis) * wave).sum(-1)) for axis in (1, 2)]
    return np.unwrap(angles) * 64 / (2 * np.pi)


def tilt(shapes, centres):
    """The longer axis of bool (F, S, S), by its second moments -> its angle (F,) without jumps, and
    its share of the size (F,), 0 for a symmetric shape."""
    pixel = np.arange(64)
    dx, dy = ((pixel - c[:, None] + 32) % 64 - 32 for c in centres)  # (F, S) each
    xx = (shapes * dx[:, None, :] ** 2).sum((1, 2))
    yy = (shapes * dy[:, :, None] ** 2).sum((1, 2))
    xy = (shapes * dx[:, None, :] * dy[:, :, None]).sum((1, 2))
    return np.unwrap(np.arctan2(2 * xy, xx - yy)) / 2, np.hypot(2 * xy, xx - yy) / (xx + yy)


def test_motions_do_what_their_name_says():
    """Follows the shape's centre, size and tilt through the frames, from its pixels alone."""
    seen = set()
    for number in range(160):
        video, labels = toy.draw_video(number)
        shapes = ink(video)  # (F, S, S)
        centres, area = centre(shapes), shapes.sum(axis=(1, 2))
        moved = centres[:, 8] - centres[:, 0]  # pixels in eight frames
        angles, length = tilt(shapes, centres)
        motion, direction = toy.MOTIONS[labels["motion"]], toy.DIRECTIONS[labels["direction"]]
        if motion in ("sideways", "up-and-down"):
            along, across = moved if motion == "sideways" else moved[::-1]
            assert 10 < abs(along) < 26 and abs(across) < 4
            assert (along > 0) == (direction in ("right", "down"))
        else:
            assert np.abs(moved).max() < 8
        if motion == "scale":
            assert np.ptp(area) > 0.4 * area.max()
            assert (np.median(np.diff(area)) > 0) == (direction == "grow")
        else:
            assert np.ptp(area) < 0.2 * area.max()
        if length.min() > 0.2:  # a bar
            turned = np.median(np.diff(angles))  # radians a frame
            assert (abs(turned) > 0.08) == (motion == "spin")
            assert motion != "spin" or (turned > 0) == (direction == "clockwise")
            seen.add(f"a bar, {direction}")
        seen.add(direction)
    assert seen == {start + direction for direction in toy.DIRECTIONS for start in ("", "a bar, ")}


def test_a_single_frame_does_not_give_the_motion_away():
    """The quantities that a motion changes are spread alike in all motions, at any moment."""
    areas = {m: [] for m in range(4)}
    for number in range(600):
        random = np.random.default_rng(number)
        video, labels = toy.draw_video(number)
        shape = ink(video[random.integers(toy.FRAMES)])
        areas[labels["motion"]].append([shape.sum(), shape[:32].sum(), shape[:, :32].sum()])
    means = {m: np.mean(a, axis=0) for m, a in areas.items()}
    errors = {m: np.std(a, axis=0) / np.sqrt(len(a)) for m, a in areas.items()}
    for m in range(1, 4):
        assert (np.abs(means[m] - means[0]) < 4 * np.hypot(errors[m], errors[0])).all()


def test_a_single_frame_gives_the_appearance_away():
    """The colours of the labels are those of the pixels."""
    seen, palette = set(), np.array(list(toy.COLOURS.values()))
    for number in range(80):
        video, labels = toy.draw_video(number)
        pixels = video[0][ink(video[0])].astype(int)
        nearest = np.abs(pixels[:, None] - palette).sum(axis=-1)  # (pixels, colours)
        counts = np.bincount(nearest.argmin(axis=1)[nearest.min(axis=1) < 10], minlength=4)
        body, end = divmod(labels["appearance"], 4)
        assert set(np.flatnonzero(counts > 0.05 * counts.sum())) == {body, end}
        assert counts[body] == counts.max()  # the end is less than half
        assert toy.LOOKS[labels["appearance"]].startswith(list(toy.COLOURS)[body])
        seen.add(labels["appearance"])
    assert len(seen) == 16


def test_a_world_of_another_size_has_a_folder_of_its_own():
    assert toy.sized(2000) == (Path("datasets/toy"), toy.SPLITS)
    splits = {"pretrain": 240, "train": 48, "val": 36, "test": 60}
    assert toy.sized(240) == (Path("datasets/toy-240"), splits)
