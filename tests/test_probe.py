import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_store

import probe
from plumbing.tokens import PAD
from transformer import TransformerConfig, VideoTransformer


def backbone(dropout=0.0):
    torch.manual_seed(0)
    return VideoTransformer(TransformerConfig(1, 16, 2, 8, 32, 3, 2, 2, 16, dropout=dropout)).eval()


def test_features_are_cls_and_the_mean_over_tokens_without_pad():
    clips, model = torch.randint(16, (2, 3, 2, 2)), backbone()
    clips[1, 2] = 16 + PAD
    cls, features = model(clips)
    expected = torch.stack([torch.cat([cls[0], features[0].flatten(0, 2).mean(dim=0)]),
                            torch.cat([cls[1], features[1, :2].flatten(0, 2).mean(dim=0)])])
    assert torch.allclose(probe.clip_features(model, clips, "fp32"), expected, atol=1e-6)


def test_a_videos_features_are_the_mean_over_clips_and_views_without_dropout(tmp_path):
    random = np.random.default_rng(0)
    views = [[16, "center", False], [16, "center", True]]
    videos = [(random.integers(16, size=(2, 9, 2, 2)), {"label": 0}) for _ in range(5)]
    store, model = write_store(tmp_path / "s", videos, fps=2, views=views), backbone(0.5).train()
    features = probe.video_features(model, store, np.array([1, 4]), 1.0, 3, "fp32")
    clips = np.stack([store.cut(4, start, 3, 2, view) for view in (0, 1) for start in (0, 2, 4)])
    expected = probe.clip_features(model, torch.from_numpy(clips), "fp32").mean(dim=0)
    assert features.shape == (2, 32) and torch.allclose(features[1], expected, atol=1e-6)


def test_the_fit_is_a_minimum():
    """The gradient of the mean cross entropy and of the penalty cancel at the solution."""
    features, labels = torch.randn(60, 5).double(), torch.randint(3, (60,))
    logits = probe.fit(features, labels, 3, 0.1)
    zero = logits(torch.zeros(1, 5).double())
    weight = (logits(torch.eye(5).double()) - zero).t()  # (3, 5)
    error = logits(features).softmax(dim=1) - F.one_hot(labels, 3)
    assert torch.allclose(error.t() @ features / 60 + 0.1 * weight, torch.zeros(3, 5).double(),
                          atol=1e-5)
    assert torch.allclose(error.sum(dim=0), torch.zeros(3).double(), atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_penalty_is_strong_where_features_tell_nothing_and_weak_where_they_do(scale):
    """More features than videos: a weak penalty would fit the noise."""
    torch.manual_seed(0)
    labels, noise = torch.arange(400) % 3, torch.randn(400, 200)
    told = noise + 0.5 * torch.randn(3, 200)[labels]
    errors = {}
    for name, features in (("noise", noise), ("told", told)):
        p = probe.probe(scale * features[:100], labels[:100], scale * features[100:], 3)
        assert torch.allclose(p.sum(dim=1), torch.ones(300))
        errors[name] = F.nll_loss(p.log(), labels[100:]).item()
    assert errors["noise"] < 1.25 and errors["told"] < 0.2  # chance: ln 3 = 1.1
    weak = probe.fit(noise[:100].double(), labels[:100], 3, 1e-5)(noise[100:].double())
    assert F.cross_entropy(weak, labels[100:]) > 1.5
