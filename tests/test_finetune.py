import shutil

import numpy as np
import pytest
import torch
from conftest import (
    assert_same_gradients,
    call,
    flags,
    interrupted,
    random_store,
    recorded_gradients,
    run,
    write_store,
)

import data
import finetune
import pretrain
from plumbing import processes
from plumbing.cli import UserError
from plumbing.runs import read_metrics
from transformer import TransformerConfig, VideoTransformer, load_backbone, resize_table

FAST = dict(steps=4, batch=4, log_every=2, save_every=2, clips=2, device="cpu")
CPU = torch.device("cpu")


def small(classes, dropout=0.0, scale=1.0):
    """A classifier of clips of 3 x 2 x 2 tokens, always with the same weights. scale: of its backbone's."""
    processes.seed_all(0)
    shape = TransformerConfig(1, 16, 2, 8, 32, 3, 2, 2, 16, dropout=dropout)
    model = finetune.Classifier(VideoTransformer(shape), classes)
    for p in model.backbone.parameters():
        p.data *= scale if p.dim() > 1 else 1
    return model


# ---------------------------------------------------------------- the command


def test_no_argument_fine_tunes_the_toy_model_on_motion(workplace):
    done = run(workplace, *flags(FAST), script="finetune.py")
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("top-1 ") and last.endswith("(6 videos x 2 views)") and "top-5 100.0%" in last
    out = workplace / "runs/finetune-motion"
    assert {"last.pt", "metrics.jsonl", "confusion.png", "curves.png"} <= {path.name for path in out.iterdir()}
    again = call(finetune, "--checkpoint", out / "last.pt", "--eval-only", "--clips", 2, "--device", "cpu",
                 place=workplace)
    assert again.stdout.strip().splitlines()[-1] == last


def test_labels_from_scratch_and_another_split(workplace):
    done = call(finetune, *flags(FAST), "--labels", "appearance", "--from-scratch", "--eval-split", "val",
                place=workplace)
    assert done.returncode == 0 and "(8 videos x 2 views)" in done.stdout
    assert (workplace / "runs/finetune-appearance-scratch/last.pt").is_file()


@pytest.mark.parametrize("argv, said", [
    (["--labels", "smell"], "appearance, direction, motion"), (["--data", "nowhere"], "nowhere"),
    (["--checkpoint", "none.pt"], "none.pt"), (["--eval-only"], "no classifier"), (["--fps", "0"], "--fps"),
    (["--batch", "0"], "--batch"), (["--few", "-1"], "--few"),
    (["--from-scratch", "--eval-only"], "nothing to test"), (["--clips", "0"], "--clips"),
    (["--checkpoint", "datasets/toy/tokenizer.pt"], "tokenizer.pt")])
def test_what_is_refused_ends_with_one_line(workplace, argv, said):
    done = call(finetune, *argv, "--device", "cpu", "--out", "runs/refused", place=workplace)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (workplace / "runs/refused").exists()


def test_a_store_of_another_tokenizer_is_refused(workplace, tmp_path):
    for split in ("train", "test"):
        random_store(tmp_path / split, 4)
    done = call(finetune, "--data", tmp_path, "--device", "cpu", place=workplace)
    assert done.returncode == 2 and "holds 16 codes, the model of runs/toy/last.pt knows 256" in done.stderr


def test_training_and_test_videos_of_two_tokenizers_are_refused(workplace, tmp_path):
    for split in ("train", "test"):
        random_store(tmp_path / split, 4, fingerprint=split)
    done = call(finetune, "--data", tmp_path, "--device", "cpu", place=workplace)
    assert done.returncode == 2 and "their fingerprint is 'train' and 'test'" in done.stderr


# ---------------------------------------------------------------- learning


def store_of_two_kinds(path, count=60):
    """Videos of class 0 stand still, those of class 1 change from frame to frame: any single frame is alike."""
    random, videos = np.random.default_rng(0), []
    for i in range(count):
        tokens = random.integers(4, size=(1, 9, 2, 2))
        videos.append((tokens if i % 2 else tokens[:, [0] * 9], {"label": i % 2}))
    return write_store(path, videos, fps=2)


def test_it_learns_what_takes_several_frames(tmp_path):
    """Measured on videos that it has not seen."""
    store = store_of_two_kinds(tmp_path / "s", 160)
    config = finetune.Config(out=str(tmp_path / "run"), steps=120, batch=20, lr=1e-2, fps=2.0, clips=3, dropout=0.0,
                             few=120, precision="fp32")
    model, truth = small(2, scale=5.0), torch.tensor(store.labels("label"))
    assert torch.equal(finetune.evaluate(model, store, config, CPU, torch.float32), torch.full((160, 2), 0.5))
    finetune.train(config, model, store, "label", CPU)
    p = finetune.evaluate(model, store, config, CPU, torch.float32)
    unseen = np.setdiff1d(np.arange(160), data.few_labels(truth, 120, config.seed))
    right = (p.argmax(dim=1) == truth)[unseen].float()
    assert len(right) == 40 and right.mean() > 0.95


def test_probabilities_are_averaged_over_clips_and_views(tmp_path):
    random = np.random.default_rng(0)
    views = [[16, "center", False], [16, "center", True]]
    store = write_store(tmp_path / "s", [(random.integers(16, size=(2, 9, 2, 2)), {"label": 0}) for _ in range(5)],
                        fps=2, views=views)
    config = finetune.Config(out=str(tmp_path / "run"), fps=1.0, clips=4)
    model = small(3, dropout=0.5, scale=10.0).eval()
    torch.nn.init.normal_(model.classifier.weight, std=0.2)
    p = finetune.evaluate(model.train(), store, config, CPU, torch.float32)
    for video in range(5):
        clips = [store.cut(video, start, 3, 2, view) for view in (0, 1) for start in (0, 1, 2, 4)]
        each = model(torch.from_numpy(np.stack(clips))).softmax(dim=-1)
        assert each.std(dim=0).max() > 1e-3  # the clips differ
        assert torch.allclose(p[video], each.mean(dim=0), atol=1e-6)


def test_few_labels_train_on_so_many_videos_of_all_classes(tmp_path, monkeypatch):
    store, drawn, cut = store_of_two_kinds(tmp_path / "s"), [], data.RandomClips.__getitem__
    monkeypatch.setattr(data.RandomClips, "__getitem__", lambda clips, item: drawn.append(item) or cut(clips, item))
    config = finetune.Config(out=str(tmp_path / "run"), epochs=3.0, batch=5, few=10, fps=2.0)
    finetune.train(config, small(2), store, "label", CPU)
    videos = [video for video, _ in drawn]
    assert len(videos) == 30 and len(set(videos)) == 10  # three epochs
    assert sum(video % 2 for video in set(videos)) == 5


def test_few_labels_from_the_command_line(workplace):
    done = call(finetune, *flags(FAST | {"batch": 16}), "--few", 8, "--out", "runs/few", place=workplace)
    assert done.returncode == 0, done.stderr
    assert [m["epoch"] for m in read_metrics(workplace / "runs/few")] == [2, 4]  # a step is all eight of them


def test_what_lies_beyond_a_videos_end_is_not_attended_to(tmp_path):
    """The model is told of PAD where there is any, and only there: looking for it would wait for a GPU."""
    store, told = random_store(tmp_path / "s", 12, side=2), []
    model = small(3)
    model.register_forward_pre_hook(lambda model, inputs: told.append(((inputs[0] == 17).any().item(), inputs[1])))
    finetune.train(finetune.Config(out=str(tmp_path / "run"), micro_batch=1,
                                   **{**FAST, "batch": 1, "steps": 12}, fps=2.0), model, store, "label", CPU)
    assert all(padded == said for padded, said in told) and {padded for padded, _ in told} == {True, False}


# ---------------------------------------------------------------- going on, and sharing the work


def test_resuming_equals_no_interruption(tmp_path):
    store, result = random_store(tmp_path / "s", 12, side=2), {}
    for name in ("whole", "broken"):
        config = finetune.Config(out=str(tmp_path / name), **{**FAST, "steps": 6}, fps=4.0)
        if name == "broken":
            with interrupted(step=5), pytest.raises(KeyboardInterrupt):
                finetune.train(config, small(3, dropout=0.1), store, "label", CPU)
            config.resume = True
        model = small(3, dropout=0.1)
        finetune.train(config, model, store, "label", CPU)
        metrics = [{k: v for k, v in m.items() if k != "videos_per_second"} for m in read_metrics(config.out)]
        result[name] = model.state_dict(), metrics
    assert all(torch.equal(a, b) for a, b in zip(result["whole"][0].values(), result["broken"][0].values()))
    assert result["whole"][1] == result["broken"][1] and len(result["whole"][1]) == 3


def short_run(place, micro_batch=6):
    """Three steps on videos of which some are shorter than a clip -> each step's gradients, metrics and probabilities.

    Without dropout, which each process draws for itself; with large weights and a low learning rate, as Adam enlarges
    the rounding of gradients that are nearly 0.
    """
    store, (rank, world) = data.TokenStore(place / "s"), processes.rank_and_world()
    config = finetune.Config(out=str(place / f"of {world}"), steps=3, batch=6, log_every=1, lr=1e-6, fps=4.0, clips=2,
                             precision="fp32", micro_batch=micro_batch)
    model = small(3, scale=10.0)
    torch.nn.init.normal_(model.classifier.weight, std=0.2)
    with recorded_gradients() as gradients:
        finetune.train(config, model, store, "label", CPU)
    p = finetune.evaluate(model, store, config, CPU, torch.float32)
    return gradients, [m["loss"] for m in read_metrics(config.out)] if rank == 0 else None, p


@pytest.mark.parametrize("micro_batch", [3, 2])
def test_two_processes_and_micro_batches_give_what_one_step_gives(tmp_path, in_two_processes, micro_batch):
    """Losses, gradients, and the probabilities of every video, whose number is odd, on both. A micro-batch is all of a
    process's three videos, or two and then one."""
    random_store(tmp_path / "s", 13, side=2)
    one, (two, other) = short_run(tmp_path), in_two_processes(short_run, tmp_path, micro_batch)
    assert_same_gradients(one[0], short_run(tmp_path, 2 * micro_batch)[0])
    assert_same_gradients(one[0], two[0])
    assert one[1] == pytest.approx(two[1], rel=1e-5, abs=2e-6)
    for p in (two[2], other[2]):
        assert torch.allclose(p, one[2], atol=1e-5) and p.sum(dim=1).tolist() == pytest.approx([1] * 13)
    assert one[2].std(dim=0).max() > 1e-3


# ---------------------------------------------------------------- after pre-training at another size


def test_a_clip_size_other_than_the_models_is_interpolated_to(tmp_path):
    """The paper's larger crops at fine-tuning: 2 x 2 tokens a frame in pre-training, here 4 x 4."""
    random_store(tmp_path / "pretraining", 4, side=2)
    asked = ["--data", "pretraining", "--out", "runs/small", "--steps", 1, "--batch", 4, "--device", "cpu"]
    done = call(pretrain, *asked, place=tmp_path)
    assert done.returncode == 2 and "holds frames of 16 pixels: give --frame-size" in done.stderr
    done = call(pretrain, *asked, "--frame-size", 16, place=tmp_path)
    assert done.returncode == 0, done.stderr
    for split in ("train", "test"):
        random_store(tmp_path / "large" / split, 6, side=4)
    done = call(finetune, "--data", "large", "--checkpoint", "runs/small/last.pt", "--frames", 10, *flags(FAST),
                place=tmp_path)
    assert done.returncode == 0 and "(6 videos x 2 views)" in done.stdout and "10 x 4 x 4 tokens a clip" in done.stdout
    assert "interpolated the positions from 5 x 2 x 2 tokens a clip to 10 x 4 x 4" in done.stdout
    shape = torch.load(tmp_path / "runs/finetune-motion/last.pt")["transformer"]
    assert (shape["height"], shape["width"], shape["frames"]) == (4, 4, 10)
    before, after = (load_backbone(tmp_path / f"runs/{run}/last.pt").time for run in ("small", "finetune-motion"))
    assert torch.allclose(after, resize_table(before, 10), atol=2e-3)  # but for four small steps


def test_the_only_labels_are_taken_unless_others_are_asked_for(tmp_path):
    store = write_store(tmp_path / "train", [(np.zeros((1, 4, 2, 2)), {"verb": i}) for i in range(2)])
    for default in ("label", "motion"):
        assert finetune.pick_labels({"train": store}, default)[0] == "verb"
    with pytest.raises(UserError, match="no labels 'verbs': it has verb"):
        finetune.pick_labels({"train": store}, "verbs")


def test_videos_that_are_both_trained_and_tested_on_are_said(workplace, tmp_path):
    shutil.copytree(workplace / "datasets/toy/tokens/test", tmp_path / "tokens/test")
    shutil.copytree(workplace / "datasets/toy/tokens/test", tmp_path / "tokens/train")
    done = call(finetune, *flags({**FAST, "data": tmp_path / "tokens", "out": tmp_path / "run"}), place=workplace)
    assert done.returncode == 0 and "6 of the 6 videos to test on are trained on, too" in done.stdout, done.stderr
    assert "trained on, too" not in call(finetune, *flags({**FAST, "out": tmp_path / "other"}), place=workplace).stdout
