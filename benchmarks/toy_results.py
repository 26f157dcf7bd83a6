"""What the default commands give on the toy world, over three seeds and two precisions.

    python benchmarks/toy_results.py    the tables of docs/results.md: forty minutes on two cores

Each run is a process of one thread, so that it gives the same numbers on any number of cores; as
many run at a time as there are cores. Each result goes to benchmarks/toy_results.json as soon as
its run ends, with the commit and the versions. Runs that are in the file are not run again; delete
an entry to repeat its run.
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
from plumbing.versions import commit

SEEDS, TASKS = (0, 1, 2), ("motion", "shape")
RESULTS = ROOT / "benchmarks/toy_results.json"

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
    return script(name, "--out", out, "--device", "cpu", *argv)


def measure(seed, precision):
    """Pre-training and, in float32, what its model is worth -> {figure: number}, in percent."""
    out, settings = f"runs/{precision}-{seed}", ("--seed", seed, "--precision", precision)
    train("pretrain.py", out, *settings)
    measured = [record for record in read_metrics(out) if "held_out_mask_accuracy" in record]
    figures = {"mask accuracy": 100 * measured[-1]["held_out_mask_accuracy"],
               "contrastive loss": measured[-1]["held_out_contrastive_loss"]}
    for task in TASKS if precision == "fp32" else ():
        tune = "finetune.py", f"{out}-{task}", "--checkpoint", f"{out}/last.pt", "--labels", task
        figures[f"fine-tuned, {task}"] = top_1(train(*tune, *settings))
        for name, flags in (("probe", []), ("probe, untrained", ["--from-scratch"])):
            said = train(*tune, *settings, "--freeze-backbone", *flags)
            figures[f"{name}, {task}"] = top_1(said)
    return figures


def from_scratch(task, seed):
    """The same sizes from random weights, for four times the steps -> {"from scratch": percent}."""
    said = train("finetune.py", f"runs/scratch-{task}-{seed}", "--checkpoint", "runs/world/last.pt",
                 "--labels", task, "--seed", seed, "--precision", "fp32", "--from-scratch")
    return {f"from scratch, {task}": top_1(said)}


def top_1(output):
    return float(re.search(r"top-1 ([\d.]+)%", output)[1])


def one_frame(task, seed):
    said = script("benchmarks/toy_results.py", "--one-frame", task, seed)
    return {f"one frame, {task}": float(said)}


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


def run(jobs):
    """Runs the missing jobs {name: (function, arguments)}, and saves each result as it ends."""
    origin = {"commit": commit(), "torch": torch.__version__, "numpy": np.__version__,
              "python": sys.version.split()[0]}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        names = {pool.submit(function, *arguments): name
                 for name, (function, arguments) in jobs.items() if name not in read()}
        ended = concurrent.futures.as_completed(names)
        for done in progress(ended, "runs", len(names), " runs"):
            results = {**read(), names[done]: {"result": done.result(), **origin}}
            write_text(RESULTS, json.dumps(results, indent=1) + "\n")


def run_all():
    jobs = {f"fp32, seed {seed}": (measure, (seed, "fp32")) for seed in SEEDS}
    jobs |= {f"bf16, seed {seed}": (measure, (seed, "bf16")) for seed in SEEDS}
    for function in (one_frame, from_scratch):
        jobs |= {f"{function.__name__}, {task}, seed {seed}": (function, (task, seed))
                 for task in TASKS for seed in SEEDS}
    run(jobs)


# ---------------------------------------------------------------- the tables

ROWS = {"fine-tuned": "fine-tuned", "from scratch": "the same from scratch, 4 times the steps",
        "probe": "linear probe", "probe, untrained": "linear probe of an untrained model",
        "one frame": "a network that sees one frame, 2,000 labels"}


def values(figure, beginning=""):
    """A figure of all results whose names begin so -> [number]."""
    results = [entry["result"] for name, entry in read().items() if name.startswith(beginning)]
    return [result[figure] for result in results if figure in result]


def span(numbers, digits=1):
    """The range of some numbers, as text."""
    if not numbers:
        return "-"
    low, high = (f"{number:.{digits}f}" for number in (min(numbers), max(numbers)))
    return low if low == high else f"{low} to {high}"


def table():
    """The tables of docs/results.md, in markdown: ranges over the seeds -> [line]."""
    lines = ["| pre-training | mask accuracy, percent | contrastive loss |", "| --- | --- | --- |"]
    lines += [f"| {name} | {span(values('mask accuracy', precision))} | "
              f"{span(values('contrastive loss', precision), 3)} |"
              for name, precision in (("float32", "fp32"), ("bfloat16", "bf16"))]
    lines += ["", "| top-1 in percent, float32 | motion | shape |", "| --- | --- | --- |"]
    for row, name in ROWS.items():
        cells = [span(values(f"{row}, {task}")) for task in TASKS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
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
    train("pretrain.py", "runs/world", "--steps", 1, "--knn-every", 1)
    run_all()
    print("\n".join(table()))


if __name__ == "__main__":
    main()
