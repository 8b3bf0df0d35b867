"""Times what training costs, with the very code that trains (`train.train_epoch`), on random images.

Usage:
    python bench.py                        ladder, guidance, parts, networks; on a GPU if there is one
    python bench.py --amp --compile        one configuration
    python bench.py --rows inputs models   beside timm, torchvision and Pillow in workers (pip install timm)

An epoch is augmentation, forward, backward and update of all its batches, synchronised at both ends. Shown is
the median of the repeats, with the fastest and the slowest. A warm-up before them is in no other figure; what
it takes longer than the same steps do later is shown as set-up: mostly compilation.
"""

import argparse
import json
import shlex
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode

from augment import batches
from data import Data
from guidance import Guidance
from model import TRANSFORMERS
from plumbing.devices import make_precision, pick_compile, pick_device, to_device
from plumbing.files import InputError, write_whole
from plumbing.options import Options, command_line
from plumbing.runs import build, origin_of
from train import evaluate, make_optimizer, train_epoch

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s in bfloat16, dense, from the data sheets


class Row(NamedTuple):
    """A configuration of the training step."""

    name: str
    precision: str = "fp32"  # fp32, tf32 or bf16
    fused: bool = True  # the optimiser
    mode: str | None = None  # of torch.compile; None: eager
    beta: float = 0.0  # guided by ResNet-56 if above 0


def ladder(device):
    """One change per row, each on top of the rows before it."""
    gpu = device.type == "cuda"
    return [
        Row("float32, eager", "fp32", False),
        *[Row("+ TF32", "tf32", False)] * gpu,
        Row("+ bfloat16 autocast", "bf16", False),
        Row("+ fused optimiser", "bf16"),
        Row("+ torch.compile", "bf16", mode="default"),
        *[Row("+ CUDA graphs", "bf16", mode="reduce-overhead")] * gpu,
    ]


def timed(works, images, args, device, warm_up=1):
    """Times functions in turns, `args.repeats` times after `warm_up` times that do not count.

    Args:
        works: name -> a function of no arguments that works through so many `images`.

    Yields:
        A line for each: seconds (median), fastest, slowest, images_per_second, ms_per_step.
    """
    times = {name: [] for name in works}
    for _ in range(warm_up + args.repeats):
        for name, work in works.items():
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    for name, taken in times.items():
        taken = taken[warm_up:]
        speed = images / median(taken)
        yield dict(
            name=name,
            seconds=median(taken),
            fastest=min(taken),
            slowest=max(taken),
            images_per_second=speed,
            ms_per_step=1000 * args.batch_size / speed,
        )


def synchronize(device):
    """Waits until the device has done all it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def flops(name, image_size, patch_size, backward=True):
    """Floating-point operations for one image, by torch's count; a multiplication and an addition are two."""
    network = build(name, 100, image_size, patch_size).to("meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits, _ = network(torch.zeros(2, 3, image_size, image_size, device="meta"))
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / 2


def peak(device, args):
    """FLOP/s to compare with, and where they come from."""
    for name, rate in PEAK.items():
        if device.type == "cuda" and name in torch.cuda.get_device_name(device):
            return rate, f"{rate / 1e12:.0f} TFLOP/s, the data sheet's for bfloat16"
    a = torch.randn(2048, 2048, device=device)
    works = {"float32": lambda: a @ a, "bfloat16": lambda b=a.bfloat16(): b @ b}
    rate = max(2 * 2048**3 / line["fastest"] for line in timed(works, 1, args, device))
    return rate, f"{rate / 1e12:.2f} TFLOP/s, the fastest matrix product of 2048 x 2048 here and now"


def train_row(row, args, data, device, rate):
    """Trains args.model for some epochs as `row` says; its line."""
    torch.manual_seed(0)
    torch.compiler.reset()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = row.precision == "tf32"
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model = to_device(build(args.model, 100, args.image_size, args.patch_size), device)
    teacher = (
        to_device(build("resnet56", 100, 32, 0), device).eval().requires_grad_(False) if row.beta else None
    )
    guidance = Guidance(model.feature_channels, (16, 32, 64)).to(device) if row.beta else None
    optimizer, generator = make_optimizer(model, guidance, 5e-4, row.fused), torch.Generator().manual_seed(0)
    precision = make_precision(device, torch.bfloat16 if row.precision == "bf16" else torch.float32)
    networks = [
        torch.compile(network, mode=row.mode) if row.mode and network else network
        for network in (model, teacher, guidance)
    ]
    scheduler = LambdaLR(optimizer, lambda step: 1.0)

    def epoch(part=data):
        images = batches(part.x_train, part.y_train, args.batch_size, args.image_size, generator)
        train_epoch(*networks, optimizer, scheduler, images, row.beta, precision)

    start, few = time.perf_counter(), 12 * args.batch_size
    epoch(data._replace(x_train=data.x_train[:few], y_train=data.y_train[:few]))
    synchronize(device)
    warm_up = time.perf_counter() - start
    (line,) = timed({row.name: epoch}, args.images, args, device, warm_up=0)
    warm_up -= line["seconds"] * min(few, args.images) / args.images
    per_image = flops(args.model, args.image_size, args.patch_size)
    per_image += flops("resnet56", 32, 0, backward=False) if row.beta else 0
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    speed = line["images_per_second"]
    return line | dict(
        hours_for_300_epochs=300 * 50_000 / speed / 3600,
        utilisation=per_image * speed / rate,
        memory_mb=memory,
        setup_seconds=max(0, warm_up),
    )


def parts(args, data, device, precision):
    """What surrounds the networks' step, each alone."""
    teacher = to_device(build("resnet56", 100, 32, 0), device).eval()
    model = to_device(build(args.model, 100, args.image_size, args.patch_size), device)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)

    @torch.no_grad()
    def teach():
        for _ in range(args.images // args.batch_size):
            with precision.autocast:
                teacher(F.interpolate(images, 32, mode="bilinear"))

    def test():
        evaluate(model, data.x_train, data.y_train, args.image_size, precision)

    works = {
        "augmentation alone": ours(data, args.image_size, args),
        "teacher alone": teach,
        "evaluation": test,
    }
    return timed(works, args.images, args, device)


def ours(data, size, args):
    """Our input pipeline for an epoch, as a function of no arguments."""

    def work(generator=torch.Generator()):
        for _ in batches(data.x_train, data.y_train, args.batch_size, size, generator):
            pass

    return work


def usual_batches(data, size, args):
    """An epoch of the usual input pipeline: Pillow images, timm's transforms of the same recipe, workers."""
    import timm.data

    pictures = map(Image.fromarray, data.x_train.permute(0, 2, 3, 1).cpu().numpy())
    # timm's own posterize stops with an error in Pillow 12 and later where no bit is left
    timm.data.auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    transform = timm.data.create_transform(
        size,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        color_jitter=None,
        re_prob=0.25,
        re_mode="pixel",
    )

    def transformed(pairs):
        return default_collate([(transform(picture), label) for picture, label in pairs])

    return DataLoader(
        list(zip(pictures, data.y_train.tolist())),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=True,
        collate_fn=transformed,
        multiprocessing_context="fork",
        pin_memory=data.x_train.is_cuda,
    )


def posterize(image, bits, **_):
    """As timm has it, save that a bit is left."""
    return ImageOps.posterize(image, max(1, bits))


def inputs(args, data, device):
    """The usual input pipeline and ours, in turns."""
    for size in dict.fromkeys((args.image_size, 32)):
        usual, title = usual_batches(data, size, args), f"input at {size} px: "
        works = {
            title + f"timm and Pillow, {args.workers} workers": lambda usual=usual: [*map(len, usual)],
            title + "ours": ours(data, size, args),
        }
        yield from timed(works, args.images, args, device)


def models(args, data, device, precision):
    """timm's DeiT-tiny, torchvision's and ours in the same step, in turns; then timm's in the usual epoch."""
    import timm

    timms = timm.create_model("deit_tiny_patch16_224", num_classes=100, drop_path_rate=0.1).to(device)
    torchvisions = torchvision.models.VisionTransformer(224, 16, 12, 3, 192, 768, num_classes=100).to(device)
    deit_tiny = to_device(build("deit_tiny", 100, 224, 16), device)

    def training(model, loader, fused=True):
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)

        def work():
            for images, labels in loader:
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                with precision.autocast:
                    logits = model(images)
                    loss = F.cross_entropy(logits[0] if model is deit_tiny else logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return work

    one = [(torch.randn(args.batch_size, 3, 224, 224), data.y_train[: args.batch_size])]
    works = {
        "step: timm": training(timms, one),
        "step: torchvision": training(torchvisions, one),
        "step: ours": training(deit_tiny, one),
    }
    yield from timed(works, args.batch_size, args, device)
    usual = training(timms, usual_batches(data, 224, args), fused=False)
    yield from timed({f"epoch: timm and Pillow, {args.workers} workers": usual}, args.images, args, device)


COLUMNS = {
    "images/s": ("images_per_second",),
    "ms a step": ("ms_per_step", ".1f"),
    "s an epoch": ("seconds", ".2f"),
    "fastest": ("fastest", ".2f"),
    "slowest": ("slowest", ".2f"),
    "of full rate": ("utilisation", ".1%"),
    "hours for 300 epochs of 50,000": ("hours_for_300_epochs", ".2f"),
    "MB": ("memory_mb",),
    "set-up, s": ("setup_seconds",),
}


def cell(line, key, form=",.0f"):
    """A figure of a line as text; `-` where the line has none."""
    return "-" if line.get(key) is None else format(line[key], form)


def show(line):
    """Prints a line as a row of the table."""
    cells = [cell(line, *column) for column in COLUMNS.values()]
    print(f"| {' | '.join([line['name'], *cells])} |", flush=True)


def parse(argv=None):
    """The options; those that depend on the device get their values in `main`."""
    parser = Options(prog="bench.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add(
        "--rows",
        nargs="+",
        choices=["ladder", "guidance", "parts", "networks", "one", "inputs", "models"],
        help="default: the first four; with --amp or --compile: one",
    )
    add("--model", choices=TRANSFORMERS, default="deit_tiny")
    add("--image-size", type=int, default=224)
    add("--patch-size", type=int, default=16)
    add("--batch-size", type=int, help="default: 128; on a CPU 16")
    add("--images", type=int, help="in an epoch (default: 50000; on a CPU four batches)")
    add("--repeats", type=int, default=3)
    add("--workers", type=int, default=2, help="processes of the usual input pipeline")
    add("--device", default="auto")
    add("--amp", action=on_off, help="bfloat16 autocast; not in the ladder")
    add("--compile", action=on_off, help="torch.compile; not in the ladder")
    add("--json", metavar="FILE", help="write the figures there, too, after each row")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "bench.py", *(sys.argv[1:] if argv is None else argv)])
    least = dict(image_size=32, patch_size=1, batch_size=2, images=2, repeats=1, workers=1)
    for key, value in least.items():
        if getattr(args, key) is not None and getattr(args, key) < value:
            parser.error(f"--{key.replace('_', '-')} must be at least {value}")
    if {"inputs", "models"} & set(args.rows or []) and not find_spec("timm"):
        parser.error("inputs and models are compared with timm's: pip install timm")
    toggled = args.amp is not None or args.compile is not None
    args.rows = args.rows or (["one"] if toggled else ["ladder", "guidance", "parts", "networks"])
    build(args.model, 2, args.image_size, args.patch_size)  # refuses sizes that do not fit
    return args


def lines(args, data, device, precision, compiled, rate):
    """Measures the rows asked for, one after the other."""
    base = Row(
        "training",
        "bf16" if precision.autocast.fast_dtype == torch.bfloat16 else "fp32",
        mode="default" if compiled else None,
    )
    if "ladder" in args.rows:
        for row in ladder(device):
            yield train_row(row, args, data, device, rate)
    if "one" in args.rows:
        yield train_row(base, args, data, device, rate)
    if "guidance" in args.rows:
        hours = []
        for name, beta in (("none", 0.0), ("constant", 2.5)):
            line = train_row(base._replace(name=f"guidance: {name}", beta=beta), args, data, device, rate)
            hours.append(line["hours_for_300_epochs"])
            yield line
        early = (2 * hours[0] + hours[1]) / 3  # guided for a third of the epochs
        yield dict(name="guidance: early, from the two above", hours_for_300_epochs=early)
    if "parts" in args.rows:
        yield from parts(args, data, device, precision)
    if "networks" in args.rows:
        for model, size in (("resnet18", args.image_size), ("resnet56", 32)):
            theirs = argparse.Namespace(**vars(args) | dict(model=model, image_size=size))
            yield train_row(base._replace(name=f"{model} at {size} px"), theirs, data, device, rate)
    if "inputs" in args.rows:
        yield from inputs(args, data, device)
    if "models" in args.rows:
        yield from models(args, data, device, precision)


def main():
    """Shows the table row by row, and writes the --json file anew after each."""
    args = parse()
    if args.json and Path(args.json).exists():
        raise InputError(f"{args.json} exists already: choose another name")
    device, precision, in_words = pick_device(args.device, args.amp)
    cpu = device.type == "cpu"
    args.seed, args.batch_size = 0, args.batch_size or (16 if cpu else 128)
    steps = (args.images or (4 * args.batch_size if cpu else 50_000)) // args.batch_size
    if not steps:
        raise InputError(f"--images {args.images} does not fill a batch of {args.batch_size}; choose more")
    args.images = steps * args.batch_size
    compiled, compiled_in_words = pick_compile(args.compile, device, 300 * steps)
    x = torch.randint(256, (args.images, 3, 32, 32), dtype=torch.uint8).to(device)
    y = torch.randint(100, (args.images,)).to(device)
    rate, rate_in_words = peak(device, args)
    origin = origin_of(args, device)
    print(
        f"{args.model} at {args.image_size} px, {steps} steps of {args.batch_size} images an epoch, median "
        f"of {args.repeats}\n{origin['hardware']}, torch {origin['torch']}: {in_words}; {compiled_in_words}"
        f"\nfull rate: {rate_in_words}\n\n| | {' | '.join(COLUMNS)} |\n|---|{'--:|' * len(COLUMNS)}"
    )
    table = []
    for line in lines(args, Data(x, y, x, y, 100), device, precision, compiled, rate):
        table.append(line)
        show(line)
        if args.json:
            text = json.dumps(origin | dict(full_rate=rate, full_rate_is=rate_in_words, rows=table), indent=1)
            write_whole(Path(args.json), lambda file, text=text: file.write(f"{text}\n".encode()))


if __name__ == "__main__":
    command_line(main)
