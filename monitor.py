"""Is it learning? Held-out losses, the kNN accuracy of CLS, and what the model fills in (Fig. 5).

These functions expect the model in evaluation mode, or put it there.

Shapes: n videos, T frames of a clip, H x W tokens a frame, S frame side in pixels, d hidden size.
"""
import math
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn.functional as F

import data
import masking
from plumbing.cli import UserError
from plumbing.decoding import printed, read_frames
from plumbing.pictures import chequered, draw_curves, enlarged, save_fill_in
from plumbing.processes import autocast, one_seed, rank_and_world, sum_over_all
from plumbing.runs import read_metrics
from plumbing.tokens import PAD


def measure(model, terms, config, store, labelled=None):
    """Held-out losses and, with a folder of labelled stores, kNN accuracies -> {name: float}.

    terms: see `evaluate`. Called by all processes, in the middle of training.
    """
    model.eval()
    _, held_out = data.hold_out(len(store), config.held_out)
    with torch.compiler.set_stance("force_eager"):  # other shapes: not worth a compilation
        metrics = evaluate(terms, config, store, held_out)
        if labelled:
            fps = config.clip_fps(store)
            with autocast(model.backbone.cls.device, config.precision):
                metrics |= knn_accuracies(model.backbone, labelled, fps, config.knn)
    model.train()
    return metrics


# ---------------------------------------------------------------- the two tasks, on held-out videos


@torch.no_grad()
def evaluate(terms, config, store, videos):
    """The terms of Eq. 6 on held-out videos -> {"held_out_<term>": float}.

    terms: (clips (n, 2, T, H, W), generator) -> {name: scalar}, of `pretrain.compute_losses`. Clips
    and masks are the same each time. Contrasted with each other are config.contrast videos, or as
    many as there are. The result is empty where there are fewer videos than processes.
    """
    rank, world = rank_and_world()
    group = min(config.contrast, len(videos)) // world * world
    if group == 0:
        return {}
    pairs, groups, total = config.pairs(store), len(videos) // group, 0
    generator = torch.Generator().manual_seed(one_seed(config.seed))
    for items in data.Batches(videos, group, groups, seed=config.seed, rank=rank, world=world):
        clips = torch.from_numpy(np.stack([pairs[item] for item in items]))  # (n, 2, T, H, W)
        values = terms(clips, generator)
        total = total + torch.stack(list(values.values())).float()
    means = (sum_over_all(total) / groups / world).tolist()
    return {f"held_out_{name}": mean for name, mean in zip(values, means)}


# ---------------------------------------------------------------- kNN accuracy


def knn_accuracies(backbone, folder, fps, k, batch=64):
    """kNN accuracy on every label set of the stores in a folder -> {"knn_<labels>": float}.

    Neighbours come from the store train (or train1), queries from val or, without it, from test (or
    test1). fps: frames a second of the clips that the model was trained on. k: how many neighbours
    vote. batch: clips a pass.
    """
    stores = data.labelled_stores(folder)
    features = [clip_features(backbone, store, fps, batch) for store in stores]
    accuracies = {}
    for name in stores[0].label_sets():
        labels, truth = (torch.tensor(store.labels(name), dtype=torch.long, device=x.device)
                         for store, x in zip(stores, features))
        accuracies[f"knn_{name}"] = knn_accuracy(features[0], labels, features[1], truth, k)
    return accuracies


@torch.no_grad()
def clip_features(backbone, store, fps, batch=64):
    """CLS of the middle clip of every video, unmasked -> float32 (videos, d), normalised.

    Called by all processes, which share the videos.
    """
    config, device = backbone.config, backbone.cls.device
    if store.header["vocab_size"] != config.vocab_size:
        raise UserError(f"{store.path} holds {store.header['vocab_size']} codes, the model has "
                        f"{config.vocab_size}")
    stride, view = data.stride_for(store, fps), store.center_view()
    middle = data.EvenClips(store, config.frames, stride, 1, [view])
    features = torch.zeros(len(store), config.dim, device=device)
    backbone.eval()
    for videos in data.share(len(store), batch):
        clips = np.concatenate([middle[video] for video in videos.tolist()])  # (batch, T, H, W)
        cls, _ = backbone(torch.from_numpy(clips).to(device))
        features[videos] = F.normalize(cls.float(), dim=1)
    return sum_over_all(features)


def knn_accuracy(features, labels, queries, truth, k, temperature=0.07):
    """The fraction of queries that their k nearest neighbours classify correctly -> float.

    Neighbours are nearest by cosine, and vote with weight exp(similarity / temperature).
    features: (n, d) and queries: (m, d), normalised. labels: int64 (n,). truth: int64 (m,).
    """
    with torch.autocast(queries.device.type, enabled=False):  # similarities need float32
        similarity, nearest = (queries @ features.t()).topk(min(k, len(features)), dim=1)  # (m, k)
    votes = torch.zeros(len(queries), int(labels.max()) + 1, device=queries.device)
    votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())  # (m, classes)
    return (votes.argmax(dim=1) == truth).float().mean().item()


# ---------------------------------------------------------------- the end of a run


def report(config, model, store, tokenizer=None):
    """The pictures and the last lines of a run of pretrain.py.

    config: pretrain.Config. store: what it was trained on. tokenizer: its tokenizer, to draw what
    the model fills in.
    """
    records = read_metrics(config.out)
    knn = sorted({name for record in records for name in record if name.startswith("knn_")})
    curves = {"kNN accuracy": {name.removeprefix("knn_"): name for name in knn}}
    held_out = len(data.hold_out(len(store), config.held_out)[1])
    if config.alpha:
        n = config.contrast or config.batch
        fewer = min(n, held_out) or n  # the held-out videos that are contrasted with each other
        curves = {"contrastive loss": {
            "training": "contrastive_loss",
            "held out" + f", n = {fewer}" * (fewer < n): "held_out_contrastive_loss",
            **{f"chance, n = {count}": 2 * config.gamma * math.log(2 * count - 1)
               for count in {n, fewer}}}} | curves
    if config.mask_weight:
        curves = {"masked-token accuracy": {"training": "mask_accuracy",
                                            "held out": "held_out_mask_accuracy"}} | curves
    draw_curves(config.out, curves)
    prefix = "held_out_" if any("held_out_loss" in record for record in records) else ""
    last = next(record for record in reversed(records) if f"{prefix}loss" in record)
    text = ""
    if config.mask_weight:
        text += f"mask accuracy {last[f'{prefix}mask_accuracy']:.1%}  "
    if config.alpha:
        text += f"contrastive loss {last[f'{prefix}contrastive_loss']:.3f}  "
    print(f"{text}({f'{held_out} held-out' if prefix else 'training'} videos)")
    for name in knn:
        values = [record[name] for record in records if name in record]
        print(f"kNN on {name.removeprefix('knn_')}: {values[-1]:.1%} (untrained: {values[0]:.1%})")
    draws = tokenizer and config.mask_weight and draw_fill_in(config, model, store, tokenizer)
    pictures = "curves.png, fill_in.png, fill_in.gif" if draws else "curves.png"
    print(f"{printed(config.out)}: last.pt, metrics.jsonl, {pictures}")


def draw_fill_in(config, model, store, tokenizer):
    """Draws fill_in.png and .gif -> whether it could: a video may have been removed since."""
    videos = shown(config, store)
    generator = torch.Generator().manual_seed(config.seed)
    try:
        pictures = fill_in(model, tokenizer, store, videos, config, generator)
    except UserError as error:
        print(f"no picture of what the model fills in: {error}")
        return False
    names = [Path(store.name(video)).name for video in videos]
    held_out = len(data.hold_out(len(store), config.held_out)[1]) > 0
    path = Path(config.out) / "fill_in"
    save_fill_in(pictures, names, path, " (held-out videos)" if held_out else "")
    from torch.utils.tensorboard import SummaryWriter  # slow to import
    with SummaryWriter(config.out) as board:
        step = read_metrics(config.out)[-1]["step"]
        board.add_image("fill_in", imageio.imread(f"{path}.png"), step, dataformats="HWC")
    return True


def shown(config, store):
    """The videos of the pictures: six of those held out or, without these, of all -> numbers."""
    training, held_out = data.hold_out(len(store), config.held_out)
    videos = held_out if len(held_out) else training
    return videos[data.spread(6, len(videos))]


# ---------------------------------------------------------------- Figures 4 and 5


def copied(tokens, mask, over_time):
    """Fig. 4: every hidden token becomes the nearest visible one -> int64 (B, T, H, W).

    tokens: int64 (B, T, H, W). mask: bool (B, T, H, W), True = hidden. over_time: search the whole
    clip, not only the same frame. Distances are Euclidean, in tokens and frames.
    """
    axes = [torch.arange(size, dtype=torch.float) for size in tokens.shape[1:]]
    scale = torch.tensor([1.0 if over_time else 1e6, 1.0, 1.0])
    position = torch.cartesian_prod(*axes) * scale  # (N, 3)
    exact = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(position, position, compute_mode=exact)  # (N, N)
    hidden = mask.flatten(1)[:, None]  # (B, 1, N)
    nearest = distance.masked_fill(hidden, float("inf")).argmin(dim=2)  # (B, N)
    return tokens.flatten(1).gather(1, nearest).view_as(tokens)


@torch.no_grad()
def fill_in_clip(model, tokenizer, clip, original, config, generator):
    """Fig. 5 for one clip: original, after the tokenizer, masked, filled in.

    clip: int64 (T, H, W). original: its frames, uint8 (T, S, S, 3). config: pretrain.Config, for
    the masks. -> uint8 (4, T, S, S, 3).
    """
    device, vocab_size = model.backbone.cls.device, model.backbone.config.vocab_size
    tokens = clip[None]  # (1, T, H, W)
    pad = tokens == vocab_size + PAD
    decoded = tokenizer.decode(tokens.masked_fill(pad, 0)[0]).cpu().numpy()
    mask = moving_mask(decoded, ~pad[0], config, generator)
    inputs = masking.hide(tokens, mask, vocab_size, config.noise, generator)
    mask = masking.union(mask) & ~pad
    hidden = mask.flatten().nonzero().squeeze(1)  # (M,)
    _, features = model.eval().backbone(inputs.to(device), bool(pad.any()))
    logits = model.predict_tokens(features, hidden.to(device))  # (M, V + 5)
    best = logits[:, :vocab_size].argmax(dim=1).cpu()  # (M,)
    filled = tokens.flatten().index_put((hidden,), best).view_as(tokens)
    restored = tokenizer.decode(filled.masked_fill(pad, 0)[0]).cpu().numpy()
    masked = chequered(decoded, mask[0].numpy())
    rows = np.stack([original, decoded, masked, restored])  # (4, T, S, S, 3)
    rows[:, enlarged(pad[0].numpy(), rows.shape[2])] = 255
    return rows


def moving_mask(frames, kept, config, generator, draws=32):
    """Of several masks for a clip, the one that hides most of what moves.

    Plain background, which is easily filled in, says little about a model.
    frames: uint8 (T, S, S, 3). kept: bool (T, H, W), False = PAD. -> a mask as returned by a
    function in KINDS.
    """
    draw = masking.KINDS[config.mask]
    masks = [draw(1, kept.shape, config.mask_ratio, config.blocks, generator) for _ in range(draws)]
    change = torch.from_numpy(frames).float().mean(dim=3).diff(dim=0).abs()  # (T - 1, S, S)
    change = F.adaptive_avg_pool2d(change, kept.shape[1:])  # (T - 1, H, W)
    change = F.pad(change, (0, 0, 0, 0, 1, 0)) * kept  # (T, H, W)
    return max(masks, key=lambda mask: (masking.union(mask)[0] * change).sum().item())


def fill_in(model, tokenizer, store, videos, config, generator):
    """`fill_in_clip` for the middle clips of some videos of a store -> (videos, 4, T, S, S, 3)."""
    view, stride = store.center_view(), data.stride_for(store, config.clip_fps(store))
    pictures = []
    for video in videos:
        clip = middle_clip(store.tokens(video, view), model.backbone.config, stride)
        frames = original_frames(store, video, view, len(clip), stride)
        pictures.append(fill_in_clip(model, tokenizer, clip, frames, config, generator))
    return np.stack(pictures)


def middle_clip(tokens, config, stride):
    """The middle clip of one view's tokens (F, H, W), for a TransformerConfig -> (T, H, W)."""
    clips = data.even_clips(tokens, config.frames, stride, 1, config.vocab_size)
    return torch.from_numpy(clips[0])


def middle_frames(frames, count, stride):
    """The frames of the middle clip, of (F, S, S, 3) -> (T, S, S, 3). The last one is repeated
    beyond the video's end."""
    start = data.even_starts(len(frames), count, stride, 1)[0]
    positions = start + np.arange(count) * stride
    return frames[positions.clip(max=len(frames) - 1)]


def original_frames(store, video, view, count, stride):
    """The pixels of a video's middle clip -> uint8 (T, S, S, 3)."""
    resize, crop, flip = store.header["views"][view]
    fps, size = store.header["fps"], store.header["size"]
    frames = read_frames(store.video_path(video), fps, size, crop, flip, resize)
    return middle_frames(frames, count, stride)
