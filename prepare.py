"""What pre-training needs, made where it is missing: the toy world's videos, a tokenizer, tokens; checked where not.

What is made is made once: a later run with the same flags finds it, one that asks for something else is refused.
"""
from pathlib import Path

import data
import monitor
import toy
import vqvae
from plumbing.cli import UserError
from plumbing.files import lock, locked
from plumbing.processes import by_first, say
from plumbing.store import check_alike
from plumbing.tokenizing import fingerprint


def prepare(config, device):
    """config: pretrain.Config -> token store, path of the tokenizer that draws it or None, folder of labelled stores or
    None. Nothing is made before all that can be refused has been; pictures that cannot be drawn are said here."""
    if config.tokenizer and not Path(config.tokenizer).is_file():
        raise UserError(f"--tokenizer {config.tokenizer}: there is no such file (without the flag, one is trained "
                        f"on the videos)")
    if config.data:
        store, place, labelled = data.TokenStore(config.data), config.tokenizer, config.monitor
        if (size := store.header["size"]) != config.frame_size:
            raise UserError(f"--data {config.data} holds frames of {size} pixels: give --frame-size {size}")
        if place:
            check_tokenizer(place, store)
        else:
            say("no pictures of what the model fills in: they need the store's --tokenizer")
        check_labelled(store, labelled)
        by_first(lock, config.out)
    else:
        store, place, labelled = make(config, device)
        check_labelled(store, labelled)
    if place and (reason := undrawable(config, place, store)):
        say(f"no pictures of what the model fills in: {reason}")
        place = None
    return store, place or None, labelled or None


def make(config, device):
    """Makes what is missing of the toy world, or of a folder of videos -> as `prepare`."""
    if config.videos:
        home, root, classes, labelled = Path(config.out), config.videos, None, config.monitor
        splits = {"pretrain": [(path, {}) for path, _ in data.list_videos("folder", root, "")]}
    else:
        root, sizes = toy.sized(config.toy_videos)
        home, classes, labelled = root, toy.CLASSES, config.monitor or root / "tokens"
    by_first(lock, config.out)  # also tries it, before the long work
    if not config.videos:  # the others once the tokenizer, and so its picture, is there
        by_first(lambda: toy.finished(home) or toy.make(home, sizes, wanted=["pretrain"]))
        splits = {"pretrain": toy.split_videos(home, "pretrain")}
    place = Path(config.tokenizer or home / "tokenizer.pt")
    by_first(lambda: place.is_file() or make_tokenizer(config, splits["pretrain"], home, place, device))
    tokenizer, views = vqvae.load_tokenizer(place).to(device), data.views_for("pretrain", config.frame_size)
    if not config.tokenizer and tokenizer.vocab_size != config.codes:
        raise UserError(f"{place} has {tokenizer.vocab_size} codes, not {config.codes}: give --codes "
                        f"{tokenizer.vocab_size}, or delete it and {home / 'tokens'}")
    if not config.videos:
        by_first(lambda: toy.finished(home) or toy.make(home, sizes))
        splits = {split: toy.split_videos(home, split) for split in toy.SPLITS}
    for split, videos in splits.items():
        vqvae.tokenize(tokenizer, videos, root, home / "tokens" / split, config.fps, config.frame_size, views,
                       place.name, classes)
    return data.TokenStore(home / "tokens/pretrain"), place, labelled


def make_tokenizer(config, videos, home, place, device):
    with locked(home):
        found, _ = vqvae.make_tokenizer(
            [path for path, _ in videos], place, config.fps, config.frame_size, 8000, codes=config.codes,
            steps=config.tokenizer_steps, batch=64, lr=2e-3, seed=config.seed, device=device)
    say(f"tokenizer: {found}")


def check_tokenizer(path, store):
    """Raises UserError, naming both, where a tokenizer is not the one that made a store."""
    tokenizer, made = vqvae.load_tokenizer(path), store.header.get("fingerprint")
    if tokenizer.vocab_size != store.header["vocab_size"]:
        raise UserError(f"--tokenizer {path} has {tokenizer.vocab_size} codes, {store.path} holds "
                        f"{store.header['vocab_size']}: give the one that made it")
    if made not in (None, fingerprint(tokenizer), fingerprint(tokenizer, "")):
        raise UserError(f"--tokenizer {path} (fingerprint {fingerprint(tokenizer)}) did not make {store.path}, that "
                        f"was {store.header.get('tokenizer')} ({made})")


def check_labelled(store, folder):
    """Raises UserError where the kNN accuracy would be that of other tokens."""
    if folder:
        check_alike(store, *data.labelled_stores(folder))


def undrawable(config, path, store):
    """Why what the model fills in cannot be drawn -> str, or None where it can."""
    if vqvae.load_tokenizer(path).decoder is None:
        return f"there is no decoder.pkl beside {path}"
    missing = [path for path in map(store.video_path, monitor.shown(config, store)) if not path.is_file()]
    return f"{missing[0]} is not there" if missing else None
