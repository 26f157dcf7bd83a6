"""Which tokens are hidden: block masking (Eq. 3) and i.i.d. masking (Eq. 2).

Neighbouring tokens of a video look alike, so a single hidden token can be copied from its
neighbours. VIMPAC hides whole spatio-temporal blocks, whose interiors have to be predicted.

    python masking.py        the paper's Table 2 beside the closed form and beside a sample

Shapes: B clips, T frames, H x W tokens a frame, N cuboids in a block mask.
"""
from functools import cache

import torch

from plumbing.cli import UserError
from plumbing.tokens import MASK, PAD

# ---------------------------------------------------------------- block masks


def longest(frames, height, width):
    """The largest cuboid along each axis: (2T/3, H/2, W/2), rounded down as the released code does.

    The paper's text rounds 2T/3 up, but its Table 2 comes out only when it is rounded down.
    """
    return max(1, 2 * frames // 3), max(1, height // 2), max(1, width // 2)


def cuboids(batch, frames, height, width, blocks, device=None, generator=None):
    """Draws N cuboids for each clip -> bool (B, N, T, H, W), True inside.

    Along each axis the length is uniform on 1..longest, then the start is uniform on all that fit.
    """
    inside = []
    for size, most in zip((frames, height, width), longest(frames, height, width)):
        u, v = torch.rand(2, batch, blocks, 1, device=device, generator=generator)  # (B, N, 1) each
        length = 1 + (u * most).floor()
        start = (v * (size - length + 1)).floor()
        position = torch.arange(size, device=device)
        inside.append((position >= start) & (position < start + length))  # (B, N, size)
    t, h, w = inside
    t, h = t[:, :, :, None, None], h[:, :, None, :, None]
    return t & h & w[:, :, None, None, :]  # (B, N, T, H, W)


def block_mask(batch, frames, height, width, blocks, device=None, generator=None):
    """Eq. 3: the union of N cuboids, drawn for each clip -> bool (B, T, H, W), True = hidden.

    Training calls `draw_blocks`, which keeps the cuboids apart for the noise of `hide`.
    """
    return cuboids(batch, frames, height, width, blocks, device, generator).any(dim=1)


def expected_ratio(frames, height, width, blocks):
    """The expected ratio of tokens that `block_mask` hides, in closed form (Table 2) -> float.

    A cuboid's three axes are independent, so it covers a token with probability c_t c_h c_w. The N
    cuboids are independent too, so all of them miss it with probability (1 - c_t c_h c_w)^N.
    """
    sizes = (frames, height, width)
    t, h, w = (_coverage(size, most) for size, most in zip(sizes, longest(*sizes)))
    covered = t[:, None, None] * h[None, :, None] * w[None, None, :]  # (T, H, W)
    return (1 - (1 - covered) ** blocks).mean().item()


def _coverage(size, most):
    """The probability that a random interval covers each position of an axis -> float64 (size,)."""
    length = torch.arange(1, most + 1, dtype=torch.float64)[:, None]  # (most, 1)
    position = torch.arange(size, dtype=torch.float64)[None, :]  # (1, size)
    first = (position - length + 1).clamp(min=0)  # the earliest start that reaches the position
    last = torch.minimum(position, size - length)  # the latest start that fits
    return ((last - first + 1) / (size - length + 1)).mean(dim=0)


@cache
def blocks_for(frames, height, width, target=0.15):
    """The number of cuboids whose expected ratio is closest to `target` (Table 2, bold) -> int.

    Raises UserError unless 0 < target < 1.
    """
    if not 0 < target < 1:
        raise UserError(f"a mask ratio lies between 0 and 1, not {target}")

    def distance(blocks):
        return abs(expected_ratio(frames, height, width, blocks) - target)

    blocks = 1
    while distance(blocks + 1) < distance(blocks):
        blocks += 1
    return blocks


# ---------------------------------------------------------------- i.i.d. masks


def iid_mask(batch, frames, height, width, ratio, device=None, generator=None):
    """Eq. 2: hides each token with probability `ratio` -> bool (B, T, H, W), True = hidden."""
    return torch.rand(batch, frames, height, width, device=device, generator=generator) < ratio


# ---------------------------------------------------------------- kinds of masks, by name


def draw_blocks(batch, shape, ratio, blocks=0, generator=None):
    """The cuboids of Eq. 3 without their union: `hide` draws its noise once for each cuboid."""
    blocks = blocks or blocks_for(*shape, ratio)
    return cuboids(batch, *shape, blocks, generator=generator)  # (B, N, T, H, W)


def draw_iid(batch, shape, ratio, blocks=0, generator=None):
    """Eq. 2. `blocks` has no meaning here."""
    return iid_mask(batch, *shape, ratio, generator=generator)  # (B, T, H, W)


# A kind is a function (batch, (T, H, W), ratio, blocks, generator) -> bool (B, T, H, W), True =
# hidden, or (B, N, T, H, W), whose union over N is hidden and where noise is drawn once for each N.
KINDS = {"block": draw_blocks, "iid": draw_iid}


# ---------------------------------------------------------------- what replaces a hidden token


def hide(tokens, mask, vocab_size, noise=False, generator=None):
    """Replaces hidden tokens -> int64 (B, T, H, W). PAD stays PAD.

    tokens: int64 (B, T, H, W). mask: as returned by a function in KINDS. A hidden token becomes
    MASK. With noise (Sec. G.3), 80% become MASK, 10% a random code, and 10% stay. As in the
    released code, this is drawn once for each cuboid of a block mask, else for each token.
    """
    hidden = union(mask) & (tokens != vocab_size + PAD)
    if not noise:
        return tokens.masked_fill(hidden, vocab_size + MASK)
    draw = noise_draws(mask, generator)  # (B, T, H, W)
    codes = torch.randint(vocab_size, tokens.shape, device=tokens.device, generator=generator)
    codes = torch.where(draw < 0.9, codes, tokens)
    codes = torch.where(draw < 0.8, vocab_size + MASK, codes)
    return torch.where(hidden, codes, tokens)


def union(mask):
    """A mask as returned by a function in KINDS -> bool (B, T, H, W), True = hidden."""
    return mask.any(dim=1) if mask.dim() == 5 else mask


def noise_draws(mask, generator=None):
    """A number for each token: below 0.8 MASK, below 0.9 a random code, else no change
    -> float (B, T, H, W).

    All tokens of a cuboid get the same number. Where cuboids overlap, the last one with a number
    below 0.9 decides, as in the released code.
    """
    if mask.dim() == 4:
        return torch.rand(mask.shape, device=mask.device, generator=generator)
    draw = torch.rand(*mask.shape[:2], 1, 1, 1, device=mask.device, generator=generator)
    draw = draw.where(mask & (draw < 0.9), 1)  # (B, N, T, H, W)
    replaces = (draw < 1).flip(1).int()
    # argmax finds the first of the cuboids in reverse order: (B, 1, T, H, W)
    last = mask.shape[1] - 1 - replaces.argmax(dim=1, keepdim=True)
    return draw.gather(1, last)[:, 0]


# ---------------------------------------------------------------- Table 2

PAPER_TABLE_2 = {  # (T, S): expected ratio in percent for 4 to 8 cuboids, and the number in bold
    (5, 128): ((11.9, 14.5, 17.0, 19.4, 21.7), 5),
    (5, 256): ((10.6, 13.1, 15.2, 17.5, 19.5), 6),
    (10, 128): ((10.4, 12.8, 15.0, 17.1, 19.2), 6),
    (10, 256): ((9.3, 11.4, 13.4, 15.4, 17.2), 7)}


def main():
    print("Table 2: the ratio of tokens that N cuboids hide, in percent")
    print("(paper / closed form / mean of 2,000 sampled clips).")
    print("* marks the number of cuboids nearest to 15%: the paper's choice and ours.\n")
    print("  T    S  map " + "".join(f"{f'N = {n}':^22}" for n in range(4, 9)))
    generator = torch.Generator().manual_seed(0)
    for (frames, pixels), (paper, bold) in PAPER_TABLE_2.items():
        shape = (frames, pixels // 8, pixels // 8)
        nearest = blocks_for(*shape)
        row = f"{frames:3d} {pixels:4d} {shape[1]:4d} "
        for n, ratio in zip(range(4, 9), paper):
            exact = 100 * expected_ratio(*shape, n)
            masks = (block_mask(250, *shape, n, generator=generator) for _ in range(8))
            sampled = sum(100 * mask.float().mean().item() for mask in masks) / 8
            row += f" {ratio:5.1f}{'*' if n == bold else ' '}"
            row += f"/{exact:5.1f}{'*' if n == nearest else ' '}/{sampled:5.1f}  "
        print(row.rstrip())


if __name__ == "__main__":
    main()
