"""
Train a Llama on the token shards of tinystories.py or webtext.py.

    python train.py --vocab_size=4096 --out_dir=out
    python train.py config/baby128.py --max_iters=500
    python train.py --init_from=resume --out_dir=out     # continue where it stopped
    torchrun --nproc_per_node=2 train.py --out_dir=out   # the same steps, shared by two processes

out_dir then has ckpt.pt (the latest checkpoint, with earlier ones and best.pt beside it), model.bin
and tokenizer.bin (the best model so far, for ./run), tokenizer.model, log.jsonl (one JSON object a
line; doc/log-fields.md explains the fields), and at the end loss.png. Ctrl-C stops the run with a
checkpoint; doc/long-runs.md says how.

The file tells a run in order: settings; what to begin from; data; model; optimizer; folder and log;
the loop; the end. training/ holds what a step does not need to show.
"""

import math
import os
import shlex
import sys
import time
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

from configurator import UserError, configure, settings_of
from system.tuning import tune_process

START = time.perf_counter()  # before torch is loaded: time_s counts from here

# -----------------------------------------------------------------------------
# the folder of the run
out_dir = "out"  # checkpoints, model.bin and log.jsonl go here
resume = "no"  # auto: continue the run in out_dir if it has a checkpoint, else as init_from says
picture = True  # draw loss.png at the end, where matplotlib is installed
# what it begins from
init_from = "scratch"  # scratch, resume (the run in out_dir), or the path of a checkpoint
eval_only = False  # evaluate the checkpoint of init_from and stop
# how often it evaluates, logs and saves
eval_interval = 200  # steps between evaluations
eval_iters = 100  # validation batches at most; fewer where they hold the whole text
log_interval = 10  # steps between lines in the log
always_save_checkpoint = True  # after every evaluation; False: only when it is the best so far
save_interval = 0  # steps between additional checkpoints; 0: none
keep_last = 2  # checkpoints kept: ckpt.pt and the ones before it
# data
data_dir = "data"  # as in tinystories.py or webtext.py
vocab_source = "custom"  # custom, bpe or llama2
batch_size = 8  # sequences a micro-batch
gradient_accumulation_steps = 1  # micro-batches a step, over all processes
# the model
arch = "modded"  # llama, portable or modded: presets for the options below that are not given
vocab_size = 4096  # as in the shards; 0: Llama 2's own 32,000
max_seq_len = 1024  # tokens a sequence: the context of the model
dim = 256  # width of the residual stream
n_layers = 4  # transformer blocks
n_heads = 2  # query heads
n_kv_heads = 0  # key and value heads; 0: as many as n_heads
hidden_dim = 0  # width of the feed-forward; 0: from dim and multiple_of
multiple_of = 32  # rounds hidden_dim up
tie_embeddings = True  # the output head is the embedding table
qk_norm = False  # RMSNorm of each query and key head; portable, modded: True
norm_gains = True  # RMSNorm has learned gains; modded: False
activation = "swiglu"  # of the feed-forward: swiglu or relu2; modded: relu2
logit_softcap = 0.0  # c: logits become c * tanh(logits / c); 0: none
sliding_window = 0  # positions that an S layer attends to; 0: all; modded: 64
window_pattern = "SSSL"  # one letter a layer, repeated: S window, L everything
embedding_norm = False  # RMSNorm after the embedding; modded: True
residual_scalars = False  # learned weights of residual and embedding, by layer; modded: True
value_embeddings = 0  # layers, from the first, with an embedding of values; -1: all; modded: -1
bigram_rows = 0  # rows of a table of token pairs, by their hash; 0: none; modded: 16384
smear = False  # a gate adds the embedding of the previous token; modded: True
vocab_multiple = 1  # embedding and head are padded in memory to a multiple of this many rows
dropout = 0.0  # share of activations dropped in training
# how its weights begin
zero_init = False  # projections into the residual stream, and an untied head, start at zero
embedding_std = 0.0  # initial std of the embedding (0: automatic); optim.py: its rate follows
head_std = 0.0  # initial std of an untied head; 0: 0.02
# how long it trains
max_iters = 1000  # steps
max_minutes = 0.0  # minutes of training, with the schedule fitted to them; 0: max_iters decides
# the optimizer
optimizer = "muon"  # muon: matrices by Muon, the rest by AdamW; or adamw for all
neuron_beta = 0.95  # NorMuon: decay rate of each neuron's mean squared update; 0: plain Muon
grad_clip = 1.0  # largest norm of the gradient; 0: no limit
# learning rates
hidden_lr = 0.02  # matrices, by Muon
embedding_lr = 0.05  # embedding, by the AdamW beside Muon
bigram_lr = 0.005  # bigram table, likewise
head_lr = 0.012  # output head, likewise
scalar_lr = 0.01  # scalars and gains, likewise
base_learning_rate = 2e-3  # everything, with optimizer = adamw
# moments
momentum = 0.95  # Muon's, after it has risen from 0.85
muon_beta1 = 0.8  # beta1 of the AdamW beside Muon
muon_beta2 = 0.95  # beta2 of the AdamW beside Muon
beta1 = 0.9  # with optimizer = adamw
beta2 = 0.95  # with optimizer = adamw
# weight decay
muon_weight_decay = 0.0  # of matrices, by Muon
weight_decay = 0.1  # of matrices, with optimizer = adamw
decay_shape = "constant"  # constant, or linear: weight decay falls to 0 over the run
# the schedule
warmup_iters = 0  # steps in which the rates rise; at most half of max_iters
momentum_warmup = 100  # steps in which Muon's momentum rises
cooldown_frac = 0.6  # last part of the run, in which the rates fall
cooldown_shape = "linear"  # linear or cosine
final_lr_frac = 0.0  # where the rates end, as a fraction of the full rates
# what changes the last digits
seed = 1337  # of the initial weights and the order of the data
dtype = "auto"  # of matrix products: float32, bfloat16, float16; auto: whichever is fast here
fp8_head = False  # the head's products in 8 bits, on GPUs that have them (RTX 40, H100)
activation_checkpointing = "none"  # less memory, more time: none, selective or block (most)
# what changes the speed alone
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the first there is of cuda, mps, cpu
attention = "sdpa"  # kernel on a GPU: sdpa, flex (FlexAttention) or flash (flash-attn)
compile = "auto"  # torch.compile, slow to start: True, False, or auto: in longer runs
fsdp = False  # under torchrun: shard the model (FSDP2) instead of copying it (DDP)
# what leaves this machine; access tokens are read from the environment or .env
hub_repo = ""  # user/name on Hugging Face: gets every checkpoint, and resume = auto looks there too
hub_private = True  # create that repository as private
hub_keep_local = True  # False: delete earlier checkpoints here once they are uploaded
wandb_project = ""  # Weights & Biases project: gets the numbers of log.jsonl
wandb_run = ""  # name of the run there
on_finish = ""  # shell command to run when all steps are done and everything is uploaded
# before anything is spent
estimate = False  # print parameters, memory, hours and cost on some GPUs, and stop
mfu = 0.4  # share of a GPU's peak that the estimate assumes
price = 2.4  # dollars per GPU hour, for the estimate
given = configure(globals())
# -----------------------------------------------------------------------------

tune_process()

import torch

from dataset import DataPaths, TokenData, TrainBatches, ValidBatches, ahead
from formats.modelbin import export_model
from model import ACTIVATION_CHECKPOINTING, Transformer
from optim import make_optimizer, set_rates, table
from report.curves import find_runs
from system.hardware import describe, git_commit, peak_flops, pick_dtype
from system.progress import print_line, progress
from system.threads import Threads
from tokenizer import open_tokenizer
from training import fit, parallel
from training.away import Away
from training.checkpoint import (
    FORMAT,
    CheckpointWriter,
    RunState,
    load_model,
    optimizer_tensors,
    put_aside,
    versions,
)
from training.parallel import FIRST, RANK, WORLD_SIZE, say
from training.resume import begin, check_machines, restore_run
from training.runbar import RunBar
from training.rundir import RunDir
from training.settings import SECRET, args_of

torch.set_flush_denormal(True)  # denormals slow a CPU many times over; before its threads begin
fit.use_private_compile_cache()
parallel.errors_of_ranks()


# ---- the parts of a run that a loop shows by name


@torch.no_grad()
def evaluate(model, batches, to_device, stop):
    """Mean loss over validation batches, nats a token; None where a stop was asked for meanwhile"""
    model.eval()
    total, n_targets = 0.0, 0
    for x, y in batches:
        if stop.in_any_rank():
            model.train()
            return None
        n = int((y >= 0).sum())
        x, y = to_device(x, y)
        loss = model(x, y)
        if n:  # a rank may have one batch less than others
            total, n_targets = total + loss.item() * n, n_targets + n
    model.train()
    total, n_targets = parallel.total(total, n_targets)
    return total / n_targets


def export_best(model, path, is_sharded):
    """Write model.bin; on failure, warn and continue. Returns whether it is written."""
    failed = False
    if is_sharded:
        weights = {name: parallel.whole(t).cpu() for name, t in model.state_dict().items()}
        if FIRST:
            model = Transformer(model.args)
            model.load_state_dict(weights)
    if FIRST:
        try:
            export_model(model, path, fingerprint=tokenizer.fingerprint if tokenizer else 0)
        except UserError as e:
            failed = True
            print_line(f"warning: {e}; training continues", sys.stderr)
    return not parallel.any_rank(failed)


def draw_losses(folder):
    """Draw loss.png; on failure, warn and continue."""
    from report.pictures import draw_runs

    try:
        draw_runs(find_runs([folder]), os.path.join(folder, "loss.png"))
    except Exception as e:
        print(f"warning: no loss.png ({type(e).__name__}: {e})", file=sys.stderr)


# ---- what to begin from: nothing, a checkpoint's weights, or a run to resume

# From here on `settings` are those of the run: of this command, or mostly of the checkpoint when a
# run is resumed. The names of the block above are not read any more
this_device = parallel.start(device)
start = begin(settings_of(globals()), given)
settings = SimpleNamespace(**start.settings)
saved_settings = {name: value for name, value in vars(settings).items() if name not in SECRET}

# ---- data

paths = DataPaths(settings.data_dir, settings.vocab_source, settings.vocab_size)
model_args = args_of(vars(settings), (start.checkpoint or {}).get("model_args"))
n_accumulated = settings.gradient_accumulation_steps
step_size = settings.batch_size * n_accumulated  # sequences, of all ranks together
tokens_a_step = step_size * settings.max_seq_len
if settings.estimate:
    from training.estimate import estimate_lines

    for line in estimate_lines(model_args, vars(settings), tokens_a_step):
        say(line)
    raise SystemExit
micro_size, n_micro = parallel.share_of_step(settings.batch_size, n_accumulated)
check_machines(start, settings.out_dir)
tokenizer = None
if os.path.exists(paths.tokenizer_model):
    tokenizer = open_tokenizer(paths.tokenizer_model)
data = TokenData(paths, settings.max_seq_len, tokenizer, check=parallel.LOCAL_RANK == 0)
trained_with = (start.checkpoint or {}).get("tokenizer_hash", "")  # "": unknown
if tokenizer and trained_with not in ("", tokenizer.hash):
    raise UserError(
        f"{start.path} was trained with another {paths.tokenizer_model}: copy the tokenizer.model "
        f"of its folder to another --data_dir, and pretokenize there"
    )
batches = TrainBatches(data.train, settings.max_seq_len, settings.seed, data)
if batches.n_windows < step_size:
    raise UserError(
        f"the training shards hold {batches.n_windows} sequences of {settings.max_seq_len} tokens, "
        f"less than the {step_size} of one step: give more text or a smaller --batch_size"
    )


def to_device(x, y):
    return x.to(this_device, non_blocking=True), y.to(this_device, non_blocking=True)


valid_size = settings.max_seq_len, settings.batch_size, settings.eval_iters
validation = ValidBatches(data.valid, *valid_size, RANK, WORLD_SIZE)


def bits_per_byte(loss):
    """loss / ln 2 bits a token, times tokens a byte; None where the bytes are unknown."""
    ratio = data.tokens_per_byte()
    return loss / math.log(2) * ratio if ratio else None


def show(loss):
    bpb = bits_per_byte(loss)
    return f"validation loss {loss:.4f}" + (f", {bpb:.4f} bits per byte" if bpb else "")


# ---- model

threads = Threads(this_device)
dtype_name = settings.dtype
if settings.dtype == "auto" and start.is_resumed:  # as it began
    dtype_name = start.checkpoint["compute_dtype"].removeprefix("torch.")
compute_dtype = parallel.from_first(pick_dtype(dtype_name, this_device))  # "auto": a measurement
is_sharded = settings.fsdp and WORLD_SIZE > 1
if settings.fsdp and not is_sharded:
    print("warning: fsdp has nothing to share in one process; start several with torchrun")
if is_sharded and settings.compile == "True":
    say("compile is left out under fsdp")
if is_sharded and compute_dtype is torch.float16:
    raise UserError("float16 cannot be used with fsdp: take --dtype=bfloat16 or float32")
torch.manual_seed(settings.seed)
if this_device.type == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
if start.checkpoint and not start.is_resumed:
    model = load_model({**start.checkpoint, "model_args": model_args.to_dict()}, start.path)
else:
    model = fit.make_model(model_args)
n_params = model.n_params()
model.to(this_device)
if is_sharded:
    parallel.shard(model, this_device)
if settings.fp8_head and not settings.eval_only:
    fit.check_fp8(model_args, micro_size * settings.max_seq_len, this_device)
if settings.attention != "sdpa" and not settings.eval_only:
    fit.check_attention(settings.attention, this_device, compute_dtype, settings.dropout)
model.dtype, model.fp8_head = compute_dtype, settings.fp8_head
for block in model.layers:
    block.recompute = ACTIVATION_CHECKPOINTING[settings.activation_checkpointing]
is_compiled = fit.worth_compiling(settings, model, tokens_a_step, this_device, is_sharded)

# ---- optimizer, and what a resumed run has reached

# `optimizer` is the setting
model_optimizer = make_optimizer(model, settings.optimizer, vars(settings))
scaler = torch.amp.GradScaler(this_device.type, enabled=compute_dtype is torch.float16)
state = RunState()
if start.is_resumed:
    state = restore_run(start, model, model_optimizer, scaler, compute_dtype, batches.n_windows)
start.checkpoint = None  # its memory is not needed any more
first_step = state.iter_num

stop = parallel.StopRequest()
if settings.eval_only:
    measured = progress(validation, desc="evaluation", disable=not FIRST)
    say(f"step {state.iter_num}: {show(evaluate(model, measured, to_device, stop))}")
    raise SystemExit
is_past = not settings.max_minutes and state.iter_num > settings.max_iters
if is_past or (state.is_done(settings) and state.evaluated == state.iter_num):
    if settings.resume == "auto":
        say(f"the run in {settings.out_dir} is complete ({state.iter_num} steps)")
        away = Away(settings, is_new=False)
        away.wrap_up(away.finish(), is_finished=True)
        raise SystemExit
    limit = "max_minutes" if settings.max_minutes else "max_iters"
    raise UserError(
        f"this run is complete ({state.iter_num} steps); raise --{limit} to train further"
    )

# ---- fitting the step to the machine

if this_device.type == "cuda" and not is_sharded:  # whose ranks would wait for the one without room
    parts = micro_size, n_micro, this_device
    micro_size, n_micro = fit.fit_micro_batch(model, model_optimizer, *parts)
if settings.attention != "sdpa" or is_compiled:
    x, y = to_device(*batches.at(0, micro_size))
if settings.attention != "sdpa":
    fit.use_attention(model, settings.attention, x, y)
if is_compiled:
    fit.compile_model(model, x, y, settings.dropout)
net = model if is_sharded else parallel.replicate(model, this_device)  # what a step calls
layout = batches, state.n_sequences, micro_size, n_micro, this_device
stream = ahead(partial(parallel.micro_batch, *layout))

# ---- the folder, its log, and what leaves the machine

parallel.wait_for_all()  # all have read the checkpoints, which may now be moved
run = None  # of the first rank
if FIRST:
    run = start.run or RunDir(settings.out_dir)
    if start.is_resumed:
        put_aside(settings.out_dir, start.damaged, state.iter_num)
    else:
        run.set_aside_earlier_run()
    if tokenizer:  # so that out_dir has all that ./run and sample.py need
        run.add_tokenizer(tokenizer, paths.tokenizer_model)
    else:
        print(f"without {paths.tokenizer_model}, bits per byte are unknown and ./run needs one")
    run.open_log(state.iter_num, state.evaluated)
parallel.wait_for_all()
away = Away(settings, is_new=not start.is_resumed)
away.start_metrics(saved_settings)
is_latest = start.is_resumed and os.path.basename(start.path) == "ckpt.pt"
latest_step = state.iter_num if is_latest else None
writer = CheckpointWriter(settings.out_dir, settings.keep_last, latest_step, installed=away.upload)
peak = peak_flops(this_device, compute_dtype) if FIRST else None
n_train, n_valid = (sum(map(len, shards)) for shards in (data.train, data.valid))
facts = {  # of every checkpoint, beside state
    "format": FORMAT,
    "model_args": model_args.to_dict(),
    "n_windows": batches.n_windows,
    "tokenizer_hash": tokenizer.hash if tokenizer else "",
    "config": saved_settings,
    "data_path": os.path.relpath(settings.data_dir, settings.out_dir),
    "compute_dtype": str(compute_dtype),
    "versions": versions(),
}


def check_folder():
    """Where out_dir was moved or deleted during training, go on in a new one."""
    if parallel.any_rank(FIRST and run.is_lost()):
        writer.wait()
        if FIRST:
            run.begin_again()
        state.best_val_loss, writer.latest_step = math.inf, None


def log(kind, **values):
    """Write a line of the log, and send it to Weights & Biases; the first rank alone does."""
    check_folder()
    if kind != "start":
        values = {
            "step": state.iter_num,
            "tokens": state.n_sequences * settings.max_seq_len,
            "time_s": round(time.perf_counter() - START, 3),
            "train_s": round(state.train_s, 3),
            **values,
        }
    if FIRST:
        run.log(kind, **values)
        away.log(kind, values)


def save(is_best=False):
    """Begin to write a checkpoint; training continues meanwhile, except under FSDP."""
    checkpoint = {**facts, **asdict(state), "scaler": scaler.state_dict()}
    if is_sharded:
        writer.save_sharded(checkpoint, model, model_optimizer, is_best)
    elif FIRST:
        checkpoint["model"] = model.state_dict()
        checkpoint["optimizer"] = optimizer_tensors(model, model_optimizer)
        writer.save(checkpoint, is_best)


say(table(model_optimizer))
if settings.on_finish:
    say(f"when the run is finished, this command runs: {settings.on_finish!r}")
reached = f"{state.iter_num} of {settings.max_iters} steps"
if settings.max_minutes:
    reached = f"{state.train_s / 60:.3g} of {settings.max_minutes:g} minutes"
say(
    f"{n_params:,} parameters, {n_train:,} training tokens ({batches.coverage:.2%} in windows), "
    f"{reached} done; "
    f"{this_device}, {str(compute_dtype).removeprefix('torch.')}"
    + (f", {WORLD_SIZE} processes ({'FSDP' if is_sharded else 'DDP'})" if WORLD_SIZE > 1 else "")
)
log(
    "start",
    config=saved_settings,
    model_args=model_args.to_dict(),
    n_params=n_params,
    train_tokens=n_train,
    valid_tokens=n_valid,
    coverage=batches.coverage,
    processes=WORLD_SIZE,
    compute_dtype=str(compute_dtype).removeprefix("torch."),
    flops_per_token=model.flops_per_token(),
    peak_flops=peak,
    rates={group["role"]: group["initial_lr"] for group in model_optimizer.param_groups},
    commit=git_commit(),
    **describe(this_device),
)

# ---- the loop: evaluate and save where it is time, take a step, log

stop.listen()
model_path = os.path.join(settings.out_dir, "model.bin")
val_loss, best_before, diverged = math.inf, state.best_val_loss, None
since, unlogged_steps = time.perf_counter(), 0  # since the last line of the log
stopping, done = False, state.is_done(settings)
bar = RunBar(settings, state, len(validation), disable=not FIRST)
while True:
    time_to_eval = state.iter_num % settings.eval_interval == 0 or done
    time_to_save = settings.save_interval > 0 and state.iter_num % settings.save_interval == 0
    time_to_save &= state.iter_num != first_step

    # ---- evaluate, export the best model so far, save
    if time_to_eval or time_to_save or stopping:
        data.check_unchanged()  # before a model of other text replaces a checkpoint
    is_best, has_evaluated = False, False
    if time_to_eval and state.evaluated != state.iter_num and not stopping:
        val_loss = evaluate(model, bar.evaluating(validation), to_device, stop)
        if val_loss is None:  # told to stop: a resumed run begins with this evaluation
            break
        if not math.isfinite(val_loss):
            diverged = f"validation loss is {val_loss}"
            break
        state.evaluated, has_evaluated = state.iter_num, True
        log("eval", val_loss=val_loss, val_bpb=bits_per_byte(val_loss))
    if writer.lost_best():  # it could not be written: the next has to beat the one before it
        state.best_val_loss = best_before
    if has_evaluated:
        is_best = val_loss < state.best_val_loss
        if is_best and (is_best := export_best(model, model_path, is_sharded)):
            best_before, state.best_val_loss = state.best_val_loss, val_loss
        if FIRST:
            best = ", the best so far" if is_best else ""
            print_line(f"step {state.iter_num}: {show(val_loss)}{best}")
    if is_best or (has_evaluated and settings.always_save_checkpoint) or time_to_save:
        save(is_best)
    if done or stopping:
        break
    if has_evaluated or time_to_save:
        since = time.perf_counter()

    # ---- one step of the optimizer
    if settings.dropout:  # the same in a resumed run, and another in each rank
        torch.manual_seed(hash((settings.seed, state.iter_num, RANK)))
    set_rates(model_optimizer, settings, state.iter_num, state.part_done(settings, since))
    loss = 0.0
    for i in range(n_micro):
        x, y = to_device(*next(stream))
        parallel.sync_gradients(net, i == n_micro - 1)
        micro_loss = net(x, y) / n_micro
        scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    scaler.unscale_(model_optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)
    scaler.step(model_optimizer)
    scaler.update()
    model_optimizer.zero_grad(set_to_none=True)
    state.iter_num += 1
    state.n_sequences += step_size
    unlogged_steps += 1
    bar.step(since)
    stopping, done = stop.in_any_rank(), state.is_done(settings, since)

    # ---- log
    is_due = state.iter_num % settings.log_interval == 0 or state.iter_num == 1
    is_due |= state.iter_num % settings.eval_interval == 0 or done or stopping
    if is_due or (settings.save_interval > 0 and state.iter_num % settings.save_interval == 0):
        loss = parallel.total(float(loss))[0] / WORLD_SIZE  # waits for the device
        grad_norm = float(parallel.whole(grad_norm))
        elapsed = time.perf_counter() - since
        state.train_s += elapsed
        if not math.isfinite(loss):
            diverged = f"loss is {loss}"
        elif not math.isfinite(grad_norm) and not scaler.is_enabled():  # which skips such steps
            diverged = f"gradient norm is {grad_norm}"
        if diverged:
            break
        tok_s = unlogged_steps * tokens_a_step / elapsed
        first_rate = model_optimizer.param_groups[0]["lr"]
        values = {"loss": loss, "lr": first_rate, "grad_norm": grad_norm}
        if peak:
            values["mfu"] = round(tok_s * model.flops_per_token() / (peak * WORLD_SIZE), 4)
        log("train", **values, tok_s=round(tok_s))
        bar.measured(loss, elapsed / unlogged_steps, tok_s)
        threads.watch(unlogged_steps, elapsed)
        since, unlogged_steps = time.perf_counter(), 0

# ---- the end: a last checkpoint, the log's last line, the picture, uploads

bar.close()
writer.wait()
check_folder()
if not diverged and parallel.any_rank(FIRST and writer.latest_step != state.iter_num):
    if writer.lost_best():
        state.best_val_loss = best_before
    save()
    writer.wait()
if not diverged and state.best_val_loss == math.inf:  # stopped before the first evaluation
    export_best(model, model_path, is_sharded)
stop.restore()
finished = done and state.evaluated == state.iter_num
reason = "diverged" if diverged else "finished" if finished else "interrupted"
log("end", reason=reason, best_val_loss=state.best_val_loss)
if FIRST and settings.picture and find_spec("matplotlib") is not None:
    draw_losses(settings.out_dir)
all_arrived = away.finish()
if diverged:  # the last good checkpoint is untouched
    rates = [f"{group['role']}_lr" for group in model_optimizer.param_groups]
    rates = ["base_learning_rate"] if settings.optimizer == "adamw" else rates
    raise UserError(
        f"the {diverged} at step {state.iter_num}: training has diverged; try smaller rates "
        f"(now {' '.join(f'--{name}={vars(settings)[name]:g}' for name in rates)}) or a longer "
        f"--warmup_iters"
    )
if writer.error:
    saved = writer.latest_step or first_step
    raise UserError(f"{writer.error}; of the {state.iter_num} steps, {saved or 'none'} are saved")
if finished:
    say(f"best {show(state.best_val_loss)}; wrote {model_path}")
    if val_loss > state.best_val_loss:
        say("the last step was worse: model.bin and best.pt are of the best, ckpt.pt of the last")
    if tokenizer:
        say(f'next: ./run {shlex.quote(model_path)} -i "Once upon a time"')
else:
    say(f"stopped at step {state.iter_num}; {os.path.join(settings.out_dir, 'ckpt.pt')} is saved")
    launch = "python"
    if WORLD_SIZE > 1:
        launch = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', WORLD_SIZE)}"
    flags = f"--init_from=resume --out_dir={shlex.quote(settings.out_dir)}"
    say(f"to continue: {launch} train.py {flags}{' --fsdp' if is_sharded else ''}")
    if state.best_val_loss == math.inf:
        say(f"{model_path} is of this step: nothing was evaluated yet")
away.wrap_up(all_arrived, finished)
