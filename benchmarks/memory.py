"""How much memory pre-training takes, and so what runs on which card.

    python benchmarks/memory.py                        small, base and large at several clip sizes: half an hour
    python benchmarks/memory.py --presets small --clips 5x128

Forward and backward with one and with two videos at a time, with twice the usual masks, as when pretrain.py looks for
its --micro-batch: the difference is what a video takes, the rest is fixed. On a GPU it is measured, in bfloat16. Else
it is counted: every tensor that the step makes on a GPU, with its size and its life, but no number in it (torch's fake
tensors). How good the count is, the same count in float32 shows, with the kernels of CPUs, beside what this machine
then takes. The cards' tables add Adam's moments, DistributedDataParallel's buckets and a tenth to spare (`fitting`).
"""
import argparse
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pretrain
import transformer
from plumbing import fitting, kernels
from plumbing.cli import progress

CARDS = (16, 24, 40, 80, 141)  # GB
CONTEXT = 0.6e9  # bytes that CUDA itself takes


def settings(preset, clip, recompute=False):
    """-> pretrain.Config, its TransformerConfig."""
    frames, size = (int(n) for n in clip.split("x"))
    config = pretrain.Config(**{"preset": preset, **pretrain.PRESETS[preset], "frames": frames, "recompute": recompute})
    return config, config.transformer(8192, size // 8, size // 8)


def build(config, shape):
    model = pretrain.Vimpac(shape, config.projection_hidden, config.projection_layers).train()
    model.backbone.recompute = config.recompute
    return model


def count(preset, clip, videos, recompute, on_gpu=True):
    """Bytes at the peak of a forward and backward pass, counted: in bfloat16 with a GPU's kernels, else in float32."""
    config, shape = settings(preset, clip, recompute)
    grid, masked = (shape.frames, shape.height, shape.width), int(2 * config.mask_ratio * 2 * videos *
                                                                  shape.frames * shape.height * shape.width)

    def attention(q, k, v, ignore, p):  # dropout of the probabilities takes no memory in a GPU's kernel, but in a CPU's
        return kernels.fused_attention(q, k, v, None, 0.0)
    with FakeTensorMode(), mock.patch.object(transformer, "attention", attention if on_gpu else kernels.attention):
        model, places = build(config, shape), torch.zeros(masked, dtype=torch.long)
        backbone, tracker = model.backbone, MemTracker()
        tracker.track_external(model)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=on_gpu):  # Vimpac.forward, but for its checks of values
                x = backbone.embed(torch.zeros(2 * videos, *grid, dtype=torch.long))
                for layer in backbone.layers:
                    x = kernels.again_in_backward(layer, x, None, grid) if recompute else layer(x, None, grid)
                logits = model.token_head(x[:, 1:].flatten(0, 1)[places], backbone.embedding.weight)
                loss = F.cross_entropy(logits.float(), places, reduction="sum") + 0 * x[:, 0].sum()
            loss.backward()
        return next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]


def measure(preset, clip, recompute):
    """Bytes at the peak of a real pass with one and with two videos, in a process of its own -> [int, int]."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, shape = settings(preset, clip, recompute)
    model = build(config, shape).to(device)
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    attempt = functools.partial(pretrain.try_out, model, config, precision)
    return [fitting.peak_memory(attempt, videos, device) for videos in (1, 2)]


def in_own_process(*job):
    done = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], check=False, capture_output=True,
                          text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def fits(one, two, parameters, card, cards, contrast):
    """What of a batch of 1024 a card takes at a time, from the bytes of one and two videos -> videos, passes, whether a
    group of `contrast` takes two; or None where not one video fits."""
    own, later = 1024 // cards, 4 * parameters * (3 if cards > 1 else 2) + CONTEXT
    most = max((videos for videos in (2 ** i for i in range(own.bit_length()))
                if one + (videos - 1) * (two - one) < fitting.MARGIN * card * 1e9 - later), default=0)
    return (most, own // most, most * cards < contrast) if most else None


def cell(found, recompute):
    """A cell of the table: videos at a time, passes a step and, of one that costs more than a forward and a backward
    pass, how much: a forward pass, a third of both, for the second pass of gradient caching, another to recompute."""
    if not found:
        return None
    videos, passes, twice = found
    cost = (f"+{100 * (twice + recompute) // 3}%" + " recomputed" * recompute) if twice or recompute else ""
    return f"{videos} x {passes} {cost}".strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["small", "base", "large"], choices=list(pretrain.PRESETS))
    parser.add_argument("--clips", nargs="+", default=["5x128", "5x256", "10x256"], help="clip sizes, T x S")
    parser.add_argument("--no-check", action="store_true", help="leave out what this machine's CPU takes")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        name, *values = json.loads(args.job)
        return print(json.dumps({"measure": measure, "count": count}[name](*values)))

    gpu, rows = torch.cuda.is_available(), {}
    jobs = list(itertools.product(args.presets, args.clips, (False, True)))
    for preset, clip, recompute in progress(jobs, "models", len(jobs), " models"):
        rows[preset, clip, recompute] = in_own_process("measure", preset, clip, recompute) if gpu else [
            in_own_process("count", preset, clip, videos, recompute) for videos in (1, 2)]
    print(f"GB a video, bfloat16, {f'measured on {torch.cuda.get_device_name()}' if gpu else 'counted'}\n")
    print("| preset | T x S | a video | fixed | recomputed: a video | fixed |\n| --- | --- | --- | --- | --- | --- |")
    for preset, clip in itertools.product(args.presets, args.clips):
        numbers = [f"{number / 1e9:.2f}" for one, two in (rows[preset, clip, False], rows[preset, clip, True])
                   for number in (two - one, 2 * one - two)]
        print(f"| {preset} | {clip} | {' | '.join(numbers)} |")

    for cards in (1, 8):
        print(f"\nA batch of 1024 on {cards} card{'s' * (cards > 1)}: videos at a time x passes a step, extra cost\n")
        print(f"| preset | T x S | n | {' | '.join(f'{card} GB' for card in CARDS)} |")
        print("| --- " * (3 + len(CARDS)) + "|")
        for preset, clip in itertools.product(args.presets, args.clips):
            config, shape = settings(preset, clip)
            parameters = sum(p.numel() for p in build(config, shape).parameters())
            n = 128 if clip.endswith("256") else config.contrast
            cells = [[cell(fits(*rows[preset, clip, recompute], parameters, card, cards, n), recompute)
                      for recompute in (False, True)] for card in CARDS]
            print(f"| {preset} | {clip} | {n} | {' | '.join(plain or less or '-' for plain, less in cells)} |")

    if not gpu and not args.no_check:
        print("\nGB a video in float32 on this CPU\n\n| preset | T x S | | counted | measured |\n" + "| --- " * 5 + "|")
        for (preset, clip, recompute), (one, two) in rows.items():
            if two > 0.2 * fitting.free_memory(torch.device("cpu")):
                continue
            counted = [in_own_process("count", preset, clip, videos, recompute, False) for videos in (1, 2)]
            measured = in_own_process("measure", preset, clip, recompute)
            print(f"| {preset} | {clip} | {'recomputed' * recompute} | {(counted[1] - counted[0]) / 1e9:.2f} | "
                  f"{(measured[1] - measured[0]) / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
