"""generate.py: metrics, batched generation, the page, and what it refuses."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import EVERYTHING, random_model, refused, script

from dataset import DataPaths, TokenData
from model import draw_tokens
from report import stories as stories_module
from report.stories import (
    BREAK,
    Overlap,
    Story,
    distinct,
    documents_of_file,
    documents_of_shard,
    metrics_of,
    pieces_of,
    rows_of,
    sample_items,
    words_of,
)
from report.storypage import marked, write_page
from tokenizer import open_tokenizer


def story(text, prompt="", ended=True):
    return Story(text, len(text.split()), ended, prompt)


# ---- words and metrics


def test_words_are_lower_case_without_punctuation():
    text = "“Don’t!” she said — it's the dogs' 2nd_ball, 'really'."
    assert words_of(text) == "don't she said it's the dogs 2nd ball really".split()


def test_words_keep_their_positions_when_lower_case_is_longer():
    """İ in lower case is two characters; words after it must not shift."""
    turkish = story("İ saw İstanbul, Straße.")
    assert [turkish.text[a:b] for a, b in turkish.spans] == ["İ", "saw", "İstanbul", "Straße"]


def test_distinct_counts_different_n_grams():
    stories = [story("a b a b"), story("b c")]
    assert distinct(stories, 1, 6) == 3 / 6
    assert distinct(stories, 2, 6) == 3 / 4  # ab ba bc, none across two stories
    assert distinct(stories, 2, 5) == 2 / 3  # the second story's first word is the fifth
    assert distinct(stories, 1, 3) == 2 / 3
    assert distinct(stories, 4, 6) == 1.0
    assert distinct(stories, 4, 3) is None


def test_words_and_n_grams_of_the_prompt_are_not_counted():
    example = story("Once upon a time there was", prompt="Once upon a time")
    assert (example.n_prompt, example.n_words()) == (4, 2)
    assert example.n_grams(1) == [("there",), ("was",)]
    assert example.n_grams(3) == [tuple(w.split()) for w in ("a time there", "time there was")]
    assert example.n_grams(3, 1) == [("a", "time", "there")]
    # a word that only starts in the prompt belongs to the story
    assert story("Once upon a timer", prompt="Once upon a time").n_prompt == 3
    assert story("Once upon", prompt="Once upon").n_words() == 0
    assert story("Once\r upon a time", prompt="Once\r upon").n_words() == 2


@pytest.mark.parametrize(
    "text, ended, is_proper",
    [
        ("The end.", True, True),
        ("The end!\n", True, True),
        ('"Is it the end?"', True, True),
        ("“It is.”", True, True),
        ("The end.", False, False),
        ("The end", True, False),
        ('He said "yes"', True, False),
        ("The end,", True, False),
        ("", True, False),
    ],
)
def test_a_proper_end_is_the_end_of_a_sentence(text, ended, is_proper):
    assert story(text, ended=ended).ends_properly() is is_proper


def test_metrics_of_hand_made_stories():
    stories = [story("a b c."), story("a b c."), story("d e", ended=False)]
    overlap = Overlap(stories, 2)
    overlap.feed(f"x a b{BREAK}c. d e")
    metrics = metrics_of(stories, overlap, 8)
    expected = {"stories": 3, "copied": 3 / 5, "proper": 2 / 3, "repeated": 2 / 3}
    expected |= {"longest_median": 2.0, "longest_max": 2, "words": 8 / 3, "tokens": 8 / 3}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    rows = {row[0]: row[1:] for row in rows_of({"m": metrics}, 2, 8)}
    assert rows["copied"] == [
        "60.0 %",
        "share of 2-word sequences that also occur in the training text",
    ]
    assert "bits per byte" not in rows  # unknown


def test_a_story_without_words_has_metrics():
    stories = [story(""), story("?!")]
    metrics = metrics_of(stories, Overlap(stories, 8), 0)
    assert metrics["copied"] is None and metrics["distinct_1"] is None
    assert metrics["words"] == metrics["longest_max"] == 0


# ---- copies of the training text


def random_words(rng, n):
    return " ".join(rng.choices("abcd", k=n))


def test_overlap_agrees_with_a_plain_search(tmp_path, monkeypatch):
    """For pieces of any size; no n-gram spans two documents."""
    rng, n = random.Random(0), 5
    documents = [random_words(rng, rng.randrange(1, 40)) for _ in range(60)]
    stories = [story(random_words(rng, 30), "") for _ in range(20)] + [story("a b")]
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(documents))
    expected = [
        [any(f" {' '.join(g)} " in f" {d} " for d in documents) for g in s.n_grams(n)]
        for s in stories
    ]
    assert 0.1 < np.concatenate(expected).mean() < 0.9
    for size in (1, 50, 1 << 20):
        monkeypatch.setattr(stories_module, "PIECE", size)
        overlap, n_bytes = Overlap(stories, n), 0
        for text, read in pieces_of(documents_of_file(path)):
            overlap.feed(text)
            n_bytes += read
        assert [overlap.matches(s).tolist() for s in stories] == expected
        assert 0.9 * path.stat().st_size < n_bytes <= path.stat().st_size
        assert overlap.n_words == sum(len(d.split()) for d in documents)


def test_the_prompt_does_not_count_as_a_copy():
    text = "once upon a time there was a dog"
    prompt_only = story("Once upon a time", prompt="Once upon a time")
    longer = story("Once upon a time there was a CAT", prompt="Once upon a time")
    overlap = Overlap([prompt_only, longer], 3)
    overlap.feed(text)
    assert overlap.matches(prompt_only).tolist() == []
    assert overlap.matches(longer).tolist() == [True, True, True, False]
    assert list(overlap.runs(longer)) == [(4, 7)]  # there was a


def test_runs_are_the_longest_copied_sequences():
    example = story("a b c d x y a b c")
    overlap = Overlap([example], 3)
    overlap.feed("a b c d e")
    assert list(overlap.runs(example)) == [(0, 4), (6, 9)]
    assert metrics_of([example], overlap, 9)["longest_max"] == 4


def test_shards_give_back_the_documents_of_their_text(practice, monkeypatch):
    """For pieces of any size."""
    paths = DataPaths(practice, "custom", 300)
    tokenizer = open_tokenizer(paths.tokenizer_model)
    data = TokenData(paths, 1, tokenizer)
    documents = [text for text, _ in documents_of_shard(data.valid[0], tokenizer)]
    counts = [n for _, n in documents_of_shard(data.valid[0], tokenizer)]
    meta = json.loads((practice / "tok300" / "shards.json").read_text())["shards"][0]
    assert len(documents) == meta["documents"] and sum(counts) + len(counts) == meta["tokens"]
    assert sum(len(text.encode()) for text in documents) == meta["bytes"]
    for chunk in (1, 1000, 1 << 20):
        monkeypatch.setattr(stories_module, "CHUNK", chunk)
        monkeypatch.setattr(stories_module, "PIECE", chunk)
        pieces = list(pieces_of(documents_of_shard(data.valid[0], tokenizer)))
        assert sum(n for _, n in pieces) == sum(counts)
        texts = BREAK.join(text for text, _ in pieces).split(BREAK)
        assert list(filter(None, texts)) == documents


def test_all_items_are_equally_likely_to_be_sampled():
    assert sample_items(range(3), 5, 0) == [0, 1, 2]
    samples = [sample_items(range(10), 3, seed) for seed in range(1000)]
    assert all(sorted(sample) == sample and len(set(sample)) == 3 for sample in samples)
    counts = np.bincount(np.concatenate(samples), minlength=10)
    assert counts.min() > 230 and counts.max() < 370  # 300 expected
    assert sample_items(range(10), 3, 5) == samples[5]


# ---- batched generation

MODELS = {
    "plain": {},
    "windows": {"n_layers": 3, "sliding_window": 4, "window_pattern": "SSL"},
    "everything": EVERYTHING,
}


def generated(model, prompts, draws, *sampling, **options):
    """Return the new tokens of each story, and whether it ended."""
    new, ended = [[] for _ in draws], [False] * len(draws)
    for step in model.generate_batch(prompts, draws, *sampling, **options):
        for i, token in enumerate(step):
            if token is None:
                ended[i] = True
            else:
                assert not ended[i]
                new[i].append(token)
    return new, ended


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_gives_the_same_stories_as_one_at_a_time(name):
    model = random_model(**MODELS[name])
    alone = list(model.generate([1, 7, 3], 100, temperature=0))
    assert len(alone) == 30  # one past the end of the context
    draws = torch.rand(3, 100, dtype=torch.float64)
    assert generated(model, [[1, 7, 3]] * 3, draws, 0) == ([alone] * 3, [False] * 3)
    stop = (alone[12],)
    until = alone[: alone.index(stop[0])]
    assert generated(model, [[1, 7, 3]] * 3, draws, 0, stop=stop) == ([until] * 3, [True] * 3)
    with pytest.raises(ValueError, match="does not fit"):
        next(model.generate_batch([[]] * 3, draws))


@pytest.mark.parametrize("name", MODELS)
def test_a_story_does_not_depend_on_the_rest_of_its_batch(name):
    """Stories end at different steps, so the batch shrinks. Prompts may differ."""
    model = random_model(**MODELS[name])
    draws = torch.rand(8, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sampling, options = (1.0, 20, 0.95), {"stop": tuple(range(0, 105, 8))}
    prompts = [[5, 9 + i % 3] for i in range(8)]
    new, ended = generated(model, prompts, draws, *sampling, **options)
    assert len({len(ids) for ids in new}) > 3 and any(ended)
    for i in range(8):
        alone = generated(model, [prompts[i]], draws[i : i + 1], *sampling, **options)
        assert alone == ([new[i]], [ended[i]])


def test_draws_follow_the_probabilities():
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000

    def counts(temperature=1.0, **limits):
        drawn = draw_tokens(probs.log().repeat(1000, 1), draws, temperature, **limits)
        return np.bincount(drawn, minlength=4).tolist()

    assert counts() == [100, 400, 200, 300]
    assert counts(top_k=2) == [0, 571, 0, 429]
    assert counts(top_p=0.6) == [0, 571, 0, 429]
    assert counts(temperature=0) == [0, 1000, 0, 0]
    last = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(probs.log().repeat(2, 1), last, 1.0) == [1, 0]
    assert draw_tokens(probs.log().repeat(2, 1), last, 1.0, top_k=1) == [1, 1]


# ---- the page


def test_the_page_cannot_run_what_a_model_writes(tmp_path):
    evil = "<script>alert(1)</script> & \x1b[31m\0 he said"
    stories = {
        "a<b>": [story(evil, prompt="<script>", ended=False)],
        "real stories": [story("No.")],
    }
    overlaps = {"a<b>": Overlap(stories["a<b>"], 2), "real stories": None}
    overlaps["a<b>"].feed("Script, alert 1 script!")
    columns = {name: metrics_of(column, overlaps[name], 1) for name, column in stories.items()}
    path = tmp_path / "new" / "page.html"
    settings = {"models": "a<b>", "start": "<script>\udcff", "seed": 3}
    write_page(path, "Stories <i>", stories, overlaps, columns, 2, 1, ["a <note>"], settings)
    text = path.read_text()
    tags = set(re.findall(r"<(\w+)", text))
    assert not tags & {"script", "b", "i", "note", "link", "img"}
    assert "http" not in text.replace("http-equiv", "") and "url(" not in text
    assert "&lt;script&gt;" in text and "\0" not in text and "\x1b" not in text
    copied = "&lt;script&gt;</span><mark>alert(1)&lt;/script</mark>&gt; &amp; "
    assert f'<span class="prompt">{copied}' in text
    assert text.count("(cut at the limit)") == 1
    assert "--seed=3" in text and "prefers-color-scheme: dark" in text
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_copied_words_are_marked():
    example = story("One day a dog, a cat and a bird sang.")
    overlap = Overlap([example], 3)
    overlap.feed("one DAY a dog! A cat; or the bird. a bird sang")
    assert marked(example, overlap) == (
        "<mark>One day a dog, a cat</mark> and <mark>a bird sang</mark>."
    )
    assert marked(example, None) == example.text


# ---- the script

FEW = ["--num_samples=6", "--max_new_tokens=40", "--start=Once upon a time", "--device=cpu"]


def test_stories_metrics_and_the_page_of_a_run(trained, tmp_path):
    """Two models and real stories side by side; the batch size changes nothing."""
    pages = []
    for size in (50, 4):
        out, json_path = tmp_path / f"{size}.html", tmp_path / f"{size}.jsonl"
        args = [f"{trained},{trained / 'ckpt.pt'}", *FEW, f"--batch_size={size}"]
        done = script("generate.py", *args, f"--out={out}", f"--json={json_path}")
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in json_path.read_text().splitlines()]
        pages.append((lines, out.read_text()))
    names = [str(trained), str(trained / "ckpt.pt"), "real stories"]
    assert [line["model"] for line in lines] == names
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    best = min(line["val_bpb"] for line in log if line["kind"] == "eval")
    assert lines[0]["bits_per_byte"] == pytest.approx(best, abs=1e-4)
    assert lines[2]["bits_per_byte"] is None
    assert lines[2]["tokens"] == 40 and lines[2]["proper"] == 0  # cut at max_new_tokens
    for line in lines:
        assert line["stories"] == 6 and line["seed"] == 1337 and line["words"] > 5
        assert all(0 < line[f"distinct_{n}"] <= 1 for n in (1, 2, 3, 4))
        assert 0 <= line["copied"] <= 1 and line["longest_max"] >= line["longest_median"]
    assert re.search(r"distinct-2( +[01]\.\d{3}){3}\n", done.stdout)
    assert "tokens/s" in done.stdout and "words/s" in done.stdout
    assert pages[0][1].count('<span class="prompt">Once upon a time</span>') == 12
    stories_only = [text.partition("<footer>")[0] for _, text in pages]
    assert stories_only[0] == stories_only[1]
    metrics = [
        [{**line, "batch_size": 0, "out": "", "json": ""} for line in lines] for lines, _ in pages
    ]
    assert metrics[0] == metrics[1]


def test_another_seed_gives_other_stories(trained, tmp_path):
    pages = []
    for seed in (1, 1, 2):
        done = script("generate.py", trained, *FEW, f"--seed={seed}", "--reference=False")
        assert done.returncode == 0, done.stderr
        assert f"wrote {trained / 'stories.html'}" in done.stdout
        pages.append((trained / "stories.html").read_text())
    assert pages[0] == pages[1] != pages[2].replace("--seed=2", "--seed=1")
    (trained / "stories.html").unlink()


def test_model_bin_without_its_log_is_compared_with_a_given_text(trained, tmp_path):
    """model.bin does not record what it was trained on; only the log beside it does."""
    for name in ("model.bin", "tokenizer.model"):
        shutil.copy(trained / name, tmp_path)
    args = [tmp_path / "model.bin", *FEW, f"--out={tmp_path / 'page.html'}"]
    done = script("generate.py", *args)
    assert done.returncode == 0, done.stderr
    assert "is not checked for copies" in done.stdout and "copied  " not in done.stdout
    assert "No real stories" in done.stdout
    assert "<mark>" not in (tmp_path / "page.html").read_text()
    text = "Once upon a time there was a very small dog that saw the sea"
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    args += [f"--source={tmp_path / 'text.jsonl'}", f"--valid_source={tmp_path / 'text.jsonl'}"]
    done = script("generate.py", *args, "--ngram=3", f"--json={tmp_path / 'm.jsonl'}")
    assert done.returncode == 0, done.stderr
    real = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[1])
    assert (real["stories"], real["copied"], real["longest_max"]) == (1, 1.0, 14)
    assert "not checked" not in done.stdout


@pytest.mark.parametrize(
    "args, part",
    [
        (["none"], "none"),
        ([","], "models = ',': expected run folders or model files"),
        (["{out},{out}"], "expected each model only once"),
        ([".."], ".. contains no model"),
        (["{out}", "--num_samples=0"], "num_samples = 0: expected at least 1"),
        (["{out}", "--batch_size=0"], "batch_size = 0: expected at least 1"),
        (["{out}", "--ngram=0"], "ngram = 0: expected at least 1"),
        (["{out}", "--max_new_tokens=0"], "max_new_tokens = 0: expected at least 1"),
        (["{out}", "--temperature=-1"], "temperature"),
        (["{out}", "--top_p=2"], "top_p"),
        (["{out}", "--start=" + "word " * 100], "shorten the prompt"),
        (
            ["{out}", "--start=FILE:none.txt"],
            "none.txt does not exist; choose another --start=FILE",
        ),
        (["{out}", "--source=none.txt"], "none.txt does not exist"),
        (["{out}", "--valid_source=none.txt"], "none.txt does not exist"),
        (["{out}", "--out={out}/ckpt.pt"], "expected a path ending in .html"),
        (["{out}", "--out=/dev/null/page.html"], "cannot write /dev/null/page.html"),
        (
            ["{out}", "--json={out}/log.jsonl"],
            "log.jsonl already exists and was not written by generate.py",
        ),
        (["{out}", "--tokenizer=none.model"], "none.model does not exist"),
        (["{here}/ckpt.pt"], "no tokenizer.model found for"),
    ],
)
def test_generate_refuses(trained, tmp_path, args, part):
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    shutil.copy(trained / "ckpt.pt", tmp_path)
    args = [arg.format(out=trained, here=tmp_path) for arg in args]
    refused(script("generate.py", *args, cwd=tmp_path), part)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    assert {path: path.stat().st_mtime_ns for path in trained.iterdir()} == before


def test_copies_from_an_empty_text_are_refused(trained, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    args = [trained, f"--source={tmp_path / 'empty.txt'}", "--num_samples=1", "--max_new_tokens=2"]
    refused(script("generate.py", *args, f"--out={tmp_path / 'a.html'}"), "contains no text")
    assert not (tmp_path / "a.html").exists()


def test_a_model_that_diverged_is_refused(trained, tmp_path):
    for name in ("ckpt.pt", "tokenizer.model"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    next(iter(checkpoint["model"].values())).view(-1)[0] = float("nan")
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    refused(script("generate.py", tmp_path), "weights that are not finite")
    args = f"--checkpoint={tmp_path / 'ckpt.pt'}", "--temperature=0"
    refused(script("sample.py", *args), "weights that are not finite")
