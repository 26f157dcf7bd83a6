"""What pre-training gives on the toy world, over seeds: the README's figures. About 25 minutes on two cores.

    python benchmarks/toy_results.py               prints a table and writes benchmarks/toy_results.json

Learning rates are chosen on the validation split with seed 0; every figure comes from the test split.
"""
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import training  # noqa: E402

SEEDS = (0, 1, 2)
RATES = {"pre-trained": (5e-4, 1e-3, 2e-3), "from scratch": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)}


def script(*argv):
    """Runs one of the project's scripts -> its output."""
    print("$ python", *argv, flush=True)
    done = subprocess.run([sys.executable, str(ROOT / argv[0]), *map(str, argv[1:])], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def accuracy(kind, seed, labels="motion", split="test", *flags):
    """Top-1 in percent after fine-tuning."""
    start = ["--from-scratch"] if kind == "from scratch" else []
    out = script("finetune.py", "--checkpoint", f"runs/seed-{seed}/last.pt", "--seed", seed, "--labels", labels,
                 "--eval-split", split, "--out", "runs/benchmark", *start, *flags)
    return float(re.search(r"top-1 ([\d.]+)%", out)[1])


def single_frame(labels, seed):
    """Top-1 on the test split of a small network that sees one frame: its tokens and where they are, in percent."""
    def frames(split, per_video):
        store = data.TokenStore(f"datasets/toy/tokens/{split}")
        tokens = [np.asarray(store.tokens(i)[::32 // per_video]) for i in range(len(store))]
        return torch.from_numpy(np.concatenate(tokens).astype(np.int64)).flatten(1), \
            torch.from_numpy(np.asarray(store.labels(labels), np.int64)).repeat_interleave(per_video)
    training.seed_all(seed)
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


def main():
    result = {"mask_accuracy": [], "contrastive_loss": []}
    for seed in SEEDS:
        script("pretrain.py", "--seed", seed, "--out", f"runs/seed-{seed}")
        records = training.read_metrics(f"runs/seed-{seed}")
        last = [r for r in records if "mask_accuracy" in r][-1]
        result["mask_accuracy"].append(100 * last["mask_accuracy"])
        result["contrastive_loss"].append(last["contrastive_loss"])
        for name in ("motion", "appearance", "direction"):
            values = [100 * r[f"knn_{name}"] for r in records if f"knn_{name}" in r]
            result.setdefault(f"kNN {name}, untrained", []).append(values[0])
            result.setdefault(f"kNN {name}, pre-trained", []).append(values[-1])
    best = {}
    for kind, rates in RATES.items():
        scores = {lr: accuracy(kind, 0, "motion", "val", "--lr", lr) for lr in rates}
        best[kind] = max(scores, key=scores.get)
        print(kind, "on the validation split:", scores, flush=True)
        result[f"validation, {kind}"] = {str(lr): score for lr, score in scores.items()}
    for labels in ("motion", "appearance"):
        for kind in RATES:
            result[f"{labels}, {kind}"] = [accuracy(kind, seed, labels, "test", "--lr", best[kind]) for seed in SEEDS]
            print(labels, kind, result[f"{labels}, {kind}"], flush=True)
    for labels in ("motion", "appearance"):
        result[f"{labels}, a single frame"] = [single_frame(labels, seed) for seed in SEEDS]
    (ROOT / "benchmarks/toy_results.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, values in result.items():
        if isinstance(values, list):
            print(f"{name:32s} {np.mean(values):7.2f} +- {np.std(values, ddof=1):.2f}   {np.round(values, 2).tolist()}")


if __name__ == "__main__":
    main()
