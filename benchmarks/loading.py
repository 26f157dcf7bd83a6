"""How fast videos become tokens and tokens become clips: the figures of benchmarks/performance.md.

    python benchmarks/loading.py store --videos 1240000          a store of HowTo100M's size
    python benchmarks/loading.py tokenize --videos DIR --tokenizer vqvae.pt --frame-size 128
"""
import argparse
import json
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
from plumbing.decoding import map_videos, stream_views
from plumbing.files import whole, write_text
from plumbing.store import NPY_HEADER, PART_BYTES, Video, checksum, pack_index, read_parts
from plumbing.tokenizing import frames_at_once, tokenize

SETTINGS = {"tokenizer": "-", "fingerprint": "-", "vocab_size": 8192, "fps": 2.0, "size": 128,
            "height": 16, "width": 16, "views": [[128, "center", False]], "resampling": "-"}
FRAMES = 12  # of each video of the large store


def make_store(path, count):
    """A store of 16 x 16 tokens a frame. Its files are sparse, as their content does not matter."""
    path.mkdir()
    names = [f"{i % 1000:03d}/{i:011d}.mp4" for i in range(count)]
    tokens = FRAMES * SETTINGS["height"] * SETTINGS["width"]
    in_part = PART_BYTES // (2 * tokens)  # videos
    for number, first in enumerate(range(0, count, in_part)):
        write_part(path / f"part-{number:04d}.npy", names[first:first + in_part], tokens)
    start = time.perf_counter()
    parts = read_parts(path, SETTINGS)
    header = {**SETTINGS, "root": "/", "classes": None}
    with whole(path / "index.npz") as file:
        file.write(pack_index(path, header, [parts[name][0] for name in names], [{}] * count))
    print(f"{count} videos: index written in {time.perf_counter() - start:.1f} s")


def write_part(path, names, tokens):
    """tokens: how many each video has."""
    size = NPY_HEADER + 2 * tokens * len(names)
    with open(path, "wb") as file:
        file.truncate(size)
    videos = [Video(name, FRAMES, 0, 0, tokens * i, None)._asdict() for i, name in enumerate(names)]
    for fields in videos:
        del fields["part"], fields["root"]
    content = {"settings": SETTINGS, "root": "/", "videos": videos, "bytes": size, "crc32": 0}
    content["checksum"] = checksum(content)
    write_text(path.with_suffix(".json"), json.dumps(content))


def measure_store(path, count=20000, batch=64):
    """Opens a store and draws clips in this process alone -> seconds to open, MB then, clips/s."""
    start = time.perf_counter()
    store = data.TokenStore(path)
    opened = time.perf_counter() - start
    store.name(len(store) - 1)
    memory = int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    batches = data.Batches(np.arange(len(store)), batch, count // batch)
    next(iter(batches))  # the first order of an epoch
    loader = DataLoader(data.ClipPairs(store, 5), batch_sampler=batches)
    start = time.perf_counter()
    clips = sum(2 * len(pairs) for pairs in loader)
    return opened, memory, clips / (time.perf_counter() - start)


def all_frames(pieces):
    return np.concatenate([frames[0] for frames, _ in pieces])


def measure_tokenizing(folder, tokenizer_path, size, fps, repeat):
    """Decoding alone, encoding alone, and both by tokenizing.tokenize, of the same files."""
    videos = [path for path, _ in data.list_videos("folder", folder, "")] * repeat
    tokenizer, views = vqvae.load_tokenizer(tokenizer_path), data.views_for("pretrain", size)
    seconds, start = {}, time.perf_counter()
    results = map_videos(all_frames, lambda path: stream_views(path, fps, size, views), videos)
    frames = torch.from_numpy(np.concatenate([frames for _, frames, error in results
                                              if not error]))
    seconds["decoding"] = time.perf_counter() - start
    start = time.perf_counter()
    for part in frames.split(frames_at_once(256, size)):
        tokenizer.encode(part)
    seconds["encoding"] = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as out:
        links = []
        for i, path in enumerate(videos):  # a file that is read several times needs several names
            links.append(Path(out) / "videos" / f"{i}{Path(path).suffix}")
            links[-1].parent.mkdir(exist_ok=True)
            links[-1].symlink_to(Path(path).resolve())
        start = time.perf_counter()
        tokenize(tokenizer, [(str(link), {}) for link in links], out, Path(out) / "store", fps,
                 size, views, "-")
        seconds["both"] = time.perf_counter() - start
    slower = max(seconds["decoding"], seconds["encoding"])
    figures = ", ".join(f"{name} {value:.1f} s ({len(frames) / value:.0f} frames/s)"
                        for name, value in seconds.items())
    print(f"{len(videos)} files, {len(frames)} frames of {size} pixels: {figures}; "
          f"both take {100 * (seconds['both'] / slower - 1):+.0f}% of the slower half")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
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
                path = Path(folder) / str(count)
                make_store(path, count)
                subprocess.run([sys.executable, __file__, "measure", "--store", path], check=True)
    elif args.command == "measure":  # a new process, as the memory is that of opening alone
        opened, memory, rate = measure_store(args.store)
        print(f"{args.store}: opened in {1000 * opened:.1f} ms, the process then holds "
              f"{memory:.0f} MB (torch included); {rate:.0f} clips/s from one process")
    else:
        measure_tokenizing(args.videos, args.tokenizer, args.frame_size, args.fps, args.repeat)


if __name__ == "__main__":
    main()
