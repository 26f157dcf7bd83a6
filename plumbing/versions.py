"""What a report of a bug needs to know of the machine: python -m plumbing.versions"""
import os
import platform
from importlib.metadata import version

import imageio_ffmpeg
import torch

from plumbing.fitting import system_free

if __name__ == "__main__":
    print(f"Python {platform.python_version()} on {platform.platform()}")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "imageio", "matplotlib", "tensorboard")))
    print(f"ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}")
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {system_free() / 1e9:.0f} GB of memory free")
    print(f"GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}, MPS: "
          f"{torch.backends.mps.is_available()}")
