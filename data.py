"""Tiny data sets, held in memory whole: one uint8 tensor (N, 3, S, S) and its labels, no DataLoader, no workers.

What was decoded or downloaded is cached as <root>/<name>.npz. A cache that was made from files is good for just
these files; one without a list of files, such as a user's own, is used as it is and the network is never asked.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import datasets

from plumbing.files import InputError, explained, write_whole
from plumbing.images import STORED, Listing, decode, find_images, stamps

CLASSES = {"glyphs": 10, "cifar10": 10, "cifar100": 100, "flowers": 102, "chaoyang": 4, "folder": None}
ARCHIVES = {
    "cifar10": "cifar-10-python.tar.gz",
    "cifar100": "cifar-100-python.tar.gz",
    "flowers": "flowers-102/102flowers.tgz",
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
    test_names: list = []  # of the test images, where they have any


class Source(NamedTuple):
    """What a cache holds. Splits: "train"; "test", which measures; "other", a second one that a folder may have.
    Each is images uint8 (N, S, S, 3), labels (N,) and a digest."""

    splits: dict
    class_names: list
    files: list | None = None


def load(name, root="data", classes=None, device="cpu", held_out=None, split="test"):
    """Loads a data set, from its cache where there is one.

    Args:
        name: glyphs (generated), cifar10, cifar100, flowers, chaoyang or folder.
        root: where data and caches are or go. For chaoyang the folder with train.json, test.json and images,
            for folder the one with images in any usual layout (`plumbing.images.find_images`).
        classes: keep the first so many classes only, for a quick run.
        device: where the tensors of the returned `Data` are put.
        held_out: the fraction of the training images that takes the place of the test images (`hold_out`).
            A folder without a second split holds out a fifth.
        split: "other" for the test/ of a folder that has val/ too, which then takes the place of val/.

    Raises:
        InputError: unknown name; missing, damaged or inconsistent files; no network.
    """
    if name not in CLASSES:
        raise InputError(f"unknown data set {name!r}: choose one of {', '.join(CLASSES)}")
    source = open_source(name, Path(root))
    num_classes = len(source.class_names)
    if classes is not None:
        if not 2 <= classes <= num_classes:
            raise InputError(f"cannot use {classes} classes of {name}: choose from 2 to {num_classes}")
        num_classes = classes
    if "test" not in source.splits and held_out is None:
        print(f"note: {root} has no val/ or test/: a fifth of every class is held out to measure on")
        held_out = 0.2
    if split == "test" and held_out is not None:
        split = "train"  # a part of it
    if split not in source.splits:
        raise InputError(f"{root} has no second split: leave --split out")
    parts = []
    for x, y, _ in (source.splits["train"], source.splits[split]):
        keep = y < num_classes
        if not keep.any():
            raise InputError(f"{name} has no image of the first {num_classes} classes; choose more classes")
        parts.append(torch.from_numpy(x[keep]).permute(0, 3, 1, 2).contiguous())  # (N, 3, S, S)
        parts.append(torch.from_numpy(y[keep]).long())
    about = dict(
        dataset=name,
        class_names=source.class_names[:num_classes],
        train=source.splits["train"][2],
        test=source.splits[split][2],
        held_out=held_out,
    )
    names = names_of(source, split, num_classes)
    if held_out is not None:
        held = hold_out(parts[1], held_out)
        if split == "train":
            parts[2:], names = (
                [parts[0][held], parts[1][held]],
                [n for n, is_held in zip(names, held) if is_held],
            )
        parts[:2] = parts[0][~held], parts[1][~held]
    report_copies(name, parts, "test" if held_out is None else "held-out")
    return Data(*(part.to(device) for part in parts), num_classes, about, names)


def names_of(source, split, num_classes):
    """The names of a split's images of the first classes: of its files, or numbers where there are none."""
    labels = source.splits[split][1]
    names = [str(i) for i in range(len(labels))]
    if source.files:  # "split/class/name size time", split by split in the order of the images
        start = sum(len(part[1]) for part in list(source.splits.values())[: list(source.splits).index(split)])
        names = [line.rsplit(" ", 2)[0] for line in source.files[start : start + len(labels)]]
    return [name for name, label in zip(names, labels) if label < num_classes]


def report_copies(name, parts, kind):
    """Says so where images that measure are trained on too; in a folder they are most likely copied by mistake."""
    seen = {hash(image.tobytes()) for image in parts[0].numpy()}
    known = sum(hash(image.tobytes()) in seen for image in parts[2].numpy())
    if known:
        print(
            f"note: {known} of the {len(parts[2])} {kind} images of {name} are training images too, pixel by "
            "pixel: on them accuracy shows memory only"
        )


def hold_out(labels, fraction):
    """Which images to hold out: (N,) labels -> (N,) bool, about `fraction` of every class, always the same ones.

    At least one image of a class is held out, unless it has no other: that one is trained on.
    """
    random_state, held = np.random.RandomState(0), torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():  # RandomState's numbers are the same in every version of numpy
        places = random_state.permutation((labels == label).nonzero()[:, 0].numpy())
        held[places[: min(max(1, round(fraction * len(places))), len(places) - 1)]] = True
    if not held.any():
        raise InputError("no class has two images, so none can be held out; add images")
    return held


def open_source(name, root):
    """A data set from its cache; where there is none, or it is of other files, made anew and cached."""
    if (
        name == "glyphs"
    ):  # a version in place of a digest: another Pillow draws letters a few levels differently
        arrays, digests = glyphs(), ("glyphs 1, training", "glyphs 1, test")
        return Source(dict(zip(("train", "test"), zip(arrays[::2], arrays[1::2], digests))), list(GLYPHS))
    cache, listing = root / f"{name}.npz", None
    source = read_cache(cache, name)
    if name in ("folder", "chaoyang") and not (source and source.files is None):
        listing = find_images(root) if name == "folder" else chaoyang(root)
        print(*[f"note: {line}\n" for line in listing.notes], sep="", end="")
        if source and source.files == stamps(listing):
            return source
    elif source:
        return source
    if listing:
        source = Source(arranged(decode(listing)), listing.classes, stamps(listing))
    else:
        source = flowers(root) if name == "flowers" else cifar(root, name)
    write_cache(cache, source)
    return source


def arranged(splits):
    """A folder's splits by what they are for: val/ measures, or else test/ does; a second one is left for later."""
    names = {"train": "train", "val": "test", "test": "other"}
    return {names[split]: part for split, part in splits.items()}


def read_cache(path, name):
    """The `Source` in an .npz file, checked, or None if there is none."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:  # a pickle could run anything
            splits = ["train", *(split for split in ("test", "other") if f"x_{split}" in file)]
            arrays = [(file[f"x_{split}"], file[f"y_{split}"]) for split in splits]
            known = {key: file[key].tolist() for key in ("class_names", "digests", "files") if key in file}
    except Exception as error:  # damaged, pickled, too large, no zip file: numpy raises many things
        raise InputError(f"{path} is no usable cache ({error}); delete it to have it made again") from error
    num_classes = check(arrays, CLASSES[name] or len(known.get("class_names", ())) or None, path)
    digests = known.get("digests") or [digest(x, y) for x, y in arrays]
    class_names = known.get("class_names") or [f"class {k}" for k in range(num_classes)]
    if (len(class_names), len(digests)) != (num_classes, len(splits)):
        raise InputError(
            f"{path} holds {len(class_names)} class_names for {num_classes} classes and {len(digests)} "
            f"digests for {len(splits)} splits. Delete it to have it made again"
        )
    return Source(
        {s: (*pair, d) for s, pair, d in zip(splits, arrays, digests)}, class_names, known.get("files")
    )


def write_cache(path, source):
    """Keeps a source for the next run, where the folder can be written to."""
    arrays = {
        f"{axis}_{split}": part[i] for split, part in source.splits.items() for i, axis in enumerate("xy")
    }
    known = dict(digests=[part[2] for part in source.splits.values()], class_names=source.class_names)
    known |= dict(files=source.files) if source.files is not None else {}
    try:
        write_whole(path, lambda file: np.savez(file, **arrays, **known))
    except InputError as error:
        print(f"note: no cache is kept, so that images are decoded at every start: {error}")


def check(arrays, num_classes, source):
    """The number of classes (None: what the labels say) of splits of square images, or a refusal."""
    for x, y in arrays:
        square = x.dtype == np.uint8 and x.ndim == 4 and x.shape[1:] == (*arrays[0][0].shape[1:2] * 2, 3)
        if not (square and len(x) and y.shape == x.shape[:1] and y.dtype.kind in "iu"):
            problem = f"images {x.dtype} {x.shape} with labels {y.dtype} {y.shape}"
        else:
            num_classes = num_classes or int(y.max()) + 1
            if arrays[0][1].min() == 0 <= y.min() <= y.max() < num_classes:
                continue
            problem = f"labels from {y.min()} to {y.max()}, not 0 to {num_classes - 1}"
        raise InputError(
            f"{source} holds {problem}; it must hold x_train, y_train, x_test and y_test, images uint8 "
            "(N, S, S, 3) of one size and N labels each. Delete it to have it made again"
        )
    return num_classes


def digest(x, y):
    """What arrays are known by, where there are no files to know them by."""
    return hashlib.sha256(x.tobytes() + y.astype(np.int64).tobytes()).hexdigest()[:16]


def cifar(root, name):
    """CIFAR-10 or CIFAR-100 through torchvision, which checks md5 sums."""
    make = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    train, test = (fetch(make, root, name, train) for train in (True, False))
    arrays = [(part.data, np.array(part.targets)) for part in (train, test)]
    check(arrays, CLASSES[name], name)
    return Source(
        {s: (*pair, digest(*pair)) for s, pair in zip(("train", "test"), arrays)}, list(train.classes)
    )


def flowers(root):
    """Flowers-102 through torchvision; its train and val parts together train (2,040 images), as is usual."""
    arrays = []
    for splits in (("train", "val"), ("test",)):
        x, y = [], []
        for split in splits:
            with explained(
                "cannot decode flowers", f"delete {root}/flowers-102 and run the same command again"
            ):
                for image, label in fetch(datasets.Flowers102, root, "flowers", split):
                    x.append(np.asarray(ImageOps.fit(image, (STORED, STORED), Image.Resampling.BICUBIC)))
                    y.append(label)
        arrays.append((np.stack(x), np.array(y)))
    names = [f"class {k}" for k in range(CLASSES["flowers"])]
    return Source({s: (*pair, digest(*pair)) for s, pair in zip(("train", "test"), arrays)}, names)


def fetch(make, root, name, part):
    """A torchvision data set, downloaded unless its archive is in `root` already."""
    try:
        return make(root, part, download=True)
    except ModuleNotFoundError as error:
        raise InputError(f"torchvision reads {name} with {error.name}: pip install {error.name}") from error
    except (OSError, RuntimeError, EOFError) as error:
        archive = Path(root) / ARCHIVES[name]
        if archive.exists():  # torchvision would have opened it
            raise InputError(
                f"{archive} is damaged, perhaps half a download ({error}); delete it, and fetch it "
                "again or run the same command again"
            ) from error
        raise InputError(
            f"cannot fetch {name} ({error}); put its archive {archive.name}, or a cache {name}.npz "
            f"(see the README), into {root} and run the same command again"
        ) from error


def chaoyang(root):
    """The images of Chaoyang (Zhu et al., IEEE TMI 2021), in its official split: 4,021 + 2,139 images."""
    root, splits = root.resolve(), {}
    for split, kind in (("train", "train"), ("test", "val")):
        file = root / f"{split}.json"
        try:
            pairs = [((root / row["name"]).resolve(), row["label"]) for row in json.loads(file.read_text())]
            bad = [
                (file, label)
                for file, label in pairs
                if type(label) is not int or not 0 <= label < 4 or root not in file.parents
            ]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{file} is missing or no list of {{name, label}} ({error}); ask the authors of "
                "Chaoyang for the data (see README) and give their folder as --data"
            ) from error
        if bad or not pairs:
            raise InputError(
                f"{file} is empty, or names a file outside {root} or a label outside 0 to 3: "
                f"{bad[:1]}; unpack the data again"
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
