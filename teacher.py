"""ResNets: the small CNN that guides (ResNet-56 at 32 px) and the CNN to compare with (ResNet-18 at 224 px).

Both come from "Deep Residual Learning for Image Recognition" (He et al., CVPR 2016), are made of basic blocks

    y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))

and differ only in the stem and the stages. Parameters are named as in torchvision.
"""

from itertools import pairwise

from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

TEACHER_SIZE = 32  # pixels: what the small CNNs are trained on, and guide from


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, (B, C_in, H, W) -> (B, C, H / stride, W / stride)."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or in_channels != channels:  # a projection, in ResNet-56 too, as in the paper's code
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """A ResNet of basic blocks whose forward pass returns `(logits, features)`, one feature map per stage.

    Args:
        num_classes: outputs of the classifier `fc`.
        blocks: basic blocks in each stage; every stage but the first halves height and width.
        channels: channels C_i of each stage.
        small: the stem for 32 px (a 3x3 convolution), not ImageNet's (7x7 with stride 2, then max-pooling).
    """

    def __init__(self, num_classes, blocks, channels, small):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.feature_channels, width = tuple(channels), channels[0]
        side, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(3, width, side, stride, padding=side // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        for i, (stage, count) in enumerate(zip(self.stages, blocks)):
            layers = [BasicBlock(width, channels[i], stride=1 if i == 0 else 2)]
            layers += [BasicBlock(channels[i], channels[i], stride=1) for _ in range(count - 1)]
            self.add_module(stage, nn.Sequential(*layers))
            width = channels[i]
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images):
        """images (B, 3, H, W) -> logits (B, num_classes), features: a (B, C_i, H_i, W_i) per stage."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images of shape (B, 3, H, W), got {tuple(images.shape)}")
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = []
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
            features.append(x)
        return self.fc(self.avgpool(x).flatten(1)), features


def resnet56(num_classes):
    """The teacher: 861,620 parameters with 100 classes; at 32 px features (16,32,32) (32,16,16) (64,8,8)."""
    return ResNet(num_classes, (9, 9, 9), (16, 32, 64), small=True)


def resnet20(num_classes):
    """A teacher about a third as deep, for trials on a CPU; features as in ResNet-56."""
    return ResNet(num_classes, (3, 3, 3), (16, 32, 64), small=True)


def resnet8(num_classes):
    """The smallest of the family, the teacher of both recipes for a CPU; features as in ResNet-56."""
    return ResNet(num_classes, (1, 1, 1), (16, 32, 64), small=True)


def resnet18(num_classes):
    """The CNN to compare with: 11,227,812 parameters with 100 classes; at 224 px maps (64,56,56) ... (512,7,7)."""
    return ResNet(num_classes, (2, 2, 2, 2), (64, 128, 256, 512), small=False)


CNNS = {"resnet56": resnet56, "resnet20": resnet20, "resnet8": resnet8, "resnet18": resnet18}


def load_teacher(checkpoint):
    """The network of a loaded checkpoint (a dict, as train.py saves it), frozen and ready to guide.
    ValueError if it is not a small ResNet trained at 32 px."""
    name, size = checkpoint["args"]["model"], checkpoint["args"]["image_size"]
    if size != TEACHER_SIZE or name not in CNNS or name == "resnet18":
        raise ValueError(f"it is a {name} at {size} px, not a small ResNet at {TEACHER_SIZE} px")
    teacher = CNNS[name](checkpoint["data"]["num_classes"])
    teacher.load_state_dict(checkpoint["model"])
    # Frozen includes BatchNorm: it keeps the statistics that it was trained with. In the paper's code the teacher
    # is part of the student's wrapper, whose .train() puts it back into train mode.
    return folded(teacher.eval()).requires_grad_(False)


def folded(cnn):
    """The same function in fewer steps: each frozen BatchNorm is folded into the convolution defined before it."""
    for module in cnn.modules():
        for (first, convolution), (second, norm) in pairwise(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, first, fuse_conv_bn_eval(convolution, norm))
                setattr(module, second, nn.Identity().eval())
    return cnn
