import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from plumbing import checkpoints, processes, runs
from plumbing.cli import UserError, option

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")
TOKENS = {"tokenizer": "vqvae.pt", "fingerprint": "a" * 12}


@dataclass
class Settings(runs.RunSettings):
    out: str = option("", "folder")
    resume_from: str = option("", "checkpoint")
    batch: int = option(2, "videos")
    lr: float = option(0.1, "rate")
    weight_decay: float = option(0.5, "decay")
    log_every: int = option(2, "steps")


def settings(**changes):
    return Settings(**{"steps": 6, "save_every": 2, "precision": "fp32", **changes})


@dataclass
class Shape:
    """Of the transformer, as far as a checkpoint compares it."""
    dim: int = 3
    layout: str = "T,H|W"
    frames: int = 5
    init_std: float = 0.02


class Model(nn.Module):
    def __init__(self, **shape):
        super().__init__()
        self.linear, self.norm, self.batch = nn.Linear(3, 3), nn.LayerNorm(3), nn.BatchNorm1d(3)
        self.table, self.cls = nn.Embedding(4, 3), nn.Parameter(torch.ones(3))
        self.backbone = nn.Module()
        self.backbone.config = Shape(**shape)
        for name in ("time", "row", "column"):
            setattr(self.backbone, name, nn.Parameter(torch.ones(2, 3)))


DECAYED = {"linear.weight", "batch.weight", "table.weight", "cls", "backbone.time",
           "backbone.row", "backbone.column"}


def build(config=None, betas=(0.9, 0.98), **changes):
    """-> model, optimizer, scaler"""
    model = Model()
    return model, *runs.build_optimizer(model, config or settings(**changes), betas, CPU)


def one_step(model, optimizer, scaler, gradient=0.0):
    """A step along the same gradient of all numbers -> {parameter: how far it moved}, the norm."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    scaler.scale(torch.ones(()))  # initialises the scaler, as the loss of a run does
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), INF)
    scaler.step(optimizer)
    scaler.update(1.0)
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}, norm


def train(out, loss=lambda step: 1.0, gradient=lambda step: 1.0, each_step=lambda step: None,
          **changes):
    """The loop of the two scripts: steps with this loss along this gradient -> the steps done.

    each_step: called in each step.
    """
    config, steps = settings(out=str(out), **changes), []
    runs.check_folder(config)
    model, optimizer, scaler = build(config)
    first = runs.begin(config, model, optimizer, scaler, TOKENS, config.steps)
    log, done, stop = runs.Log(config, first, epoch=5), first, 0
    with processes.stop_signals() as stopped:
        for step in range(first, config.steps):
            each_step(step)
            lr = runs.set_learning_rate(optimizer, config, step, config.steps)
            moved, norm = one_step(model, optimizer, scaler, gradient(step))
            finite = norm.isfinite().item()
            moves = finite and lr > 0
            assert all(moved[name].any().item() == moves for name in DECAYED), step
            done, stop = step + 1, processes.agree(stopped)
            terms = {"loss": torch.tensor(loss(step)), "accuracy": torch.tensor(0.5)}
            log.add([terms], norm)
            if done == config.steps or done % config.log_every == 0:
                log.write_means(done, lr)
            if log.may_save(done, config.steps, stop):
                runs.save(config, model, optimizer, scaler, done, config.steps, TOKENS)
            steps.append(step)
            if stop:
                break
    log.close(done, config.steps, config.steps, stop)
    return steps


def saved_step(out):
    path = out / "last.pt"
    return checkpoints.read_checkpoint(path)["step"] if path.is_file() else 0


# ---------------------------------------------------------------- optimizer and schedule


def test_the_learning_rate_follows_the_released_schedule():
    """The rate of step s is s / W for s < W = int(0.1 * 105), then (105 - s) / (105 - W)."""
    rates = [runs.learning_rate(step, 105, 1.0, 0.1) for step in range(106)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(10)])
    assert rates[10:] == pytest.approx([(105 - step) / 95 for step in range(10, 106)])
    assert runs.learning_rate(0, 10, 1.0, 0) == 1.0


def test_a_step_moves_by_the_learning_rate():
    """Adam moves every number by the rate itself where all gradients are the same."""
    config = settings(weight_decay=0.0, warmup=0.0)
    model, optimizer, scaler = build(config)
    for step, rate in enumerate((0.1, 0.075, 0.05, 0.025)):
        assert runs.set_learning_rate(optimizer, config, step, 4) == pytest.approx(rate)
        moved, _ = one_step(model, optimizer, scaler, gradient=100.0)
        for name, by in moved.items():
            assert torch.allclose(by, torch.full_like(by, -rate), rtol=1e-4), name


def test_biases_and_layer_norms_are_not_decayed():
    moved, _ = one_step(*build())
    assert {name for name, by in moved.items() if by.any()} == DECAYED


@pytest.mark.parametrize("videos, epochs, steps", [
    (10, 1.0, 5), (11, 2.0, 10), (9, 0.5, 2), (2, 0.1, 1), (3, 50.0, 50)])
def test_an_epoch_is_whole_batches(videos, epochs, steps):
    config = Settings(batch=2)
    assert runs.schedule(config, videos, epochs) == (steps, steps)


def test_a_run_of_few_steps_says_so_unless_asked_for(capsys):
    runs.schedule(Settings(batch=32), 180, 3.0)
    line = capsys.readouterr().out
    assert line.startswith("15 steps") and "--epochs" in line and "--steps" in line
    runs.schedule(Settings(batch=32), 6400, 1.0)
    runs.schedule(Settings(steps=7), 10, 3.0)
    assert capsys.readouterr().out == ""


def test_steps_override_epochs_and_a_run_can_stop_within_its_schedule(tmp_path, capsys):
    assert runs.schedule(Settings(steps=7), 10, 3.0) == (7, 7)
    assert runs.schedule(Settings(), 10, epochs=4.0, stop_after=3.0) == (20, 15)
    assert runs.schedule(Settings(), 10, epochs=4.0, stop_after=5.0) == (20, 20)
    log = runs.Log(settings(out=str(tmp_path)), first=0, epoch=5)
    log.close(15, end=15, steps=20, stop=0)
    output = capsys.readouterr().out
    assert "20 steps" in output and "--resume-from" in output
    log.close(20, end=20, steps=20, stop=0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("batch, contrast, videos, world, expected", [
    (1024, 128, 5000, 8, (1024, 128)), (64, 0, 5000, 2, (64, 64)), (32, 0, 8, 1, (8, 8)),
    (32, 8, 21, 2, (16, 8)), (1024, 128, 27, 2, (26, 26)), (4, 8, 99, 1, (4, 4))])
def test_a_batch_is_whole_groups_and_at_most_all_videos(batch, contrast, videos, world, expected,
                                                        capsys):
    config = SimpleNamespace(batch=batch, contrast=contrast, alpha=1.0)
    assert runs.resolve_batch(config, videos, world) == expected[1] // world
    assert (config.batch, config.contrast) == expected
    changed = expected != (batch, contrast or batch)
    assert (f"--batch {expected[0]} --contrast {expected[1]}" in capsys.readouterr().out) == changed


@pytest.mark.parametrize("batch, contrast, videos, world", [
    (12, 8, 99, 1), (16, 8, 99, 3), (8, 8, 1, 2), (8, 1, 99, 1), (8, 0, 1, 1)])
def test_other_batches_are_refused(batch, contrast, videos, world):
    config = SimpleNamespace(batch=batch, contrast=contrast, alpha=1.0)
    with pytest.raises(UserError, match=f"--contrast {config.contrast or '1'}"):
        runs.resolve_batch(config, videos, world)


def test_a_video_needs_no_others_without_the_contrastive_loss():
    config = SimpleNamespace(batch=1, contrast=1, alpha=0.0)
    assert runs.resolve_batch(config, 99, 1) == 1


# ---------------------------------------------------------------- checkpoints


def save(path, parts, **changes):
    """parts: of `build`. changes: of the checkpoint."""
    model, optimizer, scaler = parts
    checkpoints.save_checkpoint(path, {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(), "step": 7, "steps": 10, "config": {}, "tokens": TOKENS,
        "transformer": asdict(model.backbone.config), **changes})


def restore(path, model, optimizer, scaler, header=TOKENS):
    return checkpoints.restore(path, model, optimizer, scaler, header, 10)


def test_a_resumed_run_decays_by_its_own_flag_and_keeps_its_moments(tmp_path):
    torch.manual_seed(0)
    model, optimizer, scaler = build(weight_decay=0.5)
    for step in range(3):
        one_step(model, optimizer, scaler, gradient=step + 1.0)
    save(tmp_path / "last.pt", (model, optimizer, scaler))
    moved = {}
    for decay in (0.0, 0.2):
        other, restored, other_scaler = build(weight_decay=decay, betas=(0.9, 0.999))
        assert restore(tmp_path / "last.pt", other, restored, other_scaler) == 7
        assert {group["weight_decay"] for group in restored.param_groups} == {decay, 0.0}
        assert all(group["betas"] == (0.9, 0.999) for group in restored.param_groups)
        for old, new in zip(model.parameters(), other.parameters()):
            assert torch.equal(old, new)
            for moment in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(restored.state[new][moment], optimizer.state[old][moment])
        moved[decay], _ = one_step(other, restored, other_scaler, gradient=1.0)
    for name, p in model.named_parameters():
        expected = -0.1 * 0.2 * p.detach() if name in DECAYED else torch.zeros_like(p)
        assert torch.allclose(moved[0.2][name] - moved[0.0][name], expected, atol=1e-6), name


def test_a_gradient_scaler_keeps_its_scale_over_a_checkpoint_in_fp16(tmp_path):
    model, optimizer, half = build(precision="fp16")
    single = build(precision="fp32")[2]
    assert half.scale(torch.ones(())) == 65536 and single.scale(torch.ones(())) == 1
    half.update(128.0)
    for scaler, scale in ((half, 128.0), (single, 65536.0)):
        save(tmp_path / "last.pt", (model, optimizer, scaler))
        for precision, expected in (("fp16", scale), ("fp32", 1.0)):
            other, restored, other_scaler = build(precision=precision)
            restore(tmp_path / "last.pt", other, restored, other_scaler)
            assert other_scaler.get_scale() == expected


@pytest.mark.parametrize("name, content, message", [
    ("text.pt", "nothing", "no checkpoint"), ("none.pt", None, "no file"),
    ("object.pt", {"model": Settings()}, "no checkpoint"),
    ("list.pt", [1, 2], "no dictionary of named tensors"),
    ("tensor.pt", torch.ones(3), "no dictionary of named tensors"),
    ("numbered.pt", {1: torch.ones(3)}, "no dictionary of named tensors"),
    ("weights.pt", {"model": {}}, "no checkpoint of a run"),
    ("plain.pt", {"cls": torch.ones(3)}, "no checkpoint of a run")])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        restore(path, *build())
    assert message in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_reading_a_checkpoint_runs_nothing_in_the_file(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"model": {}, "step": Malicious()}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="last.pt is damaged, or no checkpoint of plain tensors"):
        checkpoints.read_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "made").exists()


def test_the_checkpoint_of_another_model_is_refused_in_one_line(tmp_path):
    """Tensors of another layout can have the same shapes."""
    path, parts = tmp_path / "last.pt", build()
    one_step(*parts)
    save(path, parts)
    wider, layout, empty = build(), build(), build()
    wider[0].cls = nn.Parameter(torch.ones(4))
    layout[0].backbone.config.layout = "H|W,T"
    del empty[0].cls
    for other, message in ((wider, "size mismatch for cls"), (layout, "layout"), (empty, "cls")):
        with pytest.raises(UserError) as error:
            restore(path, *other)
        assert f"{path} does not fit this model" in str(error.value) and message in str(error.value)
        assert len(str(error.value).splitlines()) == 1
    longer, optimizer, scaler = build()
    longer.backbone.config.frames, longer.backbone.config.init_std = 10, 0.5
    restore(path, longer, optimizer, scaler)
    assert longer.backbone.config == Shape(frames=10, init_std=0.02)  # as the weights began


def test_a_checkpoint_that_has_learnt_the_tokens_of_another_tokenizer_is_refused(tmp_path):
    parts = build()
    save(tmp_path / "last.pt", parts)
    other = {"tokenizer": "dalle", "fingerprint": "b" * 12}
    with pytest.raises(UserError, match=f"dalle, {'b' * 12}.*last.pt .*vqvae.pt, {'a' * 12}"):
        restore(tmp_path / "last.pt", *parts, header=other)


def test_moments_of_another_version_are_refused(tmp_path):
    """Other groups number the parameters differently: fused AdamW would read beyond their end."""
    model, optimizer, scaler = build()
    one_step(model, optimizer, scaler)
    state = optimizer.state_dict()
    first, second = (group["params"] for group in state["param_groups"])
    second.insert(0, first.pop())
    save(tmp_path / "last.pt", (model, optimizer, scaler), optimizer=state)
    with pytest.raises(UserError, match="last.pt was made by another version"):
        restore(tmp_path / "last.pt", model, optimizer, scaler)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path):
    checkpoints.save_checkpoint(tmp_path / "last.pt", {"step": 1})

    class Unwritable:
        def __reduce__(self):
            raise OSError("disk full")

    with pytest.raises(OSError):
        checkpoints.save_checkpoint(tmp_path / "last.pt", {"step": Unwritable()})
    assert torch.load(tmp_path / "last.pt") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_damaged_tensor_is_noticed(tmp_path):
    """torch itself loads a file of which one byte of a weight has changed."""
    path, weights = tmp_path / "last.pt", torch.arange(1000.0)
    checkpoints.save_checkpoint(path, {"weights": weights})
    content = bytearray(path.read_bytes())
    content[content.index(weights[500:510].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["weights"], weights)
    with pytest.raises(UserError, match="last.pt is damaged"):
        checkpoints.read_checkpoint(path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.",
                                    "_orig_mod.module."])
def test_the_prefixes_of_wrapped_models_are_removed(tmp_path, prefix):
    parts = build()
    weights = parts[0].state_dict()
    wrapped = {prefix + name: value for name, value in weights.items()}
    save(tmp_path / "last.pt", parts, model=wrapped)
    assert restore(tmp_path / "last.pt", *build()) == 7
    torch.save(wrapped, tmp_path / "weights.pt")
    assert checkpoints.read_checkpoint(tmp_path / "weights.pt").keys() == weights.keys()


# ---------------------------------------------------------------- a run and its folder


def test_a_resumed_run_continues_and_drops_the_metrics_after_its_checkpoint(tmp_path, capsys):
    def killed(step):
        if step == 5:
            raise KeyboardInterrupt  # after the checkpoint of step 4

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, each_step=killed)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 2}\n{"step": 6, "lo')
    assert train(tmp_path, resume=True, loss=lambda step: 0.25, seed=3) == [4, 5]
    records = [(record["step"], record["loss"]) for record in runs.read_metrics(tmp_path)]
    assert records == [(2, 1.0), (4, 1.0), (6, 0.25)]
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 3
    output = capsys.readouterr().out
    assert f"resumed {tmp_path}/last.pt at step 4 of 6" in output


def test_resuming_an_empty_folder_starts_at_step_0(tmp_path, capsys):
    assert train(tmp_path / "run", resume=True) == [*range(6)]
    assert f"there is no {tmp_path}/run/last.pt: starting at step 0" in capsys.readouterr().out


def test_a_schedule_shorter_than_its_checkpoint_is_refused(tmp_path):
    train(tmp_path / "run", steps=4)
    with pytest.raises(UserError, match="has done 4 steps, the schedule has 3: give more"):
        train(tmp_path / "run", steps=3, resume=True)


def test_another_folder_continues_a_schedule_with_its_metrics(tmp_path):
    """With --resume it then continues from its own checkpoint."""
    def killed(step):
        if step == 5:
            raise KeyboardInterrupt

    train(tmp_path / "first", steps=4)
    other = dict(resume_from=str(tmp_path / "first/last.pt"), log_every=1, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "second", each_step=killed, **other)
    assert [record["step"] for record in runs.read_metrics(tmp_path / "second")] == [2, 4, 5]
    assert saved_step(tmp_path / "first") == 4
    assert train(tmp_path / "second", resume=True, **other) == [5]
    assert [record["step"] for record in runs.read_metrics(tmp_path / "second")] == [2, 4, 5, 6]


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    out = tmp_path / "run"
    train(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in ("run-2", "run-3"):
        with pytest.raises(UserError) as error:
            runs.check_folder(settings(out=str(out)))
        assert str(error.value) == (f"{out} holds a run: continue it with --resume, start another "
                                    f"with --out {tmp_path / name}, or delete it")
        (tmp_path / name).mkdir()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="cannot write .*file"):
        runs.check_folder(settings(out=str(tmp_path / "file")))


def test_one_of_several_programs_that_start_at_once_gets_the_folder(tmp_path):
    programs = 8
    together = Barrier(programs)

    def start(seed):
        config = settings(out=str(tmp_path), seed=seed)
        runs.check_folder(config)
        together.wait()
        try:
            runs.claim_folder(config)
        except UserError as error:
            return str(error)
        return seed

    with ThreadPoolExecutor(programs) as pool:
        results = [*pool.map(start, range(programs))]
    first, = (result for result in results if isinstance(result, int))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == first
    assert all("holds a run" in result for result in results if result != first)


def test_a_process_that_torchrun_restarts_continues_its_run(tmp_path, monkeypatch):
    """Without --resume, as the folder belongs to this job; it does not to another one."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    train(tmp_path, steps=4)
    assert train(tmp_path) == [4, 5]
    for job in ("job-8", "none", None):
        if job is None:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        else:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        with pytest.raises(UserError, match="holds a run"):
            train(tmp_path)


@pytest.mark.parametrize("job", ["none", None])
@pytest.mark.parametrize("content", [{}, {"torchrun_job": None}, {"torchrun_job": "none"}])
def test_a_job_without_a_name_restarts_nothing(tmp_path, monkeypatch, job, content):
    """torchrun calls it "none"."""
    (tmp_path / "config.json").write_text(json.dumps(content))
    if job:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    with pytest.raises(UserError, match="holds a run"):
        runs.check_folder(settings(out=str(tmp_path)))


def test_a_line_of_metrics_holds_the_means_since_the_last_one(tmp_path):
    config = settings(out=str(tmp_path))
    log, texts = runs.Log(config, first=0, epoch=5), []
    for step in range(6):
        groups = [{"loss": torch.tensor(step + i), "accuracy": torch.tensor(step / 10)}
                  for i in (0.0, 1.0)]  # of a batch
        log.add(groups, torch.tensor(1.0))
        if step % 2:
            texts.append(log.write_means(step + 1, lr=0.1))
    log.close(6, 6, 6, 0)
    names = ("step", "epoch", "loss", "accuracy", "lr")
    assert [[record[name] for name in names] for record in runs.read_metrics(tmp_path)] == [
        [2, 0.4, 1.0, 0.05, 0.1], [4, 0.8, 3.0, 0.25, 0.1], [6, 1.2, 5.0, 0.45, 0.1]]
    assert texts[1] == "loss 3.000  accuracy 25.0%"
    assert all(record["videos_per_second"] > 0 for record in runs.read_metrics(tmp_path))


def test_damaged_metrics_do_not_keep_a_run_from_continuing(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "loss": 1}\n{"ste\n[3]\n{"loss": 2}\n\xff\n{"step": 2}\n{"step": 3')
    assert [record["step"] for record in runs.read_metrics(tmp_path)] == [1, 2]


# ---------------------------------------------------------------- steps that go wrong


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted(tmp_path):
    """The weights stay (see `train`), and the means leave it out."""
    wrong = {2: NAN, 5: INF}
    train(tmp_path, loss=lambda step: wrong.get(step, float(step)),
          gradient=lambda step: wrong.get(step, 1.0))
    records = [(record["step"], record["loss"], record["accuracy"], record.get("skipped_steps", 0))
               for record in runs.read_metrics(tmp_path)]
    assert records == [(2, 0.5, 0.5, 0), (4, 3.0, 0.5, 1), (6, 4.0, 0.5, 1)]
    moments = torch.load(tmp_path / "last.pt", weights_only=True)["optimizer"]["state"]
    assert {int(moment["step"]) for moment in moments.values()} == {4}


def test_a_checkpoint_waits_for_a_good_step(tmp_path):
    """The step before a skipped one may have spoilt the weights."""
    saved = []
    train(tmp_path, steps=9, save_every=3, gradient=lambda step: NAN if 4 <= step <= 6 else 1.0,
          each_step=lambda step: saved.append(saved_step(tmp_path)))
    assert saved == [0, 0, 0, 3, 3, 3, 3, 3, 8] and saved_step(tmp_path) == 9


@pytest.mark.parametrize("bad_steps", [1, 2, 3])
def test_the_last_checkpoint_follows_at_most_two_skipped_steps(tmp_path, bad_steps):
    def run():
        train(tmp_path, gradient=lambda step: NAN if step >= 6 - bad_steps else 1.0, save_every=3)

    if bad_steps < 3:
        run()
        assert saved_step(tmp_path) == 6
    else:
        with pytest.raises(UserError, match="not finite in 3 steps in a row"):
            run()
        assert saved_step(tmp_path) == 3


@pytest.mark.parametrize("gradient, loss, message", [
    (NAN, 1.0, "the gradient was not finite in 1[01] steps in a row"),
    (0.0, INF, "the loss has risen from 3 to inf"), (0.0, NAN, "the loss has risen from 3 to nan"),
    (0.0, 1e4, r"the loss has risen from 3 to 1e\+04")])
def test_a_run_that_goes_wrong_stops_and_keeps_its_good_checkpoint(tmp_path, gradient, loss,
                                                                   message):
    with pytest.raises(UserError, match=rf"{message}: lower --lr \(last.pt is from before\)"):
        train(tmp_path, steps=30, save_every=6, loss=lambda step: loss if step > 6 else 3.0,
              gradient=lambda step: gradient if step > 6 else 1.0)
    checkpoint = checkpoints.read_checkpoint(tmp_path / "last.pt")
    assert checkpoint["step"] == 6
    assert all(p.isfinite().all() for p in checkpoint["model"].values())


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("gradient", [1.0, NAN])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(tmp_path, capsys, number, code,
                                                              gradient):
    """Also where this step is skipped. Its repetition within a second is no second request."""
    def send(step):
        if step == 2:
            for _ in range(3):
                os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, each_step=send, gradient=lambda step: gradient if step == 2 else 1.0)
    output, errors = capsys.readouterr()
    assert stop.value.code == code and saved_step(tmp_path) == 3
    assert "stopped at step 3 of 6: the same command with --resume continues" in output
    assert errors == (f"{number.name}: stopping after this step; send it again to "
                      f"stop at once\n")
    assert signal.getsignal(number) == handler
    assert train(tmp_path, resume=True) == [3, 4, 5]


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    now = iter((100.0, 100.9, 101.1))

    def send(step):
        if step == 2:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, each_step=send)
    assert saved_step(tmp_path) == 2 and next(now, None) is None


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path):
    def send(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(tmp_path, each_step=send) == [*range(6)]
    assert saved_step(tmp_path) == 6
