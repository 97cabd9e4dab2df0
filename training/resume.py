"""
What a run begins from: nothing, the weights of a checkpoint, or the run it belongs to; and
the settings that follow.
"""

import math
import os
from dataclasses import dataclass, field

from configurator import SETTING_TYPES, UserError
from dataset import DataPaths
from model import ModelArgs
from system.remote import fetch_latest
from training import parallel
from training.checkpoint import (
    RunState,
    check_size,
    has_checkpoint,
    load_checkpoint,
    load_latest,
    restore,
    versions,
)
from training.parallel import FIRST, WORLD_SIZE, say
from training.rundir import RunDir
from training.settings import FIXED, OF_ONE_START, OPTIONS, args_of, check, unused, with_arch


@dataclass
class Beginning:
    """What a run begins from."""

    settings: dict  # the settings to train with
    checkpoint: dict | None = None  # its weights, and with is_resumed all that the run has reached
    path: str | None = None  # of the checkpoint
    is_resumed: bool = False
    damaged: list = field(default_factory=list)  # paths of checkpoints that could not be read
    run: RunDir | None = None  # the run's folder, where it is locked already (first rank)


def begin(settings, given):
    """
    The Beginning that train.py's settings ask for. `given`: {name: the word of the command line}.
    Raises UserError where a checkpoint is missing or does not fit, or a setting is out of range.
    """
    init_from, out_dir = settings["init_from"], settings["out_dir"]
    start = Beginning(settings)
    if init_from == "resume" or settings["resume"] == "auto":
        start = latest_of(settings, given)
    if not start.is_resumed and init_from == "resume":
        raise UserError(
            f"{os.path.join(out_dir, 'ckpt.pt')} does not exist: name the --out_dir of an earlier "
            f"run, or start one without --init_from=resume"
        )
    if not start.is_resumed and init_from != "scratch":
        if not os.path.exists(init_from):
            raise UserError(
                f"init_from = {init_from!r}: expected scratch, resume, or the path of a checkpoint"
            )
        start.checkpoint, start.path = load_checkpoint(init_from), init_from
        start.settings = adopted(settings, start.checkpoint["model_args"], given)
    if not start.checkpoint:
        if settings["eval_only"]:
            raise UserError(
                "eval_only needs a model to evaluate: give --init_from=resume or a checkpoint"
            )
        start.settings = with_arch(settings, given)
    check(start.settings)
    if start.checkpoint:
        args = args_of(start.settings, start.checkpoint["model_args"])
        check_size(args, start.checkpoint, start.path)
    for names, how in unused(start.settings, given):
        say(f"this run does not use {', '.join(names)}; with {how} it would")
    return start


def latest_of(settings, given):
    """The Beginning from the latest checkpoint in out_dir or on the hub, where there is one."""
    out_dir, run = settings["out_dir"], None
    will_train = not settings["eval_only"] and not settings["estimate"]
    from_hub = settings["hub_repo"] and will_train
    if FIRST and will_train and (from_hub or os.path.isdir(out_dir)):
        run = RunDir(out_dir)  # before anything is read: another run may still be writing here
    if FIRST and from_hub and not has_checkpoint(out_dir):
        fetch_latest(settings["hub_repo"], out_dir)
    parallel.wait_for_all()
    checkpoint, path, damaged = load_latest(out_dir)
    if checkpoint is None:
        return Beginning(settings, run=run)
    resumed_settings = resumed(settings, checkpoint, given)
    if settings["init_from"] not in ("scratch", "resume"):
        say(f"resuming the run in {out_dir}; init_from = {settings['init_from']} was for its start")
    for name, version in versions().items():
        if (old := checkpoint["versions"][name]) != version:
            say(f"the checkpoint is of {name} {old}, this is {version}: last digits may differ")
    return Beginning(resumed_settings, checkpoint, path, True, damaged, run)


def fits(name, value, model_args):
    """Whether a setting of the architecture, such as -1 for all layers, means what a model has."""
    old = getattr(ModelArgs.from_dict(model_args), name)
    if value == old:
        return True
    try:
        return getattr(ModelArgs.from_dict({**model_args, name: value}), name) == old
    except ValueError:
        return False


def resumed(settings, checkpoint, given):
    """Settings to resume with: those of the checkpoint, except for what was given now."""
    settings, old = dict(settings), checkpoint["config"]
    changed = []
    for name in settings.keys() & old.keys() - OF_ONE_START:
        kind = type(settings[name])
        if type(old[name]) is not kind and (kind, type(old[name])) != (float, int):
            raise UserError(
                f"cannot resume: the checkpoint has {name} = {old[name]!r}, expected "
                f"{SETTING_TYPES[kind]}"
            )
        if name not in given:
            settings[name] = old[name]
        elif settings[name] != old[name]:
            if name in OPTIONS and fits(name, settings[name], checkpoint["model_args"]):
                settings[name] = old[name]
            else:
                changed.append(name)
    for name in FIXED.intersection(changed):
        raise UserError(
            f"cannot resume with {name} = {settings[name]}: the checkpoint's model has "
            f"{checkpoint['model_args'].get(name, old[name])}; leave it out, or begin a new run "
            f"with another --out_dir"
        )
    if "data_dir" not in given:
        settings["data_dir"] = data_dir_of(checkpoint, settings["out_dir"])
    for name in sorted(changed):
        say(f"resuming with {name} = {settings[name]} instead of {old[name]}")
    return settings


def data_dir_of(checkpoint, out_dir):
    """A checkpoint's data_dir; a relative one is looked for where it lies from out_dir first."""
    data_dir, from_out = checkpoint["config"]["data_dir"], checkpoint.get("data_path")
    if os.path.isabs(data_dir) or not isinstance(from_out, str):
        return data_dir
    there = os.path.normpath(os.path.join(os.path.abspath(out_dir), from_out))
    is_here = os.path.isdir(data_dir) and os.path.realpath(data_dir) == os.path.realpath(there)
    if is_here or not os.path.isdir(there):
        return data_dir
    say(f"data_dir = {data_dir} of the run is {there}")
    return there


def adopted(settings, model_args, given):
    """Settings to train the weights of a checkpoint with: the architecture is that of the model."""
    settings, named = dict(settings), settings
    for name in settings.keys() & model_args.keys() - {"dropout"}:
        if model_args[name] is None:  # llama2.c's way to leave it to the default
            continue
        if name == "max_seq_len" and name in given:  # no weight depends on it
            continue
        if name == "vocab_size" and DataPaths("", named["vocab_source"], settings[name]).is_llama2:
            continue
        is_derived = settings[name] == 0 and name in ("n_kv_heads", "hidden_dim", "vocab_size")
        if name in given and not is_derived and not fits(name, settings[name], model_args):
            raise UserError(
                f"cannot start from {settings['init_from']} with {name} = {settings[name]}: "
                f"its model has {model_args[name]}"
            )
        settings[name] = model_args[name]
    return settings


def check_machines(start, out_dir):
    """Raise UserError where the ranks of a run do not see the same checkpoint."""
    step = start.checkpoint["iter_num"] if start.is_resumed else 0
    if parallel.total(step) != [step * WORLD_SIZE]:
        raise UserError(
            f"the machines find different checkpoints in {out_dir}: "
            f"put --out_dir on a disk that all of them share"
        )


def restore_run(start, model, optimizer, scaler, dtype, n_windows):
    """
    Set a resumed run's weights and optimizer; returns its RunState. Says what is different from the
    run so far: dtype, of the products, and n_windows, sequences of an epoch.
    """
    checkpoint = start.checkpoint
    restore(model, optimizer, checkpoint, start.path)
    state = RunState.of(checkpoint)
    if not os.path.exists(os.path.join(start.settings["out_dir"], "model.bin")):
        state.best_val_loss = math.inf  # the run came from the hub, say
    if checkpoint["compute_dtype"] != str(dtype):
        say(f"computing in {dtype} from now on, so far in {checkpoint['compute_dtype']}")
    if checkpoint["n_windows"] != n_windows:
        say(
            f"the shards are not those of the run so far: {n_windows:,} sequences instead of "
            f"{checkpoint['n_windows']:,}; resuming at the same place of another order, and the "
            f"best model so far does not count"
        )
        state.best_val_loss = math.inf
    if checkpoint["scaler"]:  # empty where the run so far was not in float16
        scaler.load_state_dict(checkpoint["scaler"])
    return state
