from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from plumbing.cli import UserError
from plumbing.fitting import fit_to_device, largest_micro_batch

CPU, GPU = torch.device("cpu"), SimpleNamespace(type="cuda")


class Attempt:
    """Both passes of so many videos on a GPU that holds at most `fit` of them."""

    def __init__(self, fit):
        self.fit, self.tried, self.model = fit, [], torch.nn.Linear(2, 2)

    def __call__(self, videos):
        self.tried.append(videos)
        self.model(torch.ones(videos, 2)).sum().backward()
        if videos > self.fit:
            raise torch.OutOfMemoryError


@pytest.fixture
def reserved(monkeypatch):
    """Fakes a GPU -> the sizes of the tensors that are made on it."""
    sizes, empty = [], torch.empty

    def watched_empty(size, device=None, **kwargs):
        if device is not GPU:
            return empty(size, device=device, **kwargs)
        sizes.append(size)
        return empty(size, **kwargs)

    monkeypatch.setattr(torch, "empty", watched_empty)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return sizes


@pytest.mark.parametrize("fit, most, largest, tried", [
    (66, 128, 64, [1, 2, 4, 8, 16, 32, 64, 128]), (999, 64, 64, [1, 2, 4, 8, 16, 32, 64]),
    (999, 20, 20, [1, 2, 4, 8, 16, 20]), (19, 20, 16, [1, 2, 4, 8, 16, 20]),
    (5, 4, 4, [1, 2, 4]), (1, 8, 1, [1, 2]), (9, 1, 1, [1])])
def test_the_largest_micro_batch_that_fits_a_gpu(reserved, capsys, fit, most, largest, tried):
    """Beside AdamW's moments and the buckets of DistributedDataParallel. No gradient is left."""
    attempt = Attempt(fit)
    assert largest_micro_batch(attempt, most, attempt.model, GPU) == largest
    assert attempt.tried == tried and reserved == [3 * 6]
    assert all(p.grad is None for p in attempt.model.parameters())
    assert f"--micro-batch {largest}" in capsys.readouterr().out


def test_a_gpu_that_not_one_video_fits_is_an_error_of_one_line(reserved):
    attempt = Attempt(fit=0)
    with pytest.raises(UserError, match="--activation-checkpointing, or a smaller model or clip"):
        largest_micro_batch(attempt, 8, attempt.model, GPU)
    assert attempt.tried == [1]


def test_other_errors_keep_their_traceback(reserved):
    def attempt(videos):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        largest_micro_batch(attempt, 8, torch.nn.Linear(2, 2), GPU)


@pytest.mark.parametrize("most, expected", [(128, 4), (3, 3)])
def test_a_cpu_takes_a_few_videos_at_a_time_without_trying(most, expected):
    assert largest_micro_batch(None, most, torch.nn.Linear(2, 2), CPU) == expected


@pytest.mark.parametrize("compile, device, compiled", [
    (None, CPU, False), (None, GPU, True), (True, CPU, True), (False, GPU, False)])
def test_layers_are_compiled_on_gpus_unless_a_flag_says_otherwise(compile, device, compiled):
    backbone = Mock()
    config = SimpleNamespace(micro_batch=3, compile=compile, activation_checkpointing=True)
    fit_to_device(config, SimpleNamespace(backbone=backbone), 8, device, None)
    assert backbone.compile_layers.called == config.compile == compiled
    assert backbone.activation_checkpointing is True


@pytest.mark.parametrize("flag, most, expected", [(3, 8, 3), (0, 8, 4), (32, 8, 8)])
def test_a_micro_batch_is_that_of_the_flag_and_at_most_all_videos(flag, most, expected):
    config = SimpleNamespace(micro_batch=flag, compile=False, activation_checkpointing=False)
    fit_to_device(config, Mock(), most, CPU, Mock())
    assert config.micro_batch == expected


def test_a_micro_batch_is_tried_out_by_the_script(reserved):
    """Its function is called with the settings, the model, the device and the number of videos."""
    config = SimpleNamespace(micro_batch=0, compile=False, activation_checkpointing=False)
    model, calls = torch.nn.Linear(2, 2), []
    model.backbone = SimpleNamespace()
    fit_to_device(config, model, 2, GPU, lambda *args: calls.append(args))
    assert calls == [(config, model, GPU, videos) for videos in (1, 2)]
    assert config.micro_batch == 2
