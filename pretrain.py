"""Pre-trains a model by predicting masked tokens and contrasting clips (Eq. 6).

    python pretrain.py                                 the toy world, generated if missing
    python pretrain.py --videos DIR --out runs/mine    a folder of any videos
    python pretrain.py --preset small --data tokens/howto128 --gpus 8        the paper's models
    python pretrain.py --fill-in VIDEO ... --checkpoint runs/toy/last.pt      pictures of Fig. 5

Shapes: n videos of a contrast group on this process (n of Eq. 4 counts those of all processes),
B = 2n clips, T frames, H x W tokens a frame, d width, M hidden tokens, V codes and 5 special ids.
"""
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import data
import masking
import monitor
import predict
from contrastive import ProjectionHead, at_least_float32, info_nce
from plumbing import checkpoints, processes, released, runs
from plumbing.cli import UserError, option, parse, progress, run
from plumbing.fitting import describe, fit_to_device
from plumbing.processes import agree, autocast, move, one_seed, rank_and_world, say, sum_over_all
from plumbing.tokens import PAD
from plumbing.weights import init_weights
from prepare import prepare
from transformer import TokenHead, TransformerConfig, VideoTransformer, load_backbone
from vqvae import load_tokenizer

PRESETS = {
    "toy": dict(layers=3, dim=64, heads=4, head_dim=16, mlp_dim=256, init_std=0.057, dropout=0.0,
                projection_hidden=128, frame_size=64, fps=8.0, codes=256, tokenizer_steps=600,
                min_stride=2, max_stride=4, batch=32, micro_batch=32, contrast=0, alpha=0.5,
                lr=4e-3, steps=320, log_every=20, save_every=80, knn=20, knn_every=80, workers=0),
    # For thousands of videos: a quarter of small's FLOP a video, small batches for many steps,
    # and 200 epochs. 5,000 videos take 1e17 FLOP, an hour on a GPU that does 30 TFLOP/s.
    "own": dict(dim=256, heads=4, mlp_dim=1024, init_std=0.028, projection_hidden=512, fps=4.0,
                max_stride=2, tokenizer_steps=3000, batch=128, epochs=200.0),
    "small": {},  # the defaults below: Table 3 and the second column of Table 4
    "base": dict(layers=12, dim=768, heads=12, mlp_dim=3072),
    "large": dict(layers=24, dim=1024, heads=16, head_dim=32, projection_hidden=4096,
                  projection_layers=3, epochs=100.0, stop_after=90.0, lr=3e-4, warmup=0.05,
                  contrast=256, held_out=256)}
PRESETS["large256"] = dict(PRESETS["large"], frame_size=256, stop_after=0.0, contrast=128)
BETAS = (0.9, 0.98)  # of Adam, Table 4


@dataclass
class Config(runs.RunSettings):
    preset: str = option("toy", "defaults of the other flags", list(PRESETS), group="what to train")
    out: str = option("", "folder of the run (default: runs/PRESET)")
    videos: str = option("", "folder of videos (default: the toy world)")
    toy_videos: int = option(2000, "videos of the toy world", least=40, most=10**6)
    data: str = option("", "token store made by vqvae.py tokenize, in place of --videos")
    tokenizer: str = option("", "tokenizer of the videos or of the store (default: train one)")
    monitor: str = option("", "folder of labelled token stores, for the kNN accuracy")
    init: str = option("", "checkpoint to take weights from, for a new schedule")
    resume_from: str = option("", "checkpoint of another run, to continue its schedule here")
    fill_in: tuple = option((), "draw what a model predicts for hidden tokens of these videos")
    features: str = option("", "write the features of --videos to this .npz file; no training")
    checkpoint: str = option("", "model of --fill-in and --features (default: the run's last.pt)")
    layers: int = option(6, "transformer layers", least=1, most=1000, group="model")
    dim: int = option(512, "hidden size", least=1, most=65536)
    heads: int = option(8, "attention heads", least=1, most=1000)
    head_dim: int = option(64, "size of a head", least=1, most=4096)
    mlp_dim: int = option(2048, "hidden size of the MLP", least=1, most=262144)
    layout: str = option("T,H|W", "attention layout of Table 13: TxHxW; T,HxW; T,H,W; T,H|W")
    pre_norm: bool = option(False, "pre-LayerNorm in place of post-LayerNorm")
    init_std: float = option(0.02, "standard deviation of the initial weights", above=0, most=10)
    projection_hidden: int = option(2048, "hidden size of the projection head", least=1, most=65536)
    projection_layers: int = option(2, "layers of the projection head", least=1, most=100)
    frames: int = option(5, "frames of a clip, T", least=1, most=1000, group="clips")
    frame_size: int = option(128, "frame side in pixels, S", multiple=8, most=2048)
    fps: float = option(2.0, "frames a second to tokenise, of --videos", above=0, most=1000)
    codes: int = option(1024, "codes of a tokenizer trained on the videos", least=2, most=65531)
    tokenizer_steps: int = option(1000, "training steps of that tokenizer", least=1)
    min_stride: int = option(1, "smallest step between a clip's frames, in stored frames", least=1)
    max_stride: int = option(1, "largest step between a clip's frames", least=1, most=1000)
    d_max: float | None = option(None, "largest distance of two clips' starts, in seconds", least=0)
    held_out: int = option(128, "videos to measure on, at most a tenth of all", least=0)
    mask: str = option("block", "kind of mask", list(masking.KINDS), group="the two tasks")
    mask_ratio: float = option(0.15, "fraction of the tokens to hide", above=0, most=0.99)
    blocks: int = option(0, "cuboids of a block mask (0: by --mask-ratio)", least=0, most=1000)
    noise: bool = option(False, "80% of cuboids MASK, 10% random codes, 10% kept (Sec. G.3)")
    mask_weight: float = option(1.0, "weight of the mask loss", least=0)
    alpha: float = option(1.0, "weight of the contrastive loss", least=0)
    contrast_on: str = option("masked", "clips to contrast (Table 12)", ["masked", "whole"])
    gamma: float = option(0.2, "temperature of the contrastive loss", above=0)
    epochs: float = option(10.0, "passes over the videos", least=0, group="training")
    stop_after: float = option(0.0, "epochs after which to stop early (0: do not)", least=0)
    batch: int = option(1024, "videos a step, over all processes", least=1)
    contrast: int = option(128, "videos contrasted together, n of Eq. 4 (0: --batch)", least=0)
    lr: float = option(1e-3, "peak learning rate", above=0)
    weight_decay: float = option(0.05, "weight decay", least=0)
    workers: int = option(4, "processes that load clips", least=0, most=512)
    log_every: int = option(50, "steps between two lines of metrics", least=1)
    knn: int = option(200, "neighbours of the kNN accuracy", least=1)
    knn_every: int = option(250, "steps between two measurements", least=1)

    def __post_init__(self):
        self.out = self.out or f"runs/{self.preset}"
        self.checkpoint = self.checkpoint or f"{self.out}/last.pt"
        if self.features and not self.videos:
            raise UserError("--features needs the folder of --videos")
        if self.min_stride > self.max_stride:
            raise UserError("--min-stride must not be more than --max-stride")
        if self.videos and self.data:
            raise UserError("give --videos or --data, not both")
        if self.init and self.resume_from:
            raise UserError("give --init or --resume-from, not both")
        if not (self.mask_weight or self.alpha):
            raise UserError("--mask-weight 0 --alpha 0: there is nothing to learn")
        self.transformer(vocab_size=1, height=1, width=1)  # raises for sizes that do not fit

    def transformer(self, vocab_size, height, width):
        return TransformerConfig(
            self.layers, self.dim, self.heads, self.head_dim, self.mlp_dim, self.frames, height,
            width, vocab_size, self.layout, self.pre_norm, self.dropout, self.init_std)

    def pairs(self, store):
        strides = (self.min_stride, self.max_stride)
        return data.ClipPairs(store, self.frames, strides, self.d_max, self.seed)

    def clip_fps(self, store):
        """Frames a second of a clip, on average."""
        return 2 * store.header["fps"] / (self.min_stride + self.max_stride)


# ---------------------------------------------------------------- the method


class Batch(NamedTuple):
    """Clips with hidden tokens: the first clips of n videos, then their second clips."""
    tokens: torch.Tensor  # int64 (2, n, T, H, W): the original tokens, targets where hidden
    inputs: torch.Tensor  # int64 (2, n, T, H, W): the same after hiding, fed to the model
    mask: torch.Tensor  # bool (2, n, T, H, W): True where a token is to be predicted; never at PAD


def mask_clips(clips, vocab_size, config, generator):
    """Draws masks (Eq. 2, 3) and hides tokens -> Batch.

    clips: int64 (n, 2, T, H, W), on the CPU, so that counting hidden tokens does not synchronise
    with a GPU. Every process draws the masks of all processes from the same generator and keeps
    its own, so that masks do not depend on the number of processes.
    """
    rank, world = rank_and_world()
    n, pair, *shape = clips.shape
    padded = clips.new_zeros(n * world, pair, *shape)  # zeros stand for the others' videos
    padded[rank::world] = clips
    tokens = padded.flatten(0, 1)  # (B * world, T, H, W)
    draw = masking.KINDS[config.mask]
    mask = draw(len(tokens), shape, config.mask_ratio, config.blocks, generator)
    inputs = masking.hide(tokens, mask, vocab_size, config.noise, generator)
    mask = masking.union(mask) & (tokens != vocab_size + PAD)  # (B * world, T, H, W)
    by_video = (x.unflatten(0, (-1, pair))[rank::world] for x in (tokens, inputs, mask))
    return Batch(*(x.transpose(0, 1) for x in by_video))


class Vimpac(nn.Module):
    """Backbone, token head and projection head. Its forward pass is the method."""

    def __init__(self, config, projection_hidden, projection_layers):
        super().__init__()
        self.backbone = VideoTransformer(config)
        self.token_head = TokenHead(config)
        self.projection_head = ProjectionHead(config.dim, projection_hidden, projection_layers)
        init_weights(self.projection_head, config.init_std)

    def forward(self, batch, temperature=0.2, micro_batch=None, whole_clips=False):
        """Batch of n videos -> three scalars: L_mask (Eq. 1), its accuracy, L_cl (Eq. 5).

        micro_batch: how many videos pass through the backbone at a time (default: all).
        whole_clips: contrast clips without hidden tokens (Table 12).
        With several processes, L_mask and the accuracy are this process's sums times the number of
        processes, over the hidden tokens of all. Their mean over processes, which
        DistributedDataParallel takes of the gradients, is the mean over all hidden tokens.
        """
        n = batch.tokens.shape[1]
        count = sum_over_all(self.backbone.cls.new_tensor(batch.mask.sum().item()))
        parts = zip(*(x.split(micro_batch or n, dim=1) for x in batch))
        parts = [self.to_device(Batch(*part), whole_clips) for part in parts]
        # Micro-batches are exact: clips interact only in the projection head's batch norm and in
        # InfoNCE, and both see only CLS. With several micro-batches, the backward pass computes
        # the activations again, with the same dropout, so that memory holds one at a time.
        outputs = [self.encode(*part) if len(parts) == 1 else
                   checkpoint(self.encode, *part, use_reentrant=False) for part in parts]
        losses, correct, cls = zip(*outputs)
        weight = rank_and_world()[1] / count.clamp(min=1)  # DDP takes the mean over processes
        cls = torch.cat([x.unflatten(0, (2, -1)) for x in cls], dim=1)  # (2, n, d)
        first, second = self.projection_head(cls.flatten(0, 1)).chunk(2)  # (n, 256) each
        l_mask, accuracy = weight * sum(losses), weight * sum(correct)  # Eq. 1
        return l_mask, accuracy, info_nce(first, second, temperature)

    def to_device(self, batch, whole_clips=False):
        """Batch -> the arguments of `encode`."""
        device = self.backbone.cls.device
        tokens, inputs, mask = (x.flatten(0, 1) for x in batch)  # (B, T, H, W) each
        hidden = mask.flatten().nonzero().squeeze(1)  # (M,)
        targets = tokens.flatten()[hidden]  # (M,)
        has_pad = bool((tokens == self.backbone.config.vocab_size + PAD).any())
        whole = move(tokens, device) if whole_clips else None  # Table 12
        return move(inputs, device), move(hidden, device), move(targets, device), has_pad, whole

    def encode(self, inputs, hidden, targets, has_pad, whole):
        """One pass of the backbone -> summed loss, number of correct tokens, CLS (B, d).

        inputs: int64 (B, T, H, W). hidden: int64 (M,), positions in the flattened inputs. targets:
        int64 (M,), their codes. whole: the clips to contrast, or None for the inputs.
        """
        cls, features = self.backbone(inputs, has_pad)  # (B, d), (B, T, H, W, d)
        logits = self.predict_tokens(features, hidden)  # (M, V + 5)
        loss = F.cross_entropy(at_least_float32(logits), targets, reduction="sum")
        if whole is not None:
            cls, _ = self.backbone(whole, has_pad)
        correct = (logits.argmax(dim=-1) == targets).sum()
        return loss, correct, cls.clone()  # a view would keep all features in memory

    def predict_tokens(self, features, hidden):
        """Eq. 16, 17 at the hidden places (M,) of features (B, T, H, W, d) -> logits (M, V + 5)."""
        return self.token_head(features.flatten(0, 3)[hidden], self.backbone.embedding.weight)

    @classmethod
    def from_released(cls, path):
        """A model from a released checkpoint (classifier.pt), of any size and layout."""
        state = checkpoints.read_checkpoint(path)
        with released.reading(path):
            backbone = VideoTransformer.from_released(state)
            projection_head = ProjectionHead.from_released(state)
            token_head = TokenHead(backbone.config)
            token_head.load_released(state)
            if state:  # tensors that none of the three has popped
                raise UserError(f"this model has no place for {', '.join(sorted(state))}")
        model = cls(replace(backbone.config, layers=1), 1, 1)  # small: all of it is replaced
        model.backbone = backbone
        model.token_head, model.projection_head = token_head, projection_head
        return model

    @classmethod
    def load(cls, path):
        """A model from a pre-training checkpoint, ours or a released one."""
        content = checkpoints.read_checkpoint(path)
        if "transformer" not in content:
            return cls.from_released(path)
        settings = content["config"]
        if "projection_hidden" not in settings:
            raise UserError(f"{path} is a fine-tuned model: it has no token head any more")
        config = checkpoints.rebuilt(TransformerConfig, content["transformer"], path)
        model = cls(config, settings["projection_hidden"], settings["projection_layers"])
        checkpoints.load_weights(model, content["model"], path)
        return model


# ---------------------------------------------------------------- training


def compute_losses(config, vocab_size, device, model, clips, generator):
    """Masks, forward pass, Eq. 6, for a group of videos to contrast -> {name: scalar}.

    clips: int64 (n, 2, T, H, W). contrastive_loss is gamma * L_cl, as in the paper's tables.
    """
    batch = mask_clips(clips, vocab_size, config, generator)  # Eq. 2, 3
    whole_clips = config.contrast_on == "whole"
    with autocast(device, config.precision):
        l_mask, accuracy, l_cl = model(batch, config.gamma, config.micro_batch, whole_clips)
        contrastive = config.gamma * l_cl
        loss = config.mask_weight * l_mask + config.alpha * contrastive  # Eq. 6: mask_weight 1
    return {"loss": loss, "mask_loss": l_mask, "mask_accuracy": accuracy,
            "contrastive_loss": contrastive}


def train(config, model, store, device, labelled=None, tokenizer=None):
    """Pre-trains `model` on a TokenStore, in the folder config.out.

    labelled: folder of stores for the kNN accuracy. tokenizer: path of the store's tokenizer.
    """
    rank, world = rank_and_world()
    videos, _ = data.hold_out(len(store), config.held_out)
    steps, end = runs.schedule(config, len(videos), config.epochs, config.stop_after)
    groups = config.batch // config.contrast
    optimizer, scaler = runs.build_optimizer(model, config, BETAS, device)
    first = runs.begin(config, model, optimizer, scaler, store.header, steps)
    batches = data.Batches(videos, config.batch, end, first, config.seed, rank, world)
    loader = data.load(config.pairs(store), batches, config.workers)
    log = runs.Log(config, first, epoch=len(videos) / config.batch)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    losses_of = partial(compute_losses, config, store.header["vocab_size"], device)
    measure = partial(monitor.measure, model, partial(losses_of, model), config, store, labelled)
    done, stop = first, 0
    if first == 0:
        log.write(0, **measure())
    bar = progress(range(first, end), "pre-training", unit=" steps", show=rank == 0)
    with processes.stop_signals() as stopped:
        for step in bar:
            clips = next(loader)  # (groups * n, 2, T, H, W)
            processes.seed_all(config.seed, step, rank)  # dropout
            generator = torch.Generator().manual_seed(one_seed(config.seed, step))  # masks
            losses = []
            for i, group in enumerate(clips.chunk(groups)):  # videos to contrast with each other
                with processes.sync_gradients(wrapped, last=i + 1 == groups):
                    losses.append(losses_of(wrapped, group, generator))
                    scaler.scale(losses[-1]["loss"] / groups).backward()

            lr = runs.set_learning_rate(optimizer, config, step, steps)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            scaler.step(optimizer)  # skipped if a gradient is not finite
            scaler.update(None if config.precision == "fp16" else 1.0)  # else the scale stays 1
            optimizer.zero_grad(set_to_none=True)
            done, stop = step + 1, agree(stopped)
            log.add(losses, norm)
            if done == end or done % config.log_every == 0:
                bar.set_postfix_str(log.write_means(done, lr), refresh=False)
            if done == end or (done % config.knn_every == 0 and not stop):
                log.write(done, **measure())
            if log.may_save(done, end, stop):
                runs.save(config, model, optimizer, scaler, done, steps,
                          predict.origin(store, tokenizer))
            if stop:
                break
    log.close(done, end, steps, stop)


def try_out(config, model, device, videos):
    """A forward and backward pass that needs as much memory as any of so many videos.

    Clips of PAD alone go through the code for PAD; twice the usual number of tokens is hidden.
    """
    shape = model.backbone.config
    size = (2, videos, shape.frames, shape.height, shape.width)
    tokens = torch.full(size, shape.vocab_size + PAD)
    mask = torch.rand(size) < 2 * config.mask_ratio
    with autocast(device, config.precision):
        part = model.to_device(Batch(tokens, tokens, mask), config.contrast_on == "whole")
        loss, _, cls = model.encode(*part)
    (loss + cls.sum()).backward()


def main():
    config = parse(Config, sys.argv[1:], __doc__, PRESETS)
    if config.preset == "large256" and not (config.resume_from or config.init):
        raise UserError("--preset large256 is the second stage: give --resume-from or --init")
    processes.launch(config.gpus)
    device = processes.pick_device(config.device)
    config.device = device.type
    config.precision = processes.pick_precision(config.precision, device)
    if config.fill_in:
        return predict.fill_in(config, Vimpac.load(config.checkpoint).to(device))
    if config.features:
        return predict.save_features(config, load_backbone(config.checkpoint).to(device))
    for path in filter(None, (config.init, config.resume_from)):
        checkpoints.read_checkpoint(path)  # fails early on a bad path
    runs.check_folder(config)
    store, tokenizer, labelled = prepare(config, device)
    videos, _ = data.hold_out(len(store), config.held_out)
    n = runs.resolve_batch(config, len(videos), rank_and_world()[1])
    processes.seed_all(config.seed)
    shape = config.transformer(store.header["vocab_size"], store.height, store.width)
    model = Vimpac(shape, config.projection_hidden, config.projection_layers).to(device)
    if config.init:
        checkpoints.initialise(model, Vimpac.load(config.init), config.init, store.header)
    fit_to_device(config, model, n, device, try_out)
    say(f"{len(videos)} videos, {describe(model.backbone, device)}")
    train(config, model, store, device, labelled, tokenizer)
    processes.leave_group()
    monitor.report(config, model, store, tokenizer and load_tokenizer(tokenizer).to(device))


if __name__ == "__main__":
    run(main)
