"""Which tokens are hidden, and their prediction (Eq. 1): block masking (Eq. 3) and i.i.d. masking (Eq. 2).

A video's neighbouring tokens look alike, so a token hidden alone can be copied from beside it. VIMPAC hides
whole spatio-temporal cuboids, whose insides can only be predicted.

    python masking.py        the paper's Table 2 beside the closed form and beside a sample

Shapes: B clips, T frames, H x W tokens a frame, N cuboids a clip, n videos, C clips of each, M hidden tokens.
"""
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from plumbing.cli import UserError
from plumbing.processes import move, rank_and_world, share, sum_over_all
from plumbing.tokens import MASK, PAD

LEFT = -1  # a hidden token that stays as it is, though it is to be predicted


def longest(frames, height, width):
    """The largest cuboid along each axis: (2T/3, H/2, W/2), rounded down as the released code does.

    The paper's text rounds 2T/3 up, but its Table 2 comes out only when it is rounded down.
    """
    return max(1, 2 * frames // 3), max(1, height // 2), max(1, width // 2)


def cuboids(batch, frames, height, width, blocks, device=None, generator=None):
    """Draws N cuboids for each clip -> bool (B, N, T, H, W), True inside.

    Along each axis the length is uniform on 1..longest, then the start is uniform over all that fit.
    """
    inside = []
    for size, most in zip((frames, height, width), longest(frames, height, width)):
        u, v = torch.rand(2, batch, blocks, 1, device=device, generator=generator)  # two (B, N, 1)
        length = 1 + (u * most).floor()
        start = (v * (size - length + 1)).floor()
        position = torch.arange(size, device=device)
        inside.append((position >= start) & (position < start + length))  # (B, N, size)
    t, h, w = inside
    return t[:, :, :, None, None] & h[:, :, None, :, None] & w[:, :, None, None, :]  # (B, N, T, H, W)


def block_mask(batch, frames, height, width, blocks, device=None, generator=None):
    """Eq. 3: the union of N cuboids, drawn anew for every clip -> bool (B, T, H, W), True = hidden."""
    return cuboids(batch, frames, height, width, blocks, device, generator).any(dim=1)


def iid_mask(batch, frames, height, width, ratio, device=None, generator=None):
    """Eq. 2: every token on its own with probability `ratio` -> bool (B, T, H, W), True = hidden."""
    return torch.rand(batch, frames, height, width, device=device, generator=generator) < ratio


def expected_ratio(frames, height, width, blocks):
    """The expected share of tokens that `block_mask` hides, in closed form (Table 2) -> float in 0..1.

    A cuboid's three axes are independent, so it covers a token with probability c_t c_h c_w; the N cuboids are
    independent too, so all of them miss it with probability (1 - c_t c_h c_w)^N.
    """
    t, h, w = (_covered(size, most) for size, most in zip((frames, height, width), longest(frames, height, width)))
    one = t[:, None, None] * h[None, :, None] * w[None, None, :]  # (T, H, W)
    return (1 - (1 - one) ** blocks).mean().item()


def _covered(size, most):
    """The probability that one random interval covers each position of an axis -> float64 (size,)."""
    length = torch.arange(1, most + 1, dtype=torch.float64)[:, None]  # (most, 1)
    position = torch.arange(size, dtype=torch.float64)[None, :]  # (1, size)
    first = (position - length + 1).clamp(min=0)  # the earliest start that still reaches the position
    last = torch.minimum(position, size - length)  # the latest start that fits
    return ((last - first + 1) / (size - length + 1)).mean(dim=0)


@cache
def blocks_for(frames, height, width, target=0.15):
    """The number of cuboids whose expected ratio is closest to `target` (Table 2's bold cells) -> int.

    Raises UserError unless 0 < target < 1.
    """
    if not 0 < target < 1:
        raise UserError(f"a mask ratio lies between 0 and 1, not {target}")
    blocks = 1
    while abs(expected_ratio(frames, height, width, blocks + 1) - target) < \
            abs(expected_ratio(frames, height, width, blocks) - target):
        blocks += 1
    return blocks


# ---------------------------------------------------------------- what stands in a hidden token's place


def cuboid_draws(boxes, generator=None):
    """A number in 0..1 for each cuboid, at every token inside: bool (B, N, T, H, W) of `cuboids` -> float (B, T, H, W).

    Where cuboids overlap, the last decides; but as released, one that leaves its tokens (0.9 and more) undoes no other.
    """
    draw = torch.rand(*boxes.shape[:2], 1, 1, 1, device=boxes.device, generator=generator)
    draw = draw.where(boxes & (draw < 0.9), 1)  # (B, N, T, H, W)
    last = boxes.shape[1] - 1 - (draw < 1).flip(1).int().argmax(dim=1, keepdim=True)  # (B, 1, T, H, W)
    return draw.gather(1, last)[:, 0]


def noisy_codes(draw, vocab_size, generator=None):
    """Sec. G.3: what hidden tokens become, by a draw in 0..1: below 0.8 MASK, below 0.9 a random code, else LEFT.

    draw: float (B, T, H, W) -> int64 (B, T, H, W). The released code draws once for a cuboid (`cuboid_draws`).
    """
    random = torch.randint(vocab_size, draw.shape, device=draw.device, generator=generator)
    return torch.where(draw < 0.8, vocab_size + MASK, torch.where(draw < 0.9, random, LEFT))


def hide(tokens, mask, vocab_size, noise=False, generator=None):
    """Puts MASK in the place of the hidden tokens -> int64 (B, T, H, W). PAD is left as it is.

    tokens: int64 (B, T, H, W). mask: bool (B, T, H, W), True = hidden. noise: the 80/10/10 of Sec. G.3, every token
    drawing for itself.
    """
    codes = torch.full_like(tokens, vocab_size + MASK)
    if noise:
        draw = torch.rand(tokens.shape, device=tokens.device, generator=generator)
        codes = noisy_codes(draw, vocab_size, generator)
    return replace(tokens, mask & (tokens != vocab_size + PAD), codes)


def replace(tokens, mask, codes):
    """The codes where the mask is True, but for those that are LEFT; all (B, T, H, W)."""
    return torch.where(mask & (codes != LEFT), codes, tokens)


class Batch(NamedTuple):
    """Clips ready for the model. B = C * n: the first clips of all videos, then all second ones."""
    tokens: torch.Tensor  # int64 (B, T, H, W), as they are
    inputs: torch.Tensor  # int64 (B, T, H, W), with what is hidden replaced
    mask: torch.Tensor  # bool (B, T, H, W), True = to be predicted; never PAD
    padded: torch.Tensor  # bool (B,), True = the clip holds PAD

    def has_pad(self):
        return bool(self.padded.any())

    def seen(self, contrast_on="masked", mask_weight=1.0):
        """What the backbone is given: the inputs, or where contrastive learning is on whole clips, these after them, or
        alone where nothing is to be predicted -> int64 (B or 2B, T, H, W)."""
        if contrast_on == "masked":
            return self.inputs
        return torch.cat([self.inputs, self.tokens]) if mask_weight else self.tokens

    def part(self, videos, per_video=2):
        """Some of the n videos, a slice -> Batch."""
        return Batch(*(x.unflatten(0, (per_video, -1))[:, videos].flatten(0, 1) for x in self))


def prepare(clips, vocab_size, kind="block", ratio=0.15, blocks=0, noise=False, generator=None, rank=0, world=1):
    """Draws the masks of clips and applies them -> Batch.

    clips: int64 (n, C, T, H, W), on the CPU: there the number of hidden tokens is known without waiting for a GPU.
    kind: "block" (blocks: N, or 0 for the number that comes closest to the ratio) or "iid". noise: Sec. G.3's 80/10/10,
    for every cuboid, or for every token of an i.i.d. mask.
    rank, world: these are process `rank`'s n of n * world videos. The masks of all are drawn, and this process's
    taken, so that nothing depends on how many processes share the work.
    """
    n, per_video, *shape = clips.shape
    count = n * per_video * world
    if kind == "iid":
        mask = iid_mask(count, *shape, ratio, generator=generator)
        draw = torch.rand(mask.shape, generator=generator) if noise else None
    else:
        boxes = cuboids(count, *shape, blocks or blocks_for(*shape, ratio), generator=generator)
        mask, draw = boxes.any(dim=1), cuboid_draws(boxes, generator) if noise else None

    def own(x):  # (count, T, H, W), of all processes -> (B, T, H, W)
        return share(x.unflatten(0, (n * world, per_video)), rank, world).transpose(0, 1).flatten(0, 1)
    tokens = clips.transpose(0, 1).flatten(0, 1)  # (B, T, H, W)
    pad = tokens == vocab_size + PAD
    mask = own(mask) & ~pad
    inputs = replace(tokens, mask, own(noisy_codes(draw, vocab_size, generator))) if noise else \
        hide(tokens, mask, vocab_size)
    return Batch(tokens, inputs, mask, pad.flatten(1).any(dim=1))


# ---------------------------------------------------------------- their prediction


def token_weight(batch, device):
    """The weight of a hidden token's loss, so that the weighted sums of all processes have the mean over all their
    hidden tokens as their own mean, which is what DistributedDataParallel takes -> scalar on the device."""
    total = sum_over_all(torch.full((), float(batch.mask.sum()), device=device))
    return rank_and_world()[1] / total.clamp(min=1)


def mask_loss(model, part, weight, **seen):
    """Eq. 1 on some clips of a batch -> their share of L_mask, their share of the accuracy, CLS (B, d) to tell apart.

    model: (inputs, places, whether any is PAD) -> logits (M, V + 5) at these places, CLS. part: Batch. seen: of it.
    """
    hidden = part.mask.flatten().nonzero().squeeze(1)  # (M,)
    codes = move(part.tokens.flatten()[hidden], weight.device)  # (M,)
    logits, cls = model(move(part.seen(**seen), weight.device), move(hidden, weight.device), part.has_pad())
    loss = weight * F.cross_entropy(logits.float(), codes, reduction="sum")
    return loss, weight * (logits.argmax(dim=-1) == codes).sum(), cls[-len(part.tokens):]


PAPER_TABLE_2 = {  # (T, S): expected ratio in percent for 4, 5, 6, 7 and 8 cuboids, and the number in bold
    (5, 128): ((11.9, 14.5, 17.0, 19.4, 21.7), 5),
    (5, 256): ((10.6, 13.1, 15.2, 17.5, 19.5), 6),
    (10, 128): ((10.4, 12.8, 15.0, 17.1, 19.2), 6),
    (10, 256): ((9.3, 11.4, 13.4, 15.4, 17.2), 7)}


def main():
    print("Table 2: the share of tokens that N cuboids hide, in percent (paper / closed form / 2,000 clips sampled).")
    print("* marks the number of cuboids nearest to 15%: the paper's choice and ours.\n")
    print("  T    S  map " + "".join(f"{f'N = {n}':^22}" for n in range(4, 9)))
    generator = torch.Generator().manual_seed(0)
    for (frames, pixels), (paper, bold) in PAPER_TABLE_2.items():
        side = pixels // 8
        ours = blocks_for(frames, side, side)
        row = f"{frames:3d} {pixels:4d} {side:4d} "
        for n, ratio in zip(range(4, 9), paper):
            exact = 100 * expected_ratio(frames, side, side, n)
            sampled = sum(100 * block_mask(250, frames, side, side, n, generator=generator).float().mean().item()
                          for _ in range(8)) / 8
            row += f" {ratio:5.1f}{'*' if n == bold else ' '}/{exact:5.1f}{'*' if n == ours else ' '}/{sampled:5.1f}  "
        print(row.rstrip())


if __name__ == "__main__":
    main()
