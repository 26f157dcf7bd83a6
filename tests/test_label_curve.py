import json

import findings
import label_curve
import pytest
from paper_tables import BOTH

from plumbing.cli import UserError

PRE_TRAINED, FROM_SCRATCH = label_curve.WAYS


def test_both_ways_try_the_same_rates_and_see_the_same_labels():
    """Training from scratch takes four times the steps; all else is equal."""
    grid, curve = label_curve.rates(), label_curve.curve((0, 1))
    assert {job["recipe"]["eval_split"] for job in grid} == {"val"}
    for jobs in (grid, curve):
        sides = [[job for job in jobs if job["way"] == way] for way in label_curve.WAYS]
        assert len(sides[0]) == len(sides[1]) == len(jobs) / 2
        for one, other in zip(*sides):
            assert (one["task"], one["seed"]) == (other["task"], other["seed"])
            assert one["recipe"]["num_labels"] == other["recipe"]["num_labels"]
            assert jobs is curve or one["recipe"]["lr"] == other["recipe"]["lr"]
            assert 4 * one["recipe"]["steps"] == other["recipe"]["steps"]
            assert other["recipe"]["from_scratch"] and "from_scratch" not in one["recipe"]
    assert len(curve) == 2 * 2 * 2 * 3 and len({json.dumps(job) for job in curve}) == len(curve)


def test_results_are_read_back_and_drawn(monkeypatch, tmp_path):
    """With 100 labels, those of Table 7."""
    path = tmp_path / "label_curve.jsonl"
    monkeypatch.setattr(label_curve, "RESULTS", path)
    monkeypatch.setattr(findings, "FIGURES", tmp_path)
    monkeypatch.setattr(findings, "RESULTS", tmp_path / "findings.jsonl")
    findings.RESULTS.write_text("".join(json.dumps({
        "changes": changes, "seed": 1, "part": "fine-tuning",
        "settings": findings.settings("fine-tuning", changes),
        "result": {"motion": top_1, "scene": 30.0}}) + "\n" for changes, top_1 in
        ((BOTH, 75.0), (None, 32.0))))
    jobs = label_curve.curve((0, 1))
    path.write_text("".join(json.dumps({**job, "result": {"top-1": 30.0 + job["seed"]}}) + "\n"
                            for job in jobs[:-1]))
    assert label_curve.results() == [(job, 30.0 + job["seed"]) for job in jobs[:-1]]
    table = label_curve.lines((0, 1))
    cells = "30.5 +- 0.7 |"
    assert table[2] == f"| motion, {PRE_TRAINED} | {cells} 75.0 (1 of 2 seeds) | {cells} {cells}"
    assert table[3].split(" | ")[2] == "32.0 (1 of 2 seeds)"
    assert table[5].endswith("| 30.5 +- 0.7 | 30.0 (1 of 2 seeds) |")
    label_curve.draw((0, 1))
    assert (tmp_path / "label_curve.png").stat().st_size > 10_000


def test_the_page_shows_the_rates_that_were_measured():
    shown = (findings.ROOT / "benchmarks/README.md").read_text().splitlines()
    assert all(line in shown for line in label_curve.rate_lines())


def test_the_models_of_table_7_are_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{findings.folder(BOTH, 0)}.*findings.py"):
        label_curve.measure(label_curve.job(PRE_TRAINED, "motion", 0))


@pytest.mark.parametrize("line", label_curve.lines(label_curve.SEEDS))
def test_the_page_shows_the_curve_that_was_measured(line):
    assert line in (findings.ROOT / "benchmarks/README.md").read_text().splitlines()
