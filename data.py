"""Tiny data sets, held in memory whole: one uint8 tensor (N, 3, S, S) and its labels, no DataLoader, no workers.

Decoded sets are cached as <root>/<name>.npz, and a cache that is there is used without asking the network.
"""

import json
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import datasets

from plumbing.files import InputError, write_whole

CLASSES = {"glyphs": 10, "cifar10": 10, "cifar100": 100, "flowers": 102, "chaoyang": 4, "folder": None}
ARRAYS = ("x_train", "y_train", "x_test", "y_test")  # images uint8 (N, S, S, 3), labels (N,)
STORED = 256  # pixels: photographs are stored no larger
# A small file can hold an image that fills the memory: above 89 million pixels, where Pillow warns, we refuse
warnings.simplefilter("error", Image.DecompressionBombWarning)


class Data(NamedTuple):
    """A data set: images uint8 (N, 3, S, S), labels int64 (N,) from 0 to num_classes - 1."""

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    num_classes: int


def load(name, root="data", classes=None, device="cpu", held_out=None):
    """Loads a data set, from its cache where there is one.

    Args:
        name: glyphs (generated), cifar10, cifar100, flowers, chaoyang or folder.
        root: where data and caches are or go. For chaoyang the folder with train.json, test.json and images,
            for folder the one with train/<class>/* and val/<class>/*.
        classes: keep the first so many classes only, for a quick run.
        device: where the tensors of the returned `Data` are put.
        held_out: the fraction of the training images that takes the place of the test images (`hold_out`).

    Raises:
        InputError: unknown name; missing, damaged or inconsistent files; no network.
    """
    if name not in CLASSES:
        raise InputError(f"unknown data set {name!r}: choose one of {', '.join(CLASSES)}")
    cache, files = Path(root) / f"{name}.npz", listing(root) if name == "folder" else []
    arrays = glyphs() if name == "glyphs" else read_cache(cache, files)
    if arrays is None:
        arrays = {"folder": folder, "chaoyang": chaoyang, "flowers": flowers}.get(name, cifar)(root, name)
        check(arrays, CLASSES[name], name)
        write_whole(cache, lambda file: np.savez(file, files=files, **dict(zip(ARRAYS, arrays))))
    num_classes = check(arrays, CLASSES[name], cache)
    if classes is not None:
        if not 2 <= classes <= num_classes:
            raise InputError(f"cannot use {classes} classes of {name}: choose from 2 to {num_classes}")
        num_classes = classes
    parts = []
    for x, y in (arrays[:2], arrays[2:]):
        keep = y < num_classes
        if not keep.any():
            raise InputError(f"{name} has no image of the first {num_classes} classes; choose more classes")
        parts.append(torch.from_numpy(x[keep]).permute(0, 3, 1, 2).contiguous())  # (N, 3, S, S)
        parts.append(torch.from_numpy(y[keep]).long())
    if held_out is not None:
        held = hold_out(parts[1], held_out)
        parts = [parts[0][~held], parts[1][~held], parts[0][held], parts[1][held]]
    name_of = "test" if held_out is None else "held-out"
    seen = {hash(image.tobytes()) for image in parts[0].numpy()}
    known = sum(hash(image.tobytes()) in seen for image in parts[2].numpy())
    if known:  # in a folder most likely copies by mistake
        print(
            f"note: {known} of the {len(parts[2])} {name_of} images of {name} are training images too, pixel by "
            "pixel: on them accuracy shows memory only"
        )
    return Data(*(part.to(device) for part in parts), num_classes)


def fingerprint(data):
    """What a checkpoint remembers of its data, so that it is never used with others."""
    return dict(
        num_classes=data.num_classes,
        train_images=len(data.x_train),
        train_crc=crc32(data.y_train.cpu().numpy()),
        test_crc=crc32(data.x_test.cpu().numpy()),
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


def check(arrays, num_classes, source):
    """The number of classes (None: what the labels say) of two sets of square images, or a refusal."""
    for x, y in (arrays[:2], arrays[2:]):
        square = x.dtype == np.uint8 and x.ndim == 4 and x.shape[1:] == (*arrays[0].shape[1:2] * 2, 3)
        if not (square and len(x) and y.shape == x.shape[:1] and y.dtype.kind in "iu"):
            problem = f"images {x.dtype} {x.shape} with labels {y.dtype} {y.shape}"
        else:
            num_classes = num_classes or int(y.max()) + 1
            if 0 <= y.min() <= y.max() < num_classes:
                continue
            problem = f"labels from {y.min()} to {y.max()}, not 0 to {num_classes - 1}"
        raise InputError(
            f"{source} holds {problem}; it must hold {', '.join(ARRAYS)}, images uint8 "
            "(N, S, S, 3) of one size and N labels each. Delete it to have it made again"
        )
    return num_classes


def read_cache(path, files):
    """The four arrays of an .npz file, or None if it is not there or was made from other `files`."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:  # a pickle could run anything
            if len(files) and "files" in file and file["files"].tolist() != files:
                return None
            return [file[key] for key in ARRAYS]
    except Exception as error:  # damaged, pickled, too large, no zip file: numpy raises many things
        raise InputError(f"{path} is no usable cache ({error}); delete it to have it made again") from error


def cifar(root, name):
    """CIFAR-10 or CIFAR-100 through torchvision, which checks md5 sums."""
    make = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    train, test = (fetch(make, root, name, train) for train in (True, False))
    return train.data, np.array(train.targets), test.data, np.array(test.targets)


def flowers(root, name):
    """Flowers-102 through torchvision; its train and val parts together train (2,040 images), as is usual."""
    parts = [fetch(datasets.Flowers102, root, name, split) for split in ("train", "val", "test")]
    (x1, y1), (x2, y2), test = (decode(part.__getitem__, len(part), STORED) for part in parts)
    return np.concatenate((x1, x2)), np.concatenate((y1, y2)), *test


def fetch(make, root, name, part):
    """A torchvision data set, downloaded unless its archive is in `root` already."""
    try:
        return make(root, part, download=True)
    except ModuleNotFoundError as error:
        raise InputError(f"torchvision reads {name} with {error.name}: pip install {error.name}") from error
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"cannot fetch {name} ({error}); put its archive, or a cache {name}.npz (see the "
            f"README), into {root} and run the same command again"
        ) from error


def folder(root, name):
    """Anyone's images: <root>/train/<class>/* and <root>/val/<class>/*, classes in alphabetical order."""
    try:
        train = datasets.ImageFolder(Path(root) / "train", loader=open_image, is_valid_file=readable)
        val = datasets.ImageFolder(Path(root) / "val", loader=open_image, is_valid_file=readable)
    except OSError as error:
        raise InputError(f"{error}; --data must hold train/<class>/* and val/<class>/* images") from error
    if len(train.classes) < 2 or train.classes != val.classes:
        raise InputError(
            f"{root}: train has the classes {train.classes}, val {val.classes}; two or more are "
            "needed, the same in both"
        )
    sides = [min(open_image(file, decoded=False).size) for file, _ in train.samples]
    side = min(STORED, int(np.median(sides)))  # small images are not stored enlarged
    return *decode(train.__getitem__, len(train), side), *decode(val.__getitem__, len(val), side)


def readable(path):
    """Whether Pillow reads files with this ending."""
    return Image.registered_extensions().get(Path(path).suffix.lower()) in Image.OPEN


def listing(root):
    """Name, size and time of every file under train/ and val/: a folder's cache is good for just these."""
    paths = [path for split in ("train", "val") for path in sorted((Path(root) / split).rglob("*"))]
    stats = [(path.relative_to(root), path.stat()) for path in paths if path.is_file()]
    return [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]


def chaoyang(root, name):
    """Chaoyang (Zhu et al., IEEE TMI 2021), from its authors, in its official split: 4,021 + 2,139 images."""
    root, arrays = Path(root).resolve(), []
    for split in ("train", "test"):
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
        arrays += decode(lambda i, pairs=pairs: (open_image(pairs[i][0]), pairs[i][1]), len(pairs), STORED)
    return arrays


def open_image(path, decoded=True):
    """Any image file with 8 bits a channel -> an upright Pillow RGB image; or just its header."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"it has more than 8 bits a channel, mode {image.mode}")
            if not decoded:
                return image
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:  # what shows through is white
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # Pillow raises whatever a damaged file provokes
        raise InputError(f"cannot read {path} ({error}); replace it, or take it out") from error


def decode(get, count, side):
    """get(i) -> (Pillow image, label) for i below count -> arrays (count, side, side, 3) and (count,)."""
    print(f"decoding {count} images to {side} x {side} pixels, once")

    def one(i):  # the middle square, bicubic
        try:
            image, label = get(i)
        except OSError as error:  # of torchvision; `open_image` names the file
            raise InputError(f"cannot decode image {i} ({error}); fetch the data again") from error
        return np.asarray(ImageOps.fit(image, (side, side), Image.BICUBIC)), label

    with ThreadPoolExecutor() as pool:  # threads suffice: Pillow lets others run while it decodes
        images, labels = zip(*pool.map(one, range(count)))
    return np.stack(images), np.array(labels)


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
