"""A list of videos -> a token store: decoding, encoding and writing side by side, by one process or many.

Shapes: F frames of a video, S frame side in pixels.
"""
import hashlib
import os
import time

import numpy as np
import torch

from plumbing.cli import progress
from plumbing.decoding import VideoError, decode_all, stream_views
from plumbing.processes import from_all, rank_and_world, say, share, wait_for_all
from plumbing.store import StoreWriter, write_text


def fingerprint(tokenizer):
    """Twelve hexadecimal digits that change with any weight -> str."""
    digest = hashlib.sha256()
    for key, value in sorted(tokenizer.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def frames_at_once(batch, size):
    """How many frames of `size` x `size` pixels to encode at once: `batch` of up to 128 x 128, fewer of larger ones."""
    return max(1, min(batch, batch * 128 ** 2 // size ** 2))


def encode(tokenizer, frames, at_once):
    """uint8 (views, f, S, S, 3) -> tokens, uint16 (views, f, H, W)."""
    parts = torch.from_numpy(frames).flatten(0, 1).split(at_once)
    tokens = torch.cat([tokenizer.encode(part) for part in parts]).cpu().numpy()  # (views * f, H, W)
    return tokens.astype(np.uint16).reshape(*frames.shape[:2], *tokens.shape[1:])


def tokenize(tokenizer, videos, root, out, fps, size, views, name, classes=None, spans=None, workers=None, batch=256):
    """Decodes and tokenises videos into a token store; what an earlier call wrote already is kept.

    videos: [(path, {label set: class})]. root: what names in the store are relative to. views: from `data.views_for`.
    name: what the store's header calls the tokenizer. spans: {path: (first, last)} from `frame_spans`.
    Files that cannot be decoded, or perhaps only in part, are listed in out/errors.txt, and said.
    """
    rank, world = rank_and_world()
    root, at_once = os.path.abspath(root), frames_at_once(batch, size)
    writer = StoreWriter(out, {
        "tokenizer": name, "fingerprint": fingerprint(tokenizer), "arithmetic": tokenizer.arithmetic,
        "vocab_size": tokenizer.vocab_size, "fps": fps, "size": size, "height": size // 8, "width": size // 8,
        "views": views, "root": root, "classes": classes}, rank)
    listed = [(path, number, os.path.relpath(path, root), labels) for number, (path, labels) in enumerate(videos)]
    todo = {path: rest for path, *rest in share(listed, rank, world) if rest[1] not in writer.done}
    decoded = decode_all(todo, lambda path: stream_views(path, fps, size, views, (spans or {}).get(path)), workers)
    errors, start, done = [], time.perf_counter(), 0
    bar = progress(decoded, "tokenising", len(todo), " videos", show=rank == 0)
    for path, pieces in bar:
        parts, number, relative, labels = [], *todo[path]
        try:
            for frames, damage in pieces:  # (views, f, S, S, 3)
                parts.append(encode(tokenizer, frames, at_once))
        except VideoError as error:
            errors.append(str(error))
            continue
        tokens = np.concatenate(parts, axis=1)  # (views, F, H, W)
        writer.add(number, relative, tokens, labels, damage)
        done += tokens.shape[0] * tokens.shape[1]
        bar.set_postfix_str(f"{done / (time.perf_counter() - start):.0f} frames/s", refresh=False)
    finish_store(writer, errors, len(videos))


def finish_store(writer, errors, videos):
    """Called by all processes, each with its own errors, when all their tokens are written."""
    writer.close()
    errors = [line for part in from_all(errors) for line in part]  # when all have closed theirs
    if writer.rank == 0:
        damaged = writer.finish()
        write_text(writer.path / "errors.txt", "".join(f"{line}\n" for line in errors + damaged))
        for line in [f"skipped {line}" for line in errors] + [f"damaged {line}" for line in damaged]:
            say(line)
        say(f"{writer.path}: {videos - len(errors)} videos tokenised, {len(errors)} could not be decoded"
            + (f", {len(damaged)} perhaps in part" if damaged else ""))
    wait_for_all()
