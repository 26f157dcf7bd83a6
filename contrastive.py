"""Two clips of one video are told from the clips of other videos: projection head (Eq. 18) and InfoNCE (Eq. 4, 5).

    python contrastive.py    the loss at chance for several batch sizes, beside what random features give

Shapes: n videos in the batch of one process, B = 2n clips, d features.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from plumbing import released
from plumbing.processes import BatchNorm, gather


def info_nce(first, second, temperature=0.2):
    """L_cl of Eq. 5: the mean over the videos of L_i + L'_i (Eq. 4, 19, 20) -> scalar.

    first, second: (n, d) projections of the first and second clips, not yet normalised; row i of both is video i.
    The paper's total loss (Eq. 6) multiplies this by the temperature and by alpha; that is the caller's.

    With several processes every one gathers all videos (n must be the same everywhere) and returns the same loss of
    the global batch. The gather's gradient is the sum over processes, so that DistributedDataParallel's mean over
    processes is the gradient of the loss itself.
    """
    with torch.autocast(first.device.type, enabled=False):  # in float32, as small differences decide
        f = F.normalize(torch.cat([gather(first.float()), gather(second.float())]), dim=1)  # (2n, d), of all processes
        similarity = f @ f.t() / temperature  # (2n, 2n)
    similarity = similarity.masked_fill(torch.eye(len(f), dtype=torch.bool, device=f.device), float("-inf"))
    positive = torch.arange(len(f), device=f.device).roll(len(f) // 2)  # clip i's partner is i + n, and i + n's is i
    return 2 * F.cross_entropy(similarity, positive)  # the mean over 2n clips, twice: L_i + L'_i


class ProjectionHead(nn.Module):
    """Eq. 18: (Linear, BatchNorm, ReLU) for each hidden layer, then a Linear without bias. (B, dim) -> (B, out)."""

    def __init__(self, dim, hidden, layers, out=256):
        super().__init__()
        widths = [dim] + [hidden] * (layers - 1)
        self.hidden = nn.ModuleList(nn.Linear(width, hidden) for width in widths[:-1])
        self.norms = nn.ModuleList(BatchNorm(hidden) for _ in self.hidden)
        self.out = nn.Linear(widths[-1], out, bias=False)

    def forward(self, x):  # (B, dim)
        for linear, norm in zip(self.hidden, self.norms):
            x = F.relu(norm(linear(x).float()))  # (B, hidden); statistics in float32 also under autocast
        return self.out(x)  # (B, out)

    @classmethod
    def from_released(cls, state):
        """From the `cls_head.mlp.*` tensors of a released checkpoint, which are taken out of `state`.

        KeyError names a tensor that is missing; layers and widths are read off the shapes.
        """
        sizes, tensors = released.take_projection_head(state)
        head = cls(*sizes)
        head.load_state_dict(tensors)
        return head


def main():
    print("gamma * L_cl at gamma = 0.2, for n videos: chance is 2 gamma log(2n - 1)\n")
    print("     n  chance  random features (256 dimensions)  the paper's model after 10 epochs (Table 11)")
    generator = torch.Generator().manual_seed(0)
    for n, paper in ((16, ""), (128, "1.06"), (256, "1.30"), (512, "1.56"), (1024, "1.86")):
        first, second = torch.randn(2, n, 256, generator=generator)
        random = 0.2 * info_nce(first, second)
        print(f"{n:6d}  {0.4 * math.log(2 * n - 1):6.3f}  {random:32.3f}  {paper:>47}")


if __name__ == "__main__":
    main()
