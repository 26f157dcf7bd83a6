"""What a trained model makes of video files: what it fills in (Fig. 5), features, classes.

    python pretrain.py --fill-in VIDEO ... --checkpoint RUN/last.pt
    python pretrain.py --features OUT.npz --videos DIR --checkpoint RUN/last.pt
    python finetune.py --predict VIDEO ... --checkpoint RUN/last.pt

In place of a VIDEO, a folder stands for all videos below it. A video is tokenised like the videos
that the model was trained on; the checkpoint says how.

Shapes: F frames of a video, S frame side in pixels, T frames of a clip, H x W tokens a frame,
V views, C classes.
"""
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import data
import monitor
from plumbing.checkpoints import read_checkpoint
from plumbing.cli import UserError, progress
from plumbing.decoding import VideoError, printed, read_frames, stream_views
from plumbing.files import try_folder, whole
from plumbing.lists import videos_below
from plumbing.pictures import draw_prediction, save_fill_in
from plumbing.processes import autocast
from plumbing.results import write_predictions
from plumbing.tokenizing import encode_video
from plumbing.tokens import PATCH
from probe import clip_features
from vqvae import load_tokenizer

FPS = 2.0  # of the released models, whose checkpoints do not name it
CLIPS = 10  # evenly spaced clips of a video for its features


def origin(store, tokenizer="", **more):
    """How a store's tokens were made -> dict that goes into a checkpoint.

    tokenizer: the tokenizer's file, if known.
    """
    made = {key: store.header[key] for key in ("tokenizer", "fingerprint", "fps", "size", "views")}
    if tokenizer:
        made["tokenizer"] = os.path.abspath(tokenizer)
    return made | more


def clip_fps(path, otherwise=0.0):
    """Frames a second of the clips that a checkpoint's model was trained on, on average.

    otherwise: for a checkpoint that does not tell; 0: the released models' rate.
    """
    checkpoint = read_checkpoint(path)
    settings = checkpoint.get("config", {})
    if "min_stride" in settings:  # of pre-training
        return 2 * checkpoint["tokens"]["fps"] / (settings["min_stride"] + settings["max_stride"])
    return settings.get("fps", otherwise or FPS)


def read_origin(config, backbone):
    """The tokenizer of config.checkpoint -> it, `origin`'s dict, the settings of the training.

    Raises UserError where the tokenizer is missing or is another one than in training.
    """
    checkpoint, shape = read_checkpoint(config.checkpoint), backbone.config
    size = PATCH * shape.height
    made = {"tokenizer": "", "fps": FPS, "size": size, "views": [[size, "center", False]],
            **checkpoint.get("tokens", {})}
    path = Path(config.tokenizer or made["tokenizer"])
    beside = Path(config.checkpoint).parent / path.name
    if not path.is_file() and beside.is_file() and not config.tokenizer:
        path = beside  # the run was moved
    if not path.is_file():
        name = path if path.name else "its checkpoint names none"
        raise UserError(f"there is no tokenizer ({name}): give --tokenizer")
    tokenizer = load_tokenizer(path).to(backbone.cls.device)
    fingerprint = made.get("fingerprint", tokenizer.fingerprint)
    if tokenizer.fingerprint != fingerprint or tokenizer.vocab_size != shape.vocab_size:
        raise UserError(f"{path} ({tokenizer.vocab_size} codes, {tokenizer.fingerprint}) is not "
                        f"the tokenizer of {config.checkpoint} ({shape.vocab_size} codes, "
                        f"{fingerprint})")
    return tokenizer, {**made, "tokenizer": str(path)}, checkpoint.get("config", {})


def picture_path(folder, kind, video, taken):
    """The picture of a video, without its ending -> Path. taken: those before, which differ."""
    of = Path(video).resolve().parent.name
    path = stem = Path(folder) / f"{kind}-{of[:30]}-{Path(video).stem[:60]}"
    number = 1
    while path in taken:
        number += 1
        path = Path(f"{stem}-{number}")
    taken.append(path)
    return path


def each_video(paths, tokenizer, made, views, view=0):
    """Decodes and tokenises files -> yields path, tokens (V, F, H, W), {frame number: its pixels}.

    paths: files, and folders for all videos below them. The pixels are up to 64 frames of one view,
    uint8 (S, S, 3). A file that does not decode costs a line. Raises UserError if none does.
    """
    any_read, files = False, []
    for path in paths:
        files += videos_below(path) if os.path.isdir(path) else [path]
    for path in progress(map(Path, files), "videos", len(files), " videos", show=len(files) > 20):
        frames = {}
        pieces = stream_views(path, made["fps"], made["size"], views)
        try:
            tokens, damage = encode_video(tokenizer, keep_frames(pieces, view, frames))
        except VideoError as error:
            print(f"skipped {error}")
            continue
        if damage:
            print(f"damaged {damage}")
        any_read = True
        yield path, tokens, frames
    if not any_read:
        raise UserError("none of the videos could be read")


def keep_frames(pieces, view, frames, most=64):
    """Passes pieces on, and keeps evenly spaced frames of one view in the dict `frames`."""
    step, count = 1, 0
    for piece, damage in pieces:  # (V, f, S, S, 3)
        for frame in piece[view]:
            if count % step == 0:
                frames[count] = frame.copy()
            if len(frames) > most:
                step *= 2
                for number in [number for number in frames if number % step]:
                    del frames[number]
            count += 1
        yield piece, damage


# ---------------------------------------------------------------- Fig. 5

MASKS = ("mask", "mask_ratio", "blocks", "noise")  # fields of pretrain.Config


def fill_in(config, model):
    """pretrain.py --fill-in: a picture of each video, beside the checkpoint.

    config: pretrain.Config. model: Vimpac.
    """
    tokenizer, made, trained = read_origin(config, model.backbone)
    stride = max(1, round((trained.get("min_stride", 1) + trained.get("max_stride", 1)) / 2))
    masks = {name: trained[name] for name in MASKS if name in trained}  # as in its training
    config, generator = replace(config, **masks), torch.Generator().manual_seed(config.seed)
    folder, taken = Path(config.checkpoint).parent, []
    if trained.get("mask_weight") == 0:
        print(f"{printed(config.checkpoint)} was trained with --mask-weight 0: "
              f"what it fills in is a guess")
    try_folder(folder)
    views = [(made["size"], "center", False)]
    for path, (tokens,), _ in each_video(config.fill_in, tokenizer, made, views):
        clip = monitor.middle_clip(tokens, model.backbone.config, stride)
        frames = read_frames(path, made["fps"], made["size"])
        frames = monitor.middle_frames(frames, len(clip), stride)
        picture = monitor.fill_in_clip(model, tokenizer, clip, frames, config, generator)
        out = picture_path(folder, "fill_in", path, taken)
        save_fill_in(picture[None], [printed(path.name)], out)
        print(f"{printed(path)}: {printed(out)}.png, {printed(out.name)}.gif")


# ---------------------------------------------------------------- features


def save_features(config, backbone):
    """pretrain.py --features: CLS and the mean token feature of every video, in a .npz file.

    names: (n,). cls, mean: float32 (n, d), each the mean over evenly spaced clips.
    """
    tokenizer, made, _ = read_origin(config, backbone)
    stride = max(1, round(made["fps"] / clip_fps(config.checkpoint)))
    views, names, features = [(made["size"], "center", False)], [], []
    try_folder(Path(config.features).parent)
    backbone.eval()
    for path, (tokens,), _ in each_video([config.videos], tokenizer, made, views):
        clips = data.even_clips(tokens, backbone.config.frames, stride, CLIPS, tokenizer.vocab_size)
        names.append(printed(os.path.relpath(path, config.videos)))
        clips = torch.from_numpy(clips)
        features.append(clip_features(backbone, clips, config.precision).mean(dim=0).cpu())
    cls, mean = torch.stack(features).chunk(2, dim=1)  # (n, d) each
    with whole(config.features) as file:
        np.savez(file, names=np.array(names), cls=cls.numpy(), mean=mean.numpy())
    print(f"{config.features}: features of {len(names)} videos, cls and mean of {cls.shape[1]}")


# ---------------------------------------------------------------- classes


@torch.no_grad()
def classify(model, tokens, stride, count, precision):
    """The probabilities of evenly spaced clips, the mean over views -> float32 (count, C).

    model: finetune.Classifier. tokens: (V, F, H, W) of one video. stride: the step between a clip's
    frames. count: clips. A video's probabilities are the mean over its clips, as at test.
    """
    shape, device = model.backbone.config, model.backbone.cls.device
    clips = [data.even_clips(view, shape.frames, stride, count, shape.vocab_size)
             for view in tokens]
    with autocast(device, precision):
        logits = torch.cat([model(part.to(device))  # (V * count, C)
                            for part in torch.from_numpy(np.concatenate(clips)).split(16)])
    p = logits.float().softmax(dim=-1)
    return p.unflatten(0, (len(tokens), count)).mean(dim=0).cpu()


def predict(config, model):
    """finetune.py --predict: the five likeliest classes of each video, a CSV file, pictures.

    config: finetune.Config. model: Classifier.
    """
    tokenizer, made, trained = read_origin(config, model.backbone)
    count = trained.get("clips", config.clips)
    stride = max(1, round(made["fps"] / clip_fps(config.checkpoint, config.fps)))
    classes = model.classifier.out_features
    names = list(map(printed, made.get("classes") or [f"class {i}" for i in range(classes)]))
    center = next((i for i, view in enumerate(made["views"]) if view[1] == "center"), 0)
    videos, chances, taken = [], [], []
    model.eval()
    for path, tokens, frames in each_video(config.predict, tokenizer, made, made["views"], center):
        p = classify(model, tokens, stride, count, config.precision)  # (count, C)
        videos.append(path)
        chances.append(p.mean(dim=0))
        percent, best = (100 * chances[-1]).topk(min(5, classes))
        text = ", ".join(f"{names[i]} {value:.1f}%"
                         for i, value in zip(best.tolist(), percent.tolist()))
        print(f"{printed(path)}: {text}")
        if config.draw:
            out = f"{picture_path(config.out, 'predict', path, taken)}.png"
            middles = clip_middles(tokens.shape[1], model.backbone.config.frames, stride, count)
            lines = {names[i]: list(zip(middles / made["fps"], (100 * p[:, i]).tolist()))
                     for i in best.tolist()}
            numbers = np.array(sorted(frames))[data.spread(8, len(frames))]
            pixels = np.stack([frames[number] for number in numbers])
            draw_prediction(pixels, tokens[center][numbers], numbers / made["fps"], lines, out,
                            f"{printed(path.name)}: {names[best[0]]} {percent[0]:.1f}%")
            print(printed(out))
    if config.csv:
        write_predictions(config.csv, videos, torch.stack(chances), names)
        print(f"{config.csv}: {len(videos)} videos")


def clip_middles(length, frames, stride, count):
    """The middles of evenly spaced clips of a video of `length` frames, in frames -> (count,)."""
    starts = data.even_starts(length, frames, stride, count)
    return starts + (min(length, (frames - 1) * stride + 1) - 1) / 2
