"""Uses a trained network: names what is in images, or measures it class by class.

Usage:
    python predict.py runs/photos-deit_mini-early-seed0/last.pt cat.jpg more/*.png
    python predict.py runs/photos-deit_mini-early-seed0/last.pt                  on the images it was measured on
    python predict.py LAST.pt --split test --csv predictions.csv --figure confusion.png

To name images, a checkpoint is all it takes: it holds the class names and how images were prepared.
"""

import csv
import io
import math
import os
from pathlib import Path

import torch

from augment import eval_batch_size, prepare
from data import load
from plumbing.devices import pick_device, to_device
from plumbing.files import InputError, matching, write_whole
from plumbing.images import read_images
from plumbing.options import Options, command_line
from plumbing.runs import accuracies, check_data, restore


@torch.no_grad()
def probabilities(model, images, image_size, precision):
    """uint8 images (N, 3, S, S), prepared as test images are -> (N, K) on the CPU; rows sum to 1."""
    found = []
    for part in images.split(eval_batch_size(image_size)):
        with precision.autocast:
            logits, _ = model(prepare(part, image_size))
        found.append(logits.float().softmax(dim=1).cpu())
    return torch.cat(found)


def open_images(patterns, side):
    """Files, also as patterns such as *.jpg -> their paths, and uint8 images (N, 3, side, side)."""
    paths = []
    for pattern in patterns:
        found = [Path(name) for name in matching(pattern) if os.path.isfile(name)]
        paths += found
        if not found:
            raise InputError(f"there is no image file {pattern}; name files, or a pattern: folder/*.jpg")
    images, _ = read_images(paths, side)
    return paths, torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def name_images(found, paths, names, top):
    """Prints the likeliest classes of every image."""
    for path, (values, classes) in zip(paths, zip(*found.topk(min(top, len(names))))):
        likely = ", ".join(f"{names[k]} {100 * p:.1f}%" for p, k in zip(values.tolist(), classes.tolist()))
        print(f"{path}: {likely}")


def interval(share, count, z=1.96):
    """Wilson's 95% interval, in %, of a share that was found among so many independent cases."""
    middle = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return tuple(100 * (middle + sign * half) / (1 + z**2 / count) for sign in (-1, 1))


def print_by_class(confusion, names):
    """Prints accuracy and a table: for every class its images, how many are right, what it is mostly taken for."""
    accuracy, balanced = accuracies(confusion)
    low, high = interval(accuracy / 100, confusion.sum().item())
    print(f"accuracy {accuracy:.2f}%, balanced accuracy {balanced:.2f}% (the mean over the classes)")
    print(f"95% interval of the accuracy, if the images are independent: {low:.1f} to {high:.1f}%")
    print(f"{'class':<24} {'images':>7} {'right':>7}  most often taken for")
    wrong = confusion - confusion.diag().diag()
    for k, name in enumerate(names):
        total, right = confusion[k].sum().item(), confusion[k, k].item()
        taken_for = f"{names[wrong[k].argmax()]} ({wrong[k].max().item()})" if wrong[k].any() else "-"
        print(f"{name:<24} {total:>7} {f'{100 * right / total:.1f}%' if total else '-':>7}  {taken_for}")


def write_csv(path, paths, truth, predicted, found):
    """A line for every image: its name, its class where that is known, what it is taken for, how surely."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["image", "truth", "prediction", "probability"])
    for row in zip(paths, truth, predicted, found.amax(dim=1).tolist()):
        writer.writerow([str(row[0]), row[1], row[2], f"{row[3]:.4f}"])
    write_whole(path, lambda file: file.write(table.getvalue().encode("utf-8", "surrogateescape")))
    print(path)


def parse(argv=None):
    """The command line."""
    parser = Options(prog="predict.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", help="a run's last.pt")
    add("images", nargs="*", help="image files (default: the images that the run was measured on)")
    add("--top", type=int, help="how many classes to name (default: 3)")
    add("--split", choices=["val", "test"], help="test: use the test/ of a folder that has val/ too")
    add("--data", metavar="DIR", help="where the run's data set is now, if it has moved")
    add("--csv", metavar="FILE", help="write image, truth, prediction, probability")
    add("--figure", metavar="FILE", help="draw the confusion matrix (needs matplotlib)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_intermixed_args(argv)  # images may stand behind options
    if args.images and (args.figure or args.split):
        parser.error("--figure and --split apply to a data set: leave out the images")
    if args.top is not None and args.top < 1:
        parser.error(f"--top must be at least 1, not {args.top}")
    idle, what = ("data", "when images are given") if args.images else ("top", "without images")
    if getattr(args, idle) is not None:
        print(f"note: {what}, --{idle} has no effect")
    return args


def main():
    """The command line."""
    args = parse()
    if args.figure:  # before anything is computed
        from plot import confusion as draw, file_type  # which need matplotlib

        file_type(args.figure)
    model, state = restore(args.checkpoint)
    run, about, names = state["args"], state["data"], state["data"]["class_names"]
    device, precision, _ = pick_device(args.device, None)
    model = to_device(model, device)
    if args.images:
        paths, images = open_images(args.images, about["side"])
        found = probabilities(model, images.to(device), run["image_size"], precision)
        name_images(found, paths, names, args.top or 3)
        truth = [""] * len(paths)
    else:
        split = "other" if args.split == "test" else "test"
        folder = args.data or run["data"]
        data = load(run["dataset"], folder, run["classes"], device, about["held_out"], split)
        check_data(args.checkpoint, about, data, but_for=["test"] * (split == "other"))
        found = probabilities(model, data.x_test, run["image_size"], precision)
        paths, truth = data.test_names, [names[k] for k in data.y_test.tolist()]
        pairs = data.num_classes * data.y_test.cpu() + found.argmax(dim=1)
        confusion = pairs.bincount(minlength=data.num_classes**2).view(data.num_classes, data.num_classes)
        print(f"{args.checkpoint}: {run['model']}, {len(state['history'])} epochs, on {len(truth)} images")
        print_by_class(confusion, names)
        if args.figure:
            shown = [name.encode("utf-8", "replace").decode() for name in names]  # ? for what is no character
            draw(confusion.numpy(), shown, Path(args.figure))
    if args.csv:
        write_csv(args.csv, paths, truth, [names[k] for k in found.argmax(dim=1).tolist()], found)


if __name__ == "__main__":
    command_line(main)
