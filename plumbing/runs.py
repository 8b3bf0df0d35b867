"""A run's folder: log.jsonl (a line on where the run comes from, then one per epoch) and last.pt, the last epoch."""

import json
import math
import platform
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy
import PIL
import torch
import torchvision

from guidance import beta_at
from model import TRANSFORMERS
from plumbing.files import InputError, read_tensors, write_whole
from teacher import CNNS

try:
    import fcntl
except ImportError:  # on Windows nothing stops two processes from writing into one folder
    fcntl = None


# ------------------------------------------------------------------------------------------- checkpoints


def build(name, num_classes, image_size, patch_size):
    """The network of that name; only a transformer needs the sizes."""
    if name in CNNS:
        return CNNS[name](num_classes)
    try:
        return TRANSFORMERS[name](num_classes, image_size, patch_size)
    except ValueError as error:
        raise InputError(f"{error}; choose another --image-size or --patch-size") from error


def load_checkpoint(path):
    """What `train.run` saved, as a dictionary on the CPU."""
    state = read_tensors(path)
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


def is_finished(path):
    """Whether this checkpoint is there, of a run's last epoch."""
    if not path.exists():
        return False
    state = load_checkpoint(path)
    return len(state["history"]) == state["args"]["epochs"]


def check_same_data(path, state, dataset, about_data):
    """Refuses a checkpoint that was trained on other data."""
    was, now = (state["args"]["dataset"], state["data"]), (dataset, about_data)
    if was != now:
        raise InputError(
            f"{path} was trained on other data: {was[0]} {was[1]}, not {now[0]} {now[1]}; "
            "choose another checkpoint, or the --data it was trained on"
        )


def restore(path):
    """The network of a checkpoint, with its weights, and the checkpoint."""
    state = load_checkpoint(path)
    args = state["args"]
    try:
        model = build(args["model"], state["data"]["num_classes"], args["image_size"], args["patch_size"])
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} does not hold the network it names ({error}); train it again") from error
    return model, state


def check_same_options(path, state, args):
    """Refuses to go on with other options than a run was begun with."""
    if "scheduler" not in state:
        raise InputError(
            f"{path} was begun by an older train.py, with other learning rates: start another "
            "--out, or finish it with that version"
        )
    free = ("resume", "out", "data", "device", "command")
    other = [
        f"{key} was {value}, is {getattr(args, key, None)}"
        for key, value in state["args"].items()
        if value != getattr(args, key, None) and key not in free
    ]
    if other:
        raise InputError(f"{path} was made with other options: {'; '.join(other)}; choose the same")


def write_log(path, lines):
    """Writes dictionaries as JSON lines."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_whole(path, lambda file: file.write(text.encode()))


# ---------------------------------------------------------------------------------------------- a folder


@contextmanager
def locked(folder, wait=False):
    """No other process trains into the folder meanwhile. The lock goes with the process, however it ends.

    Args:
        wait: for a process that does, instead of refusing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # not the log, which every epoch replaces
    except OSError as error:
        raise InputError(f"cannot write into {folder} ({error}); choose another --out") from error
    with lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise InputError(
                    f"another process trains into {folder}: wait for it, or choose another --out"
                ) from error
            print(f"waiting for the process that trains into {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def begin(args):
    """The checkpoint to go on from, or None; refuses to resume what is not there or was begun with other
    options, and to overwrite what is."""
    log, last = Path(args.out, "log.jsonl"), Path(args.out, "last.pt")
    if args.resume and not (log.exists() or last.exists()):
        raise InputError(f"there is nothing to resume in {args.out}: check --out, or leave --resume out")
    if not last.exists():
        return None
    state = load_checkpoint(last)
    if not args.resume:
        raise InputError(
            f"{args.out} holds a run of {len(state['history'])} epochs already: continue it with "
            "--resume, or choose another --out"
        )
    check_same_options(last, state, args)
    return state


def resume(last, state, args, training, origin, about_data):
    """Puts `training` where its checkpoint was, and returns the origin for the log; origin: that of this session."""
    check_same_data(last, state, args.dataset, about_data)
    if state["origin"].get("teacher_crc") != origin.get("teacher_crc"):
        raise InputError(
            f"{last} was guided by another teacher than {origin['teacher']} is now: bring that one back"
        )
    try:
        training.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{last} is no whole state of a run ({error}); start another --out") from error
    print(f"resumed after epoch {len(training.history) - 1}")
    if len(training.history) == args.epochs:
        return state["origin"]
    session = dict(epoch=len(training.history), git_commit=origin["git_commit"], hardware=origin["hardware"])
    return state["origin"] | dict(resumed=[*state["origin"].get("resumed", []), session])


def origin_of(args, device):
    """Where a run comes from: the first line of its log."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy outside a repository
        commit = None
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return dict(
        command=args.command,
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


def announce(args, data, origin, device_in_words):
    """Says what is about to be trained, with what, and how."""
    if "guidance_scale" in origin:
        print(
            f"unit of the guidance loss: {origin['guidance_scale']:.4g}, the mean square of the teacher's maps"
        )
    print(
        f"data: {args.dataset}, {len(data.x_train)} training and {len(data.x_test)} "
        f"{'held-out' if args.held_out else 'test'} images of {data.x_train.shape[-1]} px, "
        f"{data.num_classes} classes\n"
        f"model: {args.model} at {args.image_size} px, {origin['parameters']:,} parameters\n"
        f"training: {args.epochs} epochs of {origin['steps']} steps of {args.batch_size} images\n"
        f"device: {device_in_words}\n"
        f"guidance: {in_words(args)}\n"
        f"log and checkpoint: {args.out}",
        flush=True,
    )


def in_words(args):
    """The schedule of beta as a sentence."""
    betas = [
        beta_at(args.schedule, epoch, args.epochs, args.beta, args.guide_epochs)
        for epoch in range(args.epochs)
    ]
    guided = sum(beta > 0 for beta in betas)
    if not guided:
        return "none, plain cross-entropy; no teacher is called"
    shape = (
        f"beta falls linearly from {args.beta:g} to 0"
        if args.schedule == "early"
        else f"beta = {args.beta:g}"
    )
    until = ", or until AdaptiveStop ends it" if args.schedule == "adaptive" else ""
    rest = f"; from epoch {guided} on the teacher is not called" if guided < args.epochs else ""
    return f"{shape} in epochs 0 to {guided - 1} of {args.epochs}{until}{rest}"


# ------------------------------------------------------------------------------------- while it is trained


class Progress:
    """An epoch's batches, handed through: shows the step on a terminal, and at first how long it will take."""

    def __init__(self, batches, args, epoch, steps, device):
        self.batches, self.args, self.epoch, self.steps, self.device = batches, args, epoch, steps, device
        self.started = time.perf_counter()

    def __iter__(self):
        for step, batch in enumerate(self.batches):  # `step` of them have been trained on
            if self.epoch == 0 and step in (1, 4):
                if self.device.type != "cpu":
                    torch.accelerator.synchronize(self.device)
                if step == 1:
                    warm = time.perf_counter()  # the first step also sets things up: it does not count
                else:
                    self.project((time.perf_counter() - warm) / 3)
            if sys.stdout.isatty() and step:
                speed = step * self.args.batch_size / (time.perf_counter() - self.started)
                print(
                    f"epoch {self.epoch}, step {step} of {self.steps}: {speed:.0f} images/s",
                    end="  \r",
                    flush=True,
                )
            yield batch

    def project(self, seconds_a_step):
        """Says how long the run will take."""
        total = seconds_a_step * self.steps * self.args.epochs
        less = ", less once guidance ends" if self.args.schedule in ("early", "adaptive") else ""
        print(f"expected time: {timedelta(seconds=round(total))}{less}")
        if total > 3 * 3600:
            print("That is long. The same method, small enough for a CPU: python train.py --recipe small")

    def seconds(self):
        """Since the epoch began."""
        return time.perf_counter() - self.started


def check_finite(args, line, networks):
    """Ends the run before a loss or weight that is not finite reaches a file."""
    losses = [line[key] for key in ("loss_cls", "loss_guidance") if line[key] is not None]
    weights = [tensor for network in networks if network for tensor in network.state_dict().values()]
    finite = all(map(math.isfinite, losses))
    if not finite or not torch.stack([weight.isfinite().all() for weight in weights]).all():
        what = "a weight" if finite else "the loss"
        raise InputError(
            f"{what} is not finite in epoch {line['epoch']}: loss_cls {line['loss_cls']}, "
            f"loss_guidance {line['loss_guidance']}, beta {line['beta']:.3f}, lr {line['lr']:.2e}; "
            f"{args.out} keeps the epochs before; try another --out with a lower --lr or --no-amp"
        )


def show_epoch(line, epochs):
    """Prints an epoch's line of the log for a person."""
    loss_guidance, weighted = "-", "-"
    if line["beta"]:
        loss_guidance = f"{line['loss_guidance']:.3f}"
        weighted = f"{line['beta'] * line['loss_guidance']:.3f}"
    left = timedelta(seconds=round(line["seconds"] * (epochs - 1 - line["epoch"])))
    print(
        f"epoch {line['epoch']:3d}  beta {line['beta']:.3f}  loss_cls {line['loss_cls']:.3f}  "
        f"loss_guidance {loss_guidance:>6}  beta*L {weighted:>6}  train {line['train_acc']:5.1f}%  "
        f"val {line['val_acc']:5.1f}%  {line['images_per_second']:.0f} images/s  {left} left",
        flush=True,
    )


def show_result(args, history):
    """Prints the last line of a run: the last epoch is the result, the best one stands beside it."""
    best = max(history, key=lambda line: line["val_acc"])
    seconds = round(sum(line["seconds"] for line in history))
    print(
        f"result: {args.model} on {args.dataset}, schedule {args.schedule}, seed {args.seed}: val_acc "
        f"{history[-1]['val_acc']:.2f}% after the last epoch (best {best['val_acc']:.2f}%, epoch "
        f"{best['epoch']}), {timedelta(seconds=seconds)}"
    )


class Interrupted(KeyboardInterrupt):
    """A SIGTERM, from a cluster's scheduler or torchrun: it ends a run as Ctrl-C does."""


def on_sigterm(*_):
    """The handler of SIGTERM."""
    raise Interrupted


@contextmanager
def interruptible(args, processes):
    """Ctrl-C and SIGTERM end a run at once, and name the command that goes on."""
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    except BaseException as reason:
        # torchrun sends a SIGTERM as soon as another process has failed: the reason is to be told first
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if isinstance(reason, KeyboardInterrupt) and processes.rank == 0:
            words = [word for word in shlex.split(args.command)[1:] if word != "--resume"]
            words += ["--resume"] * Path(args.out, "log.jsonl").exists()
            program = f"torchrun --nproc_per_node={processes.count}" if processes.count > 1 else "python"
            print(f"\nstopped; to go on: {program} {shlex.join(words)}", file=sys.stderr)
        raise
