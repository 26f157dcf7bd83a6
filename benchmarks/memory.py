"""How much memory pre-training takes, and how many videos fit on which card.

    python benchmarks/memory.py                  small, base and large, at several clip sizes
    python benchmarks/memory.py --presets small --clips 5x128

The forward and backward passes of a micro-batch of one video and of two, with twice the usual
number of hidden tokens, as when pretrain.py looks for --micro-batch 0. Their difference is what a
video takes; the rest is fixed: weights, gradients and temporary tensors.

On a GPU the passes are measured, in bfloat16. Without one they are counted: torch's fake tensors
have a size and a lifetime, but no values. The last table tells how good the count is: the same
count in float32, with the kernels of CPUs, beside what this machine's CPU takes (with the glibc
settings of throughput.py).

The tables of cards add CUDA's own memory, Adam's moments, the buckets of DistributedDataParallel
and a tenth of the card to spare.
"""
import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from throughput import MALLOC, peak_memory, settings

import pretrain
from contrastive import at_least_float32
from plumbing import kernels
from plumbing.cli import progress

CARDS = (16, 24, 40, 80, 141)  # GB
BATCH = 1024  # videos a step
CUDA = 0.6e9  # bytes that CUDA itself takes
USABLE = 0.9  # of a card: freed memory is never reused completely
VOCAB_SIZE = 8192

# ---------------------------------------------------------------- one micro-batch


def build(config, shape, activation_checkpointing):
    """A model that has gradients, as after the first micro-batch of a step."""
    model = pretrain.Vimpac(shape, config.projection_hidden, config.projection_layers).train()
    model.backbone.activation_checkpointing = activation_checkpointing
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def encode(model, videos, hidden):
    """Vimpac.encode and its loss, but for what depends on values, which fake tensors lack.

    hidden: positions of hidden tokens, int64 (M,).
    """
    backbone = model.backbone
    grid = backbone.config.frames, backbone.config.height, backbone.config.width
    x = backbone.embed(torch.zeros(2 * videos, *grid, dtype=torch.long))
    for layer in backbone.layers:
        if backbone.activation_checkpointing:
            x = kernels.activation_checkpoint(layer, x, None, grid)
        else:
            x = layer(x, None, grid)
    cls, features = kernels.split_first(x, dim=1)
    logits = model.predict_tokens(features.unflatten(1, grid), hidden)
    return F.cross_entropy(at_least_float32(logits), hidden, reduction="sum") + cls.sum()


TWO_PRODUCTS = kernels.attention


def gpu_attention(q, k, v, ignore, p):
    """kernels.attention as a GPU computes it, for fake tensors of a CPU.

    A GPU's fused kernel keeps no dropped probabilities; a CPU's does.
    """
    if q.shape[-2] <= kernels.SHORT:
        return TWO_PRODUCTS(q, k, v, ignore, p)
    return kernels.fused_attention(q, k, v, ignore, 0.0)


def count(preset, clip, videos, activation_checkpointing, on_gpu=True):
    """Bytes at the peak of both passes of a micro-batch, counted -> int.

    on_gpu: in bfloat16 with a GPU's kernels; otherwise in float32 with a CPU's.
    """
    config, shape = settings(preset, clip, VOCAB_SIZE)
    tokens = 2 * videos * shape.frames * shape.height * shape.width
    attention = gpu_attention if on_gpu else kernels.attention
    with FakeTensorMode(), mock.patch.object(kernels, "attention", attention):
        model = build(config, shape, activation_checkpointing)
        hidden = torch.zeros(int(2 * config.mask_ratio * tokens), dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=on_gpu):
                loss = encode(model, videos, hidden)
            loss.backward()
        return next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]


def measure(preset, clip, activation_checkpointing):
    """Bytes at the peak of both passes with one video and with two, measured -> [int, int]."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bf16" if device.type == "cuda" else "fp32"
    config, shape = settings(preset, clip, VOCAB_SIZE, precision=precision)
    model = build(config, shape, activation_checkpointing).to(device)
    peaks = []
    for videos in (1, 2):
        reset_peak_memory(device)
        pretrain.try_out(config, model, device, videos)
        peaks.append(peak_memory(device))
    return peaks


def reset_peak_memory(device):
    """Lets the peak start anew from what is in use, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def available_memory():
    """Bytes of this machine that no process needs -> int."""
    return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])


def in_own_process(*job):
    """The result of a job ("count" or "measure", its arguments), or None where it failed."""
    done = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], check=False,
                          capture_output=True, text=True, env={**MALLOC, **os.environ})
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


# ---------------------------------------------------------------- cards


def largest_micro_batch(peaks, parameters, card, most):
    """How many videos a card of `card` GB passes at a time -> int: a power of two, or `most`, or 0.

    peaks: bytes of one video and of two, with weights and gradients.
    """
    one, two = peaks
    later = 3 * 4 * parameters + CUDA  # Adam's moments, DistributedDataParallel's buckets
    largest, videos = 0, 1
    while largest < most and one + (videos - 1) * (two - one) + later < USABLE * card * 1e9:
        largest, videos = videos, min(2 * videos, most)
    return largest


def cell(micro_batch, group, cards, activation_checkpointing):
    """A cell of a table: videos at a time, passes a step, extra cost.

    group: videos of a group on this card. Forward and backward pass are three forward passes.
    Micro-batches smaller than a group cost one more, activation checkpointing another one.
    """
    if not micro_batch:
        return None
    passes = BATCH // cards // micro_batch
    more = (micro_batch < group) + activation_checkpointing
    cost = f" +{100 * more // 3}%" if more else ""
    return f"{micro_batch} x {passes}{cost}" + " checkpointed" * activation_checkpointing


def cards_line(preset, clip, peaks, cards):
    """A line of a table of cards. peaks: those of `largest_micro_batch`, without and with
    activation checkpointing, which is shown where nothing fits without it."""
    config, shape = settings(preset, clip, VOCAB_SIZE)
    with torch.device("meta"):
        model = pretrain.Vimpac(shape, config.projection_hidden, config.projection_layers)
    parameters = sum(p.numel() for p in model.parameters())
    contrast = 128 if clip.endswith("256") else config.contrast or BATCH
    group, cells = contrast // cards, []
    for card in CARDS:
        plain, checkpointed = (
            cell(largest_micro_batch(pair, parameters, card, group), group, cards, checkpointing)
            for pair, checkpointing in zip(peaks, (False, True)))
        cells.append(plain or checkpointed or "-")
    return f"| {preset} | {clip} | {contrast} | {' | '.join(cells)} |"


# ---------------------------------------------------------------- the tables


def peaks_of_models(jobs, on_gpu):
    """{(preset, clip, activation checkpointing): bytes of one video and of two}."""
    peaks = {}
    for job in progress(jobs, "models", len(jobs), " models"):
        preset, clip, checkpointing = job
        if on_gpu:
            peaks[job] = in_own_process("measure", *job)
        else:
            peaks[job] = [in_own_process("count", preset, clip, videos, checkpointing)
                          for videos in (1, 2)]
    return peaks


def print_cards(models, peaks, cards):
    print(f"\nA batch of {BATCH} on {cards} card{'s' * (cards > 1)}: videos at a time x passes a "
          f"step, extra cost\n")
    print(f"| preset | T x S | n | {' | '.join(f'{card} GB' for card in CARDS)} |")
    print("| --- " * (3 + len(CARDS)) + "|")
    for model in models:
        print(cards_line(*model, [peaks[*model, False], peaks[*model, True]], cards))


def print_check(peaks):
    """How good the count is, for models that need at most a fifth of this machine's memory."""
    print("\nGB a video in float32 on this CPU\n")
    print("| preset | T x S | | counted | measured |\n" + "| --- " * 5 + "|")
    for (preset, clip, checkpointing), (_, two) in peaks.items():
        if two > 0.2 * available_memory():
            continue
        counted = [in_own_process("count", preset, clip, videos, checkpointing, False)
                   for videos in (1, 2)]
        measured = in_own_process("measure", preset, clip, checkpointing)
        numbers = " | ".join(f"{(two - one) / 1e9:.2f}" for one, two in (counted, measured))
        print(f"| {preset} | {clip} | {'checkpointed' * checkpointing} | {numbers} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["small", "base", "large"],
                        choices=list(pretrain.PRESETS))
    parser.add_argument("--clips", nargs="+", default=["5x128", "5x256", "10x256"],
                        help="clip sizes, T x S")
    parser.add_argument("--no-check", action="store_true",
                        help="leave out what this machine's CPU takes")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        name, *values = json.loads(args.job)
        return print(json.dumps({"measure": measure, "count": count}[name](*values)))

    on_gpu = torch.cuda.is_available()
    models = list(itertools.product(args.presets, args.clips))
    peaks = peaks_of_models([(*model, checkpointing) for model in models
                             for checkpointing in (False, True)], on_gpu)
    how = f"measured on {torch.cuda.get_device_name()}" if on_gpu else "counted"
    print(f"GB a video, bfloat16, {how}\n")
    print("| preset | T x S | a video | fixed | checkpointed: a video | fixed |")
    print("| --- " * 6 + "|")
    for model in models:
        pairs = peaks[*model, False], peaks[*model, True]
        numbers = [number for one, two in pairs for number in (two - one, 2 * one - two)]
        print(f"| {' | '.join([*model, *(f'{number / 1e9:.2f}' for number in numbers)])} |")
    for cards in (1, 8):
        print_cards(models, peaks, cards)
    if not on_gpu and not args.no_check:
        print_check(peaks)


if __name__ == "__main__":
    main()
