"""Using a trained network: naming images, accuracy by class, initial weights for another run, other libraries."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import HERE, command, records
from PIL import Image
from torch import nn

import predict
import train
from augment import prepare
from model import deit_mini, deit_tiny
from plumbing import options, runs
from plumbing.files import InputError
from teacher import resnet8, resnet18


def save_shades(folder, name, shade, count):
    """Images of one class: noise about a shade of grey, learnt at once."""
    (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(len(str(folder)) + shade)
    for i in range(count):
        pixels = rng.integers(0, 40, (40, 50, 3)) + shade
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with photos/ in three splits of two classes, and a network trained on them in `run`."""
    folder = tmp_path_factory.mktemp("predict")
    for split, count in (("train", 40), ("val", 8), ("test", 6)):
        save_shades(folder / "photos" / split, "ant", 20, count)
        save_shades(folder / "photos" / split, "bee", 160, count // 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small = ("--recipe", "small", "--dataset", "folder", "--data", "photos", "--model", "resnet8")
        command(patch, *small, "--batch-size", 16, "--epochs", 8, "--augment", "weak", "--out", "run")
    return folder


@pytest.fixture
def told(photos, monkeypatch, capsys):
    """Runs predict.py in that folder; returns what it printed."""
    monkeypatch.chdir(photos)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, argv)])
        options.command_line(predict.main)
        return capsys.readouterr().out

    return run


def test_images_are_named_with_their_probabilities_and_patterns_are_expanded(told, photos):
    """As cmd and PowerShell leave patterns to the program; no data set is needed."""
    (photos / "photos").rename(photos / "elsewhere")
    try:
        lines = told(
            "run/last.pt", "elsewhere/val/ant/0.png", "elsewhere/val/bee/*.png", "--csv", "named.csv"
        ).splitlines()
    finally:
        (photos / "elsewhere").rename(photos / "photos")
    assert len(lines) == 1 + 4 + 1
    assert lines[0].startswith("elsewhere/val/ant/0.png: ant ") and ", bee " in lines[0]
    assert all(": bee " in line for line in lines[1:5])
    rows = list(csv.DictReader(open(photos / "named.csv")))
    assert [row["prediction"] for row in rows] == ["ant"] + ["bee"] * 4 and rows[0]["truth"] == ""


def test_an_image_is_prepared_as_the_test_images_are(photos, monkeypatch):
    """Their probabilities are those of the tensors that the data set has of the same files."""
    monkeypatch.chdir(photos)
    model, state = runs.restore("run/last.pt")
    paths, images = predict.open_images(["photos/val/ant/3.png"], state["data"]["side"])
    found = predict.probabilities(model, images, 32, runs_precision())
    whole = train.load("folder", "photos")
    expected = model(prepare(whole.x_test[whole.test_names.index("val/ant/3.png")][None], 32))[0].softmax(
        dim=1
    )
    torch.testing.assert_close(found, expected)
    assert found.sum().item() == pytest.approx(1) and paths == [Path("photos/val/ant/3.png")]


def runs_precision():
    return train.pick_device("cpu", None)[1]


def test_without_images_it_measures_what_the_run_measured_class_by_class(told, photos):
    lines = told("run/last.pt", "--csv", "out.csv").splitlines()
    accuracy = records(photos / "run")[1][-1]["val_acc"]
    rows = list(csv.DictReader(open(photos / "out.csv")))
    right = [row["truth"] == row["prediction"] for row in rows]
    assert len(rows) == 12 and 100 * np.mean(right) == pytest.approx(accuracy)
    assert any(line.startswith(f"accuracy {accuracy:.2f}%, balanced accuracy") for line in lines)
    by_class = {line.split()[0]: line.split()[1:3] for line in lines if line.startswith(("ant", "bee"))}
    for name, total in (("ant", 8), ("bee", 4)):
        share = np.mean([ok for row, ok in zip(rows, right) if row["truth"] == name])
        assert by_class[name] == [str(total), f"{100 * share:.1f}%"]
    assert rows[0]["image"] == "val/ant/0.png"
    assert "on 9 images" in told("run/last.pt", "--split", "test")


def test_options_without_effect_are_told(told):
    assert told("run/last.pt", "--top", 2).startswith("note: without images, --top has no effect\n")
    named = told("run/last.pt", "photos/val/ant/0.png", "--data", "gone")
    assert named.startswith("note: when images are given, --data has no effect\n")


def test_images_may_stand_before_and_behind_options(told):
    ant, bee = "photos/val/ant/0.png", "photos/val/bee/0.png"
    lines = told("run/last.pt", "--top", 1, ant, "--csv", "named.csv", bee).splitlines()
    assert [line.split(":")[0] for line in lines] == [ant, bee, "named.csv"]
    assert "ant" in lines[0] and "bee" not in lines[0].split(":")[1]


def test_the_confusion_matrix_is_drawn(told, photos):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; .ci/run installs it")
    told("run/last.pt", "--figure", "confusion.png")
    with Image.open(photos / "confusion.png") as picture:
        assert min(picture.size) > 200


def test_a_figure_that_cannot_be_drawn_is_refused_before_anything_is_read(told):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; .ci/run installs it")
    with pytest.raises(SystemExit, match="cannot draw confusion.txt: give it a name that ends in .png"):
        told("absent.pt", "--figure", "confusion.txt")


def test_names_of_any_bytes_are_told_written_and_drawn(photos, monkeypatch):
    """A class folder that was named on another system; in a process of its own, as pytest reads UTF-8 only."""
    monkeypatch.chdir(photos)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; .ci/run installs it")
    odd, state = os.fsdecode(b"b\xe9$e\nx"), runs.load_checkpoint("run/last.pt")
    shutil.copytree("photos", "odd", ignore=shutil.ignore_patterns("*.npz"))
    for split in ("train", "val", "test"):
        Path("odd", split, "bee").rename(Path("odd", split, odd))
    state["data"] |= {key: value for key, value in train.load("folder", "odd").about.items()}
    torch.save(state, "odd.pt")
    words = ["odd.pt", "--data", "odd", "--csv", "odd.csv", "--figure", "odd.png", "--device", "cpu"]
    ran = subprocess.run([sys.executable, HERE / "predict.py", *words], capture_output=True)
    assert ran.returncode == 0 and b"\n" + os.fsencode(odd) in ran.stdout, ran.stderr
    assert os.fsencode(f"val/{odd}/0.png") in Path("odd.csv").read_bytes() and Path("odd.png").exists()


def test_another_split_is_never_mistaken_for_the_images_held_out(photos, monkeypatch):
    """A run that held a part of train/ out measures itself on that part; --split test still means test/."""
    monkeypatch.chdir(photos)
    whole, held = train.load("folder", "photos"), train.load("folder", "photos", held_out=0.25)
    other = train.load("folder", "photos", held_out=0.25, split="other")
    assert held.test_names[0].startswith("train/") and len(held.x_test) == 15
    assert other.test_names[0].startswith("test/") and len(other.x_test) == 9
    assert torch.equal(other.x_train, held.x_train) and len(held.x_train) + 15 == len(whole.x_train)
    with pytest.raises(InputError, match="no second split"):
        train.load("glyphs", held_out=0.25, split="other")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["absent.pt"], "there is no file absent.pt"),
        (["run/last.pt", "absent.jpg"], "there is no image file absent.jpg"),
        (["run/last.pt", "a" * 300], "there is no image file aaa"),
        (["run/last.pt", "link.jpg"], "there is no image file link.jpg"),  # to a name that is too long
        (["run/last.pt", "photos"], "there is no image file photos; name files, or a pattern"),
        (["run/last.pt", "photos/val/*"], r"there is no image file photos/val/\*"),  # only folders
        (["run/last.pt", "run/log.jsonl"], "cannot read 1 images"),
        (["run/last.pt", "--top", "0"], "--top must be at least 1"),
        (["run/last.pt", "photos/val/ant/0.png", "--split", "test"], "apply to a data set"),
        (["run/last.pt", "--data", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(told, argv, message):
    if "link.jpg" in argv:
        Path("link.jpg").symlink_to("a" * 300)
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as stop:
        told(*argv)
    assert "\n" not in str(stop.value)


def test_the_interval_of_an_accuracy_is_wilsons():
    """Of 10 cases and 5 right 23.7 to 76.3%, of 20 and none 0 to 16.1% (textbook values)."""
    assert predict.interval(0.5, 10) == pytest.approx((23.7, 76.3), abs=0.05)
    assert predict.interval(0.0, 20) == pytest.approx((0.0, 16.1), abs=0.05)


def test_balanced_accuracy_is_the_mean_over_the_classes_that_occur():
    """99 right of 99, 0 of 1, and a class without images: 50%, not 99%."""
    confusion = torch.tensor([[99, 0, 0], [1, 0, 0], [0, 0, 0]])
    assert runs.accuracies(confusion) == (99.0, 50.0)


# ------------------------------------------------------------------------------------- initial weights


def test_init_takes_our_checkpoint_and_starts_a_head_of_another_size_anew(photos, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    model, _ = runs.restore("run/last.pt")
    same, other = resnet8(2), resnet8(5)
    runs.initialise(same, "run/last.pt")
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values()))
    head = other.fc.weight.clone()
    runs.initialise(other, "run/last.pt")
    assert torch.equal(other.conv1.weight, model.conv1.weight) and torch.equal(other.fc.weight, head)
    assert (
        "fc.weight and fc.bias start afresh: the file has none for these classes" in capsys.readouterr().out
    )
    with pytest.raises(
        InputError,
        match=r"does not hold weights for this network \(.*: (\S+ ){3}and \d+ more\); choose another",
    ):
        runs.initialise(deit_mini(2), "run/last.pt")
    torch.save(other.state_dict() | {"head_dist": head}, "more.pt")
    with pytest.raises(InputError, match=r"\(missing, unused or of another shape: head_dist\); choose"):
        runs.initialise(other, "more.pt")


def test_init_takes_torchvisions_and_timms_weights(tmp_path):
    theirs = torchvision.models.resnet18(num_classes=7)
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    ours = resnet18(3)
    runs.initialise(ours, tmp_path / "resnet18.pth")
    assert torch.equal(ours.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    headless = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc")}
    torch.save({"state_dict": headless, "epoch": 3}, tmp_path / "wrapped.pth")
    ours = resnet18(3)
    runs.initialise(ours, tmp_path / "wrapped.pth")
    assert torch.equal(ours.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    timm = pytest.importorskip("timm", reason="timm is not installed; .ci/run installs it")
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=1000)
    torch.save(theirs.state_dict(), tmp_path / "deit.pth")
    ours = deit_tiny(3)
    runs.initialise(ours, tmp_path / "deit.pth")
    assert torch.equal(ours.blocks[5].mlp.fc1.weight, theirs.blocks[5].mlp.fc1.weight)


def test_a_run_starts_from_the_weights_it_is_given(photos, monkeypatch):
    """With a learning rate of almost nothing it ends where the first run ended."""
    monkeypatch.chdir(photos)
    small = (
        "--recipe",
        "small",
        "--dataset",
        "folder",
        "--data",
        "photos",
        "--model",
        "resnet8",
        "--batch-size",
        16,
    )
    command(monkeypatch, *small, "--epochs", 1, "--lr", 1e-12, "--init", "run/last.pt", "--out", "again")
    first, again = (runs.load_checkpoint(f"{name}/last.pt")["model"] for name in ("run", "again"))
    torch.testing.assert_close(again["conv1.weight"], first["conv1.weight"])
    shutil.rmtree("again")
    with pytest.raises(SystemExit, match="there is no file absent.pt"):
        command(monkeypatch, *small, "--init", "absent.pt", "--out", "again")


# ------------------------------------------------------------------------------------------- elsewhere


@pytest.mark.parametrize(
    "network, side", [(deit_mini(4), 32), (resnet8(4), 32), (resnet18(4), 64), (deit_tiny(4), 224)]
)
def test_every_network_can_be_exported_with_a_free_batch_size(network: nn.Module, side):
    network.eval()
    images = torch.randn(3, 3, side, side)
    exported = torch.export.export(network, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(images)[0], network(images)[0])
