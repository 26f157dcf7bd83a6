"""A list of videos -> a token store: by one process or several, whole or killed and continued."""
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, call, run

import data
import vqvae
from plumbing import tokenizing
from plumbing.cli import UserError
from plumbing.decoding import read_views
from plumbing.store import TokenStore
from plumbing.tokenizing import fingerprint, frames_at_once, tokenize


def small_tokenizer(seed=0):
    torch.manual_seed(seed)
    tokenizer = vqvae.VQVAE(codes=32, width=16).eval()
    tokenizer.codebook.codes.normal_(std=0.1)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer, write_video):
    """A folder with t.pt, and six videos with labels, the fourth broken, listed out of order in videos/train.txt."""
    place = tmp_path_factory.mktemp("tokenizing")
    vqvae.save_tokenizer(tokenizer, place / "t.pt")
    names = ["d/3.mp4", "0.mp4", "a b/1.mp4", "broken.mp4", "z.mp4", "2.mp4"]
    for i, name in enumerate(names):
        write_video(place / "videos" / name, range(0, 240, 10 + 5 * i))
    (place / "videos/broken.mp4").write_bytes(b"no video")
    lines = [f"{name} {label}\n" for name, label in zip(names, (2, 0, 1, 1, 0, 2))]
    (place / "videos/train.txt").write_text("".join(lines))
    return place


def command(place, out):
    return ["tokenize", "--dataset", "list", "--root", place / "videos", "--tokenizer", place / "t.pt", "--frame-size",
            32, "--fps", 8, "--out", out, "--device", "cpu"]


def by_hand(tokenizer, place, out, views="pretrain", size=32, names=("0.mp4",)):
    videos = [(str(place / "videos" / name), {}) for name in names]
    tokenize(tokenizer, videos, place / "videos", out, 8, size, data.views_for(views, size), "t.pt")
    return TokenStore(out)


def content(path):
    store = TokenStore(path)
    return [(store.name(i), int(store.labels()[i]), store.tokens(i).tolist()) for i in range(len(store))]


def test_several_processes_make_the_store_of_one_and_one_continues_it(tmp_path, place, monkeypatch):
    alone = call(vqvae, *command(place, tmp_path / "one"))
    group = run(tmp_path, *command(place, "two"), script="vqvae.py",
                under=["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])
    assert alone.returncode == group.returncode == 0, group.stderr
    assert (tmp_path / "two/tokens-00001.bin").stat().st_size > 0
    one = content(tmp_path / "one")
    assert content(tmp_path / "two") == one
    assert [(name, label) for name, label, _ in one] == [("d/3.mp4", 2), ("0.mp4", 0), ("a b/1.mp4", 1), ("z.mp4", 0),
                                                         ("2.mp4", 2)]
    for out, said in (("one", alone.stdout), ("two", group.stdout)):
        assert said.count("broken.mp4") == 1 and "5 videos tokenised, 1 could not be decoded" in said
        assert (tmp_path / out / "errors.txt").read_text().count("broken.mp4") == 1
    read = []
    monkeypatch.setattr(tokenizing, "read_views", lambda path, *how: read.append(path) or read_views(path, *how))
    again = call(vqvae, *command(place, tmp_path / "two"))  # by one process, what two have made
    assert "5 videos tokenised, 1 could not be decoded" in again.stdout and content(tmp_path / "two") == one
    assert read == [str(place / "videos/broken.mp4")]


def test_a_tokenisation_killed_again_and_again_ends_like_one_that_was_not(tmp_path, place, write_video):
    for i in range(30):
        write_video(tmp_path / f"videos/{i}.mp4", range(0, 240, 5 + i))

    def argv(out):
        parts = ["tokenize", "--videos", tmp_path / "videos", "--tokenizer", place / "t.pt", "--frame-size", 32,
                 "--fps", 8, "--workers", 1, "--out", tmp_path / out, "--device", "cpu"]
        return [str(part) for part in parts]
    for lines in (1, 12):  # killed as soon as so many videos are there
        process = subprocess.Popen([sys.executable, ROOT / "vqvae.py", *argv("killed")], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        journal = tmp_path / "killed/journal-00000.jsonl"
        while process.poll() is None and (not journal.is_file() or journal.read_text().count("\n") < lines):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed/index.npy").is_file()  # it was killed before its end, each time
    assert call(vqvae, *argv("killed")).returncode == call(vqvae, *argv("whole")).returncode == 0
    killed, whole = TokenStore(tmp_path / "killed"), TokenStore(tmp_path / "whole")
    assert [killed.name(i) for i in range(len(killed))] == [whole.name(i) for i in range(30)]
    assert all(np.array_equal(killed.tokens(i), whole.tokens(i)) for i in range(30))


@pytest.mark.parametrize("size, frames", [(64, 256), (128, 256), (136, 226), (256, 64), (4096, 1)])
def test_of_larger_frames_fewer_are_encoded_at_once(size, frames):
    assert frames_at_once(256, size) == frames


def test_no_more_pixels_are_encoded_at_once_and_the_tokens_are_the_same(tmp_path, place, tokenizer, monkeypatch):
    shapes, encode = [], vqvae.VQVAE.encode

    def spy(self, frames):
        shapes.append(tuple(frames.shape))
        return encode(self, frames)
    monkeypatch.setattr(vqvae.VQVAE, "encode", spy)
    store = by_hand(tokenizer, place, tmp_path / "s", "train", 256, ["z.mp4"])  # 8 frames of 12 views
    assert shapes == [(64, 256, 256, 3), (32, 256, 256, 3)]
    views = read_views(place / "videos/z.mp4", 8, 256, data.views_for("train", 256))
    for view in (0, 5, 11):
        assert np.array_equal(store.tokens(0, view), encode(tokenizer, torch.from_numpy(views[view])).numpy())


def test_the_header_says_what_the_tokens_are(tmp_path, place, tokenizer):
    header = by_hand(tokenizer, place, tmp_path / "s", "test").header
    assert {"tokenizer": "t.pt", "fingerprint": fingerprint(tokenizer), "arithmetic": "float32", "vocab_size": 32,
            "fps": 8, "size": 32, "height": 4, "width": 4, "root": str(place / "videos"), "classes": None,
            "views": [list(view) for view in data.views_for("test", 32)]}.items() <= header.items()


def test_another_tokenizer_of_the_same_name_does_not_continue_a_store(tmp_path, place, tokenizer):
    by_hand(tokenizer, place, tmp_path / "s")
    with torch.no_grad():
        for name, weight in small_tokenizer().named_parameters():
            other = small_tokenizer()
            other.get_parameter(name).view(-1)[-1] += 1e-3
            assert fingerprint(other) != fingerprint(tokenizer), name
    assert fingerprint(small_tokenizer()) == fingerprint(tokenizer)
    with pytest.raises(UserError, match="fingerprint"):
        by_hand(other, place, tmp_path / "s")


def test_another_arithmetic_does_not_continue_a_store(tmp_path, place):
    assert call(vqvae, *command(place, tmp_path / "s")).returncode == 0
    path = tmp_path / "s/header.json"
    path.write_text(path.read_text().replace('"float32"', '"float16"'))  # as a GPU would have left it
    done = call(vqvae, *command(place, tmp_path / "s"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "arithmetic 'float16', not 'float32'" in done.stderr and str(tmp_path / "s") in done.stderr
    header = json.loads(path.read_text())
    del header["arithmetic"]  # made before headers said it
    path.write_text(json.dumps(header))
    assert call(vqvae, *command(place, tmp_path / "s")).returncode == 0
    assert json.loads(path.read_text())["arithmetic"] == "float32"
