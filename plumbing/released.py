"""Files that others released: their names and shapes -> ours, and unpickling without running anything.

The VIMPAC checkpoints are plain state dicts. DALL-E's encoder.pkl and decoder.pkl are whole pickled modules: unpickling
one runs whatever it says, and takes classes of a package that few have installed. Only its tensors are needed. The
unpickler here knows the few names that such a file holds, stands a plain record in for each class, and refuses every
other name.
"""
import contextlib
import pickle
import struct
from collections import OrderedDict

import torch

from plumbing.cli import UserError
from plumbing.tokens import SPECIAL

# ---------------------------------------------------------------- VIMPAC's checkpoints


@contextlib.contextmanager
def reading(path):
    """Around what reads a released checkpoint: names the file, and the tensor that it lacks or that does not fit."""
    try:
        yield
    except (KeyError, UserError, RuntimeError) as error:
        raise UserError(f"{path} is neither a checkpoint of this project nor a released VIMPAC one: "
                        f"{'it lacks ' * isinstance(error, KeyError)}{str(error).splitlines()[-1].strip()}") from error


def transformer_sizes(state, layouts):
    """What the keys and shapes of a released checkpoint say of its backbone -> {field of TransformerConfig: value}.

    layouts: those to choose from; how many patterns each attention block has tells which. Heads are d / 64.
    Raises UserError for an arrangement of blocks that no layout has, KeyError naming a tensor that is missing.
    """
    prefix = "backbone.transformer.resblocks."
    places = [key[len(prefix):].split(".") for key in state if key.startswith(prefix)]
    queries = {(int(p[0]), int(p[2]), int(p[4])) for p in places if p[1] == "attention_blocks" and p[3] == "attentions"}
    blocks = 1 + max((q[1] for q in queries), default=-1)
    patterns = [sum(q[:2] == (0, block) for q in queries) for block in range(blocks)]  # of the first layer
    layout = next((name for name in layouts
                   if [len(block.split("|")) for block in name.split(",")] == patterns), None)
    if not patterns:
        raise UserError("it holds no transformer")
    if layout is None:
        raise UserError(f"no layout has attention blocks of {patterns} patterns")
    pre_norm = "backbone.ln_post.weight" in state
    dense = f"{prefix}0.attention_blocks.0.{'' if pre_norm else 'output.'}dense.weight"
    rows, dim = state["backbone.embedding.weight"].shape
    frames, height, width = (len(state[f"backbone.positional_embedding.{axis}_pos_embedding"])
                             for axis in ("temporal", "height", "width"))
    heads = max(1, dim // 64)
    return dict(layers=1 + max(q[0] for q in queries), dim=dim, heads=heads, head_dim=state[dense].shape[1] // heads,
                mlp_dim=len(state[f"{prefix}0.mlp.c_fc.weight"]), frames=frames, height=height, width=width,
                vocab_size=rows - SPECIAL, layout=layout, pre_norm=pre_norm)


def take_backbone(state, layers, layout, pre_norm):
    """The tensors of VideoTransformer; they are taken out of `state`.

    Raises KeyError naming the first key that is missing, UserError naming one that is left over.
    """
    take = state.pop
    ours = {"cls": take("backbone.cls_param"), "embedding.weight": take("backbone.embedding.weight"),
            "cls_position": take("backbone.positional_embedding.cls_pos_embedding").flatten()}
    for name, theirs in (("time", "temporal"), ("row", "height"), ("column", "width")):
        ours[name] = take(f"backbone.positional_embedding.{theirs}_pos_embedding")
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = take(f"backbone.{'ln_post' if pre_norm else 'ln_pre'}.{kind}")
        for i in range(layers):
            layer, name = f"backbone.transformer.resblocks.{i}", f"layers.{i}"
            for b, block in enumerate(layout.split(",")):
                inner = f"{layer}.attention_blocks.{b}"
                out = inner if pre_norm else f"{inner}.output"
                ours[f"{name}.blocks.{b}.qkv.{kind}"] = torch.cat([
                    take(f"{inner}.attentions.{p}.attention.{which}.{kind}")
                    for p in range(len(block.split("|"))) for which in ("query", "key", "value")])
                ours[f"{name}.blocks.{b}.out.{kind}"] = take(f"{out}.dense.{kind}")
                ours[f"{name}.blocks.{b}.norm.{kind}"] = take(f"{out}.LayerNorm.{kind}")
            for part, theirs in (("expand", "mlp.c_fc"), ("contract", "mlp.c_proj"), ("norm", "ln")):
                ours[f"{name}.{part}.{kind}"] = take(f"{layer}.{theirs}.{kind}")
    for key in state:
        if key.startswith("backbone."):
            raise UserError(f"this backbone has no place for {key}")
    return ours


def take_token_head(state):
    """The tensors of TokenHead; they are taken out of `state`. KeyError names one that is missing."""
    ours = {f"{name}.{kind}": state.pop(f"mlm_head.{theirs}.{kind}")
            for name, theirs in (("dense", "transform.0"), ("norm", "transform.2")) for kind in ("weight", "bias")}
    ours["bias"] = state.pop("mlm_head.bias")
    state.pop("mlm_head.decoder.bias", None)  # tied: the same tensors under a second name
    state.pop("mlm_head.decoder.weight", None)
    return ours


def take_projection_head(state):
    """The tensors of ProjectionHead, taken out of `state` -> sizes (dim, hidden, layers, out), tensors.

    KeyError names a tensor that is missing; layers and widths are read off the shapes.
    """
    name = "cls_head.mlp"
    layers = sum(key.startswith(f"{name}.linear_") and key.endswith(".weight") for key in state)
    hidden, dim = state[f"{name}.linear_0.weight"].shape
    ours = {"out.weight": state.pop(f"{name}.linear_{layers - 1}.weight")}
    for i in range(layers - 1):
        for kind in ("weight", "bias"):
            ours[f"hidden.{i}.{kind}"] = state.pop(f"{name}.linear_{i}.{kind}")
        for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            ours[f"norms.{i}.{kind}"] = state.pop(f"{name}.bn_{i}.{kind}")
    return (dim, hidden, layers, len(ours["out.weight"])), ours


# ---------------------------------------------------------------- DALL-E's pickled modules

STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
            "DoubleStorage": torch.float64, "LongStorage": torch.int64}
MODULES = {  # classes whose objects are read as plain records of their attributes
    "dall_e.encoder": {"Encoder", "EncoderBlock"}, "dall_e.decoder": {"Decoder", "DecoderBlock"},
    "dall_e.utils": {"Conv2d"}, "torch.nn.modules.container": {"Sequential"}, "torch.nn.modules.activation": {"ReLU"},
    "torch.nn.modules.pooling": {"MaxPool2d"}, "torch.nn.modules.upsampling": {"Upsample"},
    "torch.nn.modules.linear": {"Identity"}}


class Record:
    """Stands in for a pickled module: unpickling fills its __dict__ and runs nothing."""


class Unpickler(pickle.Unpickler):
    """Knows the names of MODULES, and what torch.save writes for tensors. Raises UserError naming any other."""

    def find_class(self, module, name):
        if name in MODULES.get(module, ()):
            return Record
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = {("torch._utils", "_rebuild_tensor_v2"): lambda *where: where[:4],  # of the numbers, which come later
                 ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
                 ("torch", "device"): lambda *_: None, ("collections", "OrderedDict"): OrderedDict,
                 ("__builtin__", "set"): set, ("builtins", "set"): set}
        if (module, name) not in known:
            raise UserError(f"the file names {module}.{name}, which no DALL-E encoder or decoder needs: not loaded")
        return known[module, name]

    def persistent_load(self, saved):
        if saved[0] == "module":  # a class, with its source: only the class counts
            return saved[1]
        if saved[0] != "storage":
            raise UserError(f"the file holds {saved[0]!r} where a tensor's storage was expected: not loaded")
        return saved[2], saved[1]  # key, dtype


def read_module(path):
    """The tensors of a module pickled by torch.save in its old format, not the zip -> {name: tensor}.

    Raises UserError, with the file's name, for any other file, and for one that names what it should not.
    """
    try:
        with open(path, "rb") as file:
            mark, _, _, root = (Unpickler(file).load() for _ in range(4))  # _: the format's version, the machine
            if mark != 0x1950a86a20f9469cfc6c:
                raise UserError("the file is not one of torch.save's old format")
            dtypes, numbers = dict(storage for _, (storage, *_) in _walk(root, "")), {}
            for key in Unpickler(file).load():
                count, = struct.unpack("<q", file.read(8))
                numbers[key] = torch.frombuffer(bytearray(file.read(count * dtypes[key].itemsize)), dtype=dtypes[key])
        return {name: torch.as_strided(numbers[storage[0]], size, stride, offset).clone()
                for name, (storage, offset, size, stride) in _walk(root, "")}
    except (pickle.UnpicklingError, EOFError, OSError, struct.error, LookupError, TypeError, AttributeError, ValueError,
            RuntimeError) as error:
        reason = "no module pickled by torch.save in its old format"
        raise UserError(f"{path}: {error if isinstance(error, (UserError, OSError)) else reason}") from error


def _walk(module, prefix):
    """All tensors below a record -> (dotted name, Tensor), as state_dict names them."""
    if not isinstance(module, Record):
        raise UserError("the file holds no module")
    for name, tensor in module.__dict__["_parameters"].items():
        if tensor is not None:
            yield prefix + name, tensor
    for name, child in module.__dict__["_modules"].items():
        yield from _walk(child, f"{prefix}{name}.")
