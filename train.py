"""Trains one row of the table: DeiT-tiny alone or guided by a ResNet-56, or a ResNet.

    python train.py                                        generated images, early guidance; minutes on a CPU
    python train.py --dataset cifar100 --schedule early    the method: teacher, then DeiT-tiny

    L = L_cls + beta * L_guidance      beta (`beta_at`) falls to 0; from then on the teacher is never called

`train_epoch` is the training step, `run` what happens around it, from the data to the summary line. A run's
folder holds log.jsonl (a line on where the run comes from, then one per epoch) and last.pt, the last epoch.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import numpy
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from data import CLASSES, InputError, batches, load, prepare, write_whole
from guidance import AdaptiveStop, Guidance, beta_at
from model import deit_mini, deit_tiny
from teacher import ResNet, resnet8, resnet18, resnet20, resnet56

try:
    import fcntl
except ImportError:  # on Windows nothing stops two processes from writing into one folder
    fcntl = None

TRANSFORMERS = {"deit_tiny": deit_tiny, "deit_mini": deit_mini}
CNNS = {"resnet56": resnet56, "resnet20": resnet20, "resnet8": resnet8, "resnet18": resnet18}
TEACHER_SIZE = 32  # pixels: what the small CNNs are trained on, and guide from

# Defaults by kind of model and data: on every real data set exactly the recipe of the LG code.
VIT = dict(
    model="deit_tiny",
    teacher="resnet56",
    epochs=300,
    batch_size=128,
    lr=5e-4,
    image_size=224,
    patch_size=16,
    augment="strong",
)
CNN = dict(epochs=300, batch_size=128, lr=0.1, image_size=TEACHER_SIZE, augment="strong")
GLYPHS_VIT = dict(
    model="deit_mini",
    teacher="resnet8",
    epochs=26,
    batch_size=32,
    lr=3e-3,
    image_size=64,
    patch_size=16,
    augment="weak",
)
GLYPHS_CNN = dict(epochs=5, batch_size=64, lr=0.1, image_size=TEACHER_SIZE, augment="weak")
SMALLER = """
  python train.py --dataset cifar100 --classes 20 --model resnet20 --epochs 30
  python train.py --dataset cifar100 --classes 20 --model deit_mini --image-size 32 --patch-size 4 \\
      --batch-size 64 --lr 1e-3 --epochs 30 --teacher resnet20"""


def train_epoch(
    student,
    teacher,
    guidance,
    optimizer,
    scheduler,
    data,
    beta,
    args,
    generator,
    precision,
    progress,
    rank=0,
    ranks=1,
):
    """One epoch: the training step, for every batch, of which each of `ranks` processes works on its part.

    With beta = 0 neither the teacher nor the projections are called, and the step is plain cross-entropy.
    `scheduler` sets the learning rate of every step (`lr_at`).

    Returns:
        Means over the epoch: cross-entropy, guidance loss (0 where beta is), accuracy in %.
    """
    student.train()
    steps = len(data.x_train) // args.batch_size  # the last partial batch is dropped
    sums = torch.zeros(3, device=data.x_train.device)  # so that the host waits only where it reads them
    epoch = batches(
        data.x_train, data.y_train, args.batch_size, args.image_size, generator, args.augment, rank, ranks
    )
    for step, (images, labels) in enumerate(epoch):  # (B, 3, S, S), (B,)
        with precision:
            logits, features = student(images)  # (B, classes), three of (B, D, S / patch, S / patch)
            loss_cls = F.cross_entropy(logits, labels)
            loss_guidance, loss = torch.zeros_like(loss_cls), loss_cls
            if beta > 0:
                with torch.no_grad():  # the same images, shrunk without antialiasing as in the LG code
                    _, targets = teacher(F.interpolate(images, TEACHER_SIZE, mode="bilinear"))
                loss_guidance = guidance(features, targets)  # (B, 16, 32, 32) (B, 32, 16, 16) (B, 64, 8, 8)
                loss = loss_cls + beta * loss_guidance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        correct = (logits.argmax(dim=1) == labels).float().mean()
        sums += torch.stack((loss_cls, loss_guidance, correct)).detach()
        if sums.device.type == "cpu" or step in (0, 3) or step % 50 == 49 or step == steps - 1:
            progress.show(step + 1, steps, sums / (step + 1))
    if ranks > 1:
        dist.all_reduce(sums)
    loss_cls, loss_guidance, accuracy = (sums / (steps * ranks)).tolist()
    return loss_cls, loss_guidance, 100 * accuracy


@torch.no_grad()
def evaluate(model, data, image_size, precision, as_teacher=False, rank=0, ranks=1):
    """Accuracy in % on the test images prepared at image_size, or `as_teacher` sees them while it guides; of
    `ranks` processes each looks at its part of them."""
    model.eval()
    correct = torch.zeros((), device=data.x_test.device)
    for images, labels in zip(data.x_test[rank::ranks].split(500), data.y_test[rank::ranks].split(500)):
        images = prepare(images, image_size)
        if as_teacher:
            images = F.interpolate(images, TEACHER_SIZE, mode="bilinear")
        with precision:
            logits, _ = model(images)
        correct += (logits.argmax(dim=1) == labels).sum()
    if ranks > 1:
        dist.all_reduce(correct)
    return 100 * correct.item() / len(data.x_test)


def warm_up_epochs(epochs):
    """Epochs in which a transformer's learning rate rises: 20 of 300, as many in proportion of others."""
    return max(1, round(epochs / 15))


def lr_at(epoch, epochs, peak, transformer):
    """Learning rate at a point of training, `epoch` in [0, epochs], fractions of an epoch too.

    CNN: cosine from peak to 0. Transformer: timm's cosine, as in the LG code: a straight line from peak / 1000
    to peak over the warm-up, which replaces the first part of a cosine from peak to peak / 100.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if not transformer:
        return peak * cosine
    warm_up = warm_up_epochs(epochs)
    if epoch < warm_up:
        return peak * (0.001 + 0.999 * epoch / warm_up)
    return peak * (0.01 + 0.99 * cosine)


def make_optimizer(model, guidance, lr, fused=True):
    """AdamW for a transformer with its projections (None: no guidance), SGD with Nesterov momentum for a CNN.
    Norms, biases, the cls token and the positions do not decay."""
    named = [*model.named_parameters(), *(guidance.named_parameters() if guidance else [])]
    free = [p for name, p in named if p.ndim == 1 or name in ("cls_token", "pos_embed")]
    decayed = [p for name, p in named if p.ndim > 1 and name not in ("cls_token", "pos_embed")]
    groups = [dict(params=decayed), dict(params=free, weight_decay=0)]
    if isinstance(model, ResNet):
        return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=fused)
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.999), weight_decay=0.05, fused=fused)


def build(name, num_classes, image_size, patch_size):
    """The network of that name; only a transformer needs the sizes."""
    if name in CNNS:  # convolutions are faster where the channels of a pixel lie side by side
        return CNNS[name](num_classes).to(memory_format=torch.channels_last)
    try:
        return TRANSFORMERS[name](num_classes, image_size, patch_size)
    except ValueError as error:
        raise InputError(f"{error}; choose another --image-size or --patch-size") from error


def load_checkpoint(path):
    """What `run` saved, as a dictionary on the CPU; only tensors and plain values are unpickled."""
    if not Path(path).is_file():
        raise InputError(f"there is no checkpoint {path}: check the name, or train it first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged, a foreign pickle, no torch file at all: torch raises many things
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is damaged or no checkpoint ({reason}); train it again") from error
    keys = {
        "args",
        "data",
        "model",
        "projections",
        "optimizer",
        "generator",
        "guiding",
        "adaptive",
        "origin",
        "history",
        "dataset",
        "classes",
        "image_size",
        "patch_size",
        "epochs",
    }
    if not (isinstance(state, dict) and keys <= {*state, *state.get("args", ())}):
        raise InputError(f"{path} was not written by this train.py; choose the last.pt of a run")
    return state


def fingerprint(data):
    """What a checkpoint remembers of its data, so that it is never used with others."""
    return dict(
        num_classes=data.num_classes,
        train_images=len(data.x_train),
        train_crc=crc32(data.y_train.cpu().numpy()),
        test_crc=crc32(data.x_test.cpu().numpy()),
    )


def restore(path, dataset, data):
    """The network of a checkpoint with its weights, and the checkpoint; refused if `data` is not its data."""
    state = load_checkpoint(path)
    was, now = (state["args"]["dataset"], state["data"]), (dataset, fingerprint(data))
    if was != now:
        raise InputError(
            f"{path} was trained on other data: {was[0]} {was[1]}, not {now[0]} {now[1]}; "
            "choose another checkpoint, or the --data it was trained on"
        )
    args = state["args"]
    try:
        model = build(args["model"], data.num_classes, args["image_size"], args["patch_size"])
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} does not hold the network it names ({error}); train it again") from error
    return model, state


def write_log(path, lines):
    """Writes dictionaries as JSON lines."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_whole(path, lambda file: file.write(text.encode()))


def alone_in(folder):
    """A lock on a folder that no other process trains into; it is gone once closed, or the process dead."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # not the log, which every epoch replaces
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"another process trains into {folder}: wait for it, or choose another") from error
    except OSError as error:
        raise InputError(f"cannot write into {folder} ({error}); choose another --out") from error
    return lock


def train_teacher(args):
    """The file of the teacher, which is trained now if only its model is named and it has not been yet."""
    if args.teacher not in CNNS:
        return Path(args.teacher)
    theirs = parse(
        [
            f"--dataset={args.dataset}",
            f"--data={args.data}",
            f"--model={args.teacher}",
            f"--seed={args.seed}",
            f"--device={args.device}",
        ]
        + ([f"--classes={args.classes}"] if args.classes else [])
        + ([f"--held-out={args.held_out}"] if args.held_out else [])
    )
    path, theirs.amp, theirs.compile = Path(theirs.out) / "last.pt", args.amp, args.compile
    if path.exists():  # finished, or to be continued as it was begun
        state = load_checkpoint(path)
        theirs = argparse.Namespace(**state["args"])
        if len(state["history"]) == theirs.epochs:
            return path
        theirs.device, theirs.data = args.device, args.data
    theirs.resume = path.with_name("log.jsonl").exists()
    print(f"no trained teacher in {path.parent}: training {args.teacher} for {theirs.epochs} epochs")
    with alone_in(path.parent):
        run(theirs)
    print()
    return path


def ready_teacher(path, args, data, device, precision, rank=0, ranks=1):
    """The frozen teacher of a checkpoint in eval mode; refused if it does not fit the data.

    Returns:
        The network, and for the log its file, a checksum of its weights and its accuracy in % on the very
        tensors that it would guide with.
    """
    teacher, state = restore(path, args.dataset, data)
    name, size, epochs = state["args"]["model"], state["args"]["image_size"], len(state["history"])
    if size != TEACHER_SIZE or len(teacher.feature_channels) != 3:
        raise InputError(f"the teacher {path} is a {name} at {size} px, not a small ResNet at 32 px")
    crc = crc32(b"".join(tensor.numpy().tobytes() for tensor in teacher.state_dict().values()))
    teacher.to(device).requires_grad_(False)
    accuracy = evaluate(teacher, data, args.image_size, precision, as_teacher=True, rank=rank, ranks=ranks)
    chance = 100 * data.y_test.bincount().max().item() / len(data.y_test)  # always the commonest class
    if accuracy < chance + 1:
        raise InputError(f"the teacher {path} is at chance ({accuracy:.1f} %): train it longer, or another")
    print(
        f"teacher: {name} of {path}, trained for {epochs} epochs; it gets {accuracy:.2f} % of the test "
        "images right, as it sees them while it guides"
    )
    return teacher, dict(
        teacher=str(path), teacher_model=name, teacher_epochs=epochs, teacher_crc=crc, teacher_acc=accuracy
    )


def measure_scale(guidance, model, teacher, data, image_size, precision):
    """Sets the scale of a relative guidance loss, on 512 training images prepared as test images are."""
    images = prepare(data.x_train[:: max(1, len(data.x_train) // 512)][:512], image_size)
    with torch.no_grad(), precision:
        _, features = model(images[:1])
        _, targets = teacher(F.interpolate(images, TEACHER_SIZE, mode="bilinear"))
    try:
        guidance.measure(features, targets)
    except ValueError as error:
        raise InputError(f"{error}: it cannot guide; choose another --teacher") from error


def in_words(schedule, epochs, beta, guide_epochs):
    """The schedule of beta as a sentence."""
    betas = [beta_at(schedule, epoch, epochs, beta, guide_epochs) for epoch in range(epochs)]
    guided = sum(b > 0 for b in betas)
    if not guided:
        return "none, plain cross-entropy; no teacher is called"
    shape = f"beta falls linearly from {beta:g} to 0" if schedule == "early" else f"beta = {beta:g}"
    until = ", or until AdaptiveStop ends it" if schedule == "adaptive" else ""
    rest = f"; from epoch {guided} on the teacher is not called" if guided < epochs else ""
    return f"{shape} in epochs 0 to {guided - 1} of {epochs}{until}{rest}"


def provenance(args, device):
    """Where a run comes from: the first line of its log."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy outside a repository
        commit = None
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return dict(
        command=" ".join(["python", *sys.argv]),
        args=vars(args),
        seed=args.seed,
        device=str(device),
        hardware=hardware,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        torchvision=str(torchvision.__version__),
        numpy=numpy.__version__,
        pillow=PIL.__version__,
        git_commit=commit,
        started=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    )


class Progress:
    """What an epoch shows while it runs; it stops the run on numbers that are not finite."""

    def __init__(self, args, epoch, beta, lr):
        self.args, self.epoch, self.beta, self.lr = args, epoch, beta, lr
        self.started = self.warm = time.perf_counter()

    def show(self, step, steps, means):
        """After `step` steps; `means` so far: a tensor of cross-entropy, guidance loss and accuracy."""
        loss_cls, loss_guidance, accuracy = means.tolist()
        if not math.isfinite(loss_cls + loss_guidance):
            self.stop("the loss is", step, loss_cls, loss_guidance)
        now = time.perf_counter()
        if step == 1:
            self.warm = now  # the first step also sets things up: it does not count
        if self.epoch == 0 and step == 4:
            total = (now - self.warm) / 3 * steps * self.args.epochs
            until = ", less once guidance ends" if self.beta else ""
            print(f"expected time: {timedelta(seconds=round(total))}{until}")
            if total > 3 * 3600:
                print(f"That is long. The same method, small enough for a CPU:{SMALLER}")
        if sys.stdout.isatty():
            speed = step * self.args.batch_size / (now - self.started)
            print(
                f"epoch {self.epoch}, step {step} of {steps}: loss_cls {loss_cls:.3f}, "
                f"train {100 * accuracy:.1f} %, {speed:.0f} images/s",
                end="  \r",
                flush=True,
            )

    def stop(self, what, step, loss_cls, loss_guidance):
        """Ends the run before such numbers reach a file."""
        raise InputError(
            f"{what} not finite by step {step} of epoch {self.epoch}: loss_cls {loss_cls}, "
            f"loss_guidance {loss_guidance}, beta {self.beta:.3f}, lr {self.lr:.2e}; last.pt "
            "keeps the epoch before; try another --out with a lower --lr or --no-amp"
        )


def keep_freed_memory():
    """Has Linux' C library keep freed memory. By default it hands the memory of large tensors back to the
    system, which zeroes it page by page for the next one: a quarter of the time of augmentation at 224 px."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):  # some have another C library
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: no tensor gets a mapping of its own
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def pick_compile(asked, device, steps):
    """Whether to compile, and in words why; asked: True, False or None. It pays in long runs only."""
    if asked is not None:
        return asked, f"{'torch.compile' if asked else 'eager'} (as asked)"
    if device.type != "cuda" or steps < 20_000 or not find_spec("triton"):
        return False, "eager (the default on a CPU, in a short run and without triton)"
    return True, "torch.compile (the default in a long run on a CUDA GPU)"


def pick_device(name, amp):
    """Device and precision (a context manager), and in words why these; `name` may be auto, `amp` None. On a
    CPU the process keeps freed memory from then on."""
    why, why_precision = "as asked", "the default on this device" if amp is None else "as asked"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        why = "no GPU was found" if name == "cpu" else "a GPU was found"
    try:
        device = torch.zeros(1, device=name).device
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("it is not cpu, cuda or mps")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} does not work here ({reason}); leave it out") from error
    if device.type == "cpu":
        keep_freed_memory()
    amp = device.type == "cuda" if amp is None else amp
    precision = torch.autocast(device.type, torch.bfloat16) if amp else nullcontext()
    kind = "bfloat16 autocast" if amp else "float32"
    return device, precision, f"{device} ({why}); {kind} ({why_precision})"


def run(args, rank=0, ranks=1):
    """One run, from the data to the summary line; `args` comes from `parse`. Of `ranks` processes that share
    the run only the first one (rank 0) writes."""
    out, last, log = Path(args.out), Path(args.out) / "last.pt", Path(args.out) / "log.jsonl"
    device, precision, device_in_words = pick_device(args.device, args.amp)
    data = load(args.dataset, args.data, args.classes, device, args.held_out)
    steps = len(data.x_train) // args.batch_size
    if not steps:
        raise InputError(f"{len(data.x_train)} images do not fill one batch; choose a smaller --batch-size")
    compiled, compiled_in_words = pick_compile(args.compile, device, steps * args.epochs)
    device_in_words += f"; {compiled_in_words}"
    origin = provenance(args, device) | dict(precision=device_in_words, processes=ranks)
    if rank == 0 and not log.exists():
        write_log(log, [origin])

    teacher, about_teacher = None, {}
    guided = args.schedule != "none" and args.beta > 0
    if guided:
        path = train_teacher(args)
        teacher, about_teacher = ready_teacher(path, args, data, device, precision, rank, ranks)
    torch.manual_seed(args.seed)  # the first weights
    generator = torch.Generator().manual_seed(args.seed)  # order of the images, augmentation
    model = build(args.model, data.num_classes, args.image_size, args.patch_size)
    state = None
    if last.exists():
        model, state = restore(last, args.dataset, data)
        if "scheduler" not in state:
            raise InputError(
                f"{last} was begun by an older train.py, with other learning rates: start another "
                "--out, or finish it with that version"
            )
        other = [
            f"{key} was {value}, is {getattr(args, key, None)}"
            for key, value in state["args"].items()
            if value != getattr(args, key, None) and key not in ("resume", "out", "data", "device")
        ]
        if other:
            raise InputError(f"{last} was made with other options: {'; '.join(other)}; choose the same")
        if state["origin"].get("teacher_crc") != about_teacher.get("teacher_crc"):
            raise InputError(f"{last} was guided by another teacher than {path} is now: bring that one back")
    model.to(device)
    guidance = None
    if guided:
        guidance = Guidance(model.feature_channels, teacher.feature_channels, args.reduction).to(device)
        if args.reduction == "relative" and not state:
            measure_scale(guidance, model, teacher, data, args.image_size, precision)
    optimizer = make_optimizer(model, guidance, args.lr)
    scheduler = LambdaLR(
        optimizer,
        lambda step: lr_at(step / steps, args.epochs, args.lr, args.model in TRANSFORMERS) / args.lr,
    )
    # the published threshold is for the mean form, which starts near 39 with the paper's teacher
    threshold = -0.02 / (39 if args.reduction == "relative" else 1)
    adaptive, guiding, history = AdaptiveStop(threshold=threshold), guided, []
    parameters, about_data = sum(p.numel() for p in model.parameters()), fingerprint(data)
    origin |= dict(**about_teacher, parameters=parameters, steps=steps, data=about_data)
    if state:
        try:
            if guided:
                guidance.load_state_dict(state["projections"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            generator.set_state(state["generator"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(f"{last} is no whole state of a run ({error}); start another --out") from error
        history, guiding, adaptive.history = state["history"], state["guiding"], state["adaptive"]
        keys = ("started", "git_commit", "torch", "hardware", "threads", "processes")
        session = dict(epoch=len(history), **{key: origin[key] for key in keys})  # perhaps on another machine
        origin = state["origin"]
        if len(history) < args.epochs:
            origin = origin | dict(resumed=[*origin.get("resumed", []), session])
        if rank == 0:
            write_log(log, [origin, *history])  # a kill between checkpoint and log has left it a line short
        print(f"resumed after epoch {len(history) - 1}")

    if guided and args.reduction == "relative":
        origin |= dict(guidance_scale=guidance.scale.item())
        print(
            f"unit of the guidance loss: {guidance.scale.item():.4g}, the mean square of the teacher's maps"
        )
    print(
        f"data: {args.dataset}, {len(data.x_train)} training and {len(data.x_test)} "
        f"{'held-out' if args.held_out else 'test'} images of "
        f"{data.x_train.shape[-1]} px, {data.num_classes} classes\n"
        f"model: {args.model} at {args.image_size} px, {origin['parameters']:,} parameters\n"
        f"training: {args.epochs} epochs of {steps} steps of {args.batch_size} images\n"
        f"device: {device_in_words}\n"
        f"guidance: {in_words(args.schedule, args.epochs, args.beta, args.guide_epochs)}\n"
        f"log and checkpoint: {out}",
        flush=True,
    )
    student, guide = model, guidance
    if compiled:  # what is saved, and evaluated, are the plain networks
        student = torch.compile(model)
        teacher, guide = (torch.compile(teacher), torch.compile(guidance)) if guided else (None, None)
    if ranks > 1:  # averages the gradients of the processes, so that every step is that of the whole batch
        student, guide = DistributedDataParallel(student), DistributedDataParallel(guide) if guided else None
    for epoch in range(len(history), args.epochs):
        beta = beta_at(args.schedule, epoch, args.epochs, args.beta, args.guide_epochs) if guiding else 0.0
        lr = lr_at(epoch + (steps - 1) / steps, args.epochs, args.lr, args.model in TRANSFORMERS)
        torch.manual_seed((args.seed * 10**6 + epoch * 10**3 + rank) % 2**63)  # drop path
        progress = Progress(args, epoch, beta, lr)
        loss_cls, loss_guidance, train_acc = train_epoch(
            student,
            teacher,
            guide,
            optimizer,
            scheduler,
            data,
            beta,
            args,
            generator,
            precision,
            progress,
            rank,
            ranks,
        )
        speed = steps * args.batch_size / (time.perf_counter() - progress.started)
        weights = [*model.state_dict().values(), *(guidance.state_dict().values() if guided else [])]
        if not torch.stack([weight.isfinite().all() for weight in weights]).all():
            progress.stop("a weight is", steps, loss_cls, loss_guidance)
        val_acc = evaluate(model, data, args.image_size, precision, rank=rank, ranks=ranks)
        if args.schedule == "adaptive" and beta > 0:
            goes_on = adaptive.update(loss_guidance)
            guiding = goes_on or epoch < warm_up_epochs(
                args.epochs
            )  # while the learning rate is still rising
        seconds = time.perf_counter() - progress.started
        history.append(
            dict(
                epoch=epoch,
                beta=beta,
                loss_cls=loss_cls,
                loss_guidance=loss_guidance if beta else None,
                lr=lr,
                train_acc=train_acc,
                val_acc=val_acc,
                seconds=seconds,
                images_per_second=speed,
            )
        )
        state = dict(
            model=model.state_dict(),
            projections=guidance.state_dict() if guided else None,
            optimizer=optimizer.state_dict(),
            scheduler=scheduler.state_dict(),
            generator=generator.get_state(),
            guiding=guiding,
            adaptive=adaptive.history,
            history=history,
            origin=origin,
            data=about_data,
            args=vars(args),
        )
        if rank == 0:
            write_whole(last, lambda file, state=state: torch.save(state, file))
            write_log(log, [origin, *history])
        guidance_now, weighted = (f"{loss_guidance:.3f}", f"{beta * loss_guidance:.3f}") if beta else "--"
        print(
            f"epoch {epoch:3d}  beta {beta:.3f}  loss_cls {loss_cls:.3f}  loss_guidance {guidance_now:>6}  "
            f"beta*L {weighted:>6}  "
            f"train {train_acc:5.1f} %  val {val_acc:5.1f} %  {speed:.0f} images/s  "
            f"{timedelta(seconds=round(seconds * (args.epochs - 1 - epoch)))} left",
            flush=True,
        )

    best = max(history, key=lambda line: line["val_acc"])
    print(
        f"result: {args.model} on {args.dataset}, schedule {args.schedule}, seed {args.seed}: val_acc "
        f"{history[-1]['val_acc']:.2f} % after the last epoch (best {best['val_acc']:.2f} %, epoch "
        f"{best['epoch']}), {timedelta(seconds=round(sum(line['seconds'] for line in history)))}"
    )


def evaluate_file(args):
    """Prints the accuracy of a checkpoint on the test images of the data set it was trained for."""
    theirs = argparse.Namespace(**{"held_out": None} | load_checkpoint(args.evaluate)["args"])
    device, precision, _ = pick_device(args.device, args.amp)
    data = load(
        theirs.dataset,
        theirs.data if args.data == "data" else args.data,
        theirs.classes,
        device,
        theirs.held_out,
    )
    model, state = restore(args.evaluate, theirs.dataset, data)
    accuracy = evaluate(model.to(device), data, theirs.image_size, precision)
    print(
        f"{args.evaluate}: {theirs.model}, {len(state['history'])} epochs on {theirs.dataset}, val_acc "
        f"{accuracy:.2f} %"
    )


class Options(argparse.ArgumentParser):
    """Refuses wrong options with one line, in place of argparse's twelve."""

    def error(self, message):
        raise InputError(f"{message}; see python {self.prog} --help")


def parse(argv=None):
    """The options. Every one has its value afterwards, so that a run's args say all there is to know."""
    parser = Options(prog="train.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    fail, add, on_off = parser.error, parser.add_argument, argparse.BooleanOptionalAction
    add("--dataset", choices=CLASSES, default="glyphs", help="glyphs is generated, the others are real")
    add("--data", default="data", metavar="DIR", help="where data sets and their caches are (default: data)")
    add("--classes", type=int, metavar="K", help="use the first K classes only, for a quick run")
    add(
        "--held-out",
        type=float,
        metavar="F",
        help="measure on this fraction of the training images, which is "
        "then not trained on, and leave the test images alone: for choosing",
    )
    add("--model", choices=[*TRANSFORMERS, *CNNS], help="default: deit_tiny (glyphs: deit_mini)")
    add("--schedule", choices=["none", "constant", "early", "adaptive"], help="of beta (default: early)")
    add("--beta", type=float, default=2.5, help="weight of the guidance loss at the start (default: 2.5)")
    add(
        "--reduction",
        choices=["mean", "sum", "relative"],
        default="mean",
        help="L_guidance over channels: sum in the formula, mean in the paper's code; relative: the mean over "
        "the mean square of the teacher's maps, so that one beta fits every teacher (default: mean)",
    )
    add("--guide-epochs", type=int, metavar="N", help="first epoch without guidance (early: a third)")
    add("--teacher", metavar="FILE", help="its last.pt, or its model's name (default: resnet56)")
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--lr", type=float, help="peak learning rate")
    add("--image-size", type=int, help="pixels the model sees")
    add("--patch-size", type=int, help="pixels of a transformer's patch")
    add("--augment", choices=["strong", "weak"], help="strong: the reference recipe; weak: crop and flip")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")
    add("--amp", action=on_off, help="bfloat16 autocast (default: on a CUDA GPU)")
    add("--compile", action=on_off, help="torch.compile (default: in a long run on a CUDA GPU)")
    add("--out", metavar="DIR", help="its folder (default: runs/<dataset>-<model>-<schedule>-seed<seed>)")
    add("--resume", action="store_true", help="continue after the last whole epoch")
    add("--evaluate", metavar="FILE", help="only print the accuracy of this checkpoint")
    args = parser.parse_args(argv)

    vit, cnn = (GLYPHS_VIT, GLYPHS_CNN) if args.dataset == "glyphs" else (VIT, CNN)
    args.model = args.model or vit["model"]
    recipe = vit if args.model in TRANSFORMERS else cnn
    if args.model == "resnet18":
        recipe = {**cnn, "image_size": vit["image_size"]}
    for key, value in recipe.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.model in CNNS and args.schedule not in (None, "none"):
        fail(f"{args.model} is a CNN and takes no guidance: leave --schedule out")
    args.schedule = args.schedule or ("early" if args.model in TRANSFORMERS else "none")
    if args.schedule == "adaptive" and args.reduction == "sum":
        fail("the adaptive rule is made for the mean form of the loss, or --reduction relative: not for sum")
    if args.teacher == "resnet18":
        fail("resnet18 is no teacher: choose resnet56, resnet20 or resnet8")
    for key, least in dict(epochs=1, batch_size=2, image_size=8, patch_size=1, lr=1e-12, seed=0).items():
        if not (getattr(args, key) is None or least <= getattr(args, key) < 2**63):
            fail(f"--{key.replace('_', '-')} must be at least {least}, not {getattr(args, key)}")
    if args.held_out is not None and not 0 < args.held_out < 1:
        fail(f"--held-out must lie between 0 and 1, not {args.held_out}")
    try:  # before any teacher is trained
        beta_at(args.schedule, 0, args.epochs, args.beta, args.guide_epochs)
        build(args.model, 2, args.image_size, args.patch_size)
    except ValueError as error:
        fail(str(error))
    if args.out is None:
        few = [f"{args.classes}classes"] if args.classes else []
        few += [f"heldout{args.held_out:g}"] if args.held_out else []
        schedule = [args.schedule] if args.model in TRANSFORMERS else []
        args.out = "runs/" + "-".join([args.dataset, *few, args.model, *schedule, f"seed{args.seed}"])
    return args


def join(args, rank, ranks):
    """Makes this process number `rank` of the `ranks` that torchrun has started for one run.

    Before, the first one fetches the data and trains the teacher, alone, as a CNN's BatchNorm wants whole
    batches. The others wait for it, and show nothing.
    """
    if args.model in CNNS:
        raise InputError(f"{args.model} trains in one process, as BatchNorm wants whole batches: use python")
    if args.batch_size % ranks:
        raise InputError(f"{ranks} processes cannot share batches of {args.batch_size}: choose a multiple")
    cuda = args.device.startswith("cuda") or args.device == "auto" and torch.cuda.is_available()
    args.device, local = "cuda" if cuda else "cpu", int(os.environ.get("LOCAL_RANK", rank))
    if cuda:
        if local >= torch.cuda.device_count():
            raise InputError(
                f"no GPU is left for process {local}, of {torch.cuda.device_count()}; choose a "
                "lower --nproc_per_node, or --device cpu"
            )
        torch.cuda.set_device(local)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    else:
        load(args.dataset, args.data, args.classes, held_out=args.held_out)
        if args.schedule != "none" and args.beta > 0:
            train_teacher(args)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the processes do not find each other ({error}); start them by torchrun") from error


def check_out(args):
    """Refuses to resume what is not there, and to overwrite what is."""
    log, last = Path(args.out, "log.jsonl"), Path(args.out, "last.pt")
    if args.resume and not log.exists():
        raise InputError(f"there is nothing to resume in {args.out}: check --out, or leave --resume out")
    if last.exists() and not args.resume:
        done = len(load_checkpoint(last)["history"])
        raise InputError(
            f"{args.out} holds a run of {done} epochs already: continue it with --resume, or "
            "choose another --out"
        )


def terminated(*_):
    """SIGTERM, from a cluster's scheduler or torchrun, ends a run as Ctrl-C does."""
    raise KeyboardInterrupt("SIGTERM")


def main():
    """The command line, also in each of the processes that torchrun starts."""
    args = parse()
    if args.evaluate:
        return evaluate_file(args)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    signal.signal(signal.SIGTERM, terminated)
    try:
        with alone_in(Path(args.out)) if rank == 0 else nullcontext():
            check_out(args)
            if ranks > 1:
                join(args, rank, ranks)
            run(args, rank, ranks)
            if ranks > 1:
                dist.destroy_process_group()
    except BaseException as reason:
        # torchrun sends a SIGTERM as soon as another process has failed: the reason is to be told first
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if isinstance(reason, KeyboardInterrupt) and rank == 0:
            program = f"torchrun --nproc_per_node={ranks}" if ranks > 1 else "python"
            begun = ["--resume"] * Path(args.out, "log.jsonl").exists()
            options = [option for option in sys.argv if option != "--resume"]
            print(f"\nstopped; to go on: {program} {shlex.join(options + begun)}", file=sys.stderr)
        raise


def explain(program):
    """Runs a program. What the user can mend ends with one line and exit code 1, Ctrl-C with 130, a closed
    pipe with 141 and SIGTERM with 143."""
    try:
        program()
        sys.stdout.flush()  # here and not while Python ends, where nothing could be caught
    except InputError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {str(error).splitlines()[0]} Choose a smaller --batch-size and another --out")
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.exit(f"error: torch.compile failed ({reason}); try again with --no-compile")
        if isinstance(error, dist.DistError) or "gloo" in reason:
            sys.exit(f"error: another process of this run has ended ({reason}); go on with --resume")
        raise
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still has to flush
        sys.exit(141)
    except KeyboardInterrupt as stop:
        sys.exit(143 if stop.args else 130)


if __name__ == "__main__":
    explain(main)
