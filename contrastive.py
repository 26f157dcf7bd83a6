"""Two clips of one video are told from the clips of other videos: projection head (Eq. 18) and InfoNCE (Eq. 4, 5).

    python contrastive.py    the loss at chance for several batch sizes, beside what random features give

Shapes: n videos in the batch of one process, B = 2n clips, d features.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from plumbing import released
from plumbing.processes import BatchNorm, gather, move


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


def contrastive_loss(head, cls, videos, gamma):
    """gamma * L_cl of groups of videos, added up -> scalar. Each group has its own negatives and its own batch norm.

    head: ProjectionHead. cls: (2n, d), of the first clips, then of the second ones, of n videos. videos: how many of
    them make a group; with several processes, these are its videos in this one.
    """
    groups = cls.unflatten(0, (2, -1, videos)).transpose(0, 1).flatten(1, 2)  # (groups, 2 * videos, d)
    return gamma * sum(info_nce(*head(group).chunk(2), gamma) for group in groups)


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


# ---------------------------------------------------------------- groups that do not fit into one pass


def cached_gradients(backbone, head, parts, gamma, weight, gradients, seeds, cast, **seen):
    """What weight * the contrastive loss asks of each part of a group that is too large for one pass
    -> gamma * L_cl / parts, for each part [gradients by the part's CLS and by the head's weights] for `with_gradients`.

    Let z_k = f(x_k; w) be CLS of the group's clip k, of 2N, by the backbone's weights w, and L(z_1, ..., z_2N; v) the
    contrastive loss by the head's weights v: batch norm and InfoNCE, where all clips meet. By the chain rule

        dL/dw = sum over k of g_k dz_k/dw,    where g_k = dL/dz_k.

    So clips meet in the g_k alone; and these, like dL/dv, need no more than the values of all z_k. Therefore
    1. all z_k, part after part, without gradient: 2N vectors are all that is kept;
    2. L, the g_k and dL/dv, through the small head alone;
    3. (`pretrain.update`) part after part forward again, and backward from the sum of g_k z_k in L's place: as the g_k
       are constants, its gradient is that part's share of dL/dw. Each part also adds its like share of dL/dv.
    Nothing is approximated, provided that step 3 meets the z_k of step 1: dropout has to draw the same numbers again.
    With W processes, all with the same L, the g_k come out W times as large, as they do in one pass; the mean that
    DistributedDataParallel takes undoes it. (Gradient caching: Gao et al. 2021, arXiv 2101.06983.)

    parts: [masking.Batch]. gradients: (loss, [tensor]) -> [its gradient by each]. seeds: [a function that seeds the
    part's dropout]. cast: () -> the context of the number format. seen: of masking.Batch.seen.
    """
    found = []
    for part, seed in zip(parts, seeds):
        seed()
        with torch.no_grad(), cast():
            cls = backbone(move(part.seen(**seen), backbone.cls.device), part.has_pad())[0]
            found.append(cls[-len(part.tokens):])  # (2m, d)
    cls = join(found).requires_grad_()  # (2n, d)
    with cast():
        loss = contrastive_loss(head, cls, len(cls) // 2, gamma)
    by_cls, *by_head = gradients(weight * loss, [cls, *head.parameters()])
    by_part = by_cls.unflatten(0, (2, -1)).split([len(z) // 2 for z in found], dim=1)  # (2, m, d) each
    return loss.detach() / len(parts), [[g.flatten(0, 1), *(h / len(parts) for h in by_head)] for g in by_part]


def join(parts):
    """CLS of several parts of a batch, (2m, d) each -> (2n, d): the first clips of all videos, then the second ones."""
    return torch.cat([cls.unflatten(0, (2, -1)) for cls in parts], dim=1).flatten(0, 1)


def with_gradients(tensors, gradients):
    """A loss that has these gradients by these tensors -> scalar."""
    return sum((x * gradient).sum() for x, gradient in zip(tensors, gradients))


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
