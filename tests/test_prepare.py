"""What pre-training needs is made or checked before training, and refused before any work."""
import re
import shutil
from pathlib import Path

import pytest
from conftest import TINY, call, flags, random_store

import pretrain
import vqvae
from plumbing.cli import UserError
from plumbing.store import TokenStore

SHORT = ["--steps", 2, "--tokenizer-steps", 2, *flags(TINY)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_video):
    """Two folders of videos of the same names, and a run on the first."""
    folder = tmp_path_factory.mktemp("prepare")
    for name, first in (("A", 10), ("B", 17)):
        for i in range(3):
            write_video(folder / name / f"{i}.mp4", range(0, 240, first + i))
    done = call(pretrain, "--videos", "A", "--out", "runs/a", *SHORT, place=folder)
    assert done.returncode == 0, done.stderr
    return folder


def refused(folder, *argv):
    """The one line that a run is refused with."""
    done = call(pretrain, *argv, *SHORT, place=folder)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_videos_of_another_folder_are_refused(folder):
    line = refused(folder, "--videos", "B", "--out", "runs/a", "--resume")
    assert f"holds the videos of {folder}/A, not those of {folder}/B" in line


def test_a_tokenizer_of_another_number_of_codes_is_refused(folder):
    line = refused(folder, "--videos", "A", "--out", "runs/a", "--resume", "--codes", 64)
    assert "runs/a/tokenizer.pt has 256 codes, not 64" in line


def test_a_missing_tokenizer_is_refused_and_not_trained(folder):
    line = refused(folder, "--videos", "A", "--tokenizer", "typo.pt", "--out", "runs/typo")
    assert "--tokenizer typo.pt: there is no such file" in line
    assert not (folder / "typo.pt").exists() and not list((folder / "runs/typo").iterdir())


def test_videos_added_to_a_folder_are_added_to_the_run(folder, write_video):
    shutil.copytree(folder / "runs/a", folder / "runs/more")
    shutil.copytree(folder / "A", folder / "more")
    write_video(folder / "more/new.mp4", range(0, 240, 9))
    argv = ["--videos", "more", "--out", "runs/more", "--resume", *SHORT, "--steps"]
    done = call(pretrain, *argv, 3, place=folder)
    assert done.returncode == 0 and "(3 kept, 1 new, 0 no longer listed)" in done.stdout
    assert len(TokenStore(folder / "runs/more/tokens/pretrain")) == 4
    done = call(pretrain, *argv, 4, place=folder)
    assert done.returncode == 0 and "tokenised" not in done.stdout  # nothing is left to do


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_made(folder):
    (folder / "file").write_text("")
    for argv in (["--videos", "A"], ["--data", "runs/a/tokens/pretrain"], []):
        assert "cannot write" in refused(folder, *argv, "--out", "file")
    assert not (folder / "datasets").exists()


def test_the_tokenizer_of_a_store_is_checked_at_the_start(folder, tmp_path):
    fingerprint = TokenStore(folder / "runs/a/tokens/pretrain").header["fingerprint"]
    common = ["--data", "runs/a/tokens/pretrain", "--out", "runs/d"]
    for codes, reason in ((64, "has 64 codes, .*pretrain holds 256"),
                          (256, f"did not make .*{fingerprint}")):
        vqvae.save_tokenizer(vqvae.VQVAE(codes), tmp_path / "t.pt")
        assert re.search(reason, refused(folder, *common, "--tokenizer", tmp_path / "t.pt"))
    assert "no such file" in refused(folder, *common, "--tokenizer", tmp_path / "none.pt")
    for split in ("train", "val"):
        random_store(folder / "labelled" / split, 6, side=8, vocab_size=256, size=64,
                     fingerprint="another")
    assert "fingerprint" in refused(folder, *common, "--monitor", "labelled")
    assert not list((folder / "runs/d").iterdir())


def test_pictures_that_cannot_be_drawn_cost_a_line_at_the_start(folder):
    """The videos are gone."""
    shutil.copytree(folder / "A", folder / "gone")
    done = call(pretrain, "--videos", "gone", "--out", "runs/gone", *SHORT, place=folder)
    assert done.returncode == 0
    shutil.rmtree(folder / "gone")
    done = call(pretrain, "--data", "runs/gone/tokens/pretrain",
                "--tokenizer", "runs/gone/tokenizer.pt", "--out", "runs/e", *SHORT, place=folder)
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[0]
    assert line.startswith("no pictures") and "gone/0.mp4 is not there" in line
    assert (folder / "runs/e/last.pt").is_file()
    assert not (folder / "runs/e/fill_in.png").exists()


def test_the_tokenizer_is_drawn_before_the_labelled_toy_videos_are_made(tmp_path, monkeypatch):
    names = []

    def stop(videos, *_, **__):
        names.extend(sorted(path.name for path in Path(videos[0]).parent.iterdir()))
        raise UserError("enough")

    monkeypatch.setattr(vqvae, "make_tokenizer", stop)
    assert "enough" in call(pretrain, "--toy-videos", 40, *SHORT, place=tmp_path).stderr
    assert names == [f"{number:05d}.mp4" for number in range(40)]
