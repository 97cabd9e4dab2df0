"""The repository itself: version pins, presets, the steps of bootstrap.py, and imports."""

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
    # requirements-dev.txt has no pins of the extras from plot on
    text = (REPO / "pyproject.toml").read_text().split("plot = [")[0]
    actual = set(re.findall(r"""["']([\w.-]+==[^"']*(?:"[\d.]+")?)["']""", text))
    expected = pins("requirements.txt") | pins("requirements-dev.txt")
    expected.add("notebook==7.6.5")  # Jupyter's interface, which the tests do not need
    assert {re.sub(r"\s", "", pin) for pin in actual} == {re.sub(r"\s", "", p) for p in expected}
    assert "torch==2.13.0" in expected


def documented_presets():
    """{preset: values in its row of config/README.md}"""
    rows = (REPO / "config" / "README.md").read_text().splitlines()
    rows = [row.replace(",", "").split("|") for row in rows if row.startswith("| `")]
    return {row[1].split("`")[1]: [float(number) for number in row[3:8]] for row in rows}


@pytest.mark.parametrize("path", sorted((REPO / "config").glob("*.py")), ids=lambda p: p.name)
def test_presets_match_their_table(path):
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


def test_samples_are_printed_during_training(monkeypatch, capsys):
    lines = ["20%, 240 of 1200 steps\n", "step 300: validation loss 0.4, the best so far\n", "x\n"]
    monkeypatch.setattr(bootstrap, "finished", lambda out_dir: False)
    monkeypatch.setattr(bootstrap, "output_of", lambda *command: "Once\nthere was")
    monkeypatch.setattr(bootstrap, "script", lambda *args, on_line: [on_line(x) for x in lines])
    with pytest.raises(bootstrap.StepFailed):
        bootstrap.train_model("model.bin", [])
    assert capsys.readouterr().out == '   it writes: "Once there was ..."\n'


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


def test_no_story_after_training_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap, "OUT", str(tmp_path))
    monkeypatch.setattr(bootstrap, "make_venv", lambda requirements: None)
    monkeypatch.setattr(bootstrap, "call", lambda *command, **options: None)
    (tmp_path / "log.jsonl").write_text('{"kind": "end", "reason": "interrupted"}\n')
    with pytest.raises(bootstrap.StepFailed, match="training was stopped; run the same command"):
        bootstrap.story()
    assert "[7/7]" not in capsys.readouterr().out


@pytest.mark.slow
def test_an_installed_torch_is_reused_and_a_broken_venv_is_replaced(tmp_path):
    """.venv also sees the packages of the Python that made it, so nothing is downloaded."""
    shutil.copy(REPO / "requirements.txt", tmp_path)
    (tmp_path / "system").mkdir()
    shutil.copy(REPO / "system" / "bootstrap.py", tmp_path / "system")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)  # what a venv without ensurepip leaves
    command = [sys.executable, tmp_path / "system" / "bootstrap.py", "venv", "requirements.txt"]
    # Python 3.11 puts a setuptools into the venv that is too old for torch: ignore dependencies
    offline = {**os.environ, "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1"}
    first, second = (
        subprocess.run(command, capture_output=True, text=True, env=offline) for _ in range(2)
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert "using torch 2.13.0" in first.stdout and "already exists" in second.stdout
    code = "import torch, sentencepiece, sys; print(sys.prefix, torch.__version__)"
    python = tmp_path / ".venv" / "bin" / "python"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path / '.venv'} 2.13.0")


def test_no_script_needs_an_optional_package():
    """At the top, the scripts import only the standard library and the core packages."""
    core = {"torch", "numpy", "sentencepiece", "requests", "tqdm"}
    paths = [REPO / path for path in tracked("*.py") if not path.startswith("tests/")]
    paths.remove(REPO / "formats" / "modeling_modded_llama.py")  # runs inside transformers
    ours = {path.stem for path in REPO.glob("*.py")} | {path.name for path in REPO.iterdir()}
    for path in paths:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in (name.partition(".")[0] for name in names):
                assert name in core | ours | set(sys.stdlib_module_names), f"{path.name}: {name}"


def test_the_default_is_the_winning_recipe():
    """`python train.py` uses the recipe of the speedrun, except for the length of the run."""
    recipe = resolved((str(REPO / "config" / "speedrun_cpu.py"),))
    default = resolved()
    differing = {name for name in default if default[name] != recipe[name]}
    assert differing <= {"max_iters", "compile"}


# ---- imports between modules


def test_every_module_is_on_a_floor():
    """If this fails, add the module to FLOORS in tests/house.py and to doc/architecture.md."""
    paths = house.module_paths().values()
    assert [path for path in paths if house.floor(path) == len(house.FLOORS)] == []


def test_imports_have_no_cycle():
    assert house.cycle(house.arrows()) == []


def test_nobody_imports_a_script():
    assert [(a, b) for a, b in house.arrows_of_paths() if b in house.SCRIPTS] == []


def test_no_import_points_up():
    """A module imports from its own floor, or from earlier ones in FLOORS in tests/house.py."""
    arrows = house.arrows_of_paths()
    assert [(a, b) for a, b in arrows if house.floor(b) > house.floor(a)] == []


def test_imports_are_found_everywhere_except_in_main_blocks():
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
