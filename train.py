"""Trains one row of the table: DeiT-tiny alone or guided by a ResNet-56, or a ResNet.

Usage:
    python train.py                                        generated images, early guidance; minutes on a CPU
    python train.py --recipe small                         20 classes of CIFAR-100, small enough for a CPU
    python train.py --dataset cifar100 --schedule early    the method: teacher, then DeiT-tiny

    L = L_cls + beta * L_guidance      beta (`beta_at`) falls to 0; from then on the teacher is never called

`train_epoch` is the training step, `run` all that happens around it.
"""

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from zlib import crc32

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

from augment import batches, prepare
from data import fingerprint, load
from guidance import AdaptiveStop, Guidance, beta_at
from model import TRANSFORMERS
from plumbing import options, runs
from plumbing.devices import Processes, join_processes, pick_compile, pick_device, to_device
from plumbing.files import InputError, write_tensors
from teacher import CNNS, TEACHER_SIZE, ResNet, load_teacher

DEFAULTS = {  # of the options, by recipe: "paper" is exactly that of the LG code, "small" its like for a CPU
    "recipe": ("paper", "small", "glyphs"),
    "dataset": ("cifar100", "cifar100", "glyphs"),
    "classes": (None, 20, None),
    "model": ("deit_tiny", "deit_mini", "deit_mini"),
    "image_size": (224, 32, 64),
    "patch_size": (16, 4, 16),
    "augment": ("strong", "strong", "weak"),
    "epochs": (300, 30, 26),
    "batch_size": (128, 64, 32),
    "lr": (5e-4, 1e-3, 3e-3),
    "schedule": ("early", "early", "early"),
    "beta": (2.5, 2.5, 2.5),
    "reduction": ("mean", "mean", "mean"),
    "teacher": ("resnet56", "resnet20", "resnet8"),
    "cnn_epochs": (300, 30, 5),  # the teacher's, and those of a CNN's own row
    "cnn_batch_size": (128, 128, 64),
    "cnn_lr": (0.1, 0.1, 0.1),
}
RECIPES = {name: {key: row[i] for key, row in DEFAULTS.items()} for i, name in enumerate(DEFAULTS["recipe"])}


def train_epoch(student, teacher, guidance, optimizer, scheduler, batches, beta, precision):
    """One epoch: the training step, for every batch.

    With beta = 0 neither the teacher nor the projections are called, and the step is plain cross-entropy.

    Returns:
        Means over the epoch: cross-entropy, guidance loss (0 where beta is), accuracy in %.
    """
    student.train()
    sums = 0.0  # on the device, so that the host waits for it once, at the end
    for step, (images, labels) in enumerate(batches, start=1):  # (B, 3, S, S), (B,)
        with precision.autocast:
            logits, features = student(images)  # (B, classes), three of (B, D, S / patch, S / patch)
            loss_cls = F.cross_entropy(logits, labels)
            loss_guidance, loss = torch.zeros_like(loss_cls), loss_cls
            if beta > 0:
                with torch.no_grad():  # the same images, shrunk without antialiasing as in the LG code
                    _, targets = teacher(F.interpolate(images, TEACHER_SIZE, mode="bilinear"))
                loss_guidance = guidance(features, targets)  # (B, 16, 32, 32) (B, 32, 16, 16) (B, 64, 8, 8)
                loss = loss_cls + beta * loss_guidance
        optimizer.zero_grad()
        precision.scaler.scale(loss).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()
        scheduler.step()
        correct = (logits.argmax(dim=1) == labels).float().mean()
        sums = sums + torch.stack((loss_cls, loss_guidance, correct)).detach()
    loss_cls, loss_guidance, accuracy = (sums / step).tolist()
    return loss_cls, loss_guidance, 100 * accuracy


@torch.no_grad()
def evaluate(model, images, labels, image_size, precision, as_teacher=False, processes=Processes()):
    """Accuracy in % on test images prepared at image_size, or `as_teacher` sees them while it guides. Of
    several processes each looks at its part."""
    model.eval()
    correct, total = torch.zeros((), device=images.device), len(labels)
    images, labels = images[processes.rank :: processes.count], labels[processes.rank :: processes.count]
    for part, truth in zip(images.split(500), labels.split(500)):
        part = prepare(part, image_size)
        if as_teacher:
            part = F.interpolate(part, TEACHER_SIZE, mode="bilinear")
        with precision.autocast:
            logits, _ = model(part)
        correct += (logits.argmax(dim=1) == truth).sum()
    return 100 * processes.sum(correct).item() / total


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


def trained_teacher(args):
    """The file of the teacher, which is trained now if only its network is named and it has not been yet."""
    if args.teacher not in CNNS:
        return Path(args.teacher)
    theirs = options.of_teacher(args, RECIPES)
    path = Path(theirs.out, "last.pt")
    if not runs.is_finished(path):
        with runs.locked(path.parent, wait=True):
            if runs.is_finished(path):  # by the process that was waited for
                return path
            if path.exists():  # continued as it was begun
                vars(theirs).update(runs.load_checkpoint(path)["args"], device=args.device, data=args.data)
            theirs.resume = path.with_name("log.jsonl").exists()
            print(f"no trained teacher in {path.parent}: training {args.teacher} for {theirs.epochs} epochs")
            train(theirs)
            print()
    return path


def ready_teacher(path, args, data, device, precision):
    """The frozen teacher of a file; refused if it does not fit the data.

    Returns:
        The network, and for the log its file, a checksum of its weights and its accuracy in % on the very
        tensors that it would guide with.
    """
    state = runs.load_checkpoint(path)
    runs.check_same_data(path, state, args.dataset, fingerprint(data))
    try:
        teacher = load_teacher(state)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the teacher {path} {error}; choose another --teacher") from error
    crc = crc32(b"".join(tensor.numpy().tobytes() for tensor in teacher.state_dict().values()))
    teacher = to_device(teacher, device)
    accuracy = evaluate(teacher, data.x_test, data.y_test, args.image_size, precision, as_teacher=True)
    chance = 100 * data.y_test.bincount().max().item() / len(data.y_test)  # always the commonest class
    if accuracy < chance + 1:
        raise InputError(f"the teacher {path} is at chance ({accuracy:.1f}%): train it longer, or another")
    name, epochs = state["args"]["model"], len(state["history"])
    print(
        f"teacher: {name} of {path}, trained for {epochs} epochs; it gets {accuracy:.2f}% of the test "
        "images right, as it sees them while it guides"
    )
    return teacher, dict(
        teacher=str(path), teacher_model=name, teacher_epochs=epochs, teacher_crc=crc, teacher_acc=accuracy
    )


def measure_scale(guidance, student, teacher, data, image_size, precision):
    """Sets the unit of a relative guidance loss, on 512 training images prepared as test images are."""
    images = prepare(data.x_train[:: max(1, len(data.x_train) // 512)][:512], image_size)
    with torch.no_grad(), precision.autocast:
        _, features = student(images[:1])
        _, targets = teacher(F.interpolate(images, TEACHER_SIZE, mode="bilinear"))
    try:
        guidance.measure(features, targets)
    except ValueError as error:
        raise InputError(f"{error}: it cannot guide; choose another --teacher") from error


class Training:
    """All that changes while a run trains, which is what its checkpoint holds."""

    def __init__(self, args, data, teacher, precision, device):
        torch.manual_seed(args.seed)  # the first weights
        self.generator = torch.Generator().manual_seed(args.seed)  # order of the images, augmentation
        student = runs.build(args.model, data.num_classes, args.image_size, args.patch_size)
        self.student, self.guidance, self.guiding = to_device(student, device), None, teacher is not None
        if teacher:
            guidance = Guidance(student.feature_channels, teacher.feature_channels, args.reduction)
            self.guidance = guidance.to(device)
        self.optimizer = make_optimizer(self.student, self.guidance, args.lr)
        steps = len(data.x_train) // args.batch_size
        self.scheduler = LambdaLR(
            self.optimizer,
            lambda step: lr_at(step / steps, args.epochs, args.lr, args.model in TRANSFORMERS) / args.lr,
        )
        self.scaler, self.history = precision.scaler, []
        # the published threshold is for the mean form, which starts near 39 with the paper's teacher
        self.adaptive = AdaptiveStop(threshold=-0.02 / (39 if args.reduction == "relative" else 1))

    def parts(self):
        """What has a state of its own, by its name in the checkpoint."""
        return dict(
            model=self.student,
            projections=self.guidance,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
        )

    def state_dict(self):
        state = {name: part and part.state_dict() for name, part in self.parts().items()}
        return state | dict(
            generator=self.generator.get_state(),
            guiding=self.guiding,
            adaptive=self.adaptive.history,
            history=self.history,
        )

    def load_state_dict(self, state):
        for name, part in self.parts().items():
            if part:
                part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.guiding, self.adaptive.history, self.history = (
            state["guiding"],
            state["adaptive"],
            state["history"],
        )


def run(args, processes=Processes()):
    """One run, from the data to the summary line, in its folder; `args` comes from `parse`.

    Returns:
        The history: a dictionary for each epoch, as in log.jsonl.
    """
    with runs.locked(Path(args.out)) if processes.rank == 0 else nullcontext():
        return train(args, processes)


def train(args, processes=Processes()):
    """`run`, in a folder that is locked already."""
    last, log, first = Path(args.out, "last.pt"), Path(args.out, "log.jsonl"), processes.rank == 0
    state = runs.begin(args)
    device, precision, in_words = pick_device(args.device, args.amp)
    origin = runs.origin_of(args, device) | dict(precision=in_words, processes=processes.count)
    if first and not log.exists():
        runs.write_log(log, [origin])
    teacher = None
    with processes.first_one_first():
        data = load(args.dataset, args.data, args.classes, device, args.held_out)
        steps = len(data.x_train) // args.batch_size  # the last partial batch is dropped
        if not steps:
            raise InputError(
                f"{len(data.x_train)} images do not fill one batch; choose a smaller --batch-size"
            )
        path = trained_teacher(args) if args.schedule != "none" and args.beta > 0 else None
    if path:
        teacher, about_teacher = ready_teacher(path, args, data, device, precision)
        origin |= about_teacher
    training = Training(args, data, teacher, precision, device)
    origin |= dict(parameters=sum(p.numel() for p in training.student.parameters()), steps=steps)
    if state:
        origin = runs.resume(last, state, args, training, origin, fingerprint(data))
    elif teacher and args.reduction == "relative":
        measure_scale(training.guidance, training.student, teacher, data, args.image_size, precision)
        origin |= dict(guidance_scale=training.guidance.scale.item())
    compiled, compiled_in_words = pick_compile(args.compile, device, steps * args.epochs)
    runs.announce(args, data, origin, f"{in_words}; {compiled_in_words}")
    # what is saved, and evaluated, are the plain networks
    student, teacher, guidance = processes.wrap(training.student, teacher, training.guidance, compiled)
    for epoch in range(len(training.history), args.epochs):
        beta = (
            beta_at(args.schedule, epoch, args.epochs, args.beta, args.guide_epochs)
            if training.guiding
            else 0.0
        )
        torch.manual_seed((args.seed * 10**6 + epoch * 10**3 + processes.rank) % 2**63)  # drop path
        epoch_of_batches = batches(
            data.x_train,
            data.y_train,
            args.batch_size,
            args.image_size,
            training.generator,
            args.augment,
            *processes,
        )
        progress = runs.Progress(epoch_of_batches, args, epoch, steps, device)
        loss_cls, loss_guidance, train_acc = processes.mean(
            train_epoch(
                student, teacher, guidance, training.optimizer, training.scheduler, progress, beta, precision
            ),
            device,
        )
        speed = steps * args.batch_size / progress.seconds()
        lr = lr_at(epoch + (steps - 1) / steps, args.epochs, args.lr, args.model in TRANSFORMERS)
        line = dict(
            epoch=epoch,
            beta=beta,
            loss_cls=loss_cls,
            loss_guidance=loss_guidance if beta else None,
            lr=lr,
            train_acc=train_acc,
        )
        runs.check_finite(args, line, (training.student, training.guidance))
        line["val_acc"] = evaluate(
            training.student, data.x_test, data.y_test, args.image_size, precision, processes=processes
        )
        if args.schedule == "adaptive" and beta > 0:
            goes_on = training.adaptive.update(loss_guidance)
            training.guiding = goes_on or epoch < warm_up_epochs(args.epochs)  # while the rate still rises
        training.history.append(line | dict(seconds=progress.seconds(), images_per_second=speed))
        if first:
            write_tensors(
                last, training.state_dict() | dict(origin=origin, data=fingerprint(data), args=vars(args))
            )
            runs.write_log(log, [origin, *training.history])
        runs.show_epoch(training.history[-1], args.epochs)
    runs.show_result(args, training.history)
    return training.history


def parse(argv=None):
    """The options of `run`, from the command line or a list of words."""
    return options.parse(sys.argv[1:] if argv is None else argv, RECIPES)


def main():
    """The command line, also in each of the processes that torchrun starts."""
    args = parse()
    processes = join_processes(args)
    with runs.interruptible(args, processes):
        run(args, processes)
    processes.leave()


if __name__ == "__main__":
    options.command_line(main)
