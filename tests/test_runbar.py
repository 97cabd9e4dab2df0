"""The progress bar of a run: what it shows, and how it counts down."""

import io
import time
from types import SimpleNamespace

import pytest

from system import plainlines
from training.checkpoint import RunState
from training.runbar import RunBar


def settings_of(**values):
    defaults = {"max_iters": 100, "max_minutes": 0.0, "eval_interval": 40}
    return SimpleNamespace(**{**defaults, "gradient_accumulation_steps": 2, **values})


def test_time_left_includes_steps_and_evaluations():
    state = RunState(iter_num=20)
    bar = RunBar(settings_of(), state, n_valid=6, disable=True)
    bar.measured(1.0, 3.0, 1000)
    # 80 steps of 3 s; evaluations after 40, 80 and 100, estimated as 6 batches of 1/6 step each
    assert bar.seconds_left() == pytest.approx(80 * 3 + 3 * 6 * 3 / 6)
    bar.eval_s = 10.0
    for step, n_evals in ((20, 3), (39, 3), (40, 3), (41, 2), (80, 2), (81, 1), (99, 1), (100, 1)):
        state.iter_num = step
        assert bar.seconds_left() == (100 - step) * 3 + n_evals * 10


def test_time_left_with_max_minutes():
    state = RunState(iter_num=20, train_s=60.0)
    bar = RunBar(settings_of(max_minutes=5.0, max_iters=1), state, n_valid=6, disable=True)
    bar.step_s, bar.eval_s = 3.0, 10.0
    assert bar.seconds_left() == 240 + 3 * 10  # 80 more steps, evaluations after 40, 80 and 100
    state.train_s = 301.0
    assert bar.seconds_left() == 10


def test_the_bar_counts_down_during_a_long_step(monkeypatch):
    """A file gets a line at least every 30 s (here every second), whatever the loop does."""
    monkeypatch.setattr(plainlines, "SECONDS", 1.0)
    monkeypatch.setattr(plainlines, "SHORTEST", 0.0)
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    state = RunState(iter_num=50)
    bar = RunBar(settings_of(), state, n_valid=2)
    bar.eval_s = 1.0
    bar.measured(1.25, 60.0, 1234)
    start = time.monotonic()
    while shown.getvalue().count("left") < 3 and time.monotonic() < start + 60:
        time.sleep(0.05)
    for _ in bar.evaluating([1, 2]):
        bar.show()
        time.sleep(1.1)
    state.iter_num = 51
    bar.step(time.perf_counter())
    bar.close()
    lines = shown.getvalue().splitlines()
    left = [line.rpartition(", ")[2] for line in lines if "1,234 tok/s" in line]
    assert len(set(left)) >= 3 and left == sorted(left, reverse=True)
    assert lines[0].startswith(" 50%, step 50 of 100, loss 1.250, 1,234 tok/s, 50:0")
    assert any("step 50 of 100, evaluation 2 of 2, " in line for line in lines)
    assert lines[-1].startswith(" 51%, step 51 of 100, loss 1.250")
    assert bar.eval_s > 2
