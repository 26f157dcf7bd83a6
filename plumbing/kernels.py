"""The same mathematics faster: dropout, attention fused or split for the hardware, less memory by computing again.

Shapes: B clips, S sequences (any number of dimensions), L tokens of a sequence, a dimensions of a head.
"""
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

FUSED = ("cuda",)  # devices that take one attention kernel; CPUs are faster with two products of many small matrices
MOST_SEQUENCES = 65_535  # of one attention kernel: the largest size of a CUDA grid beyond its first dimension


def dropout(x, p, training):
    """F.dropout. On a CPU drawing its random numbers would take longer than attention itself: here one draw gives the
    numbers of four elements, 16 bits each, and the mask kept for the backward pass has one byte an element."""
    if x.device.type != "cpu" or not training or p == 0:
        return F.dropout(x, p, training)
    dropped = min(round(p * 2**16), 2**16 - 1)  # of the 2**16 numbers
    numbers = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
    keep = numbers[:x.numel()].view(x.shape) >= dropped - 2**15
    return (x * keep).mul_(2**16 / (2**16 - dropped))


def attention(q, k, v, ignore, p):
    """softmax(q k^T / sqrt(a)) v, with dropout p of the probabilities: q, k, v (B, S, heads, L, a) -> the same.

    ignore: bool (B, S, L), True where a key is not to be attended to, or None.
    """
    ignore = None if ignore is None else ignore[..., None, None, :]  # (B, S, 1, 1, L)
    if q.device.type in FUSED:
        return fused_attention(q, k, v, ignore, p)
    scores = (q @ k.transpose(-1, -2)).div_(math.sqrt(q.shape[-1]))  # (B, S, heads, L, L)
    if ignore is not None:
        scores = scores.masked_fill(ignore, float("-inf"))
    return dropout(scores.softmax(dim=-1), p, p > 0) @ v


def fused_attention(q, k, v, ignore, p):
    """`attention` in one kernel. Some CUDA kernels cannot be launched on more sequences than MOST_SEQUENCES."""
    parts = [x.flatten(0, -4).split(MOST_SEQUENCES) for x in (q, k, v)]  # (<= 65535, heads, L, a) each
    masks = [None] * len(parts[0]) if ignore is None else (~ignore).flatten(0, -4).split(MOST_SEQUENCES)
    out = [F.scaled_dot_product_attention(*part, attn_mask=mask, dropout_p=p) for *part, mask in zip(*parts, masks)]
    return (out[0] if len(out) == 1 else torch.cat(out)).unflatten(0, q.shape[:-3])


def again_in_backward(function, *inputs):
    """function(*inputs), of which only the inputs are kept: the backward pass computes it again, with the same random
    numbers."""
    return checkpoint(function, *inputs, use_reentrant=False) if torch.is_grad_enabled() else function(*inputs)


def gelu_linear(hidden, linear):
    """linear(GELU(hidden)). GELU is computed again in the backward pass rather than kept: a seventh of a layer's memory
    for little time."""
    return checkpoint(lambda h: linear(F.gelu(h)), hidden, use_reentrant=False, preserve_rng_state=False)
