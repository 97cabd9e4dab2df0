"""
Stories as text, and what can be counted of them: how varied they are, how much of them the training
text has too, and how they end. generate.py prints these figures; storypage.py shows them.

Words are runs of letters and digits in lower case, with the apostrophes inside them; punctuation is
dropped. Words and n-grams (n words in a row) that lie wholly inside the prompt count nowhere.

To add a figure: a row in FIGURES, and its value in figures_of().
"""

import itertools
import json
import random
import re
import statistics
from collections import Counter

import numpy as np

from configurator import STEERING, UserError, check_range
from dataset import CHUNK, mixed
from system.files import atomic_write
from text.documents import stream_documents

BREAK = "\0"  # between documents: a word that no story has, so that no n-gram goes across
WORD = re.compile(rf"{BREAK}|[^\W_]+(?:'[^\W_]+)*")
ENDING = re.compile(r"""[.!?…]["'”’»)]*\s*$""")
PIECE = 1 << 20  # characters of training text that are looked at together


def check_sampling(settings, **least):
    """
    Raise UserError unless the settings of a script that samples can be used; least: the smallest
    value of each of those that are whole numbers.
    """
    for name, smallest in least.items():
        check_range(smallest, **{name: settings[name]})
    for name, most in {"temperature": 100, "seed": 2**63 - 1, "top_p": 1}.items():
        check_range(0, most, **{name: settings[name]})


def read_prompt(start):
    """The prompt that a setting stands for: itself, or with FILE: before it the text of a file."""
    if not start.startswith("FILE:"):
        return start
    try:
        with open(start.removeprefix("FILE:"), encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is no text in UTF-8"
        raise UserError(f"cannot read the prompt {start}: {why}") from None


# ---- words


def lowered(text):
    """Text in lower case, and with one kind of apostrophe; no character changes its place."""
    lower = text.lower()
    if len(lower) != len(text):  # İ, for one, becomes two characters
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    return lower.replace("’", "'")


def words_of(text):
    return WORD.findall(lowered(text))


def printable(text):
    """Text without what no page or terminal shows, BREAK among it."""
    return STEERING.sub("\ufffd", text)


class Story:
    """
    A story with the prompt it began from: text, n_tokens (without the prompt's), and `ended`,
    whether it came to its end by itself. Words 0 to n_prompt are the prompt's own.
    """

    def __init__(self, text, n_tokens, ended=True, prompt=""):
        self.text, prompt = printable(text), printable(prompt)
        self.n_tokens, self.ended = n_tokens, ended
        self.prompt = prompt if self.text.startswith(prompt) else ""
        matches = list(WORD.finditer(lowered(self.text)))
        self.words = [match.group() for match in matches]
        self.places = [match.span() for match in matches]  # of each word in the text
        pairs = zip(self.words, words_of(self.prompt), strict=False)
        # a word that the prompt only begins is the story's
        self.n_prompt = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def n_words(self):
        return len(self.words) - self.n_prompt

    def n_grams(self, n, n_words=None):
        """Its n-grams, tuples of words, up to word n_words behind the prompt."""
        end = len(self.words) if n_words is None else min(self.n_prompt + n_words, len(self.words))
        first = max(self.n_prompt - n + 1, 0)
        return [tuple(self.words[i : i + n]) for i in range(first, end - n + 1)]

    def ends_properly(self):
        """Whether it ended by itself, behind . ! ? or a quotation mark after one of them."""
        return self.ended and bool(ENDING.search(self.text))


def distinct(stories, n, n_words):
    """
    distinct-n (Li et al. 2016, arXiv:1510.03055): different n-grams / all n-grams, over the first
    n_words words of the stories together. It falls with the amount of text, so only values of the
    same n_words can be compared. None where there is no n-gram.
    """
    n_grams, left = [], n_words
    for story in stories:
        n_grams += story.n_grams(n, left)
        left -= min(left, story.n_words())
    return len(set(n_grams)) / len(n_grams) if n_grams else None


# ---- what the training text has too


class Overlap:
    """
    Which n-grams of some stories a text has that streams past. Only the stories' n-grams are kept,
    as 64-bit hashes: among a million of them and a billion in the text, one in 20,000 comparisons
    has a single n-gram taken for another.
    """

    def __init__(self, stories, n):
        self.n, self.n_words = n, 0  # words of the text so far
        words = dict.fromkeys(word for story in stories for word in story.words)
        self.ids = {word: i for i, word in enumerate(words, start=1)}  # 0: no story has it
        # a random number for each word; the multiplier is that of Knuth's MMIX
        self.numbers = mixed(np.arange(1, len(words) + 2, dtype=np.uint64))
        self.factor = np.uint64(6364136223846793005)
        self.hashes = np.unique(np.concatenate([self.hashed(story.words) for story in stories]))
        self.seen = np.zeros(len(self.hashes), dtype=bool)
        # most n-grams of a text are passed over by one look at a table of their last bits
        self.mask = np.uint64((1 << 22) - 1)
        self.table = np.zeros(1 << 22, dtype=bool)
        self.table[self.hashes & self.mask] = True

    def hashed(self, words):
        """A hash of each n-gram of a list of words, uint64 (max(len(words) - n + 1, 0),)."""
        n_grams = max(len(words) - self.n + 1, 0)
        ids = map(self.ids.get, words, itertools.repeat(0))
        numbers = self.numbers[np.fromiter(ids, np.int64, len(words))]
        hashes = np.zeros(n_grams, dtype=np.uint64)
        for k in range(self.n if n_grams else 0):
            hashes = hashes * self.factor + numbers[k : k + n_grams]
        return hashes

    def feed(self, text):
        """Look for the stories' n-grams in some whole documents with BREAK between them."""
        words = words_of(text)
        self.n_words += len(words) - words.count(BREAK)
        hashes = self.hashed(words)
        hashes = hashes[self.table[hashes & self.mask]]
        places = np.searchsorted(self.hashes, hashes)
        places[places == len(self.hashes)] = 0
        self.seen[places[self.hashes[places] == hashes]] = True

    def found(self, story):
        """Of each n-gram of a story whether the text has it, bool; those of the prompt left out."""
        first = max(story.n_prompt - self.n + 1, 0)
        hashes = self.hashed(story.words)[first:]
        return self.seen[np.searchsorted(self.hashes, hashes)]

    def runs(self, story):
        """
        The longest rows of words, all of whose n-grams the text has, as (first, end) word numbers.
        The prompt's words are cut off. Rows may share words.
        """
        first, at = max(story.n_prompt - self.n + 1, 0), 0
        for is_found, group in itertools.groupby(self.found(story)):
            size = len(list(group))
            if is_found:
                begin = max(first + at, story.n_prompt)
                yield begin, first + at + size + self.n - 1
            at += size


def pieces_of(documents):
    """
    Yield (documents with BREAK between them, amount) of an iterable of (text, amount), about PIECE
    characters at a time.
    """
    texts, size, total = [], 0, 0
    for text, amount in documents:
        texts.append(text)
        size, total = size + len(text), total + amount
        if size >= PIECE:
            yield BREAK.join(texts), total
            texts, size, total = [], 0, 0
    yield BREAK.join(texts), total


def documents_of_file(path, is_book=False):
    """Yield (text, bytes read for it) of each document of a text file, as a stream."""
    before = 0
    for text, at in stream_documents(path, is_book):
        yield text, at - before
        before = at


def documents_of_shard(shard, tokenizer):
    """Yield (text, number of tokens) of each document of a token shard."""
    table = tokenizer.piece_bytes()
    starts = [
        i + np.flatnonzero(shard[i : i + CHUNK] == tokenizer.bos_id)
        for i in range(0, len(shard), CHUNK)
    ]
    borders = [-1, *np.concatenate(starts).tolist(), len(shard)]  # text before the first BOS too
    for begin, end in itertools.pairwise(borders):
        ids = shard[begin + 1 : end].tolist()
        text = b"".join(map(table.__getitem__, ids)).decode(errors="replace").strip()
        if text:
            yield text, len(ids)


def some_of(items, n, seed):
    """n of an iterable's items in their order, each as likely as any other; all if they are few."""
    chosen, random_numbers = [], random.Random(seed)  # reservoir sampling: algorithm R
    for i, item in enumerate(items):
        if i < n:
            chosen.append((i, item))
        elif (place := random_numbers.randrange(i + 1)) < n:
            chosen[place] = i, item
    return [item for _, item in sorted(chosen, key=lambda pair: pair[0])]


# ---- figures


# name -> (label, number format, an explanation with {n}, {n_words}, or none of them)
FIGURES = {
    "stories": ("stories", ",", "how many there are"),
    "bits_per_byte": (
        "bits per byte",
        ".4f",
        "of the validation text, from the log of the run; lower is better",
    ),
    "distinct_1": (
        "distinct-1",
        ".3f",
        "different words / all words, in the first {n_words} of each column",
    ),
    "distinct_2": ("distinct-2", ".3f", "different pairs of words / all pairs of words in a row"),
    "distinct_3": ("distinct-3", ".3f", "the same for three words in a row"),
    "distinct_4": ("distinct-4", ".3f", "the same for four"),
    "copied": ("copied", ".1%", "share of its rows of {n} words that the training text has too"),
    "longest_median": (
        "longest copied run",
        ",.1f",
        "in words: every {n} in a row are in the training text; median of the stories",
    ),
    "longest_max": ("the longest of all", ",", "in words, in any of its stories"),
    "proper": (
        "end properly",
        ".1%",
        "ended before the limit, with . ! ? or a quotation mark after one of them",
    ),
    "repeated": ("told twice", ".1%", "share of stories that another one equals"),
    "words": ("words", ",.1f", "in a story, without the prompt; mean"),
    "tokens": ("tokens", ",.1f", "in a story, without the prompt; mean"),
}


def figures_of(stories, overlap, n_words):
    """
    The figures of a non-empty list of stories, {name in FIGURES: value, None where there is none}.
    overlap: an Overlap that the training text has streamed past, or None; n_words: how many words
    distinct-n is of.
    """
    figures = {"stories": len(stories), "bits_per_byte": None}
    figures |= {f"distinct_{n}": distinct(stories, n, n_words) for n in (1, 2, 3, 4)}
    copied = longest_median = longest_max = None
    if overlap:
        found = np.concatenate([overlap.found(story) for story in stories])
        copied = float(found.mean()) if len(found) else None
        longest = [max((b - a for a, b in overlap.runs(story)), default=0) for story in stories]
        longest_median, longest_max = float(statistics.median(longest)), max(longest)
    counts = Counter(story.text for story in stories)
    return figures | {
        "copied": copied,
        "longest_median": longest_median,
        "longest_max": longest_max,
        "proper": statistics.fmean(story.ends_properly() for story in stories),
        "repeated": sum(n for n in counts.values() if n > 1) / len(stories),
        "words": statistics.fmean(story.n_words() for story in stories),
        "tokens": statistics.fmean(story.n_tokens for story in stories),
    }


def rows_of(columns, n, n_words):
    """
    The table of figures as rows of text, [label, a value for each column, meaning], of columns
    {name: figures}. Rows without any value are left out.
    """
    rows = []
    for name, (label, style, meaning) in FIGURES.items():
        values = [figures[name] for figures in columns.values()]
        if any(value is not None for value in values):
            shown = ["–" if v is None else f"{v:{style}}".replace("%", " %") for v in values]
            rows.append([label, *shown, meaning.format(n=n, n_words=f"{n_words:,}")])
    return rows


def write_lines(path, columns, settings):
    """Write the figures as JSON lines, one for each column, with the settings they were made by."""
    with atomic_write(path, "w") as f:
        for name, figures in columns.items():
            values = {"model": name, **figures, **settings}
            print(json.dumps(values, ensure_ascii=False), file=f)
