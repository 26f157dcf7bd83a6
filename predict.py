"""What a trained model makes of any video file: what it fills in (Fig. 5), and which class it takes the video for.

    python pretrain.py --fill-in VIDEO ... --checkpoint RUN/last.pt
    python finetune.py --predict VIDEO ... --checkpoint RUN/last.pt

A video is tokenised as those were that the model was trained on: a checkpoint says how.

Shapes: F frames of a video, S frame side in pixels, T frames of a clip, H x W tokens a frame, C classes.
"""
import os
from pathlib import Path

import numpy as np
import torch

import data
import monitor
from plumbing import processes
from plumbing.checkpoints import read_checkpoint
from plumbing.cli import UserError
from plumbing.decoding import VideoError, printed, read_frames, stream_views
from plumbing.files import try_folder
from plumbing.pictures import draw_prediction, save_fill_in
from plumbing.tokenizing import encoded, fingerprint, joined
from vqvae import load_tokenizer


def origin(store, tokenizer="", **more):
    """How a store's tokens were made -> dict that goes into a checkpoint. tokenizer: its file, where that is known."""
    known = {key: store.header[key] for key in ("tokenizer", "fingerprint", "fps", "size", "views")}
    return known | ({"tokenizer": os.path.abspath(tokenizer)} if tokenizer else {}) | more


def read_origin(config, backbone, fps):
    """Finds the tokenizer of config.checkpoint -> it, `origin`'s dict, the settings that the model was trained with.

    fps: frames a second, where the checkpoint, such as a released one, does not say. Raises UserError where the
    tokenizer is not found, or is not the one of the training.
    """
    checkpoint, shape = read_checkpoint(config.checkpoint), backbone.config
    size = 8 * shape.height
    made = {"tokenizer": "", "fps": fps, "size": size, "views": [[size, "center", False]],
            **checkpoint.get("tokens", {})}
    check_origin(made, shape, config.checkpoint)
    named = Path(config.tokenizer or made["tokenizer"])
    places = [named] if config.tokenizer else [named, Path(config.checkpoint).parent / named.name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        wanted = f"its tokenizer {named} is neither there nor beside it" if named.name else "it names no tokenizer"
        raise UserError(f"{named}: there is no such file" if config.tokenizer else
                        f"{config.checkpoint}: {wanted}: give --tokenizer")
    tokenizer = load_tokenizer(found).to(backbone.cls.device)
    own = fingerprint(tokenizer)
    if own != made.get("fingerprint", own) or tokenizer.vocab_size != shape.vocab_size:
        raise UserError(f"{found} ({tokenizer.vocab_size} codes, {own}) is not the tokenizer of {config.checkpoint} "
                        f"({shape.vocab_size} codes, {made.get('fingerprint', 'fingerprint unknown')})")
    return tokenizer, made, checkpoint.get("config", {})


def check_origin(made, shape, path):
    """Raises UserError where a checkpoint's `origin` cannot be that of its model, a TransformerConfig."""
    views, classes, size = made["views"], made.get("classes", []), made["size"]
    right = {"fps": isinstance(made["fps"], (int, float)) and 0.001 <= made["fps"] <= 1000,
             "size": size == 8 * shape.height == 8 * shape.width,
             "tokenizer": isinstance(made["tokenizer"], str) and len(made["tokenizer"]) < 4096,
             "views": isinstance(views, list) and 0 < len(views) < 100 and all(
                 isinstance(v, (list, tuple)) and [type(part) for part in v] == [int, str, bool] for v in views),
             "classes": isinstance(classes, list) and all(isinstance(name, str) for name in classes)}
    if wrong := [name for name in right if not right[name]]:
        raise UserError(f"{path} is damaged: it says that the {wrong[0]} of its tokens is {str(made[wrong[0]])[:80]!r}")


def numeric(config, trained, name, otherwise):
    """A number of the settings that a checkpoint was trained with. Raises UserError where it cannot be."""
    value = trained.get(name, otherwise)
    if not isinstance(value, (int, float)) or not 0.001 <= value <= 1000:
        raise UserError(f"{config.checkpoint} is damaged: it says that it was trained with {name} {str(value)[:80]!r}")
    return value


def place(folder, kind, path, taken):
    """Where a video's picture goes, without ending -> Path; each file's another, whatever their names."""
    stem = f"{kind}-{path.stem[:60]}"
    taken.append(stem)
    again = f"-{taken.count(stem)}" if taken.count(stem) > 1 else ""
    return Path(folder) / f"{stem}{again}"


def each_video(paths, tokenizer, made, views):
    """Decodes and tokenises files -> yields (Path, tokens (views, F, H, W)).

    One that cannot be decoded is said and left out, one that is damaged is said. Raises UserError at the end where none
    could be decoded.
    """
    read = 0
    for path in paths:
        try:
            tokens, damage = joined(encoded(tokenizer, stream_views(path, made["fps"], made["size"], views)))
        except VideoError as error:
            print(f"skipped {error}")
            continue
        if damage:
            print(f"damaged {damage}")
        yield Path(path), tokens
        read += 1
    if not read:
        raise UserError("none of the videos could be read")


def fill_in(config, model):
    """The pictures of pretrain.py --fill-in, beside the checkpoint. config: pretrain.Config. model: Vimpac."""
    tokenizer, made, trained = read_origin(config, model.backbone, 2.0)  # the released models' rate
    smallest, largest = (numeric(config, trained, name, 1) for name in ("min_stride", "max_stride"))
    stride = max(1, round((smallest + largest) / 2))
    folder, taken = Path(config.checkpoint).parent, []
    if trained.get("mask_weight") == 0:
        print(f"{printed(config.checkpoint)} was trained with --mask-weight 0: what it fills in is a guess")
    try_folder(folder)
    for path, (tokens,) in each_video(config.fill_in, tokenizer, made, [(made["size"], "center", False)]):
        clip = monitor.middle_clip(tokens, model.backbone.config, stride)
        frames = monitor.middle_frames(read_frames(path, made["fps"], made["size"]), len(clip), stride)
        picture = monitor.fill_in_clip(model, tokenizer, clip, frames, torch.Generator().manual_seed(config.seed),
                                       **config.masks())
        picture_file = place(folder, "fill_in", path, taken)
        save_fill_in(picture[None], [printed(path.name)], picture_file)
        print(f"{printed(path)}: {printed(picture_file)}.png, {printed(picture_file.name)}.gif")


@torch.no_grad()
def classify(config, model, precision):
    """The lines and pictures of finetune.py --predict: the five likeliest classes of each file, and over time.

    config: finetune.Config. model: Classifier. A video's probabilities are the mean over clips and views, as at test.
    """
    shape, model = model.backbone.config, model.eval()
    tokenizer, made, trained = read_origin(config, model.backbone, config.fps)
    fps, count = numeric(config, trained, "fps", config.fps), int(numeric(config, trained, "clips", config.clips))
    stride = max(1, round(made["fps"] / fps))
    names, taken = made.get("classes") or [f"class {i}" for i in range(model.classifier.out_features)], []
    if len(names) != model.classifier.out_features:
        raise UserError(f"{config.checkpoint} names {len(names)} classes, of {model.classifier.out_features}")
    try_folder(config.out)
    for path, tokens in each_video(config.predict, tokenizer, made, made["views"]):
        clips = torch.from_numpy(np.concatenate(
            [data.even_clips(view, shape.frames, stride, count, shape.vocab_size) for view in tokens]))
        with processes.autocast(model.backbone.cls.device, precision):
            logits = torch.cat([model(part.to(model.backbone.cls.device)) for part in clips.split(16)])
        p = 100 * logits.float().softmax(dim=-1).unflatten(0, (len(tokens), count)).mean(dim=0).cpu()  # (clips, C)
        chance, best = p.mean(dim=0).topk(min(5, len(names)))
        said = ", ".join(f"{names[i]} {percent:.1f}%" for i, percent in zip(best.tolist(), chance.tolist()))
        picture_file = f"{place(config.out, 'predict', path, taken)}.png"
        print(f"{printed(path)}: {said} ({printed(picture_file)})")
        view, length = next((i for i, v in enumerate(made["views"]) if v[1] == "center"), 0), tokens.shape[1]
        shown, starts = data.spread(8, length), data.even_starts(length, shape.frames, stride, count)
        frames = data.spread_frames(stream_views(path, made["fps"], made["size"], [made["views"][view]]), 8)
        middles = (starts + (min(length, (shape.frames - 1) * stride + 1) - 1) / 2) / made["fps"]  # seconds
        draw_prediction(frames, tokens[view][shown], shown / made["fps"],
                        {names[i]: list(zip(middles, p[:, i].tolist())) for i in best.tolist()},
                        picture_file, f"{printed(path.name)}: {said.split(',')[0]}")
