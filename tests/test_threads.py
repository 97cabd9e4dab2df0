"""The number of threads: chosen by what is fastest, and again when that changes."""

import itertools

import pytest
import torch

from system import threads
from system.threads import Threads, probe

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """A made-up machine of four cores: seconds by number of threads, and a clock."""
    state = {"now": 100.0, "threads": 4, "seconds": {4: 1.0, 3: 1.3, 2: 2.0, 1: 4.0}, "probes": 0}

    def made_up_probe(numbers):
        state["probes"] += 1
        return {n: state["seconds"][n] for n in numbers}

    monkeypatch.delenv("OMP_DYNAMIC", raising=False)
    monkeypatch.setattr(threads, "probe", made_up_probe)
    monkeypatch.setattr(threads.time, "monotonic", lambda: state["now"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: state["threads"])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: state.update(threads=n))
    return state


BUSY = {4: 5.0, 3: 1.3, 2: 2.0, 1: 4.0}  # a program on one of the cores


def test_the_fastest_number_is_taken_at_the_start(machine, capsys):
    Threads(CPU)
    assert machine["threads"] == 4 and not capsys.readouterr().err
    machine["seconds"] = BUSY
    Threads(CPU)
    assert machine["threads"] == 3
    assert (
        capsys.readouterr().err
        == "other programs use the cores: 3 of 4 threads, 3.8 times as fast\n"
    )


def test_a_small_gain_changes_nothing(machine):
    machine["seconds"] = {4: 1.1, 3: 1.0, 2: 2.0, 1: 4.0}
    Threads(CPU)
    assert machine["threads"] == 4


def test_they_are_chosen_again_where_the_work_slows_down(machine, capsys):
    chosen = Threads(CPU)
    for _ in range(10):
        chosen.watch(10, 1.0)
    assert machine["probes"] == 1
    machine["seconds"] = BUSY
    chosen.watch(1, 0.3)  # too short to tell
    assert machine["probes"] == 1
    chosen.watch(1, 1.0)
    assert machine["threads"] == 3 and machine["probes"] == 2
    # with fewer than the most, they are chosen again after a while
    machine["seconds"] = {4: 1.0, 3: 1.3, 2: 2.0, 1: 4.0}
    chosen.watch(10, 1.0)
    assert machine["probes"] == 2
    machine["now"] += threads.LATER_S + 1
    chosen.watch(10, 1.0)
    assert machine["threads"] == 4 and "cores are free again: 4 of 4" in capsys.readouterr().err
    machine["now"] += threads.LATER_S + 1
    chosen.watch(10, 1.0)
    assert machine["probes"] == 3


def test_a_number_that_is_slower_at_the_work_is_taken_back(machine, capsys):
    """The small computation of a probe may be faster where the work is not."""
    machine["seconds"] = BUSY
    chosen = Threads(CPU)
    chosen.watch(10, 1.0)
    machine["seconds"] = {4: 1.0, 3: 1.3, 2: 2.0, 1: 4.0}
    machine["now"] += threads.LATER_S + 1
    chosen.watch(10, 1.0)
    assert machine["threads"] == 4
    chosen.watch(6, 1.0)
    assert machine["threads"] == 3 and "back to 3 of 4 threads" in capsys.readouterr().err
    machine["now"] += threads.LATER_S + 1
    chosen.watch(10, 1.0)
    assert machine["threads"] == 3  # the next try is later
    machine["now"] += threads.LATER_S
    chosen.watch(10, 1.0)
    assert machine["threads"] == 4
    chosen.watch(12, 1.0)
    assert machine["threads"] == 4  # faster this time


@pytest.mark.parametrize("device, dynamic", [("cpu", "false"), ("meta", "")])
def test_a_given_number_and_a_gpu_are_left_alone(machine, monkeypatch, device, dynamic):
    monkeypatch.setenv("OMP_DYNAMIC", dynamic)
    machine["seconds"] = BUSY
    chosen = Threads(torch.device(device))
    for _ in range(5):
        chosen.watch(1, 1.0)
    assert machine["threads"] == 4 and machine["probes"] == 0


def test_an_iterator_is_watched_without_what_happens_in_between(machine, monkeypatch):
    chosen, seen = Threads(CPU), []
    clock = itertools.count()
    monkeypatch.setattr(threads.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(chosen, "watch", lambda n, seconds: seen.append((n, seconds)))
    assert list(chosen.watched("abc")) == ["a", "b", "c"]
    assert seen == [(1, 1)] * 3


def test_a_probe_measures_each_number():
    before = torch.get_num_threads()
    found = probe({1, before})
    torch.set_num_threads(before)
    assert set(found) == {1, before} and all(0 < seconds < 10 for seconds in found.values())
