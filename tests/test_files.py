"""Files are written whole or not at all, and read without running anything."""

import errno
import os
import platform
import re
import resource
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HERE, Malicious, command, easy_cache, records, small_cache

from plumbing.files import InputError, read_tensors, write_tensors, write_whole
from plumbing.runs import load_checkpoint

GONE = 2**22 + 1  # Linux gives no process so high a number


def partial_of(path, pid, machine=platform.node()):
    """Where a process writes a file until it is whole."""
    return path.with_name(f"{path.name}.{machine}.{pid}.partial")


# ------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("how", ["killed", "full", "stopped"])
def test_a_write_that_fails_half_way_leaves_the_file_that_was_there(tmp_path, how):
    path = tmp_path / "file"
    path.write_bytes(b"good")

    def fail(file):
        file.write(b"b" * 10_000)
        file.flush()
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, "No space left on device") if how == "full" else KeyboardInterrupt

    if how == "killed":
        child = os.fork()
        if not child:
            write_whole(path, fail)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert partial_of(path, child).read_bytes() == b"b" * 10_000  # it was half way
    else:
        with pytest.raises((InputError, KeyboardInterrupt), match="cannot write .*No space left|^$"):
            write_whole(path, fail)
        assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"good"
    write_whole(path, lambda file: file.write(b"better"))
    assert path.read_bytes() == b"better"
    assert list(tmp_path.iterdir()) == [path]  # what the killed process left is gone


def test_a_write_removes_what_dead_processes_left_of_this_file_and_nothing_else(tmp_path):
    path = tmp_path / "run [1].pt"  # not to be taken for a pattern
    dead = partial_of(path, GONE)
    others = [
        partial_of(path, os.getppid()),  # is being written now
        partial_of(path, GONE, machine="elsewhere"),  # perhaps, too: nobody here knows
        partial_of(path, GONE, machine=f"{platform.node()}.elsewhere"),
        partial_of(tmp_path / "run 1.pt", GONE),
        tmp_path / "my.partial",
    ]
    for file in (dead, *others):
        file.write_bytes(b"half")
    write_whole(path, lambda file: file.write(b"whole"))
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_where_no_file_can_be_a_write_is_refused_with_the_next_action(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "last.pt", tmp_path / "folder", tmp_path / ("a" * 300), Path("."), ".."):
        with pytest.raises(InputError, match=f"cannot write {path} .*choose another folder"):
            write_whole(path, lambda file: file.write(b"text"))
    assert len(list(tmp_path.iterdir())) == 2 and not list((tmp_path / "folder").iterdir())


def test_beyond_a_size_limit_a_checkpoint_and_a_cache_are_refused_and_the_old_ones_stay(tmp_path):
    """What a quota does, and a full disk where none can be mounted."""
    saves = dict(
        cache=lambda path: write_whole(path, lambda file: np.savez(file, np.zeros(10**6))),
        checkpoint=lambda path: write_tensors(path, dict(weights=torch.zeros(10**6))),
    )
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, save in saves.items():
        (tmp_path / name).write_text("good")
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, unlimited[1]))
        try:
            with pytest.raises(InputError, match=f"cannot write .*{name} .*free space or choose another"):
                save(tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert (tmp_path / name).read_text() == "good"
    assert len(list(tmp_path.iterdir())) == 2


def test_running_out_of_memory_while_saving_is_not_taken_for_a_full_disk(tmp_path):
    """400 MB of zeros, which take no memory until they are copied, with 100 MB left."""
    state = dict(weights=torch.zeros(10**8))
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 10**8, unlimited[1]))
    try:
        with pytest.raises(MemoryError):
            write_tensors(tmp_path / "last.pt", state)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
    assert not list(tmp_path.iterdir())


def test_on_a_full_disk_a_run_ends_with_one_line_and_keeps_its_last_epoch(monkeypatch):
    """A file system of 12 MB: the first checkpoint of 8 MB fits, the second one beside it does not."""
    easy_cache(Path("data/cifar10.npz"))
    disk = Path("disk")
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    run = (
        *("--dataset", "cifar10", "--model", "deit_mini", "--image-size", 32, "--patch-size", 8),
        *("--schedule", "none", "--epochs", 3, "--batch-size", 16, "--out", "disk/run"),
    )
    try:
        with pytest.raises(SystemExit) as end:
            command(monkeypatch, *run)
        assert re.fullmatch(
            "error: cannot write disk/run/last.pt .*; free space or choose .*", end.value.code
        )
        assert {path.name for path in Path("disk/run").iterdir()} == {".lock", "log.jsonl", "last.pt"}
        assert len(load_checkpoint("disk/run/last.pt")["history"]) == len(records("disk/run")[1]) == 1
        subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
        command(monkeypatch, *run, "--resume")
        assert len(records("disk/run")[1]) == 3
    finally:
        subprocess.run(["umount", disk], check=True)


def test_nothing_is_written_but_through_write_whole():
    code = "".join(path.read_text() for path in [*HERE.glob("*.py"), *HERE.glob("plumbing/*.py")])
    code = code.replace((HERE / "test_guidance.py").read_text(), "")
    writes = re.findall(
        r"open\([^)]*\"[wax]b?\"|write_text|write_bytes|torch\.save\([^)]*|savez\(\w+|savefig\(\w+", code
    )
    assert set(writes) == {
        'open(partial, "wb"',  # write_whole itself
        "torch.save(state, buffer",  # into memory: write_tensors
        "savez(file",
        "savefig(file",
        'open(folder / ".lock", "w"',
        'open(os.devnull, "w"',
    }


# ------------------------------------------------------------------------------------------------- reading


def test_tensors_come_back_as_they_were_written(tmp_path):
    state = dict(weights=torch.randn(3, dtype=torch.float64), history=[dict(epoch=0, loss=0.1)], stopped=None)
    write_tensors(tmp_path / "new folder" / "last.pt", state)
    again = read_tensors(tmp_path / "new folder" / "last.pt")
    assert torch.equal(again.pop("weights"), state.pop("weights")) and again == state


def test_what_is_no_file_of_tensors_is_refused_and_runs_nothing():
    write_tensors("whole.pt", dict(weights=torch.zeros(1000)))
    whole = Path("whole.pt").read_bytes()
    for name, content in (("empty", b""), ("text", b"text"), ("cut", whole[: len(whole) * 7 // 10])):
        Path(name).write_bytes(content)
    small_cache(Path("cache.npz"))
    torch.save(Malicious(), "malicious")
    torch.save(dict(weights=torch.zeros(1), args=Malicious()), "malicious inside")
    for name in ("empty", "text", "cut", "cache.npz", "malicious", "malicious inside"):
        with pytest.raises(
            InputError,
            match=f"^{name} is damaged or not a checkpoint .*; choose another file, or train it again$",
        ):
            read_tensors(name)
    assert not Path("executed").exists()
    for name in ("absent.pt", ".", "a" * 300):
        with pytest.raises(InputError, match="there is no file .*: check the name, or train it first"):
            read_tensors(name)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_whole_file_that_does_not_fit_into_memory_is_not_called_damaged(tmp_path, monkeypatch, error):
    def load(*args, **options):
        raise error

    write_tensors(tmp_path / "last.pt", dict(weights=torch.zeros(1)))
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(InputError, match="^out of memory while reading .*last.pt .*: end other programs$"):
        read_tensors(tmp_path / "last.pt")
