"""Pixels -> tokens: a VQ-VAE with 8x down-sampling. Trains one, and tokenises videos with one.

    python vqvae.py train --videos DIR --out vqvae.pt
    python vqvae.py tokenize --videos DIR --tokenizer vqvae.pt --out tokens/mine
    python vqvae.py check tokens/mine                   compares all tokens with their checksums
    torchrun --nproc-per-node 8 vqvae.py tokenize ...   the processes divide the videos

A tokenizer is any class with
    encode(frames)    uint8 (N, S, S, 3), S a multiple of 8 -> int64 (N, h, w) below vocab_size
    decode(tokens)    int64 (N, h, w) -> uint8 (N, S, S, 3)
    vocab_size        int, the number of codes
    fingerprint       str of 12 hexadecimal digits: other tokens, other digits
VQVAE and dalle.DalleVAE are such classes; `load_tokenizer` reads either from a file.

Shapes: N frames, S frame side in pixels, h = w = S/8, K codes, c dimensions of a code.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from dalle import DalleVAE
from plumbing.checkpoints import load_weights, read_checkpoint, rebuilt, save_checkpoint
from plumbing.cli import UserError, option, parse_command, progress, run
from plumbing.datasets import DATASETS, class_names, frame_spans, list_videos
from plumbing.files import try_folder
from plumbing.pictures import draw_tokenizer
from plumbing.processes import by_first, leave_group, pick_device, say, seed_all, wait_for_all
from plumbing.runs import learning_rate
from plumbing.store import check_parts
from plumbing.tokenizing import measure, psnr, tokenize
from plumbing.tokens import PATCH, fingerprint


class Codebook(nn.Module):
    """K codes that follow the mean of their inputs (exponential moving averages).

    The first batch initialises the codes. A code whose average use falls below a tenth of an even
    share is moved onto an input far from its code; otherwise most codes would never be used. Both
    draw inputs in proportion to their squared distance from the nearest code, as k-means++ does.
    """

    def __init__(self, codes, dim, decay=0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("codes", torch.zeros(codes, dim))
        self.register_buffer("count", torch.zeros(codes))  # moving average of inputs per code
        self.register_buffer("total", torch.zeros(codes, dim))  # moving average of their sum
        self.register_buffer("started", torch.tensor(False))

    def nearest(self, z):
        """z: (n, c) -> the nearest code of each (n,)."""
        return (self.codes.square().sum(dim=1) - 2 * z @ self.codes.t()).argmin(dim=1)

    def forward(self, z):
        """z: (n, c) -> quantised (n, c), codes (n,), commitment loss.

        The gradient of quantised goes straight through to z.
        """
        if self.training and not self.started:
            self.start(z.detach())
        index = self.nearest(z)  # (n,)
        quantised = self.codes[index]  # (n, c)
        commitment = F.mse_loss(z, quantised)
        if self.training:
            self.update(z.detach(), index)
        return z + (quantised - z).detach(), index, commitment

    @torch.no_grad()
    def start(self, z):
        """k-means++: draws inputs in proportion to their squared distance from the codes so far."""
        z = z[torch.randperm(len(z), device=z.device)[:10000]]
        z = z + 1e-4 * z.std() * torch.randn_like(z)  # so that equal inputs give distinct codes
        chosen = [z[torch.randint(len(z), (), device=z.device)]]
        distance = torch.full((len(z),), math.inf, device=z.device)
        while len(chosen) < len(self.codes):
            distance = torch.minimum(distance, (z - chosen[-1]).square().sum(dim=1))  # (n,)
            weights = distance.clamp(min=1e-20)  # not all zero once every input is chosen
            chosen.append(z[torch.multinomial(weights, 1)[0]])
        self.codes.copy_(torch.stack(chosen))
        self.total.copy_(self.codes)
        self.count.fill_(1)
        self.started.fill_(True)

    @torch.no_grad()
    def update(self, z, index):
        """Moves every code towards the mean of its inputs, then replaces dead ones."""
        ones = torch.ones_like(index, dtype=z.dtype)
        count = torch.zeros_like(self.count).index_add_(0, index, ones)  # (K,)
        total = torch.zeros_like(self.total).index_add_(0, index, z)  # (K, c)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        self.codes.copy_(self.total / self.count.clamp(min=1e-5)[:, None])
        even = self.count.sum() / len(self.count)
        dead = self.count < 0.1 * even
        if dead.any():
            distance = (z - self.codes[index]).square().sum(dim=1) + 1e-10  # (n,)
            inputs = z[torch.multinomial(distance, int(dead.sum()), replacement=True)]
            self.codes[dead] = inputs
            self.total[dead] = inputs * even
            self.count[dead] = even


class Residual(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, width, size, padding=size // 2),
            nn.ReLU(),
            nn.Conv2d(width, width, 1))

    def forward(self, x):
        return x + self.body(x)


class VQVAE(nn.Module):
    """A small tokenizer.

    Each 8x8 patch is encoded on its own, so a token depends on its own patch only. The decoder
    sees the neighbours and smooths the seams.
    """

    def __init__(self, codes=128, width=128, code_dim=16):
        super().__init__()
        self.settings = {"codes": codes, "width": width, "code_dim": code_dim}
        self.vocab_size = codes
        self.encoder = nn.Sequential(                # (N, 3, S, S)
            nn.PixelUnshuffle(8),                    # (N, 192, h, w)
            nn.Conv2d(3 * 64, width, 1),
            Residual(width, 1),
            Residual(width, 1),
            nn.Conv2d(width, code_dim, 1))           # (N, c, h, w)
        self.codebook = Codebook(codes, code_dim)
        self.decoder = nn.Sequential(                # (N, c, h, w)
            nn.Conv2d(code_dim, width, 1),
            Residual(width, 3),
            Residual(width, 3),
            nn.ReLU(),
            nn.Conv2d(width, 3 * 64, 1),
            nn.PixelShuffle(8))                      # (N, 3, S, S)

    @property
    def fingerprint(self):
        return fingerprint(self.state_dict())

    def forward(self, frames):
        """uint8 (N, S, S, 3) -> mean squared error in -1..1, commitment loss, codes (N, h, w)."""
        x = to_pixels(frames)
        z = self.encoder(x)  # (N, c, h, w)
        if not z.isfinite().all():
            raise UserError("the tokenizer's training has gone to infinity: lower --lr")
        n, c, h, w = z.shape
        quantised, index, commitment = self.codebook(z.permute(0, 2, 3, 1).reshape(-1, c))
        quantised = quantised.reshape(n, h, w, c).permute(0, 3, 1, 2)  # (N, c, h, w)
        error = F.mse_loss(self.decoder(quantised), x)
        return error, commitment, index.reshape(n, h, w)

    @torch.no_grad()
    def encode(self, frames):
        """uint8 (N, S, S, 3), S a multiple of 8 -> int64 (N, S/8, S/8) below vocab_size."""
        frames = torch.as_tensor(frames, device=self.codebook.codes.device)
        z = self.encoder(to_pixels(frames))  # (N, c, h, w)
        n, c, h, w = z.shape
        return self.codebook.nearest(z.permute(0, 2, 3, 1).reshape(-1, c)).reshape(n, h, w)

    @torch.no_grad()
    def decode(self, tokens):
        """int64 (N, h, w) -> uint8 (N, 8h, 8w, 3)."""
        codes = self.codebook.codes
        tokens = torch.as_tensor(tokens, device=codes.device)
        x = self.decoder(codes[tokens].permute(0, 3, 1, 2))  # (N, 3, 8h, 8w)
        return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


def to_pixels(frames):
    """uint8 (N, S, S, 3) -> float (N, 3, S, S) in -1..1."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1


def load_tokenizer(path):
    """Loads a file that `train` saved -> VQVAE, or DALL-E's encoder.pkl -> DalleVAE.

    Also loads a decoder.pkl beside an encoder.pkl. Raises UserError for any other file.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        decoder = path.with_name("decoder.pkl")
        return DalleVAE.from_pickles(path, decoder if decoder.is_file() else None)
    content = read_checkpoint(path)
    if not {"vqvae", "model"} <= content.keys():
        raise UserError(f"{path} holds no tokenizer (python vqvae.py train makes one)")
    tokenizer = rebuilt(VQVAE, content["vqvae"], path)
    load_weights(tokenizer, content["model"], path)
    return tokenizer.eval()


def train_tokenizer(frames, codes, steps, batch, lr, seed, device, look=None):
    """Trains on uint8 frames (N, S, S, 3): reconstruction error + 0.25 x commitment loss -> VQVAE.

    look: a function (tokenizer, text) that is called after a twentieth of the steps.
    Raises UserError if the loss becomes infinite.
    """
    seed_all(seed)
    tokenizer = VQVAE(codes).to(device).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=lr, weight_decay=0)
    frames = torch.from_numpy(frames)
    bar = progress(range(steps), "training the tokenizer", unit=" steps")
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr, warmup=0.05)
        chosen = frames[torch.randint(len(frames), (batch,))]
        error, commitment, index = tokenizer(chosen.to(device))
        optimizer.zero_grad()
        (error + 0.25 * commitment).backward()
        optimizer.step()
        if step % 20 == 0:
            text = f"PSNR {psnr(error.item()):.1f} dB, {len(index.unique())} codes"
            bar.set_postfix_str(text, refresh=False)
        if look and step == steps // 20:
            look(tokenizer, f"step {step} of {steps}")
    with torch.no_grad():
        error, commitment, _ = tokenizer.eval()(frames[:batch].to(device))  # the final weights
    loss = error + commitment
    if not loss.isfinite():
        raise UserError(f"the tokenizer's training has gone to infinity (loss {loss}): lower --lr")
    return tokenizer


def save_tokenizer(tokenizer, path):
    save_checkpoint(path, {"vqvae": tokenizer.settings, "model": tokenizer.state_dict()})


def make_tokenizer(videos, path, fps, size, frames, **training):
    """Trains a tokenizer on frames of videos (paths), draws it, saves it and measures it.

    frames: how many; every twentieth is held out for the picture and the measures.
    training: arguments of `train_tokenizer`.
    Returns a line about its quality, and a line for each file that cannot be decoded [str].
    """
    frames, errors = data.sample_frames(videos, fps, size, frames)
    held_out, frames = frames[::20], frames[np.arange(len(frames)) % 20 > 0]
    picture = Path(path).with_suffix(".png")

    def look(tokenizer, when):
        chosen = held_out[data.spread(8, len(held_out))]
        draw_tokenizer(tokenizer, chosen, picture, f"the tokenizer at {when}")
        say(f"{picture}: frames before and after the tokenizer, at {when}")

    tokenizer = train_tokenizer(frames, **training, look=look)
    look(tokenizer, "its end")
    save_tokenizer(tokenizer, path)  # last: its presence marks completion
    m = measure(tokenizer, held_out)
    quality = (f"reconstruction error {m['error']:.4f}, PSNR {m['psnr']:.1f} dB, "
               f"perplexity {m['perplexity']:.0f}, codes used {100 * m['codes_used']:.0f}% "
               f"(on {len(held_out)} frames held out)")
    return quality, errors


# ---------------------------------------------------------------- command line


DEVICES = ["auto", "cuda", "mps", "cpu"]


@dataclass
class TrainConfig:
    videos: str = option("", "folder of videos to train on")
    out: str = option("vqvae.pt", "where to save the tokenizer")
    codes: int = option(1024, "size of the codebook", least=2, most=65531)
    frame_size: int = option(128, "frame side in pixels, 8 x 8 a token", multiple=PATCH, most=2048)
    fps: float = option(2.0, "frames a second to read", above=0, most=1000)
    frames: int = option(20000, "how many frames to train on, spread over the videos", least=20)
    steps: int = option(3000, "training steps", least=1)
    batch: int = option(64, "frames a step", least=1)
    lr: float = option(2e-3, "peak learning rate", above=0)
    seed: int = option(0, "random seed", least=0, most=2**31)
    device: str = option("auto", "where to compute", choices=DEVICES)


@dataclass
class TokenizeConfig:
    videos: str = option("", "folder of videos, without labels (--dataset folder --root DIR)")
    dataset: str = option("folder", "how the videos are listed", choices=list(DATASETS))
    root: str = option("", "the dataset's folder")
    split: str = option("train", "which split (train1 to test3 of UCF101 and HMDB51)")
    views: str = option("pretrain", "views of each video", choices=["pretrain", "train", "test"])
    tokenizer: str = option("vqvae.pt", "file of the tokenizer")
    out: str = option("tokens", "folder of the token store")
    frame_size: int = option(128, "frame side in pixels, 8 x 8 a token", multiple=PATCH, most=2048)
    fps: float | None = option(None, "frames a second (default: 2 for --views pretrain, else 16)",
                               above=0, most=1000)
    workers: int = option(0, "files at a time (0: one a core and one more)", least=0, most=512)
    batch: int = option(256, "frames of 128 x 128 to encode at once; fewer larger ones", least=1)
    device: str = option("auto", "where to compute", choices=DEVICES)


def train_command(config):
    device = pick_device(config.device)
    wait_for_all()
    leave_group()  # under torchrun, one process trains
    if Path(config.out).exists():
        raise UserError(f"--out {config.out} exists: choose another name, or delete it")
    try_folder(Path(config.out).parent)
    videos = [path for path, _ in list_videos("folder", config.videos, "")]
    quality, errors = make_tokenizer(
        videos, config.out, config.fps, config.frame_size, config.frames, codes=config.codes,
        steps=config.steps, batch=config.batch, lr=config.lr, seed=config.seed, device=device)
    for line in errors:
        print(f"skipped {line}")
    print(f"{config.out}: {quality}")


def tokenize_command(config):
    if config.videos and (config.root or config.dataset != "folder"):
        raise UserError("--videos DIR, or --dataset NAME --root DIR: give one of them")
    dataset, root = config.dataset, config.videos or config.root
    device = pick_device(config.device)
    listed = by_first(list_videos, dataset, root, config.split) or []  # the first process's counts
    videos = [(path, {} if label is None else {"label": label}) for path, label in listed]
    classes = by_first(class_names, dataset, root)
    spans = frame_spans(dataset, root, config.split)
    tokenizer = load_tokenizer(config.tokenizer).to(device)
    views = data.views_for(config.views, config.frame_size, dataset)
    fps = config.fps or (2.0 if config.views == "pretrain" else 16.0)
    if not tokenize(tokenizer, videos, root, config.out, fps, config.frame_size, views,
                    Path(config.tokenizer).name, {"label": classes} if classes else None, spans,
                    config.workers, config.batch):
        say(f"{config.out}: {len(videos)} videos tokenised before, nothing is left to do")


def main():
    if sys.argv[1:2] == ["check"] and not {"-h", "--help"} & {*sys.argv}:
        return print(check_parts(data.TokenStore(" ".join(sys.argv[2:]))))
    command, config = parse_command({"train": TrainConfig, "tokenize": TokenizeConfig}, __doc__)
    {"train": train_command, "tokenize": tokenize_command}[command](config)
    leave_group()


if __name__ == "__main__":
    run(main)
