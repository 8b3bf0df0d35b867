"""Locality guidance: the loss by which a small CNN guides a transformer, and schedules of how long it does.

The two equations, the second as the paper has it (`Guidance` has three forms of it):
    L = L_cls + beta * L_guidance                                    (Li et al., ECCV 2022, arXiv 2207.10026)
    L_guidance = sum_i 1 / (H_i W_i) * || F_vt^i - F_cnn^i ||_F^2

F_vt^i is the student's feature map of guided layer i, projected to the teacher's C_i channels by a learned
1x1 convolution; F_cnn^i is the frozen teacher's. Both are (B, C_i, H_i, W_i), resized bilinearly to the
larger of the two grids; the loss is averaged over the batch. With early guidance beta falls to 0; from then
on neither the teacher nor this module is called.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# Default beta by form of the loss: 2.5 is the paper's, tuned with the mean and ResNet-56; 90 is about as strong
BETA = {"mean": 2.5, "sum": 2.5, "relative": 90.0}


class Guidance(nn.Module):
    """The projections and the loss, for the feature maps of any two networks.

    Args:
        student_channels, teacher_channels: channels of the guided feature maps, in the order of the maps.
        reduction: how channels are combined. "sum" is the formula above, "mean" what the paper's public code
            computes: in each layer, sum = C_i * mean. beta = 2.5 was tuned with the mean; with the sum the
            same beta guides 16 to 64 times harder and favours the deep layers. So "mean" is the default.
            "relative" divides the mean by `scale`, which `measure` sets: the loss is 1 for a student whose
            maps are zero, 0 for a perfect copy. The mean is in units of the teacher's features squared, and
            small teachers have small features; in this form one beta guides equally hard with any teacher.
    """

    def __init__(self, student_channels, teacher_channels, reduction="mean"):
        super().__init__()
        if len(student_channels) != len(teacher_channels) or not student_channels:
            raise ValueError(
                f"the student has {len(student_channels)} guided feature maps, the teacher "
                f"{len(teacher_channels)}: guide as many blocks as the teacher has stages"
            )
        if reduction not in ("mean", "sum", "relative"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'relative', got {reduction!r}")
        self.reduction = reduction
        self.register_buffer("scale", torch.ones(()))  # saved with the projections; 1 unless "relative"
        channels = zip(student_channels, teacher_channels)
        self.projections = nn.ModuleList(nn.Conv2d(student, teacher, 1) for student, teacher in channels)

    @torch.no_grad()
    def measure(self, student_features, teacher_features):
        """Sets `scale` for "relative": the teacher's mean squares on the grids compared, summed over layers.

        Args: maps as in `forward`; only the sizes of the student's are used, so one image's will do.
        """
        scale = 0.0
        for student, teacher in zip(student_features, teacher_features):
            size = torch.Size(map(max, student.shape[2:], teacher.shape[2:]))
            scale = scale + F.interpolate(teacher.float(), size, mode="bilinear").square().mean()
        if not 0 < scale < math.inf:
            raise ValueError(f"the teacher's feature maps have a mean square of {float(scale)}")
        self.scale.copy_(scale)

    def forward(self, student_features, teacher_features):
        """Lists of (B, C, H, W) maps -> the scalar L_guidance, in float32 whatever their precision."""
        if not len(student_features) == len(teacher_features) == len(self.projections):
            raise ValueError(
                f"expected {len(self.projections)} feature maps from each network, got "
                f"{len(student_features)} (student) and {len(teacher_features)} (teacher)"
            )
        loss = 0.0
        for project, student, teacher in zip(self.projections, student_features, teacher_features):
            # (B, D, h, w) -> (B, C_i, h, w): a 1x1 convolution and a resize commute; this order is cheaper.
            # Not project(student): the maps may be in bfloat16, the projections are in float32
            weight, bias = project.weight.to(student.dtype), project.bias.to(student.dtype)
            student = F.conv2d(student, weight, bias).float()
            teacher = teacher.detach().float()
            if student.shape[:2] != teacher.shape[:2]:
                raise ValueError(
                    f"the projected student map {tuple(student.shape)} and the teacher map "
                    f"{tuple(teacher.shape)} differ in batch or channels"
                )
            size = torch.Size(map(max, student.shape[2:], teacher.shape[2:]))  # the larger grid
            if student.shape[2:] != size:
                student = F.interpolate(student, size, mode="bilinear")  # (B, C_i, H_i, W_i)
            if teacher.shape[2:] != size:
                teacher = F.interpolate(teacher, size, mode="bilinear")
            mean = F.mse_loss(student, teacher)
            loss = loss + (mean * teacher.shape[1] if self.reduction == "sum" else mean)
        return loss / self.scale  # which is 1 unless "relative"


def beta_at(schedule, epoch, epochs, beta=2.5, guide_epochs=None):
    """Weight of the guidance loss in an epoch.

    Args:
        schedule: "none": 0. "constant": beta. "early": beta * (1 - epoch / guide_epochs), not below 0.
            "adaptive": beta; `AdaptiveStop` decides when guidance ends.
        epoch, epochs: the epoch, counted from 0, and how many there are.
        beta: the weight at the start.
        guide_epochs: first epoch without guidance. Default: a third of the epochs for "early" (100 of 300 in
            the research summary), all of them otherwise.

    Raises:
        ValueError: unknown schedule, epoch outside the run, negative or infinite beta, guide_epochs below 1.
    """
    if schedule not in ("none", "constant", "early", "adaptive"):
        raise ValueError(f"unknown schedule {schedule!r}: choose none, constant, early or adaptive")
    if not 0 <= epoch < epochs:
        raise ValueError(f"epoch {epoch} is outside 0 to {epochs - 1}")
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be finite and at least 0, got {beta}")
    if guide_epochs is None:
        guide_epochs = max(1, round(epochs / 3)) if schedule == "early" else epochs
    if guide_epochs < 1:
        raise ValueError(f"guide_epochs must be at least 1, got {guide_epochs}; or choose schedule none")
    if schedule == "none" or epoch >= guide_epochs:
        return 0.0
    return beta * (1 - epoch / guide_epochs) if schedule == "early" else float(beta)


class AdaptiveStop:
    """Ends guidance once its loss has almost stopped falling: the rule of Adaptive Locality Guidance (IEEE
    TNNLS 2025, doi 10.1109/TNNLS.2024.3515076).

    L(e) is the mean guidance loss of epoch e = 1, 2, ... (mean form, without beta), W the window. The slope

        d(1) = 0;   d(e) = (L(e) - mean(L(1 .. e-1))) / e  for e <= W;   d(e) = (L(e) - L(e-W)) / W  for e > W

    is averaged over the last W epochs (all of them while e <= W) to give D(e); guidance continues while
    D(e) < threshold. The default is for the scale of the mean form, which starts near 39 with the paper's
    teacher; for "relative", train.py divides it by 39. `history` is the only state.
    """

    def __init__(self, window=50, threshold=-0.02):
        if window < 1:
            raise ValueError(f"window must be at least 1 epoch, got {window}")
        self.window, self.threshold = window, threshold
        self.history = []

    def update(self, epoch_loss):
        """Takes L(e) of the epoch just ended; returns whether guidance continues (at e = 1, always)."""
        if not math.isfinite(epoch_loss):
            raise ValueError(f"the guidance loss of epoch {len(self.history) + 1} is {epoch_loss}")
        self.history.append(float(epoch_loss))
        L, W, e = self.history, self.window, len(self.history)  # L[i - 1] is L(i)
        d = [0.0]
        for i in range(2, e + 1):
            d.append((L[i - 1] - L[i - 1 - W]) / W if i > W else (L[i - 1] - sum(L[: i - 1]) / (i - 1)) / i)
        return e == 1 or sum(d[-W:]) / min(e, W) < self.threshold
