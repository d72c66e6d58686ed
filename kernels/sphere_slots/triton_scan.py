"""Token by token through a sequence with the slots in registers, forwards and backwards; every grid and mode."""

import triton
import triton.language as tl

from ..compiled import KernelEntry, Target
from .plan import SEGMENT, plan
from .triton_token import (
    answer,
    answer_vjp,
    content,
    content_vjp,
    direction,
    lengths,
    moved,
    strengths,
    strengths_vjp,
)


@triton.jit
def load_row(x, at, WIDTH: tl.constexpr, BLOCK: tl.constexpr, valid):
    """Entries `[BLOCK]` of row `at` of a matrix with `WIDTH` columns, zero for a padded token."""
    c = tl.arange(0, BLOCK)
    return tl.load(x + at * WIDTH + c, mask=c < tl.where(valid, WIDTH, 0), other=0.0).to(tl.float32)


@triton.jit
def store_row(x, value, at, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    tl.store(x + at * WIDTH + c, value.to(x.dtype.element_ty), mask=c < WIDTH)


@triton.jit
def load_slots(x, at, M: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, DB: tl.constexpr):
    """`[MB, DB]` of matrix `at` among matrices `[M, D]`."""
    m, d = tl.arange(0, MB), tl.arange(0, DB)
    inside = (m < M)[:, None] & (d < D)[None, :]
    return tl.load(x + at * M * D + m[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def store_slots(x, value, at, M: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, DB: tl.constexpr):
    m, d = tl.arange(0, MB), tl.arange(0, DB)
    inside = (m < M)[:, None] & (d < D)[None, :]
    tl.store(x + at * M * D + m[:, None] * D + d[None, :], value, mask=inside)


@triton.jit
def load_gates(step, log_decay, at, valid, M: tl.constexpr, MB: tl.constexpr, STEPS: tl.constexpr):
    """Step sizes `[MB]` and the factor of decay; 0 and 1 for a padded token, which then changes nothing."""
    m = tl.arange(0, MB)
    if STEPS == 1:
        steps = tl.load(step + at, mask=valid, other=0.0) + 0.0 * m
    else:
        steps = tl.load(step + at * M + m, mask=m < tl.where(valid, M, 0), other=0.0)
    factor = 1.0
    if log_decay is not None:
        factor = tl.exp(tl.load(log_decay + at, mask=valid, other=0.0))
    return steps, factor


@triton.jit
def behind(slots, start, phase, NORMALIZATION: tl.constexpr, CHUNK: tl.constexpr):
    """Running slots and start behind a token of a phase (-1: padded): both new where it completes its chunk."""
    full = phase == CHUNK - 1
    after = slots
    if NORMALIZATION == "retract":
        after = slots / lengths(slots)[:, None]
    return tl.where(full, after, slots), tl.where(full, after, start)


@triton.jit
def step_forward(
    k, v, step, log_decay, at, phase, slots, start,
    M: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, DB: tl.constexpr, STEPS: tl.constexpr,
    OBJECTIVE: tl.constexpr, NORMALIZATION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Running slots behind token `at`, before a boundary."""
    valid = phase >= 0
    K: tl.constexpr = D if OBJECTIVE == "enc" else M
    V: tl.constexpr = M if OBJECTIVE == "enc" else D
    KB: tl.constexpr = DB if OBJECTIVE == "enc" else MB
    VB: tl.constexpr = MB if OBJECTIVE == "enc" else DB
    phi, length = direction(start, NORMALIZATION)
    steps, factor = load_gates(step, log_decay, at, valid, M, MB, STEPS)
    h, overlap, wanted = content(phi, load_row(k, at, K, KB, valid), load_row(v, at, V, VB, valid), OBJECTIVE)
    keep, write, pull, _, _, _ = strengths(h, overlap, steps * wanted, length, factor, NORMALIZATION, CHUNK)
    return moved(slots, start, h, keep, write, pull, CHUNK)


@triton.jit(do_not_specialize=["num_tokens"])
def forward_kernel(
    q, k, v, step, log_decay, phases, start_in, slots_in, out, start_out, slots_out, kept, num_tokens, H,
    M: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, DB: tl.constexpr, STEPS: tl.constexpr,
    OBJECTIVE: tl.constexpr, NORMALIZATION: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Answers, and the states behind the last token.

    `phases [B, T]`: tokens of the chunk in front of each token, -1 where it is padded. `kept`, if given, gets the
    running slots and the start in front of every segment, `[B, H, NS, 2, M, D]`.
    """
    series = tl.program_id(0).to(tl.int64)
    row, head = series // H, series % H
    K: tl.constexpr = D if OBJECTIVE == "enc" else M
    V: tl.constexpr = M if OBJECTIVE == "enc" else D
    KB: tl.constexpr = DB if OBJECTIVE == "enc" else MB
    VB: tl.constexpr = MB if OBJECTIVE == "enc" else DB
    slots, start = load_slots(slots_in, series, M, D, MB, DB), load_slots(start_in, series, M, D, MB, DB)
    segments = tl.cdiv(num_tokens, SEGMENT)
    for t in range(num_tokens):
        if kept is not None:
            if t % SEGMENT == 0:
                place = (series * segments + t // SEGMENT) * 2
                store_slots(kept, slots, place, M, D, MB, DB)
                store_slots(kept, slots if CHUNK == 1 else start, place + 1, M, D, MB, DB)
        phase = tl.load(phases + row * num_tokens + t)
        at = (row * num_tokens + t) * H + head
        slots = step_forward(
            k, v, step, log_decay, at, phase, slots, slots if CHUNK == 1 else start,
            M, D, MB, DB, STEPS, OBJECTIVE, NORMALIZATION, CHUNK,
        )  # fmt: skip
        query = load_row(q, at, K, KB, phase >= 0)
        store_row(out, answer(slots, query, OBJECTIVE, NORMALIZATION), at, V, VB)
        if CHUNK == 1:  # one state, not two of the same
            slots, _ = behind(slots, slots, phase, NORMALIZATION, CHUNK)
        else:
            slots, start = behind(slots, start, phase, NORMALIZATION, CHUNK)
    store_slots(slots_out, slots, series, M, D, MB, DB)
    if CHUNK == 1:
        start = slots
    store_slots(start_out, start, series, M, D, MB, DB)


@triton.jit
def boundary_vjp(slots, cot_slots, cot_start, phase, NORMALIZATION: tl.constexpr, CHUNK: tl.constexpr):
    """Gradients of `behind` for the running slots and the start."""
    full = phase == CHUNK - 1
    both = cot_slots + cot_start
    if NORMALIZATION == "retract":
        length = lengths(slots)[:, None]
        unit = slots / length
        both = (both - unit * tl.sum(unit * both, axis=1)[:, None]) / length
    return tl.where(full, both, cot_slots), tl.where(full, 0.0, cot_start)


@triton.jit
def step_backward(
    q, k, v, step, log_decay, cot_out, cot_q, cot_k, cot_v, cot_step, cot_decay, at, phase,
    slots, start, cot_slots, cot_start,
    M: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, DB: tl.constexpr, STEPS: tl.constexpr,
    OBJECTIVE: tl.constexpr, NORMALIZATION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a valid token; cotangents of the running slots and the start in front of it."""
    K: tl.constexpr = D if OBJECTIVE == "enc" else M
    V: tl.constexpr = M if OBJECTIVE == "enc" else D
    KB: tl.constexpr = DB if OBJECTIVE == "enc" else MB
    VB: tl.constexpr = MB if OBJECTIVE == "enc" else DB
    valid = phase >= 0
    phi, length = direction(start, NORMALIZATION)
    steps, factor = load_gates(step, log_decay, at, valid, M, MB, STEPS)
    key = load_row(k, at, K, KB, valid)
    h, overlap, wanted = content(phi, key, load_row(v, at, V, VB, valid), OBJECTIVE)
    weight = steps * wanted
    keep, write, pull, norm, across, taken = strengths(h, overlap, weight, length, factor, NORMALIZATION, CHUNK)
    after = moved(slots, start, h, keep, write, pull, CHUNK)

    cot_slots, cot_start = boundary_vjp(after, cot_slots, cot_start, phase, NORMALIZATION, CHUNK)
    query, cot = load_row(q, at, K, KB, valid), load_row(cot_out, at, V, VB, valid)
    cot_query, cot_read = answer_vjp(after, query, cot, OBJECTIVE, NORMALIZATION)
    store_row(cot_q, cot_query, at, K, KB)
    cot_slots += cot_read

    cot_keep, cot_write = tl.sum(cot_slots * slots, axis=1), tl.sum(cot_slots * h[None, :], axis=1)
    cot_pull = tl.sum(cot_slots * start, axis=1)
    cot_h = tl.sum(write[:, None] * cot_slots, axis=0)
    cot_start += pull[:, None] * cot_slots
    cot_slots = keep[:, None] * cot_slots
    more_h, cot_overlap, cot_weight, cot_length, cot_factor = strengths_vjp(
        cot_keep, cot_write, cot_pull, keep, write, pull, h, overlap, weight, length, factor, norm, across, taken,
        NORMALIZATION, CHUNK,
    )  # fmt: skip
    cot_key, cot_value, cot_phi = content_vjp(cot_h + more_h, cot_overlap, steps * cot_weight, phi, h, key, OBJECTIVE)
    store_row(cot_k, cot_key, at, K, KB)
    store_row(cot_v, cot_value, at, V, VB)
    if STEPS == 1:
        tl.store(cot_step + at, tl.sum(wanted * cot_weight, axis=0))
    else:
        store_row(cot_step, wanted * cot_weight, at, M, MB)
    if log_decay is not None:
        tl.store(cot_decay + at, cot_factor * factor)
    if NORMALIZATION == "lazy":
        radial = tl.sum(phi * cot_phi, axis=1)
        cot_phi = (cot_phi - phi * radial[:, None]) / length[:, None] + phi * cot_length[:, None]
    cot_start += cot_phi
    if CHUNK == 1:
        return cot_slots + cot_start, cot_start * 0.0
    return cot_slots, cot_start


@triton.jit(do_not_specialize=["num_tokens"])
def backward_kernel(
    q, k, v, step, log_decay, phases, kept, replayed, cot_out, cot_start_out, cot_slots_out,
    cot_q, cot_k, cot_v, cot_step, cot_decay, cot_start_in, cot_slots_in, num_tokens, H,
    M: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, DB: tl.constexpr, STEPS: tl.constexpr,
    OBJECTIVE: tl.constexpr, NORMALIZATION: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Gradients of everything: segments from the last to the first, each replayed into `replayed` and walked back.

    `kept` as `forward_kernel` writes it; `replayed [B, H, SEGMENT, 2, M, D]` is scratch. Gradients of padded tokens
    are left as they are.
    """
    series = tl.program_id(0).to(tl.int64)
    row, head = series // H, series % H
    segments = tl.cdiv(num_tokens, SEGMENT)
    cot_slots = load_slots(cot_slots_out, series, M, D, MB, DB)
    cot_start = load_slots(cot_start_out, series, M, D, MB, DB)
    if CHUNK == 1:
        cot_slots, cot_start = cot_slots + cot_start, cot_start * 0.0
    for i in range(segments):
        first = (segments - 1 - i) * SEGMENT
        count = tl.minimum(num_tokens - first, SEGMENT)
        place = (series * segments + segments - 1 - i) * 2
        slots, start = load_slots(kept, place, M, D, MB, DB), load_slots(kept, place + 1, M, D, MB, DB)
        for j in range(count):
            store_slots(replayed, slots, (series * SEGMENT + j) * 2, M, D, MB, DB)
            store_slots(replayed, start, (series * SEGMENT + j) * 2 + 1, M, D, MB, DB)
            phase = tl.load(phases + row * num_tokens + first + j)
            at = (row * num_tokens + first + j) * H + head
            slots = step_forward(
                k, v, step, log_decay, at, phase, slots, start,
                M, D, MB, DB, STEPS, OBJECTIVE, NORMALIZATION, CHUNK,
            )  # fmt: skip
            slots, start = behind(slots, start, phase, NORMALIZATION, CHUNK)
        tl.debug_barrier()
        for j in range(count):
            t = first + count - 1 - j
            phase = tl.load(phases + row * num_tokens + t)
            if phase >= 0:
                place = (series * SEGMENT + count - 1 - j) * 2
                cot_slots, cot_start = step_backward(
                    q, k, v, step, log_decay, cot_out, cot_q, cot_k, cot_v, cot_step, cot_decay,
                    (row * num_tokens + t) * H + head, phase,
                    load_slots(replayed, place, M, D, MB, DB), load_slots(replayed, place + 1, M, D, MB, DB),
                    cot_slots, cot_start, M, D, MB, DB, STEPS, OBJECTIVE, NORMALIZATION, CHUNK,
                )  # fmt: skip
        tl.debug_barrier()
    store_slots(cot_slots_in, cot_slots, series, M, D, MB, DB)
    store_slots(cot_start_in, cot_start, series, M, D, MB, DB)


def compile_entries(target: Target) -> list[KernelEntry]:
    """Default slots on both grids, a quarter of them, wide ones, and the mode with most to keep."""
    found = []
    halves = ("q", "k", "v", "out", "cot_out", "cot_q", "cot_k", "cot_v")
    kinds = dict.fromkeys(halves, "*bf16") | {"phases": "*i32", "num_tokens": "i32", "H": "i32"}
    for kernel in (forward_kernel, backward_kernel):
        for slots, width, chunk, objective, normalization in (
            (64, 64, 16, "dec", "retract"), (64, 64, 1, "dec", "retract"), (16, 64, 16, "dec", "retract"),
            (32, 128, 16, "sim", "retract"), (64, 64, 16, "enc", "lazy"),
        ):  # fmt: skip
            cut = plan(slots, width)
            constants = {"M": slots, "D": width, "MB": cut.slots, "DB": cut.width, "STEPS": 1, "SEGMENT": SEGMENT}
            constants |= {"OBJECTIVE": objective, "NORMALIZATION": normalization, "CHUNK": chunk}
            absent = {"kept"} if kernel is forward_kernel else set()
            absent |= {"log_decay"} if normalization == "retract" else set()
            constants |= dict.fromkeys(absent)
            types = {name: kinds.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
            name = f"sphere_slots {kernel.fn.__name__} {slots}x{width} grid {chunk} {objective} {normalization}"
            found.append(KernelEntry(name, kernel, types, constants, cut.warps, 1, has_product=False))
    return found
