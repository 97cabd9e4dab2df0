"""The number of threads: the fastest is chosen, and chosen again when that changes."""

import itertools

import pytest
import torch

from system import threads
from system.threads import Threads, probe

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """A fake machine with four cores: {number of threads: seconds}, and a clock."""
    state = {"now": 100.0, "threads": 4, "seconds": {4: 1.0, 3: 1.3, 2: 2.0, 1: 4.0}, "probes": 0}

    def fake_probe(numbers):
        state["probes"] += 1
        return {n: state["seconds"][n] for n in numbers}

    monkeypatch.delenv("OMP_DYNAMIC", raising=False)
    monkeypatch.setattr(threads, "probe", fake_probe)
    monkeypatch.setattr(threads.time, "monotonic", lambda: state["now"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: state["threads"])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: state.update(threads=n))
    return state


BUSY = {4: 5.0, 3: 1.3, 2: 2.0, 1: 4.0}  # another program uses one core


def test_the_fastest_number_is_chosen_at_the_start(machine, capsys):
    Threads(CPU)
    assert machine["threads"] == 4 and not capsys.readouterr().err
    machine["seconds"] = BUSY
    Threads(CPU)
    assert machine["threads"] == 3
    expected = "note: other programs use the cores; using 3 of 4 threads (3.8 times as fast as 4)\n"
    assert capsys.readouterr().err == expected


def test_a_small_gain_changes_nothing(machine):
    machine["seconds"] = {4: 1.1, 3: 1.0, 2: 2.0, 1: 4.0}
    Threads(CPU)
    assert machine["threads"] == 4


def test_the_number_is_chosen_again_when_the_work_slows_down(machine, capsys):
    chosen = Threads(CPU)
    for _ in range(10):
        chosen.watch(10, 1.0)
    assert machine["probes"] == 1
    machine["seconds"] = BUSY
    chosen.watch(1, 0.3)  # too short to tell
    assert machine["probes"] == 1
    chosen.watch(1, 1.0)
    assert machine["threads"] == 3 and machine["probes"] == 2
    # below the maximum, the number is chosen again after a while
    machine["seconds"] = {4: 1.0, 3: 1.3, 2: 2.0, 1: 4.0}
    chosen.watch(10, 1.0)
    assert machine["probes"] == 2
    machine["now"] += threads.LATER_S + 1
    chosen.watch(10, 1.0)
    assert (
        machine["threads"] == 4
        and "note: cores are free again; using 4 of 4 threads" in capsys.readouterr().err
    )
    machine["now"] += threads.LATER_S + 1
    chosen.watch(10, 1.0)
    assert machine["probes"] == 3


def test_a_number_that_makes_the_work_slower_is_undone(machine, capsys):
    """A probe's small computation may be faster although the work is not."""
    machine["seconds"] = BUSY
    chosen = Threads(CPU)
    chosen.watch(10, 1.0)
    machine["seconds"] = {4: 1.0, 3: 1.3, 2: 2.0, 1: 4.0}
    machine["now"] += threads.LATER_S + 1
    chosen.watch(10, 1.0)
    assert machine["threads"] == 4
    chosen.watch(6, 1.0)
    assert (
        machine["threads"] == 3
        and "note: back to 3 of 4 threads, which are faster" in capsys.readouterr().err
    )
    machine["now"] += threads.LATER_S + 1
    chosen.watch(10, 1.0)
    assert machine["threads"] == 3  # waits longer for the next try
    machine["now"] += threads.LATER_S
    chosen.watch(10, 1.0)
    assert machine["threads"] == 4
    chosen.watch(12, 1.0)
    assert machine["threads"] == 4  # faster this time


@pytest.mark.parametrize("device, dynamic", [("cpu", "false"), ("meta", "")])
def test_a_fixed_number_and_a_gpu_are_left_alone(machine, monkeypatch, device, dynamic):
    monkeypatch.setenv("OMP_DYNAMIC", dynamic)
    machine["seconds"] = BUSY
    chosen = Threads(torch.device(device))
    for _ in range(5):
        chosen.watch(1, 1.0)
    assert machine["threads"] == 4 and machine["probes"] == 0


def test_only_the_iterator_is_timed_and_not_the_loop_body(machine, monkeypatch):
    chosen, seen = Threads(CPU), []
    clock = itertools.count()
    monkeypatch.setattr(threads.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(chosen, "watch", lambda n, seconds: seen.append((n, seconds)))
    assert list(chosen.watched("abc")) == ["a", "b", "c"]
    assert seen == [(1, 1)] * 3


def test_a_probe_measures_each_number():
    before = torch.get_num_threads()
    times = probe({1, before})
    torch.set_num_threads(before)
    assert set(times) == {1, before} and all(0 < seconds < 10 for seconds in times.values())
