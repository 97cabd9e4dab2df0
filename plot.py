"""
Draw the curves of training runs and the results of sweeps, or follow runs on a live page.

    python plot.py out                                        # out/loss.png
    python plot.py out/a out/b --out=ab.svg --theme=dark      # several runs in one picture
    python plot.py out/sweeps/lr/results.jsonl                # a sweep: out/sweeps/lr/results.png
    python plot.py out/sweeps/lr/results.jsonl --write=lr.md  # also its table as Markdown
    python plot.py --serve --out_dir=out                      # live page at http://127.0.0.1:8000

Pass the out_dir of each run, or a folder with several runs in it. Pictures need matplotlib
(`pip install '.[plot]'`); the live page does not.
"""

import os

from configurator import UserError, check_range, configure, listed_paths
from report.curves import AXES, find_runs
from report.live import serve_runs
from report.pictures import ENDINGS, PANELS, THEMES, draw_runs, draw_sweep
from report.sweeps import failures, read_sweep, section, table, title_of
from report.tables import markdown
from system.files import atomic_write
from system.progress import print_line
from training.runlog import LOG

# -----------------------------------------------------------------------------
# input
what = ""  # run folders or results.jsonl of sweeps; empty: out_dir
out_dir = "out"  # run folder, if no input is given
# pictures
out = ""  # .png or .svg file; empty: loss.png or results.png beside the input
theme = "light"  # light or dark
# pictures of runs
x = ""  # x axes: any of steps, tokens, time (empty: all); sweeps: a setting
panels = ""  # any of loss, bpb, grad_norm, lr, speed, comma-separated; empty: all
smoothing = 0.02  # fraction of the run over which smoothing weights halve; 0: off
# pictures of sweeps
curves = ""  # x axis of the curves: steps, tokens or time; empty: automatic
write = ""  # also write the tables to this Markdown file
# live page
serve = False  # serve a page that follows the runs
port = 8000  # port on 127.0.0.1; 0: any free port
start = "Once upon a time"  # prompt for a story by the latest model; empty: no story
engine = ""  # program that generates the story; empty: ./run, else sample.py
configure(globals(), positional="what", many=True)
# -----------------------------------------------------------------------------


def listed(name, choices):
    """Return the comma-separated values of a setting, or all choices if it is empty."""
    values = [value.strip() for value in globals()[name].split(",") if value.strip()]
    for value in values:
        if value not in choices:
            raise UserError(f"{name} = {value}: expected one of {', '.join(choices)}")
    return values or list(choices)


def picture_path(folder, stem):
    """Return where to write a picture: `out`, or a file in the folder of the input."""
    if out and not out.endswith(ENDINGS):
        raise UserError(f"out = {out}: expected a path ending in .png or .svg")
    return out or os.path.join(folder, f"{stem}{'' if theme == 'light' else '-' + theme}.png")


def plot_sweeps(paths):
    """Print, write and draw the results of sweeps."""
    sweeps = {path: read_sweep(path) for path in paths}
    for results in sweeps.values():
        print_line(f"\n{title_of(results)}\n\n{markdown(table(results, x))}\n")
        for sentence in failures(results):
            print_line(sentence)
    if write:
        with atomic_write(write, "w") as f:
            f.write("\n".join(section(results, x) for results in sweeps.values()))
        print_line(f"wrote {write}")
    for path, results in sweeps.items():
        stem = os.path.splitext(os.path.basename(path))[0]
        picture = picture_path(os.path.dirname(path), stem)
        draw_sweep(results, picture, x, curves, theme)
        print_line(f"wrote {picture}")


def plot_runs(paths):
    """Draw the curves of runs in one picture."""
    runs = find_runs(paths)
    for run in runs:
        if run.n_skipped:
            lines = f"{run.n_skipped:,} lines that are not from train.py"
            print_line(f"warning: {run.path}: skipping {lines}")
    if not any(run.train for run in runs):
        raise UserError(f"the log of {paths[0]} has no training steps yet")
    folder = paths[0] if os.path.isdir(paths[0]) else os.path.dirname(paths[0])
    picture = picture_path(folder, "loss")
    draw_runs(runs, picture, listed("x", AXES), listed("panels", PANELS), smoothing, theme)
    print_line(f"wrote {picture}")


if theme not in THEMES:
    raise UserError(f"theme = {theme}: expected {' or '.join(THEMES)}")
check_range(0, 1, smoothing=smoothing)
paths = listed_paths(what) or [out_dir]
sweeps = [path for path in paths if path.endswith(".jsonl") and os.path.basename(path) != LOG]
if write and not (sweeps and write.endswith(".md")):
    raise UserError(f"write = {write}: expected a path ending in .md, and results of sweeps")
if serve:
    if sweeps:
        raise UserError("--serve cannot be used with results of sweeps: use the sweep's folder")
    serve_runs(paths, port, start, engine)
elif sweeps:
    if len(sweeps) < len(paths):
        raise UserError("runs cannot be used with results of sweeps: use one command for each")
    if out and len(sweeps) > 1:
        raise UserError("--out cannot be used with several sweeps: use one command for each")
    if panels:
        raise UserError("--panels cannot be used with results of sweeps: use folders of runs")
    if curves and curves not in AXES:
        raise UserError(f"curves = {curves}: expected one of {', '.join(AXES)}")
    plot_sweeps(sweeps)
else:
    plot_runs(paths)
