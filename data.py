"""Files -> tokens -> clips: what is sampled from a video, and in which order.

A video is decoded and tokenised once, ahead of training; from then on a clip is a slice of a memory-mapped array.

Shapes: F frames of a video, N frames of many, S frame side in pixels, H x W tokens a frame, T frames of a clip.
"""
import math
from pathlib import Path

import numpy as np

from plumbing.annotations import list_videos  # noqa: F401 (reached as data.list_videos)
from plumbing.cli import UserError, progress
from plumbing.decoding import WAITING, VideoError, decode_all, read_frames, stream_views  # noqa: F401 (read_frames too)
from plumbing.processes import share
from plumbing.store import TokenStore, cut


def spread(count, size):
    """So many of the numbers 0..size-1, at most all, spread evenly -> int (count,)."""
    return np.linspace(0, size - 1, min(count, size)).round().astype(int)


# ---------------------------------------------------------------- from files


def views_for(kind, size, dataset=None):
    """The views that are cut from each video, as (shorter side, crop, flip): see decoding.read_views.

    pretrain: the centre. train: 2 resizes (S and, as released, 1.25 S; the paper says 1.5 S) x 3 crops x 2 flips, 12 in
    all. test: 3 crops. Something-Something tells left from right, so it is never flipped, and is tested on the centre
    alone.
    """
    crops, flips = ("top-left", "center", "bottom-right"), (False,) if dataset == "ssv2" else (False, True)
    if kind == "pretrain" or (kind == "test" and dataset == "ssv2"):
        return [(size, "center", False)]
    if kind == "train":
        return [(resize, crop, flip) for resize in (size, size + size // 4) for crop in crops for flip in flips]
    return [(size, crop, False) for crop in crops]


def sample_frames(videos, fps, size, most):
    """Frames spread evenly over a list of paths, for training a tokenizer -> uint8 (N, S, S, 3), errors [str]."""
    chosen = [videos[i] for i in spread(1000, len(videos))]
    each = math.ceil(most / len(chosen))  # frames a video
    frames, errors = [], []
    decoded = decode_all(chosen, lambda path: stream_views(path, fps, size, [(size, "center", False)]))
    for _, pieces in progress(decoded, "reading frames", len(chosen), " videos"):
        try:
            frames.append(spread_frames(pieces, each))
        except VideoError as error:
            errors.append(str(error))
    if not frames:
        raise UserError("none of the videos could be decoded: " + "; ".join(errors[:3]))
    frames = np.concatenate(frames)
    if len(frames) < 20:
        raise UserError(f"{len(frames)} frames are too few to train a tokenizer: give more videos or a larger --fps")
    return frames, errors


def spread_frames(pieces, count, room=WAITING):
    """So many frames of a video, spread evenly, of its pieces as they come -> uint8 (N, S, S, 3), N at most count.

    Held at any time are at most `room` bytes or twice the count: of longer videos, every second frame, fourth, ...
    """
    kept, step, seen = [], 1, 0
    for frames, _ in pieces:  # (1, f, S, S, 3)
        kept.append(frames[0, -seen % step::step].copy())
        seen += frames.shape[1]
        while sum(map(len, kept)) > max(2 * count, room // frames[0, 0].nbytes):
            kept, step = [np.concatenate(kept)[::2].copy()], 2 * step
    kept = np.concatenate(kept)
    return kept[spread(count, len(kept))]


# ---------------------------------------------------------------- clips


def last_start(length, frames, stride):
    """The latest start of a clip that fits into `length` frames; 0 where none fits."""
    return max(0, length - (frames - 1) * stride - 1)


def stride_for(store, fps):
    """The step between a clip's frames, in stored frames, that comes closest to `fps` frames a second."""
    return max(1, round(store.header["fps"] / fps))


def even_starts(length, frames, stride, clips):
    """Where `clips` evenly spaced clips of a video of so many frames start: from its first frame to its last; of one
    clip, the middle -> int (clips,)."""
    last = last_start(length, frames, stride)
    return np.arange(clips) * last // (clips - 1) if clips > 1 else np.array([last // 2])


def even_clips(tokens, frames, stride, clips, vocab_size):
    """Evenly spaced clips of one view's tokens (F, H, W) -> int64 (clips, T, H, W)."""
    return np.stack([cut(tokens, start, frames, stride, vocab_size)
                     for start in even_starts(len(tokens), frames, stride, clips)])


class ClipPairs:
    """Pre-training's samples: two clips of one video, drawn independently and uniformly -> int64 (2, T, H, W).

    strides: the smallest and largest step between a clip's frames, in stored frames; each clip draws its own.
    d_max: the largest distance of the two starts, in seconds; None: no limit.
    An item is asked for by (video, epoch): the same pair always gives the same clips, whichever process asks.
    """

    def __init__(self, store, frames, strides=(1, 1), d_max=None, seed=0):
        self.store, self.frames, self.strides, self.seed = store, frames, strides, seed
        self.reach = None if d_max is None else int(d_max * store.header["fps"])  # in stored frames

    def __getitem__(self, item):
        video, epoch = item
        random = np.random.default_rng((self.seed, epoch, video))
        length = int(self.store.index["frames"][video])
        first_stride, second_stride = random.integers(self.strides[0], self.strides[1], 2, endpoint=True)
        first = random.integers(last_start(length, self.frames, first_stride), endpoint=True)
        low, high = 0, last_start(length, self.frames, second_stride)
        if self.reach is not None:
            low, high = min(max(low, first - self.reach), high), min(high, first + self.reach)
        second = random.integers(low, high, endpoint=True)
        return np.stack([self.store.cut(video, first, self.frames, first_stride),
                         self.store.cut(video, second, self.frames, second_stride)])


class RandomClips:
    """Fine-tuning's samples: one random view, one random clip -> (int64 (T, H, W), label)."""

    def __init__(self, store, labels, frames, stride, seed=0):
        self.store, self.frames, self.stride, self.seed = store, frames, stride, seed
        self.labels = store.labels(labels)

    def __getitem__(self, item):
        video, epoch = item
        random = np.random.default_rng((self.seed, epoch, video))
        view, length = random.integers(self.store.views), int(self.store.index["frames"][video])
        start = random.integers(last_start(length, self.frames, self.stride), endpoint=True)
        return self.store.cut(video, start, self.frames, self.stride, view), int(self.labels[video])


class EvenClips:
    """Test's samples: `clips` evenly spaced clips of every view (or of `views`) -> int64 (views * clips, T, H, W)."""

    def __init__(self, store, frames, stride, clips, views=None):
        self.store, self.frames, self.stride, self.clips = store, frames, stride, clips
        self.views = range(store.views) if views is None else views

    def __len__(self):
        return len(self.store)

    def __getitem__(self, video):
        starts = even_starts(int(self.store.index["frames"][video]), self.frames, self.stride, self.clips)
        return np.stack([self.store.cut(video, start, self.frames, self.stride, view)
                         for view in self.views for start in starts])


# ---------------------------------------------------------------- which videos, in which order


def hold_out(videos, count):
    """The numbers of the videos to train on, and of those kept out: `count` of them, at most a tenth, spread evenly."""
    held_out = spread(min(count, videos // 10), videos)
    return np.delete(np.arange(videos), held_out), held_out


def few_labels(labels, count, seed=0):
    """So many videos, each class in proportion -> their numbers (count,), or all where count is 0.

    labels: int (videos,).
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(np.asarray(labels)[order], kind="stable")]  # by class, within a class at random
    return np.sort(order[spread(count or len(order), len(order))])


class Batches:
    """Which (video, epoch) pairs make up each step's batch: a new random order of the videos every epoch.

    The batch is a function of the seed and the step alone, so a run resumes, and several processes share it, without
    any state. videos: the numbers of those to draw from. batch: how many all processes take together.
    The last videos of an epoch that do not fill a batch wait for the next epoch's order.
    """

    def __init__(self, videos, batch, steps, first_step=0, seed=0, rank=0, world=1):
        self.videos, self.batch, self.seed, self.rank, self.world = videos, batch, seed, rank, world
        self.steps = range(first_step, steps)

    def __iter__(self):
        per_epoch = len(self.videos) // self.batch
        current = None
        for step in self.steps:
            epoch, place = divmod(step, per_epoch)
            if epoch != current:
                current, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.videos)
            chosen = share(order[place * self.batch:(place + 1) * self.batch], self.rank, self.world)
            yield [(int(video), epoch) for video in chosen]


def open_store(folder, *names):
    """The first of these token stores that is in the folder. Raises UserError where none is."""
    found = [name for name in names if (Path(folder) / name / "index.npy").is_file()]
    return TokenStore(Path(folder) / (found or names)[0])


def labelled_stores(folder):
    """The token stores of a folder that the kNN accuracy looks at: those it takes neighbours from, and queries."""
    return open_store(folder, "train", "train1"), open_store(folder, "val", "test", "test1")
