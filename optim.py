"""
Optimizers: which parameter is trained by what, at which rate, and how the rates change.

Every parameter has one role, and every role its own rate:

    hidden      matrices between two layers of activations
    embedding   tables that are looked up: tokens, values
    bigram      the hashed table of token pairs, of which most rows are seldom seen
    head        the output matrix, also if it is the embedding; and an embedding that starts small
    scalar      gains of norms, scalars of the residual stream, gates

To add an optimizer: a function in OPTIMIZERS. To add a parameter: nothing where its name and shape
tell its role, else a line in role_of.
"""

import math

import torch

ROLES = ("hidden", "embedding", "bigram", "head", "scalar")

# The five steps of Polar Express (Amsel et al. 2025, arXiv:2505.16932) for singular values from
# 1e-3 to 1, with a safety factor of 1.01 on all but the last
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def role_of(name, p, args):
    """The role of a parameter of a Transformer, from its name in the model and its shape."""
    if p.dim() < 2 or name.startswith("smear_gate"):
        return "scalar"
    if name.startswith("output.") or (name.startswith("tok_emb") and not args.wide_embedding):
        return "head"
    if name.startswith("bigram_embeddings."):
        return "bigram"
    return "embedding" if "embeddings." in name else "hidden"


def by_role(model):
    """{role: [parameters]}; each parameter of the model is in exactly one."""
    roles = {role: [] for role in ROLES}
    for name, p in model.named_parameters():
        roles[role_of(name, p, model.args)].append(p)
    found = [p for params in roles.values() for p in params]
    assert len(set(found)) == len(found) == len(list(model.parameters()))
    return {role: params for role, params in roles.items() if params}


@torch.no_grad()
def orthogonalize(matrices):
    """
    The nearest matrices with orthonormal rows or columns to a batch (n, rows, columns), by the
    polynomial iteration of Polar Express (arXiv:2505.16932). Muon needs them only roughly: its five
    steps bring singular values from 1e-3 of the largest on to about 0.9 to 1.1, and bfloat16 is
    enough.
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


def part_for(target, value):
    """This rank's part of a whole tensor, spread over the ranks as the DTensor `target` is."""
    from torch.distributed.tensor import distribute_tensor  # takes a second to load

    # every rank has the whole, so none has to send it
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


class Muon(torch.optim.Optimizer):
    """
    Momentum whose update of a matrix is made orthogonal (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon): W -= lr * sqrt(max(1, rows / columns)) * orthogonalize(u),
    with u the Nesterov momentum of the gradient, and decoupled weight decay. A neuron_beta above 0
    evens out the sizes of the neurons' updates, see evened. Matrices of one shape are
    orthogonalised together, which is what makes it quicker than torch.optim.Muon for a small model.
    product_dtype is the number format of the products.
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
        """One step for parameters of one shape."""
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
        is_spread = hasattr(nesterov[0], "full_tensor")
        if is_spread:  # FSDP: every rank works on the whole, and keeps its part of it
            nesterov = [u.full_tensor() for u in nesterov]
        whole = torch.stack(nesterov).to(group["product_dtype"])
        updates = orthogonalize(whole).to(params[0].dtype)
        if group["neuron_beta"]:
            updates = self.evened(updates, params, group["neuron_beta"])
        updates = updates.unbind()
        if is_spread:
            updates = [part_for(p, u) for p, u in zip(params, updates, strict=True)]
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(updates), alpha=-scale)

    def evened(self, updates, params, beta):
        """
        The updates (n, rows, columns) of params with each neuron's, a row or, in a wide matrix, a
        column, divided by the root of a running mean of its mean square, and with the norms that
        they had (NorMuon, Li et al. 2025, arXiv:2510.05491).
        """
        rows, columns = updates.shape[1:]
        sizes = updates.square().mean(1 if rows < columns else 2, keepdim=True)
        for p, now in zip(params, sizes, strict=True):
            # not corrected for its start at 0: the norm takes out what all neurons share
            memory = self.state[p].setdefault("neuron_sizes", torch.zeros_like(now))
            memory.lerp_(now, 1 - beta)
        roots = torch.stack([self.state[p]["neuron_sizes"] for p in params]).sqrt()
        even = updates / roots.clamp(min=1e-8)
        before, after = (torch.linalg.matrix_norm(u, keepdim=True) for u in (updates, even))
        return even * (before / after.clamp(min=1e-8))


class Together:
    """Several optimizers that are used as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for one in self.optimizers for group in one.param_groups]

    @property
    def state(self):
        return {p: memory for one in self.optimizers for p, memory in one.state.items()}

    def step(self):
        for one in self.optimizers:
            one.step()

    def zero_grad(self, set_to_none=True):
        for one in self.optimizers:
            one.zero_grad(set_to_none=set_to_none)


def adamw(roles, settings, dtype):
    """AdamW at one rate for all, base_learning_rate; only matrices and tables decay."""
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
    """Muon for hidden matrices, AdamW without decay for everything else, a rate for each role."""
    product_dtype = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    groups = [
        {"role": role, "params": params, "lr": settings[f"{role}_lr"]}
        for role, params in roles.items()
        if role != "hidden"
    ]
    rest = torch.optim.AdamW(
        groups,
        betas=(settings["muon_beta1"], settings["muon_beta2"]),
        eps=1e-10,  # gradients of rare rows are small (modded-nanogpt)
        weight_decay=0.0,
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
    return Together(hidden, rest)


# name -> function of ({role: parameters}, settings of train.py, number format of the products)
OPTIMIZERS = {"adamw": adamw, "muon": muon}


def make_optimizer(model, name, settings):
    """
    The optimizer `name` for a Transformer. `settings` are those of train.py by name. Each of its
    param_groups has its "role", and its full rate and decay as "initial_lr" and
    "initial_weight_decay".
    """
    optimizer = OPTIMIZERS[name](by_role(model), settings, model.dtype)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
        group["initial_weight_decay"] = group["weight_decay"]
    return optimizer


def table(optimizer):
    """What is trained by what, as text: a line for each group of parameters."""
    lines = [f"{'role':<10} {'tensors':>7} {'numbers':>12}  {'by':<6} {'rate':>8} {'decay':>6}"]
    for group in optimizer.param_groups:
        by = "Muon" if "momentum" in group else "AdamW"
        n = sum(p.numel() for p in group["params"])
        lines.append(
            f"{group['role']:<10} {len(group['params']):>7} {n:>12,}  {by:<6} "
            f"{group['lr']:>8.3g} {group['weight_decay']:>6.3g}"
        )
    return "\n".join(lines)


SHAPES = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
}


def rate_factor(progress, step, warmup_steps, cooldown_frac, shape="cosine", final=0.0):
    """
    What the rates are multiplied with in a step: a linear rise over warmup_steps, 1, and from
    1 - cooldown_frac of the run on a fall to `final` in the given shape (a name in SHAPES).
    progress: done part of the run, from 0 to 1; with a cooldown_frac of 1 it counts from the end of
    the warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = (progress - (1 - cooldown_frac)) / cooldown_frac if cooldown_frac else 0.0
    return final + (1 - final) * SHAPES[shape](min(max(done, 0.0), 1.0))


def momentum_at(step, final, warmup_steps, start=0.85):
    """Muon's momentum in a step: a linear rise from `start`, as in modded-nanogpt."""
    return final - (final - start) * max(0.0, 1 - step / warmup_steps) if warmup_steps else final


DECAYS = ("constant", "linear")


def decay_factor(progress, shape):
    """What weight decay is multiplied with: 1, or linear from 1 at the start to 0 at the end."""
    return 1.0 if shape == "constant" else min(max(1.0 - progress, 0.0), 1.0)


def warmup_steps(settings):
    """Steps of the warm-up: warmup_iters, at most half of the run."""
    return min(settings.warmup_iters, settings.max_iters // 2)


def set_rates(optimizer, settings, step, done):
    """
    Set learning rates, weight decay and momentum of every group for a step. settings: those of
    train.py; done: part of the run that is done, as rate_factor() takes it.
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
