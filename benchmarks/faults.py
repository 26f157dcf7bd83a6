"""What kills and damaged files do, in numbers: nothing may be lost, and nothing silently wrong.

    python benchmarks/faults.py kills           20 kills of a pre-training, 10 of a fine-tuning, 10 of a tokenisation
    python benchmarks/faults.py corruptions     1,000 of a checkpoint, of a token store and of lists of videos

A run that is killed (SIGKILL) at random moments, and started again each time, has to end with the weights, or tokens,
of one that nobody broke, bit for bit. A damaged file has to be refused in one line, or to give what it gave before.
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
from plumbing.annotations import list_videos
from plumbing.checkpoints import read_checkpoint
from plumbing.cli import UserError, progress
from plumbing.store import TokenStore
from plumbing.writer import check_tokens
from pretrain import Vimpac

SMALL = ["--layers", 1, "--dim", 32, "--heads", 2, "--mlp-dim", 64, "--batch", 8, "--held-out", 4, "--save-every", 5,
         "--log-every", 5, "--knn-every", 20, "--micro-batch", 8, "--precision", "fp32"]


def start(*argv):
    return subprocess.Popen([sys.executable, str(ROOT / argv[0]), *map(str, argv[1:])], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finished(*argv):
    """Runs a script to its end -> seconds."""
    began, process = time.perf_counter(), start(*argv)
    said = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(said)
    return time.perf_counter() - began


def kill(argv, times, seconds, chance):
    """Starts a script and kills it, so many times, at random moments of the seconds that it takes; then lets it end."""
    for _ in progress(range(times), "kills", unit=" kills"):
        process = start(*argv)
        time.sleep(chance.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finished(*argv)


def same(one, two):
    """Whether two checkpoints' weights, or two stores' tokens and labels, are equal, bit for bit."""
    if Path(one).suffix == ".pt":
        a, b = (read_checkpoint(path) for path in (one, two))
        return a["step"] == b["step"] and all(torch.equal(a["model"][key], b["model"][key]) for key in b["model"])
    a, b = TokenStore(one), TokenStore(two)
    return len(a) == len(b) and all(a.name(i) == b.name(i) and np.array_equal(a.tokens(i), b.tokens(i))
                                    for i in range(len(b)))


def kills(chance):
    toy.make("datasets/toy", {"pretrain": 60, "train": 40, "val": 10, "test": 10})
    finished("pretrain.py", *SMALL, "--steps", 5, "--tokenizer-steps", 20, "--out", "runs/first")
    tokenize = ["vqvae.py", "tokenize", "--videos", "datasets/toy/videos", "--tokenizer", "datasets/toy/tokenizer.pt",
                "--frame-size", 64, "--fps", 8, "--workers", 1]
    jobs = {"pre-training": (["pretrain.py", *SMALL, "--steps", 120, "--resume"], 20, "runs/{}", "last.pt"),
            "fine-tuning": (["finetune.py", "--checkpoint", "runs/first/last.pt", "--steps", 120, "--save-every", 5,
                             "--clips", 1, "--micro-batch", 16, "--precision", "fp32", "--resume"], 10, "runs/{}",
                            "last.pt"),
            "tokenising": (tokenize, 10, "tokens/{}", "")}
    for name, (argv, times, place, file) in jobs.items():
        whole, broken = (place.format(f"{name}-{kind}") for kind in ("whole", "broken"))
        seconds = finished(*argv, "--out", whole)
        kill([*argv, "--out", broken], times, seconds, chance)
        equal = same(Path(broken) / file, Path(whole) / file)
        print(f"{name}, {times} kills: {'the same, bit for bit' if equal else 'NOT THE SAME'}", flush=True)


def corrupt(path, chance):
    """One of: bytes changed, a part zeroed, cut short, a part lost, a part twice."""
    content = bytearray(path.read_bytes())
    first = chance.randrange(max(1, len(content)))
    last = min(len(content), first + chance.choice((1, 8, 512)))
    match chance.randrange(5):
        case 0:
            for place in range(first, last):
                content[place] ^= chance.randrange(1, 256)
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
        found = read()
    except UserError as error:
        return "refused in one line" if len(str(error).splitlines()) == 1 else "REFUSED IN SEVERAL LINES"
    except Exception as error:  # noqa: BLE001 (whatever it is: that is what is counted)
        return f"TRACEBACK {type(error).__name__}: {error}"[:90]
    return "read as before" if found == expected else "READ OTHERWISE"


def count(name, place, read, chance, times):
    """Damages one of a folder's files at a time."""
    good, found = Path(tempfile.mkdtemp()) / "good", Counter()
    shutil.copytree(place, good)
    expected = read()
    for _ in progress(range(times), name, unit=" corruptions"):
        corrupt(chance.choice(sorted(path for path in Path(place).rglob("*") if path.is_file())), chance)
        signal.alarm(60)  # a hang ends this benchmark
        found[outcome(read, expected)] += 1
        signal.alarm(0)
        shutil.rmtree(place)
        shutil.copytree(good, place)
    print(f"{name}, {times}: " + ", ".join(f"{n} {what}" for what, n in found.most_common()), flush=True)


def corruptions(chance, times):
    toy.make("datasets/toy", {"pretrain": 60, "train": 40, "val": 10, "test": 10})
    finished("pretrain.py", *SMALL, "--steps", 5, "--tokenizer-steps", 20, "--out", "runs/first")
    Path("checkpoint").mkdir()
    shutil.copy("runs/first/last.pt", "checkpoint/last.pt")
    store, lists = Path("datasets/toy/tokens/train"), Path("lists")
    (lists / "ucfTrainTestlist").mkdir(parents=True)
    for i in range(1, 5):
        (lists / f"UCF-101/C{i}").mkdir(parents=True)
    (lists / "ucfTrainTestlist/classInd.txt").write_text("".join(f"{i} C{i}\n" for i in range(1, 5)))
    (lists / "ucfTrainTestlist/trainlist01.txt").write_text("".join(f"C{1 + i % 4}/v_{i}.avi {1 + i % 4}\n"
                                                                    for i in range(40)))
    for i in range(40):
        (lists / f"UCF-101/C{1 + i % 4}/v_{i}.avi").touch()

    def weights():
        return {key: value.tolist() for key, value in Vimpac.load("checkpoint/last.pt").state_dict().items()}

    def tokens():
        found = TokenStore(store)
        check_tokens(found)
        return [(found.name(i), found.tokens(i).tolist(), {name: int(found.labels(name)[i]) for name in
                 found.label_sets()}) for i in range(len(found))], found.header["classes"]

    def listed():
        found = list_videos("ucf101", lists, "train1")
        return all(isinstance(path, str) and 0 <= label < 4 for path, label in found)
    count("a checkpoint", "checkpoint", weights, chance, times)
    count("a token store", store, tokens, chance, times)
    count("UCF101's lists", lists / "ucfTrainTestlist", listed, chance, times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "corruptions"])
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--times", type=int, default=1000, help="corruptions of each (default: 1000)")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        kills(chance) if args.what == "kills" else corruptions(chance, args.times)


if __name__ == "__main__":
    main()
