"""Writes a token store so that a kill loses nothing, and so that what is there already need not be made again.

The journal says which tokens were made of which file. The index is a function of the list of videos that is asked for
now: its labels and order; what was made of videos that it no longer names stays in the shards, unused.

Shapes: F frames of a video, H x W tokens a frame.
"""
import io
import json
import os
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np

from plumbing.cli import UserError
from plumbing.files import whole, write_text, writing
from plumbing.store import FORMAT, INDEX, TokenStore, check_header, checksum, read_header

# start: in tokens. size: of the file in bytes; modified: when, in ns; both None in stores made before they were noted.
# root: what the name was relative to. crc: of the tokens. damage: what is wrong with the file
Made = namedtuple("Made", "name start frames size modified crc damage shard root")


def stamp(path):
    """What tells a file from one that took its place -> (size in bytes, time of its last change in ns); (None, None)
    where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None, None
    return found.st_size, found.st_mtime_ns


def _line(record):
    text = json.dumps(record)
    return f"{text}\t{zlib.crc32(text.encode()):08x}\n".encode()


def _records(journal):
    """A journal's records -> [Made]. A line that is damaged, or cut short by a kill, does not count: its video is
    tokenised again."""
    found, root, shard = [], None, int(journal.stem.split("-")[1])
    for line in journal.read_bytes().split(b"\n")[:-1]:
        text, tab, crc = line.rpartition(b"\t")
        try:
            record = json.loads(text if tab else line)  # without a checksum: made before there were any
            if tab and int(crc, 16) != zlib.crc32(text):
                continue
            if "root" in record:  # of the following records
                root = record["root"]
            elif min(int(record["start"]), int(record["frames"]) - 1) >= 0:
                found.append(Made(record["name"], record["start"], record["frames"], record.get("size"),
                                  record.get("modified"), record.get("crc"), record.get("damage"), shard, root))
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return found


def read_journals(path, header):
    """What was made, by all processes -> {name: [Made]}. Tokens that a shard lacks were not."""
    made, frame = {}, len(header["views"]) * header["height"] * header["width"]
    for journal in sorted(Path(path).glob("journal-*.jsonl")):
        tokens = Path(path) / f"tokens-{journal.stem.split('-')[1]}.bin"
        size = tokens.stat().st_size if tokens.is_file() else 0
        for record in _records(journal):
            if 2 * (record.start + record.frames * frame) <= size:
                made.setdefault(record.name, []).append(record)
    return made


def made_of(made, name, size, modified, root):
    """The tokens of a file as it is now -> Made or None. In a folder that moved, files may have new dates."""
    for record in reversed(made.get(name, [])):
        if None in (record.size, size) or (record.size == size and (record.modified == modified
                                                                    or record.root != root)):
            return record
    return None


def contents(header, listed, made):
    """A finished store's header, its other small files, what is wrong with its videos -> dict, {name: bytes}, [str].

    listed: [(name, {label set: class}, size, modified)]: see `stamp`. Videos of which nothing was made are left out.
    """
    rows = [(made_of(made, name, *place, header["root"]), name, labels) for name, labels, *place in listed]
    rows = [(record, os.fsencode(name) + b"\n", labels) for record, name, labels in rows if record]
    places = np.cumsum([0] + [len(name) for _, name, _ in rows])
    arrays = {f"labels-{key}.npy": np.array([labels.get(key, -1) for *_, labels in rows], "<i4")
              for key in sorted({key for *_, labels in rows for key in labels})}
    arrays["index.npy"] = np.array([(record.shard, record.start, record.frames, place, len(name) - 1)
                                    for (record, name, _), place in zip(rows, places)], INDEX)
    files = {"names.txt": b"".join(name for _, name, _ in rows)}
    for name, array in arrays.items():
        file = io.BytesIO()
        np.save(file, array)
        files[name] = file.getvalue()
    checksums = {name: [len(content), zlib.crc32(content)] for name, content in files.items()}
    damaged = [record.damage for record, *_ in rows if record.damage]
    return {**header, "videos": len(rows), "checksums": checksums}, files, damaged


def is_finished(path, header):
    """Whether a whole store with this very header stands there."""
    try:
        return TokenStore(path).header == header
    except UserError:
        return False


def check_root(path, old, header, listed, made):
    """Raises UserError, naming both folders, where a store's videos are those of another one. A folder that moved, with
    videos of the same names and sizes, is the same."""
    before, now = old.get("root"), header["root"]
    known = [(name, place) for name, _, *place in listed if name in made]
    changed = [name for name, place in known if not made_of(made, name, *place, now)]
    if before not in (None, now) and made and (changed or not known):
        other = f"{changed[0]} is another file" if changed else "none of its names is there"
        raise UserError(f"{path} holds the videos of {before}, not those of {now} ({other}): "
                        f"choose another folder or delete it")


class StoreWriter:
    """Writes a token store, so that a kill at any moment loses at most the video being written.

    Tokens go to tokens-<rank>.bin; only then one line about the video goes to journal-<rank>.jsonl. Opening a
    half-written store cuts both back to the last whole video.
    header: what the tokens are: tokenizer, fingerprint, arithmetic, vocab_size, fps, size, height, width, views, root,
    classes. Raises UserError where a store of another header stands at the path already, or the disk is full.
    """

    def __init__(self, path, header, rank=0):
        self.path, self.rank = Path(path), rank
        self.header = header = full_header(header)
        if header["vocab_size"] > 65536:
            raise UserError(f"{header['vocab_size']} codes: a token store holds 65536 at most")
        if (self.path / "header.json").is_file():
            check_header(path, read_header(self.path, compared=True), header)
        elif rank == 0:
            write_text(self.path / "header.json", json.dumps(header, indent=1))
        self.frame = len(header["views"]) * header["height"] * header["width"]  # tokens
        made = [record for records in read_journals(path, header).values() for record in records]
        self.written = max((record.start + record.frames * self.frame for record in made if record.shard == rank),
                           default=0)  # tokens
        journal, tokens = self._file("journal", "jsonl"), self._file("tokens", "bin")
        with writing(path):
            self.tokens, self.journal = open(tokens, "ab", 0), open(journal, "ab", 0)  # noqa: SIM115 (see close)
            self.tokens.truncate(2 * self.written)
            if self.journal.tell() and not journal.read_bytes().endswith(b"\n"):
                self._write(self.journal, b"\n")  # ends a line that a kill cut short
        self._write(self.journal, _line({"root": header["root"]}))

    def _file(self, kind, ending):
        return self.path / f"{kind}-{self.rank:05d}.{ending}"

    def _write(self, file, content):
        with writing(self.path):
            rest = memoryview(content).cast("B")
            while rest:
                rest = rest[file.write(rest):]  # at most 2 GB at a time

    def add(self, name, tokens, size=None, modified=None, damage=None):
        """tokens: (views, F, H, W). size, modified: the file's, from before it was read: see `stamp`. damage: a line
        that says what is wrong with the file."""
        tokens = np.ascontiguousarray(tokens, dtype="<u2")
        self._write(self.tokens, tokens)
        self._write(self.journal, _line({"name": name, "start": self.written, "frames": tokens.shape[1], "size": size,
                                         "modified": modified, "crc": zlib.crc32(tokens), "damage": damage}))
        self.written += tokens.size

    def finish(self, listed):
        """Writes the index that TokenStore maps, where it is not there already -> videos in it, what is wrong with some
        [str]. listed: see `contents`. With several processes, one calls this when all have closed."""
        header, files, damaged = contents(self.header, listed, read_journals(self.path, self.header))
        if not header["videos"]:
            raise UserError(f"{self.path}: none of the {len(listed)} videos could be decoded, see errors.txt in it")
        if not is_finished(self.path, header):
            (self.path / "index.npy").unlink(missing_ok=True)  # comes last: a store without it is not finished
            for labels in self.path.glob("labels-*.npy"):
                labels.unlink()
            write_header(self.path, header)
            for name, content in files.items():
                with whole(self.path / name) as file:
                    file.write(content)
        return header["videos"], damaged

    def close(self):
        self.tokens.close()
        self.journal.close()


def write_header(path, header):
    write_text(path / "header.json", json.dumps({**header, "checksum": checksum(header)}, indent=1))


def full_header(header):
    """A header as it will be read back."""
    return json.loads(json.dumps({"format": FORMAT, **header}))


def check_tokens(store):
    """Reads all of a store: that tokens are those that were written, where the journal says, and below vocab_size
    -> what to say of it. Raises UserError naming the first video that is damaged."""
    known = {(record.shard, record.start, record.frames): record.crc
             for records in read_journals(store.path, store.header).values() for record in records}
    frames, vouched = 0, 0
    for i, (shard, start, length, *_) in enumerate(store.index.tolist()):
        tokens = np.stack([store.tokens(i, view) for view in range(store.views)])  # (views, F, H, W)
        crc = known.get((shard, start, length))
        if tokens.max() >= store.header["vocab_size"] or crc not in (None, zlib.crc32(tokens)):
            raise UserError(f"{store.path}/tokens-{shard:05d}.bin is damaged: {store.name(i)} has other tokens than "
                            f"were written. Delete the store and tokenise again")
        frames, vouched = frames + tokens.shape[1], vouched + (crc is not None)
    return (f"{store.path}: {len(store)} videos of {frames} frames, all tokens below {store.header['vocab_size']}, "
            f"those of {vouched} videos with the checksum that was written")
