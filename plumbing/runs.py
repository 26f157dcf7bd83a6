"""What the two training scripts share: flags, optimizer, schedule, and the folder of a run.

A run lives in one folder, which only its first process writes: config.json, metrics.jsonl,
TensorBoard events, last.pt and pictures.
"""
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import torch
from torch import nn

from plumbing.board import describe_board, tag
from plumbing.checkpoints import restore, save_checkpoint
from plumbing.cli import UserError, option
from plumbing.files import read_lines, try_folder, write_text, writing
from plumbing.fitting import trim_heap
from plumbing.processes import (
    by_first,
    from_all,
    leave_group,
    rank_and_world,
    say,
    sum_over_all,
)
from plumbing.versions import commit

FEW_STEPS = 200


@dataclass
class RunSettings:
    """The flags that pretrain.py and finetune.py share, with the same meaning and default."""
    resume: bool = option(False, "continue from the run's last checkpoint", group="running")
    steps: int = option(0, "optimizer steps (0: as many as --epochs needs)", least=0, most=10**9)
    warmup: float = option(0.1, "fraction of the steps in which the learning rate rises",
                           least=0, most=1)
    dropout: float = option(0.1, "dropout everywhere in the transformer", least=0, most=0.99)
    grad_clip: float = option(1.0, "largest gradient norm", above=0)
    seed: int = option(0, "random seed", least=0, most=2**31)
    gpus: int = option(1, "GPUs of this machine, one process each", least=1, most=1000)
    device: str = option("auto", "device of each process", choices=["auto", "cuda", "mps", "cpu"])
    precision: str = option("auto", "number format of the matrix products",
                            choices=["auto", "bf16", "fp16", "tf32", "fp32"])
    micro_batch: int = option(0, "videos that pass through the backbone at a time, on each process "
                              "(0: on a GPU as many as fit, else 4)", least=0)
    activation_checkpointing: bool = option(False, "recompute each layer in the backward pass")
    compile: bool | None = option(None, "compile the layers with torch.compile (default: on CUDA)")
    save_every: int = option(500, "steps between two checkpoints", least=1)


# ---------------------------------------------------------------- optimizer and schedule


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up from 0, then linear decay to 0 (Table 4) -> float.

    warmup: fraction of the steps. As released, the first step has rate 0.
    """
    warmup_steps = int(warmup * steps)
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * (steps - step) / (steps - warmup_steps)


def decay_groups(model, weight_decay):
    """Parameter groups with and without weight decay.

    Biases and LayerNorm weights are not decayed. Embeddings, position tables and batch norm
    weights are, as in the released code.
    """
    layer_norms = {id(m.weight) for m in model.modules() if isinstance(m, nn.LayerNorm)}
    decayed, kept = [], []
    for name, p in model.named_parameters():
        exempt = name.endswith("bias") or id(p) in layer_norms
        (kept if exempt else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": kept, "weight_decay": 0.0}]


def set_learning_rate(optimizer, config, step, steps):
    """Sets the learning rate of a step -> float."""
    lr = learning_rate(step, steps, config.lr, config.warmup)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def schedule(config, videos, epochs, stop_after=0.0):
    """-> steps of the schedule, and the step to stop at: after `stop_after` epochs, if not 0.

    As released, an epoch is whole steps: videos that do not fill a batch are left out.
    """
    epoch = videos // config.batch
    steps = config.steps or max(1, int(epochs * epoch))
    end = max(1, int(stop_after * epoch)) if stop_after else steps
    if steps < FEW_STEPS and not config.steps:
        say(f"{steps} steps: a model learns little in fewer than {FEW_STEPS}. Give more --epochs, "
            f"or --steps, or a smaller --batch than {config.batch}")
    return steps, min(steps, end)


def resolve_batch(config, videos, world):
    """Sets config.batch and config.contrast to at most `videos` -> a group's videos on one process.

    Raises UserError unless a batch is whole groups, and a group the same on each process.
    """
    batch, contrast = config.batch, config.contrast or config.batch
    config.contrast = min(contrast, batch)
    if batch > videos >= world:
        config.contrast = min(config.contrast, videos // world * world)
        config.batch = videos // config.contrast * config.contrast
    if (config.batch, config.contrast) != (batch, contrast):
        say(f"{videos} videos: using --batch {config.batch} --contrast {config.contrast}")
    if config.contrast == 1 and config.alpha:
        raise UserError("--contrast 1: a video needs others to be contrasted with "
                        "(--alpha 0 leaves this task out)")
    if config.batch % config.contrast or config.contrast % world or config.batch > videos:
        raise UserError(f"--batch {config.batch} must be a multiple of --contrast "
                        f"{config.contrast}, which must be a multiple of the {world} processes, "
                        f"and there are {videos} videos")
    return config.contrast // world


def build_optimizer(model, config, betas, device):
    """AdamW and a gradient scaler -> (AdamW, GradScaler).

    The scaler skips a step whose gradient is not finite, without waiting for a GPU. In fp16 it
    also scales the loss; otherwise its scale is 1.
    """
    optimizer = torch.optim.AdamW(decay_groups(model, config.weight_decay), config.lr, betas,
                                  eps=1e-8, fused=device.type in ("cuda", "cpu"))
    scale = 2.0**16 if config.precision == "fp16" else 1.0
    return optimizer, torch.amp.GradScaler(device.type, scale, enabled=device.type != "mps")


def begin(config, model, optimizer, scaler, header, steps):
    """Loads the checkpoint that a run continues, if there is one -> its first step.

    That is the run's own last.pt or, of pretrain.py, --resume-from. header: of the token store.
    """
    last, other = Path(config.out) / "last.pt", getattr(config, "resume_from", "")
    resumes = config.resume and last.is_file()
    if config.resume and not resumes:
        say(f"there is no {last}: starting at step 0")
    path = last if resumes else other
    first = restore(path, model, optimizer, scaler, header, steps) if path else 0
    if len(set(from_all(first))) > 1:
        raise UserError(f"--out {config.out} must be storage that all machines share")
    return first


# ---------------------------------------------------------------- the folder


def check_folder(config):
    """Raises UserError where the folder `config.out` holds another run or cannot be written.

    Sets config.resume where torchrun has restarted this run. Called by all processes.
    """
    out = Path(config.out)
    config.resume = any(from_all(config.resume or restarted(out)))
    by_first(refuse_folder, out, config.resume)


def refuse_folder(out, resume):
    if (out / "config.json").exists() and not resume:
        free = next(name for n in count(2) if not (name := Path(f"{out}-{n}")).exists())
        raise UserError(f"{out} holds a run: continue it with --resume, start another with "
                        f"--out {free}, or delete it")
    try_folder(out)


def restarted(out):
    """Whether the run in a folder was started by the torchrun job that this process belongs to."""
    with contextlib.suppress(OSError, ValueError):
        job = json.loads((out / "config.json").read_text()).get("torchrun_job")
        return job is not None and job == torchrun_job()
    return False


def torchrun_job():
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if job == "none" else job  # "none": torchrun was given no --rdzv-id


def claim_folder(config):
    """Writes config.json. Creating it makes the folder this run's: only one program can do so."""
    if rank_and_world()[0] > 0:
        return
    out = Path(config.out)
    used = {"torchrun_job": torchrun_job(), "processes": rank_and_world()[1],
            "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit()}
    content = json.dumps(asdict(config) | used, indent=1) + "\n"
    if config.resume:
        return write_text(out / "config.json", content)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        try:
            with open(out / "config.json", "x") as file:
                file.write(content)
        except FileExistsError:
            refuse_folder(out, resume=False)


class Log:
    """A run's metrics, and whether training is sound.

    The first process writes metrics.jsonl and TensorBoard events. A resumed run drops the metrics
    after its first step. epoch: how many steps it has. group: of TensorBoard's tags. Counts on the
    device: nothing waits for a GPU but `write_means` and `may_save`.
    """

    def __init__(self, config, first, epoch, group="train"):
        claim_folder(config)
        self.config, self.epoch, self.out, self.group = config, epoch, Path(config.out), group
        self.writes = rank_and_world()[0] == 0
        self.bad_steps, self.first_loss, self.save_due = 0, None, False
        self.reset()
        if not self.writes:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import
        other = "" if config.resume else getattr(config, "resume_from", "")
        records = read_metrics(Path(other).parent if other else self.out)
        lines = [json.dumps(record) + "\n" for record in records if 0 < first >= record["step"]]
        write_text(self.out / "metrics.jsonl", "".join(lines))
        self.board = SummaryWriter(self.out, purge_step=first + 1)
        describe_board(self.board, config, group)

    def reset(self):
        self.sums, self.steps, self.good_steps, self.since = 0, 0, 0, time.perf_counter()

    def add(self, groups, gradient_norm):
        """One step. groups: [{name: scalar tensor}] of a batch's groups, "loss" among them.

        A step whose gradient is not finite counts as skipped, and is left out of the means.
        """
        self.names, finite = [*groups[0], "gradient_norm"], gradient_norm.isfinite()
        values = torch.stack([torch.stack([*group.values()]) for group in groups])
        values = torch.cat([values.detach().float().mean(dim=0), gradient_norm.float()[None]])
        self.sums = self.sums + values.masked_fill(~finite, 0)
        self.steps, self.good_steps = self.steps + 1, self.good_steps + finite.float()
        self.bad_steps = (self.bad_steps + 1) * ~finite  # in a row
        self.loss = values[self.names.index("loss")]
        self.first_loss = self.loss if self.first_loss is None else self.first_loss

    def write_means(self, step, lr):
        """Writes the means since the last call, over steps and processes -> text for a bar."""
        world = rank_and_world()[1]
        *sums, good_steps = sum_over_all(torch.cat([self.sums, self.good_steps[None]])).tolist()
        skipped = self.steps - round(good_steps / world)
        means = [total / max(1, self.steps - skipped) / world for total in sums]
        means = dict(zip(self.names, means))
        rate = self.config.batch * self.steps / (time.perf_counter() - self.since)
        more = {"skipped_steps": skipped} if skipped else {}
        self.write(step, epoch=step / self.epoch, **means, lr=lr, videos_per_second=rate, **more)
        self.reset()
        self.check()
        trim_heap()
        del means["gradient_norm"]
        return "  ".join(f"{name} {value:.1%}" if "accuracy" in name else f"{name} {value:.3f}"
                         for name, value in {**means, **more}.items())

    def write(self, step, **metrics):
        """One line of metrics.jsonl, and the same numbers for TensorBoard."""
        if not (self.writes and metrics):
            return
        metrics = {name: round(value, 6) if isinstance(value, float) else value
                   for name, value in metrics.items()}
        with writing(self.out), open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(tag(name, self.group), value, step)

    def may_save(self, step, end, stop):
        """Whether a checkpoint is due. It waits for a step whose gradient is finite.

        The last one does not wait: it follows at most two steps that were skipped.
        """
        last = step == end or bool(stop)
        self.save_due |= last or step % self.config.save_every == 0
        saves = self.save_due and (self.check(most_bad_steps=3 if last else 10) or last)
        self.save_due &= not saves
        return saves

    def check(self, most_bad_steps=10):
        """-> whether this step's gradient is finite.

        Raises UserError if so many steps in a row were skipped, or the loss has exploded.
        """
        bad_steps, loss, first = int(self.bad_steps), float(self.loss), float(self.first_loss)
        if bad_steps >= most_bad_steps:
            raise UserError(f"the gradient was not finite in {bad_steps} steps in a row: "
                            f"lower --lr (last.pt is from before)")
        if not bad_steps and not loss < 10 * max(1.0, first):
            raise UserError(f"the loss has risen from {first:.3g} to {loss:.3g}: "
                            f"lower --lr (last.pt is from before)")
        return not bad_steps

    def close(self, step, end, steps, stop):
        """Ends the run, of which `step` of `end` steps are done, in a schedule of `steps`.

        stop: of `processes.agree`. Exits with it where it is not 0.
        """
        if self.writes:
            self.board.close()
        if stop and step < end:
            say(f"stopped at step {step} of {end}: the same command with --resume continues")
            leave_group()
            sys.exit(stop)
        if end < steps:
            say(f"stopped in a schedule of {steps} steps: --resume-from continues it in another "
                f"folder")


def read_metrics(out):
    """The records of a run's metrics.jsonl, without a last line that was cut short -> [dict]."""
    records = read_lines(Path(out) / "metrics.jsonl")
    return [record for record in records if isinstance(record.get("step"), int)]


def last_is_best(out, name):
    """Whether a metric of a run has never been higher than in its last record -> bool."""
    values = [record[name] for record in read_metrics(out) if name in record]
    return bool(values) and values[-1] == max(values)


def save(config, model, optimizer, scaler, step, steps, tokens, name="last.pt"):
    """A checkpoint, by the first process. step: how many are done. tokens: how they were made."""
    if rank_and_world()[0] > 0:
        return
    save_checkpoint(Path(config.out) / name, {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(), "step": step, "steps": steps, "config": asdict(config),
        "tokens": tokens, "transformer": asdict(model.backbone.config)})

