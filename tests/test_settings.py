"""Settings of train.py: each is in one group, and train.py reads only the resolved ones."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import REPO, refused, script

from configurator import UserError, comments_of
from model import ARCHS, ModelArgs
from training import settings
from training.checkpoint import RUN_FIELDS, RunState
from training.settings import USED_IF, resolved, unused


def block():
    """Return the names in train.py's settings block, in order, and the nodes after the block."""
    body = ast.parse((REPO / "train.py").read_text()).body
    end = next(i for i, node in enumerate(body) if "configure(" in ast.unparse(node))
    assigned = [node for node in body[:end] if isinstance(node, ast.Assign)]
    names = [node.targets[0].id for node in assigned]
    return [name for name in names if name.islower()], body[end + 1 :]


def test_each_setting_is_in_exactly_one_group_in_the_order_of_the_block():
    grouped = [name for names in settings.GROUPS.values() for name in names]
    assert grouped == block()[0]
    assert len(set(grouped)) == len(grouped)


def test_every_option_of_the_model_is_in_a_group_of_the_model():
    model = settings.names_of("architecture", "initialization")
    assert set(settings.OPTIONS) | {"arch"} == model
    assert {f.name for f in fields(ModelArgs)} - model == {
        "norm_eps",
        "rope_theta",
        "orders",
        "bos_id",
    }


def test_below_the_block_settings_are_read_from_the_resolved_ones():
    """A global has the value of the command line, which a resumed run may not use."""
    names, rest = block()
    bound = {n.arg for top in rest for n in ast.walk(top) if isinstance(n, ast.arg)}
    assert not bound & set(names), bound
    used = [n.id for top in rest for n in ast.walk(top) if isinstance(n, ast.Name)]
    assert [name for name in used if name in names] == ["device"]  # never taken from a checkpoint
    source = (REPO / "train.py").read_text()
    assert "global " not in source and "globals().update" not in source


def test_the_run_state_is_in_every_checkpoint():
    assert {f.name for f in fields(RunState)} <= RUN_FIELDS.keys()


def test_settings_as_json():
    args = ["config/story.py", "--dim=64", "--qk_norm=False", "--print-settings"]
    done = subprocess.run(
        [sys.executable, REPO / "train.py", *args], cwd=REPO, capture_output=True, check=True
    )
    answer = json.loads(done.stdout)
    assert answer["settings"]["dim"] == 64 and {"dim", "qk_norm"} < set(answer["given"])
    assert settings.resolved(("--dim=64", "--qk_norm=False"))["qk_norm"] is False
    assert settings.resolved()["qk_norm"] is True  # from --arch=modded
    with pytest.raises(UserError, match=r"unknown setting --dimm: did you mean --dim\?"):
        settings.resolved(("--dimm=64",))


@pytest.mark.parametrize("name", ["momentum", "neuron_beta", "beta1"])
def test_decay_rates_of_moments_are_below_1(name):
    settings.check(settings.resolved((f"--{name}=0.999999",)))
    with pytest.raises(UserError, match=f"{name} = 1.0: expected at least 0 and less than 1"):
        settings.check(settings.resolved((f"--{name}=1",)))


def test_help_has_the_groups_as_headings():
    done = script("train.py", "--help")
    assert "\nlearning rates:\n  --hidden_lr=0.02" in done.stdout
    refused(script("train.py", "--hidden_lr"), "--hidden_lr needs a value")


def given_as(argument, **settings):
    return {**resolved(), **settings}, dict.fromkeys(settings, argument)


def test_help_shows_the_presets():
    """Each option lists exactly the values in ARCHS that differ from its default."""
    comments, _ = comments_of(REPO / "train.py")
    shown = {
        (arch, name): value
        for name in settings.OPTIONS
        for archs, value in re.findall(r"; ((?:\w+, )*\w+): (\S+)$", comments[name])
        for arch in archs.split(", ")
        if arch in ARCHS
    }
    assert shown == {
        (arch, name): str(value)
        for arch, options in ARCHS.items()
        for name, value in options.items()
    }


@pytest.mark.parametrize(
    "settings, names, flag",
    [
        ({"optimizer": "adamw", "hidden_lr": 0.1, "grad_clip": 2.0}, ["hidden_lr"], "muon"),
        ({"weight_decay": 0.2, "beta2": 0.9}, ["beta2", "weight_decay"], "adamw"),
        ({"sliding_window": 0, "window_pattern": "SL"}, ["window_pattern"], "sliding_window"),
        ({"max_minutes": 1.0, "max_iters": 5}, ["max_iters"], "max_minutes=0"),
        ({"wandb_run": "a"}, ["wandb_run"], "wandb_project"),
    ],
)
def test_settings_without_effect_are_reported(settings, names, flag):
    [(ignored, needed)] = unused(*given_as("config.py", **settings))
    assert sorted(ignored) == names and flag in needed


def test_base_learning_rate_with_muon_is_an_error_on_the_command_line_but_not_in_a_file():
    settings, given = given_as("--base_learning_rate=1", base_learning_rate=1.0)
    expected = r"cannot be used with optimizer = muon: use --optimizer=adamw .*--hidden_lr"
    with pytest.raises(UserError, match=expected):
        unused(settings, given)
    assert unused(settings, {"base_learning_rate": "config/plain_llama2c.py"})
    assert not unused(settings | {"optimizer": "adamw"}, given)


def test_every_setting_in_used_if_exists():
    names = {name for _, _, names in USED_IF for name in names.split()}
    assert len(names) > 25 and names <= resolved().keys()


def test_a_run_reports_settings_that_it_ignores():
    done = script("train.py", "--estimate", "--max_minutes=1", "--max_iters=5", "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert "note: this run ignores max_iters (used only with --max_minutes=0)" in done.stdout
    assert "note: this is the estimate of 5 steps (max_iters), not of max_minutes" in done.stdout
    done = script("train.py", "--estimate", "--arch=llama", "--embedding_lr=0.1", "--device=cpu")
    assert "ignores embedding_lr (used only with --value_embeddings=N)" in done.stdout
