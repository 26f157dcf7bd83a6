"""How fast a training step is, beside a plain version of the model and the machine's matrix rate.

    python benchmarks/throughput.py --reference           small, T = 5, S = 128, 4 videos a step
    python benchmarks/throughput.py --presets small base large --videos 256 128 64 \\
        --precisions bf16 --compile
    python benchmarks/throughput.py --presets large --videos 512 --gpus 8

Each row runs in a process of its own, so that peak memory is the row's own. The command prints a
table, then the same numbers as JSON lines. On a shared machine, --rounds 3 measures all rows three
times in turn; the table shows medians and the range of the ratios. The last lines are the rate of
the data loader on a store of 100,000 videos, and that of the tokenizers.

Models: "plain" has per-sequence attention, logits of all tokens, float32 and no fused kernel.
"ours" is what pretrain.py runs. "- IDEA" is ours without one of its ideas:

    logits     token logits of the hidden tokens only
    CLS once   one query, key and value of CLS for all sequences of a block
    GELU       GELU recomputed in the backward pass
    dropout    16 random bits for each element, on a CPU
    AdamW      fused AdamW
    malloc     the glibc settings MALLOC below
    kernel     two matrix products for attention over short sequences, on CPUs over all sequences,
               in place of the fused kernel

On GPUs, "fp32" multiplies in full float32 and "tf32" on tensor cores.

Columns: videos/s and ms a step (the median step), peak memory (of the GPU, or of the whole
process), and MFU, model FLOP utilisation: the FLOP/s of the model as `flop` counts them, divided
by the FLOP/s of a large matrix product in the same process.
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
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dalle
import masking
import pretrain
import transformer
import vqvae
from plumbing import cli, kernels, processes, runs

# ---------------------------------------------------------------- what a step computes


def flop(config, hidden):
    """FLOP of one clip, forward and backward -> float.

    These are the model's matrix products, with 2 FLOP for a multiplication and an addition. The
    backward pass takes twice the forward pass. config: TransformerConfig. hidden: the number of
    tokens that are predicted, on average.
    """
    sizes = {"T": config.frames, "H": config.height, "W": config.width}
    tokens = config.frames * config.height * config.width
    attention_dim = config.heads * config.head_dim
    layer = 4 * (1 + tokens) * config.dim * config.mlp_dim
    for block in config.layout.split(","):
        layer += 2 * (1 + tokens) * config.dim * 4 * attention_dim  # query, key, value and W_out
        patterns = block.split("|")
        for pattern in patterns:
            length = math.prod(sizes[axis] for axis in pattern.split("x"))
            products = 4 * (tokens // length) * (1 + length) ** 2  # q k^T and p v
            layer += products * attention_dim // len(patterns)
    token_head = 2 * hidden * config.dim * (config.dim + config.vocab_size + 5)
    return 3 * (config.layers * layer + token_head)


def expected_hidden(config, shape):
    """The number of hidden tokens of a clip, on average. shape: TransformerConfig."""
    grid = shape.frames, shape.height, shape.width
    blocks = masking.blocks_for(*grid, config.mask_ratio)
    return masking.expected_ratio(*grid, blocks) * math.prod(grid)


# ---------------------------------------------------------------- the plain version


class PlainBlock(transformer.AttentionBlock):
    """The same block as the equations state it: each sequence is built with CLS, then projected."""

    def attend_all(self, x, pad, shape):
        cls, tokens = x[:, :1], x[:, 1:].unflatten(1, shape)  # (B, 1, d), (B, T, H, W, d)
        weights = self.qkv.weight.chunk(len(self.patterns))
        biases = self.qkv.bias.chunk(len(self.patterns))
        parts = [self.attend_plainly(cls, tokens, *part)
                 for part in zip(self.patterns, weights, biases)]
        return torch.cat(parts, dim=-1)  # (B, N, A)

    def attend_plainly(self, cls, tokens, pattern, weight, bias):
        """One pattern -> (B, N, A/P)."""
        sequences = transformer.to_sequences(tokens, pattern)  # (B, S, L, d)
        count = sequences.shape[1:-2]  # S, one dimension for each axis
        sequences = sequences.flatten(0, -3)  # (B*S, L, d)
        repeated = cls.repeat_interleave(math.prod(count), dim=0)  # (B*S, 1, d)
        sequences = torch.cat([repeated, sequences], dim=1)  # (B*S, 1 + L, d)
        q, k, v = (F.linear(sequences, *part).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in zip(weight.chunk(3), bias.chunk(3)))  # (B*S, heads, 1 + L, a) each
        p = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        out = kernels.dropout(p, self.dropout, self.training) @ v
        out = out.transpose(1, 2).flatten(2)  # (B*S, 1 + L, A/P)
        out = out.unflatten(0, (len(cls), *count))  # (B, S, 1 + L, A/P)
        first = out[..., 0, :].reshape(len(cls), -1, out.shape[-1])  # (B, S, A/P)
        rest = transformer.from_sequences(out[..., 1:, :], pattern, tokens.shape[1:4])
        return torch.cat([first.mean(dim=1, keepdim=True), rest.flatten(1, 3)], dim=1)


class PlainVimpac(pretrain.Vimpac):
    def predict_tokens(self, features, hidden):
        """Logits of all tokens, then those of the hidden ones."""
        logits = self.token_head(features, self.backbone.embedding.weight)  # (B, T, H, W, V + 5)
        return logits.flatten(0, 3)[hidden]


PLAIN = ["logits", "CLS once", "GELU", "dropout", "AdamW", "malloc"]  # plain is without all these


def change(model, idea):
    """Removes one of this project's ideas from a model, or adds torch.compile.

    The weights stay. Without "CLS once", no clip may hold PAD tokens.
    """
    if idea == "logits":
        model.__class__ = PlainVimpac
    elif idea == "CLS once":
        for layer in model.backbone.layers:
            for block in layer.blocks:
                block.__class__ = PlainBlock
    elif idea == "GELU":
        kernels.gelu_linear = lambda hidden, linear: linear(F.gelu(hidden))
    elif idea == "dropout":
        kernels.dropout = F.dropout
    elif idea == "kernel":
        kernels.GPUS, kernels.SHORT = ("cpu", "cuda"), 0
    elif idea == "compile":
        model.backbone.compile_layers()


# ---------------------------------------------------------------- measuring


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device, precision):
    """FLOP/s of a large square matrix product: the best of five."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = processes.DTYPES.get(precision, torch.float32)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def peak_memory(device):
    """The most bytes in use since the start: by tensors on the GPU, or by this process -> int."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def settings(preset, clip, vocab_size, **changes):
    """-> pretrain.Config, TransformerConfig. clip: such as "5x128", T x S."""
    frames, size = (int(number) for number in clip.split("x"))
    values = {"preset": preset, **pretrain.PRESETS[preset], "frames": frames, **changes}
    config = pretrain.Config(**values)
    return config, config.transformer(vocab_size, size // 8, size // 8)


def train_step(config, model, optimizer, scaler, clips, vocab_size, device, step):
    """One step as in pretrain.train -> its mask loss.

    model: a Vimpac, or DistributedDataParallel of one.
    """
    groups = config.batch // config.contrast
    processes.seed_all(config.seed, step, processes.rank_and_world()[0])
    generator = torch.Generator().manual_seed(processes.one_seed(config.seed, step))
    losses = []
    for i, group in enumerate(clips.chunk(groups)):
        with processes.sync_gradients(model, last=i + 1 == groups):
            losses.append(
                pretrain.compute_losses(config, vocab_size, device, model, group, generator))
            scaler.scale(losses[-1]["loss"] / groups).backward()
    runs.set_learning_rate(optimizer, config, step, steps=10**9)
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    scaler.step(optimizer)
    scaler.update(None if config.precision == "fp16" else 1.0)
    optimizer.zero_grad(set_to_none=True)
    return sum(terms["mask_loss"].detach() for terms in losses) / groups


def measure(row, steps):
    """Measures a row of the table on random clips -> the row with its figures."""
    device = processes.pick_device(row["device"])
    world = processes.rank_and_world()[1]
    videos = row["videos"]
    config, shape = settings(
        row["preset"], row["clip"], row["vocab_size"], layout=row["layout"], lr=1e-4, warmup=0.0,
        batch=videos, contrast=row["contrast"] or videos, micro_batch=row["micro_batch"] or videos,
        precision=processes.pick_precision(row["precision"], device))
    runs.resolve_batch(config, videos, world)
    processes.seed_all(0)
    model = pretrain.Vimpac(shape, config.projection_hidden, config.projection_layers).to(device)
    model.backbone.activation_checkpointing = row["activation_checkpointing"]
    for idea in row["changes"]:
        change(model, idea)
    optimizer, scaler = runs.build_optimizer(model, config, pretrain.BETAS, device)
    if "AdamW" in row["changes"]:
        unfused = [{**group, "fused": None} for group in optimizer.param_groups]
        optimizer = torch.optim.AdamW(unfused)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    size = videos // world, 2, shape.frames, shape.height, shape.width
    clips = torch.randint(shape.vocab_size, size)
    seconds, mask_losses = [], []
    for step in range(steps + 2):  # the first two warm up
        wait(device)
        start = time.perf_counter()
        loss = train_step(config, wrapped, optimizer, scaler, clips, shape.vocab_size, device, step)
        wait(device)
        seconds.append(time.perf_counter() - start)
        mask_losses.append(loss.item())
    memory = peak_memory(device)  # before the matrix product, which needs memory of its own
    del model, wrapped, optimizer
    second = statistics.median(seconds[2:])
    needed = 2 * videos / world * flop(shape, expected_hidden(config, shape))
    rate = matrix_rate(device, config.precision)
    return {**row, "ms": 1000 * second, "videos_per_second": videos / second,
            "peak_gb": memory / 1e9, "mfu": needed / second / rate, "step_tflop": needed / 1e12,
            "matrix_tflops": rate / 1e12, "first_mask_loss": mask_losses[0],
            "device": str(device), "torch": torch.__version__}


def measure_loader(videos):
    """Clips/s of one loading process, drawn from a store of so many videos."""
    import loading  # reads and writes stores
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        loading.make_store(store, videos)
        rate = loading.measure_store(store)[2]
    return {"model": "loader", "videos": videos, "clips_per_second": round(rate)}


def dalle_encoder():
    """DALL-E's encoder in its released sizes, with random weights."""
    tensors = {}

    def add(name, n_out, n_in, side):
        std = 1 / math.sqrt(n_in * side**2)
        tensors[f"{name}.w"] = std * torch.randn(n_out, n_in, side, side)
        tensors[f"{name}.b"] = torch.zeros(n_out)

    add("blocks.input", 256, 3, 7)
    before = 256
    for group, width in enumerate((256, 512, 1024, 2048), 1):
        for block in (1, 2):
            name, inner = f"blocks.group_{group}.block_{block}", width // 4
            if before != width:
                add(f"{name}.id_path", width, before, 1)
            add(f"{name}.res_path.conv_1", inner, before, 3)
            add(f"{name}.res_path.conv_2", inner, inner, 3)
            add(f"{name}.res_path.conv_3", inner, inner, 3)
            add(f"{name}.res_path.conv_4", width, inner, 1)
            before = width
    add("blocks.output.conv", 8192, 2048, 1)
    return dalle.DalleVAE(dalle.Tower(tensors, dalle.halve))


@torch.no_grad()
def measure_tokenizer(name, device, size, seconds=10):
    """Frames/s that a tokenizer encodes."""
    device = processes.pick_device(device)
    tokenizer = dalle_encoder() if name == "DALL-E" else vqvae.VQVAE(1024)
    tokenizer = tokenizer.to(device).eval()
    count = 256 if device.type == "cuda" else 8
    frames = torch.randint(256, (count, size, size, 3), dtype=torch.uint8)
    tokenizer.encode(frames)
    wait(device)
    start, encoded = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        tokenizer.encode(frames)
        wait(device)
        encoded += len(frames)
    rate = encoded / (time.perf_counter() - start)
    return {"model": name, "size": size, "frames_per_second": round(rate, 1)}


JOBS = {"row": measure, "loader": measure_loader, "tokenizer": measure_tokenizer}

# ---------------------------------------------------------------- the table

# In glibc before 2.38, splinters between freed tensors keep the next ones from fitting; and large
# ones go back to the system, which zeroes their pages when they are allocated again.
MALLOC = {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{setting}" for setting in (
    "tcache_count=0", "mxfast=0", "mmap_max=0", "trim_threshold=100000000000"))}


def in_own_process(job, gpus=1, malloc=True):
    """Runs one job in a new process, or in one for each GPU -> its result, or {"error": text}.

    job: (a name of JOBS, its arguments). malloc: whether with the settings MALLOC.
    """
    command = [sys.executable]
    if gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    command += [__file__, "--job", json.dumps(job)]
    environment = {**(MALLOC if malloc else {}), **os.environ}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.splitlines()
    lines = [line for line in lines if "Error" in line] or lines[-1:]
    return {"error": lines[0].strip() if lines else f"ended with {done.returncode}"}


HEAD = ("model       preset  layout   clip    precision  videos   ms/step  videos/s  peak GB    MFU"
        "   speed and memory, relative to plain")


def line(results, plain=None):
    """A line of the table: the medians of a row's results.

    plain: the results of the plain version with the same work, one for each of `results`.
    """
    row = results[0]
    start = (f"{row['model']:10s}  {row['preset']:6s}  {row['layout']:7s}  {row['clip']:6s}  "
             f"{row['precision']:9s}  {row['videos']:6d}")
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


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--presets", nargs="+", default=["small"], choices=list(pretrain.PRESETS))
    add("--videos", nargs="+", type=int, default=[4],
        help="videos a step, for all presets or for each")
    add("--contrast", type=int, default=0, help="videos contrasted together (0: all)")
    add("--micro-batch", type=int, default=0,
        help="videos that pass through the backbone at a time (0: a whole group)")
    add("--activation-checkpointing", action="store_true",
        help="recompute each layer in the backward pass")
    add("--clips", nargs="+", default=["5x128"], help="clip sizes, T x S, such as 5x128 10x256")
    add("--layouts", nargs="+", default=["T,H|W"])
    add("--precisions", nargs="+", default=["fp32", "bf16"],
        choices=["fp32", "tf32", "bf16", "fp16"])
    add("--device", default="auto", choices=["auto", "cuda", "cpu"])
    add("--gpus", type=int, default=1, help="processes that share each step")
    add("--steps", type=int, default=5, help="steps of which the median is shown")
    add("--rounds", type=int, default=1, help="how often all rows are measured, in turn")
    add("--compile", action="store_true", help="also measure each row with torch.compile")
    add("--each", action="store_true", help="also measure ours without each of its ideas")
    add("--reference", action="store_true", help="also measure the plain version, in float32")
    add("--no-loading", action="store_true", help="leave out the loader and the tokenizers")
    add("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if len(args.videos) not in (1, len(args.presets)):
        parser.error(f"--videos: give one number, or one for each of the {len(args.presets)} "
                     f"presets")
    return args


def models(args):
    """The models to measure -> [(name, ideas that are removed, precision)]."""
    rows = [("plain", PLAIN, "fp32")] if args.reference else []
    for precision in args.precisions:
        rows.append(("ours", [], precision))
        if args.compile:
            rows.append(("compiled", ["compile"], precision))
        if args.each:
            rows += [(f"- {idea}", [idea], precision) for idea in [*PLAIN, "kernel"]]
    return rows


def measure_models(args, device, preset, videos, clip, layout):
    """Prints the rows of all models with the same work -> their results."""
    group = [{"model": model, "changes": changes, "preset": preset, "layout": layout,
              "clip": clip, "precision": precision, "videos": videos, "vocab_size": 8192,
              "device": device.type, "contrast": args.contrast, "micro_batch": args.micro_batch,
              "activation_checkpointing": args.activation_checkpointing}
             for model, changes, precision in models(args)]
    rounds = []
    for _ in cli.progress(range(args.rounds), "measuring", args.rounds, " rounds"):
        rounds.append([row | in_own_process(("row", [row, args.steps]), args.gpus,
                                            malloc="malloc" not in row["changes"])
                       for row in group])
    plain = [results[0] for results in rounds] if args.reference else None
    for results in zip(*rounds):  # of one row
        print(line(results, plain), flush=True)
    return [result for results in zip(*rounds) for result in results]


def measure_loading(device):
    """Prints the rates of the loader and of the tokenizers -> their results."""
    jobs = [("loader, one process, 100,000 videos", "clips", ("loader", [100_000]))]
    for name in ("DALL-E", "VQ-VAE"):
        job = ("tokenizer", [name, device.type, 128])
        jobs.append((f"tokenizer {name}, 128 x 128 pixels", "frames", job))
    results = []
    for name, unit, job in jobs:
        result = in_own_process(job)
        rate = result.get(f"{unit}_per_second")
        print(f"{name}: {result['error'] if rate is None else f'{rate} {unit}/s'}", flush=True)
        results.append(result)
    return results


def main():
    args = parse_flags()
    if args.job:
        name, values = json.loads(args.job)
        result = JOBS[name](*values)
        if processes.rank_and_world()[0] == 0:
            print(json.dumps(result))
        return
    device, results = processes.pick_device(args.device), []
    for precision in args.precisions:
        processes.pick_precision(precision, device)  # refused here rather than in each row
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}\n\n{HEAD}")
    videos = args.videos * (len(args.presets) if len(args.videos) == 1 else 1)
    presets = zip(args.presets, videos)
    for (preset, count), clip, layout in itertools.product(presets, args.clips, args.layouts):
        results += measure_models(args, device, preset, count, clip, layout)
    print()
    if not args.no_loading:
        results += measure_loading(device)
        print()
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
