"""The real datasets' own lists -> (path, label).

Datasets are named in DATASETS; where their files lie on a user's disk is what their own sites unpack to.
"""
import codecs
import csv
import json
import os
import sys
from pathlib import Path

from plumbing.cli import UserError
from plumbing.decoding import VIDEO_ENDINGS, printed

THREE = ("train1", "test1", "train2", "test2", "train3", "test3")
DATASETS = {"folder": (), "list": (), "howto100m": (), "ucf101": THREE, "hmdb51": THREE, "diving48": ("train", "test"),
            "ssv2": ("train", "val", "test"), "kinetics400": ("train", "val", "test")}  # name: its splits


def list_videos(dataset, root, split):
    """The videos of a split that are on the disk -> [(path, label or None)], labels from 0.

    "folder" and "howto100m": every video file below root, without labels; split is not used.
    "list": root/<split>.txt, a line a video: `relative/path.mp4 label`, the label after the last space. Labels that
    are words are numbered in the order of root/classes.txt, or sorted where there is no such file.
    "ucf101", "hmdb51" (train1 to test3; train and test mean split 1), "ssv2", "diving48", "kinetics400": root is where
    the files of the dataset's own site were unpacked.
    Listed videos that are missing are counted on stderr. Raises UserError naming the path that was looked for, the
    unknown dataset or split, the label that the classes lack, or what cannot be read in a list.
    """
    if dataset not in DATASETS:
        raise UserError(f"unknown dataset {dataset!r}: choose one of {', '.join(DATASETS)}")
    if not str(root):
        raise UserError("say where the videos are: --videos DIR, or the --root DIR of a --dataset")
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is a file: give its folder" if root.is_file() else f"no folder {root}")
    if dataset in ("folder", "howto100m"):
        paths = sorted(str(p) for p in root.rglob("*") if p.suffix.lower() in VIDEO_ENDINGS)
        if not paths:
            raise UserError(f"no video file below {root} (looked for {' '.join(sorted(VIDEO_ENDINGS))})")
        return [(path, None) for path in paths]
    if dataset in ("ucf101", "hmdb51") and split in ("train", "test"):
        split += "1"
    if dataset != "list" and split not in DATASETS[dataset]:
        raise UserError(f"{dataset} has no split {split!r}: choose one of {', '.join(DATASETS[dataset])}")
    listed = _LISTS[dataset](root, split)
    numbers = {name: number for number, name in enumerate(class_names(dataset, root) or [])}
    for place, (path, label) in enumerate(listed):
        if isinstance(label, str) and not numbers:
            raise UserError(f"labels are words, so their order is needed: write the classes, one a line, "
                            f"to {root / 'classes.txt'}")
        number = numbers.get(label) if isinstance(label, str) else label
        if label is not None and (number is None or (numbers and not 0 <= number < len(numbers))):
            raise UserError(f"{dataset} {split}: the label {label!r} is not among the {len(numbers)} classes")
        listed[place] = path, number
    found = [(str(path), label) for path, label in listed if os.path.isfile(path)]
    if not found:
        example = f", such as {printed(listed[0][0])}" if listed else ""
        raise UserError(f"none of the {len(listed)} videos listed for {split} is below {root}{example}")
    if len(found) < len(listed):
        print(f"{dataset} {split}: {len(listed) - len(found)} of {len(listed)} listed videos are not on this disk, "
              f"such as {printed(next(path for path, _ in listed if not os.path.isfile(path)))}", file=sys.stderr)
    return found


def class_names(dataset, root):
    """The classes in the order of their labels -> [str], or None where there are no labels."""
    root = Path(root)
    if dataset == "list":
        listed = {str(label) for _, label in _list(root, "train")} if (root / "train.txt").is_file() else ()
        words = _lines(root, "classes.txt") if (root / "classes.txt").is_file() else sorted(listed)
        return None if all(map(_is_number, words)) else words
    if dataset == "ucf101":
        pairs = _pairs(root, "ucfTrainTestlist/classInd.txt", "number class", lambda pair: _is_number(pair[0]))
        return [name for _, name in sorted((int(number), name) for number, name in pairs)]
    if dataset == "hmdb51":
        folder = _annotation(root, "testTrainMulti_7030_splits")
        return sorted({p.name.rsplit("_test_split", 1)[0] for p in folder.glob("*_test_split?.txt")})
    if dataset == "ssv2":
        labels = _json(root, dict, "labels.json", "something-something-v2-labels.json")
        if not all(_is_number(str(number)) for number in labels.values()):
            raise UserError(f"{root}: the labels' numbers are whole numbers")
        return sorted(labels, key=lambda name: int(labels[name]))
    if dataset == "diving48":
        names = _json(root, list, "Diving48_vocab.json")
        return [" ".join(map(str, parts)) if isinstance(parts, list) else str(parts) for parts in names]
    if dataset == "kinetics400":
        return sorted({row["label"] for row in _rows(root, "train.csv", "label")})
    return None


def frame_spans(dataset, root, split):
    """Which frames of a file belong to a video, where the annotations say -> {path: (first, after the last)}."""
    if dataset != "diving48":
        return {}
    return {str(Path(root) / "rgb" / f"{entry['vid_name']}.mp4"): (entry["start_frame"], entry["end_frame"])
            for entry in _entries(root, f"Diving48_V2_{split}.json", vid_name=str, start_frame=int | None,
                                  end_frame=int | None)
            if None not in (entry.get("start_frame"), entry.get("end_frame"))
            and 0 <= entry["start_frame"] < entry["end_frame"]}


def _annotation(root, *names):
    """The first of the files that exists below root."""
    for name in names:
        if (Path(root) / name).exists():
            return Path(root) / name
    raise UserError(f"no {' or '.join(str(Path(root) / name) for name in names)}")


def _lines(root, name):
    """The lines that are not empty, as file names are read: any bytes, but for a byte-order mark -> [str]."""
    path = _annotation(root, name)
    if not path.is_file():
        raise UserError(f"{path} is no file")
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    return [os.fsdecode(line) for line in lines if line.strip()]


def _pairs(root, name, form, is_right=lambda pair: True):
    """The lines as (all but the last word, the last word). form: how a line looks, for the message about one that does
    not."""
    pairs = [line.rsplit(None, 1) for line in _lines(root, name)]
    for pair in pairs:
        if len(pair) != 2 or not is_right(pair):
            raise UserError(f"{Path(root) / name}: every line is `{form}`, not {' '.join(pair)[:80]!r}")
    return pairs


def _rows(root, name, *columns):
    """The rows of a table, each with something in the columns -> [dict]."""
    try:
        rows = list(csv.DictReader(_lines(root, name)))
    except csv.Error as error:
        raise UserError(f"{Path(root) / name} is no table: {error}") from error
    for number, row in enumerate(rows, 1):
        lacking = [column for column in columns if not row.get(column)]
        if lacking:
            raise UserError(f"{Path(root) / name}: row {number} has no {lacking[0]}")
    return rows


def _json(root, kind, *names):
    path = _annotation(root, *names)
    try:
        content = json.loads("\n".join(_lines(root, path.relative_to(root))))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not whole, or no JSON: {error}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path}: a {kind.__name__} is expected, not a {type(content).__name__}")
    return content


def _entries(root, *names, **fields):
    """A JSON file's records, each with the fields, {name: type} -> [dict]."""
    entries = _json(root, list, *names)
    for number, entry in enumerate(entries, 1):
        for key, kind in fields.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise UserError(f"{_annotation(root, *names)}: entry {number} has no {key} that can be read")
    return entries


def _is_number(text):
    return text.isdecimal() and len(text) < 10


# each: root, split -> [(path, its class as a name or number, or None)]


def _list(root, split):
    pairs = _pairs(root, f"{split}.txt", "relative/path.mp4 label")
    numbers = all(_is_number(label) for _, label in pairs)
    return [(root / name, int(label) if numbers else label) for name, label in pairs]


def _ucf101(root, split):
    names = [line.split()[0] for line in _lines(root, f"ucfTrainTestlist/{split[:-1]}list0{split[-1]}.txt")]
    return [(root / "UCF-101" / name, name.split("/")[0]) for name in names]  # the class is the folder


def _hmdb51(root, split):
    wanted = {"train": "1", "test": "2"}[split[:-1]]  # 0: in neither part of this split
    return [(root / name / video, name) for name in class_names("hmdb51", root)
            for video, part in _pairs(root, f"testTrainMulti_7030_splits/{name}_test_split{split[-1]}.txt",
                                      "video.avi 0, 1 or 2", lambda pair: pair[1] in ("0", "1", "2"))
            if part == wanted]


def _ssv2(root, split):
    name = {"train": "train", "val": "validation", "test": "test"}[split]
    entries = _entries(root, f"{name}.json", f"something-something-v2-{name}.json", id=str | int,
                       template=str | None)  # the test split has no templates
    classes = [(entry.get("template") or "").replace("[", "").replace("]", "") or None for entry in entries]
    return [(root / f"20bn-something-something-v2/{entry['id']}.webm", name) for entry, name in zip(entries, classes)]


def _diving48(root, split):
    return [(root / "rgb" / f"{entry['vid_name']}.mp4", entry["label"])
            for entry in _entries(root, f"Diving48_V2_{split}.json", vid_name=str, label=int)]


def _kinetics400(root, split):
    rows, folder = _rows(root, f"{split}.csv", "youtube_id", "time_start", "time_end"), _annotation(root, split)
    for row in rows:
        if not _is_number(row["time_start"]) or not _is_number(row["time_end"]):
            raise UserError(f"{root / split}.csv: {row['youtube_id']!r} has no start and end in whole seconds")
    names = [f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}.mp4" for row in rows]
    on_disk = {p.name: p for p in folder.rglob("*.mp4")}  # in class folders, with spaces or underscores, or in one
    return [(on_disk.get(name, folder / name), row.get("label") or None) for name, row in zip(names, rows)]


_LISTS = {"list": _list, "ucf101": _ucf101, "hmdb51": _hmdb51, "ssv2": _ssv2, "diving48": _diving48,
          "kinetics400": _kinetics400}
