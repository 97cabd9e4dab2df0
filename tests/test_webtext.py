"""webtext.py: every source, interruptions, several machines, and a split that leaks nothing."""

import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import REPO, refused, script
from local_hub import Hub

from bpe import BPETokenizer, train_bpe
from configurator import UserError
from dataset import DataPaths, TokenData
from formats.hftokenizer import byte_level_from_json, byte_level_json
from text.documents import stream_documents
from tokenizer import ByteLevel

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")

TEXTS = [f"Page {i}: " + "the web has words. " * (i % 9) + f"é\nEnd of {i}." for i in range(3000)]
SIZE = 300
BOS = "<|endoftext|>"


def parquet_of(texts, path):
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path)


def as_file(texts, ending):
    """Return texts as the bytes of a file with one of the supported endings."""
    ending = ending.lower()
    if ending == ".parquet":
        sink = pa.BufferOutputStream()
        parquet_of(texts, sink)
        return sink.getvalue().to_pybytes()
    if ending.endswith(".gz"):
        return gzip.compress(as_file(texts, ending.removesuffix(".gz")))
    if ending == ".txt":
        return BOS.join(texts).encode()
    if ending == ".json":
        return json.dumps([{"text": text} for text in texts]).encode()
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


ENDINGS = [".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz", ".parquet"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Train byte-level BPE on the texts and return the path of bpe300.model."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "all.txt").write_text(BOS.join(TEXTS))
    vocab, merges = train_bpe(folder / "all.txt", SIZE, [BOS])
    BPETokenizer(vocab, merges, [BOS]).save(folder / f"bpe{SIZE}.model")
    return folder / f"bpe{SIZE}.model"


@pytest.fixture
def data(tmp_path, model):
    """Return a data folder with the tokenizer in it."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / model.name).write_bytes(model.read_bytes())
    return folder


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


def webtext(stage, source, data_dir, *args, **options):
    flags = [f"--source={source}", f"--data_dir={data_dir}", f"--vocab_size={SIZE}", *args]
    return script("webtext.py", stage, *flags, **options)


def documents_in(data_dir, side=""):
    """Return the texts of the training shards, or with side "valid" of the validation shard."""
    paths = DataPaths(str(data_dir), "bpe", SIZE)
    tokenizer = ByteLevel(paths.tokenizer_model)
    token_data = TokenData(paths, 16, tokenizer)
    texts = []
    for ids in token_data.valid if side == "valid" else token_data.train:
        at = np.flatnonzero(ids == tokenizer.bos_id)
        assert at[0] == 0
        texts += [tokenizer.decode(part.tolist()) for part in np.split(ids, at[1:])]
    return texts


def check_whole(data_dir, texts=TEXTS):
    """Check that every document is in the shards exactly once; return (train, valid)."""
    train, valid = documents_in(data_dir), documents_in(data_dir, "valid")
    assert sorted(train + valid) == sorted(texts)
    assert 0.05 < len(valid) / len(texts) < 0.15
    return train, valid


@pytest.mark.slow
@pytest.mark.parametrize("ending", [*ENDINGS, ".JSONL", ".TXT.GZ"])
def test_files_of_every_format_become_the_same_shards(ending, tmp_path, data):
    path = tmp_path / f"a{ending}"
    path.write_bytes(as_file(TEXTS, ending))
    assert [text for text, _ in stream_documents(str(path))] == TEXTS
    done = webtext("prepare", path, data)
    assert done.returncode == 0, done.stderr
    train, _ = check_whole(data)
    assert train == [text for text in TEXTS if text in set(train)]  # in their order
    meta = json.loads((data / f"bpe{SIZE}" / "shards.json").read_text())
    assert sum(shard["bytes"] for shard in meta["shards"]) == sum(len(t.encode()) for t in TEXTS)


def test_all_copies_of_a_document_are_on_the_same_side(tmp_path, data, model):
    folder = tmp_path / "many"
    folder.mkdir()
    for i, ending in enumerate(ENDINGS):  # each file has every document
        (folder / f"{i}{ending}").write_bytes(as_file(TEXTS[::-1] if i % 2 else TEXTS, ending))
    done = webtext("prepare", folder, data)
    assert done.returncode == 0, done.stderr
    train, valid = documents_in(data), documents_in(data, "valid")
    assert not set(train) & set(valid)
    assert sorted(train + valid) == sorted(TEXTS * len(ENDINGS))


@pytest.mark.slow
def test_several_machines_make_the_same_shards_as_one(tmp_path, data, model, monkeypatch):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(as_file(TEXTS, ".txt.gz"))
    small = {**os.environ, "PYTHONPATH": str(tmp_path)}
    # a small PIECE, so that one file has many pieces
    (tmp_path / "small.py").write_text(
        "import runpy, sys\nfrom text import pieces\npieces.PIECE = 20000\n"
        "if __name__ == '__main__':  # workers import this file\n"
        "    del sys.argv[0]\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = [f"--source={path}", f"--vocab_size={SIZE}", "--num_workers=1"]

    def call(stage, folder, *args):
        command = [sys.executable, tmp_path / "small.py", REPO / "webtext.py", stage]
        small["PYTHONPATH"] = str(REPO)
        args = [*flags, f"--data_dir={folder}", *args]
        return subprocess.run([*command, *args], capture_output=True, text=True, env=small)

    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / model.name).write_bytes(model.read_bytes())
    assert call("prepare", data).returncode == 0
    refused(call("merge", shared, "--shards=3"), "0_of_3.json does not exist; prepare the missing")
    for i in range(3):
        done = call("prepare", shared, f"--shard={i}/3")
        assert done.returncode == 0, done.stderr
        assert "webtext.py merge" in done.stdout
        if i == 1:
            expected = "2_of_3.json does not exist; prepare the missing parts (found: 0_of_3.json,"
            refused(call("merge", shared, "--shards=3"), expected)
    assert not (shared / f"bpe{SIZE}" / "shards.json").exists()
    done = call("merge", shared, "--shards=3")
    assert done.returncode == 0, done.stderr
    one, three = (sorted((f / f"bpe{SIZE}").glob("data*.bin")) for f in (data, shared))
    assert [path.name for path in one] == [path.name for path in three]
    assert len(one) > 10
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, three, strict=True))
    check_whole(shared)


def test_validation_documents_are_left_out_of_training(tmp_path, data):
    (tmp_path / "train.jsonl").write_bytes(as_file(TEXTS, ".jsonl"))
    (tmp_path / "valid.txt.gz").write_bytes(as_file(TEXTS[100:300], ".txt.gz"))
    args = [f"--valid_source={tmp_path / 'valid.txt.gz'}"]
    done = webtext("prepare", tmp_path / "train.jsonl", data, *args)
    assert done.returncode == 0, done.stderr
    assert "left out 200 training documents that are in the validation text" in done.stdout
    assert documents_in(data, "valid") == TEXTS[100:300]
    assert documents_in(data) == TEXTS[:100] + TEXTS[300:]


# ---- Hugging Face datasets


def fineweb(hub, name):
    thirds = [as_file(TEXTS[i::3], ".parquet") for i in range(3)]
    hub.models[f"datasets/HuggingFaceFW/{name}"] = {
        "README.md": b"#",
        "data/CC-MAIN/000_00000.parquet": b"no",
        **{f"sample/10BT/00{i}_00000.parquet": data for i, data in enumerate(thirds)},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fineweb", "fineweb-edu"])
def test_fineweb_is_read_file_by_file_and_a_second_command_continues(hub, data, name):
    fineweb(hub, name)
    first = "sample/10BT/000_00000.parquet"
    hub.broken[first] = 1000  # the connection breaks once
    args = [f"--endpoint={hub.url}"]
    done = webtext("prepare", name, data, *args, "--n_files=1")
    assert done.returncode == 0, done.stderr
    assert [file for file, _ in hub.sent] == [first, first]
    assert not (data / "raw").exists()
    assert len(documents_in(data)) + len(documents_in(data, "valid")) == 1000
    hub.sent.clear()
    done = webtext("prepare", name, data, *args)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 files to read" in done.stdout
    assert {file for file, _ in hub.sent} == {f"sample/10BT/00{i}_00000.parquet" for i in (1, 2)}
    check_whole(data)


def test_vocabulary_and_shards_of_openwebtext(hub, tmp_path):
    hub.models["datasets/stanford-cs336/owt-sample"] = {
        "owt_train.txt.gz": as_file(TEXTS, ".txt.gz"),
        "owt_valid.txt.gz": as_file(TEXTS[:200], ".txt.gz"),
    }
    folder = tmp_path / "owt"
    args = [f"--endpoint={hub.url}"]
    done = webtext("train_vocab", "openwebtext", folder, *args)
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("*.part*"))
    hub.sent.clear()
    done = webtext("prepare", "openwebtext", folder, *args)
    assert done.returncode == 0, done.stderr
    assert hub.sent == []  # train_vocab has downloaded both
    assert documents_in(folder, "valid") == TEXTS[:200]
    assert documents_in(folder) == TEXTS[200:]


def test_any_hugging_face_dataset_can_be_prepared(hub, data):
    hub.models["datasets/me/mine"] = {"a/x.jsonl.gz": as_file(TEXTS, ".jsonl.gz"), "b/y.txt": b"y"}
    done = webtext("prepare", "hf:me/mine", data, f"--endpoint={hub.url}", "--folder=a")
    assert done.returncode == 0, done.stderr
    check_whole(data)


def smol_tokenizer(texts, folder):
    """Return a tokenizer like that of smol-llama's notebook: three special tokens, then bytes."""
    (folder / "t.txt").write_text(BOS.join(texts))
    vocab, merges = train_bpe(folder / "t.txt", SIZE - 2, [BOS])
    special = [BOS, "<pad>", "<s>"]
    tokens = [token.encode() for token in special]
    tokens += [vocab[i] for i in sorted(vocab) if vocab[i] != BOS.encode()]
    return BPETokenizer(dict(enumerate(tokens)), merges, special)


def test_ready_made_tokens_become_shards_with_their_tokenizer(hub, tmp_path):
    bpe = smol_tokenizer(TEXTS, tmp_path)
    ids = [i for text in TEXTS * 4 for i in [*bpe.encode(text), 0]]
    cut = len(ids) * 9 // 10
    train, valid = np.array(ids[:cut], "<u2"), np.array(ids[cut:], "<u2")
    assert valid[0] != 0
    hub.models["datasets/weights-and-wires/fineweb-6b"] = {
        "tokenized/train.bin": train.tobytes(),
        "tokenized/val.bin": valid.tobytes(),
        "tokenizer.json": json.dumps(byte_level_json(bpe)).encode(),
    }
    hub.broken["tokenized/train.bin"] = 280_001
    folder = tmp_path / "smol"
    (folder / f"bpe{SIZE}").mkdir(parents=True)
    (folder / f"bpe{SIZE}" / "data00.bin").write_bytes(b"of another source")
    args = [f"--endpoint={hub.url}"]
    done = webtext("prepare", "fineweb-6b", folder, *args)
    assert done.returncode == 0, done.stderr
    assert any(start > 0 for name, start in hub.sent if name == "tokenized/train.bin")
    tokenizer = ByteLevel(folder / f"bpe{SIZE}.model")
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (0, SIZE)
    assert tokenizer.encode("Page 7: <s>", bos=False) == bpe.encode("Page 7: <s>")
    token_data = TokenData(DataPaths(str(folder), "bpe", SIZE), 16, tokenizer)
    assert np.array_equal(token_data.train[0], train)
    first = int(np.flatnonzero(valid == 0)[0])  # earlier ids end a document of the training ids
    assert np.array_equal(token_data.valid[0], valid[first:])
    assert token_data.valid_bytes == len(tokenizer.decode(valid[first:].tolist()).encode())
    again = webtext("prepare", "fineweb-6b", folder, *args)
    assert again.returncode == 0 and "data01.bin already exists" in again.stdout


@pytest.mark.slow
def test_a_tokenizer_json_with_unsupported_features_is_refused(tmp_path):
    bpe = smol_tokenizer(TEXTS, tmp_path)
    path = tmp_path / "tokenizer.json"
    good = byte_level_json(bpe)
    path.write_text(json.dumps(good))
    text = "Page 7: words,  <s>\n\n é"
    assert byte_level_from_json(path).encode(text) == bpe.encode(text)
    digits = {"type": "Digits", "individual_digits": True}
    for change in (
        {"normalizer": {"type": "NFC"}},
        {"model": {**good["model"], "byte_fallback": True}},
        {"model": {**good["model"], "type": "Unigram"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, good["pre_tokenizer"]]}},
        {"pre_tokenizer": {**good["pre_tokenizer"], "add_prefix_space": True}},
        {"added_tokens": [{**good["added_tokens"][0], "lstrip": True}]},
        {"model": {}},
    ):
        path.write_text(json.dumps({**good, **change}))
        done = script("bpe.py", "import", f"--tokenizer_json={path}", f"--model={tmp_path / 'm'}")
        refused(done, "tokenizer.json", "byte-level BPE")
        assert not (tmp_path / "m").exists()


# ---- interruptions


@pytest.mark.slow
def test_after_being_killed_prepare_continues_at_the_shard(tmp_path, data):
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt.gz").write_bytes(as_file(TEXTS[i::40] * 40, ".txt.gz"))
    flags = [f"--source={folder}", f"--data_dir={data}", f"--vocab_size={SIZE}", "--encoder=own"]
    flags.append("--num_workers=1")
    command = [sys.executable, REPO / "webtext.py", "prepare", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = data / f"bpe{SIZE}" / "parts" / "0_of_1.json"
    for _ in range(2000):
        time.sleep(0.01)
        if part.exists() and len(json.loads(part.read_text())["finished"]) >= 3:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_done = len(json.loads(part.read_text())["finished"])
    assert 3 <= n_done < 40, "too fast to be killed in between"
    kept = sorted((data / f"bpe{SIZE}").glob("data_*.bin"))[0]
    before = kept.stat().st_mtime_ns
    (kept.parent / "data_00001_0000.bin").write_bytes(b"damaged")
    done = script("webtext.py", "prepare", *flags)
    assert done.returncode == 0, done.stderr
    assert f"{41 - n_done} of 40 files to read" in done.stdout
    assert kept.stat().st_mtime_ns == before
    train, valid = documents_in(data), documents_in(data, "valid")
    assert sorted(train + valid) == sorted(TEXTS * 40)
    assert not list(kept.parent.rglob("*.part"))


def test_another_split_starts_from_scratch(tmp_path, data):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_file(TEXTS, ".jsonl"))
    assert webtext("prepare", path, data).returncode == 0
    assert "0 of 1 files to read" in webtext("prepare", path, data).stdout
    done = webtext("prepare", path, data, "--valid_frac=0.3")
    assert "1 of 1 files to read" in done.stdout
    assert 700 < len(documents_in(data, "valid")) < 1100


def test_a_changed_validation_file_does_not_leak_into_training(tmp_path, data):
    train, valid = tmp_path / "train.jsonl", tmp_path / "valid.txt"
    train.write_bytes(as_file(TEXTS, ".jsonl"))
    for part in (TEXTS[100:300], TEXTS[1000:1300]):
        valid.write_bytes(as_file(part, ".txt"))
        done = webtext("prepare", train, data, f"--valid_source={valid}")
        assert done.returncode == 0, done.stderr
        assert documents_in(data, "valid") == part
        assert not set(documents_in(data)) & set(part)


@pytest.mark.slow
def test_another_number_of_files_neither_repeats_nor_loses_a_document(tmp_path, data):
    folder = tmp_path / "eight"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.jsonl").write_bytes(as_file(TEXTS[i::8], ".jsonl"))
    for n_files in (8, 2, 0):  # with two files, four machines share the pieces of a file
        args = [f"--n_files={n_files}"]
        for i in range(4):
            assert webtext("prepare", folder, data, *args, f"--shard={i}/4").returncode == 0
            if n_files == 2 and i == 0:
                done = webtext("merge", folder, data, *args, "--shards=4")
                refused(done, "differ in ", ": prepare one of them again")
        assert webtext("merge", folder, data, *args, "--shards=4").returncode == 0
        expected = [text for i in range(n_files or 8) for text in TEXTS[i::8]]
        check_whole(data, expected)


@pytest.mark.slow
def test_damaged_parts_are_prepared_again_and_not_merged(tmp_path, data):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_file(TEXTS, ".jsonl"))
    part = data / f"bpe{SIZE}" / "parts" / "0_of_1.json"
    assert webtext("prepare", path, data).returncode == 0
    good = json.loads(part.read_text())
    twice = {**good, "pieces": {"0": good["pieces"]["0"] * 2}}
    names = ("files", "pieces", "dtype", "vocab_size")
    fewer = [{k: v for k, v in good.items() if k != name} for name in names]
    for bad in ("{", "[]", json.dumps(twice), *map(json.dumps, fewer)):
        part.write_text(bad)
        refused(webtext("merge", path, data))
        part.write_text(bad)
        done = webtext("prepare", path, data)
        assert done.returncode == 0, done.stderr
        check_whole(data)


def test_files_of_others_are_left_alone(tmp_path, data):
    for name in ("raw", "downloads"):
        (data / name).mkdir()
        (data / name / "mine.html").write_text("mine")
    (data / "a.txt").write_bytes(as_file(TEXTS, ".txt"))
    assert webtext("prepare", data, data).returncode == 0
    check_whole(data)
    assert all((data / name / "mine.html").read_text() == "mine" for name in ("raw", "downloads"))


def test_small_files_are_trained_on_if_they_have_a_window(tmp_path, data):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(30):
        n = 200 if i == 7 else 3
        (folder / f"{i:02}.txt").write_bytes(as_file(TEXTS[50 * i : 50 * i + n], ".txt"))
    assert webtext("prepare", folder, data, "--valid_frac=0.3").returncode == 0
    token_data = TokenData(DataPaths(str(data), "bpe", SIZE), 1024)
    assert len(token_data.train) == 1 and len(token_data.train[0]) > 1024
    assert len(TokenData(DataPaths(str(data), "bpe", SIZE), 16).train) > 20
    with pytest.raises(UserError, match="max_seq_len = 100000 needs 100001 tokens"):
        TokenData(DataPaths(str(data), "bpe", SIZE), 100_000)


@pytest.mark.slow
def test_the_shards_of_another_source_are_not_replaced(tmp_path, data):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path in (first, second):
        path.write_bytes(as_file(TEXTS, ".jsonl"))
    assert webtext("prepare", first, data).returncode == 0
    for stage in ("prepare", "train_vocab"):
        expected = f"already exists and has the shards of {first}; choose another --data_dir"
        refused(webtext(stage, second, data), expected)
    check_whole(data)
    lock = open(data / f"bpe{SIZE}" / "parts" / "0_of_1.json.lock", "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    refused(webtext("prepare", first, data), "another process is writing")
    lock.close()
    assert webtext("prepare", first, data).returncode == 0


# ---- bad input


@pytest.mark.slow
def test_bad_input_is_refused_with_one_sentence(tmp_path, data, hub):
    good = tmp_path / "good.txt"
    good.write_bytes(as_file(TEXTS, ".txt"))
    whole = as_file(TEXTS, ".txt.gz")
    files = {
        "cut.txt.gz": whole[: len(whole) // 2],
        "no.txt.gz": b"hello",
        "cut.parquet": as_file(TEXTS, ".parquet")[:-100],
        "latin.txt": "é".encode("latin-1") * 100,
        "bad.jsonl": b'{"text": "a"}\n{"text": \n',
        "field.jsonl": b'{"content": "a"}\n',
        "one.txt": b"a single document",
        "white.txt": b"  <|endoftext|> \n ",
        "deep.jsonl": b'{"text": ' + b"[" * 100_000,
        "x.pdf": b"%PDF",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "field.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "number.parquet")
    for name, part in (
        ("cut.txt.gz", "cut.txt.gz is damaged: "),
        ("no.txt.gz", "no.txt.gz is damaged: "),
        ("cut.parquet", "is damaged or not a parquet file"),
        ("latin.txt", "not UTF-8"),
        ("bad.jsonl", "bad.jsonl, line 2 is not JSON"),
        ("deep.jsonl", "not JSON"),
        ("number.parquet", "is of type int64: expected string"),
        ("field.jsonl", "text in a field story or text"),
        ("field.parquet", "but it has content"),
        ("one.txt", "expected several documents"),
        ("white.txt", "contains only white space: nothing to train on"),
        ("x.pdf", "expected a file or a folder of files ending in .txt"),
        ("missing", "does not exist; pass fineweb-6b"),
    ):
        refused(webtext("prepare", tmp_path / name, data), part)
        assert not (data / f"bpe{SIZE}" / "shards.json").exists(), name
    for args, part in (
        (["--shard=3/3"], "i from 0 to n - 1"),
        (["--shard=x"], "i from 0 to n - 1"),
        (["--shards=4"], "--shards cannot be used with prepare: use it with merge"),
        (["--valid_frac=1.5"], "valid_frac = 1.5: expected at least 0 and less than 1"),
        (["--n_files=-1"], "0 (all) or more"),
        (["--encoder=fast"], "encoder = 'fast': expected one of auto"),
        (["--vocab_size=999"], "or run: python webtext.py train_vocab"),
    ):
        refused(webtext("prepare", good, data, *args), part)
    refused(webtext("prepare", "fineweb", data, f"--endpoint={hub.url}"), "cannot list")
    refused(webtext("prepare", "hf:a", data), "expected hf:user/name")
    refused(webtext("prepare", "hf:a/b", data, "--endpoint=http://127.0.0.1:9"), "cannot list")
    refused(webtext("merge", "fineweb-6b", data), "already tokenized")
    refused(webtext("prepare", "fineweb-6b", data, "--shard=0/2"), "already tokenized")
    refused(script("webtext.py", "prepare"), "--source=NAME is missing: pass fineweb-6b")
    refused(script("webtext.py", "prepar", "--source=x"), "stage = 'prepar': expected one of train")
    (tmp_path / "two.txt").write_bytes(as_file(TEXTS[:2], ".txt"))
    few = webtext("train_vocab", tmp_path / "two.txt", tmp_path / "few")
    refused(few, "this text yields only", "use more text or a smaller --vocab_size")
