"""Rebuilds figures and tables from what runs have written. It alone needs matplotlib: pip install matplotlib

Usage:
    python plot.py runs/* --out figures            accuracy by epoch and by time, losses, table.md; also from
                                                   logs alone: results/glyphs/*.jsonl
    python plot.py runs/* --out figures --untimed  without times: these runs shared a machine with others
    python plot.py runs/* --out figures --reach 78.15 82.06      and the minutes until so many % are reached
    python plot.py runs/* --out figures --look     and, from the runs' last.pt, how far attention reaches, the
                                                   feature maps, examples of the data set

Curves show the mean of the seeds and, shaded, their range. Runs that do not belong together are refused.
"""

import json
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

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
from plumbing.files import InputError, write_whole
from plumbing.options import Options, command_line
from plumbing.runs import load_checkpoint, restore
from teacher import CNNS, TEACHER_SIZE, load_teacher

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
LINES = ("-", "--", "-.", ":")  # so that a print without colours can be read as well
NAMES = {
    "none": "alone",
    "constant": "+ constant guidance",
    "early": "+ early guidance",
    "adaptive": "+ adaptive guidance",
}


def read_run(path):
    """A run's folder or log -> its first line and those of its epochs; refused if it is not finished."""
    path = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path)
    try:
        origin, *epochs = [json.loads(line) for line in path.read_text().splitlines()]
        [origin["args"][key] for key in ("dataset", "classes", "model", "schedule", "seed")]
        [line[key] for line in epochs for key in ("val_acc", "seconds", "beta", "loss_cls", "loss_guidance")]
        of = origin["args"]["epochs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no log of train.py ({error}); name folders of runs, or logs") from error
    if len(epochs) != of:
        raise InputError(f"{path} has {len(epochs)} of {of} epochs: finish that run first, or leave it out")
    return dict(path=path, origin=origin, args=origin["args"], epochs=epochs)


def in_order(run):
    """The order of the rows: the student alone, then guided; CNNs last."""
    args = run["args"]
    return args["model"] in CNNS, args["model"], list(NAMES).index(args["schedule"]), args["seed"]


def distinguishing(run):
    """What distinguishes the rows of a table: the run's options, and its teacher's network and length."""
    return run["args"] | {key: run["origin"].get(key) for key in ("teacher_model", "teacher_epochs")}


def read_rows(paths):
    """Runs by row of the table, {name: runs of several seeds}; refused if they do not belong together. A name
    is model, schedule and whatever other option, or network or length of the teacher, distinguishes the row."""
    runs, rows = sorted(map(read_run, sorted(map(str, paths))), key=in_order), {}
    students = [run for run in runs if run["args"]["model"] not in CNNS]
    for what, found in (
        ("data set", {run["args"]["dataset"] for run in runs}),
        ("classes", {run["args"]["classes"] for run in runs}),
        ("images", {str(run["origin"]["data"]) for run in runs if "data" in run["origin"]}),
        ("epochs", {run["args"]["epochs"] for run in students}),
    ):
        if len(found) > 1:
            raise InputError(
                f"these runs do not belong together: {what} {' and '.join(map(str, found))}; "
                "choose runs that do"
            )
    never = ("seed", "out", "data", "device", "resume", "evaluate", "teacher", "compile")
    for run in runs:
        args = distinguishing(run)
        peers = [
            distinguishing(peer)
            for peer in runs
            if (peer["args"]["model"], peer["args"]["schedule"]) == (args["model"], args["schedule"])
        ]
        other = [
            f"{key.replace('_', ' ')} {args[key]}"
            for key in args
            if key not in never
            and args[key] is not None
            and len({str(peer[key]) for peer in peers if key in peer}) > 1
        ]
        name = args["model"] if args["model"] in CNNS else f"{args['model']} {NAMES[args['schedule']]}"
        row = rows.setdefault(", ".join([name, *other]), [])
        if args["seed"] in [other["args"]["seed"] for other in row]:
            raise InputError(f"{run['path']} repeats seed {args['seed']} of another run: leave one out")
        row.append(run)
    return rows


def curve(axes, i, name, runs, key, by_time=False):
    """Draws row i: mean and range over its runs of the epochs' values of `key`, by epoch or by minute."""
    values, seconds = (
        np.array([[line[k] for line in run["epochs"]] for run in runs], float) for k in (key, "seconds")
    )  # (runs, epochs); None becomes NaN, and is not drawn
    x = seconds.cumsum(axis=1).mean(axis=0) / 60 if by_time else np.arange(1, values.shape[1] + 1)
    colour, label = COLOURS[i % len(COLOURS)], f"{name} (n = {len(runs)})"
    axes.plot(x, values.mean(axis=0), LINES[i % len(LINES)], color=colour, linewidth=1.8, label=label)
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def draw_curves(rows, out, timed=True):
    """accuracy.png, time.png where timed, and losses.png."""
    for file, label in (("accuracy", "epochs"), ("time", "minutes of training and validation"))[: 1 + timed]:
        figure, [[axes]] = subplots(1, 1, (6.4, 4.8))
        for i, (name, runs) in enumerate(rows.items()):
            curve(axes, i, name, runs, "val_acc", file == "time")
        axes.set(xlabel=label, ylabel="validation accuracy, %")
        save(figure, out / f"{file}.png", axes)
    figure, [panels] = subplots(1, 3, (11, 3.8))
    for axes, key, label in zip(
        panels,
        ("beta", "loss_cls", "loss_guidance"),
        ("beta", "cross-entropy, training", "guidance loss, unweighted"),
    ):
        for i, (name, runs) in enumerate(rows.items()):
            curve(axes, i, name, runs, key)
        axes.set(xlabel="epochs", ylabel=label)
    save(figure, out / "losses.png", panels[0])


def minutes_to(run, goal):
    """Minutes of training and validation until val_acc first is `goal` % or more; None if it never is."""
    minutes = np.cumsum([line["seconds"] for line in run["epochs"]]) / 60
    return next((m for m, line in zip(minutes.tolist(), run["epochs"]) if line["val_acc"] >= goal), None)


def table(rows, timed=True, reach=()):
    """The table of the research summary in Markdown: accuracy after the last epoch, best beside it, time, and
    the minutes until the accuracies `reach`, in %, are reached (-: not by all seeds)."""

    def spread(values):
        return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")

    minutes = {
        name: mean(sum(line["seconds"] for line in run["epochs"]) / 60 for run in runs)
        for name, runs in rows.items()
    }
    lines = ["| | val_acc % of the last epoch | n | by seed | of the best epoch |", "|---|--:|--:|---|--:|"]
    if timed:
        goals = "".join(f" minutes to {goal:g} % |" for goal in reach)
        lines = [f"{lines[0]} minutes | guidance adds |{goals}", lines[1] + "--:|" * (2 + len(reach))]
    for name, runs in rows.items():
        last = [run["epochs"][-1]["val_acc"] for run in runs]
        best = [max(line["val_acc"] for line in run["epochs"]) for run in runs]
        alone = minutes.get(name.replace(NAMES[runs[0]["args"]["schedule"]], NAMES["none"]))
        added = f"{100 * (minutes[name] / alone - 1):+.1f} %" if "guidance" in name and alone else ""
        each = ", ".join(f"{value:.2f}" for value in last)
        times = [[minutes_to(run, goal) for run in runs] for goal in reach]
        reached = "".join(f" {'-' if None in found else format(mean(found), '.1f')} |" for found in times)
        lines.append(
            f"| {name} | {spread(last)} | {len(runs)} | {each} | {spread(best)} |"
            + (f" {minutes[name]:.1f} | {added} |{reached}" if timed else "")
        )
    origins = [run["origin"] for runs in rows.values() for run in runs]
    where = sorted(
        {
            f"{o['hardware']}, {o['threads']} thread{'s' * (o['threads'] > 1)}, torch {o['torch']}"
            for o in origins
        }
    )
    return "\n".join([*lines, "", f"{'; '.join(where)}. The commands are in the logs' first lines.", ""])


T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's, for 2 to 10 pairs


def paired(rows):
    """Differences between rows, seed by seed, in Markdown: what varies with the seed (teacher, first weights,
    order, draws) is the same in both runs of a pair. The interval is that of a paired t-test at 5 %."""
    last = {
        name: {run["args"]["seed"]: run["epochs"][-1]["val_acc"] for run in runs}
        for name, runs in rows.items()
        if runs[0]["args"]["model"] not in CNNS
    }
    lines = ["| last epoch, points | mean ± std | pairs | 95 % interval | |", "|---|--:|--:|--:|---|"]
    for one, other in combinations(last, 2):
        pairs = [
            last[other][seed] - last[one][seed] for seed in sorted(last[one].keys() & last[other].keys())
        ]
        if 2 <= len(pairs) <= 10:
            half = T_975[len(pairs) - 2] * stdev(pairs) / len(pairs) ** 0.5
            low, high = mean(pairs) - half, mean(pairs) + half
            verdict = "not told apart" if low <= 0 <= high else "higher" if low > 0 else "lower"
            lines.append(
                f"| {other}, minus {one} | {mean(pairs):+.2f} ± {stdev(pairs):.2f} | {len(pairs)} | "
                f"{low:+.2f} to {high:+.2f} | {verdict} |"
            )
    return "\n".join([*lines, ""]) if len(lines) > 2 else ""


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
    """attention.png, maps-<schedule>.png and examples.png, from the first run of every row."""
    args = next(iter(rows.values()))[0]["args"]
    data = load(args["dataset"], args["data"], args["classes"])
    spread = torch.linspace(0, len(data.x_test) - 1, count).long()
    figure, panels = subplots(4, 8, (8, 4.2))
    for axes, i in zip(panels.flat, spread):
        axes.imshow(data.x_test[i].permute(1, 2, 0).numpy())
    save(figure, out / "examples.png")
    students = {name: runs[0] for name, runs in rows.items() if runs[0]["args"]["model"] not in CNNS}
    figure, [[axes]] = subplots(1, 1, (6.4, 4.8))
    for i, (name, run) in enumerate(students.items()):
        args = run["args"]
        model, state = restore(run["path"].with_name("last.pt"))
        images = prepare(data.x_test[spread], args["image_size"])
        distances = [attention_distance(w, args["patch_size"]) for w in attention(model.eval(), images)]
        label = f"{name}: mean {torch.stack(distances).nanmean():.1f} px"
        for block, heads in enumerate(distances):
            axes.plot(
                [block + (i - 1) / 8] * len(heads),
                heads.numpy(),
                "o^sDv<>"[i % 7],
                alpha=0.8,
                color=COLOURS[i % len(COLOURS)],
                label=None if block else label,
            )
        if state["projections"]:
            draw_maps(model, state, images[1::16], out / f"maps-{args['schedule']}.png")
        alike = attention_distance(torch.ones(1, 1, 1 + model.grid**2, 1 + model.grid**2), args["patch_size"])
        axes.axhline(alike.item(), color="grey", linewidth=1)
    axes.set(xlabel="block (grey: attention to all patches alike)", ylabel="distance of each head, pixels")
    save(figure, out / "attention.png", axes)


@torch.no_grad()
def draw_maps(model, state, images, path):
    """Draws images, and of each the teacher's maps beside the student's projected ones, channels averaged."""
    teacher = load_teacher(load_checkpoint(state["origin"]["teacher"]))
    guidance = Guidance(model.feature_channels, teacher.feature_channels)
    guidance.load_state_dict(state["projections"])
    _, theirs = teacher(F.interpolate(images, TEACHER_SIZE, mode="bilinear"))
    ours = [project(features) for project, features in zip(guidance.projections, model(images)[1])]
    shown = images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    figure, panels = subplots(len(images), 7, (8.4, 1.25 * len(images)))
    for row, picture in enumerate(shown):
        panels[row, 0].imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy())
        for stage in range(3):
            for side, maps in enumerate((theirs, ours)):
                panels[row, 1 + 2 * stage + side].imshow(maps[stage][row].mean(dim=0).numpy())
                panels[0, 1 + 2 * stage + side].set_title(f"{('teacher', 'student')[side]} {stage + 1}")
    save(figure, path)


def subplots(rows, columns, inches):
    """An empty figure and its panels, (rows, columns); several rows are for pictures and show no axes."""
    figure = matplotlib.figure.Figure(figsize=inches, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.axis("off") if rows > 1 else axes.grid(alpha=0.25)
    return figure, panels


def save(figure, path, named=None):
    """Writes a figure, beneath it the legend of the axes `named`, and says so."""
    if named:
        figure.legend(*named.get_legend_handles_labels(), loc="outside lower center", frameon=False)
    write_whole(path, lambda file: figure.savefig(file, dpi=150))
    print(path)


def main():
    """The command line."""
    parser = Options(prog="plot.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    parser.add_argument("--out", default="figures", metavar="DIR", help="where to write (default: figures)")
    parser.add_argument("--untimed", action="store_true", help="leave times out, as they say nothing")
    parser.add_argument("--reach", nargs="+", type=float, default=[], metavar="ACC", help="accuracies, in %%")
    parser.add_argument("--look", action="store_true", help="also draw from checkpoints, inside the networks")
    args = parser.parse_args()
    if args.reach and args.untimed:
        parser.error("--reach is about times: leave --untimed out")
    rows, out = read_rows(args.runs), Path(args.out)
    text = "\n".join(filter(None, (table(rows, not args.untimed, args.reach), paired(rows))))
    write_whole(out / "table.md", lambda file: file.write(text.encode()))
    print(text)
    draw_curves(rows, out, not args.untimed)
    if args.look:
        look(rows, out)


if __name__ == "__main__":
    command_line(main)
