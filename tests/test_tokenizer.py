"""The tokenizer, its C file, and parity of ids and text between C and Python."""

import io
import random
import shutil
import struct
import subprocess
import sys
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from conftest import (
    PATIENCE_S,
    REPO,
    bin_of,
    refused,
    script,
)

from bpe import BPETokenizer
from configurator import UserError
from text.letters import ranges
from text.synth import make_stories
from tokenizer import byte_level_json, open_tokenizer, train_sentencepiece

WORDS = (
    "Once upon a time there was Zoë 😀 naïve ▁ ▁▁ <s> </s> <unk> <0x41> ﬁ １２３ 2024 "
    "  don't \t \n \n\n . , !? “quotes” … 日本語 é e\u0301 \u200d \ufeff "
    "\U0001f469\u200d\U0001f680 a b c the The THE"
).split(" ")


def generated_texts(n, seed):
    """Yield mixes of hard words, cuts of stories, and random characters."""
    rng = random.Random(seed)
    stories = [item["story"] for item in make_stories(n // 10, seed)]
    for _ in range(n // 2):
        words = rng.choices(WORDS, k=rng.randrange(12))
        yield rng.choice(["", " ", "\n"]).join(words)
    for _ in range(n // 4):
        story = rng.choice(stories)
        i = rng.randrange(len(story))
        yield story[i : i + rng.randrange(80)]
    for _ in range(n // 4):
        top = rng.choice([0x7F, 0x2FF, 0xFFFF, 0x10FFFF])
        points = (rng.randrange(1, top) for _ in range(rng.randrange(30)))
        yield "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def broken_bytes(n, seed):
    """Yield byte strings, most of which are invalid UTF-8."""
    rng = random.Random(seed)
    pieces = [b"\x80", b"\xc3", b"\xe2\x96", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\xaf", b"\xff"]
    pieces += [b"\xf4\x90\x80\x80", b"\xe0\x80\xaf", b"a", b" ", "ë".encode(), "😀".encode()]
    for _ in range(n):
        yield b"".join(rng.choices(pieces, k=rng.randrange(10)))
    for _ in range(n):
        yield bytes(rng.randrange(1, 256) for _ in range(rng.randrange(20)))


def c_ids(builds, tokenizer, texts, kind="fast"):
    """Return the ids that run.c gives to each of some byte strings."""
    command = [builds["harness", kind], "encode", bin_of(tokenizer), str(tokenizer.vocab_size)]
    data = b"".join(text + b"\0" for text in texts)
    done = subprocess.run(command, input=data, capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return [[int(i) for i in line.split()] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("size", [105, 512, 1500])
def test_c_and_sentencepiece_agree_on_ids(builds, tokenizers, size):
    tokenizer = tokenizers[size]
    assert tokenizer.byte_fallback == (size > 105)
    texts = [t.encode() for t in generated_texts(4000, seed=size)]
    texts += list(broken_bytes(500, seed=size))
    for text, ids in zip(texts, c_ids(builds, tokenizer, texts), strict=True):
        assert ids == tokenizer.encode(text), text
        assert all(0 <= i < size for i in ids)


def test_the_c_encoder_is_clean_under_sanitizers(builds, tokenizers):
    for tokenizer in tokenizers.values():
        texts = [t.encode() for t in generated_texts(400, seed=3)] + list(broken_bytes(200, seed=3))
        expected = [tokenizer.encode(t) for t in texts]
        assert c_ids(builds, tokenizer, texts, "checked") == expected


def test_long_prompts_are_not_quadratic(builds, tokenizers):
    """A megabyte of text: n log n steps take well under a second, n * n would take hours."""
    tokenizer = tokenizers[512]
    text = b"the end " * (1 << 17)
    assert c_ids(builds, tokenizer, [text])[0] == tokenizer.encode(text)


@pytest.mark.parametrize("size", [105, 512])
def test_decoding_in_c_matches_python(builds, tokenizers, size):
    tokenizer, rng = tokenizers[size], random.Random(size)
    ids_of = [tokenizer.encode(t, bos=False) for t in generated_texts(60, seed=5)]
    # with byte pieces, random ids make every kind of invalid UTF-8
    ids_of += [[rng.choice([*range(3), *range(3, size)]) for _ in range(40)] for _ in range(60)]
    ids_of = [[i for i in ids if i > 2 or i == 0] for ids in ids_of]
    for ids in filter(None, ids_of):
        command = [builds["harness", "checked"], "decode", bin_of(tokenizer), str(size)]
        done = subprocess.run([*command, *map(str, ids)], capture_output=True, check=True)
        assert done.stdout == tokenizer.decode(ids).encode(), ids


@pytest.mark.parametrize("size", [512, 1500])
def test_byte_fallback_round_trips_every_text(tokenizers, size):
    tokenizer = tokenizers[size]
    for text in generated_texts(500, seed=9):
        same = text.replace("\u2581", " ")
        assert tokenizer.decode(tokenizer.encode(text)) == same
        assert tokenizer.sp.decode(tokenizer.encode(text)) == same
        if text:
            assert tokenizer.bytes_in(tokenizer.encode(text)) == len(same.encode())


@pytest.mark.parametrize("name", ["gpt2", "gpt4"])
def test_byte_level_bpe_round_trips_every_text(tokenizers, name):
    tokenizer = tokenizers[name]
    for text in generated_texts(500, seed=9):
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_id and tokenizer.decode(ids) == text
        assert tokenizer.bytes_in(ids) == len(text.encode())
    assert tokenizer.encode("a<|end|>", eos=True)[-2:] == [599, 598] == [599, tokenizer.bos_id]
    assert tokenizer.encode(b"\xff") == tokenizer.encode("\ufffd")


@pytest.mark.parametrize("which", [105, 512, 1500, "gpt2", "gpt4"])
def test_every_encoder_gives_our_ids(tokenizers, which):
    """gigatoken cannot read a vocabulary without byte pieces."""
    tokenizer = tokenizers[which]
    texts = [*generated_texts(3000, seed=11), "<s>", "a</s>b", "<unk>", "\0", "a" * 3000, "\n" * 50]
    texts += ["<|endoftext|><|end|>", "x<|end|> <|end", " " * 100 + "x", "İ'S it'ſ 'LL \u212a"]
    expected = [tokenizer.encode(text) for text in texts]
    for name in tokenizer.ENCODERS:
        if (which, name) == (105, "gigatoken"):
            with pytest.raises(UserError, match="encoder = gigatoken cannot read"):
                tokenizer.encoder(name)
            continue
        assert tokenizer.encoder(name)[0] == name
        encode = tokenizer.encoder(name)[1]
        ids, counts = encode(texts)
        assert ids.dtype == np.uint32
        results = [[tokenizer.bos_id, *part] for part in np.split(ids, np.cumsum(counts)[:-1])]
        for text, result, ours in zip(texts, results, expected, strict=True):
            assert result == ours, (name, text)
        assert tokenizer.encode_flat(texts, encode).tolist() == sum(expected, [])  # noqa: RUF017
        assert encode([])[0].tolist() == [] and tokenizer.encode_flat(["", ""], encode).size == 2
    assert tokenizer.encoder()[0] == tokenizer.ENCODERS[which == 105]
    with pytest.raises(UserError, match="encoder = 'fast': expected one of auto, gigatoken"):
        tokenizer.encoder("fast")


def test_an_encoder_that_differs_is_not_used(tokenizers, monkeypatch):
    tokenizer = open_tokenizer(tokenizers[512].model_path)
    off_by_one = lambda texts: ((out := tokenizer.by_sentencepiece()(texts))[0] + 1, out[1])  # noqa: E731
    monkeypatch.setattr(tokenizer, "by_gigatoken", lambda: off_by_one)
    assert tokenizer.encoder()[0] == "sentencepiece"
    with pytest.raises(UserError, match="gives different ids from our own encoder"):
        tokenizer.encoder("gigatoken")


@pytest.mark.parametrize("name", ["gpt2", "gpt4"])
def test_an_encoder_with_another_version_of_unicode_is_not_used(tokenizers, monkeypatch, name):
    """It is refused even if no text so far has a character that differs."""
    tokenizer = open_tokenizer(tokenizers[name].model_path)
    gigatoken = pytest.importorskip("gigatoken")

    from_json = gigatoken.Tokenizer.from_json

    def older(data):  # treats U+323C0, a letter since Unicode 17, as a symbol
        encode = from_json(data).encode
        return SimpleNamespace(encode=lambda text: encode(text.replace("\U000323c0", "\u2e5f")))

    fake = SimpleNamespace(Tokenizer=SimpleNamespace(from_json=older))
    monkeypatch.setitem(sys.modules, "gigatoken", fake)
    assert tokenizer.encoder()[0] == "tiktoken"
    assert "another version of Unicode" in tokenizer.unusable["gigatoken"]
    with pytest.raises(UserError, match="another version of Unicode"):
        tokenizer.encoder("gigatoken")


def test_character_classes_match_pythons_unicode():
    """For every character that this Python knows; later versions of Unicode change no class."""
    classes = {code: kind for a, b, kind in ranges() for code in range(a, b + 1)}
    assert len(ranges()) == len({first for first, *_ in ranges()}) and min(classes) == 9
    for code in range(0x110000):
        category = unicodedata.category(chr(code))
        if category not in ("Cn", "Zs", "Zl", "Zp", "Cc"):
            expected = category[0] if category[0] in "LN" else None
            assert classes.get(code) == expected, hex(code)
    white = {code for code, kind in classes.items() if kind == "S"}
    assert white == {c for c in range(0x110000) if chr(c).isspace()} - {28, 29, 30, 31}


def test_without_the_libraries_our_own_encoder_is_used(tokenizers, monkeypatch):
    for module in ("gigatoken", "tiktoken"):
        monkeypatch.setitem(sys.modules, module, None)
    assert open_tokenizer(tokenizers[512].model_path).encoder()[0] == "sentencepiece"
    tokenizer = open_tokenizer(tokenizers["gpt2"].model_path)
    assert tokenizer.encoder()[0] == "own"
    with pytest.raises(UserError, match="needs the package tiktoken: pip install tiktoken"):
        tokenizer.encoder("tiktoken")


def byte_level(tmp_path, merges, special, *others):
    """Return a ByteLevel of the bytes, merged tokens, other tokens and special tokens."""
    tokens = [bytes([i]) for i in range(256)]
    tokens += [*dict.fromkeys(a + b for a, b in merges), *others]
    BPETokenizer(dict(enumerate(tokens)), merges, special).save(tmp_path / "odd.model")
    return open_tokenizer(tmp_path / "odd.model")


def test_vocabularies_that_tiktoken_would_misread_are_encoded_by_another_encoder(tmp_path):
    ab = [(b"a", b"b")]
    for merges, special, others, part in (
        (ab, ["<|e|>", "<|e|>2"], [], "starts with another"),
        (ab, ["<|e|>"], [b" Lily"], "merges do not make"),
        ([(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")], ["<|e|>"], [], "merges do not make"),
    ):
        tokenizer = byte_level(tmp_path, merges, special, *others)
        with pytest.raises(UserError, match=part):
            tokenizer.encoder("tiktoken")
        encode, texts = tokenizer.encoder()[1], ["x<|e|>2 Lily abc aabc", "a<|e|>"]
        expected = [tokenizer.bpe.encode(text) for text in texts]
        assert encode(texts)[0].tolist() == [*expected[0], *expected[1]]
    with pytest.raises(UserError, match="spelled like another token"):
        byte_level_json(byte_level(tmp_path, [(b" ", b"b")], ["<|e|>", "Ġb"]).bpe)


def test_our_encoder_takes_over_if_tiktoken_fails_on_white_space(tokenizers):
    text = "a" + " " * 3_000_000 + "b"
    ids, counts = tokenizers["gpt2"].encoder("tiktoken")[1]([text])
    assert ids.tolist() == tokenizers["gpt2"].bpe.encode(text) and counts[0] > 2


def test_the_c_file_has_the_layout_of_llama2c(tokenizers):
    tokenizer = tokenizers[512]
    data = bin_of(tokenizer).read_bytes()
    at, longest = 4, 0
    for i in range(tokenizer.vocab_size):
        score, length = struct.unpack_from("<fI", data, at)
        piece = data[at + 8 : at + 8 + length].decode()
        at, longest = at + 8 + length, max(longest, length)
        expected = {1: "\n<s>\n", 2: "\n</s>\n"}.get(i, tokenizer.sp.id_to_piece(i))
        assert (piece, score) == (expected.replace("▁", " "), tokenizer.sp.get_score(i))
    assert at == len(data) and struct.unpack_from("<I", data)[0] == longest


def test_the_command_line_writes_the_c_file(tokenizers, tmp_path):
    for which, flag in ((105, "--tokenizer-model"), ("gpt2", "--tokenizer_model")):
        model = tmp_path / f"{which}.model"
        shutil.copy(tokenizers[which].model_path, model)
        done = script("tokenizer.py", f"{flag}={model}")
        assert done.returncode == 0, done.stderr
        exported = (tmp_path / f"{which}.bin").read_bytes()
        assert exported == bin_of(tokenizers[which]).read_bytes()
    refused(script("tokenizer.py", f"{flag}={tmp_path / 'none.model'}"), "does not exist")
    refused(script("tokenizer.py", f"{flag}={REPO / 'model.py'}"), "is not a tokenizer model")


@pytest.mark.parametrize("size", [64, 105, 110, 128, 200, 256, 290, 340, 512, 1000])
def test_vocabularies_of_every_size_can_be_trained(stories, size):
    model, about = train_sentencepiece(stories[:500], size)
    alphabet = len(set("".join(stories[:500])))
    assert alphabet < 64
    assert about["byte_fallback"] == (size > 300)
    assert about["dropped"] == "" and model


def test_rare_characters_are_left_out_and_reported(tmp_path, stories):
    """A text with more different characters than pieces can be trained on."""
    rare = "".join(chr(0x4E00 + i) for i in range(300))
    for size in (105, 512):
        model, about = train_sentencepiece([*stories[:500], rare], size)
        path = tmp_path / f"tok{size}.model"
        path.write_bytes(model)
        tokenizer = open_tokenizer(path)
        assert tokenizer.vocab_size == size and about["dropped"]
        ids = tokenizer.encode(about["dropped"][0])
        assert (0 in ids) == (size == 105)
        text = stories[0]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_next_to_a_reserved_character_is_trained_on(tmp_path):
    lines = [f'Tom "had" {i} red balls \u2585 \x1f \0 and kept them, all.' for i in range(100)]
    model, about = train_sentencepiece(lines, 64)
    assert about["dropped"] == "\0\x1f\u2585" and about["n_dropped"] == 300
    (tmp_path / "tok64.model").write_bytes(model)
    tokenizer = open_tokenizer(tmp_path / "tok64.model")
    assert tokenizer.encode(lines[0]).count(tokenizer.unk_id) == 3


def test_lines_of_any_length_are_trained_on(tmp_path, stories):
    text = " ".join(story.replace("\n", " ") for story in stories[:200])
    model, _ = train_sentencepiece([text], 512)
    (tmp_path / "tok512.model").write_bytes(model)
    assert len(open_tokenizer(tmp_path / "tok512.model").encode(text)) < len(text) / 1.8


def test_small_vocabularies_have_room_for_newline_and_space():
    """Both need a piece even if they are not in the text."""
    train_sentencepiece(["".join(chr(0x4E00 + i) for i in range(200))], 64)


def test_a_tokenizer_that_changes_text_gets_a_note(tokenizers, tmp_path, stories):
    assert tokenizers[512].caveat() == ""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stories[:300]), model_writer=model, model_type="bpe",
        vocab_size=200, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "folds.model").write_bytes(model.getvalue())
    done = script("tokenizer.py", f"--tokenizer-model={tmp_path / 'folds.model'}")
    assert done.returncode == 0 and "collapses spaces" in done.stdout


def test_too_little_text_is_refused():
    with pytest.raises(UserError, match="use more text or a smaller --vocab_size"):
        train_sentencepiece(["the cat sat on the mat"], 5000)
    with pytest.raises(UserError, match="empty"):
        train_sentencepiece([" \n"], 105)
