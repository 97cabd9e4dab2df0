"""The repository itself: pins that agree, presets that can be read, and the bootstrap's steps."""

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import house
import pytest
import torch
from conftest import REPO

from model import ModelArgs, Transformer
from system import bootstrap
from training.settings import resolved


def tracked(*patterns):
    command = ["git", "ls-files", "--", *patterns]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True).stdout.splitlines()


def pins(path):
    lines = (REPO / path).read_text().splitlines()
    return {line.strip() for line in lines if "==" in line}


def test_pyproject_and_requirements_have_the_same_pins():
    text = (REPO / "pyproject.toml").read_text().split("plot = [")[0]  # further extras
    found = set(re.findall(r"""["']([\w.-]+==[^"']*(?:"[\d.]+")?)["']""", text))
    expected = pins("requirements.txt") | pins("requirements-dev.txt")
    expected.add("notebook==7.6.5")  # Jupyter's page, which tests do without
    assert {re.sub(r"\s", "", pin) for pin in found} == {re.sub(r"\s", "", p) for p in expected}
    assert "torch==2.13.0" in expected


def documented_presets():
    """{name: numbers of its row in config/README.md}"""
    rows = (REPO / "config" / "README.md").read_text().splitlines()
    rows = [row.replace(",", "").split("|") for row in rows if row.startswith("| `")]
    return {row[1].split("`")[1]: [float(number) for number in row[3:8]] for row in rows}


@pytest.mark.parametrize("path", sorted((REPO / "config").glob("*.py")), ids=lambda p: p.name)
def test_presets_are_what_their_table_says(path):
    settings = resolved((str(path),))
    sizes = {f.name: settings[f.name] for f in fields(ModelArgs) if f.name in settings}
    with torch.device("meta"):
        model = Transformer(ModelArgs(**sizes))
    tables = sum(p.numel() for name, p in model.named_parameters() if "embeddings" in name)
    tokens = settings["batch_size"] * settings["gradient_accumulation_steps"]
    tokens *= settings["max_seq_len"]
    gflop = round(model.flops_per_token() / 1e9, 3)
    expected = [model.n_params(), tables, tokens, settings["max_iters"], gflop]
    assert documented_presets()[path.stem] == expected


def test_the_model_tells_while_it_learns(monkeypatch, capsys):
    lines = ["20%, 240 of 1200 steps\n", "step 300: validation loss 0.4, the best so far\n", "x\n"]
    monkeypatch.setattr(bootstrap, "finished", lambda out_dir: False)
    monkeypatch.setattr(bootstrap, "output_of", lambda *command: "Once\nthere was")
    monkeypatch.setattr(bootstrap, "script", lambda *w, after: [after(line) for line in lines])
    with pytest.raises(bootstrap.StepFailed):
        bootstrap.train_model("model.bin", [])
    assert capsys.readouterr().out == '   it tells: "Once there was ..."\n'


def test_bootstrap_reads_pins_and_results(tmp_path):
    assert bootstrap.pinned_torch(REPO / "requirements.txt") == "2.13.0"
    assert bootstrap.torch_here() == "2.13.0"
    assert not bootstrap.finished(tmp_path) and not bootstrap.complete(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"kind": "end", "reason": "interrupted"}\n')
    assert not bootstrap.finished(tmp_path)
    (tmp_path / "log.jsonl").write_text(
        '{"kind": "start"}\n{"kind": "end", "reason": "finished"}\n'
    )
    assert bootstrap.finished(tmp_path)
    done = subprocess.run(
        [sys.executable, REPO / "system" / "bootstrap.py", "tale"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("error: expected: story")


def test_no_story_after_a_training_that_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap, "OUT", str(tmp_path))
    monkeypatch.setattr(bootstrap, "make_venv", lambda requirements: None)
    monkeypatch.setattr(bootstrap, "call", lambda *command, **options: None)
    (tmp_path / "log.jsonl").write_text('{"kind": "end", "reason": "interrupted"}\n')
    with pytest.raises(bootstrap.StepFailed, match="training was stopped; the same command"):
        bootstrap.story()
    assert "[7/7]" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_torch_that_is_there_is_used_and_a_broken_venv_made_again(tmp_path):
    """All the packages are seen behind .venv's own, so nothing is downloaded."""
    shutil.copy(REPO / "requirements.txt", tmp_path)
    (tmp_path / "system").mkdir()
    shutil.copy(REPO / "system" / "bootstrap.py", tmp_path / "system")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)  # as a venv without ensurepip leaves it
    command = [sys.executable, tmp_path / "system" / "bootstrap.py", "venv", "requirements.txt"]
    # the setuptools that Python 3.11 puts into a venv is older than torch asks for: leave that out
    offline = {**os.environ, "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1"}
    first, again = (
        subprocess.run(command, capture_output=True, text=True, env=offline) for _ in range(2)
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert "using the torch 2.13.0" in first.stdout and "there already" in again.stdout
    code = "import torch, sentencepiece, sys; print(sys.prefix, torch.__version__)"
    python = tmp_path / ".venv" / "bin" / "python"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path / '.venv'} 2.13.0")


def test_no_script_needs_an_optional_package():
    """What the scripts import at the top is the standard library and the core packages."""
    core = {"torch", "numpy", "sentencepiece", "requests", "tqdm"}
    paths = [REPO / path for path in tracked("*.py") if not path.startswith("tests/")]
    paths.remove(REPO / "formats" / "modeling_modded_llama.py")  # which transformers runs
    ours = {path.stem for path in REPO.glob("*.py")} | {path.name for path in REPO.iterdir()}
    for path in paths:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in (name.partition(".")[0] for name in names):
                assert name in core | ours | set(sys.stdlib_module_names), f"{path.name}: {name}"


def test_the_default_is_the_winning_recipe():
    """`python train.py` alone is the recipe of the speedrun, but for how long it runs."""
    recipe = resolved((str(REPO / "config" / "speedrun_cpu.py"),))
    default = resolved()
    differing = {name for name in default if default[name] != recipe[name]}
    assert differing <= {"max_iters", "compile"}


# ---- the arrows between modules


def test_every_module_is_on_a_floor():
    """If this fails: add the module to FLOORS of tests/house.py and to doc/architecture.md."""
    paths = house.module_paths().values()
    assert [path for path in paths if house.floor(path) == len(house.FLOORS)] == []


def test_imports_have_no_cycle():
    assert house.cycle(house.arrows()) == []


def test_nobody_imports_a_script():
    assert [(a, b) for a, b in house.arrows_of_paths() if b in house.SCRIPTS] == []


def test_no_import_points_up():
    """A module imports from its own floor, or from those before it in FLOORS of tests/house.py."""
    arrows = house.arrows_of_paths()
    assert [(a, b) for a, b in arrows if house.floor(b) > house.floor(a)] == []


def test_the_reader_of_imports_sees_all_of_them_but_those_of_a_main_block():
    source = """
import a.b, numpy
from c import d, e
def f():
    from .near import g
if __name__ == "__main__":
    import h
"""
    names = ["a", "a.b", "c", "c.d", "p.near", "h"]
    assert house.imports_of(source, "p.here", names) == {"a.b", "c", "c.d", "p.near"}
    assert house.cycle({"a": {"b"}, "b": {"a"}, "c": {"a"}}) in (["a", "b", "a"], ["b", "a", "b"])
    assert house.cycle({"a": {"b"}, "b": set()}) == []
