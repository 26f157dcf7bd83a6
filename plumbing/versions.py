"""The versions and the machine, for a bug report: python -m plumbing.versions"""
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import imageio_ffmpeg
import torch

PACKAGES = ("torch", "numpy", "imageio", "matplotlib", "tensorboard")


def commit():
    """The commit of this code, with "-dirty" where more than results has changed -> str.

    None outside of a git repository.
    """
    try:
        head = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".",
                      ":!benchmarks/*.json*", ":!benchmarks/figures")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "-dirty" * bool(changed)


def git(*arguments):
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main():
    print(f"Python {platform.python_version()} on {platform.platform()}")
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
    print(f"ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes, free or not
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, "
          f"{memory / 1e9:.0f} GB of memory")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"GPU: {gpu}, MPS: {torch.backends.mps.is_available()}")


if __name__ == "__main__":
    main()
