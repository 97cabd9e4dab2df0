"""
One dial: --minutes, --tokens or --depth chooses the shape of the model, its batches, rates and
regularization for this machine and this text. Settings that are given keep their values.

Everything follows from two numbers: the operations that the run can afford, and the tokens of text.
With enough text, the rules lie between the recipes for twenty seconds and for ten minutes,
config/sprint_cpu.py and config/speedrun_cpu.py. With little text, a larger model reads it less
often, and is kept from learning it by heart, as in config/slowrun_cpu.py (measured in doc/LOG.md).
"""

import math
from dataclasses import dataclass

import torch

from configurator import UserError
from dataset import DataPaths, TokenData
from model import Transformer
from training import parallel
from training.parallel import WORLD_SIZE
from training.runs import tokens_per_second, tokens_per_step
from training.settings import GROUPS, RANGES, args_of

DIALS = GROUPS["dial"]
DEEP, DEEPEST = 8, RANGES["depth"][1]  # layers
# Depths of the models that are timed, and sequences per step: a GPU needs more for its full speed
TIMED = {"cpu": ((2, 4), 2), "gpu": ((8, 12), 16)}
TIMED_S = 1.0  # seconds for each model
EVALUATIONS = 5  # in a run; each reads at most this part of the run's tokens:
EVALUATED = 0.05

# The run that everything is relative to: ten minutes on two cores of an AMD EPYC
OPERATIONS, FLOPS_PER_TOKEN, STEP_TOKENS = 2.46e14, 28e6, 8192
TOKENS = OPERATIONS / FLOPS_PER_TOKEN
# Powers of the operations, for operations per token, and of the tokens, for tokens per step
SIZE_POWER, STEP_POWER = 0.55, 0.7
SMALLEST_STEP, LARGEST_STEP = 1024, 1 << 20
CONTEXTS = 128, 4096  # max_seq_len for steps of SMALLEST_STEP and of STEP_TOKENS
# Rates of a run of twenty seconds, SHORT_TOKENS long, and of one of ten minutes
SHORT_TOKENS = 442_368
RATES = {
    "embedding_lr": (0.1, 0.05),
    "bigram_lr": (0.02, 0.005),
    "head_lr": (0.02, 0.003),
    "scalar_lr": (0.03, 0.01),
    "momentum": (0.9, 0.95),
    "muon_beta1": (0.6, 0.8),
}
# Before a run reads its text more than FEW_EPOCHS times, the model grows, but not past LARGEST
# operations per token for LARGEST_TEXT tokens. The limit falls as the root of a shorter text and
# grows in proportion to a longer one, which was not tried. Beyond it, the run is cut
FEW_EPOCHS, MOST_EPOCHS = 5, 5.5
LARGEST, LARGEST_TEXT = 64e6, 3_450_000
# Weight decay grows as the root of the scarcity of text; this is that of the ten-minute run
DECAY, DECAY_SCARCITY = 0.1, 20
# From SCARCE on, bigrams are left out and value embeddings decay; from VERY_SCARCE on, dropout is
# added, and head_lr is SCARCE_HEAD times what it would be
SCARCE, VERY_SCARCE = 100, 180
DROPOUT, SCARCE_HEAD = 0.1, 0.4


def in_use(settings):
    """Return whether a setting of the dial is set."""
    return any(settings[name] for name in DIALS)


def shape_of(depth):
    """
    Return the settings of a model's shape: 64 dims for each layer, as in nanochat, heads of 64
    dims, and in deep models every fourth layer without a window.
    """
    pattern = "S" if depth < DEEP else "SSSL"
    return {"dim": 64 * depth, "n_layers": depth, "n_heads": depth, "window_pattern": pattern}


def flops_per_token(settings):
    with torch.device("meta"):
        return Transformer(args_of(settings)).flops_per_token()


def measured_speed(settings, device):
    """
    Return a function: operations per token -> operations per second, of all processes. Two models
    are timed. Between them, the speed is interpolated; beyond, it is that of the nearer one.
    """
    points = []
    depths, n_sequences = TIMED["cpu" if device.type == "cpu" else "gpu"]
    for depth in depths:
        timed = settings | shape_of(depth) | {"batch_size": n_sequences, "compile": "False"}
        flops = flops_per_token(timed)
        points.append((math.log(flops), flops * tokens_per_second(timed, device, TIMED_S)))
    (x0, y0), (x1, y1) = parallel.from_first(points)

    def speed_at(flops):
        part = (math.log(flops) - x0) / (x1 - x0)
        return WORLD_SIZE * (y0 + (y1 - y0) * min(max(part, 0.0), 1.0))

    return speed_at


def sizes_of_text(settings):
    """Return the tokens of training and of validation text. Raises UserError without shards."""
    paths = DataPaths(settings["data_dir"], settings["vocab_source"], settings["vocab_size"])
    data = TokenData(paths, seq_len=1, check=False)
    return sum(map(len, data.train)), sum(map(len, data.valid))


def power_of_2_near(x):
    return 2 ** round(math.log2(x))


def context_and_batch(n_tokens, n_text, n_valid):
    """Return max_seq_len and batch_size for a run of n_tokens on a text of n_text tokens."""
    step = STEP_TOKENS * (n_tokens / TOKENS) ** STEP_POWER
    step = power_of_2_near(min(max(step, SMALLEST_STEP), LARGEST_STEP, n_text / 4))
    seq_len = power_of_2_near(power_law(step, (SMALLEST_STEP, STEP_TOKENS), CONTEXTS))
    while seq_len > 16 and seq_len >= min(n_valid, n_text // 16):  # a tiny text
        seq_len //= 2
    per_process = math.ceil(step / seq_len / WORLD_SIZE)
    return {"max_seq_len": seq_len, "batch_size": per_process * WORLD_SIZE}


def window(settings):
    """Return sliding_window for an architecture that has one and the context in settings."""
    if not settings["sliding_window"]:
        return {}
    return {"sliding_window": min(max(64, settings["max_seq_len"] // 4), 256)}


def regularization(scarcity):
    """Return the settings that keep a model from learning its text by heart."""
    decay = DECAY * math.sqrt(scarcity / DECAY_SCARCITY)
    values = {"muon_weight_decay": float(f"{decay:.1g}")}
    if scarcity > SCARCE:
        values |= {"bigram_rows": 0, "embedding_weight_decay": 0.5}
    if scarcity > VERY_SCARCE:
        values |= {"dropout": DROPOUT}
    return values


def power_law(x, ends, values):
    """Return the value at x of a power law through both `values` at both ends; flat beyond them."""
    part = math.log(x / ends[0]) / math.log(ends[1] / ends[0])
    return values[0] * (values[1] / values[0]) ** min(max(part, 0.0), 1.0)


def rates(n_tokens, scarcity=0.0):
    """Return the settings in RATES for a run of n_tokens."""
    ends = SHORT_TOKENS, TOKENS
    values = {name: power_law(n_tokens, ends, pair) for name, pair in RATES.items()}
    if scarcity > VERY_SCARCE:
        values["head_lr"] *= SCARCE_HEAD
    return {name: float(f"{value:.3g}") for name, value in values.items()}


@dataclass
class Plan:
    """A model, and the length of its run on n_text tokens."""

    settings: dict
    operations: float  # that the run can afford
    flops: float  # operations per token
    n_text: int

    @property
    def is_cut(self):
        """Whether the run ends before its operations are used up."""
        affordable = self.operations / self.flops
        return not self.settings["tokens"] and affordable > MOST_EPOCHS * self.n_text

    @property
    def n_tokens(self):
        return MOST_EPOCHS * self.n_text if self.is_cut else self.operations / self.flops

    @property
    def epochs(self):
        return self.n_tokens / self.n_text

    @property
    def tokens_per_step(self):
        return tokens_per_step(self.settings)

    @property
    def n_steps(self):
        return max(1, round(self.n_tokens / self.tokens_per_step))

    @property
    def best_flops(self):
        """The operations per token of the best model for as many operations in all."""
        if_fresh = FLOPS_PER_TOKEN * (self.operations / OPERATIONS) ** SIZE_POWER
        in_few_epochs = self.operations / (FEW_EPOCHS * self.n_text)
        text = self.n_text / LARGEST_TEXT
        return min(max(if_fresh, in_few_epochs), LARGEST * max(text, math.sqrt(text)))

    @property
    def misfit(self):
        return abs(math.log(self.flops / self.best_flops))

    @property
    def scarcity(self):
        """
        How scarce text is: operations per squared token of text, which are in proportion to the
        epochs times the parameters for each token of text.
        """
        return self.n_tokens * self.flops / self.n_text**2


def plan_of(depth, settings, kept, text, speed_at):
    """
    Return the Plan for a depth. text: (training tokens, validation tokens); speed_at: the function
    from measured_speed(), or None without --minutes.
    """
    settings = settings | shape_of(depth) | kept
    flops = flops_per_token(settings)
    for _ in range(2):  # a shorter context takes fewer operations
        operations = settings["tokens"] * flops
        if settings["minutes"]:
            operations = 60 * settings["minutes"] * speed_at(flops)
        elif not settings["tokens"]:
            operations = OPERATIONS * (flops / FLOPS_PER_TOKEN) ** (1 / SIZE_POWER)
        n_tokens = Plan(settings, operations, flops, text[0]).n_tokens
        settings = settings | context_and_batch(n_tokens, *text) | kept
        settings = settings | window(settings) | kept
        flops = flops_per_token(settings)
    return Plan(settings, operations, flops, text[0])


def best_plan(settings, kept, text, speed_at):
    """Return the Plan of the given depth, or of the one that fits best. See plan_of."""
    if settings["depth"]:
        return plan_of(settings["depth"], settings, kept, text, speed_at)
    best, error = None, None
    for depth in range(1, DEEPEST + 1):
        try:
            plan = plan_of(depth, settings, kept, text, speed_at)
        except UserError as e:  # the given settings do not fit this depth
            error = e
            continue
        if best and plan.misfit >= best.misfit:
            break
        best = plan
    if not best:
        raise error
    return best


def choose(settings, given, device):
    """
    Return the settings of a run with those that the dial chooses, and lines of text that say why.
    settings: those of train.py, with the preset of --arch applied; given: the names of those that
    keep their values. Raises UserError if the dial cannot be used with them, or without shards.
    """
    check(settings, given)
    kept = {name: settings[name] for name in given}
    n_text, n_valid = sizes_of_text(settings)
    speed_at = measured_speed(settings, device) if settings["minutes"] else None
    plan = best_plan(settings, kept, (n_text, n_valid), speed_at)
    size, best = plan.flops / 1e6, plan.best_flops / 1e6
    names = "dim n_layers n_heads window_pattern", "max_seq_len batch_size"
    shape, batch = ({name: plan.settings[name] for name in some.split()} for some in names)
    batch |= window(plan.settings)
    tokens = f"{plan.n_tokens:,.0f} tokens"
    if settings["minutes"]:
        per_s = plan.operations / plan.flops / 60 / settings["minutes"]
        tokens += f", at {per_s:,.0f} per second (measured)"
    epochs = f"the {n_text:,} tokens of text are read {plan.epochs:.2g} times"
    if plan.is_cut:
        epochs += ", and more would only teach them by heart"
    rows = (
        (shape, f"{size:.3g} million operations per token, best: {best:.3g}"),
        (length(plan), tokens),
        (batch, f"{plan.tokens_per_step:,} tokens per step, {plan.n_steps:,} steps"),
        (
            rates(plan.n_tokens, plan.scarcity),
            "short runs need higher rates, scarce text a lower head_lr",
        ),
        (regularization(plan.scarcity), epochs),
        (evaluations(plan), "evaluations take little of the time"),
    )
    dials = " ".join(flag(name, settings[name]) for name in DIALS if settings[name])
    lines = [f"chosen for {dials}:"]
    for values, why in rows:
        settings = settings | values | kept
        flags = " ".join(flag(name, settings[name]) for name in values) or "nothing"
        lines.append(f"  {flags}: {why}")
    return settings, lines


def flag(name, value):
    return f"--{name}={value:g}" if type(value) is float else f"--{name}={value}"


def length(plan):
    """Return the setting for the length of the run."""
    if plan.settings["minutes"] and not plan.is_cut:
        return {"max_minutes": plan.settings["minutes"]}
    return {"max_iters": plan.n_steps}


def evaluations(plan):
    """Return the settings for EVALUATIONS evaluations of a run, which take little of its time."""
    batch = plan.settings["batch_size"] * plan.settings["max_seq_len"]
    return {
        "eval_interval": math.ceil(plan.n_steps / EVALUATIONS),
        "eval_iters": max(1, round(EVALUATED * plan.n_tokens / batch)),
    }


def check(settings, given):
    """Raise UserError if the dial cannot be used with these settings."""
    dials = [name for name in DIALS if settings[name]]
    if settings["minutes"] and settings["tokens"]:
        raise UserError("minutes cannot be used with tokens: use only one of them")
    for name in ("max_minutes", "max_iters"):
        if name in given:
            raise UserError(
                f"{name} cannot be used with {dials[0]}, which chooses the length of the run: use "
                f"--minutes or --tokens instead"
            )
    if settings["init_from"] != "scratch":
        raise UserError(
            f"{dials[0]} chooses a new model and cannot be used with init_from = "
            f"{settings['init_from']}: leave it out, and set --max_minutes or --max_iters"
        )
