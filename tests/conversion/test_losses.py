"""The losses against loops over tokens in float64."""

import pytest
import torch

from hf_memory.conversion.losses import (
    DIVERGENCES,
    cross_entropy,
    head_mse,
    jensen_shannon,
    logit_kl,
    matrix_frobenius,
    relative_l2,
    reverse_kl,
)


B, T, V = 3, 5, 7


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    return 3 * torch.randn(B, T, V, dtype=torch.float64), 3 * torch.randn(B, T, V, dtype=torch.float64)


@pytest.fixture
def valid() -> torch.Tensor:
    return torch.tensor([[True, True, False, True, True], [False, True, True, False, False], [True] * 5])


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return sum(float(a) * (float(a.log()) - float(b.log())) for a, b in zip(p, q))


def by_token(loss: str, p: torch.Tensor, q: torch.Tensor) -> float:
    """Of the teacher's distribution `p` and the student's `q`, both `[V]`."""
    if loss == "forward":
        return kl(p, q)
    if loss == "reverse":
        return kl(q, p)
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences(logits, valid, name, temperature):
    given, expected = logits
    p, q = (expected / temperature).softmax(-1), (given / temperature).softmax(-1)
    tokens = {(b, t): temperature**2 * by_token(name, p[b, t], q[b, t]) for b in range(B) for t in range(T)}
    loss = DIVERGENCES[name]
    assert loss(given, expected, temperature).item() == pytest.approx(sum(tokens.values()) / (B * T), rel=1e-9)
    kept = [value for place, value in tokens.items() if valid[place]]
    assert loss(given, expected, temperature, valid).item() == pytest.approx(sum(kept) / len(kept), rel=1e-9)
    assert loss(expected, expected, temperature).item() == pytest.approx(0, abs=1e-12)


def test_directions_of_the_divergence_differ(logits):
    given, expected = logits
    assert reverse_kl(given, expected).item() == logit_kl(expected, given).item()
    assert jensen_shannon(given, expected).item() == pytest.approx(jensen_shannon(expected, given).item(), rel=1e-9)
    assert logit_kl(given, expected).item() != pytest.approx(reverse_kl(given, expected).item(), rel=0.01)


def test_cross_entropy(logits, valid):
    given, targets = logits[0], torch.randint(V, (B, T))
    probabilities = given.softmax(-1)
    values = {(b, t): -float(probabilities[b, t, targets[b, t]].log()) for b in range(B) for t in range(T)}
    kept = [value for place, value in values.items() if valid[place]]
    assert cross_entropy(given, targets).item() == pytest.approx(sum(values.values()) / (B * T), rel=1e-9)
    assert cross_entropy(given, targets, valid).item() == pytest.approx(sum(kept) / len(kept), rel=1e-9)


def test_relative_l2(valid):
    given, expected, read = torch.randn(3, B, T, 4, dtype=torch.float64)

    def by_hand(origin: torch.Tensor, counts: torch.Tensor) -> float:
        rows = []
        for b in range(B):
            tokens = [t for t in range(T) if counts[b, t]]
            error = sum(float((given[b, t] - expected[b, t]).square().sum() ** 0.5) for t in tokens)
            rows.append(error / sum(float((expected[b, t] - origin[b, t]).square().sum() ** 0.5) for t in tokens))
        return sum(rows) / B

    everywhere, nothing = torch.ones(B, T, dtype=torch.bool), torch.zeros_like(read)
    assert relative_l2(given, expected, read).item() == pytest.approx(by_hand(read, everywhere), rel=1e-9)
    assert relative_l2(given, expected).item() == pytest.approx(by_hand(nothing, everywhere), rel=1e-9)
    assert relative_l2(given, expected, read, valid).item() == pytest.approx(by_hand(read, valid), rel=1e-9)
    assert relative_l2(read, expected, read).item() == pytest.approx(1)


def test_heads(valid):
    given, expected = torch.randn(2, B, T, 6, dtype=torch.float64)
    squares = {(b, t): float(((given - expected)[b, t] ** 2).sum()) / 6 for b in range(B) for t in range(T)}
    kept = [value for place, value in squares.items() if valid[place]]
    assert head_mse(given, expected).item() == pytest.approx(sum(squares.values()) / (B * T), rel=1e-9)
    assert head_mse(given, expected, valid).item() == pytest.approx(sum(kept) / len(kept), rel=1e-9)


def test_matrices(valid):
    given, expected = torch.randn(2, B, 2, T, T, dtype=torch.float64)

    def by_hand(counts: torch.Tensor) -> float:
        norms = [
            sum(
                float(given[b, h, t, s] - expected[b, h, t, s]) ** 2
                for t in range(T)
                for s in range(T)
                if counts[b, t] and counts[b, s]
            )
            ** 0.5
            for b in range(B)
            for h in range(2)
        ]
        return sum(norms) / len(norms)

    assert matrix_frobenius(given, expected).item() == pytest.approx(by_hand(torch.ones(B, T)), rel=1e-9)
    assert matrix_frobenius(given, expected, valid).item() == pytest.approx(by_hand(valid), rel=1e-9)


def test_equal_matrices_have_loss_and_gradient_zero():
    given = torch.randn(1, 1, 3, 3, requires_grad=True)
    loss = matrix_frobenius(given, given.detach())
    loss.backward()
    assert loss.item() == 0 and torch.equal(given.grad, torch.zeros_like(given))


@pytest.mark.parametrize("name", [*DIVERGENCES, "relative_l2", "head_mse"])
def test_the_mean_over_equal_parts_is_the_loss_of_the_whole(name):
    given, expected = torch.randn(2, 4, T, V, dtype=torch.float64)
    loss = DIVERGENCES.get(name) or {"relative_l2": relative_l2, "head_mse": head_mse}[name]
    parts = [loss(a, b).item() for a, b in zip(given.chunk(2), expected.chunk(2))]
    assert loss(given, expected).item() == pytest.approx(sum(parts) / 2, rel=1e-12)


@pytest.mark.parametrize("name", [*DIVERGENCES, "relative_l2", "head_mse"])
def test_low_precision_is_summed_in_float32(name):
    given, expected = torch.randn(2, 2, T, V).bfloat16()
    loss = DIVERGENCES.get(name) or {"relative_l2": relative_l2, "head_mse": head_mse}[name]
    assert loss(given, expected).item() == loss(given.float(), expected.float()).item()
