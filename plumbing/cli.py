"""A configuration dataclass -> flags with help, ranges, errors of one line; and progress bars."""
import argparse
import difflib
import math
import operator
import os
import shlex
import signal
import sys
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import UnionType
from typing import get_args

from tqdm import tqdm


class UserError(ValueError):
    """What the user can mend. Its text is one line that says what is wrong and what would be right."""


def run(main):
    """Calls a script's main. A UserError ends with its line and exit code 2, Ctrl-C and SIGTERM with a line and the
    code that shells give them; anything else with its traceback."""
    def terminate(*_):
        raise KeyboardInterrupt(signal.SIGTERM)  # so that what is half written is removed

    signal.signal(signal.SIGTERM, terminate)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes, a terminal ASCII
    try:
        main()
    except UserError as error:
        line = str(error).rpartition("plumbing.cli.UserError: ")[2]  # behind a loader process's traceback
        print(f"{Path(sys.argv[0]).name}: {visible(line.strip())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_IGN)
        number = error.args[0] if error.args else signal.SIGINT
        print(f"{Path(sys.argv[0]).name}: stopped by {number.name}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(128 + number)  # at once: a thread that computes while Python ends would abort it


def visible(text):
    """A text as one line: what cannot be printed is written as Python writes it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def option(default, help, choices=None, **limits):
    """A field of a configuration dataclass that becomes a flag with a line of help. limits: least and most, its
    smallest and largest value; above, which it is larger than; multiple, what it is a multiple of."""
    return field(default=default, metadata={"help": help, "choices": choices, "limits": limits})


def check_ranges(config_class, values):
    """Raises UserError, naming the flag, for a value out of its field's range."""
    for f in fields(config_class):
        value, limits = values[f.name], f.metadata["limits"]
        if value is None or isinstance(value, (str, tuple, list)):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag(f)} must be a number, not {value}")
        multiple = limits.get("multiple", 1)
        if "multiple" in limits and (value < multiple or value % multiple):
            raise UserError(f"{flag(f)} must be a multiple of {multiple}, not {value}")
        for kind, wrong, words in (("least", operator.lt, "at least"), ("above", operator.le, "above"),
                                   ("most", operator.gt, "at most")):
            if kind in limits and wrong(value, limits[kind]):
                raise UserError(f"{flag(f)} must be {words} {limits[kind]}, not {value}")


def flag(f):
    return "--" + f.name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, no usage: with fifty flags the usage would hide what was wrong."""
        print(f"{Path(self.prog).name}: {visible(str(message))}", file=sys.stderr)
        sys.exit(2)


def parse(config_class, argv, description, presets=None, chosen_by="preset", prog=None):
    """The command line as a configuration: every field is a flag, underscores written as dashes.

    presets: {name: {field: value}}, chosen by the flag of the field `chosen_by`; flags given beside it win. --help
    shows the values in force: those of the preset, and those that the configuration itself fills in.
    A UserError from the configuration's __post_init__ ends like any wrong value: one line, exit code 2.
    """
    chosen = {}
    if presets:
        early = Parser(prog, add_help=False, allow_abbrev=False)
        early.add_argument("--" + chosen_by, choices=list(presets), default=getattr(config_class, chosen_by))
        name = getattr(early.parse_known_args(argv)[0], chosen_by)
        chosen = {chosen_by: name, **presets[name]}
    given = {part.split("=")[0] for part in argv}
    if "--epochs" in given and "--steps" not in given:
        chosen["steps"] = 0  # a preset's steps give way
    in_force = config_class(**chosen)
    parser = Parser(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    own = config_class.__annotations__
    for f in sorted(fields(config_class), key=lambda f: f.name not in own):  # inherited ones last
        assert f.default is not MISSING, f"{f.name} needs a default"
        value, text = getattr(in_force, f.name), f.metadata["help"].replace("%", "%%")
        text += "" if value in (None, "", ()) else f" (default: {value})"
        kind = next(k for k in get_args(f.type) if k is not type(None)) if isinstance(f.type, UnionType) else f.type
        if kind is bool:
            parser.add_argument(flag(f), action=argparse.BooleanOptionalAction, default=f.default, help=text)
        elif kind is tuple:
            parser.add_argument(flag(f), nargs="+", action="extend", default=[], help=text, metavar="FILE")
        else:
            parser.add_argument(flag(f), type=kind, default=f.default, choices=f.metadata["choices"], help=text,
                                metavar=None if f.metadata["choices"] else kind.__name__.upper())
    parser.set_defaults(**chosen)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [flag(f) for f in fields(config_class)] + [f"--no{flag(f)[1:]}" for f in fields(config_class)
                                                           if f.type is bool]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, 1) if unknown[0] != "--" else ()
        parser.error(f"unrecognized arguments: {shlex.join(unknown)}{f' (do you mean {near[0]}?)' if near else ''}")
    try:
        check_ranges(config_class, vars(args))
        return config_class(**vars(args))
    except UserError as error:
        parser.error(error)


def parse_command(config_classes, description):
    """The command line of a script with several commands, {name: configuration class} -> name, configuration."""
    script, asked = Path(sys.argv[0]).name, sys.argv[1] if len(sys.argv) > 1 else ""
    if asked not in config_classes and {"-h", "--help"} & {*sys.argv}:
        sys.exit(print(description))
    if asked not in config_classes:
        near = difflib.get_close_matches(asked, config_classes, 1)
        raise UserError(f"do you mean {script} {near[0]}?" if near else
                        f"say what to do: {' or '.join(f'{script} {name}' for name in config_classes)} "
                        f"(--help shows all, after one of them its flags)")
    return asked, parse(config_classes[asked], sys.argv[2:], description, prog=f"{script} {asked}")


class _Lines:
    """A file for tqdm that prints each state of the bar as a line of its own, where no terminal redraws it."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        sys.stderr.flush()


def progress(iterable=None, text="", total=None, unit="it", show=True):
    """A tqdm bar on a terminal, a line every ten seconds elsewhere."""
    lines = dict(file=_Lines(), mininterval=10, maxinterval=60, ascii=True, ncols=100)
    how = dict(dynamic_ncols=True) if sys.stderr.isatty() else lines
    return tqdm(iterable, text, total, unit=unit, disable=not show, **how)
