import itertools
import os
import shutil
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transformer
from plumbing import kernels
from plumbing.cli import UserError
from transformer import (
    LAYOUTS,
    TokenHead,
    TransformerConfig,
    VideoTransformer,
    from_sequences,
    load_backbone,
    resize_table,
    to_sequences,
)

T, H, W, V = 3, 4, 5, 20
PAD = V + 1


def build(layout="T,H|W", pre_norm=False, layers=1, dropout=0.0):
    torch.manual_seed(0)
    heads = 6  # divisible by one, two and three patterns
    config = TransformerConfig(layers, 24, heads, 4, 48, T, H, W, V, layout, pre_norm, dropout)
    model = VideoTransformer(config)
    with torch.no_grad():
        for p in model.parameters():  # far from the small start, so that every path carries weight
            p.add_(0.3 * torch.randn_like(p))
    return model.double()


def clips(batch=2):
    return torch.randint(V, (batch, T, H, W), generator=torch.Generator().manual_seed(1))


def outputs_and_gradients(model):
    cls, features = model(clips())
    total = cls.sin().sum() + features.sin().sum()
    return cls, features, *torch.autograd.grad(total, model.parameters())


def reach(layout, position):
    """What a token's change reaches in one layer without passing through CLS -> bool (T, H, W)."""
    seen = torch.zeros(T, H, W, dtype=torch.bool)
    seen[position] = True
    for block in layout.split(","):
        grown = seen.clone()
        for pattern in block.split("|"):
            dims = ["THW".index(axis) for axis in pattern.split("x")]
            grown |= seen.amax(dim=dims, keepdim=True)
        seen = grown
    return seen


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_interpolated_positions_keep_their_order_their_ends_and_their_middle(before, after):
    table = torch.arange(before, dtype=torch.float32)[:, None] * torch.tensor([1.0, -2.0])
    resized = transformer.resize_table(table, after)
    assert resized.shape == (after, 2) and (resized[:, 0].diff() >= 0).all()
    assert resized[:, 0].min() >= 0 and resized[:, 0].max() <= before - 1
    assert torch.allclose(resized.mean(dim=0), table.mean(dim=0), atol=1e-5)
    flipped = transformer.resize_table(table.flip(0), after)
    assert torch.allclose(flipped, resized.flip(0), atol=1e-5)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4),
       st.sampled_from(["T", "H", "W", "HxW", "TxHxW"]))
def test_sequences_lie_along_the_axes_of_their_pattern(clips, frames, height, width, pattern):
    sizes = {"B": clips, "T": frames, "H": height, "W": width}
    indices = torch.meshgrid(*map(torch.arange, sizes.values()), indexing="ij")
    grid = torch.stack(indices, dim=-1)  # (B, T, H, W, 4)
    sequences = to_sequences(grid, pattern)  # (B, S, L, 4)
    assert torch.equal(from_sequences(sequences, pattern, (frames, height, width)), grid)
    along = ["BTHW".index(axis) for axis in pattern.split("x")]  # dimensions inside a sequence
    across = [i for i in range(4) if i not in along]  # dimensions that tell sequences apart
    sizes = list(sizes.values())
    inside = [list(index) for index in itertools.product(*(range(sizes[i]) for i in along))]
    outside = list(itertools.product(*(range(sizes[i]) for i in across)))
    sequences = sequences.reshape(-1, len(inside), 4)
    assert len(sequences) == len(outside)
    for sequence, index in zip(sequences, outside):
        assert sequence[:, along].tolist() == inside
        assert (sequence[:, across] == torch.tensor(index)).all()


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_change_reaches_where_the_layout_says(layout, pre_norm):
    """CLS learns of a token's change in one block and passes it to all tokens in the next.

    With CLS reset between the blocks, the change reaches what the patterns connect and nothing
    else; without, it reaches every token.
    """
    blocks = build(layout, pre_norm).layers[0].blocks
    x = torch.randn(1, 1 + T * H * W, 24, dtype=torch.float64)
    everywhere = torch.ones(T, H, W, dtype=torch.bool)
    for position, reset in itertools.product(((0, 0, 0), (1, 2, 3)), (True, False)):
        y, changed = x, x.clone()
        changed[:, 1:].unflatten(1, (T, H, W))[0][position] += torch.randn(24)
        for block in blocks:
            y, changed = block(y, None, (T, H, W)), block(changed, None, (T, H, W))
            moved = (changed - y)[0].abs().amax(dim=-1) > 1e-9  # (1 + T*H*W,)
            assert moved[0]
            if reset:
                changed[:, 0] = y[:, 0]
        expected = reach(layout, position) if reset or len(blocks) == 1 else everywhere
        assert torch.equal(moved[1:].view(T, H, W), expected)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pad_is_never_attended_to(layout, pre_norm):
    """PAD's embedding changes neither the features of other tokens nor CLS."""
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
    assert torch.allclose(model(tokens, has_pad=True)[1], model(tokens, has_pad=False)[1])


def test_equal_tokens_at_different_positions_have_different_features():
    model = build()
    same = torch.full((1, T, H, W), 7)
    features = model(same)[1][0].flatten(0, 2)
    assert torch.cdist(features, features).fill_diagonal_(1).min() > 1e-3


def test_dropout_falls_on_the_embedding_the_probabilities_and_every_residual(monkeypatch):
    dropped = []

    def record(x, p, training):
        dropped.append((*x.shape, p * training))
        return x

    monkeypatch.setattr(kernels, "dropout", record)
    model = build("T,H|W", dropout=0.25)
    model(clips())
    tokens = (2, 1 + T * H * W, 24, 0.25)
    assert dropped == [tokens, (2, H, W, 6, 1 + T, 1 + T, 0.25), tokens,
                       (2, T, W, 3, 1 + H, 1 + H, 0.25), (2, T, H, 3, 1 + W, 1 + W, 0.25), tokens,
                       tokens]
    dropped.clear()
    model.eval()(clips())
    assert {shape[-1] for shape in dropped} == {0}


def test_compiled_layers_share_one_compilation_and_give_the_same():
    """Where there is a compiler."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler")
    model = build("TxHxW", layers=2)  # the quickest to compile
    keys, plain = list(model.state_dict()), outputs_and_gradients(model)
    torch._dynamo.utils.counters.clear()
    model.compile_layers()
    for ours, theirs in zip(outputs_and_gradients(model), plain):
        assert torch.allclose(ours, theirs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_in_training_is_one_graph(layout, fused, monkeypatch):
    """With dropout and PAD, in two matrix products and in the fused kernel of a GPU."""
    if fused:
        monkeypatch.setattr(kernels, "GPUS", ("cpu",))
        monkeypatch.setattr(kernels, "SHORT", 0)
    layer = build(layout, dropout=0.1).train().layers[0]
    x = torch.randn(2, 1 + T * H * W, 24, dtype=torch.float64, requires_grad=True)
    pad = torch.rand(2, T, H, W) < 0.3
    explanation = torch._dynamo.explain(layer)(x, pad, (T, H, W))
    assert explanation.graph_break_count == 0, explanation.break_reasons
    assert explanation.graph_count == 1


@pytest.mark.parametrize("layout", ["T,H|W", "TxHxW"])
@torch.no_grad()
def test_the_exported_backbone_takes_any_batch_with_and_without_padding(layout, tmp_path):
    model = build(layout, dropout=0.1).eval()
    batch = {"tokens": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(model, (clips(),), dynamic_shapes=batch)
    torch.export.save(program, tmp_path / "backbone.pt2")
    exported = torch.export.load(tmp_path / "backbone.pt2").module()
    for tokens in (clips(5), clips(1), torch.where(clips(3) > 9, PAD, clips(3))):
        for ours, theirs in zip(exported(tokens), model(tokens)):
            assert torch.allclose(ours, theirs)


def test_the_whole_backbone_in_training_is_one_graph():
    explanation = torch._dynamo.explain(build(layers=2, dropout=0.1).train())(clips())
    assert explanation.graph_break_count == 0, explanation.break_reasons


def test_activation_checkpointing_gives_the_same_gradients_and_keeps_less():
    """With dropout, whose numbers must be drawn again, and PAD."""
    tokens, gradients, kept = torch.randint(V, (2, T, H, W)), [], []
    tokens[0, -1] = PAD
    for checkpointing in (False, True):
        model = build(layers=3, dropout=0.3).train()
        model.activation_checkpointing, sizes = checkpointing, {}
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x, sizes=sizes: sizes.update({x.data_ptr(): x.nbytes}) or x, lambda x: x):
            cls, features = model(tokens)
        (cls.sum() + features.square().sum()).backward()
        gradients.append([p.grad for p in model.parameters()])
        kept.append(sum(sizes.values()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert kept[1] < 0.3 * kept[0]


def test_token_head_is_tied_to_the_embedding():
    model, head = build(), TokenHead(build().config).double()
    logits = head(torch.randn(3, 24, dtype=torch.float64), model.embedding.weight)
    assert logits.shape == (3, V + 5)
    logits.sum().backward()
    assert model.embedding.weight.grad.abs().sum() > 0


def test_resize_interpolates_each_axis_and_keeps_the_rest():
    ramps = torch.arange(4.0)[:, None] * torch.tensor([1, -2])  # (4, d = 2)
    assert resize_table(ramps, 8)[:, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert torch.equal(resize_table(ramps, 8)[:, 1], -2 * resize_table(ramps, 8)[:, 0])
    assert torch.equal(resize_table(ramps, 4), ramps)
    model = build().float()
    before = {name: p.clone() for name, p in model.named_parameters()}
    tokens = torch.randint(V, (1, 2 * T, 3 * H, W))
    _, features = model.resize(2 * T, 3 * H, W)(tokens)
    assert features.shape == (1, 2 * T, 3 * H, W, 24)
    expected = {**before, "time": resize_table(before["time"], 2 * T),
                "row": resize_table(before["row"], 3 * H)}
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name]), name


@pytest.mark.parametrize("wrong, said", [
    (dict(layout="H,T"), "H,T"), (dict(heads=7), "7"), (dict(layers=0), "layers"),
    (dict(dropout=1.0), "dropout"), (dict(dropout=-0.1), "dropout")])
def test_sizes_that_do_not_fit_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        TransformerConfig(**wrong)


@pytest.mark.parametrize("token", [V + 5, -1])
def test_a_token_out_of_range_is_refused(token):
    tokens = clips()
    tokens[0, 0, 0, 0] = token
    with pytest.raises(UserError, match=str(token)):
        build()(tokens)


def test_a_clip_of_another_size_is_refused():
    with pytest.raises(UserError, match="resize"):
        build()(torch.zeros(1, T + 1, H, W, dtype=torch.long))


def test_load_backbone_reads_our_checkpoints_and_changes_what_is_asked(tmp_path):
    model = build("H|W,T", pre_norm=True)
    weights = {f"backbone.{name}": p for name, p in model.state_dict().items()}
    weights["token_head.bias"] = torch.zeros(2)
    torch.save({"transformer": asdict(model.config), "model": weights}, tmp_path / "last.pt")
    loaded = load_backbone(tmp_path / "last.pt", dropout=0.3)
    assert loaded.config.dropout == 0.3 and loaded.layers[0].dropout == 0.3
    assert torch.allclose(loaded.double().eval()(clips())[0], model(clips())[0], atol=1e-5)


def renamed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def paper_like(layout="T,H|W"):
    """A backbone whose sizes are like the paper's: heads of 64."""
    torch.manual_seed(0)
    return VideoTransformer(TransformerConfig(2, 128, 2, 16, 32, T, H, W, V, layout)).eval()


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("kind", ["backbone", "model", "compiled backbone", "checkpoint"])
def test_load_backbone_reads_state_dicts_whatever_wrapped_the_model(kind, prefix, tmp_path):
    model = paper_like("T,H,W")
    state = {**renamed(model.state_dict(), "backbone."), "token_head.bias": torch.zeros(2)}
    if kind == "backbone":
        state = model.state_dict()
    elif kind == "compiled backbone":
        state = renamed(model.state_dict(), "backbone._orig_mod.")
    state = renamed(state, prefix)
    if kind == "checkpoint":
        state = {"transformer": asdict(model.config), "model": state}
    torch.save(state, tmp_path / "weights.pt")
    loaded = load_backbone(tmp_path / "weights.pt", dropout=0.3)
    assert loaded.config.dropout == 0.3 and loaded.config.layout == "T,H,W"
    assert torch.equal(loaded.eval()(clips())[0], model(clips())[0])


def test_load_backbone_is_told_what_the_shapes_of_a_state_dict_do_not_say(tmp_path):
    model = build("H|W,T", pre_norm=True, layers=2)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights.pt.* 1 heads do not fit.* give heads, layout"):
        load_backbone(tmp_path / "weights.pt")
    told = load_backbone(tmp_path / "weights.pt", heads=6, layout="H|W,T", pre_norm=True, dropout=0)
    assert told.config == model.config
    assert torch.allclose(told.double()(clips())[0], model(clips())[0])


@pytest.mark.parametrize("change, said", [
    (lambda state: state.pop("embedding.weight"), "it lacks 'embedding.weight'"),
    (lambda state: state.pop("layers.1.fc2.bias"), "layers.1.fc2.bias"),
    (lambda state: state.update({"layers.1.fc3.bias": torch.zeros(2)}), "layers.1.fc3.bias"),
    (lambda state: state.update({"layers.1.fc2.bias": torch.zeros(2)}), "layers.1.fc2.bias"),
    (lambda state: [state.update({f"layers.0.blocks.{i}.qkv.weight": torch.zeros(2)})
                    for i in (2, 3)], "no layout has 4 attention blocks")])
def test_a_name_that_does_not_fit_is_said(change, said, tmp_path):
    state = paper_like().state_dict()
    change(state)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=f"weights.pt.*{said}") as error:
        load_backbone(tmp_path / "weights.pt")
    assert len(str(error.value).splitlines()) == 1


def test_load_backbone_refuses_what_is_no_checkpoint_or_another_model_s(tmp_path):
    path = tmp_path / "some.pt"
    path.write_text("hello")
    with pytest.raises(UserError, match="some.pt"):
        load_backbone(path)
    for content in ({"weights": torch.zeros(2)},
                    {"transformer": asdict(build().config), "model": {}}):
        torch.save(content, path)
        with pytest.raises(UserError, match="some.pt"):
            load_backbone(path)
    with pytest.raises(UserError, match="none.pt"):
        load_backbone(tmp_path / "none.pt")
