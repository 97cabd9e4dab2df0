"""
Pictures of runs and sweeps, PNG or SVG, by matplotlib (`pip install .[plot]`).

Lines differ by colour (Okabe and Ito's, which the colour-blind can tell apart), dash and marker, so
that a print in grey can be read too; the light theme is for paper, the dark one for dark pages.
"""

import contextlib
import os

from configurator import UserError
from report.curves import AXES, smooth
from report.sweeps import (
    in_order,
    label_of,
    mean_and_sd,
    show,
    summarize,
    sweep_axes,
    title_of,
    value_of,
)
from system.fields import is_number
from system.files import atomic_write

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MARKERS = "osD^vP*X"
# ink, paper, lines of the grid
THEMES = {"light": ("#1f2328", "#ffffff", "#c8ccd1"), "dark": ("#d7dce2", "#14171b", "#3a4048")}
SCALE = {"light": (0.0, 0.85), "dark": (0.25, 1.0)}  # of viridis, for ordered settings
ENDINGS = (".png", ".svg")
# name -> (label, kind of line, its field, whether the axis is logarithmic)
PANELS = {
    "loss": ("loss (nats a token)", "eval", "val_loss", False),
    "bpb": ("validation loss (bits per byte)", "eval", "val_bpb", False),
    "grad_norm": ("gradient norm", "train", "grad_norm", True),
    "lr": ("learning rate", "train", "lr", False),
    "speed": ("tokens/s", "train", "tok_s", False),
}
LEGEND = 12  # runs at most that are named


@contextlib.contextmanager
def canvas(path, rows, columns, theme, panel=(4.6, 3.2)):
    """
    A figure of rows x columns panels in a theme: (figure, axes as a list of rows), written to path,
    .png or .svg, when the block ends.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("pictures need matplotlib: pip install .[plot]") from None
    ink, paper, grid = THEMES[theme]
    settings = {
        **{f"{part}.facecolor": paper for part in ("figure", "axes", "savefig")},
        **{f"axes.{part}color": ink for part in ("label", "edge", "title")},
        **{f"{part}.color": ink for part in ("text", "xtick", "ytick")},
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "font.size": 9.5,
        "svg.hashsalt": "0",  # the same picture is the same file
        "text.parse_math": False,  # a name may have a $
    }
    with matplotlib.rc_context(settings):
        size = (panel[0] * columns, panel[1] * rows)
        fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        try:
            yield fig, axes
            kind = os.path.splitext(path)[1]
            about = {"Date": None} if kind == ".svg" else {}
            with atomic_write(path) as f:
                fig.savefig(f, format=kind[1:], dpi=130, metadata=about)
        finally:
            plt.close(fig)


def look(i):
    """Colour and dash of the i-th line."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}


def draw_runs(runs, path, xs=tuple(AXES), panels=tuple(PANELS), smoothing=0.02, theme="light"):
    """
    One or many runs: loss and bits per byte against each of xs, then gradient norm, rates and
    throughput against the first. Raw values of training are faint behind their running mean;
    smoothing: as in curves.smooth.
    """
    wide = [p for p in panels if p in ("loss", "bpb")]
    narrow = [p for p in panels if p not in wide]
    if "bpb" in wide and not any(run.series("eval", "val_bpb", xs[0])[0] for run in runs):
        wide.remove("bpb")
    cells = [[(panel, x) for x in xs] for panel in wide]
    width = len(xs) if wide else max(1, min(3, len(narrow)))
    cells += [[(p, xs[0]) for p in narrow[i : i + width]] for i in range(0, len(narrow), width)]
    if not cells:
        raise UserError("there is nothing to draw: these runs have no validation in bits per byte")
    with canvas(path, len(cells), width, theme) as (fig, axes):
        for row, of_row in zip(cells, axes, strict=True):
            for ax in of_row[len(row) :]:
                ax.set_visible(False)
            for (panel, x), ax in zip(row, of_row, strict=False):
                draw_panel(ax, runs, panel, x, smoothing)
        if 1 < len(runs) <= LEGEND:
            name_lines(fig, [run.name for run in runs])
        else:
            fig.suptitle(runs[0].name if len(runs) == 1 else f"{len(runs)} runs", fontsize=12)


def name_lines(fig, names):
    """A legend above a figure of several runs."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **look(i)) for i in range(len(names))]
    # matplotlib leaves out names that begin with _
    labels = [f" {name}" if name.startswith("_") else name for name in names]
    fig.legend(handles, labels, loc="outside upper center", ncols=min(4, len(names)))


def draw_panel(ax, runs, panel, x, smoothing):
    label, kind, value, is_log = PANELS[panel]
    alone = len(runs) == 1
    for i, run in enumerate(runs):
        style = look(i)
        if panel == "loss":
            at, losses = run.series("train", "loss", x)
            ax.plot(at, losses, color=style["color"], alpha=0.3, linewidth=0.7)
            name = "training, running mean" if alone else None
            ax.plot(at, smooth(losses, smoothing), **style, linewidth=1.4, label=name)
        at, values = run.series(kind, value, x)
        if kind == "eval":
            name = "validation" if alone else None
            marks = dict(style, color=COLORS[1]) if alone and panel == "loss" else style
            dots = {"marker": MARKERS[i % len(MARKERS)], "markersize": 3.5, "linewidth": 1.2}
            ax.plot(at, values, **marks, **dots, label=name)
        elif panel == "lr" and alone:
            for j, (role, part) in enumerate(run.rates().items()):
                ax.plot(at, [part * v for v in values], **look(j), label=role or None)
        else:
            ax.plot(at, values, color=style["color"], alpha=0.3, linewidth=0.7)
            mean = values if panel == "lr" else smooth(values, smoothing)
            ax.plot(at, mean, **style, linewidth=1.3)
    highest = [max(run.series("train", "lr", x)[1], default=0) for run in runs]
    if is_log or (panel == "lr" and max(highest) > 20 * min(highest) > 0):
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        if high < 20 * low:  # hardly a power of ten in it
            ax.yaxis.set_minor_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
    elif panel in ("speed", "lr"):
        ax.set_ylim(bottom=0)
    elif panel == "loss":  # the first steps would press all else to the ground
        cut_top(ax, [run.series("train", "loss", x)[1] for run in runs])
    if panel == "speed":
        ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.set(xlabel=AXES[x][1], ylabel=label)
    if panel == "loss" and not alone:
        ax.set_title("lines: training, with marks: validation", fontsize=8)
    ax.set_xlim(left=0)
    ax.locator_params(axis="x", nbins=6)  # labels of short times are long
    if alone and ax.get_legend_handles_labels()[0] and panel in ("loss", "lr"):
        ax.legend()


def cut_top(ax, curves):
    """Leave out what only the first 2 % of the values reach, where that is much."""
    values = sorted(v for curve in curves for v in curve)
    if len(values) < 20:
        return
    low, high = values[0], values[int(0.98 * (len(values) - 1))]
    if values[-1] > high + 0.5 * (high - low):
        ax.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def draw_sweep(lines, path, x="", curves="", theme="light"):
    """
    A sweep: on the left the final loss against setting x, means and standard deviations with a dot
    for each seed, a cross where runs diverged; on the right the curves of all runs against
    `curves`, of AXES ("": what the runs have equal, tokens or time).
    """
    value, label = value_of(lines)
    x, series = sweep_axes(lines, x)
    seeds = {line["varied"].get("seed") for line in lines}
    bars = f"{len(seeds)} seeds, bars: one standard deviation" if len(seeds) > 1 else "one seed"
    with canvas(path, 1, 2, theme, panel=(5.4, 4.0)) as (fig, [[left, right]]):
        draw_summary(left, summarize(lines, x, series, value), x, label)
        draw_curves(right, lines, x, series, value, curves or most_equal(lines), SCALE[theme])
        right.set(ylabel=label)
        right.set_ylim(*limits(lines, value))
        fig.suptitle(f"{title_of(lines)} ({bars})", fontsize=11.5)


def most_equal(lines):
    """tokens or time: of which the runs of a sweep differ less."""
    ended = [line for line in lines if line["status"] == "finished"]

    def spread(name):
        values = [line[name] for line in ended] or [1]
        return max(values) / max(min(values), 1e-9)

    return "time" if spread("tokens") > 1.2 and spread("train_s") < spread("tokens") else "tokens"


def limits(lines, value):
    """The range of an axis that shows the curves of what did not diverge."""
    finished = [line for line in lines if line["status"] == "finished"]
    points = [p[value] for line in finished for p in line["curve"][1:] or line["curve"]]
    points = [value for value in points if value is not None]
    finals = [line[value] for line in finished]
    if not finals:
        return None, None
    low, high = min(finals + points), max(finals + points)
    return low - 0.04 * (high - low) - 1e-3, high + 0.04 * (high - low) + 1e-3


def draw_summary(ax, found, x, label):
    places = [place for _, row in found for place, _, _ in row]
    is_scale = all(map(is_number, places)) and len(set(places)) > 1
    order = list(dict.fromkeys(places))
    crosses = []
    for i, (name, row) in enumerate(found):
        style = look(i)
        row = sorted(row, key=lambda item: item[0]) if is_scale else row
        at, means, deviations = [], [], []
        for place, values, n_diverged in row:
            where = place if is_scale else order.index(place)
            if values:
                mean, deviation = mean_and_sd(values)
                at, means = [*at, where], [*means, mean]
                deviations.append(deviation)
                ax.plot([where] * len(values), values, ".", color=style["color"], alpha=0.55)
            if n_diverged:
                crosses.append(where)
        marks = {"marker": MARKERS[i % len(MARKERS)], "markersize": 5, "capsize": 3}
        style = style if is_scale else {**style, "linestyle": "none"}
        ax.errorbar(at, means, deviations, **style, **marks, label=name or None)
    if crosses:  # at the top, wherever that is
        top = ax.get_xaxis_transform()
        ax.plot(crosses, [0.97] * len(crosses), "x", transform=top, color=COLORS[1], markersize=8)
        ax.plot([], [], "x", color=COLORS[1], label="diverged")
    if is_scale:
        if min(places) > 0 and max(places) / min(places) >= 4:
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")
            if len(order) <= 10:
                ax.set_xticks(sorted(order), [show(v) for v in sorted(order)])
                ax.minorticks_off()
        ax.set_xlabel(x)
    else:
        turn = {"rotation": 20, "ha": "right"} if max(len(str(o)) for o in order) > 8 else {}
        if len(order) > LEGEND:
            turn = {"rotation": 90, "fontsize": 7}
        ax.set_xticks(range(len(order)), [show(o) for o in order], **turn)
        ax.set_xlim(-0.5, len(order) - 0.5)
        ax.set_xlabel("" if x in ("", "run") else x)
    ax.set_ylabel(f"final {label}")
    if ax.get_legend_handles_labels()[0]:
        ax.legend()


def draw_curves(ax, lines, x, series, value, against, scale):
    """The curves of all runs, one colour for each setting: a scale of them where x is numbers."""
    import matplotlib

    place, label, divisor = AXES[against]
    names = [name for name in (x, *series) if name]
    settings = {}
    for line in in_order(lines, x, series):
        settings.setdefault(tuple(map(line["varied"].get, names)), []).append(line)
    is_scale = names == [x] and all(is_number(values[0]) for values in settings)
    for i, (values, of_setting) in enumerate(settings.items()):
        style = look(i) | {"marker": MARKERS[i % len(MARKERS)], "markersize": 2.5, "linewidth": 1}
        if is_scale:
            part = scale[0] + (scale[1] - scale[0]) * i / max(1, len(settings) - 1)
            style["color"] = matplotlib.colormaps["viridis"](part)
        # a single name is the title of the legend
        name = show(values[0]) if len(names) == 1 else label_of(of_setting[0]["varied"], names)
        for j, line in enumerate(of_setting):
            points = [p for p in line.get("curve", []) if is_number(p.get(value))]
            at, values_at = [p[place] / divisor for p in points], [p[value] for p in points]
            ax.plot(at, values_at, **style, alpha=0.8, label=name if j == 0 else None)
    ax.set_xlabel(label)
    ax.set_xlim(left=0)
    if 1 < len(settings) <= LEGEND:
        title = "" if series or x in ("", "run") else x
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), title=title, title_fontsize=8)
