"""Where the operands of a tile lie, and the steps on one block of the hidden width that all kernels share.

Every kernel walks the last matrix of the memory, `[HIDDEN, WIDTH]`, in blocks of its rows. A hidden block brings its
own input rows of that matrix: activations of the first layer (depth 2), or columns of the keys (depth 1, where the
hidden width is the key width). The matrices of one batch row and head are packed in one buffer: memory offsets first to
last, then momenta first to last.
"""

import triton
import triton.language as tl


@triton.jit
def token_rows(program, tile, num_tokens, H, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of a tile's rows in slots `[B, S, H, WIDTH]`, and which of them exist."""
    t = tl.arange(0, BLOCK)
    slot = tile * TILE + t
    at = ((program // H * num_tokens + slot) * H + program % H) * WIDTH
    return at[:, None], ((t < TILE) & (slot < num_tokens))[:, None]


@triton.jit
def first_block(j, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr):
    """Columns j.. of a first matrix `[WIDTH, HIDDEN]`."""
    d, h = tl.arange(0, BLOCK_D)[:, None], j + tl.arange(0, BLOCK_J)[None, :]
    return d * HIDDEN + h, (d < WIDTH) & (h < HIDDEN)


@triton.jit
def last_block(j, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr):
    """Rows j.. of a last matrix `[HIDDEN, WIDTH]`."""
    h, d = j + tl.arange(0, BLOCK_J)[:, None], tl.arange(0, BLOCK_D)[None, :]
    return h * WIDTH + d, (h < HIDDEN) & (d < WIDTH)


@triton.jit
def hidden_rows(j, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr):
    """Columns j.. of scratch rows `[BLOCK, HIDDEN]`."""
    t, h = tl.arange(0, BLOCK)[:, None], j + tl.arange(0, BLOCK_J)[None, :]
    return t * HIDDEN + h, (t < BLOCK) & (h < HIDDEN)


@triton.jit
def column_block(pointer, at, valid, j, HIDDEN: tl.constexpr, BLOCK_J: tl.constexpr):
    """Columns j.. of token rows."""
    h = j + tl.arange(0, BLOCK_J)[None, :]
    return tl.load(pointer + at + h, mask=valid & (h < HIDDEN), other=0.0)


@triton.jit
def width_rows(WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Scratch rows `[BLOCK, WIDTH]`."""
    t, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    return t * WIDTH + d, (t < BLOCK) & (d < WIDTH)


@triton.jit
def square(BLOCK: tl.constexpr):
    t = tl.arange(0, BLOCK)
    return t[:, None] * BLOCK + t[None, :]


@triton.jit
def load(pointer, block, mask):
    """A block as float32."""
    return tl.load(pointer + block, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_norm(weight, bias, head, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NORM: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    if not HAS_NORM:
        return tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    at = head * WIDTH + d
    return tl.load(weight + at, mask=d < WIDTH, other=0.0), tl.load(bias + at, mask=d < WIDTH, other=0.0)


@triton.jit
def load_memory(state, base, block, mask, HAS_BASE: tl.constexpr):
    d = load(state, block, mask)
    return d + load(base, block, mask) if HAS_BASE else d


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def row_coefficients(rows, BLOCK: tl.constexpr):
    """Two neighbouring rows of coefficients, `[BLOCK, 1]` each: β and f, or the weights of a token's writes."""
    t = tl.arange(0, BLOCK)[:, None]
    return tl.load(rows + t), tl.load(rows + BLOCK + t)
