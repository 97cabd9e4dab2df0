"""
Pictures of training: the curves of runs, summaries of sweeps, and a page that follows a run.

    python plot.py out                                       # out/loss.png
    python plot.py out/a,out/b --out=ab.svg --theme=dark     # several runs in one picture
    python plot.py out/sweeps/lr/results.jsonl               # a sweep: out/sweeps/lr/results.png
    python plot.py --serve --out_dir=out                     # http://127.0.0.1:8000 follows the run

Runs are named by their out_dir, or by a folder of several. Pictures need matplotlib, the page does
not: `pip install .[plot]`.
"""

import os

from configurator import UserError, configure
from report.curves import (
    AXES,
    find_runs,
    mean_and_sd,
    read_sweep,
    show,
    summarize,
    sweep_axes,
    value_of,
)
from report.pictures import ENDINGS, PANELS, THEMES, draw_runs, draw_sweep

# -----------------------------------------------------------------------------
what = ""  # folders of runs or results.jsonl of sweeps, with commas between them; empty: out_dir
out_dir = "out"  # of the run, where nothing else is named
out = ""  # the picture, .png or .svg; empty: loss.png or results.png, beside what is drawn
theme = "light"  # light, for paper and screens; dark, for dark pages
# runs
x = ""  # of runs: steps, tokens, time, with commas; of a sweep: one of its settings; empty: all
panels = ""  # some of loss, bpb, grad_norm, lr, speed, with commas; empty: all
smoothing = 0.02  # part of a run in which a value of the running mean counts half; 0: none
# sweeps
curves = ""  # of a sweep, against steps, tokens or time; empty: what its runs have equal
# the page
serve = False  # follow a run, or several, on a page of this machine
port = 8000  # 0: any that is free
start = "Once upon a time"  # of the story that the latest model tells there; empty: no story
engine = ""  # the program that tells it; empty: run beside this script, or sample.py without it
configure(globals(), positional="what")
# -----------------------------------------------------------------------------


def some_of(name, known):
    """The names in a setting, in order; all of the known ones where it is empty."""
    names = [word.strip() for word in globals()[name].split(",") if word.strip()]
    for word in names:
        if word not in known:
            raise UserError(f"{name} = {word!r}: expected some of {', '.join(known)}")
    return names or list(known)


def table(lines):
    """Print the results of a sweep."""
    value, label = value_of(lines)
    place, series = sweep_axes(lines, x)
    print(f"{lines[0].get('title') or lines[0]['sweep']}: final {label}")
    for name, row in summarize(lines, place, series, value):
        for at, values, n_diverged in row:
            here = show(at) if place in ("", "run") else f"{place} = {show(at)}"
            words = ", ".join(filter(None, (name, here)))
            said = ""
            if values:
                mean, deviation = mean_and_sd(values)
                spread = f" ± {deviation:.4f}" if len(values) > 1 else ""
                said = f"{mean:.4f}{spread} ({len(values)})"
            said += f" {n_diverged} diverged" if n_diverged else ""
            print(f"  {words:<40} {said}")
    failed = sum(line["status"] == "failed" for line in lines)
    if failed:
        print(f"  {failed} runs failed, which results.jsonl says more about")


def picture_of(path, name):
    """Where a picture goes: as `out` says, or beside what is drawn."""
    if out and not out.endswith(ENDINGS):
        raise UserError(f"out = {out}: expected a name that ends in .png or .svg")
    return out or os.path.join(path, f"{name}{'' if theme == 'light' else '-' + theme}.png")


if theme not in THEMES:
    raise UserError(f"theme = {theme!r}: expected one of {', '.join(THEMES)}")
if not 0 <= smoothing <= 1:
    raise UserError(f"smoothing = {smoothing}: expected a number from 0 to 1")
named = [word.strip() for word in what.split(",") if word.strip()] or [out_dir]
sweeps = [
    name for name in named if name.endswith(".jsonl") and os.path.basename(name) != "log.jsonl"
]
if serve:
    from report.live import serve_runs

    if sweeps:
        raise UserError("--serve follows runs: name their folders, or the folder of the sweep")
    serve_runs(named, port, start, engine)
elif sweeps:
    if len(sweeps) < len(named):
        raise UserError("name runs or sweeps, not both at once")
    if out and len(sweeps) > 1:
        raise UserError("--out is one picture: name one sweep")
    if panels:
        raise UserError("--panels is of runs: name their folders")
    if curves and curves not in AXES:
        raise UserError(f"curves = {curves!r}: expected one of {', '.join(AXES)}")
    for path in sweeps:
        lines = read_sweep(path)
        table(lines)
        stem = os.path.splitext(os.path.basename(path))[0]
        picture = picture_of(os.path.dirname(path), stem)
        draw_sweep(lines, picture, x, curves, theme)
        print(f"wrote {picture}")
else:
    runs = find_runs(named)
    if not any(run.train for run in runs):
        raise UserError(f"{named[0]} has no step in its log yet")
    picture = picture_of(named[0] if os.path.isdir(named[0]) else os.path.dirname(named[0]), "loss")
    xs, panels = some_of("x", AXES), some_of("panels", PANELS)
    draw_runs(runs, picture, xs, panels, smoothing, theme)
    print(f"wrote {picture}")
