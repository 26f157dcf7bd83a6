import pytest
import torch
from hypothesis import given, settings, strategies as st

import masking

sizes = st.integers(1, 12)


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, sizes, st.integers(0, 2**31))
def test_one_cuboid_is_a_box_of_the_allowed_size(frames, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = masking.block_mask(20, frames, height, width, 1, generator=generator)
    for mask in masks:
        places = mask.nonzero()
        low, high = places.amin(0), places.amax(0) + 1
        box = high - low
        assert mask.sum() == box.prod()  # the hidden tokens fill their bounding box: it is one cuboid
        assert all(1 <= side <= max(1, most) for side, most in
                   zip(box.tolist(), (2 * frames // 3, height // 2, width // 2)))


def test_every_length_and_every_start_is_equally_likely():
    generator = torch.Generator().manual_seed(0)
    inside = masking.block_mask(60000, 3, 6, 1, 1, generator=generator)[..., 0].any(dim=1)  # (60000, 6), rows
    length = inside.sum(dim=1)  # 1..3
    start = inside.int().argmax(dim=1)
    for n in (1, 2, 3):
        own = start[length == n]
        assert len(own) / 60000 == pytest.approx(1 / 3, abs=0.01)
        counts = torch.bincount(own, minlength=7 - n) / len(own)
        assert torch.allclose(counts, torch.full((7 - n,), 1 / (7 - n)), atol=0.015)


def test_clips_draw_their_own_masks_and_a_generator_repeats_them():
    a, b = (masking.block_mask(8, 5, 16, 16, 5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert len({tuple(mask.flatten().tolist()) for mask in a}) == 8


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(1, 6))
def test_closed_form_is_what_sampling_gives(frames, height, width, blocks):
    sampled = masking.block_mask(8000, frames, height, width, blocks,
                                 generator=torch.Generator().manual_seed(0)).float().mean().item()
    assert masking.expected_ratio(frames, height, width, blocks) == pytest.approx(sampled, abs=0.02)


def test_blocks_for_refuses_a_ratio_that_is_none():
    with pytest.raises(ValueError, match="1.5"):
        masking.blocks_for(5, 16, 16, target=1.5)


def test_iid_mask_hides_the_ratio_without_structure():
    mask = masking.iid_mask(500, 5, 8, 8, 0.15, generator=torch.Generator().manual_seed(0)).float()
    assert mask.mean().item() == pytest.approx(0.15, abs=0.005)
    beside = (mask[..., 1:] * mask[..., :-1]).mean().item()
    assert beside == pytest.approx(0.15 ** 2, abs=0.003)


def test_hide_masks_what_is_hidden_and_nothing_else():
    tokens = torch.randint(100, (4, 5, 8, 8))
    tokens[1, -1] = 101  # a frame of PAD
    mask = masking.block_mask(4, 5, 8, 8, 6)
    hidden = masking.hide(tokens, mask, 100)
    assert (hidden[mask & (tokens != 101)] == 104).all()
    assert torch.equal(hidden[~mask], tokens[~mask])
    assert (hidden[1, -1] == 101).all()


def test_noise_is_drawn_once_for_a_cuboid():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, (4000, 5, 8, 8), generator=generator)
    cuboids = masking.cuboids(4000, 5, 8, 8, 1, generator=generator)
    hidden = masking.hide(tokens, cuboids, 1000, noise=True, generator=generator)
    kinds = torch.zeros(3)
    for before, after, inside in zip(tokens, hidden, cuboids[:, 0]):
        before, after = before[inside], after[inside]
        kept, masked = (after == before).float().mean(), (after == 1004).float().mean()
        kind = 0 if masked == 1 else 1 if kept == 1 else 2
        assert kind != 2 or (masked == 0 and (kept < 0.5 or len(before) < 4))  # a cuboid of one kind throughout
        kinds[kind] += 1
    assert torch.allclose(kinds / 4000, torch.tensor([0.8, 0.1, 0.1]), atol=0.015)  # MASK, left as it is, random
    assert hidden.max() == 1004 and torch.equal(hidden[~cuboids[:, 0]], tokens[~cuboids[:, 0]])


def test_noise_without_cuboids_is_drawn_for_every_token():
    tokens = torch.randint(1000, (50, 5, 8, 8))
    hidden = masking.hide(tokens, torch.ones(50, 5, 8, 8, dtype=torch.bool), 1000, noise=True)
    assert (hidden == 1004).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (hidden == tokens).float().mean().item() == pytest.approx(0.1, abs=0.02)
