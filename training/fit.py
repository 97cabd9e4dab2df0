"""
Fitting a run to its machine: what a device can do, how large a micro-batch fits into memory,
other attention kernels, and torch.compile. Whatever is faster has to compute the same gradients.
"""

import os
import shlex
import tempfile
from importlib.util import find_spec

import torch

from configurator import UserError
from model import Transformer
from training import parallel
from training.parallel import WORLD_SIZE, say

FP8_MULTIPLE = 16  # of every dimension of an 8-bit product


def use_private_compile_cache():
    """
    Have torch.compile keep its code in the user's own cache folder. torch runs what it finds there:
    the folder must neither be shared, as torch's own choice in /tmp is, nor passed on with a run.
    Call it before an optimizer is made, since torch chooses then.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):
        root = os.path.expanduser("~/.cache")
    folder = os.path.join(root, "modded-llama2-c", "compiled")
    try:
        os.makedirs(folder, exist_ok=True)
        os.chmod(folder, 0o700)  # fails for a folder of another user
        is_usable = shlex.quote(folder) == folder  # torch does not quote it for the compiler
    except OSError:
        is_usable = False
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder if is_usable else tempfile.mkdtemp()


def make_model(args):
    """A new Transformer; UserError where it does not fit into memory."""
    try:
        return Transformer(args)
    except (MemoryError, RuntimeError) as e:
        if "alloc" not in str(e):
            raise
        raise UserError(
            f"a model of these settings (dim {args.dim}, {args.n_layers} layers, vocabulary "
            f"{args.vocab_size}) does not fit into memory: take smaller ones"
        ) from None


def check_fp8(args, tokens, device):
    """
    Raise UserError where the head cannot compute in 8 bits, for micro-batches of this many tokens;
    warn where it gains nothing.
    """
    is_old_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
    if is_old_gpu or device.type == "mps":
        raise UserError("fp8_head: this GPU has no 8-bit products; give --fp8_head=False")
    if device.type == "cpu":
        say("warning: fp8_head is slower on a CPU, which has no 8-bit products")
    for name, number, how in (
        ("dim", args.dim, "another dim"),
        ("the vocabulary's rows", args.vocab_rows, "--vocab_multiple=16"),
        ("tokens a micro-batch", tokens, "another batch_size"),
    ):
        if number % FP8_MULTIPLE:
            raise UserError(
                f"fp8_head: {name} must be a multiple of {FP8_MULTIPLE}, not {number}; give a new "
                f"run {how}, or --fp8_head=False"
            )


def check_attention(attention, device, dtype, dropout):
    """Raise UserError where an attention kernel other than SDPA cannot be used."""
    if device.type != "cuda":
        raise UserError(f"attention = {attention}: it trains on a GPU only; give --attention=sdpa")
    if attention == "flash":
        if find_spec("flash_attn") is None:
            raise UserError("attention = flash needs the package flash-attn, which pip compiles")
        if dtype is torch.float32:
            raise UserError("attention = flash computes in bfloat16: give --dtype=bfloat16")
    if dropout:
        raise UserError(f"attention = {attention} has no dropout: give --attention=sdpa")


def worth_compiling(settings, model, tokens_a_step, device, is_sharded):
    """Whether the run is long enough for torch.compile's 10 to 30 seconds to pay off."""
    if is_sharded or settings.eval_only or settings.compile != "auto":
        return settings.compile == "True" and not is_sharded and not settings.eval_only
    on_gpu = device.type == "cuda"
    if device.type == "mps" or (settings.dropout and not on_gpu):
        return False
    flops = settings.max_iters * tokens_a_step * model.flops_per_token()
    seconds = 60 * settings.max_minutes or flops / (1e14 if on_gpu else 1e11) / WORLD_SIZE
    return seconds > 120


def fit_micro_batch(model, optimizer, micro_size, n_micro, device):
    """
    (sequences of a micro-batch, micro-batches of each rank): the given ones, or smaller and more of
    them where the GPU's memory cannot hold one. Raises UserError where it cannot hold one sequence.
    """
    seq_len = model.args.max_seq_len

    def fits(size):
        """Whether a micro-batch fits, beside the optimizer's memory."""
        missing = 0 if optimizer.state else 2 * model.n_params()
        optimizer_memory = torch.empty(missing, dtype=torch.float32, device=device)
        tokens = torch.zeros(size, seq_len, dtype=torch.int64, device=device)
        try:
            model(tokens, tokens).backward()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            del optimizer_memory, tokens
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    fitting = parallel.largest_that_fits(micro_size, n_micro, fits)
    if fitting is None:
        raise UserError(
            f"not even one sequence of {seq_len} tokens fits into the memory of {device}: try "
            f"--activation_checkpointing=block, several GPUs with --fsdp, or a smaller model"
        )
    if fitting != (micro_size, n_micro):
        say(
            f"micro-batches of {fitting[0]} sequences, {fitting[1]} a step on each GPU: as many as "
            f"fit into memory; the step stays the same"
        )
    return fitting


def gradient_norms(model, x, y):
    """The norm of each parameter's gradient for inputs and targets (B, T): (n_parameters,)."""
    model(x, y).backward()
    norms = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return norms


def same_gradients(norms, others):
    """Whether two results of gradient_norms() differ by no more than rounding does."""
    return torch.allclose(norms, others, rtol=0.1, atol=1e-3 * others.norm().item())


def use_attention(model, attention, x, y):
    """Have layers use an attention kernel; UserError where its gradients are not SDPA's."""
    norms = gradient_norms(model, x, y)
    for block in model.layers:
        block.attention.kernel = attention
    if not same_gradients(norms, gradient_norms(model, x, y)):
        raise UserError(
            f"attention = {attention} computes other gradients than sdpa here: give "
            f"--attention=sdpa"
        )


def compile_model(model, x, y, has_dropout):
    """
    Compile what every training step runs; where that does not work, say so and leave the model as
    it is. C++ compilers have been seen to make code that computes nonsense (GCC 12 for AVX-512
    FP16, tuned for no processor in particular), so on a CPU both ways are compared.
    """
    say("compiling the model")
    try:
        model.compile_layers()
        norms = gradient_norms(model, x, y)
    except Exception as e:
        why = f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"
        say(f"torch.compile fails ({why}); going on without it")
        model.fast_layers = None
        return
    finally:
        model.zero_grad(set_to_none=True)
    compiled_layers, model.fast_layers = model.fast_layers, None
    if x.device.type != "cpu" or has_dropout or same_gradients(norms, gradient_norms(model, x, y)):
        model.fast_layers = compiled_layers
    else:
        say("torch.compile makes code that computes other gradients here; going on without it")
