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

import data
import pretrain
import training
from conftest import ROOT, TINY, flags, run
from pretrain import PRESETS, Config, Vimpac
from transformer import load_backbone


def tiny(**changes):
    return Config(**{**PRESETS["toy"], **TINY, "steps": 6, **changes})


def build(config, store):
    training.seed_all(config.seed)
    return Vimpac(config.transformer(store.header["vocab_size"], store.height, store.width), 16, 2)


def test_no_argument_leaves_everything_a_reader_looks_for(workplace):
    out = workplace / "runs/toy"
    metrics = training.read_metrics(out)
    assert {"step", "epoch", "loss", "mask_loss", "mask_accuracy", "contrastive_loss", "lr", "videos_per_second"} \
        <= metrics[1].keys()
    assert [m["step"] for m in metrics if "knn_motion" in m and "knn_appearance" in m] == [0, 3, 5]
    assert json.loads((out / "config.json").read_text())["steps"] == 5
    assert list(out.glob("events.out.tfevents*")) and (out / "curves.png").is_file()
    picture = imageio.imread(out / "fill_in.png")
    assert picture.std() > 10 and len(imageio.mimread(out / "fill_in.gif")) == 5
    last = (workplace / "stdout.txt").read_text()
    assert "mask accuracy" in last and "kNN on motion" in last and "codes used" in last
    assert load_backbone(out / "last.pt").config.dim == 16


def test_the_same_seed_gives_the_same_weights_and_another_does_not(workplace):
    store = data.TokenStore(workplace / "datasets/toy/tokens/pretrain")
    weights = []
    for seed in (0, 0, 1):
        config = tiny(seed=seed, out=str(workplace / "runs/seeds"))
        model = build(config, store)
        pretrain.train(config, model, store, 3, torch.device("cpu"), None)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_resuming_equals_no_interruption(workplace, monkeypatch):
    store = data.TokenStore(workplace / "datasets/toy/tokens/pretrain")
    result = {}
    for name in ("whole", "broken"):
        config = tiny(out=str(workplace / f"runs/{name}"), dropout=0.1)
        if name == "broken":
            rate = training.learning_rate

            def fail(step, *rest):
                if step == 4:  # after the checkpoint of step 3
                    raise KeyboardInterrupt
                return rate(step, *rest)
            with monkeypatch.context() as patch:
                patch.setattr(training, "learning_rate", fail)
                with pytest.raises(KeyboardInterrupt):
                    pretrain.train(config, build(config, store), store, 3, torch.device("cpu"), None)
            config.resume = True
        model = build(config, store)
        pretrain.train(config, model, store, 3, torch.device("cpu"), None)
        result[name] = model.state_dict(), training.read_metrics(config.out)[-1]["loss"]
    assert all(torch.equal(a, b) for a, b in zip(result["whole"][0].values(), result["broken"][0].values()))
    assert result["whole"][1] == result["broken"][1]


def test_the_second_stage_starts_from_the_first_at_another_size(workplace, tmp_path, capsys):
    """Positions and the optimizer's moments are interpolated, the rest is taken over, and the log says so."""
    checkpoint = torch.load(workplace / "runs/toy/last.pt", weights_only=True)
    config = tiny()
    model = Vimpac(config.transformer(256, 16, 16), 16, 2)
    optimizer, scaler = training.make_optimizer(model, 1e-3, 0.05, (0.9, 0.98)), torch.amp.GradScaler(enabled=False)
    assert pretrain.restore(workplace / "runs/toy/last.pt", model, optimizer, scaler) == 5
    said = capsys.readouterr().out
    assert "row positions" in said and "from 8 to 16" in said and "time" not in said
    backbone, weights = model.backbone, checkpoint["model"]
    assert torch.equal(backbone.row, pretrain.resize_table(weights["backbone.row"], 16))
    assert torch.equal(backbone.time, weights["backbone.time"])
    assert torch.equal(backbone.embedding.weight, weights["backbone.embedding.weight"])
    for name, p in (("row", backbone.row), ("time", backbone.time), ("cls", backbone.cls)):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[p][moment].shape == p.shape
            assert optimizer.state[p][moment].abs().max() > 0, name
    other = Vimpac(tiny(dim=24).transformer(256, 8, 8), 16, 2)
    with pytest.raises(ValueError, match="does not fit"):
        pretrain.restore(workplace / "runs/toy/last.pt", other, optimizer, scaler)


def test_both_losses_fall():
    """On pairs of equal clips that repeat one code each, both tasks can be solved."""
    training.seed_all(0)
    config = tiny(mask_ratio=0.3, lr=1e-2)
    model = Vimpac(config.transformer(16, 4, 4), 16, 2)
    optimizer = training.make_optimizer(model, 1e-2, 0.0, (0.9, 0.98))
    clips = torch.arange(8)[:, None, None, None, None].expand(8, 2, 5, 4, 4).contiguous()
    measures = []
    for _ in range(120):
        loss, measured = pretrain.losses(model, config, clips, 16, 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        measures.append(measured)
    mask_loss, accuracy, contrast = measures[-1].tolist()
    assert accuracy > 0.95 and mask_loss < 0.3 and contrast < 0.5 * measures[0][2]


def test_the_loss_is_equation_6_on_masked_tokens_alone(monkeypatch):
    config = tiny(alpha=0.5, gamma=0.3, dropout=0.0)
    training.seed_all(0)
    model = Vimpac(config.transformer(16, 4, 4), 16, 2)
    clips = torch.randint(16, (3, 2, 5, 4, 4))
    clips[0, 0, -1] = 17  # PAD
    tokens = clips.transpose(0, 1).flatten(0, 1)
    training.seed_all(1)
    loss, measures = pretrain.losses(model, config, clips, 16, 4)
    training.seed_all(1)
    hiding = pretrain.draw_mask(config, 6, (5, 4, 4), 4)
    masked, mask = pretrain.apply_mask(config, tokens, hiding, 16)
    assert not mask[0, -1].any() and (masked[mask] == 20).all()
    cls, features = model.backbone(masked)
    logits = model.token_head(features, model.backbone.embedding.weight)
    everywhere = torch.nn.functional.cross_entropy(logits.flatten(0, 3), tokens.flatten(), reduction="none")
    expected = everywhere[mask.flatten()].mean()
    first, second = model.projection_head(cls).chunk(2)
    contrast = pretrain.contrastive.info_nce(first, second, 0.3)
    assert measures[0].item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.item() == pytest.approx((expected + 0.5 * 0.3 * contrast).item(), rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_give_what_one_gives(workplace, accumulate):
    """The same losses and weights over 20 steps, with dropout off; gloo on CPUs, through torchrun.

    To float32 rounding, which Adam enlarges where gradients are nearly 0: so the difference of all weights is measured
    against how far they moved. Exactly 0, but for rounding, is the gradient of a bias before a batch norm: it and the
    running mean that follows it differ freely, without any effect.
    """
    settings = flags(TINY) + ["--steps", 20, "--batch", 8, "--accumulate", accumulate, "--precision", "fp32",
                              "--log-every", 1, "--lr", 5e-4]
    runs = [workplace / f"runs/{n}-processes-{accumulate}" for n in (1, 2)]
    assert run(workplace, *settings, "--out", runs[0]).returncode == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(ROOT / "pretrain.py"), *map(str, settings), "--out", str(runs[1])], cwd=workplace,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = ([m for m in training.read_metrics(out) if "loss" in m] for out in runs)
    for name in ("mask_loss", "mask_accuracy", "contrastive_loss"):
        assert [m[name] for m in one] == pytest.approx([m[name] for m in two], abs=3e-3)
    store = data.TokenStore(workplace / "datasets/toy/tokens/pretrain")
    start = build(tiny(), store).state_dict()
    one, two = (torch.load(out / "last.pt", weights_only=True)["model"] for out in runs)
    free = {"projection_head.hidden.0.bias", "projection_head.norms.0.running_mean"}
    moved, apart = (torch.cat([(a[name] - b[name]).float().flatten() for name in sorted(start.keys() - free)]).norm()
                    for a, b in ((one, start), (one, two)))
    assert apart < 0.05 * moved


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
    while group.poll() is None and len(training.read_metrics(out)) < 8:  # the first checkpoint is that of step 3
        time.sleep(0.05)
    workers = Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    said = group.communicate()[0]
    assert group.returncode == 0, said
    assert (out / "last.old.pt").read_bytes() == b"of an earlier run"
    resumed = int(re.search(r"resumed \S+ at step (\d+) of 100", said)[1])
    assert 3 <= resumed < 100 and resumed % 3 == 0
    assert [m["step"] for m in training.read_metrics(out) if "loss" in m] == list(range(1, 101))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_gpu_step_of_512_clips_waits_for_nothing(precision):
    """131,072 sequences along time, beyond one launch of some kernels; fp16's scaler alone may wait for the GPU."""
    device, config = torch.device("cuda"), Config(preset="small", layers=1)
    model = Vimpac(config.transformer(8192, 16, 16), 2048, 2).to(device)
    optimizer = training.make_optimizer(model, 1e-3, 0.05, (0.9, 0.98))
    scaler = torch.amp.GradScaler("cuda", enabled=precision == torch.float16)
    clips = torch.randint(8192, (256, 2, 5, 16, 16))
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step > 0 and not scaler.is_enabled() else "default")
        measures = pretrain.update(model, config, [clips], 8192, 5, optimizer, scaler, precision, step)
    torch.cuda.set_sync_debug_mode("default")
    assert measures[0].item() == pytest.approx(9, abs=1)


def test_knn_weighs_the_nearest_most():
    features = torch.eye(4)
    labels = torch.tensor([0, 1, 1, 1])
    queries = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2, 0.2, 0.2], [0.1, 1.0, 0.0, 0.0]]), dim=1)
    assert pretrain.knn_accuracy(features, labels, queries, torch.tensor([0, 1]), k=4) == 1.0
    assert pretrain.knn_accuracy(features, labels, queries, torch.tensor([1, 1]), k=4) == 0.5


def test_a_folder_of_any_videos(tmp_path, write_video):
    for i in range(3):
        write_video(tmp_path / f"my videos/v{i}.mp4", range(0, 240, 8 + 4 * i), width=96)
    (tmp_path / "my videos/broken.mp4").write_bytes(b"nothing")
    done = run(tmp_path, "--videos", "my videos", "--out", "runs/mine", "--steps", 3, "--tokenizer-steps", 5,
               *flags(TINY))
    assert done.returncode == 0, done.stderr
    assert "broken.mp4" in done.stdout and "3 videos tokenised, 1 could not be decoded" in done.stdout
    assert {"last.pt", "fill_in.png", "fill_in.gif", "curves.png", "tokenizer.pt"} <= \
        {path.name for path in (tmp_path / "runs/mine").iterdir()}


def test_init_from_the_command_line(workplace):
    """A stage of its own: it starts at step 0 with the weights of another run, or with --resume where it had stopped;
    other files are refused in a line."""
    for steps, said in ((2, "starting from runs/toy/last.pt"), (3, "resumed runs/second/last.pt at step 2 of 3")):
        done = run(workplace, "--init", "runs/toy/last.pt", "--resume", "--steps", steps, "--out", "runs/second",
                   *flags(TINY))
        assert done.returncode == 0 and said in done.stdout
    assert [m["step"] for m in training.read_metrics(workplace / "runs/second")][0] == 0
    for path in ("nowhere.pt", "datasets/toy/tokenizer.pt"):
        done = run(workplace, "--init", path, *flags(TINY))
        assert done.returncode == 2 and path in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_tokens_of_another_rate_are_not_taken_for_those_asked_for(workplace):
    done = run(workplace, "--fps", 4, *flags(TINY))
    assert done.returncode == 2 and "fps 8.0, not 4.0" in done.stderr


@pytest.mark.parametrize("argv, said", [
    (["--heads", "3"], "3 heads"), (["--layout", "W,H"], "T,H|W"), (["--videos", "nowhere"], "nowhere"),
    (["--data", "nowhere"], "nowhere"), (["--mask-ratio", "15"], "between 0 and 1"), (["--gpus", "99"], "99"),
    (["--init", "last.pt", "--out", "."], "folder of its own"), (["--frame-size", "60"], "multiple of 8"),
    (["--noise", "--mask", "iid"], "--noise")])
def test_wrong_values_end_with_one_line(tmp_path, argv, said):
    done = run(tmp_path, *argv)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1
