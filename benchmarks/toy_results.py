"""What pre-training gives on the toy world, over seeds: the README's figures.

    python benchmarks/toy_results.py    about five hours on two slow cores; prints a table

Each run is a process of one thread, so that it gives the same numbers on any number of cores; as
many run at a time as there are cores. Each result goes to benchmarks/toy_results.json as soon as
its run ends, with the commit and the versions. Runs that are in the file are not run again, so that
the benchmark can be stopped and started again; delete an entry to repeat its run.

Fine-tuning takes 600 steps on 400 labelled videos, 150 on fewer. From scratch it takes four times
as many: the paper has 1.5 to 4 times the epochs (Table 4). The learning rate from scratch is chosen
on the validation split, with seed 0 on motion: first with 100 labels, for all smaller numbers of
labels; then with 400, among the rates up to that one. All other figures are of the test split.
"""
import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plumbing.cli import progress
from plumbing.files import write_text
from plumbing.runs import read_metrics
from plumbing.store import TokenStore

SEEDS, TASKS, FEW = (0, 1, 2), ("motion", "appearance"), (25, 50, 100)
RESULTS = ROOT / "benchmarks/toy_results.json"
PRETRAINED_RATE = 1e-3  # finetune.py's default
SCRATCH_RATES = (5e-4, 1e-3, 2e-3, 4e-3)  # those tried from scratch


# ---------------------------------------------------------------- one run


def script(*argv):
    """Runs one of the project's scripts with one thread -> its output."""
    done = subprocess.run([sys.executable, str(ROOT / argv[0]), *map(str, argv[1:])], check=False,
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{argv}: {done.stderr}")
    return done.stdout


def train(name, out, *argv):
    """Runs one of the two training scripts in a new folder -> its output."""
    shutil.rmtree(out, ignore_errors=True)  # of a run that was stopped
    return script(name, "--out", out, *argv)


def pretrain(seed):
    """-> {figure: number} of the held-out or validation videos, all but the loss in percent."""
    out = f"runs/seed-{seed}"
    train("pretrain.py", out, "--seed", seed, "--precision", "fp32")
    measured = [record for record in read_metrics(out) if "held_out_mask_accuracy" in record]
    first, last = measured[0], measured[-1]
    figures = {"mask accuracy": 100 * last["held_out_mask_accuracy"],
               "contrastive loss": last["held_out_contrastive_loss"]}
    for name in (*TASKS, "direction"):
        figures[f"kNN {name}"] = 100 * last[f"knn_{name}"]
        figures[f"kNN {name}, untrained"] = 100 * first[f"knn_{name}"]
    return figures


def finetune(labels, kind, few, seed, lr, split="test"):
    """-> top-1 in percent. kind: "pre-trained" or "from scratch". few: labelled videos, 0: all."""
    scratch = kind == "from scratch"
    steps = (150 if few else 600) * (4 if scratch else 1)
    name = f"{labels}-{kind}-{few}-{seed}-{lr}-{split}".replace(" ", "-")
    printed = train(
        "finetune.py", f"runs/toy-results/{name}", "--checkpoint", f"runs/seed-{seed}/last.pt",
        "--seed", seed, "--labels", labels, "--num-labels", few, "--eval-split", split,
        "--lr", lr, "--steps", steps, "--precision", "fp32", *["--from-scratch"] * scratch)
    return float(re.search(r"top-1 ([\d.]+)%", printed)[1])


def one_frame(labels, seed):
    return float(script("benchmarks/toy_results.py", "--one-frame", labels, seed))


def single_frame(labels, seed):
    """Test top-1 of a small network that sees one frame's tokens and their positions, in percent.
    """
    def frames(split, per_video):
        store = TokenStore(f"datasets/toy/tokens/{split}")
        tokens = [np.asarray(store.tokens(i)[::32 // per_video]) for i in range(len(store))]
        classes = torch.from_numpy(np.asarray(store.labels(labels), np.int64))
        tokens = torch.from_numpy(np.concatenate(tokens).astype(np.int64)).flatten(1)
        return tokens, classes.repeat_interleave(per_video)

    torch.manual_seed(seed)
    (x, y), (test_x, test_y) = frames("pretrain", 8), frames("test", 4)
    # one row for each code, and one for each code at each position
    table = torch.nn.EmbeddingBag(256 * 65, 64, mode="mean")
    positions = 256 * (1 + torch.arange(64))
    head = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64), torch.nn.ReLU(),
                               torch.nn.Linear(64, int(y.max()) + 1))

    def logits(tokens):
        return head(table(torch.cat([tokens, tokens + positions], dim=1)))

    parameters = [*table.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.05)
    for _ in range(800):
        batch = torch.randint(len(x), (256,))
        loss = F.cross_entropy(logits(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        predicted = logits(test_x).argmax(dim=1)
    return 100 * (predicted == test_y).float().mean().item()


# ---------------------------------------------------------------- what to run


def read():
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def is_missing(name, job):
    """Whether a run must still be made. Fine-tuning needs the checkpoints of pre-training."""
    function, arguments = job
    if name not in read():
        return True
    return function is pretrain and not Path(f"runs/seed-{arguments[0]}/last.pt").is_file()


def versions():
    """The commit and the versions that a result comes from."""
    git = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"], cwd=ROOT,
                             check=False).returncode
    return {"commit": git.strip() + "-dirty" * bool(changed), "torch": torch.__version__,
            "numpy": np.__version__, "python": sys.version.split()[0]}


def run(jobs):
    """Runs the missing jobs {name: (function, arguments)}, and saves each result as it ends."""
    origin = versions()
    missing = {name: job for name, job in jobs.items() if is_missing(name, job)}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        names = {pool.submit(function, *arguments): name
                 for name, (function, arguments) in missing.items()}
        ended = concurrent.futures.as_completed(names)
        for done in progress(ended, "runs", len(names), " runs"):
            result = done.result()
            print(f"{names[done]}: {result}", flush=True)
            results = {**read(), names[done]: {"result": result, **origin}}
            write_text(RESULTS, json.dumps(results, indent=1) + "\n")


def grid(few):
    """Jobs that measure the learning rates from scratch on the validation split."""
    # with more labels, lower rates are better
    most = max(SCRATCH_RATES) if few else best_from_scratch(100)
    return {f"validation, from scratch, {few or 400} labels, lr {lr}":
            (finetune, ("motion", "from scratch", few, 0, lr, "val"))
            for lr in SCRATCH_RATES if lr <= most}


def best_from_scratch(few):
    """The learning rate that did best on the validation split."""
    results = read()
    name = max(grid(100 if few else 0), key=lambda name: results[name]["result"])
    return float(name.split()[-1])


def finetuning(kind, few, seeds=SEEDS):
    """Jobs that fine-tune with so many labels."""
    lr = PRETRAINED_RATE if kind == "pre-trained" else best_from_scratch(few)
    return {f"{labels}, {kind}, {few or 400} labels, seed {seed}":
            (finetune, (labels, kind, few, seed, lr))
            for labels in TASKS for seed in seeds}


def run_all():
    """Runs all that is missing, in an order in which all cores have work."""
    pretraining, pretrained = {}, {}
    for seed in SEEDS:
        pretraining[seed] = {f"pre-training, seed {seed}": (pretrain, (seed,))}
        pretrained[seed] = {}
        for few in (*FEW, 0):
            pretrained[seed] |= finetuning("pre-trained", few, [seed])
    frames = {f"{labels}, one frame, seed {seed}": (one_frame, (labels, seed))
              for labels in TASKS for seed in SEEDS}
    run(pretraining[0] | pretraining[1])
    run(pretraining[2] | frames | pretrained[0] | pretrained[1])
    run(pretrained[2] | grid(100))
    few_labels = {}
    for few in FEW:
        few_labels |= finetuning("from scratch", few)
    run(few_labels | grid(0))
    run(finetuning("from scratch", 0))


# ---------------------------------------------------------------- the table

# (row, name of its results, which of their figures)
ROWS = [(f"{kind}, {few or 400} labels", f"{{labels}}, {kind}, {few or 400} labels, seed {{seed}}",
         None) for few in (0, *reversed(FEW)) for kind in ("pre-trained", "from scratch")]
ROWS += [("one frame, 2,000 labels", "{labels}, one frame, seed {seed}", None),
         ("kNN on CLS, pre-trained", "pre-training, seed {seed}", "kNN {labels}"),
         ("kNN on CLS, untrained", "pre-training, seed {seed}", "kNN {labels}, untrained")]


def cell(results, name, figure, labels):
    """Mean and standard deviation over the seeds, as text. results: those of `read`."""
    names = [name.format(labels=labels, seed=seed) for seed in SEEDS]
    values = [results[name]["result"] for name in names if name in results]
    if figure:
        values = [result[figure.format(labels=labels)] for result in values]
    if not values:
        return ""
    spread = f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    seeds = "" if len(values) == len(SEEDS) else f" ({len(values)} of {len(SEEDS)} seeds)"
    return f"{np.mean(values):.1f}{spread}{seeds}"


def table():
    """The table of docs/results.md, in markdown, of the rows that were measured -> [line]."""
    results = read()
    lines = ["| top-1 in percent | motion (4 classes) | appearance (16 classes) |",
             "| --- | --- | --- |"]
    for row, name, figure in ROWS:
        cells = [cell(results, name, figure, labels) for labels in TASKS]
        if any(cells):
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one-frame", nargs=2, metavar=("LABELS", "SEED"),
                        help="only this run, of a single frame")
    asked = parser.parse_args().one_frame
    if asked:
        return print(single_frame(asked[0], int(asked[1])))
    # makes the toy world, once for all runs
    train("pretrain.py", "runs/toy-results/world", "--steps", 1, "--knn-every", 1)
    run_all()
    print("\n".join(table()))


if __name__ == "__main__":
    main()
