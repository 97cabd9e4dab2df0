"""
Optimizers: what trains each parameter, at which learning rate, and how the rates change.

Every parameter has one role, and every role has its own learning rate:

    hidden      matrices between two layers of activations
    embedding   lookup tables of tokens and values
    bigram      the hashed table of token pairs; most of its rows are rarely used
    head        the output matrix, even if tied to the embedding; an embedding with a small std
    scalar      norm gains, residual scalars, gates, convolutions

To add an optimizer, add a function to OPTIMIZERS. A new parameter needs a line in role_of() only if
the existing ones do not fit its name and shape.
"""

import math

import torch

ROLES = ("hidden", "embedding", "bigram", "head", "scalar")

# The five steps of Polar Express (Amsel et al. 2025, arXiv:2505.16932) for singular values from
# 1e-3 to 1, with a safety factor of 1.02, as in modded-nanogpt
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def role_of(name, p, args):
    """Return the role of a Transformer's parameter from its name and shape."""
    if p.dim() < 2 or name.startswith("smear_gate") or name.endswith("_conv"):
        return "scalar"
    if name.startswith("output.") or (name.startswith("tok_emb") and not args.wide_embedding):
        return "head"
    if name.startswith("bigram_embeddings."):
        return "bigram"
    return "embedding" if "embeddings." in name else "hidden"


def by_role(model):
    """Return {role: [parameters]}; each parameter of the model has exactly one role."""
    roles = {role: [] for role in ROLES}
    for name, p in model.named_parameters():
        roles[role_of(name, p, model.args)].append(p)
    assigned = [p for params in roles.values() for p in params]
    assert len(set(assigned)) == len(assigned) == len(list(model.parameters()))
    return {role: params for role, params in roles.items() if params}


@torch.no_grad()
def orthogonalize(matrices):
    """
    Return the nearest matrices with orthonormal rows or columns to a batch (n, rows, columns), by
    the polynomial iteration of Polar Express (arXiv:2505.16932). Muon needs only a rough result:
    five steps bring all singular values above 1e-3 of the Frobenius norm to 0.86 to 1.14, and
    bfloat16 is enough.
    """
    X = matrices
    is_tall = X.shape[1] > X.shape[2]
    X = X.mT if is_tall else X
    norms = torch.linalg.matrix_norm(X.float(), keepdim=True)
    X = X / (norms * 1.01 + 1e-7).to(X.dtype)
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if is_tall else X


def shard_like(target, value):
    """Return a whole tensor sharded over the ranks like the DTensor `target`."""
    from torch.distributed.tensor import distribute_tensor  # takes a second to load

    # every rank has the whole tensor, so none must send it
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


class Muon(torch.optim.Optimizer):
    """
    Momentum with orthogonalized updates (Jordan et al. 2024, kellerjordan.github.io/posts/muon):
    W -= lr * sqrt(max(1, rows / columns)) * orthogonalize(u), where u is the Nesterov momentum of
    the gradient, and decoupled weight decay. A neuron_beta above 0 equalizes the size of the
    neurons' updates, see equalize(). Matrices of the same shape are orthogonalized together, which
    makes it faster than torch.optim.Muon for small models. product_dtype: dtype of the products.
    """

    def __init__(
        self,
        params,
        lr,
        momentum=0.95,
        weight_decay=0.0,
        neuron_beta=0.0,
        product_dtype=torch.bfloat16,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "neuron_beta": neuron_beta,
            "product_dtype": product_dtype,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self.update(params, group)

    def update(self, params, group):
        """Take one step for parameters of one shape."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers, grads = (
            [self.state[p]["momentum_buffer"] for p in params],
            [p.grad for p in params],
        )
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
        rows, columns = params[0].shape
        scale = group["lr"] * max(1, rows / columns) ** 0.5
        is_sharded = hasattr(nesterov[0], "full_tensor")
        if is_sharded:  # FSDP: every rank computes the whole update and keeps its part
            nesterov = [u.full_tensor() for u in nesterov]
        whole = torch.stack(nesterov).to(group["product_dtype"])
        updates = orthogonalize(whole).to(params[0].dtype)
        if group["neuron_beta"]:
            updates = self.equalize(updates, params, group["neuron_beta"])
        updates = updates.unbind()
        if is_sharded:
            updates = [shard_like(p, u) for p, u in zip(params, updates, strict=True)]
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(updates), alpha=-scale)

    def equalize(self, updates, params, beta):
        """
        Divide each neuron's update by the root of a running mean of its mean square, and rescale
        each matrix to its original norm (NorMuon, Li et al. 2025, arXiv:2510.05491). A neuron is a
        row or, in a wide matrix, a column. updates: (n, rows, columns), one per parameter.
        """
        rows, columns = updates.shape[1:]
        sizes = updates.square().mean(1 if rows < columns else 2, keepdim=True)
        for p, size in zip(params, sizes, strict=True):
            # no bias correction: the rescaling cancels any factor shared by all neurons
            mean = self.state[p].setdefault("neuron_sizes", torch.zeros_like(size))
            mean.lerp_(size, 1 - beta)
        roots = torch.stack([self.state[p]["neuron_sizes"] for p in params]).sqrt()
        equalized = updates / roots.clamp(min=1e-8)
        before, after = (torch.linalg.matrix_norm(u, keepdim=True) for u in (updates, equalized))
        return equalized * (before / after.clamp(min=1e-8))


class CombinedOptimizer:
    """Several optimizers used as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self):
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)


def adamw(roles, settings, dtype):
    """Return AdamW with base_learning_rate for all; scalars have no weight decay."""
    groups = [
        {
            "role": role,
            "params": params,
            "weight_decay": 0.0 if role == "scalar" else settings["weight_decay"],
        }
        for role, params in roles.items()
    ]
    betas = (settings["beta1"], settings["beta2"])
    return torch.optim.AdamW(groups, lr=settings["base_learning_rate"], betas=betas, fused=True)


def muon(roles, settings, dtype):
    """
    Return Muon for hidden matrices and AdamW for the rest; one rate per role. Only hidden matrices
    and the role "embedding" have weight decay.
    """
    product_dtype = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    groups = [
        {
            "role": role,
            "params": params,
            "lr": settings[f"{role}_lr"],
            "weight_decay": settings["embedding_weight_decay"] if role == "embedding" else 0.0,
        }
        for role, params in roles.items()
        if role != "hidden"
    ]
    rest = torch.optim.AdamW(
        groups,
        betas=(settings["muon_beta1"], settings["muon_beta2"]),
        eps=1e-10,  # gradients of rare rows are small (modded-nanogpt)
        fused=True,
    )
    hidden = Muon(
        [{"role": "hidden", "params": roles["hidden"]}],
        settings["hidden_lr"],
        settings["momentum"],
        settings["muon_weight_decay"],
        settings["neuron_beta"],
        product_dtype=product_dtype,
    )
    return CombinedOptimizer(hidden, rest)


# name -> function of ({role: parameters}, settings of train.py, dtype of matrix products)
OPTIMIZERS = {"adamw": adamw, "muon": muon}


def make_optimizer(model, name, settings):
    """
    Return the optimizer `name` for a Transformer. settings: {name: value} of train.py. Each param
    group has a "role", and its full rate and decay as "initial_lr" and "initial_weight_decay".
    """
    optimizer = OPTIMIZERS[name](by_role(model), settings, model.dtype)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
        group["initial_weight_decay"] = group["weight_decay"]
    return optimizer


def table(optimizer):
    """Return a table, as text, of what trains each group of parameters."""
    head = "role", "tensors", "parameters", "optimizer", "lr", "decay"
    lines = ["{:<10} {:>7} {:>12}  {:<9} {:>8} {:>6}".format(*head)]
    for group in optimizer.param_groups:
        name = "Muon" if "momentum" in group else "AdamW"
        n = sum(p.numel() for p in group["params"])
        lines.append(
            f"{group['role']:<10} {len(group['params']):>7} {n:>12,}  {name:<9} "
            f"{group['lr']:>8.3g} {group['weight_decay']:>6.3g}"
        )
    return "\n".join(lines)


SHAPES = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
}


def rate_factor(progress, step, warmup_steps, cooldown_frac, shape, final):
    """
    Return the factor for the learning rates in a step: a linear rise over warmup_steps, then 1, and
    over the last cooldown_frac of the run a fall to `final` with the given shape (a key of SHAPES).
    progress: the part of the run that is done, 0 to 1, as in RunState.part_done().
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = (progress - (1 - cooldown_frac)) / cooldown_frac if cooldown_frac else 0.0
    return final + (1 - final) * SHAPES[shape](min(max(done, 0.0), 1.0))


def momentum_at(step, final, warmup_steps, start=0.85):
    """Return Muon's momentum in a step: a linear rise from `start`, as in modded-nanogpt."""
    return final - (final - start) * max(0.0, 1 - step / warmup_steps) if warmup_steps else final


DECAYS = ("constant", "linear")


def decay_factor(progress, shape):
    """Return the factor for weight decay: 1, or falling linearly from 1 to 0 over the run."""
    return 1.0 if shape == "constant" else min(max(1.0 - progress, 0.0), 1.0)


def warmup_steps(settings):
    """Return the number of warm-up steps: warmup_iters, but at most half of max_iters."""
    if settings.max_minutes:
        return settings.warmup_iters
    return min(settings.warmup_iters, settings.max_iters // 2)


def set_rates(optimizer, settings, step, done):
    """
    Set the learning rate, weight decay and momentum of every group for a step. done: the progress
    of the run, as in rate_factor().
    """
    schedule = settings.cooldown_frac, settings.cooldown_shape, settings.final_lr_frac
    factor = rate_factor(done, step, warmup_steps(settings), *schedule)
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]
        group["weight_decay"] = group["initial_weight_decay"] * decay_factor(
            done, settings.decay_shape
        )
        if "momentum" in group:
            group["momentum"] = momentum_at(step, settings.momentum, settings.momentum_warmup)
