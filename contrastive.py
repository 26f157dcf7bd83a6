"""The contrastive loss: two clips of a video are a positive pair, other videos' clips negatives.

    python contrastive.py    the loss at chance for several batch sizes, beside random features

Shapes: n videos, d features.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from plumbing import released
from plumbing.processes import BatchNorm, gather


class ProjectionHead(nn.Module):
    """Eq. 18: (Linear, BatchNorm, ReLU) for each hidden layer, then a Linear without bias.

    (B, dim) -> (B, out).
    """

    def __init__(self, dim, hidden, layers, out=256):
        super().__init__()
        widths = [dim] + [hidden] * (layers - 1)
        self.hidden = nn.ModuleList(nn.Linear(width, hidden) for width in widths[:-1])
        self.norms = nn.ModuleList(BatchNorm(hidden) for _ in self.hidden)
        self.out = nn.Linear(widths[-1], out, bias=False)

    def forward(self, x):  # (B, dim)
        for linear, norm in zip(self.hidden, self.norms):
            x = F.relu(norm(at_least_float32(linear(x))))  # (B, hidden)
        return self.out(x)  # (B, out)

    @classmethod
    def from_released(cls, state):
        """Takes the `cls_head.mlp.*` tensors out of a released checkpoint's `state`.

        Layers and widths are read off the shapes. Raises KeyError naming a missing tensor.
        """
        sizes, tensors = released.take_projection_head(state)
        head = cls(*sizes)
        head.load_state_dict(tensors)
        return head


def info_nce(first, second, temperature=0.2):
    """L_cl of Eq. 5: the mean over the videos of L_i + L'_i (Eq. 4, 19, 20) -> scalar.

    first, second: (n, d) projections of the first and second clips; row i of both is video i. They
    are normalised here. The total loss (Eq. 6) multiplies L_cl by alpha and the temperature.

    With several processes, n being equal on each, every process gathers the projections of all and
    computes the same loss. The backward pass of `gather` sums the gradients of the processes,
    which undoes the mean that DistributedDataParallel takes.
    """
    with torch.autocast(first.device.type, enabled=False):  # similarities need float32
        clips = torch.cat([gather(at_least_float32(x)) for x in (first, second)])  # (2n, d), of all
        f = F.normalize(clips, dim=1)
        similarity = f @ f.t() / temperature  # (2n, 2n)
    diagonal = torch.eye(len(f), dtype=torch.bool, device=f.device)
    similarity = similarity.masked_fill(diagonal, float("-inf"))
    positive = torch.arange(len(f), device=f.device).roll(len(f) // 2)  # of clip i: i + n, mod 2n
    # Each row is one L_i or L'_i. Twice their mean over 2n clips is the mean of L_i + L'_i over n.
    return 2 * F.cross_entropy(similarity, positive)


def at_least_float32(x):
    """Half precision to float32; float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def main():
    print("gamma * L_cl at gamma = 0.2, for n videos: chance is 2 gamma log(2n - 1)\n")
    print("     n  chance  random features (d = 256)  the paper's model (Table 11)")
    generator = torch.Generator().manual_seed(0)
    for n, paper in ((16, ""), (128, "1.06"), (256, "1.30"), (512, "1.56"), (1024, "1.86")):
        first, second = torch.randn(2, n, 256, generator=generator)
        random = 0.2 * info_nce(first, second)
        print(f"{n:6d}  {0.4 * math.log(2 * n - 1):6.3f}  {random:24.3f}  {paper:>29}")


if __name__ == "__main__":
    main()
