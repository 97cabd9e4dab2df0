"""
Pictures of runs and sweeps, PNG or SVG, drawn with matplotlib (`pip install '.[plot]'`).

Lines differ in color (Okabe and Ito's palette for color-blind readers), dash and marker, so they
can be told apart in greyscale too.
"""

import contextlib
import os

from configurator import UserError
from report.curves import AXES, smooth
from report.sweeps import (
    format_value,
    label_of,
    mean_and_sd,
    sort_results,
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
# colors of text, background and grid lines
THEMES = {"light": ("#1f2328", "#ffffff", "#c8ccd1"), "dark": ("#d7dce2", "#14171b", "#3a4048")}
SCALE = {"light": (0.0, 0.85), "dark": (0.25, 1.0)}  # part of viridis used for ordered settings
ENDINGS = (".png", ".svg")
# name -> (label, kind of log line, its field, whether the y axis is logarithmic)
PANELS = {
    "loss": ("loss (nats per token)", "eval", "val_loss", False),
    "bpb": ("validation loss (bits per byte)", "eval", "val_bpb", False),
    "grad_norm": ("gradient norm", "train", "grad_norm", True),
    "lr": ("learning rate", "train", "lr", False),
    "speed": ("tokens/s", "train", "tok_s", False),
}
MAX_LEGEND = 12  # runs; pictures with more have no legend


@contextlib.contextmanager
def canvas(path, rows, columns, theme, panel=(4.6, 3.2)):
    """
    Open a figure of rows x columns panels, (figure, axes as a list of rows), and write it to path,
    .png or .svg, when the block ends.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("drawing needs the package matplotlib: pip install '.[plot]'") from None
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
        "svg.hashsalt": "0",  # equal pictures give equal files
        "text.parse_math": False,  # names may contain $
    }
    with matplotlib.rc_context(settings):
        size = (panel[0] * columns, panel[1] * rows)
        fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        try:
            yield fig, axes
            ending = os.path.splitext(path)[1]
            metadata = {"Date": None} if ending == ".svg" else {}
            with atomic_write(path) as f:
                fig.savefig(f, format=ending[1:], dpi=130, metadata=metadata)
        finally:
            plt.close(fig)


def style_of(i):
    """Return the color and dash of the i-th line."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}


def draw_runs(runs, path, xs=tuple(AXES), panels=tuple(PANELS), smoothing=0.02, theme="light"):
    """
    Draw one or more runs: loss and bits per byte against each of xs, then gradient norm, learning
    rate and throughput against the first. Noisy curves show a running mean over faint raw values;
    smoothing: as in curves.smooth().
    """
    wide = [p for p in panels if p in ("loss", "bpb")]
    narrow = [p for p in panels if p not in wide]
    if "bpb" in wide and not any(run.series("eval", "val_bpb", xs[0])[0] for run in runs):
        wide.remove("bpb")
    cells = [[(panel, x) for x in xs] for panel in wide]
    width = len(xs) if wide else max(1, min(3, len(narrow)))
    cells += [[(p, xs[0]) for p in narrow[i : i + width]] for i in range(0, len(narrow), width)]
    if not cells:
        raise UserError("nothing to draw: the logs of these runs contain no bits per byte")
    with canvas(path, len(cells), width, theme) as (fig, axes):
        for row, row_axes in zip(cells, axes, strict=True):
            for ax in row_axes[len(row) :]:
                ax.set_visible(False)
            for (panel, x), ax in zip(row, row_axes, strict=False):
                draw_panel(ax, runs, panel, x, smoothing)
        if 1 < len(runs) <= MAX_LEGEND:
            add_legend(fig, [run.name for run in runs])
        else:
            fig.suptitle(runs[0].name if len(runs) == 1 else f"{len(runs)} runs", fontsize=12)


def add_legend(fig, names):
    """Put a legend with the names of runs above a figure."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **style_of(i)) for i in range(len(names))]
    # matplotlib skips labels that start with _
    labels = [f" {name}" if name.startswith("_") else name for name in names]
    fig.legend(handles, labels, loc="outside upper center", ncols=min(4, len(names)))


def draw_panel(ax, runs, panel, x, smoothing):
    label, kind, value, is_log = PANELS[panel]
    is_single = len(runs) == 1
    for i, run in enumerate(runs):
        style = style_of(i)
        if panel == "loss":
            xs, losses = run.series("train", "loss", x)
            ax.plot(xs, losses, color=style["color"], alpha=0.3, linewidth=0.7)
            name = "training, running mean" if is_single else None
            ax.plot(xs, smooth(losses, smoothing), **style, linewidth=1.4, label=name)
        xs, values = run.series(kind, value, x)
        if kind == "eval":
            name = "validation" if is_single else None
            line = dict(style, color=COLORS[1]) if is_single and panel == "loss" else style
            marks = {"marker": MARKERS[i % len(MARKERS)], "markersize": 3.5, "linewidth": 1.2}
            ax.plot(xs, values, **line, **marks, label=name)
        elif panel == "lr" and is_single:
            for j, (role, ratio) in enumerate(run.rates().items()):
                ax.plot(xs, [ratio * v for v in values], **style_of(j), label=role or None)
        else:
            ax.plot(xs, values, color=style["color"], alpha=0.3, linewidth=0.7)
            mean = values if panel == "lr" else smooth(values, smoothing)
            ax.plot(xs, mean, **style, linewidth=1.3)
    highest = [max(run.series("train", "lr", x)[1], default=0) for run in runs]
    if is_log or (panel == "lr" and max(highest) > 20 * min(highest) > 0):
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        if high < 20 * low:  # too few powers of ten to label
            ax.yaxis.set_minor_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
    elif panel in ("speed", "lr"):
        ax.set_ylim(bottom=0)
    elif panel == "loss":  # the first steps would flatten the rest
        cut_top(ax, [run.series("train", "loss", x)[1] for run in runs])
    if panel == "speed":
        ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.set(xlabel=AXES[x][1], ylabel=label)
    if panel == "loss" and not is_single:
        ax.set_title("plain lines: training; with markers: validation", fontsize=8)
    ax.set_xlim(left=0)
    ax.locator_params(axis="x", nbins=6)  # labels for short times are long
    if is_single and ax.get_legend_handles_labels()[0] and panel in ("loss", "lr"):
        ax.legend()


def cut_top(ax, curves):
    """Lower the top of the y axis if the highest 2 % of the values would take up much of it."""
    values = sorted(v for curve in curves for v in curve)
    if len(values) < 20:
        return
    low, high = values[0], values[int(0.98 * (len(values) - 1))]
    if values[-1] > high + 0.5 * (high - low):
        ax.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def draw_sweep(lines, path, x="", curves="", theme="light"):
    """
    Draw a sweep. Left: the final loss against setting x, means and standard deviations with a dot
    for each seed and a cross where runs diverged. Right: the curves of all runs against `curves`, a
    key of AXES ("": tokens or time, whichever differs less between the runs).
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
    """Return "tokens" or "time", whichever differs less between the runs of a sweep."""
    finished = [line for line in lines if line["status"] == "finished"]

    def spread(name):
        values = [line[name] for line in finished] or [1]
        return max(values) / max(min(values), 1e-9)

    return "time" if spread("tokens") > 1.2 and spread("train_s") < spread("tokens") else "tokens"


def limits(lines, value):
    """Return (low, high) of a y axis that shows the runs that finished; None if none did."""
    finished = [line for line in lines if line["status"] == "finished"]
    points = [p[value] for line in finished for p in line["curve"][1:] or line["curve"]]
    points = [value for value in points if value is not None]
    finals = [line[value] for line in finished]
    if not finals:
        return None, None
    low, high = min(finals + points), max(finals + points)
    return low - 0.04 * (high - low) - 1e-3, high + 0.04 * (high - low) + 1e-3


def draw_summary(ax, summary, x, label):
    settings = [setting for _, row in summary for setting, _, _ in row]
    is_scale = all(map(is_number, settings)) and len(set(settings)) > 1
    order = list(dict.fromkeys(settings))
    crosses = []
    for i, (name, row) in enumerate(summary):
        style = style_of(i)
        row = sorted(row, key=lambda item: item[0]) if is_scale else row
        xs, means, deviations = [], [], []
        for setting, values, n_diverged in row:
            position = setting if is_scale else order.index(setting)
            if values:
                mean, deviation = mean_and_sd(values)
                xs, means = [*xs, position], [*means, mean]
                deviations.append(deviation)
                ax.plot([position] * len(values), values, ".", color=style["color"], alpha=0.55)
            if n_diverged:
                crosses.append(position)
        marks = {"marker": MARKERS[i % len(MARKERS)], "markersize": 5, "capsize": 3}
        style = style if is_scale else {**style, "linestyle": "none"}
        ax.errorbar(xs, means, deviations, **style, **marks, label=name or None)
    if crosses:  # at the top of the panel
        transform = ax.get_xaxis_transform()
        marks = {"transform": transform, "color": COLORS[1], "markersize": 8}
        ax.plot(crosses, [0.97] * len(crosses), "x", **marks)
        ax.plot([], [], "x", color=COLORS[1], label="diverged")
    if is_scale:
        if min(settings) > 0 and max(settings) / min(settings) >= 4:
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")
            if len(order) <= 10:
                ax.set_xticks(sorted(order), [format_value(v) for v in sorted(order)])
                ax.minorticks_off()
        ax.set_xlabel(x)
    else:
        turn = {"rotation": 20, "ha": "right"} if max(len(str(o)) for o in order) > 8 else {}
        if len(order) > MAX_LEGEND:
            turn = {"rotation": 90, "fontsize": 7}
        ax.set_xticks(range(len(order)), [format_value(o) for o in order], **turn)
        ax.set_xlim(-0.5, len(order) - 0.5)
        ax.set_xlabel("" if x in ("", "run") else x)
    ax.set_ylabel(f"final {label}")
    if ax.get_legend_handles_labels()[0]:
        ax.legend()


def draw_curves(ax, lines, x, series, value, against, scale):
    """Draw the curves of all runs, one color per setting; numeric settings get a color scale."""
    import matplotlib

    x_field, label, divisor = AXES[against]
    names = [name for name in (x, *series) if name]
    settings = {}
    for line in sort_results(lines, x, series):
        settings.setdefault(tuple(map(line["varied"].get, names)), []).append(line)
    is_scale = names == [x] and all(is_number(values[0]) for values in settings)
    for i, (values, runs) in enumerate(settings.items()):
        marks = {"marker": MARKERS[i % len(MARKERS)], "markersize": 2.5, "linewidth": 1}
        style = style_of(i) | marks
        if is_scale:
            position = scale[0] + (scale[1] - scale[0]) * i / max(1, len(settings) - 1)
            style["color"] = matplotlib.colormaps["viridis"](position)
        # if only one setting varies, its name is the title of the legend
        name = format_value(values[0]) if len(names) == 1 else label_of(runs[0]["varied"], names)
        for j, line in enumerate(runs):
            points = [p for p in line.get("curve", []) if is_number(p.get(value))]
            xs, ys = [p[x_field] / divisor for p in points], [p[value] for p in points]
            ax.plot(xs, ys, **style, alpha=0.8, label=name if j == 0 else None)
    ax.set_xlabel(label)
    ax.set_xlim(left=0)
    if 1 < len(settings) <= MAX_LEGEND:
        title = "" if series or x in ("", "run") else x
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), title=title, title_fontsize=8)
