"""Which tokens are hidden: block masking (Eq. 3) and i.i.d. masking (Eq. 2).

A video's neighbouring tokens look alike, so a token hidden alone can be copied from beside it. VIMPAC hides
whole spatio-temporal cuboids, whose insides can only be predicted.

    python masking.py        the paper's Table 2 beside the closed form and beside a sample

Shapes: B clips, T frames, H x W tokens a frame, N cuboids a clip.
"""
import torch

PAD, MASK = 1, 4  # special ids, counted from vocab_size: 8193 and 8196 with the paper's 8192 codes


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


def blocks_for(frames, height, width, target=0.15):
    """The number of cuboids whose expected ratio is closest to `target` (Table 2's bold cells) -> int.

    Raises ValueError unless 0 < target < 1.
    """
    if not 0 < target < 1:
        raise ValueError(f"a mask ratio lies between 0 and 1, not {target}")
    blocks = 1
    while abs(expected_ratio(frames, height, width, blocks + 1) - target) < \
            abs(expected_ratio(frames, height, width, blocks) - target):
        blocks += 1
    return blocks


def hide(tokens, mask, vocab_size, noise=False, generator=None):
    """Replaces the masked tokens -> int64 (B, T, H, W). PAD is left as it is.

    tokens: int64 (B, T, H, W). mask: bool (B, T, H, W), or (B, N, T, H, W) from `cuboids`.
    noise: Sec. G.3's variant: 80% become MASK, 10% random codes, 10% stay what they are. The released code draws
    this once per cuboid, so pass `cuboids`; with a (B, T, H, W) mask every token draws for itself.
    """
    per_cuboid = mask.dim() == 5
    hidden = (mask.any(dim=1) if per_cuboid else mask) & (tokens != vocab_size + PAD)  # (B, T, H, W)
    masked = torch.full_like(tokens, vocab_size + MASK)
    if noise:
        shape = (*mask.shape[:2], 1, 1, 1) if per_cuboid else tokens.shape
        draw = torch.rand(shape, device=tokens.device, generator=generator)  # (B, N, 1, 1, 1) or (B, T, H, W)
        if per_cuboid:  # where cuboids overlap, the last one decides
            last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1, keepdim=True)  # (B, 1, T, H, W)
            draw = draw.expand(mask.shape).gather(1, last)[:, 0]  # (B, T, H, W)
        random = torch.randint(vocab_size, tokens.shape, device=tokens.device, generator=generator)
        masked = torch.where(draw < 0.8, masked, torch.where(draw < 0.9, random, tokens))
    return torch.where(hidden, masked, tokens)


PAPER_TABLE_2 = {  # (T, S): expected ratio in percent for 4, 5, 6, 7 and 8 cuboids, and the number in bold
    (5, 128): ((11.9, 14.5, 17.0, 19.4, 21.7), 5),
    (5, 256): ((10.6, 13.1, 15.2, 17.5, 19.5), 6),
    (10, 128): ((10.4, 12.8, 15.0, 17.1, 19.2), 6),
    (10, 256): ((9.3, 11.4, 13.4, 15.4, 17.2), 7),
}


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
