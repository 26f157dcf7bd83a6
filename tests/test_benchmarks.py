import json
from unittest import mock

import pytest
import throughput
import torch
from conftest import call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import transformer
from plumbing import kernels
from pretrain import Vimpac
from transformer import LAYOUTS, TransformerConfig


def build(layout, pre_norm=False):
    torch.manual_seed(0)
    config = TransformerConfig(2, 24, 6, 4, 48, 3, 4, 5, 20, layout, pre_norm, dropout=0.0)
    tokens = torch.randint(20, (2, 3, 4, 5))
    return Vimpac(config, 16, 2), tokens, (torch.rand(tokens.shape) < 0.3).flatten().nonzero().squeeze(1)


@pytest.fixture
def restored(monkeypatch):
    """Puts back, after a test, what some ideas replace."""
    for module, names in ((transformer, ("dropout", "gelu_linear")), (kernels, ("dropout", "FUSED"))):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))


IDEAS = ["logits", "CLS once", "GELU", "dropout", "kernel"]  # those that change the model's code


@pytest.mark.parametrize("layout, pre_norm", [*((layout, False) for layout in LAYOUTS), ("T,H|W", True)])
@pytest.mark.parametrize("ideas", [*([idea] for idea in IDEAS), throughput.PLAIN])
def test_the_plain_version_computes_the_same(ideas, layout, pre_norm, restored):
    model, tokens, hidden = build(layout, pre_norm)
    model.projection_head.eval()  # a batch norm of two clips would enlarge every rounding
    results = []
    for changes in ([], ideas):
        for idea in changes:
            throughput.change(model, idea)
        logits, cls = model(tokens, hidden)
        outputs = logits, model.projection_head(cls)
        gradients = torch.autograd.grad(sum(out.square().sum() for out in outputs), model.parameters())
        results.append([*outputs, *gradients])
    for ours, plain in zip(*results):
        assert torch.allclose(ours, plain, atol=1e-5, rtol=1e-3)


class Recorder(TorchDispatchMode):
    """Writes down what torch computes, in order."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("idea", IDEAS)
def test_every_idea_taken_back_is_other_work(idea, restored):
    model, tokens, hidden = build("T,H|W")
    for block in model.backbone.layers[0].blocks:
        block.dropout = 0.1

    def operations():
        with Recorder() as recorder:
            torch.autograd.grad(sum(out.sum() for out in model(tokens, hidden)), model.backbone.parameters())
        return recorder.operations
    before = operations()
    assert operations() == before
    throughput.change(model, idea)
    assert operations() != before


@pytest.mark.parametrize("changes", [[], ["AdamW"]])
def test_a_step_is_measured_with_adamw_fused_or_not(changes, monkeypatch):
    monkeypatch.setattr(throughput, "matrix_rate", lambda device, dtype: 1e12)
    fused = mock.Mock(wraps=torch._fused_adamw_)
    monkeypatch.setattr(torch, "_fused_adamw_", fused)
    row = {"model": "", "changes": changes, "preset": "toy", "layout": "T,H|W", "clip": "3x16", "precision": "fp32",
           "videos": 2, "vocab_size": 20, "device": "cpu", "contrast": 0, "micro_batch": 1, "recompute": True}
    assert throughput.measure(row, 1)["ms"] > 0
    assert bool(fused.call_count) == (not changes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flop_are_those_that_torch_counts(layout):
    """Less the projection head's, which the formula leaves out, and the recomputation, which does no matrix product."""
    model, tokens, hidden = build(layout)
    with FlopCounterMode(display=False) as counter:
        logits, _ = model(tokens, hidden)
        logits.sum().backward()
    head = sum(counter.get_flop_counts().get("Vimpac.projection_head", {}).values())
    counted = (counter.get_total_flops() - head) / len(tokens)
    assert throughput.flop(model.backbone.config, len(hidden) / len(tokens)) == pytest.approx(counted, rel=0.02)


def test_the_command_prints_a_table_and_json_lines():
    flags = "--presets toy --clips 3x32 --steps 1 --precisions fp32 --reference --no-loading --device cpu"
    done = call(throughput, *flags.split())
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    plain, ours = (json.loads(line) for line in lines if line.startswith("{"))
    assert plain["first_mask_loss"] == pytest.approx(ours["first_mask_loss"], rel=1e-4)
    assert ours["videos_per_second"] == pytest.approx(4000 / ours["ms"]) and 0 < ours["mfu"] < 1.2
    assert f"{ours['videos_per_second'] / plain['videos_per_second']:.2f}x" in next(x for x in lines if x[:4] == "ours")


def test_tf32_is_refused_without_a_gpu():
    done = call(throughput, "--precisions", "tf32", "--device", "cpu")
    assert done.returncode == 2 and "tf32" in done.stderr and len(done.stderr.splitlines()) == 1
