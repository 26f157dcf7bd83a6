"""How much of a batch a device takes at a time: micro-batches, and how large they can be, tried rather than guessed."""
import contextlib
import ctypes
import os
import re
from pathlib import Path

import torch

from plumbing.cli import UserError
from plumbing.processes import from_all, rank_and_world, restarted, say

MARGIN = 0.9  # of the memory that is free


def slices(start, stop, size):
    """The numbers from start up to stop in parts of `size`, of which the last may be smaller -> [slice]."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def plan(videos, group, most):
    """A process's videos, made of groups, at most so many at a time -> [[slice]]: whole groups, each slice alone, where
    one fits; else the slices of a group together."""
    at_once = most // group * group or most
    return [slices(whole.start, whole.stop, at_once) for whole in slices(0, videos, max(group, at_once))]


def share_out(config, videos, world):
    """Sets the batch and the groups told apart from each other in force. UserError where they cannot be."""
    if config.contrast > config.batch:
        say(f"--contrast {config.contrast} is more than --batch {config.batch}: telling all of these apart")
    if not (config.alpha and 0 < config.contrast <= config.batch):
        config.contrast = config.batch
    if config.batch > videos >= world:
        wanted, config.contrast = config.batch, min(config.contrast, videos // world * world)
        config.batch = videos // config.contrast * config.contrast
        say(f"--batch {wanted} is more than the {videos} videos: using {config.batch}, of which {config.contrast} are "
            f"told apart from each other")
    if config.contrast == 1 and config.alpha:
        raise UserError("--contrast 1: there is nothing to tell apart (--alpha 0 leaves this task out)")
    if config.batch % config.contrast or config.contrast % world or config.batch > videos:
        raise UserError(f"--batch {config.batch} must be a multiple of --contrast {config.contrast}, that one of the "
                        f"{world} processes, and there are {videos} videos")


def described(config, videos, group):
    """What a step does with a process's videos, of which so many are of a group, in words."""
    parts = plan(videos, group, config.micro_batch)
    count, largest_part = sum(map(len, parts)), parts[0][0].stop
    groups = f", groups of {config.contrast} in {'one pass' if len(parts[0]) == 1 else 'two passes'}"
    return f"{largest_part} videos at a time, {count} pass{'es' * (count > 1)} a step{groups if config.alpha else ''}"


def fit(config, model, most, device, attempt):
    """Sets config.micro_batch: as asked, else that of the run that is resumed, else the largest that fits the devices
    of all processes, at most `most` -> what is to be said of its memory.

    attempt: a function that takes one real step with so many videos, but for the optimizer's.
    """
    before = Path(config.out) / "config.json"
    if not config.micro_batch and (restarted() or config.resume) and before.is_file():
        found = re.search(r'"micro_batch": (\d{1,9})\b', before.read_text(errors="replace"))  # whatever else it holds
        config.micro_batch = int(found[1]) if found else 0
    if config.micro_batch:
        config.micro_batch = min(config.micro_batch, most)
        return ""
    parameters = 4 * sum(p.numel() for p in model.parameters())
    later = parameters * (3 if rank_and_world()[1] > 1 else 2)  # Adam's moments, DistributedDataParallel's buckets
    try:
        found = from_all(largest(attempt, most, device, later))
    finally:
        model.zero_grad(set_to_none=True)  # also of an attempt that was broken off
    config.micro_batch = min(videos for videos, _, _ in found)
    needed, there = max((needed + later, there) for _, needed, there in found)
    return f", {needed / 1e9:.1f} of {there / 1e9:.0f} GB"


def largest(attempt, most, device, later):
    """The largest number of videos that fits a device, a power of two or `most` -> it, its bytes, those there are.

    attempt: a function that takes one real step with so many videos. later: bytes that training will take besides.
    The number doubles until the device says no, or until the last two steps say that it would. On CPUs, where nobody
    says no in time, no more are taken once two steps tell what more would take.
    """
    there, fits = free_memory(device), []
    for videos in [2 ** i for i in range(most.bit_length()) if 2 ** i < most] + [most]:
        needed = None
        if len(fits) > 1:
            (fewer, bytes_fewer), (more, bytes_more) = fits[-2:]
            needed = bytes_more + (videos - more) * (bytes_more - bytes_fewer) / (more - fewer)
        grew = len(fits) > 1 and bytes_more > bytes_fewer  # else it is a peak of earlier that is seen
        if not grew or (device.type == "cuda" and needed < MARGIN * there - later):
            try:
                needed = peak_memory(attempt, videos, device)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                needed = float("inf")
        if needed > MARGIN * there - later and (fits or needed == float("inf")):
            break
        fits.append((videos, needed))
    if not fits:
        raise UserError("not one video fits into the device's memory: take --recompute, or a smaller model or clip")
    return *fits[-1], there


def peak_memory(attempt, videos, device):
    """The most bytes that were in use during attempt(videos): of the GPU by tensors, else by this process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif device.type == "cpu" and os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is in use
    attempt(videos)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return torch.mps.driver_allocated_memory() if device.type == "mps" else process_memory("VmHWM")


def free_memory(device):
    """Bytes that this process may have in all, those that it has included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return process_memory("VmRSS") + min(system_free(), container_free()) / sharing


def process_memory(name):
    """A figure of /proc/self/status in bytes; without /proc the largest that the process has ever had."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(rf"{name}:\s*(\d+)", status.read_text())[1]) * 1024
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def system_free():
    """Bytes of the machine that no process needs; without /proc half of them all."""
    found = Path("/proc/meminfo")
    if found.is_file():
        return int(re.search(r"MemAvailable:\s*(\d+)", found.read_text())[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def container_free():
    """Bytes up to the limit of this process's control group, where it has one."""
    most, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if not most.is_file() or most.read_text().strip() == "max":
        return float("inf")
    return int(most.read_text()) - int(used.read_text())


def glibc(function, *arguments):
    """Calls a function of glibc's about its heap, where there is one; not where its settings were chosen."""
    found = getattr(ctypes.CDLL(None), function, None) if os.name == "posix" else None
    if found and "GLIBC_TUNABLES" not in os.environ:
        found(*arguments)


def keep():
    """Lets glibc keep what is freed, up to 32 MB in one piece: by itself it gives the system much of it at every step
    and takes it again, a twentieth of a toy step's time. What it cannot use again grows: hence `give_back`."""
    for parameter, value in ((-3, 2**25), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        glibc("mallopt", parameter, value)


def give_back():
    """Gives the system what glibc keeps of freed tensors. Not all of it fits later ones, so that a long training on a
    CPU would take more and more (the toy 20 MB a step)."""
    glibc("malloc_trim", 0)


def out_of_memory(error):
    """Whether a RuntimeError says so: CPUs and Apple's GPUs have no class of their own for it."""
    said = re.search("out of memory|can't allocate memory|not enough memory", str(error))
    return isinstance(error, torch.OutOfMemoryError) or bool(said)


@contextlib.contextmanager
def memory_explained(config):
    """A context in which running out of memory ends with a line that says which number to lower."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        lower = config.micro_batch // 2
        advice = f"take --micro-batch {lower}" if lower else "take a smaller clip or model"
        advice += "" if config.recompute else ", or --recompute"
        raise UserError(f"out of memory with --micro-batch {config.micro_batch}: {advice}") from error
