"""Times what training costs, with the very code that trains (`train.train_epoch`), on random images.

Usage:
    python bench.py                        --amp and --compile, guidance, CNNs; on a GPU if there is one
    python bench.py --amp --compile        one way to train
    python bench.py --rows inputs models   beside timm, torchvision and Pillow in workers (pip install timm)
    python bench.py --rows cost            what a step costs on a GPU, counted without one

An epoch is augmentation, forward, backward and update of all its batches, synchronised at both ends. Rows of one
kind are timed in turns (A B C A B C) after a warm-up; shown are the median, the fastest and the slowest. What the
warm-up takes longer than the same steps do later is shown as set-up: mostly compilation.
"""

import argparse
import functools
import json
import sys
import time
from collections import deque
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torchvision
from torch.optim.lr_scheduler import LambdaLR

from augment import batches
from data import Data
from guidance import Guidance
from model import TRANSFORMERS
from plumbing import usual
from plumbing.counting import META, Counter, as_on_gpu, count_step, flops
from plumbing.devices import Processes, make_precision, pick_compile, pick_device, synchronize, to_device
from plumbing.files import InputError, write_whole
from plumbing.options import Options, command_line
from plumbing.runs import build, origin_of, quoted
from teacher import load_teacher, resnet56
from train import make_optimizer, train_epoch

KINDS = ["ladder", "guidance", "networks", "one", "inputs", "models", "cost"]
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s in bfloat16, dense, from the data sheets
TIMED = {  # title: how a line's figures are shown
    "images/s": "{images_per_second:,.0f}",
    "ms a step": "{ms_per_step:,.1f}",
    "fastest to slowest": "{ms_fastest:,.1f} to {ms_slowest:,.1f}",
    "of full rate": "{utilisation:.1%}",
    "hours for 300 epochs of 50,000": "{hours_for_300_epochs:,.2f}",
    "MB": "{memory_mb:,.0f}",
    "set-up, s": "{setup_seconds:,.0f}",
}
COUNTED = {"launches": "{launches:,}", "bytes": "{bytes:,}", "FLOP": "{flops:,}"}


class Row(NamedTuple):
    """A way to train; None: train.py's default."""

    name: str
    model: str
    image_size: int
    amp: bool | None = None
    compile: bool | None = None
    beta: float = 0.0  # guided by ResNet-56 if above 0


def rows_of(kind, args, device):
    """The rows of a kind, one change at a time."""
    base = Row("training", args.model, args.image_size, args.amp, args.compile)
    if kind == "ladder":
        rows = [
            base._replace(name="--no-amp --no-compile", amp=False, compile=False),
            base._replace(name="--amp --no-compile", amp=True, compile=False),
            base._replace(name="--amp --compile", amp=True, compile=True),
        ]
        return rows if device.type == "cuda" else rows[::-1]  # last: what a long run does by default
    if kind == "guidance":
        return [base._replace(name="alone"), base._replace(name="guided", beta=2.5)]
    if kind == "networks":
        cnns = (("resnet18", args.image_size), ("resnet56", 32))
        return [base._replace(name=f"{cnn} at {size} px", model=cnn, image_size=size) for cnn, size in cnns]
    return [base]


def timed(works, images, args, device, warm_up=1):
    """Times `works`, {name: a function that handles `images` images}, in turns: `args.repeats` times, after
    `warm_up` times that do not count. Returns a line for each."""
    times, lines = {name: [] for name in works}, []
    for _ in range(warm_up + args.repeats):
        for name, work in works.items():
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    in_ms = 1000 * args.batch_size / images  # of a step, for a second of all images
    for name, taken in times.items():
        middle, fastest, slowest = (choose(taken[warm_up:]) for choose in (median, min, max))
        line = dict(name=name, seconds=middle, fastest=fastest, slowest=slowest)
        line |= dict(ms_per_step=in_ms * middle, ms_fastest=in_ms * fastest, ms_slowest=in_ms * slowest)
        lines.append(line | dict(images_per_second=images / middle))
    return lines


def peak(device, args):
    """FLOP/s that training is compared with, and where they come from."""
    for name, rate in PEAK.items():
        if device.type == "cuda" and name in torch.cuda.get_device_name(device):
            return rate, f"{rate / 1e12:.0f} TFLOP/s, the data sheet's for bfloat16"
    a = torch.randn(2048, 2048, device=device)
    (line,) = timed({"product": lambda: a @ a}, 1, args, device)
    rate = 2 * 2048**3 / line["fastest"]
    return rate, f"{rate / 1e12:.2f} TFLOP/s, the fastest float32 product of 2048 x 2048 matrices here"


def networks(row, patch_size, device, precision, compiled=False):
    """What a row trains, as `train_epoch` takes it: student, teacher, guidance, optimizer, scheduler."""
    torch.manual_seed(0)
    student, teacher, guidance = build(row.model, 100, row.image_size, patch_size), None, None
    student = to_device(student, device)
    if row.beta:
        about = dict(args=dict(model="resnet56", image_size=32), data=dict(num_classes=100))
        teacher = to_device(load_teacher(about | dict(model=resnet56(100).state_dict())), device)
        guidance = Guidance(student.feature_channels, teacher.feature_channels).to(device)
    optimizer = make_optimizer(student, guidance, 5e-4)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    return *Processes().wrap(student, teacher, guidance, compiled, precision), optimizer, scheduler


def training_of(row, args, data, device):
    """A row's training epoch, as a function."""
    precision = pick_device(args.device, row.amp)[1]
    compiled = pick_compile(row.compile, device, 300 * args.images // args.batch_size)[0]
    parts = networks(row, args.patch_size, device, precision, compiled)
    generator = torch.Generator().manual_seed(0)

    def epoch(count=args.images):
        x, y = data.x_train[:count], data.y_train[:count]
        images = batches(x, y, args.batch_size, row.image_size, generator)
        train_epoch(*parts, images, row.beta, precision)

    return epoch


def train_rows(rows, args, data, device, rate):
    """Trains all of the rows for some epochs, in turns."""
    torch.compiler.reset()
    epochs, about, few, memory = {}, {}, min(12 * args.batch_size, args.images), None
    for row in rows:
        epochs[row.name], start = training_of(row, args, data, device), time.perf_counter()
        epochs[row.name](few)
        warm_up = time.perf_counter() - start
        if device.type == "cuda":  # the weights of the rows before are in it
            memory = torch.cuda.max_memory_allocated(device) / 2**20
            torch.cuda.reset_peak_memory_stats(device)
        operations = flops(build(row.model, 100, row.image_size, args.patch_size), row.image_size)
        operations += flops(resnet56(100), 32, backward=False) if row.beta else 0
        about[row.name] = warm_up, memory, operations
    for line in timed(epochs, args.images, args, device, warm_up=0):
        (warm_up, memory, operations), speed = about[line["name"]], line["images_per_second"]
        line |= dict(utilisation=operations * speed / rate, hours_for_300_epochs=300 * 50_000 / speed / 3600)
        yield line | dict(memory_mb=memory, setup_seconds=max(0, warm_up - few / speed))


def inputs(args, data, device):
    """The usual input pipeline and ours, in turns."""
    for size in dict.fromkeys((args.image_size, 32)):
        theirs, generator = usual.batches(data, args.batch_size, size, args.workers), torch.Generator()
        ours = functools.partial(batches, data.x_train, data.y_train, args.batch_size, size, generator)
        works = {
            f"input at {size} px: timm and Pillow, {args.workers} workers": lambda: deque(theirs, maxlen=0),
            f"input at {size} px: ours": lambda: deque(ours(), maxlen=0),
        }
        yield from timed(works, args.images, args, device)


def models(args, data, device, rate):
    """A step of timm's DeiT-tiny, of torchvision's and of ours, in turns; then timm's in the usual epoch."""
    precision = pick_device(args.device, args.amp)[1]
    batch = torch.randn(args.batch_size, 3, 224, 224, device=device), data.y_train[: args.batch_size]

    def training(model, loader, fused=True):
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        return lambda: usual.train_epoch(model, optimizer, loader, precision, device)

    timms, ours = usual.deit_tiny().to(device), networks(Row("", "deit_tiny", 224), 16, device, precision)
    torchvisions = torchvision.models.VisionTransformer(224, 16, 12, 3, 192, 768, num_classes=100).to(device)
    works = {
        "step: timm": training(timms, [batch]),
        "step: torchvision": training(torchvisions, [batch]),
        "step: ours": lambda: train_epoch(*ours, [batch], 0.0, precision),
    }
    operations = flops(build("deit_tiny", 100, 224, 16), 224)
    for line in timed(works, args.batch_size, args, device):
        yield line | dict(utilisation=operations * line["images_per_second"] / rate)
    loader = usual.batches(data, args.batch_size, 224, args.workers)
    name = f"epoch: timm and Pillow, {args.workers} workers"
    yield from timed({name: training(timms, loader, fused=False)}, args.images, args, device)


def cost():
    """A step of DeiT-tiny with 128 images of 224 px in bfloat16, eager, counted; and timm's in the usual loop."""
    x, y = torch.zeros(3072, 3, 32, 32, dtype=torch.uint8, device=META), torch.zeros(3072, device=META).long()
    batch = torch.zeros(128, 3, 224, 224, device=META), y[:128]
    with as_on_gpu():
        precision = make_precision(META, torch.bfloat16)
        with Counter() as counter:
            steps = len(list(batches(x, y, 128, 224, torch.Generator().manual_seed(0))))
        counts = {"augmentation": {name: round(count / steps) for name, count in counter.read().items()}}
        for name, beta in (("alone", 0.0), ("guided", 2.5)):
            ours = networks(Row(name, "deit_tiny", 224, beta=beta), 16, META, precision)
            counts[name] = count_step(lambda steps: train_epoch(*ours, steps, beta, precision), batch)
        if find_spec("timm"):
            timms = usual.deit_tiny().to(META)
            optimizer = torch.optim.AdamW(timms.parameters(), foreach=True)  # as is the default on a GPU
            training = lambda steps: usual.train_epoch(timms, optimizer, steps, precision, META)  # noqa: E731
            counts["timm"] = count_step(training, batch)
        else:
            print("timm is not installed, so its row is left out (pip install timm)")
    return [dict(name=name, **count) for name, count in counts.items()]


def parse(argv=None):
    """The options; those that depend on the device get their values in `main`."""
    parser = Options(prog="bench.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("--rows", nargs="+", choices=KINDS, help="default: the first three; with --amp or --compile: one")
    add("--model", choices=TRANSFORMERS, default="deit_tiny")
    add("--image-size", type=int, default=224)
    add("--patch-size", type=int, default=16)
    add("--batch-size", type=int, help="default: 128; on a CPU 16")
    add("--images", type=int, help="in an epoch (default: 50000; on a CPU four batches)")
    add("--repeats", type=int, default=3)
    add("--workers", type=int, default=2, help="processes of the usual input pipeline")
    add("--device", default="auto")
    add("--amp", action=on_off, help="as in train.py; not in the ladder")
    add("--compile", action=on_off, help="as in train.py; not in the ladder")
    add("--json", metavar="FILE", help="write the figures there, too, after each row")
    args = parser.parse_args(argv)
    args.command = quoted(["python", "bench.py", *(sys.argv[1:] if argv is None else argv)])
    least = dict(image_size=32, patch_size=1, batch_size=2, images=2, repeats=1, workers=1)
    for key, value in least.items():
        if getattr(args, key) is not None and getattr(args, key) < value:
            parser.error(f"--{key.replace('_', '-')} must be at least {value}")
    if {"inputs", "models"} & set(args.rows or []) and not find_spec("timm"):
        parser.error("inputs and models are compared with timm's: pip install timm")
    args.rows = args.rows or (KINDS[:3] if args.amp is args.compile is None else ["one"])
    build(args.model, 2, args.image_size, args.patch_size)  # refuses sizes that do not fit
    if args.json and Path(args.json).exists():
        raise InputError(f"{args.json} exists already: choose another name")
    return args


def lines(args, data, device, rate):
    """Measures the rows asked for, one kind after the other."""
    for kind in args.rows:
        if kind == "cost":
            yield from cost()
        elif kind == "inputs":
            yield from inputs(args, data, device)
        elif kind == "models":
            yield from models(args, data, device, rate)
        else:
            yield from train_rows(rows_of(kind, args, device), args, data, device, rate)


def show(line, columns):
    """Prints a line of a table, `-` where it lacks a figure."""
    cells = [line["name"]]
    for form in columns.values():
        try:
            cells.append(form.format(**line))
        except (KeyError, TypeError):  # it was not measured
            cells.append("-")
    print(f"| {' | '.join(cells)} |", flush=True)


def main():
    """Shows the table row by row, and writes the --json file anew after each."""
    args = parse()
    device, _, in_words = pick_device(args.device, args.amp)
    cpu = device.type == "cpu"
    args.seed, args.batch_size = 0, args.batch_size or (16 if cpu else 128)
    steps = (args.images or (4 * args.batch_size if cpu else 50_000)) // args.batch_size
    if not steps:
        raise InputError(f"--images {args.images} does not fill a batch of {args.batch_size}; choose more")
    args.images = steps * args.batch_size
    origin, rate, table, columns = origin_of(args, device), None, [], None
    if args.rows != ["cost"]:
        rate, rate_in_words = peak(device, args)
        origin |= dict(full_rate=rate, full_rate_is=rate_in_words)
        print(
            f"{args.model} at {args.image_size} px, {steps} steps of {args.batch_size} images an epoch, median "
            f"of {args.repeats}\n{origin['hardware']}, torch {origin['torch']}: {in_words}; "
            f"{pick_compile(args.compile, device, 300 * steps)[1]}\nfull rate: {rate_in_words}"
        )
    x = torch.randint(256, (args.images, 3, 32, 32), dtype=torch.uint8).to(device)
    y = torch.randint(100, (args.images,)).to(device)
    for line in lines(args, Data(x, y, x, y, 100), device, rate):
        before, columns = columns, COUNTED if "launches" in line else TIMED
        if columns is not before:
            print(f"\n| | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}")
        show(line, columns)
        table.append(line)
        if args.json:
            text = json.dumps(origin | dict(rows=table), indent=1) + "\n"
            write_whole(Path(args.json), lambda file, text=text: file.write(text.encode()))


if __name__ == "__main__":
    command_line(main)
