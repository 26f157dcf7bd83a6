import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
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

import contrastive
import data
import masking
import monitor
import pretrain
from plumbing import processes, runs
from plumbing.cli import UserError
from plumbing.runs import read_metrics
from pretrain import PRESETS, Config, Vimpac
from transformer import load_backbone, resize_table

CPU = torch.device("cpu")


def tiny(**changes):
    return Config(**{**PRESETS["toy"], **TINY, "steps": 6, **changes})


def build(config, store):
    processes.seed_all(config.seed)
    return Vimpac(config.transformer(store.header["vocab_size"], store.height, store.width), 16, 2)


def train(config, store, scale=1.0):
    """scale: of the backbone's first weights."""
    model = build(config, store)
    for p in model.backbone.parameters():
        p.data *= scale if p.dim() > 1 else 1
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
    assert runs.restore(path, model, optimizer, resize_table) == 5
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
        runs.restore(path, other, runs.Optimizer(other, config, 6, (0.9, 0.98)), resize_table)


def test_init_and_resume_from_the_command_line(workplace):
    """A stage of its own: it starts at step 0 with the weights of another run, or with --resume where it had stopped;
    other files are refused in a line."""
    for steps, said in ((2, "starting from runs/toy/last.pt"), (3, "resumed runs/second/last.pt at step 2 of 3")):
        done = call(pretrain, "--init", "runs/toy/last.pt", "--resume", "--steps", steps, "--out", "runs/second",
                    *flags(TINY), place=workplace)
        assert done.returncode == 0 and said in done.stdout
    assert read_metrics(workplace / "runs/second")[0]["step"] == 0
    for path in ("nowhere.pt", "datasets/toy/tokenizer.pt"):
        done = call(pretrain, "--init", path, *flags(TINY), "--out", "runs/third", place=workplace)
        assert done.returncode == 2 and path in done.stderr.strip().splitlines()[-1]


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
    assert (out / "last.old.pt").read_bytes() == b"of an earlier run"
    resumed = int(re.search(r"resumed \S+ at step (\d+) of 100", said)[1])
    assert 3 <= resumed < 100 and resumed % 3 == 0
    assert [m["step"] for m in read_metrics(out) if "loss" in m] == list(range(1, 101))


# ---------------------------------------------------------------- the two losses


def test_both_losses_fall():
    """On pairs of equal clips that repeat one code each, both tasks can be solved."""
    processes.seed_all(0)
    config = tiny(mask_ratio=0.3, lr=1e-2, weight_decay=0.0, warmup=0.0, clip=1e9)
    model = Vimpac(config.transformer(16, 4, 4), 16, 2)
    optimizer = runs.Optimizer(model, config, 240, (0.9, 0.98))
    clips = torch.arange(8)[:, None, None, None, None].expand(8, 2, 5, 4, 4).contiguous()
    found = [pretrain.update(model, config, [clips], 16, optimizer, torch.float32, step)[0] for step in range(120)]
    assert found[-1]["mask_accuracy"] > 0.95 and found[-1]["mask_loss"] < 0.3
    assert found[-1]["contrastive_loss"] < 0.5 * found[0]["contrastive_loss"]


def test_the_loss_is_equation_6_on_masked_tokens_alone():
    config = tiny(alpha=0.5, gamma=0.3)
    processes.seed_all(0)
    model = Vimpac(config.transformer(16, 4, 4), 16, 2)
    clips = torch.randint(16, (3, 2, 5, 4, 4))
    clips[0, 0, -1] = 17  # PAD
    loss, measures = pretrain.losses(model, config, clips, 16, torch.Generator().manual_seed(1))
    tokens, masked, mask, padded = masking.prepare(clips, 16, generator=torch.Generator().manual_seed(1))
    assert padded and not mask[0, -1].any() and (masked[mask] == 20).all()
    cls, features = model.backbone(masked)
    logits = model.token_head(features, model.backbone.embedding.weight)
    everywhere = torch.nn.functional.cross_entropy(logits.flatten(0, 3), tokens.flatten(), reduction="none")
    expected = everywhere[mask.flatten()].mean()
    first, second = model.projection_head(cls).chunk(2)
    contrast = contrastive.info_nce(first, second, 0.3)
    assert measures["mask_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert measures["contrastive_loss"].item() == pytest.approx(0.3 * contrast.item(), rel=1e-5)
    assert loss.item() == measures["loss"] == pytest.approx((expected + 0.5 * 0.3 * contrast).item(), rel=1e-5)
    assert measures["mask_accuracy"].item() == pytest.approx((logits.argmax(-1) == tokens)[mask].float().mean().item())


def test_without_the_contrastive_loss_the_projection_head_stays_where_it_started(tmp_path):
    store = random_store(tmp_path / "s", 12)
    for alpha in (0.0, 1.0):
        config = tiny(alpha=alpha, log_every=1, out=str(tmp_path / "run"))
        before = dict(build(config, store).named_parameters())
        moved = {name for name, p in train(config, store).named_parameters() if not torch.equal(p, before[name])}
        rest = {name for name in before if not name.startswith("projection_head.")}
        assert moved == (before.keys() if alpha else rest)
        for m in read_metrics(tmp_path / "run"):
            if "loss" in m:
                assert (m["contrastive_loss"] > 0) == (m["loss"] > m["mask_loss"]) == bool(alpha)


def test_micro_batches_add_up_to_the_mean_of_their_gradients():
    config = tiny()
    processes.seed_all(0)
    model = Vimpac(config.transformer(16, 4, 4), 16, 2)
    micro_batches = torch.randint(16, (2, 4, 2, 5, 4, 4))
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(processes.one_seed(0, 3))
    means = [pretrain.losses(twin, config, clips, 16, generator) for clips in micro_batches]
    (sum(loss for loss, _ in means) / 2).backward()
    with recorded_gradients() as found:
        optimizer = runs.Optimizer(model, config, 6, (0.9, 0.98))
        measures, lr = pretrain.update(model, config, list(micro_batches), 16, optimizer, torch.float32, step=3)
    assert_same_gradients(found, [{name: p.grad for name, p in twin.named_parameters()}])
    for name in measures:
        assert measures[name].item() == pytest.approx(sum(m[name].item() for _, m in means) / 2, rel=1e-5)
    assert lr == runs.learning_rate(3, 6, config.lr, 0.1)


# ---------------------------------------------------------------- what is drawn at random


def test_masks_and_dropout_draw_other_numbers_and_other_ones_each_step(monkeypatch):
    """A generator of the masks with the seed of dropout's would give rank 0 the same numbers for both."""
    config = tiny()
    model = Vimpac(config.transformer(16, 4, 4), 16, 2)
    optimizer, drawn = runs.Optimizer(model, config, 6, (0.9, 0.98)), []

    def losses(model, config, clips, vocab_size, generator):
        drawn.extend((torch.rand(4).tolist(), torch.rand(4, generator=generator).tolist()))
        return sum(p.sum() for p in model.parameters()), {"loss": torch.zeros(())}
    monkeypatch.setattr(pretrain, "losses", losses)
    for step in (0, 1, 1):
        pretrain.update(model, config, [None], 16, optimizer, torch.float32, step)
    assert drawn[2:4] == drawn[4:6]
    assert len({number for numbers in drawn[:4] for number in numbers}) == 16


def what_is_hidden(config, model, steps, videos=16):
    """Updates on random tokens of a large vocabulary -> the clips, inputs and places to predict of all steps, each with
    a row a clip."""
    seen = []
    hook = model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs))
    optimizer, found = runs.Optimizer(model, config, steps, (0.9, 0.98)), []
    for step in range(steps):
        clips = torch.randint(8192, (videos, 2, 5, 8, 8))
        pretrain.update(model, config, [clips], 8192, optimizer, torch.float32, step)
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
    config = tiny(noise=True, blocks=1)
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
    config = tiny(mask="iid", noise=True, mask_ratio=0.3)
    model = Vimpac(config.transformer(8192, 8, 8), 16, 2)
    tokens, inputs, mask = what_is_hidden(config, model, 1)
    assert mask.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert all(kinds(*clip) == {"MASK", "left", "random"} for clip in zip(tokens, inputs, mask))
    left, replaced = (inputs == tokens)[mask].float().mean(), (inputs < 8192)[mask].float().mean()
    assert left.item() == pytest.approx(0.1, abs=0.03) and replaced.item() == pytest.approx(0.2, abs=0.04)
    done = call(pretrain, *flags(TINY), "--mask", "iid", "--noise", "--steps", 2, "--out", "runs/iid", place=workplace)
    assert done.returncode == 0 and "iid masks, on" in done.stdout and "mask accuracy" in done.stdout


# ---------------------------------------------------------------- several processes

SHARED = {"blocks": dict(noise=True), "accumulated": dict(accumulate=2, noise=True),
          "iid": dict(mask="iid", noise=True, alpha=0.5), "masks alone": dict(alpha=0.0)}


def short_runs(place):
    """A run of three steps in each setting, on videos of which some are shorter than a clip
    -> {setting: (each step's gradients, metrics, running statistics)}.

    Without dropout, which each process draws for itself. The first weights are large: with the usual ones CLS is almost
    the same in all clips, and a batch norm enlarges its rounding. The learning rate is low: Adam enlarges the rounding
    of gradients that are nearly 0, and at a usual one the later steps would start from weights that differ by more.
    """
    store, found, rank = data.TokenStore(place / "s"), {}, processes.rank_and_world()
    for name, changes in SHARED.items():
        config = tiny(steps=3, batch=8, lr=1e-6, dropout=0.0, log_every=1, precision="fp32",
                      out=str(place / f"{name} of {rank[1]}"), **changes)
        with recorded_gradients() as gradients:
            model = train(config, store, scale=10.0)
        statistics = {key: value for key, value in model.state_dict().items() if "running" in key}
        found[name] = gradients, read_metrics(config.out) if rank[0] == 0 else None, statistics
    return found


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory, in_two_processes):
    """What one process finds, and each of two."""
    place = tmp_path_factory.mktemp("shared")
    random_store(place / "s", 60)
    return short_runs(place), *in_two_processes(short_runs, place)


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_give_what_one_gives(one_and_two, name):
    """Losses, gradients and the batch norm's statistics, with noise and PAD, and so all that follows from them."""
    one, two, other = (found[name] for found in one_and_two)
    assert_same_gradients(one[0], two[0])
    for a, b in zip(two[0], other[0]):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert len(one[1]) == len(two[1]) == 5  # held-out videos are measured before and after
    for a, b in zip(one[1], two[1]):
        assert {key: b[key] for key in a if key != "videos_per_second"} == pytest.approx(
            {key: a[key] for key in a if key != "videos_per_second"}, rel=1e-5, abs=2e-6)
    for key, value in one[2].items():
        assert torch.allclose(value, two[2][key], rtol=1e-4, atol=1e-4), key


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
        measures, _ = pretrain.update(model, config, [clips], 8192, optimizer, precision, step)
    torch.cuda.set_sync_debug_mode("default")
    assert measures["mask_loss"].item() == pytest.approx(9, abs=1)


# ---------------------------------------------------------------- what is refused


def test_tokens_of_another_rate_are_not_taken_for_those_asked_for(workplace):
    done = call(pretrain, "--fps", 4, *flags(TINY), place=workplace)
    assert done.returncode == 2 and "fps 8.0, not 4.0" in done.stderr


@pytest.mark.parametrize("argv, said", [
    (["--heads", "3"], "3 heads"), (["--layout", "W,H"], "T,H|W"), (["--videos", "nowhere"], "nowhere"),
    (["--data", "nowhere"], "nowhere"), (["--mask-ratio", "15"], "between 0 and 1"), (["--batch", "0"], "--batch"),
    (["--init", "last.pt", "--out", "."], "folder of its own"), (["--frame-size", "60"], "multiple of 8"),
    (["--min-stride", "3", "--max-stride", "2"], "the smaller first"), (["--init", "none.pt"], "none.pt"),
    (["--data", "a", "--videos", "b"], "one of them"), (["--held-out", "-1"], "--held-out")])
def test_wrong_values_end_with_one_line(tmp_path, argv, said):
    done = call(pretrain, *argv, place=tmp_path)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_batch_that_the_micro_batches_cannot_share_is_refused(workplace):
    done = call(pretrain, *flags(TINY), "--batch", 6, "--accumulate", 4, "--out", "runs/odd", place=workplace)
    assert done.returncode == 2 and "--batch 6: it must be a multiple of 4" in done.stderr
    done = call(pretrain, *flags(TINY), "--batch", 999, "--steps", 1, "--out", "runs/all", place=workplace)
    assert done.returncode == 0 and "--batch 999 is more than the 22 videos: using 22" in done.stdout
