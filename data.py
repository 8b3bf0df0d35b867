"""Tiny data sets, held in memory whole: one uint8 tensor (N, 3, S, S) and its labels, no DataLoader, no workers.

What is decoded or downloaded is cached as <root>/<name>.npz. A cache made from files is used only while the
files are unchanged; one without a list of files, such as your own, is used as is, and nothing is downloaded.
"""

import hashlib
import json
import os
import random
from http.client import HTTPException
from itertools import compress, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import datasets

from plumbing.files import InputError, explained, write_whole
from plumbing.images import STORED, Listing, decode, find_images, stamps

CLASSES = {"glyphs": 10, "cifar10": 10, "cifar100": 100, "flowers": 102, "chaoyang": 4, "folder": None}
PARTS = ("train", "test", "other")
ARCHIVES = {
    "cifar10": "cifar-10-python.tar.gz",
    "cifar100": "cifar-100-python.tar.gz",
    "flowers": "102flowers.tgz, imagelabels.mat and setid.mat",
}


class Data(NamedTuple):
    """A data set: images uint8 (N, 3, S, S), labels int64 (N,) from 0 to num_classes - 1.

    `about` tells what they are, for a checkpoint to remember: data set, class names, a digest of each part.
    """

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    num_classes: int
    about: dict = {}
    test_names: list = []  # of the test images: their files, or numbers


class Part(NamedTuple):
    """Images that belong together, as they are stored: uint8 (N, S, S, 3) and labels (N,)."""

    x: np.ndarray
    y: np.ndarray
    digest: str
    names: list

    def only(self, keep, which=""):
        """The images where `keep` (N,) is true. `which` names a choice by position, which depends on file names:
        the digest then covers the chosen images themselves."""
        if keep.all():
            return self  # a copy might not fit into memory
        x, names = self.x[keep], list(compress(self.names, keep))
        digest = self.digest + (which and f", {which} {hashlib.sha256(x).hexdigest()[:16]}")
        return Part(x, self.y[keep], digest, names)


class Source(NamedTuple):
    """What a cache holds. Parts: "train"; "test", to measure on; "other", a folder's second test set."""

    parts: dict
    class_names: list
    files: list | None = None  # the `stamps` of the images, part by part


def load(name, root="data", classes=None, device="cpu", held_out=None, split="test"):
    """Loads a data set, from its cache where there is one.

    Args:
        name: glyphs (generated), cifar10, cifar100, flowers, chaoyang or folder.
        root: where data and caches are kept. For chaoyang, the folder with train.json, test.json and images;
            for folder, one with images in any usual layout (`plumbing.images.find_images`). If that has no
            second split, a fifth of every class becomes the test images.
        classes: keep only the first `classes` classes, for a quick run.
        device: where the tensors of the returned `Data` are put.
        held_out: the fraction of the training images that takes the place of the test images (`hold_out`).
        split: "other" uses test/ in place of val/, in a folder that has both.

    Raises:
        InputError: unknown name; missing, damaged or inconsistent files; no network.
    """
    if name not in CLASSES:
        raise InputError(f"unknown data set {name!r}: choose one of {', '.join(CLASSES)}")
    parts, class_names, _ = open_source(name, Path(root))
    if classes is not None and not 2 <= classes <= len(class_names):
        raise InputError(f"cannot use {classes} classes of {name}: choose from 2 to {len(class_names)}")
    class_names = class_names[:classes]
    if "test" not in parts:
        print(f"note: {root} has no val/ or test/: a fifth of every class is held out to measure on")
        fifth = hold_out(parts["train"].y, 0.2)
        parts["test"] = parts["train"].only(fifth, "a fifth")
        parts["train"] = parts["train"].only(~fifth, "four fifths")
    if split not in parts:
        raise InputError(f"{root} has no second split, no test/ beside val/: leave out --split")
    train, test = (parts[key].only(parts[key].y < len(class_names)) for key in ("train", split))
    if not (len(train.y) and len(test.y)):
        raise InputError(f"{name} has no image of the first {classes} classes; choose more classes")
    if held_out is not None:
        held = hold_out(train.y, held_out)
        test = train.only(held, "held out") if split == "test" else test
        train = train.only(~held, "but for held-out")
    report_copies(name, train.x, test.x, "test" if held_out is None or split == "other" else "held-out")
    about = dict(dataset=name, class_names=class_names, held_out=held_out)
    about |= dict(train=train.digest, test=test.digest)
    tensors = [
        tensor.contiguous().to(device)
        for x, y, *_ in (train, test)
        for tensor in (torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(y))
    ]
    return Data(*tensors, len(class_names), about, test.names)


def report_copies(name, x_train, x_test, kind):
    """Warns when test images are training images too; in a folder they were most likely copied by mistake."""
    seen = {hash(image.tobytes()) for image in x_train}
    if known := sum(hash(image.tobytes()) in seen for image in x_test):
        print(
            f"note: {known} of the {len(x_test)} {kind} images of {name} are training images too, pixel for "
            "pixel: on these, accuracy only measures memory"
        )


def hold_out(labels, fraction):
    """Which images to hold out: (N,) labels -> (N,) bool, about `fraction` of every class, always the same ones.

    At least one image of each class is held out, unless the class has only one, which is trained on.
    """
    random_state, held = np.random.RandomState(0), np.zeros(len(labels), bool)
    for label in np.unique(labels):  # RandomState's numbers are the same in every version of numpy
        places = random_state.permutation(np.flatnonzero(labels == label))
        held[places[: min(max(1, round(fraction * len(places))), len(places) - 1)]] = True
    if not held.any():
        raise InputError("no class has two images, so none can be held out; add images")
    return held


def open_source(name, root):
    """A data set from its cache, or made anew and cached if there is none or its files have changed."""
    if name == "glyphs":  # named by version: another Pillow draws letters a few levels differently
        arrays = glyphs()
        digests = ["glyphs 1, training", "glyphs 1, test"]
        return Source(make_parts(dict(train=arrays[:2], test=arrays[2:]), digests), list(GLYPHS))
    cache, listing = root / f"{name}.npz", None
    source = read_cache(cache, name)
    if name in ("folder", "chaoyang") and not (source and source.files is None):
        listing = find_images(root) if name == "folder" else chaoyang(root)
        print(*[f"note: {line}\n" for line in listing.notes], sep="", end="")
    if source and (listing is None or source.files == stamps(listing)):
        return source
    if listing:  # val/ measures; test/ beside it is left for later
        files, splits = stamps(listing), decode(listing)  # in this order, as a file may change meanwhile
        roles = dict(train="train", val="test", test="other")
        arrays = {roles[split]: (x, y) for split, (x, y, _) in splits.items()}
        digests = [digest for *_, digest in splits.values()]
        source = Source(make_parts(arrays, digests, files), listing.classes, files)
    else:
        source = flowers(root) if name == "flowers" else cifar(root, name)
    write_cache(cache, source)
    return source


def make_parts(arrays, digests=None, files=None):
    """The parts of a `Source`, from {part: (x, y)}. Without digests of files, the arrays are hashed."""
    names, parts = iter([line.split("\0")[0] for line in files or []]), {}
    for i, (part, (x, y)) in enumerate(arrays.items()):
        y = y.astype(np.int64)  # from any kind of integer
        digest = digests[i] if digests else hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()[:16]
        numbers = map(str, range(len(y)))
        parts[part] = Part(x, y, digest, list(islice(names if files else numbers, len(y))))
    return parts


def read_cache(path, name):
    """The `Source` in an .npz file, checked, or None if there is none."""
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as file:  # a pickle could run anything
            given = {"train"} | {key[2:] for key in file if key.startswith(("x_", "y_"))}
            if odd := given.difference(PARTS):
                raise ValueError(
                    f"its parts may be {', '.join(PARTS)}, not {', '.join(sorted(odd))}: rename them"
                )
            arrays = {part: (file[f"x_{part}"], file[f"y_{part}"]) for part in PARTS if part in given}
            names = ("class_names", "digests", "files")
            class_names, digests, files = (file[k].astype(str).tolist() if k in file else None for k in names)
    except MemoryError as error:
        raise InputError(f"{path} does not fit into memory ({error}); free some, or delete it") from error
    except Exception as error:  # damaged, pickled, no zip file: numpy raises many things
        raise InputError(f"{path} is not a usable cache ({error}); delete it to have it remade") from error
    num_classes = check(arrays, CLASSES[name] or class_names and len(class_names), path)
    class_names = class_names or [f"class {k}" for k in range(num_classes)]
    if len(class_names) != num_classes or len(digests or arrays) != len(arrays):
        raise InputError(
            f"{path} holds {len(class_names)} class_names for {num_classes} classes and {len(digests or [])} "
            f"digests for {len(arrays)} splits. Delete it to have it made again"
        )
    return Source(make_parts(arrays, digests, files), class_names, files)


def write_cache(path, source):
    """Keeps a source for the next run, where the folder can be written to."""
    known = dict(class_names=source.class_names, digests=[part.digest for part in source.parts.values()])
    for name, part in source.parts.items():
        known |= {f"x_{name}": part.x, f"y_{name}": part.y}
    known |= dict(files=source.files) if source.files is not None else {}
    try:
        write_whole(path, lambda file: np.savez(file, **known))
    except InputError as error:
        print(f"note: no cache could be written, so images are decoded at every start: {error}")


def check(arrays, num_classes, source):
    """Checks arrays of square images and their labels; returns num_classes (if None, the labels' own)."""
    (first, labels), *_ = arrays = list(arrays.values())
    known = num_classes  # if unknown, labels that begin at 1 would add an empty class
    for x, y in arrays:
        square = x.dtype == np.uint8 and x.ndim == 4 and x.shape[1:] == (*first.shape[1:2] * 2, 3)
        if not (square and x.size and y.shape == x.shape[:1] and y.dtype.kind in "iu"):
            problem = f"images {x.dtype} {x.shape} with labels {y.dtype} {y.shape}"
        else:
            num_classes = num_classes or int(y.max()) + 1
            if (known or labels.min() == 0) and 0 <= y.min() <= y.max() < num_classes:
                continue
            problem = f"labels from {y.min()} to {y.max()}, not 0 to {num_classes - 1}"
        raise InputError(
            f"{source} holds {problem}; it must hold x_train, y_train, x_test and y_test, images uint8 "
            "(N, S, S, 3) of one size and N labels each. Delete it to have it made again"
        )
    return num_classes


def cifar(root, name):
    """CIFAR-10 or CIFAR-100 through torchvision, which checks md5 sums."""
    make = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    train, test = (fetch(make, root, name, train) for train in (True, False))
    arrays = {key: (part.data, np.array(part.targets)) for key, part in (("train", train), ("test", test))}
    check(arrays, CLASSES[name], name)
    return Source(make_parts(arrays), list(train.classes))


def flowers(root):
    """Flowers-102 through torchvision; its train and val parts together train (2,040 images), as is usual."""
    arrays = {}
    train, val, test = (
        fetch(datasets.Flowers102, root, "flowers", kind) for kind in ("train", "val", "test")
    )
    with explained("cannot decode flowers", f"delete {root}/flowers-102 and run the same command again"):
        for part, pairs in dict(train=train + val, test=test).items():
            x, y = zip(*((np.asarray(ImageOps.fit(image, (STORED, STORED))), k) for image, k in pairs))
            arrays[part] = np.stack(x), np.array(y)
    return Source(make_parts(arrays), [f"class {k}" for k in range(CLASSES["flowers"])])


def fetch(make, root, name, part):
    """A torchvision data set, downloaded unless its archive is in `root` already."""
    try:
        return make(root, part, download=True)
    except ModuleNotFoundError as error:
        raise InputError(f"reading {name} needs {error.name}: pip install {error.name}") from error
    except (OSError, RuntimeError, EOFError, HTTPException) as error:
        folder = Path(root, "flowers-102" if name == "flowers" else "")
        raise InputError(
            f"cannot fetch {name} ({error}); put {ARCHIVES[name]} into {folder} (again, if damaged or "
            f"incomplete), or a cache {name}.npz (see the README) into {root}, and run the same command again"
        ) from error


def chaoyang(root):
    """The images of Chaoyang (Zhu et al., IEEE TMI 2021), in its official split: 4,021 + 2,139 images."""
    root, splits = Path(os.path.abspath(root)), {}  # not `resolve`: images behind a link may lie elsewhere
    for split, kind in (("train", "train"), ("test", "val")):
        file = root / f"{split}.json"
        remedy = "ask the authors of Chaoyang for the data (see README) and give their folder as --data"
        with explained(f"{file} is missing or not a list of {{name, label}}", remedy):
            rows = json.loads(file.read_text())
            pairs = [(Path(os.path.abspath(root / row["name"])), row["label"]) for row in rows]
            bad = [(p, y) for p, y in pairs if type(y) is not int or not 0 <= y < 4 or root not in p.parents]
            if bad or not pairs:
                raise InputError(
                    f"{file} is empty, or names a file outside {root} or a label outside 0 to 3: {bad[:1]}; "
                    "unpack the data again"
                )
        splits[kind] = pairs
    return Listing(root, ["normal", "serrated", "adenocarcinoma", "adenoma"], splits, [])


GLYPHS = "AHMOTUVWXY"  # letters that look the same in a mirror


def glyphs(train=2500, test=1000, side=64):
    """The generated default: ten classes, one bright letter of any place, size and colour on dark clutter.

    The place of the letter says nothing about its class. A CNN is blind to place by construction; a
    transformer has to learn to be, from few images.
    """
    rng = random.Random(0)  # one fixed data set, whatever the seed of the run
    fonts = [ImageFont.load_default(size) for size in range(22, 31)]
    images, labels = np.empty((train + test, side, side, 3), np.uint8), np.arange(train + test) % len(GLYPHS)

    def colour(low, high):
        return tuple(rng.randint(low, high) for _ in range(3))

    for i, label in enumerate(labels):
        image = Image.new("RGB", (side, side), colour(0, 60))
        pen = ImageDraw.Draw(image)
        for _ in range(12):
            pen.line([rng.uniform(0, side) for _ in range(4)], colour(0, 110), width=2)
        letter, font = GLYPHS[label], rng.choice(fonts)
        left, top, right, bottom = font.getbbox(letter)
        place = rng.uniform(0, side - (right - left)) - left, rng.uniform(0, side - (bottom - top)) - top
        pen.text(place, letter, colour(150, 255), font)
        images[i] = image
    return images[:train], labels[:train], images[train:], labels[train:]
