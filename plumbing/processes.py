"""One process or many: launch, devices, the group and its exchanges, precision, seeds."""
import contextlib
import functools
import os
import random
import signal
import sys
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather

from plumbing.cli import UserError

# what torch 2.13 recommends in their place is not in 2.11
warnings.filterwarnings("ignore", "torch.distributed.nn.functional", FutureWarning)

# ---------------------------------------------------------------- the group


def rank_and_world():
    """This process's number and how many there are: of the group, or what torchrun says of it -> (int, int)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def say(*words):
    """Prints a line, from the first process only."""
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


def launch(gpus):
    """Restarts the script as `gpus` processes through torchrun; returns where it already runs under torchrun.

    Raises UserError where the machine has fewer GPUs.
    """
    if gpus <= 1 or "RANK" in os.environ:
        return
    if gpus > torch.cuda.device_count():
        raise UserError(f"--gpus {gpus}: this machine has {torch.cuda.device_count()}")
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun
    try:
        torchrun(["--standalone", "--nproc-per-node", str(gpus), "--", *sys.argv])
        sys.exit(0)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"{Path(sys.argv[0]).name}: process {rank} of {gpus} ended first, with exit code {failure.exitcode}; "
              f"the others were stopped", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


def end_with(parent):
    """Called in a process of a pool: it ends soon after its parent, of that number, even where that was killed."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def stopping():
    """-> a list that Ctrl-C or SIGTERM puts the exit code into, once; the second signal acts as it did before."""
    asked, before = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    own = os.getpid()  # not that of the processes that load clips

    def ask(number, _):
        asked.append(128 + number)
        if os.getpid() == own and rank_and_world()[0] == 0:
            print(f"{signal.Signals(number).name}: stopping soon; once more stops at once", file=sys.stderr)
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()


def join_group(backend):
    """Joins the group of processes that torchrun started, where it started several."""
    if rank_and_world()[1] == 1 or dist.is_initialized():
        return
    told = os.environ.get
    if told("TORCHELASTIC_RESTART_COUNT", "0") != "0" and told("TORCHELASTIC_USE_AGENT_STORE") == "True":
        say("restarted: should the processes not find each other, start torchrun with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or it remembers the addresses of those that ended")
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    patient_group()


@functools.cache
def patient_group():
    """A second group of all processes, which waits for a year: where files are made that are missing, one process may
    need many hours more than another."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=365))


def wait_for_all():
    """Waits until every process is here, however long that takes, such as for files that the first one makes."""
    if dist.is_initialized():
        dist.barrier(patient_group())


def by_first(function, *args):
    """What a function gives in the first process, which alone calls it, while the others wait and get None; where it
    raises a UserError, they end with it, without a word."""
    result = error = None
    if rank_and_world()[0] == 0:
        try:
            result = function(*args)
        except UserError as found:
            error = found
    wait_for_all()
    refused = any(from_all(error is not None))
    if error:
        raise error
    if refused:
        sys.exit(2)
    return result


def leave_group():
    """Called by all after the last of their exchanges. Only the first process returns, for what is left to write.

    The others end here and at once: an ordinary exit now and then aborts in one of torch's threads ("terminate called
    without an active exception"), whereupon torchrun would end the first process before its last lines.
    """
    if dist.is_initialized():
        rank = dist.get_rank()
        dist.destroy_process_group()
        if rank > 0:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def restarted():
    """Whether torchrun started any process of this group again. Called by all: where another machine's process had
    ended, torchrun does not tell the processes of this one that they are not the first."""
    return max(from_all(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))) > 0


def from_all(value):
    """Every process's value -> [value], in the order of the processes."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def share(batch, rank, world):
    """A process's part of a batch: every world-th video. What belongs to a video is shared like the videos."""
    return batch[rank::world]


def sum_over_all(tensor):
    """A tensor's sum over the processes, in place and without gradient. Returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(x):
    """(n, ...) of each process -> (n * processes, ...) of all, with gradient: the sum over what all do with it."""
    return torch.cat(all_gather(x)) if rank_and_world()[1] > 1 else x


def exchanging(model, last):
    """A context for the forward and backward pass of one micro-batch: DistributedDataParallel exchanges gradients once
    a step, with the last."""
    return contextlib.nullcontext() if last or rank_and_world()[1] == 1 else model.no_sync()


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d with the statistics of all processes' batches. (torch's SyncBatchNorm refuses CPU tensors.)"""

    def forward(self, x):  # (n, d)
        rank, world = rank_and_world()
        if not self.training or world == 1:
            return super().forward(x)
        return super().forward(gather(x)).chunk(world)[rank]


# ---------------------------------------------------------------- devices and precision


def pick_device(name):
    """"auto" -> this process's GPU, else Apple's, else the CPU. Joins torchrun's group. Returns torch.device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has no GPU that torch can use")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    join_group("nccl" if name == "cuda" else "gloo")
    return torch.device(name)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


def pick_precision(name, device):
    """"auto" -> bf16 where the hardware multiplies it, fp16 on older GPUs, else fp32. Returns a torch.dtype.

    "tf32": float32 whose products a GPU's tensor cores multiply with 10 bits after the point; "fp32" is float32.
    """
    if name == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32 is a number format of NVIDIA's GPUs: take fp32 on {device.type}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            name = "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"
    return PRECISIONS[name]


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def move(tensor, device):
    """A CPU tensor to the device; to a GPU through pinned memory, so that nobody waits for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# ---------------------------------------------------------------- seeds


def one_seed(*numbers):
    """One well-mixed seed from numbers such as (seed, step, rank) -> int.

    numpy takes (1, 2) and (1, 2, 0) for the same: what is added at the end keeps them apart.
    """
    return int(np.random.SeedSequence((*numbers, 1 + len(numbers))).generate_state(1)[0])


def seed_all(*numbers):
    """Seeds every generator from numbers such as (seed, step, rank): no generator's state has to be kept."""
    number = one_seed(*numbers)
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
