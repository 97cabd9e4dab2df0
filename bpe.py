"""
Byte-level BPE: a vocabulary of the 256 bytes and of tokens that are merged from them.

Text is cut into pre-tokens: words with the space before them, numbers, runs of punctuation or of
white space. Training counts the pre-tokens, then repeatedly merges the most frequent pair of
adjacent tokens, only inside pre-tokens. Encoding merges the bytes of each pre-token in the order in
which training learned the merges (Sennrich et al. 2016, arXiv:1508.07909; on bytes: GPT-2).

For example, "low low low lower" has the pre-tokens "low", " low" (twice) and " lower". Its pairs
are l o and o w, 4 times each; " " l, 3 times; w e and e r, once. Ties go to the lexicographically
greater pair: o w is merged first, then l ow (4 times), then " " low (3 times). "slow" is encoded by
the same steps: s l o w, s l ow, s low.

The ids are the 256 bytes, then the merges in order, then the special tokens, which are never split
or merged.

This file has the patterns, training (see merge_all()), encoding (see pretoken_ids()), the file
formats, and the places where a long text may be cut. Only the command line at the end uses
tokenizer.py and formats/.

    python bpe.py train --source=text.txt --model=my.model --vocab_size=10000
    python bpe.py encode --source=text.txt --model=my.model --out=shards     # or --out=ids.npy
    python bpe.py import --vocab_json=vocab.json --merges_txt=merges.txt --model=gpt2.model
    python bpe.py import --tokenizer_json=tokenizer.json --model=smol.model
"""

import heapq
import json
import os
import re
from array import array
from collections import Counter, defaultdict
from functools import cache, partial
from itertools import pairwise

import numpy as np

from configurator import UserError, configure
from system.files import atomic_write, parse_json
from system.progress import progress
from system.workers import over_spans, worker_count
from text.corpus import (
    Span,
    cut,
    plan_shards,
    text_files,
    texts_of,
    unchanged,
    whole_file,
)
from text.documents import is_plain
from text.letters import ranges

TYPE = "byte-level BPE"  # identifies a file written by save()
MAX_PIECE = 1 << 22  # bytes of a file that one worker counts at a time
MAX_BYTES = 1 << 26  # of different pre-tokens in training; they take 20 times as much memory
MAX_TOKENS = 1 << 24  # in a vocabulary
WINDOW = 1 << 12  # bytes to search at a time for a place to cut
CACHE_SIZE = 1 << 21  # characters of text whose ids an encoder caches
BLOCK = 1 << 16  # characters of a stream that are encoded at a time
# Every pattern cuts before a space followed by a character that is not white space. Cutting there
# first, and matching each distinct stretch of text only once, is several times as fast
BEFORE_SPACE = re.compile(r"(?= \S)")
# Every pattern also cuts between a letter or digit and a symbol, and after a newline between two
# characters that are not white space
SAFE = re.compile(r"(?= \S)|(?<=[^\W_])(?=[^\w\s])|(?<=\S\n)(?=\S)")
# The pre-token patterns of GPT-2 and GPT-4 (cl100k, in Llama 3's notation, which cuts the same
# way). run.c has a matcher for each and identifies them by their index here
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


@cache
def pattern(name="gpt2"):
    """Compile one of PATTERNS, with ranges() for the classes that Python's re does not know."""
    if name not in PATTERNS:
        raise UserError(f"pattern_name = {name!r}: expected {' or '.join(PATTERNS)}")
    text = PATTERNS[name].replace(r"\S", r"[^\s]")
    for kind, name_in_re in {"L": r"\p{L}", "N": r"\p{N}", "S": r"\s"}.items():
        characters = "".join(f"{chr(a)}-{chr(b)}" for a, b, k in ranges() if k == kind)
        parts = re.split(r"(\[.*?\])", text)  # "a", "[bc]", "d": every second part is a set
        parts[1::2] = [part.replace(name_in_re, characters) for part in parts[1::2]]
        parts[::2] = [part.replace(name_in_re, f"[{characters}]") for part in parts[::2]]
        text = "".join(parts)
    return re.compile(text)


def checked_special(special_tokens):
    """Return the special tokens as a list without duplicates; raise UserError if one is invalid."""
    if isinstance(special_tokens, str):
        raise UserError(f"special_tokens = {special_tokens!r}: expected a list of strings")
    for token in special_tokens or ():
        try:
            n_bytes = len(token.encode())
        except (AttributeError, UnicodeEncodeError):  # not a str, or not UTF-8 on the command line
            n_bytes = 0
        if n_bytes < 2:
            raise UserError(
                f"special token {token!r}: expected a string of at least two bytes in UTF-8"
            )
    return list(dict.fromkeys(special_tokens or ()))


def split_at(special_tokens):
    """Compile a pattern that finds special tokens, the longest first; None without any."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if special_tokens else None


# ---- training


def train_bpe(input_path, vocab_size, special_tokens=(), num_processes=1, pattern_name="gpt2"):
    """
    Train on a text file -> (vocab {id: bytes}, merges [(bytes, bytes)]), the interface of CS336.
    Special tokens end a pre-token and are not counted. A text with too few pairs gives a smaller
    vocabulary. Raises UserError if vocab_size has no room for the bytes and special tokens.
    """
    spans = [Span(os.fspath(input_path), 0, os.path.getsize(input_path))]
    return train_on(spans, vocab_size, special_tokens, num_processes, pattern_name)


def train_on(spans, vocab_size, special_tokens=(), num_processes=1, pattern_name="gpt2"):
    """Do the work of train_bpe() on a list of Spans."""
    pattern(pattern_name)  # raises UserError for an unknown name
    special_tokens = checked_special(special_tokens)
    n_merges = vocab_size - 256 - len(special_tokens)
    if n_merges < 0:
        raise UserError(
            f"vocab_size = {vocab_size}: expected at least {256 + len(special_tokens)} for the 256 "
            f"bytes and the special tokens"
        )
    counts = count_all(spans, special_tokens, num_processes, pattern_name)
    merges = merge_all(counts, n_merges)
    tokens = [bytes([i]) for i in range(256)] + [a + b for a, b in merges]
    tokens += [token.encode() for token in special_tokens]
    return dict(enumerate(tokens)), merges


def count_pretokens(span, special_tokens, pattern_name):
    """Return a Counter of the pre-tokens in a Span, as bytes."""
    special, find = split_at(special_tokens), pattern(pattern_name).finditer
    stretches, counts = Counter(), Counter()
    for text in texts_of(span):
        for part in special.split(text) if special else [text]:
            stretches.update(BEFORE_SPACE.split(part))
    for stretch, n in stretches.items():
        for match in find(stretch):
            counts[match[0].encode()] += n
    return counts


def count_all(spans, special_tokens, num_processes, pattern_name):
    """
    Return a Counter of the pre-tokens in Spans. To bound memory, beyond MAX_BYTES of different
    pre-tokens, drop the rarest and print a note.
    """
    counts, n_bytes, dropped = Counter(), 0, 0
    arguments = special_tokens, pattern_name
    with unchanged(spans):
        pieces = all_pieces(spans, special_tokens)
        for more in over_spans(count_pretokens, pieces, arguments, num_processes, "count"):
            counts.update(more)
            n_bytes += sum(map(len, more))  # an upper bound: some pre-tokens are not new
            if n_bytes > MAX_BYTES:
                n_bytes = sum(map(len, counts))
            while n_bytes > MAX_BYTES:
                dropped += 1
                counts = Counter({token: n for token, n in counts.items() if n > dropped})
                n_bytes = sum(map(len, counts))
    if dropped:
        print(
            f"note: this text has more than {MAX_BYTES / 1e6:.0f} MB of different pre-tokens; some "
            f"that occur {dropped} times or less were not counted"
        )
    return counts


def merge_all(counts, n_merges):
    """
    Return the first n_merges merges, pairs of bytes, of pre-tokens {bytes: count}. Ties go to the
    lexicographically greater pair.

    The heap has the most frequent pair on top. A count in the heap may be outdated, but it can only
    be too high, and is corrected when it reaches the top.
    """
    text = Symbols(counts)
    tokens = [bytes([i]) for i in range(256)]  # id -> bytes
    ids_of = {token: i for i, token in enumerate(tokens)}
    # Python's heaps have the smallest key on top, but ties go to the greater token. So the key of
    # a token has its bytes inverted, then an end mark above them: of "a" and "ab", "ab" comes first
    keys = [chr(255 - i) + "\u0100" for i in range(256)]

    def entry(count, pair):
        a, b = pair
        return -count, keys[a], keys[b], pair

    heap = [entry(count, pair) for pair, count in text.counts.items()]
    heapq.heapify(heap)
    merges = []
    bar = progress(total=n_merges, desc="merge", unit="merge")
    while heap and len(merges) < n_merges:
        old_count, _, _, pair = heapq.heappop(heap)
        count = text.counts.get(pair, 0)
        if count != -old_count:
            if 0 < count < -old_count:
                heapq.heappush(heap, entry(count, pair))
            continue
        left, right = pair
        merges.append((tokens[left], tokens[right]))
        joined = tokens[left] + tokens[right]
        new = ids_of.setdefault(joined, len(tokens))  # two merges may make the same token
        if new == len(tokens):
            tokens.append(joined)
            keys.append(keys[left][:-1] + keys[right])
        for grown in text.merge(pair, new):
            if count := text.counts.get(grown):
                heapq.heappush(heap, entry(count, grown))
        bar.update()
    bar.close()
    return merges


class Symbols:
    """
    The pre-tokens of the training text as one sequence of symbols. For each symbol, arrays hold its
    token, the positions of its neighbors, and the count of its pre-token. For each pair, `counts`
    and `places` tell how often and where it occurs, so that a merge touches only these positions.
    """

    def __init__(self, counts):
        lengths = np.fromiter(map(len, counts), np.int64, len(counts))
        ends = np.cumsum(lengths)
        ids = np.frombuffer(b"".join(counts), np.uint8).astype(np.int32)  # (n_symbols,)
        weights = np.repeat(np.fromiter(counts.values(), np.int64, len(counts)), lengths)
        left = np.arange(-1, len(ids) - 1, dtype=np.int32)
        right = np.arange(1, len(ids) + 1, dtype=np.int32)
        left[ends - lengths], right[ends - 1] = -1, -1  # no neighbor
        # single elements are faster to read from an array than from numpy
        self.ids = array("i", ids.tobytes())  # -1: merged into the symbol to its left
        self.left, self.right = array("i", left.tobytes()), array("i", right.tobytes())
        self.weights = array("q", weights.tobytes())
        self.counts = {}  # {(id, id): count}
        self.places = defaultdict(partial(array, "i"))  # {(id, id): positions}; may be outdated
        first = np.flatnonzero(right >= 0)  # where a pair of bytes starts
        codes = ids[first] << 8 | ids[first + 1]
        totals = np.bincount(codes, weights[first], 1 << 16)
        order = np.argsort(codes, kind="stable")
        for part in np.split(first[order], np.flatnonzero(np.diff(codes[order])) + 1):
            if len(part):
                pair = int(ids[part[0]]), int(ids[part[0] + 1])
                self.counts[pair] = int(totals[pair[0] << 8 | pair[1]])
                self.places[pair] = array("i", part.astype(np.int32).tobytes())

    def merge(self, pair, new):
        """Merge a pair into the token `new` everywhere; return the set of pairs that this makes."""
        ids, weights, left, right = self.ids, self.weights, self.left, self.right
        counts, places, grown = self.counts, self.places, set()
        a, b = pair
        positions = places.pop(pair)
        for i in sorted(positions) if a == b else positions:  # pairs may overlap, as in aaa
            j = right[i]
            if ids[i] != a or j < 0 or ids[j] != b:  # changed by an earlier merge
                continue
            weight, before, after = weights[i], left[i], right[j]
            if before >= 0:
                counts[ids[before], a] -= weight
                made = ids[before], new
                counts[made] = counts.get(made, 0) + weight
                places[made].append(before)
                grown.add(made)
            if after >= 0:
                counts[b, ids[after]] -= weight
                made = new, ids[after]
                counts[made] = counts.get(made, 0) + weight
                places[made].append(i)
                grown.add(made)
                left[after] = i
            ids[i], ids[j], right[i] = new, -1, after
        del counts[pair]
        return grown


# ---- encoding


class BPETokenizer:
    """
    Text to ids and back, with a vocabulary {id: bytes}, ordered merges [(bytes, bytes)] and special
    tokens, which get the next ids if they are not in the vocabulary. Raises UserError if the
    vocabulary lacks a byte or the result of a merge.
    """

    def __init__(self, vocab, merges, special_tokens=None, pattern_name="gpt2"):
        self.vocab = dict(vocab)
        self.merges, self.pattern_name = [tuple(pair) for pair in merges], pattern_name
        if wrong := [i for i in self.vocab if type(i) is not int or not 0 <= i < MAX_TOKENS]:
            raise UserError(f"token id {wrong[0]!r}: expected 0 to {MAX_TOKENS - 1:,}")
        self.ids = {token: i for i, token in self.vocab.items()}
        if len(self.ids) < len(self.vocab) or b"" in self.ids:
            raise UserError("two ids have the same token, or a token is empty")
        self.special = {}  # {text: id}
        for text in checked_special(special_tokens):
            token = text.encode()
            if token not in self.ids:
                i = 1 + max(self.vocab, default=-1)
                self.vocab[i], self.ids[token] = token, i
            self.special[text] = self.ids[token]
        for token in [bytes([i]) for i in range(256)] + [a + b for a, b in self.merges]:
            if token not in self.ids:
                raise UserError(f"the vocabulary has no token {token!r}")
        # {(id, id): (rank of the merge, merged id)}
        self.ranks = {
            (self.ids[a], self.ids[b]): (rank, self.ids[a + b])
            for rank, (a, b) in enumerate(self.merges)
        }
        self.byte_ids = [self.ids[bytes([i])] for i in range(256)]
        self.special_pattern = split_at(self.special)
        self.pretokens, self.cache, self.cached = pattern(pattern_name).finditer, {}, 0

    def pretoken_ids(self, token):
        """
        Return the ids of one pre-token, given as bytes: repeatedly merge the adjacent pair with the
        earliest merge, and of several such pairs the leftmost.
        """
        ids, ranks = [self.byte_ids[byte] for byte in token], self.ranks
        n = len(ids)
        left, right = list(range(-1, n - 1)), list(range(1, n + 1))  # positions of neighbors
        heap = [(*ranks[pair], i, pair) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
        heapq.heapify(heap)
        while heap:
            _, new, i, pair = heapq.heappop(heap)
            j = right[i]
            if j == n or (ids[i], ids[j]) != pair:  # changed by an earlier merge
                continue
            ids[i], ids[j], after, before = new, None, right[j], left[i]
            right[i] = after
            if after < n:
                left[after] = i
                if rank := ranks.get(pair := (new, ids[after])):
                    heapq.heappush(heap, (*rank, i, pair))
            if before >= 0 and (rank := ranks.get(pair := (ids[before], new))):
                heapq.heappush(heap, (*rank, before, pair))
        return [i for i in ids if i is not None]

    def stretch_ids(self, text):
        """Return the ids of text between two places where every pattern cuts, and cache them."""
        ids = []
        for match in self.pretokens(text):
            ids += self.pretoken_ids(match[0].encode(errors="replace"))
        if len(text) < WINDOW:
            self.cached += len(text)
            if self.cached > CACHE_SIZE:
                self.cache, self.cached = {}, len(text)
            self.cache[text] = ids
        return ids

    def encode(self, text):
        """Return the ids of a text; special tokens in it get their own ids."""
        ids, at = [], 0
        for match in [*(self.special_pattern.finditer(text) if self.special_pattern else ()), None]:
            for stretch in BEFORE_SPACE.split(text[at : match.start()] if match else text[at:]):
                ids += self.cache.get(stretch) or self.stretch_ids(stretch)
            if match:
                ids.append(self.special[match[0]])
                at = match.end()
        return ids

    def encode_iterable(self, texts):
        """
        Yield the ids of consecutive pieces of a text, such as the lines of an open file. They are
        the same as those of the whole text; memory holds only BLOCK characters and one piece.
        """
        parts, size, searched = [], 0, 0
        for text in texts:
            parts.append(text)
            size += len(text)
            if size < BLOCK:
                continue
            rest = "".join(parts)
            if end := self.safe_end(rest, searched):
                yield from self.encode(rest[:end])
            parts, size, searched = [rest[end:]], 0, max(0, len(rest) - end - 2 * WINDOW)
        yield from self.encode("".join(parts))

    def safe_end(self, text, searched):
        """
        Return how many characters of a text can be encoded whatever follows: up to the last of
        safe_places() that no special token can cross, or 0 without one after `searched`.
        """
        end = len(text) - max(map(len, self.special), default=1)
        while end > searched:
            start = max(0, end - WINDOW)
            for place in reversed(list(safe_places(text, self.special, start, end))):
                return place
            end = start
        return 0

    def decode(self, ids):
        """Return the text of ids; invalid UTF-8 becomes U+FFFD."""
        return b"".join(self.vocab.get(i, b"") for i in ids).decode(errors="replace")

    def makes_its_tokens(self):
        """
        Return whether every token, as a pre-token, is encoded as itself, as in any vocabulary that
        was trained. If so, engines that know only the tokens, not the merges, give the same ids.
        """
        special = set(self.special.values())
        return all(
            self.pretoken_ids(token) == [i] for i, token in self.vocab.items() if i not in special
        )

    # ---- files

    def to_bytes(self):
        """Return the tokenizer as JSON; each byte of a token is one character (Latin-1)."""
        value = {
            "type": TYPE,
            "pattern": self.pattern_name,
            "special_tokens": list(self.special),
            "vocab": {i: token.decode("latin-1") for i, token in self.vocab.items()},
            "merges": [[a.decode("latin-1"), b.decode("latin-1")] for a, b in self.merges],
        }
        return json.dumps(value).encode()

    @classmethod
    def from_bytes(cls, data, path):
        """Read the result of to_bytes(); raise UserError, with `path`, for anything else."""
        try:
            value = parse_json(data, "it")
            if value["type"] != TYPE:
                raise ValueError(f"its type is {value['type']!r}, not {TYPE!r}")
            vocab = {int(i): token.encode("latin-1") for i, token in value["vocab"].items()}
            merges = [(a.encode("latin-1"), b.encode("latin-1")) for a, b in value["merges"]]
            return cls(vocab, merges, value["special_tokens"], value["pattern"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError) as e:
            raise UserError(f"{path} is not a tokenizer written by bpe.py: {e}") from None

    def save(self, path):
        """Write the tokenizer, and beside it a readable list of its tokens, ending in .vocab."""
        with atomic_write(path) as f:
            f.write(self.to_bytes())
        with atomic_write(os.path.splitext(path)[0] + ".vocab", "w") as f:
            f.writelines(f"{i}\t{readable(token)}\n" for i, token in sorted(self.vocab.items()))

    @classmethod
    def load(cls, path):
        """Read a file written by save(); raise UserError for anything else."""
        try:
            with open(path, "rb") as f:
                return cls.from_bytes(f.read(), path)
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from None

    def names(self):
        """
        Return {id: name} of the tokens in GPT-2's spelling, which Hugging Face and llama.cpp use
        too, see as_visible(). A special token is its own name. Raises UserError if two are equal.
        """
        special = {i: text for text, i in self.special.items()}
        names = {i: special.get(i) or as_visible(token) for i, token in self.vocab.items()}
        if len(set(names.values())) < len(names):
            raise UserError(
                "a special token would be spelled like another token in the files of Hugging Face "
                "and llama.cpp: train with different --special_tokens"
            )
        return names

    @classmethod
    def from_names(cls, names, merges, special_tokens, pattern_name="gpt2"):
        """
        Return a tokenizer from names(), with merges as pairs of names or as "left right". Raises
        KeyError for a character that stands for no byte, and UserError like the constructor.
        """
        special = set(special_tokens)
        vocab = {i: t.encode() if t in special else from_visible(t) for i, t in names.items()}
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)
        merges = [(from_visible(a), from_visible(b)) for a, b in pairs]
        return cls(vocab, merges, special_tokens, pattern_name)

    @classmethod
    def from_files(cls, vocab_path, merges_path, special_tokens=None):
        """
        Read GPT-2's files, where tokens are names(): vocab.json with {name: id} and merges.txt with
        one pair per line. Raises UserError for anything else.
        """
        try:
            with open(vocab_path, encoding="utf-8-sig") as f:
                names = {i: name for name, i in parse_json(f.read(), "the first file").items()}
            with open(merges_path, encoding="utf-8-sig") as f:
                lines = f.read().split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
            return cls.from_names(names, merges, special_tokens or ())
        except OSError as e:
            raise UserError(f"cannot read {e.filename}: {e.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, UserError) as e:
            reason = f"{e} does not stand for a byte" if isinstance(e, KeyError) else e
            raise UserError(
                f"{vocab_path} and {merges_path} are not a GPT-2 vocabulary: {reason}"
            ) from None


# ---- cutting


def safe_places(text, special_tokens, start, end):
    """
    Yield the positions in a text, from start to end, where every pattern cuts and that no special
    token crosses, so that the two sides can be encoded separately.
    """
    for match in SAFE.finditer(text, start, end):
        place = match.start()
        if not any(
            text.find(token, max(0, place - len(token) + 1), place + len(token) - 1) >= 0
            or text.startswith(token, place + 1)  # the space joins the white space before it
            for token in special_tokens
        ):
            yield place


def pieces_of(span, special_tokens, size):
    """
    Cut a Span into Spans of about `size` bytes without cutting a pre-token: .txt files at
    safe_places(), others between documents. Without a safe place it stays whole.
    """
    if not is_plain(span.path):
        if span.end - span.start < os.path.getsize(span.path):
            return [span]
        return cut(span, -(-span.end // size))
    # bytes around the window, because special tokens and characters may cross its ends
    places, margin = [span.start], max([4, *(len(token.encode()) for token in special_tokens)])
    with open(span.path, "rb") as f:
        while places[-1] + size < span.end:
            at = places[-1] + size
            while at < span.end:
                back = min(margin, at)
                f.seek(at - back)
                data = f.read(WINDOW + 2 * margin)
                text = data.decode(errors="surrogateescape")  # may start or end inside a character
                start = len(data[:back].decode(errors="surrogateescape"))
                end = len(text) - margin
                if (place := next(safe_places(text, special_tokens, start, end), None)) is not None:
                    at += len(text[:place].encode(errors="surrogateescape")) - back
                    break
                at += WINDOW
            places.append(min(at, span.end))
    if places[-1] < span.end:
        places.append(span.end)
    return [Span(span.path, a, b) for a, b in pairwise(places)]


def all_pieces(spans, special_tokens):
    """Cut Spans into Spans of MAX_PIECE bytes, or an eighth of the total if that is less."""
    spans = list(spans)
    size = max(1 << 16, min(MAX_PIECE, sum(span.end - span.start for span in spans) // 8))
    return [piece for span in spans for piece in pieces_of(span, special_tokens, size)]


# ---- how tokens are spelled


def readable(token):
    """Return a token for people to read: its text in quotes, or its bytes if not UTF-8."""
    try:
        return json.dumps(token.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return repr(token)


@cache
def visible_bytes():
    """Return GPT-2's {byte: character}: visible bytes stand for themselves, others follow."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(others)}


def as_visible(token):
    """Return a token as GPT-2's files spell it: each byte as its character of visible_bytes()."""
    return "".join(visible_bytes()[byte] for byte in token)


def from_visible(text):
    """Return the bytes that as_visible() spells; raise KeyError for another character."""
    return bytes(byte_of()[character] for character in text)


@cache
def byte_of():
    return {character: byte for byte, character in visible_bytes().items()}


# ---- the command line


if __name__ == "__main__":
    stage = ""  # train, encode or import
    source = ""  # a text file or a folder: .txt, .json, .jsonl, .csv or .parquet
    model = "bpe.model"  # the tokenizer file; encode reads it, train and import write it
    num_workers = 0  # processes; 0: one per core
    # train
    vocab_size = 10000  # 256 bytes, merges and special tokens together
    special_tokens = "<|endoftext|>"  # comma-separated; the first one starts each document
    pattern_name = "gpt2"  # how to cut text into pre-tokens: gpt2 or gpt4
    also_tiktoken = False  # also write the ranks for tiktoken
    also_hf = False  # also write a tokenizer.json for Hugging Face's libraries
    # import
    vocab_json = ""  # GPT-2's vocab.json
    merges_txt = ""  # GPT-2's merges.txt
    tokenizer_json = ""  # instead of both: a tokenizer.json of Hugging Face
    # encode
    out = ""  # folder for shards; or a .npy file, where .txt files get no BOS
    valid_source = ""  # text for validation; empty: part of the documents
    configure(globals(), positional="stage")

    from formats.hftokenizer import VocabularyFiles, byte_level_from_json
    from text.shards import choose_split, write_npy, write_shards
    from tokenizer import ByteLevel

    files = VocabularyFiles(model, also_tiktoken, also_hf)
    special = [token for token in special_tokens.split(",") if token]
    if stage not in ("train", "encode", "import"):
        problem = f"stage = {stage!r}" if stage else "the stage is missing"
        raise UserError(f"{problem}: expected one of train, encode, import")
    if stage != "import" and not source:
        raise UserError("--source=PATH is missing: pass a text file or a folder of them")

    if stage == "train":
        files.check(source)
        spans = list(map(whole_file, text_files(source)))
        vocab, merges = train_on(
            spans, vocab_size, special, worker_count(num_workers), pattern_name
        )
        if not merges and vocab_size > len(vocab):
            raise UserError(f"{source} contains no text to train on")
        if len(vocab) < vocab_size:
            print(f"note: this text yields only {len(vocab):,} tokens")
        files.write(BPETokenizer(vocab, merges, special, pattern_name))

    if stage == "import":
        missing = [f"--{n}" for n in ("vocab_json", "merges_txt") if not globals()[n]]
        if missing and not tokenizer_json:
            raise UserError(
                f"{missing[0]}=PATH is missing: pass GPT-2's vocab.json and merges.txt, or "
                f"--tokenizer_json=PATH"
            )
        files.check(source)
        if tokenizer_json:
            files.write(byte_level_from_json(tokenizer_json))
        else:
            files.write(BPETokenizer.from_files(vocab_json, merges_txt, special))

    if stage == "encode":
        if not out:
            raise UserError("--out=PATH is missing: pass a folder for shards or a .npy file")
        is_array = out.lower().endswith(".npy")
        if os.path.splitext(out)[1] and not (is_array or os.path.isdir(out)):
            raise UserError(f"out = {out!r}: expected a folder for shards or a .npy file")
        if is_array and valid_source:
            raise UserError("valid_source cannot be used with a .npy file: use a folder as --out")
        tokenizer, workers = ByteLevel(model), worker_count(num_workers)
        if is_array:
            spans = all_pieces(map(whole_file, text_files(source)), list(tokenizer.bpe.special))
            n, dtype = write_npy(out, tokenizer, spans, workers)
            print(f"{n:,} tokens, {dtype}, in {out}")
        else:
            plan = plan_shards(source, valid_source)
            about = {
                "valid_source": [os.path.abspath(source)],
                "made_by": f"python bpe.py encode --source={source} --model={model} --out={out}",
            }
            split = choose_split(plan)
            write_shards(out, tokenizer, plan, split, workers, about)
