"""One process or many: launch, devices, the process group, precision, seeds."""
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

# torch 2.11 lacks what torch 2.13 recommends instead
warnings.filterwarnings("ignore", "torch.distributed.nn.functional", FutureWarning)

# ---------------------------------------------------------------- launch


def launch(gpus):
    """Restarts the script through torchrun as `gpus` processes. Returns under torchrun.

    Raises UserError where the machine has fewer GPUs, and for `srun python`.
    """
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "RANK" not in os.environ:
        raise UserError("srun would start several runs that do not know of each other: see the "
                        "line for Slurm in docs/scaling.md")
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
        print(f"{Path(sys.argv[0]).name}: process {rank} of {gpus} failed first, with exit code "
              f"{failure.exitcode}; the others were stopped", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


def end_with(parent):
    """Called in a process of a pool: ends it soon after the process of number `parent` ends."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


# ---------------------------------------------------------------- stopping


@contextlib.contextmanager
def stop_signals():
    """-> a list into which the first Ctrl-C or SIGTERM puts its exit code. The second one acts.

    A repeat within a second counts as the same signal: torchrun and the terminal may both send it.
    """
    stopped, since = [], 0.0
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number, frame):
        nonlocal since
        if stopped and time.monotonic() - since > 1:
            for each, handler in before.items():
                signal.signal(each, handler)
            os.kill(os.getpid(), number)
        elif not stopped:
            stopped.append(128 + number)
            since = time.monotonic()
            if rank_and_world()[0] == 0:
                print(f"{signal.Signals(number).name}: stopping after this step; "
                      f"send it again to stop at once", file=sys.stderr)

    for number in before:
        signal.signal(number, handle)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals(_):
    """For processes that load clips: the training process ends them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def agree(stopped):
    """The exit code where any process was asked to stop, else 0 -> int. Waits for no GPU."""
    code = torch.tensor(max(stopped, default=0))
    if dist.is_initialized():
        dist.all_reduce(code, dist.ReduceOp.MAX, group=cpu_group())
    return code.item()


# ---------------------------------------------------------------- the group


def rank_and_world():
    """The number of this process and how many there are -> (int, int)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def say(*words):
    """Prints a line, from the first process only."""
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


def join_group(backend):
    """Joins the group of processes that torchrun started."""
    if rank_and_world()[1] == 1 or dist.is_initialized():
        return
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        say("restarted: if the processes do not find each other, start torchrun with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, so that it forgets the old addresses")
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    cpu_group()


@functools.cache
def cpu_group():
    """A second group of all processes, for tensors on the CPU.

    Its timeout is a year: making missing files may take one process hours more than another.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(days=365))


def wait_for_all():
    """Waits until every process is here, however long that takes."""
    if dist.is_initialized():
        dist.barrier(cpu_group())


def by_first(function, *args):
    """Calls a function in the first process alone, while the others wait -> its result or None.

    Where it raises a UserError, all processes end, and the first one prints it.
    """
    result = error = None
    if rank_and_world()[0] == 0:
        try:
            result = function(*args)
        except UserError as raised:
            error = raised
    wait_for_all()
    failed = any(from_all(error is not None))
    if error:
        raise error
    if failed:
        sys.exit(2)
    return result


def broadcast(value):
    """The first process's value, in all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0, group=cpu_group())
    return values[0]


def leave_group():
    """Called by all after their last exchange. Only the first process returns.

    The others end at once: an ordinary exit sometimes aborts in one of torch's threads, and then
    torchrun would end the first process before its last lines.
    """
    if dist.is_initialized():
        rank = dist.get_rank()
        dist.destroy_process_group()
        if rank > 0:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def from_all(value):
    """Every process's value, in order of rank -> [value]."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def sum_over_all(tensor):
    """Sums a tensor over the processes, in place and without gradient. Returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(x):
    """(n, ...) of each process -> (n * processes, ...). The gradient is summed over processes."""
    return torch.cat(all_gather(x)) if rank_and_world()[1] > 1 else x


def sync_gradients(model, last):
    """A context in which DistributedDataParallel averages gradients with the last group only."""
    averages = last or rank_and_world()[1] == 1
    return contextlib.nullcontext() if averages else model.no_sync()


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over the batches of all processes. (SyncBatchNorm refuses CPU tensors.)"""

    def forward(self, x):  # (n, d)
        rank, world = rank_and_world()
        if not self.training or world == 1:
            return super().forward(x)
        return super().forward(gather(x)).chunk(world)[rank]


# ---------------------------------------------------------------- devices and precision


def pick_device(name):
    """"auto" -> this process's GPU, else Apple's, else the CPU. Joins torchrun's group."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has no GPU that torch can use")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    join_group("nccl" if name == "cuda" else "gloo")
    return torch.device(name)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # under autocast; of tf32, fp32: none


def pick_precision(name, device):
    """"auto" -> bf16 where the hardware multiplies it, fp16 on older GPUs, else fp32 -> str.

    tf32 is float32 whose products a GPU multiplies with 10 mantissa bits.
    """
    if name == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32 is for NVIDIA GPUs: use fp32 on {device.type}")
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        name = "bf16" if native else "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    return name


def autocast(device, precision):
    """torch.autocast for a precision's name."""
    return torch.autocast(device.type, DTYPES.get(precision), enabled=precision in DTYPES)


def move(tensor, device):
    """A CPU tensor to the device; to a GPU through pinned memory, without waiting for the copy."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# ---------------------------------------------------------------- seeds


def one_seed(*numbers):
    """One well-mixed seed from numbers such as (seed, step, rank) -> int.

    numpy takes (1, 2) and (1, 2, 0) as the same seed: the appended count keeps them apart.
    """
    return int(np.random.SeedSequence((*numbers, 1 + len(numbers))).generate_state(1)[0])


def seed_all(*numbers):
    """Seeds every generator from numbers such as (seed, step, rank), so that none is saved."""
    number = one_seed(*numbers)
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
