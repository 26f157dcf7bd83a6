"""Imported by each Python process that a test starts, where NATIVE_BF16 is set (conftest.py)."""
import os

import torch

torch.cpu._is_avx512_bf16_supported = lambda: os.environ["NATIVE_BF16"] == "1"
