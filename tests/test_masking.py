import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import masking
from plumbing.cli import UserError

V = 1000
PAD, MASK = V + 1, V + 4
sizes = st.integers(1, 12)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- which tokens


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, sizes, st.integers(0, 2**31))
def test_one_cuboid_has_the_allowed_size(frames, height, width, seed):
    for mask in masking.block_mask(20, frames, height, width, 1, generator=seeded(seed)):
        positions = mask.nonzero()
        sides = positions.amax(0) + 1 - positions.amin(0)
        assert mask.sum() == sides.prod()  # the hidden tokens fill their bounding box
        most = (2 * frames // 3, height // 2, width // 2)
        assert all(1 <= side <= max(1, limit) for side, limit in zip(sides.tolist(), most))


def test_every_length_and_every_start_is_equally_likely():
    mask = masking.block_mask(60000, 3, 6, 1, 1, generator=seeded(0))
    inside = mask[..., 0].any(dim=1)  # (60000, 6), rows
    length = inside.sum(dim=1)  # 1..3
    start = inside.int().argmax(dim=1)
    for n in (1, 2, 3):
        starts = start[length == n]
        assert len(starts) / 60000 == pytest.approx(1 / 3, abs=0.01)
        counts = torch.bincount(starts, minlength=7 - n) / len(starts)
        assert torch.allclose(counts, torch.full((7 - n,), 1 / (7 - n)), atol=0.015)


def test_clips_draw_their_own_masks_and_a_generator_repeats_them():
    a, b = (masking.block_mask(8, 5, 16, 16, 5, generator=seeded(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert len({tuple(mask.flatten().tolist()) for mask in a}) == 8


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(1, 6))
def test_the_closed_form_equals_the_mean_of_samples(frames, height, width, blocks):
    mask = masking.block_mask(4000, frames, height, width, blocks, generator=seeded(0))
    sampled = mask.float().mean().item()
    assert masking.expected_ratio(frames, height, width, blocks) == pytest.approx(sampled, abs=0.02)


@pytest.mark.parametrize("target", [0.15, 0.3, 0.6])
def test_blocks_for_comes_closest_to_the_ratio(target):
    distance = [abs(masking.expected_ratio(5, 8, 8, n) - target) for n in range(1, 60)]
    assert masking.blocks_for(5, 8, 8, target) == 1 + distance.index(min(distance))


@pytest.mark.parametrize("target", [0, 1, 1.5])
def test_blocks_for_refuses_an_impossible_ratio(target):
    with pytest.raises(UserError, match=str(target)):
        masking.blocks_for(5, 16, 16, target=target)


def test_iid_mask_hides_the_ratio_without_structure():
    mask = masking.iid_mask(500, 5, 8, 8, 0.15, generator=seeded(0)).float()
    assert mask.mean().item() == pytest.approx(0.15, abs=0.005)
    for axis in (0, 1, 2, 3):
        assert (mask * mask.roll(1, axis)).mean().item() == pytest.approx(0.15 ** 2, abs=0.003)


# ---------------------------------------------------------------- what replaces them


def test_hide_masks_hidden_tokens_and_nothing_else():
    tokens = torch.randint(V, (4, 5, 8, 8), generator=seeded(0))
    tokens[1, -1] = PAD
    for mask in (masking.cuboids(4, 5, 8, 8, 6, generator=seeded(0)),
                 masking.block_mask(4, 5, 8, 8, 6, generator=seeded(0))):
        replaced = masking.hide(tokens, mask, V)
        mask = masking.union(mask)
        assert (replaced[mask & (tokens != PAD)] == MASK).all()
        assert torch.equal(replaced[~mask], tokens[~mask])
        assert (replaced[1, -1] == PAD).all()


def test_noise_of_iid_masks_is_80_10_10_for_each_token():
    tokens = torch.randint(V, (50, 5, 8, 8), generator=seeded(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    replaced = masking.hide(tokens, mask, V, noise=True, generator=seeded(0))
    masked, kept = (replaced == MASK).float(), replaced == tokens
    assert masked.mean().item() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert (masked[..., 1:] * masked[..., :-1]).mean().item() == pytest.approx(0.64, abs=0.02)
    assert replaced[~kept & (masked == 0)].max() < V


def test_where_cuboids_overlap_the_last_one_decides_that_replaces_its_tokens():
    inside = masking.cuboids(50, 5, 8, 8, 6, generator=seeded(0))
    numbers = torch.rand(50, 6, generator=seeded(1))  # those that noise_draws will draw
    expected = torch.ones(50, 5, 8, 8)
    for clip, cuboid in itertools.product(range(50), range(6)):
        if numbers[clip, cuboid] < 0.9:
            expected[clip, inside[clip, cuboid]] = numbers[clip, cuboid]
    assert torch.equal(masking.noise_draws(inside, seeded(1)), expected)


def noise_by_cuboid(seed):
    """3,000 clips with one noisy cuboid each -> lengths (3000, 3) and kind (3000,) of the cuboids.

    Kinds: 0 MASK, 1 random codes, 2 kept.
    """
    generator = seeded(seed)
    tokens = torch.randint(V, (3000, 5, 8, 8), generator=generator)
    inside = masking.cuboids(3000, 5, 8, 8, 1, generator=generator)
    replaced = masking.hide(tokens, inside, V, noise=True, generator=generator)
    mask = masking.union(inside)
    assert torch.equal(replaced[~mask], tokens[~mask])
    hidden = mask.sum(dim=(1, 2, 3))
    masked, kept = (((replaced == code) & mask).sum(dim=(1, 2, 3)) for code in (MASK, tokens))
    kind = torch.where(masked == hidden, 0, torch.where(kept == hidden, 2, 1))
    assert ((masked == 0) | (kind == 0)).all()  # one kind throughout
    chance = 1 + hidden[kind == 1] // 20  # a random code is sometimes the true one
    assert (kept[kind == 1] <= chance).all()
    lengths = [mask.any(dim=axes).sum(dim=1) for axes in ((2, 3), (1, 3), (1, 2))]
    return torch.stack(lengths, dim=1), kind


def test_noise_of_block_masks_is_80_10_10_of_the_cuboids_whatever_their_size():
    samples = [noise_by_cuboid(seed) for seed in range(3)]
    lengths, kind = (torch.cat(parts) for parts in zip(*samples))
    for axis, most in enumerate(masking.longest(5, 8, 8)):
        for length in range(1, most + 1):
            kinds = kind[lengths[:, axis] == length]
            fractions = torch.bincount(kinds, minlength=3) / len(kinds)
            expected = torch.tensor([0.8, 0.1, 0.1])
            assert torch.allclose(fractions, expected, atol=0.03), (axis, length)


# ---------------------------------------------------------------- kinds


@pytest.mark.parametrize("kind, ratio, blocks, expected", [
    ("block", 0.15, 0, masking.expected_ratio(5, 8, 8, masking.blocks_for(5, 8, 8))),
    ("block", 0.4, 0, masking.expected_ratio(5, 8, 8, masking.blocks_for(5, 8, 8, 0.4))),
    ("block", 0.4, 2, masking.expected_ratio(5, 8, 8, 2)),
    ("iid", 0.15, 0, 0.15), ("iid", 0.4, 0, 0.4)])
def test_a_kind_hides_the_given_ratio(kind, ratio, blocks, expected):
    mask = masking.KINDS[kind](1000, (5, 8, 8), ratio, blocks, seeded(0))
    assert masking.union(mask).float().mean().item() == pytest.approx(expected, abs=0.012)
