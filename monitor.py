"""Is it learning? Both losses on held-out videos, kNN accuracy of CLS, and what the model fills in (Fig. 5).

What is called here leaves the model in evaluation mode.

Shapes: n videos, T frames of a clip, H x W tokens a frame, S frame side in pixels, d hidden size.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import masking
from plumbing.cli import UserError
from plumbing.decoding import printed, read_frames
from plumbing.pictures import chequered, draw_curves, enlarged, save_fill_in
from plumbing.processes import one_seed, rank_and_world, sum_over_all
from plumbing.runs import read_metrics
from plumbing.tokens import PAD

# ---------------------------------------------------------------- the two tasks, on videos held out


def evaluate(losses, model, config, store, videos, precision):
    """`pretrain.losses` on held-out videos, without dropout, on the same clips and masks each time -> {metric: float}.

    Told apart from each other are config.contrast of them, or as many as there are. Called by all processes. Where
    there are fewer videos than processes, the result is empty.
    """
    rank, world = rank_and_world()
    group = min(config.contrast, len(videos)) // world * world
    if group == 0:
        return {}
    pairs, groups, total = config.pairs(store), len(videos) // group, 0
    generator = torch.Generator().manual_seed(one_seed(config.seed))
    model.eval()
    for items in data.Batches(videos, group, groups, seed=config.seed, rank=rank, world=world):
        clips = torch.from_numpy(np.stack([pairs[item] for item in items]))  # (group / world, 2, T, H, W)
        measures = losses(model, config, clips, store.header["vocab_size"], generator, precision)
        total = total + torch.stack(list(measures.values()))
    means = (sum_over_all(total) / groups / world).tolist()
    return {f"held_out_{name}": mean for name, mean in zip(measures, means)}


# ---------------------------------------------------------------- kNN accuracy


def knn_accuracies(backbone, folder, fps, k, batch=64):
    """kNN accuracy on every label set of the token stores in a folder -> {"knn_<labels>": float}.

    Neighbours come from the store train (or train1), queries from val, or where there is none from test (or test1).
    fps: frames a second of the clips that the model was trained on. k: how many neighbours vote. batch: clips a pass.
    """
    stores = data.labelled_stores(folder)
    features = [clip_features(backbone, store, fps, batch) for store in stores]
    result = {}
    for name in stores[0].label_sets():
        labels = [torch.tensor(store.labels(name), dtype=torch.long, device=features[0].device) for store in stores]
        result[f"knn_{name}"] = knn_accuracy(features[0], labels[0], features[1], labels[1], k)
    return result


@torch.no_grad()
def clip_features(backbone, store, fps, batch=64):
    """CLS of the middle clip of every video, its centre view, unmasked -> float32 (videos, d), normalised."""
    config, device = backbone.config, backbone.cls.device
    if store.header["vocab_size"] != config.vocab_size:
        raise UserError(f"{store.path} holds {store.header['vocab_size']} codes, the model knows {config.vocab_size}")
    middle = data.EvenClips(store, config.frames, data.stride_for(store, fps), 1, [store.center_view()])
    clips = torch.from_numpy(np.concatenate([middle[video] for video in range(len(store))]))  # (videos, T, H, W)
    backbone.eval()
    return torch.cat([F.normalize(backbone(part.to(device))[0].float(), dim=1) for part in clips.split(batch)])


def knn_accuracy(features, labels, queries, truth, k, temperature=0.07):
    """k nearest neighbours by cosine, votes weighted by exp(similarity / temperature) -> share right, float.

    features: (n, d) and queries: (m, d), normalised. labels: int64 (n,). truth: int64 (m,).
    """
    similarity, nearest = (queries @ features.t()).topk(min(k, len(features)), dim=1)  # (m, k)
    votes = torch.zeros(len(queries), int(labels.max()) + 1, device=queries.device)
    votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())  # (m, classes)
    return (votes.argmax(dim=1) == truth).float().mean().item()


def report(config, model, store, tokenizer=None):
    """The pictures and the last lines of a run of pretrain.py: curves.png, its last measurements and, with a tokenizer,
    what the model fills in. config: pretrain.Config. store: what it was trained on."""
    records, held_out = read_metrics(config.out), data.hold_out(len(store), config.held_out)[1]
    names = sorted({key for record in records for key in record if key.startswith("knn_")})
    draw_curves(config.out, {
        "masked-token accuracy, share": {"training": "mask_accuracy", "held out": "held_out_mask_accuracy"},
        "contrastive loss, gamma x nats": {"training": "contrastive_loss", "held out": "held_out_contrastive_loss"},
        "kNN accuracy, share": {name.removeprefix("knn_"): name for name in names}})
    prefix = "held_out_" * (len(held_out) > 0 and any("held_out_loss" in record for record in records))
    for m in [record for record in records if f"{prefix}loss" in record][-1:]:
        said = [text.format(m[name]) for text, name in (("mask accuracy {:.1%}  ", f"{prefix}mask_accuracy"),
                                                        ("contrastive loss {:.3f}  ", f"{prefix}contrastive_loss"))
                if name in m]  # not of a task that was not trained
        print(f"{''.join(said)}({f'{len(held_out)} held-out' if prefix else 'training'} videos)")
    for name in names:
        values = [record[name] for record in records if name in record]
        print(f"kNN on {name.removeprefix('knn_')}: {100 * values[-1]:.1f}% (untrained: {100 * values[0]:.1f}%)")
    drawn = tokenizer and config.mask_weight and draw_fill_in(config, model, store, tokenizer, len(held_out))
    print(f"{printed(config.out)}: last.pt, metrics.jsonl, curves.png{', fill_in.png, fill_in.gif' if drawn else ''}")


def draw_fill_in(config, model, store, tokenizer, held_out):
    """fill_in.png and .gif -> whether they could be drawn; a video that has gone since costs a line, not the run."""
    videos = shown(config, store)
    try:
        with torch.compiler.set_stance("force_eager"):
            pictures = fill_in(model, tokenizer, store, videos, config.clip_fps(store),
                               torch.Generator().manual_seed(config.seed), **config.masks())
    except UserError as error:
        print(f"no picture of what the model fills in: {error}")
        return False
    save_fill_in(pictures, [Path(store.name(video)).name for video in videos], Path(config.out) / "fill_in",
                 " (videos held out of training)" if held_out else "")
    return True


def shown(config, store):
    """The videos that pictures show: six of those held out, or of all -> their numbers."""
    training, held_out = data.hold_out(len(store), config.held_out)
    videos = held_out if len(held_out) else training
    return videos[data.spread(6, len(videos))]


# ---------------------------------------------------------------- Figures 4 and 5


def copied(tokens, mask, over_time):
    """Fig. 4: every hidden token replaced by the nearest visible one, in its frame or, over_time, in all the clip's
    -> int64 (B, T, H, W). Distances are Euclidean, in tokens and frames.

    tokens: int64 (B, T, H, W). mask: bool (B, T, H, W), True = hidden.
    """
    axes = [torch.arange(size, dtype=torch.float) for size in tokens.shape[1:]]
    place = torch.cartesian_prod(*axes) * torch.tensor([1.0 if over_time else 1e6, 1.0, 1.0])  # (N, 3)
    distance = torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist")  # (N, N)
    hidden = mask.flatten(1)[:, None]  # (B, 1, N)
    nearest = distance.masked_fill(hidden, float("inf")).argmin(dim=2)  # (B, N)
    return tokens.flatten(1).gather(1, nearest).view_as(tokens)


@torch.no_grad()
def fill_in_clip(model, tokenizer, clip, original, generator, **masks):
    """Fig. 5 for one clip, int64 (T, H, W), and its frames, uint8 (T, S, S, 3): original, after the tokenizer, masked,
    filled in -> uint8 (4, T, S, S, 3). masks: as for `masking.prepare`."""
    device, vocab_size = model.backbone.cls.device, model.backbone.config.vocab_size
    tokens, inputs, mask, _ = masking.prepare(clip[None, None], vocab_size, generator=generator,
                                              **masks)  # (1, T, H, W) each
    hidden = mask.flatten().nonzero().squeeze(1)  # (M,)
    logits, _ = model.eval()(inputs.to(device), hidden.to(device))  # (M, V + 5)
    filled = tokens.flatten().index_put((hidden,), logits[:, :vocab_size].argmax(dim=1).cpu()).view_as(tokens)
    pad = tokens == vocab_size + PAD
    decoded, restored = (tokenizer.decode(t.masked_fill(pad, 0)[0]).cpu().numpy() for t in (tokens, filled))
    rows = np.stack([original, decoded, chequered(decoded, mask[0].numpy()), restored])  # (4, T, S, S, 3)
    rows[:, enlarged(pad[0].numpy(), rows.shape[2])] = 255
    return rows


def fill_in(model, tokenizer, store, videos, fps, generator, **masks):
    """`fill_in_clip` for the middle clips of some videos of a store -> uint8 (videos, 4, T, S, S, 3).

    fps: frames a second of the clips."""
    view, stride, pictures = store.center_view(), data.stride_for(store, fps), []
    for video in videos:
        clip = middle_clip(store.tokens(video, view), model.backbone.config, stride)
        pictures.append(fill_in_clip(model, tokenizer, clip, original_frames(store, video, view, len(clip), stride),
                                     generator, **masks))
    return np.stack(pictures)


def middle_clip(tokens, config, stride):
    """The middle clip of one view's tokens (F, H, W), of the size of a TransformerConfig -> int64 (T, H, W)."""
    return torch.from_numpy(data.even_clips(tokens, config.frames, stride, 1, config.vocab_size)[0])


def middle_frames(frames, count, stride):
    """The frames that the middle clip of so many was made from, of (F, S, S, 3) -> (T, S, S, 3); beyond the video's end
    the last one again."""
    places = data.even_starts(len(frames), count, stride, 1)[0] + np.arange(count) * stride
    return frames[places.clip(max=len(frames) - 1)]


def original_frames(store, video, view, count, stride):
    """The pixels of a video's middle clip -> uint8 (T, S, S, 3)."""
    resize, crop, flip = store.header["views"][view]
    frames = read_frames(store.video_path(video), store.header["fps"], store.header["size"], crop, flip, resize)
    return middle_frames(frames, count, stride)
