"""A short run of benchmarks/faults.py, and two runs into one folder.

The long run is in benchmarks/performance.md.
"""
import contextlib
import random

import faults
import pytest
from conftest import TINY, call, flags

import finetune
import pretrain
from plumbing.cli import UserError


def test_random_damage_is_refused_in_a_line_or_changes_nothing(tmp_path, capsys):
    with contextlib.chdir(tmp_path):
        faults.corruptions(random.Random(1), 60)
    lines = [line for line in capsys.readouterr().out.splitlines() if ", 60: " in line]
    names = [line.split(", 60: ")[0] for line in lines]
    assert names == ["a checkpoint", "a token store", "UCF101's lists"]
    for line in lines:
        outcomes = line.split(": ", 1)[1].split(", ")
        kinds = {outcome.split(" ", 1)[1] for outcome in outcomes}
        assert kinds <= {"refused in one line", "read as before"}, line


@pytest.mark.parametrize("read, said", [
    (lambda: 1, "read as before"), (lambda: 2, "READ OTHERWISE"),
    (lambda: 1 / 0, "TRACEBACK ZeroDivisionError")])
def test_wrong_outcomes_are_noticed(read, said):
    assert faults.outcome(read, 1).startswith(said)


def test_a_refusal_in_several_lines_is_noticed():
    def refuse():
        raise UserError("a\nb")

    assert faults.outcome(refuse, 1) == "REFUSED IN SEVERAL LINES"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("module, argv", [
    (pretrain, ["--videos", "datasets/toy/videos", "--tokenizer-steps", 5]),
    (pretrain, ["--data", "datasets/toy/tokens/pretrain"]),
    (finetune, ["--checkpoint", "runs/toy/last.pt"])], ids=["videos", "store", "fine-tuning"])
def test_a_second_run_into_a_folder_is_refused_in_a_line_and_changes_nothing(
        workplace, tmp_path, module, argv):
    folder = tmp_path / "run"
    small = flags(TINY if module is pretrain else dict(num_labels=4, device="cpu"))
    command = [*argv, *small, "--steps", 1, "--out", folder]
    assert call(module, *command, place=workplace).returncode == 0
    before = contents(folder)
    done = call(module, *command, place=workplace)
    assert done.returncode == 2 and contents(folder) == before
    assert len(done.stderr.splitlines()) == 1
    assert f"{folder} holds a run" in done.stderr and "--resume" in done.stderr
