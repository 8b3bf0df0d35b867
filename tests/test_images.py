"""Which files `plumbing.images` takes for images of which class, and the pixels and digests that result."""

import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from plumbing.files import InputError
from plumbing.images import STORED, decode, find_images, open_image, read_images, stamps


def save(path, colour=None, size=(12, 10), mode="RGB", **options):
    """An image in a new or old folder: of one colour, or of noise that depends on the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32("/".join(path.parts[-3:]).encode())
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode) if colour is None else Image.new(mode, size, colour)
    image.save(path, **options)
    return path


def tree(root, splits=("train", "val"), classes=("ant", "bee"), count=2):
    for split in splits:
        for name in classes:
            for i in range(count):
                save(Path(root, split, name, f"{i}.png"))
    return Path(root)


def counts(listing):
    """split -> class -> how many images."""
    return {
        split: {name: [y for _, y in pairs].count(i) for i, name in enumerate(listing.classes)}
        for split, pairs in listing.splits.items()
    }


def digests(root):
    return {split: arrays[2] for split, arrays in decode(find_images(root)).items()}


def refusal(root):
    with pytest.raises(InputError) as refused:
        decode(find_images(root))
    return str(refused.value)


TWO = {"ant": 2, "bee": 2}

# ------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    "folders, splits",
    [
        (["train"], ["train"]),
        (["train", "val"], ["train", "val"]),
        (["Train", "VALID"], ["train", "val"]),
        (["training", "validation"], ["train", "val"]),
        (["train", "test"], ["train", "val"]),
        (["TRAIN", "Testing"], ["train", "val"]),
        (["training_set", "test_set"], ["train", "val"]),
        (["Train data", "val-images", "testset"], ["train", "val", "test"]),
        (["train", "val", "test"], ["train", "val", "test"]),
        (["."], ["train"]),
    ],
    ids=str,
)
def test_every_usual_layout_is_found(tmp_path, folders, splits):
    listing = find_images(tree(tmp_path, folders))
    assert counts(listing) == {split: TWO for split in splits} and listing.classes == ["ant", "bee"]
    assert listing.splits["train"][0][0] == tmp_path / folders[0] / "ant" / "0.png"
    if "val" in splits:
        assert all(path.parts[-3] == folders[1] for path, _ in listing.splits["val"])
    told = [f"accuracy is measured on {s}/; {folders[-1]}/ is left for predict.py" for s in folders[1:-1]]
    assert listing.notes == told


def test_an_archive_unpacked_one_or_two_levels_deep_is_found_and_said(tmp_path):
    for parts, splits in (("one", ("train", "val")), ("two/levels", ("train", "test")), ("classes", (".",))):
        root = tmp_path / parts.split("/")[0] / "root"
        inner = tree(root / parts, splits)
        save(root / "__MACOSX" / "x" / "._0.png")
        (root / "README.txt").write_text("about")
        listing = find_images(root)
        assert listing.root == inner and counts(listing)["train"] == TWO
        assert listing.notes == [f"using {inner}, the only folder with images in {root}"]


def test_images_are_found_beside_folders_of_something_else(tmp_path):
    """As in Food-101, CUB-200 and Stanford Dogs; where one of them is named as a split, nothing is guessed."""
    root = tree(tmp_path, ["images/Images"])
    for name in ("annotations/Annotation/ant/0", "meta/classes.txt"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("about")
    listing = find_images(root)
    assert counts(listing) == {"train": TWO} and listing.root == root / "images" / "Images"
    left_out = "left out: folders without images: 'annotations', 'meta'"  # perhaps a class in an odd format
    assert listing.notes == [f"using {listing.root}, the only folder with images in {root}", left_out]
    (root / "meta").rename(root / "train")
    assert "no class folder with images" in refusal(root)


@pytest.mark.parametrize(
    "folders, inside",
    [
        (
            ["cells", "cells/cells"],
            "DIR/cells holds .*: cells/ant, cells/bee; --data",
        ),  # twice in one archive
        (["one", "two/images/TRAIN"], "DIR holds .*: two/images/TRAIN/ant, "),  # two data sets
        (["one/train", "one/test", "two/train", "two/test"], "DIR holds .*: one/test/ant, "),
        (["ant/train", "bee/train"], "DIR holds .*: ant/train/ant, "),  # splits of each class
        (["train", "val", "train/ant/test"], "DIR holds .*: ant/test/ant, ant/test/bee; --data"),
    ],
    ids=str,
)
def test_data_sets_and_splits_inside_of_classes_are_refused(tmp_path, folders, inside):
    """Their classes would be trained as one, in silence."""
    told = refusal(tree(tmp_path, folders)).replace(str(tmp_path), "DIR")
    assert re.match(inside.replace(".*", "splits or classes inside of other classes"), told)


def test_other_sub_folders_count_as_part_of_their_class_and_a_note_says_so(tmp_path):
    """Perhaps they are masks, or classes, and should not."""
    for name in ("ant", "bee"):
        tree(tmp_path / name, ["."], [name, "masks"])
        (tmp_path / name / "empty").mkdir()
    listing = find_images(tmp_path)
    assert counts(listing) == {"train": {"ant": 4, "bee": 4}}
    assert listing.notes == [
        "sub-folders count as part of their class: ant/ant, ant/masks, bee/bee, bee/masks"
    ]


def test_a_test_folder_without_labels_is_left_out_and_said(tmp_path):
    for splits in (("train",), ("train", "val")):
        root = tree(tmp_path / str(len(splits)), splits)
        for i in range(3):
            save(root / "test" / f"{i}.jpg")
        listing = find_images(root)
        assert counts(listing) == {split: TWO for split in splits}
        assert [
            note.startswith(f"left out: 3 images loose in {root / 'test'} ") for note in listing.notes
        ] == [True]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda root: tree(root / "new", ["train", "val", "valid"]), "holds both val/ and valid/; keep one"),
        (lambda root: tree(root / "new", ["Train", "train"]), "holds both Train/ and train/; keep one"),
        (lambda root: tree(root / "new", ["train", "test", "testing"]), "holds both test/ and testing/"),
        (
            lambda root: tree(root / "new", ["val", "test"]),
            "holds test/ but no train/; --data must hold train/<",
        ),
        (lambda root: None, "cannot list .*new .No such file or directory.; --data must hold train/<class>"),
        (lambda root: (root / "new").write_bytes(b"zip"), "cannot list .*new .Not a directory.; --data must"),
        (lambda root: (root / "new").mkdir(), "no class folder with images.*--data must hold"),
        (
            lambda root: [save(root / "new" / f"{i}.jpg") for i in range(7)],
            "7 images loose in .*a folder for each",
        ),
        (
            lambda root: save(root / "new/train/a.png"),
            "1 images loose in .*train .*in a folder for each class",
        ),
        (lambda root: tree(root / "new", ["."], ["ant"]), "only the class 'ant', two or more are needed"),
        (lambda root: tree(root / "new", classes=["ant"]), "only the class 'ant', two or more are needed"),
        (lambda root: tree(root / "new", ["train/train"]), "only the class 'train', two or more"),
    ],
)
def test_a_folder_of_no_such_layout_is_refused_with_what_is_expected(tmp_path, change, message):
    change(tmp_path)
    with pytest.raises(InputError, match=message) as refused:
        find_images(tmp_path / "new")
    assert "\n" not in str(refused.value)


def test_of_splits_that_differ_only_the_difference_is_shown_and_at_most_five_names(tmp_path):
    root = tree(tmp_path / "few", classes=("ant", "bee", "cow"))
    (root / "val" / "bee").rename(root / "val" / "wasp")
    message = "val/ has no images of class 'bee'; train/ has no images of class 'wasp': every split needs "
    assert message in refusal(root) or "train/ has no images of class 'wasp'; val/ has no" in refusal(root)
    assert "ant" not in refusal(root).replace(str(root), "")
    root = tree(tmp_path / "many", ["train", "Valid"], [f"class {i:03}" for i in range(200)], count=1)
    for i in range(17):
        (root / "Valid" / f"class {i:03}" / "0.png").rename(root / "Valid" / f"class {i:03}" / "notes.txt")
    told = refusal(root)
    assert "Valid/ has no images of class 'class 000', " in told and "'class 004' and 12 more" in told
    assert len(told) < 300
    root = tree(tmp_path / "test", ["train", "val", "test"])
    (root / "test" / "bee").rename(root / "test" / "bees")
    assert "test/ has no images of class 'bee'" in refusal(root) and "'bees'" in refusal(root)


def test_an_empty_class_folder_is_refused_by_name_and_one_without_images_left_out(tmp_path):
    root = tree(tmp_path)
    (root / "train" / "cow").mkdir()
    (root / "train" / "cow" / ".DS_Store").write_bytes(b"")
    assert f"{root}/train/cow: an empty folder, or a link" in refusal(root)
    for split in ("train", "val"):
        (root / split / "cow").mkdir(exist_ok=True)
        (root / split / "cow" / "labels.csv").write_text("1")
    listing = find_images(root)
    assert (
        counts(listing) == {"train": TWO, "val": TWO}
        and "left out: class folders without images: 'cow'" in listing.notes
    )
    save(root / "val" / "cow" / "a.png")
    assert "train/ has no images of class 'cow'" in refusal(root)
    (root / "test").mkdir()
    assert f"{root}/test: an empty folder" in refusal(root).replace(f"{root}/train/cow, ", "")


# ---------------------------------------------------------------------------------------------------- links


def test_links_to_files_classes_and_splits_are_followed_and_their_targets_stamped(tmp_path):
    store, root = tree(tmp_path / "store"), tree(tmp_path / "root", ["train"], ["ant"])
    linked = save(tmp_path / "elsewhere" / "x.png")
    (root / "train" / "ant" / "link.png").symlink_to(linked)
    (root / "train" / "bee").symlink_to(store / "train" / "bee")
    (root / "val").symlink_to(store / "val")
    before = find_images(root)
    assert counts(before) == {"train": {"ant": 3, "bee": 2}, "val": TWO}
    for target in (linked, store / "train" / "bee" / "0.png", store / "val" / "ant" / "1.png"):
        old = stamps(find_images(root))
        save(target, (1, 2, 3), (9, 9))
        new = stamps(find_images(root))
        changed = {line.split("\0")[0] for line in set(old) ^ set(new)}
        assert (
            len(old) == len(new) == 9
            and len(changed) == 1
            and changed.pop().endswith(("link.png", target.name))
        )
    assert stamps(find_images(root))[0].startswith("train/ant/0.png\0train\0ant\0")
    for size, time in ((b"1", 1), (b"1", 2), (b"12", 2), (b"2", 2)):  # each alone tells a change
        linked.write_bytes(size)
        os.utime(linked, (time, time))
        assert stamps(find_images(root)) not in (old, new)
        old, new = new, stamps(find_images(root))
    (store / "val" / "bee" / "1.png").unlink()
    assert len(stamps(find_images(root))) == 8


def test_a_class_in_a_format_that_pillow_does_not_read_is_not_left_out_in_silence(tmp_path):
    for folder in (tree(tmp_path / "split"), tree(tmp_path / "whole", [""])):
        place = folder / "train" if (folder / "train").exists() else folder
        (place / "tumour").mkdir()
        for name in ("IM0001", "IM0002.DCM", "notes.txt"):
            (place / "tumour" / name).write_bytes(b"DICM")
        assert "Pillow reads no image of class 'tumour': convert it to PNG, or move" in refusal(folder)
        save(place / "tumour" / "a.png")
        if place == folder:  # a class as others are; what is not read is counted
            assert any("dcm" in note for note in find_images(folder).notes)


def test_links_in_a_circle_end(tmp_path):
    root = tree(tmp_path / "root")
    save(tmp_path / "beside.png")
    (root / "train" / "ant" / "self").symlink_to(".")
    (root / "train" / "ant" / "up").symlink_to(root.parent)
    (root / "train" / "again").symlink_to(root / "train")
    (root / "all").symlink_to(root)
    (root / "val" / "ant" / "loop.txt").symlink_to("loop.txt")
    assert counts(find_images(root)) == {"train": TWO, "val": TWO}
    (root / "train" / "ant" / "other").symlink_to(root / "train" / "bee")
    (root / "train" / "bee" / "other").symlink_to(root / "train" / "ant")
    assert counts(find_images(root))["train"] == {"ant": 4, "bee": 4}


@pytest.mark.parametrize("link", ["train/ant/gone.png", "train/cow", "val", "test"])
def test_a_broken_link_is_refused_by_name_wherever_it_is(tmp_path, link):
    root = tree(tmp_path, ["train"])
    (root / link).symlink_to("nowhere")
    assert f"{root}/{link}" in refusal(root)
    if link.endswith("png"):
        assert len(stamps(find_images(root))) == 5


def test_subfolders_of_a_class_count_and_a_folder_that_may_only_be_read_works(tmp_path):
    root = tree(tmp_path / "root", ["train"])
    save(root / "train" / "ant" / "2019" / "may" / "z.png")
    (root / "train" / "ant" / "2020").mkdir()
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    try:
        [folder.chmod(0o555) for folder in folders]
        assert decode(find_images(root))["train"][1].tolist() == [0, 0, 0, 1, 1]
    finally:
        [folder.chmod(0o755) for folder in folders]
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert find_images(root).notes == ["sub-folders count as part of their class: ant/2019/may"]


# ------------------------------------------------------------------------------------------- what is no image


def test_names_of_the_system_are_skipped_in_silence(tmp_path):
    root = tree(tmp_path)
    for name in (".DS_Store", "._0.png", ".hidden.jpg", "__init__.png"):
        (root / "train" / "ant" / name).write_bytes(b"system")
    for name in ("@eaDir", "__MACOSX", ".ipynb_checkpoints", ".git"):
        for parent in (root, root / "train", root / "val" / "bee"):
            (parent / name).mkdir()
            (parent / name / "a.png").write_bytes(b"system")
    listing = find_images(root)
    assert counts(listing) == {"train": TWO, "val": TWO} and listing.notes == []


def test_what_is_no_image_is_counted_by_ending_in_one_line(tmp_path):
    root = tree(tmp_path)
    others = "a.heic b.HEIC sub/c.heic IM0001 IM0002 Thumbs.db paper.pdf film.mpg figure.eps".split()
    for name in others:
        path = root / "train" / "ant" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"other")
    save(root / "train" / "loose.png")
    (root / "folder.npz").write_bytes(b"a cache")  # beside the splits only images are of interest
    save(root / "dev" / "ant" / "0.png")
    (note,) = find_images(root).notes
    assert note.startswith("left out: 3 .heic, 2 without an ending, 1 ") and " and 3 more (used: " in note
    assert counts(find_images(root)) == {"train": TWO, "val": TWO}
    for name in others[-4:]:
        (root / "train" / "ant" / name).unlink()
    (note,) = find_images(root).notes
    assert f"1 images loose in {root}/train" in note and f"1 images loose in {root}/dev/ant" in note
    for path in root.glob("*/*/*.png"):
        path.rename(path.with_suffix(".heic"))
    assert "no class folder with images" in refusal(root) and "11 .heic" in refusal(root)


KINDS = (
    "a.PNG P, a.jpeg CMYK, a.bmp 1, a.webp RGB, a.png LA, a.tif RGB, a.GIF L, a.jfif L, a.ppm RGB, a.mpo RGB"
)


@pytest.mark.parametrize("name, mode", [kind.split() for kind in KINDS.split(", ")])
def test_images_of_every_kind_are_read(tmp_path, name, mode):
    white = {"RGB": (255, 255, 255), "CMYK": (0, 0, 0, 0), "LA": (255, 255), "1": 1, "P": 0, "L": 255}[mode]
    root = tree(tmp_path, ["train"])
    image = Image.new(mode, (9, 9), white)
    if mode == "P":
        image.putpalette([255, 255, 255] * 256)
    image.save(root / "train" / "ant" / name)
    x, y, _ = decode(find_images(root))["train"]
    place = [path.name for path, _ in find_images(root).splits["train"]].index(name)
    assert len(x) == 5 and x[place].min() > 250


def test_of_an_animation_the_first_frame_counts(tmp_path):
    red, blue = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    assert open_image(tmp_path / "a.gif").getpixel((4, 4)) == (255, 0, 0)
    blue.save(tmp_path / "a.mpo", save_all=True, append_images=[red])
    assert open_image(tmp_path / "a.mpo").getpixel((4, 4))[2] > 250


def png(width, height):
    """A PNG that claims any size and holds no pixel."""
    chunks = (
        b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(b""),
        b"IEND",
    )
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_all_files_that_cannot_be_read_are_reported_at_once(tmp_path):
    root = tree(tmp_path, count=4)
    whole = (root / "train" / "ant" / "1.png").read_bytes()
    (root / "train" / "ant" / "0.png").write_bytes(b"")
    (root / "train" / "ant" / "1.png").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "bee" / "0.png").write_bytes(b"<html>not found</html>")
    (root / "val" / "bee" / "1.png").unlink()
    (root / "val" / "bee" / "1.png").symlink_to("nowhere")
    told = refusal(root)
    assert told.startswith("cannot read 4 images; replace or remove them: ") and told.count("remove") == 1
    for name in ("train/ant/0.png (", "train/ant/1.png (", "train/bee/0.png (", "val/bee/1.png ("):
        assert f"{root}/{name}" in told
    for path in (root / "val" / "ant").iterdir():
        path.write_bytes(b"%PDF")
    assert refusal(root).startswith("cannot read 8 images") and refusal(root).endswith(" and 3 more")


def test_an_image_that_would_fill_the_memory_is_refused_with_the_others(tmp_path):
    """In a process of its own: pytest has filters of its own for warnings."""
    root = tree(tmp_path, count=3)
    (root / "train" / "ant" / "0.png").write_bytes(png(10_000, 10_000))
    (root / "val" / "bee" / "0.png").write_bytes(png(30_000, 30_000))
    code = f"from plumbing.images import decode, find_images; decode(find_images({str(root)!r}))"
    command, here = [sys.executable, "-c", code], Path(__file__).parents[1]
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=here, env={**os.environ, "PYTHONPATH": "."}
    )
    assert (
        "InputError: cannot read 2 images" in ran.stderr
        and ran.stderr.splitlines()[-1].count("exceeds limit") == 2
    )


def test_floating_point_images_and_programs_in_disguise_are_refused(tmp_path):
    root = tree(tmp_path)
    Image.new("F", (9, 9), 0.5).save(root / "train" / "ant" / "deep.tiff")
    (root / "val" / "ant" / "0.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )
    told = refusal(root)
    assert "cannot read 2 images" in told and "deep.tiff (floating-point pixels" in told
    assert "0.png (cannot identify image file" in told  # not given to Ghostscript


# --------------------------------------------------------------------------------------------------- pixels


def halves(left, right, size=(64, 32)):
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def test_an_image_is_set_upright_by_its_exif_in_every_format(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    for name in ("a.jpg", "a.png", "a.webp", "a.tiff"):
        halves("red", "blue").save(tmp_path / name, exif=exif, quality=100)
        x = np.asarray(open_image(tmp_path / name)).astype(int)
        assert x.shape == (64, 32, 3) and x[:8, :, 0].min() > 200 and x[-8:, :, 2].min() > 200, name
    for orientation in range(1, 9):  # Pillow's own transposition is the reference
        exif[0x0112] = orientation
        save(tmp_path / "b.png", exif=exif)
        with Image.open(tmp_path / "b.png") as image:
            assert np.array_equal(ImageOps.exif_transpose(image), open_image(tmp_path / "b.png"))


def test_damaged_exif_elsewhere_does_not_matter(tmp_path):
    def jpeg(entries, gap=b""):
        """The list of tags need not begin right behind the header."""
        count = struct.pack("<IH", 8 + len(gap), len(entries))
        tiff = b"II*\0" + count[:4] + gap + count[4:] + b"".join(entries) + struct.pack("<I", 0)
        exif = b"Exif\0\0" + tiff
        out = io.BytesIO()
        halves("red", "blue").save(out, "JPEG", quality=100)
        whole = out.getvalue()
        return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[2:]

    turned = struct.pack("<HHII", 0x0112, 3, 1, 6)
    text = struct.pack("<HHI4s", 0x010F, 3, 1, b"ab\0\0")
    outside = struct.pack("<HHII", 0x8769, 4, 1, 10**9)  # the sub-folder of tags lies outside the file
    maker = struct.pack("<HHII", 0x010F, 2, 10, 10**6)  # so do these letters, the maker's name
    fraction = struct.pack("<HHII", 0x011A, 5, 1, 10**6)  # and this resolution
    wrong = struct.pack("<HHI4s", 0x9286, 99, 7, b"abcd")  # no such type
    rational = struct.pack("<HHIi", 0x0112, 2, 4, 0)  # an orientation in letters
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + turned + struct.pack("<I", 0)
    for i, entries in enumerate(
        (
            [turned],
            [text, text, text, turned],
            [turned, outside],
            [maker, turned],
            [fraction, turned],
            [wrong, turned],
        )
    ):
        for gap in (b"", b"\0\0"):
            (tmp_path / f"{i}.jpg").write_bytes(jpeg(entries, gap))
            assert open_image(tmp_path / f"{i}.jpg").size == (32, 64), entries
    profile = PngImagePlugin.PngInfo()  # as older ImageMagicks write it into a PNG
    profile.add_text("Raw profile type exif", f"\nexif\n{len(exif):8d}\n{exif.hex()}\n")
    halves("red", "blue").save(tmp_path / "a.png", pnginfo=profile)
    assert open_image(tmp_path / "a.png").size == (32, 64)
    (tmp_path / "letters.jpg").write_bytes(jpeg([rational]))
    assert open_image(tmp_path / "letters.jpg").size == (64, 32)
    for exif in (b"Exif\0\0garbage", b"Exif\0\0", b"II*\0", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        halves("red", "blue").save(tmp_path / "b.jpg", exif=exif)
        assert open_image(tmp_path / "b.jpg").size == (64, 32)


@pytest.mark.parametrize(
    "name, kind", [("a.png", "<u2"), ("a.tif", "<u2"), ("a.tif", ">u2"), ("a.tif", "<i4")]
)
def test_16_bit_greyscale_is_scaled_from_its_own_minimum_to_its_own_maximum(tmp_path, name, kind):
    ramp = np.arange(1000, 1256, dtype=kind).reshape(16, 16)  # a 16th of what 12 bits hold
    Image.fromarray(ramp).save(tmp_path / name)
    x = np.asarray(open_image(tmp_path / name))
    assert np.array_equal(x, np.arange(256).reshape(16, 16, 1).repeat(3, axis=2))
    Image.fromarray(np.full((9, 9), 40_000, kind)).save(tmp_path / name)
    with np.errstate(all="raise"):
        assert np.asarray(open_image(tmp_path / name)).max() == 0
    Image.fromarray(np.array([[0, 20_000, 65_535]], kind)).save(tmp_path / name)
    assert np.asarray(open_image(tmp_path / name))[..., 0].tolist() == [[0, 78, 255]]


def test_what_is_transparent_shows_white(tmp_path):
    Image.new("RGBA", (9, 9), (200, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGBA", (9, 9), (200, 0, 0, 255)).save(tmp_path / "b.png")
    Image.new("LA", (9, 9), (0, 0)).save(tmp_path / "c.png")
    Image.new("P", (9, 9), 3).save(tmp_path / "d.gif", transparency=3)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "e.png", transparency=(1, 2, 3))
    colours = {path.name: open_image(path).getcolors() for path in tmp_path.iterdir()}
    white = [(81, (255, 255, 255))]
    assert colours.pop("b.png") == [(81, (200, 0, 0))] and colours == dict.fromkeys(colours, white)


def test_the_stored_side_is_the_median_short_side_of_the_training_images_but_at_most_256(tmp_path, capsys):
    root = tree(tmp_path, ["train", "val"], count=1)
    for side, size in ((10, (12, 10)), (31, (31, 50)), (256, (900, 700))):
        for path in root.glob("train/*/*.png"):
            save(path, size=size)
        save(root / "train" / "bee" / "1.png", size=(1000, 1000))  # moves the mean, not the median
        arrays = decode(find_images(root))
        told = f"decoding 5 images of 'ant', 'bee' to {side} x {side} pixels, once\n"
        assert capsys.readouterr().out == told
        for x, y, _ in arrays.values():
            assert x.shape[1:] == (side, side, 3) and x.dtype == np.uint8
            assert y.tolist() in ([0, 1, 1], [0, 1]) and y.dtype == np.int64 and len(x) == len(y)
    assert STORED == 256


def test_the_middle_square_is_kept_and_every_image_is_its_own_row(tmp_path):
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    image.save(tmp_path / "a.png")
    save(tmp_path / "b.png", (0, 255, 0), (20, 60))
    x, hashes = read_images([tmp_path / "a.png", tmp_path / "b.png", tmp_path / "a.png"], 20)
    assert (x[0] == (0, 0, 255)).all() and (x[1] == (0, 255, 0)).all() and np.array_equal(x[0], x[2])
    assert hashes[0] == hashes[2] != hashes[1]


def test_a_large_photograph_read_at_reduced_size_is_the_same_to_the_eye(tmp_path):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((1600, 1200), 3)
    smooth.save(tmp_path / "a.jpg", quality=90)
    smooth.save(tmp_path / "b.png")
    x = read_images([tmp_path / "a.jpg", tmp_path / "b.png"], 128)[0].astype(int)
    assert abs(x[0] - x[1]).mean() < 2 and abs(x[0] - x[1]).max() < 20


# -------------------------------------------------------------------------------------------------- digests


def test_a_digest_depends_on_contents_and_classes_alone(tmp_path):
    root = tree(tmp_path / "root")
    first = digests(root)
    assert set(first) == {"train", "val"} and first["train"] != first["val"]
    moved = tmp_path / "elsewhere" / "copy"
    moved.parent.mkdir()
    root.rename(moved)
    for path in moved.rglob("*.png"):
        os.utime(path, (1, 1))
        path.rename(path.with_name(f"IMG {9 - int(path.stem)}.PNG"))
    (moved / "val").rename(moved / "valid")
    (moved / "train" / "ant" / "notes.txt").write_text("no image")
    assert digests(moved) == first


def test_a_digest_changes_with_any_file_and_with_its_class(tmp_path):
    root = tree(tmp_path / "root")
    seen, val = {digests(root)["train"]}, digests(root)["val"]
    ant, bee = root / "train" / "ant", root / "train" / "bee"

    def renamed():
        for split in ("train", "val"):
            (root / split / "bee").rename(root / split / "wasp")

    changes = [
        lambda: (ant.rename(root / "x"), bee.rename(ant), (root / "x").rename(bee)),  # exchanged
        lambda: (ant / "0.png").write_bytes((ant / "0.png").read_bytes() + b"\0"),  # of the same pixels
        lambda: save(ant / "2.png"),
        lambda: (ant / "2.png").rename(bee / "2.png"),
        lambda: (bee / "3.png").write_bytes((bee / "2.png").read_bytes()),  # a copy
        lambda: (bee / "0.png").unlink(),
    ]
    for i, change in enumerate(changes):
        change()
        seen.add(digests(root)["train"])
        assert len(seen) == i + 2 and digests(root)["val"] == val
    renamed()
    assert digests(root)["train"] not in seen and digests(root)["val"] != val


def test_without_val_and_test_all_images_are_for_training(tmp_path):
    for splits in (["train"], ["."]):
        root = tree(tmp_path / splits[0] / "root", splits)
        assert list(decode(find_images(str(root)))) == ["train"]
