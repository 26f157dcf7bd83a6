"""What the tests share: real small videos, small token stores, and calls of the scripts."""
import contextlib
import io
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
torch.set_num_threads(1)  # tiny tensors: several threads only wait for each other
if "NATIVE_BF16" in os.environ:  # 0 or 1: what --precision auto is to take this CPU for
    path = str(ROOT / "tests" / "native_bf16")  # its sitecustomize.py, for the scripts, too
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH"))))
    torch.cpu._is_avx512_bf16_supported = lambda: os.environ["NATIVE_BF16"] == "1"
os.environ["OMP_NUM_THREADS"] = "1"  # likewise in the scripts that tests start

import data
import toy
from plumbing import cli, runs
from plumbing.files import whole
from plumbing.store import PartWriter, pack_index, read_parts

TINY = dict(layers=1, dim=16, heads=2, head_dim=8, mlp_dim=32, projection_hidden=16, batch=4,
            log_every=2, save_every=3, knn_every=3, knn=3, device="cpu")


def flags(settings):
    return [part for key, value in settings.items()
            for part in ("--" + key.replace("_", "-"), value)]


def run(place, *argv, script="pretrain.py", under=()):
    """Runs a script in another process. under: arguments between the interpreter and the script."""
    command = [sys.executable, *under, str(ROOT / script), *map(str, argv)]
    return subprocess.run(command, cwd=place, check=False, capture_output=True, text=True)


def call(module, *argv, place="."):
    """Runs a script in this process, in a folder -> returncode, stdout, stderr."""
    stdout, stderr, code, argv_before = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = [module.__file__, *map(str, argv)]
    try:
        with contextlib.chdir(place), contextlib.redirect_stdout(stdout), \
                contextlib.redirect_stderr(stderr):
            cli.run(module.main)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv_before
    return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())


@contextlib.contextmanager
def recorded_gradients():
    """-> a list that fills with the gradients of each step of a run, {parameter: tensor}.

    They are those before clipping.
    """
    gradients, models = [], []
    build, clip = runs.build_optimizer, torch.nn.utils.clip_grad_norm_

    def watched_build(model, *args):
        models.append(model)
        return build(model, *args)

    def watched_clip(parameters, *args):
        gradients.append({name: p.grad.clone() for name, p in models[-1].named_parameters()
                          if p.grad is not None})
        return clip(parameters, *args)

    with mock.patch.object(runs, "build_optimizer", watched_build), \
            mock.patch.object(torch.nn.utils, "clip_grad_norm_", watched_clip):
        yield gradients


def assert_same_gradients(one, two):
    """The gradients of every step and parameter agree, up to the rounding of float32.

    The tolerance is 1e-4 of the tensor's largest number. Where the true gradient is 0, such as of
    a bias before a batch norm, it is 1e-5 of the largest number of all.
    """
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        least = 0.1 * max(gradient.abs().max().item() for gradient in a.values())
        for name in a:
            scale = max(least, a[name].abs().max().item())
            assert torch.allclose(a[name], b[name], rtol=0, atol=1e-4 * scale), name


def interrupted(step):
    """A context in which a run raises KeyboardInterrupt in this step."""
    learning_rate = runs.learning_rate

    def interrupt(now, *args):
        if now == step:
            raise KeyboardInterrupt
        return learning_rate(now, *args)

    return mock.patch.object(runs, "learning_rate", interrupt)


def write_store(path, videos, **header):
    """A token store. videos: [(tokens (views, F, H, W), {label set: class})]; video i is i.mp4.

    header: settings, root and classes that differ from the defaults below.
    """
    if "views" in header:
        header["views"] = [list(view) for view in header["views"]]
    settings = dict(tokenizer="t", fingerprint="f", vocab_size=16, fps=8, size=16,
                    height=videos[0][0].shape[2], width=videos[0][0].shape[3],
                    views=[[16, "center", False]], resampling="r", root="/", classes=None) | header
    root, classes = settings.pop("root"), settings.pop("classes")
    writer = PartWriter(path, settings, root)
    for number, (tokens, _) in enumerate(videos):
        writer.add(f"{number}.mp4", size=0, mtime=0, tokens=tokens)
    writer.close()
    write_index(path, settings, [(f"{number}.mp4", labels)
                                 for number, (_, labels) in enumerate(videos)], root, classes)
    return data.TokenStore(path)


def write_index(path, settings, labels, root="/", classes=None):
    """Finishes a token store whose parts exist. labels: [(name, {label set: class})]."""
    parts = read_parts(path, settings)
    videos = [parts[name][-1] for name, _ in labels]
    header = {**settings, "root": root, "classes": classes}
    with whole(path / "index.npz") as file:
        file.write(pack_index(path, header, videos, [row for _, row in labels]))


def random_store(path, count, lengths=(3, 20), side=4, seed=0, **header):
    """Videos of random tokens and lengths. Some are shorter than five frames at stride 2."""
    random = np.random.default_rng(seed)
    return write_store(path, [(random.integers(16, size=(1, random.integers(*lengths), side, side)),
                               {"label": int(random.integers(3))}) for _ in range(count)], **header)


@pytest.fixture(scope="session")
def write_video():
    """Writes a video of grey frames, frame i as bright as grey[i], with a white stripe at left."""
    def write(path, grey, fps=8, width=64, height=64, codec="libx264", options=("-crf", "4")):
        path.parent.mkdir(parents=True, exist_ok=True)
        with imageio.get_writer(path, fps=fps, codec=codec, macro_block_size=2,
                                output_params=list(options)) as writer:
            for value in grey:
                frame = np.full((height, width, 3), value, np.uint8)
                frame[:, :8] = 255
                writer.append_data(frame)
        return path
    return write


@pytest.fixture(scope="session")
def small_disk(tmp_path_factory):
    """-> a function: the arguments that start a command with a disk of 400 kB in a folder."""
    def under(folder):
        folder.mkdir()
        script = 'mount -t tmpfs -o size=400k x "$0" && exec "$@"'
        return ["unshare", "-rm", "sh", "-c", script, str(folder)]
    tried = [*under(tmp_path_factory.mktemp("disk") / "x"), "true"]
    if not shutil.which("unshare") or subprocess.run(tried, check=False,
                                                     capture_output=True).returncode:
        pytest.skip("needs a namespace of its own to mount a small disk in")
    return under


@pytest.fixture(scope="session")
def in_two_processes(tmp_path_factory):
    """-> a function that calls (function, arguments) in two processes -> what each returned."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    context = torch.multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, context, join_group, (meeting, rank)) for rank in (0, 1)]
    yield lambda *job: [torch.load(io.BytesIO(done.result()), weights_only=False)
                        for done in [pool.submit(saved, *job) for pool in pools]]
    for pool in pools:
        pool.shutdown()


def join_group(meeting, rank):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2,
        timeout=timedelta(minutes=2))


def saved(function, *args):
    file = io.BytesIO()
    torch.save(function(*args), file)
    return file.getvalue()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with a very small toy world, pre-trained for a few steps."""
    place = tmp_path_factory.mktemp("work")
    toy.make(place / "datasets/toy", {"pretrain": 24, "train": 12, "val": 8, "test": 6}, workers=1)
    done = run(place, "--steps", 5, "--tokenizer-steps", 20, *flags(TINY))
    assert done.returncode == 0, done.stderr
    (place / "stdout.txt").write_text(done.stdout)
    return place
