"""The paper's findings in miniature: its tables as experiments on the toy world, over seeds.

    python benchmarks/findings.py                 every table: about an hour on two cores
    python benchmarks/findings.py --only 7 8      these alone
    python benchmarks/findings.py --tune          the fine-tuning rates, on the validation split
    python benchmarks/findings.py --show          runs nothing: what has been measured so far
    python benchmarks/findings.py --full          the toy preset's layers and width, 800 steps: a night, or a GPU

An experiment is a pre-training, then a fine-tuning for each task with few labels; tables share those that they have in
common. Each is written to findings.jsonl as soon as it ends, with its settings, seed, seconds, commit and versions, so
that the command can be stopped and started again; delete a line to run it anew. On CPUs each has one thread, so that it
gives the same numbers on any number of cores. At the end the tables are printed, beside the paper's figures, and drawn
into figures/.

A claim is judged by the difference of two rows, seed by seed (a seed gives both the same videos and labels): shown
where its mean is more than two standard errors above 0, opposite where it is as far below, else not shown. With three
seeds that happens by chance to one claim in five.
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
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import finetune
import masking
import monitor
import pretrain
import toy
import vqvae
from plumbing.cli import parse, progress
from plumbing.pictures import draw_lines
from plumbing.processes import device_name, pick_device, pick_precision, seed_all
from plumbing.runs import read_metrics

RESULTS, FIGURES = ROOT / "benchmarks/findings.jsonl", ROOT / "benchmarks/figures"
HOME = Path("datasets/findings")
# The toy world, but with the light on: else half of the tokens are predicted by knowing whether it is. And with
# larger shapes, so that more of them show something that moves.
WORLD = toy.World(light=False, radius=(14, 22))
SPLITS = {"pretrain": 1000, "train": 200, "val": 200, "test": 500}
TASKS = {"motion": 48, "appearance": 48}  # labelled videos: so few that no recipe comes near 100%
RECIPES = {  # what is other than in the toy preset
    "long": dict(alpha=1.0, layers=2, batch=16, steps=200, lr=4e-3, min_stride=2, max_stride=2),  # Tables 7 and 8
    "short": dict(alpha=1.0, layers=2, dim=32, heads=2, mlp_dim=128, batch=16, steps=150, lr=8e-3, min_stride=2,
                  max_stride=2),
    "full": dict(alpha=1.0, steps=800, min_stride=2, max_stride=2)}  # with --full, of all
SLOW = dict(min_stride=1, max_stride=1)  # frames an eighth of a second apart: they look alike, as real ones do
STEPS, LONGER = 60, 4  # of fine-tuning; from scratch so many times as many, as in Table 4
FINETUNING = {"long": dict(lr=4e-3, batch=16), "short": dict(lr=8e-3, batch=8), "full": dict(lr=4e-3, batch=16)}
SCRATCH = {"motion": 4e-3, "appearance": 2e-3}  # its rates; like those above the best of GRID on the validation split
GRID = (1e-3, 2e-3, 4e-3, 8e-3)
CURVE = (24, 48, 96)  # labelled videos


class Table(NamedTuple):
    title: str
    rows: dict  # {name: what changes in the recipe, or None: no pre-training}
    paper: tuple  # what the paper's table says of each; of many tokens M is the share predicted, C the contrastive loss
    claims: tuple  # (what the paper says, or is asked beside it; in which figure; the higher row, the lower row)
    figures: tuple = ("mask accuracy", "contrastive loss", "motion", "appearance")
    recipe: str = "short"


BOTH, MASK, CONTRAST = {}, dict(alpha=0.0), dict(mask_weight=0.0, contrast_on="whole")
IID = dict(MASK, mask="iid")
WITH_KNN = ("mask accuracy", "contrastive loss", "kNN appearance", "motion", "appearance")
TABLES = {
    "7": Table(
        "Which tasks", {"none": None, "contrastive only": CONTRAST, "mask only": MASK, "both": BOTH},
        ("SSV2 1.2, UCF101 41.3", "SSV2 32.5, UCF101 57.1", "SSV2 41.4, UCF101 68.3", "SSV2 41.1, UCF101 69.4"),
        (("pre-training is far above none on the temporal task", "motion", "both", "none"),
         ("and on the spatial one", "appearance", "both", "none"),
         ("alone, masks help more than contrastive learning: temporal task", "motion", "mask only", "contrastive only"),
         ("and spatial task", "appearance", "mask only", "contrastive only"),
         ("masks alone are above none: temporal task", "motion", "mask only", "none"),
         ("and spatial task", "appearance", "mask only", "none"),
         ("contrastive learning alone is above none: temporal task", "motion", "contrastive only", "none"),
         ("and spatial task", "appearance", "contrastive only", "none"),
         ("masks add to contrastive learning on the temporal task", "motion", "both", "contrastive only"),
         ("contrastive learning adds to masks on the spatial task", "appearance", "both", "mask only")), recipe="long"),
    "8": Table(
        "Which masks, without the contrastive task",
        {"block": MASK, "i.i.d.": IID, "block, slow": {**MASK, **SLOW}, "i.i.d., slow": {**IID, **SLOW}},
        ("M 17.6, UCF101 68.3", "M 24.3, UCF101 63.5", "", ""),
        (("i.i.d. masks have the higher masked-token accuracy", "mask accuracy", "i.i.d.", "block"),
         ("but fine-tune less well: spatial task", "appearance", "block", "i.i.d."),
         ("(asked here) temporal task", "motion", "block", "i.i.d."),
         ("slow clips: i.i.d. masks have the higher masked-token accuracy", "mask accuracy", "i.i.d., slow",
          "block, slow"),
         ("slow clips: but fine-tune less well: spatial task", "appearance", "block, slow", "i.i.d., slow"),
         ("(asked here) slow clips: temporal task", "motion", "block, slow", "i.i.d., slow"),
         ("as a hidden token more often equals its nearest visible neighbour", "copied", "i.i.d.", "block")),
        ("mask accuracy", "copied", "motion", "appearance"), "long"),
    "9 and 15": Table(
        "How much is hidden, without the contrastive task",
        {"block, 11.1%": dict(MASK, blocks=3), "block, 14.5%": MASK, "block, 17.6%": dict(MASK, blocks=5),
         "i.i.d., 11%": dict(IID, mask_ratio=0.11), "i.i.d., 15%": IID, "i.i.d., 18%": dict(IID, mask_ratio=0.18)},
        ("M 17.9, UCF101 66.8", "M 17.6, UCF101 68.3", "M 17.3, UCF101 67.3", "M 25.6, UCF101 64.5",
         "M 24.3, UCF101 63.5", "M 24.0, UCF101 64.0"),
        (("the more is hidden in blocks, the less is predicted", "mask accuracy", "block, 11.1%", "block, 17.6%"),
         ("and likewise token by token", "mask accuracy", "i.i.d., 11%", "i.i.d., 18%"),
         ("about 15% in blocks fine-tunes better than less", "appearance", "block, 14.5%", "block, 11.1%"),
         ("and than more", "appearance", "block, 14.5%", "block, 17.6%"))),
    "10": Table(
        "How far apart two clips of a video may start", {"anywhere": BOTH, "1 s": dict(d_max=1), "0 s": dict(d_max=0)},
        ("C 1.06, UCF101 69.4", "30 s: C 0.77, UCF101 69.0; 10 s: C 0.61, UCF101 68.3", "C 0.41, UCF101 66.7"),
        (("clips at one place are told from others more easily", "contrastive loss", "anywhere", "0 s"),
         ("but teach less: spatial task", "appearance", "anywhere", "0 s"),
         ("(asked here) temporal task", "motion", "anywhere", "0 s"))),
    "11": Table(
        "How many videos are told apart, in batches of 128", {f"n = {n}": dict(batch=128, contrast=n)
                                                             for n in (16, 32, 64, 128)},
        ("n = 128: C 1.06, UCF101 69.4", "n = 256: C 1.30, UCF101 69.2", "n = 512: C 1.56, UCF101 70.4",
         "n = 1024: C 1.86, UCF101 69.8"),
        (("the more, the higher the loss", "contrastive loss", "n = 128", "n = 16"),
         ("(asked here) and the better the fine-tuning: spatial task", "appearance", "n = 128", "n = 16")), WITH_KNN),
    "12": Table(
        "Whether the clips told apart are masked",
        {"contrastive only, whole": CONTRAST, "contrastive only, masked": dict(mask_weight=0.0),
         "both tasks, whole": dict(contrast_on="whole"), "both tasks, masked": BOTH},
        ("UCF101 57.1", "UCF101 55.5", "UCF101 67.4", "UCF101 69.4"),
        (("alone, whole clips teach more", "appearance", "contrastive only, whole", "contrastive only, masked"),
         ("with the mask task, masked ones do", "appearance", "both tasks, masked", "both tasks, whole"),
         ("(asked here) temporal task", "motion", "both tasks, masked", "both tasks, whole")), WITH_KNN),
    "13": Table(
        "Attention layouts", {"TxHxW": dict(layout="TxHxW"), "T,HxW": dict(layout="T,HxW"),
                              "T,H,W": dict(layout="T,H,W"), "T,H|W": BOTH,
                              "T,H,W, pre-LN": dict(layout="T,H,W", pre_norm=True),
                              "T,H|W, pre-LN": dict(pre_norm=True)},
        ("UCF101 65.9, speed 12.6", "UCF101 69.0, speed 20.0", "UCF101 69.6, speed 26.4", "UCF101 69.4, speed 32.0",
         "UCF101 69.0", "UCF101 67.6"),
        (("T,H|W is faster than all tokens at once", "speed", "T,H|W", "TxHxW"),
         ("than T,HxW", "speed", "T,H|W", "T,HxW"), ("and than T,H,W", "speed", "T,H|W", "T,H,W"),
         ("and better than all tokens at once: spatial task", "appearance", "T,H|W", "TxHxW"),
         ("(asked here) temporal task", "motion", "T,H|W", "TxHxW"),
         ("post-LN is better than pre-LN: spatial task", "appearance", "T,H|W", "T,H|W, pre-LN"),
         ("(asked here) temporal task", "motion", "T,H|W", "T,H|W, pre-LN")),
        ("mask accuracy", "contrastive loss", "speed", "motion", "appearance")),
    "16": Table(
        "The contrastive loss's weight",
        {"alpha 0": MASK, "alpha 0.5": dict(alpha=0.5), "alpha 1": BOTH, "alpha 2": dict(alpha=2.0)},
        ("M 17.6, UCF101 68.3", "M 17.5, C 1.07, UCF101 70.2", "M 17.2, C 1.06, UCF101 69.4",
         "M 16.9, C 1.05, UCF101 68.0"),
        (("the more it weighs, the less is predicted", "mask accuracy", "alpha 0", "alpha 2"),
         ("0.5 is better than 0", "appearance", "alpha 0.5", "alpha 0"),
         ("and than 2: spatial task", "appearance", "alpha 0.5", "alpha 2"),
         ("(asked here) temporal task", "motion", "alpha 0.5", "alpha 2"))),
    "6 and 14": Table(
        "Sizes of the model and the clip", {"d = 16": dict(dim=16, head_dim=8, mlp_dim=64), "as elsewhere": BOTH,
                                            "8 frames": dict(frames=8)},
        ("d = 512: M 17.2, C 1.06, UCF101 69.4", "d = 768: M 17.7, C 1.03, UCF101 75.0",
         "d = 512, 10 frames: M 17.2, C 0.96, UCF101 74.2 (5 frames: 69.4)"),
        (("a wider model predicts more", "mask accuracy", "as elsewhere", "d = 16"),
         ("and fine-tunes better: spatial task", "appearance", "as elsewhere", "d = 16"),
         ("(asked here) temporal task", "motion", "as elsewhere", "d = 16"),
         ("longer clips are told apart more easily", "contrastive loss", "as elsewhere", "8 frames"),
         ("and fine-tune better: spatial task", "appearance", "8 frames", "as elsewhere"),
         ("(asked here) temporal task", "motion", "8 frames", "as elsewhere")))}


# ---------------------------------------------------------------- one experiment


def make_world(device):
    """The videos, a tokenizer trained on them, their tokens: what pretrain.py makes of the toy world, of this one."""
    torch.set_num_threads(2)  # on any number of cores, for the same tokenizer; of each experiment it is 1
    toy.make(HOME, SPLITS, world=WORLD)
    splits, place = {split: toy.split_videos(HOME, split) for split in SPLITS}, HOME / "tokenizer.pt"
    preset = pretrain.PRESETS["toy"]
    if not place.is_file():
        vqvae.make_tokenizer([path for path, _ in splits["pretrain"]], place, preset["fps"], preset["frame_size"], 8000,
                             codes=preset["codes"], steps=preset["tokenizer_steps"], batch=64, lr=2e-3, seed=0,
                             device=device)
    for split, videos in splits.items():
        vqvae.tokenize(vqvae.load_tokenizer(place).to(device), videos, HOME, HOME / "tokens" / split, preset["fps"],
                       preset["frame_size"], data.views_for("pretrain", preset["frame_size"]), place.name, toy.CLASSES)


def flags(settings):
    return [part for key, value in settings.items() if value is not False
            for part in ("--" + key.replace("_", "-"), *([] if value is True else [str(value)]))]


def pretrained(changes, seed, recipe, out, device):
    """Pre-trains, or for None starts a model -> its figures on the held-out videos, its clips' frames a second."""
    usual = {**pretrain.PRESETS["toy"], "init_std": 0.02, **recipe}  # weights that start as the paper's
    recipe = {**usual, **({"steps": 1} if changes is None else changes)}
    if recipe["batch"] != usual["batch"]:  # as many videos in all, but for at least 40 steps
        recipe["steps"] = max(40, 10 * math.ceil(usual["steps"] * usual["batch"] / recipe["batch"] / 10))
    config = parse(pretrain.Config, flags(dict(
        recipe, seed=seed, out=out, micro_batch=recipe["batch"], knn_every=recipe["steps"], save_every=recipe["steps"],
        **on(device))), "", pretrain.PRESETS)
    store = data.TokenStore(HOME / "tokens/pretrain")
    pretrain.share_out(config, len(store), 1)
    seed_all(seed)
    model = pretrain.Vimpac(config.transformer(store.header["vocab_size"], store.height, store.width),
                            config.projection_hidden, config.projection_layers).to(device)
    start = seconds(device)
    pretrain.train(config, model, store, device, HOME / "tokens")
    took = seconds(device) - start
    last = [record for record in read_metrics(out) if "held_out_loss" in record][-1]
    found = {"seconds": round(took, 1), "speed": config.steps * config.batch / took,
             "copied": copied(config, store),
             **{f"kNN {name}": 100 * last[f"knn_{name}"] for name in ("motion", "appearance", "direction")}}
    if changes is not None and config.mask_weight:
        found["mask accuracy"] = 100 * last["held_out_mask_accuracy"]
    if changes is not None and config.alpha:
        found["contrastive loss"] = last["held_out_contrastive_loss"]
    return found, config.clip_fps(store)


def on(device):
    """On CPUs in float32: some have bfloat16, and would give other numbers."""
    return dict(device=device.type, precision="fp32" if device.type == "cpu" else "auto")


def seconds(device):
    return time.process_time() if device.type == "cpu" else time.perf_counter()  # other programs share the CPU


def copied(config, store):
    """Of the tokens hidden in held-out videos, how many equal their nearest visible neighbour in space and time, in
    percent."""
    pairs, videos = config.pairs(store), data.hold_out(len(store), config.held_out)[1]
    clips = torch.from_numpy(np.stack([pairs[int(video), 0] for video in videos]))
    batch = masking.prepare(clips, store.header["vocab_size"], generator=torch.Generator().manual_seed(config.seed),
                            **config.masks())
    right = monitor.copied(batch.tokens, batch.mask, over_time=True) == batch.tokens
    return 100 * right[batch.mask].float().mean().item()


def finetuned(scratch, task, few, seed, out, device, fps, recipe, split="test"):
    """Fine-tunes out/last.pt on a few labels, or from scratch a model of its size -> top-1 in percent. recipe: one of
    FINETUNING's."""
    steps = STEPS * (LONGER if scratch else 1)
    config = parse(finetune.Config, flags(dict(
        checkpoint=f"{out}/last.pt", from_scratch=scratch, labels=task, few=few, seed=seed, steps=steps,
        fps=fps, clips=1, eval_split=split, data=HOME / "tokens", out=f"{out}/{task}",
        micro_batch=recipe["batch"], save_every=steps, **recipe, **on(device))), "", finetune.DATASETS, "dataset")
    stores, labels, _, model, tokens = finetune.prepare(config, device)
    precision = pick_precision(config.precision, device)
    finetune.train(config, model, stores["train"], labels, device, tokens)
    p = finetune.evaluate(model, stores[split], config, device, precision).cpu()
    return 100 * (p.argmax(dim=1) == torch.tensor(stores[split].labels(labels))).float().mean().item()


def folder(job):
    name = json.dumps([job["recipe"], job["changes"], job["seed"]])
    return f"runs/findings/{zlib.crc32(name.encode()):08x}"


def experiment(job):
    """Pre-training, then fine-tuning on each of the job's tasks and numbers of labels -> {figure: number}."""
    torch.set_num_threads(1)
    device, out = torch.device(job["device"]), folder(job)
    scratch = job["changes"] is None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found, fps = pretrained(job["changes"], job["seed"], RECIPES[job["recipe"]], out, device)
        for task, few in job["labels"]:
            recipe = {**FINETUNING[job["recipe"]], **({"lr": SCRATCH[task]} if scratch else {})}
            found[f"{task}, {few} labels"] = finetuned(scratch, task, few, job["seed"], out, device, fps, recipe)
    return found


# ---------------------------------------------------------------- what to run, and what is there


def read():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def settings(recipe):
    """All that an experiment's figures depend on, beside its changes, its seed and the code."""
    tuning = FINETUNING[recipe] | {"steps": STEPS, "from scratch": [LONGER, SCRATCH]}
    return json.loads(json.dumps({"world": WORLD._asdict(), "splits": SPLITS, "pre-training": RECIPES[recipe],
                                  "fine-tuning": tuning}))


def result(changes, seed, recipe):
    """The figures of an experiment, {} where it has not been run with these settings."""
    asked = {"recipe": recipe, "changes": changes, "seed": seed, "settings": settings(recipe)}
    found = [line["result"] for line in read() if asked == {key: line[key] for key in asked}]
    return found[-1] if found else {}


def title(number):
    what = TABLES[number].title
    return f"Table{'s' * (' and ' in number)} {number}: {what[0].lower()}{what[1:]}"


def recipe_for(number, full):
    return "full" if full else TABLES[number].recipe


def jobs(tables, seeds, full, device):
    """The experiments of these tables that are still to be run, those of the first seed first."""
    found = []
    for seed, table in itertools.product(seeds, tables):
        recipe = recipe_for(table, full)
        for changes in TABLES[table].rows.values():
            curved = recipe != "short" and changes in (None, BOTH)
            few = {(task, labels) for task in TASKS for labels in (CURVE if curved else [TASKS[task]])}
            job = dict(recipe=recipe, changes=changes, seed=seed, labels=sorted(few), device=device)
            measured = result(changes, seed, recipe)
            if job not in found and not all(f"{task}, {labels} labels" in measured for task, labels in few):
                found.append(job)
    return found


def run(waiting, device):
    """Runs experiments, as many at a time as there are cores, or one on a GPU; writes each down as it ends."""
    head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"], cwd=ROOT, check=False).returncode
    origin = {"commit": head + "-dirty" * bool(changed), "torch": torch.__version__, "numpy": np.__version__,
              "python": sys.version.split()[0], "device": device_name(torch.device(device))}
    at_once = os.cpu_count() if device == "cpu" else 1
    with concurrent.futures.ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(experiment, job): job for job in waiting}
        for done in progress(concurrent.futures.as_completed(running), "experiments", len(running), " experiments"):
            if not done.exception():
                write_down(running[done], done.result(), origin)
        for failed in running:
            failed.result()  # raises what it failed with, after all others were written


def write_down(job, figures, origin):
    line = {**{key: job[key] for key in ("recipe", "changes", "seed")}, "settings": settings(job["recipe"]),
            "result": {name: round(value, 4) for name, value in figures.items()}, **origin}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------- tables, verdicts, pictures


def values(changes, figure, seeds, recipe):
    """A figure of each seed -> {seed: number}, without those not measured."""
    name = f"{figure}, {TASKS[figure]} labels" if figure in TASKS else figure
    found = {seed: result(changes, seed, recipe) for seed in seeds}
    return {seed: figures[name] for seed, figures in found.items() if name in figures}


def spread(by_seed, seeds, digits=1):
    """Mean and standard deviation of {seed: number}, as text."""
    if not by_seed:
        return "-"
    numbers = list(by_seed.values())
    deviation = f" +- {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    fewer = f" ({len(numbers)} of {len(seeds)} seeds)" if len(numbers) < len(seeds) else ""
    return f"{np.mean(numbers):.{digits}f}{deviation}{fewer}"


def verdict(higher, lower):
    """Two rows' figures, {seed: number} -> the mean difference, its standard error, and what they say."""
    differences = [higher[seed] - lower[seed] for seed in higher if seed in lower]
    if len(differences) < 3:
        return "not judged, with fewer than three seeds"
    mean, error = np.mean(differences), np.std(differences, ddof=1) / math.sqrt(len(differences))
    said = "shown" if mean > 2 * error else "opposite" if mean < -2 * error else "not shown"
    digits = 1 if max(abs(mean), error) >= 1 else 3
    return f"{said} ({mean:+.{digits}f}, standard error {error:.{digits}f})"


def lines(number, seeds, recipe):
    """A table, in markdown, and under it what became of the paper's claims -> [line]."""
    table = TABLES[number]
    found = [f"| | {' | '.join(table.figures)} | the paper |", f"| --- {'| --- ' * (len(table.figures) + 1)}|"]
    for (name, changes), paper in zip(table.rows.items(), table.paper):
        cells = [spread(values(changes, figure, seeds, recipe), seeds, 3 if "loss" in figure else 1)
                 for figure in table.figures]
        found.append(f"| {name} | {' | '.join(cells)} | {paper} |".replace("H|W", "H\\|W"))
    found.append("")
    for claim, figure, *rows in table.claims:
        higher, lower = (values(table.rows[row], figure, seeds, recipe) for row in rows)
        found.append(f"- {claim}: {verdict(higher, lower)}")
    return found


def curve(seeds, recipe):
    """What pre-training gives, by the number of labels -> {task: {row: {labels: {seed: top-1}}}}."""
    return {task: {name: {few: values(changes, f"{task}, {few} labels", seeds, recipe) for few in CURVE}
                   for name, changes in (("pre-trained", BOTH), ("from scratch", None))} for task in TASKS}


def curve_lines(seeds, recipe):
    found, rows = [], curve(seeds, recipe)
    found += [f"| labelled videos | {' | '.join(f'{task}, {name}' for task in TASKS for name in rows[task])} |",
              f"| --- {'| --- ' * (2 * len(TASKS))}|"]
    for few in CURVE:
        cells = [spread(by_few[few], seeds) for task in TASKS for by_few in rows[task].values()]
        found.append(f"| {few} | {' | '.join(cells)} |")
    found.append("")
    for task, few in itertools.product(TASKS, CURVE):
        found.append(f"- pre-training helps on {task} with {few} labels: "
                     f"{verdict(*(by_few[few] for by_few in rows[task].values()))}")
    return found


def draw(number, seeds, recipe):
    """A picture of a table: each row's figures, seed by seed, and their mean."""
    table = TABLES[number]
    figure = Figure(figsize=(2.8 * len(table.figures) + 1.5, 1.1 + 0.34 * len(table.rows)), layout="constrained")
    figure.suptitle(f"In miniature, {title(number)} (small dots: seeds; bars: their mean +- standard deviation)",
                    fontsize=10)
    for axis, name in zip(figure.subplots(1, len(table.figures), sharey=True), table.figures):
        for i, changes in enumerate(table.rows.values()):
            found = list(values(changes, name, seeds, recipe).values())
            if found:
                axis.plot(found, [i] * len(found), ".", color="#56B4E9")
                axis.errorbar(np.mean(found), i, xerr=np.std(found, ddof=1) if len(found) > 1 else 0, fmt="o",
                              color="#0072B2", capsize=3)
        units = {"contrastive loss": "gamma x nats", "speed": "videos/s", "mask accuracy": "% of hidden tokens",
                 "copied": "% of hidden tokens", "kNN appearance": "% of other videos"}
        axis.set(title=name, xlabel=units.get(name, f"top-1 in %, {TASKS.get(name)} labels"))
        axis.set_yticks(range(len(table.rows)), list(table.rows))
        axis.margins(x=0.1, y=0.15)
        axis.grid(alpha=0.3)
    axis.invert_yaxis()
    figure.savefig(FIGURES / f"table_{number.replace(' ', '_')}{'_full' * (recipe == 'full')}.png", dpi=110)


def draw_curve(seeds, recipe):
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axis, (task, rows) in zip(figure.subplots(1, len(TASKS)), curve(seeds, recipe).items()):
        means = {name: [(few, np.mean(list(found.values()))) for few, found in by_few.items() if found]
                 for name, by_few in rows.items()}
        draw_lines(axis, {name: points for name, points in means.items() if points},
                   title=task, xlabel="labelled videos", ylabel="top-1, %", xscale="log")
        axis.set_xticks(CURVE, [str(few) for few in CURVE], minor=False)
        axis.minorticks_off()
    figure.savefig(FIGURES / f"labels{'_full' * (recipe == 'full')}.png", dpi=110)


# ---------------------------------------------------------------- the command


def tune(device):
    """The fine-tuning rates on the validation split, seed 0, of what both tasks have pre-trained and from scratch."""
    torch.set_num_threads(1)
    for recipe, scratch in (("long", False), ("long", True), ("short", False)):
        job = dict(recipe=recipe, changes=BOTH, seed=0)
        _, fps = pretrained(BOTH, 0, RECIPES[recipe], folder(job), device)
        for task, few in TASKS.items():
            found = [finetuned(scratch, task, few, 0, folder(job), device, fps, {**FINETUNING[recipe], "lr": lr}, "val")
                     for lr in GRID]
            print(f"{recipe}, {task}, {'from scratch' if scratch else 'pre-trained'}: "
                  f"{', '.join(f'{top:.1f}% at {lr:g}' for lr, top in zip(GRID, found))}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE",
                        help=f"tables: {', '.join(TABLES)} (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--full", action="store_true", help="the toy preset's sizes and batch, 800 steps, alpha 1")
    parser.add_argument("--show", action="store_true", help="run nothing: print and draw what is there")
    parser.add_argument("--tune", action="store_true", help="print fine-tuning rates on the validation split, no more")
    asked = parser.parse_args()
    device = pick_device("auto") if asked.full else torch.device("cpu")
    if asked.tune:
        make_world(device)
        return tune(device)
    if not asked.show:
        waiting = jobs(asked.only, asked.seeds, asked.full, device.type)
        make_world(device)
        run(waiting, device.type)
    FIGURES.mkdir(exist_ok=True)
    for number in asked.only:
        recipe = recipe_for(number, asked.full)
        print(f"\n## {title(number)}\n")
        print("\n".join(lines(number, asked.seeds, recipe)))
        draw(number, asked.seeds, recipe)
    if "7" in asked.only:
        recipe = recipe_for("7", asked.full)
        print("\n## The number of labels\n")
        print("\n".join(curve_lines(asked.seeds, recipe)))
        draw_curve(asked.seeds, recipe)


if __name__ == "__main__":
    main()
