"""What several test files share: small data sets, the command line as function and as process, runs' files.

Import the functions with `from conftest import ...`; pytest finds the fixtures by itself.
"""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from plumbing import options, runs

HERE = Path(__file__).parents[1]  # the project
CIFAR = HERE / "data" / "cifar100.npz"  # real images, where they are at hand


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    """Every test starts in an empty folder: the runs and data of a used checkout change no outcome."""
    monkeypatch.chdir(tmp_path)


class Malicious:
    """Unpickling it would run a program."""

    def __reduce__(self):
        return os.system, ("touch executed",)


# ------------------------------------------------------------------------------------------ small data sets


@functools.cache
def few_glyphs():
    """A seventh of the generated set: 320 training and 100 test images."""
    return data.glyphs(train=320, test=100)


@pytest.fixture
def small_glyphs(monkeypatch, tmp_path):
    """The main command cut down, in an empty folder: few images, 3 epochs at 32 px. Returns the folder."""
    arrays = few_glyphs()
    monkeypatch.setattr(data, "glyphs", lambda: arrays)
    for option, value in dict(epochs=3, image_size=32, patch_size=8).items():
        monkeypatch.setitem(train.RECIPES["glyphs"], option, value)
    return tmp_path


def small_cache(path, **changes):
    """Writes a cache of 20 + 10 images of noise, 10 classes; `changes` replace arrays, None drops one."""
    rng = np.random.default_rng(0)
    arrays = dict(
        x_train=rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8),
        y_train=np.arange(20) % 10,
        x_test=rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8),
        y_test=np.arange(10),
    )
    arrays = {key: value for key, value in {**arrays, **changes}.items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return arrays


def easy_cache(path, count=160):
    """Writes a cache of ten classes that differ in brightness: learnt at once, so no teacher is at chance."""
    rng, (train_labels, test_labels) = np.random.default_rng(0), (np.arange(n) % 10 for n in (count, 50))
    x_train, x_test = (
        (rng.integers(0, 120, (len(y), 32, 32, 3)) + 13 * y[:, None, None, None]).astype(np.uint8)
        for y in (train_labels, test_labels)
    )
    small_cache(path, x_train=x_train, y_train=train_labels, x_test=x_test, y_test=test_labels)


def save_images(folder, count=3, side=20, mode="RGB", suffix="png"):
    """Writes image files of noise, side x side, side x (side + 1), ..."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(folder)))
    for i in range(count):
        image = Image.fromarray(rng.integers(0, 256, (side, side + i, 3), dtype=np.uint8)).convert(mode)
        image.save(folder / f"image {i}.{suffix}")


def small_tree(root):
    """Writes a data set for --dataset folder, of two classes. Returns its folder."""
    for split in ("train", "val"):
        for name in ("cat", "dög"):
            save_images(root / split / name)
    return root


# ----------------------------------------------------------------------------------------- the command line


def command(monkeypatch, *argv):
    """`python train.py ...` in this process: an error ends it with SystemExit."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        options.command_line(train.main)
    finally:
        signal.signal(signal.SIGTERM, handler)


def process(folder, *argv, launcher=()):
    """`python train.py ...` as a process of its own, in `folder`, on one thread; launcher: ("-m", "...")."""
    return subprocess.Popen(
        [sys.executable, *launcher, HERE / "train.py", *map(str, argv)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


# --------------------------------------------------------------------------------------------- a run's files


def records_of(path):
    """The lines of a log, as dictionaries."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def records(folder):
    """Where the run of a folder comes from, and its epochs."""
    origin, *epochs = records_of(Path(folder, "log.jsonl"))
    return origin, epochs


def same_runs(one, two):
    """Whether two folders hold the same weights, optimiser state and log, bit for bit, times apart."""

    def timeless(folder):
        times = ("seconds", "images_per_second")
        return [{key: line[key] for key in line if key not in times} for line in records(folder)[1]]

    def same(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(same, a, b))
        return a == b

    states = [runs.load_checkpoint(Path(folder, "last.pt")) for folder in (one, two)]
    parts = "model projections optimizer scheduler scaler generator guiding adaptive".split()
    return timeless(one) == timeless(two) and all(same(states[0][part], states[1][part]) for part in parts)
