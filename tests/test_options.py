"""The command line: what options default to, what is refused, and how a program ends."""

import io
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HERE, Malicious, command, easy_cache, records_of, small_cache, small_tree

import train
from plumbing import options
from plumbing.files import InputError

FEW = ("--dataset", "cifar10", "--model", "resnet8", "--epochs", "4", "--batch-size", "16")  # on easy_cache
RESUME = (*FEW, "--out", "run", "--resume")
TAUGHT = (
    *("--dataset", "cifar10", "--image-size", "32", "--patch-size", "8", "--model", "deit_mini"),
    *("--batch-size", "16", "--teacher", "run/last.pt", "--out", "student"),
)
FOLDER = ("--dataset", "folder", "--data", "set", "--model", "resnet8", "--epochs", "1")

# ------------------------------------------------------------------------------------------------ defaults


def test_every_option_has_a_value_of_its_recipe_and_a_given_one_wins():
    for argv, recipe, row in (
        ([], "glyphs", "deit_mini 64 26 32 0.003"),
        (["--model", "resnet8"], "glyphs", "resnet8 32 5 64 0.1"),
        (["--dataset", "flowers"], "paper", "deit_tiny 224 300 128 0.0005"),
        (["--dataset", "flowers", "--model", "resnet56"], "paper", "resnet56 32 300 128 0.1"),
        (["--dataset", "flowers", "--model", "resnet18"], "paper", "resnet18 224 300 128 0.1"),
        (["--recipe", "small", "--dataset", "flowers", "--epochs", "7"], "small", "deit_mini 32 7 64 0.001"),
    ):
        args = train.parse(argv)
        assert args.recipe == recipe
        assert f"{args.model} {args.image_size} {args.epochs} {args.batch_size} {args.lr}" == row, argv
        assert {key for key, value in vars(args).items() if value is None} <= {
            *("classes", "held_out", "guide_epochs", "init"),  # none, none, by the schedule, none
            *("amp", "compile"),  # decided where the device is known
        }


def test_a_recipe_as_it_is_says_what_it_gave_and_how_long_it_takes(monkeypatch, capsys):
    """Before anything else; as the committed logs have it, whatever the schedule; nothing with other options."""
    monkeypatch.setattr(train, "run", lambda *given: None)
    for recipe, logs, rows in (
        ("small", "claim/test", ("none", "early-90", "constant-90", "constant-9")),
        ("glyphs", "glyphs", ("none", "early", "constant")),
    ):
        found = [sorted((HERE / "results" / logs).glob(f"deit_mini-{row}-seed?.jsonl")) for row in rows]
        means = [np.mean([records_of(path)[-1]["val_acc"] for path in row]) + 1e-9 for row in found]
        told = "recipe {}, as measured (README): {:.1f}% alone, {:.1f}% with early and {:.1f}% "
        told += (
            "(at --beta 9 {:.1f}%) with constant guidance" if recipe == "small" else "with constant guidance"
        )
        for more, said in (
            ([], True),
            (["--schedule", "none"], True),
            (["--schedule", "constant", "--seed", "7", "--out", "there"], True),
            (["--beta", "9"], False),
            (["--held-out", "0.2"], False),
            (["--guide-epochs", "9"], False),
            (["--init", "other.pt"], False),
            (["--epochs", "9"], False),
            (["--model", "resnet8"], False),
        ):
            command(monkeypatch, "--recipe", recipe, *more)
            line = capsys.readouterr().out
            assert line.startswith(told.format(recipe, *means)) if said else not line, more


def test_a_recipes_few_classes_belong_to_its_own_data_set():
    assert train.parse(["--recipe", "small"]).classes == 20
    assert train.parse(["--recipe", "small", "--dataset", "cifar100"]).classes == 20
    assert train.parse(["--recipe", "small", "--dataset", "cifar10"]).classes is None


def test_each_row_has_a_folder_of_its_own():
    for words, out in (
        ("", "glyphs-deit_mini-early-seed0"),
        ("--seed 3 --schedule none", "glyphs-deit_mini-none-seed3"),
        ("--model resnet8", "glyphs-resnet8-seed0"),
        ("--recipe small --held-out 0.2", "cifar100-20classes-heldout0.2-deit_mini-early-seed0"),
        ("--dataset folder --data birds", "birds-deit_tiny-early-seed0"),
    ):
        assert train.parse(words.split()).out == f"runs/{out}"
    folders = ("birds", "one/birds", "two/birds", "/birds", "one_birds", "cifar10", ".")
    named = [train.parse(["--dataset", "folder", "--data", folder]).out for folder in folders]
    assert len({*named, train.parse(["--dataset", "cifar10"]).out}) == 8
    assert all(out.startswith("runs/birds-") for out in named[:4])


def test_the_command_in_the_log_can_be_pasted_into_a_shell():
    assert train.parse(["--out", "my run", "--seed=1"]).command == "python train.py --out 'my run' --seed=1"


@pytest.mark.parametrize(
    "words, note",
    [
        ("--schedule none --teacher x --beta 7", "without guidance, --teacher, --beta have"),
        ("--model resnet8 --guide-epochs 3", "without guidance, --guide-epochs has"),
        ("--beta 0 --reduction sum", "without guidance, --reduction has"),  # --beta itself has
        ("--schedule none", None),
        ("--beta 7 --teacher x", None),
        ("--model resnet8 --patch-size 8", "with resnet8, --patch-size has"),
        ("--data elsewhere", "with glyphs, --data has"),
        ("--data elsewhere --dataset cifar10 --patch-size 8", None),
    ],
)
def test_options_without_effect_are_told_in_one_line_and_once(words, note, capsys, monkeypatch):
    args = train.parse(words.split())
    if args.schedule != "none" and args.teacher == "resnet8":  # the same note is not for its teacher as well
        options.of_teacher(args, train.RECIPES)
    expected = f"note: {note} no effect\n" if note else ""
    assert capsys.readouterr().out == expected
    monkeypatch.setenv("RANK", "1")  # the second of two processes
    train.parse(words.split())
    assert capsys.readouterr().out == ""


def test_a_resumed_run_keeps_the_command_that_makes_it_from_its_start(tmp_path):
    """Also one that was stopped before its first checkpoint, by a train.py that knew no `batch_given`."""
    begun = dict(command="python train.py --lr 1", lr=1.0)
    (tmp_path / "log.jsonl").write_text(json.dumps(dict(args=begun)) + "\n")
    args = train.parse(["--resume", "--out", str(tmp_path)])
    assert (args.command, args.lr, args.batch_given) == ("python train.py --lr 1", 1, True)


# ----------------------------------------------------------------------------------------------- bad input


def end_of(program):
    """Exit code and last words of a program, as Python makes them of SystemExit."""
    with pytest.raises(SystemExit) as end:
        options.command_line(program)
    code = end.value.code
    return (1, f"{code}\n") if isinstance(code, str) else (code, "")


@pytest.fixture(scope="module")
def shell():
    """Runs `python train.py ...` in a process of its own, forked from one that has imported torch; returns its exit
    code and what it wrote to stderr."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", __name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(HERE), str(Path(__file__).parent))))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()

    def run(folder, argv, unprivileged=False):
        child = context.Process(target=program, args=(folder, argv, unprivileged))
        child.start()
        child.join()
        return child.exitcode, (folder.parent / "stderr").read_text()

    return run


def program(folder, argv, unprivileged):
    """The child: multiprocessing takes SystemExit, and shows a traceback of all else, as Python does."""
    os.chdir(folder)
    for stream, name in ((1, os.devnull), (2, "../stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream)
    if unprivileged and os.geteuid() == 0:
        os.seteuid(65534)
    sys.argv = ["train.py", *argv]
    runpy.run_path(str(HERE / "train.py"), run_name="__main__")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run to damage, and the data it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        easy_cache(Path("data/cifar10.npz"))
        train.run(train.parse([*FEW, "--out", "run"]))
    return folder


def nothing():
    pass


def content(path, content):
    """Puts bytes into a file, or cuts what is there to that share of it."""

    def change():
        whole = Path(path).read_bytes() if isinstance(content, float) else content
        Path(path).write_bytes(whole[: int(len(whole) * content)] if isinstance(content, float) else content)

    return change


def cache(**changes):
    return lambda: small_cache(Path("data/cifar10.npz"), **changes)


def checkpoint(change):
    """Changes the dictionary in the checkpoint; what `change` returns, if anything, takes its place."""

    def write():
        state = torch.load("run/last.pt")
        replaced = change(state)
        torch.save(state if replaced is None else replaced, "run/last.pt")

    return write


def locked_tree():
    small_tree(Path("set"))
    Path("set/train/cat/image 0.png").chmod(0)


BAD = {  # what is wrong: how it comes about, the command, what the message says
    "data set": (nothing, ["--dataset", "mnist"], "invalid choice: 'mnist'.*--help$"),
    "schedule": (nothing, ["--schedule", "late"], "invalid choice: 'late'"),
    "recipe": (nothing, ["--recipe", "large"], "invalid choice: 'large'"),
    "many epochs": (nothing, ["--epochs", str(10**12)], "--epochs must be at most 1000000, not 10000"),
    "no epochs": (nothing, ["--epochs", "0"], "--epochs must be at least 1, not 0"),
    "no number": (nothing, ["--epochs", "many"], "invalid int value: 'many'"),
    "no value": (nothing, ["--epochs"], "--epochs: expected one argument"),
    "abbreviation": (nothing, ["--epoch", "3"], "unrecognized arguments: --epoch"),
    "position": (nothing, ["cifar100"], "unrecognized arguments: cifar100"),
    "unknown option": (nothing, ["--unknown", "1"], "unrecognized arguments"),
    "lr": (nothing, ["--lr", "0"], "--lr must be at least 1e-12, not 0.0"),
    "nan lr": (nothing, ["--lr", "nan"], "--lr must be .*, not nan"),
    "infinite lr": (nothing, ["--lr", "inf"], "--lr must be at most .*, not inf"),
    "batch of one": (nothing, ["--batch-size", "1"], "--batch-size must be at least 2, not 1"),
    "patch": (nothing, ["--patch-size", "0"], "--patch-size must be at least 1, not 0"),
    "large patch": (nothing, ["--patch-size", "99999"], "--patch-size must be at most 2048"),
    "grid": (nothing, ["--image-size", "60"], "60 is not a multiple of patch size 16; choose another"),
    "large image": (nothing, ["--image-size", "16000000"], "--image-size must be at most 2048, not 16000000"),
    "small image": (nothing, ["--image-size", "7", "--patch-size", "7"], "--image-size must be at least 8"),
    "seed": (nothing, ["--seed", "-1"], "--seed must be at least 0, not -1"),
    "large seed": (nothing, ["--seed", str(2**64)], "--seed must be at most"),
    "nan beta": (nothing, ["--beta", "nan"], "beta must be finite"),
    "beta": (nothing, ["--beta", "-1"], "beta must be finite and at least 0"),
    "guide epochs": (nothing, ["--guide-epochs", "0"], "guide_epochs must be at least 1"),
    "guided CNN": (nothing, [*FEW, "--schedule", "early"], "takes no guidance: leave --schedule out"),
    "adaptive sum": (nothing, ["--schedule", "adaptive", "--reduction", "sum"], "made for --reduction mean"),
    "large teacher": (nothing, ["--teacher", "resnet18"], "resnet18 cannot be a teacher: choose"),
    "none held out": (nothing, ["--held-out", "0"], "--held-out must lie between 0 and 1, not 0"),
    "all held out": (nothing, ["--held-out", "1"], "--held-out must lie between 0 and 1, not 1"),
    "held out": (nothing, ["--held-out=-0.5"], "--held-out must lie between 0 and 1, not -0.5"),
    "nan held out": (nothing, ["--held-out", "nan"], "--held-out must lie between 0 and 1, not nan"),
    "absent GPU": (nothing, [*FEW, "--device", "cuda:99"], "does not work here"),
    "many classes": (nothing, [*FEW, "--classes", "11"], "choose from 2 to 10"),
    "malicious cache": (cache(y_test=np.array([Malicious()] * 10)), FEW, "not a usable cache.*delete it"),
    "no folder": (nothing, FOLDER, "--data must hold train/<class>"),
    "no Chaoyang": (nothing, ["--dataset", "chaoyang"], "train.json is missing.*ask the authors"),
    "locked image": (locked_tree, FOLDER, "image 0.png.*ermission"),
    "locked output": (lambda: Path(".").chmod(0o555), FEW, "cannot write into runs.*ermission"),
    "out is a file": (content("file", b""), [*FEW, "--out", "file"], "cannot write into file .*--out"),
    "out in a file": (content("file", b""), [*FEW, "--out", "file/a"], "cannot write into file/a .*--out"),
    "teacher's folder": (
        nothing,
        ["--dataset", "cifar10", "--teacher", "resnet8", "--out", "runs/../runs/cifar10-resnet8-seed0"],
        "resnet8-seed0 is the folder of the teacher: choose another --out",
    ),
    "finished run": (nothing, [*FEW, "--out", "run"], "run holds a run of 4 epochs already: continue it"),
    "nothing to resume": (nothing, [*FEW, "--resume"], "nothing to resume in runs/cifar10-resnet8-seed0"),
    "long name": (nothing, [*RESUME, "--out", "a" * 300], "the run in a+ cannot be read .*another --out"),
    "other data": (cache(), RESUME, "run/last.pt was trained on other data.*training images"),
    "cut own checkpoint": (content("run/last.pt", 0.7), RESUME, "run/last.pt is damaged or not a checkpoint"),
    "empty optimiser": (
        checkpoint(lambda state: state["optimizer"].clear()),
        RESUME,
        "run/last.pt is not a complete checkpoint.*start again with another --out",
    ),
    "no teacher": (nothing, [*TAUGHT, "--teacher", "absent.pt"], "no file absent.pt: check the name"),
    "malicious teacher": (checkpoint(lambda state: Malicious()), TAUGHT, "damaged or not a checkpoint"),
    "weights as teacher": (
        checkpoint(lambda state: state["model"]),
        TAUGHT,
        "from another version of train.py, or is not a last.pt .*choose another",
    ),
    "list as teacher": (
        checkpoint(lambda state: [1, 2]),
        TAUGHT,
        "from another version of train.py, or is not a last.pt .*choose another",
    ),
}

AS_A_PROCESS = {  # the others end the program in this process
    *("data set", "no value", "large image", "absent GPU", "malicious cache", "no Chaoyang", "locked image"),
    *("locked output", "out in a file", "finished run", "cut own checkpoint", "empty optimiser"),
    *("malicious teacher", "other data"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line_and_leaves_what_was_written(
    shell, trained, tmp_path, monkeypatch, case
):
    folder = tmp_path / "case"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    folder.chmod(0o777)
    break_it, argv, message = BAD[case]
    break_it()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if case in AS_A_PROCESS:
        code, told = shell(folder, argv, unprivileged=case.startswith("locked"))
    else:
        code, told = end_of(lambda: command(monkeypatch, *argv))
    assert code == 1 and re.fullmatch("error: [^\n]+\n", told), told
    assert re.search(message, told[:-1]), told
    assert not (folder / "executed").exists()
    assert all(path.read_bytes() == content for path, content in before.items())
    new = {path.suffix for path in folder.rglob("*") if path not in before and path.is_file()}
    assert not new & {".pt", ".npz", ".partial"}


# -------------------------------------------------------------------------------------------------- the end


def raises(error):
    def program():
        raise error

    return program


def test_exit_codes_are_0_1_and_130():
    assert options.command_line(lambda: None) is None  # Python ends with 0
    refusal = InputError("no such file:\n  choose another")
    assert end_of(raises(refusal)) == (1, "error: no such file: choose another\n")
    assert end_of(raises(KeyboardInterrupt())) == (128 + signal.SIGINT, "")


def test_output_that_nobody_reads_on_ends_without_a_traceback(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    assert end_of(lambda: print("epoch")) == (1, "")
    sys.stdout.close()  # as Python does when it ends: nothing is left that could not be written


@pytest.mark.parametrize("words", ["epoch", ""], ids=["flush", "program"])
def test_output_on_a_full_disk_ends_with_one_line(monkeypatch, words):
    """Whether what is printed is written while the program runs, or when it ends."""
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    code, told = end_of(lambda: print(words or "epoch", flush=not words))
    assert code == 1
    assert re.fullmatch("error: cannot write the output .*No space left.*; free space, [^\n]*\n", told), told
    sys.stdout.close()  # as Python does when it ends


def test_output_that_is_closed_or_knows_few_letters_does_not_matter(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after >&-
    options.command_line(lambda: print("epoch", sys.stdout.isatty()))
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a notebook's is no file either
    options.command_line(lambda: print("epoch"))
    assert sys.stdout.getvalue() == "epoch\n"
    for encoding, shown in (("cp1252", b"\\u72ac \\udcff"), ("utf-8", "犬 ".encode() + b"\xff")):
        with open(tmp_path / "out", "w", encoding=encoding) as out:
            monkeypatch.setattr(sys, "stdout", out)
            options.command_line(lambda: print("犬 \udcff", end=""))
        assert (tmp_path / "out").read_bytes() == shown


def test_a_batch_that_does_not_fit_into_memory_ends_with_one_line():
    code, told = end_of(lambda: torch.empty(2**60))
    assert code == 1
    assert re.fullmatch(r"error: out of memory \([^\n]+\); choose a smaller --batch-size [^\n]+\n", told), (
        told
    )


def test_a_process_that_loses_another_says_how_to_go_on():
    code, told = end_of(raises(torch.distributed.DistNetworkError("Connection reset by peer")))
    assert code == 1
    assert re.fullmatch(r"error: another process .* has ended .*Connection reset.*--resume\n", told), told


def test_a_fault_of_the_program_itself_is_not_hidden():
    with pytest.raises(RuntimeError, match="the size of tensor a"):
        options.command_line(raises(RuntimeError("the size of tensor a")))
