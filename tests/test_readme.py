import contextlib
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import findings
import toy_results

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("line", [*toy_results.table()[2:], *findings.lines("7", (0, 1, 2), "long"),
                                  *findings.lines("8", (0, 1, 2), "long")])
def test_the_readme_shows_what_was_measured(line):
    assert line in README.splitlines()


def test_every_figure_says_where_it_comes_from():
    for name, entry in toy_results.read().items():
        assert entry.keys() == {"result", "commit", "torch", "numpy", "python"}, name


def test_from_a_video_file_to_features_in_a_few_lines_of_python(workplace):
    """README's lines, as they stand there, in a folder with a toy world and a run."""
    lines, found = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], {}
    with contextlib.chdir(workplace):
        exec(lines, found)  # noqa: S102
    model, frames = found["model"], found["frames"]
    assert found["cls"].shape == (4, model.config.dim) and frames.shape == (32, 64, 64, 3)
    assert found["features"].shape == (4, 5, 8, 8, model.config.dim)
    assert found["clips"].max() < 256 and found["cls"].std() > 0


def test_every_file_that_the_readme_names_is_there():
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|md|sh))`", README))
    notebooks = set(re.findall(r"`(\d_\w+)`", README))
    assert len(named) > 12 and all((ROOT / name).is_file() for name in named), named
    assert notebooks == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
