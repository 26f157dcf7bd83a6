"""Two clips of one video are told from the clips of other videos: projection head (Eq. 18) and InfoNCE (Eq. 4, 5).

    python contrastive.py    the loss at chance for several batch sizes, beside what random features give

Shapes: n videos in the batch of one process, d features.
"""
import math
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_gather, all_reduce

# what torch 2.13 recommends in their place is not in 2.11
warnings.filterwarnings("ignore", "torch.distributed.nn.functional", FutureWarning)


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def info_nce(first, second, temperature=0.2):
    """L_cl of Eq. 5: the mean over the videos of L_i + L'_i (Eq. 4, 19, 20) -> scalar.

    first, second: (n, d) projections of the first and second clips, not yet normalised; row i of both is video i.
    The paper's total loss (Eq. 6) multiplies this by the temperature and by alpha; that is the caller's.

    With several processes every one gathers all videos (n must be the same everywhere) and returns the same loss of
    the global batch. The gather's gradient is the sum over processes, so that DistributedDataParallel's mean over
    processes is the gradient of the loss itself.
    """
    first = F.normalize(first.float(), dim=1)
    second = F.normalize(second.float(), dim=1)
    if world_size() > 1:
        first, second = torch.cat(all_gather(first)), torch.cat(all_gather(second))
    n = len(first)
    f = torch.cat([first, second])  # (2n, d)
    similarity = f @ f.t() / temperature  # (2n, 2n)
    similarity = similarity.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=f.device), float("-inf"))
    positive = torch.arange(2 * n, device=f.device).roll(n)  # clip i's partner is i + n, and the other way round
    return 2 * F.cross_entropy(similarity, positive)  # the mean over 2n clips, twice: L_i + L'_i


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d with the statistics of all processes' batches.

    torch's SyncBatchNorm refuses CPU tensors; this one runs anywhere that the processes can reduce.
    """

    def forward(self, x):  # (n, d)
        world = world_size()
        if not self.training or world == 1:
            return super().forward(x)
        count = len(x) * world
        mean = all_reduce(x.sum(dim=0)) / count  # (d,)
        variance = all_reduce((x - mean).square().sum(dim=0)) / count  # (d,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class ProjectionHead(nn.Module):
    """Eq. 18: (Linear, BatchNorm, ReLU) for each hidden layer, then a Linear without bias. (n, dim) -> (n, out)."""

    def __init__(self, dim, hidden, layers, out=256):
        super().__init__()
        widths = [dim] + [hidden] * (layers - 1)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(BatchNorm(hidden) for _ in self.hidden)
        self.out = nn.Linear(widths[-1], out, bias=False)

    def forward(self, x):  # (n, dim)
        for linear, norm in zip(self.hidden, self.norms):
            x = F.relu(norm(linear(x).float()))  # (n, hidden); statistics in float32 also under autocast
        return self.out(x)  # (n, out)

    @classmethod
    def from_released(cls, state):
        """From the `cls_head.mlp.*` tensors of a released checkpoint, which are taken out of `state`.

        KeyError names a tensor that is missing; layers and widths are read off the shapes.
        """
        name = "cls_head.mlp"
        layers = sum(key.startswith(f"{name}.linear_") and key.endswith(".weight") for key in state)
        hidden, dim = state[f"{name}.linear_0.weight"].shape
        out = len(state[f"{name}.linear_{layers - 1}.weight"])
        parts = {"out.weight": state.pop(f"{name}.linear_{layers - 1}.weight")}
        for i in range(layers - 1):
            for kind in ("weight", "bias"):
                parts[f"hidden.{i}.{kind}"] = state.pop(f"{name}.linear_{i}.{kind}")
            for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                parts[f"norms.{i}.{kind}"] = state.pop(f"{name}.bn_{i}.{kind}")
        head = cls(dim, hidden, layers, out)
        head.load_state_dict(parts)
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
