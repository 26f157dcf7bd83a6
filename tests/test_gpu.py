"""A training step of the transformer and its heads on a pretended GPU, in a process of its own.

Nothing in a step may wait for the GPU or compute with tensors on two devices. What only a real GPU
shows, numbers and times, is not tested here.
"""
import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = {  # {name: (preset, settings, precision, arguments of roofline.count_step)}
    **{name: (name, {}, "bfloat16", {}) for name in ("toy", "small", "base", "large", "large256")},
    **{precision: ("small", {}, precision, {}) for precision in ("float16", "float32")},
    **{f"PAD, {precision}": ("small", {}, precision, {"pad": True})
       for precision in ("bfloat16", "float16", "float32")},
    "pre-LayerNorm": ("small", {"pre_norm": True}, "bfloat16", {}),
    "TxHxW": ("small", {"layout": "TxHxW"}, "bfloat16", {}),
    "TxHxW, PAD": ("small", {"layout": "TxHxW"}, "float16", {"pad": True}),
    "T,HxW, PAD": ("small", {"layout": "T,HxW"}, "bfloat16", {"pad": True}),
    "activation checkpointing": ("small", {}, "bfloat16", {"checkpointing": True}),
    "activation checkpointing, PAD": ("small", {}, "float16", {"checkpointing": True, "pad": True}),
    "looks for PAD": ("small", {}, "bfloat16", {"pad": None}),
    "hidden places on the CPU": ("small", {}, "bfloat16", {"hidden_on": "cpu"}),
}


@pytest.fixture(scope="module")
def steps():
    """-> {name of a case: what was counted in its step}."""
    if not shutil.which("g++"):
        pytest.skip("the pretended GPU needs g++")
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    env.pop("PYTHONPATH", None)  # NATIVE_BF16 would import torch before the device is there
    done = subprocess.run([sys.executable, __file__], check=False, capture_output=True, text=True,
                          env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", list(CASES)[:-2])
def test_nothing_waits_for_the_gpu_and_no_line_mixes_devices(name, steps):
    assert steps[name]["waits"] == {} and steps[name]["mixed"] == {}
    assert steps[name]["kernels"] > 50


def test_a_look_for_pad_and_places_on_the_cpu_are_noticed(steps):
    (wait, count), = steps["looks for PAD"]["waits"].items()
    assert "transformer.py" in wait and "has_pad" in wait and count == 1
    mixed = steps["hidden places on the CPU"]["mixed"]
    assert any(line.startswith("index ") and "[hidden]" in line for line in mixed)


@pytest.mark.parametrize("name, lengths", [("small", {6, 17}), ("large256", {6, 33}),
                                           ("TxHxW", {1281}), ("T,HxW, PAD", {6, 257})])
def test_attention_over_short_sequences_takes_no_fused_kernel(name, lengths, steps):
    assert set(steps[name]["attention"]) == lengths
    assert set(steps[name]["fused"]) == {length for length in lengths if length > 32}


@pytest.mark.parametrize("name, dtype", [("small", "bfloat16"), ("float16", "float16"),
                                         ("float32", "float32"), ("PAD, float16", "float16")])
def test_matrix_products_run_in_the_precision_asked_for(name, dtype, steps):
    """All but InfoNCE's, which is float32 everywhere."""
    flop = steps[name]["flop"]
    assert flop[dtype] > 0.999 * sum(flop.values())


def main():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import roofline
    import torch
    counted = {}
    for name, (preset, settings, precision, arguments) in CASES.items():
        config = roofline.config_of(preset)
        for setting, value in {"layers": 1, **settings}.items():
            setattr(config, setting, value)
        gpu, _ = roofline.count_step(config, 2, getattr(torch, precision), **arguments)
        lengths = [(roofline.attention_length(kernel, config.head_dim), kernel)
                   for kernel in gpu.kernels]
        counted[name] = {
            "waits": gpu.waits, "mixed": gpu.mixed, "kernels": len(gpu.kernels),
            "attention": [length for length, _ in lengths if length],
            "fused": [length for length, kernel in lengths if "attention" in kernel.name],
            "flop": sum((collections.Counter({kernel.dtype: kernel.flop})
                         for kernel in gpu.kernels), collections.Counter()),
        }
    print(json.dumps(counted))


if __name__ == "__main__":
    main()
