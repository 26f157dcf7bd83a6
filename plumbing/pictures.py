"""What people would rather look at: curves, grids of frames, confusion matrices."""
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from matplotlib.figure import Figure

from plumbing.runs import read_metrics


def draw_curves(out, panels):
    """curves.png of a run. panels: {title: {legend: key of metrics.jsonl}}; a panel without any value is left out."""
    records = read_metrics(out)
    panels = {title: {legend: points for legend, key in lines.items()
                      if (points := [(record["step"], record[key]) for record in records if key in record])}
              for title, lines in panels.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for legend, points in lines.items():
            axis.plot(*zip(*points), label=legend, marker="." if len(points) < 12 else None)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(frameon=False)
    figure.savefig(Path(out) / "curves.png", dpi=110)


def draw_confusion(truth, predicted, names, path):
    """The confusion matrix, rows the truth, in percent of each row. truth, predicted: int (videos,)."""
    matrix = np.zeros((len(names), len(names)))
    np.add.at(matrix, (truth, predicted), 1)
    matrix = 100 * matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    side = min(14, 2.5 + 0.4 * len(names))
    figure = Figure(figsize=(side + 1, side))
    axis = figure.subplots()
    picture = axis.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
    if len(names) <= 60:
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for i, j in zip(*np.nonzero(matrix >= 0.5)):
            axis.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if matrix[i, j] > 50 else "black")
    axis.set(xlabel="predicted", ylabel="truth")
    figure.colorbar(picture, label="% of the class", shrink=0.8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def chequered(frames, holes):
    """uint8 (T, S, S, 3) with a pattern where holes (T, H, W) says True -> the same."""
    place = np.arange(frames.shape[1]) // 4
    pattern = 255 - 60 * ((place[:, None] + place[None, :]) % 2).astype(np.uint8)[..., None]  # (S, S, 1)
    return np.where(enlarged(holes, frames.shape[1])[..., None], pattern, frames)


def token_colours(tokens):
    """Tokens as a picture: equal codes in equal colours, which mean nothing else. int (...) -> uint8 (..., 3)."""
    return np.random.default_rng(0).integers(30, 240, (int(tokens.max()) + 1, 3), dtype=np.uint8)[tokens]


def enlarged(mask, size):
    """bool (T, H, W), a value a token -> (T, S, S), a value a pixel."""
    return mask.repeat(size // mask.shape[1], 1).repeat(size // mask.shape[2], 2)


def save_fill_in(pictures, out):
    """fill_in.png: a block of four rows a video, its frames side by side. fill_in.gif: a column a video, moving.

    pictures: uint8 (videos, 4, T, S, S, 3) of `monitor.fill_in`.
    """
    def grid(rows):  # (rows, columns, S, S, 3) -> one picture, thin white lines between
        rows = np.pad(rows, ((0, 0), (0, 0), (0, 3), (0, 3), (0, 0)), constant_values=255)
        return rows.swapaxes(1, 2).reshape(rows.shape[0] * rows.shape[2], -1, 3)

    zoom = max(1, 96 // pictures.shape[3])
    pictures = pictures.repeat(zoom, 3).repeat(zoom, 4)
    halves = [np.concatenate([np.pad(grid(video), ((0, 10), (0, 10), (0, 0)), constant_values=255) for video in half])
              for half in (pictures[::2], pictures[1::2]) if len(half)]
    height = max(len(half) for half in halves)
    halves = [np.pad(half, ((0, height - len(half)), (0, 0), (0, 0)), constant_values=255) for half in halves]
    imageio.imwrite(Path(out) / "fill_in.png", np.concatenate(halves, axis=1))
    moving = [grid(pictures[:, :, t].swapaxes(0, 1)) for t in range(pictures.shape[2])]
    imageio.mimsave(Path(out) / "fill_in.gif", moving, duration=400, loop=0)
