import importlib
import io
import os
import re
import signal
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
    resume: bool = option(False, "continue", group="running")
    size: int = option(16, "pixels", multiple=8)
    epochs: float = option(9.0, "passes", above=0, most=100)
    grad_clip: float = option(1.0, "largest gradient norm, 100% of it")
    videos: tuple = option((), "files", group="input")
    out: str = option("", "folder (default: runs/PRESET)")

    def __post_init__(self):
        self.out = self.out or f"runs/{self.preset}"
        if self.lr > 99:
            raise UserError(f"--lr {self.lr} is too high")


PRESETS = {"slow": {}, "fast": dict(lr=1.0, steps=1)}


def parse(*argv):
    return cli.parse(Example, list(argv), "text", PRESETS)


def expected(*values):
    return Example(*values, videos=[])


def test_flags_override_presets_and_presets_override_defaults():
    assert parse() == expected()
    assert parse("--preset", "fast", "--steps", "3", "--resume", "--d-max", "2") == expected(
        "fast", 1.0, 3, 2.0, True)
    assert parse("--preset=fast") == expected("fast", 1.0, 1)
    assert parse("--resume", "--no-resume") == expected()
    assert parse("--videos", "a", "b", "--videos", "c").videos == ["a", "b", "c"]


def test_epochs_override_the_steps_of_a_preset():
    assert parse("--preset", "fast", "--epochs=3").steps == 0
    assert parse("--epochs", "3", "--steps", "2").steps == 2


@pytest.mark.parametrize("argv, message", [
    (["--steps", "many"], "many"), (["--steps", "-1"], "--steps must be at least 0, not -1"),
    (["--steps", "-1" + 400 * "0"], "--steps must be at least 0"),
    (["--lr", "nan"], "--lr must be a number, not nan"), (["--lr", "inf"], "--lr"),
    (["--lr", "100"], "--lr 100.0 is too high"),
    (["--epochs", "0"], "--epochs must be above 0, not 0.0"),
    (["--epochs", "101"], "--epochs must be at most 100, not 101.0"),
    (["--size", "20"], "--size must be a multiple of 8, not 20"),
    (["--size", "0"], "multiple of 8, not 0"), (["--preset", "slwo"], "fast"),
    (["--step-size", "3"], "--step-size"), (["--step", "3"], "do you mean --steps?"),
    (["--rseume"], "do you mean --resume?"), (["--no-resum"], "--no-resume?"),
    (["--clip", "3"], "--clip 3 (it is now called --grad-clip)"),
    (["--clip=3"], "(it is now called --grad-clip)"),
    (["film.mp4"], "arguments: film.mp4"), (["--", "x"], "unrecognized arguments: "),
    ([""], "arguments: ''"), (["--x\ny\x1b[31m"], r"--x\ny\x1b[31m")])
def test_a_wrong_value_ends_with_one_line_and_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize("renamed", ["--few", "--recompute"])
def test_a_renamed_flag_names_the_new_one_only_where_the_script_has_it(renamed, capsys):
    with pytest.raises(SystemExit):
        parse(renamed)
    assert "now called" not in capsys.readouterr().err


@pytest.mark.parametrize("argv, new", [
    (["pretrain", "--clip", "1"], "--grad-clip"), (["finetune", "--few", "9"], "--num-labels"),
    (["pretrain", "--recompute"], "--activation-checkpointing"),
    (["finetune", "--recompute"], "--activation-checkpointing")])
def test_every_renamed_flag_is_refused_with_its_new_name(argv, new, tmp_path):
    script, *argv = argv
    done = call(importlib.import_module(script), *argv, place=tmp_path)
    assert done.returncode == 2 and f"(it is now called {new})" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_user_error_is_one_line_and_other_errors_keep_their_traceback(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/pretrain.py"])
    in_loader = "Caught UserError in a worker process\n  File ...\nplumbing.cli.UserError: a.bin\n"
    for text, line in (("--lr -1: it is positive", "--lr -1: it is positive"),
                       (in_loader, "a.bin"), ("a\nb\x1b", r"a\nb\x1b")):
        with pytest.raises(SystemExit) as stop:
            cli.run(mock.Mock(side_effect=UserError(text)))
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"pretrain.py: {line}\n"
    for error in (ValueError, FileNotFoundError):
        with pytest.raises(error, match="a bug"):
            cli.run(mock.Mock(side_effect=error("a bug")))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_script_prints_one_line_and_exits_with_the_code_of_shells(number):
    """Also while a thread still computes."""
    code = """
import threading, time
from plumbing.cli import run
def main():
    threading.Thread(target=time.sleep, args=(600,)).start()
    print("running", flush=True)
    time.sleep(600)
run(main)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == f"-c: stopped by {number.name}\n"
    assert process.returncode == 128 + number


@pytest.mark.parametrize("script, argv, flag", [
    ("pretrain", [], "--d-max"), ("pretrain", ["--preset", "large"], "--d-max"),
    ("finetune", [], "--eval-only"), ("finetune", ["--dataset", "ssv2"], "--eval-only"),
    ("toy", [], "--seed"), ("vqvae", [], "vqvae.py tokenize"), ("vqvae", ["train"], "--codes"),
    ("vqvae", ["tokenize"], "--views"), ("throughput", [], "--reference"),
    ("loading", [], "tokenize"), ("loading", ["store"], "--videos"),
    ("loading", ["measure"], "--store"), ("loading", ["tokenize"], "--repeat")])
def test_every_command_has_help(script, argv, flag):
    for ask in ("--help", "-h"):
        done = call(importlib.import_module(script), *argv, ask)
        assert done.returncode == 0 and flag in done.stdout and not done.stderr


def test_help_has_groups_and_one_default_for_each_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse("--preset", "fast", "--help")
    output = capsys.readouterr().out
    assert re.findall(r"^\S.*:$|(?<=^  )--[a-z]+", output, re.MULTILINE) == [
        "options:", "--preset", "--lr", "--steps", "--d", "running:", "--resume", "--size",
        "--epochs", "--grad", "input:", "--videos", "--out"]
    lines = [" ".join(line.split()) for line in output.splitlines()]
    for line in ("--lr FLOAT rate (default: 1.0)", "--d-max FLOAT a limit",
                 "--grad-clip FLOAT largest gradient norm, 100% of it (default: 1.0)",
                 "--videos FILE [FILE ...]", "--out STR folder (default: runs/fast)"):
        assert line in lines


def test_help_of_the_training_scripts_begins_with_what_differs():
    """What both scripts share comes last, under one heading."""
    for script, groups in ((pretrain, ["what to train", "model", "clips", "the two tasks",
                                       "training", "running"]),
                           (finetune, ["model and labels", "clips", "training", "running"])):
        output = call(script, "--help").stdout
        assert re.findall(r"^([a-z ]+):\n  -", output, re.MULTILINE)[1:] == groups


def defaults(module, *argv):
    """The values that --help shows -> {flag: text}."""
    with mock.patch.dict(os.environ, COLUMNS="1000"):  # no help text is broken over two lines
        output = call(module, *argv, "--help").stdout
    pattern = r"^  --([a-z-]+)[^\n]*(?:\n {20,}[^\n]*)?\(default: ([^)]*)\)$"
    return dict(re.findall(pattern, output, re.MULTILINE))


@pytest.mark.parametrize("script, argv, expected", [
    (pretrain, [], {"lr": "0.004", "layers": "3", "preset": "toy", "out": "runs/toy"}),
    (pretrain, ["--preset", "small"], {"lr": "0.001", "layers": "6", "preset": "small"}),
    (pretrain, ["--preset=large"], {"lr": "0.0003", "layers": "24"}),
    (finetune, [], {"epochs": "12.0", "out": "runs/finetune-motion"}),
    (finetune, ["--dataset", "ucf101"], {
        "split": "1", "data": "tokens/ucf101", "epochs": "50.0",
        "lr": "by the model's width"})])
def test_help_shows_the_values_in_force(script, argv, expected):
    assert expected.items() <= defaults(script, *argv).items()


@pytest.mark.parametrize("config, wrong", [
    (pretrain.Config, [
        "--steps -3", "--epochs -1", "--warmup 2", "--grad-clip 0", "--weight-decay -1", "--lr -1",
        "--lr nan", "--gamma 0", "--alpha -1", "--alpha inf", "--d-max -1", "--blocks 1000000",
        "--projection-layers 0", "--projection-hidden 0", "--tokenizer-steps 0", "--codes 1",
        "--batch 0", "--fps 1e9", "--fps -1", "--workers 1000", "--workers -1", "--seed -1",
        "--dim 1000000", "--frame-size 8000", "--frame-size 12", "--mask-ratio 1",
        "--stop-after -1", "--min-stride 0", "--micro-batch -1", "--gpus 0", "--save-every 0",
        "--dropout 1"]),
    (finetune.Config, [
        "--scratch-epochs 0", "--clips 0", "--split 4", "--fps -1", "--num-labels -1",
        "--epochs -2", "--precision int8"]),
    (vqvae.TrainConfig, [
        "--codes 0", "--steps 0", "--fps nan", "--lr -1", "--device tpu", "--batch 0"]),
    (vqvae.TokenizeConfig, ["--workers -1", "--fps -1", "--fps 1e-400x", "--frame-size 0"])])
def test_a_value_out_of_its_range_ends_with_one_line(config, wrong, capsys):
    for argv in map(str.split, wrong):
        with pytest.raises(SystemExit) as stop:
            cli.parse(config, argv, "text")
        errors = capsys.readouterr().err
        assert stop.value.code == 2 and argv[0] in errors and len(errors.splitlines()) == 1, argv


@pytest.mark.parametrize("argv, message", [
    ([], "vqvae.py --help lists them"), (["tokenise"], "do you mean vqvae.py tokenize?"),
    (["--codes", "5"], "vqvae.py --help lists them"),
    (["train", "--codes", "many"], "vqvae.py train: ")])
def test_a_script_of_several_commands_asks_for_one(argv, message):
    done = call(vqvae, *argv)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr


def test_a_file_name_of_any_bytes_is_printed():
    code = "from plumbing.cli import run; run(lambda: print('runs/caf\\udce9'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert (done.returncode, done.stdout) == (0, "runs/caf\\udce9\n"), done.stderr


def test_progress_without_a_terminal_is_lines_of_the_first_process_alone(monkeypatch):
    for show in (True, False):
        stderr = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stderr)
        assert list(cli.progress(range(3), "working", 3, " things", show)) == [0, 1, 2]
        lines = stderr.getvalue().splitlines()
        assert all(line.strip() for line in lines) and "\r" not in stderr.getvalue()
        assert ("working" in lines[-1] and "3/3" in lines[-1]) if show else not lines


def test_versions_say_what_a_bug_report_needs():
    done = subprocess.run([sys.executable, "-m", "plumbing.versions"], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    for word in ("torch 2.", "ffmpeg", "cores", "GB of memory", "GPU"):
        assert word in done.stdout
