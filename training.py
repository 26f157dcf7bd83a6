"""What the scripts share: command line, processes, optimizer, schedule, checkpoints, logging."""
import argparse
import contextlib
import json
import math
import os
import random
import sys
from dataclasses import MISSING, asdict, field, fields
from datetime import timedelta
from pathlib import Path
from types import UnionType
from typing import get_args

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# ---------------------------------------------------------------- command line


def option(default, help, choices=None):
    """A field of a configuration dataclass that becomes a flag with a line of help."""
    return field(default=default, metadata={"help": help, "choices": choices})


def check_positive(config, *names):
    """Raises ValueError, naming the flag, unless these fields are at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, no usage: with fifty flags the usage would hide what was wrong."""
        print(f"{Path(self.prog).name}: {message}", file=sys.stderr)
        sys.exit(2)


def parse(config_class, argv, description, presets=None, chosen_by="preset", prog=None):
    """The command line as a configuration: every field is a flag, underscores written as dashes.

    presets: {name: {field: value}}, chosen by the flag of the field `chosen_by`; flags given beside it win. A
    ValueError from the configuration itself (its __post_init__) ends like any wrong value: one line, exit code 2.
    """
    parser = Parser(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    for f in fields(config_class):
        assert f.default is not MISSING, f"{f.name} needs a default"
        flag, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: {f.default})"
        kind = next(k for k in get_args(f.type) if k is not type(None)) if isinstance(f.type, UnionType) else f.type
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            parser.add_argument(flag, type=kind, default=f.default, choices=f.metadata["choices"], help=text,
                                metavar=None if f.metadata["choices"] else kind.__name__.upper())
    if presets:
        early = Parser(prog, add_help=False, allow_abbrev=False)
        early.add_argument("--" + chosen_by, choices=list(presets), default=getattr(config_class, chosen_by))
        parser.set_defaults(**presets[getattr(early.parse_known_args(argv)[0], chosen_by)])
    args = parser.parse_args(argv)
    with refusals(prog):
        return config_class(**vars(args))


@contextlib.contextmanager
def refusals(prog=None):
    """Around the preparation of a run: what the user can mend ends with one line and exit code 2, no traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        print(f"{Path(prog or sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------- processes and devices


def rank_and_world():
    """This process's number and how many there are, from the variables that torchrun sets -> (int, int)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(*words):
    """Prints a line, from the first process only."""
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


def launch(gpus):
    """Restarts the script as `gpus` processes through torchrun; returns where it already runs under torchrun.

    Raises ValueError where the machine has fewer GPUs.
    """
    if gpus <= 1 or "RANK" in os.environ:
        return
    if gpus > torch.cuda.device_count():
        raise ValueError(f"--gpus {gpus}: this machine has {torch.cuda.device_count()}")
    from torch.distributed.run import main as torchrun
    torchrun(["--standalone", "--nproc-per-node", str(gpus), *sys.argv])
    sys.exit(0)


def pick_device(name):
    """"auto" -> this process's GPU, else Apple's, else the CPU. Joins torchrun's group. Returns torch.device."""
    _, world = rank_and_world()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: this machine has no GPU that torch can use")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = True
    if world > 1 and not dist.is_initialized():
        if restarted() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            say("restarted: should the processes not find each other, start torchrun with "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or it remembers the addresses of those that ended")
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(hours=2))
    return torch.device(name)


def move(tensor, device):
    """A CPU tensor to the device; to a GPU through pinned memory, so that nobody waits for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def wait_for_all():
    """Waits until every process is here, such as for files that the first one makes."""
    if dist.is_initialized():
        dist.barrier()


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


def pick_precision(name, device):
    """"auto" -> bf16 where the hardware multiplies it, fp16 on older GPUs, else fp32. Returns a torch.dtype."""
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            name = "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def one_seed(*numbers):
    """One well-mixed seed from a tuple such as (seed, step, rank) -> int."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_all(*numbers):
    """Seeds every generator from a tuple such as (seed, step, rank): no generator's state has to be kept."""
    number = one_seed(*numbers)
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


# ---------------------------------------------------------------- optimizer and schedule


def make_optimizer(model, lr, weight_decay, betas):
    """AdamW; biases and LayerNorm / BatchNorm weights are not decayed, embeddings and position tables are."""
    norms = (torch.nn.LayerNorm, torch.nn.BatchNorm1d)
    kept = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
    kept |= {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    groups = [{"params": [p for p in model.parameters() if id(p) not in kept], "weight_decay": weight_decay},
              {"params": [p for p in model.parameters() if id(p) in kept], "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=fused)


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the share `warmup` of the steps, then linear decay to 0 (Table 4) -> float."""
    rise = warmup * steps
    if step < rise:
        return peak * (step + 1) / (math.floor(rise) + 1)
    return peak * (steps - step) / (steps - rise)


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---------------------------------------------------------------- checkpoints


def save(path, content):
    """torch.save, whole or not at all: a kill or a full disk leaves the earlier file as it was."""
    part = Path(f"{path}.part")
    with open(part, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def restarted():
    """Whether torchrun started any process of this group again. Called by all: where another machine's process had ended,
    torchrun does not tell the processes of this one that they are not the first."""
    counts = [int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))]
    if dist.is_initialized():
        counts *= dist.get_world_size()
        dist.all_gather_object(counts, counts[0])
    return max(counts) > 0


def last_checkpoint(out, resume):
    """The out/last.pt that a run goes on from, because it is asked to or restarted by torchrun, or None."""
    path = Path(out) / "last.pt"
    if not (restarted() or resume):
        return None
    if not path.is_file():
        say(f"there is no {path} to go on from: starting anew")
        return None
    return path


def check_same(step, out):
    """Raises ValueError, on every process, unless all processes are to start from the same step."""
    if dist.is_initialized():
        steps = [None] * dist.get_world_size()
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise ValueError(f"processes would start from different steps, {sorted(set(steps))}: --out {out} must be "
                             f"storage that all machines share")


def restore_scaler(scaler, checkpoint):
    """The gradient scaler's state, where this run and the one before it both trained in fp16."""
    if scaler.is_enabled() and checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])


# ---------------------------------------------------------------- logging


class RunLog:
    """A run's folder: config.json, metrics.jsonl, TensorBoard events. Only the first process writes.

    resume_from: metrics of this step and later, from a run that went on past its last checkpoint, are dropped. From 0 on,
    an earlier run's last.pt becomes last.old.pt, so that no restart goes on from it.
    """

    def __init__(self, out, config, resume_from=0):
        self.out, self.writes = Path(out), rank_and_world()[0] == 0
        self.metrics_path = self.out / "metrics.jsonl"
        if not self.writes:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        if resume_from == 0 and (self.out / "last.pt").is_file():
            os.replace(self.out / "last.pt", self.out / "last.old.pt")
            say(f"{self.out / 'last.pt'} of an earlier run is now last.old.pt")
        (self.out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
        kept = [json.dumps(record) + "\n" for record in read_metrics(self.out) if record["step"] <= resume_from]
        self.metrics_path.write_text("".join(kept if resume_from else []))
        self.board = SummaryWriter(self.out, purge_step=resume_from + 1)

    def write(self, **metrics):
        """One line of metrics; step is among them."""
        if not self.writes:
            return
        metrics = {key: round(value, 6) if isinstance(value, float) else value for key, value in metrics.items()}
        with open(self.metrics_path, "a") as file:
            file.write(json.dumps(metrics) + "\n")
        for key, value in metrics.items():
            if key != "step":
                self.board.add_scalar(key, value, metrics["step"])

    def close(self):
        if self.writes:
            self.board.close()


def read_metrics(out):
    """The lines of a run's metrics.jsonl, a last one cut short left out -> [dict]."""
    path = Path(out) / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def draw_curves(out, panels):
    """curves.png of a run. panels: {title: {legend: key of metrics.jsonl}}; a panel without any value is left out."""
    records = read_metrics(out)
    panels = {title: {legend: key for legend, key in lines.items() if any(key in r for r in records)}
              for title, lines in panels.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes[0], panels.items()):
        for legend, key in lines.items():
            points = [(r["step"], r[key]) for r in records if key in r]
            axis.plot(*zip(*points), label=legend, marker="." if len(points) < 12 else None)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(frameon=False)
    figure.savefig(Path(out) / "curves.png", dpi=110)
    plt.close(figure)
