"""Rebuilds figures and tables from what runs have written. It alone needs matplotlib: pip install matplotlib

    python plot.py runs/* --out figures            tables, curves, and what strength and early stopping change
    python plot.py runs/* --out figures --untimed  without times: these runs shared a machine with others
    python plot.py runs/* --out figures --look     also, from last.pt, attention, feature maps, example images

Logs alone will do: results/glyphs/*.jsonl. Curves show the mean of the seeds and, shaded, their range. Runs
that do not belong with most of the others are left out, and named.
"""

import json
import re
from itertools import combinations, cycle, product
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
from plumbing.files import InputError, explained, write_whole
from plumbing.options import WITHOUT_EFFECT, Options, command_line
from plumbing.runs import load_checkpoint, restore
from teacher import CNNS, TEACHER_SIZE, load_teacher

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
LINES = ("-", "--", "-.", ":", "-", "--", "-.")  # so that a print without colours can be read as well
STYLES = list(zip(COLOURS, LINES, "o^sDv<>"))
NAMES = {"none": "alone"} | {key: f"+ {key} guidance" for key in ("constant", "early", "adaptive")}
# A teacher makes another row by its network and length, which the logs of its students hold
NO_ROW = (
    "seed",
    "out",
    "data",
    "device",
    "resume",
    "evaluate",
    "teacher",
    "compile",
    "command",
    "recipe",
    "batch_given",
)
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's, for 2 to 10 pairs


class Run(NamedTuple):
    """A log: its path, its first line, the options in it, and a dictionary for each epoch."""

    path: Path
    origin: dict
    args: dict
    epochs: list

    def column(self, key):
        return np.array([line[key] for line in self.epochs], float)

    def guided(self):
        """Epochs with guidance; they are the first ones."""
        return int((self.column("beta") > 0).sum())

    def student(self):
        return self.args["model"] not in CNNS

    def options(self, *but):
        """What makes another row: options that have an effect, and the teacher's network and length."""
        but += NO_ROW + WITHOUT_EFFECT * (self.args["schedule"] == "none")
        teacher = {key: self.origin.get(key) for key in ("teacher_model", "teacher_epochs")}
        return {key: value for key, value in (self.args | teacher).items() if key not in but}

    def kinds(self):
        """Data set, images and length in words; runs in one table agree in each, or have None."""
        words, classes, held_out = self.args["dataset"], self.args["classes"], self.args["held_out"]
        words += f" with {classes} classes" * bool(classes) + f" with {held_out} held out" * bool(held_out)
        data = self.origin.get("data", {})  # which says too little in older logs
        images = f"images {data['train']} and {data['test']}" if "train" in data else None
        return words, images, f"{self.args['epochs']} epochs" if self.student() else None


def read_run(path):
    """A run's folder or log -> a `Run`, finished or not."""
    path = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path)
    with explained(f"{path} is no log of train.py", "name folders of runs, or logs"):
        origin, *epochs = map(json.loads, path.read_text().splitlines())
        held_out = origin.get("data", {}).get("held_out", origin["args"].get("held_out"))
        args = {"reduction": "mean"} | origin["args"] | {"held_out": held_out}  # older logs lack these
        [args[key] for key in ("dataset", "classes", "model", "seed", "epochs")], NAMES[args["schedule"]]
        [origin[key] for key in ("hardware", "threads", "torch")]
        [origin["teacher_acc"] for line in epochs if line["beta"]]
        keys = ("val_acc", "train_acc", "seconds", "beta", "loss_cls", "loss_guidance")
        np.array([[line[key] for key in keys] for line in epochs], float)
    return Run(path, origin, args, epochs)


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
        kinds = {run.path: run.kinds()[i] for run in stay}
        students = [kinds[run.path] for run in stay if run.student()]
        most = mode(sorted(filter(None, students)) or sorted(filter(None, kinds.values())) or [None])
        left |= {path: f"{kind}, not {most}" for path, kind in kinds.items() if kind not in (None, most)}
    named = {reason: [str(path) for path in left if left[path] == reason] for reason in left.values()}
    named = "; ".join(f"{', '.join(paths)} ({reason})" for reason, paths in named.items())
    if not stay:
        raise InputError(f"no run is finished: {named}; finish one with --resume")
    if left:
        print(f"left out: {named}")
    return [run for run in runs if run.path not in left]


def read_rows(paths):
    """Runs by row of the table, {name: runs of several seeds}. A name is model, schedule and whatever else
    distinguishes the row from others of that model and schedule."""
    runs, rows = belonging(sorted(map(read_run, sorted(map(str, paths))), key=in_order)), {}
    for run in runs:
        model, schedule = run.args["model"], run.args["schedule"]
        peers = [r.options() for r in runs if (r.args["model"], r.args["schedule"]) == (model, schedule)]
        words = [f"{model} {NAMES[schedule]}" if run.student() else model]
        for key, value in run.options().items():
            if value is not None and len({str(peer[key]) for peer in peers if key in peer}) > 1:
                words.append(f"{key.replace('_', ' ')} {str(value).removesuffix('.0')}")
        row = rows.setdefault(", ".join(words), [])
        if run.args["seed"] in [other.args["seed"] for other in row]:
            raise InputError(f"{run.path} repeats seed {run.args['seed']} of another run: leave one out")
        row.append(run)
    return rows


def measured(rows):
    """What accuracy was measured on, in a word."""
    return "held-out" if next(iter(rows.values()))[0].args["held_out"] else "validation"


def spread(values, sign=""):
    """Mean and, of several, standard deviation."""
    return f"{mean(values):{sign}.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def alone(name, rows):
    """The name of the row without guidance to compare a guided one with: of the same model and, if there are
    several, with the same other options. None if there is not one."""
    found = {other: runs[0] for other, runs in rows.items() if runs[0].args["schedule"] == "none"}
    run = rows[name][0]
    found = {other: r for other, r in found.items() if r.args["model"] == run.args["model"]}
    if len(found) > 1:
        idle = (*WITHOUT_EFFECT, "schedule", "teacher_model", "teacher_epochs")
        found = {other: r for other, r in found.items() if r.options(*idle) == run.options(*idle)}
    return next(iter(found)) if len(found) == 1 and run.args["schedule"] != "none" else None


def table(rows, timed=True):
    """The research summary's table in Markdown: accuracy after the last epoch, best beside it, and time."""
    what = {"validation": "val_acc", "held-out": "held-out accuracy"}[measured(rows)]
    lines = [f"| | {what} % of the last epoch | n | by seed | of the best epoch |", "|---|--:|--:|---|--:|"]
    if timed:
        lines = [f"{lines[0]} minutes | guidance adds |", f"{lines[1]}--:|--:|"]
    minutes = {name: mean(run.column("seconds").sum() / 60 for run in runs) for name, runs in rows.items()}
    for name, runs in rows.items():
        last, best = zip(*((run.column("val_acc")[-1], run.column("val_acc").max()) for run in runs))
        each = ", ".join(f"{value:.2f}" for value in last)
        lines.append(f"| {name} | {spread(last)} | {len(runs)} | {each} | {spread(best)} |")
        if timed:
            without = minutes.get(alone(name, rows))
            added = f"{100 * (minutes[name] / without - 1):+.1f}%" if without else ""
            lines[-1] += f" {minutes[name]:.1f} | {added} |"
    machines = set()
    for origin in (run.origin for runs in rows.values() for run in runs):
        threads = f"{origin['threads']} thread{'s' * (origin['threads'] > 1)}"
        machines.add(f"{origin['hardware']}, {threads}, torch {origin['torch']}")
    where = f"{'; '.join(sorted(machines))}. The commands are in the logs' first lines."
    return "\n".join([*lines, "", where, ""])


def why(rows):
    """What guidance did, in Markdown: how well the training images are learnt, whether the student outgrows
    its teacher, and the weight of guidance beside cross-entropy, when it ends, and over the run."""
    head = "| guided | train_acc % of the last epoch | student minus teacher, points"
    lines = [f"{head} | beta*L / cross-entropy, last guided epoch | mean beta |", "|---|--:|--:|--:|--:|"]
    for name, runs in rows.items():
        if all(run.guided() for run in runs):
            learnt = spread([run.column("train_acc")[-1] for run in runs])
            ahead = spread([run.column("val_acc")[-1] - run.origin["teacher_acc"] for run in runs], "+")
            ends = [run.epochs[run.guided() - 1] for run in runs]
            weight = mean(end["beta"] * end["loss_guidance"] / end["loss_cls"] for end in ends)
            beta = mean(run.column("beta").mean() for run in runs)
            lines.append(f"| {name} | {learnt} | {ahead} | {weight:.3g} | {beta:.3g} |")
    return "\n".join([*lines, ""]) if len(lines) > 2 else ""


def differences(runs, others, key):
    """Of the last epoch, runs - others, for every seed that both have."""
    other = {run.args["seed"]: run.column(key)[-1] for run in others}
    return [run.column(key)[-1] - other[run.args["seed"]] for run in runs if run.args["seed"] in other]


def paired(rows):
    """Differences between rows, seed by seed, in Markdown: what varies with the seed (teacher, first weights,
    order, draws) is the same in both runs of a pair. The interval is that of a paired t-test at 5%."""
    lines = ["| last epoch, points | mean ± std | pairs | 95% interval | |", "|---|--:|--:|--:|---|"]
    for one, other in combinations([name for name, runs in rows.items() if runs[0].student()], 2):
        pairs = differences(rows[other], rows[one], "val_acc")
        if len(pairs) > 1:  # more than 10 get the interval of 10, which is a little too wide
            half = T_975[min(len(pairs), 10) - 2] * stdev(pairs) / len(pairs) ** 0.5
            low, high = mean(pairs) - half, mean(pairs) + half
            verdict = "not told apart" if low <= 0 <= high else "higher" if low > 0 else "lower"
            numbers = f"{spread(pairs, '+')} | {len(pairs)} | {low:+.2f} to {high:+.2f}"
            lines.append(f"| {other}, minus {one} | {numbers} | {verdict} |")
    return "\n".join([*lines, ""]) if len(lines) > 2 else ""


def curve(axes, i, name, runs, key, by_time=False):
    """Draws row i: mean and range over its runs of the epochs' values of `key`, by epoch or by minute."""
    values = np.ma.masked_invalid([run.column(key) for run in runs])  # (runs, epochs)
    middle = values.mean(
        axis=0
    )  # of a guidance loss: over the seeds that are still guided, until there is none
    minutes = np.cumsum([run.column("seconds") for run in runs], axis=1).mean(axis=0) / 60
    x = minutes if by_time else np.arange(1, len(middle) + 1)
    colour, line, _ = STYLES[i % 7]
    axes.plot(x, middle, line, color=colour, linewidth=1.8, label=f"{name} (n = {len(runs)})")
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    if key == "val_acc":  # marks the first epoch without guidance, of every seed
        ends = sorted({run.guided() for run in runs} - {0, len(middle)})
        axes.plot(x[ends], middle[ends], "|", color=colour, markersize=15, markeredgewidth=2)


def draw_curves(rows, out, timed=True):
    """accuracy.png, time.png where timed, and losses.png."""
    for file, label in (("accuracy", "epochs"), ("time", "minutes of training and validation"))[: 1 + timed]:
        figure, [[axes]] = subplots()
        for i, (name, runs) in enumerate(rows.items()):
            curve(axes, i, name, runs, "val_acc", file == "time")
        axes.set(xlabel=f"{label} (|: guidance has ended)", ylabel=f"{measured(rows)} accuracy, %")
        save(figure, out / f"{file}.png", axes)
    figure, [panels] = subplots(1, 3, (11, 3.8))
    labels = ("beta", "cross-entropy, training", "guidance loss, unweighted")
    for axes, key, label in zip(panels, ("beta", "loss_cls", "loss_guidance"), labels):
        for i, (name, runs) in enumerate(rows.items()):
            curve(axes, i, name, runs, key)
        axes.set(xlabel="epochs", ylabel=label)
    save(figure, out / "losses.png", panels[0])


def families(rows):
    """Rows of constant and early guidance, in groups {name: runs} that differ in nothing but its strength."""
    found = {}
    for name, runs in rows.items():
        if runs[0].args["schedule"] in ("constant", "early") and runs[0].guided():
            others = runs[0].options("schedule", "beta", "guide_epochs")
            found.setdefault(str(sorted(others.items())), {})[name] = runs
    return list(found.values())


def draw_strength(rows, out):
    """strength.png: accuracy by beta, for the family with most strengths, if it has two."""
    found = [sorted({runs[0].args["beta"] for runs in family.values()}) for family in families(rows)]
    betas = max(found, key=len, default=[])
    if len(betas) < 2:
        return
    points = {}
    for runs in families(rows)[found.index(betas)].values():
        last, args = [run.column("val_acc")[-1] for run in runs], runs[0].args
        label = NAMES[args["schedule"]] + (f", {args['guide_epochs']} epochs" if args["guide_epochs"] else "")
        low, high = mean(last) - min(last), max(last) - mean(last)
        points.setdefault(label, []).append((args["beta"], mean(last), low, high))
    figure, [[axes]] = subplots()
    for (label, numbers), (colour, line, marker) in zip(points.items(), cycle(STYLES)):
        x, y, *ranges = np.array(numbers).T
        axes.errorbar(x, y, ranges, fmt=marker + line, color=colour, capsize=3, label=label)
    axes.set(xscale="log", xlabel="beta at the start", ylabel=f"{measured(rows)} accuracy, last epoch, %")
    axes.set_xticks(betas, [f"{beta:g}" for beta in betas])
    axes.minorticks_off()
    save(figure, out / "strength.png", axes)


def draw_gain(rows, out):
    """gain.png: what early guidance gains over constant where accuracy is measured, by what it gains on the
    training images; a point for every two runs of one seed, if there are three."""
    figure, [[axes]] = subplots()
    for family in families(rows):
        for (one, constant), (other, early) in product(family.items(), repeat=2):
            x, y = (differences(early, constant, key) for key in ("train_acc", "val_acc"))
            if x and (constant[0].args["schedule"], early[0].args["schedule"]) == ("constant", "early"):
                colour, _, marker = STYLES[len(axes.lines) % 7]
                axes.plot(x, y, marker, color=colour, label=f"{other}, minus {one}")
    if sum(len(line.get_xdata()) for line in axes.lines) > 2:
        axes.axhline(0, color="grey", linewidth=1)
        axes.axvline(0, color="grey", linewidth=1)
        axes.set(xlabel="gain in training accuracy, points", ylabel=f"gain in {measured(rows)} accuracy")
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
    for i, (name, run) in enumerate(students.items()):
        model, state = restore(run.path.with_name("last.pt"))
        images, patch = prepare(chosen, run.args["image_size"]), run.args["patch_size"]
        far = torch.stack([attention_distance(w, patch) for w in attention(model.eval(), images)])
        blocks = torch.arange(len(far)) + 0.8 * ((i + 0.5) / len(students) - 0.5)  # rows side by side
        (colour, _, marker), label = STYLES[i % 7], f"{name}: mean {far.nanmean():.1f} px"
        axes.plot(blocks, far, marker, alpha=0.8, color=colour, label=[label] + ["_"] * (far.shape[1] - 1))
        alike = attention_distance(torch.ones(1, 1, 1 + model.grid**2, 1 + model.grid**2), patch)
        axes.axhline(alike.item(), color="grey", linewidth=1)
        if state["projections"]:
            draw_maps(name, model, state, images[1::16], out)
    axes.set(xlabel="block (grey: attention to all patches alike)", ylabel="distance of each head, pixels")
    save(figure, out / "attention.png", axes)


@torch.no_grad()
def draw_maps(name, model, state, images, out):
    """Draws images, and of each the teacher's maps beside the student's projected ones, channels averaged."""
    path = Path(state["origin"]["teacher"])
    if not path.is_file():
        return print(f"no maps of {name}: its teacher {path} is not there")
    with explained(f"{path} is not the teacher of {name}", "bring that one back"):
        teacher = load_teacher(load_checkpoint(path))
        guidance = Guidance(model.feature_channels, teacher.feature_channels)
        guidance.load_state_dict({"scale": torch.ones(())} | state["projections"])  # older ones have no scale
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


def save(figure, path, named=None):
    """Writes a figure, beneath it the legend of the axes `named`, and says so."""
    kind = Path(path).suffix[1:].lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise InputError(f"cannot draw {path}: give it a name that ends in .png, .svg or .pdf")
    handles, labels = named.get_legend_handles_labels() if named else ([], [])
    if labels:
        figure.legend(handles, labels, loc="outside lower center", frameon=False)
        width, height = figure.get_size_inches()  # it needs room for long names, and for many
        width = max(width, 0.6 + 0.085 * max(map(len, labels)))
        figure.set_size_inches(width, height + 0.21 * max(0, len(labels) - 5))
    write_whole(path, lambda file: figure.savefig(file, dpi=150, format=kind))
    print(path)


def main():
    """The command line."""
    parser = Options(prog="plot.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs, or logs")
    parser.add_argument("--out", default="figures", metavar="DIR", help="where to write (default: figures)")
    parser.add_argument("--untimed", action="store_true", help="leave times out, as they say nothing")
    parser.add_argument("--look", action="store_true", help="also draw from checkpoints, inside the networks")
    args = parser.parse_args()
    rows, out = read_rows(args.runs), Path(args.out)
    text = "\n".join(filter(None, (table(rows, not args.untimed), why(rows), paired(rows))))
    write_whole(out / "table.md", lambda file: file.write(text.encode()))
    print(text)
    draw_curves(rows, out, not args.untimed)
    draw_strength(rows, out)
    draw_gain(rows, out)
    if args.look:
        look(rows, out)


if __name__ == "__main__":
    command_line(main)
