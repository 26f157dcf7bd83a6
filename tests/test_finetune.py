import numpy as np
import pytest
import torch

import data
import finetune
import training
from conftest import flags, run
from transformer import TransformerConfig, VideoTransformer

FAST = dict(steps=4, batch=4, log_every=2, save_every=2, clips=2, device="cpu")


def test_no_argument_fine_tunes_the_toy_model_on_motion(workplace):
    done = run(workplace, *flags(FAST), script="finetune.py")
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("top-1 ") and last.endswith("(6 videos x 2 views)") and "top-5 100.0%" in last
    out = workplace / "runs/finetune-motion"
    assert {"last.pt", "metrics.jsonl", "confusion.png", "curves.png"} <= {path.name for path in out.iterdir()}
    again = run(workplace, "--checkpoint", out / "last.pt", "--eval-only", "--clips", 2, "--device", "cpu",
                script="finetune.py")
    assert again.stdout.strip().splitlines()[-1] == last


def test_labels_from_scratch_and_what_is_refused(workplace):
    done = run(workplace, *flags(FAST), "--labels", "appearance", "--from-scratch", script="finetune.py")
    assert done.returncode == 0 and (workplace / "runs/finetune-appearance-scratch/last.pt").is_file()
    for argv, said in ((["--labels", "smell"], "appearance, direction, motion"), (["--data", "nowhere"], "nowhere"),
                       (["--checkpoint", "none.pt"], "none.pt"), (["--eval-only"], "no classifier")):
        done = run(workplace, *argv, "--device", "cpu", script="finetune.py")
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def store_of_two_kinds(path, count=40):
    """Videos of class 0 stand still, those of class 1 change from frame to frame: any single frame is alike."""
    random = np.random.default_rng(0)
    writer = data.StoreWriter(path, {"tokenizer": "t", "fingerprint": "f", "vocab_size": 8, "fps": 2, "size": 16,
                                     "height": 2, "width": 2, "views": [[16, "center", False]], "root": "/",
                                     "classes": None})
    for i in range(count):
        tokens = random.integers(8, size=(1, 9, 2, 2))
        if i % 2 == 0:
            tokens[:] = tokens[:, :1]
        writer.add(i, f"{i}.mp4", tokens, {"label": i % 2})
    writer.close()
    writer.finish()
    return data.TokenStore(path)


def test_it_learns_what_takes_several_frames(tmp_path):
    store = store_of_two_kinds(tmp_path / "s")
    config = finetune.Config(out=str(tmp_path / "run"), steps=150, batch=20, lr=5e-3, fps=2.0, clips=3)
    training.seed_all(0)
    model = finetune.Classifier(VideoTransformer(TransformerConfig(2, 32, 2, 16, 64, 3, 2, 2, 8, dropout=0.0)), 2)
    device = torch.device("cpu")
    assert torch.equal(finetune.evaluate(model, store, config, device, torch.float32), torch.full((40, 2), 0.5))
    finetune.train(config, model, store, "label", device, torch.float32)
    p = finetune.evaluate(model, store, config, device, torch.float32)
    assert (p.argmax(dim=1) == torch.tensor(store.labels("label"))).float().mean() > 0.9


def test_probabilities_are_averaged_over_clips_and_views(tmp_path):
    store = store_of_two_kinds(tmp_path / "s", count=5)
    config = finetune.Config(out=str(tmp_path / "run"), fps=1.0, clips=4)
    model = finetune.Classifier(VideoTransformer(TransformerConfig(1, 16, 2, 8, 32, 3, 2, 2, 8)), 2).eval()
    torch.nn.init.normal_(model.classifier.weight)
    p = finetune.evaluate(model, store, config, torch.device("cpu"), torch.float32)
    clips = torch.from_numpy(data.even_clips(store, 3, 3, 2, 4))
    assert torch.allclose(p[3], model(clips).softmax(dim=-1).mean(dim=0), atol=1e-6)


@pytest.mark.parametrize("wrong", [dict(fps=0), dict(split=4), dict(batch=0), dict(from_scratch=True, eval_only=True)])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError):
        finetune.Config(**wrong)
