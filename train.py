"""Trains one network: a transformer, alone or guided by a small ResNet; or a ResNet.

Usage:
    python train.py                                        generated images, early guidance; minutes on a CPU
    python train.py --recipe small                         20 classes of CIFAR-100, small enough for a CPU
    python train.py --dataset cifar100 --schedule early    the method: teacher, then DeiT-tiny

    L = L_cls + beta * L_guidance      beta (`beta_at`) falls to 0; from then on the teacher is never called

What makes it work, and its effect where that was measured (on a CPU, except item 5; see results/README.md):
    1. A small CNN guides early: 94% with guidance, 24% without, on the generated images (three seeds).
    2. The whole data set is on the device, and batches are augmented there (augment.py): 1.6 times as many
       images/s at 224 px as timm's transforms on Pillow images in two workers, 5 times as many at 32 px.
    3. The teacher works at 32 px, without gradients, only while beta > 0: 4% more operations a step, counted.
    4. Convolutions run channels-last; attention and the optimiser are fused.
    5. On a GPU: bfloat16 throughout, 0.63 times the kernel launches of timm's model and 0.74 times its bytes
       (counted); torch.compile with CUDA graphs, 2.1 times as fast as eager (H200); one synchronisation an epoch.
"""

import math
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

from augment import batches, eval_batch_size, prepare
from data import load
from guidance import AdaptiveStop, Guidance, beta_at
from model import TRANSFORMERS
from plumbing import options, runs
from plumbing.devices import Processes, join_processes, pick_compile, pick_device, to_device
from plumbing.files import InputError, explained
from teacher import CNNS, TEACHER_SIZE, ResNet

DEFAULTS = {  # columns: paper (the public code's, except the schedule), small (similar, for a CPU), glyphs
    "recipe": ("paper", "small", "glyphs"),
    "dataset": ("cifar100", "cifar100", "glyphs"),
    "classes": (None, 20, None),
    "model": ("deit_tiny", "deit_mini", "deit_mini"),
    "image_size": (224, 32, 64),
    "patch_size": (16, 4, 16),
    "augment": ("strong", "strong", "weak"),
    "epochs": (300, 60, 26),
    "batch_size": (128, 64, 32),
    "lr": (5e-4, 1e-3, 3e-3),
    "schedule": ("early", "early", "early"),
    "reduction": ("mean", "relative", "relative"),  # of the guidance loss; beta follows (guidance.BETA)
    "teacher": ("resnet56", "resnet8", "resnet8"),
    "cnn_epochs": (300, 30, 5),  # of a CNN, as teacher or to compare with
    "cnn_batch_size": (128, 128, 64),
    "cnn_lr": (0.1, 0.1, 0.1),
}
RECIPES = {name: {key: row[i] for key, row in DEFAULTS.items()} for i, name in enumerate(DEFAULTS["recipe"])}


def train_epoch(student, teacher, guidance, optimizer, scheduler, batches, beta, precision):
    """One epoch: the training step, for every batch.

    With beta = 0 neither the teacher nor the projections are called, and the step is plain cross-entropy.

    Returns:
        Means over the epoch: cross-entropy, guidance loss (0 if beta is 0), accuracy in %.
    """
    student.train()
    sums = 0.0  # on the device, so that the host waits for the GPU only once, at the end
    for step, (images, labels) in enumerate(batches, start=1):  # (B, 3, S, S), (B,)
        optimizer.zero_grad()  # here, so that the forward pass can reuse the gradients' memory
        with precision.autocast:
            logits, features = student(images)  # (B, classes), three of (B, D, S / patch, S / patch)
            loss_cls = F.cross_entropy(logits, labels)
            loss_guidance, loss = torch.zeros_like(loss_cls), loss_cls
            if beta > 0:
                with torch.no_grad():  # the same images, shrunk without antialiasing as in the paper's code
                    _, targets = teacher(F.interpolate(images, TEACHER_SIZE, mode="bilinear"))
                loss_guidance = guidance(features, targets)  # targets: (B, 16, 32, 32), ... (B, 64, 8, 8)
                loss = loss_cls + beta * loss_guidance
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
    """The confusion matrix, (K, K) counts: true class by predicted class. Images are prepared at image_size and,
    if `as_teacher`, shrunk as they are for guidance. Each process evaluates its share."""
    model.eval()
    images, labels = images[processes.rank :: processes.count], labels[processes.rank :: processes.count]
    at_once, counts = eval_batch_size(image_size), 0
    for part, truth in zip(images.split(at_once), labels.split(at_once)):
        part = prepare(part, image_size)
        if as_teacher:
            part = F.interpolate(part, TEACHER_SIZE, mode="bilinear")
        with precision.autocast:
            logits, _ = model(part)
        true, predicted = (F.one_hot(k, logits.shape[1]).float() for k in (truth, logits.argmax(dim=1)))
        counts = counts + true.T @ predicted  # (K, n) @ (n, K)
    return processes.sum(counts).long().cpu()


def warm_up_epochs(epochs):
    """Epochs in which a transformer's learning rate rises: 20 of 300, and in proportion for other lengths."""
    return max(1, round(epochs / 15))


def lr_at(epoch, epochs, peak, transformer):
    """Learning rate at time `epoch`, a number in [0, epochs] that need not be whole.

    CNN: cosine from peak to 0. Transformer: timm's cosine, as in the paper's code: a straight line from peak / 1000
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
    """AdamW for a transformer and its projections (None if unguided), SGD with Nesterov momentum for a CNN.
    Norms, biases, the cls token and the position embedding get no weight decay."""
    named = [*model.named_parameters(), *(guidance.named_parameters() if guidance else [])]
    no_decay = [p for name, p in named if p.ndim < 2 or name.split(".")[-1] in ("cls_token", "pos_embed")]
    decay = [p for _, p in named if all(p is not other for other in no_decay)]
    groups = [dict(params=decay), dict(params=no_decay, weight_decay=0)]
    if isinstance(model, ResNet):
        sgd = torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=fused)
        for _, p in named:  # otherwise it is uninitialised memory if the GradScaler skips the first step
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.999), weight_decay=0.05, fused=fused)


def trained_teacher(args):
    """The teacher's checkpoint file. If --teacher names a network instead, trains that first if need be."""
    if args.teacher not in CNNS:
        return Path(args.teacher)
    theirs = options.of_teacher(args, RECIPES)
    path = Path(theirs.out, "last.pt")
    if path.parent.resolve() == Path(args.out).resolve():  # it would wait for itself
        raise InputError(f"{args.out} is the folder of the teacher: choose another --out")
    if runs.is_finished(path):  # then its folder need not be writable
        return path
    with runs.locked(path.parent, wait=True):  # another run may be training it
        if not runs.is_finished(path):
            if path.exists():  # unfinished: it is continued with the options that it was begun with
                begun = runs.load_checkpoint(path)["args"]
                vars(theirs).update(begun, device=args.device, data=args.data, out=theirs.out, resume=True)
            print(f"no trained teacher in {path.parent}: training {args.teacher} for {theirs.epochs} epochs")
            train(theirs)
            print()
    return path


def measure_scale(guidance, student, teacher, data, image_size, precision):
    """Sets the scale of a relative guidance loss from 512 training images, prepared like test images."""
    images = prepare(data.x_train[:: max(1, len(data.x_train) // 512)][:512], image_size)
    student.eval()  # only the sizes of its maps are needed; the BatchNorm of another network must not learn
    with torch.no_grad(), precision.autocast:
        _, features = student(images[:1])
        _, targets = teacher(F.interpolate(images, TEACHER_SIZE, mode="bilinear"))
    guidance.measure(features, targets)


class Training:
    """Everything that changes during training, and so everything that a checkpoint holds."""

    def __init__(self, args, num_classes, steps, channels, precision, device):
        torch.manual_seed(args.seed)  # the first weights
        self.generator = torch.Generator().manual_seed(args.seed)  # order of the images, augmentation
        network = runs.build(args.model, num_classes, args.image_size, args.patch_size)
        self.model, self.guidance, self.guiding = to_device(network, device), None, bool(channels)
        if channels:  # the teacher's
            self.guidance = Guidance(network.feature_channels, channels, args.reduction).to(device)
        self.optimizer = make_optimizer(self.model, self.guidance, args.lr)
        transformer = args.model in TRANSFORMERS
        factor = lambda step: lr_at(step / steps, args.epochs, args.lr, transformer) / args.lr  # noqa: E731
        self.scheduler, self.scaler, self.history = LambdaLR(self.optimizer, factor), precision.scaler, []
        # the published threshold is for the mean form, which starts near 39 with the paper's teacher
        self.adaptive = AdaptiveStop(threshold=-0.02 / (39 if args.reduction == "relative" else 1))

    def parts(self):
        """What has a state_dict of its own, by its name in the checkpoint."""
        parts = dict(model=self.model, projections=self.guidance, optimizer=self.optimizer)
        return parts | dict(scheduler=self.scheduler, scaler=self.scaler)

    def state_dict(self):
        state = {name: part and part.state_dict() for name, part in self.parts().items()}
        state |= dict(guiding=self.guiding, adaptive=self.adaptive.history, history=self.history)
        return state | dict(generator=self.generator.get_state())

    def load_state_dict(self, state):
        for name, part in self.parts().items():
            if part and (name != "scaler" or state[name]):  # the state of an unused scaler is empty
                part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.guiding, self.adaptive.history = state["guiding"], state["adaptive"]
        self.history = state["history"]


def run(args, processes=Processes()):
    """One run, from the data to the summary line, in its folder; `args` comes from `parse`.

    Returns:
        The history: a dictionary for each epoch, as in log.jsonl.
    """
    with runs.locked(Path(args.out)) if processes.rank == 0 else nullcontext():
        return train(args, processes)


def train(args, processes=Processes()):
    """`run`, in a folder that is locked already."""
    checkpoint = runs.begin(args)
    device, precision, in_words = pick_device(args.device, args.amp)
    folder = runs.Folder(args, device, processes)
    teacher, guided = None, runs.needs_teacher(args, checkpoint)
    channels = runs.guided_channels(checkpoint)  # of a resumed run, also where guidance is over
    with processes.first_one_first():
        data = load(args.dataset, args.data, args.classes, device, args.held_out)
        batch_size, steps = folder.count_steps(data)
        if guided:
            path = runs.teacher_of(args, checkpoint) if checkpoint else trained_teacher(args)
    if guided:
        teacher = to_device(folder.open_teacher(path, data), device)
        channels = teacher.feature_channels
        confusion = evaluate(teacher, data.x_test, data.y_test, args.image_size, precision, as_teacher=True)
        folder.accept_teacher(confusion, data)
    training = Training(args, data.num_classes, steps, channels, precision, device)
    if args.init and not checkpoint:
        runs.initialise(training.model, args.init)
    if checkpoint:
        folder.resume(checkpoint, training, data)
    elif guided and args.reduction == "relative":
        with explained(f"the teacher {path} cannot guide", "choose another --teacher"):
            measure_scale(training.guidance, training.model, teacher, data, args.image_size, precision)
    compiled, compiled_in_words = pick_compile(args.compile, device, steps * args.epochs)
    folder.announce(data, training, f"{in_words}; {compiled_in_words}", precision)
    # the plain networks are what is saved and evaluated
    student, teacher, guidance = processes.wrap(
        training.model, teacher, training.guidance, compiled, precision
    )

    for epoch in range(len(training.history), args.epochs):
        beta = beta_at(args.schedule, epoch, args.epochs, args.beta, args.guide_epochs)
        beta *= training.guiding  # 0 once AdaptiveStop has ended guidance
        torch.manual_seed((args.seed * 10**6 + epoch * 10**3 + processes.rank) % 2**63)  # drop path
        augmentation = training.generator, args.augment, processes.rank, processes.count
        augmented = batches(data.x_train, data.y_train, batch_size, args.image_size, *augmentation)
        progress = runs.Progress(augmented, args, epoch, steps, batch_size, device)
        losses = train_epoch(
            student, teacher, guidance, training.optimizer, training.scheduler, progress, beta, precision
        )
        loss_cls, loss_guidance, train_acc = processes.mean(losses, device)
        speed = steps * batch_size / progress.seconds()
        lr = lr_at(epoch + (steps - 1) / steps, args.epochs, args.lr, args.model in TRANSFORMERS)
        line = dict(epoch=epoch, beta=beta, loss_cls=loss_cls, loss_guidance=loss_guidance if beta else None)
        line |= dict(lr=lr, train_acc=train_acc)
        folder.check_finite(line, training)
        confusion = evaluate(
            training.model, data.x_test, data.y_test, args.image_size, precision, processes=processes
        )
        line["val_acc"], _ = runs.accuracies(confusion)
        if args.schedule == "adaptive" and beta > 0:
            goes_on = training.adaptive.update(loss_guidance)
            training.guiding = goes_on or epoch < warm_up_epochs(args.epochs)  # never ended in the warm-up
        training.history.append(line | dict(seconds=progress.seconds(), images_per_second=speed))
        folder.save(training, data)
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
    options.tell_expected(args, RECIPES[args.recipe])
    with runs.interruptible(args, processes):
        run(args, processes)
    processes.leave()


if __name__ == "__main__":
    options.command_line(main)
