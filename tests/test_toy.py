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
    (root / "colour/train.txt").unlink()
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
    """The pixels of the shape: bool, of a video (F, S, S, 3) or a frame (S, S, 3).

    Its colours are far more saturated than those of the background.
    """
    video = video.astype(float)
    return (video.max(axis=-1) - video.min(axis=-1)) / video.max(axis=-1).clip(min=1) > 0.45


def centre(shapes):
    """The middle of bool (F, S, S), in pixels -> (2, F): x and y."""
    return np.stack([(shapes.sum(axis) * np.arange(64)).sum(-1) / shapes.sum((1, 2))
                     for axis in (1, 2)])


def tilt(shapes, centres):
    """The longer axis of bool (F, S, S), by its second moments -> its angle (F,) without jumps, and
    its share of the size (F,), 0 for a symmetric shape."""
    pixel = np.arange(64)
    dx, dy = (pixel - c[:, None] for c in centres)  # (F, S) each
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
        motion, shape = toy.MOTIONS[labels["motion"]], toy.SHAPES[labels["shape"]]
        along, across = np.ptp(centres, axis=1)[::1 if motion == "sideways" else -1]  # pixels
        angles, length = tilt(shapes, centres)
        if motion in ("sideways", "up-and-down"):
            assert along > 15 and across < along / 2
        else:
            assert max(along, across) < 14  # the edge of the frame cuts shapes off
        if motion == "scale":
            assert np.ptp(area) > 0.3 * area.max()
        if length.min() > 0.4 and shape == "bar":
            turned = np.ptp(angles)  # radians
            assert (turned > 2) == (motion == "spin")
            seen.add(f"a bar, {motion}")
        seen.add(motion)
    assert seen == {start + motion for motion in toy.MOTIONS for start in ("", "a bar, ")}


def test_the_background_pans_and_neighbouring_pixels_are_alike_but_not_equal():
    for number in range(20):
        random = np.random.default_rng(number)
        frames, _ = toy.background(random, np.arange(64, dtype=np.float32) + 0.5)
        assert np.abs(np.diff(frames, axis=1)).max() < 15  # of 255, between rows
        assert np.abs(frames[-1] - frames[0]).mean() > 1 and frames[0].std() > 4


def test_a_single_frame_gives_the_scene_away():
    """The brightness of a frame varies across columns, rows, both or neither, as its class says."""
    steps, pixel = {scene: [] for scene in toy.SCENES}, np.arange(64, dtype=np.float32) + 0.5
    for number in range(600):
        frames, scene = toy.background(np.random.default_rng(number), pixel)
        frame = frames[0].mean(axis=2)
        steps[toy.SCENES[scene]].append([np.abs(np.diff(frame, axis=i)).mean() for i in (1, 0)])
    assert all(100 < len(values) < 200 for values in steps.values())  # each scene is as likely
    across, down = ({scene: np.mean(values, axis=0)[i] for scene, values in steps.items()}
                    for i in (0, 1))
    for varies, other in (("columns", "smooth"), ("columns", "rows"), ("patches", "rows")):
        assert across[varies] > 1.3 * across[other]
    for varies, other in (("rows", "smooth"), ("rows", "columns"), ("patches", "columns")):
        assert down[varies] > 1.3 * down[other]


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


def test_a_single_frame_gives_shape_and_colour_away():
    """A square fills most of the circle around it, a bar the least; colours are those of pixels."""
    areas = {shape: [] for shape in toy.SHAPES}
    for number in range(200):
        video, labels = toy.draw_video(number)
        shape = ink(video[0])
        areas[toy.SHAPES[labels["shape"]]].append(shape.sum())
        colour = video[0][shape].mean(axis=0)
        palette = np.array(list(toy.COLOURS.values()), float)
        cosine = (palette @ colour) / np.linalg.norm(palette, axis=1) / np.linalg.norm(colour)
        assert cosine.argmax() == labels["colour"]
    assert len(areas) == 4 and np.mean(areas["square"]) > 1.3 * np.mean(areas["bar"])


def test_a_world_of_another_size_has_a_folder_of_its_own():
    assert toy.sized(2000) == (Path("datasets/toy"), toy.SPLITS)
    splits = {"pretrain": 240, "train": 48, "val": 36, "test": 60}
    assert toy.sized(240) == (Path("datasets/toy-240"), splits)
