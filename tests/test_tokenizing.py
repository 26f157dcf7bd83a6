"""A list of videos -> a token store: by one process or several, uninterrupted or killed."""
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
from plumbing import decoding, tokenizing
from plumbing.cli import UserError
from plumbing.decoding import read_views, stream_views
from plumbing.store import TokenStore, read_part
from plumbing.tokenizing import frames_at_once, tokenize

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def small_tokenizer(seed=0):
    torch.manual_seed(seed)
    tokenizer = vqvae.VQVAE(codes=32, width=16).eval()
    tokenizer.codebook.codes.normal_(std=0.1)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def six_videos(tmp_path_factory, tokenizer, write_video):
    """A folder with t.pt and six videos. videos/train.txt lists them with labels, out of order.

    The fourth is broken.
    """
    folder = tmp_path_factory.mktemp("tokenizing")
    vqvae.save_tokenizer(tokenizer, folder / "t.pt")
    names = ["d/3.mp4", "0.mp4", "a b/1.mp4", "broken.mp4", "z.mp4", "2.mp4"]
    for i, name in enumerate(names):
        write_video(folder / "videos" / name, range(0, 240, 10 + 5 * i))
    (folder / "videos/broken.mp4").write_bytes(b"no video")
    lines = [f"{name} {label}\n" for name, label in zip(names, (2, 0, 1, 1, 0, 2))]
    (folder / "videos/train.txt").write_text("".join(lines))
    return folder


def command(folder, out):
    return ["tokenize", "--dataset", "own", "--root", folder / "videos",
            "--tokenizer", folder / "t.pt", "--frame-size", 32, "--fps", 8, "--out", out,
            "--device", "cpu"]


def with_root(argv, old, new):
    return [new if part == old else part for part in argv]


def make_store(tokenizer, folder, out, views="pretrain", size=32, names=("0.mp4",)):
    videos = [(str(folder / "videos" / name), {}) for name in names]
    tokenize(tokenizer, videos, folder / "videos", out, 8, size, data.views_for(views, size),
             "t.pt")
    return TokenStore(out)


def content(path):
    store = TokenStore(path)
    return [(store.name(i), int(store.labels()[i]), store.tokens(i).tolist())
            for i in range(len(store))]


def decoded_files(monkeypatch):
    """-> a list that fills with the names of the files that are decoded."""
    names = []

    def record(path, *args):
        names.append(Path(path).name)
        return stream_views(path, *args)

    monkeypatch.setattr(tokenizing, "stream_views", record)
    return names


# ---------------------------------------------------------------- processes and kills


def test_two_processes_make_the_store_of_one(tmp_path, six_videos, monkeypatch):
    alone = call(vqvae, *command(six_videos, tmp_path / "one"))
    group = run(tmp_path, *command(six_videos, "two"), script="vqvae.py", under=TORCHRUN)
    assert alone.returncode == group.returncode == 0, group.stderr
    parts = [read_part(file) for file in (tmp_path / "two").glob("part-*.json")]
    assert sorted(len(part["videos"]) for part in parts) == [2, 3]  # each process tokenised half
    one = content(tmp_path / "one")
    assert content(tmp_path / "two") == one
    assert [(name, label) for name, label, _ in one] == [
        ("d/3.mp4", 2), ("0.mp4", 0), ("a b/1.mp4", 1), ("z.mp4", 0), ("2.mp4", 2)]
    for out, output in (("one", alone.stdout), ("two", group.stdout)):
        assert output.count("broken.mp4") == 1
        assert "5 videos tokenised, 1 could not be decoded" in output
        assert (tmp_path / out / "errors.txt").read_text().count("broken.mp4") == 1
    names = decoded_files(monkeypatch)
    again = call(vqvae, *command(six_videos, tmp_path / "two"))  # one process reads both parts
    assert "5 videos tokenised, 1 could not be decoded" in again.stdout
    assert content(tmp_path / "two") == one and names == ["broken.mp4"]


KILLED = """
import sys
sys.path.insert(0, {root!r})
sys.argv = {argv!r}
from plumbing import store
store.PART_SECONDS = 0
import vqvae
vqvae.main()
"""


def test_kills_lose_at_most_the_open_part(tmp_path, six_videos, write_video, monkeypatch):
    for i in range(30):
        write_video(tmp_path / f"videos/{i}.mp4", range(0, 240, 5 + i))

    def argv(out):
        return ["tokenize", "--videos", tmp_path / "videos", "--tokenizer", six_videos / "t.pt",
                "--frame-size", 32, "--fps", 8, "--workers", 1, "--out", tmp_path / out,
                "--device", "cpu"]

    program = KILLED.format(root=str(ROOT), argv=["vqvae.py", *map(str, argv("killed"))])
    for count in (1, 8):  # killed as soon as so many parts exist
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(tmp_path.glob("killed/*.json"))) < count:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed/index.npz").is_file()  # both kills came before the end
    parts = len(list(tmp_path.glob("killed/part-*.json")))
    names = decoded_files(monkeypatch)
    assert call(vqvae, *argv("killed")).returncode == 0
    assert 8 <= parts < 30 and len(names) == 30 - parts
    assert call(vqvae, *argv("whole")).returncode == 0
    killed, whole = TokenStore(tmp_path / "killed"), TokenStore(tmp_path / "whole")
    assert [killed.name(i) for i in range(len(killed))] == [whole.name(i) for i in range(30)]
    assert all(np.array_equal(killed.tokens(i), whole.tokens(i)) for i in range(30))


def test_ctrl_c_keeps_what_is_tokenised(tmp_path, tokenizer, write_video, monkeypatch):
    """No thread goes on: threads that compute while Python ends abort it."""
    videos = [(str(write_video(tmp_path / f"{i}.mp4", [10 * i] * 24)), {}) for i in range(8)]
    before = threading.active_count(), torch.get_num_threads()
    add = tokenizing.PartWriter.add

    def stop_at_the_third(writer, *args):
        if len(writer.videos) == 2:
            raise KeyboardInterrupt
        add(writer, *args)

    arguments = (tokenizer, videos, tmp_path, tmp_path / "s", 8.0, 32, [(32, "center", False)])
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing.PartWriter, "add", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            tokenize(*arguments, "t.pt", workers=2)
    assert (threading.active_count(), torch.get_num_threads()) == before
    names = decoded_files(monkeypatch)
    assert tokenize(*arguments, "t.pt") and sorted(names) == [f"{i}.mp4" for i in range(2, 8)]


def test_two_programs_at_once_make_one_right_store(six_videos, tmp_path):
    argv = [sys.executable, str(ROOT / "vqvae.py"), *map(str, command(six_videos, tmp_path / "s"))]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    call(vqvae, *command(six_videos, tmp_path / "new"))
    assert content(tmp_path / "s") == content(tmp_path / "new")
    assert call(vqvae, "check", tmp_path / "s").returncode == 0


def test_a_group_that_is_refused_prints_one_line(tmp_path, six_videos):
    (tmp_path / "file").write_text("")
    done = run(tmp_path, *command(six_videos, "file/s"), script="vqvae.py", under=TORCHRUN)
    assert done.returncode != 0 and done.stderr.count("cannot write file/s") == 1
    assert "[rank1]" not in done.stderr and "Connection closed" not in done.stderr


def test_a_slow_process_is_waited_for(folder, tmp_path_factory):
    """The group's own timeout is two seconds; the disk of one of its two processes is slow."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    context = torch.multiprocessing.get_context("spawn")
    both = [context.Process(target=tokenize_slowly, args=(folder, meeting, rank))
            for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    call(vqvae, *command(folder, folder / "new"))
    assert content(folder / "s") == content(folder / "new")


def tokenize_slowly(folder, meeting, rank):
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank,
                                         world_size=2, timeout=timedelta(seconds=2))

    def slow(*args):
        time.sleep(2)
        return stream_views(*args)

    if rank == 1:
        tokenizing.stream_views = slow
    done = call(vqvae, *command(folder, folder / "s"), "--workers", 1)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- encoding


@pytest.mark.parametrize("size, frames", [
    (64, 256), (128, 256), (136, 226), (256, 64), (4096, 1)])
def test_fewer_large_frames_are_encoded_at_once(size, frames):
    assert frames_at_once(256, size) == frames


def test_pieces_and_batches_do_not_change_the_tokens(tmp_path, six_videos, tokenizer, monkeypatch):
    shapes, encode = [], vqvae.VQVAE.encode

    def record(self, frames):
        shapes.append(tuple(frames.shape))
        return encode(self, frames)

    monkeypatch.setattr(vqvae.VQVAE, "encode", record)
    monkeypatch.setattr(decoding, "PIECE", 5 * 12 * 256 * 256 * 3)
    names = ["z.mp4"]  # 8 frames of 12 views
    store = make_store(tokenizer, six_videos, tmp_path / "s", "train", 256, names)
    assert shapes == [(60, 256, 256, 3), (36, 256, 256, 3)]  # 12 views of 5 and of 3 frames
    views = read_views(six_videos / "videos/z.mp4", 8, 256, data.views_for("train", 256))
    for view in (0, 5, 11):
        expected = encode(tokenizer, torch.from_numpy(views[view])).numpy()
        assert np.array_equal(store.tokens(0, view), expected)


def test_threads_encode_side_by_side(tmp_path, six_videos, tokenizer, monkeypatch):
    """Together they encode no more frames at once than one of them alone."""
    names, threads = ["0.mp4", "z.mp4"], torch.get_num_threads()
    alone = make_store(tokenizer, six_videos, tmp_path / "alone", names=names)
    both, batches, encode = threading.Barrier(2), [], tokenizing.encode

    def meet(tokenizer, frames, batch):
        both.wait(timeout=60)  # until the other video is here, too
        batches.append(batch)
        return encode(tokenizer, frames, batch)

    monkeypatch.setattr(tokenizing, "encode", meet)
    monkeypatch.setattr(decoding, "cores", lambda: 2)
    store = make_store(tokenizer, six_videos, tmp_path / "both", names=names)
    assert all(np.array_equal(store.tokens(i), alone.tokens(i)) for i in range(2))
    assert batches == [128, 128] and torch.get_num_threads() == threads


def test_the_header(tmp_path, six_videos, tokenizer):
    header = make_store(tokenizer, six_videos, tmp_path / "s", "test").header
    assert header == {
        "tokenizer": "t.pt", "fingerprint": tokenizer.fingerprint, "vocab_size": 32, "fps": 8,
        "size": 32, "height": 4, "width": 4, "root": str(six_videos / "videos"), "classes": None,
        "views": [list(view) for view in data.views_for("test", 32)],
        "resampling": decoding.RESAMPLING}


def test_a_store_of_other_resampling_is_refused(tmp_path, six_videos, tokenizer, monkeypatch):
    make_store(tokenizer, six_videos, tmp_path / "s")
    monkeypatch.setattr(tokenizing, "RESAMPLING", "bicubic")
    with pytest.raises(UserError, match="made with resampling 'bilinear.*', not 'bicubic'"):
        make_store(tokenizer, six_videos, tmp_path / "s")


def test_another_tokenizer_of_the_same_name_is_refused(tmp_path, six_videos, tokenizer):
    make_store(tokenizer, six_videos, tmp_path / "s")
    for name, _ in small_tokenizer().named_parameters():
        other = small_tokenizer()
        with torch.no_grad():
            other.get_parameter(name).view(-1)[-1] += 1e-3
        assert other.fingerprint != tokenizer.fingerprint, name
    assert small_tokenizer().fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match="fingerprint"):
        make_store(other, six_videos, tmp_path / "s")


# ---------------------------------------------------------------- changed lists and files


@pytest.fixture
def folder(tmp_path, six_videos, write_video):
    """A folder with t.pt and four videos, listed with labels."""
    shutil.copy(six_videos / "t.pt", tmp_path / "t.pt")
    for i in range(4):
        write_video(tmp_path / f"videos/{i}.mp4", range(0, 200, 10 + 5 * i))
    return write_list(tmp_path, [(0, 0), (1, 1), (2, 0), (3, 1)])


def write_list(folder, pairs):
    lines = [f"{i}.mp4 {label}\n" for i, label in pairs]
    (folder / "videos/train.txt").write_text("".join(lines))
    return folder


def test_the_index_follows_the_list(folder, write_video, monkeypatch):
    """Labels are corrected, videos removed, added and replaced; only new ones are decoded."""
    done = call(vqvae, *command(folder, folder / "s"))
    assert "4 videos tokenised, 0 could not be decoded\n" in done.stdout
    before, names = content(folder / "s"), decoded_files(monkeypatch)
    write_video(folder / "videos/4.mp4", range(10, 200, 10))
    write_list(folder, [(4, 0), (1, 0), (0, 1), (3, 1)])
    done = call(vqvae, *command(folder, folder / "s"))
    assert ("4 videos tokenised, 0 could not be decoded (3 kept, 1 new, 1 no longer listed)"
            in done.stdout)
    after = content(folder / "s")
    assert [pair[:2] for pair in after] == [
        ("4.mp4", 0), ("1.mp4", 0), ("0.mp4", 1), ("3.mp4", 1)]
    assert after[1][2] == before[1][2] and after[2][2] == before[0][2] and names == ["4.mp4"]
    write_video(folder / "videos/1.mp4", range(0, 30, 3))
    write_list(folder, [(0, 0), (1, 1), (2, 0)])
    done = call(vqvae, *command(folder, folder / "s"))
    assert "(2 kept, 1 new, 2 no longer listed)" in done.stdout
    assert names == ["4.mp4", "1.mp4"] and content(folder / "s")[2] == before[2]
    assert call(vqvae, *command(folder, folder / "new")).returncode == 0
    assert content(folder / "s") == content(folder / "new")
    times = {path: path.stat().st_mtime_ns for path in (folder / "s").iterdir()}
    again = call(vqvae, *command(folder, folder / "s"))
    assert "3 videos tokenised before, nothing is left to do" in again.stdout
    assert times == {path: path.stat().st_mtime_ns for path in (folder / "s").iterdir()}


def test_labels_that_are_no_longer_listed_leave_the_store(folder, tokenizer):
    make_labelled = [tokenizer, None, folder / "videos", folder / "s", 8, 32,
                     data.views_for("pretrain", 32), "t.pt"]
    for labels in ({"label": 1, "other": 2}, {"label": 0}):
        make_labelled[1] = [(str(folder / "videos/0.mp4"), labels)]
        assert tokenize(*make_labelled)
    assert TokenStore(folder / "s").label_sets() == ["label"]


def test_a_moved_folder_is_the_same(folder, monkeypatch):
    argv = command(folder, folder / "s")
    assert call(vqvae, *argv).returncode == 0
    before, names = content(folder / "s"), decoded_files(monkeypatch)
    moved = folder / "moved"
    shutil.copytree(folder / "videos", moved, copy_function=shutil.copy)  # with new dates
    for _ in range(2):
        assert call(vqvae, *with_root(argv, folder / "videos", moved)).returncode == 0
        assert content(folder / "s") == before and names == []
    assert TokenStore(folder / "s").header["root"] == str(moved)


@pytest.mark.parametrize("name", ["0.mp4", "other.mp4"])
def test_a_folder_of_other_videos_is_refused(folder, write_video, name):
    """Another video of the same name, or another name."""
    argv, other = command(folder, folder / "s"), folder / "other"
    assert call(vqvae, *argv).returncode == 0
    before = content(folder / "s")
    write_video(other / name, range(0, 100, 7))
    (other / "train.txt").write_text(f"{name} 1\n")
    done = call(vqvae, *with_root(argv, folder / "videos", other))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"holds the videos of {folder}/videos, not those of {other}" in done.stderr
    assert content(folder / "s") == before


def test_damaged_tokens_are_made_again_once_the_file_is_deleted(folder):
    """`vqvae.py check` says so."""
    argv = command(folder, folder / "s")
    assert call(vqvae, *argv).returncode == 0
    before = content(folder / "s")
    part, = (folder / "s").glob("part-*.npy")
    damaged = bytearray(part.read_bytes())
    damaged[-1] ^= 1
    part.write_bytes(damaged)
    done = call(vqvae, "check", folder / "s")
    assert done.returncode == 2 and f"{part} holds other tokens than were written" in done.stderr
    assert "delete this file, then tokenise again" in done.stderr
    part.unlink()
    assert call(vqvae, *argv).returncode == 0 and content(folder / "s") == before
    assert call(vqvae, "check", folder / "s").returncode == 0


FULL = """
cd "$1"
dd if=/dev/zero of=disk/filled bs=1k count=392 2>/dev/null
shift
"$@"
echo "code $?" >&2
ls disk/s >&2
rm disk/filled
exec "$@"
"""


def test_a_full_disk_ends_a_tokenisation_in_one_line(folder, small_disk):
    """On a disk of 400 kB. Once there is room, the same command succeeds."""
    argv = [32 if part == 8 else part for part in command(folder, folder / "disk/s")]
    done = subprocess.run(
        [*small_disk(folder / "disk"), "sh", "-c", FULL, "sh", str(folder), sys.executable,
         str(ROOT / "vqvae.py"), *map(str, argv)], check=False, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("tokenising")]
    assert "the disk of" in lines[0] and "is full" in lines[0], done.stderr
    assert lines[1] == "code 2" and not any(".part" in line for line in lines)
    assert done.returncode == 0 and "4 videos tokenised" in done.stdout


# ---------------------------------------------------------------- broken files, names


FAILING = """#!/bin/sh
case "$*" in *0.mp4*) {ffmpeg} "$@" | head -c 15360; kill -9 $$;; esac
exec {ffmpeg} "$@"
"""


def test_a_video_whose_ffmpeg_was_killed_is_tried_again(tmp_path, six_videos, tokenizer,
                                                        monkeypatch):
    script = tmp_path / "ffmpeg"  # decodes five frames of 0.mp4, then it is killed
    script.write_text(FAILING.format(ffmpeg=imageio_ffmpeg.get_ffmpeg_exe()))
    script.chmod(0o755)
    names, errors = ["0.mp4", "z.mp4"], tmp_path / "s/errors.txt"
    with monkeypatch.context() as patch:
        patch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
        store = make_store(tokenizer, six_videos, tmp_path / "s", names=names)
    assert [store.name(i) for i in range(len(store))] == ["z.mp4"]
    assert "0.mp4: ffmpeg was killed by signal 9 after 5 frames" in errors.read_text()
    store = make_store(tokenizer, six_videos, tmp_path / "s", names=names)
    assert [store.name(i) for i in range(len(store))] == names and errors.read_text() == ""
    views = read_views(six_videos / "videos/0.mp4", 8, 32, data.views_for("pretrain", 32))
    assert len(store.tokens(0)) == len(views[0])


def test_a_damaged_video_is_stored_and_listed_by_every_call(tmp_path, six_videos, tokenizer,
                                                            write_video, capsys):
    path = six_videos / "videos/cut.mkv"
    write_video(path, range(0, 240, 2), options=("-g", "10"))
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])
    for names in (["cut.mkv", "0.mp4"], ["cut.mkv", "z.mp4"]):
        store = make_store(tokenizer, six_videos, tmp_path / "s", names=names)
        line = f"{path}: gave {len(store.tokens(0))} frames, perhaps not all: "
        assert (tmp_path / "s/errors.txt").read_text().startswith(line) and len(store) == 2
        output = capsys.readouterr().out
        assert f"damaged {line}" in output
        assert "2 videos tokenised, 0 could not be decoded, 1 perhaps in part" in output


def test_a_store_without_videos_is_refused(tmp_path, six_videos, tokenizer):
    with pytest.raises(UserError, match="none of the 1 videos could be decoded, see errors.txt"):
        make_store(tokenizer, six_videos, tmp_path / "s", names=["broken.mp4"])
    assert "broken.mp4" in (tmp_path / "s/errors.txt").read_text()


def test_names_are_bytes(tmp_path, six_videos, write_video):
    root, names = tmp_path / "videos", [b"caf\xe9.mp4", b"\xe2\x80\xa8 a b.mp4", b"bad\xff.mp4"]
    names = [os.fsdecode(name) for name in names]
    try:
        write_video(root / "v.mp4", [100] * 8).rename(root / names[0])
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    write_video(root / "v.mp4", [50] * 8).rename(root / names[1])
    (root / names[2]).write_bytes(b"no video")
    lines = [os.fsencode(f"{name} {i}\n") for i, name in enumerate(names)]
    (root / "train.txt").write_bytes(b"".join(lines))
    argv = with_root(command(six_videos, tmp_path / "s"), six_videos / "videos", root)
    for _ in range(2):
        done = call(vqvae, *argv)
        assert done.returncode == 0, done.stderr
        assert "bad\\xff.mp4: " in done.stdout
        assert "2 videos tokenised, 1 could not" in done.stdout
        assert "bad\\xff.mp4: " in (tmp_path / "s/errors.txt").read_text()
        store = TokenStore(tmp_path / "s")
        assert [store.name(i) for i in range(2)] == names[:2] and store.video_path(0).is_file()


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/secret.mp4", "a/../../secret.mp4"])
def test_a_name_in_a_store_cannot_lead_out_of_its_folder(tmp_path, monkeypatch, name):
    store = write_store(tmp_path / "s", [(np.zeros((1, 3, 2, 2)), {})],
                        root=str(tmp_path / "videos"))
    monkeypatch.setattr(TokenStore, "name", lambda self, i: name)
    with pytest.raises(UserError, match="leads out of the folder"):
        monitor.original_frames(store, 0, 0, 2, 1)


def test_a_rate_that_is_no_number_reaches_no_filter(tmp_path, write_video):
    """fps in a store's header ends up in ffmpeg's filters."""
    write_video(tmp_path / "videos/0.mp4", [100] * 8)
    store = write_store(tmp_path / "s", [(np.zeros((1, 3, 2, 2)), {})],
                        root=str(tmp_path / "videos"), fps="8,movie=/etc/passwd")
    with pytest.raises(UserError, match="fps must be a number"):
        monitor.original_frames(store, 0, 0, 2, 1)
