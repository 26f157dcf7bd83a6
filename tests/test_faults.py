"""A short run of benchmarks/faults.py: its long one and their counts are in benchmarks/RESULTS.md."""
import contextlib
import random

import faults
import pytest

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
