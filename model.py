"""DeiT-tiny, the student: a plain Vision Transformer that also returns the feature maps guidance compares.

    images (B, 3, S, S) -> patches (B, N, D) -> [cls; patches] + pos_embed -> blocks -> norm -> head(cls)

N = (S / patch_size)^2, D = width. A block is the pre-norm one of "An Image is Worth 16x16 Words" (Dosovitskiy
et al., ICLR 2021); sizes and initialisation are those of DeiT (Touvron et al., ICML 2021):

    x = x + attn(norm1(x));  x = x + mlp(norm2(x))

Parameters are named as in timm's `deit_tiny_patch16_224`: weights move between the two libraries unchanged.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)  # (B, N, 3, h, d)
        q, k, v = qkv.unbind(2)  # three of (B, N, h, d)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # three of (B, h, N, d)
        x = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d)) v: (B, h, N, d)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))  # heads side by side again: (B, N, D)


class Block(nn.Module):
    """A pre-norm block, (B, N, D) -> (B, N, D); each image skips each branch with probability `drop_path`."""

    def __init__(self, width, heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        fc1, fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """A ViT of any size whose forward pass returns `(logits, features)`.

    Args:
        num_classes: outputs of the head.
        image_size, patch_size: side of the square input, and of the patches that divide it evenly, in pixels.
        width, depth, heads: token dimension D, number of blocks, attention heads (they divide D).
        guided_blocks: the blocks (from 0) whose raw output is returned as a feature map, in increasing order.
        drop_path: rate of stochastic depth in the last block; it rises linearly from 0 in the first one.

    Raises:
        ValueError: sizes that do not divide evenly, guided blocks that do not exist, images of another shape.
    """

    def __init__(self, num_classes, image_size, patch_size, width, depth, heads, guided_blocks, drop_path):
        super().__init__()
        sizes = dict(num_classes=num_classes, image_size=image_size, patch_size=patch_size)
        for name, value in (sizes | dict(width=width, depth=depth, heads=heads)).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not a multiple of patch size {patch_size}")
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of the number of heads {heads}")
        if list(guided_blocks) != sorted(set(guided_blocks) & set(range(depth))):
            raise ValueError(f"guided blocks {tuple(guided_blocks)} must increase, from 0 to {depth - 1}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")
        self.image_size, self.grid = image_size, image_size // patch_size
        self.guided_blocks = tuple(guided_blocks)
        self.feature_channels = (width,) * len(self.guided_blocks)
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch_size, stride=patch_size)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2 + 1, width))
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(width, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)

        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.weight)  # so that the first prediction is uniform

    def forward(self, images):
        """images (B, 3, S, S) -> logits (B, num_classes), features: a (B, D, grid, grid) per guided block."""
        B, size = images.shape[0], self.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"expected images of shape (B, 3, {size}, {size}), got {tuple(images.shape)}")
        # self.patch_embed(images), as a matrix product: on an H200 a convolution took 0.7 of the 8.2 ms of a step
        proj, grid, p = self.patch_embed.proj, self.grid, size // self.grid
        x = images.view(B, 3, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)  # (B, row, column, 3, p, p)
        x = F.linear(x.reshape(B, grid**2, 3 * p * p), proj.weight.flatten(1), proj.bias)  # (B, N, D)
        x = torch.cat((self.cls_token.expand(B, -1, -1), x), dim=1) + self.pos_embed  # (B, 1 + N, D)
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.guided_blocks:  # without cls, as an image: (B, N, D) -> (B, D, grid, grid)
                features.append(x[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid)))
        return self.head(self.norm(x)[:, 0]), features


def deit_tiny(num_classes, image_size=224, patch_size=16, guided_blocks=(0, 6, 11), drop_path=0.1):
    """DeiT-tiny (5,543,716 parameters with 100 classes at 224 px): width 192, 12 blocks, 3 heads."""
    return VisionTransformer(num_classes, image_size, patch_size, 192, 12, 3, guided_blocks, drop_path)


def deit_mini(num_classes, image_size=32, patch_size=4, guided_blocks=(0, 3, 5), drop_path=0.0):
    """DeiT at half the width and depth (96, 6 blocks, 3 heads): for small images and trials on a CPU."""
    return VisionTransformer(num_classes, image_size, patch_size, 96, 6, 3, guided_blocks, drop_path)


TRANSFORMERS = {"deit_tiny": deit_tiny, "deit_mini": deit_mini}
