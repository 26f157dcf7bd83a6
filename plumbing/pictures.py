"""What people would rather look at: curves, grids of frames, confusion matrices. Legible to the colour-blind."""
import warnings
from pathlib import Path

import imageio.v2 as imageio
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from plumbing.files import whole
from plumbing.runs import read_metrics

matplotlib.rcParams["text.parse_math"] = False  # file names may hold a $
warnings.filterwarnings("ignore", "Glyph .* missing")  # and letters that the font has not

# Okabe and Ito's colours, which the colour-blind tell apart, and a style of line for each
LINES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"), ("#56B4E9", (0, (5, 1, 1, 1, 1, 1))))
FILL_IN = ("original", "after the tokenizer", "hidden", "filled in")  # rows of Fig. 5


def draw_lines(axis, lines, **about):
    """lines: {legend: [(x, y)]}, onto one axis, with a grid and, of several, a legend. about: title, xlabel, ..."""
    for (legend, points), (colour, style) in zip(lines.items(), LINES):
        axis.plot(*zip(*points), color=colour, linestyle=style, label=legend, marker="." if len(points) < 12 else None)
    axis.set(**about)
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(frameon=False)


def save(figure, path, dpi=110, **how):
    with whole(path) as file:
        figure.savefig(file, format="png", dpi=dpi, **how)


def draw_curves(out, panels):
    """curves.png of a run. panels: {title: {legend: key of metrics.jsonl}}; a panel without any value is left out. A
    title ends with its unit, after a comma."""
    records = read_metrics(out)
    panels = {title: {legend: points for legend, key in lines.items()
                      if (points := [(record["step"], record[key]) for record in records if key in record])}
              for title, lines in panels.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        name, _, unit = title.partition(", ")
        draw_lines(axis, lines, title=name, xlabel="step", ylabel=unit)
    save(figure, Path(out) / "curves.png")


def draw_confusion(truth, predicted, names, path):
    """The confusion matrix, rows the truth, in percent of each row. truth, predicted: int (videos,)."""
    matrix = np.zeros((len(names), len(names)))
    np.add.at(matrix, (truth, predicted), 1)
    right = np.trace(matrix) / matrix.sum()
    matrix = 100 * matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    side = 2.5 + (0.4 if len(names) <= 20 else 0.16) * len(names)  # inches: a square is as high as its class's name
    font, dpi = (8, 110) if len(names) <= 20 else (6, min(150, 6000 / side))
    figure = Figure(figsize=(side + 1, side))
    axis = figure.subplots()
    picture = axis.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=font)
    axis.set_yticks(range(len(names)), names, fontsize=font)
    for i, j in zip(*np.nonzero(matrix >= (0.5 if len(names) <= 20 else 10))):
        axis.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=font if len(names) <= 20 else 4,
                  color="white" if matrix[i, j] > 50 else "black")
    axis.set(xlabel="predicted class", ylabel="true class", title=f"{len(truth)} videos, {100 * right:.1f}% right")
    figure.colorbar(picture, label="% of the true class", fraction=0.046, pad=0.02)
    save(figure, path, dpi=dpi, bbox_inches="tight")


def chequered(frames, holes):
    """uint8 (T, S, S, 3) with a pattern where holes (T, H, W) says True -> the same."""
    place = np.arange(frames.shape[1]) // 4
    pattern = 255 - 60 * ((place[:, None] + place[None, :]) % 2).astype(np.uint8)[..., None]  # (S, S, 1)
    return np.where(enlarged(holes, frames.shape[1])[..., None], pattern, frames)


def token_colours(tokens):
    """Tokens as a picture: equal codes in equal colours, which mean nothing else. int (...) -> uint8 (..., 3)."""
    return np.random.default_rng(0).integers(30, 240, (int(tokens.max()) + 1, 3), dtype=np.uint8)[tokens]


def enlarged(values, size):
    """(T, H, W), a value a token -> (T, S, S), a value a pixel."""
    return values.repeat(size // values.shape[1], 1).repeat(size // values.shape[2], 2)


def draw_grid(axis, frames, rows, columns, **about):
    """Frames uint8 (rows, columns, S, S, 3) on one axis, thin white lines between, rows and columns named."""
    side = frames.shape[2] + 3
    frames = np.pad(frames, ((0, 0), (0, 0), (0, 3), (0, 3), (0, 0)), constant_values=255)
    axis.imshow(frames.swapaxes(1, 2).reshape(frames.shape[0] * side, -1, 3), interpolation="nearest")
    axis.set_yticks((np.arange(len(rows)) + 0.5) * side, rows)
    axis.set_xticks((np.arange(len(columns)) + 0.5) * side, columns)
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)
    axis.set(**about)


def draw_tokenizer(tokenizer, frames, path, about):
    """What a tokenizer leaves of some frames, uint8 (n, S, S, 3): they, their tokens, decoded again."""
    tokens = tokenizer.encode(frames)  # (n, H, W)
    codes, decoded = token_colours(enlarged(tokens.cpu().numpy(), frames.shape[1])), tokenizer.decode(tokens)
    figure = Figure(figsize=(1.5 + 0.95 * len(frames), 3.6), layout="constrained")
    draw_grid(figure.subplots(), np.stack([frames, codes, decoded.cpu().numpy()]),
              ("original", "tokens", "after the tokenizer"), range(1, len(frames) + 1), title=about,
              xlabel="frame, held out of training")
    save(figure, path)


def save_fill_in(pictures, names, path, which=""):
    """path.png: four named rows a video, its frames side by side. path.gif: a column a video, moving.

    pictures: uint8 (videos, 4, T, S, S, 3) of `monitor.fill_in`. names: of the videos. which: more about all of them.
    """
    videos, _, moments = pictures.shape[:3]
    columns = min(2, videos)
    rows = -(-videos // columns)
    figure = Figure(figsize=(columns * (1.5 + 0.85 * moments), 0.6 + 3.9 * rows), layout="constrained")
    for axis, picture, name in zip(figure.subplots(rows, columns, squeeze=False).flat, pictures, names):
        draw_grid(axis, picture, FILL_IN, range(1, moments + 1), title=name, xlabel="frame of the clip")
    for axis in figure.axes[videos:]:
        axis.set_axis_off()
    figure.suptitle(f"What the model fills in: the chequered tokens are hidden from it{which}", fontsize=11)
    save(figure, f"{path}.png")
    imageio.mimsave(f"{path}.gif", [moment(pictures[:, :, t], names, t) for t in range(moments)], duration=400, loop=0)


def moment(pictures, names, t):
    """One frame of the animation: pictures uint8 (videos, 4, S, S, 3) -> uint8 (height, width, 3)."""
    figure = Figure(figsize=(1.5 + 0.95 * len(pictures), 4.3), layout="constrained")
    draw_grid(figure.subplots(), pictures.swapaxes(0, 1), FILL_IN, names, title=f"frame {t + 1} of the clip")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def draw_prediction(frames, tokens, seconds, chances, path, title):
    """A video, its tokens, and what it is taken for over time.

    frames: uint8 (moments, S, S, 3). tokens: int (moments, H, W) of them. seconds: (moments,), when they are.
    chances: {class: [(second of a clip's middle, percent)]}.
    """
    codes = token_colours(enlarged(tokens, frames.shape[1]))
    figure = Figure(figsize=(1.5 + len(frames), 5), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1, 1))
    draw_grid(above, np.stack([frames, codes]), ("frame", "tokens"), [f"{s:.1f}" for s in seconds], xlabel="seconds",
              title=title)
    draw_lines(below, chances, xlabel="seconds, middle of the clip", ylabel="probability, percent", ylim=(-2, 102),
               xlim=(0, max(seconds[-1], 0.1)))
    save(figure, path)
