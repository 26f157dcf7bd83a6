import json
import os
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn

import training
from training import option


@dataclass
class Example:
    preset: str = option("slow", "which", choices=["slow", "fast"])
    lr: float = option(0.1, "rate")
    steps: int = option(5, "how many")
    d_max: float | None = option(None, "a limit")
    resume: bool = option(False, "go on")

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"--steps must be at least 1, not {self.steps}")


PRESETS = {"slow": {}, "fast": dict(lr=1.0, steps=1)}


def parse(*argv):
    return training.parse(Example, list(argv), "text", PRESETS)


def test_flags_win_over_presets_and_presets_over_defaults():
    assert parse() == Example()
    assert parse("--preset", "fast", "--steps", "3", "--resume", "--d-max", "2") == Example("fast", 1.0, 3, 2.0, True)


@pytest.mark.parametrize("argv, said", [
    (["--steps", "many"], "many"), (["--steps", "0"], "at least 1"), (["--preset", "slwo"], "fast"),
    (["--step-size", "3"], "--step-size")])
def test_a_wrong_value_ends_with_one_line_and_code_2(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and said in lines[0]


def test_the_schedule_rises_then_falls_to_zero():
    rates = [training.learning_rate(step, 100, 1.0, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and rates[100] == 0
    assert max(rates) == 1.0 and min(rates[:100]) > 0
    assert training.learning_rate(0, 10, 1.0, 0) == 1.0


def test_biases_and_norms_are_not_decayed():
    model = nn.ModuleDict({"linear": nn.Linear(3, 3), "norm": nn.LayerNorm(3), "batch": nn.BatchNorm1d(3),
                           "table": nn.Embedding(4, 3)})
    model.cls = nn.Parameter(torch.ones(3))
    optimizer = training.make_optimizer(model, 0.1, 0.5, (0.9, 0.98))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"linear.weight", "table.weight", "cls"}


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path):
    training.save(tmp_path / "last.pt", {"step": 1})

    class Unwritable:
        def __reduce__(self):
            raise OSError("disk full")
    with pytest.raises(OSError):
        training.save(tmp_path / "last.pt", {"step": Unwritable()})
    assert torch.load(tmp_path / "last.pt") == {"step": 1}


def test_only_a_resumed_or_restarted_run_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    assert training.last_checkpoint(tmp_path, resume=True) is None
    (tmp_path / "last.pt").write_text("a run's")
    assert training.last_checkpoint(tmp_path, resume=True) == tmp_path / "last.pt"
    assert training.last_checkpoint(tmp_path, resume=False) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert training.last_checkpoint(tmp_path, resume=False) == tmp_path / "last.pt"
    training.RunLog(tmp_path, Example(), resume_from=3).close()
    assert training.last_checkpoint(tmp_path, resume=False) == tmp_path / "last.pt"
    training.RunLog(tmp_path, Example()).close()  # a run that starts anew
    assert training.last_checkpoint(tmp_path, resume=False) is None
    assert (tmp_path / "last.old.pt").read_text() == "a run's"


def start_from(rank, place):
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    training.check_same(3, "runs/a")
    with pytest.raises(ValueError, match="--out runs/a"):
        training.check_same(3 * rank, "runs/a")
    assert not training.restarted()
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(rank)  # one machine's process ended, the other's was called again
    assert training.restarted()
    dist.destroy_process_group()


def test_processes_agree_on_where_to_start(tmp_path):
    torch.multiprocessing.spawn(start_from, (tmp_path,), nprocs=2)


def test_a_gradient_scaler_keeps_its_scale_over_a_checkpoint():
    before, after = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (128.0, 2.0))
    training.restore_scaler(after, {"scaler": before.state_dict()})
    assert after.state_dict()["scale"] == 128
    training.restore_scaler(after, {"scaler": {}})  # a run in another precision
    training.restore_scaler(torch.amp.GradScaler("cpu", enabled=False), {"scaler": before.state_dict()})


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    log = training.RunLog(tmp_path, Example())
    for step in (1, 2, 3):
        log.write(step=step, loss=1 / step)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    log = training.RunLog(tmp_path, Example(), resume_from=2)
    log.write(step=3, loss=0.25)
    log.close()
    assert [(r["step"], r["loss"]) for r in training.read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 5
    training.draw_curves(tmp_path, {"loss": {"loss": "loss"}, "absent": {"x": "x"}})
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_seeds_are_repeated_and_differ_by_every_number():
    def draw(*numbers):
        training.seed_all(*numbers)
        return torch.rand(3).tolist()
    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({tuple(draw(*n)) for n in ((0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 1))}) == 5
