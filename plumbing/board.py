"""What TensorBoard shows of a run: tags in groups, charts, hyperparameters."""
from dataclasses import asdict

GROUPS = ("held_out", "knn")  # beginnings of a metric's name that are groups in TensorBoard
BOTH = {"train": [(name, f"held_out_{name}") for name in
                  ("mask_loss", "mask_accuracy", "contrastive_loss", "loss")],
        "finetune": [("train_accuracy", "val_accuracy")]}  # training and held-out on one chart


def tag(name, group):
    """A metric's name in TensorBoard: knn_motion is knn/motion, others are in the group."""
    for prefix in GROUPS:
        if name.startswith(f"{prefix}_"):
            return f"{prefix}/{name.removeprefix(f'{prefix}_')}"
    return f"{group}/{name}"


def describe_board(board, config, group):
    """TensorBoard's charts of training and held-out videos, and its table of hyperparameters."""
    from torch.utils.tensorboard.summary import hparams
    pairs = {names[0]: ["Multiline", [tag(name, group) for name in names]] for names in BOTH[group]}
    board.add_custom_scalars({"training and held-out videos": pairs})
    settings = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                for name, value in asdict(config).items()}
    metrics = dict.fromkeys(tag(name, group) for names in BOTH[group] for name in names)
    for summary in hparams(settings, metrics):
        board.file_writer.add_summary(summary)
