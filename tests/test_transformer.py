import os
import shutil

import pytest
import torch

import transformer
from transformer import (LAYOUTS, TokenHead, TransformerConfig, VideoTransformer, load_backbone, resize_table)

T, H, W, V = 3, 4, 5, 20
PAD = V + 1


def build(layout="T,H|W", pre_norm=False, layers=1, dropout=0.0):
    torch.manual_seed(0)
    heads = 6  # divisible by one, two and three patterns
    model = VideoTransformer(TransformerConfig(layers, 24, heads, 4, 48, T, H, W, V, layout, pre_norm, dropout))
    with torch.no_grad():
        for p in model.parameters():  # far from the small start, so that every path carries weight
            p.add_(0.3 * torch.randn_like(p))
    return model.double()


def clips(batch=2):
    return torch.randint(V, (batch, T, H, W), generator=torch.Generator().manual_seed(1))


def changed(model, tokens, place):
    """Where one layer's features change when one token does -> bool (T, H, W), and whether CLS does."""
    other = tokens.clone()
    other[(0, *place)] = (other[(0, *place)] + 1) % V
    (cls, features), (other_cls, other_features) = model(tokens), model(other)
    return ((features - other_features)[0].abs().amax(dim=-1) > 1e-9), (cls - other_cls)[0].abs().max() > 1e-9


def reach(layout, place):
    """Where a change can arrive after one layer without passing through CLS -> bool (T, H, W)."""
    seen = torch.zeros(T, H, W, dtype=torch.bool)
    seen[place] = True
    for block in layout.split(","):
        grown = seen.clone()
        for pattern in block.split("|"):
            dims = ["THW".index(axis) for axis in pattern.split("x")]
            grown |= seen.amax(dim=dims, keepdim=True)
        seen = grown
    return seen


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_change_reaches_where_the_layout_says(layout, pre_norm):
    """CLS carries a change on to every token, but only from one block to the next: with CLS's value held out of the
    blocks after the first, a token's change arrives where the patterns lead and nowhere else."""
    model = build(layout, pre_norm)
    for block in model.layers[0].blocks:  # tokens stop listening to CLS: its key is far away from every query
        attend = block.attend

        def without_cls(qkv, pad, shape, pattern, attend=attend):
            qkv = qkv.clone()
            qkv[:, 0] = 0
            return attend(qkv, pad, shape, pattern)
        block.attend = without_cls
    tokens = clips()
    for place in ((0, 0, 0), (1, 2, 3)):
        where, _ = changed(model, tokens, place)
        assert torch.equal(where, reach(layout, place))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cls_sees_every_token_after_one_layer(layout):
    model = build(layout)
    for place in ((0, 0, 0), (T - 1, H - 1, W - 1), (1, 2, 0)):
        assert changed(model, clips(), place)[1]


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pad_is_never_attended_to(layout, pre_norm):
    """What stands at a padded place, here through its embedding, changes no other feature and not CLS."""
    model = build(layout, pre_norm, layers=2)
    tokens = clips()
    tokens[1, -1] = PAD  # a whole frame
    tokens[0, :, 1] = PAD  # whole rows: every token of these sequences
    cls, features = model(tokens)
    with torch.no_grad():
        model.embedding.weight[PAD] += torch.randn(24)
    other_cls, other_features = model(tokens)
    real = tokens != PAD
    assert torch.allclose(cls, other_cls) and torch.allclose(features[real], other_features[real])
    assert not torch.allclose(features[~real], other_features[~real])
    assert features.isfinite().all()


def test_the_hint_about_padding_changes_nothing():
    model = build(layers=2)
    tokens = clips()
    assert torch.allclose(model(tokens, padded=True)[1], model(tokens, padded=False)[1])


def test_places_and_moments_are_told_apart():
    model = build()
    same = torch.full((1, T, H, W), 7)
    features = model(same)[1][0].flatten(0, 2)
    assert torch.cdist(features, features).fill_diagonal_(1).min() > 1e-3


def test_dropout_is_off_in_evaluation():
    model = build(dropout=0.5)
    tokens = clips()
    assert not torch.allclose(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.allclose(model(tokens)[0], model(tokens)[0])


def test_dropout_drops_its_share_and_keeps_the_mean():
    """p of the elements become 0, the others grow by 1 / (1 - p), independently of their neighbours; so in backward."""
    torch.manual_seed(0)
    x = torch.ones(1001, 1001, requires_grad=True)  # no multiple of the four elements that share a draw
    for p in (0.1, 0.5):
        y = transformer.dropout(x, p, True)
        kept = y > 0
        assert y[kept].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-4)
        assert kept.float().mean() == pytest.approx(1 - p, abs=2e-3)
        for both in (kept[1:] & kept[:-1], kept[:, 1:] & kept[:, :-1], kept[:, 4:] & kept[:, :-4]):
            assert both.float().mean() == pytest.approx((1 - p) ** 2, abs=3e-3)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    assert torch.equal(transformer.dropout(x, 0.5, False), x)


@pytest.mark.parametrize("limit", [65_535, 7])
def test_fused_attention_gives_the_same_in_one_launch_or_several(limit, monkeypatch):
    monkeypatch.setattr(transformer, "MOST_SEQUENCES", limit)
    q, k, v = torch.randn(3, 2, 4, 5, 3, 6, 8, dtype=torch.float64, requires_grad=True)  # 2 x 4 x 5 sequences of 6
    plain = (q @ k.transpose(-1, -2) / 8 ** 0.5).softmax(dim=-1) @ v
    fused = transformer.fused_attention(q, k, v, 0.0)
    weights = torch.randn_like(plain)
    assert torch.allclose(fused, plain)
    for a, b in zip(*(torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (plain, fused))):
        assert torch.allclose(a, b)


def test_compiled_layers_give_the_same():
    """Where a compiler is at hand; outside training the layers run as they are."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler")
    model, tokens = build(layers=2), clips()
    keys, (cls, features) = list(model.state_dict()), model(tokens)
    model.compile_layers()
    assert list(model.state_dict()) == keys
    for ours, theirs in zip((cls, features), model(tokens)):
        assert torch.allclose(ours, theirs)


def test_token_head_is_tied_to_the_embedding():
    model, head = build(), TokenHead(build().config).double()
    logits = head(torch.randn(3, 24, dtype=torch.float64), model.embedding.weight)
    assert logits.shape == (3, V + 5)
    logits.sum().backward()
    assert model.embedding.weight.grad.abs().sum() > 0


def test_resize_interpolates_each_axis_and_keeps_the_rest():
    model = build()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.resize(2 * T, 2 * H, 2 * W)
    assert model(torch.randint(V, (1, 2 * T, 2 * H, 2 * W)))[1].shape == (1, 2 * T, 2 * H, 2 * W, 24)
    ramp = torch.arange(4.0)[:, None]
    assert resize_table(ramp, 8).flatten().tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert torch.allclose(resize_table(ramp, 4), ramp)
    assert torch.equal(model.embedding.weight, before["embedding.weight"])


@pytest.mark.parametrize("wrong, said", [
    (dict(layout="H,T"), "H,T"), (dict(heads=7), "7"), (dict(layers=0), "layers"), (dict(dropout=1.0), "dropout")])
def test_sizes_that_do_not_fit_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        TransformerConfig(**wrong)


@pytest.mark.parametrize("token", [V + 5, -1])
def test_a_token_out_of_range_is_refused(token):
    tokens = clips()
    tokens[0, 0, 0, 0] = token
    with pytest.raises(ValueError, match=str(token)):
        build()(tokens)


def test_a_clip_of_another_size_is_refused():
    with pytest.raises(ValueError, match="resize"):
        build()(torch.zeros(1, T + 1, H, W, dtype=torch.long))


def test_load_backbone_refuses_what_is_no_checkpoint(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="text.pt"):
        load_backbone(tmp_path / "text.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt"):
        load_backbone(tmp_path / "other.pt")
