"""A GPU for machines without one: tensors on "cuda" have shapes and dtypes but no numbers.

pretend_gpu.cpp registers a CUDA device that does nothing, so that autograd runs; FakeTensorMode
gives the tensors. What a GPU would run is counted, and what would make the CPU wait for it.

    import pretend_gpu                             before torch; needs g++ and takes 5 seconds
    with pretend_gpu.PretendGpu() as gpu: ...      gpu.kernels, gpu.waits, gpu.mixed
"""
import collections
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent


def load_device():
    """Compiles pretend_gpu.cpp and registers its device. torch looks for one when imported."""
    if "torch" in sys.modules:
        raise ImportError("import pretend_gpu before torch")
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    libraries = torch_folder / "lib"
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/pretend_gpu.so"
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}",
                        str(Path(__file__).with_suffix(".cpp")), "-o", library,
                        f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu"],
                       check=True)
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)


load_device()

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
torch.autograd.set_multithreading_enabled(False)  # the device has no thread of its own

# Operations whose output's size depends on numbers: the CPU waits for them.
WAITING = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
# Operations that run no kernel.
VIEWS = {"view", "_unsafe_view", "_reshape_alias", "expand", "transpose", "t", "permute", "slice",
         "select", "split", "split_with_sizes", "chunk", "unbind", "unsqueeze", "squeeze", "detach",
         "alias", "as_strided", "lift_fresh", "unfold", "diagonal"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Kernel(NamedTuple):
    """What a GPU runs: an operation, bytes read and written, FLOP, its inputs' shapes and dtype."""
    name: str
    read: int
    written: int
    flop: int
    shapes: list
    dtype: str


class PretendGpu(TorchDispatchMode):
    """A context in which "cuda" is a device: CPU tensors are real, its tensors are fake.

    kernels: [Kernel]. waits: Counter of the lines that make the CPU wait for the GPU. mixed:
    Counter of the lines that compute with tensors on both.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.kernels, self.waits, self.mixed = [], collections.Counter(), collections.Counter()
        self.patches = [
            mock.patch.object(torch.cuda, "is_available", lambda: True),
            mock.patch.object(torch.cuda, "is_initialized", lambda: True),
            mock.patch.object(torch.cuda, "current_device", lambda: 0),
            mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            mock.patch.object(torch.cuda, "get_rng_state", lambda *_: torch.zeros(16).byte()),
            mock.patch.object(torch.cuda, "set_rng_state", lambda *_: None),
            mock.patch.object(F, "scaled_dot_product_attention", fused_kernel),
        ]

    def __enter__(self):
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for patch in self.patches:
            patch.stop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        leaves = tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, FakeTensor)]
        reals = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
        target = next((torch.device(x).type for x in (*leaves, kwargs.get("device"))
                       if isinstance(x, torch.device)), None)
        if not fakes and target != "cuda" or name.startswith("prim::"):
            return function(*args, **kwargs)
        to_cpu = target == "cpu" or (name == "copy_" and not isinstance(args[0], FakeTensor))
        if to_cpu or name in WAITING or name == "_local_scalar_dense":
            self.waits[f"{name} {calling_line()}"] += 1
        if name == "_local_scalar_dense":
            return args[0].dtype.is_floating_point or 1
        if to_cpu:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if fakes and name != "copy_" and any(x.dim() for x in reals):
            self.mixed[f"{name} {calling_line()}"] += 1
        args, kwargs = tree_map_only(torch.Tensor, self.to_fake, (args, kwargs))
        with self.fake:
            out = function(*args, **kwargs)
        if name not in VIEWS and name not in ALLOCATIONS:
            self.kernels.append(measured(function, name, args, kwargs, out))
        return out

    def to_fake(self, x):
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)


def measured(function, name, args, kwargs, out):
    """-> Kernel. Every tensor is read or written once; of expanded ones, what is in memory."""
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    flop = flop_registry.get(function._overloadpacket)
    return Kernel(name, sum(map(bytes_in_memory, inputs)), sum(map(bytes_in_memory, outputs)),
                  flop(*args, **kwargs, out_val=out) if flop else 0,
                  [tuple(x.shape) for x in inputs],
                  str(inputs[0].dtype).removeprefix("torch.") if inputs else "")


def bytes_in_memory(x):
    elements = 1
    for size, stride in zip(x.shape, x.stride()):
        elements *= size if stride else 1
    return elements * x.element_size()


def calling_line():
    """The innermost line of this project on the stack, or of autograd's backward pass."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path != Path(__file__).resolve():
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.line}"
    return "in the backward pass"


def fused_kernel(q, k, v, attn_mask=None, dropout_p=0.0):
    """F.scaled_dot_product_attention as a GPU runs it in half precision: one kernel."""
    if attn_mask is None and q.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=q.dtype)
        bias = bias.masked_fill(attn_mask.logical_not(), float("-inf"))
        attn_mask = bias.expand(*q.shape[:-1], k.shape[-2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, q.requires_grad,
                                                        dropout_p)[0]
