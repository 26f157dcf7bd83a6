"""The token store on the disk: what is written is read, whatever happened in between."""
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from plumbing.cli import UserError
from plumbing.store import TokenStore, check_alike
from plumbing.writer import StoreWriter, check_tokens, read_journals

HEADER = {"tokenizer": "t.pt", "fingerprint": "0123456789ab", "arithmetic": "float32", "vocab_size": 100, "fps": 8,
          "size": 16, "height": 2, "width": 2, "views": [[16, "center", False], [16, "center", True]],
          "root": "/videos", "classes": None}
PAD = 101


def write_store(path, videos, finish=True, **header):
    """videos: {name: (tokens (views, F, 2, 2), labels)}. header: what is other than in HEADER."""
    writer = StoreWriter(path, {**HEADER, **header})
    made = read_journals(path, writer.header)
    for name, (tokens, _) in videos.items():
        if name not in made:
            writer.add(name, tokens)
    writer.close()
    if finish:
        writer.finish([(name, labels, None, None) for name, (_, labels) in videos.items()])
    return path


def some_videos(count=5, seed=0):
    random = np.random.default_rng(seed)
    return {f"class {i}/v#{i}é.mp4": (random.integers(100, size=(2, 3 + 4 * i, 2, 2)), {"label": i % 2, "other": i})
            for i in range(count)}


def numbered(tmp_path, frames):
    """A store of one video whose tokens are the frame's number."""
    tokens = np.broadcast_to(np.arange(frames)[:, None, None], (2, frames, 2, 2))
    return TokenStore(write_store(tmp_path / f"store{frames}", {"v.mp4": (tokens, {"label": 0})}))


def test_what_is_written_is_read(tmp_path):
    videos = some_videos()
    store = TokenStore(write_store(tmp_path / "s", videos))
    assert len(store) == 5 and store.label_sets() == ["label", "other"]
    for i, (name, (tokens, labels)) in enumerate(videos.items()):
        assert store.name(i) == name
        assert [store.labels(key)[i] for key in labels] == list(labels.values())
        for view in range(2):
            assert np.array_equal(store.tokens(i, view), tokens[view])
    header = json.loads((tmp_path / "s/header.json").read_text())
    assert header["tokenizer"] == "t.pt" and header["videos"] == 5


NAMES = st.binary(min_size=1, max_size=20).filter(lambda name: not set(name) & set(b"/\0") and name.strip(b"."))


@settings(max_examples=60, deadline=None)
@given(lengths=st.dictionaries(NAMES.map(os.fsdecode), st.integers(1, 9), min_size=1, max_size=6),
       first=st.integers(0, 6), lost=st.integers(0, 60), start=st.integers(0, 9), stride=st.integers(1, 4))
def test_any_store_is_read_as_it_was_given(tmp_path_factory, lengths, first, lost, start, stride):
    """Whatever bytes the names hold, wherever the writing was interrupted, and whichever clip is cut from it."""
    path, random = tmp_path_factory.mktemp("any") / "s", np.random.default_rng(lost)
    videos = {name: (random.integers(100, size=(2, frames, 2, 2)), {"label": i})
              for i, (name, frames) in enumerate(lengths.items())}
    write_store(path, dict(list(videos.items())[:first]), finish=False)
    for shard in path.glob("*.bin"):
        os.truncate(shard, max(0, shard.stat().st_size - lost))
    store = TokenStore(write_store(path, videos))
    assert [store.name(i) for i in range(len(store))] == list(videos)
    for i, (tokens, _) in enumerate(videos.values()):
        assert np.array_equal(np.stack([store.tokens(i, view) for view in range(2)]), tokens)
        padded = np.concatenate([tokens[1], np.full((40, 2, 2), PAD)])
        assert np.array_equal(store.cut(i, start, 5, stride, 1), padded[start:][:5 * stride:stride])


@pytest.mark.parametrize("lost", ["tokens", "journal", "both"])
def test_a_store_cut_short_is_completed(tmp_path, lost):
    videos = some_videos()
    write_store(tmp_path / "s", dict(list(videos.items())[:3]), finish=False)
    if lost != "journal":  # killed while the tokens of the fourth video were written
        with open(tmp_path / "s/tokens-00000.bin", "ab") as file:
            file.write(b"\1" * 7)
    if lost != "tokens":  # killed while the line about the third was written
        text = (tmp_path / "s/journal-00000.jsonl").read_text()
        (tmp_path / "s/journal-00000.jsonl").write_text(text[:-9])
    again = TokenStore(write_store(tmp_path / "s", videos))
    whole = TokenStore(write_store(tmp_path / "whole", videos))
    assert len(again) == 5
    for i in range(5):
        assert again.name(i) == whole.name(i)
        assert np.array_equal(again.tokens(i, 1), whole.tokens(i, 1))


@pytest.mark.parametrize("other, said", [
    (dict(fps=2), "fps 8, not 2"), (dict(arithmetic="float16"), "arithmetic 'float32', not 'float16'"),
    (dict(views=HEADER["views"][:1]), "views"), (dict(fingerprint="ba9876543210"), "fingerprint")])
def test_a_store_of_another_kind_is_refused_and_left_as_it_was(tmp_path, other, said):
    write_store(tmp_path / "s", some_videos())
    before = (tmp_path / "s/header.json").read_text()
    with pytest.raises(UserError, match=said):
        StoreWriter(tmp_path / "s", {**HEADER, **other})
    assert (tmp_path / "s/header.json").read_text() == before and len(TokenStore(tmp_path / "s")) == 5


def test_a_store_whose_folder_of_videos_moved_is_continued(tmp_path):
    write_store(tmp_path / "s", some_videos(3))
    assert len(TokenStore(write_store(tmp_path / "s", some_videos(5), root="/elsewhere"))) == 5


def test_a_store_from_before_headers_said_the_arithmetic_opens_and_is_continued(tmp_path):
    write_store(tmp_path / "s", some_videos(3))
    old = json.loads((tmp_path / "s/header.json").read_text())
    del old["arithmetic"], old["checksum"], old["checksums"]
    (tmp_path / "s/header.json").write_text(json.dumps(old))
    assert len(TokenStore(tmp_path / "s")) == 3
    store = TokenStore(write_store(tmp_path / "s", some_videos(5), arithmetic="float16"))
    assert len(store) == 5 and store.header["arithmetic"] == "float16"


def test_a_store_that_is_not_there_or_not_finished_is_refused(tmp_path):
    for path in (tmp_path / "none", write_store(tmp_path / "half", some_videos(), finish=False)):
        with pytest.raises(UserError, match=f"{path}.*tokenize"):
            TokenStore(path)


def test_labels_that_are_no_longer_given_leave_the_store(tmp_path):
    videos = some_videos()
    write_store(tmp_path / "s", videos)
    write_store(tmp_path / "s", {name: (tokens, {"label": 1}) for name, (tokens, _) in videos.items()})
    assert TokenStore(tmp_path / "s").label_sets() == ["label"]


def test_a_store_of_a_later_format_is_refused(tmp_path):
    write_store(tmp_path / "s", some_videos(1), format=2)
    with pytest.raises(UserError, match="format 2; this version reads 1"):
        TokenStore(tmp_path / "s")


def test_unknown_labels_are_refused_with_those_that_there_are(tmp_path):
    store = TokenStore(write_store(tmp_path / "s", some_videos()))
    with pytest.raises(UserError, match="'motion': it has label, other"):
        store.labels("motion")


def test_a_clip_beyond_the_end_is_padded_with_whole_frames(tmp_path):
    clip = numbered(tmp_path, 4).cut(0, 1, 5, 2)
    assert clip[:, 0, 0].tolist() == [1, 3, PAD, PAD, PAD] and (clip[2:] == PAD).all()


def test_a_clip_is_cut_from_the_view_asked_for(tmp_path):
    videos = some_videos()
    store = TokenStore(write_store(tmp_path / "s", videos))
    for view in range(2):
        assert np.array_equal(store.cut(4, 3, 4, 2, view), list(videos.values())[4][0][view][3:10:2])


@pytest.mark.parametrize("kind, dataset, views", [("train", "ucf101", 12), ("train", "ssv2", 6), ("test", "ucf101", 3),
                                                  ("pretrain", None, 1)])
def test_the_centre_view_is_found_among_all(tmp_path, kind, dataset, views):
    listed = data.views_for(kind, 16, dataset)
    tokens = np.broadcast_to(np.arange(len(listed))[:, None, None, None], (len(listed), 3, 2, 2))  # the view's number
    store = TokenStore(write_store(tmp_path / "s", {"v.mp4": (tokens, {})}, views=listed))
    assert store.views == views
    assert listed[store.cut(0, 0, 1, 1, store.center_view())[0, 0, 0]] == (16, "center", False)


# ---------------------------------------------------------------- damaged stores


def without_checksums(path):
    """The store as an earlier version wrote it."""
    header = json.loads((path / "header.json").read_text())
    del header["checksum"], header["checksums"]
    (path / "header.json").write_text(json.dumps(header))
    return path


def damage(path, kind):
    content, middle = path.read_bytes(), path.stat().st_size // 2
    path.write_bytes({"empty": b"", "short": content[:middle], "gone": b"",
                      "changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]}[kind])
    if kind == "gone":
        path.unlink()


@pytest.mark.parametrize("old", [False, True], ids=["", "without checksums"])
@pytest.mark.parametrize("file", ["index.npy", "names.txt", "labels-label.npy", "tokens-00000.bin", "header.json"])
@pytest.mark.parametrize("kind", ["empty", "short", "gone", "changed"])
def test_a_damaged_store_is_refused_with_the_file_named(tmp_path, kind, file, old):
    """A byte of tokens, which opening does not read, `check` finds; in a store made before there were checksums, one of
    the names or labels nobody does."""
    path = write_store(tmp_path / "s", some_videos())
    if old and kind == "changed":
        return
    if old:
        without_checksums(path)
    damage(path / file, kind)
    if (kind, file, old) == ("gone", "labels-label.npy", True):
        with pytest.raises(UserError, match="no labels 'label': it has other"):
            TokenStore(path).labels()
        return
    with pytest.raises(UserError, match=file if (kind, file) != ("gone", "index.npy") else "no finished"):
        store = TokenStore(path)
        store.labels()
        check_tokens(store)


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_gives_an_error_or_the_same_store(tmp_path, seed):
    random = np.random.default_rng(seed)
    path = write_store(tmp_path / "s", some_videos())
    before = everything(TokenStore(path))
    file = random.choice(sorted(p for p in path.iterdir() if p.suffix != ".jsonl"))
    content = bytearray(file.read_bytes())
    for _ in range(random.integers(1, 4)):
        content[random.integers(len(content))] = random.integers(256)
    file.write_bytes(content)
    try:
        store = TokenStore(path)
        check_tokens(store)
        assert everything(store) == before
    except UserError as error:
        assert file.name in str(error) and len(str(error).splitlines()) == 1


def everything(store):
    return store.header, [(store.name(i), store.tokens(i, 1).tolist(), int(store.labels()[i]))
                          for i in range(len(store))]


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_journal_costs_time_and_no_tokens(tmp_path, seed):
    """What it no longer vouches for is made again."""
    random = np.random.default_rng(seed)
    videos = some_videos()
    path = write_store(tmp_path / "s", videos)
    before = everything(TokenStore(path))
    journal = path / "journal-00000.jsonl"
    content = bytearray(journal.read_bytes())
    for _ in range(random.integers(1, 4)):
        content[random.integers(len(content))] = random.integers(256)
    journal.write_bytes(content[:random.integers(len(content) // 2, len(content) + 1)])
    write_store(path, videos)
    assert everything(TokenStore(path))[1] == before[1]
    check_tokens(TokenStore(path))


def test_a_digit_of_the_journal_that_is_another_gives_no_other_tokens(tmp_path):
    videos = some_videos()
    path = write_store(tmp_path / "s", videos)
    before = everything(TokenStore(path))
    journal = path / "journal-00000.jsonl"
    journal.write_text(journal.read_text().replace('"start": 24,', '"start": 16,'))
    write_store(path, videos)
    assert everything(TokenStore(path))[1] == before[1]


def test_what_has_no_checksums_is_checked_by_itself(tmp_path):
    """Labels by their number, tokens by their range."""
    path = without_checksums(write_store(tmp_path / "s", some_videos()))
    np.save(path / "labels-label.npy", np.zeros(4, "<i4"))
    with pytest.raises(UserError, match="labels-label.npy has 4 labels for 5 videos"):
        TokenStore(path).labels()
    (path / "journal-00000.jsonl").unlink()
    assert "of 0 videos with the checksum" in check_tokens(TokenStore(path))
    (path / "tokens-00000.bin").write_bytes(b"\xff" * (path / "tokens-00000.bin").stat().st_size)
    with pytest.raises(UserError, match="class 0/v#0é.mp4 has other tokens"):
        check_tokens(TokenStore(path))


def test_a_shard_cut_short_is_made_again_and_not_filled_with_zeros(tmp_path):
    videos = some_videos()
    path = write_store(tmp_path / "s", videos)
    before = everything(TokenStore(path))
    os.truncate(path / "tokens-00000.bin", (path / "tokens-00000.bin").stat().st_size - 3)
    write_store(path, videos)
    assert everything(TokenStore(path)) == before


def test_tokens_beyond_the_vocabulary_never_reach_a_model(tmp_path):
    path = write_store(tmp_path / "s", some_videos())
    (path / "tokens-00000.bin").write_bytes(b"\xff" * (path / "tokens-00000.bin").stat().st_size)
    with pytest.raises(UserError, match="has 65535 for a token of class 2/.*, the vocabulary ends at 99"):
        TokenStore(path).cut(2, 0, 3, 1)
    with pytest.raises(UserError, match="65536 at most"):
        write_store(tmp_path / "large", some_videos(), vocab_size=65537)


def test_a_store_without_videos_is_refused(tmp_path):
    with pytest.raises(UserError, match="none of the 0 videos"):
        write_store(tmp_path / "s", {})
    path = write_store(tmp_path / "old", some_videos())
    np.save(path / "index.npy", np.load(path / "index.npy")[:0])
    with pytest.raises(UserError, match="holds no videos"):
        TokenStore(without_checksums(path))


def test_stores_of_two_tokenizers_are_told_apart(tmp_path):
    stores = [TokenStore(write_store(tmp_path / str(i), some_videos(), fingerprint=f)) for i, f in enumerate("aab")]
    check_alike(*stores[:2])
    with pytest.raises(UserError, match=f"{tmp_path}/0 and {tmp_path}/2 .* fingerprint is 'a' and 'b'"):
        check_alike(*stores)
    del stores[2].header["fingerprint"]
    check_alike(*stores)


def test_a_shard_with_half_a_token_at_its_end_is_read(tmp_path):
    """What a kill leaves while the next video is written."""
    store = TokenStore(write_store(tmp_path / "s", some_videos(2)))
    with open(tmp_path / "s/tokens-00000.bin", "ab") as file:
        file.write(b"x")
    assert (TokenStore(tmp_path / "s").tokens(1) == store.tokens(1)).all()
