"""VIMPAC's released checkpoints: keys, shapes, and what the models compute.

tests/expected has the released code's outputs with the weights of `released_state` below. A plain
model gives the outputs for all other sizes and layouts.
"""
import itertools
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import finetune
from contrastive import info_nce
from plumbing.cli import UserError
from pretrain import Vimpac
from transformer import LAYOUTS, load_backbone

EXPECTED = Path(__file__).parent / "expected"


def released_shapes(layers, dim, frames, side, patterns, pre_norm=False, half=False, hidden=256,
                    projection=2):
    """The keys and shapes of a released checkpoint.

    patterns: how many each block of a layer has. half: whether attention and MLP have half of the
    usual sizes, as in the large model.
    """
    attention, mlp = dim // (1 + half), 4 * dim // (1 + half)
    shapes = {"backbone.cls_param": (dim,), "backbone.embedding.weight": (8197, dim)}
    for axis, size in (("cls", 1), ("temporal", frames), ("height", side), ("width", side)):
        shapes[f"backbone.positional_embedding.{axis}_pos_embedding"] = (size, dim)

    def add(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    add("backbone.ln_post" if pre_norm else "backbone.ln_pre", dim)
    for i in range(layers):
        layer = f"backbone.transformer.resblocks.{i}"
        for b, count in enumerate(patterns):
            block = f"{layer}.attention_blocks.{b}"
            for p in range(count):
                for which in ("query", "key", "value"):
                    add(f"{block}.attentions.{p}.attention.{which}", attention // count, dim)
            out = block if pre_norm else f"{block}.output"
            add(f"{out}.dense", dim, attention)
            add(f"{out}.LayerNorm", dim)
        add(f"{layer}.mlp.c_fc", mlp, dim)
        add(f"{layer}.mlp.c_proj", dim, mlp)
        add(f"{layer}.ln", dim)
    add("mlm_head.transform.0", dim, dim)
    add("mlm_head.transform.2", dim)
    shapes["mlm_head.bias"] = (8197,)
    widths = [dim] + [hidden] * (projection - 1)
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        norm = f"cls_head.mlp.bn_{i}"
        add(f"cls_head.mlp.linear_{i}", after, before)
        add(norm, after)
        shapes |= {f"{norm}.running_mean": (after,), f"{norm}.running_var": (after,),
                   f"{norm}.num_batches_tracked": ()}
    add(f"cls_head.mlp.linear_{projection - 1}", 256, widths[-1], bias=False)
    return shapes


LAYER_NORMS = ("LayerNorm.weight", ".ln.weight", "ln_pre.weight", "ln_post.weight",
               "transform.2.weight")


def formula(key, shape, dtype=torch.float32):
    """sin(0.37 i + phase), scaled by the kind of tensor.

    The phase is the key's checksum modulo 1000.
    """
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    x = np.sin(0.37 * np.arange(np.prod(shape)) + zlib.crc32(key.encode()) % 1000).reshape(shape)
    if key.endswith(LAYER_NORMS) or ("bn_" in key and key.endswith(".weight")):
        x = 1 + 0.1 * x
    elif key.endswith("running_var"):
        x = 1 + 0.5 * x**2
    else:
        x = 0.05 * x
    return torch.from_numpy(x).to(dtype)


def released_state(dtype=torch.float32, **sizes):
    state = {key: formula(key, shape, dtype)
             for key, shape in released_shapes(**sizes).items()}
    return {**state, "mlm_head.decoder.weight": state["backbone.embedding.weight"],
            "mlm_head.decoder.bias": state["mlm_head.bias"]}


SMALL = dict(layers=2, dim=128, frames=5, side=8, patterns=(1, 2))


def test_the_released_model_to_four_digits(tmp_path):
    torch.save(released_state(**SMALL), tmp_path / "classifier.pt")
    model = Vimpac.from_released(tmp_path / "classifier.pt").eval()
    expected = np.load(EXPECTED / "expected_thw_small.npz")
    tokens = torch.from_numpy((7919 * np.arange(640) + 13) % 8192).reshape(2, 5, 8, 8)
    tokens[0, 1, :2, :3] = 8196  # MASK
    tokens[1, -1] = 8193  # PAD
    with torch.no_grad():
        cls, features = model.backbone(tokens)
        hidden = features.flatten(1, 3)[:, expected["hidden_positions"]]
        logits = model.token_head(hidden, model.backbone.embedding.weight)
        projection = model.projection_head(cls)
    for ours, name in ((cls, "cls"), (hidden, "hidden"), (projection, "projection"),
                       (logits[..., :32], "logits_first32")):
        assert np.abs(ours.numpy() - expected[name]).max() < 1e-4, name
    assert np.array_equal(logits.argmax(dim=-1).numpy(), expected["logits_argmax"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_released_names_are_read_whatever_wrapped_the_model(prefix, tmp_path):
    state = released_state(**SMALL)
    torch.save(state, tmp_path / "plain.pt")
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "wrapped.pt")
    plain, wrapped = (Vimpac.from_released(tmp_path / f"{name}.pt").state_dict()
                      for name in ("plain", "wrapped"))
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)
    wrapped, plain = (load_backbone(tmp_path / f"{name}.pt") for name in ("wrapped", "plain"))
    assert wrapped.config == plain.config


def test_the_released_contrastive_loss_and_its_gradient():
    expected = np.load(EXPECTED / "expected_contrastive.npz")
    z = torch.from_numpy(expected["z"]).requires_grad_()
    loss = 0.2 * info_nce(z[:12], z[12:], temperature=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(float(expected["loss"]), abs=1e-4)
    assert np.abs(z.grad.numpy() - expected["grad"]).max() < 1e-4


def plain_backbone(state, tokens, layout, pre_norm):
    """A clip (T, H, W), V = 8192 -> (1 + T*H*W, d), CLS first.

    Computes one sequence at a time, from the file's own keys.
    """
    def linear(x, name):
        return x @ state[f"{name}.weight"].t() + state[f"{name}.bias"]

    def norm(x, name):
        variance = x.var(dim=-1, unbiased=False, keepdim=True)
        x = (x - x.mean(dim=-1, keepdim=True)) / (variance + 1e-12).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attend(x, name, pattern, head):  # (N, d) -> (N, a)
        other = [i for i, axis in enumerate("THW") if axis not in pattern.split("x")]
        same = (positions[:, None, other] == positions[:, other]).all(dim=-1)
        sequences = same.unique(dim=0)  # (S, T*H*W)
        parts = []
        qkv = (linear(x, f"{name}.{kind}").split(head, dim=1) for kind in ("query", "key", "value"))
        for q, k, v in zip(*qkv):
            out = torch.zeros_like(v)
            for rows in F.pad(sequences, (1, 0), value=True):  # CLS joins every sequence
                scores = q[rows] @ k[rows & ~pad].t() / head**0.5
                out[rows] += scores.softmax(dim=1) @ v[rows & ~pad]
            out[0] /= len(sequences)
            parts.append(out)
        return torch.cat(parts, dim=1)

    def position_table(axis):
        return state[f"backbone.positional_embedding.{axis}_pos_embedding"]

    positions = torch.cartesian_prod(*map(torch.arange, tokens.shape))  # (T*H*W, 3)
    pad = F.pad(tokens.flatten() == 8193, (1, 0))
    x = state["backbone.embedding.weight"][tokens.flatten()]
    for axis, index in zip(("temporal", "height", "width"), positions.t()):
        x = x + position_table(axis)[index]
    x = torch.cat([state["backbone.cls_param"] + position_table("cls"), x])
    x = x if pre_norm else norm(x, "backbone.ln_pre")
    for i in range(1 + max(int(key.split(".")[3]) for key in state if ".resblocks." in key)):
        layer = f"backbone.transformer.resblocks.{i}"
        for b, patterns in enumerate(layout.split(",")):
            block = f"{layer}.attention_blocks.{b}"
            out = block if pre_norm else f"{block}.output"
            y = norm(x, f"{out}.LayerNorm") if pre_norm else x
            head = 64 * state[f"{out}.dense.weight"].shape[1] // x.shape[1]
            parts = [attend(y, f"{block}.attentions.{p}.attention", pattern, head)
                     for p, pattern in enumerate(patterns.split("|"))]
            y = y + linear(torch.cat(parts, dim=1), f"{out}.dense")
            x = y if pre_norm else norm(y, f"{out}.LayerNorm")
        hidden = linear(norm(x, f"{layer}.ln") if pre_norm else x, f"{layer}.mlp.c_fc")
        y = x + linear(F.gelu(hidden), f"{layer}.mlp.c_proj")
        x = y if pre_norm else norm(y, f"{layer}.ln")
    return norm(x, "backbone.ln_post") if pre_norm else x


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("layout, half",
                         [*((layout, False) for layout in LAYOUTS), ("T,H|W", True)])
def test_released_weights_compute_what_a_plain_model_computes(layout, half, pre_norm, tmp_path):
    patterns = [block.count("|") + 1 for block in layout.split(",")]
    state = released_state(layers=2, dim=64 * max(2, *patterns), frames=3, side=4,
                           patterns=patterns, pre_norm=pre_norm, half=half)
    torch.save(state, tmp_path / "classifier.pt")
    tokens = torch.from_numpy((7919 * np.arange(96) + 13) % 8192).reshape(2, 3, 4, 4)
    tokens[0, 1, :2, :3] = 8196  # MASK
    tokens[1, -1] = 8193  # PAD
    with torch.no_grad():
        cls, features = load_backbone(tmp_path / "classifier.pt").eval()(tokens)
    state = {key: value.double() for key, value in state.items()}
    plain = torch.stack([plain_backbone(state, clip, layout, pre_norm) for clip in tokens])
    assert (cls - plain[:, 0]).abs().max() < 1e-4
    assert (features.flatten(1, 3) - plain[:, 1:]).abs().max() < 1e-4


@pytest.mark.parametrize("sizes, layout, heads, head_dim", [
    (SMALL, "T,H|W", 2, 64),
    (dict(layers=3, dim=256, frames=10, side=4, patterns=(1, 2), half=True, projection=3),
     "T,H|W", 4, 32),
    (dict(layers=2, dim=128, frames=5, side=4, patterns=(1, 1, 1), pre_norm=True),
     "T,H,W", 2, 64),
    (dict(layers=1, dim=192, frames=5, side=4, patterns=(3,)), "T|H|W", 3, 64),
    (dict(layers=1, dim=128, frames=5, side=4, patterns=(2, 1)), "H|W,T", 2, 64),
    (dict(layers=1, dim=64, frames=5, side=4, patterns=(1,)), "TxHxW", 1, 64)])
def test_sizes_and_layout_are_read_off_the_shapes(tmp_path, sizes, layout, heads, head_dim):
    torch.save(released_state(**sizes), tmp_path / "classifier.pt")
    model = Vimpac.from_released(tmp_path / "classifier.pt").eval()
    config = model.backbone.config
    assert (config.layout, config.heads, config.head_dim) == (layout, heads, head_dim)
    assert config.pre_norm == sizes.get("pre_norm", False)
    assert (config.layers, config.dim) == (sizes["layers"], sizes["dim"])
    tokens = torch.randint(8192, (1, sizes["frames"], sizes["side"], sizes["side"]))
    cls, features = model.backbone(tokens)
    logits = model.predict_tokens(features, torch.tensor([0, 7]))
    assert logits.shape == (2, 8197) and logits.isfinite().all()
    assert model.projection_head(cls).shape == (1, 256)


@pytest.mark.parametrize("read", [Vimpac.from_released, load_backbone])
def test_what_does_not_fit_is_named(read, tmp_path):
    state = released_state(**SMALL)
    block = "backbone.transformer.resblocks.1"
    third_pattern = {key.replace(".1.attentions.1.", ".1.attentions.2."): value
                     for key, value in state.items() if ".1.attentions.1." in key}
    wrong = [({f"{block}.ln.bias": None}, f"lacks '{block}.ln.bias'"),
             ({f"{block}.extra.bias": torch.zeros(2)}, f"no place for {block}.extra.bias"),
             ({f"{block}.ln.bias": torch.zeros(2)}, "layers.1.norm.bias"),
             (third_pattern, r"\[1, 3\] patterns")]
    if read is not load_backbone:
        variance = "cls_head.mlp.bn_0.running_var"
        wrong += [({"mlm_head.bias": None}, "lacks 'mlm_head.bias'"),
                  ({variance: None}, f"lacks '{variance}'"),
                  ({"head.weight": torch.zeros(2)}, "no place for head.weight"),
                  ({"mlm_head.bias": torch.zeros(2)}, "bias")]
    for changes, said in wrong:
        changed = {key: value for key, value in (state | changes).items() if value is not None}
        torch.save(changed, tmp_path / "classifier.pt")
        with pytest.raises(UserError, match=f"(?s)classifier.pt.*{said}"):
            read(tmp_path / "classifier.pt")


def test_fine_tuning_takes_released_weights_and_classifiers(tmp_path):
    state = {key: value for key, value in released_state(**SMALL).items()
             if key.startswith("backbone.")}
    state |= {"cls_fc.weight": torch.randn(7, 128), "cls_fc.bias": torch.randn(7)}
    torch.save(state, tmp_path / "classifier.pt")
    model = finetune.Classifier(load_backbone(tmp_path / "classifier.pt"), 7)
    model.classifier.load_state_dict(finetune.load_classifier(tmp_path / "classifier.pt"))
    assert torch.equal(model.classifier.weight, state["cls_fc.weight"])
    assert torch.equal(model.backbone.embedding.weight, state["backbone.embedding.weight"])


