import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import toy_results


@pytest.mark.parametrize("line", toy_results.table()[2:])
def test_the_readme_shows_what_was_measured(line):
    assert line in (ROOT / "README.md").read_text().splitlines()


def test_every_figure_says_where_it_comes_from():
    for name, entry in toy_results.read().items():
        assert entry.keys() == {"result", "commit", "torch", "numpy", "python"}, name
