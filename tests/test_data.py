"""Data sets and their caches. What makes a folder of images out of anybody's files is in test_images.py."""

import http.client
import json
import os
import shutil
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Malicious, save_images, small_cache, small_tree
from PIL import Image, ImageOps

import data
from data import hold_out, load
from plumbing.files import InputError


def images_of(x):
    """A set of what is in the images."""
    return {image.numpy().tobytes() for image in x}


# ------------------------------------------------------------------------------------------------- glyphs


def test_the_generated_set_is_balanced_and_of_the_documented_shape_and_no_image_comes_twice():
    glyphs = load("glyphs")
    assert glyphs.x_train.shape == (2500, 3, 64, 64) and glyphs.x_test.shape == (1000, 3, 64, 64)
    assert glyphs.x_train.dtype == torch.uint8 and glyphs.y_train.dtype == torch.int64
    assert glyphs.num_classes == 10 and glyphs.about["class_names"] == list("AHMOTUVWXY")
    assert (
        glyphs.y_train.bincount().tolist() == [250] * 10 and glyphs.y_test.bincount().tolist() == [100] * 10
    )
    assert len(images_of(glyphs.x_train) | images_of(glyphs.x_test)) == 3500


def test_the_generated_set_is_always_the_same_whatever_was_drawn_before():
    one = data.glyphs(train=30, test=10)
    np.random.seed(1), torch.manual_seed(1), data.random.seed(1)
    assert all(np.array_equal(a, b) for a, b in zip(one, data.glyphs(train=30, test=10)))


# ------------------------------------------------------------------------------------------------- caches


def test_a_cache_is_used_as_it_is_without_asking_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(data.datasets, "CIFAR10", None)  # calling it would fail
    arrays = small_cache(tmp_path / "cifar10.npz")
    loaded = load("cifar10", tmp_path)
    assert loaded.num_classes == 10 and loaded.x_train.dtype == torch.uint8
    assert np.array_equal(loaded.x_train.permute(0, 2, 3, 1).numpy(), arrays["x_train"])
    assert loaded.y_test.dtype == torch.int64 and loaded.y_test.tolist() == arrays["y_test"].tolist()
    few = load("cifar10", tmp_path, classes=3)
    assert (
        few.num_classes == 3
        and few.y_train.tolist() == [0, 1, 2, 0, 1, 2]
        and few.y_test.tolist() == [0, 1, 2]
    )
    assert few.about["class_names"] == ["class 0", "class 1", "class 2"]  # nothing in the cache names them


def test_a_cache_of_ones_own_is_used_as_it_is_beside_no_images_at_all(tmp_path):
    arrays = small_cache(tmp_path / "folder.npz", class_names=[f"bird {i}" for i in range(10)])
    loaded = load("folder", tmp_path)
    assert loaded.num_classes == 10 and loaded.about["class_names"][3] == "bird 3"
    assert np.array_equal(loaded.x_test.permute(0, 2, 3, 1).numpy(), arrays["x_test"])


@pytest.mark.parametrize("kind", ["uint8", "uint64", "int16", ">i4"])
def test_labels_may_be_integers_of_any_kind_and_names_of_classes_anything_that_has_a_name(tmp_path, kind):
    names = dict(uint8=[b"cat %d" % i for i in range(10)], int16=np.arange(10) + 1990)
    labels = dict(y_train=np.arange(20).astype(kind) % 10, y_test=np.arange(10).astype(kind))
    small_cache(tmp_path / "folder.npz", class_names=names.get(kind), **labels)
    loaded = load("folder", tmp_path)
    assert loaded.y_train.dtype == torch.int64 and loaded.y_train.tolist() == [*range(10)] * 2
    expected = dict(uint8="cat 3", int16="1993").get(kind, "class 3")
    assert json.loads(json.dumps(loaded.about))["class_names"][3] == expected
    small_cache(tmp_path / "cifar10.npz")
    assert load("cifar10", tmp_path).about["train"] == loaded.about["train"]  # the same images and labels


@pytest.mark.parametrize(
    "change",
    [
        dict(x_train=None),
        dict(y_train=None),
        dict(y_test=None),
        dict(x_train=np.zeros((20, 32, 32, 3))),
        dict(x_test=np.zeros((10, 16, 16, 3), np.uint8)),
        dict(x_train=np.zeros((20, 3, 32, 32), np.uint8)),
        dict(y_train=np.arange(19) % 10),
        dict(y_train=np.arange(20) % 10 + 1),
        dict(y_test=np.arange(10) + 1),
        dict(y_train=np.arange(20) - 1),
        dict(y_test=np.zeros(10)),
        dict(x_test=np.zeros((0, 32, 32, 3), np.uint8), y_test=[]),
        dict(y_train=np.array([Malicious()] * 20, dtype=object)),
        dict(class_names=["cat", "dog"]),
        dict(digests=["only one"]),
        dict(x_test=None),
        dict(x_val=np.zeros((10, 32, 32, 3), np.uint8), y_val=np.arange(10)),
        dict(x_test=None, y_test=None, y_valid=np.arange(10)),
        dict(x_train=np.zeros((20, 0, 0, 3), np.uint8), x_test=np.zeros((10, 0, 0, 3), np.uint8)),
    ],
    ids=lambda change: " ".join(f"{key} {getattr(value, 'shape', value)}" for key, value in change.items()),
)
def test_a_wrong_cache_is_refused_with_the_file_and_the_next_action(tmp_path, change):
    small_cache(tmp_path / "cifar10.npz", **change)
    with pytest.raises(InputError, match=r"cifar10\.npz .*[Dd]elete it"):
        load("cifar10", tmp_path)
    assert not Path("executed").exists()


def test_labels_from_1_are_refused_where_only_they_tell_the_number_of_classes(tmp_path):
    """Class 0 may be missing where the number is known, as in a cache of Chaoyang's that we wrote."""
    for labels in (np.arange(20) % 10 + 1, np.arange(20) % 9 + 1):
        small_cache(tmp_path / "folder.npz", y_train=labels)
        with pytest.raises(InputError, match="labels from 1 to .* Delete it"):
            load("folder", tmp_path)
    small_cache(tmp_path / "folder.npz", y_train=np.array(["cat", "dog"] * 10))
    with pytest.raises(InputError, match="labels <U3 .* Delete it"):
        load("folder", tmp_path)
    small_cache(tmp_path / "chaoyang.npz", y_train=np.arange(20) % 3 + 1, y_test=np.arange(10) % 3 + 1)
    assert load("chaoyang", tmp_path).num_classes == 4


def test_a_damaged_cache_is_refused(tmp_path):
    cache = tmp_path / "cifar10.npz"
    small_cache(cache)
    whole = cache.read_bytes()
    for content in (b"", b"no zip", whole[: len(whole) // 2]):
        cache.write_bytes(content)
        with pytest.raises(InputError, match=r"cifar10\.npz is not a usable cache .*delete it"):
            load("cifar10", tmp_path)


def test_a_cache_that_claims_to_be_larger_than_memory_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "cifar10.npz", "w") as file, file.open("x_train.npy", "w") as member:
        header = dict(descr="|u1", fortran_order=False, shape=(10**12, 32, 32, 3))
        np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(InputError, match=r"cifar10\.npz does not fit into memory .*free some, or delete it"):
        load("cifar10", tmp_path)


def test_classes_that_cannot_be_chosen_are_refused(tmp_path):
    small_cache(tmp_path / "cifar10.npz", y_test=np.full(10, 9))
    for classes in (1, 11):
        with pytest.raises(InputError, match=f"cannot use {classes} classes of cifar10: choose from 2 to 10"):
            load("cifar10", tmp_path, classes=classes)
    with pytest.raises(InputError, match="no image of the first 3 classes; choose more classes"):
        load("cifar10", tmp_path, classes=3)
    with pytest.raises(InputError, match="unknown data set 'imagenet': choose one of glyphs"):
        load("imagenet", tmp_path)


# ------------------------------------------------------------------------------------ through torchvision


class Cifar:
    """Stands in for torchvision's."""

    classes = [f"thing {i}" for i in range(100)]

    def __init__(self, root, train, download):
        self.data, self.targets = np.full((5, 32, 32, 3), train, np.uint8), [0, 99, 5, 6, 7]


class Flowers(list):
    def __init__(self, root, split, download):
        label = {"train": 0, "val": 1, "test": 101}[split]
        super().__init__((Image.new("RGB", (300, 280), (label, 0, 0)), label) for _ in range(2))


def test_cifar_and_flowers_come_from_torchvision_and_are_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(data.datasets, "CIFAR100", Cifar)
    monkeypatch.setattr(data.datasets, "Flowers102", Flowers)
    cifar, flowers = load("cifar100", tmp_path), load("flowers", tmp_path)
    assert cifar.x_train.unique().tolist() == [1] and cifar.x_test.unique().tolist() == [0]
    assert cifar.y_test.tolist() == [0, 99, 5, 6, 7] and cifar.about["class_names"][99] == "thing 99"
    assert flowers.x_train.shape == (4, 3, 256, 256)  # train and val
    assert flowers.y_train.tolist() == [0, 0, 1, 1] and flowers.y_test.tolist() == [101, 101]
    assert flowers.x_train[:, 0].float().mean(dim=(1, 2)).tolist() == flowers.y_train.tolist()
    monkeypatch.undo()
    for before in (cifar, flowers):
        again = load(before.about["dataset"], tmp_path)
        assert torch.equal(again.x_train, before.x_train) and torch.equal(again.y_test, before.y_test)
        assert again.about == before.about


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no network"),
        RuntimeError("File not found"),
        EOFError(),
        http.client.IncompleteRead(b"half"),
    ],
)
def test_what_cannot_be_fetched_is_named_with_its_archive(tmp_path, monkeypatch, error):
    def fails(*args, **options):
        raise error

    for name, attribute, files, folder in (
        ("cifar10", "CIFAR10", "cifar-10-python.tar.gz", tmp_path),
        ("cifar100", "CIFAR100", "cifar-100-python.tar.gz", tmp_path),
        ("flowers", "Flowers102", "102flowers.tgz, imagelabels.mat and setid.mat", tmp_path / "flowers-102"),
    ):
        monkeypatch.setattr(data.datasets, attribute, fails)
        told = rf"cannot fetch {name} .*put {files} into {folder} .*damaged.*{name}\.npz .* into {tmp_path}, and run"
        with pytest.raises(InputError, match=told):
            load(name, tmp_path)


def test_a_missing_reader_of_torchvisions_is_named(tmp_path, monkeypatch):
    def fails(*args, **options):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr(data.datasets, "Flowers102", fails)
    with pytest.raises(InputError, match="pip install scipy"):
        load("flowers", tmp_path)


def test_a_download_with_an_image_that_cannot_be_decoded_is_refused(tmp_path, monkeypatch):
    class Damaged(Flowers):
        def __iter__(self):
            raise OSError("image file is truncated")

    monkeypatch.setattr(data.datasets, "Flowers102", Damaged)
    with pytest.raises(InputError, match="flowers.*image file is truncated.*again"):
        load("flowers", tmp_path)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- folders of images


def notes(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]


def test_a_folder_is_decoded_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    small_tree(tmp_path)
    decoded = []
    monkeypatch.setattr(data, "decode", lambda listing, f=data.decode: decoded.append(1) or f(listing))
    first = load("folder", tmp_path)
    assert first.num_classes == 2 and first.about["class_names"] == ["cat", "dög"]
    assert first.x_train.shape == (6, 3, 20, 20) and first.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert first.test_names == [f"val/{name}/image {i}.png" for name in ("cat", "dög") for i in range(3)]
    again = load("folder", tmp_path)
    assert len(decoded) == 1 and torch.equal(again.x_train, first.x_train) and again.about == first.about
    save_images(tmp_path / "train" / "dög" / "more", 2)
    assert len(load("folder", tmp_path).x_train) == 8 and len(decoded) == 2
    os.utime(tmp_path / "val" / "cat" / "image 0.png", (0, 0))  # perhaps another image of the same size
    load("folder", tmp_path)
    assert len(decoded) == 3


@pytest.mark.parametrize("exchanged", ["image 0.bmp", "."])
def test_files_and_classes_of_the_same_sizes_and_times_are_not_exchanged_unnoticed(tmp_path, exchanged):
    """Bitmaps are all of one size, and what `git archive` or a zip unpacks to is often all of one time."""
    for name in ("cat", "mouse"):
        save_images(tmp_path / "train" / name, suffix="bmp")
        save_images(tmp_path / "val" / name, suffix="bmp")
    for path in tmp_path.rglob("*.bmp"):
        os.utime(path, (1, 1))
    before = load("folder", tmp_path)
    cat, mouse = (tmp_path / "train" / name / exchanged for name in ("cat", "mouse"))
    cat.rename(tmp_path / "kept"), mouse.rename(cat), (tmp_path / "kept").rename(mouse)
    after = load("folder", tmp_path)
    assert not torch.equal(after.x_train, before.x_train)
    assert after.about["train"] != before.about["train"] and after.about["test"] == before.about["test"]


def test_a_file_that_changes_while_the_folder_is_decoded_is_decoded_again(tmp_path, monkeypatch):
    small_tree(tmp_path)

    def decode(listing, f=data.decode):
        decoded = f(listing)
        Image.new("RGB", (20, 20), "red").save(tmp_path / "train" / "cat" / "image 0.png")
        return decoded

    with monkeypatch.context() as patch:
        patch.setattr(data, "decode", decode)
        before = load("folder", tmp_path)
    assert load("folder", tmp_path).about["train"] != before.about["train"]


def test_images_are_named_by_their_places_in_the_folder(tmp_path):
    for i, name in enumerate(("cat/2019", "cat/2020", "dog")):
        for split in ("Train", "testing"):
            save_images(tmp_path / split / name, 1, 20 + i)
    names = [f"testing/{name}/image 0.png" for name in ("cat/2019", "cat/2020", "dog")]
    for _ in range(2):  # decoded, then from the cache
        assert load("folder", tmp_path).test_names == names


def test_a_copy_of_a_folder_is_the_same_data_and_another_image_is_not(tmp_path):
    small_tree(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = load("folder", tmp_path / "one"), load("folder", tmp_path / "two")
    assert one.about == two.about
    (tmp_path / "two" / "val" / "cat" / "image 0.png").replace(tmp_path / "two" / "val" / "dög" / "a.png")
    three = load("folder", tmp_path / "two")
    assert three.about["train"] == one.about["train"] and three.about["test"] != one.about["test"]


def test_notes_on_a_folder_are_told_also_when_it_comes_from_its_cache(tmp_path, capsys):
    (small_tree(tmp_path) / "train" / "cat" / "notes.txt").touch()
    for _ in range(2):
        load("folder", tmp_path)
        (note,) = notes(capsys)
        assert note.startswith("note: left out: 1 .txt ")


def test_where_no_cache_can_be_written_a_folder_is_read_without_one_and_a_note_says_so(
    tmp_path, monkeypatch, capsys
):
    def full(path, save):
        raise InputError(f"cannot write {path} (No space left on device)")

    monkeypatch.setattr(data, "write_whole", full)
    assert len(load("folder", small_tree(tmp_path)).x_train) == 6
    (note,) = notes(capsys)
    assert note.startswith("note: no cache could be written") and "folder.npz (No space left" in note


def test_a_folder_without_val_and_test_holds_out_a_fifth_of_every_class(tmp_path, capsys):
    for name, count in (("cat", 10), ("mouse", 5)):
        save_images(tmp_path / name, count)
    loaded = load("folder", tmp_path)
    assert notes(capsys) == [
        f"note: {tmp_path} has no val/ or test/: a fifth of every class is held out to measure on"
    ]
    assert loaded.y_train.bincount().tolist() == [8, 4] and loaded.y_test.bincount().tolist() == [2, 1]
    every = [name.split("/")[-2] for name in loaded.test_names]
    assert every == ["cat", "cat", "mouse"]  # names go with their images


def test_files_that_were_renamed_move_the_held_out_part_and_that_is_noticed(tmp_path):
    """Images are held out by their place in the alphabet: a checkpoint of before must not be measured on others."""
    save_images(tmp_path / "cat", 10)
    save_images(tmp_path / "mouse", 10)
    before = [load("folder", tmp_path, held_out=fraction) for fraction in (None, 0.2)]
    for i, path in enumerate(sorted((tmp_path / "cat").iterdir())):
        path.rename(path.with_name(f"{(3 * i + 5) % 10}-anonymous.png"))
    after = [load("folder", tmp_path, held_out=fraction) for fraction in (None, 0.2)]
    for old, new in zip(before, after):
        assert images_of(old.x_test) != images_of(new.x_test)
        assert old.about["train"] != new.about["train"] and old.about["test"] != new.about["test"]


def test_choosing_on_held_out_images_never_looks_at_the_fifth_that_measures_later(tmp_path):
    """Of a folder without val/ and test/, whatever fraction of the rest is held out to choose on."""
    for name, count in (("cat", 10), ("mouse", 15)):
        save_images(tmp_path / name, count)
    whole = load("folder", tmp_path)
    known = [whole.about]
    for fraction in (0.2, 0.5):
        part = load("folder", tmp_path, held_out=fraction)
        assert images_of(part.x_train) | images_of(part.x_test) == images_of(whole.x_train)
        assert not images_of(part.x_train) & images_of(part.x_test)
        assert not set(part.test_names) & set(whole.test_names)
        assert len(part.x_test) == fraction * len(whole.x_train) and part.about not in known
        known.append(part.about)
    assert whole.about["train"] != whole.about["test"] and len(load("folder", tmp_path, 1 + 1).x_test) == 5


def test_with_val_and_test_val_measures_and_test_is_left_for_later(tmp_path):
    small_tree(tmp_path)
    for name in ("cat", "dög"):
        save_images(tmp_path / "test" / name, 1, 31)
    first, later = load("folder", tmp_path), load("folder", tmp_path, split="other")
    assert len(first.x_test) == 6 and len(later.x_test) == 2 and torch.equal(first.x_train, later.x_train)
    assert later.test_names == ["test/cat/image 0.png", "test/dög/image 0.png"]
    assert not images_of(first.x_test) & images_of(later.x_test)
    with pytest.raises(InputError, match="no second split, no test/ beside val/: leave out --split"):
        load("folder", small_tree(tmp_path / "another"), split="other")


def test_a_folder_that_cannot_be_read_leaves_no_cache(tmp_path):
    (small_tree(tmp_path) / "val" / "cat" / "image 0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot read 1 images.*image 0.png"):
        load("folder", tmp_path)
    assert not list(tmp_path.glob("folder.npz*"))


def test_test_images_that_are_training_images_too_are_reported(tmp_path, capsys):
    small_tree(tmp_path)
    load("folder", tmp_path)
    assert not notes(capsys)
    for copy in ("a.png", "b.png"):
        shutil.copy(tmp_path / "train" / "cat" / "image 0.png", tmp_path / "val" / "dög" / copy)
    for _ in range(2):  # decoded, then from the cache
        load("folder", tmp_path)
        (note,) = notes(capsys)
        assert note.startswith("note: 2 of the 8 test images of folder are training images too")
    (tmp_path / "val").rename(tmp_path / "aside")
    shutil.copytree(tmp_path / "aside", tmp_path / "test")
    (tmp_path / "aside").rename(tmp_path / "val")
    load("folder", tmp_path, held_out=0.5, split="other")  # what measures is test/, not what was held out
    assert any(" of the 8 test images of folder are training images too" in note for note in notes(capsys))


# ------------------------------------------------------------------------------------------------ chaoyang


def chaoyang_tree(root, **entries):
    for split in ("train", "test"):
        save_images(root / split, 4, 64, suffix="JPG")
        listed = [dict(name=f"{split}/image {i}.JPG", label=i) for i in range(4)]
        (root / f"{split}.json").write_text(json.dumps(entries.get(split, listed)))
    return root


def test_chaoyang_is_read_in_its_own_layout(tmp_path):
    loaded = load("chaoyang", chaoyang_tree(tmp_path))
    assert loaded.about["class_names"] == ["normal", "serrated", "adenocarcinoma", "adenoma"]
    assert loaded.y_train.tolist() == loaded.y_test.tolist() == [0, 1, 2, 3]
    side = loaded.x_train.shape[2]
    assert side == 64  # small images are not enlarged
    with Image.open(tmp_path / "test" / "image 2.JPG") as image:
        expected = np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC))
    assert np.array_equal(loaded.x_test[2].permute(1, 2, 0).numpy(), expected)


def test_chaoyangs_images_may_lie_elsewhere_behind_a_link(tmp_path):
    chaoyang_tree(tmp_path / "set")
    (tmp_path / "set" / "train").rename(tmp_path / "elsewhere")
    (tmp_path / "set" / "train").symlink_to(tmp_path / "elsewhere")
    assert len(load("chaoyang", tmp_path / "set").x_train) == 4


@pytest.mark.parametrize(
    "listed, message",
    [
        ([], "train.json is empty"),
        (7, "train.json is missing or not a list"),
        ("text", "train.json is missing or not a list"),
        ([dict(name="train/image 0.JPG", label=4)], "a label outside 0 to 3"),
        ([dict(name="train/image 0.JPG", label="0")], "a label outside 0 to 3"),
        ([dict(name="a.JPG")], "train.json .*'label'"),
        ([dict(name="../secret.JPG", label=0)], "names a file outside"),
        ([dict(name="/etc/passwd", label=0)], "names a file outside"),
        ([dict(name="train/absent.JPG", label=0)], "cannot read 1 images.*absent.JPG"),
    ],
    ids=str,
)
def test_a_wrong_chaoyang_list_is_refused(tmp_path, listed, message):
    with pytest.raises(InputError, match=message):
        load("chaoyang", chaoyang_tree(tmp_path / "set", train=listed))
    assert not list(tmp_path.rglob("*.npz*"))


def test_a_chaoyang_list_that_is_no_json_is_refused(tmp_path):
    chaoyang_tree(tmp_path)
    for text in ("{", "[" * 10**5):
        (tmp_path / "test.json").write_text(text)
        with pytest.raises(InputError, match="test.json is missing or not a list"):
            load("chaoyang", tmp_path)


def test_a_missing_chaoyang_says_where_it_comes_from(tmp_path):
    with pytest.raises(InputError, match="ask the authors of Chaoyang"):
        load("chaoyang", tmp_path)


# ---------------------------------------------------------------------------------------- held-out images


def test_a_fixed_part_of_every_class_is_held_out():
    labels = np.array([0] * 10 + [1] * 5 + [2])
    held = hold_out(labels, 0.2)
    assert held[labels == 0].sum() == 2 and held[labels == 1].sum() == 1
    assert held[labels == 2].sum() == 0  # a single image is trained on
    assert np.array_equal(held, hold_out(labels, 0.2))
    assert hold_out(np.array([0, 0, 1, 1]), 0.01).sum() == 2  # one of each at least
    assert hold_out(np.array([0, 0, 1, 1]), 0.99).sum() == 2  # and not all of them
    with pytest.raises(InputError, match="no class has two images"):
        hold_out(np.array([0, 1, 2]), 0.5)


def test_held_out_images_are_training_images_and_no_test_image_is_looked_at(tmp_path):
    small_cache(tmp_path / "cifar10.npz")
    whole, part = load("cifar10", tmp_path), load("cifar10", tmp_path, held_out=0.5)
    assert images_of(part.x_train) | images_of(part.x_test) == images_of(whole.x_train)
    assert not images_of(part.x_train) & images_of(part.x_test)
    assert part.y_train.bincount().tolist() == part.y_test.bincount().tolist() == [1] * 10
    assert part.about["held_out"] == 0.5 and part.about != whole.about
