import random
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from conftest import ROOT, call

import finetune
import pretrain
from plumbing import fitting, processes, runs
from plumbing.cli import UserError

CPU = torch.device("cpu")
BATCH = 3, 4  # inputs of one process's batch norm

# ---------------------------------------------------------------- two processes


def normalise(norm, x, pull):
    """-> outputs, gradients of inputs, weight and bias. The loss is (outputs * pull).sum()."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * pull).sum().backward()
    return y.detach(), x.grad, norm.weight.grad, norm.bias.grad


def make_norm(kind):
    torch.manual_seed(0)
    norm = kind(BATCH[1])
    torch.nn.init.normal_(norm.weight)
    return norm


def raised(function, *args):
    """What a function raises, UserError or SystemExit."""
    with pytest.raises((UserError, SystemExit)) as error:
        function(*args)
    return error.type.__name__, str(error.value)


def exchange(inputs, pull, folder):
    """What each of two processes does -> {name: what it got}."""
    rank = processes.rank_and_world()[0]
    results = {"rank and world": processes.rank_and_world(),
               "from all": processes.from_all(f"of {rank}"),
               "sum": processes.sum_over_all(torch.tensor([1.0, rank])),
               "stops": [processes.agree(stopped) for stopped in (
                   [], [143] if rank else [], [130] if rank == 0 else [], [143 - 13 * rank])]}

    x = torch.full((2,), 3.0 + rank, requires_grad=True)
    gathered = processes.gather(x)
    ((1 + rank) * gathered[::2] * torch.tensor([1.0, 10.0])).sum().backward()
    results["gathered"], results["gradient"] = gathered.detach(), x.grad

    norm = make_norm(processes.BatchNorm)
    outputs = normalise(norm, inputs.chunk(2)[rank], pull.chunk(2)[rank])
    results["norm"] = *outputs, norm.running_mean, norm.running_var
    norm.eval()
    if rank == 0:  # no exchange: rank 1 does not call it
        results["norm in eval mode"] = norm(inputs[:1]).detach()

    calls = []
    results["by first"] = processes.by_first(lambda: calls.append(rank) or "result"), calls
    results["error of first"] = raised(processes.by_first, Mock(side_effect=UserError("a line")))

    new = SimpleNamespace(out=str(folder / "new"), resume=False)
    runs.check_folder(new)
    old = SimpleNamespace(out=str(folder / "old"), resume=False)
    results["folder in use"] = raised(runs.check_folder, old)
    job = {"TORCHELASTIC_RUN_ID": "job-7"} if rank else {}  # only one machine sees config.json
    with patch.dict("os.environ", job):
        runs.check_folder(old)
    results["resume"] = new.resume, old.resume

    with patch.object(runs, "restore", lambda *_: 3 * rank):
        results["other first step"] = raised(runs.begin, old, None, None, None, {}, 9)

    config = SimpleNamespace(micro_batch=0, compile=False, activation_checkpointing=False)
    with patch.object(fitting, "largest_micro_batch", lambda *_: 8 >> rank):
        fitting.fit_to_device(config, SimpleNamespace(backbone=Mock()), 16, CPU, Mock())
    results["micro-batch"] = config.micro_batch
    return results


@pytest.fixture(scope="module")
def two(in_two_processes, tmp_path_factory):
    """-> inputs and pull of the batch norm, then what each of two processes got."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "old").mkdir()
    (folder / "old/last.pt").touch()
    (folder / "old/config.json").write_text('{"torchrun_job": "job-7"}')
    torch.manual_seed(1)
    inputs, pull = torch.randn(2, 2 * BATCH[0], BATCH[1]) + 3
    return inputs, pull, *in_two_processes(exchange, inputs, pull, folder)


def test_all_processes_get_what_they_exchange(two):
    for rank, results in enumerate(two[2:]):
        assert results["rank and world"] == (rank, 2)
        assert results["from all"] == ["of 0", "of 1"]
        assert results["sum"].tolist() == [2, 1]
        assert results["gathered"].tolist() == [3, 3, 4, 4]
        # summed over the processes: 1 + 2 times the weight of an element, 1 and 10
        assert results["gradient"].tolist() == [[3, 0], [30, 0]][rank]


def test_all_processes_stop_with_the_same_code_where_one_is_asked_to(two):
    for results in two[2:]:
        assert results["stops"] == [0, 143, 130, 143]


def test_the_first_process_works_for_all_and_all_end_with_its_error(two):
    first, second = two[2:]
    assert first["by first"] == ("result", [0]) and second["by first"] == (None, [])
    assert first["error of first"] == ("UserError", "a line")
    assert second["error of first"] == ("SystemExit", "2")


def test_all_processes_refuse_a_folder_in_use_or_continue_its_run(two):
    first, second = two[2:]
    assert first["folder in use"][0] == "UserError" and "holds a run" in first["folder in use"][1]
    assert second["folder in use"] == ("SystemExit", "2")
    for results in (first, second):
        assert results["resume"] == (False, True)


def test_machines_that_do_not_share_the_folder_are_refused(two):
    for results in two[2:]:
        kind, text = results["other first step"]
        assert kind == "UserError" and text.endswith("must be storage that all machines share")


def test_all_processes_take_a_micro_batch_that_fits_each_gpu(two):
    for results in two[2:]:
        assert results["micro-batch"] == 4


def test_a_batch_norm_over_two_processes_is_that_of_one_batch(two):
    """Outputs, gradients of inputs and weights, and the running statistics."""
    norm = make_norm(torch.nn.BatchNorm1d)
    y, x, weight, bias = normalise(norm, *two[:2])
    halves = [results["norm"] for results in two[2:]]
    for i, whole in enumerate((y, x)):
        assert torch.allclose(torch.cat([half[i] for half in halves]), whole, atol=1e-5)
    for i, whole in ((2, weight), (3, bias)):
        assert torch.allclose(sum(half[i] for half in halves), whole, atol=1e-5)
    for half in halves:
        assert torch.allclose(half[4], norm.running_mean)
        assert torch.allclose(half[5], norm.running_var)
    assert torch.allclose(two[2]["norm in eval mode"], norm.eval()(two[0][:1]))


# ---------------------------------------------------------------- one process


def test_a_single_process_needs_no_group(capsys):
    x = torch.ones(2, 3)
    assert processes.rank_and_world() == (0, 1) and processes.from_all(7) == [7]
    assert processes.gather(x) is x and processes.sum_over_all(x) is x
    assert processes.agree([]) == 0 and processes.agree([130]) == 130
    assert processes.by_first(lambda: 3) == 3
    processes.say("a line")
    processes.wait_for_all()
    processes.leave_group()
    assert capsys.readouterr().out == "a line\n"


def test_more_processes_than_gpus_are_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    done = call(pretrain, "--gpus", 2, "--device", "cuda", place=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--gpus 2: this machine has 1" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tasks, rank, refused", [
    ("2", None, True), ("2", "0", False), ("1", None, False), (None, None, False)])
def test_srun_without_torchrun_is_refused(monkeypatch, tasks, rank, refused):
    """Each of its processes would start a run of its own."""
    for name, value in (("SLURM_STEP_NUM_TASKS", tasks), ("RANK", rank)):
        if value:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="srun") if refused else nullcontext():
        processes.launch(gpus=1)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: this machine has no GPU"):
        processes.pick_device("cuda")


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
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE,
                              text=True)
    assert parent.stdout.readline() == "at work\n"
    parent.kill()
    # the output ends when the last process that can write to it has ended
    assert parent.communicate(timeout=60)[0] == ""


# ---------------------------------------------------------------- seeds


def test_seeds_repeat_and_differ_by_every_number():
    def draw(*numbers):
        processes.seed_all(*numbers)
        return torch.rand(3).tolist(), np.random.rand(), random.random()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    numbers = ((0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 1), (0, 1, 0), (0,), (0, 0),
               (0, 0, 0))
    draws = [draw(*each) for each in numbers]
    for values in zip(*draws):
        assert len({str(value) for value in values}) == len(numbers)


def test_a_zero_at_the_end_gives_another_seed():
    """numpy's SeedSequence takes (1, 2) and (1, 2, 0) for the same."""
    assert processes.one_seed(1, 2) != processes.one_seed(1, 2, 0)
    seeds = {processes.one_seed(seed, step, *rest)
             for seed in range(4) for step in range(50) for rest in ((), (0,), (1,))}
    assert len(seeds) == 4 * 50 * 3


# ---------------------------------------------------------------- precision


@pytest.fixture
def tf32():
    """-> a function that returns the two switches of TF32, which are reset afterwards."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    yield lambda: [backend.allow_tf32 for backend in backends]
    for backend, value in zip(backends, before):
        backend.allow_tf32 = value


def test_only_tf32_multiplies_in_tf32(tf32):
    cuda = torch.device("cuda")
    for _ in range(2):  # whatever was set before
        assert processes.pick_precision("tf32", cuda) == "tf32" and tf32() == [True, True]
        assert processes.pick_precision("fp32", cuda) == "fp32" and tf32() == [False, False]


def test_a_precision_that_is_asked_for_is_used():
    for name in ("bf16", "fp16", "fp32"):
        assert processes.pick_precision(name, CPU) == name


@pytest.mark.parametrize("script", [pretrain, finetune])
def test_tf32_is_refused_on_a_cpu_before_anything_is_made(tmp_path, script):
    done = call(script, "--device", "cpu", "--precision", "tf32", "--data", "nowhere",
                place=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--precision tf32 is for NVIDIA GPUs: use fp32 on cpu" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device, module, function, supported, expected", [
    ("cpu", torch.cpu, "_is_avx512_bf16_supported", True, "bf16"),
    ("cpu", torch.cpu, "_is_avx512_bf16_supported", False, "fp32"),
    ("cuda", torch.cuda, "is_bf16_supported", True, "bf16"),
    ("cuda", torch.cuda, "is_bf16_supported", False, "fp16"),
    ("mps", torch.cpu, "_is_avx512_bf16_supported", True, "fp32")])
def test_auto_is_a_format_that_the_hardware_multiplies(monkeypatch, tf32, device, module, function,
                                                       supported, expected):
    monkeypatch.setattr(module, function, Mock(return_value=supported))
    assert processes.pick_precision("auto", torch.device(device)) == expected


@pytest.mark.parametrize("name, dtype", [
    ("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_products_have_the_precision_asked_for(name, dtype):
    a = torch.ones(2, 2)
    with processes.autocast(CPU, name):
        assert (a @ a).dtype == dtype
