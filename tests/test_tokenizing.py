"""A list of videos -> a token store: by one process or several, whole or killed and continued."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import ROOT, call, run, write_store

import data
import monitor
import vqvae
from plumbing import decoding, files, processes, tokenizing
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


def test_on_a_cpu_videos_are_encoded_side_by_side(tmp_path, place, tokenizer, monkeypatch):
    names, threads = ["0.mp4", "z.mp4"], torch.get_num_threads()
    alone = by_hand(tokenizer, place, tmp_path / "alone", names=names)
    both, batches, encode = threading.Barrier(2), [], tokenizing.encode

    def meet(tokenizer, frames, batch):
        both.wait(timeout=60)  # until the other video is there
        batches.append(batch)
        return encode(tokenizer, frames, batch)
    monkeypatch.setattr(tokenizing, "encode", meet)
    monkeypatch.setattr(decoding, "cores", lambda: 2)
    store = by_hand(tokenizer, place, tmp_path / "both", names=names)
    assert all(np.array_equal(store.tokens(i), alone.tokens(i)) for i in range(2))
    assert batches == [128, 128] and torch.get_num_threads() == threads  # together as much memory as before


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


# ---------------------------------------------------------------- what is asked for now


@pytest.fixture
def folder(tmp_path, place, write_video):
    """A folder with t.pt and four videos, listed with labels."""
    shutil.copy(place / "t.pt", tmp_path / "t.pt")
    for i in range(4):
        write_video(tmp_path / f"videos/{i}.mp4", range(0, 200, 10 + 5 * i))
    return list_videos(tmp_path, [(0, 0), (1, 1), (2, 0), (3, 1)])


def list_videos(folder, pairs):
    (folder / "videos/train.txt").write_text("".join(f"{i}.mp4 {label}\n" for i, label in pairs))
    return folder


def decoded(monkeypatch):
    """-> a list that fills with the names of the files that are decoded."""
    read = []
    monkeypatch.setattr(tokenizing, "stream_views",
                        lambda path, *how: read.append(Path(path).name) or stream_views(path, *how))
    return read


def test_the_index_follows_the_list_as_it_is_now(folder, write_video, monkeypatch):
    """Corrected labels, videos taken out, added and replaced; only what is new is decoded."""
    assert "4 videos tokenised, 0 could not be decoded\n" in call(vqvae, *command(folder, folder / "s")).stdout
    before, read = content(folder / "s"), decoded(monkeypatch)
    write_video(folder / "videos/4.mp4", range(10, 200, 10))
    list_videos(folder, [(4, 0), (1, 0), (0, 1), (3, 1)])
    done = call(vqvae, *command(folder, folder / "s"))
    assert "4 videos tokenised, 0 could not be decoded (3 kept, 1 new, 1 no longer listed)" in done.stdout
    after = content(folder / "s")
    assert [pair[:2] for pair in after] == [("4.mp4", 0), ("1.mp4", 0), ("0.mp4", 1), ("3.mp4", 1)]
    assert after[1][2] == before[1][2] and after[2][2] == before[0][2] and read == ["4.mp4"]
    write_video(folder / "videos/1.mp4", range(0, 30, 3))
    list_videos(folder, [(0, 0), (1, 1), (2, 0)])
    assert "(2 kept, 1 new, 2 no longer listed)" in call(vqvae, *command(folder, folder / "s")).stdout
    assert read == ["4.mp4", "1.mp4"] and content(folder / "s")[2] == before[2]
    assert call(vqvae, *command(folder, folder / "new")).returncode == 0
    assert content(folder / "s") == content(folder / "new")
    written = {path: path.stat().st_mtime_ns for path in (folder / "s").iterdir()}
    again = call(vqvae, *command(folder, folder / "s"))
    assert "3 videos tokenised before, nothing is left to do" in again.stdout
    assert written == {path: path.stat().st_mtime_ns for path in (folder / "s").iterdir()}


def test_a_folder_that_moved_is_the_same_and_one_of_other_videos_is_refused(folder, write_video, monkeypatch):
    argv = command(folder, folder / "s")
    assert call(vqvae, *argv).returncode == 0
    before, read = content(folder / "s"), decoded(monkeypatch)
    shutil.copytree(folder / "videos", folder / "moved", copy_function=shutil.copy)  # with new dates
    for _ in range(2):
        assert call(vqvae, *[folder / "moved" if part == folder / "videos" else part for part in argv]).returncode == 0
        assert content(folder / "s") == before and read == []
    assert TokenStore(folder / "s").header["root"] == str(folder / "moved")
    for name in ("0.mp4", "other.mp4"):  # another video of the same name, and another name
        write_video(folder / name[0] / name, range(0, 100, 7))
        (folder / name[0] / "train.txt").write_text(f"{name} 1\n")
        done = call(vqvae, *[folder / name[0] if part == folder / "videos" else part for part in argv])
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert f"holds the videos of {folder}/moved, not those of {folder}/{name[0]}" in done.stderr
        assert content(folder / "s") == before


def test_a_store_made_before_files_were_stamped_is_taken_as_it_is(folder, monkeypatch):
    """A journal of bare records and a header without checksums, as earlier versions wrote them."""
    call(vqvae, *command(folder, folder / "s"))
    before, path = content(folder / "s"), folder / "s/journal-00000.jsonl"
    records = [json.loads(line.split("\t")[0]) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({"number": number, "name": record["name"], "start": record["start"], "frames":
                                        record["frames"], "labels": {"label": 7}}) + "\n"
                            for number, record in enumerate(records[1:])))
    header = json.loads((folder / "s/header.json").read_text())
    del header["checksum"], header["checksums"]
    (folder / "s/header.json").write_text(json.dumps(header))
    assert content(folder / "s") == before
    read = decoded(monkeypatch)
    assert call(vqvae, *command(folder, folder / "s")).returncode == 0 and read == []
    assert content(folder / "s") == before and "checksums" in TokenStore(folder / "s").header


def test_two_tokenisations_of_one_folder_do_not_meet(folder):
    """The second is refused, whichever that is, and what is there in the end is right."""
    argv = [sys.executable, str(ROOT / "vqvae.py"), *map(str, command(folder, folder / "s"))]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate() for process in both]
    for process, (stdout, stderr) in zip(both, said):
        if process.returncode:
            assert process.returncode == 2 and f"{folder}/s is being written by process " in stderr
    assert 0 in [process.returncode for process in both], said
    call(vqvae, *command(folder, folder / "new"))
    assert content(folder / "s") == content(folder / "new")


def test_a_group_that_is_refused_says_so_once(folder):
    files.lock(folder / "s")
    done = run(folder, *command(folder, "s"), script="vqvae.py",
               under=["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])
    files.unlock(folder / "s")
    assert done.returncode != 0 and done.stderr.count("is being written by") == 1
    assert "[rank1]" not in done.stderr and "Connection closed" not in done.stderr


def test_a_full_disk_stops_a_tokenisation_in_one_line_and_room_lets_it_go_on(folder, small_disk):
    """On a disk of 400 kB; the same command then goes on with what was written before."""
    script = 'cd "$1"; dd if=/dev/zero of=disk/filled bs=1k count=380 2>/dev/null; shift; "$@"; echo "code $?" >&2; ' \
             'ls disk/s >&2; rm disk/filled; exec "$@"'
    argv = command(folder, folder / "disk/s")
    done = subprocess.run([*small_disk(folder / "disk"), "sh", "-c", script, "sh", str(folder), sys.executable,
                           str(ROOT / "vqvae.py"), *map(str, [32 if part == 8 else part for part in argv])],
                          check=False, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("tokenising")]
    assert "the disk of" in lines[0] and "is full" in lines[0] and lines[1] == "code 2", done.stderr
    assert not any(".part" in line for line in lines)
    assert done.returncode == 0 and "4 videos tokenised" in done.stdout


def test_a_process_that_needs_longer_than_the_groups_patience_is_waited_for(folder, tmp_path_factory):
    """One of two, of a group that gives up after two seconds, has a slow disk."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    context = torch.multiprocessing.get_context("spawn")
    both = [context.Process(target=uneven, args=(folder, meeting, rank)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    call(vqvae, *command(folder, folder / "new"))
    assert content(folder / "s") == content(folder / "new")


def uneven(folder, meeting, rank):
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2,
                                         timeout=timedelta(seconds=2))
    processes.patient_group()
    if rank == 1:
        tokenizing.read_views = lambda *how: time.sleep(2) or read_views(*how)
    done = call(vqvae, *command(folder, folder / "s"), "--workers", 1)
    assert done.returncode == 0, done.stderr
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
    for names in (["cut.mkv", "0.mp4"], ["cut.mkv", "z.mp4"]):
        store = by_hand(tokenizer, place, tmp_path / "s", names=names)
        line = f"{path}: gave {len(store.tokens(0))} frames, perhaps not all: "
        assert (tmp_path / "s/errors.txt").read_text().startswith(line) and len(store) == 2
        said = capsys.readouterr().out
        assert f"damaged {line}" in said and "2 videos tokenised, 0 could not be decoded, 1 perhaps in part" in said


def test_a_stopped_tokenisation_leaves_no_thread_at_work(tmp_path, tokenizer, write_video, monkeypatch):
    """Threads that compute while Python ends abort it."""
    videos = [(str(write_video(tmp_path / f"{i}.mp4", [10 * i] * 24)), {}) for i in range(8)]
    before = threading.active_count(), torch.get_num_threads()

    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(tokenizing.StoreWriter, "add", stop)
    with pytest.raises(KeyboardInterrupt) as held:
        tokenize(tokenizer, videos, tmp_path, tmp_path / "s", 8.0, 32, [(32, "center", False)], "t.pt", workers=2)
    assert held.traceback and (threading.active_count(), torch.get_num_threads()) == before


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
        monitor.original_frames(store, 0, 0, 2, 1)


def test_a_store_whose_rate_is_no_number_is_refused(tmp_path):
    write_store(tmp_path / "s", [(np.zeros((1, 3, 2, 2)), {})])
    header = json.loads((tmp_path / "s/header.json").read_text())
    del header["checksum"]  # as in stores of earlier versions, and in those of an enemy
    (tmp_path / "s/header.json").write_text(json.dumps({**header, "fps": "8,movie=/etc/passwd"}))
    with pytest.raises(UserError, match="header.json is missing or damaged .*fps is a number") as error:
        TokenStore(tmp_path / "s")
    assert len(str(error.value).splitlines()) == 1
