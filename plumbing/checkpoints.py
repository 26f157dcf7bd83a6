"""Checkpoints: written whole or not at all, read without running anything, fitted to the model that asks for them."""
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from plumbing.cli import UserError
from plumbing.files import whole
from plumbing.processes import from_all, restarted, say

CHANGING = {"out", "resume", "resume_from", "init", "checkpoint", "fill_in", "predict", "gpus", "device", "precision",
            "workers", "compile", "recompute", "micro_batch", "save_every", "log_every", "knn_every", "tokenizer",
            "init_std"}


def save_checkpoint(path, content):
    """torch.save, whole or not at all."""
    with whole(path) as file:
        torch.save(content, file)


def read_checkpoint(path):
    """A checkpoint's dictionary, read without running anything that the file says; the "module." that
    DistributedDataParallel puts before names is taken off.

    Raises UserError, naming the file, for one that is damaged or holds anything but named tensors and plain values.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path} is no regular file")
    try:
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):  # torch compares no checksums
            raise zipfile.BadZipFile(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path} (python pretrain.py makes runs/toy/last.pt, "
                        f"python finetune.py then runs/finetune-motion/last.pt)") from error
    except Exception as error:  # torch's unpickler meets damaged files with errors of many kinds
        raise UserError(f"{path} is damaged, or no checkpoint of plain tensors ({type(error).__name__})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of named tensors")
    if "transformer" in content and not all(isinstance(content.get(key), dict) for key in ("model", "transformer")):
        raise UserError(f"{path} is no checkpoint of this project: its model or transformer is missing")
    state = content["model"] if isinstance(content.get("model"), dict) else {}
    if not all(isinstance(key, str) and torch.is_tensor(value) for key, value in state.items()):
        raise UserError(f"{path} is no checkpoint of this project: its model holds other things than named tensors")
    if not all(isinstance(content.get(key, {}), dict) for key in ("config", "tokens")):
        raise UserError(f"{path} is no checkpoint of this project: its config or tokens are no settings")
    if isinstance(content.get("model"), dict):
        content["model"] = without_module(content["model"])
    return without_module(content)


def without_module(state):
    prefixed = len(state) > 0 and all(key.startswith("module.") for key in state)
    return {key.removeprefix("module."): value for key, value in state.items()} if prefixed else state


def rebuilt(kind, settings, path):
    """What a checkpoint's settings describe, such as a TransformerConfig. UserError, naming the file, for others."""
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged, or of another version: {str(error).splitlines()[0]}") from error


def load_weights(model, weights, path):
    """Raises UserError, naming the file and a tensor, where the weights are another model's, or not all numbers."""
    own = model.state_dict()
    for name in [*own, *weights]:
        there, here = (state[name].shape if name in state else None for state in (weights, own))
        if there != here:
            raise UserError(f"{path} does not fit this model: {name} is " + (
                "missing in it" if there is None else "of no use to it" if here is None else
                f"{' x '.join(map(str, there))} there, {' x '.join(map(str, here))} here"))
        if there and weights[name].is_floating_point() and not weights[name].isfinite().all():
            raise UserError(f"{path} holds numbers in {name} that are none (NaN or infinity)")
    model.load_state_dict(weights)


def check_shape(path, before, model):
    """Raises UserError where a checkpoint's transformer, a TransformerConfig's dict, is another one than the model's:
    tensors of another layout may well fit. Clip size, dropout and how the weights began may differ."""
    for name, own in asdict(model.backbone.config).items():
        if name not in ("frames", "height", "width", "dropout", "init_std") and before.get(name, own) != own:
            raise UserError(f"{path} does not fit this model: its transformer has {name} {before[name]}, not {own}")


def same_tokenizer(path, before, now, place):
    """Raises UserError where the tokens that a checkpoint learnt, and others at `place`, are of different tokenizers.
    before, now: dicts with tokenizer and fingerprint, where known, such as `predict.origin`'s."""
    if None not in (a := before.get("fingerprint"), b := now.get("fingerprint")) and a != b:
        raise UserError(f"{place} was made with another tokenizer ({now['tokenizer']}, {b}) than the tokens of {path} "
                        f"({before.get('tokenizer')}, {a})")


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


def restore(path, model, optimizer, resize=None, config=None, tokens=None):
    """Loads a checkpoint's weights, moments and gradient scaler -> its step. UserError where the sizes do not fit, or
    the tokens are another tokenizer's.

    resize: see `resize_tables`; without it, the clip size must be the checkpoint's. config: settings that go on with
    it; where they change the method, that is said. tokens: those to go on with, `predict.origin`.
    """
    checkpoint = read_checkpoint(path)
    step, moments = checkpoint.get("step"), dict(checkpoint.get("optimizer") or {}).get("state")
    if "model" not in checkpoint or not isinstance(step, int) or step < 0 or not isinstance(moments, dict):
        raise UserError(f"{path} is no checkpoint of a run of this project")
    transformer = checkpoint.get("transformer", {})
    check_shape(path, transformer, model)
    same_tokenizer(path, checkpoint.get("tokens", {}), tokens or {}, "what is trained on here")
    if "init_std" in transformer:
        model.backbone.config.init_std = transformer["init_std"]  # how these weights did begin
    weights = checkpoint["model"]
    order = [p for group in optimizer.adamw.param_groups for p in group["params"]]  # how the optimizer numbers them
    if resize:
        resize_tables(model, weights, resize, moments, {p: number for number, p in enumerate(order)})
    load_weights(model, weights, path)
    for number, p in enumerate(order):  # of a parameter that was never trained there are none
        of_p = moments.get(number, {"exp_avg": p, "exp_avg_sq": p, "step": 0})
        if of_p.keys() < {"exp_avg", "exp_avg_sq", "step"} or {p.shape} != {of_p[k].shape for k in of_p if k != "step"}:
            raise UserError(f"{path} does not fit this model: its optimizer's moments are those of other tensors")
    optimizer.load_state_dict(checkpoint)
    if (before := checkpoint.get("steps", optimizer.steps)) != optimizer.steps:
        say(f"the schedule of {path} was of {before} steps; now it is of {optimizer.steps}")
    before, now = checkpoint.get("config", {}), asdict(config) if config else {}
    changed = [f"--{name.replace('_', '-')} {now[name]} (was {before[name]})" for name in sorted(now.keys() - CHANGING)
               if before.get(name, now[name]) != now[name]]
    if changed:
        say(f"from here on with {', '.join(changed)}")
    return step


def start(config, model, optimizer, resize=None, init=None, resume_from="", tokens=None):
    """Loads what a run begins with -> its first step, whether that goes on in its own folder.

    From out/last.pt, where it is to go on from there; or from another run's checkpoint resume_from; or init(), which
    loads first weights, at step 0.
    """
    first, last = 0, last_checkpoint(config.out, config.resume)
    if path := last or resume_from:
        first = restore(path, model, optimizer, resize, config if last else None, tokens)
        say(f"resumed {path} at step {first} of {optimizer.steps}")
    elif init:
        init()
    steps = set(from_all(first))
    if len(steps) > 1:
        raise UserError(f"processes would start from different steps, {sorted(steps)}: --out {config.out} must be "
                        f"storage that all machines share")
    return first, last is not None


def last_checkpoint(out, resume):
    """The checkpoint in `out` that a run goes on from, because it is asked to or restarted by torchrun, or None.

    That is last.pt, or next.pt or previous.pt where a kill left that alone. What an earlier run left there is none of a
    run that torchrun restarts before its own first checkpoint: until then its settings lie in config.new.json.
    """
    if not (resume or restarted()) or (not resume and (Path(out) / "config.new.json").is_file()):
        return None
    found = [path for name in ("last.pt", "next.pt", "previous.pt") if (path := Path(out) / name).is_file()]
    if not found:
        say(f"there is no {Path(out) / 'last.pt'} to go on from: starting anew")
    return found[0] if found else None
