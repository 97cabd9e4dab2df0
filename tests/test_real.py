"""Tests with real stories and a real model, in the folder of the environment variable REAL_DATA."""

import json

import pytest
from conftest import TINY, script

STORIES_260K = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. \
One day, she saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. \
She said, "I want to play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she
"""


def test_stories260k_generates_its_known_text(real_data, run):
    folder = real_data / "models" / "stories260K"
    args = ["-z", folder / "tok512.bin", "-t", "0", "-n", "200"]
    done = run(folder / "stories260K.bin", *args)
    assert done.stdout.decode() == STORIES_260K


@pytest.mark.slow
def test_the_pipeline_runs_on_real_stories(real_data, tmp_path, run):
    stories = real_data / "tinystories"
    data, out = tmp_path / "data", tmp_path / "out"
    flags = [
        f"--data_dir={data}",
        f"--source={stories / 'TinyStories-sample-train.txt'}",
        f"--valid_source={stories / 'TinyStories-sample-valid.txt'}",
    ]
    for size in (105, 128, 512, 4096):
        for stage in ("train_vocab", "pretokenize"):
            done = script("tinystories.py", stage, f"--vocab_size={size}", *flags)
            assert done.returncode == 0, done.stderr
        meta = json.loads((data / f"tok{size}" / "shards.json").read_text())
        assert meta["shards"][0]["documents"] == 1000
        assert sum(s["documents"] for s in meta["shards"][1:]) == 16505
        assert sum(s["unk"] for s in meta["shards"]) == 0
    args = [*TINY, "--vocab_size=512", f"--data_dir={data}", f"--out_dir={out}"]
    args += ["--dim=64", "--batch_size=32", "--max_iters=200"]
    done = script("train.py", *args)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    curve = [e["val_bpb"] for e in log if e["kind"] == "eval"]
    assert curve[-1] < curve[0] - 0.5 and curve[-1] < 3.0
    assert run(out / "model.bin", "-n", "30", "-i", "Once upon a time").returncode == 0
