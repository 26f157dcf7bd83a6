"""Files that are complete or absent, folders that cannot be written, disks that are full."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from plumbing import checkpoints, files
from plumbing.cli import UserError


def other_program(code, *argv, under=()):
    return subprocess.run([*under, sys.executable, "-c", code, *map(str, argv)], cwd=ROOT,
                          check=False, capture_output=True, text=True)


KILLED = """
import os, sys
from plumbing.files import whole
with whole(sys.argv[1]) as file:
    file.write(b"half of it")
    file.flush()
    os._exit(9)
"""


def test_a_kill_leaves_the_earlier_file(tmp_path):
    """Two processes that write it at once do not meet."""
    path = tmp_path / "last.pt"
    path.write_bytes(b"earlier")
    for _ in range(2):
        assert other_program(KILLED, path).returncode == 9
    assert path.read_bytes() == b"earlier" and len(list(tmp_path.glob("last.pt.*.part"))) == 2


def test_an_error_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"earlier")
    with pytest.raises(KeyboardInterrupt), files.whole(path) as file:
        file.write(b"half of it")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    for folder, reason in (("run", "file exists"), ("run/sub", "not a directory")):
        with pytest.raises(UserError, match=f"cannot write {tmp_path}/{folder}: {reason}"):
            files.try_folder(tmp_path / folder)


def test_a_folder_that_can_be_written_is_left_empty(tmp_path):
    files.try_folder(tmp_path / "a/b")
    assert list((tmp_path / "a/b").iterdir()) == []


FULL = """
import sys, torch
from pathlib import Path
from plumbing import cli
from plumbing.checkpoints import save_checkpoint
folder = Path(sys.argv[1])
def main():
    save_checkpoint(folder / "last.pt", {"step": 1, "model": torch.zeros(10000)})
    try:
        save_checkpoint(folder / "last.pt", {"step": 2, "model": torch.zeros(200000)})
    finally:
        print(torch.load(folder / "last.pt")["step"], [path.name for path in folder.iterdir()])
cli.run(main)
"""


def test_a_full_disk_is_called_full_and_leaves_the_earlier_checkpoint(tmp_path, small_disk):
    done = other_program(FULL, tmp_path / "disk", under=small_disk(tmp_path / "disk"))
    assert done.returncode == 2 and done.stdout == "1 ['last.pt']\n"
    assert f"the disk of {tmp_path}/disk/last.pt is full" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_bug_of_a_library_keeps_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), files.whole(tmp_path / "x"):
        raise RuntimeError("a bug")
    with pytest.raises(AttributeError):
        checkpoints.save_checkpoint(tmp_path / "x", {"model": lambda: torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_damaged_lines_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert files.read_lines(path) == []
    path.write_text('{"step": 1}\n{"st\n3\n{"step": 2}\n{"step": 3}')
    assert files.read_lines(path) == [{"step": 1}, {"step": 2}]
