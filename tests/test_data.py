"""What is sampled from a video, and in which order."""
import numpy as np
import pytest
from test_store import PAD, numbered, some_videos, write_store

import data
from plumbing.cli import UserError


def test_views_are_those_of_the_paper():
    views = data.views_for("train", 128)
    assert len(set(views)) == 12 and {resize for resize, _, _ in views} == {128, 160}
    assert not any(flip for _, _, flip in data.views_for("train", 128, "ssv2"))
    center = [(128, "center", False)]
    assert data.views_for("test", 128, "ssv2") == center == data.views_for("pretrain", 128)
    assert len(data.views_for("test", 128)) == 3


@pytest.mark.parametrize("length, count", [
    (7, 20), (20, 20), (40, 20), (41, 20), (1000, 20), (1000, 1), (999, 7)])
def test_the_few_frames_kept_of_a_long_video_are_spread_over_it(length, count):
    numbers = np.broadcast_to(np.arange(length, dtype=np.int64)[None, :, None], (1, length, 4))
    pieces = [(numbers[:, start:start + 9], None) for start in range(0, length, 9)]
    chosen = data.spread_frames(pieces, count, room=0)[:, 0]
    even = data.spread(count, length)
    assert len(chosen) == len(even) and np.abs(chosen - even).max() <= length / count
    assert length > 40 or chosen.tolist() == even.tolist()


def test_a_tokenizer_s_frames_come_from_all_videos_and_all_of_each(tmp_path, write_video):
    paths = [str(write_video(tmp_path / f"{i}.mp4", range(100 * i, 100 * i + 80, 5), width=128))
             for i in (0, 1)]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    frames, errors = data.sample_frames([*paths, str(tmp_path / "broken.mp4")], 8, 16, 30)
    level = np.sort(frames[:, 8, 8, 0].astype(int))
    assert frames.shape == (20, 16, 16, 3) and (level < 90).sum() == 10  # of 16 frames each
    assert [level[0], level[9], level[10], level[19]] == pytest.approx([0, 75, 100, 175], abs=4)
    assert len(errors) == 1 and "broken.mp4" in errors[0]
    with pytest.raises(UserError, match="16 frames are too few"):
        data.sample_frames(paths[:1], 8, 16, 30)
    with pytest.raises(UserError, match="none of the videos could be decoded.*broken.mp4"):
        data.sample_frames([str(tmp_path / "broken.mp4")], 8, 16, 30)


# ---------------------------------------------------------------- clips


@pytest.mark.parametrize("length, frames, stride, last", [
    (10, 5, 1, 5), (10, 5, 2, 1), (10, 5, 3, 0), (1, 5, 1, 0)])
def test_the_last_start_that_fits(length, frames, stride, last):
    assert data.last_start(length, frames, stride) == last


def test_the_stride_comes_closest_to_the_rate_asked_for(tmp_path):
    store = numbered(tmp_path, 3)  # 8 frames a second
    strides = [data.stride_for(store, fps) for fps in (2, 2.67, 3, 5, 6, 8, 30)]
    assert strides == [4, 3, 3, 2, 1, 1, 1]


def test_both_clips_of_a_short_video_start_with_it(tmp_path):
    pair = data.ClipPairs(numbered(tmp_path, 3), 5)[0, 0]
    assert pair[:, :, 0, 0].tolist() == [[0, 1, 2, PAD, PAD]] * 2


def test_pairs_cover_all_starts_and_strides_and_repeat(tmp_path):
    store = numbered(tmp_path, 20)
    pairs = data.ClipPairs(store, 4, strides=(1, 3))
    clips = np.stack([pairs[0, epoch] for epoch in range(400)])[..., 0, 0]  # (400, 2, 4)
    strides = clips[:, :, 1] - clips[:, :, 0]
    assert set(strides.flatten()) == {1, 2, 3}
    assert (np.diff(clips, axis=2) == strides[..., None]).all()
    for stride in (1, 2, 3):
        assert set(clips[strides == stride][:, 0]) == set(range(20 - 3 * stride))
    assert abs(np.corrcoef(clips[:, 0, 0], clips[:, 1, 0])[0, 1]) < 0.2  # drawn independently
    assert np.array_equal(pairs[0, 7], pairs[0, 7])


def test_d_max_limits_the_distance_of_the_starts(tmp_path):
    store = numbered(tmp_path, 60)  # 8 frames a second
    for d_max, most in ((1, 8), (0, 0)):
        pairs = data.ClipPairs(store, 4, d_max=d_max)
        starts = np.stack([pairs[0, epoch][:, 0, 0, 0] for epoch in range(200)])
        assert np.abs(starts[:, 0] - starts[:, 1]).max() == most


def test_fine_tuning_draws_every_view_and_subsamples(tmp_path):
    store = data.TokenStore(write_store(tmp_path / "s", some_videos()))
    clips = data.RandomClips(store, "other", 3, stride=2)
    seen = set()
    for epoch in range(60):
        clip, label = clips[4, epoch]
        assert label == 4
        matches = [(view, start) for view in range(2) for start in range(15)
                   if np.array_equal(clip, store.tokens(4, view)[start:start + 5:2])]
        assert len(matches) == 1
        seen.update(matches)
    assert {view for view, _ in seen} == {0, 1} and len({start for _, start in seen}) > 10


def test_even_clips_span_the_video(tmp_path):
    store = numbered(tmp_path, 25)
    starts = data.EvenClips(store, 5, 1, 5)[0][:, 0, 0, 0]
    assert starts.tolist() == [0, 5, 10, 15, 20] * 2  # two views
    assert data.EvenClips(store, 5, 1, 1)[0][0, 0, 0, 0] == 10  # one clip: the middle
    assert data.EvenClips(store, 5, 3, 3)[0][1, :, 0, 0].tolist() == [6, 9, 12, 15, 18]
    starts = data.EvenClips(numbered(tmp_path, 12), 5, 1, 5)[0][:5, 0, 0, 0]
    assert starts.tolist() == [0, 1, 3, 5, 7]  # the frame below, as in the released code


def test_even_clips_of_some_views_are_those_of_all(tmp_path):
    store = data.TokenStore(write_store(tmp_path / "s", some_videos()))
    every = data.EvenClips(store, 3, 1, 4)[4]  # (2 views * 4 clips, 3, 2, 2)
    for view in range(2):
        some = data.EvenClips(store, 3, 1, 4, views=[view])[4]
        assert np.array_equal(some, every[4 * view:4 * view + 4])


# ---------------------------------------------------------------- which videos, in which order


@pytest.mark.parametrize("videos, count, expected", [
    (2000, 128, 128), (100, 128, 10), (9, 128, 0), (100, 0, 0)])
def test_at_most_a_tenth_is_held_out_and_spread(videos, count, expected):
    kept, held_out = data.hold_out(videos, count)
    assert len(held_out) == expected and sorted([*kept, *held_out]) == list(range(videos))
    gaps = np.diff([-1, *held_out, videos]) if expected else []
    assert all(gap <= videos / (expected - 1) + 1 for gap in gaps)


def test_few_labels_are_as_many_of_every_class_and_no_video_twice():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], 25))
    for count in (4, 20, 40, 100):
        chosen = data.few_labels(labels, count, seed=1)
        assert len(set(chosen)) == len(chosen) == count
        assert np.bincount(labels[chosen]).tolist() == [count // 4] * 4
        assert np.array_equal(chosen, data.few_labels(labels, count, seed=1))
    assert set(data.few_labels(labels, 20, seed=1)) != set(data.few_labels(labels, 20, seed=2))
    for count in (0, 1000):
        assert sorted(data.few_labels(labels, count)) == list(range(100))


def test_few_labels_hold_every_class_in_proportion():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [60, 30, 10]))
    for count in (10, 20, 50):
        counts = np.bincount(labels[data.few_labels(labels, count)], minlength=3)
        assert np.abs(counts - count * np.array([0.6, 0.3, 0.1])).max() <= 1


def test_batches_are_shared_by_processes_and_resumed():
    videos = np.arange(10, 30, 2)
    whole = list(data.Batches(videos, 4, steps=7, seed=3))
    assert all(len(batch) == 4 for batch in whole)
    halves = [list(data.Batches(videos, 4, steps=7, seed=3, rank=rank, world=2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves)] == [sorted(batch) for batch in whole]
    assert list(data.Batches(videos, 4, steps=7, first_step=5, seed=3)) == whole[5:]
    for first, second in zip(whole[::2], whole[1::2]):
        assert len(set(first + second)) == 8  # an epoch repeats no video
    assert [video for video, _ in whole[0]] != [video for video, _ in whole[2]]


def test_batches_draw_all_the_videos_given_and_no_other():
    batches = data.Batches(np.arange(10, 30, 2), 4, steps=40)
    assert {video for batch in batches for video, _ in batch} == set(range(10, 30, 2))


def test_the_first_finished_store_is_opened(tmp_path):
    for name in ("train1", "test"):
        write_store(tmp_path / name, some_videos(1))
    write_store(tmp_path / "train", some_videos(1), finish=False)
    assert data.open_store(tmp_path, "train", "train1", "test").path.name == "train1"
    assert data.open_store(tmp_path, "test", "train1").path.name == "test"
    with pytest.raises(UserError, match=r"at .*val: .* or take one of .*/test, .*/train1$"):
        data.open_store(tmp_path, "val", "train")
