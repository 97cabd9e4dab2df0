"""plot.py: curves from logs, pictures of runs and sweeps, and the live page."""

import contextlib
import functools
import http.client
import json
import math
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys

import pytest
from conftest import (
    PATIENCE_S,
    REPO,
    TINY,
    refused,
    script,
    wait_until,
)

from configurator import UserError
from formats.table import training_facts
from report import sweeps
from report.curves import find_runs, smooth, thinned
from report.live import MAX_CLIENTS, state_of
from report.pictures import THEMES, draw_runs, draw_sweep
from report.sweeps import compare, pooled_sd, sort_results, summarize, sweep_axes
from training import runlog

needs_matplotlib = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("matplotlib"), reason="needs matplotlib"
)


def log_of(folder, n_steps=60, end=None, **config):
    """Write a log like train.py's, with a falling loss; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"max_iters": 100, "max_minutes": 0.0, **config}
    lines = [{"kind": "start", "config": settings, "rates": {"hidden": 0.02, "head": 0.01}}]
    for step in range(1, n_steps + 1):
        clock = {
            "step": step,
            "tokens": 512 * step,
            "time_s": 5 + 0.6 * step,
            "train_s": 0.5 * step,
        }
        noise = 0.1 * math.sin(7 * step)
        values = {"loss": 3 + 3 / step + noise, "lr": 0.02, "grad_norm": 1.0, "tok_s": 1000}
        lines.append({"kind": "train", **clock, **values})
        if step % 20 == 0:
            lines.append(
                {"kind": "eval", **clock, "val_loss": 3 + 3 / step, "val_bpb": 1 + 1 / step}
            )
    if end:
        lines.append({"kind": "end", "reason": end, **clock})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


LENGTH = {"steps": 2, "tokens": 2, "train_s": 2}


def sweep_result(status="finished", val=1.0, **varied):
    curve = [
        {"step": s, "tokens": s, "train_s": s, "val_loss": val, "val_bpb": val + 1 / s}
        for s in (1, 2)
    ]
    name = "_".join(f"{k}={v}" for k, v in varied.items())
    result = {"name": name, "sweep": "a sweep", "varied": varied, "status": status, "config": {}}
    if status == "failed":
        return {**result, "error": "it failed"}
    final = val if status == "finished" else None
    return {**result, "val_bpb": final, "val_loss": final, "curve": curve, **LENGTH}


def test_a_log_is_read_as_it_grows(tmp_path):
    folder = log_of(tmp_path / "out")
    [run] = find_runs([folder])
    assert len(run.train) == 60 and len(run.evals) == 3 and not run.end
    with open(run.path, "a") as f:
        f.write('{"kind": "train", "step": 61, "loss')  # half a line
        f.flush()
        assert len(run.read().train) == 60
        clock = '"tokens": 9, "time_s": 3, "train_s": 2'
        f.write(
            f'": 2.0, {clock}}}\n{{"kind": "end", "reason": "finished", "step": 61, {clock}}}\n'
        )
    run.read()
    assert (run.train[-1]["step"], run.train[-1]["loss"]) == (61, 2.0) and run.end
    log_of(tmp_path / "new", n_steps=5)  # train.py writes a resumed log under a new name
    os.replace(tmp_path / "new" / "log.jsonl", run.path)
    assert len(run.read().train) == 5 and not run.end


def test_runs_are_found_by_their_folder_or_its_parent(tmp_path):
    for name in ("a", "b", "previous"):
        log_of(tmp_path / "sweep" / name)
    names = [run.name for run in find_runs([str(tmp_path / "sweep")])]
    assert [name.split("/")[-1] for name in names] == ["a", "b"]
    assert [run.name for run in find_runs([str(tmp_path / "sweep" / "a")])] == ["a"]


def test_smoothing_keeps_a_straight_line_and_removes_noise():
    falling = [10 - 0.1 * i for i in range(80)]
    # it does not lag
    assert smooth(falling, 0.02)[10:-10] == pytest.approx(falling[10:-10], abs=0.01)
    noisy = [math.sin(100 * i) for i in range(1000)]
    assert max(map(abs, smooth(noisy, 0.02)[50:-50])) < 0.1
    assert smooth([5.0] * 7, 0.1) == pytest.approx([5.0] * 7)
    assert smooth(noisy, 0) == noisy
    assert thinned(list(range(1000)), 11) == [round(999 * i / 10) for i in range(11)]


def test_a_sweep_is_summarized_by_setting_and_seed():
    lines = [
        sweep_result(val=v, lr=lr, seed=seed)
        for seed, lr, v in ((1, 0.1, 2.0), (1, 0.01, 1.0), (2, 0.1, 2.5), (2, 0.01, 1.5))
    ]
    lines += [sweep_result("diverged", lr=1.0, seed=1), sweep_result("failed", lr=2.0, seed=1)]
    x, series = sweep_axes(lines)
    assert (x, series) == ("lr", [])
    assert summarize(lines, x, series, "val_bpb") == [
        ("", [(0.01, [1.0, 1.5], 0), (0.1, [2.0, 2.5], 0), (1.0, [], 1)])
    ]
    grid = [sweep_result(batch=b, lr=lr, seed=1) for lr in (3, 1, 2) for b in (8, 4)]
    assert sweep_axes(grid) == ("lr", ["batch"]) and sweep_axes(grid, "batch") == ("batch", ["lr"])
    assert [line["varied"]["lr"] for line in sort_results(grid, "lr", ["batch"])] == 2 * [1, 2, 3]
    assert [sweeps.format_value(v) for v in (3e-4, 0.01, "x")] == ["3e-4", "0.01", "x"]


def write_results(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@needs_matplotlib
@pytest.mark.parametrize(("theme", "ending"), [("light", "png"), ("dark", "svg")])
def test_pictures_of_runs_and_sweeps(tmp_path, theme, ending):
    log_of(tmp_path / "a", end="finished")
    log_of(tmp_path / "b", n_steps=30)
    numbers = [sweep_result(val=s * lr, lr=lr, seed=s) for s in (1, 2) for lr in (0.1, 1.0)]
    numbers += [sweep_result("diverged", lr=10.0, seed=1)]
    names = [sweep_result(val=s, run=f"a name {s}", seed=1) for s in (1, 2)]
    out, pages = str(tmp_path / f"picture.{ending}"), []
    draw_one_panel = functools.partial(draw_runs, xs=["steps"], panels=["loss"])
    for draw, data in (
        (draw_one_panel, find_runs([str(tmp_path / "a")])),
        (draw_one_panel, find_runs([str(tmp_path / name) for name in "ab"])),
        (draw_sweep, numbers),
        (draw_sweep, names),
    ):
        draw(data, out, theme=theme)
        pages.append((tmp_path / out).read_bytes())
    if ending == "png":
        from matplotlib.image import imread

        picture = imread(out)[..., :3]
        assert picture[0, 0].mean() > 0.9  # the background is white
        assert len({tuple(p) for p in picture.reshape(-1, 3).round(1)}) > 5  # it shows something
    else:
        assert all(page.startswith(b"<?xml") and b"<svg" in page for page in pages)
        assert all(THEMES["dark"][1].encode() in page for page in pages)
    assert len(set(pages)) == 4


@needs_matplotlib
def test_several_runs_go_into_one_picture(tmp_path):
    """As one argument or several; the name of a run may contain commas, as in sweeps."""
    a, b = log_of(tmp_path / "lr=1,2", end="finished"), log_of(tmp_path / "b", n_steps=30)
    for args in ([f"{a},{b}"], [a, b], [a], [f"{b}, {a}"]):
        done = script("plot.py", *args, f"--out={tmp_path / 'ab.svg'}", "--theme=dark")
        assert done.returncode == 0, done.stderr
        assert "ab.svg" in done.stdout
        picture = (tmp_path / "ab.svg").read_text()
        assert picture.startswith("<?xml") and "lr=1,2" in picture
        (tmp_path / "ab.svg").unlink()


@needs_matplotlib
def test_a_sweep_is_drawn_and_printed(tmp_path):
    lines = [sweep_result(val=v, lr=0.1, seed=i) for i, v in enumerate((1.0, 2.0))]
    lines += [sweep_result("diverged", lr=1.0, seed=1), sweep_result("failed", lr=2.0, seed=1)]
    done = script("plot.py", write_results(tmp_path / "results.jsonl", lines))
    assert "1.5000 ± 0.7071 (2)" in done.stdout and "1 diverged" in done.stdout
    assert "lr=2.0_seed=1 failed: it failed" in done.stdout and "1 failed" in done.stdout
    assert (tmp_path / "results.png").exists()


# ---- logs and results from strangers or damaged disks

CLOCK = {"step": 1, "tokens": 2, "time_s": 1.0, "train_s": 1.0}
GOOD = {"kind": "train", **CLOCK, "loss": 2.0}
DAMAGED = [
    *(b"", b"[1]", b'"text"', b"null", b"{}", b'{"kind": []}', b'{"kind": "other"}', b"\xff\xfe\0"),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"x" * 10_000_000, b"9" * 5000),
    *(
        json.dumps({**GOOD, "loss": value}).encode()
        for value in (math.nan, -math.inf, "2", [2], {})
    ),
    *(json.dumps({**GOOD, "step": value}).encode() for value in (10**400, -1, 1.5, True, None)),
    json.dumps(GOOD).replace("2.0", "1e999").encode(),
    json.dumps({"kind": "train", "step": 1}).encode(),
    json.dumps({"kind": "end", **CLOCK, "reason": "\x1b[31m"}).encode(),
    json.dumps({"kind": "start", "config": {"max_iters": "100"}}).encode(),
    json.dumps({"kind": "start", "config": {}, "rates": {"hidden": 0}}).encode(),
]


def test_lines_that_are_not_from_train_py_are_skipped_and_counted(tmp_path, serve):
    folder = log_of(tmp_path / "out")
    with open(folder / "log.jsonl", "ab") as f:
        f.writelines(line + b"\n" for line in DAMAGED)
    [run] = find_runs([folder])
    assert len(run.train) == 60 and run.n_skipped == len(DAMAGED) - 1  # not the empty line
    [state] = json.loads(get(serve(folder, "--start="), "/data.json")[1])["runs"]
    assert state["step"] == 60 and state["skipped"] == len(DAMAGED) - 1
    with open(folder / "log.jsonl", "a") as f:
        print(json.dumps({**GOOD, "step": 61}), file=f)
    assert run.read().train[-1]["step"] == 61


def test_a_long_log_is_thinned_but_keeps_its_latest_line(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "MAX_LINES", 20)
    folder = log_of(tmp_path / "out", n_steps=999, end="finished")
    [run] = find_runs([folder])
    steps = [line["step"] for line in run.train]
    assert 10 <= len(steps) <= 20 and steps == sorted(steps) and steps[-1] == 999 and steps[0] < 99
    assert run.best["step"] == 980 and 10 <= len(run.evals) <= 20
    assert run.n_skipped == 0 and run.read().train[-1]["step"] == 999 and run.end


ODD = [
    *(None, True, -1, 0, 2.5, 1e39, 1e300, math.nan, math.inf, 10**30, 10**400),
    *("", "text", "\x1b[31m", "\ud800", "<b>", [], [1, "a"], {}, {"a": {"b": []}}, "x" * 5000),
]


def places_in(value, path=()):
    """Yield the path of every value in a parsed line, including nested objects and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, inner in items if isinstance(value, (dict, list)) else ():
        yield (*path, name)
        if isinstance(inner, (dict, list)):
            yield from places_in(inner, (*path, name))


def mutated(lines, rng):
    """Replace or remove a few values in parsed lines, and sometimes damage a byte."""
    lines = json.loads(json.dumps(lines))
    for _ in range(rng.randrange(1, 6)):
        line = rng.choice(lines)
        *path, name = rng.choice(list(places_in(line)) or [("kind",)])
        for step in path:
            line = line[step]
        if rng.random() < 0.2 and isinstance(line, dict):
            line.pop(name, None)
        else:
            line[name] = rng.choice(ODD)
    data = bytearray("".join(json.dumps(line) + "\n" for line in lines).encode())
    if rng.random() < 0.2:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


@pytest.mark.slow
@needs_matplotlib
@pytest.mark.filterwarnings("ignore")
def test_no_mutated_log_causes_a_traceback(tmp_path):
    """300 logs, each turned into the page's JSON; every tenth is drawn too, which is slow."""
    rng = random.Random(0)
    log_of(tmp_path, n_steps=25, end="finished")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    lines[0] |= {"n_params": 5, "device_name": "a CPU", "model_args": {"dim": 4}}
    lines = [*lines[:2], *lines[19:23], *lines[-2:]]
    n_drawn = 0
    for i in range(300):
        (tmp_path / "log.jsonl").write_bytes(mutated(lines, rng))
        [run] = find_runs([tmp_path])
        json.dumps(state_of(run, 60), allow_nan=False)
        training_facts({"iter_num": 20}, tmp_path)
        with contextlib.suppress(UserError):
            if i % 10 == 0:
                draw_runs([run], str(tmp_path / "a.svg"), ["steps"])
                n_drawn += 1
    assert n_drawn > 20


@pytest.mark.slow
@needs_matplotlib
@pytest.mark.filterwarnings("ignore")
def test_no_mutated_results_cause_a_traceback(tmp_path):
    rng = random.Random(0)
    hardware = {"device_name": "a CPU", "threads": 2, "platform": "Linux", "torch": "2"}
    facts = {"hardware": hardware, "commit": "0123", "title": "a title", "arguments": "--a=b"}
    lines = [sweep_result(val=v, lr=lr, seed=1) | facts for lr, v in ((0.1, 1.0), (1.0, 2.0))]
    lines += [sweep_result("diverged", lr=2.0, seed=1), sweep_result("failed", lr=3.0, seed=1)]
    n_read = 0
    for i in range(300):
        (tmp_path / "results.jsonl").write_bytes(mutated(lines, rng))
        with contextlib.suppress(UserError):
            results = sweeps.read_sweep(str(tmp_path / "results.jsonl"))
            text = sweeps.section(results)
            assert "\x1b" not in sweeps.title_of(results) and text
            n_read += 1
            if i % 10 == 0:  # drawing is slow
                draw_sweep(results, str(tmp_path / "a.svg"))
    assert n_read > 200


@needs_matplotlib
def test_control_characters_in_results_do_not_reach_the_terminal(tmp_path):
    lines = [sweep_result(val=v, run=f"\x1b[2J{v}", seed=1) for v in (1.0, 2.0)]
    lines[0]["title"] = "\x1b]0;owned\x07"
    lines.append({**sweep_result("failed", run="c", seed=1), "error": "\x9b31m"})
    done = script("plot.py", write_results(tmp_path / "results.jsonl", lines))
    assert done.returncode == 0, done.stderr
    assert r"\x1b]0;owned\x07" in done.stdout and r"\x9b31m" in done.stdout
    assert all(c.isprintable() or c == "\n" for c in done.stdout)


@needs_matplotlib
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_an_error(tmp_path, unbuffered):
    """Covers the exception hook and the exit of every script that calls configure()."""
    command = [sys.executable, REPO / "plot.py", log_of(tmp_path / "out")]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as f:
        done = subprocess.run(command, stdout=f, stderr=subprocess.PIPE, text=True, env=environment)
    refused(subprocess.CompletedProcess(command, done.returncode, "", done.stderr), "No space left")
    assert done.stderr.count("\n") == 1


# ---- tables


def test_differences_within_two_standard_errors_are_noise():
    groups = [1.0, 1.1, 0.9], [2.0, 2.4, 1.6], [5.0]  # variances 0.01, 0.16, and unknown
    assert pooled_sd(groups) == pytest.approx(math.sqrt((0.01 + 0.16) / 2))
    assert pooled_sd([[1.0], [2.0]]) is None
    base = [1.0, 1.1, 0.9]
    difference, is_beyond_noise = compare([1.2, 1.3, 1.1], base, 0.1)  # an error of 0.0816
    assert difference == pytest.approx(0.2) and is_beyond_noise
    assert compare([1.15, 1.25, 1.05], base, 0.1)[1] is False
    assert compare([1.2], base, 0.1)[1] is False  # of one run, 0.115
    assert compare([1.5], base, None)[1] is None


def test_the_table_compares_each_option_with_its_base(tmp_path):
    hardware = {"device_name": "a CPU", "threads": 2, "platform": "Linux", "torch": "2"}
    lines = []
    for name, val, train_s, arguments in (
        ("recipe", 1.0, 10, ""),
        ("softcap", 1.02, 20, "--logit_softcap=15"),
        ("llama", 1.5, 5, "--arch=llama"),
        ("better", 0.99, 10, ""),
        ("llama+smear", 1.4, 5, "--arch=llama --smear=True"),
    ):
        for seed in (1, 2, 3):
            line = sweep_result(val=val + (seed - 2) / 100, run=name, seed=seed)
            line |= {"train_s": train_s, "steps": 100, "tokens": 1000, "arguments": arguments}
            lines.append({**line, "hardware": hardware, "commit": "0123456789abcdef"})
    lines.append(sweep_result("failed", run="broken", seed=1))
    rows = {row[0]: row[1:] for row in sweeps.table(lines)}
    # best first; rows compared with Llama come after those compared with the recipe
    assert list(rows)[1:] == ["better", "recipe", "softcap", "llama", "broken", "llama+smear"]
    assert rows["recipe"] == ["", "1.0000 ± 0.0100 (3)", "", "", "", "100", "1.00"]
    assert rows["softcap"] == (
        ["`--logit_softcap=15`", "1.0200 ± 0.0100 (3)", "+0.0200", "yes", "never", "200", "0.50"]
    )
    assert rows["better"][2:4] == ["-0.0100", "no"]
    assert rows["llama"][2:] == ["+0.5000", "yes", "never", "50", "2.00"]
    assert rows["llama+smear"][2:] == ["-0.1000", "yes", "never", "50", "1.00"]
    assert rows["broken"] == ["", "1 failed", "", "", "", "", ""]
    text = sweeps.section(lines)
    assert "## a sweep" in text and "`recipe`" in text and "a CPU, 2 threads" in text
    assert "a single run deviates by 0.0100" in text and "Commit: 012345678." in text
    assert "| softcap" in text and "- run=broken_seed=1 failed: it failed" in text
    one_seed = {row[0]: row[1:] for row in sweeps.table([x for x in lines if x["name"][-1] == "2"])}
    assert one_seed["softcap"][1:4] == ["1.0200 (1)", "+0.0200", "?"]


def test_times_to_a_value_are_interpolated():
    pairs = enumerate([2.0, 1.0, 1.2, None, 0.8], 1)
    curve = [{"train_s": 60 * minutes, "val_bpb": bpb} for minutes, bpb in pairs]
    for target, seconds in ((1.5, 90), (1.0, 120), (0.9, 270), (2.5, 60), (0.5, math.inf)):
        assert sweeps.time_to(curve, target, "val_bpb") == pytest.approx(seconds)
    slow, fast = (sweep_result(val=val, run=name) for name, val in (("slow", 1.5), ("fast", 1.0)))
    slow["train_s"] = 12
    assert sweeps.table([slow, fast])[1][5] == "2 s (6.0 x)"


@needs_matplotlib
def test_tables_are_written_to_a_file(tmp_path):
    lines = [sweep_result(val=v, run=name, seed=1) for name, v in (("a", 1.0), ("b", 2.0))]
    paths = [write_results(tmp_path / f"{i}.jsonl", lines) for i in range(2)]
    table = tmp_path / "table.md"
    done = script("plot.py", f"{paths[0]},{paths[1]}", f"--write={table}")
    assert done.returncode == 0, done.stderr
    assert table.read_text().count("## a sweep") == 2 and "+1.0000" in done.stdout


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["nowhere"], ["nowhere does not exist"]),
        (["empty"], ["no log.jsonl", "empty"]),
        (["out", "--out=picture.jpg"], ["picture.jpg", ".png or .svg"]),
        (["out", "--x=miles"], ["miles", "steps, tokens, time"]),
        (["out", "--panels=loss,weather"], ["weather", "grad_norm"]),
        (["good.jsonl", "--panels=loss"], ["--panels cannot be used with results of sweeps"]),
        (["out", "--theme=blue"], ["blue", "light or dark"]),
        (["good.jsonl", "--write=table.txt"], ["table.txt", ".md"]),
        (["out", "--write=table.md"], ["results of sweeps"]),
        (["out", "--smoothing=2"], ["smoothing", "0 to 1"]),
        (["broken.jsonl"], ["broken.jsonl", "no results"]),
        (["good.jsonl", "--x=weather"], ["weather", "lr"]),
        (["good.jsonl,out"], ["runs cannot be used with results of sweeps"]),
        (["hollow.jsonl"], ["hollow.jsonl", "no results"]),
        (["--serve", "--port=99999"], ["99999", "65535"]),
        (["--serve", "--engine=no-engine"], ["no-engine", "make run"]),
        (["--serve", "good.jsonl"], ["folder"]),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(args, parts, tmp_path):
    log_of(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jsonl").write_text("no json\n[1]\n")
    (tmp_path / "hollow.jsonl").write_text('{"varied": {}, "status": "finished"}\n')
    (tmp_path / "good.jsonl").write_text(json.dumps(sweep_result(lr=1.0, seed=1)) + "\n")
    refused(script("plot.py", *args, cwd=tmp_path), *parts)
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob("*.jpg"))


@pytest.mark.slow
@needs_matplotlib
def test_train_draws_the_loss_at_the_end(practice, tmp_path):
    flags = [*TINY, "--picture=True", "--max_iters=20", f"--data_dir={practice}"]
    done = script("train.py", *flags, f"--out_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# ---- the page


@pytest.fixture
def serve():
    """Return a function that starts plot.py --serve with some arguments and returns its port."""
    processes = []

    def start(*args):
        command = [sys.executable, REPO / "plot.py", "--serve", "--port=0", *map(str, args)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        for line in process.stdout:
            if line.startswith("http://127.0.0.1:"):
                return int(line.split()[0].rsplit(":", 1)[1])
        raise AssertionError(process.stderr.read())

    start.processes = processes
    yield start
    for process in processes:
        process.kill()
        process.wait()


def get(port, path, host=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("GET", path, headers={"Host": host} if host else {})
    response = connection.getresponse()
    return response.status, response.read()


def test_the_page_serves_the_state_of_runs_and_nothing_else(tmp_path, serve):
    log_of(tmp_path / "out")
    port = serve(tmp_path / "out", "--start=")
    status, page = get(port, "/")
    assert status == 200 and b"<!doctype html>" in page
    assert b"src=" not in page and page.count(b"http://") == 1  # the SVG namespace
    state = json.loads(get(port, "/data.json")[1])
    [run] = state["runs"]
    assert (run["step"], run["max_iters"], run["state"]) == (60, 100, "running")
    assert run["seconds_left"] == pytest.approx(0.6 * 40, rel=0.01)
    assert run["evals"]["val_bpb"] == pytest.approx([1.05, 1.025, 1 + 1 / 60])
    log_of(tmp_path / "out", n_steps=100, end="finished")
    [run] = json.loads(get(port, "/data.json")[1])["runs"]
    assert run["state"] == "finished" and run["seconds_left"] is None
    for path in ("/log.jsonl", "/../plot.py", "/live.html", "//etc/passwd"):
        assert get(port, path)[0] == 404
    assert get(port, "/data.json", host="evil.example")[0] == 403
    assert get(port, "/data.json", host="evil.example:80")[0] == 403


def test_the_page_waits_for_a_run_that_does_not_exist_yet(tmp_path, serve):
    port = serve(f"--out_dir={tmp_path / 'out'}", "--start=")
    state = json.loads(get(port, "/data.json")[1])
    assert state["runs"] == [] and "out" in state["problem"]
    log_of(tmp_path / "out")
    assert len(json.loads(get(port, "/data.json")[1])["runs"]) == 1


def test_slow_clients_do_not_block_the_page(tmp_path, serve):
    port = serve(log_of(tmp_path / "out"), "--start=")
    slow = [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) for _ in range(300)]
    for client in slow:
        with contextlib.suppress(OSError):  # it may be disconnected already
            client.sendall(b"GET / HT")
    assert get(port, "/data.json")[0] == 200
    n_disconnected = 0
    for client in slow[: 300 - MAX_CLIENTS]:
        with contextlib.suppress(ConnectionError):
            assert client.recv(1000) == b""
        n_disconnected += 1
    assert n_disconnected == 300 - MAX_CLIENTS and get(port, "/data.json")[0] == 200


def test_clients_that_leave_print_nothing(tmp_path, serve):
    port = serve(log_of(tmp_path / "out"), "--start=")
    for request in (b"GET /data.json HTTP/1.0\r\nHost: localhost\r\n\r\n", b"GET", b"\0\n\n"):
        for _ in range(5):
            client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
            # a reset instead of an orderly close
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(request)
            client.close()
    assert get(port, "/data.json")[0] == 200
    serve.processes[0].terminate()
    assert serve.processes[0].communicate(timeout=PATIENCE_S)[1] == ""


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_engine_does_not_outlive_the_page(tmp_path, serve, signum):
    folder, pid = log_of(tmp_path / "out"), tmp_path / "pid"
    (folder / "model.bin").touch()
    engine = tmp_path / "engine"
    engine.write_text(f"#!/bin/sh\necho $$ > {pid}.part; mv {pid}.part {pid}; exec sleep 600\n")
    engine.chmod(0o755)
    serve(folder, f"--engine={engine}")
    wait_until(pid.exists)
    serve.processes[0].send_signal(signum)
    serve.processes[0].wait(PATIENCE_S)
    wait_until(lambda: not is_alive(int(pid.read_text())), "the engine is still running")


def test_a_taken_port_is_refused(tmp_path, serve):
    port = serve(f"--out_dir={tmp_path}", "--start=")
    refused(script("plot.py", "--serve", f"--port={port}", cwd=tmp_path), f"port {port}", "--port")


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


def browse(port, folder, *flags):
    """Open the page in Chromium and return its HTML after four seconds of virtual time."""
    command = [BROWSER, *QUIET, f"--user-data-dir={folder}", "--window-size=1280,1150"]
    command += ["--virtual-time-budget=4000", *flags, f"http://127.0.0.1:{port}/"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    ).stdout


def shown_step(page):
    return int(
        page.split('id="numbers"')[1].split("<b>")[1].split("<")[0].split(" / ")[0].replace(",", "")
    )


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
@needs_matplotlib
def test_the_page_follows_a_real_run_in_a_browser(practice, tmp_path, serve, builds):
    out = tmp_path / "out"
    port = serve(f"--out_dir={out}", f"--engine={builds['run', 'fast']}")
    flags = [*TINY, "--max_iters=100000", "--log_interval=1", f"--data_dir={practice}"]
    with open(tmp_path / "train.log", "w") as f:
        command = [sys.executable, REPO / "train.py", *flags, f"--out_dir={out}"]
        training = subprocess.Popen(command, stdout=f, stderr=f)
    try:
        wait_until(lambda: json.loads(get(port, "/data.json")[1])["story"])
        story = json.loads(get(port, "/data.json")[1])["story"]
        before = browse(port, tmp_path / "profile", "--dump-dom")
        browse(port, tmp_path / "profile", f"--screenshot={tmp_path / 'page.png'}")
        after = browse(port, tmp_path / "profile", "--dump-dom")
        assert training.poll() is None  # still running
    finally:
        training.kill()
        training.wait()
    assert 0 < shown_step(before) < shown_step(after)
    assert "Once upon a time" in story["text"] and "Once upon a time" in before
    for text in ("tokens/s", "time left (estimate)", "running", "bits per byte"):
        assert text in before
    assert before.count('class="curve"') >= 5 and 'd="M' in before
    from matplotlib.image import imread

    picture = imread(tmp_path / "page.png")
    blue = (abs(picture[..., :3] - [0, 0x72 / 255, 0xB2 / 255]) < 0.02).all(-1)
    assert picture.shape[1] == 1280 and blue.sum() > 500  # the curves are drawn
