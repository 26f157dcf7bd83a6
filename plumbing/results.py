"""What a run of finetune.py keeps: results.json, predictions.csv, confusion.png, curves.png."""
import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

import torch

from plumbing.decoding import printed
from plumbing.files import write_text
from plumbing.pictures import draw_confusion, draw_curves
from plumbing.versions import commit


def accuracies(p, truth, names):
    """Probabilities (n, C) and classes (n,) -> {"top_1", "top_5", "per_class": {name: {...}}}.

    Accuracies are fractions. top_5 is left out where there are at most five classes.
    """
    best = p.topk(min(5, len(names)), dim=1).indices  # (n, 5)
    correct = best == truth[:, None]
    results = {"top_1": correct[:, 0].float().mean().item()}
    if len(names) > 5:
        results["top_5"] = correct.any(dim=1).float().mean().item()
    per_class = {}
    for number, name in enumerate(names):
        of_class = correct[truth == number, 0].float()
        accuracy = of_class.mean().item() if len(of_class) else None
        per_class[name] = {"videos": len(of_class), "top_1": accuracy}
    return results | {"per_class": per_class}


def report(config, store, p, labels, names, more):
    """Writes a run's results and prints its last lines.

    config: finetune.Config. store: the TokenStore of the test. p: probabilities, float32 (n, C).
    labels: the label set. names: of its classes. more: further entries of results.json.
    """
    names, truth = list(map(printed, names)), torch.tensor(store.labels(labels), dtype=torch.long)
    out, results = Path(config.out), accuracies(p, truth, names)
    out.mkdir(parents=True, exist_ok=True)
    entries = {**results, "split": config.eval_split, "videos": len(store),
               "views": config.clips * store.views, "labels": labels,
               "checkpoint": config.checkpoint, "commit": commit(), **more,
               "settings": asdict(config)}
    write_text(out / "results.json", json.dumps(entries, indent=1) + "\n")
    write_predictions(out / "predictions.csv", [store.name(i) for i in range(len(store))], p, names,
                      truth)
    draw_confusion(truth.numpy(), p.argmax(dim=1).numpy(), names, out / "confusion.png")
    files = ["results.json", "predictions.csv", "confusion.png"]
    if not (config.eval_only or config.freeze_backbone):
        draw_curves(out, {"loss": {"training": "loss"},
                          "accuracy": {"training": "train_accuracy",
                                       "validation": "val_accuracy"}})
        files = ["last.pt", "metrics.jsonl", "curves.png", *files]
    print(f"{out}: {', '.join(files)}")
    text = "  ".join(f"{name.replace('_', '-')} {results[name]:.1%}"
                     for name in ("top_1", "top_5") if name in results)
    print(f"{text}  ({len(store)} videos x {config.clips * store.views} views)")


def write_predictions(path, videos, p, names, truth=None):
    """A CSV file: video, label if known, prediction, and the probability of each class.

    videos: their names [str]. p: probabilities, float32 (n, C). truth: int64 (n,).
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    known = truth is not None
    names = [printed(name) for name in names]
    writer.writerow(["video", *["label"] * known, "prediction", *names])
    for i, video in enumerate(videos):
        label = [names[truth[i]]] if known else []
        chances = [f"{chance:.4f}" for chance in p[i].tolist()]
        writer.writerow([printed(video), *label, names[p[i].argmax()], *chances])
    write_text(path, file.getvalue())
