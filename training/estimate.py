"""
Estimate the memory, time and cost of a run: `python train.py ... --estimate`.

The model is built on PyTorch's meta device, without memory, and one forward pass is traced to see
which tensors autograd keeps for the backward pass. This covers every option of the architecture,
but not memory lost to fragmentation or saved by torch.compile.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import ACTIVATION_CHECKPOINTING, PRODUCTS, Transformer
from optim import by_role
from system.hardware import GPUS

SHOWN = ("4090", "A100", "H100 PCIe", "H100", "H200", "B200")
USABLE = 0.9  # share of a GPU's memory; CUDA and fragmentation take the rest
GB = 1e9


class Flash(torch.autograd.Function):
    """Keeps what fused attention keeps: q, k, v, the result, and one float32 per query."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out


class Products(TorchDispatchMode):
    """Counts the bytes of the results of products, which selective checkpointing keeps."""

    def __init__(self):
        super().__init__()
        self.n_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in PRODUCTS:
            self.n_bytes += out.nbytes
        return out


def kept_bytes(model, batch_size, recompute):
    """
    Return the bytes that a forward pass keeps for the backward pass. model: on the meta device;
    batch_size: in sequences; recompute: a key of ACTIVATION_CHECKPOINTING.
    """
    for block in model.layers:
        block.recompute = ACTIVATION_CHECKPOINTING[recompute]
        block.attention.attend = lambda q, k, v, *_: Flash.apply(q, k, v)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage  # keep it alive, so its address is not reused
        return tensor

    products = Products()
    tokens = torch.zeros(batch_size, model.args.max_seq_len, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), products:
        model(tokens, tokens)
    n_bytes = sum(storage.nbytes() for storage in kept.values())
    return n_bytes + products.n_bytes * (recompute == "selective")


def memory_of(model, optimizer, recompute, n_gpus, is_sharded):
    """
    Return (bytes per GPU without a micro-batch, bytes per sequence of one). Weights, gradients and
    optimizer state are float32; FSDP (is_sharded) divides them among n_gpus.
    """
    roles = by_role(model)
    n_params = model.n_params()
    n_hidden = sum(p.numel() for p in roles.get("hidden", ()))
    state = 8 * n_params if optimizer == "adamw" else 8 * (n_params - n_hidden) + 4 * n_hidden
    state = (state + 8 * n_params) / (n_gpus if is_sharded else 1)
    one, two = (kept_bytes(model, n, recompute) for n in (1, 2))
    if recompute != "none":  # a layer is entirely in memory while it is recomputed
        whole = [kept_bytes(model, n, "none") / model.args.n_layers for n in (1, 2)]
        one, two = one + whole[0], two + whole[1]
    # one chunk of cross_entropy(): bfloat16, float32
    logits = min(1 << 27, model.args.max_seq_len * model.args.vocab_rows) * 6
    return state + logits + 2 * one - two, two - one


def estimate_lines(model_args, settings, tokens_per_step):
    """Yield the lines that --estimate prints. tokens_per_step: over all GPUs."""
    with torch.device("meta"):
        model = Transformer(model_args)
    model.dtype = torch.bfloat16
    n_steps, mfu, price = settings["max_iters"], settings["mfu"], settings["price"]
    recompute, optimizer = settings["activation_checkpointing"], settings["optimizer"]
    flops = model.flops_per_token()
    if settings["max_minutes"]:
        yield f"note: this is the estimate of {n_steps:,} steps (max_iters), not of max_minutes"
    tokens, n_sequences = n_steps * tokens_per_step, tokens_per_step // model_args.max_seq_len
    total = flops * tokens
    tables = sum(p.numel() for name, p in model.named_parameters() if "embeddings" in name)
    yield f"{model.n_params():,} parameters, {tables:,} of them in tables"
    yield (
        f"{tokens:,} tokens: {n_steps:,} steps of {tokens_per_step:,}; "
        f"{tokens / model.n_params():.1f} tokens per parameter"
    )
    yield f"{flops / 1e9:.3f} GFLOP per token, {total:.3g} FLOP in total"
    yield ""
    yield (
        f"at {mfu:.0%} of peak bfloat16 FLOP/s (--mfu), ${price:g} per GPU-hour (--price), "
        f"--activation_checkpointing={recompute}"
    )
    yield ""
    head = "GPU", "memory", "micro-batch", "GB used", "tokens/s", "hours", "hours on 8", "cost"
    yield "{:<10} {:>8} {:>12} {:>8} {:>10} {:>8} {:>11} {:>9}".format(*head)
    fixed, each = memory_of(model, optimizer, recompute, 1, False)
    for name in SHOWN:
        tflops, memory = GPUS[name]
        room = min((USABLE * memory * GB - fixed) / each, settings["batch_size"])
        # like largest_that_fits() in a real run
        micro = max((n for n in range(1, int(room) + 1) if n_sequences % n == 0), default=0)
        used = f"{(fixed + micro * each) / GB:.0f}" if micro > 0 else "-"
        speed = mfu * tflops * 1e12 / flops
        hours = tokens / speed / 3600
        yield (
            f"{name:<10} {memory:>5} GB {micro if micro > 0 else 'too large':>12} {used:>8} "
            f"{speed:>10,.0f} {hours:>8,.1f} {hours / 8:>11,.1f} {f'${price * hours:,.0f}':>9}"
        )
    sharded, _ = memory_of(model, optimizer, recompute, 8, True)
    yield ""
    yield (
        f"memory per GPU: {fixed / GB:.1f} GB ({sharded / GB:.1f} GB on each of 8 with --fsdp), "
        f"plus {each / GB:.2f} GB per sequence of the micro-batch"
    )
    yield (
        "Hours on 8 GPUs ignore communication, and small models reach far less of the peak. Memory "
        "is without torch.compile."
    )
