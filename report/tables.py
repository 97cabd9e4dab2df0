"""Text tables, for a terminal and as Markdown."""

import sys

from system.progress import print_line


def widths_of(rows):
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def print_table(head, rows):
    """Print rows of text under a header row; all columns but the first are right-aligned."""
    first_width, *widths = widths_of([head, *rows])
    for first, *others in (head, *rows):
        cells = (f"{text:>{width}}" for text, width in zip(others, widths, strict=True))
        print_line("  ".join([f"{first:<{first_width}}", *cells]))
    sys.stdout.flush()


def markdown(rows):
    """Return rows of text as a Markdown table, aligned for reading in a terminal."""
    widths = widths_of(rows)
    lines = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)
