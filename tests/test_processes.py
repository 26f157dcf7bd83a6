import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, call

import finetune
import pretrain
from plumbing import checkpoints, processes
from plumbing.cli import UserError

BATCH = 3, 4  # inputs of one process's batch norm

# ---------------------------------------------------------------- two processes


def normalise(norm, x, pull):
    """-> outputs, gradient of the inputs, gradients of weight and bias, for the loss (outputs * pull).sum()."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * pull).sum().backward()
    return y.detach(), x.grad, norm.weight.grad, norm.bias.grad


def make_norm(kind):
    torch.manual_seed(0)
    norm = kind(BATCH[1])
    torch.nn.init.normal_(norm.weight)
    return norm


def two_of_everything(inputs, pull):
    """What two processes do together."""
    rank = processes.rank_and_world()[0]
    found = {"told": processes.rank_and_world(), "from all": processes.from_all(f"of {rank}"),
             "sum": processes.sum_over_all(torch.tensor([1.0, rank]))}

    x = torch.full((2,), 3.0 + rank, requires_grad=True)
    everyone = processes.gather(x)
    ((1 + rank) * everyone[::2] * torch.tensor([1.0, 10.0])).sum().backward()
    found["gathered"], found["gradient"] = everyone.detach(), x.grad

    norm = make_norm(processes.BatchNorm)
    found["norm"] = *normalise(norm, inputs.chunk(2)[rank], pull.chunk(2)[rank]), norm.running_mean, norm.running_var
    norm.eval()
    found["alone"] = norm(inputs[:1]).detach() if rank == 0 else None  # no exchange: rank 1 does not call it

    settings = SimpleNamespace(out="runs/a", resume=False)
    assert checkpoints.start(settings, None, None) == (0, False)
    with mock.patch.multiple(checkpoints, last_checkpoint=lambda out, resume: "last.pt", restore=lambda *_: 3 * rank), \
            pytest.raises(UserError) as refused:
        checkpoints.start(settings, None, SimpleNamespace(steps=9))
    found["refused"] = str(refused.value)
    found["restarted"] = [processes.restarted()]
    with mock.patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT=str(rank)):  # torchrun tells only one of them
        found["restarted"].append(processes.restarted())
    return found


@pytest.fixture(scope="module")
def two(in_two_processes):
    """-> inputs and pull of the batch norm, then what each of two processes found."""
    torch.manual_seed(1)
    inputs, pull = torch.randn(2, 2 * BATCH[0], BATCH[1]) + 3
    return inputs, pull, *in_two_processes(two_of_everything, inputs, pull)


def test_what_is_exchanged_is_the_same_everywhere(two):
    for rank, found in enumerate(two[2:]):
        assert found["told"] == (rank, 2) and found["from all"] == ["of 0", "of 1"]
        assert found["sum"].tolist() == [2, 1] and found["gathered"].tolist() == [3, 3, 4, 4]
        assert found["gradient"].tolist() == [[3, 0], [30, 0]][rank]  # 1 + 2 times what each process did with it


def test_a_batch_norm_over_two_processes_is_that_of_one_batch(two):
    """Outputs, gradients of inputs and weights, and the running statistics."""
    norm = make_norm(torch.nn.BatchNorm1d)
    y, x, weight, bias = normalise(norm, *two[:2])
    halves = [found["norm"] for found in two[2:]]
    for i, whole in enumerate((y, x)):
        assert torch.allclose(torch.cat([half[i] for half in halves]), whole, atol=1e-5)
    for i, whole in ((2, weight), (3, bias)):
        assert torch.allclose(sum(half[i] for half in halves), whole, atol=1e-5)
    for half in halves:
        assert torch.allclose(half[4], norm.running_mean) and torch.allclose(half[5], norm.running_var)
    assert torch.allclose(two[2]["alone"], norm.eval()(two[0][:1]))


def test_processes_agree_on_where_to_start(two):
    for found in two[2:]:
        assert "--out runs/a" in found["refused"] and "[0, 3]" in found["refused"]
        assert found["restarted"] == [False, True]


# ---------------------------------------------------------------- one process


def test_a_process_alone_needs_no_group(capsys):
    x = torch.ones(2, 3)
    assert processes.rank_and_world() == (0, 1) and processes.from_all(7) == [7]
    assert processes.gather(x) is x and processes.sum_over_all(x) is x
    processes.say("said")
    processes.wait_for_all()
    processes.leave_group()
    assert capsys.readouterr().out == "said\n"


def test_every_video_is_one_processes_and_what_belongs_to_it_too():
    assert [processes.share(list(range(7)), rank, 3) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]


def test_more_processes_than_gpus_are_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    done = call(pretrain, "--gpus", 2, place=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--gpus 2" in done.stderr
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- seeds


def test_a_pool_ends_with_its_parent_even_if_that_is_killed():
    program = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from plumbing.processes import end_with
if __name__ == "__main__":
    with ProcessPoolExecutor(1, initializer=end_with, initargs=(os.getpid(),)) as pool:
        pool.submit(print, "at work", flush=True).result()
        time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "at work\n"
    parent.kill()
    assert parent.communicate(timeout=60)[0] == ""  # its end is that of the last process that could write to it


def test_seeds_are_repeated_and_differ_by_every_number():
    def draw(*numbers):
        processes.seed_all(*numbers)
        return torch.rand(3).tolist(), np.random.rand()
    assert draw(0, 1, 2) == draw(0, 1, 2)
    asked = (0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 1), (0, 1, 0), (0,), (0, 0), (0, 0, 0)
    assert len({str(draw(*numbers)) for numbers in asked}) == len(asked)


def test_a_zero_at_the_end_gives_another_seed():
    """numpy's SeedSequence takes (1, 2) and (1, 2, 0) for the same: masks and dropout of rank 0 were."""
    assert processes.one_seed(1, 2) != processes.one_seed(1, 2, 0)
    seeds = {processes.one_seed(seed, step, *rest) for seed in range(4) for step in range(50)
             for rest in ((), (0,), (1,))}
    assert len(seeds) == 4 * 50 * 3


# ---------------------------------------------------------------- precision


@pytest.fixture
def switches():
    """The two switches of TF32, which are put back afterwards."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


def test_fp32_is_true_float32_and_tf32_is_not(switches):
    cuda = torch.device("cuda")
    for _ in range(2):  # from whatever stood before
        assert processes.pick_precision("tf32", cuda) == torch.float32 and switches() == (True, True)
        assert processes.pick_precision("fp32", cuda) == torch.float32 and switches() == (False, False)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        assert processes.pick_precision(name, torch.device("cpu")) == dtype


def test_tf32_is_refused_on_a_cpu_before_anything_is_made(tmp_path):
    with pytest.raises(UserError, match="tf32.*fp32 on cpu"):
        processes.pick_precision("tf32", torch.device("cpu"))
    for script in (pretrain, finetune):
        done = call(script, "--device", "cpu", "--precision", "tf32", place=tmp_path)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--precision tf32" in done.stderr
    assert not list(tmp_path.iterdir())


def test_auto_is_a_format_that_the_hardware_multiplies(monkeypatch):
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", mock.Mock(return_value=supported))
        assert processes.pick_precision("auto", torch.device("cpu")) == expected
    for supported, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", mock.Mock(return_value=supported))
        assert processes.pick_precision("auto", torch.device("cuda")) == expected


def test_products_are_in_the_precision_asked_for_and_float32_is_left_alone():
    a = torch.ones(2, 2)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with processes.autocast(torch.device("cpu"), dtype):
            assert (a @ a).dtype == dtype
