"""The claims of the method, each against a reference that is not our code: loops, torchvision, timm.

The networks, the loss, how long it guides, the recipe, one step, whole runs; the rest is tested in tests/.
"""

import cProfile
import functools
import math
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

import data
import train
from augment import batches, prepare
from guidance import AdaptiveStop, Guidance, beta_at
from model import VisionTransformer, deit_mini, deit_tiny
from plumbing import runs
from plumbing.devices import make_precision
from teacher import load_teacher, resnet8, resnet18, resnet56

HERE = Path(__file__).parent
to_vector = nn.utils.parameters_to_vector
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
few_glyphs = functools.cache(functools.partial(data.glyphs, train=320, test=100))  # a seventh of the set


def randomise(model):
    """Weights away from their initial zeros and ones, so that no term of a comparison vanishes."""
    torch.manual_seed(1)
    for tensor in filter(torch.is_floating_point, model.state_dict().values()):
        tensor += 0.02 * torch.randn(tensor.shape)
    return model


def calibrate(cnn, images):
    """Gives the BatchNorms the statistics of these images, as training would."""
    cnn.apply(lambda module: setattr(module, "momentum", 1.0)).train()(images)
    return cnn.eval()


# ------------------------------------------------------------------------------------------- the networks
def test_parameters_feature_maps_and_the_uniform_first_prediction_are_as_published():
    published = {
        deit_tiny: (5_543_716, 224, [(192, 14, 14)] * 3),
        resnet56: (861_620, 32, [(16, 32, 32), (32, 16, 16), (64, 8, 8)]),
        resnet18: (11_227_812, 224, [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]),
    }
    for make, (parameters, side, shapes) in published.items():
        network = make(num_classes=100)
        logits, features = network(torch.randn(2, 3, side, side))
        assert len(to_vector(network.parameters())) == parameters and logits.shape == (2, 100)
        assert [maps.shape for maps in features] == [(2, *shape) for shape in shapes]
    assert torch.equal(deit_tiny(100)(torch.randn(2, 3, 224, 224))[0], torch.zeros(2, 100))
    assert len(to_vector(Guidance((192, 192, 192), (16, 32, 64)).parameters())) == 21_616


def test_deit_tiny_computes_what_torchvisions_vit_computes_with_the_same_weights():
    ours, images = randomise(deit_tiny(100, image_size=64)).eval(), torch.randn(2, 3, 64, 64)
    theirs = models.VisionTransformer(64, 16, 12, 3, 192, 768, num_classes=100).eval()
    names = [*theirs.state_dict()]  # their order is ours, but for the positions
    names.insert(1, names.pop(names.index("encoder.pos_embedding")))
    theirs.load_state_dict(dict(zip(names, ours.state_dict().values(), strict=True)))
    assert_close(ours(images)[0], theirs(images))


def test_deit_tiny_loads_strictly_into_timm_and_back_with_equal_logits_and_features():
    timm = pytest.importorskip("timm", reason="timm is not installed; .ci/run installs it and runs this test")
    ours, images = randomise(deit_tiny(100)).eval(), torch.randn(2, 3, 224, 224)
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=100).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    logits, features = ours(images)
    expected = theirs.forward_intermediates(images, (0, 6, 11), intermediates_only=True)
    assert_close([logits, *features], [theirs(images), *expected])
    deit_tiny(100).load_state_dict(theirs.state_dict(), strict=True)


def test_features_are_the_raw_output_of_the_guided_blocks_without_cls_token_in_image_order():
    model, outputs = randomise(deit_mini(10, image_size=32, patch_size=8, guided_blocks=(1, 4))).eval(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    _, features = model(torch.randn(2, 3, 32, 32))
    for feature, tokens in zip(features, (outputs[1], outputs[4]), strict=True):
        for i in range(16):
            assert torch.equal(feature[:, :, i // 4, i % 4], tokens[:, 1 + i])


@pytest.mark.parametrize("make", [resnet18, resnet56])
def test_resnets_load_strictly_into_torchvision_with_equal_logits_and_features(make):
    images, theirs = torch.randn(4, 3, 64, 64), models.resnet18(num_classes=10)
    if make is resnet56:  # torchvision has the blocks and the code that stacks them
        theirs.conv1, theirs.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        theirs.inplanes, theirs.maxpool, theirs.fc = 16, nn.Identity(), nn.Linear(64, 10)
        for i, stage in enumerate(((16, 9, 1), (32, 9, 2), (64, 9, 2)), start=1):
            setattr(theirs, f"layer{i}", theirs._make_layer(models.resnet.BasicBlock, *stage))
        theirs.layer4 = nn.Identity()
    ours = calibrate(randomise(make(10)), images)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for mode in (False, True):
        ours.train(mode), theirs.train(mode)
        expected = create_feature_extractor(theirs, [*ours.stages, "fc"])(images)
        logits, features = ours(images)
        assert_close([*features, logits], [*expected.values()])


def test_sizes_and_images_that_do_not_fit_are_refused_by_name():
    wrong = dict(image_size=30, width=100, num_classes=0, depth=0, drop_path=1.0).items()
    for name, value in (*wrong, ("guided_blocks", (0, 12)), ("guided_blocks", (6, 0))):
        sizes = dict(num_classes=10, image_size=32, patch_size=4, width=192, depth=12, heads=3)
        sizes |= {"guided_blocks": (0, 6, 11), "drop_path": 0.1, name: value}
        pytest.raises(ValueError, VisionTransformer, **sizes).match(f"{name.replace('_', '.')} .*{value}")
    pytest.raises(ValueError, deit_mini(10), torch.ones(1, 3, 64, 64)).match(r"got \(1, 3, 64, 64\)")
    pytest.raises(ValueError, resnet8(10), torch.randn(1, 1, 32, 32)).match("expected images")


# ----------------------------------------------------------------------------------------------- the loss
def bilinear(maps, side):
    """Bilinear resize with half-pixel centres, by definition: (..., S, S) -> (..., side, side), numpy."""
    S = maps.shape[-1]
    points = np.clip((np.arange(side) + 0.5) * S / side - 0.5, 0, S - 1)
    weights = np.maximum(0, 1 - np.abs(points[:, None] - np.arange(S)))  # (side, S)
    return weights @ maps @ weights.T


def test_the_loss_is_the_papers_formula_computed_with_loops():
    """L = sum_i 1/(H_i W_i) ||F_vt - F_cnn||_F^2, batch averaged; teacher's grid larger, equal, smaller."""
    torch.manual_seed(0)
    student = [torch.randn(2, 5, 3, 3), torch.randn(2, 4, 3, 3), torch.randn(2, 5, 3, 3)]
    teacher = [torch.randn(2, 2, 6, 6), torch.randn(2, 3, 3, 3), torch.randn(2, 4, 2, 2)]
    guide, expected = Guidance((5, 4, 5), (2, 3, 4), reduction="sum"), 0.0
    for project, *maps in zip(guide.projections, student, teacher):
        tensors = project.weight[:, :, 0, 0], project.bias, *maps
        weight, bias, f_vt, f_cnn = (tensor.detach().double().numpy() for tensor in tensors)
        side = max(f_vt.shape[-1], f_cnn.shape[-1])
        for b, c in np.ndindex(f_cnn.shape[:2]):
            projected = bias[c] + sum(weight[c, d] * f_vt[b, d] for d in range(f_vt.shape[1]))
            difference = bilinear(projected, side) - bilinear(f_cnn[b, c], side)
            expected += (difference**2).sum() / side**2 / 2
    assert guide(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_per_layer_the_sum_form_is_c_times_the_mean_form_and_mean_is_the_default():
    for channels in (16, 32, 64):
        mean, total = Guidance((12,), (channels,)), Guidance((12,), (channels,), "sum")
        total.load_state_dict(mean.state_dict())
        maps = [torch.randn(2, 12, 4, 4)], [torch.randn(2, channels, 8, 8)]
        assert mean.reduction == "mean"
        assert total(*maps).item() == pytest.approx(channels * mean(*maps).item(), rel=1e-5)


@pytest.mark.parametrize("form", ["mean", "sum", "relative"])
def test_the_loss_is_zero_for_a_copy_and_its_gradient_reaches_student_and_projections_only(form):
    guide, maps = Guidance((4,), (4,), form), torch.randn(2, 4, 6, 6)
    nn.init.dirac_(guide.projections[0].weight), nn.init.zeros_(guide.projections[0].bias)
    if form == "relative":
        guide.measure([maps], [maps])
    assert guide([maps], [maps]).item() == 0
    student, teacher = (torch.randn(2, 4, 6, 6, requires_grad=True) for _ in range(2))
    guide([student], [teacher]).backward()
    assert min(student.grad.norm(), guide.projections[0].weight.grad.norm()) > 0 and teacher.grad is None


@pytest.mark.parametrize("strength", [1.0, 0.05])
def test_the_relative_form_is_1_for_zeros_and_has_no_unit(strength):
    """The mean form over the summed mean squares of the teacher's maps at the compared size: a teacher with
    weaker features gives the same loss for a student whose maps are weaker in proportion."""
    torch.manual_seed(0)
    student = [torch.randn(2, 4, 3, 3), torch.randn(2, 4, 8, 8)]
    teacher = [strength * torch.randn(2, 2, 6, 6).relu(), strength * 9 * torch.randn(2, 3, 2, 2).relu()]
    guide = Guidance((4, 4), (2, 3), "relative")
    guide.measure([maps[:1] for maps in student], teacher)
    unit = sum(np.mean(bilinear(maps.double().numpy(), side) ** 2) for maps, side in zip(teacher, (6, 8)))
    assert guide.scale.item() == pytest.approx(unit, rel=1e-5)
    mean = Guidance((4, 4), (2, 3))
    mean.load_state_dict(guide.state_dict() | {"scale": torch.ones(())})
    assert guide(student, teacher).item() == pytest.approx(mean(student, teacher).item() / unit, rel=1e-5)
    for project in guide.projections:
        nn.init.zeros_(project.weight), nn.init.zeros_(project.bias)
    assert guide(student, teacher).item() == pytest.approx(1, rel=1e-5)


def test_guidance_refuses_maps_that_do_not_belong_together():
    guide, maps = Guidance((8,), (4,), "relative"), torch.randn(1, 8, 2, 2)
    pytest.raises(ValueError, Guidance, (8, 8, 8), (4, 4)).match("3 guided feature maps, the teacher 2")
    pytest.raises(ValueError, Guidance, (8,), (4,), "median").match("reduction")
    pytest.raises(ValueError, guide, [], []).match("expected 1 feature maps")
    pytest.raises(ValueError, guide, [maps], [torch.randn(1, 5, 2, 2)]).match("differ in batch or channels")
    pytest.raises(ValueError, guide.measure, [maps], [torch.zeros(1, 4, 2, 2)]).match("mean square of 0.0")


def test_guidance_is_plug_and_play_for_a_torchvision_swin():
    """A Swin-T whose maps come from torchvision's own feature extraction learns to match a ResNet-56's."""
    torch.manual_seed(0)
    swin = create_feature_extractor(models.swin_t(), {f"features.{i}": f"stage {i}" for i in (1, 3, 5)})
    images, guide = torch.randn(4, 3, 64, 64), Guidance((96, 192, 384), (16, 32, 64))
    shrunk = F.interpolate(images, 32, mode="bilinear")
    _, targets = calibrate(resnet56(10), shrunk)(shrunk)
    optimizer, losses = torch.optim.AdamW([*swin.parameters(), *guide.parameters()], lr=1e-3), []
    for _ in range(6):
        features = [maps.permute(0, 3, 1, 2) for maps in swin(images).values()]  # Swin keeps channels last
        losses.append(guide(features, targets))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


# ------------------------------------------------------------------------------------- how long it guides
def test_early_guidance_falls_linearly_to_zero_over_the_first_third():
    betas = [beta_at("early", e, 300) for e in (0, 25, 50, 99, 100, 299)]
    assert betas == pytest.approx([2.5, 1.875, 1.25, 0.025, 0, 0]) and betas[3] > 0 == betas[4]
    assert beta_at("early", 30, 300, beta=1.0, guide_epochs=60) == 0.5 and beta_at("early", 0, 1) == 2.5


def test_the_other_schedules_are_0_or_beta_and_nonsense_is_refused():
    assert {beta_at("none", e, 300) for e in range(300)} == {0.0}
    assert {beta_at("constant", e, 300) for e in range(300)} == {2.5}
    assert [beta_at("constant", e, 300, 1.5, guide_epochs=100) for e in (0, 99, 100)] == [1.5, 1.5, 0.0]
    wrong = ("linear", 0), ("early", 10), ("early", -1), ("early", 0, -1.0), ("early", 0, math.nan)
    for schedule, epoch, *rest in (*wrong, ("early", 0, 2.5, 0)):
        pytest.raises(ValueError, beta_at, schedule, epoch, 10, *rest)


def test_the_adaptive_rule_is_the_published_one_case_by_case():
    """Eqs. 10-19 of ALG written out in their three cases, on noisy falling histories; L is indexed from 1."""

    def published(L, e, W):
        d = {k: (L[k] - np.mean([L[j] for j in range(1, k)])) / k for k in range(2, min(e, W) + 1)}
        d |= {k: (L[k] - L[k - W]) / W for k in range(W + 1, e + 1)}
        if e <= W:
            return sum(d.values()) / e
        if e < 2 * W:
            return np.mean([d[k] for k in range(e - W + 1, e + 1)])
        return sum(L[i] - L[i - W] for i in range(e - W + 1, e + 1)) / W**2

    rng, stops = np.random.default_rng(0), set()
    for scale, W in ((1.0, 5), (8.0, 5), (30.0, 20)):
        rule, L, goes_on = AdaptiveStop(window=W), {}, True
        while goes_on:
            e = len(L) + 1
            L[e] = scale * (math.exp(-e / 15) + 0.02 * rng.normal()) + 1
            goes_on = rule.update(L[e])
            assert goes_on == (e == 1 or published(L, e, W) < -0.02), (scale, W, e)
        stops.add(e)
    assert len(stops) == 3  # each history at its own epoch


def test_the_adaptive_rule_on_a_straight_line():
    """A loss that falls by 0.03 an epoch keeps guidance going; one that falls by 0.01 ends it at once."""
    flat, fast, slow = AdaptiveStop(), AdaptiveStop(window=1), AdaptiveStop(window=1)
    assert (flat.window, flat.threshold) == (50, -0.02) and flat.update(1.0) and not flat.update(1.0)
    assert [fast.update(10 - 0.03 * e) for e in range(100)] == [True] * 100
    assert [slow.update(10 - 0.01 * e) for e in range(3)] == [True, False, False]
    pytest.raises(ValueError, flat.update, math.nan).match("epoch 3")


# --------------------------------------------------------------------------------------------- the recipe
@pytest.mark.parametrize("epochs, warm_up", [(300, 20), (100, 7), (26, 2), (5, 1)])
def test_the_transformers_learning_rate_is_timms_cosine_at_whole_epochs(epochs, warm_up):
    """As the paper's code sets it up: the ramp replaces the first epochs of the cosine, which does not restart."""
    scheduler = pytest.importorskip("timm.scheduler", reason="timm is not installed; .ci/run installs it")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=5e-4)
    theirs = scheduler.CosineLRScheduler(optimizer, epochs, 5e-6, warmup_t=warm_up, warmup_lr_init=5e-7)
    for epoch in range(epochs):
        assert train.lr_at(epoch, epochs, 5e-4, True) == pytest.approx(theirs._get_lr(epoch)[0], rel=1e-9)


def test_the_learning_rates_of_the_recipe():
    """Written out, also between two epochs."""
    rates = [train.lr_at(epoch, 300, 5e-4, True) for epoch in (0, 10.5, 20, 150, 300)]
    ramp = 5e-7 + (5e-4 - 5e-7) * 10.5 / 20
    cosine = 5e-6 + (5e-4 - 5e-6) * (1 + math.cos(math.pi * 20 / 300)) / 2
    assert rates == pytest.approx([5e-7, ramp, cosine, 2.525e-4, 5e-6])
    cnn = [train.lr_at(epoch, 300, 0.1, False) for epoch in (0, 37.5, 150, 300)]
    assert cnn == pytest.approx([0.1, 0.05 * (1 + math.cos(math.pi / 8)), 0.05, 0], abs=1e-12)


def test_the_optimisers_are_the_recipes_and_vectors_do_not_decay():
    model, guide = deit_tiny(100), Guidance((192,) * 3, (16, 32, 64))
    optimizer = train.make_optimizer(model, guide, 5e-4)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.9, 0.999)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0]
    decayed, free = ({*map(id, group["params"])} for group in optimizer.param_groups)
    named = {name: id(p) for network in (model, guide) for name, p in network.named_parameters()}
    vectors = [name for name in named if name.endswith("bias") or "norm" in name]
    assert free == {named[name] for name in (*vectors, "cls_token", "pos_embed")}
    assert decayed == {*named.values()} - free
    optimizer = train.make_optimizer(resnet56(100), None, 0.1)
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["nesterov"]
    assert [(g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.9, 5e-4), (0.9, 0)]


def test_the_defaults_for_cifar100_are_the_reference_recipe():
    args = train.parse(["--dataset=cifar100"])
    assert (args.model, args.image_size, args.patch_size, args.augment) == ("deit_tiny", 224, 16, "strong")
    assert (args.epochs, args.batch_size, args.lr, args.classes) == (300, 128, 5e-4, None)
    assert (args.schedule, args.beta, args.reduction, args.teacher) == ("early", 2.5, "mean", "resnet56")
    assert args.out == "runs/cifar100-deit_tiny-early-seed0"
    for model, size in (("resnet56", 32), ("resnet18", 224)):
        args = train.parse(["--dataset", "cifar100", "--model", model])
        assert (args.epochs, args.batch_size, args.lr, args.image_size) == (300, 128, 0.1, size)
        assert args.augment == "strong" and args.out == f"runs/cifar100-{model}-seed0"


def test_a_recipe_is_a_set_of_defaults_a_given_option_wins_and_beta_goes_with_the_form_of_the_loss():
    small = {key: value for key, value in train.RECIPES["small"].items() if not key.startswith("cnn_")}
    assert vars(train.parse(["--recipe", "small"])).items() >= small.items()
    given = vars(train.parse(["--recipe=small", "--lr=0.5", "--classes=3"])).items()
    assert given >= (small | dict(lr=0.5, classes=3)).items()
    assert [train.parse([f"--reduction={form}"]).beta for form in ("relative", "sum")] == [90, 2.5]
    other = vars(train.parse(["--recipe=small", "--dataset=folder"])).items()  # 20 classes were CIFAR-100's
    assert other >= (small | dict(dataset="folder", classes=None)).items()


# -------------------------------------------------------------------------------------- one training step
def small_epoch(beta, make_optimizer):
    """What train_epoch takes, always the same: two batches; the learning rate halves after each."""
    torch.manual_seed(0)
    weights = calibrate(resnet8(10), torch.randn(16, 3, 32, 32)).state_dict()
    checkpoint = dict(args=dict(model="resnet8", image_size=32), data=dict(num_classes=10), model=weights)
    epoch = SimpleNamespace(teacher=load_teacher(checkpoint), beta=beta)
    epoch.student = deit_mini(10, 64, 16, drop_path=0.1).eval()  # as the epoch before leaves it
    epoch.guidance = Guidance((96, 96, 96), (16, 32, 64))
    epoch.optimizer = make_optimizer(epoch.student, epoch.guidance, 1e-3)
    epoch.scheduler = LambdaLR(epoch.optimizer, functools.partial(pow, 0.5))
    x = torch.from_numpy(few_glyphs()[0][:40]).permute(0, 3, 1, 2).contiguous()
    epoch.batches = batches(x, torch.arange(40) % 10, 16, 64, torch.Generator().manual_seed(0))
    epoch.precision = make_precision(torch.device("cpu"), torch.float32)
    return epoch


def weights(epoch):
    return to_vector([*epoch.student.parameters(), *epoch.guidance.parameters()])


def plain_loop(epoch, loss_of):
    """The same epoch written out."""
    epoch.student.train()
    for step, (images, labels) in enumerate(epoch.batches):
        for group in epoch.optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5**step
        epoch.optimizer.zero_grad()
        loss_of(images, labels).backward()
        epoch.optimizer.step()


def test_the_loaded_teacher_is_in_eval_mode_and_takes_no_gradient():
    """BatchNorm uses what it has learnt. In the paper's code the student's .train() reaches the teacher too."""
    teacher = small_epoch(2.5, train.make_optimizer).teacher  # as load_teacher gave it, never called
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_with_beta_0_an_epoch_is_plain_cross_entropy_bit_for_bit_and_no_teacher_is_called():
    def adamw(student, guidance, lr):  # the recipe's, without our code
        named = dict(student.named_parameters())
        vectors = [name for name, p in named.items() if p.ndim == 1]
        free = dict(params=[named.pop(name) for name in (*vectors, "cls_token", "pos_embed")], weight_decay=0)
        return torch.optim.AdamW([dict(params=named.values()), free], lr, weight_decay=0.05, fused=True)

    ours = small_epoch(0.0, train.make_optimizer)
    ours.teacher.forward = ours.guidance.forward = Mock(side_effect=AssertionError)
    _, loss_guidance, _ = train.train_epoch(**vars(ours))
    plain = small_epoch(0.0, adamw)
    plain_loop(plain, lambda images, labels: F.cross_entropy(plain.student(images)[0], labels))
    assert loss_guidance == 0 and torch.equal(weights(ours), weights(plain))


def test_a_guided_epoch_descends_the_sum_of_cross_entropy_and_beta_times_guidance():
    def sgd(student, guidance, lr):  # linear in the gradient: no division by Adam blurs the comparison
        return torch.optim.SGD([*student.parameters(), *guidance.parameters()], lr)

    def loss_of(images, labels):
        logits, features = plain.student(images)
        loss = F.cross_entropy(logits, labels)
        _, targets = plain.teacher(F.interpolate(images, (32, 32), mode="bilinear", align_corners=False))
        for project, maps, target in zip(plain.guidance.projections, features, targets):
            maps = F.interpolate(project(maps), target.shape[2:], mode="bilinear", align_corners=False)
            loss = loss + 2.5 * F.mse_loss(maps, target)
        return loss

    ours = small_epoch(2.5, sgd)
    loss_cls, loss_guidance, accuracy = train.train_epoch(**vars(ours))
    plain = small_epoch(2.5, sgd)
    plain_loop(plain, loss_of)
    fresh = small_epoch(2.5, sgd)
    assert (weights(ours) - weights(plain)).norm() < 1e-3 * (weights(plain) - weights(fresh)).norm()
    assert loss_cls > 0 and loss_guidance > 0 and 0 <= accuracy <= 100
    assert_close(ours.teacher.state_dict(), fresh.teacher.state_dict(), rtol=0, atol=0)  # BatchNorm too


def test_a_guided_step_enters_at_most_5_files_and_15_functions_of_ours():
    profile = cProfile.Profile()
    profile.runcall(train.train_epoch, **vars(small_epoch(2.5, train.make_optimizer)))
    codes = [entry.code for entry in profile.getstats() if not isinstance(entry.code, str)]
    entered = {(Path(code.co_filename), code.co_qualname) for code in codes}
    entered = {(file.name, name) for file, name in entered if file.parent in (HERE, HERE / "plumbing")}
    assert ("augment.py", "recolour") in entered and ("guidance.py", "Guidance.forward") in entered
    assert len({file for file, _ in entered}) <= 5 and len(entered) <= 15, sorted(entered)


# -------------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The main command cut down: few images, 3 epochs. All runs share the folder and the teacher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "glyphs", few_glyphs)
        patch.setitem(train.RECIPES["glyphs"], "epochs", 3)
        patch.chdir(tmp_path_factory.mktemp("small"))
        yield


def run(*words):
    """`python train.py ...` on the CPU. Returns what its checkpoint holds."""
    args = train.parse(["--device=cpu", *" ".join(words).split()])
    train.run(args)
    return runs.load_checkpoint(f"{args.out}/last.pt")


def test_one_command_trains_the_teacher_then_the_guided_student_and_tells_its_story(folder, capsys):
    student, told = run(), capsys.readouterr().out
    for words in (
        "no trained teacher in runs/glyphs-resnet8-seed0: training resnet8 for 5 epochs",
        "beta falls linearly from 90 to 0 in epochs 0 to 0 of 3; from epoch 1 on the teacher is not called",
        "result: deit_mini on glyphs, schedule early, seed 0: val_acc",
        *("expected time", "parameters", "images/s", "left", "float32 (the default on this device)"),
    ):
        assert words in told, words
    origin, history = student["origin"], student["history"]
    assert origin.keys() >= {"command", "args", "torch", "hardware", "seed", "git_commit", "threads"}
    assert [(line["epoch"], line["beta"]) for line in history] == [(0, 90), (1, 0), (2, 0)]
    assert history[0]["loss_guidance"] > 0 and history[1]["loss_guidance"] is None
    keys = {"loss_cls", "train_acc", "val_acc", "lr", "seconds", "images_per_second"}
    assert all(line.keys() >= keys for line in history)
    # the learning rate in the log is that of an epoch's last step: 320 images make ten for the teacher
    teacher = runs.load_checkpoint("runs/glyphs-resnet8-seed0/last.pt")
    rates = [0.05 * (1 + math.cos(math.pi * (epoch + 9 / 10) / 5)) for epoch in range(5)]
    assert [line["lr"] for line in teacher["history"]] == pytest.approx(rates)
    # both accuracies, by code of our own: the teacher's on the student's test tensors, shrunk to 32 px
    images, labels, accuracies = prepare(data.load("glyphs").x_test, 64), data.load("glyphs").y_test, []
    shrunk = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    for state, network, seen in ((teacher, resnet8(10), shrunk), (student, deit_mini(10, 64, 16), images)):
        network.load_state_dict(state["model"])
        accuracies.append(100 * (network.eval()(seen)[0].argmax(dim=1) == labels).float().mean().item())
    assert f"it gets {accuracies[0]:.2f}% of the test images right, as it sees them while it guides" in told
    assert history[-1]["val_acc"] == pytest.approx(accuracies[1])


@pytest.mark.parametrize("warm_up, guided", [(1, 2), (2, 3)])
def test_an_adaptive_relative_run_stops_after_the_warm_up(folder, monkeypatch, capsys, warm_up, guided):
    """The rule says stop after epoch 1, counted from 0, but is ignored while the learning rate rises. Its
    threshold, for a loss that starts near 39, is divided. The scale is measured once, printed and kept."""
    measured, rules, measure = [], [], train.measure_scale
    monkeypatch.setattr(train, "measure_scale", lambda *args: measured.append(measure(*args)))
    monkeypatch.setattr(train, "warm_up_epochs", lambda epochs: warm_up)
    monkeypatch.setattr(AdaptiveStop, "update", lambda rule, loss: rules.append(rule) or len(rules) < 2)
    words = f"--schedule adaptive --reduction relative --beta 8 --epochs 4 --out adaptive{warm_up}"
    state, told = run(words), capsys.readouterr().out
    history, unit = state["history"], state["projections"]["scale"].item()
    assert [line["beta"] for line in history] == [8] * guided + [0] * (4 - guided)
    assert {rule.threshold for rule in rules} == {-0.02 / 39}
    assert f"unit of the guidance loss: {unit:.4g}" in told and unit == state["origin"]["guidance_scale"] > 0
    assert f"beta*L {8 * history[1]['loss_guidance']:6.3f}" in told and 0 < history[1]["loss_guidance"] < 1.5
    torch.save(state | dict(history=history[:3]), f"adaptive{warm_up}/last.pt")  # as if stopped after epoch 2
    assert run(words, "--resume")["projections"]["scale"].item() == unit and len(measured) == 1


def test_rows_of_one_seed_share_first_weights_teacher_and_first_batch(folder, monkeypatch):
    """So that they compare in pairs, even across forms of the loss: sum = C * mean a layer, C = 16, 32, 64."""
    rows = []

    def noted(student, teacher, guidance, optimizer, scheduler, batches, beta, precision):
        images, labels = next(iter(batches))
        loss = guidance(student(images)[1], teacher(images)[1]).item() if teacher else None
        shared = dict(weights=to_vector(student.parameters()), images=images, labels=labels)
        rows.append(SimpleNamespace(shared=shared, loss=loss))
        return 1.0, 1.0, 1.0

    for seed in (0, 1):
        train.trained_teacher(train.parse(["--device=cpu", f"--seed={seed}"]))
    monkeypatch.setattr(train, "train_epoch", noted)
    for words in ("early", "none", "constant", "early --reduction sum", "early --seed 1"):
        origin = run("--epochs 1 --reduction mean --out", f"row{len(rows)}", "--schedule", words)["origin"]
        rows[-1].teacher = [origin.get(f"teacher_{key}") for key in ("crc", "model", "epochs")]
    early, none, constant, total, other = rows
    for what, tensor in early.shared.items():
        assert all(torch.equal(tensor, row.shared[what]) for row in (none, constant, total))
        assert not torch.equal(tensor, other.shared[what])
    assert early.teacher[0] != other.teacher[0] and early.teacher[1:] == other.teacher[1:] == ["resnet8", 5]
    assert early.teacher == constant.teacher == total.teacher
    assert early.loss == constant.loss and 16 * early.loss < total.loss < 64 * early.loss
