"""
Train a Llama on the token shards of tinystories.py.

    python train.py --vocab_size=4096 --out_dir=out
    python train.py config/baby128.py --max_iters=500
    python train.py --init_from=resume --out_dir=out     # go on where it stopped

In out_dir appear ckpt.pt (the checkpoint), model.bin and tokenizer.bin (the best model so far, for
./run), tokenizer.model, and log.jsonl (one JSON object a line; README.md says what is in it).
Ctrl-C ends the run after the current step with a checkpoint.
"""

import json
import math
import os
import shutil
import signal
import time
from dataclasses import fields

START = time.perf_counter()  # before torch is loaded: time_s counts from here

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from checkpoint import load_checkpoint, load_model, save_checkpoint  # noqa: E402
from configurator import UserError, configure, settings_of  # noqa: E402
from dataset import DataPaths, TokenData, TrainBatches, valid_batches  # noqa: E402
from export import export_model  # noqa: E402
from files import atomic_write  # noqa: E402
from hardware import autocast, describe, git_commit, pick_device, pick_dtype  # noqa: E402
from model import ModelArgs, Transformer  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

# -----------------------------------------------------------------------------
# output
out_dir = "out"  # checkpoints, model.bin and log.jsonl go here
eval_interval = 200  # steps between evaluations
eval_iters = 100  # validation batches at most; the whole text where they hold it
log_interval = 10  # steps between lines in the log
eval_only = False  # evaluate the checkpoint of init_from=resume and stop
always_save_checkpoint = False  # save after every evaluation, not only when it is the best
init_from = "scratch"  # scratch, or resume: go on from out_dir/ckpt.pt with its settings
# data
data_dir = "data"  # as in tinystories.py
vocab_source = "custom"  # custom, or llama2
vocab_size = 4096  # must be that of the shards; 0 stands for Llama 2's own
max_seq_len = 256  # tokens a sequence: the context of the model
batch_size = 32  # sequences a micro-batch
gradient_accumulation_steps = 1  # micro-batches a step
# model
dim = 288  # width of the residual stream
n_layers = 6  # transformer blocks
n_heads = 6  # query heads
n_kv_heads = 0  # key and value heads; 0: as many as n_heads
hidden_dim = 0  # width of the feed-forward; 0: from dim and multiple_of
multiple_of = 32  # rounds hidden_dim up
tie_embeddings = True  # the output head is the embedding table
dropout = 0.0  # share of activations dropped in training
# optimizer
base_learning_rate = 2e-3  # AdamW's, after warm-up
max_iters = 2000  # steps
weight_decay = 0.1  # of matrices
beta1 = 0.9  # of AdamW: memory of the gradient
beta2 = 0.95  # of AdamW: memory of its square
grad_clip = 1.0  # largest norm of the gradient; 0: no limit
warmup_iters = 100  # steps in which the rate rises; at most half of max_iters
cooldown_frac = 1.0  # last part of the steps, in which it falls to zero as a cosine
# system
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # auto, float32, bfloat16, float16 (of the matrix products)
compile = False  # torch.compile: slow to start, then faster on a GPU
seed = 1337  # of the weights and the order of the data
given = configure(globals())
# -----------------------------------------------------------------------------

config = settings_of(globals())

FIXED_BY_CHECKPOINT = set(
    "vocab_source vocab_size max_seq_len dim n_layers n_heads n_kv_heads hidden_dim multiple_of "
    "tie_embeddings".split()
)
OF_ONE_START = set("out_dir init_from eval_only device dtype compile".split())
AT_LEAST_1 = (
    "batch_size gradient_accumulation_steps eval_interval eval_iters log_interval max_iters"
).split()


def resumed(config, old, given):
    """Settings to resume with: those of the checkpoint, `old`, but for what was given now."""
    config = dict(config)
    for name in config.keys() & old.keys() - OF_ONE_START:
        if name not in given:
            config[name] = old[name]
        elif config[name] != old[name]:
            if name in FIXED_BY_CHECKPOINT:
                raise UserError(
                    f"cannot resume with {name} = {config[name]}: "
                    f"the checkpoint's model has {old[name]}"
                )
            print(f"resuming with {name} = {config[name]} instead of {old[name]}")
    return config


def check_settings():
    for name in AT_LEAST_1:
        if config[name] < 1:
            raise UserError(f"{name} = {config[name]}: expected at least 1")
    for name, allowed, expected in (
        ("cooldown_frac", 0 <= cooldown_frac <= 1, "from 0 to 1"),
        ("base_learning_rate", 0 < base_learning_rate < math.inf, "above 0"),
        ("weight_decay", 0 <= weight_decay < math.inf, "0 or above"),
        ("grad_clip", 0 <= grad_clip < math.inf, "0 (no limit) or above"),
        ("beta1", 0 <= beta1 < 1, "from 0 to below 1"),
        ("beta2", 0 <= beta2 < 1, "from 0 to below 1"),
        ("warmup_iters", warmup_iters >= 0, "0 or above"),
        ("seed", 0 <= seed < 1 << 63, "from 0 to 2 ** 63 - 1"),
    ):
        if not allowed:
            raise UserError(f"{name} = {config[name]}: expected a number {expected}")


# ---- the checkpoint to resume, if any

checkpoint, checkpoint_path = None, os.path.join(out_dir, "ckpt.pt")
if init_from == "resume":
    checkpoint = load_checkpoint(checkpoint_path)
    if not {"iter_num", "n_sequences", "rng"} <= checkpoint.keys():
        raise UserError(f"{checkpoint_path} holds weights but no training run to go on with")
    config = resumed(config, checkpoint["config"], given)
    globals().update(config)
    checkpoint["model_args"]["dropout"] = dropout  # the one number of the model that may change
elif init_from != "scratch":
    raise UserError(f"init_from = {init_from!r}: expected scratch or resume")
elif eval_only:
    raise UserError("eval_only needs a model to evaluate: give --init_from=resume as well")
check_settings()

# ---- data and model

paths = DataPaths(data_dir, vocab_source, vocab_size)
model_settings = {f.name: config[f.name] for f in fields(ModelArgs) if f.name in config}
try:
    args = ModelArgs(**{**model_settings, "vocab_size": paths.vocab_size})
except ValueError as e:
    raise UserError(str(e)) from None
tokenizer = Tokenizer(paths.tokenizer_model) if os.path.exists(paths.tokenizer_model) else None
data = TokenData(paths, max_seq_len, tokenizer)
if checkpoint and tokenizer and checkpoint["tokenizer_hash"] not in ("", tokenizer.hash):
    raise UserError(f"{checkpoint_path} was trained with another {paths.tokenizer_model}")
batches = TrainBatches(data.train, max_seq_len, seed)
if len(batches.windows) < batch_size:
    raise UserError(
        f"the training shards hold {len(batches.windows)} sequences of {max_seq_len} tokens, less "
        f"than one batch of {batch_size}: give more text or a smaller --batch_size"
    )

device = pick_device(device)
dtype = pick_dtype(dtype, device)
torch.manual_seed(seed)
torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
model = load_model(checkpoint, checkpoint_path) if checkpoint else Transformer(args)
model.to(device)
# Only matrices decay: the gains of the norms have to stay where they are useful
matrices = [p for p in model.parameters() if p.dim() >= 2]
gains = [p for p in model.parameters() if p.dim() < 2]
optimizer = torch.optim.AdamW(
    [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}],
    lr=base_learning_rate,
    betas=(beta1, beta2),
    fused=True,
)
scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


def to_device(x, y):
    if device.type == "cuda":  # pinned memory is copied while the GPU computes
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in (x, y))
    return x.to(device), y.to(device)


def compiled(model):
    """The compiled model, made ready by one pass; the model itself where compiling fails."""
    net = torch.compile(model)
    try:
        x, y = to_device(*batches.at(0, batch_size))
        with autocast(device, dtype):
            net(x, y).backward()
        return net
    except Exception as e:
        print(f"torch.compile fails ({type(e).__name__}); going on without it")
        return model
    finally:
        model.zero_grad(set_to_none=True)


net = compiled(model) if compile else model

iter_num, n_sequences, train_s, best_val_loss = 0, 0, 0.0, math.inf
if checkpoint:
    iter_num, n_sequences = checkpoint["iter_num"], checkpoint["n_sequences"]
    train_s, best_val_loss = checkpoint["train_s"], checkpoint["best_val_loss"]
    optimizer.load_state_dict(checkpoint["optimizer"])
    for group, decay in zip(optimizer.param_groups, (weight_decay, 0.0), strict=True):
        group.update(betas=(beta1, beta2), weight_decay=decay)  # they may have been given anew
    if checkpoint["scaler"]:  # empty where the run so far was not in float16
        scaler.load_state_dict(checkpoint["scaler"])
    torch.set_rng_state(checkpoint["rng"]["cpu"])
    if device.type != "cpu" and device.type in checkpoint["rng"]:
        getattr(torch, device.type).set_rng_state(checkpoint["rng"][device.type])
    checkpoint = None  # its memory is not needed any more


# ---- the parts of a step


def learning_rate(step):
    """The rate of a step: a linear rise, a stable part, and a cosine down to zero at the end."""
    warmup = min(warmup_iters, max_iters // 2)
    if step < warmup:
        return base_learning_rate * (step + 1) / (warmup + 1)
    cooldown_iters = cooldown_frac * (max_iters - warmup)
    done = (step - (max_iters - cooldown_iters)) / cooldown_iters if cooldown_iters else 0.0
    return base_learning_rate * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))


@torch.no_grad()
def evaluate():
    """Mean loss over the fixed validation batches, nats a token."""
    model.eval()
    total, n_targets = 0.0, 0
    for x, y in valid_batches(data.valid, max_seq_len, batch_size, eval_iters):
        n = int((y >= 0).sum())
        x, y = to_device(x, y)
        with autocast(device, dtype):  # a last, smaller batch is not worth compiling for
            loss = (net if len(x) == batch_size else model)(x, y)
        total, n_targets = total + loss.item() * n, n_targets + n
    model.train()
    return total / n_targets


def bits_per_byte(loss):
    """loss / ln 2 bits a token, times tokens a byte; None where the bytes are unknown."""
    ratio = data.tokens_per_byte()
    return loss / math.log(2) * ratio if ratio else None


def training_step():
    """One step of the optimizer; returns loss and gradient norm as tensors, not waited for."""
    global iter_num, n_sequences
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(iter_num)
    total = 0.0
    for _ in range(gradient_accumulation_steps):
        x, y = to_device(*batches.at(n_sequences, batch_size))
        n_sequences += batch_size
        with autocast(device, dtype):
            loss = net(x, y) / gradient_accumulation_steps
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    iter_num += 1
    return total, grad_norm


def save():
    rng = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        rng[device.type] = getattr(torch, device.type).get_rng_state()
    save_checkpoint(
        checkpoint_path,
        {
            "model": model.state_dict(),
            "model_args": args.to_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "iter_num": iter_num,
            "n_sequences": n_sequences,
            "train_s": train_s,
            "best_val_loss": best_val_loss,
            "tokenizer_hash": tokenizer.hash if tokenizer else "",
            "config": config,
            "rng": rng,
        },
    )


def log(kind, **values):
    """Append one line to log.jsonl; floats get six digits, and null where they are no number."""
    for key, value in values.items():
        if isinstance(value, float):
            values[key] = float(f"{value:.6g}") if math.isfinite(value) else None
    print(json.dumps({"kind": kind, **values}, allow_nan=False), file=log_file, flush=True)


def now():
    """How far the run is, for every line of the log."""
    return {
        "step": iter_num,
        "tokens": n_sequences * max_seq_len,
        "time_s": round(time.perf_counter() - START, 3),
        "train_s": round(train_s, 3),
    }


def request_stop(signum, frame):
    """First Ctrl-C or SIGTERM: stop after this step. A second one ends at once."""
    global stopping
    stopping = True
    signal.signal(signum, signal.SIG_DFL)
    tqdm.write("stopping after this step; once more ends at once, without a checkpoint")


def stop_if_diverged(what, loss):
    """End the run, with the last good checkpoint untouched, where a loss is no number."""
    if not math.isfinite(loss):
        bar.close()
        log("end", reason="diverged", **now(), best_val_loss=best_val_loss)
        raise UserError(
            f"the {what} is {loss} at step {iter_num}: training has diverged; try a smaller "
            f"--base_learning_rate (now {base_learning_rate:g}) or a longer --warmup_iters"
        )


def show(loss):
    bpb = bits_per_byte(loss)
    return f"validation loss {loss:.4f}" + (f", {bpb:.4f} bits per byte" if bpb else "")


def set_aside_earlier_run():
    """Move what an earlier run left in out_dir to out_dir/previous, in place of one yet earlier."""
    names = ("ckpt.pt", "model.bin", "tokenizer.bin", "tokenizer.model", "log.jsonl")
    names = [name for name in names if os.path.exists(os.path.join(out_dir, name))]
    if names:
        previous = os.path.join(out_dir, "previous")
        shutil.rmtree(previous, ignore_errors=True)
        os.makedirs(previous)
        for name in names:
            os.replace(os.path.join(out_dir, name), os.path.join(previous, name))
        print(f"a new run begins; the earlier one in {out_dir} is moved to {previous}")


# ---- the run

if eval_only:
    print(f"step {iter_num}: {show(evaluate())}")
    raise SystemExit
if iter_num >= max_iters:
    raise UserError(f"the run has done its {iter_num} steps; raise --max_iters to go on")

try:
    os.makedirs(out_dir, exist_ok=True)
except OSError as e:
    raise UserError(f"out_dir = {out_dir} cannot be made ({e.strerror}): name a folder") from None
if iter_num == 0:
    set_aside_earlier_run()
if tokenizer:  # so that out_dir has all that ./run and sample.py need
    tokenizer.export(os.path.join(out_dir, "tokenizer.bin"))
    with (
        open(paths.tokenizer_model, "rb") as src,
        atomic_write(os.path.join(out_dir, "tokenizer.model")) as dst,
    ):
        shutil.copyfileobj(src, dst)
else:
    print(f"without {paths.tokenizer_model}, bits per byte are unknown and no text can be told")
print(
    f"{model.n_params():,} parameters, {sum(map(len, data.train)):,} training tokens, "
    f"{iter_num} of {max_iters} steps done; {device}, {str(dtype).removeprefix('torch.')}"
)
log_file = open(os.path.join(out_dir, "log.jsonl"), "a" if iter_num else "w")  # noqa: SIM115
log(
    "start",
    config=config,
    model_args=args.to_dict(),
    n_params=model.n_params(),
    train_tokens=sum(map(len, data.train)),
    valid_tokens=sum(map(len, data.valid)),
    compute_dtype=str(dtype).removeprefix("torch."),
    commit=git_commit(),
    **describe(device),
)

stopping = False
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, request_stop)
model_path = os.path.join(out_dir, "model.bin")
val_loss = math.inf
clock, unlogged_steps = time.perf_counter(), 0
bar = tqdm(total=max_iters, initial=iter_num, unit="step", dynamic_ncols=True)
while iter_num < max_iters and not stopping:
    loss, grad_norm = training_step()
    unlogged_steps += 1
    bar.update()
    time_to_eval = iter_num % eval_interval == 0 or iter_num == max_iters
    if iter_num % log_interval == 0 or iter_num == 1 or time_to_eval or stopping:
        loss, grad_norm = float(loss), float(grad_norm)  # waits for the device
        elapsed = time.perf_counter() - clock
        train_s += elapsed
        stop_if_diverged("loss", loss)
        tok_s = unlogged_steps * batch_size * gradient_accumulation_steps * max_seq_len / elapsed
        lr = learning_rate(iter_num - 1)
        log("train", **now(), loss=loss, lr=lr, grad_norm=grad_norm, tok_s=round(tok_s))
        bar.set_postfix_str(f"loss {loss:.3f}, {tok_s:,.0f} tok/s")
        clock, unlogged_steps = time.perf_counter(), 0
    if time_to_eval:
        val_loss = evaluate()
        stop_if_diverged("validation loss", val_loss)
        log("eval", **now(), val_loss=val_loss, val_bpb=bits_per_byte(val_loss))
        is_best = val_loss < best_val_loss
        tqdm.write(f"step {iter_num}: {show(val_loss)}{', the best so far' if is_best else ''}")
        if is_best:
            best_val_loss = val_loss
            export_model(model, model_path)
        if is_best or always_save_checkpoint:
            save()
        clock = time.perf_counter()
bar.close()
save()
reason = "interrupted" if iter_num < max_iters else "finished"
log("end", reason=reason, **now(), best_val_loss=best_val_loss)
if reason == "interrupted":
    print(f"stopped at step {iter_num}; {checkpoint_path} is saved")
    print(f"to go on: python train.py --init_from=resume --out_dir={out_dir}")
else:
    print(f"best {show(best_val_loss)}; wrote {model_path}")
    if val_loss > best_val_loss:
        print(
            f"the last step was worse: {model_path} is of the best, {checkpoint_path} of the last"
        )
    print(f'next: ./run {model_path} -i "Once upon a time"')
