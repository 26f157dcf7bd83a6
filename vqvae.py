"""Pixels -> tokens: a VQ-VAE with 8x down-sampling; trains one, and tokenises videos with one.

    python vqvae.py train --videos DIR --out vqvae.pt
    python vqvae.py tokenize --videos DIR --tokenizer vqvae.pt --out tokens/mine
    python vqvae.py check tokens/mine                      reads all of it: is it what was written?
    torchrun --nproc-per-node 8 vqvae.py tokenize ...      each process takes its share of the videos

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
from plumbing.annotations import DATASETS, class_names, frame_spans, list_videos
from plumbing.checkpoints import load_weights, read_checkpoint, rebuilt, save_checkpoint
from plumbing.cli import UserError, option, parse_command, progress, run
from plumbing.files import try_folder
from plumbing.pictures import draw_tokenizer
from plumbing.processes import leave_group, pick_device, say, seed_all, wait_for_all
from plumbing.runs import learning_rate
from plumbing.tokenizing import measure, psnr, tokenize
from plumbing.writer import check_tokens


class Codebook(nn.Module):
    """K code vectors that follow the mean of what is assigned to them (exponential moving averages).

    A code whose average use falls below a tenth of an even share is moved onto an input that the others serve badly:
    without this, most codes would never be used. The first batch starts the codes. Both draw inputs in proportion to
    their squared distance from the nearest code, as k-means++ does.
    """

    def __init__(self, codes, dim, decay=0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("codes", torch.zeros(codes, dim))
        self.register_buffer("count", torch.zeros(codes))  # moving average of how many inputs each code gets
        self.register_buffer("total", torch.zeros(codes, dim))  # and of their sum
        self.register_buffer("started", torch.tensor(False))

    def nearest(self, z):
        """z: (n, c) -> the nearest code of each (n,)."""
        return (self.codes.square().sum(dim=1) - 2 * z @ self.codes.t()).argmin(dim=1)

    def forward(self, z):
        """z: (n, c) -> quantised (n, c) with a straight-through gradient, codes (n,), commitment loss."""
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
        """k-means++: each code is an input drawn in proportion to its squared distance from the codes so far."""
        z = z[torch.randperm(len(z), device=z.device)[:10000]]
        z = z + 1e-4 * z.std() * torch.randn_like(z)  # more codes than distinct inputs still get distinct codes
        chosen = [z[torch.randint(len(z), (), device=z.device)]]
        distance = torch.full((len(z),), math.inf, device=z.device)
        while len(chosen) < len(self.codes):
            distance = torch.minimum(distance, (z - chosen[-1]).square().sum(dim=1))  # (n,)
            chosen.append(z[torch.multinomial(distance.clamp(min=1e-20), 1)[0]])  # also where all inputs are chosen
        self.codes.copy_(torch.stack(chosen))
        self.total.copy_(self.codes)
        self.count.fill_(1)
        self.started.fill_(True)

    @torch.no_grad()
    def update(self, z, index):
        """Moves every code towards the mean of its inputs, then replaces dead ones."""
        count = torch.zeros_like(self.count).index_add_(0, index, torch.ones_like(index, dtype=z.dtype))  # (K,)
        total = torch.zeros_like(self.total).index_add_(0, index, z)  # (K, c)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        self.codes.copy_(self.total / self.count.clamp(min=1e-5)[:, None])
        even = self.count.sum() / len(self.count)
        dead = self.count < 0.1 * even
        if dead.any():
            distance = (z - self.codes[index]).square().sum(dim=1) + 1e-10  # (n,)
            inputs = z[torch.multinomial(distance, int(dead.sum()), replacement=True)]
            self.codes[dead], self.total[dead], self.count[dead] = inputs, inputs * even, even


class Residual(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, size, padding=size // 2),
                                  nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x):
        return x + self.body(x)


class VQVAE(nn.Module):
    """A small tokenizer. Each 8x8 patch is encoded on its own, so that a token tells of its own place only; the
    decoder sees the neighbours and smooths the seams."""

    fingerprinted = ""  # all weights

    def __init__(self, codes=128, width=128, code_dim=16):
        super().__init__()
        self.settings = {"codes": codes, "width": width, "code_dim": code_dim}
        self.vocab_size, self.arithmetic = codes, "float32"
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

    def forward(self, frames):
        """uint8 (N, S, S, 3) -> reconstruction error (mean square, of pixels in -1..1), commitment loss, (N, h, w)."""
        x = to_pixels(frames)
        z = self.encoder(x)  # (N, c, h, w)
        if not z.isfinite().all():
            raise UserError("the tokenizer's training has gone to infinity: lower --lr")
        n, c, h, w = z.shape
        quantised, index, commitment = self.codebook(z.permute(0, 2, 3, 1).reshape(-1, c))
        error = F.mse_loss(self.decoder(quantised.reshape(n, h, w, c).permute(0, 3, 1, 2)), x)
        return error, commitment, index.reshape(n, h, w)

    @torch.no_grad()
    def encode(self, frames):
        """uint8 (N, S, S, 3), S a multiple of 8 -> int64 (N, S/8, S/8) below vocab_size."""
        z = self.encoder(to_pixels(torch.as_tensor(frames, device=self.codebook.codes.device)))  # (N, c, h, w)
        n, c, h, w = z.shape
        return self.codebook.nearest(z.permute(0, 2, 3, 1).reshape(-1, c)).reshape(n, h, w)

    @torch.no_grad()
    def decode(self, tokens):
        """int64 (N, h, w) -> uint8 (N, 8h, 8w, 3)."""
        codes = self.codebook.codes
        x = self.decoder(codes[torch.as_tensor(tokens, device=codes.device)].permute(0, 3, 1, 2))
        return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


def to_pixels(frames):
    """uint8 (N, S, S, 3) -> float (N, 3, S, S) in -1..1."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1


def load_tokenizer(path):
    """A tokenizer that `train` saved -> VQVAE, or DALL-E's encoder.pkl -> DalleVAE; ready to encode.

    A decoder.pkl beside it is loaded too. UserError names any other file, or one whose weights are not all numbers.
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
    """Trains on uint8 frames (N, S, S, 3) by reconstruction error + 0.25 x commitment loss -> VQVAE. Raises UserError
    where that goes to infinity. look: a function that is shown it after a twentieth of the steps."""
    seed_all(seed)
    tokenizer = VQVAE(codes).to(device).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=lr, weight_decay=0)
    frames = torch.from_numpy(frames)
    bar = progress(range(steps), "training the tokenizer", unit=" steps")
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr, warmup=0.05)
        error, commitment, index = tokenizer(frames[torch.randint(len(frames), (batch,))].to(device))
        optimizer.zero_grad()
        (error + 0.25 * commitment).backward()
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"PSNR {psnr(error.item()):.1f} dB, {len(index.unique())} codes", refresh=False)
        if look and step == steps // 20:
            look(tokenizer, f"step {step} of {steps}")
    with torch.no_grad():
        error, commitment, _ = tokenizer.eval()(frames[:batch].to(device))  # with the last step's weights
    if not (error + commitment).isfinite():
        raise UserError(f"the tokenizer's training has gone to infinity (loss {error + commitment}): lower --lr")
    return tokenizer


def save_tokenizer(tokenizer, path):
    save_checkpoint(path, {"vqvae": tokenizer.settings, "model": tokenizer.state_dict()})


def make_tokenizer(videos, path, fps, size, frames, **training):
    """Trains a tokenizer on so many frames of videos (paths), saves it, measures it on every twentieth, held out, and
    draws it, beside its file -> what to say of it, what could not be read [str]."""
    frames, errors = data.sample_frames(videos, fps, size, frames)
    held_out, frames = frames[::20], frames[np.arange(len(frames)) % 20 > 0]
    picture = Path(path).with_suffix(".png")

    def look(tokenizer, when):
        draw_tokenizer(tokenizer, held_out[data.spread(8, len(held_out))], picture, f"the tokenizer at {when}")
        say(f"{picture}: what the tokenizer leaves of some frames, at {when}")
    tokenizer = train_tokenizer(frames, **training, look=look)
    look(tokenizer, "its end")
    save_tokenizer(tokenizer, path)  # last: where it is, all is
    m = measure(tokenizer, held_out)
    return (f"reconstruction error {m['error']:.4f}, PSNR {m['psnr']:.1f} dB, perplexity {m['perplexity']:.0f}, "
            f"codes used {100 * m['codes_used']:.0f}% (on {len(held_out)} frames held out)"), errors


# ---------------------------------------------------------------- command line


@dataclass
class TrainConfig:
    videos: str = option("", "folder of videos to train on")
    out: str = option("vqvae.pt", "where to save the tokenizer")
    codes: int = option(1024, "size of the codebook", least=2, most=65536)
    frame_size: int = option(128, "frame side in pixels, of which a token covers 8 x 8", multiple=8, most=2048)
    fps: float = option(2.0, "frames a second to read", above=0, most=1000)
    frames: int = option(20000, "how many frames to train on, spread over the videos", least=20)
    steps: int = option(3000, "training steps", least=1)
    batch: int = option(64, "frames a step", least=1)
    lr: float = option(2e-3, "peak learning rate", above=0)
    seed: int = option(0, "random seed", least=0, most=2**31)
    device: str = option("auto", "where to compute", choices=["auto", "cuda", "mps", "cpu"])


@dataclass
class TokenizeConfig:
    videos: str = option("", "folder of videos, without labels (short for --dataset folder --root DIR)")
    dataset: str = option("folder", "how the videos are listed", choices=list(DATASETS))
    root: str = option("", "the dataset's folder")
    split: str = option("train", "which split (train1 to test3 of UCF101 and HMDB51)")
    views: str = option("pretrain", "which views of each video", choices=["pretrain", "train", "test"])
    tokenizer: str = option("vqvae.pt", "file of the tokenizer")
    out: str = option("tokens", "folder of the token store")
    frame_size: int = option(128, "frame side in pixels, of which a token covers 8 x 8", multiple=8, most=2048)
    fps: float = option(0.0, "frames a second to keep (0: 2 for the view pretrain, else 16)", least=0, most=1000)
    workers: int = option(0, "ffmpeg processes (0: one a core and one more, the most)", least=0, most=512)
    batch: int = option(256, "frames a batch of the tokenizer (of more than 128 x 128 pixels: fewer)", least=1)
    device: str = option("auto", "where to compute", choices=["auto", "cuda", "mps", "cpu"])

    def __post_init__(self):
        self.fps = self.fps or (2.0 if self.views == "pretrain" else 16.0)


def train_command(config):
    device = pick_device(config.device)
    wait_for_all()
    leave_group()  # under torchrun, one process trains
    if Path(config.out).exists():
        raise UserError(f"--out {config.out} is there already: choose another name, or delete it")
    try_folder(Path(config.out).parent)
    found, errors = make_tokenizer(
        [path for path, _ in list_videos("folder", config.videos, "")], config.out, config.fps, config.frame_size,
        config.frames, codes=config.codes, steps=config.steps, batch=config.batch, lr=config.lr, seed=config.seed,
        device=device)
    print("".join(f"skipped {line}\n" for line in errors) + f"{config.out}: {found}")


def tokenize_command(config):
    if config.videos and (config.root or config.dataset != "folder"):
        raise UserError("--videos DIR, or --dataset NAME --root DIR: give one of them")
    dataset, root = config.dataset, config.videos or config.root
    videos = [(path, {} if label is None else {"label": label})
              for path, label in list_videos(dataset, root, config.split)]
    tokenizer = load_tokenizer(config.tokenizer).to(pick_device(config.device))
    views, classes = data.views_for(config.views, config.frame_size, dataset), class_names(dataset, root)
    spans = frame_spans(dataset, root, config.split)
    if not tokenize(tokenizer, videos, root, config.out, config.fps, config.frame_size, views,
                    Path(config.tokenizer).name, {"label": classes} if classes else None, spans, config.workers,
                    config.batch):
        say(f"{config.out}: {len(videos)} videos tokenised before, nothing is left to do")


def main():
    if sys.argv[1:2] == ["check"] and not {"-h", "--help"} & {*sys.argv}:
        return print(check_tokens(data.TokenStore(" ".join(sys.argv[2:]))))
    command, config = parse_command({"train": TrainConfig, "tokenize": TokenizeConfig}, __doc__)
    {"train": train_command, "tokenize": tokenize_command}[command](config)
    leave_group()


if __name__ == "__main__":
    run(main)
