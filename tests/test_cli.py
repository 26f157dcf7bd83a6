import importlib
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from unittest import mock

import pytest
from conftest import ROOT, call

import finetune
import pretrain
import vqvae
from plumbing import cli
from plumbing.cli import UserError, option


@dataclass
class Example:
    preset: str = option("slow", "which", choices=["slow", "fast"])
    lr: float = option(0.1, "rate")
    steps: int = option(5, "how many", least=0)
    d_max: float | None = option(None, "a limit")
    resume: bool = option(False, "go on")
    size: int = option(16, "pixels", multiple=8)
    epochs: float = option(9.0, "passes")


PRESETS = {"slow": {}, "fast": dict(lr=1.0, steps=1)}


def parse(*argv):
    return cli.parse(Example, list(argv), "text", PRESETS)


def test_flags_win_over_presets_and_presets_over_defaults():
    assert parse() == Example()
    assert parse("--preset", "fast", "--steps", "3", "--resume", "--d-max", "2") == Example("fast", 1.0, 3, 2.0, True)
    assert parse("--resume", "--no-resume") == Example()
    assert parse("--preset", "fast", "--epochs=3").steps == 0 and parse("--epochs", "3", "--steps", "2").steps == 2


@pytest.mark.parametrize("argv, said", [
    (["--steps", "many"], "many"), (["--steps", "-1"], "--steps must be at least 0, not -1"),
    (["--lr", "nan"], "--lr must be a number"), (["--lr", "inf"], "--lr"),
    (["--preset", "slwo"], "fast"), (["--step-size", "3"], "--step-size"), (["--step", "3"], "do you mean --steps?"),
    (["--rseume"], "do you mean --resume?"), (["--no-resum"], "--no-resume?"), (["film.mp4"], "arguments: film.mp4"),
    (["--", "x"], "unrecognized arguments: "), ([""], "arguments: ''"), (["--x\ny\x1b[31m"], r"--x\ny\x1b[31m"),
    (["--steps", "-1" + 400 * "0"], "--steps must be at least 0"),
    (["--size", "20"], "multiple of 8, not 20"), (["--size", "0"], "multiple of 8, not 0")])
def test_a_wrong_value_ends_with_one_line_and_code_2(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and said in lines[0]


def test_what_the_user_can_mend_ends_in_one_line_and_what_he_cannot_keeps_its_traceback(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/pretrain.py"])
    with pytest.raises(SystemExit) as stop:
        cli.run(mock.Mock(side_effect=UserError("--lr -1: it is positive")))
    assert stop.value.code == 2 and capsys.readouterr().err == "pretrain.py: --lr -1: it is positive\n"
    behind = UserError("Caught UserError in a worker process\n  File ...\nplumbing.cli.UserError: a.bin ends\n")
    with pytest.raises(SystemExit):
        cli.run(mock.Mock(side_effect=behind))
    assert capsys.readouterr().err == "pretrain.py: a.bin ends\n"
    for error in (ValueError, FileNotFoundError):
        with pytest.raises(error, match="a bug"):
            cli.run(mock.Mock(side_effect=error("a bug")))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("script, argv, flag", [
    ("pretrain", [], "--d-max"), ("pretrain", ["--preset", "large"], "--d-max"), ("finetune", [], "--eval-only"),
    ("finetune", ["--dataset", "ssv2"], "--eval-only"), ("toy", [], "--seed"), ("vqvae", [], "vqvae.py tokenize"),
    ("vqvae", ["train"], "--codes"), ("vqvae", ["tokenize"], "--views"), ("throughput", [], "--reference"),
    ("loading", [], "tokenize"), ("loading", ["store"], "--videos"), ("loading", ["measure"], "--store"),
    ("loading", ["tokenize"], "--repeat")])
def test_help_of_every_command_is_shown(script, argv, flag):
    for asked in ("--help", "-h"):
        done = call(importlib.import_module(script), *argv, asked)
        assert done.returncode == 0 and flag in done.stdout and not done.stderr


def shown(module, *argv):
    """The values that --help shows -> {flag: text}."""
    with mock.patch.dict(os.environ, COLUMNS="1000"):  # no value is broken over two lines
        text = " ".join(call(module, *argv, "--help").stdout.split())
    return dict(re.findall(r" --([a-z-]+)(?:(?! --[a-z]).)*?\(default: ([^)]*)\)", text))


def test_help_shows_the_values_in_force():
    assert {"lr": "0.004", "layers": "3", "preset": "toy"}.items() <= shown(pretrain).items()
    assert {"lr": "0.001", "layers": "6", "preset": "small"}.items() <= shown(pretrain, "--preset", "small").items()
    assert {"lr": "0.0003", "layers": "24"}.items() <= shown(pretrain, "--preset=large").items()
    assert {"lr": "0.001", "out": "runs/finetune-motion"}.items() <= shown(finetune).items()
    assert {"split": "1", "data": "tokens/ucf101", "epochs": "50.0"}.items() <= shown(finetune, "--dataset",
                                                                                      "ucf101").items()
    assert "lr" not in shown(finetune, "--dataset", "ucf101")  # it depends on the checkpoint


WRONG = {"pretrain": ["--steps -3", "--epochs -1", "--warmup 2", "--clip 0", "--weight-decay -1", "--lr -1",
                      "--lr nan", "--gamma 0", "--alpha -1", "--alpha inf", "--d-max -1", "--blocks 1000000",
                      "--projection-layers 0", "--projection-hidden 0", "--tokenizer-steps 0", "--codes 1", "--batch 0",
                      "--fps 1e9", "--fps -1",
                      "--workers 1000", "--workers -1", "--seed -1", "--dim 1000000", "--frame-size 8000",
                      "--frame-size 12", "--mask-ratio 1", "--stop-after -1", "--min-stride 0"],
         "finetune": ["--scratch-epochs 0", "--clips 0", "--split 4", "--fps 0", "--few -1", "--epochs -2"],
         "vqvae train": ["--codes 0", "--steps 0", "--fps nan", "--lr -1", "--device tpu", "--batch 0"],
         "vqvae tokenize": ["--workers -1", "--fps -1", "--fps 1e-400x", "--frame-size 0"]}


@pytest.mark.parametrize("script, flag", [(script, flag) for script, flags in WRONG.items() for flag in flags])
def test_a_value_out_of_its_range_ends_with_one_line(script, flag, tmp_path):
    name, *command = script.split()
    done = call(importlib.import_module(name), *command, *flag.split(), place=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert flag.split()[0] in done.stderr and not list(tmp_path.iterdir())


def test_a_script_of_several_commands_asks_for_one():
    for argv in ([], ["tokenise"], ["--codes", "5"]):
        done = call(vqvae, *argv)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "vqvae.py tokenize" in done.stderr
    done = call(vqvae, "train", "--codes", "many")
    assert done.returncode == 2 and done.stderr.startswith("vqvae.py train: ") and "many" in done.stderr


def test_a_name_of_any_bytes_is_printed():
    code = "from plumbing.cli import run; run(lambda: print('runs/caf\\udce9'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, check=False)
    assert (done.returncode, done.stdout) == (0, "runs/caf\\udce9\n"), done.stderr


def test_progress_off_a_terminal_is_lines_and_on_other_processes_nothing(monkeypatch):
    for show in (True, False):
        stderr = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stderr)
        assert list(cli.progress(range(3), "working", 3, " things", show)) == [0, 1, 2]
        lines = stderr.getvalue().splitlines()
        assert all(line.strip() for line in lines) and "\r" not in stderr.getvalue()
        assert ("working" in lines[-1] and "3/3" in lines[-1]) if show else not lines


def test_what_a_bug_report_needs():
    done = subprocess.run([sys.executable, "-m", "plumbing.versions"], cwd=ROOT, check=True, capture_output=True,
                          text=True)
    assert all(said in done.stdout for said in ("torch 2.", "ffmpeg", "cores", "GB of memory", "GPU"))
