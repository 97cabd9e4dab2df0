"""
An HTML page that shows stories side by side below their metrics, from the template stories.html.
It needs no network and runs no script. Text from models and paths is escaped, and the page's
content security policy would block it from loading or running anything.
"""

import html
import itertools
import os
from string import Template

from report.stories import rows_of
from system.files import atomic_write

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "stories.html")


def marked(story, overlap):
    """Return the text of a story as HTML, with the prompt faint and copied words marked."""
    n_prompt = len(story.prompt)
    spans = []  # (start, end) of copied characters, in order, merged if they overlap
    for first, end in overlap.runs(story) if overlap else ():
        start = max(story.spans[first][0], n_prompt)
        if spans and start <= spans[-1][1]:
            start = spans.pop()[0]
        spans.append((start, story.spans[end - 1][1]))
    prompt = html.escape(story.prompt)
    parts, at = [f'<span class="prompt">{prompt}</span>' if prompt else ""], n_prompt
    for start, end in spans:
        copied = html.escape(story.text[start:end])
        parts += [html.escape(story.text[at:start]), f"<mark>{copied}</mark>"]
        at = end
    return "".join([*parts, html.escape(story.text[at:])])


def order_of(story):
    if not story.order:
        return ""
    lines = story.order.prompt().splitlines()[:-1]
    return f'<p class="note">{"<br>".join(map(html.escape, lines))}</p>'


def story_cell(name, story, overlap):
    if story is None:
        return "<td></td>"
    cut = "" if story.ended else ' <span class="cut">(cut at the limit)</span>'
    n_words = f"{story.n_words():,} word{'s' * (story.n_words() != 1)}"
    return (
        f'<td dir="auto" data-model="{html.escape(name)}">{order_of(story)}'
        f"<p>{marked(story, overlap)}{cut}</p>"
        f'<div class="note small">{n_words}</div></td>'
    )


def html_table(attributes, head, rows):
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f"<table {attributes}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def metrics_table(columns, n, n_words):
    names = "".join(f'<th class="value">{html.escape(name)}</th>' for name in columns)
    rows = []
    for label, *values, explanation in rows_of(columns, n, n_words):
        cells = "".join(f'<td class="value">{html.escape(value)}</td>' for value in values)
        note = f'<td class="note">{html.escape(explanation)}</td>'
        rows.append(f"<th>{html.escape(label)}</th>{cells}{note}")
    return html_table('class="metrics"', f"<th></th>{names}<th></th>", rows)


def story_table(stories, overlaps):
    """stories, overlaps: {column name: list of stories}, {column name: Overlap or None}."""
    names = "".join(f"<th>{html.escape(name)}</th>" for name in stories)
    width = 3 + 18 * len(stories)  # rem; narrower screens scroll, except phones
    column_overlaps = [overlaps[name] for name in stories]
    rows = [
        f"<th>{i}</th>{''.join(map(story_cell, stories, row, column_overlaps))}"
        for i, row in enumerate(itertools.zip_longest(*stories.values()), start=1)
    ]
    attributes = f'class="stories" style="min-width: {width}rem"'
    return html_table(attributes, f"<th></th>{names}", rows)


def write_page(path, title, stories, overlaps, columns, n, n_words, notes, settings):
    """
    Write the page. stories, overlaps, columns: for each column name, its stories, its Overlap or
    None, its metrics; n, n_words: as in Overlap and distinct(); notes: sentences below the metrics;
    settings: {name: value} for the footer.
    """
    legend = "Words of the prompt are faint." if any(s[0].prompt for s in stories.values()) else ""
    if any(overlaps.values()):
        legend = (
            f"<mark>Marked</mark>: {n} or more words in a row that also occur in the training "
            f"text, ignoring case and punctuation. {legend}"
        )
    used = " ".join(f"--{name}={value}" for name, value in settings.items())
    paragraphs = "\n".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    with open(TEMPLATE, encoding="utf-8") as f:
        template = Template(f.read())
    text = template.substitute(
        title=html.escape(title),
        metrics=metrics_table(columns, n, n_words),
        notes=paragraphs,
        legend=legend,
        stories=story_table(stories, overlaps),
        n_columns=len(columns),
        settings=html.escape(used),
    )
    with atomic_write(path) as f:
        f.write(text.encode("utf-8", "replace"))  # paths may hold lone surrogates
