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


def random_clips(videos, frames=5, side=8, seed=0):
    return torch.randint(V, (videos, 2, frames, side, side), generator=seeded(seed))


# ---------------------------------------------------------------- which tokens


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, sizes, st.integers(0, 2**31))
def test_one_cuboid_is_a_box_of_the_allowed_size(frames, height, width, seed):
    for mask in masking.block_mask(20, frames, height, width, 1, generator=seeded(seed)):
        places = mask.nonzero()
        box = places.amax(0) + 1 - places.amin(0)
        assert mask.sum() == box.prod()  # the hidden tokens fill their bounding box: it is one cuboid
        assert all(1 <= side <= max(1, most) for side, most in
                   zip(box.tolist(), (2 * frames // 3, height // 2, width // 2)))


def test_every_length_and_every_start_is_equally_likely():
    inside = masking.block_mask(60000, 3, 6, 1, 1, generator=seeded(0))[..., 0].any(dim=1)  # (60000, 6), rows
    length = inside.sum(dim=1)  # 1..3
    start = inside.int().argmax(dim=1)
    for n in (1, 2, 3):
        own = start[length == n]
        assert len(own) / 60000 == pytest.approx(1 / 3, abs=0.01)
        counts = torch.bincount(own, minlength=7 - n) / len(own)
        assert torch.allclose(counts, torch.full((7 - n,), 1 / (7 - n)), atol=0.015)


def test_clips_draw_their_own_masks_and_a_generator_repeats_them():
    a, b = (masking.block_mask(8, 5, 16, 16, 5, generator=seeded(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert len({tuple(mask.flatten().tolist()) for mask in a}) == 8


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(1, 6))
def test_closed_form_is_what_sampling_gives(frames, height, width, blocks):
    sampled = masking.block_mask(4000, frames, height, width, blocks, generator=seeded(0)).float().mean().item()
    assert masking.expected_ratio(frames, height, width, blocks) == pytest.approx(sampled, abs=0.02)


@pytest.mark.parametrize("target", [0.15, 0.3, 0.6])
def test_blocks_for_comes_closest_to_the_ratio(target):
    distance = [abs(masking.expected_ratio(5, 8, 8, n) - target) for n in range(1, 60)]
    assert masking.blocks_for(5, 8, 8, target) == 1 + distance.index(min(distance))


@pytest.mark.parametrize("target", [0, 1, 1.5])
def test_blocks_for_refuses_a_ratio_that_is_none(target):
    with pytest.raises(UserError, match=str(target)):
        masking.blocks_for(5, 16, 16, target=target)


def test_iid_mask_hides_the_ratio_without_structure():
    mask = masking.iid_mask(500, 5, 8, 8, 0.15, generator=seeded(0)).float()
    assert mask.mean().item() == pytest.approx(0.15, abs=0.005)
    for axis in (0, 1, 2, 3):
        assert (mask * mask.roll(1, axis)).mean().item() == pytest.approx(0.15 ** 2, abs=0.003)


# ---------------------------------------------------------------- what stands in their place


def test_hide_masks_what_is_hidden_and_nothing_else():
    tokens = torch.randint(100, (4, 5, 8, 8), generator=seeded(0))
    tokens[1, -1] = 101  # a frame of PAD
    mask = masking.block_mask(4, 5, 8, 8, 6, generator=seeded(0))
    hidden = masking.hide(tokens, mask, 100)
    assert (hidden[mask & (tokens != 101)] == 104).all()
    assert torch.equal(hidden[~mask], tokens[~mask])
    assert (hidden[1, -1] == 101).all()


def test_hide_with_noise_draws_for_every_token():
    tokens = torch.randint(V, (50, 5, 8, 8), generator=seeded(1))
    hidden = masking.hide(tokens, torch.ones_like(tokens, dtype=torch.bool), V, noise=True, generator=seeded(0))
    masked, kept = (hidden == MASK).float(), hidden == tokens
    assert masked.mean().item() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert (masked[..., 1:] * masked[..., :-1]).mean().item() == pytest.approx(0.64, abs=0.02)
    assert hidden[~kept & (masked == 0)].max() < V


def test_where_cuboids_overlap_the_last_decides_that_does_not_leave_its_tokens():
    boxes = masking.cuboids(50, 5, 8, 8, 6, generator=seeded(0))
    numbers = torch.rand(50, 6, generator=seeded(1))  # those that cuboid_draws will draw
    expected = torch.ones(50, 5, 8, 8)
    for clip, cuboid in itertools.product(range(50), range(6)):
        if numbers[clip, cuboid] < 0.9:
            expected[clip, boxes[clip, cuboid]] = numbers[clip, cuboid]
    assert torch.equal(masking.cuboid_draws(boxes, seeded(1)), expected)


def kinds_of_cuboids(seed):
    """Of 3,000 clips with one noisy cuboid each -> its lengths (3000, 3), kind (3000,): 0 MASK, 1 random, 2 left."""
    torch.manual_seed(seed)  # as a training step seeds it, so that numbers from there would follow the generator's
    clips = random_clips(1500)
    batch = masking.prepare(clips, V, blocks=1, noise=True, generator=seeded(seed))
    hidden = batch.mask.sum(dim=(1, 2, 3))
    masked, kept = (((batch.inputs == code) & batch.mask).sum(dim=(1, 2, 3)) for code in (MASK, batch.tokens))
    kind = torch.where(masked == hidden, 0, torch.where(kept == hidden, 2, 1))
    assert ((masked == 0) | (kind == 0)).all()  # one kind throughout
    assert (kept[kind == 1] <= 1 + hidden[kind == 1] // 20).all()  # a random code is now and then the right one
    lengths = [batch.mask.any(dim=axes).sum(dim=1) for axes in ((2, 3), (1, 3), (1, 2))]
    return torch.stack(lengths, dim=1), kind


def test_noise_is_80_10_10_of_the_cuboids_whatever_their_size():
    found = [kinds_of_cuboids(seed) for seed in range(3)]
    lengths, kind = (torch.cat(parts) for parts in zip(*found))
    for axis, most in enumerate(masking.longest(5, 8, 8)):
        for length in range(1, most + 1):
            own = kind[lengths[:, axis] == length]
            shares = torch.bincount(own, minlength=3) / len(own)
            assert torch.allclose(shares, torch.tensor([0.8, 0.1, 0.1]), atol=0.03), (axis, length, shares)


# ---------------------------------------------------------------- a batch


def every_way(test):
    return pytest.mark.parametrize("noise", [False, True])(pytest.mark.parametrize("kind", ["block", "iid"])(test))


@every_way
def test_two_processes_hide_what_one_process_hides(kind, noise):
    clips = random_clips(6)
    clips[1, 0, -1] = PAD
    alone = masking.prepare(clips, V, kind, noise=noise, generator=seeded(0))
    for rank in range(2):
        own = masking.prepare(clips[rank::2], V, kind, noise=noise, generator=seeded(0), rank=rank, world=2)
        for part, whole in zip(own[:3], alone[:3]):
            assert torch.equal(part, whole.unflatten(0, (2, 6))[:, rank::2].flatten(0, 1))
        assert own.padded.tolist() == [rank == 1] + [False] * 5


@every_way
def test_the_first_clips_come_before_the_second_and_a_seed_repeats_the_masks(kind, noise):
    clips = random_clips(40)
    a, b, c = (masking.prepare(clips, V, kind, noise=noise, generator=seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(a.tokens, torch.cat([clips[:, 0], clips[:, 1]])) and not a.padded.any()
    assert torch.equal(a.mask, b.mask) and torch.equal(a.inputs, b.inputs)
    assert not torch.equal(a.mask, c.mask) and not torch.equal(a.inputs, c.inputs)
    assert torch.equal(a.inputs[~a.mask], a.tokens[~a.mask])
    assert ((a.inputs[a.mask] == MASK).float().mean() < 0.95) == noise


@every_way
def test_padding_is_neither_predicted_nor_replaced(kind, noise):
    clips = random_clips(20)
    clips[::2, 0, -2:] = PAD
    clips[3, 1] = PAD
    batch = masking.prepare(clips, V, kind, ratio=0.5, noise=noise, generator=seeded(0))
    pad = batch.tokens == PAD
    assert torch.equal(batch.padded, pad.flatten(1).any(dim=1)) and not (batch.mask & pad).any()
    assert (batch.inputs[pad] == PAD).all() and (batch.inputs[~pad] != PAD).all()
    assert batch.mask[~pad].float().mean() > 0.4


@pytest.mark.parametrize("asked, expected", [
    ({}, masking.expected_ratio(5, 8, 8, masking.blocks_for(5, 8, 8))), (dict(kind="iid"), 0.15),
    (dict(ratio=0.4), masking.expected_ratio(5, 8, 8, masking.blocks_for(5, 8, 8, 0.4))),
    (dict(blocks=2, ratio=0.4), masking.expected_ratio(5, 8, 8, 2)), (dict(kind="iid", ratio=0.4), 0.4)])
def test_a_batch_hides_the_share_asked_for(asked, expected):
    batch = masking.prepare(random_clips(500), V, generator=seeded(0), **asked)
    assert batch.mask.float().mean().item() == pytest.approx(expected, abs=0.012)
