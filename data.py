"""Files -> clips: listing a dataset's videos, decoding them, the token store, drawing clips.

A video is decoded and tokenised once, ahead of training; from then on a clip is a slice of a memory-mapped array.

Shapes: F frames of a video, S frame side in pixels, H x W tokens a frame, T frames of a clip, B videos in a batch.
"""
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from tqdm import tqdm

VIDEO_ENDINGS = {".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"}
PAD = 1  # the id of padding, counted from vocab_size
FORMAT = 1  # of the token store


class VideoError(Exception):
    """A file that holds no video that can be decoded. Its text is one line: the file, then ffmpeg's reason."""


class _Lines:
    """A file for tqdm that prints each state of the bar as a line of its own, where no terminal redraws it."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        sys.stderr.flush()


def progress(iterable=None, text="", total=None, unit="it", show=True):
    """A tqdm bar on a terminal, a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        return tqdm(iterable, text, total, unit=unit, disable=not show, dynamic_ncols=True)
    return tqdm(iterable, text, total, unit=unit, disable=not show, file=_Lines(), mininterval=10, maxinterval=60,
                ascii=True, ncols=100)


# ---------------------------------------------------------------- decoding


def read_frames(path, fps, size, crop="center", flip=False, resize=None):
    """Decodes a video -> uint8 (F, S, S, 3), RGB.

    fps: frames a second. size: S, the side of the square crop in pixels. resize: length of the frame's shorter side
    before the crop (default: S). crop: "center", "top-left" or "bottom-right". flip: mirrored left to right.
    A video shorter than one sampling interval gives its first frame; a damaged one gives what decodes.
    Raises VideoError where nothing does, and ValueError for a crop of another name or larger than the frame.
    """
    return read_views(path, fps, size, [(resize or size, crop, flip)])[0]


def read_views(path, fps, size, views, span=None):
    """One decode, several views: a list of (resize, crop, flip) as in `read_frames` -> uint8 (views, F, S, S, 3).

    span: only the file's frames first <= n < last, where given.
    ffmpeg resamples, scales and crops, and stacks the views into one tall picture: nothing at full size is piped.
    """
    places = {"center": "", "top-left": ":0:0", "bottom-right": ":iw-ow:ih-oh"}
    for resize, crop, _ in views:
        if crop not in places or resize < size:
            raise ValueError(f"no crop {crop!r} of {size} pixels from a shorter side of {resize}: "
                             f"choose one of {', '.join(places)}, and a side of {size} or more")
    names = [f"v{i}" for i in range(len(views))]
    graph = f"split={len(views)}" + "".join(f"[{name}]" for name in names)
    for name, (resize, crop, flip) in zip(names, views):
        graph += (f";[{name}]scale={resize}:{resize}:force_original_aspect_ratio=increase,"
                  f"crop={size}:{size}{places[crop]}{',hflip' if flip else ''},format=rgb24[{name}o]")
    graph += ";" + "".join(f"[{name}o]" for name in names) + (f"vstack={len(views)}" if len(views) > 1 else "null")
    trim = f"trim=start_frame={span[0]}:end_frame={span[1]},setpts=PTS-STARTPTS," if span else ""
    pixels, reason = _ffmpeg(path, f"{trim}fps={fps},{graph}")
    if not pixels:  # shorter than one interval: the fps filter rounds it down to nothing
        pixels, reason = _ffmpeg(path, trim + graph, "-frames:v", "1")
    if not pixels:
        raise VideoError(f"{path}: {reason}")
    frame = len(views) * size * size * 3
    frames = np.frombuffer(pixels[:len(pixels) // frame * frame], np.uint8).reshape(-1, len(views), size, size, 3)
    return frames.swapaxes(0, 1).copy()


def _ffmpeg(path, graph, *options):
    """Runs ffmpeg on a file -> (raw RGB bytes, the last line it complained with)."""
    done = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-threads", "1", "-i", f"file:{path}",
         "-an", "-sn", "-dn", "-vf", graph, *options, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
        capture_output=True)
    complaints = done.stderr.decode(errors="replace").strip().splitlines()
    return done.stdout, complaints[-1] if complaints else "it holds no video frames"


def decode_all(paths, read, workers):
    """Decodes files with several ffmpeg processes at a time, in order -> yields (path, frames or VideoError).

    read: path -> frames. At most 2 x workers decoded videos wait at any moment.
    """
    def attempt(path):
        try:
            return path, read(path)
        except VideoError as error:
            return path, error

    with ThreadPoolExecutor(workers) as pool:  # threads suffice: the work is done in ffmpeg's own processes
        waiting = []
        for path in paths:
            waiting.append(pool.submit(attempt, path))
            if len(waiting) >= 2 * workers:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()


# ---------------------------------------------------------------- listing

DATASETS = {  # name: its splits
    "folder": (), "list": (), "howto100m": (), "ucf101": ("train1", "test1", "train2", "test2", "train3", "test3"),
    "hmdb51": ("train1", "test1", "train2", "test2", "train3", "test3"), "ssv2": ("train", "val", "test"),
    "diving48": ("train", "test"), "kinetics400": ("train", "val", "test")}


def list_videos(dataset, root, split):
    """The videos of a split that are on the disk -> [(path, label or None)], labels from 0.

    "folder" and "howto100m": every video file below root, without labels; split is not used.
    "list": root/<split>.txt, a line a video: `relative/path.mp4 label`, the label after the last space. Labels that
    are words are numbered in the order of root/classes.txt, or sorted where there is no such file.
    "ucf101", "hmdb51" (train1 to test3; train and test mean split 1), "ssv2", "diving48", "kinetics400": root is where
    the files of the dataset's own site were unpacked.
    Listed videos that are missing are counted on stderr. Raises FileNotFoundError naming the path that was looked for,
    and ValueError for an unknown dataset or split and for a label that the classes lack.
    """
    root = Path(root)
    if dataset not in DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}: choose one of {', '.join(DATASETS)}")
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    if dataset in ("folder", "howto100m"):
        paths = sorted(str(p) for p in root.rglob("*") if p.suffix.lower() in VIDEO_ENDINGS)
        if not paths:
            raise FileNotFoundError(f"no video file below {root} (looked for {' '.join(sorted(VIDEO_ENDINGS))})")
        return [(path, None) for path in paths]
    if dataset in ("ucf101", "hmdb51") and split in ("train", "test"):
        split += "1"
    if dataset != "list" and split not in DATASETS[dataset]:
        raise ValueError(f"{dataset} has no split {split!r}: choose one of {', '.join(DATASETS[dataset])}")
    lists = {"list": _list, "ucf101": _ucf101, "hmdb51": _hmdb51, "ssv2": _ssv2, "diving48": _diving48,
             "kinetics400": _kinetics400}
    listed = lists[dataset](root, split)
    found = [(str(path), label) for path, label in listed if path.is_file()]
    if not found:
        example = f", such as {listed[0][0]}" if listed else ""
        raise FileNotFoundError(f"none of the {len(listed)} videos listed for {split} is below {root}{example}")
    if len(found) < len(listed):
        print(f"{dataset} {split}: {len(listed) - len(found)} of {len(listed)} listed videos are not on this disk",
              file=sys.stderr)
    return found


def class_names(dataset, root):
    """The classes in the order of their labels -> [str], or None where there are no labels."""
    root = Path(root)
    if dataset == "list":
        for name in ("classes.txt", "train.txt"):
            if (root / name).is_file():
                lines = _annotation(root, name).read_text().splitlines()
                words = lines if name == "classes.txt" else sorted({line.rsplit(None, 1)[1] for line in lines if line})
                return None if all(word.isdigit() for word in words) else words
        return None
    if dataset == "ucf101":
        lines = _annotation(root, "ucfTrainTestlist/classInd.txt").read_text().split("\n")
        return [name for _, name in sorted((int(line.split()[0]), line.split()[1]) for line in lines if line.strip())]
    if dataset == "hmdb51":
        folder = _annotation(root, "testTrainMulti_7030_splits")
        return sorted({p.name.rsplit("_test_split", 1)[0] for p in folder.glob("*_test_split?.txt")})
    if dataset == "ssv2":
        labels = json.loads(_annotation(root, "labels.json", "something-something-v2-labels.json").read_text())
        return sorted(labels, key=lambda name: int(labels[name]))
    if dataset == "diving48":
        return [" ".join(parts) if isinstance(parts, list) else str(parts)
                for parts in json.loads(_annotation(root, "Diving48_vocab.json").read_text())]
    if dataset == "kinetics400":
        return sorted({row["label"] for row in _rows(_annotation(root, "train.csv"))})
    return None


def frame_spans(dataset, root, split):
    """Which frames of a file belong to a video, where the annotations say -> {path: (first, after the last)}."""
    if dataset != "diving48":
        return {}
    return {str(Path(root) / "rgb" / f"{entry['vid_name']}.mp4"): (entry["start_frame"], entry["end_frame"])
            for entry in json.loads(_annotation(root, f"Diving48_V2_{split}.json").read_text())
            if entry.get("end_frame", 0) > entry.get("start_frame", 0)}


def _annotation(root, *names):
    """The first of the files that exists below root."""
    for name in names:
        if (Path(root) / name).exists():
            return Path(root) / name
    raise FileNotFoundError(f"no {' or '.join(str(Path(root) / name) for name in names)}")


def _label(classes, name, where):
    if name not in classes:
        raise ValueError(f"{where}: the label {name!r} is not among the {len(classes)} classes")
    return classes[name]


def _numbered(dataset, root):
    return {name: number for number, name in enumerate(class_names(dataset, root) or [])}


def _list(root, split):
    listing = _annotation(root, f"{split}.txt")
    pairs = [line.rsplit(None, 1) for line in listing.read_text().splitlines() if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{listing}: every line is `relative/path.mp4 label`")
    if all(label.isdigit() for _, label in pairs):
        return [(root / name, int(label)) for name, label in pairs]
    classes = _numbered("list", root)
    if not classes:
        raise FileNotFoundError(f"labels are words, so their order is needed: write the classes, one a line, "
                                f"to {root / 'classes.txt'}")
    return [(root / name, _label(classes, label, listing)) for name, label in pairs]


def _ucf101(root, split):
    listing = _annotation(root, f"ucfTrainTestlist/{split[:-1]}list0{split[-1]}.txt")
    classes = _numbered("ucf101", root)
    names = [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]  # the class is the folder
    return [(root / "UCF-101" / name, _label(classes, name.split("/")[0], listing)) for name in names]


def _hmdb51(root, split):
    folder, wanted = _annotation(root, "testTrainMulti_7030_splits"), {"train": "1", "test": "2"}[split[:-1]]
    videos = []
    for label, name in enumerate(class_names("hmdb51", root)):
        for line in _annotation(folder, f"{name}_test_split{split[-1]}.txt").read_text().splitlines():
            if line.strip() and line.rsplit(None, 1)[1] == wanted:  # 0: in neither part of this split
                videos.append((root / name / line.rsplit(None, 1)[0], label))
    return videos


def _ssv2(root, split):
    name = {"train": "train", "val": "validation", "test": "test"}[split]
    listing = _annotation(root, f"{name}.json", f"something-something-v2-{name}.json")
    classes, videos = _numbered("ssv2", root), []
    for entry in json.loads(listing.read_text()):
        template = entry.get("template", "").replace("[", "").replace("]", "")  # the test split has none
        label = _label(classes, template, listing) if template else None
        videos.append((root / "20bn-something-something-v2" / f"{entry['id']}.webm", label))
    return videos


def _diving48(root, split):
    listing = _annotation(root, f"Diving48_V2_{split}.json")
    classes = dict.fromkeys(range(len(class_names("diving48", root))))
    entries = json.loads(listing.read_text())
    for entry in entries:
        _label(classes, entry["label"], listing)
    return [(root / "rgb" / f"{entry['vid_name']}.mp4", entry["label"]) for entry in entries]


def _kinetics400(root, split):
    listing = _annotation(root, f"{split}.csv")
    classes = _numbered("kinetics400", root)
    folder = _annotation(root, split)
    on_disk = {p.name: p for p in folder.rglob("*.mp4")}  # in class folders, with spaces or underscores, or in one
    videos = []
    for row in _rows(listing):
        name = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}.mp4"
        label = _label(classes, row["label"], listing) if row.get("label") else None
        videos.append((on_disk.get(name, folder / name), label))
    return videos


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- the token store

INDEX = np.dtype([("shard", "<u2"), ("start", "<i8"), ("frames", "<i4"), ("name", "<i8"), ("name_length", "<i4")])


class StoreWriter:
    """Writes a token store, so that a kill at any moment loses at most the video being written.

    Tokens go to tokens-<rank>.bin; only then one line about the video goes to journal-<rank>.jsonl. Opening a
    half-written store cuts both back to the last whole video, and `done` names what need not be made again.
    header: what the tokens are: tokenizer, fingerprint, vocab_size, fps, size, height, width, views, root, classes.
    Raises ValueError where a store of another header stands at the path already.
    """

    def __init__(self, path, header, rank=0):
        self.path, self.rank = Path(path), rank
        self.path.mkdir(parents=True, exist_ok=True)
        header = json.loads(json.dumps({"format": FORMAT, **header}))  # as it will be read back
        place = self.path / "header.json"
        if place.is_file():
            old = {key: value for key, value in json.loads(place.read_text()).items() if key != "videos"}
            for key in sorted((old.keys() | header.keys()) - {"root"}):  # a moved folder is still the same videos
                if old.get(key) != header.get(key):
                    raise ValueError(f"{path} was made with {key} {old.get(key)!r}, not {header.get(key)!r}: "
                                     f"choose another folder or delete it")
        write_whole(place, json.dumps(header, indent=1))
        self.header = header
        self.done = {record["name"] for journal in self.path.glob("journal-*.jsonl") for record in _journal(journal)}
        own = list(_journal(self._file("journal", "jsonl")))
        self.frame = len(header["views"]) * header["height"] * header["width"]  # tokens
        self.written = own[-1]["start"] + own[-1]["frames"] * self.frame if own else 0  # tokens
        self.tokens = open(self._file("tokens", "bin"), "ab")
        self.tokens.truncate(2 * self.written)
        lines = "".join(json.dumps(record) + "\n" for record in own)
        write_whole(self._file("journal", "jsonl"), lines)
        self.journal = open(self._file("journal", "jsonl"), "a")

    def _file(self, kind, ending):
        return self.path / f"{kind}-{self.rank:05d}.{ending}"

    def add(self, number, name, tokens, labels):
        """number: the video's place in the store. tokens: (views, F, H, W). labels: {label set: class}."""
        tokens = np.ascontiguousarray(tokens, dtype="<u2")
        self.tokens.write(tokens.tobytes())
        self.tokens.flush()
        record = {"number": number, "name": name, "start": self.written, "frames": tokens.shape[1], "labels": labels}
        self.journal.write(json.dumps(record) + "\n")
        self.journal.flush()
        self.written += tokens.size

    def finish(self):
        """Writes the index that TokenStore maps. With several processes, one calls this when all have closed."""
        records = [(int(journal.stem.split("-")[1]), record) for journal in sorted(self.path.glob("journal-*.jsonl"))
                   for record in _journal(journal)]
        records.sort(key=lambda pair: pair[1]["number"])
        names = [record["name"].encode() for _, record in records]
        index = np.zeros(len(records), INDEX)
        index["shard"] = [shard for shard, _ in records]
        index["start"] = [record["start"] for _, record in records]
        index["frames"] = [record["frames"] for _, record in records]
        index["name_length"] = [len(name) for name in names]
        index["name"] = np.cumsum([0] + [len(name) + 1 for name in names])[:-1]  # one line a name
        write_whole(self.path / "names.txt", b"".join(name + b"\n" for name in names))
        for labels in {key for _, record in records for key in record["labels"]}:
            write_array(self.path / f"labels-{labels}.npy",
                        np.array([record["labels"].get(labels, -1) for _, record in records], "<i4"))
        write_array(self.path / "index.npy", index)
        write_whole(self.path / "header.json", json.dumps({**self.header, "videos": len(records)}, indent=1))

    def close(self):
        self.tokens.close()
        self.journal.close()


def _journal(path):
    """The whole lines of a journal; a last line that a kill cut short is left out."""
    if not path.is_file():
        return
    with open(path) as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def write_whole(path, content):
    """Writes a file whole or not at all, also when the machine stops half-way."""
    part = Path(f"{path}.{os.getpid()}.part")  # several processes may write the same
    with open(part, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_array(path, array):
    part = Path(f"{path}.part.npy")
    np.save(part, array)
    os.replace(part, path)


class TokenStore:
    """A finished token store, memory-mapped: opening it reads no tokens, however many videos it holds.

    header: dict, see StoreWriter. Raises FileNotFoundError where no finished store is, ValueError for a format
    that this version does not read.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not (self.path / "index.npy").is_file():
            raise FileNotFoundError(f"no finished token store at {path} (python vqvae.py tokenize makes one)")
        self.header = json.loads((self.path / "header.json").read_text())
        if self.header["format"] != FORMAT:
            raise ValueError(f"{path} is a token store of format {self.header['format']}; this version reads {FORMAT}")
        self.index = np.load(self.path / "index.npy", mmap_mode="r")
        self.views = len(self.header["views"])
        self.height, self.width = self.header["height"], self.header["width"]
        self._shards = {}

    def __len__(self):
        return len(self.index)

    def name(self, i):
        """The video's path, relative to header["root"]."""
        start, length = int(self.index["name"][i]), int(self.index["name_length"][i])
        with open(self.path / "names.txt", "rb") as file:
            file.seek(start)
            return file.read(length).decode()

    def tokens(self, i, view=0):
        """One view of a video -> uint16 (F, H, W), a view into the file."""
        record = self.index[i]
        shard, start, frames = int(record["shard"]), int(record["start"]), int(record["frames"])
        if shard not in self._shards:
            self._shards[shard] = np.memmap(self.path / f"tokens-{shard:05d}.bin", "<u2", "r")
        size = frames * self.height * self.width
        start += view * size
        return self._shards[shard][start:start + size].reshape(frames, self.height, self.width)

    def label_sets(self):
        """The names of the label sets, such as ["appearance", "motion"]."""
        return sorted(p.stem.removeprefix("labels-") for p in self.path.glob("labels-*.npy"))

    def labels(self, name="label"):
        """One label set -> int32 (videos,), -1 where a video has none. Raises ValueError for an unknown set."""
        if name not in self.label_sets():
            raise ValueError(f"{self.path} has no labels {name!r}: it has {', '.join(self.label_sets()) or 'none'}")
        return np.load(self.path / f"labels-{name}.npy", mmap_mode="r")


# ---------------------------------------------------------------- clips


def cut(tokens, start, frames, stride, pad):
    """A clip of every stride-th frame -> int64 (T, H, W); frames beyond the video's end are whole frames of `pad`."""
    clip = np.full((frames, *tokens.shape[1:]), pad, np.int64)
    part = tokens[start:start + (frames - 1) * stride + 1:stride]
    clip[:len(part)] = part
    return clip


def last_start(length, frames, stride):
    """The latest start of a clip that fits into `length` frames; 0 where none fits."""
    return max(0, length - (frames - 1) * stride - 1)


class ClipPairs:
    """Pre-training's samples: two clips of one video, drawn independently and uniformly -> int64 (2, T, H, W).

    strides: the smallest and largest step between a clip's frames, in stored frames; each clip draws its own.
    d_max: the largest distance of the two starts, in seconds; None: no limit.
    An item is asked for by (video, epoch): the same pair always gives the same clips, whichever process asks.
    """

    def __init__(self, store, frames, strides=(1, 1), d_max=None, seed=0):
        self.store, self.frames, self.strides, self.seed = store, frames, strides, seed
        self.reach = None if d_max is None else int(d_max * store.header["fps"])  # in stored frames
        self.pad = store.header["vocab_size"] + PAD

    def __getitem__(self, item):
        video, epoch = item
        random = np.random.default_rng((self.seed, epoch, video))
        tokens = self.store.tokens(video)
        first_stride, second_stride = random.integers(self.strides[0], self.strides[1], 2, endpoint=True)
        first = random.integers(last_start(len(tokens), self.frames, first_stride), endpoint=True)
        low, high = 0, last_start(len(tokens), self.frames, second_stride)
        if self.reach is not None:
            low, high = min(max(low, first - self.reach), high), min(high, first + self.reach)
        second = random.integers(low, high, endpoint=True)
        return np.stack([cut(tokens, first, self.frames, first_stride, self.pad),
                         cut(tokens, second, self.frames, second_stride, self.pad)])


class RandomClips:
    """Fine-tuning's samples: one random view, one random clip -> (int64 (T, H, W), label)."""

    def __init__(self, store, labels, frames, stride, seed=0):
        self.store, self.frames, self.stride, self.seed = store, frames, stride, seed
        self.labels = store.labels(labels)
        self.pad = store.header["vocab_size"] + PAD

    def __getitem__(self, item):
        video, epoch = item
        random = np.random.default_rng((self.seed, epoch, video))
        tokens = self.store.tokens(video, random.integers(self.store.views))
        start = random.integers(last_start(len(tokens), self.frames, self.stride), endpoint=True)
        return cut(tokens, start, self.frames, self.stride, self.pad), int(self.labels[video])


def even_clips(store, video, frames, stride, clips):
    """Test's samples: `clips` evenly spaced clips of every view -> int64 (views * clips, T, H, W)."""
    pad = store.header["vocab_size"] + PAD
    last = last_start(int(store.index["frames"][video]), frames, stride)
    starts = np.linspace(0, last, clips).round().astype(int) if clips > 1 else [last // 2]
    return np.stack([cut(store.tokens(video, view), start, frames, stride, pad)
                     for view in range(store.views) for start in starts])


class Batches:
    """Which (video, epoch) pairs make up each step's batch: a new random order of the videos every epoch.

    The batch is a function of the seed and the step alone, so a run resumes, and several processes share it, without
    any state: process `rank` of `world` gets every world-th video. batch counts all processes' videos.
    The last videos of an epoch that do not fill a batch wait for the next epoch's order.
    """

    def __init__(self, videos, batch, steps, first_step=0, seed=0, rank=0, world=1):
        self.videos, self.batch, self.seed, self.rank, self.world = videos, batch, seed, rank, world
        self.steps = range(first_step, steps)

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        per_epoch = self.videos // self.batch
        current = None
        for step in self.steps:
            epoch, place = divmod(step, per_epoch)
            if epoch != current:
                current, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.videos)
            chosen = order[place * self.batch:(place + 1) * self.batch][self.rank::self.world]
            yield [(int(video), epoch) for video in chosen]
