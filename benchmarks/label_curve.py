"""How many labels pre-training saves: fine-tuning against training from scratch.

    python benchmarks/label_curve.py            after findings.py: an hour on two cores
    python benchmarks/label_curve.py --rates    the learning rates, chosen on validation videos
    python benchmarks/label_curve.py --show     runs nothing; prints and draws what is measured

World, models (Table 7: both tasks, and none), seeds and recipes are those of findings.py; only the
number of labels varies, from 25 to 1,600. The accuracies with 100 labels are findings.py's own.
Training from scratch takes four times the steps. Each result is appended to label_curve.jsonl, so
that the command can be stopped and started again; the curve is drawn into figures/label_curve.png.
"""
import argparse
import itertools
import json
from pathlib import Path

import findings
import numpy as np
import torch
from findings import FINETUNING, SCRATCH, TASKS
from matplotlib.figure import Figure
from paper_tables import BOTH

from plumbing.cli import UserError
from plumbing.pictures import draw_lines, save

RESULTS = findings.ROOT / "benchmarks/label_curve.jsonl"
# {way: (row of Table 7, recipe)}
WAYS = {"pre-trained": (BOTH, FINETUNING), "from scratch, 4 times the steps": (None, SCRATCH)}
LABELS, SEEDS = (25, 100, 400, 1600), (0, 1, 2, 3, 4)
RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def job(way, task, seed, **changes):
    return dict(way=way, task=task, seed=seed, recipe=WAYS[way][1] | changes,
                settings=findings.settings())


def measure(job):
    """-> {"top-1": percent}, of the test videos or of recipe["eval_split"]."""
    checkpoint = Path(findings.folder(WAYS[job["way"]][0], job["seed"])) / "last.pt"
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} is missing: run benchmarks/findings.py first")
    recipe, split = job["recipe"], job["recipe"].get("eval_split", "test")
    name = "-".join(f"{key}={value}" for key, value in recipe.items())
    out = f"{checkpoint.parent}/labels/{name}"
    with findings.quiet():
        p = findings.finetuned(checkpoint, out, job["task"], job["seed"], torch.device("cpu"),
                               recipe)
    return {"top-1": findings.top_1(p, job["task"], split)}


def read():
    """The results so far -> {job as JSON: top-1 in percent}."""
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    entries = [json.loads(line) for line in lines]
    keys = job("pre-trained", "motion", 0).keys()
    return {json.dumps({key: entry[key] for key in keys}): entry["result"]["top-1"]
            for entry in entries}


def value(*arguments, **changes):
    """The result of a job, None where it has not been run."""
    return read().get(json.dumps(job(*arguments, **changes)))


# ---------------------------------------------------------------- what to run, and what came of it


def rates():
    """The grid: at 100 labels, seed 0, top-1 on the validation videos."""
    return [job(way, task, 0, lr=lr, eval_split="val")
            for way, task, lr in itertools.product(WAYS, TASKS, RATES)]


def curve(seeds):
    return [job(way, task, seed, num_labels=count)
            for seed, way, task, count in itertools.product(seeds, WAYS, TASKS, LABELS)
            if count != FINETUNING["num_labels"]]


def rate_lines():
    """The grid, in markdown -> [line]."""
    text = [f"| rate | {' | '.join(f'{lr:g}' for lr in RATES)} |",
            f"| --- {'| --- ' * len(RATES)}|"]
    for task, way in itertools.product(TASKS, WAYS):
        numbers = [value(way, task, 0, lr=lr, eval_split="val") for lr in RATES]
        cells = ["-" if number is None else f"{number:.1f}" for number in numbers]
        text.append(f"| {task}, {way} | {' | '.join(cells)} |")
    return text


def lines(seeds):
    """The table, in markdown: mean and standard deviation over the seeds -> [line]."""
    text = [f"| labels | {' | '.join(map(str, LABELS))} |", f"| --- {'| --- ' * len(LABELS)}|"]
    for task, way in itertools.product(TASKS, WAYS):
        cells = [findings.spread(by_seed(way, task, count, seeds), seeds) for count in LABELS]
        text.append(f"| {task}, {way} | {' | '.join(cells)} |")
    return text


def by_seed(way, task, count, seeds):
    """-> {seed: top-1 in percent}, without those not measured."""
    if count == FINETUNING["num_labels"]:
        return findings.values(WAYS[way][0], task, seeds)
    numbers = {seed: value(way, task, seed, num_labels=count) for seed in seeds}
    return {seed: number for seed, number in numbers.items() if number is not None}


def draw(seeds):
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, task in zip(figure.subplots(1, 2, sharey=True), TASKS):
        curves, bands = {}, {}
        for way in WAYS:
            points = {count: list(by_seed(way, task, count, seeds).values()) for count in LABELS}
            points = {count: numbers for count, numbers in points.items() if numbers}
            curves[way] = [(count, np.mean(numbers)) for count, numbers in points.items()]
            bands[way] = points
        draw_lines(axis, {way: points for way, points in curves.items() if points}, title=task,
                   xlabel="labelled videos", ylabel="top-1 on test videos, %", xscale="log",
                   ylim=(20, 102))
        for line, points in zip(axis.get_lines(), bands.values()):
            axis.fill_between(list(points), [min(numbers) for numbers in points.values()],
                              [max(numbers) for numbers in points.values()],
                              color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_xticks(LABELS, LABELS)
        axis.minorticks_off()
        axis.axhline(25, color="grey", linestyle=":")
    figure.suptitle(f"Fine-tuning against training from scratch (mean and range of {len(seeds)} "
                    f"seeds; dotted: chance)", fontsize=10)
    save(figure, findings.FIGURES / "label_curve.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", action="store_true", help="the grid of learning rates")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED")
    asked = parser.parse_args()
    if not asked.show:
        jobs = rates() if asked.rates else curve(asked.seeds)
        done = read()
        findings.run(measure, [job for job in jobs if json.dumps(job) not in done], "cpu", RESULTS)
    print("\n".join(rate_lines() if asked.rates else lines(asked.seeds)))
    if not asked.rates:
        draw(asked.seeds)


if __name__ == "__main__":
    main()
