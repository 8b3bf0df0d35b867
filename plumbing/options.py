"""The command line: options, what they default to, and how a program ends when something goes wrong."""

import argparse
import errno
import io
import os
import sys
from pathlib import Path
from zlib import crc32

import torch
import torch.distributed as dist

from data import CLASSES
from guidance import BETA
from model import TRANSFORMERS
from plumbing.files import InputError, out_of_memory
from plumbing.runs import beta_of, build, quoted, saved_options
from teacher import CNNS, TEACHER_SIZE

WITHOUT_EFFECT = ("teacher", "beta", "reduction", "guide_epochs")  # where there is no guidance
MEASURED = {  # test accuracy, means of three to five seeds: alone, constant, early; minutes with the teacher
    "small": ("49.2%", "63.4% (at --beta 9 68.9%)", "71.6%", "50 to 90"),
    "glyphs": ("24.2%", "97.2%", "94.1%", "2 to 3"),
}


class Options(argparse.ArgumentParser):
    """Refuses wrong options with one line, in place of argparse's twelve."""

    def error(self, message):
        raise InputError(f"{message}; see python {self.prog} --help")


def parse(argv, recipes):
    """The options of a run, from a list of words. Each has a value afterwards, so that a run's args say all there is
    to know: a given option wins over its recipe's; without --recipe, --dataset implies one."""
    parser = Options(
        prog="train.py", description="Trains a transformer, guided or alone, or a ResNet.", allow_abbrev=False
    )
    add_options(parser, recipes)
    args = parser.parse_args(argv)
    args.command = quoted(["python", "train.py", *argv])
    given = {key for key, value in vars(args).items() if value is not None}
    args.batch_given = "batch_size" in given  # if not, few images have smaller batches
    if args.resume:  # what is not given is as it was; what is given and differs is refused by `begin`
        begun = argparse.Namespace(**vars(args))
        fill_in(begun, recipes)
        args.out = begun.out  # it may have been moved there
        saved = saved_options(args.out)
        for key, value in saved.items():
            if key in vars(args) and getattr(args, key) is None and key != "device":
                setattr(args, key, value)
        args.command = saved.get("command", args.command)  # which makes the run from its start
        args.batch_given = saved.get("batch_given", True)  # older runs took any batch size as it was
    fill_in(args, recipes)
    check(args, parser.error)
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one talks
        note_idle(args, given)
    return args


def note_idle(args, given):
    """Says which of the given options have no effect; loops over schedules and models share their options."""
    idle = {}
    if args.beta == 0:  # which is what ends guidance
        idle["without guidance"] = [key for key in WITHOUT_EFFECT if key != "beta"]
    elif args.schedule == "none":
        idle["without guidance"] = WITHOUT_EFFECT
    if args.model in CNNS:
        idle[f"with {args.model}"] = ["patch_size"]
    if args.dataset == "glyphs":
        idle["with glyphs"] = ["data"]
    for where, keys in idle.items():
        if names := [f"--{key.replace('_', '-')}" for key in keys if key in given]:
            print(f"note: {where}, {', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect")


def tell_expected(args, recipe):
    """Says what a recipe has given, if a run changes nothing of it but the seed and the schedule."""
    own = {key: value for key, value in recipe.items() if key != "schedule" and not key.startswith("cnn_")}
    own |= dict(beta=BETA[recipe["reduction"]], guide_epochs=None, held_out=None, init=None)
    if args.recipe in MEASURED and all(getattr(args, key) == value for key, value in own.items()):
        alone, constant, early, minutes = MEASURED[args.recipe]
        print(
            f"recipe {args.recipe}, as measured (README): {alone} alone, {early} with early and {constant} "
            f"with constant guidance; a run takes {minutes} minutes on one core"
        )


def add_options(parser, recipes):
    """The options of a run."""
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("--recipe", choices=recipes, help="defaults of all the options (default: paper; for glyphs: glyphs)")
    add("--dataset", choices=CLASSES, help="glyphs is generated, the others are real (default: glyphs)")
    add("--data", metavar="DIR", help="where data sets and their caches are (default: data)")
    add("--classes", type=int, metavar="K", help="use the first K classes only, for a quick run")
    held_out = "to choose options: measure on this fraction of the training images, not on the test images"
    add("--held-out", type=float, metavar="F", help=held_out)
    add("--model", choices=[*TRANSFORMERS, *CNNS])
    add("--schedule", choices=["none", "constant", "early", "adaptive"], help="of beta (default: early)")
    add("--beta", type=float, help="weight of the guidance loss at the start (default: 2.5; relative: 90)")
    reduction = (
        "L_guidance over channels: sum in the formula, mean in the paper's code; relative: the mean over the "
        "mean square of the teacher's maps, so that one beta fits every teacher"
    )
    add("--reduction", choices=["mean", "sum", "relative"], help=reduction)
    add("--guide-epochs", type=int, metavar="N", help="first epoch without guidance (early: a third)")
    add("--teacher", metavar="FILE", help="the teacher's last.pt, or a model's name, trained first if needed")
    add("--epochs", type=int)
    add("--batch-size", type=int, help="(default: the recipe's, or less for few images)")
    add("--lr", type=float, help="peak learning rate")
    add("--image-size", type=int, help="pixels the model sees")
    add("--patch-size", type=int, help="pixels of a transformer's patch")
    add("--augment", choices=["strong", "weak"], help="strong: the reference recipe; weak: crop and flip")
    add("--init", metavar="FILE", help="initial weights: a last.pt, or timm's or torchvision's for the model")
    add("--seed", type=int, help="of weights, order and augmentation (default: 0)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: auto)")
    add("--amp", action=on_off, help="bfloat16, on older GPUs float16 (default: on a CUDA GPU)")
    add("--compile", action=on_off, help="torch.compile (default: in a long run on a CUDA GPU)")
    add("--out", metavar="DIR", help="its folder (default: runs/<dataset>-<model>-<schedule>-seed<seed>)")
    add("--resume", action="store_true", help="continue after the last whole epoch, with the same options")


def fill_in(args, recipes):
    """Gives every option that was not given the value of its recipe."""
    if args.recipe is None:
        args.recipe = "glyphs" if args.dataset in (None, "glyphs") else "paper"
    recipe = dict(recipes[args.recipe], seed=0, device="auto", data="data")
    if args.dataset not in (None, recipe["dataset"]):
        recipe["classes"] = None  # they belong to the recipe's own data set
    args.model = args.model or recipe["model"]
    if args.model in CNNS:
        recipe |= {key: recipe[f"cnn_{key}"] for key in ("epochs", "batch_size", "lr")}
        recipe["schedule"] = "none"
        if args.model != "resnet18":  # the row to compare with sees what the transformer sees
            recipe["image_size"] = TEACHER_SIZE
    for key, value in recipe.items():
        if not key.startswith("cnn_") and getattr(args, key) is None:
            setattr(args, key, value)
    if args.beta is None:
        args.beta = BETA[args.reduction]
    if args.out is None:
        parts = [name_of(args.data) if args.dataset == "folder" else args.dataset]
        parts += [f"{args.classes}classes"] if args.classes else []
        parts += [f"heldout{args.held_out:g}"] if args.held_out else []
        parts += [args.model, *([args.schedule] if args.model in TRANSFORMERS else []), f"seed{args.seed}"]
        args.out = "runs/" + "-".join(parts)


def name_of(folder):
    """What runs on a folder of images are named after: no two folders, nor a built-in data set, share a name."""
    path = Path(folder).resolve()
    if path.parent == Path.cwd() and path.name not in CLASSES:
        return path.name
    return f"{path.name}-{crc32(str(path).encode('utf-8', 'surrogateescape')):08x}"


def check(args, fail):
    """Refuses what can be seen to be wrong before anything is read or trained."""
    if args.model in CNNS and args.schedule != "none":
        fail(f"{args.model} is a CNN and takes no guidance: leave --schedule out")
    if args.schedule == "adaptive" and args.reduction == "sum":
        fail("the adaptive rule is made for --reduction mean or relative, not for sum")
    if args.teacher == "resnet18":
        fail("resnet18 cannot be a teacher: choose resnet56, resnet20 or resnet8")
    limits = dict(epochs=(1, 10**6), batch_size=(2, 2**63), image_size=(8, 2048), patch_size=(1, 2048))
    limits |= dict(lr=(1e-12, 2**63), seed=(0, 2**63))
    for key, (least, most) in limits.items():
        if not least <= getattr(args, key) <= most:
            bound = f"at least {least}" if getattr(args, key) < least else f"at most {most}"
            fail(f"--{key.replace('_', '-')} must be {bound}, not {getattr(args, key)}")
    if args.held_out is not None and not 0 < args.held_out < 1:
        fail(f"--held-out must lie between 0 and 1, not {args.held_out}")
    try:
        beta_of(args, 0)
        with torch.device("meta"):  # sizes are checked, and no memory is taken
            build(args.model, 2, args.image_size, args.patch_size)
    except ValueError as error:
        fail(str(error))


def of_teacher(args, recipes):
    """The options of the run that trains the teacher `args` names: as a user would give them, so that its log
    holds a command that makes it again."""
    argv = [f"--{key}={getattr(args, key)}" for key in ("recipe", "dataset", "seed")]
    argv.append(f"--model={args.teacher}")
    defaults = dict(data="data", classes=None, held_out=None, device="auto")
    # what would spoil the student's images would spoil the teacher's
    defaults["augment"] = recipes[args.recipe]["augment"]
    if args.dataset == "glyphs":
        del defaults["data"]  # it has no effect there, which would be noted
    for key, default in defaults.items():
        if getattr(args, key) != default:
            argv.append(f"--{key.replace('_', '-')}={getattr(args, key)}")
    for key in ("amp", "compile"):
        if getattr(args, key) is not None:
            argv.append(f"--{key}" if getattr(args, key) else f"--no-{key}")
    return parse(argv, recipes)


def command_line(program):
    """Runs a program. What the user can mend ends with one line and exit code 1, Ctrl-C with 130, SIGTERM with
    143."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # where it was closed
    if isinstance(sys.stdout, io.TextIOWrapper):  # it is something else in a notebook
        utf8 = sys.stdout.encoding.lower() == "utf-8"  # which can give the bytes of any file name back
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    try:
        program()
        sys.stdout.flush()  # here and not while Python ends, where nothing could be caught
    except InputError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except BrokenPipeError:  # the reader has gone, as with `| head`
        give_up_stdout()
        sys.exit(1)
    except (MemoryError, RuntimeError, OSError) as error:
        sys.exit(f"error: {in_one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


def give_up_stdout():
    """Lets Python throw away what it would still write there when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def in_one_line(error):
    """What a user can do about an error of Python's or torch's; raised again if nobody knows."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if out_of_memory(error):
        smaller = "choose a smaller --batch-size or --image-size and another --out, or --device cpu"
        return f"out of memory ({reason}); {smaller}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        give_up_stdout()  # no other file: `write_whole` has a message of its own
        return f"cannot write the output ({reason}); free space, or send it elsewhere"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({reason}); try again with --no-compile"
    if isinstance(error, dist.DistError) or "gloo" in reason:
        return f"another process of this run has ended ({reason}); go on with --resume"
    raise error
