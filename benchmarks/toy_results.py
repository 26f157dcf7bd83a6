"""What pre-training gives on the toy world, over seeds: the README's figures. About five hours on two slow cores.

    python benchmarks/toy_results.py               runs what is not in benchmarks/toy_results.json yet, prints a table

Every run is a process of one thread, as many at a time as there are cores, so that it gives the same number on any
number of cores; it is written down with its commit and versions as soon as it ends, so that the benchmark can be
stopped and started again. Delete an entry to run it anew.

Fine-tuning takes 600 steps on 400 labelled videos, 150 on fewer. From scratch it takes four times as many: the paper
gives 1.5 to 4 times the epochs (Table 4). The learning rate from scratch is chosen on the validation split, with seed 0
on motion: with 100 labels for all fewer, then with 400 again, up to that rate. All other figures come from the test
split.
"""
import argparse
import concurrent.futures
import json
import os
import re
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
PRETRAINED, RATES = 1e-3, (5e-4, 1e-3, 2e-3, 4e-3)  # finetune.py's default; those tried from scratch


def script(*argv):
    """Runs one of the project's scripts with one thread -> its output."""
    done = subprocess.run([sys.executable, str(ROOT / argv[0]), *map(str, argv[1:])], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    if done.returncode:
        raise RuntimeError(f"{argv}: {done.stderr}")
    return done.stdout


def pretrain(seed):
    """-> {figure of the held-out or validation videos, in percent but for the loss: number}."""
    out = f"runs/seed-{seed}"
    script("pretrain.py", "--seed", seed, "--out", out, "--precision", "fp32")
    watched = [record for record in read_metrics(out) if "held_out_mask_accuracy" in record]
    first, last = watched[0], watched[-1]
    return {"mask accuracy": 100 * last["held_out_mask_accuracy"],
            "contrastive loss": last["held_out_contrastive_loss"],
            **{f"kNN {name}": 100 * last[f"knn_{name}"] for name in (*TASKS, "direction")},
            **{f"kNN {name}, untrained": 100 * first[f"knn_{name}"] for name in (*TASKS, "direction")}}


def finetune(labels, kind, few, seed, lr, split="test"):
    """-> top-1 in percent."""
    steps = (150 if few else 600) * (4 if kind == "from scratch" else 1)
    name = f"{labels}-{kind}-{few}-{seed}-{lr}-{split}".replace(" ", "-")
    out = script("finetune.py", "--checkpoint", f"runs/seed-{seed}/last.pt", "--seed", seed, "--labels", labels,
                 "--few", few, "--eval-split", split, "--out", f"runs/toy-results/{name}", "--steps", steps, "--lr", lr,
                 "--precision", "fp32", *["--from-scratch"] * (kind == "from scratch"))
    return float(re.search(r"top-1 ([\d.]+)%", out)[1])


def one_frame(labels, seed):
    return float(script("benchmarks/toy_results.py", "--one-frame", labels, seed))


def single_frame(labels, seed):
    """Top-1 on the test split of a small network that sees one frame: its tokens and where they are, in percent."""
    def frames(split, per_video):
        store = TokenStore(f"datasets/toy/tokens/{split}")
        tokens = [np.asarray(store.tokens(i)[::32 // per_video]) for i in range(len(store))]
        return torch.from_numpy(np.concatenate(tokens).astype(np.int64)).flatten(1), \
            torch.from_numpy(np.asarray(store.labels(labels), np.int64)).repeat_interleave(per_video)
    torch.manual_seed(seed)
    (x, y), (test_x, test_y) = frames("pretrain", 8), frames("test", 4)
    table = torch.nn.EmbeddingBag(256 * 65, 64, mode="mean")  # one row a code, and one a code and place
    places = 256 * (1 + torch.arange(64))
    head = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64), torch.nn.ReLU(),
                               torch.nn.Linear(64, int(y.max()) + 1))
    optimizer = torch.optim.AdamW([*table.parameters(), *head.parameters()], lr=3e-3, weight_decay=0.05)
    for _ in range(800):
        batch = torch.randint(len(x), (256,))
        loss = F.cross_entropy(head(table(torch.cat([x[batch], x[batch] + places], dim=1))), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        predicted = head(table(torch.cat([test_x, test_x + places], dim=1))).argmax(dim=1)
    return 100 * (predicted == test_y).float().mean().item()


# ---------------------------------------------------------------- what to run, and what is there


def read():
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def run(jobs):
    """Runs the jobs {name: (function, arguments)} that are not in the results yet, and writes each down as it ends."""
    head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"], cwd=ROOT, check=False).returncode
    origin = {"commit": head + "-dirty" * bool(changed), "torch": torch.__version__, "numpy": np.__version__,
              "python": sys.version.split()[0]}
    missing = {name: job for name, job in jobs.items() if name not in read() or (
        job[0] is pretrain and not Path(f"runs/seed-{job[1][0]}/last.pt").is_file())}  # fine-tuning needs it
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = {pool.submit(function, *arguments): name for name, (function, arguments) in missing.items()}
        for done in progress(concurrent.futures.as_completed(waiting), "runs", len(waiting), " runs"):
            result = done.result()
            print(f"{waiting[done]}: {result}", flush=True)
            write_text(RESULTS, json.dumps({**read(), waiting[done]: {"result": result, **origin}}, indent=1) + "\n")


def grid(few):
    """Jobs that measure the learning rates from scratch on the validation split."""
    most = max(RATES) if few else best_from_scratch(100)  # with more labels, lower rates were better
    return {f"validation, from scratch, {few or 400} labels, lr {lr}":
            (finetune, ("motion", "from scratch", few, 0, lr, "val")) for lr in RATES if lr <= most}


def best_from_scratch(few):
    """The learning rate that did best on the validation split."""
    name = max(grid(100 if few else 0), key=lambda name: read()[name]["result"])
    return float(name.split()[-1])


ROWS = [(f"{kind}, {few or 400} labels", f"{{labels}}, {kind}, {few or 400} labels, seed {{seed}}", None)
        for few in (0, *reversed(FEW)) for kind in ("pre-trained", "from scratch")]
ROWS += [("one frame, 2,000 labels", "{labels}, one frame, seed {seed}", None),
         ("kNN on CLS, pre-trained", "pre-training, seed {seed}", "kNN {labels}"),
         ("kNN on CLS, untrained", "pre-training, seed {seed}", "kNN {labels}, untrained")]


def table():
    """The README's table, in its own markup -> [line]. What has not been measured yet is left open."""
    results = read()
    lines = ["| top-1 in percent | motion (4 classes) | appearance (16 classes) |", "| --- | --- | --- |"]
    for row, name, figure in ROWS:
        cells = []
        for labels in TASKS:
            found = [results[name.format(labels=labels, seed=seed)]["result"] for seed in SEEDS
                     if name.format(labels=labels, seed=seed) in results]
            values = [result[figure.format(labels=labels)] if figure else result for result in found]
            spread = f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            seeds = "" if len(values) == len(SEEDS) else f" ({len(values)} of {len(SEEDS)} seeds)"
            cells.append(f"{np.mean(values):.1f}{spread}{seeds}" if values else "not measured yet")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def jobs(kind, few, seeds=SEEDS):
    """Jobs that fine-tune with so many labels."""
    lr = PRETRAINED if kind == "pre-trained" else best_from_scratch(few)
    return {f"{labels}, {kind}, {few or 400} labels, seed {seed}": (finetune, (labels, kind, few, seed, lr))
            for labels in TASKS for seed in seeds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one-frame", nargs=2, metavar=("LABELS", "SEED"), help="this run alone, of a single frame")
    if asked := parser.parse_args().one_frame:
        return print(single_frame(asked[0], int(asked[1])))
    script("pretrain.py", "--steps", 1, "--knn-every", 1, "--out", "runs/toy-results/made")  # the world, once for all
    pretraining = {seed: {f"pre-training, seed {seed}": (pretrain, (seed,))} for seed in SEEDS}
    frames = {f"{labels}, one frame, seed {seed}": (one_frame, (labels, seed)) for labels in TASKS for seed in SEEDS}
    pretrained = {seed: {name: job for few in (*FEW, 0) for name, job in jobs("pre-trained", few, [seed]).items()}
                  for seed in SEEDS}
    run(pretraining[0] | pretraining[1])
    run(pretraining[2] | frames | pretrained[0] | pretrained[1])
    run(pretrained[2] | grid(100))
    run({name: job for few in FEW for name, job in jobs("from scratch", few).items()} | grid(0))
    run(jobs("from scratch", 0))
    print("\n".join(table()))


if __name__ == "__main__":
    main()
