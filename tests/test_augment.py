"""The augmentation: each operation and the whole against Pillow, the draws, an epoch, the use of a device."""

import functools
import math
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision
from conftest import CIFAR, few_glyphs
from PIL import Image, ImageEnhance, ImageOps
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import augment
import train
from augment import (
    MEAN,
    MOVES,
    OPERATIONS,
    STD,
    batches,
    draw,
    eval_batch_size,
    move,
    prepare,
    recolour,
    resample,
)
from guidance import Guidance
from model import VisionTransformer
from plumbing.devices import make_precision
from teacher import resnet8

FILL = (124, 116, 104)  # ImageNet's mean colour, which moved images are filled up with


@functools.cache
def stored_pictures():
    rng = np.random.default_rng(0)
    real = list(np.load(CIFAR)["x_train"][:3]) if CIFAR.exists() else []
    return [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), few_glyphs()[0][0], *real]


def pictures(side):
    """Pillow images of that side: generated, and real ones where CIFAR-100 is at hand."""
    return [Image.fromarray(image).resize((side, side), Image.BICUBIC) for image in stored_pictures()]


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def to_array(x):
    return x[0].permute(1, 2, 0).numpy()


def plain_greys(n, side=8):
    """n images, the i-th all of level i."""
    return torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, side, side).contiguous()


def glyph_images(n):
    return torch.from_numpy(few_glyphs()[0][:n]).permute(0, 3, 1, 2).contiguous()


# ------------------------------------------------------------------------- each operation, as Pillow has it


def pillow(image, name, u, s):
    """RandAugment's operations as timm writes them for Pillow, with the formulas of the recipe."""
    weight, (width, height) = max(0.1, 1 + 0.9 * u * s), image.size
    affine = {
        "ShearX": (1, 0.3 * u * s, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, 0.3 * u * s, 1, 0),
        "TranslateX": (1, 0, 0.45 * u * s * width, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, 0.45 * u * s * height),
    }
    if name in affine:
        return image.transform(image.size, Image.AFFINE, affine[name], Image.BICUBIC, fillcolor=FILL)
    if name == "Rotate":
        return image.rotate(30 * u * s, Image.BICUBIC, fillcolor=FILL)
    if name == "SolarizeAdd":
        return image.point([min(255, i + int(110 * u)) if i < 128 else i for i in range(256)] * 3)
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return getattr(ImageEnhance, name)(image).enhance(weight)
    return {
        "AutoContrast": ImageOps.autocontrast,
        "Equalize": ImageOps.equalize,
        "Invert": ImageOps.invert,
        "Posterize": lambda im: im.point([i & (0xF00 >> 4 - int(4 * u)) & 0xFF for i in range(256)] * 3),
        "Solarize": lambda im: ImageOps.solarize(im, 256 - int(256 * u)),
    }[name](image)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", OPERATIONS[5:])
def test_colour_operations_equal_pillows(name, sign):
    """Tolerance: one level of 255 (Pillow blends in float32 and truncates), and 0.01 on average."""
    for level in (0.75, 0.87, 0.93):
        for image in pictures(64):
            amounts = torch.tensor([[level], [sign]]).view(2, 1, 1, 1, 1)
            ours = to_array(recolour(to_tensor(image).float(), name, *amounts))
            error = np.abs(ours - np.asarray(pillow(image, name, level, sign), dtype=float))
            assert error.max() <= 1 and error.mean() <= 0.01, (name, level, error.max(), error.mean())


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", MOVES)
def test_geometric_operations_equal_pillows(name, sign):
    """Fill alike; 2 levels of 255 on average where both are bicubic (a = -3/4 here, -1 in Pillow), and 1
    where ours is bilinear, on an image that was enlarged sevenfold."""
    amount = torch.full((1, 1, 1, 1), 0.9 * sign)
    for enlarged, tolerance in ((False, 2), (True, 1)):
        for image in pictures(32 if enlarged else 64):
            image = image.resize((224, 224), Image.BICUBIC) if enlarged else image
            ours = to_array(move(to_tensor(image).float(), name, amount, enlarged))
            theirs = np.asarray(pillow(image, name, 0.9, sign), dtype=float)
            filled = (theirs == FILL).all(axis=2)
            assert 0.02 < filled.mean() < 0.5 and (ours[filled] == FILL).mean() > 0.97
            error = np.abs(ours - theirs)
            assert error.mean() < tolerance, (enlarged, error.mean())


@pytest.mark.parametrize("stored, size", [(32, 224), (32, 32), (256, 32), (256, 224)])
def test_crop_and_flip_equal_pillows_bicubic_resize(stored, size):
    """Enlarged, equal, shrunk. Tolerance: 1 level of 255 (Pillow computes in whole numbers), mean 0.05."""
    top, left, height, width = stored // 5, stored // 8, stored // 2, 2 * stored // 3
    crop = torch.tensor([[top, left, height, width]], dtype=torch.float32)
    for image in pictures(stored):
        cut = image.crop((left, top, left + width, top + height))
        theirs = np.asarray(cut.resize((size, size), Image.BICUBIC), dtype=float)
        for flip in (False, True):
            ours = to_array(resample(to_tensor(image), size, crop, torch.tensor([flip])))
            error = np.abs((ours[:, ::-1] if flip else ours) - theirs)
            assert error.max() <= 1 and error.mean() < 0.05, (error.max(), error.mean())


@pytest.mark.parametrize("stored, size", [(32, 224), (256, 224), (64, 32)])
def test_the_test_transform_is_pillows_bilinear_resize_and_imagenets_normalisation(stored, size):
    for image in pictures(stored):
        expected = torch.from_numpy(np.array(image.resize((size, size), Image.BILINEAR))) / 255
        expected = (expected - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
        expected = expected.permute(2, 0, 1)[None]
        torch.testing.assert_close(prepare(to_tensor(image), size), expected, atol=0.02, rtol=0)


def test_evaluation_takes_fewer_images_at_once_where_they_are_large():
    assert [eval_batch_size(size) for size in (32, 224, 448, 2048)] == [500, 500, 125, 5]


# ---------------------------------------------------------------------------------------------- the draws


def near(frequency, p, trials):
    """Within 5 standard errors."""
    return abs(frequency - p) < 5 * math.sqrt(p * (1 - p) / trials)


def test_operations_levels_and_signs_are_drawn_as_in_rand_m9_mstd05_inc1():
    n = 60_000
    draws = draw(n, 32, 224, torch.Generator().manual_seed(0))
    for slot in (0, 1):
        times = Counter(draws.operation[:, slot].tolist())
        assert near(times[-1] / n, 0.5, n) and set(times) == {-1, *range(15)}
        assert all(near(times[k] / n, 1 / 30, n) for k in range(15))
    both = (draws.operation[:, 0] == draws.operation[:, 1]) & (draws.operation[:, 0] >= 0)
    assert near(both.float().mean().item(), 0.25 / 15, n)  # with replacement, the two independent
    # N(9, 0.5), cut at 10, over 10
    assert abs(draws.level.mean() - 0.9) < 0.003 and 0.045 < draws.level.std() < 0.05
    assert draws.level.max() == 1.0 and near((draws.level == 1).float().mean().item(), 0.02275, 2 * n)
    assert near((draws.sign > 0).float().mean().item(), 0.5, 2 * n)
    assert set(draws.sign.flatten().tolist()) == {-1.0, 1.0}
    assert near(draws.flip.float().mean().item(), 0.5, n)
    assert near((draws.erase[:, 2] > 0).float().mean().item(), 0.25, n)


@pytest.mark.parametrize(
    "kind, side, low, high, ratio", [("crop", 256, 0.08, 1, 3 / 4), ("erase", 224, 0.02, 1 / 3, 0.3)]
)
def test_crops_and_erased_boxes_have_the_areas_and_aspects_of_the_recipe(kind, side, low, high, ratio):
    """Whole pixels inside the image; both ends of the ranges are reached, passed by rounding only."""
    boxes = getattr(draw(60_000, 256, 224, torch.Generator().manual_seed(0)), kind)
    if kind == "erase":
        boxes = boxes[boxes[:, 2] > 0]  # nothing is erased from the others
    top, left, height, width = boxes.T
    assert torch.equal(boxes, boxes.round()) and top.min() >= 0 and left.min() >= 0
    assert (top + height).max() <= side and (left + width).max() <= side
    area, rounding = height * width / side**2, 1.5 / side
    assert low - rounding < area.min() < low + 0.01
    assert high - 0.05 < area.max() < high + rounding
    widest = torch.log(height / width)[area > 0.1].abs().max()  # rounding blurs the aspect of small boxes
    assert 0.9 * math.log(1 / ratio) < widest < math.log(1 / ratio) + 8 * rounding
    assert abs(torch.log(height / width).mean()) < 0.01  # as often upright as lying


def test_crops_have_the_area_of_torchvisions_random_resized_crop():
    """Its mean and its spread, over the image's area."""
    torch.manual_seed(0)
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    theirs = [get_params(torch.zeros(3, 32, 32), (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)]
    theirs = torch.tensor([height * width / 32**2 for _, _, height, width in theirs])
    crop = draw(60_000, 32, 224, torch.Generator().manual_seed(0)).crop
    ours = crop[:, 2] * crop[:, 3] / 32**2
    assert abs(ours.mean() - theirs.mean()) < 0.02 and abs(ours.std() - theirs.std()) < 0.02


def test_weak_augmentation_only_crops_mildly_and_flips():
    draws = draw(5000, 64, 64, torch.Generator().manual_seed(0), "weak")
    assert (draws.operation == -1).all() and (draws.erase == 0).all()
    assert 0.45 < draws.flip.float().mean() < 0.55
    assert (draws.crop[:, 2] * draws.crop[:, 3]).min() / 64**2 > 0.47


# ------------------------------------------------------------------------------------------- all together


@pytest.mark.parametrize("stored, size", [(32, 224), (64, 64), (96, 64)])
def test_the_whole_augmentation_equals_pillows_image_by_image(stored, size):
    """Pillow, told the same random choices: crop, resize, flip, two operations in their order. Half of the
    images within 0.01 levels of 255 on average, 9 of 10 within 0.6. What is erased shows the noise."""
    n, field = 120, torch.randn(3, 2 * size, 2 * size, generator=torch.Generator().manual_seed(1))
    images = [pictures(stored)[i % len(stored_pictures())] for i in range(n)]
    draws = draw(n, stored, size, torch.Generator().manual_seed(3))
    augmented = augment.augment(torch.cat([to_tensor(image) for image in images]), size, draws, field)
    assert augmented.shape == (n, 3, size, size) and augmented.dtype == torch.float32
    levels = 255 * (augmented * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))
    errors = []
    for i, image in enumerate(images):
        top, left, height, width = draws.crop[i].int().tolist()
        image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.BICUBIC)
        image = ImageOps.mirror(image) if draws.flip[i] else image
        for operation, u, s in zip(draws.operation[i].tolist(), draws.level[i], draws.sign[i]):
            if operation >= 0:
                image = pillow(image, OPERATIONS[operation], u.item(), s.item())
        top, left, height, width = draws.erase[i].int().tolist()
        kept = np.ones((size, size), dtype=bool)
        kept[top : top + height, left : left + width] = False
        ours, theirs = levels[i].permute(1, 2, 0).numpy(), np.asarray(image, dtype=float)
        errors.append(np.abs(ours - theirs)[kept].mean())
        down, right = draws.noise[i].tolist()
        noise = field[:, down : down + height, right : right + width]
        assert torch.equal(augmented[i, :, top : top + height, left : left + width], noise)
    assert np.median(errors) < 0.01 and np.quantile(errors, 0.9) < 0.6, np.quantile(errors, [0.5, 0.9, 1])


def epoch(x, seed, strength="strong"):
    """The batches of 16 of an epoch at 32 px; labels number the images."""
    return list(batches(x, torch.arange(len(x)), 16, 32, torch.Generator().manual_seed(seed), strength))


def test_an_epoch_shows_every_image_once_with_its_label():
    shown = epoch(plain_greys(50), 0, "weak")  # crop and flip leave a plain image as it is
    assert [len(images) for images, _ in shown] == [16, 16, 16]  # the last two are dropped
    order = torch.cat([labels for _, labels in shown]).tolist()
    assert len(set(order)) == 48 and order != sorted(order)
    for images, labels in shown:
        grey = 255 * (images[:, 0, 0, 0] * STD[0] + MEAN[0])
        torch.testing.assert_close(grey, labels.float(), atol=0.01, rtol=0)


def test_every_image_is_augmented_in_its_own_way_and_from_the_generator_alone(monkeypatch):
    """Whatever the number of images augmented at once."""
    x = glyph_images(1)[:, :, 16:48, 16:48].repeat(50, 1, 1, 1)  # one image fifty times
    first = epoch(x, 5)
    assert len({image.numpy().tobytes() for images, _ in first for image in images}) >= 45
    torch.manual_seed(99), np.random.seed(99)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, epoch(x, 5)))
    assert not torch.equal(first[0][0], epoch(x, 6)[0][0])
    monkeypatch.setitem(augment.AT_ONCE, "cpu", 1)  # a batch at once instead of all
    for (a, _), (b, _) in zip(first, epoch(x, 5)):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0)  # a rounding may fall the other way


def test_the_parts_of_several_processes_are_together_the_batches_of_one():
    def part(rank, ranks):
        generator = torch.Generator().manual_seed(3)
        return list(batches(glyph_images(50), torch.arange(50), 12, 32, generator, "strong", rank, ranks))

    for ranks in (2, 3):
        parts = [part(rank, ranks) for rank in range(ranks)]
        for step, (images, labels) in enumerate(part(0, 1)):
            assert torch.equal(labels, torch.cat([part[step][1] for part in parts]))
            theirs = torch.cat([part[step][0] for part in parts])
            assert (images - theirs).abs().gt(1e-4).float().mean() < 1e-3  # a rounding may fall the other way


class Memory(TorchDispatchMode):
    """The most bytes held at once by tensors that were created in this context."""

    now = peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        known = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                storage = tensor.untyped_storage()
                self.now, self.peak = self.now + storage.nbytes(), max(self.peak, self.now + storage.nbytes())
                weakref.finalize(storage, self.freed, storage.nbytes())
        return result

    def freed(self, size):
        self.now -= size


@pytest.mark.parametrize("stored, size", [(256, 32), (32, 224), (64, 64)])
def test_large_stored_images_are_augmented_fewer_at_once(stored, size, monkeypatch):
    """Whatever takes the memory, stored images or output, an epoch stays within the bytes it was given; the images
    before, which are still in use, take as much again at most."""
    monkeypatch.setitem(augment.AT_ONCE, "cpu", 2**24)
    x = torch.zeros(64, 3, stored, stored, dtype=torch.uint8)
    with Memory() as memory:
        for _ in batches(x, torch.arange(64), 4, size, torch.Generator().manual_seed(0)):
            pass
    assert 2**23 < memory.peak < 2.5 * 2**24


def test_wrong_images_and_strengths_are_refused():
    x, noise = glyph_images(50), torch.randn(3, 64, 64)
    draws = draw(50, 64, 32, torch.Generator())
    for wrong in (x.float(), x[:, :1], x[:9]):
        with pytest.raises(ValueError, match="uint8 images"):
            augment.augment(wrong, 32, draws, noise)
    with pytest.raises(KeyError, match="mild"):
        epoch(x, 0, "mild")


# ---------------------------------------------------------------------------------------------- on a device


class Called(TorchFunctionMode):
    """Calls the meta device by another one's name."""

    def __init__(self, name):
        super().__init__()
        self.device = torch.device(name)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        real = lambda x: torch.device("meta") if x == self.device else x  # noqa: E731
        args, kwargs = tree_map_only(torch.device, real, (args, kwargs or {}))
        result = function(*args, **kwargs)
        asked = function == torch.Tensor.device.__get__
        return self.device if asked and result.type == "meta" else result


class Elsewhere(TorchDispatchMode):
    """Holds every operation to what is right on a GPU, where the meta device stands for the GPU: no operation
    takes tensors of both devices, and copies to the device wait for their end or not. Whatever looks at
    a tensor's values fails on the meta device by itself, apart from reading results, which is counted."""

    reads = 0

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim}
        assert len(given) < 2, f"{operation} mixes devices"
        if "meta" in given and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self.reads += 1
            return torch.zeros(args[0].shape)
        result = operation(*args, **kwargs)
        if given == {"cpu"} and isinstance(result, torch.Tensor) and result.device.type == "meta":
            assert bool(kwargs.get("non_blocking")) != self.waits, f"{operation}: the wrong way to copy"
        return result


def test_erasing_all_images_at_once_puts_the_noise_where_one_by_one_puts_it():
    """Boxes drawn by the recipe, none, and one that reaches to the last pixel of image and noise."""
    size, n = 24, 400
    draws = augment.draw(n, 32, size, torch.Generator().manual_seed(3))
    boxes, corners = draws.erase.int(), draws.noise
    boxes[0], corners[0] = torch.tensor([20, 0, 4, 24]), size
    noise, before = torch.randn(3, 2 * size, 2 * size), torch.randn(n, 3, size, size)
    expected = before.clone()
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        down, right = corners[i].tolist()
        fresh = noise[:, down : down + height, right : right + width]
        expected[i, :, top : top + height, left : left + width] = fresh
    augment.erase(before, boxes, corners, noise)
    torch.testing.assert_close(before, expected, rtol=0, atol=0)
    augment.erase(before, torch.zeros_like(boxes), corners, noise)
    torch.testing.assert_close(before, expected, rtol=0, atol=0)


@pytest.mark.parametrize("size, kind", [(32, "cuda"), (64, "cuda"), (32, "mps")])
def test_an_epoch_waits_for_the_device_once_and_mixes_no_devices(size, kind, monkeypatch):
    """Guided training at the size of the stored images and enlarged, every operation of the augmentation
    included: the host reads one tensor, the epoch's means. On Apple's GPUs it waits for every copy too, as the
    copy of a temporary tensor is unsafe otherwise."""
    student = VisionTransformer(10, size, 8, 48, 3, 3, (0, 1, 2), drop_path=0.1).to("meta")
    teacher = resnet8(10).to("meta").eval().requires_grad_(False)
    guide = Guidance(student.feature_channels, teacher.feature_channels).to("meta")
    optimizer = train.make_optimizer(student, guide, 1e-3, fused=False)  # this device has no fused one
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    used = set()

    def noted(original):
        def operation(images, name, *rest, **options):
            used.add(name)
            return original(images, name, *rest, **options)

        return operation

    monkeypatch.setattr(augment, "move", noted(move))
    monkeypatch.setattr(augment, "recolour", noted(recolour))
    monkeypatch.setitem(augment.AT_ONCE, kind, 2**22)
    x = torch.zeros(256, 3, 32, 32, dtype=torch.uint8, device="meta")
    y = torch.zeros(256, dtype=torch.long, device="meta")
    images = batches(x, y, 128, size, torch.Generator().manual_seed(0))
    float32 = make_precision(torch.device("cpu"), torch.float32)  # does nothing, so any device will do
    with Called(kind), Elsewhere(waits=kind == "mps") as watch:
        train.train_epoch(student, teacher, guide, optimizer, scheduler, images, 2.5, float32)
    assert watch.reads == 1 and used == set(OPERATIONS)
