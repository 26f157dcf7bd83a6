"""Pictures of the findings: a table's figures, seed by seed, and the models of a table at work."""
import numpy as np
import torch
from matplotlib.figure import Figure
from paper_tables import heading

import data
import monitor
import pretrain
import toy
import vqvae
from plumbing.pictures import draw_grid, save

UNITS = {"contrastive loss": "gamma x nats",
         "mask accuracy": "% of hidden tokens", "copied": "% equal to nearest visible"}
LIGHT, DARK, GREY = "#56B4E9", "#0072B2", "#BBBBBB"
SHOWN = 2  # test videos in a picture of models, of different motions and scenes


def draw_table(path, title, rows):
    """Each figure of a table: dots for the seeds, their mean and standard deviation.

    rows: {row: {figure: {seed: number}}}.
    """
    figures = list(next(iter(rows.values())))
    figure = Figure(figsize=(2.8 * len(figures) + 1.5, 1.1 + 0.34 * len(rows)),
                    layout="constrained")
    figure.suptitle(f"In miniature, {title} (small dots: seeds; large: their mean +- standard "
                    f"deviation)", fontsize=10)
    axes = figure.subplots(1, len(figures), sharey=True)
    for axis, name in zip(axes, figures):
        for i, row in enumerate(rows.values()):
            draw_seeds(axis, i, row[name])
        axis.set(title=heading(name), xlabel=UNITS.get(name, "top-1 in %"))
        axis.set_yticks(range(len(rows)), list(rows))
        axis.margins(x=0.1, y=0.15)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()
    save(figure, path)


def draw_seeds(axis, y, by_seed):
    """{seed: number} -> dots at height y, with their mean and standard deviation."""
    numbers = list(by_seed.values())
    if numbers:
        deviation = np.std(numbers, ddof=1) if len(numbers) > 1 else 0
        axis.plot(numbers, [y] * len(numbers), ".", color=LIGHT)
        axis.errorbar(np.mean(numbers), y, xerr=deviation, fmt="o", color=DARK, capsize=3)


def draw_models(path, title, rows, runs, home):
    """Models side by side, a column each: clips of test videos with the same blocks hidden, what
    the model fills in, which classes a linear probe of it reads, and its accuracies.

    rows: {model: {figure: {seed: number}}}. runs: {model: its folder}. home: the world's folder.
    """
    store = data.TokenStore(home / "tokens/test")
    labels = {task: list(store.labels(task)) for task in ("motion", "scene")}
    kinds = list(zip(*labels.values()))
    videos = [kinds.index((kind, kind)) for kind in range(SHOWN)]
    every = 1 if len(rows) < 3 else 2  # frames
    figure = Figure(figsize=((5.2 if every == 1 else 4.2) * len(rows), 11.5), layout="constrained")
    figure.suptitle(title, fontsize=13)
    for column, (name, run) in zip(figure.subfigures(1, len(rows), wspace=0.03), runs.items()):
        right = list(rows[name]["mask accuracy"].values())
        said = (f"fills in {np.mean(right):.1f}% correctly (masks as in training)" if right else
                "not trained to fill in")
        column.suptitle(f"{name}\n{said}", fontsize=11)
        axes = column.subplots(3 + SHOWN, 1, height_ratios=[3.2] * SHOWN + [1.1] * 2 + [1.8])
        for axis, picture in zip(axes, filled_in(run, store, videos, home)):
            frames = np.arange(picture.shape[1])[::every]
            draw_grid(axis, picture[1:, frames], ("decoded", "hidden", "filled in"), frames + 1,
                      xlabel="frame of the clip")
        probes = torch.load(run / "probes.pt", weights_only=True)
        for axis, (task, classes) in zip(axes[SHOWN:], labels.items()):
            truth = [classes[video] for video in videos]
            draw_reading(axis, probes[f"probe {task}"][videos], truth, task)
        draw_accuracies(axes[-1], rows[name], labels)
    save(figure, path)


def filled_in(run, store, videos, home):
    """`monitor.fill_in` with the model of a run; every model of the same seed gets the same masks.
    """
    state = torch.load(run / "last.pt", weights_only=True)
    config = pretrain.Config(**{**state["config"], "mask": "block"})
    shape = config.transformer(store.header["vocab_size"], store.height, store.width)
    model = pretrain.Vimpac(shape, config.projection_hidden, config.projection_layers)
    model.load_state_dict(state["model"])
    tokenizer = vqvae.load_tokenizer(home / "tokenizer.pt")
    generator = torch.Generator().manual_seed(0)
    return monitor.fill_in(model, tokenizer, store, videos, config, generator)


def draw_reading(axis, p, truth, task):
    """A probe's probabilities (videos, C), a group of bars for each video."""
    names, ticks = toy.CLASSES[task], []
    for i, (chances, right) in enumerate(zip(p.tolist(), truth)):
        x = np.arange(len(names)) + i * (len(names) + 1)
        axis.bar(x, 100 * np.array(chances),
                 color=[DARK if k == right else GREY for k in range(len(names))])
        axis.text(x.mean(), 85, ("upper video", "lower video")[i], ha="center", fontsize=8)
        ticks += x.tolist()
    axis.set_xticks(ticks, names * len(p), rotation=35, ha="right", fontsize=8)
    axis.set(ylim=(0, 100), ylabel="probability, %")
    axis.set_title(f"{task}, read by a linear probe (blue: true class)", fontsize=8)


def draw_accuracies(axis, figures, labels):
    """{figure: {seed: top-1}} of the probe and of fine-tuning, on test videos.

    labels: {task: the class of each video}. A dotted line marks its most frequent class.
    """
    names = [name for task in labels for name in (f"probe {task}", task) if name in figures]
    for y, name in enumerate(names):
        draw_seeds(axis, y, figures[name])
        mean = np.mean(list(figures[name].values()))
        axis.annotate(f"{mean:.1f}%", (mean, y), (0, 6), textcoords="offset points", ha="center",
                      fontsize=8)
        classes = labels[name.split()[-1]]
        constant = 100 * np.bincount(classes).max() / len(classes)
        axis.vlines(constant, y - 0.5, y + 0.5, color="grey", linestyle=":")
    axis.set_yticks(range(len(names)), [heading(name) for name in names])
    axis.set(xlim=(20, 100), ylim=(len(names) - 0.4, -0.8), xlabel="top-1 in %")
    axis.set_title(f"{len(classes):,} test videos, all seeds (dotted: one answer)",
                   fontsize=8)
    axis.grid(alpha=0.3)
