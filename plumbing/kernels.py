"""The same mathematics with less time or memory: dropout, attention, activation checkpointing.

Shapes: B clips, S sequences (any number of dimensions), L tokens of a sequence, a head_dim.
"""
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

GPUS = ("cuda",)  # devices with a fused attention kernel and with tensor cores
SHORT = 32  # tokens, CLS included: the longest sequences for which no device uses that kernel
MOST_SEQUENCES = 65_535  # of one kernel: the largest size of a CUDA grid beyond its first dimension


def dropout(x, p, training):
    """F.dropout. On a CPU, four elements share one draw of 64 random bits, 16 bits each.

    A draw for each element would take longer than attention itself. The mask that is kept for the
    backward pass has one byte an element. torch.compile cannot trace these draws: it gets
    F.dropout, which it fuses with its neighbours.
    """
    if x.device.type != "cpu" or not training or p == 0 or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    dropped = min(round(p * 2**16), 2**16 - 1)  # of the 2**16 numbers
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None)
    numbers = draws.view(torch.int16)[:x.numel()].view(x.shape)
    keep = numbers >= dropped - 2**15
    return (x * keep).mul_(2**16 / (2**16 - dropped))


def attention(q, k, v, ignore, p):
    """softmax(q k^T / sqrt(a)) v with dropout p of the probabilities -> (B, S, heads, L, a).

    q, k, v: (B, S, heads, L, a). ignore: bool (B, S, L), True = key not attended to, or None.

    Short sequences take two batched products with a softmax between: fused kernels work on tiles of
    128 rows, of which these would use a few, and allocate padded buffers for the backward pass.
    CPUs are faster with two products at any length.
    """
    if ignore is not None:
        ignore = ignore[..., None, None, :]  # (B, S, 1, 1, L)
    if q.device.type in GPUS and q.shape[-2] > SHORT:
        return fused_attention(q, k, v, ignore, p)
    scores = (q @ k.transpose(-1, -2)).div_(math.sqrt(q.shape[-1]))  # (B, S, heads, L, L)
    if ignore is not None:
        scores = scores.masked_fill(ignore, float("-inf"))
    return dropout(scores.softmax(dim=-1), p, p > 0) @ v


def fused_attention(q, k, v, ignore, p):
    """`attention` in one kernel, launched for at most MOST_SEQUENCES sequences at a time.

    Some CUDA kernels cannot be launched on more. ignore: (B, S, 1, 1, L) or None.
    """
    q_parts, k_parts, v_parts = (x.flatten(0, -4).split(MOST_SEQUENCES) for x in (q, k, v))
    masks = [None] * len(q_parts)
    if ignore is not None:
        masks = (~ignore).flatten(0, -4).split(MOST_SEQUENCES)
    out = [F.scaled_dot_product_attention(*part, attn_mask=mask, dropout_p=p)
           for *part, mask in zip(q_parts, k_parts, v_parts, masks)]
    out = out[0] if len(out) == 1 else torch.cat(out)
    return out.unflatten(0, q.shape[:-3])


def split_first(x, dim):
    """(..., 1 + L, ...) -> (..., ...), (..., L, ...): the first along `dim`, such as CLS, the rest.

    The backward pass of a split is one concatenation; that of two slices fills two tensors with
    zeros and adds them.
    """
    first, rest = x.split([1, x.shape[dim] - 1], dim)
    return first.squeeze(dim), rest


def activation_checkpoint(function, *inputs):
    """function(*inputs), of which only the inputs are kept.

    The backward pass computes the function again, with the same random numbers.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)


def gelu_linear(hidden, linear):
    """linear(GELU(hidden)), where the backward pass computes GELU again.

    To keep it would take a seventh of a layer's memory; to compute it takes little time.
    """
    def function(x):
        return linear(F.gelu(x))
    if not torch.is_grad_enabled():
        return function(hidden)
    return checkpoint(function, hidden, use_reentrant=False, preserve_rng_state=False)


def aligned_linear(x, weight, bias):
    """F.linear, on GPUs with outputs in rows of a multiple of 8 numbers, as tensor cores want them.

    x: (..., d). weight: (V, d). bias: (V,) -> (..., V), a view of the wider rows.
    """
    extra = -len(weight) % 8
    if x.device.type not in GPUS or extra == 0:
        return F.linear(x, weight, bias)
    padded = F.linear(x, F.pad(weight, (0, 0, 0, extra)), F.pad(bias, (0, extra)))
    return padded.split([len(weight), extra], dim=-1)[0]
