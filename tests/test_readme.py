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
from plumbing.runs import restore

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


def test_the_last_lines_of_the_main_command_are_those_of_its_log():
    *_, before, last = records_of(HERE / "results/glyphs/deit_mini-early-seed0.jsonl")
    for line in (before, last):
        beginning = f"epoch {line['epoch']:3d}  beta {line['beta']:.3f}  loss_cls {line['loss_cls']:.3f}"
        (shown,) = [text for text in README.splitlines() if text.strip().startswith(beginning)]
        assert f"train {line['train_acc']:5.1f}%  val {line['val_acc']:5.1f}%" in shown
    assert f"val_acc {last['val_acc']:.2f}% after the last epoch" in README


def test_the_tables_of_the_readme_are_those_of_the_logs():
    """Mean and standard deviation over the seeds of the generated images; the claim's finished runs, one by one."""
    cells = []
    for row in ("deit_mini-none", "deit_mini-constant", "deit_mini-early", "resnet8"):
        last = [
            records_of(log)[-1]["val_acc"] for log in (HERE / "results/glyphs").glob(f"{row}-seed?.jsonl")
        ]
        assert len(last) == 3
        cells.append(f"{np.mean(last):.2f} ± {np.std(last, ddof=1):.2f}")
    assert f"| `python train.py` | {' | '.join(cells)} |" in README

    last = {path.stem: records_of(path)[-1] for path in (HERE / "results/claim/test").glob("*.jsonl")}
    table = re.search(
        r"^\| accuracy on test images, %, by seed \|(.+)\|\n.+\n((\| .+\n)+)", README, re.MULTILINE
    )
    seeds, shown = [seed.strip() for seed in table[1].split("|")], {}
    for line in table[2].splitlines():
        row, *values = [cell.strip() for cell in line.strip("|").split("|")]
        name = "resnet8" if row == "the teacher" else f"deit_mini-{row.replace(', beta ', '-')}"
        shown |= {f"{name}-seed{seed}": value for seed, value in zip(seeds, values, strict=True) if value}
    assert shown == {run: f"{line['val_acc']:.2f}" for run, line in last.items()}
    assert {len(records_of(path)) for path in (HERE / "results/claim/test").glob("deit*.jsonl")} == {61}


def test_the_tables_of_the_evidence_are_those_that_plot_has_made():
    """The first of each file, with its machines; test_plot.py holds the files to the committed logs."""
    for folder in ("cifar100-20classes", "cifar100", "glyphs", "claim"):
        text = (HERE / "figures" / folder / "table.md").read_text()
        assert "\n\n".join(text.split("\n\n")[:2]) in EVIDENCE


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
    assert len(commands) == 8, commands
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
