"""What pre-training is worth, by the number of labels: fine-tuning against from scratch.

    python benchmarks/label_curve.py            after findings.py: an hour and a half on two cores
    python benchmarks/label_curve.py --rates    a grid of learning rates, on validation videos
    python benchmarks/label_curve.py --show     runs nothing; prints and draws what is measured

World, models (Table 7: both tasks, and none), seeds and recipes are those of findings.py; only the
number of labels varies, from 25 to 1,600, and with it the steps: 200 up to 100 labels, then twice
as many for four times the labels; from scratch always four times as many. The accuracies with 100
labels are findings.py's own. Each result is appended to label_curve.jsonl, so that the command can
be stopped and started again; the curve is drawn into figures/label_curve.png.
"""
import argparse
import itertools

import findings
import numpy as np
from findings import FINETUNING, SCRATCH, TASKS
from matplotlib.figure import Figure
from paper_tables import BOTH

from plumbing.cli import UserError, run
from plumbing.files import read_lines
from plumbing.pictures import save

RESULTS = findings.ROOT / "benchmarks/label_curve.jsonl"
# {way: (row of Table 7, recipe, {labels: learning rate} where it is not the recipe's)}
WAYS = {"pre-trained": (BOTH, FINETUNING, {400: 2e-3, 1600: 2e-3}),
        "from scratch, 4 times the steps": (None, SCRATCH, {400: 5e-4, 1600: 5e-4})}
LABELS = {25: 1, 100: 1, 400: 2, 1600: 4}  # and how many times the recipe's steps
MOST_FREQUENT = {"motion": 27.1, "scene": 30.2}  # class of the test videos, in percent
SEEDS = (0, 1, 2, 3, 4)
RATES, GRID_LABELS = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3), (100, 400, 1600)


def job(way, task, seed, **changes):
    return dict(way=way, task=task, seed=seed, recipe=WAYS[way][1] | changes,
                settings=findings.common_settings())


def measure(job):
    """-> {"top-1": percent}, of the test videos or of recipe["eval_split"]."""
    folder = findings.folder(WAYS[job["way"]][0], job["seed"])
    if not findings.finished(folder):
        raise UserError(f"{folder} holds no model: delete the lines of seed {job['seed']} "
                        "in findings.jsonl and run findings.py")
    recipe, split = job["recipe"], job["recipe"].get("eval_split", "test")
    name = "-".join(f"{key}={value}" for key, value in recipe.items())
    out = f"{folder}/labels/{job['task']}-{name}"
    with findings.quiet():
        p = findings.finetuned(f"{folder}/last.pt", out, job["task"], job["seed"], recipe)
    return {"top-1": findings.top_1(p, job["task"], split)}


def results():
    """What has been measured -> [(job, top-1 in percent)]."""
    keys = job("pre-trained", "motion", 0).keys()
    return [({key: entry[key] for key in keys}, entry["result"]["top-1"])
            for entry in read_lines(RESULTS)]


def value(*arguments, **changes):
    """The result of a job, None where it has not been done."""
    asked = job(*arguments, **changes)
    return next((top_1 for done, top_1 in results() if done == asked), None)


# ---------------------------------------------------------------- what to run, and what came of it


def rates():
    """The grid: seed 0, top-1 on the validation videos."""
    return [job(way, task, 0, **tried(way, count, lr))
            for count, way, task, lr in itertools.product(GRID_LABELS, WAYS, TASKS, RATES)]


def tried(way, count, lr):
    """-> what changes in the recipe for a cell of the grid."""
    return dict(with_labels(way, count), lr=lr, eval_split="val")


def with_labels(way, count):
    """-> what changes in the recipe with so many labels."""
    _, recipe, rates = WAYS[way]
    return dict(num_labels=count, lr=rates.get(count, recipe["lr"]),
                steps=LABELS[count] * recipe["steps"])


def curve(seeds):
    return [job(way, task, seed, **with_labels(way, count))
            for seed, way, task, count in itertools.product(seeds, WAYS, TASKS, LABELS)
            if count != FINETUNING["num_labels"]]


def rate_lines():
    """The grid, in markdown -> [line]."""
    text = [f"| rate | {' | '.join(f'{lr:g}' for lr in RATES)} |",
            f"| --- {'| --- ' * len(RATES)}|"]
    for count, task, way in itertools.product(GRID_LABELS, TASKS, WAYS):
        numbers = [value(way, task, 0, **tried(way, count, lr)) for lr in RATES]
        cells = ["-" if number is None else f"{number:.1f}" for number in numbers]
        if set(cells) != {"-"}:
            text.append(f"| {task}, {count:,} labels, {way} | {' | '.join(cells)} |")
    return text


def lines(seeds):
    """The table, in markdown: mean and standard deviation over the seeds -> [line]."""
    text = [f"| labels | {' | '.join(map(str, LABELS))} |", f"| --- {'| --- ' * len(LABELS)}|"]
    for task, way in itertools.product(TASKS, WAYS):
        points = [by_seed(way, task, count, seeds) for count in LABELS]
        cells = [findings.spread(point) + findings.fewer(point, seeds) for point in points]
        text.append(f"| {task}, {way} | {' | '.join(cells)} |")
    return text


def by_seed(way, task, count, seeds):
    """-> {seed: top-1 in percent}, without those not measured."""
    if count == FINETUNING["num_labels"]:
        return findings.by_figure(WAYS[way][0], seeds).get(task, {})
    numbers = {seed: value(way, task, seed, **with_labels(way, count)) for seed in seeds}
    return {seed: number for seed, number in numbers.items() if number is not None}


def draw(seeds):
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, task in zip(figure.subplots(1, 2, sharey=True), TASKS):
        for way in WAYS:
            points = {count: list(by_seed(way, task, count, seeds).values()) for count in LABELS}
            points = {count: numbers for count, numbers in points.items() if numbers}
            if points:
                draw_band(axis, way, points)
        axis.set(title=task, xlabel="labelled videos", xscale="log", ylim=(20, 102))
        axis.set_xticks(list(LABELS), list(LABELS))
        axis.minorticks_off()
        axis.axhline(MOST_FREQUENT[task], color="grey", linestyle=":")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("top-1 on test videos, %")
    figure.axes[1].legend(loc="upper left")
    figure.suptitle(f"Fine-tuning against training from scratch (mean and range of "
                    f"{len(seeds)} seeds; dotted: most frequent class)", fontsize=10)
    save(figure, findings.FIGURES / "label_curve.png")


def draw_band(axis, name, points):
    """{labels: [top-1]} -> the means as a line, the ranges as a band."""
    means = [np.mean(numbers) for numbers in points.values()]
    (line,) = axis.plot(list(points), means, "o-", label=name)
    axis.fill_between(list(points), [min(numbers) for numbers in points.values()],
                      [max(numbers) for numbers in points.values()],
                      color=line.get_color(), alpha=0.15, linewidth=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", action="store_true", help="the grid of learning rates")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED")
    asked = parser.parse_args()
    if not asked.show:
        done = [job for job, _ in results()]
        jobs = [job for job in (rates() if asked.rates else curve(asked.seeds)) if job not in done]
        findings.measure_all(measure, jobs, RESULTS)
    print("\n".join(rate_lines() if asked.rates else lines(asked.seeds)))
    if not asked.rates:
        draw(asked.seeds)


if __name__ == "__main__":
    run(main)
