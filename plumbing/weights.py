"""How weights start, and how position tables fit another clip size."""
import torch.nn.functional as F
from torch import nn


def init_weights(model, std):
    """App. A with std = 0.02: weights N(0, std), biases 0. LayerNorm keeps torch's 1 and 0."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def resize_table(table, size):
    """Interpolates a table (n, d) linearly to (size, d), with align_corners=False."""
    if len(table) == size:
        return table.clone()
    columns = table.t()[None].float()  # (1, d, n)
    resized = F.interpolate(columns, size=size, mode="linear", align_corners=False)
    return resized[0].t().contiguous()
