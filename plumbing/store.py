"""The token store: a folder of parts, each with the tokens of some videos, and an index of all.

part-NAME.npy    uint16, the tokens of some videos one after the other, each (views, F, H, W)
part-NAME.json   the settings that made them, its videos, a checksum of the .npy; written last
index.npz        which videos the finished store holds, in which order, with which labels

Every file is written to another name and renamed, so a file that exists is complete. Parts never
change. Several programs may therefore write into one folder: at worst they do work twice.

Shapes: F frames of a video, T frames of a clip, H x W tokens a frame.
"""
import functools
import io
import json
import os
import secrets
import time
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.cli import UserError
from plumbing.files import whole
from plumbing.tokens import PAD, SPECIAL

PART_BYTES = 64 * 2**20  # a part is written once its tokens take this much,
PART_SECONDS = 60  # or once it is this old
MOST_CODES = 2**16 - SPECIAL  # tokens and the ids beside them are uint16
NPY_HEADER = 128  # bytes before the tokens: numpy pads the header of a 1-D array to this length
AGAIN = "the token store is damaged: tokenise again into it, or delete it"


class Video(NamedTuple):
    """One video of a part."""
    name: str  # its path, relative to root
    frames: int
    size: int  # of the file, in bytes
    mtime: int  # of the file, in nanoseconds
    offset: int  # where its tokens start in the part, in tokens
    damage: str | None  # one line that says what is wrong with the file
    part: str = ""
    root: str = ""


# ---------------------------------------------------------------- writing


def checksum(content):
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


class PartWriter:
    """Collects the tokens of videos and writes them as parts: one a minute, or one every 64 MB.

    settings: what makes tokens comparable; a JSON dict. root: the folder that the videos' names
    are relative to. Raises UserError if the disk is full.
    """

    def __init__(self, path, settings, root):
        if settings["vocab_size"] > MOST_CODES:
            raise UserError(f"{settings['vocab_size']} codes: a token store holds at most "
                            f"{MOST_CODES}")
        self.path, self.settings, self.root = Path(path), settings, root
        self._clear()

    def _clear(self):
        self.tokens, self.videos, self.offset, self.start = [], [], 0, time.monotonic()

    def add(self, name, size, mtime, tokens, damage=None):
        """tokens: (views, F, H, W). The other arguments are those of a Video."""
        self.videos.append(Video(name, tokens.shape[1], size, mtime, self.offset, damage))
        self.tokens.append(tokens.astype("<u2").reshape(-1))
        self.offset += tokens.size
        if 2 * self.offset >= PART_BYTES or time.monotonic() - self.start >= PART_SECONDS:
            self.close()

    def close(self):
        """Writes the videos that are not yet in a part."""
        if self.videos:
            name, npy = secrets.token_hex(8), io.BytesIO()
            np.save(npy, np.concatenate(self.tokens))
            with whole(self.path / f"part-{name}.npy") as file:
                file.write(npy.getbuffer())
            videos = [video._asdict() for video in self.videos]
            for fields in videos:
                del fields["part"], fields["root"]  # which `read_parts` sets
            content = {"settings": self.settings, "root": self.root, "videos": videos,
                       "bytes": npy.tell(), "crc32": zlib.crc32(npy.getbuffer())}
            with whole(self.path / f"part-{name}.json") as file:
                file.write(json.dumps({**content, "checksum": checksum(content)}).encode())
        self._clear()


def read_part(path):
    """The content of a part-NAME.json -> dict.

    None if it is damaged, or its .npy is missing or has another size.
    """
    try:
        content = json.loads(path.read_bytes())
        intact = content.pop("checksum") == checksum(content)
        size = path.with_suffix(".npy").stat().st_size
        return content if intact and size == content["bytes"] else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def read_parts(path, settings):
    """The videos of all complete parts of a folder -> {name: [Video]}.

    Raises UserError if the folder holds tokens that were made with other settings.
    """
    videos = {}
    for file in sorted(Path(path).glob("part-*.json")):
        content = read_part(file)
        if content is None:
            continue
        for key, value in settings.items():
            old = content["settings"].get(key)
            if old != value:
                raise UserError(f"{path} was made with {key} {old!r}, not {value!r}: "
                                f"choose another folder or delete it")
        part, root = file.stem.removeprefix("part-"), content["root"]
        for fields in content["videos"]:
            videos.setdefault(fields["name"], []).append(Video(**fields, part=part, root=root))
    return videos


def pack_index(path, header, videos, labels):
    """A finished store's index.npz -> bytes.

    header: the settings, root and classes. videos: [Video] in the order of the store.
    labels: [{label set: class}].
    """
    parts = sorted({video.part for video in videos})
    numbers = {part: number for number, part in enumerate(parts)}
    names = [os.fsencode(video.name) for video in videos]
    label_sets = sorted({name for row in labels for name in row})
    sizes = {part: (Path(path) / f"part-{part}.npy").stat().st_size for part in parts}
    content = json.dumps({**header, "parts": sizes, "label_sets": label_sets})
    arrays = {
        "header": np.frombuffer(content.encode(), np.uint8),
        "part": np.array([numbers[video.part] for video in videos], "<i4"),
        "offset": np.array([video.offset for video in videos], "<i8"),
        "frames": np.array([video.frames for video in videos], "<i4"),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_ends": np.cumsum([len(name) for name in names], dtype="<i8")}
    for name in label_sets:
        arrays[f"labels-{name}"] = np.array([row.get(name, -1) for row in labels], "<i4")
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


# ---------------------------------------------------------------- reading


def check_alike(*stores):
    """Raises UserError, naming two of the token stores, unless one tokenizer made all."""
    for store in stores[1:]:
        for key in ("fingerprint", "vocab_size", "size", "resampling"):
            first, other = stores[0].header[key], store.header[key]
            if first != other:
                raise UserError(f"{stores[0].path} and {store.path} were not made alike: "
                                f"their {key} is {first!r} and {other!r}. "
                                f"Tokenise both with the same tokenizer and frame size")


def check_parts(store):
    """Reads all tokens, names and labels of a store -> a line that says what it holds.

    Raises UserError naming a damaged file.
    """
    store.names()
    for name in store.label_sets():
        store.labels(name)
    for file in store.files:
        content = read_part(file.with_suffix(".json"))
        if content is None:
            raise UserError(f"{file.with_suffix('.json')} is missing or damaged: {AGAIN}")
        if zlib.crc32(file.read_bytes()) != content["crc32"]:
            raise UserError(f"{file} holds other tokens than were written: "
                            f"delete this file, then tokenise again")
    return (f"{store.path}: {len(store)} videos of {store.frames.sum(dtype=np.int64)} frames, "
            f"all tokens are as they were written")


def cut(tokens, start, frames, stride, vocab_size):
    """Every stride-th frame of tokens (F, H, W), from start -> int64 (T, H, W).

    Frames beyond the end are PAD.
    """
    part = tokens[start:start + (frames - 1) * stride + 1:stride]
    clip = np.full((frames, *tokens.shape[1:]), vocab_size + PAD, np.int64)
    clip[:len(part)] = part
    return clip


class TokenStore:
    """A finished token store. Opening it reads no tokens; a clip is one read of its frames.

    header: dict of the settings that made it, such as fps and vocab_size, of root and classes.
    frames: int32 (videos,), the length of every video.
    Raises UserError if there is no finished store, or a part is missing or has another size.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not (self.path / "index.npz").is_file():
            nearby = [*self.path.glob("*/index.npz"), *self.path.glob("*/*/index.npz"),
                      *self.path.parent.glob("*/index.npz")]
            names = ", ".join(sorted({str(index.parent) for index in nearby})[:8])
            others = f", or take one of {names}" if names else ""
            raise UserError(f"no finished token store of this version at {self.path}: "
                            f"make one with python vqvae.py tokenize{others}")
        self.header = json.loads(self._read("header").tobytes())
        parts, self._label_sets = self.header.pop("parts"), self.header.pop("label_sets")
        self.views = len(self.header["views"])
        self.height, self.width = self.header["height"], self.header["width"]
        self._part, self._offset, self.frames = map(self._read, ("part", "offset", "frames"))
        self.files = [self.path / f"part-{name}.npy" for name in parts]
        for file, size in zip(self.files, parts.values()):
            actual = file.stat().st_size if file.is_file() else "no"
            if actual != size:
                raise UserError(f"{file} has {actual} bytes, not {size}: {AGAIN}")

    def _read(self, name):
        """One array of the index. The zip file's own checksum reveals damage."""
        try:
            with zipfile.ZipFile(self.path / "index.npz") as archive:
                return np.load(io.BytesIO(archive.read(f"{name}.npy")))
        except Exception as error:  # zipfile and numpy raise errors of many kinds
            kind = type(error).__name__
            raise UserError(f"{self.path}/index.npz cannot be read ({kind}): {AGAIN}") from error

    def __getstate__(self):  # a loader process reads the names itself if it needs them
        return {key: value for key, value in self.__dict__.items() if key != "_names"}

    def __len__(self):
        return len(self.frames)

    @functools.cached_property
    def _names(self):
        return self._read("names").tobytes(), self._read("name_ends")

    def _name(self, i):
        text, ends = self._names
        return text[ends[i - 1] if i else 0:ends[i]]

    def name(self, i):
        """The video's path, relative to header["root"]."""
        return os.fsdecode(self._name(i))

    def names(self):
        """The names of all videos, as bytes -> {bytes}."""
        return {self._name(i) for i in range(len(self))}

    def video_path(self, i):
        """The video's file -> Path.

        Raises UserError for a name that leads out of the folder of the videos.
        """
        name = Path(self.name(i))
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{self.path}: the name {str(name)!r} leads out of the folder "
                            f"of its videos")
        return Path(self.header["root"]) / name

    def tokens(self, i, view=0, start=0, stop=None):
        """Frames start <= f < stop of one view of a video -> uint16 (F, H, W)."""
        frames, area = int(self.frames[i]), self.height * self.width
        stop = frames if stop is None else min(stop, frames)
        first = int(self._offset[i]) + (view * frames + start) * area
        size = 2 * max(0, stop - start) * area  # bytes
        content = read_bytes(self.files[self._part[i]], NPY_HEADER + 2 * first, size)
        if len(content) < size:
            raise UserError(f"{self.files[self._part[i]]} is missing or too short: {AGAIN}")
        return np.frombuffer(content, "<u2").reshape(-1, self.height, self.width)

    def cut(self, i, start, frames, stride, view=0):
        """A clip of one view of a video -> int64 (T, H, W), see the function `cut`.

        Raises UserError for tokens beyond the vocabulary.
        """
        tokens = self.tokens(i, view, start, start + (frames - 1) * stride + 1)
        vocab_size = self.header["vocab_size"]
        if tokens.size and tokens.max() >= vocab_size:
            raise UserError(f"{self.files[self._part[i]]} is damaged: it has {tokens.max()} for a "
                            f"token of {self.name(i)}, but the vocabulary ends at "
                            f"{vocab_size - 1}: delete this file, then tokenise again")
        return cut(tokens, 0, frames, stride, vocab_size)

    def center_view(self):
        """The number of the view that pre-training uses: the frame's centre at the model's size."""
        center = [self.header["size"], "center", False]
        return self.header["views"].index(center) if center in self.header["views"] else 0

    def label_sets(self):
        """The names of the label sets, such as ["shape", "motion"]."""
        return self._label_sets

    def labels(self, name="label"):
        """One label set -> int32 (videos,), -1 for a video without a label.

        Raises UserError for an unknown set.
        """
        if name not in self._label_sets:
            raise UserError(f"{self.path} has no labels {name!r}: "
                            f"it has {', '.join(self._label_sets) or 'none'}")
        return self._read(f"labels-{name}")


def read_bytes(path, start, size):
    """Part of a file -> bytearray.

    It is shorter than `size` if the file ends before, empty if the file cannot be opened.
    """
    content = bytearray()
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return content
    try:
        while piece := os.pread(file, size - len(content), start + len(content)):  # of at most 2 GB
            content += piece
    finally:
        os.close(file)
    return content
