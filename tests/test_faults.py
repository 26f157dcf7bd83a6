"""A short run of benchmarks/faults.py, whose long one is in benchmarks/RESULTS.md; two programs at once."""
import contextlib
import random
import subprocess
import sys

import faults
import pytest
from conftest import ROOT, TINY, call, flags

import finetune
import pretrain
from plumbing.cli import UserError


def test_random_damage_is_refused_in_a_line_or_changes_nothing(tmp_path, capsys):
    with contextlib.chdir(tmp_path):
        faults.corruptions(random.Random(1), 60)
    lines = [line for line in capsys.readouterr().out.splitlines() if ", 60: " in line]
    assert [line.split(", 60: ")[0] for line in lines] == ["a checkpoint", "a token store", "UCF101's lists"]
    for line in lines:
        assert {part.split(" ", 1)[1] for part in line.split(": ", 1)[1].split(", ")} <= \
            {"refused in one line", "read as before"}, line


@pytest.mark.parametrize("found, said", [
    (lambda: 1, "read as before"), (lambda: 2, "READ OTHERWISE"), (lambda: 1 / 0, "TRACEBACK ZeroDivisionError")])
def test_what_would_be_wrong_is_noticed(found, said):
    assert faults.outcome(found, 1).startswith(said)


def test_a_refusal_in_several_lines_is_noticed():
    def refuse():
        raise UserError("a\nb")
    assert faults.outcome(refuse, 1) == "REFUSED IN SEVERAL LINES"


HOLD = "import sys; from plumbing.files import lock; lock(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


@pytest.mark.parametrize("module, argv", [
    (pretrain, ["--videos", "datasets/toy/videos", "--tokenizer-steps", 5]),
    (pretrain, ["--data", "datasets/toy/tokens/pretrain"]),
    (finetune, ["--checkpoint", "runs/toy/last.pt"])], ids=["videos", "store", "fine-tuning"])
def test_a_second_run_into_a_folder_is_refused_in_a_line_and_changes_nothing(workplace, module, argv):
    folder = workplace / f"runs/held-{len(argv[1])}"
    small = flags(TINY if module is pretrain else dict(few=4, device="cpu"))
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    done = call(module, *argv, *small, "--out", folder, "--steps", 1, place=workplace)
    first.communicate()
    assert done.returncode == 2 and [path.name for path in folder.iterdir()] == [".lock"]
    assert f"{folder} is being written by process {first.pid} on" in done.stderr.splitlines()[-1]
    assert call(module, *argv, *small, "--out", folder, "--steps", 1, place=workplace).returncode == 0
