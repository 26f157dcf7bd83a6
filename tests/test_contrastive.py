import math

import pytest
import torch
import torch.nn.functional as F

from contrastive import ProjectionHead, info_nce


def loss_by_equation_4(first, second, temperature):
    """Eq. 4, 5, 19 and 20, term by term."""
    f, g = F.normalize(first, dim=1), F.normalize(second, dim=1)
    n, total = len(f), 0.0
    for a, b in ((f, g), (g, f)):
        for i in range(n):
            positive = math.exp(a[i] @ b[i] / temperature)
            same = sum(math.exp(a[i] @ a[k] / temperature) for k in range(n) if k != i)
            cross = sum(math.exp(a[i] @ b[k] / temperature) for k in range(n))
            total += -math.log(positive / (same + cross))
    return total / n


@pytest.mark.parametrize("n, temperature", [(1, 0.2), (2, 0.2), (7, 0.2), (7, 0.5)])
def test_info_nce_is_equation_4(n, temperature):
    generator = torch.Generator().manual_seed(n)
    first, second = torch.randn(2, n, 16, dtype=torch.float64, generator=generator)
    expected = loss_by_equation_4(first, second, temperature)
    assert info_nce(first, second, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_equal_features_are_at_chance():
    same = torch.ones(16, 8)
    assert info_nce(same, same).item() == pytest.approx(2 * math.log(31), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_computed_in_float32_under_autocast(dtype):
    """The videos are so similar that products in bfloat16 could not separate them."""
    shared, video, noise = torch.randn(3, 2, 16, 64, generator=torch.Generator().manual_seed(0))
    z = F.normalize(shared[:1, :1] + 0.3 * video[:1] + 0.1 * noise, dim=-1).to(dtype)  # (2, n, d)

    def loss_and_gradient(z, enabled):
        z = z.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = info_nce(z[0], z[1])
        loss.backward()
        return loss.detach(), z.grad

    loss, gradient = loss_and_gradient(z, True)
    exact, exact_gradient = loss_and_gradient(z.float(), False)
    assert loss.dtype == torch.float32 and (loss - exact).abs() < 1e-6
    assert (gradient - exact_gradient.to(dtype)).abs().max() < 1e-6


def test_descent_brings_the_clips_of_a_video_together():
    z = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for _ in range(40):
        gradient, = torch.autograd.grad(info_nce(z[0], z[1]), z)
        z.data -= 2 * gradient
    f, g = F.normalize(z.detach(), dim=-1)
    assert ((f @ g.t()).argmax(dim=1) == torch.arange(8)).all()
    assert (f * g).sum(dim=1).mean() > 0.9


@pytest.mark.parametrize("layers, hidden", [(2, 32), (3, 64), (1, 8)])
def test_projection_head_is_equation_18(layers, hidden):
    torch.manual_seed(0)
    head, x = ProjectionHead(16, hidden, layers), torch.randn(6, 16)
    for norm in head.norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    y = x
    for linear, norm in zip(head.hidden, head.norms):
        y = linear(y)
        y = (y - y.mean(dim=0)) / (y.var(dim=0, unbiased=False) + 1e-5).sqrt()
        y = (y * norm.weight + norm.bias).clamp(min=0)
    assert y.shape == (6, hidden if layers > 1 else 16)
    assert torch.allclose(head(x), y @ head.out.weight.t(), atol=1e-5)
    assert len(head.hidden) == layers - 1 and head.out.bias is None and head(x).shape == (6, 256)


def test_batch_norm_keeps_its_statistics_in_float32_under_autocast():
    torch.manual_seed(0)
    head, x = ProjectionHead(16, 32, 2), torch.randn(6, 16)
    seen = []
    head.norms[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        head(x)
    assert seen == [torch.float32]
