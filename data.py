"""Tiny data sets, held in memory whole, and their augmentation: per image, batched, on the training device.

A tiny data set is one uint8 tensor (N, 3, S, S) and its labels: no DataLoader, no workers. Decoded sets are
cached as <root>/<name>.npz, and a cache that is there is used without asking the network.

`batches` is an epoch. `augment` is the recipe of DeiT and the LG code: random resized crop, flip, RandAugment
rand-m9-mstd0.5-inc1 (timm's; much stronger than torchvision's magnitude 9), random erasing. Its steps:

    draw      all random choices of the epoch, on the CPU, from one seeded generator: the same on every
              device, and as the host knows which image gets which operation, nothing waits for the device
    resample  crop, resize and flip: each axis by itself, so two small matrix products for the whole batch
    move,     an operation that moves or changes colours, at once on the images that drew it, each with a
    recolour  parameter of its own
"""

import json
import math
import os
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF

CLASSES = {"glyphs": 10, "cifar10": 10, "cifar100": 100, "flowers": 102, "chaoyang": 4, "folder": None}
ARRAYS = ("x_train", "y_train", "x_test", "y_test")  # images uint8 (N, S, S, 3), labels (N,)
STORED = 256  # pixels: photographs are stored no larger
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every data set, as in the LG code
# A small file can hold an image that fills the memory: above 89 million pixels, where Pillow warns, we refuse
warnings.simplefilter("error", Image.DecompressionBombWarning)


class InputError(ValueError):
    """Something the user can mend: the message names cause and next action; train.py prints only that."""


class Data(NamedTuple):
    """A data set: images uint8 (N, 3, S, S), labels int64 (N,) from 0 to num_classes - 1."""

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    num_classes: int


# ------------------------------------------------------------------------------------------------- data sets


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


def write_whole(path, save):
    """Has save(file) write beside `path`, and puts the file in its place once it is whole and on the disk: a
    kill, a power cut or a full disk at any byte leaves the file that was there."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another process may write the same cache
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter where the disk is full
        raise InputError(f"cannot write {path} ({error}); free space or choose another folder") from error
    finally:
        if partial.exists():
            partial.unlink()


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


# ---------------------------------------------------------------------------------------------- augmentation

# RandAugment's operations, u in [0, 1] the level and s = +-1 the sign. Those that move pixels come first.
OPERATIONS = (
    "Rotate",  # by 30 u s degrees
    "ShearX",  # by 0.3 u s
    "ShearY",  # by 0.3 u s
    "TranslateX",  # by 0.45 u s of the width
    "TranslateY",  # by 0.45 u s of the height
    "AutoContrast",  # every channel stretched to 0 .. 255
    "Equalize",  # the histogram of every channel flattened
    "Invert",  # 255 - x
    "Posterize",  # the leading 4 - int(4 u) bits kept
    "Solarize",  # inverted from 256 - int(256 u) on
    "SolarizeAdd",  # int(110 u) added below 128
    "Color",  # base + (x - base) max(0.1, 1 + 0.9 u s), base: the grey image
    "Contrast",  # the same, base: the mean grey
    "Brightness",  # the same, base: black
    "Sharpness",  # the same, base: the smoothed image
)
MOVES = OPERATIONS[:5]
FILL = tuple(round(255 * mean) for mean in MEAN)  # what they bring in from outside the image
# Bytes of images augmented at once: what a CPU's cache holds; on a GPU several batches, to launch less often
AT_ONCE = {"cpu": 2**25, "cuda": 2**29, "mps": 2**28}


class Draws(NamedTuple):
    """The random numbers of n images, on the CPU. A box is (top, left, height, width)."""

    crop: torch.Tensor  # (n, 4) in pixels of the stored image
    flip: torch.Tensor  # (n,) bool
    operation: torch.Tensor  # (n, 2) the first and the second, as indices into OPERATIONS; -1: not applied
    level: torch.Tensor  # (n, 2) u
    sign: torch.Tensor  # (n, 2) s
    erase: torch.Tensor  # (n, 4) in pixels of the output; all 0: nothing is erased
    noise: torch.Tensor  # (n, 2) the corner of the noise that is put there, in a field of twice the size


def draw(n, stored, size, generator, strength="strong"):
    """Draws for n images of side `stored` that become `size`. "strong" is the recipe; "weak" a crop of at
    least half the area and a flip."""
    if strength not in ("strong", "weak"):
        raise ValueError(f"strength must be 'strong' or 'weak', got {strength!r}")
    smallest, operate, erase = (0.08, 0.5, 0.25) if strength == "strong" else (0.5, 0.0, 0.0)
    crop = draw_boxes(n, stored, smallest, 1.0, 3 / 4, generator)
    box = draw_boxes(n, size, 0.02, 1 / 3, 0.3, generator)
    chance = torch.rand(6, n, generator=generator)
    operation = torch.randint(len(OPERATIONS), (n, 2), generator=generator)
    level = (0.9 + 0.05 * torch.randn(n, 2, generator=generator)).clamp(0, 1)  # m9, mstd0.5, of 10
    return Draws(
        crop,
        chance[0] < 0.5,
        torch.where(chance[1:3].T < operate, operation, -1),
        level,
        torch.where(chance[3:5].T < 0.5, -1.0, 1.0),
        torch.where(chance[5, :, None] < erase, box, 0),
        torch.randint(size + 1, (n, 2), generator=generator),
    )


def draw_boxes(n, side, smallest, largest, ratio, generator):
    """(n, 4) boxes in a square: area uniform between two fractions of it, aspect log-uniform from `ratio` to
    1 / `ratio`. As in the reference, ten tries for one that fits; where none does (< 1e-8), the square."""
    tries = torch.rand(2, n, 10, generator=generator)
    area, aspect = side**2 * (smallest + (largest - smallest) * tries[0]), ratio ** (2 * tries[1] - 1)
    shapes = torch.stack(((area / aspect).sqrt(), (area * aspect).sqrt()), dim=2).round()  # (n, 10, 2)
    fits = ((shapes >= 1) & (shapes <= side)).all(dim=2)
    shape = torch.where(fits.any(dim=1)[:, None], shapes[torch.arange(n), fits.int().argmax(dim=1)], side)
    corner = (torch.rand(n, 2, generator=generator) * (side - shape + 1)).floor()
    return torch.cat((corner, shape), dim=1)


def batches(x, y, batch_size, size, generator, strength="strong", rank=0, ranks=1):
    """One epoch of training batches, shuffled and augmented; the last partial batch is dropped.

    Args:
        x, y: images uint8 (N, 3, S, S) and labels (N,), on any device.
        size: side of the augmented images, in pixels.
        generator: a torch.Generator on the CPU, the only source of randomness.
        strength: as in `draw`.
        rank, ranks: of so many processes this one gets its equal part of every batch. All draw alike.

    Yields:
        images float32 (batch_size / ranks, 3, size, size), labels, on the device of x and y.
    """
    used = len(x) // batch_size * batch_size
    order = torch.randperm(len(x), generator=generator)
    draws = draw(used, x.shape[-1], size, generator, strength)
    noise = torch.randn(3, 2 * size, 2 * size, generator=generator).to(x.device, non_blocking=True)
    mine = torch.arange(used).view(-1, batch_size).chunk(ranks, dim=1)[rank].flatten()
    order, draws = order[mine].to(x.device, non_blocking=True), list(map(itemgetter(mine), draws))
    batch_size //= ranks
    at_once = max(1, AT_ONCE[x.device.type] // (12 * size**2) // batch_size) * batch_size
    for start in range(0, len(order), at_once):
        chosen = slice(start, start + at_once)
        rows = order[chosen]
        images = augment(x.index_select(0, rows), size, Draws(*map(itemgetter(chosen), draws)), noise)
        yield from zip(images.split(batch_size), y[rows].split(batch_size))


def augment(images, size, draws, noise):
    """Applies `draws` to the images, each by itself.

    Args:
        images: uint8 (n, 3, S, S), on any device.
        size: side of the result, in pixels.
        draws: what `draw` gave for these images.
        noise: standard normal (3, 2 size, 2 size), on the device; what is erased shows a part of it.

    Returns:
        float32 (n, 3, size, size), normalised with ImageNet's mean and standard deviation.
    """
    n, _, S, _ = images.shape
    if images.dtype != torch.uint8 or images.shape[1:] != (3, S, S) or len(draws.flip) != n:
        raise ValueError(
            f"expected uint8 images (B, 3, S, S) and as many draws, got {images.dtype} "
            f"{tuple(images.shape)} and {len(draws.flip)}"
        )
    if size < 3:
        raise ValueError(f"size must be at least 3 pixels, got {size}")
    device = images.device
    mean, std = torch.tensor((MEAN, STD)).view(2, 3, 1, 1).to(device, non_blocking=True)
    result = torch.empty(n, 3, size, size, device=device)
    at_once = max(1, AT_ONCE[device.type] // (12 * size**2))
    for start in range(0, n, at_once):
        part = slice(start, start + at_once)
        x = resample(images[part], size, draws.crop[part], draws.flip[part])  # whole numbers 0 .. 255
        for slot in range(2):
            for i, operation in enumerate(OPERATIONS):
                chosen = (draws.operation[part, slot] == i).nonzero()[:, 0]
                if len(chosen):
                    level, sign = torch.stack((draws.level[part], draws.sign[part]))[:, chosen, slot].to(
                        device, non_blocking=True
                    )[..., None, None, None]
                    chosen = chosen.to(device, non_blocking=True)
                    changed = x.index_select(0, chosen)  # whole images, copied faster than by x[chosen]
                    if operation in MOVES:
                        changed = move(changed, operation, level * sign, enlarged=size >= 2 * S)
                    else:
                        changed = recolour(changed, operation, level, sign)
                    x.index_copy_(0, chosen, changed)
        torch.addcmul(-mean / std, x, 1 / (255 * std), out=result[part])
    for i, box in enumerate(torch.cat((draws.erase, draws.noise), dim=1).int().tolist()):
        top, left, height, width, down, right = box
        if height:
            fresh = noise[:, down : down + height, right : right + width]
            result[i, :, top : top + height, left : left + width] = fresh
    return result


def prepare(images, size):
    """The test transform: uint8 (B, 3, S, S) -> normalised float32 (B, 3, size, size), bilinear, no crop."""
    return TF.normalize(TF.resize(images, [size, size], antialias=True) / 255, MEAN, STD)


def resample(images, size, crop, flip):
    """Crop, bicubic resize as Pillow's, flip: uint8 (n, 3, S, S) -> whole numbers, (n, 3, size, size).

    Each axis is resampled by itself, so for a batch it is two small matrix products: the weights of the
    stored pixels for each output pixel are Keys' cubic, a = -1/2, widened where the image shrinks.
    """
    n, _, S, _ = images.shape
    start, length = crop.to(images.device, non_blocking=True)[..., None, None].chunk(2, dim=1)  # (n, 2, 1, 1)
    flip = flip.to(images.device, non_blocking=True)[:, None]
    pixel = torch.arange(S, device=images.device) + 0.5
    pixel = torch.where((pixel > start) & (pixel < start + length), pixel, torch.inf)  # (n, 2, 1, S)
    point = (torch.arange(size, device=images.device) + 0.5).expand(n, size)
    point = torch.stack((point, torch.where(flip, point.flip(1), point)), dim=1)[..., None]  # (n, 2, size, 1)
    scale = length / size  # stored pixels to an output pixel
    d = (pixel - (start + scale * point)).div_(scale.clamp(min=1)).abs_()  # (n, 2, size, S)
    u = (1 - d).clamp_(min=-1)  # twice the cubic is u (1 + u)^2, where u > 0 plus u^2 (2 - 4 u)
    near = u.clamp(min=0)
    weights = (u + 1).square_().mul_(u).addcmul_(near.square(), 2 - 4 * near)
    rows, columns = weights.div_(weights.sum(dim=3, keepdim=True)).unbind(dim=1)  # (n, size, S) each
    x = images.float().reshape(n, 3 * S, S) @ columns.mT  # (n, 3 S, size)
    x = x.round_().clamp_(0, 255).view(n, 3, S, size)
    return (rows[:, None] @ x).round_().clamp_(0, 255)  # (n, 1, size, S) @ (n, 3, S, size)


def move(x, operation, amount, enlarged):
    """An operation that moves pixels on x, float (b, 3, S, S), 0 .. 255; amount = u s: (b, 1, 1, 1)."""
    S, amount = x.shape[-1], amount[:, 0]  # (b, 1, 1)
    across = (torch.arange(S, device=x.device) + 0.5) * (2 / S) - 1  # (S,) from -1 to 1
    down = across[:, None]  # (S, 1)
    from_x, from_y = across, down  # where an output pixel comes from
    if operation == "Rotate":
        cos, sin = (amount * math.radians(30)).cos(), (amount * math.radians(30)).sin()
        from_x, from_y = cos * across - sin * down, sin * across + cos * down  # (b, S, S)
    elif operation == "ShearX":
        from_x = across + 0.3 * amount * (down + 1)
    elif operation == "ShearY":
        from_y = down + 0.3 * amount * (across + 1)
    elif operation == "TranslateX":
        from_x = from_x + 2 * 0.45 * amount
    else:
        from_y = from_y + 2 * 0.45 * amount
    inside = ((from_x.abs() < 1) & (from_y.abs() < 1)).expand(len(x), S, S)[:, None]
    grid = torch.stack((from_x.expand(len(x), S, S), from_y.expand(len(x), S, S)), dim=3)  # (b, S, S, 2)
    mode = "bilinear" if enlarged else "bicubic"  # on a smooth image as good, at a quarter of the cost
    x = F.grid_sample(x, grid, mode, "border", align_corners=False)
    fill = torch.tensor(FILL, dtype=torch.float32).view(3, 1, 1).to(x.device, non_blocking=True)
    return torch.where(inside, x, fill).round_().clamp_(0, 255)


def recolour(x, operation, level, sign):
    """A colour operation on x, float (b, 3, H, W) of whole numbers 0 .. 255; level, sign: (b, 1, 1, 1)."""
    if operation == "AutoContrast":
        low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
        return torch.where(high > low, ((x - low) * (255 / (high - low).clamp(min=1))).floor(), x)
    if operation == "Equalize":
        return TF.equalize(x.byte()).float()
    if operation == "Invert":
        return 255 - x
    if operation == "Posterize":
        step = 2 ** (4 + (4 * level).int())  # the value of the last bit that is kept
        return (x / step).floor() * step
    if operation == "Solarize":
        return torch.where(x < 256 - (256 * level).int(), x, 255 - x)
    if operation == "SolarizeAdd":
        return torch.where(x < 128, (x + (110 * level).int()).clamp(max=255), x)
    red, green, blue = x.unbind(dim=1)
    base = (0.299 * red + 0.587 * green + 0.114 * blue).round()[:, None]  # grey (b, 1, H, W)
    if operation == "Contrast":
        base = base.mean(dim=(2, 3), keepdim=True).round()
    elif operation == "Brightness":
        base = torch.zeros_like(base)
    elif operation == "Sharpness":
        base, middle = x.clone(), x[:, :, 1:-1, 1:-1]  # 3x3, the centre weighs 5 of 13; the border stays
        three = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
        nine = three[..., :-2] + three[..., 1:-1] + three[..., 2:]
        base[:, :, 1:-1, 1:-1] = ((nine + 4 * middle) / 13).round()
    return (base + (x - base) * (1 + 0.9 * level * sign).clamp(min=0.1)).clamp(0, 255).floor()
