"""The token store on the disk: what is written is read, whatever happened in between."""
import json

import numpy as np
import pytest

import data
from plumbing.cli import UserError
from plumbing.store import TokenStore
from plumbing.writer import StoreWriter, read_journals

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
