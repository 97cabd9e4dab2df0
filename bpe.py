"""
Byte-level BPE: a vocabulary of bytes and of what merging them makes, learned from text.

Text is cut into pre-tokens (words with the space before them, numbers, runs of punctuation or of
white space). Training counts them, and merges, again and again, the pair of neighbours that occurs
most often, inside pre-tokens only. Encoding merges the bytes of each pre-token in the order in
which the merges were learned (Sennrich et al. 2016, arXiv:1508.07909; on bytes: GPT-2).

For example "low low low lower" has the pre-tokens low, " low" (twice) and " lower". Its pairs are
l o and o w, 4 times each, " " l, 3 times, w e and e r, once. Of the two the greater comes first:
o w is merged, then l ow, 4 times, then " " low, 3 times. "slow" is encoded by the same steps:
s l o w, s l ow, s low.

Ids are: the 256 bytes, then the merges in order, then the special tokens, which stand for
themselves in a text and are never split nor merged.

In this file: the patterns; training (merge_all() is its heart); encoding (pretoken_ids()); where a
long text may be cut, for both; the script.

    python bpe.py train --source=text.txt --model=my.model --vocab_size=10000
    python bpe.py encode --source=text.txt --model=my.model --out=shards     # or --out=ids.npy
    python bpe.py import --vocab_json=vocab.json --merges_txt=merges.txt --model=gpt2.model
    python bpe.py import --tokenizer_json=tokenizer.json --model=smol.model
"""

import base64
import heapq
import json
import os
import re
import struct
import unicodedata
from array import array
from collections import Counter, defaultdict
from functools import cache, partial
from itertools import pairwise

import numpy as np
from tqdm import tqdm

from configurator import UserError, configure
from system.files import atomic_write
from system.workers import over_spans, worker_count
from text.corpus import Span, cut, is_plain, plan_shards, text_files, texts_of, whole_file

TYPE = "byte-level BPE"  # of a file of save()
PIECE = 1 << 22  # bytes of a file that are counted at a time
MOST_BYTES = 1 << 26  # of different pre-tokens that training counts, which take 20 times as much
MOST_TOKENS = 1 << 24  # in a vocabulary
WINDOW = 1 << 12  # bytes in which a place to cut is looked for at once
CACHED = 1 << 21  # characters of stretches of text whose ids an encoder remembers
BLOCK = 1 << 16  # characters that a stream is encoded in
# Before a space that something follows every pattern cuts. Cutting there first, and then each
# different stretch only once by its pattern, is several times as fast
BEFORE_SPACE = re.compile(r"(?= \S)")
# and between a letter or number and a sign, and behind a newline between two that are not white
SAFE = re.compile(r"(?= \S)|(?<=[^\W_])(?=[^\w\s])|(?<=\S\n)(?=\S)")
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # White_Space of Unicode
LAST_LETTER = 0x3FFFF  # the planes behind it have no letters, numbers and white space
# Patterns of pre-tokens, of GPT-2 and GPT-4 (cl100k, in Llama 3's words, which cut the same).
# run.c has matchers of its own, and knows them by their place
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


@cache
def ranges():
    """
    [(first code point, last, class)] of the letters, L, numbers, N, and white space, S, as this
    Python knows Unicode: 14 in 3.11, 15.1 in 3.13. The rare characters that came between two
    versions may be cut in two ways.
    """
    characters, found = list(map(chr, range(LAST_LETTER + 1))), []
    white = set(re.findall(f"[{WHITE}]", "".join(characters)))
    for code, character in enumerate(characters):
        kind = "S" if character in white else unicodedata.category(character)[0]
        if character not in white and kind not in "LN":
            continue
        if found and found[-1][1:] == (code - 1, kind):
            found[-1] = (found[-1][0], code, kind)
        else:
            found.append((code, code, kind))
    return found


@cache
def pattern(name="gpt2"):
    """
    A pattern of PATTERNS, compiled, with the classes of Unicode that Python's re has no names for.
    """
    text = PATTERNS[name].replace(r"\S", r"[^\s]")
    classes = {"L": r"\p{L}", "N": r"\p{N}", "S": r"\s"}
    for kind, named in classes.items():
        own = "".join(f"{chr(a)}-{chr(b)}" for a, b, of in ranges() if of == kind)
        parts = re.split(r"(\[.*?\])", text)  # "a", "[bc]", "d": every second one is a set
        parts[1::2] = [part.replace(named, own) for part in parts[1::2]]
        parts[::2] = [part.replace(named, f"[{own}]") for part in parts[::2]]
        text = "".join(parts)
    return re.compile(text)


def checked_special(special_tokens):
    """A list of special tokens, each once. Raises UserError where they are no such list."""
    if isinstance(special_tokens, str):
        raise UserError(f"special_tokens = {special_tokens!r}: expected a list of texts")
    for token in special_tokens or ():
        if not isinstance(token, str) or len(token.encode(errors="replace")) < 2:
            raise UserError(f"special token {token!r}: expected a text of two bytes or more")
    return list(dict.fromkeys(special_tokens or ()))


def split_at(special_tokens):
    """A compiled pattern of special tokens, the longest first, or None where there are none."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if special_tokens else None


# ---- training


def train_bpe(input_path, vocab_size, special_tokens=(), num_processes=1, pattern_name="gpt2"):
    """
    Train on a text file -> (vocab {id: bytes}, merges [(bytes, bytes)]), as CS336 asks for it:
    special tokens end a pre-token and are not counted. A text with too few pairs makes a smaller
    vocabulary. Raises UserError where the size has no room for the bytes and the special tokens.
    """
    spans = [Span(os.fspath(input_path), 0, os.path.getsize(input_path))]
    return train_on(spans, vocab_size, special_tokens, num_processes, pattern_name)


def train_on(spans, vocab_size, special_tokens=(), num_processes=1, pattern_name="gpt2"):
    """train_bpe() on a list of Spans."""
    if pattern_name not in PATTERNS:
        raise UserError(f"pattern_name = {pattern_name!r}: expected {' or '.join(PATTERNS)}")
    special_tokens = checked_special(special_tokens)
    n_merges = vocab_size - 256 - len(special_tokens)
    if n_merges < 0:
        raise UserError(
            f"vocab_size = {vocab_size}: expected at least {256 + len(special_tokens)}, for the "
            f"256 bytes and the special tokens"
        )
    counts = count_all(spans, special_tokens, num_processes, pattern_name)
    merges = merge_all(counts, n_merges)
    tokens = [bytes([i]) for i in range(256)] + [a + b for a, b in merges]
    tokens += [token.encode() for token in special_tokens]
    return dict(enumerate(tokens)), merges


def count_pretokens(span, special_tokens, pattern_name):
    """Counter of the pre-tokens, as bytes, in a Span."""
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
    Counter of the pre-tokens of Spans. Where the different ones have more than MOST_BYTES the
    rarest are given up, so that memory stays bounded; a line says so.
    """
    pieces = all_pieces(spans, special_tokens)
    counts, n_bytes, given_up = Counter(), 0, 0
    arguments = special_tokens, pattern_name
    for found in over_spans(count_pretokens, pieces, arguments, num_processes, "count"):
        counts.update(found)
        n_bytes += sum(map(len, found))  # at the most
        if n_bytes > MOST_BYTES:
            n_bytes = sum(map(len, counts))
        while n_bytes > MOST_BYTES:
            given_up += 1
            counts = Counter({token: n for token, n in counts.items() if n > given_up})
            n_bytes = sum(map(len, counts))
    if given_up:
        print(
            f"more than {MOST_BYTES / 1e6:.0f} MB of different pre-tokens: of those that came up "
            f"{given_up} times or less some were not counted"
        )
    return counts


def merge_all(counts, n_merges):
    """
    The first n_merges merges, pairs of bytes, of pre-tokens {bytes: count}. Of pairs that occur
    equally often the lexicographically greater is merged first.

    All pre-tokens lie one after another in arrays, each symbol (a token at a place) with the places
    of its neighbours. A pair knows how often it occurs and where, so that a merge costs what it
    changes. Both may be out of date: a place where another merge has been is passed over, and a
    count in the heap that has sunk since is corrected when it comes to the top.
    """
    tokens = [bytes([i]) for i in range(256)]  # id -> bytes
    ids_of = {token: i for i, token in enumerate(tokens)}
    # Python's heaps have the smallest first, and the greater token is wanted: so keys of tokens,
    # the greater the token the smaller its key, are their bytes counted down, and a greater end
    keys = [chr(255 - i) + "\u0100" for i in range(256)]
    letters = np.frombuffer(b"".join(counts), np.uint8)
    ids = array("i", letters.astype(np.int32).tobytes())  # (n_symbols,); -1: merged to its left
    lengths = np.fromiter(map(len, counts), np.int64, len(counts))
    ends = np.cumsum(lengths)
    n_symbols = len(ids)
    weights = array("q", np.repeat(np.fromiter(counts.values(), np.int64), lengths).tobytes())
    left, right = np.arange(-1, n_symbols - 1), np.arange(1, n_symbols + 1)
    left[ends - lengths], right[ends - 1] = -1, -1
    left, right = (array("i", x.astype(np.int32).tobytes()) for x in (left, right))
    # where each pair begins
    places = defaultdict(partial(array, "i"))
    counts_of = {}
    symbols = np.frombuffer(ids, np.int32)
    first = np.flatnonzero(np.frombuffer(right, np.int32) >= 0)
    codes = symbols[first] << 8 | symbols[first + 1]
    order = np.argsort(codes, kind="stable")
    totals = np.bincount(codes, np.frombuffer(weights, np.int64)[first], 1 << 16)
    for part in np.split(first[order], np.flatnonzero(np.diff(codes[order])) + 1):
        if len(part):
            pair = int(symbols[part[0]]), int(symbols[part[0] + 1])
            places[pair] = array("i", part.astype(np.int32).tobytes())
            counts_of[pair] = int(totals[pair[0] << 8 | pair[1]])
    del symbols, first, codes, order, totals

    heap = [(-n, keys[a], keys[b], a, b) for (a, b), n in counts_of.items()]
    heapq.heapify(heap)
    merges = []
    bar = tqdm(total=n_merges, desc="merge", unit="merge", mininterval=0.5)
    while heap and len(merges) < n_merges:
        n, _, _, a, b = heapq.heappop(heap)
        count = counts_of.get((a, b), 0)
        if -n != count:
            if 0 < count < -n:
                heapq.heappush(heap, (-count, keys[a], keys[b], a, b))
            continue
        joined = tokens[a] + tokens[b]
        new = ids_of.setdefault(joined, len(tokens))
        if new == len(tokens):
            tokens.append(joined)
            keys.append(keys[a][:-1] + keys[b])
        merges.append((tokens[a], tokens[b]))
        bar.update()
        grown = set()
        found = places.pop((a, b))
        for i in sorted(found) if a == b else found:  # in order where they overlap: aaa
            j = right[i]
            if ids[i] != a or j < 0 or ids[j] != b:  # merged otherwise since
                continue
            weight, before, after = weights[i], left[i], right[j]
            if before >= 0:
                counts_of[ids[before], a] -= weight
                pair = ids[before], new
                counts_of[pair] = counts_of.get(pair, 0) + weight
                places[pair].append(before)
                grown.add(pair)
            if after >= 0:
                counts_of[b, ids[after]] -= weight
                pair = new, ids[after]
                counts_of[pair] = counts_of.get(pair, 0) + weight
                places[pair].append(i)
                grown.add(pair)
                left[after] = i
            ids[i], ids[j], right[i] = new, -1, after
        counts_of.pop((a, b))
        for one, other in grown:
            if n := counts_of.get((one, other)):
                heapq.heappush(heap, (-n, keys[one], keys[other], one, other))
    bar.close()
    return merges


# ---- encoding


class BPETokenizer:
    """
    Text to ids and back, by a vocabulary {id: bytes}, merges [(bytes, bytes)] in their order, and
    special tokens. Raises UserError where a merge makes no token of the vocabulary, or a byte is
    none. Special tokens that the vocabulary lacks get the next ids.
    """

    def __init__(self, vocab, merges, special_tokens=None, pattern_name="gpt2"):
        self.vocab = dict(vocab)
        self.merges, self.pattern_name = [tuple(pair) for pair in merges], pattern_name
        if wrong := [i for i in self.vocab if type(i) is not int or not 0 <= i < MOST_TOKENS]:
            raise UserError(f"an id is {wrong[0]!r}: expected 0 to {MOST_TOKENS - 1:,}")
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
        # {(id, id): (place in the order, id)}
        self.ranks = {
            (self.ids[a], self.ids[b]): (rank, self.ids[a + b])
            for rank, (a, b) in enumerate(self.merges)
        }
        self.byte_ids = [self.ids[bytes([i])] for i in range(256)]
        self.special_pattern = split_at(self.special)
        self.pretokens, self.cache, self.cached = pattern(pattern_name).finditer, {}, 0

    def pretoken_ids(self, token):
        """
        The ids of one pre-token, as bytes: of all pairs of neighbours that have a merge the first
        learned is merged, the leftmost where there are several, and again.
        """
        ids, ranks = [self.byte_ids[byte] for byte in token], self.ranks
        n = len(ids)
        left, right = list(range(-1, n - 1)), list(range(1, n + 1))  # places of neighbours
        heap = [(*ranks[pair], i, pair) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
        heapq.heapify(heap)
        while heap:
            _, new, i, pair = heapq.heappop(heap)
            j = right[i]
            if j == n or (ids[i], ids[j]) != pair:  # merged otherwise since
                continue
            ids[i], ids[j], after, before = new, None, right[j], left[i]
            right[i] = after
            if after < n:
                left[after] = i
                if found := ranks.get(pair := (new, ids[after])):
                    heapq.heappush(heap, (*found, i, pair))
            if before >= 0 and (found := ranks.get(pair := (ids[before], new))):
                heapq.heappush(heap, (*found, before, pair))
        return [i for i in ids if i is not None]

    def stretch_ids(self, text):
        """The ids of text between two places where every pattern cuts; remembered."""
        ids = []
        for match in self.pretokens(text):
            ids += self.pretoken_ids(match[0].encode(errors="replace"))
        if len(text) < WINDOW:
            self.cached += len(text)
            if self.cached > CACHED:
                self.cache, self.cached = {}, len(text)
            self.cache[text] = ids
        return ids

    def encode(self, text):
        """The ids of a text; special tokens in it stand for themselves."""
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
        Yield the ids of texts that follow each other, such as the lines of an open file: those of
        the whole, in memory for BLOCK characters and one line.
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
        How much of a text can be encoded whatever follows: up to the last of safe_places(), far
        enough from the end that no special token begins before it and ends behind; 0 where there is
        none behind `searched`.
        """
        end = len(text) - max(map(len, self.special), default=1)
        while end > searched:
            start = max(0, end - WINDOW)
            for place in reversed(list(safe_places(text, self.special, start, end))):
                return place
            end = start
        return 0

    def decode(self, ids):
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.vocab.get(i, b"") for i in ids).decode(errors="replace")

    def makes_its_tokens(self):
        """
        Whether every token, as a pre-token, is encoded as itself, as in all vocabularies that were
        trained. Then engines that know the tokens alone, and join any pair that makes one, give the
        same ids.
        """
        special = set(self.special.values())
        return all(
            self.pretoken_ids(token) == [i] for i, token in self.vocab.items() if i not in special
        )

    # ---- files

    def to_bytes(self):
        """The tokenizer as JSON; tokens as strings of one character a byte (Latin-1)."""
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
        """What to_bytes() made, read from `path`. Raises UserError for anything else."""
        try:
            try:
                value = json.loads(data)
            except ValueError:
                raise ValueError("it is no JSON, or damaged") from None
            if value["type"] != TYPE:
                raise ValueError(f"its type is {value['type']!r}, not {TYPE!r}")
            if value["pattern"] not in PATTERNS:
                raise ValueError(f"its pattern is {value['pattern']!r}, not one of {[*PATTERNS]}")
            if not isinstance(value["special_tokens"], list):
                raise ValueError("its special_tokens are no list")
            vocab = {int(i): token.encode("latin-1") for i, token in value["vocab"].items()}
            merges = [(a.encode("latin-1"), b.encode("latin-1")) for a, b in value["merges"]]
            return cls(vocab, merges, value["special_tokens"], value["pattern"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError) as e:
            raise UserError(f"{path} is no tokenizer of bpe.py: {e}") from None

    def save(self, path):
        """Write the tokenizer, and beside it as .vocab a list of its tokens for people to read."""
        with atomic_write(path) as f:
            f.write(self.to_bytes())
        with atomic_write(os.path.splitext(path)[0] + ".vocab", "w") as f:
            f.writelines(f"{i}\t{readable(token)}\n" for i, token in sorted(self.vocab.items()))

    @classmethod
    def load(cls, path):
        """Read what save() wrote. Raises UserError for anything else."""
        try:
            with open(path, "rb") as f:
                return cls.from_bytes(f.read(), path)
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from None

    def tiktoken_file(self):
        """
        The ranks as tiktoken's files have them, as bytes: a line of base64 and id for each token.
        Pattern and special tokens are not part of such a file.
        """
        special = set(self.special.values())
        lines = (
            base64.b64encode(token) + b" %d\n" % i
            for i, token in sorted(self.vocab.items())
            if i not in special
        )
        return b"".join(lines)

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
    def from_files(cls, vocab_path, merges_path, special_tokens=None):
        """
        Read GPT-2's files: vocab.json, {token: id}, and merges.txt, a pair a line, in which each
        byte is a visible character. Raises UserError for anything else.
        """
        special = set(special_tokens or ())
        try:
            with open(vocab_path, encoding="utf-8-sig") as f:
                found = json.load(f).items()
            vocab = {i: t.encode() if t in special else from_visible(t) for t, i in found}
            with open(merges_path, encoding="utf-8-sig") as f:
                lines = f.read().split("\n")
            lines = [line for line in lines if line and not line.startswith("#version")]
            merges = [tuple(map(from_visible, line.split(" "))) for line in lines]
            return cls(vocab, merges, special_tokens)
        except OSError as e:
            raise UserError(f"cannot read {e.filename}: {e.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, UserError) as e:
            raise UserError(f"{vocab_path} and {merges_path} are no files of GPT-2: {e}") from None


# ---- cutting


def safe_places(text, special_tokens, start, end):
    """
    Yield places of a text, from start to end, where every pattern cuts and no special token could
    lie, so that the two sides can be encoded each for itself.
    """
    for match in SAFE.finditer(text, start, end):
        place = match.start()
        if not any(
            text.find(token, max(0, place - len(token) + 1), place + len(token) - 1) >= 0
            or text.startswith(token, place + 1)  # a space before it is the end of white space
            for token in special_tokens
        ):
            yield place


def pieces_of(span, special_tokens, size):
    """
    A Span cut into Spans of about `size` bytes, so that no pre-token is cut in two: .txt files at
    safe_places(), others between documents. Without a safe place the whole is one piece.
    """
    if not is_plain(span.path):
        if span.end - span.start < os.path.getsize(span.path):
            return [span]
        return cut(span, -(-span.end // size))
    # what is read around a place: special tokens and characters that lie across its ends
    places, margin = [span.start], max([4, *(len(token.encode()) for token in special_tokens)])
    with open(span.path, "rb") as f:
        while places[-1] + size < span.end:
            at = places[-1] + size
            while at < span.end:
                back = min(margin, at)
                f.seek(at - back)
                data = f.read(WINDOW + 2 * margin)
                text = data.decode(errors="surrogateescape")  # it may begin and end in a character
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
    """Spans cut into Spans of PIECE bytes, or of an eighth of them all where they are small."""
    spans = list(spans)
    size = max(1 << 16, min(PIECE, sum(span.end - span.start for span in spans) // 8))
    return [piece for span in spans for piece in pieces_of(span, special_tokens, size)]


# ---- how tokens are written


def readable(token):
    """A token for people to read: its text in quotes, or its bytes where they are no text."""
    try:
        return json.dumps(token.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return repr(token)


@cache
def visible_bytes():
    """{byte: character} of GPT-2's files: a byte that can be seen is itself, the others follow."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(others)}


def as_visible(token):
    """A token as GPT-2's files have it, each byte a character of visible_bytes()."""
    return "".join(visible_bytes()[byte] for byte in token)


def from_visible(text):
    """The bytes of a token that as_visible() made; KeyError for anything else."""
    return bytes(byte_of()[character] for character in text)


@cache
def byte_of():
    return {character: byte for byte, character in visible_bytes().items()}


# ---- as a script


def train_stage():
    check_source()
    check_model()
    special = special_list()
    spans = list(map(whole_file, text_files(source)))
    vocab, merges = train_on(spans, vocab_size, special, worker_count(num_workers), pattern_name)
    if not merges and vocab_size > len(vocab):
        raise UserError(f"cannot train a vocabulary: {source} has no text to learn from")
    tokenizer = BPETokenizer(vocab, merges, special, pattern_name)
    if len(vocab) < vocab_size:
        print(f"the text has pairs for {len(vocab):,} tokens only")
    save_stage(tokenizer)


def import_stage():
    from formats.hftokenizer import byte_level_from_json  # which imports this file

    if tokenizer_json:
        check_model()
        save_stage(byte_level_from_json(tokenizer_json))
        return
    for name in ("vocab_json", "merges_txt"):
        if not globals()[name]:
            raise UserError(
                f"--{name}=PATH is missing: GPT-2's vocab.json and merges.txt are read, or "
                f"--tokenizer_json=PATH"
            )
    check_model()
    save_stage(BPETokenizer.from_files(vocab_json, merges_txt, special_list()))


def special_list():
    return list(dict.fromkeys(token for token in special_tokens.split(",") if token))


def check_model():
    """Raise UserError, before any work, where the files could not be written or would be lost."""
    folder, written = os.path.dirname(model) or ".", outputs()
    if not os.path.basename(model) or os.path.isdir(model):
        raise UserError(f"cannot write {model!r}, which is a folder: name a file")
    if len({*written.values()}) < len(written):
        raise UserError(f"model = {model!r} is a name for another of its files: end it in .model")
    if os.path.exists(folder) and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise UserError(f"cannot write {model}: {folder} is no folder that can be written to")
    texts = {os.path.realpath(path) for path in text_files(source)} if source else set()
    if any(os.path.realpath(path) in texts for path in written.values()):
        raise UserError(f"{model} or a file beside it belongs to the text: name another")
    if os.path.exists(model):
        BPETokenizer.load(model)  # only an earlier model may be lost
    if also_hf and os.path.isdir(source) and os.path.samefile(source, folder):
        raise UserError(f"{written['hf']} would be taken for text: name a model elsewhere")


def outputs():
    """{what: path} of the files that train and import write."""
    base = os.path.splitext(model)[0]
    paths = {"model": model, "vocab": f"{base}.vocab"}
    paths |= {"tiktoken": f"{base}.tiktoken"} if also_tiktoken else {}
    return paths | ({"hf": f"{base}.json"} if also_hf else {})


def save_stage(tokenizer):
    from formats.hftokenizer import byte_level_json  # which imports this file

    paths = outputs()
    tokenizer.save(model)
    print(f"{len(tokenizer.vocab):,} tokens: wrote {model}, and {paths['vocab']} to read")
    if also_tiktoken:
        with atomic_write(paths["tiktoken"]) as f:
            f.write(tokenizer.tiktoken_file())
        print(f"wrote {paths['tiktoken']}")
    if also_hf:
        text = json.dumps(byte_level_json(tokenizer), ensure_ascii=False)
        with atomic_write(paths["hf"], "w") as f:
            f.write(text)
        print(f"wrote {paths['hf']}, a tokenizer.json of Hugging Face")


def encode_stage():
    from text.shards import choose_split, report, write_npy, write_shards
    from tokenizer import ByteLevel  # which imports this file

    check_source()
    if not out:
        raise UserError("--out=PATH is missing: a folder for shards, or a file ending in .npy")
    if os.path.splitext(out)[1] not in ("", ".npy") and not os.path.isdir(out):
        raise UserError(f"out = {out!r}: expected a folder for shards, or a file ending in .npy")
    if out.endswith(".npy") and valid_source:
        raise UserError("valid_source is for shards: a .npy file has no part for validation")
    tokenizer, workers = ByteLevel(model), worker_count(num_workers)
    if out.endswith(".npy"):
        spans = all_pieces(map(whole_file, text_files(source)), list(tokenizer.bpe.special))
        n, dtype = write_npy(out, tokenizer, spans, workers)
        print(f"{n:,} tokens, {dtype}, in {out}")
        return
    plan = plan_shards(source, valid_source)
    about = {
        "valid_source": [os.path.abspath(source)],
        "made_by": f"python bpe.py encode --source={source} --model={model} --out={out}",
    }
    report(write_shards(out, tokenizer, plan, choose_split(plan), workers, about=about), out)


def check_source():
    if not source:
        raise UserError("--source=PATH is missing: a text, or a folder of .txt, .json or .jsonl")


STAGES = {"train": train_stage, "encode": encode_stage, "import": import_stage}

if __name__ == "__main__":
    stage = ""  # train, encode or import
    source = ""  # text: a file, or a folder of files, .txt, .json or .jsonl
    model = "bpe.model"  # the tokenizer, which encode reads and the others write
    num_workers = 0  # processes; 0: one a core
    # train
    vocab_size = 10000  # 256 bytes, merges and special tokens together
    special_tokens = "<|endoftext|>"  # with commas between them; documents begin with the first
    pattern_name = "gpt2"  # where text is cut into pre-tokens: as for gpt2, or as for gpt4
    also_tiktoken = False  # write the ranks as tiktoken reads them, too
    also_hf = False  # write tokenizer.json for Hugging Face's libraries, too
    # import
    vocab_json = ""  # GPT-2's vocab.json
    merges_txt = ""  # GPT-2's merges.txt
    tokenizer_json = ""  # or a tokenizer.json of Hugging Face
    # encode
    out = ""  # a folder for shards; or a file ending in .npy: .txt as it stands, others with BOS
    valid_source = ""  # text for the first shard, validation; else a part of the documents
    configure(globals(), positional="stage")
    if stage not in STAGES:
        what = f"unknown stage {stage!r}" if stage else "no stage is given"
        raise UserError(f"{what}; expected one of: {', '.join(STAGES)}")
    STAGES[stage]()
