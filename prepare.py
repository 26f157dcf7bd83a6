"""What pre-training needs: videos of the toy world, a tokenizer, tokens. Makes what is missing.

A later run with the same flags uses the same files. A run that needs other ones is refused.
"""
from pathlib import Path

import data
import monitor
import predict
import toy
import vqvae
from plumbing.cli import UserError
from plumbing.datasets import class_names, own_splits, videos_to_pretrain_on
from plumbing.processes import broadcast, by_first, say
from plumbing.store import check_alike


def prepare(config, device):
    """Returns the token store, the path of the tokenizer for pictures (or None), and the folder of
    the labelled stores for the kNN accuracy (or None).

    config: pretrain.Config. Raises UserError before it makes anything, if it can. Prints why the
    pictures of what the model fills in cannot be drawn.
    """
    if config.tokenizer and not Path(config.tokenizer).is_file():
        raise UserError(f"--tokenizer {config.tokenizer}: there is no such file "
                        f"(without the flag, one is trained on the videos)")
    if config.data:
        store, tokenizer_path = data.TokenStore(config.data), config.tokenizer
        labelled = config.monitor
        check_store(config, store, device)
        check_labelled(store, labelled)
    else:
        store, tokenizer_path, labelled = make(config, device)
        check_labelled(store, labelled)
    if tokenizer_path and (reason := why_no_pictures(config, tokenizer_path, store)):
        say(f"no pictures of what the model fills in: {reason}")
        tokenizer_path = None
    return store, tokenizer_path or None, labelled or None


def make(config, device):
    """Makes the tokenizer and the tokens of a folder of videos, or of the toy world.

    Returns the same as `prepare`.
    """
    if config.videos:
        home, root, classes, labelled = Path(config.out), config.videos, None, config.monitor
        videos = broadcast(by_first(videos_to_pretrain_on, root))
        splits = {"pretrain": [(path, {}) for path in videos]}
    else:
        home, sizes = toy.sized(config.toy_videos)
        root, classes, labelled = home, toy.CLASSES, config.monitor or home / "tokens"
        by_first(lambda: toy.finished(home) or toy.make(home, sizes, wanted=["pretrain"]))
        splits = {"pretrain": toy.split_videos(home, "pretrain")}
    path = Path(config.tokenizer or home / "tokenizer.pt")
    videos = [video for video, _ in splits["pretrain"]]
    by_first(lambda: path.is_file() or make_tokenizer(config, videos, path, device))
    tokenizer = vqvae.load_tokenizer(path).to(device)
    if not config.tokenizer and tokenizer.vocab_size != config.codes:
        raise UserError(f"{path} has {tokenizer.vocab_size} codes, not {config.codes}: "
                        f"give --codes {tokenizer.vocab_size}, or delete it and {home / 'tokens'}")
    if not config.videos:
        by_first(lambda: toy.finished(home) or toy.make(home, sizes))
        splits = {split: toy.split_videos(home, split) for split in toy.SPLITS}
    views = data.views_for("pretrain", config.frame_size)
    for split, videos in splits.items():
        vqvae.tokenize(tokenizer, videos, root, home / "tokens" / split, config.fps,
                       config.frame_size, views, path.name, classes)
    return data.TokenStore(home / "tokens/pretrain"), path, labelled


def make_tokenizer(config, videos, path, device):
    quality, _ = vqvae.make_tokenizer(
        videos, path, config.fps, config.frame_size, 8000, codes=config.codes,
        steps=config.tokenizer_steps, batch=64, lr=2e-3, seed=config.seed, device=device)
    say(f"tokenizer: {quality}")


def check_store(config, store, device):
    """Raises UserError if the store of --data has another frame size or another tokenizer."""
    if (size := store.header["size"]) != config.frame_size:
        raise UserError(f"--data {config.data} holds frames of {size} pixels: "
                        f"give --frame-size {size}")
    if not config.tokenizer:
        say("no pictures of what the model fills in: they need the store's --tokenizer")
        return
    tokenizer = vqvae.load_tokenizer(config.tokenizer).to(device)
    vocab_size, fingerprint = store.header["vocab_size"], store.header["fingerprint"]
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"--tokenizer {config.tokenizer} has {tokenizer.vocab_size} codes, "
                        f"{store.path} holds {vocab_size}: give the one that made it")
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"--tokenizer {config.tokenizer} (fingerprint {tokenizer.fingerprint}) "
                        f"did not make {store.path}, "
                        f"that was {store.header['tokenizer']} ({fingerprint})")


def check_labelled(store, folder):
    """Raises UserError if the stores for the kNN accuracy have tokens of another kind."""
    if folder:
        check_alike(store, *data.labelled_stores(folder))


def why_no_pictures(config, path, store):
    """Why what the model fills in cannot be drawn -> str, or None if it can."""
    if vqvae.load_tokenizer(path).decoder is None:
        return f"there is no decoder.pkl beside {path}"
    for video in map(store.video_path, monitor.shown(config, store)):
        if not video.is_file():
            return f"{video} is not there"
    return None


def tokenise_labelled(config, backbone, device):
    """Tokenises the labelled videos of finetune.py --videos into config.data.

    They are tokenised like those that the model was trained on. Tokens that are there are kept.
    """
    tokenizer, made, _ = predict.read_origin(config, backbone.to(device))
    config.tokenizer = made["tokenizer"]  # as used
    splits, classes = broadcast(by_first(labelled_splits, config.videos))
    for split, videos in splits.items():
        vqvae.tokenize(tokenizer, videos, config.videos, Path(config.data) / split, made["fps"],
                       made["size"], data.views_for("pretrain", made["size"]),
                       Path(made["tokenizer"]).name, classes)


def labelled_splits(root):
    """-> {split: [(path, {"label": class})]}, {"label": [class name]} or None."""
    splits, classes = own_splits(root), class_names("own", root)
    return ({split: [(path, {"label": label}) for path, label in videos]
             for split, videos in splits.items()}, {"label": classes} if classes else None)


def open_stores(config):
    """The token stores to train and test on -> {split: TokenStore}, and that of val or None.

    None also where config.eval_split is val, or nothing is trained.
    """
    splits = [config.eval_split] if config.eval_only else ["train", config.eval_split]
    stores = {}
    for split in splits:
        names = [f"{split}{config.split}"] if config.split else [split]
        if config.split == 1:
            names.append(split)  # split 1 may have the plain name
        stores[split] = data.open_store(config.data, *names)
    val, chooses = Path(config.data) / "val", not (config.eval_only or config.freeze_backbone)
    chooses = chooses and not config.split and config.eval_split != "val"
    val = data.TokenStore(val) if chooses and (val / "index.npz").is_file() else None
    check_alike(*stores.values(), *filter(None, [val]))
    train, test = stores[splits[0]], stores[config.eval_split]
    if train is not test and train.header["root"] == test.header["root"]:
        both = len(train.names() & test.names())
        if both:
            say(f"{both} of the {len(test)} test videos are training videos, too")
    return stores, val


def pick_labels(stores, wanted, learnt=None):
    """The label set and the names of its classes -> name, [class].

    Where a store has one set only, the default names stand for it. learnt: the classes that a
    model to test has learnt, if known. Raises UserError if the stores have others.
    """
    first = next(iter(stores.values()))
    sets = first.label_sets()
    name = sets[0] if len(sets) == 1 and wanted in ("label", "motion") else wanted
    labels = [store.labels(name) for store in stores.values()]
    largest = max(int(values.max()) for values in labels)
    names = (first.header["classes"] or {}).get(name) or [str(i) for i in range(largest + 1)]
    if learnt and learnt != names:
        raise UserError(f"{first.path} has other classes than the model was fine-tuned on")
    if any(int(values.min()) < 0 for values in labels):
        paths = ", ".join(str(store.path) for store in stores.values())
        raise UserError(f"some videos of {paths} have no label {name!r}")
    if largest >= len(names):
        raise UserError(f"label {largest} of {name!r} is beyond its {len(names)} classes")
    return name, names
