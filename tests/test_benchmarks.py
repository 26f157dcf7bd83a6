import json
from unittest import mock

import memory
import pytest
import throughput
import torch
from conftest import call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import pretrain
from plumbing import kernels
from pretrain import Batch, Vimpac
from transformer import LAYOUTS, TransformerConfig


def build(layout, pre_norm=False):
    """-> a small model, clips, the positions of their hidden tokens."""
    torch.manual_seed(0)
    config = TransformerConfig(2, 24, 6, 4, 48, 3, 4, 5, 20, layout, pre_norm, dropout=0.0)
    tokens = torch.randint(20, (2, 3, 4, 5))
    hidden = (torch.rand(tokens.shape) < 0.3).flatten().nonzero().squeeze(1)
    return Vimpac(config, 16, 2), tokens, hidden


def compute(model, tokens, hidden):
    """-> logits of the hidden tokens, CLS."""
    cls, features = model.backbone(tokens, False)
    return model.predict_tokens(features, hidden), cls


@pytest.fixture
def restored(monkeypatch):
    """Puts back, after a test, what some ideas replace."""
    for name in ("dropout", "gelu_linear", "GPUS", "SHORT"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name))


IDEAS = ["logits", "CLS once", "GELU", "dropout", "kernel"]  # those that change the model's code


@pytest.mark.parametrize("layout, pre_norm",
                         [*((layout, False) for layout in LAYOUTS), ("T,H|W", True)])
@pytest.mark.parametrize("ideas", [*([idea] for idea in IDEAS), throughput.PLAIN])
def test_the_plain_version_computes_the_same(ideas, layout, pre_norm, restored):
    model, tokens, hidden = build(layout, pre_norm)
    model.projection_head.eval()  # a batch norm of two clips would enlarge rounding errors
    results = []
    for changes in ([], ideas):
        for idea in changes:
            throughput.change(model, idea)
        logits, cls = compute(model, tokens, hidden)
        outputs = logits, model.projection_head(cls)
        total = sum(output.square().sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(total, model.parameters())])
    for ours, plain in zip(*results):
        assert torch.allclose(ours, plain, atol=1e-5, rtol=1e-3)


class Recorder(TorchDispatchMode):
    """Writes down which operations torch runs, in order."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("idea", IDEAS)
def test_without_an_idea_the_model_does_other_work(idea, restored):
    model, tokens, hidden = build("T,H|W")
    for block in model.backbone.layers[0].blocks:
        block.dropout = 0.1

    def operations():
        with Recorder() as recorder:
            total = sum(output.sum() for output in compute(model, tokens, hidden))
            torch.autograd.grad(total, model.backbone.parameters())
        return recorder.operations

    before = operations()
    assert operations() == before
    throughput.change(model, idea)
    assert operations() != before


ROW = {"model": "", "changes": [], "preset": "toy", "layout": "T,H|W", "clip": "3x16",
       "precision": "fp32", "videos": 4, "vocab_size": 20, "device": "cpu", "contrast": 2,
       "micro_batch": 1, "activation_checkpointing": True}


@pytest.fixture
def no_matrix_product(monkeypatch):
    monkeypatch.setattr(throughput, "matrix_rate", lambda device, precision: 1e12)


@pytest.mark.parametrize("changes", [[], ["AdamW"]])
def test_a_step_is_measured_with_fused_adamw_or_without(changes, monkeypatch, no_matrix_product):
    fused = mock.Mock(wraps=torch._fused_adamw_)
    monkeypatch.setattr(torch, "_fused_adamw_", fused)
    assert throughput.measure({**ROW, "changes": changes}, steps=1)["ms"] > 0
    assert bool(fused.call_count) == (not changes)


def test_a_step_passes_groups_and_micro_batches_through_the_backbone(no_matrix_product):
    passes = []
    encode = Vimpac.encode

    def watched_encode(model, inputs, *rest):
        passes.append(len(inputs) // 2)
        return encode(model, inputs, *rest)

    with mock.patch.object(Vimpac, "encode", watched_encode):
        throughput.measure(ROW, steps=1)
    assert passes == [1] * 8 * 3  # 2 groups x 2 videos, each twice; two steps that warm up


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flop_are_those_that_torch_counts(layout):
    """Recomputing GELU adds none: it has no matrix product."""
    model, tokens, hidden = build(layout)
    with FlopCounterMode(display=False) as counter:
        logits, cls = compute(model, tokens, hidden)
        (logits.sum() + cls.sum()).backward()
    counted = counter.get_total_flops() / len(tokens)
    computed = throughput.flop(model.backbone.config, len(hidden) / len(tokens))
    assert computed == pytest.approx(counted, rel=0.02)


def test_the_command_prints_a_table_and_json_lines():
    flags = ("--presets toy --clips 3x32 --steps 1 --precisions fp32 --reference --no-loading "
             "--device cpu")
    done = call(throughput, *flags.split())
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    plain, ours = (json.loads(line) for line in lines if line.startswith("{"))
    assert plain["first_mask_loss"] == pytest.approx(ours["first_mask_loss"], rel=1e-4)
    assert ours["videos_per_second"] == pytest.approx(4000 / ours["ms"]) and 0 < ours["mfu"] < 1.2
    ratio = ours["videos_per_second"] / plain["videos_per_second"]
    assert f"{ratio:.2f}x" in next(line for line in lines if line.startswith("ours"))


def test_the_loader_job_measures_a_store_of_so_many_videos():
    assert throughput.measure_loader(100)["clips_per_second"] > 0


def test_tf32_is_refused_without_a_gpu():
    done = call(throughput, "--precisions", "tf32", "--device", "cpu")
    assert done.returncode == 2 and "tf32" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------- memory


def test_memory_counts_videos_precision_and_activation_checkpointing(monkeypatch):
    monkeypatch.setitem(pretrain.PRESETS, "toy", {**pretrain.PRESETS["toy"], "layers": 1})
    peak = memory.count("toy", "5x64", 2, False)
    assert peak > memory.count("toy", "5x64", 1, False)
    assert peak > memory.count("toy", "5x64", 2, True)
    assert peak < memory.count("toy", "5x64", 2, False, on_gpu=False)


def test_memory_computes_the_loss_of_the_model():
    """Its pass leaves out what fake tensors lack, and nothing that takes memory."""
    model, tokens, hidden = build("T,H|W")
    model.backbone.activation_checkpointing = True
    zeros = torch.zeros_like(tokens)[None].transpose(0, 1)  # (2, 1, T, H, W)
    mask = torch.zeros(zeros.numel(), dtype=torch.bool).scatter(0, hidden, True)
    loss, _, _ = model.encode(*model.to_device(Batch(zeros, zeros, mask.view(zeros.shape))))
    targets = torch.zeros_like(hidden)
    with mock.patch.object(torch.nn.functional, "cross_entropy") as cross_entropy:
        memory.encode(model, 1, hidden)
    logits = cross_entropy.call_args[0][0]
    assert torch.nn.functional.cross_entropy(logits, targets, reduction="sum").allclose(loss)


@pytest.mark.parametrize("card, most, largest", [
    (24, 128, 16), (24, 4, 4), (24, 6, 6), (4, 128, 1), (3, 128, 0), (80, 128, 64), (80, 48, 48)])
def test_memory_finds_the_largest_micro_batch_of_a_card(card, most, largest):
    """1 GB fixed, 1 GB a video, 0.12 GB of moments and buckets, 0.6 GB of CUDA; 90% usable."""
    assert memory.largest_micro_batch((2e9, 3e9), 10**7, card, most) == largest


@pytest.mark.parametrize("micro_batch, group, cards, checkpointing, text", [
    (128, 128, 1, False, "128 x 8"), (32, 128, 1, False, "32 x 32 +33%"),
    (16, 16, 8, False, "16 x 8"), (16, 16, 8, True, "16 x 8 +33% checkpointed"),
    (2, 16, 8, True, "2 x 64 +66% checkpointed"), (0, 128, 1, False, None)])
def test_memory_says_what_micro_batches_cost(micro_batch, group, cards, checkpointing, text):
    assert memory.cell(micro_batch, group, cards, checkpointing) == text
