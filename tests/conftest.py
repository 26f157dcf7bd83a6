"""What the tests share: small videos, encoded for real."""
import os
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tiny tensors: several threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # likewise in the scripts that tests start

import toy  # noqa: E402

TINY = dict(layers=1, dim=16, heads=2, head_dim=8, mlp_dim=32, projection_hidden=16, batch=4, log_every=2, save_every=3,
            knn_every=3, knn=3, device="cpu")


def flags(settings):
    return [part for key, value in settings.items() for part in ("--" + key.replace("_", "-"), value)]


def run(place, *argv, script="pretrain.py"):
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, argv)], cwd=place, capture_output=True,
                          text=True)


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
def workplace(tmp_path_factory):
    """A folder with a very small toy world, pre-trained for a few steps through the command line."""
    place = tmp_path_factory.mktemp("work")
    toy.make(place / "datasets/toy", {"pretrain": 16, "train": 12, "val": 8, "test": 6}, workers=1)
    done = run(place, "--steps", 5, "--tokenizer-steps", 20, *flags(TINY))
    assert done.returncode == 0, done.stderr
    (place / "stdout.txt").write_text(done.stdout)
    return place
