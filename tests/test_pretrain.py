import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import imageio.v2 as imageio
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    TINY,
    assert_same_gradients,
    call,
    flags,
    interrupted,
    random_store,
    recorded_gradients,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_released import released_state

import contrastive
import data
import masking
import monitor
import pretrain
from plumbing import checkpoints, processes, runs
from plumbing.cli import UserError
from plumbing.runs import read_metrics
from pretrain import PRESETS, Config, Vimpac
from transformer import load_backbone, resize_table

CPU = torch.device("cpu")
V = 16  # codes of random_store
PAD, MASK = V + 1, V + 4


def tiny(**changes):
    config = Config(**{**PRESETS["toy"], **TINY, "steps": 6, "precision": "fp32",
                       "micro_batch": 0, **changes})
    config.contrast = config.contrast or config.batch
    config.micro_batch = config.micro_batch or config.batch
    return config


def build(config, store):
    processes.seed_all(config.seed)
    shape = config.transformer(store.header["vocab_size"], store.height, store.width)
    return Vimpac(shape, 16, 2)


def train(config, store, change=lambda model: model):
    """change: of the initial weights."""
    model = change(build(config, store))
    pretrain.train(config, model, store, CPU)
    return model


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def compute_losses(model, clips, config, seed=1):
    return pretrain.compute_losses(config, V, CPU, model, clips, generator(seed))


# ---------------------------------------------------------------- a run


def test_the_default_command_leaves_all_that_a_reader_looks_at(workplace):
    out = workplace / "runs/toy"
    metrics = read_metrics(out)
    assert {"step", "epoch", "loss", "mask_loss", "mask_accuracy", "contrastive_loss", "lr",
            "videos_per_second"} <= metrics[1].keys()
    for name in ("knn_motion", "knn_shape", "held_out_mask_accuracy",
                 "held_out_contrastive_loss"):
        assert [m["step"] for m in metrics if name in m] == [0, 3, 5]
    config = json.loads((out / "config.json").read_text())
    assert config["precision"] in ("bf16", "fp32") and config["micro_batch"] == 4  # as used
    assert config["device"] == "cpu" and config["threads"] == 1 and config["torch"]
    events = EventAccumulator(str(out), {"images": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/mask_loss", "train/gradient_norm", "train/lr", "held_out/mask_loss",
            "knn/motion"} <= tags and {tag.split("/")[0] for tag in tags} == {
                "train", "held_out", "knn"}
    assert events.Tags()["images"] == ["fill_in"]
    assert config["steps"] == 5 and config["precision"] != "auto"
    assert list(out.glob("events.out.tfevents*")) and (out / "curves.png").is_file()
    picture = imageio.imread(out / "fill_in.png")
    assert picture.std() > 10 and len(imageio.mimread(out / "fill_in.gif")) == 5
    output = (workplace / "stdout.txt").read_text()
    assert "mask accuracy" in output and "kNN on motion" in output and "codes used" in output
    assert load_backbone(out / "last.pt").config.dim == 16


def test_the_default_command_twice_is_refused_and_names_a_free_folder(workplace):
    before = (workplace / "runs/toy/last.pt").read_bytes()
    done = call(pretrain, "--steps", 5, *flags(TINY), place=workplace)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--resume" in done.stderr and "--out runs/toy-2" in done.stderr
    assert (workplace / "runs/toy/last.pt").read_bytes() == before


def test_a_seed_repeats_the_weights_and_another_does_not(tmp_path):
    store = random_store(tmp_path / "s", 12)
    weights = []
    for i, seed in enumerate((0, 0, 1)):
        config = tiny(seed=seed, dropout=0.1, out=str(tmp_path / f"run {i}"))
        weights.append(torch.cat([p.detach().flatten() for p in train(config, store).parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_resuming_equals_no_interruption(tmp_path):
    store, results = random_store(tmp_path / "s", 24), {}
    for name in ("whole", "broken"):
        config = tiny(out=str(tmp_path / name), dropout=0.1, noise=True)
        if name == "broken":  # after the checkpoint of step 3
            with interrupted(step=4), pytest.raises(KeyboardInterrupt):
                train(config, store)
            config.resume = True
        weights = train(config, store).state_dict()
        # step 4 holds means since the last line, or since step 3
        metrics = [m for m in read_metrics(config.out) if m["step"] != 4]
        for m in metrics:
            m.pop("videos_per_second", None)
        results[name] = weights, metrics
    whole, broken = results.values()
    assert all(torch.equal(a, b) for a, b in zip(whole[0].values(), broken[0].values()))
    assert whole[1] == broken[1] and len(whole[1]) > 4


def test_the_second_stage_starts_from_the_first_at_another_size(workplace, capsys):
    """Positions and their moments are interpolated, and the log says so; the rest is kept."""
    path = workplace / "runs/toy/last.pt"
    checkpoint, config = torch.load(path, weights_only=True), tiny()
    weights, header = checkpoint["model"], checkpoint["tokens"]
    model = Vimpac(config.transformer(256, 16, 16), 16, 2)
    optimizer, scaler = runs.build_optimizer(model, config, (0.9, 0.98), CPU)
    assert checkpoints.restore(path, model, optimizer, scaler, header, 6) == 5
    output = capsys.readouterr().out
    assert "row positions from 8 to 16" in output and "time" not in output
    backbone, state = model.backbone, optimizer.state
    assert torch.equal(backbone.row, resize_table(weights["backbone.row"], 16))
    assert torch.equal(backbone.time, weights["backbone.time"])
    assert torch.equal(backbone.embedding.weight, weights["backbone.embedding.weight"])
    for name, p in (("row", backbone.row), ("time", backbone.time), ("cls", backbone.cls)):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert state[p][moment].shape == p.shape and state[p][moment].abs().max() > 0, name
    other = Vimpac(tiny(dim=24).transformer(256, 8, 8), 16, 2)
    optimizer, scaler = runs.build_optimizer(other, config, (0.9, 0.98), CPU)
    with pytest.raises(UserError, match="does not fit"):
        checkpoints.restore(path, other, optimizer, scaler, header, 6)


def test_init_starts_a_new_schedule_and_can_be_resumed(workplace):
    common = ["--init", "runs/toy/last.pt", "--out", "runs/second", *flags(TINY)]
    for argv, expected in ((["--steps", 2], "starting from runs/toy/last.pt"),
                           (["--steps", 3, "--resume"], "runs/second/last.pt at step 2 of 3")):
        done = call(pretrain, *common, *argv, place=workplace)
        assert done.returncode == 0 and expected in done.stdout, done.stderr
    assert read_metrics(workplace / "runs/second")[0]["step"] == 0
    for path in ("nowhere.pt", "datasets/toy/tokenizer.pt"):
        done = call(pretrain, "--init", path, *flags(TINY), "--out", "runs/third", place=workplace)
        assert done.returncode == 2 and path in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("argv", [
    ["--resume"], ["--init", "first/last.pt"], ["--resume-from", "first/last.pt"]])
def test_the_tokens_of_another_tokenizer_are_refused(tmp_path, argv):
    for name, tokenizer in (("one", "a" * 12), ("other", "b" * 12)):
        random_store(tmp_path / name, 24, fingerprint=tokenizer)
    common = [*flags(TINY), "--frame-size", 16]
    done = call(pretrain, "--data", "one", "--out", "first", *common, "--steps", 4, place=tmp_path)
    assert done.returncode == 0, done.stderr
    before = (tmp_path / "first/last.pt").read_bytes()
    out = "first" if argv == ["--resume"] else "second"
    done = call(pretrain, "--data", "other", "--out", out, *argv, *common, "--steps", 6,
                place=tmp_path)
    assert done.returncode == 2 and "another tokenizer" in done.stderr.splitlines()[-1]
    assert (tmp_path / "first/last.pt").read_bytes() == before


def test_a_run_keeps_its_init_std(workplace, tmp_path):
    """The checkpoint says what --from-scratch starts from, also after --resume with another."""
    common = [*flags(TINY), "--out", tmp_path / "run"]
    for argv in (["--steps", 2, "--init-std", 0.1], ["--steps", 4, "--init-std", 0.3, "--resume"]):
        assert call(pretrain, *common, *argv, place=workplace).returncode == 0
    assert load_backbone(tmp_path / "run/last.pt").config.init_std == 0.1


def test_init_takes_a_checkpoint_at_another_size_and_a_released_one(workplace, tmp_path, capsys):
    path = workplace / "runs/toy/last.pt"
    checkpoint = torch.load(path, weights_only=True)
    weights, header = checkpoint["model"], checkpoint["tokens"]
    model = Vimpac(tiny().transformer(256, 16, 16), 16, 2)
    checkpoints.initialise(model, Vimpac.load(path), path, header)
    assert "interpolated the row positions from 8 to 16" in capsys.readouterr().out
    assert torch.equal(model.backbone.column, resize_table(weights["backbone.column"], 16))
    assert torch.equal(model.projection_head.out.weight, weights["projection_head.out.weight"])
    path = tmp_path / "classifier.pt"
    torch.save(released_state(layers=2, dim=256, frames=5, side=4, patterns=(1, 2)), path)
    released = Vimpac.load(path)
    model = Vimpac(replace(released.backbone.config, height=8, width=8), 256, 2)
    checkpoints.initialise(model, released, path, header)
    for a, b in zip(model.token_head.parameters(), released.token_head.parameters()):
        assert torch.equal(a, b)
    assert torch.equal(model.backbone.row, resize_table(released.backbone.row, 8))
    model.backbone.config = replace(released.backbone.config, layout="H|W,T")
    with pytest.raises(UserError, match="layout"):
        checkpoints.initialise(model, released, path, header)


def test_two_stages_follow_one_schedule(tmp_path):
    """Optimizer, step, learning rates and curves continue at another clip size."""
    stores = [random_store(tmp_path / str(side), 24, side=side) for side in (4, 8)]
    common = dict(steps=0, epochs=4.0, batch=4, log_every=1, warmup=0.3, alpha=0.0)
    train(tiny(out=str(tmp_path / "unbroken"), **common), stores[0])
    train(tiny(out=str(tmp_path / "first"), stop_after=2.5, **common), stores[0])
    path = tmp_path / "first/last.pt"
    before = torch.load(path, weights_only=True)
    second = tiny(out=str(tmp_path / "second"), resume_from=str(path), **common)
    with recorded_gradients() as gradients:
        train(second, stores[1])
    rates = [{m["step"]: m["lr"] for m in read_metrics(tmp_path / name) if "lr" in m}
             for name in ("unbroken", "first", "second")]
    steps, stopped = len(rates[0]), before["step"]
    assert 0 < stopped < steps == before["steps"] and len(rates[1]) == stopped
    assert rates[2] == rates[0] and len(gradients) == steps - stopped
    after = torch.load(tmp_path / "second/last.pt", weights_only=True)
    assert after["step"] == steps and after["model"]["backbone.row"].shape == (8, 16)
    assert {int(m["step"]) for m in after["optimizer"]["state"].values()} == {steps}


def test_training_never_draws_a_held_out_video(workplace, monkeypatch):
    """Everything that is measured or drawn is held out."""
    videos, now = {"training": set(), "measuring": set(), "filling in": set()}, ["training"]
    getitem, evaluate, fill_in = data.ClipPairs.__getitem__, monitor.evaluate, monitor.fill_in
    terms = pretrain.compute_losses

    def watched_getitem(pairs, item):
        videos[now[-1]].add(item[0])
        return getitem(pairs, item)

    def watched_evaluate(*args):
        now.append("measuring")
        metrics = evaluate(*args)
        now.pop()
        return metrics

    def watched_terms(config, vocab_size, device, model, *args):
        assert model.training == (now[-1] == "training")
        return terms(config, vocab_size, device, model, *args)

    def watched_fill_in(model, tokenizer, store, shown, *args):
        videos["filling in"].update(shown.tolist())
        return fill_in(model, tokenizer, store, shown, *args)

    monkeypatch.setattr(data.ClipPairs, "__getitem__", watched_getitem)
    monkeypatch.setattr(monitor, "evaluate", watched_evaluate)
    monkeypatch.setattr(monitor, "fill_in", watched_fill_in)
    monkeypatch.setattr(pretrain, "compute_losses", watched_terms)
    done = call(pretrain, *flags(TINY), "--steps", 12, "--out", "runs/held-out", place=workplace)
    assert done.returncode == 0, done.stderr
    assert len(videos["measuring"]) == 2 and videos["measuring"] == videos["filling in"]
    assert len(videos["training"]) > 18 and not videos["training"] & videos["measuring"]
    metrics = read_metrics(workplace / "runs/held-out")
    last = [m for m in metrics if "held_out_mask_accuracy" in m][-1]
    assert f"mask accuracy {last['held_out_mask_accuracy']:.1%}" in done.stdout
    assert "22 videos, clips of 5 x 8 x 8 tokens" in done.stdout
    assert "2 held-out videos" in done.stdout


def test_a_folder_of_a_few_videos_holds_none_out(tmp_path, write_video):
    for i in range(3):
        write_video(tmp_path / f"my videos/v{i}.mp4", range(0, 240, 8 + 4 * i), width=96)
    (tmp_path / "my videos/broken.mp4").write_bytes(b"nothing")
    done = call(pretrain, "--videos", "my videos", "--out", "runs/mine", "--steps", 3,
                "--tokenizer-steps", 5, *flags(TINY), place=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "broken.mp4" in done.stdout
    names = {path.name for path in (tmp_path / "runs/mine").iterdir()}
    assert {"last.pt", "fill_in.png", "fill_in.gif", "curves.png", "tokenizer.pt"} <= names
    metrics = read_metrics(tmp_path / "runs/mine")
    assert f"mask accuracy {metrics[-1]['mask_accuracy']:.1%}" in done.stdout
    assert "(training videos)" in done.stdout
    assert not any(key.startswith("held_out") for m in metrics for key in m)


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes to kill in /proc")
def test_torchrun_restarts_a_killed_process_and_training_continues(workplace):
    """Without --resume: the folder belongs to this job."""
    out = workplace / "runs/killed"
    settings = flags(TINY) + ["--steps", 100, "--log-every", 1, "--knn-every", 100, "--out", out]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "job-7",
                "--max-restarts", "1"]
    group = subprocess.Popen(
        [*torchrun, str(ROOT / "pretrain.py"), *map(str, settings)], cwd=workplace, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    while group.poll() is None and len(read_metrics(out)) < 8:  # the first checkpoint: step 3
        time.sleep(0.05)
    workers = children(group)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    output = group.communicate()[0]
    assert group.returncode == 0, output
    resumed = int(re.search(r"resumed \S+ at step (\d+) of 100", output)[1])
    assert 3 <= resumed < 100 and resumed % 3 == 0
    assert [m["step"] for m in read_metrics(out) if "loss" in m] == list(range(1, 101))


TWO_GPUS = """import os, runpy, sys, torch
torch.cuda.device_count = lambda: 2
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes to kill in /proc")
def test_a_process_that_dies_ends_the_others_and_is_named(workplace):
    """With --gpus 2, here two processes on a CPU. No process is left."""
    out = workplace / "runs/died"
    settings = [*flags(TINY), "--steps", 100000, "--log-every", 1, "--out", out]
    group = subprocess.Popen(
        [sys.executable, "-c", TWO_GPUS, str(ROOT / "pretrain.py"), "--gpus", "2",
         *map(str, settings)], cwd=workplace, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    while group.poll() is None and len(read_metrics(out)) < 4:
        time.sleep(0.05)
    workers = children(group)
    os.kill(workers[1], signal.SIGKILL)
    output = group.communicate(timeout=90)[1]
    assert group.returncode == 137
    assert "pretrain.py: process 1 of 2 failed first, with exit code -9; the others were stopped" \
        in output.splitlines()
    assert not any(Path(f"/proc/{pid}").is_dir() for pid in workers)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_all_processes_saves_and_ends_the_run(workplace, number, code):
    """With processes that load clips, as a terminal or a scheduler sends it to the group."""
    out = workplace / f"runs/stopped-{code}"
    settings = [*flags(TINY), "--steps", 100000, "--log-every", 1, "--save-every", 100000,
                "--workers", 1, "--out", out]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "pretrain.py"), *map(str, settings)], cwd=workplace,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and len(read_metrics(out)) < 4:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors, errors
    assert "the same command with --resume continues" in output
    step = int(re.search(r"stopped at step (\d+) of 100000", output)[1])
    assert torch.load(out / "last.pt", weights_only=True)["step"] == step


# ---------------------------------------------------------------- the two losses


def test_both_losses_fall():
    """With pairs of equal clips of one repeated code each, both tasks can be solved."""
    processes.seed_all(0)
    config = tiny(batch=8, mask_ratio=0.3, lr=1e-2, weight_decay=0.0)
    model = Vimpac(config.transformer(V, 4, 4), 16, 2)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    clips = torch.arange(8)[:, None, None, None, None].expand(8, 2, 5, 4, 4).contiguous()
    terms = []
    for step in range(120):
        terms.append(compute_losses(model, clips, config, seed=step))
        terms[-1]["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert terms[-1]["mask_accuracy"] > 0.95 and terms[-1]["mask_loss"] < 0.3
    assert terms[-1]["contrastive_loss"] < 0.5 * terms[0]["contrastive_loss"]


def larger_weights(model):
    """Ten times the weights. With the usual ones CLS is almost the same for all clips, and batch
    norm enlarges its rounding errors."""
    for p in model.backbone.parameters():
        p.data *= 10 if p.dim() > 1 else 1
    return model


@pytest.mark.parametrize("contrast_on", ["masked", "whole"])
@pytest.mark.parametrize("mask_weight", [1.0, 0.7, 0.0])
def test_the_loss_is_equation_6(mask_weight, contrast_on):
    """Only hidden tokens are predicted; either clips with hidden tokens are contrasted or whole
    ones (Table 12)."""
    config = tiny(alpha=0.5, gamma=0.3, mask_weight=mask_weight, contrast_on=contrast_on)
    processes.seed_all(0)
    model = larger_weights(Vimpac(config.transformer(V, 4, 4), 16, 2))
    clips = torch.randint(V, (3, 2, 5, 4, 4))
    clips[0, 0, -1] = PAD
    terms = compute_losses(model, clips, config)
    terms["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    batch = pretrain.mask_clips(clips, V, config, generator())
    tokens, inputs, mask = (x.flatten(0, 1) for x in batch)
    assert not mask[0, -1].any() and (inputs[mask] == MASK).all()
    cls, features = model.backbone(inputs)
    if contrast_on == "whole":
        cls, _ = model.backbone(tokens)
    logits = model.token_head(features, model.backbone.embedding.weight)
    cross_entropy = F.cross_entropy(logits.flatten(0, 3), tokens.flatten(), reduction="none")
    mask_loss = cross_entropy[mask.flatten()].mean()
    accuracy = (logits.argmax(-1) == tokens)[mask].float().mean()
    contrast = contrastive.info_nce(*model.projection_head(cls).chunk(2), 0.3)
    loss = mask_weight * mask_loss + 0.5 * 0.3 * contrast
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients([{name: gradients[name] for name in expected}], [expected])
    for name, value in (("mask_loss", mask_loss), ("contrastive_loss", 0.3 * contrast),
                        ("loss", loss), ("mask_accuracy", accuracy)):
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5), name


@pytest.mark.parametrize("weight, head", [("alpha", "projection_head"),
                                          ("mask_weight", "token_head")])
def test_a_weight_of_zero_leaves_a_task_out(tmp_path, weight, head):
    config = tiny(out=str(tmp_path / "run"), **{weight: 0.0})
    with recorded_gradients() as gradients:
        train(config, random_store(tmp_path / "s", 12))
    for step in gradients:
        for name, gradient in step.items():
            if name.startswith(head):
                assert not gradient.any()


# ---------------------------------------------------------------- masks of a batch


def every_kind(test):
    noise = pytest.mark.parametrize("noise", [False, True])
    return noise(pytest.mark.parametrize("mask", list(masking.KINDS))(test))


def random_clips(videos):
    return torch.randint(V, (videos, 2, 5, 8, 8), generator=generator(0))


@every_kind
def test_two_processes_hide_the_same_tokens_as_one(mask, noise, monkeypatch):
    config, clips = tiny(mask=mask, noise=noise), random_clips(6)
    clips[1, 0, -1] = PAD
    alone = pretrain.mask_clips(clips, V, config, generator())
    for rank in range(2):
        monkeypatch.setattr(pretrain, "rank_and_world", lambda rank=rank: (rank, 2))
        part = pretrain.mask_clips(clips[rank::2], V, config, generator())
        for a, b in zip(part, alone):
            assert torch.equal(a, b[:, rank::2])


@every_kind
def test_first_and_second_clips_have_their_own_masks_which_a_seed_repeats(mask, noise):
    config, clips = tiny(mask=mask, noise=noise), random_clips(40)
    a, b, c = (pretrain.mask_clips(clips, V, config, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(a.tokens, clips.transpose(0, 1))
    assert torch.equal(a.mask, b.mask) and torch.equal(a.inputs, b.inputs)
    assert not torch.equal(a.mask, c.mask) and not torch.equal(a.inputs, c.inputs)
    assert not torch.equal(a.mask[0], a.mask[1])
    assert torch.equal(a.inputs[~a.mask], a.tokens[~a.mask])
    assert ((a.inputs[a.mask] == MASK).float().mean() < 0.95) == noise


@every_kind
def test_padding_is_neither_predicted_nor_replaced(mask, noise):
    config, clips = tiny(mask=mask, noise=noise, mask_ratio=0.5), random_clips(20)
    clips[::2, 0, -2:] = PAD
    clips[3, 1] = PAD
    batch = pretrain.mask_clips(clips, V, config, generator())
    pad = batch.tokens == PAD
    assert not (batch.mask & pad).any()
    assert (batch.inputs[pad] == PAD).all() and (batch.inputs[~pad] != PAD).all()
    assert batch.mask[~pad].float().mean() > 0.4


def test_masks_dropout_and_steps_draw_different_numbers(tmp_path, monkeypatch):
    """With the seed of dropout, the generator of the masks would repeat dropout's numbers."""
    drawn, mask_clips, encode = [], pretrain.mask_clips, Vimpac.encode

    def watched_mask_clips(clips, vocab_size, config, generator):
        drawn.append(torch.rand(4, generator=generator).tolist())
        return mask_clips(clips, vocab_size, config, generator)

    def watched_encode(model, *args):
        if model.training and torch.is_grad_enabled():
            drawn.append(torch.rand(4).tolist())
        return encode(model, *args)

    monkeypatch.setattr(pretrain, "mask_clips", watched_mask_clips)
    monkeypatch.setattr(Vimpac, "encode", watched_encode)
    config = tiny(steps=2, held_out=0, out=str(tmp_path / "run"))
    train(config, random_store(tmp_path / "s", 12))
    assert len(drawn) == 4  # masks and dropout of two steps
    assert len({number for numbers in drawn for number in numbers}) == 16


# ---------------------------------------------------------------- processes and micro-batches

# processes and micro-batches of a batch of 64 videos, of which a group has 16 or more
SPLITS = {(1, 1): 64, (1, 2): 32, (1, 4): 16, (1, 7): 10, (2, 1): 32, (2, 2): 16, (2, 8): 4}
SETTINGS = {
    "groups of 16": dict(contrast=16, noise=True), "one group": dict(contrast=64),
    "iid": dict(contrast=32, mask="iid", noise=True, alpha=0.5),
    "masks alone": dict(contrast=16, alpha=0.0),
    "whole clips": dict(contrast=64, contrast_on="whole")}


def short_runs(folder, splits):
    """Five steps in each setting and split, on videos of which some are shorter than a clip.

    -> {(setting, split): (gradients of each step, metrics, final weights and statistics)}.
    Without dropout, which each process draws for itself. The learning rate is low: Adam enlarges
    the rounding error of gradients that are nearly 0.
    """
    store, results = data.TokenStore(folder / "s"), {}
    rank = processes.rank_and_world()[0]
    for (name, changes), split in itertools.product(SETTINGS.items(), splits):
        config = tiny(steps=5, batch=64, lr=1e-6, dropout=0.0, log_every=1, knn_every=5,
                      save_every=5, micro_batch=SPLITS[split], out=str(folder / f"{name} {split}"),
                      **changes)
        with recorded_gradients() as gradients:
            model = train(config, store, larger_weights)
        metrics = read_metrics(config.out) if rank == 0 else None
        results[name, split] = gradients, metrics, model.state_dict()
    return results


@pytest.fixture(scope="module")
def every_split(tmp_path_factory, in_two_processes):
    """The results of one process and of two."""
    folder = tmp_path_factory.mktemp("splits")
    store = random_store(folder / "s", 80)
    one, two = ([split for split in SPLITS if split[0] == world] for world in (1, 2))
    first, second = in_two_processes(short_runs, folder, two)
    for key in first:
        for a, b in zip(first[key][0], second[key][0]):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    start = larger_weights(build(tiny(), store)).state_dict()
    return short_runs(folder, one) | first | {"start": start}


def without_idle_biases(state):
    """Leaves out biases whose true gradient is 0: Adam moves them along their rounding errors.

    A softmax ignores the keys' biases, a batch norm the bias of the Linear before it.
    """
    state = {key: value for key, value in state.items() if key != "projection_head.hidden.0.bias"}
    for key in [key for key in state if key.endswith("qkv.bias")]:
        patterns = 2 if ".blocks.1." in key else 1  # "T,H|W": query, key and value of each pattern
        state[key] = state[key].view(patterns, 3, -1)[:, [0, 2]]
    return state


@pytest.mark.parametrize("split", [split for split in SPLITS if split != (1, 1)], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_how_a_step_is_split_changes_nothing(every_split, name, split):
    """Losses, gradients, weights and batch norm's statistics, with noise and PAD, over processes
    and micro-batches: activation checkpointing is exact."""
    whole, parts = every_split[name, (1, 1)], every_split[name, split]
    assert_same_gradients(whole[0], parts[0])
    assert len(whole[1]) == len(parts[1]) == 7  # held-out videos are measured before and after
    for a, b in zip(whole[1], parts[1]):
        for key in a.keys() - {"videos_per_second"}:  # they are rounded to six digits
            tolerance = 1e-5 if "held_out" in key else 5e-6
            assert b[key] == pytest.approx(a[key], abs=tolerance), key
    start, last, other = (without_idle_biases(state)
                          for state in (every_split["start"], whole[2], parts[2]))
    for key, value in last.items():
        moved = (value - start[key]).double().norm()
        assert (other[key] - value).double().norm() <= 0.02 * moved, key


def test_a_group_has_its_own_negatives(every_split):
    """Chance is 2 gamma log(2n - 1): more for 64 videos than for 16."""
    groups, one = (every_split[name, (1, 1)][1][1]["contrastive_loss"]
                   for name in ("groups of 16", "one group"))
    assert groups == pytest.approx(0.4 * math.log(31), abs=0.3)
    assert one == pytest.approx(0.4 * math.log(127), abs=0.3)


def test_the_recomputation_of_a_micro_batch_repeats_its_dropout():
    """Another draw would give the gradient of other features."""
    config = tiny(batch=4, micro_batch=2, dropout=0.3)
    processes.seed_all(0)
    model, features = Vimpac(config.transformer(V, 4, 4), 16, 2).train(), []
    model.backbone.register_forward_hook(
        lambda module, inputs, outputs: features.append(outputs[0].detach()))
    compute_losses(model, torch.randint(V, (4, 2, 5, 4, 4)), config)["loss"].backward()
    assert len(features) == 4 and not torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[3]) and torch.equal(features[1], features[2])


# ---------------------------------------------------------------- GPU


def step_waits_for_nothing(device, precision, config, shape, videos):
    """Two steps, as in train -> the masked-token loss. Raises where one waits for a GPU."""
    config.precision, config.micro_batch = precision, videos
    model = Vimpac(shape, config.projection_hidden, 2).to(device)
    optimizer, scaler = runs.build_optimizer(model, config, (0.9, 0.98), device)
    clips = torch.randint(shape.vocab_size, (videos, 2, shape.frames, shape.height, shape.width))
    for step in range(2):
        if device.type == "cuda":
            waits = "error" if step and precision == "bf16" else "default"
            torch.cuda.set_sync_debug_mode(waits)
        terms = pretrain.compute_losses(config, shape.vocab_size, device, model, clips, generator())
        scaler.scale(terms["loss"]).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update(None if precision == "fp16" else 1.0)
        optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    return terms["mask_loss"].item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_gpu_step_of_64_videos_waits_for_nothing(precision):
    config = Config(preset="small", layers=1)
    loss = step_waits_for_nothing(torch.device("cuda"), precision, config,
                                  config.transformer(8192, 16, 16), 64)
    assert loss == pytest.approx(9, abs=1)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_same_step_runs_on_a_cpu(precision):
    config = tiny()
    loss = step_waits_for_nothing(CPU, precision, config, config.transformer(V, 4, 4), 4)
    assert loss == pytest.approx(math.log(V + 5), abs=0.5)


# ---------------------------------------------------------------- what is refused


def test_tokens_of_another_frame_rate_are_refused(workplace):
    done = call(pretrain, "--fps", 4, *flags(TINY), "--out", "runs/rate", place=workplace)
    assert done.returncode == 2 and "fps 8.0, not 4.0" in done.stderr


@pytest.mark.parametrize("argv, message", [
    (["--heads", "3"], "heads must be a multiple"), (["--layout", "W,H"], "T,H|W"),
    (["--videos", "nowhere"], "nowhere"), (["--data", "nowhere"], "nowhere"),
    (["--batch", "0"], "--batch"), (["--resume-from", "x.pt"], "x.pt"),
    (["--frame-size", "60"], "multiple of 8"), (["--init", "none.pt"], "none.pt"),
    (["--min-stride", "3", "--max-stride", "2"], "--max-stride"),
    (["--data", "a", "--videos", "b"], "not both"), (["--epochs", "nan"], "a number"),
    (["--steps", "-3"], "--steps"), (["--held-out", "-1"], "--held-out"),
    (["--clip", "1"], "--grad-clip"), (["--recompute"], "--activation-checkpointing")])
def test_a_wrong_value_ends_with_one_line(tmp_path, argv, message):
    done = call(pretrain, *argv, place=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_second_stage_asks_for_the_first(tmp_path):
    done = call(pretrain, "--preset", "large256", place=tmp_path)
    assert done.returncode == 2 and "--resume-from" in done.stderr and not list(tmp_path.iterdir())


def test_a_batch_is_whole_groups_of_videos_that_there_are(workplace):
    done = call(pretrain, *flags(TINY), "--batch", 6, "--contrast", 4, "--out", "runs/odd",
                place=workplace)
    assert done.returncode == 2 and "--batch 6 must be a multiple of --contrast 4" in done.stderr
    done = call(pretrain, *flags(TINY), "--batch", 999, "--steps", 1, "--out", "runs/all",
                place=workplace)
    assert done.returncode == 0 and "22 videos: using --batch 22 --contrast 22" in done.stdout
