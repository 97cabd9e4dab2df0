"""Byte-level BPE: the merges of a slow, obviously right trainer; ids of tokenizers and tiktoken."""

import json
import random
import tracemalloc
from collections import Counter
from itertools import pairwise

import pytest
from test_tokenizer import generated_texts

import bpe
from bpe import BPETokenizer, train_bpe
from configurator import UserError
from corpus import Span

END = "<|endoftext|>"
HARD = (
    "don't we'll I'VE it's  two  spaces\n\n\nnew\r\nlines\t\ttabs 123 4567 １２３ ½ Ⅷ naïve Zoë "
    "Straße 日本語 中文字符 😀👩\u200d🚀 e\u0301 \u00a0 \u2003 \x1c \x85 end   "
)


def slow_merges(text, special_tokens, n_merges):
    """The definition: count all pairs, merge the most frequent everywhere, and again."""
    parts = [text]
    for token in special_tokens:
        parts = [piece for part in parts for piece in part.split(token)]
    words = [[bytes([b]) for b in m[0].encode()] for p in parts for m in bpe.pattern().finditer(p)]
    merges = []
    while len(merges) < n_merges:
        counts = Counter((a, b) for word in words for a, b in pairwise(word))
        if not counts:
            break
        a, b = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append((a, b))
        for k, word in enumerate(words):
            new, i = [], 0
            while i < len(word):
                both = i + 1 < len(word) and (word[i], word[i + 1]) == (a, b)
                new.append(a + b if both else word[i])
                i += 2 if both else 1
            words[k] = new
    return merges


@pytest.fixture(scope="module")
def corpora(stories):
    rng = random.Random(1)
    runs = "".join(rng.choice("ab ") for _ in range(3000)) + "a" * 200
    return {
        "stories": END.join(stories[:30]),
        "runs": runs,
        "hard": END.join([HARD * 3, *generated_texts(120, seed=2)]),
        "short": "low low low lower",
        "empty": "",
    }


@pytest.mark.parametrize("name", ["stories", "runs", "hard", "short", "empty"])
def test_merges_are_those_of_the_definition(tmp_path, corpora, name, monkeypatch):
    (tmp_path / "text").write_text(corpora[name], encoding="utf-8", newline="")
    expected = slow_merges(corpora[name], [END], 150)
    vocab, merges = train_bpe(tmp_path / "text", 256 + 150 + 1, [END])
    assert merges == expected
    assert list(vocab) == list(range(257 + len(merges)))
    assert [vocab[i] for i in range(256)] == [bytes([i]) for i in range(256)]
    assert [vocab[256 + i] for i in range(len(merges))] == [a + b for a, b in merges]
    assert vocab[len(vocab) - 1] == END.encode()


@pytest.mark.parametrize("name", bpe.PATTERNS)
def test_pieces_and_processes_change_nothing(tmp_path, corpora, name):
    """Cut into pieces of any size, pre-tokens are those of the whole."""
    text = corpora["hard"] + corpora["stories"] + corpora["runs"]
    (tmp_path / "text").write_text(text, encoding="utf-8", newline="")
    path, total = tmp_path / "text", len(text.encode())
    for special in ([END], ["x<|endoftext|>", END, "aa"], ["a\nb", " a ", END]):  # some overlap
        whole = bpe.count_pretokens(Span(path, 0, total), special, name)
        for size in (1, 37, 1000, 20000):
            pieces = bpe.pieces_of(Span(path, 0, total), special, size)
            assert pieces[0].start == 0 and pieces[-1].end == total
            assert all(a.end == b.start for a, b in pairwise(pieces))
            found = Counter()
            for piece in pieces:
                found.update(bpe.count_pretokens(piece, special, name))
            assert found == whole
            assert size > 100 or len(pieces) > 20
    assert train_bpe(path, 400, [END], 2, name) == train_bpe(path, 400, [END], 1, name)


def test_the_trainer_of_tokenizers_agrees_but_for_ties(tmp_path, corpora):
    """It breaks ties by ids: up to the first tie the merges are the same, and the counts always."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    (tmp_path / "text").write_text(corpora["stories"])
    _, merges = train_bpe(tmp_path / "text", 256 + 60, [])
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 60, initial_alphabet=alphabet, show_progress=False
    )
    theirs.train([str(tmp_path / "text")], trainer)
    to_byte = {c: b for b, c in bpe.visible_bytes().items()}
    found = [
        tuple(bytes(to_byte[c] for c in part) for part in pair)
        for pair in json.loads(theirs.to_str())["model"]["merges"]
    ]
    assert found[:20] == merges[:20]
    assert len({*found} & {*merges}) >= 57


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, corpora):
    path = tmp_path_factory.mktemp("bpe") / "text"
    path.write_text(corpora["stories"] + corpora["hard"], encoding="utf-8", newline="")
    return BPETokenizer(*train_bpe(path, 700, [END, END * 2]), [END, END * 2])


def texts_of_all_sorts():
    yield from generated_texts(1500, seed=4)
    yield from (HARD, "", " ", "\n" * 9, " " * 50 + "x", "a" * 300, f"{END}{END}{END}", f"x{END} y")
    yield f"{END} {END * 2}{END}<|endoftext|"


def test_text_comes_back(tokenizer):
    for text in texts_of_all_sorts():
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(END * 3) == [tokenizer.special[END * 2], tokenizer.special[END]]
    assert tokenizer.decode([0xF0, 0x9F, ord("a")]) == "\ufffda"


def test_ids_are_those_of_tokenizers(tokenizer, tmp_path):
    """The same vocabulary and merges in Hugging Face's library, as a reader of GPT-2's files."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    visible = bpe.visible_bytes()

    def shown(token):
        return "".join(visible[b] for b in token)

    vocab = {shown(token): i for i, token in tokenizer.vocab.items()}
    merges = [(shown(a), shown(b)) for a, b in tokenizer.merges]
    theirs = Tokenizer(models.BPE(vocab, merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = BPETokenizer(tokenizer.vocab, tokenizer.merges)
    for text in texts_of_all_sorts():
        assert plain.encode(text) == theirs.encode(text).ids, text

    named = {shown(t) if i < 698 else t.decode(): i for i, t in tokenizer.vocab.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(named))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    read = BPETokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", [END, END * 2])
    assert read.vocab == tokenizer.vocab and read.merges == tokenizer.merges
    assert read.encode(HARD + END) == tokenizer.encode(HARD + END)


TIKTOKENS = {  # its own patterns
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "gpt4": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
        r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
}


@pytest.mark.parametrize("name", bpe.PATTERNS)
def test_ids_are_those_of_tiktoken(tokenizer, name):
    """With the patterns of GPT-2 and GPT-4, special tokens included."""
    import tiktoken

    ours = BPETokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special, name)
    ranks = {t: i for i, t in ours.vocab.items() if i not in ours.special.values()}
    words = {"mergeable_ranks": ranks, "special_tokens": ours.special}
    theirs = tiktoken.Encoding("ours", pat_str=TIKTOKENS[name], **words)
    for text in texts_of_all_sorts():
        assert ours.encode(text) == theirs.encode(text, allowed_special="all"), text


def test_streams_have_the_ids_of_the_whole(tokenizer, monkeypatch):
    monkeypatch.setattr(bpe, "BLOCK", 100)
    text = "".join(texts_of_all_sorts())
    expected = tokenizer.encode(text)
    rng = random.Random(5)
    for _ in range(3):
        pieces, at = [], 0
        while at < len(text):
            n = rng.choice([1, 5, 100, 5000])
            pieces.append(text[at : at + n])
            at += n
        assert list(tokenizer.encode_iterable(pieces)) == expected


def test_a_long_stream_needs_little_memory(tokenizer, corpora):
    lines = corpora["stories"].splitlines(keepends=True)
    tokenizer.encode(corpora["stories"])
    tracemalloc.start()
    n = sum(1 for _ in tokenizer.encode_iterable(line for _ in range(20) for line in lines))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n > 20 * len(corpora["stories"]) / 6 and peak < 10_000_000


def test_files_and_what_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tok.json")
    read = BPETokenizer.load(tmp_path / "tok.json")
    assert read.vocab == tokenizer.vocab and read.merges == tokenizer.merges
    assert read.encode(HARD + END) == tokenizer.encode(HARD + END)
    for text in ("", "[]", "{}", '{"vocab": 3}', '{"vocab": {"0": "a"}, "merges": []}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=r"bad.json is no tokenizer|has no token"):
            BPETokenizer.load(tmp_path / "bad.json")
    with pytest.raises(UserError, match="cannot read"):
        BPETokenizer.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="expected at least 257"):
        train_bpe(tmp_path / "tok.json", 256, [END])
    with pytest.raises(UserError, match="has no token"):
        BPETokenizer(tokenizer.vocab, [*tokenizer.merges, (b"zq", b"qz")])
