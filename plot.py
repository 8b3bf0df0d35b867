"""Rebuilds figures and tables from what runs have written. Needs matplotlib: pip install matplotlib

    python plot.py runs/* --out figures            tables, curves, and what strength and stopping early change
    python plot.py runs/* --out figures --untimed  without times: these runs shared a machine with others
    python plot.py runs/* --out figures --look     also, from last.pt, attention, feature maps, example images

Logs alone will do: results/glyphs/*.jsonl. Curves show the mean of the seeds and, shaded, their range. Runs that
do not belong with most of the others are left out, and named; so are figures that need other runs.
"""

import json
import os
import re
from itertools import combinations
from pathlib import Path
from statistics import mean, mode, stdev
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

try:
    import matplotlib.figure
except ModuleNotFoundError:
    raise SystemExit("error: plot.py draws with matplotlib: pip install matplotlib") from None

from augment import MEAN, STD, prepare
from data import load
from guidance import Guidance
from model import VisionTransformer
from plumbing.files import InputError, explained, matching, write_whole
from plumbing.options import WITHOUT_EFFECT, Options, command_line
from plumbing.runs import load_checkpoint, require, restore
from teacher import CNNS, TEACHER_SIZE, load_teacher

NAMES = {"none": "alone"} | {key: f"+ {key} guidance" for key in ("constant", "early", "adaptive")}
LINES = {"none": ":", "constant": "--", "early": "-", "adaptive": "-.", "cnn": ":"}
COLOURS = dict(zip(LINES, ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7")))  # Okabe and Ito's
MARKERS = "o^sDv<>"
KINDS = ("alone", "constant", "fading", "stopped")
# These make no row of their own; a teacher's network and length do, and are in the logs of its students
NO_ROW = tuple("seed out data device resume evaluate teacher compile command recipe batch_given".split())
STRENGTH = ("schedule", "beta", "guide_epochs")
GUIDANCE = (*STRENGTH, *WITHOUT_EFFECT, "teacher_model", "teacher_epochs")
T_975 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's, for 3 to 10 pairs


class Run(NamedTuple):
    """A log: its path, its first line, the options in it, and a dictionary for each epoch."""

    path: Path
    origin: dict
    args: dict
    epochs: list

    def column(self, key):
        return np.array([line[key] for line in self.epochs], float)

    def last(self, key="val_acc"):
        return self.epochs[-1][key]

    def guided(self):
        """Epochs with guidance; they are the first ones."""
        return int((self.column("beta") > 0).sum())

    def kind(self):
        """How beta went: 0 throughout, the same throughout, falling but never 0, or 0 from some epoch on."""
        if self.guided() < len(self.epochs):
            return "stopped" if self.guided() else "alone"
        return "constant" if len(set(self.column("beta"))) == 1 else "fading"

    def weight(self, epoch):
        """beta * L over the cross-entropy."""
        line = self.epochs[epoch]
        return line["beta"] * (line["loss_guidance"] or 0) / line["loss_cls"]  # unguided epochs have no L

    def student(self):
        return self.args["model"] not in CNNS

    def options(self, *but):
        """What makes another row: options that have an effect, and the teacher's network and length. What has no
        value is left out, as older logs lack it."""
        but += NO_ROW + WITHOUT_EFFECT * (self.args["schedule"] == "none")
        found = self.args | {key: self.origin.get(key) for key in ("teacher_model", "teacher_epochs")}
        return {key: value for key, value in found.items() if key not in but and value is not None}

    def setting(self):
        """Data set, images and length in words; runs in one table agree in each, or have None."""
        words, classes, held_out = self.args["dataset"], self.args["classes"], self.args["held_out"]
        words += f" with {classes} classes" * bool(classes) + f" with {held_out} held out" * bool(held_out)
        data = self.origin.get("data", {})  # which says too little in older logs
        images = f"images {data['train']} and {data['test']}" if "train" in data else None
        return words, images, f"{self.args['epochs']} epochs" if self.student() else None


def read_run(path):
    """A run's folder or log -> a `Run`, finished or not."""
    path = Path(path, "log.jsonl") if os.path.isdir(path) else Path(path)
    with explained(f"{path} is not a log of train.py", "name folders of runs, or logs"):
        origin, *epochs = map(json.loads, path.read_text().splitlines())
        held_out = origin.get("data", {}).get("held_out", origin["args"].get("held_out"))
        args = {"reduction": "mean"} | origin["args"] | {"held_out": held_out}  # older logs lack these
        run = Run(path, origin, args, epochs)
        require("dataset classes model schedule seed epochs", args)
        require("hardware threads torch", origin)
        if args["schedule"] not in NAMES:
            raise ValueError(f"schedule {args['schedule']!r}")
        for key in ("val_acc", "train_acc", "seconds", "beta", "lr", "loss_cls", "loss_guidance"):
            run.column(key)  # they are there, and numbers
        if run.guided():
            require("teacher_acc beta guide_epochs", origin | args)
    return run


def in_order(run):
    """The order of the rows: the student alone, then guided, weakly before strongly; CNNs last."""
    schedule, own = list(NAMES).index(run.args["schedule"]), run.options()
    strength = own.get("beta") or 0, own.get("guide_epochs") or 0
    return not run.student(), run.args["model"], schedule, *strength, run.args["seed"]


def belonging(runs):
    """The runs that share a table: finished, and of the data set, images and length of most students (a draw:
    the first by name; CNNs may have any length). One line names the others."""
    left = {}
    for run in runs:
        if len(run.epochs) != run.args["epochs"]:
            left[run.path] = f"{len(run.epochs)} of {run.args['epochs']} epochs"
    for i in range(3):
        stay = [run for run in runs if run.path not in left]
        found = {run.path: run.setting()[i] for run in stay}
        students = [found[run.path] for run in stay if run.student()]
        most = mode(sorted(filter(None, students)) or sorted(filter(None, found.values())) or [None])
        left |= {path: f"{words}, not {most}" for path, words in found.items() if words not in (None, most)}
    named = {reason: [str(path) for path in left if left[path] == reason] for reason in left.values()}
    named = "; ".join(f"{', '.join(paths)} ({reason})" for reason, paths in named.items())
    if not stay:
        raise InputError(f"no run is finished: {named}; finish one with --resume")
    if left:
        print(f"left out: {named}")
    return [run for run in runs if run.path not in left]


def read_rows(paths):
    """Runs by row of the table, {name: runs of several seeds}. A name is model, schedule and whatever else
    distinguishes the row from others of that model, guided ones or those alone."""
    runs, rows = belonging(sorted(map(read_run, sorted(map(str, paths))), key=in_order)), {}
    group = lambda run: (run.args["model"], run.args["schedule"] == "none")  # noqa: E731
    for run in runs:
        peers = [peer.options() for peer in runs if group(peer) == group(run)]
        words = [f"{run.args['model']} {NAMES[run.args['schedule']]}" if run.student() else run.args["model"]]
        for key, value in run.options("schedule").items():
            if any(peer.get(key) != value for peer in peers):
                words.append(f"{key.replace('_', ' ')} {str(value).removesuffix('.0')}")
        row = rows.setdefault(", ".join(words), [])
        if run.args["seed"] in [other.args["seed"] for other in row]:
            raise InputError(f"{run.path} repeats seed {run.args['seed']} of another run: leave one out")
        row.append(run)
    return rows


def measured(rows):
    """What accuracy was measured on, in words."""
    args = next(iter(rows.values()))[0].args
    where = "held-out" if args["held_out"] else "validation" if args["dataset"] == "folder" else "test"
    return f"{where} accuracy"


def alone(run, rows):
    """The name of the row without guidance that shares all other options of a guided run, if there is one."""
    if run.kind() == "alone":
        return None
    for name, (other, *_) in rows.items():
        if other.kind() == "alone" and other.options(*GUIDANCE) == run.options(*GUIDANCE):
            return name


def spread(values, sign=""):
    """Mean and, of several, standard deviation."""
    return f"{mean(values):{sign}.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def markdown(heads, lines):
    text = [f"| {' | '.join(cells)} |" for cells in (heads, *lines)]
    return "\n".join([text[0], "|---|" + "--:|" * (len(heads) - 1), *text[1:], ""])


def table(rows, timed=True):
    """The research summary's table: accuracy after the last epoch, best beside it, and time."""
    heads = ["", f"{measured(rows)} % of the last epoch", "n", "by seed", "of the best epoch"]
    heads += ["minutes", "seconds an epoch", "guidance adds"] * timed
    minutes = {name: mean(run.column("seconds").sum() / 60 for run in runs) for name, runs in rows.items()}
    lines, machines = [], set()
    for name, runs in rows.items():
        values, best = [run.last() for run in runs], [run.column("val_acc").max() for run in runs]
        without, epoch = minutes.get(alone(runs[0], rows)), 60 * minutes[name] / len(runs[0].epochs)
        added = f"{100 * (minutes[name] / without - 1):+.1f}%" if without else ""
        times = [f"{minutes[name]:.1f}", f"{epoch:.1f}", added] * timed
        each = ", ".join(f"{value:.2f}" for value in values)
        lines.append([name, spread(values), f"{len(runs)}", each, spread(best), *times])
        for origin in (run.origin for run in runs):
            threads = f"{origin['threads']} thread{'s' * (origin['threads'] > 1)}"
            machines.add(f"{origin['hardware']}, {threads}, torch {origin['torch']}")
    where = f"{'; '.join(sorted(machines))}. The commands are in the logs' first lines."
    return f"{markdown(heads, lines)}\n{where}\n"


def why(rows):
    """What guidance did: how well the training images are learnt, whether the student outgrows its teacher, and
    what guidance weighs beside cross-entropy."""
    heads = ["", "training accuracy % of the last epoch", "accuracy minus teacher's, points"]
    heads += ["beta*L / cross-entropy, last guided epoch", "the same, last epoch", "mean beta"]
    heads += ["mean beta, weighted by the learning rate"]
    lines = []
    for name, runs in rows.items():
        guidance = [""] * 5
        if all(run.guided() for run in runs):
            ahead = [run.last() - run.origin["teacher_acc"] for run in runs]
            weights = [run.weight(run.guided() - 1) for run in runs], [run.weight(-1) for run in runs]
            plain = [run.column("beta").mean() for run in runs]
            by_rate = [np.average(run.column("beta"), weights=run.column("lr")) for run in runs]
            numbers = map(mean, (*weights, plain, by_rate))
            guidance = [spread(ahead, "+"), *(f"{number:.3g}" for number in numbers)]
        lines.append([name, spread([run.last("train_acc") for run in runs]), *guidance])
    return markdown(heads, lines)


def same_teacher(*runs):
    """Whether runs had one teacher, as far as is known: older logs do not say, and runs alone have none."""
    return len({run.origin.get("teacher_crc") for run in runs} - {None}) < 2


def paired(rows):
    """Differences between rows, seed by seed: what varies with the seed (teacher, first weights, order, draws)
    is the same in both runs of a pair. Of two pairs, whose spread says little, there is no test."""
    heads, lines = ["last epoch, points", "mean ± std", "pairs", "t", "threshold", "95% interval", ""], []
    for one, other in combinations([name for name, runs in rows.items() if runs[0].student()], 2):
        before, after = ({run.args["seed"]: run for run in rows[name]} for name in (one, other))
        both = [(after[seed], before[seed]) for seed in after if seed in before]
        pairs = [run.last() - base.last() for run, base in both if same_teacher(run, base)]
        if len(pairs) > 2:
            t = T_975[min(len(pairs), 10) - 3]  # of more than 10 that of 10, which is a little too strict
            middle, half = mean(pairs), t * stdev(pairs) / len(pairs) ** 0.5
            verdict = "not told apart" if abs(middle) <= half else "higher" if middle > 0 else "lower"
            interval = f"{middle - half:+.2f} to {middle + half:+.2f}"
            numbers = [spread(pairs, "+"), f"{len(pairs)}", f"{t}", f"{half:.2f}", interval, verdict]
            lines.append([f"{other}, minus {one}", *numbers])
    note = "Paired t-tests at 5%: threshold = t * std / sqrt(pairs). Equal rows differ by chance in 1 test of 20."
    return f"{markdown(heads, lines)}\n{note}\n" if lines else ""


def styles(rows):
    """How to draw each row: line and colour say the schedule; of one schedule, the strongest is darkest."""
    kinds = {name: runs[0].args["schedule"] if runs[0].student() else "cnn" for name, runs in rows.items()}
    found = {}
    for i, (name, kind) in enumerate(kinds.items()):
        alike = [other for other in kinds if kinds[other] == kind]
        ink = 0.35 + 0.65 * (alike.index(name) + 1) / len(alike)
        colour = [1 - ink * (1 - part) for part in matplotlib.colors.to_rgb(COLOURS[kind])]
        found[name] = dict(color=colour, linestyle=LINES[kind], marker=MARKERS[i % 7])
    return found


def curve(axes, label, runs, key, style, by_time=False):
    """Draws mean and range over the runs of a row: the epochs' values of `key`, by epoch or by minute."""
    values = np.ma.masked_invalid([run.column(key) for run in runs])  # (runs, epochs)
    # the mean of a guidance loss is that over the seeds which are still guided, until there is none
    low, middle, high = values.min(axis=0), values.mean(axis=0), values.max(axis=0)
    minutes = np.cumsum([run.column("seconds") for run in runs], axis=1).mean(axis=0) / 60
    x = minutes if by_time else np.arange(1, len(middle) + 1)
    axes.plot(x, middle, **style, linewidth=1.6, markersize=5, markevery=max(1, len(x) // 8), label=label)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if key == "val_acc":  # marks the first epoch without guidance, of every seed
        ends = sorted({run.guided() for run in runs} - {0, len(middle)})
        axes.plot(x[ends], middle[ends], "|", color=style["color"], markersize=18, markeredgewidth=2.5)


def draw_curves(rows, columns, path, by_time=False):
    """Draws curves of all rows, a panel for each of the columns of the logs, {key: its name}."""
    figure, [panels] = subplots(1, len(columns), (6.4, 4.8) if len(columns) == 1 else (11, 3.8))
    looks, x = styles(rows), "minutes of training and validation" if by_time else "epochs"
    for axes, (key, label) in zip(panels, columns.items()):
        for name, runs in rows.items():
            curve(axes, f"{name} (n = {len(runs)})", runs, key, looks[name], by_time)
        axes.set(xlabel=x + " (|: guidance has ended)" * (key == "val_acc"), ylabel=label)
    save(figure, path, panels[0])


def draw_strength(rows, out):
    """strength.png: accuracy by beta, a line for each schedule, of runs that differ in nothing else. Of several
    such sets the one with most strengths, then with most runs."""
    sets, lines = {}, {}
    for run in (run for runs in rows.values() for run in runs):
        if run.args["schedule"] in ("constant", "early") and run.guided():
            sets.setdefault(str(sorted(run.options(*STRENGTH).items())), []).append(run)
    strengths = lambda runs: sorted({run.args["beta"] for run in runs})  # noqa: E731
    chosen = max(sets.values(), key=lambda runs: (len(strengths(runs)), len(runs)), default=[])
    if len(betas := strengths(chosen)) < 2:
        return print("no strength.png: it takes two strengths of guidance, all else equal")
    for run in chosen:
        ends = run.args["guide_epochs"]
        label = NAMES[run.args["schedule"]] + f" for {ends} epochs" * bool(ends)
        lines.setdefault(label, {}).setdefault(run.args["beta"], []).append(run)
    looks = styles({label: next(iter(points.values())) for label, points in lines.items()})
    figure, [[axes]] = subplots()
    for label, points in lines.items():
        means = [mean(map(Run.last, runs)) for runs in points.values()]
        axes.plot(points.keys(), means, **looks[label], label=label)
        each = [(beta, run.last()) for beta, runs in points.items() for run in runs]
        axes.plot(*zip(*each), ".", color=looks[label]["color"], alpha=0.5)
    teachers = {run.args["seed"]: run.origin["teacher_acc"] for run in chosen}.values()  # one for each seed
    beside = {f"the teacher, {chosen[0].origin.get('teacher_model') or 'a CNN'}": mean(teachers)}
    if name := alone(chosen[0], rows):
        beside[name] = mean(map(Run.last, rows[name]))
    for name, accuracy in beside.items():  # in words only: their lines, far off, would flatten the curves
        axes.plot([], [], " ", label=f"{name}: {accuracy:.1f}")
    axes.set(xscale="log", xlabel="beta at the start (dots: single runs, lines: means)")
    axes.set(ylabel=f"{measured(rows)} after the last epoch, %")
    axes.set_xticks(betas, [f"{beta:g}" for beta in betas])
    axes.minorticks_off()
    save(figure, out / "strength.png", axes)


def draw_gain(rows, out):
    """gain.png: does the run that learns the training images better also do better where accuracy is measured?
    A point for every two runs of one seed and teacher; beside those about stopping, the two betas."""
    found = {}
    for two in combinations([run for runs in rows.values() for run in runs if run.student()], 2):
        one, other = sorted(two, key=lambda run: (KINDS.index(run.kind()), run.column("beta").mean()))
        if one.args["seed"] == other.args["seed"] and same_teacher(*two):
            but = GUIDANCE if one.kind() == "alone" else STRENGTH
            words = f"{other.kind()} minus {'weaker ' * (one.kind() == other.kind())}{one.kind()}"
            if one.options(*but) != other.options(*but):
                words = "other options differ, too"
            gain = [other.last(key) - one.last(key) for key in ("train_acc", "val_acc")]
            found.setdefault(words, {}).setdefault((other.args["beta"], one.args["beta"]), []).append(gain)
    if sum(len(gains) for points in found.values() for gains in points.values()) < 3:
        return print("no gain.png: it takes three pairs of runs that share seed and teacher")
    figure, [[axes]] = subplots()
    first = "stopped minus constant"
    for i, words in enumerate(sorted(found, key=lambda words: words != first)):
        points = found[words]
        gains = np.concatenate([*points.values()])  # (pairs, 2)
        colour, label = [*COLOURS.values()][(i + 2) % 5], f"{words} (n = {len(gains)})"
        label += ", beside them: their betas" * (words == first)
        axes.plot(*gains.T, MARKERS[i % 7], color=colour, alpha=0.7, label=label)
        for j, (betas, gains) in enumerate(points.items() if words == first else ()):
            text, place = "{:g} vs {:g}".format(*betas), (6, (6, -12)[j % 2])  # neighbours seldom overlap
            axes.annotate(text, np.mean(gains, axis=0), xytext=place, textcoords="offset points", size=8)
    axes.axhline(0, color="grey", linewidth=1)
    axes.axvline(0, color="grey", linewidth=1)
    axes.margins(0.18)  # room for what stands beside the points
    axes.set(xlabel="gain in training accuracy, points", ylabel=f"gain in {measured(rows)}, points")
    save(figure, out / "gain.png", axes)


def confusion(counts, names, path):
    """Draws how many images (K, K) of each true class, a row, were taken for which class, a column."""
    counts = np.asarray(counts)
    shares, side = counts / counts.sum(axis=1, keepdims=True).clip(1), 4 + min(len(counts), 25) / 4
    figure, [[axes]] = subplots(1, 1, (side + 1, side))
    figure.colorbar(axes.imshow(100 * shares, "Blues", vmin=0, vmax=100), label="% of the true class")
    axes.grid(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(counts) <= 25:  # of more, nobody could read names and numbers
        names = [str(name)[:20].replace("$", r"\$") for name in names]  # $ would begin a formula
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for (row, column), share in np.ndenumerate(shares):
            ink = "white" if share > 0.5 else "black"
            axes.text(column, row, counts[row, column], color=ink, size=7, ha="center", va="center")
    save(figure, path)


@torch.no_grad()
def attention(model, images):
    """Attention in every block: images (B, 3, S, S) -> a list of (B, heads, 1 + N, 1 + N); rows sum to 1."""
    x = model.patch_embed(images).flatten(2).transpose(1, 2)
    x, found = torch.cat((model.cls_token.expand(len(images), -1, -1), x), dim=1) + model.pos_embed, []
    for block in model.blocks:
        qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.attn.heads, -1))  # (B, 1 + N, 3, h, d)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        found.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=3))
        x = block(x)
    return found


def attention_distance(weights, patch_size):
    """How far each head looks, in pixels: the mean distance from a patch to all, weighted by its attention to
    them, cls token left out (figure 7 of the ViT paper). (B, heads, 1 + N, 1 + N) -> (heads,). A patch that
    attends to nothing but the cls token does not count."""
    patches = weights[:, :, 1:, 1:]
    side = round(patches.shape[-1] ** 0.5)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float() * patch_size  # (N, 2)
    patches = patches / patches.sum(dim=3, keepdim=True)
    return (patches * torch.cdist(place, place)).sum(dim=3).nanmean(dim=(0, 2))


def look(rows, out, count=64):
    """attention.png, a maps-<row>.png of each guided row and examples.png, of the first run of every row."""
    args = next(iter(rows.values()))[0].args
    data = load(args["dataset"], args["data"], args["classes"], held_out=args["held_out"])
    chosen = data.x_test[torch.linspace(0, len(data.x_test) - 1, count).long()]
    figure, panels = subplots(4, 8, (8, 4.2))
    for axes, picture in zip(panels.flat, chosen):
        axes.imshow(picture.permute(1, 2, 0).numpy())
    save(figure, out / "examples.png")
    students = {name: runs[0] for name, runs in rows.items() if runs[0].student()}
    figure, [[axes]] = subplots()
    looks = styles({name: [run] for name, run in students.items()})
    for i, (name, run) in enumerate(students.items()):
        model, state = restore(run.path.with_name("last.pt"))
        images, patch = prepare(chosen, run.args["image_size"]), run.args["patch_size"]
        if state["projections"]:
            draw_maps(name, model, state, images[1::16], out)
        if not isinstance(model, VisionTransformer):
            print(f"no attention of {name}: it is drawn for the transformers of model.py only")
            continue
        far = torch.stack([attention_distance(w, patch) for w in attention(model, images)])
        blocks = torch.arange(len(far)) + 0.8 * ((i + 0.5) / len(students) - 0.5)  # rows side by side
        label = [f"{name}: mean {far.nanmean():.1f} px"] + ["_"] * (far.shape[1] - 1)
        axes.plot(blocks, far, **looks[name] | {"linestyle": "none"}, alpha=0.8, label=label)
        alike = attention_distance(torch.ones(1, 1, 1 + model.grid**2, 1 + model.grid**2), patch)
        axes.axhline(alike.item(), color="grey", linewidth=1)
    axes.set(xlabel="block (grey: attention to all patches alike)", ylabel="distance of each head, pixels")
    if axes.lines:
        save(figure, out / "attention.png", axes)


@torch.no_grad()
def draw_maps(name, model, state, images, out):
    """Draws images, and of each the teacher's maps beside the student's projected ones, channels averaged."""
    path = Path(state["origin"]["teacher"])
    if not os.path.isfile(path):
        return print(f"no maps for {name}: its teacher {path} is missing")
    with explained(f"{path} is not the teacher of {name}", "bring that one back"):
        teacher = load_teacher(load_checkpoint(path))
        guidance = Guidance(model.feature_channels, teacher.feature_channels)
        guidance.load_state_dict(state["projections"])
    _, theirs = teacher(F.interpolate(images, TEACHER_SIZE, mode="bilinear"))
    ours = [project(features) for project, features in zip(guidance.projections, model(images)[1])]
    pictures = images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    figure, panels = subplots(len(images), 1 + 2 * len(ours), (8.4, 0.5 + 1.25 * len(images)))
    figure.suptitle("Is a student's map bright where its teacher's is? Each standardised; one colour scale")
    for i, picture in enumerate(pictures):
        panels[i, 0].imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy())
        for j, maps in enumerate(maps for pair in zip(theirs, ours) for maps in pair):
            shown = maps[i].mean(dim=0)
            shown = F.layer_norm(shown, shown.shape)  # mean 0 and standard deviation 1 over the map
            panels[i, 1 + j].imshow(shown.numpy(), vmin=-3, vmax=3)
            panels[0, 1 + j].set_title(f"{('teacher', 'student')[j % 2]} {1 + j // 2}")
    file = re.sub(r"[^\w.]+", "-", name)
    save(figure, out / f"maps-{file}.png")


def subplots(rows=1, columns=1, inches=(6.4, 4.8)):
    """An empty figure and its panels, (rows, columns); several rows are for pictures and show no axes."""
    figure = matplotlib.figure.Figure(figsize=inches, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.axis("off") if rows > 1 else axes.grid(alpha=0.25)
    return figure, panels


def file_type(path):
    """The ending of a figure's name, refused if nothing can be drawn so."""
    kind = Path(path).suffix[1:].lower()
    if kind not in matplotlib.figure.Figure().canvas.get_supported_filetypes():
        raise InputError(f"cannot draw {path}: give it a name that ends in .png, .svg or .pdf")
    return kind


def save(figure, path, named=None):
    """Writes a figure, beneath it the legend of the axes `named`, and says so."""
    kind = file_type(path)
    if named:
        handles, labels = named.get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), frameon=False)
    write_whole(path, lambda file: figure.savefig(file, dpi=150, format=kind, bbox_inches="tight"))
    print(path)


def main():
    """The command line."""
    parser = Options(prog="plot.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs, or logs")
    parser.add_argument("--out", default="figures", metavar="DIR", help="where to write (default: figures)")
    parser.add_argument("--untimed", action="store_true", help="leave times out, where they mean nothing")
    parser.add_argument("--look", action="store_true", help="also look inside the networks, from last.pt")
    args = parser.parse_args()
    paths = [path for run in args.runs for path in matching(run) or [run]]
    rows, out, timed = read_rows(paths), Path(args.out), not args.untimed
    text = "\n".join(filter(None, (table(rows, timed), why(rows), paired(rows))))
    write_whole(out / "table.md", lambda file: file.write(text.encode()))
    print(text)
    accuracy = {"val_acc": f"{measured(rows)}, %"}
    losses = dict(beta="beta", loss_cls="cross-entropy, training", loss_guidance="guidance loss, unweighted")
    draw_curves(rows, accuracy, out / "accuracy.png")
    draw_curves(rows, losses, out / "losses.png")
    if timed:
        draw_curves(rows, accuracy, out / "time.png", by_time=True)
    draw_strength(rows, out)
    draw_gain(rows, out)
    if args.look:
        look(rows, out)


if __name__ == "__main__":
    command_line(main)
