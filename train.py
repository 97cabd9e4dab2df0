"""
Train a Llama on the token shards of tinystories.py or webtext.py.

    python train.py --vocab_size=4096 --out_dir=out
    python train.py config/baby128.py --max_iters=500
    python train.py --init_from=resume --out_dir=out     # go on where it stopped
    torchrun --nproc_per_node=2 train.py --out_dir=out   # the same steps, shared by two processes

In out_dir appear ckpt.pt (the latest checkpoint; earlier ones, and best.pt, beside it), model.bin
and tokenizer.bin (the best model so far, for ./run), tokenizer.model, log.jsonl (one JSON object a
line; README.md says what is in it), and at the end loss.png. Ctrl-C ends the run after the current
step with a checkpoint.
"""

import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from importlib.util import find_spec

START = time.perf_counter()  # before torch is loaded: time_s counts from here
signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training begins Ctrl-C just ends this

from system.memory import tune_malloc  # noqa: E402

tune_malloc()

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from configurator import UserError, configure, settings_of  # noqa: E402
from dataset import DataPaths, TokenData, TrainBatches, ahead, valid_batches  # noqa: E402
from formats.modelbin import export_model  # noqa: E402
from model import ACTIVATION_CHECKPOINTING, ARCHS, KERNELS, ModelArgs, Transformer  # noqa: E402
from optim import (  # noqa: E402
    DECAYS,
    OPTIMIZERS,
    SHAPES,
    decay_factor,
    make_optimizer,
    momentum_at,
    rate_factor,
    table,
)
from report.curves import find_runs  # noqa: E402
from system.files import atomic_write  # noqa: E402
from system.hardware import describe, git_commit, peak_flops, pick_dtype  # noqa: E402
from system.remote import Metrics, Uploads, fetch_latest  # noqa: E402
from tokenizer import open_tokenizer  # noqa: E402
from training import parallel  # noqa: E402
from training.checkpoint import (  # noqa: E402
    FORMAT,
    CheckpointWriter,
    has_checkpoint,
    load_checkpoint,
    load_latest,
    load_model,
    numbered,
    optimizer_tensors,
    put_aside,
    restore,
    rng_states,
    seed_all,
    set_rng_states,
    versions,
)
from training.parallel import FIRST, RANK, WORLD_SIZE, say  # noqa: E402
from training.rundir import RunDir  # noqa: E402

# -----------------------------------------------------------------------------
# output
out_dir = "out"  # checkpoints, model.bin and log.jsonl go here
eval_interval = 200  # steps between evaluations
eval_iters = 100  # validation batches at most; the whole text where they hold it
log_interval = 10  # steps between lines in the log
eval_only = False  # evaluate the checkpoint of init_from and stop
always_save_checkpoint = True  # after every evaluation; False: only when it is the best so far
save_interval = 0  # steps between further checkpoints; 0: none
keep_last = 2  # checkpoints kept: ckpt.pt and those before it
picture = True  # draw loss.png at the end, where matplotlib is installed
init_from = "scratch"  # scratch; resume: go on in out_dir; or a checkpoint's path: its weights
resume = "no"  # auto: go on in out_dir if there is a checkpoint there, else as init_from says
# data
data_dir = "data"  # as in tinystories.py or webtext.py
vocab_source = "custom"  # custom, bpe or llama2
vocab_size = 4096  # must be that of the shards; 0 stands for Llama 2's own
max_seq_len = 1024  # tokens a sequence: the context of the model
batch_size = 8  # sequences a micro-batch
gradient_accumulation_steps = 1  # micro-batches a step, of all processes together
# model
dim = 256  # width of the residual stream
n_layers = 4  # transformer blocks
n_heads = 2  # query heads
n_kv_heads = 0  # key and value heads; 0: as many as n_heads
hidden_dim = 0  # width of the feed-forward; 0: from dim and multiple_of
multiple_of = 32  # rounds hidden_dim up
dropout = 0.0  # share of activations dropped in training
arch = "modded"  # llama, portable or modded: sets those of the options below that are not given
tie_embeddings = True  # the output head is the embedding table
qk_norm = False  # RMSNorm of each query and key head
norm_gains = True  # RMSNorm has learned gains
zero_init = False  # projections into the residual stream, and an untied head, begin at zero
activation = "swiglu"  # of the feed-forward: swiglu or relu2
logit_softcap = 0.0  # c: logits become c * tanh(logits / c); 0: none
sliding_window = 0  # positions that a layer with the letter S sees; 0: all
window_pattern = "SSSL"  # letters of the layers, repeated: S window, L everything
embedding_norm = False  # RMSNorm behind the embedding
residual_scalars = False  # learned weights of the residual stream and the embedding in each layer
value_embeddings = 0  # so many layers, the first, add an embedding to their values; -1: all
bigram_rows = 0  # rows of a hashed table of token pairs that is added to the embedding
smear = False  # a gate adds the embedding of the token before
embedding_std = 0.0  # of the embedding at the start, the rate of an untied one is head_lr up to 0.1
head_std = 0.0  # of a head of its own at the start; 0: 0.02
vocab_multiple = 1  # rows of embedding and head in memory are rounded up to a multiple of this
# optimizer
optimizer = "muon"  # muon: matrices by Muon, all else by AdamW, at rates of their own; or adamw
max_iters = 1000  # steps
max_minutes = 0.0  # of training, after which it ends, with the schedule fitted to them; 0: no limit
hidden_lr = 0.02  # Muon's
embedding_lr = 0.05  # beside Muon
bigram_lr = 0.005  # beside Muon
head_lr = 0.012  # beside Muon
scalar_lr = 0.01  # beside Muon
momentum = 0.95  # Muon's; it rises from 0.85
momentum_warmup = 100  # steps in which it rises
neuron_beta = 0.95  # Muon's memory of the sizes of neurons' updates, evened out; 0: as they are
muon_weight_decay = 0.0  # of matrices, by Muon
decay_shape = "constant"  # of the weight decay of both; linear: it falls to 0 over the run
muon_beta1 = 0.8  # of the AdamW beside Muon: memory of the gradient
muon_beta2 = 0.95  # of the AdamW beside Muon: memory of its square
base_learning_rate = 2e-3  # of adamw, after warm-up
weight_decay = 0.1  # of matrices, by adamw
beta1 = 0.9  # of adamw: memory of the gradient
beta2 = 0.95  # of adamw: memory of its square
grad_clip = 1.0  # largest norm of the gradient; 0: no limit
warmup_iters = 0  # steps in which the rates rise; at most half of max_iters
cooldown_frac = 0.6  # last part of the steps, in which they fall
cooldown_shape = "linear"  # linear or cosine
final_lr_frac = 0.0  # where they end, as a part of the full rates
# system
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # of the matrix products: float32, bfloat16, float16; auto: what is fast here
attention = "sdpa"  # what computes it on a GPU: sdpa, flex (FlexAttention), flash (flash-attn)
fp8_head = False  # the products of the head in 8 bits, for GPUs that have them (RTX 40, H100)
fsdp = False  # under torchrun: each process holds a part of the model (FSDP2), not all (DDP)
activation_checkpointing = "none"  # saves memory, costs time; block (most of both) or selective
compile = "auto"  # torch.compile, slow to start, then faster: True, False, auto: in longer runs
seed = 1337  # of the weights and the order of the data
# what leaves this machine; access tokens are read from the environment or .env
hub_repo = ""  # user/name on Hugging Face that gets every checkpoint; resume = auto looks there too
hub_private = True  # that repository is made private
hub_keep_local = True  # False: earlier checkpoints are deleted here once they have arrived there
wandb_project = ""  # of Weights & Biases, which gets the numbers of log.jsonl
wandb_run = ""  # a name for the run there
on_finish = ""  # a shell command to run when all steps are done and all uploads have arrived
# before anything is spent
estimate = False  # print parameters, memory, hours and cost on some GPUs, and stop
mfu = 0.4  # part of a GPU's peak that the estimate counts with
price = 2.4  # dollars of a GPU an hour, for the estimate
given = configure(globals())
# -----------------------------------------------------------------------------

torch.set_flush_denormal(True)  # a CPU takes many times as long for them; before its threads begin
parallel.errors_of_ranks()
config = settings_of(globals())
del config["on_finish"]  # which may have a secret in it, and checkpoints and logs are shown around

OPTIONS = [f.name for f in fields(ModelArgs) if f.name in config]
FIXED_BY_CHECKPOINT = {*OPTIONS, "vocab_source", "arch", "optimizer"} - {"dropout"}
OF_ONE_START = set(
    "out_dir picture init_from resume eval_only device fsdp compile attention estimate mfu price "
    "hub_repo hub_private hub_keep_local wandb_project wandb_run".split()
)
AT_LEAST_1 = (
    "batch_size gradient_accumulation_steps eval_interval eval_iters log_interval max_iters "
    "keep_last"
).split()
RATES = "base_learning_rate hidden_lr embedding_lr bigram_lr head_lr scalar_lr".split()
BETAS = "beta1 beta2 muon_beta1 muon_beta2 momentum neuron_beta".split()


def fits(name, value, model_args):
    """Whether a setting of the architecture, such as -1 for all layers, means what a model has."""
    if value == model_args[name]:
        return True
    try:
        return getattr(ModelArgs.from_dict({**model_args, name: value}), name) == model_args[name]
    except ValueError:
        return False


def resumed(config, checkpoint, given):
    """Settings to resume with: those of the checkpoint, but for what was given now."""
    config, old = dict(config), checkpoint["config"]
    changed = []
    for name in config.keys() & old.keys() - OF_ONE_START:
        if name not in given:
            config[name] = old[name]
        elif config[name] != old[name]:
            if name in OPTIONS and fits(name, config[name], checkpoint["model_args"]):
                config[name] = old[name]
            else:
                changed.append(name)
    for name in FIXED_BY_CHECKPOINT.intersection(changed):
        raise UserError(
            f"cannot resume with {name} = {config[name]}: the checkpoint's model has "
            f"{checkpoint['model_args'].get(name, old[name])}; leave it out, or begin a new run "
            f"with another --out_dir"
        )
    for name in sorted(changed):
        say(f"resuming with {name} = {config[name]} instead of {old[name]}")
    return config


def adopted(config, model_args, given):
    """Settings to train the weights of a checkpoint with: the architecture is that of the model."""
    config = dict(config)
    for name in config.keys() & model_args.keys() - {"dropout"}:
        if model_args[name] is None:  # llama2.c's way to leave it to the default
            continue
        if name == "max_seq_len" and name in given:  # no weight depends on it
            continue
        if name == "vocab_size" and DataPaths("", vocab_source, config[name]).is_llama2:
            continue
        is_derived = config[name] == 0 and name in ("n_kv_heads", "hidden_dim", "vocab_size")
        if name in given and not is_derived and not fits(name, config[name], model_args):
            raise UserError(
                f"cannot start from {init_from} with {name} = {config[name]}: "
                f"its model has {model_args[name]}"
            )
        config[name] = model_args[name]
    return config


def check_settings():
    for name, known in (
        ("arch", ARCHS),
        ("optimizer", OPTIMIZERS),
        ("cooldown_shape", SHAPES),
        ("decay_shape", DECAYS),
        ("activation_checkpointing", ACTIVATION_CHECKPOINTING),
        ("attention", KERNELS),
        ("compile", ("auto", "True", "False")),
        ("resume", ("auto", "no")),
    ):
        if config[name] not in known:
            raise UserError(f"{name} = {config[name]!r}: expected one of {', '.join(known)}")
    for name in AT_LEAST_1:
        if config[name] < 1:
            raise UserError(f"{name} = {config[name]}: expected at least 1")
    for name, allowed, expected in (
        ("cooldown_frac", 0 <= cooldown_frac <= 1, "from 0 to 1"),
        ("final_lr_frac", 0 <= final_lr_frac <= 1, "from 0 to 1"),
        *((name, 0 < config[name] <= 1e30, "above 0, at most 1e30") for name in RATES),
        *((name, 0 <= config[name] < 1, "from 0 to below 1") for name in BETAS),
        ("weight_decay", 0 <= weight_decay < math.inf, "0 or above"),
        ("muon_weight_decay", 0 <= muon_weight_decay < math.inf, "0 or above"),
        ("grad_clip", 0 <= grad_clip < math.inf, "0 (no limit) or above"),
        ("warmup_iters", warmup_iters >= 0, "0 or above"),
        ("momentum_warmup", momentum_warmup >= 0, "0 or above"),
        ("max_iters", max_iters <= 10**12, "of at most 10 ** 12"),
        ("max_minutes", 0 <= max_minutes <= 1e7, "from 0 (no limit) to 1e7"),
        ("save_interval", save_interval >= 0, "0 (none) or above"),
        ("mfu", 0 < mfu <= 1, "above 0, at most 1"),
        ("price", 0 <= price < math.inf, "0 or above"),
        ("seed", 0 <= seed < 1 << 63, "from 0 to 2 ** 63 - 1"),
    ):
        if not allowed:
            raise UserError(f"{name} = {config[name]}: expected a number {expected}")


# ---- the checkpoint to begin from, if any

device_here = parallel.start(device)
checkpoint, checkpoint_path, damaged = None, None, []
run = None  # the RunDir, of the first rank
if init_from == "resume" or resume == "auto":
    will_train = not eval_only and not estimate
    from_hub = hub_repo and will_train
    if FIRST and will_train and (from_hub or os.path.isdir(out_dir)):
        run = RunDir(out_dir)  # before anything is read: another run may still be writing here
    if FIRST and from_hub and not has_checkpoint(out_dir):
        fetch_latest(hub_repo, out_dir)
    parallel.wait_for_all()
    checkpoint, checkpoint_path, damaged = load_latest(out_dir)
is_resumed = checkpoint is not None
if is_resumed:
    config = resumed(config, checkpoint, given)
    if init_from not in ("scratch", "resume"):
        say(f"going on with the run in {out_dir}; init_from = {init_from} was for its start")
    for name, version in versions().items():
        if (old := checkpoint["versions"][name]) != version:
            say(f"the checkpoint is of {name} {old}, this is {version}: last digits may differ")
elif init_from == "resume":
    raise UserError(
        f"{os.path.join(out_dir, 'ckpt.pt')} does not exist: name the --out_dir of an earlier run, "
        f"or start one without --init_from=resume"
    )
elif init_from != "scratch":
    if not os.path.exists(init_from):
        raise UserError(
            f"init_from = {init_from!r}: expected scratch, resume, or the path of a checkpoint"
        )
    checkpoint, checkpoint_path = load_checkpoint(init_from), init_from
    config = adopted(config, checkpoint["model_args"], given)
elif eval_only:
    raise UserError("eval_only needs a model to evaluate: give --init_from=resume or a checkpoint")
if not checkpoint:
    config |= {k: v for k, v in ARCHS.get(arch, {}).items() if k not in given}
globals().update(config)
check_settings()
plain = {name: f.default for f in fields(ModelArgs) if (name := f.name) in ARCHS["modded"]}
plain |= ARCHS[arch]
if arch != "modded" and (more := [name for name in plain if config[name] != plain[name]]):
    say(f"note: {', '.join(f'{n} = {config[n]}' for n in more)}, beyond --arch={arch}")

# ---- data and model

paths = DataPaths(data_dir, vocab_source, vocab_size)
model_settings = {name: config[name] for name in OPTIONS}
if checkpoint:  # with what is no setting, such as norm_eps
    model_settings = checkpoint["model_args"] | model_settings
try:
    args = ModelArgs.from_dict({**model_settings, "vocab_size": paths.vocab_size})
except ValueError as e:
    raise UserError(str(e)) from None
step_size = batch_size * gradient_accumulation_steps  # sequences, of all ranks together
if estimate:
    from training.estimate import report

    for line in report(args, config, step_size * max_seq_len):
        say(line)
    raise SystemExit
device = device_here
if dtype == "auto" and is_resumed:  # as it began
    dtype = checkpoint["compute_dtype"].removeprefix("torch.")
dtype = parallel.from_first(pick_dtype(dtype, device))  # a measurement, if it is "auto"
first_step = checkpoint["iter_num"] if is_resumed else 0
if parallel.total(first_step) != [first_step * WORLD_SIZE]:
    raise UserError(
        f"the machines find different checkpoints in {out_dir}: "
        f"put --out_dir on a disk that all of them share"
    )
if fsdp and WORLD_SIZE == 1:
    print("warning: fsdp has nothing to share in one process; start several with torchrun")
    fsdp = False
if fsdp and compile == "True":
    say("compile is left out under fsdp")
if fsdp and dtype is torch.float16:
    raise UserError("float16 cannot be used with fsdp: take --dtype=bfloat16 or float32")
micro_batch_size, n_micro_batches = parallel.share_of_step(batch_size, gradient_accumulation_steps)
tokenizer = None
if os.path.exists(paths.tokenizer_model):
    tokenizer = open_tokenizer(paths.tokenizer_model)
data = TokenData(paths, max_seq_len, tokenizer, check=parallel.LOCAL_RANK == 0)
if checkpoint and tokenizer and checkpoint.get("tokenizer_hash", "") not in ("", tokenizer.hash):
    raise UserError(f"{checkpoint_path} was trained with another {paths.tokenizer_model}")
batches = TrainBatches(data.train, max_seq_len, seed)
if batches.n_windows < step_size:
    raise UserError(
        f"the training shards hold {batches.n_windows} sequences of {max_seq_len} tokens, less "
        f"than the {step_size} of one step: give more text or a smaller --batch_size"
    )

seed_all(seed)
if device.type == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
if checkpoint and not is_resumed:
    checkpoint["model_args"] = args.to_dict()
    model = load_model(checkpoint, checkpoint_path)
else:
    try:
        model = Transformer(args)
    except (MemoryError, RuntimeError) as e:
        if "alloc" not in str(e):
            raise
        raise UserError(
            f"a model of these settings (dim {args.dim}, {args.n_layers} layers, vocabulary "
            f"{args.vocab_size}) does not fit into memory: take smaller ones"
        ) from None
n_params = model.n_params()
model.to(device)
if fsdp:
    parallel.shard(model, device)


def worth_compiling():
    """Whether the run is so long that torch.compile's 10 to 30 seconds come back."""
    if fsdp or eval_only or compile != "auto":
        return compile == "True" and not fsdp and not eval_only
    on_gpu = device.type == "cuda"
    if device.type == "mps" or (dropout and not on_gpu):
        return False
    estimate = max_iters * step_size * max_seq_len * model.flops_per_token()
    seconds = 60 * max_minutes or estimate / (1e14 if on_gpu else 1e11) / WORLD_SIZE
    return seconds > 120


def check_fp8():
    """Raise UserError where the head's products cannot have 8 bits; warn where they gain nothing"""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError("fp8_head: this GPU has no 8-bit products; give --fp8_head=False")
    if device.type == "mps":
        raise UserError("fp8_head: mps has no 8-bit products; give --fp8_head=False")
    if device.type == "cpu":
        say("warning: fp8_head is slower on a CPU, which has no 8-bit products")
    for name, number, how in (
        ("dim", args.dim, "another dim"),
        ("the vocabulary's rows", args.vocab_rows, "--vocab_multiple=16"),
        ("tokens a micro-batch", micro_batch_size * max_seq_len, "another batch_size"),
    ):
        if number % 16:
            raise UserError(
                f"fp8_head: {name} must be a multiple of 16, not {number}; give a new run {how}, "
                f"or --fp8_head=False"
            )


def check_attention():
    """Raise UserError where another kernel of attention than SDPA cannot be used."""
    if device.type != "cuda":
        raise UserError(f"attention = {attention}: it trains on a GPU only; give --attention=sdpa")
    if attention == "flash":
        if find_spec("flash_attn") is None:
            raise UserError("attention = flash needs the package flash-attn, which pip compiles")
        if dtype is torch.float32:
            raise UserError("attention = flash computes in bfloat16: give --dtype=bfloat16")
    if dropout:
        raise UserError(f"attention = {attention} has no dropout: give --attention=sdpa")


if fp8_head and not eval_only:
    check_fp8()
if attention != "sdpa" and not eval_only:
    check_attention()
model.dtype, model.fp8_head = dtype, fp8_head
for block in model.layers:
    block.recompute = ACTIVATION_CHECKPOINTING[activation_checkpointing]
is_compiled = worth_compiling()
if is_compiled:  # kept with the run; before torch.optim, which chooses a place of its own
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(out_dir, "compiled"))
optimizer = make_optimizer(model, config["optimizer"], config)
scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

iter_num, n_sequences, evaluated, train_s, best_val_loss = 0, 0, 0, 0.0, math.inf
if is_resumed:
    restore(model, optimizer, checkpoint, checkpoint_path)
    iter_num, n_sequences = checkpoint["iter_num"], checkpoint["n_sequences"]
    evaluated, train_s = checkpoint["evaluated"], checkpoint["train_s"]
    best_val_loss = checkpoint["best_val_loss"]
    if not os.path.exists(os.path.join(out_dir, "model.bin")):  # it came from the hub, say
        best_val_loss = math.inf
    if checkpoint["compute_dtype"] != str(dtype):
        say(f"computing in {dtype} from now on, so far in {checkpoint['compute_dtype']}")
    if checkpoint["n_windows"] != batches.n_windows:
        say(
            f"the shards are not those of the run so far: {batches.n_windows:,} sequences instead "
            f"of {checkpoint['n_windows']:,}; going on at the same place of another order"
        )
    if checkpoint["scaler"]:  # empty where the run so far was not in float16
        scaler.load_state_dict(checkpoint["scaler"])
    set_rng_states(checkpoint["rng"])
checkpoint = None  # its memory is not needed any more


def micro_batch(k):
    """Inputs and targets of this rank's k-th micro-batch from where the run begins."""
    step, i = divmod(k, n_micro_batches)
    position = first_sequence + step * step_size + i * micro_batch_size * WORLD_SIZE + RANK
    x, y = batches.at(position, micro_batch_size, stride=WORLD_SIZE)
    if device.type == "cuda":  # pinned memory is copied while the GPU computes
        torch.cuda.set_device(device)  # of this thread, which would pin for the first GPU
        x, y = x.pin_memory(), y.pin_memory()
    return x, y


def to_device(x, y):
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def gradient_norms():
    """The norm of each parameter's gradient for the first micro-batch, (n_parameters,)."""
    model(*to_device(*batches.at(0, micro_batch_size))).backward()
    norms = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return norms


def fits_memory(size):
    """Whether a micro-batch of `size` sequences fits into the GPU's memory, beside the optimizer"""
    missing = 0 if optimizer.state else 2 * n_params
    optimizer_memory = torch.empty(missing, dtype=torch.float32, device=device)
    tokens = torch.zeros(size, max_seq_len, dtype=torch.int64, device=device)
    try:
        model(tokens, tokens).backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        del optimizer_memory, tokens
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def fit_micro_batch():
    """Take smaller micro-batches, and more of them, where the GPU's memory cannot hold one."""
    global micro_batch_size, n_micro_batches
    found = parallel.largest_that_fits(micro_batch_size, n_micro_batches, fits_memory)
    if found is None:
        raise UserError(
            f"not even one sequence of {max_seq_len} tokens fits into the memory of {device}: try "
            f"--activation_checkpointing=block, several GPUs with --fsdp, or a smaller model"
        )
    if found != (micro_batch_size, n_micro_batches):
        micro_batch_size, n_micro_batches = found
        say(
            f"micro-batches of {micro_batch_size} sequences, {n_micro_batches} a step on each GPU: "
            f"so many fit into memory; the step stays the same"
        )


def compare_attention():
    """Have layers use the kernel that was asked for, if it computes the same as SDPA."""
    norms = gradient_norms()
    for block in model.layers:
        block.attention.kernel = attention
    if not same_gradients(norms, gradient_norms()):
        raise UserError(
            f"attention = {attention} computes other gradients than sdpa here: give "
            f"--attention=sdpa"
        )


def compile_model():
    """
    Compile what a training step runs again and again; where that does not work, say so and go on
    without. C++ compilers have been seen to make code that computes nonsense (GCC 12 for AVX-512
    FP16, tuned for no processor in particular), so on a CPU both ways are compared.
    """
    say("compiling the model")
    try:
        model.compile_layers()
        norms = gradient_norms()
    except Exception as e:
        say(f"torch.compile fails ({type(e).__name__}); going on without it")
        model.fast_layers = None
        return
    finally:
        model.zero_grad(set_to_none=True)
    compiled_layers, model.fast_layers = model.fast_layers, None
    if device.type != "cpu" or dropout or same_gradients(norms, gradient_norms()):
        model.fast_layers = compiled_layers
    else:
        say("torch.compile makes code that computes other gradients here; going on without it")


def same_gradients(norms, others):
    """Whether two results of gradient_norms() differ by no more than rounding does."""
    return torch.allclose(norms, others, rtol=0.1, atol=1e-3 * others.norm().item())


# ---- the parts of a step


def progress():
    """The part that is done, 0 to 1, of the minutes, or of the steps behind the warm-up."""
    if max_minutes:
        return seconds_trained() / (60 * max_minutes)
    warmup = min(warmup_iters, max_iters // 2)
    return (iter_num - warmup) / (max_iters - warmup)


def seconds_trained():
    """Seconds of training so far, as the first rank sees them."""
    now = train_s + (time.perf_counter() - clock if clock else 0.0)
    return parallel.total(now if FIRST else 0.0)[0]


def is_done():
    """Whether the last step is done."""
    return seconds_trained() >= 60 * max_minutes if max_minutes else iter_num >= max_iters


@torch.no_grad()
def evaluate():
    """Mean loss over the fixed validation batches, nats a token; None where a stop came between."""
    model.eval()
    total, n_targets = 0.0, 0
    for x, y in valid_batches(data.valid, max_seq_len, batch_size, eval_iters, RANK, WORLD_SIZE):
        if parallel.any_rank(stopping):
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


def bits_per_byte(loss):
    """loss / ln 2 bits a token, times tokens a byte; None where the bytes are unknown."""
    ratio = data.tokens_per_byte()
    return loss / math.log(2) * ratio if ratio else None


def set_rates():
    """Rates, decay and momentum of this step."""
    warmup = min(warmup_iters, max_iters // 2)
    done = progress()
    factor = rate_factor(done, iter_num, warmup, cooldown_frac, cooldown_shape, final_lr_frac)
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]
        group["weight_decay"] = group["initial_weight_decay"] * decay_factor(done, decay_shape)
        if "momentum" in group:
            group["momentum"] = momentum_at(iter_num, momentum, momentum_warmup)


def training_step():
    """One step of the optimizer; returns loss and gradient norm as tensors, not waited for."""
    global iter_num, n_sequences
    if dropout:  # the same in a resumed run, and another in each rank
        torch.manual_seed(hash((seed, iter_num, RANK)))
    set_rates()
    total = 0.0
    for i in range(n_micro_batches):
        x, y = to_device(*next(stream))
        parallel.sync_gradients(net, i == n_micro_batches - 1)
        loss = net(x, y) / n_micro_batches
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    iter_num += 1
    n_sequences += step_size
    return total, parallel.whole(grad_norm)


def save(is_best=False):
    """Begin to write a checkpoint; training goes on meanwhile (but for FSDP)."""
    if not is_best:
        forget_unwritten_best()
    checkpoint = {
        "format": FORMAT,
        "model_args": args.to_dict(),
        "scaler": scaler.state_dict(),
        "iter_num": iter_num,
        "n_sequences": n_sequences,
        "n_windows": batches.n_windows,
        "evaluated": evaluated,
        "train_s": train_s,
        "best_val_loss": best_val_loss,
        "tokenizer_hash": tokenizer.hash if tokenizer else "",
        "config": config,
        "rng": rng_states(),
        "compute_dtype": str(dtype),
        "versions": versions(),
    }
    if fsdp:
        writer.save_sharded(checkpoint, model, optimizer, is_best)
    elif FIRST:
        tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}
        writer.save({**checkpoint, **tensors}, is_best)


def export_best():
    """Write model.bin; a failure is said and costs nothing else. Returns whether it is written."""
    plain, failed = model, False
    if fsdp:
        state = {name: parallel.whole(t).cpu() for name, t in model.state_dict().items()}
        if FIRST:
            plain = Transformer(args)
            plain.load_state_dict(state)
    if FIRST:
        try:
            export_model(plain, model_path)
        except UserError as e:
            failed = True
            tqdm.write(f"warning: {e}; training goes on", file=sys.stderr)
    return not parallel.any_rank(failed)


def log(kind, **values):
    if FIRST:
        run.log(kind, **values)
        if metrics:
            metrics.log(kind, values)


def now():
    """How far the run is, for every line of the log."""
    return {
        "step": iter_num,
        "tokens": n_sequences * max_seq_len,
        "time_s": round(time.perf_counter() - START, 3),
        "train_s": round(train_s, 3),
    }


def request_stop(signum, frame):
    """
    First Ctrl-C or SIGTERM: stop after this step. A second one ends at once, but not under
    torchrun, which sends each process what the system may have sent it already.
    """
    global stopping
    is_first, stopping = not stopping, True
    if is_first and FIRST:
        more = "; once more ends at once, without a checkpoint" if WORLD_SIZE == 1 else ""
        with contextlib.suppress(RuntimeError):  # it came in the middle of another line
            tqdm.write(f"stopping after this step{more}")
    elif not is_first and WORLD_SIZE == 1:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


def stop_if_diverged(what, loss):
    """End the run, with the last good checkpoint untouched, where a loss is no number."""
    if not math.isfinite(loss):
        bar.close()
        writer.wait()
        log("end", reason="diverged", **now(), best_val_loss=best_val_loss)
        draw()
        leave_machine()
        rates = " ".join(f"--{name}={config[name]:g}" for name in rate_settings())
        raise UserError(
            f"the {what} is {loss} at step {iter_num}: training has diverged; try smaller rates "
            f"(now {rates}) or a longer --warmup_iters"
        )


def rate_settings():
    """Names of the settings that are rates of this optimizer."""
    if config["optimizer"] == "adamw":
        return ["base_learning_rate"]
    return [f"{group['role']}_lr" for group in optimizer.param_groups]


def forget_unwritten_best():
    """Where the best model could not be written, go back to the loss of the one before it."""
    global best_val_loss
    if parallel.any_rank(writer.best_failed):
        best_val_loss, writer.best_failed = best_before, False


def evaluate_and_keep():
    """
    Evaluate; export the best model so far, and save where always_save_checkpoint says so. Returns
    False where a stop came between: then a resumed run begins with this evaluation.
    """
    global evaluated, val_loss, best_val_loss, best_before
    val_loss = evaluate()
    if val_loss is None:
        return False
    stop_if_diverged("validation loss", val_loss)
    evaluated = iter_num
    log("eval", **now(), val_loss=val_loss, val_bpb=bits_per_byte(val_loss))
    forget_unwritten_best()
    is_best = val_loss < best_val_loss
    if FIRST:
        tqdm.write(f"step {iter_num}: {show(val_loss)}{', the best so far' if is_best else ''}")
    if is_best:
        is_best = export_best()
    if is_best:  # and written: else a later one has to beat what is there
        best_before, best_val_loss = best_val_loss, val_loss
    if is_best or always_save_checkpoint or time_to_save():
        save(is_best)
    return True


def draw():
    """loss.png of the run, where matplotlib is installed; a failure is said and costs no more."""
    if not FIRST or not picture or find_spec("matplotlib") is None:
        return
    from report.pictures import draw_runs

    try:
        draw_runs(find_runs([out_dir]), os.path.join(out_dir, "loss.png"))
    except Exception as e:
        print(f"warning: no loss.png ({type(e).__name__}: {e})", file=sys.stderr)


def begin_uploads():
    """Uploads of the first rank, if they are asked for."""
    if FIRST and hub_repo:
        return Uploads(hub_repo, out_dir, hub_private, hub_keep_local, not is_resumed)
    return None


def wrap_up(has_left, finished):
    """End a run: UserError if not all of it has left the machine, else on_finish if it finished."""
    if not has_left:
        raise UserError(
            f"{', '.join(uploads.failed)} did not reach {hub_repo} and lie in {out_dir}/uploads: "
            f"the same command with --resume=auto tries again"
        )
    if FIRST and on_finish and finished:
        print("running the command of on_finish", flush=True)
        if status := subprocess.run(on_finish, shell=True).returncode:
            raise UserError(f"the command of on_finish ended with status {status}")


def leave_machine():
    """Wait until everything that leaves this machine has; returns whether it all arrived."""
    if metrics:
        metrics.finish()
    return uploads is None or uploads.finish()


def time_to_save():
    return save_interval > 0 and iter_num % save_interval == 0


def show(loss):
    bpb = bits_per_byte(loss)
    return f"validation loss {loss:.4f}" + (f", {bpb:.4f} bits per byte" if bpb else "")


# ---- the run

stopping = False  # whether this rank was told to stop
clock = None  # when the steps began that are not in train_s yet
if eval_only:
    say(f"step {iter_num}: {show(evaluate())}")
    raise SystemExit
if is_done() and evaluated == iter_num:
    if resume == "auto":
        say(f"the run in {out_dir} has done its {iter_num} steps")
        uploads, metrics = begin_uploads(), None
        wrap_up(leave_machine(), finished=True)
        raise SystemExit
    limit = "max_minutes" if max_minutes else "max_iters"
    raise UserError(f"the run has done its {iter_num} steps; raise --{limit} to go on")

if device.type == "cuda" and not fsdp:  # whose ranks would wait for the one that has no room
    fit_micro_batch()
if attention != "sdpa":
    compare_attention()
if is_compiled:
    compile_model()
net = model if fsdp else parallel.replicate(model, device)  # what a training step calls
first_sequence = n_sequences
stream = ahead(micro_batch)
parallel.wait_for_all()  # all have read the checkpoints, which may now be moved
if FIRST:
    run = run or RunDir(out_dir)
    if is_resumed:
        put_aside(out_dir, damaged, iter_num)
    else:
        run.set_aside_earlier_run()
    if tokenizer:  # so that out_dir has all that ./run and sample.py need
        tokenizer.export(run.file("tokenizer.bin"))
        with (
            open(paths.tokenizer_model, "rb") as src,
            atomic_write(run.file("tokenizer.model")) as dst,
        ):
            shutil.copyfileobj(src, dst)
    else:
        print(f"without {paths.tokenizer_model}, bits per byte are unknown and no text can be told")
    run.open_log(iter_num, evaluated)
parallel.wait_for_all()
is_latest = is_resumed and os.path.basename(checkpoint_path) == "ckpt.pt"
writer = CheckpointWriter(out_dir, keep_last, iter_num if is_latest else None)
uploads, metrics = begin_uploads(), None  # of the first rank
if uploads:
    writer.installed = lambda path, step: uploads.submit(path, numbered(step))
if FIRST and wandb_project:
    metrics = Metrics(wandb_project, wandb_run, out_dir, config)
model_path = os.path.join(out_dir, "model.bin")
n_train, n_valid = (sum(map(len, shards)) for shards in (data.train, data.valid))
peak = peak_flops(device, dtype) if FIRST else None
say(table(optimizer))
say(
    f"{n_params:,} parameters, {n_train:,} training tokens ({batches.coverage:.2%} in windows), "
    f"{iter_num} of {f'{max_minutes:g} minutes of' if max_minutes else max_iters} steps done; "
    f"{device}, {str(dtype).removeprefix('torch.')}"
    + (f", {WORLD_SIZE} processes ({'FSDP' if fsdp else 'DDP'})" if WORLD_SIZE > 1 else "")
)
log(
    "start",
    config=config,
    model_args=args.to_dict(),
    n_params=n_params,
    train_tokens=n_train,
    valid_tokens=n_valid,
    coverage=batches.coverage,
    processes=WORLD_SIZE,
    compute_dtype=str(dtype).removeprefix("torch."),
    flops_per_token=model.flops_per_token(),
    peak_flops=peak,
    rates={group["role"]: group["initial_lr"] for group in optimizer.param_groups},
    commit=git_commit(),
    **describe(device),
)

for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, request_stop)
val_loss, best_before = math.inf, best_val_loss
bar = tqdm(
    total=None if max_minutes else max_iters,
    initial=iter_num,
    unit="step",
    dynamic_ncols=True,
    disable=not FIRST,
)
stop = False
if iter_num != evaluated and (iter_num % eval_interval == 0 or is_done()):
    stop = not evaluate_and_keep()  # the run was stopped before this evaluation was done
clock, unlogged_steps = time.perf_counter(), 0
done = is_done()
while not done and not stop:
    loss, grad_norm = training_step()
    stop = parallel.any_rank(stopping)
    unlogged_steps += 1
    bar.update()
    done = is_done()
    time_to_eval = iter_num % eval_interval == 0 or done
    if iter_num % log_interval == 0 or iter_num == 1 or time_to_eval or time_to_save() or stop:
        loss, grad_norm = parallel.total(float(loss))[0] / WORLD_SIZE, float(grad_norm)
        elapsed = time.perf_counter() - clock  # with the device waited for
        train_s += elapsed
        stop_if_diverged("loss", loss)
        if not scaler.is_enabled():  # which passes over steps with an infinite gradient
            stop_if_diverged("gradient norm", grad_norm)
        tok_s = unlogged_steps * step_size * max_seq_len / elapsed
        values = {"loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm}
        if peak:
            values["mfu"] = round(tok_s * model.flops_per_token() / (peak * WORLD_SIZE), 4)
        log("train", **now(), **values, tok_s=round(tok_s))
        left = f", {max(0, 60 * max_minutes - train_s):.0f} s left" if max_minutes else ""
        bar.set_postfix_str(f"loss {loss:.3f}, {tok_s:,.0f} tok/s{left}")
        clock, unlogged_steps = time.perf_counter(), 0
    if time_to_eval and not stop:
        stop = not evaluate_and_keep()
    elif time_to_save():
        save()
    if time_to_eval or time_to_save():
        clock = time.perf_counter()
clock = None
bar.close()
writer.wait()
if parallel.any_rank(FIRST and writer.latest_step != iter_num):
    save()
    writer.wait()
finished = is_done() and evaluated == iter_num
log(
    "end",
    reason="finished" if finished else "interrupted",
    **now(),
    best_val_loss=best_val_loss,
)
draw()
has_left = leave_machine()
if writer.error:
    saved = writer.latest_step or first_step
    raise UserError(f"{writer.error}; of the {iter_num} steps, {saved or 'none'} are saved")
if finished:
    say(f"best {show(best_val_loss)}; wrote {model_path}")
    if val_loss > best_val_loss:
        say("the last step was worse: model.bin and best.pt are of the best, ckpt.pt of the last")
    if tokenizer:
        say(f'next: ./run {shlex.quote(model_path)} -i "Once upon a time"')
else:
    say(f"stopped at step {iter_num}; {os.path.join(out_dir, 'ckpt.pt')} is saved")
    launch = "python"
    if WORLD_SIZE > 1:
        launch = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', WORLD_SIZE)}"
    words = f"--init_from=resume --out_dir={shlex.quote(out_dir)}{' --fsdp' if fsdp else ''}"
    say(f"to go on: {launch} train.py {words}")
wrap_up(has_left, finished)
