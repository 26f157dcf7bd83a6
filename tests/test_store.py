"""The token store on the disk: what is written is read, and damage is noticed."""
import json
import os
import pickle
import time

import numpy as np
import pytest
from conftest import write_index
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from plumbing import store as store_module
from plumbing.cli import UserError
from plumbing.store import PartWriter, TokenStore, check_alike, check_parts, read_parts

SETTINGS = {"tokenizer": "t.pt", "fingerprint": "0123456789ab", "vocab_size": 100, "fps": 8,
            "size": 16, "height": 2, "width": 2,
            "views": [[16, "center", False], [16, "center", True]], "resampling": "r"}
PAD = 101


def write_part(path, videos, root="/videos", **changed):
    """videos: {name: tokens (views, F, 2, 2)}. changed: settings other than SETTINGS."""
    writer = PartWriter(path, {**SETTINGS, **changed}, root)
    for name, tokens in videos.items():
        writer.add(name, size=1, mtime=1, tokens=tokens)
    writer.close()


def write_store(path, videos, finish=True, root="/videos", **changed):
    """A store of two parts, of one video and of all others. videos: {name: (tokens, labels)}."""
    tokens = {name: tokens for name, (tokens, _) in videos.items()}
    first = dict(list(tokens.items())[:1])
    write_part(path, first, root, **changed)
    write_part(path, {name: tokens[name] for name in tokens.keys() - first.keys()}, root, **changed)
    if finish:
        labels = [(name, labels) for name, (_, labels) in videos.items()]
        write_index(path, {**SETTINGS, **changed}, labels, root)
    return path


def some_videos(count=5, seed=0):
    random = np.random.default_rng(seed)
    return {f"class {i}/v#{i}é.mp4": (random.integers(100, size=(2, 3 + 4 * i, 2, 2)),
                                      {"label": i % 2, "other": i}) for i in range(count)}


def numbered(tmp_path, frames):
    """A store of one video whose tokens are the frame's number."""
    tokens = np.broadcast_to(np.arange(frames)[:, None, None], (2, frames, 2, 2))
    videos = {"v.mp4": (tokens, {"label": 0})}
    return TokenStore(write_store(tmp_path / f"store{frames}", videos))


def content(store):
    labels = store.labels()
    return store.header, [(store.name(i), store.tokens(i, 1).tolist(), int(labels[i]))
                          for i in range(len(store))]


def test_a_store_returns_what_was_written(tmp_path):
    videos = some_videos()
    path = write_store(tmp_path / "s", videos)
    store = TokenStore(path)
    assert len(list(path.glob("part-*.npy"))) == 2
    assert len(store) == 5 and store.label_sets() == ["label", "other"]
    for i, (name, (tokens, labels)) in enumerate(videos.items()):
        assert store.name(i) == name
        assert [store.labels(key)[i] for key in labels] == list(labels.values())
        for view in range(2):
            assert np.array_equal(store.tokens(i, view), tokens[view])
    assert store.header == {**SETTINGS, "root": "/videos", "classes": None}
    assert "5 videos of 55 frames" in check_parts(store)


NAMES = st.binary(min_size=1, max_size=20).filter(
    lambda name: not set(name) & set(b"/\0") and name.strip(b"."))


@settings(max_examples=60, deadline=None)
@given(lengths=st.dictionaries(NAMES.map(os.fsdecode), st.integers(1, 9), min_size=1, max_size=6),
       start=st.integers(0, 9), stride=st.integers(1, 4))
def test_any_name_length_and_clip(tmp_path_factory, lengths, start, stride):
    random = np.random.default_rng(start)
    videos = {name: (random.integers(100, size=(2, frames, 2, 2)), {"label": i})
              for i, (name, frames) in enumerate(lengths.items())}
    store = TokenStore(write_store(tmp_path_factory.mktemp("any") / "s", videos))
    assert [store.name(i) for i in range(len(store))] == list(videos)
    for i, (tokens, _) in enumerate(videos.values()):
        assert np.array_equal(np.stack([store.tokens(i, view) for view in range(2)]), tokens)
        padded = np.concatenate([tokens[1], np.full((40, 2, 2), PAD)])
        assert np.array_equal(store.cut(i, start, 5, stride, 1), padded[start:][:5 * stride:stride])


@pytest.mark.parametrize("bytes_, seconds, parts", [
    (2**20, 60, [5]), (8 * 4 * (3 + 7), 60, [2, 1, 1, 1]), (2**20, 0, [1, 1, 1, 1, 1])])
def test_a_part_ends_when_it_is_large_or_old(tmp_path, monkeypatch, bytes_, seconds, parts):
    monkeypatch.setattr(store_module, "PART_BYTES", bytes_ // 2)
    monkeypatch.setattr(store_module, "PART_SECONDS", seconds)
    write_part(tmp_path, {name: tokens for name, (tokens, _) in some_videos().items()})
    counts = {}
    for copies in read_parts(tmp_path, SETTINGS).values():
        counts[copies[0].part] = counts.get(copies[0].part, 0) + 1
    assert sorted(counts.values(), reverse=True) == parts


@pytest.mark.parametrize("changed, reason", [
    (dict(fps=2), "fps 8, not 2"), (dict(views=SETTINGS["views"][:1]), "views"),
    (dict(fingerprint="ba9876543210"), "fingerprint '0123456789ab', not 'ba9876543210'")])
def test_parts_of_other_settings_are_refused(tmp_path, changed, reason):
    write_part(tmp_path, {"v.mp4": np.zeros((2, 3, 2, 2))})
    with pytest.raises(UserError, match=f"{tmp_path} was made with {reason}"):
        read_parts(tmp_path, {**SETTINGS, **changed})


def test_a_missing_or_unfinished_store_is_refused(tmp_path):
    unfinished = write_store(tmp_path / "half", some_videos(), finish=False)
    for path in (tmp_path / "none", unfinished):
        with pytest.raises(UserError, match=f"{path}.*tokenize"):
            TokenStore(path)


def test_unknown_labels_are_refused_with_the_existing_ones_named(tmp_path):
    store = TokenStore(write_store(tmp_path / "s", some_videos()))
    with pytest.raises(UserError, match="'motion': it has label, other"):
        store.labels("motion")


def test_a_clip_beyond_the_end_is_padded_with_whole_frames(tmp_path):
    clip = numbered(tmp_path, 4).cut(0, 1, 5, 2)
    assert clip[:, 0, 0].tolist() == [1, 3, PAD, PAD, PAD] and (clip[2:] == PAD).all()


def test_a_clip_comes_from_the_requested_view(tmp_path):
    videos = some_videos()
    store = TokenStore(write_store(tmp_path / "s", videos))
    tokens, _ = list(videos.values())[4]
    for view in range(2):
        assert np.array_equal(store.cut(4, 3, 4, 2, view), tokens[view][3:10:2])


@pytest.mark.parametrize("kind, dataset, views", [
    ("train", "ucf101", 12), ("train", "ssv2", 6), ("test", "ucf101", 3), ("pretrain", None, 1)])
def test_the_centre_view(tmp_path, kind, dataset, views):
    listed = data.views_for(kind, 16, dataset)
    number = np.arange(len(listed))[:, None, None, None]  # of the view
    tokens = np.broadcast_to(number, (len(listed), 3, 2, 2))
    as_lists = [list(view) for view in listed]
    store = TokenStore(write_store(tmp_path / "s", {"v.mp4": (tokens, {})}, views=as_lists))
    assert store.views == views
    assert listed[store.cut(0, 0, 1, 1, store.center_view())[0, 0, 0]] == (16, "center", False)


def test_opening_a_large_store_reads_no_tokens(tmp_path, monkeypatch):
    """A loader process receives neither the names nor any tokens."""
    path = write_store(tmp_path / "s", {"v.mp4": (np.zeros((2, 50000, 2, 2)), {"label": 0})})
    monkeypatch.setattr(store_module, "read_bytes", None)
    start = time.perf_counter()
    store = TokenStore(path)
    assert time.perf_counter() - start < 1 and store.name(0) == "v.mp4"
    assert len(pickle.dumps(store)) < 5000


def test_a_clip_reads_only_its_frames(tmp_path, monkeypatch):
    """Threads and forked processes share no position in the file."""
    videos = some_videos()
    store = TokenStore(write_store(tmp_path / "s", videos))
    sizes, read_bytes = [], store_module.read_bytes

    def record(path, start, size):
        sizes.append(size)
        return read_bytes(path, start, size)

    monkeypatch.setattr(store_module, "read_bytes", record)
    for i in reversed(range(5)):
        tokens, _ = list(videos.values())[i]
        assert np.array_equal(store.cut(i, 1, 2, 1, view=1), tokens[1, 1:3])
    assert sizes == [2 * 2 * 4] * 5  # two frames of four tokens of two bytes


@pytest.mark.parametrize("kind", ["short", "gone"])
def test_a_part_that_is_lost_while_the_store_is_open_is_named(tmp_path, kind):
    path = write_store(tmp_path / "s", some_videos())
    store = TokenStore(path)
    for file in path.glob("part-*.npy"):
        damage(file, kind)
    with pytest.raises(UserError, match="part-.*npy is missing or too short: .* tokenise again"):
        store.cut(0, 0, 3, 1, view=1)


# ---------------------------------------------------------------- damaged stores


def damage(path, kind):
    before, middle = path.read_bytes(), path.stat().st_size // 2
    if kind == "gone":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "short":
        path.write_bytes(before[:middle])
    else:
        changed = bytes([before[middle] ^ 1])
        path.write_bytes(before[:middle] + changed + before[middle + 1:])


def files_of(path):
    return sorted(file for file in path.iterdir())


@pytest.mark.parametrize("file", ["part-*.npy", "part-*.json", "index.npz"])
@pytest.mark.parametrize("kind", ["empty", "short", "gone", "changed"])
def test_a_damaged_store_is_refused_with_the_file_named(tmp_path, kind, file):
    """Opening reads no tokens: `check_parts` notices a changed byte of them."""
    path = write_store(tmp_path / "s", some_videos())
    damaged = min(path.glob(file))
    damage(damaged, kind)
    named = "no finished" if (kind, file) == ("gone", "index.npz") else damaged.name
    with pytest.raises(UserError, match=named):
        check_parts(TokenStore(path))


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_gives_an_error_or_the_same_store(tmp_path, seed):
    random = np.random.default_rng(seed)
    path = write_store(tmp_path / "s", some_videos())
    before = content(TokenStore(path))
    file = random.choice(files_of(path))
    damaged = bytearray(file.read_bytes())
    for _ in range(random.integers(1, 4)):
        damaged[random.integers(len(damaged))] = random.integers(256)
    file.write_bytes(damaged)
    try:
        store = TokenStore(path)
        check_parts(store)
        assert content(store) == before
    except UserError as error:
        assert file.name in str(error) and len(str(error).splitlines()) == 1


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_part_costs_time_and_no_tokens(tmp_path, seed):
    """The videos of a part whose .json is damaged count as not tokenised."""
    random = np.random.default_rng(seed)
    videos = {name: tokens for name, (tokens, _) in some_videos().items()}
    write_part(tmp_path, videos)
    file, = tmp_path.glob("part-*.json")
    before = damaged = file.read_bytes()
    while damaged == before:
        damaged = bytearray(before)
        for _ in range(random.integers(1, 4)):
            damaged[random.integers(len(damaged))] = random.integers(256)
        damaged = damaged[:random.integers(len(damaged) // 2, len(damaged) + 1)]
    file.write_bytes(damaged)
    if (parts := read_parts(tmp_path, SETTINGS)):  # such as spaces between the fields
        assert json.loads(damaged) == json.loads(before)
    assert len(parts) in (0, 5)


def test_a_digit_of_a_part_that_changes_gives_no_other_tokens(tmp_path):
    write_part(tmp_path, {name: tokens for name, (tokens, _) in some_videos().items()})
    file, = tmp_path.glob("part-*.json")
    file.write_text(file.read_text().replace('"offset": 24,', '"offset": 16,'))
    assert read_parts(tmp_path, SETTINGS) == {}


def test_a_part_without_its_json_does_not_count(tmp_path):
    """A kill between the two files of a part leaves the .npy."""
    path = write_store(tmp_path / "s", some_videos())
    before = content(TokenStore(path))
    (path / "part-0.npy").write_bytes(b"\1" * 7)
    assert len(read_parts(path, SETTINGS)) == 5 and content(TokenStore(path)) == before


def test_tokens_beyond_the_vocabulary_never_reach_a_model(tmp_path):
    path = write_store(tmp_path / "s", some_videos())
    for file in path.glob("part-*.npy"):
        tokens = np.load(file)
        tokens[:] = 65535
        np.save(file, tokens)
    with pytest.raises(UserError, match="has 65535 for a token of class 2/.*, .* ends at 99"):
        TokenStore(path).cut(2, 0, 3, 1)
    with pytest.raises(UserError, match="at most 65531"):
        write_part(tmp_path / "large", {}, vocab_size=65537)


@pytest.mark.parametrize("key", ["fingerprint", "resampling"])
def test_stores_that_were_made_differently_are_refused_together(tmp_path, key):
    stores = [TokenStore(write_store(tmp_path / str(i), some_videos(), **{key: value}))
              for i, value in enumerate("aab")]
    check_alike(*stores[:2])
    with pytest.raises(UserError, match=f"{tmp_path}/0 and {tmp_path}/2 .* {key} is 'a' and 'b'"):
        check_alike(*stores)
