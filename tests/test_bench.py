"""bench/, and the helpers that it shares with sweep.py."""

import re
import shutil

import pytest
import torch
from conftest import REPO, random_model, refused, script

from configurator import UserError, apply
from formats.modelbin import export_model
from system import wasm
from system.browser import Chromium, Firefox
from training.runs import same_run
from training.settings import resolved


def test_resolved_applies_files_and_flags_to_the_settings_of_train():
    assert resolved()["arch"] == "modded"
    assert resolved()["qk_norm"] is True
    settings = resolved(("config/plain_llama2c.py", "--seed=3", "--arch=portable"))
    assert settings["dtype"] == "float32" and settings["seed"] == 3
    assert settings["qk_norm"] and settings["bigram_rows"] == 0 and "START" not in settings
    assert resolved(("--arch=portable", "--qk_norm=False"))["qk_norm"] is False
    with pytest.raises(Exception, match="did you mean --dim"):
        resolved(("--dimm=3",))


def test_runs_that_differ_only_in_out_dir_are_the_same():
    assert same_run({"seed": 1}, {"seed": 1, "out_dir": "elsewhere"})
    assert not same_run({"seed": 1}, {"seed": 2})


def test_every_benchmark_is_listed_and_lists_its_settings():
    names = {path.stem for path in (REPO / "bench").glob("*.py")} - {
        "__init__",
        "__main__",
        "common",
        "random_models",
    }
    listed = script("bench").stdout
    assert listed.count("python -m bench.") == len(names) == 7
    for name in names:
        assert f"python -m bench.{name} " in listed
        done = script(f"bench.{name}", "--help")
        assert done.returncode == 0 and f"usage: python -m bench.{name} [--key=value" in done.stdout


def test_benchmarks_read_override_files_of_the_repository(tmp_path, monkeypatch):
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


@pytest.mark.slow
@pytest.mark.skipif(not list(wasm.compilers()), reason="needs clang, lld and wasi-libc")
def test_page_measures_the_programs_that_are_installed(builds, tokenizers, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizers[512].proto)
    model = random_model(vocab_size=512, max_seq_len=200, dim=128, n_layers=4)
    with torch.no_grad():
        model.output.weight[1:3] = 0  # so that few stories end early
    export_model(model, tmp_path / "model.bin")
    flags = f"--stories=3 --page_rounds=1 --length=200 --folder={tmp_path / 'pages'}".split()
    flags += [f"--engine={builds['run', 'fast']}", f"--checkpoint={tmp_path / 'model.bin'}"]
    done = script("bench.page", *flags)
    assert done.returncode == 0, done.stderr
    programs = {"./run -j 1": True, "Node": shutil.which("node")}
    programs |= {"Chromium": Chromium.path(), "Firefox": Firefox.path()}
    rows = {
        name for name in programs if re.search(rf"^{re.escape(name)} +[0-9]", done.stdout, re.M)
    }
    assert rows == {name for name, is_there in programs.items() if is_there}


def test_wrong_arguments_are_refused(tmp_path):
    refused(script("bench", "train"), "'train'", "python -m bench")
    refused(script("bench.train", "--ways=fast"), "'fast'", "plain, eager")
    refused(script("bench.train", f"--llama2c={tmp_path}"), "not a checkout")
    refused(script("bench.infer", "--engine=nowhere"), "'nowhere' does not exist", "make run")
    refused(script("bench.page", "--engine=nowhere"), "'nowhere' does not exist", "make run")
    refused(script("bench.page", "--engine=run.c", "--dtype=int2"), "'int2'", "int8, int4")
    refused(script("bench.tokenizer"), "--source=PATH is missing: pass a .txt file")
    refused(script("bench.scaling", "--processes=one"), "'one'", "like 1,2")
