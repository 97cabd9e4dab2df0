"""
Orders: what a story must contain, in front of the story, in the form of TinyStories-Instruct.

    Words: dragon, soup
    Features: Dialogue
    Random sentence: The soup was too hot.
    Summary: A dragon learns to cook.
    Story: Once upon a time ...

The fields come in any order, and each may be missing. An order can be derived from any story, so no
special dataset is needed: some words that it is about, one of its sentences, and Dialogue if
somebody speaks. A hash of the story decides which fields its order has, and whether it has one.

To add a field, add it to FIELDS and Order, and let Orders.derive() fill it.
"""

import functools
import hashlib
import itertools
import math
import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass, fields, replace

FIELDS = {"Words": "words", "Features": "features", "Random sentence": "sentence"}
FIELDS |= {"Summary": "summary"}
COLUMNS = ("theme", "topic", "style", "persona", "grammar")  # of SimpleStories
LABELS = ("instruction", "summary", *COLUMNS)  # of a story in JSON or parquet
START = "Story:"  # what separates an order from its story
LINE = re.compile(rf"^({'|'.join(FIELDS)}):[ \t]*", re.MULTILINE)
STORY = re.compile(rf"^{START}", re.MULTILINE)
SUMMARY = re.compile(r"\n\s*Summary:([^\n]*)\s*$")  # after the story
HEAD = tuple(f"{name}:" for name in (*FIELDS, "Story"))
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
SENTENCE = re.compile(r"[^.!?…\n]+[.!?…]+[\"'”’»]*")
BLANKS = re.compile(r"[ \t\n\v\f\r]+")
SPEECH = re.compile(r"[\"“”„«»]")
# probabilities: of an order, and of each of its fields
WITH_ORDER, WITH_FIELD = 0.8, {"words": 0.8, "features": 0.5, "sentence": 0.25, "summary": 0.5}
MIN_WORDS, MAX_WORDS = 2, 4  # in a derived order
CANDIDATES = 6  # its words are drawn from this many that the story is about, see Orders.topics
# Not from those in more than one of ten stories, or in fewer than one of a thousand, or of four
COMMON, RARE, MIN_STORIES = 0.1, 0.001, 4
# A story that has a content word uses it again ("dragon" 4.3 times), unlike "such" (1.04 times);
# the mean tells them apart (Church and Gale 1995, "Poisson mixtures")
CONTENT = 1.3
# Dialogue is favored from this token of a story on: most stories have some before it, and earlier,
# quotation marks would come where nobody speaks
LATE = 100
SENTENCE_LENGTH = 15, 120  # characters of a derived sentence


@dataclass(frozen=True)
class Order:
    """words and features: tuples of texts; sentence and summary: texts. Empty: not ordered."""

    words: tuple = ()
    features: tuple = ()
    sentence: str = ""
    summary: str = ""

    def __bool__(self):
        return any(getattr(self, field.name) for field in fields(self))

    def prompt(self, beginning="", names=tuple(FIELDS)):
        """Return the order as text, and how the story begins. names: the order of its fields."""
        lines = []
        for name in names:
            value = getattr(self, FIELDS[name])
            value = squeezed(", ".join(value) if isinstance(value, tuple) else value)
            if value:
                lines.append(f"{name}: {value}")
        return "\n".join([*lines, f"{START} {beginning.lstrip(' ')}".rstrip(" ")])


def squeezed(text):
    """Return a text with single spaces between its words. As in run.c, only ASCII blanks count."""
    return " ".join(filter(None, BLANKS.split(text)))


def split_list(text):
    """Return the parts of a text with commas, squeezed, as a tuple."""
    return tuple(filter(None, map(squeezed, text.split(","))))


def is_to_order(order, start, knows_orders):
    """
    Return whether a story gets an Order or None in front of its start. A model that knows orders
    would make one up if its prompt were empty: it gets an order without fields.
    """
    return bool(order) or (knows_orders and not start)


def parse(text):
    """
    Return (Order, story) of a text. A text that does not start with an order is a story with an
    empty Order. A summary may follow the story.
    """
    if not text.startswith(HEAD) or not (start := STORY.search(text)):
        return Order(), text
    values, head, story = {}, text[: start.start()], text[start.end() :].strip()
    lines = [*LINE.finditer(head), None]
    for line, following in itertools.pairwise(lines):
        end = following.start() if following else len(head)
        values[FIELDS[line[1]]] = head[line.end() : end].strip()
    if summary := SUMMARY.search(story):
        values["summary"], story = summary[1].strip(), story[: summary.start()].strip()
    for name in ("words", "features"):
        if name in values:
            values[name] = split_list(values[name])
    return Order(**values), story


def problem_of(text):
    """Return what is wrong with the order of a document, or None."""
    if not text.startswith(HEAD):
        return None
    start = STORY.search(text)
    if not start:
        return f"has no line {START}"
    if not parse(text)[1]:
        return "has no story"
    lines = [*LINE.finditer(text[: start.start()]), start]
    for line, following in itertools.pairwise(lines):
        if not text[line.end() : following.start()].strip(" \t\n,"):
            return f"has nothing readable as {line[1]}"
    return None


def labeled(text, item):
    """
    Return a story in the form above, with the labels of its parsed JSON object or row: the words,
    features and summary of TinyStories, or the columns of SimpleStories as features. What is
    neither a text nor a list of texts becomes an empty field, for problem_of().
    """
    values, instruction = {"Words": [], "Features": [], "Summary": []}, item.get("instruction")
    unreadable = []
    if isinstance(instruction, dict):
        labels = [("Words", instruction.get("words")), ("Features", instruction.get("features"))]
    else:
        labels = [("Words", None if instruction is None else 0)]
    labels += [("Features", item.get(name)) for name in COLUMNS]
    labels += [("Summary", item.get("summary"))]
    for name, label in labels:
        texts = label if isinstance(label, list) else [label] * (label is not None)
        if all(isinstance(text, str) for text in texts):
            values[name] += [" ".join(text.split()) for text in texts if text.strip()]
        else:
            unreadable.append(f"{name}:\n")
    order = Order(tuple(values["Words"]), tuple(values["Features"]), "", *values["Summary"][:1])
    return "".join(unreadable) + order.prompt(text) if order or unreadable else text


def story_of(text):
    return parse(text)[1]


# ---- words


@functools.lru_cache(maxsize=1 << 14)
def forms(word):
    """Return a word and its regular English inflections, a set."""
    endings = {word + ending for ending in ("s", "es", "ed", "d", "ing", "er", "est", "ly", "'s")}
    if len(word) > 2:
        double = word + word[-1]
        endings |= {double + ending for ending in ("ed", "ing", "er", "est")}
        if word.endswith("e"):
            endings |= {word[:-1] + "ing"}
        if word.endswith("y"):
            endings |= {word[:-1] + ending for ending in ("ies", "ied", "ier", "iest", "ily")}
        if word.endswith("f"):
            endings |= {word[:-1] + "ves"}
    return {word, *endings}


def are_forms(a, b):
    """Return whether one of two words is a form of the other."""
    return a in forms(b) or b in forms(a)


def has_speech(text):
    return bool(SPEECH.search(text))


class Orders:
    """
    Derives orders. texts: some training documents, in which words are counted; words that are in
    many of them, or hardly in any, or names, or no content words, are not asked for.
    """

    def __init__(self, texts):
        counts, totals, n = Counter(), Counter(), 0
        for text in texts:
            words = [word.lower() for word in WORD.findall(story_of(text))]
            counts.update(set(words))
            totals.update(words)
            n += 1
        low = min(max(RARE * n, MIN_STORIES), n)
        high = max(COMMON * n, MIN_STORIES)
        chosen = sorted(w for w, c in counts.items() if low <= c <= high and w.isalpha())
        self.counts = {w: counts[w] for w in chosen if totals[w] >= CONTENT * counts[w]}
        self.n = n

    def key(self):
        """Return a string that changes when the orders of a story may change."""
        return f"5 {zlib.crc32(repr(self.counts).encode()):08x}"

    def topics(self, story):
        """
        Return up to CANDIDATES content words that a story is about, a list: those that it uses most
        often and few stories have, ranked by tf-idf (Salton and Buckley 1988, "Term-weighting
        approaches in automatic text retrieval"). They have three letters or more, and no capital.
        """
        uses = Counter(WORD.findall(story))
        names = {word.lower() for word in uses if word != word.lower()}
        words = [w for w in uses if len(w) >= 3 and w in self.counts and w not in names]
        rank = {w: (-uses[w] * math.log(self.n / self.counts[w]), w) for w in words}
        return sorted(words, key=rank.get)[:CANDIDATES]

    def derive(self, story, rng):
        """Return an Order that the story fulfils, with all fields that a text can give."""
        words = self.topics(story)
        n = min(MIN_WORDS + int(rng.random() * (MAX_WORDS - MIN_WORDS + 1)), len(words))
        drawn = tuple(drawn_from(words, n, rng))
        low, high = SENTENCE_LENGTH
        sentences = [s.strip() for s in SENTENCE.findall(story)]
        sentences = [s for s in sentences if low <= len(s) <= high and not has_speech(s)]
        sentence = drawn_from(sentences, 1, rng)[0] if sentences else ""
        return Order(drawn, ("Dialogue",) if has_speech(story) else (), sentence)

    def place(self, text):
        """
        Return (the order of a document as text, or "" if it has none; its story). Labels of the
        document take the place of derived fields. The story of a malformed document is "".
        """
        labels, story = parse(text)
        if not story or (text.startswith(HEAD) and not STORY.search(text)):
            return "", ""
        seed = hashlib.blake2b(story.encode(), digest_size=8).digest()
        rng = random.Random(int.from_bytes(seed, "little"))
        derived = self.derive(story, rng)
        order = replace(
            labels,
            words=labels.words or derived.words,
            features=tuple(dict.fromkeys((*labels.features, *derived.features))),
            sentence=labels.sentence or derived.sentence,
        )
        if rng.random() >= WITH_ORDER:
            return "", story
        keep = {name: rng.random() < share for name, share in WITH_FIELD.items()}
        order = Order(**{name: getattr(order, name) for name, kept in keep.items() if kept})
        names = drawn_from(list(FIELDS), len(FIELDS), rng)
        return (order.prompt(names=names) if order else ""), story


def drawn_from(items, n, rng):
    """Return n different items in random order; uses only rng.random(), the same everywhere."""
    items = list(items)
    for i in range(n):
        k = i + int(rng.random() * (len(items) - i))
        items[i], items[k] = items[k], items[i]
    return items[:n]


# ---- whether a story fulfils an order


def verbatim(order):
    """Return the texts that an order asks for: its words and its sentence."""
    return (*order.words, *[order.sentence] * bool(order.sentence))


def first_uses(order, story):
    """
    Yield where a story first has what an Order asks for, speech, the sentence, and each word, as it
    is or else in another form: pairs of positions (start, end). What is not there is left out.
    """
    places = {}
    for match in reversed([*WORD.finditer(story)]):
        places[straight(match[0])] = match.span()
    text = straight(story)
    for asked in map(straight, verbatim(order)):
        if asked in places:
            yield places[asked]
        elif not WORD.fullmatch(asked):
            if (start := text.find(asked)) >= 0:
                yield start, start + len(asked)
        elif others := [at for word, at in places.items() if are_forms(word, asked)]:
            yield min(others)
    if "Dialogue" in order.features and (speech := SPEECH.search(story)):
        yield speech.span()


class Wanted:
    """
    What an order asks for and a story does not have yet, as tokens: words, a sentence, and a
    quotation mark for dialogue. While the story is told, raise_logits() favors them.
    """

    def __init__(self, order, tokenizer, bias, prompt):
        """prompt: the ids of the order and of how the story begins."""

        def encode(text, bos=False):  # keeps the bytes of a command line
            return tokenizer.encode(text.encode(errors="surrogateescape"), bos)

        start = encode(START)
        texts = [*map(squeezed, verbatim(order)), *['"'] * ("Dialogue" in order.features)]
        phrases = [encode(f"{START} {text}") for text in texts]
        self.phrases = [phrase[len(start) :] for phrase in phrases]  # encoded as in a story
        self.late = len(texts) - ("Dialogue" in order.features)  # index of the quotation mark
        self.n_said = [0] * len(self.phrases)  # how many of its tokens the story ends with
        self.bias, self.n_told = bias, 0
        for token in prompt[len(encode(order.prompt(), True)) :]:
            self.read(token)

    def raise_logits(self, logits):
        """
        Add the bias to the logits (vocab_size,) of the next token of each phrase, once per token.
        """
        n = len(self.phrases) if self.n_told >= LATE else self.late
        pairs = zip(self.phrases[:n], self.n_said[:n], strict=True)
        for token in {phrase[k] for phrase, k in pairs if k < len(phrase)}:
            logits[token] += self.bias

    def read(self, token):
        """Read the next token of the story."""
        self.n_told += 1
        for i, phrase in enumerate(self.phrases):
            n = self.n_said[i]
            if n < len(phrase):
                self.n_said[i] = n + 1 if token == phrase[n] else int(token == phrase[0])


class Told:
    """
    What a story says, to compare it with orders. A model may write another order in it; what
    stands in front of the last START does not count.
    """

    def __init__(self, story):
        story = STORY.split(story)[-1]
        self.words = {straight(word) for word in WORD.findall(story)}
        self.forms = set().union(*map(forms, self.words)) if self.words else set()
        self.text = straight(" ".join(story.split()))
        self.has_speech = has_speech(story)

    def has_word(self, word):
        """
        Whether the story has a word, a form of it, or a word that it is a form of. Anything else,
        such as "big cat" or a number, must be part of the text.
        """
        word = straight(word)
        if not WORD.fullmatch(word):
            return word in self.text
        return word in self.forms or not forms(word).isdisjoint(self.words)

    def has_sentence(self, sentence):
        return straight(" ".join(sentence.split())) in self.text


def straight(text):
    """Return text in lower case, with one kind of apostrophe."""
    return text.lower().replace("’", "'")


def scores(pairs):
    """
    Return how well stories fulfil orders, from pairs of (Order, Told): the share of the words that
    appear, of the orders whose words and sentence all appear, of the stories with dialogue among
    those ordered with it, and of the ordered sentences. A share is None if nothing was ordered.
    """
    words = [[told.has_word(word) for word in order.words] for order, told in pairs]
    sentences = [
        [told.has_sentence(order.sentence)] * bool(order.sentence) for order, told in pairs
    ]
    whole = [all(w + s) for w, s in zip(words, sentences, strict=True) if w + s]
    speech = [told.has_speech for order, told in pairs if "Dialogue" in order.features]
    values = {
        "words": flat(words),
        "whole": whole,
        "dialogue": speech,
        "sentences": flat(sentences),
    }
    return {name: sum(hits) / len(hits) if hits else None for name, hits in values.items()}


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def scores_of_others(pairs, n=20):
    """Return scores() of the same stories for the orders of up to n other stories each."""
    shifts = range(1, min(n + 1, len(pairs)))
    return scores([(pairs[i - k][0], told) for k in shifts for i, (_, told) in enumerate(pairs)])
