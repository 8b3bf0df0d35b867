"""Files that are written whole or not at all, and the error that tells a user what to do."""

import glob
import io
import os
import platform
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


class InputError(ValueError):
    """Something the user can mend: the message names the cause and the next action, and only it is shown."""


def matching(pattern):
    """The paths that match a pattern such as *.jpg, which cmd and PowerShell do not expand. A file or folder of
    exactly that name takes precedence."""
    return glob.glob(glob.escape(pattern)) or sorted(glob.glob(pattern))


@contextmanager
def explained(problem, remedy):
    """Turns what the body raises, on input that does not fit, into one line: problem (Python's message); remedy."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
        if isinstance(error, InputError) or out_of_memory(error):
            raise
        raise InputError(f"{problem} ({error}); {remedy}") from error


def out_of_memory(error):
    """Whether an error says that memory is full: torch has several for it, of several classes."""
    full = re.search("allocate memory|out of memory|not enough memory", str(error), re.IGNORECASE)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(full)


def write_whole(path, save):
    """Writes a file with save(file), beside `path` first: a kill or a full disk at any byte leaves the old file.

    Raises:
        InputError: the disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    ours = f"{path.name}.{platform.node()}"  # other machines may share the folder
    partial = path.parent / f"{ours}.{os.getpid()}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{glob.escape(ours)}.*.partial"):
            pid = left.name[len(ours) + 1 : -len(".partial")]
            if pid.isdigit() and has_ended(int(pid)):  # killed while it wrote
                left.unlink(missing_ok=True)
        with open(partial, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error}); free space or choose another folder") from error
    finally:
        with suppress(OSError):  # it was renamed, or could not be made
            partial.unlink()


def has_ended(pid):
    """Whether no process of this number runs on this machine any more; on Windows nobody knows."""
    if os.name == "posix":
        try:
            os.kill(pid, 0)  # asks only
        except OSError as error:  # PermissionError: it runs, as somebody else's
            return isinstance(error, ProcessLookupError)
    return False


def write_tensors(path, state):
    """Writes a dictionary with torch.save, via memory: an error while writing is then really one of the disk."""
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
    except RuntimeError as error:
        raise error.__context__ or error  # out of memory, it fails again while it closes the file
    write_whole(path, lambda file: file.write(buffer.getbuffer()))


def read_tensors(path):
    """What `write_tensors` wrote, on the CPU. Only tensors and plain values are unpickled: a file runs nothing.

    Raises:
        InputError: there is no such file, or it is damaged or something else, or does not fit into memory.
    """
    if not os.path.isfile(path):  # which raises nothing, whatever the name is
        raise InputError(f"there is no file {path}: check the name, or train it first")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged, a foreign pickle, no torch file at all: torch raises many things
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if out_of_memory(error):
            raise InputError(f"out of memory while reading {path} ({reason}): end other programs") from error
        raise InputError(
            f"{path} is damaged or not a checkpoint ({reason}); choose another file, or train it again"
        ) from error
