"""
Metrics of stories: how varied they are, how much of them is copied from the training text, and how
they end. generate.py prints the metrics; storypage.py shows them.

A word is a run of letters and digits in lower case, with any apostrophes inside it; punctuation is
dropped. Words and n-grams (n words in a row) that are entirely inside the prompt are not counted.

To add a metric, add a row to METRICS and its value to metrics_of().
"""

import itertools
import json
import random
import re
import statistics
from collections import Counter

import numpy as np

from configurator import CONTROL_CHARS, UserError, check_range
from dataset import CHUNK, mixed
from system.files import atomic_write
from text.documents import stream_documents
from text.orders import Told, parse, scores, scores_of_others
from text.shards import without_marks

BREAK = "\0"  # between documents: a word that is in no story, so no n-gram spans two documents
WORD = re.compile(rf"{BREAK}|[^\W_]+(?:'[^\W_]+)*")
ENDING = re.compile(r"""[.!?…]["'”’»)]*\s*$""")
PIECE = 1 << 20  # characters of training text searched at once
MAXIMUMS = {"temperature": 100, "seed": 2**63 - 1, "top_p": 1, "order_bias": 10}  # of settings


def check_sampling(settings, **minimums):
    """Raise UserError if a sampling setting is out of range; minimums: of integer settings."""
    for name, minimum in minimums.items():
        check_range(minimum, **{name: settings[name]})
    for name, maximum in MAXIMUMS.items():
        check_range(0, maximum, **{name: settings[name]})


def read_prompt(start):
    """Return the prompt that a setting gives: the text itself, or FILE:PATH for that of a file."""
    if not start.startswith("FILE:"):
        return start
    path = start.removeprefix("FILE:")
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; choose another --start=FILE:PATH") from None
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}") from None


# ---- words


def lowered(text):
    """Return text in lower case, with one kind of apostrophe; characters keep their indices."""
    lower = text.lower()
    if len(lower) != len(text):  # for example, İ becomes two characters
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    return lower.replace("’", "'")


def words_of(text):
    return WORD.findall(lowered(text))


def printable(text):
    """Return text with control characters, such as BREAK, replaced by U+FFFD."""
    return CONTROL_CHARS.sub("\ufffd", text)


class Story:
    """
    A story and its prompt. text: both together; order: the Order that it was told for, or None;
    n_tokens: tokens after the prompt; ended: whether
    the model ended it, before the limit. The first n_prompt words are the prompt's.
    """

    def __init__(self, text, n_tokens, ended=True, prompt="", order=None):
        self.order = order
        self.text, prompt = printable(text), printable(prompt)
        self.n_tokens, self.ended = n_tokens, ended
        self.prompt = prompt if self.text.startswith(prompt) else ""
        matches = list(WORD.finditer(lowered(self.text)))
        self.words = [match.group() for match in matches]
        self.spans = [match.span() for match in matches]  # of each word in the text
        pairs = zip(self.words, words_of(self.prompt), strict=False)
        # a word that only starts in the prompt belongs to the story
        self.n_prompt = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def n_words(self):
        return len(self.words) - self.n_prompt

    def n_grams(self, n, n_words=None):
        """Return its n-grams, tuples of words, within the first n_words words after the prompt."""
        end = len(self.words) if n_words is None else min(self.n_prompt + n_words, len(self.words))
        first = max(self.n_prompt - n + 1, 0)
        return [tuple(self.words[i : i + n]) for i in range(first, end - n + 1)]

    def ends_properly(self):
        """Return whether it ended before the limit, with . ! ? or … and any closing quotes."""
        return self.ended and bool(ENDING.search(self.text))


def distinct(stories, n, n_words):
    """
    Return distinct-n (Li et al. 2016, arXiv:1510.03055): different n-grams / all n-grams, over the
    first n_words words of all stories together, or None without n-grams. It falls as the text
    grows, so only values for the same n_words can be compared.
    """
    n_grams, left = [], n_words
    for story in stories:
        n_grams += story.n_grams(n, left)
        left -= min(left, story.n_words())
    return len(set(n_grams)) / len(n_grams) if n_grams else None


# ---- copies of the training text


class Overlap:
    """
    The n-grams of some stories that also occur in a text, which is fed piece by piece. Only the
    stories' n-grams are kept, as 64-bit hashes: with a million of them and a billion in the text,
    the chance that even one is mistaken for another is 1 in 20,000.
    """

    def __init__(self, stories, n):
        self.n, self.n_words = n, 0  # n_words: fed so far
        words = dict.fromkeys(word for story in stories for word in story.words)
        self.ids = {word: i for i, word in enumerate(words, start=1)}  # 0: not in any story
        # a random number for each word, by its id; the multiplier is that of Knuth's MMIX
        self.numbers = mixed(np.arange(1, len(words) + 2, dtype=np.uint64))
        self.factor = np.uint64(6364136223846793005)
        self.hashes = np.unique(np.concatenate([self.hashed(story.words) for story in stories]))
        self.seen = np.zeros(len(self.hashes), dtype=bool)
        # one lookup of their last bits in this table rules out most n-grams of a text
        self.mask = np.uint64((1 << 22) - 1)
        self.table = np.zeros(1 << 22, dtype=bool)
        self.table[self.hashes & self.mask] = True

    def hashed(self, words):
        """Return a hash of each n-gram in a list of words, uint64 (max(len(words) - n + 1, 0),)."""
        n_grams = max(len(words) - self.n + 1, 0)
        ids = map(self.ids.get, words, itertools.repeat(0))
        numbers = self.numbers[np.fromiter(ids, np.int64, len(words))]
        hashes = np.zeros(n_grams, dtype=np.uint64)
        for k in range(self.n if n_grams else 0):
            hashes = hashes * self.factor + numbers[k : k + n_grams]
        return hashes

    def feed(self, text):
        """Search whole documents, joined by BREAK, for the stories' n-grams."""
        words = words_of(text)
        self.n_words += len(words) - words.count(BREAK)
        hashes = self.hashed(words)
        hashes = hashes[self.table[hashes & self.mask]]
        places = np.searchsorted(self.hashes, hashes)
        places[places == len(self.hashes)] = 0
        self.seen[places[self.hashes[places] == hashes]] = True

    def matches(self, story):
        """Return whether the text has each n-gram of a story (bool), except those of the prompt."""
        first = max(story.n_prompt - self.n + 1, 0)
        hashes = self.hashed(story.words)[first:]
        return self.seen[np.searchsorted(self.hashes, hashes)]

    def runs(self, story):
        """
        Yield the longest runs of copied words as (first, end) word indices, without the prompt's
        words. The text has every n-gram of a run. Runs may share words.
        """
        first, at = max(story.n_prompt - self.n + 1, 0), 0
        for is_match, group in itertools.groupby(self.matches(story)):
            size = len(list(group))
            if is_match:
                yield max(first + at, story.n_prompt), first + at + size + self.n - 1
            at += size


def pieces_of(documents):
    """
    Join documents, an iterable of (text, size), into pieces of about PIECE characters. Yield (texts
    joined by BREAK, sum of their sizes).
    """
    texts, n_characters, total = [], 0, 0
    for text, size in documents:
        texts.append(text)
        n_characters, total = n_characters + len(text), total + size
        if n_characters >= PIECE:
            yield BREAK.join(texts), total
            texts, n_characters, total = [], 0, 0
    yield BREAK.join(texts), total


def documents_of_file(path, is_book=False):
    """Yield (text, bytes read for it) for each document in a text file."""
    previous = 0
    for text, position in stream_documents(path, is_book):
        yield text, position - previous
        previous = position


def orders_of_shard(shard, tokenizer, mark):
    """Yield (Order, story) for each document of a token shard that has an order."""
    for text, _ in documents_of_shard(without_marks(shard, mark), tokenizer):
        order, story = parse(text)
        if order:
            yield order, story


def documents_of_shard(shard, tokenizer, mark=0):
    """
    Yield (text, number of tokens) for each document in a token shard. mark: the bit of tokens that
    belong to orders, which are left out; 0: there are none.
    """
    table = tokenizer.piece_bytes()
    starts = [
        i + np.flatnonzero(shard[i : i + CHUNK] == tokenizer.bos_id)
        for i in range(0, len(shard), CHUNK)
    ]
    borders = [-1, *np.concatenate(starts).tolist(), len(shard)]  # -1: text before the first BOS
    for start, end in itertools.pairwise(borders):
        ids = shard[start + 1 : end]
        ids = (without_marks(ids[ids < mark], mark) if mark else ids).tolist()
        text = b"".join(map(table.__getitem__, ids)).decode(errors="replace").strip()
        if text:
            yield text, len(ids)


def sample_items(items, n, seed):
    """Return n random items of an iterable in their order, all equally likely, or all if fewer."""
    chosen, rng = [], random.Random(seed)  # reservoir sampling: algorithm R
    for i, item in enumerate(items):
        if i < n:
            chosen.append((i, item))
        elif (slot := rng.randrange(i + 1)) < n:
            chosen[slot] = i, item
    return [item for _, item in sorted(chosen, key=lambda pair: pair[0])]


# ---- metrics


# name -> (label, format, explanation, which may use {n} and {n_words})
METRICS = {
    "stories": ("stories", ",", "number of stories"),
    "bits_per_byte": (
        "bits per byte",
        ".4f",
        "on the validation text, from the log of the run; lower is better",
    ),
    "distinct_1": (
        "distinct-1",
        ".3f",
        "different words / all words, in the first {n_words} words of each column",
    ),
    "distinct_2": ("distinct-2", ".3f", "the same for pairs of consecutive words"),
    "distinct_3": ("distinct-3", ".3f", "the same for three consecutive words"),
    "distinct_4": ("distinct-4", ".3f", "the same for four consecutive words"),
    "copied": ("copied", ".1%", "share of {n}-word sequences that also occur in the training text"),
    "longest_median": (
        "longest copied run",
        ",.1f",
        "words in a row, every {n} of them in the training text; median over stories",
    ),
    "longest_max": ("longest of all", ",", "words in the longest copied run of any story"),
    "proper": (
        "end properly",
        ".1%",
        "stories that end before the limit with . ! or ?, or a closing quote after it",
    ),
    "repeated": ("repeated", ".1%", "share of stories that equal another one"),
    "ordered_words": (
        "ordered words",
        ".1%",
        "share of the ordered words that appear, in any form",
    ),
    "ordered_words_base": ("… by chance", ".1%", "share of the words of other stories' orders"),
    "ordered_whole": ("whole orders", ".1%", "orders of which all words and the sentence appear"),
    "ordered_whole_base": ("… by chance", ".1%", "the same for other stories' orders"),
    "ordered_dialogue": ("ordered dialogue", ".1%", "stories with speech, of those that should"),
    "ordered_dialogue_base": ("… by chance", ".1%", "the same for other stories' orders"),
    "ordered_sentences": ("ordered sentences", ".1%", "share of the ordered sentences that appear"),
    "ordered_sentences_base": ("… by chance", ".1%", "the same for other stories' orders"),
    "words": ("words", ",.1f", "mean per story, without the prompt"),
    "tokens": ("tokens", ",.1f", "mean per story, without the prompt"),
}


def metrics_of(stories, overlap, n_words):
    """
    Return the metrics of a non-empty list of stories: {name in METRICS: value, None if unknown}.
    overlap: an Overlap that was fed the training text, or None; n_words: for distinct().
    """
    metrics = {"stories": len(stories), "bits_per_byte": None}
    metrics |= {f"distinct_{n}": distinct(stories, n, n_words) for n in (1, 2, 3, 4)}
    copied = longest_median = longest_max = None
    if overlap:
        is_copied = np.concatenate([overlap.matches(story) for story in stories])
        copied = float(is_copied.mean()) if len(is_copied) else None
        longest = [max((b - a for a, b in overlap.runs(story)), default=0) for story in stories]
        longest_median, longest_max = float(statistics.median(longest)), max(longest)
    counts = Counter(story.text for story in stories)
    pairs = [(story.order, Told(story.text)) for story in stories if story.order]
    for ending, shares in (("", scores(pairs)), ("_base", scores_of_others(pairs))):
        metrics |= {f"ordered_{name}{ending}": share for name, share in shares.items()}
    return metrics | {
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
    Return the table of metrics as rows of text, [label, a value for each column, explanation];
    columns: {name: metrics}. Leaves out rows without values.
    """
    rows = []
    for name, (label, style, explanation) in METRICS.items():
        values = [metrics[name] for metrics in columns.values()]
        if any(value is not None for value in values):
            cells = ["–" if v is None else f"{v:{style}}".replace("%", " %") for v in values]
            rows.append([label, *cells, explanation.format(n=n, n_words=f"{n_words:,}")])
    return rows


def write_lines(path, columns, settings):
    """Write the metrics as JSON lines, one for each column, with the settings used."""
    with atomic_write(path, "w") as f:
        for name, metrics in columns.items():
            values = {"model": name, **metrics, **settings}
            print(json.dumps(values, ensure_ascii=False), file=f)
