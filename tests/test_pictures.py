import numpy as np

from plumbing import pictures


def test_equal_tokens_have_equal_colours_in_every_picture():
    first, second = np.array([[3, 5], [5, 3]]), np.array([[5, 0], [511, 3]])
    a, b = pictures.token_colours(first), pictures.token_colours(second)
    assert a.shape == (2, 2, 3) and a.dtype == np.uint8
    assert (a[0, 0] == a[1, 1]).all()
    assert (a[0, 1] == a[1, 0]).all()
    assert (a[0, 0] == b[1, 1]).all()
    assert len(np.unique(b.reshape(-1, 3), axis=0)) == 4


def test_a_pattern_covers_only_the_hidden_tokens():
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    mask = np.array([[[True, False], [False, False]]])
    drawn = pictures.chequered(frames, mask)
    assert (drawn[0, :8, :8] > 100).all() and not drawn[0, 8:].any() and not drawn[0, :, 8:].any()
