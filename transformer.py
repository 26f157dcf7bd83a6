"""Tokens -> features: the factorised video transformer of Appendix A.

The cost of attention over all T x H x W tokens at once grows with the square of their number.
VIMPAC's default layout "T,H|W" attends along time, then along the row and the column of the same
frame, in parallel. One CLS token joins every sequence and represents the whole clip.

    python transformer.py    the parameter counts of Tables 3, 6 and 13 beside ours

Shapes: B clips, T frames, H x W tokens a frame, N = 1 + T*H*W tokens with CLS first, d width,
m MLP width, P patterns of a block, L tokens of a sequence, S the axes of a pattern's sequences (one
or two dimensions, or none), a head_dim, A = heads * a, V codes and 5 special ids.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from plumbing import kernels, released
from plumbing.checkpoints import load_weights, read_backbone, rebuilt
from plumbing.checks import check_config, check_tokens
from plumbing.tokens import PAD, SPECIAL
from plumbing.weights import init_weights, resize_table

# "," separates blocks, applied one after another; "|" separates patterns, applied in parallel by
# different heads; "x" joins the axes that one pattern attends over together.
LAYOUTS = ("T,H|W", "T|H|W", "T,H,W", "H|W,T", "T,HxW", "TxHxW")
LN_EPS = 1e-12


@dataclass
class TransformerConfig:
    """The sizes of Table 3. Raises UserError if they do not fit together."""
    layers: int = 6
    dim: int = 512
    heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 2048
    frames: int = 5
    height: int = 16
    width: int = 16
    vocab_size: int = 8192
    layout: str = "T,H|W"
    pre_norm: bool = False
    dropout: float = 0.1
    init_std: float = 0.02  # a Linear's output grows with sqrt(dim): narrow models need more

    def __post_init__(self):
        check_config(self, LAYOUTS)


def to_sequences(x, pattern):
    """(B, T, H, W, ...) -> (B, S, L, ...), a view: the sequences along the axes of a pattern.

    pattern: such as "T" or "HxW". S: the other axes, kept as dimensions of their own.
    """
    axes, last = pattern_axes(pattern)
    return x.movedim(axes, last).flatten(last[0], 3)


def from_sequences(x, pattern, shape):
    """The inverse: (B, S, L, ...) -> (B, T, H, W, ...), where shape is (T, H, W)."""
    axes, last = pattern_axes(pattern)
    return x.unflatten(last[0], [shape[axis - 1] for axis in axes]).movedim(last, axes)


def pattern_axes(pattern):
    """The dimensions of (B, T, H, W) that a pattern names, and the last ones they are moved to."""
    axes = ["BTHW".index(axis) for axis in pattern.split("x")]
    return axes, list(range(4 - len(axes), 4))


class AttentionBlock(nn.Module):
    """Eq. 10, 11 and 15: attention along each pattern of a block, W_out, residual, LayerNorm."""

    def __init__(self, config, patterns):
        super().__init__()
        attention_dim = config.heads * config.head_dim
        self.patterns = patterns  # such as ("H", "W")
        self.heads = config.heads // len(patterns)  # of one pattern
        self.pre_norm, self.dropout = config.pre_norm, config.dropout
        self.qkv = nn.Linear(config.dim, 3 * attention_dim)  # query, key, value of each pattern
        self.out = nn.Linear(attention_dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=LN_EPS)

    def forward(self, x, pad, shape):
        """x: (B, N, d), CLS first. pad: bool (B, T, H, W), True = PAD, or None. shape: (T, H, W).

        As in the released code, with pre-LayerNorm the skip connection carries LayerNorm(x).
        """
        x = self.norm(x) if self.pre_norm else x
        y = self.out(self.attend_all(x, pad, shape))  # (B, N, d)
        x = x + kernels.dropout(y, self.dropout, self.training)
        return x if self.pre_norm else self.norm(x)

    def attend_all(self, x, pad, shape):
        """Eq. 11: all patterns side by side, (B, N, d) -> (B, N, A)."""
        qkv = self.qkv(x).chunk(len(self.patterns), dim=-1)  # P times (B, N, 3A/P)
        parts = [self.attend(part, pad, shape, name) for part, name in zip(qkv, self.patterns)]
        # (B, heads, a) and (B, T, H, W, heads, a), the heads of all patterns
        cls, tokens = (torch.cat(outputs, dim=-2) for outputs in zip(*parts))
        return torch.cat([cls.flatten(1)[:, None], tokens.flatten(4).flatten(1, 3)], dim=1)

    def attend(self, qkv, pad, shape, pattern):
        """One pattern: every sequence along its axes attends to itself and to CLS.

        qkv: (B, N, 3A/P) -> CLS (B, heads, a), tokens (B, T, H, W, heads, a).
        """
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, a)
        cls, tokens = kernels.split_first(qkv, dim=1)
        tokens = to_sequences(tokens.unflatten(1, shape), pattern)  # (B, S, L, 3, heads, a)
        tokens = tokens.movedim(-3, 0).transpose(-2, -3)  # (3, B, S, heads, L, a)
        # Every sequence has the same query, key and value of CLS: they are computed once.
        cls = cls.transpose(0, 1)  # (3, B, heads, a)
        cls = cls.unflatten(1, (-1,) + (1,) * (tokens.dim() - 5))  # (3, B, 1, heads, a)
        cls = cls.unsqueeze(-2).expand(*tokens.shape[:-2], 1, -1)  # (3, B, S, heads, 1, a)
        q, k, v = torch.cat([cls, tokens], dim=-2)  # (B, S, heads, 1 + L, a) each
        # (B, S, 1 + L): CLS is never PAD.
        ignore = None if pad is None else F.pad(to_sequences(pad, pattern), (1, 0))
        out = kernels.attention(q, k, v, ignore, self.dropout * self.training)  # as q
        cls, tokens = kernels.split_first(out, dim=-2)
        cls = cls.reshape(cls.shape[0], -1, *cls.shape[-2:]).mean(dim=1)  # (B, heads, a): Eq. 15
        return cls, from_sequences(tokens.transpose(-2, -3), pattern, shape)


class Layer(nn.Module):
    """Eq. 12-14: the layout's attention blocks one after another, then the MLP."""

    def __init__(self, config):
        super().__init__()
        self.pre_norm, self.dropout = config.pre_norm, config.dropout
        self.blocks = nn.ModuleList(AttentionBlock(config, block.split("|"))
                                    for block in config.layout.split(","))
        self.fc1 = nn.Linear(config.dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=LN_EPS)

    def forward(self, x, pad, shape):  # (B, N, d)
        for block in self.blocks:
            x = block(x, pad, shape)
        hidden = self.fc1(self.norm(x) if self.pre_norm else x)  # (B, N, m)
        y = kernels.gelu_linear(hidden, self.fc2)  # (B, N, d)
        x = x + kernels.dropout(y, self.dropout, self.training)
        return x if self.pre_norm else self.norm(x)


class VideoTransformer(nn.Module):
    """The backbone: tokens (B, T, H, W) -> CLS (B, d) and features (B, T, H, W, d)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size + SPECIAL, config.dim)
        self.cls = nn.Parameter(torch.empty(config.dim))
        self.cls_position = nn.Parameter(torch.empty(config.dim))
        self.time = nn.Parameter(torch.empty(config.frames, config.dim))
        self.row = nn.Parameter(torch.empty(config.height, config.dim))
        self.column = nn.Parameter(torch.empty(config.width, config.dim))
        # Applied after the embedding or, with pre-LayerNorm, after the last layer.
        self.norm = nn.LayerNorm(config.dim, eps=LN_EPS)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.activation_checkpointing = False  # True: keep only each layer's input for backward
        self.reset_parameters()

    def reset_parameters(self):
        """Weights N(0, init_std), biases 0. The sum of the three position tables has init_std."""
        std = self.config.init_std
        init_weights(self, std)
        for table in (self.cls, self.cls_position):
            nn.init.normal_(table, std=std)
        for table in (self.time, self.row, self.column):
            nn.init.normal_(table, std=std / math.sqrt(3))
        if self.config.pre_norm:
            for layer in self.layers:
                residuals = len(self.layers) * (len(layer.blocks) + 1)
                for linear in [*(block.out for block in layer.blocks), layer.fc2]:
                    nn.init.normal_(linear.weight, std=std / math.sqrt(residuals))

    def embed(self, tokens):
        """Eq. 7, 8: token + time + row + column -> (B, N, d), CLS first with its own position."""
        x = self.embedding(tokens)  # (B, T, H, W, d)
        x = x + self.time[:, None, None] + self.row[:, None] + self.column
        cls = (self.cls + self.cls_position).expand(x.shape[0], 1, -1)  # (B, 1, d)
        x = torch.cat([cls.to(x.dtype), x.flatten(1, 3)], dim=1)  # (B, N, d)
        x = x if self.config.pre_norm else self.norm(x)
        return kernels.dropout(x, self.config.dropout, self.training)

    def forward(self, tokens, has_pad=None):
        """tokens: int64 (B, T, H, W), ids below V + 5 -> CLS (B, d), features (B, T, H, W, d).

        has_pad: whether any token is PAD. If None, it is computed from `tokens`, which synchronises
        with a GPU; under torch.compile and torch.export it is taken to be True.
        """
        shape = (self.config.frames, self.config.height, self.config.width)
        tracing = torch.compiler.is_compiling()
        if not tracing:
            check_tokens(tokens, shape, ids=len(self.embedding.weight))
        pad = tokens == self.config.vocab_size + PAD  # (B, T, H, W)
        if has_pad is None:
            has_pad = tracing or pad.any()
        pad = pad if has_pad else None
        x = self.embed(tokens)  # (B, N, d)
        for layer in self.layers:
            if self.activation_checkpointing:
                x = kernels.activation_checkpoint(layer, x, pad, shape)
            else:
                x = layer(x, pad, shape)
        x = self.norm(x) if self.config.pre_norm else x
        cls, features = kernels.split_first(x, dim=1)
        return cls, features.unflatten(1, shape)

    def compile_layers(self):
        """torch.compile for each layer. The layers are alike and share one compilation."""
        for layer in self.layers:
            layer.compile(dynamic=False)

    @torch.no_grad()
    def resize(self, frames, height, width):
        """Interpolates each position table to a new clip size, in place. Returns self."""
        for name, size in (("time", frames), ("row", height), ("column", width)):
            setattr(self, name, nn.Parameter(resize_table(getattr(self, name), size)))
        self.config = replace(self.config, frames=frames, height=height, width=width)
        return self

    @classmethod
    def from_released(cls, state, **changes):
        """Pops the `backbone.*` tensors of a released `state`. changes: as in `load_backbone`.

        Raises KeyError for a tensor that is missing, UserError for one of `backbone.*` left over.
        """
        sizes, weights = released.take_backbone(state, LAYOUTS)
        model = cls(TransformerConfig(**{**sizes, **changes}))
        model.load_state_dict(weights)
        return model


class TokenHead(nn.Module):
    """Eq. 16, 17: features (..., d) -> logits (..., V + 5), tied to the token embedding."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=LN_EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size + SPECIAL))
        init_weights(self, config.init_std)

    def forward(self, features, embedding):
        """features: (..., d). embedding: the backbone's embedding.weight (V + 5, d)."""
        return kernels.aligned_linear(self.norm(F.gelu(self.dense(features))), embedding, self.bias)

    def load_released(self, state):
        """Pops the `mlm_head.*` tensors of a released `state`. Raises KeyError for a missing one.
        """
        self.load_state_dict(released.take_token_head(state))


def load_backbone(path, **changes):
    """A pre-trained transformer -> VideoTransformer.

    path: a checkpoint, ours or a released one, or the state dict of a backbone or of a whole model,
    saved with or without DistributedDataParallel and torch.compile.
    changes: fields of the TransformerConfig to override, such as dropout. The shapes in a state
    dict do not determine heads, layout and pre_norm: pass those that differ from the paper's.
    Raises UserError, naming the file and a tensor, if the weights do not fit.
    """
    sizes, weights = read_backbone(path, LAYOUTS, changes)
    model = VideoTransformer(rebuilt(TransformerConfig, {**sizes, **changes}, path))
    load_weights(model, weights, path)
    return model


# Table, name, differences from small (T = 5, S = 128), the paper's parameters in millions
PAPER_SIZES = [
    ("Table 3, 13", "small, T,H|W", {}, 29.4),
    ("Table 6", "6 layers, d = 768", dict(dim=768, heads=12, mlp_dim=3072), 63.0),
    ("Table 6", "12 layers, d = 512", dict(layers=12), 54.7),
    ("Table 3", "base", dict(layers=12, dim=768, heads=12, mlp_dim=3072), 119.7),
    ("Table 3", "large (half)", dict(layers=24, dim=1024, heads=16, head_dim=32), 210.1),
    ("Table 13", "small, TxHxW", dict(layout="TxHxW"), 23.1),
    ("Table 13", "small, T,H,W", dict(layout="T,H,W"), 35.8),
    ("Table 13", "small, T,HxW", dict(layout="T,HxW"), 27.1),
]


def count_parameters(config):
    """The number of a backbone's parameters, without allocating them -> int."""
    with torch.device("meta"):
        return sum(p.numel() for p in VideoTransformer(config).parameters())


def main():
    print("Millions of parameters of the backbone, heads not counted\n\n"
          "where         model                 paper   ours")
    for where, name, differences, paper in PAPER_SIZES:
        ours = count_parameters(TransformerConfig(**differences)) / 1e6
        print(f"{where:12s}  {name:20s}  {paper:5.1f}  {ours:5.1f}")
    print("\nT,HxW: by its description it has as many blocks, and so parameters, as T,H|W; "
          "its code was not released.")


if __name__ == "__main__":
    main()
