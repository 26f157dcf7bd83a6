"""The paper's own numbers: Tables 2, 3, 4, 6 and 13, Appendix A.

Those of the released code are in test_released.py.
"""
import numpy as np
import pytest
import torch

import finetune
from masking import PAPER_TABLE_2, block_mask, blocks_for, expected_ratio
from pretrain import PRESETS, Config, Vimpac
from transformer import PAPER_SIZES, TransformerConfig, count_parameters

CELLS = [(frames, pixels, blocks, percent)
         for (frames, pixels), (row, _) in PAPER_TABLE_2.items()
         for blocks, percent in zip(range(4, 9), row)]


@pytest.mark.parametrize("frames, pixels, blocks, percent", CELLS)
def test_table_2(frames, pixels, blocks, percent):
    ratio = expected_ratio(frames, pixels // 8, pixels // 8, blocks)
    assert 100 * ratio == pytest.approx(percent, abs=0.2)


@pytest.mark.parametrize("frames, pixels", PAPER_TABLE_2)
def test_table_2_s_bold_cells_are_chosen_and_sampled(frames, pixels):
    row, bold = PAPER_TABLE_2[frames, pixels]
    grid = frames, pixels // 8, pixels // 8
    assert blocks_for(*grid) == bold
    generator = torch.Generator().manual_seed(0)
    masks = (block_mask(250, *grid, bold, generator=generator) for _ in range(16))
    ratio = np.mean([mask.float().mean().item() for mask in masks])
    assert 100 * ratio == pytest.approx(row[bold - 4], abs=0.3)


@pytest.mark.parametrize("where, name, differences, millions", PAPER_SIZES)
def test_tables_3_6_and_13_s_sizes(where, name, differences, millions):
    if name == "small, T,HxW":
        millions = 29.4  # the paper prints 27.1, but describes as many blocks as T,H|W has
    config = TransformerConfig(**differences)
    assert count_parameters(config) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("preset, millions", [("small", 29.4), ("base", 119.7), ("large", 210.1)])
def test_table_3_s_presets(preset, millions):
    config = Config(**{"preset": preset, **PRESETS[preset]})
    parameters = count_parameters(config.transformer(8192, 16, 16))
    assert parameters / 1e6 == pytest.approx(millions, abs=0.1)


def test_table_4_s_pre_training_numbers():
    small, large, second = (Config(**{"preset": name, **PRESETS[name]})
                            for name in ("small", "large", "large256"))
    assert (small.lr, small.warmup, small.batch, small.epochs) == (1e-3, 0.1, 1024, 10)
    assert (large.lr, large.warmup, large.batch) == (3e-4, 0.05, 1024)
    assert small.projection_hidden == 2048 and large.projection_layers == 3
    assert (large.epochs, large.stop_after, second.epochs, second.stop_after) == (100, 90, 100, 0)
    assert (small.contrast, large.contrast, second.contrast) == (128, 256, 128)
    assert second.frame_size == 256
    assert small.weight_decay == large.weight_decay == 0.05
    assert small.alpha == 1 and small.gamma == 0.2
    updates = 1_238_791 * small.epochs / small.batch
    assert updates == pytest.approx(12_000, rel=0.02)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("times", [1, 3])  # the paper's 0.02, or as wide as asked
def test_start_weights_are_as_small_as_appendix_a_says(pre_norm, times):
    torch.manual_seed(0)
    wider = {} if times == 1 else {"init_std": times * 0.02}
    config = TransformerConfig(layers=2, dim=256, heads=4, mlp_dim=512, vocab_size=500, frames=64,
                               height=64, width=64, pre_norm=pre_norm, **wider)
    model = Vimpac(config, 128, 3)
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert (p == name.endswith("weight")).all(), name
        else:
            narrower = 3 if name.endswith((".time", ".row", ".column")) else 1
            if pre_norm and ".layers." in name and name.endswith((".out.weight", ".fc2.weight")):
                narrower = 2 * 3  # additions to the residual
            std = times * 0.02 / narrower**0.5
            assert p.std().item() == pytest.approx(std, rel=0.12), name
            assert abs(p.mean().item()) < times * 0.004, name


@pytest.mark.parametrize("name", ["ucf101", "hmdb51", "diving48", "ssv2", "kinetics400"])
def test_fine_tuning_for_the_analyses_and_for_table_1(name):
    analyses, results = finetune.PRESETS[name], finetune.PRESETS[f"{name}-results"]
    assert analyses["clips"] == 2 and "frames" not in analyses
    assert (results["frames"], results["clips"], results["fps"]) == (10, 10, 4.0)
    assert results["epochs"] == analyses["epochs"] and results["batch"] == analyses["batch"]
