"""A linear probe: how well a linear classifier of frozen features tells the classes apart.

    python finetune.py --freeze-backbone --checkpoint RUN/last.pt

The features of a clip are CLS and the mean of its tokens' features, side by side. The mean is
needed because masks alone put no loss on the final output of CLS. They are computed once
for each clip, without dropout, and a logistic regression is fitted to their mean over a video's
clips: minutes on a CPU, with far less noise between seeds than fine-tuning.

Shapes: n videos, B clips, T frames, H x W tokens a frame, d width, C classes.
"""
import numpy as np
import torch
import torch.nn.functional as F

import data
from plumbing.cli import progress
from plumbing.processes import autocast, rank_and_world, sum_over_all
from plumbing.tokens import PAD

STRENGTHS = [10.0**-k for k in range(6)]  # of the L2 penalty


@torch.no_grad()
def clip_features(backbone, clips, precision):
    """Clips, int64 (B, T, H, W) -> CLS, mean of the token features but those of PAD: (B, 2d)."""
    clips = clips.to(backbone.cls.device)
    with autocast(clips.device, precision):
        cls, features = backbone(clips)  # (B, d), (B, T, H, W, d)
    keep = (clips != backbone.config.vocab_size + PAD)[..., None]  # (B, T, H, W, 1)
    total = (features.float() * keep).flatten(1, 3).sum(dim=1)  # (B, d)
    return torch.cat([cls.float(), total / keep.flatten(1, 3).sum(dim=1)], dim=1)


def video_features(backbone, store, videos, fps, count, precision, workers=0):
    """The mean of `clip_features` over evenly spaced clips of all views -> float32 (n, 2d).

    videos: numbers in the TokenStore, int (n,). fps: frames a second of a clip. count: clips of
    each view. Processes divide the videos. The mean of the features gives a linear classifier the
    mean of the clips' logits.
    """
    backbone = backbone.eval()
    stride = data.stride_for(store, fps)
    clips = data.EvenClips(store, backbone.config.frames, stride, count)
    mine = data.share(len(videos), max(1, 64 // (store.views * count)))
    loader = data.load(clips, [videos[numbers.numpy()].tolist() for numbers in mine], workers)
    features = torch.zeros(len(videos), 2 * backbone.config.dim, device=backbone.cls.device)
    for numbers, batch in zip(mine, progress(loader, "features", len(mine), " batches",
                                             show=rank_and_world()[0] == 0)):
        parts = batch.flatten(0, 1).split(16)
        of_clips = torch.cat([clip_features(backbone, part, precision) for part in parts])
        features[numbers] = of_clips.unflatten(0, batch.shape[:2]).mean(dim=1)
    return sum_over_all(features).cpu()


def probe_videos(config, backbone, stores, labels, classes):
    """Probabilities of the test videos -> float32 (videos, C).

    config: finetune.Config. stores: {split: TokenStore}. labels: the label set.
    """
    train, test = stores["train"], stores[config.eval_split]
    videos = data.few_labels(train.labels(labels), config.num_labels, config.seed)
    features, queries = (
        video_features(backbone, store, numbers, config.fps, config.clips, config.precision,
                       config.workers)
        for store, numbers in ((train, videos), (test, np.arange(len(test)))))
    truth = torch.as_tensor(train.labels(labels)[videos], dtype=torch.long)
    return probe(features, truth, queries, classes)


def probe(features, labels, queries, classes):
    """Fits a logistic regression -> its probabilities for the queries, float32 (m, C).

    features: float32 (n, 2d). labels: int64 (n,). queries: float32 (m, 2d). The strength of the
    penalty is the one that predicts a fifth of the labelled videos best.
    """
    features, queries = features.double(), queries.double()
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0) + 1e-6
    features, queries = (features - mean) / deviation, (queries - mean) / deviation
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(features)))
    held_out, others = order[:len(order) // 5], order[len(order) // 5:]

    def error(strength):
        logits = fit(features[others], labels[others], classes, strength)(features[held_out])
        return F.cross_entropy(logits, labels[held_out]).item()

    best = min(STRENGTHS, key=error) if len(held_out) else STRENGTHS[0]
    return fit(features, labels, classes, best)(queries).softmax(dim=1).float()


def fit(features, labels, classes, strength):
    """Multinomial logistic regression -> a function, features (m, 2d) -> logits (m, C).

    Minimises the mean cross entropy + strength / 2 x the squared weights. Full batch, L-BFGS.
    """
    weight = features.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-6,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = F.linear(features, weight, bias)
        loss = F.cross_entropy(logits, labels) + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda queries: F.linear(queries, weight, bias).detach()
