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


# ---------------------------------------------------------------- both losses on held-out videos


def test_held_out_videos_are_measured_without_dropout_and_alike_each_time(tmp_path, monkeypatch):
    """The means of what `losses` finds: every video once, in evaluation mode, the same clips and masks again."""
    store, config = random_store(tmp_path / "s", 20), tiny(dropout=0.3, contrast=4, micro_batch=3)
    model = Vimpac(config.transformer(16, 4, 4), 16, 2).train()
    videos, drawn, found, cut = np.array([1, 4, 7, 9, 11, 12, 13, 16]), [], [], data.ClipPairs.__getitem__
    monkeypatch.setattr(data.ClipPairs, "__getitem__", lambda pairs, item: drawn.append(item[0]) or cut(pairs, item))

    def losses(model, *args):
        assert not model.training
        found.append(pretrain.losses(model, *args))
        return found[-1]
    one, two = (monitor.evaluate(losses, model, config, store, videos, torch.float32) for _ in range(2))
    assert one == two
    assert sorted(drawn) == sorted([*videos, *videos]) and len(found) == 4
    for name in ("loss", "mask_loss", "mask_accuracy", "contrastive_loss"):
        assert one[f"held_out_{name}"] == pytest.approx((found[0][name] + found[1][name]).item() / 2)
        assert found[0][name] != found[1][name] or name == "mask_accuracy"


def test_without_held_out_videos_nothing_is_measured(tmp_path):
    store, config = random_store(tmp_path / "s", 3), tiny()
    assert monitor.evaluate(pretrain.losses, None, config, store, np.array([], int), torch.float32) == {}


# ---------------------------------------------------------------- kNN


def test_knn_weighs_the_nearest_most():
    features = torch.eye(4)
    labels = torch.tensor([0, 1, 1, 1])
    queries = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2, 0.2, 0.2], [0.1, 1.0, 0.0, 0.0]]), dim=1)
    assert monitor.knn_accuracy(features, labels, queries, torch.tensor([0, 1]), k=4) == 1.0
    assert monitor.knn_accuracy(features, labels, queries, torch.tensor([1, 1]), k=4) == 0.5


FRAMES = 40  # of a stored video


def store_of_12_views(path, labels):
    """Stored for fine-tuning, 16 frames a second: the centre view's tokens are the frame's number, all others' 60."""
    views = data.views_for("train", 16)
    tokens = np.full((12, FRAMES, 2, 2), 60)
    tokens[views.index((16, "center", False))] = np.arange(FRAMES)[:, None, None]
    return write_store(path, [(tokens, {"label": label}) for label in labels], vocab_size=64, fps=16, views=views)


def backbone(**changes):
    return VideoTransformer(TransformerConfig(1, 16, 2, 8, 32, 3, 2, 2, **{"vocab_size": 64, **changes})).train()


def test_knn_sees_the_middle_of_the_centre_view_at_the_models_own_frame_rate(tmp_path, monkeypatch):
    store = store_of_12_views(tmp_path / "s", [0, 1])
    model, read, seen, tokens = backbone(), [], [], data.TokenStore.tokens
    monkeypatch.setattr(data.TokenStore, "tokens",
                        lambda store, i, view=0: read.append((i, view)) or tokens(store, i, view))
    model.register_forward_pre_hook(lambda model, inputs: seen.append((inputs[0], model.training)))
    features = monitor.clip_features(model, store, fps=2.0)
    assert features.shape == (2, 16) and torch.allclose(features.norm(dim=1), torch.ones(2))
    (clips, training), = seen
    assert clips[..., 0, 0].tolist() == [[11, 19, 27]] * 2 and not training  # stride 8, the middle
    center = store.header["views"].index([16, "center", False])
    assert read == [(0, center), (1, center)] and center != 0
    monitor.clip_features(model, store, fps=5.33)
    assert seen[-1][0][0, :, 0, 0].tolist() == [16, 19, 22]


def test_queries_come_from_val_and_where_there_is_none_from_test(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, asked, features = backbone(), [], monitor.clip_features
    monkeypatch.setattr(monitor, "clip_features", lambda model, store, *how: asked.append(store.path.name) or features(
        model, store, *how))
    for name in ("train", "test", "val"):
        store_of_12_views(tmp_path / "own" / name, {"train": [0, 0, 1], "val": [0], "test": [1]}[name])
        if name != "train":
            result = monitor.knn_accuracies(model, tmp_path / "own", 2.0, k=3)
            assert asked[-2:] == ["train", name]
            assert result == {"knn_label": {"test": 0.0, "val": 1.0}[name]}  # all videos alike: most of them say 0
    for name in ("train1", "test1", "test2"):
        store_of_12_views(tmp_path / "ucf101" / name, [0, 1])
    monitor.knn_accuracies(model, tmp_path / "ucf101", 2.0, k=1)
    assert asked[-2:] == ["train1", "test1"]
    with pytest.raises(UserError, match="no finished token store at .*train"):
        monitor.knn_accuracies(model, tmp_path, 2.0, k=1)


def test_a_store_of_another_tokenizer_is_refused(tmp_path):
    store = store_of_12_views(tmp_path / "s", [0, 1])
    with pytest.raises(UserError, match="holds 64 codes, the model knows 100"):
        monitor.clip_features(backbone(vocab_size=100), store, 2.0)


# ---------------------------------------------------------------- what is said and drawn


def test_the_last_lines_are_the_last_measurements(tmp_path, capsys):
    trained = [dict(step=2, loss=3, mask_accuracy=0.5, contrastive_loss=1.0),
               dict(step=4, loss=2, mask_accuracy=0.625, contrastive_loss=0.5)]
    watched = [{"step": 0, "held_out_loss": 3, "held_out_mask_accuracy": 0.01, "held_out_contrastive_loss": 1.5,
                "knn_motion": 0.25},
               {"step": 3, "held_out_loss": 2, "held_out_mask_accuracy": 0.125, "held_out_contrastive_loss": 0.75,
                "knn_motion": 0.5}]
    masks, contrast = ([{"step": 4, "held_out_loss": 1, f"held_out_{task}": 0.5}] for task in ("mask_accuracy",
                                                                                             "contrastive_loss"))
    training = "mask accuracy 62.5%  contrastive loss 0.500  (training videos)"
    nearest = "kNN on motion: 50.0% (untrained: 25.0%)"
    for lines, held_out, expected in (
            (trained + watched, 3, ["mask accuracy 12.5%  contrastive loss 0.750  (3 held-out videos)", nearest]),
            (trained + watched, 0, [training, nearest]),
            (trained + masks, 3, ["mask accuracy 50.0%  (3 held-out videos)"]),
            (trained + contrast, 3, ["contrastive loss 0.500  (3 held-out videos)"]),
            (trained, 3, [training])):  # fewer of them than processes: they were not measured
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        monitor.report(tiny(out=str(tmp_path), held_out=held_out), None, range(30))
        assert capsys.readouterr().out.splitlines()[:-1] == expected
        assert imageio.imread(tmp_path / "curves.png").std() > 5


def test_a_hidden_token_is_copied_from_the_nearest_visible_one():
    tokens = torch.arange(2 * 3 * 4).view(1, 2, 3, 4)
    mask = torch.zeros(1, 2, 3, 4, dtype=torch.bool)
    mask[0, 0, :2, :3] = True  # of the first frame six tokens: seen are the last row and the last column
    in_space, over_time = (monitor.copied(tokens, mask, over_time)[0] for over_time in (False, True))
    assert in_space[0].tolist() == [[8, 3, 3, 3], [8, 9, 7, 7], [8, 9, 10, 11]]  # of two as near, the first
    assert over_time[0].tolist() == [[12, 13, 3, 3], [8, 9, 7, 7], [8, 9, 10, 11]]
    assert torch.equal(in_space[1], tokens[0, 1]) and torch.equal(over_time[1], tokens[0, 1])


class Painter:
    """Stands in for a tokenizer: a token becomes a patch of 8 x 8 pixels of its own grey."""

    def decode(self, tokens):
        return tokens.repeat_interleave(8, 1).repeat_interleave(8, 2)[..., None].expand(-1, -1, -1, 3).byte()


def test_only_what_is_hidden_is_filled_in(workplace):
    """Original, after the tokenizer, masked, filled in: a video of eight frames a second shown at 2.67, its middle."""
    store = data.TokenStore(workplace / "datasets/toy/tokens/pretrain")
    config = tiny()
    torch.manual_seed(0)
    model = Vimpac(config.transformer(256, 8, 8), 16, 2)
    model.token_head.bias.data[256 + PAD] = 100.0  # the likeliest, but no code that could be drawn
    first, again = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    pictures = monitor.fill_in(model, Painter(), store, [2, 5], config.clip_fps(store), first, **config.masks())
    assert pictures.shape == (2, 4, 5, 64, 64, 3) and pictures.dtype == np.uint8
    for video, (original, decoded, masked, filled) in zip((2, 5), pictures):
        drawn = toy.draw_video(video)[0][9:22:3]  # 32 frames of which a clip takes 13
        assert np.abs(original.astype(int) - drawn).mean() < 4
        assert (decoded[:, ::8, ::8, 0] == store.tokens(video)[9:22:3]).all()
        mask = masking.prepare(torch.zeros(1, 1, 5, 8, 8, dtype=torch.long), 256, generator=again).mask[0].numpy()
        hidden = mask.repeat(8, 1).repeat(8, 2)
        assert 0 < hidden.mean() < 1
        for row in (masked, filled):
            assert (row[~hidden] == decoded[~hidden]).all()
        assert set(np.unique(masked[hidden])) == {195, 255}  # the chequered pattern
        clip = torch.from_numpy(store.cut(video, 9, 5, 3))[None]
        where = torch.from_numpy(mask).flatten().nonzero().squeeze(1)
        with torch.no_grad():
            logits = model.eval()(masking.hide(clip, torch.from_numpy(mask)[None], 256), where)[0][:, :256]
        assert (filled[:, ::8, ::8, 0][mask] == logits.argmax(dim=1).numpy()).all()


def test_beyond_a_videos_end_the_pictures_are_white(tmp_path, write_video):
    write_video(tmp_path / "0.mp4", [100] * 8)
    store = write_store(tmp_path / "s", [(np.full((1, 8, 8, 8), 7), {})], size=64, views=[[64, "center", False]],
                        root=str(tmp_path))
    config = tiny(mask_ratio=0.9, mask="iid")
    model = Vimpac(config.transformer(16, 8, 8), 16, 2)
    rows = monitor.fill_in(model, Painter(), store, [0], config.clip_fps(store), torch.Generator(), **config.masks())[0]
    assert (rows[:, 3:] == 255).all() and (rows[1, :3] == 7).all() and (rows[[0, 3], :3] < 255).any()


def test_a_video_that_has_gone_costs_a_line_and_not_the_run(tmp_path, capsys):
    store = write_store(tmp_path / "s", [(np.full((1, 8, 8, 8), 7), {})] * 2, size=64,
                        views=[[64, "center", False]], root=str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "mask_accuracy": 0.5, "contrastive_loss": 1.0}\n')
    config = tiny(out=str(tmp_path))
    monitor.report(config, Vimpac(config.transformer(16, 8, 8), 16, 2), store, Painter())
    said = capsys.readouterr().out
    assert "no picture of what the model fills in: " in said and "0.mp4" in said and "fill_in.png" not in said
    assert (tmp_path / "curves.png").is_file() and said.endswith("last.pt, metrics.jsonl, curves.png\n")
