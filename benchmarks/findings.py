"""The paper's findings in miniature: its tables as experiments on the toy world, over seeds.

    python benchmarks/findings.py                 Tables 7 and 8: about 100 minutes on two cores
    python benchmarks/findings.py --all           all tables: a night
    python benchmarks/findings.py --only 8 10     these tables
    python benchmarks/findings.py --show          runs nothing; prints what has been measured

An experiment is one pre-training. Its model is then judged on each of two tasks by a linear probe
of its frozen features with 1,000 labelled videos (probe.py), and for Tables 7 and 8 also by
fine-tuning with 100, which takes longer and varies more. Tables share the experiments that they
have in common. First all models are pre-trained and probed, then fine-tuned. Each result is
appended to findings.jsonl at once, with its settings, seed, commit and versions, so that the
command can be stopped and started again; delete a line to repeat its part of an experiment. An
experiment has one thread of a CPU, so that it gives the same numbers on any number of cores. At
the end, the tables are printed beside the paper's figures and drawn into figures/.

A claim is judged by the difference of two rows, seed by seed (a seed gives both rows the same
videos and labels): shown where the mean difference is above 0 by more than the t quantile (95%,
two-sided: 2.78 standard errors with five seeds, 4.30 with three), opposite where it is as far
below, otherwise not shown. Only the seeds that both rows have are compared.
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
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from findings_figures import draw_models, draw_table
from paper_tables import PROBED, TABLES, TASKS, heading

import data
import finetune
import monitor
import predict
import pretrain
import toy
import vqvae
from plumbing import cli, runs
from plumbing.checkpoints import read_checkpoint
from plumbing.cli import UserError, parse, progress
from plumbing.files import read_lines
from plumbing.processes import end_with, seed_all
from plumbing.runs import read_metrics
from plumbing.versions import commit
from prepare import open_stores, pick_labels
from probe import probe, video_features
from transformer import load_backbone

RESULTS, FIGURES = ROOT / "benchmarks/findings.jsonl", ROOT / "benchmarks/figures"
TOKENIZER = 0  # seed of the tokenizer; change it for another, with folders and results of its own
HOME = Path(f"datasets/findings-{TOKENIZER}" if TOKENIZER else "datasets/findings")
SPLITS = {"pretrain": 2000, "train": 1600, "val": 300, "test": 1000}
# Differences from the toy preset. With fewer codes, the same steps get further.
RECIPE = dict(alpha=1.0, layers=2, batch=16, steps=1000, codes=64)
PARTS = ("pre-training", "fine-tuning")  # of an experiment; the first ends with the probes
PROBE_LABELS = 1000
CLIPS = 4  # of a video, for the probe and at test
# Rates: label_curve.py --rates, on the validation split. From scratch, two seeds' models trained at
# the best rate predicted the same class for all test videos; the second best was taken.
FINETUNING = dict(num_labels=100, batch=16, steps=200, lr=4e-3)
# Table 4: without pre-training 4 times the epochs on three datasets, 1.5 times on two
SCRATCH = dict(FINETUNING, from_scratch=True, steps=800, lr=1e-3)
CPU = torch.device("cpu")
ON_CPU = dict(device="cpu", precision="fp32")  # bfloat16 gives other numbers on other CPUs
T = {3: 4.30, 4: 3.18, 5: 2.78}  # quantiles of Student's t for so many seeds, two-sided 95%

# ---------------------------------------------------------------- one experiment


def make_world():
    """The videos, a tokenizer trained on them, and their tokens."""
    torch.set_num_threads(2)  # on any number of cores, for the same tokenizer
    toy.make(HOME, SPLITS)
    splits = {split: toy.split_videos(HOME, split) for split in SPLITS}
    preset, path = {**pretrain.PRESETS["toy"], **RECIPE}, HOME / "tokenizer.pt"
    fps, size = preset["fps"], preset["frame_size"]
    if not path.is_file():
        videos = [video for video, _ in splits["pretrain"]]
        vqvae.make_tokenizer(videos, path, fps, size, 8000, codes=preset["codes"],
                             steps=preset["tokenizer_steps"], batch=64, lr=2e-3, seed=TOKENIZER,
                             device=CPU)
    tokenizer, views = vqvae.load_tokenizer(path), data.views_for("pretrain", size)
    if tokenizer.vocab_size != preset["codes"]:
        raise UserError(f"{path} has {tokenizer.vocab_size} codes, not {preset['codes']}: "
                        f"delete {HOME}")
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


def pretraining_config(changes, seed, out):
    """changes: a row of a table, None for an untrained model: one step at rate 0."""
    usual = {**pretrain.PRESETS["toy"], **RECIPE}
    recipe = {**usual, **({"steps": 1, "warmup": 1.0} if changes is None else changes)}
    if recipe["batch"] != usual["batch"]:  # as many videos in all
        recipe["steps"] = math.ceil(usual["steps"] * usual["batch"] / recipe["batch"])
    recipe |= dict(seed=seed, out=out, micro_batch=recipe["batch"], knn_every=recipe["steps"],
                   save_every=recipe["steps"], log_every=min(100, recipe["steps"]), **ON_CPU)
    return parse(pretrain.Config, flags(recipe), "", pretrain.PRESETS)


def pretrained(changes, seed, out):
    """Pre-trains a model, or for None makes an untrained one -> its figures on held-out videos.

    Seconds are of the process's own time, as other programs share the CPU.
    """
    config = pretraining_config(changes, seed, out)
    store = data.TokenStore(HOME / "tokens/pretrain")
    runs.resolve_batch(config, len(data.hold_out(len(store), config.held_out)[0]), 1)
    shutil.rmtree(out, ignore_errors=True)  # of an experiment that was stopped
    seed_all(seed)
    shape = config.transformer(store.header["vocab_size"], store.height, store.width)
    model = pretrain.Vimpac(shape, config.projection_hidden, config.projection_layers)
    start = time.process_time()
    pretrain.train(config, model, store, CPU)
    took = time.process_time() - start
    last = [record for record in read_metrics(out) if "held_out_loss" in record][-1]
    figures = {"seconds": round(took, 1), "copied": copied(config, store)}
    if changes is not None and config.mask_weight:
        figures["mask accuracy"] = 100 * last["held_out_mask_accuracy"]
    if changes is not None and config.alpha:
        figures["contrastive loss"] = last["held_out_contrastive_loss"]
    return figures


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


def finished(out):
    """Whether a folder holds a model that was pre-trained to the end -> bool."""
    checkpoint = Path(out) / "last.pt"
    if not checkpoint.is_file():
        return False
    content = read_checkpoint(checkpoint)
    return content["step"] == content["steps"]


def probed(checkpoint, seed):
    """Linear probes of a model -> {task: probabilities of the test videos (videos, C)}."""
    backbone = load_backbone(checkpoint)
    train, test = (data.TokenStore(HOME / "tokens" / split) for split in ("train", "test"))
    features, queries = (
        video_features(backbone, store, np.arange(len(store)), predict.clip_fps(checkpoint), CLIPS,
                       ON_CPU["precision"]) for store in (train, test))
    probabilities = {}
    for task in PROBED:
        labels = torch.tensor(train.labels(task), dtype=torch.long)
        videos = data.few_labels(labels, PROBE_LABELS, seed)
        classes = len(toy.CLASSES[task])
        probabilities[task] = probe(features[videos], labels[videos], queries, classes)
    return probabilities


def finetuned(checkpoint, out, task, seed, recipe):
    """Fine-tunes a pre-trained model -> its probabilities of the test videos (videos, C).

    recipe: flags of finetune.py.
    """
    settings = dict(checkpoint=checkpoint, labels=task, seed=seed, data=HOME / "tokens", out=out,
                    clips=CLIPS, **recipe, **ON_CPU)
    config = parse(finetune.Config, flags(settings), "", finetune.PRESETS, "dataset")
    config.micro_batch = config.batch
    shutil.rmtree(config.out, ignore_errors=True)
    stores, _ = open_stores(config)
    labels, classes = pick_labels(stores, config.labels)
    backbone = load_backbone(config.checkpoint, dropout=config.dropout)
    model = finetune.build(config, backbone, stores, len(classes))
    test = stores[config.eval_split]
    finetune.train(config, model, stores["train"], labels, CPU,
                   predict.origin(test, labels=labels, classes=classes))
    return finetune.evaluate(model, test, config, CPU)


def top_1(p, task, split="test"):
    """Probabilities of a split's videos -> top-1 in percent."""
    truth = torch.tensor(data.TokenStore(HOME / "tokens" / split).labels(task))
    return 100 * (p.argmax(dim=1) == truth).float().mean().item()


def folder(changes, seed):
    """The folder of an experiment with these settings."""
    name = json.dumps([changes, seed, settings("pre-training", changes)])
    return f"runs/findings/{zlib.crc32(name.encode()):08x}"


@contextlib.contextmanager
def quiet():
    """One thread, and no output."""
    torch.set_num_threads(1)
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        yield


def experiment(job):
    """One part of an experiment -> {figure: number}.

    job: {"changes": a row of a table, "seed": int, "part": one of PARTS, "settings": dict}.
    Raises UserError if the settings of this file have changed since the job was set.
    """
    changes, seed, part = job["changes"], job["seed"], job["part"]
    if job["settings"] != settings(part, changes):
        raise UserError("findings.py has changed since this command began")
    out = folder(changes, seed)
    checkpoint = Path(out) / "last.pt"
    with quiet():
        if part == "pre-training" or not finished(out):
            figures = pretrained(changes, seed, out)
        if part == "pre-training":
            answers = {f"probe {task}": p for task, p in probed(checkpoint, seed).items()}
            torch.save(answers, f"{out}/probes.pt")  # for the pictures
            return figures | {name: top_1(p, name.split()[1]) for name, p in answers.items()}
        recipe = SCRATCH if changes is None else FINETUNING
        answers = {task: finetuned(checkpoint, f"{out}/{task}", task, seed, recipe)
                   for task in TASKS}
    figures = {task: top_1(p, task) for task, p in answers.items()}
    return figures | {"one class": sum(len(p.argmax(dim=1).unique()) == 1
                                       for p in answers.values())}


# ---------------------------------------------------------------- what to run


def common_settings():
    return {"splits": SPLITS, "tokenizer": TOKENIZER, "pre-training": RECIPE, "clips": CLIPS}


def settings(part, changes):
    """All that the figures of a part depend on, beside its changes, its seed and the code."""
    if part == "pre-training":
        values = {"probe": PROBE_LABELS}
    else:
        values = {"from scratch": SCRATCH} if changes is None else {"fine-tuning": FINETUNING}
    return json.loads(json.dumps(common_settings() | values))


def results(changes, parts=PARTS):
    """The figures of a row that have been measured with these settings -> {seed: {figure: number}}.
    """
    by_seed = {}
    for entry in read_lines(RESULTS):
        asked = settings(entry["part"], changes)
        same = entry["changes"] == changes and entry["settings"] == entry["settings"] | asked
        if same and entry["part"] in parts:
            by_seed.setdefault(entry["seed"], {}).update(entry["result"])
    return by_seed


def fine_tuned(number):
    """Whether a table's models are fine-tuned, too -> bool."""
    return set(TASKS) <= set(TABLES[number].figures)


def title(number):
    text = TABLES[number].title
    return f"Table{'s' * (' and ' in number)} {number}: {text[0].lower()}{text[1:]}"


def jobs(part, tables, seeds):
    """The experiments of these tables that lack this part; the first seed comes first."""
    waiting = []
    tables = [table for table in tables if part == "pre-training" or fine_tuned(table)]
    for seed, table in itertools.product(seeds, tables):
        for changes in TABLES[table].rows.values():
            job = dict(changes=changes, seed=seed, part=part, settings=settings(part, changes))
            if job not in waiting and seed not in results(changes, [part]):
                waiting.append(job)
    return waiting


def measure_all(work, waiting, path):
    """Does jobs, one for each core at a time, and appends each to a file as it ends.

    work: job (a dict) -> {figure: number}. Each line of the file is a job with its result.
    """
    origin = {"commit": commit(), "torch": torch.__version__, "numpy": np.__version__,
              "python": sys.version.split()[0], "device": "cpu"}
    pool = concurrent.futures.ProcessPoolExecutor(
        os.cpu_count(), multiprocessing.get_context("spawn"), end_with, (os.getpid(),))
    running = {pool.submit(work, job): job for job in waiting}
    ended = concurrent.futures.as_completed(running)
    try:
        for done in progress(ended, "experiments", len(running), " experiments"):
            if not done.exception():
                figures = {name: round(value, 4) for name, value in done.result().items()}
                with open(path, "a") as file:
                    file.write(json.dumps({**running[done], "result": figures, **origin}) + "\n")
        for done in running:
            done.result()  # raises the error of an experiment, after all others were saved
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- tables and verdicts


def digits(figure):
    return 3 if "loss" in figure else 1


def spread(by_seed, digits=1):
    """Mean and standard deviation of {seed: number}, as text."""
    if not by_seed:
        return "-"
    numbers = list(by_seed.values())
    deviation = f" +- {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.{digits}f}{deviation}"


def fewer(by_seed, seeds):
    """A remark if not all seeds have been measured."""
    return f" ({len(by_seed)} of {len(seeds)} seeds)" if 0 < len(by_seed) < len(seeds) else ""


def named(row, figures, seeds):
    """The name of a row, with the fewest seeds that one of its figures has."""
    return row + fewer(min(filter(None, figures.values()), key=len, default={}), seeds)


def verdict(higher, lower, digits=1):
    """Whether one row's figures are above another's -> text.

    Both are {seed: number}. The text has the mean difference and its standard error.
    """
    differences = [higher[seed] - lower[seed] for seed in higher if seed in lower]
    if len(differences) not in T:
        return "not judged, with too few seeds"
    mean = np.mean(differences)
    error = np.std(differences, ddof=1) / math.sqrt(len(differences))
    bound = T[len(differences)] * error
    said = "shown" if mean > bound else "opposite" if mean < -bound else "not shown"
    return f"{said} ({mean:+.{digits}f}, standard error {error:.{digits}f})"


def measured(number, seeds):
    """A table's figures that have been measured -> {row: {figure: {seed: number}}}."""
    table = TABLES[number]
    rows = {row: by_figure(changes, seeds) for row, changes in table.rows.items()}
    there = [figure for figure in table.figures if any(figure in row for row in rows.values())]
    return {row: {figure: figures.get(figure, {}) for figure in there}
            for row, figures in rows.items()}


def by_figure(changes, seeds):
    """-> {figure: {seed: number}} of a row, without those not measured."""
    figures = {}
    for seed, numbers in sorted(results(changes).items()):
        for figure, number in numbers.items() if seed in seeds else ():
            figures.setdefault(figure, {})[seed] = number
    return figures


def lines(number, seeds):
    """A table in markdown, followed by the verdicts on the paper's claims -> [line]."""
    table, rows = TABLES[number], measured(number, seeds)
    there = list(next(iter(rows.values())))
    text = [f"| | {' | '.join(map(heading, there))} | the paper |",
            f"| --- {'| --- ' * (len(there) + 1)}|"]
    for (name, figures), paper in zip(rows.items(), table.paper):
        cells = [spread(figures[figure], digits(figure)) for figure in there]
        row = f"| {named(name, figures, seeds)} | {' | '.join(cells)} | {paper} |"
        text.append(row.replace("H|W", "H\\|W"))
    text.append("")
    for claim, judged in verdicts(number, seeds):
        said = [f"{instrument} {result}".strip() for instrument, result in judged.items()]
        text.append(f"- {claim}: {'; '.join(said) or 'not measured'}")
    ones = [count for changes in table.rows.values() if fine_tuned(number)
            for count in by_figure(changes, seeds).get("one class", {}).values()]
    if ones:
        count = f"{sum(ones):.0f} of {len(ones) * len(TASKS)}"
        text += ["", f"Fine-tuned models that predict the same class for every video: {count}."]
    return text


def verdicts(number, seeds):
    """-> [(a claim of the table, {instrument, or "" for a loss or an accuracy: verdict})]."""
    rows, judged = measured(number, seeds), []
    there = next(iter(rows.values()))
    for claim, figure, *pair in TABLES[number].claims:
        instruments = {"": figure}
        if figure in TASKS:
            instruments = {"probe": f"probe {figure}", "fine-tuning": figure}
        judged.append((claim, {
            instrument: verdict(*(rows[row][name] for row in pair), digits(name))
            for instrument, name in instruments.items() if name in there}))
    return judged


def tally(seeds):
    """The verdicts on what the paper claims, counted -> [line]."""
    kinds = {"probe": "motion or scene, by the probe",
             "fine-tuning": "motion or scene, by fine-tuning",
             "": "mask accuracy, contrastive loss, copied"}
    given = [(instrument, said.split(" (")[0]) for number in TABLES
             for claim, judged in verdicts(number, seeds) if not claim.startswith("(asked here)")
             for instrument, said in judged.items()]
    text = ["| claims of the paper about | shown | not shown | opposite |",
            "| --- | --- | --- | --- |"]
    for instrument, kind in kinds.items():
        counts = [given.count((instrument, said)) for said in ("shown", "not shown", "opposite")]
        text.append(f"| {kind} | {' | '.join(map(str, counts))} |")
    return text


def summary(seeds):
    """The README's table of Tables 7 and 8 -> [line]."""
    figures = ("mask accuracy", *TASKS, *(f"probe {task}" for task in TASKS))
    tasks, masks = measured("7", seeds), measured("8", seeds)
    rows = {"none": tasks["none"], "contrastive only": tasks["contrastive only"],
            "mask only, i.i.d.": masks["i.i.d."], "mask only, blocks": masks["block"],
            "both, blocks": tasks["both"]}
    text = [f"| pre-training | {' | '.join(map(heading, figures))} |",
            f"| --- {'| --- ' * len(figures)}|"]
    for name, row in rows.items():
        text.append(f"| {name} | {' | '.join(spread(row[figure]) for figure in figures)} |")
    return text


# ---------------------------------------------------------------- the command


def show(tables, seeds):
    """Prints and draws the tables: 7 and 8 as pictures of the models, where the runs are here."""
    FIGURES.mkdir(exist_ok=True)
    if tables == list(TABLES):
        print("\n".join(tally(seeds)))
    for number in tables:
        print(f"\n## {title(number)}\n")
        print("\n".join(lines(number, seeds)))
        rows, name = measured(number, seeds), number.replace(" ", "_")
        if fine_tuned(number):
            folders = {row: Path(folder(changes, seeds[0]))
                       for row, changes in TABLES[number].rows.items()}
            if all((run / "probes.pt").is_file() for run in folders.values()):
                said = (f"In miniature, {title(number)}\n(pictures and bars: seed {seeds[0]}, the "
                        f"same blocks hidden from all; accuracies: all seeds)")
                draw_models(FIGURES / f"models_{name}.png", said, rows, folders, HOME)
        elif any(rows.values()):
            drawn = {named(row, figures, seeds): figures for row, figures in rows.items()}
            draw_table(FIGURES / f"table_{name}.png", title(number), drawn)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=["7", "8"], metavar="TABLE",
                        help=f"tables: {', '.join(TABLES)} (default: 7 8)")
    parser.add_argument("--all", action="store_true", help="all tables")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="SEED",
                        help="default: 0 1 2 3 4")
    parser.add_argument("--show", action="store_true",
                        help="run nothing: print and draw what has been measured")
    asked = parser.parse_args()
    tables = list(TABLES) if asked.all else asked.only
    if not asked.show:
        make_world()
        for part in PARTS:
            measure_all(experiment, jobs(part, tables, asked.seeds), RESULTS)
    show(tables, asked.seeds)


if __name__ == "__main__":
    cli.run(main)
