"""What the tests share: small videos, encoded for real; small token stores; the scripts, called with a command line."""
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
os.environ["OMP_NUM_THREADS"] = "1"  # likewise in the scripts that tests start

import data
import toy
from plumbing import cli, runs
from plumbing.writer import StoreWriter

TINY = dict(layers=1, dim=16, heads=2, head_dim=8, mlp_dim=32, projection_hidden=16, batch=4, log_every=2, save_every=3,
            knn_every=3, knn=3, device="cpu")


def flags(settings):
    return [part for key, value in settings.items() for part in ("--" + key.replace("_", "-"), value)]


def run(place, *argv, script="pretrain.py", under=()):
    """A script in a process of its own, in a folder. under: what stands between the interpreter and the script."""
    return subprocess.run([sys.executable, *under, str(ROOT / script), *map(str, argv)], cwd=place, check=False,
                          capture_output=True, text=True)


def call(module, *argv, place="."):
    """A script's main in this process, as its last line calls it, in a folder -> returncode, stdout, stderr."""
    stdout, stderr, code, argv_before = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = [module.__file__, *map(str, argv)]
    try:
        with contextlib.chdir(place), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            cli.run(module.main)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv_before
    return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())


@contextlib.contextmanager
def recorded_gradients():
    """-> a list that fills with the gradients of each step of a run, {parameter: tensor}, before they are clipped."""
    found = []

    class Recording(runs.Optimizer):
        def step(self, step):
            found.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})
            return super().step(step)
    with mock.patch.object(runs, "Optimizer", Recording):
        yield found


def assert_same_gradients(one, two):
    """Of every step and parameter, but for the rounding of float32: 1e-4 of the tensor's largest, or 1e-5 of the
    largest of all where a gradient is 0 but for rounding, such as that of a bias before a batch norm."""
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        least = 0.1 * max(gradient.abs().max().item() for gradient in a.values())
        for name in a:
            assert torch.allclose(a[name], b[name], rtol=0, atol=1e-4 * max(least, a[name].abs().max().item())), name


def interrupted(step):
    """A context in which a run is interrupted in this step."""
    rate = runs.learning_rate

    def interrupt(now, *rest):
        if now == step:
            raise KeyboardInterrupt
        return rate(now, *rest)
    return mock.patch.object(runs, "learning_rate", interrupt)


def write_store(path, videos, **header):
    """A token store. videos: [(tokens (views, F, H, W), {label set: class})]; video i is called i.mp4."""
    header = dict(tokenizer="t", fingerprint="f", arithmetic="float32", vocab_size=16, fps=8, size=16,
                  height=videos[0][0].shape[2], width=videos[0][0].shape[3], views=[[16, "center", False]], root="/",
                  classes=None) | header
    writer = StoreWriter(path, header)
    for number, (tokens, _) in enumerate(videos):
        writer.add(f"{number}.mp4", tokens)
    writer.close()
    writer.finish([(f"{number}.mp4", labels, None, None) for number, (_, labels) in enumerate(videos)])
    return data.TokenStore(path)


def random_store(path, count, lengths=(3, 20), side=4, seed=0, **header):
    """Videos of random tokens and random lengths: of a clip of five frames at stride 2 some are beyond the end."""
    random = np.random.default_rng(seed)
    return write_store(path, [(random.integers(16, size=(1, random.integers(*lengths), side, side)),
                               {"label": int(random.integers(3))}) for _ in range(count)], **header)


@pytest.fixture(scope="session")
def write_video():
    """Writes a video file of grey frames, frame i as bright as grey[i], with a white stripe at the left."""
    def write(path, grey, fps=8, width=64, height=64, codec="libx264", options=("-crf", "4")):
        path.parent.mkdir(parents=True, exist_ok=True)
        with imageio.get_writer(path, fps=fps, codec=codec, macro_block_size=2, output_params=list(options)) as writer:
            for value in grey:
                frame = np.full((height, width, 3), value, np.uint8)
                frame[:, :8] = 255
                writer.append_data(frame)
        return path
    return write


@pytest.fixture(scope="session")
def small_disk(tmp_path_factory):
    """-> a function: what starts a command with a disk of 400 kB, mounted in a folder for it alone."""
    def under(folder):
        folder.mkdir()
        return ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=400k x "$0" && exec "$@"', str(folder)]
    tried = [*under(tmp_path_factory.mktemp("disk") / "x"), "true"]
    if not shutil.which("unshare") or subprocess.run(tried, check=False, capture_output=True).returncode:
        pytest.skip("needs a namespace of its own to mount a small disk in")
    return under


@pytest.fixture(scope="session")
def in_two_processes(tmp_path_factory):
    """-> a function that calls (function, arguments) in two processes of a group: what each returned."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    pools = [ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn"), join_group, (meeting, rank))
             for rank in (0, 1)]
    yield lambda *job: [torch.load(io.BytesIO(done.result()), weights_only=False)
                        for done in [pool.submit(saved, *job) for pool in pools]]
    for pool in pools:
        pool.shutdown()


def join_group(meeting, rank):
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2,
                                         timeout=timedelta(minutes=2))


def saved(function, *args):
    file = io.BytesIO()
    torch.save(function(*args), file)
    return file.getvalue()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with a very small toy world, pre-trained for a few steps through the command line."""
    place = tmp_path_factory.mktemp("work")
    toy.make(place / "datasets/toy", {"pretrain": 24, "train": 12, "val": 8, "test": 6}, workers=1)
    done = run(place, "--steps", 5, "--tokenizer-steps", 20, *flags(TINY))
    assert done.returncode == 0, done.stderr
    (place / "stdout.txt").write_text(done.stdout)
    return place
