"""The dial: what --minutes, --tokens and --depth choose."""

import pytest
import torch
from conftest import read_log, refused, script

from configurator import UserError
from training import dial
from training.settings import resolved

SAMPLE = 3_450_000  # training tokens of the sample in doc/results.md


@pytest.fixture
def choose(monkeypatch):
    """
    Return the settings that the dial chooses on a machine of `speed` operations per second, for a
    text of n_text tokens.
    """

    def call(*args, n_text=SAMPLE, speed=4.1e11):
        monkeypatch.setattr(dial, "measured_speed", lambda *_: lambda flops: speed)
        monkeypatch.setattr(dial, "corrected", lambda speed_at, *_: speed_at)
        monkeypatch.setattr(dial, "sizes_of_text", lambda *_: (n_text, n_text // 16))
        given = {arg[2:].partition("=")[0]: arg for arg in args}
        given = {name: arg for name, arg in given.items() if name not in dial.DIALS}
        settings, lines = dial.choose(dict(resolved(tuple(args))), given, None)
        assert any(f"--max_seq_len={settings['max_seq_len']} " in line for line in lines)
        return settings

    return call


def test_ten_minutes_are_the_default_recipe(choose):
    """On the machine and the text that it was tuned on."""
    chosen, default = choose("--minutes=10"), resolved(("config/speedrun_cpu.py",))
    check_same(chosen, default)
    assert chosen["max_minutes"] == 10


def test_an_hour_with_the_same_text_is_the_slowrun(choose):
    chosen, slowrun = choose("--minutes=60"), resolved(("config/slowrun_cpu.py",))
    # half of the slowrun's rate of the head was 0.0004 bits per byte worse
    check_same(chosen | {"head_lr": 0.003}, slowrun)
    assert 0.001 < chosen["head_lr"] < 0.003
    assert chosen["max_minutes"] == 60


def check_same(chosen, recipe):
    """Check that the dial has chosen the model, the batch, the rates and the decay of a recipe."""
    names = (
        "dim n_layers n_heads sliding_window max_seq_len batch_size dropout bigram_rows "
        "muon_weight_decay embedding_weight_decay"
    )
    for name in [*names.split(), *dial.RATES]:
        assert chosen[name] == pytest.approx(recipe[name], rel=0.02), name
    assert chosen["window_pattern"] == recipe["window_pattern"]


def test_the_shortest_runs_have_the_rates_of_the_sprint():
    sprint = resolved(("config/sprint_cpu.py",))
    shortest = dial.rates(dial.SHORT_TOKENS, sprint["dim"])
    assert shortest == {name: sprint[name] for name in dial.RATES}
    assert dial.rates(1, sprint["dim"]) == shortest


def test_more_time_and_faster_machines_train_larger_models(choose):
    short, long = choose("--minutes=1"), choose("--minutes=100", n_text=100 * SAMPLE)
    fast = choose("--minutes=1", speed=4.1e13, n_text=100 * SAMPLE)
    assert short["dim"] < 256 < long["dim"] == fast["dim"]
    steps = [c["batch_size"] * c["max_seq_len"] for c in (short, long)]
    assert steps[0] < 8192 < steps[1]
    assert short["embedding_lr"] > long["embedding_lr"]


def test_a_short_text_needs_regularization_and_no_more_than_a_few_epochs(choose):
    large, small = choose("--minutes=10"), choose("--minutes=10", n_text=SAMPLE // 10)
    assert large["dropout"] == 0 and large["bigram_rows"]
    longer = choose("--minutes=20")
    assert longer["dropout"] == 0 and not longer["bigram_rows"]
    assert small["dropout"] > 0 and not small["bigram_rows"]
    assert small["muon_weight_decay"] > large["muon_weight_decay"]
    n_tokens = small["max_iters"] * small["batch_size"] * small["max_seq_len"]
    assert 0.0015 < small["head_lr"] < dial.rates(n_tokens, small["dim"])["head_lr"] / 2
    assert small["max_minutes"] == 0
    assert n_tokens == pytest.approx(dial.MOST_EPOCHS * SAMPLE / 10, rel=0.01)
    longer = choose("--minutes=1000", n_text=SAMPLE // 10)
    assert longer["max_iters"] == small["max_iters"] and longer["dim"] == small["dim"]


def test_tokens_that_are_given_are_never_cut(choose):
    chosen = choose(f"--tokens={20 * SAMPLE}")
    n_tokens = chosen["max_iters"] * chosen["batch_size"] * chosen["max_seq_len"]
    assert n_tokens == pytest.approx(20 * SAMPLE, rel=0.01)
    assert choose("--tokens=1e9", n_text=1000)["muon_weight_decay"] == dial.MOST_DECAY


def test_tokens_and_depth(choose):
    tokens = choose("--tokens=9.1e6")
    assert tokens["dim"] == 256 and tokens["max_iters"] == round(9.1e6 / 8192)
    deep = choose("--depth=3")
    assert (deep["dim"], deep["n_layers"], deep["max_minutes"]) == (192, 3, 0)
    assert choose("--depth=3", "--minutes=10")["dim"] == 192


def test_given_settings_keep_their_values(choose):
    chosen = choose("--minutes=10", "--n_layers=2", "--dropout=0.3", "--batch_size=3")
    assert (chosen["n_layers"], chosen["dropout"], chosen["batch_size"]) == (2, 0.3, 3)
    assert choose("--minutes=10", "--n_heads=6")["dim"] == 192  # the nearest multiple of 12
    assert choose("--minutes=10", "--dim=240", "--n_heads=2")["n_heads"] == 2


@pytest.mark.parametrize("dim, n_heads", [(32, 1), (100, 1), (128, 2), (320, 5), (1000, 10)])
def test_heads_have_64_dims_or_more(choose, dim, n_heads):
    assert choose("--minutes=10", f"--dim={dim}")["n_heads"] == n_heads


@pytest.mark.parametrize("given", ["--max_seq_len=512", "--gradient_accumulation_steps=4"])
def test_a_step_has_the_same_tokens_with_given_settings(choose, given):
    """The learning rates are for these."""
    chosen = choose("--minutes=10", given)
    sequences = chosen["batch_size"] * chosen["gradient_accumulation_steps"]
    assert sequences * chosen["max_seq_len"] == 8192


@pytest.mark.parametrize("n_processes", [2, 8])
def test_a_step_has_the_same_tokens_in_several_processes(choose, monkeypatch, n_processes):
    monkeypatch.setattr(dial, "WORLD_SIZE", n_processes)
    chosen = choose("--tokens=9.1e6")
    assert chosen["batch_size"] * chosen["max_seq_len"] == 8192
    assert chosen["batch_size"] % n_processes == 0


@pytest.mark.parametrize("n_text", [40, 1000, 20_000])
def test_windows_fit_into_a_tiny_text(choose, n_text):
    chosen = choose("--minutes=1", n_text=n_text)
    assert chosen["max_seq_len"] == 16 or chosen["max_seq_len"] < n_text // 16


@pytest.mark.parametrize("depth", range(1, dial.DEEPEST + 1))
def test_every_depth_has_a_valid_shape(depth):
    shape = dial.shape_of(depth)
    assert shape["dim"] / shape["n_heads"] == 64
    assert dial.flops_per_token(resolved() | shape)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--minutes=1", "--tokens=5"], "minutes cannot be used with tokens"),
        (["--minutes=1", "--max_iters=5"], "max_iters cannot be used with minutes"),
        (["--depth=2", "--max_minutes=5"], "leave out one of them"),
        (["--depth=2", "--n_layers=3"], "n_layers cannot be used with depth"),
        (["--minutes=1", "--optimizer=adamw"], "learning rates for Muon only"),
        (["--minutes=1e-9"], "expected 0 \\(off\\), or 0.001 or more"),
        (["--minutes=1", "--value_embeddings=60"], "no depth from 1 to 48 fits"),
        (["--tokens=5", "--init_from=x.pt"], "tokens chooses a new model"),
        (["--minutes=1", "--dim=100", "--n_heads=6"], "n_heads = 6 does not divide dim = 100"),
    ],
)
def test_contradictions_are_refused(choose, args, message):
    with pytest.raises(UserError, match=message):
        choose(*args)


def test_a_run_with_the_dial_and_its_continuation(practice, tmp_path):
    """The chosen settings are printed, logged and kept by a resumed run."""
    flags = [f"--data_dir={practice}", "--vocab_size=300", "--dtype=float32", "--device=cpu"]
    flags += [f"--out_dir={tmp_path / 'out'}", "--picture=False", "--depth=1", "--dim=32"]
    done = script("train.py", *flags, "--minutes=0.02")
    assert done.returncode == 0, done.stderr
    assert "--max_minutes=0.02  # " in done.stdout and "(measured)" in done.stdout
    assert "--dim=32 (given) " in done.stdout
    config = read_log(tmp_path / "out")[0]["config"]
    assert config["dim"] == 32 and config["n_layers"] == 1 and config["max_minutes"] == 0.02
    again = script("train.py", *flags, "--minutes=0.02", "--resume=auto")
    assert again.returncode == 0 and "is complete" in again.stdout
    assert "(measured)" not in again.stdout
    refused(
        script("train.py", *flags, "--minutes=0.03", "--resume=auto"),
        "cannot resume with minutes = 0.03: the run has 0.02; leave it out, raise --max_minutes",
    )


def test_speed_is_measured(practice):
    settings = resolved((f"--data_dir={practice}", "--vocab_size=300", "--dtype=float32"))
    speed_at = dial.measured_speed(settings, torch.device("cpu"))
    assert 1e8 < speed_at(1e6) < 1e14
    plan = dial.plan_of(1, settings | {"minutes": 0.01}, {}, (20_000, 2000), speed_at)
    faster = dial.corrected(lambda flops: 10 * speed_at(flops), plan, torch.device("cpu"))
    assert 0.1 < faster(1e6) / dial.corrected(speed_at, plan, torch.device("cpu"))(1e6) < 10
