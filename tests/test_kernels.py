import itertools

import pytest
import torch
import torch.nn.functional as F

from plumbing import kernels
from transformer import TransformerConfig, VideoTransformer


@pytest.fixture
def launches(monkeypatch):
    """The masks that the fused kernel is launched with; it is still launched."""
    masks, launch = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, dropout_p=0.0):
        masks.append(attn_mask)
        return launch(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return masks


def one_sequence(q, k, v, ignore):
    """softmax(q k^T / sqrt(a)) v of one head over the keys that count: (L, a) each."""
    k, v = k[~ignore], v[~ignore]
    return (q @ k.t() / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("short, limit, count", [(6, 7, 0), (5, 65_535, 1), (5, 7, 6)])
def test_attention_in_any_number_of_kernels_is_its_equation(short, limit, count, padded, launches,
                                                            monkeypatch):
    """On a GPU, as far as the choice of kernels goes: sequences of 6 are short, or they are not."""
    monkeypatch.setattr(kernels, "GPUS", ("cpu",))
    monkeypatch.setattr(kernels, "SHORT", short)
    monkeypatch.setattr(kernels, "MOST_SEQUENCES", limit)
    torch.manual_seed(0)
    # 2 x 4 x 5 sequences of 6
    inputs = torch.randn(3, 2, 4, 5, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    ignore = torch.rand(2, 4, 5, 6) < 0.4
    ignore[..., 0], ignore[1, 2, 3, 1:] = False, True  # only CLS is left
    ignore &= padded
    out = kernels.attention(*inputs, ignore if padded else None, 0.0)
    indices = itertools.product(range(2), range(4), range(5), range(3))
    expected = torch.stack([one_sequence(*inputs[:, b, s, t, head], ignore[b, s, t])
                            for b, s, t, head in indices]).view_as(out)
    assert torch.allclose(out, expected)
    weights = torch.randn_like(out)
    ours, plain = (torch.autograd.grad((x * weights).sum(), inputs)[0] for x in (out, expected))
    assert torch.allclose(ours, plain)
    assert len(launches) == count and all((mask is not None) == padded for mask in launches)


@pytest.mark.parametrize("length", [6, 32, 33, 40])
def test_the_length_of_the_sequences_chooses_the_kernel(length, launches, monkeypatch):
    monkeypatch.setattr(kernels, "GPUS", ("cpu",))
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 3, length, 8, dtype=torch.float64, requires_grad=True)
    ignore = torch.rand(2, 4, length) < 0.4
    ignore[..., 0] = False
    results = []
    for short in (length, length - 1, kernels.SHORT):
        monkeypatch.setattr(kernels, "SHORT", short)
        out = kernels.attention(q, k, v, ignore, 0.0)
        results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    for two_products, fused, chosen in zip(*results):
        assert torch.allclose(two_products, fused, rtol=1e-10, atol=1e-12)
        assert torch.equal(chosen, two_products if length <= 32 else fused)
    assert len(launches) == (1 if length <= 32 else 2)


@pytest.mark.parametrize("layout, count", [("T,H|W", 6 + 5 + 4), ("TxHxW", 1)])
def test_a_model_with_padding_gives_the_same_through_the_fused_kernel(layout, count, launches,
                                                                      monkeypatch):
    torch.manual_seed(0)
    model = VideoTransformer(TransformerConfig(1, 24, 6, 4, 48, 3, 4, 5, 20, layout, dropout=0.0))
    tokens = torch.randint(20, (2, 3, 4, 5))
    tokens[1, -1] = tokens[0, :, 1] = 21  # PAD
    monkeypatch.setattr(kernels, "MOST_SEQUENCES", 7)
    monkeypatch.setattr(kernels, "SHORT", 0)
    results = []
    for fused in ((), ("cpu",)):
        monkeypatch.setattr(kernels, "GPUS", fused)
        out = model(tokens)
        loss = sum(x.sin().sum() for x in out)
        results.append([*out, *torch.autograd.grad(loss, model.parameters())])
    for plain, ours in zip(*results):
        assert torch.allclose(plain, ours, atol=1e-5 * max(1.0, plain.abs().max().item()))
    assert len(launches) == count and all(mask is not None for mask in launches)


@pytest.mark.parametrize("fused", [(), ("cpu",)])
def test_attention_drops_probabilities(fused, monkeypatch):
    """With equal scores and the identity as values, the output is the probabilities.

    They are 1/8 each; a quarter of them is dropped.
    """
    monkeypatch.setattr(kernels, "GPUS", fused)
    monkeypatch.setattr(kernels, "SHORT", 0)
    torch.manual_seed(0)
    q, v = torch.zeros(20, 10, 2, 8, 8), torch.eye(8).expand(20, 10, 2, 8, 8)
    out = kernels.attention(q, q, v, None, 0.25)
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.allclose(out[out > 0], torch.tensor(1 / 8 / 0.75))


def test_dropout_drops_its_share_and_keeps_the_mean():
    """p of the elements become 0, the others grow by 1 / (1 - p).

    Neighbours are independent. The backward pass uses the same mask.
    """
    torch.manual_seed(0)
    x = torch.ones(1001, 1001, requires_grad=True)  # not a multiple of four, which share a draw
    for p in (0.1, 0.5):
        y = kernels.dropout(x, p, True)
        kept = y > 0
        assert y[kept].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-4)
        assert kept.float().mean() == pytest.approx(1 - p, abs=2e-3)
        for both in (kept[1:] & kept[:-1], kept[:, 1:] & kept[:, :-1], kept[:, 4:] & kept[:, :-4]):
            assert both.float().mean() == pytest.approx((1 - p) ** 2, abs=3e-3)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    assert torch.equal(kernels.dropout(x, 0.5, False), x)
    assert torch.equal(kernels.dropout(x, 0.0, True), x)


def kept_for_backward(function, *inputs):
    """-> what the function returns, bytes of the tensors that it keeps for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function(*inputs)
    return out, sum(kept.values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gelu_linear_is_its_two_parts_and_does_not_keep_gelu(precision):
    torch.manual_seed(0)
    linear, hidden = torch.nn.Linear(64, 16), torch.randn(50, 64, requires_grad=True)
    results = []
    for function in (kernels.gelu_linear, lambda x, linear: linear(F.gelu(x))):
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
            out, kept = kept_for_backward(function, hidden, linear)
        loss = out.float().square().sum()
        gradients = torch.autograd.grad(loss, (hidden, *linear.parameters()))
        results.append((kept, out, *gradients))
    (kept, *ours), (kept_plainly, *plain) = results
    for a, b in zip(ours, plain):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert kept == hidden.nbytes
    assert kept_plainly >= kept + hidden.numel() * precision.itemsize


def test_dropout_keeps_a_byte_an_element_for_the_backward_pass():
    x = torch.ones(100, 100, requires_grad=True)
    _, kept = kept_for_backward(kernels.dropout, x, 0.1, True)
    assert kept <= 1.01 * x.numel()


@pytest.mark.parametrize("outputs", [13, 16])
def test_an_aligned_linear_is_a_linear_with_rows_of_a_multiple_of_eight(outputs, monkeypatch):
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, outputs).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for gpus in ((), ("cpu",)):
        monkeypatch.setattr(kernels, "GPUS", gpus)
        out = kernels.aligned_linear(x, linear.weight, linear.bias)
        gradients = torch.autograd.grad(out.sin().sum(), (x, *linear.parameters()))
        results.append([out, *gradients])
    assert out.stride() == (80, 16, 1)
    for plain, aligned in zip(*results):
        assert plain.shape == aligned.shape and torch.allclose(plain, aligned, rtol=1e-12)
