"""The paper's findings in miniature: its tables as experiments on the toy world, over seeds.

    python benchmarks/findings.py                 all tables: about an hour on two cores
    python benchmarks/findings.py --only 7 8      these tables only
    python benchmarks/findings.py --tune          fine-tuning rates, on the validation split
    python benchmarks/findings.py --show          runs nothing; prints what has been measured
    python benchmarks/findings.py --full          the toy preset's sizes: a night, or a GPU

An experiment is one pre-training, then one fine-tuning for each task with few labels. Tables share
the experiments that they have in common. Each result is appended to findings.jsonl as soon as its
experiment ends, with its settings, seed, seconds, commit and versions, so that the command can be
stopped and started again; delete a line to repeat its experiment. On CPUs an experiment has one
thread, so that it gives the same numbers on any number of cores. At the end, the tables are printed
beside the paper's figures and drawn into figures/.

A claim is judged by the difference of two rows, seed by seed (a seed gives both rows the same
videos and labels): shown where the mean difference is more than two standard errors above 0,
opposite where it is as far below, otherwise not shown. With three seeds and no true difference,
that still happens to one claim in five.
"""
import argparse
import concurrent.futures
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from paper_tables import BOTH, TABLES

import data
import finetune
import monitor
import predict
import pretrain
import toy
import vqvae
from plumbing import runs
from plumbing.cli import parse, progress
from plumbing.pictures import draw_lines
from plumbing.processes import device_name, pick_device, pick_precision, seed_all
from plumbing.runs import read_metrics
from prepare import open_stores, pick_labels
from transformer import load_backbone

RESULTS, FIGURES = ROOT / "benchmarks/findings.jsonl", ROOT / "benchmarks/figures"
HOME = Path("datasets/findings")
# The toy world with the light always on: otherwise half of the hidden tokens only tell whether it
# is. The shapes are larger, so that more of the tokens show something that moves.
WORLD = toy.World(light=False, radius=(14, 22))
SPLITS = {"pretrain": 1000, "train": 200, "val": 200, "test": 500}
TASKS = {"motion": 48, "appearance": 48}  # labelled videos: few, so that no recipe comes near 100%
RECIPES = {  # differences from the toy preset
    "long": dict(alpha=1.0, layers=2, batch=16, steps=200, lr=4e-3, min_stride=2, max_stride=2),
    "short": dict(alpha=1.0, layers=2, dim=32, heads=2, mlp_dim=128, batch=16, steps=150, lr=8e-3,
                  min_stride=2, max_stride=2),
    "full": dict(alpha=1.0, steps=800, min_stride=2, max_stride=2)}  # of all tables with --full
STEPS = 60  # of fine-tuning
LONGER = 4  # from scratch it takes so many times the steps, as in Table 4
FINETUNING = {"long": dict(lr=4e-3, batch=16), "short": dict(lr=8e-3, batch=8),
              "full": dict(lr=4e-3, batch=16)}
# Learning rates from scratch. Like those above, they are the best of GRID on the validation split.
SCRATCH = {"motion": 4e-3, "appearance": 2e-3}
GRID = (1e-3, 2e-3, 4e-3, 8e-3)
CURVE = (24, 48, 96)  # numbers of labelled videos

# ---------------------------------------------------------------- one experiment


def make_world(device):
    """The videos, a tokenizer trained on them, and their tokens."""
    torch.set_num_threads(2)  # on any number of cores, for the same tokenizer
    toy.make(HOME, SPLITS, world=WORLD)
    splits = {split: toy.split_videos(HOME, split) for split in SPLITS}
    preset, path = pretrain.PRESETS["toy"], HOME / "tokenizer.pt"
    fps, size = preset["fps"], preset["frame_size"]
    if not path.is_file():
        videos = [video for video, _ in splits["pretrain"]]
        vqvae.make_tokenizer(videos, path, fps, size, 8000, codes=preset["codes"],
                             steps=preset["tokenizer_steps"], batch=64, lr=2e-3, seed=0,
                             device=device)
    tokenizer, views = vqvae.load_tokenizer(path).to(device), data.views_for("pretrain", size)
    for split, videos in splits.items():
        vqvae.tokenize(tokenizer, videos, HOME, HOME / "tokens" / split, fps, size, views,
                       path.name, toy.CLASSES)


def flags(settings):
    """{field: value} -> a command line."""
    parts = []
    for name, value in settings.items():
        if value is not False:
            parts.append("--" + name.replace("_", "-"))
            parts += [] if value is True else [str(value)]
    return parts


def pretraining_config(changes, seed, recipe, out, device):
    """changes: a row of a table, None for an untrained model. recipe: one of RECIPES."""
    usual = {**pretrain.PRESETS["toy"], "init_std": 0.02, **recipe}  # weights start as the paper's
    recipe = {**usual, **({"steps": 1} if changes is None else changes)}
    if recipe["batch"] != usual["batch"]:  # as many videos in all, but at least 40 steps
        videos = usual["steps"] * usual["batch"]
        recipe["steps"] = max(40, 10 * math.ceil(videos / recipe["batch"] / 10))
    recipe |= dict(seed=seed, out=out, micro_batch=recipe["batch"], knn_every=recipe["steps"],
                   save_every=recipe["steps"], **on(device))
    config = parse(pretrain.Config, flags(recipe), "", pretrain.PRESETS)
    config.precision = pick_precision(config.precision, device)
    return config


def pretrained(changes, seed, recipe, out, device):
    """Pre-trains a model, or for None makes an untrained one.

    Returns its figures on the held-out videos, and the frames a second of its clips.
    """
    config = pretraining_config(changes, seed, recipe, out, device)
    store = data.TokenStore(HOME / "tokens/pretrain")
    runs.resolve_batch(config, len(data.hold_out(len(store), config.held_out)[0]), 1)
    shutil.rmtree(out, ignore_errors=True)  # of an experiment that was stopped
    seed_all(seed)
    shape = config.transformer(store.header["vocab_size"], store.height, store.width)
    model = pretrain.Vimpac(shape, config.projection_hidden, config.projection_layers).to(device)
    start = seconds(device)
    pretrain.train(config, model, store, device, HOME / "tokens")
    took = seconds(device) - start
    last = [record for record in read_metrics(out) if "held_out_loss" in record][-1]
    figures = {"seconds": round(took, 1), "speed": config.steps * config.batch / took,
               "copied": copied(config, store)}
    for name in ("motion", "appearance", "direction"):
        figures[f"kNN {name}"] = 100 * last[f"knn_{name}"]
    if changes is not None and config.mask_weight:
        figures["mask accuracy"] = 100 * last["held_out_mask_accuracy"]
    if changes is not None and config.alpha:
        figures["contrastive loss"] = last["held_out_contrastive_loss"]
    return figures, config.clip_fps(store)


def on(device):
    """On CPUs float32: only some of them have bfloat16, which gives other numbers."""
    return dict(device=device.type, precision="fp32" if device.type == "cpu" else "auto")


def seconds(device):
    """A clock. On a CPU, which other programs share, it is this process's time."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def copied(config, store):
    """Hidden tokens of held-out videos that equal their nearest visible neighbour, in percent.

    The neighbour is the nearest one in space and time.
    """
    pairs, videos = config.pairs(store), data.hold_out(len(store), config.held_out)[1]
    clips = torch.from_numpy(np.stack([pairs[int(video), 0] for video in videos]))
    generator = torch.Generator().manual_seed(config.seed)
    batch = pretrain.mask_clips(clips, store.header["vocab_size"], config, generator)
    tokens, _, mask = (x.flatten(0, 1) for x in batch)
    correct = monitor.copied(tokens, mask, over_time=True) == tokens
    return 100 * correct[mask].float().mean().item()


def finetuned(scratch, task, few, seed, out, device, fps, recipe, split="test"):
    """Fine-tunes out/last.pt, or a model of its size from scratch, on few labels -> top-1 in %.

    recipe: one of FINETUNING.
    """
    steps = STEPS * (LONGER if scratch else 1)
    settings = dict(
        checkpoint=f"{out}/last.pt", from_scratch=scratch, labels=task, num_labels=few, seed=seed,
        steps=steps, fps=fps, clips=1, eval_split=split, data=HOME / "tokens", out=f"{out}/{task}",
        micro_batch=recipe["batch"], save_every=steps, **recipe, **on(device))
    config = parse(finetune.Config, flags(settings), "", finetune.PRESETS, "dataset")
    config.precision = pick_precision(config.precision, device)
    shutil.rmtree(config.out, ignore_errors=True)  # of another number of labels
    stores, _ = open_stores(config)
    labels, classes = pick_labels(stores, config.labels)
    backbone = load_backbone(config.checkpoint, dropout=config.dropout)
    model = finetune.build(config, backbone, stores, len(classes)).to(device)
    origin = predict.origin(stores[split], labels=labels, classes=classes)
    finetune.train(config, model, stores["train"], labels, device, origin)
    predicted = finetune.evaluate(model, stores[split], config, device).cpu().argmax(dim=1)
    truth = torch.tensor(stores[split].labels(labels))
    return 100 * (predicted == truth).float().mean().item()


def folder(job):
    name = json.dumps([job["recipe"], job["changes"], job["seed"]])
    return f"runs/findings/{zlib.crc32(name.encode()):08x}"


def experiment(job):
    """Pre-training, then fine-tuning on the job's tasks and numbers of labels -> {figure: number}.
    """
    torch.set_num_threads(1)
    device, out, seed = torch.device(job["device"]), folder(job), job["seed"]
    scratch = job["changes"] is None
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        recipe = RECIPES[job["recipe"]]
        figures, fps = pretrained(job["changes"], seed, recipe, out, device)
        for task, few in job["labels"]:
            recipe = {**FINETUNING[job["recipe"]], **({"lr": SCRATCH[task]} if scratch else {})}
            figures[f"{task}, {few} labels"] = finetuned(
                scratch, task, few, seed, out, device, fps, recipe)
    return figures


# ---------------------------------------------------------------- what to run


def read():
    """The results so far -> [dict]."""
    if not RESULTS.is_file():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def settings(recipe):
    """All that an experiment's figures depend on, beside its changes, its seed and the code."""
    tuning = FINETUNING[recipe] | {"steps": STEPS, "from scratch": [LONGER, SCRATCH]}
    values = {"world": WORLD._asdict(), "splits": SPLITS, "pre-training": RECIPES[recipe],
              "fine-tuning": tuning}
    return json.loads(json.dumps(values))


def result(changes, seed, recipe):
    """The figures of an experiment, {} where it has not been run with these settings."""
    asked = {"recipe": recipe, "changes": changes, "seed": seed, "settings": settings(recipe)}
    results = [entry["result"] for entry in read() if asked == {key: entry[key] for key in asked}]
    return results[-1] if results else {}


def title(number):
    text = TABLES[number].title
    return f"Table{'s' * (' and ' in number)} {number}: {text[0].lower()}{text[1:]}"


def recipe_for(number, full):
    return "full" if full else TABLES[number].recipe


def jobs(tables, seeds, full, device):
    """The experiments of these tables that are still to be run, those of the first seed first."""
    waiting = []
    for seed, table in itertools.product(seeds, tables):
        recipe = recipe_for(table, full)
        for changes in TABLES[table].rows.values():
            curved = recipe != "short" and changes in (None, BOTH)
            labels = {(task, few) for task in TASKS for few in (CURVE if curved else [TASKS[task]])}
            job = dict(recipe=recipe, changes=changes, seed=seed, labels=sorted(labels),
                       device=device)
            measured = result(changes, seed, recipe)
            complete = all(f"{task}, {few} labels" in measured for task, few in labels)
            if job not in waiting and not complete:
                waiting.append(job)
    return waiting


def versions(device):
    """The commit, the versions and the device that a result comes from."""
    git = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"], cwd=ROOT,
                             check=False).returncode
    return {"commit": git.strip() + "-dirty" * bool(changed), "torch": torch.__version__,
            "numpy": np.__version__, "python": sys.version.split()[0],
            "device": device_name(torch.device(device))}


def run(waiting, device):
    """Runs experiments, one for each core at a time, or one on a GPU; saves each as it ends."""
    origin = versions(device)
    workers = os.cpu_count() if device == "cpu" else 1
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        running = {pool.submit(experiment, job): job for job in waiting}
        ended = concurrent.futures.as_completed(running)
        for done in progress(ended, "experiments", len(running), " experiments"):
            if not done.exception():
                write_down(running[done], done.result(), origin)
        for done in running:
            done.result()  # raises the error of an experiment, after all others were saved


def write_down(job, figures, origin):
    entry = {key: job[key] for key in ("recipe", "changes", "seed")}
    entry |= {"settings": settings(job["recipe"]),
              "result": {name: round(value, 4) for name, value in figures.items()}, **origin}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(entry) + "\n")


# ---------------------------------------------------------------- tables, verdicts, pictures


def values(changes, figure, seeds, recipe):
    """A figure of each seed -> {seed: number}, without those not measured."""
    name = f"{figure}, {TASKS[figure]} labels" if figure in TASKS else figure
    results = {seed: result(changes, seed, recipe) for seed in seeds}
    return {seed: figures[name] for seed, figures in results.items() if name in figures}


def spread(by_seed, seeds, digits=1):
    """Mean and standard deviation of {seed: number}, as text."""
    if not by_seed:
        return "-"
    numbers = list(by_seed.values())
    deviation = f" +- {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    fewer = f" ({len(numbers)} of {len(seeds)} seeds)" if len(numbers) < len(seeds) else ""
    return f"{np.mean(numbers):.{digits}f}{deviation}{fewer}"


def verdict(higher, lower):
    """Whether one row's figures are above another's -> text.

    Both are {seed: number}. The text has the mean difference and its standard error.
    """
    differences = [higher[seed] - lower[seed] for seed in higher if seed in lower]
    if len(differences) < 3:
        return "not judged, with fewer than three seeds"
    mean = np.mean(differences)
    error = np.std(differences, ddof=1) / math.sqrt(len(differences))
    said = "shown" if mean > 2 * error else "opposite" if mean < -2 * error else "not shown"
    digits = 1 if max(abs(mean), error) >= 1 else 3
    return f"{said} ({mean:+.{digits}f}, standard error {error:.{digits}f})"


def lines(number, seeds, recipe):
    """A table in markdown, followed by the verdicts on the paper's claims -> [line]."""
    table = TABLES[number]
    text = [f"| | {' | '.join(table.figures)} | the paper |",
            f"| --- {'| --- ' * (len(table.figures) + 1)}|"]
    for (name, changes), paper in zip(table.rows.items(), table.paper):
        cells = [spread(values(changes, figure, seeds, recipe), seeds,
                        digits=3 if "loss" in figure else 1) for figure in table.figures]
        text.append(f"| {name} | {' | '.join(cells)} | {paper} |".replace("H|W", "H\\|W"))
    text.append("")
    for claim, figure, *rows in table.claims:
        higher, lower = (values(table.rows[row], figure, seeds, recipe) for row in rows)
        text.append(f"- {claim}: {verdict(higher, lower)}")
    return text


def curve(seeds, recipe):
    """What pre-training gives, by the number of labels.

    Returns {task: {row: {number of labels: {seed: top-1}}}}.
    """
    rows = {"pre-trained": BOTH, "from scratch": None}
    return {task: {name: {few: values(changes, f"{task}, {few} labels", seeds, recipe)
                          for few in CURVE}
                   for name, changes in rows.items()}
            for task in TASKS}


def curve_lines(seeds, recipe):
    """The curve as a table in markdown, followed by the verdicts -> [line]."""
    rows = curve(seeds, recipe)
    heads = [f"{task}, {name}" for task in TASKS for name in rows[task]]
    text = [f"| labelled videos | {' | '.join(heads)} |", f"| --- {'| --- ' * len(heads)}|"]
    for few in CURVE:
        cells = [spread(by_few[few], seeds) for task in TASKS for by_few in rows[task].values()]
        text.append(f"| {few} | {' | '.join(cells)} |")
    text.append("")
    for task, few in itertools.product(TASKS, CURVE):
        pair = (by_few[few] for by_few in rows[task].values())
        text.append(f"- pre-training helps on {task} with {few} labels: {verdict(*pair)}")
    return text


UNITS = {"contrastive loss": "gamma x nats", "speed": "videos/s",
         "mask accuracy": "% of hidden tokens", "copied": "% of hidden tokens",
         "kNN appearance": "% of other videos"}


def draw(number, seeds, recipe):
    """A picture of a table: each row's figures, seed by seed, and their mean."""
    table = TABLES[number]
    size = 2.8 * len(table.figures) + 1.5, 1.1 + 0.34 * len(table.rows)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"In miniature, {title(number)} (small dots: seeds; bars: their mean +- "
                    f"standard deviation)", fontsize=10)
    axes = figure.subplots(1, len(table.figures), sharey=True)
    for axis, name in zip(axes, table.figures):
        for i, changes in enumerate(table.rows.values()):
            numbers = list(values(changes, name, seeds, recipe).values())
            if numbers:
                deviation = np.std(numbers, ddof=1) if len(numbers) > 1 else 0
                axis.plot(numbers, [i] * len(numbers), ".", color="#56B4E9")
                axis.errorbar(np.mean(numbers), i, xerr=deviation, fmt="o", color="#0072B2",
                              capsize=3)
        axis.set(title=name, xlabel=UNITS.get(name, f"top-1 in %, {TASKS.get(name)} labels"))
        axis.set_yticks(range(len(table.rows)), list(table.rows))
        axis.margins(x=0.1, y=0.15)
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()
    name = f"table_{number.replace(' ', '_')}{'_full' * (recipe == 'full')}.png"
    figure.savefig(FIGURES / name, dpi=110)


def draw_curve(seeds, recipe):
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, len(TASKS))
    for axis, (task, rows) in zip(axes, curve(seeds, recipe).items()):
        means = {name: [(few, np.mean(list(by_seed.values())))
                        for few, by_seed in by_few.items() if by_seed]
                 for name, by_few in rows.items()}
        draw_lines(axis, {name: points for name, points in means.items() if points},
                   title=task, xlabel="labelled videos", ylabel="top-1, %", xscale="log")
        axis.set_xticks(CURVE, [str(few) for few in CURVE], minor=False)
        axis.minorticks_off()
    figure.savefig(FIGURES / f"labels{'_full' * (recipe == 'full')}.png", dpi=110)


# ---------------------------------------------------------------- the command


def tune(device):
    """Prints top-1 on the validation split, seed 0, for the rates of GRID.

    The models are those pre-trained with both tasks, and those from scratch.
    """
    torch.set_num_threads(1)
    for recipe, scratch in (("long", False), ("long", True), ("short", False)):
        out = folder(dict(recipe=recipe, changes=BOTH, seed=0))
        _, fps = pretrained(BOTH, 0, RECIPES[recipe], out, device)
        for task, few in TASKS.items():
            results = []
            for lr in GRID:
                settings = {**FINETUNING[recipe], "lr": lr}
                top_1 = finetuned(scratch, task, few, 0, out, device, fps, settings, "val")
                results.append(f"{top_1:.1f}% at {lr:g}")
            print(f"{recipe}, {task}, {'from scratch' if scratch else 'pre-trained'}: "
                  f"{', '.join(results)}", flush=True)


def show(tables, seeds, full):
    """Prints and draws the tables, and with Table 7 the curve over numbers of labels."""
    FIGURES.mkdir(exist_ok=True)
    for number in tables:
        recipe = recipe_for(number, full)
        print(f"\n## {title(number)}\n")
        print("\n".join(lines(number, seeds, recipe)))
        draw(number, seeds, recipe)
    if "7" in tables:
        recipe = recipe_for("7", full)
        print("\n## The number of labels\n")
        print("\n".join(curve_lines(seeds, recipe)))
        draw_curve(seeds, recipe)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE",
                        help=f"tables: {', '.join(TABLES)} (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED",
                        help="default: 0 1 2")
    parser.add_argument("--full", action="store_true",
                        help="the toy preset's sizes and batch, 800 steps, alpha 1")
    parser.add_argument("--show", action="store_true",
                        help="run nothing: print and draw what has been measured")
    parser.add_argument("--tune", action="store_true",
                        help="only print fine-tuning rates on the validation split")
    asked = parser.parse_args()
    device = pick_device("auto") if asked.full else torch.device("cpu")
    if asked.tune:
        make_world(device)
        return tune(device)
    if not asked.show:
        waiting = jobs(asked.only, asked.seeds, asked.full, device.type)
        make_world(device)
        run(waiting, device.type)
    show(asked.only, asked.seeds, asked.full)


if __name__ == "__main__":
    main()
