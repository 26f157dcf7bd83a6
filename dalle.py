"""The paper's own tokenizer: OpenAI's discrete VAE, read safely from the files that were released with DALL-E.

encoder.pkl and decoder.pkl are whole pickled modules. Unpickling such a file runs whatever it says, names classes of a
package that few have installed, and gives modules that today's PyTorch cannot run. Only its tensors are needed: the
unpickler here knows the few names that such a file holds, stands a plain record in for each class, and refuses every
other name.

Shapes: N frames, S frame side in pixels, V codes (8192 as released).
"""
import pickle
import struct
import zipfile
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
            "DoubleStorage": torch.float64, "LongStorage": torch.int64}
MODULES = {  # classes whose objects are read as plain records of their attributes
    "dall_e.encoder": {"Encoder", "EncoderBlock"}, "dall_e.decoder": {"Decoder", "DecoderBlock"},
    "dall_e.utils": {"Conv2d"}, "torch.nn.modules.container": {"Sequential"}, "torch.nn.modules.activation": {"ReLU"},
    "torch.nn.modules.pooling": {"MaxPool2d"}, "torch.nn.modules.upsampling": {"Upsample"},
    "torch.nn.modules.linear": {"Identity"}}


class Record:
    """Stands in for a pickled module: unpickling fills its __dict__ and runs nothing."""


class Tensor:
    """A tensor of the file whose numbers are read later: the old format keeps them behind the pickle."""

    def __init__(self, storage, offset, size, stride, *_):
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


class Unpickler(pickle.Unpickler):
    """Knows the names of MODULES, and what torch.save writes for tensors. Raises ValueError naming any other."""

    def find_class(self, module, name):
        if name in MODULES.get(module, ()):
            return Record
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = {("torch._utils", "_rebuild_tensor_v2"): Tensor, ("torch._utils", "_rebuild_tensor"): Tensor,
                 ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
                 ("collections", "OrderedDict"): OrderedDict, ("torch", "device"): lambda *_: None,
                 ("__builtin__", "set"): set, ("builtins", "set"): set}
        if (module, name) not in known:
            raise ValueError(f"the file names {module}.{name}, which no DALL-E encoder or decoder needs: not loaded")
        return known[module, name]

    def persistent_load(self, saved):
        if saved[0] == "module":  # a class, with its source: only the class counts
            return saved[1]
        if saved[0] != "storage":
            raise ValueError(f"the file holds {saved[0]!r} where a tensor's storage was expected: not loaded")
        return saved[2], saved[1]  # key, dtype


def read_module(path):
    """The tensors of a module pickled by torch.save, in its old or its zip format -> {name: tensor}.

    Raises ValueError, with the file's name, for a file that is neither or that names what it should not.
    """
    try:
        root, storages = _read_zip(path) if zipfile.is_zipfile(path) else _read_old(path)
    except (pickle.UnpicklingError, EOFError, struct.error, KeyError, IndexError, TypeError, AttributeError, ValueError,
            UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error if str(error).startswith('the file') else 'no module pickled by torch.save'}"
                         ) from error
    return {name: torch.as_strided(storages[t.storage[0]], t.size, t.stride, t.offset).clone()
            for name, t in _walk(root, "")}


def _read_zip(path):
    with zipfile.ZipFile(path) as archive:
        inside = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        with archive.open(inside) as file:
            unpickler = Unpickler(file)
            root = unpickler.load()
        folder = inside.removesuffix("data.pkl")
        storages = {key: _numbers(archive.read(f"{folder}data/{key}"), dtype)
                    for key, dtype in {t.storage for _, t in _walk(root, "")}}
    return root, storages


def _read_old(path):
    with open(path, "rb") as file:
        if Unpickler(file).load() != 0x1950a86a20f9469cfc6c:  # torch.save's mark
            raise ValueError("the file is not one of torch.save")
        Unpickler(file).load(), Unpickler(file).load()  # protocol version, the writer's machine
        root = Unpickler(file).load()
        dtypes = dict(t.storage for _, t in _walk(root, ""))
        storages = {}
        for key in Unpickler(file).load():
            count, = struct.unpack("<q", file.read(8))
            storages[key] = _numbers(file.read(count * dtypes[key].itemsize), dtypes[key])
    return root, storages


def _numbers(content, dtype):
    return torch.frombuffer(bytearray(content), dtype=dtype)


def _walk(module, prefix):
    """All tensors below a record -> (dotted name, Tensor), as state_dict names them."""
    if not isinstance(module, Record):
        raise ValueError("the file holds no module")
    for name, tensor in module.__dict__["_parameters"].items():
        if tensor is not None:
            yield prefix + name, tensor
    for name, child in module.__dict__["_modules"].items():
        yield from _walk(child, f"{prefix}{name}.")


# ---------------------------------------------------------------- the architecture


class Conv(nn.Conv2d):
    """A "same" padded convolution of the shape of a weight (n_out, n_in, k, k)."""

    def __init__(self, weight):
        super().__init__(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)


class Block(nn.Module):
    """id_path(x) + gain * (four times ReLU, convolution); the id path is a 1x1 convolution where the width changes."""

    def __init__(self, tensors, prefix, gain):
        super().__init__()
        self.gain = gain
        wide = tensors.get(f"{prefix}.id_path.w")
        self.id_path = nn.Identity() if wide is None else Conv(wide)
        self.res_path = nn.ModuleDict({f"conv_{i}": Conv(tensors[f"{prefix}.res_path.conv_{i}.w"])
                                       for i in (1, 2, 3, 4)})

    def forward(self, x):
        y = x
        for conv in self.res_path.values():
            y = conv(F.relu(y))
        return self.id_path(x) + self.gain * y


class Tower(nn.Module):
    """The encoder or the decoder: input convolution, groups of blocks with `between` them, ReLU, output convolution.

    Encoder: 7x7 (3 -> n), groups of n, 2n, 4n, 8n channels, max-pooling between, 1x1 (8n -> V).
    Decoder: 1x1 (V -> m), groups of 8n, 4n, 2n, n channels, x2 upsampling between, 1x1 (n -> 6).
    """

    def __init__(self, tensors, between):
        super().__init__()
        places = sorted({tuple(name.split(".")[1:3]) for name in tensors if name.startswith("blocks.group_")})
        gain = 1 / len(places) ** 2
        self.between = between
        self.input = Conv(tensors["blocks.input.w"])
        self.groups = nn.ModuleDict({group: nn.ModuleDict() for group, _ in places})
        for group, block in places:
            self.groups[group][block] = Block(tensors, f"blocks.{group}.{block}", gain)
        self.output = Conv(tensors["blocks.output.conv.w"])
        names = {name: name.removeprefix("blocks.").replace("output.conv.", "output.") for name in tensors}
        self.load_state_dict({
            ("groups." if ours.startswith("group_") else "") + ours[:-1] + {"w": "weight", "b": "bias"}[ours[-1]]:
            tensors[name].float() for name, ours in names.items()})

    def forward(self, x):
        return self.after_input(self.input(x))

    def after_input(self, x):
        for i, group in enumerate(self.groups.values()):
            x = self.between(x) if i else x
            for block in group.values():
                x = block(x)
        return self.output(F.relu(x))


def halve(x):
    return F.max_pool2d(x, 2)


def double(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


class DalleVAE(nn.Module):
    """8x8 pixels become one of V codes by the argmax of the encoder's logits. Half precision on a GPU."""

    def __init__(self, encoder, decoder=None):
        super().__init__()
        self.encoder, self.decoder = encoder.eval(), decoder and decoder.eval()
        self.vocab_size = encoder.output.out_channels

    @classmethod
    def from_pickles(cls, encoder, decoder=None):
        """From the released files (paths), without running anything they say; sizes are read off the tensors.

        decoder is needed for `decode` alone. Raises ValueError for a file that is no such module.
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
                raise ValueError(f"{path} is not a DALL-E {name}: {str(error).splitlines()[0]}") from error
            if towers[-1].input.kernel_size != (side, side):
                raise ValueError(f"{path} is not a DALL-E {name}: its first convolution is not {side}x{side}")
        return cls(*towers)

    @property
    def device(self):
        return self.encoder.input.weight.device

    def _half_on_gpu(self):
        return torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda")

    @torch.no_grad()
    def logits(self, frames):
        """uint8 (N, S, S, 3), S a multiple of 8 -> (N, V, S/8, S/8). Pixels in 0..1 are mapped to 0.1..0.9 first."""
        x = torch.as_tensor(frames, device=self.device).permute(0, 3, 1, 2).float() / 255  # (N, 3, S, S)
        with self._half_on_gpu():
            return self.encoder(0.8 * x + 0.1)

    def encode(self, frames):
        """uint8 (N, S, S, 3) -> int64 (N, S/8, S/8) below vocab_size."""
        return self.logits(frames).argmax(dim=1)

    @torch.no_grad()
    def statistics(self, tokens):
        """int64 (N, h, w) -> the decoder's six channels (N, 6, 8h, 8w). Raises ValueError without a decoder."""
        if self.decoder is None:
            raise ValueError("this tokenizer was loaded without decoder.pkl, so it cannot decode")
        first = self.decoder.input
        table = first.weight[:, :, 0, 0].t()  # (V, m): the 1x1 convolution of a one-hot is a look-up
        x = F.embedding(torch.as_tensor(tokens, device=self.device), table) + first.bias  # (N, h, w, m)
        with self._half_on_gpu():
            return self.decoder.after_input(x.permute(0, 3, 1, 2))

    def decode(self, tokens):
        """int64 (N, h, w) -> uint8 (N, 8h, 8w, 3): the sigmoid of the first three channels, mapped back."""
        x = (torch.sigmoid(self.statistics(tokens)[:, :3].float()) - 0.1) / 0.8
        return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
