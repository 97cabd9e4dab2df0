"""Text and shards that change while being read, expand too far, or are damaged."""

import contextlib
import gzip
import io
import json
import os
import random
import shutil
import threading
import time
import tracemalloc

import numpy as np
import pytest
from conftest import refused, train

import bpe
from configurator import UserError
from dataset import DataPaths, TokenData, TrainBatches, ValidBatches
from system.files import read_json
from text import documents
from text.corpus import plan_shards, text_files, whole_file
from text.documents import items_of, stream_documents
from text.pieces import merge
from text.shards import (
    choose_split,
    finish,
    read_sidecar,
    training_documents,
    write_npy,
    write_shards,
)
from tokenizer import open_tokenizer, sentencepiece_model

STORIES = [f"Story {i}: " + "Ben ran. " * (i % 7) + "é The end." for i in range(400)]
MARKED = "<|endoftext|>".join(STORIES).encode()
LINES = "".join(json.dumps({"text": text}) + "\n" for text in STORIES).encode()


def cut_short(path):
    os.truncate(path, os.path.getsize(path) // 2)


def appended(path):
    with open(path, "ab") as f:
        f.write(LINES[:100])


CHANGES = {"cut": cut_short, "grown": appended}


# ---- text


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name, data", [("a.txt", MARKED), ("a.jsonl", LINES)])
def test_text_that_changes_is_reported_and_its_shards_stay_incomplete(
    tmp_path, tokenizers, name, data, change
):
    path = tmp_path / name
    path.write_bytes(data)
    files = plan_shards(str(path))
    split, folder = choose_split(files), tmp_path / "shards"
    write_shards(str(folder), tokenizers[512], files, split, 1, {})
    os.remove(folder / "data00.bin")  # so that all of it is done again
    (folder / "parts" / "0_of_1.json").write_text("{}")
    CHANGES[change](path)
    with pytest.raises(UserError, match=rf"{name} was changed while it was being read"):
        write_shards(str(folder), tokenizers[512], files, split, 1, {})
    assert not read_sidecar(str(folder))["complete"]
    with pytest.raises(UserError, match=rf"{name} was changed while it was being read"):
        list(training_documents(files, split, 500))


def test_a_compressed_file_that_changes_is_reported(tmp_path, tokenizers):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES))
    files = plan_shards(str(path))
    split = choose_split(files)
    path.write_bytes(gzip.compress(LINES[: LINES.index(b"Story 100:") - 10]))
    with pytest.raises(UserError, match=r"a.jsonl.gz was changed while it was being read"):
        write_shards(str(tmp_path / "shards"), tokenizers[512], files, split, 1, {})
    assert read_sidecar(str(tmp_path / "shards")) is None


@pytest.mark.parametrize("change", ["cut", "grown"])
def test_bpe_reports_text_that_changes(tmp_path, tokenizers, monkeypatch, change):
    path = tmp_path / "a.txt"
    path.write_bytes(MARKED)
    all_pieces = bpe.all_pieces

    def cut_then_change(*args):
        pieces = all_pieces(*args)
        CHANGES[change](path)
        return pieces

    monkeypatch.setattr(bpe, "all_pieces", cut_then_change)
    with pytest.raises(UserError, match=r"a.txt was changed"):
        bpe.train_bpe(path, 300)
    path.write_bytes(MARKED)
    spans, encode = [whole_file(str(path))], tokenizers["gpt2"].encoder
    monkeypatch.setattr(
        tokenizers["gpt2"], "encoder", lambda name: (CHANGES[change](path), encode(name))[1]
    )
    with pytest.raises(UserError, match=r"a.txt was changed"):
        write_npy(str(tmp_path / "a.npy"), tokenizers["gpt2"], spans, 1)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_source_may_be_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.txt")
    with pytest.raises(UserError, match="is a pipe or a device"):
        text_files("pipe.txt")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(MARKED)
    assert text_files("texts/a.txt") == text_files("texts") == ["texts/a.txt"]


# ---- text that takes too much memory


class InSteps(io.BytesIO):
    """A file that returns a few bytes at a time."""

    def read(self, size=-1):
        return super().read(min(size, 3) if size >= 0 else -1)


def test_json_lists_are_read_item_by_item_with_the_same_result():
    numbers = random.Random(0)
    for _ in range(300):
        choices = ["é, ]", "\\", '"', {"text": "x", "a": [1, []]}, None, 12, -0.5, [], {}, True]
        items = [numbers.choice(choices) for _ in range(numbers.randrange(5))]
        text = json.dumps(items, indent=numbers.choice([None, 1]), ensure_ascii=False)
        assert list(items_of(InSteps(f" {text}\n ".encode()), "a.json")) == items
        for damaged in (text[:-1], f"{text}x", text.replace("[", "[,", 1), f"{text[:-1]},]"):
            with pytest.raises(UserError, match="is not JSON"):
                list(items_of(InSteps(damaged.encode()), "a.json"))


def test_memory_depends_on_the_documents_and_not_on_their_list(tmp_path):
    story = json.dumps({"text": "Ben ran. " * 1000})
    with gzip.open(tmp_path / "a.json.gz", "wt", 1) as f:
        f.write("[" + f"{story}," * 3000 + f"{story}]")  # 27 MB
    tracemalloc.start()
    assert sum(1 for _ in stream_documents(tmp_path / "a.json.gz")) == 3001
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


def test_long_records_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_RECORD", 1 << 18)
    long = json.dumps({"text": "a" * (1 << 19)})
    for name, text, where in (
        ("a.json", f'[{{"text": "x"}}, {long}]', "item 1 of"),
        ("a.jsonl", f'{{"text": "x"}}\n{long}\n', "line 2 is longer than"),
        ("a.csv", "id,text\n" + "1,x\n" * 200_000 + "1," * (1 << 18), "a row of"),
        ("a.csv", "id,text\n" + '"\n",' * (1 << 17), "a row of"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=where):
            list(stream_documents(tmp_path / name))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz", "a.json.gz", "a.parquet"])
def test_files_that_expand_too_far_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "LARGE", 1 << 18)
    data = {
        "a.txt.gz": b"a <|endoftext|>" * 100_000,
        "a.jsonl.gz": b"\n" * (1 << 20),
        "a.csv.gz": b"text\n" + b"a\n" * (1 << 19),
        "a.json.gz": b'[{"text": "a"}' + b',{"text": "a"}' * 50_000 + b"]",
    }
    if name == "a.parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        before = pyarrow.total_allocated_bytes()
        texts = pyarrow.array(["ab " * 30_000] * 1000).dictionary_encode()
        parquet.write_table(pyarrow.table({"text": texts}), tmp_path / name, compression="zstd")
        del texts
        stream = stream_documents(tmp_path / name)
        next(stream)
        assert pyarrow.total_allocated_bytes() - before < 4e6  # less than 1,000 times the text
    else:
        (tmp_path / name).write_bytes(gzip.compress(data[name]))
        stream = stream_documents(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} unpacks to more than 200 times its size"):
        list(stream)


# ---- hostile JSON and damaged models


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "9" * 5000], ids=len)
def test_json_with_deep_nesting_or_huge_numbers_is_refused(tmp_path, text):
    from formats.hftokenizer import byte_level_from_json

    path, parts = tmp_path / "shards.json", tmp_path / "parts"
    parts.mkdir()
    for file in (path, parts / "0_of_1.json", tmp_path / "a.json"):
        file.write_text(text)
    (tmp_path / "b.json").write_text('[{"text": "a", "b": ' + text)
    (tmp_path / "c.jsonl").write_text('{"text": "a", "b": ' + text + "}\n")
    (tmp_path / "merges.txt").write_text("")
    for read in (
        lambda: read_json(path),
        lambda: read_sidecar(str(tmp_path)),
        lambda: merge(str(tmp_path), 1),
        lambda: list(stream_documents(tmp_path / "b.json")),
        lambda: list(stream_documents(tmp_path / "c.jsonl")),
        lambda: bpe.BPETokenizer.load(path),
        lambda: bpe.BPETokenizer.from_files(path, tmp_path / "merges.txt"),
        lambda: byte_level_from_json(path),
        lambda: open_tokenizer(path),
    ):
        with pytest.raises(UserError, match=r"not JSON|is damaged|is not a"):
            read()


def test_a_sentencepiece_model_with_pieces_that_are_not_utf8_is_refused(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "abc", "xyz"]
    types = [2, 3, 3, *[6] * 256, 1, 1]
    model = sentencepiece_model(pieces, [0.0] * len(pieces), types)
    (tmp_path / "bad.model").write_bytes(model.replace(b"abc", b"a\xffc"))
    with pytest.raises(UserError, match=r"bad.model is not a tokenizer model"):
        open_tokenizer(tmp_path / "bad.model")


# ---- shards


@pytest.fixture
def shards(tmp_path, tokenizers):
    """Return (DataPaths, TokenData) of shards of STORIES."""
    (tmp_path / "a.txt").write_bytes(MARKED)
    files = plan_shards(str(tmp_path / "a.txt"))
    split = choose_split(files)
    about = {"made_by": "make shards"}
    write_shards(str(tmp_path / "tok512"), tokenizers[512], files, split, 1, about)
    paths = DataPaths(tmp_path, "custom", 512)
    return paths, TokenData(paths, 16)


def other_ids(path):
    ids = np.fromfile(path, "<u2")
    ids[:] = 7
    ids.tofile(path)


def large_ids(path):
    ids = np.fromfile(path, "<u2")
    ids[::2] = 600
    ids.tofile(path)


@pytest.mark.parametrize("change", [cut_short, appended, os.remove, other_ids, large_ids])
@pytest.mark.parametrize("number", [0, 2])
def test_shards_that_change_are_noticed(shards, change, number):
    data = shards[1]
    path = data.shards[number].filename
    batches = TrainBatches(data.train, 16, 1, data)
    time.sleep(0.01)  # a clock may have steps of 4 ms
    change(path)
    with pytest.raises(UserError, match=rf"{os.path.basename(path)} was changed or removed"):
        data.check_unchanged()
    if number:
        with pytest.raises(UserError, match=r"or removed while in use; run: make shards"):
            batches.at(0, batches.n_windows)


def test_ids_outside_the_vocabulary_are_noticed_even_if_the_time_is_kept(shards):
    data = shards[1]
    info = os.stat(data.shards[1].filename)
    large_ids(data.shards[1].filename)
    os.utime(data.shards[1].filename, ns=(info.st_atime_ns, info.st_mtime_ns))
    batches = TrainBatches(data.train, 16, 1, data)
    with pytest.raises(UserError, match="now has token 600, expected ids below vocab_size = 512"):
        batches.at(0, batches.n_windows)


def test_shards_that_are_only_touched_are_accepted(shards):
    data = shards[1]
    for shard in data.shards:
        os.utime(shard.filename, (1e9, 1e9))
    data.check_unchanged()
    batches = TrainBatches(data.train, 16, 1, data)
    batches.at(0, batches.n_windows)


@pytest.mark.slow
@pytest.mark.parametrize("change", [cut_short, other_ids, large_ids])
def test_a_run_ends_with_one_sentence_and_its_checkpoint_if_shards_change(
    tmp_path, practice, change
):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(practice, data, ignore=shutil.ignore_patterns("TinyStories*"))
    done = []
    args = ["--max_iters=100000", "--eval_interval=20", "--compile=False"]
    thread = threading.Thread(target=lambda: done.append(train(data, out, *args)))
    thread.start()
    end = time.monotonic() + 60
    while not (out / "ckpt.pt").exists() and time.monotonic() < end:
        time.sleep(0.05)
    for path in (data / "tok300").glob("*.bin"):
        change(path)
    thread.join()
    refused(done[0], "was changed")
    assert (out / "ckpt.pt").exists()


# ---- mutated records of shards

ODD = [
    *(None, True, -1, 0, 1, 3, 2.5, 1e300, float("nan"), float("inf"), 10**30, 2**53 - 1),
    *("", "text", "..", "a\0b", "\ud800", "../data00.bin", [], [1, "a"], {}, {"0": {"b": []}}),
]


def places_in(value, path=()):
    """Yield the path of every value in parsed JSON."""
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, name)
        if isinstance(inner, (dict, list)):
            yield from places_in(inner, (*path, name))


def mutated(value, numbers):
    """Yield JSON, in bytes: with a field removed or of another type, cut off, or damaged."""
    text = json.dumps(value)
    for *path, name in list(places_in(value)):
        for odd in [*ODD, ...]:
            changed = outer = json.loads(text)
            for step in path:
                outer = outer[step]
            outer[name] = odd
            if odd is ...:
                del outer[name]
            yield json.dumps(changed).encode()
    for _ in range(100):
        yield text[: numbers.randrange(len(text))].encode()
        data = bytearray(text.encode())
        for _ in range(numbers.randrange(1, 4)):
            data[numbers.randrange(len(data))] = numbers.randrange(256)
        yield bytes(data)


@pytest.mark.slow
def test_no_mutated_sidecar_ends_in_a_traceback(shards, tokenizers):
    paths = shards[0]
    sidecar = os.path.join(paths.shards, "shards.json")
    meta = read_json(sidecar)
    meta["shards"] = meta["shards"][:3]
    n = n_read = 0
    for text in mutated(meta, random.Random(0)):
        with open(sidecar, "wb") as f:
            f.write(text)
        n += 1
        with contextlib.suppress(UserError):
            data = TokenData(paths, 16, tokenizers[512])
            batches = TrainBatches(data.train, 16, 1, data)
            batches.at(0, min(8, batches.n_windows))
            next(iter(ValidBatches(data.valid, 16, 4, 2)))
            assert data.tokens_per_byte() is None or data.tokens_per_byte() > 0
            data.check_unchanged()
            n_read += 1
    assert n >= 600 and n_read < n / 3  # only fields that nothing depends on may be wrong


@pytest.mark.slow
def test_no_mutated_part_ends_in_a_traceback(shards, tokenizers, tmp_path):
    folder, tokenizer = shards[0].shards, tokenizers[512]
    part = os.path.join(folder, "parts", "0_of_1.json")
    (tmp_path / "b.txt").write_bytes(MARKED[: len(MARKED) // 40])
    (tmp_path / "v.txt").write_bytes(MARKED[len(MARKED) // 2 : len(MARKED) // 2 + 2000])
    files = plan_shards(str(tmp_path / "b.txt"), str(tmp_path / "v.txt"))[:3]
    split = choose_split(files)
    write_shards(folder, tokenizer, files, split, 1, {})
    meta, n = read_json(part), 0
    arrays = {path: open(path, "rb").read() for path in arrays_of(folder)}  # noqa: SIM115
    for i, text in enumerate(mutated(meta, random.Random(0))):
        for path, data in arrays.items():
            if not os.path.exists(path):
                with open(path, "wb") as f:
                    f.write(data)
        with open(part, "wb") as f:
            f.write(text)
        n += 1
        with contextlib.suppress(UserError):
            finish(folder, 1, {})
            TokenData(shards[0], 16, tokenizer)
        if i % 10 == 0:  # preparing again repairs what is wrong
            with open(part, "wb") as f:
                f.write(text)
            write_shards(folder, tokenizer, files, split, 1, {})
            TokenData(shards[0], 16, tokenizer)
    assert n >= 600


def arrays_of(folder):
    names = [*os.listdir(folder), *(f"parts/{n}" for n in os.listdir(f"{folder}/parts"))]
    return [os.path.join(folder, name) for name in names if name.endswith(".bin")]


def test_a_sidecar_with_text_instead_of_numbers_is_refused(shards):
    sidecar = os.path.join(shards[0].shards, "shards.json")
    meta = read_json(sidecar)
    for name in ("tokens", "bytes", "crc32", "documents"):
        changed = json.loads(json.dumps(meta))
        changed["shards"][0][name] = str(changed["shards"][0][name])
        with open(sidecar, "w") as f:
            json.dump(changed, f)
        with pytest.raises(UserError, match="is damaged"):
            TokenData(shards[0], 16)


def test_a_part_with_too_many_pieces_is_refused_at_once(shards):
    part = os.path.join(shards[0].shards, "parts", "0_of_1.json")
    meta = read_json(part)
    meta["finished"]["0"] = 2**52
    with open(part, "w") as f:
        json.dump(meta, f)
    with pytest.raises(UserError, match=r"the parts in .* do not fit together"):
        merge(shards[0].shards, 1)
