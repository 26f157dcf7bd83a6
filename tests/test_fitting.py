from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, call, flags
from hypothesis import given
from hypothesis import strategies as st

import pretrain
from plumbing import fitting
from plumbing.cli import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GB = 10**9

# ---------------------------------------------------------------- how a batch is split


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 99))
def test_a_plan_takes_every_video_once_and_never_tears_groups_without_need(groups, group, most):
    plan = fitting.plan(groups * group, group, most)
    flat = [part for together in plan for part in together]
    assert [i for part in flat for i in range(part.start, part.stop)] == list(range(groups * group))
    assert all(part.stop - part.start <= most for part in flat)
    for together in plan:
        assert together[0].start % group == together[-1].stop % group == 0
        assert (len(together) == 1) == (group <= most)
        assert len(together) == 1 or together[-1].stop - together[0].start == group


@pytest.mark.parametrize("batch, contrast, videos, world, expected", [
    (1024, 128, 5000, 8, (1024, 128)), (64, 0, 5000, 2, (64, 64)), (32, 0, 8, 1, (8, 8)), (32, 8, 21, 2, (16, 8)),
    (1024, 128, 27, 2, (26, 26)), (4, 8, 99, 1, (4, 4))])
def test_the_batch_is_made_of_whole_groups_of_videos_that_are_there(batch, contrast, videos, world, expected):
    config = SimpleNamespace(batch=batch, contrast=contrast, alpha=1.0)
    fitting.share_out(config, videos, world)
    assert (config.batch, config.contrast) == expected


@pytest.mark.parametrize("batch, contrast, videos, world", [
    (12, 8, 99, 1), (16, 8, 99, 3), (8, 8, 1, 2), (8, 1, 99, 1)])
def test_other_batches_are_refused(batch, contrast, videos, world):
    with pytest.raises(UserError, match="--contrast"):
        fitting.share_out(SimpleNamespace(batch=batch, contrast=contrast, alpha=1.0), videos, world)


def test_without_the_contrastive_task_there_are_no_groups():
    config = SimpleNamespace(batch=12, contrast=8, alpha=0.0)
    fitting.share_out(config, 99, 1)
    assert config.batch == 12


# ---------------------------------------------------------------- what fits


def device_of(monkeypatch, gigabytes, each, start=2.0):
    """A device of so much memory, of which a step takes `start` and so much for each video -> the steps tried."""
    tried = []

    def peak(attempt, videos, device):
        tried.append(videos)
        if start + each * videos > gigabytes:
            raise torch.OutOfMemoryError
        return (start + each * videos) * GB
    monkeypatch.setattr(fitting, "peak_memory", peak)
    monkeypatch.setattr(fitting, "free_memory", lambda device: gigabytes * GB)
    return tried


@pytest.mark.parametrize("device, gigabytes, each, later, expected, tries", [
    (GPU, 80, 1.0, 0, 64, [1, 2, 4, 8, 16, 32, 64]),  # 66 of 80; all 128 would not fit
    (GPU, 80, 0.1, 0, 128, [1, 2, 4, 8, 16, 32, 64, 128]),  # all there are
    (GPU, 24, 3.0, 5, 4, [1, 2, 4]),  # 14 and 5 for later; 8 would take 26
    (GPU, 24, 30.0, 0, None, [1]), (GPU, 24, 15.0, 0, 1, [1, 2]),
    (CPU, 24, 1.0, 0, 16, [1, 2]),  # two steps tell the rest
    (CPU, 24, 0.0, 0, 128, [1, 2, 4, 8, 16, 32, 64, 128])])  # two that say nothing do not
def test_the_largest_micro_batch_that_fits(monkeypatch, device, gigabytes, each, later, expected, tries):
    tried = device_of(monkeypatch, gigabytes, each)
    if expected is None:
        with pytest.raises(UserError, match="--recompute"):
            fitting.largest(None, 128, device, later)
    else:
        videos, needed, there = fitting.largest(None, 128, device, later * GB)
        assert (videos, needed, there) == (expected, pytest.approx((2 + each * videos) * GB), gigabytes * GB)
    assert tried == tries


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("MPS backend out of memory (MPS ...)")])
def test_an_attempt_that_was_broken_off_leaves_no_gradient(tmp_path, monkeypatch, error):
    model, config = torch.nn.Linear(2, 2), SimpleNamespace(micro_batch=0, out=tmp_path, resume=False)
    monkeypatch.setattr(fitting, "free_memory", lambda device: GB)

    def attempt(videos):
        model(torch.ones(videos, 2)).sum().backward()
        if videos > 1:
            raise error
    fitting.fit(config, model, 8, CPU, attempt)
    assert config.micro_batch == 1 and all(p.grad is None for p in model.parameters())


def test_a_resumed_run_takes_as_many_at_a_time_as_before(tmp_path):
    (tmp_path / "config.json").write_text('{"micro_batch": 3}')
    for asked, expected in ((0, 3), (5, 5)):
        config = SimpleNamespace(micro_batch=asked, out=tmp_path, resume=True)
        fitting.fit(config, None, 8, CPU, None)
        assert config.micro_batch == expected


def test_a_cpu_s_peak_is_that_of_the_attempt():
    """Not that of what the process did before."""
    sizes = [400, 100, 200]  # MB
    peaks = [fitting.peak_memory(lambda megabytes: torch.ones(megabytes * 250_000).sum(), size, CPU) for size in sizes]
    assert peaks[2] - peaks[1] == pytest.approx(100e6, abs=20e6) and peaks[0] > peaks[2]
    assert fitting.free_memory(CPU) > peaks[0]


def test_it_fits_by_itself_is_said_and_written_down(workplace):
    done = call(pretrain, *flags(TINY), "--steps", 1, "--batch", 6, "--contrast", 3, "--out", "runs/fits",
                place=workplace)
    assert done.returncode == 0
    assert "toy on 1 x cpu: 6 videos at a time, 1 pass a step, groups of 3 in one pass, " in done.stdout
    assert '"micro_batch": 6' in (workplace / "runs/fits/config.json").read_text()
    done = call(pretrain, *flags(TINY), "--steps", 1, "--batch", 6, "--contrast", 3, "--micro-batch", 2, "--recompute",
                "--out", "runs/fits", place=workplace)
    assert "2 videos at a time, 4 passes a step, groups of 3 in two passes\n" in done.stdout


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("MPS backend out of memory (...)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: ...")])
@pytest.mark.parametrize("micro_batch, recompute, said", [
    (16, False, "--micro-batch 8, or --recompute"), (16, True, "--micro-batch 8$"), (1, True, "clip or model$")])
def test_out_of_memory_says_what_to_lower(error, micro_batch, recompute, said):
    with pytest.raises(UserError, match=said), \
            fitting.memory_explained(SimpleNamespace(micro_batch=micro_batch, recompute=recompute)):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="^CUDA error: an illegal memory access"), fitting.memory_explained(None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
