"""How fast videos become tokens and tokens become clips; prints the figures of benchmarks/RESULTS.md.

    python benchmarks/loading.py store --videos 1240000          a token store of HowTo100M's size
    python benchmarks/loading.py tokenize --videos DIR --tokenizer vqvae.pt --frame-size 128
"""
import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import vqvae
from plumbing.cli import progress
from plumbing.decoding import VideoError, decode_all, stream_views
from plumbing.tokenizing import frames_at_once, tokenize
from plumbing.writer import StoreWriter


def make_store(path, videos, frames=12):
    """A store of 16 x 16 tokens a frame; the tokens are one block, written for every video."""
    writer = StoreWriter(path, {"tokenizer": "-", "fingerprint": "-", "arithmetic": "float32", "vocab_size": 8192,
                                "fps": 2.0, "size": 128, "height": 16, "width": 16, "views": [[128, "center", False]],
                                "root": "/", "classes": None})
    tokens = np.random.default_rng(0).integers(8192, size=(1, frames, 16, 16))
    names = [f"{i % 1000:03d}/{i:011d}.mp4" for i in range(videos)]
    for name in progress(names, "writing", unit=" videos"):
        writer.add(name, tokens)
    writer.close()
    start = time.perf_counter()
    writer.finish([(name, {}, None, None) for name in names])
    print(f"{videos} videos: index written in {time.perf_counter() - start:.1f} s")


def measure_store(path, count=20000, batch=64):
    """Opens a store and draws clips, in this process alone -> seconds to open, MB held then, clips/s."""
    start = time.perf_counter()
    store = data.TokenStore(path)
    store.name(len(store) - 1)
    opened = time.perf_counter() - start
    memory = int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    batches = data.Batches(np.arange(len(store)), batch, count // batch)
    next(iter(batches))  # the first order of an epoch
    loader = DataLoader(data.ClipPairs(store, 5), batch_sampler=batches)
    start = time.perf_counter()
    clips = sum(2 * len(pairs) for pairs in loader)
    return opened, memory, clips / (time.perf_counter() - start)


def measure_tokenizing(folder, tokenizer_path, size, fps, repeat):
    """Decoding alone, encoding alone, and both overlapped by tokenizing.tokenize, on the same files."""
    videos = [path for path, _ in data.list_videos("folder", folder, "")] * repeat
    tokenizer, views = vqvae.load_tokenizer(tokenizer_path), data.views_for("pretrain", size)

    def read(path):
        return stream_views(path, fps, size, views)

    seconds, frames = {}, []
    start = time.perf_counter()
    for _, pieces in decode_all(videos, read):
        with contextlib.suppress(VideoError):
            frames += [piece[0] for piece, _ in pieces]
    seconds["decoding"] = time.perf_counter() - start
    frames = torch.from_numpy(np.concatenate(frames))
    start = time.perf_counter()
    for part in frames.split(frames_at_once(256, size)):
        tokenizer.encode(part)
    seconds["encoding"] = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as out:
        links = []
        for i, path in enumerate(videos):  # the same file several times needs several names
            links.append(Path(out) / "videos" / f"{i}{Path(path).suffix}")
            links[-1].parent.mkdir(exist_ok=True)
            links[-1].symlink_to(Path(path).resolve())
        start = time.perf_counter()
        tokenize(tokenizer, [(str(p), {}) for p in links], out, Path(out) / "store", fps, size, views, "-")
        seconds["both"] = time.perf_counter() - start
    slower = max(seconds["decoding"], seconds["encoding"])
    print(f"{len(videos)} files, {len(frames)} frames of {size} pixels: " +
          ", ".join(f"{name} {value:.1f} s ({len(frames) / value:.0f} frames/s)" for name, value in seconds.items()) +
          f"; both take {100 * (seconds['both'] / slower - 1):+.0f}% of the slower half")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    store = commands.add_parser("store")
    store.add_argument("--videos", type=int, default=1_240_000)
    measure = commands.add_parser("measure")
    measure.add_argument("--store", required=True)
    tokens = commands.add_parser("tokenize")
    tokens.add_argument("--videos", required=True)
    tokens.add_argument("--tokenizer", required=True)
    tokens.add_argument("--frame-size", type=int, default=128)
    tokens.add_argument("--fps", type=float, default=2.0)
    tokens.add_argument("--repeat", type=int, default=4, help="how many times each file is read")
    args = parser.parse_args()
    if args.command == "store":
        with tempfile.TemporaryDirectory() as folder:
            for count in (10_000, args.videos):
                make_store(f"{folder}/{count}", count)
                subprocess.run([sys.executable, __file__, "measure", "--store", f"{folder}/{count}"], check=True)
    elif args.command == "measure":  # in a process of its own, so that memory is what opening and drawing take
        opened, memory, rate = measure_store(args.store)
        print(f"{args.store}: opened in {1000 * opened:.1f} ms, the process then holds {memory:.0f} MB "
              f"(torch included); {rate:.0f} clips/s from one process")
    else:
        measure_tokenizing(args.videos, args.tokenizer, args.frame_size, args.fps, args.repeat)


if __name__ == "__main__":
    main()
