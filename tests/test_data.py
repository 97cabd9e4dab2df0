"""From text on disk to token shards: tinystories.py, text/ and dataset.py."""

import codecs
import csv
import fcntl
import gzip
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from itertools import pairwise

import numpy as np
import pytest
from conftest import REPO, bin_of, refused, script

from configurator import UserError
from dataset import DataPaths, TokenData
from text.corpus import plan_shards
from text.documents import stream_documents
from text.shards import choose_split
from text.synth import make_stories
from tokenizer import open_tokenizer

# ---- the practice corpus


def test_practice_corpus_is_deterministic_and_varied():
    first, again = (list(make_stories(5000, seed=3)) for _ in range(2))
    assert first == again != list(make_stories(5000, seed=4))
    texts = [item["story"] for item in first]
    assert len(set(texts)) == 5000
    assert len({text[:200] for text in texts}) > 4900
    for item in first[:500]:
        assert set(item) == {"story", "instruction", "summary", "source"}
        assert set(item["instruction"]) == {"prompt:", "words", "features"}
        assert item["summary"] and 150 < len(item["story"]) < 1500
        assert "{" not in item["story"] + item["summary"]
        assert all(word in item["story"] for word in item["instruction"]["words"])


def test_synth_does_not_replace_other_stories(tmp_path):
    done = script("tinystories.py", "synth", "--n_stories=40", f"--data_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "TinyStories_all_data"
    assert len(os.listdir(folder)) == 20
    real = json.dumps([{"story": "A real story.", "source": "GPT-4"}])
    (folder / "data00.json").write_text(real)
    again = script("tinystories.py", "synth", "--n_stories=40", f"--data_dir={tmp_path}")
    refused(again, "holds other stories")
    assert (folder / "data00.json").read_text() == real


# ---- sources of text

DOCUMENTS = [f"Story {i}: " + "Ben ran. " * (i % 7) + "é\nThe end." for i in range(500)]


def write_source(folder, kind):
    """Write DOCUMENTS in one of the supported formats and return the path."""
    folder.mkdir()
    if kind == "txt":
        path = folder / "a.txt"
        path.write_text("\n<|endoftext|>\n".join(DOCUMENTS) + "\n<|endoftext|>\n")
    elif kind == "txt without a final separator":
        path = folder / "a.txt"
        path.write_text("<|endoftext|>".join(DOCUMENTS))
    elif kind == "json":
        path = folder / "a.json"
        path.write_text(json.dumps([{"story": d} for d in DOCUMENTS], ensure_ascii=False))
    elif kind == "indented json":
        path = folder / "a.json"
        path.write_text(json.dumps([{"story": d} for d in DOCUMENTS], indent=2))
    elif kind == "jsonl":
        path = folder / "a.jsonl"
        path.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    else:
        path = folder
        for i in range(10):
            part = [{"story": d} for d in DOCUMENTS[50 * i : 50 * i + 50]]
            (folder / f"data{i:02}.json").write_text(json.dumps(part))
    return str(path)


def documents_of(sections):
    return [document for section in sections for document in section.documents()]


KINDS = ["txt", "txt without a final separator", "json", "indented json", "jsonl", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_document_is_lost_or_cut(tmp_path, kind):
    plan = plan_shards(write_source(tmp_path / "source", kind))
    assert len(plan) == (1 if "json" in kind and kind != "jsonl" else 10)
    assert documents_of(plan) == DOCUMENTS
    assert all(map(documents_of, zip(plan, strict=True)))


def test_the_validation_text_is_the_first_shard(tmp_path):
    source = write_source(tmp_path / "source", "txt")
    valid = tmp_path / "valid.jsonl"
    valid.write_text('{"text": "unseen"}\n')
    plan = plan_shards(source, str(valid))
    assert list(plan[0].documents()) == ["unseen"]
    assert documents_of(plan[1:]) == DOCUMENTS


def test_a_validation_text_in_the_same_folder_is_not_trained_on(tmp_path):
    source = tmp_path / "source"
    write_source(source, "txt")
    (source / "valid.txt").write_text("unseen <|endoftext|> unheard")
    plan = plan_shards(str(source), str(source / "valid.txt"))
    assert list(plan[0].documents()) == ["unseen", "unheard"]
    assert documents_of(plan[1:]) == DOCUMENTS


def test_many_small_files_share_shards(tmp_path):
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / f"{i:03}.txt").write_text(document)
    plan = plan_shards(str(tmp_path))
    assert 10 <= len(plan) <= 21
    assert documents_of(plan) == DOCUMENTS


LINES = "".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS).encode()
LIST = json.dumps([{"text": d} for d in DOCUMENTS]).encode()
MARKED = "<|endoftext|>".join(DOCUMENTS).encode()


def as_csv(texts):
    out = io.StringIO()
    csv.writer(out).writerows([["id", "text"], *enumerate(texts)])
    return out.getvalue().encode()


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["", "byte order mark"])
@pytest.mark.parametrize(
    "name, data, is_cut",
    [
        ("a.json", LINES, True),
        ("c4-train.00000.json.gz", LINES, False),
        ("a.jsonl", b" \n " + LIST, False),
        ("A.JSONL", LINES, True),
        ("A.TXT", MARKED, True),
        ("a.txt.gz", MARKED, False),
        ("a.csv", as_csv(DOCUMENTS), False),
    ],
)
def test_the_first_character_decides_the_format_and_a_byte_order_mark_is_skipped(
    tmp_path, name, data, is_cut, mark
):
    packed = gzip.compress(mark + data) if name.endswith(".gz") else mark + data
    (tmp_path / name).write_bytes(packed)
    for plan in (plan_shards(str(tmp_path)), plan_shards(str(tmp_path / name))):
        assert documents_of(plan) == DOCUMENTS
    assert len(plan) == (10 if is_cut else 1)
    assert [text for text, _ in stream_documents(tmp_path / name)] == DOCUMENTS
    (tmp_path / "b.txt").write_text("unseen")
    valid = plan_shards(str(tmp_path / "b.txt"), str(tmp_path / name))
    assert [file.is_valid for file in valid] == [True, False]
    assert list(valid[0].documents()) == DOCUMENTS


def test_files_that_are_not_data_are_skipped(tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import table

    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "._a.jsonl").write_bytes(b"\0\5\26\7" + bytes(range(256)))
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    parquet.write_table(table({"text": DOCUMENTS}), tmp_path / "a.parquet")
    assert documents_of(plan_shards(str(tmp_path))) == DOCUMENTS
    assert f"{tmp_path}: not reading a.parquet, dataset_infos.json" in capsys.readouterr().out
    (tmp_path / "a.parquet").rename(tmp_path / "b.parquet")
    assert documents_of(plan_shards(str(tmp_path))) == DOCUMENTS * 2
    assert "has .parquet and other files" in capsys.readouterr().out


def prose(n, seed=0):
    """Return a text of n paragraphs of 100 to 600 characters."""
    random_numbers = random.Random(seed)
    letters = "abcdefghij"
    return "\n\n".join(
        " ".join("".join(random_numbers.choices(letters, k=4)) for _ in range(length))
        for length in random_numbers.choices(range(20, 120), k=n)
    )


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old mac"])
@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz"])
@pytest.mark.parametrize("n", [12, 1000])
def test_a_book_is_cut_at_paragraphs(tmp_path, capsys, n, name, end):
    text = prose(n)
    data = text.replace("\n", end).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    plan = plan_shards(str(tmp_path / name))
    documents = documents_of(plan)
    assert 1 < len(documents) < 2 + len(text) / 2000
    assert max(map(len, documents)) <= 4000
    assert "\n\n".join(documents) == text
    if n == 1000 and end != "\r":
        assert len(plan) == (1 if name.endswith(".gz") else len(data) // (64 << 10))
    note = f"{name} has no <|endoftext|> between documents and is cut at blank lines"
    assert note in capsys.readouterr().out
    sides = choose_split(plan).sides(documents, False)
    assert all(sides) and len(sides[1]) == max(1, round(len(documents) / 10))
    assert all(file.check_unchanged() is None for file in plan)


def test_long_paragraphs_are_cut_at_lines_and_words(tmp_path):
    path = tmp_path / "a.txt"
    for text, end in (
        (prose(60).replace("\n\n", "\n"), "\n"),
        (prose(60).replace("\n\n", " "), " "),
    ):
        path.write_text(text)
        documents = documents_of(plan_shards(str(path)))
        assert end.join(documents) == text and 1000 < len(documents[0]) <= 4000
    path.write_text("a" * 10_000)
    assert list(map(len, documents_of(plan_shards(str(path))))) == [4000, 4000, 2000]


def test_short_files_without_separators_are_whole_documents(tmp_path):
    stories = [prose(5, seed) for seed in range(30)]
    for i, story in enumerate(stories):
        (tmp_path / f"{i:02}.txt").write_text(story)
    assert documents_of(plan_shards(str(tmp_path))) == stories
    (tmp_path / "99.txt").write_text(prose(100))
    assert documents_of(plan_shards(str(tmp_path)))[:30] == stories
    assert len(documents_of(plan_shards(str(tmp_path)))) > 35


def test_validation_documents_are_from_all_files_and_are_reported(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_bytes(prose(150, i).replace("\n", "\r\n").encode())
    args = [f"--source={tmp_path}", f"--data_dir={tmp_path / 'data'}", "--vocab_size=64"]
    done = script("tinystories.py", "train_vocab", *args)
    assert done.returncode == 0, done.stderr
    assert f"pretokenize --vocab_size=64 --data_dir={tmp_path / 'data'} --source={tmp_path}" in (
        done.stdout
    )
    done = script("tinystories.py", "pretokenize", *args)
    assert done.returncode == 0, done.stderr
    report = re.search(r"validation: (\d+) documents \((9|10)\.\d%\), .*", done.stdout)
    assert int(report[1]) > 5 and report[0].endswith("from all files")
    shards = DataPaths(tmp_path / "data", "custom", 64).shards
    tokenizer = open_tokenizer(tmp_path / "data" / "tok64.model")
    valid = tokenizer.decode(np.fromfile(os.path.join(shards, "data00.bin"), "<u2").tolist())
    assert "\r" not in valid
    for i in range(3):  # some passages of each file are for validation
        parts = [part[:40] for part in prose(150, i).split("\n\n")]
        assert any(part in valid for part in parts)


def test_a_vocabulary_that_shards_need_is_kept(tmp_path):
    (tmp_path / "a.txt").write_text(prose(100))
    (tmp_path / "b.txt").write_text(prose(100, 1).upper())
    args = [f"--data_dir={tmp_path / 'data'}", "--vocab_size=300", "--vocab_source=bpe"]

    def stage(name, text, *more):
        return script("tinystories.py", name, *args, f"--source={tmp_path / text}.txt", *more)

    model, names = tmp_path / "data" / "bpe300.model", ["bpe300.model", "bpe300.vocab"]
    for name, text in (("train_vocab", "a"), ("train_vocab", "b"), ("train_vocab", "a")):
        assert stage(name, text).returncode == 0  # no shards yet
    assert stage("pretokenize", "a").returncode == 0
    before, listed = model.read_bytes(), model.with_suffix(".vocab").read_text()
    done = stage("train_vocab", "a")
    assert done.returncode == 0 and "is replaced only with --overwrite" in done.stdout
    expected = "already exists, differs from the new vocabulary", "choose another --data_dir"
    refused(stage("train_vocab", "b"), *expected, "use --overwrite")
    assert model.read_bytes() == before
    assert sorted(os.listdir(tmp_path / "data")) == ["bpe300", "bpe300.bin", *names]
    done = stage("train_vocab", "b", "--overwrite=True")
    assert done.returncode == 0 and "will be replaced" in done.stdout
    assert model.read_bytes() != before and model.with_suffix(".vocab").read_text() != listed
    with pytest.raises(UserError, match="was made with a tokenizer other than"):
        TokenData(DataPaths(tmp_path / "data", "bpe", 300), 16, open_tokenizer(model))


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\nnull\n{"story": null, "text": "b"}\n'),
        ("a.json", b'[{"text": "a"}, {"text": null}, null, {"story": null, "text": "b"}]'),
        ("a.csv", b"id,text\n1,a\n2,\n3\n4,b\n"),
    ],
)
def test_null_is_an_empty_document(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert documents_of(plan_shards(str(tmp_path))) == ["a", "b"]


def test_text_that_is_not_utf8_is_refused_before_any_work(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes((MARKED + b" caf\xe9 ") * 4)
    (tmp_path / "fine.txt").write_bytes(MARKED)
    model, sizes = tmp_path / "my.model", ["--vocab_size=300", "--num_workers=1"]
    done = script(
        "bpe.py", "train", f"--source={tmp_path / 'fine.txt'}", f"--model={model}", *sizes
    )
    assert done.returncode == 0, done.stderr
    before = sorted(os.listdir(tmp_path))
    where = [f"--source={path}", f"--data_dir={tmp_path / 'data'}", *sizes]
    encode = ["bpe.py", "encode", f"--source={path}", f"--model={model}", "--num_workers=1"]
    for args in (
        ["bpe.py", "train", f"--source={path}", f"--model={tmp_path / 'x.model'}", *sizes],
        [*encode, f"--out={tmp_path / 'x.npy'}"],
        [*encode, f"--out={tmp_path / 'shards'}"],
        ["tinystories.py", "train_vocab", *where],
        ["webtext.py", "train_vocab", *where],
    ):
        expected = f"latin1.txt is not UTF-8 at byte {len(MARKED) + 4:,}"
        refused(script(*args), expected, "iconv")
        assert sorted(os.listdir(tmp_path)) == before


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b"}\n' * 20)
    plan = plan_shards(str(tmp_path))
    assert set(documents_of(plan)) == {"a ? b"}


@pytest.mark.parametrize(
    "name, data, part",
    [
        ("a.txt", b"one document without a separator", "expected several documents"),
        ("a.txt", b"", "contains no text to train on: its files are empty"),
        ("a.txt", b" \n ", "contains only white space: nothing to train on"),
        ("a.txt.gz", b"", "nothing to train on|damaged"),
        ("a.txt", b"good <|endoftext|>" * 50 + b"\xff", "not UTF-8"),
        ("a.json", b'[{"story": "half of', "not JSON"),
        ("a.json", b'{"story": "no list"}', "not JSON|several documents|a JSON list"),
        ("a.jsonl", b'{"story": "x"}\nnonsense\n' * 20, "not JSON"),
        ("a.jsonl", b'{"poem": "x"}\n' * 20, "story or text"),
        ("a.csv", b"poem\nx\n", "story or text"),
        ("a.tsv", b"story\nx\n", "ending in .txt"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid 0\n", "git lfs pull"),
        (
            "a.json",
            b'{\n"data": [{"text": "x"}]}',
            "expected a list of objects or one object per line",
        ),
        ("none", None, "does not exist"),
    ],
)
def test_text_that_cannot_be_read_is_refused(tmp_path, name, data, part):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=part):
        choose_split(plan_shards(str(path)))


# ---- pretokenize


@pytest.fixture
def folder(tmp_path, tokenizers):
    """Return a data folder with a tokenizer of 512 pieces and a text to encode."""
    write_source(tmp_path / "source", "txt")
    shutil.copy(tokenizers[512].model_path, tmp_path / "tok512.model")
    return tmp_path


def pretokenize(folder, *args):
    flags = ["--vocab_size=512", f"--data_dir={folder}", f"--source={folder / 'source'}"]
    return script("tinystories.py", "pretokenize", *flags, *args)


def test_shards_have_a_bos_before_every_document(folder, tokenizers):
    done = pretokenize(folder)
    assert done.returncode == 0, done.stderr
    meta = json.loads((folder / "tok512" / "shards.json").read_text())
    assert meta["complete"] and meta["vocab_size"] == 512 and meta["dtype"] == "uint16"
    assert meta["tokenizer_hash"] == tokenizers[512].hash
    documents = []
    for shard in meta["shards"]:
        tokens = np.fromfile(folder / "tok512" / shard["name"], "<u2")
        starts = [*np.flatnonzero(tokens == 1), len(tokens)]
        assert starts[0] == 0
        decoded = [tokenizers[512].decode(tokens[a:b].tolist()) for a, b in pairwise(starts)]
        assert shard["documents"] == len(decoded) and shard["tokens"] == len(tokens)
        assert shard["bytes"] == sum(len(d.encode()) for d in decoded)
        documents += decoded
        assert decoded == [text for text in DOCUMENTS if text in set(decoded)]  # in order
    assert sorted(documents) == sorted(DOCUMENTS)
    assert (folder / "tok512.bin").read_bytes() == bin_of(tokenizers[512]).read_bytes()


def test_finished_shards_are_kept_and_stale_ones_replaced(folder):
    assert pretokenize(folder).returncode == 0
    shards = folder / "tok512"

    def times():
        return {p.name: p.stat().st_mtime_ns for p in shards.glob("*.bin")}

    before = times()
    os.remove(shards / "data_00003_0000.bin")
    (shards / "data_00005_0000.bin").write_bytes(b"cut short")
    done = pretokenize(folder)
    assert "2 of 10 shards to make" in done.stdout
    changed = {name for name, t in times().items() if before[name] != t}
    assert changed == {"data00.bin", "data_00003_0000.bin", "data_00005_0000.bin"}
    # after another text, then another tokenizer, nothing old may be used
    with open(folder / "source" / "a.txt", "a") as f:
        f.write("One more.")
    done = pretokenize(folder)
    assert "10 of 10 shards to make" in done.stdout
    assert f"note: replacing the shards in {shards}, which were made from" in done.stdout
    shutil.copy(folder / "tok512.model", folder / "old.model")
    flags = ["--vocab_size=512", f"--data_dir={folder}", f"--source={folder / 'source'}"]
    assert script("tinystories.py", "train_vocab", *flags, "--vocab_mb=1").returncode == 1  # small
    assert (folder / "tok512.model").read_bytes() == (folder / "old.model").read_bytes()


def test_a_smaller_corpus_leaves_no_old_shards(folder):
    assert pretokenize(folder).returncode == 0
    (folder / "source" / "a.txt").write_text("<|endoftext|>".join(DOCUMENTS[:4]))
    assert pretokenize(folder).returncode == 0
    names = {p.name for p in (folder / "tok512").glob("*.bin")}
    meta = json.loads((folder / "tok512" / "shards.json").read_text())
    assert names == {s["name"] for s in meta["shards"]} and len(names) < 10


def test_a_failing_worker_stops_the_job_and_reports_the_line(folder):
    assert pretokenize(folder).returncode == 0
    (folder / "valid.txt").write_text("Unseen.")
    (folder / "source" / "b.jsonl").write_text('{"text": "x"}\nnonsense\n')
    done = pretokenize(folder, f"--valid_source={folder / 'valid.txt'}")
    refused(done, "b.jsonl, line 2 is not JSON")
    meta = json.loads((folder / "tok512" / "shards.json").read_text())
    assert not meta["complete"]
    paths = DataPaths(folder, "custom", 512)
    with pytest.raises(UserError, match="is not finished yet"):
        TokenData(paths, 16)
    os.remove(folder / "tok512" / "shards.json")  # as in a first run
    with pytest.raises(UserError, match="is not finished yet"):
        TokenData(paths, 16)


def test_a_corpus_without_documents_does_not_change_the_shards(folder):
    assert pretokenize(folder).returncode == 0
    shards = folder / "tok512"
    before = contents_of(shards)
    (folder / "empty.txt").write_text("<|endoftext|>\n" * 1000)
    (folder / "source" / "a.txt").rename(folder / "a.txt")
    args = ["pretokenize", "--vocab_size=512", f"--data_dir={folder}"]
    for source, valid, part in (
        ("empty", "", "contains only white space: nothing to train on"),
        ("empty", "a", "contains only white space: nothing to train on"),
        ("a", "empty", "contains only white space: nothing to validate on"),
        ("a", "same", "all training documents are also in the validation text"),
    ):
        shutil.copy(folder / "a.txt", folder / "same.txt")
        flags = [f"--source={folder / source}.txt"]
        flags += [f"--valid_source={folder / valid}.txt"] if valid else []
        refused(script("tinystories.py", *args, *flags), part)
        assert contents_of(shards) == before


def contents_of(folder):
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("n, n_valid", [(2, 1), (3, 1), (7, 1), (40, 4)])
def test_a_tiny_text_has_a_document_on_each_side(folder, n, n_valid):
    texts = [f"Story {i}. " + "Ben ran. " * 50 for i in range(n)]
    (folder / "source" / "a.txt").write_text("<|endoftext|>".join(texts))
    done = pretokenize(folder)
    assert done.returncode == 0, done.stderr
    meta = json.loads((folder / "tok512" / "shards.json").read_text())
    assert meta["shards"][0]["documents"] == n_valid
    assert sum(shard["documents"] for shard in meta["shards"]) == n
    (folder / "source" / "a.txt").write_text("<|endoftext|>".join(texts[:1] * 3))
    refused(pretokenize(folder), "expected several documents", "--valid_source")


def test_both_scripts_hold_out_the_same_documents(tmp_path, tokenizers):
    """tinystories.py and webtext.py cut the text differently but share one split rule."""
    source = write_source(tmp_path / "source", "jsonl")
    tokenizer, results = tokenizers["gpt2"], []
    for name, stage in (("tinystories.py", "pretokenize"), ("webtext.py", "prepare")):
        data = tmp_path / name
        data.mkdir()
        shutil.copy(tokenizer.model_path, data / "bpe600.model")
        flags = [f"--data_dir={data}", f"--source={source}", "--vocab_size=600"]
        flags += ["--vocab_source=bpe"] if name == "tinystories.py" else []
        done = script(name, stage, *flags)
        assert done.returncode == 0, done.stderr
        data = TokenData(DataPaths(data, "bpe", 600), 16, tokenizer)
        results.append([np.concatenate(shards).tolist() for shards in (data.valid, data.train)])
    assert results[0] == results[1]


def test_after_being_killed_pretokenize_continues_at_the_shard(folder):
    texts = [f"{i} {text}" for i in range(40) for text in DOCUMENTS]
    (folder / "source" / "a.txt").write_text("<|endoftext|>".join(texts))
    flags = ["--vocab_size=512", f"--data_dir={folder}", f"--source={folder / 'source'}"]
    flags += ["--num_workers=1", "--encoder=sentencepiece"]
    command = [sys.executable, REPO / "tinystories.py", "pretokenize", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shards = folder / "tok512"
    while len(list(shards.glob("data_*.bin"))) < 3 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= len(list(shards.glob("data_*.bin"))) < 10, "too fast to be killed in between"
    assert not (shards / "shards.json").exists()
    done = script("tinystories.py", "pretokenize", *flags)
    assert done.returncode == 0, done.stderr
    interrupted = contents_of(shards)
    shutil.rmtree(shards)
    assert script("tinystories.py", "pretokenize", *flags).returncode == 0
    once = contents_of(shards)
    # a file that was being written may be left as a .part
    assert once.keys() == {path for path in interrupted if not path.endswith(".part")}
    assert all(once[p] == interrupted[p] for p in once if p.endswith(".bin"))


def test_two_processes_do_not_write_the_same_folder(folder):
    assert pretokenize(folder).returncode == 0
    with open(folder / "tok512" / "parts" / "0_of_1.json.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(pretokenize(folder), "another process is writing")
    assert pretokenize(folder).returncode == 0


def test_shards_of_earlier_versions_are_read_and_replaced(folder, tokenizers):
    """Their sidecar has format 2, with the first part of the text for validation."""
    shards, tokenizer = folder / "tok512", tokenizers[512]
    shards.mkdir()
    entries = []
    for i, texts in enumerate((DOCUMENTS[:50], DOCUMENTS[50:250], DOCUMENTS[250:])):
        ids = np.array([i for text in texts for i in tokenizer.encode(text)], "<u2")
        ids.tofile(shards / f"data{i:02}.bin")
        counts = {"documents": len(texts), "tokens": len(ids), "unk": 0, "held_out": 0}
        counts |= {"bytes": sum(len(text.encode()) for text in texts), "crc32": zlib.crc32(ids)}
        entries.append({"name": f"data{i:02}.bin", "source": [f"a.txt 9 9 {i}-9"], **counts})
    meta = {"format": 2, "vocab_size": 512, "dtype": "uint16", "tokenizer_hash": tokenizer.hash}
    meta |= {"valid_source": ["a.txt 9 9 0-9"], "complete": True, "shards": entries, "held_out": 0}
    (shards / "shards.json").write_text(json.dumps(meta))
    data = TokenData(DataPaths(folder, "custom", 512), 16, tokenizer)
    assert len(data.train) == 2 and data.valid_bytes == entries[0]["bytes"]
    done = pretokenize(folder)
    assert done.returncode == 0, done.stderr
    assert f"note: replacing the shards in {shards}" in done.stdout
    assert "or with another tokenizer, split or orders" in done.stdout
    assert not (shards / "data01.bin").exists()
    assert TokenData(DataPaths(folder, "custom", 512), 16, tokenizer).valid_bytes > 0


def test_missing_tokenizers_and_stories_are_reported(tmp_path):
    flags = [f"--data_dir={tmp_path}"]
    done = script("tinystories.py", "pretokenize", "--vocab_size=512", *flags)
    refused(done, "does not exist; run: python tinystories.py train_vocab --vocab_size=512")
    for args in (["--vocab_size=0"], ["--vocab_source=llama2"]):
        done = script("tinystories.py", "pretokenize", *args, *flags)
        refused(done, "Llama 2's tokenizer.model", f"{tmp_path}/tokenizer.model")
        refused(script("tinystories.py", "train_vocab", *args, *flags), "cannot be trained")
    done = script("tinystories.py", "train_vocab", "--vocab_size=512", *flags)
    refused(done, f"{tmp_path} has no stories", "tinystories.py download")
    refused(script("tinystories.py", "train_vocab", "--vocab_size=20", *flags), "expected 64 to")
    refused(script("tinystories.py", "train_vocab", "--vocab_size=1e30", *flags), "to 1,000,000")
    refused(script("tinystories.py"), "the stage is missing: expected one of download, synth")


# ---- download


def tar_of(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_download_of_the_stories(tmp_path):
    data = {f"data{i:02}.json": json.dumps([{"story": f"{i}"}]).encode() for i in range(3)}
    of_macos = {"._data00.json": b"\0\5", "__MACOSX/data00.json": b"\0\5"}
    tar_of(tmp_path / "TinyStories_all_data.tar.gz", data | of_macos)
    flags = ["download", f"--data_dir={tmp_path / 'data'}"]
    done = script("tinystories.py", *flags, f"--url={tmp_path}")
    assert done.returncode == 0, done.stderr
    for name, text in data.items():
        assert (tmp_path / "data" / "TinyStories_all_data" / name).read_bytes() == text
    assert sorted(os.listdir(tmp_path / "data" / "TinyStories_all_data")) == sorted(data)
    again = script("tinystories.py", *flags, f"--url={tmp_path / 'none'}")
    assert again.returncode == 0 and "already exists" in again.stdout


def test_half_a_download_is_refused(tmp_path):
    tar_of(tmp_path / "a.tar.gz", {"data00.json": os.urandom(10000)})
    whole = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "TinyStories_all_data.tar.gz").write_bytes(whole[:-100])
    flags = ["download", f"--data_dir={tmp_path / 'data'}", f"--url={tmp_path}"]
    refused(script("tinystories.py", *flags), "is not a complete tar archive")
    assert not (tmp_path / "data" / "TinyStories_all_data").exists()


def test_download_of_the_text_files(tmp_path):
    source = tmp_path / "mirror"
    source.mkdir()
    for seed, part in enumerate(("train", "valid")):
        text = "\n<|endoftext|>\n".join(item["story"] for item in make_stories(300, seed=seed))
        (source / f"TinyStoriesV2-GPT4-{part}.txt").write_text(text)
    flags = [f"--data_dir={tmp_path / 'data'}", "--vocab_size=105"]
    for args in (
        ["download", "--dataset=v2", f"--url={source}"],
        ["train_vocab"],
        ["pretokenize"],
    ):
        done = script("tinystories.py", *args, *flags)
        assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "data" / "tok105" / "shards.json").read_text())
    assert meta["shards"][0]["documents"] == 300  # the validation file as a whole


@pytest.mark.parametrize("prefix", ["", "tok105/"])
def test_download_of_a_pretokenized_set(tmp_path, tokenizers, prefix):
    """BabyLlama's files: shards without a sidecar."""
    source, data = tmp_path / "mirror", tmp_path / "data"
    source.mkdir()
    tokenizer = tokenizers[105]
    shutil.copy(tokenizer.model_path, source / "tok105.model")
    (source / "tok105.vocab").write_text("the pieces")
    documents = [item["story"] for item in make_stories(200, seed=8)]
    ids = [i for d in documents for i in tokenizer.encode(d)]
    shards = {f"{prefix}data0{i}.bin": np.array(ids, "<u2").tobytes() for i in range(3)}
    tar_of(source / "tok105.tar.gz", shards)
    flags = [f"--data_dir={data}", "--pretokenized=105", f"--url={source}"]
    done = script("tinystories.py", "download", *flags)
    assert done.returncode == 0, done.stderr
    assert (data / "tok105.bin").read_bytes() == bin_of(tokenizer).read_bytes()
    shards = TokenData(DataPaths(data, "custom", 105), 64, open_tokenizer(data / "tok105.model"))
    assert len(shards.train) == 2 and len(shards.valid) == 1
    assert shards.valid_bytes == sum(len(d) for d in documents)  # counted from the ids
    done = script("tinystories.py", "download", "--pretokenized=64")
    refused(done, "pretokenized = 64: expected 128 or 105")


# ---- reading shards


def fake_shards(folder, lengths, top=100):
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays = [rng.integers(3, top, n).astype("<u2") for n in lengths]
    for i, tokens in enumerate(arrays):
        tokens.tofile(folder / f"data{i:02}.bin")
    return arrays


def test_shards_that_do_not_fit_are_refused(tmp_path, tokenizers):
    paths = DataPaths(tmp_path, "custom", 105)
    with pytest.raises(UserError, match=r"has no token shards; run: python tinystories\.py"):
        TokenData(paths, 16)
    fake_shards(tmp_path / "tok105", [100, 17, 50])
    assert len(TokenData(paths, 16).train) == 2
    with pytest.raises(UserError, match=r"max_seq_len = 17 needs 18 tokens, but .* has 17"):
        TokenData(paths, 17)
    with pytest.raises(UserError, match="vocab_size = 105: expected 512, the size of"):
        TokenData(paths, 16, tokenizers[512])
    fake_shards(tmp_path / "tok80", [100, 100])
    with pytest.raises(UserError, match="has token 99: expected ids below vocab_size = 80"):
        TokenData(DataPaths(tmp_path, "custom", 80), 16)
    (tmp_path / "tok105" / "data01.bin").write_bytes(b"odd")
    with pytest.raises(UserError, match=r"data01.bin is damaged: its size is wrong; run: python"):
        TokenData(paths, 16)


def test_sidecars_that_do_not_fit_are_refused(folder, tokenizers):
    assert pretokenize(folder).returncode == 0
    paths, sidecar = DataPaths(folder, "custom", 512), folder / "tok512" / "shards.json"
    meta = json.loads(sidecar.read_text())
    TokenData(paths, 16, tokenizers[512])
    with pytest.raises(UserError, match="vocab_size = 300: expected 512, as in the shards of"):
        other = DataPaths(folder, "custom", 300)
        other.shards = paths.shards
        TokenData(other, 16)
    shard = folder / "tok512" / "data_00002_0000.bin"
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(
        UserError, match=r"data_00002_0000.bin is damaged: its checksum is wrong; run: python"
    ):
        TokenData(paths, 16)
    shard.write_bytes(whole + b"xx")
    with pytest.raises(UserError, match=r"data_00002_0000.bin is damaged: its size is wrong"):
        TokenData(paths, 16)
    shard.unlink()
    with pytest.raises(UserError, match=r"data_00002_0000.bin does not exist; run: python"):
        TokenData(paths, 16)
    sidecar.write_text(json.dumps({**meta, "tokenizer_hash": "0"}))
    with pytest.raises(UserError, match="was made with a tokenizer other than"):
        TokenData(paths, 16, tokenizers[512])
    shard = {**meta["shards"][0], "name": "../data00.bin"}
    escaping = json.dumps({**meta, "shards": [shard, *meta["shards"][1:]]})
    for text in ("{", "[]", "{}", '{"format": 1}', escaping):
        sidecar.write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            TokenData(paths, 16)


def test_wide_vocabularies_use_uint32(tmp_path):
    folder = tmp_path / "tok70000"
    folder.mkdir()
    shards = []
    for i in range(2):
        np.arange(69_000, 69_100, dtype="<u4").tofile(folder / f"data0{i}.bin")
        about = {"tokens": 100, "bytes": 300, "documents": 1, "source": []}
        shards.append({"name": f"data0{i}.bin", **about})
    meta = {
        "format": 1,
        "vocab_size": 70_000,
        "dtype": "uint32",
        "tokenizer_hash": "",
        "shards": shards,
    }
    (folder / "shards.json").write_text(json.dumps({**meta, "complete": True}))
    data = TokenData(DataPaths(tmp_path, "custom", 70_000), 16)
    assert data.train[0][0] == 69_000 and data.tokens_per_byte() == pytest.approx(1 / 3)


def test_shards_in_a_subfolder_are_suggested(tmp_path):
    """Such as the shards of `make story`."""
    (tmp_path / "my practice" / "tok300").mkdir(parents=True)
    (tmp_path / "my practice" / "tok300" / "shards.json").write_text("{}")
    hint = f"; or use existing shards with --data_dir='{tmp_path}/my practice'"
    args = ["--vocab_size=300", f"--data_dir={tmp_path}"]
    refused(script("train.py", *args, f"--out_dir={tmp_path / 'out'}", "--device=cpu"), hint)
    base = f"--base={' '.join(args)} --batch_size=4"
    done = script("sweep.py", base, "--grid=hidden_lr=0.1", "--seeds=1", "--eval_windows=400")
    refused(done, "this sweep needs shards that do not exist", f"{hint} in --base")
