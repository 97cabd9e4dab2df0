"""
Progress of long work: a bar on a terminal, and plain lines now and then in a file or a pipe.

    for item in progress(items, desc="read"):
    with progress(total=n_bytes, unit="B", unit_scale=True, desc="download") as bar:
        bar.update(len(block))
"""

import sys

from configurator import printable

# tqdm is imported where it is used: modal_app.py needs this module on machines that have only modal


def progress(*args, **options):
    """A tqdm for a terminal, or PlainLines where stderr is none; takes what tqdm takes."""
    if sys.stderr.isatty():
        from tqdm import tqdm as make
    else:
        from system.plainlines import PlainLines as make
    return make(*args, **options)


def print_line(text, file=None):
    """
    Print text between bars without breaking one. Use it for text from files: whatever they hold,
    the terminal gets nothing that it would obey.
    """
    from tqdm import tqdm

    tqdm.write(printable(text), file=file or sys.stdout)
