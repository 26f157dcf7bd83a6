"""Script 2: pre-trained model + labels -> accuracy.

    python finetune.py                                     the toy model just made, on motion
    python finetune.py --labels appearance                 the toy's other task
    python finetune.py --from-scratch                      the same sizes, random weights, for comparison
    python finetune.py --checkpoint classifier.pt --dataset ucf101 --split 1 --data tokens/ucf101

--data is a folder of token stores, made by vqvae.py tokenize: train, test and, where choices are to be made, val; of
UCF101 and HMDB51 train1 and test1 to train3 and test3.

Shapes: n videos in this process's batch, T frames, H x W tokens a frame, d hidden size, C classes.
"""
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import data
import training
from training import option
from transformer import PAD, VideoTransformer, load_backbone, read_checkpoint


PAPER = dict(data="", lr=None, batch=128, warmup=0.1, weight_decay=0.01, labels="label", workers=4)
DATASETS = {  # Table 4; scratch_epochs: how many times the epochs without pre-training
    "toy": dict(),  # the defaults below
    "own": dict(PAPER, epochs=50.0, fps=2.0, scratch_epochs=4.0),  # any other: as for the small ones
    "ucf101": dict(PAPER, epochs=50.0, fps=2.0, scratch_epochs=4.0, split=1),
    "hmdb51": dict(PAPER, epochs=50.0, fps=4.0, scratch_epochs=4.0, split=1),
    "diving48": dict(PAPER, epochs=50.0, fps=4.0, scratch_epochs=4.0),
    "ssv2": dict(PAPER, epochs=22.0, fps=4.0, scratch_epochs=1.5),
    "kinetics400": dict(PAPER, epochs=30.0, fps=2.0, scratch_epochs=1.5),
}


@dataclass
class Config:
    dataset: str = option("toy", "whose training numbers of Table 4 to start from", choices=list(DATASETS))
    checkpoint: str = option("runs/toy/last.pt", "pre-trained or fine-tuned model, ours or a released one")
    from_scratch: bool = option(False, "take only the sizes from the checkpoint and start from random weights")
    data: str = option("datasets/toy/tokens", "folder with the token stores (default of a dataset: tokens/DATASET)")
    split: int = option(0, "1, 2 or 3 of UCF101 and HMDB51 (0: the stores are called train and test)")
    labels: str = option("motion", "label set to learn (the toy has motion, appearance and direction)")
    out: str = option("", "folder of the run (default: runs/finetune-LABELS, -scratch added where it is)")
    eval_only: bool = option(False, "test the checkpoint's own classifier, without training")
    eval_split: str = option("test", "which store to measure on: val to choose, test to report")
    resume: bool = option(False, "go on from the run's last checkpoint, where there is one")
    # the clips
    fps: float = option(2.67, "frames a second of a clip, taken from those stored")
    clips: int = option(10, "evenly spaced clips a video at test")
    # training (Table 4)
    epochs: float = option(24.0, "passes over the training videos")
    scratch_epochs: float = option(1.0, "how many times these with --from-scratch")
    steps: int = option(0, "optimizer steps (0: as many as the epochs need)")
    batch: int = option(16, "videos a step, over all processes")
    lr: float | None = option(None, "peak learning rate (default of the toy: 1e-3; of the others: 1e-4, 5e-5 for large)")
    warmup: float = option(0.1, "share of the steps in which the learning rate rises")
    weight_decay: float = option(0.01, "weight decay")
    dropout: float = option(0.1, "dropout of the transformer")
    clip: float = option(1.0, "largest gradient norm")
    seed: int = option(0, "random seed")
    # the machine
    gpus: int = option(1, "GPUs of this machine, a process each")
    device: str = option("auto", "device of each process", choices=["auto", "cuda", "mps", "cpu"])
    precision: str = option("auto", "number format of the matrix products", choices=["auto", "bf16", "fp16", "fp32"])
    compile: bool = option(False, "compile the layers with torch.compile (needs a C++ compiler on CPUs)")
    workers: int = option(0, "processes that load clips (0: the training process itself)")
    log_every: int = option(25, "steps between two lines of metrics")
    save_every: int = option(500, "steps between two checkpoints")

    def __post_init__(self):
        training.check_positive(self, "clips", "batch", "log_every", "save_every", "gpus")
        if self.from_scratch and self.eval_only:
            raise ValueError("--from-scratch --eval-only: there is nothing to test without training")
        if not 0 <= self.split <= 3:
            raise ValueError(f"--split {self.split}: UCF101 and HMDB51 have 1, 2 and 3")
        if self.fps <= 0:
            raise ValueError(f"--fps must be positive, not {self.fps}")
        if self.lr is None and self.dataset == "toy":  # the best on its validation split, also from scratch
            self.lr = 1e-3
        self.data = self.data or f"tokens/{self.dataset}"
        name = self.labels if self.dataset == "toy" else f"{self.dataset}{self.split or ''}"
        self.out = self.out or f"runs/finetune-{name}{'-scratch' * self.from_scratch}"

    def stride(self, store):
        """The step between a clip's frames, in stored frames."""
        return max(1, round(store.header["fps"] / self.fps))


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

    def load_classifier(self, path):
        """The classifier of a fine-tuned checkpoint, ours or a released one. Raises ValueError where it has none."""
        checkpoint = read_checkpoint(path)
        state = checkpoint.get("model", checkpoint)
        name = "classifier" if "classifier.weight" in state else "cls_fc"
        if f"{name}.weight" not in state:
            raise ValueError(f"{path} holds no classifier: fine-tune it first, without --eval-only")
        if state[f"{name}.weight"].shape != self.classifier.weight.shape:
            raise ValueError(f"{path} tells {len(state[f'{name}.weight'])} classes apart, "
                             f"the labels have {len(self.classifier.weight)}")
        self.classifier.load_state_dict({kind: state[f"{name}.{kind}"] for kind in ("weight", "bias")})


def pick_labels(stores, wanted):
    """The label set to use: the one asked for, or the only one there is. -> name, number of classes, their names."""
    sets = stores["train"].label_sets() if "train" in stores else next(iter(stores.values())).label_sets()
    name = sets[0] if len(sets) == 1 else wanted
    largest = max(int(store.labels(name).max()) for store in stores.values())
    names = next(iter(stores.values())).header["classes"] or {}
    names = names.get(name) or [str(i) for i in range(largest + 1)]
    if any(int(store.labels(name).min()) < 0 for store in stores.values()):
        raise ValueError(f"some videos of {', '.join(str(s.path) for s in stores.values())} have no label {name!r}")
    if largest >= len(names):
        raise ValueError(f"label {largest} of {name!r} is beyond its {len(names)} classes")
    return name, len(names), names


class TestVideos:
    """All evenly spaced clips of all views of a video -> int64 (views * clips, T, H, W), and its number."""

    def __init__(self, store, frames, stride, clips):
        self.store, self.frames, self.stride, self.clips = store, frames, stride, clips

    def __len__(self):
        return len(self.store)

    def __getitem__(self, video):
        return data.even_clips(self.store, video, self.frames, self.stride, self.clips), video


@torch.no_grad()
def evaluate(model, store, config, device, precision):
    """Softmax probabilities averaged over clips and views (App. of the paper) -> float32 (videos, C), on every process.

    Each process tests every world-th video, so every video counts exactly once.
    """
    rank, world = training.rank_and_world()
    model.eval()
    videos = TestVideos(store, model.backbone.config.frames, config.stride(store), config.clips)
    loader = DataLoader(videos, batch_size=max(1, 64 // (store.views * config.clips)),
                        sampler=range(rank, len(videos), world), num_workers=config.workers)
    result = torch.zeros(len(store), model.classifier.out_features, device=device)
    for clips, numbers in data.progress(loader, "testing", len(loader), " batches", show=rank == 0):
        with training.autocast(device, precision):
            logits = model(clips.flatten(0, 1).to(device))  # (videos * clips, C)
        p = logits.float().softmax(dim=-1).unflatten(0, clips.shape[:2]).mean(dim=1)  # (videos, C)
        result[numbers.to(device)] = p
    if world > 1:
        dist.all_reduce(result)
    return result


def draw_confusion(truth, predicted, names, path):
    """The confusion matrix, rows the truth, in percent of each row."""
    plt = training.plt
    matrix = np.zeros((len(names), len(names)))
    np.add.at(matrix, (truth, predicted), 1)
    matrix = 100 * matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    side = min(14, 2.5 + 0.4 * len(names))
    figure, axis = plt.subplots(figsize=(side + 1, side))
    picture = axis.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
    if len(names) <= 60:
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for i in range(len(names)):
            for j in range(len(names)):
                if matrix[i, j] >= 0.5:
                    axis.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=8,
                              color="white" if matrix[i, j] > 50 else "black")
    axis.set(xlabel="predicted", ylabel="truth")
    figure.colorbar(picture, label="% of the class", shrink=0.8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def train(config, model, store, labels, device, precision):
    """The whole of fine-tuning."""
    rank, world = training.rank_and_world()
    out, frames = Path(config.out), model.backbone.config.frames
    optimizer = training.make_optimizer(model, config.lr, config.weight_decay, (0.9, 0.999))
    epochs = config.epochs * (config.scratch_epochs if config.from_scratch else 1)
    steps = config.steps or max(1, int(epochs * len(store)) // config.batch)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    first = 0
    if last := training.last_checkpoint(out, config.resume):
        checkpoint = read_checkpoint(last)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        training.restore_scaler(scaler, checkpoint)
        first = checkpoint["step"]
        training.say(f"resumed {last} at step {first} of {steps}")
    with training.refusals():
        training.check_same(first, out)
    log = training.RunLog(out, config, resume_from=first)
    batches = data.Batches(len(store), config.batch, steps, first, config.seed, rank, world)
    loader = iter(DataLoader(data.RandomClips(store, labels, frames, config.stride(store), config.seed),
                             batch_sampler=batches, num_workers=config.workers))
    if config.compile:
        model.backbone.compile_layers()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    pad = store.header["vocab_size"] + PAD
    model.train()
    sums, count = torch.zeros(2, device=device), 0
    bar = data.progress(range(first, steps), "fine-tuning", steps - first, " steps", show=rank == 0)
    for step in bar:
        training.seed_all(config.seed, step, rank)
        lr = training.learning_rate(step, steps, config.lr, config.warmup)
        training.set_learning_rate(optimizer, lr)
        clips, truth = next(loader)  # (n, T, H, W), (n,)
        padded = bool((clips == pad).any())
        clips, truth = training.move(clips, device), training.move(truth, device)
        with training.autocast(device, precision):
            logits = wrapped(clips, padded).float()  # (n, C)
        loss = F.cross_entropy(logits, truth)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        sums += torch.stack([loss.detach(), (logits.argmax(dim=-1) == truth).float().mean()])
        done, count = step + 1, count + 1
        if done % config.log_every == 0 or done == steps:
            if world > 1:
                dist.all_reduce(sums)
            loss, accuracy = (sums / count / world).tolist()
            log.write(step=done, epoch=done * config.batch / len(store), loss=loss, train_accuracy=accuracy, lr=lr)
            bar.set_postfix_str(f"loss {loss:.3f} accuracy {100 * accuracy:.1f}%", refresh=False)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {done}: lower --lr")
            sums, count = torch.zeros_like(sums), 0
        if (done % config.save_every == 0 or done == steps) and rank == 0:
            training.save(out / "last.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                            "scaler": scaler.state_dict(), "step": done, "config": asdict(config),
                                            "transformer": asdict(model.backbone.config)})
    log.close()


def open_store(config, part):
    """The store of a part ("train", "test" or "val") of the split asked for; split 1 may also be called by the part."""
    folder = Path(config.data)
    numbered = folder / f"{part}{config.split or ''}"
    plain = config.split == 1 and not numbered.is_dir()
    return data.TokenStore(folder / part if plain else numbered)


def prepare(config, device):
    """Stores and model -> ({split: TokenStore}, label set, class names, Classifier)."""
    wanted = [config.eval_split] if config.eval_only else ["train", config.eval_split]
    stores = {split: open_store(config, split) for split in wanted}
    labels, classes, names = pick_labels(stores, config.labels)
    if not Path(config.checkpoint).is_file():
        raise FileNotFoundError(f"no checkpoint at {config.checkpoint} (python pretrain.py makes the toy one)")
    backbone = load_backbone(config.checkpoint)
    for split, store in stores.items():
        if store.header["vocab_size"] != backbone.config.vocab_size:
            raise ValueError(f"{store.path} holds {store.header['vocab_size']} codes, "
                             f"the model of {config.checkpoint} knows {backbone.config.vocab_size}")
    shape = replace(backbone.config, dropout=config.dropout)
    training.seed_all(config.seed)
    if config.from_scratch:
        backbone = VideoTransformer(shape)
    fresh = VideoTransformer(shape)
    fresh.load_state_dict(backbone.state_dict())
    store = stores[config.eval_split]
    model = Classifier(fresh.resize(shape.frames, store.height, store.width), classes)
    if config.eval_only:
        model.load_classifier(config.checkpoint)
    if config.lr is None:
        config.lr = 5e-5 if shape.dim >= 1024 else 1e-4
    return stores, labels, names, model.to(device)


def main():
    config = training.parse(Config, sys.argv[1:], __doc__, DATASETS, chosen_by="dataset")
    with training.refusals():
        training.launch(config.gpus)
        device = training.pick_device(config.device)
        precision = training.pick_precision(config.precision, device)
        stores, labels, names, model = prepare(config, device)
        world = training.rank_and_world()[1]
        if "train" in stores:
            config.batch = min(config.batch, len(stores["train"]) // world * world)
        if config.batch % world or config.batch < 1:
            raise ValueError(f"--batch {config.batch}: it must be a multiple of the {world} processes")
    if not config.eval_only:
        train(config, model, stores["train"], labels, device, precision)
    store = stores[config.eval_split]
    with torch.compiler.set_stance("force_eager"):  # not worth a compilation for each of its shapes
        p = evaluate(model, store, config, device, precision)
    training.leave_group()
    truth = torch.tensor(store.labels(labels), dtype=torch.long, device=device)
    best = p.topk(min(5, len(names)), dim=1).indices  # (videos, 5)
    right = best == truth[:, None]
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    draw_confusion(truth.cpu().numpy(), best[:, 0].cpu().numpy(), names, out / "confusion.png")
    if not config.eval_only:
        training.draw_curves(out, {"loss": {"loss": "loss"}, "training accuracy": {"accuracy": "train_accuracy"}})
    print(f"{out}: {'' if config.eval_only else 'last.pt, metrics.jsonl, curves.png, '}confusion.png")
    print(f"top-1 {100 * right[:, 0].float().mean():.1f}%  top-5 {100 * right.any(dim=1).float().mean():.1f}%  "
          f"({len(store)} videos x {config.clips * store.views} views)")


if __name__ == "__main__":
    main()
