"""Files -> tokens -> clips: what is sampled from a video, and in which order.

A video is decoded and tokenised once, ahead of training. After that a clip is one read from a file.

Shapes: F frames of a video, N frames of many, S frame side in pixels, H x W tokens a frame,
T frames of a clip.
"""
import math
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from plumbing.cli import UserError, progress
from plumbing.datasets import CROPS, find_dataset, list_videos  # noqa: F401 (data.list_videos)
from plumbing.decoding import (  # noqa: F401 (data.read_frames)
    PIECE,
    cores,
    map_videos,
    read_frames,
    stream_views,
)
from plumbing.processes import ignore_stop_signals, rank_and_world
from plumbing.store import TokenStore, cut

FRAME_BYTES = 10 * PIECE  # of frames held while a video is read for `sample_frames`


def spread(count, size):
    """`count` of the numbers 0..size-1 (at most all), spread evenly -> int (count,)."""
    return np.linspace(0, size - 1, min(count, size)).round().astype(int)


# ---------------------------------------------------------------- from files


def views_for(kind, size, dataset=None):
    """The views that are cut from each video -> [(shorter side, crop, flip)].

    pretrain: the centre. train: 2 resizes (S and 1.25 S, Table 4) x 3 crops x 2 flips, 12 in all.
    test: 3 crops. A dataset's entry in plumbing/datasets.py may forbid flips or test fewer crops.
    """
    entry = find_dataset(dataset or "folder")
    if kind == "pretrain":
        return [(size, "center", False)]
    if kind == "test":
        return [(size, crop, False) for crop in entry.test_crops]
    flips = (False, True) if entry.flip else (False,)
    resizes = (size, size + size // 4)
    return [(resize, crop, flip) for resize in resizes for crop in CROPS for flip in flips]


def sample_frames(videos, fps, size, most):
    """Frames for training a tokenizer, spread evenly over a list of paths.

    Returns uint8 (N, S, S, 3), and a line for each file that cannot be decoded [str].
    """
    chosen = [videos[i] for i in spread(1000, len(videos))]
    each = math.ceil(most / len(chosen))  # frames a video
    frames, errors = [], []
    results = map_videos(lambda pieces: spread_frames(pieces, each),
                         lambda path: stream_views(path, fps, size, [(size, "center", False)]),
                         chosen)
    for _, result, error in progress(results, "reading frames", len(chosen), " videos"):
        if error:
            errors.append(error)
        else:
            frames.append(result)
    if not frames:
        raise UserError("none of the videos could be decoded: " + "; ".join(errors[:3]))
    frames = np.concatenate(frames)
    if len(frames) < 20:
        raise UserError(f"{len(frames)} frames are too few to train a tokenizer: "
                        f"give more videos or a larger --fps")
    return frames, errors


def spread_frames(pieces, count, room=FRAME_BYTES):
    """Frames of a video, spread evenly over its pieces -> uint8 (N, S, S, 3), N at most count.

    Holds at most `room` bytes, or twice the count. Of longer videos it keeps every second frame,
    then every fourth, and so on.
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
    """The last start of a clip that fits into `length` frames; 0 if none fits."""
    return max(0, length - (frames - 1) * stride - 1)


def stride_for(store, fps):
    """The step between a clip's frames, in stored frames, closest to `fps` frames a second."""
    return max(1, round(store.header["fps"] / fps))


def even_starts(length, frames, stride, clips):
    """The starts of evenly spaced clips of a video of `length` frames; one clip is the middle.

    Returns int (clips,).
    """
    last = last_start(length, frames, stride)
    return np.arange(clips) * last // (clips - 1) if clips > 1 else np.array([last // 2])


def even_clips(tokens, frames, stride, clips, vocab_size):
    """Evenly spaced clips of one view's tokens (F, H, W) -> int64 (clips, T, H, W)."""
    return np.stack([cut(tokens, start, frames, stride, vocab_size)
                     for start in even_starts(len(tokens), frames, stride, clips)])


class ClipPairs:
    """Pre-training's samples: two clips of one video -> int64 (2, T, H, W).

    Both are drawn independently and uniformly.
    strides: the smallest and largest step between a clip's frames, in stored frames; each clip
    draws its own.
    d_max: the largest distance of the two starts, in seconds; None: no limit.
    An item is (video, epoch): the same item gives the same clips in every process.
    """

    def __init__(self, store, frames, strides=(1, 1), d_max=None, seed=0):
        self.store, self.frames, self.strides, self.seed = store, frames, strides, seed
        self.reach = None if d_max is None else int(d_max * store.header["fps"])  # in stored frames

    def __getitem__(self, item):
        video, epoch = item
        random = np.random.default_rng((self.seed, epoch, video))
        length = int(self.store.frames[video])
        first_stride, second_stride = random.integers(*self.strides, 2, endpoint=True)
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
        view, length = random.integers(self.store.views), int(self.store.frames[video])
        start = random.integers(last_start(length, self.frames, self.stride), endpoint=True)
        clip = self.store.cut(video, start, self.frames, self.stride, view)
        return clip, int(self.labels[video])


class EvenClips:
    """Test's samples: evenly spaced clips of every view -> int64 (views * clips, T, H, W).

    clips: how many of each view. views: their numbers (default: all).
    """

    def __init__(self, store, frames, stride, clips, views=None):
        self.store, self.frames, self.stride, self.clips = store, frames, stride, clips
        self.views = range(store.views) if views is None else views

    def __len__(self):
        return len(self.store)

    def __getitem__(self, video):
        length = int(self.store.frames[video])
        starts = even_starts(length, self.frames, self.stride, self.clips)
        return np.stack([self.store.cut(video, start, self.frames, self.stride, view)
                         for view in self.views for start in starts])


# ---------------------------------------------------------------- which videos, in which order


def hold_out(videos, count):
    """The numbers of the videos to train on and of those held out, int each.

    Holds out `count` videos, at most a tenth, spread evenly.
    """
    held_out = spread(min(count, videos // 10), videos)
    return np.delete(np.arange(videos), held_out), held_out


def few_labels(labels, count, seed=0):
    """Chooses `count` videos (0: all), every class in proportion -> their numbers, int (count,).

    labels: int (videos,).
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = np.argsort(np.asarray(labels)[order], kind="stable")  # at random within a class
    order = order[by_class]
    return np.sort(order[spread(count or len(order), len(order))])


class Batches:
    """Each step's batch as [(video, epoch)]: a new random order of the videos every epoch.

    A batch depends on the seed and the step only, so runs resume and processes divide it without
    any state. Videos at the end of an epoch that do not fill a batch are left out.
    videos: the numbers to draw from. batch: videos of all processes together.
    """

    def __init__(self, videos, batch, steps, first_step=0, seed=0, rank=0, world=1):
        self.videos, self.batch, self.seed = videos, batch, seed
        self.rank, self.world = rank, world
        self.steps = range(first_step, steps)

    def __iter__(self):
        per_epoch = len(self.videos) // self.batch
        current = None
        for step in self.steps:
            epoch, index = divmod(step, per_epoch)
            if epoch != current:
                random = np.random.default_rng((self.seed, epoch))
                current, order = epoch, random.permutation(self.videos)
            batch = order[index * self.batch:(index + 1) * self.batch]
            chosen = batch[self.rank::self.world]
            yield [(int(video), epoch) for video in chosen]


def share(count, at_once):
    """This process's numbers of 0..count-1, so many at a time -> [int64 (at most at_once,)]."""
    rank, world = rank_and_world()
    mine = torch.arange(count)[rank::world]
    return list(mine.split(at_once)) if len(mine) else []


def load(samples, batches, workers):
    """Yields batches, such as `Batches`, loaded by so many processes -> int64 tensors.

    The processes ignore Ctrl-C and SIGTERM: the training process ends them. Raises UserError if
    their shared memory is full.
    """
    loader = DataLoader(samples, batch_sampler=batches, num_workers=min(workers, cores()),
                        collate_fn=collate, worker_init_fn=ignore_stop_signals)
    try:
        for batch in loader:
            yield [x.long() for x in batch] if isinstance(batch, list) else batch.long()
    except RuntimeError as error:
        if "shared memory" in str(error):
            raise UserError("/dev/shm is full: give docker run a larger --shm-size, or fewer "
                            "--workers") from error
        raise


def collate(samples):
    """Stacks samples. Tokens are uint16 on their way between processes, a quarter of int64."""
    batch = default_collate(samples)
    if isinstance(batch, list):  # with labels
        return [batch[0].to(torch.uint16), batch[1]]
    return batch.to(torch.uint16)


def open_store(folder, *names):
    """Opens the first of these token stores that the folder has. Raises UserError if none."""
    finished = [name for name in names if (Path(folder) / name / "index.npz").is_file()]
    return TokenStore(Path(folder) / (finished or names)[0])


def labelled_stores(folder):
    """The token stores for the kNN accuracy -> (of the neighbours, of the queries)."""
    return open_store(folder, "train", "train1"), open_store(folder, "val", "test", "test1")
