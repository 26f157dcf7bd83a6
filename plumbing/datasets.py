"""One table of datasets: how to list the videos of each, which views to take, how to fine-tune.

To add a dataset, write the function that lists a split's videos and add one entry to DATASETS.
vqvae.py and finetune.py take their choices, views, frame spans and presets from the table.
"""
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plumbing.cli import UserError
from plumbing.decoding import VIDEO_ENDINGS, printed
from plumbing.lists import (
    existing,
    is_number,
    lists_videos,
    read_json,
    read_lines,
    read_pairs,
    read_records,
    read_splits,
    read_table,
    split_off,
    videos_below,
)

CROPS = ("top-left", "center", "bottom-right")
TWO_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Dataset:
    """An entry of the table.

    videos: (root, split) -> [(path, class)], the class a name, a number from 0, or None.
    splits: names of the splits, the training split first. Empty: any name is accepted.
    classes: root -> class names in the order of their numbers, or None if there are none.
        Default: the sorted class names of the first split.
    spans: (root, split) -> {path: (first frame, frame after the last)}, for files with more frames
        than the video.
    flip: whether training views include mirrored ones. False where classes tell left from right.
    test_crops: the crops of the test views.
    epochs: epochs of fine-tuning (Table 4). None: finetune.py has no preset for this dataset.
    scratch_epochs: the factor by which training without pre-training is longer.
    analysis_fps: frames a second of the analyses, T = 5. The released scripts use 2 for all five
        datasets; the paper (C.1) says 2 for UCF101 and Kinetics-400 and 4 for the others.
    results_fps: frames a second of the final results, T = 10. The released README gives 4, beside
        SSV2 and UCF101.
    """
    videos: Callable
    splits: tuple = ()
    classes: Callable | None = None
    spans: Callable | None = None
    flip: bool = True
    test_crops: tuple = CROPS
    epochs: float | None = None
    scratch_epochs: float = 4.0
    analysis_fps: float = 2.0
    results_fps: float = 4.0


# ---------------------------------------------------------------- videos, classes, spans


def find_dataset(name):
    """The entry of that name. Raises UserError for a name that the table lacks."""
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def list_videos(dataset, root, split):
    """The videos of a split that are on the disk -> [(path, label or None)], labels from 0.

    root: the folder with the unpacked files of the dataset's site.
    "folder" and "howto100m": every video file below root, without labels, whatever the split.
    "own": see `lists.read_splits`. Labels that are words are numbered in the order of
    root/classes.txt, or sorted if there is no such file.
    "ucf101" and "hmdb51": the splits train1 to test3; train and test are those of split 1.

    Counts listed videos that are missing on stderr. Raises UserError for a missing or malformed
    file, an unknown dataset, split or class, and if no video is on the disk.
    """
    entry = find_dataset(dataset)
    if not str(root):
        raise UserError("say where the videos are: --videos DIR, or the --root DIR of a --dataset")
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is a file: give its folder" if root.is_file()
                        else f"no folder {root}")
    if f"{split}1" in entry.splits:
        split = f"{split}1"
    if entry.splits and split not in entry.splits:
        choices = ", ".join(entry.splits)
        raise UserError(f"{dataset} has no split {split!r}: choose one of {choices}")
    numbers = {name: number for number, name in enumerate(class_names(dataset, root) or [])}
    videos = [(str(path), label_number(label, numbers, root, f"{dataset} {split}"))
              for path, label in entry.videos(root, split)]
    on_disk = {path: os.path.isfile(path) for path, _ in videos}
    present = [(path, label) for path, label in videos if on_disk[path]]
    missing = [path for path, _ in videos if not on_disk[path]]
    example = f", such as {printed(missing[0])}" if missing else ""
    if not present:
        raise UserError(f"none of the {len(missing)} videos listed for {split} is below "
                        f"{root}{example}")
    if missing:
        print(f"{dataset} {split}: {len(missing)} of {len(videos)} listed videos are not on this "
              f"disk{example}", file=sys.stderr)
    return present


def own_splits(root):
    """The labelled videos of a folder -> {split: [(path, label)]}, with a test split.

    Where the folder has none, a fifth of each class is set apart, and a line says so.
    """
    splits = {name: list_videos("own", root, name)
              for name, videos in read_splits(Path(root)).items() if videos}
    if "train" not in splits:
        raise UserError(f"{root} has no videos to train on: no train.txt, no folders of classes")
    if "test" not in splits:
        splits["train"], splits["test"] = split_off(splits["train"], root)
        print(f"{printed(root)} has no test split: testing on {len(splits['test'])} of its videos, "
              f"a fifth of each class, chosen by their names")
    if not splits["test"]:
        raise UserError(f"{root} has one video of each class: none is left to test on")
    return splits


def videos_to_pretrain_on(root):
    """All videos below a folder but those of its test split -> [path]. A line says how many."""
    paths, root = [path for path, _ in list_videos("folder", root, "")], Path(root)
    if lists_videos(root / "test.txt"):
        test = [path for path, _ in read_splits(root)["test"]]
    elif all((root / name).is_dir() for name in TWO_SPLITS):
        test = videos_below(root / "test")
    else:
        return paths
    test = set(map(os.path.realpath, test))
    others = [path for path in paths if os.path.realpath(path) not in test]
    print(f"{printed(root)}: leaving out the {len(paths) - len(others)} videos of its test split")
    return others


def label_number(label, numbers, root, where):
    """The number of a class that a list gives by name or number; None stays None.

    numbers: {class name: number}, empty where classes have no names. where: the dataset and split,
    for the UserError about a class that is not among them.
    """
    if isinstance(label, str) and not numbers:
        raise UserError(f"labels are words, so their order is needed: write the classes, one a "
                        f"line, to {root / 'classes.txt'}")
    number = numbers.get(label) if isinstance(label, str) else label
    if label is not None and (number is None or (numbers and not 0 <= number < len(numbers))):
        raise UserError(f"{where}: the label {label!r} is not among the {len(numbers)} classes")
    return number


def class_names(dataset, root):
    """The classes in the order of their labels -> [str], or None where they have no names."""
    entry, root = find_dataset(dataset), Path(root)
    if entry.classes:
        return entry.classes(root)
    labels = {label for _, label in entry.videos(root, entry.splits[0])} if entry.splits else set()
    return sorted(label for label in labels if isinstance(label, str)) or None


def frame_spans(dataset, root, split):
    """Which frames of a file belong to a video -> {path: (first, after the last)}."""
    spans = find_dataset(dataset).spans
    return spans(Path(root), split) if spans else {}


# ---------------------------------------------------------------- any folder, any text files


def list_folder(root, split):
    paths = videos_below(root)
    if not paths:
        endings = " ".join(sorted(VIDEO_ENDINGS))
        raise UserError(f"no video file below {root} (looked for {endings})")
    return [(path, None) for path in paths]


def list_own(root, split):
    splits = read_splits(root)
    if split not in splits:
        raise UserError(f"no {root / split}.txt" + f": the splits are {', '.join(splits)}" *
                        bool(splits))
    return splits[split]


def own_classes(root):
    labels = {label for _, label in read_splits(root).get("train", ())}
    words = sorted(label for label in labels if isinstance(label, str))
    if not (root / "classes.txt").is_file():
        return words or None
    names = list(read_lines(root / "classes.txt").values())
    return None if all(map(is_number, names)) and not words else names


# ---------------------------------------------------------------- the datasets of the paper


def list_ucf101(root, split):
    part, number = split[:-1], split[-1]
    lines = read_lines(root / f"ucfTrainTestlist/{part}list0{number}.txt").values()
    names = [line.split()[0] for line in lines]
    return [(root / "UCF-101" / name, name.split("/")[0]) for name in names]  # folder = class


def ucf101_classes(root):
    pairs = read_pairs(root / "ucfTrainTestlist/classInd.txt", "number class",
                       lambda pair: is_number(pair[0])).values()
    return [name for _, name in sorted((int(number), name) for number, name in pairs)]


def list_hmdb51(root, split):
    part = {"train": "1", "test": "2"}[split[:-1]]  # 0: in neither part of this split
    folder = existing(root, "testTrainMulti_7030_splits")
    ending = f"_test_split{split[-1]}.txt"
    videos = []
    for name in sorted(path.name.removesuffix(ending) for path in folder.glob(f"*{ending}")):
        pairs = read_pairs(folder / f"{name}{ending}", "video.avi 0, 1 or 2",
                           lambda pair: pair[1] in ("0", "1", "2"))
        videos += [(root / name / video, name) for video, of in pairs.values() if of == part]
    return videos


def list_ssv2(root, split):
    name = {"train": "train", "val": "validation", "test": "test"}[split]
    path = existing(root, f"{name}.json", f"something-something-v2-{name}.json")
    videos = []
    for record in read_records(path, id=str | int, template=str | None):  # test: no templates
        label = (record.get("template") or "").replace("[", "").replace("]", "")
        video = root / f"20bn-something-something-v2/{record['id']}.webm"
        videos.append((video, label or None))
    return videos


def ssv2_classes(root):
    labels = read_json(existing(root, "labels.json", "something-something-v2-labels.json"), dict)
    if not all(is_number(str(number)) for number in labels.values()):
        raise UserError(f"{root}: the numbers of the labels must be whole numbers")
    return sorted(labels, key=lambda name: int(labels[name]))


def diving48_records(root, split, **fields):
    """The records of a split -> [(path, record)]."""
    records = read_records(root / f"Diving48_V2_{split}.json", vid_name=str, **fields)
    return [(root / "rgb" / f"{record['vid_name']}.mp4", record) for record in records]


def list_diving48(root, split):
    return [(path, record["label"]) for path, record in diving48_records(root, split, label=int)]


def diving48_classes(root):
    names = read_json(root / "Diving48_vocab.json", list)
    return [" ".join(map(str, name)) if isinstance(name, list) else str(name) for name in names]


def diving48_spans(root, split):
    spans = {}
    for path, record in diving48_records(root, split, start_frame=int | None, end_frame=int | None):
        start, end = record.get("start_frame"), record.get("end_frame")
        if None not in (start, end) and 0 <= start < end:
            spans[str(path)] = start, end
    return spans


def list_kinetics400(root, split):
    """A video lies in a class's folder, with spaces or underscores, or directly in the split's."""
    rows = read_table(root / f"{split}.csv", "youtube_id", "time_start", "time_end")
    folder = existing(root, split)
    paths = [Path(path) for path in videos_below(folder)]
    on_disk = {path.stem: path for path in paths if path.suffix.lower() == ".mp4"}
    videos = []
    for row in rows:
        if not is_number(row["time_start"]) or not is_number(row["time_end"]):
            raise UserError(f"{root / split}.csv: {row['youtube_id']!r} has no start and end in "
                            f"whole seconds")
        name = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
        videos.append((on_disk.get(name, folder / f"{name}.mp4"), row.get("label") or None))
    return videos


def kinetics400_classes(root):
    return sorted({row["label"] for row in read_table(root / "train.csv", "label")})


# ---------------------------------------------------------------- the table

THREE_SPLITS = ("train1", "test1", "train2", "test2", "train3", "test3")

DATASETS = {
    "folder": Dataset(list_folder),
    "own": Dataset(list_own, classes=own_classes),
    "howto100m": Dataset(list_folder),
    "ucf101": Dataset(list_ucf101, THREE_SPLITS, ucf101_classes, epochs=50.0),
    "hmdb51": Dataset(list_hmdb51, THREE_SPLITS, epochs=50.0),
    "diving48": Dataset(list_diving48, TWO_SPLITS, diving48_classes, diving48_spans,
                        epochs=50.0),
    "ssv2": Dataset(list_ssv2, ("train", "val", "test"), ssv2_classes, flip=False,
                    test_crops=("center",), epochs=22.0, scratch_epochs=1.5),
    "kinetics400": Dataset(list_kinetics400, ("train", "val", "test"), kinetics400_classes,
                           epochs=30.0, scratch_epochs=1.5),
}
