import json

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import TINY, random_store, write_store

import data
import masking
import monitor
import pretrain
import toy
from plumbing.cli import UserError
from plumbing.tokens import PAD
from pretrain import PRESETS, Config, Vimpac
from transformer import TransformerConfig, VideoTransformer


def tiny(**changes):
    return Config(**{**PRESETS["toy"], **TINY, **changes})


# ---------------------------------------------------------------- held-out losses


def test_held_out_videos_are_measured_without_dropout_and_the_same_way_each_time(
        tmp_path, monkeypatch):
    """The means over groups: every video once, the same clips and masks again."""
    store = random_store(tmp_path / "s", 20)
    config = tiny(dropout=0.3, contrast=4, micro_batch=3, precision="fp32")
    held_out = np.array([1, 4, 7, 9, 11, 12, 13, 16])
    model = Vimpac(config.transformer(16, 4, 4), 16, 2).train()
    drawn, values = [], []
    monkeypatch.setattr(data, "hold_out", lambda videos, count: (None, held_out))
    getitem = data.ClipPairs.__getitem__
    monkeypatch.setattr(data.ClipPairs, "__getitem__",
                        lambda pairs, item: drawn.append(item[0]) or getitem(pairs, item))

    def terms(clips, generator):
        assert not model.training
        cpu = torch.device("cpu")
        values.append(pretrain.compute_losses(config, 16, cpu, model, clips, generator))
        return values[-1]

    first, second = (monitor.measure(model, terms, config, store) for _ in range(2))
    assert first == second and model.training
    assert sorted(drawn) == sorted([*held_out, *held_out]) and len(values) == 4
    for name in ("loss", "mask_loss", "mask_accuracy", "contrastive_loss"):
        mean = (values[0][name] + values[1][name]).item() / 2
        assert first[f"held_out_{name}"] == pytest.approx(mean)
        assert values[0][name] != values[1][name] or name == "mask_accuracy"


def test_without_held_out_videos_nothing_is_measured(tmp_path):
    store, config = random_store(tmp_path / "s", 3), tiny()
    assert monitor.evaluate(None, config, store, np.array([], int)) == {}


# ---------------------------------------------------------------- kNN


def test_knn_weighs_the_nearest_most():
    features = torch.eye(4)
    labels = torch.tensor([0, 1, 1, 1])
    queries = torch.tensor([[1.0, 0.2, 0.2, 0.2], [0.1, 1.0, 0.0, 0.0]])
    queries = torch.nn.functional.normalize(queries, dim=1)
    assert monitor.knn_accuracy(features, labels, queries, torch.tensor([0, 1]), k=4) == 1.0
    assert monitor.knn_accuracy(features, labels, queries, torch.tensor([1, 1]), k=4) == 0.5


FRAMES = 40  # of a stored video


def store_of_12_views(path, labels):
    """16 frames a second. The tokens of the centre view are the frame's number, all others 60."""
    views = data.views_for("train", 16)
    tokens = np.full((12, FRAMES, 2, 2), 60)
    tokens[views.index((16, "center", False))] = np.arange(FRAMES)[:, None, None]
    videos = [(tokens, {"label": label}) for label in labels]
    return write_store(path, videos, vocab_size=64, fps=16, views=views)


def backbone(**changes):
    sizes = {"vocab_size": 64, **changes}
    return VideoTransformer(TransformerConfig(1, 16, 2, 8, 32, 3, 2, 2, **sizes)).train()


def test_knn_compares_in_float32_under_autocast():
    features = torch.nn.functional.normalize(torch.randn(50, 8), dim=1)
    labels = torch.arange(50)
    with torch.autocast("cpu", torch.bfloat16):
        assert monitor.knn_accuracy(features, labels, features, labels, 3) == 1


def test_knn_takes_the_middle_of_the_centre_view_at_the_models_frame_rate(tmp_path, monkeypatch):
    store = store_of_12_views(tmp_path / "s", [0, 1])
    model, inputs, cuts, cut = backbone(), [], [], data.TokenStore.cut

    def watched_cut(store, video, start, frames, stride, view=0):
        cuts.append((video, view))
        return cut(store, video, start, frames, stride, view)

    monkeypatch.setattr(data.TokenStore, "cut", watched_cut)
    model.register_forward_pre_hook(lambda model, args: inputs.append((args[0], model.training)))
    features = monitor.clip_features(model, store, fps=2.0)
    assert features.shape == (2, 16) and torch.allclose(features.norm(dim=1), torch.ones(2))
    (clips, training), = inputs
    assert clips[..., 0, 0].tolist() == [[11, 19, 27]] * 2 and not training  # stride 8, the middle
    center = store.header["views"].index([16, "center", False])
    assert cuts == [(0, center), (1, center)] and center != 0
    monitor.clip_features(model, store, fps=5.33)
    assert inputs[-1][0][0, :, 0, 0].tolist() == [16, 19, 22]


def test_queries_come_from_val_and_without_it_from_test(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, stores, features = backbone(), [], monitor.clip_features

    def watched_features(model, store, *args):
        stores.append(store.path.name)
        return features(model, store, *args)

    monkeypatch.setattr(monitor, "clip_features", watched_features)
    labels = {"train": [0, 0, 1], "test": [1], "val": [0]}
    for name, classes in labels.items():
        store_of_12_views(tmp_path / "toy" / name, classes)
        if name != "train":
            accuracies = monitor.knn_accuracies(model, tmp_path / "toy", 2.0, k=3)
            assert stores[-2:] == ["train", name]
            # all videos are alike: the majority votes for 0
            assert accuracies == {"knn_label": {"test": 0.0, "val": 1.0}[name]}
    for name in ("train1", "test1", "test2"):
        store_of_12_views(tmp_path / "ucf101" / name, [0, 1])
    monitor.knn_accuracies(model, tmp_path / "ucf101", 2.0, k=1)
    assert stores[-2:] == ["train1", "test1"]
    with pytest.raises(UserError, match="train"):
        monitor.knn_accuracies(model, tmp_path, 2.0, k=1)


def test_a_store_of_another_tokenizer_is_refused(tmp_path):
    store = store_of_12_views(tmp_path / "s", [0, 1])
    with pytest.raises(UserError, match="holds 64 codes, the model has 100"):
        monitor.clip_features(backbone(vocab_size=100), store, 2.0)


# ---------------------------------------------------------------- the end of a run


TRAINING = [dict(step=2, loss=3, mask_accuracy=0.5, contrastive_loss=1.0),
            dict(step=4, loss=2, mask_accuracy=0.625, contrastive_loss=0.5)]
HELD_OUT = [dict(step=0, held_out_loss=3, held_out_mask_accuracy=0.01,
                 held_out_contrastive_loss=1.5, knn_motion=0.25),
            dict(step=3, held_out_loss=2, held_out_mask_accuracy=0.125,
                 held_out_contrastive_loss=0.75, knn_motion=0.5)]


@pytest.mark.parametrize("records, changes, expected", [
    (TRAINING + HELD_OUT, {}, ["mask accuracy 12.5%  contrastive loss 0.750  (3 held-out videos)",
                               "kNN on motion: 50.0% (untrained: 25.0%)"]),
    (TRAINING + HELD_OUT, {"alpha": 0.0}, ["mask accuracy 12.5%  (3 held-out videos)",
                                           "kNN on motion: 50.0% (untrained: 25.0%)"]),
    (TRAINING + HELD_OUT, {"mask_weight": 0.0}, ["contrastive loss 0.750  (3 held-out videos)",
                                                 "kNN on motion: 50.0% (untrained: 25.0%)"]),
    (TRAINING, {}, ["mask accuracy 62.5%  contrastive loss 0.500  (training videos)"])])
def test_the_last_lines_are_the_last_measurements(tmp_path, capsys, records, changes, expected):
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    monitor.report(tiny(out=str(tmp_path), held_out=3, **changes), None, range(30))
    assert capsys.readouterr().out.splitlines()[:-1] == expected
    assert imageio.imread(tmp_path / "curves.png").std() > 5


# ---------------------------------------------------------------- Figures 4 and 5


def test_a_hidden_token_is_copied_from_the_nearest_visible_one():
    tokens = torch.arange(2 * 3 * 4).view(1, 2, 3, 4)
    mask = torch.zeros(1, 2, 3, 4, dtype=torch.bool)
    mask[0, 0, :2, :3] = True  # six tokens of the first frame
    in_space, over_time = (monitor.copied(tokens, mask, over_time)[0]
                           for over_time in (False, True))
    # of two equally near ones, the first
    assert in_space[0].tolist() == [[8, 3, 3, 3], [8, 9, 7, 7], [8, 9, 10, 11]]
    assert over_time[0].tolist() == [[12, 13, 3, 3], [8, 9, 7, 7], [8, 9, 10, 11]]
    assert torch.equal(in_space[1], tokens[0, 1]) and torch.equal(over_time[1], tokens[0, 1])


class GreyTokenizer:
    """Decodes a token to 8 x 8 pixels of its own grey."""

    def decode(self, tokens):
        pixels = tokens.repeat_interleave(8, 1).repeat_interleave(8, 2)
        return pixels[..., None].expand(-1, -1, -1, 3).byte()


def test_the_mask_of_a_picture_hides_what_changes():
    frames, config = np.zeros((5, 64, 64, 3), np.uint8), tiny()
    frames[1::2, 40:48, 40:48] = 255  # one token that changes
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        mask = monitor.moving_mask(frames, torch.ones(5, 8, 8), config, generator)
        assert masking.union(mask)[0, 1:, 5, 5].sum() >= 2 and mask.dim() == 5


def test_only_hidden_tokens_are_filled_in(workplace):
    """The middle of a video of 8 frames a second, shown at 2.67."""
    store = data.TokenStore(workplace / "datasets/toy/tokens/pretrain")
    config = tiny()
    torch.manual_seed(0)
    model = Vimpac(config.transformer(256, 8, 8), 16, 2)
    model.token_head.bias.data[256 + PAD] = 100.0  # most probable, but no code to draw
    first, again = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    pictures = monitor.fill_in(model, GreyTokenizer(), store, [2, 5], config, first)
    assert pictures.shape == (2, 4, 5, 64, 64, 3) and pictures.dtype == np.uint8
    for video, (original, decoded, masked, filled) in zip((2, 5), pictures):
        drawn = toy.draw_video(video)[0][9:22:3]  # 13 frames in the middle of 32
        assert np.abs(original.astype(int) - drawn).mean() < 4
        assert (decoded[:, ::8, ::8, 0] == store.tokens(video)[9:22:3]).all()
        mask = masking.union(monitor.moving_mask(decoded, torch.ones(5, 8, 8), config, again))
        hidden = mask[0].numpy().repeat(8, 1).repeat(8, 2)
        assert 0 < hidden.mean() < 1
        for row in (masked, filled):
            assert (row[~hidden] == decoded[~hidden]).all()
        assert set(np.unique(masked[hidden])) == {195, 255}  # the chequered pattern
        clip = torch.from_numpy(store.cut(video, 9, 5, 3))[None]
        with torch.no_grad():
            _, features = model.eval().backbone(masking.hide(clip, mask, 256))
            logits = model.predict_tokens(features, mask.flatten().nonzero().squeeze(1))
        best = logits[:, :256].argmax(dim=1).numpy()
        assert (filled[:, ::8, ::8, 0][mask[0].numpy()] == best).all()


def short_store(tmp_path, count):
    return write_store(tmp_path / "s", [(np.full((1, 8, 8, 8), 7), {})] * count, size=64,
                       views=[[64, "center", False]], root=str(tmp_path))


def test_the_pictures_are_white_beyond_a_videos_end(tmp_path, write_video):
    write_video(tmp_path / "0.mp4", [100] * 8)
    store, config = short_store(tmp_path, 1), tiny(mask_ratio=0.9, mask="iid")
    model = Vimpac(config.transformer(16, 8, 8), 16, 2)
    rows = monitor.fill_in(model, GreyTokenizer(), store, [0], config, torch.Generator())[0]
    assert (rows[:, 3:] == 255).all() and (rows[1, :3] == 7).all()
    assert (rows[[0, 3], :3] < 255).any()


def test_a_video_that_was_removed_costs_a_line_and_not_the_run(tmp_path, capsys):
    store = short_store(tmp_path, 2)
    record = dict(step=1, loss=1.0, mask_accuracy=0.5, contrastive_loss=1.0)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    config = tiny(out=str(tmp_path))
    model = Vimpac(config.transformer(16, 8, 8), 16, 2)
    monitor.report(config, model, store, GreyTokenizer())
    output = capsys.readouterr().out
    assert "no picture of what the model fills in: " in output and "0.mp4" in output
    assert "fill_in.png" not in output and (tmp_path / "curves.png").is_file()
    assert output.endswith("last.pt, metrics.jsonl, curves.png\n")
