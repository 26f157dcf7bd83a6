"""The paper's own tokenizer: OpenAI's discrete VAE, from the files released with DALL-E.

encoder.pkl and decoder.pkl are pickled modules of a package that few have installed.
plumbing/released.py reads their tensors and runs no code from them.

Shapes: N frames, S frame side in pixels, V codes (8192 as released).
"""
import torch
import torch.nn.functional as F
from torch import nn

from plumbing.cli import UserError
from plumbing.released import read_module
from plumbing.tokens import fingerprint


class Conv(nn.Conv2d):
    """A "same" padded convolution for a weight of shape (n_out, n_in, k, k)."""

    def __init__(self, weight):
        n_out, n_in, side, _ = weight.shape
        super().__init__(n_in, n_out, side, padding=side // 2)


class Block(nn.Module):
    """id_path(x) + gain * (four times ReLU, convolution).

    The id path is a 1x1 convolution if the width changes.
    """

    def __init__(self, tensors, prefix, gain):
        super().__init__()
        self.gain = gain
        weight = tensors.get(f"{prefix}.id_path.w")
        self.id_path = nn.Identity() if weight is None else Conv(weight)
        self.res_path = nn.ModuleDict({
            f"conv_{i}": Conv(tensors[f"{prefix}.res_path.conv_{i}.w"]) for i in (1, 2, 3, 4)})

    def forward(self, x):
        y = x
        for conv in self.res_path.values():
            y = conv(F.relu(y))
        return self.id_path(x) + self.gain * y


class Tower(nn.Module):
    """The encoder or the decoder: a convolution, groups of blocks, ReLU, a convolution.

    between: a function applied between the groups.
    Encoder: 7x7 (3 -> n), groups of n, 2n, 4n, 8n channels, max-pooling between, 1x1 (8n -> V).
    Decoder: 1x1 (V -> m), groups of 8n, 4n, 2n, n channels, x2 upsampling between, 1x1 (n -> 6).
    """

    def __init__(self, tensors, between):
        super().__init__()
        blocks = sorted({tuple(name.split(".")[1:3])
                         for name in tensors if name.startswith("blocks.group_")})
        gain = 1 / len(blocks) ** 2
        self.between = between
        self.input = Conv(tensors["blocks.input.w"])
        self.groups = nn.ModuleDict({group: nn.ModuleDict() for group, _ in blocks})
        for group, block in blocks:
            self.groups[group][block] = Block(tensors, f"blocks.{group}.{block}", gain)
        self.output = Conv(tensors["blocks.output.conv.w"])
        self.load_state_dict({our_name(name): tensor.float() for name, tensor in tensors.items()})

    def forward(self, x):
        return self.after_input(self.input(x))

    def after_input(self, x):
        for i, group in enumerate(self.groups.values()):
            x = self.between(x) if i else x
            for block in group.values():
                x = block(x)
        return self.output(F.relu(x))


def our_name(name):
    """The name of a released tensor, such as blocks.group_1.block_1.id_path.w, in a Tower."""
    name = name.removeprefix("blocks.").replace("output.conv.", "output.")
    if name.startswith("group_"):
        name = "groups." + name
    return name[:-1] + {"w": "weight", "b": "bias"}[name[-1]]


def halve(x):
    return F.max_pool2d(x, 2)


def double(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


class DalleVAE(nn.Module):
    """8x8 pixels become one of V codes: the argmax of the encoder's logits.

    It computes in half precision on a GPU, where a few tokens may differ from those of a CPU.
    """

    def __init__(self, encoder, decoder=None):
        super().__init__()
        self.encoder = encoder.eval()
        self.decoder = decoder and decoder.eval()
        self.vocab_size = encoder.output.out_channels

    @classmethod
    def from_pickles(cls, encoder, decoder=None):
        """Reads the released files (paths) without running code from them.

        Only `decode` needs the decoder. Raises UserError for a file that is not such a module.
        """
        towers = []
        for path, between in ((encoder, halve), (decoder, double)):
            if path is None:
                continue
            name, side = ("encoder", 7) if between is halve else ("decoder", 1)
            tensors = read_module(path)
            try:
                towers.append(Tower(tensors, between))
            except (KeyError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{path} is not a DALL-E {name}: {reason}") from error
            if towers[-1].input.kernel_size != (side, side):
                raise UserError(f"{path} is not a DALL-E {name}: "
                                f"its first convolution is not {side}x{side}")
        return cls(*towers)

    @property
    def device(self):
        return self.encoder.input.weight.device

    @property
    def fingerprint(self):
        """Of the encoder, which makes the tokens."""
        weights = {f"encoder.{name}": weight for name, weight in self.encoder.state_dict().items()}
        return fingerprint(weights)

    def half_on_gpu(self):
        return torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda")

    @torch.no_grad()
    def logits(self, frames):
        """uint8 (N, S, S, 3), S a multiple of 8 -> (N, V, S/8, S/8).

        Pixels in 0..1 are first mapped to 0.1..0.9.
        """
        x = torch.as_tensor(frames, device=self.device).permute(0, 3, 1, 2)  # (N, 3, S, S)
        with self.half_on_gpu():
            return self.encoder(0.8 * (x.float() / 255) + 0.1)

    def encode(self, frames):
        """uint8 (N, S, S, 3) -> int64 (N, S/8, S/8) below vocab_size."""
        return self.logits(frames).argmax(dim=1)

    @torch.no_grad()
    def statistics(self, tokens):
        """int64 (N, h, w) -> the decoder's six channels (N, 6, 8h, 8w).

        Raises UserError without a decoder.
        """
        if self.decoder is None:
            raise UserError("this tokenizer was loaded without decoder.pkl, so it cannot decode")
        first = self.decoder.input
        table = first.weight[:, :, 0, 0].t()  # (V, m): the 1x1 convolution of a one-hot
        tokens = torch.as_tensor(tokens, device=self.device)
        x = F.embedding(tokens, table) + first.bias  # (N, h, w, m)
        with self.half_on_gpu():
            return self.decoder.after_input(x.permute(0, 3, 1, 2))

    def decode(self, tokens):
        """int64 (N, h, w) -> uint8 (N, 8h, 8w, 3), from the first three channels."""
        x = (torch.sigmoid(self.statistics(tokens)[:, :3].float()) - 0.1) / 0.8
        return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
