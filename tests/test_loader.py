"""The order of training data: every window once per epoch, shared by ranks, never validation."""

import itertools
import json
import time
from collections import Counter

import numpy as np
import pytest
from conftest import script

from configurator import UserError
from dataset import (
    DataPaths,
    TokenData,
    TrainBatches,
    ValidBatches,
    permuted,
    prefetch,
    round_keys,
    valid_windows,
)
from text.corpus import plan_shards
from text.shards import choose_split, write_shards

CASES = range(25)


def random_shards(rng, n_shards=4, longest=400):
    """Return shards in which every token is its own position, so all windows differ."""
    lengths = rng.integers(40, longest, n_shards)
    ends = np.cumsum(lengths)
    return [np.arange(e - n, e, dtype=np.uint16) for n, e in zip(lengths, ends, strict=True)]


def all_windows(shards, seq_len):
    windows = []
    for shard in shards:
        for start in range(0, len(shard) - seq_len, seq_len):
            windows.append(tuple(map(int, shard[start : start + seq_len + 1])))
    return sorted(windows)


def as_tuples(x, y):
    assert (x[:, 1:] == y[:, :-1]).all()
    return [(*a, b[-1]) for a, b in zip(x.tolist(), y.tolist(), strict=True)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 100, 1023, 1024, 1025, 99_991])
def test_permuted_is_a_permutation(n):
    for epoch in range(3):
        assert np.array_equal(np.sort(permuted(np.arange(n), n, round_keys(7, epoch))), range(n))


def test_permutations_look_random():
    """Positions, and steps between neighbors, are as evenly spread as in random permutations."""
    n, seeds = 40, 4000
    orders = np.array([permuted(np.arange(n), n, round_keys(s, 0)) for s in range(seeds)])

    def excess(counts):  # chi-squared, in standard deviations from the expected value
        expected = counts.sum() / counts.size
        chi, freedom = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
        return abs(chi - freedom) / np.sqrt(2 * freedom)

    for i in (0, 1, n // 2, n - 1):
        assert excess(np.bincount(orders[:, i], minlength=n)) < 5
    steps = (orders[:, 1:] - orders[:, :-1]) % n
    assert excess(np.bincount(steps.ravel(), minlength=n)[1:]) < 5
    large = permuted(np.arange(100_000), 100_000, round_keys(1, 2))
    assert abs(np.corrcoef(large, np.arange(100_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(large[1:], large[:-1])[0, 1]) < 0.02


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_sees_every_window_once_across_ranks_and_workers(case):
    rng = np.random.default_rng(case)
    shards, seq_len = random_shards(rng), int(rng.integers(1, 30))
    batches = TrainBatches(shards, seq_len, seed=case)
    world, workers = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    readers, epoch = world * workers, int(rng.integers(0, 3))
    expected = all_windows(shards, seq_len)
    n = batches.n_windows
    assert n == len(expected)
    assert batches.coverage == n * seq_len / sum(len(s) - 1 for s in shards)
    seen = []
    for rank, worker in itertools.product(range(world), range(workers)):
        first = rank * workers + worker
        mine = len(range(first, n, readers))
        size = int(rng.integers(1, 6))  # batch size, which readers need not share
        for i in range(0, mine, size):
            here = min(size, mine - i)
            seen += as_tuples(*batches.at(epoch * n + first + i * readers, here, stride=readers))
    assert sorted(seen) == expected


@pytest.mark.parametrize("case", CASES)
def test_seeking_to_a_position_gives_the_same_data_as_reading_up_to_it(case):
    rng = np.random.default_rng(100 + case)
    shards, seq_len = random_shards(rng), int(rng.integers(2, 30))
    read = TrainBatches(shards, seq_len, seed=case)
    size = int(rng.integers(1, 9))
    one_by_one = [as_tuples(*read.at(k * size, size)) for k in range(3 * read.n_windows // size)]
    for k in rng.permutation(len(one_by_one))[:10]:
        fresh = TrainBatches(shards, seq_len, seed=case)
        assert as_tuples(*fresh.at(int(k) * size, size)) == one_by_one[k]
    stream = [row for rows in one_by_one for row in rows]
    n = read.n_windows
    for epoch in range(2):
        expected = all_windows(shards, seq_len)
        assert sorted(stream[epoch * n :][:n]) == expected
    if n > 8:  # equal by chance once in 9! times
        assert stream[:n] != stream[n : 2 * n]
        assert as_tuples(*TrainBatches(shards, seq_len, seed=case + 1).at(0, n)) != stream[:n]


@pytest.mark.parametrize("case", CASES)
def test_every_epoch_after_the_first_has_the_documents_in_another_order(case):
    """Documents begin with 0 and may be longer than a window; other tokens are their places."""
    rng = np.random.default_rng(200 + case)
    shards, seq_len = random_shards(rng), int(rng.integers(1, 30))
    for shard in shards:
        shard[rng.random(len(shard)) < rng.choice([0, 0.03, 0.3])] = 0
        shard[0] = 0
    batches = TrainBatches(shards, seq_len, seed=case, bos_id=0)
    n = batches.n_windows
    assert sorted(as_tuples(*batches.at(0, n))) == all_windows(shards, seq_len)
    texts, seen_in = [], {}
    for epoch in range(1, 4):
        _, numbers, starts = batches.places(epoch * n, n)
        windows = seen_in[epoch] = as_tuples(*batches.at(epoch * n, n))
        places = dict(zip(zip(numbers, starts, strict=True), windows, strict=True))
        for i, shard in enumerate(shards):
            n_whole = (len(shard) - 1) // seq_len
            mine = [places.pop((i, k * seq_len)) for k in range(n_whole)]
            assert all(a[-1] == b[0] for a, b in itertools.pairwise(mine))
            text = [token for window in mine for token in window[:-1]] + [mine[-1][-1]]
            # the beginning of the first document comes last, and the end of the text may be missing
            first, *whole = parts_at_zeros(text)
            all_parts = parts_at_zeros(shard)
            assert any(part[-len(first) :] == first for part in all_parts) or not whole
            assert not Counter(whole[:-1]) - Counter(all_parts)
            texts.append(tuple(text))
        assert not places
    if max(len(parts_at_zeros(shard)) for shard in shards) > 8:
        assert len(set(texts)) > len(shards)
    fresh = TrainBatches(shards, seq_len, seed=case, bos_id=0)
    for epoch in (3, 1, 2):  # seeking, also backwards
        assert as_tuples(*fresh.at(epoch * n, n)) == seen_in[epoch]


def parts_at_zeros(tokens):
    cuts = np.flatnonzero(np.asarray(tokens) == 0)
    return [tuple(map(int, part)) for part in np.split(tokens, cuts[cuts > 0])]


def test_a_long_document_is_cut_at_other_places_in_every_epoch():
    batches = TrainBatches([np.arange(300, dtype=np.uint16)], 20, seed=1, bos_id=0)
    x, _ = batches.at(batches.n_windows, 200 * batches.n_windows)
    assert set(x[:, 0].tolist()) == set(range(280))


def test_a_far_position_costs_as_little_as_a_near_one():
    shards = [np.zeros(1 << 26, np.uint16)]
    batches = TrainBatches(shards, 1, seed=1)

    def seconds(position):
        start = time.perf_counter()
        for k in range(50):
            batches.at(position + 32 * k, 32)
        return time.perf_counter() - start

    seconds(0)
    # a stored permutation of 67 million takes seconds at each new epoch
    assert seconds(10**12) < 0.5 > seconds(0)


def test_memory_maps_do_not_fill_the_memory(tmp_path):
    """Reading 256 MB of shards leaves no copy of them in this process."""
    folder = tmp_path / "tok105"
    folder.mkdir()
    for i in range(2):
        with open(folder / f"data0{i}.bin", "wb") as f:
            f.truncate(128 << 20)

    def own_bytes():
        with open("/proc/self/status") as f:
            (line,) = [line for line in f if line.startswith("RssAnon")]
        return int(line.split()[1]) << 10

    before = own_bytes()
    data = TokenData(DataPaths(tmp_path, "custom", 105), 1024)
    batches = TrainBatches(data.train, 1024, seed=1)
    for k in range(0, batches.n_windows, 64):
        batches.at(k, 64)
    assert batches.n_windows == (64 << 10) - 1
    assert own_bytes() - before < 48 << 20


def test_prefetched_batches_keep_their_order_and_errors_are_raised():
    assert list(itertools.islice(prefetch(lambda k: k * k), 50)) == [k * k for k in range(50)]

    def failing(k):
        if k == 5:
            raise UserError("the disk is gone")
        return k

    stream = prefetch(failing, depth=3)
    assert [next(stream) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="the disk is gone"):
        next(stream)


# ---- validation


@pytest.mark.parametrize("case", CASES)
def test_validation_batches_are_fixed_complete_and_shared_by_ranks(case):
    rng = np.random.default_rng(200 + case)
    (shard,) = random_shards(rng, n_shards=1)
    seq_len, size, world = (int(rng.integers(1, top)) for top in (30, 9, 5))
    whole = list(ValidBatches([shard], seq_len, size, 1000))
    targets = np.concatenate([y.numpy().ravel() for _, y in whole])
    assert targets[targets >= 0].tolist() == shard[1:].tolist()  # each token but the first, once
    assert all((x >= 0).all() for x, _ in whole)
    shared = [list(ValidBatches([shard], seq_len, size, 1000, r, world)) for r in range(world)]
    assert len({len(part) for part in shared}) == 1  # no rank waits for another
    for i, (x, y) in enumerate(whole):
        rank_x, rank_y = shared[i % world][i // world]
        assert (x == rank_x).all() and (y == rank_y).all()
    n_targets = sum(int((y >= 0).sum()) for part in shared for _, y in part)
    assert n_targets == len(shard) - 1
    few = list(ValidBatches([shard], seq_len, size, 2))
    n_windows = len(valid_windows([shard], seq_len))
    assert n_windows == -(-(len(shard) - 1) // seq_len)
    assert sum(len(x) for x, _ in few) == min(2 * size, n_windows)


def test_no_validation_document_is_trained_on(tmp_path, tokenizers):
    """All copies of a story, even with other spaces, are on the same side of the split."""
    rng = np.random.default_rng(0)
    texts = [f"Story {i}: Ben ran {i * 7} times." for i in range(300)]
    texts += [texts[i] for i in rng.integers(0, 300, 200)]
    texts += [texts[i].replace(" ", "  ") for i in rng.integers(0, 300, 100)]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    source = tmp_path / "a.txt"
    source.write_text("<|endoftext|>".join(texts))
    tokenizer = tokenizers[512]
    (tmp_path / "valid.txt").write_text("<|endoftext|>".join(texts[:30]))
    for valid in ("", str(tmp_path / "valid.txt")):
        files = plan_shards(str(source), valid)
        split = choose_split(files)
        meta = write_shards(str(tmp_path / "tok512"), tokenizer, files, split, 2, {})
        data = TokenData(DataPaths(tmp_path, "custom", 512), 8, tokenizer)
        trained = plain(d for shard in data.train for d in documents(shard, tokenizer))
        held_out = plain(d for shard in data.valid for d in documents(shard, tokenizer))
        assert trained and held_out and not held_out.keys() & trained.keys()
        assert held_out.keys() | trained.keys() == plain(texts).keys()
        expected = plain(texts)  # training leaves out copies of validation documents
        assert trained == Counter({d: n for d, n in expected.items() if d not in held_out})
        n_held_out = sum(expected[d] for d in held_out) if valid else 0
        assert meta["held_out"] == n_held_out
        assert held_out == plain(texts[:30]) if valid else held_out.keys() <= expected.keys()


def plain(texts):
    return Counter(" ".join(text.split()) for text in texts)


def documents(shard, tokenizer):
    starts = [*np.flatnonzero(shard == tokenizer.bos_id), len(shard)]
    return [tokenizer.decode(shard[a:b].tolist()) for a, b in itertools.pairwise(starts)]


def test_left_out_documents_are_reported_and_a_new_validation_text_takes_effect(tmp_path, stories):
    flags = [f"--data_dir={tmp_path}", "--vocab_size=105", f"--source={tmp_path / 'a.jsonl'}"]
    lines = [json.dumps({"text": text}) + "\n" for text in stories[:200]]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    for name, part in (("v1.jsonl", lines[:10]), ("v2.jsonl", lines[20:25])):
        (tmp_path / name).write_text("".join(part))
    assert script("tinystories.py", "train_vocab", *flags).returncode == 0
    for name, n in (("v1.jsonl", 10), ("v2.jsonl", 5)):
        done = script("tinystories.py", "pretokenize", *flags, f"--valid_source={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        note = f"left out {n} training documents that are in the validation text"
        assert note in done.stdout
        meta = json.loads((tmp_path / "tok105" / "shards.json").read_text())
        assert sum(s["documents"] for s in meta["shards"]) == 200
