"""Tokens -> features: the factorised video transformer of Appendix A.

Attention over all T x H x W tokens at once costs their square. VIMPAC's default layout "T,H|W" attends along time,
then along the row and the column of the same frame; one CLS token joins every sequence and carries the whole clip.

    python transformer.py    the parameter counts of Tables 3, 6 and 13 beside ours

Shapes: B clips, T frames, H x W tokens a frame, N = 1 + T*H*W tokens with CLS first, d hidden size, A attention size
(heads * head_dim), P patterns side by side in a block, S sequences of L tokens in one pattern, a = head_dim.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from plumbing import released
from plumbing.checkpoints import load_weights, read_checkpoint, rebuilt
from plumbing.cli import UserError
from plumbing.kernels import again_in_backward, attention, dropout, gelu_linear
from plumbing.tokens import PAD, SPECIAL

LAYOUTS = ("T,H|W", "T|H|W", "T,H,W", "H|W,T", "T,HxW", "TxHxW")  # blocks at the commas, patterns at the bars
LN_EPS = 1e-12


@dataclass
class TransformerConfig:
    """The sizes of Table 3. Raises UserError where they do not fit together."""
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
    init_std: float = 0.02  # of the first weights; a Linear's output grows with sqrt(dim): narrow models need more

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise UserError(f"unknown layout {self.layout!r}: choose one of {', '.join(LAYOUTS)}")
        for patterns in (1 + block.count("|") for block in self.layout.split(",")):
            if self.heads % patterns:
                raise UserError(f"{self.heads} heads cannot be shared by {patterns} patterns: use a multiple")
        for name in ("layers", "dim", "heads", "head_dim", "mlp_dim", "frames", "height", "width", "vocab_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1 or not self.init_std > 0:
            raise UserError(f"dropout must lie in 0..1 and init_std above 0, not {self.dropout} and {self.init_std}")


def to_sequences(x, pattern):
    """(B, T, H, W, ...) -> (B, S, L, ...), a view: along the axes of a pattern, such as "T" or "HxW", lie sequences of
    L tokens; S stands for the other axes, one dimension each."""
    axes, last = _axes(pattern)
    return x.movedim(axes, last).flatten(last[0], 3)


def from_sequences(x, pattern, shape):
    """The way back: (B, S, L, ...) -> (B, T, H, W, ...), where shape is (T, H, W)."""
    axes, last = _axes(pattern)
    return x.unflatten(last[0], [shape[axis - 1] for axis in axes]).movedim(last, axes)


def _axes(pattern):
    """Which dimensions of (B, T, H, W) make up a sequence, and the last of these dimensions, as many."""
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
        self.qkv = nn.Linear(config.dim, 3 * attention_dim)  # every pattern's query, key and value, in this order
        self.out = nn.Linear(attention_dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=LN_EPS)

    def forward(self, x, pad, shape):
        """x: (B, N, d), CLS first. pad: bool (B, T, H, W), True = PAD, or None. shape: (T, H, W)."""
        x = self.norm(x) if self.pre_norm else x  # the residual, too, is then the normalised input, as released
        y = self.out(self.attend_all(x, pad, shape))  # (B, N, d)
        x = x + dropout(y, self.dropout, self.training)
        return x if self.pre_norm else self.norm(x)

    def attend_all(self, x, pad, shape):
        """Eq. 11: all patterns side by side, (B, N, d) -> (B, N, A)."""
        qkv = self.qkv(x).chunk(len(self.patterns), dim=-1)  # P times (B, N, 3A/P)
        parts = zip(*(self.attend(part, pad, shape, pattern) for part, pattern in zip(qkv, self.patterns)))
        cls, tokens = (torch.cat(kind, dim=-2) for kind in parts)  # (B, heads, a), (B, T, H, W, heads, a)
        return torch.cat([cls.flatten(1)[:, None], tokens.flatten(4).flatten(1, 3)], dim=1)

    def attend(self, qkv, pad, shape, pattern):
        """One pattern: every sequence along its axes attends to itself and to CLS.

        qkv: (B, N, 3A/P) -> CLS (B, heads, a), tokens (B, T, H, W, heads, a).
        """
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, a)
        tokens = to_sequences(qkv[:, 1:].unflatten(1, shape), pattern)  # (B, S, L, 3, heads, a)
        tokens = tokens.movedim(-3, 0).transpose(-2, -3)  # (3, B, S, heads, L, a)
        cls = qkv[:, 0].transpose(0, 1)  # (3, B, heads, a): computed once, not for every sequence
        cls = cls.unflatten(1, (-1,) + (1,) * (tokens.dim() - 5)).unsqueeze(-2)  # (3, B, 1, heads, 1, a)
        q, k, v = torch.cat([cls.expand(*tokens.shape[:-2], 1, -1), tokens], dim=-2)  # (B, S, heads, 1 + L, a) each
        ignore = None if pad is None else F.pad(to_sequences(pad, pattern), (1, 0))  # (B, S, 1 + L), CLS is never PAD
        out = attention(q, k, v, ignore, self.dropout * self.training)  # (B, S, heads, 1 + L, a)
        cls = out[..., 0, :].reshape(len(out), -1, self.heads, out.shape[-1]).mean(dim=1)  # (B, heads, a): Eq. 15
        return cls, from_sequences(out[..., 1:, :].transpose(-2, -3), pattern, shape)


class Layer(nn.Module):
    """Eq. 12-14: the layout's attention blocks one after the other, then the MLP."""

    def __init__(self, config):
        super().__init__()
        self.pre_norm, self.dropout = config.pre_norm, config.dropout
        self.blocks = nn.ModuleList(AttentionBlock(config, block.split("|")) for block in config.layout.split(","))
        self.expand = nn.Linear(config.dim, config.mlp_dim)
        self.contract = nn.Linear(config.mlp_dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=LN_EPS)

    def forward(self, x, pad, shape):  # (B, N, d)
        for block in self.blocks:
            x = block(x, pad, shape)
        y = gelu_linear(self.expand(self.norm(x) if self.pre_norm else x), self.contract)  # (B, N, m), then (B, N, d)
        x = x + dropout(y, self.dropout, self.training)
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
        self.norm = nn.LayerNorm(config.dim, eps=LN_EPS)  # after the embedding; pre-LayerNorm: at the very end
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.recompute = False  # True: keep only each layer's input, compute the rest again in the backward pass
        self.reset_parameters()

    def reset_parameters(self):
        """Weights N(0, init_std), biases 0; the three position tables together as wide as one N(0, init_std)."""
        init_weights(self, self.config.init_std)
        for table, summed in ((self.cls, 1), (self.cls_position, 1), (self.time, 3), (self.row, 3), (self.column, 3)):
            nn.init.normal_(table, std=self.config.init_std / math.sqrt(summed))
        if self.config.pre_norm:
            for layer in self.layers:
                residuals = len(self.layers) * (len(layer.blocks) + 1)
                for linear in [block.out for block in layer.blocks] + [layer.contract]:
                    nn.init.normal_(linear.weight, std=self.config.init_std / math.sqrt(residuals))

    def embed(self, tokens):
        """Eq. 7, 8: token + time + row + column, CLS first with a position of its own. -> (B, N, d)"""
        x = self.embedding(tokens)  # (B, T, H, W, d)
        x = x + self.time[:, None, None] + self.row[:, None] + self.column
        cls = (self.cls + self.cls_position).expand(len(x), 1, -1)  # (B, 1, d)
        x = torch.cat([cls.to(x.dtype), x.flatten(1, 3)], dim=1)  # (B, N, d)
        x = x if self.config.pre_norm else self.norm(x)
        return dropout(x, self.config.dropout, self.training)

    def forward(self, tokens, padded=None):
        """tokens: int64 (B, T, H, W), ids below vocab_size + 5 -> cls (B, d), features (B, T, H, W, d).

        padded says whether any token is PAD; None looks, which on a GPU waits for the device.
        Raises UserError for another clip size than the configuration's, and on a CPU for ids out of range.
        """
        shape = (self.config.frames, self.config.height, self.config.width)
        if tokens.shape[1:] != shape:
            raise UserError(f"the model takes clips of {shape} tokens, not {tuple(tokens.shape[1:])}: see its resize")
        if tokens.device.type == "cpu" and not 0 <= tokens.min() <= tokens.max() < len(self.embedding.weight):
            raise UserError(f"token ids lie in 0..{len(self.embedding.weight) - 1}, "
                            f"not {tokens.min().item()}..{tokens.max().item()}")
        pad = tokens == self.config.vocab_size + PAD  # (B, T, H, W)
        if not (pad.any() if padded is None else padded):
            pad = None
        x = self.embed(tokens)  # (B, N, d)
        for layer in self.layers:
            x = again_in_backward(layer, x, pad, shape) if self.recompute else layer(x, pad, shape)
        x = self.norm(x) if self.config.pre_norm else x
        return x[:, 0], x[:, 1:].unflatten(1, shape)

    def compile_layers(self):
        """torch.compile on each layer: they are alike and share one compilation. Only training runs compiled."""
        for layer in self.layers:
            layer.compile(dynamic=False)

    @torch.no_grad()
    def resize(self, frames, height, width):
        """Interpolates each position table linearly along its own axis to a new clip size. Returns self."""
        for name, size in (("time", frames), ("row", height), ("column", width)):
            setattr(self, name, nn.Parameter(resize_table(getattr(self, name), size)))
        self.config = replace(self.config, frames=frames, height=height, width=width)
        return self

    @classmethod
    def from_released(cls, state, **changes):
        """A backbone from the `backbone.*` tensors of a released checkpoint, which are taken out of `state`.

        Sizes and layout are read off the keys and shapes; changes: fields of the TransformerConfig to set otherwise.
        Raises KeyError naming the first key that is missing, UserError naming one that is left over.
        """
        config = TransformerConfig(**{**released.transformer_sizes(state, LAYOUTS), **changes})
        model = cls(config)
        model.load_state_dict(released.take_backbone(state, config.layers, config.layout, config.pre_norm))
        return model


class TokenHead(nn.Module):
    """Eq. 16, 17: features (..., d) -> logits (..., V + 5); the last matrix is the token embedding itself."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=LN_EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size + SPECIAL))
        init_weights(self, config.init_std)

    def forward(self, features, embedding):
        """features: (..., d). embedding: the backbone's embedding.weight (V + 5, d)."""
        return F.linear(self.norm(F.gelu(self.dense(features))), embedding, self.bias)

    def load_released(self, state):
        """Takes `mlm_head.*` out of a released checkpoint's tensors. KeyError names a key that is missing."""
        self.load_state_dict(released.take_token_head(state))


def init_weights(model, std):
    """App. A, where std is 0.02: weights N(0, std), biases 0, LayerNorm 1 and 0 (torch's own start)."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def resize_table(table, size):
    """Linear interpolation of a (n, d) table to (size, d), pixel centres kept (align_corners=False)."""
    if len(table) == size:
        return table.clone()
    return F.interpolate(table.t()[None].float(), size=size, mode="linear", align_corners=False)[0].t().contiguous()


def load_backbone(path, **changes):
    """The pre-trained transformer in a checkpoint of ours or in a released one -> VideoTransformer.

    changes: fields of its TransformerConfig to set otherwise, such as dropout. UserError names any other file.
    """
    checkpoint = read_checkpoint(path)
    if "transformer" not in checkpoint:
        with released.reading(path):
            return VideoTransformer.from_released(checkpoint, **changes)
    model = VideoTransformer(rebuilt(TransformerConfig, {**checkpoint["transformer"], **changes}, path))
    load_weights(model, {key.removeprefix("backbone."): value for key, value in checkpoint["model"].items()
                         if key.startswith("backbone.")}, path)
    return model


PAPER_SIZES = [  # where, name, differences from the small preset (T = 5, S = 128), the paper's millions of parameters
    ("Table 3, 13", "small, T,H|W", {}, 29.4),
    ("Table 6", "6 layers, d = 768", dict(dim=768, heads=12, mlp_dim=3072), 63.0),
    ("Table 6", "12 layers, d = 512", dict(layers=12), 54.7),
    ("Table 3", "base", dict(layers=12, dim=768, heads=12, mlp_dim=3072), 119.7),
    ("Table 3", "large (half)", dict(layers=24, dim=1024, heads=16, head_dim=32), 210.1),
    ("Table 13", "small, TxHxW", dict(layout="TxHxW"), 23.1),
    ("Table 13", "small, T,H,W", dict(layout="T,H,W"), 35.8),
    ("Table 13", "small, T,HxW", dict(layout="T,HxW"), 27.1)]


def count_parameters(config):
    """How many parameters a backbone has, without building its tensors -> int."""
    with torch.device("meta"):
        return sum(p.numel() for p in VideoTransformer(config).parameters())


def main():
    print("Millions of parameters of the backbone, heads not counted\n")
    print("where         model                 paper   ours")
    for where, name, differences, paper in PAPER_SIZES:
        print(f"{where:12s}  {name:20s}  {paper:5.1f}  {count_parameters(TransformerConfig(**differences)) / 1e6:5.1f}")
    print("\nT,HxW: by its description it has as many blocks, and so parameters, as T,H|W; its code was not released.")


if __name__ == "__main__":
    main()
