"""Fine-tunes a pre-trained model on labelled videos, and tests it.

    python finetune.py                                     the toy model just made, on motion
    python finetune.py --labels shape --from-scratch       another task; random weights
    python finetune.py --freeze-backbone                   a linear probe of the frozen features
    python finetune.py --videos DIR --checkpoint runs/mine/last.pt      labelled videos
    python finetune.py --checkpoint classifier.pt --dataset ucf101 --split 1 --data tokens/ucf101
    python finetune.py --checkpoint classifier.pt --dataset ucf101-results
    python finetune.py --predict DIR --csv classes.csv

--videos is a folder with a folder for each class, or with train/ and test/ of such folders, or with
train.txt and test.txt of lines `relative/path.mp4 label`; val is optional. Without a test split, a
fifth of each class is set apart.
--data is a folder of token stores, made by vqvae.py tokenize: train, test and, to choose the best
checkpoint, val; of UCF101 and HMDB51 train1 and test1 to train3 and test3.

Shapes: n videos of a batch on this process, T frames, H x W tokens a frame, d hidden size,
C classes.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import predict
from plumbing import checkpoints, datasets, processes, runs
from plumbing.cli import UserError, option, parse, progress, run
from plumbing.fitting import describe, fit_to_device
from plumbing.processes import agree, autocast, move, rank_and_world, say
from plumbing.results import report
from plumbing.tokens import PAD
from prepare import open_stores, pick_labels, tokenise_labelled
from probe import probe_videos
from transformer import VideoTransformer, load_backbone

PAPER = dict(data="", batch=128, labels="label", workers=4, val_every=1000)
PRESETS = {
    "toy": {},  # the defaults below
    "own": dict(data="", labels="label", epochs=50.0, workers=4)}  # small batches: few videos
TUNED = {name: entry for name, entry in datasets.DATASETS.items() if entry.epochs}
PRESETS |= {name: dict(PAPER, epochs=entry.epochs, scratch_epochs=entry.scratch_epochs, clips=2,
                       fps=entry.analysis_fps, split=int("train1" in entry.splits))
            for name, entry in TUNED.items()}  # the analyses: T = 5, S = 128
PRESETS |= {f"{name}-results": dict(PRESETS[name], frames=10, fps=entry.results_fps, clips=10)
            for name, entry in TUNED.items()}  # Table 1: large, T = 10, S = 256
BETAS = (0.9, 0.999)  # of Adam, Table 4


@dataclass
class Config(runs.RunSettings):
    dataset: str = option("toy", "recipe of Table 4: for the analyses or, -results, for Table 1",
                          list(PRESETS), group="model and labels")
    checkpoint: str = option("", "pre-trained or fine-tuned model, ours or a released one")
    from_scratch: bool = option(False, "random weights, with the sizes of the checkpoint")
    freeze_backbone: bool = option(False, "linear probe: train a classifier of frozen features")
    videos: str = option("", "folder of labelled videos (default: the toy world)")
    data: str = option("datasets/toy/tokens", "token stores (of --videos: beside the checkpoint)")
    split: int = option(0, "1, 2 or 3 of UCF101 and HMDB51 (0: train and test)", least=0, most=3)
    labels: str = option("motion", "label set (the toy: motion, scene, shape, colour)")
    num_labels: int = option(0, "train on so many videos, in class proportion (0: all)", least=0)
    out: str = option("", "folder of the run (default: runs/finetune-LABELS or -DATASET)")
    eval_only: bool = option(False, "test the checkpoint's own classifier, without training")
    eval_split: str = option("test", "split to measure on: val to choose settings, test to report")
    predict: tuple = option((), "classify these videos or folders with a fine-tuned checkpoint")
    csv: str = option("", "write the classes of --predict to this file")
    draw: bool = option(False, "draw a picture of each video of --predict")
    tokenizer: str = option("", "tokenizer of --videos and --predict (default: the checkpoint's)")
    frames: int = option(0, "frames of a clip, T (0: those of the checkpoint)", least=0, most=1000,
                         group="clips")
    fps: float = option(0.0, "frames a second of a clip (0: as in pre-training)", least=0,
                        most=1000)
    clips: int = option(10, "evenly spaced clips a video at test", least=1, most=1000)
    epochs: float = option(12.0, "passes over the training videos", least=0, group="training")
    scratch_epochs: float = option(4.0, "how many times as long --from-scratch trains", above=0)
    batch: int = option(16, "videos a step, over all processes", least=1)
    lr: float | None = option(None, "peak learning rate (default: by the model's width)", above=0)
    weight_decay: float = option(0.01, "weight decay", least=0)
    workers: int = option(0, "processes that load clips", least=0, most=512)
    log_every: int = option(25, "steps between two lines of metrics", least=1)
    val_every: int = option(100, "steps between two measurements on val, if it exists", least=1)

    def __post_init__(self):
        if self.from_scratch and self.eval_only:
            raise UserError("--from-scratch --eval-only: there is nothing to test without training")
        if self.videos and self.dataset != "own":
            raise UserError(f"--videos is for --dataset own, not {self.dataset}")
        if self.freeze_backbone and (self.eval_only or self.predict):
            raise UserError("--freeze-backbone goes with neither --eval-only nor --predict")
        if not self.predict and (self.csv or self.draw):
            raise UserError("--csv and --draw are for --predict")
        name = self.labels
        if self.dataset != "toy":
            name = f"{self.dataset}-split{self.split}" if self.split else self.dataset
        kind = "probe" if self.freeze_backbone else "eval" if self.eval_only else "finetune"
        usual = f"runs/{kind}-{name}{'-scratch' if self.from_scratch else ''}"
        if not self.checkpoint:
            best = "best" if Path(usual, "best.pt").is_file() else "last"
            self.checkpoint = f"{usual}/{best}.pt" if self.predict else "runs/toy/last.pt"
        if not self.out:
            self.out = str(Path(self.checkpoint).parent) if self.predict else usual
        beside = str(Path(self.checkpoint).parent / "tokens")
        self.data = self.data or (beside if self.videos else f"tokens/{self.dataset}")


# ---------------------------------------------------------------- the model


class Classifier(nn.Module):
    """The backbone and a Linear on CLS, which starts at 0: tokens (n, T, H, W) -> logits (n, C)."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.config.dim, classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens, has_pad=None):
        cls, _ = self.backbone(tokens, has_pad)  # (n, d)
        return self.classifier(cls)


def load_classifier(path):
    """The classifier of a fine-tuned checkpoint -> {"weight": (C, d), "bias": (C,)}."""
    checkpoint = checkpoints.read_checkpoint(path)
    state = checkpoint.get("model", checkpoint)
    for name in ("classifier", "cls_fc"):  # ours, the released ones
        if f"{name}.weight" in state:
            return {kind: state[f"{name}.{kind}"] for kind in ("weight", "bias")}
    raise UserError(f"{path} holds no classifier: fine-tune it first, without --eval-only or "
                    f"--predict")


def build(config, backbone, stores, classes):
    """The classifier for stores of tokens, {split: TokenStore}. Sets what config leaves open.

    backbone: that of config.checkpoint, which is resized to the clips of config.
    """
    processes.seed_all(config.seed)
    store, before = stores[config.eval_split], backbone.config
    config.fps = config.fps or predict.clip_fps(config.checkpoint)
    if config.lr is None:  # Table 4; of narrow models the best on the toy's validation split
        narrow = before.dim < 512 and config.dataset in ("toy", "own")
        config.lr = 5e-5 if before.dim >= 1024 else 1e-3 if narrow else 1e-4
    after = backbone.resize(config.frames or before.frames, store.height, store.width).config
    if before != after:
        say(f"interpolated the positions from {before.frames} x {before.height} x {before.width} "
            f"tokens a clip to {after.frames} x {after.height} x {after.width}")
    learnt = checkpoints.read_checkpoint(config.checkpoint).get("tokens", {})
    for store in stores.values():
        if store.header["vocab_size"] != after.vocab_size:
            raise UserError(f"{store.path} holds {store.header['vocab_size']} codes, the model of "
                            f"{config.checkpoint} has {after.vocab_size}")
        checkpoints.check_tokenizer(config.checkpoint, learnt, store.header)
    if config.from_scratch:
        backbone = VideoTransformer(after)
    model = Classifier(backbone, classes)
    if config.eval_only:
        checkpoints.load_weights(model.classifier, load_classifier(config.checkpoint),
                                 config.checkpoint)
    return model


# ---------------------------------------------------------------- training


def forward_backward(config, model, scaler, clips, classes, pad):
    """Both passes of a batch, a micro-batch at a time -> {"loss", "train_accuracy": scalar}.

    clips: int64 (n, T, H, W). classes: int64 (n,). pad: the id of PAD.
    """
    n, size, means, device = len(clips), config.micro_batch, [], next(model.parameters()).device
    for i in range(0, n, size):
        part, truth = clips[i:i + size], move(classes[i:i + size], device)
        has_pad = bool((part == pad).any())
        with processes.sync_gradients(model, last=i + size >= n):
            with autocast(device, config.precision):
                logits = model(move(part, device), has_pad).float()  # (size, C)
            loss = F.cross_entropy(logits, truth, reduction="sum") / n
            scaler.scale(loss).backward()
        accuracy = (logits.argmax(dim=-1) == truth).sum() / n
        means.append(torch.stack([loss.detach(), accuracy]))
    return dict(zip(("loss", "train_accuracy"), sum(means)))


def train(config, model, store, labels, device, origin, val=None):
    """Fine-tunes `model` on a label set of a TokenStore. origin: see `predict.origin`.

    val: a TokenStore to choose the best checkpoint by, best.pt, whose weights `model` ends with.
    Returns its step, or None without val.
    """
    (rank, world), shape = rank_and_world(), model.backbone.config
    videos = data.few_labels(store.labels(labels), config.num_labels, config.seed)
    epochs = config.epochs * (config.scratch_epochs if config.from_scratch else 1)
    steps, end = runs.schedule(config, len(videos), epochs)
    optimizer, scaler = runs.build_optimizer(model, config, BETAS, device)
    first = runs.begin(config, model, optimizer, scaler, store.header, steps)
    stride = data.stride_for(store, config.fps)
    samples = data.RandomClips(store, labels, shape.frames, stride, config.seed)
    batches = data.Batches(videos, config.batch, end, first, config.seed, rank, world)
    loader = data.load(samples, batches, config.workers)
    log = runs.Log(config, first, len(videos) / config.batch, "finetune")
    wrapped = DistributedDataParallel(model) if world > 1 else model
    model.train()
    done, stop = first, 0
    bar = progress(range(first, end), "fine-tuning", unit=" steps", show=rank == 0)
    with processes.stop_signals() as stopped:
        for step in bar:
            clips, classes = next(loader)  # (n, T, H, W), (n,)
            processes.seed_all(config.seed, step, rank)  # dropout
            terms = forward_backward(config, wrapped, scaler, clips, classes,
                                     shape.vocab_size + PAD)
            lr = runs.set_learning_rate(optimizer, config, step, steps)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            scaler.step(optimizer)  # skipped if a gradient is not finite
            scaler.update(None if config.precision == "fp16" else 1.0)
            optimizer.zero_grad(set_to_none=True)

            done, stop = step + 1, agree(stopped)
            log.add([terms], norm)
            if done == end or done % config.log_every == 0:
                bar.set_postfix_str(log.write_means(done, lr), refresh=False)
            if val and (done == end or (done % config.val_every == 0 and not stop)):
                log.write(done, val_accuracy=validate(model, val, labels, config, device))
                if runs.last_is_best(config.out, "val_accuracy"):
                    runs.save(config, model, optimizer, scaler, done, steps, origin, "best.pt")
            if log.may_save(done, end, stop):
                runs.save(config, model, optimizer, scaler, done, steps, origin)
            if stop:
                break
    log.close(done, end, steps, stop)
    return checkpoints.load_best(model, Path(config.out) / "best.pt") if val else None


def resolve_batch(config, videos, world):
    """Sets config.batch to at most `videos` -> how many each process has.

    Raises UserError unless the processes have the same number.
    """
    config.batch = min(config.batch, videos // world * world)
    if config.batch < 1 or config.batch % world:
        raise UserError(f"--batch {config.batch} must be a multiple of the {world} processes")
    return config.batch // world


def try_out(config, model, device, videos):
    """Both passes of one micro-batch, with PAD."""
    shape = model.backbone.config
    size = (videos, shape.frames, shape.height, shape.width)
    clips = torch.full(size, shape.vocab_size + PAD, device=device)
    with autocast(device, config.precision):
        logits = model(clips, has_pad=True)
    logits.sum().backward()


# ---------------------------------------------------------------- test


@torch.no_grad()
def evaluate(model, store, config, device, count=None, show=True):
    """Softmax probabilities, the mean over clips and views -> float32 (videos, C) on every process.

    Each process tests every world-th video, so that each video counts exactly once.
    count: clips of each view (default: config.clips).
    """
    model.eval()
    stride, count = data.stride_for(store, config.fps), count or config.clips
    clips = data.EvenClips(store, model.backbone.config.frames, stride, count)
    at_once = max(1, 64 // (store.views * count))  # videos
    batches = data.share(len(store), at_once)
    loader = data.load(clips, [numbers.tolist() for numbers in batches], config.workers)
    bar = progress(loader, "testing", len(batches), " batches",
                   show and rank_and_world()[0] == 0)
    p = torch.zeros(len(store), model.classifier.out_features, device=device)
    for numbers, batch in zip(batches, bar):
        parts = batch.flatten(0, 1).split(4 * config.micro_batch or 64)
        with autocast(device, config.precision):
            logits = torch.cat([model(part.to(device)) for part in parts])  # (videos * clips, C)
        of_clips = logits.float().softmax(dim=-1).unflatten(0, batch.shape[:2])
        p[numbers] = of_clips.mean(dim=1)
    return processes.sum_over_all(p)


def validate(model, store, labels, config, device):
    """Top-1 accuracy of the middle clip of each view, in the middle of training -> float."""
    with torch.compiler.set_stance("force_eager"):  # other shapes: not worth a compilation
        p = evaluate(model, store, config, device, count=1, show=False)
    model.train()
    truth = torch.as_tensor(store.labels(labels), dtype=torch.long, device=device)
    return (p.argmax(dim=1) == truth).float().mean().item()


# ---------------------------------------------------------------- the command


def predict_videos(config, device):
    classifier = load_classifier(config.checkpoint)
    model = Classifier(load_backbone(config.checkpoint), len(classifier["weight"]))
    checkpoints.load_weights(model.classifier, classifier, config.checkpoint)
    predict.predict(config, model.to(device))


def main():
    argv = sys.argv[1:]
    usual = "own" if any(word.split("=")[0] == "--videos" for word in argv) else "toy"
    config = parse(Config, argv, __doc__, PRESETS, chosen_by="dataset", usual=usual)
    processes.launch(config.gpus)
    device = processes.pick_device(config.device)
    config.device = device.type
    config.precision = processes.pick_precision(config.precision, device)
    if config.predict:
        return predict_videos(config, device)
    if not config.eval_only:
        runs.check_folder(config)
    backbone = load_backbone(config.checkpoint, dropout=config.dropout)
    if config.videos:
        tokenise_labelled(config, backbone, device)
    stores, val = open_stores(config)
    learnt = checkpoints.read_checkpoint(config.checkpoint).get("tokens", {})
    labels, names = pick_labels({**stores, **({"val": val} if val else {})}, config.labels,
                                learnt.get("classes") if config.eval_only else None)
    model = build(config, backbone, stores, len(names)).to(device)
    store, more = stores[config.eval_split], {}
    if not config.eval_only:
        videos = len(data.few_labels(stores["train"].labels(labels), config.num_labels))
        say(f"{videos} videos, {describe(model.backbone, device)}")
        more["training_videos"] = videos
    if config.freeze_backbone:
        runs.claim_folder(config)
        p = probe_videos(config, model.backbone, stores, labels, len(names))  # (videos, C)
    else:
        if not config.eval_only:
            n = resolve_batch(config, videos, rank_and_world()[1])
            fit_to_device(config, model, n, device, try_out)
            origin = predict.origin(store, config.tokenizer or learnt.get("tokenizer"),
                                    labels=labels, classes=names)
            more["best_step"] = train(config, model, stores["train"], labels, device, origin, val)
        p = evaluate(model, store, config, device).cpu()  # (videos, C)
    processes.leave_group()
    report(config, store, p, labels, names, more)


if __name__ == "__main__":
    run(main)
