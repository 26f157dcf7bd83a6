"""A training run: its settings, optimizer and schedule; its folder with checkpoints, metrics and TensorBoard events."""
import itertools
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from plumbing.cli import UserError, option, progress
from plumbing.processes import from_all, pick_precision, rank_and_world, restarted, say, sum_over_all
from plumbing.store import read_lines, whole, write_text


@dataclass
class RunSettings:
    """The flags that pretrain.py and finetune.py share, with the same meaning and default."""
    resume: bool = option(False, "go on from the run's last checkpoint, where there is one")
    steps: int = option(0, "optimizer steps, in place of epochs (0: as many as these need)", least=0)
    warmup: float = option(0.1, "share of the steps in which the learning rate rises", least=0)
    dropout: float = option(0.1, "dropout everywhere in the transformer")
    clip: float = option(1.0, "largest gradient norm")
    seed: int = option(0, "random seed", least=0)
    gpus: int = option(1, "GPUs of this machine, a process each", least=1)
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

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def gradients(self, loss, tensors):
        """Those of a loss by some tensors, apart from what `backward` adds up -> [tensor]."""
        scale = self.scaler.scale(torch.ones_like(loss))
        return [gradient / scale for gradient in torch.autograd.grad(loss * scale, tensors)]

    def step(self, step):
        """Moves the weights along the gradient, which is then cleared -> the learning rate of this step."""
        lr = learning_rate(step, self.steps, self.settings.lr, self.settings.warmup)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.adamw)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.scaler.step(self.adamw)
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


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(path, content):
    """torch.save, whole or not at all."""
    with whole(path) as file:
        torch.save(content, file)


def read_checkpoint(path):
    """A checkpoint's dictionary, read without running anything that the file says.

    Raises UserError, naming the file, for a file that holds more than tensors and plain values.
    """
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path} (python pretrain.py makes runs/toy/last.pt)") from error
    except Exception as error:  # torch's unpickler meets damaged files with errors of many kinds
        raise UserError(f"{path} is not a checkpoint of plain tensors ({type(error).__name__})") from error


def load_weights(model, weights, path):
    """Raises UserError, naming the file and the first tensor, where the weights are another model's."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit this model: {str(error).splitlines()[1].strip()}") from error


def check_shape(path, before, model):
    """Raises UserError where a checkpoint's transformer, a TransformerConfig's dict, is another one than the model's:
    tensors of another layout may well fit. Clip size and dropout may differ."""
    for name, own in asdict(model.backbone.config).items():
        if name not in ("frames", "height", "width", "dropout") and before.get(name, own) != own:
            raise UserError(f"{path} does not fit this model: its transformer has {name} {before[name]}, not {own}")


def resize_tables(model, weights, resize, moments=None, numbers=None):
    """Fits a checkpoint's position tables, and the optimizer's moments of them, to the model's clip size, in place.

    resize: (table, size) -> table. numbers: {parameter: its number among the moments}.
    """
    for name in ("time", "row", "column"):
        key, table = f"backbone.{name}", getattr(model.backbone, name)  # (size, d)
        if (before := len(weights.get(key, table))) == len(table):
            continue
        weights[key] = resize(weights[key], len(table))
        if moments is not None:
            number = numbers[table]
            moments[number] = {kind: resize(value, len(table)) if value.dim() else value  # but for the count of steps
                               for kind, value in moments.get(number, {}).items()}
        say(f"interpolated the {name} positions{' and their optimizer moments' if moments else ''} "
            f"from {before} to {len(table)}")


def restore(path, model, optimizer, resize=None):
    """Loads a checkpoint's weights, moments and gradient scaler -> its step. UserError where the sizes do not fit.

    resize: see `resize_tables`; without it, the clip size must be the checkpoint's.
    """
    checkpoint = read_checkpoint(path)
    if not {"model", "optimizer", "step"} <= checkpoint.keys():
        raise UserError(f"{path} is no checkpoint of a run of this project")
    check_shape(path, checkpoint.get("transformer", {}), model)
    weights, moments = checkpoint["model"], checkpoint["optimizer"]["state"]
    order = [p for group in optimizer.adamw.param_groups for p in group["params"]]  # how the optimizer numbers them
    if resize:
        resize_tables(model, weights, resize, moments, {p: number for number, p in enumerate(order)})
    load_weights(model, weights, path)
    if any(moments[i]["exp_avg"].shape != p.shape for i, p in enumerate(order) if i in moments):
        raise UserError(f"{path} does not fit this model: its optimizer's moments are those of other tensors")
    optimizer.load_state_dict(checkpoint)
    if (before := checkpoint.get("steps", optimizer.steps)) != optimizer.steps:
        say(f"the schedule of {path} was of {before} steps; now it is of {optimizer.steps}")
    return checkpoint["step"]


def start(config, model, optimizer, resize=None, init=None, resume_from=""):
    """Loads what a run begins with -> its first step, whether that goes on in its own folder.

    From out/last.pt, where it is to go on from there; or from another run's checkpoint resume_from; or init(), which
    loads first weights, at step 0.
    """
    first, last = 0, last_checkpoint(config.out, config.resume)
    if path := last or resume_from:
        first = restore(path, model, optimizer, resize)
        say(f"resumed {path} at step {first} of {optimizer.steps}")
    elif init:
        init()
    steps = set(from_all(first))
    if len(steps) > 1:
        raise UserError(f"processes would start from different steps, {sorted(steps)}: --out {config.out} must be "
                        f"storage that all machines share")
    return first, last is not None


def last_checkpoint(out, resume):
    """The out/last.pt that a run goes on from, because it is asked to or restarted by torchrun, or None."""
    path = Path(out) / "last.pt"
    if not (restarted() or resume):
        return None
    if not path.is_file():
        say(f"there is no {path} to go on from: starting anew")
        return None
    return path


# ---------------------------------------------------------------- the folder


class Run:
    """A model in training: its optimizer, where it goes on from, and its folder with config.json, metrics.jsonl,
    TensorBoard events and last.pt, which only the first process writes.

    videos: how many it trains on. epochs: of the schedule, of which it ends after stop_after, where that is not 0.
    tokens: how they were made, `predict.origin`.
    beginning: see `start`. A run that goes on from a checkpoint drops the metrics after it, and begins with those of
    another run that it continues. One that begins makes an earlier run's last.pt last.old.pt: no restart goes on there.
    """

    def __init__(self, config, model, videos, epochs, betas, device, tokens, stop_after=0.0, **beginning):
        self.config, self.model, self.videos, self.tokens, self.out = config, model, videos, tokens, Path(config.out)
        self.rank, self.world = rank_and_world()
        self.precision = pick_precision(config.precision, device)
        self.steps = config.steps or max(1, int(epochs * videos) // config.batch)
        self.optimizer = Optimizer(model, config, self.steps, betas, self.precision)
        self.end = min(self.steps, max(1, int(stop_after * videos) // config.batch)) if stop_after else self.steps
        self.first, goes_on = start(config, model, self.optimizer, **beginning)
        if self.first >= self.end and not goes_on:
            raise UserError(f"nothing is left to train: the checkpoint is of step {self.first} of {self.end}")
        self.sums, self.count, self.board = 0, 0, None
        if self.rank == 0:
            self.open_folder(goes_on, beginning.get("resume_from"))
        if config.compile:
            model.backbone.compile_layers()
        self.wrapped = DistributedDataParallel(model) if self.world > 1 else model

    def open_folder(self, goes_on, resume_from):
        from torch.utils.tensorboard import SummaryWriter  # slow to import
        if not goes_on and (self.out / "last.pt").is_file():
            os.replace(self.out / "last.pt", self.out / "last.old.pt")
            say(f"{self.out / 'last.pt'} of an earlier run is now last.old.pt")
        write_text(self.out / "config.json", json.dumps(asdict(self.config), indent=1) + "\n")
        earlier = read_metrics(Path(resume_from).parent if resume_from and not goes_on else self.out)
        kept = [record for record in earlier if record["step"] <= self.first] if self.first else []
        write_text(self.out / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        self.board = SummaryWriter(self.out, purge_step=self.first + 1)

    def each_step(self, text):
        """The steps that are left, with a bar; at the end of every save_every, and of the last, a checkpoint."""
        left, self.since = range(self.first, self.end), time.perf_counter()
        self.bar = progress(left, text, len(left), " steps", self.rank == 0)
        for step in self.bar:
            yield step
            if self.due(step, self.config.save_every) and self.rank == 0:
                save_checkpoint(self.out / "last.pt", {
                    "model": self.model.state_dict(), **self.optimizer.state_dict(), "step": step + 1,
                    "steps": self.steps, "config": asdict(self.config), "tokens": self.tokens,
                    "transformer": asdict(self.model.backbone.config)})
        if self.board:
            self.board.close()
        if self.end < self.steps:
            say(f"stopped in a schedule of {self.steps} steps: --resume goes on here, --resume-from in another folder")

    def due(self, step, every):
        return (step + 1) % every == 0 or step + 1 == self.end

    def record(self, step, measures, lr, shown):
        """A step's measures, {name: scalar tensor}, each process's share; every log_every steps a line of metrics, with
        their means over these steps and over the processes. shown: format of what the bar shows of them."""
        self.sums, self.count = self.sums + torch.stack(list(measures.values())), self.count + 1
        if not self.due(step, self.config.log_every):
            return
        means = dict(zip(measures, (sum_over_all(self.sums) / self.count / self.world).tolist()))
        now, done = time.perf_counter(), step + 1
        self.write(step=done, epoch=done * self.config.batch / self.videos, **means, lr=lr,
                   videos_per_second=self.config.batch * self.count / (now - self.since))
        self.bar.set_postfix_str(shown.format(**means), refresh=False)
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"the loss is {means['loss']} at step {done}: lower --lr")
        self.sums, self.count, self.since = 0, 0, now

    def write(self, **metrics):
        """One line of metrics; step is among them."""
        if self.rank == 0:
            metrics = {key: round(value, 6) if isinstance(value, float) else value for key, value in metrics.items()}
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(metrics) + "\n")
            for key in metrics.keys() - {"step"}:
                self.board.add_scalar(key, metrics[key], metrics["step"])


def read_metrics(out):
    """The lines of a run's metrics.jsonl, a last one cut short left out -> [dict]."""
    return read_lines(Path(out) / "metrics.jsonl")
