"""Files that are whole or not there, folders that one program at a time writes into, and what a full disk says."""
import contextlib
import errno
import json
import os
import secrets
import shutil
import socket
from pathlib import Path

from plumbing.cli import UserError
from plumbing.processes import rank_and_world, say

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

_locked = {}  # {folder: its open lock file}: a process that closes any descriptor of the file loses the lock


@contextlib.contextmanager
def writing(path):
    """A context in which a full disk, or a place that cannot be written, becomes a UserError of one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error
        if isinstance(error.__context__, KeyboardInterrupt):  # torch.save has it end in an error of its own
            raise error.__context__ from None
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__  # torch.save speaks of an "unexpected pos" while it handles the disk's error
        full = isinstance(cause, OSError) and (cause.errno in (errno.ENOSPC, errno.EDQUOT) or (
            cause.errno is None and shutil.disk_usage(Path(path).parent).free < 65536))  # ffmpeg's pipe, by imageio
        if not full and (cause is None or cause.errno is None):
            raise
        raise UserError(f"the disk of {path} is full: make room and start again" if full else
                        f"cannot write {path}: {os.strerror(cause.errno).lower()}") from error


@contextlib.contextmanager
def whole(path):
    """A binary file to write, which takes the place of `path` only when all of it is there: a kill, an error or a full
    disk leaves the earlier file as it was. Makes its folder where there is none. Raises UserError where the disk is
    full or the place cannot be written."""
    part = Path(f"{path}.{secrets.token_hex(4)}.part")  # containers share process numbers, machines the disk
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
    """The records of a .jsonl file, but for damaged lines and one cut short; [] where there is no file -> [dict]."""
    lines = Path(path).read_text(errors="replace").splitlines(keepends=True) if Path(path).is_file() else []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):  # damaged: the others are good
            records.append(json.loads(line) if line.endswith("\n") else None)
    return [record for record in records if isinstance(record, dict)]


def try_folder(folder):
    """Makes a folder. Raises UserError where nothing can be written into it."""
    trial = Path(folder) / f".try-{secrets.token_hex(4)}"
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            trial.write_bytes(bytes(4096))
        finally:
            trial.unlink(missing_ok=True)


def lock(folder):
    """Lets no other program write into a folder until this process ends, or `unlock`; of a group, the first process
    takes it -> whether this call did. Makes the folder, tries it, and removes what killed processes left half-written.

    A POSIX record lock on the file .lock in it: it ends with its process however that ends, is not inherited by loader
    processes, and holds on NFS between machines. Raises UserError where another program holds it, with that one's
    machine and process, or where nothing can be written.
    """
    folder = Path(folder).resolve()
    if rank_and_world()[0] > 0 or folder in _locked:
        return False
    try_folder(folder)
    if fcntl is None:
        return False
    with writing(folder / ".lock"):
        file = open(folder / ".lock", "a+")  # noqa: SIM115 (open until unlock)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read() or "another program"
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"{folder} is being written by {holder}: wait for its end, or choose another folder") \
                from error
        say(f"{folder}: its disk has no locks ({os.strerror(error.errno)}): let no second program write there")
        return False
    _locked[folder] = file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    for part in folder.glob(f"*.{'[0-9a-f]' * 8}.part"):  # nobody else is writing one
        part.unlink(missing_ok=True)
    return True


def unlock(folder):
    _locked.pop(Path(folder).resolve()).close()


@contextlib.contextmanager
def locked(folder):
    """A context in which this process holds the lock of a folder; it keeps one that it held before."""
    taken = lock(folder)
    try:
        yield
    finally:
        if taken:
            unlock(folder)
