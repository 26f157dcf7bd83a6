"""How fast a step of pre-training is, beside what the machine could do and beside a plain version of the model.

    python benchmarks/throughput.py --reference                     small, T = 5, S = 128, 4 videos a step
    python benchmarks/throughput.py --presets small base large --videos 256 128 64 --precisions bf16 --compile
    python benchmarks/throughput.py --presets large --videos 512 --gpus 8

Every row is a process of its own, so that its peak memory is its own. Prints a table, then the same as JSON lines. On a
machine that others share, --rounds 3 measures the rows in turn three times: the medians and the range of ratios show.
Then: how many clips/s the loader delivers from a store of 100,000 videos, how many frames/s the tokenizers encode.

Models: "plain" is per-sequence attention, logits everywhere, float32, nothing fused; "ours" is what pretrain.py runs;
"- idea" is ours with one idea taken back: token logits only where masked (logits), one query, key and value of CLS for
all sequences of a block (CLS once), GELU computed again in the backward pass (GELU), dropout of 16 random bits a number
on CPUs (dropout), fused AdamW (AdamW), GLIBC_TUNABLES of docs/scaling.md (malloc), the attention kernel of the device
(kernel: the other one instead). On GPUs "fp32" multiplies in full float32, "tf32" on their tensor cores.

A row: videos/s and ms a step (the median step), peak memory (of the GPU, or of the whole process), and model FLOP
utilisation: the FLOP that `flop` counts, per second, over those of a large matrix product in the same process.
"""
import argparse
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import loading

import dalle
import masking
import pretrain
import transformer
import vqvae
from plumbing import cli, kernels, processes, runs

# ---------------------------------------------------------------- what a step computes


def flop(config, masked):
    """FLOP of one clip, forward and backward: the matrix products of the model, 2 for a multiply and an add.

    masked: how many of its tokens are predicted, on average. The backward pass takes twice the forward pass.
    """
    sizes = {"T": config.frames, "H": config.height, "W": config.width}
    tokens = config.frames * config.height * config.width
    attention, total = config.heads * config.head_dim, 0
    for block in config.layout.split(","):
        total += 2 * (1 + tokens) * config.dim * 4 * attention  # query, key, value and W_out
        patterns = block.split("|")
        for pattern in patterns:
            length = math.prod(sizes[axis] for axis in pattern.split("x"))
            total += 4 * (tokens // length) * (1 + length) ** 2 * attention // len(patterns)  # q k^T and p v
    total += 4 * (1 + tokens) * config.dim * config.mlp_dim
    head = 2 * masked * config.dim * (config.dim + config.vocab_size + 5)
    return 3 * (config.layers * total + head)


# ---------------------------------------------------------------- the plain version


class PlainBlock(transformer.AttentionBlock):
    """The same block as the equations state it: every sequence is laid out with CLS in front, then projected."""

    def attend_all(self, x, pad, shape):
        cls, tokens = x[:, :1], x[:, 1:].unflatten(1, shape)  # (B, 1, d), (B, T, H, W, d)
        weights, biases = (p.chunk(len(self.patterns)) for p in (self.qkv.weight, self.qkv.bias))
        parts = [self.attend_plainly(cls, tokens, *part) for part in zip(self.patterns, weights, biases)]
        return torch.cat(parts, dim=-1)  # (B, N, A)

    def attend_plainly(self, cls, tokens, pattern, weight, bias):
        sequences = transformer.to_sequences(tokens, pattern)  # (B, S, L, d)
        together = sequences.shape[1:-2]
        sequences = sequences.flatten(0, -3)  # (B*S, L, d)
        repeated = cls.repeat_interleave(math.prod(together), dim=0)  # (B*S, 1, d)
        sequences = torch.cat([repeated, sequences], dim=1)  # (B*S, 1 + L, d)
        q, k, v = (F.linear(sequences, *part).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in zip(weight.chunk(3), bias.chunk(3)))  # (B*S, heads, 1 + L, a) each
        p = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        out = kernels.dropout(p, self.dropout, self.training) @ v
        out = out.transpose(1, 2).flatten(2).unflatten(0, (len(cls), *together))  # (B, S, 1 + L, A/P)
        first = out[..., 0, :].reshape(len(cls), -1, out.shape[-1]).mean(dim=1, keepdim=True)  # (B, 1, A/P)
        rest = transformer.from_sequences(out[..., 1:, :], pattern, tokens.shape[1:4])  # (B, T, H, W, A/P)
        return torch.cat([first, rest.flatten(1, 3)], dim=1)


class PlainVimpac(pretrain.Vimpac):
    """Logits of all tokens, then those of the hidden ones."""

    def forward(self, inputs, hidden, padded=None):
        cls, features = self.backbone(inputs, padded)
        logits = self.token_head(features, self.backbone.embedding.weight).flatten(0, 3)
        return logits[hidden], cls


def change(model, idea):
    """Takes one idea of this project back, or adds torch.compile. The weights stay; without "CLS once" no clip may hold
    PAD tokens."""
    if idea == "logits":
        model.__class__ = PlainVimpac
    elif idea == "CLS once":
        for block in (block for layer in model.backbone.layers for block in layer.blocks):
            block.__class__ = PlainBlock
    elif idea == "GELU":
        transformer.gelu_linear = lambda hidden, linear: linear(F.gelu(hidden))
    elif idea == "dropout":
        transformer.dropout = kernels.dropout = F.dropout
    elif idea == "kernel":
        kernels.FUSED = ("cpu",) if next(model.parameters()).device.type == "cpu" else ()
    elif idea == "compile":
        model.backbone.compile_layers()


PLAIN = ["logits", "CLS once", "GELU", "dropout", "AdamW", "malloc"]  # taken back together: the plain version

# ---------------------------------------------------------------- measuring


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device, dtype):
    """FLOP/s of a large square matrix product: the best of five."""
    size = 8192 if device.type == "cuda" else 3072
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size ** 3 / min(seconds[1:])


def peak_memory(device):
    """GB: of this GPU since the start, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def measure(row, steps):
    """One row: random clips, the whole step of pretrain.py (masks, both losses, backward, clipping, AdamW) -> dict."""
    device = processes.pick_device(row["device"])
    precision = processes.pick_precision(row["precision"], device)
    frames, size = (int(n) for n in row["clip"].split("x"))
    config = pretrain.Config(**{**pretrain.PRESETS[row["preset"]], "layout": row["layout"], "frames": frames,
                                "lr": 1e-4, "warmup": 0.0, "contrast": row["contrast"] or row["videos"],
                                "micro_batch": row["micro_batch"] or row["videos"], "recompute": row["recompute"]})
    shape = config.transformer(row["vocab_size"], size // 8, size // 8)
    processes.seed_all(0)
    model = pretrain.Vimpac(shape, config.projection_hidden, config.projection_layers).to(device)
    model.backbone.recompute = config.recompute
    for idea in row["changes"]:
        change(model, idea)
    optimizer = runs.Optimizer(model, config, 10**9, (0.9, 0.98), precision)  # so many steps: the rate stays as it is
    if "AdamW" in row["changes"]:
        optimizer.adamw = torch.optim.AdamW([{**group, "fused": None} for group in optimizer.adamw.param_groups])
    world = processes.rank_and_world()[1]
    wrapped = DistributedDataParallel(model) if world > 1 else model
    clips = torch.randint(shape.vocab_size, (row["videos"] // world, 2, frames, size // 8, size // 8))
    seconds, mask_losses = [], []
    for step in range(steps + 2):  # the first two warm up
        wait(device)
        start = time.perf_counter()
        measures, _ = pretrain.update(wrapped, config, clips, shape.vocab_size, optimizer, precision, step)
        wait(device)
        seconds.append(time.perf_counter() - start)
        mask_losses.append(measures["mask_loss"].item())
    memory = peak_memory(device)  # before the matrix product, which takes some as well
    del model, wrapped, optimizer
    second = statistics.median(seconds[2:])
    grid = shape.frames, shape.height, shape.width
    masked = masking.expected_ratio(*grid, masking.blocks_for(*grid, config.mask_ratio)) * math.prod(grid)
    needed = 2 * row["videos"] / world * flop(shape, masked)
    rate = matrix_rate(device, precision)
    return {**row, "ms": 1000 * second, "videos_per_second": row["videos"] / second, "peak_gb": memory,
            "mfu": needed / second / rate, "step_tflop": needed / 1e12, "matrix_tflops": rate / 1e12,
            "first_mask_loss": mask_losses[0], "device": str(device), "torch": torch.__version__}


def measure_loader(videos):
    """Clips/s of one loading process, drawn from a store of so many videos."""
    with tempfile.TemporaryDirectory() as folder:
        loading.make_store(folder, videos)
        return {"model": "loader", "videos": videos, "clips_per_second": round(loading.measure_store(folder)[2])}


def dalle_encoder():
    """DALL-E's encoder in its released sizes, with random weights."""
    tensors = {}

    def add(name, n_out, n_in, side):
        tensors[f"{name}.w"] = torch.randn(n_out, n_in, side, side) / math.sqrt(n_in * side ** 2)
        tensors[f"{name}.b"] = torch.zeros(n_out)

    add("blocks.input", 256, 3, 7)
    before = 256
    for group, width in enumerate((256, 512, 1024, 2048), 1):
        for block in (1, 2):
            name, inner = f"blocks.group_{group}.block_{block}", width // 4
            if before != width:
                add(f"{name}.id_path", width, before, 1)
            for i, sizes in enumerate([(inner, before, 3), (inner, inner, 3), (inner, inner, 3), (width, inner, 1)], 1):
                add(f"{name}.res_path.conv_{i}", *sizes)
            before = width
    add("blocks.output.conv", 8192, 2048, 1)
    return dalle.DalleVAE(dalle.Tower(tensors, dalle.halve))


@torch.no_grad()
def measure_tokenizer(name, device, size, seconds=10):
    """Frames/s that a tokenizer encodes."""
    device = processes.pick_device(device)
    tokenizer = (dalle_encoder() if name == "DALL-E" else vqvae.VQVAE(1024)).to(device).eval()
    frames = torch.randint(256, (256 if device.type == "cuda" else 8, size, size, 3), dtype=torch.uint8)
    tokenizer.encode(frames)
    wait(device)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        tokenizer.encode(frames)
        wait(device)
        done += len(frames)
    return {"model": name, "size": size, "frames_per_second": round(done / (time.perf_counter() - start), 1)}


# ---------------------------------------------------------------- the table


# In glibc before 2.38, splinters between freed tensors keep the next ones from fitting; and large ones go back to the
# system, which zeroes their pages when they are wanted again.
MALLOC = {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}" for name in (
    "tcache_count=0", "mxfast=0", "mmap_max=0", "trim_threshold=100000000000"))}


def in_own_process(job, gpus=1, malloc=True):
    """Runs this file anew for one job, with MALLOC or without -> the dict it prints last, or {"error": its last line}.
    """
    start = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
                                if gpus > 1 else [])
    done = subprocess.run([*start, __file__, "--job", json.dumps(job)], check=False, capture_output=True, text=True,
                          env={**(MALLOC if malloc else {}), **os.environ})
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()[-1:]
        return {"error": lines[0].strip() if lines else f"ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


HEAD = ("model       preset  layout   clip    precision  videos   ms/step  videos/s  peak GB    MFU   "
        "speed and memory, to plain")


def line(results, plain=None):
    """A line of the table: the medians of a row's results. plain: the plain version's on the same work, as many."""
    row = results[0]
    start = (f"{row['model']:10s}  {row['preset']:6s}  {row['layout']:7s}  {row['clip']:6s}  {row['precision']:9s}  "
             f"{row['videos']:6d}")
    errors = [result["error"] for result in [*results, *(plain or [])] if "error" in result]
    if errors:
        return f"{start}  {errors[0][:100]}"
    ms, rate, memory, mfu = (statistics.median(result[key] for result in results)
                             for key in ("ms", "videos_per_second", "peak_gb", "mfu"))
    text = f"{start}  {ms:8.1f}  {rate:8.3g}  {memory:7.2f}  {100 * mfu:4.0f}%"
    if plain and row["model"] != "plain":
        ratios = sorted(theirs["ms"] / ours["ms"] for ours, theirs in zip(results, plain))
        memory /= statistics.median(result["peak_gb"] for result in plain)
        spread = f" ({ratios[0]:.2f}..{ratios[-1]:.2f})" if len(ratios) > 1 else ""
        text += f"   {statistics.median(ratios):.2f}x{spread}  {100 * memory:.0f}%"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["small"], choices=list(pretrain.PRESETS))
    parser.add_argument("--videos", nargs="+", type=int, default=[4], help="videos a step, for all presets or for each")
    parser.add_argument("--contrast", type=int, default=0, help="videos told apart from each other (0: all)")
    parser.add_argument("--micro-batch", type=int, default=0, help="videos a process takes at a time (0: all)")
    parser.add_argument("--recompute", action="store_true", help="keep only what enters each layer")
    parser.add_argument("--clips", nargs="+", default=["5x128"], help="clip sizes, T x S such as 5x128 10x256")
    parser.add_argument("--layouts", nargs="+", default=["T,H|W"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"],
                        choices=["fp32", "tf32", "bf16", "fp16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--gpus", type=int, default=1, help="processes that share each step")
    parser.add_argument("--steps", type=int, default=5, help="steps of which the median counts")
    parser.add_argument("--rounds", type=int, default=1, help="times that every row is measured, one after the other")
    parser.add_argument("--compile", action="store_true", help="also measure every row with torch.compile")
    parser.add_argument("--each", action="store_true", help="also measure ours with each of its ideas taken back")
    parser.add_argument("--reference", action="store_true", help="also measure the plain version, in float32")
    parser.add_argument("--no-loading", action="store_true", help="leave out the loader and the tokenizers")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        name, values = json.loads(args.job)
        result = {"row": measure, "loader": measure_loader, "tokenizer": measure_tokenizer}[name](*values)
        if processes.rank_and_world()[0] == 0:
            print(json.dumps(result))
        return
    if len(args.videos) not in (1, len(args.presets)):
        parser.error(f"--videos: one number, or one for each of the {len(args.presets)} presets")

    device, rows = processes.pick_device(args.device), []
    for precision in args.precisions:
        processes.pick_precision(precision, device)  # refused here rather than in every row
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}, "
          f"torch {torch.__version__}\n\n{HEAD}")
    kinds = [("plain", PLAIN, "fp32")] * args.reference
    for precision in args.precisions:
        kinds += [("ours", [], precision)] + [("compiled", ["compile"], precision)] * args.compile
        kinds += [(f"- {idea}", [idea], precision) for idea in [*PLAIN, "kernel"]] * args.each
    videos = args.videos * (len(args.presets) if len(args.videos) == 1 else 1)
    for (preset, count), clip, layout in itertools.product(zip(args.presets, videos), args.clips, args.layouts):
        group = [{"model": model, "changes": changes, "preset": preset, "layout": layout, "clip": clip,
                  "precision": precision, "videos": count, "vocab_size": 8192, "device": device.type,
                  "contrast": args.contrast, "micro_batch": args.micro_batch, "recompute": args.recompute}
                 for model, changes, precision in kinds]
        rounds = [[row | in_own_process(["row", [row, args.steps]], args.gpus, "malloc" not in row["changes"])
                   for row in group] for _ in cli.progress(range(args.rounds), "measuring", args.rounds, " rounds")]
        plain = [results[0] for results in rounds] if args.reference else None
        for results in zip(*rounds):  # of one row
            print(line(results, plain), flush=True)
            rows += results
    print()
    if not args.no_loading:
        jobs = [("loader, one process, 100,000 videos", "clips_per_second", ["loader", [100_000]])]
        jobs += [(f"tokenizer {name}, 128 x 128 pixels", "frames_per_second", ["tokenizer", [name, device.type, 128]])
                 for name in ("DALL-E", "VQ-VAE")]
        for name, unit, job in jobs:
            rows.append(in_own_process(job))
            found = rows[-1].get(unit, rows[-1].get("error"))
            print(f"{name}: {found} {unit.replace('_per_second', '/s')}", flush=True)
    print()
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    cli.run(main)
