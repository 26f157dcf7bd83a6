"""A configuration dataclass as a command line; errors that a user can mend; progress bars."""
import argparse
import difflib
import math
import os
import shlex
import signal
import sys
from dataclasses import field, fields
from pathlib import Path
from types import UnionType
from typing import get_args

from tqdm import tqdm

RENAMED = {"--clip": "--grad-clip", "--few": "--num-labels",
           "--recompute": "--activation-checkpointing"}


class UserError(ValueError):
    """An error that the user can mend. Its text is one line: what is wrong, and what to do."""


def run(main):
    """Calls a script's main, and is the one place that prints errors.

    A UserError prints its line and exits with 2. Ctrl-C and SIGTERM print a line and exit with
    128 plus the signal's number. Any other exception keeps its traceback.
    """
    def terminate(*_):
        raise KeyboardInterrupt(signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout has none
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold any bytes
    try:
        main()
    except UserError as error:
        # raised in a loader process, the text starts with that process's traceback
        line = str(error).rpartition("plumbing.cli.UserError: ")[2]
        complain(line.strip())
        sys.exit(2)
    except KeyboardInterrupt as error:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        number = error.args[0] if error.args else signal.SIGINT
        complain(f"stopped by {number.name}")
        sys.stdout.flush()
        os._exit(128 + number)  # an ordinary exit aborts while a thread still computes


def complain(text):
    print(f"{Path(sys.argv[0]).name}: {visible(text)}", file=sys.stderr, flush=True)


def visible(text):
    """Escapes unprintable characters, so that any text fits on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---------------------------------------------------------------- flags


def option(default, help, choices=None, group=None, **limits):
    """A field of a configuration dataclass that becomes a flag.

    help: one line. group: the heading in --help for this flag and those after it. limits: `least`
    and `most`, the smallest and largest value; `above`, an excluded lower bound; `multiple`.
    """
    metadata = {"help": help, "choices": choices, "group": group, "limits": limits}
    return field(default=default, metadata=metadata)


def flag(f):
    return "--" + f.name.replace("_", "-")


def check_limits(f, value):
    """Raises UserError, naming the flag, for a value out of its field's limits."""
    if value is None or isinstance(value, (str, tuple, list)):
        return
    limits = f.metadata["limits"]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{flag(f)} must be a number, not {value}")
    multiple = limits.get("multiple", 1)
    wrong = {"multiple": value % multiple or ("multiple" in limits and value < multiple),
             "least": value < limits.get("least", value),
             "above": value <= limits.get("above", -math.inf),
             "most": value > limits.get("most", value)}
    words = {"multiple": "a multiple of", "least": "at least", "above": "above", "most": "at most"}
    for kind, limit in limits.items():
        if wrong[kind]:
            raise UserError(f"{flag(f)} must be {words[kind]} {limit}, not {value}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line without the usage, which with sixty flags would hide what is wrong."""
        print(f"{Path(self.prog).name}: {visible(str(message))}", file=sys.stderr)
        sys.exit(2)


def parse(config_class, argv, description, presets=None, chosen_by="preset", usual=None, prog=None):
    """A command line -> configuration. Every field is a flag, with dashes for underscores.

    presets: {name: {field: value}}, chosen by the flag `chosen_by`, else `usual`, else its default;
    other flags override them.
    --help shows the values in force. A UserError from __post_init__ is printed like a wrong value.
    """
    preset = {}
    if presets:
        early = Parser(prog, add_help=False, allow_abbrev=False)
        early.add_argument(f"--{chosen_by}", default=usual or getattr(config_class, chosen_by),
                           choices=list(presets))
        name = getattr(early.parse_known_args(argv)[0], chosen_by)
        preset = {chosen_by: name, **presets[name]}
    if any(argument.split("=")[0] == "--epochs" for argument in argv):
        preset["steps"] = 0  # steps of a preset would override the epochs
    parser = Parser(prog, description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, config_class, config_class(**preset))
    parser.set_defaults(**preset)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {shlex.join(unknown)}"
                     f"{suggestion(parser, unknown[0])}")
    try:
        for f in fields(config_class):
            check_limits(f, getattr(args, f.name))
        return config_class(**vars(args))
    except UserError as error:
        parser.error(error)


def suggestion(parser, unknown):
    name, flags = unknown.split("=")[0], parser._option_string_actions
    if RENAMED.get(name) in flags:
        return f" (it is now called {RENAMED[name]})"
    near = difflib.get_close_matches(name, flags, 1) if name != "--" else []
    return f" (do you mean {near[0]}?)" if near else ""


def add_flags(parser, config_class, in_force):
    """in_force: a configuration with the values that --help shows as defaults."""
    group = parser
    for f in sorted(fields(config_class), key=lambda f: f.name not in config_class.__annotations__):
        if f.metadata["group"]:  # fields that are inherited come last
            group = parser.add_argument_group(f.metadata["group"])
        value, text = getattr(in_force, f.name), f.metadata["help"].replace("%", "%%")
        if value not in (None, "", ()):
            text = f"{text.partition(' (default')[0]} (default: {value})"
        about = dict(default=f.default, help=text)
        kind = f.type
        if isinstance(kind, UnionType):  # int | None
            kind = next(k for k in get_args(kind) if k is not type(None))
        if kind is bool:
            group.add_argument(flag(f), action=argparse.BooleanOptionalAction, **about)
        elif kind is tuple:
            about["default"] = []
            group.add_argument(flag(f), nargs="+", action="extend", metavar="FILE", **about)
        else:
            choices = f.metadata["choices"]
            group.add_argument(flag(f), type=kind, choices=choices,
                               metavar=None if choices else kind.__name__.upper(), **about)


def parse_command(config_classes, description):
    """The command line of a script with commands, {name: configuration class} -> name, config."""
    script, command = Path(sys.argv[0]).name, sys.argv[1] if len(sys.argv) > 1 else ""
    if command in config_classes:
        prog = f"{script} {command}"
        return command, parse(config_classes[command], sys.argv[2:], description, prog=prog)
    if {"-h", "--help"} & {*sys.argv}:
        sys.exit(print(description))
    for near in difflib.get_close_matches(command, config_classes, 1):
        raise UserError(f"do you mean {script} {near}?")
    raise UserError(f"give a command: {script} --help lists them")


# ---------------------------------------------------------------- progress


class _Lines:
    """A file for tqdm that prints each state of the bar as a line, where no terminal redraws it."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        sys.stderr.flush()


def progress(iterable=None, text="", total=None, unit="it", show=True):
    """A tqdm bar on a terminal, a line every ten seconds elsewhere."""
    lines = dict(file=_Lines(), mininterval=10, maxinterval=60, ascii=True, ncols=100)
    style = dict(dynamic_ncols=True) if sys.stderr.isatty() else lines
    return tqdm(iterable, text, total, unit=unit, disable=not show, **style)
