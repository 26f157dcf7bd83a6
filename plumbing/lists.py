"""Readers of video lists: folders, text files, CSV and JSON.

Every UserError here names the file, and the line or entry that is wrong.
"""
import codecs
import csv
import json
import os
import zlib
from pathlib import Path

from plumbing.cli import UserError
from plumbing.decoding import VIDEO_ENDINGS


def videos_below(root):
    """All video files below a folder -> [path], sorted.

    Follows links to folders. Each folder is entered once, so that links cannot loop.
    """
    paths, entered, tops = [], set(), [root]
    for top in tops:  # grows by the links to folders
        for folder, subfolders, files in os.walk(top):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in entered:
                subfolders.clear()
                continue
            entered.add((status.st_dev, status.st_ino))
            paths += [os.path.join(folder, name) for name in files
                      if Path(name).suffix.lower() in VIDEO_ENDINGS]
            below = [os.path.join(folder, name) for name in sorted(subfolders)]
            tops += filter(os.path.islink, below)
    return sorted(paths)


def existing(root, *names):
    """The first of the files that exists below root."""
    paths = [root / name for name in names]
    for path in paths:
        if path.exists():
            return path
    raise UserError(f"no {' or '.join(map(str, paths))}")


def read_lines(path):
    """The lines that are not blank -> {line number: str}.

    Any bytes are accepted and decoded as in file names. A byte-order mark is dropped.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"no {path}")
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    return {number: os.fsdecode(line) for number, line in enumerate(lines, 1) if line.strip()}


def read_pairs(path, form, is_right=lambda pair: True):
    """Lines of a name and a word -> {line number: [name, word]}. A name may contain spaces.

    form: what a line looks like. A UserError quotes it beside a line that looks different.
    """
    pairs = {number: line.rsplit(None, 1) for number, line in read_lines(path).items()}
    for pair in pairs.values():
        if len(pair) != 2 or not is_right(pair):
            raise UserError(f"{path}: every line is `{form}`, not {' '.join(pair)[:80]!r}")
    return pairs


def read_table(path, *columns):
    """The rows of a CSV file, each with a value in these columns -> [dict]."""
    try:
        rows = list(csv.DictReader(read_lines(path).values()))
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file: {error}") from error
    for number, row in enumerate(rows, 1):
        for column in columns:
            if not row.get(column):
                raise UserError(f"{path}: row {number} has no {column}")
    return rows


def read_json(path, kind):
    try:
        content = json.loads("\n".join(read_lines(path).values()))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not whole, or no JSON: {error}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path}: a {kind.__name__} is expected, not a {type(content).__name__}")
    return content


def read_records(path, **fields):
    """A JSON file's list of records, each with these fields, {name: type} -> [dict]."""
    records = read_json(path, list)
    for number, record in enumerate(records, 1):
        for key, kind in fields.items():
            if not isinstance(record, dict) or not isinstance(record.get(key), kind):
                raise UserError(f"{path}: entry {number} has no {key} that can be read")
    return records


def is_number(text):
    return text.isdecimal() and len(text) < 10


def read_splits(root):
    """The labelled videos of a folder -> {split: [(path, label)]}.

    root holds train.txt, test.txt and the like, or train/, test/ and the like with a folder for
    each class, or just the folders of the classes, which are all for training.
    """
    splits = read_split_lists(root)
    names = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    if splits:
        return splits
    if "train" in names:
        return {name: class_folders(root / name) for name in names}
    return {"train": class_folders(root)}


def class_folders(root):
    """Videos in folders of their classes -> [(path, class)]."""
    videos = [Path(path) for path in videos_below(root)]
    for path in videos:
        if path.parent == root:
            raise UserError(f"{path} is in no class's folder: write a train.txt, with lines "
                            f"`relative/path.mp4 label`, or move it")
    return [(path, path.relative_to(root).parts[0]) for path in videos]


def split_off(videos, root):
    """A fifth of each class, at least one video, for testing -> the others, those to test.

    A video's name decides, so that a video that is added leaves the others where they are.
    videos: [(path, label)], below root.
    """
    def order(video):
        return zlib.crc32(os.fsencode(os.path.relpath(video[0], root)))

    by_class, test = {}, set()
    for video in sorted(set(videos), key=order):
        by_class.setdefault(video[1], []).append(video)
    for of_class in by_class.values():
        test.update(of_class[:max(len(of_class) > 1, round(len(of_class) / 5))])
    return [video for video in videos if video not in test], sorted(test)


def read_split_lists(root):
    """The lists of videos in a folder -> {split: [(path, label)]}.

    All are read, so that a label means the same in each. Raises UserError for the first line with a
    word where other labels are numbers, a number where they are words, or a video's second label.
    """
    names = {path.stem for path in root.glob("*.txt") if is_split_list(path)}
    lists, first, labels = {}, None, {}
    for name in sorted(names):
        path = root / f"{name}.txt"
        lists[name] = []
        for number, (video, label) in read_pairs(path, "relative/path.mp4 label").items():
            label = int(label) if is_number(label) else label
            first = first or (label, f"{path.name}, line {number}")
            if type(label) is not type(first[0]):
                raise UserError(f"{path}, line {number}: the label {label!r} does not go with "
                                f"{first[0]!r} ({first[1]}): labels are whole numbers in all "
                                f"lists of a folder, or words in all")
            earlier = labels.setdefault(os.path.normpath(video), label)
            if label != earlier:
                raise UserError(f"{path}, line {number}: {video} has the label {label!r} here and "
                                f"{earlier!r} before")
            lists[name].append((root / video, label))
    return lists


def is_split_list(path):
    """Whether a text file lists videos: its name says so, or its first line has one and a label."""
    return path.name in ("train.txt", "val.txt", "test.txt") or lists_videos(path)


def lists_videos(path):
    if path.name == "classes.txt" or not path.is_file():
        return False
    line = next(iter(read_lines(path).values()), "")
    video, *label = line.rsplit(None, 1) or [""]
    return bool(label) and Path(video).suffix.lower() in VIDEO_ENDINGS
