"""What pre-training finds is what it was asked for, or it says so before any work."""
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
def place(tmp_path_factory, write_video):
    """Two folders of videos of the same names, and a run on the first."""
    place = tmp_path_factory.mktemp("prepare")
    for folder, first in (("A", 10), ("B", 17)):
        for i in range(3):
            write_video(place / folder / f"{i}.mp4", range(0, 240, first + i))
    done = call(pretrain, "--videos", "A", "--out", "runs/a", *SHORT, place=place)
    assert done.returncode == 0, done.stderr
    return place


def refused(place, *argv):
    """The line that a run is refused with, when nothing but the line was said."""
    done = call(pretrain, *argv, *SHORT, place=place)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_videos_of_another_folder_are_not_those_of_the_run(place):
    said = refused(place, "--videos", "B", "--out", "runs/a")
    assert f"holds the videos of {place}/A, not those of {place}/B" in said


def test_another_number_of_codes_is_not_that_of_the_tokenizer_there(place):
    said = refused(place, "--videos", "A", "--out", "runs/a", "--codes", 64)
    assert "runs/a/tokenizer.pt has 256 codes, not 64" in said


def test_a_tokenizer_that_is_not_there_is_not_trained_under_that_name(place):
    assert "--tokenizer typo.pt: there is no such file" in refused(place, "--videos", "A", "--tokenizer", "typo.pt",
                                                                   "--out", "runs/typo")
    assert not (place / "typo.pt").exists() and not (place / "runs/typo").exists()


def test_videos_added_to_a_folder_are_added_to_the_run(place, write_video):
    shutil.copytree(place / "runs/a", place / "runs/more")
    shutil.copytree(place / "A", place / "more")
    write_video(place / "more/new.mp4", range(0, 240, 9))
    done = call(pretrain, "--videos", "more", "--out", "runs/more", *SHORT, place=place)
    assert done.returncode == 0 and "(3 kept, 1 new, 0 no longer listed)" in done.stdout
    assert len(TokenStore(place / "runs/more/tokens/pretrain")) == 4
    done = call(pretrain, "--videos", "more", "--out", "runs/more", "--resume", *SHORT, place=place)
    assert done.returncode == 0 and "tokenised" not in done.stdout  # nothing to do, nothing said


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_made(place):
    (place / "file").write_text("")
    for argv in (["--videos", "A"], ["--data", "runs/a/tokens/pretrain"], []):
        assert "cannot write" in refused(place, *argv, "--out", "file")
    assert not (place / "datasets").exists()


def test_the_tokenizer_of_a_store_is_checked_at_the_start(place, tmp_path):
    made = TokenStore(place / "runs/a/tokens/pretrain").header["fingerprint"]
    common = ["--data", "runs/a/tokens/pretrain", "--out", "runs/d"]
    for codes, said in ((64, "has 64 codes, .*pretrain holds 256"), (256, f"did not make .*{made}")):
        vqvae.save_tokenizer(vqvae.VQVAE(codes), tmp_path / "t.pt")
        assert re.search(said, refused(place, *common, "--tokenizer", tmp_path / "t.pt"))
    assert "no such file" in refused(place, *common, "--tokenizer", tmp_path / "none.pt")
    assert not (place / "runs/d").exists()
    for split in ("train", "val"):
        random_store(place / "labelled" / split, 6, side=8, vocab_size=256, size=64, fingerprint="another")
    assert "fingerprint" in refused(place, *common, "--monitor", "labelled")


def test_pictures_that_cannot_be_drawn_cost_a_line_at_the_start(place, write_video):
    """Of videos that are gone, and of DALL-E without its decoder."""
    shutil.copytree(place / "A", place / "gone")
    assert call(pretrain, "--videos", "gone", "--out", "runs/gone", *SHORT, place=place).returncode == 0
    shutil.rmtree(place / "gone")
    done = call(pretrain, "--data", "runs/gone/tokens/pretrain", "--tokenizer", "runs/gone/tokenizer.pt", "--out",
                "runs/e", *SHORT, place=place)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("no pictures") and "gone/0.mp4 is not there" in said[0]
    assert (place / "runs/e/last.pt").is_file() and not (place / "runs/e/fill_in.png").exists()


def test_the_tokenizer_is_drawn_before_the_toy_s_labelled_videos_are_made(tmp_path, monkeypatch):
    there = []

    def no_tokenizer(videos, *_, **__):
        there.extend(sorted(path.name for path in Path(videos[0]).parent.iterdir()))
        raise UserError("enough")
    monkeypatch.setattr(vqvae, "make_tokenizer", no_tokenizer)
    assert "enough" in call(pretrain, "--toy-videos", 40, *SHORT, place=tmp_path).stderr
    assert there == [f"{number:05d}.mp4" for number in range(40)]
