"""Optimizers: what trains each parameter, Muon's update, and the learning-rate schedule."""

from types import SimpleNamespace

import pytest
import torch
from conftest import random_model

from optim import (
    ROLES,
    Muon,
    by_role,
    decay_factor,
    make_optimizer,
    momentum_at,
    orthogonalize,
    rate_factor,
    table,
    warmup_steps,
)

SETTINGS = {f"{role}_lr": 0.01 * (i + 1) for i, role in enumerate(ROLES)}
SETTINGS |= {"base_learning_rate": 2e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95}
SETTINGS |= {"muon_beta1": 0.8, "muon_beta2": 0.95, "momentum": 0.9, "muon_weight_decay": 0.2}
SETTINGS |= {"neuron_beta": 0.95, "embedding_weight_decay": 0.3}
EVERYTHING = {
    "qk_norm": True, "tie_embeddings": False, "zero_init": True, "embedding_norm": True,
    "residual_scalars": True, "value_embeddings": 1, "bigram_rows": 64, "smear": True,
}  # fmt: skip


def test_every_parameter_has_the_right_role():
    model = random_model(**EVERYTHING)
    names = {p: name for name, p in model.named_parameters()}
    roles = {role: sorted(names[p] for p in params) for role, params in by_role(model).items()}
    assert roles["embedding"] == ["tok_embeddings.weight", "value_embeddings.0.weight"]
    assert roles["bigram"] == ["bigram_embeddings.weight"]
    assert roles["head"] == ["output.weight"]
    assert len(roles["hidden"]) == 2 * 7  # q, k, v, o, w1, w2, w3 of both layers
    assert {"smear_gate.weight", "residual_scalars", "x0_scalars"} < set(roles["scalar"])
    assert "layers.1.attention.q_norm.weight" in roles["scalar"]
    assert sum(map(len, roles.values())) == len(names)
    assert [*by_role(random_model())] == ["hidden", "head", "scalar"]  # tied: the table is the head
    plain = by_role(random_model(tie_embeddings=False))  # a table with a small std
    assert len(plain["head"]) == 2 and "embedding" not in plain


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_table_counts_every_parameter_once(name):
    model = random_model(**EVERYTHING)
    optimizer = make_optimizer(model, name, SETTINGS)
    lines = table(optimizer).splitlines()
    assert sum(int(line.split()[2].replace(",", "")) for line in lines[1:]) == model.n_params()
    by = {line.split()[0]: line.split()[3:] for line in lines[1:]}
    if name == "muon":
        assert by["hidden"] == ["Muon", "0.01", "0.2"] and by["bigram"] == ["AdamW", "0.03", "0"]
        assert by["embedding"] == ["AdamW", "0.02", "0.3"]
    else:
        assert by["hidden"] == ["AdamW", "0.002", "0.1"] and by["scalar"][2] == "0"


@pytest.mark.parametrize("rows, columns", [(16, 16), (16, 64), (64, 16)])
def test_orthogonalize_makes_all_singular_values_nearly_1(rows, columns):
    torch.manual_seed(1)
    matrices = torch.randn(3, rows, columns) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    result = orthogonalize(matrices)
    U, _, V = torch.linalg.svd(matrices, full_matrices=False)
    values = (U.mT @ result @ V.mT).diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.7 and values.max() < 1.3
    exact = U @ V
    assert (result - exact).norm() < 0.2 * exact.norm()


def test_muon_is_orthogonalized_momentum():
    """Three steps of two matrices of the same shape, against a loop over the matrices."""
    torch.manual_seed(2)
    params = [torch.nn.Parameter(torch.randn(8, 4)) for _ in range(2)]
    expected = [p.detach().clone() for p in params]
    memory = [torch.zeros(8, 4) for _ in params]
    optimizer = Muon(params, lr=0.1, momentum=0.9, weight_decay=0.5, product_dtype=torch.float32)
    for _ in range(3):
        for i, p in enumerate(params):
            g = p.grad = torch.randn(8, 4)
            memory[i] = 0.9 * memory[i] + 0.1 * g
            update = orthogonalize((0.1 * g + 0.9 * memory[i])[None])[0]
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - 0.1 * 2**0.5 * update
        optimizer.step()
        for p, wanted in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), wanted)


@pytest.mark.parametrize("rows, columns", [(12, 5), (6, 6), (5, 12)])
def test_normuon_equalizes_neurons(rows, columns):
    """Three steps against a loop over neurons; the norm of the update does not change."""
    torch.manual_seed(4)
    p = torch.nn.Parameter(torch.randn(rows, columns))
    expected = p.detach().clone()
    memory, sizes = torch.zeros(rows, columns), torch.zeros(max(rows, columns))
    optimizer = Muon([p], 0.1, momentum=0.9, neuron_beta=0.8, product_dtype=torch.float32)
    for _ in range(3):
        g = p.grad = torch.randn(rows, columns)
        memory = 0.9 * memory + 0.1 * g
        update = orthogonalize((0.1 * g + 0.9 * memory)[None])[0]
        neurons = update if rows >= columns else update.T
        sizes = 0.8 * sizes + 0.2 * torch.stack([n.square().mean() for n in neurons])
        even = torch.stack([n / size.sqrt() for n, size in zip(neurons, sizes, strict=True)])
        even *= neurons.norm() / even.norm()
        even = even if rows >= columns else even.T
        expected -= 0.1 * max(1, rows / columns) ** 0.5 * even
        optimizer.step()
        torch.testing.assert_close(p.detach(), expected)
    p.grad = torch.zeros(rows, columns)  # zero gradient, as below a head that starts at zero
    fresh = Muon([p], 0.1, neuron_beta=0.8)
    fresh.step()
    torch.testing.assert_close(p.detach(), expected)


def test_muon_moves_in_the_direction_of_torch_optim_muon():
    """One step with equal gradients; only the iteration differs."""
    torch.manual_seed(3)
    start, g = torch.randn(32, 32), torch.randn(32, 32)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours.grad, theirs.grad = g.clone(), g.clone()
    Muon([ours], lr=0.1).step()
    torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0).step()
    a, b = (ours.detach() - start).flatten(), (theirs.detach() - start).flatten()
    assert torch.cosine_similarity(a, b, dim=0) > 0.95


def test_rates_rise_stay_and_fall():
    def rates(shape, cooldown, final=0.0):
        return [rate_factor(i / 100, i, 10, cooldown, shape, final) for i in range(101)]

    linear = rates("linear", 0.4)
    assert linear[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert linear[10:61] == [1.0] * 51
    assert linear[60:] == pytest.approx([1 - i / 40 for i in range(41)])
    cosine = rates("cosine", 1.0)
    assert cosine[50] == pytest.approx(0.5) and cosine[100] == 0
    assert rates("linear", 0.4, final=0.1)[100] == pytest.approx(0.1)
    assert rates("linear", 0.0)[10:] == [1.0] * 91


def test_a_run_of_minutes_has_the_warm_up_that_was_asked_for():
    """A run of few steps has it in half of them."""
    asked = SimpleNamespace(warmup_iters=100, max_iters=10, max_minutes=60.0)
    assert warmup_steps(asked) == 100
    asked.max_minutes = 0.0
    assert warmup_steps(asked) == 5


def test_decay_stays_or_falls():
    assert [decay_factor(p, "constant") for p in (0, 0.5, 1)] == [1, 1, 1]
    assert [decay_factor(p, "linear") for p in (-0.1, 0, 0.25, 1, 1.1)] == [1, 1, 0.75, 0, 0]


def test_momentum_rises():
    values = [momentum_at(step, 0.95, 100) for step in (0, 50, 100, 1000)]
    assert values == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert momentum_at(0, 0.95, 0) == 0.95
