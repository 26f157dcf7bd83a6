"""Any video file: what a model fills in, and its classes."""
import csv
import os
import re
import shutil

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import call, flags
from test_dalle import released  # noqa: F401 (a fixture)
from test_released import SMALL, released_state

import data
import finetune
import monitor
import pretrain
import probe
import toy
import vqvae
from plumbing import checkpoints

VIDEO = "datasets/toy/videos/{:05d}.mp4"
FINETUNE = dict(steps=3, batch=4, device="cpu", precision="fp32", out="runs/tuned", clips=3)


@pytest.fixture(scope="module")
def tuned(workplace):
    """The folder of a toy world with a fine-tuned model, whose classes depend on the frames."""
    done = call(finetune, *flags(FINETUNE), place=workplace)
    assert done.returncode == 0, done.stderr
    checkpoint = checkpoints.read_checkpoint(workplace / "runs/tuned/last.pt")
    store = data.TokenStore(workplace / "datasets/toy/tokens/test")
    even = data.EvenClips(store, 5, 3, 4)
    clips = torch.from_numpy(np.concatenate([even[i] for i in range(len(store))]))
    cls = finetune.load_backbone(workplace / "runs/tuned/last.pt").eval()(clips)[0].detach()
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    weight *= 2 / cls.std(dim=0).mean()
    checkpoint["model"]["classifier.weight"] = weight
    checkpoint["model"]["classifier.bias"] = -weight @ cls.mean(dim=0)
    torch.save(checkpoint, workplace / "runs/tuned/last.pt")
    return workplace


def likeliest(line):
    """"a.mp4: spin 98.2%, scale 1.8%" -> {"spin": 98.2, "scale": 1.8}"""
    pairs = re.findall(r"([\w-]+) ([\d.]+)%", line.split(": ", 1)[1])
    return {name: float(percent) for name, percent in pairs}


def test_a_file_gets_the_probabilities_of_the_test(tuned):
    """With the checkpoint's tokenizer, frame rate, clips and class names."""
    store = data.TokenStore(tuned / "datasets/toy/tokens/test")
    path = tuned / "runs/tuned/last.pt"
    config = finetune.Config(**flags_of(path))
    model = finetune.Classifier(finetune.load_backbone(path), 4)
    model.classifier.load_state_dict(finetune.load_classifier(path))
    p = finetune.evaluate(model, store, config, torch.device("cpu"))
    videos = [tuned / "datasets/toy" / store.name(i) for i in (0, 3)]
    done = call(finetune, "--predict", *videos, "--checkpoint", path, "--device", "cpu",
                "--precision", "fp32", "--fps", 1, "--clips", 1, "--draw")
    assert done.returncode == 0, done.stderr
    for line, video, expected in zip(done.stdout.splitlines()[::2], videos, p[[0, 3]].tolist()):
        assert line.startswith(f"{video}: ")
        percent = likeliest(line)
        assert list(percent.values()) == sorted(percent.values(), reverse=True)
        expected = {name: 100 * x for name, x in zip(toy.MOTIONS, expected)}
        assert percent == pytest.approx(expected, abs=0.06)
        assert imageio.imread(tuned / f"runs/tuned/predict-videos-{video.stem}.png").std() > 10
    assert (p[0] - p[3]).abs().max() > 0.05  # else any file would do


def test_a_folder_is_classified_into_a_csv_file_without_pictures(tuned, tmp_path):
    for i in (0, 1):
        (tmp_path / "videos" / str(i)).mkdir(parents=True)
        shutil.copy(tuned / VIDEO.format(i), tmp_path / f"videos/{i}/v.mp4")
    done = call(finetune, "--predict", "videos", "--csv", "classes.csv", "--checkpoint",
                tuned / "runs/tuned/last.pt", "--device", "cpu", "--out", "out", place=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [row["video"] for row in rows] == ["videos/0/v.mp4", "videos/1/v.mp4"]
    for row, line in zip(rows, done.stdout.splitlines()):
        percent = likeliest(line)
        assert row["prediction"] == next(iter(percent)) and row.keys() > set(toy.MOTIONS)
        assert 100 * float(row[row["prediction"]]) == pytest.approx(max(percent.values()), abs=0.1)
    assert not (tmp_path / "out").exists()


def test_features_of_a_folder(tuned, tmp_path):
    """Those of the middle of the probe: CLS, and the mean of the token features."""
    shutil.copytree(tuned / "datasets/toy/videos", tmp_path / "videos")
    done = call(pretrain, "--videos", "videos", "--features", "f.npz", "--checkpoint",
                tuned / "runs/toy/last.pt", "--precision", "fp32", "--device", "cpu",
                place=tmp_path)
    assert done.returncode == 0, done.stderr
    content = np.load(tmp_path / "f.npz")
    store = data.TokenStore(tuned / "datasets/toy/tokens/pretrain")
    backbone = finetune.load_backbone(tuned / "runs/toy/last.pt")
    expected = probe.video_features(backbone, store, np.array([2]), 8 / 3, 10, "fp32")[0].numpy()
    i = list(content["names"]).index(os.path.basename(store.name(2)))
    assert np.allclose(np.concatenate([content["cls"][i], content["mean"][i]]), expected, atol=1e-5)
    assert len(content["names"]) == len(list((tmp_path / "videos").iterdir()))


def test_hidden_is_what_the_checkpoint_was_trained_to_predict_and_what_moves(tuned, monkeypatch):
    """Not the command line's masks, and other tokens in each file."""
    content = torch.load(tuned / "runs/toy/last.pt", weights_only=True)
    content["config"] |= {"mask": "iid", "mask_ratio": 0.5}
    (tuned / "runs/iid").mkdir()
    torch.save(content, tuned / "runs/iid/last.pt")
    masks, moving = [], monitor.moving_mask
    monkeypatch.setattr(monitor, "moving_mask",
                        lambda *args: masks.append(moving(*args)) or masks[-1])
    done = call(pretrain, "--fill-in", VIDEO.format(2), "--fill-in", VIDEO.format(3),
                "--checkpoint", "runs/iid/last.pt", place=tuned)
    assert done.returncode == 0, done.stderr
    assert all(mask.dim() == 4 and 0.4 < mask.float().mean() < 0.65 for mask in masks)
    assert len(masks) == 2 and not torch.equal(*masks)


def flags_of(path):
    return torch.load(path, weights_only=True)["config"]


def test_a_file_that_does_not_decode_is_named_and_the_rest_is_classified(tuned):
    (tuned / "bad.mp4").write_text("no video")
    some = call(finetune, "--predict", "bad.mp4", VIDEO.format(0), "nowhere.mp4",
                "--checkpoint", "runs/tuned/last.pt", place=tuned)
    lines = some.stdout.splitlines()
    assert some.returncode == 0 and len(lines) == 3, some.stderr
    assert lines[0].startswith("skipped bad.mp4: ") and lines[2].startswith("skipped nowhere.mp4: ")
    none = call(finetune, "--predict", "bad.mp4", "--checkpoint", "runs/tuned/last.pt",
                place=tuned)
    assert none.returncode == 2
    assert none.stderr == "finetune.py: none of the videos could be read\n"
    only = call(finetune, "--predict", VIDEO.format(0), "--checkpoint", "runs/toy/last.pt",
                place=tuned)
    assert only.returncode == 2 and "holds no classifier" in only.stderr


def test_the_fill_in_of_a_file_equals_that_of_its_video_in_the_store(tuned):
    done = call(pretrain, "--fill-in", VIDEO.format(2), "--checkpoint", "runs/toy/last.pt",
                "--seed", 5, place=tuned)
    assert done.returncode == 0, done.stderr
    files = "runs/toy/fill_in-videos-00002.png, fill_in-videos-00002.gif"
    assert done.stdout == f"{VIDEO.format(2)}: {files}\n"
    assert len(imageio.mimread(tuned / "runs/toy/fill_in-videos-00002.gif")) == 5
    drawn = imageio.imread(tuned / "runs/toy/fill_in-videos-00002.png")
    store = data.TokenStore(tuned / "datasets/toy/tokens/pretrain")
    store.header["root"] = str(tuned / "datasets/toy")
    config = pretrain.Config(**flags_of(tuned / "runs/toy/last.pt"))
    model = pretrain.Vimpac.load(tuned / "runs/toy/last.pt")
    tokenizer = vqvae.load_tokenizer(tuned / "datasets/toy/tokenizer.pt")
    generator = torch.Generator().manual_seed(5)
    expected = monitor.fill_in(model, tokenizer, store, [2], config, generator)
    monitor.save_fill_in(expected, ["00002.mp4"], tuned / "expected")
    assert np.array_equal(drawn, imageio.imread(tuned / "expected.png"))


def test_the_fill_in_of_a_model_without_masks_is_called_a_guess(tuned):
    content = torch.load(tuned / "runs/toy/last.pt", weights_only=True)
    content["config"]["mask_weight"] = 0.0
    (tuned / "runs/unmasked").mkdir()
    torch.save(content, tuned / "runs/unmasked/last.pt")
    done = call(pretrain, "--fill-in", VIDEO.format(2), "--fill-in", VIDEO.format(3),
                "--checkpoint", "runs/unmasked/last.pt", place=tuned)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3  # both files
    assert done.stdout.startswith("runs/unmasked/last.pt was trained with --mask-weight 0")
    done = call(pretrain, "--fill-in", VIDEO.format(2), "--checkpoint", "runs/tuned/last.pt",
                place=tuned)
    assert done.returncode == 2 and "fine-tuned" in done.stderr


def test_the_tokenizer_is_the_checkpoints_own_or_refused(tuned, tmp_path):
    """It may lie beside the checkpoint, if both were moved. Other weights are refused."""
    ask = ["--predict", tuned / VIDEO.format(1), "--checkpoint", tmp_path / "last.pt"]
    checkpoint = checkpoints.read_checkpoint(tuned / "runs/tuned/last.pt")
    before = call(finetune, *ask[:2], "--checkpoint", tuned / "runs/tuned/last.pt")
    checkpoint["tokens"]["tokenizer"] = "/elsewhere/tokenizer.pt"
    torch.save(checkpoint, tmp_path / "last.pt")
    lost = call(finetune, *ask)
    assert lost.returncode == 2 and "--tokenizer" in lost.stderr
    assert "/elsewhere/tokenizer.pt" in lost.stderr
    shutil.copy(tuned / "datasets/toy/tokenizer.pt", tmp_path)
    assert likeliest(call(finetune, *ask).stdout) == likeliest(before.stdout)
    vqvae.save_tokenizer(vqvae.VQVAE(256), tmp_path / "other.pt")
    other = call(finetune, *ask, "--tokenizer", tmp_path / "other.pt")
    assert other.returncode == 2 and "is not the tokenizer of" in other.stderr
    typo = call(finetune, *ask, "--tokenizer", tmp_path / "typo.pt")
    assert typo.returncode == 2 and str(tmp_path / "typo.pt") in typo.stderr


def test_fine_tuning_refuses_tokens_of_another_tokenizer(tuned, tmp_path):
    checkpoint = checkpoints.read_checkpoint(tuned / "runs/toy/last.pt")
    checkpoint["tokens"]["fingerprint"] = "0123456789ab"
    torch.save(checkpoint, tmp_path / "last.pt")
    done = call(finetune, *flags({**FINETUNE, "out": tmp_path / "run"}), "--checkpoint",
                tmp_path / "last.pt", place=tuned)
    assert done.returncode == 2
    assert "another tokenizer" in done.stderr and "0123456789ab" in done.stderr


def test_a_released_checkpoint_with_the_papers_tokenizer(released, tuned):  # noqa: F811
    folder = released[0]
    state = released_state(**SMALL)
    state = {key: value for key, value in state.items() if key.startswith("backbone.")}
    state |= {"cls_fc.weight": torch.randn(7, 128), "cls_fc.bias": torch.zeros(7)}
    torch.save(state, folder / "classifier.pt")
    ask = ["--predict", tuned / VIDEO.format(1), "--checkpoint", folder / "classifier.pt",
           "--dataset", "ucf101"]
    done = call(finetune, *ask)
    assert done.returncode == 2 and "give --tokenizer" in done.stderr
    few = call(finetune, *ask, "--tokenizer", folder / "encoder.pkl")
    assert few.returncode == 2 and "64 codes" in few.stderr and "8192 codes" in few.stderr
    import dall_e.encoder
    torch.save(dall_e.encoder.Encoder(n_hid=16, vocab_size=8192), folder / "encoder.pkl",
               _use_new_zipfile_serialization=False)
    done = call(finetune, *ask, "--tokenizer", folder / "encoder.pkl", "--draw")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"class \d \d+\.\d%", done.stdout)) == 5
    assert (folder / "predict-videos-00001.png").is_file()


def test_files_of_odd_or_equal_names_get_different_pictures(tuned, tmp_path):
    names = ["a/same.mp4", "b/same.mp4", "q$^$q %s.mp4", "n" * 240 + ".mp4", "\u65e5\u672c.mp4"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tuned / VIDEO.format(1), tmp_path / name)
    done = call(finetune, "--predict", *[tmp_path / name for name in names], "--checkpoint",
                tuned / "runs/tuned/last.pt", "--out", tmp_path / "pictures", "--device", "cpu",
                "--draw")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert len(list((tmp_path / "pictures").iterdir())) == len(names)
