"""A list of videos -> a token store, made by one process or several.

Shapes: F frames of a video, f frames of a piece of it, S frame side in pixels, H = W = S/8.
"""
import contextlib
import functools
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from plumbing.cli import UserError, progress
from plumbing.decoding import RESAMPLING, map_videos, max_workers, printed, stream_views
from plumbing.files import try_folder, whole, write_text
from plumbing.processes import (
    broadcast,
    by_first,
    from_all,
    rank_and_world,
    say,
    wait_for_all,
)
from plumbing.store import PartWriter, TokenStore, pack_index, read_parts
from plumbing.tokens import PATCH


def frames_at_once(batch, size):
    """How many frames of S x S pixels to encode at once: `batch` of 128 x 128, fewer if larger."""
    return max(1, min(batch, batch * 128**2 // size**2))


def encode(tokenizer, frames, batch=256):
    """uint8 (views, f, S, S, 3) -> uint16 (views, f, H, W). batch: see `frames_at_once`."""
    parts = torch.from_numpy(frames).flatten(0, 1).split(frames_at_once(batch, frames.shape[2]))
    tokens = torch.cat([tokenizer.encode(part) for part in parts]).unflatten(0, frames.shape[:2])
    return tokens.cpu().numpy().astype(np.uint16)


def encode_video(tokenizer, pieces, batch=256):
    """Encodes the pieces of a video, see `decoding.stream_views`.

    Returns its tokens, uint16 (views, F, H, W), and a line about a damaged file, or None.
    """
    tokens = []
    for frames, damage in pieces:
        tokens.append(encode(tokenizer, frames, batch))
    return np.concatenate(tokens, axis=1), damage


def psnr(error):
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in -1..1."""
    return 10 * math.log10(4 / max(error, 1e-10))


@torch.no_grad()
def measure(tokenizer, frames, batch=256):
    """The quality of a tokenizer on uint8 frames (N, S, S, 3)
    -> {"error": mean squared, "psnr": dB, "perplexity": of the codes, "codes_used": share}."""
    errors, counts = 0.0, torch.zeros(tokenizer.vocab_size)
    for part in torch.from_numpy(frames).split(frames_at_once(batch, frames.shape[1])):
        tokens = tokenizer.encode(part)
        decoded = tokenizer.decode(tokens).cpu()
        errors += ((decoded.float() - part.float()) / 127.5).square().mean().item() * len(part)
        counts += torch.bincount(tokens.flatten().cpu(), minlength=len(counts))
    error, p = errors / len(frames), counts / counts.sum()
    return {"error": error, "psnr": psnr(error),
            "perplexity": torch.exp(-(p * p.clamp(min=1e-10).log()).sum()).item(),
            "codes_used": (p > 0).float().mean().item()}


# ---------------------------------------------------------------- a store


def tokenize(tokenizer, videos, root, out, fps, size, views, name, classes=None, spans=None,
             workers=None, batch=256):
    """Makes a token store of these videos with these labels -> whether anything was left to do.

    Tokens that the folder already has of unchanged files are kept. Called by all processes of a
    group; the first one's list counts. videos: [(path, {label set: class})]. root: the folder that
    names in the store are relative to. views: from `data.views_for`. name: what the store calls
    the tokenizer. spans: {path: (first, last)} from `frame_spans`.
    Files that cannot be decoded, or perhaps only in part, are printed and listed in out/errors.txt.
    Raises UserError if the folder has tokens of other settings or of another folder's videos, if no
    video can be decoded, or if the disk is full.
    """
    settings = {
        "tokenizer": name, "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size, "fps": fps, "size": size, "height": size // PATCH,
        "width": size // PATCH, "views": [list(view) for view in views],
        "resampling": RESAMPLING}
    plan = by_first(Plan, out, videos, os.path.abspath(root), settings, classes)
    todo = broadcast(plan and plan.todo)
    if todo is None:
        return False
    rank, world = rank_and_world()
    todo = {path: stamp for path, *stamp in todo[rank::world]}
    read = functools.partial(read_video, fps=fps, size=size, views=views, spans=spans or {})
    with contextlib.closing(PartWriter(out, settings, os.path.abspath(root))) as writer:
        errors = encode_videos(tokenizer, todo, read, writer, workers, batch)
    wait_for_all()  # until every process has written its last part
    errors = [line for lines in from_all(errors) for line in lines]
    by_first(lambda: plan.finish(errors))
    return True


def read_video(path, fps, size, views, spans):
    return stream_views(path, fps, size, views, spans.get(path))


def encode_videos(tokenizer, todo, read, writer, workers, batch):
    """Decodes and encodes videos in a few threads, and adds their tokens to a PartWriter.

    The threads divide the batch, and torch's threads for computing on a CPU.
    todo: {path: (name, size, mtime)}. read: path -> pieces.
    Returns a line for each file that cannot be decoded [str].
    """
    errors, frames, start = [], 0, time.perf_counter()
    workers = max(1, min(max_workers(workers), len(todo)))
    threads, batch = torch.get_num_threads(), max(1, batch // workers)
    results = map_videos(lambda pieces: encode_video(tokenizer, pieces, batch), read, todo, workers)
    show = rank_and_world()[0] == 0 and bool(todo)
    bar = progress(results, "tokenising", len(todo), " videos", show=show)
    torch.set_num_threads(max(1, threads // workers))
    try:
        for path, result, error in bar:
            if error:
                errors.append(error)
                continue
            tokens, damage = result
            writer.add(*todo[path], tokens, damage)
            frames += tokens.shape[0] * tokens.shape[1]
            rate = frames / (time.perf_counter() - start)
            bar.set_postfix_str(f"{rate:.0f} frames/s", refresh=False)
    finally:
        results.close()
        torch.set_num_threads(threads)
    return errors


class Plan:
    """What the first process knows: the videos asked for, and which of them have tokens.

    videos: [(path, {label set: class})]. Raises UserError as `tokenize` does.
    todo: [(path, name, size, mtime)] of the videos to tokenise; None if the store is finished.
    """

    def __init__(self, out, videos, root, settings, classes):
        self.out, self.settings = Path(out), settings
        self.header = {**settings, "root": root, "classes": classes}
        self.files = [(path, os.path.relpath(path, root), *stamp(path)) for path, _ in videos]
        self.labels = [labels for _, labels in videos]
        done = self.find_done()
        self.kept = len(done) - done.count(None)
        self.earlier = earlier_names(out)
        todo = {file[0]: file for file, video in zip(self.files, done) if video is None}
        self.todo = list(todo.values())
        if not todo and self.earlier and self.pack(done) == (self.out / "index.npz").read_bytes():
            self.todo = None
        else:
            try_folder(out)

    def find_done(self):
        """The tokens of each file as it is now -> [Video or None].

        After the folder of the videos has moved, files may have new dates.
        """
        root, done = self.header["root"], []
        videos = read_parts(self.out, self.settings)
        for _, name, size, mtime in self.files:
            same = [video for video in videos.get(name, ()) if video.size == size and (
                video.mtime == mtime or video.root != root)]
            done.append(same[-1] if same else None)
        roots = {video.root for parts in videos.values() for video in parts}
        if roots and root not in roots and not any(done):
            raise UserError(f"{self.out} holds the videos of {min(roots)}, not those of {root}: "
                            f"choose another folder (--data or --out) or delete it")
        return done

    def pack(self, done):
        videos = [video for video in done if video]
        labels = [labels for video, labels in zip(done, self.labels) if video]
        return pack_index(self.out, self.header, videos, labels)

    def finish(self, errors):
        """Writes the index and errors.txt, and prints what the store holds. Raises UserError if
        the store is empty. errors: what cannot be decoded [str]."""
        done = self.find_done()
        count = len(done) - done.count(None)
        damaged = [video.damage for video in done if video and video.damage]
        for line in errors:
            say(f"skipped {line}")
        for line in damaged:
            say(f"damaged {line}")
        write_text(self.out / "errors.txt", "".join(f"{line}\n" for line in errors + damaged))
        if not count:
            raise UserError(f"{self.out}: none of the {len(done)} videos could be decoded, "
                            f"see errors.txt in it")
        with whole(self.out / "index.npz") as file:
            file.write(self.pack(done))
        text = f"{printed(self.out)}: {count} videos tokenised, {len(errors)} could not be decoded"
        if damaged:
            text += f", {len(damaged)} perhaps in part"
        if self.earlier is not None:
            gone = len(self.earlier - {os.fsencode(name) for _, name, *_ in self.files})
            text += (f" ({self.kept} kept, {count - self.kept} new, {gone} no longer listed)")
        say(text)


def stamp(path):
    """What distinguishes a file from one that replaces it -> its bytes, its last change in ns.

    (-1, -1) if there is no such file.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def earlier_names(path):
    """The names of the videos of a finished store -> {bytes}, or None if there is none."""
    try:
        return TokenStore(path).names()
    except UserError:
        return None
