"""Named corners against the recurrences that define them, and against fla's plain forms where those are right."""

import importlib.util
from pathlib import Path

import pytest
import torch
from op_inputs import Case, assert_close
from torch import Tensor

from hf_memory.kernels import AnchoredOptions, Gates, anchored_linear
from hf_memory.kernels.presets import delta_rule, gated_delta_rule, momentum_delta_rule, ttt_linear


@pytest.fixture
def case() -> Case:
    return Case(depth=1, shape=(2, 70, 3, 16))


def gates(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    beta, log_decay, log_momentum = (gate.squeeze(-1) for gate in case.gates)
    return beta, log_decay, log_momentum


def fla_naive(op: str, name: str):
    """A plain PyTorch function of fla, loaded from its file: importing the package would initialise its kernels."""
    package = importlib.util.find_spec("fla")
    path = Path(package.submodule_search_locations[0]) / "ops" / op / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{op}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def recurrence(q, k, v, beta, log_decay=None, decay_first=False) -> Tensor:
    memory, outputs = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[1]):
        keep = 1 if log_decay is None else log_decay[:, t].exp()[..., None, None]
        seen = keep * memory if decay_first else memory
        error = v[:, t] - torch.einsum("bhi,bhio->bho", k[:, t], seen)
        memory = keep * memory + torch.einsum("bhi,bho->bhio", beta[:, t, :, None] * k[:, t], error)
        outputs.append(torch.einsum("bhi,bhio->bho", q[:, t], memory))
    return torch.stack(outputs, 1)


def test_delta_rule(case):
    beta, *_ = gates(case)
    out, state = delta_rule(case.q, case.k, case.v, beta, output_final_state=True)
    assert_close(out, recurrence(case.q, case.k, case.v, beta), 1e-12)
    heads_first = [x.transpose(1, 2) for x in (case.q, case.k, case.v, beta)]
    theirs, memory = fla_naive("delta_rule", "delta_rule_recurrence")(*heads_first)
    assert_close(out, theirs.transpose(1, 2) * 4, 1e-5)
    assert_close(state["memory_0"], memory, 1e-5)


def test_gated_delta_rule(case):
    beta, g, _ = gates(case)
    out, state = gated_delta_rule(case.q, case.k, case.v, g, beta, output_final_state=True)
    assert_close(out, recurrence(case.q, case.k, case.v, beta, g, decay_first=True), 1e-12)
    theirs, memory = fla_naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")(
        case.q, case.k, case.v, beta, g, scale=1.0, output_final_state=True
    )
    assert_close(out, theirs, 1e-5)
    assert_close(state["memory_0"], memory, 1e-5)


def test_titans_without_momentum_is_the_gated_delta_rule_of_scaled_values(case):
    """titans j8: the gradient at the undecayed memory is the gated delta rule with β = θ / a and values a v."""
    beta, g, _ = gates(case)
    a = g.exp()
    ours, _ = anchored_linear(
        case.q, case.k, case.v, Gates(beta[..., None], g[..., None]), options=AnchoredOptions(chunk_size=1)
    )
    mapped, _ = gated_delta_rule(case.q, case.k, case.v * a[..., None], g, beta / a)
    assert_close(ours, mapped, 1e-9)
    plain, _ = gated_delta_rule(case.q, case.k, case.v, g, beta)
    assert (ours - plain).norm() > 1e-2 * plain.norm()


def test_momentum_delta_rule(case):
    beta, g, log_momentum = gates(case)
    out, state = momentum_delta_rule(case.q, case.k, case.v, beta, log_momentum, g, output_final_state=True)
    ones = torch.ones_like(beta)
    theirs, final = fla_naive("momentum_delta_rule", "recurrent_momentum_delta_rule_ref")(
        case.q,
        case.k,
        case.v,
        log_alpha=g,
        log_mu=log_momentum,
        p=case.k,
        beta=ones,
        eta=beta,
        scale=1.0,
        output_final_state=True,
    )
    assert_close(out, theirs, 1e-5)
    assert_close(state["memory_0"], final[0], 1e-5)
    assert_close(state["momentum_0"], -final[1], 1e-5)


def test_strong_momentum_keeps_its_digits():
    """A momentum near one over 512 tokens in float32, where factored chunk forms lose all accuracy."""
    case = Case(depth=1, shape=(1, 512, 2, 32))
    beta, g, _ = gates(case)
    log_momentum = torch.full_like(beta, -0.01)
    operands = [case.q, case.k, case.v, 0.1 * beta, log_momentum, g]
    exact, _ = momentum_delta_rule(*operands)
    low, _ = momentum_delta_rule(*(x.float() for x in operands))
    assert_close(low, exact, 1e-5)


@pytest.mark.parametrize("chunk_size", [1, 16])
def test_ttt_linear(case, chunk_size):
    """Primal TTT-Linear: gradients by autograd at the mini-batch's start."""
    beta, *_ = gates(case)
    affine = (1 + 0.1 * torch.randn(3, 16).double(), 0.1 * torch.randn(3, 16).double())
    weight = case.weights[0]
    out, _ = ttt_linear(case.q, case.k, case.v, beta, weight, affine, chunk_size)

    def model(x: Tensor, w: Tensor) -> Tensor:
        z = torch.einsum("bhi,bhio->bho", x, w)
        return x + torch.nn.functional.layer_norm(z, (16,), eps=1e-6) * affine[0] + affine[1]

    running, outputs = weight.expand(2, *weight.shape).clone(), []
    for t in range(70):
        if t % chunk_size == 0:
            anchor = running.clone().requires_grad_()
        loss = 0.5 * (model(case.k[:, t], anchor) - case.v[:, t]).square().sum()
        (grad,) = torch.autograd.grad(loss, anchor)
        running = running - beta[:, t, :, None, None] * grad
        outputs.append(model(case.q[:, t], running))
    assert_close(out, torch.stack(outputs, 1), 1e-9)
