"""`./run --draft` tells the same stories with fewer passes through the model."""

import json
import re
import struct

import numpy as np
import pytest
from conftest import EVERYTHING, bin_of, random_model, refused, script

from formats.modelbin import export_model
from text.draft import HEADER, best_contexts, write_draft

BOS = 1


def test_a_context_is_kept_if_it_knows_better_than_the_shorter_one():
    ids = np.array([BOS, 5, 7, 9] * 4 + [BOS, 6, 7, 8] * 3)
    hashes, tokens, odds = best_contexts(ids, BOS, 100)
    # after BOS 5, after 5 and 6 7, after 7 9, but after 6 7 it is 8
    assert sorted(tokens.tolist()) == [5, 7, 7, 8, 9]
    assert dict(zip(tokens.tolist(), odds.tolist(), strict=True))[9] == 255 * 4 // 8
    assert len(set(hashes.tolist())) == 5
    assert best_contexts(ids, BOS, 2)[1].tolist() == [5, 7]  # most often right


def test_no_context_spans_two_documents():
    _, tokens, _ = best_contexts(np.array([BOS, 5, BOS, 5, BOS, 5]), BOS, 100)
    assert tokens.tolist() == [5]


@pytest.fixture(scope="module")
def told(run, tokenizers, tmp_path_factory):
    """A random model, and a table made from stories that it told with seeds 0 to 29."""
    folder = tmp_path_factory.mktemp("draft")
    tokenizer = tokenizers[512]
    options = EVERYTHING | {"vocab_size": 512, "orders": False, "max_seq_len": 64}
    paths = {}
    for dtype in ("fp32", "int8", "int4"):
        paths[dtype] = folder / f"{dtype}.bin"
        export_model(random_model(**options), paths[dtype], dtype=dtype)
    done = run(paths["fp32"], "-z", bin_of(tokenizer), "-b", 30, "-s", 0, "-t", 0.3, "--json")
    texts = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    ids = np.concatenate([[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts])
    write_draft(folder / "own.draft", ids, tokenizer, max_slots=4000)
    return paths, bin_of(tokenizer), folder / "own.draft"


@pytest.mark.parametrize("n", [0, 1, 2, 20])
@pytest.mark.parametrize(
    "dtype, flags", [("fp32", ""), ("fp32", "--kv bf16"), ("int8", ""), ("int4", "--fast -j 1")]
)
def test_guesses_change_no_story(run, told, dtype, flags, n):
    models, tokenizer, draft = told
    n_right = 0
    for seed in range(8):
        command = [models[dtype], "-z", tokenizer, "-n", n, "-s", seed, "-t", 0.3, *flags.split()]
        alone, guessed = run(*command), run(*command, "--draft", draft)
        assert guessed.stdout == alone.stdout
        right, asked = map(int, re.search(rb"guesses: (\d+) of (\d+)", guessed.stderr).groups())
        assert right <= asked
        n_right += right
    if n == 0 and dtype == "fp32":
        assert n_right > 40


def test_the_practice_corpus_gives_guesses(run, practice, trained):
    flags = f"--data_dir={practice}", "--vocab_size=300"
    done = script("tinystories.py", "draft", *flags)
    assert done.returncode == 0, done.stderr
    draft = practice / "tok300.draft"
    assert draft.stat().st_size <= 1_000_000
    command = [trained / "model.bin", "-s", 1, "-t", 0.8]
    alone, guessed = run(*command), run(*command, "--draft", draft)
    assert alone.returncode == 0 and guessed.stdout == alone.stdout
    right, asked = map(int, re.search(rb"guesses: (\d+) of (\d+)", guessed.stderr).groups())
    assert asked > 5 and right > 0
    done = script("tinystories.py", "draft", f"--data_dir={practice}", "--vocab_size=301")
    refused(done, "no token shards", "tinystories.py pretokenize")


def damaged(data):
    """Yield (what is wrong, file)."""
    magic, version, fingerprint, vocab_size, n_slots, zero = struct.unpack_from(HEADER, data)
    slots = np.frombuffer(data, "<u4", offset=struct.calcsize(HEADER)).copy()

    def with_header(**fields):
        values = {"magic": magic, "version": version, "fingerprint": fingerprint}
        values |= {"vocab_size": vocab_size, "n_slots": n_slots, "zero": zero} | fields
        return struct.pack(HEADER, *values.values()) + slots.tobytes()

    yield "not a table", data[:10]
    yield "not a table", with_header(magic=b"24ka")
    yield "not a table", with_header(version=2)
    yield "header needs", data[:-1]
    yield "header needs", data + bytes(8)
    yield "header needs", with_header(n_slots=1 << 31)
    yield "another tokenizer", with_header(fingerprint=fingerprint ^ 1)
    yield "another tokenizer", with_header(vocab_size=511)
    slots[1::2] |= 600
    yield "has token", with_header()
    slots[1::2] = 1 << 24
    yield "no slot is free", with_header()


def test_damaged_tables_are_refused(run, told, tmp_path):
    models, tokenizer, draft = told
    command = [models["fp32"], "-z", tokenizer, "-s", 1, "--draft"]
    for problem, data in damaged(draft.read_bytes()):
        (tmp_path / "bad.draft").write_bytes(data)
        done = run(*command, tmp_path / "bad.draft")
        assert done.returncode == 1 and done.stdout == b"", problem
        assert re.fullmatch(rb"error: [^\n]+\n", done.stderr), problem
        assert problem.encode() in done.stderr, done.stderr
    done = run(*command, tmp_path / "missing.draft")
    assert done.returncode == 1 and b"tinystories.py draft" in done.stderr
    done = run(*command, draft, "-b", 2)
    assert done.returncode == 1 and b"--draft cannot be used with -b 2" in done.stderr
