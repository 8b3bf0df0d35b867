"""The documentation: its code, commands, links, lengths and figures are those of the repository."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import CIFAR, HERE, command, easy_cache, few_glyphs, records, records_of
from PIL import Image
from torch import nn

import data
import train
from augment import prepare
from plumbing.runs import restore, show_epoch

README = (HERE / "README.md").read_text()
EVIDENCE = (HERE / "results" / "README.md").read_text()


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 250 and all(
        len(line) <= 120 for line in lines if not line.startswith(("|", "!", "    "))
    )


def test_the_readme_quotes_the_code_as_it_is():
    code = (HERE / "guidance.py").read_text().splitlines()
    quoted = README.split("```python\n")[1].split("```")[0].splitlines()
    assert len(quoted) > 6
    assert all(line in code or line.strip() == "..." for line in quoted)


@pytest.mark.parametrize("file", ["README.md", "results/README.md"])
def test_every_link_leads_somewhere(file):
    text, folder = (HERE / file).read_text(), (HERE / file).parent
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("https://")]
    named = re.findall(r"`((?:results|figures)/[^`*]+)`", text)
    assert len(links) >= 4
    for path in [*(folder / link for link in links), *(HERE / name for name in named)]:
        assert path.exists(), path


def test_every_file_is_listed_with_its_length():
    """Within 5 lines, or 3%: a file may change a little without its README."""
    lengths = dict(re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", README, re.MULTILINE))
    assert lengths.keys() == {path.name for path in HERE.glob("*.py")}
    for name, said in lengths.items():
        true = len((HERE / name).read_text().splitlines())
        assert true == pytest.approx(int(said), rel=0.03, abs=5), (name, true)


def test_the_epochs_of_the_main_command_are_those_of_its_log(capsys):
    """The first one, the last one with guidance, the last one."""
    lines = records_of(HERE / "results/glyphs/deit_mini-early-seed0.jsonl")[1:]
    guided = sum(line["beta"] > 0 for line in lines)
    for line in (lines[0], lines[guided - 1], lines[-1]):
        show_epoch(line, len(lines))
        assert f"    {capsys.readouterr().out}" in README
    assert f"val_acc {lines[-1]['val_acc']:.2f}% after the last epoch" in README


def mean_of(logs, key, guided_only=False):
    """Over runs: the mean of a column in the last epoch, or in the last one with guidance. A little above, so that
    71.55 is rounded up."""
    epochs = [[line for line in log[1:] if line["beta"] > 0 or not guided_only] for log in logs]
    return np.mean([lines[-1][key] for lines in epochs]) + 1e-9


def test_the_table_of_when_to_stop_is_that_of_the_logs():
    """The teacher as it guides; the student when early guidance ends; accuracy, and in brackets that in training."""
    shown = [
        [cell.strip() for cell in line.split("|")[2:-1]] for line in README.replace("*", "").splitlines()
    ]
    for folder, seeds, *strengths in (
        ("glyphs", 3, "", ""),
        ("cifar100-20classes", 3, "", ""),
        ("claim/test", 5, "-9", "-90"),
        ("claim/histology", 3, "-9", "-90"),
    ):
        logs = {}
        for schedule, strength in zip(("none", "constant", "early"), ("", *strengths)):
            found = (HERE / "results" / folder).glob(f"deit_mini-{schedule}{strength}-seed?.jsonl")
            logs[schedule] = [records_of(path) for path in sorted(found)]
        assert len(logs["constant"]) == len(logs["early"]) == seeds
        cells = [f"{mean_of(logs['none'], 'val_acc'):.1f}" if logs["none"] else ""]
        cells.append(f"{np.mean([origin['teacher_acc'] for origin, *_ in logs['early']]):.1f}")
        cells.append(f"{mean_of(logs['early'], 'val_acc', guided_only=True):.1f}")
        for schedule in ("constant", "early"):
            last = (mean_of(logs[schedule], key) for key in ("val_acc", "train_acc"))
            cells.append("{:.1f} ({:.1f})".format(*last))
        assert cells in shown, cells


def test_the_table_of_the_claim_and_its_verdict_are_those_of_the_logs():
    """Seed by seed, with mean and standard deviation, and no run left out; paired differences with Student's 2.776
    for five pairs and 4.303 for three."""
    heads = r"^\| accuracy on test images, %, by seed \|(.+)\| mean ± std \|\n.+\n((\| .+\n)+)"
    table = re.search(heads, README, re.MULTILINE)
    seeds, shown = [seed.strip() for seed in table[1].split("|")], {}
    for line in table[2].splitlines():
        row, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = {
            "the teacher": "resnet8",
            "no guidance": "deit_mini-none",
            "resnet20, a CNN of similar cost": "resnet20",
        }
        shown[names.get(row, f"deit_mini-{row.replace(', beta ', '-')}")] = cells
    logs = {
        path.stem: records_of(path)[-1]["val_acc"] for path in (HERE / "results/claim/test").glob("*.jsonl")
    }
    values = {name: [logs.pop(f"{name}-seed{seed}", None) for seed in seeds] for name in shown}
    assert not logs
    for name, cells in shown.items():
        each, there = ["–" if x is None else f"{x:.2f}" for x in values[name]], [x for x in values[name] if x]
        spread = f" ± {np.std(there, ddof=1):.2f}" if len(there) > 1 else ""
        assert cells == [*each, f"{np.mean(there):.2f}{spread}"], name
    values = {name: np.array(row, float) for name, row in values.items()}
    for beta, words, interval in (
        (9, "points above constant 9, the best on held-out images", "95% interval {:.2f} to {:.2f}"),
        (15, "points above constant 15, about early 90's mean", "early 90's mean ({:.2f} to {:.2f})"),
    ):
        gain = values["deit_mini-early-90"] - values[f"deit_mini-constant-{beta}"]
        middle, spread = gain.mean(), gain.std(ddof=1)
        half = 2.776 * spread / len(gain) ** 0.5
        assert len(gain) == 5 and f"{middle:.2f} ± {spread:.2f} {words}" in README
        assert interval.format(middle - half, middle + half) in README
        assert middle > half  # it is told apart, and early is ahead
    gain = (values["deit_mini-early-90"] - values["deit_mini-constant-90"])[:3]
    middle, spread = gain.mean(), gain.std(ddof=1)
    assert f"{middle:.2f} ± {spread:.2f} points above constant guidance of its initial strength" in README
    assert middle > 4.303 * spread / 3**0.5


def test_when_the_lead_of_early_guidance_arises_is_what_the_logs_say():
    """Early minus constant, epoch by epoch, means of the five pairs."""
    curves = [
        [
            [
                line["val_acc"]
                for line in records_of(HERE / f"results/claim/test/deit_mini-{row}-seed{seed}.jsonl")[1:]
            ]
            for seed in (1, 2, 3, 5, 6)
        ]
        for row in ("constant-9", "early-90")
    ]
    constant, early = np.mean(curves, axis=1)
    lead = early - constant
    cells = [f"{lead[epoch]:+.2f}" for epoch in (8, 19, 20, 33, 40, 59)]
    assert f"\n| points | {' | '.join(cells)} | {lead[55:].mean():+.2f} |\n" in EVIDENCE


def test_what_a_row_of_the_claim_costs_is_what_was_timed():
    """Medians of three turns; 60 epochs, a third of them guided; a teacher of 30 epochs."""
    names = ("deit_mini-none", "deit_mini-constant-9", "resnet20", "resnet8")
    turns = [[HERE / f"results/claim/timed/{name}-turn{turn}.jsonl" for turn in (1, 2, 3)] for name in names]
    times = [np.median([records_of(path)[-1]["seconds"] for path in row]) for row in turns]
    alone, guided, resnet20, resnet8 = times
    said = f"alone {alone:.1f}, guided {guided:.1f}; resnet20 {resnet20:.1f}, resnet8 {resnet8:.1f}."
    said += f" Guidance adds {100 * (guided / alone - 1):.0f}% to an epoch, so {100 * (guided / alone - 1) / 3:.0f}% to"
    said += (
        f" an early run. Its teacher adds {resnet8 / 2:.1f} minutes to the {alone:.0f} of the student alone: "
    )
    assert f"{said}{100 * resnet8 / 2 / alone:.0f}%" in " ".join(EVIDENCE.split())
    early = 40 * alone + 20 * guided + 30 * resnet8
    assert f"in {60 * resnet20 / early:.2f} of the time, teacher included" in " ".join(EVIDENCE.split())


def test_the_tables_of_the_evidence_are_those_that_plot_has_made():
    """The first of each file, with its machines; test_plot.py holds the files to the committed logs."""
    folders = "cifar100-20classes cifar100 glyphs glyphs/timed claim claim/test claim/histology"
    for folder in folders.split():
        text = (HERE / "figures" / folder / "table.md").read_text()
        assert "\n\n".join(text.split("\n\n")[:2]) in EVIDENCE


def test_the_speed_of_the_readme_is_what_was_timed():
    """Also the minutes of 300 epochs of 390 steps, of which early guidance guides a third."""
    file = json.loads((HERE / "results/bench/h200-graphs.json").read_text())
    rows = {row["name"]: row["ms_per_step"] for row in file["rows"]}
    graphs = "torch.compile with CUDA graphs"
    names = ("alone, eager", f"alone, {graphs}", f"guided by ResNet-56, {graphs}")
    eager, alone, guided = (rows[name] for name in names)
    said = f"takes {eager:.1f} ms eager, {alone:.1f} ms with CUDA graphs, the default in long runs, and"
    assert f"{said} {guided:.1f} ms guided" in " ".join(README.split())
    minutes = {round(300 * 390 * ms / 60000) for ms in (alone, (2 * alone + guided) / 3)}
    assert minutes == {17} and "take 17 minutes, alone or guided early" in README


def test_other_numbers_of_the_readme_are_those_of_the_logs():
    """beta's mean in the claim's early runs, "about" that of constant 15; how strong guidance is at first in the
    main command."""
    lines = records_of(HERE / "results/claim/test/deit_mini-early-90-seed1.jsonl")[1:]
    mean = np.mean([line["beta"] for line in lines]) + 1e-9
    assert abs(mean - 15) < 1 and f"Early 90 has a mean beta of {mean:.1f}" in EVIDENCE
    first = records_of(HERE / "results/glyphs/deit_mini-early-seed0.jsonl")[1]
    assert f"{first['beta'] * first['loss_guidance'] / first['loss_cls']:.0f} times as large" in README


def test_the_table_of_the_ablations_is_that_of_the_logs():
    for run in ("deit_mini-early", "ablations/sum", "ablations/train-mode"):
        logs = [HERE / f"results/glyphs/{run}-seed{seed}.jsonl" for seed in (0, 1)]
        shown = " | ".join(f"{records_of(log)[-1]['val_acc']:.2f}" for log in logs)
        assert sum(f"| {shown} |" in line for line in EVIDENCE.splitlines()) == 1, run


def test_the_weights_that_are_handed_out_are_those_of_their_log_and_get_71_percent_right():
    """On a tenth of the test images, evenly spaced, where CIFAR-100 is at hand: 71.9 +- 3 x 1.4 points."""
    model, state = restore(HERE / "results/weights/resnet56-cifar100.pt")
    origin, *lines = map(
        json.loads, (HERE / "results/cifar100/resnet56-seed0.jsonl").read_text().splitlines()
    )
    assert state["history"] == lines and state["args"] == origin["args"]
    assert state["origin"]["command"] == "python train.py --dataset cifar100 --model resnet56"
    assert f"{lines[-1]['val_acc']:.2f}%" in README and state["data"]["class_names"][57] == "pear"
    if CIFAR.exists():
        with np.load(CIFAR) as arrays:
            images, labels = arrays["x_test"][::10], arrays["y_test"][::10]
        with torch.no_grad():
            logits, _ = model(prepare(torch.from_numpy(images).permute(0, 3, 1, 2), 32))
        right = 100 * (logits.argmax(dim=1).numpy() == labels).mean()
        assert abs(right - lines[-1]["val_acc"]) < 4.2


def easy_tree(root):
    """Two classes that differ in brightness, without a split."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(("dark", "light")):
        (root / name).mkdir(parents=True)
        for j in range(50):
            pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8) + np.uint8(130 * i)
            Image.fromarray(pixels).save(root / name / f"{j}.png")


@pytest.mark.slow
def test_every_training_command_of_the_readme_runs_scaled_down(monkeypatch):
    """To the end, on easy images, at 32 px, for one epoch. `python train.py` itself is what .ci/run runs, and
    torchrun has a test of its own."""
    easy_cache(Path("data/cifar100.npz"), 80)
    easy_tree(Path("DIR"))
    found = re.findall(r"(?:^    |`)python train\.py( [^`|\n]+)", README, re.MULTILINE)
    commands = sorted({text.strip() for text in found})
    assert len(commands) == 7, commands
    for recipe in train.RECIPES.values():
        for key, value in dict(
            epochs=1, batch_size=40, image_size=32, patch_size=8, cnn_batch_size=16
        ).items():
            monkeypatch.setitem(recipe, key, value)
        monkeypatch.setitem(recipe, "teacher", "resnet8")
        monkeypatch.setitem(recipe, "cnn_epochs", 6)
        monkeypatch.setitem(recipe, "classes", None)  # the easy images have ten of a hundred
    arrays = few_glyphs()
    monkeypatch.setattr(data, "glyphs", lambda: arrays)
    for text in commands:
        argv = shlex.split(text)
        more = ["--epochs", "1"] if "--model" in argv else []
        command(monkeypatch, *argv, *more, "--out", "run")
        assert len(records("run")[1]) == 1, text
        shutil.rmtree("run")


def test_the_readmes_own_transformer_trains_under_guidance(monkeypatch):
    space = dict(nn=nn, torchvision=torchvision)
    exec(README.split("```python\n")[2].split("```")[0], space)
    monkeypatch.setitem(train.TRANSFORMERS, "swin", space["Swin"])
    easy_cache(Path("data/cifar10.npz"), 80)
    small = ("--dataset", "cifar10", "--batch-size", 16)
    command(monkeypatch, *small, "--model", "resnet8", "--epochs", 6, "--out", "teacher")
    swin = ("--model", "swin", "--epochs", 3, "--lr", 1e-3, "--image-size", 32, "--schedule", "constant")
    command(monkeypatch, *small, *swin, "--teacher", "teacher/last.pt", "--out", "run")
    lines = records("run")[1]
    assert lines[2]["loss_guidance"] < 0.9 * lines[0]["loss_guidance"]
