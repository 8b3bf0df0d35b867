"""A run and its folder: what it writes and says, how it is interrupted, killed and resumed, whom it lets guide it."""

import errno
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HERE, command, easy_cache, process, records, same_runs, small_cache
from PIL import Image

import train
from data import load
from plumbing import options, runs
from plumbing.devices import Processes, make_precision
from plumbing.files import InputError

EASY = ("--dataset", "cifar10", "--batch-size", "16")  # on easy_cache
CNN = (*EASY, "--model", "resnet8", "--epochs", "4")
MINI = (*EASY, "--model", "deit_mini", "--image-size", "32", "--patch-size", "8", "--epochs", "3")
TAUGHT = (*MINI, "--teacher", "teacher/last.pt")
GUIDED = (*TAUGHT, "--guide-epochs", "2")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with easy images, a teacher of them and a student that it guided in two epochs of three."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        easy_cache(Path("data/cifar10.npz"))
        train.run(train.parse([*CNN, "--out", "teacher"]))
        train.run(train.parse([*GUIDED, "--out", "student"]))
    return folder


@pytest.fixture
def place(shared, tmp_path, monkeypatch):
    """A copy of `shared` to work in."""
    shutil.copytree(shared, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def change_checkpoint(path, change):
    state = torch.load(path)
    change(state)
    torch.save(state, path)


def interrupt(monkeypatch, epoch, *argv):
    """Runs the command until Ctrl-C comes at the end of this epoch, counted from 0 and from where it starts."""
    calls, whole_epoch = itertools.count(), train.train_epoch

    def stopped(*given):
        result = whole_epoch(*given)
        if next(calls) == epoch:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", stopped)
        with pytest.raises(SystemExit) as end:
            command(patch, *argv)
    assert end.value.code == 130


# ----------------------------------------------------------------------------------- what is said and written


def test_in_a_notebook_a_run_returns_its_history_and_leaves_signals_alone(place):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    history = train.run(train.parse([*GUIDED, "--epochs", "2", "--out", "run"]))
    assert [line["epoch"] for line in history] == [0, 1] and records("run")[1] == history
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("model", ["resnet18", "resnet20", "resnet56", "deit_tiny"])
def test_every_model_is_a_row_of_the_table(place, monkeypatch, model):
    small = ("--epochs", 1, "--batch-size", 80, "--image-size", 32, "--schedule", "none")
    command(monkeypatch, *EASY, "--model", model, *small)
    row = f"{model}-none" if model == "deit_tiny" else model
    origin, (epoch,) = records(f"runs/cifar10-{row}-seed0")
    assert epoch["beta"] == 0 and origin["args"]["model"] == model


def commit_of(name):
    """The hash of a commit of the project; nothing where there is no repository."""
    git = ["git", "-C", HERE, "rev-parse", f"{name}^{{commit}}"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def test_the_log_tells_where_a_run_comes_from_before_it_trains(place, monkeypatch):
    def stopped(*given):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train, "train_epoch", stopped)
    with pytest.raises(SystemExit, match="^error: out of memory .*choose a smaller --batch-size"):
        command(monkeypatch, *GUIDED, "--out", "my run")
    origin, epochs = records("my run")
    assert epochs == [] and shlex.split(origin["command"]) == [
        "python",
        "train.py",
        *GUIDED,
        "--out",
        "my run",
    ]
    assert commit_of((origin["git_commit"] or "").removesuffix("-dirty")) == commit_of("HEAD")
    assert origin["args"]["epochs"] == 3 and origin["torch"] == torch.__version__


def test_without_git_the_log_has_no_commit(place, monkeypatch):
    def no_git(*args, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(runs.subprocess, "check_output", no_git)
    command(monkeypatch, *MINI, "--epochs", 1, "--schedule", "none", "--out", "run")
    assert records("run")[0]["git_commit"] is None


def test_an_automatic_teachers_log_holds_a_command_that_makes_it_again(place, monkeypatch):
    for option, value in dict(cnn_epochs=4, cnn_batch_size=16).items():
        monkeypatch.setitem(train.RECIPES["paper"], option, value)
    Path("data").rename("my data")
    command(monkeypatch, *MINI, "--epochs", 1, "--seed", 2, "--data", "my data", "--teacher", "resnet8")
    teacher = "runs/cifar10-resnet8-seed2"
    python, program, *argv = shlex.split(records(teacher)[0]["command"])
    assert (python, program) == ("python", "train.py") and "--data=my data" in argv
    command(monkeypatch, *argv, "--out", "again")
    assert same_runs(teacher, "again") and len(records("again")[1]) == 4


def test_small_and_unbalanced_sets_are_trained_on_and_described(monkeypatch, capsys):
    small_cache(Path("data/cifar10.npz"), y_train=np.array([*range(10), *[0] * 10]))
    for given, told in (
        (["--batch-size", 64], "1 steps of 20 images"),
        (["--batch-size", 16], "1 steps of 16 images, which leaves out 4 images of each epoch"),
        ([], "2 steps of 8 images, which leaves out 4 images of each epoch"),
    ):
        row = ("--dataset", "cifar10", "--model", "resnet8", "--epochs", 1)
        command(monkeypatch, *row, *given, "--out", told)
        printed = capsys.readouterr().out
        assert re.search(f"training: 1 epochs of {told}; this takes about 0:00:0\\d\n", printed)
        command(monkeypatch, *row, *given, "--out", told, "--resume")
        assert "this takes about" not in capsys.readouterr().out  # nothing is left to train
        assert "10 classes (from 1 of 'class 1' to 11 of 'class 0')" in printed


@pytest.mark.parametrize(
    "images, asked, given, processes, expected",
    [
        (2500, 64, False, 1, (64, 39)),
        (640, 64, False, 1, (64, 10)),  # ten batches: nothing changes
        (639, 64, False, 1, (63, 10)),
        (300, 128, False, 4, (28, 10)),
        (40, 128, False, 1, (8, 5)),
        (40, 128, False, 3, (6, 6)),
        (40, 128, False, 16, (16, 2)),
        (5, 128, False, 1, (5, 1)),
        (300, 128, True, 1, (128, 2)),  # what is given is taken
        (100, 128, True, 1, (100, 1)),
    ],
)
def test_few_images_have_small_batches_so_that_an_epoch_has_ten_steps(
    images, asked, given, processes, expected
):
    run = SimpleNamespace(args=SimpleNamespace(batch_size=asked, batch_given=given), processes=processes)
    assert runs.Folder.count_steps(run, SimpleNamespace(x_train=range(images))) == expected


def test_whether_a_batch_was_given_is_known_after_a_resume(place, monkeypatch):
    row = ("--dataset", "cifar10", "--model", "resnet8", "--epochs", 4)
    for given, steps in ((["--batch-size", 64], 2), ([], 10)):
        interrupt(monkeypatch, 1, *row, *given, "--out", f"run{steps}")
        command(monkeypatch, "--out", f"run{steps}", "--resume", "--batch-size", given[-1] if given else 128)
        assert records(f"run{steps}")[0]["steps"] == steps and len(records(f"run{steps}")[1]) == 4


def test_before_a_cnn_starts_one_line_tells_its_epochs_steps_and_time(place, monkeypatch, capsys):
    """By a clock that goes on by a second whenever it is read; 32 of a batch of 64 images are tried."""
    clock = itertools.count()
    monkeypatch.setattr(train, "train_epoch", lambda *given: pytest.fail("it has started"))
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(clock))
    with pytest.raises(pytest.fail.Exception):
        command(monkeypatch, *CNN, "--batch-size", 64, "--out", "run")
    told = "4 epochs of 2 steps of 64 images, which leaves out 32 images of each epoch; this takes about 0:00:16\n"
    assert f"\ntraining: {told}" in capsys.readouterr().out


def told_of(monkeypatch, capsys, seconds_a_step, steps, epoch=0, schedule="early", **changes):
    """What Progress prints in an epoch of the paper's recipe."""
    clock = [100.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: clock[0])
    args = train.parse(["--dataset", "cifar100", "--schedule", schedule])
    vars(args).update(changes)
    for _ in runs.Progress([None] * steps, args, epoch, steps, 128, torch.device("cpu")):
        clock[0] += seconds_a_step
    return capsys.readouterr().out


def test_a_run_of_days_says_so_after_four_steps_and_names_a_smaller_recipe(monkeypatch, capsys):
    told = told_of(monkeypatch, capsys, 10.0, 390)  # 390 steps of 300 epochs
    assert told.splitlines() == [
        "expected time: 13 days, 13:00:00, less once guidance ends",
        "That is long: --recipe small is the same method, sized for a CPU",
    ]
    assert train.parse(["--recipe", "small"])  # it exists
    assert "That is long" not in told_of(monkeypatch, capsys, 10.0, 390, recipe="small")


def test_on_a_terminal_the_steps_show_below_the_expected_time(monkeypatch, capsys):
    """Each over the one before, from the first step after that line on; in later epochs from the first step."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for epoch, before, first in ((0, "expected time: 0:30:00\n", 5), (1, "", 1)):
        told = told_of(monkeypatch, capsys, 1.0, 6, epoch=epoch, schedule="none")
        shown = [f"epoch {epoch}, step {step} of 6: 128 images/s  \r" for step in range(first, 6)]
        assert told == before + "".join(shown)


def test_the_expected_time_of_shorter_runs_and_other_schedules(monkeypatch, capsys):
    less = ", less once guidance ends"
    for schedule, less in (("early", less), ("adaptive", less), ("constant", ""), ("none", "")):
        told = told_of(monkeypatch, capsys, 0.01, 390, schedule=schedule)
        assert told == f"expected time: 0:19:30{less}\n"
    assert told_of(monkeypatch, capsys, 1.0, 3).startswith("expected time: 0:15:00")  # never four steps
    assert told_of(monkeypatch, capsys, 1.0, 390, epoch=1) == ""


def test_the_last_epoch_is_the_result_and_the_best_one_stands_beside_it(capsys):
    history = [dict(epoch=i, val_acc=acc, seconds=30.4) for i, acc in enumerate((50.0, 71.25, 70.5))]
    runs.show_result(train.parse([]), history)
    assert "val_acc 70.50% after the last epoch (best 71.25%, epoch 1), 0:01:31" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- going on after a stop


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_guided_run_that_is_interrupted_goes_on_by_the_command_it_names_to_the_same_end(
    place, monkeypatch, capsys, epoch
):
    """In the first guided epoch, the last one, and the one without guidance."""
    interrupt(monkeypatch, epoch, *GUIDED, "--out", "my parts")
    assert len(records("my parts")[1]) == epoch
    told = capsys.readouterr().err
    assert re.fullmatch(r"\nstopped; to go on: python train\.py [^\n]* --out 'my parts' --resume\n", told), (
        told
    )
    command(monkeypatch, *shlex.split(told)[6:])  # after "stopped; to go on: python train.py"
    assert same_runs("student", "my parts")
    assert [line["beta"] for line in records("my parts")[1]] == [2.5, 1.25, 0]
    sessions = records("my parts")[0].get("resumed", [])  # the log tells of the interruption
    assert [session["epoch"] for session in sessions] == [epoch] * (epoch > 0)


def test_an_interrupted_cnn_goes_on_to_the_same_end(place, monkeypatch):
    interrupt(monkeypatch, 2, *CNN, "--out", "parts")
    command(monkeypatch, *CNN, "--out", "parts", "--resume")
    assert same_runs("teacher", "parts")


def test_options_that_are_not_given_again_are_as_they_were(place, monkeypatch):
    begun = (*MINI, "--schedule", "none", "--seed", "3", "--lr", "1e-4", "--out", "run")
    Path("data").rename("elsewhere")
    interrupt(monkeypatch, 1, *begun, "--data", "elsewhere")
    command(monkeypatch, "--out", "run", "--resume")
    assert len(records("run")[1]) == 3
    interrupt(monkeypatch, 1, *MINI, "--schedule", "none", "--data", "elsewhere")  # in its default folder
    row = ("--dataset", "cifar10", "--model", "deit_mini", "--schedule", "none")
    command(monkeypatch, *row, "--resume")
    assert len(records("runs/cifar10-deit_mini-none-seed0")[1]) == 3


def test_a_run_that_was_moved_goes_on_where_it_lies_now(place, monkeypatch):
    interrupt(monkeypatch, 2, *GUIDED, "--out", "parts")
    Path("runs").mkdir()
    moved = Path("parts").rename("runs/cifar10-deit_mini-early-seed0")
    command(monkeypatch, *GUIDED, "--resume")
    assert same_runs("student", moved) and not Path("parts").exists()


def test_a_run_on_a_folder_that_was_moved_keeps_its_teacher(place, monkeypatch):
    """Names of runs come from the folder's; a teacher is known by its weights, and none is trained anew."""
    rng = np.random.default_rng(0)
    for name, shade in (("ant", 0), ("bee", 150)):
        Path("photos", name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 60, (32, 32, 3)) + shade
            Image.fromarray(pixels.astype(np.uint8)).save(f"photos/{name}/{i}.png")
    for key, value in dict(cnn_epochs=12, cnn_batch_size=8, teacher="resnet8").items():
        monkeypatch.setitem(train.RECIPES["small"], key, value)
    run = ("--recipe", "small", "--dataset", "folder", "--epochs", 3, "--batch-size", 8, "--out", "run")
    interrupt(monkeypatch, 13, *run, "--data", "photos")  # twelve are the teacher's
    Path("photos").rename("pictures")
    command(monkeypatch, *run, "--data", "pictures", "--resume")
    assert len(records("run")[1]) == 3 and not list(Path("runs").glob("pictures*"))


def test_a_run_that_began_with_given_weights_goes_on_without_their_file(place, monkeypatch, capsys):
    run = (*MINI, "--schedule", "none", "--init", "student/last.pt", "--out", "run")
    interrupt(monkeypatch, 1, *run)
    assert "initial weights: student/last.pt" in capsys.readouterr().out
    shutil.rmtree("student")
    command(monkeypatch, *run, "--resume")
    assert len(records("run")[1]) == 3 and "initial weights" not in capsys.readouterr().out


def test_first_weights_that_are_no_weights_are_refused(place, monkeypatch):
    torch.save([torch.zeros(1)], "list.pt")
    for name in ("list.pt", "teacher/last.pt"):
        with pytest.raises(
            SystemExit, match=f"{name} does not hold weights for this network .*another --init"
        ):
            command(monkeypatch, *MINI, "--schedule", "none", "--init", name, "--out", "run")


def test_a_run_is_not_resumed_with_other_options(place, monkeypatch):
    interrupt(monkeypatch, 0, *CNN, "--out", "begun")  # has only a log
    with pytest.raises(
        SystemExit, match="begun was made with other options: lr was 0.1, is 1.0; choose .*same$"
    ):
        command(monkeypatch, *CNN, "--lr", 1, "--out", "begun", "--resume")
    for other, message in (
        (["--lr", "1"], "was made with other options: lr was 0.1, is 1.0; choose the same$"),
        (
            ["--epochs", "9"],
            "epochs was 4, is 9; choose the same, or start a longer run .* --init teacher/last.pt",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            command(monkeypatch, *CNN, *other, "--out", "teacher", "--resume")


@pytest.mark.parametrize("lost", ["log", "line"])
def test_a_log_that_is_lost_or_a_line_short_is_rebuilt_from_the_checkpoint(place, monkeypatch, lost):
    """A kill between checkpoint and log leaves it a line short."""
    interrupt(monkeypatch, 2, *GUIDED, "--out", "parts")
    log, begun = Path("parts/log.jsonl"), records("parts")[0]
    if lost == "log":
        log.unlink()
    else:
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    command(monkeypatch, *GUIDED, "--out", "parts", "--resume")
    origin, epochs = records("parts")
    assert same_runs("student", "parts") and len(epochs) == 3
    assert origin["started"] == begun["started"] and [s["epoch"] for s in origin["resumed"]] == [2]


def test_a_finished_run_is_resumed_without_any_change(place, monkeypatch, capsys):
    before = Path("student/last.pt").read_bytes(), records("student")
    Path("student/log.jsonl").unlink()
    command(monkeypatch, *GUIDED, "--out", "student", "--resume")
    assert (Path("student/last.pt").read_bytes(), records("student")) == before
    assert "result: deit_mini on cifar10" in capsys.readouterr().out


@pytest.mark.parametrize("part, key", [(None, "scheduler"), ("data", "side"), ("args", "teacher")])
def test_a_run_of_another_version_can_neither_be_resumed_nor_guide(place, monkeypatch, part, key):
    change_checkpoint("teacher/last.pt", lambda state: (state[part] if part else state).pop(key))
    for argv in ((*CNN, "--out", "teacher", "--resume"), (*GUIDED, "--out", "run")):
        with pytest.raises(SystemExit, match=f"teacher/last.pt is from another version .*lacks {key}.*again"):
            command(monkeypatch, *argv)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit_and_the_order_of_options_does_not_matter(place):
    """SIGKILL in real processes while guidance is adaptive: before the first epoch is over, and in the third."""
    pairs = {**dict(zip(TAUGHT[::2], TAUGHT[1::2])), "--schedule": "adaptive", "--epochs": "4"}
    argv, backwards = (
        [word for pair in given for word in pair] for given in (pairs.items(), reversed(pairs.items()))
    )
    uninterrupted = process(place, *argv, "--out", "whole")
    for line, resume in (("log and checkpoint", []), ("epoch   1", ["--resume"])):
        running = process(place, *backwards, "--out", "parts", *resume)
        assert next(told for told in running.stdout if told.startswith(line))
        time.sleep(0.05)
        running.kill()
        running.communicate()
    running = process(place, *backwards, "--out", "parts", "--resume")
    assert running.communicate()[1] == "" and running.returncode == 0
    uninterrupted.communicate()
    assert uninterrupted.returncode == 0 and same_runs("whole", "parts")
    (session,) = records("parts")[0]["resumed"]
    assert session["epoch"] >= 2 and runs.load_checkpoint("whole/last.pt")["adaptive"]
    assert not list(place.rglob("*.partial"))


# ------------------------------------------------------------------------------------------------- signals


@pytest.mark.slow
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_a_run_at_once_and_names_the_command_that_goes_on(place, name, code):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job and its children ignore it
    running = process(place, *CNN, "--epochs", "400", "--out", "my run")
    assert next(line for line in running.stdout if line.startswith("epoch   1"))
    running.send_signal(getattr(signal, name))
    began = time.monotonic()
    told = running.communicate()[1]
    assert running.returncode == code and time.monotonic() - began < 10
    assert re.fullmatch(r"\nstopped; to go on: python [^\n]*train\.py .*--out 'my run' --resume\n", told), (
        told
    )
    assert len(records("my run")[1]) >= 2


def test_a_sigterm_that_comes_while_a_run_ends_does_not_cut_off_the_reason(place, monkeypatch):
    """torchrun sends one to every process as soon as another has failed, be it an instant after this one."""

    class Late(InputError):
        def __str__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return "the reason"

    def fails(*given):
        raise Late

    monkeypatch.setattr(train, "run", fails)
    with pytest.raises(BaseException) as end:
        command(monkeypatch, *CNN)
    assert (type(end.value), str(end.value)) == (SystemExit, "error: the reason")


# --------------------------------------------------------------------------------------------------- locks


def test_two_processes_never_train_into_one_folder(place, monkeypatch):
    with runs.locked(Path("run")):
        with pytest.raises(
            SystemExit, match="another process is training in run: wait for it, or choose another"
        ):
            command(monkeypatch, *CNN, "--out", "run")
        assert not Path("run/log.jsonl").exists()
        with monkeypatch.context() as windows:  # which has no such lock
            windows.setattr(runs, "fcntl", None)
            with runs.locked(Path("run")):
                pass
    with runs.locked(Path("run")):  # it ended with the block
        pass


def test_a_lock_goes_with_its_process_however_it_ends(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with runs.locked(tmp_path):
            os.write(writer, b"locked")
            signal.pause()
    assert os.read(reader, 6) == b"locked"
    with pytest.raises(InputError, match="another process"), runs.locked(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with runs.locked(tmp_path):
        pass


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path, monkeypatch, capsys):
    """As Lustre and NFS may be; locks are then as on Windows."""

    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    with runs.locked(tmp_path / "run"):
        assert "cannot be locked (" in capsys.readouterr().out


def test_a_run_goes_on_with_as_many_steps_an_epoch_as_it_was_begun_with(place):
    """Of few images the batch depends on the number of processes: of 95, nine for one and eight for two."""
    args = train.parse([*CNN, "--out", "run"])
    args.batch_given = False
    images = SimpleNamespace(x_train=torch.zeros(95, 3, 8, 8), about={}, num_classes=10)
    folder = runs.Folder(args, torch.device("cpu"), Processes())
    begun = dict(steps=10, processes=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "check_data", lambda *given: None)
        patch.setattr(folder, "processes", 2)
        with pytest.raises(
            InputError, match="with 10 steps an epoch but would now have 11: .* processes as before, 1"
        ):
            folder.resume(dict(data={}, origin=begun), None, images)


def test_a_second_start_waits_for_the_teacher_that_the_first_one_trains(place, monkeypatch, capsys):
    folder, locked, waiting = Path("runs/cifar10-resnet8-seed0"), threading.Event(), threading.Event()

    def first_start():
        with runs.locked(folder):
            locked.set()
            assert waiting.wait(60)
            shutil.copy("teacher/last.pt", folder)

    def note(*words, **options):
        waiting.set() if words[0].startswith("waiting for the process that is training in") else None
        print(*words, **options)

    monkeypatch.setattr(runs, "print", note, raising=False)
    first = threading.Thread(target=first_start, daemon=True)
    first.start()
    assert locked.wait(60)
    command(monkeypatch, *MINI, "--epochs", 1, "--teacher", "resnet8", "--out", "second")
    first.join()
    told = capsys.readouterr().out
    assert f"waiting for the process that is training in {folder}" in told and "no trained" not in told
    assert f"teacher: resnet8 from {folder}/last.pt" in told and len(records("second")[1]) == 1


# ------------------------------------------------------------------------------------------------- teachers


def test_where_no_file_can_be_there_is_no_finished_teacher():
    assert not runs.is_finished(Path("a" * 300, "last.pt"))


def test_a_teacher_trained_for_less_counts_and_an_interrupted_one_is_continued_where_it_lies(
    place, monkeypatch, capsys
):
    default = Path("runs/cifar10-resnet8-seed0")
    default.parent.mkdir()
    Path("teacher").rename(default)  # its options still name the folder it was begun in
    student = (*MINI, "--epochs", 1, "--teacher", "resnet8")
    command(monkeypatch, *student, "--out", "first")
    told = capsys.readouterr().out
    assert "no trained teacher" not in told and len(records(default)[1]) == 4
    assert (
        f"teacher: resnet8 from {default}/last.pt, trained for 4 epochs with strong augmentation; it gets"
        in told
    )
    change_checkpoint(default / "last.pt", lambda state: state["args"].update(epochs=5))
    command(monkeypatch, *student, "--out", "second")
    assert len(records(default)[1]) == 5 and not Path("teacher").exists()
    origin = records("second")[0]
    assert origin["teacher"] == f"{default}/last.pt" and origin["teacher_epochs"] == 5
    assert origin["teacher_acc"] > 30


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state["args"].update(image_size=64), r"cannot guide \(.*is a resnet8 at 64 px"),
        (lambda state: state["args"].update(model="resnet18"), r"cannot guide \(.*is a resnet18 at 32 px"),
        (
            lambda state: state["args"].update(model="resnet20"),
            r"cannot guide \(.*; choose another --teacher",
        ),
        (lambda state: state["data"].update(num_classes=5), r"differs: number of classes \(5, now 10\)"),
        (lambda state: state["data"].update(dataset="glyphs"), r"differs: data set \(glyphs, now cifar10\)"),
        (lambda state: state["data"].update(train="another"), "differs: training images. Choose another"),
        (
            lambda state: state["data"].update(train="another", class_names=list("abcdefghij")),
            "differs: classes, training images",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(place, monkeypatch, change, message):
    change_checkpoint("teacher/last.pt", change)
    with pytest.raises(SystemExit, match=f"teacher/last.pt .*{message}"):
        command(monkeypatch, *GUIDED, "--out", "run")
    assert records("run")[1] == []


def test_the_same_images_under_other_class_names_are_the_same_data(place, monkeypatch):
    """An own cache of CIFAR-10 has no names, torchvision's archive has: a teacher fits both. Other data sets have no
    order of classes of their own: there the names must agree."""
    change_checkpoint("teacher/last.pt", lambda state: state["data"].update(class_names=list("abcdefghij")))
    command(monkeypatch, *GUIDED, "--out", "run")
    assert len(records("run")[1]) == 3
    state = torch.load("teacher/last.pt")
    own = load("cifar10")
    own = own._replace(about=own.about | dict(dataset="folder"))
    with pytest.raises(InputError, match="what differs: classes. Choose"):
        runs.check_data("last.pt", state["data"] | dict(dataset="folder"), own)


def test_a_teacher_made_automatically_of_other_images_is_refused_with_the_folder_to_remove(
    place, monkeypatch
):
    """As after a folder was split anew: nobody chose that teacher."""
    monkeypatch.setitem(train.RECIPES["paper"], "cnn_epochs", 4)
    monkeypatch.setitem(train.RECIPES["paper"], "cnn_batch_size", 16)
    command(monkeypatch, *MINI, "--teacher", "resnet8", "--epochs", 1, "--out", "run")
    easy_cache(Path("data/cifar10.npz"), 150)
    with pytest.raises(
        SystemExit, match="remove runs/cifar10-resnet8-seed0, so that a teacher is trained anew"
    ):
        command(monkeypatch, *MINI, "--teacher", "resnet8", "--epochs", 1, "--out", "again")


def test_a_weak_augmentation_is_the_automatic_teachers_too():
    for words, expected in ((["--augment", "weak"], "weak"), ([], "strong")):
        theirs = options.of_teacher(train.parse(["--recipe", "small", *words]), train.RECIPES)
        assert theirs.augment == expected


def test_the_augmentation_that_a_teacher_had_is_told(place, monkeypatch, capsys):
    """An automatic teacher keeps its name, whatever it was trained with: so what it had is said and logged."""
    command(monkeypatch, *MINI, "--epochs", 1, "--teacher", "teacher/last.pt", "--out", "run")
    assert re.search(r"trained for \d+ epochs with strong augmentation; it gets", capsys.readouterr().out)
    assert records("run")[0]["teacher_augment"] == "strong"


def test_a_teacher_that_has_seen_held_out_images_is_refused_and_the_automatic_one_never_sees_them(
    place, monkeypatch
):
    held_out = (*MINI, "--epochs", 1, "--held-out", "0.25")
    with pytest.raises(SystemExit, match=r"what differs: part held out \(None, now 0.25\)"):
        command(monkeypatch, *held_out, "--teacher", "teacher/last.pt", "--out", "run")
    theirs = options.of_teacher(train.parse([*map(str, held_out), "--teacher", "resnet8"]), train.RECIPES)
    assert theirs.held_out == 0.25 and theirs.out == "runs/cifar10-heldout0.25-resnet8-seed0"
    assert "--held-out=0.25" in theirs.command


def test_a_run_on_held_out_images_says_so(place, monkeypatch, capsys):
    command(monkeypatch, *MINI, "--epochs", 1, "--held-out", 0.25, "--schedule", "none")
    assert "data: cifar10, 120 training and 40 held-out images of 32 px" in capsys.readouterr().out
    assert len(records("runs/cifar10-heldout0.25-deit_mini-none-seed0")[1]) == 1


def test_a_resumed_run_is_guided_by_the_same_teacher_wherever_that_lies_now(place, monkeypatch):
    interrupt(monkeypatch, 1, *GUIDED, "--out", "run")
    Path("teacher").rename("archive")
    for moved in ((), ("--teacher", "a" * 300)):
        with pytest.raises(
            SystemExit, match="was guided by teacher/last.pt: bring that file back, or say where it is"
        ):
            command(monkeypatch, "--out", "run", "--resume", *moved)
    shutil.copytree("archive", "teacher")
    change_checkpoint("teacher/last.pt", lambda state: state["model"]["fc.bias"].add_(1))
    with pytest.raises(SystemExit, match="teacher/last.pt is not the teacher that guided run/last.pt"):
        command(monkeypatch, "--out", "run", "--resume")
    command(monkeypatch, "--out", "run", "--resume", "--teacher", "archive/last.pt")
    assert records("run")[0]["teacher"] == "archive/last.pt"
    assert same_runs("run", "student")


@pytest.mark.parametrize("schedule", ["early", "adaptive"])
def test_once_guidance_has_ended_a_run_goes_on_without_its_teacher(place, monkeypatch, capsys, schedule):
    """Bit for bit; early guidance ends after two epochs of three, adaptive guidance when its rule says so."""
    run = (*GUIDED, "--guide-epochs", 3, "--schedule", schedule) if schedule == "adaptive" else GUIDED
    monkeypatch.setattr(train.AdaptiveStop, "update", lambda rule, loss: rule.history.append(loss))
    command(monkeypatch, *run, "--out", "whole")
    interrupt(monkeypatch, 2, *run, "--out", "parts")
    assert [line["beta"] > 0 for line in records("whole")[1]] == [True, True, False]
    shutil.rmtree("teacher"), capsys.readouterr()
    command(monkeypatch, *run, "--out", "parts", "--resume")
    assert same_runs("whole", "parts") and "teacher:" not in capsys.readouterr().out
    command(monkeypatch, "--out", "whole", "--resume")  # it has nothing to do


def test_an_automatic_teacher_at_chance_is_replaced_by_what_the_message_says(place, monkeypatch):
    teacher = Path("runs/cifar10-resnet8-seed0")
    for key, value in dict(cnn_epochs=2, cnn_batch_size=16).items():
        monkeypatch.setitem(train.RECIPES["paper"], key, value)
    student = (*MINI, "--epochs", 1, "--teacher", "resnet8", "--out", "student")
    shutil.rmtree("student")
    command(monkeypatch, *CNN, "--epochs", 2, "--out", teacher)
    change_checkpoint(teacher / "last.pt", lambda state: state["model"]["fc.weight"].zero_())
    with pytest.raises(SystemExit, match="is at chance") as refusal:
        command(monkeypatch, *student)
    told = re.search(
        f"or remove {teacher} and train it longer: python train.py (.*); then run", str(refusal.value)
    )
    shutil.rmtree(teacher)
    command(monkeypatch, *shlex.split(told[1]))
    command(monkeypatch, *student)
    assert len(records(teacher)[1]) == 4 and len(records("student")[1]) == 1


# ------------------------------------------------------------------------------- only finite numbers are kept


def test_a_loss_that_is_not_finite_ends_the_run_before_it_reaches_a_file(place, monkeypatch):
    with pytest.raises(
        SystemExit, match=r"the loss is not finite in epoch 0: loss_cls .*beta .*lr [^;]*; try a lower --lr"
    ):
        command(monkeypatch, *MINI, "--schedule", "none", "--lr", 1e15, "--out", "run")
    assert not Path("run/last.pt").exists() and records("run")[1] == []


@pytest.mark.parametrize("network", ["model", "projections"])
def test_a_weight_that_is_not_finite_ends_the_run_before_it_reaches_a_file(place, monkeypatch, network):
    """The loss of the last step may still be finite when the update that follows it is not."""
    whole_epoch, calls = train.train_epoch, itertools.count()

    def spoil(student, teacher, guidance, *rest):
        result = whole_epoch(student, teacher, guidance, *rest)
        if next(calls) == 1:
            last_layer = dict(model=student.head, projections=guidance.projections[2])[network]
            last_layer.bias.data[0] = math.inf
        return result

    monkeypatch.setattr(train, "train_epoch", spoil)
    with pytest.raises(
        SystemExit, match="a weight is not finite in epoch 1: .*beta 1.250, lr .*; run/last.pt keeps"
    ):
        command(monkeypatch, *GUIDED, "--out", "run")
    state = runs.load_checkpoint("run/last.pt")
    assert len(records("run")[1]) == len(state["history"]) == 1
    assert all(
        tensor.isfinite().all() for part in ("model", "projections") for tensor in state[part].values()
    )


# ----------------------------------------------------------------------------------------------- checkpoints


def test_a_network_is_restored_from_its_checkpoint_alone_or_refused(place):
    model, state = runs.restore("student/last.pt")
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in model.state_dict().items())
    change_checkpoint("student/last.pt", lambda state: state["model"].popitem())
    with pytest.raises(
        InputError, match="(?s)student/last.pt does not hold the network it names .*; train it again"
    ):
        runs.restore("student/last.pt")


def test_weights_in_half_precision_are_a_small_file_that_guides_and_is_recognised(place, monkeypatch, capsys):
    """A third of the checkpoint or less, as half precision and no optimiser; every weight rounded, none changed
    otherwise; a weight too large for it is refused."""
    runs.write_weights("teacher/last.pt", "handed/out.pt")
    assert os.path.getsize("handed/out.pt") < os.path.getsize("teacher/last.pt") / 3
    (given, about), (written, _) = runs.restore("teacher/last.pt"), runs.restore("handed/out.pt")
    for name, tensor in written.state_dict().items():
        expected = given.state_dict()[name]
        torch.testing.assert_close(tensor, expected, rtol=2**-11, atol=1e-7)
        assert tensor.dtype == expected.dtype
    shutil.rmtree("teacher")
    command(monkeypatch, *MINI, "--teacher", "handed/out.pt", "--out", "run")
    assert "teacher: resnet8 from handed/out.pt, trained for 4 epochs" in capsys.readouterr().out
    assert records("run")[0]["teacher_command"] == about["origin"]["command"]
    change_checkpoint(
        "handed/out.pt", lambda state: state["model"].update({"fc.bias": torch.full((10,), 1e6)})
    )
    with pytest.raises(InputError, match="a weight of handed/out.pt is too large for half precision"):
        runs.write_weights("handed/out.pt", "handed/again.pt")
    with pytest.raises(InputError, match="handed/out.pt exists already: choose another name"):
        runs.write_weights("handed/out.pt", "handed/out.pt")


# ------------------------------------------------------------------------------------------ several processes


def test_several_processes_go_on_by_torchrun_as_the_readme_has_it(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--seed", "1"])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), runs.interruptible(train.parse([]), Processes(0, 2)):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, handler)
    assert capsys.readouterr().err.endswith(
        "go on: torchrun --standalone --nproc_per_node=2 train.py --seed 1\n"
    )
    assert "torchrun --standalone --nproc_per_node=2 train.py" in (HERE / "README.md").read_text()


def test_processes_may_be_more_than_test_images(monkeypatch):
    """The parts of all of them, one of which has no image, add up to what one process finds."""
    model, precision = train.runs.build("resnet8", 3, 32, 8), train.pick_device("cpu", None)[1]
    images, labels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([2, 0])
    monkeypatch.setattr(Processes, "sum", lambda processes, counts: counts.clone())
    found = [
        train.evaluate(model, images, labels, 32, precision, processes=Processes(rank, 3))
        for rank in range(3)
    ]
    assert torch.equal(sum(found), train.evaluate(model, images, labels, 32, precision))


def test_a_users_scalars_are_trained_and_they_and_nested_positions_do_not_decay():
    network = torch.nn.ModuleDict(dict(vit=train.runs.build("deit_mini", 10, 32, 4), scale=torch.nn.PReLU(1)))
    network.gain = torch.nn.Parameter(torch.ones(()))
    decayed, free = (group["params"] for group in train.make_optimizer(network, None, 1e-3).param_groups)
    assert len(decayed) + len(free) == len(list(network.parameters()))
    for parameter in (network.gain, network.vit.pos_embed, network.vit.cls_token):
        assert any(parameter is other for other in free)


def test_a_first_step_skipped_in_float16_gives_no_warning_and_leaves_no_momentum(recwarn):
    """Its gradients overflow: the scaler skips the update, and the learning rate goes on. The next step is a first one:
    with the momentum still 0, Nesterov's takes 1.9 times the gradient."""
    device = torch.device("cpu")
    precision = make_precision(device, torch.float16)
    now = train.Training(train.parse(list(CNN)), 10, 5, None, precision, device)
    images = [(torch.full((2, 3, 32, 32), math.inf), torch.tensor([0, 1]))]
    before = now.model.fc.weight.clone()
    assert not any(state["momentum_buffer"].any() for state in now.optimizer.state.values())
    train.train_epoch(now.model, None, None, now.optimizer, now.scheduler, images, 0.0, precision)
    assert torch.equal(now.model.fc.weight, before) and not list(recwarn)
    rate = now.optimizer.param_groups[0]["lr"]
    images = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]
    train.train_epoch(now.model, None, None, now.optimizer, now.scheduler, images, 0.0, precision)
    weight, momentum = now.model.fc.weight, now.optimizer.state[now.model.fc.weight]["momentum_buffer"]
    torch.testing.assert_close(before - weight, rate * 1.9 * momentum)
    torch.testing.assert_close(momentum, weight.grad + 5e-4 * before, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_two_processes_train_as_one_resume_and_end_when_one_of_them_dies(place):
    """torchrun with two gloo processes: the losses of one process, also across a kill and a resume."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    argv = (*TAUGHT, "--schedule", "adaptive", "--epochs", "5")
    one = process(place, *argv, "--out", "one")
    running = process(place, *argv, "--out", "two", launcher=torchrun)
    assert next(line for line in running.stdout if line.startswith("epoch   1"))
    children = subprocess.run(
        ["pgrep", "-P", str(running.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 2
    began = time.monotonic()
    os.kill(int(children[1]), signal.SIGKILL)
    told = running.communicate()[1]
    assert running.returncode and time.monotonic() - began < 60
    assert re.search(r"stopped; to go on: torchrun .*--resume|another process of this run has ended", told), (
        told
    )
    assert 2 <= len(records("two")[1]) < 5 and not list(Path("two").glob("*.partial"))
    again = process(place, *argv, "--out", "two", "--resume", launcher=torchrun)
    told = again.communicate()[0]
    assert again.returncode == 0 and told.count("resumed after epoch") == 1  # only the first process talks
    assert one.communicate() and one.returncode == 0
    (origin, theirs), (_, ours) = records("two"), records("one")
    assert origin["processes"] == 2 and len(theirs) == len(ours) == 5
    for a, b in zip(theirs, ours):
        for key in ("beta", "lr", "loss_cls", "loss_guidance", "train_acc", "val_acc"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), (key, a, b)
