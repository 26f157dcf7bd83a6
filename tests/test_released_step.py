"""The released training loop's first step, recorded in float64: losses and gradients to the digit.

tests/expected/expected_step.npz holds its losses, and of all 82 parameters the gradient's norm and
eight samples, for the weights of `test_released.released_state` and 8 videos.
"""
import numpy as np
import pytest
import torch
from test_released import EXPECTED, released_shapes, released_state

import contrastive
import masking
import pretrain
from plumbing import released
from pretrain import Config, Vimpac

SIZES = dict(layers=2, dim=128, frames=5, side=4, patterns=(1, 2))
LOSSES = {"loss": 1e-12, "mask_loss": 1e-12, "contrastive_loss": 1e-12,
          "mask_accuracy": 1e-7}  # relative tolerances; the accuracy was recorded in float32
EXPECTED_STEP = np.load(EXPECTED / "expected_step.npz")
BEFORE_BATCH_NORM = "cls_head.mlp.linear_0.bias"  # whose true gradient is 0


@pytest.fixture
def step(tmp_path, monkeypatch):
    """-> a function from the micro-batch to the terms of Eq. 6 and {released name: gradient}."""
    state = released_state(**SIZES, dtype=torch.float64)
    torch.save(state, tmp_path / "classifier.pt")
    masks = torch.from_numpy(EXPECTED_STEP["masks"]).flatten(0, 1)
    monkeypatch.setitem(masking.KINDS, "recorded", lambda *_: masks)

    def run(micro_batch):
        torch.set_default_dtype(torch.float64)
        model = Vimpac.from_released(tmp_path / "classifier.pt").train()
        for module in model.modules():
            module.dropout = 0.0
        model.backbone.config.dropout = 0.0
        config = Config(mask="recorded", alpha=1.0, gamma=0.2, precision="fp32", dropout=0.0,
                        micro_batch=micro_batch)
        clips = torch.from_numpy(EXPECTED_STEP["clips"].astype(np.int64))
        terms = pretrain.compute_losses(config, 8192, torch.device("cpu"), model, clips, None)
        terms["loss"].backward()
        return {name: terms[name].item() for name in LOSSES}, released_gradients(model)

    yield run
    torch.set_default_dtype(torch.float32)


def released_gradients(model):
    """A model's gradients under the released names.

    Each number of a released checkpoint gets an index; loading them shows where each one goes.
    """
    shapes = {name: shape for name, shape in released_shapes(**SIZES).items()
              if "running" not in name and "num_batches" not in name}
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    indices = dict(zip(shapes, torch.arange(sum(sizes)).split(sizes)))
    state = {name: indices[name].view(shape) for name, shape in shapes.items()}
    buffers = {name: torch.zeros(shape) for name, shape in released_shapes(**SIZES).items()
               if name not in shapes}
    state |= buffers
    ours = {f"token_head.{k}": v for k, v in released.take_token_head(state).items()}
    ours |= {f"projection_head.{k}": v for k, v in released.take_projection_head(state)[1].items()}
    ours |= {f"backbone.{k}": v for k, v in released.take_tensors(state, 2, "T,H|W", False).items()}
    everything = torch.zeros(sum(sizes), dtype=torch.float64)
    for name, p in model.named_parameters():
        everything[ours[name].flatten()] = p.grad.flatten()
    return {name: everything[index] for name, index in indices.items()}


@pytest.mark.parametrize("micro_batch", [8, 3])
def test_losses_and_gradients_equal_the_released_ones(step, micro_batch):
    losses, gradients = step(micro_batch)
    for name, tolerance in LOSSES.items():
        assert losses[name] == pytest.approx(float(EXPECTED_STEP[name]), rel=tolerance), name
    names = [str(name) for name in EXPECTED_STEP["names"]]
    assert len(names) == 82 and set(names) == set(gradients)
    for name, norm, samples in zip(names, EXPECTED_STEP["norms"], EXPECTED_STEP["samples"]):
        if name == BEFORE_BATCH_NORM:
            continue
        gradient = gradients[name]
        # sums that cancel, such as those of a key's bias, are nothing but rounding
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-9, abs=1e-10), name
        chosen = gradient[7919 * torch.arange(8) % len(gradient)].numpy()
        assert np.allclose(chosen, samples, rtol=1e-9, atol=1e-9 * norm + 1e-10), name
    total = sum(gradient.square().sum() for gradient in gradients.values()).sqrt().item()
    assert total == pytest.approx(float(EXPECTED_STEP["gradient_norm"]), rel=1e-9)


@pytest.mark.parametrize("spoil", ["sign", "weight", "mean", "part"])
def test_a_wrong_step_would_be_noticed(step, monkeypatch, spoil):
    """A sign of Eq. 4, a weight of Eq. 6, the mean of Eq. 1, batch norm over parts of a group."""
    info_nce, forward = contrastive.info_nce, contrastive.ProjectionHead.forward
    if spoil == "sign":
        monkeypatch.setattr(pretrain, "info_nce", lambda a, b, t: info_nce(a, -b, t))
    elif spoil == "weight":
        monkeypatch.setattr(pretrain, "info_nce", lambda a, b, t: info_nce(a, b, t) / 2)
    elif spoil == "mean":
        monkeypatch.setattr(pretrain, "sum_over_all", lambda hidden: hidden + 1)
    else:
        monkeypatch.setattr(contrastive.ProjectionHead, "forward", lambda head, x: torch.cat(
            [forward(head, part) for part in x.chunk(2)]))
    with pytest.raises(AssertionError):
        test_losses_and_gradients_equal_the_released_ones(step, 8)
