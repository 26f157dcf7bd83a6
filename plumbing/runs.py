"""A training run: its settings, optimizer and schedule; its folder with checkpoints, metrics and TensorBoard events."""
import itertools
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from plumbing.checkpoints import save_checkpoint, start
from plumbing.cli import UserError, option, progress
from plumbing.files import read_lines, write_text
from plumbing.fitting import give_back, keep
from plumbing.processes import leave_group, pick_precision, rank_and_world, say, stopping, sum_over_all

FILES = ("config.json", "metrics.jsonl", "last.pt", "previous.pt", "curves.png", "fill_in.png", "fill_in.gif",
         "confusion.png", "fill_in-*.*", "predict-*.png", "events.out.tfevents.*")  # of a run, in its folder


@dataclass
class RunSettings:
    """The flags that pretrain.py and finetune.py share, with the same meaning and default."""
    resume: bool = option(False, "go on from the run's last checkpoint, where there is one")
    steps: int = option(0, "optimizer steps, in place of epochs (0: as many as these need)", least=0, most=10**9)
    warmup: float = option(0.1, "share of the steps in which the learning rate rises", least=0, most=1)
    dropout: float = option(0.1, "dropout everywhere in the transformer", least=0, most=0.99)
    clip: float = option(1.0, "largest gradient norm", above=0)
    seed: int = option(0, "random seed", least=0, most=2**31)
    gpus: int = option(1, "GPUs of this machine, a process each", least=1, most=1000)
    device: str = option("auto", "device of each process", choices=["auto", "cuda", "mps", "cpu"])
    precision: str = option("auto", "number format of the matrix products",
                            choices=["auto", "bf16", "fp16", "tf32", "fp32"])
    micro_batch: int = option(0, "videos a process takes at a time (0: as many as fit into its memory)", least=0)
    recompute: bool = option(False, "keep only what enters each layer, compute the rest again in the backward pass")
    compile: bool = option(False, "compile the layers with torch.compile (needs a C++ compiler on CPUs)")
    save_every: int = option(500, "steps between two checkpoints", least=1)


# ---------------------------------------------------------------- optimizer and schedule


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the share `warmup` of the steps, then linear decay to 0 (Table 4) -> float."""
    rise = warmup * steps
    if step < rise:
        return peak * (step + 1) / (math.floor(rise) + 1)
    return peak * (steps - step) / (steps - rise)


def decay_groups(model, weight_decay):
    """The parameters in groups: biases and LayerNorm weights are not decayed; embeddings, position tables and, as
    released, the weights of batch norms are.

    Checkpoints number the moments in this order: first the matrices and tables, then all biases and norms' weights.
    """
    kinds = (nn.LayerNorm, nn.BatchNorm1d)
    norms = {id(m.weight): isinstance(m, kinds[1]) for m in model.modules() if isinstance(m, kinds)}  # decayed or not
    order = sorted(model.named_parameters(), key=lambda pair: pair[0].endswith("bias") or id(pair[1]) in norms)
    groups = itertools.groupby(order, lambda pair: not pair[0].endswith("bias") and norms.get(id(pair[1]), True))
    return [{"params": [p for _, p in pairs], "weight_decay": weight_decay * decayed} for decayed, pairs in groups]


class Optimizer:
    """AdamW with the gradient's norm clipped and the schedule of Table 4; in fp16 the loss is scaled.

    settings: lr, weight_decay, warmup, clip. steps: of the whole schedule. betas: Table 4's.
    """

    def __init__(self, model, settings, steps, betas, precision=torch.float32):
        self.model, self.settings, self.steps = model, settings, steps
        device = next(model.parameters()).device.type
        self.adamw = torch.optim.AdamW(decay_groups(model, settings.weight_decay), settings.lr, betas, eps=1e-8,
                                       fused=device in ("cuda", "cpu"))
        self.scaler = torch.amp.GradScaler(device, enabled=precision == torch.float16)
        self.bad = torch.zeros((), dtype=torch.bool, device=device)  # whether the last step's gradient was not finite
        self.in_row, self.skipped = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))  # such steps

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def gradients(self, loss, tensors):
        """Those of a loss by some tensors, apart from what `backward` adds up -> [tensor]."""
        scale = self.scaler.scale(torch.ones_like(loss))
        return [gradient / scale for gradient in torch.autograd.grad(loss * scale, tensors)]

    def step(self, step):
        """Moves the weights along the gradient, which is then cleared -> the learning rate of this step.

        Not where the gradient is not finite: such a step is skipped, and counted. Nobody waits for a GPU to know."""
        lr = learning_rate(step, self.steps, self.settings.lr, self.settings.warmup)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.adamw)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.bad = ~norm.isfinite()
        self.in_row, self.skipped = (self.in_row + 1) * self.bad, self.skipped + self.bad
        if self.scaler.is_enabled() or not self.adamw.defaults["fused"]:
            if self.scaler.is_enabled() or not self.bad:
                self.scaler.step(self.adamw)
        else:
            self.adamw.found_inf = self.bad.float()  # how fused AdamW is told to leave everything as it is
            self.adamw.step()
        self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)
        return lr

    def state_dict(self):
        return {"optimizer": self.adamw.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, checkpoint):
        """Moments and scale of a checkpoint; weight decay and betas stay those of this run's settings."""
        own = self.adamw.state_dict()["param_groups"]
        self.adamw.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": own})
        if self.scaler.is_enabled() and checkpoint.get("scaler"):  # not of a run in another precision
            self.scaler.load_state_dict(checkpoint["scaler"])


# ---------------------------------------------------------------- the folder


class Run:
    """A model in training: its optimizer, where it goes on from, and its folder with config.json, metrics.jsonl,
    TensorBoard events and last.pt, which only the first process writes.

    videos: how many it trains on. epochs: of the schedule, of which it ends after stop_after, where that is not 0.
    tokens: how they were made, `predict.origin`.
    beginning: see `checkpoints.start`. A run that goes on from a checkpoint drops the metrics after it, and begins with
    those of another run that it continues. What an earlier run left in the folder stays there until this one's first
    checkpoint, and is then moved to a folder of its own.
    """

    def __init__(self, config, model, videos, epochs, betas, device, tokens, stop_after=0.0, **beginning):
        self.config, self.model, self.videos, self.tokens, self.out = config, model, videos, tokens, Path(config.out)
        self.rank, self.world = rank_and_world()
        self.steps = config.steps or max(1, int(epochs * videos) // config.batch)
        self.optimizer = Optimizer(model, config, self.steps, betas, pick_precision(config.precision, device))
        self.end = min(self.steps, max(1, int(stop_after * videos) // config.batch)) if stop_after else self.steps
        self.first, goes_on = start(config, model, self.optimizer, tokens=tokens, **beginning)
        if self.first > self.end or (self.first == self.end and not goes_on):
            raise UserError(f"nothing is left to train: the checkpoint is of step {self.first} of {self.end}")
        self.sums, self.count, self.stop, self.board, self.first_loss = 0, 0, 0, None, None
        if self.rank == 0:
            self.open_folder(goes_on, beginning.get("resume_from"))
        if config.compile:
            model.backbone.compile_layers()
        self.wrapped = DistributedDataParallel(model) if self.world > 1 else model

    def open_folder(self, goes_on, resume_from):
        from torch.utils.tensorboard import SummaryWriter  # slow to import
        self.out.mkdir(parents=True, exist_ok=True)
        self.earlier = [] if goes_on else [path for name in FILES for path in self.out.glob(name)]
        if goes_on:
            for path in self.out.glob("*.new.json*"):  # of a run that never came to its first checkpoint
                path.unlink()
        earlier = read_metrics(Path(resume_from).parent if resume_from and not goes_on else self.out)
        kept = [record for record in earlier if record["step"] <= self.first] if self.first else []
        self.new = ".new" * bool(self.earlier)
        write_text(self.out / f"config{self.new}.json", json.dumps(asdict(self.config), indent=1) + "\n")
        write_text(self.out / f"metrics{self.new}.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        self.board = SummaryWriter(self.out, purge_step=self.first + 1)

    def settle(self):
        """Moves what an earlier run left to a folder of its own, and takes its place."""
        if not self.earlier:
            return
        place = next(place for n in itertools.count(1) if not (place := self.out / f"earlier-{n}").exists())
        place.mkdir()
        for path in self.earlier:
            os.replace(path, place / path.name)
        self.earlier, self.new = [], ""
        for name in ("config.json", "metrics.jsonl"):
            os.replace(self.out / name.replace(".", ".new.", 1), self.out / name)
        self.bar.write(f"what an earlier run left in {self.out} is now in {place}")

    def withdraw(self):
        """Ends a run that is stopped before its first checkpoint, where that would take an earlier run's place."""
        for path in self.out.glob("*.new.json*"):
            path.unlink()
        self.bar.close()
        say(f"stopped before the first checkpoint: {self.out} is as it was, and --resume goes on with the earlier run")
        leave_group()
        sys.exit(self.stop or sum(self.asked))

    def save(self, step):
        """last.pt, and what it was before as previous.pt."""
        last = self.out / "last.pt"
        save_checkpoint(self.out / "next.pt", {
            "model": self.model.state_dict(), **self.optimizer.state_dict(), "step": step + 1, "steps": self.steps,
            "config": asdict(self.config), "tokens": self.tokens, "transformer": asdict(self.model.backbone.config)})
        self.settle()
        if last.is_file():
            os.replace(last, self.out / "previous.pt")
        os.replace(self.out / "next.pt", last)

    def each_step(self, text):
        """The steps that are left, with a bar. Every save_every steps, and after the last, a checkpoint, which waits
        for a step whose gradient was finite.

        A signal to stop (Ctrl-C, SIGTERM) lets the step end, saves, and exits with the code that shells give it; a
        second one exits at once. Several processes stop at the same step: the next that writes a line of metrics.
        """
        left, self.since = range(self.first, self.end), (trimmed := time.perf_counter())
        self.bar = progress(left, text, len(left), " steps", self.rank == 0)
        owed = False  # a checkpoint that waits for a good step
        keep()
        with stopping() as self.asked:
            for step in self.bar:
                yield step
                if time.perf_counter() - trimmed > 10:
                    give_back()
                    trimmed = time.perf_counter()
                stop = self.stop or (self.world == 1 and sum(self.asked))
                if stop and self.rank == 0 and self.earlier:
                    self.withdraw()
                last = stop or step + 1 == self.end
                owed = (owed or last or self.due(step, self.config.save_every)) and self.rank == 0
                if owed and self.may_save(last):
                    self.save(step)
                    owed = False
                if stop and step + 1 < self.end:
                    self.bar.close()
                    say(f"stopped at step {step + 1} of {self.end}: the same command with --resume goes on from "
                        f"{self.out / 'last.pt'}")
                    leave_group()
                    sys.exit(stop)
        if self.board:
            self.board.close()
        if self.end < self.steps:
            say(f"stopped in a schedule of {self.steps} steps: --resume goes on here, --resume-from in another folder")

    def due(self, step, every):
        return (step + 1) % every == 0 or step + 1 == self.end

    def record(self, step, measures, lr, shown):
        """A step's measures, {name: scalar tensor}, each process's share; every log_every steps a line of metrics, with
        their means over these steps and over the processes, those left out whose gradient was not finite. shown: format
        of what the bar shows of them."""
        values, bad = torch.stack(list(measures.values())), self.optimizer.bad
        self.sums, self.count = self.sums + values.masked_fill(bad, 0), self.count + 1
        self.first_loss = values[0] if self.first_loss is None else self.first_loss
        if not self.due(step, self.config.log_every):
            return
        asked = values.new_tensor([sum(self.asked)])
        *sums, asked = sum_over_all(torch.cat([self.sums, asked])).tolist()
        skipped, now, done = int(self.optimizer.skipped), time.perf_counter(), step + 1
        means = {name: total / max(1, self.count - skipped) / self.world for name, total in zip(measures, sums)}
        self.write(step=done, epoch=done * self.config.batch / self.videos, **means, lr=lr,
                   videos_per_second=self.config.batch * self.count / (now - self.since),
                   **({"skipped_steps": skipped} if skipped else {}))
        self.bar.set_postfix_str(shown.format(**means) + f" skipped {skipped}" * (skipped > 0), refresh=False)
        self.loss, self.stop = means["loss"], int(asked and (sum(self.asked) or 128 + signal.SIGTERM))
        if self.optimizer.in_row >= 10:
            self.give_up(f"the gradient was not finite in {int(self.optimizer.in_row)} steps in a row")
        if not math.isfinite(self.loss):
            self.give_up(f"the loss is {self.loss} at step {done}")
        self.optimizer.skipped.zero_()
        self.sums, self.count, self.since = 0, 0, now

    def may_save(self, last):
        """Whether the model is good: not after a step that was skipped, as the one before may have spoilt it; at the
        end one or two such steps are borne. One whose loss is ten times that of the first step has exploded: UserError.
        """
        in_row = int(self.optimizer.in_row)
        if last and in_row > 2:
            self.give_up(f"the gradient was not finite in the last {in_row} steps")
        if self.first_loss is not None:
            good = self.count - int(self.optimizer.skipped)
            loss = self.sums[0].item() / max(good, 1) if self.count else self.loss
            if not loss < 10 * max(1.0, self.first_loss.item()):
                self.give_up(f"the loss has risen from {self.first_loss.item():.3g} to {loss:.3g}")
        return last or not in_row

    def give_up(self, why):
        last = self.out / "last.pt"
        kept = f"; {last} is from before" if last.is_file() and not self.earlier else ""
        raise UserError(f"{why}: lower --lr{kept}")

    def write(self, **metrics):
        """One line of metrics; step is among them."""
        if self.rank == 0:
            metrics = {key: round(value, 6) if isinstance(value, float) else value for key, value in metrics.items()}
            with open(self.out / f"metrics{self.new}.jsonl", "a") as file:
                file.write(json.dumps(metrics) + "\n")
            for key in metrics.keys() - {"step"}:
                self.board.add_scalar(key, metrics[key], metrics["step"])


def read_metrics(out):
    """The lines of a run's metrics.jsonl, a last one cut short left out -> [dict]."""
    return [line for line in read_lines(Path(out) / "metrics.jsonl") if isinstance(line.get("step"), int)]
