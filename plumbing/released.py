"""Files that others released: their names and shapes -> ours, unpickled without running anything.

The VIMPAC checkpoints are plain state dicts. DALL-E's encoder.pkl and decoder.pkl are whole pickled
modules: to unpickle one runs whatever it says, and needs a package that few have installed. Only
their tensors are of use. The unpickler here knows the few names that such a file holds, replaces
each class by a plain record, and refuses every other name.
"""
import contextlib
import pickle
import re
import struct
import zipfile
from collections import OrderedDict

import torch

from plumbing.cli import UserError
from plumbing.tokens import SPECIAL

# ---------------------------------------------------------------- VIMPAC's checkpoints

WRAPPERS = ("module", "_orig_mod")  # DistributedDataParallel's and torch.compile's
LAYERS = "backbone.transformer.resblocks"
QUERY = re.compile(rf"{LAYERS}\.(\d+)\.attention_blocks\.(\d+)\.attentions\.(\d+)\..*query.weight")


@contextlib.contextmanager
def reading(path):
    """Wraps code that reads a released checkpoint: its errors name the file and the tensor."""
    try:
        yield
    except (KeyError, UserError, RuntimeError) as error:
        lacks = "it lacks " if isinstance(error, KeyError) else ""
        reason = lacks + str(error).splitlines()[-1].strip()
        raise UserError(f"{path} holds no weights of this model, ours or released: "
                        f"{reason}") from error


def strip_wrappers(state):
    """Removes what wrappers add to the names of tensors, in place -> state."""
    for name in list(state):
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        state[plain] = state.pop(name)
    return state


def is_released(state):
    """Whether a state dict has a released checkpoint's names."""
    return any(name.startswith(LAYERS) for name in state)


def transformer_sizes(state, layouts):
    """The backbone of a released checkpoint -> {field of TransformerConfig: value}.

    layouts: the layouts to choose from. The number of patterns of each attention block decides.
    The number of heads is d / 64.
    Raises UserError if no layout has these blocks, KeyError for a tensor that is missing.
    """
    matches = filter(None, map(QUERY.fullmatch, state))
    queries = [tuple(map(int, match.groups())) for match in matches]  # (layer, block, pattern)
    if not queries:
        raise UserError("it holds no transformer")
    blocks = 1 + max(block for _, block, _ in queries)
    patterns = [sum(query[:2] == (0, block) for query in queries)  # of the first layer
                for block in range(blocks)]
    layout = next((name for name in layouts if patterns_of(name) == patterns), None)
    if layout is None:
        raise UserError(f"no layout has attention blocks of {patterns} patterns")
    pre_norm = "backbone.ln_post.weight" in state
    dense = "dense.weight" if pre_norm else "output.dense.weight"
    attention_dim = state[f"{LAYERS}.0.attention_blocks.0.{dense}"].shape[1]
    rows, dim = state["backbone.embedding.weight"].shape
    frames, height, width = (
        len(state[f"backbone.positional_embedding.{axis}_pos_embedding"])
        for axis in ("temporal", "height", "width"))
    heads = max(1, dim // 64)
    return {
        "layers": 1 + max(layer for layer, _, _ in queries),
        "dim": dim,
        "heads": heads,
        "head_dim": attention_dim // heads,
        "mlp_dim": len(state[f"{LAYERS}.0.mlp.c_fc.weight"]),
        "frames": frames,
        "height": height,
        "width": width,
        "vocab_size": rows - SPECIAL,
        "layout": layout,
        "pre_norm": pre_norm,
    }


def patterns_of(layout):
    """How many patterns each block of a layout has -> [int]."""
    return [1 + block.count("|") for block in layout.split(",")]


def take_backbone(state, layouts):
    """The backbone, removed from `state` -> {field of TransformerConfig: value}, {name: tensor}.

    layouts: the layouts to choose from. Raises KeyError for the first key that is missing,
    UserError for one that is left over.
    """
    sizes = transformer_sizes(strip_wrappers(state), layouts)
    tensors = take_tensors(state, sizes["layers"], sizes["layout"], sizes["pre_norm"])
    for key in state:
        if key.startswith("backbone."):
            raise UserError(f"this backbone has no place for {key}")
    return sizes, tensors


def take_tensors(state, layers, layout, pre_norm):
    """The tensors of VideoTransformer, removed from `state` -> {our name: tensor}."""
    positions = "backbone.positional_embedding"
    ours = {
        "cls": state.pop("backbone.cls_param"),
        "embedding.weight": state.pop("backbone.embedding.weight"),
        "cls_position": state.pop(f"{positions}.cls_pos_embedding").flatten(),
        "time": state.pop(f"{positions}.temporal_pos_embedding"),
        "row": state.pop(f"{positions}.height_pos_embedding"),
        "column": state.pop(f"{positions}.width_pos_embedding"),
    }
    norm = "ln_post" if pre_norm else "ln_pre"
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = state.pop(f"backbone.{norm}.{kind}")
        for i in range(layers):
            released, layer = f"{LAYERS}.{i}", f"layers.{i}"
            for b, patterns in enumerate(patterns_of(layout)):
                inner, block = f"{released}.attention_blocks.{b}", f"{layer}.blocks.{b}"
                out = inner if pre_norm else f"{inner}.output"
                qkv = [state.pop(f"{inner}.attentions.{p}.attention.{name}.{kind}")
                       for p in range(patterns) for name in ("query", "key", "value")]
                ours[f"{block}.qkv.{kind}"] = torch.cat(qkv)
                ours[f"{block}.out.{kind}"] = state.pop(f"{out}.dense.{kind}")
                ours[f"{block}.norm.{kind}"] = state.pop(f"{out}.LayerNorm.{kind}")
            ours[f"{layer}.fc1.{kind}"] = state.pop(f"{released}.mlp.c_fc.{kind}")
            ours[f"{layer}.fc2.{kind}"] = state.pop(f"{released}.mlp.c_proj.{kind}")
            ours[f"{layer}.norm.{kind}"] = state.pop(f"{released}.ln.{kind}")
    return ours


def take_token_head(state):
    """The tensors of TokenHead, removed from `state` -> {our name: tensor}.

    Raises KeyError for one that is missing.
    """
    ours = {"bias": state.pop("mlm_head.bias")}
    for kind in ("weight", "bias"):
        ours[f"dense.{kind}"] = state.pop(f"mlm_head.transform.0.{kind}")
        ours[f"norm.{kind}"] = state.pop(f"mlm_head.transform.2.{kind}")
        state.pop(f"mlm_head.decoder.{kind}", None)  # tied: the same tensor under a second name
    return ours


def take_projection_head(state):
    """The tensors of ProjectionHead, removed from `state` -> (dim, hidden, layers, out), tensors.

    The keys and shapes give the sizes. Raises KeyError for a tensor that is missing.
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

STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
}
MODULES = {  # classes whose objects are read as plain records of their attributes
    "dall_e.encoder": {"Encoder", "EncoderBlock"},
    "dall_e.decoder": {"Decoder", "DecoderBlock"},
    "dall_e.utils": {"Conv2d"},
    "torch.nn.modules.container": {"Sequential"},
    "torch.nn.modules.activation": {"ReLU"},
    "torch.nn.modules.pooling": {"MaxPool2d"},
    "torch.nn.modules.upsampling": {"Upsample"},
    "torch.nn.modules.linear": {"Identity"},
}
FUNCTIONS = {
    # The numbers of a tensor come later in the file: (storage, offset, size, stride) until then.
    ("torch._utils", "_rebuild_tensor_v2"): lambda *args: args[:4],
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch", "device"): lambda *_: None,
    ("collections", "OrderedDict"): OrderedDict,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
}
MAGIC = 0x1950a86a20f9469cfc6c  # the first number of torch.save's old format
PICKLE_ERRORS = (pickle.UnpicklingError, EOFError, OSError, struct.error, LookupError, TypeError,
                 AttributeError, ValueError, RuntimeError)  # of a damaged or foreign file


class Record:
    """Replaces a pickled module: unpickling fills its __dict__ and runs nothing."""


class Unpickler(pickle.Unpickler):
    """Knows MODULES and what torch.save writes for tensors. Raises UserError for other names."""

    def find_class(self, module, name):
        if name in MODULES.get(module, ()):
            return Record
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) not in FUNCTIONS:
            raise UserError(refusal(f"{module}.{name}"))
        return FUNCTIONS[module, name]

    def persistent_load(self, saved):
        if saved[0] == "module":  # (kind, class, source): only the class counts
            return saved[1]
        if saved[0] != "storage":
            raise UserError(f"the file holds {saved[0]!r} where a tensor's storage was expected: "
                            f"not loaded")
        return saved[2], saved[1]  # key, dtype


def read_module(path):
    """The tensors of a module pickled by torch.save -> {name: tensor}.

    Reads zip files and the old format, in which DALL-E was released. Raises UserError, naming the
    file, for any other file and for one that names other classes.
    """
    try:
        if zipfile.is_zipfile(path):
            return read_zip(path)
        with open(path, "rb") as file:
            return read_tensors(file)
    except PICKLE_ERRORS as error:
        reason = "no module pickled by torch.save"
        if isinstance(error, (UserError, OSError)):
            reason = error
        raise UserError(f"{path}: {reason}") from error


def read_zip(path):
    """torch.save's zip format. torch reads it without running code, but needs the classes."""
    records = [(Record, f"{module}.{name}") for module, names in MODULES.items() for name in names]
    try:
        with torch.serialization.safe_globals(records):
            module = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
            raise UserError(refusal(named[1])) from error
        raise
    return {name: tensor.detach() for name, tensor in walk(module, "")}


def refusal(name):
    return f"the file names {name}, which no DALL-E encoder or decoder needs: not loaded"


def read_tensors(file):
    """torch.save's old format: four pickles, one of the storages' keys, then their numbers."""
    magic, _, _, root = (Unpickler(file).load() for _ in range(4))  # _: version, machine
    if magic != MAGIC:
        raise UserError("the file is not one of torch.save's old format")
    tensors = dict(walk(root, ""))
    dtypes = dict(storage for storage, *_ in tensors.values())
    numbers = {}
    for key in Unpickler(file).load():
        count, = struct.unpack("<q", file.read(8))
        content = bytearray(file.read(count * dtypes[key].itemsize))
        numbers[key] = torch.frombuffer(content, dtype=dtypes[key])
    return {name: torch.as_strided(numbers[key], size, stride, offset).clone()
            for name, ((key, _), offset, size, stride) in tensors.items()}


def walk(module, prefix):
    """All tensors below a record -> (dotted name, tensor), named as in state_dict."""
    if not isinstance(module, Record):
        raise UserError("the file holds no module")
    for name, tensor in module.__dict__["_parameters"].items():
        if tensor is not None:
            yield prefix + name, tensor
    for name, child in module.__dict__["_modules"].items():
        yield from walk(child, f"{prefix}{name}.")
