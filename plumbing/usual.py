"""Training as it is usually written, for bench.py to compare with: timm's DeiT-tiny, the usual loop, and timm's
transforms of the same recipe on Pillow images in workers. Needs timm."""

import functools

import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, default_collate

from augment import send


def deit_tiny():
    """timm's, which returns logits."""
    import timm

    return timm.create_model("deit_tiny_patch16_224", num_classes=100, drop_path_rate=0.1)


def train_epoch(model, optimizer, loader, precision, device):
    """One epoch, for a model that returns logits."""
    for images, labels in loader:
        images, labels = send(images, device), send(labels, device)
        with precision.autocast:
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def posterize(image, bits, **_):
    """timm's own stops with an error in Pillow 12 and later where no bit is left."""
    return ImageOps.posterize(image, max(1, bits))


def transformed(transform, pairs):
    """A batch, from pairs of a Pillow image and its label."""
    return default_collate([(transform(picture), label) for picture, label in pairs])


def batches(data, batch_size, size, workers):
    """A loader of the recipe's batches, for any number of epochs; its workers start in any way, not by fork only."""
    import timm.data

    timm.data.auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    recipe = dict(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=None, re_prob=0.25, re_mode="pixel")
    transform = timm.data.create_transform(size, is_training=True, interpolation="bicubic", **recipe)
    pictures = map(Image.fromarray, data.x_train.permute(0, 2, 3, 1).cpu().numpy())
    return DataLoader(
        list(zip(pictures, data.y_train.tolist())),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        collate_fn=functools.partial(transformed, transform),
        pin_memory=data.x_train.is_cuda,
    )
