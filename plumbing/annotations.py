"""The real datasets' own lists -> (path, label).

Datasets are named in DATASETS; where their files lie on a user's disk is what their own sites unpack to.
"""
import csv
import json
import sys
from pathlib import Path

from plumbing.cli import UserError
from plumbing.decoding import VIDEO_ENDINGS

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
    unknown dataset or split, or the label that the classes lack.
    """
    root = Path(root)
    if dataset not in DATASETS:
        raise UserError(f"unknown dataset {dataset!r}: choose one of {', '.join(DATASETS)}")
    if not root.is_dir():
        raise UserError(f"no folder {root}")
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
    found = [(str(path), label) for path, label in listed if path.is_file()]
    if not found:
        example = f", such as {listed[0][0]}" if listed else ""
        raise UserError(f"none of the {len(listed)} videos listed for {split} is below {root}{example}")
    if len(found) < len(listed):
        print(f"{dataset} {split}: {len(listed) - len(found)} of {len(listed)} listed videos are not on this disk",
              file=sys.stderr)
    return found


def class_names(dataset, root):
    """The classes in the order of their labels -> [str], or None where there are no labels."""
    root = Path(root)
    if dataset == "list":
        listed = {str(label) for _, label in _list(root, "train")} if (root / "train.txt").is_file() else ()
        words = _lines(root, "classes.txt") if (root / "classes.txt").is_file() else sorted(listed)
        return None if all(word.isdigit() for word in words) else words
    if dataset == "ucf101":
        pairs = [line.split() for line in _lines(root, "ucfTrainTestlist/classInd.txt")]
        return [name for _, name in sorted((int(number), name) for number, name in pairs)]
    if dataset == "hmdb51":
        folder = _annotation(root, "testTrainMulti_7030_splits")
        return sorted({p.name.rsplit("_test_split", 1)[0] for p in folder.glob("*_test_split?.txt")})
    if dataset == "ssv2":
        labels = _json(root, "labels.json", "something-something-v2-labels.json")
        return sorted(labels, key=lambda name: int(labels[name]))
    if dataset == "diving48":
        names = _json(root, "Diving48_vocab.json")
        return [" ".join(parts) if isinstance(parts, list) else str(parts) for parts in names]
    if dataset == "kinetics400":
        return sorted({row["label"] for row in csv.DictReader(_lines(root, "train.csv"))})
    return None


def frame_spans(dataset, root, split):
    """Which frames of a file belong to a video, where the annotations say -> {path: (first, after the last)}."""
    if dataset != "diving48":
        return {}
    return {str(Path(root) / "rgb" / f"{entry['vid_name']}.mp4"): (entry["start_frame"], entry["end_frame"])
            for entry in _json(root, f"Diving48_V2_{split}.json")
            if entry.get("end_frame", 0) > entry.get("start_frame", 0)}


def _annotation(root, *names):
    """The first of the files that exists below root."""
    for name in names:
        if (Path(root) / name).exists():
            return Path(root) / name
    raise UserError(f"no {' or '.join(str(Path(root) / name) for name in names)}")


def _lines(root, *names):
    return [line for line in _annotation(root, *names).read_text().splitlines() if line.strip()]


def _json(root, *names):
    return json.loads(_annotation(root, *names).read_text())


# each: root, split -> [(path, its class as a name or number, or None)]


def _list(root, split):
    pairs = [line.rsplit(None, 1) for line in _lines(root, f"{split}.txt")]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"{root / split}.txt: every line is `relative/path.mp4 label`")
    numbers = all(label.isdigit() for _, label in pairs)
    return [(root / name, int(label) if numbers else label) for name, label in pairs]


def _ucf101(root, split):
    names = [line.split()[0] for line in _lines(root, f"ucfTrainTestlist/{split[:-1]}list0{split[-1]}.txt")]
    return [(root / "UCF-101" / name, name.split("/")[0]) for name in names]  # the class is the folder


def _hmdb51(root, split):
    wanted = {"train": "1", "test": "2"}[split[:-1]]  # 0: in neither part of this split
    return [(root / name / line.rsplit(None, 1)[0], name) for name in class_names("hmdb51", root)
            for line in _lines(root, f"testTrainMulti_7030_splits/{name}_test_split{split[-1]}.txt")
            if line.rsplit(None, 1)[1] == wanted]


def _ssv2(root, split):
    name = {"train": "train", "val": "validation", "test": "test"}[split]
    entries = _json(root, f"{name}.json", f"something-something-v2-{name}.json")
    # the test split has no templates
    classes = [entry.get("template", "").replace("[", "").replace("]", "") or None for entry in entries]
    return [(root / f"20bn-something-something-v2/{entry['id']}.webm", name) for entry, name in zip(entries, classes)]


def _diving48(root, split):
    return [(root / "rgb" / f"{entry['vid_name']}.mp4", entry["label"])
            for entry in _json(root, f"Diving48_V2_{split}.json")]


def _kinetics400(root, split):
    rows, folder = list(csv.DictReader(_lines(root, f"{split}.csv"))), _annotation(root, split)
    names = [f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}.mp4" for row in rows]
    on_disk = {p.name: p for p in folder.rglob("*.mp4")}  # in class folders, with spaces or underscores, or in one
    return [(on_disk.get(name, folder / name), row.get("label") or None) for name, row in zip(names, rows)]


_LISTS = {"list": _list, "ucf101": _ucf101, "hmdb51": _hmdb51, "ssv2": _ssv2, "diving48": _diving48,
          "kinetics400": _kinetics400}
