"""
Byte-level BPE: a vocabulary of bytes and of what merging them makes, learned from text.

Text is cut into pre-tokens (words with the space before them, numbers, runs of punctuation or of
white space). Training counts them, and merges, again and again, the pair of neighbours that occurs
most often, inside pre-tokens only. Encoding merges the bytes of each pre-token in the order in
which the merges were learned (Sennrich et al. 2016, arXiv:1508.07909; on bytes: GPT-2).

Ids are: the 256 bytes, then the merges in order, then the special tokens, which stand for
themselves in a text and are never split nor merged.
"""

import heapq
import json
import multiprocessing
import os
import re
import struct
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import pairwise

from tqdm import tqdm

from configurator import UserError
from files import atomic_write

CACHED = 1 << 18  # pre-tokens whose ids an encoder remembers
PIECE = 1 << 16  # characters that a stream is encoded in
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # White_Space of Unicode
# Patterns of pre-tokens, of GPT-2 and GPT-4 (cl100k); <L>, <N> and <S> stand for the letters,
# numbers and white space of Unicode, as the unicodedata of this Python knows it. run.c has matchers
# of its own, and knows them by their place
PATTERNS = {
    "gpt2": "'(?:[sdmt]|ll|ve|re)| ?[<L>]+| ?[<N>]+| ?[^<S><L><N>]+|[<S>]+(?![^<S>])|[<S>]+",
    "gpt4": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n<L><N>]?[<L>]+|[<N>]{1,3}| ?[^<S><L><N>]+[\r\n]*|"
        r"[<S>]*[\r\n]|[<S>]+(?![^<S>])|[<S>]+"
    ),
}


@cache
def ranges():
    """[(first code point, last, class)] of the letters, L, numbers, N, and white space, S."""
    characters, found = list(map(chr, range(0x110000))), []
    white = set(re.findall(f"[{WHITE}]", "".join(characters)))
    for code, character in enumerate(characters):
        category = unicodedata.category(character)[0]
        kind = "S" if character in white else category
        if kind == category and category not in "LN":
            continue
        if found and found[-1][1:] == (code - 1, kind):
            found[-1] = (found[-1][0], code, kind)
        else:
            found.append((code, code, kind))
    return found


@cache
def pattern(name="gpt2"):
    """The compiled pattern of pre-tokens, of PATTERNS."""
    text = PATTERNS[name]
    for kind in "LNS":
        own = "".join(f"{chr(a)}-{chr(b)}" for a, b, of in ranges() if of == kind)
        text = text.replace(f"<{kind}>", own)
    return re.compile(text)


def split_at(special_tokens):
    """A compiled pattern of special tokens, the longest first, or None where there are none."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if special_tokens else None


# ---- training


def count_pretokens(path, start, end, special_tokens, pattern_name):
    """Counter of the pre-tokens, as bytes, in the bytes from start to end of a file."""
    with open(path, "rb") as f:
        f.seek(start)
        text = f.read(end - start).decode(errors="replace")
    special, find = split_at(special_tokens), pattern(pattern_name).finditer
    counts = Counter()
    for part in special.split(text) if special else [text]:
        counts.update(match[0] for match in find(part))
    return Counter({token.encode(): n for token, n in counts.items()})


def cuts(path, special_tokens, size=1 << 24):
    """
    Where a file is cut into pieces of about `size` bytes, so that no pre-token is cut in two:
    before a special token, or between an ASCII letter or digit and a newline. The first place is 0,
    the last the size of the file.
    """

    def begins_inside(token, other):
        ends = [other[i:] for i in range(1, len(other))]
        return any(end.startswith(token) or token.startswith(end) for end in ends)

    places, total = [0], os.path.getsize(path)
    special = [
        re.escape(token.encode())
        for token in special_tokens
        if not any(begins_inside(token, other) for other in special_tokens)
    ]
    safe = re.compile(b"|".join([b"(?<=[A-Za-z0-9])(?=\n)", *(b"(?=" + t + b")" for t in special)]))
    window = max([1 << 16, *(2 * len(token) for token in special)])
    with open(path, "rb") as f:
        while places[-1] + size < total:
            at, match = places[-1] + size, None
            while at < total and not match:
                f.seek(at)
                text = f.read(2 * window)  # windows overlap, so that nothing is missed between them
                match = safe.search(text)
                at += match.start() if match else window
            places.append(min(at, total))
    return [*places, total] if places[-1] < total else places


class Later:
    """A pair in a heap: the lexicographically greater of two comes first."""

    __slots__ = ("pair",)

    def __init__(self, pair):
        self.pair = pair

    def __lt__(self, other):
        return self.pair > other.pair


def merge_all(counts, n_merges):
    """
    The first n_merges merges, pairs of bytes, of pre-tokens {bytes: count}. Of pairs that occur
    equally often the lexicographically greater is merged first. A merge touches only the
    pre-tokens that contain it.
    """
    pieces = {bytes([i]): bytes([i]) for i in range(256)}
    words = [[pieces[bytes([b])] for b in word] for word in counts]
    weights = list(counts.values())
    pair_counts, places = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += weights[i]
            places[pair].add(i)
    heap = [(-n, Later(pair)) for pair, n in pair_counts.items()]
    heapq.heapify(heap)
    merges = []
    bar = tqdm(total=n_merges, desc="merging", unit="merge", mininterval=0.5)
    while heap and len(merges) < n_merges:
        n, later = heapq.heappop(heap)
        pair = later.pair
        if -n != pair_counts[pair] or not n:  # changed since it was put there
            continue
        merges.append(pair)
        bar.update()
        (a, b), joined, changed = pair, pair[0] + pair[1], set()
        for i in places.pop(pair):
            word, weight, new, j = words[i], weights[i], [], 0
            while j < len(word):
                if j + 1 < len(word) and word[j] == a and word[j + 1] == b:
                    new.append(joined)
                    j += 2
                else:
                    new.append(word[j])
                    j += 1
            for old in pairwise(word):
                pair_counts[old] -= weight
                changed.add(old)
            for one in pairwise(new):
                pair_counts[one] += weight
                places[one].add(i)
                changed.add(one)
            words[i] = new
        del pair_counts[pair]
        for one in changed - {pair}:
            heapq.heappush(heap, (-pair_counts[one], Later(one)))
    bar.close()
    return merges


def train_bpe(input_path, vocab_size, special_tokens=(), num_processes=1, pattern_name="gpt2"):
    """
    Train on a text file -> (vocab {id: bytes}, merges [(bytes, bytes)]), as CS336 asks for it:
    special tokens end a pre-token and are not counted. Raises UserError where the size has no room
    for the bytes and the special tokens.
    """
    special_tokens = list(dict.fromkeys(special_tokens))
    n_merges = vocab_size - 256 - len(special_tokens)
    if n_merges < 0:
        raise UserError(
            f"vocab_size = {vocab_size}: expected at least {256 + len(special_tokens)}, for 256 "
            f"bytes and {len(special_tokens)} special tokens"
        )
    places = cuts(input_path, special_tokens)
    jobs = [(input_path, a, b, special_tokens, pattern_name) for a, b in pairwise(places)]
    counts = Counter()
    if num_processes == 1 or len(jobs) == 1:
        for job in jobs:
            counts.update(count_pretokens(*job))
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes, mp_context=spawn) as pool:
            for found in pool.map(count_pretokens, *zip(*jobs, strict=True)):
                counts.update(found)
    merges = merge_all(counts, n_merges)
    tokens = [bytes([i]) for i in range(256)] + [a + b for a, b in merges]
    tokens += [token.encode() for token in special_tokens]
    return dict(enumerate(tokens)), merges


# ---- encoding

# between these no pre-token of any pattern goes on
SAFE = re.compile("(?<=[A-Za-z0-9])(?=\n)")


class BPETokenizer:
    """
    Text to ids and back, by a vocabulary {id: bytes}, merges [(bytes, bytes)] in their order, and
    special tokens. Raises UserError where a merge makes no token of the vocabulary, or a byte is
    none. Special tokens that the vocabulary lacks get the next ids.
    """

    def __init__(self, vocab, merges, special_tokens=None, pattern_name="gpt2"):
        self.vocab = dict(vocab)
        self.merges, self.pattern_name = [tuple(pair) for pair in merges], pattern_name
        self.ids = {token: i for i, token in self.vocab.items()}
        self.special = {}
        for text in special_tokens or ():
            token = text.encode()
            if token not in self.ids:
                i = 1 + max(self.vocab, default=-1)
                self.vocab[i], self.ids[token] = token, i
            self.special[text] = self.ids[token]
        for token in [bytes([i]) for i in range(256)] + [a + b for a, b in self.merges]:
            if token not in self.ids:
                raise UserError(f"the vocabulary has no token {token!r}")
        # {(id, id): (place in the order, id)}
        self.ranks = {
            (self.ids[a], self.ids[b]): (rank, self.ids[a + b])
            for rank, (a, b) in enumerate(self.merges)
        }
        self.bytes = [self.ids[bytes([i])] for i in range(256)]
        self.split = split_at(self.special)
        self.find, self.cache = pattern(pattern_name).finditer, {}

    def pretoken_ids(self, text):
        """The ids of one pre-token: of all pairs that can be merged, the first learned is next."""
        ids, ranks = [self.bytes[b] for b in text.encode(errors="replace")], self.ranks
        while len(ids) > 1:
            found = [(ranks[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
            if not found:
                break
            (rank, new), _ = min(found)
            merged, i = [], 0
            while i < len(ids):
                pair = ranks.get((ids[i], ids[i + 1])) if i + 1 < len(ids) else None
                if pair and pair[0] == rank:
                    merged.append(new)
                    i += 2
                else:
                    merged.append(ids[i])
                    i += 1
            ids = merged
        if len(self.cache) >= CACHED:
            self.cache.clear()
        self.cache[text] = ids
        return ids

    def encode(self, text):
        """The ids of a text."""
        ids, at, cached = [], 0, self.cache.get
        for match in [*(self.split.finditer(text) if self.split else ()), None]:
            part = text[at : match.start()] if match else text[at:]
            for token in self.find(part):
                token = token[0]
                ids += cached(token) or self.pretoken_ids(token)
            if match:
                ids.append(self.special[match[0]])
                at = match.end()
        return ids

    def encode_iterable(self, texts):
        """
        Yield the ids of texts that follow each other, such as the lines of an open file: those of
        the whole, in memory for PIECE characters and one line.
        """
        parts, size = [], 0
        for text in texts:
            parts.append(text)
            size += len(text)
            if size < PIECE:
                continue
            rest = "".join(parts)
            end = self.safe_end(rest)
            yield from self.encode(rest[:end])
            parts, size = [rest[end:]], 0
        yield from self.encode("".join(parts))

    def safe_end(self, text):
        """
        How much of a text can be encoded whatever follows: up to a newline behind an ASCII letter
        or digit, far enough from the end that no special token begins before it and ends behind.
        """
        longest = max(map(len, self.special), default=1)
        places = [match.start() for match in SAFE.finditer(text, 0, max(0, len(text) - longest))]
        while places:
            spans = self.split.finditer(text) if self.split else ()
            if not any(match.start() < places[-1] < match.end() for match in spans):
                return places[-1]
            places.pop()
        return 0

    def decode(self, ids):
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.vocab[i] for i in ids).decode(errors="replace")

    # ---- files

    def save(self, path):
        """Write the tokenizer as JSON; tokens as strings of one character a byte (Latin-1)."""
        value = {
            "type": "byte-level BPE",
            "pattern": self.pattern_name,
            "special_tokens": list(self.special),
            "vocab": {i: token.decode("latin-1") for i, token in self.vocab.items()},
            "merges": [[a.decode("latin-1"), b.decode("latin-1")] for a, b in self.merges],
        }
        with atomic_write(path, "w") as f:
            json.dump(value, f)

    def c_file(self, bos, eos):
        """
        The tokenizer file of run.c, as bytes, little-endian: "bpe1"; the place of the pattern in
        PATTERNS, the ids bos and eos, the numbers of tokens, merges, special tokens and ranges; of
        each range of characters the first and the last code point and the class, 1 letters, 2
        numbers, 3 white space; the ids of the special tokens; of each merge the ids left, right and
        merged, in their order; each token's length and bytes, without bytes where an id is none.
        All numbers are uint32. bos begins a text, either of the two ends one.
        """
        n = 1 + max(self.vocab)
        sizes = n, len(self.merges), len(self.special), len(ranges())
        numbers = [list(PATTERNS).index(self.pattern_name), bos, eos, *sizes]
        for first, last, kind in ranges():
            numbers += first, last, 1 + "LNS".index(kind)
        numbers += self.special.values()
        for a, b in self.merges:
            numbers += self.ids[a], self.ids[b], self.ids[a + b]
        tokens = (self.vocab.get(i, b"") for i in range(n))
        entries = (struct.pack("<I", len(token)) + token for token in tokens)
        return b"bpe1" + struct.pack(f"<{len(numbers)}I", *numbers) + b"".join(entries)

    @classmethod
    def load(cls, path):
        """Read what save() wrote. Raises UserError for anything else."""
        try:
            with open(path, encoding="utf-8") as f:
                value = json.load(f)
            vocab = {int(i): token.encode("latin-1") for i, token in value["vocab"].items()}
            merges = [(a.encode("latin-1"), b.encode("latin-1")) for a, b in value["merges"]]
            return cls(vocab, merges, value["special_tokens"], value["pattern"])
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path} is no tokenizer of bpe.py: {e}") from None

    @classmethod
    def from_files(cls, vocab_path, merges_path, special_tokens=None):
        """
        Read GPT-2's files: vocab.json, {token: id}, and merges.txt, a pair a line, in which each
        byte is a visible character. Raises UserError for anything else.
        """
        to_byte = {character: byte for byte, character in visible_bytes().items()}

        def token(text):
            return bytes(to_byte[character] for character in text)

        special = set(special_tokens or ())
        try:
            with open(vocab_path, encoding="utf-8") as f:
                found = json.load(f).items()
            vocab = {i: t.encode() if t in special else token(t) for t, i in found}
            with open(merges_path, encoding="utf-8") as f:
                lines = f.read().split("\n")
            lines = [line for line in lines if line and not line.startswith("#version")]
            merges = [tuple(map(token, line.split(" "))) for line in lines]
            return cls(vocab, merges, special_tokens)
        except OSError as e:
            raise UserError(f"cannot read {e.filename}: {e.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{vocab_path} and {merges_path} are no files of GPT-2: {e}") from None


def visible_bytes():
    """{byte: character} of GPT-2's files: a byte that can be seen is itself, the others follow."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(others)}
