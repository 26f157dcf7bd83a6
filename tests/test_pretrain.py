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


def tiny(**changes):
    config = Config(**{**PRESETS["toy"], **TINY, "steps": 6, **changes})
    config.contrast, config.micro_batch = config.contrast or config.batch, config.micro_batch or config.batch
    return config


def build(config, store):
    processes.seed_all(config.seed)
    return Vimpac(config.transformer(store.header["vocab_size"], store.height, store.width), 16, 2)


def train(config, store, change=lambda model: model):
    """change: of the first weights."""
    model = change(build(config, store))
    pretrain.train(config, model, store, CPU, None)
    return model


# ---------------------------------------------------------------- a run


def test_no_argument_leaves_everything_a_reader_looks_for(workplace):
    out = workplace / "runs/toy"
    metrics = read_metrics(out)
    assert {"step", "epoch", "loss", "mask_loss", "mask_accuracy", "contrastive_loss", "lr", "videos_per_second"} \
        <= metrics[1].keys()
    for watched in ("knn_motion", "knn_appearance", "held_out_mask_accuracy", "held_out_contrastive_loss"):
        assert [m["step"] for m in metrics if watched in m] == [0, 3, 5]
    assert json.loads((out / "config.json").read_text())["steps"] == 5
    assert list(out.glob("events.out.tfevents*")) and (out / "curves.png").is_file()
    picture = imageio.imread(out / "fill_in.png")
    assert picture.std() > 10 and len(imageio.mimread(out / "fill_in.gif")) == 5
    last = (workplace / "stdout.txt").read_text()
    assert "mask accuracy" in last and "kNN on motion" in last and "codes used" in last
    assert load_backbone(out / "last.pt").config.dim == 16


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path):
    store = random_store(tmp_path / "s", 12)
    weights = [torch.cat([p.detach().flatten() for p in train(tiny(seed=seed, dropout=0.1, out=str(tmp_path / "run")),
                                                              store).parameters()]) for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_resuming_equals_no_interruption(tmp_path):
    store, result = random_store(tmp_path / "s", 24), {}
    for name in ("whole", "broken"):
        config = tiny(out=str(tmp_path / name), dropout=0.1, noise=True)
        if name == "broken":
            with interrupted(step=4), pytest.raises(KeyboardInterrupt):  # after the checkpoint of step 3
                train(config, store)
            config.resume = True
        weights = train(config, store).state_dict()
        metrics = [m for m in read_metrics(config.out) if m["step"] != 4]  # a mean since the last line, or since step 3
        result[name] = weights, [{k: v for k, v in m.items() if k != "videos_per_second"} for m in metrics]
    assert all(torch.equal(a, b) for a, b in zip(result["whole"][0].values(), result["broken"][0].values()))
    assert result["whole"][1] == result["broken"][1] and len(result["whole"][1]) > 4


def test_the_second_stage_starts_from_the_first_at_another_size(workplace, capsys):
    """Positions and the optimizer's moments are interpolated, the rest is taken over, and the log says so."""
    path = workplace / "runs/toy/last.pt"
    weights, config = torch.load(path, weights_only=True)["model"], tiny()
    model = Vimpac(config.transformer(256, 16, 16), 16, 2)
    optimizer = runs.Optimizer(model, config, 6, (0.9, 0.98))
    assert checkpoints.restore(path, model, optimizer, resize_table) == 5
    said = capsys.readouterr().out
    assert "row positions" in said and "from 8 to 16" in said and "time" not in said
    backbone, state = model.backbone, optimizer.adamw.state
    assert torch.equal(backbone.row, resize_table(weights["backbone.row"], 16))
    assert torch.equal(backbone.time, weights["backbone.time"])
    assert torch.equal(backbone.embedding.weight, weights["backbone.embedding.weight"])
    for name, p in (("row", backbone.row), ("time", backbone.time), ("cls", backbone.cls)):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert state[p][moment].shape == p.shape and state[p][moment].abs().max() > 0, name
    other = Vimpac(tiny(dim=24).transformer(256, 8, 8), 16, 2)
    with pytest.raises(UserError, match="does not fit"):
        checkpoints.restore(path, other, runs.Optimizer(other, config, 6, (0.9, 0.98)), resize_table)


def test_init_starts_a_schedule_of_its_own(workplace):
    """At step 0 with the weights alone of another run, or with --resume where it had stopped; other files are refused
    in a line."""
    for steps, said in ((2, "starting from runs/toy/last.pt"), (3, "resumed runs/second/last.pt at step 2 of 3")):
        done = call(pretrain, "--init", "runs/toy/last.pt", "--resume", "--steps", steps, "--out", "runs/second",
                    *flags(TINY), place=workplace)
        assert done.returncode == 0 and said in done.stdout
    assert read_metrics(workplace / "runs/second")[0]["step"] == 0
    for path in ("nowhere.pt", "datasets/toy/tokenizer.pt", "runs/third/last.pt"):
        done = call(pretrain, "--init", path, *flags(TINY), "--out", "runs/third", place=workplace)
        assert done.returncode == 2 and path in done.stderr.strip().splitlines()[-1]
    done = call(pretrain, "--resume-from", "runs/toy/last.pt", *flags(TINY), place=workplace)
    assert done.returncode == 2 and "folder of its own" in done.stderr


@pytest.mark.parametrize("going_on", [["--resume"], ["--init", "first/last.pt"], ["--resume-from", "first/last.pt"]])
def test_a_model_does_not_go_on_with_the_tokens_of_another_tokenizer(tmp_path, going_on):
    for name, tokenizer in (("one", "a" * 12), ("other", "b" * 12)):
        random_store(tmp_path / name, 24, fingerprint=tokenizer)
    common = [*flags(TINY), "--frame-size", 16, "--steps", 4]
    assert call(pretrain, "--data", "one", "--out", "first", *common, place=tmp_path).returncode == 0
    kept = (tmp_path / "first/last.pt").read_bytes()
    done = call(pretrain, "--data", "other", "--out", "first" if going_on == ["--resume"] else "second", *going_on,
                *common, "--steps", 6, place=tmp_path)
    assert done.returncode == 2 and "made with another tokenizer" in done.stderr.splitlines()[-1]
    assert (tmp_path / "first/last.pt").read_bytes() == kept


def test_what_the_weights_began_with_stays_with_a_run(workplace, tmp_path):
    """`--resume` with another --init-std: the checkpoint says what --from-scratch is to start from."""
    common = [*flags(TINY), "--out", tmp_path / "run"]
    for more in (["--steps", 2, "--init-std", 0.1], ["--steps", 4, "--init-std", 0.3, "--resume"]):
        assert call(pretrain, *common, *more, place=workplace).returncode == 0
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["transformer"]["init_std"] == 0.1
    assert load_backbone(tmp_path / "run/last.pt").config.init_std == 0.1


def test_init_takes_a_checkpoint_at_another_size_and_a_released_one(workplace, tmp_path, capsys):
    path = workplace / "runs/toy/last.pt"
    weights, model = torch.load(path, weights_only=True)["model"], Vimpac(tiny().transformer(256, 16, 16), 16, 2)
    pretrain.initialise(model, path, {})
    assert "interpolated the row positions from 8 to 16" in capsys.readouterr().out
    assert torch.equal(model.backbone.column, resize_table(weights["backbone.column"], 16))
    assert torch.equal(model.projection_head.out.weight, weights["projection_head.out.weight"])
    torch.save(released_state(layers=2, dim=256, frames=5, side=4, patterns=(1, 2)), tmp_path / "classifier.pt")
    config = Config(layers=2, dim=256, heads=4, mlp_dim=1024)
    released = Vimpac.from_released(tmp_path / "classifier.pt")
    model = Vimpac(replace(released.backbone.config, height=8, width=8), 256, 2)
    pretrain.initialise(model, tmp_path / "classifier.pt", {})
    for a, b in zip(model.token_head.parameters(), released.token_head.parameters()):
        assert torch.equal(a, b)
    assert torch.equal(model.backbone.row, resize_table(released.backbone.row, 8))
    other = Vimpac(config.transformer(8192, 4, 4), 256, 2)
    other.backbone.config = replace(released.backbone.config, layout="H|W,T")
    with pytest.raises(UserError, match="layout"):
        pretrain.initialise(other, tmp_path / "classifier.pt", {})


def test_two_stages_follow_one_schedule(tmp_path):
    """The second at another clip size: optimizer, step, learning rates and curves go on as in one unbroken run."""
    stores = [random_store(tmp_path / str(side), 24, side=side) for side in (4, 8)]
    common = dict(steps=0, epochs=4.0, batch=4, log_every=1, warmup=0.3, alpha=0.0)
    train(tiny(out=str(tmp_path / "unbroken"), **common), stores[0])
    train(tiny(out=str(tmp_path / "first"), stop_after=2.5, **common), stores[0])
    path = tmp_path / "first/last.pt"
    before = torch.load(path, weights_only=True)
    second = tiny(out=str(tmp_path / "second"), resume_from=str(path), **common)
    (tmp_path / "second").mkdir()
    (tmp_path / "second/last.pt").write_bytes(b"of an earlier run")
    with recorded_gradients() as gradients:
        train(second, stores[1])
    assert (tmp_path / "second/earlier-1/last.pt").read_bytes() == b"of an earlier run"
    rates = [{m["step"]: m["lr"] for m in read_metrics(tmp_path / name) if "lr" in m}
             for name in ("unbroken", "first", "second")]
    steps = len(rates[0])
    stopped = before["step"]
    assert steps == 22 and stopped == 13 and len(rates[1]) == stopped and before["steps"] == steps
    assert rates[2] == rates[0] and len(gradients) == steps - stopped
    after = torch.load(tmp_path / "second/last.pt", weights_only=True)
    assert after["step"] == steps and after["model"]["backbone.row"].shape == (8, 16)
    assert {int(moment["step"]) for moment in after["optimizer"]["state"].values()} == {steps}
    third = tiny(out=str(tmp_path / "third"), resume_from=str(tmp_path / "second/last.pt"), **common)
    with pytest.raises(UserError, match="nothing is left to train"):
        train(third, stores[1])


def test_training_never_draws_a_held_out_video_and_all_that_is_shown_is_held_out(workplace, monkeypatch):
    read, doing = {"training": set(), "measuring": set(), "filling in": set()}, ["training"]
    cut, update, evaluate, fill_in = data.ClipPairs.__getitem__, pretrain.update, monitor.evaluate, monitor.fill_in

    def watched_cut(pairs, item):
        read[doing[-1]].add(item[0])
        return cut(pairs, item)

    def watched_evaluate(*args):
        doing.append("measuring")
        found = evaluate(*args)
        doing.pop()
        return found

    def watched_update(model, *args):
        assert model.training  # also after a measurement
        return update(model, *args)

    def watched_fill_in(model, tokenizer, store, videos, *args, **masks):
        read["filling in"].update(videos.tolist())
        return fill_in(model, tokenizer, store, videos, *args, **masks)
    monkeypatch.setattr(data.ClipPairs, "__getitem__", watched_cut)
    for module, function in ((monitor, watched_evaluate), (pretrain, watched_update), (monitor, watched_fill_in)):
        monkeypatch.setattr(module, function.__name__.removeprefix("watched_"), function)
    done = call(pretrain, *flags(TINY), "--steps", 12, "--out", "runs/held-out", place=workplace)
    assert done.returncode == 0, done.stderr
    assert len(read["measuring"]) == 2 and read["measuring"] == read["filling in"]
    assert len(read["training"]) > 18 and not read["training"] & read["measuring"]
    last = [m for m in read_metrics(workplace / "runs/held-out") if "held_out_mask_accuracy" in m][-1]
    assert f"mask accuracy {100 * last['held_out_mask_accuracy']:.1f}%" in done.stdout
    assert "22 videos, 5 x 8 x 8 tokens" in done.stdout and "2 held-out videos" in done.stdout


def test_a_folder_of_a_few_videos_holds_none_out(tmp_path, write_video):
    for i in range(3):
        write_video(tmp_path / f"my videos/v{i}.mp4", range(0, 240, 8 + 4 * i), width=96)
    (tmp_path / "my videos/broken.mp4").write_bytes(b"nothing")
    done = call(pretrain, "--videos", "my videos", "--out", "runs/mine", "--steps", 3, "--tokenizer-steps", 5,
                *flags(TINY), place=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "broken.mp4" in done.stdout and "3 videos tokenised, 1 could not be decoded" in done.stdout
    assert {"last.pt", "fill_in.png", "fill_in.gif", "curves.png", "tokenizer.pt"} <= \
        {path.name for path in (tmp_path / "runs/mine").iterdir()}
    metrics = read_metrics(tmp_path / "runs/mine")
    assert f"mask accuracy {100 * metrics[-1]['mask_accuracy']:.1f}%" in done.stdout
    assert "(training videos)" in done.stdout
    assert not any(key.startswith("held_out") for m in metrics for key in m)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes to kill in /proc")
def test_a_killed_process_is_restarted_and_training_goes_on(workplace):
    """torchrun starts the group again, without --resume: from this run's checkpoint, not from an earlier run's."""
    out = workplace / "runs/killed"
    out.mkdir()
    (out / "last.pt").write_bytes(b"of an earlier run")
    settings = flags(TINY) + ["--steps", 100, "--log-every", 1, "--knn-every", 100]
    group = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                              "--max-restarts", "1", str(ROOT / "pretrain.py"), *map(str, settings), "--out", str(out)],
                             cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    while group.poll() is None and len(read_metrics(out)) < 8:  # the first checkpoint is that of step 3
        time.sleep(0.05)
    workers = Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    said = group.communicate()[0]
    assert group.returncode == 0, said
    assert (out / "earlier-1/last.pt").read_bytes() == b"of an earlier run"
    resumed = int(re.search(r"resumed \S+ at step (\d+) of 100", said)[1])
    assert 3 <= resumed < 100 and resumed % 3 == 0
    assert [m["step"] for m in read_metrics(out) if "loss" in m] == list(range(1, 101))


TWO_GPUS = """import os, runpy, sys, torch
torch.cuda.device_count = lambda: 2
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes to kill in /proc")
def test_a_process_that_dies_ends_the_others_and_is_named(workplace):
    """Of `--gpus 2`, on a CPU in place of two GPUs: one line at the end says which, and no process is left."""
    out, settings = workplace / "runs/died", [*flags(TINY), "--steps", 100000, "--log-every", 1]
    group = subprocess.Popen([sys.executable, "-c", TWO_GPUS, str(ROOT / "pretrain.py"), "--gpus", "2",
                              *map(str, settings), "--out", str(out)], cwd=workplace, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True,
                             env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    while group.poll() is None and len(read_metrics(out)) < 4:
        time.sleep(0.05)
    workers = [int(pid) for pid in Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()]
    os.kill(workers[1], signal.SIGKILL)
    said = group.communicate(timeout=90)[1]
    assert group.returncode == 137
    assert "pretrain.py: process 1 of 2 ended first, with exit code -9; the others were stopped" in said.splitlines()
    assert not any(Path(f"/proc/{pid}").is_dir() for pid in workers)


# ---------------------------------------------------------------- the two losses


def test_both_losses_fall():
    """On pairs of equal clips that repeat one code each, both tasks can be solved."""
    processes.seed_all(0)
    config = tiny(batch=8, mask_ratio=0.3, lr=1e-2, weight_decay=0.0, warmup=0.0, clip=1e9)
    model = Vimpac(config.transformer(16, 4, 4), 16, 2)
    optimizer = runs.Optimizer(model, config, 240, (0.9, 0.98))
    clips = torch.arange(8)[:, None, None, None, None].expand(8, 2, 5, 4, 4).contiguous()
    found = [pretrain.update(model, config, clips, 16, optimizer, torch.float32, step)[0] for step in range(120)]
    assert found[-1]["mask_accuracy"] > 0.95 and found[-1]["mask_loss"] < 0.3
    assert found[-1]["contrastive_loss"] < 0.5 * found[0]["contrastive_loss"]


@pytest.mark.parametrize("contrast_on", ["masked", "whole"])
@pytest.mark.parametrize("mask_weight", [1.0, 0.7, 0.0])
def test_the_loss_is_equation_6_on_masked_tokens_alone(monkeypatch, mask_weight, contrast_on):
    """Its weights, and which clips are told apart, among them: those of the mask task, or whole ones (Table 12)."""
    config = tiny(alpha=0.5, gamma=0.3, mask_weight=mask_weight, contrast_on=contrast_on)
    processes.seed_all(0)
    model = large(Vimpac(config.transformer(16, 4, 4), 16, 2))
    clips = torch.randint(16, (3, 2, 5, 4, 4))
    clips[0, 0, -1] = 17  # PAD
    generator = torch.Generator().manual_seed(1)
    tokens, masked, mask, padded = masking.prepare(clips, 16, generator=torch.Generator().manual_seed(1))
    found = pretrain.losses(model, config, clips, 16, generator, torch.float32)
    assert padded.tolist() == [True] + [False] * 5 and not mask[0, -1].any() and (masked[mask] == 20).all()
    cls, features = model.backbone(masked)
    if contrast_on == "whole":
        cls, others = model.backbone(tokens)
        features = features if mask_weight else others
    logits = model.token_head(features, model.backbone.embedding.weight)
    everywhere = torch.nn.functional.cross_entropy(logits.flatten(0, 3), tokens.flatten(), reduction="none")
    expected = everywhere[mask.flatten()].mean()
    first, second = model.projection_head(cls).chunk(2)
    contrast = contrastive.info_nce(first, second, 0.3)
    loss = mask_weight * expected + 0.5 * 0.3 * contrast
    loss.backward()
    alone = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with recorded_gradients() as gradients:
        optimizer = runs.Optimizer(model, config, 6, (0.9, 0.98))
        config.contrast = 3
        monkeypatch.setattr(processes, "one_seed", lambda *numbers: 1)  # the same masks
        learnt, lr = pretrain.update(model, config, clips, 16, optimizer, torch.float32, 2)
    assert_same_gradients(gradients, [alone])
    assert lr == runs.learning_rate(2, 6, config.lr, 0.1)
    for measures in (found, learnt):
        assert ("mask_loss" in measures) == (mask_weight > 0)
        assert measures["contrastive_loss"].item() == pytest.approx(0.3 * contrast.item(), rel=1e-5)
        assert measures["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        if mask_weight:
            right = (logits.argmax(-1) == tokens)[mask].float().mean().item()
            assert measures["mask_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
            assert measures["mask_accuracy"].item() == pytest.approx(right)


def test_without_a_task_its_head_stays_where_it_started(tmp_path):
    store = random_store(tmp_path / "s", 12)
    for alpha, mask_weight in ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
        config = tiny(alpha=alpha, mask_weight=mask_weight, log_every=1, out=str(tmp_path / "run"))
        before = dict(build(config, store).named_parameters())
        moved = {name for name, p in train(config, store).named_parameters() if not torch.equal(p, before[name])}
        idle = ("projection_head.",) * (alpha == 0) + ("token_head.",) * (mask_weight == 0)
        assert moved == {name for name in before if not name.startswith(idle)}
        for m in read_metrics(tmp_path / "run"):
            if "loss" in m:
                assert m["loss"] == pytest.approx(m.get("mask_loss", 0) + m.get("contrastive_loss", 0), abs=1e-5)
                assert ("mask_accuracy" in m, "contrastive_loss" in m) == (mask_weight > 0, alpha > 0)


# ---------------------------------------------------------------- what is drawn at random


def test_masks_and_dropout_draw_other_numbers_and_other_ones_each_step(monkeypatch):
    """A generator of the masks with the seed of dropout's would give rank 0 the same numbers for both."""
    config, drawn, prepare, mask_loss = tiny(micro_batch=2), [], masking.prepare, masking.mask_loss
    model = Vimpac(config.transformer(16, 4, 4), 16, 2)
    optimizer, clips = runs.Optimizer(model, config, 6, (0.9, 0.98)), torch.randint(16, (4, 2, 5, 4, 4))

    def watched_prepare(*args, generator, **kwargs):
        drawn.append(torch.rand(4, generator=generator).tolist())
        return prepare(*args, generator=generator, **kwargs)

    def watched_loss(*args, **kwargs):
        drawn.append(torch.rand(4).tolist())
        return mask_loss(*args, **kwargs)
    monkeypatch.setattr(masking, "prepare", watched_prepare)
    monkeypatch.setattr(masking, "mask_loss", watched_loss)
    for step in (0, 1, 1):
        pretrain.update(model, config, clips, 16, optimizer, torch.float32, step)
    assert len(drawn) == 9 and drawn[3:6] == drawn[6:]  # masks, then dropout of two micro-batches
    assert len({number for numbers in drawn[:6] for number in numbers}) == 24


def what_is_hidden(config, model, steps, videos=16):
    """Updates on random tokens of a large vocabulary -> the clips, inputs and places to predict of all steps, each with
    a row a clip."""
    seen = []
    hook = model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs))
    optimizer, found = runs.Optimizer(model, config, steps, (0.9, 0.98)), []
    for step in range(steps):
        clips = torch.randint(8192, (videos, 2, 5, 8, 8))
        pretrain.update(model, config, clips, 8192, optimizer, torch.float32, step)
        inputs, hidden, _ = seen[-1]
        mask = torch.zeros(inputs.numel(), dtype=torch.bool).index_fill(0, hidden, True).view_as(inputs)
        found.append((clips.transpose(0, 1).flatten(0, 1), inputs, mask))
    hook.remove()
    return [torch.cat(parts) for parts in zip(*found)]


def kinds(tokens, inputs, mask):
    """What the hidden tokens of a clip have become: a set of "MASK", "left" and "random"."""
    was, now = tokens[mask], inputs[mask]
    return {"MASK" if b == 8192 + 4 else "left" if a == b else "random" for a, b in zip(was.tolist(), now.tolist())}


def test_noise_is_drawn_for_whole_cuboids_of_every_length():
    """80% MASK, 10% random codes, 10% left. Drawn from the masks' own numbers, all that is left would be long."""
    config = tiny(noise=True, blocks=1, batch=16)
    processes.seed_all(0)
    model = Vimpac(config.transformer(8192, 8, 8), 16, 2)
    lengths = {"MASK": [], "left": [], "random": []}
    for tokens, inputs, mask in zip(*what_is_hidden(config, model, 20)):
        kind, = kinds(tokens, inputs, mask)
        lengths[kind].append([len(places.unique()) for places in mask.nonzero(as_tuple=True)])
        assert torch.equal(inputs[~mask], tokens[~mask])
    for kind, share in (("MASK", 0.8), ("left", 0.1), ("random", 0.1)):
        assert len(lengths[kind]) / 640 == pytest.approx(share, abs=0.03)
        for axis, most in enumerate((3, 4, 4)):
            assert {length[axis] for length in lengths[kind]} == set(range(1, most + 1))


def test_iid_masks_hide_token_by_token_and_so_does_their_noise(workplace):
    config = tiny(mask="iid", noise=True, mask_ratio=0.3, batch=16)
    model = Vimpac(config.transformer(8192, 8, 8), 16, 2)
    tokens, inputs, mask = what_is_hidden(config, model, 1)
    assert mask.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert all(kinds(*clip) == {"MASK", "left", "random"} for clip in zip(tokens, inputs, mask))
    left, replaced = (inputs == tokens)[mask].float().mean(), (inputs < 8192)[mask].float().mean()
    assert left.item() == pytest.approx(0.1, abs=0.03) and replaced.item() == pytest.approx(0.2, abs=0.04)
    done = call(pretrain, *flags(TINY), "--mask", "iid", "--noise", "--steps", 2, "--out", "runs/iid", place=workplace)
    assert done.returncode == 0 and "iid masks, on" in done.stdout and "mask accuracy" in done.stdout


# ---------------------------------------------------------------- several processes

SPLITS = {  # processes and micro-batches: what a process takes at a time of 64 videos, whole groups of 16 or parts
    (1, 1): 64, (1, 2): 32, (1, 4): 16, (1, 7): 10, (2, 1): 32, (2, 2): 16, (2, 8): 4}
SHARED = {"groups of 16": dict(contrast=16, noise=True), "one group": dict(contrast=64),
          "iid": dict(contrast=32, mask="iid", noise=True, alpha=0.5), "masks alone": dict(contrast=16, alpha=0.0),
          "whole clips": dict(contrast=64, contrast_on="whole")}


def large(model):
    """A model's weights made ten times as large. With the usual ones CLS is almost the same in all clips, and a batch
    norm enlarges its rounding."""
    for p in model.backbone.parameters():
        p.data *= 10 if p.dim() > 1 else 1
    return model


def short_runs(place, splits):
    """A run of five steps in each setting and split, on videos of which some are shorter than a clip
    -> {(setting, split): (each step's gradients, metrics, the last weights and running statistics)}.

    Without dropout, which each process draws for itself. The learning rate is low: Adam enlarges the rounding of
    gradients that are nearly 0, and at a usual one the later steps would start from weights that differ by more.
    """
    store, found, rank = data.TokenStore(place / "s"), {}, processes.rank_and_world()[0]
    for (name, changes), split in itertools.product(SHARED.items(), splits):
        config = tiny(steps=5, batch=64, lr=1e-6, dropout=0.0, log_every=1, knn_every=5, save_every=5, precision="fp32",
                      micro_batch=SPLITS[split], out=str(place / f"{name} {split}"), **changes)
        with recorded_gradients() as gradients:
            model = train(config, store, large)
        found[name, split] = gradients, read_metrics(config.out) if rank == 0 else None, model.state_dict()
    return found


@pytest.fixture(scope="module")
def every_split(tmp_path_factory, in_two_processes):
    """What one process finds, and each of two."""
    place = tmp_path_factory.mktemp("shared")
    random_store(place / "s", 80)
    one, two = ([split for split in SPLITS if split[0] == world] for world in (1, 2))
    first, second = in_two_processes(short_runs, place, two)
    for key in first:
        for a, b in zip(first[key][0], second[key][0]):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return short_runs(place, one) | first | {"start": large(build(tiny(), data.TokenStore(place / "s"))).state_dict()}


def trained_by_gradients(state):
    """A model's tensors, without the biases whose true gradient is 0: Adam moves these along their rounding. A softmax
    does not see the keys' biases, a batch norm not that of the Linear before it."""
    state = {key: value for key, value in state.items() if key != "projection_head.hidden.0.bias"}
    for key in [key for key in state if key.endswith("qkv.bias")]:
        patterns = 2 if ".blocks.1." in key else 1  # "T,H|W": each pattern's query, key and value
        state[key] = state[key].view(patterns, 3, -1)[:, [0, 2]]
    return state


@pytest.mark.parametrize("split", [split for split in SPLITS if split != (1, 1)], ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_how_a_step_is_split_changes_nothing(every_split, name, split):
    """Losses, gradients, weights and the batch norm's statistics, with noise and PAD, over processes and micro-batches,
    where several groups run at once and where a group takes two passes: gradient caching is exact."""
    whole, parts = every_split[name, (1, 1)], every_split[name, split]
    assert_same_gradients(whole[0], parts[0])
    assert len(whole[1]) == len(parts[1]) == 7  # held-out videos are measured before and after
    for a, b in zip(whole[1], parts[1]):
        for key in a.keys() - {"videos_per_second"}:  # they are rounded to six digits
            assert b[key] == pytest.approx(a[key], abs=1e-5 if "held_out" in key else 5e-6), key
    first, last, other = (trained_by_gradients(state) for state in (every_split["start"], whole[2], parts[2]))
    for key, value in last.items():
        moved = (value - first[key]).double().norm()
        assert (other[key] - value).double().norm() <= 0.02 * moved, key


def test_groups_have_negatives_and_statistics_of_their_own(every_split):
    """Told from 63 others, a video costs more than told from 15; chance is 2 gamma log(2n - 1)."""
    groups, one = (every_split[name, (1, 1)][1][1]["contrastive_loss"] for name in ("groups of 16", "one group"))
    assert groups == pytest.approx(0.4 * math.log(31), abs=0.3) and one == pytest.approx(0.4 * math.log(127), abs=0.3)


def test_both_passes_of_a_micro_batch_see_the_same_features(monkeypatch):
    """With dropout, of which another draw would be the gradient of other features."""
    config = tiny(batch=4, micro_batch=2, dropout=0.3)
    processes.seed_all(0)
    model, seen = Vimpac(config.transformer(16, 4, 4), 16, 2).train(), []
    model.backbone.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0].detach()))
    optimizer = runs.Optimizer(model, config, 6, (0.9, 0.98))
    pretrain.update(model, config, torch.randint(16, (4, 2, 5, 4, 4)), 16, optimizer, torch.float32, 0)
    assert len(seen) == 4 and not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


# ---------------------------------------------------------------- speed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_gpu_step_of_512_clips_waits_for_nothing(precision):
    """131,072 sequences along time, beyond one launch of some kernels; fp16's scaler alone may wait for the GPU."""
    device, config = torch.device("cuda"), Config(preset="small", layers=1)
    model = Vimpac(config.transformer(8192, 16, 16), 2048, 2).to(device)
    optimizer = runs.Optimizer(model, config, 10, (0.9, 0.98), precision)
    clips = torch.randint(8192, (256, 2, 5, 16, 16))
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step > 0 and precision == torch.bfloat16 else "default")
        measures, _ = pretrain.update(model, config, clips, 8192, optimizer, precision, step)
    torch.cuda.set_sync_debug_mode("default")
    assert measures["mask_loss"].item() == pytest.approx(9, abs=1)


# ---------------------------------------------------------------- what is refused


def test_tokens_of_another_rate_are_not_taken_for_those_asked_for(workplace):
    done = call(pretrain, "--fps", 4, *flags(TINY), place=workplace)
    assert done.returncode == 2 and "fps 8.0, not 4.0" in done.stderr


@pytest.mark.parametrize("argv, said", [
    (["--heads", "3"], "3 heads"), (["--layout", "W,H"], "T,H|W"), (["--videos", "nowhere"], "nowhere"),
    (["--data", "nowhere"], "nowhere"), (["--batch", "0"], "--batch"),
    (["--resume-from", "x.pt"], "--resume-from x.pt"), (["--frame-size", "60"], "multiple of 8"),
    (["--min-stride", "3", "--max-stride", "2"], "the smaller first"), (["--init", "none.pt"], "none.pt"),
    (["--data", "a", "--videos", "b"], "one of them"), (["--epochs", "nan"], "a number"),
    (["--steps", "-3"], "--steps"), (["--held-out", "-1"], "--held-out")])
def test_wrong_values_end_with_one_line(tmp_path, argv, said):
    done = call(pretrain, *argv, place=tmp_path)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_second_stage_asks_for_the_first(tmp_path):
    done = call(pretrain, "--preset", "large256", place=tmp_path)
    assert done.returncode == 2 and "--resume-from" in done.stderr and not list(tmp_path.iterdir())


def test_a_batch_that_is_not_made_of_whole_groups_is_refused(workplace):
    done = call(pretrain, *flags(TINY), "--batch", 6, "--contrast", 4, "--out", "runs/odd", place=workplace)
    assert done.returncode == 2 and "--batch 6 must be a multiple of --contrast 4" in done.stderr
    done = call(pretrain, *flags(TINY), "--batch", 999, "--steps", 1, "--out", "runs/all", place=workplace)
    assert done.returncode == 0 and "--batch 999 is more than the 22 videos: using 22" in done.stdout
