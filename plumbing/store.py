"""Tokens on the disk: written so that a kill loses nothing, mapped into memory, never read whole.

A store is a folder: header.json says what the tokens are; tokens-<rank>.bin hold them, a shard a process; index.npy
says where each video's lie; names.txt holds the videos' paths, labels-<set>.npy their labels; journal-<rank>.jsonl says
what has been written.

Shapes: F frames of a video, H x W tokens a frame.
"""
import contextlib
import json
import os
from pathlib import Path

import numpy as np

from plumbing.cli import UserError
from plumbing.tokens import PAD

FORMAT = 1  # of the token store
INDEX = np.dtype([("shard", "<u2"), ("start", "<i8"), ("frames", "<i4"), ("name", "<i8"), ("name_length", "<i4")])


@contextlib.contextmanager
def whole(path):
    """A binary file to write, which takes the place of `path` only when all of it is there: a kill, an error or a full
    disk leaves the earlier file as it was. Makes its folder where there is none."""
    part = Path(f"{path}.{os.environ.get('RANK', '0')}.part")  # each process of a group may write the same
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text):
    with whole(path) as file:
        file.write(text.encode())


def read_lines(path):
    """The records of a .jsonl file, but for a last line that a kill cut short; [] where there is no file -> [dict]."""
    lines = Path(path).read_text().splitlines(keepends=True) if Path(path).is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def check_header(path, old, new):
    """Raises UserError, naming what differs, unless the tokens of a store with the header `old` are what `new` says."""
    for key in sorted(new.keys() - {"root", "videos"}):  # a moved folder: the same videos
        if key in old and old[key] != new[key]:
            raise UserError(f"{path} was made with {key} {old[key]!r}, not {new[key]!r}: "
                            f"choose another folder or delete it")


class StoreWriter:
    """Writes a token store, so that a kill at any moment loses at most the video being written.

    Tokens go to tokens-<rank>.bin; only then one line about the video goes to journal-<rank>.jsonl. Opening a
    half-written store cuts both back to the last whole video, and `done` names what need not be made again.
    header: what the tokens are: tokenizer, fingerprint, arithmetic, vocab_size, fps, size, height, width, views, root,
    classes. Raises UserError where a store of another header stands at the path already.
    """

    def __init__(self, path, header, rank=0):
        self.path, self.rank = Path(path), rank
        header = json.loads(json.dumps({"format": FORMAT, **header}))  # as it will be read back
        place = self.path / "header.json"
        if place.is_file():
            check_header(path, json.loads(place.read_text()), header)
        write_text(place, json.dumps(header, indent=1))
        self.header = header
        self.done = {record["name"] for journal in self.path.glob("journal-*.jsonl") for record in read_lines(journal)}
        own = read_lines(self._file("journal", "jsonl"))
        self.frame = len(header["views"]) * header["height"] * header["width"]  # tokens
        self.written = own[-1]["start"] + own[-1]["frames"] * self.frame if own else 0  # tokens
        self.tokens = open(self._file("tokens", "bin"), "ab")  # noqa: SIM115 (closed by close)
        self.tokens.truncate(2 * self.written)
        write_text(self._file("journal", "jsonl"), "".join(json.dumps(record) + "\n" for record in own))
        self.journal = open(self._file("journal", "jsonl"), "a")  # noqa: SIM115

    def _file(self, kind, ending):
        return self.path / f"{kind}-{self.rank:05d}.{ending}"

    def add(self, number, name, tokens, labels, damage=None):
        """number: the video's place in the store. tokens: (views, F, H, W). labels: {label set: class}. damage: a line
        that says what is wrong with the file."""
        tokens = np.ascontiguousarray(tokens, dtype="<u2")
        self.tokens.write(tokens.tobytes())
        self.tokens.flush()
        record = {"number": number, "name": name, "start": self.written, "frames": tokens.shape[1], "labels": labels}
        record |= {"damage": damage} if damage else {}
        self.journal.write(json.dumps(record) + "\n")
        self.journal.flush()
        self.written += tokens.size

    def finish(self):
        """Writes the index that TokenStore maps -> the lines about damaged files [str]. With several processes, one
        calls this when all have closed."""
        records = [(int(journal.stem.split("-")[1]), record) for journal in sorted(self.path.glob("journal-*.jsonl"))
                   for record in read_lines(journal)]
        records.sort(key=lambda pair: pair[1]["number"])
        names = [os.fsencode(record["name"]) + b"\n" for _, record in records]  # one line a name
        places = np.cumsum([0] + [len(name) for name in names])
        index = np.array([(shard, record["start"], record["frames"], place, len(name) - 1)
                          for (shard, record), name, place in zip(records, names, places)], INDEX)
        with whole(self.path / "names.txt") as file:
            file.write(b"".join(names))
        for labels in {key for _, record in records for key in record["labels"]}:
            with whole(self.path / f"labels-{labels}.npy") as file:
                np.save(file, np.array([record["labels"].get(labels, -1) for _, record in records], "<i4"))
        with whole(self.path / "index.npy") as file:
            np.save(file, index)
        write_text(self.path / "header.json", json.dumps({**self.header, "videos": len(records)}, indent=1))
        return [record["damage"] for _, record in records if "damage" in record]

    def close(self):
        self.tokens.close()
        self.journal.close()


class TokenStore:
    """A finished token store, memory-mapped: opening it reads no tokens, however many videos it holds.

    header: dict, see StoreWriter. Raises UserError where no finished store is, or one of a format that this version
    does not read.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not (self.path / "index.npy").is_file():
            raise UserError(f"no finished token store at {path} (python vqvae.py tokenize makes one)")
        self.header = json.loads((self.path / "header.json").read_text())
        if self.header["format"] != FORMAT:
            raise UserError(f"{path} is a token store of format {self.header['format']}; this version reads {FORMAT}")
        if not isinstance(self.header.get("fps"), (int, float)):
            raise UserError(f"{path}: its header's fps must be a number, not {self.header.get('fps')!r}")
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
            return os.fsdecode(file.read(length))

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
            self._shards[shard] = np.memmap(self.path / f"tokens-{shard:05d}.bin", "<u2", "r")
        size = frames * self.height * self.width
        start += view * size
        return self._shards[shard][start:start + size].reshape(frames, self.height, self.width)

    def cut(self, i, start, frames, stride, view=0):
        """A clip of every stride-th frame -> int64 (T, H, W); frames beyond the video's end are whole frames of PAD."""
        clip = np.full((frames, self.height, self.width), self.header["vocab_size"] + PAD, np.int64)
        part = self.tokens(i, view)[start:start + (frames - 1) * stride + 1:stride]
        clip[:len(part)] = part
        return clip

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
        return np.load(self.path / f"labels-{name}.npy", mmap_mode="r")
