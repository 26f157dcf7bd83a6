"""A small world of synthetic videos, written as real video files, with labels.

A textured shape moves in one of four ways over a smooth background that pans slowly. As in real
video, neighbouring tokens look alike but are seldom equal. There are four tasks:
  motion       sideways, up-and-down, spin or scale: needs several frames, like SSV2
  scene        how the background's brightness varies: one frame is enough, like UCF101
  shape        square, triangle, cross or bar: one frame is enough
  colour       the shape's colour: one token is enough

Each quantity that a motion changes is uniform at every moment, whether it changes or not, so no
single frame gives the motion away.

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
SHAPES = ("square", "triangle", "cross", "bar")
COLOURS = {"red": (235, 90, 80), "green": (70, 190, 90),
           "blue": (80, 110, 245), "yellow": (240, 215, 70)}
SCENES = ("smooth", "columns", "rows", "patches")  # varies across, down, both ways or neither
CLASSES = {"motion": MOTIONS, "scene": SCENES, "shape": SHAPES, "colour": tuple(COLOURS)}
GROUNDS = ((150, 140, 130), (110, 130, 150))  # a background's colour lies between these
WAVES = 0.015  # the highest frequency of a background's two waves of brightness, waves a pixel
BUSY = 2 / np.pi  # half of the backgrounds have larger squared frequencies, in WAVES squared
PAN = 0.8  # standard deviation of a background's speed along x and y, pixels a frame
MIDDLE, RADIUS = (16, 48), (15, 24)  # bounds of the shape's x and y and of its radius, pixels
SPEEDS = ((0.05, 0.1), (0.05, 0.1), (0.03, 0.06), (0.03, 0.06))  # sweeps, half turns a frame


def draw_video(number, seed=0):
    """Renders one video -> (uint8 (F, S, S, 3), {label set: class})."""
    random = np.random.default_rng((seed, number))
    motion, shape, colour = (int(random.integers(4)) for _ in range(3))
    x, y, angle, radius = place(random, motion)  # (F, 1, 1) each
    pixel = np.arange(SIZE, dtype=np.float32) + 0.5
    dx, dy = pixel[None, None, :] - x, pixel[None, :, None] - y  # (F, 1, S), (F, S, 1)
    # (F, S, S), in radii along the shape's own axes
    u = (dx * np.cos(angle) + dy * np.sin(angle)) / radius
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / radius
    inside = np.clip(0.5 - _distance(SHAPES[shape], u, v) * radius, 0, 1)  # (F, S, S), soft edge
    shown, (video, scene) = inside > 0, background(random, pixel)
    inside = inside[shown][:, None]  # (pixels, 1)
    texture = 0.75 + 0.3 * wave(draw_wave(random, 0.35), u[shown], v[shown])[:, None]  # of radii
    ink = np.float32(COLOURS[CLASSES["colour"][colour]]) * texture  # (pixels, 3)
    video[shown] = video[shown] * (1 - inside) + ink * inside
    video = video.clip(0, 255).round().astype(np.uint8)
    return video, {"motion": motion, "scene": scene, "shape": shape, "colour": colour}


def place(random, motion):
    """The shape's x, y, angle and radius in every frame -> float32 (F, 1, 1) each.

    A motion changes one of them. x, y and radius sweep to and fro between two bounds.
    """
    step = (np.arange(FRAMES) - FRAMES // 2) * random.choice((-1, 1))
    moments = []
    for i, bounds in enumerate((MIDDLE, MIDDLE, None, RADIUS)):
        start, speed = random.uniform(0, 2), random.uniform(*SPEEDS[i]) * (i == motion)
        moment = np.float32(start + speed * step)[:, None, None]
        if bounds:
            moment = bounds[0] + (bounds[1] - bounds[0]) * abs(moment % 2 - 1)
        moments.append(moment if bounds else np.pi * moment)
    return moments


def background(random, pixel):
    """A smooth texture that pans -> float32 (F, S, S, 3), its class of SCENES.

    pixel: centres of the pixels, (S,).
    """
    step = np.arange(FRAMES, dtype=np.float32)[:, None, None]
    vx, vy = np.float32(random.normal(0, PAN, 2))
    x, y = pixel[None, None, :] - vx * step, pixel[None, :, None] - vy * step
    waves, tint = [draw_wave(random, WAVES) for _ in range(2)], draw_wave(random, WAVES / 2)
    light = 0.85 + 0.2 * sum(wave(each, x, y) for each in waves)  # (F, S, S)
    tint = 0.5 + 0.5 * wave(tint, x, y)
    across, down, _ = np.square(waves).sum(axis=0) > BUSY * WAVES**2
    one, other = np.float32(GROUNDS)
    return (other + tint[..., None] * (one - other)) * light[..., None], int(across + 2 * down)


def draw_wave(random, most):
    """A plane wave: its frequencies along x and y, at most `most`, and its phase."""
    return np.float32([*random.uniform(-most, most, 2), random.uniform()])


def wave(drawn, x, y):
    """A plane wave of `draw_wave`, in -1..1."""
    fx, fy, phase = drawn
    return np.cos(np.float32(2 * np.pi) * (fx * x + fy * y + phase))


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


def write_videos(numbers, folder, seed):
    """Renders some videos and encodes each into a file -> their labels [{label set: class}].

    One ffmpeg writes all of them, as it takes longer to start than to encode.
    """
    videos, labels = zip(*(draw_video(number, seed) for number in numbers))
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


def make(root, splits=None, seed=0, workers=None, wanted=None):
    """Writes the world: root/videos/*.mp4, root/<label set>/<split>.txt and classes.txt,
    root/toy.json and root/toy.png. Returns root.

    wanted: the splits to write now (default: all). Complete splits are left as they are.
    Raises UserError if root holds another world.
    """
    root, splits = Path(root), splits or SPLITS
    record = root / "toy.json"
    asked = json.dumps({"world": "scenes", "seed": seed, "splits": splits})
    if record.is_file() and (old := record.read_text(errors="replace")) != asked:
        raise UserError(f"{root} was made with {old}, not {asked}: "
                        f"choose another folder or delete it")
    missing = [split for split in wanted or splits if not finished(root, [split])]
    if missing:
        if not record.is_file():
            with whole(root / "toy.png") as file:  # first: something to look at
                imageio.imwrite(file, picture(seed), format="png")
            print(f"{root / 'toy.png'}: eight videos of the toy world, which is now written",
                  flush=True)
            write_text(record, asked)
        with writing(root / "videos"):
            write_splits(root, splits, missing, seed, workers)
    return root


def finished(root, splits=SPLITS):
    """Whether these splits are complete: their lists of the last label set are written last."""
    last = list(CLASSES)[-1]
    return all((Path(root) / last / f"{split}.txt").is_file() for split in splits)


def write_splits(root, splits, missing, seed, workers):
    (root / "videos").mkdir(exist_ok=True)
    first = dict(zip(splits, accumulate(splits.values(), initial=0)))  # {split: its first number}
    numbers = [number for split in missing
               for number in range(first[split], first[split] + splits[split])]
    groups = [numbers[i:i + 32] for i in range(0, len(numbers), 32)]
    write = partial(write_videos, folder=root / "videos", seed=seed)
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


def picture(seed=0):
    """Eight videos, two of each motion, six moments each -> uint8 (rows, columns, 3)."""
    rows, number = {motion: [] for motion in range(len(MOTIONS))}, 0
    while min(map(len, rows.values())) < 2:
        video, labels = draw_video(number, seed)
        margin = ((0, 0), (0, 4), (0, 4), (0, 0))
        row = np.pad(video[:18:3], margin, constant_values=255)  # (6, S + 4, S + 4, 3)
        rows[labels["motion"]].append(row.swapaxes(0, 1).reshape(SIZE + 4, -1, 3))
        number += 1
    left, right = (np.concatenate([videos[i] for videos in rows.values()]) for i in (0, 1))
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
