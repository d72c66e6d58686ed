"""What the decode kernels share: the newest row's coefficients, and how the programs of a row finish together.

A buffered row of a state is written by the program that computed it, but the rows of all heads share one phase, and
the column blocks of one head share its keys and gates. So each program counts itself in the upper half of the row's
`phase` when it has read everything; the last one to do so sets the new phase (upper half zero again, as it is between
launches) and may change what the others have read. Nobody waits for anybody.
"""

import triton
import triton.language as tl


MAX_ROWS = 64
"""Rows that a buffer may have: its coefficients are held in registers."""

FOLDED_ROWS = tl.constexpr(16)
"""Rows of a buffer that a fold takes at a time, the least that tensor cores do. More would cost every token, folded or
not: the registers and the shared memory of a program are those of its most demanding path."""


@triton.jit
def phase_of(phase, row):
    """Number of buffered rows."""
    return (tl.load(phase + row) & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def finish(phase, row, p, programs, CHUNK: tl.constexpr):
    """Count this program; whether it was the last of `programs`, which moves the phase on."""
    tl.debug_barrier()
    arrived = tl.atomic_add(phase + row, 4294967296, sem="acq_rel") >> 32
    is_last = arrived == programs - 1
    if is_last:
        tl.store(phase + row, (p + 1) % CHUNK)
    return is_last


@triton.jit
def fill_zero(pointer, first, count, BLOCK: tl.constexpr):
    """Zero `count` elements from `first` on."""
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(pointer + first + at, tl.zeros([BLOCK], tl.float32), mask=at < count)


@triton.jit
def _buffered(rows, new, s, p, SETS: tl.constexpr):
    """Gates of rows `s`: the newest comes with the call, those behind it are zero."""
    return tl.where(s == p, tl.load(new), tl.load(rows + s * SETS, mask=s < p, other=0.0))


@triton.jit
def _first(x, s):
    return tl.sum(tl.where(s == 0, x, 0.0), axis=0)


@triton.jit
def _compose(slope_later, value_later, slope, value):
    """The affine map of a row behind that of all later ones."""
    return slope * slope_later, slope * value_later + value


@triton.jit
def newest_coefficients(
    step, log_decay, log_momentum, step_rows, decay_rows, momentum_rows, series, gate_set, p,
    SETS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row p of the coefficients (`coefficients.last_row`): β, f, m, and G, N over the buffered rows.

    With A_s = Π a over the rows behind s, w_s = Σ_{j>=s} A_j η_{s+1} ... η_j obeys w_s = A_s + η_{s+1} w_{s+1}: a scan
    of positive terms. G = θ w and f = η_0 w_0.
    """
    s = tl.arange(0, BLOCK)
    new = series * SETS + gate_set
    first = new * CHUNK - gate_set * (CHUNK - 1)
    theta = _buffered(step_rows + first, step + new, s, p, SETS)
    beta, f, m = 1.0, 0.0, 0.0
    decay = tl.where(s <= p, 1.0, 0.0)
    if log_decay is not None:
        later = _buffered(decay_rows + first, log_decay + new, s + 1, p, SETS)
        total = tl.cumsum(later, axis=0, reverse=True)
        decay = tl.where(s <= p, tl.exp(total), 0.0)
        own = _buffered(decay_rows + first, log_decay + new, s, p, SETS)
        beta = tl.exp(tl.sum(own, axis=0))
    grad, grad_momentum = theta * decay, theta * decay
    if log_momentum is not None:
        later = _buffered(momentum_rows + first, log_momentum + new, s + 1, p, SETS)
        own = _first(tl.exp(_buffered(momentum_rows + first, log_momentum + new, s, p, SETS)), s)
        carried = tl.where(s <= p, tl.exp(tl.cumsum(later, axis=0, reverse=True)), 0.0)
        slope = tl.where(s < p, tl.exp(later), 0.0)
        _, weights = tl.associative_scan((slope, decay), 0, _compose, reverse=True)
        f, m = own * _first(weights, s), own * _first(carried, s)
        grad, grad_momentum = theta * weights, theta * carried
    return beta, f, m, grad, grad_momentum


@triton.jit
def some_rows(x, s, at):
    """Entries `at` of a vector over rows `s`."""
    return tl.sum(tl.where(s[:, None] == at[None, :], x[:, None], 0.0), axis=0)


@triton.jit
def append_gates(
    step, log_decay, log_momentum, step_rows, decay_rows, momentum_rows, series, gate_set, p,
    SETS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the newest gates into row p."""
    new = series * SETS + gate_set
    at = (series * CHUNK + p) * SETS + gate_set
    tl.store(step_rows + at, tl.load(step + new))
    if log_decay is not None:
        tl.store(decay_rows + at, tl.load(log_decay + new))
    if log_momentum is not None:
        tl.store(momentum_rows + at, tl.load(log_momentum + new))


@triton.jit
def buffer_tile(rows, series, s, columns, p, newest, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `[BLOCK_ROWS, columns]` of a buffer `[B, H, CHUNK, WIDTH]`, row p being `newest`, zero behind it."""
    at = (series * CHUNK + s)[:, None] * WIDTH + columns[None, :]
    inside = (s < p)[:, None] & (columns < WIDTH)[None, :]
    return tl.where((s == p)[:, None], newest[None, :], tl.load(rows + at, mask=inside, other=0.0))


@triton.jit
def sum_rows(rows, weights, s, series, columns, p, newest, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a buffer, row p being `newest`, summed with weights over rows `s`; only those that exist are read."""
    total = tl.zeros_like(newest)
    for first in range(0, p + 1, FOLDED_ROWS):
        part = first + tl.arange(0, FOLDED_ROWS)
        tile = buffer_tile(rows, series, part, columns, p, newest, CHUNK, WIDTH)
        total += tl.sum(some_rows(weights, s, part)[:, None] * tile, axis=0)
    return total


@triton.jit
def load_rows(rows, series, part, columns, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `[part, columns]` of a full buffer `[B, H, CHUNK, WIDTH]`."""
    inside = (part < CHUNK)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(rows + (series * CHUNK + part)[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)


@triton.jit
def fold_matrix(
    memory, momentum, inputs, directions, series, s, columns, beta, f, m, grad, grad_momentum,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Move the anchor of columns `[K, columns]` of a matrix behind the last row of its full buffers."""
    for start in range(0, K, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = (series * K + i)[:, None] * V + columns[None, :]
        inside = (i < K)[:, None] & (columns < V)[None, :]
        d = tl.load(memory + at, mask=inside, other=0.0)
        after = beta * d
        if momentum is not None:
            pace = tl.load(momentum + at, mask=inside, other=0.0)
            after += f * pace
            pace *= m
        for first in range(0, CHUNK, FOLDED_ROWS):
            part = first + tl.arange(0, FOLDED_ROWS)
            x = tl.trans(load_rows(inputs, series, part, i, CHUNK, K))
            u = load_rows(directions, series, part, columns, CHUNK, V)
            after = tl.dot(x, some_rows(grad, s, part)[:, None] * u, after, input_precision=PRECISION)
            if momentum is not None:
                pace = tl.dot(x, some_rows(grad_momentum, s, part)[:, None] * u, pace, input_precision=PRECISION)
        tl.store(memory + at, after, mask=inside)
        if momentum is not None:
            tl.store(momentum + at, pace, mask=inside)
