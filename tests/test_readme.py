import contextlib
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import toy_results

import finetune
import pretrain
import vqvae
from plumbing.cli import parse

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("line", toy_results.table())
def test_the_results_are_what_was_measured(line):
    assert line in (ROOT / "docs/results.md").read_text().splitlines()


def test_links_to_the_code_point_at_what_they_name():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 12
    for name, path, line in links:
        text = (ROOT / path).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name}\b", text), (name, path, line)


def commands():
    """Every command of the project in the README and in docs/ -> [(script, arguments)]."""
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text().replace("\\\n", " ").replace("$T", "python vqvae.py tokenize")
        for line in re.findall(r"^    (.*)$", text, re.MULTILINE):
            for script, rest in re.findall(r"\b(pretrain|finetune|vqvae)\.py (--?[^&#]*|tokenize "
                                           r"[^&#]*|train [^&#]*)", line):
                yield script, re.split(r"\s{2,}[a-z]", rest)[0].split()


@pytest.mark.parametrize("script, argv", list(commands()), ids=str)
def test_every_command_of_the_documents_is_understood(script, argv):
    module = {"pretrain": pretrain, "finetune": finetune, "vqvae": vqvae}[script]
    if script == "vqvae":
        parse(vqvae.TokenizeConfig, argv[1:], "")
    elif script == "pretrain":
        parse(module.Config, argv, "", module.PRESETS)
    else:
        usual = "own" if "--videos" in argv else None  # as in finetune.main
        parse(module.Config, argv, "", module.PRESETS, chosen_by="dataset", usual=usual)


def test_every_figure_says_where_it_comes_from():
    for name, entry in toy_results.read().items():
        assert entry.keys() == {"result", "commit", "torch", "numpy", "python"}, name


def test_from_a_video_file_to_features_in_a_few_lines_of_python(workplace):
    """The page's lines, in a folder with a toy world and a run."""
    page, names = (ROOT / "docs/python.md").read_text(), {}
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    with contextlib.chdir(workplace):
        exec(code, names)  # noqa: S102
    dim = names["model"].config.dim
    assert names["frames"].shape == (32, 64, 64, 3)
    assert names["cls"].shape == (4, dim)
    assert names["features"].shape == (4, 5, 8, 8, dim)
    assert names["clips"].max() < 256 and names["cls"].std() > 0


def test_every_file_that_the_readme_names_is_there():
    names = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|md|sh))`", README))
    notebooks = set(re.findall(r"`(\d_\w+)`", README))
    assert len(names) > 7
    assert not [name for name in names if not (ROOT / name).is_file()]
    assert notebooks == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
