"""Script 1: masks + contrast -> a pre-trained model (Eq. 6: L_mask + alpha * gamma * L_cl).

    python pretrain.py                                 the toy world, anything missing made first
    python pretrain.py --videos DIR --out runs/mine    a folder of any videos
    python pretrain.py --preset small --data tokens/howto100m --gpus 8        the paper's models
    torchrun --nnodes 2 --nproc-per-node 8 ... pretrain.py ...                several machines
    python pretrain.py --fill-in VIDEO ... --checkpoint runs/toy/last.pt      what a model fills in, in any videos

A run lives in runs/NAME: config.json, last.pt, metrics.jsonl, curves.png, fill_in.png and .gif, TensorBoard events.

Shapes: n videos in this process's batch, B = 2n clips, T frames, H x W tokens a frame, d hidden size, M masked tokens.
"""
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import data
import masking
import monitor
import predict
import vqvae
from contrastive import ProjectionHead, cached_gradients, contrastive_loss, join, with_gradients
from plumbing import checkpoints, processes, released, runs
from plumbing.cli import UserError, option, parse, run
from plumbing.decoding import cores
from plumbing.fitting import described, fit, memory_explained, plan, share_out, slices
from plumbing.processes import rank_and_world, say, seed_all
from prepare import prepare
from transformer import TokenHead, TransformerConfig, VideoTransformer, init_weights, resize_table

PRESETS = {
    "toy": dict(layers=3, dim=64, heads=4, head_dim=16, mlp_dim=256, init_std=0.057, frame_size=64, fps=8.0, codes=256,
                dropout=0.0, min_stride=2, max_stride=4, projection_hidden=128, projection_layers=2, batch=32,
                contrast=0, alpha=0.5, lr=4e-3, steps=320, tokenizer_steps=600, log_every=20, save_every=80, knn=20,
                knn_every=80, workers=0),
    "small": {},  # the defaults below: Table 3 and the second column of Table 4
    "base": dict(layers=12, dim=768, heads=12, mlp_dim=3072),
    "large": dict(layers=24, dim=1024, heads=16, head_dim=32, projection_hidden=4096, projection_layers=3, epochs=100.0,
                  stop_after=90.0, lr=3e-4, warmup=0.05, contrast=256, held_out=256)}
PRESETS["large256"] = dict(PRESETS["large"], frame_size=256, stop_after=0.0, contrast=128)  # large's second stage
BETAS = (0.9, 0.98)  # of Adam, Table 4


@dataclass
class Config(runs.RunSettings):
    preset: str = option("toy", "sizes and training numbers to start from", choices=list(PRESETS))
    out: str = option("", "folder of the run, named after the preset")
    videos: str = option("", "folder of videos to pre-train on (default: the toy world)")
    toy_videos: int = option(2000, "videos of the toy world; another number makes one of its own", least=40, most=10**6)
    data: str = option("", "token store to pre-train on, made by vqvae.py tokenize")
    tokenizer: str = option("", "tokenizer of the videos or of the store (default: train one on the videos)")
    monitor: str = option("", "folder with labelled token stores train and val or test, for the kNN accuracy")
    init: str = option("", "checkpoint, ours or a released one, whose weights a new schedule starts from")
    fill_in: tuple = option((), "video files to fill in: pictures of what a checkpoint predicts, in place of training")
    checkpoint: str = option("", "of --fill-in, ours or a released one (default: the run's last.pt)")
    resume_from: str = option("", "checkpoint of another run whose schedule to go on with, also at another clip size")
    # the model
    layers: int = option(6, "transformer layers", least=1, most=1000)
    dim: int = option(512, "hidden size", least=1, most=65536)
    heads: int = option(8, "attention heads", least=1, most=1000)
    head_dim: int = option(64, "dimensions of a head", least=1, most=4096)
    mlp_dim: int = option(2048, "hidden size of the MLP", least=1, most=262144)
    layout: str = option("T,H|W", "attention layout (Table 13)")
    pre_norm: bool = option(False, "pre-LayerNorm in place of post-LayerNorm")
    init_std: float = option(0.02, "standard deviation of the first weights; narrow models need more", above=0, most=10)
    projection_hidden: int = option(2048, "hidden size of the projection head", least=1, most=65536)
    projection_layers: int = option(2, "layers of the projection head", least=1, most=100)
    # the clips
    frames: int = option(5, "frames of a clip, T", least=1, most=1000)
    frame_size: int = option(128, "frame side in pixels, S, of which a token covers 8 x 8", multiple=8, most=2048)
    fps: float = option(2.0, "frames a second that are tokenised (of --videos)", above=0, most=1000)
    codes: int = option(1024, "codes of a tokenizer trained on the videos", least=2, most=65536)
    tokenizer_steps: int = option(1000, "training steps of that tokenizer", least=1)
    min_stride: int = option(1, "smallest step between a clip's frames, in stored frames", least=1)
    max_stride: int = option(1, "largest step between a clip's frames", least=1, most=1000)
    d_max: float | None = option(None, "largest distance between the two clips' starts, in seconds", least=0)
    held_out: int = option(128, "videos kept out of training, to measure on and to draw (at most a tenth)", least=0)
    # the two tasks
    mask: str = option("block", "how tokens are hidden", choices=["block", "iid"])
    mask_ratio: float = option(0.15, "share of the tokens to hide", above=0, most=0.99)
    blocks: int = option(0, "cuboids of a block mask (0: what comes closest to the ratio)", least=0, most=1000)
    noise: bool = option(False, "80% MASK, 10% random codes, 10% left, drawn per cuboid (Sec. G.3), or i.i.d. token")
    mask_weight: float = option(1.0, "weight of the mask loss (0: contrastive learning alone)", least=0)
    alpha: float = option(1.0, "weight of the contrastive loss (0: mask-then-predict alone)", least=0)
    contrast_on: str = option("masked", "clips that are told apart: those of the mask task, or whole ones (Table 12)",
                              choices=["masked", "whole"])
    gamma: float = option(0.2, "temperature of the contrastive loss", above=0)
    # training
    epochs: float = option(10.0, "passes over the videos, over which the learning rate rises and falls", least=0)
    stop_after: float = option(0.0, "epochs after which to stop, though the schedule goes on (0: at its end)", least=0)
    batch: int = option(1024, "videos a step, over all processes", least=1)
    contrast: int = option(128, "videos told apart from each other, n of Eq. 4 (0: the whole batch)", least=0)
    lr: float = option(1e-3, "peak learning rate", above=0)
    weight_decay: float = option(0.05, "weight decay", least=0)
    workers: int = option(4, "processes that load clips (0: the training process itself)", least=0, most=512)
    log_every: int = option(50, "steps between two lines of metrics", least=1)
    knn: int = option(200, "neighbours of the kNN accuracy", least=1)
    knn_every: int = option(250, "steps between two measurements of it, and of the held-out videos", least=1)

    def __post_init__(self):
        self.out = self.out or f"runs/{self.preset}"
        if self.min_stride > self.max_stride:
            raise UserError(f"--min-stride {self.min_stride} --max-stride {self.max_stride}: the smaller first")
        for flag, path in (("--init", self.init), ("--resume-from", self.resume_from)):
            if path and not Path(path).is_file():
                raise UserError(f"{flag} {path}: there is no such file")
            if path and Path(path).resolve() == (Path(self.out) / "last.pt").resolve():
                raise UserError(f"{flag} {path}: give the new run a folder of its own with --out")
        for one, other in (("videos", "data"), ("init", "resume_from")):
            if getattr(self, one) and getattr(self, other):
                raise UserError(f"--{one} and --{other.replace('_', '-')}: give one of them")
        if not (self.mask_weight or self.alpha):
            raise UserError("--mask-weight 0 --alpha 0: there is nothing to learn")
        self.checkpoint = self.checkpoint or f"{self.out}/last.pt"
        self.transformer(vocab_size=1, height=1, width=1)

    def transformer(self, vocab_size, height, width):
        return TransformerConfig(self.layers, self.dim, self.heads, self.head_dim, self.mlp_dim, self.frames, height,
                                 width, vocab_size, self.layout, self.pre_norm, self.dropout, self.init_std)

    def masks(self):
        """What to hide, for masking.prepare."""
        return dict(kind=self.mask, ratio=self.mask_ratio, blocks=self.blocks, noise=self.noise)

    def seen(self):
        """What the backbone is given, for masking.Batch.seen."""
        return dict(contrast_on=self.contrast_on, mask_weight=self.mask_weight) if self.alpha else {}

    def own_group(self, world):
        """How many videos of a group, told apart from each other, each process has."""
        return self.contrast // world if self.alpha else 1

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
        self.projection_head = ProjectionHead(config.dim, projection_hidden, projection_layers)
        init_weights(self.projection_head, config.init_std)

    def forward(self, inputs, hidden, padded=None):
        """inputs: int64 (B, T, H, W), already masked. hidden: int64 (M,), which of their B*T*H*W places to predict.

        -> logits (M, V + 5) of these places alone, in their order, and CLS (B, d), for the projection head.
        """
        cls, features = self.backbone(inputs, padded)  # (B, d), (B, T, H, W, d)
        return self.token_head(features.flatten(0, 3)[hidden], self.backbone.embedding.weight), cls

    @classmethod
    def from_released(cls, path):
        """A whole model from a released VIMPAC checkpoint (classifier.pt), whatever its size and layout.

        Raises UserError naming the file and a tensor that it lacks or that has no place in the model.
        """
        state = checkpoints.read_checkpoint(path)
        with released.reading(path):
            backbone, projection_head = VideoTransformer.from_released(state), ProjectionHead.from_released(state)
            token_head = TokenHead(backbone.config)
            token_head.load_released(state)
            if state:
                raise UserError(f"this model has no place for {', '.join(sorted(state))}")
        model = cls(replace(backbone.config, layers=1), 1, 1)  # small, as all of it is replaced
        model.backbone, model.token_head, model.projection_head = backbone, token_head, projection_head
        return model

    @classmethod
    def load(cls, path):
        """A whole model from a pre-training checkpoint, ours or a released one. UserError for any other file."""
        checkpoint = checkpoints.read_checkpoint(path)
        if "transformer" not in checkpoint:
            return cls.from_released(path)
        config = checkpoint.get("config", {})
        if "projection_hidden" not in config:
            raise UserError(f"{path} is of fine-tuning: it has no token head any more")
        model = cls(checkpoints.rebuilt(TransformerConfig, checkpoint["transformer"], path),
                    config["projection_hidden"], config["projection_layers"])
        checkpoints.load_weights(model, checkpoint["model"], path)
        return model


def measures(config, mask, accuracy, contrast):
    """Eq. 6 and those of its parts that are trained -> {name: scalar}. contrastive_loss is gamma * L_cl, as in the
    paper's tables."""
    found = {"loss": config.mask_weight * mask + config.alpha * contrast}
    found |= {"mask_loss": mask, "mask_accuracy": accuracy} if config.mask_weight else {}
    return found | ({"contrastive_loss": contrast} if config.alpha else {})


@torch.no_grad()
def losses(model, config, clips, vocab_size, generator, precision):
    """Eq. 6 on one group of videos told apart from each other, of which these are this process's -> `measures`."""
    device, head, (rank, world), found = model.backbone.cls.device, model.projection_head, rank_and_world(), []
    batch = masking.prepare(clips, vocab_size, generator=generator, rank=rank, world=world, **config.masks())
    weight = masking.token_weight(batch, device)
    with processes.autocast(device, precision):
        for videos in slices(0, len(clips), config.micro_batch):
            found.append(masking.mask_loss(model, batch.part(videos), weight, **config.seen()))
        mask, accuracy, cls = zip(*found)
        contrast = contrastive_loss(head, join(cls), len(clips), config.gamma) if config.alpha else 0 * weight
    return measures(config, sum(mask), sum(accuracy), contrast)


def update(model, config, clips, vocab_size, optimizer, precision, step):
    """One optimizer step on this process's share of a batch, int64 (n, 2, T, H, W) -> `measures`, the learning rate.

    The batch is made of groups of config.contrast videos, told apart from each other (n of Eq. 4). A process takes
    config.micro_batch of its videos at a time: whole groups, where one fits, each pass then being Eq. 6 itself; else
    parts of a group, with `cached_gradients`. How the work is split changes nothing but the numbers that dropout draws.
    """
    own, (rank, world) = getattr(model, "module", model), rank_and_world()  # own: without DistributedDataParallel
    device, head, found = own.backbone.cls.device, own.projection_head, []
    cast = partial(processes.autocast, device, precision)
    generator = torch.Generator().manual_seed(processes.one_seed(config.seed, step))
    batch = masking.prepare(clips, vocab_size, generator=generator, rank=rank, world=world, **config.masks())
    weight, group = masking.token_weight(batch, device), config.own_group(world)
    share = group / len(clips)  # of a group in the mean over the groups
    for places in plan(len(clips), group, config.micro_batch):
        parts = [batch.part(videos) for videos in places]
        seeds = [partial(seed_all, config.seed, step, rank, videos.start) for videos in places]
        cached = len(parts) > 1 and cached_gradients(own.backbone, head, parts, config.gamma, config.alpha * share,
                                                     optimizer.gradients, seeds, cast, **config.seen())
        for i, (videos, part, seed) in enumerate(zip(places, parts, seeds)):
            seed()  # dropout
            with processes.exchanging(model, videos.stop == len(clips)):
                with cast():
                    mask, accuracy, cls = masking.mask_loss(model, part, weight, **config.seen())
                    if cached:
                        contrast, loss = cached[0], with_gradients([cls, *head.parameters()], cached[1][i])
                    else:
                        contrast = contrastive_loss(head, cls, group, config.gamma) if config.alpha else 0 * weight
                        loss = config.alpha * share * contrast
                optimizer.backward(config.mask_weight * mask + loss)
            found.append((mask.detach(), accuracy, share * contrast.detach()))
    return measures(config, *(sum(values) for values in zip(*found))), optimizer.step(step)


# ---------------------------------------------------------------- training


def initialise(model, path, tokens):
    """Loads the weights of another run's checkpoint, or of a released one; its clip size is interpolated to ours.
    tokens: those to train on, `predict.origin`."""
    other, learnt = Vimpac.load(path), checkpoints.read_checkpoint(path).get("tokens", {})
    checkpoints.same_tokenizer(path, learnt, tokens, "what is trained on here")
    weights = other.state_dict()
    checkpoints.check_shape(path, asdict(other.backbone.config), model)
    checkpoints.resize_tables(model, weights, resize_table)
    checkpoints.load_weights(model, weights, path)
    say(f"starting from {path}")


def try_out(model, config, precision, videos):
    """Forward and backward with so many videos at a time, with twice the usual masks and with PAD: what takes most."""
    shape, device = model.backbone.config, model.backbone.cls.device
    tokens = torch.zeros(2 * videos, shape.frames, shape.height, shape.width, dtype=torch.long)
    part = masking.Batch(tokens, tokens, torch.rand(tokens.shape) < 2 * config.mask_ratio, torch.ones(len(tokens)) > 0)
    with torch.compiler.set_stance("force_eager"), processes.autocast(device, precision):
        loss, _, cls = masking.mask_loss(model, part, torch.ones((), device=device), **config.seen())
    (loss + cls.sum()).backward()


def train(config, model, store, device, monitor_folder, tokenizer_path=None):
    """The whole of pre-training, from config.out/last.pt on where --resume asks for it."""
    videos, held_out = data.hold_out(len(store), config.held_out)
    rank, world = rank_and_world()
    model.projection_head.requires_grad_(config.alpha != 0)
    model.token_head.requires_grad_(config.mask_weight != 0)
    model.backbone.recompute = config.recompute
    model.train()
    precision = processes.pick_precision(config.precision, device)
    memory = fit(config, model, config.batch // world, device, partial(try_out, model, config, precision))
    say(f"{config.preset} on {world} x {processes.device_name(device)}: "
        f"{described(config, config.batch // world, config.own_group(world))}{memory}")
    tokens = predict.origin(store, tokenizer_path)
    training = runs.Run(config, model, len(videos), config.epochs, BETAS, device, tokens, config.stop_after,
                        resize=resize_table, resume_from=config.resume_from,
                        init=config.init and partial(initialise, model, config.init, tokens))
    batches = data.Batches(videos, config.batch, training.end, training.first, config.seed, rank, world)
    loader = iter(DataLoader(config.pairs(store), batch_sampler=batches, num_workers=min(config.workers, cores())))

    def watch(step):
        with torch.compiler.set_stance("force_eager"):  # not worth a compilation for each of its shapes
            found = monitor.evaluate(losses, model, config, store, held_out, precision)
            if monitor_folder and rank == 0:
                found |= monitor.knn_accuracies(model.backbone, monitor_folder, config.clip_fps(store), config.knn,
                                                min(64, 4 * config.micro_batch))
        if found:
            training.write(step=step, **found)
        model.train()

    shown = ("mask {mask_accuracy:.1%} " * bool(config.mask_weight)
             + "contrast {contrastive_loss:.3f}" * bool(config.alpha))
    with memory_explained(config):
        if training.first == 0:
            watch(0)
        for step in training.each_step("pre-training"):
            found, lr = update(training.wrapped, config, next(loader), store.header["vocab_size"], training.optimizer,
                               precision, step)
            training.record(step, found, lr, shown)
            if training.due(step, config.knn_every):
                watch(step + 1)


def main():
    config = parse(Config, sys.argv[1:], __doc__, PRESETS)
    if config.preset == "large256" and not (config.resume_from or config.init):
        raise UserError("--preset large256 is the second stage of large: give its checkpoint with --resume-from")
    processes.launch(config.gpus)
    device = processes.pick_device(config.device)
    processes.pick_precision(config.precision, device)  # refused before anything is made
    if config.fill_in:
        return predict.fill_in(config, Vimpac.load(config.checkpoint).to(device))
    for path in filter(None, (config.init, config.resume_from)):
        checkpoints.read_checkpoint(path)  # refused before anything is made
    store, tokenizer_path, monitor_folder = prepare(config, device)
    videos = len(data.hold_out(len(store), config.held_out)[0])
    share_out(config, videos, rank_and_world()[1])
    seed_all(config.seed)
    shape = config.transformer(store.header["vocab_size"], store.height, store.width)
    model = Vimpac(shape, config.projection_hidden, config.projection_layers).to(device)
    blocks = config.blocks or masking.blocks_for(shape.frames, shape.height, shape.width, config.mask_ratio)
    say(f"{videos} videos, {shape.frames} x {shape.height} x {shape.width} tokens a clip, "
        f"{sum(p.numel() for p in model.backbone.parameters()) / 1e6:.2f}M parameters, "
        f"{config.mask} masks{f' of {blocks} cuboids' if config.mask == 'block' else ''}, on {device}")
    train(config, model, store, device, monitor_folder, tokenizer_path)
    processes.leave_group()
    monitor.report(config, model, store, tokenizer_path and vqvae.load_tokenizer(tokenizer_path).to(device))


if __name__ == "__main__":
    run(main)
