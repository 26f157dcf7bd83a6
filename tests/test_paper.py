"""The paper's own numbers: Table 2, Tables 3, 6 and 13, and what the released code computes on formula weights.

tests/expected holds the released code's outputs, made once with the weights of `released_state` below.
"""
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune
from contrastive import info_nce
from masking import PAPER_TABLE_2, block_mask, blocks_for, expected_ratio
from pretrain import PRESETS, Config, Vimpac
from transformer import PAPER_SIZES, TransformerConfig, VideoTransformer, count_parameters, load_backbone

EXPECTED = Path(__file__).parent / "expected"
CELLS = [(t, s, n, ratio) for (t, s), (row, _) in PAPER_TABLE_2.items() for n, ratio in zip(range(4, 9), row)]


@pytest.mark.parametrize("frames, pixels, blocks, percent", CELLS)
def test_table_2(frames, pixels, blocks, percent):
    side = pixels // 8
    exact = 100 * expected_ratio(frames, side, side, blocks)
    assert exact == pytest.approx(percent, abs=0.4)
    generator = torch.Generator().manual_seed(blocks)
    sampled = np.mean([100 * block_mask(1000, frames, side, side, blocks, generator=generator).float().mean().item()
                       for _ in range(16)])
    assert sampled == pytest.approx(exact, abs=0.3)


@pytest.mark.parametrize("frames, pixels", PAPER_TABLE_2)
def test_table_2_s_bold_cells(frames, pixels):
    assert blocks_for(frames, pixels // 8, pixels // 8) == PAPER_TABLE_2[frames, pixels][1]


@pytest.mark.parametrize("where, name, differences, millions", PAPER_SIZES)
def test_tables_3_6_and_13_s_sizes(where, name, differences, millions):
    if name == "small, T,HxW":
        millions = 29.4  # the paper prints 27.1, but describes as many blocks as T,H|W has
    config = TransformerConfig(**differences)
    assert count_parameters(config) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("preset, millions", [("small", 29.4), ("base", 119.7), ("large", 210.1)])
def test_table_3_s_presets(preset, millions):
    config = Config(**{"preset": preset, **PRESETS[preset]})
    assert count_parameters(config.transformer(8192, 16, 16)) / 1e6 == pytest.approx(millions, abs=0.1)


def test_table_4_s_pre_training_numbers():
    small, large = (Config(**{"preset": name, **PRESETS[name]}) for name in ("small", "large"))
    assert (small.lr, small.warmup, small.batch, small.epochs, small.projection_hidden) == (1e-3, 0.1, 1024, 10, 2048)
    assert (large.lr, large.warmup, large.batch, large.epochs, large.projection_layers) == (3e-4, 0.05, 1024, 90, 3)
    assert small.weight_decay == large.weight_decay == 0.05 and small.alpha == 1 and small.gamma == 0.2
    updates = 1_238_791 * small.epochs / small.batch
    assert updates == pytest.approx(12_000, rel=0.02)


def released_shapes(layers, dim, frames, side, patterns, pre_norm=False, half=False, hidden=256, projection=2):
    """The keys and shapes of a released checkpoint. patterns: how many each block of a layer has."""
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
    for i, (before, after) in enumerate(zip(widths, widths[1:])):
        add(f"cls_head.mlp.linear_{i}", after, before)
        add(f"cls_head.mlp.bn_{i}", after)
        shapes |= {f"cls_head.mlp.bn_{i}.running_mean": (after,), f"cls_head.mlp.bn_{i}.running_var": (after,),
                   f"cls_head.mlp.bn_{i}.num_batches_tracked": ()}
    add(f"cls_head.mlp.linear_{projection - 1}", 256, widths[-1], bias=False)
    return shapes


def formula(key, shape):
    """sin(0.37 i + phase), scaled by what the tensor is; the phase is the key's checksum modulo 1000."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    x = np.sin(0.37 * np.arange(np.prod(shape)) + zlib.crc32(key.encode()) % 1000).reshape(shape)
    norm = key.endswith(("LayerNorm.weight", ".ln.weight", "ln_pre.weight", "ln_post.weight", "transform.2.weight"))
    if norm or ("bn_" in key and key.endswith(".weight")):
        x = 1 + 0.1 * x
    else:
        x = 1 + 0.5 * x ** 2 if key.endswith("running_var") else 0.05 * x
    return torch.from_numpy(x).float()


def released_state(**sizes):
    state = {key: formula(key, shape) for key, shape in released_shapes(**sizes).items()}
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


def test_the_released_contrastive_loss_and_its_gradient():
    expected = np.load(EXPECTED / "expected_contrastive.npz")
    z = torch.from_numpy(expected["z"]).requires_grad_()
    loss = 0.2 * info_nce(z[:12], z[12:], temperature=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(float(expected["loss"]), abs=1e-4)
    assert np.abs(z.grad.numpy() - expected["grad"]).max() < 1e-4


@pytest.mark.parametrize("sizes, layout, heads, head_dim", [
    (SMALL, "T,H|W", 2, 64),
    (dict(layers=3, dim=256, frames=10, side=4, patterns=(1, 2), half=True, projection=3), "T,H|W", 4, 32),
    (dict(layers=2, dim=128, frames=5, side=4, patterns=(1, 1, 1), pre_norm=True), "T,H,W", 2, 64),
    (dict(layers=1, dim=192, frames=5, side=4, patterns=(3,)), "T|H|W", 3, 64),
    (dict(layers=1, dim=128, frames=5, side=4, patterns=(2, 1)), "H|W,T", 2, 64),
    (dict(layers=1, dim=64, frames=5, side=4, patterns=(1,)), "TxHxW", 1, 64)])
def test_sizes_and_layout_are_read_off_the_shapes(tmp_path, sizes, layout, heads, head_dim):
    torch.save(released_state(**sizes), tmp_path / "classifier.pt")
    model = Vimpac.from_released(tmp_path / "classifier.pt").eval()
    config = model.backbone.config
    assert (config.layout, config.heads, config.head_dim, config.pre_norm, config.layers, config.dim) == \
        (layout, heads, head_dim, sizes.get("pre_norm", False), sizes["layers"], sizes["dim"])
    tokens = torch.randint(8192, (1, sizes["frames"], 4 if sizes is not SMALL else 8, 4 if sizes is not SMALL else 8))
    logits, projection = model(tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert logits.isfinite().all() and projection.shape == (1, 256)


def test_a_missing_and_a_left_over_tensor_are_named(tmp_path):
    state = released_state(**SMALL)
    for change in ("backbone.transformer.resblocks.1.ln.bias", "cls_head.mlp.bn_0.running_var", "mlm_head.bias"):
        torch.save({key: value for key, value in state.items() if key != change}, tmp_path / "classifier.pt")
        with pytest.raises(ValueError, match=change):
            Vimpac.from_released(tmp_path / "classifier.pt")
    for change in ("backbone.transformer.resblocks.1.extra.bias", "head.weight"):
        torch.save({**state, change: torch.zeros(2)}, tmp_path / "classifier.pt")
        with pytest.raises(ValueError, match=change):
            Vimpac.from_released(tmp_path / "classifier.pt")


def test_fine_tuning_takes_released_weights_and_classifiers(tmp_path):
    state = {key: value for key, value in released_state(**SMALL).items() if key.startswith("backbone.")}
    state |= {"cls_fc.weight": torch.randn(7, 128), "cls_fc.bias": torch.randn(7)}
    torch.save(state, tmp_path / "classifier.pt")
    model = finetune.Classifier(load_backbone(tmp_path / "classifier.pt"), 7)
    model.load_classifier(tmp_path / "classifier.pt")
    assert torch.equal(model.classifier.weight, state["cls_fc.weight"])
    assert torch.equal(model.backbone.embedding.weight, state["backbone.embedding.weight"])


def test_start_weights_are_as_small_as_the_paper_says():
    torch.manual_seed(0)
    model = VideoTransformer(TransformerConfig(layers=2, dim=256, heads=4, mlp_dim=512, vocab_size=500, frames=64,
                                               height=64, width=64))
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.layers[0].expand.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.time.std().item() == pytest.approx(0.02 / 3 ** 0.5, rel=0.05)
    pre = VideoTransformer(TransformerConfig(layers=2, dim=256, heads=4, mlp_dim=512, pre_norm=True))
    assert pre.layers[0].contract.weight.std().item() == pytest.approx(0.02 / 6 ** 0.5, rel=0.05)
    assert pre.layers[0].expand.bias.abs().max() == 0
