import csv
import json
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
import predict
import pretrain
from plumbing import processes
from plumbing.cli import UserError
from plumbing.runs import read_metrics
from prepare import pick_labels
from transformer import TransformerConfig, VideoTransformer, load_backbone, resize_table

FAST = dict(steps=4, batch=4, log_every=2, save_every=2, clips=2, device="cpu")
CPU = torch.device("cpu")


def config(out, **changes):
    settings = finetune.Config(**{"out": str(out), "precision": "fp32", "fps": 2.0, **changes})
    settings.micro_batch = settings.micro_batch or settings.batch
    return settings


def train(settings, model, store):
    finetune.train(settings, model, store, "label", CPU, {"fingerprint": "f"})


def small(classes, dropout=0.0, scale=1.0):
    """A classifier of clips of 3 x 2 x 2 tokens, always with the same weights.

    scale: of the backbone's weights.
    """
    processes.seed_all(0)
    shape = TransformerConfig(1, 16, 2, 8, 32, 3, 2, 2, 16, dropout=dropout)
    model = finetune.Classifier(VideoTransformer(shape), classes)
    for p in model.backbone.parameters():
        p.data *= scale if p.dim() > 1 else 1
    return model


# ---------------------------------------------------------------- the command


def test_the_default_command_fine_tunes_the_toy_model_on_motion(workplace):
    done = run(workplace, *flags(FAST), script="finetune.py")
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("top-1 ") and last.endswith("(6 videos x 2 views)")
    assert "top-5" not in last  # of four classes
    out = workplace / "runs/finetune-motion"
    assert {"last.pt", "best.pt", "metrics.jsonl", "confusion.png", "curves.png", "results.json",
            "predictions.csv"} <= {path.name for path in out.iterdir()}
    again = call(finetune, "--checkpoint", out / "best.pt", "--eval-only", "--clips", 2,
                 "--device", "cpu", place=workplace)
    assert again.stdout.strip().splitlines()[-1] == last
    twice = call(finetune, *flags(FAST), place=workplace)
    assert twice.returncode == 2 and "--out runs/finetune-motion-2" in twice.stderr


def test_labels_from_scratch_and_another_split(workplace):
    done = call(finetune, *flags(FAST), "--labels", "shape", "--from-scratch",
                "--eval-split", "val", place=workplace)
    assert done.returncode == 0 and "(8 videos x 2 views)" in done.stdout, done.stderr
    assert (workplace / "runs/finetune-shape-scratch/last.pt").is_file()


@pytest.mark.parametrize("argv, message", [
    (["--labels", "smell"], "colour, motion, scene, shape"), (["--data", "nowhere"], "nowhere"),
    (["--checkpoint", "none.pt"], "none.pt"), (["--eval-only"], "no classifier"),
    (["--fps", "-1"], "--fps"), (["--batch", "0"], "--batch"), (["--few", "1"], "--num-labels"),
    (["--num-labels", "-1"], "--num-labels"),
    (["--from-scratch", "--eval-only"], "nothing to test"),
    (["--clips", "0"], "--clips"), (["--checkpoint", "datasets/toy/tokenizer.pt"], "tokenizer.pt")])
def test_a_wrong_value_ends_with_one_line(workplace, argv, message):
    done = call(finetune, *argv, "--device", "cpu", "--out", "runs/refused", place=workplace)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list((workplace / "runs").glob("refused/*"))


def test_a_store_of_another_tokenizer_is_refused(workplace, tmp_path):
    for split in ("train", "test"):
        random_store(tmp_path / split, 4)
    done = call(finetune, "--data", tmp_path, "--device", "cpu", "--out", tmp_path / "run",
                place=workplace)
    assert done.returncode == 2
    assert "holds 16 codes, the model of runs/toy/last.pt has 256" in done.stderr


def test_training_and_test_videos_of_two_tokenizers_are_refused(workplace, tmp_path):
    for split in ("train", "test"):
        random_store(tmp_path / split, 4, fingerprint=split)
    done = call(finetune, "--data", tmp_path, "--device", "cpu", "--out", tmp_path / "run",
                place=workplace)
    assert done.returncode == 2 and "fingerprint" in done.stderr


# ---------------------------------------------------------------- labelled folders


@pytest.fixture
def labelled(tmp_path, write_video, workplace):
    """Folders of two classes, of brighter and darker videos, and the toy run's command."""
    for kind, first in (("bright", 200), ("dark", 20)):
        for i in range(10):
            write_video(tmp_path / f"own/{kind}/{i}.mp4", [first + i] * 24)
    return ["--videos", tmp_path / "own", "--checkpoint", workplace / "runs/toy/last.pt",
            "--data", tmp_path / "tokens", "--device", "cpu", "--clips", 1]


def test_from_labelled_folders_to_accuracy_with_one_command(labelled, tmp_path):
    """A fifth of each class is tested on. Tokens are like those of the pre-training."""
    done = call(finetune, *labelled, "--steps", 30, "--out", "run", place=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "testing on 4 of its videos" in done.stdout
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["per_class"].keys() == {"bright", "dark"} and results["videos"] == 4
    assert results["top_1"] == 1 and results["settings"]["fps"] == pytest.approx(8 / 3)
    rows = list(csv.DictReader((tmp_path / "run/predictions.csv").open()))
    assert len(rows) == 4 and all(row["label"] == row["prediction"] for row in rows)
    assert all(row["video"].startswith(row["label"]) for row in rows)
    assert all(float(row["bright"]) + float(row["dark"]) == pytest.approx(1) for row in rows)
    train = data.TokenStore(tmp_path / "tokens/train")
    assert (train.header["fps"], train.header["size"], len(train)) == (8, 64, 16)
    again = call(finetune, *labelled, "--freeze-backbone", "--out", "probe", place=tmp_path)
    assert "tokenised" not in again.stdout and "top-1 100.0%" in again.stdout, again.stderr


def test_videos_to_validate_and_test_on_may_be_given(labelled, tmp_path):
    """The best checkpoint on val is tested."""
    for split, numbers in (("train", range(6)), ("val", (6, 7)), ("test", (8, 9))):
        lines = [f"{kind}/{i}.mp4 {kind}\n" for kind in ("bright", "dark") for i in numbers]
        (tmp_path / f"own/{split}.txt").write_text("".join(lines))
    done = call(finetune, *labelled, "--steps", 30, "--val-every", 10, "--out", "run",
                place=tmp_path)
    assert done.returncode == 0 and "no test split" not in done.stdout, done.stderr
    best = torch.load(tmp_path / "run/best.pt")
    values = {m["step"]: m["val_accuracy"] for m in read_metrics(tmp_path / "run")
              if "val_accuracy" in m}
    assert list(values) == [10, 20, 30] and values[best["step"]] == max(values.values())
    assert f"best.pt, the best on the validation videos, of step {best['step']}" in done.stdout


def test_videos_of_a_test_list_are_not_pretrained_on(labelled, tmp_path):
    (tmp_path / "own/test.txt").write_text("bright/3.mp4 bright\n")
    done = call(pretrain, "--videos", "own", "--out", "run", "--steps", 1, "--tokenizer-steps", 2,
                "--device", "cpu", place=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "leaving out the 1 videos of its test split" in done.stdout
    names = data.TokenStore(tmp_path / "run/tokens/pretrain").names()
    assert len(names) == 19 and b"bright/3.mp4" not in names


# ---------------------------------------------------------------- learning


def store_of_two_kinds(path, count=60):
    """Videos of class 0 stand still, those of class 1 change from frame to frame.

    A single frame does not tell the class.
    """
    random, videos = np.random.default_rng(0), []
    for i in range(count):
        tokens = random.integers(4, size=(1, 9, 2, 2))
        videos.append((tokens if i % 2 else tokens[:, [0] * 9], {"label": i % 2}))
    return write_store(path, videos, fps=2)


def test_it_learns_what_takes_several_frames(tmp_path):
    """Measured on videos that it was not trained on."""
    store = store_of_two_kinds(tmp_path / "s", 160)
    settings = config(tmp_path / "run", steps=120, batch=20, lr=1e-2, clips=3, dropout=0.0,
                      num_labels=120)
    model, truth = small(2, scale=5.0), torch.tensor(store.labels("label"))
    p = finetune.evaluate(model, store, settings, CPU)
    assert torch.equal(p, torch.full((160, 2), 0.5))
    train(settings, model, store)
    p = finetune.evaluate(model, store, settings, CPU)
    test = np.setdiff1d(np.arange(160), data.few_labels(truth, 120, settings.seed))
    correct = (p.argmax(dim=1) == truth)[test].float()
    assert len(correct) == 40 and correct.mean() > 0.95


def test_probabilities_are_averaged_over_clips_and_views(tmp_path):
    random = np.random.default_rng(0)
    views = [[16, "center", False], [16, "center", True]]
    videos = [(random.integers(16, size=(2, 9, 2, 2)), {"label": 0}) for _ in range(5)]
    store = write_store(tmp_path / "s", videos, fps=2, views=views)
    model = small(3, dropout=0.5, scale=10.0).eval()
    torch.nn.init.normal_(model.classifier.weight, std=0.2)
    settings = config(tmp_path / "run", fps=1.0, clips=4)
    p = finetune.evaluate(model.train(), store, settings, CPU)
    for video in range(5):
        clips = [store.cut(video, start, 3, 2, view) for view in (0, 1) for start in (0, 1, 2, 4)]
        each = model(torch.from_numpy(np.stack(clips))).softmax(dim=-1)
        assert each.std(dim=0).max() > 1e-3  # the clips differ
        assert torch.allclose(p[video], each.mean(dim=0), atol=1e-6)


def test_tokens_beyond_a_videos_end_are_not_attended_to_in_the_test_either(tmp_path):
    videos = [(np.random.default_rng(i).integers(16, size=(1, i + 1, 2, 2)), {"label": 0})
              for i in range(2)]  # shorter than a clip of three frames
    store, model = write_store(tmp_path / "s", videos, fps=2), small(3, scale=10.0)
    torch.nn.init.normal_(model.classifier.weight, std=0.2)
    p = finetune.evaluate(model, store, config(tmp_path / "run", fps=2.0, clips=1), CPU)
    clips = torch.from_numpy(np.stack([store.cut(i, 0, 3, 1) for i in range(2)]))
    attended, right = (model(clips, has_pad).softmax(dim=-1) for has_pad in (False, True))
    assert torch.allclose(p, right, atol=1e-6) and not torch.allclose(p, attended, atol=1e-3)
    alone = predict.classify(model, store.tokens(0)[None], 1, 1, "fp32")
    assert torch.allclose(alone, right[:1], atol=1e-6)


def test_num_labels_takes_videos_of_all_classes(tmp_path, monkeypatch):
    store, items = store_of_two_kinds(tmp_path / "s"), []
    getitem = data.RandomClips.__getitem__
    monkeypatch.setattr(data.RandomClips, "__getitem__",
                        lambda clips, item: items.append(item) or getitem(clips, item))
    settings = config(tmp_path / "run", epochs=3.0, batch=5, num_labels=10, lr=1e-3)
    train(settings, small(2), store)
    videos = [video for video, _ in items]
    assert len(videos) == 30 and len(set(videos)) == 10  # three epochs
    assert sum(video % 2 for video in set(videos)) == 5


def test_num_labels_from_the_command_line(workplace):
    done = call(finetune, *flags(FAST | {"batch": 16}), "--num-labels", 8, "--out", "runs/few",
                place=workplace)
    assert done.returncode == 0, done.stderr
    # a step takes all eight of them
    epochs = [m["epoch"] for m in read_metrics(workplace / "runs/few") if "epoch" in m]
    assert epochs == [2, 4]


def test_tokens_beyond_a_videos_end_are_not_attended_to(tmp_path):
    """The model is told whether there is PAD: searching for it would wait for a GPU."""
    store, calls = random_store(tmp_path / "s", 12, side=2), []
    model = small(3)
    model.register_forward_pre_hook(
        lambda model, args: calls.append(((args[0] == 17).any().item(), args[1])))
    train(config(tmp_path / "run", batch=1, steps=12, lr=1e-3), model, store)
    assert all(has_pad == told for has_pad, told in calls)
    assert {has_pad for has_pad, _ in calls} == {True, False}


# ---------------------------------------------------------------- resuming; processes


def test_resuming_equals_no_interruption(tmp_path):
    store, results = random_store(tmp_path / "s", 12, side=2), {}
    for name in ("whole", "broken"):
        settings = config(tmp_path / name, steps=6, batch=4, log_every=2, save_every=2, fps=4.0,
                          lr=1e-3)
        if name == "broken":
            with interrupted(step=5), pytest.raises(KeyboardInterrupt):
                train(settings, small(3, dropout=0.1), store)
            settings.resume = True
        model = small(3, dropout=0.1)
        train(settings, model, store)
        metrics = read_metrics(settings.out)
        for m in metrics:
            m.pop("videos_per_second")
        results[name] = model.state_dict(), metrics
    whole, broken = results.values()
    assert all(torch.equal(a, b) for a, b in zip(whole[0].values(), broken[0].values()))
    assert whole[1] == broken[1] and len(whole[1]) == 3


def short_run(folder, micro_batch=6):
    """Three steps on videos of which some are shorter than a clip.

    -> gradients of each step, losses, probabilities. Without dropout, which each process draws for
    itself, and with a low learning rate: Adam enlarges rounding errors of gradients near 0.
    """
    store, (rank, world) = data.TokenStore(folder / "s"), processes.rank_and_world()
    settings = config(folder / f"{world} {micro_batch}", steps=3, batch=6, log_every=1, lr=1e-6,
                      fps=4.0, clips=2, micro_batch=micro_batch)
    model = small(3, scale=10.0)
    torch.nn.init.normal_(model.classifier.weight, std=0.2)
    with recorded_gradients() as gradients:
        train(settings, model, store)
    p = finetune.evaluate(model, store, settings, CPU)
    losses = [m["loss"] for m in read_metrics(settings.out)] if rank == 0 else None
    return gradients, losses, p


@pytest.mark.parametrize("micro_batch", [3, 2])
def test_two_processes_and_micro_batches_equal_one_pass(tmp_path, in_two_processes, micro_batch):
    """Losses, gradients, and probabilities of an odd number of videos on both processes.

    A micro-batch is all of a process's three videos, or two and then one.
    """
    random_store(tmp_path / "s", 13, side=2)
    one = short_run(tmp_path)
    two, other = in_two_processes(short_run, tmp_path, micro_batch)
    assert_same_gradients(one[0], short_run(tmp_path, 2 * micro_batch - 1)[0])
    assert_same_gradients(one[0], two[0])
    assert one[1] == pytest.approx(two[1], rel=1e-5, abs=2e-6)
    for p in (two[2], other[2]):
        assert torch.allclose(p, one[2], atol=1e-5)
        assert p.sum(dim=1).tolist() == pytest.approx([1] * 13)
    assert one[2].std(dim=0).max() > 1e-3


# ---------------------------------------------------------------- another size, other labels


def test_positions_are_interpolated_to_another_clip_size(tmp_path):
    """Larger frames than in pre-training, as in the paper: here 4 x 4 tokens after 2 x 2."""
    random_store(tmp_path / "pretraining", 4, side=2)
    argv = ["--data", "pretraining", "--out", "runs/small", "--steps", 1, "--batch", 4,
            "--device", "cpu"]
    done = call(pretrain, *argv, place=tmp_path)
    assert done.returncode == 2
    assert "holds frames of 16 pixels: give --frame-size" in done.stderr
    done = call(pretrain, *argv, "--frame-size", 16, place=tmp_path)
    assert done.returncode == 0, done.stderr
    for split in ("train", "test"):
        random_store(tmp_path / "large" / split, 6, side=4)
    done = call(finetune, "--data", "large", "--checkpoint", "runs/small/last.pt", "--frames", 10,
                *flags(FAST), place=tmp_path)
    assert done.returncode == 0 and "(6 videos x 2 views)" in done.stdout, done.stderr
    assert "interpolated the positions from 5 x 2 x 2 tokens a clip to 10 x 4 x 4" in done.stdout
    shape = torch.load(tmp_path / "runs/finetune-motion/last.pt")["transformer"]
    assert (shape["height"], shape["width"], shape["frames"]) == (4, 4, 10)
    before, after = (load_backbone(tmp_path / f"runs/{name}/last.pt").time
                     for name in ("small", "finetune-motion"))
    assert torch.allclose(after, resize_table(before, 10), atol=2e-3)  # after four small steps


def test_the_only_label_set_is_used_unless_another_is_named(tmp_path):
    videos = [(np.zeros((1, 4, 2, 2)), {"verb": i}) for i in range(2)]
    store = write_store(tmp_path / "train", videos)
    for default in ("label", "motion"):
        assert pick_labels({"train": store}, default)[0] == "verb"
    with pytest.raises(UserError, match="no labels 'verbs': it has verb"):
        pick_labels({"train": store}, "verbs")


def test_test_videos_that_are_training_videos_are_counted(workplace, tmp_path):
    for split in ("test", "train"):
        shutil.copytree(workplace / "datasets/toy/tokens/test", tmp_path / "tokens" / split)
    settings = {**FAST, "data": tmp_path / "tokens", "out": tmp_path / "run"}
    done = call(finetune, *flags(settings), place=workplace)
    assert done.returncode == 0, done.stderr
    assert "6 of the 6 test videos are training videos" in done.stdout
    done = call(finetune, *flags({**FAST, "out": tmp_path / "other"}), place=workplace)
    assert "are training videos" not in done.stdout


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path):
    store, model = store_of_two_kinds(tmp_path / "s"), small(2)
    model.classifier.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match="not finite in"):
        train(config(tmp_path / "run", steps=20, batch=4, log_every=1, lr=1e-3), model, store)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert len(read_metrics(tmp_path / "run")) >= 9
