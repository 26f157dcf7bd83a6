"""Tokens on the disk: mapped into memory, never read whole. plumbing/writer.py writes them.

A store is a folder: header.json says what the tokens are, and the lengths and checksums of the small files;
tokens-<rank>.bin hold them, a shard a process; index.npy says where each video's lie; names.txt holds the videos'
paths, labels-<set>.npy their labels; journal-<rank>.jsonl says which tokens were made of which file.

Shapes: F frames of a video, H x W tokens a frame.
"""
import json
import math
import os
import zlib
from pathlib import Path

import numpy as np

from plumbing.cli import UserError
from plumbing.tokens import PAD

FORMAT = 1  # of the token store
INDEX = np.dtype([("shard", "<u2"), ("start", "<i8"), ("frames", "<i4"), ("name", "<i8"), ("name_length", "<i4")])
LARGE = 64 * 2 ** 20  # bytes: of larger files opening a store checks the length alone
MENDED = "tokenise again into it, or delete it"


def checksum(content):
    """A header's own checksum -> int."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read_header(path, compared=False):
    """What header.json of a store says -> dict. Raises UserError where it is damaged, even where that shows in its
    checksum alone; but not if all that it says is then compared with what is asked for."""
    try:
        header = json.loads((path / "header.json").read_bytes())
        if header.pop("checksum", None) not in (None, checksum(header)) and not compared:
            raise ValueError("its checksum differs")
        if header["format"] == FORMAT:
            sizes = [header[key] for key in ("vocab_size", "size", "height", "width")]
            if not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError("vocab_size, size, height and width are whole numbers")
            if type(header["fps"]) not in (int, float) or not 0 < header["fps"] < math.inf:
                raise ValueError("fps is a number")
            if not header["views"] or any(len(view) != 3 for view in header["views"]):
                raise ValueError("views are lists of three")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}/header.json is missing or damaged ({type(error).__name__}: {error}): "
                        f"{MENDED}") from error
    return header


def check_header(path, old, new):
    """Raises UserError, naming what differs, unless the tokens of a store with the header `old` are what `new` says."""
    for key in new:
        if key not in ("root", "classes") and key in old and old[key] != new[key]:  # these follow the list of videos
            raise UserError(f"{path} was made with {key} {old[key]!r}, not {new[key]!r}: "
                            f"choose another folder or delete it")


def check_alike(*stores):
    """Raises UserError, naming two of the token stores, unless one tokenizer made all."""
    for store in stores[1:]:
        for key in ("fingerprint", "vocab_size", "size"):
            one, two = stores[0].header.get(key), store.header.get(key)
            if None not in (one, two) and one != two:
                raise UserError(f"{stores[0].path} and {store.path} were not made alike: their {key} is {one!r} and "
                                f"{two!r}. Tokenise both with the same tokenizer and frame size")


def cut(tokens, start, frames, stride, vocab_size):
    """A clip of every stride-th frame of tokens (F, H, W) -> int64 (T, H, W); frames beyond the end are whole frames of
    PAD."""
    part = tokens[start:start + (frames - 1) * stride + 1:stride]
    clip = np.full((frames, *tokens.shape[1:]), vocab_size + PAD, np.int64)
    clip[:len(part)] = part
    return clip


class TokenStore:
    """A finished token store, memory-mapped: opening it reads no tokens, however many videos it holds.

    header: dict, see StoreWriter. Raises UserError where no finished store is, one of a format that this version does
    not read, or one whose small files are not those that its header speaks of or whose shards end too early.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not (self.path / "index.npy").is_file():
            near = [*self.path.glob("*/index.npy"), *self.path.glob("*/*/index.npy"),
                    *self.path.parent.glob("*/index.npy")]
            found = ", ".join(sorted({str(index.parent) for index in near})[:8])
            raise UserError(f"no finished token store at {self.path}" + (
                f": there are {found}" if found else
                " (python vqvae.py tokenize makes one; those of the toy world, python pretrain.py)"))
        self.header = read_header(self.path)
        if self.header["format"] != FORMAT:
            raise UserError(f"{path} is a token store of format {self.header['format']}; this version reads {FORMAT}")
        self.views = len(self.header["views"])
        self.height, self.width = self.header["height"], self.header["width"]
        for name, (length, crc) in self.header.get("checksums", {}).items():  # stores made before have none
            file = self.path / name
            if not file.is_file() or file.stat().st_size != length or (
                    length <= LARGE and zlib.crc32(file.read_bytes()) != crc):
                raise self.damaged(name, "is not as it was written")
        self.index = self._array("index.npy", INDEX)
        self._check_index()
        self._shards = {}

    def damaged(self, name, what):
        return UserError(f"{self.path / name} {what}, the token store is damaged: {MENDED}")

    def _array(self, name, kind):
        try:
            array = np.load(self.path / name, mmap_mode="r")
        except Exception as error:  # numpy meets damaged files with errors of many kinds
            raise self.damaged(name, f"cannot be read ({type(error).__name__})") from error
        if not isinstance(array, np.ndarray) or array.dtype != kind or array.ndim != 1:
            raise self.damaged(name, "holds something else")
        return array

    def _check_index(self):
        """That every video lies within its shard and its name within names.txt."""
        index, frame = self.index, self.views * self.height * self.width  # tokens
        if not len(index):
            raise UserError(f"{self.path} holds no videos: {MENDED}")
        file = self.path / "names.txt"
        if min(index["start"].min(), index["name"].min(), index["name_length"].min()) < 0 or index["frames"].min() < 1 \
                or (index["name"] + index["name_length"]).max() > (file.stat().st_size if file.is_file() else 0):
            raise self.damaged("index.npy", "does not fit names.txt")
        for shard in np.unique(index["shard"]):
            own, file = index[index["shard"] == shard], self.path / f"tokens-{shard:05d}.bin"
            end = 2 * int((own["start"] + own["frames"].astype(np.int64) * frame).max())  # bytes
            if not file.is_file() or file.stat().st_size < end:
                raise self.damaged(file.name, f"has {file.stat().st_size} bytes, not {end}" if file.is_file() else
                                   "is missing")

    def __len__(self):
        return len(self.index)

    def name(self, i):
        """The video's path, relative to header["root"]."""
        start, length = int(self.index["name"][i]), int(self.index["name_length"][i])
        with open(self.path / "names.txt", "rb") as file:
            file.seek(start)
            return os.fsdecode(file.read(length))

    def names(self):
        """The names of all videos, as bytes -> {bytes}."""
        return set((self.path / "names.txt").read_bytes().split(b"\n")) - {b""}

    def video_path(self, i):
        """Where the video lies -> Path. Raises UserError for a name that leaves the folder of the videos."""
        name = Path(self.name(i))
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{self.path}: the name {str(name)!r} leads out of the folder of its videos")
        return Path(self.header["root"]) / name

    def tokens(self, i, view=0):
        """One view of a video -> uint16 (F, H, W), a view into the file."""
        record = self.index[i]
        shard, start, frames = int(record["shard"]), int(record["start"]), int(record["frames"])
        if shard not in self._shards:
            file = self.path / f"tokens-{shard:05d}.bin"
            self._shards[shard] = np.memmap(file, "<u2", "r", shape=file.stat().st_size // 2)  # a kill leaves odd ends
        size = frames * self.height * self.width
        start += view * size
        return self._shards[shard][start:start + size].reshape(frames, self.height, self.width)

    def cut(self, i, start, frames, stride, view=0):
        """A clip of one view of a video -> int64 (T, H, W), see the function `cut`. UserError for tokens beyond the
        vocabulary."""
        part = self.tokens(i, view)[start:start + (frames - 1) * stride + 1:stride]
        if part.size and part.max() >= self.header["vocab_size"]:
            raise self.damaged(f"tokens-{self.index['shard'][i]:05d}.bin", f"has {part.max()} for a token of "
                               f"{self.name(i)}, the vocabulary ends at {self.header['vocab_size'] - 1}")
        return cut(part, 0, frames, 1, self.header["vocab_size"])

    def center_view(self):
        """Which view is the frame's centre at the model's own size: the one that pre-training sees."""
        center = [self.header["size"], "center", False]
        return self.header["views"].index(center) if center in self.header["views"] else 0

    def label_sets(self):
        """The names of the label sets, such as ["appearance", "motion"]."""
        return sorted(p.stem.removeprefix("labels-") for p in self.path.glob("labels-*.npy"))

    def labels(self, name="label"):
        """One label set -> int32 (videos,), -1 where a video has none. Raises UserError for an unknown set."""
        if name not in self.label_sets():
            raise UserError(f"{self.path} has no labels {name!r}: it has {', '.join(self.label_sets()) or 'none'}")
        labels = self._array(f"labels-{name}.npy", np.dtype("<i4"))
        if len(labels) != len(self):
            raise self.damaged(f"labels-{name}.npy", f"has {len(labels)} labels for {len(self)} videos")
        return labels
