import csv

import pytest
import torch

from plumbing import results


def test_accuracies_in_all_and_for_each_class():
    p = torch.eye(7)[[0, 1, 1, 2]] + torch.linspace(0, 0.1, 7)  # after the first, the last ones
    found = results.accuracies(p, torch.tensor([0, 1, 5, 0]), list("abcdefg"))
    assert found["top_1"] == 0.5 and found["top_5"] == 0.75
    assert found["per_class"]["a"] == {"videos": 2, "top_1": 0.5}
    assert found["per_class"]["f"] == {"videos": 1, "top_1": 0}
    assert found["per_class"]["g"] == {"videos": 0, "top_1": None}


def test_five_classes_have_no_top_5():
    assert "top_5" not in results.accuracies(torch.eye(5), torch.arange(5), list("abcde"))


@pytest.mark.parametrize("truth", [torch.tensor([1]), None])
def test_predictions_quote_any_name(tmp_path, truth):
    results.write_predictions(tmp_path / "p.csv", ["a, \udce9.mp4"], torch.tensor([[0.25, 0.75]]),
                              ["put, down", "b"], truth)
    row = next(csv.DictReader((tmp_path / "p.csv").open()))
    assert row["video"] == "a, \\xe9.mp4" and row["prediction"] == "b"
    assert row["put, down"] == "0.2500" and row.get("label") == (None if truth is None else "b")
