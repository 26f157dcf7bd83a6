"""Script 2: pre-trained model + labels -> accuracy.

    python finetune.py                                     the toy model just made, on motion
    python finetune.py --labels appearance                 the toy's other task
    python finetune.py --from-scratch                      the same sizes, random weights, for comparison
    python finetune.py --checkpoint classifier.pt --dataset ucf101 --split 1 --data tokens/ucf101
    python finetune.py --checkpoint classifier.pt --dataset ucf101-results --data tokens/ucf101-256
    python finetune.py --predict VIDEO ... --checkpoint runs/finetune-motion/last.pt      the classes of any videos

--data is a folder of token stores, made by vqvae.py tokenize: train, test and, where choices are to be made, val; of
UCF101 and HMDB51 train1 and test1 to train3 and test3.

Shapes: n videos in this process's batch, T frames, H x W tokens a frame, d hidden size, C classes.
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import data
import predict
from plumbing import checkpoints, processes, runs
from plumbing.cli import UserError, option, parse, progress, run
from plumbing.decoding import cores
from plumbing.files import lock
from plumbing.fitting import fit, memory_explained, slices
from plumbing.pictures import draw_confusion, draw_curves
from plumbing.processes import move, rank_and_world, say, seed_all
from plumbing.store import check_alike
from plumbing.tokens import PAD
from transformer import VideoTransformer, load_backbone

PAPER = dict(data="", lr=None, batch=128, warmup=0.1, weight_decay=0.01, labels="label", workers=4)
DATASETS = {  # Table 4, and the released frame rates; scratch_epochs: how many times the epochs without pre-training
    "toy": {},  # the defaults below
    "own": dict(PAPER, epochs=50.0, fps=2.0, scratch_epochs=4.0),  # any other: as for the small ones
    "ucf101": dict(PAPER, epochs=50.0, fps=2.0, scratch_epochs=4.0, split=1, clips=2),  # the analyses: at S = 128
    "hmdb51": dict(PAPER, epochs=50.0, fps=4.0, scratch_epochs=4.0, split=1, clips=2),
    "diving48": dict(PAPER, epochs=50.0, fps=4.0, scratch_epochs=4.0, clips=2),
    "ssv2": dict(PAPER, epochs=22.0, fps=4.0, scratch_epochs=1.5, clips=2),
    "kinetics400": dict(PAPER, epochs=30.0, fps=2.0, scratch_epochs=1.5, clips=2)}
DATASETS |= {f"{name}-results": dict(DATASETS[name], frames=10, fps=4.0, clips=10)  # Table 1: large, at S = 256
             for name in ("ucf101", "hmdb51", "diving48", "ssv2", "kinetics400")}
BETAS = (0.9, 0.999)  # of Adam, Table 4


@dataclass
class Config(runs.RunSettings):
    dataset: str = option("toy", "Table 4's numbers for a dataset: of the analyses or, -results, of Table 1",
                          choices=list(DATASETS))
    checkpoint: str = option("", "pre-trained or fine-tuned model, ours or a released one")
    predict: tuple = option((), "video files whose classes a fine-tuned checkpoint is to tell, with its own settings")
    tokenizer: str = option("", "tokenizer of --predict's videos (default: the one that the checkpoint knows)")
    from_scratch: bool = option(False, "take only the sizes from the checkpoint and start from random weights")
    data: str = option("datasets/toy/tokens", "folder with the token stores, of another dataset tokens/DATASET")
    split: int = option(0, "1, 2 or 3 of UCF101 and HMDB51 (0: the stores are called train and test)", least=0, most=3)
    labels: str = option("motion", "label set to learn (the toy has motion, appearance and direction)")
    few: int = option(0, "train on so many videos, of each class its share (0: on all)", least=0)
    out: str = option("", "folder of the run, named after labels or dataset, and -scratch where it is")
    eval_only: bool = option(False, "test the checkpoint's own classifier, without training")
    eval_split: str = option("test", "which store to measure on: val to choose, test to report")
    # the clips
    frames: int = option(0, "frames of a clip, T (0: as many as the checkpoint's; else its positions are interpolated)",
                         least=0, most=1000)
    fps: float = option(2.67, "frames a second of a clip, taken from those stored", above=0, most=1000)
    clips: int = option(10, "evenly spaced clips a video at test", least=1, most=1000)
    # training (Table 4)
    epochs: float = option(24.0, "passes over the training videos", least=0)
    scratch_epochs: float = option(4.0, "how many times these with --from-scratch", above=0)
    batch: int = option(16, "videos a step, over all processes", least=1)
    lr: float | None = option(None, "peak learning rate (of the paper's datasets: 1e-4, for large 5e-5)", above=0)
    weight_decay: float = option(0.01, "weight decay", least=0)
    workers: int = option(0, "processes that load clips (0: the training process itself)", least=0, most=512)
    log_every: int = option(25, "steps between two lines of metrics", least=1)

    def __post_init__(self):
        if self.from_scratch and self.eval_only:
            raise UserError("--from-scratch --eval-only: there is nothing to test without training")
        if self.lr is None and self.dataset == "toy":  # the best on its validation split, pre-trained
            self.lr = 1e-3
        self.data = self.data or f"tokens/{self.dataset}"
        name = self.labels if self.dataset == "toy" else self.dataset + f"-split{self.split}" * (self.split > 0)
        usual = f"runs/finetune-{name}{'-scratch' * self.from_scratch}"
        self.checkpoint = self.checkpoint or (f"{usual}/last.pt" if self.predict else "runs/toy/last.pt")
        self.out = self.out or (str(Path(self.checkpoint).parent) if self.predict else usual)
        tests = self.eval_only or self.predict
        if Path(self.checkpoint).resolve().parent == Path(self.out).resolve() and not (self.resume or tests):
            raise UserError(f"--checkpoint {self.checkpoint}: give the new run a folder of its own with --out")


class Classifier(nn.Module):
    """The backbone and one Linear on CLS that starts at 0: tokens (n, T, H, W) -> logits (n, C)."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.config.dim, classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens, padded=None):
        return self.classifier(self.backbone(tokens, padded)[0])


def trained_classifier(path):
    """The classifier of a fine-tuned checkpoint, ours or a released one -> {"weight": (C, d), "bias": (C,)}."""
    checkpoint = checkpoints.read_checkpoint(path)
    state = checkpoint.get("model", checkpoint)
    name = "classifier" if "classifier.weight" in state else "cls_fc"
    if f"{name}.weight" not in state:
        raise UserError(f"{path} holds no classifier: fine-tune it first, without --eval-only or --predict")
    return {kind: state[f"{name}.{kind}"] for kind in ("weight", "bias") if f"{name}.{kind}" in state}


def pick_labels(stores, wanted):
    """The label set to use: the one asked for; where only the default is, the only one there is
    -> name, number of classes, their names."""
    first = next(iter(stores.values()))
    sets = first.label_sets()
    name = sets[0] if len(sets) == 1 and wanted in ("label", "motion") else wanted
    largest = max(int(store.labels(name).max()) for store in stores.values())
    names = (first.header["classes"] or {}).get(name) or [str(i) for i in range(largest + 1)]
    if any(int(store.labels(name).min()) < 0 for store in stores.values()):
        raise UserError(f"some videos of {', '.join(str(s.path) for s in stores.values())} have no label {name!r}")
    if largest >= len(names):
        raise UserError(f"label {largest} of {name!r} is beyond its {len(names)} classes")
    return name, len(names), names


@torch.no_grad()
def evaluate(model, store, config, device, precision):
    """Softmax probabilities averaged over clips and views -> float32 (videos, C), on every process.

    Each process tests every world-th video, so every video counts exactly once.
    """
    rank, world = rank_and_world()
    model.eval()
    clips = data.EvenClips(store, model.backbone.config.frames, data.stride_for(store, config.fps), config.clips)
    own = processes.share(range(len(store)), rank, world)
    at_once = max(1, 64 // (store.views * config.clips))  # videos
    loader = DataLoader(clips, batch_size=at_once, sampler=own, num_workers=min(config.workers, cores()))
    result = torch.zeros(len(store), model.classifier.out_features, device=device)
    for i, batch in enumerate(progress(loader, "testing", len(loader), " batches", show=rank == 0)):
        with processes.autocast(device, precision):
            parts = batch.flatten(0, 1).to(device).split(4 * config.micro_batch or 64)
            logits = torch.cat([model(part) for part in parts])  # (videos * clips, C)
        p = logits.float().softmax(dim=-1).unflatten(0, batch.shape[:2]).mean(dim=1)  # (videos, C)
        result[list(own[i * at_once:(i + 1) * at_once])] = p
    return processes.sum_over_all(result)


def update(model, config, clips, truth, pad, optimizer, precision, step):
    """One optimizer step on clips int64 (n, T, H, W) and their classes (n,), a micro-batch after the other -> loss and
    accuracy, the learning rate. pad: the id of PAD."""
    seed_all(config.seed, step, rank_and_world()[0])
    device, found = next(model.parameters()).device, []
    for part in slices(0, len(clips), config.micro_batch):
        with processes.exchanging(model, part.stop == len(clips)):
            with processes.autocast(device, precision):
                logits = model(move(clips[part], device), bool((clips[part] == pad).any())).float()  # (n, C)
            classes = move(truth[part], device)
            loss = F.cross_entropy(logits, classes, reduction="sum") / len(clips)
            optimizer.backward(loss)
        found.append((loss.detach(), (logits.argmax(dim=-1) == classes).sum() / len(clips)))
    loss, accuracy = (sum(values) for values in zip(*found))
    return {"loss": loss, "train_accuracy": accuracy}, optimizer.step(step)


def try_out(model, precision, videos):
    """Forward and backward with so many clips at a time, as if some were PAD: what takes most."""
    shape, device = model.backbone.config, model.backbone.cls.device
    clips = torch.zeros(videos, shape.frames, shape.height, shape.width, dtype=torch.long, device=device)
    with torch.compiler.set_stance("force_eager"), processes.autocast(device, precision):
        logits = model(clips, True)
    (0 * logits.sum()).backward()


def train(config, model, store, labels, device, tokens=None):
    """The whole of fine-tuning, from config.out/last.pt on where --resume asks for it. tokens: `predict.origin`."""
    (rank, world), precision = rank_and_world(), processes.pick_precision(config.precision, device)
    videos = data.few_labels(store.labels(labels), config.few, config.seed)
    epochs = config.epochs * (config.scratch_epochs if config.from_scratch else 1)
    model.train()
    memory = fit(config, model, config.batch // world, device, partial(try_out, model, precision))
    shape = model.backbone.config
    say(f"{len(videos)} videos, {shape.frames} x {shape.height} x {shape.width} tokens a clip, on {world} x "
        f"{processes.device_name(device)}: {config.micro_batch} clips at a time{memory}")
    training = runs.Run(config, model, len(videos), epochs, BETAS, device, tokens or predict.origin(store))
    samples = data.RandomClips(store, labels, shape.frames, data.stride_for(store, config.fps), config.seed)
    batches = data.Batches(videos, config.batch, training.steps, training.first, config.seed, rank, world)
    loader = iter(DataLoader(samples, batch_sampler=batches, num_workers=min(config.workers, cores())))
    pad = store.header["vocab_size"] + PAD
    for step in training.each_step("fine-tuning"):
        clips, truth = next(loader)  # (n, T, H, W), (n,)
        with memory_explained(config):
            found, lr = update(training.wrapped, config, clips, truth, pad, training.optimizer, precision, step)
        training.record(step, found, lr, "loss {loss:.3f} accuracy {train_accuracy:.1%}")


def prepare(config, device):
    """Stores and model -> ({split: TokenStore}, label set, class names, Classifier, how the tokens were made)."""
    splits = [config.eval_split] if config.eval_only else ["train", config.eval_split]
    stores = {split: data.open_store(config.data, f"{split}{config.split or ''}", *[split] * (config.split == 1))
              for split in splits}  # split 1 may also be called by its part alone
    check_alike(*stores.values())
    labels, classes, names = pick_labels(stores, config.labels)
    seed_all(config.seed)
    store, backbone = stores[config.eval_split], load_backbone(config.checkpoint, dropout=config.dropout)
    before = backbone.config
    after = backbone.resize(config.frames or before.frames, store.height, store.width).config
    if before != after:
        say(f"interpolated the positions from {before.frames} x {before.height} x {before.width} tokens a clip to "
            f"{after.frames} x {after.height} x {after.width}")
    if config.from_scratch:
        backbone = VideoTransformer(backbone.config)
    backbone.recompute = config.recompute
    known = checkpoints.read_checkpoint(config.checkpoint).get("tokens", {})
    for store in stores.values():
        if store.header["vocab_size"] != backbone.config.vocab_size:
            raise UserError(f"{store.path} holds {store.header['vocab_size']} codes, "
                            f"the model of {config.checkpoint} knows {backbone.config.vocab_size}")
        checkpoints.same_tokenizer(config.checkpoint, known, store.header, store.path)
    model = Classifier(backbone, classes)
    if config.eval_only:
        trained = trained_classifier(config.checkpoint)
        if len(trained["weight"]) != classes:
            raise UserError(f"{config.checkpoint} tells {len(trained['weight'])} classes apart, "
                            f"the labels have {classes}")
        checkpoints.load_weights(model.classifier, trained, config.checkpoint)
    if config.lr is None:
        config.lr = 5e-5 if backbone.config.dim >= 1024 else 1e-4
    first, last = stores[splits[0]], stores[config.eval_split]
    same_root = first is not last and first.header["root"] == last.header["root"]
    if same_root and (both := len(first.names() & last.names())):
        say(f"{both} of the {len(last)} videos to test on are trained on, too")
    tokens = predict.origin(last, known.get("tokenizer", ""), labels=labels, classes=names)
    return stores, labels, names, model.to(device), tokens


def predict_videos(config, device, precision):
    """The whole of --predict."""
    trained = trained_classifier(config.checkpoint)
    model = Classifier(load_backbone(config.checkpoint), len(trained["weight"]))
    checkpoints.load_weights(model.classifier, trained, config.checkpoint)
    predict.classify(config, model.to(device), precision)


def main():
    config = parse(Config, sys.argv[1:], __doc__, DATASETS, chosen_by="dataset")
    processes.launch(config.gpus)
    device = processes.pick_device(config.device)
    precision = processes.pick_precision(config.precision, device)
    if config.predict:
        return predict_videos(config, device, precision)
    stores, labels, names, model, tokens = prepare(config, device)
    world = rank_and_world()[1]
    if not config.eval_only:
        videos = min(config.few or len(stores["train"]), len(stores["train"]))
        config.batch = min(config.batch, videos // world * world)
        if config.batch % world or config.batch < 1:
            raise UserError(f"--batch {config.batch}: it must be a multiple of the {world} processes")
        processes.by_first(lock, config.out)
        train(config, model, stores["train"], labels, device, tokens)
    store = stores[config.eval_split]
    with torch.compiler.set_stance("force_eager"), memory_explained(config):  # not worth compiling for each shape
        p = evaluate(model, store, config, device, precision).cpu()  # (videos, C)
    processes.leave_group()
    report(config, store, p, labels, names)


def report(config, store, p, labels, names):
    """The pictures and the last lines of a run. p: probabilities (videos, C)."""
    truth = torch.tensor(store.labels(labels), dtype=torch.long)
    best = p.topk(min(5, len(names)), dim=1).indices  # (videos, 5)
    right = best == truth[:, None]
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    draw_confusion(truth.numpy(), best[:, 0].numpy(), names, out / "confusion.png")
    if not config.eval_only:
        draw_curves(out, {"loss": {"loss": "loss"}, "training accuracy": {"accuracy": "train_accuracy"}})
    print(f"{out}: {'' if config.eval_only else 'last.pt, metrics.jsonl, curves.png, '}confusion.png")
    print(f"top-1 {100 * right[:, 0].float().mean():.1f}%  top-5 {100 * right.any(dim=1).float().mean():.1f}%  "
          f"({len(store)} videos x {config.clips * store.views} views)")


if __name__ == "__main__":
    run(main)
