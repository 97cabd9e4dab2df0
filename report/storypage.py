"""
One HTML page with stories side by side and their figures above them, made from stories.html.
The page needs no network and runs no script. What a model or a path says is escaped; the page's
policy would not let it load or run anything either.
"""

import html
import itertools
import os
from string import Template

from report.stories import rows_of
from system.files import atomic_write

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "stories.html")


def marked(story, overlap):
    """The text of a story as HTML: the prompt faint, and what is copied marked."""
    n_prompt = len(story.prompt)
    spans = []  # of characters, one after another
    for first, end in overlap.runs(story) if overlap else ():
        begin = max(story.places[first][0], n_prompt)
        if spans and begin <= spans[-1][1]:
            begin = spans.pop()[0]
        spans.append((begin, story.places[end - 1][1]))
    prompt = html.escape(story.prompt)
    parts, at = [f'<span class="prompt">{prompt}</span>' if prompt else ""], n_prompt
    for begin, end in spans:
        copied = html.escape(story.text[begin:end])
        parts += [html.escape(story.text[at:begin]), f"<mark>{copied}</mark>"]
        at = end
    return "".join([*parts, html.escape(story.text[at:])])


def story_cell(name, story, overlap):
    if story is None:
        return "<td></td>"
    cut = "" if story.ended else ' <span class="cut">(cut at the limit)</span>'
    n_words = f"{story.n_words():,} word{'s' * (story.n_words() != 1)}"
    return (
        f'<td dir="auto" data-model="{html.escape(name)}"><p>{marked(story, overlap)}{cut}</p>'
        f'<div class="note small">{n_words}</div></td>'
    )


def html_table(attributes, head, rows):
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f"<table {attributes}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def figure_table(columns, n, n_words):
    names = "".join(f'<th class="value">{html.escape(name)}</th>' for name in columns)
    rows = []
    for label, *values, meaning in rows_of(columns, n, n_words):
        cells = "".join(f'<td class="value">{html.escape(value)}</td>' for value in values)
        note = f'<td class="note">{html.escape(meaning)}</td>'
        rows.append(f"<th>{html.escape(label)}</th>{cells}{note}")
    return html_table('class="figures"', f"<th></th>{names}<th></th>", rows)


def story_table(stories, overlaps):
    """stories, overlaps: by the name of a column its list of stories, its Overlap or None."""
    names = "".join(f"<th>{html.escape(name)}</th>" for name in stories)
    width = 3 + 18 * len(stories)  # rem; on a narrower screen, but not on a phone, the page scrolls
    of_columns = [overlaps[name] for name in stories]
    rows = [
        f"<th>{i}</th>{''.join(map(story_cell, stories, told, of_columns))}"
        for i, told in enumerate(itertools.zip_longest(*stories.values()), start=1)
    ]
    attributes = f'class="stories" style="min-width: {width}rem"'
    return html_table(attributes, f"<th></th>{names}", rows)


def write_page(path, title, stories, overlaps, columns, n, n_words, notes, settings):
    """
    Write the page. stories, overlaps, columns: by the name of a column its stories, its Overlap or
    None, its figures; n: words of an n-gram; n_words: how many words distinct-n is of; notes:
    sentences below the figures; settings: {name: value} for the footer.
    """
    legend = "Words of the prompt are faint." if any(s[0].prompt for s in stories.values()) else ""
    if any(overlaps.values()):
        legend = (
            f"<mark>Marked</mark>: {n} or more words in a row that the training text has too, case "
            f"and punctuation apart. {legend}"
        )
    used = " ".join(f"--{name}={value}" for name, value in settings.items())
    paragraphs = "\n".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    with open(TEMPLATE, encoding="utf-8") as f:
        template = Template(f.read())
    text = template.substitute(
        title=html.escape(title),
        figures=figure_table(columns, n, n_words),
        notes=paragraphs,
        legend=legend,
        stories=story_table(stories, overlaps),
        n_columns=len(columns),
        settings=html.escape(used),
    )
    with atomic_write(path) as f:
        f.write(text.encode("utf-8", "replace"))  # a path may hold what is no text
