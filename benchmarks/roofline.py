"""What a step should take on an H100, by kind of kernel, counted without a GPU.

    python benchmarks/roofline.py                            small, base, large and large256
    python benchmarks/roofline.py --presets small --videos 64

A step is forward and backward of both tasks on so many videos in bfloat16, and AdamW. A kernel
takes the time of its FLOP or of its bytes, whichever is longer, at the card's peak rates; the real
step is slower. The fused attention kernel works on tiles of 128 rows: its FLOP are those of whole
tiles, and its backward pass also clears, adds to and reads a float32 buffer of whole tiles.

"fused" is that kernel at all lengths, "chosen" is kernels.attention. The last line is the FLOP of
the model's matrix products, without padding, over the time, as a share of the peak rate.
"""
import argparse
import collections
import math
import sys
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import pretend_gpu  # before torch
import torch
import torch.nn.functional as F

import pretrain
from contrastive import ProjectionHead, info_nce
from plumbing import kernels
from plumbing.tokens import PAD
from transformer import TokenHead, VideoTransformer

FLOP_RATE = 989e12  # a second, bfloat16, dense
BYTE_RATE = 3.35e12  # a second
TILE = 128  # rows and columns of a fused attention kernel's tile
OPTIMIZER_BYTES = 40  # a parameter: gradient norm, clipping, AdamW's reads and writes
GATHERS = {"index", "embedding", "index_select"}  # read as many rows as they write
LOSS = {"_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward"}


def config_of(preset):
    return pretrain.Config(**{"preset": preset, **pretrain.PRESETS[preset]})


def count_step(config, videos, precision=torch.bfloat16, pad=False, checkpointing=False,
               hidden_on="cuda"):
    """One forward and backward pass of both tasks on a pretended GPU -> PretendGpu, parameters.

    The transformer and its heads, on hidden tokens drawn at random. precision: of autocast;
    float32 does without. pad: whether a clip ends in PAD; None: it does, and the model looks.
    """
    side = config.frame_size // 8
    shape = config.transformer(8192, side, side)
    tokens = torch.randint(shape.vocab_size, (2 * videos, shape.frames, side, side))
    if pad is not False:
        tokens[0, -1] = shape.vocab_size + PAD
    hidden = (torch.rand(tokens.shape) < config.mask_ratio).flatten().nonzero().squeeze(1)  # (M,)
    with pretend_gpu.PretendGpu() as gpu:
        with torch.device("cuda"):
            backbone, token_head = VideoTransformer(shape), TokenHead(shape)
        head = ProjectionHead(shape.dim, config.projection_hidden, config.projection_layers).cuda()
        backbone.activation_checkpointing = checkpointing
        targets = tokens.flatten()[hidden].cuda()
        tokens, hidden = tokens.cuda(), hidden.to(hidden_on)
        for counter in (gpu.kernels, gpu.waits, gpu.mixed):
            counter.clear()
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            cls, features = backbone(tokens, pad)
            logits = token_head(features.flatten(0, 3)[hidden], backbone.embedding.weight)
            loss = F.cross_entropy(logits.float(), targets) + info_nce(*head(cls).chunk(2))
        loss.backward()
    modules = (backbone, token_head, head)
    return gpu, sum(p.numel() for module in modules for p in module.parameters())


# ---------------------------------------------------------------- kinds of kernels, their times


def attention_length(kernel, head_dim):
    """The number of tokens of a sequence, CLS included, or None if it is not attention's kernel."""
    shape = kernel.shapes[0] if kernel.shapes else ()
    if "attention" in kernel.name:
        return shape[-2]
    if kernel.name == "bmm":
        sizes = {*kernel.shapes[0][1:], *kernel.shapes[1][1:]}
        return max(sizes - {head_dim}, default=head_dim)
    square = len(shape) >= 5 and shape[-1] == shape[-2] and shape[-1] > 1
    return shape[-1] if square and kernel.name not in GATHERS else None


def kind_and_seconds(kernel, head_dim):
    length = attention_length(kernel, head_dim)
    moved, flop = kernel.read + kernel.written, kernel.flop
    if "attention" in kernel.name:
        sequences = math.prod(kernel.shapes[0][:-2])  # batch and heads
        tiles = sequences * math.ceil(length / TILE)
        products = 5 if "backward" in kernel.name else 2
        flop = products * 2 * tiles * TILE * math.ceil(length / TILE) * TILE * head_dim
        if "backward" in kernel.name:
            moved += 4 * tiles * TILE * head_dim * torch.float32.itemsize  # clear, read, add, read
    elif kernel.name in GATHERS:
        moved = 2 * kernel.written
    if length:
        kind = f"attention, L = {length}"
    elif kernel.name in ("mm", "addmm"):
        kind = "matrix products"
    else:
        kind = "softmax, loss" if kernel.name in LOSS else "norms, elementwise, copies"
    return kind, max(flop / FLOP_RATE, moved / BYTE_RATE)


def roofline(config, videos):
    """-> {kind: seconds} with the optimizer, FLOP of the matrix products, how many kernels."""
    gpu, parameters = count_step(config, videos)
    seconds = collections.Counter()
    for kernel in gpu.kernels:
        kind, time = kind_and_seconds(kernel, config.head_dim)
        seconds[kind] += time
    seconds["AdamW"] = OPTIMIZER_BYTES * parameters / BYTE_RATE
    return seconds, sum(kernel.flop for kernel in gpu.kernels), len(gpu.kernels)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["small", "base", "large", "large256"],
                        choices=list(pretrain.PRESETS))
    parser.add_argument("--videos", type=int, default=32, help="videos of a step on one GPU")
    args = parser.parse_args()
    for preset in args.presets:
        config = config_of(preset)
        with mock.patch.object(kernels, "SHORT", 0):
            fused, flop, fused_count = roofline(config, args.videos)
        chosen, _, chosen_count = roofline(config, args.videos)
        print(f"{preset}, {args.videos} videos: milliseconds on an H100\n\n"
              f"{'':28s}   fused   chosen")
        for kind in sorted(fused | chosen, key=lambda kind: -fused[kind]):
            print(f"{kind:28s}{1e3 * fused[kind]:8.2f} {1e3 * chosen[kind]:8.2f}")
        print(f"{'all':28s}{1e3 * fused.total():8.2f} {1e3 * chosen.total():8.2f}")
        print(f"{'kernels':28s}{fused_count:8d} {chosen_count:8d}")
        shares = (100 * flop / FLOP_RATE / times.total() for times in (fused, chosen))
        print(f"{'share of the matrix rate':28s}{next(shares):7.1f}% {next(shares):7.1f}%\n")


if __name__ == "__main__":
    main()
