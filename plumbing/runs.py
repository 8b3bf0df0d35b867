"""A run's folder: log.jsonl (a line on where the run comes from, then one per epoch) and last.pt, the last epoch."""

import errno
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from zlib import crc32

import numpy
import PIL
import torch
import torch.nn.functional as F
import torchvision

from augment import batches
from guidance import beta_at
from model import TRANSFORMERS
from plumbing.devices import synchronize, to_device
from plumbing.files import InputError, explained, read_tensors, write_tensors, write_whole
from plumbing.images import some
from teacher import CNNS, load_teacher

try:
    import fcntl
except ImportError:  # on Windows nothing stops two processes from writing into one folder
    fcntl = None


def build(name, num_classes, image_size, patch_size):
    """The network of that name; only a transformer needs the sizes."""
    if name in CNNS:
        return CNNS[name](num_classes)
    try:
        return TRANSFORMERS[name](num_classes, image_size, patch_size)
    except ValueError as error:
        raise InputError(f"{error}; choose another --image-size or --patch-size") from error


def load_checkpoint(path):
    """What `Folder.save` saved, as a dictionary on the CPU."""
    state, problem = read_tensors(path), f"{path} is from another version of train.py, or is not a last.pt"
    with explained(problem, "choose another, or train it again"):
        parts = "model projections optimizer scheduler scaler generator guiding adaptive history origin"
        require(parts, state)
        require("model dataset data classes image_size patch_size epochs teacher", state["args"])
        require("dataset num_classes class_names train test held_out side", state["data"])
    return state


def require(keys, part):
    """Refuses a dictionary that lacks one of the keys, which stand in one string."""
    if missing := set(keys.split()).difference(part):
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")


def is_finished(path):
    """Whether this checkpoint is there, of a run's last epoch."""
    if not os.path.exists(path):  # which raises nothing, whatever the name is
        return False
    state = load_checkpoint(path)
    return len(state["history"]) == state["args"]["epochs"]


def restore(path):
    """The network of a checkpoint, with its weights, in eval mode; and the checkpoint."""
    state = load_checkpoint(path)
    args = state["args"]
    with explained(f"{path} does not hold the network it names", "train it again"):
        model = build(args["model"], state["data"]["num_classes"], args["image_size"], args["patch_size"])
        model.load_state_dict(state["model"])
    return model.eval(), state


def describe(data):
    """What a checkpoint remembers of its data, so that it is never used with others, and can name the classes."""
    return data.about | dict(num_classes=data.num_classes, side=data.x_train.shape[-1])


def write_weights(checkpoint, path):
    """Writes the network of a run in half precision: a small file that `--teacher`, `--init` and predict.py take."""
    if os.path.exists(path):
        raise InputError(f"{path} exists already: choose another name")
    state = load_checkpoint(checkpoint)
    model = {name: t.half() if t.is_floating_point() else t for name, t in state["model"].items()}
    if not all(tensor.isfinite().all() for tensor in model.values()):
        raise InputError(f"a weight of {checkpoint} is too large for half precision: use the file itself")
    gone = dict.fromkeys(("projections", "optimizer", "scheduler", "scaler", "generator"))
    write_tensors(path, state | gone | dict(model=model, guiding=False, adaptive=[]))


def initialise(network, path):
    """Gives a network its initial weights from a checkpoint of ours, or timm's or torchvision's state_dict of the
    same network. All must fit, except a head that is missing or of another number of classes: it starts afresh."""
    state = read_tensors(path)
    with explained(f"{path} does not hold weights for this network", "choose another --init"):
        state = state.get("model", state.get("state_dict", state))
        ours = network.state_dict()
        shapes = [{name: tensor.shape for name, tensor in weights.items()} for weights in (state, ours)]
        odd = [name for name in state | ours if shapes[0].get(name) != shapes[1].get(name)]
        anew = [name for name in odd if name in ours and name.split(".")[0] in ("head", "fc")]
        if len(odd) > len(anew):
            names = some((name for name in odd if name not in anew), 3)
            raise ValueError(f"missing, unused or of another shape: {names}")
        network.load_state_dict(state | {name: ours[name] for name in anew})
    others = f"; {' and '.join(anew)} start afresh: the file has none for these classes" if anew else ""
    print(f"initial weights: {path}{others}")


def check_data(path, was, data, but_for=(), again=""):
    """Refuses a checkpoint that was trained on other data than these, and says what differs; `again` says what
    else to do than to choose another."""
    now = describe(data)
    words = dict(dataset="data set ({}, now {})", num_classes="number of classes ({}, now {})")
    words |= dict(class_names="classes", held_out="part held out ({}, now {})")
    words |= dict(train="training images", test="test images")
    differ = [key for key in words if was[key] != now.get(key) and key not in but_for]
    if now["dataset"] in ("cifar10", "cifar100") and "train" not in differ:  # an own cache may lack the names
        differ = [key for key in differ if key != "class_names"]
    if differ:
        other = [words[key].format(was[key], now[key]) for key in differ]
        raise InputError(
            f"{path} was trained on other data; what differs: {', '.join(other)}. Choose another "
            f"checkpoint, or the --data it was trained on{again}"
        )


@contextmanager
def locked(folder, wait=False):
    """Holds the folder's lock, so that no other process trains in it. If one holds it already, waits for it or
    raises InputError. The lock is released when its process ends, however it ends."""
    with explained(f"cannot write into {folder}", "choose another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # not the log, which every epoch replaces
    with lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise InputError(
                    f"another process is training in {folder}: wait for it, or choose another --out"
                ) from error
            print(f"waiting for the process that is training in {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # then it is as on Windows
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(f"note: {folder} cannot be locked ({error}): never train in it from two processes at once")
        yield


def saved_options(out):
    """The options that the run in a folder was begun with, or none."""
    log, last = Path(out, "log.jsonl"), Path(out, "last.pt")
    with explained(f"the run in {out} cannot be read", "choose another --out"):
        if last.exists():
            return load_checkpoint(last)["args"]
        return json.loads(log.read_text().splitlines()[0])["args"] if log.exists() else {}


def begin(args):
    """The checkpoint to go on from, or None. Refuses to overwrite a run, and to go on under other conditions."""
    last = Path(args.out, "last.pt")
    state = load_checkpoint(last) if last.exists() else None
    if args.resume:
        check_options(args, last)
    elif state:
        raise InputError(
            f"{args.out} holds a run of {len(state['history'])} epochs already: continue it with "
            "--resume, or choose another --out"
        )
    if state and needs_teacher(args, state):  # known by its weights, wherever it lies now
        path = teacher_of(args, state)
        if not os.path.isfile(path):
            raise InputError(
                f"{last} was guided by {state['origin']['teacher']}: bring that file back, or say where "
                "it is with --teacher"
            )
        if weights_crc(load_checkpoint(path)) != state["origin"]["teacher_crc"]:
            raise InputError(f"{path} is not the teacher that guided {last}: bring that one back")
    return state


def check_options(args, last):
    """Refuses to resume what is not there, or was begun with other options."""
    begun = saved_options(args.out)
    if not begun:
        raise InputError(f"there is nothing to resume in {args.out}: check --out, or leave --resume out")
    free = ["resume", "out", "data", "device", "compile", "command"]
    if args.teacher not in CNNS:  # a file, which may have been moved
        free.append("teacher")
    other = [
        f"{key} was {value}, is {getattr(args, key, None)}"
        for key, value in begun.items()
        if value != getattr(args, key, None) and key not in free
    ]
    if other:
        longer = ""
        if last.exists() and begun.get("epochs") != args.epochs:
            longer = f", or start a longer run from its weights with --init {last}"
        raise InputError(
            f"the run in {args.out} was made with other options: {'; '.join(other)}; choose the same{longer}"
        )


def needs_teacher(args, state=None):
    """Whether a teacher will still be called in a run that begins, or goes on from a checkpoint."""
    epoch = len(state["history"]) if state else 0
    if epoch == args.epochs or state and not state["guiding"]:
        return False
    return beta_of(args, epoch) > 0  # it never rises


def beta_of(args, epoch):
    """beta in an epoch of a run, unless AdaptiveStop has ended guidance."""
    return beta_at(args.schedule, epoch, args.epochs, args.beta, args.guide_epochs)


def teacher_of(args, state):
    """The file of a resumed run's teacher: the one that is given now, or the one that it had."""
    return Path(state["origin"]["teacher"] if args.teacher in CNNS else args.teacher)


def guided_channels(state):
    """The channels of the teacher's maps, from the projections in a checkpoint; none in a run without guidance."""
    projections = state["projections"] if state else None
    return [weight.shape[0] for weight in (projections or {}).values() if weight.ndim == 4]


def weights_crc(state):
    """A checksum of a checkpoint's weights."""
    return crc32(b"".join(tensor.numpy().tobytes() for tensor in state["model"].values()))


class Folder:
    """What a run writes, and what its first line says of where it comes from."""

    def __init__(self, args, device, processes):
        self.args, self.writes, self.processes = args, processes.rank == 0, processes.count
        self.last, self.log = Path(args.out, "last.pt"), Path(args.out, "log.jsonl")
        self.origin = origin_of(args, device) | dict(processes=processes.count)
        if not self.last.exists():
            self.write_log([])

    def write_log(self, history):
        """Writes the log anew, whole."""
        text = "".join(json.dumps(line) + "\n" for line in [self.origin, *history])
        if self.writes:
            write_whole(self.log, lambda file: file.write(text.encode()))

    def save(self, training, data):
        """Writes checkpoint and log after an epoch."""
        if self.writes:
            about = dict(origin=self.origin, data=describe(data), args=vars(self.args))
            write_tensors(self.last, training.state_dict() | about)
        self.write_log(training.history)

    def count_steps(self, data):
        """Images in a batch and steps in an epoch. Unless --batch-size is given, few images have small batches, so
        that an epoch has about ten steps: in one or two hardly anything is learnt."""
        images, batch_size = len(data.x_train), self.args.batch_size
        if not self.args.batch_given:
            batch_size = min(batch_size, max(images // 10, 8, self.processes))
        batch_size = min(batch_size, images) // self.processes * self.processes
        if not batch_size:
            raise InputError(f"{images} images cannot be shared by {self.processes} processes: use python")
        return batch_size, images // batch_size  # the last partial batch is dropped

    def open_teacher(self, path, data):
        """The frozen teacher of a file; refused if it does not fit the data."""
        state = load_checkpoint(path)
        again = f"; or remove {path.parent}, so that a teacher is trained anew" * (self.args.teacher in CNNS)
        check_data(path, state["data"], data, again=again)
        with explained(f"the teacher {path} cannot guide", "choose another --teacher"):
            teacher = load_teacher(state)
        about = dict(teacher_model=state["args"]["model"], teacher_epochs=len(state["history"]))
        about |= dict(teacher_augment=state["args"]["augment"])
        about |= dict(teacher_crc=weights_crc(state), teacher_command=state["origin"]["command"])
        self.origin |= dict(teacher=str(path)) | about
        return teacher

    def accept_teacher(self, confusion, data):
        """Notes the teacher's accuracy, from (K, K) counts, on exactly the tensors that it will see; refuses one at
        chance, by the mean over the classes, so that always answering the commonest class does not pass."""
        words = ("teacher_model", "teacher", "teacher_epochs", "teacher_augment")
        name, path, epochs, augment = (self.origin[key] for key in words)
        accuracy, balanced = accuracies(confusion)
        present = (confusion.sum(dim=1) > 0).sum().item()
        if present > 1 and balanced < 100 / present + 1:
            folder = quoted([str(Path(path).parent)])
            raise InputError(
                f"the teacher {path} is at chance (balanced accuracy {balanced:.1f}%): choose "
                f"another --teacher, or remove {folder} and train it longer: {self.origin['teacher_command']} "
                f"--epochs {2 * epochs} --out {folder}; then run this command again"
            )
        print(
            f"teacher: {name} from {path}, trained for {epochs} epochs with {augment} augmentation; it gets "
            f"{accuracy:.2f}% of the {measured_on(data)} images right, as it sees them while it guides"
        )
        self.origin |= dict(teacher_acc=accuracy)

    def resume(self, state, training, data):
        """Puts `training` where its checkpoint was."""
        check_data(self.last, state["data"], data)
        now, self.origin = self.origin, state["origin"]
        (_, steps), begun = self.count_steps(data), self.origin
        if steps != begun.get("steps", steps):  # of few images the batch depends on the number of processes
            raise InputError(
                f"{self.last} was begun with {begun['steps']} steps an epoch but would now have {steps}: start "
                f"as many processes as before, {begun['processes']}"
            )
        with explained(f"{self.last} is not a complete checkpoint", "start again with another --out"):
            training.load_state_dict(state)
        self.origin |= {key: now[key] for key in ("teacher",) if key in now}  # where it lies now
        epoch = len(training.history)
        if epoch < self.args.epochs:  # perhaps on another machine
            session = dict(epoch=epoch, git_commit=now["git_commit"], hardware=now["hardware"])
            self.origin |= dict(resumed=[*self.origin.get("resumed", []), session])
        self.write_log(training.history)  # a kill between checkpoint and log has left it a line short
        print(f"resumed after epoch {epoch - 1}")

    def announce(self, data, training, device_in_words, precision):
        """Says what is about to be trained, with what, and how; of a CNN, how long it will take."""
        args, (batch_size, steps), images = self.args, self.count_steps(data), len(data.x_train)
        parameters = sum(p.numel() for p in training.model.parameters())
        self.origin |= dict(parameters=parameters, steps=steps, data=describe(data))
        if not training.history:  # else it says how the run was begun
            self.origin |= dict(precision=device_in_words)
        if training.guidance and args.reduction == "relative":
            self.origin |= dict(guidance_scale=training.guidance.scale.item())
            unit = self.origin["guidance_scale"]
            print(f"unit of the guidance loss: {unit:.4g}, the mean square of the teacher's maps")
        steps_told = f"{args.epochs} epochs of {steps} steps of {batch_size} images"
        if (unused := images % batch_size) > images / 20:
            steps_told += f", which leaves out {unused} images of each epoch"
        left = steps * (args.epochs - len(training.history))
        if left and args.model in CNNS:  # as an automatic teacher is, which somebody may not have expected
            seconds = left * seconds_a_step(args, data, batch_size, precision)
            steps_told += f"; this takes about {timedelta(seconds=round(seconds))}"
        print(
            f"data: {args.dataset}, {images} training and {len(data.x_test)} {measured_on(data)} images of "
            f"{data.x_train.shape[-1]} px, {data.num_classes} classes{imbalance(data)}\n"
            f"model: {args.model} at {args.image_size} px, {parameters:,} parameters\n"
            f"training: {steps_told}\n"
            f"device: {device_in_words}\n"
            f"guidance: {guidance_in_words(args)}\n"
            f"log and checkpoint: {args.out}",
            flush=True,
        )

    def check_finite(self, line, training):
        """Ends the run before a loss or weight that is not finite reaches a file."""
        finite = math.isfinite(line["loss_cls"]) and math.isfinite(line["loss_guidance"] or 0)
        networks = filter(None, (training.model, training.guidance))
        weights = [tensor for network in networks for tensor in network.state_dict().values()]
        if not finite or not torch.stack([tensor.isfinite().all() for tensor in weights]).all():
            kept = f"{self.last} keeps the epoch before; try another --out with" if line["epoch"] else "try"
            raise InputError(
                f"{'a weight' if finite else 'the loss'} is not finite in epoch {line['epoch']}: loss_cls "
                f"{line['loss_cls']}, loss_guidance {line['loss_guidance']}, beta {line['beta']:.3f}, "
                f"lr {line['lr']:.2e}; {kept} a lower --lr or --no-amp"
            )


def seconds_a_step(args, data, batch_size, precision):
    """Seconds that a CNN's training step takes, without the update: measured on real images with a throwaway
    network. On a CPU, where time grows with the number of images, a few of them suffice."""
    device, size = data.x_train.device, args.image_size
    few = min(batch_size, max(2, 2**15 // size**2)) if device.type == "cpu" else batch_size
    network = to_device(build(args.model, data.num_classes, size, args.patch_size), device)
    x, y = data.x_train[:few], data.y_train[:few]
    for _ in range(2):  # the first time, things are set up too
        started = time.perf_counter()
        for images, labels in batches(x, y, few, size, torch.Generator(), args.augment):
            with precision.autocast:
                loss = F.cross_entropy(network(images)[0], labels)
            loss.backward()
        synchronize(device)
    return (time.perf_counter() - started) * batch_size / few


def measured_on(data):
    """Which images accuracy is measured on: "test" or "held-out"."""
    return "test" if data.about.get("held_out") is None else "held-out"


def accuracies(confusion):
    """Accuracy and its mean over the classes that occur, in %, of (K, K) counts: true class, predicted class."""
    right, of = confusion.diag().double(), confusion.sum(dim=1).double()
    return 100 * (right.sum() / of.sum()).item(), 100 * (right / of).nanmean().item()


def imbalance(data):
    """In words, where there are more than twice as many training images of one class as of another."""
    counts = data.y_train.bincount(minlength=data.num_classes).tolist()
    least, most, names = min(counts), max(counts), data.about["class_names"]
    if most <= 2 * least:
        return ""
    return f" (from {least} of {names[counts.index(least)]!r} to {most} of {names[counts.index(most)]!r})"


def origin_of(args, device):
    """Where a run comes from: the first line of its log."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy outside a repository
        commit = None
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    origin = dict(command=args.command, args=vars(args), seed=args.seed, git_commit=commit)
    origin |= dict(device=str(device), hardware=hardware, threads=torch.get_num_threads())
    origin |= {module.__name__: str(module.__version__) for module in (torch, torchvision, numpy)}
    origin |= dict(python=platform.python_version(), pillow=PIL.__version__)
    return origin | dict(started=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))


def guidance_in_words(args):
    """The schedule of beta as a sentence."""
    guided = sum(beta_of(args, epoch) > 0 for epoch in range(args.epochs))
    if not guided:
        return "none, plain cross-entropy; no teacher is called"
    shape = f"falls linearly from {args.beta:g} to 0" if args.schedule == "early" else f"= {args.beta:g}"
    until = ", or until AdaptiveStop ends it" if args.schedule == "adaptive" else ""
    rest = f"; from epoch {guided} on the teacher is not called" if guided < args.epochs else ""
    return f"beta {shape} in epochs 0 to {guided - 1} of {args.epochs}{until}{rest}"


class Progress:
    """An epoch's batches, handed through: shows the step on a terminal, and at first how long it will take."""

    def __init__(self, batches, args, epoch, steps, batch_size, device):
        self.batches, self.args, self.epoch = batches, args, epoch
        self.steps, self.batch_size, self.device = steps, batch_size, device
        self.started = time.perf_counter()

    def __iter__(self):
        for step, batch in enumerate(self.batches):  # `step` of them have been trained on
            if self.epoch == 0 and step == 1:
                synchronize(self.device)
                first = self.seconds()  # it also sets things up: it does not count
            if self.epoch == 0 and step == 4:
                synchronize(self.device)
                self.project((self.seconds() - first) / 3)
            if sys.stdout.isatty() and step and (self.epoch or step > 4):  # below what `project` says
                speed = step * self.batch_size / self.seconds()
                shown = f"epoch {self.epoch}, step {step} of {self.steps}: {speed:.0f} images/s"
                print(shown, end="  \r", flush=True)
            yield batch
        if self.epoch == 0 and self.steps < 5:
            self.project(self.seconds() / self.steps)

    def project(self, seconds_a_step):
        """Says how long the run will take."""
        total = seconds_a_step * self.steps * self.args.epochs
        less = ", less once guidance ends" if self.args.schedule in ("early", "adaptive") else ""
        print(f"expected time: {timedelta(seconds=round(total))}{less}")
        if total > 3 * 3600 and self.args.recipe == "paper":
            print("That is long: --recipe small is the same method, sized for a CPU")

    def seconds(self):
        """Since the epoch began."""
        return time.perf_counter() - self.started


def show_epoch(line, epochs):
    """Prints an epoch's line of the log for a person."""
    beta, guidance = line["beta"], line["loss_guidance"]
    loss_guidance, weighted = (f"{guidance:.3f}", f"{beta * guidance:.3f}") if beta else ("-", "-")
    left = timedelta(seconds=round(line["seconds"] * (epochs - 1 - line["epoch"])))
    print(
        f"epoch {line['epoch']:3d}  beta {beta:.3f}  loss_cls {line['loss_cls']:.3f}  "
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


def quoted(words):
    """A command that can be pasted into a shell; on Windows into cmd and PowerShell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


@contextmanager
def interruptible(args, processes):
    """Ctrl-C and SIGTERM end a run at once, and name the command that goes on."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # a scheduler's, or torchrun's
    try:
        yield
    except BaseException as reason:
        # torchrun sends a SIGTERM as soon as another process has failed: the reason is to be told first
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if isinstance(reason, (KeyboardInterrupt, SystemExit)) and processes.rank == 0:
            words = [word for word in sys.argv if word != "--resume"]
            if Path(args.out, "log.jsonl").exists():
                words.append("--resume")
            torchrun = ["torchrun", "--standalone", f"--nproc_per_node={processes.count}"]
            program = torchrun if processes.count > 1 else ["python"]
            print(f"\nstopped; to go on: {quoted(program + words)}", file=sys.stderr)
        raise
