"""A list of videos -> a token store: by one process or several, whole or killed and continued."""
import json
import os
import signal
import subprocess
import sys
import time

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import ROOT, call, run, write_store

import data
import monitor
import vqvae
from plumbing import decoding, tokenizing
from plumbing.cli import UserError
from plumbing.decoding import read_views, stream_views
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
    monkeypatch.setattr(tokenizing, "stream_views", lambda path, *how: read.append(path) or stream_views(path, *how))
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
    assert shapes == [(60, 256, 256, 3), (36, 256, 256, 3)]  # of whole frames: 5 x 12 and 3 x 12
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


def test_long_videos_are_tokenised_in_pieces(tmp_path, place, tokenizer, monkeypatch):
    whole = by_hand(tokenizer, place, tmp_path / "whole", "train")
    pieces = []
    monkeypatch.setattr(decoding, "PIECE", 5 * 12 * 32 * 32 * 3)
    monkeypatch.setattr(tokenizing, "encode", lambda *args, f=tokenizing.encode: pieces.append(f(*args)) or pieces[-1])
    store = by_hand(tokenizer, place, tmp_path / "pieces", "train")
    assert [piece.shape for piece in pieces] == [(12, 5, 4, 4)] * 3 + [(12, 1, 4, 4)]
    assert all(np.array_equal(store.tokens(0, view), whole.tokens(0, view)) for view in range(12))


def test_a_video_whose_ffmpeg_was_killed_is_listed_and_tried_again(tmp_path, place, tokenizer, monkeypatch):
    script = tmp_path / "ffmpeg"  # of 0.mp4 it gives five frames, then it is killed
    script.write_text(f"""#!/bin/sh
    case "$*" in *0.mp4*) {imageio_ffmpeg.get_ffmpeg_exe()} "$@" | head -c 15360; kill -9 $$;; esac
    exec {imageio_ffmpeg.get_ffmpeg_exe()} "$@" """)
    script.chmod(0o755)
    names = ["0.mp4", "z.mp4"]
    with monkeypatch.context() as patch:
        patch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
        store = by_hand(tokenizer, place, tmp_path / "s", names=names)
    assert [store.name(i) for i in range(len(store))] == ["z.mp4"]
    assert "0.mp4: ffmpeg was killed by signal 9 after 5 frames" in (tmp_path / "s/errors.txt").read_text()
    store = by_hand(tokenizer, place, tmp_path / "s", names=names)
    assert [store.name(i) for i in range(len(store))] == names and (tmp_path / "s/errors.txt").read_text() == ""
    assert len(store.tokens(0)) == len(read_views(place / "videos/0.mp4", 8, 32, data.views_for("pretrain", 32))[0])


def test_a_damaged_video_is_stored_and_listed_by_every_call(tmp_path, place, tokenizer, write_video, capsys):
    path = write_video(place / "videos/cut.mkv", range(0, 240, 2), options=("-g", "10"))
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])
    for _ in range(2):
        store = by_hand(tokenizer, place, tmp_path / "s", names=["cut.mkv", "0.mp4"])
        line = f"{path}: gave {len(store.tokens(0))} frames, perhaps not all: "
        assert (tmp_path / "s/errors.txt").read_text().startswith(line) and len(store) == 2
        said = capsys.readouterr().out
        assert f"damaged {line}" in said and "2 videos tokenised, 0 could not be decoded, 1 perhaps in part" in said


def test_names_are_bytes(tmp_path, place, write_video):
    root, names = tmp_path / "videos", [b"caf\xe9.mp4", b"\xe2\x80\xa8 a b.mp4", b"bad\xff.mp4"]
    names = [os.fsdecode(name) for name in names]
    try:
        write_video(root / "v.mp4", [100] * 8).rename(root / names[0])
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    write_video(root / "v.mp4", [50] * 8).rename(root / names[1])
    (root / names[2]).write_bytes(b"no video")
    (root / "train.txt").write_bytes(b"".join(os.fsencode(f"{name} {i}\n") for i, name in enumerate(names)))
    argv = [root if part == place / "videos" else part for part in command(place, tmp_path / "s")]
    for _ in range(2):
        done = call(vqvae, *argv)
        assert done.returncode == 0, done.stderr
        assert "bad\\xff.mp4: " in done.stdout and "2 videos tokenised, 1 could not" in done.stdout
        assert "bad\\xff.mp4: " in (tmp_path / "s/errors.txt").read_text()
        store = TokenStore(tmp_path / "s")
        assert [store.name(i) for i in range(2)] == names[:2] and store.video_path(0).is_file()


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/secret.mp4", "a/../../secret.mp4"])
def test_a_name_in_a_store_cannot_lead_out_of_its_folder(tmp_path, monkeypatch, name):
    store = write_store(tmp_path / "s", [(np.zeros((1, 3, 2, 2)), {})], root=str(tmp_path / "videos"))
    monkeypatch.setattr(TokenStore, "name", lambda self, i: name)
    with pytest.raises(UserError, match="leads out of the folder"):
        monitor.original_frames(store, 0, 0, data.EvenClips(store, 2, 1, 1))


def test_a_store_whose_rate_is_no_number_is_refused(tmp_path):
    write_store(tmp_path / "s", [(np.zeros((1, 3, 2, 2)), {})])
    header = json.loads((tmp_path / "s/header.json").read_text())
    (tmp_path / "s/header.json").write_text(json.dumps({**header, "fps": "8,movie=/etc/passwd"}))
    with pytest.raises(UserError, match="fps must be a number, not '8,movie") as error:
        TokenStore(tmp_path / "s")
    assert len(str(error.value).splitlines()) == 1
