"""Pictures: curves, grids of frames, confusion matrices; legible to the colour-blind."""
import math
import warnings
from pathlib import Path

import imageio.v2 as imageio
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from plumbing.files import whole
from plumbing.runs import read_metrics

matplotlib.rcParams["text.parse_math"] = False  # file names may contain $
warnings.filterwarnings("ignore", "Glyph .* missing")  # and letters that the font lacks

LINES = (  # Okabe and Ito's colours, which the colour-blind tell apart, each with a line style
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#56B4E9", (0, (5, 1, 1, 1, 1, 1))),
)
FILL_IN = ("original", "after the tokenizer", "hidden", "filled in")  # rows of Fig. 5


def draw_lines(axis, lines, **settings):
    """Lines on one axis, with a grid and, if there are several, a legend.

    lines: {legend: [(x, y)]}. settings: title, xlabel, ...
    """
    for (legend, points), (colour, style) in zip(lines.items(), LINES):
        marker = "." if len(points) < 12 else None
        axis.plot(*zip(*points), color=colour, linestyle=style, label=legend, marker=marker)
    axis.set(**settings)
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(frameon=False)


def save(figure, path, dpi=110, **settings):
    with whole(path) as file:
        figure.savefig(file, format="png", dpi=dpi, **settings)


def draw_curves(out, panels):
    """The curves.png of a run, without panels that have no value.

    panels: {title: {legend: key of metrics.jsonl, or a constant}}. A title ends with a comma and
    its unit.
    """
    records = read_metrics(out)
    curves = {}  # {title: {legend: [(step, value)]}}
    for title, keys in panels.items():
        lines = {legend: [(record["step"], record.get(key, key)) for record in records
                          if key in record or isinstance(key, float)]
                 for legend, key in keys.items()}
        if any(lines[legend] for legend, key in keys.items() if isinstance(key, str)):
            curves[title] = {legend: points for legend, points in lines.items() if points}
    if not curves:
        return
    figure = Figure(figsize=(4 * len(curves), 3.2), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, curves.items()):
        name, _, unit = title.partition(", ")
        draw_lines(axis, lines, title=name, xlabel="step", ylabel=unit)
    save(figure, Path(out) / "curves.png")


def draw_confusion(truth, predicted, names, path):
    """The confusion matrix in percent of each row; rows are the true classes.

    truth, predicted: int (videos,). Many classes are written smaller.
    """
    matrix = np.zeros((len(names), len(names)))
    np.add.at(matrix, (truth, predicted), 1)
    accuracy = 100 * (np.trace(matrix) / matrix.sum())
    matrix = 100 * matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    if len(names) <= 20:
        side, font, number_font, least = 2.5 + 0.4 * len(names), 8, 8, 0.5
        dpi = 110
    else:
        side, font, number_font, least = 2.5 + 0.16 * len(names), 6, 4, 10
        dpi = min(150, 6000 / side)
    figure = Figure(figsize=(side + 1, side))  # inches
    axis = figure.subplots()
    picture = axis.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=font)
    axis.set_yticks(range(len(names)), names, fontsize=font)
    for i, j in zip(*np.nonzero(matrix >= least)):
        colour = "white" if matrix[i, j] > 50 else "black"
        axis.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=number_font,
                  color=colour)
    axis.set(xlabel="predicted class", ylabel="true class",
             title=f"{len(truth)} videos, {accuracy:.1f}% right")
    figure.colorbar(picture, label="% of the true class", fraction=0.046, pad=0.02)
    save(figure, path, dpi=dpi, bbox_inches="tight")


def chequered(frames, mask):
    """Frames uint8 (T, S, S, 3) with a pattern where mask, bool (T, H, W), is True -> the same."""
    square = np.arange(frames.shape[1]) // 4
    dark = ((square[:, None] + square[None, :]) % 2).astype(np.uint8)  # (S, S)
    pattern = 255 - 60 * dark[..., None]  # (S, S, 1)
    return np.where(enlarged(mask, frames.shape[1])[..., None], pattern, frames)


def token_colours(tokens):
    """int (...) -> uint8 (..., 3): equal tokens have equal colours, which mean nothing else."""
    codes = int(tokens.max()) + 1
    colours = np.random.default_rng(0).integers(30, 240, (codes, 3), dtype=np.uint8)
    return colours[tokens]


def enlarged(values, size):
    """A value for each token, (T, H, W) -> for each pixel, (T, S, S) with S = size."""
    rows, columns = size // values.shape[1], size // values.shape[2]
    return values.repeat(rows, 1).repeat(columns, 2)


def draw_grid(axis, frames, rows, columns, **settings):
    """Frames uint8 (rows, columns, S, S, 3) on one axis, with white lines between them.

    rows, columns: their names. settings: title, xlabel, ...
    """
    side = frames.shape[2] + 3
    frames = np.pad(frames, ((0, 0), (0, 0), (0, 3), (0, 3), (0, 0)), constant_values=255)
    picture = frames.swapaxes(1, 2).reshape(frames.shape[0] * side, -1, 3)
    axis.imshow(picture, interpolation="nearest")
    axis.set_yticks((np.arange(len(rows)) + 0.5) * side, rows)
    axis.set_xticks((np.arange(len(columns)) + 0.5) * side, columns)
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)
    axis.set(**settings)


def draw_tokenizer(tokenizer, frames, path, title):
    """What a tokenizer keeps of frames uint8 (n, S, S, 3): the frames, tokens, decoded frames."""
    tokens = tokenizer.encode(frames)  # (n, H, W)
    codes = token_colours(enlarged(tokens.cpu().numpy(), frames.shape[1]))
    decoded = tokenizer.decode(tokens).cpu().numpy()
    figure = Figure(figsize=(1.5 + 0.95 * len(frames), 3.6), layout="constrained")
    draw_grid(figure.subplots(), np.stack([frames, codes, decoded]),
              ("original", "tokens", "after the tokenizer"), range(1, len(frames) + 1),
              title=title, xlabel="frame, held out of training")
    save(figure, path)


def save_fill_in(pictures, names, path, which=""):
    """What the model fills in, in two pictures.

    path.png: for each video four named rows, its frames side by side.
    path.gif: for each video a column, animated.
    pictures: uint8 (videos, 4, T, S, S, 3) of `monitor.fill_in`. names: of the videos.
    which: added to the title.
    """
    videos, _, frames = pictures.shape[:3]
    columns = min(2, videos)
    rows = math.ceil(videos / columns)
    size = (columns * (1.5 + 0.85 * frames), 0.6 + 3.9 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, picture, name in zip(axes, pictures, names):
        draw_grid(axis, picture, FILL_IN, range(1, frames + 1), title=name,
                  xlabel="frame of the clip")
    for axis in figure.axes[videos:]:
        axis.set_axis_off()
    title = f"What the model fills in: the chequered tokens are hidden from it{which}"
    figure.suptitle(title, fontsize=11)
    save(figure, f"{path}.png")
    animation = [draw_moment(pictures[:, :, t], names, t) for t in range(frames)]
    imageio.mimsave(f"{path}.gif", animation, duration=400, loop=0)


def draw_moment(pictures, names, t):
    """One frame of the animation: uint8 (videos, 4, S, S, 3) -> uint8 (height, width, 3)."""
    figure = Figure(figsize=(1.5 + 0.95 * len(pictures), 4.3), layout="constrained")
    draw_grid(figure.subplots(), pictures.swapaxes(0, 1), FILL_IN, names,
              title=f"frame {t + 1} of the clip")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def draw_prediction(frames, tokens, seconds, chances, path, title):
    """A video, its tokens, and the probabilities of its likeliest classes over time.

    frames: uint8 (moments, S, S, 3). tokens: int (moments, H, W) of these frames.
    seconds: (moments,), the times of these frames.
    chances: {class: [(second of a clip's middle, percent)]}.
    """
    codes = token_colours(enlarged(tokens, frames.shape[1]))
    figure = Figure(figsize=(1.5 + len(frames), 5), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1, 1))
    times = [f"{second:.1f}" for second in seconds]
    draw_grid(above, np.stack([frames, codes]), ("frame", "tokens"), times, xlabel="seconds",
              title=title)
    draw_lines(below, chances, xlabel="seconds, middle of the clip",
               ylabel="probability, percent", ylim=(-2, 102), xlim=(0, max(seconds[-1], 0.1)))
    save(figure, path)
