"""Script 1: masks + contrast -> a pre-trained model (Eq. 6: L_mask + alpha * gamma * L_cl).

    python pretrain.py                                 the toy world, anything missing made first
    python pretrain.py --videos DIR                    a folder of any videos
    python pretrain.py --preset small --data tokens/howto100m --gpus 8        the paper's models
    torchrun --nnodes 2 --nproc-per-node 8 ... pretrain.py ...                several machines

A run lives in runs/NAME: config.json, last.pt, metrics.jsonl, curves.png, fill_in.png and .gif, TensorBoard events.

Shapes: n videos in this process's batch, B = 2n clips, T frames, H x W tokens a frame, d hidden size, M masked tokens.
"""
import contextlib
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import contrastive
import data
import masking
import toy
import training
import vqvae
from training import option
from transformer import TokenHead, TransformerConfig, VideoTransformer, read_checkpoint, resize_table

PRESETS = {
    "toy": dict(layers=3, dim=64, heads=4, head_dim=16, mlp_dim=256, frame_size=64, fps=8.0, codes=256, dropout=0.0,
                min_stride=2, max_stride=4, projection_hidden=128, projection_layers=2, batch=32, lr=4e-3, steps=800,
                tokenizer_steps=600, log_every=25, knn=20, workers=0),
    "small": dict(),  # the defaults below: Table 3 and the second column of Table 4
    "base": dict(layers=12, dim=768, heads=12, mlp_dim=3072),
    "large": dict(layers=24, dim=1024, heads=16, head_dim=32, projection_hidden=4096, projection_layers=3, epochs=90,
                  lr=3e-4, warmup=0.05),
}


@dataclass
class Config:
    preset: str = option("toy", "sizes and training numbers to start from", choices=list(PRESETS))
    out: str = option("runs/toy", "folder of the run")
    videos: str = option("", "folder of videos to pre-train on (default: the toy world)")
    data: str = option("", "token store to pre-train on, made by vqvae.py tokenize")
    tokenizer: str = option("", "tokenizer of the videos or of the store (default: train one on the videos)")
    monitor: str = option("", "folder with labelled token stores train and val, for the kNN accuracy")
    resume: bool = option(False, "go on from the run's last checkpoint, where there is one")
    init: str = option("", "checkpoint of another run to start from; another clip size is interpolated to this one's")
    # the model
    layers: int = option(6, "transformer layers")
    dim: int = option(512, "hidden size")
    heads: int = option(8, "attention heads")
    head_dim: int = option(64, "dimensions of a head")
    mlp_dim: int = option(2048, "hidden size of the MLP")
    layout: str = option("T,H|W", "attention layout (Table 13)")
    pre_norm: bool = option(False, "pre-LayerNorm in place of post-LayerNorm")
    dropout: float = option(0.1, "dropout everywhere")
    projection_hidden: int = option(2048, "hidden size of the projection head")
    projection_layers: int = option(2, "layers of the projection head")
    # the clips
    frames: int = option(5, "frames of a clip, T")
    frame_size: int = option(128, "frame side in pixels, S (of --videos)")
    fps: float = option(2.0, "frames a second that are tokenised (of --videos)")
    codes: int = option(1024, "codes of a tokenizer trained on the videos")
    tokenizer_steps: int = option(1000, "training steps of that tokenizer")
    min_stride: int = option(1, "smallest step between a clip's frames, in stored frames")
    max_stride: int = option(1, "largest step between a clip's frames")
    d_max: float | None = option(None, "largest distance between the two clips' starts, in seconds")
    # the two tasks
    mask: str = option("block", "how tokens are hidden", choices=["block", "iid"])
    mask_ratio: float = option(0.15, "share of the tokens to hide")
    blocks: int = option(0, "cuboids of a block mask (0: the number that comes closest to the ratio)")
    noise: bool = option(False, "80% MASK, 10% random codes, 10% left, drawn per cuboid (Sec. G.3)")
    alpha: float = option(1.0, "weight of the contrastive loss")
    gamma: float = option(0.2, "temperature of the contrastive loss")
    # training
    epochs: float = option(10.0, "passes over the videos")
    steps: int = option(0, "optimizer steps (0: as many as the epochs need)")
    batch: int = option(1024, "videos a step, over all processes and accumulated micro-batches")
    accumulate: int = option(1, "micro-batches a step; each has its own negatives")
    lr: float = option(1e-3, "peak learning rate")
    warmup: float = option(0.1, "share of the steps in which the learning rate rises")
    weight_decay: float = option(0.05, "weight decay")
    clip: float = option(1.0, "largest gradient norm")
    seed: int = option(0, "random seed")
    # the machine
    gpus: int = option(1, "GPUs of this machine, a process each")
    device: str = option("auto", "device of each process", choices=["auto", "cuda", "mps", "cpu"])
    precision: str = option("auto", "number format of the matrix products", choices=["auto", "bf16", "fp16", "fp32"])
    compile: bool = option(False, "compile the layers with torch.compile (needs a C++ compiler on CPUs)")
    workers: int = option(4, "processes that load clips (0: the training process itself)")
    log_every: int = option(50, "steps between two lines of metrics")
    save_every: int = option(500, "steps between two checkpoints")
    knn: int = option(200, "neighbours of the kNN accuracy")
    knn_every: int = option(250, "steps between two measurements of it")

    def __post_init__(self):
        training.check_positive(self, "frames", "batch", "accumulate", "log_every", "save_every", "knn", "knn_every",
                                "gpus")
        if not 1 <= self.min_stride <= self.max_stride:
            raise ValueError(f"--min-stride {self.min_stride} --max-stride {self.max_stride}: "
                             f"both at least 1, the smaller first")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"--mask-ratio {self.mask_ratio}: it lies between 0 and 1")
        if self.noise and self.mask == "iid":
            raise ValueError("--noise belongs to --mask block: it is drawn per cuboid")
        if self.init and Path(self.init).resolve() == (Path(self.out) / "last.pt").resolve():
            raise ValueError(f"--init {self.init}: give the new run a folder of its own with --out")
        if self.init and not Path(self.init).is_file():
            raise ValueError(f"--init {self.init}: there is no such file")
        if self.videos and self.data:
            raise ValueError("--videos and --data: give one of them")
        vqvae.check_size(self.frame_size)
        self.transformer(vocab_size=1, height=1, width=1)

    def transformer(self, vocab_size, height, width):
        return TransformerConfig(self.layers, self.dim, self.heads, self.head_dim, self.mlp_dim, self.frames, height,
                                 width, vocab_size, self.layout, self.pre_norm, self.dropout)


# ---------------------------------------------------------------- the model


class Vimpac(nn.Module):
    """Backbone, token head and projection head."""

    def __init__(self, config, projection_hidden, projection_layers):
        super().__init__()
        self.backbone = VideoTransformer(config)
        self.token_head = TokenHead(config)
        self.projection_head = contrastive.ProjectionHead(config.dim, projection_hidden, projection_layers)

    def forward(self, tokens, mask, padded=None):
        """tokens: int64 (B, T, H, W), already masked. mask: bool (B, T, H, W), True = to be predicted, or the places
        of its True (mask.nonzero(as_tuple=True)), for which a GPU need not be waited for.

        -> logits (M, V + 5) of the masked positions alone, in the order of the mask, and projections (B, 256).
        """
        cls, features = self.backbone(tokens, padded)  # (B, d), (B, T, H, W, d)
        logits = self.token_head(features[mask], self.backbone.embedding.weight)  # (M, V + 5)
        return logits, self.projection_head(cls)

    @classmethod
    def from_released(cls, path):
        """A whole model from a released VIMPAC checkpoint (classifier.pt), whatever its size and layout.

        Raises ValueError naming the file and a tensor that it lacks or that has no place in the model.
        """
        state = dict(read_checkpoint(path))
        try:
            backbone = VideoTransformer.from_released(state)
            projection_head = contrastive.ProjectionHead.from_released(state)
            token_head = TokenHead(backbone.config)
            token_head.load_released(state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: {f'it lacks {error}' if isinstance(error, KeyError) else error}") from error
        if state:
            raise ValueError(f"{path}: this model has no place for {', '.join(sorted(state))}")
        model = cls(backbone.config, 1, 1)
        model.backbone, model.token_head, model.projection_head = backbone, token_head, projection_head
        return model


def draw_mask(config, clips, shape, blocks, generator=None):
    """What to hide in so many clips of (T, H, W) tokens -> bool (clips, T, H, W), or with --noise the cuboids
    (clips, N, T, H, W)."""
    if config.mask == "iid":
        return masking.iid_mask(clips, *shape, config.mask_ratio, generator=generator)
    draw = masking.cuboids if config.noise else masking.block_mask
    return draw(clips, *shape, blocks, generator=generator)


def apply_mask(config, tokens, hiding, vocab_size):
    """tokens (B, T, H, W) -> masked tokens (B, T, H, W), and what is to be predicted: bool (B, T, H, W), never PAD."""
    mask = (hiding.any(dim=1) if hiding.dim() == 5 else hiding) & (tokens != vocab_size + masking.PAD)
    return masking.hide(tokens, hiding, vocab_size, noise=config.noise), mask


def losses(model, config, clips, vocab_size, blocks, generator=None):
    """Eq. 6 on a batch of pairs: clips int64 (n, 2, T, H, W), on the CPU -> loss (scalar), measures (3,).

    measures: L_mask, masked-token accuracy, gamma * L_cl, without gradient. L_mask is the mean over the masked tokens
    of all processes; each process's share is scaled so that DistributedDataParallel's mean over processes adds up.
    The masks of all processes' clips come from the generator, so that they do not depend on how many share the work.
    They are drawn on the CPU: there the number of masked tokens is known without waiting for what the GPU still does.
    """
    device = next(model.parameters()).device
    tokens = clips.transpose(0, 1).flatten(0, 1)  # (B, T, H, W): all first clips, then all second ones
    rank, world = training.rank_and_world() if dist.is_initialized() else (0, 1)
    hiding = draw_mask(config, len(tokens) * world, tokens.shape[1:], blocks, generator)
    hiding = hiding.unflatten(0, (2, -1))[:, rank::world].flatten(0, 1)  # this process's, as data.Batches shares them
    masked, mask = apply_mask(config, tokens, hiding, vocab_size)
    padded = bool((tokens == vocab_size + masking.PAD).any())
    where = mask.nonzero(as_tuple=True)  # four (M,)
    codes, masked, *where = (training.move(part, device) for part in (tokens[where], masked, *where))
    logits, projections = model(masked, tuple(where), padded)  # (M, V + 5), (B, 256)
    count = torch.full((1,), float(len(codes)), device=device)
    if world > 1:
        dist.all_reduce(count)
    share = world / count.clamp(min=1).squeeze()
    mask_loss = F.cross_entropy(logits.float(), codes, reduction="sum") * share  # Eq. 1
    accuracy = (logits.argmax(dim=-1) == codes).sum() * share
    loss, contrast = mask_loss, torch.zeros_like(mask_loss)
    if config.alpha:
        first, second = projections.chunk(2)  # (n, 256) each
        contrast = config.gamma * contrastive.info_nce(first, second, config.gamma)
        loss = loss + config.alpha * contrast
    return loss, torch.stack([mask_loss.detach(), accuracy, contrast.detach()])


# ---------------------------------------------------------------- what is watched


@torch.no_grad()
def clip_features(backbone, store, config, device, batch=64):
    """CLS of the middle clip of every video, unmasked -> float32 (videos, d), normalised."""
    stride = (config.min_stride + config.max_stride) // 2
    clips = np.concatenate([data.even_clips(store, i, config.frames, stride, 1)[:1] for i in range(len(store))])
    was_training = backbone.training
    backbone.eval()
    features = [F.normalize(backbone(part.to(device))[0].float(), dim=1)
                for part in torch.from_numpy(clips).split(batch)]
    backbone.train(was_training)
    return torch.cat(features)


def knn_accuracy(features, labels, queries, truth, k, temperature=0.07):
    """k nearest neighbours by cosine, votes weighted by exp(similarity / temperature) -> share right, float.

    features: (n, d) and queries: (m, d), normalised. labels: int64 (n,). truth: int64 (m,).
    """
    similarity, nearest = (queries @ features.t()).topk(min(k, len(features)), dim=1)  # (m, k)
    votes = torch.zeros(len(queries), int(labels.max()) + 1, device=queries.device)
    votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())  # (m, classes)
    return (votes.argmax(dim=1) == truth).float().mean().item()


def monitor(backbone, folder, config, device):
    """kNN accuracy on every label set of folder/train and folder/val -> {"knn_<labels>": float}."""
    train, val = data.TokenStore(Path(folder) / "train"), data.TokenStore(Path(folder) / "val")
    features = [clip_features(backbone, store, config, device) for store in (train, val)]
    result = {}
    for name in train.label_sets():
        labels = [torch.tensor(store.labels(name), dtype=torch.long, device=device) for store in (train, val)]
        result[f"knn_{name}"] = knn_accuracy(features[0], labels[0], features[1], labels[1], config.knn)
    return result


@torch.no_grad()
def fill_in(model, tokenizer, store, config, blocks, device, videos=6):
    """Fig. 5: original, after the tokenizer, masked, filled in -> uint8 (videos, 4, T, S, S, 3)."""
    model.eval()
    training.seed_all(config.seed, 5)
    chosen = np.linspace(0, len(store) - 1, min(videos, len(store))).round().astype(int)
    stride = (config.min_stride + config.max_stride) // 2
    header, pictures = store.header, []
    for video in chosen:
        clip = torch.from_numpy(data.even_clips(store, video, config.frames, stride, 1)[:1]).to(device)  # (1, T, H, W)
        hiding = draw_mask(config, 1, clip.shape[1:], blocks).to(device)
        masked, mask = apply_mask(config, clip, hiding, header["vocab_size"])
        logits, _ = model(masked, mask)
        filled = clip.clone()
        filled[mask] = logits[:, :header["vocab_size"]].argmax(dim=-1)
        resize, crop, flip = header["views"][0]
        frames = data.read_frames(Path(header["root"]) / store.name(video), header["fps"], header["size"], crop, flip,
                                  resize)
        start = data.last_start(len(frames), config.frames, stride) // 2
        original = frames[start::stride][:config.frames]
        original = np.pad(original, ((0, config.frames - len(original)), (0, 0), (0, 0), (0, 0)), constant_values=255)
        padding = (clip[0] == header["vocab_size"] + data.PAD)  # (T, H, W)
        decoded, restored = (tokenizer.decode(t[0].masked_fill(padding, 0)).cpu().numpy() for t in (clip, filled))
        scale = len(original[0]) // clip.shape[2]
        hole, beyond = (m.cpu().numpy().repeat(scale, 1).repeat(scale, 2) for m in (mask[0], padding))  # (T, S, S)
        holes = np.where(hole[..., None], np.uint8(255) - np.uint8(60) * _checks(len(original[0])), decoded)
        rows = [original, decoded, holes, restored]
        for row in rows[1:]:
            row[beyond] = 255
        pictures.append(np.stack(rows))
    return np.stack(pictures)


def _checks(size):
    """The chequered pattern that stands for what is hidden -> uint8 (S, S, 1) of 0 and 1."""
    place = np.arange(size) // 4
    return ((place[:, None] + place[None, :]) % 2).astype(np.uint8)[..., None]


def save_fill_in(pictures, out):
    """fill_in.png: a block of four rows a video, its frames side by side. fill_in.gif: a column a video, moving."""
    def grid(rows):  # (rows, columns, S, S, 3) -> one picture, thin white lines between
        rows = np.pad(rows, ((0, 0), (0, 0), (0, 3), (0, 3), (0, 0)), constant_values=255)
        return rows.swapaxes(1, 2).reshape(rows.shape[0] * rows.shape[2], -1, 3)

    zoom = max(1, 96 // pictures.shape[3])
    pictures = pictures.repeat(zoom, 3).repeat(zoom, 4)
    halves = [np.concatenate([np.pad(grid(video), ((0, 10), (0, 10), (0, 0)), constant_values=255) for video in half])
              for half in (pictures[::2], pictures[1::2]) if len(half)]
    height = max(len(half) for half in halves)
    halves = [np.pad(half, ((0, height - len(half)), (0, 0), (0, 0)), constant_values=255) for half in halves]
    imageio.imwrite(out / "fill_in.png", np.concatenate(halves, axis=1))
    moving = [grid(pictures[:, :, t].swapaxes(0, 1)) for t in range(pictures.shape[2])]
    imageio.mimsave(out / "fill_in.gif", moving, duration=400, loop=0)


# ---------------------------------------------------------------- what is made when missing


def prepare(config, device):
    """Makes videos, tokenizer and tokens where they are missing -> (store, tokenizer path or None, monitor folder)."""
    if config.data:
        store = data.TokenStore(config.data)
        return store, config.tokenizer or None, config.monitor or None
    rank, _ = training.rank_and_world()
    home = Path(config.out if config.videos else "datasets/toy")
    place = Path(config.tokenizer or home / "tokenizer.pt")
    if rank == 0 and not config.videos:
        toy.make(home)
    training.wait_for_all()
    if config.videos:
        root, splits = config.videos, {"pretrain": [(p, {}) for p, _ in data.list_videos("folder", config.videos, "")]}
    else:
        root, splits = home, {split: toy.split_videos(home, split) for split in toy.SPLITS}
    if rank == 0 and not place.is_file():
        paths = [path for path, _ in splits["pretrain"]]
        frames, _ = vqvae.sample_frames(paths, config.fps, config.frame_size, 8000, os.cpu_count())
        held_out, frames = frames[::20], frames[np.arange(len(frames)) % 20 > 0]
        tokenizer = vqvae.train_tokenizer(frames, config.codes, config.tokenizer_steps, 64, 2e-3, config.seed, device)
        vqvae.save_tokenizer(tokenizer, place)
        training.say(f"tokenizer: {vqvae.report(vqvae.measure(tokenizer, held_out))} (on held-out frames)")
    training.wait_for_all()
    tokenizer = vqvae.load_tokenizer(place).to(device)
    for split, videos in splits.items():
        out = home / "tokens" / split
        if not (out / "index.npy").is_file():
            count, errors = vqvae.tokenize(tokenizer, videos, root, out, config.fps, config.frame_size,
                                           vqvae.views_for("pretrain", config.frame_size), place.name,
                                           classes=None if config.videos else toy.CLASSES)
            for line in errors:
                training.say(f"skipped {line}")
            training.say(f"{out}: {count} videos tokenised, {len(errors)} could not be decoded")
        header, wanted = data.TokenStore(out).header, {"fingerprint": vqvae.fingerprint(tokenizer), "fps": config.fps,
                                                       "size": config.frame_size}
        for key, value in wanted.items():
            if header[key] != value:
                raise ValueError(f"{out} was made with {key} {header[key]}, not {value}: delete it to make it anew")
    monitor_folder = config.monitor or (None if config.videos else home / "tokens")
    return data.TokenStore(home / "tokens" / "pretrain"), place, monitor_folder


# ---------------------------------------------------------------- training


def restore(path, model, optimizer, scaler):
    """Loads a checkpoint's weights, optimizer and gradient scaler -> its step. ValueError where the sizes do not fit.

    Where the clip size differs, the position tables and their moments are interpolated, as in the paper's second stage.
    """
    checkpoint = read_checkpoint(path)
    if not {"model", "optimizer", "step"} <= checkpoint.keys():
        raise ValueError(f"{path} is no checkpoint of a run of this project")
    weights, state = checkpoint["model"], checkpoint["optimizer"]
    order = [p for group in optimizer.param_groups for p in group["params"]]  # how the optimizer numbers them
    for name in ("time", "row", "column"):
        table = getattr(model.backbone, name)  # (size, d)
        before = len(weights[f"backbone.{name}"])
        if before == len(table):
            continue
        weights[f"backbone.{name}"] = resize_table(weights[f"backbone.{name}"], len(table))
        moments = state["state"].get(next(i for i, p in enumerate(order) if p is table), {})
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in moments:
                moments[moment] = resize_table(moments[moment], len(table))
        training.say(f"interpolated the {name} positions and their optimizer moments from {before} to {len(table)}")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this model: {str(error).splitlines()[1].strip()}") from error
    optimizer.load_state_dict(state)
    training.restore_scaler(scaler, checkpoint)
    return checkpoint["step"]


def update(model, config, micro_batches, vocab_size, blocks, optimizer, scaler, precision, step):
    """One optimizer step on a list of micro-batches, clips int64 (n, 2, T, H, W) each -> their mean measures (3,)."""
    generator = torch.Generator().manual_seed(training.one_seed(config.seed, step))
    device, total = next(model.parameters()).device, 0
    for i, clips in enumerate(micro_batches):
        last = i == len(micro_batches) - 1  # gradients are exchanged once a step
        with contextlib.nullcontext() if last or not dist.is_initialized() else model.no_sync():
            with training.autocast(device, precision):
                loss, measures = losses(model, config, clips, vocab_size, blocks, generator)
            scaler.scale(loss / len(micro_batches)).backward()
        total = total + measures / len(micro_batches)
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


def train(config, model, store, blocks, device, monitor_folder):
    """The whole of pre-training, from config.out/last.pt on where --resume asks for it. Returns the last metrics."""
    rank, world = training.rank_and_world()
    precision = training.pick_precision(config.precision, device)
    vocab_size, out = store.header["vocab_size"], Path(config.out)
    micro = config.batch // config.accumulate  # videos a micro-batch, over all processes
    optimizer = training.make_optimizer(model, config.lr, config.weight_decay, (0.9, 0.98))
    steps = config.steps or max(1, int(config.epochs * len(store)) // config.batch)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    first = 0
    with training.refusals():
        if last := training.last_checkpoint(out, config.resume):
            first = restore(last, model, optimizer, scaler)
            training.say(f"resumed {last} at step {first} of {steps}")
        elif config.init:
            restore(config.init, model, optimizer, scaler)
            training.say(f"starting from {config.init}")
        training.check_same(first, out)
    log = training.RunLog(out, config, resume_from=first)
    dataset = data.ClipPairs(store, config.frames, (config.min_stride, config.max_stride), config.d_max, config.seed)
    batches = data.Batches(len(store), micro, steps * config.accumulate, first * config.accumulate, config.seed, rank,
                           world)
    loader = iter(DataLoader(dataset, batch_sampler=batches, num_workers=config.workers))
    if not config.alpha:
        model.projection_head.requires_grad_(False)
    if config.compile:
        model.backbone.compile_layers()
    wrapped = DistributedDataParallel(model) if world > 1 else model

    def knn(step):
        if monitor_folder and rank == 0:
            with torch.compiler.set_stance("force_eager"):  # not worth a compilation for each of its shapes
                accuracies = monitor(model.backbone, monitor_folder, config, device)
            log.write(step=step, **accuracies)

    if first == 0:
        knn(0)
    model.train()
    metrics, sums, count, since = {}, torch.zeros(3, device=device), 0, time.perf_counter()
    bar = data.progress(range(first, steps), "pre-training", steps - first, " steps", show=rank == 0)
    for step in bar:
        training.seed_all(config.seed, step, rank)  # dropout is a function of the seed and the step, and so are masks
        lr = training.learning_rate(step, steps, config.lr, config.warmup)
        training.set_learning_rate(optimizer, lr)
        sums += update(wrapped, config, [next(loader) for _ in range(config.accumulate)], vocab_size, blocks, optimizer,
                       scaler, precision, step)
        done, count = step + 1, count + 1
        if done % config.log_every == 0 or done == steps:
            if world > 1:
                dist.all_reduce(sums)  # each process knows its share of L_mask and of the accuracy
            mask_loss, accuracy, contrast = (sums / count / world).tolist()
            now = time.perf_counter()
            metrics = {"step": done, "epoch": done * config.batch / len(store),
                       "loss": mask_loss + config.alpha * contrast, "mask_loss": mask_loss, "mask_accuracy": accuracy,
                       "contrastive_loss": contrast, "lr": lr,
                       "videos_per_second": config.batch * count / (now - since)}
            log.write(**metrics)
            bar.set_postfix_str(f"mask {100 * accuracy:.1f}% contrast {contrast:.3f}", refresh=False)
            if not math.isfinite(metrics["loss"]):
                raise FloatingPointError(f"the loss is {metrics['loss']} at step {done}: lower --lr")
            sums, count, since = torch.zeros_like(sums), 0, now
        if done % config.knn_every == 0 or done == steps:
            knn(done)
        if (done % config.save_every == 0 or done == steps) and rank == 0:
            training.save(out / "last.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                            "scaler": scaler.state_dict(), "step": done, "config": asdict(config),
                                            "transformer": asdict(model.backbone.config)})
    log.close()
    return metrics


def main():
    config = training.parse(Config, sys.argv[1:], __doc__, PRESETS)
    with training.refusals():
        training.launch(config.gpus)
        device = training.pick_device(config.device)
        store, tokenizer_path, monitor_folder = prepare(config, device)
        share = training.rank_and_world()[1] * config.accumulate
        if config.batch > len(store) >= share:
            wanted, config.batch = config.batch, len(store) // share * share
            training.say(f"--batch {wanted} is more than the {len(store)} videos: using {config.batch}")
        if config.batch % share or config.batch > len(store):
            raise ValueError(f"--batch {config.batch}: it must be a multiple of {share} (processes x micro-batches) "
                             f"and at most the {len(store)} videos")
        training.seed_all(config.seed)
        shape = config.transformer(store.header["vocab_size"], store.height, store.width)
        model = Vimpac(shape, config.projection_hidden, config.projection_layers).to(device)
        blocks = config.blocks or masking.blocks_for(shape.frames, shape.height, shape.width, config.mask_ratio)
    training.say(f"{len(store)} videos, {shape.frames} x {shape.height} x {shape.width} tokens a clip, "
                 f"{sum(p.numel() for p in model.backbone.parameters()) / 1e6:.2f}M parameters, "
                 f"{config.mask} masks{f' of {blocks} cuboids' if config.mask == 'block' else ''}, on {device}")
    metrics = train(config, model, store, blocks, device, monitor_folder)
    training.leave_group()
    finish(config, model, store, blocks, device, tokenizer_path, metrics)


def finish(config, model, store, blocks, device, tokenizer_path, metrics):
    """The pictures and the last lines of a run."""
    out = Path(config.out)
    records = training.read_metrics(out)
    names = sorted({key for record in records for key in record if key.startswith("knn_")})
    training.draw_curves(out, {
        "masked-token accuracy": {"accuracy": "mask_accuracy"},
        "contrastive loss (with gamma)": {"loss": "contrastive_loss"},
        "kNN accuracy": {name.removeprefix("knn_"): name for name in names}})
    if tokenizer_path:
        tokenizer = vqvae.load_tokenizer(tokenizer_path).to(device)
        with torch.compiler.set_stance("force_eager"):
            save_fill_in(fill_in(model, tokenizer, store, config, blocks, device), out)
    if metrics:
        print(f"mask accuracy {100 * metrics['mask_accuracy']:.1f}%  contrastive loss {metrics['contrastive_loss']:.3f}")
    for name in names:
        values = [record[name] for record in records if name in record]
        print(f"kNN on {name.removeprefix('knn_')}: {100 * values[-1]:.1f}% (untrained: {100 * values[0]:.1f}%)")
    print(f"{out}: last.pt, metrics.jsonl, curves.png{', fill_in.png, fill_in.gif' if tokenizer_path else ''}")


if __name__ == "__main__":
    main()
