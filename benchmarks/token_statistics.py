"""How alike neighbouring tokens are, in the toy world or in any other videos.

    python pretrain.py --steps 1 --out runs/first                        tokenises the toy world
    python pretrain.py --steps 1 --videos DIR --held-out 0 --out runs/videos        and a folder
    python benchmarks/token_statistics.py datasets/toy runs/videos

For each folder, which holds a tokenizer and its tokens: PSNR and perplexity of up to 50 videos, and
the share of all tokens that equal the token at the same place three frames later (at 8 frames a
second, as in the toy's clips on average), or the next one to the right.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import vqvae
from plumbing.cli import run
from plumbing.tokenizing import measure

STEP = 3  # frames


def statistics(folder):
    """-> PSNR in dB, perplexity, equal to the later token and to the right one in percent."""
    store = data.TokenStore(folder / "tokens/pretrain")
    tokenizer = vqvae.load_tokenizer(folder / "tokenizer.pt")
    view, header = store.center_view(), store.header
    resize, crop, flip = header["views"][view]
    some = data.spread(min(50, len(store)), len(store))
    frames = [data.read_frames(store.video_path(video), header["fps"], header["size"], crop, flip,
                               resize)[:64] for video in some]
    quality = measure(tokenizer, np.concatenate(frames))
    videos = [np.asarray(store.tokens(i, view)) for i in range(len(store))]  # (F, H, W) each
    later = np.concatenate([(x[STEP:] == x[:-STEP]).ravel() for x in videos])
    right = np.concatenate([(x[:, :, 1:] == x[:, :, :-1]).ravel() for x in videos])
    return quality["psnr"], quality["perplexity"], 100 * later.mean(), 100 * right.mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER",
                        help="holds tokenizer.pt and tokens/pretrain")
    folders = parser.parse_args().folders
    print("| | videos | PSNR, dB | perplexity | equal 3 frames later, % | equal to the right, % |")
    print("| --- | --- | --- | --- | --- | --- |")
    for folder in folders:
        count = len(data.TokenStore(folder / "tokens/pretrain"))
        cells = " | ".join(f"{value:.1f}" for value in statistics(folder))
        print(f"| {folder} | {count:,} | {cells} |")


if __name__ == "__main__":
    run(main)
