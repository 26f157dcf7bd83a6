"""Files that are complete or absent, and one line for a disk that is full."""
import contextlib
import errno
import json
import os
import secrets
import shutil
from pathlib import Path

from plumbing.cli import UserError


@contextlib.contextmanager
def writing(path):
    """A context that turns errors of the disk into a UserError of one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # torch.save replaces it
            raise error.__context__ from None
        cause = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__  # torch.save raises another error while it handles the disk's
        if cause is None:
            raise
        # imageio reports a full disk as an error of ffmpeg's pipe, without a number
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or (cause.errno is None and shutil.disk_usage(Path(path).parent).free < 65536):
            raise UserError(f"the disk of {path} is full: make room and start again") from error
        if cause.errno is None:
            raise
        raise UserError(f"cannot write {path}: {os.strerror(cause.errno).lower()}") from error


def part_of(path):
    """A new name for a file that is not yet complete -> Path."""
    return Path(f"{path}.{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def whole(path):
    """A binary file to write. It replaces `path` only once it is complete, so a kill, an error or a
    full disk leaves the earlier file unchanged. Makes the folder if it is missing.

    Raises UserError if the disk is full or the file cannot be written.
    """
    part = part_of(path)
    with writing(path):
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_text(path, text):
    with whole(path) as file:
        file.write(text.encode())


def read_lines(path):
    """The records of a .jsonl file -> [dict], without damaged or incomplete lines.

    [] if there is no file.
    """
    if not Path(path).is_file():
        return []
    records = []
    for line in Path(path).read_text(errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError):  # a damaged line: the others are good
            records.append(json.loads(line) if line.endswith("\n") else None)
    return [record for record in records if isinstance(record, dict)]


def try_folder(folder):
    """Makes a folder. Raises UserError if nothing can be written into it."""
    trial = Path(folder) / f".try-{secrets.token_hex(4)}"
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            trial.write_bytes(bytes(4096))
        finally:
            trial.unlink(missing_ok=True)
