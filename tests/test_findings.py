import contextlib
import json
import shutil
import sys
from pathlib import Path

import findings
import numpy as np
import pytest
import torch
from conftest import ROOT
from paper_tables import CONTRAST, MASK

import masking
from plumbing import runs
from plumbing.cli import UserError
from plumbing.files import read_lines

SHORT = dict(layers=1, dim=16, heads=2, head_dim=8, mlp_dim=32, batch=4, steps=3, min_stride=2,
             max_stride=2)
SEEDS = (0, 1, 2, 3, 4)


@pytest.mark.parametrize("higher, lower, said", [
    ([5, 6, 7], [1, 2, 3], "shown (+4.0, standard error 0.0)"),
    ([5, 6, 10], [4, 6, 3], "not shown (+2.7, standard error 2.2)"),
    ([1, 2, 3.5], [5, 6, 7], "opposite (-3.8, standard error 0.2)"),
    ([4, 2, 3], [1, 1, 1], "not shown (+2.0, standard error 0.6)"),  # 3.5 standard errors of three
    ([5, 6], [1, 2], "not judged, with too few seeds")])
def test_a_claim_is_judged_seed_by_seed_against_the_t_quantile(higher, lower, said):
    assert findings.verdict(dict(enumerate(higher)), dict(enumerate(lower))) == said


@pytest.mark.parametrize("seeds, errors, said", [
    (3, 4.2, "not shown"), (3, 4.4, "shown"), (4, 3.1, "not shown"), (4, 3.3, "shown"),
    (5, 2.7, "not shown"), (5, 2.9, "shown"), (5, -2.7, "not shown"), (5, -2.9, "opposite")])
def test_a_claim_is_shown_beyond_so_many_standard_errors(seeds, errors, said):
    around = np.arange(seeds) - (seeds - 1) / 2  # mean 0
    differences = around + errors * around.std(ddof=1) / np.sqrt(seeds)
    zero = dict.fromkeys(range(seeds), 0.0)
    assert findings.verdict(dict(enumerate(differences)), zero).startswith(f"{said} (")


def test_only_the_seeds_that_both_rows_have_are_compared():
    higher = {0: 5.0, 1: 6.0, 2: 90.0, 3: 7.0}
    lower = {0: 1.0, 1: 2.0, 3: 3.0}
    assert findings.verdict(higher, lower) == "shown (+4.0, standard error 0.0)"


def test_every_table_quotes_the_paper_for_each_row_and_claims_what_it_shows():
    for number, table in findings.TABLES.items():
        assert len(table.paper) == len(table.rows), number
        for claim, figure, *rows in table.claims:
            named = f"probe {figure}" if figure in findings.TASKS else figure
            assert named in table.figures and set(rows) <= set(table.rows), (number, claim)


def test_the_masks_of_table_9_hide_what_their_rows_say():
    rows = findings.TABLES["9 and 15"].rows
    for name in [name for name in rows if name.startswith("block")]:
        blocks = rows[name].get("blocks", masking.blocks_for(5, 8, 8))
        hidden = masking.expected_ratio(5, 8, 8, blocks)
        assert f"{100 * hidden:.1f}%" == name.removeprefix("block, ")


@pytest.mark.parametrize("number", findings.TABLES)
def test_what_a_row_changes_arrives_in_the_configuration(number):
    for changes in filter(None, findings.TABLES[number].rows.values()):
        config = findings.pretraining_config(changes, 3, "out")
        runs.resolve_batch(config, videos=2000, world=1)
        wanted = {**findings.RECIPE, "contrast": config.batch, **changes}
        wanted["steps"] = 16_000 // wanted["batch"]
        assert {name: getattr(config, name) for name in wanted} == wanted
        assert config.seed == 3


@pytest.fixture
def world(workplace, monkeypatch):
    """The tests' toy world in place of the findings' own, and experiments of a few steps."""
    monkeypatch.setattr(findings, "HOME", workplace / "datasets/toy")
    monkeypatch.setattr(findings, "RECIPE", SHORT)
    tuning = dict(num_labels=8, batch=4, steps=2, lr=1e-3)
    monkeypatch.setattr(findings, "FINETUNING", tuning)
    monkeypatch.setattr(findings, "SCRATCH", dict(tuning, from_scratch=True, steps=3))
    with contextlib.chdir(workplace):
        yield


PRETRAINED = {"seconds", "copied", "mask accuracy", "contrastive loss", "probe motion",
              "probe scene", "probe shape"}


def experiment(part, changes):
    return findings.experiment(job(part, changes))


def job(part, changes):
    return dict(changes=changes, seed=1, part=part, settings=findings.settings(part, changes))


@pytest.mark.parametrize("changes, lacking", [
    (None, {"mask accuracy", "contrastive loss"}), (MASK, {"contrastive loss"}),
    (CONTRAST, {"mask accuracy"}), (dict(layout="T,H,W", pre_norm=True), set())], ids=str)
def test_an_experiment_gives_the_figures_of_what_it_trains(world, changes, lacking):
    figures = experiment("pre-training", changes)
    assert figures.keys() == PRETRAINED - lacking
    figures = experiment("fine-tuning", changes)
    assert figures.keys() == {"motion", "scene", "one class"}
    assert 0 <= figures["one class"] <= 2


def test_an_experiment_gives_the_same_figures_again(world):
    """Fine-tuning does so without the pre-trained model, too."""
    first, tuned = experiment("pre-training", {}), experiment("fine-tuning", {})
    shutil.rmtree(findings.folder({}, 1))
    assert experiment("fine-tuning", {}) == tuned
    second = experiment("pre-training", {})
    for figures in (first, second):
        del figures["seconds"]
    assert first == second


def test_a_model_whose_pre_training_was_stopped_is_not_fine_tuned(world):
    """It is pre-trained again."""
    tuned = experiment("fine-tuning", {})
    checkpoint = Path(findings.folder({}, 1)) / "last.pt"
    content = torch.load(checkpoint)
    torch.save({**content, "step": 2}, checkpoint)
    assert not findings.finished(checkpoint.parent)
    for weight in content["model"].values():
        weight.zero_()
    torch.save({**content, "step": 2}, checkpoint)
    assert experiment("fine-tuning", {}) == tuned and findings.finished(checkpoint.parent)


def test_other_settings_have_other_folders(world, monkeypatch):
    before = findings.folder({}, 1)
    monkeypatch.setattr(findings, "RECIPE", dict(SHORT, steps=4))
    assert findings.folder({}, 1) != before


def test_a_change_of_the_settings_while_it_runs_is_refused(world, monkeypatch):
    waiting = job("fine-tuning", {})
    monkeypatch.setattr(findings, "FINETUNING", {"steps": 7})
    with pytest.raises(UserError, match="has changed"):
        findings.experiment(waiting)


def test_a_tokenizer_of_another_size_is_refused(world, monkeypatch):
    splits = {"pretrain": 24, "train": 12, "val": 8, "test": 6}  # the folder's own
    monkeypatch.setattr(findings, "SPLITS", splits)
    monkeypatch.setattr(findings, "RECIPE", dict(SHORT, codes=7))
    with pytest.raises(UserError, match="256 codes, not 7"):
        findings.make_world()


def test_tables_of_which_nothing_is_measured_are_shown_as_such(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(findings, "RESULTS", tmp_path / "findings.jsonl")
    monkeypatch.setattr(findings, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(sys, "argv", ["findings.py", "--all", "--show"])
    findings.main()
    assert capsys.readouterr().out.count("not measured") > 20


def test_what_is_measured_is_written_down_and_not_run_again(world, monkeypatch, tmp_path):
    path = tmp_path / "findings.jsonl"
    monkeypatch.setattr(findings, "RESULTS", path)
    first, then = (findings.jobs(part, ["7"], [1]) for part in findings.PARTS)
    assert [job["changes"] for job in first] == list(findings.TABLES["7"].rows.values())
    findings.measure_all(invented, first[:2] + then[:1], path)
    assert findings.jobs("pre-training", ["7"], [1]) == first[2:]
    assert findings.jobs("fine-tuning", ["7"], [1]) == then[1:]
    assert len(findings.jobs("pre-training", ["7"], [1, 2])) == 6
    assert len(findings.jobs("pre-training", ["7", "8"], [1])) == 3  # block is mask only
    assert len(findings.jobs("pre-training", ["16"], [1])) == 4
    assert findings.jobs("fine-tuning", ["16"], [1]) == []  # only of Tables 7 and 8
    table = findings.lines("7", [1])
    said = "| | mask accuracy | fine-tuned motion | fine-tuned scene | the paper |"
    assert table[0] == said  # what was measured
    assert table[2].startswith("| none | 50.0 | 25.0 | 5.0 | SSV2 1.2")
    assert table[4].startswith("| mask only | - | - | - |")
    assert table[-1].endswith("every video: 2 of 2.")
    table = findings.lines("7", [1, 2, 3])
    assert table[2].startswith("| none (1 of 3 seeds) | 50.0 | 25.0 |")
    assert table[3].startswith("| contrastive only (1 of 3 seeds) | 50.0 | - | - |")
    assert table[4].startswith("| mask only | - | - | - |")
    entry = json.loads(path.read_text().splitlines()[0])
    assert entry["settings"]["pre-training"] == SHORT
    assert entry["seed"] == 1 and entry["torch"] == torch.__version__
    monkeypatch.setattr(findings, "FINETUNING", {"steps": 7})  # this asks for other fine-tuning
    assert len(findings.jobs("fine-tuning", ["7"], [1])) == 3
    assert findings.jobs("pre-training", ["7"], [1]) == first[2:]
    monkeypatch.setattr(findings, "CLIPS", 3)  # and this for all again
    assert len(findings.jobs("pre-training", ["7"], [1])) == 4


def invented(job):
    if job["part"] == "pre-training":
        return {"mask accuracy": 50.0}
    return {"motion": 25.0, "scene": 5.0, "one class": 2}


def test_every_figure_says_where_it_comes_from():
    for entry in read_lines(findings.RESULTS):
        assert entry.keys() == {"changes", "seed", "part", "settings", "result", "commit", "torch",
                                "numpy", "python", "device"}


MEASURED = [number for number, table in findings.TABLES.items()
            if all(SEEDS[0] in findings.results(changes) for changes in table.rows.values())]


@pytest.mark.parametrize("line", findings.summary(SEEDS))
def test_the_readme_shows_the_tables_that_were_measured(line):
    assert line in (ROOT / "README.md").read_text().splitlines()


PAGE = (ROOT / "benchmarks/README.md").read_text()
SECTIONS = {text.partition("\n")[0]: text.splitlines() for text in PAGE.split("\n## ")}


def test_the_page_has_a_section_for_each_table_that_was_measured():
    assert [title for title in SECTIONS if title.startswith("Table")] == [
        findings.title(number) for number in MEASURED]


@pytest.mark.parametrize("number", MEASURED)
def test_the_page_shows_the_tables_that_were_measured(number):
    section = SECTIONS[findings.title(number)]
    for line in findings.lines(number, SEEDS):
        assert line in section


def test_the_page_counts_the_verdicts_that_were_measured():
    assert "\n".join(findings.tally(SEEDS)) in PAGE


def test_the_page_shows_table_8_with_another_tokenizer(monkeypatch):
    monkeypatch.setattr(findings, "TOKENIZER", 1)
    assert "\n".join(findings.lines("8", [5, 6, 7, 8, 9])) in PAGE
