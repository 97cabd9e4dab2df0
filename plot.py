"""
Pictures of training: the curves of runs, summaries of sweeps, and a page that follows a run.

    python plot.py out                                       # out/loss.png
    python plot.py out/a out/b --out=ab.svg --theme=dark     # several runs in one picture
    python plot.py out/sweeps/lr/results.jsonl               # a sweep: out/sweeps/lr/results.png
    python plot.py out/sweeps/lr/results.jsonl --write=lr.md # and its table as Markdown
    python plot.py --serve --out_dir=out                     # http://127.0.0.1:8000 follows the run

Name runs by their out_dir, or by a folder of several. Pictures need matplotlib, the page does not:
`pip install .[plot]`.
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
what = ""  # folders of runs or results.jsonl of sweeps, also with commas; empty: out_dir
out_dir = "out"  # of the run, if nothing else is named
out = ""  # the picture, .png or .svg; empty: loss.png or results.png beside what is drawn
theme = "light"  # light, for paper and screens; dark, for dark pages
# runs
x = ""  # of runs: steps, tokens, time, separated by commas; of a sweep: a setting; empty: all
panels = ""  # some of loss, bpb, grad_norm, lr, speed, separated by commas; empty: all
smoothing = 0.02  # distance at which a value has half its weight, as a part of the run; 0: none
# sweeps
curves = ""  # against steps, tokens or time; empty: whichever the runs have more equal
write = ""  # write the tables of the sweeps to this Markdown file
# the page
serve = False  # follow one run or several on a page of this machine
port = 8000  # 0: any free one
start = "Once upon a time"  # of the story that the latest model tells there; empty: no story
engine = ""  # the program that tells it; empty: run beside this script, otherwise sample.py
configure(globals(), positional="what", many=True)
# -----------------------------------------------------------------------------


def some_of(name, known):
    """The names in a setting, in order; all of the known ones if it is empty."""
    names = [word.strip() for word in globals()[name].split(",") if word.strip()]
    for word in names:
        if word not in known:
            raise UserError(f"{name} = {word!r}: expected some of {', '.join(known)}")
    return names or list(known)


def picture_of(path, name):
    """Where a picture goes: as `out` says, or beside what is drawn."""
    if out and not out.endswith(ENDINGS):
        raise UserError(f"out = {out}: expected a name that ends in .png or .svg")
    return out or os.path.join(path, f"{name}{'' if theme == 'light' else '-' + theme}.png")


def plot_sweeps(paths):
    """Print, write and draw the results of some sweeps."""
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
        picture = picture_of(os.path.dirname(path), stem)
        draw_sweep(results, picture, x, curves, theme)
        print_line(f"wrote {picture}")


def plot_runs(paths):
    """Draw the curves of some runs in one picture."""
    runs = find_runs(paths)
    for run in runs:
        if run.n_skipped:
            lines = f"{run.n_skipped:,} lines that train.py did not write"
            print_line(f"warning: {run.path}: skipping {lines}")
    if not any(run.train for run in runs):
        raise UserError(f"{paths[0]} has no step in its log yet")
    folder = paths[0] if os.path.isdir(paths[0]) else os.path.dirname(paths[0])
    picture = picture_of(folder, "loss")
    draw_runs(runs, picture, some_of("x", AXES), some_of("panels", PANELS), smoothing, theme)
    print_line(f"wrote {picture}")


if theme not in THEMES:
    raise UserError(f"theme = {theme!r}: expected one of {', '.join(THEMES)}")
check_range(0, 1, smoothing=smoothing)
paths = listed_paths(what) or [out_dir]
sweeps = [path for path in paths if path.endswith(".jsonl") and os.path.basename(path) != LOG]
if write and not (sweeps and write.endswith(".md")):
    raise UserError(f"write = {write}: expected a name that ends in .md, and results of sweeps")
if serve:
    if sweeps:
        raise UserError("--serve follows runs: name their folders, or the folder of the sweep")
    serve_runs(paths, port, start, engine)
elif sweeps:
    if len(sweeps) < len(paths):
        raise UserError("name runs or sweeps, not both at once")
    if out and len(sweeps) > 1:
        raise UserError("--out is one picture: name one sweep")
    if panels:
        raise UserError("--panels is of runs: name their folders")
    if curves and curves not in AXES:
        raise UserError(f"curves = {curves!r}: expected one of {', '.join(AXES)}")
    plot_sweeps(sweeps)
else:
    plot_runs(paths)
