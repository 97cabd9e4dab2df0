"""
Fit a run to its machine: device capabilities, micro-batches that fit into memory, attention
kernels and torch.compile. Faster code must compute gradients of about the same norms.
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

FP8_MULTIPLE = 16  # divides every dimension of an FP8 product


def use_private_compile_cache():
    """
    Make torch.compile keep its code in the user's cache folder. torch runs what it finds there, so
    the folder must not be shared with other users, as torch's default in /tmp is, or be part of a
    run's folder. Call this before creating an optimizer, which is when torch reads the setting.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):
        root = os.path.expanduser("~/.cache")
    folder = os.path.join(root, "modded-llama2-c", "compiled")
    try:
        os.makedirs(folder, exist_ok=True)
        os.chmod(folder, 0o700)  # fails if another user owns it
        is_usable = shlex.quote(folder) == folder  # torch does not quote it for the compiler
    except OSError:
        is_usable = False
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder if is_usable else tempfile.mkdtemp()


def make_model(args):
    """Return a new Transformer. Raises UserError if it does not fit into memory."""
    try:
        return Transformer(args)
    except (MemoryError, RuntimeError) as e:
        if "alloc" not in str(e):
            raise
        raise UserError(
            f"not enough memory for a model of dim {args.dim}, {args.n_layers} layers and "
            f"vocabulary {args.vocab_size}: use smaller settings"
        ) from None


def check_fp8(args, tokens, device):
    """
    Raise UserError if the head cannot be computed in FP8 for micro-batches of `tokens` tokens; warn
    if that would not be faster.
    """
    is_old_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
    if is_old_gpu or device.type == "mps":
        raise UserError("fp8_head cannot be used with this GPU: use --fp8_head=False")
    if device.type == "cpu":
        say("warning: fp8_head is slower on a CPU, which cannot multiply in FP8")
    for name, value, fix in (
        ("dim", args.dim, "another dim"),
        ("vocabulary rows", args.vocab_rows, "--vocab_multiple=16"),
        ("tokens per micro-batch", tokens, "another batch_size"),
    ):
        if value % FP8_MULTIPLE:
            raise UserError(
                f"fp8_head cannot be used with {name} = {value}, not a multiple of {FP8_MULTIPLE}: "
                f"use {fix} in a new run, or --fp8_head=False"
            )


def check_attention(attention, device, dtype):
    """Raise UserError if an attention kernel other than SDPA cannot be used."""
    if device.type != "cuda":
        raise UserError(f"attention = {attention} needs a CUDA GPU: use --attention=sdpa")
    if attention == "flash":
        if find_spec("flash_attn") is None:
            raise UserError("attention = flash needs the package flash-attn: install it with pip")
        if dtype is torch.float32:
            raise UserError(
                "attention = flash cannot be used with dtype = float32: use --dtype=bfloat16"
            )


def worth_compiling(settings, model, tokens_per_step, device, is_sharded):
    """Return whether the run is long enough to make up for 10 to 30 seconds of torch.compile."""
    if is_sharded or settings.eval_only or settings.compile != "auto":
        return settings.compile == "True" and not is_sharded and not settings.eval_only
    on_gpu = device.type == "cuda"
    if device.type == "mps":
        return False
    flops = settings.max_iters * tokens_per_step * model.flops_per_token()
    seconds = 60 * settings.max_minutes or flops / (1e14 if on_gpu else 1e11) / WORLD_SIZE
    return seconds > 120


def fit_micro_batch(model, optimizer, micro_size, n_micro, device):
    """
    Return (sequences per micro-batch, micro-batches per rank): the given values, or smaller and
    more micro-batches if the GPU's memory requires it. Raises UserError if not even one sequence
    fits.
    """
    seq_len = model.args.max_seq_len

    def fits(size):
        """Return whether a micro-batch fits into memory together with the optimizer's state."""
        missing = 0 if optimizer.state else 2 * model.n_params()
        optimizer_memory = torch.empty(missing, dtype=torch.float32, device=device)
        tokens = torch.zeros(size, seq_len, dtype=torch.int64, device=device)
        try:
            for _ in range(2):  # a later micro-batch has the gradients of the first in memory
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
            f"not enough memory for one sequence of {seq_len} tokens on {device}: use "
            f"--activation_checkpointing=block, several GPUs with --fsdp, or a smaller model"
        )
    if fitting != (micro_size, n_micro):
        say(
            f"note: to fit into memory, each GPU uses {fitting[1]} micro-batches of {fitting[0]} "
            f"sequences per step; the step stays the same"
        )
    return fitting


def gradient_norms(model, x, y):
    """Return the gradient norm of each parameter, (n_parameters,), for x and y (B, T)."""
    torch.manual_seed(0)  # dropout
    model(x, y).backward()
    norms = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return norms


def same_gradients(norms, others):
    """Return whether two results of gradient_norms() are close: wrong code differs by far more."""
    return torch.allclose(norms, others, rtol=0.1, atol=1e-3 * others.norm().item())


def use_attention(model, attention, x, y):
    """Set the layers' attention kernel. Raises UserError if its gradients differ from SDPA's."""
    norms = gradient_norms(model, x, y)
    for block in model.layers:
        block.attention.kernel = attention
    if not same_gradients(norms, gradient_norms(model, x, y)):
        raise UserError(
            f"attention = {attention} computes wrong gradients here: use --attention=sdpa"
        )


def compile_model(model, x, y):
    """
    Compile the layers for training steps; if that fails, print why and leave the model unchanged.
    Some C++ compilers generate wrong code (GCC 12 for AVX-512 FP16 with generic tuning), so on a
    CPU the compiled gradients are compared with the original ones.
    """
    say("compiling the model")
    try:
        model.compile_layers()
        norms = gradient_norms(model, x, y)
    except Exception as e:
        cause = f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"
        say(f"warning: torch.compile failed ({cause}); continuing without it")
        model.fast_layers = None
        return
    finally:
        model.zero_grad(set_to_none=True)
    compiled_layers, model.fast_layers = model.fast_layers, None
    if x.device.type != "cpu" or same_gradients(norms, gradient_norms(model, x, y)):
        model.fast_layers = compiled_layers
    else:
        say("warning: torch.compile generates wrong gradients here; continuing without it")
