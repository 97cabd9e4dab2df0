"""
The settings of train.py: their groups, what each group implies, and checks.

Every setting is in exactly one group, in the order of train.py's settings block.
"""

import functools
import json
import math
import os
import subprocess
import sys
from dataclasses import fields

from attention import KERNELS
from configurator import PRINT_SETTINGS, UserError
from dataset import DataPaths
from model import ACTIVATION_CHECKPOINTING, ARCHS, ModelArgs
from optim import DECAYS, OPTIMIZERS, SHAPES

TRAIN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")

GROUPS = {
    "folder": "out_dir resume picture",
    "dial": "minutes tokens depth",
    "start": "init_from eval_only",
    "intervals": (
        "eval_interval eval_iters log_interval always_save_checkpoint save_interval keep_last"
    ),
    "data": (
        "data_dir vocab_source learn_orders order_weight batch_size gradient_accumulation_steps"
    ),
    "architecture": (
        "arch vocab_size max_seq_len dim n_layers n_heads n_kv_heads hidden_dim multiple_of "
        "tie_embeddings qk_norm norm_gains activation logit_softcap sliding_window window_pattern "
        "embedding_norm residual_scalars value_embeddings bigram_rows smear "
        "embedding_conv key_conv separate_documents vocab_multiple dropout"
    ),
    "initialization": "zero_init embedding_std head_std",
    "length": "max_iters max_minutes",
    "optimizer": "optimizer neuron_beta grad_clip",
    "rates": "hidden_lr embedding_lr bigram_lr head_lr scalar_lr base_learning_rate",
    "moments": "momentum muon_beta1 muon_beta2 beta1 beta2",
    "decay": "muon_weight_decay embedding_weight_decay weight_decay decay_shape",
    "schedule": "warmup_iters momentum_warmup cooldown_frac cooldown_shape final_lr_frac",
    # changes the last digits of results
    "numerics": "seed dtype fp8_head activation_checkpointing",
    # changes only the speed
    "machine": "device attention compile fsdp",
    "uploads": "hub_repo hub_private hub_keep_local wandb_project wandb_run on_finish",
    "estimate": "estimate mfu price",
}
GROUPS = {group: tuple(names.split()) for group, names in GROUPS.items()}


def names_of(*groups):
    """Return the set of settings in some groups."""
    return {name for group in groups for name in GROUPS[group]}


OPTIONS = tuple(f.name for f in fields(ModelArgs) if f.name in set().union(*GROUPS.values()))
# not taken from the checkpoint when a run is resumed
NOT_RESUMED = names_of("folder", "start", "machine", "uploads", "estimate")
# a resumed run cannot change these
FIXED = {*OPTIONS, *GROUPS["dial"], "arch", "vocab_source", "optimizer"} - {"dropout"}
# two finished runs that differ only in these have computed the same
SAME_RESULT = names_of("folder", "uploads", "estimate")
# the time per step does not depend on these
SAME_WORK = {"data_dir", "learn_orders", "order_weight", "seed"} | names_of(
    *("folder", "start", "intervals", "initialization", "length"),
    *("rates", "moments", "decay", "schedule", "uploads", "estimate"),
)
ADAMW = "base_learning_rate beta1 beta2 weight_decay"
MUON = (
    "hidden_lr embedding_lr bigram_lr head_lr scalar_lr momentum muon_beta1 muon_beta2 "
    "muon_weight_decay embedding_weight_decay neuron_beta momentum_warmup"
)
SECRET = {"on_finish"}  # may hold an access token: never written to checkpoints or logs


@functools.cache
def resolved(args=()):
    """
    Return {name: value} of every setting of train.py after applying a tuple of command-line
    arguments and the preset of --arch. Raises UserError for arguments that train.py would refuse.
    """
    command = [sys.executable, TRAIN, *args, PRINT_SETTINGS]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().removeprefix("error: "))
    answer = json.loads(done.stdout)
    return with_arch(answer["settings"], answer["given"])


def args_of(settings, inherited=None):
    """
    Return the ModelArgs for settings of train.py. inherited: the model_args of the checkpoint that
    the run starts from, for values that are not settings, such as norm_eps. Raises UserError if
    the values do not fit together.
    """
    options = (inherited or {}) | {name: settings[name] for name in OPTIONS}
    paths = DataPaths("", settings["vocab_source"], settings["vocab_size"])
    try:
        return ModelArgs.from_dict({**options, "vocab_size": paths.vocab_size})
    except ValueError as e:
        raise UserError(str(e)) from None


def with_arch(settings, given):
    """Return the settings with the --arch preset applied to options that were not given."""
    return settings | {k: v for k, v in ARCHS.get(settings["arch"], {}).items() if k not in given}


# (condition for a run to use some settings, a flag that meets it, the settings)
USED_IF = (
    (lambda s: s["optimizer"] == "adamw", "optimizer=adamw", ADAMW),
    (lambda s: s["optimizer"] == "muon", "optimizer=muon", MUON),
    (lambda s: s["sliding_window"], "sliding_window=N", "window_pattern"),
    (lambda s: s["bigram_rows"], "bigram_rows=N", "bigram_lr"),
    (lambda s: not s["tie_embeddings"], "tie_embeddings=False", "head_std"),
    (
        lambda s: s["value_embeddings"] or not s["tie_embeddings"],
        "value_embeddings=N",
        "embedding_lr embedding_weight_decay",
    ),
    (lambda s: not s["hidden_dim"], "hidden_dim=0", "multiple_of"),
    (lambda s: not s["max_minutes"], "max_minutes=0", "max_iters"),
    (lambda s: s["init_from"] == "scratch", "init_from=scratch", "zero_init embedding_std"),
    (lambda s: s["hub_repo"], "hub_repo=user/name", "hub_private hub_keep_local"),
    (lambda s: s["wandb_project"], "wandb_project=NAME", "wandb_run"),
    (lambda s: s["estimate"], "estimate", "mfu price"),
)


def unused(settings, given):
    """
    Return [(names, flag)] of given settings without effect, and the flag with which they have one.
    given: {name: argument that set it}. Raises UserError for --base_learning_rate with Muon, which
    looks like the learning rate of the run but would have no effect.
    """
    ignored = []
    for is_used, flag, names in USED_IF:
        names = [name for name in names.split() if name in given]
        if names and not is_used(settings):
            ignored.append((names, f"--{flag}"))
    by_hand = given.get("base_learning_rate", "").startswith("--")
    if by_hand and any("base_learning_rate" in names for names, _ in ignored):
        raise UserError(
            "base_learning_rate cannot be used with optimizer = muon: use --optimizer=adamw "
            "(config/plain_llama2c.py has llama2.c's full recipe), or set --hidden_lr instead"
        )
    return ignored


CHOICES = {
    "arch": ARCHS,
    "optimizer": OPTIMIZERS,
    "cooldown_shape": SHAPES,
    "decay_shape": DECAYS,
    "activation_checkpointing": ACTIVATION_CHECKPOINTING,
    "attention": KERNELS,
    "compile": ("auto", "True", "False"),
    "resume": ("auto", "no"),
}
# name: (minimum, maximum, text for the error). If 0 is not allowed, the minimum is the smallest
# normal float, because train.py flushes denormals to 0
INTEGERS = "batch_size gradient_accumulation_steps eval_interval eval_iters log_interval keep_last"
NOT_NEGATIVE = "save_interval warmup_iters momentum_warmup price"
WEIGHT_DECAYS = "weight_decay muon_weight_decay embedding_weight_decay"
RANGES = {
    **dict.fromkeys(INTEGERS.split(), (1, math.inf, "at least 1")),
    **dict.fromkeys(NOT_NEGATIVE.split(), (0, sys.float_info.max, "a finite number, 0 or more")),
    # rate * decay near 1 would replace the weights in every step
    **dict.fromkeys(WEIGHT_DECAYS.split(), (0, 10, "a number from 0 to 10")),
    **dict.fromkeys(("cooldown_frac", "final_lr_frac"), (0, 1, "a number from 0 to 1")),
    "max_iters": (1, 10**12, "a number from 1 to 10 ** 12"),
    "max_minutes": (0, 1e7, "a number from 0 (no limit) to 1e7"),
    "minutes": (0, 1e7, "a number from 0 (off) to 1e7"),
    "tokens": (0, 10**15, "a number from 0 (off) to 10 ** 15"),
    "depth": (0, 48, "a number from 0 (off) to 48"),
    **dict.fromkeys(GROUPS["rates"], (sys.float_info.min, 1e30, "a number above 0, at most 1e30")),
    **dict.fromkeys(
        [*GROUPS["moments"], "neuron_beta"], (0, 1 - 2**-53, "at least 0 and less than 1")
    ),
    "grad_clip": (0, sys.float_info.max, "a finite number, 0 (no limit) or more"),
    "order_weight": (0, 1000, "a number from 0 to 1000"),
    "mfu": (sys.float_info.min, 1, "a number above 0, at most 1"),
    "seed": (0, 2**63 - 1, "a number from 0 to 2 ** 63 - 1"),
}


def check(settings):
    """Raise UserError for a setting that is out of range."""
    if os.path.realpath(settings["out_dir"]) == os.path.realpath(settings["data_dir"]):
        raise UserError(
            f"out_dir = {settings['out_dir']} is also the data_dir, and the run would replace its "
            f"tokenizer.model: use another folder"
        )
    for name, choices in CHOICES.items():
        if settings[name] not in choices:
            expected = " or ".join(choices) if len(choices) == 2 else "one of " + ", ".join(choices)
            raise UserError(f"{name} = {settings[name]}: expected {expected}")
    for name, (minimum, maximum, expected) in RANGES.items():
        if not minimum <= settings[name] <= maximum:
            raise UserError(f"{name} = {settings[name]}: expected {expected}")
