"""One token of the slots: what it does to them, and the gradients of that. `chunk.py` has the same for whole chunks.

A program has all slots of one head, `[MB, DB]` in registers: M slots and width D, padded to powers of two with zeros.
"""

import triton
import triton.language as tl

from .types import EPS as EPS_OF_TYPES


EPS = tl.constexpr(EPS_OF_TYPES)


@triton.jit
def lengths(slots):
    """Length of every slot, `[MB]`."""
    return tl.sqrt(tl.maximum(tl.sum(slots * slots, axis=1), EPS * EPS))


@triton.jit
def direction(start, NORMALIZATION: tl.constexpr):
    """Slots at which the loss is taken, and the length of the start (1 where it is not divided by)."""
    if NORMALIZATION == "lazy":
        length = lengths(start)
        return start / length[:, None], length
    return start, tl.sum(start * 0.0, axis=1) + 1.0


@triton.jit
def content(phi, k, v, OBJECTIVE: tl.constexpr):
    """Content h `[DB]`, its overlap with the slots and the write strength that the loss wants, `[MB]` each."""
    if OBJECTIVE == "dec":
        h = v - tl.sum(k[:, None] * phi, axis=0)
    elif OBJECTIVE == "sim":
        h = v
    else:
        h = k
    overlap = tl.sum(phi * h[None, :], axis=1)
    if OBJECTIVE == "enc":
        wanted = v - overlap
    else:
        wanted = k
    return h, overlap, wanted


@triton.jit
def strengths(h, overlap, weight, length, factor, NORMALIZATION: tl.constexpr, CHUNK: tl.constexpr):
    """`keep, write, pull` of the step, and `norm, across, taken` that they follow from, `[MB]` each."""
    zero = weight * 0.0
    if NORMALIZATION == "none":
        return factor + zero, weight, zero, zero + 1.0, zero, zero
    taken = weight * overlap / (length * length)
    on_running = tl.minimum(tl.maximum(taken, -1.0 / CHUNK), factor)
    across, norm = zero, zero + 1.0
    if NORMALIZATION == "retract":
        across = tl.maximum(tl.sum(h * h, axis=0) - overlap * overlap, 0.0)
        norm = tl.sqrt(1.0 + weight * weight * across)
    return (factor - on_running) / norm, weight / (length * norm), (on_running - taken) / norm, norm, across, taken


@triton.jit
def moved(slots, start, h, keep, write, pull, CHUNK: tl.constexpr):
    """Running slots behind the token."""
    if CHUNK == 1:  # the start is the running slot
        return (keep + pull)[:, None] * slots + write[:, None] * h[None, :]
    return keep[:, None] * slots + pull[:, None] * start + write[:, None] * h[None, :]


@triton.jit
def strengths_vjp(
    cot_keep, cot_write, cot_pull, keep, write, pull, h, overlap, weight, length, factor, norm, across, taken,
    NORMALIZATION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of `strengths` for h, overlap, weight, length `[MB]` and factor (a number)."""
    zero = weight * 0.0
    if NORMALIZATION == "none":
        return h * 0.0, zero, cot_write, zero, tl.sum(cot_keep, axis=0)
    cot_on_running = (cot_pull - cot_keep) / norm
    inside = (taken >= -1.0 / CHUNK) & (taken <= factor)
    cot_factor = tl.sum(cot_keep / norm + tl.where(taken > factor, cot_on_running, 0.0), axis=0)
    cot_taken = tl.where(inside, cot_on_running, 0.0) - cot_pull / norm
    square = length * length
    cot_weight = cot_write / (length * norm) + cot_taken * overlap / square
    cot_overlap = cot_taken * weight / square
    cot_length, cot_h = zero, h * 0.0
    if NORMALIZATION == "lazy":
        cot_length = -(cot_write * weight / square + 2.0 * cot_taken * taken / length)
    else:
        cot_norm = -(cot_keep * keep + cot_write * write + cot_pull * pull) / norm
        cot_weight += cot_norm * weight * across / norm
        cot_across = tl.where(across > 0.0, 0.5 * cot_norm * weight * weight / norm, 0.0)
        cot_overlap -= 2.0 * cot_across * overlap
        cot_h = 2.0 * tl.sum(cot_across, axis=0) * h
    return cot_h, cot_overlap, cot_weight, cot_length, cot_factor


@triton.jit
def content_vjp(cot_h, cot_overlap, cot_wanted, phi, h, k, OBJECTIVE: tl.constexpr):
    """Gradients of `content` for k, v and the slots φ."""
    if OBJECTIVE == "enc":
        cot_overlap -= cot_wanted
    cot_h += tl.sum(cot_overlap[:, None] * phi, axis=0)
    cot_phi = cot_overlap[:, None] * h[None, :]
    if OBJECTIVE == "enc":
        cot_k, cot_v = cot_h, cot_wanted
    else:
        cot_k, cot_v = cot_wanted, cot_h
    if OBJECTIVE == "dec":
        cot_k -= tl.sum(phi * cot_h[None, :], axis=1)
        cot_phi -= k[:, None] * cot_h[None, :]
    return cot_k, cot_v, cot_phi


@triton.jit
def answer(slots, q, OBJECTIVE: tl.constexpr, NORMALIZATION: tl.constexpr):
    """Read of the running slots."""
    phi, _ = direction(slots, NORMALIZATION)
    if OBJECTIVE == "enc":
        out = tl.sum(phi * q[None, :], axis=1)
    else:
        out = tl.sum(phi * q[:, None], axis=0)
    return out


@triton.jit
def answer_vjp(slots, q, cot, OBJECTIVE: tl.constexpr, NORMALIZATION: tl.constexpr):
    """Gradients of `answer` for q and the slots."""
    phi, length = direction(slots, NORMALIZATION)
    if OBJECTIVE == "enc":
        cot_q = tl.sum(phi * cot[:, None], axis=0)
        cot_phi = cot[:, None] * q[None, :]
    else:
        cot_q = tl.sum(phi * cot[None, :], axis=1)
        cot_phi = q[:, None] * cot[None, :]
    if NORMALIZATION == "lazy":
        cot_phi = (cot_phi - phi * tl.sum(phi * cot_phi, axis=1)[:, None]) / length[:, None]
    return cot_q, cot_phi
