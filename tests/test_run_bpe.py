"""run.c with byte-level BPE: the ids and text of bpe.py, and damaged tokenizer files."""

import random
import re
import struct
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
from conftest import (
    PATIENCE_S,
    REPO,
    compile_c,
    random_model,
)
from test_bpe import END, HARD, texts_of_all_sorts
from test_run import PROMPTS, refused_by
from test_tokenizer import broken_bytes, generated_texts

import bpe
from bpe import BPETokenizer, train_bpe
from formats.modelbin import export_model, read_bin
from tokenizer import byte_level_c_file, open_tokenizer

SPECIAL = [END, END * 2, "<|end", "<|", "|>", "日"]  # they overlap or contain each other
NASTY = [*" \n\r\t'\"sSſkKaé1²½Ⅷ٣日ªǅ〇.!_\x01\x0b\x1c\x1f\x7f\x85\xa0\u0301\u180e\u2003\u2028"]
NASTY += [*"\u200d\u3000\ufeff\ufffd\U0001d400😀İ", "👩\u200d🚀", "  ", "\r\n", "\n\n", *SPECIAL]
NASTY += "22 's 'S 'ſ 'll 'Ll 'l 'vE 'r 're 'T e\u0301".split()


def nasty_texts(n, seed):
    rng = random.Random(seed)
    return ["".join(rng.choices(NASTY, k=rng.randrange(1, 25))) for _ in range(n)]


def size_of(tokenizer):
    return 1 + max(tokenizer.vocab)


def harness(builds, kind, test, tokenizer, data, path, *args, **options):
    """Run a test of harness.c with a tokenizer, after writing its file, `data`, to `path`."""
    path.write_bytes(data)
    command = [builds["harness", kind], test, path, str(size_of(tokenizer)), *map(str, args)]
    return subprocess.run(command, capture_output=True, timeout=PATIENCE_S, **options)


@pytest.fixture
def c_ids(builds, tmp_path):
    """Return a function: the ids that run.c gives to some texts, str or bytes, without BOS."""

    def call(tokenizer, texts, kind="fast"):
        data, bos = byte_level_c_file(tokenizer, 7, 8), 7
        texts = b"".join((t.encode() if isinstance(t, str) else t) + b"\0" for t in texts)
        path = tmp_path / "tok.bin"
        done = harness(builds, kind, "encode", tokenizer, data, path, input=texts)
        assert done.returncode == 0, done.stderr
        rows = [np.fromstring(line, np.int64, sep=" ") for line in done.stdout.splitlines()]
        assert all(ids[0] == bos for ids in rows)
        return [ids[1:].tolist() for ids in rows]

    return call


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory):
    """Return a function that trains a tokenizer on a text."""

    def call(text, vocab_size, special=SPECIAL, pattern="gpt2"):
        path = tmp_path_factory.mktemp("bpe") / "text"
        path.write_text(text, encoding="utf-8", newline="")
        vocab, merges = train_bpe(path, vocab_size, special, 1, pattern)
        return BPETokenizer(vocab, merges, special, pattern)

    return call


@pytest.fixture(scope="module", params=bpe.PATTERNS)
def tokenizer(request, trained_on, stories):
    return trained_on(END.join([*stories[:30], HARD * 3]), 700, SPECIAL, request.param)


@pytest.mark.parametrize("kind", ["fast", "checked"])
def test_ids_match_python(c_ids, tokenizer, kind):
    texts = [*texts_of_all_sorts(), *nasty_texts(4000, seed=1)]
    for text, ids in zip(texts, c_ids(tokenizer, texts, kind), strict=True):
        assert ids == tokenizer.encode(text), text


def pieces(tokenizer, text):
    """Return the pre-tokens and special tokens of a text."""
    matches, at = [], 0
    for match in [*tokenizer.special_pattern.finditer(text), None]:
        matches += tokenizer.pretokens(text[at : match.start()] if match else text[at:])
        matches += [match] if match else []
        at = match.end() if match else 0
    return [match[0].encode() for match in matches]


def with_pretokens_merged(tokenizer, texts):
    """Add merges of all adjacent pre-tokens to a tokenizer; they happen only after a wrong cut."""
    pairs = {pair for text in texts for pair in pairwise(pieces(tokenizer, text))}
    pairs -= set(tokenizer.merges)
    tokens = [*tokenizer.vocab.values()]
    tokens += sorted({a + b for a, b in pairs} - set(tokens))
    merges = [*tokenizer.merges, *sorted(pairs)]
    return BPETokenizer(dict(enumerate(tokens)), merges, SPECIAL, tokenizer.pattern_name)


def test_cuts_match_the_patterns(c_ids, tokenizer, trained_on):
    """With all possible merges, the tokens of a text are its pre-tokens."""
    texts = nasty_texts(2000, seed=2)
    everything = trained_on(END.join(texts), 100_000, SPECIAL, tokenizer.pattern_name)
    everything = with_pretokens_merged(everything, texts)
    for text, ids in zip(texts, c_ids(everything, texts, "checked"), strict=True):
        assert [everything.vocab[i] for i in ids] == pieces(everything, text)


@pytest.mark.slow
def test_every_character_has_the_same_class_as_in_python(c_ids, tokenizer):
    """Merges join a letter, a digit or a full stop with the next character of a pre-token."""
    for before, end in ("a", 0x38000), ("1", 0x38000), (".", 0x110000):  # few after 0x38000
        planes = [range(i, i + 0x8000) for i in range(0, end, 0x8000)]
        joined = {b: bytes([ord(before), b]) for b in range(1, 256) if b != ord(before)}
        vocab = {i: bytes([i]) for i in range(256)} | {256 + b: two for b, two in joined.items()}
        merges = [(before.encode(), bytes([b])) for b in joined]
        joining = BPETokenizer(vocab, merges, [], tokenizer.pattern_name)
        texts = [
            "".join(before + chr(code) for code in plane if code and not 0xD800 <= code < 0xE000)
            for plane in planes
        ]
        for text, ids in zip(texts, c_ids(joining, texts), strict=True):
            parts = (match[0].encode() for match in joining.pretokens(text))
            data = np.frombuffer(b"\xff".join(parts) + b"\xff", np.uint8).astype(int)
            joins = (data[:-1] == ord(before)) & (data[1:] != 0xFF) & (data[1:] != ord(before))
            data[:-1] = np.where(joins, 256 + data[1:], data[:-1])
            data[1:][joins] = 0xFF
            assert ids == data[data != 0xFF].tolist()


NEW = [0x1E4D0, 0x31350, 0x2EBF0, 0x1C89, 0x10D4A, 0x1E5D0, 0x11BF0, 0xA7CE, 0x10940, 0x323B0]
NEW += [0x378, 0x33480, 0x1FAE8]  # two that are not assigned, and a symbol


def test_letters_newer_than_python_have_the_same_class_everywhere(c_ids, tokenizer, tmp_path):
    """Letters and numbers of Unicode 15 to 17 get the same ids from all encoders and run.c."""
    bytes_ = [bytes([b]) for b in range(256)]
    pairs = [(start, b) for start in (b"a", b"1") for b in bytes_[128:]]
    vocab = dict(enumerate([*bytes_, *(a + b for a, b in pairs), END.encode()]))
    joining = BPETokenizer(vocab, pairs, [END], tokenizer.pattern_name)
    joining.save(tmp_path / "joining.model")
    texts = [f"{start}{chr(code)}" for code in NEW for start in "a1"]
    texts.append("".join(texts))
    expected = [joining.encode(text) for text in texts]
    is_letter = [len(expected[2 * i]) == len(chr(code).encode()) for i, code in enumerate(NEW)]
    assert is_letter == [code not in (0x11BF0, 0x378, 0x33480, 0x1FAE8) for code in NEW]
    assert c_ids(joining, texts) == expected
    opened = open_tokenizer(tmp_path / "joining.model")
    for name in opened.ENCODERS:
        ids, counts = opened.encoder(name)[1](texts)
        assert [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])] == expected, name


def test_special_tokens_match_python(c_ids, tokenizer):
    rng = random.Random(3)
    words = [*SPECIAL, END[:5], END[3:], "<", ">", "|", "a", " ", "日本", "\n"]
    texts = ["".join(rng.choices(words, k=rng.randrange(9))) for _ in range(2000)]
    texts += [END * n for n in range(9)] + [END[:i] for i in range(len(END))]
    assert c_ids(tokenizer, texts, "checked") == [tokenizer.encode(text) for text in texts]
    three, (one, two) = c_ids(tokenizer, [END * 3])[0], (tokenizer.special[END * n] for n in (1, 2))
    assert three == [two, one]
    without = BPETokenizer(tokenizer.vocab, tokenizer.merges, [], tokenizer.pattern_name)
    assert c_ids(without, texts) == [without.encode(text) for text in texts]
    many = [f"<|{'x' * n}|>" for n in range(300)]
    tokenizer = BPETokenizer(tokenizer.vocab, tokenizer.merges, many, tokenizer.pattern_name)
    texts = ["".join(rng.choices([*many, "<|x"], k=9)) for _ in range(50)]
    assert c_ids(tokenizer, texts) == [tokenizer.encode(text) for text in texts]


def test_invalid_utf_8_is_read_as_in_python(c_ids, tokenizer):
    texts = [*broken_bytes(2000, seed=4), b"\xe2\x82", b"\xf0\x9f\x98", b"\xe2\x82\xe2\x82\xac"]
    texts += [
        bytes([a, b, c])
        for a in (0xE0, 0xED, 0xF0, 0xF4)
        for b in range(128, 192)
        for c in (1, 128)
    ]
    expected = [tokenizer.encode(text.decode(errors="replace")) for text in texts]
    assert c_ids(tokenizer, texts, "checked") == expected


def merge_by_merge(tokenizer, text):
    """Return the ids of one pre-token by applying each merge everywhere before the next: fast."""
    ids = "".join(chr(tokenizer.byte_ids[b]) for b in text.encode())
    for a, b in tokenizer.merges:
        ids = ids.replace(*("".join(chr(tokenizer.ids[t]) for t in ts) for ts in ([a, b], [a + b])))
    return [ord(i) for i in ids]


@pytest.mark.slow
def test_a_megabyte_without_a_space(c_ids, tokenizer, trained_on):
    rng = random.Random(5)
    letters = "".join(rng.choices("abc", k=1 << 20))
    some = [letters[i : i + 40] for i in range(0, 40_000, 40)]
    tokenizer = trained_on(" ".join(some) + "a" * 5000, 900, [], tokenizer.pattern_name)
    texts = ["a" * (1 << 20), letters, "aaab" * (1 << 18)]
    start = time.monotonic()
    results = c_ids(tokenizer, texts)
    assert time.monotonic() - start < 20  # n * n steps would take hours
    for text, ids in zip(texts, results, strict=True):
        assert len(ids) < len(text) / 2 and ids == merge_by_merge(tokenizer, text)
    for text in (" " * (1 << 20), "\n " * (1 << 19), "'" * (1 << 20), END[:-1] * (1 << 16)):
        assert tokenizer.decode(c_ids(tokenizer, [text])[0]) == text


def one_at_a_time(tokenizer, text):
    """Return the ids of one pre-token by the definition: merge the leftmost pair of lowest rank."""
    ids = [tokenizer.byte_ids[b] for b in text.encode()]
    while True:
        pairs = [
            (tokenizer.ranks[p], i) for i, p in enumerate(pairwise(ids)) if p in tokenizer.ranks
        ]
        if not pairs:
            return ids
        (_, new), i = min(pairs)
        ids[i : i + 2] = [new]


@pytest.mark.parametrize("n", range(12))
def test_tokens_made_in_several_ways_match_python(c_ids, n):
    """Such as aaa from a + aa and from aa + a, learned before or after aa."""
    rng, letters = random.Random(n), [b"a", b"b"][: 1 + n % 2]
    tokens, merges = list(letters), []
    while len(merges) < len(tokens) + 8:
        pair = rng.choice(tokens), rng.choice(tokens)
        if pair not in merges and len(pair[0] + pair[1]) < 9:
            merges.append(pair)
            tokens += [pair[0] + pair[1]] if pair[0] + pair[1] not in tokens else []
    rng.shuffle(merges)
    merges += merges[:2]  # of two equal merges, the last counts
    new = [token for token in tokens if len(token) > 1]
    vocab = dict(enumerate([bytes([i]) for i in range(256)] + new))
    tokenizer = BPETokenizer(vocab, merges)
    texts = [
        "".join(rng.choices([t.decode() for t in letters], k=k)) for k in range(60) for _ in "123"
    ]
    expected = [one_at_a_time(tokenizer, text) for text in texts]
    assert c_ids(tokenizer, texts, "checked") == expected


def test_ids_may_be_in_any_order_and_have_gaps(c_ids, tokenizer, builds, tmp_path):
    ids = random.Random(6).sample(range(1000), len(tokenizer.vocab))
    vocab = dict(zip(ids, tokenizer.vocab.values(), strict=True))
    tokenizer = BPETokenizer(vocab, tokenizer.merges, SPECIAL, tokenizer.pattern_name)
    texts = list(texts_of_all_sorts())[::5]
    assert c_ids(tokenizer, texts) == [tokenizer.encode(text) for text in texts]
    none = next(i for i in range(max(vocab)) if i not in vocab)
    data, path = byte_level_c_file(tokenizer, *ids[:2]), tmp_path / "tok.bin"
    done = harness(builds, "checked", "decode", tokenizer, data, path, none, ids[65], *ids[:2])
    assert done.stdout == b"A" and done.returncode == 0


def test_text_matches_python(builds, tokenizer, tmp_path):
    rng, (bos, eos) = random.Random(7), (tokenizer.special[END], 5)
    data, path = byte_level_c_file(tokenizer, bos, eos), tmp_path / "tok.bin"
    for text in [*generated_texts(60, seed=8), " a  b", END * 2, None, None, None]:
        ids = tokenizer.encode(text) if text is not None else rng.choices(range(700), k=90)
        done = harness(builds, "checked", "decode", tokenizer, data, path, 97, *ids)
        expected = tokenizer.decode([97, *(i for i in ids if i not in (bos, eos))])
        assert done.stdout.decode() == expected and done.returncode == 0


@pytest.fixture
def small(tmp_path, tokenizer):
    """Write a random model and its tokenizer; return its path, a prompt and its greedy story."""
    model = random_model(vocab_size=size_of(tokenizer), max_seq_len=96, tie_embeddings=False)
    export_model(model, tmp_path / "model.bin")
    end = tokenizer.special[END]
    (tmp_path / "tokenizer.bin").write_bytes(byte_level_c_file(tokenizer, end, end))
    prompt = [end, *tokenizer.encode(" Once upon a time, Zoë 😀")]
    story = list(model.generate(prompt, 40, temperature=0, stop=()))
    assert end not in story and len(set(story)) > 3
    return tmp_path / "model.bin", prompt, story


def test_a_story_matches_pytorch(run, small, tokenizer):
    path, prompt, story = small
    text = tokenizer.decode(prompt[1:])
    args = [path, "-t", "0", "-n", len(prompt) + 39, "-i", text]
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == text + tokenizer.decode(story) + "\n"
    path.with_name("tokenizer.bin").write_bytes(byte_level_c_file(tokenizer, prompt[0], story[9]))
    until = story[: story.index(story[9])]
    assert run(*args).stdout.decode() == text + tokenizer.decode(until) + "\n"
    model = read_bin(path).eval()
    for bos in range(size_of(tokenizer)):  # find a BOS that is repeated in its story, and ends it
        story = list(model.generate([bos, *prompt[1:]], 40, temperature=0, stop=()))
        if bos in story:
            break
    path.with_name("tokenizer.bin").write_bytes(byte_level_c_file(tokenizer, bos, prompt[0]))
    until = story[: story.index(bos)]
    assert run(*args).stdout.decode() == text + tokenizer.decode(until) + "\n"


def test_any_prompt_is_accepted(run, small):
    for prompt in ["", END, f" {END}x", *PROMPTS]:
        done = run(small[0], "-n", "90", "-i", prompt)
        assert done.returncode == 0, done.stderr
        done.stdout.decode()


def test_eval_counts_as_many_tokens_as_python(run, small, tokenizer, stories, tmp_path):
    texts = [text.strip() for text in stories[:5]]
    (tmp_path / "text.txt").write_text(f" {END}\n".join(texts))
    done = run(small[0], "-m", "eval", "-i", tmp_path / "text.txt")
    assert done.returncode == 0, done.stderr
    n = sum(1 + len(tokenizer.encode(text)) for text in texts)
    assert f"5 documents, {len(''.join(texts))} bytes, {n} tokens" in done.stdout.decode()


@pytest.mark.slow
def test_the_library_generates_with_byte_level_bpe(builds, small, tokenizer, tmp_path):
    library = compile_c(
        REPO / "lib" / "libllama2.c", tmp_path / "lib.so", "-O1", "-shared", "-fPIC"
    )
    path, prompt, story = small
    eos = story[9]
    path.with_name("tokenizer.bin").write_bytes(byte_level_c_file(tokenizer, prompt[0], eos))
    text = tokenizer.decode(prompt[1:])
    code = f"""
import sys
sys.path.insert(0, {str(REPO / "examples")!r})
from llama2 import Llama
llama = Llama({str(path)!r}, library={str(library)!r})
assert llama.stop == {(prompt[0], eos)}
assert llama.encode({text!r}) == {prompt} and llama.decode({prompt}) == {text!r}
print(llama.generate({text!r}, temperature=0.0))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr
    until = story[: story.index(eos)]
    assert done.stdout.decode() == text + tokenizer.decode(until) + "\n"


# ---- damaged files

TEXT = b"aaaa aaaaaaa<|e|><|e|> 12's\n\n \xff"
HEADER = ["pattern", "bos", "eos", "tokens", "merges", "special", "ranges"]


def parts(data):
    """Return {name: (offset, length in uint32)} of the parts of a tokenizer file."""
    sizes = dict(zip(HEADER, struct.unpack_from("<7I", data, 4), strict=True))
    result, at = {"header": (4, 7)}, 32
    for name, width in (("ranges", 3), ("special", 1), ("merges", 3)):
        result[name] = at, width * sizes[name]
        at += 4 * width * sizes[name]
    return result | {"tokens": (at, 0)}


@pytest.fixture(scope="module")
def plain():
    """Return a small tokenizer and its file, with only the ranges of ASCII."""
    vocab = dict(enumerate([*(bytes([i]) for i in range(256)), b"aa", b"aaa", b"<|e|>"]))
    tokenizer = BPETokenizer(vocab, [(b"a", b"a"), (b"aa", b"a"), (b"a", b"aa")], ["<|e|>"])
    data = byte_level_c_file(tokenizer, 258, 258)
    ranges = [(n, m, kind) for n, m, kind in bpe.ranges() if m < 128]
    numbers = [n for a, b, kind in ranges for n in (a, b, 1 + "LNS".index(kind))]
    start = data[:28] + struct.pack(f"<I{len(numbers)}I", len(ranges), *numbers)
    return tokenizer, start + data[parts(data)["special"][0] :]


@pytest.fixture
def load(builds, plain, tmp_path):
    """Return a function that encodes TEXT with a tokenizer file, under sanitizers."""

    def call(data):
        path, text = tmp_path / "tok.bin", TEXT + b"\0"
        return harness(builds, "checked", "encode", plain[0], data, path, input=text)

    return call


def test_truncated_and_padded_files(plain, load):
    tokenizer, data = plain
    ids = [258, *tokenizer.encode(TEXT.decode(errors="replace"))]
    assert [int(i) for i in load(data).stdout.split()] == ids
    tokens = parts(data)["tokens"][0]
    sizes = [*range(1, 40, 3), *range(40, tokens + 8, 4), tokens + 9, len(data) // 2, len(data) - 1]
    for size in sizes:
        done = load(data[:size])
        refused_by(done, "is truncated")
        at, has = re.search(r"at byte (\d+) it needs \d+ bytes but has (\d+)", str(done)).groups()
        assert int(at) + int(has) == size
    refused_by(load(data + b"\0"), f"byte {len(data)} follows the last token")


WRONG = [  # part, index of a value in it, the wrong value, expected message
    ("header", 0, 2, "at byte 4 the pattern is 2, expected 0 to 1"),
    ("header", 1, 259, "at byte 8 the bos is 259, expected 0 to 258"),
    ("header", 2, 2**32 - 1, "at byte 12 the eos is 4294967295, expected 0 to 258"),
    ("header", 3, 258, "has 258 pieces, but the model's vocabulary has 259"),
    ("header", 3, 2**32 - 1, "has 4294967295 pieces"),
    ("header", 4, 2**24 + 1, "the number of merges is 16777217, expected 0 to 16777216"),
    ("header", 4, 2**24, "is truncated"),
    ("header", 4, 2, "is truncated"),
    ("header", 5, 260, "the number of special tokens is 260, expected 0 to 259"),
    ("header", 5, 259, "is truncated"),
    ("header", 6, 0x110001, "the number of ranges is 1114113, expected 0 to 1114112"),
    ("header", 6, 0x110000, "of a range is"),
    ("ranges", 0, 0x110000, "the start of a range is 1114112, expected 0 to 1114111"),
    ("ranges", 1, 8, "the end of a range is 8, expected 9 to 1114111"),
    ("ranges", 1, 0x110000, "the end of a range is 1114112, expected 9 to 1114111"),
    ("ranges", 1, 0x10FFFF, "the start of a range is 32, expected 1114112 to 1114111"),
    ("ranges", 2, 0, "the class of a range is 0, expected 1 to 3"),
    ("ranges", 2, 4, "the class of a range is 4, expected 1 to 3"),
    ("ranges", 3, 13, "the start of a range is 13, expected 14 to 1114111"),
    ("special", 0, 259, "the special token is 259, expected 0 to 258"),
    ("special", 0, 0x80, "special token 128 is empty or invalid UTF-8"),
    ("merges", 0, 259, "the left token of a merge is 259, expected 0 to 258"),
    ("merges", 4, 2**31, "the right token of a merge is 2147483648, expected 0 to 258"),
    ("merges", 8, 2**32 - 1, "the token of a merge is 4294967295, expected 0 to 258"),
    ("merges", 3, 97, "merge 1 does not join its tokens"),
    ("merges", 0, 98, "merge 0 does not join its tokens"),
    ("merges", 7, 98, "merge 2 does not join its tokens"),
    ("tokens", 0, 2**32 - 1, "is truncated"),
    ("tokens", 0, 6, "is truncated"),
]


@pytest.mark.parametrize(
    "part, i, value, sentence", WRONG, ids=[f"{w[0]} {w[1]} {w[2]}" for w in WRONG]
)
def test_every_number_is_checked(plain, load, part, i, value, sentence):
    data = bytearray(plain[1])
    struct.pack_into("<I", data, parts(data)[part][0] + 4 * i, value)
    refused_by(load(bytes(data)), sentence)


def test_every_byte_needs_a_token(plain, load):
    data = plain[1]
    at = data.index(b"\1\0\0\0" + b"z")
    refused_by(load(data[: at + 4] + b"y" + data[at + 5 :]), "byte value 122 has no token")
    refused_by(load(data[:at] + bytes(4) + data[at + 5 :]), "byte value 122 has no token")
    nothing = data[: -len("<|e|>") - 4] + bytes(4)
    refused_by(load(nothing), "special token 258 is empty or invalid UTF-8")


def test_odd_ranges_are_accepted(plain, load):
    """White space that a pattern spells out stays white space whatever the ranges are."""
    data = plain[1]
    at, n = parts(data)["ranges"]
    for kind in (1, 2, 3):
        odd = data[:28] + struct.pack("<4I", 1, 0, 0x10FFFF, kind) + data[at + 4 * n :]
        assert load(odd).returncode == 0
    assert load(data[:28] + bytes(4) + data[at + 4 * n :]).returncode == 0


def test_no_file_crashes_the_engine(plain, load):
    whole, rng, refused = plain[1], random.Random(9), 0
    numbers = parts(whole)["tokens"][0]
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice([rng.randrange(4, numbers), rng.randrange(4, len(data))])
            at = rng.choice([at, 4 + (at - 4) // 4 * 4])
            kind = rng.randrange(3)
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[at] = rng.randrange(256)
            else:
                data[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 97, 257, 2**31, 2**32 - 1]))
        done = load(bytes(data))
        if done.returncode:
            refused_by(done)
            refused += 1
    assert 50 < refused < 150
