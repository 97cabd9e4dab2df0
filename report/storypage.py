"""
One HTML page with stories side by side and their figures above them. It needs no network and runs
no script; it has a dark form, and one for paper.
"""

import html
import itertools

from report.stories import rows_of
from system.files import atomic_write

# what a model or a path says cannot load or run anything, even if it were not escaped
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --faint: #656d76;
  --line: #d8dee4; --band: #f6f8fa; --copied: #fff1c2; }
@media (prefers-color-scheme: dark) { :root { --ink: #d7dce2; --paper: #14171b; --faint: #8d96a0;
  --line: #30363d; --band: #1c2026; --copied: #4a3d12; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 110rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; }
code { font-size: .9em; overflow-wrap: anywhere; }
table { border-collapse: collapse; }
th, td { padding: .3rem .8rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); unicode-bidi: isolate; }
thead th { position: sticky; top: 0; background: var(--band); overflow-wrap: anywhere; }
.figures thead th { min-width: 7rem; }
tbody th { font-weight: 600; white-space: nowrap; }
.figures td.value, .figures th.value { text-align: right; font-variant-numeric: tabular-nums; }
.figures td.value { white-space: nowrap; }
.note { color: var(--faint); }
.stories { width: 100%; table-layout: fixed; }
.stories th:first-child { width: 2.5rem; color: var(--faint); text-align: right; }
.stories p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .4rem; max-width: 45rem; }
.prompt { color: var(--faint); }
mark { background: var(--copied); color: var(--ink); border-radius: .15rem; }
.cut { font-style: italic; }
.note.small { font-size: .85rem; }
footer { margin-top: 2rem; border-top: 1px solid var(--line); font-size: .9rem; }
@media print {
  :root { --ink: #000; --paper: #fff; --faint: #555; --line: #bbb; --band: #eee;
    --copied: #fff1c2; color-scheme: light; }
  body { padding: 0; max-width: none; font-size: 9pt; }
  mark { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .stories { min-width: 0 !important; }
  tr { break-inside: avoid; }
  thead th { position: static; }
}
"""


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


def story_cell(story, overlap):
    if story is None:
        return "<td></td>"
    cut = "" if story.ended else ' <span class="cut">(cut at the limit)</span>'
    n_words = f"{story.n_words():,} word{'s' * (story.n_words() != 1)}"
    return (
        f'<td dir="auto"><p>{marked(story, overlap)}{cut}</p>'
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
    width = 3 + 18 * len(stories)  # rem; on a narrower screen the page scrolls
    of_columns = [overlaps[name] for name in stories]
    rows = [
        f"<th>{i}</th>{''.join(map(story_cell, told, of_columns))}"
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
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{figure_table(columns, n, n_words)}
{paragraphs}
<h2>Side by side</h2>
<p class="note">{legend}</p>
{story_table(stories, overlaps)}
<footer><p class="note">Made by generate.py with <code>{html.escape(used)}</code></p></footer>
</body>
</html>
"""
    with atomic_write(path) as f:
        f.write(text.encode("utf-8", "replace"))  # a path may hold what is no text
