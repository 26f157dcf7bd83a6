"""Script 1: masks + contrast -> a pre-trained model (Eq. 6: L_mask + alpha * gamma * L_cl).

    python pretrain.py                                 the toy world, anything missing made first
    python pretrain.py --videos DIR                    a folder of any videos
    python pretrain.py --preset small --data tokens/howto100m --gpus 8        the paper's models
    torchrun --nnodes 2 --nproc-per-node 8 ... pretrain.py ...                several machines

A run lives in runs/NAME: config.json, last.pt, metrics.jsonl, curves.png, fill_in.png and .gif, TensorBoard events.

Shapes: n videos in this process's batch, B = 2n clips, T frames, H x W tokens a frame, d hidden size, M masked tokens.
"""
import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import data
import masking
import monitor
import toy
import vqvae
from contrastive import ProjectionHead, info_nce
from plumbing import processes, released, runs
from plumbing.cli import UserError, option, parse, run
from plumbing.pictures import save_fill_in
from plumbing.processes import move, rank_and_world, say, seed_all, wait_for_all
from plumbing.store import check_header
from plumbing.tokenizing import fingerprint
from transformer import TokenHead, TransformerConfig, VideoTransformer, init_weights, resize_table

PRESETS = {
    "toy": dict(layers=3, dim=64, heads=4, head_dim=16, mlp_dim=256, frame_size=64, fps=8.0, codes=256, dropout=0.0,
                min_stride=2, max_stride=4, projection_hidden=128, projection_layers=2, batch=32, lr=4e-3, steps=800,
                tokenizer_steps=600, log_every=25, knn=20, workers=0),
    "small": {},  # the defaults below: Table 3 and the second column of Table 4
    "base": dict(layers=12, dim=768, heads=12, mlp_dim=3072),
    "large": dict(layers=24, dim=1024, heads=16, head_dim=32, projection_hidden=4096, projection_layers=3, epochs=90,
                  lr=3e-4, warmup=0.05)}
BETAS = (0.9, 0.98)  # of Adam, Table 4


@dataclass
class Config(runs.RunSettings):
    preset: str = option("toy", "sizes and training numbers to start from", choices=list(PRESETS))
    out: str = option("runs/toy", "folder of the run")
    videos: str = option("", "folder of videos to pre-train on (default: the toy world)")
    data: str = option("", "token store to pre-train on, made by vqvae.py tokenize")
    tokenizer: str = option("", "tokenizer of the videos or of the store (default: train one on the videos)")
    monitor: str = option("", "folder with labelled token stores train and val or test, for the kNN accuracy")
    init: str = option("", "checkpoint of another run to start from; another clip size is interpolated to this one's")
    # the model
    layers: int = option(6, "transformer layers")
    dim: int = option(512, "hidden size")
    heads: int = option(8, "attention heads")
    head_dim: int = option(64, "dimensions of a head")
    mlp_dim: int = option(2048, "hidden size of the MLP")
    layout: str = option("T,H|W", "attention layout (Table 13)")
    pre_norm: bool = option(False, "pre-LayerNorm in place of post-LayerNorm")
    projection_hidden: int = option(2048, "hidden size of the projection head")
    projection_layers: int = option(2, "layers of the projection head", least=1)
    # the clips
    frames: int = option(5, "frames of a clip, T", least=1)
    frame_size: int = option(128, "frame side in pixels, S (of --videos), of which a token covers 8 x 8", multiple=8)
    fps: float = option(2.0, "frames a second that are tokenised (of --videos)")
    codes: int = option(1024, "codes of a tokenizer trained on the videos")
    tokenizer_steps: int = option(1000, "training steps of that tokenizer")
    min_stride: int = option(1, "smallest step between a clip's frames, in stored frames")
    max_stride: int = option(1, "largest step between a clip's frames")
    d_max: float | None = option(None, "largest distance between the two clips' starts, in seconds", least=0)
    held_out: int = option(128, "videos kept out of training, to measure on and to draw (at most a tenth)", least=0)
    # the two tasks
    mask: str = option("block", "how tokens are hidden", choices=["block", "iid"])
    mask_ratio: float = option(0.15, "share of the tokens to hide")
    blocks: int = option(0, "cuboids of a block mask (0: the number that comes closest to the ratio)", least=0)
    noise: bool = option(False, "80% MASK, 10% random codes, 10% left, drawn per cuboid (Sec. G.3), or i.i.d. token")
    alpha: float = option(1.0, "weight of the contrastive loss")
    gamma: float = option(0.2, "temperature of the contrastive loss")
    # training
    epochs: float = option(10.0, "passes over the videos")
    batch: int = option(1024, "videos a step, over all processes and accumulated micro-batches", least=1)
    accumulate: int = option(1, "micro-batches a step; each has its own negatives", least=1)
    lr: float = option(1e-3, "peak learning rate")
    weight_decay: float = option(0.05, "weight decay")
    workers: int = option(4, "processes that load clips (0: the training process itself)")
    log_every: int = option(50, "steps between two lines of metrics", least=1)
    knn: int = option(200, "neighbours of the kNN accuracy", least=1)
    knn_every: int = option(250, "steps between two measurements of it, and of the held-out videos", least=1)

    def __post_init__(self):
        if not 1 <= self.min_stride <= self.max_stride:
            raise UserError(f"--min-stride {self.min_stride} --max-stride {self.max_stride}: "
                            f"both at least 1, the smaller first")
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"--mask-ratio {self.mask_ratio}: it lies between 0 and 1")
        if self.init and Path(self.init).resolve() == (Path(self.out) / "last.pt").resolve():
            raise UserError(f"--init {self.init}: give the new run a folder of its own with --out")
        if self.init and not Path(self.init).is_file():
            raise UserError(f"--init {self.init}: there is no such file")
        if self.videos and self.data:
            raise UserError("--videos and --data: give one of them")
        self.transformer(vocab_size=1, height=1, width=1)

    def transformer(self, vocab_size, height, width):
        return TransformerConfig(self.layers, self.dim, self.heads, self.head_dim, self.mlp_dim, self.frames, height,
                                 width, vocab_size, self.layout, self.pre_norm, self.dropout)

    def masks(self):
        """What to hide, for masking.prepare."""
        return dict(kind=self.mask, ratio=self.mask_ratio, blocks=self.blocks, noise=self.noise)

    def pairs(self, store):
        return data.ClipPairs(store, self.frames, (self.min_stride, self.max_stride), self.d_max, self.seed)

    def clip_fps(self, store):
        """Frames a second of a clip, in the mean."""
        return 2 * store.header["fps"] / (self.min_stride + self.max_stride)


# ---------------------------------------------------------------- the model and its losses


class Vimpac(nn.Module):
    """Backbone, token head and projection head."""

    def __init__(self, config, projection_hidden, projection_layers):
        super().__init__()
        self.backbone = VideoTransformer(config)
        self.token_head = TokenHead(config)
        self.projection_head = ProjectionHead(config.dim, projection_hidden, projection_layers).apply(init_weights)

    def forward(self, inputs, hidden, padded=None):
        """inputs: int64 (B, T, H, W), already masked. hidden: int64 (M,), which of their B*T*H*W places to predict.

        -> logits (M, V + 5) of these places alone, in their order, and projections (B, 256).
        """
        cls, features = self.backbone(inputs, padded)  # (B, d), (B, T, H, W, d)
        logits = self.token_head(features.flatten(0, 3)[hidden], self.backbone.embedding.weight)  # (M, V + 5)
        return logits, self.projection_head(cls)

    @classmethod
    def from_released(cls, path):
        """A whole model from a released VIMPAC checkpoint (classifier.pt), whatever its size and layout.

        Raises UserError naming the file and a tensor that it lacks or that has no place in the model.
        """
        state = runs.read_checkpoint(path)
        with released.reading(path):
            backbone, projection_head = VideoTransformer.from_released(state), ProjectionHead.from_released(state)
            token_head = TokenHead(backbone.config)
            token_head.load_released(state)
            if state:
                raise UserError(f"this model has no place for {', '.join(sorted(state))}")
        model = cls(replace(backbone.config, layers=1), 1, 1)  # small, as all of it is replaced
        model.backbone, model.token_head, model.projection_head = backbone, token_head, projection_head
        return model


def losses(model, config, clips, vocab_size, generator=None):
    """Eq. 6 on this process's pairs of clips, int64 (n, 2, T, H, W), on the CPU -> loss, measures, {name: scalar}.

    L_mask is the mean over the masked tokens of all processes: each gives its weighted sum, of which the mean over the
    processes, which DistributedDataParallel takes, is that mean. contrastive_loss is gamma * L_cl, as in the paper's
    tables. generator: for the masks, the same in all processes.
    """
    device, (rank, world) = next(model.parameters()).device, rank_and_world()
    batch = masking.prepare(clips, vocab_size, generator=generator, rank=rank, world=world, **config.masks())
    hidden = batch.mask.flatten().nonzero().squeeze(1)  # (M,)
    codes = move(batch.tokens.flatten()[hidden], device)  # (M,)
    weight = world / processes.sum_over_all(torch.full((), float(len(codes)), device=device)).clamp(min=1)
    logits, projections = model(move(batch.inputs, device), move(hidden, device), batch.padded)  # (M, V + 5), (B, 256)

    mask_loss = weight * F.cross_entropy(logits.float(), codes, reduction="sum")  # Eq. 1
    accuracy = weight * (logits.argmax(dim=-1) == codes).sum()
    first, second = projections.chunk(2)  # (n, 256) each
    contrast = config.gamma * info_nce(first, second, config.gamma) if config.alpha else torch.zeros_like(mask_loss)
    loss = mask_loss + config.alpha * contrast  # Eq. 6, with Eq. 4 and 5 in info_nce
    return loss, {"loss": loss.detach(), "mask_loss": mask_loss.detach(), "mask_accuracy": accuracy,
                  "contrastive_loss": contrast.detach()}


# ---------------------------------------------------------------- what is made when missing


def prepare(config, device):
    """Makes videos, tokenizer and tokens where they are missing -> (store, tokenizer path or None, monitor folder)."""
    if config.data:
        return data.TokenStore(config.data), config.tokenizer or None, config.monitor or None
    rank, home = rank_and_world()[0], Path(config.out if config.videos else "datasets/toy")
    place = Path(config.tokenizer or home / "tokenizer.pt")
    if rank == 0 and not config.videos:
        toy.make(home)
    wait_for_all()
    if config.videos:
        root, splits = config.videos, {"pretrain": [(p, {}) for p, _ in data.list_videos("folder", config.videos, "")]}
    else:
        root, splits = home, {split: toy.split_videos(home, split) for split in toy.SPLITS}
    if rank == 0 and not place.is_file():
        found, _ = vqvae.make_tokenizer(
            [path for path, _ in splits["pretrain"]], place, config.fps, config.frame_size, 8000, codes=config.codes,
            steps=config.tokenizer_steps, batch=64, lr=2e-3, seed=config.seed, device=device)
        say(f"tokenizer: {found}")
    wait_for_all()
    tokenizer, views = vqvae.load_tokenizer(place).to(device), data.views_for("pretrain", config.frame_size)
    wanted = dict(fingerprint=fingerprint(tokenizer), fps=config.fps, size=config.frame_size)
    for split, videos in splits.items():
        out = home / "tokens" / split
        if not (out / "index.npy").is_file():
            vqvae.tokenize(tokenizer, videos, root, out, config.fps, config.frame_size, views, place.name,
                           None if config.videos else toy.CLASSES)
        check_header(out, data.TokenStore(out).header, wanted)
    labelled = config.monitor or (None if config.videos else home / "tokens")
    return data.TokenStore(home / "tokens/pretrain"), place, labelled


# ---------------------------------------------------------------- training


def update(model, config, micro_batches, vocab_size, optimizer, precision, step):
    """One optimizer step on a list of micro-batches, clips int64 (n, 2, T, H, W) each -> the means of what `losses`
    measures, the learning rate. All randomness is a function of the seed, the step and, dropout's, the process."""
    seed_all(config.seed, step, rank_and_world()[0])  # dropout
    generator = torch.Generator().manual_seed(processes.one_seed(config.seed, step))  # masks
    device, found = next(model.parameters()).device, []
    for i, clips in enumerate(micro_batches):
        last = i == len(micro_batches) - 1  # gradients are exchanged once a step
        with contextlib.nullcontext() if last or rank_and_world()[1] == 1 else model.no_sync():
            with processes.autocast(device, precision):
                loss, measures = losses(model, config, clips, vocab_size, generator)
            optimizer.backward(loss / len(micro_batches))
        found.append(measures)
    return {name: sum(m[name] for m in found) / len(found) for name in found[0]}, optimizer.step(step)


def train(config, model, store, device, monitor_folder):
    """The whole of pre-training, from config.out/last.pt on where --resume asks for it."""
    videos, held_out = data.hold_out(len(store), config.held_out)
    if not config.alpha:
        model.projection_head.requires_grad_(False)
    training = runs.Run(config, model, len(videos), config.epochs, BETAS, device, config.init, resize_table)
    per_step = config.accumulate
    batches = data.Batches(videos, config.batch // per_step, training.steps * per_step, training.first * per_step,
                           config.seed, *rank_and_world())
    loader = iter(DataLoader(config.pairs(store), batch_sampler=batches, num_workers=config.workers))

    def watch(step):
        with torch.compiler.set_stance("force_eager"):  # not worth a compilation for each of its shapes
            found = monitor.evaluate(losses, model, config, store, held_out, training.precision)
            if monitor_folder and training.rank == 0:
                found |= monitor.knn_accuracies(model.backbone, monitor_folder, config.clip_fps(store), config.knn)
        if found:
            training.write(step=step, **found)
        model.train()

    model.train()
    if training.first == 0:
        watch(0)
    for step in training.each_step("pre-training"):
        micro_batches = [next(loader) for _ in range(per_step)]
        measures, lr = update(training.wrapped, config, micro_batches, store.header["vocab_size"],
                              training.optimizer, training.precision, step)
        training.record(step, measures, lr, "mask {mask_accuracy:.1%} contrast {contrastive_loss:.3f}")
        if training.due(step, config.knn_every):
            watch(step + 1)


def main():
    config = parse(Config, sys.argv[1:], __doc__, PRESETS)
    processes.launch(config.gpus)
    device = processes.pick_device(config.device)
    processes.pick_precision(config.precision, device)  # refused before anything is made
    store, tokenizer_path, monitor_folder = prepare(config, device)
    parts, videos = rank_and_world()[1] * config.accumulate, len(data.hold_out(len(store), config.held_out)[0])
    if config.batch > videos >= parts:
        wanted, config.batch = config.batch, videos // parts * parts
        say(f"--batch {wanted} is more than the {videos} videos: using {config.batch}")
    if config.batch % parts or config.batch > videos:
        raise UserError(f"--batch {config.batch}: it must be a multiple of {parts} (processes x micro-batches) "
                        f"and at most the {videos} videos")
    seed_all(config.seed)
    shape = config.transformer(store.header["vocab_size"], store.height, store.width)
    model = Vimpac(shape, config.projection_hidden, config.projection_layers).to(device)
    blocks = config.blocks or masking.blocks_for(shape.frames, shape.height, shape.width, config.mask_ratio)
    say(f"{videos} videos, {shape.frames} x {shape.height} x {shape.width} tokens a clip, "
        f"{sum(p.numel() for p in model.backbone.parameters()) / 1e6:.2f}M parameters, "
        f"{config.mask} masks{f' of {blocks} cuboids' if config.mask == 'block' else ''}, on {device}")
    train(config, model, store, device, monitor_folder)
    processes.leave_group()
    finish(config, model, store, tokenizer_path)


def finish(config, model, store, tokenizer_path):
    """The pictures and the last lines of a run."""
    held_out = data.hold_out(len(store), config.held_out)[1]
    monitor.report(config.out, len(held_out))
    if tokenizer_path:
        tokenizer = vqvae.load_tokenizer(tokenizer_path).to(model.backbone.cls.device)
        shown = held_out if len(held_out) else np.arange(len(store))
        with torch.compiler.set_stance("force_eager"):
            save_fill_in(monitor.fill_in(
                model, tokenizer, store, shown[data.spread(6, len(shown))], config.clip_fps(store),
                torch.Generator().manual_seed(config.seed), **config.masks()), config.out)
    print(f"{config.out}: last.pt, metrics.jsonl, curves.png{', fill_in.png, fill_in.gif' if tokenizer_path else ''}")


if __name__ == "__main__":
    run(main)
