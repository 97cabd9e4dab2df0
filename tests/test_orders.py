"""Stories to order: orders from any text, their shards, training, prompts and scores."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PATIENCE_S, REPO, compile_c, random_model, refused, script

from bpe import BPETokenizer
from dataset import STRESSED, DataPaths, TokenData, TrainBatches, ValidBatches
from formats.modelbin import export_model
from text.corpus import plan_shards
from text.orders import (
    FIELDS,
    Order,
    Orders,
    Told,
    Wanted,
    first_uses,
    forms,
    labeled,
    parse,
    problem_of,
    scores,
    scores_of_others,
    split_list,
)
from text.shards import document_key, encode_orders, mark_of_orders, without_marks
from tokenizer import byte_level_c_file

WHOLE = Order(("dragon", "soup"), ("Dialogue", "Twist"), "The soup was hot.", "A dragon cooks.")


def test_an_order_is_text_and_back_in_any_order_of_its_fields():
    story = "Once upon a time\nWords: were said.\n\nThe end."
    for seed in range(20):
        names = random.Random(seed).sample(list(FIELDS), len(FIELDS))
        assert parse(WHOLE.prompt(story, names)) == (WHOLE, story)
    assert WHOLE.prompt() == (
        "Words: dragon, soup\nFeatures: Dialogue, Twist\nRandom sentence: The soup was hot.\n"
        "Summary: A dragon cooks.\nStory:"
    )
    # as in TinyStories-Instruct: the story after blank lines, the summary before or after it
    text = "Words: a, b\nStory: \n\nOnce.\n\nThe end.\nSummary: Short."
    assert parse(text) == (Order(("a", "b"), summary="Short."), "Once.\n\nThe end.")
    for plain in ("Once upon a time", "Words: a and b", "Wordsworth: Story: x", ""):
        assert parse(plain) == (Order(), plain)
    assert document_key(text) == document_key("Once. The end.")


def test_orders_come_from_the_story_and_only_from_it(stories):
    orders = Orders(stories)
    again = Orders(stories)
    assert orders.key() == again.key() != Orders(stories[:100]).key()
    placed = [orders.place(story) for story in stories[:1000]]
    assert placed == [again.place(story) for story in stories[:1000]]
    with_order = [parse(f"{text} {story}") for text, story in placed if text]
    assert 0.6 < len(with_order) / len(placed) < 0.85
    pairs = [(order, Told(story)) for order, story in with_order]
    assert set(scores(pairs).values()) == {1.0}
    assert scores_of_others(pairs)["words"] < 0.5
    for name in ("words", "features", "sentence"):
        assert 0.1 < sum(bool(getattr(order, name)) for order, _ in with_order) / 1000 < 0.9
    names = {word for order, _ in with_order for word in order.words}
    assert not names & {"the", "and", "Tim", "tim", "lily"}
    # labels of a document are kept
    text = f"Features: Twist\nSummary: Short.\nStory: {stories[0]}"
    found = {parse(f"{orders.place(f'{text} {i}')[0]} x")[0].summary for i in range(40)}
    assert found == {"Short.", ""}


def test_content_words_are_asked_for():
    nouns = [f"{a}og" for a in "bcdefhjklmnp"]
    texts = [f"A {noun} met a {noun}, and the {noun} slept." for noun in nouns] * 20
    texts[::30] = [text.replace("slept", "such slept") for text in texts[::30]]
    assert set(Orders(texts).counts) == set(nouns)


def test_words_are_what_a_story_is_about_and_found_where_it_first_has_them():
    plain = ["A dog ran to a cat. The cat saw the dog run. The dog ran off."] * 60
    orders = Orders(plain + ["A dragon saw a dog. The dragon made soup, soup and soup."] * 6)
    story = "A dog saw a dragon. The dragon had soup. The soup was hot, dog!"
    assert orders.topics(story) == ["dragon", "soup"]
    story = "“Run to the big cats,” he said, running. The dragon’s run was hot. A cat sat."
    order = Order(("run", "cat", "big cat", "dragon", "soup"), ("Dialogue",), "A cat sat.")
    found = [story[start:end] for start, end in first_uses(order, story)]
    assert found == ["Run", "cat", "big cat", "dragon’s", "A cat sat.", "“"]
    assert not list(first_uses(Order(), story))


LABELED = [
    {
        "story": "Once a dragon cooked soup.",
        "instruction": {"words": ["dragon", "soup"], "features": ["Twist"]},
        "summary": "A dragon cooks.",
    },
    {
        "story": "A cat ran.",
        "instruction": "short",
        "summary": 5,
        "theme": ["a cat"],
        "topic": None,
    },
    {"story": "A dog ran.", "theme": "friendship", "style": "noir"},
    {"story": "The end."},
]
IN_ORDER = [
    "Words: dragon, soup\nFeatures: Twist\nSummary: A dragon cooks.\n"
    "Story: Once a dragon cooked soup.",
    "Words:\nSummary:\nFeatures: a cat\nStory: A cat ran.",
    "Features: friendship, noir\nStory: A dog ran.",
    "The end.",
]


@pytest.mark.parametrize("kind", ("json", "jsonl", "jsonl.gz", "parquet", "txt"))
def test_labels_of_datasets_become_orders(tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    lines = "\n".join(map(json.dumps, LABELED))
    if kind == "json":
        path.write_text(json.dumps(LABELED))
    elif kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "txt":
        path.write_text("<|endoftext|>".join(IN_ORDER))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow = pytest.importorskip("pyarrow")
        rows = [{k: v for k, v in item.items() if k in ("story", "style")} for item in LABELED]
        parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(
            [("story", pyarrow.string()), ("style", pyarrow.string())])), path)  # fmt: skip
    files = plan_shards(str(path))
    plain = [text for file in files for text in file.documents()]
    found = [text for file in files for text in file.labeled().documents()]
    if kind == "parquet":
        assert found[2] == "Features: noir\nStory: A dog ran."
        assert found[:2] == plain[:2]
    else:
        assert found == IN_ORDER
    if kind != "txt":
        assert plain == [item["story"] for item in LABELED]
    assert [document_key(x) for x in found] == [document_key(x["story"]) for x in LABELED]


MALFORMED = [
    {"story": "A cat ran away.", "instruction": "short", "summary": 5},
    {"story": "A cat sat.", "instruction": {"words": [1, "cat"], "features": None}},
    {"story": "Words: cat, dog"},
    {"story": "Words: cat\nStory:  \n"},
    {"story": "Features: Twist\nStory: A cow ran."},
]
WRONG = (
    "Words: Summary: Story: A cat ran away.” has nothing readable as Words",
    "Words: Story: A cat sat.” has nothing readable as Words",
    "Words: cat, dog” has no line Story:",
    "Words: cat Story:” has no story",
)


def test_malformed_orders_are_counted_and_named(stories):
    texts = [labeled(item["story"], item) for item in MALFORMED]
    found = [problem_of(text) for text in texts]
    assert found == [*(wrong.split("” ")[1] for wrong in WRONG), None]
    orders = Orders(stories)
    told = ["A cat ran away.", "A cat sat.", "", "", "A cow ran."]
    assert [orders.place(text)[1] for text in texts] == told
    assert not any(problem_of(labeled(item["story"], item)) for item in LABELED[2:])


def test_both_writers_write_the_same_orders_and_name_what_is_malformed(
    tmp_path, tokenizers, stories
):
    path, items = tmp_path / "stories.jsonl", [{"story": story} for story in stories[:300]]
    path.write_text("\n".join(map(json.dumps, MALFORMED + items)))
    shards = []
    for name, stage in (("tinystories.py", "pretokenize"), ("webtext.py", "prepare")):
        paths = DataPaths(str(tmp_path / stage), "bpe", 600)
        os.makedirs(paths.data_dir)
        shutil.copy(tokenizers["gpt2"].model_path, paths.tokenizer_model)
        flags = [f"--data_dir={paths.data_dir}", f"--source={path}", "--valid_frac=0.1"]
        flags += ["--vocab_source=bpe"] * (stage == "pretokenize") + ["--vocab_size=600"]
        done = script(name, stage, *flags, "--orders")
        assert not done.returncode, done.stderr
        assert "note: 4 documents with malformed orders" in done.stdout
        for wrong in WRONG[:3]:
            assert f"stories.jsonl: “{wrong}" in done.stdout
        data = TokenData(paths, 64)
        ids = np.concatenate([*data.train, *data.valid])
        shards.append(sorted(" ".join(map(str, ids)).split(f"{ids[0]} ")))  # its documents
        assert data.mark and (ids & data.mark).any()
    assert shards[0] == shards[1]


def test_words_count_in_any_form():
    told = Told("The dragons’ babies cried, stopped baking and tried the leaves.")
    for word in "dragon baby cry stop bake try leaf Dragon leaves".split():
        assert told.has_word(word), word
    assert Told("They had 10  big cats.").has_word("big cat") and Told("I ate 10.").has_word("10")
    for word in "drag soup ask".split():
        assert not told.has_word(word), word
    assert "stopped" in forms("stop")
    # a model that writes another order has not told its words
    assert not Told("kite, brave\nStory: A cat ran.").has_word("kite")
    orders = [Order(("cat", "dog")), Order(("sun",), ("Dialogue",), "It was hot."), Order(("a",))]
    told = [Told("Cats ran."), Told('"Sun!" It was  hot.'), Told("b")]
    result = scores(list(zip(orders, told, strict=True)))
    assert result == {"words": 2 / 4, "whole": 1 / 3, "dialogue": 1, "sentences": 1}


@pytest.mark.parametrize("name", (512, 1500, "gpt2"))
def test_only_the_tokens_of_orders_are_marked(tokenizers, stories, name):
    tokenizer, orders = tokenizers[name], Orders(stories)
    encode = tokenizer.encoder("auto")[1]
    ids, told = encode_orders(stories[:300], tokenizer, encode, "uint16", orders)
    assert told == stories[:300]
    mark = int(mark_of_orders("uint16"))
    starts = [*np.flatnonzero(ids == tokenizer.bos_id), len(ids)]
    assert len(starts) == 301
    for i, story in enumerate(told):
        document = ids[starts[i] : starts[i + 1]]
        order = orders.place(story)[0]
        prompt = tokenizer.encode(order) if order else [tokenizer.bos_id]
        n = len(prompt)  # with the BOS, which is not marked
        assert (document[1:n] & mark).all() and not (document[n:] & mark).any()
        assert without_marks(document, mark)[:n].tolist() == prompt
        whole = f"{order} {story}" if order else story
        assert without_marks(document, mark).tolist() == tokenizer.encode(whole)
        # what is ordered is in the story, and marked there
        asked = [b""]
        for k in document[n:]:
            piece = tokenizer.piece_bytes()[k & (mark >> 1) - 1]
            asked = [*asked[:-1], asked[-1] + piece] if k & mark >> 1 else [*asked, b""]
        asked = b"".join(piece + b"|" for piece in asked if piece).decode(errors="replace")
        assert bool(asked) == bool(order)
        for word in parse(order)[0].words:
            assert word in asked
        assert parse(order)[0].sentence in asked


@pytest.fixture(scope="module")
def ordered(tmp_path_factory, tokenizers, stories):
    """Two folders of the same stories: shards with orders, and without."""
    folder = tmp_path_factory.mktemp("orders")
    (folder / "text.txt").write_text("<|endoftext|>".join(stories[:1500]), encoding="utf-8")
    for name in ("with", "without"):
        (folder / name).mkdir()
        (folder / name / "tok512.model").write_bytes(tokenizers[512].proto)
        flags = [f"--data_dir={folder / name}", f"--source={folder / 'text.txt'}"]
        flags += ["--orders"] * (name == "with")
        done = script("tinystories.py", "pretokenize", "--vocab_size=512", *flags)
        assert not done.returncode, done.stderr
    return folder


def test_shards_with_orders_have_the_same_stories_and_targets(ordered, tokenizers):
    found = {}
    for name in ("with", "without"):
        paths = DataPaths(str(ordered / name), "custom", 512)
        data = TokenData(paths, 64, tokenizers[512])
        valid = list(ValidBatches(data.valid, 64, 4, 10**6, mark=data.mark))
        targets = [int(t) for _, y in valid for t in y.flatten() if t >= 0]
        found[name] = targets, data.valid_bytes, data.tokens_per_byte()
        x, y = TrainBatches(data.train, 64, 1, data).at(0, 50)
        assert x.max() < 512 and (y & ~STRESSED).max() < 512
        assert ((y < 0).float().mean() > 0.02) == (name == "with")
        is_stressed = (y >= 0) & (y & STRESSED != 0)
        assert (0.005 < is_stressed.float().mean() < 0.05) == (name == "with")
        if name == "with":
            _, all_y = TrainBatches(data.train, 64, 1, data, learns_orders=True).at(0, 50)
            assert (all_y >= 0).all() and (all_y == y)[y >= 0].all()
    # the loss is over the same tokens, except that "Story:" and not BOS comes before a story
    assert found["with"] == found["without"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("dataset.json", "instruct.txt", "simplestories.parquet"))
def test_labels_of_each_dataset_train(tokenizers, stories, tmp_path, kind):
    """A few records as they are published, and one that is malformed."""
    path, texts = tmp_path / kind, stories[:60]
    if kind == "dataset.json":
        wrong = {"story": "A cat sat.", "instruction": {"words": 5}}
        records = [
            {
                "story": f"\n\n{text}",
                "instruction": {
                    "prompt:": "Write a story.",
                    "words": ["quit", "oak", "gloomy"],
                    "features": ["Dialogue", "Twist"],
                },
                "summary": "Somebody finds a tree.",
                "source": "GPT-4",
            }
            for text in texts
        ]
        path.write_text(json.dumps([*records, wrong]))
    elif kind == "instruct.txt":
        head = "Features: Dialogue\nWords: quit, oak, gloomy\nSummary: A tree.\nStory: \n\n"
        sentence = "Random sentence: It was an oak.\nStory: "
        records = [head + text for text in texts[:30]]
        records += [f"{sentence}\n\n{text}\nSummary: A tree. " for text in texts[30:]]
        path.write_text("\n<|endoftext|>\n".join([*records, "Words: quit, oak\nSummary: A tree."]))
    else:
        pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
        columns = {"topic": "trees", "theme": "Hope", "style": "warm", "grammar": "present tense"}
        table = {name: [text] * 61 for name, text in columns.items()}
        table |= {"story": [*texts, "A cat sat."], "persona": ["an uncle"] * 61}
        table["topic"] = [b"trees"] * 61  # not readable
        parquet.write_table(pyarrow.table(table), path)
    (tmp_path / "tok512.model").write_bytes(tokenizers[512].proto)
    flags = [f"--data_dir={tmp_path}", "--vocab_size=512"]
    done = script("tinystories.py", "pretokenize", f"--source={path}", "--orders", *flags)
    assert not done.returncode, done.stderr
    n = 61 if kind.endswith("parquet") else 1
    assert f"note: {n} document" in done.stdout and f"{kind}: “" in done.stdout
    shards = TokenData(DataPaths(str(tmp_path), "custom", 512), 64, tokenizers[512])
    ids = without_marks(np.concatenate(shards.train), shards.mark)
    expected = "Features: Hope" if n > 1 else "quit, oak, gloomy"
    assert expected in tokenizers[512].decode(ids.tolist())
    size = "--dim=32 --n_layers=2 --max_iters=2 --eval_iters=1 --batch_size=2 --max_seq_len=64"
    done = script("train.py", *flags, f"--out_dir={tmp_path / 'out'}", *size.split(),
                  "--device=cpu", "--compile=False")  # fmt: skip
    assert not done.returncode, done.stderr
    assert json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])["model_args"][
        "orders"
    ]


def test_a_model_trained_with_orders_tells_them_and_scores(ordered, builds, tokenizers, tmp_path):
    common = "--vocab_size=512 --dim=32 --n_layers=2 --max_iters=20 --eval_iters=2 --batch_size=4"
    common = [*common.split(), "--max_seq_len=128", "--device=cpu", "--compile=False"]
    flags = ["--words=dragon,  so\udce9up", "--features=Dialogue", "--sentence=It was hot."]
    run_flags = [part for flag in flags for part in flag.split("=")]
    for name in ("with", "without"):
        out = tmp_path / name
        done = script("train.py", f"--out_dir={out}", f"--data_dir={ordered / name}", *common)
        assert not done.returncode, done.stderr
        sampled = script("sample.py", f"--out_dir={out}", *flags, "--temperature=0")
        command = [builds["run", "checked"], out / "model.bin", *run_flags, "-t", "0", "-n", "100"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        scored = [f"--json={tmp_path / name}.jsonl", "--orders", "--num_samples=8"]
        scored = script("generate.py", out, *scored, "--max_new_tokens=400")
        if name == "without":
            refused(sampled, "trained without orders", "pretokenize --orders")
            refused(scored, "trained without orders", "pretokenize --orders")
            assert told.returncode and "trained without orders" in told.stderr
            continue
        assert not sampled.returncode, sampled.stderr
        assert not told.returncode, told.stderr
        n = min(len(told.stdout.strip()), 200)
        assert n > 20 and sampled.stdout.strip()[:n] == told.stdout.strip()[:n]
        assert "Words:" not in told.stdout[:40] and not told.stdout.startswith(" ")
        assert not scored.returncode, scored.stderr
        lines = [json.loads(x) for x in (tmp_path / "with.jsonl").read_text().splitlines()]
        assert lines[1]["ordered_words"] > 0.9 > lines[1]["ordered_words_base"]  # real stories
        assert 0 <= lines[0]["ordered_words"] <= 1 and lines[0]["ordered_dialogue"] is not None
        assert "Words: " in (out / "stories.html").read_text()


def test_run_writes_the_prompt_of_an_order_as_python_does(builds, tokenizers, tmp_path):
    """The ids are compared by the story of a random model, which depends on each of them."""
    tokenizers[512].export(tmp_path / "tokenizer.bin")
    model = random_model(vocab_size=512, max_seq_len=256, orders=True)
    export_model(model, tmp_path / "model.bin")
    command = [builds["run", "checked"], tmp_path / "model.bin", "-t", "0", "-n", "120"]

    def tell(*flags):
        done = subprocess.run([*command, *flags], capture_output=True, check=True)
        return done.stdout.decode()

    for begin in ("", "One day", " One day"):
        flags = ["--words", " dragon,soup ,, big  cat,", "--sentence", " It\nwas\thot. "]
        told = tell(*flags, "--summary", "", "-i", begin, "--order-bias", "0")
        order = Order(("dragon", "soup", "big cat"), sentence="It was hot.")
        expected, whole = order.prompt(), tell("-i", order.prompt(begin))
        assert whole.startswith(expected) and len(told) > 20
        assert whole.removeprefix(expected).removeprefix(" ") == told
        assert told.startswith(begin.strip())
    assert tell("--words", " , ", "-i", "One day") == tell("-i", "One day")
    # blanks at the end of a beginning are left out; others than those of ASCII are letters
    assert tell("--words", "soup", "-i", "One day  ") == tell("--words", "soup", "-i", "One day")
    words = "big\u00a0cat,\u3000soup"
    order = Order(split_list(words))
    whole = tell("-i", order.prompt()).removeprefix(order.prompt()).removeprefix(" ")
    assert whole == tell("--words", words, "--order-bias", "0")
    # without anything, an order without fields, since the model would make one up
    assert tell("-i", "Story:").removeprefix("Story:").removeprefix(" ") == tell()
    for flags in (("--words", ""), ("--features", ","), ("--sentence", " ", "-i", "")):
        assert tell(*flags) == tell(), flags
    stories = tell("--words", "dragon", "-b", "3", "-t", "1", "-s", "1").split("\n---\n\n")
    assert len(set(stories)) == 3 and "dragon" not in {s.split()[0] for s in stories}


WORDS = "dragon", "big cat", "soup", "soup"


@pytest.mark.parametrize("name, words", [(512, WORDS), ("gpt2", WORDS), ("gpt2", ('"oh"', "soup"))])
def test_a_story_favors_what_is_ordered_until_it_has_it(builds, tokenizers, tmp_path, name, words):
    """
    With a large bias, a random model says each phrase, whatever it would say otherwise. Speech is
    favored after 100 tokens.
    """
    tokenizer = tokenizers[name]
    tokenizer.export(tmp_path / "tokenizer.bin")
    model = random_model(vocab_size=tokenizer.vocab_size, max_seq_len=256, orders=True)
    export_model(model, tmp_path / "model.bin")
    features = "Twist", "Dialogue"
    order, beginning = Order(words, features, "It was hot."), "One big soup"
    prompt, stop = tokenizer.encode(order.prompt(beginning)), tokenizer.stop
    told = {}
    for bias in (0.0, 3.0, 10.0):
        wanted = Wanted(order, tokenizer, bias, prompt)
        ids = list(model.generate(prompt, 130, temperature=0, stop=stop, wanted=wanted))
        wanted = [Wanted(order, tokenizer, bias, prompt) for _ in range(2)]
        batch = model.generate_batch([prompt] * 2, torch.zeros(2, 130), 0, stop=stop, wanted=wanted)
        assert [step[1] for step in batch if step[1] is not None] == ids
        told[bias] = parse(tokenizer.decode([*prompt, *ids]))[1]
        flags = ["--words", ", ".join(words), "--sentence", "It  was hot.", "-i", beginning]
        flags += ["--features", "Twist,Dialogue"]
        flags += ["-t", "0", "-n", str(len(prompt) + 129), "--order-bias", str(bias)]
        command = [builds["run", "checked"], tmp_path / "model.bin", *flags]
        done = subprocess.run(command, capture_output=True, check=True)
        assert done.stdout.decode(errors="replace").rstrip() == told[bias]
    plain = list(model.generate(prompt, 130, temperature=0, stop=stop))
    assert parse(tokenizer.decode([*prompt, *plain]))[1] == told[0.0]
    favored, phrases = told[10.0], (" dragon", " big cat", " soup", " It was hot.", ' "')
    assert favored.startswith(beginning)
    if (
        name == "gpt2" and words == WORDS
    ):  # else a random model goes back and forth between the pieces of words
        assert [favored.count(p) for p in phrases] == [1] * 5
    # a token that several phrases begin with is favored once
    logits = torch.zeros(tokenizer.vocab_size)
    order = Order(("dragon", "dragon", "drag"))
    Wanted(order, tokenizer, 3.0, tokenizer.encode(order.prompt())).raise_logits(logits)
    assert set(logits.tolist()) == {0.0, 3.0}


def test_a_token_that_spans_an_order_and_its_story_is_harmless(builds, tmp_path):
    """Nothing is favored then. A tokenizer file may have any special token."""
    special = ["<|endoftext|>", 'Story: "']
    vocab = {i: bytes([i]) for i in range(256)} | {
        256 + i: t.encode() for i, t in enumerate(special)
    }
    tokenizer = BPETokenizer(vocab, [], special)
    (tmp_path / "tokenizer.bin").write_bytes(byte_level_c_file(tokenizer, 256, 256))
    export_model(random_model(vocab_size=258, max_seq_len=256, orders=True), tmp_path / "model.bin")
    flags = ["--features", "Dialogue", "--order-bias", "10", "-t", "0", "-n", "0"]
    command = [builds["run", "checked"], tmp_path / "model.bin", *flags]
    done = subprocess.run(command, capture_output=True)
    assert not done.returncode, done.stderr


@pytest.mark.slow
def test_a_step_is_the_same_in_micro_batches_of_different_weights(ordered, tmp_path):
    losses = []
    for size, n in ((8, 1), (2, 4)):
        flags = f"--batch_size={size} --gradient_accumulation_steps={n} --max_iters=6 --dim=32"
        flags += " --vocab_size=512 --n_layers=2 --max_seq_len=32 --log_interval=1 --device=cpu"
        flags += " --dtype=float32 --compile=False --learn_orders=False --eval_iters=1"
        out = tmp_path / str(n)
        done = script(
            "train.py", f"--out_dir={out}", f"--data_dir={ordered / 'with'}", *flags.split()
        )
        assert not done.returncode, done.stderr
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if line["kind"] == "train"])
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", (512, "gpt2"))
def test_the_library_tells_an_order_as_run_does(builds, tokenizers, tmp_path, name):
    library = compile_c(
        REPO / "lib" / "libllama2.c", tmp_path / "lib.so", "-O1", "-shared", "-fPIC"
    )
    tokenizers[name].export(tmp_path / "tokenizer.bin")
    vocab_size = tokenizers[name].vocab_size
    for orders in (True, False):
        model = random_model(vocab_size=vocab_size, max_seq_len=160, orders=orders)
        export_model(model, tmp_path / f"orders{orders}.bin")
    paths = [str(tmp_path / f"orders{orders}.bin") for orders in (True, False)]
    order = {"words": " dragon,soup ", "features": "", "sentence": "Äh, it  was."}
    code = f"""
import sys
sys.path.insert(0, {str(REPO / "examples")!r})
from llama2 import Llama
for path in {paths!r}:
    llama = Llama(path, library={str(library)!r})
    print(llama.c.llama_knows_orders(llama.llama))
    for order in ({order!r}, {{"words": " , "}}, {{"word": "soup"}}):
        try:
            print(llama.generate("One day", order=order, temperature=0))
            plain = llama.generate("One day", temperature=0)  # favors nothing
            print(plain == Llama(path, library={str(library)!r}).generate("One day", temperature=0))
        except ValueError as e:
            print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    flags = [x for field, text in order.items() for x in (f"--{field}", text)]
    command = [builds["run", "checked"], paths[0], "-t", "0", "-n", "0", "-i", "One day", *flags]
    expected = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    command = [builds["run", "checked"], paths[0], "-t", "0", "-n", "0", "-i", "Story: One day"]
    empty = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert done.stdout.splitlines()[:1] == ["1"] and len(expected) > 100
    unknown = "an order has no 'word': expected words, features, sentence, summary"
    lines = ["1", expected + "True", empty.removeprefix("Story: ") + "True", unknown]
    refusals = ["the model was trained without orders"] * 2
    assert done.stdout == "\n".join([*lines, "0", *refusals, unknown, ""])
