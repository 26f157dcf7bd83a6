"""Files whole or not there, folders that one program writes into, disks that are full."""
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from plumbing import files, runs
from plumbing.cli import UserError

HOLD = "import sys, time; from plumbing.files import lock; lock(sys.argv[1]); print('held', flush=True); time.sleep(60)"


def other_program(code, *argv, under=()):
    return subprocess.run([*under, sys.executable, "-c", code, *map(str, argv)], cwd=ROOT, check=False,
                          capture_output=True, text=True)


def test_one_program_at_a_time_writes_into_a_folder_and_a_killed_one_leaves_no_lock(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "s"], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"{tmp_path}/s is being written by process {holder.pid} on "
                                        f"{re.escape(socket.gethostname())}"):
        files.lock(tmp_path / "s")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert files.lock(tmp_path / "s")


def test_a_process_keeps_its_lock_until_it_gives_it_back(tmp_path):
    """Though it asks again, and though a loader process that it forked ends."""
    assert files.lock(tmp_path / "s") and not files.lock(tmp_path / "s/../s")
    with files.locked(tmp_path / "s"):
        assert not files.lock(tmp_path / "s")
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    asked = HOLD.replace("60", "0")
    refused = other_program(asked, tmp_path / "s")
    assert refused.returncode != 0 and f"process {os.getpid()}" in refused.stderr
    files.unlock(tmp_path / "s")
    assert other_program(asked, tmp_path / "s").stdout == "held\n"


def test_what_killed_processes_left_half_written_is_removed_and_nothing_else(tmp_path):
    code = "import os, sys; from plumbing.files import whole\nwith whole(sys.argv[1]) as file: os._exit(9)"
    for _ in range(2):  # two processes of the same number, in two containers, have two files
        other_program(code, tmp_path / "last.pt")
    (tmp_path / "film.part").write_text("a download")
    assert len(list(tmp_path.glob("last.pt.*.part"))) == 2
    files.lock(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"film.part", ".lock"}


def test_a_folder_that_is_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    for folder in (tmp_path / "run", tmp_path / "run/sub"):
        with pytest.raises(UserError, match=r"cannot write .*/run.*: (file exists|not a directory)"):
            files.lock(folder)


def test_a_full_disk_is_called_full_and_leaves_the_earlier_checkpoint(tmp_path, small_disk):
    code = """if True:
        import sys, torch; from pathlib import Path; from plumbing import cli, runs
        def main():
            runs.save_checkpoint(sys.argv[1] + "/last.pt", {"step": 1, "model": torch.zeros(10000)})
            try:
                runs.save_checkpoint(sys.argv[1] + "/last.pt", {"step": 2, "model": torch.zeros(200000)})
            finally:
                print(torch.load(sys.argv[1] + "/last.pt")["step"], [p.name for p in Path(sys.argv[1]).iterdir()])
        cli.run(main)"""
    done = other_program(code, tmp_path / "disk", under=small_disk(tmp_path / "disk"))
    assert done.returncode == 2 and done.stdout == "1 ['last.pt']\n"
    assert f"the disk of {tmp_path}/disk/last.pt is full" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_bug_of_a_library_keeps_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), files.whole(tmp_path / "x"):
        raise RuntimeError("a bug")
    with pytest.raises(AttributeError):
        runs.save_checkpoint(tmp_path / "x", {"model": lambda: torch.zeros(1)})
    assert not list(tmp_path.iterdir())
