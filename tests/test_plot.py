"""plot.py: which runs share a row and a table, what the tables say, and what the figures show."""

import importlib
import json
import math
import re
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import HERE, command, few_glyphs
from PIL import Image
from torch import nn

from model import TRANSFORMERS, deit_mini
from plumbing.files import InputError
from plumbing.options import command_line
from teacher import resnet8


@pytest.fixture
def plot():
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    return importlib.import_module("plot")


@pytest.fixture
def figures(plot, monkeypatch):
    """The figures that are drawn, by their file's name, instead of files."""
    found = {}
    monkeypatch.setattr(
        plot, "save", lambda figure, path, named=None: found.update({Path(path).name: figure})
    )
    return found


def write_run(path, accuracies, *, seconds=60.0, betas=None, origin=None, train_acc=50.0, **args):
    """A log as train.py writes it; betas: of the first epochs, then 0."""
    defaults = dict(dataset="cifar100", classes=None, model="deit_tiny", schedule="early", seed=0, epochs=3)
    args = defaults | dict(beta=2.5, guide_epochs=None, augment="strong") | args
    betas = ([] if args["schedule"] == "none" else [2.5]) if betas is None else betas
    origin = dict(args=args, hardware="a CPU", threads=2, torch="2.15.0", teacher_acc=60.0) | (origin or {})
    lines = [origin]
    for epoch, accuracy in enumerate(accuracies):
        beta = betas[epoch] if epoch < len(betas) else 0.0
        line = dict(epoch=epoch, beta=beta, loss_cls=2.0, loss_guidance=3.0 + epoch if beta else None)
        lines.append(line | dict(train_acc=train_acc, val_acc=accuracy, seconds=seconds, lr=epoch + 1))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_plot(plot, monkeypatch, *argv):
    """As from the command line."""
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, argv)])
    command_line(plot.main)


def cells(text):
    """The rows of Markdown tables, without their headings' second lines."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_without_matplotlib_plot_says_what_to_install(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        runpy.run_path(str(HERE / "plot.py"))


# ------------------------------------------------------------------------------------- rows and tables


def test_the_table_has_mean_and_deviation_of_the_last_epoch_over_the_seeds(
    plot, tmp_path, monkeypatch, capsys
):
    last = [81.5, 82.25, 84.0]
    for seed, accuracy in enumerate(last):
        write_run(tmp_path / f"early{seed}.jsonl", [10, 90, accuracy], seconds=66.0, seed=seed)
    write_run(tmp_path / "none.jsonl", [5, 6, 7], schedule="none")
    write_run(tmp_path / "slow.jsonl", [5, 6, 8], seconds=120.0, schedule="none", augment="weak")
    write_run(tmp_path / "resnet.jsonl", [1, 2, 3, 4], model="resnet56", schedule="none", epochs=4)
    run_plot(plot, monkeypatch, *tmp_path.glob("*.jsonl"), "--out", tmp_path / "f")
    text = (tmp_path / "f" / "table.md").read_text()
    assert text in capsys.readouterr().out
    spread = f"{np.mean(last):.2f} ± {np.std(last, ddof=1):.2f}"
    assert cells(text)[1:5] == [
        ["deit_tiny alone, augment strong", "7.00", "1", "7.00", "7.00", "3.0", "60.0", ""],
        ["deit_tiny alone, augment weak", "8.00", "1", "8.00", "8.00", "6.0", "120.0", ""],
        [
            "deit_tiny + early guidance",
            spread,
            "3",
            "81.50, 82.25, 84.00",
            "90.00 ± 0.00",
            "3.3",
            "66.0",
            "+10.0%",
        ],
        ["resnet56", "4.00", "1", "4.00", "4.00", "4.0", "60.0", ""],
    ]
    for name in ("accuracy", "time", "losses"):
        with Image.open(tmp_path / "f" / f"{name}.png") as picture:
            assert min(picture.size) > 400 and len(np.unique(np.asarray(picture.convert("L")))) > 50


def test_without_times_there_are_none(plot, figures, tmp_path, monkeypatch):
    log = write_run(tmp_path / "early.jsonl", [1, 2, 3])
    run_plot(plot, monkeypatch, log, "--out", tmp_path)
    assert "minutes" in (tmp_path / "table.md").read_text() and "time.png" in figures
    figures.clear()
    run_plot(plot, monkeypatch, log, "--out", tmp_path, "--untimed")
    assert not re.search("minutes|seconds", (tmp_path / "table.md").read_text()) and "time.png" not in figures


def test_runs_of_teachers_of_another_network_or_length_are_not_pooled(plot, tmp_path):
    for seed, (network, length) in enumerate(
        (("resnet8", 30), ("resnet8", 30), ("resnet20", 30), ("resnet8", 5))
    ):
        about = dict(teacher_model=network, teacher_epochs=length)
        write_run(tmp_path / f"{seed}.jsonl", [1, 2, 3], seed=seed, origin=about)
    rows = plot.read_rows(tmp_path.glob("*.jsonl"))
    assert sorted(map(len, rows.values())) == [1, 1, 2]
    assert "deit_tiny + early guidance, teacher model resnet20, teacher epochs 30" in rows


def test_only_options_with_an_effect_make_another_row(plot, tmp_path):
    """A log's args hold the command, of which each seed has its own; guidance options are idle without guidance."""
    for seed, beta in enumerate((9.0, 30.0, 30.0)):
        for schedule in ("none", "constant"):
            other = dict(
                command=f"python train.py --seed {seed}", recipe=("small", None)[seed % 2], out=f"{seed}"
            )
            idle = dict(beta=beta, seed=seed, schedule=schedule)
            write_run(tmp_path / f"{schedule}{seed}.jsonl", [1, 2, 3], **idle, **other)
    assert {name: len(runs) for name, runs in plot.read_rows(tmp_path.glob("*.jsonl")).items()} == {
        "deit_tiny alone": 3,
        "deit_tiny + constant guidance, beta 9": 1,
        "deit_tiny + constant guidance, beta 30": 2,
    }


def test_old_logs_without_an_option_share_the_row_of_its_default(plot, tmp_path):
    write_run(tmp_path / "old.jsonl", [1, 2, 3], seed=0)
    write_run(tmp_path / "new.jsonl", [1, 2, 3], seed=1, reduction="mean", held_out=None)
    write_run(tmp_path / "relative.jsonl", [1, 2, 3], seed=1, reduction="relative", held_out=None)
    rows = plot.read_rows(tmp_path.glob("*.jsonl"))
    assert [len(rows[f"deit_tiny + early guidance, reduction {r}"]) for r in ("mean", "relative")] == [2, 1]


def test_guidance_adds_time_to_the_row_without_guidance_that_shares_the_other_options(plot, tmp_path):
    def added(**runs):
        for path in tmp_path.glob("*.jsonl"):
            path.unlink()
        for name, (seconds, args) in runs.items():
            write_run(tmp_path / f"{name}.jsonl", [1, 2, 3], seconds=seconds, **args)
        return {row[0]: row[-1] for row in cells(plot.table(plot.read_rows(tmp_path.glob("*.jsonl"))))[1:]}

    none = dict(schedule="none")
    guided = dict(weak=(110.0, dict(beta=9.0)), strong=(120.0, dict(beta=90.0)))
    one = added(alone=(100.0, none), **guided)
    assert list(one.values()) == ["", "+10.0%", "+20.0%"] and "deit_tiny + early guidance, beta 9" in one
    small = (50.0, dict(schedule="none", batch_size=32))
    several = added(
        alone=(100.0, none | dict(batch_size=64)), small=small, early=(110.0, dict(batch_size=64))
    )
    assert list(several.values()) == ["", "", "+10.0%"]
    assert list(added(alone=(100.0, none | dict(batch_size=64)), small=small, **guided).values()) == [""] * 4
    for other in (dict(model="deit_mini"), dict(lr=1e-3), dict(augment="weak")):
        assert list(added(alone=(100.0, none), early=(110.0, other)).values()) == ["", ""], other


def test_the_second_table_says_what_guidance_did(plot, tmp_path):
    """By hand: beta * L / 2 is 2.5 * 3 / 2 = 3.75 in the last guided epoch, of 1 in 5; 90 * 4 / 2 = 180, of 2 in 5;
    constantly 9 * 7 / 2 = 31.5 at the end. Learning rates of 1 to 5: 2.5 * 1 / 15 = 0.167 and 90 * (1 + 2) / 15 = 18."""
    for seed, train_acc in enumerate((40.0, 43.0)):
        early = dict(seed=seed, train_acc=train_acc, origin=dict(teacher_acc=60.0 + seed), epochs=5)
        constant = early | dict(schedule="constant", beta=9.0, betas=[9.0] * 5)
        write_run(tmp_path / f"early{seed}.jsonl", [1, 2, 3, 4, 70], **early)
        write_run(tmp_path / f"strong{seed}.jsonl", [1, 2, 3, 4, 50], betas=[90.0, 90.0], beta=90.0, **early)
        write_run(tmp_path / f"constant{seed}.jsonl", [1, 2, 3, 4, 60.5], **constant)
        write_run(tmp_path / f"none{seed}.jsonl", [1, 2, 3, 4, 30], schedule="none", seed=seed, epochs=5)
    heading, *rows = cells(plot.why(plot.read_rows(tmp_path.glob("*.jsonl"))))
    assert heading[-2:] == ["mean beta", "mean beta, weighted by the learning rate"] and rows == [
        ["deit_tiny alone", "50.00 ± 0.00", "", "", "", "", ""],
        ["deit_tiny + constant guidance, beta 9", "41.50 ± 2.12", "+0.00 ± 0.71", "31.5", "31.5", "9", "9"],
        ["deit_tiny + early guidance, beta 2.5", "41.50 ± 2.12", "+9.50 ± 0.71", "3.75", "0", "0.5", "0.167"],
        ["deit_tiny + early guidance, beta 90", "41.50 ± 2.12", "-10.50 ± 0.71", "180", "0", "36", "18"],
    ]


def test_rows_are_compared_seed_by_seed_by_a_paired_t_test(plot, tmp_path):
    """The interval is scipy's for these numbers: stats.ttest_1samp([3, 1, 2], 0).confidence_interval()."""

    def compare(seed, one, other, taught=(7, 7)):
        first, second = (dict(seed=seed, origin=dict(teacher_crc=crc)) for crc in taught)
        write_run(tmp_path / f"constant{seed}.jsonl", [1, 2, one], schedule="constant", **first)
        write_run(tmp_path / f"early{seed}.jsonl", [1, 2, other], schedule="early", **second)
        return cells(plot.paired(plot.read_rows(tmp_path.glob("*.jsonl"))))[1:]

    compare(0, 70, 73)
    assert compare(1, 60, 61) == []  # two pairs say little of their spread
    assert compare(2, 65, 66, taught=(7, 8)) == []  # another teacher: no pair
    (line,) = compare(2, 65, 67)
    assert line[0] == "deit_tiny + early guidance, minus deit_tiny + constant guidance"
    assert line[1:] == ["+2.00 ± 1.00", "3", "4.303", "2.48", "-0.48 to +4.48", "not told apart"]
    compare(3, 60, 62)
    (line,) = compare(4, 60, 62)  # 3, 1, 2, 2, 2: std sqrt(1/2); the plan's 1.24 of it is the threshold
    assert line[1:] == ["+2.00 ± 0.71", "5", "2.776", "0.88", "+1.12 to +2.88", "higher"]
    for seed in range(5, 12):
        (line,) = compare(seed, 62, 60)
    assert line[2:4] == ["12", "2.262"]  # that of ten


def test_the_thresholds_of_t_leave_a_twentieth_outside(plot):
    """Student's density, integrated."""
    for freedom, t in enumerate(plot.T_975, start=2):
        x = np.linspace(-t, t, 20001)
        factor = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
        density = factor * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert np.sum((density[1:] + density[:-1]) / 2 * np.diff(x)) == pytest.approx(0.95, abs=5e-5)


# --------------------------------------------------------------------------- which runs share a table


def keep(plot, paths):
    """The files that get into the table."""
    return {run.path for runs in plot.read_rows(paths).values() for run in runs}


@pytest.mark.parametrize(
    "reason, change",
    [
        ("cifar10, not cifar100", dict(dataset="cifar10")),
        ("cifar100 with 20 classes, not cifar100", dict(classes=20)),
        ("cifar100 with 0.2 held out, not cifar100", dict(held_out=0.2)),
        ("cifar100 with 0.2 held out, not cifar100", dict(origin=dict(data=dict(held_out=0.2)))),
        ("images a and c, not images a and b", dict(origin=dict(data=dict(train="a", test="c")))),
        ("2 epochs, not 3 epochs", dict(epochs=2, accuracies=[1, 2])),
        ("2 of 3 epochs", dict(accuracies=[1, 2])),
        ("0 of 3 epochs", dict(accuracies=[])),
    ],
)
def test_runs_unlike_most_students_are_left_out_and_named_in_one_line(plot, tmp_path, capsys, reason, change):
    known = dict(data=dict(train="a", test="b"))
    good = [write_run(tmp_path / f"b{seed}.jsonl", [1, 2, 3], seed=seed, origin=known) for seed in range(2)]
    good.append(write_run(tmp_path / "old.jsonl", [1, 2, 3], seed=2))  # its log does not say which images
    good.append(write_run(tmp_path / "cnn.jsonl", [1], model="resnet56", schedule="none", epochs=1))
    assert keep(plot, good) == {*good} and capsys.readouterr().out == ""
    args = dict(accuracies=[1, 2, 3], seed=5) | change
    bad = [write_run(tmp_path / f"a{i}.jsonl", **args | dict(seed=i)) for i in range(2)]
    assert keep(plot, [*bad, *good]) == {*good}
    assert capsys.readouterr().out == f"left out: {bad[0]}, {bad[1]} ({reason})\n"


def test_students_choose_the_data_set_and_a_draw_goes_to_the_first_name(plot, tmp_path):
    student = write_run(tmp_path / "student.jsonl", [1, 2, 3])
    cnn = dict(dataset="cifar10", model="resnet56", schedule="none")
    cnns = [write_run(tmp_path / f"cnn{seed}.jsonl", [1, 2, 3], seed=seed, **cnn) for seed in range(3)]
    assert keep(plot, [student, *cnns]) == {student} and keep(plot, cnns) == {*cnns}
    other = write_run(tmp_path / "other.jsonl", [1, 2, 3], dataset="cifar10")
    assert keep(plot, [student, other]) == {other}


def test_where_no_run_is_finished_one_line_says_so(plot, tmp_path, monkeypatch):
    logs = [write_run(tmp_path / f"{name}.jsonl", [1, 2]) for name in "ab"]
    with pytest.raises(
        SystemExit, match=r"^error: no run is finished: .*a.jsonl, .*b.jsonl \(2 of 3 epochs\); finish"
    ):
        run_plot(plot, monkeypatch, *logs, "--out", tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_seed_that_a_row_has_twice_is_refused(plot, tmp_path):
    logs = [write_run(tmp_path / f"{name}.jsonl", [1, 2, 3]) for name in "ab"]
    with pytest.raises(InputError, match="b.jsonl repeats seed 0"):
        plot.read_rows(logs)


def test_a_damaged_log_is_an_error_with_its_name(plot, tmp_path):
    good = write_run(tmp_path / "a.jsonl", [1, 2, 3])
    bad = tmp_path / "b.jsonl"
    no_teacher = good.read_text().replace('"teacher_acc"', '"teacher"')
    words = good.read_text().replace('"val_acc": 2', '"val_acc": "two"')
    unknown = good.read_text().replace('"early"', '"late"')
    empty = json.dumps(dict(args=dict(epochs=0)))
    for content in (
        "",
        "{}",
        "[1]",
        "no json",
        '{"args": {}}',
        empty,
        good.read_text()[:-9],
        no_teacher,
        words,
        unknown,
        unknown.replace("late", ""),
    ):
        bad.write_text(content)
        with pytest.raises(InputError, match="b.jsonl is not a log of train.py"):
            plot.read_rows([good, bad])
    for name in ("absent", "a" * 300):
        with pytest.raises(InputError, match=f"{name} is not a log of train.py"):
            plot.read_rows([good, tmp_path / name])


def test_tables_and_figures_say_that_accuracy_was_measured_on_held_out_images(
    plot, figures, tmp_path, monkeypatch
):
    for seed in range(3):
        for schedule, beta in (("early", 9.0), ("constant", 3.0)):
            args = dict(schedule=schedule, beta=beta, seed=seed, held_out=0.2)
            write_run(tmp_path / f"{schedule}{seed}.jsonl", [1, 2, 3], **args)
    run_plot(plot, monkeypatch, *tmp_path.glob("*.jsonl"), "--out", tmp_path)
    assert "held-out accuracy % of the last epoch" in (tmp_path / "table.md").read_text()
    assert "val" not in (tmp_path / "table.md").read_text().replace("interval", "")
    for name in ("accuracy.png", "time.png", "strength.png", "gain.png"):
        assert "held-out accuracy" in figures[name].axes[0].get_ylabel(), name


@pytest.mark.parametrize(
    "logs, folder, options",
    [
        ("cifar100-20classes", "cifar100-20classes", ["--untimed"]),
        ("cifar100", "cifar100", []),
        ("glyphs", "glyphs", ["--untimed"]),
        ("claim/choose", "claim", ["--untimed"]),
        ("claim/test", "claim/test", ["--untimed"]),
        ("claim/histology", "claim/histology", ["--untimed"]),
        ("glyphs/timed", "glyphs/timed", []),
    ],
)
def test_the_committed_tables_are_what_plot_makes_of_the_committed_logs(
    plot, figures, tmp_path, monkeypatch, logs, folder, options
):
    run_plot(plot, monkeypatch, *(HERE / "results" / logs).glob("*.jsonl"), "--out", tmp_path, *options)
    assert (tmp_path / "table.md").read_text() == (HERE / "figures" / folder / "table.md").read_text()
    assert {"accuracy.png", "losses.png"} <= figures.keys()


# --------------------------------------------------------------------------------------------- figures


def test_the_guidance_loss_is_the_mean_over_the_seeds_that_are_still_guided(plot, tmp_path):
    """Seeds 0 and 1 are guided for one epoch and three; write_run's loss is 3 + epoch."""
    for seed, betas in enumerate(([2.5], [2.5, 2.5, 2.5])):
        args = dict(schedule="adaptive", seed=seed, epochs=4)
        write_run(tmp_path / f"{seed}.jsonl", [1, 2, 3, 4], betas=betas, **args)
    write_run(tmp_path / "none.jsonl", [1, 2, 3, 4], schedule="none", epochs=4)
    rows = plot.read_rows(tmp_path.glob("*.jsonl"))
    _, [[axes]] = plot.subplots()
    with warnings.catch_warnings(action="error"):
        for name, style in plot.styles(rows).items():
            plot.curve(axes, name, rows[name], "loss_guidance", style)
    alone, adaptive = (np.ma.filled(line.get_ydata(), np.nan) for line in axes.lines)
    np.testing.assert_array_equal(adaptive, [3, 4, 5, np.nan])
    assert np.isnan(alone).all()


def test_the_end_of_guidance_is_marked_on_the_curves_of_accuracy(plot, figures, tmp_path, monkeypatch):
    """At the first epoch without guidance, counted from 1; an adaptive row has a mark for every seed's own."""
    logs = [
        write_run(tmp_path / "none.jsonl", [1, 2, 3], schedule="none", seconds=30),
        write_run(tmp_path / "constant.jsonl", [1, 2, 3], schedule="constant", betas=[2.5] * 3, seconds=30),
        write_run(tmp_path / "early.jsonl", [10, 20, 30], schedule="early", seconds=30),
        write_run(tmp_path / "adaptive0.jsonl", [1, 4, 7], schedule="adaptive", betas=[2.5], seconds=30),
        write_run(
            tmp_path / "adaptive1.jsonl", [1, 6, 9], schedule="adaptive", betas=[2.5, 2.5], seed=1, seconds=30
        ),
    ]
    run_plot(plot, monkeypatch, *logs, "--out", tmp_path)
    for name, minutes in (("accuracy.png", 1), ("time.png", 0.5)):  # an epoch
        axes = figures[name].axes[0]
        marks = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "|"]
        assert marks == [[], [], [[2 * minutes, 20]], [[2 * minutes, 5], [3 * minutes, 8]]]
        assert "|: guidance has ended" in axes.get_xlabel()
    assert not [
        line for axes in figures["losses.png"].axes for line in axes.lines if line.get_marker() == "|"
    ]


def test_strength_shows_accuracy_by_beta_of_rows_that_differ_in_nothing_else(plot, figures, tmp_path, capsys):
    for seed, teacher in enumerate((60.0, 63.0)):
        about = dict(seed=seed, origin=dict(teacher_acc=teacher, teacher_model="resnet8"), epochs=5)
        for schedule, beta, guide_epochs, accuracy in (
            ("constant", 3.0, None, 40),
            ("constant", 30.0, None, 50),
            ("early", 30.0, None, 60),
            ("early", 30.0, 2, 70),
        ):
            args = dict(schedule=schedule, beta=beta, guide_epochs=guide_epochs) | about
            path = tmp_path / f"{schedule}-{beta}-{guide_epochs}-{seed}.jsonl"
            write_run(path, [1, 2, 3, 4, accuracy + 4 * seed], **args)
        write_run(
            tmp_path / f"none-{seed}.jsonl", [1, 2, 3, 4, 20 + seed], schedule="none", seed=seed, epochs=5
        )
    write_run(tmp_path / "slow.jsonl", [1, 2, 3, 4, 99], schedule="constant", beta=90.0, lr=1e-5, epochs=5)
    plot.draw_strength(plot.read_rows(tmp_path.glob("*.jsonl")), tmp_path)
    axes = figures["strength.png"].axes[0]
    labelled = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert axes.get_xscale() == "log"
    assert {label: line.get_xydata().tolist() for label, line in labelled.items()} == {
        "+ constant guidance": [[3, 42], [30, 52]],
        "+ early guidance": [[30, 62]],
        "+ early guidance for 2 epochs": [[30, 72]],
        "deit_tiny alone: 20.5": [],
        "the teacher, resnet8: 61.5": [],  # of both seeds
    }
    looks = [(line.get_linestyle(), line.get_marker(), str(line.get_color())) for line in labelled.values()]
    assert len(set(looks[:3])) == 3
    single = [line for line in axes.lines if line.get_marker() == "."]
    assert single[0].get_xydata().tolist() == [[3, 40], [3, 44], [30, 50], [30, 54]]
    figures.clear()
    plot.draw_strength(plot.read_rows([*tmp_path.glob("*-30.0-*.jsonl"), tmp_path / "slow.jsonl"]), tmp_path)
    assert not figures  # one strength, and another under another learning rate
    assert capsys.readouterr().out.startswith("no strength.png: it takes two strengths of guidance")


def test_gain_has_a_point_for_every_two_runs_of_one_seed_and_teacher(plot, figures, tmp_path, capsys):
    constant = dict(schedule="constant", betas=[9.0] * 5, beta=9.0)
    stronger = dict(schedule="constant", betas=[90.0] * 5, beta=90.0)
    cut = dict(schedule="constant", betas=[90.0], beta=90.0, guide_epochs=1)  # a hard stop is one, too
    runs = [  # name, seed, training accuracy, accuracy, teacher, options
        ("constant0", 0, 40, 50, 7, constant),
        ("early0", 0, 43, 52, 7, {}),
        ("constant1", 1, 41, 50, 8, constant),
        ("early1", 1, 42, 53, 8, {}),
        ("stronger0", 0, 30, 45, 7, stronger),
        ("cut1", 1, 45, 54, 8, cut),
        ("alone1", 1, 20, 30, None, dict(schedule="none")),
        ("retrained", 2, 0, 0, 9, {}),
        ("retrained2", 2, 99, 99, 10, constant),
        ("rate0", 0, 44, 49, 7, dict(lr=1e-4)),
        ("cnn0", 0, 0, 0, None, dict(schedule="none", model="resnet56")),
    ]
    for name, seed, train_acc, accuracy, teacher, args in runs:
        args = (
            dict(train_acc=train_acc, seed=seed, lr=1e-3, origin=dict(teacher_crc=teacher), epochs=5) | args
        )
        write_run(tmp_path / f"{name}.jsonl", [1, 2, 3, 4, accuracy], **args)
    plot.draw_gain(plot.read_rows(tmp_path.glob("*.jsonl")), tmp_path)
    axes = figures["gain.png"].axes[0]
    lines = [line for line in axes.lines if line.get_marker() != "None"]
    assert {line.get_label(): sorted(line.get_xydata().tolist()) for line in lines} == {
        "stopped minus constant (n = 4), beside them: their betas": [[1, 3], [3, 2], [4, 4], [13, 7]],
        "constant minus weaker constant (n = 1)": [[-10, -5]],
        "stopped minus weaker stopped (n = 1)": [[3, 1]],
        "constant minus alone (n = 1)": [[21, 20]],
        "stopped minus alone (n = 2)": [[22, 23], [25, 24]],
        "other options differ, too (n = 3)": [[1, -3], [4, -1], [14, 4]],
    }
    assert sorted((text.get_text(), *text.xy) for text in axes.texts) == [
        ("2.5 vs 9", 2, 2.5),  # in the middle of two points
        ("2.5 vs 90", 13, 7),
        ("90 vs 9", 4, 4),
    ]
    figures.clear()
    plot.draw_gain(plot.read_rows([tmp_path / "constant0.jsonl", tmp_path / "early0.jsonl"]), tmp_path)
    assert not figures and capsys.readouterr().out.startswith("no gain.png: it takes three pairs")


def test_long_legends_stand_beneath_the_curves_and_are_not_cut_off(plot, tmp_path):
    sizes = []
    for rows, length in ((1, 1), (12, 20)):
        for beta in range(1, rows + 1):
            args = dict(beta=float(beta), guide_epochs=beta, schedule="early", augment=f"{beta}" * length)
            write_run(tmp_path / f"{beta}.jsonl", [1, 2, 3], **args)
        drawn = plot.read_rows(tmp_path.glob("*.jsonl"))
        plot.draw_curves(drawn, dict(val_acc="%"), tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as picture:
            sizes.append(picture.size)
    letter = 6  # pixels, at least, of 10 points at 150 dots an inch
    assert sizes[1][0] > letter * max(map(len, drawn)) and sizes[1][1] > sizes[0][1] + 11 * 20


def test_confusion_shows_true_classes_in_rows_as_shares_with_their_counts(plot, figures, tmp_path):
    counts = np.array([[8, 2, 0], [0, 5, 0], [0, 0, 0]])  # no image of the third
    with warnings.catch_warnings(action="error"):
        plot.confusion(counts, ["cat", "dog", "$ign"], "c.png")
    axes = figures["c.png"].axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[80, 20, 0], [0, 100, 0], [0, 0, 0]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", r"\$ign"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert {text.get_position(): text.get_text() for text in axes.texts}[(1, 0)] == "2"
    many = torch.eye(26, dtype=torch.long)
    plot.confusion(many, [str(i) for i in range(26)], "many.png")
    assert not figures["many.png"].axes[0].texts


def test_confusion_is_drawn_as_the_kind_of_file_that_its_name_says(plot, tmp_path):
    names = ["$5_note", "a" * 300]
    for ending, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")):
        with warnings.catch_warnings(action="error"):
            plot.confusion(np.eye(2, dtype=int), names, tmp_path / f"c{ending}")
        assert (tmp_path / f"c{ending}").read_bytes().startswith(start)
    for name in ("c", "c.txt"):
        with pytest.raises(InputError, match=r"cannot draw .*c.*ends in .png, .svg or .pdf"):
            plot.confusion(np.eye(2, dtype=int), names, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"c.png", "c.svg", "c.pdf", "c.PNG"}


# ---------------------------------------------------------------------------------------------- --look


def randomise(model):
    """Weights away from their initial zeros, so that no term of a comparison vanishes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    return model


def test_attention_is_that_of_torch(plot):
    torch.manual_seed(0)
    model, images = randomise(deit_mini(10, 32, 8)).eval(), torch.randn(2, 3, 32, 32)
    weights = plot.attention(model, images)
    assert len(weights) == 6 and weights[0].shape == (2, 3, 17, 17)
    torch.testing.assert_close(weights[3].sum(dim=3), torch.ones(2, 3, 17))
    x = torch.cat((model.cls_token.expand(2, -1, -1), model.patch_embed(images).flatten(2).mT), 1)
    x = x + model.pos_embed
    for block, found in zip(model.blocks, weights):  # torch's own attention with an identity in place of v
        q, k, _ = block.attn.qkv(block.norm1(x)).view(2, 17, 3, 3, 32).permute(2, 0, 3, 1, 4)
        identity = torch.eye(17).expand(2, 3, 17, 17)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, identity))
        x = block(x)


def test_attention_distance_is_that_of_known_cases(plot):
    side, patch = 4, 8
    places = [(patch * row, patch * column) for row in range(side) for column in range(side)]
    apart = [[math.dist(a, b) for b in places] for a in places]
    uniform = torch.full((1, 1, 17, 17), 1 / 17)
    assert plot.attention_distance(uniform, patch).item() == pytest.approx(np.mean(apart), rel=1e-5)
    itself = torch.eye(17)[None, None]
    assert plot.attention_distance(itself, patch).item() == 0
    corner = torch.zeros(1, 1, 17, 17)
    corner[..., 0], corner[..., 1] = (
        0.75,
        0.25,
    )  # mostly to cls, which does not count, else to the first patch
    assert plot.attention_distance(corner, patch).item() == pytest.approx(np.mean(apart[0]), rel=1e-5)
    corner[0, 0, 5:], corner[0, 0, 5:, 0] = 0, 1  # most patches look at nothing but cls: they do not count
    first = np.mean(apart[0][:4])
    assert plot.attention_distance(corner, patch).item() == pytest.approx(first, rel=1e-5)
    two = plot.attention_distance(torch.cat((uniform, itself), dim=1), patch)  # heads are kept apart
    assert two.shape == (2,) and two[1] == 0 and two[0] > 10


@pytest.mark.slow
def test_look_draws_the_inside_of_every_row_from_checkpoints(plot, small_glyphs, monkeypatch, capsys):
    for beta in ("2.5", "9"):
        command(monkeypatch, "--epochs", 2, "--beta", beta, "--out", beta)
    command(monkeypatch, "--epochs", 2, "--schedule", "none", "--out", "none")
    look = ("none", "2.5", "9", "runs/glyphs-resnet8-seed0", "--look")
    run_plot(plot, monkeypatch, *look)
    of_logs = {"table.md", "accuracy.png", "time.png", "losses.png", "strength.png", "gain.png"}
    maps = {f"maps-deit_mini-early-guidance-beta-{beta}.png" for beta in ("2.5", "9")}  # a file for each row
    assert {path.name for path in Path("figures").iterdir()} == {
        *of_logs,
        "examples.png",
        "attention.png",
        *maps,
    }
    capsys.readouterr()
    Path("runs/glyphs-resnet8-seed0/last.pt").unlink()
    run_plot(plot, monkeypatch, *look, "--out", "f")
    line = "no maps for deit_mini + early guidance, beta 9: its teacher runs/glyphs-resnet8-seed0/last.pt is missing"
    assert line in capsys.readouterr().out.splitlines()
    assert not list(Path("f").glob("maps*")) and Path("f/attention.png").exists()
    Path("9/last.pt").unlink()
    with pytest.raises(SystemExit, match="error: there is no file 9/last.pt"):
        run_plot(plot, monkeypatch, *look)


def test_look_leaves_out_the_attention_of_other_peoples_transformers(plot, small_glyphs, monkeypatch, capsys):
    class Pooled(nn.Module):
        feature_channels = (3, 3, 3)

        def __init__(self, num_classes, image_size, patch_size):
            super().__init__()
            self.head = nn.Linear(3, num_classes)

        def forward(self, images):
            return self.head(images.mean(dim=(2, 3))), [F.avg_pool2d(images, 4)] * 3

    monkeypatch.setitem(TRANSFORMERS, "pooled", Pooled)
    command(monkeypatch, "--epochs", 2, "--model", "pooled", "--out", "run")
    run_plot(plot, monkeypatch, "run", "--look")
    assert "no attention of pooled + early guidance" in capsys.readouterr().out
    assert not Path("figures/attention.png").exists()
    assert Path("figures/maps-pooled-early-guidance.png").exists()


def test_patterns_are_taken_as_predict_takes_them(plot, monkeypatch, tmp_path):
    """cmd and PowerShell hand them over as they are; a folder of such a name goes before."""
    for name in ("a", "b", "[a]"):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name / "log.jsonl", [50.0] * 3, seed=len(name) + ord(name[0]))
    for pattern, count in (("?", 2), ("[a]", 1), ("*", 3)):
        run_plot(plot, monkeypatch, tmp_path / pattern, "--out", tmp_path / "out")
        assert cells((tmp_path / "out/table.md").read_text())[1][2] == str(count)
        shutil.rmtree(tmp_path / "out")


def test_maps_are_standardised_and_share_one_colour_scale(plot, figures, tmp_path):
    torch.manual_seed(0)
    student, teacher = randomise(deit_mini(10, 32, 8)).eval(), resnet8(10).eval()
    rest = "projections optimizer scheduler scaler generator guiding adaptive history origin"
    about = dict.fromkeys(rest.split()) | dict(model=teacher.state_dict())
    about["args"] = dict.fromkeys("dataset data classes patch_size teacher".split())
    about["args"] |= dict(model="resnet8", image_size=32, epochs=1)
    about["data"] = dict.fromkeys("dataset class_names train test held_out side".split()) | dict(
        num_classes=10
    )
    torch.save(about, tmp_path / "last.pt")
    projections = plot.Guidance(student.feature_channels, teacher.feature_channels).state_dict()
    state = dict(origin=dict(teacher=str(tmp_path / "last.pt")), projections=projections)
    images = torch.randn(2, 3, 32, 32)
    plot.draw_maps("a row", student, state, images, tmp_path)
    panels = np.array(figures["maps-a-row.png"].axes).reshape(2, 7)
    shown = [np.asarray(axes.images[0].get_array()) for axes in panels[1, 1:]]
    assert {axes.images[0].get_clim() for axes in panels[:, 1:].flat} == {(-3, 3)}
    with torch.no_grad():
        theirs, ours = teacher(images)[1], student(images)[1]
    for stage in range(3):
        weight, bias = (projections[f"projections.{stage}.{name}"] for name in ("weight", "bias"))
        projected = torch.einsum("dhw,cd->chw", ours[stage][1], weight[:, :, 0, 0]) + bias[:, None, None]
        for found, maps in zip(shown[2 * stage :], (theirs[stage][1], projected)):
            plain = maps.mean(dim=0).numpy()
            expected = (plain - plain.mean()) / plain.std()
            np.testing.assert_allclose(found, expected, atol=2e-2)
            assert abs(found.mean()) < 1e-4
    titles = [axes.get_title() for axes in panels[0, 1:]]
    assert titles == ["teacher 1", "student 1", "teacher 2", "student 2", "teacher 3", "student 3"]


def test_look_at_runs_with_held_out_images_leaves_test_images_alone(plot, small_glyphs, figures, tmp_path):
    args = dict(dataset="glyphs", data="data", model="resnet8", schedule="none", held_out=0.25)
    rows = plot.read_rows([write_run(tmp_path / "cnn.jsonl", [1, 2, 3], **args)])
    plot.look(rows, tmp_path)
    training = {image.tobytes() for image in few_glyphs()[0]}
    shown = [np.asarray(axes.images[0].get_array(), np.uint8) for axes in figures["examples.png"].axes]
    assert len(shown) == 32 and all(image.tobytes() in training for image in shown)
