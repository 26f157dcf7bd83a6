"""What users get wrong about a model: sizes that do not fit together, tokens that do not fit it."""
from plumbing.cli import UserError

SIZES = ("layers", "dim", "heads", "head_dim", "mlp_dim", "frames", "height", "width", "vocab_size")


def check_config(config, layouts):
    """Raises UserError if the fields of a TransformerConfig do not fit together."""
    if config.layout not in layouts:
        raise UserError(f"unknown layout {config.layout!r}: choose one of {', '.join(layouts)}")
    patterns = max(1 + block.count("|") for block in config.layout.split(","))
    if config.heads % patterns:
        raise UserError(f"heads must be a multiple of {patterns}, the patterns of a block of "
                        f"{config.layout!r}, not {config.heads}")
    for name in SIZES:
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(config, name)}")
    if not 0 <= config.dropout < 1:
        raise UserError(f"dropout must be at least 0 and below 1, not {config.dropout}")
    if not config.init_std > 0:
        raise UserError(f"init_std must be above 0, not {config.init_std}")


def check_tokens(tokens, shape, ids):
    """Raises UserError for clips of another shape than (T, H, W) and for ids outside 0..ids - 1.

    On a GPU the ids are not looked at, as that would wait for it.
    """
    if tokens.shape[1:] != shape:
        raise UserError(f"the model takes clips of {shape} tokens, not {tuple(tokens.shape[1:])}: "
                        f"see its resize")
    if tokens.device.type == "cpu" and not 0 <= tokens.min() <= tokens.max() < ids:
        raise UserError(f"token ids lie in 0..{ids - 1}, "
                        f"not {tokens.min().item()}..{tokens.max().item()}")
