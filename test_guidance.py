"""The project's claims, each against a reference that is not our code: loops, Pillow, torchvision, timm.

    pytest test_guidance.py

Images are generated; where a cache data/cifar100.npz is at hand, operations are checked on real ones as well.
"""

import argparse
import functools
import importlib
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import create_feature_extractor

import bench
import data
import train
from data import (
    MOVES,
    OPERATIONS,
    Data,
    InputError,
    augment,
    batches,
    draw,
    load,
    move,
    prepare,
    recolour,
    resample,
)
from guidance import AdaptiveStop, Guidance, beta_at
from model import VisionTransformer, deit_mini, deit_tiny
from teacher import resnet8, resnet18, resnet56

HERE = Path(__file__).parent
CIFAR = HERE / "data" / "cifar100.npz"


def count(module):
    return sum(p.numel() for p in module.parameters())


def randomise(model):
    """Weights away from their initial zeros and ones, so that no term of a comparison vanishes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    return model


def calibrate(cnn, images):
    """Gives the BatchNorms the statistics of these images, as training would."""
    for module in cnn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    cnn.train()(images)
    return cnn.eval()


# ---------------------------------------------------------------------------------------------- models


def test_parameter_counts_are_the_published_ones():
    assert count(deit_tiny(100)) == 5_543_716
    assert count(resnet56(100)) == 861_620
    assert count(resnet18(100)) == 11_227_812
    assert count(Guidance((192, 192, 192), (16, 32, 64))) == 21_616


def test_feature_maps_have_the_published_shapes():
    logits, features = deit_tiny(100)(torch.randn(2, 3, 224, 224))
    assert logits.shape == (2, 100) and [f.shape[1:] for f in features] == [(192, 14, 14)] * 3
    logits, features = resnet56(100)(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 100) and [f.shape[1:] for f in features] == [
        (16, 32, 32),
        (32, 16, 16),
        (64, 8, 8),
    ]
    _, features = resnet18(100)(torch.randn(1, 3, 224, 224))
    assert [f.shape[1:] for f in features] == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]


def test_deit_tiny_computes_what_torchvisions_vit_computes_with_the_same_weights():
    ours = randomise(deit_tiny(100, image_size=64)).eval()
    theirs = torchvision.models.VisionTransformer(64, 16, 12, 3, 192, 768, num_classes=100).eval()
    renamed = {}
    for name, value in ours.state_dict().items():
        for old, new in (
            ("patch_embed.proj", "conv_proj"),
            ("cls_token", "class_token"),
            ("pos_embed", "encoder.pos_embedding"),
            ("blocks.", "encoder.layers.encoder_layer_"),
            ("norm1", "ln_1"),
            ("norm2", "ln_2"),
            ("attn.qkv.", "self_attention.in_proj_"),
            ("attn.proj", "self_attention.out_proj"),
            ("mlp.fc1", "mlp.0"),
            ("mlp.fc2", "mlp.3"),
            ("head", "heads.head"),
        ):
            name = name.replace(old, new)
        renamed[name.replace("norm.", "encoder.ln.") if name.startswith("norm.") else name] = value
    theirs.load_state_dict(renamed)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images)[0], theirs(images), rtol=1e-4, atol=1e-4)


def test_deit_tiny_loads_strictly_into_timm_and_back_with_equal_logits_and_features():
    timm = pytest.importorskip("timm", reason="timm is not installed; .ci/run installs it and runs this test")
    ours = randomise(deit_tiny(100)).eval()
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=100).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 224, 224)
    logits, features = ours(images)
    torch.testing.assert_close(logits, theirs(images), rtol=1e-4, atol=1e-4)
    for ours_map, theirs_map in zip(
        features, theirs.forward_intermediates(images, (0, 6, 11), intermediates_only=True)
    ):
        torch.testing.assert_close(ours_map, theirs_map, rtol=1e-4, atol=1e-4)
    deit_tiny(100).load_state_dict(theirs.state_dict(), strict=True)


def test_features_are_the_raw_output_of_the_guided_blocks_without_cls_token_in_image_order():
    model = randomise(deit_mini(10, image_size=32, patch_size=8, guided_blocks=(1, 4))).eval()
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    _, features = model(torch.randn(2, 3, 32, 32))
    for feature, tokens in zip(features, (outputs[1], outputs[4])):
        for row in range(4):
            for column in range(4):
                assert torch.equal(feature[:, :, row, column], tokens[:, 1 + 4 * row + column])


def test_resnet18_loads_strictly_into_torchvision_with_equal_logits_and_features():
    ours, theirs = randomise(resnet18(10)), torchvision.models.resnet18(num_classes=10)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    for mode in (False, True):
        ours.train(mode), theirs.train(mode)
        stages = create_feature_extractor(theirs, ["layer1", "layer2", "layer3", "layer4", "fc"])(images)
        theirs.load_state_dict(ours.state_dict())  # the statistics that train mode moved
        logits, features = ours(images)
        for mine, reference in zip([*features, logits], stages.values()):
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


def test_resnet56_computes_what_torchvisions_blocks_compute_with_the_same_weights():
    images, block = torch.randn(8, 3, 32, 32), torchvision.models.resnet.BasicBlock
    ours = calibrate(randomise(resnet56(10)), images)

    def projection(c_in, c_out):
        return nn.Sequential(nn.Conv2d(c_in, c_out, 1, 2, bias=False), nn.BatchNorm2d(c_out))

    theirs = nn.ModuleDict(
        dict(
            conv1=nn.Conv2d(3, 16, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(16),
            layer1=nn.Sequential(*[block(16, 16) for _ in range(9)]),
            layer2=nn.Sequential(block(16, 32, 2, projection(16, 32)), *[block(32, 32) for _ in range(8)]),
            layer3=nn.Sequential(block(32, 64, 2, projection(32, 64)), *[block(64, 64) for _ in range(8)]),
            fc=nn.Linear(64, 10),
        )
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, expected = theirs["bn1"](theirs["conv1"](images)).relu(), []
    for stage in ("layer1", "layer2", "layer3"):
        x = theirs[stage](x)
        expected.append(x)
    logits, features = ours(images)
    for mine, reference in zip([*features, logits], [*expected, theirs["fc"](x.mean(dim=(2, 3)))]):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(image_size=30), "not a multiple of patch size"),
        (dict(width=100), "not a multiple of the number of heads"),
        (dict(guided_blocks=(0, 12)), "guided blocks"),
        (dict(guided_blocks=(6, 0)), "guided blocks"),
        (dict(num_classes=0), "num_classes"),
        (dict(depth=0), "depth"),
        (dict(drop_path=1.0), "drop_path"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{**dict(num_classes=10, image_size=32, patch_size=4), **wrong})


def test_images_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 3, 32, 32\), got \(1, 3, 64, 64\)"):
        deit_mini(10)(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="expected images"):
        resnet8(10)(torch.randn(1, 1, 32, 32))


def test_the_first_prediction_of_deit_is_uniform():
    logits, _ = deit_mini(10)(torch.randn(3, 3, 32, 32))
    assert torch.equal(logits, torch.zeros(3, 10))


# -------------------------------------------------------------------------------------------- guidance


def bilinear(image, height, width):
    """Bilinear resize with half-pixel centres, one pixel at a time: by definition. image (H, W), numpy."""
    H, W = image.shape
    out = np.empty((height, width))
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * H / height - 0.5, 0), H - 1)
            x = min(max((j + 0.5) * W / width - 0.5, 0), W - 1)
            t, s = int(y), int(x)
            b, r, fy, fx = min(t + 1, H - 1), min(s + 1, W - 1), y - t, x - s
            out[i, j] = (1 - fy) * ((1 - fx) * image[t, s] + fx * image[t, r]) + fy * (
                (1 - fx) * image[b, s] + fx * image[b, r]
            )
    return out


def test_the_loss_is_the_papers_formula_computed_with_loops():
    """L = sum_i 1/(H_i W_i) ||F_vt - F_cnn||_F^2, batch averaged; teacher's grid larger, equal, smaller."""
    torch.manual_seed(0)
    student = [torch.randn(2, 5, 3, 3), torch.randn(2, 4, 3, 3), torch.randn(2, 5, 3, 3)]
    teacher = [torch.randn(2, 2, 6, 6), torch.randn(2, 3, 3, 3), torch.randn(2, 4, 2, 2)]
    guide = Guidance((5, 4, 5), (2, 3, 4), reduction="sum")
    expected = 0.0
    for project, f_vt, f_cnn in zip(guide.projections, student, teacher):
        weight, bias = (
            project.weight.detach().double().numpy()[:, :, 0, 0],
            project.bias.detach().double().numpy(),
        )
        side = max(f_vt.shape[-1], f_cnn.shape[-1])
        for b in range(2):
            for c in range(f_cnn.shape[1]):
                projected = bias[c] + sum(
                    weight[c, d] * f_vt[b, d].double().numpy() for d in range(f_vt.shape[1])
                )
                target = bilinear(f_cnn[b, c].double().numpy(), side, side)
                expected += ((bilinear(projected, side, side) - target) ** 2).sum() / side**2 / 2
    assert guide(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_per_layer_the_sum_form_is_c_times_the_mean_form_and_mean_is_the_default():
    student = torch.randn(2, 12, 4, 4)
    for channels in (16, 32, 64):
        teacher = torch.randn(2, channels, 8, 8)
        mean, total = Guidance((12,), (channels,)), Guidance((12,), (channels,), "sum")
        total.load_state_dict(mean.state_dict())
        assert mean.reduction == "mean"
        assert total([student], [teacher]).item() == pytest.approx(
            channels * mean([student], [teacher]).item(), rel=1e-5
        )


def test_the_loss_is_zero_for_equal_maps_and_its_gradient_reaches_student_and_projections_only():
    guide = Guidance((4,), (4,))
    guide.projections[0].weight.data.copy_(torch.eye(4)[:, :, None, None])
    guide.projections[0].bias.data.zero_()
    maps = torch.randn(2, 4, 6, 6)
    assert guide([maps], [maps]).item() == 0
    student, teacher = (torch.randn(2, 4, 6, 6, requires_grad=True) for _ in range(2))
    guide([student], [teacher]).backward()
    assert student.grad.abs().sum() > 0 and guide.projections[0].weight.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("strength", [1.0, 0.05])
def test_the_relative_form_is_1_for_zeros_0_for_a_copy_and_has_no_unit(strength):
    """The mean form over the summed mean squares of the teacher's maps at the compared size, by loops; a
    teacher with weaker features gives the same loss for a student whose maps are weaker in proportion."""
    torch.manual_seed(0)
    student = [torch.randn(2, 4, 3, 3), torch.randn(2, 4, 8, 8)]
    teacher = [strength * torch.randn(2, 2, 6, 6).relu(), strength * 9 * torch.randn(2, 3, 2, 2).relu()]
    guide = Guidance((4, 4), (2, 3), "relative")
    guide.measure([maps[:1] for maps in student], teacher)
    unit = 0.0
    for maps, side in zip(teacher, (6, 8)):
        planes = [bilinear(plane.double().numpy(), side, side) for image in maps for plane in image]
        unit += np.mean(np.square(planes))
    assert guide.scale.item() == pytest.approx(unit, rel=1e-5)
    mean = Guidance((4, 4), (2, 3))
    mean.load_state_dict(guide.state_dict() | {"scale": torch.ones(())})
    assert guide(student, teacher).item() == pytest.approx(mean(student, teacher).item() / unit, rel=1e-5)
    for project in guide.projections:
        nn.init.zeros_(project.weight), nn.init.zeros_(project.bias)
    assert guide(student, teacher).item() == pytest.approx(1, rel=1e-5)
    guide.projections = nn.ModuleList(nn.Identity() for _ in teacher)
    for project in guide.projections:
        project.weight = torch.zeros(())  # `forward` asks for its precision
    assert guide(teacher, teacher).item() == 0


def test_a_teacher_whose_maps_are_zero_is_refused_as_a_unit():
    guide = Guidance((4,), (2,), "relative")
    with pytest.raises(ValueError, match="mean square of 0.0"):
        guide.measure([torch.randn(1, 4, 3, 3)], [torch.zeros(2, 2, 6, 6)])


def test_guidance_refuses_maps_that_do_not_belong_together():
    with pytest.raises(ValueError, match="3 guided feature maps, the teacher 2"):
        Guidance((8, 8, 8), (4, 4))
    with pytest.raises(ValueError, match="reduction"):
        Guidance((8,), (4,), "median")
    with pytest.raises(ValueError, match="expected 1 feature maps"):
        Guidance((8,), (4,))([], [])
    with pytest.raises(ValueError, match="differ in batch or channels"):
        Guidance((8,), (4,))([torch.randn(1, 8, 2, 2)], [torch.randn(1, 5, 2, 2)])


def test_early_guidance_falls_linearly_to_zero_over_the_first_third():
    assert [beta_at("early", e, 300) for e in (0, 25, 50, 99, 100, 299)] == pytest.approx(
        [2.5, 1.875, 1.25, 0.025, 0, 0]
    )
    assert beta_at("early", 100, 300) == 0.0 and beta_at("early", 99, 300) > 0
    assert beta_at("early", 30, 300, beta=1.0, guide_epochs=60) == 0.5
    assert beta_at("early", 0, 1) == 2.5


def test_the_other_schedules():
    assert {beta_at("none", e, 300) for e in range(300)} == {0.0}
    assert {beta_at("constant", e, 300) for e in range(300)} == {2.5}
    assert [beta_at("constant", e, 300, 1.5, guide_epochs=100) for e in (0, 99, 100)] == [1.5, 1.5, 0.0]


@pytest.mark.parametrize(
    "wrong",
    [
        ("linear", 0, 10),
        ("early", 10, 10),
        ("early", -1, 10),
        ("early", 0, 10, -1.0),
        ("early", 0, 10, math.nan),
        ("early", 0, 10, 2.5, 0),
    ],
)
def test_schedules_refuse_nonsense(wrong):
    with pytest.raises(ValueError):
        beta_at(*wrong)


def test_the_adaptive_rule_is_the_published_one_case_by_case():
    """Eqs. 10-19 of ALG written out in their three cases, on noisy falling histories; L is indexed from 1."""

    def published(L, e, W):
        def d(k):
            return (L[k] - np.mean([L[j] for j in range(1, k)])) / k if k <= W else (L[k] - L[k - W]) / W

        if e <= W:
            return sum(d(k) for k in range(2, e + 1)) / e
        if e < 2 * W:
            return np.mean([d(k) for k in range(e - W + 1, e + 1)])
        return sum(L[i] - L[i - W] for i in range(e - W + 1, e + 1)) / W**2

    rng, stops = np.random.default_rng(0), set()
    for scale, W in ((1.0, 5), (8.0, 5), (30.0, 20)):
        losses = [scale * (math.exp(-e / 15) + 0.02 * rng.normal()) + 1 for e in range(1, 121)]
        stop, L = AdaptiveStop(window=W), dict(enumerate(losses, start=1))
        for e in range(1, 121):
            goes_on = stop.update(losses[e - 1])
            assert goes_on == (e == 1 or published(L, e, W) < -0.02), (scale, W, e)
            if not goes_on:
                stops.add(e)
                break
    assert len(stops) == 3  # every history stopped, each at its own epoch


def test_the_adaptive_rule_on_a_straight_line():
    """A loss that falls by 0.03 an epoch keeps guidance going; one that falls by 0.01 ends it at once."""
    flat = AdaptiveStop()
    assert flat.window == 50 and flat.threshold == -0.02
    fast, slow = AdaptiveStop(window=1), AdaptiveStop(window=1)
    assert [fast.update(10 - 0.03 * e) for e in range(100)] == [True] * 100
    assert [slow.update(10 - 0.01 * e) for e in range(3)] == [True, False, False]
    assert flat.update(1.0) and not flat.update(1.0)
    with pytest.raises(ValueError, match="epoch 2"):
        bad = AdaptiveStop()
        bad.update(1.0)
        bad.update(math.nan)


def test_guidance_is_plug_and_play_for_a_torchvision_swin():
    """A Swin-T whose maps come from torchvision's own feature extraction learns to match a ResNet-56's."""
    torch.manual_seed(0)
    swin = create_feature_extractor(
        torchvision.models.swin_t(), {"features.1": "a", "features.3": "b", "features.5": "c"}
    )
    images, guide = torch.randn(4, 3, 64, 64), Guidance((96, 192, 384), (16, 32, 64))
    cnn = calibrate(resnet56(10), F.interpolate(images, 32, mode="bilinear"))
    optimizer = torch.optim.AdamW([*swin.parameters(), *guide.parameters()], lr=1e-3)
    with torch.no_grad():
        _, targets = cnn(F.interpolate(images, 32, mode="bilinear"))
    losses = []
    for _ in range(6):
        maps = [m.permute(0, 3, 1, 2) for m in swin(images).values()]  # Swin keeps channels last
        losses.append(guide(maps, targets))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


# ---------------------------------------------------------------------------------------- augmentation


@functools.cache
def small_pictures():
    rng = np.random.default_rng(0)
    real = list(np.load(CIFAR)["x_train"][:3]) if CIFAR.exists() else []
    return [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), data.glyphs(1, 0)[0][0], *real]


def pictures(side):
    """Pillow images of that side: generated, and real ones where CIFAR-100 is at hand."""
    return [Image.fromarray(image).resize((side, side), Image.BICUBIC) for image in small_pictures()]


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def to_array(x):
    return x[0].permute(1, 2, 0).numpy()


def pillow(image, name, u, s):
    """RandAugment's operations as timm writes them for Pillow, with the formulas of method.md, section 3."""
    weight, (width, height) = max(0.1, 1 + 0.9 * u * s), image.size
    affine = {
        "ShearX": (1, 0.3 * u * s, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, 0.3 * u * s, 1, 0),
        "TranslateX": (1, 0, 0.45 * u * s * width, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, 0.45 * u * s * height),
    }
    if name in affine:
        return image.transform(
            image.size, Image.AFFINE, affine[name], Image.BICUBIC, fillcolor=(124, 116, 104)
        )
    if name == "Rotate":
        return image.rotate(30 * u * s, Image.BICUBIC, fillcolor=(124, 116, 104))
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
            fill = (theirs == (124, 116, 104)).all(axis=2)
            assert 0.02 < fill.mean() < 0.5 and (ours[fill] == (124, 116, 104)).mean() > 0.97
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
        torch.testing.assert_close(
            prepare(to_tensor(image), size), expected.permute(2, 0, 1)[None], atol=0.02, rtol=0
        )


def test_the_draws_have_the_distribution_of_the_recipe():
    """rand-m9-mstd0.5-inc1, DeiT's crops, erasing at 0.25: frequencies within 5 standard errors, ranges."""
    n = 60_000
    draws = draw(n, 32, 224, torch.Generator().manual_seed(0))

    def near(frequency, p, trials=n):
        return abs(frequency - p) < 5 * math.sqrt(p * (1 - p) / trials)

    for slot in (0, 1):
        times = Counter(draws.operation[:, slot].tolist())
        assert near(times[-1] / n, 0.5) and set(times) == {-1, *range(15)}
        assert all(near(times[k] / n, 1 / 30) for k in range(15))
    both = (draws.operation[:, 0] == draws.operation[:, 1]) & (draws.operation[:, 0] >= 0)
    assert near(both.float().mean().item(), 0.25 / 15)  # with replacement, the two independent
    assert (
        abs(draws.level.mean() - 0.9) < 0.003 and 0.045 < draws.level.std() < 0.05
    )  # N(9, 0.5), cut at 10, over 10
    assert draws.level.max() == 1.0 and near((draws.level == 1).float().mean().item(), 0.02275, 2 * n)
    assert near((draws.sign > 0).float().mean().item(), 0.5, 2 * n) and set(
        draws.sign.flatten().tolist()
    ) == {-1.0, 1.0}
    assert near(draws.flip.float().mean().item(), 0.5)
    assert near((draws.erase[:, 2] > 0).float().mean().item(), 0.25)

    for boxes, side, low, high, ratio in (
        (draws.crop, 32, 0.08, 1, 3 / 4),
        (draws.erase[draws.erase[:, 2] > 0], 224, 0.02, 1 / 3, 0.3),
    ):
        top, left, height, width = boxes.T
        assert (
            top.min() >= 0
            and left.min() >= 0
            and (top + height).max() <= side
            and (left + width).max() <= side
        )
        area, round_off = height * width / side**2, 1.5 / side
        assert (
            low - round_off < area.min() < low + 0.02
            and high - 0.05 < area.max()
            and area.max() < high + round_off
            and torch.equal(boxes, boxes.round())
        )
        widest = torch.log(height / width)[area > 0.1].abs().max()  # rounding blurs the aspect of small boxes
        assert 0.9 * math.log(1 / ratio) < widest < math.log(1 / ratio) + 8 * round_off
        assert abs(torch.log(height / width).mean()) < 0.01  # as often upright as lying
    # the same crops as torchvision's RandomResizedCrop: mean and spread of their area
    theirs = [
        torchvision.transforms.RandomResizedCrop.get_params(torch.zeros(3, 32, 32), (0.08, 1), (3 / 4, 4 / 3))
        for _ in range(4000)
    ]
    theirs = torch.tensor([height * width / 32**2 for _, _, height, width in theirs])
    ours = draws.crop[:, 2] * draws.crop[:, 3] / 32**2
    assert abs(ours.mean() - theirs.mean()) < 0.02 and abs(ours.std() - theirs.std()) < 0.02


def test_weak_augmentation_only_crops_mildly_and_flips():
    draws = draw(5000, 64, 64, torch.Generator().manual_seed(0), "weak")
    assert (
        (draws.operation == -1).all() and (draws.erase == 0).all() and 0.45 < draws.flip.float().mean() < 0.55
    )
    assert (draws.crop[:, 2] * draws.crop[:, 3]).min() / 64**2 > 0.47


@pytest.mark.parametrize("stored, size", [(32, 224), (64, 64), (96, 64)])
def test_the_whole_augmentation_equals_pillows_image_by_image(stored, size):
    """Pillow, told the same random choices: crop, resize, flip, two operations in their order. Half of the
    images within 0.01 levels of 255 on average, 9 of 10 within 0.6."""
    n, field = 120, torch.randn(3, 2 * size, 2 * size, generator=torch.Generator().manual_seed(1))
    images = [pictures(stored)[i % len(small_pictures())] for i in range(n)]
    draws = draw(n, stored, size, torch.Generator().manual_seed(3))
    augmented = augment(torch.cat([to_tensor(image) for image in images]), size, draws, field)
    assert augmented.shape == (n, 3, size, size) and augmented.dtype == torch.float32
    levels = 255 * (augmented * torch.tensor(data.STD).view(3, 1, 1) + torch.tensor(data.MEAN).view(3, 1, 1))
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


def test_an_epoch_shows_every_image_once_with_its_label_and_its_own_augmentation(monkeypatch):
    """Whatever the number of images augmented at once, and from the generator alone."""
    x = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 3, 8, 8).contiguous()  # plain greys

    def epoch(seed, strength="strong", x=x, size=32):
        return list(batches(x, torch.arange(50), 16, size, torch.Generator().manual_seed(seed), strength))

    plain = epoch(0, "weak")  # crop and flip leave a plain image as it is
    assert [len(images) for images, _ in plain] == [16, 16, 16]  # the last two are dropped
    shown = torch.cat([labels for _, labels in plain])
    assert len(set(shown.tolist())) == 48 and shown.tolist() != sorted(shown.tolist())
    for images, labels in plain:
        grey = 255 * (images[:, 0, 0, 0] * data.STD[0] + data.MEAN[0])
        torch.testing.assert_close(grey, labels.float(), atol=0.01, rtol=0)

    x = load("glyphs").x_train[:1, :, 16:48, 16:48].repeat(50, 1, 1, 1)  # one image fifty times
    first = epoch(5, x=x)
    assert len({image.numpy().tobytes() for images, _ in first for image in images}) >= 45
    torch.manual_seed(99), np.random.seed(99)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, epoch(5, x=x)))
    assert not torch.equal(first[0][0], epoch(6, x=x)[0][0])
    monkeypatch.setitem(data.AT_ONCE, "cpu", 5 * 12 * 32**2)  # five images at once instead of all
    for (a, _), (b, _) in zip(first, epoch(5, x=x)):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0)  # a rounding may fall the other way
    noise = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(1))
    draws = draw(50, 64, 32, torch.Generator())
    for wrong in (x.float(), x[:, :1], x[:9]):
        with pytest.raises(ValueError, match="uint8 images"):
            augment(wrong, 32, draws, noise)
    with pytest.raises(ValueError, match="strength"):
        epoch(0, "mild")


# ------------------------------------------------------------------------------------------- data sets


def save_images(folder, count=3, side=20, mode="RGB", suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(folder)))
    for i in range(count):
        image = Image.fromarray(rng.integers(0, 256, (side, side + i, 3), dtype=np.uint8)).convert(mode)
        image.save(folder / f"image {i}.{suffix}")


def small_tree(root):
    for split in ("train", "val"):
        for name in ("cat", "dög"):
            save_images(root / split / name)
    return root


def small_cache(path, **changes):
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


def test_the_generated_set_is_balanced_reproducible_and_of_the_documented_shape():
    one, two = load("glyphs"), load("glyphs")
    assert (
        one.x_train.shape == (2500, 3, 64, 64)
        and one.x_test.shape == (1000, 3, 64, 64)
        and one.num_classes == 10
    )
    assert torch.equal(one.x_train, two.x_train) and set(torch.bincount(one.y_train).tolist()) == {250}
    assert not any((one.x_test[:50, None] == one.x_train[None, :50]).all(dim=(2, 3, 4)).flatten())


def test_a_cache_is_used_as_it_is_without_asking_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(data.datasets, "CIFAR10", None)  # calling it would fail
    arrays = small_cache(tmp_path / "cifar10.npz")
    loaded = load("cifar10", tmp_path)
    assert (
        loaded.num_classes == 10
        and loaded.x_train.dtype == torch.uint8
        and loaded.y_test.dtype == torch.int64
    )
    assert np.array_equal(loaded.x_train.permute(0, 2, 3, 1).numpy(), arrays["x_train"])
    assert np.array_equal(loaded.y_test.numpy(), arrays["y_test"])
    few = load("cifar10", tmp_path, classes=3)
    assert few.num_classes == 3 and few.y_train.tolist() == [y for y in arrays["y_train"] if y < 3]


@pytest.mark.parametrize(
    "change",
    [
        dict(x_train=None),
        dict(x_train=np.zeros((20, 32, 32, 3))),
        dict(x_test=np.zeros((10, 16, 16, 3), np.uint8)),
        dict(x_train=np.zeros((20, 3, 32, 32), np.uint8)),
        dict(y_train=np.arange(19) % 10),
        dict(y_test=np.arange(10) + 1),
        dict(y_train=np.arange(20) - 1),
        dict(y_test=np.zeros(10)),
        dict(x_test=np.zeros((0, 32, 32, 3), np.uint8), y_test=[]),
        dict(y_train=np.array([{}] * 20, dtype=object)),
    ],
    ids=str,
)
def test_a_wrong_cache_is_refused_with_the_file_and_the_next_action(tmp_path, change):
    small_cache(tmp_path / "cifar10.npz", **change)
    with pytest.raises(InputError, match=r"cifar10\.npz .*[Dd]elete it"):
        load("cifar10", tmp_path)


def test_a_damaged_cache_is_refused(tmp_path):
    small_cache(tmp_path / "cifar10.npz")
    whole = (tmp_path / "cifar10.npz").read_bytes()
    for content in (b"", b"no zip", whole[: len(whole) // 2]):
        (tmp_path / "cifar10.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"cifar10\.npz is no usable cache"):
            load("cifar10", tmp_path)


def test_without_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise urllib.error.URLError("Name or service not known")

    for name, attribute in (("cifar10", "CIFAR10"), ("cifar100", "CIFAR100"), ("flowers", "Flowers102")):
        monkeypatch.setattr(data.datasets, attribute, offline)
        with pytest.raises(InputError, match=rf"cannot fetch {name} .*cache {name}\.npz"):
            load(name, tmp_path)
    with pytest.raises(InputError, match="unknown data set 'imagenet': choose one of glyphs"):
        load("imagenet", tmp_path)


def test_cifar_and_flowers_come_from_torchvision_and_are_cached(tmp_path, monkeypatch):
    class Cifar:
        def __init__(self, root, train, download):
            self.data, self.targets = np.full((5, 32, 32, 3), train, np.uint8), [0, 99, 5, 6, 7]

    class Flowers(list):
        def __init__(self, root, split, download):
            label = {"train": 0, "val": 1, "test": 101}[split]
            super().__init__((Image.new("RGB", (300, 280), (label, 0, 0)), label) for _ in range(2))

    monkeypatch.setattr(data.datasets, "CIFAR100", Cifar)
    monkeypatch.setattr(data.datasets, "Flowers102", Flowers)
    loaded = load("cifar100", tmp_path)
    assert loaded.x_train.unique().tolist() == [1] and loaded.y_test.tolist() == [0, 99, 5, 6, 7]
    loaded = load("flowers", tmp_path)
    assert loaded.x_train.shape == (4, 3, 256, 256) and loaded.y_train.tolist() == [0, 0, 1, 1]
    assert loaded.x_train[:, 0].float().mean(dim=(1, 2)).tolist() == loaded.y_train.tolist()
    assert (tmp_path / "cifar100.npz").exists() and (tmp_path / "flowers.npz").exists()


def test_a_folder_of_ones_own_images_of_every_kind_and_size(tmp_path):
    small_tree(tmp_path)
    for mode, suffix in (
        ("L", "png"),
        ("P", "png"),
        ("RGBA", "png"),
        ("CMYK", "jpg"),
        ("1", "bmp"),
        ("RGB", "webp"),
    ):
        save_images(
            tmp_path / "train" / "cat" / mode, 1, 40, mode, suffix
        )  # ImageFolder looks into subfolders
    grey = Image.new("L", (50, 30), 77)
    grey.save(tmp_path / "train" / "cat" / "a.png")  # comes first
    loaded = load("folder", tmp_path)
    assert loaded.num_classes == 2 and loaded.y_train.tolist() == [0] * 10 + [1] * 3
    assert loaded.x_train.shape[2] == 30  # the median short side, not enlarged to 256
    assert loaded.x_train[0].unique().tolist() == [77]
    stamp = (tmp_path / "folder.npz").stat().st_mtime_ns
    assert (
        len(load("folder", tmp_path).x_train) == 13 and (tmp_path / "folder.npz").stat().st_mtime_ns == stamp
    )
    save_images(tmp_path / "train" / "dög" / "more", 2)
    assert len(load("folder", tmp_path).x_train) == 15  # the tree is newer than its cache


def test_a_photograph_is_stored_upright_and_its_middle_is_kept(tmp_path):
    small_tree(tmp_path)
    image = Image.new("RGB", (600, 300), (255, 0, 0))
    image.paste(
        (0, 0, 255), (300, 0, 600, 300)
    )  # left red, right blue; to be shown turned by 90 degrees clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "train" / "cat" / "a.jpg", exif=exif, quality=95)
    x = load("folder", tmp_path).x_train[0].float()
    assert x[0, :8].mean() > 240 and x[2, -8:].mean() > 240 and x[2, :8].mean() < 15  # red above, blue below


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda root: (root / "val" / "cat").rename(root / "val" / "cow"), "the same in both"),
        (lambda root: [file.unlink() for file in (root / "train" / "cat").iterdir()], "cat"),
        (lambda root: (root / "train").rename(root / "training"), "must hold train/<class>"),
        (
            lambda root: (root / "train" / "cat" / "image 0.png").write_bytes(b"no image"),
            "cannot read .*image 0.png",
        ),
        (
            lambda root: (root / "val" / "cat" / "image 0.png").write_bytes(
                (root / "val" / "cat" / "image 1.png").read_bytes()[:300]
            ),
            "cannot read .*image 0.png",
        ),
        (
            lambda root: Image.fromarray(np.zeros((9, 9), np.uint16)).save(
                root / "train" / "cat" / "deep.png"
            ),
            "8 bits a channel",
        ),
    ],
)
def test_a_folder_with_a_fault_is_refused_by_name_and_leaves_no_cache(tmp_path, damage, message):
    damage(small_tree(tmp_path))
    with pytest.raises(InputError, match=message):
        load("folder", tmp_path)
    assert not (tmp_path / "folder.npz").exists()


def chaoyang_tree(root, **entries):
    for split in ("train", "test"):
        save_images(root / split, 4, 64, suffix="JPG")
        listed = [dict(name=f"{split}/image {i}.JPG", label=i) for i in range(4)]
        (root / f"{split}.json").write_text(json.dumps(entries.get(split, listed)))
    return root


def test_chaoyang_is_read_in_its_own_layout(tmp_path):
    loaded = load("chaoyang", chaoyang_tree(tmp_path))
    assert (
        loaded.num_classes == 4
        and loaded.x_train.shape == (4, 3, 256, 256)
        and loaded.y_test.tolist() == [0, 1, 2, 3]
    )
    with Image.open(tmp_path / "test" / "image 2.JPG") as image:
        expected = np.asarray(ImageOps.fit(image, (256, 256), Image.BICUBIC))
    assert np.array_equal(loaded.x_test[2].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    "listed",
    [
        [],
        "text",
        [dict(name="train/image 0.JPG", label=4)],
        [dict(name="a.JPG")],
        [dict(name="../secret.JPG", label=0)],
        [dict(name="/etc/passwd", label=0)],
    ],
    ids=str,
)
def test_a_wrong_chaoyang_list_is_refused(tmp_path, listed):
    with pytest.raises(InputError, match="train.json"):
        load("chaoyang", chaoyang_tree(tmp_path / "set", train=listed))


def test_a_missing_chaoyang_says_where_it_comes_from(tmp_path):
    with pytest.raises(InputError, match="ask the authors of Chaoyang"):
        load("chaoyang", tmp_path)


# -------------------------------------------------------------------------------------------- training


def options(*argv):
    return train.parse(
        ["--epochs", "1", "--batch-size", "16", "--image-size", "32", "--patch-size", "8", *argv]
    )


def by_hand(student, guide, lr):
    """The recipe's AdamW as torch has it, without our code."""
    named = [*student.named_parameters(), *guide.named_parameters()]
    decays = [p for name, p in named if p.ndim > 1 and name not in ("cls_token", "pos_embed")]
    others = [p for name, p in named if p.ndim == 1 or name in ("cls_token", "pos_embed")]
    return torch.optim.AdamW(
        [dict(params=decays), dict(params=others, weight_decay=0.0)], lr, weight_decay=0.05, fused=True
    )


def plain_sgd(student, guide, lr):
    """Linear in the gradient, so that a comparison is not blurred by Adam's division."""
    return torch.optim.SGD([*student.parameters(), *guide.parameters()], lr)


def setup(beta, make_optimizer, teacher=None):
    """What train_epoch takes, small, from fixed seeds."""
    torch.manual_seed(0)
    args = options("--schedule", "constant")
    student, generator = deit_mini(10, 32, 8, drop_path=0.1), torch.Generator().manual_seed(0)
    guide = Guidance(student.feature_channels, (16, 32, 64))
    x = load("glyphs").x_train[:40]
    few = Data(x, torch.arange(40) % 10, x, torch.arange(40) % 10, 10)
    optimizer = make_optimizer(student, guide, 1e-3)
    scheduler = LambdaLR(optimizer, functools.partial(pow, 0.5))
    torch.manual_seed(1)
    progress = train.Progress(args, 1, beta, 1e-3)
    return [
        student,
        teacher,
        guide,
        optimizer,
        scheduler,
        few,
        beta,
        args,
        generator,
        train.nullcontext(),
        progress,
    ]


class Uncallable(nn.Module):
    def forward(self, *args):
        raise AssertionError("called although beta is 0")


def plain_loop(parts, loss_of):
    """The same epoch written out."""
    student, _, _, optimizer, _, few, _, args, generator, _, _ = parts
    student.train()
    epoch = batches(few.x_train, few.y_train, 16, 32, generator, args.augment)
    for step, (images, labels) in enumerate(epoch):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5**step
        optimizer.zero_grad()
        loss_of(images, labels).backward()
        optimizer.step()


def test_with_beta_0_an_epoch_is_plain_cross_entropy_bit_for_bit_and_no_teacher_is_called():
    ours = setup(0.0, train.make_optimizer, teacher=Uncallable())
    projections = [p.clone() for p in ours[2].parameters()]
    ours[2].forward = Uncallable().forward
    _, loss_guidance, _ = train.train_epoch(*ours)
    plain = setup(0.0, by_hand)
    plain_loop(plain, lambda images, labels: F.cross_entropy(plain[0](images)[0], labels))
    assert loss_guidance == 0
    assert all(
        torch.equal(a, b) for a, b in zip(ours[0].state_dict().values(), plain[0].state_dict().values())
    )
    assert all(torch.equal(a, b) for a, b in zip(ours[2].parameters(), projections))


def test_a_guided_epoch_descends_the_sum_of_cross_entropy_and_beta_times_guidance():
    torch.manual_seed(7)
    teacher = calibrate(resnet8(10), torch.randn(16, 3, 32, 32)).requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    ours = setup(2.5, plain_sgd, teacher)
    loss_cls, loss_guidance, accuracy = train.train_epoch(*ours)
    plain = setup(2.5, plain_sgd)

    def loss_of(images, labels):
        logits, features = plain[0](images)
        loss = F.cross_entropy(logits, labels)
        for project, student_map, target in zip(plain[2].projections, features, teacher(images)[1]):
            student_map = F.interpolate(
                project(student_map), target.shape[2:], mode="bilinear", align_corners=False
            )
            loss = loss + 2.5 * F.mse_loss(student_map, target)
        return loss

    plain_loop(plain, loss_of)
    end, expected, start = (
        torch.cat([p.detach().flatten() for module in (parts[0], parts[2]) for p in module.parameters()])
        for parts in (ours, plain, setup(2.5, plain_sgd))
    )
    assert (end - expected).norm() < 1e-3 * (expected - start).norm()
    assert loss_cls > 0 and loss_guidance > 0 and 0 <= accuracy <= 100
    assert all(
        torch.equal(before[name], value) for name, value in teacher.state_dict().items()
    )  # frozen, BatchNorm too


def test_a_guided_step_enters_at_most_5_files_and_15_functions_of_ours():
    teacher = calibrate(resnet8(10), torch.randn(16, 3, 32, 32))
    parts, entered = setup(2.5, train.make_optimizer, teacher), set()

    def trace(frame, event, argument):
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.parent == HERE:
            entered.add((file.name, frame.f_code.co_qualname))

    parts[7].augment = "strong"
    sys.setprofile(trace)
    try:
        train.train_epoch(*parts)
    finally:
        sys.setprofile(None)
    assert ("data.py", "recolour") in entered and ("guidance.py", "Guidance.forward") in entered
    assert len({file for file, _ in entered}) <= 5 and len(entered) <= 15, sorted(entered)


@pytest.mark.parametrize("epochs, warm_up", [(300, 20), (100, 7), (26, 2), (5, 1)])
def test_the_transformers_learning_rate_is_timms_cosine_at_whole_epochs(epochs, warm_up):
    """As the LG code sets it up: the ramp replaces the first epochs of the cosine, which does not restart."""
    scheduler = pytest.importorskip("timm.scheduler", reason="timm is not installed; .ci/run installs it")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=5e-4)
    theirs = scheduler.CosineLRScheduler(optimizer, epochs, 5e-6, warmup_t=warm_up, warmup_lr_init=5e-7)
    for epoch in range(epochs):
        assert train.lr_at(epoch, epochs, 5e-4, True) == pytest.approx(theirs._get_lr(epoch)[0], rel=1e-9)


def test_the_learning_rates_of_the_recipe():
    """Written out from method.md, section 3, also between two epochs."""
    rates = [train.lr_at(epoch, 300, 5e-4, True) for epoch in (0, 10.5, 20, 150, 300)]
    ramp = 5e-7 + (5e-4 - 5e-7) * 10.5 / 20
    cosine = 5e-6 + (5e-4 - 5e-6) * (1 + math.cos(math.pi * 20 / 300)) / 2
    assert rates == pytest.approx([5e-7, ramp, cosine, 2.525e-4, 5e-6])
    cnn = [train.lr_at(epoch, 300, 0.1, False) for epoch in (0, 37.5, 150, 300)]
    assert cnn == pytest.approx([0.1, 0.05 * (1 + math.cos(math.pi / 8)), 0.05, 0], abs=1e-12)


def test_the_defaults_for_cifar100_are_the_reference_recipe():
    args = train.parse(["--dataset", "cifar100"])
    assert (args.model, args.schedule, args.epochs, args.batch_size, args.lr) == (
        "deit_tiny",
        "early",
        300,
        128,
        5e-4,
    )
    assert (args.image_size, args.patch_size, args.augment, args.beta, args.teacher) == (
        224,
        16,
        "strong",
        2.5,
        "resnet56",
    )
    assert args.out == "runs/cifar100-deit_tiny-early-seed0"
    for model, size in (("resnet56", 32), ("resnet18", 224)):
        args = train.parse(["--dataset", "cifar100", "--model", model])
        assert (args.epochs, args.batch_size, args.lr, args.image_size, args.augment) == (
            300,
            128,
            0.1,
            size,
            "strong",
        )
        assert args.out == f"runs/cifar100-{model}-seed0"


def test_the_optimisers_are_the_recipes_and_vectors_do_not_decay():
    model = deit_tiny(100)
    optimizer = train.make_optimizer(model, Guidance((192,) * 3, (16, 32, 64)), 5e-4)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.9, 0.999)
    decayed, free = optimizer.param_groups
    assert decayed["weight_decay"] == 0.05 and free["weight_decay"] == 0
    kept = {id(p) for p in free["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in kept} == {
        name
        for name, _ in model.named_parameters()
        if name.endswith("bias") or "norm" in name or name in ("cls_token", "pos_embed")
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters())) + 6
    optimizer = train.make_optimizer(resnet56(100), None, 0.1)
    assert (
        isinstance(optimizer, torch.optim.SGD)
        and optimizer.defaults["nesterov"]
        and optimizer.defaults["momentum"] == 0.9
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0]


@pytest.fixture
def small_glyphs(monkeypatch, tmp_path):
    """The command line on a seventh of the generated set, in an empty folder; ImageNet-free and quick."""
    arrays = data.glyphs(train=320, test=100)
    monkeypatch.setattr(data, "glyphs", lambda: arrays)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        train, "GLYPHS_VIT", {**train.GLYPHS_VIT, "epochs": 3, "image_size": 32, "patch_size": 8}
    )
    return tmp_path


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        train.explain(train.main)
    finally:
        signal.signal(signal.SIGTERM, handler)


def records_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def records(folder):
    first, *epochs = records_of(Path(folder, "log.jsonl"))
    return first, epochs


def test_one_command_trains_the_teacher_then_the_guided_student_and_tells_its_story(
    small_glyphs, monkeypatch, capsys
):
    command(monkeypatch)
    told = capsys.readouterr().out
    for words in (
        "no trained teacher in runs/glyphs-resnet8-seed0: training resnet8 for 5 epochs",
        "expected time",
        "parameters",
        "float32 (the default on this device)",
        "as it sees them while it guides",
        "beta falls linearly from 2.5 to 0 in epochs 0 to 0 of 3; from epoch 1 on the teacher is not called",
        "images/s",
        "left",
        "result: deit_mini on glyphs, schedule early, seed 0: val_acc",
    ):
        assert words in told, words
    origin, epochs = records("runs/glyphs-deit_mini-early-seed0")
    assert {"command", "args", "torch", "hardware", "seed", "git_commit", "threads"} <= origin.keys()
    assert [line["epoch"] for line in epochs] == [0, 1, 2] and [line["beta"] for line in epochs] == [
        2.5,
        0,
        0,
    ]
    assert epochs[0]["loss_guidance"] > 0 and epochs[1]["loss_guidance"] is None
    assert all(
        {"loss_cls", "train_acc", "val_acc", "lr", "seconds", "images_per_second"} <= line.keys()
        for line in epochs
    )

    # the teacher's accuracy is that on the student's test tensors, shrunk to 32 px, by a loop of our own
    state = train.load_checkpoint("runs/glyphs-resnet8-seed0/last.pt")
    teacher, glyphs = resnet8(10).eval(), load("glyphs")
    teacher.load_state_dict(state["model"])
    seen = F.interpolate(prepare(glyphs.x_test, 32), size=(32, 32), mode="bilinear", align_corners=False)
    accuracy = 100 * (teacher(seen)[0].argmax(dim=1) == glyphs.y_test).float().mean().item()
    assert f"it gets {accuracy:.2f} % of the test images right" in told

    # the checkpoint gives the accuracy in the log, and a second run of the same command destroys nothing
    command(monkeypatch, "--evaluate", "runs/glyphs-deit_mini-early-seed0/last.pt")
    assert f"val_acc {epochs[-1]['val_acc']:.2f} %" in capsys.readouterr().out
    before = Path("runs/glyphs-deit_mini-early-seed0/last.pt").read_bytes()
    with pytest.raises(SystemExit, match="holds a run of 3 epochs already: continue it with --resume"):
        command(monkeypatch)
    assert Path("runs/glyphs-deit_mini-early-seed0/last.pt").read_bytes() == before


def test_a_run_interrupted_while_guidance_ends_resumes_to_the_same_weights_and_log(small_glyphs, monkeypatch):
    run = ("--schedule", "early", "--guide-epochs", 2, "--model", "deit_mini")
    command(monkeypatch, "--model", "resnet8")
    command(monkeypatch, *run, "--out", "whole")
    evaluate, calls = train.evaluate, []

    def interrupted(*args, **options):  # the teacher's check is call 1, epochs 0 and 1 are calls 2 and 3
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr(train, "evaluate", interrupted)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *run, "--out", "parts")
    assert stop.value.code == 130 and len(records("parts")[1]) == 1
    monkeypatch.setattr(train, "evaluate", evaluate)
    command(monkeypatch, *run, "--out", "parts", "--resume")
    assert same_runs("whole", "parts") and [line["beta"] for line in records("parts")[1]] == [2.5, 1.25, 0]


def test_both_forms_of_the_loss_can_be_chosen_and_start_from_the_same_maps(small_glyphs, monkeypatch):
    for form in ("mean", "sum"):  # with so small a learning rate both keep their first maps
        command(
            monkeypatch,
            "--schedule",
            "constant",
            "--epochs",
            1,
            "--lr",
            1e-12,
            "--reduction",
            form,
            "--out",
            form,
        )
    mean, total = (records(form)[1][0]["loss_guidance"] for form in ("mean", "sum"))
    assert 16 * mean < total < 64 * mean  # sum = C_i * mean in each layer, C = 16, 32, 64


@pytest.mark.parametrize("warm_up, guided", [(1, 2), (2, 3)])
def test_adaptive_guidance_ends_when_its_rule_says_so_after_the_warm_up(
    small_glyphs, monkeypatch, warm_up, guided
):
    """The rule says stop after epoch 1, counted from 0. While the learning rate rises, it is not obeyed."""

    class StopsAfterTwo(AdaptiveStop):
        def update(self, epoch_loss):
            super().update(epoch_loss)
            return len(self.history) < 2

    monkeypatch.setattr(train, "AdaptiveStop", StopsAfterTwo)
    monkeypatch.setattr(train, "warm_up_epochs", lambda epochs: warm_up)
    command(monkeypatch, "--schedule", "adaptive", "--epochs", 4)
    betas = [line["beta"] for line in records("runs/glyphs-deit_mini-adaptive-seed0")[1]]
    assert betas == [2.5] * guided + [0] * (4 - guided)


def test_a_relative_run_measures_its_unit_once_keeps_it_and_divides_the_threshold(
    small_glyphs, monkeypatch, capsys
):
    measured, thresholds = [], []
    monkeypatch.setattr(
        train, "measure_scale", lambda *args, f=train.measure_scale: measured.append(f(*args))
    )

    class Noted(AdaptiveStop):
        def __init__(self, threshold):
            thresholds.append(threshold)
            super().__init__(threshold=threshold)

    monkeypatch.setattr(train, "AdaptiveStop", Noted)
    relative = ("--schedule", "adaptive", "--reduction", "relative", "--beta", 8, "--epochs", 2)
    command(monkeypatch, *relative, "--out", "relative")
    told = capsys.readouterr().out
    origin, epochs = records("relative")
    state = train.load_checkpoint("relative/last.pt")
    assert state["projections"]["scale"].item() == origin["guidance_scale"] > 0
    assert f"unit of the guidance loss: {origin['guidance_scale']:.4g}" in told
    assert f"beta*L {8 * epochs[1]['loss_guidance']:6.3f}" in told and 0 < epochs[1]["loss_guidance"] < 1.5
    train.write_log(Path("relative", "log.jsonl"), [origin, *epochs[:1]])
    cut = state | dict(history=epochs[:1])
    torch.save(cut, "relative/last.pt")
    command(monkeypatch, *relative, "--out", "relative", "--resume")
    assert len(measured) == 1 and thresholds[-2:] == [-0.02 / 39] * 2
    assert torch.equal(
        train.load_checkpoint("relative/last.pt")["projections"]["scale"], state["projections"]["scale"]
    )


def test_held_out_images_are_a_fixed_part_of_every_class_and_no_test_image_is_looked_at(
    small_glyphs, monkeypatch, capsys
):
    labels = torch.tensor([0] * 10 + [1] * 5 + [2])
    held = data.hold_out(labels, 0.2)
    assert [held[labels == k].sum().item() for k in range(3)] == [2, 1, 0]  # a single image stays in training
    assert torch.equal(held, data.hold_out(labels, 0.2))
    assert data.hold_out(torch.tensor([0, 0, 1, 1]), 0.01).sum() == 2  # one of each at least
    whole, part = load("glyphs"), load("glyphs", held_out=0.25)
    images = [{image.numpy().tobytes() for image in x} for x in (whole.x_train, part.x_train, part.x_test)]
    assert images[1] | images[2] == images[0] and not images[1] & images[2]
    assert part.y_test.bincount().tolist() == [8] * 10 and len(part.x_train) == 240

    command(monkeypatch, "--held-out", 0.25, "--epochs", 1)
    told = capsys.readouterr().out
    assert "240 training and 80 held-out images" in told
    student, teacher = (f"runs/glyphs-heldout0.25-{row}-seed0" for row in ("deit_mini-early", "resnet8"))
    assert train.load_checkpoint(f"{teacher}/last.pt")["data"] == train.fingerprint(part)
    command(monkeypatch, "--evaluate", f"{student}/last.pt")
    assert f"val_acc {records(student)[1][-1]['val_acc']:.2f} %" in capsys.readouterr().out
    for wrong in ("0", "1", "-0.5"):
        with pytest.raises(SystemExit, match="--held-out must lie between 0 and 1"):
            command(monkeypatch, f"--held-out={wrong}")


def test_rows_of_one_seed_share_first_weights_teacher_and_first_batch(small_glyphs, monkeypatch):
    """So that they can be compared in pairs; another seed changes all of them."""
    seen = {}

    def noted(student, teacher, guidance, optimizer, scheduler, images, beta, args, generator, *rest):
        weights = [tensor.clone() for tensor in student.state_dict().values()]
        copy = torch.Generator()
        copy.set_state(generator.get_state())
        first, labels = next(batches(images.x_train, images.y_train, 32, 32, copy))
        seen[args.schedule, args.seed] = [*weights, first, labels, torch.tensor(teacher is None)]
        return 1.0, 1.0, 1.0

    command(monkeypatch, "--model", "resnet8"), command(monkeypatch, "--model", "resnet8", "--seed", 1)
    monkeypatch.setattr(train, "train_epoch", noted)
    for schedule, seed in (("none", 0), ("constant", 0), ("early", 0), ("early", 1)):
        command(monkeypatch, "--schedule", schedule, "--seed", seed, "--epochs", 1)
    for schedule in ("none", "constant"):
        pairs = zip(seen[schedule, 0][:-1], seen["early", 0][:-1])
        assert all(torch.equal(one, other) for one, other in pairs)
    assert not torch.equal(seen["early", 0][-3], seen["early", 1][-3])
    teachers = [
        records(f"runs/glyphs-deit_mini-{row}")[0] for row in ("constant-seed0", "early-seed0", "early-seed1")
    ]
    assert teachers[0]["teacher_crc"] == teachers[1]["teacher_crc"] != teachers[2]["teacher_crc"]
    assert (teachers[0]["teacher_model"], teachers[0]["teacher_epochs"]) == ("resnet8", 5)


@pytest.mark.parametrize("model", ["resnet18", "resnet20", "resnet56", "deit_tiny"])
def test_every_model_is_a_row_of_the_table(small_glyphs, monkeypatch, model):
    command(
        monkeypatch,
        "--model",
        model,
        "--epochs",
        1,
        "--batch-size",
        80,
        "--schedule",
        "none",
        "--image-size",
        32,
    )
    folder = f"runs/glyphs-{model}-none-seed0" if model == "deit_tiny" else f"runs/glyphs-{model}-seed0"
    assert len(records(folder)[1]) == 1 and records(folder)[1][0]["beta"] == 0


def test_a_compiled_run_and_one_in_bfloat16_end_near_the_plain_one(small_glyphs, monkeypatch):
    """--amp and --compile through a whole run; inductor itself has a test of its own below."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for flags in ((), ("--amp",), ("--compile",)):
        command(monkeypatch, "--model", "resnet8", "--epochs", 4, *flags, "--out", f"run{''.join(flags)}")
    runs = [[line["loss_cls"] for line in records(f"run{name}")[1]] for name in ("", "--amp", "--compile")]
    assert runs[0][-1] < 0.97 * runs[0][0]  # it learns
    for plain, bfloat16, compiled in zip(*runs):
        assert bfloat16 == pytest.approx(plain, rel=0.03) and compiled == pytest.approx(plain, rel=0.01)


def test_a_teacher_that_does_not_fit_is_refused(small_glyphs, monkeypatch):
    command(monkeypatch, "--model", "resnet8", "--epochs", 1, "--classes", 5, "--out", "five")
    command(monkeypatch, "--model", "resnet8", "--epochs", 1, "--image-size", 64, "--out", "large")
    command(monkeypatch, "--model", "resnet18", "--epochs", 1, "--image-size", 32, "--out", "resnet18")
    for flags, message in (
        (("--teacher", "five/last.pt"), "trained on other data: glyphs .*'num_classes': 5,.* not glyphs"),
        (("--teacher", "large/last.pt"), "is a resnet8 at 64 px"),
        (("--teacher", "resnet18/last.pt"), "is a resnet18 at 32 px"),
        (("--teacher", "absent.pt"), "there is no checkpoint absent.pt"),
        (("--teacher", __file__), "damaged or no checkpoint"),
    ):
        with pytest.raises(SystemExit, match=message):
            command(monkeypatch, *flags, "--out", "student")
    small_cache(Path("data/cifar10.npz"))
    other = ("--dataset", "cifar10", "--batch-size", 4, "--out", "student2")
    with pytest.raises(SystemExit, match="trained on other data: glyphs .* not cifar10"):
        command(monkeypatch, *other, "--teacher", "five/last.pt")


def test_a_checkpoint_is_never_used_with_other_images_of_the_same_kind(small_glyphs, monkeypatch):
    small = ("--dataset", "folder", "--model", "resnet8", "--epochs", 1, "--batch-size", 2, "--out", "run")
    command(monkeypatch, *small, "--data", small_tree(Path("one")))
    save_images(small_tree(Path("two")) / "val" / "cat", 1, 33)
    for flags in (("--evaluate", "run/last.pt"), (*small, "--resume")):
        with pytest.raises(SystemExit, match="run/last.pt was trained on other data"):
            command(monkeypatch, *flags, "--data", "two")
    command(monkeypatch, "--evaluate", "run/last.pt")  # finds its own data again


def test_a_teacher_trained_for_less_counts_and_an_interrupted_one_is_continued(small_glyphs, monkeypatch):
    default = "runs/glyphs-resnet8-seed0"
    command(monkeypatch, "--model", "resnet8", "--epochs", 4)
    command(monkeypatch, "--epochs", 1, "--out", "first")
    assert len(records(default)[1]) == 4
    state = train.load_checkpoint(f"{default}/last.pt")
    state["args"]["epochs"] = 5  # as if it had been stopped after four of five
    torch.save(state, f"{default}/last.pt")
    command(monkeypatch, "--epochs", 1, "--out", "second")
    assert len(records(default)[1]) == 5
    origin = records("second")[0]
    assert origin["teacher"] == f"{default}/last.pt" and origin["teacher_acc"] > 10


def test_a_run_of_an_older_version_is_not_resumed_but_still_guides(small_glyphs, monkeypatch):
    """Its learning rates were others: going on would mix two recipes. As a teacher it is as good as any."""
    command(monkeypatch, "--model", "resnet8", "--epochs", 4, "--out", "old")
    state = torch.load("old/last.pt")
    del state["scheduler"]
    torch.save(state, "old/last.pt")
    with pytest.raises(SystemExit, match="begun by an older train.py, .* start another --out"):
        command(monkeypatch, "--model", "resnet8", "--epochs", 4, "--out", "old", "--resume")
    command(monkeypatch, "--teacher", "old/last.pt", "--epochs", 1, "--out", "student")


def test_the_log_keeps_the_learning_rate_of_the_last_step_of_each_epoch(small_glyphs, monkeypatch):
    command(monkeypatch, "--model", "resnet8", "--epochs", 2, "--lr", 0.1)
    steps = 320 // 64
    rates = [line["lr"] for line in records("runs/glyphs-resnet8-seed0")[1]]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * (e + 1 - 1 / steps) / 2)) for e in (0, 1)])


def test_the_teacher_that_guides_is_in_eval_mode_and_takes_no_gradient(small_glyphs, monkeypatch):
    command(monkeypatch, "--model", "resnet8")
    glyphs, cpu = load("glyphs"), torch.device("cpu")
    args = train.parse([])
    teacher, _ = train.ready_teacher(train.train_teacher(args), args, glyphs, cpu, train.nullcontext())
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_at_chance_is_refused(small_glyphs, monkeypatch):
    command(monkeypatch, "--model", "resnet8", "--epochs", 1, "--lr", 1e-9, "--out", "untrained")
    with pytest.raises(SystemExit, match="at chance"):
        command(monkeypatch, "--teacher", "untrained/last.pt", "--out", "student")


def test_a_loss_that_is_not_finite_stops_the_run_before_it_reaches_a_file(small_glyphs, monkeypatch):
    with pytest.raises(
        SystemExit, match=r"not finite by step \d+ of epoch \d: loss_cls .*beta .*lr .*lower --lr"
    ):
        command(monkeypatch, "--schedule", "none", "--lr", 1e15, "--out", "wild")
    kept = Path("wild/last.pt")
    assert not kept.exists() or all(
        math.isfinite(line["loss_cls"]) for line in train.load_checkpoint(kept)["history"]
    )


def test_a_run_of_days_says_so_after_four_steps_and_names_a_smaller_command(monkeypatch, capsys):
    progress = train.Progress(train.parse(["--dataset", "cifar100"]), 0, 2.5, 1e-3)
    clock = iter((100.0, 130.0))
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    for step in (1, 4):
        progress.show(step, 390, torch.zeros(3))
    told = capsys.readouterr().out  # 10 seconds a step, 390 steps, 300 epochs
    assert "expected time: 13 days, 13:00:00, less once guidance ends" in told and "That is long" in told
    for line in train.SMALLER.replace("\\\n", " ").strip().splitlines():
        train.parse(shlex.split(line)[2:])  # it is a command that exists


# ----------------------------------------------------------------------------------------------- trust

FEW = ("--dataset", "cifar10", "--model", "resnet8", "--epochs", "4", "--batch-size", "16")  # on easy_cache
MINI = ("--dataset", "cifar10", "--model", "deit_mini", "--image-size", "32", "--patch-size", "8", "--epochs",
        "5", "--batch-size", "16", "--schedule", "adaptive", "--teacher", "teacher/last.pt")  # fmt: skip


def easy_cache(path, count=160):
    """Ten classes that differ in brightness: learnt at once, so that a teacher is not at chance."""
    rng, (train_labels, test_labels) = np.random.default_rng(0), (np.arange(n) % 10 for n in (count, 50))
    x_train, x_test = (
        (rng.integers(0, 120, (len(y), 32, 32, 3)) + 13 * y[:, None, None, None]).astype(np.uint8)
        for y in (train_labels, test_labels)
    )
    small_cache(path, x_train=x_train, y_train=train_labels, x_test=x_test, y_test=test_labels)


def process(folder, *argv, launcher=()):
    """A real process of the real command line, in `folder`, on one thread."""
    return subprocess.Popen(
        [sys.executable, *launcher, HERE / "train.py", *map(str, argv)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def read_epochs(running, count):
    """Reads on until the process has told of `count` more epochs; False if it ended before."""
    for line in running.stdout:
        count -= line.startswith("epoch ")
        if not count:
            return True
    return False


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

    states = [train.load_checkpoint(Path(folder, "last.pt")) for folder in (one, two)]
    parts = ("model", "projections", "optimizer", "generator", "guiding", "adaptive")
    return timeless(one) == timeless(two) and all(same(states[0][part], states[1][part]) for part in parts)


def test_a_killed_run_resumes_bit_for_bit_and_the_order_of_options_does_not_matter(tmp_path):
    """SIGKILL in real processes, in the training of the teacher and of a student whose guidance is adaptive:
    right after an epoch was told, in the next one, and before the first one is over."""
    easy_cache(tmp_path / "data" / "cifar10.npz")
    for argv, whole, kills in (
        (FEW, "teacher", [(1, 0.0)]),
        (MINI, "student", [(0, 0.0), (2, 0.05), (1, 0.0)]),
    ):
        uninterrupted = process(tmp_path, *argv, "--out", whole)
        pairs = [argv[i : i + 2] for i in range(0, len(argv), 2)]
        backwards = [word for pair in reversed(dict(pairs).items()) for word in pair]
        for epochs, delay in [*kills, (99, 0.0)]:
            begun = (tmp_path / "parts" / whole / "log.jsonl").exists()
            running = process(tmp_path, *backwards, "--out", f"parts/{whole}", *["--resume"] * begun)
            if epochs == 0:
                next(line for line in running.stdout if line.startswith("log and checkpoint"))
            if read_epochs(running, epochs) if epochs else True:
                time.sleep(delay)
                running.kill()
            running.communicate()
        assert running.returncode == 0 and uninterrupted.wait() == 0
        uninterrupted.communicate()
        assert same_runs(tmp_path / whole, tmp_path / "parts" / whole)
    assert len(records(tmp_path / "student")[1]) == 5 and not list(tmp_path.rglob("*.partial"))
    sessions = records(tmp_path / "parts" / "student")[0]["resumed"]  # the log tells of the interruptions
    assert [session["epoch"] for session in sessions][0] == 2 and len(sessions) == 2
    assert train.load_checkpoint(tmp_path / "student" / "last.pt")["adaptive"]


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_a_run_at_once_and_names_the_command_that_goes_on(tmp_path, name, code):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job and its children ignore it
    easy_cache(tmp_path / "data" / "cifar10.npz")
    running = process(tmp_path, *FEW, "--epochs", "400", "--out", "my run")
    assert read_epochs(running, 2)
    running.send_signal(getattr(signal, name))
    began = time.monotonic()
    told = running.communicate()[1]
    assert running.returncode == code and time.monotonic() - began < 10
    assert re.fullmatch(r"\nstopped; to go on: python .*train\.py .*--out 'my run' --resume\n", told), told
    again = process(tmp_path, *shlex.split(told)[6:])  # after "stopped; to go on: python train.py"
    assert next(line for line in again.stdout if line.startswith("resumed after epoch"))
    again.kill()
    again.communicate()


@pytest.mark.parametrize("how", ["killed", "full", "stopped"])
def test_a_write_that_fails_half_way_leaves_the_file_that_was_there(tmp_path, how):
    """`write_whole` writes every checkpoint, cache and log."""
    path = tmp_path / "file"
    path.write_bytes(b"good")

    def fail(file):
        file.write(b"b" * 10_000)
        file.flush()
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(28, "No space left on device") if how == "full" else KeyboardInterrupt

    if how == "killed":
        child = os.fork()
        if not child:
            data.write_whole(path, fail)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    else:
        with pytest.raises((InputError, KeyboardInterrupt), match="cannot write .*No space left|^$"):
            data.write_whole(path, fail)
        assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"good"
    data.write_whole(path, lambda file: file.write(b"better"))
    assert path.read_bytes() == b"better"


def test_nothing_is_written_but_through_write_whole():
    code = "".join((HERE / name).read_text() for name in ("data.py", "train.py", "bench.py"))
    writes = re.findall(r"open\([^)]*\"[wax]b?\"|write_text|write_bytes|torch\.save\([^)]*|savez\(\w+", code)
    assert set(writes) == {
        'open(partial, "wb"',
        "savez(file",
        "torch.save(state, file",
        'open(folder / ".lock", "w"',
        'open(os.devnull, "w"',
    }


def test_on_a_full_disk_a_run_ends_with_one_line_and_keeps_its_last_epoch(tmp_path):
    """A file system of 12 MB: the first checkpoint of 8 MB fits, the second one beside it does not."""
    easy_cache(tmp_path / "data" / "cifar10.npz")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        alone = ("--schedule", "none", "--out", "disk/run")
        running = process(tmp_path, *MINI, *alone)
        told = running.communicate()[1]
        assert running.returncode == 1 and len(told.splitlines()) == 1, told
        assert re.match("error: cannot write disk/run/last.pt .*; free space or choose another", told), told
        assert len(train.load_checkpoint(disk / "run" / "last.pt")["history"]) == 1
        assert len(records(disk / "run")[1]) == 1 and len(list((disk / "run").iterdir())) == 3
        subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
        running = process(tmp_path, *MINI, *alone, "--resume")
        assert "val_acc" in running.communicate()[0] and len(records(disk / "run")[1]) == 5
    finally:
        subprocess.run(["umount", disk], check=True)


def test_beyond_a_size_limit_a_checkpoint_and_a_cache_are_refused_and_the_old_ones_stay(tmp_path):
    """What a quota does, and a full disk where none can be mounted."""
    limited = (
        "import resource, sys, numpy, torch, pathlib; from data import *; from data import write_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "for name, save in dict(cache=lambda file: numpy.savez(file, numpy.zeros(10**6)),\n"
        "                       checkpoint=lambda file: torch.save(torch.zeros(10**6), file)).items():\n"
        "    pathlib.Path(name).write_text('good')\n"
        "    try: write_whole(pathlib.Path(name), save)\n"
        "    except InputError as error: print(error)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", limited],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    assert ended.returncode == 0 and len(ended.stdout.splitlines()) == 2, ended
    for name, line in zip(("cache", "checkpoint"), ended.stdout.splitlines()):
        assert re.match(f"cannot write {name} .*free space or choose another folder", line)
        assert (tmp_path / name).read_text() == "good"
    assert len(list(tmp_path.iterdir())) == 2


def test_two_processes_never_train_into_one_folder(small_glyphs, monkeypatch):
    with train.alone_in(Path("run")):
        with pytest.raises(SystemExit, match="another process trains into run: wait"):
            command(monkeypatch, "--model", "resnet8", "--epochs", 1, "--out", "run")
        assert not Path("run/log.jsonl").exists()
        with monkeypatch.context() as windows:  # which has no such lock
            windows.setattr(train, "fcntl", None)
            train.alone_in(Path("run")).close()
    command(monkeypatch, "--model", "resnet8", "--epochs", 1, "--out", "run")


def test_processes_that_cannot_run_together_say_why(small_glyphs, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="do not find each other .*start them by torchrun"):
        command(monkeypatch, "--schedule", "none", "--device", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(SystemExit, match="no GPU is left for process 99"):
        command(monkeypatch, "--schedule", "none", "--device", "cuda")

    def lonely():
        raise torch.distributed.DistNetworkError("Connection reset by peer")

    with pytest.raises(SystemExit, match="another process of this run has ended .*--resume"):
        train.explain(lonely)


def test_a_sigterm_that_comes_while_a_run_ends_does_not_cut_off_the_reason(tmp_path):
    """torchrun sends one to every process as soon as another has failed, be it an instant after this one."""
    script = """
import os, signal, sys, train
class Late(train.InputError):
    def __str__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return "the reason"
def run(*_):
    raise Late
train.run = run
train.explain(train.main)
"""
    argv = [sys.executable, "-c", script, *map(str, FEW), "--out", str(tmp_path)]
    ended = subprocess.run(argv, capture_output=True, text=True, cwd=HERE)
    assert (ended.returncode, ended.stderr) == (1, "error: the reason\n")


def test_without_matplotlib_plot_says_what_to_install(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        runpy.run_path(str(HERE / "plot.py"))


def test_weights_that_are_not_finite_never_reach_a_file(small_glyphs, monkeypatch):
    """The loss of the last step may still be finite when the update that follows it is not."""
    epoch, calls = train.train_epoch, []

    def spoil(model, *args):
        result = epoch(model, *args)
        calls.append(1)
        if len(calls) == 2:
            model.fc.bias.data[0] = math.inf
        return result

    monkeypatch.setattr(train, "train_epoch", spoil)
    with pytest.raises(
        SystemExit, match=r"a weight is not finite .* epoch 1: .*beta 0.000, lr .*e-02; last.pt"
    ):
        command(monkeypatch, "--model", "resnet8", "--epochs", 3, "--out", "run")
    assert len(records("run")[1]) == 1
    assert all(tensor.isfinite().all() for tensor in train.load_checkpoint("run/last.pt")["model"].values())


def test_a_resumed_run_is_not_guided_by_another_teacher(small_glyphs, monkeypatch):
    for seed in (0, 1):
        command(monkeypatch, "--model", "resnet8", "--epochs", 5, "--seed", seed, "--out", f"teacher{seed}")
    guided = ("--teacher", "teacher0/last.pt", "--epochs", 2, "--out", "run")
    command(monkeypatch, *guided)
    Path("teacher1/last.pt").replace("teacher0/last.pt")
    with pytest.raises(
        SystemExit, match="run/last.pt was guided by another teacher than teacher0/last.pt is now"
    ):
        command(monkeypatch, *guided, "--resume")


def test_test_images_that_are_training_images_too_are_reported(tmp_path, capsys):
    small_tree(tmp_path)
    load("folder", tmp_path)
    assert "note" not in capsys.readouterr().out
    for copy in ("a.png", "b.png"):
        shutil.copy(tmp_path / "train" / "cat" / "image 0.png", tmp_path / "val" / "dög" / copy)
    for _ in range(2):  # decoded, then from the cache
        load("folder", tmp_path)
        assert "note: 2 of the 8 test images of folder are training images too" in capsys.readouterr().out


def test_the_parts_of_several_processes_are_together_the_batches_of_one():
    x, y = load("glyphs").x_train[:50], torch.arange(50)
    whole = list(batches(x, y, 12, 32, torch.Generator().manual_seed(3)))
    for ranks in (2, 3):
        parts = [list(batches(x, y, 12, 32, torch.Generator().manual_seed(3), "strong", rank, ranks))
                 for rank in range(ranks)]  # fmt: skip
        for step, (images, labels) in enumerate(whole):
            assert torch.equal(labels, torch.cat([part[step][1] for part in parts]))
            theirs = torch.cat([part[step][0] for part in parts])
            assert (images - theirs).abs().gt(1e-4).float().mean() < 1e-3  # a rounding may fall the other way


def test_two_processes_train_as_one_resume_and_end_when_one_of_them_dies(tmp_path):
    """torchrun with two gloo processes: the losses of one process, also across a kill and a resume."""
    easy_cache(tmp_path / "data" / "cifar10.npz")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    ended = process(tmp_path, *FEW, "--out", "teacher")
    assert ended.communicate()[1] == "" and ended.returncode == 0
    one = process(tmp_path, *MINI, "--out", "one")
    running = process(tmp_path, *MINI, "--out", "two", launcher=torchrun)
    assert read_epochs(running, 2)
    listed = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    assert len(listed) == 2
    began = time.monotonic()
    os.kill(int(listed[1]), signal.SIGKILL)
    told = running.communicate()[1]
    assert running.returncode and time.monotonic() - began < 60
    assert re.search(r"stopped; to go on: torchrun .*--resume|another process of this run has ended", told), (
        told
    )
    done = len(records(tmp_path / "two")[1])
    assert 2 <= done < 5 and not list((tmp_path / "two").rglob("*.partial"))
    again = process(tmp_path, *MINI, "--out", "two", "--resume", launcher=torchrun)
    told = again.communicate()[0]
    assert again.returncode == 0 and told.count("resumed after epoch") == 1  # only the first process talks
    assert one.communicate() and one.returncode == 0
    (origin, theirs), (_, ours) = records(tmp_path / "two"), records(tmp_path / "one")
    assert origin["processes"] == 2 and len(theirs) == 5
    for a, b in zip(theirs, ours):
        for key in ("beta", "lr", "loss_cls", "loss_guidance", "train_acc", "val_acc"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), (key, a, b)
    for argv, message in (
        (FEW, "trains in one process"),
        ((*MINI, "--batch-size", "5"), "2 processes cannot share batches of 5"),
    ):
        refused = process(tmp_path, *argv, "--out", "three", launcher=torchrun)
        assert message in refused.communicate()[1] and refused.returncode


SERVER = """
import json, os, sys, traceback
sys.path.insert(0, {here!r})
import bench, train  # once for all cases: each one forks from here
programs = dict((name, compile(open(os.path.join({here!r}, name)).read(), name, "exec"))
                for name in ("train.py", "bench.py"))
for line in sys.stdin:
    case = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(case["folder"])
        for number, name in ((0, os.devnull), (1, os.devnull), (2, "../stderr")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666), number)
        if case["unprivileged"] and os.geteuid() == 0:
            os.seteuid(65534)
        sys.argv = case["argv"]
        code = 0
        try:
            file = os.path.join({here!r}, sys.argv[0])
            exec(programs[sys.argv[0]], dict(__name__="__main__", __file__=file))
        except SystemExit as stop:  # as Python does it, without taking a second to tidy up all of torch
            code = stop.code
        except BaseException:
            code = traceback.format_exc()
        if isinstance(code, str):
            print(code, file=sys.stderr, flush=True)
            code = 1
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def shell():
    """Runs the real program as a command line would, in a process forked from one that has imported torch;
    returns its exit code and what it wrote to stderr."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER.format(here=str(HERE))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def run(folder, *argv, program="train.py", unprivileged=False):
        case = dict(folder=str(folder), argv=[program, *map(str, argv)], unprivileged=unprivileged)
        server.stdin.write(json.dumps(case) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), (folder.parent / "stderr").read_text()

    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="module")
def trained(shell, tmp_path_factory):
    """A folder with a finished run to damage, and the data it was trained on."""
    folder = tmp_path_factory.mktemp("trained") / "case"
    easy_cache(folder / "data" / "cifar10.npz")
    assert shell(folder, *FEW, "--out", "run") == (0, "")
    return folder


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def png(width, height):
    """A PNG image that claims any size and holds no pixel."""
    chunks = (
        b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(b""),
        b"IEND",
    )
    packed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def cache(**changes):
    return lambda: small_cache(Path("data/cifar10.npz"), **changes)


def content(path, content):
    """Puts bytes into a file, or cuts what is there to that share of it."""
    path = Path(path)

    def change():
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if isinstance(content, float) else content
        path.write_bytes(whole[: int(len(whole) * content)] if isinstance(content, float) else content)

    return change


def checkpoint(change):
    def write():
        state = train.load_checkpoint("run/last.pt")
        torch.save(change(state) or state, "run/last.pt")

    return write


def tree(change=lambda: None):
    """A folder of images, then something wrong in it."""
    return lambda: (small_tree(Path("set")), change())


def image(name, mode="RGB", side=9):
    def save():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (side, side + 3), 7 if mode in ("L", "P") else None).save(name)

    return save


def lists(**entries):
    return lambda: chaoyang_tree(Path("set"), **entries)


def huge_array():
    with zipfile.ZipFile("data/cifar10.npz", "w") as file, file.open("x_train.npy", "w") as member:
        np.lib.format.write_array_header_1_0(
            member, dict(descr="|u1", fortran_order=False, shape=(10**12, 32, 32, 3))
        )


EVALUATE, RESUME = ("--evaluate", "run/last.pt"), (*FEW, "--out", "run", "--resume")
TAUGHT = (*MINI, "--teacher", "run/last.pt", "--out", "student")
FOLDER = ("--dataset", "folder", "--data", "set", "--model", "resnet8", "--epochs", "1", "--batch-size", "2")
CHAOYANG = ("--dataset", "chaoyang", *FOLDER[2:])
NOTHING = lambda: None  # noqa: E731

BAD = {  # what is wrong, how it comes about, the command, what the message says
    "data set": (NOTHING, ["--dataset", "mnist"], "invalid choice: 'mnist'.*--help"),
    "schedule": (NOTHING, ["--schedule", "late"], "invalid choice: 'late'"),
    "no epochs": (NOTHING, ["--epochs", "0"], "--epochs must be at least 1"),
    "no number": (NOTHING, ["--epochs", "many"], "invalid int value: 'many'"),
    "no value": (NOTHING, ["--epochs"], "--epochs: expected one argument"),
    "abbreviation": (NOTHING, ["--epoch", "3"], "unrecognized arguments: --epoch"),
    "position": (NOTHING, ["cifar100"], "unrecognized arguments: cifar100"),
    "unknown option": (NOTHING, ["--unknown", "1"], "unrecognized arguments"),
    "lr": (NOTHING, ["--lr", "nan"], "--lr must be at least 1e-12"),
    "batch of one": (NOTHING, ["--batch-size", "1"], "--batch-size must be at least 2"),
    "patch": (NOTHING, ["--patch-size", "0"], "--patch-size must be at least 1"),
    "grid": (NOTHING, ["--image-size", "60"], "60 is not a multiple of patch size 16; choose another"),
    "seed": (NOTHING, ["--seed", "-1"], "--seed must be at least 0"),
    "large seed": (NOTHING, ["--seed", str(2**64)], "--seed must be at least 0"),
    "nan beta": (NOTHING, ["--beta", "nan"], "beta must be finite"),
    "beta": (NOTHING, ["--beta", "-1"], "beta must be finite and at least 0"),
    "guide epochs": (NOTHING, ["--guide-epochs", "0"], "guide_epochs must be at least 1"),
    "guided CNN": (NOTHING, [*FEW, "--schedule", "early"], "takes no guidance: leave --schedule out"),
    "adaptive sum": (NOTHING, ["--schedule", "adaptive", "--reduction", "sum"], "made for the mean form"),
    "large teacher": (NOTHING, ["--teacher", "resnet18"], "resnet18 is no teacher: choose"),
    "meta device": (NOTHING, [*FEW, "--device", "meta"], "does not work here.*leave it out"),
    "absent GPU": (NOTHING, [*FEW, "--device", "cuda:99"], "does not work here"),
    "device": (NOTHING, [*FEW, "--device", "toaster"], "does not work here"),
    "large batch": (NOTHING, [*FEW, "--batch-size", "999"], "160 images do not fill one batch; choose"),
    "many classes": (NOTHING, [*FEW, "--classes", "11"], "choose from 2 to 10"),
    "one class": (NOTHING, [*FEW, "--classes", "1"], "choose from 2 to 10"),
    "out is a file": (content("file", b""), [*FEW, "--out", "file"], "cannot write into file .*--out"),
    "nothing to resume": (NOTHING, [*FEW, "--resume"], "nothing to resume in runs/cifar10-resnet8-seed0"),
    "finished run": (NOTHING, [*FEW, "--out", "run"], "run holds a run of 4 epochs already: continue it"),
    "other options": (NOTHING, [*RESUME, "--lr", "1"], "made with other options: lr was 0.1, is 1.0"),
    "bench into a file": (content("a.json", b"{}"), ["bench.py", "--json", "a.json"], "a.json exists"),
    "bench rows": (NOTHING, ["bench.py", "--rows", "all"], "invalid choice: 'all'"),
    "cache of nothing": (content("data/cifar10.npz", b""), FEW, "no usable cache.*delete it"),
    "cut cache": (content("data/cifar10.npz", 0.5), FEW, "cifar10.npz is no usable cache.*delete it"),
    "cache of text": (content("data/cifar10.npz", b"text"), FEW, "is no usable cache"),
    "malicious cache": (
        lambda: small_cache(Path("data/cifar10.npz"), y_test=np.array([Malicious()] * 10)),
        FEW,
        "is no usable cache.*delete it",
    ),
    "huge cache": (huge_array, FEW, "is no usable cache.*delete it"),
    "cache without labels": (cache(y_test=None), FEW, "y_test.*delete it"),
    "float images": (cache(x_train=np.zeros((20, 32, 32, 3))), FEW, "images float64.*[Dd]elete it"),
    "planes first": (cache(x_train=np.zeros((20, 3, 32, 32), np.uint8)), FEW, r"\(20, 3, 32, 32\)"),
    "float labels": (cache(y_test=np.zeros(10)), FEW, "labels float64"),
    "label too high": (cache(y_test=np.arange(10) + 1), FEW, "labels from 1 to 10, not 0 to 9"),
    "no test images": (cache(x_test=np.zeros((0, 32, 32, 3), np.uint8), y_test=[]), FEW, "elete it"),
    "no checkpoint": (NOTHING, ["--evaluate", "absent.pt"], "no checkpoint absent.pt: check the name"),
    "empty checkpoint": (content("run/last.pt", b""), EVALUATE, "damaged or no checkpoint.*again"),
    "cut checkpoint": (content("run/last.pt", 0.7), EVALUATE, "damaged or no checkpoint"),
    "cut own checkpoint": (content("run/last.pt", 0.7), RESUME, "damaged or no checkpoint"),
    "malicious checkpoint": (checkpoint(lambda state: Malicious()), EVALUATE, "damaged or no checkpoint"),
    "malicious teacher": (checkpoint(lambda state: {**state, "data": Malicious()}), TAUGHT, "no checkpoint"),
    "cache as checkpoint": (NOTHING, ["--evaluate", "data/cifar10.npz"], "damaged or no checkpoint"),
    "foreign checkpoint": (checkpoint(lambda state: state["model"]), EVALUATE, "not written by this"),
    "empty args": (checkpoint(lambda state: state["args"].clear()), EVALUATE, "not written by this train.py"),
    "other weights": (checkpoint(lambda state: state["model"].popitem() and 0), EVALUATE, "not hold the net"),
    "no optimiser": (checkpoint(lambda state: state.pop("optimizer") and 0), RESUME, "not written by this"),
    "empty optimiser": (checkpoint(lambda state: state["optimizer"].clear()), RESUME, "no whole state"),
    "teacher of other data": (cache(y_train=np.zeros(20, int)), TAUGHT, "was trained on other data"),
    "teacher at chance": (
        checkpoint(lambda state: [tensor.zero_() for tensor in state["model"].values()] and None),
        TAUGHT,
        "is at chance .*train it longer, or another",
    ),
    "no folder": (NOTHING, FOLDER, "set/train.*must hold train/<class>"),
    "image of nothing": (tree(content("set/train/cat/a.png", b"")), FOLDER, "read .*a.png .*replace it"),
    "cut image": (tree(content("set/val/cat/image 0.png", 0.5)), FOLDER, "cannot read .*image 0.png"),
    "text as image": (tree(content("set/val/cat/a b é.jpg", b"text")), FOLDER, "cannot read .*a b é.jpg"),
    "16 bits": (tree(image("set/val/cat/deep.png", "I;16")), FOLDER, "more than 8 bits a channel"),
    "float image": (tree(image("set/val/cat/float.tiff", "F")), FOLDER, "more than 8 bits a channel"),
    "bomb": (tree(content("set/train/cat/a.png", png(30_000, 30_000))), FOLDER, "read .*a.png.*exceeds"),
    "small bomb": (tree(content("set/val/cat/a.png", png(10_000, 10_000))), FOLDER, "a.png.*exceeds"),
    "dangling link": (tree(lambda: Path("set/val/cat/a.png").symlink_to("gone")), FOLDER, "read .*a.png"),
    "empty class": (tree(lambda: Path("set/train/cow").mkdir()), FOLDER, "cow"),
    "single class": (
        tree(lambda: [shutil.rmtree(f"set/{s}/cat") for s in ("train", "val")]),
        FOLDER,
        "two or more are needed",
    ),
    "other classes": (tree(lambda: Path("set/val/cat").rename("set/val/cow")), FOLDER, "the same in both"),
    "no test folder": (tree(lambda: shutil.rmtree("set/val")), FOLDER, "must hold train/<class>"),
    "one image a class": (
        tree(lambda: [path.unlink() for path in Path("set/train").glob("*/image [01].png")]),
        [*FOLDER, "--batch-size", "3"],
        "2 images do not fill one batch; choose a smaller --batch-size",
    ),
    "locked image": (tree(lambda: Path("set/train/cat/image 0.png").chmod(0)), FOLDER, "ermission"),
    "locked output": (lambda: Path(".").chmod(0o555), FEW, "cannot write into runs.*ermission"),
    "no Chaoyang": (NOTHING, CHAOYANG, "train.json is missing.*ask the authors"),
    "no json": (lambda: (lists()(), content("set/test.json", b"{")()), CHAOYANG, "test.json .*no list"),
    "deep json": (lambda: (lists()(), content("set/train.json", b"[" * 10**5)()), CHAOYANG, "train.json"),
    "empty list": (lists(train=[]), CHAOYANG, "train.json is empty"),
    "a number": (lists(train=7), CHAOYANG, "train.json is missing or no list"),
    "no label": (lists(test=[dict(name="test/image 0.JPG")]), CHAOYANG, "test.json .*'label'"),
    "label 4": (lists(train=[dict(name="train/image 0.JPG", label=4)]), CHAOYANG, "a label outside 0 to 3"),
    "outside": (lists(train=[dict(name="../data/cifar10.npz", label=0)]), CHAOYANG, "names a file outside"),
    "absolute": (lists(test=[dict(name="/etc/passwd", label=0)]), CHAOYANG, "names a file outside"),
    "absent image": (lists(test=[dict(name="test/b.JPG", label=0)]), CHAOYANG, "cannot read .*test/b.JPG"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line_and_leaves_what_was_written(
    shell, trained, tmp_path, monkeypatch, case
):
    break_it, argv, message = BAD[case]
    folder = tmp_path / "case"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    folder.chmod(0o777)
    break_it()
    locked = case.startswith("locked")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    program, *argv = argv if "bench.py" in argv else ("train.py", *argv)
    code, told = shell(folder, *argv, program=program, unprivileged=locked)
    assert code == 1 and re.fullmatch("error: [^\n]+\n", told), told
    assert re.search(message, told), told
    assert not (folder / "executed").exists()
    assert all(path.read_bytes() == content for path, content in before.items())
    new = {path.suffix for path in folder.rglob("*") if path not in before and path.is_file()}
    assert not new & {".pt", ".partial"} and not ("cannot read" in told and ".npz" in new)


def test_what_can_sensibly_be_read_is_accepted(shell, tmp_path):
    """Grey, palette, transparent, CMYK and black-and-white images of any size, names with spaces and umlauts,
    endings that do not fit the content; other files beside them are left alone."""
    small_tree(tmp_path / "set")
    for i, mode in enumerate(("L", "P", "RGBA", "CMYK", "1", "LA")):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        save_to = tmp_path / "set" / "train" / "cat" / f"Bild {i} – grün.jpg"
        Image.new(mode, (30 + i, 20 + 5 * i)).save(save_to, kind)
    (tmp_path / "set" / "val" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "stderr").touch()
    case = tmp_path / "case"
    (tmp_path / "set").rename(case / "set") if case.mkdir() is None else None
    assert shell(case, *FOLDER, "--out", "run") == (0, "")
    assert train.load_checkpoint(case / "run" / "last.pt")["data"]["train_images"] == 12


# ------------------------------------------------------------------------------------------------- plots


@pytest.fixture
def plot():
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    return importlib.import_module("plot")


def write_run(path, accuracies, seconds=60.0, **args):
    """A log as train.py writes it."""
    args = (
        dict(
            dataset="cifar100",
            classes=None,
            model="deit_tiny",
            schedule="early",
            seed=0,
            epochs=3,
            augment="strong",
        )
        | args
    )
    origin = dict(args=args, hardware="a CPU", threads=2, torch="2.15.0")
    lines = [
        dict(
            epoch=e,
            val_acc=a,
            seconds=seconds,
            beta=2.5 * (e < 1),
            loss_cls=2.0,
            loss_guidance=3.0 if e < 1 else None,
        )
        for e, a in enumerate(accuracies)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in [origin, *lines]))
    return path


def test_the_table_has_mean_and_deviation_of_the_last_epoch_over_the_seeds(
    plot, tmp_path, monkeypatch, capsys
):
    last = [81.5, 82.25, 84.0]
    for seed, accuracy in enumerate(last):
        write_run(tmp_path / f"early{seed}.jsonl", [10, 90, accuracy], 66.0, seed=seed)
    write_run(tmp_path / "none.jsonl", [5, 6, 7], schedule="none")
    write_run(tmp_path / "slow.jsonl", [5, 6, 8], 120.0, schedule="none", augment="weak")
    write_run(tmp_path / "resnet.jsonl", [1, 2, 3, 4], model="resnet56", schedule="none", epochs=4)
    monkeypatch.setattr(
        sys, "argv", ["plot.py", *map(str, tmp_path.glob("*.jsonl")), "--out", str(tmp_path / "f")]
    )
    plot.main()
    table = (tmp_path / "f" / "table.md").read_text()
    assert table in capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.splitlines()
        if line.startswith("| ")
    ]
    spread = f"{np.mean(last):.2f} ± {np.std(last, ddof=1):.2f}"
    assert rows[1:] == [
        ["deit_tiny alone, augment strong", "7.00", "1", "7.00", "7.00", "3.0", ""],
        ["deit_tiny alone, augment weak", "8.00", "1", "8.00", "8.00", "6.0", ""],
        ["deit_tiny + early guidance", spread, "3", "81.50, 82.25, 84.00", "90.00 ± 0.00", "3.3", ""],
        ["resnet56", "4.00", "1", "4.00", "4.00", "4.0", ""],
    ]
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(tmp_path / "untimed"), "--untimed"])
    plot.main()
    assert "minutes" in table and "minutes" not in (tmp_path / "untimed" / "table.md").read_text()
    assert not (tmp_path / "untimed" / "time.png").exists()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--reach", "7"])
    with pytest.raises(SystemExit, match="error: --reach is about times"):
        train.explain(plot.main)
    reached = plot.table(plot.read_rows(tmp_path.glob("*.jsonl")), reach=[5.5, 82.0, 90.0]).splitlines()
    assert [line.split("|")[-4:-1] for line in reached if line.startswith("| ")] == [
        [" minutes to 5.5 % ", " minutes to 82 % ", " minutes to 90 % "],
        [" 2.0 ", " - ", " - "],
        [" 4.0 ", " - ", " - "],
        [" 1.1 ", " 2.2 ", " 2.2 "],
        [" - ", " - ", " - "],
    ]
    monkeypatch.setattr(sys, "argv", ["plot.py", "--unknown"])
    with pytest.raises(SystemExit, match="error: .*required.*; see python plot.py --help"):
        train.explain(plot.main)
    (tmp_path / "slow.jsonl").unlink()  # now there is one run without guidance to compare with
    assert "| 3.3 | +10.0 % |" in plot.table(plot.read_rows(tmp_path.glob("*.jsonl")))
    for name in ("accuracy", "time", "losses"):
        with Image.open(tmp_path / "f" / f"{name}.png") as picture:
            assert (
                min(picture.size) > 400 and len(set(np.asarray(picture.convert("L")).flatten().tolist())) > 50
            )


def test_rows_are_compared_seed_by_seed_by_a_paired_t_test(plot, tmp_path):
    """The interval is scipy's for these numbers: stats.ttest_1samp([3, 1, 2], 0).confidence_interval()."""
    for seed, (one, other) in enumerate(((70, 73), (60, 61), (65, 67))):
        write_run(tmp_path / f"constant{seed}.jsonl", [1, 2, one], schedule="constant", seed=seed)
        write_run(tmp_path / f"early{seed}.jsonl", [1, 2, other], schedule="early", seed=seed)
    rows = plot.read_rows(tmp_path.glob("*.jsonl"))
    line = plot.paired(rows).splitlines()[-1]
    assert "| deit_tiny + early guidance, minus deit_tiny + constant guidance | +2.00 ± 1.00 | 3 | " in line
    assert line.endswith("| -0.48 to +4.48 | not told apart |")
    for seed in range(3, 5):
        write_run(tmp_path / f"constant{seed}.jsonl", [1, 2, 60], schedule="constant", seed=seed)
        write_run(tmp_path / f"early{seed}.jsonl", [1, 2, 62], schedule="early", seed=seed)
    assert plot.paired(plot.read_rows(tmp_path.glob("*.jsonl"))).splitlines()[-1].endswith("| higher |")


def test_runs_of_teachers_of_another_network_or_length_are_not_pooled(plot, tmp_path):
    for seed, teacher in enumerate((("resnet8", 30), ("resnet8", 30), ("resnet20", 30), ("resnet8", 5))):
        path = write_run(tmp_path / f"{seed}.jsonl", [1, 2, 3], seed=seed)
        origin, *lines = records_of(path)
        origin |= dict(teacher_model=teacher[0], teacher_epochs=teacher[1])
        path.write_text("".join(json.dumps(line) + "\n" for line in [origin, *lines]))
    rows = plot.read_rows(tmp_path.glob("*.jsonl"))
    assert sorted(map(len, rows.values())) == [1, 1, 2]
    assert "deit_tiny + early guidance, teacher model resnet20, teacher epochs 30" in rows


def test_logs_that_do_not_belong_together_are_refused(plot, tmp_path, monkeypatch):
    good = write_run(tmp_path / "a.jsonl", [1, 2, 3])
    for message, change in (
        ("data set cifar10", dict(dataset="cifar10")),
        ("classes", dict(classes=20)),
        ("epochs", dict(epochs=2)),
        ("has 2 of 3 epochs: finish", dict(accuracies=[1, 2])),
        ("repeats seed 0", dict()),
    ):
        change = dict(accuracies=[1, 2, 3][: change.get("epochs", 3)]) | change
        bad = write_run(tmp_path / "b.jsonl", **change)
        monkeypatch.setattr(sys, "argv", ["plot.py", str(good), str(bad), "--out", str(tmp_path / "f")])
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            train.explain(plot.main)
    for content in (
        "",
        "{}",
        "[1]",
        "no json",
        json.dumps(dict(args={})),
        json.dumps(dict(args=dict(epochs=0))),
    ):
        (tmp_path / "b.jsonl").write_text(content)
        with pytest.raises(InputError, match="b.jsonl is no log of train.py"):
            plot.read_rows([tmp_path / "b.jsonl"])
    with pytest.raises(InputError, match="absent"):
        plot.read_rows([tmp_path / "absent"])


def test_attention_is_that_of_the_model_and_its_distance_that_of_known_cases(plot):
    model, images = randomise(deit_mini(10, 32, 8)).eval(), torch.randn(2, 3, 32, 32)
    weights = plot.attention(model, images)
    assert len(weights) == 6 and weights[0].shape == (2, 3, 17, 17)
    torch.testing.assert_close(weights[3].sum(dim=3), torch.ones(2, 3, 17))
    x = (
        torch.cat((model.cls_token.expand(2, -1, -1), model.patch_embed(images).flatten(2).mT), 1)
        + model.pos_embed
    )
    for block, found in zip(model.blocks, weights):  # torch's own attention with an identity in place of v
        q, k, _ = block.attn.qkv(block.norm1(x)).view(2, 17, 3, 3, 32).permute(2, 0, 3, 1, 4)
        torch.testing.assert_close(
            found, F.scaled_dot_product_attention(q, k, torch.eye(17).expand(2, 3, 17, 17))
        )
        x = block(x)

    side, patch = 4, 8
    places = [(patch * row, patch * column) for row in range(side) for column in range(side)]
    apart = [[math.dist(a, b) for b in places] for a in places]
    uniform = torch.full((1, 1, 17, 17), 1 / 17)
    assert plot.attention_distance(uniform, patch).item() == pytest.approx(np.mean(apart), rel=1e-5)
    itself = torch.eye(17)[None, None]
    assert plot.attention_distance(itself, patch).item() == 0
    corner = torch.zeros(1, 1, 17, 17)
    corner[..., 0], corner[..., 1] = (
        0.75,
        0.25,
    )  # mostly to cls, which does not count, else to the first patch
    assert plot.attention_distance(corner, patch).item() == pytest.approx(np.mean(apart[0]), rel=1e-5)
    corner[0, 0, 5:], corner[0, 0, 5:, 0] = 0, 1  # most patches look at nothing but cls: they do not count
    first = np.mean(apart[0][:4])
    assert plot.attention_distance(corner, patch).item() == pytest.approx(first, rel=1e-5)
    two = plot.attention_distance(torch.cat((uniform, itself), dim=1), patch)  # heads are kept apart
    assert two.shape == (2,) and two[1] == 0 and two[0] > 10


def test_the_inside_of_the_networks_is_drawn_from_checkpoints(plot, small_glyphs, monkeypatch, capsys):
    for schedule in ("none", "early"):
        command(monkeypatch, "--schedule", schedule, "--epochs", 2, "--out", schedule)
    monkeypatch.setattr(sys, "argv", ["plot.py", "none", "early", "runs/glyphs-resnet8-seed0", "--look"])
    train.explain(plot.main)
    assert {path.name for path in Path("figures").iterdir()} == {
        "table.md", "accuracy.png", "time.png", "losses.png",
        "examples.png", "attention.png", "maps-early.png"}  # fmt: skip
    Path("early/last.pt").unlink()
    with pytest.raises(SystemExit, match="no checkpoint early/last.pt"):
        train.explain(plot.main)


def test_a_full_gpu_memory_and_a_missing_git_do_not_end_in_a_traceback(small_glyphs, monkeypatch):
    def no_git(*args, **options):
        raise FileNotFoundError("git")

    def no_memory(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train.subprocess, "check_output", no_git)
    monkeypatch.setattr(train, "train_epoch", no_memory)
    with pytest.raises(SystemExit, match="error: CUDA out of memory. Choose a smaller --batch-size"):
        command(monkeypatch, "--schedule", "none", "--out", "run")
    assert records("run")[0]["git_commit"] is None


def test_classes_without_test_images_and_a_damaged_download_are_refused(tmp_path, monkeypatch):
    small_cache(tmp_path / "cifar10.npz", y_test=np.full(10, 9))
    with pytest.raises(InputError, match="no image of the first 3 classes; choose more classes"):
        load("cifar10", tmp_path, classes=3)

    class Damaged:
        def __init__(self, root, split, download):
            pass

        def __len__(self):
            return 1

        def __getitem__(self, i):
            raise OSError("image file is truncated")

    monkeypatch.setattr(data.datasets, "Flowers102", Damaged)
    with pytest.raises(InputError, match="cannot decode image 0 .*fetch the data again"):
        load("flowers", tmp_path)


def test_output_that_nobody_reads_on_ends_without_a_traceback(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(SystemExit) as end:
        train.explain(lambda: print("epoch"))
    assert end.value.code == 141
    sys.stdout.close()  # as Python does when it ends: nothing is left that could not be written


def test_transparency_shows_white_and_every_format_of_pillow_counts(tmp_path):
    small_tree(tmp_path)
    Image.new("RGBA", (20, 20), (200, 0, 0, 0)).save(tmp_path / "train" / "cat" / "a.png")
    Image.new("L", (20, 20), 50).save(tmp_path / "train" / "cat" / "b.gif")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    x = load("folder", tmp_path).x_train
    assert len(x) == 8 and x[0].unique().tolist() == [255] and x[1].unique().tolist() == [50]


def test_augment_refuses_a_result_too_small_for_its_operations():
    with pytest.raises(ValueError, match="at least 3 pixels"):
        list(batches(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2), 2, 2, torch.Generator()))


def fifty_steps(precision=None, fused=True, compiled=False, device="cpu"):
    """The mean losses after each of 50 steps: two epochs of 25, the second without guidance."""
    torch.manual_seed(0)
    student = VisionTransformer(10, 32, 8, 48, 3, 3, (0, 1, 2), drop_path=0.0)
    teacher = calibrate(resnet8(10), torch.randn(16, 3, 32, 32)).requires_grad_(False)
    guide = Guidance(student.feature_channels, teacher.feature_channels)
    student, teacher, guide = student.to(device), teacher.to(device), guide.to(device)
    optimizer, curve = train.make_optimizer(student, guide, 1e-3, fused), []
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    if fused:  # the whole fast path
        teacher = teacher.to(memory_format=torch.channels_last)
    networks = [torch.compile(network) if compiled else network for network in (student, teacher, guide)]
    x, y = load("glyphs").x_train[:400].to(device), (torch.arange(400) % 10).to(device)
    few, generator = Data(x, y, x, y, 10), torch.Generator().manual_seed(0)
    progress = argparse.Namespace(show=lambda step, steps, means: curve.append(means[:2].cpu()))
    args = argparse.Namespace(batch_size=16, image_size=32, augment="strong")
    graphs = []
    for beta in (2.5, 0.0):
        train.train_epoch(
            *networks,
            optimizer,
            scheduler,
            few,
            beta,
            args,
            generator,
            precision or train.nullcontext(),
            progress,
        )
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return torch.stack(curve), graphs


def test_the_fast_path_agrees_with_plain_float32_step_by_step_and_compiles_once():
    """Loss curves of 50 guided, then unguided steps: the fused optimiser and channels_last within 1e-4 of
    plain eager float32, compiled within 1e-3, and compiled in bfloat16 within 2 %. Nothing is compiled again
    when beta reaches 0."""
    plain, _ = fifty_steps(fused=False)
    assert plain.shape == (50, 2) and plain[24, 1] < 0.95 * plain[0, 1]  # it learns
    torch.testing.assert_close(fifty_steps()[0], plain, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled, graphs = fifty_steps(compiled=True)
    assert graphs[0] == graphs[1] == 3, graphs  # student, teacher, guidance
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-3)
    fast, _ = fifty_steps(torch.autocast("cpu", torch.bfloat16), compiled=True)
    torch.testing.assert_close(fast, plain, rtol=0.02, atol=1e-3)


class Elsewhere(TorchDispatchMode):
    """Holds every operation to what is fast on a GPU, where the meta device stands for the GPU: no operation
    takes tensors of both devices, and nothing is copied to the device in a way that waits. Whatever looks at
    a tensor's values fails on the meta device by itself, apart from reading results, which is counted."""

    reads = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim}
        assert len(given) < 2, f"{operation} mixes devices"
        if "meta" in given and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self.reads += 1
            return torch.zeros(args[0].shape)
        result = operation(*args, **kwargs)
        if given == {"cpu"} and isinstance(result, torch.Tensor) and result.device.type == "meta":
            assert kwargs.get("non_blocking"), f"{operation} waits for its copy"
        return result


@pytest.mark.parametrize("size", [32, 64])
def test_an_epoch_waits_for_the_device_once_and_mixes_no_devices(size, monkeypatch):
    """Guided training at the size of the stored images and enlarged, every operation of the augmentation
    included: the host reads one tensor, the epoch's means."""
    monkeypatch.setitem(data.AT_ONCE, "meta", 2**22)
    x = torch.zeros(256, 3, 32, 32, dtype=torch.uint8, device="meta")
    y = torch.zeros(256, dtype=torch.long, device="meta")
    student = VisionTransformer(10, size, 8, 48, 3, 3, (0, 1, 2), drop_path=0.1).to("meta")
    teacher = resnet8(10).to("meta").eval().requires_grad_(False)
    guide = Guidance(student.feature_channels, teacher.feature_channels).to("meta")
    optimizer = train.make_optimizer(
        student, guide, 1e-3, fused=False
    )  # there is no fused one on this device
    used = set()

    def noted(original):
        def operation(images, name, *rest, **options):
            used.add(name)
            return original(images, name, *rest, **options)

        return operation

    monkeypatch.setattr(data, "move", noted(move))
    monkeypatch.setattr(data, "recolour", noted(recolour))
    args = argparse.Namespace(batch_size=32, image_size=size, augment="strong")
    silent = argparse.Namespace(show=lambda *means: None)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    parts = (student, teacher, guide, optimizer, scheduler, Data(x, y, x, y, 10), 2.5, args)
    with Elsewhere() as watch:
        train.train_epoch(*parts, torch.Generator().manual_seed(0), train.nullcontext(), silent)
    assert watch.reads == 1 and used == set(OPERATIONS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_an_epoch_waits_for_the_device_once_and_agrees_with_the_cpu():
    """torch's own check finds one synchronisation in an epoch: reading its mean losses at the end. The loss
    curve in float32 is the CPU's within 1 %, compiled bfloat16's within 3 %."""
    parts = setup(2.5, train.make_optimizer, calibrate(resnet8(10), torch.randn(16, 3, 32, 32)))
    for network in parts[:3]:
        network.cuda()
    few, parts[7].augment = parts[5], "strong"
    parts[5] = Data(*(tensor.cuda() for tensor in few[:4]), 10)
    parts[10] = argparse.Namespace(show=lambda *means: None)
    train.train_epoch(*parts)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            train.train_epoch(*parts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [str(wait.message) for wait in waits]
    on_cpu, _ = fifty_steps(fused=False)
    torch.testing.assert_close(fifty_steps(device="cuda")[0], on_cpu, rtol=0.01, atol=0.01)
    bfloat16 = torch.autocast("cuda", torch.bfloat16)
    fast, _ = fifty_steps(bfloat16, compiled=True, device="cuda")
    torch.testing.assert_close(fast, on_cpu, rtol=0.03, atol=0.01)


def test_compilation_is_the_default_only_in_long_runs_on_a_gpu_and_can_be_forced(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(train, "find_spec", lambda name: name == "triton")
    for asked, device, steps, expected in (
        (None, cpu, 10**6, False),
        (None, cuda, 10**6, True),
        (None, cuda, 100, False),
        (True, cpu, 1, True),
        (False, cuda, 10**6, False),
    ):
        assert train.pick_compile(asked, device, steps)[0] is expected
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert not train.pick_compile(None, cuda, 10**6)[0]


def test_a_failed_compilation_ends_with_one_line(small_glyphs, monkeypatch):
    def no_backend(graph, inputs):
        raise RuntimeError("no C++ compiler")

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=no_backend))
    with pytest.raises(SystemExit, match="torch.compile failed .*; try again with --no-compile"):
        command(monkeypatch, "--model", "resnet8", "--epochs", 1, "--compile")


# ------------------------------------------------------------------------------------------------ bench


def test_the_bench_counts_the_operations_of_the_reference():
    """From first principles 7.463 and 2.507 GFLOP for DeiT-tiny, 0.2515 for ResNet-56 (method.md, 6)."""
    assert bench.flops("deit_tiny", 224, 16) == pytest.approx(7.463e9, rel=1e-4)
    assert bench.flops("deit_tiny", 224, 16, backward=False) == pytest.approx(2.507e9, rel=1e-4)
    assert bench.flops("resnet56", 32, 0, backward=False) == pytest.approx(0.2515e9, rel=1e-3)


def test_the_bench_shows_and_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    """Every row on a CPU, small; figures that hang together; nothing but the rows asked for."""
    monkeypatch.setattr(torch, "compile", lambda network, mode=None: network)
    small = "--model deit_mini --image-size 32 --patch-size 8 --batch-size 4 --images 9 --repeats 2".split()

    def measured(*flags):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        monkeypatch.setattr(sys, "argv", ["bench.py", *small, *flags, "--json", str(path)])
        bench.main()
        found, printed = json.loads(path.read_text()), capsys.readouterr().out
        assert [line["name"] for line in found["rows"]] == [
            row.split("|")[1].strip() for row in printed.splitlines() if row.startswith("| ")
        ][1:]
        return found

    found = measured()
    names = [line["name"] for line in found["rows"]]
    assert names[:4] == ["float32, eager", "+ bfloat16 autocast", "+ fused optimiser", "+ torch.compile"]
    assert len(names) == 12 and found["torch"] == str(torch.__version__) and found["command"]
    for line in found["rows"]:
        if "early" in line["name"]:
            none, constant = (found["rows"][names.index(f"guidance: {s}")] for s in ("none", "constant"))
            third = (2 * none["hours_for_300_epochs"] + constant["hours_for_300_epochs"]) / 3
            assert line["hours_for_300_epochs"] == pytest.approx(third)
            continue
        assert 0 < line["fastest"] <= line["seconds"] <= line["slowest"]
        assert line["images_per_second"] == pytest.approx(8 / line["seconds"])  # two whole batches of four
        assert line["ms_per_step"] == pytest.approx(1000 * line["seconds"] / 2)
        if "utilisation" in line:
            speed = 300 * 50_000 / line["hours_for_300_epochs"] / 3600
            assert speed == pytest.approx(line["images_per_second"]) and 0 < line["utilisation"] < 2
    alone = bench.flops("deit_mini", 32, 8)
    for name, operations in (("none", alone), ("constant", alone + bench.flops("resnet56", 32, 0, False))):
        line = found["rows"][names.index(f"guidance: {name}")]
        rate = operations * line["images_per_second"] / found["full_rate"]
        assert line["utilisation"] == pytest.approx(rate)
    assert [line["name"] for line in measured("--amp", "--compile")["rows"]] == ["training"]


def test_the_bench_compares_with_timm_and_pillow_in_workers(monkeypatch, tmp_path):
    pytest.importorskip("timm")
    file = tmp_path / "b.json"
    monkeypatch.setattr(bench, "build", lambda *args: deit_mini(100, 224, 32))
    flags = f"--rows inputs models --batch-size 2 --images 4 --repeats 1 --workers 1 --json {file}"
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split()])
    bench.main()
    names = [line["name"] for line in json.loads(file.read_text())["rows"]]
    assert len(names) == 8 and sum("ours" in name for name in names) == 3


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--rows", "ladders"], "invalid choice"),
        (["--images", "0"], "--images must be at least 2"),
        (["--images", "5", "--batch-size", "8"], "does not fill a batch"),
        (["--image-size", "40"], "not a multiple of patch size"),
        (["--image-size", "16"], "at least 32"),
        (["--device", "abacus"], "does not work here"),
    ],
)
def test_wrong_options_of_the_bench_end_with_one_line(monkeypatch, argv, message):
    monkeypatch.setattr(sys, "argv", ["bench.py", *argv])
    with pytest.raises(SystemExit, match=message):
        bench.explain(bench.main)


def test_the_bench_knows_gpus_by_name_and_says_when_timm_is_missing(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert bench.peak(cuda, None)[0] == 989e12  # NVIDIA's data sheet, dense
    modes = [(row.precision, row.fused, row.mode) for row in bench.ladder(cuda)]
    assert len(modes) == 6
    for before, after in zip(modes, modes[1:]):  # one change per row
        assert sum(a != b for a, b in zip(before, after)) == 1
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install timm"):
        bench.parse(["--rows", "models"])


def test_memory_is_kept_only_where_the_c_library_can(monkeypatch):
    """Elsewhere nothing is called: Windows has no CDLL(None), other C libraries have no mallopt."""
    called = []
    library = argparse.Namespace(mallopt=lambda *setting: called.append(setting))
    monkeypatch.setattr(train.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(sys, "platform", "linux")
    train.keep_freed_memory()
    assert called == [(-4, 0), (-1, 2**31 - 1)]
    del library.mallopt
    train.keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(train.ctypes, "CDLL", None)
    train.keep_freed_memory()


# ----------------------------------------------------------------------------------------- documentation

README = (HERE / "README.md").read_text()


def test_the_readme_quotes_the_code_as_it_is():
    code, quoted = (
        (HERE / "guidance.py").read_text().splitlines(),
        README.split("```python\n")[1].split("```")[0],
    )
    assert len(quoted.splitlines()) > 6
    assert all(line in code or line.strip() == "..." for line in quoted.splitlines())


def test_links_and_file_lengths_of_the_readme_hold():
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"`((?:results|figures)/[^`*]+)`", README)
    assert len(targets) >= 8
    for target in targets:
        assert target.startswith("https://") or (HERE / target).exists(), target
    lengths = dict(re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", README, re.MULTILINE))
    assert lengths.keys() == {path.name for path in HERE.glob("*.py")}
    for name, said in lengths.items():
        true = len((HERE / name).read_text().splitlines())
        assert true == pytest.approx(int(said.replace(",", "")), rel=0.05), (name, true)


def test_the_tables_of_the_readme_are_what_plot_makes_of_the_committed_logs(plot):
    for folder, timed in (("cifar100-20classes", False), ("glyphs", True)):
        table = plot.table(plot.read_rows((HERE / "results" / folder).glob("*.jsonl")), timed)
        assert table == (HERE / "figures" / folder / "table.md").read_text() and table.strip() in README
        assert {"accuracy.png", "losses.png"} <= {p.name for p in (HERE / "figures" / folder).iterdir()}


@pytest.mark.parametrize(
    "title, folder, count", [("## Exercises", "exercises", 6), ("### One change", "ablations", 14)]
)
def test_changes_that_the_readme_tells_of_end_where_their_logs_end(title, folder, count):
    told = README.split(title)[1].split("\n##")[0]
    found = [records_of(path)[-1]["val_acc"] for path in (HERE / "results" / folder).glob("*.jsonl")]
    stated = re.findall(r"\| ([\d.]+) % \|$", told, re.MULTILINE)
    assert len(stated) == count and sorted(f"{value:.1f}" for value in found) == sorted(stated)


def easy_tree(root):
    """Two classes that differ in brightness, for --dataset folder."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 10)):
        for i, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for j in range(count):
                pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8) + np.uint8(130 * i)
                Image.fromarray(pixels).save(root / split / name / f"{j}.png")


def test_every_training_command_of_the_readme_runs_scaled_down(shell, tmp_path):
    """The rows, the small version, one's own images: to the end, on easy images, at 32 px, for one epoch.
    `python train.py` itself is what .ci/run runs; torchrun has a test of its own."""
    case = tmp_path / "case"
    easy_cache(case / "data" / "cifar100.npz", 80)
    easy_tree(case / "DIR")
    commands = re.findall(
        r"^(?:    |\| [^|]* \| `)python train\.py( [^`|\n]+)", README.replace("\\\n", " "), re.MULTILINE
    )
    commands = {
        command.strip() for command in commands if "--dataset" in command and "chaoyang" not in command
    }
    assert len(commands) == 9, commands
    for command in sorted(commands):
        argv = shlex.split(command)
        about = [
            word for i, word in enumerate(argv) if {"--dataset", "--classes", "--data"} & {word, argv[i - 1]}
        ]
        small = ["--epochs", "1", "--batch-size", "40", "--image-size", "32"]
        if not {"resnet56", "resnet20", "resnet18"} & {
            argv[argv.index("--model") + 1] if "--model" in argv else ""
        }:
            teacher = "-".join(about).replace("--", "")
            small += ["--patch-size", "8", "--teacher", f"{teacher}/last.pt"]
            if not (case / teacher).exists():
                train_it = [
                    *about,
                    "--model",
                    "resnet8",
                    "--epochs",
                    "6",
                    "--batch-size",
                    "16",
                    "--out",
                    teacher,
                ]
                assert shell(case, *train_it) == (0, "")
        assert shell(case, *argv, *small, "--out", "run") == (0, ""), command
        first, epochs = records(case / "run")
        assert len(epochs) == 1 and all(
            str(first["args"][k[2:]]) == v for k, v in zip(about[::2], about[1::2])
        )
        shutil.rmtree(case / "run")


def test_the_readmes_own_transformer_trains_under_guidance(monkeypatch, tmp_path):
    space = dict(nn=nn, torchvision=torchvision)
    exec(README.split("```python\n")[2].split("```")[0], space)
    monkeypatch.setitem(train.TRANSFORMERS, "swin", space["Swin"])
    monkeypatch.chdir(tmp_path)
    easy_cache(Path("data/cifar10.npz"), 80)
    small = ("--dataset", "cifar10", "--batch-size", 16)
    command(monkeypatch, *small, "--model", "resnet8", "--epochs", 6, "--out", "teacher")
    swin = ("--model", "swin", "--epochs", 3, "--lr", 1e-3, "--image-size", 32, "--schedule", "constant")
    command(monkeypatch, *small, *swin, "--teacher", "teacher/last.pt", "--out", "run")
    lines = records("run")[1]
    assert lines[2]["loss_guidance"] < 0.9 * lines[0]["loss_guidance"]
