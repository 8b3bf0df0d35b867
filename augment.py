"""The recipe's augmentation: a batch at once, each image with its own draws, on the training device.

The recipe is that of DeiT and the paper's code: random resized crop, flip, RandAugment rand-m9-mstd0.5-inc1 (timm's;
much stronger than torchvision's magnitude 9), random erasing. `batches` is an epoch; its steps:

    draw      all random choices of the epoch, on the CPU, from one seeded generator: the same on every
              device, and as the host knows which image gets which operation, nothing waits for the device
    resample  crop, resize and flip: each axis by itself, so two small matrix products for the whole batch
    move,     an operation that moves pixels or changes colours, at once on all images that drew it, each
    recolour  with a parameter of its own
"""

import math
from operator import itemgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

# ImageNet's, whatever the data, as in the paper's code
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# RandAugment's operations, u in [0, 1] the level and s = +-1 the sign. Those that move pixels come first.
OPERATIONS = (
    "Rotate",  # by 30 u s degrees
    "ShearX",  # by 0.3 u s
    "ShearY",  # by 0.3 u s
    "TranslateX",  # by 0.45 u s of the width
    "TranslateY",  # by 0.45 u s of the height
    "AutoContrast",  # every channel stretched to 0 .. 255
    "Equalize",  # the histogram of every channel flattened
    "Invert",  # 255 - x
    "Posterize",  # the leading 4 - int(4 u) bits kept
    "Solarize",  # inverted from 256 - int(256 u) on
    "SolarizeAdd",  # int(110 u) added below 128
    "Color",  # base + (x - base) max(0.1, 1 + 0.9 u s), base: the grey image
    "Contrast",  # the same, base: the mean grey
    "Brightness",  # the same, base: black
    "Sharpness",  # the same, base: the smoothed image
)
MOVES = OPERATIONS[:5]
FILL = tuple(round(255 * mean) for mean in MEAN)  # the colour that MOVES bring in from outside the image
# Bytes to spend on augmenting several batches at once: more memory, fewer kernel launches
AT_ONCE = {"cpu": 2**27, "cuda": 3 * 2**28, "mps": 2**28}


class Draws(NamedTuple):
    """The random numbers of n images, on the CPU. A box is (top, left, height, width)."""

    crop: torch.Tensor  # (n, 4) in pixels of the stored image
    flip: torch.Tensor  # (n,) bool
    operation: torch.Tensor  # (n, 2) the first and the second, as indices into OPERATIONS; -1: not applied
    level: torch.Tensor  # (n, 2) u
    sign: torch.Tensor  # (n, 2) s
    erase: torch.Tensor  # (n, 4) in pixels of the output; all 0: nothing is erased
    noise: torch.Tensor  # (n, 2) the corner of the box's noise, in a field of twice the size


def draw(n, stored, size, generator, strength="strong"):
    """Draws for n images of side `stored` that become `size`. "strong" is the recipe; "weak" a crop of at
    least half the area and a flip."""
    smallest, operate, erase = {"strong": (0.08, 0.5, 0.25), "weak": (0.5, 0.0, 0.0)}[strength]
    crop = draw_boxes(n, stored, smallest, 1.0, 3 / 4, generator)
    box = draw_boxes(n, size, 0.02, 1 / 3, 0.3, generator)
    chance = torch.rand(6, n, generator=generator)
    operation = torch.randint(len(OPERATIONS), (n, 2), generator=generator)
    level = (0.9 + 0.05 * torch.randn(n, 2, generator=generator)).clamp(0, 1)  # m9, mstd0.5, of 10
    return Draws(
        crop,
        chance[0] < 0.5,
        torch.where(chance[1:3].T < operate, operation, -1),
        level,
        torch.where(chance[3:5].T < 0.5, -1.0, 1.0),
        torch.where(chance[5, :, None] < erase, box, 0),
        torch.randint(size + 1, (n, 2), generator=generator),
    )


def draw_boxes(n, side, smallest, largest, ratio, generator):
    """(n, 4) boxes in a square: area uniform between two fractions of the square's, aspect log-uniform from
    `ratio` to 1 / `ratio`. As in the reference, ten tries each; if none fits (< 1e-8), the whole square."""
    tries = torch.rand(2, n, 10, generator=generator)
    area, aspect = side**2 * (smallest + (largest - smallest) * tries[0]), ratio ** (2 * tries[1] - 1)
    shapes = torch.stack(((area / aspect).sqrt(), (area * aspect).sqrt()), dim=2).round()  # (n, 10, 2)
    fits = ((shapes >= 1) & (shapes <= side)).all(dim=2)
    shape = torch.where(fits.any(dim=1)[:, None], shapes[torch.arange(n), fits.int().argmax(dim=1)], side)
    corner = (torch.rand(n, 2, generator=generator) * (side - shape + 1)).floor()
    return torch.cat((corner, shape), dim=1)


def batches(x, y, batch_size, size, generator, strength="strong", rank=0, ranks=1):
    """One epoch of training batches, shuffled and augmented; the last partial batch is dropped.

    Args:
        x, y: images uint8 (N, 3, S, S) and labels (N,), on any device.
        size: side of the augmented images, in pixels.
        generator: a torch.Generator on the CPU, the only source of randomness.
        strength: as in `draw`.
        rank, ranks: this process's number, and of how many: all draw alike, each takes its part of every batch.

    Yields:
        images float32 (batch_size / ranks, 3, size, size), labels, on the device of x and y.
    """
    used = len(x) // batch_size * batch_size
    order = torch.randperm(len(x), generator=generator)
    draws = draw(used, x.shape[-1], size, generator, strength)
    noise = send(torch.randn(3, 2 * size, 2 * size, generator=generator), x.device)
    mine = torch.arange(used).view(-1, batch_size).chunk(ranks, dim=1)[rank].flatten()
    order, draws = send(order[mine], x.device), list(map(itemgetter(mine), draws))
    batch_size //= ranks
    S = x.shape[-1]  # in `resample` an image takes its bytes, three float32 copies, weights for both axes
    each = 3 * S**2 + 4 * (3 * S**2 + 3 * S * size + 3 * size**2 + 2 * size * S)
    at_once = max(1, AT_ONCE[x.device.type] // (each * batch_size)) * batch_size
    for start in range(0, len(order), at_once):
        chosen = slice(start, start + at_once)
        rows = order[chosen]
        images = augment(x.index_select(0, rows), size, Draws(*map(itemgetter(chosen), draws)), noise)
        yield from zip(images.split(batch_size), y[rows].split(batch_size))


def send(tensor, device):
    """Copies a host tensor to the device, asynchronously on CUDA only: on Apple's GPUs a temporary tensor's
    memory may be reused before it has been read (pytorch issues 189690, 139550, 83015)."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def augment(images, size, draws, noise):
    """Applies its draws to each image: uint8 (n, 3, S, S) -> normalised float32 (n, 3, size, size).

    noise: standard normal (3, 2 size, 2 size), on the device of the images; what is erased shows a part of it.
    """
    S, device = images.shape[-1], images.device
    if images.dtype != torch.uint8 or images.shape != (len(draws.flip), 3, S, S):
        raise ValueError(
            f"expected {len(draws.flip)} uint8 images (3, S, S), got {images.dtype} {images.shape}"
        )
    mean, std = send(torch.tensor((MEAN, STD)).view(2, 3, 1, 1), device)
    x = resample(images, size, draws.crop, draws.flip)  # whole numbers 0 .. 255
    for slot in range(2):
        for i, operation in enumerate(OPERATIONS):
            chosen = (draws.operation[:, slot] == i).nonzero()[:, 0]
            if len(chosen):
                amounts = torch.stack((draws.level[chosen, slot], draws.sign[chosen, slot]))
                level, sign = send(amounts, device)[..., None, None, None]
                chosen = send(chosen, device)
                changed = x.index_select(0, chosen)  # whole images, copied faster than by x[chosen]
                if operation in MOVES:
                    changed = move(changed, operation, level * sign, enlarged=size >= 2 * S)
                else:
                    changed = recolour(changed, operation, level, sign)
                x.index_copy_(0, chosen, changed)
    torch.addcmul(-mean / std, x, 1 / (255 * std), out=x)
    if device.type != "cpu":
        erase(x, draws.erase.int(), draws.noise, noise)
    else:  # one by one is faster here
        for i, box in enumerate(torch.cat((draws.erase, draws.noise), dim=1).int().tolist()):
            top, left, height, width, down, right = box
            if height:
                fresh = noise[:, down : down + height, right : right + width]
                x[i, :, top : top + height, left : left + width] = fresh
    return x


def erase(x, boxes, corners, noise):
    """Fills the box (n, 4) of each image (n, 3, S, S), in place, with the noise from its corner (n, 2) on.
    All images at once: launching a kernel for each would take a GPU's host too long."""
    chosen, S = boxes[:, 2].nonzero()[:, 0], x.shape[-1]
    if not len(chosen):
        return
    start, length = boxes[chosen, :, None].chunk(2, dim=1)  # (e, 2, 1) of e images
    offset = torch.arange(S) - start  # (e, 2, S) from the box's corner
    inside = send((offset >= 0) & (offset < length), x.device)
    places = send((corners[chosen, :, None] + offset).clamp(0, 2 * S - 1), x.device)
    (rows, columns), (in_rows, in_columns) = places.unbind(dim=1), inside.unbind(dim=1)  # (e, S) each
    fresh = noise[:, rows[:, :, None], columns[:, None]].transpose(0, 1)  # (e, 3, S, S)
    covered = (in_rows[:, :, None] & in_columns[:, None])[:, None]  # (e, 1, S, S)
    chosen = send(chosen, x.device)
    x.index_copy_(0, chosen, torch.where(covered, fresh, x.index_select(0, chosen)))


def prepare(images, size):
    """The test transform: uint8 (B, 3, S, S) -> normalised float32 (B, 3, size, size), bilinear, no crop."""
    return TF.normalize(TF.resize(images, [size, size], antialias=True) / 255, MEAN, STD)


def eval_batch_size(size):
    """How many images of this size to evaluate at once: 500 up to 224 px, then what fits the same memory."""
    return max(1, min(500, 500 * 224**2 // size**2))


def resample(images, size, crop, flip):
    """Crop, bicubic resize as Pillow's, flip: uint8 (n, 3, S, S) -> whole numbers, (n, 3, size, size).

    Each axis is resampled by itself, so for a batch it is two small matrix products: the weights of the
    stored pixels for each output pixel are Keys' cubic, a = -1/2, widened where the image shrinks.
    """
    n, _, S, _ = images.shape
    start, length = send(crop, images.device)[..., None, None].chunk(2, dim=1)  # (n, 2, 1, 1)
    flip = send(flip, images.device)[:, None]
    pixel = torch.arange(S, device=images.device) + 0.5
    pixel = torch.where((pixel > start) & (pixel < start + length), pixel, torch.inf)  # (n, 2, 1, S)
    point = (torch.arange(size, device=images.device) + 0.5).expand(n, size)
    point = torch.stack((point, torch.where(flip, point.flip(1), point)), dim=1)[..., None]  # (n, 2, size, 1)
    scale = length / size  # stored pixels per output pixel
    d = (pixel - (start + scale * point)).div_(scale.clamp(min=1)).abs_()  # (n, 2, size, S)
    d = d.clamp_(max=2)  # beyond which the weight is 0
    near, far = (1.5 * d - 2.5).mul_(d * d).add_(1), (2.5 - 0.5 * d).mul_(d).sub_(4).mul_(d).add_(2)
    weights = torch.where(d < 1, near, far)
    rows, columns = weights.div_(weights.sum(dim=3, keepdim=True)).unbind(dim=1)  # (n, size, S) each
    x = images.float().reshape(n, 3 * S, S) @ columns.mT  # (n, 3 S, size)
    x = x.round_().clamp_(0, 255).view(n, 3, S, size)
    return (rows[:, None] @ x).round_().clamp_(0, 255)  # (n, 1, size, S) @ (n, 3, S, size)


def move(x, operation, amount, enlarged):
    """Moves the pixels of x, float (b, 3, S, S), 0 .. 255, by an operation; amount = u s: (b, 1, 1, 1)."""
    S, amount = x.shape[-1], amount[:, 0]  # (b, 1, 1)
    across = (torch.arange(S, device=x.device) + 0.5) * (2 / S) - 1  # (S,) from -1 to 1
    down = across[:, None]  # (S, 1)
    from_x, from_y = across, down  # where an output pixel comes from; one of them or both become (b, ., .)
    if operation == "Rotate":
        cos, sin = (amount * math.radians(30)).cos(), (amount * math.radians(30)).sin()
        from_x, from_y = cos * across - sin * down, sin * across + cos * down  # (b, S, S)
    elif operation == "ShearX":
        from_x = across + 0.3 * amount * (down + 1)
    elif operation == "ShearY":
        from_y = down + 0.3 * amount * (across + 1)
    elif operation == "TranslateX":
        from_x = from_x + 2 * 0.45 * amount
    else:
        from_y = from_y + 2 * 0.45 * amount
    inside = ((from_x.abs() < 1) & (from_y.abs() < 1))[:, None]  # (b, 1, S, S)
    grid = torch.stack(torch.broadcast_tensors(from_x, from_y), dim=3)  # (b, S, S, 2)
    mode = "bilinear" if enlarged else "bicubic"  # as good on a smooth image, at a quarter of the cost
    x = F.grid_sample(x, grid, mode, "border", align_corners=False)
    fill = send(torch.tensor(FILL, dtype=torch.float32), x.device).view(3, 1, 1)
    return torch.where(inside, x, fill).round_().clamp_(0, 255)


def recolour(x, operation, level, sign):
    """Changes the colours of x, float (b, 3, H, W), whole numbers 0 .. 255; level, sign: (b, 1, 1, 1)."""
    if operation == "AutoContrast":
        low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
        return torch.where(high > low, ((x - low) * (255 / (high - low).clamp(min=1))).floor(), x)
    if operation == "Equalize":
        return TF.equalize(x.byte()).float()
    if operation == "Invert":
        return 255 - x
    if operation == "Posterize":
        step = 2 ** (4 + (4 * level).int())  # the value of the last bit that is kept
        return (x / step).floor() * step
    if operation == "Solarize":
        return torch.where(x < 256 - (256 * level).int(), x, 255 - x)
    if operation == "SolarizeAdd":
        return torch.where(x < 128, (x + (110 * level).int()).clamp(max=255), x)
    red, green, blue = x.unbind(dim=1)
    base = (0.299 * red + 0.587 * green + 0.114 * blue).round()[:, None]  # grey (b, 1, H, W)
    if operation == "Contrast":
        base = base.mean(dim=(2, 3), keepdim=True).round()
    elif operation == "Brightness":
        base = torch.zeros_like(base)
    elif operation == "Sharpness":
        base, middle = x.clone(), x[:, :, 1:-1, 1:-1]  # 3x3, the centre weighs 5 of 13; the border stays
        three = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
        nine = three[..., :-2] + three[..., 1:-1] + three[..., 2:]
        base[:, :, 1:-1, 1:-1] = ((nine + 4 * middle) / 13).round()
    return (base + (x - base) * (1 + 0.9 * level * sign).clamp(min=0.1)).clamp(0, 255).floor()
