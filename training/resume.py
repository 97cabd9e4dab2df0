"""
Starting points of a run: nothing, the weights of a checkpoint, or an earlier run to resume; and the
settings that follow from it.
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
from training.settings import (
    FIXED,
    GROUPS,
    NOT_RESUMED,
    OPTIONS,
    args_of,
    check,
    unused,
    with_arch,
)


@dataclass
class Start:
    """The starting point of a run."""

    settings: dict  # the settings to train with
    checkpoint: dict | None = None  # only its weights are used unless is_resumed
    path: str | None = None  # path of the checkpoint
    is_resumed: bool = False
    damaged: list = field(default_factory=list)  # paths of damaged checkpoints
    run: RunDir | None = None  # the run's folder, if it is already locked (first rank)


def find_start(settings, given):
    """
    Return the Start for train.py's settings. given: {name: command-line argument that set it}.
    Raises UserError if a checkpoint is missing or does not fit, or a setting is out of range.
    """
    init_from, out_dir = settings["init_from"], settings["out_dir"]
    start = Start(settings)
    if init_from == "resume" or settings["resume"] == "auto":
        start = find_latest(settings, given)
    if not start.is_resumed and init_from == "resume":
        raise UserError(
            f"{os.path.join(out_dir, 'ckpt.pt')} does not exist; use the --out_dir of an earlier "
            f"run, or start one without --init_from=resume"
        )
    if not start.is_resumed and init_from != "scratch":
        if not os.path.exists(init_from):
            raise UserError(
                f"init_from = {init_from}: expected scratch, resume, or the path of a checkpoint"
            )
        start.checkpoint, start.path = load_checkpoint(init_from), init_from
        start.settings = settings_for(start.checkpoint["model_args"], settings, given)
    if not start.checkpoint:
        if settings["eval_only"]:
            raise UserError(
                "eval_only needs a model to evaluate: use --init_from=resume or a checkpoint"
            )
        start.settings = with_arch(settings, given)
    check(start.settings)
    if start.checkpoint:
        args = args_of(start.settings, start.checkpoint["model_args"])
        check_size(args, start.checkpoint, start.path)
    for names, condition in unused(start.settings, given):
        say(f"note: this run ignores {', '.join(names)} (used only with {condition})")
    return start


def find_latest(settings, given):
    """Return the Start from the latest checkpoint in out_dir or on the hub, if there is one."""
    out_dir, run = settings["out_dir"], None
    will_train = not settings["eval_only"] and not settings["estimate"]
    from_hub = settings["hub_repo"] and will_train
    if FIRST and will_train and (from_hub or os.path.isdir(out_dir)):
        run = RunDir(out_dir)  # lock before reading: another run may still be writing
    if FIRST and from_hub and not has_checkpoint(out_dir):
        fetch_latest(settings["hub_repo"], out_dir)
    parallel.wait_for_all()
    checkpoint, path, damaged = load_latest(out_dir)
    if checkpoint is None:
        return Start(settings, run=run)
    resumed = resumed_settings(settings, checkpoint, given)
    if settings["init_from"] not in ("scratch", "resume"):
        say(f"note: resuming the run in {out_dir} and ignoring init_from = {settings['init_from']}")
    for name, version in versions().items():
        if (old := checkpoint["versions"][name]) != version:
            say(f"note: {name} is {version}, was {old}: results may differ in the last digits")
    return Start(resumed, checkpoint, path, True, damaged, run)


def fits(name, value, model_args):
    """Return whether an architecture setting, such as -1 for all layers, fits a model."""
    old = getattr(ModelArgs.from_dict(model_args), name)
    if value == old:
        return True
    try:
        return getattr(ModelArgs.from_dict({**model_args, name: value}), name) == old
    except ValueError:
        return False


def resumed_settings(settings, checkpoint, given):
    """Return the settings to resume with: those of the checkpoint, except the ones given now."""
    settings, old = dict(settings), checkpoint["config"]
    changed = []
    for name in settings.keys() & old.keys() - NOT_RESUMED:
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
        longer = ""
        if name in GROUPS["dial"]:
            limit = "max_minutes" if old["max_minutes"] else "max_iters"
            longer = f", raise --{limit} to train longer"
        raise UserError(
            f"cannot resume with {name} = {settings[name]}: the run has "
            f"{checkpoint['model_args'].get(name, old[name])}; leave it out{longer}, or start a "
            f"new run in another --out_dir"
        )
    if "data_dir" not in given:
        settings["data_dir"] = data_dir_of(checkpoint, settings["out_dir"])
    for name in sorted(changed):
        say(f"resuming with {name} = {settings[name]} instead of {old[name]}")
    return settings


def data_dir_of(checkpoint, out_dir):
    """Return a checkpoint's data_dir; a relative one is first looked up relative to out_dir."""
    data_dir, from_out = checkpoint["config"]["data_dir"], checkpoint.get("data_path")
    if os.path.isabs(data_dir) or not isinstance(from_out, str):
        return data_dir
    path = os.path.normpath(os.path.join(os.path.abspath(out_dir), from_out))
    is_same = os.path.isdir(data_dir) and os.path.realpath(data_dir) == os.path.realpath(path)
    if is_same or not os.path.isdir(path):
        return data_dir
    say(f"note: the run's data_dir = {data_dir} is {path}")
    return path


def settings_for(model_args, settings, given):
    """Return the settings to train a checkpoint's weights with: the architecture is the model's."""
    vocab_source, settings = settings["vocab_source"], dict(settings)
    for name in settings.keys() & model_args.keys() - {"dropout"}:
        if model_args[name] is None:  # in llama2.c: the default
            continue
        if name in ("max_seq_len", "separate_documents") and name in given:
            continue  # no weight depends on these
        if name == "vocab_size" and DataPaths("", vocab_source, settings[name]).is_llama2:
            continue
        is_derived = settings[name] == 0 and name in ("n_kv_heads", "hidden_dim", "vocab_size")
        if name in given and not is_derived and not fits(name, settings[name], model_args):
            raise UserError(
                f"cannot start from {settings['init_from']} with {name} = {settings[name]}: "
                f"its model has {model_args[name]}"
            )
        settings[name] = model_args[name]
    return settings


def check_same_checkpoint(start, out_dir):
    """Raise UserError if the ranks of a run do not see the same checkpoint."""
    step = start.checkpoint["iter_num"] if start.is_resumed else 0
    if parallel.total(step) != [step * WORLD_SIZE]:
        raise UserError(
            f"out_dir = {out_dir} has different checkpoints on different machines: use a folder on "
            f"a shared disk"
        )


def restore_run(start, model, optimizer, scaler, dtype, n_windows):
    """
    Restore a resumed run's weights and optimizer, and return its RunState. Prints a note if the
    dtype of matrix products or n_windows, the sequences per epoch, differs from the checkpoint's.
    """
    checkpoint = start.checkpoint
    restore(model, optimizer, checkpoint, start.path)
    state = RunState.of(checkpoint)
    if not os.path.exists(os.path.join(start.settings["out_dir"], "model.bin")):
        state.best_val_loss = math.inf  # for example, the run was fetched from the hub
    if checkpoint["compute_dtype"] != str(dtype):
        say(f"note: resuming in {dtype} instead of {checkpoint['compute_dtype']}")
    if checkpoint["n_windows"] != n_windows:
        say(
            f"note: the shards have changed ({n_windows:,} sequences instead of "
            f"{checkpoint['n_windows']:,}): the data continues in another order, and the next "
            f"evaluation replaces the best model"
        )
        state.best_val_loss = math.inf
    if checkpoint["scaler"]:  # empty unless the run used float16
        scaler.load_state_dict(checkpoint["scaler"])
    return state
