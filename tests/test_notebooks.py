"""The notebooks: each runs from start to end, and from_scratch notices when a part is wrong."""

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import (
    PATIENCE_S,
    REPO,
)
from nbclient import NotebookClient

# Every notebook, with environment variables that make its run small
NOTEBOOKS = {
    "Baby_Llama_128.ipynb": {
        "BABY_MINUTES": "0.1",
        "BABY_STORIES": "1000",
        "BABY_SAMPLES": "2",
    },
    "notebooks/from_scratch.ipynb": {},
    "notebooks/tokenizer.ipynb": {},
}

# A path that exists on one machine only: a string that starts at the root, or a user's folder
ABSOLUTE = re.compile(r"""["'](?:/\w|~/)|/(?:home|Users|root|tmp)/""")

# Code of from_scratch.ipynb, and the same code with a mistake
SLIPS = {
    "no-root": ("/ math.sqrt(head_dim)", "/ head_dim"),
    "eps-outside": ("torch.sqrt(mean_square + eps)", "(torch.sqrt(mean_square) + eps)"),
    "mask-one-off": (
        "triu(diagonal=1)\n    return softmax",
        "triu(diagonal=2)\n    return softmax",
    ),
    "wrong-rotation": (
        "(a * cos - b * sin, a * sin + b * cos)",
        "(a * cos + b * sin, b * cos - a * sin)",
    ),
    "halves": ("a, b = x[..., 0::2], x[..., 1::2]", "a, b = x.chunk(2, dim=-1)"),
    "gate": (
        "linear(silu(linear(x, w1)) * linear(x, w3), w2)",
        "linear(linear(x, w1) * silu(linear(x, w3)), w2)",
    ),
    "heads": (
        "t.repeat_interleave(n_heads // n_kv_heads, dim=1)",
        "t.repeat(1, n_heads // n_kv_heads, 1, 1)",
    ),
    "no-maximum": ("torch.exp(x - x.max(-1, keepdim=True).values)", "torch.exp(x)"),
    "a-sum": ("targets]).mean()", "targets]).sum()"),
    "post-norm": ("x = x + swiglu(h, w1, w2, w3)", "x = h + swiglu(h, w1, w2, w3)"),
    "no-correction": ("v_hat = v / (1 - betas[1] ** t)", "v_hat = v"),
    "l2": (
        "m.copy_(betas[0] * m + (1 - betas[0]) * g)",
        "g = g + decay * w; m.copy_(betas[0] * m + (1 - betas[0]) * g)",
    ),
    "sine": ("math.cos(math.pi * done)", "math.cos(math.pi / 2 * done)"),
    "clip-each": (
        "norm = torch.sqrt(sum(g.square().sum() for g in gradients))\n    if",
        "norm = max(g.norm() for g in gradients)\n    if",
    ),
}


def tracked(*patterns):
    command = ["git", "ls-files", "--", *patterns]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True).stdout.splitlines()


def read(name):
    return nbformat.read(REPO / name, as_version=nbformat.NO_CONVERT)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Copy the files in git, so that notebooks write nothing into the repository."""
    folder = tmp_path_factory.mktemp("copy")
    for path in tracked():
        if (REPO / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / path, folder / path)
    return folder


@pytest.fixture
def kernel(tmp_path_factory, monkeypatch):
    """Set up Jupyter with this Python as its only kernel and without user settings."""
    folder = tmp_path_factory.getbasetemp() / "jupyter"
    spec = folder / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    names = "JUPYTER_PATH JUPYTER_DATA_DIR JUPYTER_CONFIG_DIR JUPYTER_RUNTIME_DIR IPYTHONDIR"
    for name in [*names.split(), "MPLCONFIGDIR"]:
        path = folder if name == "JUPYTER_PATH" else folder / name.lower()
        path.mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def execute(name, folder, timeout=PATIENCE_S):
    """Run a notebook and return it with its outputs; raise CellExecutionError if a cell fails."""
    notebook = read(name)
    options = {"timeout": timeout, "kernel_name": "python3"}
    NotebookClient(
        notebook, resources={"metadata": {"path": str((folder / name).parent)}}, **options
    ).execute()
    return notebook


def test_every_notebook_is_tested():
    assert set(NOTEBOOKS) == set(tracked("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebooks_have_no_outputs_and_no_local_paths(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.get("id") for cell in notebook.cells]
    assert all(ids) and len(set(ids)) == len(ids)
    for cell in notebook.cells:
        assert not (match := ABSOLUTE.search(cell.source)), f"{cell.id}: {match[0]}"
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, copy, kernel, monkeypatch):
    for variable, value in NOTEBOOKS[name].items():
        monkeypatch.setenv(variable, value)
    notebook = execute(name, copy)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("slip", SLIPS)
def test_from_scratch_notices_a_mistake(slip, monkeypatch):
    """With one line changed, the cells before the training run must fail."""
    right, wrong = SLIPS[slip]
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "path", sys.path[:])
    cells = [
        cell for cell in read("notebooks/from_scratch.ipynb").cells if cell.cell_type == "code"
    ]
    sources = [cell.source for cell in cells[: [cell.id for cell in cells].index("train-data")]]
    assert sum(source.count(right) for source in sources) == 1
    names = {}
    with pytest.raises(AssertionError, match=r"difference of|nan|shapes"):
        for source in sources:
            exec(source.replace(right, wrong), names)


def test_a_notebook_outside_the_repository_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("notebooks/from_scratch.ipynb", "notebooks/tokenizer.ipynb"):
        first = next(cell for cell in read(name).cells if cell.cell_type == "code")
        with pytest.raises(RuntimeError, match="open this notebook in the notebooks folder"):
            exec(first.source, {})
