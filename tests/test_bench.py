"""bench/ and what it shares with sweep.py: reading runs, times to a target."""

import json
import math
from pathlib import Path

import pytest
from conftest import REPO, TINY, refused, script

from configurator import UserError, apply
from dataset import DataPaths
from training import runs as trials
from training.settings import resolved


def line(minutes, bpb, **more):
    """An evaluation of a made-up log: with all others, a fifth longer than training alone."""
    return {
        "kind": "eval",
        "step": int(100 * minutes),
        "tokens": int(1e5 * minutes),
        "train_s": 60 * minutes,
        "time_s": 72 * minutes,
        "val_loss": 2 * bpb,
        "val_bpb": bpb,
        **more,
    }


def write_log(folder, settings, evals, reason="finished"):
    folder.mkdir(parents=True)
    start = {"kind": "start", "config": settings, "commit": "0" * 40}
    now = {name: evals[-1][name] for name in ("step", "tokens", "time_s", "train_s")}
    lines = [start, *evals, {"kind": "end", "reason": reason, **now}]
    (folder / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_settings_of_train_are_its_own_with_the_words_and_the_preset():
    assert resolved()["arch"] == "modded"
    assert resolved()["qk_norm"] is True
    found = resolved(("config/plain_llama2c.py", "--seed=3", "--arch=portable"))
    assert found["dtype"] == "float32" and found["seed"] == 3
    assert found["qk_norm"] and found["bigram_rows"] == 0 and "START" not in found
    assert resolved(("--arch=portable", "--qk_norm=False"))["qk_norm"] is False
    with pytest.raises(Exception, match="did you mean --dim"):
        resolved(("--dimm=3",))


def test_a_log_is_a_run_only_where_it_came_to_its_end(tmp_path):
    assert trials.read_run(tmp_path) is None
    write_log(tmp_path / "whole", {"seed": 1}, [line(1, 2.0), line(2, 1.5)])
    run = trials.read_run(tmp_path / "whole")
    assert [e["val_bpb"] for e in run["evals"]] == [2.0, 1.5]
    assert trials.same_run(run["start"]["config"], {"seed": 1, "out_dir": "elsewhere"})
    assert not trials.same_run(run["start"]["config"], {"seed": 2})
    write_log(tmp_path / "stopped", {}, [line(1, 2.0)], reason="interrupted")
    assert trials.read_run(tmp_path / "stopped") is None
    log = tmp_path / "whole" / "log.jsonl"
    log.write_text(log.read_text()[:-10])  # killed while it wrote
    assert trials.read_run(tmp_path / "whole") is None


def test_times_to_a_target_are_interpolated():
    evals = [line(1, 2.0), line(2, 1.0), line(3, 1.2), line(4, 0.8)]
    assert trials.time_to(evals, 1.5) == 90
    assert trials.time_to(evals, 1.5, "time_s") == 108
    assert trials.time_to(evals, 1.0) == 120
    assert trials.time_to(evals, 0.9) == pytest.approx(225)
    assert trials.time_to(evals, 2.5) == 60  # at the first evaluation or before it
    assert trials.time_to(evals, 0.5) == math.inf


def test_a_race_compares_both_clocks():
    plain = {"evals": [line(5, 2.0), line(10, 1.0)]}
    ours = {"evals": [line(1, 1.5), line(2, 0.5)]}
    found = trials.race(plain, ours, {"evals": [line(0.5, 1.0, time_s=60)]})
    assert found["target"] == 1.0 and found["ours_final"] == 0.5
    assert found["ours_train_s"] == 90 and found["ours_train_s_ratio"] == pytest.approx(600 / 90)
    assert found["sprint_train_s_ratio"] == 20 and found["plain_all_s"] == 660
    assert found["sprint_all_s_ratio"] == 11 and found["ours_all_s"] == 102
    missed = trials.race(plain, ours, {"evals": [line(0.5, 1.01)]})
    assert missed["sprint_train_s"] == math.inf and missed["sprint_train_s_ratio"] == 0


@pytest.fixture
def recipe(tmp_path):
    """The tiny model of the tests as a recipe: an override file."""
    path = tmp_path / "tiny.py"
    pairs = [word.removeprefix("--").split("=") for word in TINY if "device" not in word]
    texts = [f"{k} = {v!r}" if k == "dtype" else f"{k} = {v}" for k, v in pairs]
    path.write_text("\n".join(texts))
    return path


@pytest.mark.slow
def test_speedrun_does_not_repeat_complete_runs(tmp_path, recipe):
    """All runs of two seeds are complete, so nothing is trained and no shard is read."""
    out, data = tmp_path / "out", tmp_path / "data"
    shards = Path(DataPaths(data, "custom", resolved((str(recipe),))["vocab_size"]).shards)
    shards.mkdir(parents=True)
    (shards / "data00.bin").touch()
    curves = {
        "plain": (10, 50, [line(5, 2.0), line(10, 1.0)]),
        "ours": (10, 500, [line(2, 1.5), line(4, 0.9), line(10, 0.6)]),
        "sprint": (10 / 30, 1_000_000_000, [line(0.6, 0.95)]),
    }
    for seed in (1337, 1338):
        for name, (minutes, interval, evals) in curves.items():
            words = f"--data_dir={data} --device=cpu --max_minutes={minutes} --seed={seed} "
            words += f"--eval_interval={interval} --eval_iters=250"
            settings = resolved((str(recipe), *words.split()))
            write_log(out / f"{name}-{seed}", settings, evals)
    flags = [f"--data_dir={data}", f"--out={out}", "--seeds=2", "--device=cpu"]
    flags += [f"--plain={recipe}", f"--ours={recipe}", f"--sprint={recipe}"]
    flags += ["--plain_eval_interval=50", "--ours_eval_interval=500"]
    done = script("bench.speedrun", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is complete") == 6 and "training plain" not in done.stdout
    assert "final: plain 1.0000, ours 0.6000, ours in 0.33 minutes 0.9500" in done.stdout
    lines = done.stdout.splitlines()
    ours, sprint = (next(t for t in lines if end in t) for end in ("on its way", "ends there"))
    assert ours.split()[-6:] == ["220", "s", "2.7x", "244", "s", "2.7x"]
    assert sprint.split()[-6:] == ["36", "s", "16.7x", "43", "s", "15.3x"]
    result = json.loads((out / "speedrun.json").read_text())
    assert result["median"]["target"] == 1.0 and len(result["seeds"]) == 2
    assert [e["val_bpb"] for e in result["runs"]["ours"][1]["evals"]] == [1.5, 0.9, 0.6]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "pip install matplotlib" in done.stdout
    else:
        assert (out / "speedrun.png").read_bytes().startswith(b"\x89PNG")


def test_every_benchmark_is_listed_and_lists_its_settings():
    names = {path.stem for path in (REPO / "bench").glob("*.py")} - {
        "__init__",
        "__main__",
        "common",
    }
    listed = script("bench").stdout
    assert listed.count("python -m bench.") == len(names) == 7
    for name in names:
        assert f"python -m bench.{name} " in listed
        done = script(f"bench.{name}", "--help")
        assert done.returncode == 0 and f"usage: python -m bench.{name} [--key=value" in done.stdout


def test_benchmarks_take_override_files_of_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"__file__": str(REPO / "bench" / "loader.py"), "batch_size": 1}
    with pytest.raises(UserError, match=r"config/story.py: unknown setting"):
        apply(settings, ["config/story.py"])


def test_loader_and_checkpoint_print_their_tables():
    done = script("bench.loader", "--n_tokens=20000", "--batch_size=2", "--max_seq_len=32")
    assert done.returncode == 0, done.stderr
    assert [row.split()[0] for row in done.stdout.splitlines()[-2:]] == ["alone", "in"]
    run = "--dim=32 --n_layers=1 --n_heads=2 --vocab_size=64 --max_seq_len=16 --batch_size=1"
    done = script("bench.checkpoint", f"--run={run}", "--save_interval=2", "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert "a checkpoint of 0 MB" in done.stdout and "+0.0%" in done.stdout


def test_train_measures_a_shape(tmp_path):
    given = "--dim=32 --n_layers=2 --n_heads=4 --vocab_size=128 --batch_size=2"
    flags = "--shapes=given --train_rounds=2 --train_steps=1 --ways=plain,eager --device=cpu"
    done = script("bench.train", f"--given={given}", *flags.split())
    assert done.returncode == 0, done.stderr
    rows = [text.split() for text in done.stdout.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["plain", "eager"]
    assert rows[0][4] == "1.00x" and rows[0][5].endswith("%")


def test_wrong_words_are_one_sentence(tmp_path):
    refused(script("bench", "train"), "'train'", "python -m bench")
    refused(script("bench.train", "--ways=fast"), "'fast'", "plain, eager")
    refused(script("bench.train", f"--llama2c={tmp_path}"), "not a checkout")
    refused(script("bench.speedrun", "--minutes=0"), "above 0")
    words = [f"--data_dir={tmp_path}", f"--out={tmp_path}"]
    refused(script("bench.speedrun", *words), "train_vocab --vocab_size=4096", "pretokenize")
    refused(script("bench.infer", "--engine=nowhere"), "'nowhere' does not exist", "make run")
    refused(script("bench.tokenizer"), "--source=PATH is missing")
    refused(script("bench.scaling", "--processes=one"), "'one'", "like 1,2")
