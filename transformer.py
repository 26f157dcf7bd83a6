"""Tokens -> features: the factorised video transformer of Appendix A.

Attention over all T x H x W tokens at once costs their square. VIMPAC's default layout "T,H|W" attends along time,
then along the row and the column of the same frame; one CLS token joins every sequence and carries the whole clip.

    python transformer.py    the parameter counts of Tables 3, 6 and 13 beside ours

Shapes: B clips, T frames, H x W tokens a frame, N = 1 + T*H*W tokens with CLS first, d hidden size, A attention size
(heads * head_dim), P patterns side by side in a block, S sequences of L tokens in one pattern.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SPECIAL = 5  # rows of the embedding after the codes
FUSED = ("cuda",)  # devices that take one attention kernel; CPUs are faster with two products of many small matrices
MOST_SEQUENCES = 65_535  # of one attention kernel: the largest size of a CUDA grid beyond its first dimension
PAD = 1  # the id of padding, counted from vocab_size: 8193 with the paper's 8192 codes
LAYOUTS = ("T,H|W", "T|H|W", "T,H,W", "H|W,T", "T,HxW", "TxHxW")  # blocks at the commas, patterns at the bars
LN_EPS = 1e-12


@dataclass
class TransformerConfig:
    """The sizes of Table 3. Raises ValueError where they do not fit together."""
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

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f"unknown layout {self.layout!r}: choose one of {', '.join(LAYOUTS)}")
        for block in self.layout.split(","):
            patterns = len(block.split("|"))
            if self.heads % patterns:
                raise ValueError(f"{self.heads} heads cannot be shared by the {patterns} patterns of {block!r}: "
                                 f"use a multiple of {patterns}")
        for name in ("layers", "dim", "heads", "head_dim", "mlp_dim", "frames", "height", "width", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in 0..1, not {self.dropout}")


def dropout(x, p, training):
    """F.dropout. On a CPU drawing its random numbers would take longer than attention itself: here one draw gives the
    numbers of four elements, 16 bits each, and the mask kept for the backward pass has one byte an element."""
    if x.device.type != "cpu" or not training or p == 0:
        return F.dropout(x, p, training)
    dropped = round(p * 2**16)  # of the 2**16 numbers
    numbers = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
    keep = numbers[:x.numel()].view(x.shape) >= dropped - 2**15
    return (x * keep).mul_(2**16 / (2**16 - dropped))


def fused_attention(q, k, v, p):
    """softmax(q k^T / sqrt(a)) v in one kernel: q, k, v (B, S, heads, L, a) -> the same; S any number of dimensions.

    p: dropout of the probabilities. Some CUDA kernels cannot be launched on more sequences than MOST_SEQUENCES.
    """
    parts = zip(*(x.flatten(0, -4).split(MOST_SEQUENCES) for x in (q, k, v)))  # (<= 65535, heads, L, a) each
    out = [F.scaled_dot_product_attention(*part, dropout_p=p) for part in parts]
    return (out[0] if len(out) == 1 else torch.cat(out)).unflatten(0, q.shape[:-3])


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
        out = self.out(self.attention(self.norm(x) if self.pre_norm else x, pad, shape))  # (B, N, d)
        x = x + dropout(out, self.dropout, self.training)
        return x if self.pre_norm else self.norm(x)

    def attention(self, x, pad, shape):
        """All patterns side by side: (B, N, d) -> (B, N, A)."""
        qkv = self.qkv(x).chunk(len(self.patterns), dim=-1)  # P times (B, N, 3A/P)
        parts = zip(*(self.attend(part, pad, shape, pattern) for part, pattern in zip(qkv, self.patterns)))
        cls, tokens = (torch.cat(kind, dim=-2) for kind in parts)  # (B, heads, a), (B, T, H, W, heads, a)
        return torch.cat([cls.flatten(1)[:, None], tokens.flatten(4).flatten(1, 3)], dim=1)

    def attend(self, qkv, pad, shape, pattern):
        """One pattern: every sequence along its axes attends to itself and to CLS.

        qkv: (B, N, 3A/P). -> CLS (B, heads, a), tokens (B, T, H, W, heads, a). In the shapes below, S are the other
        axes, one dimension each.
        """
        axes = [1 + "THW".index(axis) for axis in pattern.split("x")]  # the dimensions that make up a sequence
        others = [axis for axis in (1, 2, 3) if axis not in axes]
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, a)
        tokens = qkv[:, 1:].unflatten(1, shape)  # (B, T, H, W, 3, heads, a)
        tokens = tokens.permute(4, 0, *others, 5, *axes, 6)  # (3, B, S, heads, axes, a)
        lengths = tokens.shape[-1 - len(axes):-1]
        tokens = tokens.flatten(-1 - len(axes), -2)  # (3, B, S, heads, L, a)
        cls = qkv[:, 0].transpose(0, 1).unflatten(1, (-1,) + (1,) * len(others)).unsqueeze(-2)  # (3, B, 1, heads, 1, a)
        cls = cls.expand(*tokens.shape[:-2], 1, -1)  # computed once, not for every sequence
        q, k, v = torch.cat([cls, tokens], dim=-2).unbind(0)  # (B, S, heads, 1 + L, a) each
        if q.device.type in FUSED and pad is None:
            out = fused_attention(q, k, v, self.dropout * self.training)
        else:
            scores = (q @ k.transpose(-1, -2)).div_(math.sqrt(q.shape[-1]))  # (B, S, heads, 1 + L, 1 + L)
            if pad is not None:
                ignore = pad.permute(0, *others, *axes).flatten(1 + len(others))[..., None, None, :]  # (B, S, 1, 1, L)
                scores = scores.masked_fill(F.pad(ignore, (1, 0)), float("-inf"))  # CLS is never PAD
            out = dropout(scores.softmax(dim=-1), self.dropout, self.training) @ v  # (B, S, heads, 1 + L, a)
        cls = out[..., 0, :].reshape(len(out), -1, self.heads, out.shape[-1]).mean(dim=1)  # (B, heads, a): Eq. 15
        back = [[0, *others, 4, *axes, 5].index(axis) for axis in range(6)]
        tokens = out[..., 1:, :].unflatten(-2, lengths).permute(back)  # (B, T, H, W, heads, a)
        return cls, tokens


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
        hidden = self.expand(self.norm(x) if self.pre_norm else x)  # (B, N, m)
        # GELU is computed again in the backward pass rather than kept: a seventh of a layer's memory for little time
        y = checkpoint(lambda h: self.contract(F.gelu(h)), hidden, use_reentrant=False, preserve_rng_state=False)
        x = x + dropout(y, self.dropout, self.training)
        return x if self.pre_norm else self.norm(x)


class VideoTransformer(nn.Module):
    """The backbone: tokens (B, T, H, W) -> CLS (B, d) and features (B, T, H, W, d)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size + SPECIAL, config.dim)
        self.cls = nn.Parameter(torch.empty(config.dim))
        self.cls_position = nn.Parameter(torch.zeros(config.dim))
        self.time = nn.Parameter(torch.empty(config.frames, config.dim))
        self.row = nn.Parameter(torch.empty(config.height, config.dim))
        self.column = nn.Parameter(torch.empty(config.width, config.dim))
        self.norm = nn.LayerNorm(config.dim, eps=LN_EPS)  # after the embedding; pre-LayerNorm: at the very end
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.reset_parameters()

    def reset_parameters(self):
        """Weights N(0, 0.02), biases 0; the three position tables together as wide as one N(0, 0.02)."""
        self.apply(init_weights)
        nn.init.normal_(self.cls, std=0.02)
        for table in (self.time, self.row, self.column):
            nn.init.normal_(table, std=0.02 / math.sqrt(3))
        if self.config.pre_norm:  # the residual stream is never normalised, so its additions start small
            for layer in self.layers:
                residuals = len(self.layers) * (len(layer.blocks) + 1)
                for linear in [block.out for block in layer.blocks] + [layer.contract]:
                    nn.init.normal_(linear.weight, std=0.02 / math.sqrt(residuals))

    def embed(self, tokens):
        """Eq. 7, 8: token + time + row + column, CLS first with a position of its own. -> (B, N, d)"""
        x = self.embedding(tokens)  # (B, T, H, W, d)
        x = x + self.time[:, None, None] + self.row[:, None] + self.column
        cls = (self.cls + self.cls_position).expand(len(x), 1, -1)  # (B, 1, d)
        x = torch.cat([cls.to(x.dtype), x.flatten(1, 3)], dim=1)  # (B, N, d)
        if not self.config.pre_norm:
            x = self.norm(x)
        return dropout(x, self.config.dropout, self.training)

    def forward(self, tokens, padded=None):
        """tokens: int64 (B, T, H, W), ids below vocab_size + 5 -> cls (B, d), features (B, T, H, W, d).

        padded says whether any token is PAD; None looks, which on a GPU waits for the device.
        Raises ValueError for another clip size than the configuration's, and on a CPU for ids out of range.
        """
        shape = (self.config.frames, self.config.height, self.config.width)
        if tokens.shape[1:] != shape:
            raise ValueError(f"the model takes clips of {shape} tokens (frames, height, width), "
                             f"not {tuple(tokens.shape[1:])}: see VideoTransformer.resize")
        if tokens.device.type == "cpu" and not 0 <= tokens.min() <= tokens.max() < len(self.embedding.weight):
            raise ValueError(f"token ids lie in 0..{len(self.embedding.weight) - 1}, "
                             f"not {tokens.min().item()}..{tokens.max().item()}")
        pad = tokens == self.config.vocab_size + PAD  # (B, T, H, W)
        if padded is None:
            padded = bool(pad.any())
        x = self.embed(tokens)  # (B, N, d)
        for layer in self.layers:
            x = layer(x, pad if padded else None, shape)
        if self.config.pre_norm:
            x = self.norm(x)
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
    def from_released(cls, state):
        """A backbone from the `backbone.*` tensors of a released checkpoint, which are taken out of `state`.

        Sizes, layout and LayerNorm placement are read off the keys and shapes; heads are d / 64, as released.
        Raises KeyError naming the first key that is missing, ValueError naming one that is left over.
        """
        config = released_config(state)
        model = cls(config)
        attention = config.heads * config.head_dim
        take = state.pop
        parts = {"cls": take("backbone.cls_param"), "embedding.weight": take("backbone.embedding.weight"),
                 "cls_position": take("backbone.positional_embedding.cls_pos_embedding").flatten()}
        for ours, theirs in (("time", "temporal"), ("row", "height"), ("column", "width")):
            parts[ours] = take(f"backbone.positional_embedding.{theirs}_pos_embedding")
        end = "ln_post" if config.pre_norm else "ln_pre"
        for kind in ("weight", "bias"):
            parts[f"norm.{kind}"] = take(f"backbone.{end}.{kind}")
            for i, layer in enumerate(model.layers):
                theirs, ours = f"backbone.transformer.resblocks.{i}", f"layers.{i}"
                for b, block in enumerate(layer.blocks):
                    inner = f"{theirs}.attention_blocks.{b}"
                    out = inner if config.pre_norm else f"{inner}.output"
                    parts[f"{ours}.blocks.{b}.qkv.{kind}"] = torch.cat([
                        take(f"{inner}.attentions.{p}.attention.{which}.{kind}")
                        for p in range(len(block.patterns)) for which in ("query", "key", "value")])
                    parts[f"{ours}.blocks.{b}.out.{kind}"] = take(f"{out}.dense.{kind}")
                    parts[f"{ours}.blocks.{b}.norm.{kind}"] = take(f"{out}.LayerNorm.{kind}")
                parts[f"{ours}.expand.{kind}"] = take(f"{theirs}.mlp.c_fc.{kind}")
                parts[f"{ours}.contract.{kind}"] = take(f"{theirs}.mlp.c_proj.{kind}")
                parts[f"{ours}.norm.{kind}"] = take(f"{theirs}.ln.{kind}")
        left = [key for key in state if key.startswith("backbone.")]
        if left:
            raise ValueError(f"this backbone has no place for {left[0]}")
        model.load_state_dict(parts)
        return model


class TokenHead(nn.Module):
    """Eq. 16, 17: features (..., d) -> logits (..., V + 5); the last matrix is the token embedding itself."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=LN_EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size + SPECIAL))
        self.apply(init_weights)

    def forward(self, features, embedding):
        """features: (..., d). embedding: the backbone's embedding.weight (V + 5, d)."""
        return F.linear(self.norm(F.gelu(self.dense(features))), embedding, self.bias)

    def load_released(self, state):
        """Takes `mlm_head.*` out of a released checkpoint's tensors. KeyError names a key that is missing."""
        names = {"dense": "transform.0", "norm": "transform.2"}
        parts = {f"{ours}.{kind}": state.pop(f"mlm_head.{theirs}.{kind}")
                 for ours, theirs in names.items() for kind in ("weight", "bias")}
        self.load_state_dict({**parts, "bias": state.pop("mlm_head.bias")})
        state.pop("mlm_head.decoder.bias", None)  # tied: the same tensors under a second name
        state.pop("mlm_head.decoder.weight", None)


def init_weights(module):
    """App. A: weights N(0, 0.02), biases 0, LayerNorm 1 and 0 (torch's own start)."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def resize_table(table, size):
    """Linear interpolation of a (n, d) table to (size, d), pixel centres kept (align_corners=False)."""
    if len(table) == size:
        return table.clone()
    return F.interpolate(table.t()[None].float(), size=size, mode="linear", align_corners=False)[0].t().contiguous()


def released_config(state):
    """The configuration of a released checkpoint, read off its keys and shapes -> TransformerConfig.

    Raises ValueError for an arrangement of attention blocks that no layout has.
    """
    prefix = "backbone.transformer.resblocks."
    places = [key[len(prefix):].split(".") for key in state if key.startswith(prefix)]
    queries = {(int(p[0]), int(p[2]), int(p[4])) for p in places if p[1] == "attention_blocks" and p[3] == "attentions"}
    blocks = 1 + max((q[1] for q in queries), default=-1)
    patterns = [sum(q[:2] == (0, block) for q in queries) for block in range(blocks)]  # of the first layer
    layout = next((name for name in LAYOUTS
                   if [len(block.split("|")) for block in name.split(",")] == patterns), None)
    if layout is None:
        raise ValueError(f"no layout has attention blocks of {patterns} patterns")
    pre_norm = "backbone.ln_post.weight" in state
    dense = f"{prefix}0.attention_blocks.0.{'' if pre_norm else 'output.'}dense.weight"
    rows, dim = state["backbone.embedding.weight"].shape
    size = {axis: len(state[f"backbone.positional_embedding.{axis}_pos_embedding"])
            for axis in ("temporal", "height", "width")}
    heads = max(1, dim // 64)
    return TransformerConfig(
        layers=1 + max(q[0] for q in queries), dim=dim, heads=heads, head_dim=state[dense].shape[1] // heads,
        mlp_dim=len(state[f"{prefix}0.mlp.c_fc.weight"]), frames=size["temporal"], height=size["height"],
        width=size["width"], vocab_size=rows - SPECIAL, layout=layout, pre_norm=pre_norm)


def read_checkpoint(path):
    """A checkpoint's dictionary, read without running anything that the file says.

    Raises ValueError, naming the file, for a file that holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler meets damaged files with errors of many kinds
        raise ValueError(f"{path} is not a checkpoint of plain tensors ({type(error).__name__})") from error


def load_backbone(path):
    """The pre-trained transformer in a checkpoint of ours or in a released one -> VideoTransformer."""
    checkpoint = read_checkpoint(path)
    if "transformer" not in checkpoint:
        try:
            return VideoTransformer.from_released(checkpoint)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is neither a checkpoint of this project nor a released VIMPAC one: "
                             f"{f'it lacks {error}' if isinstance(error, KeyError) else error}") from error
    model = VideoTransformer(TransformerConfig(**checkpoint["transformer"]))
    model.load_state_dict({key.removeprefix("backbone."): value for key, value in checkpoint["model"].items()
                           if key.startswith("backbone.")})
    return model


PAPER_SIZES = [  # where, name, differences from the small preset (T = 5, S = 128), the paper's millions of parameters
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
    """How many parameters a backbone has, without building its tensors -> int."""
    with torch.device("meta"):
        return sum(p.numel() for p in VideoTransformer(config).parameters())


def main():
    print("Millions of parameters of the backbone, heads not counted\n")
    print("where         model                 paper   ours")
    for where, name, differences, paper in PAPER_SIZES:
        print(f"{where:12s}  {name:20s}  {paper:5.1f}  {count_parameters(TransformerConfig(**differences)) / 1e6:5.1f}")
    print("\nT,HxW: by its description the layout has as many blocks, and so parameters, as T,H|W; "
          "no code for it was released.")


if __name__ == "__main__":
    main()
