"""The paper's tables as experiments on the toy world: rows, figures, and what the paper says."""
from typing import NamedTuple

TASKS = ("motion", "scene")  # temporal and spatial, judged by both instruments
PROBED = (*TASKS, "shape")
PROBES = tuple(f"probe {task}" for task in PROBED)


def heading(figure):
    """The name of a figure for readers."""
    return f"fine-tuned {figure}" if figure in TASKS else figure


class Table(NamedTuple):
    """A table of the paper.

    rows: {name: what changes in the recipe, or None: no pre-training}.
    paper: what the paper says of each row. M: masked-token accuracy, C: contrastive loss.
    claims: (what the paper says, or is asked in addition; in which figure; the row that should be
    higher, the row that should be lower). Here motion and scene stand for the figures of the
    probe and, where the table has them, of fine-tuning.
    """
    title: str
    rows: dict
    paper: tuple
    claims: tuple
    figures: tuple = ("mask accuracy", "contrastive loss", *PROBES)


BOTH = {}
MASK = dict(alpha=0.0)
CONTRAST = dict(mask_weight=0.0, contrast_on="whole")
IID = dict(MASK, mask="iid")

TABLES = {
    "7": Table(
        title="Which tasks",
        rows={"none": None, "contrastive only": CONTRAST, "mask only": MASK, "both": BOTH},
        paper=("SSV2 1.2, UCF101 41.3", "SSV2 32.5, UCF101 57.1", "SSV2 41.4, UCF101 68.3",
               "SSV2 41.1, UCF101 69.4"),
        claims=(
            ("pre-training is above none on the temporal task", "motion", "both", "none"),
            ("pre-training is above none on the spatial task", "scene", "both", "none"),
            ("masks alone are above contrastive learning alone on the temporal task",
             "motion", "mask only", "contrastive only"),
            ("masks alone are above contrastive learning alone on the spatial task",
             "scene", "mask only", "contrastive only"),
            ("masks alone are above none on the temporal task", "motion", "mask only", "none"),
            ("masks alone are above none on the spatial task", "scene", "mask only", "none"),
            ("contrastive learning alone is above none on the temporal task",
             "motion", "contrastive only", "none"),
            ("contrastive learning alone is above none on the spatial task",
             "scene", "contrastive only", "none"),
            ("masks add to contrastive learning on the temporal task",
             "motion", "both", "contrastive only"),
            ("contrastive learning adds to masks on the spatial task",
             "scene", "both", "mask only"),
            ("(asked here) pre-training is above none on shapes",
             "probe shape", "both", "none"),
            ("(asked here) masks alone are above contrastive learning alone on shapes",
             "probe shape", "mask only", "contrastive only")),
        figures=("mask accuracy", "contrastive loss", *PROBES, *TASKS)),
    "7b": Table(  # not the paper's: whether the rate explains the row of Table 7
        title="Contrastive learning alone, at lower learning rates",
        rows={"none": None, "4e-3": CONTRAST, "2e-3": dict(CONTRAST, lr=2e-3),
              "1e-3": dict(CONTRAST, lr=1e-3)},
        paper=("UCF101 41.3", "UCF101 57.1", "-", "-"),
        claims=tuple((f"(asked here) at {rate}, it is above none on the {kind} task",
                      task, rate, "none")
                     for rate in ("2e-3", "1e-3")
                     for task, kind in zip(TASKS, ("temporal", "spatial"))),
        figures=("contrastive loss", *PROBES)),
    "8": Table(
        title="Which masks, without the contrastive task",
        rows={"block": MASK, "i.i.d.": IID},
        paper=("M 17.6, UCF101 68.3", "M 24.3, UCF101 63.5"),
        claims=(
            ("i.i.d. masks have the higher masked-token accuracy",
             "mask accuracy", "i.i.d.", "block"),
            ("blocks teach more on the spatial task", "scene", "block", "i.i.d."),
            ("(asked here) blocks teach more on the temporal task", "motion", "block", "i.i.d."),
            ("(asked here) blocks teach more on shapes", "probe shape", "block", "i.i.d."),
            ("under i.i.d. masks a hidden token more often equals its nearest visible neighbour",
             "copied", "i.i.d.", "block")),
        figures=("mask accuracy", "copied", *PROBES, *TASKS)),
    "9 and 15": Table(
        title="How much is hidden, without the contrastive task",
        rows={"block, 11.1%": dict(MASK, blocks=3), "block, 14.5%": MASK,
              "block, 17.6%": dict(MASK, blocks=5), "i.i.d., 11%": dict(IID, mask_ratio=0.11),
              "i.i.d., 15%": IID, "i.i.d., 18%": dict(IID, mask_ratio=0.18)},
        paper=("11.9%: M 17.9, UCF101 66.8", "14.5%: M 17.6, UCF101 68.3",
               "17.0%: M 17.3, UCF101 67.3",
               "M 25.6, UCF101 64.5", "M 24.3, UCF101 63.5", "M 24.0, UCF101 64.0"),
        claims=(
            ("the more is hidden in blocks, the less is predicted",
             "mask accuracy", "block, 11.1%", "block, 17.6%"),
            ("the more is hidden token by token, the less is predicted",
             "mask accuracy", "i.i.d., 11%", "i.i.d., 18%"),
            ("14.5% in blocks is better than 11.1% on the spatial task",
             "scene", "block, 14.5%", "block, 11.1%"),
            ("14.5% in blocks is better than 17.6% on the spatial task",
             "scene", "block, 14.5%", "block, 17.6%"))),
    "10": Table(
        title="How far apart two clips of a video may start",
        rows={"anywhere": BOTH, "1 s": dict(d_max=1), "0 s": dict(d_max=0)},
        paper=("M 17.2, C 1.06, UCF101 69.4",
               "30 s: M 17.3, C 0.77, UCF101 69.0; 10 s: M 17.4, C 0.61, UCF101 68.3",
               "M 17.5, C 0.41, UCF101 66.7"),
        claims=(
            ("clips that start together have the lower loss",
             "contrastive loss", "anywhere", "0 s"),
            ("with clips that start together, more is predicted",
             "mask accuracy", "0 s", "anywhere"),
            ("clips from anywhere teach more on the spatial task", "scene", "anywhere", "0 s"),
            ("(asked here) clips from anywhere teach more on the temporal task",
             "motion", "anywhere", "0 s"))),
    "11": Table(
        title="How many videos are contrasted, in batches of 128",
        rows={f"n = {n}": dict(batch=128, contrast=n) for n in (16, 32, 64, 128)},
        paper=("n = 128: M 17.2, C 1.06, UCF101 69.4", "n = 256: M 17.1, C 1.30, UCF101 69.2",
               "n = 512: M 17.2, C 1.56, UCF101 70.4", "n = 1024: M 17.0, C 1.86, UCF101 69.8"),
        claims=(
            ("the more videos, the higher the loss", "contrastive loss", "n = 128", "n = 16"),
            ("(asked here) more videos teach more on the spatial task",
             "scene", "n = 128", "n = 16"))),
    "12": Table(
        title="Whether the contrasted clips are masked",
        rows={"contrastive only, whole": CONTRAST,
              "contrastive only, masked": dict(mask_weight=0.0),
              "both tasks, whole": dict(contrast_on="whole"), "both tasks, masked": BOTH},
        paper=("UCF101 57.1", "UCF101 55.5", "UCF101 67.4", "UCF101 69.4"),
        claims=(
            ("without the mask task, whole clips teach more on the spatial task",
             "scene", "contrastive only, whole", "contrastive only, masked"),
            ("with the mask task, masked clips teach more on the spatial task",
             "scene", "both tasks, masked", "both tasks, whole"),
            ("(asked here) with the mask task, masked clips teach more on the temporal task",
             "motion", "both tasks, masked", "both tasks, whole"))),
    "13": Table(
        title="Attention layouts",
        rows={"TxHxW": dict(layout="TxHxW"), "T,HxW": dict(layout="T,HxW"),
              "T,H,W": dict(layout="T,H,W"), "T,H|W": BOTH,
              "T,H,W, pre-LN": dict(layout="T,H,W", pre_norm=True),
              "T,H|W, pre-LN": dict(pre_norm=True)},
        paper=("UCF101 65.9", "UCF101 69.0", "UCF101 69.6", "UCF101 69.4", "UCF101 69.0",
               "UCF101 67.6"),
        claims=(
            ("T,H|W is better than TxHxW on the spatial task", "scene", "T,H|W", "TxHxW"),
            ("(asked here) T,H|W is better than TxHxW on the temporal task",
             "motion", "T,H|W", "TxHxW"),
            ("post-LN is better than pre-LN on the spatial task",
             "scene", "T,H|W", "T,H|W, pre-LN"),
            ("(asked here) post-LN is better than pre-LN on the temporal task",
             "motion", "T,H|W", "T,H|W, pre-LN"))),
    "16": Table(
        title="The contrastive loss's weight",
        rows={"alpha 0": MASK, "alpha 0.5": dict(alpha=0.5), "alpha 1": BOTH,
              "alpha 2": dict(alpha=2.0)},
        paper=("M 17.6, UCF101 68.3", "M 17.5, C 1.07, UCF101 70.2", "M 17.2, C 1.06, UCF101 69.4",
               "M 16.9, C 1.05, UCF101 68.0"),
        claims=(
            ("the more it weighs, the less is predicted", "mask accuracy", "alpha 0", "alpha 2"),
            ("0.5 is better than 0 on the spatial task", "scene", "alpha 0.5", "alpha 0"),
            ("0.5 is better than 2 on the spatial task", "scene", "alpha 0.5", "alpha 2"),
            ("(asked here) 0.5 is better than 2 on the temporal task",
             "motion", "alpha 0.5", "alpha 2"))),
    "6 and 14": Table(
        title="Sizes of the model and the clip",
        rows={"d = 16": dict(dim=16, head_dim=8, mlp_dim=64, init_std=0.114),  # as 1 / sqrt(d)
              "as elsewhere": BOTH, "8 frames": dict(frames=8)},
        paper=("d = 512: M 17.2, C 1.06, UCF101 69.4", "d = 768: M 17.7, C 1.03, UCF101 75.0",
               "d = 512, 10 frames: M 17.2, C 0.96, UCF101 74.2 (5 frames: 69.4)"),
        claims=(
            ("a wider model predicts more", "mask accuracy", "as elsewhere", "d = 16"),
            ("a wider model is better on the spatial task", "scene", "as elsewhere", "d = 16"),
            ("(asked here) a wider model is better on the temporal task",
             "motion", "as elsewhere", "d = 16"),
            ("longer clips have the lower contrastive loss",
             "contrastive loss", "as elsewhere", "8 frames"),
            ("longer clips are better on the spatial task", "scene", "8 frames", "as elsewhere"),
            ("(asked here) longer clips are better on the temporal task",
             "motion", "8 frames", "as elsewhere"))),
}
