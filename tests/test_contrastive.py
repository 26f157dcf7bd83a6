import math

import pytest
import torch
import torch.nn.functional as F

from contrastive import ProjectionHead, info_nce


def loss_by_equation_4(first, second, temperature):
    """Eq. 4, 5, 19 and 20, a term at a time."""
    f, g = F.normalize(first, dim=1), F.normalize(second, dim=1)
    n, total = len(f), 0.0
    for own, other in ((f, g), (g, f)):
        for i in range(n):
            positive = math.exp(own[i] @ other[i] / temperature)
            same = sum(math.exp(own[i] @ own[k] / temperature) for k in range(n) if k != i)
            cross = sum(math.exp(own[i] @ other[k] / temperature) for k in range(n))
            total += -math.log(positive / (same + cross))
    return total / n


@pytest.mark.parametrize("n, temperature", [(1, 0.2), (2, 0.2), (7, 0.2), (7, 0.5)])
def test_info_nce_is_equation_4(n, temperature):
    first, second = torch.randn(2, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    assert info_nce(first, second, temperature).item() == pytest.approx(loss_by_equation_4(first, second, temperature),
                                                                        abs=1e-5)


def test_equal_features_are_at_chance():
    same = torch.ones(16, 8)
    assert info_nce(same, same).item() == pytest.approx(2 * math.log(31), abs=1e-5)


def test_descent_brings_the_clips_of_a_video_together():
    torch.manual_seed(0)
    first, second = torch.randn(2, 8, 16).requires_grad_().unbind()
    z = torch.stack([first, second]).detach().requires_grad_()
    optimizer = torch.optim.SGD([z], lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        info_nce(z[0], z[1]).backward()
        optimizer.step()
    f, g = F.normalize(z.detach(), dim=-1)
    assert ((f @ g.t()).argmax(dim=1) == torch.arange(8)).all()
    assert (f * g).sum(dim=1).mean() > 0.9


@pytest.mark.parametrize("layers, hidden, count", [(2, 32, 2), (3, 64, 4), (1, 8, 0)])
def test_projection_head_has_the_paper_s_shape(layers, hidden, count):
    head = ProjectionHead(16, hidden, layers)
    assert head(torch.randn(4, 16)).shape == (4, 256)
    assert head.out.bias is None
    assert sum(p.dim() == 1 for p in head.parameters()) == 3 * (layers - 1)  # bias, batch norm weight and bias
