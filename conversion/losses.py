"""What the stages minimise: pure functions of what student and teacher give.

All are means over rows or tokens, computed in float32 at least: the mean over equal parts of a batch is the loss of
the whole. `valid` leaves padded tokens out.
"""

import torch
from torch import Tensor
from torch.nn import functional


def relative_l2(given: Tensor, expected: Tensor, origin: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Mean length of the error in units of the mean length of what was to be given; mean over rows.

    1 for a student that gives `origin` itself: the input of a block that does nothing, or nothing at all.

    Args:
        given: The student's output, `[B, T, D]`.
        expected: The teacher's, `[B, T, D]`.
        origin: What the lengths of `expected` are measured from, `[B, T, D]`. Default: zero.
        valid: `[B, T]` bool, true where a token counts. Default: all do.
    """
    given, expected = _precise(given), _precise(expected)
    update = (expected if origin is None else expected - _precise(origin)).detach()
    lengths = [torch.linalg.vector_norm(x, dim=-1) for x in (given - expected, update)]
    if valid is not None:
        # The same number of tokens stands below both sums of a row.
        lengths = [length.where(valid, 0) for length in lengths]
    error, size = (length.sum(-1) for length in lengths)
    # A teacher's block that adds nothing at all is possible, in a model of zeros.
    return (error / size.clamp_min(torch.finfo(torch.float32).tiny)).mean()


def head_mse(given: Tensor, expected: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared error of the heads' outputs `[B, T, H d]`, over tokens and channels."""
    return _token_mean((_precise(given) - _precise(expected)).square().mean(-1), valid)


def matrix_frobenius(given: Tensor, expected: Tensor, valid: Tensor | None = None) -> Tensor:
    """Frobenius norm of the difference of mixer matrices `[B, H, T, T]`, not squared, mean over rows and heads.

    Entry `[t, s]` is the weight of the value of token s in the output of token t. Only pairs of valid tokens count.
    """
    difference = _precise(given) - _precise(expected)
    if valid is not None:
        difference = difference.where((valid[:, :, None] & valid[:, None, :])[:, None], 0)
    # The square root has no gradient at 0.
    squares = difference.square().sum((-2, -1))
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt().where(squares > 0, 0).mean()


def logit_kl(given: Tensor, expected: Tensor, temperature: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """`temperature**2 * KL(expected || given)` of softened distributions, mean over tokens, in nats.

    Args:
        given: The student's logits, `[B, T, V]`.
        expected: The teacher's, `[B, T, V]`.
        temperature: Both are divided by it. Default: 1.
        valid: `[B, T]` bool, true where a token counts. Default: all do.
    """
    log_given, log_expected = _log_softmax(given, temperature), _log_softmax(expected, temperature)
    return temperature**2 * _token_mean(_divergence(log_expected, log_given), valid)


def reverse_kl(given: Tensor, expected: Tensor, temperature: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """`temperature**2 * KL(given || expected)`: `logit_kl` in the other direction."""
    log_given, log_expected = _log_softmax(given, temperature), _log_softmax(expected, temperature)
    return temperature**2 * _token_mean(_divergence(log_given, log_expected), valid)


def jensen_shannon(given: Tensor, expected: Tensor, temperature: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """`temperature**2` times the mean of both distributions' KL to their even mixture; arguments as of `logit_kl`."""
    log_given, log_expected = _log_softmax(given, temperature), _log_softmax(expected, temperature)
    log_mixture = torch.logaddexp(log_given, log_expected) - torch.tensor(2.0, dtype=torch.float64).log().item()
    both = _divergence(log_expected, log_mixture) + _divergence(log_given, log_mixture)
    return temperature**2 * _token_mean(both / 2, valid)


DIVERGENCES = {"forward": logit_kl, "reverse": reverse_kl, "jsd": jensen_shannon}


def cross_entropy(given: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Surprise at the tokens `[B, T]` int64 under logits `[B, T, V]`, mean over tokens, in nats."""
    by_token = functional.cross_entropy(_precise(given).flatten(0, -2), targets.flatten(), reduction="none")
    return _token_mean(by_token.view_as(targets), valid)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (_precise(logits) / temperature).log_softmax(-1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) by token."""
    return functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def _token_mean(by_token: Tensor, valid: Tensor | None) -> Tensor:
    return by_token.mean() if valid is None else by_token[valid].mean()
