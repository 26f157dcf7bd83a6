import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import transformer
from conftest import ROOT
from pretrain import Vimpac
from transformer import LAYOUTS, TransformerConfig

sys.path.insert(0, str(ROOT / "benchmarks"))

import throughput  # noqa: E402


def build(layout):
    torch.manual_seed(0)
    config = TransformerConfig(2, 24, 6, 4, 48, 3, 4, 5, 20, layout, dropout=0.0)
    tokens = torch.randint(20, (2, 3, 4, 5))
    return Vimpac(config, 16, 2), tokens, torch.rand(tokens.shape) < 0.3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ideas", [["logits"], ["CLS once"], ["GELU"], ["dropout"], ["kernel"], throughput.PLAIN])
def test_the_plain_version_computes_the_same(ideas, layout, monkeypatch):
    for name in ("dropout", "FUSED"):  # what some ideas replace
        monkeypatch.setattr(transformer, name, getattr(transformer, name))
    model, tokens, mask = build(layout)
    model.projection_head.eval()  # a batch norm of two clips would enlarge every rounding
    results = []
    for changes in ([], ideas):
        for idea in changes:
            throughput.change(model, idea)
        outputs = model(tokens, mask)
        gradients = torch.autograd.grad(sum(out.square().sum() for out in outputs), model.parameters())
        results.append([*outputs, *gradients])
    for ours, plain in zip(*results):
        assert torch.allclose(ours, plain, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flop_are_those_that_torch_counts(layout):
    """Less the projection head's, which the formula leaves out, and the recomputation, which does no matrix product."""
    model, tokens, mask = build(layout)
    with FlopCounterMode(display=False) as counter:
        logits, _ = model(tokens, mask)
        logits.sum().backward()
    head = sum(counter.get_flop_counts().get("Vimpac.projection_head", {}).values())
    masked = mask.sum().item() / len(tokens)
    counted = (counter.get_total_flops() - head) / len(tokens)
    assert throughput.flop(model.backbone.config, masked) == pytest.approx(counted, rel=0.02)


def test_the_command_prints_a_table_and_json_lines():
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/throughput.py"), "--presets", "toy", "--clips", "3x32",
                           "--steps", "1", "--precisions", "fp32", "--reference", "--no-loading", "--device",
                           "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    plain, ours = (json.loads(line) for line in lines if line.startswith("{"))
    assert plain["first_mask_loss"] == pytest.approx(ours["first_mask_loss"], rel=1e-4)
    assert ours["videos_per_second"] == pytest.approx(4000 / ours["ms"]) and 0 < ours["mfu"] < 1.2
    assert f"{ours['videos_per_second'] / plain['videos_per_second']:.2f}x" in next(x for x in lines if x[:4] == "ours")
