"""--micro-batch 0: how many videos pass through a model at a time."""
import contextlib
import ctypes
from functools import partial

import torch

from plumbing.cli import UserError
from plumbing.processes import device_name, from_all, say

ON_A_CPU = 4  # more videos at a time gain a CPU nothing


def fit_to_device(config, model, most, device, try_out):
    """Fits a model to the device: activation checkpointing, config.micro_batch, compilation.

    most: videos that a process could pass at once. try_out: (config, model, device, videos), runs
    the forward and backward pass of a micro-batch.
    """
    model.backbone.activation_checkpointing = config.activation_checkpointing
    if not config.micro_batch:
        attempt = partial(try_out, config, model, device)
        config.micro_batch = min(from_all(largest_micro_batch(attempt, most, model, device)))
    config.micro_batch = min(config.micro_batch, most)
    if device.type == "cpu" and config.micro_batch < most:
        return_large_tensors()
    if config.compile is None:
        config.compile = device.type == "cuda"
    if config.compile:
        torch._dynamo.config.optimize_ddp = False  # layers are compiled one by one
        model.backbone.compile_layers()


def largest_micro_batch(attempt, most, model, device):
    """The largest power of two, or `most`, whose forward and backward pass fits the GPU -> int.

    attempt: a function that runs both passes of so many videos. The memory of Adam's moments and
    of DistributedDataParallel's buckets, three times the parameters, is held meanwhile.
    """
    if device.type != "cuda":
        return min(ON_A_CPU, most)
    parameters = sum(p.numel() for p in model.parameters())
    reserved = torch.empty(3 * parameters, device=device)
    largest, videos = 0, 1
    while largest < most:
        try:
            attempt(videos)
        except torch.OutOfMemoryError:
            break
        largest, videos = videos, min(2 * videos, most)
    model.zero_grad(set_to_none=True)
    del reserved
    torch.cuda.empty_cache()  # NCCL's first collective needs memory of its own
    if not largest:
        raise UserError("not one video fits into the GPU's memory: give "
                        "--activation-checkpointing, or a smaller model or clip")
    say(f"--micro-batch {largest}: the most that fit into the GPU's memory")
    return largest


def return_large_tensors():
    """Lets glibc return freed tensors of 4 MB and more to the system at once.

    Its heap would fragment: without this, a step of 64 micro-batches takes four times the memory.
    """
    with contextlib.suppress(AttributeError, OSError):  # of another C library
        ctypes.CDLL(None).mallopt(-3, 2**22)  # M_MMAP_THRESHOLD, bytes


def trim_heap():
    """Returns what glibc keeps of freed tensors to the system, now and then in a training.

    Not all of it fits later tensors: without this, the toy would take 20 MB more at every step.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def describe(backbone, device):
    """The clip size, the number of parameters and the device, for a run's first line -> str."""
    shape = backbone.config
    parameters = sum(p.numel() for p in backbone.parameters()) / 1e6
    return (f"clips of {shape.frames} x {shape.height} x {shape.width} tokens, {parameters:.2f}M "
            f"parameters, on {device_name(device)}")
