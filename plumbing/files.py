"""Files written whole, and the one exception for what the user can mend."""

import os


class InputError(ValueError):
    """Something the user can mend: the message names cause and next action; train.py prints only that."""


def write_whole(path, save):
    """Has save(file) write beside `path`, and puts the file in its place once it is whole and on the disk: a
    kill, a power cut or a full disk at any byte leaves the file that was there."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another process may write the same cache
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter where the disk is full
        raise InputError(f"cannot write {path} ({error}); free space or choose another folder") from error
    finally:
        if partial.exists():
            partial.unlink()
