"""Byte-level BPE: parity with a slow, obviously correct trainer, with tokenizers and tiktoken."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from conftest import REPO, TINY, read_log, refused, script
from test_tokenizer import generated_texts

import bpe
from bpe import BPETokenizer, train_bpe
from configurator import UserError
from system.workers import over_spans
from text.corpus import Span, whole_file
from text.shards import encode_span
from tokenizer import open_tokenizer

END = "<|endoftext|>"
HARD = (
    "don't we'll I'VE it's  two  spaces\n\n\nnew\r\nlines\t\ttabs 123 4567 １２３ ½ Ⅷ naïve Zoë "
    "Straße 日本語 中文字符 😀👩\u200d🚀 e\u0301 \u00a0 \u2003 \x1c \x85 end   "
)


def slow_merges(text, special_tokens, n_merges):
    """The definition: repeatedly count all pairs and merge the most frequent one everywhere."""
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
def test_merges_match_the_definition(tmp_path, corpora, name, monkeypatch):
    (tmp_path / "text").write_text(corpora[name], encoding="utf-8", newline="")
    expected = slow_merges(corpora[name], [END], 150)
    vocab, merges = train_bpe(tmp_path / "text", 256 + 150 + 1, [END])
    assert merges == expected
    assert list(vocab) == list(range(257 + len(merges)))
    assert [vocab[i] for i in range(256)] == [bytes([i]) for i in range(256)]
    assert [vocab[256 + i] for i in range(len(merges))] == [a + b for a, b in merges]
    assert vocab[len(vocab) - 1] == END.encode()


@pytest.mark.parametrize("name", bpe.PATTERNS)
def test_pieces_and_processes_do_not_change_the_counts(tmp_path, corpora, name):
    """Pieces of any size have the pre-tokens of the whole text."""
    text = corpora["hard"] + corpora["stories"] + corpora["runs"]
    (tmp_path / "text").write_text(text, encoding="utf-8", newline="")
    path, total = str(tmp_path / "text"), len(text.encode())
    for special in ([END], ["x<|endoftext|>", END, "aa"], ["a\nb", " a ", END]):  # some overlap
        whole = bpe.count_pretokens(Span(path, 0, total), special, name)
        for size in (1, 37, 1000, 20000):
            pieces = bpe.pieces_of(Span(path, 0, total), special, size)
            assert pieces[0].start == 0 and pieces[-1].end == total
            assert all(a.end == b.start for a, b in pairwise(pieces))
            total_counts = Counter()
            for piece in pieces:
                total_counts.update(bpe.count_pretokens(piece, special, name))
            assert total_counts == whole
            assert size > 100 or len(pieces) > 100
    assert train_bpe(path, 400, [END], 2, name) == train_bpe(path, 400, [END], 1, name)


@pytest.mark.parametrize("name", bpe.PATTERNS)
def test_safe_places_cut_no_token(name):
    """The two sides of a cut have the pre-tokens and special tokens of the whole text."""
    rng = random.Random(5)
    signs = [*" \n\r\t'sTlvE. ,_-²Ⅷ½1２日本。，ſ😀aZé\u3000\xa0\x85\u2003\u0301\u200d\x1c"]
    signs += [END, "\n\n", "  ", " \n", "\r\n", "'ll"]
    find = bpe.pattern(name).findall

    def parts(text, split):
        tokens, at = [], 0
        for match in [*(split.finditer(text) if split else ()), None]:
            tokens += find(text[at : match.start()] if match else text[at:])
            if match:
                tokens.append(match[0])
                at = match.end()
        return tokens

    for special in (
        [],
        [END],
        ["a" + END, END, "aa"],
        ["a\nb", " a "],
        [" ", ". "],
        ["日本", "本。"],
    ):
        split, n = bpe.split_at(special), 0
        for _ in range(100):
            text = "".join(rng.choices(signs, k=60))
            whole = parts(text, split)
            for place in bpe.safe_places(text, special, 1, len(text)):
                assert parts(text[:place], split) + parts(text[place:], split) == whole
                n += 1
        assert n > 500


def test_the_trainer_of_tokenizers_agrees_except_on_ties(tmp_path, corpora):
    """It breaks ties by id: the merges are the same up to the first tie, and nearly so after it."""
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
    their_merges = [
        tuple(bytes(to_byte[c] for c in part) for part in pair)
        for pair in json.loads(theirs.to_str())["model"]["merges"]
    ]
    assert their_merges[:20] == merges[:20]
    assert len({*their_merges} & {*merges}) >= 57


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, corpora):
    path = tmp_path_factory.mktemp("bpe") / "text"
    path.write_text(corpora["stories"] + corpora["hard"], encoding="utf-8", newline="")
    return BPETokenizer(*train_bpe(path, 700, [END, END * 2]), [END, END * 2])


def texts_of_all_sorts():
    yield from generated_texts(1500, seed=4)
    yield from (HARD, "", " ", "\n" * 9, " " * 50 + "x", "a" * 300, f"{END}{END}{END}", f"x{END} y")
    yield f"{END} {END * 2}{END}<|endoftext|"


def test_every_text_round_trips(tokenizer):
    for text in texts_of_all_sorts():
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(END * 3) == [tokenizer.special[END * 2], tokenizer.special[END]]
    assert tokenizer.decode([0xF0, 0x9F, ord("a")]) == "\ufffda"


def test_ids_match_tokenizers(tokenizer, tmp_path):
    """Hugging Face's library with the same vocabulary and merges; and reading GPT-2's files."""
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
    files = [f"--vocab_json={tmp_path / 'vocab.json'}", f"--merges_txt={tmp_path / 'merges.txt'}"]
    special = f"--special_tokens={END},{END * 2}"
    done = script("bpe.py", "import", *files, special, f"--model={tmp_path / 'gpt.model'}")
    assert done.returncode == 0, done.stderr
    assert BPETokenizer.load(tmp_path / "gpt.model").to_bytes() == read.to_bytes()


TIKTOKENS = {  # its own patterns
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "gpt4": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
        r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
}


@pytest.mark.parametrize("name", bpe.PATTERNS)
def test_ids_match_tiktoken(tokenizer, name):
    """With the patterns of GPT-2 and GPT-4, special tokens included."""
    import tiktoken

    ours = BPETokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special, name)
    ranks = {t: i for i, t in ours.vocab.items() if i not in ours.special.values()}
    options = {"mergeable_ranks": ranks, "special_tokens": ours.special}
    theirs = tiktoken.Encoding("ours", pat_str=TIKTOKENS[name], **options)
    for text in texts_of_all_sorts():
        assert ours.encode(text) == theirs.encode(text, allowed_special="all"), text


def test_gpt2_files_give_the_ids_of_tiktoken(tokenizer, tmp_path):
    """GPT-2's two files, with the bytes in its order, read by tiktoken's loader and by ours."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    visible = bpe.visible_bytes()
    names = [[*map(bpe.as_visible, pair)] for pair in tokenizer.merges]
    order = [*visible.values(), *(a + b for a, b in names), END]
    vocab, merges = tmp_path / "encoder.json", tmp_path / "vocab.bpe"
    vocab.write_text(json.dumps({name: i for i, name in enumerate(order)}))
    lines = ["#version: 0.2", *map(" ".join, names), ""]
    merges.write_text("\n".join(lines), encoding="utf-8")
    theirs = tiktoken.Encoding(
        "gpt2",
        pat_str=TIKTOKENS["gpt2"],
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(str(merges), str(vocab)),
        special_tokens={END: len(order) - 1},
    )
    ours = BPETokenizer.from_files(vocab, merges, [END])
    assert ours.encode("!") == [0] and ours.encode("\0") == [188]
    for text in texts_of_all_sorts():
        assert ours.encode(text) == theirs.encode(text, allowed_special="all"), text


def test_streams_have_the_ids_of_the_whole_text(tokenizer, monkeypatch):
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


STREAM = """
import sys
from bpe import BPETokenizer

def kilobytes(name):
    with open("/proc/self/status") as f:
        return int(next(line for line in f if line.startswith(name)).split()[1])

tokenizer = BPETokenizer.load(sys.argv[1])
before = kilobytes("VmRSS")
with open(sys.argv[2], encoding="utf-8", newline="") as f:
    n = sum(1 for _ in tokenizer.encode_iterable(f))
print(n, kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_of_10_mb_needs_little_memory(tokenizer, corpora, tmp_path):
    tokenizer.save(tmp_path / "tok.model")
    text = corpora["stories"].encode() + b"\n"
    with open(tmp_path / "text", "wb") as f:
        for i in range(10_000_000 // len(text) + 1):
            f.write(b"%d: " % (i * i) + text)
    command = [sys.executable, "-c", STREAM, tmp_path / "tok.model", tmp_path / "text"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO)
    n, added = map(int, done.stdout.split())
    assert n > 10_000_000 / 8 and added < 40_000, f"{added} kB"


def test_files_round_trip_and_damaged_ones_are_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tok.json")
    read = BPETokenizer.load(tmp_path / "tok.json")
    assert read.vocab == tokenizer.vocab and read.merges == tokenizer.merges
    assert read.encode(HARD + END) == tokenizer.encode(HARD + END)
    good = json.loads(tokenizer.to_bytes())
    many = {**good["vocab"], "700": "a"}
    for change in (
        {"type": "x"},
        {"pattern": "gpt3"},
        {"special_tokens": END},
        {"special_tokens": [END, ""]},
        {"special_tokens": [3]},
        {"vocab": 3},
        {"vocab": many},
        {"vocab": {**good["vocab"], "700": ""}},
        {"vocab": {**good["vocab"], "-1": "zq"}},
        {"vocab": {**good["vocab"], "4294967296": "zq"}},
        {"vocab": {**good["vocab"], "x": "zq"}},
        {"vocab": {**good["vocab"], "97": "zq"}},
        {"merges": ["abc"]},
        {"merges": {"a": "b"}},
        {"merges": [["z", "q", "z"]]},
        {"merges": [["zq", "qz"]]},
    ):
        (tmp_path / "bad.json").write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=r"bad.json is not a tokenizer written by bpe.py: "):
            BPETokenizer.load(tmp_path / "bad.json")
    for text in ("", "[]", "{}", "3", "null", "[" * 100_000):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=r"bad.json is not a tokenizer written by bpe.py: "):
            BPETokenizer.load(tmp_path / "bad.json")
    for ids in ({"a": -5}, {"a": 1.5}, {"a": None}, {"a": 2**40}, {"\u1234": 3}, []):
        (tmp_path / "v.json").write_text(json.dumps(ids))
        (tmp_path / "m.txt").write_text("\ufeff#version: 0.2\n")
        with pytest.raises(UserError, match="are not a GPT-2 vocabulary"):
            BPETokenizer.from_files(tmp_path / "v.json", tmp_path / "m.txt")
    listed = (tmp_path / "tok.vocab").read_text(encoding="utf-8").splitlines()
    assert len(listed) == 700 and listed[97] == '97\t"a"' and listed[255] == "255\tb'\\xff'"
    with pytest.raises(UserError, match="cannot read"):
        BPETokenizer.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="expected at least 257"):
        train_bpe(tmp_path / "tok.json", 256, [END])
    with pytest.raises(UserError, match="has no token"):
        BPETokenizer(tokenizer.vocab, [*tokenizer.merges, (b"zq", b"qz")])
    for special in ([""], ["a"], END, [3], ["<|\udcff|>"]):
        with pytest.raises(UserError, match=r"expected a (string of at least two|list of strings)"):
            train_bpe(tmp_path / "tok.json", 300, special)
        with pytest.raises(UserError, match=r"expected a (string of at least two|list of strings)"):
            BPETokenizer(tokenizer.vocab, tokenizer.merges, special)


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "a.txt").write_text("hello hello world")
    (tmp_path / "b.txt").write_text("\ufeffhello hello world")
    vocab, merges = train_bpe(tmp_path / "a.txt", 260, [END])
    assert train_bpe(tmp_path / "b.txt", 260, [END]) == (vocab, merges)
    model = BPETokenizer(vocab, merges, [END]).to_bytes()
    (tmp_path / "m.model").write_bytes(b"\xef\xbb\xbf" + model)
    tokenizer = open_tokenizer(tmp_path / "m.model")
    for name in ("a.txt", "b.txt"):
        span = whole_file(str(tmp_path / name))
        ids = encode_span(span, tokenizer, "own", "uint16")
        assert tokenizer.decode(ids.tolist()) == "hello hello world"


def test_the_rarest_of_too_many_pretokens_are_dropped(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text("often " * 50 + " ".join(f"n{i}" for i in range(3000)))
    monkeypatch.setattr(bpe, "MAX_BYTES", 3000)
    span = whole_file(str(tmp_path / "text"))
    counts = bpe.count_all([span], [], 1, "gpt2")
    assert sum(map(len, counts)) <= 3000 and counts[b" often"] == 49
    assert "1 times or less" in capsys.readouterr().out


def test_a_killed_worker_is_reported(tmp_path):
    spans = [Span("", i, i + 1) for i in range(4)]
    with pytest.raises(UserError, match="a worker process was killed"):
        list(over_spans(kill_itself, spans, (), 2, "kill"))
    assert list(over_spans(end_plus, spans, (1,), 3, "ends")) == [2, 3, 4, 5]


def kill_itself(span):
    os.kill(os.getpid(), signal.SIGKILL)


def end_plus(span, n):
    return span.end + n


# ---- as a script


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, corpora):
    folder = tmp_path_factory.mktemp("corpus")
    texts = corpora["stories"].split(END)
    (folder / "a.txt").write_text(END.join(texts[:20]), encoding="utf-8", newline="")
    lines = [json.dumps({"text": text}) for text in texts[20:]]
    (folder / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_the_script_trains_and_encodes(corpus, tmp_path):
    model, shards = tmp_path / "my.model", tmp_path / "shards"
    flags = [f"--source={corpus}", f"--model={model}"]
    done = script(
        "bpe.py", "train", *flags, "--vocab_size=400", "--pattern_name=gpt4",
        "--also_tiktoken", "--also_hf",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokenizer = BPETokenizer.load(model)
    assert len(tokenizer.vocab) == 400 and tokenizer.special == {END: 399}
    from tiktoken.load import load_tiktoken_bpe
    from tokenizers import Tokenizer

    ranks = {token: i for i, token in tokenizer.vocab.items() if i < 399}
    assert load_tiktoken_bpe(str(tmp_path / "my.tiktoken")) == ranks
    theirs = Tokenizer.from_file(str(tmp_path / "my.json"))
    assert theirs.encode(HARD + END).ids == tokenizer.encode(HARD + END)

    done = script("bpe.py", "encode", *flags, f"--out={shards}")
    assert done.returncode == 0, done.stderr
    meta = json.loads((shards / "shards.json").read_text())
    assert meta["complete"] and meta["dtype"] == "uint16" and meta["vocab_size"] == 400
    ids = np.concatenate([np.fromfile(shards / s["name"], "<u2") for s in meta["shards"]])
    starts = np.flatnonzero(ids == 399)
    decoded = [tokenizer.decode(part.tolist()[1:]) for part in np.split(ids, starts[1:])]
    texts = (corpus / "a.txt").read_text(encoding="utf-8").split(END)
    lines = (corpus / "b.jsonl").read_text(encoding="utf-8").split("\n")
    texts += [json.loads(line)["text"] for line in lines]
    # each shard keeps the order of its documents; the first shard is for validation
    assert sorted(text.strip() for text in decoded) == sorted(text.strip() for text in texts)

    done = script("bpe.py", "encode", *flags, f"--out={tmp_path / 'ids.npy'}", "--num_workers=2")
    assert done.returncode == 0, done.stderr
    ids, end = np.load(tmp_path / "ids.npy"), tokenizer.special[END]
    expected = tokenizer.encode((corpus / "a.txt").read_text(encoding="utf-8"))
    for text in texts[20:]:
        expected += [end, *tokenizer.encode(text.strip())]
    assert ids.dtype == np.uint16 and ids.tolist() == expected


@pytest.mark.slow
def test_the_script_refuses_bad_arguments(corpus, tmp_path):
    model, empty = f"--model={tmp_path / 'my.model'}", tmp_path / "empty.txt"
    empty.touch()
    for args, part in (
        ([], "the stage is missing: expected one of train, encode, import"),
        (["import", model, "--vocab_json=v"], "--merges_txt=PATH is missing: pass GPT-2's"),
        (["import", model, "--vocab_json=v", "--merges_txt=m"], "cannot read v"),
        (["train", model], "--source=PATH is missing: pass a text file"),
        (["train", model, f"--source={tmp_path / 'none'}"], "does not exist"),
        (["train", model, f"--source={corpus}", "--vocab_size=256"], "expected at least 257"),
        (["train", model, f"--source={corpus}", "--pattern_name=gpt3"], "expected gpt2 or gpt4"),
        (["train", f"--model={corpus}", f"--source={corpus}"], "is a folder"),
        (["train", "--model=", f"--source={corpus}"], "choose a file"),
        (["train", "--model=my.vocab", f"--source={corpus}"], "expected a path ending in .model"),
        (
            ["train", "--model=my.json", f"--source={corpus}", "--also_hf"],
            "expected a path ending in .model",
        ),
        (["train", f"--model={corpus / 'a.txt'}", f"--source={corpus}"], "is part of the text"),
        (
            ["train", f"--model={corpus / 'm.model'}", f"--source={corpus}", "--also_hf"],
            "would be read as text",
        ),
        (["encode", model, f"--source={corpus}", "--out=x.npy"], "does not exist"),
        (["encode", model, f"--source={corpus}"], "--out=PATH is missing: pass a folder"),
        (["encode", model, f"--source={corpus}", "--out=a.npz"], "or a .npy file"),
        (["train", model, f"--source={empty}"], "contains no text to train on"),
        (
            ["train", f"--model={empty}", f"--source={corpus}"],
            "is not a tokenizer written by bpe.py",
        ),
        (["encode", "--num_workers=-1", model, f"--source={corpus}"], "--out=PATH is missing"),
    ):
        refused(script("bpe.py", *args, cwd=tmp_path), part)
    assert os.listdir(tmp_path) == ["empty.txt"]
    done = script("bpe.py", "--help")
    assert done.returncode == 0 and "--pattern_name=gpt2" in done.stdout
    assert "256 bytes, merges and special tokens together" in done.stdout


def test_from_text_to_a_story(practice, tmp_path, run):
    """A model with a byte-level vocabulary generates the same tokens in ./run and in PyTorch."""
    flags = ["--vocab_size=500", f"--data_dir={practice}"]
    for args in (["train_vocab"], ["pretokenize"]):
        done = script("tinystories.py", *args, *flags, "--tokenizer=bpe")
        assert done.returncode == 0, done.stderr
    hint = f"--vocab_source=bpe --vocab_size=500 --data_dir={practice}"
    assert f"next: python train.py --minutes=10 {hint}" in done.stdout
    out = tmp_path / "out"
    args = [*TINY, *hint.split(), "--vocab_size=500", f"--out_dir={out}", "--max_iters=40"]
    done = script("train.py", *args)
    assert done.returncode == 0, done.stderr
    end = [line for line in read_log(out) if line["kind"] == "eval"][-1]
    assert end["val_bpb"] < 3 and end["val_loss"] < 5
    for prompt in ("Once upon a time", 'Zoë saw  2 dogs.\n\n"Hi!" 😀', ""):
        sampled = script(
            "sample.py", f"--out_dir={out}", f"--start={prompt}", "--temperature=0",
            "--max_new_tokens=40",
        )  # fmt: skip
        assert sampled.returncode == 0, sampled.stderr
        n = len(open_tokenizer(out / "tokenizer.model").encode(prompt)) + 39  # -n excludes BOS
        by_c = run(out / "model.bin", "-t", "0", "-i", prompt, "-n", n)
        assert by_c.returncode == 0, by_c.stderr
        assert by_c.stdout == sampled.stdout.encode() and len(by_c.stdout) > 40
    refused(
        script("tinystories.py", "pretokenize", *flags, "--tokenizer=word"),
        "expected sentencepiece or bpe",
    )
    refused(
        script("tinystories.py", "pretokenize", "--tokenizer=bpe", "--vocab_source=llama2"),
        "tokenizer = bpe cannot be used with vocab_source = llama2: use one of the two",
    )
    flags[0] = "--vocab_size=30000"
    refused(
        script("tinystories.py", "train_vocab", *flags, "--tokenizer=bpe"),
        "vocab_size = 30000: this text yields only",
    )
    assert not (practice / "bpe30000.model").exists()
