"""
Train a Llama on the token shards written by tinystories.py or webtext.py.

    python train.py --minutes=10      # chooses a model for this time, this machine and this text
    python train.py config/baby128.py --max_iters=500 --out_dir=out/baby
    python train.py --init_from=resume                   # continue an interrupted run
    torchrun --nproc_per_node=2 train.py                 # two processes share each step

The run writes to out_dir: ckpt.pt (the latest checkpoint; earlier ones and best.pt are next to it),
model.bin and tokenizer.bin (the best model so far, for ./run), tokenizer.model, log.jsonl (one JSON
object per line, see doc/log-fields.md) and, at the end, loss.png. Ctrl-C saves a checkpoint and
stops; see doc/long-runs.md.

This file follows a run in order: settings, starting point, data, model, optimizer, fitting the step
to the machine, output folder, the loop, the end. Whatever would distract from that is in training/.
"""

import math
import os
import shlex
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

from configurator import UserError, configure, settings_of
from system.tuning import tune_process

START = time.perf_counter()  # time_s in the log includes importing torch

# -----------------------------------------------------------------------------
# run folder
out_dir = "out"  # folder for checkpoints, model.bin and log.jsonl
resume = "no"  # no, or auto: continue the run in out_dir if there is one
picture = True  # draw loss.png at the end (if matplotlib is installed)
# the dial: chooses model, batch, rates, regularization and length; settings you give are kept
minutes = 0.0  # choose for this many minutes of training on this machine; 0: off
tokens = 0  # choose for this many training tokens; 0: off
depth = 0  # number of layers; alone, it also sets the length of the run; 0: off
# starting point
init_from = "scratch"  # scratch, resume (the run in out_dir), or a checkpoint's path
eval_only = False  # evaluate the checkpoint and exit
# evaluation, logging and checkpoints
eval_interval = 200  # steps between evaluations
eval_iters = 100  # maximum validation batches per evaluation
log_interval = 10  # steps between log lines
always_save_checkpoint = True  # save after every evaluation, not only if it is the best
save_interval = 0  # steps between additional checkpoints; 0: none
keep_last = 2  # recent checkpoints to keep, including ckpt.pt
# data
data_dir = "data"  # folder written by tinystories.py or webtext.py
vocab_source = "custom"  # custom, bpe or llama2
learn_orders = True  # with shards that have orders: also learn to write the orders
order_weight = 4.0  # loss weight of tokens where a story first fulfils its order
batch_size = 2  # sequences per micro-batch
gradient_accumulation_steps = 1  # micro-batches per step, over all processes
# model
arch = "modded"  # llama, portable or modded: changes the defaults marked below
vocab_size = 4096  # vocabulary size of the shards; 0: Llama 2's 32,000
max_seq_len = 4096  # context length in tokens
dim = 256  # width of the residual stream
n_layers = 4  # transformer blocks
n_heads = 4  # query heads
n_kv_heads = 0  # key/value heads; 0: same as n_heads
hidden_dim = 0  # feed-forward width; 0: derived from dim and multiple_of
multiple_of = 32  # round a derived hidden_dim up to a multiple of this
tie_embeddings = True  # use the embedding table as the output head
qk_norm = False  # RMSNorm on each query and key head; portable, modded: True
norm_gains = True  # learned gains in RMSNorm; modded: False
activation = "swiglu"  # feed-forward activation: swiglu or relu2; modded: relu2
logit_softcap = 0.0  # c in logits = c * tanh(logits / c); 0: no cap
sliding_window = 0  # tokens that an S layer attends to; 0: all; modded: 256
window_pattern = "S"  # one letter per layer, repeated: S sliding window, L full
embedding_norm = False  # RMSNorm after the embedding; modded: True
residual_scalars = False  # learned per-layer mix of residual and embedding; modded: True
value_embeddings = 0  # value embeddings in the first N layers; -1: all; modded: -1
bigram_rows = 0  # rows of the hashed bigram embedding; 0: none; modded: 16384
smear = False  # gated embedding of the previous token; modded: True
embedding_conv = 0  # tokens in a convolution of the embedded text; 0: none; modded: 4
key_conv = 0  # tokens in a convolution of each layer's keys; 0: none; modded: 4
separate_documents = False  # no document sees the one before it; modded: True
vocab_multiple = 1  # pad embedding and head rows in memory to a multiple of this
dropout = 0.0  # dropout on the embedding and on what each layer adds to the residual stream
# weight initialization
zero_init = False  # start residual projections and an untied head at zero
embedding_std = 0.0  # std of the embedding; 0: automatic, see init_std in model.py
head_std = 0.0  # std of an untied head; 0: the default, 0.02
# training length
max_iters = 1000  # steps
max_minutes = 0.0  # train for this many minutes instead; 0: use max_iters
# optimizer
optimizer = "muon"  # muon (AdamW for all but the hidden matrices) or adamw
neuron_beta = 0.95  # NorMuon's beta for the per-neuron mean square; 0: plain Muon
grad_clip = 1.0  # maximum gradient norm; 0: no limit
# learning rates
hidden_lr = 0.02  # optimizer = muon: hidden matrices (Muon)
embedding_lr = 0.05  # optimizer = muon: value embeddings, untied embedding with std > 0.1 (AdamW)
bigram_lr = 0.005  # optimizer = muon: bigram embedding (AdamW)
head_lr = 0.003  # optimizer = muon: output head, other embeddings of tokens (AdamW)
scalar_lr = 0.01  # optimizer = muon: scalars and gains (AdamW)
base_learning_rate = 2e-3  # optimizer = adamw: all parameters
# momentum
momentum = 0.95  # optimizer = muon: Muon's momentum, after rising from 0.85
muon_beta1 = 0.8  # optimizer = muon: beta1 of AdamW
muon_beta2 = 0.99  # optimizer = muon: beta2 of AdamW
beta1 = 0.9  # optimizer = adamw: beta1
beta2 = 0.95  # optimizer = adamw: beta2
# weight decay
muon_weight_decay = 0.1  # optimizer = muon: hidden matrices
embedding_weight_decay = 0.0  # optimizer = muon: what embedding_lr trains
weight_decay = 0.1  # optimizer = adamw: all but scalars and gains
decay_shape = "constant"  # constant, or linear (falling to 0 over the run)
# schedule
warmup_iters = 0  # learning-rate warm-up steps; at most half of max_iters
momentum_warmup = 100  # optimizer = muon: steps over which the momentum rises
cooldown_frac = 0.6  # final fraction of the run, after warm-up, in which learning rates fall
cooldown_shape = "linear"  # linear or cosine
final_lr_frac = 0.0  # final learning rate, as a fraction of the full rate
# seed, precision and memory
seed = 1337  # seed for initial weights and data order
dtype = "auto"  # for matmuls: float32, bfloat16, float16, or auto (the fastest here)
fp8_head = False  # compute the output head in FP8 (RTX 40, H100 and newer)
activation_checkpointing = "none"  # trade speed for memory: none, selective, or block (saves most)
# hardware and speed
device = "auto"  # cpu, cuda, cuda:1, mps, or auto (first of cuda, mps, cpu)
attention = "sdpa"  # GPU kernel: sdpa, flex (FlexAttention) or flash (flash-attn)
compile = "auto"  # use torch.compile: True, False, or auto (only for longer runs)
fsdp = False  # torchrun: shard the model (FSDP2) instead of copying it (DDP)
# uploads; access tokens are read from the environment or .env
hub_repo = ""  # Hugging Face user/name for checkpoints; resuming looks there too
hub_private = True  # create the repository as private
hub_keep_local = True  # keep earlier checkpoints here after uploading them
wandb_project = ""  # Weights & Biases project for the metrics in log.jsonl
wandb_run = ""  # Weights & Biases run name
on_finish = ""  # shell command to run once training and uploads are done
# cost estimate
estimate = False  # print parameters, memory, hours and GPU cost, and exit
mfu = 0.4  # share of a GPU's peak FLOP/s to assume
price = 2.4  # dollars per GPU-hour to assume
given = configure(globals())
# -----------------------------------------------------------------------------

tune_process()

import torch

from dataset import DataPaths, TokenData, TrainBatches, ValidBatches, prefetch
from formats.modelbin import export_model
from loss import weights_of
from model import ACTIVATION_CHECKPOINTING, Transformer
from optim import make_optimizer, set_rates, table
from report.curves import find_runs
from system.hardware import describe, git_commit, peak_flops, pick_dtype
from system.progress import print_line, progress
from system.threads import Threads
from tokenizer import open_tokenizer
from training import dial, fit, parallel
from training.away import Uploader
from training.checkpoint import (
    FORMAT,
    CheckpointWriter,
    RunState,
    load_model,
    optimizer_tensors,
    set_aside,
    versions,
)
from training.parallel import FIRST, RANK, WORLD_SIZE, say
from training.resume import check_same_checkpoint, find_start, restore_run
from training.runbar import RunBar
from training.rundir import RunDir
from training.settings import GROUPS, SECRET, args_of

torch.set_flush_denormal(True)  # denormals are very slow on CPUs; set before threads start
fit.use_private_compile_cache()
parallel.install_error_hook()


# ---- helpers


@torch.no_grad()
def evaluate(model, batches, to_device, stop):
    """Return the mean validation loss in nats per token, or None if a stop was requested."""
    model.eval()
    total, n_targets = 0.0, 0
    for x, y in batches:
        if stop.in_any_rank():
            model.train()
            return None
        n = int((y >= 0).sum())
        x, y = to_device(x, y)
        loss = model(x, y)
        if n:  # some ranks may have one batch fewer
            total, n_targets = total + loss.item() * n, n_targets + n
    model.train()
    total, n_targets = parallel.total(total, n_targets)
    return total / n_targets


def export_best(model, path, is_sharded):
    """Write model.bin and return whether it worked; on failure, warn and continue."""
    failed = False
    if is_sharded:
        weights = {name: parallel.full_tensor(t).cpu() for name, t in model.state_dict().items()}
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
        print(f"warning: cannot draw loss.png ({type(e).__name__}: {e})", file=sys.stderr)


# ---- starting point: nothing, a checkpoint's weights, or a run to resume

# From here on, read `settings` and not the globals above: a resumed run takes most of its settings
# from its checkpoint
this_device = parallel.start(device)
start = find_start(settings_of(globals()), given)
threads = Threads(this_device)
if dial.in_use(start.settings) and not start.is_resumed:
    start.settings, lines = dial.choose(start.settings, given, this_device, say)
    for line in lines:
        say(line)
settings = SimpleNamespace(**start.settings)
saved_settings = {name: value for name, value in vars(settings).items() if name not in SECRET}

# ---- data

paths = DataPaths(settings.data_dir, settings.vocab_source, settings.vocab_size)
model_args = args_of(vars(settings), (start.checkpoint or {}).get("model_args"))
n_accumulated = settings.gradient_accumulation_steps
step_size = settings.batch_size * n_accumulated  # sequences, over all ranks
tokens_per_step = step_size * settings.max_seq_len
if settings.estimate:
    from training.estimate import estimate_lines

    for line in estimate_lines(model_args, vars(settings), tokens_per_step):
        say(line)
    raise SystemExit
micro_size, n_micro = parallel.share_of_step(settings.batch_size, n_accumulated)
check_same_checkpoint(start, settings.out_dir)
tokenizer = None
if os.path.exists(paths.tokenizer_model):
    tokenizer = open_tokenizer(paths.tokenizer_model)
data = TokenData(paths, settings.max_seq_len, tokenizer, check=parallel.LOCAL_RANK == 0)
bos_id = tokenizer.bos_id if tokenizer else None
model_args = replace(model_args, orders=bool(data.mark))
if tokenizer:
    model_args = replace(model_args, bos_id=bos_id)
if not data.mark and (names := sorted(given.keys() & {"learn_orders", "order_weight"})):
    say(f"note: this run ignores {', '.join(names)}: the shards have no orders")
trained_with = (start.checkpoint or {}).get("tokenizer_hash", "")  # "": unknown
if tokenizer and trained_with not in ("", tokenizer.hash):
    raise UserError(
        f"{start.path} was trained with a tokenizer other than {paths.tokenizer_model}: copy the "
        f"checkpoint's own tokenizer.model to another --data_dir, and pretokenize there"
    )
batch_options = settings.max_seq_len, settings.seed, data, settings.learn_orders, bos_id
batches = TrainBatches(data.train, *batch_options)
if batches.n_windows < step_size:
    raise UserError(
        f"the training shards hold {batches.n_windows} sequences of {settings.max_seq_len} tokens, "
        f"but one step needs {step_size}: use more text or a smaller --batch_size"
    )


def to_device(x, y):
    return x.to(this_device, non_blocking=True), y.to(this_device, non_blocking=True)


valid_size = settings.max_seq_len, settings.batch_size, settings.eval_iters
validation = ValidBatches(data.valid, *valid_size, RANK, WORLD_SIZE, data.mark)


def bits_per_byte(loss):
    """Return loss / ln 2 (bits per token) * tokens per byte, or None if the bytes are unknown."""
    ratio = data.tokens_per_byte()
    return loss / math.log(2) * ratio if ratio else None


def format_loss(loss):
    bpb = bits_per_byte(loss)
    return f"validation loss {loss:.4f}" + (f", {bpb:.4f} bits per byte" if bpb else "")


# ---- model

dtype_name = settings.dtype
if settings.dtype == "auto" and start.is_resumed:  # keep the run's dtype
    dtype_name = start.checkpoint["compute_dtype"].removeprefix("torch.")
compute_dtype = parallel.from_first(
    pick_dtype(dtype_name, this_device)
)  # the first rank chooses for all
is_sharded = settings.fsdp and WORLD_SIZE > 1
if settings.fsdp and not is_sharded:
    print("warning: fsdp has no effect in a single process: start several with torchrun")
if is_sharded and settings.compile == "True":
    say("note: compile is ignored with fsdp")
if is_sharded and compute_dtype is torch.float16:
    raise UserError("dtype = float16 cannot be used with fsdp: use --dtype=bfloat16 or float32")
torch.manual_seed(settings.seed)
if this_device.type == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32 if the GPU has it
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
    fit.check_attention(settings.attention, this_device, compute_dtype)
model.dtype, model.fp8_head, model.stress = compute_dtype, settings.fp8_head, settings.order_weight
for block in model.layers:
    block.recompute = ACTIVATION_CHECKPOINTING[settings.activation_checkpointing]
is_compiled = fit.worth_compiling(settings, model, tokens_per_step, this_device, is_sharded)

# ---- optimizer, and the state of a resumed run

# not named `optimizer`, which is a setting
model_optimizer = make_optimizer(model, settings.optimizer, vars(settings))
scaler = torch.amp.GradScaler(this_device.type, enabled=compute_dtype is torch.float16)
state = RunState()
if start.is_resumed:
    state = restore_run(start, model, model_optimizer, scaler, compute_dtype, batches.n_windows)
start.checkpoint = None  # free its memory
first_step = state.iter_num

stop = parallel.StopRequest()
if settings.eval_only:
    validation = progress(validation, desc="evaluation", disable=not FIRST)
    val_loss = evaluate(model, validation, to_device, stop)
    say(f"step {state.iter_num}: {format_loss(val_loss)}")
    raise SystemExit
is_past_end = not settings.max_minutes and state.iter_num > settings.max_iters
if is_past_end or (state.is_done(settings) and state.evaluated == state.iter_num):
    if settings.resume == "auto":
        say(f"the run in {settings.out_dir} is complete ({state.iter_num} steps)")
        uploader = Uploader(settings, is_new=False)
        uploader.wrap_up(uploader.finish(), is_finished=True)
        raise SystemExit
    limit = "max_minutes" if settings.max_minutes else "max_iters"
    raise UserError(
        f"this run is complete ({state.iter_num} steps); raise --{limit} to train further"
    )

# ---- fit the step to the machine

# not under FSDP: a rank that ran out of memory would leave the others waiting
if this_device.type == "cuda" and not is_sharded:
    micro_size, n_micro = fit.fit_micro_batch(
        model, model_optimizer, micro_size, n_micro, this_device
    )
if settings.attention != "sdpa" or is_compiled:
    x, y = to_device(*batches.at(0, micro_size))
if settings.attention != "sdpa":
    fit.use_attention(model, settings.attention, x, y)
if is_compiled:
    fit.compile_model(model, x, y)
net = model if is_sharded else parallel.replicate(model, this_device)  # averages gradients
layout = batches, state.n_sequences, micro_size, n_micro, this_device
stream = prefetch(partial(parallel.micro_batch, *layout))

# ---- output folder, log and uploads

parallel.wait_for_all()  # every rank has read the checkpoints, which may now be moved
run = None  # the first rank's RunDir
if FIRST:
    run = start.run or RunDir(settings.out_dir)
    if start.is_resumed:
        set_aside(settings.out_dir, start.damaged, state.iter_num)
    else:
        run.set_aside_earlier_run()
    if tokenizer:  # ./run and sample.py need it next to the model
        run.add_tokenizer(tokenizer, paths.tokenizer_model)
    else:
        missing = "bits per byte are unknown, and ./run will need a tokenizer"
        print(f"note: {paths.tokenizer_model} does not exist: {missing}")
    run.open_log(state.iter_num, state.evaluated)
parallel.wait_for_all()
uploader = Uploader(settings, is_new=not start.is_resumed)
uploader.start_metrics(saved_settings)
is_latest = start.is_resumed and os.path.basename(start.path) == "ckpt.pt"
latest_step = state.iter_num if is_latest else None
writer = CheckpointWriter(settings.out_dir, settings.keep_last, latest_step, uploader.upload)
peak = peak_flops(this_device, compute_dtype) if FIRST else None
n_train, n_valid = (sum(map(len, shards)) for shards in (data.train, data.valid))
facts = {  # saved in every checkpoint, with `state`
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
    """Recreate out_dir if it was moved or deleted during training."""
    if parallel.any_rank(FIRST and run.is_lost()):
        writer.wait()
        writer.best_failed = False
        if FIRST:
            run.recreate()
        state.best_val_loss, writer.latest_step = math.inf, None


def log(kind, **values):
    """Write a log line and send it to Weights & Biases (first rank only)."""
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
        uploader.log(kind, values)


def save(is_best=False):
    """Start writing a checkpoint in the background; under FSDP, wait until it is written."""
    checkpoint = {**facts, **asdict(state), "scaler": scaler.state_dict()}
    if is_sharded:
        writer.save_sharded(checkpoint, model, model_optimizer, is_best)
    elif FIRST:
        checkpoint["model"] = model.state_dict()
        checkpoint["optimizer"] = optimizer_tensors(model, model_optimizer)
        writer.save(checkpoint, is_best)


say(table(model_optimizer))
if settings.on_finish:
    say(f"note: on_finish will run {settings.on_finish!r}")
reached = f"{state.iter_num} of {settings.max_iters} steps"
if settings.max_minutes:
    reached = f"{state.train_s / 60:.3g} of {settings.max_minutes:g} minutes"
say(
    f"{n_params:,} parameters, {n_train:,} training tokens ({batches.coverage:.2%} used), "
    f"{reached} done; {this_device}, {str(compute_dtype).removeprefix('torch.')}"
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

# ---- the loop: evaluate, save, take a step, log

stop.listen()
model_path = os.path.join(settings.out_dir, "model.bin")
val_loss, best_before, diverged = math.inf, state.best_val_loss, None
since, unlogged_steps = time.perf_counter(), 0  # since the last log line
stopping, done = False, state.is_done(settings)
bar = RunBar(settings, state, len(validation), disable=not FIRST)
while True:
    time_to_eval = state.iter_num % settings.eval_interval == 0 or done
    time_to_save = settings.save_interval > 0 and state.iter_num % settings.save_interval == 0
    time_to_save &= state.iter_num != first_step

    # ---- evaluate, export the best model, save
    if time_to_eval or time_to_save or stopping:
        data.check_unchanged()  # no model trained on changed shards may replace a checkpoint
    is_best, has_evaluated = False, False
    if time_to_eval and state.evaluated != state.iter_num and not stopping:
        val_loss = evaluate(model, bar.evaluating(validation), to_device, stop)
        if val_loss is None:  # interrupted: a resumed run starts with this evaluation
            break
        if not math.isfinite(val_loss):
            diverged = f"validation loss is {val_loss}"
            break
        state.evaluated, has_evaluated = state.iter_num, True
        log("eval", val_loss=val_loss, val_bpb=bits_per_byte(val_loss))
    if (time_to_eval or time_to_save or stopping) and writer.lost_best():
        state.best_val_loss = best_before  # best.pt could not be written
    if has_evaluated:
        is_best = val_loss < state.best_val_loss
        if is_best and (is_best := export_best(model, model_path, is_sharded)):
            best_before, state.best_val_loss = state.best_val_loss, val_loss
        if FIRST:
            best = ", the best so far" if is_best else ""
            print_line(f"step {state.iter_num}: {format_loss(val_loss)}{best}")
    if is_best or (has_evaluated and settings.always_save_checkpoint) or time_to_save:
        save(is_best)
    if done or stopping:
        break
    if has_evaluated or time_to_save:
        since = time.perf_counter()

    # ---- one step of the optimizer
    # dropout: reproducible after a resume, different in each rank; integers hash alike everywhere
    if settings.dropout:
        torch.manual_seed(hash((settings.seed, state.iter_num, RANK)))
    set_rates(model_optimizer, settings, state.iter_num, state.part_done(settings, since))
    loss, shares = 0.0, [1 / n_micro] * n_micro
    micro_batches = [next(stream) for _ in range(n_micro)]
    if data.mark:  # targets of different weights
        weights = [float(weights_of(y, settings.order_weight).sum()) for _, y in micro_batches]
        shares = parallel.shares(weights)
    for i, (x, y) in enumerate(micro_batches):
        x, y = to_device(x, y)
        parallel.sync_gradients(net, i == n_micro - 1)
        micro_loss = net(x, y) * shares[i]
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
        loss = parallel.total(float(loss))[0] / WORLD_SIZE  # synchronizes with the device
        grad_norm = float(parallel.full_tensor(grad_norm))
        elapsed = time.perf_counter() - since
        state.train_s += elapsed
        if not math.isfinite(loss):
            diverged = f"loss is {loss}"
        elif not math.isfinite(grad_norm) and not scaler.is_enabled():  # a scaler skips such steps
            diverged = f"gradient norm is {grad_norm}"
        if diverged:
            break
        tok_s = unlogged_steps * tokens_per_step / elapsed
        first_rate = model_optimizer.param_groups[0]["lr"]
        values = {"loss": loss, "lr": first_rate, "grad_norm": grad_norm}
        if peak:
            values["mfu"] = round(tok_s * model.flops_per_token() / (peak * WORLD_SIZE), 4)
        log("train", **values, tok_s=round(tok_s))
        bar.measured(loss, elapsed / unlogged_steps, tok_s)
        threads.watch(unlogged_steps, elapsed)
        since, unlogged_steps = time.perf_counter(), 0

# ---- the end: last checkpoint, last log line, picture, uploads

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
all_arrived = uploader.finish()
if diverged:  # the last good checkpoint is untouched
    rates = [f"{group['role']}_lr" for group in model_optimizer.param_groups]
    rates = ["base_learning_rate"] if settings.optimizer == "adamw" else rates
    raise UserError(
        f"training diverged at step {state.iter_num} ({diverged}): use smaller learning rates "
        f"(now {' '.join(f'--{name}={vars(settings)[name]:g}' for name in rates)}) or a larger "
        f"--warmup_iters"
    )
if writer.error:
    saved = writer.latest_step or first_step
    raise UserError(f"{writer.error}; {saved} of {state.iter_num} steps are saved")
if finished:
    say(f"best {format_loss(state.best_val_loss)}; wrote {model_path}")
    if val_loss > state.best_val_loss:
        say("the last step was worse: model.bin and best.pt are the best model, ckpt.pt the last")
    if tokenizer:
        say(f'next: ./run {shlex.quote(model_path)} -i "Once upon a time"')
else:
    say(f"stopped at step {state.iter_num}; saved {os.path.join(settings.out_dir, 'ckpt.pt')}")
    launch = "python"
    if WORLD_SIZE > 1:
        launch = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', WORLD_SIZE)}"
    names = [name for name in GROUPS["machine"] + GROUPS["uploads"] if name not in SECRET]
    again = [given[name] for name in names if given.get(name, "").startswith("--")]
    flags = ["--init_from=resume", f"--out_dir={settings.out_dir}", *again]
    say(f"to continue: {launch} train.py {shlex.join(flags)}")
    if state.best_val_loss == math.inf:
        say(f"note: {model_path} is the model at this step; nothing has been evaluated yet")
uploader.wrap_up(all_arrived, finished)
