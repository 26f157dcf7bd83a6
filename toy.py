"""A small world of synthetic videos, written as real video files, with labels.

One shape moves in one of four ways on a plain background. There are three tasks:
  motion       sideways, up-and-down, spin or scale: needs several frames, like SSV2
  direction    each motion forwards or backwards, 8 classes: the same, but harder
  appearance   the colours of the shape's body and its end, 16 classes: one frame is enough, like
               UCF101

The world is a torus, and each quantity that a motion changes is uniform at every moment, so no
single frame gives the motion away. The light goes on and off, so the background does not identify
a video. Colours come from a short palette, so that videos share tokens.

    python toy.py            writes datasets/toy and a picture of it

Shapes: F frames, S = 64 pixels.
"""
import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np

from plumbing.cli import UserError, option, parse, progress, run
from plumbing.datasets import list_videos
from plumbing.files import part_of, whole, write_text, writing
from plumbing.processes import end_with

SIZE, FRAMES, FPS = 64, 32, 8
SPLITS = {"pretrain": 2000, "train": 400, "val": 300, "test": 500}  # pre-training uses no labels
MOTIONS = ("sideways", "up-and-down", "spin", "scale")
DIRECTIONS = ("right", "left", "down", "up", "clockwise", "anticlockwise", "grow", "shrink")
SHAPES = ("square", "triangle", "cross", "bar")
COLOURS = {"red": (200, 50, 50), "green": (50, 150, 70),
           "blue": (50, 80, 200), "yellow": (230, 200, 40)}
LOOKS = tuple(f"{body} with {end}" if body != end else body
              for body in COLOURS for end in COLOURS)
CLASSES = {"motion": MOTIONS, "direction": DIRECTIONS, "appearance": LOOKS}
BACKGROUNDS = (225, 110)  # greys, light on and off
RADIUS = (10, 17)  # pixels
# of each motion, a frame, in pixels, pixels, radians and sweeps
SPEEDS = ((1.5, 3), (1.5, 3), (0.1, 0.2), (0.04, 0.08))


class World(NamedTuple):
    """Options of the videos."""
    light: bool = True  # goes on and off; otherwise it stays on
    radius: tuple = RADIUS


USUAL = World()


def draw_video(number, seed=0, world=USUAL):
    """Renders one video -> (uint8 (F, S, S, 3), {label set: class})."""
    random = np.random.default_rng((seed, number))
    motion, sign, shape, body, end = (int(random.integers(n)) for n in (4, 2, 4, 4, 4))
    step = np.arange(FRAMES) * (1 - 2 * sign)  # forwards or backwards
    x, y = random.uniform(0, SIZE, 2)
    angle = random.uniform(0, 2 * np.pi)
    phase = random.uniform()  # of the radius between its bounds
    speed = random.uniform(*SPEEDS[motion])
    quantities = (x, y, angle, phase)  # motion i changes the i-th of them only
    x, y, angle, phase = (q + (motion == i) * speed * step for i, q in enumerate(quantities))
    radius = world.radius[0] + (world.radius[1] - world.radius[0]) * (phase % 1)
    quantities = (x, y, angle, radius)  # to (F, 1, 1)
    x, y, angle, radius = (np.broadcast_to(q, FRAMES)[:, None, None] for q in quantities)
    pixel = np.arange(SIZE) + 0.5
    dx = (pixel[None, None, :] - x + SIZE / 2) % SIZE - SIZE / 2  # (F, 1, S), on the torus
    dy = (pixel[None, :, None] - y + SIZE / 2) % SIZE - SIZE / 2  # (F, S, 1)
    # (F, S, S), in radii along the shape's own axes
    u = (dx * np.cos(angle) + dy * np.sin(angle)) / radius
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / radius
    inside = np.clip(0.5 - _distance(SHAPES[shape], u, v) * radius, 0, 1)  # (F, S, S), soft edge
    lit = (np.arange(FRAMES) + random.integers(100)) // random.integers(4, 13) % 2  # (F,), 0 or 1
    background = np.array(BACKGROUNDS)[lit * world.light][:, None, None]  # (F, 1, 1)
    video = np.full((FRAMES, SIZE, SIZE, 3), background[..., None], np.uint8)
    shown = inside > 0  # few pixels
    inside = inside[shown][:, None]  # (pixels, 1)
    background = np.broadcast_to(background, shown.shape)[shown][:, None]  # (pixels, 1)
    palette = np.array(list(COLOURS.values()))
    ink = np.where(u[shown][:, None] > 0.15, palette[end], palette[body])  # (pixels, 3)
    video[shown] = (background * (1 - inside) + ink * inside).round()
    return video, {"motion": motion, "direction": 2 * motion + sign, "appearance": 4 * body + end}


def _distance(shape, u, v):
    """The distance of a point from the shape in radii, negative inside."""
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.75
    if shape == "bar":
        return np.maximum(abs(u) - 1, abs(v) - 0.4)
    if shape == "cross":
        arms = np.minimum(abs(u), abs(v)) - 0.28
        return np.maximum(arms, np.maximum(abs(u), abs(v)) - 0.95)
    sides = [-u - 0.5, 0.5 * u + 0.866 * v - 0.5, 0.5 * u - 0.866 * v - 0.5]  # of a triangle
    return np.maximum.reduce(sides)


def write_videos(numbers, folder, seed, world):
    """Renders some videos and encodes each into a file -> their labels [{label set: class}].

    One ffmpeg writes all of them, as it takes longer to start than to encode.
    """
    videos, labels = zip(*(draw_video(number, seed, world) for number in numbers))
    paths = [folder / f"{number:05d}.mp4" for number in numbers]
    parts = [part_of(path) for path in paths]
    graph, outputs = f"split={len(videos)}" + "".join(f"[{i}]" for i in range(len(videos))), []
    for i, part in enumerate(parts):
        span = f"start_frame={i * FRAMES}:end_frame={(i + 1) * FRAMES}"
        graph += f";[{i}]trim={span},setpts=PTS-STARTPTS[v{i}]"
        outputs += ["-map", f"[v{i}]", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset",
                    "ultrafast", "-crf", "8", "-threads", "1", "-f", "mp4", str(part)]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-f", "rawvideo",
               "-pix_fmt", "rgb24", "-s", f"{SIZE}x{SIZE}", "-r", str(FPS), "-i", "-",
               "-filter_complex", graph, *outputs]
    pixels = np.stack(videos).tobytes()
    try:
        done = subprocess.run(command, input=pixels, capture_output=True, check=False)
        if done.returncode:
            reason = done.stderr.decode(errors="replace")
            full = os.strerror(errno.ENOSPC) in reason
            raise OSError(errno.ENOSPC if full else errno.EIO, f"ffmpeg failed: {reason[-200:]}")
        for part, path in zip(parts, paths):
            os.replace(part, path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return labels


def make(root, splits=None, seed=0, workers=None, world=USUAL, wanted=None):
    """Writes the world: root/videos/*.mp4, root/<label set>/<split>.txt and classes.txt,
    root/toy.json and root/toy.png. Returns root.

    wanted: the splits to write now (default: all). Complete splits are left as they are.
    Raises UserError if root holds another world.
    """
    root, splits = Path(root), splits or SPLITS
    settings = {"seed": seed, "splits": splits}
    if world != USUAL:
        settings["world"] = world._asdict()
    record, asked = root / "toy.json", json.dumps(settings)
    if record.is_file() and (old := record.read_text(errors="replace")) != asked:
        raise UserError(f"{root} was made with {old}, not {asked}: "
                        f"choose another folder or delete it")
    missing = [split for split in wanted or splits if not finished(root, [split])]
    if missing:
        if not record.is_file():
            with whole(root / "toy.png") as file:  # first: something to look at
                imageio.imwrite(file, picture(seed, world), format="png")
            print(f"{root / 'toy.png'}: eight videos of the toy world, which is now written",
                  flush=True)
            write_text(record, asked)
        with writing(root / "videos"):
            write_splits(root, splits, missing, seed, workers, world)
    return root


def finished(root, splits=SPLITS):
    """Whether these splits are complete: their lists of the last label set are written last."""
    last = list(CLASSES)[-1]
    return all((Path(root) / last / f"{split}.txt").is_file() for split in splits)


def write_splits(root, splits, missing, seed, workers, world):
    (root / "videos").mkdir(exist_ok=True)
    first = dict(zip(splits, accumulate(splits.values(), initial=0)))  # {split: its first number}
    numbers = [number for split in missing
               for number in range(first[split], first[split] + splits[split])]
    groups = [numbers[i:i + 32] for i in range(0, len(numbers), 32)]
    write = partial(write_videos, folder=root / "videos", seed=seed, world=world)
    workers = workers or os.cpu_count()
    with ProcessPoolExecutor(workers, initializer=end_with, initargs=(os.getpid(),)) as pool:
        written = progress(pool.map(write, groups), "toy videos", len(groups), " x 32 videos")
        labels = [label for group in written for label in group]
    for name, classes in CLASSES.items():
        (root / name).mkdir(exist_ok=True)
        write_text(root / name / "classes.txt", "".join(f"{c}\n" for c in classes))
        lines = [f"../videos/{number:05d}.mp4 {label[name]}\n"
                 for number, label in zip(numbers, labels)]
        for split in missing:
            write_text(root / name / f"{split}.txt", "".join(lines[:splits[split]]))
            del lines[:splits[split]]


def sized(count):
    """A world with `count` videos to pre-train on, others in proportion -> its folder, splits."""
    usual = SPLITS["pretrain"]
    name = "toy" if count == usual else f"toy-{count}"
    splits = {split: number * count // usual for split, number in SPLITS.items()}
    return Path("datasets") / name, splits


def split_videos(root, split):
    """The videos of a split with all their labels -> [(path, {label set: class})]."""
    lists = {name: list_videos("own", Path(root) / name, split) for name in CLASSES}
    paths = [path for path, _ in lists["motion"]]
    return [(path, {name: lists[name][i][1] for name in CLASSES}) for i, path in enumerate(paths)]


def picture(seed=0, world=USUAL):
    """Eight videos, one of each direction, six moments each -> uint8 (rows, columns, 3)."""
    rows, number = {}, 0
    while len(rows) < len(DIRECTIONS):
        video, labels = draw_video(number, seed, world)
        margin = ((0, 0), (0, 4), (0, 4), (0, 0))
        row = np.pad(video[:18:3], margin, constant_values=255)  # (6, S + 4, S + 4, 3)
        rows.setdefault(labels["direction"], row.swapaxes(0, 1).reshape(SIZE + 4, -1, 3))
        number += 1
    left, right = (np.concatenate([rows[d] for d in range(first, 8, 2)]) for first in (0, 1))
    gap = np.full((len(left), 12, 3), 255, np.uint8)
    return np.concatenate([left, gap, right], axis=1)


@dataclass
class Config:
    out: str = option("datasets/toy", "where to write")
    seed: int = option(0, "random seed: another one gives other videos", least=0, most=2**31)


def main():
    config = parse(Config, sys.argv[1:], __doc__)
    root = make(config.out, seed=config.seed)
    counts = ", ".join(f"{count} {split}" for split, count in SPLITS.items())
    print(f"{root}: {counts} videos; picture: {root}/toy.png")


if __name__ == "__main__":
    run(main)
