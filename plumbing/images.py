"""A folder of anybody's images -> arrays: `find_images`, then `decode`, or a cache that fits its `stamps`.
Names that begin with ".", "@" or "__" (.DS_Store, @eaDir, __MACOSX) are skipped, and links are followed."""

import hashlib
import os
import re
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from plumbing.files import InputError

STORED = 256  # pixels: photographs are stored no larger
LAYOUT = "--data must hold train/<class>/* and val/<class>/* images, or just <class>/*"
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
TAILS = [gap + end for gap in ("", "_", "-", " ") for end in ("set", "data", "images")]  # as in test_set
SPLITS |= {name + tail: split for name, split in SPLITS.items() for tail in TAILS}
Image.init()  # all readers but those that decode nothing, and EPS's, which starts Ghostscript; MPO is a JPEG
FORMATS = [name for name in Image.OPEN if name not in ("BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS")]
ENDINGS = {end for end, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")}
# Images that it does not read; a DICOM file may have no ending
OTHERS = {"", ".dcm", ".dicom", ".nii", ".svs", ".ndpi", ".heic"}
# The EXIF tag for orientation, little- or big-endian: Pillow stops reading at a damaged tag before it
TURN = re.compile(b"\x12\1\3\0\1\0\0\0([\1-\10])|\1\x12\0\3\0\0\0\1\0([\1-\10])")
# A small file can hold an image that fills the memory: above 89 million pixels, where Pillow warns, we refuse
warnings.simplefilter("error", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module="PIL.TiffImagePlugin")  # of damaged EXIF


class Listing(NamedTuple):
    """The images under a folder; `splits` has "train", perhaps "val", which measures it, perhaps "test"."""

    root: Path
    classes: list[str]  # names, alphabetical
    splits: dict[str, list]  # split -> [(path, class index), ...]
    notes: list[str]  # what a person should know, a line each


def find_images(root):
    """Lists the images of train/<class>/* with val/ or test/ beside it, or of just <class>/*; opens none.
    InputError: no such layout, fewer than two classes, or splits of different classes."""
    top, rows, beside = unpacked(Path(root))
    notes = [f"using {top}, the only folder with images in {root}"] if top != Path(root) else []
    notes += [f"left out: folders without images: {some(map(repr, beside))}"] if beside else []
    folders = find_splits(top, rows, notes)
    if not folders:  # the class folders lie in `top` itself
        folders, rows = {"train": top}, [((top.name, *parts), path) for parts, path in rows]
    split_of = {folder.name: split for split, folder in folders.items()}
    images = {split: {} for split in folders}  # split -> class name -> paths
    left_out, lost, inner, unread = Counter(), [], set(), set()
    for parts, path in rows:  # split, class, perhaps sub-folders, file
        split, ending = split_of.get(parts[0]), path.suffix.lower()
        if split and len(parts) > 2:
            paths = images[split].setdefault(parts[1], [])
            if ending in ENDINGS:
                paths.append(path)
                inner |= {parts[1:-1]} if len(parts) > 3 else set()
            elif not os.path.isdir(path):
                left_out[ascii(ending)[1:-1] or "without an ending"] += 1
                unread |= {parts[1]} if ending in OTHERS else set()
        elif split and not os.path.isfile(path):
            lost.append(path)
        elif ending in ENDINGS:
            left_out[f"images loose in {path.parent}"] += 1
    if lost:
        raise InputError(f"{some(lost)}: an empty folder, or a link that leads nowhere; fill or remove it")
    names, inner = set().union(*images.values()), sorted(inner)
    if odd := [p for p in inner if any(f.casefold() in SPLITS or f in names - {p[0]} for f in p[1:])]:
        places = some(map("/".join, odd))
        raise InputError(f"{top} holds splits or classes inside of other classes: {places}; {LAYOUT}")
    if inner:
        notes.append(f"sub-folders count as part of their class: {some(map('/'.join, inner))}")
    if kinds := some(f"{n} {kind}" for kind, n in left_out.most_common()):
        notes.append(f"left out: {kinds} (used: files that Pillow reads, in a folder for each class)")
    classes = check_classes(folders, images, unread, notes)
    splits = [split for split in ("train", "val", "test") if split in folders]
    splits = {s: [(path, y) for y, name in enumerate(classes) for path in images[s][name]] for s in splits}
    return Listing(top, classes, splits, notes)


def check_classes(folders, images, unread, notes):
    """The names of the classes: at least two, each with images in every split; `unread` have some in odd formats."""
    classes = sorted({name for named in images.values() for name, paths in named.items() if paths})
    barren = sorted(set().union(*images.values()).difference(classes))
    notes += [f"left out: class folders without images: {some(map(repr, barren))}"] if barren else []
    odd = {split: [repr(name) for name in classes if not images[split].get(name)] for split in folders}
    odd = [f"{folders[split].name}/ has no images of class {some(odd[split])}" for split in odd if odd[split]]
    if odd:
        raise InputError(f"{'; '.join(odd)}: every split needs the same classes")
    if len(classes) < 2:
        has = f"only the class {classes[0]!r}" if classes else "no class folder with images"
        raise InputError("; ".join([f"{folders['train']} has {has}, two or more are needed", LAYOUT, *notes]))
    lost = some(repr(name) for name in barren if name in unread)
    if lost:  # one class less, which nobody might notice
        raise InputError(f"Pillow reads no image of class {lost}: convert it to PNG, or move the folder away")
    return classes


def find_splits(top, rows, notes):
    """split -> its folder, for the splits that `top` holds."""
    found = {}
    for parts, path in rows:
        split = SPLITS.get(parts[0].casefold())
        loose = len(parts) < (3 if split == "test" else 2)  # in test/ without class folders, as Kaggle has it
        if split and not (loose and os.path.isfile(path)):
            if found.setdefault(split, top / parts[0]).name != parts[0]:
                raise InputError(f"{top} holds both {found[split].name}/ and {parts[0]}/; keep one of them")
    if found and "train" not in found:
        raise InputError(f"{top} holds {min(found.values()).name}/ but no train/; {LAYOUT}")
    if "test" in found and "val" in found:
        val, test = found["val"].name, found["test"].name
        notes.append(f"accuracy is measured on {val}/; {test}/ is left for predict.py")
    elif "test" in found:
        found["val"] = found.pop("test")
    return found


def unpacked(root):
    """`root`, or the folder below it that an archive was unpacked to, the parts and path of each file there, and the
    names of the folders that are skipped."""
    try:
        rows = [(path.relative_to(root).parts, path) for path in walk(root, set(root.resolve().parents))]
    except OSError as error:
        raise InputError(f"cannot list {error.filename} ({error.strerror}); {LAYOUT}") from error
    beside = []
    for _ in range(3):  # beside it there may be annotations, lists, licences
        images = [parts for parts, path in rows if path.suffix.lower() in ENDINGS and len(parts) > 1]
        heads, is_class = {parts[0] for parts in images}, any(len(parts) == 2 for parts in images)
        if len(heads) != 1 or is_class or any(parts[0].casefold() in SPLITS for parts, _ in rows):
            break
        root /= min(heads)
        beside += sorted({parts[0] for parts, _ in rows if len(parts) > 1} - heads)
        rows = [(parts[1:], path) for parts, path in rows if parts[0] in heads and len(parts) > 1]
    return root, [row for row in rows if row[0]], beside  # an empty root is no row


def walk(folder, above):
    """Yields every file under a folder, and every empty folder; `above` are the folders on the way to it."""
    real = folder.resolve()
    if real not in above:  # else a link leads in a circle
        paths = [folder / name for name in os.listdir(folder) if not name.startswith((".", "@", "__"))]
        for is_folder, path in sorted((os.path.isdir(path), path) for path in paths) or [(False, folder)]:
            yield from walk(path, {real, *above}) if is_folder else [path]


def some(items, most=5):
    items = list(map(str, items))
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def stamps(listing):
    """A line for each file that `decode` reads, its place in the folder first: a cache is good for just these files.
    Two files, or folders, of the same sizes and times that were swapped differ in inode or change time."""
    lines = []
    for split, pairs in listing.splits.items():
        for path, y in pairs:
            known = [path.relative_to(listing.root).as_posix(), split, listing.classes[y]]
            if os.path.exists(path):  # else `decode` refuses it
                stat = path.stat()  # of a link's target
                known += [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            lines.append("\0".join(map(str, known)))
    return lines


def decode(listing):
    """split -> (images uint8 (N, S, S, 3), labels int64 (N,), digest); S: the median short side, at most 256.
    InputError: how many images of all splits cannot be read, and the first few."""

    def short_side(pair):
        try:
            with Image.open(pair[0], formats=FORMATS) as image:  # reads the header only
                return min(image.size)
        except Exception:
            return STORED  # `read_images` refuses it

    with ThreadPoolExecutor() as pool:
        side = min(STORED, int(np.median(list(pool.map(short_side, listing.splits["train"])))))
    paths = [path for pairs in listing.splits.values() for path, _ in pairs]
    names = some(map(repr, listing.classes))
    print(f"decoding {len(paths)} images of {names} to {side} x {side} pixels, once")
    x, hashes = read_images(paths, side)
    result, start = {}, 0
    for split, pairs in listing.splits.items():
        y, part = np.array([y for _, y in pairs]), slice(start, start + len(pairs))
        # Of class names and contents: a copy with files renamed or in another order holds the same images
        lines = sorted(f"{listing.classes[label]}\0{content}" for label, content in zip(y, hashes[part]))
        digest = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        result[split], start = (x[part], y, digest), part.stop
    return result


def read_images(paths, side):
    """The middle squares of image files, uint8 (N, side, side, 3), and the hash of each file's bytes."""
    images, hashes, bad = np.empty((len(paths), side, side, 3), np.uint8), [None] * len(paths), []

    def read(i):
        try:
            images[i] = ImageOps.fit(open_image(paths[i], side), (side, side), Image.Resampling.BICUBIC)
            hashes[i] = hashlib.sha256(paths[i].read_bytes()).hexdigest()
        except Exception as error:
            bad.append(f"{paths[i]} ({error.__cause__ or error})")

    with ThreadPoolExecutor() as pool:  # threads suffice: Pillow lets others run while it decodes
        list(pool.map(read, range(len(paths))))
    if bad:
        raise InputError(f"cannot read {len(bad)} images; replace or remove them: {some(sorted(bad))}")
    return images, hashes


def open_image(path, side=None):
    """An image file -> an upright Pillow RGB image; with `side`, perhaps smaller, but at least twice that."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if side:
                image.draft("RGB", (2 * side, 2 * side))  # large JPEGs are decoded several times as fast
            image.load()
            found = TURN.search(image.info.get("exif", b""))
            turn = found and (found[1] or found[2])[0]
            with suppress(Exception):  # of damaged EXIF
                turn = image.getexif().get(0x0112) or turn
            if image.mode == "F":
                raise ValueError("floating-point pixels, whose range is unknown: convert it to 8 or 16 bits")
            if image.mode.startswith("I"):  # 16 bits, often few of them used: its own range becomes 0 to 255
                x = np.asarray(image).astype(np.float32)
                image = Image.fromarray(((x - x.min()) * (255 / max(np.ptp(x), 1))).round().astype(np.uint8))
            if image.has_transparency_data:  # what shows through is white
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image = image.convert("RGB")
        image.info = {}  # with nothing else of EXIF left, Pillow turns the image safely
        image.getexif()[0x0112] = turn
        return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises whatever a damaged file provokes
        raise InputError(f"cannot read {path} ({error}); replace or remove it") from error
