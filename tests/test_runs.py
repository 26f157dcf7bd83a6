import json
import os
import signal
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from plumbing import checkpoints, runs
from plumbing.cli import UserError, option


@dataclass
class Settings(runs.RunSettings):
    out: str = option("", "folder")
    batch: int = option(2, "videos")
    lr: float = option(0.1, "rate")
    weight_decay: float = option(0.5, "decay")
    log_every: int = option(2, "steps")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.batch = nn.Linear(3, 3), nn.LayerNorm(3), nn.BatchNorm1d(3)
        self.table, self.cls = nn.Embedding(4, 3), nn.Parameter(torch.ones(3))
        self.backbone = type("Backbone", (), {"config": Settings()})()


DECAYED = {"linear.weight", "batch.weight", "table.weight", "cls"}


def one_step(model, optimizer, step=0, gradient=0.0):
    """A step along the same gradient of all parameters -> {name: how far it moved}."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    optimizer.step(step)
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def test_the_schedule_rises_then_falls_to_zero():
    rates = [runs.learning_rate(step, 100, 1.0, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and rates[100] == 0
    assert max(rates) == 1.0 and min(rates[:100]) > 0
    assert runs.learning_rate(0, 10, 1.0, 0) == 1.0


def test_biases_and_layer_norms_are_not_decayed():
    model = Model()
    moved = one_step(model, runs.Optimizer(model, Settings(), 10, (0.9, 0.98)))
    assert {name for name, by in moved.items() if by.any()} == DECAYED


def test_moments_are_numbered_as_checkpoints_of_earlier_versions_number_them():
    """First the matrices and tables, then all biases and the weights of all norms, whichever of these are decayed."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "batch": nn.BatchNorm1d(2), "norm": nn.LayerNorm(2),
                           "b": nn.Linear(2, 2)})
    names = {p: name for name, p in model.named_parameters()}
    groups = runs.Optimizer(model, Settings(), 10, (0.9, 0.98)).adamw.param_groups
    assert [names[p] for group in groups for p in group["params"]] == [
        "a.weight", "b.weight", "a.bias", "batch.weight", "batch.bias", "norm.weight", "norm.bias", "b.bias"]


def test_moments_of_other_tensors_are_refused(tmp_path):
    """Fused AdamW would read beyond their end."""
    model = Model()
    optimizer = runs.Optimizer(model, Settings(), 10, (0.9, 0.98))
    one_step(model, optimizer)
    state = optimizer.state_dict()
    moments = state["optimizer"]["state"]
    matrix, vector = (next(i for i, m in moments.items() if m["exp_avg"].dim() == n) for n in (2, 1))
    moments[matrix], moments[vector] = moments[vector], moments[matrix]
    checkpoints.save_checkpoint(tmp_path / "last.pt", {"model": model.state_dict(), **state, "step": 1})
    with pytest.raises(UserError, match="last.pt does not fit"):
        checkpoints.restore(tmp_path / "last.pt", model, optimizer)


def test_a_step_follows_the_schedule_and_the_gradient_is_clipped_and_cleared():
    model = Model()
    optimizer = runs.Optimizer(model, Settings(weight_decay=0.0, warmup=0.0, clip=0.5), 4, (0.9, 0.98))
    for step, expected in enumerate((0.1, 0.075, 0.05, 0.025)):
        moved = one_step(model, optimizer, step, gradient=100.0)
        assert torch.allclose(moved["cls"], torch.full((3,), -expected), rtol=1e-4)  # Adam's step: the rate itself
    assert all(p.grad is None for p in model.parameters())
    numbers = sum(p.numel() for p in model.parameters())
    squared = optimizer.adamw.state[model.cls]["exp_avg_sq"] / (1 - 0.98 ** 4)  # the mean square of one number
    assert (squared * numbers).sqrt().tolist() == pytest.approx([0.5] * 3, rel=1e-3)


def save(path, model, optimizer, step=7):
    checkpoints.save_checkpoint(path, {"model": model.state_dict(), **optimizer.state_dict(), "step": step})


def test_another_weight_decay_is_taken_from_the_flags_and_moments_from_the_checkpoint(tmp_path):
    """A run that goes on, or a second stage, with another --weight-decay decays by the new one."""
    torch.manual_seed(0)
    model = Model()
    optimizer = runs.Optimizer(model, Settings(weight_decay=0.5), 10, (0.9, 0.98))
    for step in range(3):
        one_step(model, optimizer, step, gradient=step + 1.0)
    save(tmp_path / "last.pt", model, optimizer)
    moved = {}
    for decay in (0.0, 0.2):
        other = Model()
        restored = runs.Optimizer(other, Settings(weight_decay=decay, warmup=0.0), 10, (0.9, 0.999))
        assert checkpoints.restore(tmp_path / "last.pt", other, restored) == 7
        assert {group["weight_decay"] for group in restored.adamw.param_groups} == {decay, 0.0}
        assert all(group["betas"] == (0.9, 0.999) for group in restored.adamw.param_groups)
        for old, new in zip(model.parameters(), other.parameters()):
            assert torch.equal(old, new)
            for kind in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(restored.adamw.state[new][kind], optimizer.adamw.state[old][kind])
        moved[decay] = one_step(other, restored, gradient=1.0)
    for name, p in model.named_parameters():
        expected = -0.1 * 0.2 * p if name in DECAYED else torch.zeros_like(p)
        assert torch.allclose(moved[0.2][name] - moved[0.0][name], expected.detach(), atol=1e-6), name


def test_a_gradient_scaler_keeps_its_scale_over_a_checkpoint(tmp_path):
    model = Model()
    half, single = (runs.Optimizer(model, Settings(), 10, (0.9, 0.98), d) for d in (torch.float16, torch.float32))
    half.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    half.backward(model.cls.sum())
    assert model.cls.grad.tolist() == [128.0] * 3
    one_step(model, half)
    for optimizer, found in ((half, 128.0), (single, 65536.0)):  # 65536: where a scale starts
        save(tmp_path / "last.pt", model, optimizer)
        for precision, expected in ((torch.float16, found), (torch.float32, 1.0)):
            other = Model()
            restored = runs.Optimizer(other, Settings(), 10, (0.9, 0.98), precision)
            checkpoints.restore(tmp_path / "last.pt", other, restored)
            assert restored.scaler.get_scale() == expected


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_gradients_apart_are_those_of_the_loss_and_add_nothing_up(precision):
    """In half precision scaled on their way, or small ones would vanish."""
    optimizer, x = runs.Optimizer(Model(), Settings(), 10, (0.9, 0.98), precision), torch.full((2,), 1e-5)
    x.requires_grad_()
    half = x.to(precision)
    gradient, = optimizer.gradients((half * half).float().sum() * 1e-3, [x])
    assert gradient.tolist() == pytest.approx([2e-8, 2e-8], rel=1e-2) and x.grad is None


def test_files_that_are_no_checkpoint_of_a_run_are_named(tmp_path):
    model = Model()
    optimizer = runs.Optimizer(model, Settings(), 10, (0.9, 0.98))
    (tmp_path / "text.pt").write_text("nothing")
    torch.save({"model": {}}, tmp_path / "part.pt")
    torch.save({"model": Settings()}, tmp_path / "object.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    torch.save({"model": {}, "optimizer": {}, "step": 3}, tmp_path / "empty.pt")
    torch.save({"model": {}, "optimizer": {"state": {}}, "step": "3"}, tmp_path / "step.pt")
    torch.save({"model": {}, "transformer": None, "config": {}}, tmp_path / "transformer.pt")
    for name, said in (("text.pt", "no checkpoint"), ("part.pt", "no checkpoint of a run"), ("none.pt", "no file"),
                       ("object.pt", "no checkpoint"), ("list.pt", "holds a list"), ("tensor.pt", "holds a Tensor"),
                       ("empty.pt", "no checkpoint of a run"), ("step.pt", "no checkpoint of a run"),
                       ("transformer.pt", "transformer is missing")):
        with pytest.raises(UserError, match=f"{said}.*{name}|{name}.*{said}"):
            checkpoints.restore(tmp_path / name, model, optimizer)
    save(tmp_path / "last.pt", model, optimizer)
    model.cls = nn.Parameter(torch.ones(4))
    with pytest.raises(UserError, match="last.pt does not fit this model.*cls"):
        checkpoints.restore(tmp_path / "last.pt", model, optimizer)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path):
    checkpoints.save_checkpoint(tmp_path / "last.pt", {"step": 1})

    class Unwritable:
        def __reduce__(self):
            raise OSError("disk full")
    with pytest.raises(OSError):
        checkpoints.save_checkpoint(tmp_path / "last.pt", {"step": Unwritable()})
    assert torch.load(tmp_path / "last.pt") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_only_a_resumed_or_restarted_run_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    assert checkpoints.last_checkpoint(tmp_path, resume=True) is None
    (tmp_path / "last.pt").write_text("a run's")
    assert checkpoints.last_checkpoint(tmp_path, resume=True) == tmp_path / "last.pt"
    assert checkpoints.last_checkpoint(tmp_path, resume=False) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert checkpoints.last_checkpoint(tmp_path, resume=False) == tmp_path / "last.pt"


def start(out, **changes):
    settings = Settings(**{"out": str(out), "steps": 6, "save_every": 2, **changes})
    return runs.Run(settings, Model(), 10, 1.0, (0.9, 0.98), torch.device("cpu"), {})


def test_a_run_goes_on_where_it_stopped_and_drops_the_metrics_after_it(tmp_path):
    for step in start(tmp_path).each_step("test"):
        if step == 5:
            break  # killed after the checkpoint of step 4
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1}\n{"step": 5, "loss": 2}\n{"step": 6, "lo')
    run = start(tmp_path, resume=True)
    assert run.first == 4 and list(run.each_step("test")) == [4, 5]
    run.write(step=5, loss=0.25)
    assert [(r["step"], r["loss"]) for r in runs.read_metrics(tmp_path)] == [(4, 1), (5, 0.25)]
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 6
    assert start(tmp_path, resume=True).first == 6
    assert not (tmp_path / "earlier-1").exists()


def test_a_run_that_begins_leaves_an_earlier_one_alone_until_it_has_a_checkpoint(tmp_path, capsys):
    """Whatever fails before: the earlier run is as it was. Afterwards it is in a folder of its own, numbered."""
    left = {"last.pt": "first run", "metrics.jsonl": '{"step": 4, "loss": 1}\n', "config.json": "{}", "own.txt": "mine"}
    for name, text in left.items():
        (tmp_path / name).write_text(text)
    run = start(tmp_path)
    run.write(step=1, loss=0.5)
    assert run.first == 0 and {name: (tmp_path / name).read_text() for name in left} == left
    for number in (1, 2):
        list(start(tmp_path).each_step("test"))
        assert f"is now in {tmp_path}/earlier-{number}" in capsys.readouterr().out
    moved = {name: (tmp_path / "earlier-1" / name).read_text() for name in left if name != "own.txt"}
    assert moved == {name: text for name, text in left.items() if name != "own.txt"}
    assert (tmp_path / "own.txt").is_file() and (tmp_path / "earlier-2/last.pt").is_file()
    assert runs.read_metrics(tmp_path) == [] and not list(tmp_path.glob("*.new.*"))
    assert checkpoints.read_checkpoint(tmp_path / "last.pt")["step"] == 6


def test_what_torchrun_restarts_before_its_first_checkpoint_begins_anew(tmp_path, monkeypatch):
    list(start(tmp_path).each_step("test"))
    start(tmp_path)  # another run, which dies
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert start(tmp_path).first == 0
    assert start(tmp_path, resume=True).first == 6  # this is asked for, and the last word
    assert start(tmp_path).first == 6


def test_the_checkpoint_before_the_last_is_kept(tmp_path):
    list(start(tmp_path).each_step("test"))
    assert [checkpoints.read_checkpoint(tmp_path / name)["step"] for name in ("previous.pt", "last.pt")] == [4, 6]
    (tmp_path / "last.pt").unlink()
    assert start(tmp_path, resume=True).first == 4


def test_a_line_of_metrics_holds_the_means_since_the_last(tmp_path):
    run = start(tmp_path)
    for step in run.each_step("test"):
        loss = torch.tensor(float(step))
        run.record(step, {"loss": loss, "right": loss * 10}, 0.1, "{loss:.1f}")
    found = [(r["step"], r["loss"], r["right"], r["epoch"]) for r in runs.read_metrics(tmp_path)]
    assert found == [(2, 0.5, 5.0, 0.4), (4, 2.5, 25.0, 0.8), (6, 4.5, 45.0, 1.2)]


def test_a_step_whose_gradient_is_no_number_is_skipped_and_counted(tmp_path):
    run = start(tmp_path)
    for step in run.each_step("test"):
        bad = float("nan") if step == 2 else 0.0
        moved = one_step(run.model, run.optimizer, step, gradient=bad + 1)
        assert all((d == 0).all() == (step == 2) for name, d in moved.items() if name in DECAYED), step
        run.record(step, {"loss": torch.tensor(bad + step)}, 0.1, "{loss:.1f}")
    found = [(r["step"], r["loss"], r.get("skipped_steps", 0)) for r in runs.read_metrics(tmp_path)]
    assert found == [(2, 0.5, 0), (4, 3.0, 1), (6, 4.5, 0)]
    steps = {int(state["step"]) for state in run.optimizer.adamw.state.values()}
    assert steps == {5}


def test_a_checkpoint_waits_for_a_good_step(tmp_path):
    """The step before a bad one may have spoilt the weights."""
    run, saved = start(tmp_path, steps=9, save_every=3), []
    for step in run.each_step("test"):
        saved.append(checkpoints.read_checkpoint(tmp_path / "last.pt")["step"] if step > 2 else 0)
        one_step(run.model, run.optimizer, step, gradient=float("nan") if step in (4, 5, 6) else 1.0)
        run.record(step, {"loss": torch.tensor(1.0)}, 0.1, "{loss:.1f}")
    assert saved == [0, 0, 0, 3, 3, 3, 3, 3, 8]


@pytest.mark.parametrize("gradient, loss, said", [
    (float("nan"), 1.0, "not finite in 11 steps in a row"), (0.0, float("inf"), "the loss is inf at step 8"),
    (0.0, 1e4, r"risen from 3 to [\d.e+]+")])
def test_a_run_that_goes_wrong_stops_and_the_good_checkpoint_stays(tmp_path, gradient, loss, said):
    run = start(tmp_path, steps=20, save_every=6)
    with pytest.raises(UserError, match=f"{said}: lower --lr; .*last.pt is from before"):
        for step in run.each_step("test"):
            one_step(run.model, run.optimizer, step, gradient=gradient if step > 6 else 1.0)
            run.record(step, {"loss": torch.tensor(loss if step > 6 else 3.0)}, 0.1, "{loss:.1f}")
    checkpoint = checkpoints.read_checkpoint(tmp_path / "last.pt")
    assert checkpoint["step"] in (6, 12) and all(p.isfinite().all() for p in checkpoint["model"].values())


def test_settings_that_change_the_method_are_said_on_resume(tmp_path, capsys):
    list(start(tmp_path).each_step("test"))
    start(tmp_path, resume=True, seed=3, gpus=2)
    assert "from here on with --seed 3 (was 0)\n" in capsys.readouterr().out


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(tmp_path, capsys, number, code):
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        for step in start(tmp_path).each_step("test"):
            if step == 2:
                os.kill(os.getpid(), number)
    assert stopped.value.code == code and checkpoints.read_checkpoint(tmp_path / "last.pt")["step"] == 3
    assert "stopped at step 3 of 6: the same command with --resume goes on" in capsys.readouterr().out
    assert signal.getsignal(number) == handler and start(tmp_path, resume=True).first == 3


def test_a_run_stopped_before_its_first_checkpoint_leaves_an_earlier_one_as_it_was(tmp_path, capsys):
    list(start(tmp_path).each_step("test"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        for _ in start(tmp_path, save_every=5, seed=1).each_step("test"):
            os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.code == 130 and "is as it was" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in before} == before
    assert not list(tmp_path.glob("*.new.*")) and not list(tmp_path.glob("earlier-*"))


def test_a_checkpoint_that_a_kill_left_under_its_first_name_is_found(tmp_path):
    list(start(tmp_path).each_step("test"))
    (tmp_path / "last.pt").rename(tmp_path / "next.pt")
    assert start(tmp_path, resume=True).first == 6


def test_more_steps_than_are_asked_for_are_not_taken_for_a_result(tmp_path):
    list(start(tmp_path).each_step("test"))
    with pytest.raises(UserError, match="nothing is left to train: the checkpoint is of step 6 of 5"):
        start(tmp_path, resume=True, steps=5)


def test_damaged_metrics_do_not_keep_a_run_from_going_on(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1}\n{"ste\n[3]\n{"loss": 2}\n\xff\n{"step": 2}\n')
    assert [record["step"] for record in runs.read_metrics(tmp_path)] == [1, 2]


def test_weights_that_are_no_numbers_and_prefixes(tmp_path):
    model, optimizer = Model(), runs.Optimizer(Model(), Settings(), 10, (0.9, 0.98))
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state, **optimizer.state_dict(), "step": 2}, tmp_path / "ddp.pt")
    assert checkpoints.restore(tmp_path / "ddp.pt", Model(), optimizer) == 2
    state["module.cls"][1] = float("nan")
    torch.save({"model": state, **optimizer.state_dict(), "step": 2}, tmp_path / "nan.pt")
    with pytest.raises(UserError, match="nan.pt holds numbers in cls that are none"):
        checkpoints.restore(tmp_path / "nan.pt", Model(), optimizer)


def test_a_damaged_tensor_is_noticed(tmp_path):
    """torch itself loads a file of which one byte of a weight has changed."""
    checkpoints.save_checkpoint(tmp_path / "last.pt", {"weights": torch.arange(1000.0)})
    content = bytearray((tmp_path / "last.pt").read_bytes())
    content[content.index(torch.arange(500.0, 510.0).numpy().tobytes())] ^= 1
    (tmp_path / "last.pt").write_bytes(content)
    assert not torch.equal(torch.load(tmp_path / "last.pt")["weights"], torch.arange(1000.0))
    with pytest.raises(UserError, match="last.pt is damaged"):
        checkpoints.read_checkpoint(tmp_path / "last.pt")


def test_epochs_are_passes_over_the_videos(tmp_path):
    for videos, epochs, steps in ((10, 1.0, 5), (11, 2.0, 11), (9, 0.5, 2), (2, 0.1, 1)):
        run = runs.Run(Settings(out=str(tmp_path)), Model(), videos, epochs, (0.9, 0.98), torch.device("cpu"), {})
        assert run.steps == steps
