"""
Progress of long work: a bar on a terminal, occasional plain lines in a file or a pipe.

    for item in progress(items, desc="read"):
    with progress(total=n_bytes, unit="B", unit_scale=True, desc="download") as bar:
        bar.update(len(block))
"""

import sys

from configurator import printable

# tqdm is imported inside the functions: modal_app.py imports this module on machines without it


def progress(*args, **options):
    """Return a tqdm, or PlainLines if stderr is not a terminal; the arguments are tqdm's."""
    if sys.stderr.isatty():
        from tqdm import tqdm as Bar
    else:
        from system.plainlines import PlainLines as Bar
    return Bar(*args, **options)


def print_line(text, file=None):
    """
    Print text without disturbing a progress bar. Control characters are escaped, so it is safe for
    text from files.
    """
    from tqdm import tqdm

    tqdm.write(printable(text), file=file or sys.stdout)
