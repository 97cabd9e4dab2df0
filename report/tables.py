"""Tables of texts: in columns for a terminal, and as Markdown."""

import sys

from system.progress import print_line


def widths_of(rows):
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def print_table(head, rows):
    """Print rows of texts in columns under their head, all but the first aligned to the right."""
    first_width, *widths = widths_of([head, *rows])
    for first, *others in (head, *rows):
        cells = (f"{text:>{width}}" for text, width in zip(others, widths, strict=True))
        print_line("  ".join([f"{first:<{first_width}}", *cells]))
    sys.stdout.flush()


def markdown(rows):
    """Rows of texts as a Markdown table, aligned so that a terminal shows it well."""
    widths = widths_of(rows)
    lines = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)
