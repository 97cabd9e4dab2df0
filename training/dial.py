"""
The dial: --minutes, --tokens or --depth chooses the shape of the model, its batches, rates and
regularization for this machine and this text. Settings that are given keep their values.

Everything follows from two numbers: the operations that the run can afford, and the tokens of text.
With enough text, the rates lie between those for twenty seconds and for ten minutes,
config/sprint_cpu.py and config/speedrun_cpu.py. With little text, a larger model reads it less
often, and is kept from learning it by heart, as in config/slowrun_cpu.py. doc/LOG.md has the runs
from which the constants come.
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
from training.settings import GROUPS, RANGES, args_of, unused
from training.settings import check as check_ranges

DIALS = GROUPS["dial"]
DEEP = 8  # from this many layers on, every fourth one sees the whole context
DEEPEST = RANGES["depth"][1]
# Depths of the models that are timed, and sequences per step: a GPU needs more for its full speed
TIMED = {"cpu": ((2, 4), 2), "gpu": ((8, 12), 16)}
TIMED_CONTEXT = 4096  # tokens per sequence, at most
TIMED_S = 1.0  # seconds for each model
SHORTEST = 0.001  # minutes
EVALUATIONS = 5  # in a run
EVALUATED = 0.05  # validation tokens of an evaluation, at most, as a part of the run's tokens

# The run that everything is relative to: ten minutes on two cores of an AMD EPYC
OPERATIONS, FLOPS_PER_TOKEN, STEP_TOKENS = 2.46e14, 28e6, 8192
TOKENS = OPERATIONS / FLOPS_PER_TOKEN
SIZE_POWER = 0.55  # operations per token grow with this power of the run's operations
STEP_POWER = 0.7  # tokens per step grow with this power of the run's tokens
SMALLEST_STEP, LARGEST_STEP = 1024, 1 << 20
CONTEXTS = 128, 4096  # max_seq_len for steps of SMALLEST_STEP and of STEP_TOKENS
# Rates of a run of twenty seconds, SHORT_TOKENS long, and of one of ten minutes. head_lr is for
# HEAD_DIM dims, see rates()
SHORT_TOKENS = 442_368
RATES = {
    "embedding_lr": (0.1, 0.05),
    "bigram_lr": (0.02, 0.005),
    "head_lr": (0.01, 0.003),
    "scalar_lr": (0.03, 0.01),
    "momentum": (0.9, 0.95),
    "muon_beta1": (0.6, 0.8),
}
# Rather than read its text more than FEW_EPOCHS times, a run takes a larger model, up to about
# LARGEST operations per token for LARGEST_TEXT tokens of text (the nearest depth may have more).
# This limit falls as the root of a shorter text and grows in proportion to a longer one, which was
# not tried. If even that model would read the text more than MOST_EPOCHS times, the run is cut.
FEW_EPOCHS, MOST_EPOCHS = 5, 5.5
LARGEST, LARGEST_TEXT = 64e6, 3_450_000
# Weight decay is DECAY at the scarcity of text (see Plan) of the ten-minute run, DECAY_SCARCITY,
# and grows as the root of the scarcity
DECAY, DECAY_SCARCITY = 0.105, 20
MOST_DECAY = 1.0
# If text is scarcer than SCARCE, bigrams are left out and value embeddings decay; if it is scarcer
# than VERY_SCARCE, dropout is added
SCARCE, VERY_SCARCE, DROPOUT = 30, 90, 0.1
# If it is scarcer than HEAD_SCARCITY, head_lr falls as the root of the scarcity
HEAD_DIM, HEAD_SCARCITY = 256, 50


def in_use(settings):
    """Return whether a setting of the dial is set."""
    return any(settings[name] for name in DIALS)


def shape_of(depth, dim=0):
    """
    Return the settings of a model's shape: 64 dims for each layer, as in nanochat, unless dim is
    given; heads of 64 dims or little more; and in deep models every fourth layer without a window.
    """
    dim = dim or 64 * depth
    n_heads = max((n for n in range(1, dim // 64 + 1) if dim % (2 * n) == 0), default=1)
    pattern = "S" if depth < DEEP else "SSSL"
    return {"dim": dim, "n_layers": depth, "n_heads": n_heads, "window_pattern": pattern}


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
    timed = settings | {
        "batch_size": n_sequences,
        "gradient_accumulation_steps": 1,
        "max_seq_len": min(settings["max_seq_len"], TIMED_CONTEXT),
        # may not fit the models that are timed
        "n_kv_heads": 0,
        "value_embeddings": -1 if settings["value_embeddings"] else 0,
    }
    for depth in depths:
        model = timed | shape_of(depth)
        points.append((math.log(flops_per_token(model)), operations_per_second(model, device)))
    (x0, y0), (x1, y1) = parallel.from_first(points)

    def speed_at(flops):
        part = (math.log(flops) - x0) / (x1 - x0)
        return WORLD_SIZE * (y0 + (y1 - y0) * min(max(part, 0.0), 1.0))

    return speed_at


def operations_per_second(settings, device):
    """Return the speed of training steps. Raises UserError if they do not fit into memory."""
    settings = settings | {"compile": "False"}
    try:
        return flops_per_token(settings) * tokens_per_second(settings, device, TIMED_S)
    except RuntimeError as e:
        reason = str(e).strip().partition("\n")[0]
        raise UserError(
            f"cannot time a model of {settings['n_layers']} layers for --minutes ({reason}): use "
            f"--tokens or --depth instead"
        ) from None


def corrected(speed_at, plan, device):
    """
    Return speed_at() times a factor that is right for a plan, whose steps are timed. Short steps
    spend more of their time in the optimizer than those of the models that were timed before.
    """
    estimate = speed_at(plan.flops)
    if plan.tokens_per_step * plan.flops > TIMED_S * estimate:  # a long step
        return speed_at
    batch = {"batch_size": plan.settings["batch_size"] // WORLD_SIZE}
    measured = WORLD_SIZE * operations_per_second(plan.settings | batch, device)
    factor = parallel.from_first(measured) / estimate
    return lambda flops: factor * speed_at(flops)


def sizes_of_text(settings, seq_len):
    """
    Return the tokens of training and of validation text. Raises UserError without shards, or if
    they are too short for sequences of seq_len tokens.
    """
    paths = DataPaths(settings["data_dir"], settings["vocab_source"], settings["vocab_size"])
    data = TokenData(paths, seq_len, check=False)
    return sum(map(len, data.train)), sum(map(len, data.valid))


def power_of_2_near(x):
    return 2 ** round(math.log2(x))


def context_and_batch(n_tokens, n_text, n_valid, kept):
    """
    Return max_seq_len and batch_size for a run of n_tokens on a text of n_text tokens. kept: the
    settings that were given, among which may be a max_seq_len or gradient accumulation.
    """
    step = STEP_TOKENS * (n_tokens / TOKENS) ** STEP_POWER
    step = min(max(step, SMALLEST_STEP), LARGEST_STEP, n_text / 4)  # an epoch has several steps
    step = power_of_2_near(step)
    n_batches = WORLD_SIZE * kept.get("gradient_accumulation_steps", 1)
    seq_len = power_of_2_near(power_law(step, (SMALLEST_STEP, STEP_TOKENS), CONTEXTS))
    longest = min(n_valid - 1, n_text // 16, step // n_batches)  # a tiny text has 16 sequences
    while seq_len > max(longest, 16):
        seq_len //= 2
    seq_len = kept.get("max_seq_len", seq_len)
    per_process = max(1, round(step / seq_len / n_batches))
    return {"max_seq_len": seq_len, "batch_size": per_process * WORLD_SIZE}


def window(settings):
    """Return sliding_window for an architecture that has one and the context in settings."""
    if not settings["sliding_window"]:
        return {}
    seq_len = settings["max_seq_len"]
    return {"sliding_window": min(max(64, seq_len // 4), 256, seq_len)}


def regularization(scarcity):
    """Return the settings that keep a model from learning its text by heart."""
    decay = min(DECAY * math.sqrt(scarcity / DECAY_SCARCITY), MOST_DECAY)
    values = {"muon_weight_decay": float(f"{decay:.1g}")}
    if scarcity > SCARCE:
        values |= {"bigram_rows": 0, "embedding_weight_decay": 0.5}
    if scarcity > VERY_SCARCE:
        values["dropout"] = DROPOUT
    return values


def power_law(x, ends, values):
    """Return the value at x of a power law through both `values` at both ends; flat beyond them."""
    part = math.log(x / ends[0]) / math.log(ends[1] / ends[0])
    return values[0] * (values[1] / values[0]) ** min(max(part, 0.0), 1.0)


def rates(n_tokens, dim, scarcity=0.0):
    """
    Return the settings in RATES for a run of n_tokens. head_lr is inversely proportional to dim, as
    in the maximal update parametrization (Yang et al. 2022, arXiv:2203.03466): a logit is a sum
    over dim channels. A text that is read often is learned by heart in the output head first.
    """
    ends = SHORT_TOKENS, TOKENS
    values = {name: power_law(n_tokens, ends, pair) for name, pair in RATES.items()}
    values["head_lr"] *= HEAD_DIM / dim * math.sqrt(HEAD_SCARCITY / max(scarcity, HEAD_SCARCITY))
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
        """The operations per token that suit this text and this many operations."""
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
        Operations / (tokens of text)², which is proportional to the epochs times the parameters
        per token of text.
        """
        return self.n_tokens * self.flops / self.n_text**2


def plan_of(depth, settings, kept, text, speed_at):
    """
    Return the Plan for a depth. text: (training tokens, validation tokens); speed_at: the function
    from measured_speed(), or None without --minutes.
    """
    settings = settings | shape_of(depth, kept.get("dim", 0)) | kept

    def plan():
        flops = flops_per_token(settings)
        operations = settings["tokens"] * flops
        if settings["minutes"]:
            operations = 60 * settings["minutes"] * speed_at(flops)
        elif not settings["tokens"]:
            operations = OPERATIONS * (flops / FLOPS_PER_TOKEN) ** (1 / SIZE_POWER)
        return Plan(settings, operations, flops, text[0])

    for _ in range(2):  # a shorter context takes fewer operations
        settings = settings | context_and_batch(plan().n_tokens, *text, kept) | kept
        settings = settings | window(settings) | kept
    return plan()


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
        raise UserError(f"no depth from 1 to {DEEPEST} fits the given settings: {error}")
    return best


def choose(settings, given, device, say=lambda line: None):
    """
    Return the settings of a run with those that the dial chooses, and lines of text that say why.
    settings: those of train.py, with the preset of --arch applied; given: {name: argument or file}
    of those that keep their values; say: prints a line before the machine is timed. Raises
    UserError if the dial cannot be used with them, or without shards.
    """
    check(settings, given)
    kept = {name: settings[name] for name in given}
    text = sizes_of_text(settings, kept.get("max_seq_len", 1))
    speed_at = None
    if settings["minutes"]:
        say("measuring the speed of this machine for --minutes")
        speed_at = measured_speed(settings, device)
    plan = best_plan(settings, kept, text, speed_at)
    if settings["minutes"]:
        plan = best_plan(settings, kept, text, corrected(speed_at, plan, device))
    chosen = {"max_iters": plan.n_steps}  # with --minutes, only an estimate
    rows = explained(plan)
    for values, _ in rows:
        chosen |= values
    settings = settings | chosen | kept
    check_ranges(settings)
    ignored = {name for names, _ in unused(settings, dict.fromkeys(chosen, "")) for name in names}
    dials = " ".join(flag(name, settings[name]) for name in DIALS if settings[name])
    lines = [f"chosen for {dials}:"]
    for values, why in rows:
        flags = [
            flag(name, settings[name]) + (" (given)" if name in given else "")
            for name in values
            if name not in ignored
        ]
        if flags:
            lines.append(f"  {' '.join(flags)}  # {why}")
    return settings, lines


def explained(plan):
    """Return [(settings that the dial chooses, why)] for a plan."""
    names = "dim", "n_layers", "n_heads", "window_pattern"
    shape = {name: plan.settings[name] for name in names}
    batch = {name: plan.settings[name] for name in ("max_seq_len", "batch_size")}
    size, ideal = plan.flops / 1e6, plan.best_flops / 1e6
    n_tokens = plan.n_steps * plan.tokens_per_step
    length = {"max_iters": plan.n_steps}
    tokens = f"{n_tokens:,} tokens"
    if plan.settings["minutes"]:
        per_s = plan.operations / plan.flops / 60 / plan.settings["minutes"]
        tokens += f", at {per_s:,.0f} per second (measured)"
        if not plan.is_cut:
            length = {"max_minutes": plan.settings["minutes"]}
    epochs = f"{plan.epochs:.2g}" if plan.epochs < 10 else f"{plan.epochs:,.0f}"
    epochs = f"the {plan.n_text:,} tokens of text are read {epochs} times"
    if plan.is_cut:
        epochs += "; more would only memorize them"
    run_rates = rates(plan.n_tokens, plan.settings["dim"], plan.scarcity)
    about_rates = "the shorter the run, the higher" if plan.n_tokens < TOKENS else "of a long run"
    if plan.scarcity > HEAD_SCARCITY:
        about_rates += "; scarce text needs a lower head_lr"
    evaluated_tokens = EVALUATED * plan.n_tokens
    per_batch = plan.settings["batch_size"] * plan.settings["max_seq_len"]
    intervals = {
        "eval_interval": math.ceil(plan.n_steps / EVALUATIONS),
        "eval_iters": max(1, round(evaluated_tokens / per_batch)),
    }
    return (
        (shape, f"{size:,.3g} million operations per token; ideal are {ideal:,.3g}"),
        (length, tokens),
        (
            batch | window(plan.settings),
            f"{plan.tokens_per_step:,} tokens per step, {plan.n_steps:,} steps",
        ),
        (run_rates, f"learning rates and momentum: {about_rates}"),
        (regularization(plan.scarcity), epochs),
        (intervals, f"{EVALUATIONS} evaluations of at most {evaluated_tokens:,.0f} tokens"),
    )


def flag(name, value):
    return f"--{name}={value:g}" if type(value) is float else f"--{name}={value}"


def check(settings, given):
    """Raise UserError if the dial cannot be used with these settings. See choose()."""
    dials = [name for name in DIALS if settings[name]]
    if settings["minutes"] and settings["tokens"]:
        raise UserError("minutes cannot be used with tokens: use only one of them")
    if 0 < settings["minutes"] < SHORTEST:
        raise UserError(f"minutes = {settings['minutes']}: expected 0 (off), or {SHORTEST} or more")
    refused = dict.fromkeys(("max_minutes", "max_iters"), (dials[0], "the length of the run"))
    if settings["depth"]:
        refused["n_layers"] = "depth", "the number of layers"
    for name, (dial, what) in refused.items():
        if name in given:
            source = "" if given[name].startswith("--") else f", which {given[name]} sets,"
            raise UserError(
                f"{name}{source} cannot be used with {dial}, which chooses {what}: leave out one "
                f"of them"
            )
    if settings["optimizer"] != "muon":
        raise UserError(
            f"{dials[0]} chooses learning rates for Muon only: leave it out or use --optimizer=muon"
        )
    if settings["init_from"] != "scratch":
        raise UserError(
            f"{dials[0]} chooses a new model and cannot be used with init_from = "
            f"{settings['init_from']}: leave it out, and set --max_minutes or --max_iters"
        )
