"""A list of videos -> a token store: decoding, encoding and writing side by side, by one process or many.

Shapes: F frames of a video, S frame side in pixels.
"""
import contextlib
import hashlib
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from plumbing.cli import progress
from plumbing.decoding import VideoError, decode_all, most_at_once, printed, stream_views
from plumbing.files import locked, write_text
from plumbing.processes import by_first, from_all, rank_and_world, say, share, wait_for_all
from plumbing.store import check_header, read_header
from plumbing.writer import (
    StoreWriter,
    check_root,
    contents,
    full_header,
    is_finished,
    made_of,
    read_journals,
    stamp,
    write_header,
)


def fingerprint(tokenizer, part=None):
    """Twelve hexadecimal digits that change with any weight -> str. part: of which weights alone, such as "encoder.";
    by itself those that the tokenizer says, as a decoder in a file of its own may be missing."""
    digest = hashlib.sha256()
    for key, value in sorted(tokenizer.state_dict().items()):
        if key.startswith(tokenizer.fingerprinted if part is None else part):
            digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def frames_at_once(batch, size):
    """How many frames of `size` x `size` pixels to encode at once: `batch` of up to 128 x 128, fewer of larger ones."""
    return max(1, min(batch, batch * 128 ** 2 // size ** 2))


def encode(tokenizer, frames, batch=256):
    """All views of one video, uint8 (views, F, S, S, 3) -> int64 (views, F, H, W). batch: see `frames_at_once`."""
    parts = torch.from_numpy(frames).flatten(0, 1).split(frames_at_once(batch, frames.shape[2]))
    return torch.cat([tokenizer.encode(part) for part in parts]).unflatten(0, frames.shape[:2]).cpu().numpy()


def encoded(tokenizer, pieces, batch=256):
    """The pieces of one video, of `decoding.stream_views` -> its tokens, as they come: uint16 (views, f, H, W), what is
    wrong with the file or None."""
    for frames, damage in pieces:  # (views, f, S, S, 3)
        yield encode(tokenizer, frames, batch).astype(np.uint16), damage


def joined(pieces):
    """What `encoded` gives -> uint16 (views, F, H, W), what is wrong with the file or None."""
    tokens, damage = zip(*pieces)
    return np.concatenate(tokens, axis=1), damage[-1]


def encode_all(tokenizer, videos, read, workers, batch):
    """Decodes and encodes videos (paths), several at a time, in order -> yields (path, what `encoded` gives of it).

    read: path -> what `stream_views` gives. On a GPU one thread encodes for all. On a CPU each thread that waits for an
    ffmpeg also encodes what that gives, with its share of cores and batch, so that no core is idle, or waits for
    another, whichever of the two takes longer.
    """
    if next(tokenizer.parameters()).device.type != "cpu":
        for path, pieces in decode_all(videos, read, workers):
            yield path, encoded(tokenizer, pieces, batch)
        return
    at_once, threads = max(1, min(most_at_once(workers), len(videos))), torch.get_num_threads()
    torch.set_num_threads(max(1, threads // at_once))
    try:
        yield from decode_all(videos, lambda path: encoded(tokenizer, read(path), max(1, batch // at_once)), workers)
    finally:
        torch.set_num_threads(threads)


def psnr(error):
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in -1..1."""
    return 10 * math.log10(4 / max(error, 1e-10))


@torch.no_grad()
def measure(tokenizer, frames, batch=256):
    """How good a tokenizer is on uint8 frames (N, S, S, 3) -> dict of error, psnr (dB), perplexity, codes_used."""
    errors, counts = 0.0, torch.zeros(tokenizer.vocab_size)
    for part in torch.from_numpy(frames).split(frames_at_once(batch, frames.shape[1])):
        tokens = tokenizer.encode(part)
        decoded = tokenizer.decode(tokens).cpu()
        errors += ((decoded.float() - part.float()) / 127.5).square().mean().item() * len(part)
        counts += torch.bincount(tokens.flatten().cpu(), minlength=len(counts))
    error, p = errors / len(frames), counts / counts.sum()
    perplexity = torch.exp(-(p * p.clamp(min=1e-10).log()).sum()).item()
    return {"error": error, "psnr": psnr(error), "perplexity": perplexity, "codes_used": (p > 0).float().mean().item()}


def tokenize(tokenizer, videos, root, out, fps, size, views, name, classes=None, spans=None, workers=None, batch=256):
    """Decodes and tokenises videos into a token store, which then holds these videos with these labels; what an earlier
    call made of them is kept -> whether anything was left to do.

    videos: [(path, {label set: class})]. root: what names in the store are relative to. views: from `data.views_for`.
    name: what the store's header calls the tokenizer. spans: {path: (first, last)} from `frame_spans`.
    Files that cannot be decoded, or perhaps only in part, are listed in out/errors.txt, and said. Raises UserError
    where another program writes there, where the store is of another kind or of other videos, and where no video could
    be decoded.
    """
    rank, world = rank_and_world()
    root = os.path.abspath(root)
    header = full_header({
        "tokenizer": name, "fingerprint": fingerprint(tokenizer), "arithmetic": tokenizer.arithmetic,
        "vocab_size": tokenizer.vocab_size, "fps": fps, "size": size, "height": size // 8, "width": size // 8,
        "views": views, "root": root, "classes": classes})
    listed = [(os.path.relpath(path, root), labels, *stamp(path)) for path, labels in videos]
    made = read_journals(out, header)
    own = share([(path, relative, place) for (path, _), (relative, _, *place) in zip(videos, listed)], rank, world)
    todo = {path: (relative, *place) for path, relative, place in own if not made_of(made, relative, *place, root)}
    if not any(from_all(bool(todo) or (rank == 0 and not is_finished(out, contents(header, listed, made)[0])))):
        return False
    with contextlib.ExitStack() as held:
        by_first(held.enter_context, locked(out))
        before = by_first(earlier, out, header, listed, made, fingerprint(tokenizer, ""))
        writer = StoreWriter(out, header, rank)
        found = encode_all(tokenizer, todo, lambda path: stream_views(path, fps, size, views, (spans or {}).get(path)),
                           workers, batch)
        held.callback(found.close)
        errors, start, done = [], time.perf_counter(), 0
        bar = progress(found, "tokenising", len(todo), " videos", show=rank == 0 and bool(todo))
        for path, pieces in bar:
            try:
                tokens, damage = joined(pieces)  # (views, F, H, W)
            except VideoError as error:
                errors.append(str(error))
                continue
            relative, *place = todo[path]
            writer.add(relative, tokens, *place, damage)
            done += tokens.shape[0] * tokens.shape[1]
            bar.set_postfix_str(f"{done / (time.perf_counter() - start):.0f} frames/s", refresh=False)
        finish_store(writer, errors, listed, before)
    return True


def earlier(out, header, listed, made, old_fingerprint):
    """What a finished store that is about to change has of the listed videos -> how many it need not make, how many of
    its videos are no longer listed; None where none is. Raises UserError where a store of another kind or of the videos
    of another folder stands there. old_fingerprint: of all weights, as it was once taken of DALL-E's decoder too."""
    out = Path(out)
    if (out / "header.json").is_file():
        found = read_header(out, compared=True)
        if found.get("fingerprint") == old_fingerprint != header["fingerprint"]:
            found["fingerprint"] = header["fingerprint"]
            write_header(out, found)
        check_header(out, found, header)
        check_root(out, found, header, listed, made)
    if not all((out / name).is_file() for name in ("index.npy", "names.txt")):
        return None
    before = set((out / "names.txt").read_bytes().split(b"\n")[:-1])
    kept = sum(made_of(made, name, *place, header["root"]) is not None for name, _, *place in listed)
    return kept, len(before - {os.fsencode(name) for name, *_ in listed})


def finish_store(writer, errors, listed, before):
    """Called by all processes, each with its own errors, when all their tokens are written. before: see `earlier`."""
    writer.close()
    wait_for_all()  # until all have closed theirs
    by_first(conclude, writer, [line for part in from_all(errors) for line in part], listed, before)


def conclude(writer, errors, listed, before):
    """The index, errors.txt and what is said, by the first process."""
    place = writer.path / "errors.txt"
    for line in errors:
        say(f"skipped {line}")
    write_text(place, "".join(f"{line}\n" for line in errors))  # also where nothing else could be decoded
    videos, damaged = writer.finish(listed)
    for line in damaged:
        say(f"damaged {line}")
    write_text(place, "".join(f"{line}\n" for line in errors + damaged))
    partly = f", {len(damaged)} perhaps in part" if damaged else ""
    changes = "" if before is None else (f" ({before[0]} kept, {videos - before[0]} new, "
                                         f"{before[1]} no longer listed)")
    say(f"{printed(writer.path)}: {videos} videos tokenised, {len(errors)} could not be decoded{partly}{changes}")
