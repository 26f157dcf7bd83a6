"""Checkpoints: written whole or not at all, read without running anything in the file."""
import zipfile
from dataclasses import asdict

import torch

from plumbing import released
from plumbing.cli import UserError
from plumbing.files import whole
from plumbing.processes import say, wait_for_all
from plumbing.released import patterns_of, strip_wrappers
from plumbing.tokens import SPECIAL
from plumbing.weights import resize_table

MAY_DIFFER = {"frames", "height", "width", "dropout", "init_std"}  # of two transformers that fit


def save_checkpoint(path, content):
    """torch.save, whole or not at all."""
    with whole(path) as file:
        torch.save(content, file)


def read_checkpoint(path):
    """A checkpoint -> dict, or a plain state dict of tensors, without wrappers' prefixes.

    Raises UserError, naming the file, for one that is missing, damaged or no dictionary.
    """
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # compares checksums
            raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path} (python pretrain.py makes runs/toy/last.pt, "
                        f"python finetune.py runs/finetune-motion/last.pt)") from error
    except Exception as error:  # torch raises errors of many kinds
        raise UserError(f"{path} is damaged, or no checkpoint of plain tensors "
                        f"({type(error).__name__})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} holds no dictionary of named tensors")
    if isinstance(content.get("model"), dict):
        strip_wrappers(content["model"])
        return content
    return strip_wrappers(content)


def load_weights(model, weights, path):
    """load_state_dict. Raises UserError, naming the file and a tensor, if they do not fit."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} does not fit this model: {reason}") from error


def load_best(model, path):
    """Gives a model the weights of its run's best checkpoint, saved by the first process -> step.
    """
    wait_for_all()
    content = read_checkpoint(path)
    load_weights(model, content["model"], path)
    say(f"testing {path}, the best on the validation videos, of step {content['step']}")
    return content["step"]


def rebuilt(kind, settings, path):
    """What a checkpoint's settings describe, such as a TransformerConfig."""
    try:
        return kind(**settings)
    except TypeError as error:
        raise UserError(f"{path} was made by another version: {error}") from error


def check_tokenizer(path, learnt, header):
    """Raises UserError where a model has learnt the tokens of another tokenizer.

    learnt: how these tokens were made, {} of a released checkpoint. header: of the token store.
    """
    if learnt and learnt["fingerprint"] != header["fingerprint"]:
        raise UserError(f"the tokens were made with another tokenizer ({header['tokenizer']}, "
                        f"{header['fingerprint']}) than those that {path} has learnt "
                        f"({learnt['tokenizer']}, {learnt['fingerprint']})")


def check_transformer(path, transformer, config):
    """Raises UserError where a checkpoint's transformer, a dict, is not this TransformerConfig.

    Tensors alone do not tell: those of two layouts can have the same shapes.
    """
    for name, value in asdict(config).items():
        if name not in MAY_DIFFER and transformer[name] != value:
            raise UserError(f"{path} does not fit this model: its transformer has {name} "
                            f"{transformer[name]}, not {value}")


def initialise(model, other, path, header):
    """Starts a model from the weights of another one, loaded from `path`. As `restore`."""
    check_tokenizer(path, read_checkpoint(path).get("tokens", {}), header)
    check_transformer(path, asdict(other.backbone.config), model.backbone.config)
    weights = other.state_dict()
    resize_tables(model, weights)
    load_weights(model, weights, path)
    say(f"starting from {path}")


def restore(path, model, optimizer, scaler, header, steps):
    """Continues from a checkpoint: weights, moments, gradient scale -> how many steps it has done.

    Position tables and their moments are interpolated to the model's clip size. header: of the
    token store. steps: of the schedule.
    """
    checkpoint = read_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} is no checkpoint of a run of this project")
    if checkpoint["step"] > steps:
        raise UserError(f"{path} has done {checkpoint['step']} steps, the schedule has {steps}: "
                        f"give more --steps or --epochs")
    check_tokenizer(path, checkpoint["tokens"], header)
    check_transformer(path, checkpoint["transformer"], model.backbone.config)
    model.backbone.config.init_std = checkpoint["transformer"]["init_std"]
    order = [p for group in optimizer.param_groups for p in group["params"]]
    moments = checkpoint["optimizer"]["state"]
    for name in resize_tables(model, checkpoint["model"]):
        table = getattr(model.backbone, name)
        number = next(i for i, p in enumerate(order) if p is table)  # how the optimizer counts
        for moment in ("exp_avg", "exp_avg_sq"):
            moments[number][moment] = resize_table(moments[number][moment], len(table))
    load_weights(model, checkpoint["model"], path)
    saved = checkpoint["optimizer"]["param_groups"]
    groups = [group | {"params": before["params"]}  # weight decay and betas of this run
              for group, before in zip(optimizer.state_dict()["param_groups"], saved)]
    try:
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    except ValueError as error:
        raise UserError(f"{path} was made by another version, which groups the parameters "
                        f"differently: its run cannot be continued") from error
    if scaler.get_scale() != 1 != checkpoint["scaler"].get("scale", 1):  # both in fp16
        scaler.load_state_dict(checkpoint["scaler"])
    say(f"resumed {path} at step {checkpoint['step']} of {steps}")
    if checkpoint["steps"] != steps:
        say(f"the schedule of {path} was of {checkpoint['steps']} steps")
    return checkpoint["step"]


def resize_tables(model, weights):
    """Interpolates position tables in `weights` to the model's clip size -> names of those."""
    resized = []
    for name in ("time", "row", "column"):
        before, now = len(weights[f"backbone.{name}"]), len(getattr(model.backbone, name))
        if before != now:
            weights[f"backbone.{name}"] = resize_table(weights[f"backbone.{name}"], now)
            say(f"interpolated the {name} positions from {before} to {now}")
            resized.append(name)
    return resized


# ---------------------------------------------------------------- a backbone from any file


def read_backbone(path, layouts, changes):
    """A file with a backbone -> {field of TransformerConfig: value}, {name: tensor}.

    path: our checkpoint, a released one, or the state dict of a backbone or of a model with one.
    layouts: the layouts to choose from. changes: what the caller knows better, as `sizes_of`.
    Raises UserError, naming the file and a tensor, if it is none of them.
    """
    checkpoint = read_checkpoint(path)
    if "transformer" in checkpoint:
        return checkpoint["transformer"], backbone_of(checkpoint["model"])
    with released.reading(path):
        if released.is_released(checkpoint):
            return released.take_backbone(checkpoint, layouts)
        weights = backbone_of(checkpoint)
        return sizes_of(weights, layouts, **changes), weights


def backbone_of(state):
    """The tensors of the backbone, in a state dict of it or of a whole model -> {name: tensor}."""
    prefix = "backbone."
    weights = {name.removeprefix(prefix): tensor
               for name, tensor in state.items() if name.startswith(prefix)}
    return weights or state


def sizes_of(weights, layouts, heads=None, layout=None, **_):
    """The sizes of a backbone, from its tensors' shapes -> {field of TransformerConfig: value}.

    The shapes tell neither the heads nor the layout, nor where the LayerNorms are. As in the paper,
    there are d / 64 heads, the first layout with so many blocks, and post-LayerNorm.
    Raises KeyError for a tensor that is missing, UserError if the number of heads does not fit.
    """
    rows, dim = weights["embedding.weight"].shape
    attention_dim = len(weights["layers.0.blocks.0.qkv.weight"]) // 3
    blocks = sum(name.startswith("layers.0.blocks.") and name.endswith(".qkv.weight")
                 for name in weights)
    choices = [name for name in layouts if len(patterns_of(name)) == blocks]
    if not choices:
        raise UserError(f"no layout has {blocks} attention blocks")
    layout, heads = layout or choices[0], heads or max(1, dim // 64)
    if attention_dim % heads or heads % max(patterns_of(layout)):
        raise UserError(f"{heads} heads do not fit it: give heads, layout and pre_norm")
    return {
        "layers": sum(name.endswith(".fc1.weight") for name in weights),
        "dim": dim,
        "heads": heads,
        "head_dim": attention_dim // heads,
        "mlp_dim": len(weights["layers.0.fc1.weight"]),
        "frames": len(weights["time"]),
        "height": len(weights["row"]),
        "width": len(weights["column"]),
        "vocab_size": rows - SPECIAL,
        "layout": layout,
    }
