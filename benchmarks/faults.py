"""What kills and damaged files do, in numbers: nothing may be lost, and nothing silently wrong.

    python benchmarks/faults.py kills         of pre-training (20), fine-tuning and tokenising (10)
    python benchmarks/faults.py corruptions   1,000 of a checkpoint, a token store, lists of videos

A run that is killed (SIGKILL) at random moments, and started again each time, has to end with the
weights, or tokens, of an uninterrupted one, bit for bit. A damaged file has to be refused in one
line, or to give what it gave before.
"""
import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import toy
from plumbing.checkpoints import read_checkpoint
from plumbing.cli import UserError, progress
from plumbing.datasets import list_videos
from plumbing.store import TokenStore, check_parts
from pretrain import Vimpac

SMALL = ["--layers", 1, "--dim", 32, "--heads", 2, "--mlp-dim", 64, "--batch", 8, "--held-out", 4,
         "--save-every", 5, "--log-every", 5, "--knn-every", 20, "--micro-batch", 8,
         "--precision", "fp32"]


def start(*argv):
    return subprocess.Popen([sys.executable, str(ROOT / argv[0]), *map(str, argv[1:])],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def finished(*argv):
    """Runs a script to its end -> seconds."""
    began, process = time.perf_counter(), start(*argv)
    output = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(output)
    return time.perf_counter() - began


def kill(argv, times, seconds, chance):
    """Starts a script and kills it at a random moment, so many times, then lets it end.

    seconds: how long it takes. chance: random.Random.
    """
    for _ in progress(range(times), "kills", unit=" kills"):
        process = start(*argv)
        time.sleep(chance.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finished(*argv)


def same(one, two):
    """Whether the weights of two checkpoints, or the tokens of two stores, are equal."""
    if Path(one).suffix == ".pt":
        a, b = (read_checkpoint(path) for path in (one, two))
        weights = [torch.equal(a["model"][key], b["model"][key]) for key in b["model"]]
        return a["step"] == b["step"] and all(weights)
    a, b = TokenStore(one), TokenStore(two)
    return len(a) == len(b) and all(
        a.name(i) == b.name(i) and np.array_equal(a.tokens(i), b.tokens(i)) for i in range(len(b)))


def kills(chance):
    toy.make("datasets/toy", {"pretrain": 60, "train": 40, "val": 10, "test": 10})
    finished("pretrain.py", *SMALL, "--steps", 5, "--tokenizer-steps", 20, "--out", "runs/first")
    pretrain = ["pretrain.py", *SMALL, "--steps", 120, "--resume"]
    finetune = ["finetune.py", "--checkpoint", "runs/first/last.pt", "--steps", 120,
                "--save-every", 5, "--clips", 1, "--micro-batch", 16, "--precision", "fp32",
                "--resume"]
    tokenize = ["vqvae.py", "tokenize", "--videos", "datasets/toy/videos",
                "--tokenizer", "datasets/toy/tokenizer.pt", "--frame-size", 64, "--fps", 8,
                "--workers", 1]
    jobs = {"pre-training": (pretrain, 20, "last.pt"), "fine-tuning": (finetune, 10, "last.pt"),
            "tokenising": (tokenize, 10, "")}
    for name, (argv, times, file) in jobs.items():
        whole, broken = (f"runs/{name}-{kind}" for kind in ("whole", "broken"))
        seconds = finished(*argv, "--out", whole)
        kill([*argv, "--out", broken], times, seconds, chance)
        equal = same(Path(broken) / file, Path(whole) / file)
        result = "the same, bit for bit" if equal else "NOT THE SAME"
        print(f"{name}, {times} kills: {result}", flush=True)


def corrupt(path, chance):
    """One of: bytes changed, a part zeroed, cut short, a part lost, a part twice."""
    content = bytearray(path.read_bytes())
    first = chance.randrange(max(1, len(content)))
    last = min(len(content), first + chance.choice((1, 8, 512)))
    match chance.randrange(5):
        case 0:
            for i in range(first, last):
                content[i] ^= chance.randrange(1, 256)
        case 1:
            content[first:last] = bytes(last - first)
        case 2:
            del content[first:]
        case 3:
            del content[first:last]
        case 4:
            content[first:first] = content[first:last]
    path.write_bytes(content)


def outcome(read, expected):
    """What reading a damaged file ends in."""
    try:
        content = read()
    except UserError as error:
        one_line = len(str(error).splitlines()) == 1
        return "refused in one line" if one_line else "REFUSED IN SEVERAL LINES"
    except Exception as error:  # noqa: BLE001 (errors of any kind are counted)
        return f"TRACEBACK {type(error).__name__}: {error}"[:90]
    return "read as before" if content == expected else "READ OTHERWISE"


def count(name, folder, read, chance, times):
    """Damages one of a folder's files at a time."""
    good, outcomes = Path(tempfile.mkdtemp()) / "good", Counter()
    shutil.copytree(folder, good)
    expected = read()
    for _ in progress(range(times), name, unit=" corruptions"):
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        corrupt(chance.choice(files), chance)
        signal.alarm(60)  # a hang ends this benchmark
        outcomes[outcome(read, expected)] += 1
        signal.alarm(0)
        shutil.rmtree(folder)
        shutil.copytree(good, folder)
    counts = ", ".join(f"{n} {kind}" for kind, n in outcomes.most_common())
    print(f"{name}, {times}: {counts}", flush=True)


def corruptions(chance, times):
    toy.make("datasets/toy", {"pretrain": 60, "train": 40, "val": 10, "test": 10})
    finished("pretrain.py", *SMALL, "--steps", 5, "--tokenizer-steps", 20, "--out", "runs/first")
    Path("checkpoint").mkdir()
    shutil.copy("runs/first/last.pt", "checkpoint/last.pt")
    path, root = Path("datasets/toy/tokens/train"), ucf101(Path("lists"))

    def weights():
        state = Vimpac.load("checkpoint/last.pt").state_dict()
        return {key: value.tolist() for key, value in state.items()}

    def tokens():
        store = TokenStore(path)
        check_parts(store)
        labels = [store.labels(name).tolist() for name in store.label_sets()]
        videos = [(store.name(i), store.tokens(i).tolist()) for i in range(len(store))]
        return videos, labels, store.header["classes"]

    def listed():
        videos = list_videos("ucf101", root, "train1")
        return all(isinstance(path, str) and 0 <= label < 4 for path, label in videos)

    count("a checkpoint", "checkpoint", weights, chance, times)
    count("a token store", path, tokens, chance, times)
    count("UCF101's lists", root / "ucfTrainTestlist", listed, chance, times)


def ucf101(root):
    """Writes lists of 40 videos of 4 classes, and empty files for the videos -> root."""
    videos = [(1 + i % 4, f"C{1 + i % 4}/v_{i}.avi") for i in range(40)]
    for _, name in videos:
        (root / "UCF-101" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "UCF-101" / name).touch()
    lists = {"classInd": [f"{i} C{i}\n" for i in range(1, 5)],
             "trainlist01": [f"{name} {label}\n" for label, name in videos]}
    (root / "ucfTrainTestlist").mkdir()
    for name, lines in lists.items():
        (root / f"ucfTrainTestlist/{name}.txt").write_text("".join(lines))
    return root


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "corruptions"])
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--times", type=int, default=1000,
                        help="corruptions of each (default: 1000)")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        kills(chance) if args.what == "kills" else corruptions(chance, args.times)


if __name__ == "__main__":
    main()
