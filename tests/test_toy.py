import imageio.v2 as imageio
import numpy as np

import data
import toy

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


def test_motions_do_what_their_name_says():
    """Follows the shape's centre, size and angle through the first frames, from its pixels alone."""
    seen = set()
    for number in range(120):
        video, labels = toy.draw_video(number)
        ink = (np.abs(video.astype(int) - np.median(video, axis=(1, 2), keepdims=True)).max(axis=-1) > 25)  # (F, S, S)
        wave = np.exp(2j * np.pi * np.arange(64) / 64)
        x, y = (np.unwrap(np.angle((ink.sum(axis) * wave).sum(-1))) * 64 / (2 * np.pi) for axis in (1, 2))
        moved = np.array([x[8] - x[0], y[8] - y[0]])  # pixels in eight frames, on the torus
        area = ink.sum(axis=(1, 2))
        motion, direction = toy.MOTIONS[labels["motion"]], toy.DIRECTIONS[labels["direction"]]
        if motion in ("sideways", "up-and-down"):
            along, across = moved if motion == "sideways" else moved[::-1]
            assert 10 < abs(along) < 26 and abs(across) < 4
            assert (along > 0) == (direction in ("right", "down"))
        else:
            assert np.abs(moved).max() < 8
            changes = np.diff(area[:8])
            steps = np.median(changes)
            assert (np.abs(steps) > 2) == (motion == "scale") or np.abs(steps) < 12
            if motion == "scale" and abs(steps) > 6:
                assert (steps > 0) == (direction == "grow")
        seen.add(direction)
    assert seen == set(toy.DIRECTIONS)


def test_a_single_frame_does_not_give_the_motion_away():
    """The quantities that a motion changes are spread alike in all motions, at any moment."""
    areas = {m: [] for m in range(4)}
    for number in range(1200):
        random = np.random.default_rng(number)
        video, labels = toy.draw_video(number)
        frame = video[random.integers(toy.FRAMES)].astype(int)
        ink = np.abs(frame - np.median(frame, axis=(0, 1))).max(axis=-1) > 25
        areas[labels["motion"]].append([ink.sum(), ink[:32].sum(), ink[:, :32].sum()])
    means = {m: np.mean(a, axis=0) for m, a in areas.items()}
    errors = {m: np.std(a, axis=0) / np.sqrt(len(a)) for m, a in areas.items()}
    for m in range(1, 4):
        assert (np.abs(means[m] - means[0]) < 4 * np.hypot(errors[m], errors[0])).all()
